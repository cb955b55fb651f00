"""Limits from what was seen: for each limit of a quota a lower, a target and an upper value, with the reason.

A limit that may deny a share of the requests is found by what would have been offered to it. Without
denials, a window or a bucket holds at least as much as it does with them, so a request that a limit denies is one whose
window would have exceeded it. The share of those is known without a simulation, and is never below the share denied.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit, LimitRecord
from modelquota.tuning.cells import NS_PER_SECOND, Int64Array
from modelquota.tuning.charges import Charges, reserved_at_once
from modelquota.tuning.frontier import Frontier
from modelquota.tuning.trace import Trace
from modelquota.tuning.windows import counted_ns

__all__ = ["Concurrency", "Estimates", "LimitAdvice", "advise", "concurrency", "estimates", "fields_of", "round_up"]

LEAST_HISTORY_NS = 3_600 * NS_PER_SECOND
# Shorter histories than a tenth of a window, or of an hour, say no less.
MAX_WIDTH = 10.0


@dataclass(frozen=True, slots=True)
class LimitAdvice:
    """What one limit should be.

    Attributes
    ----------
    limit : Limit
    field : str
        The field of `ResourceQuotaConfig`.
    lower, target, upper : float or int or None
        Below `lower`, more than ten times the accepted share of requests may be denied, or, of a rate, the trace's
        average is not reached; `target` is recommended; above `upper` the limit would not have been felt, with headroom
        and the width that the length of the history deserves. All three are None if nothing can be said.
    burst_field : str
        The field of the burst of a rate; empty for other limits.
    lower_burst, target_burst, upper_burst : int or None
        Of a rate, the bursts that belong to it.
    windows_seen : float
        How often the window fits into the trace.
    extrapolated : bool
        Less than one window was seen; the target is the average rate times the window.
    reason : str
        Where the target comes from.
    """

    limit: Limit
    field: str
    lower: float | None
    target: float | None
    upper: float | None
    burst_field: str
    lower_burst: int | None
    target_burst: int | None
    upper_burst: int | None
    windows_seen: float
    extrapolated: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; the limit by its name in lower case."""
        return {name: getattr(self, name) for name in self.__slots__} | {"limit": self.limit.name.lower()}


@dataclass(frozen=True, slots=True)
class Concurrency:
    """How many requests were open at one time, if none had to wait.

    Attributes
    ----------
    mean : float
        By Little's law: arrivals per second times the mean duration.
    peak : int
        The most that were open at one time.
    p99 : float
        What 99 % of the requests found open, themselves included, at most.
    """

    mean: float
    peak: int
    p99: float

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Estimates:
    """How well requests are estimated, and what to assume if they do not say how much they will generate.

    Attributes
    ----------
    output_p50, output_p95, output_p99 : float
        Percentiles of the output tokens.
    output_max : int
    default_output_tokens : int
        What covers 95 % of the responses.
    reserved, used : int or None
        Tokens that were estimated, and those used by the same requests; None if the trace has no estimates.
    unused_share : float or None
        The part of the reserve that was not used.
    freed_share : float or None
        The part of the reserve that would be free with `default_output_tokens` in place of the estimates; negative if
        they reserve less.
    """

    output_p50: float
    output_p95: float
    output_p99: float
    output_max: int
    default_output_tokens: int
    reserved: int | None
    used: int | None
    unused_share: float | None
    freed_share: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def round_up(value: float, digits: int = 3) -> float:
    """Return the next number with few digits, as a person would write a limit.

    Examples
    --------
    >>> round_up(1234567), round_up(7.1396), round_up(42)
    (1240000, 7.14, 42.0)
    """
    if value <= 0:
        return 0
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    rounded = math.ceil(value / unit - 1e-9) * unit
    return round(rounded) if unit >= 1 else round(rounded, 6)


def round_count(value: float) -> int:
    """Return the next integer with few digits."""
    return math.ceil(round_up(max(value, 0)))


def exceeded_by(values: npt.NDArray[Any], share: float) -> float:
    """Return the smallest of the values that at most this share of them exceed."""
    allowed = min(int(share * len(values)), len(values) - 1)
    place = len(values) - 1 - allowed
    return float(np.partition(values, place)[place])


