"""A state machine that compares the core with the oracle through grants."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from agreement import NOW, Agreement, assert_same_decision
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from oracle import rates_of
from oracle_grants import GrantOracle, OracleGrant
from soundness import assert_sound, level_now, record_of
from strategies import Arrival, Step, memory, steps, tokens

from modelquota import Grant, GrantClosedError, QuotaExceededError, ResourceQuotaManager

MOST_GRANTS = 12
PARTIES = ("a", "a", "b", ("a", "b"), ("b", "a"), ["b"], ("a", "nobody"), ("nobody", "b", "a"), "nobody")
parties = st.sampled_from(PARTIES)
which = st.integers(0, MOST_GRANTS - 1)


def assert_same_levels(manager: ResourceQuotaManager, oracle: GrantOracle) -> None:
    """Every level is where the oracle has it, or within its bounds; then the oracle goes on from there."""
    now_ns = oracle.clock.now_ns
    for model_id, model in oracle.models.items():
        assert manager.get_usage(model_id) is not None  # time passes for a level without a rate, too
        row, _ = record_of(manager, model_id)
        model.pass_time(now_ns)
        (request_rate, _), (token_rate, _) = rates_of(model.config)
        model.request_level.adopt(level_now(row, "request", now_ns, request_rate))
        model.token_level.adopt(level_now(row, "token", now_ns, token_rate))


def outcome_of(act: Callable[[Any], Any], grant: Grant | OracleGrant) -> Any:
    """What a verb returns, or that it comes too late."""
    try:
        return act(grant)
    except GrantClosedError as error:
        return str(error)


class GrantAgreement(Agreement):
    """Everything that `Agreement` does, and grants."""

    oracle_type = GrantOracle

    def begin_grants(self) -> list[tuple[Grant, OracleGrant]]:
        if not hasattr(self, "pairs"):
            self.pairs: list[tuple[Grant, OracleGrant]] = []
        return self.pairs

    def with_grant(self, index: int, step: Step, act: Callable[[Any], Any]) -> None:
        """Let both do the same to one grant, open or not."""
        self.pass_step(step)
        pairs = self.begin_grants()
        if pairs:
            actual, expected = pairs[index % len(pairs)]
            assert outcome_of(act, actual) == outcome_of(act, expected)
            assert actual.tokens == expected.tokens
            assert actual.released is (expected.state not in ("open", "settled"))

    @rule(ids=parties, step=steps(), cost=tokens(), ram_mb=memory(), ssd_mb=memory(), count=st.integers(1, 3))
    def reserve(self, ids: str | Sequence[str], step: Step, cost: int, ram_mb: int, ssd_mb: int, count: int) -> None:
        self.pass_step(step)
        for _ in range(count):
            decision, expected = self.oracle.reserve(ids, cost, ram_mb, ssd_mb)
            try:
                actual = self.manager.reserve(ids, cost, ram_mb, ssd_mb)
            except QuotaExceededError as error:
                assert_same_decision(error.result, decision)
                if decision.retry_after_ms is not None:
                    self.denied = (ids, Arrival(NOW, cost, ram_mb, ssd_mb), decision.retry_after_ms)
                continue
            assert decision, decision
            assert expected is not None
            pairs = self.begin_grants()
            pairs.append((actual, expected))
            if len(pairs) > MOST_GRANTS:
                self.drop(0, NOW)

    @rule(ids=st.sampled_from([("a", "b"), ["b", "a"], ("a",), ("nobody", "a")]), step=steps(), cost=tokens())
    def check_several(self, ids: Sequence[str], step: Step, cost: int) -> None:
        self.pass_step(step)
        self.check(ids, Arrival(NOW, cost))

    @rule(index=which, step=steps(), amounts=st.lists(tokens(), min_size=1, max_size=4))
    def add(self, index: int, step: Step, amounts: list[int]) -> None:
        for amount in amounts:
            self.with_grant(index, step, lambda grant, amount=amount: grant.add(amount))
            assert_same_levels(self.manager, self.oracle)
            step = NOW

    @rule(index=which, step=steps(), actual=tokens())
    def settle(self, index: int, step: Step, actual: int) -> None:
        self.with_grant(index, step, lambda grant: grant.settle(actual))

    @rule(index=which, step=steps())
    def cancel(self, index: int, step: Step) -> None:
        self.with_grant(index, step, lambda grant: grant.cancel())

    @rule(index=which, step=steps(), failed=st.booleans())
    def leave(self, index: int, step: Step, failed: bool) -> None:
        def end(grant: Grant | OracleGrant) -> None:
            if isinstance(grant, OracleGrant):
                grant.release(failed)
            elif failed:
                grant.__exit__(ValueError, ValueError(), None)
            else:
                grant.release()

        self.with_grant(index, step, end)

    @rule(index=which, step=steps())
    def drop(self, index: int, step: Step) -> None:
        self.pass_step(step)
        pairs = self.begin_grants()
        if pairs:
            actual, expected = pairs.pop(index % len(pairs))
            leaves = expected.state in ("open", "settled")
            expected.release()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                del actual
            assert [warning.category for warning in caught] == [ResourceWarning] * leaves

    @rule(indices=st.sets(which, max_size=4), step=steps(), actual=st.lists(tokens(), min_size=4, max_size=4))
    def settle_many(self, indices: set[int], step: Step, actual: list[int]) -> None:
        self.pass_step(step)
        pairs = [pair for i, pair in enumerate(self.begin_grants()) if i in indices]
        grants = [grant for grant, _ in pairs]
        counts = actual[: len(pairs)]
        settled = [("settled", count) for count in counts]
        if any(g.state != "open" and (g.state, g.tokens) != same for (_, g), same in zip(pairs, settled, strict=True)):
            with pytest.raises(GrantClosedError):
                self.manager.settle_many(grants, counts)
            return
        self.manager.settle_many(grants, counts)
        for (_, grant), count in zip(pairs, counts, strict=True):
            grant.settle(count)

    @invariant()
    def is_sound(self) -> None:
        if hasattr(self, "oracle"):
            assert_same_levels(self.manager, self.oracle)
            for model_id, model in self.oracle.models.items():
                assert_sound(self.manager, model_id, [(hold.ram_mb, hold.ssd_mb) for hold in model.holds])

    def teardown(self) -> None:
        super().teardown()
        while getattr(self, "pairs", None):
            self.drop(0, NOW)
        if hasattr(self, "oracle"):
            self.is_sound()
            for model_id in self.oracle.models:
                assert self.manager.get_usage(model_id).concurrent_requests == 0
