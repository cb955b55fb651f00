"""Refunds and reservations with counters at, or near, 2**62, the largest count: nothing wraps, all of it comes back."""

from __future__ import annotations

import threading
from fractions import Fraction
from typing import Any

import pytest
from factories import open_quota
from patience import PATIENCE, until
from soundness import assert_not_negative, level_of, record_of

from modelquota import Limit, ManualClock, QuotaExceededError, ResourceQuotaManager

MOST = 2**62
DAY_SEC = 86_400
CAP = 21  # of the level: a rate of at most 1, and a burst of 20


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(10**15)


def cold_row_of(manager: ResourceQuotaManager) -> dict[str, Any]:
    """The cold row of "m", none of whose counters has wrapped."""
    _, cold = record_of(manager, "m")
    modulo = ("journal_requests", "journal_tokens", "journal_requests_start", "journal_tokens_start", "tokens_refunded")
    assert_not_negative({name: figure for name, figure in cold.items() if name not in modulo})  # 2**64
    return cold


def level(manager: ResourceQuotaManager) -> Fraction:
    """Tokens in the long-run level of "m" now."""
    manager.get_usage("m")
    row, _ = record_of(manager, "m")
    return level_of(row, "token")


def test_a_refund_too_small_for_its_slot_is_not_taken_from_a_later_one(manager, clock):
    """A closed slot keeps large counts in coarse units: what is not refunded there ages out with the slot."""
    limit = 2**29
    manager.set_quota(open_quota("m", max_tokens_per_hour=limit))
    clock.advance_ns(-clock.now_ns % (3600 * 10**9))
    assert manager.check_quota("m", 2**28)
    grants = [manager.reserve("m", 3) for _ in range(20_000)]
    clock.advance(90)
    assert manager.check_quota("m", 60_000)
    clock.advance(60)
    for grant in grants:
        grant.cancel()
    clock.advance(3_660 - 150 + 5)  # the first slot has aged out, the other one has not
    assert manager.get_usage("m").tokens_this_hour >= 60_000


