"""The plain model of the tests, for a host that has a share of each limit.

Of a rate, a share of so many millionths is worth that part of the drain and of the cap, rounded down to the unit in
which a level counts: 10**-9 of a request over the denominator of the rate, and finer until the drain has 20 bits in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from oracle import LENGTHS_NS, MS_NS, SECOND_NS, Clock, Level, Model, Window, base, percent, slot_of
from oracle_answers import COUNTERS, OUTCOMES, TYPES, Decision
from oracle_kinds import Amount, counted

from modelquota import Limit, ResourceQuotaConfig, ViolationAction

WHOLE = 2**63 - 1
KEEP = -1
MILLION = 10**6
NAMES = tuple(LENGTHS_NS)
COMPONENTS = 2 * len(NAMES) + 5
REQUEST_DRAIN, REQUEST_CAP, TOKEN_DRAIN, TOKEN_CAP, GRANTS = range(2 * len(NAMES), COMPONENTS)


@dataclass
class HostLease:
    """When the lease of a host ends, and what holds then."""

    end_ns: int = 0
    on_lease_end: str = "deny"
    nodes: int = 1
    retry_ns: int = 10**7


@dataclass
class Rate:
    """A rate as it is configured, and the totals of which shares are parts."""

    rate: float
    burst: int

    @property
    def cap(self) -> Fraction:
        """How far the level may rise."""
        return base(self.rate) + self.burst

    @property
    def ceiling(self) -> int:
        """What any second admits."""
        return math.ceil(self.rate) + self.burst if self.rate else 0

    @property
    def totals(self) -> tuple[int, int]:
        """Drain and cap in millionths, rounded up."""
        return math.ceil(Fraction(self.rate) * MILLION), math.ceil(self.cap * MILLION)

    def worth(self, drain_part: int, cap_part: int) -> tuple[Fraction, Fraction]:
        """Drain and cap of a share."""
        unit = Fraction(self.rate).denominator
        while 0 < Fraction(self.rate) * unit < 2**19:
            unit *= 2
        drain_total, cap_total = self.totals
        drain, cap = Fraction(self.rate) * unit, self.cap * SECOND_NS * unit
        if drain_part < drain_total:
            drain = Fraction(math.floor(drain * drain_part / drain_total))
        if cap_part < cap_total:
            cap = Fraction(math.floor(cap * cap_part / cap_total))
        return drain / unit, cap / (SECOND_NS * unit)


class SharingModel(Model):
    """One model on one of many hosts."""

    def __init__(self, config: ResourceQuotaConfig, lease: HostLease, now_ns: int) -> None:
        self.lease = lease
        self.held = [0] * COMPONENTS
        self.starved = 0
        self.needed: int | None = None
        self.turned_ns = now_ns
        self.live = now_ns < lease.end_ns
        super().__init__(config)

    # -- what holds

    def rate_of(self, what: str) -> Rate | None:
        """The configured rate of requests or tokens."""
        rate: float | None = getattr(self.config, f"max_{what}_per_second")
        return None if rate is None else Rate(rate, getattr(self.config, f"burst_{what}"))

    def whole(self, what: str, window: str) -> int | None:
        """The configured limit of a window."""
        rate = self.rate_of(what)
        if window == "second":
            return None if rate is None else rate.ceiling
        limit: int | None = getattr(self.config, f"max_{what}_per_{window}")
        return limit

    def left(self, limit: int | None, held: int) -> int | None:
        """What holds of a limit of which so much is held."""
        if limit is None or held == WHOLE:
            return limit
        if self.live:
            return min(limit, held)
        return {"deny": 0, "share": limit // self.lease.nodes, "allow": limit}[self.lease.on_lease_end]

    def ceiling(self, what: str, window: str) -> int | None:
        """What this host may admit in a window."""
        place = NAMES.index(window) + (len(NAMES) if what == "tokens" else 0)
        return self.left(self.whole(what, window), self.held[place])

    def level_rate(self, what: str) -> tuple[Fraction, Fraction] | None:
        """The drain and the cap of this host."""
        rate = self.rate_of(what)
        if rate is None:
            return None
        drains, caps = rate.totals
        drain, cap = (REQUEST_DRAIN, REQUEST_CAP) if what == "requests" else (TOKEN_DRAIN, TOKEN_CAP)
        drain_part, cap_part = self.left(drains, self.held[drain]), self.left(caps, self.held[cap])
        assert drain_part is not None
        assert cap_part is not None
        if not self.live and self.lease.on_lease_end == "deny":
            drain_part = min(drains, self.held[drain])  # what was admitted still drains
        return rate.worth(drain_part, cap_part)

    # -- time

    def pass_time(self, now_ns: int) -> None:
        """Drain by what held so far; a slot's end shows whether the lease has ended."""
        for what, level in (("requests", self.request_level), ("tokens", self.token_level)):
            rate = self.level_rate(what)
            if rate is not None:
                level.value = max(Fraction(0), level.value - rate[0] * (now_ns - level.at_ns) / SECOND_NS)
            level.at_ns = now_ns
        if slot_of(now_ns, SECOND_NS) > slot_of(self.turned_ns, SECOND_NS):
            self.live = now_ns < self.lease.end_ns
        self.turned_ns = now_ns

    def change(self, config: ResourceQuotaConfig, now_ns: int) -> None:
        """Replace the limits; rates stay rates."""
        self.pass_time(now_ns)
        self.config = config
        self.held = [0 if total == WHOLE else held for held, total in zip(self.held, self.totals(), strict=True)]
        self.count_windows(now_ns)
        self.live = now_ns < self.lease.end_ns

    def charge(self, now_ns: int, requests: int, tokens: int, *, capped: bool = True) -> None:
        """Add to every window and level."""
        for windows, count in ((self.requests, requests), (self.tokens, tokens)):
            for window in windows.values():
                window.charge(now_ns, count)
        for what, level, count in (("requests", self.request_level, requests), ("tokens", self.token_level, tokens)):
            rate = self.level_rate(what)
            if rate is not None:
                level.charge(count, rate[1] if capped else None)

    # -- decisions

    def check(self, now_ns: int, amount: Amount, ram_mb: int, ssd_mb: int, enforced: bool) -> Decision:
        """Decide one request by the limits of which there are shares; charge it and count it."""
        self.pass_time(now_ns)
        tokens = counted(self.config, amount)
        found = self.find_violations(now_ns, tokens) if enforced else {}
        first = next(iter(found), None)
        action = None if first is None else self.config.on_violation
        allowed = action in (None, ViolationAction.WARN)
        before = self.limit_percents(now_ns)
        if allowed:
            self.charge(now_ns, 1, tokens)
        self.stats.add(total_checks=1, allowed_requests=int(allowed))
        if first is None:
            return Decision(True, current_usage=max(self.limit_percents(now_ns).values()))
        assert action is not None
        self.stats.add(**{"total_violations": 1, OUTCOMES[action]: 1, COUNTERS[TYPES[first]]: 1})
        self.last_starved = not allowed and found[first][1]
        if self.last_starved:
            self.starved += 1
            self.needed = max(self.needed or 0, tokens)
        waits = [wait for wait, _ in found.values()]
        longest = None if None in waits else max(-(-wait // MS_NS) for wait in waits if wait is not None)
        usage = max(self.limit_percents(now_ns).values()) if allowed else before[first]
        return Decision(allowed, TYPES[first], first, action, longest, usage)

    def find_violations(self, now_ns: int, tokens: int) -> dict[Limit, tuple[int | None, bool]]:
        """Each violated limit, in their order, with its wait and whether only the share denies it."""
        found: dict[Limit, tuple[int | None, bool]] = {}
        order = [("requests", "second"), ("tokens", "second")]
        order += [(what, window) for window in NAMES[1:] for what in ("tokens", "requests")]
        for what, window in order:
            cost = 1 if what == "requests" else tokens
            whole = self.whole(what, window)
            if whole is None or cost == 0:
                continue
            wait = self.wait_ns(now_ns, what, window, cost)
            if wait == 0:
                continue
            fits, possible = self.fits_whole(now_ns, what, window, cost)
            if fits or (possible and wait is None):
                wait = self.lease.retry_ns if wait is None else min(wait, self.lease.retry_ns)
            found[Limit[f"{what}_per_{window}".upper()]] = wait, fits
        return found

    def wait_ns(self, now_ns: int, what: str, window: str, cost: int) -> int | None:
        """How long until this host admits a cost by one limit, if its share stays as it is."""
        log, level = self.log_of(what, window), self.level_of(what)
        limit = self.ceiling(what, window)
        assert limit is not None
        moment = log.passes_at(now_ns, cost, limit)
        if cost > limit:
            moment = None
        if window != "second":
            return None if moment is None else moment - now_ns
        rate = self.level_rate(what)
        assert rate is not None
        drain, cap = rate
        if level.value + cost <= cap:
            drained: int | None = now_ns
        elif cost > cap or drain == 0:
            drained = None
        else:
            drained = now_ns + math.ceil((level.value + cost - cap) * SECOND_NS / drain)
        return None if moment is None or drained is None else max(moment, drained) - now_ns

    def fits_whole(self, now_ns: int, what: str, window: str, cost: int) -> tuple[bool, bool]:
        """Whether the whole limit has room for a cost, and whether it would with nothing used."""
        whole = self.whole(what, window)
        assert whole is not None
        fits, possible = self.log_of(what, window).used(now_ns) + cost <= whole, cost <= whole
        rate = self.rate_of(what) if window == "second" else None
        if rate is not None:
            fits = fits and self.level_of(what).value + cost <= rate.cap
            possible = possible and cost <= rate.cap
        return fits, possible

    def log_of(self, what: str, window: str) -> Window:
        """The log of a window."""
        return (self.requests if what == "requests" else self.tokens)[window]

    def level_of(self, what: str) -> Level:
        """The level of a rate."""
        return self.request_level if what == "requests" else self.token_level

    def limit_percents(self, now_ns: int) -> dict[Limit, float]:
        """Percent of what this host may use of each limit."""
        found = {}
        for window in NAMES:
            for what in ("requests", "tokens"):
                limit = self.ceiling(what, window)
                if limit is None:
                    continue
                share = percent(self.log_of(what, window).used(now_ns), limit)
                rate = self.level_rate(what) if window == "second" else None
                if rate is not None:
                    share = max(share, percent(self.level_of(what).value, rate[1]))
                found[Limit[f"{what}_per_{window}".upper()]] = share
        return found or {Limit.RAM: 0.0}

    # -- exchanges

    def used(self, now_ns: int) -> list[int]:
        """What is used of each component; of a cap, in millionths of which the level is at most worth."""
        counts = [
            windows[name].used(now_ns) if name in windows else 0
            for windows in (self.requests, self.tokens)
            for name in NAMES
        ]
        for what in ("requests", "tokens"):
            counts += [0, self.cap_used(what)]
        return [*counts, 0]

    def cap_used(self, what: str) -> int:
        """The smallest part of the cap that is worth as much as the level; beyond the cap, in millionths."""
        rate, level = self.rate_of(what), self.level_of(what)
        if rate is None:
            return 0
        total = rate.totals[1]
        if level.value >= rate.cap:
            return total + math.ceil((level.value - rate.cap) * MILLION)
        part = max(math.floor(level.value * MILLION) - 1, 0)
        while rate.worth(0, part)[1] < level.value:
            part += 1
        return part

    def totals(self) -> list[int]:
        """What is configured of each component."""
        limits = [self.whole(what, name) for what in ("requests", "tokens") for name in NAMES]
        for what in ("requests", "tokens"):
            rate = self.rate_of(what)
            limits += [None, None] if rate is None else list(rate.totals)
        return [WHOLE if limit is None else limit for limit in [*limits, None]]

    def exchange(self, now_ns: int, asked: Sequence[int]) -> None:
        """Grow to what is asked for, and shrink to no less than what is used."""
        self.pass_time(now_ns)
        used = self.used(now_ns)
        for place, wanted in enumerate(asked):
            if wanted == KEEP:
                continue
            held = self.held[place]
            self.held[place] = wanted if wanted >= held else max(wanted, min(used[place], held))
        self.live = now_ns < self.lease.end_ns
        self.needed = None


class SharingOracle:
    """The verbs of a manager on one of many hosts, for one model."""

    def __init__(self, config: ResourceQuotaConfig, clock: Clock) -> None:
        self.clock = clock
        self.lease = HostLease()
        self.model = SharingModel(config, self.lease, clock.now_ns)

    def check(self, tokens: int) -> Decision:
        """Decide one request."""
        self.model.last_starved = False
        return self.model.check(self.clock.now_ns, tokens, 0, 0, True)
