"""Shares of limits: what they admit, when they hold, and what a request without room is told."""

import contextlib
import threading
import time

import numpy as np
import pytest
from factories import NOW_NS, make_manager, open_quota, queue_quota
from patience import until

from modelquota import Limit, ManualClock, QuotaExceededError, ResourceQuotaManager
from modelquota._core.table import shares
from modelquota._core.table.shares import COMPONENTS, KEEP, UNLIMITED

SECOND_NS = 10**9
SLOT_SEC = 1 / 60
REQUESTS_PER_SECOND, REQUESTS_PER_HOUR, REQUESTS_PER_DAY, TOKENS_PER_HOUR = 0, 2, 3, 7
REQUEST_DRAIN, REQUEST_CAP, GRANTS = 10, 11, 14


def sharing(*quotas, lease_s=60, **limits):
    """A manager whose models have shares of nothing, and a lease."""
    manager = make_manager(*quotas, **limits)
    shares.begin_sharing(manager)
    if lease_s:
        shares.renew_lease(manager, manager.clock.now_ns + lease_s * SECOND_NS)
    return manager


def hold(manager, model_id="m", **components):
    """Ask for a share by the names of components, all others as they are; what was answered."""
    asked = np.full((1, COMPONENTS), KEEP)
    for name, value in components.items():
        asked[0, globals()[name.upper()]] = value
    return shares.exchange_shares(manager, manager.codes([model_id]), asked)


def admitted(manager, most, model_id="m", tokens=1):
    """How many requests are admitted now."""
    return sum(bool(manager.check_quota(model_id, tokens)) for _ in range(most))


def test_a_model_begins_with_nothing_and_uses_what_it_gets():
    manager = sharing(max_requests_per_hour=100)
    assert admitted(manager, 3) == 0
    found = hold(manager, requests_per_hour=7)
    assert found.held[0, REQUESTS_PER_HOUR] == 7
    assert found.limits[0, REQUESTS_PER_HOUR] == 100
    assert admitted(manager, 20) == 7
    assert hold(manager, requests_per_hour=10).held[0, REQUESTS_PER_HOUR] == 10
    assert admitted(manager, 20) == 3
    assert manager.get_quota("m").max_requests_per_hour == 100


def test_a_share_shrinks_to_what_is_used_and_no_further():
    manager = sharing(max_requests_per_hour=100)
    hold(manager, requests_per_hour=50)
    assert admitted(manager, 12) == 12
    found = hold(manager, requests_per_hour=3)
    assert found.held[0, REQUESTS_PER_HOUR] == found.used[0, REQUESTS_PER_HOUR] == 12
    assert admitted(manager, 1) == 0
    manager.clock.advance(3660.0)
    shares.renew_lease(manager, manager.clock.now_ns + SECOND_NS)
    found = hold(manager, requests_per_hour=3)
    assert (found.held[0, REQUESTS_PER_HOUR], found.used[0, REQUESTS_PER_HOUR]) == (3, 0)


def test_a_share_that_shrinks_below_what_is_used_admits_nothing_until_that_has_aged_out():
    manager = sharing(max_requests_per_hour=100, max_requests_per_second=50, burst_requests=0, lease_s=8000)
    hold(manager, requests_per_hour=50, requests_per_second=50, request_cap=50_000_000, request_drain=50_000_000)
    assert admitted(manager, 12) == 12
    asked = np.full((1, COMPONENTS), KEEP)
    asked[0, [REQUESTS_PER_HOUR, REQUEST_CAP]] = 3, 3_000_000
    found = shares.exchange_shares(manager, manager.codes(["m"]), asked, below_used=True)
    assert (found.held[0, REQUESTS_PER_HOUR], found.used[0, REQUESTS_PER_HOUR]) == (3, 12)
    assert (found.held[0, REQUEST_CAP], found.used[0, REQUEST_CAP]) == (3_000_000, 12_000_000)
    assert admitted(manager, 5) == 0
    manager.clock.advance(3661.0)
    assert admitted(manager, 5) == 3


def test_what_is_charged_past_a_share_does_not_let_it_grow():
    manager = sharing(max_tokens_per_hour=1000)
    hold(manager, tokens_per_hour=10)
    manager.charge_many(manager.codes(["m"]), 40)
    found = hold(manager, tokens_per_hour=5)
    assert (found.held[0, TOKENS_PER_HOUR], found.used[0, TOKENS_PER_HOUR]) == (10, 40)


