"""Grants: what is held is given back once, and the truth replaces the estimate where the estimate was charged."""

import asyncio
import contextlib
import pickle
import warnings

import pytest
from factories import open_quota, used

from modelquota import (
    Grant,
    GrantClosedError,
    Limit,
    ManualClock,
    QuotaExceededError,
    ResourceQuotaManager,
    UnknownModelError,
)

QUOTAS = [open_quota("m", max_tokens_per_hour=1000)]
HOUR_NS = 3600 * 10**9


@pytest.fixture
def clock():
    return ManualClock(10 * HOUR_NS)


def test_a_reservation_charges_and_holds(manager):
    grant = manager.reserve("m", 300, ram_needed_mb=100, ssd_needed_mb=200)
    usage = manager.get_usage("m")
    assert (usage.tokens_this_hour, usage.requests_this_hour) == (300, 1)
    assert (usage.reserved_ram_mb, usage.reserved_ssd_mb, usage.concurrent_requests) == (100, 200, 1)
    assert (grant.estimated_tokens, grant.tokens, grant.model_ids, grant.released) == (300, 300, ("m",), False)
    grant.release()
    usage = manager.get_usage("m")
    assert (usage.tokens_this_hour, usage.requests_this_hour) == (300, 1)
    assert (usage.reserved_ram_mb, usage.reserved_ssd_mb, usage.concurrent_requests) == (0, 0, 0)


def test_a_grant_says_over_which_limit_it_was_admitted(manager):
    manager.set_quota(open_quota("lenient", max_tokens_per_hour=100, on_violation="warn"))
    manager.set_quota(open_quota("shadow", max_requests_per_day=0, shadow_limits=["requests_per_day"]))
    manager.set_quota(open_quota("none"))
    with manager.reserve("lenient", 100) as within, manager.acquire("lenient", 1) as over:
        assert (within.over_limit, over.over_limit) == (None, Limit.TOKENS_PER_HOUR)
        over.settle(0)
        assert over.over_limit is Limit.TOKENS_PER_HOUR
    with manager.reserve(("none", "lenient"), 1) as joint, manager.reserve("shadow", 1) as shadow:
        assert (joint.over_limit, shadow.over_limit) == (Limit.TOKENS_PER_HOUR, Limit.REQUESTS_PER_DAY)
    with manager.reserve("no quota", 1) as free:
        assert free.over_limit is None
    for grant in manager.reserve_many(manager.codes(["none", "lenient"]), [1, 1]):
        with grant:
            assert (grant.over_limit is None) == (grant.model_ids == ("none",))

    async def main():
        async with manager.acquire_async("lenient", 1) as grant:
            return grant.over_limit

    assert asyncio.run(main()) is Limit.TOKENS_PER_HOUR


def test_a_request_that_waited_says_over_which_limit_it_was_admitted(manager, clock):
    manager.set_quota(open_quota("slow", max_concurrent_requests=1, on_violation="queue"))
    manager.set_quota(open_quota("lenient", max_tokens_per_hour=0, on_violation="warn"))

    async def main():
        held = manager.reserve("slow", 1)
        waiting = asyncio.create_task(asyncio.wait_for(manager.acquire_async(("slow", "lenient"), 1), 30))
        while not manager.get_usage("slow").queued_requests:
            await asyncio.sleep(0)
        held.release()
        with await waiting as grant:
            return grant.over_limit

    assert asyncio.run(main()) is Limit.TOKENS_PER_HOUR


def test_what_is_held_counts_against_the_caps(manager):
    manager.update_quota("m", max_ram_mb=100, max_concurrent_requests=2)
    manager.update_memory_usage("m", 30, 0)
    with manager.reserve("m", 1, ram_needed_mb=60):
        with pytest.raises(QuotaExceededError, match="RAM: 90 of 100 used, 11 asked") as error:
            manager.reserve("m", 1, ram_needed_mb=11)
        assert error.value.result.limit is Limit.RAM
        assert error.value.retry_after_ms is None
        with manager.reserve("m", 1), pytest.raises(QuotaExceededError, match="concurrent requests: 2 of 2"):
            manager.reserve("m", 1)
        assert manager.check_quota("m", 1)
    assert manager.check_quota("m", 1, ram_needed_mb=70)


