"""Core and oracle side by side over meters and kinds of tokens: single checks, several ids, batches and grants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from agreement import NOW, assert_same_decision, assert_same_state
from grant_agreement import GrantAgreement
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule
from oracle_kinds import Amount
from strategies import Arrival, Step, limits, steps, tokens

from modelquota import QuotaConfigError, QuotaExceededError, ResourceQuotaConfig, Tokens

METERS = ("a#x", "a#y", "b#z", "c#w")
IDS = ("a", "b", *METERS)
SEVERAL = ("a", "b", "c", ("a", "b"), ("b", "a#x"), ("a#x", "a"), ("c", "a"), ("nobody", "b"), ("a#y", "c#w"))
ids = st.sampled_from(SEVERAL)
which = st.integers(0, 11)


def weights() -> st.SearchStrategy[tuple[float, float, float]]:
    """What a token of each kind counts."""
    one = st.sampled_from([0, 0, 1, 1, 1, 2, 3, 15, 0.3, 0.5, 2.5, 0.000001, 0.333333]) | st.integers(0, 10**7).map(
        lambda millionths: millionths / 10**6
    )
    return st.tuples(one, one, one)


def kinds() -> st.SearchStrategy[Amount]:
    """Tokens as one count or by kind."""
    few = st.integers(0, 6)
    return tokens() | st.builds(Tokens, few, few, few) | st.builds(Tokens, few, few, few)


def meters(model_id: str) -> st.SearchStrategy[ResourceQuotaConfig]:
    """Limits on tokens in any window, some of them weighted."""
    some = {name: field for name, field in limits().items() if "ram" not in name and "ssd" not in name}
    return st.builds(
        lambda **fields: ResourceQuotaConfig.unlimited(model_id, **fields), token_weights=weights(), **some
    )


class MeterAgreement(GrantAgreement):
    """Everything that `GrantAgreement` does, and meters that come and go, kinds, and batches of all shapes."""

    @rule(config=st.sampled_from(METERS).flatmap(meters))
    def meter(self, config: ResourceQuotaConfig) -> None:
        self.rescaled.add(config.model_id)
        self.manager.set_quota(config)
        self.oracle.set_quota(config)

    @rule(model_id=st.sampled_from(METERS))
    def remove_meter(self, model_id: str) -> None:
        assert self.manager.remove_quota(model_id) is self.oracle.remove_quota(model_id)

    @rule(model_id=st.sampled_from(IDS), weights=weights())
    def weigh(self, model_id: str, weights: tuple[float, float, float]) -> None:
        if model_id in self.oracle.models:
            self.manager.update_quota(model_id, token_weights=weights)
            self.oracle.update_quota(model_id, token_weights=weights)

    @rule(model_id=ids, step=steps(), amounts=st.lists(kinds(), min_size=1, max_size=4))
    def check_kinds(self, model_id: str | Sequence[str], step: Step, amounts: list[Amount]) -> None:
        self.pass_step(step)
        if self.is_refused(model_id):
            return
        for amount in amounts:
            peeked = self.manager.peek_quota(model_id, amount)
            expected = self.oracle.check_quota(model_id, amount)
            assert_same_decision(peeked, expected)
            assert_same_decision(self.manager.check_quota(model_id, amount), expected)
            if not expected and expected.retry_after_ms is not None:
                self.denied = (model_id, Arrival(NOW, amount), expected.retry_after_ms)  # type: ignore[arg-type]

    @rule(model_id=ids, step=steps(), amount=kinds())
    def reserve_kinds(self, model_id: str | Sequence[str], step: Step, amount: Amount) -> None:
        self.pass_step(step)
        if self.is_refused(model_id):
            return
        decision, expected = self.oracle.reserve(model_id, amount)
        try:
            actual = self.manager.reserve(model_id, amount)
        except QuotaExceededError as error:
            assert_same_decision(error.result, decision)
            return
        assert decision, decision
        assert expected is not None
        assert actual.tokens == actual.estimated_tokens == amount
        self.hold(actual, expected)

    def is_refused(self, model_id: str | Sequence[str]) -> bool:
        """Whether an id is a meter that has not been registered, while a default applies; then it has to raise."""
        asked = (model_id,) if isinstance(model_id, str) else model_id
        unknown = [one for one in asked if "#" in one and one not in self.oracle.models]
        if self.oracle.default_quota is None or not unknown:
            return False
        with pytest.raises(QuotaConfigError):
            self.manager.peek_quota(model_id, 1)
        return True

    def hold(self, actual: Any, expected: Any) -> None:
        """Keep a grant of both for the rules to come."""
        pairs = self.begin_grants()
        pairs.append((actual, expected))
        if len(pairs) > 12:
            self.drop(0, NOW)

    @rule(index=which, step=steps(), actual=kinds())
    def settle_kinds(self, index: int, step: Step, actual: Amount) -> None:
        self.with_grant(index, step, lambda grant: grant.settle(actual))

    def batch(self, elements: list[tuple[tuple[str, ...], Amount]], split: bool) -> tuple[Any, Any, list[Any]]:
        """Codes, tokens and the elements of a batch, without ids that have no row and without one id twice."""
        known = self.oracle.models
        clean = [(tuple(dict.fromkeys(one for one in some if one in known)), amount) for some, amount in elements]
        clean = [(some, by_kind(amount) if split else plain(amount)) for some, amount in clean]
        width = max([1, *(len(some) for some, _ in clean)])
        codes = np.zeros((len(clean), width), np.int64)
        for row, (some, _) in zip(codes, clean, strict=True):
            row[: len(some)] = self.manager.codes(some)
        amounts = [
            (amount.input, amount.cached, amount.output) if isinstance(amount, Tokens) else amount
            for _, amount in clean
        ]
        return codes, np.array(amounts, np.int64).reshape((-1, 3) if split else (-1,)), clean

    @rule(
        elements=st.lists(st.tuples(st.lists(st.sampled_from(IDS), max_size=3).map(tuple), kinds()), max_size=8),
        step=steps(),
        split=st.booleans(),
    )
    def check_many(self, elements: list[tuple[tuple[str, ...], Amount]], step: Step, split: bool) -> None:
        self.pass_step(step)
        codes, amounts, clean = self.batch(elements, split)
        if codes.shape[1] == 1:
            codes = codes[codes[:, 0] != 0]
            amounts = amounts[[bool(some) for some, _ in clean]]
            clean = [(some, amount) for some, amount in clean if some]
            codes = codes[:, 0]
        waits = np.zeros(len(clean), np.int64)
        found = self.manager.check_many(codes, amounts, retry_after_ms=waits)
        for limit, wait_ms, (some, amount) in zip(found.tolist(), waits.tolist(), clean, strict=True):
            decision = self.oracle.decide_all(some, amount, 0, 0)[0]
            assert limit == (0 if decision else decision.limit), (some, amount, decision)
            expected_ms = -1 if decision.retry_after_ms is None else decision.retry_after_ms
            assert wait_ms == (0 if decision else expected_ms), (some, amount, decision)

    @rule(
        elements=st.lists(st.tuples(st.lists(st.sampled_from(IDS), max_size=2).map(tuple), kinds()), max_size=4),
        step=steps(),
        split=st.booleans(),
    )
    def reserve_many(self, elements: list[tuple[tuple[str, ...], Amount]], step: Step, split: bool) -> None:
        self.pass_step(step)
        codes, amounts, clean = self.batch([element for element in elements if element[0]], split)
        clean = [(some, amount) for some, amount in clean if some]
        amounts, codes = amounts[(codes != 0).any(axis=1)], codes[(codes != 0).any(axis=1)]
        out = np.zeros(len(clean), np.uint8)
        grants = self.manager.reserve_many(codes, amounts, out=out)
        for limit, grant, (some, amount) in zip(out.tolist(), grants, clean, strict=True):
            decision, expected = self.oracle.reserve(some, amount)
            assert limit == (0 if decision else decision.limit), (some, amount, decision)
            assert (grant is not None) is bool(decision)
            if grant is not None:
                self.hold(grant, expected)
        del grants
        grant = None

    @rule(
        charges=st.lists(st.tuples(st.sampled_from(IDS), kinds()), max_size=6),
        step=steps(),
        split=st.booleans(),
        asks=st.booleans(),
    )
    def charge_kinds(self, charges: list[tuple[str, Amount]], step: Step, split: bool, asks: bool) -> None:
        self.pass_step(step)
        codes, amounts, clean = self.batch([((one,), amount) for one, amount in charges], split)
        keep = codes[:, 0] != 0
        clean = [(some, amount) for some, amount in clean if some]
        over = np.full(len(clean), 99, np.uint8)
        self.manager.charge_many(codes[keep, 0], amounts[keep], over=over if asks else None)
        expected = self.oracle.charge_many([one for (one,), _ in clean], [amount for _, amount in clean])
        if asks:
            assert over.tolist() == expected

    @rule()
    def read(self) -> None:
        assert_same_state(self.manager, self.oracle, [*IDS, "c", "nobody"], self.rescaled)


def by_kind(amount: Amount) -> Tokens:
    """The same as three counts."""
    return amount if isinstance(amount, Tokens) else Tokens(output=amount)


def plain(amount: Amount) -> int:
    """The same as one count."""
    return amount.total if isinstance(amount, Tokens) else amount


TestMeterAgreement = MeterAgreement.TestCase
TestMeterAgreement.settings = settings(stateful_step_count=40, report_multiple_bugs=False)