def test_the_lower_of_share_and_limit_holds_whatever_changes():
    manager = sharing(max_requests_per_hour=100)
    hold(manager, requests_per_hour=30)
    manager.update_quota("m", max_requests_per_hour=4)
    assert admitted(manager, 50) == 4
    manager.update_quota("m", max_requests_per_hour=1000)
    assert admitted(manager, 50) == 26  # of the raised limit, no more is held than before
    manager.update_quota("m", max_requests_per_hour=None)
    assert admitted(manager, 50) == 50
    manager.update_quota("m", max_requests_per_hour=1000)
    assert admitted(manager, 50) == 0
    manager.update_quota("m", max_requests_per_hour=None, max_tokens_per_hour=10)  # of a new limit nothing is held
    assert manager.check_quota("m", 1).limit is Limit.TOKENS_PER_HOUR


def test_ten_hosts_share_two_requests_a_second():
    """Not even one more in a year: what a host rounds up is what all admit too much."""
    clock = ManualClock(NOW_NS)
    quota = open_quota(max_requests_per_second=2, burst_requests=0)
    hosts = [make_manager(quota, clock=clock) for _ in range(10)]
    for host in hosts:
        shares.begin_sharing(host)
        shares.renew_lease(host, 2**61)
        totals = shares.exchange_shares(host, host.codes(["m"])).limits[0]
        assert (totals[0], totals[REQUEST_DRAIN], totals[REQUEST_CAP]) == (2, 2_000_000, 2_000_000)
        asked = np.full((1, COMPONENTS), KEEP)
        asked[0, [0, REQUEST_DRAIN, REQUEST_CAP]] = 2 if host is hosts[0] else 0, 200_000, 200_000
        shares.exchange_shares(host, host.codes(["m"]), asked)
    assert sum(admitted(host, 3) for host in hosts) == 0  # a fifth of a request is none
    asked[0, REQUEST_CAP] = 0
    for host in hosts[1:]:
        shares.exchange_shares(host, host.codes(["m"]), asked)
    hold(hosts[0], request_cap=2_000_000)
    count = 0
    for _ in range(300):
        clock.advance(1.0)
        count += sum(admitted(host, 3) for host in hosts)
    assert 60 <= count <= 62  # 0.2 a second, and the cap of two


# -- the end of the lease


@contextlib.contextmanager
def ways(manager):
    """Each way in which something is admitted, as a function that tells whether it was."""
    codes = manager.codes(["m"])
    grant = manager.reserve("m", 1)

    def reserve():
        try:
            manager.reserve("m", 1).cancel()
        except QuotaExceededError:
            return False
        return True

    yield {
        "check": lambda: bool(manager.check_quota("m", 1)),
        "handle": lambda: bool(manager.model("m").check(1)),
        "joint": lambda: bool(manager.check_quota(("m", "free"), 1)),
        "reserve": reserve,
        "batch": lambda: not manager.check_many(codes, 1)[0],
        "joint batch": lambda: not manager.check_many(np.array([[codes[0], manager.codes(["free"])[0]]]), 1)[0],
        "add": lambda: grant.add(50),
        "peek": lambda: bool(manager.peek_quota("m", 1)),
        "metered": lambda: bool(manager.check_quota("metered", 1)),
    }
    grant.cancel()


LONG_LIVED = {"max_requests_per_hour": 10**6, "max_tokens_per_hour": 10**9}


@pytest.mark.parametrize(
    "way", ["check", "handle", "joint", "reserve", "batch", "joint batch", "add", "peek", "metered"]
)
@pytest.mark.parametrize("steps", [(60.0,), (59.5, 0.4, 0.1), (3600.0,), (59.999, SLOT_SEC)])
def test_every_way_in_sees_the_end_of_the_lease(way, steps):
    """A suspend or a stop is time that passes without a check: so is a step of the clock."""
    manager = sharing(
        open_quota(**LONG_LIVED), open_quota("free"), open_quota("metered"), open_quota("metered#m", **LONG_LIVED)
    )
    for model_id in ("m", "metered#m"):
        hold(manager, model_id, requests_per_hour=10**5, tokens_per_hour=10**8)
    with ways(manager) as found:
        admit = found[way]
        assert admit()
        for step in steps[:-1]:
            manager.clock.advance(step)
            assert admit()
        manager.clock.advance(steps[-1] + (0.25 if way == "batch" else 0.0))  # see below
        assert not admit()
        manager.clock.advance(100.0)
        assert not admit()
        shares.renew_lease(manager, manager.clock.now_ns + 60 * SECOND_NS)
        manager.clock.advance(0.27)
        assert admit()


