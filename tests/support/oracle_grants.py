"""The plain model of grants and of decisions over several models, written to be read against the semantics.

Windows, memory and concurrency are exact. Of a level only this is promised, and kept here as two bounds: after a refund
it stands no lower than if the refunded tokens had never been charged, reckoned by playing everything again without
them; and at least as much of them is taken back as is left of the charge itself. Between the two the core decides;
`adopt` takes over what it says, so that everything afterwards can be compared exactly again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from oracle import COUNT_MAX, SECOND_NS, Level, Model, Oracle, charged, rates_of, retry_ms
from oracle_answers import COUNTERS, OUTCOMES, TYPES, Decision
from oracle_kinds import Amount, counted, most_output, with_output

from modelquota import GrantClosedError, Limit, ResourceQuotaConfig, ViolationAction

ROUNDING = Fraction(1, 10**9)
"""A level is rounded up by less than this where the rate changes."""
SMALLEST_CHUNK = 16


@dataclass(eq=False)
class Charged:
    """What stands of a charge to a level."""

    count: int
    cap: Fraction | None
    raised: int  # by how much the level rose, in whole tokens or requests


@dataclass(eq=False)
class Drained:
    """Time that passed under a rate."""

    elapsed_ns: int
    rate: float


@dataclass(eq=False)
class Forgiven:
    """That a level was lowered to this."""

    rest: Fraction


class PlayedLevel(Level):
    """A level that remembers everything, so that it can be played again."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Charged | Drained | Forgiven] = []
        self.lowest: Fraction | None = None

    def drain(self, now_ns: int, rate: float) -> None:
        """Let time pass under a rate."""
        if now_ns > self.at_ns:
            self.events.append(Drained(now_ns - self.at_ns, rate))
        super().drain(now_ns, rate)

    def charge(self, count: int, cap: Fraction | None = None) -> None:
        """Add what was charged now."""
        before = self.value
        super().charge(count, cap)
        self.events.append(Charged(count, cap, math.floor(self.value - before)))

    def forgive(self, rest: Fraction) -> None:
        """Leave no more than so much."""
        self.events.append(Forgiven(rest))
        super().forgive(rest)

    def played_again(self) -> Fraction:
        """Where the level would stand had only what now stands of each charge been charged."""
        value = Fraction(0)
        for event in self.events:
            if isinstance(event, Charged):
                value = charged(value, event.count, event.cap)
            elif isinstance(event, Forgiven):
                value = min(value, event.rest)
            else:
                value = max(Fraction(0), value - Fraction(event.rate) * event.elapsed_ns / SECOND_NS)
        return value

    def refund(self, charge: Charged, count: int, left: Fraction) -> None:
        """Take back part of a charge, of which so much is left in any case; what is not taken back raised it first."""
        charge.count -= count
        self.value -= max(Fraction(0), min(Fraction(charge.raised - charge.count), left, self.value))
        charge.raised = min(charge.raised, charge.count)
        self.lowest = self.played_again()

    def adopt(self, value: Fraction) -> None:
        """Take over where the core has the level; it is where it was, or between the bounds after a refund."""
        lowest = self.value if self.lowest is None else self.lowest
        assert lowest <= value <= self.value, f"{float(lowest)} <= {float(value)} <= {float(self.value)}"
        self.value, self.lowest = value, None


@dataclass(eq=False)
class Hold:
    """What a grant holds of a model, beside one unit of concurrency."""

    ram_mb: int
    ssd_mb: int


@dataclass(eq=False)
class Charge:
    """What a grant charged to a model at one time; a level that had no rate then was not charged."""

    at_ns: int
    epoch: int
    tokens: int
    of_requests: Charged | None
    of_tokens: Charged | None


