"""A plain model of what modelquota does: the referee of the tests.

It is written to be read against the semantics, line by line, and to be slow. Every window keeps a log of
all that was ever charged to it and counts by adding the log up; every level is a `Fraction`; a wait is found
by trying each moment at which something leaves. Nothing here is shared with the core, except the words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any, Protocol

from oracle_answers import COUNTERS, OUTCOMES, TYPES, Decision, Stats, Usage
from oracle_kinds import Amount, counted, with_output

from modelquota import Limit, ResourceQuotaConfig, Tokens, UnknownModelError, ViolationAction

SECOND_NS = 10**9
MINUTE_NS = 60 * SECOND_NS
HOUR_NS = 3600 * SECOND_NS
DAY_NS = 24 * HOUR_NS
MONTH_NS = 30 * DAY_NS
LENGTHS_NS = {"second": SECOND_NS, "minute": MINUTE_NS, "hour": HOUR_NS, "day": DAY_NS, "month": MONTH_NS}
LONGER = ("minute", "hour", "day", "month")
"""The windows whose limits are not rates."""
OPTIONAL = ("minute", "month")
"""The windows that are counted from the moment they first have a limit."""
MS_NS = 10**6
SLOTS = 60
NEVER_NS = 2**62
LAST_MOMENT_NS = 2**61
COUNT_MAX = 2**62
EXACT_IN_SLOT = 2**27


def slot_of(at_ns: int, length_ns: int) -> int:
    """Number of the sub-interval of a window of `length_ns` in which the moment lies."""
    return at_ns * SLOTS // length_ns


def slot_start_ns(slot: int, length_ns: int) -> int:
    """First whole nanosecond of a sub-interval."""
    return -(-slot * length_ns // SLOTS)


def kept(count: int) -> int:
    """What of a count a sub-interval holds."""
    shift = 0
    while count >> shift >= EXACT_IN_SLOT:
        shift += 2
    return count >> shift << shift


class Clock(Protocol):
    """What the oracle needs of a clock."""

    @property
    def now_ns(self) -> int: ...


class Window:
    """Everything that was ever charged to one rolling window.

    Of a count of 2**27 or more, a sub-interval of up to a minute holds the highest 26 or 27 bits, and so does one of
    any length of requests; the rest is carried into the next one.
    """

    def __init__(self, length_ns: int, carries: bool = True, since_ns: int = 0) -> None:
        self.length_ns = length_ns
        self.since_ns = since_ns  # what was charged before it began to count is not refunded to it
        self.log: list[tuple[int, int]] = []
        self.carries = carries
        self.large = False  # whether anything may have been carried

    def used(self, now_ns: int) -> int:
        """Sum of what was charged in the current sub-interval and in the 60 before it."""
        current = slot_of(now_ns, self.length_ns)
        if self.large and self.carries:
            return self._used_with_carry(current)
        return sum(amount for slot, amount in self.log if current - SLOTS <= slot <= current)

    def _used_with_carry(self, current: int) -> int:
        amounts: dict[int, int] = {}
        for slot, amount in self.log:
            amounts[slot] = amounts.get(slot, 0) + amount
        used = 0
        while amounts and (slot := min(amounts)) < current:
            amount = amounts.pop(slot)
            rest = amount - kept(amount)
            if rest:
                amounts[slot + 1] = amounts.get(slot + 1, 0) + rest
            used += amount - rest if slot >= current - SLOTS else 0
        return used + amounts.get(current, 0)

    def in_slot(self, at_ns: int) -> int:
        """Sum of what was charged in the sub-interval of a moment."""
        here = slot_of(at_ns, self.length_ns)
        return sum(amount for slot, amount in self.log if slot == here)

    def charge(self, now_ns: int, amount: int) -> None:
        """Charge, up to the largest number that a window counts."""
        amount = min(amount, COUNT_MAX - self.used(now_ns))
        self.large = self.large or amount + self.used(now_ns) >= EXACT_IN_SLOT
        self.log.append((slot_of(now_ns, self.length_ns), amount))

    def refund(self, charged_ns: int, amount: int) -> None:
        """Take back from what was charged then; where that has left the window, this has, too."""
        if charged_ns >= self.since_ns:
            self.log.append((slot_of(charged_ns, self.length_ns), -amount))

    def passes_at(self, now_ns: int, cost: int, limit: int) -> int | None:
        """First moment from now at which `cost` fits under `limit` if nothing else is charged; None: never."""
        if self.used(now_ns) + cost <= limit:
            return now_ns
        leaving = {
            slot_start_ns(slot + SLOTS + 1 + later, self.length_ns)
            for slot, _ in self.log
            for later in range(4 if self.large else 1)
        }
        for moment in sorted(moment for moment in leaving if moment > now_ns):
            if self.used(moment) + cost <= limit:
                return moment
        return None


class Level:
    """What was charged and has not drained yet, exactly."""

    def __init__(self) -> None:
        self.value = Fraction(0)
        self.at_ns = 0
        self.dormant: tuple[float, Fraction] | None = None  # rate and cap of before, while there is none

    def pass_time(self, now_ns: int, rate: float | None, second: Window) -> None:
        """Let time pass; a dormant level grows at the end of a sub-interval by what was admitted in it."""
        if rate is not None:
            self.drain(now_ns, rate)
        elif self.dormant is not None:
            rate, cap = self.dormant
            end_ns = slot_start_ns(slot_of(self.at_ns, SECOND_NS) + 1, SECOND_NS)
            if now_ns >= end_ns:
                admitted = second.in_slot(self.at_ns)
                self.drain(end_ns, rate)
                self.charge(admitted, cap)
            self.drain(now_ns, rate)
        else:
            self.at_ns = now_ns

    def change_rate(self, old: float | None, old_cap: Fraction, new: float | None, now_ns: int, second: Window) -> None:
        """None puts the level to sleep, and another rate wakes it."""
        if old is not None and new is None:
            self.dormant = old, old_cap
            if self.value <= old_cap:
                self.charge(-second.in_slot(now_ns))  # is charged when the sub-interval ends
        elif old is None and new is not None and self.dormant is not None:
            self.charge(second.in_slot(now_ns), self.dormant[1])
            self.dormant = None

    def drain(self, now_ns: int, rate: float) -> None:
        """Let time pass under a rate."""
        self.value = max(Fraction(0), self.value - Fraction(rate) * (now_ns - self.at_ns) / SECOND_NS)
        self.at_ns = now_ns

    def charge(self, count: int, cap: Fraction | None = None) -> None:
        """Add what was charged now, up to the cap, if there is one."""
        self.value = charged(self.value, count, cap)

    def forgive(self, rest: Fraction) -> None:
        """Leave no more than so much."""
        self.value = min(self.value, rest)

    def passes_at(self, now_ns: int, cost: int, rate: float, cap: Fraction) -> int | None:
        """First whole nanosecond from now at which `cost` fits under `cap`; None: never."""
        if self.value + cost <= cap:
            return now_ns
        if cost > cap or rate == 0:
            return None
        return now_ns + math.ceil((self.value + cost - cap) * SECOND_NS / Fraction(rate))


def charged(value: Fraction, count: int, cap: Fraction | None) -> Fraction:
    """A level after a charge."""
    after = max(value + count, Fraction(0))
    return after if cap is None else max(value, min(after, cap))


def base(rate: float) -> Fraction:
    """The part of the level that is rate, not burst."""
    return max(Fraction(rate), Fraction(1))


def percent(used: Fraction | int, limit: Fraction | int | None) -> float:
    """Share of a limit that is used; an unlimited one is never used."""
    return 0.0 if limit is None else float(Fraction(100) * used / max(limit, 1))


class Model:
    """One model: its limits, its logs, its memory and its counters."""

    level_type = Level
    held_ram = held_ssd = concurrent = 0  # by grants; `oracle_grants` knows them

    def __init__(self, config: ResourceQuotaConfig) -> None:
        self.config = config
        self.requests: dict[str, Window] = {}
        self.tokens: dict[str, Window] = {}
        self.count_windows(0)
        self.request_level = self.level_type()
        self.token_level = self.level_type()
        self.ram = self.peak_ram = self.ssd = self.peak_ssd = 0
        self.stats = Stats()

    def count_windows(self, now_ns: int) -> None:
        """Begin to count the windows that now have a limit for the first time.

        If anything was charged before, it may have been at this moment: then nothing of this moment is refunded.
        """
        logs = [window.log for windows in (self.requests, self.tokens) for window in windows.values()]
        since_ns = now_ns + any(amount for log in logs for _, amount in log)
        for name, length_ns in LENGTHS_NS.items():
            limited = [getattr(self.config, f"max_{what}_per_{name}") for what in ("requests", "tokens")]
            if name not in self.requests and (name not in OPTIONAL or limited != [None, None]):
                self.requests[name] = Window(length_ns, since_ns=since_ns)
                self.tokens[name] = Window(length_ns, carries=length_ns < DAY_NS, since_ns=since_ns)

    def most_used(self, now_ns: int) -> int:
        """Tokens in the window that has the most."""
        return max(window.used(now_ns) for window in self.tokens.values())

    def pass_time(self, now_ns: int) -> None:
        """Drain both levels under the rates in force."""
        self.request_level.pass_time(now_ns, self.config.max_requests_per_second, self.requests["second"])
        self.token_level.pass_time(now_ns, self.config.max_tokens_per_second, self.tokens["second"])

    def change(self, config: ResourceQuotaConfig, now_ns: int) -> None:
        """Replace the limits."""
        self.pass_time(now_ns)
        for level, window, (old, cap), (new, _) in zip(
            (self.request_level, self.token_level),
            (self.requests["second"], self.tokens["second"]),
            rates_of(self.config),
            rates_of(config),
            strict=True,
        ):
            level.change_rate(old, cap, new, now_ns, window)
        self.config = config
        self.count_windows(now_ns)

    def charge(self, now_ns: int, requests: int, tokens: int, *, capped: bool = True) -> None:
        """Add to every window and level, which `capped` keeps below its cap; `pass_time` has been called."""
        for window in self.requests.values():
            window.charge(now_ns, requests)
        for window in self.tokens.values():
            window.charge(now_ns, tokens)
        (request_rate, request_cap), (token_rate, token_cap) = rates_of(self.config)
        if request_rate is not None:
            self.request_level.charge(requests, request_cap if capped else None)
        if token_rate is not None:
            self.token_level.charge(tokens, token_cap if capped else None)

    def waits(self, now_ns: int, tokens: int, ram_mb: int, ssd_mb: int) -> dict[Limit, int | None]:
        """Moment at which each limit passes, in the order in which limits are judged; None: no wait helps."""
        c, req, tok = self.config, self.requests, self.tokens
        return {
            Limit.RAM: _fixed(now_ns, self.ram + self.held_ram, ram_mb, c.max_ram_mb),
            Limit.SSD: _fixed(now_ns, self.ssd + self.held_ssd, ssd_mb, c.max_ssd_mb),
            Limit.CONCURRENCY: _fixed(now_ns, self.concurrent, 1, c.max_concurrent_requests),
            Limit.REQUESTS_PER_SECOND: _rate(
                now_ns, req["second"], self.request_level, 1, c.max_requests_per_second, c.burst_requests
            ),
            Limit.TOKENS_PER_SECOND: _rate(
                now_ns, tok["second"], self.token_level, tokens, c.max_tokens_per_second, c.burst_tokens
            ),
            **{
                limit: _quota(now_ns, windows.get(name), cost, getattr(c, f"max_{what}_per_{name}"))
                for name in LONGER
                for what, windows, cost in (("tokens", tok, tokens), ("requests", req, 1))
                for limit in [Limit[f"{what}_per_{name}".upper()]]
            },
        }

    def percents(self, now_ns: int, ram_mb: int = 0, ssd_mb: int = 0, grants: int = 0) -> dict[Limit, float]:
        """Percent of each limit in use now, with so much memory and so many grants on top."""
        c, req, tok = self.config, self.requests, self.tokens
        return {
            Limit.RAM: percent(self.ram + self.held_ram + ram_mb, c.max_ram_mb),
            Limit.SSD: percent(self.ssd + self.held_ssd + ssd_mb, c.max_ssd_mb),
            Limit.CONCURRENCY: percent(self.concurrent + grants, c.max_concurrent_requests),
            Limit.REQUESTS_PER_SECOND: _rate_percent(
                now_ns, req["second"], self.request_level, c.max_requests_per_second, c.burst_requests
            ),
            Limit.TOKENS_PER_SECOND: _rate_percent(
                now_ns, tok["second"], self.token_level, c.max_tokens_per_second, c.burst_tokens
            ),
            **{
                Limit[f"{what}_per_{name}".upper()]: percent(
                    windows[name].used(now_ns), getattr(c, f"max_{what}_per_{name}")
                )
                for name in LONGER
                for what, windows in (("tokens", tok), ("requests", req))
                if name in windows
            },
        }

    def violated(self, now_ns: int, tokens: int, ram_mb: int, ssd_mb: int, enforced: bool) -> dict[Limit, int | None]:
        """The violated limits, in their order, each with the moment at which it passes; `pass_time` has been called."""
        waits = self.waits(now_ns, tokens, ram_mb, ssd_mb) if enforced else {}
        return {limit: moment for limit, moment in waits.items() if moment is None or moment > now_ns}

    def first_over(self, now_ns: int) -> Limit | None:
        """The first limit of which more is used than it allows; `pass_time` has been called."""
        c = self.config
        used_mb = self.ram + self.held_ram, self.ssd + self.held_ssd
        over = {
            Limit.RAM: _is_over(used_mb[0], c.max_ram_mb),
            Limit.SSD: _is_over(used_mb[1], c.max_ssd_mb),
            Limit.CONCURRENCY: _is_over(self.concurrent, c.max_concurrent_requests),
            Limit.REQUESTS_PER_SECOND: _rate_is_over(
                now_ns, self.requests["second"], self.request_level, c.max_requests_per_second, c.burst_requests
            ),
            Limit.TOKENS_PER_SECOND: _rate_is_over(
                now_ns, self.tokens["second"], self.token_level, c.max_tokens_per_second, c.burst_tokens
            ),
            **{
                Limit[f"{what}_per_{name}".upper()]: name in windows
                and _is_over(windows[name].used(now_ns), getattr(c, f"max_{what}_per_{name}"))
                for name in LONGER
                for what, windows in (("tokens", self.tokens), ("requests", self.requests))
            },
        }
        return next((limit for limit, is_over in over.items() if is_over), None)

    def check(self, now_ns: int, amount: Amount, ram_mb: int, ssd_mb: int, enforced: bool) -> Decision:
        """Decide one request; charge it and count it as the decision says."""
        self.pass_time(now_ns)
        tokens = counted(self.config, amount)
        violated = self.violated(now_ns, tokens, ram_mb, ssd_mb, enforced)
        first = next(iter(violated), None)
        action = None if first is None else self.config.on_violation
        allowed = action in (None, ViolationAction.WARN)
        before = self.percents(now_ns)
        if allowed:
            self.charge(now_ns, 1, tokens)
        self.stats.add(total_checks=1, allowed_requests=int(allowed))
        if first is None:
            return Decision(True, current_usage=max(self.percents(now_ns, ram_mb, ssd_mb, 1).values()))
        assert action is not None
        self.stats.add(**{"total_violations": 1, OUTCOMES[action]: 1, COUNTERS[TYPES[first]]: 1})
        usage = max(self.percents(now_ns, ram_mb, ssd_mb, 1).values()) if allowed else before[first]
        return Decision(allowed, TYPES[first], first, action, retry_ms(now_ns, violated.values()), usage)

    def usage(self, now_ns: int) -> Usage:
        """What the model uses now."""
        self.pass_time(now_ns)
        c, stats = self.config, self.stats
        return Usage(
            current_ram_mb=self.ram,
            peak_ram_mb=self.peak_ram,
            current_ssd_mb=self.ssd,
            peak_ssd_mb=self.peak_ssd,
            **{
                f"{what}_this_{name}": windows[name].used(now_ns) if name in windows else None
                for name in LENGTHS_NS
                for what, windows in (("tokens", self.tokens), ("requests", self.requests))
            },
            burst_requests_used=_burst_used(self.request_level, c.max_requests_per_second),
            burst_tokens_used=_burst_used(self.token_level, c.max_tokens_per_second),
            total_violations=stats.total_violations,
            ram_violations=stats.ram_violations,
            ssd_violations=stats.ssd_violations,
            rate_violations=stats.rate_violations,
            quota_violations=stats.quota_violations,
            concurrency_violations=stats.concurrency_violations,
            reserved_ram_mb=self.held_ram,
            reserved_ssd_mb=self.held_ssd,
            concurrent_requests=self.concurrent,
        )


def rates_of(config: ResourceQuotaConfig) -> list[tuple[float | None, Fraction]]:
    """Rate and cap of requests and of tokens; the core takes a rate that no count reaches for none."""
    return [
        (None, Fraction(0)) if rate is None or rate >= COUNT_MAX else (rate, base(rate) + burst)
        for rate, burst in (
            (config.max_requests_per_second, config.burst_requests),
            (config.max_tokens_per_second, config.burst_tokens),
        )
    ]


def _fixed(now_ns: int, used: int, cost: int, limit: int | None) -> int | None:
    return now_ns if limit is None or cost == 0 or used + cost <= limit else None


def _quota(now_ns: int, window: Window | None, cost: int, limit: int | None) -> int | None:
    return now_ns if window is None or limit is None or cost == 0 else window.passes_at(now_ns, cost, limit)


def _rate(now_ns: int, window: Window, level: Level, cost: int, rate: float | None, burst: int) -> int | None:
    if rate is None or cost == 0:
        return now_ns
    if rate == 0:
        return None
    ceiling = window.passes_at(now_ns, cost, math.ceil(rate) + burst)
    drained = level.passes_at(now_ns, cost, rate, base(rate) + burst)
    return None if ceiling is None or drained is None else max(ceiling, drained)


def _rate_percent(now_ns: int, window: Window, level: Level, rate: float | None, burst: int) -> float:
    if rate is None:
        return 0.0
    ceiling = math.ceil(rate) + burst if rate else 0  # a rate of 0 admits nothing, whatever the burst
    return max(percent(window.used(now_ns), ceiling), percent(level.value, base(rate) + burst))


def _is_over(used: int, limit: int | None) -> bool:
    return limit is not None and used > limit


def _rate_is_over(now_ns: int, window: Window, level: Level, rate: float | None, burst: int) -> bool:
    if rate is None or rate >= COUNT_MAX:
        return False
    ceiling = math.ceil(rate) + burst if rate else 0
    return window.used(now_ns) > ceiling or level.value > base(rate) + burst


def retry_ms(now_ns: int, moments: Iterable[int | None]) -> int | None:
    waits = [None if moment is None else moment - now_ns for moment in moments]
    if any(wait is None or wait > NEVER_NS for wait in waits):
        return None
    return max(-(-wait // MS_NS) for wait in waits if wait is not None)


def _burst_used(level: Level, rate: float | None) -> int:
    return 0 if rate is None else max(0, math.ceil(level.value - base(rate)))


class Oracle:
    """The verbs of a `ResourceQuotaManager`, for the tests to compare with."""

    model_type = Model

    def __init__(self, *, clock: Clock, default_quota: ResourceQuotaConfig | None = None) -> None:
        self.clock = clock
        self.default_quota = default_quota
        self.enforcement_enabled = True
        self.models: dict[str, Model] = {}
        self.elsewhere = Stats()

    def set_quota(self, config: ResourceQuotaConfig | str, **changes: Any) -> None:
        """Replace the limits of a model and keep its usage; register it where it is unknown."""
        if isinstance(config, str):
            config = ResourceQuotaConfig(config, **changes)
        model = self.models.setdefault(config.model_id, self.model_type(config))
        model.change(config, self.clock.now_ns)

    def update_quota(self, model_id: str, **changes: Any) -> ResourceQuotaConfig:
        """Change some limits of a known model."""
        config = self._known(model_id).config.replace(**changes)
        self.set_quota(config)
        return config

    def remove_quota(self, model_id: str) -> bool:
        """Forget a model but for its part in the totals."""
        model = self.models.pop(model_id, None)
        if model is not None:
            self.elsewhere.add(**{f.name: getattr(model.stats, f.name) for f in fields(Stats)})
        return model is not None

    def check_quota(
        self, model_id: str, estimated_tokens: Amount, ram_needed_mb: int = 0, ssd_needed_mb: int = 0
    ) -> Decision:
        """Decide one request."""
        if model_id not in self.models and self.default_quota is not None and "#" not in model_id:
            self.set_quota(self.default_quota.replace(model_id=model_id))
        if model_id not in self.models:
            self.elsewhere.add(total_checks=1, allowed_requests=1)
            return Decision(True)
        return self.models[model_id].check(
            self.clock.now_ns, estimated_tokens, ram_needed_mb, ssd_needed_mb, self.enforcement_enabled
        )

    def codes(self, model_ids: Sequence[str]) -> list[str]:
        """Row codes: here the ids themselves."""
        return list(model_ids)

    def meters_of(self, model_id: str) -> list[str]:
        """The meters of a model, the one that was registered first in front."""
        return [one for one in self.models if one.startswith(f"{model_id}#") and "#" not in model_id]

    def charge_many(self, rows: Sequence[str], tokens: Amount | Sequence[Amount]) -> list[int]:
        """Charge output tokens, or tokens by kind, to models and their meters, whatever their limits.

        Returns for each the code of the first limit that it, or a meter of it, is over then.
        """
        now_ns = self.clock.now_ns
        over = []
        for row, amount in zip(rows, tokens if isinstance(tokens, Sequence) else [tokens] * len(rows), strict=True):
            kinds = amount if isinstance(amount, Tokens) else with_output(0, int(amount))
            first = []
            for model in [self._known(row), *(self.models[meter] for meter in self.meters_of(row))]:
                model.pass_time(now_ns)
                model.charge(now_ns, 0, counted(model.config, kinds), capped=self.is_trial(model))
                first.append(model.first_over(now_ns))
            over.append(next((int(limit) for limit in first if limit is not None), 0))
        return over

    def is_trial(self, model: Model) -> bool:
        """Whether nothing is denied to the model: then no level rises above its cap."""
        return not self.enforcement_enabled or model.config.on_violation is ViolationAction.WARN

    def update_memory_usage(self, model_id: str, ram_mb: int, ssd_mb: int) -> None:
        """State the memory that a model uses."""
        model = self._known(model_id)
        model.ram, model.ssd = ram_mb, ssd_mb
        model.peak_ram, model.peak_ssd = max(model.peak_ram, ram_mb), max(model.peak_ssd, ssd_mb)

    def reset_burst(self, model_id: str) -> None:
        """Forgive what both levels hold above the rate."""
        model = self._known(model_id)
        model.pass_time(self.clock.now_ns)
        for level, rate in (
            (model.request_level, model.config.max_requests_per_second),
            (model.token_level, model.config.max_tokens_per_second),
        ):
            if rate is not None:
                level.forgive(base(rate))

    def get_quota(self, model_id: str) -> ResourceQuotaConfig | None:
        """Limits of a model, or None."""
        return self.models[model_id].config if model_id in self.models else None

    def get_usage(self, model_id: str) -> Usage | None:
        """Usage of a model, or None."""
        return self.models[model_id].usage(self.clock.now_ns) if model_id in self.models else None

    def get_report(self, model_id: str) -> dict[str, float] | None:
        """Numbers of a `ModelReport`, or None."""
        model, usage = self.models.get(model_id), self.get_usage(model_id)
        if model is None or usage is None:
            return None
        percents = model.percents(self.clock.now_ns)
        return {
            "ram_utilization": percents[Limit.RAM],
            "ssd_utilization": percents[Limit.SSD],
            "requests_per_second": float(usage.requests_this_second),
            "tokens_per_second": float(usage.tokens_this_second),
            "hourly_quota_used": percents[Limit.TOKENS_PER_HOUR],
            "daily_quota_used": percents[Limit.TOKENS_PER_DAY],
            "hourly_requests_used": percents[Limit.REQUESTS_PER_HOUR],
            "daily_requests_used": percents[Limit.REQUESTS_PER_DAY],
        }

    def get_stats(self) -> Stats:
        """Totals over all models that are or ever were."""
        total = Stats()
        for part in [self.elsewhere, *(model.stats for model in self.models.values())]:
            total.add(**{f.name: getattr(part, f.name) for f in fields(Stats)})
        return total

    def list_models(self) -> list[str]:
        """Ids of the known models."""
        return list(self.models)

    def _known(self, model_id: str) -> Model:
        if model_id not in self.models:
            raise UnknownModelError(model_id)
        return self.models[model_id]
