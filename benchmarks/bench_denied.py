"""What does a denial cost, its result read but for the words?"""

import pytest

from benchmarks.harness.loops import Loop
from benchmarks.harness.models import GENEROUS
from benchmarks.harness.results import at_most
from modelquota import Limit, ManualClock, ResourceQuotaManager

QUESTION = "denied"
READ = "; result.allowed; result.retry_after_ms"
SECOND_NS = 1_000_000_000


def _spent_rate():
    """One request a second passes, every other is denied."""
    manager = ResourceQuotaManager()
    manager.set_quota("llama", **{**GENEROUS, "max_requests_per_second": 1.0, "burst_requests": 0})
    manager.check_quota("llama", 100)
    return manager


def _spent_day():
    manager = ResourceQuotaManager()
    manager.set_quota("llama", **{**GENEROUS, "max_tokens_per_day": 150})
    manager.check_quota("llama", 100)
    return manager


def _too_large():
    manager = ResourceQuotaManager()
    manager.set_quota("llama", **{**GENEROUS, "max_tokens_per_hour": 50})
    return manager


def _spent_slot_by_slot():
    """The hour is spent in each of its slots, so that the wait has to be looked for among them."""
    clock = ManualClock()
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("llama", **{**GENEROUS, "max_tokens_per_hour": 61})
    for _ in range(61):
        manager.check_quota("llama", 1)
        clock.advance_ns(60 * SECOND_NS)
    return manager


@pytest.mark.parametrize(
    ("case", "make", "limit", "time_runs"),
    [
        ("requests per second spent", _spent_rate, Limit.REQUESTS_PER_SECOND, True),
        ("tokens per day spent", _spent_day, Limit.TOKENS_PER_DAY, True),
        ("more than the limit itself", _too_large, Limit.TOKENS_PER_HOUR, True),
        ("tokens per hour spent in 60 slots; time stands still", _spent_slot_by_slot, Limit.TOKENS_PER_HOUR, False),
    ],
)
def test_denied(bench, floors, case, make, limit, time_runs):
    manager = make()
    # A floor reads the clock that runs.
    floor = floors.FloorTable(["llama"]) if floors and time_runs else None
    bench.against_floor(
        QUESTION,
        case,
        Loop(f'result = manager.check_quota("llama", estimated_tokens=100){READ}', manager=manager),
        floor and Loop(f'result = floor.check("llama", estimated_tokens=100){READ}', floor=floor),
        at_most(200),
    )
    assert manager.check_quota("llama", 100).limit is limit
