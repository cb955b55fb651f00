"""How much memory does a model take, and does it grow with its traffic?"""

from benchmarks.harness.results import Row, at_most
from benchmarks.harness.subprocesses import run_module

QUESTION = "memory"
MODELS = 50_000


def test_resident(bench):
    models = MODELS if bench.enabled else 1_000
    found = bench.once(lambda: run_module("benchmarks.harness.memory", str(models)))
    case = f"a model in use, of {models:,}"
    bench.add(Row(QUESTION, case, found["bytes_per_model"], "B", targets=(at_most(2_700),)))
    case = "what requests in 195 slots add to it"
    bench.add(Row(QUESTION, case, found["traffic_bytes_per_model"], "B", targets=(at_most(1),)))
    bench.add(Row(QUESTION, "an empty manager", found["empty_bytes"] / 2**20, "MB", targets=(at_most(1),)))
    assert found["bytes_per_model"] > 0