@pytest.mark.parametrize("step_sec", [0.02, 0.06, 0.3])
def test_batches_see_the_end_a_quarter_of_a_second_later(step_sec):
    """They leave the windows behind for some slots, and with them the lease."""
    manager = sharing(**LONG_LIVED, lease_s=10)
    hold(manager, requests_per_hour=10**5, tokens_per_hour=10**8)
    codes = manager.codes(["m"])
    late_ns = []
    for _ in range(round(12 / step_sec)):
        if manager.check_many(codes, 1)[0] == 0:
            late_ns.append(manager.clock.now_ns - NOW_NS - 10 * SECOND_NS)
        manager.clock.advance(step_sec)
    assert len(late_ns) >= 10 / step_sec - 1
    assert max(late_ns) <= SECOND_NS // 4


@pytest.mark.parametrize(("rule", "nodes", "most"), [("deny", 4, 0), ("share", 4, 25), ("allow", 4, 100)])
def test_what_holds_after_the_lease(rule, nodes, most):
    manager = make_manager(max_requests_per_hour=100)
    shares.begin_sharing(manager, on_lease_end=rule, nodes=nodes)
    shares.renew_lease(manager, manager.clock.now_ns + SECOND_NS)
    hold(manager, requests_per_hour=10)
    assert admitted(manager, 200) == 10
    manager.clock.advance(2.0)
    assert admitted(manager, 200) == max(most - 10, 0)
    assert manager.get_usage("m").left[Limit.REQUESTS_PER_HOUR] == 0
    shares.renew_lease(manager, manager.clock.now_ns + SECOND_NS)
    manager.clock.advance(0.1)
    assert admitted(manager, 200) == 0


def test_equal_parts_of_a_rate():
    manager = make_manager(max_requests_per_second=100, burst_requests=0)
    shares.begin_sharing(manager, on_lease_end="share", nodes=10)
    count = 0
    for _ in range(600):
        manager.clock.advance(SLOT_SEC)
        count += admitted(manager, 5)
    assert 90 <= count <= 110


def test_the_lease_can_end_early():
    manager = sharing(max_requests_per_hour=100)
    hold(manager, requests_per_hour=10)
    shares.end_lease(manager)
    manager.clock.advance(SLOT_SEC)
    assert admitted(manager, 3) == 0
    assert shares.read_lease(manager) == (0, "deny", 1, 10_000_000, shares.read_lease(manager).urgent)


# -- what a request without room is told


def test_a_denial_for_lack_of_share_says_so():
    manager = sharing(max_requests_per_hour=100, max_tokens_per_hour=1000)
    hold(manager, requests_per_hour=2, tokens_per_hour=1000)
    assert admitted(manager, 2) == 2
    result = manager.check_quota("m", 5)
    assert result.starved
    assert not result.never_fits
    assert result.limit is Limit.REQUESTS_PER_HOUR
    assert result.retry_after_ms == 10
    assert result.reason == (
        "requests per hour: 2 of 2 used, the share of this host, of 100, 1 asked; retry in about 10 ms"
    )
    manager.clock.advance(60.0)
    assert manager.check_quota("m", 0).reason == (
        "requests per hour: 2 of 0 used, the share of this host while its lease has ended, of 100, 1 asked; "
        "retry in about 10 ms"
    )
    found = shares.exchange_shares(manager, manager.codes(["m"]))
    assert (found.starved[0], found.needed[0].tolist()) == (2, [1, 5])


def test_a_denial_by_the_limit_itself_is_none_for_lack_of_share():
    manager = sharing(max_requests_per_hour=5, max_tokens_per_hour=10)
    hold(manager, requests_per_hour=5, tokens_per_hour=3)
    assert admitted(manager, 3) == 3
    result = manager.check_quota("m", 8)  # beside what is used, no host could admit it
    assert not result.starved
    assert not result.never_fits  # but it may fit later, with a larger share
    assert result.retry_after_ms == 10
    result = manager.check_quota("m", 11)
    assert result.never_fits
    assert result.retry_after_ms is None
    assert manager.check_quota("m", 7).starved
    assert manager.get_usage("m").total_violations == 3
    assert shares.exchange_shares(manager, manager.codes(["m"])).starved[0] == 1


