"""What is promised of limits where tokens are refunded and charged later, proved from a log that these tests keep.

The log has the net: what was admitted, less what was refunded since, at the time at which it was charged. At every
admission no interval that ends there is above a limit, whatever was charged beyond limits before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from bounds import cap, ceiling
from factories import UNLIMITED
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import DAY_NS, HOUR_NS, MS_NS, SECOND_NS
from soundness import assert_sound
from strategies import DENYING, LAST_NS, Pause, Step, ToEdge, maybe, rates, starts_ns, token_rates

from modelquota import Grant, ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager

VERBS = ("reserve", "reserve", "reserve", "check", "settle", "settle", "cancel", "add", "leave")


@dataclass
class Entry:
    """What stands of one charge."""

    at_ns: int
    requests: int
    tokens: int


@dataclass
class Event:
    """One thing that is done, after a pause; `index` says to which of the grants."""

    step: Step
    verb: str
    index: int
    amount: int
    ram_mb: int = 0


@dataclass
class Open:
    """A grant and what was charged for it, the latest last."""

    grant: Grant
    entries: list[Entry]
    ram_mb: int


class Subject:
    """A manager with one model, and the log."""

    def __init__(self, config: ResourceQuotaConfig, start_ns: int) -> None:
        self.config = config
        self.clock = ManualClock(start_ns)
        self.manager = ResourceQuotaManager(clock=self.clock)
        self.manager.set_quota(config)
        self.log: list[Entry] = []
        self.grants: list[Open] = []

    def ask(self, tokens: int, ram_mb: int = 0, *, hold: bool = False) -> Any:
        """Check or reserve; the result of a denial, or None."""
        if hold:
            try:
                grant = self.manager.reserve("m", tokens, ram_mb)
            except QuotaExceededError as error:
                return error.result
        elif not (result := self.manager.check_quota("m", tokens, ram_mb)):
            return result
        entry = Entry(self.clock.now_ns, 1, tokens)
        self.log.append(entry)
        if hold:
            self.grants.append(Open(grant, [entry], ram_mb))
        self.assert_within("requests")
        if tokens:
            self.assert_within("tokens")
        return None

    def do(self, event: Event) -> Any:
        """Let time pass and do it; the result of a denial, or None."""
        self.clock.advance_ns(event.step.end_ns(self.clock.now_ns) - self.clock.now_ns)
        if event.verb in ("reserve", "check"):
            return self.ask(event.amount, event.ram_mb, hold=event.verb == "reserve")
        if self.grants:
            opened = self.grants[event.index % len(self.grants)]
            if event.verb == "add":
                self.add(opened, event.amount)
            else:
                self.grants.remove(opened)
                self.finish(opened, event)
        return None

    def add(self, opened: Open, amount: int) -> None:
        """Count tokens; what is charged shows in the totals."""
        before = self.tokens_charged()
        fits = opened.grant.add(amount)
        charged = self.tokens_charged() - before
        if charged:
            opened.entries.append(Entry(self.clock.now_ns, 0, charged))
            self.log.append(opened.entries[-1])
        if charged and fits:
            self.assert_within("tokens")

    def finish(self, opened: Open, event: Event) -> None:
        """Settle, cancel or leave, and refund in the log or add to it."""
        counted = opened.grant.tokens
        if event.verb == "settle":
            opened.grant.settle(event.amount)
            counted = event.amount
        elif event.verb == "cancel":
            opened.grant.cancel()
            counted = opened.entries[0].requests = 0
        opened.grant.release()
        assert opened.grant.tokens == counted
        more = counted - sum(entry.tokens for entry in opened.entries)
        if more > 0:
            self.log.append(Entry(self.clock.now_ns, 0, more))
        for entry in reversed(opened.entries):
            part = min(max(-more, 0), entry.tokens)
            entry.tokens -= part
            more += part

    def tokens_charged(self) -> int:
        """Tokens ever charged."""
        (record,) = self.manager.snapshot()
        return int(record["tokens_total"])

    def net_since(self, kind: str, start_ns: int) -> int:
        """What stands of all that was charged from then on."""
        return sum(getattr(entry, kind) for entry in self.log if entry.at_ns >= start_ns)

    def assert_within(self, kind: str) -> None:
        """No hour, day, second or interval at all that ends now is above its limit."""
        now_ns = self.clock.now_ns
        for length_ns, name in ((HOUR_NS, "hour"), (DAY_NS, "day")):
            limit = getattr(self.config, f"max_{kind}_per_{name}")
            assert limit is None or self.net_since(kind, now_ns - length_ns) <= limit
        rate, burst = getattr(self.config, f"max_{kind}_per_second"), getattr(self.config, f"burst_{kind}")
        if rate is not None:
            assert self.net_since(kind, now_ns - SECOND_NS) <= ceiling(rate, burst)
            total = 0
            for entry in reversed(self.log):
                total += getattr(entry, kind)
                assert total <= Fraction(rate) * (now_ns - entry.at_ns) / SECOND_NS + cap(rate, burst)

    def assert_sound(self) -> None:
        """The row's fields agree with one another, and the windows with the log."""
        usage = self.manager.get_usage("m")
        assert usage is not None
        assert_sound(self.manager, "m", [(opened.ram_mb, 0) for opened in self.grants])
        (record,) = self.manager.snapshot()
        assert record["tokens_total"] - record["tokens_refunded_total"] == self.net_since("tokens", 0)
        assert usage.tokens_this_second >= self.net_since("tokens", self.clock.now_ns - SECOND_NS)
        assert usage.requests_this_hour >= self.net_since("requests", self.clock.now_ns - HOUR_NS)
        assert usage.tokens_this_day >= self.net_since("tokens", self.clock.now_ns - DAY_NS)
        assert usage.tokens_this_day <= self.net_since("tokens", self.clock.now_ns - DAY_NS - DAY_NS // 60)

    def end(self) -> None:
        """Release what is open, without a word."""
        for opened in self.grants:
            opened.grant.release()


def configs() -> st.SearchStrategy[ResourceQuotaConfig]:
    """Limits of which few are set at once, and bursts that leave room."""
    return st.builds(
        lambda **fields: ResourceQuotaConfig("m", **UNLIMITED | fields),
        max_requests_per_second=maybe(rates(zero=False)),
        max_tokens_per_second=maybe(token_rates(zero=False)),
        burst_requests=st.integers(0, 12),
        burst_tokens=st.integers(6, 200),
        max_tokens_per_hour=maybe(st.integers(20, 200)),
        max_tokens_per_day=maybe(st.integers(20, 500)),
        max_requests_per_hour=maybe(st.integers(2, 12)),
        max_requests_per_day=maybe(st.integers(5, 40)),
        max_concurrent_requests=st.sampled_from([None, None, None, 4]),
        max_ram_mb=st.sampled_from([None, None, 30]),
        on_violation=st.sampled_from(DENYING),
    )


def events_of(seed: int, longest_ns: int, count: int) -> list[Event]:
    """Traffic whose pauses are of one scale, some of them to the edge of a slot."""
    rng = random.Random(seed)
    windows_ns = [length_ns for length_ns in (SECOND_NS, HOUR_NS, DAY_NS) if length_ns <= longest_ns]
    events = []
    for _ in range(count):
        step: Step = Pause(rng.randrange(1 + rng.choice([0, 0, longest_ns // 100, longest_ns])))
        if rng.random() < 0.2:
            step = ToEdge(rng.choice(windows_ns), rng.choice([1, 2, 59, 60, 61]), rng.randrange(-1, 2))
        amount = rng.randrange(rng.choice([3, 10, 10, 30, 30, 300]))
        events.append(Event(step, rng.choice(VERBS), rng.randrange(30), amount, rng.choice([0, 0, 5])))
    return events


def traffic(count: int) -> st.SearchStrategy[list[Event]]:
    """Events by the hundred: left to itself, Hypothesis makes ten."""
    scales_ns = st.sampled_from([2 * SECOND_NS, 2 * SECOND_NS, 200 * SECOND_NS, 2 * HOUR_NS, 2 * DAY_NS])
    return st.builds(events_of, st.integers(0, 2**32), scales_ns, st.sampled_from([10, count, count]))


@given(config=configs(), start_ns=starts_ns(), events=traffic(200))
@settings(max_examples=max(5, settings().max_examples // 3))
def test_no_interval_is_above_its_limit_by_admission(
    config: ResourceQuotaConfig, start_ns: int, events: list[Event]
) -> None:
    subject = Subject(config, start_ns)
    for event in events:
        subject.do(event)
        subject.assert_sound()
    subject.end()


@given(config=configs(), start_ns=starts_ns(), events=traffic(100))
def test_after_refunds_too_a_request_passes_when_told_and_not_a_millisecond_before(
    config: ResourceQuotaConfig, start_ns: int, events: list[Event]
) -> None:
    @contextmanager
    def replayed(count: int) -> Iterator[Subject]:
        subject = Subject(config, start_ns)
        try:
            for event in events[:count]:
                subject.do(event)
            yield subject
        finally:
            subject.end()

    denials = []
    with replayed(0) as first:
        for i, event in enumerate(events):
            result = first.do(event)
            if result is not None:
                denials.append((i, first.clock.now_ns, result.retry_after_ms))
    for i, at_ns, wait_ms in denials[:: max(1, len(denials) // 5)]:
        cost = (events[i].amount, events[i].ram_mb)
        if wait_ms is None:
            with replayed(i + 1) as never:
                for later_ns in (SECOND_NS, 2 * HOUR_NS, 300 * DAY_NS):
                    never.clock.advance_ns(later_ns)
                    assert never.ask(*cost) is not None
        elif at_ns + wait_ms * MS_NS <= LAST_NS:
            with replayed(i + 1) as early:
                early.clock.advance_ns((wait_ms - 1) * MS_NS)
                assert early.ask(*cost) is not None
            with replayed(i + 1) as in_time:
                in_time.clock.advance_ns(wait_ms * MS_NS)
                assert in_time.ask(*cost) is None
