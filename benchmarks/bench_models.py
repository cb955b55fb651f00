"""What does a check cost where there are many models, asked for in random order?"""

import pytest

from benchmarks.harness.loops import OPERATIONS, Loop
from benchmarks.harness.results import at_most

QUESTION = "many models"
ROUNDS = 200
SLICES = 20  # rounds until an order begins again: more models than any cache holds


@pytest.mark.parametrize(("models", "targets", "judged"), [(1_000, [at_most(110)], True), (100_000, [], False)])
def test_random_order(bench, fleet_of, models, targets, judged):
    fleet = fleet_of(models)
    ids = fleet.random_ids(SLICES * OPERATIONS)
    bench.against_floor(
        QUESTION,
        f"{models:,} models",
        Loop("manager.check_quota(each, estimated_tokens=100)", ids, manager=fleet.manager),
        fleet.floor and Loop("floor.check(each, estimated_tokens=100)", ids, floor=fleet.floor),
        *targets,
        rounds=ROUNDS,
        judged=judged,
    )


def test_handles(bench, fleet_of, floors):
    fleet = fleet_of(1_000)
    ids = fleet.random_ids(SLICES * OPERATIONS)
    handles = {model_id: fleet.manager.model(model_id) for model_id in fleet.ids}
    floor_handles = {model_id: floors.FloorHandle(fleet.floor, model_id) for model_id in fleet.ids} if floors else {}
    bench.against_floor(
        QUESTION,
        "1,000 models, by handle",
        Loop("each.check(100)", [handles[model_id] for model_id in ids]),
        Loop("each.check(100)", [floor_handles[model_id] for model_id in ids]) if floors else None,
        rounds=ROUNDS,
    )
