"""The trail changes nothing: batches that leave the windows behind decide and count as checks that turn them each time.

Two managers with the same limits and clocks. One is asked by batches, and by nothing else unless the events say so; of
the other every model is read after each event, which turns its windows.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from factories import open_quota
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracle import MINUTE_NS, SECOND_NS, SLOTS, slot_of, slot_start_ns
from soundness import assert_sound, level_of, record_of

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota._core.state.state import CONSTANTS

SLOT_NS = SECOND_NS // 60 + 1
LONGEST_NS = 255 * SECOND_NS // 60
IDS = ("a", "b", "c")
TRAIL = CONSTANTS["trail"]


class Twins:
    """Two managers, one with a trail, which two of its kind share, and one without."""

    def __init__(self, quotas: tuple[ResourceQuotaConfig, ...], start_ns: int, path: Path | None = None) -> None:
        self.clock = ManualClock(start_ns)
        self.trailing = ResourceQuotaManager(clock=self.clock, path=path)
        self.turning = ResourceQuotaManager(clock=self.clock)
        self.managers = (self.trailing, self.turning)
        for quota in quotas:
            for manager in self.managers:
                manager.set_quota(quota)
        self.neighbor = self.trailing if path is None else ResourceQuotaManager(clock=self.clock, path=path)
        self.grants: list[tuple[Any, Any]] = []
        self.longest = 0

    def turn(self) -> None:
        for model_id in IDS:
            self.turning.get_usage(model_id)
            row, _ = record_of(self.trailing, model_id)
            self.longest = max(self.longest, row["trail"])

    def advance(self, ns: int) -> None:
        self.clock.advance_ns(ns)

    def to_edge(self, length_ns: int, offset_ns: int) -> None:
        """To the end of the sub-interval of a window, give or take a nanosecond."""
        now_ns = self.clock.now_ns
        self.clock.advance_ns(max(slot_start_ns(slot_of(now_ns, length_ns) + 1, length_ns) + offset_ns - now_ns, 0))

    def batch(self, ids: list[str], cost: int) -> None:
        codes = self.trailing.check_many(self.trailing.codes(ids), cost).tolist()
        results = [self.turning.check_quota(model_id, cost) for model_id in ids]
        assert codes == [0 if result.allowed else int(result.limit or 0) for result in results]

    def charge(self, ids: list[str], cost: int) -> None:
        for manager in self.managers:
            manager.charge_many(manager.codes(ids), cost)

    def check(self, model_id: str, cost: int) -> None:
        assert self.neighbor.check_quota(model_id, cost) == self.turning.check_quota(model_id, cost)

    def peek(self, model_id: str, cost: int) -> None:
        if hasattr(self.trailing, "peek_quota"):
            assert self.trailing.peek_quota(model_id, cost) == self.turning.peek_quota(model_id, cost)

    def reserve(self, model_id: str, cost: int) -> None:
        pair = []
        for manager in (self.neighbor, self.turning):
            try:
                pair.append(manager.reserve(model_id, cost))
            except QuotaExceededError as error:
                pair.append(error.result)
        if hasattr(pair[0], "settle") and hasattr(pair[1], "settle"):
            self.grants.append((pair[0], pair[1]))
        else:
            assert pair[0] == pair[1]

    def finish(self, which: int, tokens: int) -> None:
        if self.grants:
            for grant in self.grants.pop(which % len(self.grants)):
                grant.settle(tokens) if tokens else grant.cancel()
                grant.release()

    def change(self, model_id: str, **fields: Any) -> None:
        for manager in (self.neighbor, self.turning):
            manager.update_quota(model_id, **fields)

    def forgive(self, model_id: str) -> None:
        for manager in (self.neighbor, self.turning):
            manager.reset_burst(model_id)

    def read(self) -> None:
        """Every window and level."""
        for model_id in IDS:
            assert self.trailing.get_usage(model_id) == self.turning.get_usage(model_id)
            held = [(0, 0)] * self.trailing.get_usage(model_id).concurrent_requests  # type: ignore[union-attr]
            found = [self.windows(manager, model_id) for manager in self.managers]
            assert found[0] == found[1]
            for manager in self.managers:
                assert_sound(manager, model_id, held, rounded=True)

    def windows(self, manager: ResourceQuotaManager, model_id: str) -> Any:
        row, cold = record_of(manager, model_id)
        rings = [
            [
                cold[what][window][slot % SLOTS] * (slot >= here - cold["filled"][window])
                for slot in range(here - SLOTS, here)
            ]
            for what in ("requests", "tokens")
            for window, length in enumerate((1, 60, 3600, 86_400, 2_592_000))
            for here in [slot_of(row["slot_end_ns"] - 1, length * SECOND_NS)]
        ]
        lows = [min(cold[f"{what}_minimum"][0], 2**31 - 1) for what in ("request", "token")]
        return rings, row["slot_end_ns"], row["trail"], level_of(row, "request"), level_of(row, "token"), lows

    def close(self) -> None:
        for pair in self.grants:
            for grant in pair:
                grant.release()
        for manager in {*self.managers, self.neighbor}:
            manager.close()


PAUSES = st.sampled_from(
    [
        0,
        1,
        SLOT_NS - 1,
        SLOT_NS,
        SLOT_NS,
        SLOT_NS,
        2 * SLOT_NS,
        5 * SLOT_NS,
        40 * SLOT_NS,
        LONGEST_NS,
        LONGEST_NS + SLOT_NS,
    ]
) | st.integers(0, 3 * MINUTE_NS)
COSTS = st.integers(0, 12) | st.sampled_from([0, 1, 2**16, 2**27 - 1, 2**27, 2**32])
MODEL = st.sampled_from(IDS)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_requests_per_second": st.sampled_from([None, 0.5, 3.0, 61.0]),
        "max_tokens_per_second": st.sampled_from([None, 10.0, 33.3, 1e9]),
        "burst_requests": st.sampled_from([0, 6, 1000]),
        "burst_tokens": st.sampled_from([0, 40, 2**33]),
        "max_requests_per_minute": st.sampled_from([None, 7, 60]),
        "max_tokens_per_minute": st.sampled_from([None, 50, 10**4]),
        "max_tokens_per_hour": st.sampled_from([None, 90, 2**40]),
        "max_requests_per_day": st.sampled_from([None, 30]),
        "max_tokens_per_month": st.sampled_from([None, 200, 10**6]),
        "on_violation": st.sampled_from(["reject", "warn", "throttle"]),
        "max_concurrent_requests": st.sampled_from([None, None, 2]),
    },
)
BATCHES = st.tuples(st.just("batch"), st.lists(MODEL, min_size=1, max_size=6), COSTS)
CHARGES = st.tuples(st.just("charge"), st.lists(MODEL, max_size=4), COSTS)
ADVANCES = st.tuples(st.just("advance"), PAUSES)
EDGES = st.tuples(
    st.just("to_edge"),
    st.sampled_from([SECOND_NS, SECOND_NS, 60 * SECOND_NS, 3600 * SECOND_NS]),
    st.integers(-1, 1),
)
OTHERS = st.one_of(
    st.tuples(st.just("check"), MODEL, COSTS),
    st.tuples(st.just("peek"), MODEL, COSTS),
    st.tuples(st.just("reserve"), MODEL, COSTS),
    st.tuples(st.just("finish"), st.integers(0, 9), COSTS),
    st.tuples(st.just("change"), MODEL, LIMITS),
    st.tuples(st.just("forgive"), MODEL),
    st.tuples(st.just("read")),
)
EVENTS = st.lists(
    st.one_of(BATCHES, BATCHES, BATCHES, CHARGES, ADVANCES, ADVANCES, ADVANCES, EDGES, OTHERS), max_size=60
)


def follow(twins: Twins, events: list[Any]) -> None:
    for verb, *arguments in events:
        if verb == "change":
            twins.change(arguments[0], **arguments[1])
        else:
            getattr(twins, verb)(*arguments)
        twins.turn()
    twins.read()
    twins.close()


@given(
    limits=st.tuples(LIMITS, LIMITS, LIMITS),
    start_ns=st.sampled_from([0, 10**15, 2**53 + 1, 59 * SECOND_NS]) | st.integers(0, 2**60),
    events=EVENTS,
)
@example(
    limits=({"max_requests_per_minute": 3}, {}, {}),
    start_ns=10**15,
    events=[("batch", ["a"], 1), ("advance", SLOT_NS)] * 6 + [("batch", ["a"], 1), ("read",)],
)
@settings(max_examples=3 * settings().max_examples)
def test_a_trail_changes_nothing(limits: Any, start_ns: int, events: list[Any]) -> None:
    quotas = tuple(open_quota(model_id, **fields) for model_id, fields in zip(IDS, limits, strict=True))
    follow(Twins(quotas, start_ns), events)


@pytest.mark.parametrize("seed", range(6))
def test_a_trail_that_two_processes_extend_and_turn(seed: int, path: Path) -> None:
    """Busy models: the trail is nearly always there when something else happens; another manager has the same file."""
    rng = random.Random(seed)
    limits = {
        "max_requests_per_second": 20.0, "burst_requests": 30, "max_tokens_per_second": 400.0, "burst_tokens": 900,
        "max_tokens_per_minute": 9_000, "max_requests_per_minute": 900, "max_tokens_per_hour": 90_000,
    }  # fmt: skip
    twins = Twins(tuple(open_quota(model_id, **limits) for model_id in IDS), rng.choice([0, 10**15]), path)
    for _ in range(400):
        twins.advance(rng.choice([0, SLOT_NS // 2, SLOT_NS, SLOT_NS, 3 * SLOT_NS, 70 * SLOT_NS]))
        match rng.randrange(12):
            case 0:
                twins.reserve(rng.choice(IDS), rng.randrange(90))
            case 1:
                twins.finish(rng.randrange(9), rng.randrange(90))
            case 2:
                twins.check(rng.choice(IDS), rng.randrange(30))
            case 3 if rng.random() < 0.3:
                twins.change(rng.choice(IDS), max_tokens_per_second=rng.choice([None, 50.0, 400.0]))
            case 4 if rng.random() < 0.3:
                twins.read()
            case 5:
                twins.charge([rng.choice(IDS)], rng.randrange(99))
            case _:
                twins.batch([rng.choice(IDS) for _ in range(rng.randrange(1, 5))], rng.randrange(30))
        twins.turn()
    assert twins.longest == TRAIL
    twins.read()
    twins.close()


def test_a_trail_grows_to_its_length_and_is_turned_at_once() -> None:
    clock = ManualClock(10**15)
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m", max_requests_per_minute=100))
    codes = manager.codes(["m"])
    lengths = []
    for number in range(2 * TRAIL + 3):
        assert manager.check_many(codes, number).tolist() == [0]
        row, _ = record_of(manager, "m")
        lengths.append(row["trail"])
        clock.advance_ns(SLOT_NS)
    assert lengths == [*range(TRAIL + 1), *range(TRAIL + 1), 0]
    usage = manager.get_usage("m")
    assert usage is not None
    assert (usage.requests_this_minute, usage.tokens_this_minute) == (11, 55)


@pytest.mark.parametrize(("requests", "tokens"), [(65_536, 0), (1, 2**32)])
def test_a_slot_with_more_than_a_trail_holds_is_turned(requests: int, tokens: int) -> None:
    clock = ManualClock(10**15)
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(open_quota("m"))
    codes = manager.codes(["m"] * requests)
    manager.check_many(codes, tokens)
    for _ in range(2):
        clock.advance_ns(SLOT_NS)
        manager.check_many(codes[:1], 1)
    usage = manager.get_usage("m")
    assert usage is not None
    assert (usage.requests_this_second, usage.tokens_this_second) == (requests + 2, requests * tokens + 2)
    clock.advance_ns(60 * SLOT_NS)
    usage = manager.get_usage("m")
    assert usage is not None
    assert (usage.requests_this_second, usage.tokens_this_second) == (1, 1)