def test_open_grants_are_shared_only_if_asked_for():
    manager = sharing(max_concurrent_requests=5)
    grants = [manager.reserve("m", 1) for _ in range(3)]
    found = hold(manager)
    assert (found.used[0, GRANTS], found.limits[0, GRANTS]) == (3, UNLIMITED)
    grants.append(manager.reserve("m", 1))  # the whole limit is this host's
    grants.pop().release()
    manager.update_quota("m", cluster_concurrency=True)  # hosts begin with nothing
    assert manager.get_quota("m").cluster_concurrency
    found = hold(manager)
    assert (found.held[0, GRANTS], found.used[0, GRANTS], found.limits[0, GRANTS]) == (0, 3, 5)
    hold(manager, grants=4)
    found = hold(manager, grants=1)
    assert found.held[0, GRANTS] == 3
    with pytest.raises(QuotaExceededError) as error:
        manager.reserve("m", 1)
    assert error.value.result.starved
    assert error.value.result.retry_after_ms == 10
    grants.pop().release()
    assert hold(manager, grants=1).held[0, GRANTS] == 2
    assert hold(manager, grants=UNLIMITED).held[0, GRANTS] == UNLIMITED
    for _ in range(3):
        grants.append(manager.reserve("m", 1))
    with pytest.raises(QuotaExceededError) as error:
        manager.reserve("m", 1)
    assert not error.value.result.starved
    grants.pop().release()
    hold(manager, grants=4)
    manager.update_quota("m", cluster_concurrency=False)
    grants.append(manager.reserve("m", 1))
    for grant in grants:
        grant.cancel()


def test_a_share_of_open_grants_that_runs_low_calls_for_an_exchange():
    manager = sharing(max_concurrent_requests=100, cluster_concurrency=True)
    hold(manager, grants=10)
    urgent = shares.read_lease(manager).urgent
    grants = [manager.reserve("m", 1) for _ in range(6)]
    manager.clock.advance(1)
    manager.get_usage("m")
    assert shares.read_lease(manager).urgent == urgent  # as many more take 0.67 s
    grants.append(manager.reserve("m", 1))
    manager.clock.advance(1)
    manager.check_quota("m", 0)
    assert shares.read_lease(manager).urgent == urgent + 1
    for grant in grants:
        grant.cancel()


def test_several_models_that_lack_a_share_of_open_grants_say_so():
    fields = {"max_concurrent_requests": 5, "cluster_concurrency": True}
    manager = sharing(open_quota("a", **fields), open_quota("b", **fields))
    with pytest.raises(QuotaExceededError) as error:
        manager.reserve(["a", "b"], 1)
    assert error.value.result.starved
    assert shares.exchange_shares(manager, manager.codes(["a", "b"])).needed.tolist() == [[1, 1], [1, 1]]


def test_a_limit_that_is_taken_away_takes_its_share_along():
    manager = sharing(max_requests_per_hour=10, max_requests_per_second=4)
    hold(manager, requests_per_hour=7, request_cap=4_000_000, request_drain=4_000_000)
    manager.update_quota("m", max_requests_per_hour=None, max_requests_per_second=None)
    manager.update_quota("m", max_requests_per_hour=10, max_requests_per_second=4)
    held = shares.exchange_shares(manager, manager.codes(["m"])).held[0]
    assert held[[REQUESTS_PER_HOUR, REQUEST_DRAIN, REQUEST_CAP]].tolist() == [0, 0, 0]
    assert not manager.check_quota("m", 1)


def test_acquire_waits_until_the_share_has_grown():
    manager = make_manager(queue_quota(max_requests_per_hour=100, grace_period_sec=600.0), real_time=True)
    shares.begin_sharing(manager, retry_ns=60 * SECOND_NS)
    shares.renew_lease(manager, shares.now_ns(manager) + 600 * SECOND_NS)
    done = []

    def ask():
        with manager.acquire("m", 3):
            done.append(time.monotonic())

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: shares.exchange_shares(manager, manager.codes(["m"])).waiting[0] == 1)
    assert shares.exchange_shares(manager, manager.codes(["m"])).needed[0].tolist() == [1, 3]
    assert not done
    hold(manager, requests_per_hour=1)
    thread.join(30.0)
    assert done
    assert shares.exchange_shares(manager, manager.codes(["m"])).starved[0] == 1


