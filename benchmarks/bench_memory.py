"""How much memory does a model take, when requests have filled the rings of its windows?"""

import pytest

from benchmarks.harness.results import Row, at_most
from benchmarks.harness.subprocesses import run_module

QUESTION = "memory"
MODELS = 50_000


@pytest.mark.parametrize(
    ("windows", "bound"), [("second, hour and day", 2_900), ("all five windows", 4_000)], ids=["default", "all"]
)
def test_resident(bench, windows, bound):
    models = MODELS if bench.enabled else 1_000
    how = ["--all-windows"] if windows.startswith("all") else []
    found = bench.once(lambda: run_module("benchmarks.harness.memory", str(models), *how))
    case = f"a model in use, of {models:,}: {windows}"
    bench.add(Row(QUESTION, case, found["bytes_per_model"], "B", targets=(at_most(bound),)))
    if not how:
        bench.add(Row(QUESTION, "an empty manager", found["empty_bytes"] / 2**20, "MB", targets=(at_most(1),)))
    assert 0 < found["new_bytes_per_model"] < found["bytes_per_model"]
