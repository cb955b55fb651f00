"""Limits per minute and per month: what they admit, when a retry succeeds, from when they count, and large counts."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from factories import make_manager, open_quota
from hypothesis import example, given
from hypothesis import strategies as st
from oracle import DAY_NS, EXACT_IN_SLOT, HOUR_NS, MINUTE_NS, MONTH_NS, MS_NS, SECOND_NS, Oracle, slot_of, slot_start_ns
from soundness import assert_sound

from modelquota import Limit, ManualClock, ResourceQuotaConfig, ResourceQuotaManager

START_NS = 10**15
LENGTHS_NS = {"minute": MINUTE_NS, "month": MONTH_NS}
OPTIONAL = ("minute", "month")
FIELDS = [f"{unit}_this_{name}" for name in OPTIONAL for unit in ("requests", "tokens")]


def fullest(times_ns: list[int], amounts: list[int], length_ns: int) -> int:
    """The most in any interval of this length that contains its beginning and not its end."""
    total = [0, *accumulate(amounts)]
    return max(total[i + 1] - total[bisect_right(times_ns, at_ns - length_ns)] for i, at_ns in enumerate(times_ns))


# -- what is admitted


@pytest.mark.parametrize("cost", [50, 2_000])
@pytest.mark.parametrize("pace", ["even", "random", "as told"])
def test_six_thousand_tokens_per_minute(cost: int, pace: str) -> None:
    """No true minute has more, and with more traffic than fits nearly all of it is used."""
    rng = random.Random(f"{cost} {pace}")
    clock = ManualClock(START_NS + rng.randrange(MINUTE_NS))
    manager = make_manager(open_quota("m", max_tokens_per_minute=6_000), clock=clock)
    start_ns, minutes = clock.now_ns, 200
    times_ns: list[int] = []
    while clock.now_ns < start_ns + minutes * MINUTE_NS:
        result = manager.check_quota("m", cost)
        if result:
            times_ns.append(clock.now_ns)
        elif pace == "as told":
            assert result.retry_after_ms is not None
            clock.advance_ns(result.retry_after_ms * MS_NS)
        clock.advance_ns({"even": 40 * MS_NS, "random": int(rng.expovariate(1) * 40 * MS_NS), "as told": 0}[pace])
    assert fullest(times_ns, [cost] * len(times_ns), MINUTE_NS) == 6_000
    usable = 6_000 * (minutes - 1)  # the first minute is full at once
    assert sum(at_ns >= start_ns + MINUTE_NS for at_ns in times_ns) * cost >= 0.98 * usable


def test_sixty_requests_per_minute() -> None:
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m", max_requests_per_minute=60), clock=clock)
    assert [bool(manager.check_quota("m", 1)) for _ in range(61)] == [True] * 60 + [False]
    denied = manager.check_quota("m", 1)
    assert (denied.limit, denied.violation_type) == (Limit.REQUESTS_PER_MINUTE, "rate_limit")
    assert denied.reason == "requests per minute: 60 of 60 used, 1 asked; retry in 61,000 ms"
    clock.advance(61)
    assert [bool(manager.check_quota("m", 1)) for _ in range(61)] == [True] * 60 + [False]
    clock.advance(61)
    for _ in range(120):  # an even stream at 60/61 of the limit is never refused
        clock.advance(61 / 60)
        assert manager.check_quota("m", 1)


def test_a_month_has_thirty_days() -> None:
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m", max_tokens_per_month=30_000), clock=clock)
    for _ in range(30):
        assert manager.check_quota("m", 1_000)
        clock.advance_ns(DAY_NS)
    denied = manager.check_quota("m", 1)
    assert (denied.limit, denied.violation_type) == (Limit.TOKENS_PER_MONTH, "quota_limit")
    assert denied.retry_after_ms is not None
    assert denied.retry_after_ms * MS_NS <= DAY_NS // 2  # half a day is one sixtieth
    clock.advance_ns(DAY_NS // 2)
    assert manager.check_quota("m", 1_000)
    assert not manager.check_quota("m", 1)


# -- when a retry succeeds


@pytest.mark.parametrize("unit", ["requests", "tokens"])
@pytest.mark.parametrize("name", OPTIONAL)
@given(data=st.data(), start_ns=st.integers(0, 2**59))
def test_a_retry_succeeds_at_its_time_and_no_earlier(name: str, unit: str, data: st.DataObject, start_ns: int) -> None:
    length_ns = LENGTHS_NS[name]
    limit = data.draw(st.sampled_from([1, 3, 20]) if unit == "requests" else st.integers(5, 300), label="limit")
    clock = ManualClock(start_ns)
    manager = make_manager(open_quota("m", **{f"max_{unit}_per_{name}": limit}), clock=clock)
    pauses = st.sampled_from([0, 1, length_ns // 60, length_ns // 60 - 1, length_ns // 7]) | st.integers(0, length_ns)
    for _ in range(data.draw(st.integers(1, 12), label="rounds")):
        clock.advance_ns(data.draw(pauses))
        cost = data.draw(st.integers(1, limit)) if unit == "tokens" else 0
        result = manager.check_quota("m", cost)
        if result.allowed:
            continue
        assert result.retry_after_ms is not None
        clock.advance_ns((result.retry_after_ms - 1) * MS_NS)
        assert not manager.check_quota("m", cost)
        clock.advance_ns(MS_NS)
        assert manager.check_quota("m", cost)


@pytest.mark.parametrize("name", OPTIONAL)
def test_no_wait_helps_a_request_that_exceeds_the_limit(name: str) -> None:
    manager = make_manager(open_quota("m", **{f"max_tokens_per_{name}": 5}))
    result = manager.check_quota("m", 6)
    assert (result.allowed, result.retry_after_ms, result.never_fits) == (False, None, True)


# -- from when they count


def optional_counts(manager: ResourceQuotaManager, model_id: str = "m") -> list[int | None]:
    """Of minute and month, as usage has them and as a snapshot has them."""
    usage = manager.get_usage(model_id)
    record = manager.snapshot()
    (element,) = record[record["model_id"] == model_id]
    found = [getattr(usage, field) for field in FIELDS]
    assert [-1 if value is None else value for value in found] == [int(element[field]) for field in FIELDS]
    return found


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("unit", ["requests", "tokens"])
def test_a_window_is_counted_from_when_it_first_has_a_limit(name: str, unit: str) -> None:
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m"), clock=clock)
    for _ in range(3):
        assert manager.check_quota("m", 100)
    assert optional_counts(manager) == [None] * 4
    field = f"max_{unit}_per_{name}"
    manager.update_quota("m", **{field: 5 if unit == "requests" else 50})
    counts = [0, 0] if name == "minute" else [None, None]
    counts += [None, None] if name == "minute" else [0, 0]
    assert optional_counts(manager) == counts
    assert [bool(manager.check_quota("m", 10)) for _ in range(6)] == [True] * 5 + [False]
    manager.update_quota("m", **{field: None})
    assert manager.check_quota("m", 10)  # counted
    here = 0 if name == "minute" else 2
    assert optional_counts(manager)[here : here + 2] == [6, 60]
    clock.advance_ns(LENGTHS_NS[name] // 2)
    manager.update_quota("m", **{field: 6 if unit == "requests" else 60})
    assert not manager.check_quota("m", 10)
    clock.advance_ns(LENGTHS_NS[name])
    assert manager.check_quota("m", 10)
    assert optional_counts(manager)[here : here + 2] == [1, 10]


@given(
    name=st.sampled_from(OPTIONAL),
    events=st.lists(
        st.tuples(
            st.sampled_from([None, None, 3, 10]),
            st.sampled_from(
                [0, 1, MINUTE_NS // 60, MINUTE_NS // 2, MINUTE_NS, MONTH_NS // 60, MONTH_NS // 2, MONTH_NS]
            ),
            st.integers(0, 4),
        ),
        max_size=30,
    ),
)
@example(name="minute", events=[(3, 0, 3), (None, 0, 4), (3, MINUTE_NS // 2, 1)])
def test_none_and_back_is_no_refill(name: str, events: list[tuple[int | None, int, int]]) -> None:
    """From when it first has a limit, no interval in which the limit is in force admits more, with what there was."""
    field = f"max_requests_per_{name}"
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m"), clock=clock)
    times_ns: list[int] = []
    counted = False
    for limit, pause_ns, asks in events:
        manager.update_quota("m", **{field: limit})
        counted |= limit is not None
        clock.advance_ns(pause_ns)
        for _ in range(asks):
            used = sum(at_ns > clock.now_ns - LENGTHS_NS[name] for at_ns in times_ns)
            allowed = bool(manager.check_quota("m", 0))
            assert not allowed or limit is None or used < limit
            times_ns += [clock.now_ns] * (allowed and counted)


@pytest.mark.parametrize("pause_ns", [0, 1, SECOND_NS])
@pytest.mark.parametrize("name", OPTIONAL)
def test_what_was_charged_before_is_not_refunded_to_the_window(name: str, pause_ns: int) -> None:
    """Neither in the nanosecond in which the window begins to count: it would be a refill."""
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m"), clock=clock)
    cancelled, settled, late = (manager.reserve("m", 10) for _ in range(3))
    clock.advance_ns(pause_ns)
    manager.update_quota("m", **{f"max_tokens_per_{name}": 10})
    clock.advance_ns(pause_ns)
    after = manager.reserve("m", 10)
    cancelled.cancel()
    with settled:
        settled.settle(3)
    clock.advance_ns(pause_ns)
    late.cancel()
    assert not manager.check_quota("m", 1)
    assert getattr(manager.get_usage("m"), f"tokens_this_{name}") == 10
    after.cancel()
    if pause_ns:  # in the same nanosecond it cannot be told from the others
        assert manager.check_quota("m", 10)
    assert_sound(manager, "m", [])


def test_a_new_model_refunds_what_it_was_charged_in_its_first_nanosecond() -> None:
    manager = make_manager(open_quota("m", max_tokens_per_minute=10, max_requests_per_month=1))
    manager.reserve("m", 10).cancel()
    assert manager.check_quota("m", 10)
    assert not manager.check_quota("m", 0)


# -- large counts

COSTS = st.sampled_from(
    [1, 3, EXACT_IN_SLOT - 1, EXACT_IN_SLOT, EXACT_IN_SLOT + 1, 2**29 - 1, 2**33 + 7, 2**40 + 5, 2**55]
) | st.integers(0, 2**55)
JUMPS = st.sampled_from(
    [0, 1, SECOND_NS // 60 + 1, SECOND_NS, SECOND_NS, MINUTE_NS // 60, MINUTE_NS, HOUR_NS // 60, DAY_NS // 60,
     DAY_NS // 2, MONTH_NS // 60, MONTH_NS // 60, MONTH_NS // 2]
) | st.integers(0, 3 * MINUTE_NS)  # fmt: skip
MOST = 2**62


@given(
    start_ns=st.integers(0, 2**58),
    events=st.lists(st.tuples(JUMPS, COSTS, st.sampled_from(["check", "charge", "batch"])), min_size=1, max_size=40),
    limit=st.sampled_from([2**28 + 1, 2**34, 2**41 + 9, MOST]),
)
@example(
    start_ns=0,
    events=[(0, 2**27 + 1, "check")] + [(MINUTE_NS // 60, 0, "check")] * 64,
    limit=MOST,
)
def test_large_counts_age_out_as_the_oracle_says(start_ns: int, events: list[Any], limit: int) -> None:
    """Windows, decisions and waits; of a sub-interval with 2**27 or more the rest is carried into the next one."""
    clock = ManualClock(start_ns)
    fields: dict[str, Any] = {
        "max_tokens_per_minute": limit,
        "max_tokens_per_month": MOST,
        "on_violation": "reject",
    }
    quota = ResourceQuotaConfig.unlimited("m", **fields)
    manager, oracle = ResourceQuotaManager(clock=clock), Oracle(clock=clock)
    for kind in (manager, oracle):
        kind.set_quota(quota)  # type: ignore[attr-defined]
    for jump_ns, cost, verb in events:
        clock.advance_ns(jump_ns)
        if verb == "charge":
            for kind in (manager, oracle):
                kind.charge_many(kind.codes(["m"]), [cost])  # type: ignore[attr-defined]
        else:
            expected = oracle.check_quota("m", cost)
            if verb == "batch":
                codes = manager.check_many(manager.codes(["m"]), cost)
                assert codes.tolist() == [int(expected.limit or 0)]
            else:
                actual = manager.check_quota("m", cost)
                assert (actual.allowed, actual.limit, actual.retry_after_ms) == (
                    expected.allowed, expected.limit, expected.retry_after_ms
                )  # fmt: skip
        found, wanted = manager.get_usage("m"), oracle.get_usage("m")
        assert wanted is not None
        for name in ("second", "minute", "hour", "day", "month"):
            for unit in ("requests", "tokens"):
                field = f"{unit}_this_{name}"
                assert getattr(found, field) == getattr(wanted, field), field
        assert_sound(manager, "m", [])


@pytest.mark.parametrize("name", ["minute", "hour"])
def test_a_large_count_leaves_late_by_less_than_a_part_in_two_to_the_25th(name: str) -> None:
    """What leaves a sub-interval or more late, and that all of it leaves within four."""
    length_ns = {"minute": MINUTE_NS, "hour": HOUR_NS}[name]
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m", max_tokens_per_minute=2**62), clock=clock)
    total = 2**40 + 2**13 + 1
    assert manager.check_quota("m", total)
    edge_ns = slot_start_ns(slot_of(clock.now_ns, length_ns) + 61, length_ns)
    clock.advance_ns(edge_ns - 1 - clock.now_ns)
    field = f"tokens_this_{name}"
    assert getattr(manager.get_usage("m"), field) == total
    clock.advance_ns(1)
    left = [getattr(manager.get_usage("m"), field)]
    for _ in range(3):
        clock.advance_ns(length_ns // 60)
        left.append(getattr(manager.get_usage("m"), field))
    assert 0 < left[0] < total / 2**25
    assert left == sorted(left, reverse=True)
    assert left[-1] == 0


def test_a_day_and_a_month_keep_every_token() -> None:
    clock = ManualClock(START_NS)
    manager = make_manager(open_quota("m", max_tokens_per_month=2**62), clock=clock)
    assert manager.check_quota("m", 2**40 + 2**13 + 1)
    for length_ns, field in ((DAY_NS, "tokens_this_day"), (MONTH_NS, "tokens_this_month")):
        clock.advance_ns(slot_start_ns(slot_of(START_NS, length_ns) + 61, length_ns) - 1 - clock.now_ns)
        assert getattr(manager.get_usage("m"), field) == 2**40 + 2**13 + 1
        clock.advance_ns(1)
        assert getattr(manager.get_usage("m"), field) == 0


def test_a_large_charge_is_refunded_to_the_slots_that_carry_it() -> None:
    """What was carried on is found again; nothing is refunded twice, and what is not found ages out."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        clock = ManualClock(int(rng.integers(0, 2**58)))
        manager = make_manager(open_quota("m", max_tokens_per_minute=2**62), clock=clock)
        amounts = [int(amount) for amount in 2.0 ** rng.uniform(0, 58, 3)]
        grants = [manager.reserve("m", amount) for amount in amounts]
        clock.advance_ns(int(rng.integers(0, 3 * SECOND_NS)))
        for grant, amount in zip(grants, amounts, strict=True):
            grant.settle(amount // 3)
            assert_sound(manager, "m", [(0, 0)] * 3, rounded=True)
            usage = manager.get_usage("m")
            assert usage is not None
            assert usage.tokens_this_minute is not None
            kept = sum(entry.tokens for entry in grants)
            assert kept <= usage.tokens_this_minute <= kept + 3 * (sum(amounts) >> 24)
            assert usage.tokens_this_day == kept
        for grant in grants:
            grant.release()
