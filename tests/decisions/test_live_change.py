"""A live change of a rate is never a refill, by way of None neither.

The referee keeps the level that would be there if every admission had been charged at its own moment: while there is no
rate the level goes on draining as before and grows by what is admitted, up to its cap. The core must never be below
that, and above it only by what one sixtieth of a second has admitted, and not above a cap.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import SECOND_NS, base, charged, slot_of
from soundness import level_of, record_of

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager

START_NS = 10**15
SLOT_NS = SECOND_NS // 60 + 1
REQUESTS, TOKENS = "requests", "tokens"
NO_RATES = (None, math.inf, 1e19)
"""Rates that no count reaches: no level is kept under them."""


class Referee:
    """One level, in requests or tokens, as it would be; and the most that the core may have instead."""

    def __init__(self) -> None:
        self.value = self.most = Fraction(0)
        self.at_ns = START_NS
        self.rate: float | None = None  # that in force, or the last one that was
        self.cap = Fraction(0)
        self.asleep = False

    def pass_time(self, now_ns: int) -> None:
        if self.rate is not None:
            drained = Fraction(self.rate) * (now_ns - self.at_ns) / SECOND_NS
            self.value, self.most = (max(Fraction(0), level - drained) for level in (self.value, self.most))
        self.at_ns = now_ns

    def change(self, rate: float | None, burst: int) -> None:
        """Another rate takes over what there is; None leaves the one before in force, for the level alone."""
        self.asleep = rate in NO_RATES
        if not self.asleep:
            self.rate, self.cap = rate, base(rate) + burst

    def forgive(self) -> None:
        """A level that sleeps keeps what it has."""
        if self.rate is not None and not self.asleep:
            self.value, self.most = (min(level, base(self.rate)) for level in (self.value, self.most))

    def charge(self, count: int, *, forced: bool) -> None:
        if self.rate is not None:
            cap = None if forced and not self.asleep else self.cap
            self.value, self.most = (charged(level, count, cap) for level in (self.value, self.most))


class Subject:
    """A model with one rate, and the referee of it."""

    def __init__(self, what: str, action: str = "reject") -> None:
        self.what = what
        self.clock = ManualClock(START_NS)
        self.manager = ResourceQuotaManager(clock=self.clock)
        self.manager.set_quota(ResourceQuotaConfig.unlimited("m", on_violation=action))
        self.referee = Referee()
        self.in_slots: Counter[int] = Counter()
        self.slept = False
        self.highest_cap = Fraction(0)

    def change(self, rate: float | None, burst: int) -> None:
        self.manager.update_quota("m", **{f"max_{self.what}_per_second": rate, f"burst_{self.what}": burst})
        self.referee.pass_time(self.clock.now_ns)
        self.referee.change(rate, burst)
        self.slept |= self.referee.asleep
        self.highest_cap = max(self.highest_cap, self.referee.cap)

    def advance(self, ns: int) -> None:
        self.clock.advance_ns(ns)
        self.referee.pass_time(self.clock.now_ns)

    def note(self, count: int, *, forced: bool) -> None:
        self.in_slots[slot_of(self.clock.now_ns, SECOND_NS)] += count
        self.referee.charge(count, forced=forced)

    def ask(self, count: int) -> int:
        """So many requests, or one of so many tokens; how many of either were admitted."""
        asks = [1] * count if self.what == REQUESTS else [count]
        admitted = 0
        for cost in asks:
            if self.manager.check_quota("m", 0 if self.what == REQUESTS else cost):
                self.note(cost, forced=False)
                admitted += cost
        return admitted

    def force(self, count: int) -> None:
        """Tokens that were generated, whatever the limits."""
        self.manager.charge_many(self.manager.codes(["m"]), count)
        if self.what == TOKENS:
            self.note(count, forced=self.manager.get_quota("m").on_violation != "warn")

    def forgive(self) -> None:
        """The burst in use, of a rate that there is."""
        self.manager.reset_burst("m")
        self.referee.forgive()

    def look(self) -> None:
        """Compare."""
        if self.referee.asleep or self.referee.rate is None:
            return
        self.manager.get_usage("m")
        row, _ = record_of(self.manager, "m")
        level = level_of(row, self.what[:-1])
        ideal = self.referee.value
        rounding = Fraction(1, SECOND_NS) * 8  # a level that changes its unit is rounded up
        assert ideal <= level, (float(ideal), float(level), float(ideal - level))
        slack = max(self.in_slots.values(), default=0) if self.slept else 0
        # Above a cap it may be by what was charged past the cap, as the ideal one is.
        self.referee.most = max(min(self.highest_cap, ideal + slack), min(self.referee.most, ideal + slack), ideal)
        assert level <= self.referee.most + rounding, (float(ideal), float(level), slack)


RATES = st.sampled_from([0.5, 1, 2.5, 7, 30, 61, 1000.0]) | st.floats(0.01, 5000)
PAUSES = st.sampled_from([0, 1, SLOT_NS - 1, SLOT_NS, SLOT_NS // 3, SECOND_NS, 3 * SECOND_NS]) | st.integers(0, 10**10)
CHANGES = st.tuples(st.just("change"), st.none() | st.sampled_from(NO_RATES) | RATES, st.integers(0, 60))
EVENTS = st.lists(
    CHANGES
    | st.tuples(st.just("ask"), st.integers(1, 40))
    | st.tuples(st.just("advance"), PAUSES)
    | st.tuples(st.just("force"), st.integers(1, 300))
    | st.tuples(st.just("forgive")),
    max_size=40,
)


def follow(subject: Subject, events: list[tuple[Any, ...]]) -> None:
    for verb, *arguments in events:
        getattr(subject, verb)(*arguments)
        subject.look()
    subject.change(0.25, 1000)
    subject.look()
    subject.change(3.0, 1000)
    subject.look()
    subject.advance(SLOT_NS)
    subject.look()


@pytest.mark.parametrize("action", ["reject", "warn"])
@pytest.mark.parametrize("what", [REQUESTS, TOKENS])
@given(events=EVENTS)
@example(events=[("change", 10.0, 5), ("ask", 15), ("change", None, 0), ("change", 10.0, 5)])
@example(events=[("change", 1.0, 9), ("force", 300), ("change", None, 0), ("change", 1.0, 9)])
@example(events=[("change", 1.0, 59), ("ask", 40), ("change", 1.0, 0), ("change", 1e19, 0), ("change", 1.0, 0)])
@example(events=[("change", 0.0, 9), ("force", 300), ("change", 1e19, 0), ("advance", SLOT_NS), ("change", 1.0, 9)])
@example(events=[("ask", 1), ("change", 0.5, 0), ("change", None, 0), ("change", 0.5, 0), ("force", 1)])
@example(events=[("change", 0.1, 0), ("ask", 1), ("change", None, 0), ("advance", SLOT_NS), ("forgive",)])
def test_no_change_is_a_refill(what, action, events):
    follow(Subject(what, action), events)


@pytest.mark.parametrize("none", NO_RATES)
@pytest.mark.parametrize("pause_ns", [0, 1, SLOT_NS // 2, SLOT_NS, SECOND_NS // 2])
@pytest.mark.parametrize("what", [REQUESTS, TOKENS])
def test_none_and_back_admits_no_more_than_if_nothing_had_changed(what, pause_ns, none):
    """One manager is left alone; what the other admits over ten seconds is not more."""
    admitted = []
    for changing in (False, True):
        subject = Subject(what)
        subject.change(10.0, 20)
        total = 0
        for round_ in range(20):
            for _ in range(60):
                total += subject.ask(1)
            if changing:
                subject.change(none, 20)
            subject.advance(pause_ns)
            if changing:
                subject.change(10.0, 20)
            total += subject.ask(1)
            subject.advance(SECOND_NS // 2 - pause_ns)
            assert total <= 10 * (round_ + 1) // 2 + 10 + 20
        admitted.append(total)
    assert admitted[1] <= admitted[0]
    assert admitted[1] >= admitted[0] - 60


@pytest.mark.parametrize("what", [REQUESTS, TOKENS])
def test_traffic_while_there_was_no_rate_counts_when_it_is_back(what):
    subject = Subject(what)
    subject.change(10.0, 20)
    subject.change(None, 0)
    for _ in range(120):  # ten times the rate for a second
        subject.ask(1)
        subject.advance(SECOND_NS // 120)
    subject.change(10.0, 20)
    assert subject.ask(1) + subject.ask(1) <= 1
    subject.advance(SECOND_NS)
    assert sum(subject.ask(1) for _ in range(20)) <= 11  # the rate alone; the burst is repaid from unused rate
    subject.advance(10 * SECOND_NS)
    assert sum(subject.ask(1) for _ in range(100)) == 30


def test_a_debt_stays_by_way_of_none():
    """What was charged past a limit, in the same sixtieth of a second as the change, is still to be paid."""
    subject = Subject(TOKENS)
    subject.change(10.0, 0)
    subject.force(1000)
    before = subject.manager.check_quota("m", 1)
    for none in NO_RATES:
        subject.change(none, 0)
        subject.change(10.0, 0)
        assert subject.manager.check_quota("m", 1) == before
    subject.advance(98 * SECOND_NS)
    assert not subject.manager.check_quota("m", 1)
    subject.advance(2 * SECOND_NS)
    assert subject.manager.check_quota("m", 1)


@pytest.mark.parametrize("how", ["set_quota", "update_quota", "replaced", "another process"])
def test_every_way_to_change_a_quota_keeps_the_level(how, tmp_path):
    clock = ManualClock(START_NS)
    manager = ResourceQuotaManager(clock=clock, path=tmp_path / "quota.state")
    quota = ResourceQuotaConfig.unlimited("m", max_requests_per_second=1, burst_requests=9, on_violation="reject")
    manager.set_quota(quota)
    assert sum(manager.check_quota("m", 0).allowed for _ in range(30)) == 10
    for rate in (None, 1e19, 1, 500, None, None, 2, 1):
        changed = quota.replace(max_requests_per_second=rate)
        if how == "set_quota":
            manager.set_quota(changed)
        elif how == "update_quota":
            manager.update_quota("m", max_requests_per_second=rate)
        elif how == "replaced":
            old = manager.get_quota("m")
            assert old is not None
            assert manager.replace_quota(old, changed)
        else:
            ResourceQuotaManager(clock=clock, path=tmp_path / "quota.state").set_quota(changed)
    assert not manager.check_quota("m", 0)
    clock.advance(1.02)  # the ceiling of a second holds for 61 slots
    assert [manager.check_quota("m", 0).allowed for _ in range(2)] == [True, False]


def test_a_level_that_sleeps_outlives_its_processes(tmp_path):
    clock = ManualClock(START_NS)
    path = tmp_path / "quota.state"
    with ResourceQuotaManager(clock=clock, path=path) as manager:
        manager.set_quota(
            ResourceQuotaConfig.unlimited("m", max_tokens_per_second=1, burst_tokens=99, on_violation="reject")
        )
        assert manager.check_quota("m", 100)
        manager.update_quota("m", max_tokens_per_second=None)
        assert manager.check_quota("m", 10**6)
    clock.advance(50)
    with ResourceQuotaManager(clock=clock, path=path) as manager:
        assert manager.check_quota("m", 10**6)
        clock.advance(10)
        manager.update_quota("m", max_tokens_per_second=1)
        assert [manager.check_quota("m", n).allowed for n in (11, 9)] == [False, True]


def test_compare_and_set_registers_and_removes():
    manager = ResourceQuotaManager(clock=ManualClock())
    one, other = ResourceQuotaConfig("m", max_ram_mb=1), ResourceQuotaConfig("m", max_ram_mb=2)
    assert not manager.replace_quota(one, None)
    assert not manager.replace_quota(one, other)
    assert manager.list_models() == []
    assert manager.replace_quota(None, one)
    assert manager.check_quota("m", 7)
    assert not manager.replace_quota(None, other)
    assert not manager.replace_quota(other, None)
    assert (manager.get_quota("m"), manager.get_usage("m").tokens_this_hour) == (one, 7)
    assert manager.check_quota("m", 7), "a removal that is not done leaves the model known"
    assert manager.replace_quota(one, None)
    assert manager.get_quota("m") is None
    assert not manager.replace_quota(one, None)
    manager.default_quota = other
    assert manager.check_quota("m", 1)
    assert not manager.replace_quota(None, one), "an id that default_quota has registered has a quota"
    assert manager.get_quota("m") == other


def test_compare_and_set_of_what_is_no_quota():
    manager = ResourceQuotaManager(clock=ManualClock())
    one, other = ResourceQuotaConfig("m"), ResourceQuotaConfig("other")
    with pytest.raises(TypeError, match="expected is 5; give a ResourceQuotaConfig or None"):
        manager.replace_quota(5, one)
    with pytest.raises(TypeError, match="new is 'm'; give a ResourceQuotaConfig or None"):
        manager.replace_quota(one, "m")
    with pytest.raises(TypeError, match="both None"):
        manager.replace_quota(None, None)
    with pytest.raises(ValueError, match="give two of one model"):
        manager.replace_quota(one, other)


def test_of_many_that_compare_and_set_at_once_one_wins(tmp_path):
    """Registering, replacing and removing; each winner is the only one of its round, in whatever manager it is."""
    path = tmp_path / "quota.state"
    managers = [ResourceQuotaManager(path=path) for _ in range(4)]
    quotas = [ResourceQuotaConfig("m", max_ram_mb=size) for size in range(8)]

    def winner(expected, new):
        """The only one of four threads that gets its own quota of `new` in place."""
        barrier = threading.Barrier(4)

        def run(number):
            barrier.wait()
            return managers[number].replace_quota(expected, new[number])

        with ThreadPoolExecutor(4) as pool:
            (number,) = [number for number, won in enumerate(pool.map(run, range(4))) if won]
        return new[number]

    for _ in range(40):
        first = winner(None, quotas[:4])
        assert managers[0].get_quota("m") == first
        second = winner(first, quotas[4:])
        assert managers[1].get_quota("m") == second
        assert winner(second, [None] * 4) is None
        assert managers[2].get_quota("m") is None
    for manager in managers:
        manager.close()