def concurrency(trace: Trace) -> tuple[Concurrency, Int64Array] | None:
    """Return the concurrency and what each request found open; None if the trace has no durations."""
    if trace.durations_ns is None:
        return None
    durations_ns = np.maximum(trace.durations_ns, 0)
    ends = np.sort(trace.times_ns + durations_ns)
    found = np.arange(1, len(trace) + 1) - np.searchsorted(ends, trace.times_ns, side="right")
    found = np.maximum(found, 1)
    span_s = max(trace.times_ns[-1] - trace.times_ns[0], NS_PER_SECOND) / NS_PER_SECOND
    mean = float(durations_ns.sum() / NS_PER_SECOND / span_s)
    return Concurrency(mean, int(found.max()), float(np.percentile(found, 99))), found


def estimates(trace: Trace) -> Estimates:
    """Return how well the requests of a trace were estimated."""
    p50, p95, p99 = np.percentile(trace.output_tokens, (50, 95, 99)).tolist()
    default = round_count(p95)
    reserved = used = None
    unused = freed = None
    if trace.estimated_tokens is not None:
        known = trace.estimated_tokens >= 0
        reserved = int(trace.estimated_tokens[known].sum())
        used = int(trace.tokens[known].sum())
        if reserved:
            unused = 1 - used / reserved
            better = int(trace.prompt_tokens[known].sum()) + default * int(known.sum())
            freed = 1 - better / reserved
    return Estimates(p50, p95, p99, int(trace.output_tokens.max()), default, reserved, used, unused, freed)


def advise(
    trace: Trace,
    all_charges: Mapping[str, Charges],
    frontiers: Mapping[str, Frontier],
    *,
    headroom: float,
    target_denied: float,
) -> tuple[LimitAdvice, ...]:
    """Return what each limit should be for a trace of one model.

    Parameters
    ----------
    trace : Trace
        At least one request.
    all_charges, frontiers : mapping of str to Charges and of str to Frontier
        By unit.
    headroom : float
        How far above what was needed: 0.15 is 15 %.
    target_denied : float
        The share of requests that may be denied, if none waits, by all limits together.
    """
    span_ns = int(trace.times_ns[-1] - trace.times_ns[0])
    records = [record for record in CATALOGUE.values() if record.window is not None]
    open_found = concurrency(trace)
    seen = [
        record
        for record in records
        if record.is_rate or (record.window is not None and span_ns >= record.window.seconds * NS_PER_SECOND)
    ]
    share = target_denied / (len(seen) + (open_found is not None))
    advice = []
    for record in records:
        charges = all_charges[record.unit]
        if record.is_rate:
            advice.append(_rate(record, charges, frontiers[record.unit], span_ns, headroom, share))
        elif record in seen:
            advice.append(_window(trace, record, charges, span_ns, headroom, share))
        else:
            advice.append(_unseen(trace, record, span_ns, headroom))
    if open_found is not None:
        advice.insert(0, _open(open_found[0], open_found[1], span_ns, headroom, share))
    return tuple(advice)


def _width(span_ns: int, window_ns: int) -> float:
    """How much further a peak may be than the one that was seen: by a half after two windows, or hours, of history."""
    return min(1 + max(window_ns, LEAST_HISTORY_NS) / max(span_ns, 1), MAX_WIDTH)


def _rate(
    record: LimitRecord,
    charges: Charges,
    points: Frontier,
    span_ns: int,
    headroom: float,
    share: float,
) -> LimitAdvice:
    in_second = charges.windows(counted_ns(1))
    knee = points.rates[points.knee]

    def burst(rate: float, accepted: float) -> int:
        need = charges.levels(rate)
        need -= max(rate, 1.0)
        np.maximum(need, in_second - math.ceil(rate), out=need)
        # A millionth is above the rounding of the sums, and below one request or token.
        return max(0, math.ceil(exceeded_by(need, accepted) + 1e-6))

    lower = round_up(points.rates[0])
    target = round_up(knee * (1 + headroom))
    upper = round_up(int(in_second.max()) * (1 + headroom) * _width(span_ns, NS_PER_SECOND))
    needed = burst(target, share)
    unit = record.unit
    return LimitAdvice(
        limit=record.limit,
        field=record.quota_field,
        lower=min(lower, target),
        target=target,
        upper=max(upper, target),
        burst_field=record.burst_field,
        lower_burst=burst(target, min(10 * share, 1.0)),
        target_burst=round_count(needed * (1 + headroom)),
        upper_burst=round_count(max(burst(target, 0.0), needed) * (1 + headroom) * _width(span_ns, NS_PER_SECOND)),
        windows_seen=span_ns / NS_PER_SECOND,
        extrapolated=False,
        reason=(
            f"knee of the frontier: {knee:,.4g} {unit}/s with a burst of {points.bursts[points.knee]:,} refuses none; "
            f"the busiest second held {int(in_second.max()):,}"
        ),
    )


