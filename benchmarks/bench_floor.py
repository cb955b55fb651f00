"""What is a check made of, before anything is decided?"""

import pytest

from benchmarks.harness.loops import Loop
from benchmarks.harness.results import Row

QUESTION = "floors"
ROUNDS = 200


@pytest.fixture
def table(floors):
    if floors is None:
        pytest.skip("the floors cannot be compiled: pip install 'modelquota[bench]'")
    return floors.FloorTable(["llama"])


def test_clock_and_lock(bench, table, floors):
    turns = 10_000
    series = bench.interleave(ROUNDS, lambda: floors.clock_ns(turns), lock=lambda: floors.lock_ns(turns))
    bench.add(Row(QUESTION, "reading the clock", min(series["ours"])))
    bench.add(Row(QUESTION, "locking and unlocking", min(series["lock"])))


def test_calls(bench, table, floors):
    handle = floors.FloorHandle(table, "llama")
    statements = {
        "an empty call with a keyword": Loop('table.call("llama", estimated_tokens=100)', table=table),
        "... and the look-up": Loop('table.look_up("llama", estimated_tokens=100)', table=table),
        "... and clock and lock": Loop('table.check("llama", estimated_tokens=100)', table=table),
        "an empty call of a handle": Loop("handle.call(100)", handle=handle),
        "... and clock and lock, of a handle": Loop("handle.check(100)", handle=handle),
    }
    empty = next(iter(statements.values())).empty_round_ns
    others = {case: loop.round_ns for case, loop in statements.items()}
    series = bench.interleave(ROUNDS, empty, **others)
    for case in statements:
        bench.add(Row(QUESTION, case, min(series[case]) - min(series["ours"])))
