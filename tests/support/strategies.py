"""Hypothesis strategies: limits small enough to bite, and traffic with pauses at every scale of time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

from factories import OPEN as OPEN  # for tests that take it from here
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from oracle import DAY_NS, HOUR_NS, LENGTHS_NS, MS_NS, SECOND_NS, slot_of, slot_start_ns

from modelquota import ResourceQuotaConfig, ViolationAction

COUNT_MAX = 2**62
# A ManualClock ends at 2**61; steps that would pass this moment are left out, so that retries still fit.
LAST_NS = 2**61 - 400 * DAY_NS
DENYING = (ViolationAction.REJECT, ViolationAction.THROTTLE, ViolationAction.QUEUE)
WINDOWS_NS = tuple(LENGTHS_NS.values())


Member = TypeVar("Member")


@dataclass(frozen=True)
class Pause:
    """So many nanoseconds."""

    ns: int

    def end_ns(self, now_ns: int) -> int:
        """The moment at which the pause that starts now ends."""
        return min(now_ns + self.ns, max(now_ns, LAST_NS))


@dataclass(frozen=True)
class ToEdge:
    """Until a sub-interval of a window that is `slots` ahead starts, give or take `offset_ns`."""

    length_ns: int
    slots: int
    offset_ns: int

    def end_ns(self, now_ns: int) -> int:
        """The moment at which the pause that starts now ends."""
        edge_ns = slot_start_ns(slot_of(now_ns, self.length_ns) + self.slots, self.length_ns)
        return min(max(now_ns, edge_ns + self.offset_ns), max(now_ns, LAST_NS))


Step = Pause | ToEdge


@dataclass(frozen=True)
class Arrival:
    """One request: what time passes before it, and what it asks."""

    step: Step
    tokens: int
    ram_mb: int = 0
    ssd_mb: int = 0


def steps(longest_ns: int = 300 * DAY_NS) -> SearchStrategy[Step]:
    """Pauses at every scale up to the longest, and the edges of sub-intervals to the nanosecond."""
    spans = [
        (0, 3),
        (1, 1000),
        (1, 3 * MS_NS),
        (MS_NS, SECOND_NS // 30),
        (SECOND_NS // 60 - 2, SECOND_NS // 60 + 2),
        (SECOND_NS // 10, 2 * SECOND_NS),
        (2 * SECOND_NS, 200 * SECOND_NS),
        (10 * 60 * SECOND_NS, 2 * HOUR_NS),
        (2 * HOUR_NS, 2 * DAY_NS),
        (2 * DAY_NS, 300 * DAY_NS),
    ]
    pauses: list[SearchStrategy[Step]] = [
        st.builds(Pause, st.integers(*span)) for span in spans if span[1] <= longest_ns
    ]
    lengths_ns = [length_ns for length_ns in WINDOWS_NS if length_ns <= longest_ns]
    to_edge: SearchStrategy[Step] = st.builds(
        ToEdge, st.sampled_from(lengths_ns), st.sampled_from([1, 1, 1, 2, 59, 60, 61, 62, 122]), st.integers(-1, 1)
    )
    # Standing still comes several times, edges twice: most of what can go wrong needs requests close together.
    still: SearchStrategy[Step] = st.just(Pause(0))
    return st.one_of(*[still] * len(pauses), to_edge, to_edge, *pauses)


def starts_ns() -> SearchStrategy[int]:
    """Where a clock starts: zero, just before or after an edge, decades on."""
    return st.one_of(
        st.just(0), st.integers(0, 3 * DAY_NS), st.integers(0, 2**60), st.just(2**53 + 1), st.just(DAY_NS - 1)
    )


def counts(small: int) -> SearchStrategy[int]:
    """Counts that bite, now and then zero or as large as they come."""
    usual = [st.integers(1, small), st.integers(1, small), st.integers(2, small), st.integers(small, 10 * small)]
    return st.one_of(
        *usual,
        *usual,
        st.sampled_from([0, 1, 2**31 + 1, 2**53 + 1, COUNT_MAX - 1, COUNT_MAX]),
    )


def maybe(counted: SearchStrategy[Any]) -> SearchStrategy[Any]:
    """None every other time, so that each limit is often the only one."""
    return st.one_of(st.none(), counted)


def rates(*, zero: bool = True) -> SearchStrategy[float]:
    """Rates: fractions that no binary number holds, their neighbours, integers, large ones."""
    usual = [0.1, 0.3, 0.5, 1.0, 1.5, 2.5, 3.0, 7.7, 60.0, 61.0, 100.0]
    odd = [1 / 3, math.nextafter(1.0, 0.0), math.nextafter(1.0, 2.0), 1e6 + 0.1, 1e18]
    return st.one_of(
        st.sampled_from(usual),
        st.sampled_from(usual),
        st.sampled_from(usual),
        st.floats(0.01, 20.0),
        st.floats(1.0, 20.0),
        st.sampled_from([*odd, 0.0] if zero else odd),
    )


def token_rates(*, zero: bool = True) -> SearchStrategy[float]:
    """Rates of tokens, mostly larger, so that one request fits."""
    return st.one_of(st.sampled_from([8.0, 10.0, 12.5, 20.0, 33.3]), st.floats(4.0, 50.0), rates(zero=zero))


def bursts(small: int) -> SearchStrategy[int]:
    """Bursts, mostly small."""
    return st.one_of(st.just(0), st.integers(0, small), st.integers(0, small), st.sampled_from([0, 1, 2**31]))


def limits(*, zero: bool = True, actions: tuple[ViolationAction, ...] = tuple(ViolationAction)) -> dict[str, Any]:
    """Strategies for the fields of a config."""
    return {
        "max_ram_mb": maybe(counts(40)),
        "max_ssd_mb": maybe(counts(40)),
        "max_requests_per_second": maybe(rates(zero=zero)),
        "max_tokens_per_second": maybe(token_rates(zero=zero)),
        "max_tokens_per_hour": maybe(counts(60)),
        "max_tokens_per_day": maybe(counts(90)),
        "max_requests_per_hour": maybe(counts(12)),
        "max_requests_per_day": maybe(counts(20)),
        "max_tokens_per_minute": maybe(counts(40)),
        "max_requests_per_minute": maybe(counts(10)),
        "max_tokens_per_month": maybe(counts(120)),
        "max_requests_per_month": maybe(counts(30)),
        "burst_requests": bursts(6),
        "burst_tokens": st.one_of(st.integers(6, 40), bursts(30)),
        "on_violation": st.sampled_from(actions),
        "max_concurrent_requests": st.one_of(*[st.none()] * 12, st.sampled_from([0, 1, 3])),
    }


def configs(model_id: str = "m") -> SearchStrategy[ResourceQuotaConfig]:
    """Whole configs."""
    return st.builds(ResourceQuotaConfig, st.just(model_id), **limits())


def changes() -> SearchStrategy[dict[str, Any]]:
    """A few fields of a config, for `update_quota`."""
    return st.fixed_dictionaries({}, optional=limits())


def tokens() -> SearchStrategy[int]:
    """What requests ask for, sometimes nothing and sometimes far too much.

    Several in one sub-interval stay below 2**27, so that refunds are exact.
    """
    small = [st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(1, 8), st.integers(0, 20)]
    return st.one_of(*small, *small, st.sampled_from([0, 1, 50, 2**22 + 1]))


def extreme_tokens() -> SearchStrategy[int]:
    """Requests of any size that is accepted."""
    return st.one_of(tokens(), st.integers(0, COUNT_MAX), st.sampled_from([2**53 + 1, COUNT_MAX - 1, COUNT_MAX]))


def extreme_configs() -> SearchStrategy[ResourceQuotaConfig]:
    """Limits at the ends of their ranges; what violates is denied, so that no level is filled beyond its cap.

    The smallest rates go with small bursts: a level has bits for either, not for both, and is rounded beyond.
    """
    far = st.sampled_from([None, None, None, 2**53 + 1, COUNT_MAX - 1, COUNT_MAX])
    far_fields = ("max_ram_mb", "max_ssd_mb", "max_tokens_per_hour", "max_tokens_per_day")
    tiny = st.tuples(st.sampled_from([5e-324, 1e-300, 1e-9]), st.sampled_from([0, 5]))
    huge = st.tuples(st.sampled_from([None, None, 0.5, 2.5, 1e18, 2.0**61, 1e300]), st.sampled_from([0, 5, 2**61]))

    def build(requests: tuple[float, int], tokens: tuple[float, int], others: dict[str, Any]) -> ResourceQuotaConfig:
        rates = {"max_requests_per_second": requests[0], "max_tokens_per_second": tokens[0]}
        return ResourceQuotaConfig("m", **{**others, **rates, "burst_requests": requests[1], "burst_tokens": tokens[1]})

    others = limits(actions=DENYING) | dict.fromkeys(far_fields, far)
    return st.builds(build, tiny | huge, tiny | huge, st.fixed_dictionaries(others))


def memory() -> SearchStrategy[int]:
    """RAM or SSD asked, mostly none."""
    return st.one_of(st.just(0), st.integers(0, 12), st.sampled_from([0, 1, 2**40, COUNT_MAX]))


def crowd(members: SearchStrategy[Member], most: int) -> SearchStrategy[list[Member]]:
    """A few or many: left to itself, Hypothesis makes lists of five."""
    return st.one_of(st.lists(members, max_size=6), *[st.lists(members, min_size=most // 3, max_size=most)] * 3)


def at_one_scale(most: int, *asked: SearchStrategy[int]) -> SearchStrategy[list[Arrival]]:
    """Traffic whose pauses are all of seconds, or of hours, or go up to many days; `asked` is what `Arrival` takes."""
    scales_ns = [2 * SECOND_NS, 2 * SECOND_NS, 2 * HOUR_NS, 2 * DAY_NS, 300 * DAY_NS]
    return st.one_of([crowd(st.builds(Arrival, steps(scale_ns), *asked), most) for scale_ns in scales_ns])