# -- what a node is told


def test_models_that_are_to_be_exchanged():
    manager = sharing(open_quota("a", max_tokens_per_hour=100), open_quota("b", max_tokens_per_hour=100))

    def changed():
        return shares.names_of(manager, shares.sharing_codes(manager, True))

    def exchange():
        codes = shares.sharing_codes(manager, True)
        return shares.exchange_shares(manager, codes, np.full((len(codes), COMPONENTS), 50))

    assert changed() == ["a", "b"]  # registered
    exchange()
    assert changed() == []
    manager.check_quota("a", 7)
    manager.clock.advance(SLOT_SEC)
    manager.check_quota("a", 2)
    assert changed() == ["a"]  # charged in a slot that has ended
    manager.clock.advance(SLOT_SEC)
    found = exchange()
    assert found.peak.tolist() == [[1, 7]]
    assert found.charged.tolist() == [[2, 9]]
    assert changed() == []
    manager.update_quota("b", max_tokens_per_hour=60)
    assert changed() == ["b"]
    exchange()
    assert not manager.check_quota("b", 55)
    assert changed() == ["b"]  # denied for lack of share
    exchange()
    manager.set_quota(open_quota("c", max_tokens_per_hour=100))
    assert changed() == ["c"]
    manager.remove_quota("c")
    assert changed() == []


def test_a_code_of_a_removed_model_is_answered_as_such():
    manager = sharing(open_quota("a", max_tokens_per_hour=100))
    codes = shares.sharing_codes(manager)
    manager.remove_quota("a")
    manager.set_quota(open_quota("a", max_tokens_per_hour=100))
    other = np.array([codes[0], 12345 << 32 | 99, 0])
    found = shares.exchange_shares(manager, other, np.full((3, COMPONENTS), 9))
    assert found.alive.tolist() == [False] * 3
    assert not found.held.any()
    assert shares.names_of(manager, other) == [None] * 3
    assert not manager.check_quota("a", 1)  # what the former one held, this one does not


def test_a_call_for_an_exchange():
    manager = sharing(max_requests_per_hour=1000, max_tokens_per_hour=10**6)
    hold(manager, requests_per_hour=10, tokens_per_hour=10**6)
    urgent = shares.read_lease(manager).urgent
    assert admitted(manager, 5) == 5
    manager.clock.advance(SLOT_SEC)
    assert admitted(manager, 3) == 3
    assert shares.read_lease(manager).urgent == urgent
    manager.clock.advance(SLOT_SEC)  # 8 of 10, which the slot's end shows
    assert admitted(manager, 1) == 1
    assert shares.wait_urgent(manager, urgent, 60.0) == urgent + 1
    assert admitted(manager, 5) == 1
    assert shares.wait_urgent(manager, urgent + 1, 0.0) == urgent + 1  # once until the next exchange
    hold(manager, requests_per_hour=11)
    assert admitted(manager, 5) == 1
    assert shares.wait_urgent(manager, urgent + 1, 60.0) == urgent + 2


def test_what_has_been_used_for_long_does_not_call_for_an_exchange():
    manager = sharing(max_requests_per_day=10**6)
    hold(manager, requests_per_day=1000)
    assert admitted(manager, 980) == 980
    manager.clock.advance(3600)
    shares.renew_lease(manager, manager.clock.now_ns + 60 * SECOND_NS)
    hold(manager)
    urgent = shares.read_lease(manager).urgent
    for _ in range(15):  # 10 a second: 5 are left in the end, for half a second
        assert admitted(manager, 1) == 1
        assert shares.read_lease(manager).urgent == urgent
        manager.clock.advance(0.1)
    assert admitted(manager, 1) == 1
    manager.clock.advance(0.1)
    assert admitted(manager, 1) == 1
    assert shares.read_lease(manager).urgent == urgent + 1


