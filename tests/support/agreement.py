"""The core and the oracle side by side: what has to be alike, and a state machine that compares it."""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from oracle import MS_NS, Oracle
from oracle_answers import Decision, Stats, Usage
from strategies import (
    LAST_NS,
    Arrival,
    Pause,
    Step,
    at_one_scale,
    changes,
    configs,
    memory,
    starts_ns,
    steps,
    tokens,
)

from modelquota import (
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


def assert_same_fields(actual: Any, expected: Usage | Stats, *, rescaled: bool = False) -> None:
    """Every counter, by name, all differences at once.

    A level that was `rescaled` to another rate's unit is rounded up, by less than 1e-9 of a request: a burst in use,
    which is a whole number rounded up, may then be one more.
    """
    names = [field.name for field in fields(expected)]
    wanted = {name: getattr(expected, name) for name in names}
    found = {name: getattr(actual, name) for name in names}
    for name in ("burst_requests_used", "burst_tokens_used") if rescaled else ():
        if found[name] == wanted[name] + 1:
            wanted[name] += 1
    assert found == wanted


def assert_same_state(
    manager: ResourceQuotaManager, oracle: Oracle, model_ids: Sequence[str], rescaled: Set[str] = frozenset()
) -> None:
    """Usage, report, limits and totals. `rescaled` are models whose rates were changed."""
    for model_id in model_ids:
        usage, report, quota = oracle.get_usage(model_id), oracle.get_report(model_id), oracle.get_quota(model_id)
        assert manager.get_quota(model_id) == quota
        if usage is None or report is None:
            assert manager.get_usage(model_id) is None
            assert manager.get_model_report(model_id) is None
            continue
        assert_same_fields(manager.get_usage(model_id), usage, rescaled=model_id in rescaled)
        actual = manager.get_model_report(model_id)
        assert actual is not None
        assert (actual.model_id, actual.quota) == (model_id, quota)
        assert_same_fields(actual.usage, usage, rescaled=model_id in rescaled)
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
        self.rescaled: set[str] = set()
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
        self.manager.charge_many(self.manager.codes(ids), np.array(amounts, dtype=np.int64))
        self.oracle.charge_many(ids, amounts)

    @rule(config=st.sampled_from(MODELS).flatmap(configs))
    def replace_limits(self, config: ResourceQuotaConfig) -> None:
        self.rescaled.add(config.model_id)
        self.manager.set_quota(config)
        self.oracle.set_quota(config)

    @rule(model_id=st.sampled_from(MODELS), fields=changes())
    def change_limits(self, model_id: str, fields: dict[str, Any]) -> None:
        self.rescaled.add(model_id)
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
        assert_same_state(self.manager, self.oracle, [*MODELS, "nobody"], self.rescaled)

    def teardown(self) -> None:
        if hasattr(self, "oracle"):
            self.read()
