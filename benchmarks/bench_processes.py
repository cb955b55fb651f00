"""What does a second process change, forked and so sharing the limits?"""

from statistics import median

import pytest

from benchmarks.harness.loops import Loop, batch_round
from benchmarks.harness.models import GENEROUS
from benchmarks.harness.parallel import forked, processors
from benchmarks.harness.results import FLOOR, Row, at_least
from modelquota import ResourceQuotaConfig, ResourceQuotaManager

QUESTION = "two processes"
CHECKS = 20_000
BATCHES = 10
ROUNDS = 400
HALVES = range(500), range(500, 1_000)

pytestmark = pytest.mark.skipif(len(processors()) < 2, reason="two processors are needed")


@pytest.mark.parametrize(("same", "least"), [(False, 1.8), (True, 0.6)], ids=["different", "same"])
def test_checks(bench, fleet_of, same, least):
    fleet = fleet_of(1_000)
    checks = CHECKS if bench.enabled else 1_000
    ids = ("model-0", "model-0") if same else ("model-0", "model-1")
    ours = [
        Loop(f'manager.check_quota("{each}", estimated_tokens=100)', manager=fleet.manager, operations=checks)
        for each in ids
    ]
    floor = fleet.floor and [
        Loop(f'floor.check("{each}", estimated_tokens=100)', floor=fleet.floor, operations=checks) for each in ids
    ]
    _add_gain(
        bench,
        f"single checks, {'one model' if same else 'a model each'}: throughput of one",
        [loop.round_ns for loop in ours],
        floor and [loop.round_ns for loop in floor],
        least,
        contended=same,
    )


def test_checks_on_a_file(bench, tmp_path):
    """Shared through a state file instead of memory without a name."""
    manager = ResourceQuotaManager(path=tmp_path / "quota.state")
    checks = CHECKS if bench.enabled else 1_000
    ours = []
    for model_id in ("model-0", "model-1"):
        manager.set_quota(ResourceQuotaConfig(model_id, **GENEROUS))
        code = f'manager.check_quota("{model_id}", estimated_tokens=100)'
        ours.append(Loop(code, manager=manager, operations=checks).round_ns)
    _add_gain(bench, "single checks, a model each, a state file: throughput of one", ours, None, 1.8, contended=False)


@pytest.mark.parametrize(("same", "least"), [(False, 1.8), (True, 0.6)], ids=["different", "same"])
def test_batches(bench, fleet_of, same, least):
    fleet = fleet_of(1_000)
    models = (HALVES[0], HALVES[0]) if same else HALVES
    ours = [batch_round(fleet.random_batches(BATCHES, models=each), fleet.manager.check_many) for each in models]
    floor = fleet.floor and [
        batch_round(fleet.random_floor_batches(BATCHES, models=each), fleet.floor.check_many) for each in models
    ]
    _add_gain(
        bench,
        f"check_many, {'the same models' if same else 'different models'}: throughput of one",
        ours,
        floor,
        least,
        contended=same,
    )


def _add_gain(bench, case, ours, floor, least, *, contended):
    with forked(ours) as run, forked(floor or []) as run_floor:
        rounds = {"ours": lambda: run(2), "one": lambda: run(1)}
        if floor:
            rounds |= {"floor": lambda: run_floor(2), "floor_one": lambda: run_floor(1)}
        series = bench.interleave(ROUNDS, **rounds)
    # Who contends for a lock is lucky at times, and the least is then no measure.
    typical = {name: (median if contended else min)(values) for name, values in series.items()}
    gain = 2 * typical["one"] / typical["ours"]
    beside = {"beside": FLOOR, "beside_figure": 2 * typical["floor_one"] / typical["floor"]} if floor else {}
    bench.add(Row(QUESTION, case, gain, "×", targets=(at_least(least),), **beside))
