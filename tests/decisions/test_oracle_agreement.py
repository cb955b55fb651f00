"""The core and the oracle, side by side through the same events, agree on every figure that can be read."""

from __future__ import annotations

import random

import pytest
from agreement import Agreement, assert_same_decision, assert_same_state
from factories import UNLIMITED
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import COUNT_MAX, DAY_NS, MS_NS, Oracle
from strategies import (
    LAST_NS,
    Arrival,
    at_one_scale,
    configs,
    extreme_configs,
    extreme_tokens,
    limits,
    memory,
    starts_ns,
    tokens,
)

from modelquota import (
    Limit,
    ManualClock,
    ResourceQuotaConfig,
    ResourceQuotaManager,
)

TestAgreement = Agreement.TestCase
TestAgreement.settings = settings(stateful_step_count=30, report_multiple_bugs=False)


@given(
    quota=configs("m"),
    start_ns=starts_ns(),
    traffic=at_one_scale(40, tokens() | st.integers(0, 2**28)),
    charges=st.lists(st.integers(0, 4), min_size=7, max_size=7),
)
def test_charges_between_checks(
    quota: ResourceQuotaConfig, start_ns: int, traffic: list[Arrival], charges: list[int]
) -> None:
    """A request is charged so many times over instead of being asked; 0 times: it is asked."""
    clock = ManualClock(start_ns)
    manager, oracle = ResourceQuotaManager(clock=clock), Oracle(clock=clock)
    manager.set_quota(quota)
    oracle.set_quota(quota)
    for i, arrival in enumerate(traffic):
        clock.advance_ns(arrival.step.end_ns(clock.now_ns) - clock.now_ns)
        copies = charges[i % len(charges)]
        if copies:
            manager.charge_many(manager.codes(["m"] * copies), arrival.tokens)
            oracle.charge_many(["m"] * copies, arrival.tokens)
        else:
            expected = oracle.check_quota("m", arrival.tokens)
            assert_same_decision(manager.check_quota("m", arrival.tokens), expected)
        assert_same_state(manager, oracle, ["m"])


@given(quota=st.builds(ResourceQuotaConfig, st.just("m"), **limits(zero=False)), seed=st.integers(0, 2**32))
@settings(max_examples=max(5, settings().max_examples // 5))
def test_long_traffic(quota: ResourceQuotaConfig, seed: int) -> None:
    """Hundreds of small requests, close together and with a long pause now and then: slots fill, leave and wrap."""
    rng = random.Random(seed)
    clock = ManualClock(rng.randrange(10**15))
    manager, oracle = ResourceQuotaManager(clock=clock), Oracle(clock=clock)
    manager.set_quota(quota)
    oracle.set_quota(quota)
    wait_ms: int | None = None
    for _ in range(250):
        if wait_ms is not None and rng.random() < 0.3:
            pause_ns = wait_ms * MS_NS
        else:
            pause_ns = rng.randrange(10 ** rng.choice([1, 6, 8, 8, 9, 9, 10, 11, 13, 15]))
        clock.advance_ns(min(pause_ns, LAST_NS - clock.now_ns))
        cost = rng.randrange(1, 12)
        expected = oracle.check_quota("m", cost)
        assert_same_decision(manager.check_quota("m", cost), expected)
        wait_ms = expected.retry_after_ms
    assert_same_state(manager, oracle, ["m"])


@given(
    quota=extreme_configs(),
    start_ns=starts_ns(),
    traffic=at_one_scale(40, extreme_tokens(), memory(), memory()),
)
def test_extreme_figures(quota: ResourceQuotaConfig, start_ns: int, traffic: list[Arrival]) -> None:
    clock = ManualClock(start_ns)
    manager, oracle = ResourceQuotaManager(clock=clock), Oracle(clock=clock)
    manager.set_quota(quota)
    oracle.set_quota(quota)
    for arrival in traffic:
        clock.advance_ns(arrival.step.end_ns(clock.now_ns) - clock.now_ns)
        cost = (arrival.tokens, arrival.ram_mb, arrival.ssd_mb)
        assert_same_decision(manager.check_quota("m", *cost), oracle.check_quota("m", *cost))
        assert_same_state(manager, oracle, ["m"])


@pytest.mark.parametrize("rate", [None, 2.5])
def test_a_window_counts_no_further_than_its_end(rate: float | None) -> None:
    clock = ManualClock()
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("m", **UNLIMITED | {"max_tokens_per_second": rate})
    for _ in range(5):
        manager.charge_many(manager.codes(["m", "m"]), COUNT_MAX - 1)
        usage = manager.get_usage("m")
        assert usage is not None
        assert usage.tokens_this_day == usage.tokens_this_hour == usage.tokens_this_second == COUNT_MAX
        assert manager.check_quota("m", 1).allowed is (rate is None)
        assert manager.check_quota("m", 0)
    clock.advance_ns(2 * DAY_NS)
    usage = manager.get_usage("m")
    assert usage is not None
    assert usage.tokens_this_day == usage.tokens_this_hour == usage.tokens_this_second == 0


def test_no_window_counts_further_than_its_end_when_a_month_is_counted_later() -> None:
    clock = ManualClock()
    manager = ResourceQuotaManager(clock=clock)
    manager.enforcement_enabled = False
    manager.set_quota("m", **UNLIMITED)
    assert manager.check_quota("m", COUNT_MAX)
    manager.update_quota("m", max_tokens_per_month=1)
    for _ in range(3):
        assert manager.check_quota("m", COUNT_MAX)
        usage = manager.get_usage("m")
        assert usage is not None
        assert usage.tokens_this_day == COUNT_MAX
        assert usage.tokens_this_month in (0, COUNT_MAX)


def test_every_limit_is_compared() -> None:
    """The strategies reach each limit, so that agreement is not agreement on nothing."""
    seen: set[Limit] = set()

    @given(quota=configs("m"), traffic=at_one_scale(20, tokens()), ram_mb=memory(), ssd_mb=memory())
    @settings(max_examples=300, derandomize=True, database=None)
    def collect(quota: ResourceQuotaConfig, traffic: list[Arrival], ram_mb: int, ssd_mb: int) -> None:
        clock = ManualClock()
        oracle = Oracle(clock=clock)
        oracle.set_quota(quota)
        for i, arrival in enumerate(traffic):
            clock.advance_ns(arrival.step.end_ns(clock.now_ns) - clock.now_ns)
            memory_asked = (ram_mb, ssd_mb) if i % 4 == 0 else (0, 0)
            limit = oracle.check_quota("m", arrival.tokens, *memory_asked).limit
            if limit is not None:
                seen.add(limit)

    collect()
    assert seen == set(Limit) - {Limit.QUEUE}