def test_the_most_that_is_reported_and_held_is_counted(manager):
    manager.update_memory_usage("m", 2**62, 2**62)
    manager.update_quota("m", max_ram_mb=None, max_ssd_mb=None)
    with manager.reserve("m", 1, 2**62, 2**62):
        manager.update_quota("m", max_ram_mb=2**62)
        assert manager.check_quota("m", 1).current_usage == 200.0
        result = manager.check_quota("m", 1, ram_needed_mb=1)
        assert not result
        assert result.current_usage == 200.0


def test_settling_for_less_refunds_for_more_charges_past_the_limit(manager):
    grant = manager.reserve("m", 900)
    grant.settle(100)
    assert used(manager) == grant.tokens == 100
    second = manager.reserve("m", 100)
    second.settle(1500)
    assert used(manager) == 1600
    assert not manager.check_quota("m", 1)
    grant.release()
    second.release()
    assert manager.get_usage("m").concurrent_requests == 0


def test_a_refund_goes_to_the_slots_that_were_charged(manager, clock):
    """The hour frees what was settled when its slot leaves, and a refund after that changes nothing."""
    early = manager.reserve("m", 400)
    clock.advance(120)
    late = manager.reserve("m", 500)
    early.settle(100)
    assert used(manager) == 600
    clock.advance(3600 - 60)
    assert used(manager) == 500  # the slot with the 100 that were left has gone
    clock.advance(120)
    assert used(manager) == 0
    late.settle(0)
    assert used(manager) == 0
    assert manager.get_usage("m").tokens_this_day == 100
    early.release()
    late.release()


def test_add_is_free_within_the_estimate_and_charges_in_chunks_beyond(manager):
    with manager.reserve("m", 100) as grant:
        assert all(grant.add() for _ in range(100))
        assert used(manager) == 100
        assert grant.add()
        assert used(manager) == 116
        assert grant.add(14)
        assert used(manager) == 116
    assert used(manager) == grant.tokens == 115


def test_add_says_stop_at_a_limit_and_counts_what_exists(manager):
    with manager.reserve("m", 990) as grant:
        assert grant.add(1000)
        assert used(manager) == 1000
        assert not grant.add(1)
        assert grant.limit_reached
        assert used(manager) == 1001
        assert not grant.add(2)
    assert used(manager) == 1003
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 1)


def test_what_stands_when_a_block_is_left(manager):
    with manager.reserve("m", 100):
        pass
    assert used(manager) == 100
    with pytest.raises(ZeroDivisionError), manager.reserve("m", 200):
        raise ZeroDivisionError
    assert used(manager) == 100
    with contextlib.suppress(ZeroDivisionError), manager.reserve("m", 200) as grant:
        grant.add(30)
        raise ZeroDivisionError
    assert used(manager) == 130
    with contextlib.suppress(ZeroDivisionError), manager.reserve("m", 200) as grant:
        grant.settle(50)
        raise ZeroDivisionError
    assert used(manager) == 180
    assert manager.get_usage("m").requests_this_hour == 4


def test_cancelling_undoes_the_request(manager):
    grant = manager.reserve("m", 700, ram_needed_mb=5)
    grant.cancel()
    grant.cancel()
    usage = manager.get_usage("m")
    assert (usage.tokens_this_hour, usage.requests_this_hour) == (0, 0)
    assert (usage.reserved_ram_mb, usage.concurrent_requests) == (0, 0)
    assert manager.check_quota("m", 1000)


