"""Each limit by itself: what passes, in which order limits are judged, and when no wait helps."""

from __future__ import annotations

from typing import Any

import pytest
from factories import UNLIMITED
from hypothesis import given
from hypothesis import strategies as st
from strategies import COUNT_MAX

from modelquota import Limit, ManualClock, ResourceQuotaManager, ViolationType

IN_ORDER = [
    (Limit.RAM, "max_ram_mb", ViolationType.RAM_LIMIT),
    (Limit.SSD, "max_ssd_mb", ViolationType.SSD_LIMIT),
    (Limit.CONCURRENCY, "max_concurrent_requests", ViolationType.CONCURRENCY_LIMIT),
    (Limit.REQUESTS_PER_SECOND, "max_requests_per_second", ViolationType.RATE_LIMIT),
    (Limit.TOKENS_PER_SECOND, "max_tokens_per_second", ViolationType.RATE_LIMIT),
    (Limit.TOKENS_PER_HOUR, "max_tokens_per_hour", ViolationType.QUOTA_LIMIT),
    (Limit.REQUESTS_PER_HOUR, "max_requests_per_hour", ViolationType.QUOTA_LIMIT),
    (Limit.TOKENS_PER_DAY, "max_tokens_per_day", ViolationType.QUOTA_LIMIT),
    (Limit.REQUESTS_PER_DAY, "max_requests_per_day", ViolationType.QUOTA_LIMIT),
]
FIELD_OF = {limit: field for limit, field, _ in IN_ORDER}
NOTHING_PASSES: dict[str, Any] = dict.fromkeys(FIELD_OF.values(), 0)


def manager_with(kind: Any, **fields: Any) -> Any:
    """A manager of one model `m` that has only the limits named."""
    manager = kind(clock=ManualClock(10**12))
    manager.set_quota("m", **UNLIMITED | fields)
    return manager


def test_limits_are_judged_in_their_order(kind: Any) -> None:
    manager = manager_with(kind, **NOTHING_PASSES)
    for limit, field, violation_type in IN_ORDER:
        result = manager.check_quota("m", 1, 1, 1)
        assert (result.allowed, result.limit, result.violation_type) == (False, limit, violation_type)
        manager.update_quota("m", **{field: None})
    result = manager.check_quota("m", 1, 1, 1)
    assert result.allowed
    assert (result.limit, result.violation_type, result.action, result.retry_after_ms) == (None, None, None, None)


@pytest.mark.parametrize(("limit", "field", "violation_type"), IN_ORDER)
def test_zero_admits_nothing_and_no_wait_helps(
    kind: Any, limit: Limit, field: str, violation_type: ViolationType
) -> None:
    manager = manager_with(kind, **{field: 0, "burst_requests": 50, "burst_tokens": 50})
    for _ in range(3):
        result = manager.check_quota("m", 1, 1, 1)
        assert (result.allowed, result.limit, result.violation_type) == (False, limit, violation_type)
        assert result.retry_after_ms is None
        manager.clock.advance(10**6)


@pytest.mark.parametrize(("limit", "field"), [(limit, field) for limit, field, _ in IN_ORDER if "tokens" in field])
def test_no_tokens_pass_every_limit_of_tokens(kind: Any, limit: Limit, field: str) -> None:
    manager = manager_with(kind, **{field: 0})
    assert not manager.check_quota("m", 1)
    assert manager.check_quota("m", 0)
    manager.update_quota("m", **{field: 5})
    assert manager.check_quota("m", 5)
    assert manager.check_quota("m", 1).limit is limit
    assert manager.check_quota("m", 0)
    manager.charge_many(manager.codes(["m"]), 100)
    assert manager.check_quota("m", 1).limit is limit
    assert manager.check_quota("m", 0)


@given(cap=st.integers(0, 9), reported=st.integers(0, 12), asked=st.integers(0, 12), of_ssd=st.booleans())
def test_memory_passes_up_to_the_cap(kind: Any, cap: int, reported: int, asked: int, of_ssd: bool) -> None:
    def pair(mb: int) -> tuple[int, int]:
        return (0, mb) if of_ssd else (mb, 0)

    manager = manager_with(kind, max_ram_mb=pair(cap)[0], max_ssd_mb=pair(cap)[1])
    manager.update_memory_usage("m", *pair(reported))
    result = manager.check_quota("m", 1, *pair(asked))
    assert result.allowed is (asked == 0 or reported + asked <= cap)
    assert result.limit is (None if result.allowed else Limit.SSD if of_ssd else Limit.RAM)
    assert result.retry_after_ms is None
    usage = manager.get_usage("m")
    assert (usage.current_ram_mb, usage.current_ssd_mb) == pair(reported), "what is asked is compared, not held"
    assert (usage.ram_violations, usage.ssd_violations) == pair(int(not result.allowed))


