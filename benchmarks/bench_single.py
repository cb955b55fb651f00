"""What does one check cost?"""

from benchmarks.harness.loops import Loop
from benchmarks.harness.results import at_most, ratio_at_most

QUESTION = "one check"


def test_keyword(bench, manager, floor):
    bench.against_floor(
        QUESTION,
        'check_quota("llama", estimated_tokens=100)',
        Loop('manager.check_quota("llama", estimated_tokens=100)', manager=manager),
        floor and Loop('floor.check("llama", estimated_tokens=100)', floor=floor),
        at_most(90),
        ratio_at_most(1.4),
    )


def test_positional(bench, manager, floor):
    bench.against_floor(
        QUESTION,
        'check_quota("llama", 100)',
        Loop('manager.check_quota("llama", 100)', manager=manager),
        floor and Loop('floor.check("llama", 100)', floor=floor),
    )


def test_memory_asked_too(bench, manager, floor):
    bench.against_floor(
        QUESTION,
        'check_quota("llama", 100, ram_needed_mb=8, ssd_needed_mb=8)',
        Loop('manager.check_quota("llama", 100, ram_needed_mb=8, ssd_needed_mb=8)', manager=manager),
        floor and Loop('floor.check("llama", 100, ram_needed_mb=8, ssd_needed_mb=8)', floor=floor),
    )


def test_handle(bench, manager, floor, floors):
    bench.against_floor(
        QUESTION,
        "handle: quota.check(100)",
        Loop("quota.check(100)", quota=manager.model("llama")),
        floor and Loop("quota.check(100)", quota=floors.FloorHandle(floor, "llama")),
        at_most(65),
    )


def test_unknown_model(bench, manager, floor):
    bench.against_floor(
        QUESTION,
        "a model without a quota",
        Loop('manager.check_quota("nobody", estimated_tokens=100)', manager=manager, operations=1_000),
        floor and Loop('floor.check("nobody", estimated_tokens=100)', floor=floor, operations=1_000),
    )