def test_levels_take_back_what_has_not_drained(clock):
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m", max_tokens_per_second=10, burst_tokens=990))
    grant = manager.reserve("m", 1000)
    clock.advance(20)
    grant.settle(100)  # had it asked for 100, the level would be empty by now
    assert manager.get_usage("m").burst_tokens_used == 0
    clock.advance(1)
    assert manager.check_quota("m", 1000)
    grant.release()


def test_levels_take_back_all_while_the_model_is_busy(clock):
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m", max_tokens_per_second=100, burst_tokens=10_000))
    assert manager.check_quota("m", 10_000)
    clock.advance(60)
    grants = []
    for _ in range(30):  # a level of 4,000 or more for 30 s, kept by requests that turn out to be small
        grants.append(manager.reserve("m", 100))
        clock.advance(1)
    before = manager.get_usage("m").burst_tokens_used
    for grant in grants:
        grant.settle(10)
        grant.release()
    assert manager.get_usage("m").burst_tokens_used == before - 30 * 90


def test_a_level_takes_back_nothing_that_drained_between_two_looks(clock):
    """A level that was empty for an instant, within a slot of the second, had nothing of the charge left by then."""
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m", max_tokens_per_second=600, burst_tokens=10_000))
    clock.advance(59)
    assert manager.check_quota("m", 605)
    clock.advance(1)
    grant = manager.reserve("m", 3)  # the slots of second and minute begin here, at a level of 5
    clock.advance(0.016)
    assert manager.check_quota("m", 5000)  # at a level of 0
    clock.advance(1)
    grant.settle(0)
    assert manager.get_usage("m").burst_tokens_used == 5000 - 600 - 600
    grant.release()


def test_a_rate_that_is_lifted_and_set_again_refills_nothing(clock):
    """The level goes on as if the rate had been there."""
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m", max_tokens_per_second=600, burst_tokens=20_000))
    clock.advance(59)
    assert manager.check_quota("m", 5600)
    before = manager.reserve("m", 2)
    clock.advance(1)
    assert manager.check_quota("m", 1)
    manager.update_quota("m", max_tokens_per_second=None)
    manager.update_quota("m", max_tokens_per_second=600)
    assert manager.get_usage("m").burst_tokens_used == 5603 - 600 - 600
    grant = manager.reserve("m", 3)
    clock.advance(0.016)
    assert manager.check_quota("m", 5000)
    clock.advance(1)
    grant.settle(0)  # may have drained by now
    before.settle(0)  # of another rate's time: the level keeps it
    assert manager.get_usage("m").burst_tokens_used == 5606 + 5000 - 600 - 600 - 609
    grant.release()
    before.release()


@pytest.mark.parametrize("later", [2, 8])
def test_two_refunds_do_not_take_back_the_same(clock, later):
    """At its lowest the level stood at 100; the first refund has 80 of them, for the second 20 are left."""
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m", max_tokens_per_second=20, burst_tokens=10_000))
    clock.advance(59)
    assert manager.check_quota("m", 1020)
    clock.advance(1)
    first, second = manager.reserve("m", 80), manager.reserve("m", 80)
    clock.advance(53)
    assert manager.check_quota("m", 5000)  # at a level of 100
    clock.advance(later)  # within the minute or into the next
    level = 5100 - 20 * later
    first.settle(0)
    assert manager.get_usage("m").burst_tokens_used == level - 80 - 20
    second.settle(0)
    assert level - 80 - 20 <= manager.get_usage("m").burst_tokens_used + 20 <= level - 80 - 18
    first.release()
    second.release()


def test_a_level_that_was_full_does_not_fall_below_zero(manager):
    """It holds 100,000 years of draining and no more, so that two such charges are more than it has to give back."""
    manager.update_quota("m", max_tokens_per_second=0.1)
    grants = [manager.reserve("m", 0) for _ in range(2)]
    for grant in grants:
        assert not grant.add(2**50)
    for grant in grants:
        grant.cancel()
    assert manager.get_usage("m").burst_tokens_used == 0
    assert manager.check_quota("m", 1).limit is None


