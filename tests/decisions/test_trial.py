"""Limits on trial (`warn`, `shadow_limits`, enforcement switched off) deny nothing and leave no debt."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
from factories import open_quota
from hypothesis import given
from hypothesis import strategies as st
from oracle import SECOND_NS, base
from soundness import level_of, record_of

from modelquota import (
    Limit,
    ManualClock,
    QuotaExceededError,
    ResourceQuotaConfig,
    ResourceQuotaManager,
    ViolationAction,
    ViolationType,
)

START_NS = 10**15
RATE, BURST = 10, 20
RATES = {"max_requests_per_second": RATE, "burst_requests": BURST}
TOKEN_RATES = {"max_tokens_per_second": RATE, "burst_tokens": BURST}
SHADOWED = ("requests_per_second", "tokens_per_second")
TRIALS = ("warn", "shadow", "off")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START_NS)


def begin(manager: ResourceQuotaManager, trial: str, **limits: Any) -> None:
    """Put the model on trial."""
    quota = open_quota("m", **limits, on_violation="warn" if trial == "warn" else "reject")
    manager.set_quota(quota.replace(shadow_limits=SHADOWED if trial == "shadow" else ()))
    manager.enforcement_enabled = trial != "off"


def end(manager: ResourceQuotaManager) -> None:
    """From now on the limits deny."""
    manager.enforcement_enabled = True
    manager.update_quota("m", on_violation="reject", shadow_limits=())


def level(manager: ResourceQuotaManager, what: str) -> Fraction:
    manager.get_usage("m")
    row, _ = record_of(manager, "m")
    return level_of(row, what)


def admitted_in(manager: ResourceQuotaManager, clock: ManualClock, seconds: int, tokens: int) -> int:
    """What gets through if a hundred ask in a second."""
    total = 0
    for _ in range(seconds * 100):
        total += manager.check_quota("m", tokens).allowed
        clock.advance(0.01)
    return total


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("what", ["request", "token"])
def test_after_an_hour_at_ten_times_the_rate_the_rate_is_admitted_at_once(manager, clock, trial, what):
    begin(manager, trial, **(RATES if what == "request" else TOKEN_RATES))
    for _ in range(3600):
        for _ in range(10):
            assert manager.check_quota("m", RATE)  # of requests the rate, of tokens ten times
            if what == "request":
                for _ in range(9):
                    assert manager.check_quota("m", RATE)
        assert level(manager, what) <= RATE + BURST
        clock.advance(1)
    end(manager)
    clock.advance(0.02)  # the ceiling of a second has its 61st slot
    tokens = 0 if what == "request" else 1
    assert 10 * RATE - 1 <= admitted_in(manager, clock, 10, tokens) <= 10 * RATE + RATE + 1


def checked(manager: ResourceQuotaManager, tokens: int) -> None:
    assert manager.check_quota("m", tokens)


def checked_jointly(manager: ResourceQuotaManager, tokens: int) -> None:
    assert manager.check_quota(("other", "m"), tokens)


def in_a_batch(manager: ResourceQuotaManager, tokens: int) -> None:
    assert not manager.check_many(manager.codes(["m"]), tokens).any()


def charged(manager: ResourceQuotaManager, tokens: int) -> None:
    manager.charge_many(manager.codes(["m"]), tokens)


def reserved(manager: ResourceQuotaManager, tokens: int) -> None:
    manager.reserve("m", tokens).release()


def reserved_jointly(manager: ResourceQuotaManager, tokens: int) -> None:
    manager.reserve(("other", "m"), tokens).release()


def acquired(manager: ResourceQuotaManager, tokens: int) -> None:
    manager.acquire("m", tokens, timeout=0).release()


def settled(manager: ResourceQuotaManager, tokens: int) -> None:
    with manager.reserve("m", 0) as grant:
        grant.settle(tokens)


def settled_with_others(manager: ResourceQuotaManager, tokens: int) -> None:
    grants = [manager.reserve("m", 1) for _ in range(3)]
    manager.settle_many(grants, [tokens] * 3)
    for grant in grants:
        grant.release()


def added(manager: ResourceQuotaManager, tokens: int) -> None:
    with manager.reserve("m", 0) as grant:
        for _ in range(10):
            assert grant.add(tokens)
        assert not grant.limit_reached


VERBS = [
    checked, checked_jointly, in_a_batch, charged, reserved, reserved_jointly, acquired, settled, settled_with_others,
    added,
]  # fmt: skip


@pytest.mark.parametrize("trial", TRIALS)
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_lifts_a_level_above_its_cap(manager, clock, trial, verb):
    begin(manager, trial, **RATES, **TOKEN_RATES)
    manager.set_quota(open_quota("other"))
    for _ in range(30):
        verb(manager, 1000)
        assert level(manager, "request") <= RATE + BURST
        assert level(manager, "token") <= RATE + BURST
        clock.advance(0.1)
    end(manager)
    clock.advance(1.1)
    assert manager.check_quota("m", RATE - 1)


EVENTS = st.lists(
    st.tuples(st.just("check"), st.integers(0, 50))
    | st.tuples(st.just("reserve"), st.integers(0, 50))
    | st.tuples(st.just("settle"), st.integers(0, 100))
    | st.tuples(st.just("add"), st.integers(0, 30))
    | st.tuples(st.just("cancel"), st.just(0))
    | st.tuples(st.just("charge"), st.integers(0, 100))
    | st.tuples(
        st.just("advance"), st.sampled_from([0, 1, SECOND_NS // 60, SECOND_NS // 3, SECOND_NS, 61 * SECOND_NS])
    ),
    min_size=5,
    max_size=40,
)


@pytest.mark.parametrize("trial", TRIALS)
@given(events=EVENTS)
def test_refunds_after_charges_that_met_the_cap_refill_nothing(trial, events):
    """A level is never below that of what was really used, charged at its own time and held at the cap."""
    clock = ManualClock(START_NS)
    manager = ResourceQuotaManager(clock=clock)
    begin(manager, trial, **TOKEN_RATES)
    grants: list[Any] = []
    certain: list[tuple[int, int]] = []  # (when, how much): what no refund took back
    open_at: list[int] = []
    for verb, number in events:
        now_ns = clock.now_ns
        if verb == "check":
            manager.check_quota("m", number)
            certain.append((now_ns, number))
        elif verb == "charge":
            charged(manager, number)
            certain.append((now_ns, number))
        elif verb == "reserve":
            grants.append((manager.reserve("m", number), number))
            open_at.append(now_ns)
        elif verb == "advance":
            clock.advance_ns(number)
        elif grants:
            (grant, estimate), at_ns = grants.pop(0), open_at.pop(0)
            if verb == "settle":
                grant.settle(number)
                certain.append((at_ns, min(estimate, number)))
                certain.append((now_ns, max(0, number - estimate)))
                grant.release()
            elif verb == "cancel":
                grant.cancel()
            else:
                grant.add(number)
                certain.append((at_ns, min(estimate, number)))
                certain.append((now_ns, max(0, number - estimate)))
                grant.release()
    for (grant, estimate), at_ns in zip(grants, open_at, strict=True):
        certain.append((at_ns, estimate))
        grant.release()
    expected, last_ns = Fraction(0), START_NS
    for at_ns, count in sorted(certain):
        expected = max(Fraction(0), expected - Fraction(RATE * (at_ns - last_ns), SECOND_NS))
        expected, last_ns = min(expected + count, base(RATE) + BURST), at_ns
    expected = max(Fraction(0), expected - Fraction(RATE * (clock.now_ns - last_ns), SECOND_NS))
    assert level(manager, "token") >= expected


def test_a_cancelled_grant_that_raised_nothing_lowers_nothing(manager):
    begin(manager, "warn", **TOKEN_RATES)
    manager.check_quota("m", RATE + BURST)
    for undo in ("cancel", "settle", "release"):
        grant = manager.reserve("m", 500)
        if undo == "cancel":
            grant.cancel()
        elif undo == "settle":
            grant.settle(0)
        else:
            grant.add(1)
            grant.release()
        assert level(manager, "token") == RATE + BURST


# -- what a limit in the shadow says

LIMITS: dict[Limit, tuple[dict[str, Any], Callable[[ResourceQuotaManager], None]]] = {
    Limit.RAM: ({"max_ram_mb": 4}, lambda manager: manager.update_memory_usage("m", 4, 0)),
    Limit.SSD: ({"max_ssd_mb": 4}, lambda manager: manager.update_memory_usage("m", 0, 4)),
    Limit.REQUESTS_PER_SECOND: (
        {"max_requests_per_second": 1, "burst_requests": 0},
        lambda manager: checked(manager, 1),
    ),
    Limit.TOKENS_PER_SECOND: ({"max_tokens_per_second": 5, "burst_tokens": 0}, lambda manager: checked(manager, 5)),
    Limit.TOKENS_PER_HOUR: ({"max_tokens_per_hour": 5}, lambda manager: checked(manager, 5)),
    Limit.REQUESTS_PER_HOUR: ({"max_requests_per_hour": 1}, lambda manager: checked(manager, 5)),
    Limit.TOKENS_PER_DAY: ({"max_tokens_per_day": 5}, lambda manager: checked(manager, 5)),
    Limit.REQUESTS_PER_DAY: ({"max_requests_per_day": 1}, lambda manager: checked(manager, 5)),
}


@pytest.mark.parametrize("action", list(ViolationAction))
@pytest.mark.parametrize("limit", LIMITS)
def test_a_shadowed_limit_is_judged_counted_and_reported_and_never_denies(manager, limit, action):
    limits, fill = LIMITS[limit]
    manager.set_quota(open_quota("m", **limits, on_violation=action, shadow_limits=[limit]))
    fill(manager)
    before = manager.get_usage("m")
    assert before.total_violations == 0
    for number in range(1, 4):
        result = manager.check_quota("m", 3, 2, 2)
        assert (result.allowed, result.limit, result.action) == (True, limit, ViolationAction.WARN)
        assert result.violation_type is limit.violation_type
        assert result.reason.startswith(limit.label)
        assert manager.get_usage("m").total_violations == number
        assert manager.get_stats().warned_requests == number
    stats = manager.get_stats()
    assert stats.rejected_requests == stats.throttled_requests == stats.queued_requests == 0
    assert stats.allowed_requests == stats.total_checks
    assert manager.get_usage("m").requests_this_day == before.requests_this_day + 3
    assert not manager.check_many(manager.codes(["m"] * 2), 3).any()
    manager.reserve("m", 3, 2, 2).release()
    manager.acquire("m", 3, 2, 2, timeout=0).release()
    manager.update_quota("m", shadow_limits=[], on_violation="reject")
    denial = manager.check_quota("m", 3, 2, 2)
    assert (denial.allowed, denial.limit) == (False, limit)


def test_shadowed_concurrency_and_memory_are_held_and_never_deny(manager):
    quota = open_quota("m", max_concurrent_requests=1, max_ram_mb=4, max_ssd_mb=4, on_violation="queue")
    manager.set_quota(quota.replace(shadow_limits=["concurrency", "ram", "ssd"]))
    with contextlib.ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(manager.acquire("m", 1, 3, 3, timeout=0))
        usage = manager.get_usage("m")
        assert (usage.concurrent_requests, usage.reserved_ram_mb, usage.reserved_ssd_mb) == (5, 15, 15)
        assert usage.total_violations == manager.get_stats().warned_requests == 4
        assert manager.check_quota("m", 1, 3).limit is Limit.RAM
        assert manager.check_quota("m", 1).limit is Limit.CONCURRENCY
        manager.update_quota("m", shadow_limits=["ram", "ssd"])
        denial = manager.check_quota("m", 1, 3, 3)
        assert (denial.allowed, denial.limit) == (False, Limit.CONCURRENCY)
        manager.update_quota("m", shadow_limits=["concurrency", "ssd"], on_violation="reject")
        with pytest.raises(QuotaExceededError) as error:
            manager.reserve("m", 1, 3, 3)
        assert error.value.result.limit is Limit.RAM
        assert manager.check_quota("m", 1, 0, 0).limit is Limit.CONCURRENCY
    usage = manager.get_usage("m")
    assert (usage.concurrent_requests, usage.reserved_ram_mb, usage.reserved_ssd_mb) == (0, 0, 0)


def test_beside_a_real_limit_the_denial_describes_the_real_one(manager, clock):
    shadowed = {"max_ram_mb": 4, "max_tokens_per_hour": 10, "shadow_limits": ["ram", "tokens_per_hour"]}
    manager.set_quota(open_quota("m", max_requests_per_day=3, on_violation="reject", **shadowed))
    for tokens, limit in ((9, None), (9, Limit.TOKENS_PER_HOUR), (1, Limit.TOKENS_PER_HOUR)):
        result = manager.check_quota("m", tokens)
        assert (result.allowed, result.limit) == (True, limit)
    denial = manager.check_quota("m", 1, 100)
    assert (denial.allowed, denial.limit, denial.action) == (False, Limit.REQUESTS_PER_DAY, ViolationAction.REJECT)
    assert denial.violation_type is ViolationType.QUOTA_LIMIT
    assert denial.reason.startswith("requests per day: 3 of 3 used, 1 asked")
    assert denial.current_usage == 100.0
    usage, stats = manager.get_usage("m"), manager.get_stats()
    assert (stats.warned_requests, stats.rejected_requests, usage.total_violations) == (2, 1, 3)
    assert usage.ram_violations == 0
    assert denial.retry_after_ms is not None
    clock.advance(denial.retry_after_ms / 1000)  # the wait is that of the real limit: RAM is never free
    assert manager.check_quota("m", 1, 100)


def test_a_denial_waits_for_real_limits_only(manager):
    manager.set_quota(
        open_quota(
            "m", max_requests_per_second=1, burst_requests=0, max_tokens_per_day=5, on_violation="reject",
            shadow_limits="tokens_per_day",
        )
    )  # fmt: skip
    assert manager.check_quota("m", 5)
    denial = manager.check_quota("m", 5)
    assert (denial.limit, denial.retry_after_ms) == (Limit.REQUESTS_PER_SECOND, 1017)


def test_a_joint_decision_is_denied_by_nothing_in_the_shadow(manager):
    manager.set_quota(open_quota("m", max_tokens_per_hour=5, shadow_limits="tokens_per_hour", on_violation="reject"))
    manager.set_quota(open_quota("real", max_tokens_per_hour=30, on_violation="reject"))
    results = [manager.check_quota(("m", "real"), 10) for _ in range(4)]
    assert [result.allowed for result in results] == [True, True, True, False]
    assert [result.limit for result in results] == [Limit.TOKENS_PER_HOUR] * 4
    assert results[3].reason.startswith("tokens per hour: 30 of 30 used")
    assert manager.get_usage("m").tokens_this_hour == manager.get_usage("real").tokens_this_hour == 30


def test_the_stream_of_a_shadowed_model_goes_on(manager):
    quota = open_quota("m", max_tokens_per_hour=10, max_tokens_per_day=1000, on_violation="reject")
    manager.set_quota(quota.replace(shadow_limits=["tokens_per_hour"]))
    with manager.reserve("m", 5) as grant:
        assert all(grant.add(50) for _ in range(10))
        assert not all(grant.add(100) for _ in range(10))  # the day's limit is real


@pytest.mark.parametrize("names", [(), ("ram",), ("requests_per_second", "tokens_per_day"), ("ssd", "concurrency")])
def test_shadow_limits_are_kept_by_the_state_file(tmp_path, names):
    path = tmp_path / "quota.state"
    quota = ResourceQuotaConfig("m", shadow_limits=names)
    with ResourceQuotaManager(path=path) as manager:
        manager.set_quota(quota)
        assert manager.get_quota("m") == quota
    with ResourceQuotaManager(path=path) as manager:
        assert set(manager.get_quota("m").shadow_limits) == set(names)
        assert manager.get_quota("m") == quota
        new = manager.update_quota("m", shadow_limits=["tokens_per_hour"])
        assert new.shadow_limits == manager.get_quota("m").shadow_limits == ("tokens_per_hour",)
        assert manager.update_quota("m", max_ram_mb=7).shadow_limits == ("tokens_per_hour",)
        view = ResourceQuotaManager.open_readonly(path)
        assert view.get_quota("m").shadow_limits == ("tokens_per_hour",)


def test_while_nothing_is_enforced_all_is_counted(manager):
    begin(manager, "off", max_requests_per_hour=2, max_ram_mb=1, **RATES)
    for _ in range(5):
        result = manager.check_quota("m", 7, 9)
        assert (result.allowed, result.limit, result.action) == (True, None, None)
    usage = manager.get_usage("m")
    assert (usage.requests_this_hour, usage.tokens_this_hour, usage.total_violations) == (5, 35, 0)
    end(manager)
    assert manager.check_quota("m", 7).limit is Limit.REQUESTS_PER_HOUR
