"""What rolling windows held: the exact peaks of a trace, and percentiles over its whole length."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from modelquota.quota.limits import WINDOWS
from modelquota.tuning.cells import NS_PER_SECOND, Int64Array
from modelquota.tuning.trace import Trace

__all__ = ["KINDS", "LENGTHS", "WindowUse", "Windows", "counted_ns", "window_uses"]

LENGTHS = dict(
    sorted(
        {"10 s": 10, "minute": 60, "month": 2_592_000, **{window.name: window.seconds for window in WINDOWS}}.items(),
        key=lambda window: window[1],
    )
)
"""The windows that are looked at, in seconds: those of the limits, and some more."""

KINDS = ("requests", "input", "cached", "output", "tokens")
"""What is counted in them; `tokens` are those of all kinds."""

# A quota's window keeps the partly expired one of its 60 slots, and each slot may be a nanosecond longer by rounding.
_SLOTS = 60
# Percentiles are over this many moments, evenly spaced.
MOMENTS = 20_001


@dataclass(frozen=True, slots=True)
class WindowUse:
    """How much of one kind a rolling window held.

    Attributes
    ----------
    window : str
        One of `LENGTHS`.
    kind : str
        One of `KINDS`.
    peak : int
        The most in any window, wherever it starts: exact.
    peak_at_ns : int
        When the first such window ends, in ns since the first request.
    p50, p90, p99 : float or None
        Percentiles over 20,001 evenly spaced moments at which a whole window had passed; None if there is none.
    """

    window: str
    kind: str
    peak: int
    peak_at_ns: int
    p50: float | None
    p90: float | None
    p99: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


def counted_ns(seconds: int) -> int:
    """Return the longest time over which a quota's window of this length may count, however its slots lie."""
    return -(-seconds * NS_PER_SECOND * (_SLOTS + 1) // _SLOTS) + _SLOTS + 1


class Windows:
    """Where the windows that end with each of some requests begin; the last length asked for is kept.

    Parameters
    ----------
    times_ns : int64 array
        In order.
    """

    def __init__(self, times_ns: Int64Array) -> None:
        self._times_ns = times_ns
        self._kept_ns = -1
        self._kept: npt.NDArray[np.intp] = np.zeros(0, np.intp)

    @cached_property
    def seconds(self) -> npt.NDArray[np.float64]:
        """The times in seconds."""
        return self._times_ns / NS_PER_SECOND

    def first(self, window_ns: int) -> npt.NDArray[np.intp]:
        """Return the first request of each window, closed at both ends: it holds at least what a quota's does."""
        if window_ns != self._kept_ns:
            self._kept = np.searchsorted(self._times_ns, self._times_ns - window_ns, side="left")
            self._kept_ns = window_ns
        return self._kept

    def sums(self, counts: Int64Array | None, window_ns: int) -> Int64Array:
        """Return what the window that ends with each request held, itself included; None counts requests."""
        first = self.first(window_ns)
        if counts is None:
            return np.arange(1, len(first) + 1) - first
        return _sums(_before(counts), first)


def _before(counts: Int64Array) -> Int64Array:
    before = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=before[1:])
    return before


def _sums(before: Int64Array, first: npt.NDArray[np.intp]) -> Int64Array:
    """Return the sum of each request's counts and of those before it from `first` on, of what is `before` each."""
    sums: Int64Array = before[first]
    return np.subtract(before[1:], sums, out=sums)


def counts_of(trace: Trace) -> Mapping[str, Int64Array | None]:
    """Return what each request counts in each kind; None is one."""
    return {
        "requests": None,
        "input": trace.input_tokens,
        "cached": trace.cached_tokens,
        "output": trace.output_tokens,
        "tokens": trace.tokens,
    }


def window_uses(trace: Trace) -> Iterator[WindowUse]:
    """Yield the use of every window that is not much longer than the trace, by window and then by kind."""
    times_ns = trace.times_ns
    if not len(times_ns):
        return
    span_ns = int(times_ns[-1] - times_ns[0])
    for window, seconds in LENGTHS.items():
        window_ns = seconds * NS_PER_SECOND
        if span_ns < window_ns and window not in ("second", "10 s", "minute"):
            continue
        first = np.searchsorted(times_ns, times_ns - window_ns, side="right")
        moments = None
        if span_ns >= window_ns:
            ends = np.linspace(int(times_ns[0]) + window_ns, int(times_ns[-1]), MOMENTS).astype(np.int64)
            moments = [np.searchsorted(times_ns, at, side="right") for at in (ends, ends - window_ns)]
        for kind, counts in counts_of(trace).items():  # summed again for each window: all at once would take more room
            held = np.arange(len(times_ns) + 1) if counts is None else _before(counts)
            sums = _sums(held, first)
            at = int(sums.argmax())
            shares: list[float | None] = [None, None, None]
            if moments is not None:
                shares = np.percentile(held[moments[0]] - held[moments[1]], (50, 90, 99)).tolist()
            yield WindowUse(window, kind, int(sums[at]), int(times_ns[at] - times_ns[0]), *shares)