class GrantModel(Model):
    """A model that remembers who holds what, and what was charged when."""

    level_type = PlayedLevel
    request_level: PlayedLevel
    token_level: PlayedLevel

    def __init__(self, config: ResourceQuotaConfig) -> None:
        super().__init__(config)
        self.holds: list[Hold] = []
        self.epoch = 0  # how often a rate changed, or a burst was forgiven

    @property
    def held_ram(self) -> int:  # type: ignore[override]
        """MB of RAM that open grants hold."""
        return sum(hold.ram_mb for hold in self.holds)

    @property
    def held_ssd(self) -> int:  # type: ignore[override]
        """MB of SSD that open grants hold."""
        return sum(hold.ssd_mb for hold in self.holds)

    @property
    def concurrent(self) -> int:  # type: ignore[override]
        """Open grants."""
        return len(self.holds)

    def hold(self, ram_mb: int, ssd_mb: int) -> Hold:
        """Hold memory, up to the largest number that is counted, and one unit of concurrency."""
        hold = Hold(min(ram_mb, COUNT_MAX - self.held_ram), min(ssd_mb, COUNT_MAX - self.held_ssd))
        self.holds.append(hold)
        return hold

    def charge(self, now_ns: int, requests: int, tokens: int, *, capped: bool = True) -> None:
        """As any model. A level that met its cap forgets what was charged before: without that, this had raised it."""
        super().charge(now_ns, requests, tokens, capped=capped)
        for level, (rate, _) in zip((self.request_level, self.token_level), rates_of(self.config), strict=True):
            if rate is not None and level.events[-1].raised != level.events[-1].count:
                self.epoch += 1

    def charge_for_grant(self, now_ns: int, requests: int, tokens: int, *, capped: bool = True) -> Charge:
        """Charge, and say where that can be found again; what a window cannot count any more is refunded to none."""
        beyond = max(0, tokens - (COUNT_MAX - self.most_used(now_ns)))
        self.charge(now_ns, requests, tokens, capped=capped)
        entries = [
            None if rate is None else level.events[-1]
            for level, rate in (
                (self.request_level, rates_of(self.config)[0][0]),
                (self.token_level, rates_of(self.config)[1][0]),
            )
        ]
        return Charge(now_ns, self.epoch, tokens - beyond, *entries)  # type: ignore[arg-type]

    def refund(self, now_ns: int, charge: Charge, requests: int, tokens: int) -> None:
        """Take back part of a charge; `pass_time` has been called."""
        for window in self.requests.values():
            window.refund(charge.at_ns, requests)
        for window in self.tokens.values():
            window.refund(charge.at_ns, tokens)
        for level, entry, rate, count in (
            (self.request_level, charge.of_requests, rates_of(self.config)[0][0], requests),
            (self.token_level, charge.of_tokens, rates_of(self.config)[1][0], tokens),
        ):
            if entry is not None and count:
                left = Fraction(0)
                if rate is not None and charge.epoch == self.epoch:
                    left = max(left, entry.raised - Fraction(rate) * (now_ns - charge.at_ns) / SECOND_NS)
                level.refund(entry, count, left)

    def takes_tokens(self, now_ns: int, tokens: int, enforced: bool) -> bool:
        """Whether an admitted request may have so many more."""
        of_tokens = {limit for limit in Limit if limit.unit == "tokens"}
        violated = self.violated(now_ns, tokens, 0, 0, enforced and self.config.on_violation != ViolationAction.WARN)
        return not of_tokens & violated.keys()