def _window(
    trace: Trace, record: LimitRecord, charges: Charges, span_ns: int, headroom: float, share: float
) -> LimitAdvice:
    assert record.window is not None
    window_ns = record.window.seconds * NS_PER_SECOND
    held = charges.windows(counted_ns(record.window.seconds))
    peak, at = int(held.max()), int(held.argmax())
    needed = exceeded_by(held, share)
    return LimitAdvice(
        limit=record.limit,
        field=record.quota_field,
        lower=round_count(exceeded_by(held, min(10 * share, 1.0))),
        target=round_count(needed * (1 + headroom)),
        upper=round_count(peak * (1 + headroom) * _width(span_ns, window_ns)),
        burst_field="",
        lower_burst=None,
        target_burst=None,
        upper_burst=None,
        windows_seen=span_ns / window_ns,
        extrapolated=False,
        reason=(
            f"the busiest {record.window.name} held {peak:,} {record.unit}, "
            f"{_hours(int(trace.times_ns[at] - trace.times_ns[0]))} after the first request"
        ),
    )


def _unseen(trace: Trace, record: LimitRecord, span_ns: int, headroom: float) -> LimitAdvice:
    """The window is longer than the trace: what its average would make of a whole window."""
    assert record.window is not None
    window_ns = record.window.seconds * NS_PER_SECOND
    total = len(trace) if record.unit == "requests" else int(reserved_at_once(trace).sum())
    windows = span_ns / window_ns
    average = total / max(windows, 1e-12) if span_ns >= 60 * NS_PER_SECOND else None
    target = None if average is None else round_count(max(average, total) * (1 + headroom))
    return LimitAdvice(
        limit=record.limit,
        field=record.quota_field,
        lower=None if target is None else min(round_count(total), target),
        target=target,
        upper=None if average is None else round_count(average * (1 + headroom) * _width(span_ns, window_ns)),
        burst_field="",
        lower_burst=None,
        target_burst=None,
        upper_burst=None,
        windows_seen=windows,
        extrapolated=True,
        reason=(
            f"less than one {record.window.name} was seen ({_hours(span_ns)}): its average over a whole one"
            if target is not None
            else f"less than one {record.window.name} was seen, and less than a minute: nothing can be said"
        ),
    )


def _open(found: Concurrency, at_arrival: Int64Array, span_ns: int, headroom: float, share: float) -> LimitAdvice:
    record = CATALOGUE[Limit.CONCURRENCY]
    return LimitAdvice(
        limit=record.limit,
        field=record.quota_field,
        lower=math.ceil(found.mean),
        target=round_count(exceeded_by(at_arrival, share) * (1 + headroom)),
        upper=round_count(found.peak * (1 + headroom) * _width(span_ns, NS_PER_SECOND)),
        burst_field="",
        lower_burst=None,
        target_burst=None,
        upper_burst=None,
        windows_seen=span_ns / NS_PER_SECOND,
        extrapolated=False,
        reason=f"at most {found.peak:,} requests were open at one time, {found.mean:,.3g} on average (Little's law)",
    )


def fields_of(
    advice: tuple[LimitAdvice, ...], current: ResourceQuotaConfig | None, model_id: str
) -> ResourceQuotaConfig:
    """Return the recommended quota: the targets, and of the current quota what nothing is said about."""
    base = ResourceQuotaConfig.unlimited(model_id) if current is None else current
    changes: dict[str, Any] = {}
    for item in advice:
        if item.target is not None:
            is_rate = CATALOGUE[item.limit].is_rate
            changes[item.field] = float(item.target) if is_rate else int(item.target)
            if item.burst_field:
                changes[item.burst_field] = item.target_burst
    return base.replace(**changes)


def _hours(ns: int) -> str:
    seconds = ns / NS_PER_SECOND
    if seconds < 120:
        return f"{seconds:.3g} s"
    if seconds < 7_200:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3_600:.3g} h" if seconds < 172_800 else f"{seconds / 86_400:.3g} days"
