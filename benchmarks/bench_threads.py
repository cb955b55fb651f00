"""What does a second thread change?

A single check keeps the GIL, so two threads take turns: what counts is that a check costs no more than it does one
thread, in time of the clock on the wall over all checks. A batch releases the GIL, so two threads are to do twice as
much as one.
"""

from functools import partial
from statistics import median

import pytest

from benchmarks.harness.loops import Loop, batch_round
from benchmarks.harness.parallel import processors, thread_round_ns
from benchmarks.harness.results import FLOOR, Row, at_least, ratio_at_most

QUESTION = "two threads"
CHECKS = 400_000  # per thread: many of the interpreter's switches between threads, one in 5 ms
CHECK_ROUNDS = 15
BATCHES = 10
BATCH_ROUNDS = 400
HALVES = range(500), range(500, 1_000)


@pytest.mark.parametrize("same", [True, False], ids=["same", "different"])
def test_checks(bench, fleet_of, same):
    manager = fleet_of(1_000).manager
    checks = CHECKS if bench.enabled else 1_000
    workers = [
        Loop(f'manager.check_quota("model-{i}", estimated_tokens=100)', manager=manager, operations=checks).round_ns
        for i in ((0, 0) if same else (0, 1))
    ]
    series = bench.interleave(
        CHECK_ROUNDS,
        lambda: thread_round_ns(workers, bound=False) / (2 * checks),
        one=lambda: thread_round_ns(workers[:1], bound=False) / checks,
    )
    case = f"single checks, {'one model' if same else 'a model each'}"
    # The median: the least is a round in which one thread had everything to itself.
    ns, one_ns = median(series["ours"]), median(series["one"])
    bench.add(Row(QUESTION, case, ns, beside="one thread", beside_figure=one_ns, targets=(ratio_at_most(1.3),)))


@pytest.mark.skipif(len(processors()) < 2, reason="two processors are needed")
@pytest.mark.parametrize(("same", "targets"), [(False, (at_least(1.8),)), (True, ())], ids=["different", "same"])
def test_batches(bench, fleet_of, same, targets):
    fleet = fleet_of(1_000)
    models = (HALVES[0], HALVES[0]) if same else HALVES
    crews = {
        "ours": [batch_round(fleet.random_batches(BATCHES, models=each), fleet.manager.check_many) for each in models]
    }
    if fleet.floor:
        crews["floor"] = [
            batch_round(fleet.random_floor_batches(BATCHES, models=each), fleet.floor.check_many) for each in models
        ]
    rounds = {name: partial(thread_round_ns, crew, bound=True) for name, crew in crews.items()}
    rounds |= {f"{name}_one": partial(thread_round_ns, crew[:1], bound=True) for name, crew in crews.items()}
    series = bench.interleave(BATCH_ROUNDS, **rounds)
    # Who contends for a lock is lucky at times, and the least is then no measure.
    typical = {name: (median if same else min)(values) for name, values in series.items()}
    gains = {name: 2 * typical[f"{name}_one"] / typical[name] for name in crews}
    case = f"check_many, {'the same models' if same else 'different models'}: throughput of one"
    floor = {"beside": FLOOR, "beside_figure": gains["floor"]} if fleet.floor else {}
    bench.add(Row(QUESTION, case, gains["ours"], "×", targets=targets, **floor))