def test_what_was_charged_last_is_refunded_first(manager, clock):
    grant = manager.reserve("m", 100)
    clock.advance(120)
    assert grant.add(150)
    grant.settle(100)
    clock.advance(3600 - 60)
    assert used(manager) == 0
    assert manager.get_usage("m").tokens_this_day == 100
    grant.release()


def test_a_level_takes_back_nothing_that_it_has_forgotten(manager):
    """A refund of what was charged under another rate, in the same nanosecond too, or forgiven, is nobody else's."""
    grant = manager.reserve("m", 500)
    manager.update_quota("m", max_tokens_per_second=10, burst_tokens=990)
    assert manager.check_quota("m", 500)
    grant.cancel()
    assert manager.get_usage("m").burst_tokens_used == 490
    manager.set_quota(open_quota("n", max_tokens_per_second=10, burst_tokens=490))
    grant = manager.reserve("n", 500)
    manager.reset_burst("n")
    grant.settle(0)
    assert not manager.check_quota("n", 491)
    assert manager.check_quota("n", 490)
    grant.release()


@pytest.mark.parametrize(("actual", "level"), [(90, 21), (21, 21), (15, 15), (0, 0)])
def test_a_refund_takes_no_more_from_a_level_than_the_charge_had_raised(manager, clock, actual, level):
    """Under warn the level goes up to its cap: what of a charge stays would have filled it as well."""
    rate = {"max_tokens_per_second": 1, "burst_tokens": 20}
    manager.set_quota(open_quota("n", **rate, on_violation="warn"))
    with manager.reserve("n", 100) as grant:
        manager.update_quota("n", on_violation="reject")
        grant.settle(actual)
        clock.advance(2)
    room = 21 - max(level - 2, 0)
    assert not manager.check_quota("n", room + 1)
    assert manager.check_quota("n", room)


def test_bad_use_is_a_clear_error(manager):
    grant = manager.reserve("m", 100)
    for verb in (grant.add, grant.settle):
        with pytest.raises(ValueError, match="tokens is -1; give an integer, 0"):
            verb(-1)
        with pytest.raises(TypeError):
            verb(1.5)
    with pytest.raises(ValueError, match="the sum may be 2"):
        grant.add(5) and grant.add(2**62)
    grant.settle(7)
    grant.settle(7)
    for verb, figure in ((grant.settle, 8), (grant.add, 1)):
        with pytest.raises(GrantClosedError, match=": the grant has already been settled"):
            verb(figure)
    with pytest.raises(GrantClosedError, match="cannot cancel: the grant has already been settled"):
        grant.cancel()
    grant.release()
    grant.release()
    with pytest.raises(GrantClosedError, match="cannot add: the grant has already been released"):
        grant.add(1)
    assert used(manager) == 7
    with pytest.raises(TypeError, match="grants are made by"):
        Grant()
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(grant)
    with pytest.raises(GrantClosedError):
        Grant.__new__(Grant).add(1)


def test_a_forgotten_grant_is_released_with_a_warning(manager):
    manager.reserve("m", 100).release()
    grant = manager.reserve("m", 100, ram_needed_mb=1)
    with pytest.warns(ResourceWarning, match="garbage-collected unreleased"):
        del grant
    usage = manager.get_usage("m")
    assert (usage.reserved_ram_mb, usage.concurrent_requests, usage.tokens_this_hour) == (0, 0, 200)