def test_a_call_wakes_the_one_who_waits_for_it():
    manager = sharing(max_requests_per_hour=1000)
    found = []
    thread = threading.Thread(target=lambda: found.append(shares.wait_urgent(manager, 0, 60.0)))
    thread.start()
    until(lambda: manager._arrays()[0]["lease"]["sleepers"][0] == 1)
    assert not manager.check_quota("m", 1)
    thread.join(30.0)
    assert found == [1]


def test_models_of_a_default_quota_have_shares_too():
    manager = sharing(open_quota("seen before", max_tokens_per_hour=5))
    manager.default_quota = open_quota("template", max_tokens_per_hour=100)
    assert manager.peek_quota("new", 1).starved
    assert manager.check_quota("new", 1).starved
    hold(manager, "new", tokens_per_hour=1)
    assert manager.check_quota("new", 1)


def test_the_end_of_sharing():
    manager = sharing(max_requests_per_hour=100, max_requests_per_second=10, burst_requests=0)
    assert admitted(manager, 3) == 0
    shares.end_sharing(manager)
    assert not shares.is_sharing(manager)
    assert admitted(manager, 20) == 10
    assert len(shares.sharing_codes(manager)) == 0
    manager.set_quota(open_quota("new", max_requests_per_hour=2))
    assert admitted(manager, 5, "new") == 2
    shares.begin_sharing(manager)
    assert admitted(manager, 20) == 0
    with pytest.raises(ValueError, match="on_lease_end is 'later'; give one of 'deny', 'share', 'allow'"):
        shares.begin_sharing(manager, on_lease_end="later")


def test_refunds_while_the_share_of_the_drain_changes():
    """A level refunds what it can be sure of by the whole rate: never too much."""
    manager = sharing(max_tokens_per_second=100, burst_tokens=1000, lease_s=600)
    asked = np.full((1, COMPONENTS), KEEP)
    asked[0, [5, 12, 13]] = 1100, 10_000_000, 1_100_000_000  # a tenth of the drain, all of the cap
    codes = manager.codes(["m"])
    shares.exchange_shares(manager, codes, asked)
    grant = manager.reserve("m", 500)
    manager.clock.advance(1.0)
    asked[0, 12] = 90_000_000
    shares.exchange_shares(manager, codes, asked)
    grant.settle(100)
    used = shares.exchange_shares(manager, codes).used[0, 13]
    assert 100_000_000 - 10_000_000 <= used <= 490_000_000
    assert used <= 200_000_000  # 400 refunded, but for what the whole rate may have drained
    grant.release()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (np.zeros((1, 3), np.int64), r"asked has shape \(1, 3\); give \(1, 15\)"),
        (np.full((1, 15), -2), r"asked\[0, 0\] is -2; give an integer, 0 .. 2\*\*62, UNLIMITED or KEEP"),
        (np.full((1, 15), 2**62 + 1), r"asked\[0, 0\] is 4611686018427387905; give an integer"),
    ],
)
def test_shares_that_cannot_be_asked_for(asked, message):
    manager = sharing(max_requests_per_hour=1)
    with pytest.raises(ValueError, match=message):
        shares.exchange_shares(manager, manager.codes(["m"]), asked)


def test_arguments_of_a_lease():
    manager = make_manager(max_requests_per_hour=1)
    with pytest.raises(ValueError, match="the models have no shares: call begin_sharing first"):
        shares.set_lease_rule(manager, on_lease_end="allow", nodes=2, retry_ns=5)
    with pytest.raises(ValueError, match=r"nodes is 0; give an integer, 1 .. 1073741823"):
        shares.begin_sharing(manager, nodes=0)
    with pytest.raises(TypeError, match=r"end_ns is 1.5; give an integer"):
        shares.renew_lease(manager, 1.5)
    with pytest.raises(ValueError, match="data has 257 bytes; at most 256 are possible"):
        shares.write_node(manager, bytes(257))
    shares.begin_sharing(manager)
    shares.set_lease_rule(manager, on_lease_end="allow", nodes=2, retry_ns=5)
    assert shares.read_lease(manager)[:4] == (0, "allow", 2, 5)


def test_what_a_node_remembers():
    manager = ResourceQuotaManager(clock=ManualClock(NOW_NS))
    assert shares.read_node(manager) == b""
    for data in (b"one", bytes(range(256)), b"", b"three"):
        shares.write_node(manager, data)
        assert shares.read_node(manager) == data
