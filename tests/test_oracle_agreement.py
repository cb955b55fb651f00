"""The core and the oracle, side by side through the same events, agree on every figure that can be read."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from oracle import COUNT_MAX, DAY_NS, MS_NS, Oracle
from oracle_answers import Decision, Stats, Usage
from strategies import (
    LAST_NS,
    UNLIMITED,
    Arrival,
    Pause,
    Step,
    at_one_scale,
    changes,
    configs,
    extreme_configs,
    extreme_tokens,
    limits,
    memory,
    starts_ns,
    steps,
    tokens,
)

from modelquota import (
    Limit,
    ManualClock,
    ResourceQuotaConfig,
    ResourceQuotaManager,
    UnknownModelError,
)

MODELS = ("a", "b")
NOW = Pause(0)


def assert_close(actual: float, expected: float, what: str) -> None:
    """Percentages are floats, computed in whatever order."""
    assert math.isclose(actual, expected, rel_tol=1e-9, abs_tol=1e-9), f"{what}: {actual} is not {expected}"


def assert_same_decision(actual: Any, expected: Decision) -> None:
    """Every field of a result; `reason` is text exactly where there is something to say."""
    for name in ("allowed", "violation_type", "limit", "action", "retry_after_ms"):
        assert getattr(actual, name) == getattr(expected, name), f"{name}: {actual!r} is not {expected!r}"
    assert_close(actual.current_usage, expected.current_usage, "current_usage")
    assert bool(actual) is expected.allowed
    assert (actual.reason is None) is (expected.limit is None)


def assert_same_fields(actual: Any, expected: Usage | Stats) -> None:
    """Every counter, by name, all differences at once."""
    names = [field.name for field in fields(expected)]
    assert {name: getattr(actual, name) for name in names} == {name: getattr(expected, name) for name in names}


def assert_same_state(manager: ResourceQuotaManager, oracle: Oracle, model_ids: Sequence[str]) -> None:
    """Usage, report, limits and totals."""
    for model_id in model_ids:
        usage, report, quota = oracle.get_usage(model_id), oracle.get_report(model_id), oracle.get_quota(model_id)
        assert manager.get_quota(model_id) == quota
        if usage is None or report is None:
            assert manager.get_usage(model_id) is None
            assert manager.get_model_report(model_id) is None
            continue
        assert_same_fields(manager.get_usage(model_id), usage)
        actual = manager.get_model_report(model_id)
        assert actual is not None
        assert (actual.model_id, actual.quota) == (model_id, quota)
        assert_same_fields(actual.usage, usage)
        for name, expected in report.items():
            assert_close(getattr(actual, name), expected, name)
    assert_same_fields(manager.get_stats(), oracle.get_stats())
    assert sorted(manager.list_models()) == sorted(oracle.list_models())


class Agreement(RuleBasedStateMachine):
    """Checks, live changes, memory, charges and time in any order."""

    oracle_type = Oracle

    @initialize(start_ns=starts_ns(), first=configs("a"), second=configs("b"), default=st.none() | configs("template"))
    def begin(
        self,
        start_ns: int,
        first: ResourceQuotaConfig,
        second: ResourceQuotaConfig,
        default: ResourceQuotaConfig | None,
    ) -> None:
        self.clock = ManualClock(start_ns)
        self.manager = ResourceQuotaManager(clock=self.clock, default_quota=default)
        self.oracle = self.oracle_type(clock=self.clock, default_quota=default)
        self.denied: tuple[str | Sequence[str], Arrival, int] | None = None
        for config in (first, second):
            self.manager.set_quota(config)
            self.oracle.set_quota(config)

    def check(self, model_id: str | Sequence[str], arrival: Arrival) -> None:
        cost = (arrival.tokens, arrival.ram_mb, arrival.ssd_mb)
        expected = self.oracle.check_quota(model_id, *cost)
        assert_same_decision(self.manager.check_quota(model_id, *cost), expected)
        if not expected and expected.retry_after_ms is not None:
            self.denied = (model_id, arrival, expected.retry_after_ms)

    def pass_step(self, step: Step) -> None:
        self.clock.advance_ns(step.end_ns(self.clock.now_ns) - self.clock.now_ns)

    @rule(model_id=st.sampled_from(MODELS), traffic=at_one_scale(12, tokens()))
    def requests(self, model_id: str, traffic: list[Arrival]) -> None:
        for arrival in traffic:
            self.pass_step(arrival.step)
            self.check(model_id, arrival)

    @rule(model_id=st.sampled_from(MODELS), cost=tokens(), count=st.integers(2, 12))
    def several_at_once(self, model_id: str, cost: int, count: int) -> None:
        for _ in range(count):
            self.check(model_id, Arrival(step=NOW, tokens=cost))

    @rule(model_id=st.sampled_from(MODELS), step=steps(), cost=tokens(), ram_mb=memory(), ssd_mb=memory())
    def request_with_memory(self, model_id: str, step: Step, cost: int, ram_mb: int, ssd_mb: int) -> None:
        self.pass_step(step)
        self.check(model_id, Arrival(step, cost, ram_mb, ssd_mb))

    @precondition(lambda self: self.denied is not None)
    @rule(early_ms=st.sampled_from([0, 0, 1]))
    def retry_when_told(self, early_ms: int) -> None:
        assert self.denied is not None
        model_id, arrival, wait_ms = self.denied
        self.denied = None
        wait_ns = max(0, wait_ms - early_ms) * MS_NS
        if self.clock.now_ns + wait_ns <= LAST_NS:
            self.clock.advance_ns(wait_ns)
            self.check(model_id, arrival)

    @rule(cost=tokens())
    def request_of_an_unknown_model(self, cost: int) -> None:
        self.check("nobody", Arrival(step=NOW, tokens=cost))

    @rule(charges=st.lists(st.tuples(st.sampled_from(MODELS), tokens()), max_size=6), step=steps())
    def charge(self, charges: list[tuple[str, int]], step: Step) -> None:
        self.pass_step(step)
        ids = [model_id for model_id, _ in charges if model_id in self.oracle.models]
        amounts = [amount for model_id, amount in charges if model_id in self.oracle.models]
        self.manager.charge_many(self.manager.rows(ids), np.array(amounts, dtype=np.int64))
        self.oracle.charge_many(ids, amounts)

    @rule(config=st.sampled_from(MODELS).flatmap(configs))
    def replace_limits(self, config: ResourceQuotaConfig) -> None:
        self.manager.set_quota(config)
        self.oracle.set_quota(config)

    @rule(model_id=st.sampled_from(MODELS), fields=changes())
    def change_limits(self, model_id: str, fields: dict[str, Any]) -> None:
        if model_id in self.oracle.models:
            assert self.manager.update_quota(model_id, **fields) == self.oracle.update_quota(model_id, **fields)
        else:
            with pytest.raises(UnknownModelError):
                self.manager.update_quota(model_id, **fields)

    @rule(model_id=st.sampled_from(MODELS), ram_mb=memory(), ssd_mb=memory())
    def report_memory(self, model_id: str, ram_mb: int, ssd_mb: int) -> None:
        if model_id in self.oracle.models:
            self.manager.update_memory_usage(model_id, ram_mb, ssd_mb)
            self.oracle.update_memory_usage(model_id, ram_mb, ssd_mb)
        else:
            with pytest.raises(UnknownModelError):
                self.manager.update_memory_usage(model_id, ram_mb, ssd_mb)

    @rule(model_id=st.sampled_from(MODELS))
    def forgive_burst(self, model_id: str) -> None:
        if model_id in self.oracle.models:
            self.manager.reset_burst(model_id)
            self.oracle.reset_burst(model_id)
        else:
            with pytest.raises(UnknownModelError):
                self.manager.reset_burst(model_id)

    @rule(model_id=st.sampled_from([*MODELS, "nobody"]))
    def remove(self, model_id: str) -> None:
        assert self.manager.remove_quota(model_id) is self.oracle.remove_quota(model_id)

    @rule(enabled=st.sampled_from([True, True, False]))
    def enforce(self, enabled: bool) -> None:
        self.manager.enforcement_enabled = self.oracle.enforcement_enabled = enabled
        assert self.manager.enforcement_enabled is enabled

    @rule(step=steps())
    def wait(self, step: Step) -> None:
        self.pass_step(step)

    # Reading lets time pass, too, so it is an event among others: read after each, it would hide what forgets to.
    @rule()
    def read(self) -> None:
        assert_same_state(self.manager, self.oracle, [*MODELS, "nobody"])

    def teardown(self) -> None:
        if hasattr(self, "oracle"):
            self.read()


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
            manager.charge_many(manager.rows(["m"] * copies), arrival.tokens)
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
        # What happens at the end of the counters is told by the test below.
        left = COUNT_MAX - oracle.models["m"].tokens[DAY_NS].used(clock.now_ns)
        cost = (min(arrival.tokens, left), arrival.ram_mb, arrival.ssd_mb)
        assert_same_decision(manager.check_quota("m", *cost), oracle.check_quota("m", *cost))
        assert_same_state(manager, oracle, ["m"])


@pytest.mark.parametrize("rate", [None, 2.5])
def test_a_window_counts_no_further_than_its_end(rate: float | None) -> None:
    clock = ManualClock()
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("m", **UNLIMITED | {"max_tokens_per_second": rate})
    for _ in range(5):
        manager.charge_many(manager.rows(["m", "m"]), COUNT_MAX - 1)
        usage = manager.get_usage("m")
        assert usage is not None
        assert usage.tokens_this_day == usage.tokens_this_hour == usage.tokens_this_second == COUNT_MAX
        assert manager.check_quota("m", 1).allowed is (rate is None)
        assert manager.check_quota("m", 0)
    clock.advance_ns(2 * DAY_NS)
    usage = manager.get_usage("m")
    assert usage is not None
    assert usage.tokens_this_day == usage.tokens_this_hour == usage.tokens_this_second == 0


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