def test_a_removed_model_gives_nothing_back(manager):
    grant = manager.reserve("m", 100, ram_needed_mb=1)
    manager.remove_quota("m")
    manager.set_quota(open_quota("other"))  # takes the row
    manager.set_quota(open_quota("m"))
    grant.settle(5)
    grant.release()
    assert grant.model_ids == ("m",)
    assert repr(grant) == "<Grant 'm', 5 tokens, released>"
    with manager.reserve("nobody", 5) as grant:
        assert repr(grant) == "<Grant of no model with a quota, 5 tokens, open>"
    assert not manager.get_usage("other").concurrent_requests
    usage = manager.get_usage("m")
    assert (usage.reserved_ram_mb, usage.concurrent_requests, usage.tokens_this_day) == (0, 0, 0)


def test_several_models_grant_together_or_not_at_all(manager):
    manager.set_quota(open_quota("tenant", max_tokens_per_hour=150))
    with manager.reserve(("tenant", "nobody", "m"), 100, ram_needed_mb=3) as grant:
        assert grant.model_ids == ("tenant", "m")
        assert used(manager, "tenant") == used(manager) == 100
        with pytest.raises(QuotaExceededError, match="model 'tenant': tokens per hour: 100 of 150 used, 51") as error:
            manager.reserve(["m", "tenant"], 51)
        assert error.value.result.model_id == "tenant"
        assert used(manager) == 100
        grant.add(150)
        assert not grant.add(1)
    assert used(manager, "tenant") == used(manager) == 151
    assert manager.get_usage("tenant").reserved_ram_mb == 0
    stats = manager.get_stats()
    assert (stats.allowed_requests, stats.rejected_requests, stats.total_checks) == (3, 1, 4)


@pytest.mark.parametrize("ids", [("m", "slow"), ("slow", "m"), ("m", "warned", "slow", "free")], ids="-".join)
def test_several_models_are_waited_for_until_the_last_of_them_admits(manager, clock, ids):
    manager.set_quota(open_quota("m", max_tokens_per_second=10, burst_tokens=0))
    manager.set_quota(open_quota("slow", max_tokens_per_second=1, burst_tokens=49))
    manager.set_quota(open_quota("warned", max_tokens_per_hour=1, on_violation="warn"))
    manager.set_quota(open_quota("free"))
    assert manager.check_quota("m", 10)
    assert manager.check_quota("slow", 50)
    result = manager.check_quota(ids, 5)
    assert result.model_id == next(name for name in ids if name in ("m", "slow"))
    assert result.retry_after_ms == manager.peek_quota("slow", 5).retry_after_ms == 5000
    assert manager.peek_quota("m", 5).retry_after_ms < 5000
    clock.advance(4.999)
    assert not manager.check_quota(ids, 5)
    clock.advance(0.001)
    assert manager.check_quota(ids, 5)


def test_a_handle_has_the_same_verbs(manager):
    quota = manager.model("m")
    with quota.reserve(10, 1), quota.acquire(20, timeout=0) as grant:
        assert grant.model_ids == ("m",)
        assert manager.get_usage("m").concurrent_requests == 2
    asyncio.run(quota.acquire_async(30, priority=1)).release()
    assert used(manager) == 60
    manager.remove_quota("m")
    for verb in (quota.reserve, quota.acquire, quota.acquire_async):
        with pytest.raises(UnknownModelError):
            verb(1)


def test_many_are_settled_at_once_or_none(manager):
    grants = [manager.reserve("m", 100) for _ in range(3)]
    for bad, error in [(([1, 2]), ValueError), (([1, 2, -1]), ValueError), (([1, 2, 0.5]), TypeError)]:
        with pytest.raises(error):
            manager.settle_many(grants, bad)
    with pytest.raises(ValueError, match="twice"):
        manager.settle_many([grants[0], grants[0]], [1, 1])
    with pytest.raises(TypeError, match=r"grants\[1\] is 5; give a Grant"):
        manager.settle_many([grants[0], 5], [1, 1])
    assert used(manager) == 300
    manager.settle_many(grants, [1, 2, 3])
    assert used(manager) == 6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        del grants
    assert manager.get_usage("m").concurrent_requests == 0
