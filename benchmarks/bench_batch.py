"""What does a request cost in a batch?

Where time runs, slots end while batches are decided, and each model's first request after the end of its slot, every
1/60 s, pays for it; where it stands still (a `ManualClock`), there is the bare decision.
"""

import numpy as np
import pytest

from benchmarks.harness.loops import batch_round
from benchmarks.harness.models import BATCH, TOKENS
from benchmarks.harness.results import at_most

QUESTION = "batch"
ROUNDS = 60
SLOT_NS = 16_666_667  # a sixtieth of a second, rounded up
BATCHES = 20  # in a round, each in an order of its own: more models than any cache holds


@pytest.mark.parametrize("time_runs", [True, False], ids=["time-runs", "time-stands-still"])
@pytest.mark.parametrize(
    ("verb", "models", "size", "targets"),
    [
        ("check_many", 1_000, 100, []),
        ("check_many", 1_000, BATCH, [at_most(16)]),
        ("check_many", 100_000, BATCH, [at_most(50)]),
        ("charge_many", 1_000, BATCH, [at_most(12)]),
        ("charge_many", 100_000, BATCH, []),
    ],
)
def test_batch(bench, fleet_of, verb, models, size, targets, time_runs):
    fleet = fleet_of(models, time_runs=time_runs)
    bench.against_floor(
        QUESTION,
        f"{verb}, {models:,} models, {size:,} at once, time {'runs' if time_runs else 'stands still'}",
        batch_round(fleet.random_batches(BATCHES, size), getattr(fleet.manager, verb)),
        fleet.floor and batch_round(fleet.random_floor_batches(BATCHES, size), fleet.floor.check_many),
        *targets,
        rounds=ROUNDS,
        judged=models <= 1_000,
    )


def test_slots_end(bench, fleet_of):
    """Every request is its model's first in a new slot: what the end of a slot costs, apart from memory."""
    fleet = fleet_of(1_000, time_runs=False)
    tokens = np.full(len(fleet.ids), TOKENS)
    batches = [(np.random.default_rng(seed).permutation(fleet.codes), tokens) for seed in range(BATCHES)]

    def check_many_in_a_new_slot(rows, tokens):
        fleet.manager.clock.advance_ns(SLOT_NS)
        fleet.manager.check_many(rows, tokens)

    bench.against_floor(
        QUESTION,
        "check_many, 1,000 models, 1,000 at once, each in a new slot",
        batch_round(batches, check_many_in_a_new_slot),
        fleet.floor and batch_round(fleet.random_floor_batches(BATCHES, len(fleet.ids)), fleet.floor.check_many),
        rounds=ROUNDS,
    )
