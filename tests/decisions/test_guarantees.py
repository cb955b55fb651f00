"""What is promised about windows, rates, waits and denials, proved from a log that these tests keep themselves.

Every promise is checked of the core and of the oracle, so that the referee of the other tests is proved too.
Counts are compared exactly, in integers and fractions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Any

import pytest
from bounds import cap, ceiling
from factories import UNLIMITED
from hypothesis import given
from hypothesis import strategies as st
from oracle import DAY_NS, HOUR_NS, LENGTHS_NS, MS_NS, SECOND_NS, slot_start_ns
from oracle_answers import Usage
from strategies import (
    DENYING,
    LAST_NS,
    Arrival,
    Pause,
    at_one_scale,
    bursts,
    limits,
    memory,
    rates,
    starts_ns,
    tokens,
)

from modelquota import ManualClock, ResourceQuotaConfig

WINDOWS = [
    (f"max_{unit}_per_{window}", LENGTHS_NS[window])
    for unit in ("requests", "tokens")
    for window in ("minute", "hour", "day", "month")
]
RATES = [("max_requests_per_second", "burst_requests"), ("max_tokens_per_second", "burst_tokens")]
Log = Sequence[tuple[int, int]]
"""Moment and amount of every admission, in the order of time."""


class Subject:
    """A manager with one model `m`, a clock of its own, and the log of what was admitted."""

    def __init__(self, kind: Callable[..., Any], limits: ResourceQuotaConfig, start_ns: int = 0) -> None:
        self.clock = ManualClock(start_ns)
        self.manager = kind(clock=self.clock)
        self.manager.set_quota(limits)
        self.admitted: list[tuple[int, int]] = []

    def move_to(self, at_ns: int) -> None:
        self.clock.advance_ns(at_ns - self.clock.now_ns)

    def ask(self, cost: int, ram_mb: int = 0, ssd_mb: int = 0) -> Any:
        result = self.manager.check_quota("m", cost, ram_mb, ssd_mb)
        if result.allowed:
            self.admitted.append((self.clock.now_ns, cost))
        return result

    def arrive(self, arrival: Arrival) -> Any:
        self.move_to(arrival.step.end_ns(self.clock.now_ns))
        return self.ask(arrival.tokens, arrival.ram_mb, arrival.ssd_mb)

    def drive(self, traffic: Iterable[Arrival]) -> None:
        for arrival in traffic:
            self.arrive(arrival)

    def log_of(self, field: str) -> Log:
        """What counts against the limit of that name."""
        return [(at_ns, cost if "tokens" in field else 1) for at_ns, cost in self.admitted]

    def used(self) -> dict[str, int]:
        """All of the usage but the counts of violations."""
        usage = self.manager.get_usage("m")
        names = [field.name for field in fields(Usage) if not field.name.endswith("_violations")]
        return {name: getattr(usage, name) for name in names}


def quota(**named: Any) -> ResourceQuotaConfig:
    """Limits of `m`: only those named, without bursts."""
    return ResourceQuotaConfig("m", **UNLIMITED | named)


def most_in_any(log: Log, length_ns: int) -> int:
    """Most that was admitted in a closed interval of that length: it suffices to end it at each admission."""
    return max((sum(n for at, n in log if end - length_ns <= at <= end) for end, _ in log), default=0)


def most_above_rate(log: Log, rate: float) -> Fraction:
    """Largest `admitted - rate * W` over all intervals of W seconds that start and end at admissions."""
    excesses, before, total = [Fraction(0)], [], 0
    for at_ns, amount in log:
        drained = Fraction(rate) * at_ns / SECOND_NS
        before.append(total - drained)
        total += amount
        excesses.append(total - drained - min(before))
    return max(excesses)


def denying_quotas() -> st.SearchStrategy[ResourceQuotaConfig]:
    """All limits at once, none of which is only warned about."""
    return st.builds(ResourceQuotaConfig, st.just("m"), **limits(actions=DENYING))


dense_traffic = at_one_scale(50, st.integers(1, 9))
traffic_with_memory = at_one_scale(40, tokens(), memory(), memory())


@pytest.mark.parametrize(("field", "length_ns"), WINDOWS)
@given(limit=st.integers(1, 60), start_ns=starts_ns(), traffic=dense_traffic)
def test_no_window_is_above_its_limit(
    kind: Any, field: str, length_ns: int, limit: int, start_ns: int, traffic: list[Arrival]
) -> None:
    subject = Subject(kind, quota(**{field: limit}), start_ns)
    subject.drive(traffic)
    assert most_in_any(subject.log_of(field), length_ns) <= limit


@pytest.mark.parametrize(("field", "burst_field"), RATES)
@given(rate=rates(), burst=bursts(12), start_ns=starts_ns(), traffic=dense_traffic)
def test_no_second_is_above_its_ceiling_and_no_interval_above_its_rate(
    kind: Any, field: str, burst_field: str, rate: float, burst: int, start_ns: int, traffic: list[Arrival]
) -> None:
    subject = Subject(kind, quota(**{field: rate, burst_field: burst}), start_ns)
    subject.drive(traffic)
    log = subject.log_of(field)
    assert most_in_any(log, SECOND_NS) <= ceiling(rate, burst)
    assert most_above_rate(log, rate) <= cap(rate, burst)
    assert not log or rate > 0


@given(config=denying_quotas(), start_ns=starts_ns(), traffic=traffic_with_memory)
def test_all_limits_hold_at_once(kind: Any, config: ResourceQuotaConfig, start_ns: int, traffic: list[Arrival]) -> None:
    subject = Subject(kind, config, start_ns)
    subject.drive(traffic)
    for field, length_ns in WINDOWS:
        limit = getattr(config, field)
        assert limit is None or most_in_any(subject.log_of(field), length_ns) <= limit
    for field, burst_field in RATES:
        rate, burst = getattr(config, field), getattr(config, burst_field)
        if rate is not None:
            assert most_in_any(subject.log_of(field), SECOND_NS) <= ceiling(rate, burst)
            assert most_above_rate(subject.log_of(field), rate) <= cap(rate, burst)


@pytest.mark.parametrize(("field", "burst_field"), RATES)
@given(
    rate=st.sampled_from([0.5, 2.0, 2.5, 6.0]),
    burst=st.integers(0, 12),
    detours=st.lists(st.sampled_from([0.0, 0.25, 1.75, 2.0]), min_size=1, max_size=3),
    start_ns=starts_ns(),
    parts=st.lists(dense_traffic, min_size=2, max_size=3),
)
def test_changing_the_rate_and_changing_it_back_refills_nothing(
    kind: Any, field: str, burst_field: str, rate: float, burst: int, detours: list[float], start_ns: int, parts: Any
) -> None:
    subject = Subject(kind, quota(**{field: rate, burst_field: burst}), start_ns)
    for i, part in enumerate(parts):
        subject.drive(part)
        subject.manager.update_quota("m", **{field: min(rate, detours[i % len(detours)])})
        subject.drive(part[:3])
        subject.manager.update_quota("m", **{field: rate})
    log = subject.log_of(field)
    assert most_in_any(log, SECOND_NS) <= ceiling(rate, burst)
    assert most_above_rate(log, rate) <= cap(rate, burst)


@pytest.mark.parametrize(("field", "length_ns"), WINDOWS)
@given(
    limit=st.integers(1, 40),
    others=st.lists(st.fixed_dictionaries({}, optional=limits(actions=DENYING)), max_size=3),
    data=st.data(),
)
def test_changing_other_limits_refills_no_window(
    kind: Any, field: str, length_ns: int, limit: int, others: list[dict[str, Any]], data: st.DataObject
) -> None:
    subject = Subject(kind, quota(**{field: limit}))
    for changed in [{}, *others]:
        subject.manager.update_quota("m", **{**changed, field: limit})
        subject.drive(data.draw(dense_traffic))
    assert most_in_any(subject.log_of(field), length_ns) <= limit


@pytest.mark.parametrize(("field", "burst_field"), RATES)
@given(
    rate=st.one_of(st.floats(0.05, 400.0), st.sampled_from([0.1, 0.3, 1.0, 2.5, 60.0])),
    size=st.integers(1, 40),
    start_ns=st.integers(0, 10**18),
)
def test_even_stream_at_the_rate_is_never_refused(
    kind: Any, field: str, burst_field: str, rate: float, size: int, start_ns: int
) -> None:
    size = size if "tokens" in field else 1
    burst = math.ceil(Fraction(rate) / 60 + size)
    subject = Subject(kind, quota(**{field: rate, burst_field: burst}), start_ns)
    apart_ns = Fraction(size) / Fraction(rate) * SECOND_NS
    for i in range(100):
        subject.move_to(start_ns + math.ceil(i * apart_ns))
        assert subject.ask(size), f"request {i} of {size}"


@pytest.mark.parametrize(("field", "length_ns"), [*WINDOWS, *[(field, SECOND_NS) for field, _ in RATES]])
@given(limit=st.integers(1, 8), slot=st.integers(0, 50_000))
def test_saturated_throughput(kind: Any, field: str, length_ns: int, limit: int, slot: int) -> None:
    """One request more than fits at the start of every sub-interval; 60/61 of the limit is the limit in 61 of them."""
    subject = Subject(kind, quota(**{field: limit}), slot_start_ns(slot, length_ns))
    rounds = 3
    for i in range(61 * rounds):
        subject.move_to(slot_start_ns(slot + i, length_ns))
        while subject.ask(1):
            pass
    assert len(subject.admitted) >= limit * rounds


@pytest.mark.parametrize(("field", "burst_field"), RATES)
@given(rate=st.floats(0.5, 9.0), burst=st.integers(0, 6), slot=st.integers(0, 10**6))
def test_saturated_throughput_of_a_fractional_rate(
    kind: Any, field: str, burst_field: str, rate: float, burst: int, slot: int
) -> None:
    subject = Subject(kind, quota(**{field: rate, burst_field: burst}), slot_start_ns(slot, SECOND_NS))
    rounds = 4
    for i in range(61 * rounds):
        subject.move_to(slot_start_ns(slot + i, SECOND_NS))
        while subject.ask(1):
            pass
    assert len(subject.admitted) >= Fraction(rate) * rounds


@given(config=denying_quotas(), start_ns=starts_ns(), traffic=traffic_with_memory, ram_mb=memory(), ssd_mb=memory())
def test_passes_when_told_and_not_a_millisecond_before(
    kind: Any, config: ResourceQuotaConfig, start_ns: int, traffic: list[Arrival], ram_mb: int, ssd_mb: int
) -> None:
    def replayed(count: int) -> Subject:
        subject = Subject(kind, config, start_ns)
        subject.manager.update_memory_usage("m", ram_mb, ssd_mb)
        subject.drive(traffic[:count])
        return subject

    first = replayed(0)
    denials = []
    for i, arrival in enumerate(traffic):
        result = first.arrive(arrival)
        if not result.allowed:
            denials.append((i, arrival, first.clock.now_ns, result.retry_after_ms))
    for i, arrival, at_ns, wait_ms in denials[:: max(1, len(denials) // 6)]:
        cost = (arrival.tokens, arrival.ram_mb, arrival.ssd_mb)
        if wait_ms is None:
            never = replayed(i + 1)
            for later_ns in (SECOND_NS, 2 * HOUR_NS, 300 * DAY_NS):
                never.clock.advance_ns(later_ns)
                assert not never.ask(*cost)
            continue
        assert wait_ms >= 1
        early, in_time = replayed(i + 1), replayed(i + 1)
        if at_ns + wait_ms * MS_NS <= LAST_NS:
            early.clock.advance_ns((wait_ms - 1) * MS_NS)
            assert not early.ask(*cost)
            in_time.clock.advance_ns(wait_ms * MS_NS)
            assert in_time.ask(*cost)


@given(config=denying_quotas(), start_ns=starts_ns(), traffic=traffic_with_memory)
def test_a_denial_charges_nothing(
    kind: Any, config: ResourceQuotaConfig, start_ns: int, traffic: list[Arrival]
) -> None:
    """Usage stays as it was, and another manager that never heard of the denied requests decides the others alike."""
    subject, spared = Subject(kind, config, start_ns), Subject(kind, config, start_ns)
    for arrival in traffic:
        subject.move_to(arrival.step.end_ns(subject.clock.now_ns))
        spared.move_to(subject.clock.now_ns)
        before = subject.used()
        if subject.arrive(Arrival(Pause(0), arrival.tokens, arrival.ram_mb, arrival.ssd_mb)):
            assert spared.ask(arrival.tokens, arrival.ram_mb, arrival.ssd_mb)
        else:
            assert subject.used() == before
        assert subject.used() == spared.used()