def test_memory_above_the_cap_is_recorded_and_stops_admission_until_it_falls(kind: Any) -> None:
    manager = manager_with(kind, max_ram_mb=100, max_ssd_mb=1000)
    manager.update_memory_usage("m", 150, 4000)
    assert manager.check_quota("m", 1, 1, 1).limit is Limit.RAM
    assert manager.check_quota("m", 1, 0, 1).limit is Limit.SSD
    assert manager.check_quota("m", 1)
    manager.update_memory_usage("m", 99, 10)
    assert manager.check_quota("m", 1, 1, 1)
    assert manager.check_quota("m", 1, 2, 1).limit is Limit.RAM
    usage = manager.get_usage("m")
    assert (usage.current_ram_mb, usage.peak_ram_mb) == (99, 150)
    assert (usage.current_ssd_mb, usage.peak_ssd_mb) == (10, 4000)


def test_without_a_cap_any_memory_passes(kind: Any) -> None:
    manager = manager_with(kind)
    manager.update_memory_usage("m", COUNT_MAX, COUNT_MAX)
    assert manager.check_quota("m", 1, COUNT_MAX, COUNT_MAX)


def test_percent_of_a_rate_of_zero_is_reckoned_against_nothing(kind: Any) -> None:
    manager = manager_with(kind, max_tokens_per_second=0.0, burst_tokens=5)
    manager.charge_many(manager.codes(["m"]), 3)
    assert manager.check_quota("m", 1).current_usage == 300.0


@pytest.mark.parametrize("field", ["max_tokens_per_hour", "max_tokens_per_day", "max_tokens_per_second"])
def test_percent_is_the_quotient_and_a_full_limit_reads_exactly_100(field: str) -> None:
    for limit in (*range(1, 400), 12_345_677, 2**53 - 1):
        manager = manager_with(ResourceQuotaManager, **{field: limit, "burst_tokens": 0})
        most = limit // 3
        assert manager.check_quota("m", most).current_usage == pytest.approx(100 * most / limit, rel=2**-48, abs=0)
        assert manager.check_quota("m", limit - most).current_usage == 100.0


def test_percent_of_memory_and_concurrency_is_each_of_its_own_cap(kind: Any) -> None:
    manager = manager_with(kind, max_ram_mb=1000, max_ssd_mb=400, max_concurrent_requests=20)
    assert manager.check_quota("m", 0).current_usage == 5.0
    assert manager.check_quota("m", 0, 70, 0).current_usage == 7.0
    assert manager.check_quota("m", 0, 0, 40).current_usage == 10.0
    manager.update_memory_usage("m", 900, 100)
    assert manager.check_quota("m", 0).current_usage == 90.0
    assert manager.check_quota("m", 0, 100, 300).current_usage == 100.0
    manager.update_memory_usage("m", 0, 100)
    assert manager.check_quota("m", 0).current_usage == 25.0


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"max_tokens_per_hour": 30}, 30),
        ({"max_tokens_per_day": 30}, 30),
        ({"max_tokens_per_second": 10.0, "burst_tokens": 20}, 30),
        ({"max_tokens_per_second": 2.5, "burst_tokens": 20}, 22),
        ({"max_tokens_per_second": 0.1, "burst_tokens": 0}, 1),
        ({"max_tokens_per_second": 0.1, "burst_tokens": 4}, 5),
    ],
)
def test_a_cost_above_the_limit_itself_never_passes(kind: Any, fields: dict[str, Any], most: int) -> None:
    manager = manager_with(kind, **fields)
    assert manager.check_quota("m", most + 1).retry_after_ms is None
    assert manager.check_quota("m", most)
    assert manager.check_quota("m", most).retry_after_ms > 0
    assert manager.check_quota("m", most + 1).retry_after_ms is None


@pytest.mark.parametrize(
    ("hopeless", "limit"),
    [
        ({"max_ram_mb": 0}, Limit.RAM),
        ({"max_ssd_mb": 0}, Limit.SSD),
        ({"max_concurrent_requests": 0}, Limit.CONCURRENCY),
        ({"max_requests_per_day": 0}, Limit.TOKENS_PER_HOUR),
        ({"max_tokens_per_day": 4}, Limit.TOKENS_PER_HOUR),
    ],
)
def test_one_hopeless_limit_makes_all_waiting_hopeless(kind: Any, hopeless: dict[str, Any], limit: Limit) -> None:
    manager = manager_with(kind, max_tokens_per_hour=8)
    assert manager.check_quota("m", 5, 1, 1)
    result = manager.check_quota("m", 5, 1, 1)
    assert (result.limit, result.retry_after_ms is None) == (Limit.TOKENS_PER_HOUR, False)
    manager.update_quota("m", **hopeless)
    result = manager.check_quota("m", 5, 1, 1)
    assert (result.allowed, result.limit, result.retry_after_ms) == (False, limit, None)


def test_the_longest_wait_of_all_violated_limits_counts(kind: Any) -> None:
    manager = manager_with(kind, max_requests_per_second=1.0, max_tokens_per_hour=5, max_requests_per_day=1)
    assert manager.check_quota("m", 5)
    result = manager.check_quota("m", 5)
    assert result.limit is Limit.REQUESTS_PER_SECOND
    # The clock stands at 1,000 s, in the day's first sub-interval of 24 minutes; it leaves when the 62nd starts.
    assert result.retry_after_ms == (61 * 24 * 60 - 1000) * 1000
