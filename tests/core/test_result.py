"""QuotaCheckResult: immutable, comparable, picklable, and readable."""

import copy
import pickle

import pytest

from modelquota import Limit, QuotaCheckResult, ResourceQuotaConfig, ViolationAction, ViolationType

QUOTAS = [
    ResourceQuotaConfig("m", max_ram_mb=10, max_requests_per_second=3, burst_requests=0, max_tokens_per_hour=1_000_000)
]


def test_admitted(manager):
    result = manager.check_quota("m", estimated_tokens=10, ram_needed_mb=2)
    assert bool(result) is result.allowed is True
    assert result.limit is result.violation_type is result.action is result.reason is result.retry_after_ms is None
    assert result.current_usage == pytest.approx(100 / 3)
    assert repr(result) == "<QuotaCheckResult allowed, current_usage=33.3%>"


def test_denied(manager):
    for _ in range(3):
        manager.check_quota("m", 1)
    result = manager.check_quota("m", 1)
    assert bool(result) is result.allowed is False
    assert result.limit is Limit.REQUESTS_PER_SECOND
    assert result.violation_type is ViolationType.RATE_LIMIT
    assert result.action is ViolationAction.THROTTLE
    assert result.reason == "requests per second: 3 of 3 used, 1 asked; retry in 1,017 ms"
    assert result.retry_after_ms == 1017
    assert result.current_usage == 100.0
    assert repr(result) == f"<QuotaCheckResult denied (throttle), {result.reason}>"


def test_reasons(manager):
    assert manager.check_quota("m", 1, ram_needed_mb=11).reason == (
        "RAM: 0 of 10 used, 11 asked; never fits: more than the limit itself"
    )
    manager.update_memory_usage("m", 12, 0)
    assert (
        manager.check_quota("m", 1, ram_needed_mb=1).reason == "RAM: 12 of 10 used, 1 asked; no wait is known to help"
    )
    assert manager.check_quota("m", 11_001).reason == (
        "tokens per second: 0 of 11,000 used, 11,001 asked; never fits: more than the limit itself"
    )
    manager.update_quota("m", max_requests_per_second=0.5)
    manager.clock.advance(3600)
    assert manager.check_quota("m", 0)
    assert manager.check_quota("m", 0).reason == "requests per second: 1 of 1 used, 1 asked; retry in 2,000 ms"


def test_warned(manager):
    manager.update_quota("m", on_violation="warn")
    for _ in range(3):
        manager.check_quota("m", 1)
    result = manager.check_quota("m", 1)
    assert result.allowed
    assert result.limit is Limit.REQUESTS_PER_SECOND
    assert result.action is ViolationAction.WARN
    assert result.retry_after_ms == 1017
    assert result.current_usage == pytest.approx(400 / 3)
    assert repr(result).startswith("<QuotaCheckResult allowed (warn), requests per second: 3 of 3 used")


def test_immutable(manager):
    result = manager.check_quota("m", 1)
    for name in ("allowed", "limit", "violation_type", "action", "reason", "retry_after_ms", "current_usage", "other"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(result, name, 1)


def test_equality_hash_and_pickle(manager):
    results = [manager.check_quota("m", 1) for _ in range(5)]
    for result in results:
        for twin in (*(pickle.loads(pickle.dumps(result, p)) for p in range(2, 6)), copy.deepcopy(result)):
            assert twin == result
            assert hash(twin) == hash(result)
            assert twin.reason == result.reason
            assert type(twin) is QuotaCheckResult
    assert results[3] == results[4]
    assert results[0] != results[3]
    assert results[0] != "allowed"


def test_a_forged_pickle_is_refused():
    restore, _ = QuotaCheckResult.__new__(QuotaCheckResult).__reduce__()
    with pytest.raises(ValueError, match="not the fields of a QuotaCheckResult"):
        restore(True, 15, 0, 0, 0, 0.0, 0.0, 0.0, 0, None, False)
    with pytest.raises(ValueError, match="not the fields of a QuotaCheckResult"):
        restore(True, 1, 15, 0, 0, 0.0, 0.0, 0.0, 0, "m", False)
    with pytest.raises(ValueError, match="not the fields of a QuotaCheckResult"):
        restore(True, 1, 1, 4, 0, 0.0, 0.0, 0.0, 0, "m", False)