class GrantOracle(Oracle):
    """The verbs of a `ResourceQuotaManager`, grants and several models included."""

    model_type = GrantModel
    models: dict[str, GrantModel]  # type: ignore[assignment]

    def set_quota(self, config: ResourceQuotaConfig | str, **changes: Any) -> None:
        """Replace the limits of a model and keep its usage; register it where it is unknown."""
        if isinstance(config, str):
            config = ResourceQuotaConfig(config, **changes)
        model = self.models.get(config.model_id)
        before = None if model is None else _rates(model.config)
        super().set_quota(config)
        if model is not None and before != _rates(config):
            model.epoch += 1
            for level in (model.request_level, model.token_level):
                level.lowest, level.value = level.value, level.value + ROUNDING * (level.value > 0)

    def reset_burst(self, model_id: str) -> None:
        """Forgive what both levels hold above the rate."""
        model = self._known(model_id)
        model.pass_time(self.clock.now_ns)
        levels = model.request_level, model.token_level
        before = [level.value for level in levels]
        super().reset_burst(model_id)
        if before != [level.value for level in levels]:
            model.epoch += 1

    def check_quota(
        self, model_id: str | Sequence[str], estimated_tokens: Amount, ram_needed_mb: int = 0, ssd_needed_mb: int = 0
    ) -> Decision:
        """Decide one request, of one model or several."""
        if isinstance(model_id, str) and not self.meters_of(model_id):
            return super().check_quota(model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        ids = (model_id,) if isinstance(model_id, str) else model_id
        return self.decide_all(ids, estimated_tokens, ram_needed_mb, ssd_needed_mb)[0]

    def reserve(
        self, model_id: str | Sequence[str], estimated_tokens: Amount, ram_needed_mb: int = 0, ssd_needed_mb: int = 0
    ) -> tuple[Decision, OracleGrant | None]:
        """Decide, and hold what was admitted."""
        ids = (model_id,) if isinstance(model_id, str) else model_id
        decision, charges = self.decide_all(ids, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        if not decision:
            return decision, None
        parties = [Party(model, model.hold(ram_needed_mb, ssd_needed_mb), [charge]) for model, charge in charges]
        return decision, OracleGrant(self, parties, estimated_tokens)

    def decide_all(
        self, ids: Sequence[str], tokens: Amount, ram_mb: int, ssd_mb: int
    ) -> tuple[Decision, list[tuple[GrantModel, Charge]]]:
        """One decision over all models and their meters: who denies is named, or else who warns; nothing is charged,
        or all. An id without a quota may have meters.
        """
        now_ns = self.clock.now_ns
        for model_id in ids:
            if model_id not in self.models and self.default_quota is not None and "#" not in model_id:
                self.set_quota(self.default_quota.replace(model_id=model_id))
        known = [model_id for model_id in ids if model_id in self.models]
        unknown = [model_id for model_id in ids if model_id not in self.models]
        meters = [meter for model_id in [*known, *unknown] for meter in self.meters_of(model_id)]
        models = [self.models[model_id] for model_id in dict.fromkeys([*known, *meters])]
        for model in models:
            model.pass_time(now_ns)
        found = [
            (model, model.violated(now_ns, counted(model.config, tokens), ram_mb, ssd_mb, self.enforcement_enabled))
            for model in models
        ]
        found = [(model, violated) for model, violated in found if violated]
        denials = [(m, violated) for m, violated in found if m.config.on_violation is not ViolationAction.WARN]
        allowed = not denials
        before = {id(model): model.percents(now_ns) for model in models}
        charges = [
            (model, model.charge_for_grant(now_ns, 1, counted(model.config, tokens)))
            for model in (models if allowed else [])
        ]
        usage = max([0.0, *(max(model.percents(now_ns, ram_mb, ssd_mb, 1).values()) for model in models)])
        if allowed:
            self.elsewhere.add(total_checks=len(unknown), allowed_requests=len(unknown))
            for model in models:
                model.stats.add(total_checks=1, allowed_requests=1)
        if not found:
            return Decision(True, current_usage=usage), charges
        named, violated = denials[0] if denials else found[0]
        first, action = next(iter(violated)), named.config.on_violation
        named.stats.add(**{"total_violations": 1, OUTCOMES[action]: 1, COUNTERS[TYPES[first]]: 1})
        if denials:
            named.stats.add(total_checks=1)
            usage = before[id(named)][first]
        moments = [moment for _, some in denials or [(named, violated)] for moment in some.values()]
        return Decision(allowed, TYPES[first], first, action, retry_ms(now_ns, moments), usage), charges


def _rates(config: ResourceQuotaConfig) -> tuple[float | None, float | None]:
    return config.max_requests_per_second, config.max_tokens_per_second


@dataclass(eq=False)
class Party:
    """One model of a grant."""

    model: GrantModel
    hold: Hold
    charges: list[Charge] = field(default_factory=list)


class OracleGrant:
    """An admitted request: what it holds, what it charged, and what its user has said about it."""

    def __init__(self, oracle: GrantOracle, parties: list[Party], estimated: Amount) -> None:
        self.oracle = oracle
        self.parties = parties
        self.estimated = self.tokens = estimated
        self.estimates = {id(party): party.charges[0].tokens for party in parties}
        self.free_output = min(
            [COUNT_MAX] + [most_output(party.model.config, estimated, self.estimates[id(party)]) for party in parties]
        )
        self.used: int | None = None  # the output tokens that `add` counted
        self.state = "open"

    @property
    def living(self) -> list[Party]:
        """Those whose model has not been removed."""
        return [party for party in self.parties if party.model in self.oracle.models.values()]

    def add(self, tokens: int) -> bool:
        """Count output tokens; charge what goes beyond the estimate."""
        self.require_open("add")
        self.used = (self.used or 0) + tokens
        counts = with_output(self.estimated, self.used)
        self.tokens = self.used if isinstance(self.estimated, int) else counts
        beyond = self.used - self.free_output
        if beyond <= 0 or not self.parties:
            return True
        now_ns, enforced = self.oracle.clock.now_ns, self.oracle.enforcement_enabled
        ahead = max(beyond, SMALLEST_CHUNK, self.free_output // 8)
        for party in self.living:
            party.model.pass_time(now_ns)
        all_fits, fits = (
            all(party.model.takes_tokens(now_ns, self.more_at(party, count), enforced) for party in self.living)
            for count in (ahead, beyond)
        )
        chunk = ahead if all_fits else beyond
        for party in self.living:
            trial = self.oracle.is_trial(party.model)
            party.charges.append(party.model.charge_for_grant(now_ns, 0, self.more_at(party, chunk), capped=trial))
        self.free_output += chunk
        return fits

    def more_at(self, party: Party, output: int) -> int:
        """What so many more output tokens add to what the estimate, or what was charged since, covers at a model."""
        before, after = (
            max(self.estimates[id(party)], counted(party.model.config, with_output(self.estimated, count)))
            for count in (self.free_output, self.free_output + output)
        )
        return after - before

    def settle(self, actual: Amount) -> None:
        """Replace what was charged by the truth."""
        if self.state == "settled" and self.tokens == actual:
            return
        self.require_open("settle")
        self.bring_to(actual)
        self.tokens, self.state = actual, "settled"

    def cancel(self) -> None:
        """Undo everything."""
        if self.state == "cancelled":
            return
        self.require_open("cancel")
        self.bring_to(0)
        now_ns = self.oracle.clock.now_ns
        for party in self.living:
            party.model.pass_time(now_ns)
            party.model.refund(now_ns, party.charges[0], 1, 0)
        self.let_go()
        self.tokens, self.state = 0, "cancelled"

    def release(self, failed: bool = False) -> None:
        """Give back what is held; settle where nobody has."""
        if self.state == "open" and self.used is not None:
            self.bring_to(with_output(self.estimated, self.used))
        elif self.state == "open" and failed:
            self.bring_to(0)
            self.tokens = 0
        if self.state in ("open", "settled"):
            self.let_go()
            self.state = "released"

    def bring_to(self, tokens: Amount) -> None:
        """Charge what is missing now; refund what is too much, what was charged last first."""
        now_ns = self.oracle.clock.now_ns
        for party in self.living:
            party.model.pass_time(now_ns)
            wanted = counted(party.model.config, tokens)
            charged = sum(charge.tokens for charge in party.charges)
            if wanted > charged:
                party.model.charge(now_ns, 0, wanted - charged, capped=self.oracle.is_trial(party.model))
            too_much = max(0, charged - wanted)
            for charge in reversed(party.charges):
                part = min(too_much, charge.tokens)
                party.model.refund(now_ns, charge, 0, part)
                too_much -= part

    def let_go(self) -> None:
        """Give back memory and concurrency."""
        for party in self.living:
            party.model.holds.remove(party.hold)

    def require_open(self, verb: str) -> None:
        """Say so where it comes too late."""
        if self.state != "open":
            raise GrantClosedError(verb, self.state)
