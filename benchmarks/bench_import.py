"""How long does the import take, which brings numpy with it?"""

from benchmarks.harness.results import Row, ratio_at_most
from benchmarks.harness.subprocesses import import_ns

QUESTION = "import"
ROUNDS = 15
NS_PER_MS = 1e6


def test_import(bench):
    series = bench.interleave(ROUNDS, lambda: import_ns("modelquota"), numpy=lambda: import_ns("numpy"))
    ms, numpy_ms = (min(series[name]) / NS_PER_MS for name in ("ours", "numpy"))
    bench.add(Row(QUESTION, "import modelquota", ms, "ms", "numpy", numpy_ms, (ratio_at_most(1.3),)))