@pytest.mark.parametrize("rate", [1, 0.1, 0.3, 0.7, 1 / 3, 1e-5, 5e-324])
@pytest.mark.parametrize("tokens", [10**12, 10**15, MOST // 2, MOST - 1])
def test_what_was_added_in_error_comes_back_whatever_the_unit_of_the_level(manager, clock, rate, tokens):
    """Beyond what the level holds of some rates: until it is settled the model is locked, afterwards it is not."""
    manager.set_quota(open_quota("m", max_tokens_per_second=rate, burst_tokens=20, on_violation="reject"))
    with manager.reserve("m", 1) as grant:
        assert not grant.add(tokens)
        assert level(manager) > CAP
        clock.advance(30)
        assert manager.check_quota("m", 1).limit is Limit.TOKENS_PER_SECOND
        grant.settle(1)
        assert level(manager) < 2  # one that stays, and what is rounded
    assert manager.check_quota("m", CAP - 2)
    assert manager.get_usage("m").tokens_this_day == CAP - 1
    cold_row_of(manager)


def test_a_refund_from_a_level_that_is_far_above_its_cap_is_all_of_it(manager, clock):
    """Charged over eight days; a level of a rate of 1 then is more than 64 bits in its coarse unit."""
    manager.set_quota(open_quota("m", max_tokens_per_second=1, burst_tokens=20, on_violation="reject"))
    late = manager.reserve("m", 1)
    for _ in range(8):
        with manager.reserve("m", 0) as grant:
            grant.add(MOST)
        clock.advance(2 * DAY_SEC)
    before = level(manager)
    assert before > 7 * MOST
    late.add(500)
    clock.advance(10)
    assert level(manager) == before + 500 - 1 - 10  # one was estimated
    late.settle(1)
    assert level(manager) == before - 10
    late.release()
    cold_row_of(manager)


@pytest.mark.parametrize("how", ["cancel", "settle"])
@pytest.mark.parametrize("estimate", [MOST, MOST - 1])
def test_a_request_for_everything_is_refunded_to_the_last_token(manager, how, estimate):
    limits = {f"max_tokens_per_{window}": MOST for window in ("hour", "day")}
    manager.set_quota(open_quota("m", max_tokens_per_second=1e18, burst_tokens=MOST, **limits, on_violation="reject"))
    for _ in range(3):
        with manager.reserve("m", estimate) as grant:
            assert not manager.check_quota("m", MOST - estimate + 1)
            if how == "cancel":
                grant.cancel()
            else:
                grant.settle(0)
        usage = manager.get_usage("m")
        assert (usage.tokens_this_second, usage.tokens_this_hour, usage.tokens_this_day) == (0, 0, 0)
        assert level(manager) == 0
        cold_row_of(manager)


def test_what_open_grants_have_reserved_stays_within_a_count(manager, clock):
    """Each has reserved all that a window admits, and is still open when that has aged out."""
    manager.set_quota(open_quota("m", max_tokens_per_hour=MOST, on_violation="queue", grace_period_sec=60))
    grants = []
    for _ in range(3):
        clock.advance(2 * DAY_SEC)
        grants.append(manager.reserve("m", MOST))
        assert cold_row_of(manager)["reserved_tokens"] == MOST
    got: list[Any] = []

    def acquire() -> None:
        try:
            got.append(manager.acquire("m", 1))
        except QuotaExceededError as error:
            got.append(error)

    thread = threading.Thread(target=acquire, daemon=True)
    thread.start()
    until(lambda: got or manager.get_usage("m").queued_requests)
    assert not got  # the tokens may come back
    grants.pop().cancel()
    thread.join(PATIENCE)
    got.pop().release()
    for grant in grants:
        grant.release()
    cold = cold_row_of(manager)
    assert (cold["reserved_tokens"], cold["concurrent"]) == (0, 0)


def test_memory_that_open_grants_hold_stays_within_a_count(manager):
    manager.set_quota(open_quota("m"))
    grants = [manager.reserve("m", 0, MOST, MOST) for _ in range(3)]
    usage = manager.get_usage("m")
    assert (usage.reserved_ram_mb, usage.reserved_ssd_mb) == (MOST, MOST)
    cold_row_of(manager)
    manager.update_quota("m", max_ram_mb=MOST, on_violation="reject")
    assert not manager.check_quota("m", 0, 1)
    for grant in grants:
        grant.release()
    usage = manager.get_usage("m")
    assert (usage.reserved_ram_mb, usage.reserved_ssd_mb) == (0, 0)
    assert manager.check_quota("m", 0, MOST)


@pytest.mark.parametrize("rate", [0.1, 0.3, 1e-5])
def test_what_fills_a_level_to_its_end_and_comes_back_is_no_refill(manager, clock, rate):
    """What others had charged before stays charged."""
    manager.set_quota(open_quota("m", max_tokens_per_second=rate, burst_tokens=20, on_violation="reject"))
    assert manager.check_quota("m", 10)
    with manager.reserve("m", 1) as grant:
        grant.add(MOST // 2)
        grant.settle(1)
    assert 11 <= level(manager) < 12
    clock.advance(1.02)
    assert not manager.check_quota("m", 11)
    assert manager.check_quota("m", 9)


WINDOW_SEC = {"minute": 60, "hour": 3_600, "day": DAY_SEC}
LIMIT = 1000


def settle_all(manager: ResourceQuotaManager) -> None:
    with manager.reserve("m", 10) as grant:
        grant.settle(MOST)


def add_all(manager: ResourceQuotaManager) -> None:
    with manager.reserve("m", 0) as grant:
        assert not grant.add(MOST)


def charge_all(manager: ResourceQuotaManager) -> None:
    manager.charge_many(manager.codes(["m"] * 3), MOST)


def admitted_by_checks(manager: ResourceQuotaManager) -> int:
    return sum(10 * bool(manager.check_quota("m", 10)) for _ in range(LIMIT))


def admitted_by_batches(manager: ResourceQuotaManager) -> int:
    codes = manager.codes(["m"] * LIMIT)
    return sum(10 * int((manager.check_many(codes, 10) == 0).sum()) for _ in range(2))


def admitted_by_grants(manager: ResourceQuotaManager) -> int:
    grants = []
    while len(grants) < LIMIT:
        try:
            grants.append(manager.reserve("m", 10))
        except QuotaExceededError:
            break
    for grant in grants:
        grant.release()
    return 10 * len(grants)


def admitted_by_add(manager: ResourceQuotaManager) -> int:
    with manager.reserve("m", 0) as grant:
        for _ in range(LIMIT):
            if not grant.add(10):
                return grant.tokens - 10
    return grant.tokens


@pytest.mark.parametrize("admitted", [admitted_by_checks, admitted_by_batches, admitted_by_grants, admitted_by_add])
@pytest.mark.parametrize("charge", [settle_all, add_all, charge_all])
@pytest.mark.parametrize("window", WINDOW_SEC)
def test_a_window_counts_on_while_a_longer_one_is_at_the_largest_count(manager, clock, window, charge, admitted):
    manager.set_quota(open_quota("m", **{f"max_tokens_per_{window}": LIMIT, "max_tokens_per_month": LIMIT}))
    manager.update_quota("m", max_tokens_per_month=None)  # it stays counted
    charge(manager)
    assert not manager.check_quota("m", 1)
    length_sec = WINDOW_SEC[window]
    for _ in range(3):
        clock.advance(length_sec * 62 / 60)  # with the partly expired slot and the current one
        assert admitted(manager) == LIMIT
        assert manager.get_usage("m").tokens_this_month == MOST
        assert not manager.check_quota("m", 1)
        cold_row_of(manager)


def test_a_rate_holds_while_the_day_is_at_the_largest_count(manager, clock):
    manager.set_quota(open_quota("m"))
    charge_all(manager)
    clock.advance(2)
    manager.update_quota("m", max_tokens_per_second=10, burst_tokens=20)
    assert admitted_by_checks(manager) == 30
    clock.advance(5)
    assert admitted_by_checks(manager) == 30  # has drained to 0, but no further
    clock.advance(1)
    assert admitted_by_checks(manager) == 0  # the second's ceiling
    clock.advance(0.1)
    assert admitted_by_checks(manager) == 10


def test_what_no_longer_counts_in_one_window_is_refunded_to_none(manager, clock):
    """A refund would take from the day what was charged to it before."""
    manager.set_quota(open_quota("m", max_tokens_per_minute=LIMIT))
    charge_all(manager)
    clock.advance(62)
    manager.reserve("m", 300).cancel()
    usage = manager.get_usage("m")
    assert (usage.tokens_this_minute, usage.tokens_this_day) == (300, MOST)
    with manager.reserve("m", 100) as grant:
        grant.add(2**61)
        grant.settle(100)
    assert manager.get_usage("m").tokens_this_day == MOST
    assert not manager.check_quota("m", 1)


def test_a_window_that_reaches_the_largest_count_refunds_what_it_took(manager, clock):
    manager.set_quota(open_quota("m", max_tokens_per_minute=LIMIT))
    manager.charge_many(manager.codes(["m"]), MOST - 100)
    clock.advance(66)  # what a slot could not hold was carried into the next ones
    with manager.reserve("m", 50) as grant:
        grant.add(LIMIT)  # 950 beyond the estimate, of which the day takes 50
        assert manager.get_usage("m").tokens_this_minute == LIMIT
        grant.cancel()
    usage = manager.get_usage("m")
    assert (usage.tokens_this_minute, usage.tokens_this_day) == (LIMIT - 100, MOST - 100)
