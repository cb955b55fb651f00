"""How do cost and memory grow, from one model to a million?"""

import re
from pathlib import Path

from benchmarks.harness.results import FLOOR, Row
from benchmarks.harness.subprocesses import run_module

QUESTION = "growth"
MOST = 1_000_000
#: Models, their ids, and the floors beside them.
BYTES_PER_MODEL = 4_000


def _most_that_fit():
    """A million models, or a tenth of that where there is no memory for them."""
    available_kb = int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1])
    return MOST if available_kb * 1024 > MOST * BYTES_PER_MODEL else MOST // 10


def test_growth(bench):
    points = bench.once(
        lambda: run_module("benchmarks.drawing.growth", str(_most_that_fit() if bench.enabled else 1_000))
    )
    bench.note("growth", points)
    for kind, verb in (("check", "check_quota"), ("batch", "check_many")):
        for point in points:
            floor_ns = point[f"{kind}_floor_ns"]
            case = f"{verb}, {point['models']:,} model{'s' * (point['models'] > 1)}"
            beside = FLOOR if floor_ns else ""
            bench.add(Row(QUESTION, case, point[f"{kind}_ns"], beside=beside, beside_figure=floor_ns))
    last = points[-1]
    bench.add(Row(QUESTION, f"memory of a model, of {last['models']:,}", last["bytes_per_model"], "B"))
    assert [point["models"] for point in points][:4] == [1, 10, 100, 1_000]
