"""What a trace's requests are charged, and when: at their arrival, and if they reserve more or less, at their end.

A request that reserves more than it uses holds the rest from its admission to its end. One that uses more is charged
the rest at its end. Both are as `Grant.settle` does it.
"""

from fractions import Fraction
from functools import cached_property

import numpy as np
import numpy.typing as npt

from modelquota.tuning.cells import NS_PER_SECOND, Int64Array
from modelquota.tuning.trace import Trace
from modelquota.tuning.windows import Windows

__all__ = ["Charges", "charges_of", "reserved_at_once"]

FloatArray = npt.NDArray[np.float64]


class Charges:
    """Charges in order of time, if no request is denied.

    Parameters
    ----------
    times_ns : int64 array
        When each charge is made, in order.
    counts : int64 array or None
        How much; None for one each.
    requests : integer array, optional
        Which of the charges are made by a request that arrives; by default all.
    held : int64 array, optional
        Of each request: what all that are open when it arrives, itself included, hold beyond what is in `counts`.
    windows : Windows, optional
        Those of the same times, if they are used elsewhere too.
    """

    def __init__(
        self,
        times_ns: Int64Array,
        counts: Int64Array | None,
        requests: npt.NDArray[np.intp] | None = None,
        held: Int64Array | None = None,
        windows: Windows | None = None,
    ) -> None:
        self._windows = Windows(times_ns) if windows is None else windows
        self.times_ns = times_ns
        self.counts = counts
        self._requests: npt.NDArray[np.intp] | slice = slice(None) if requests is None else requests
        self._held = 0 if held is None else held

    @property
    def total(self) -> int:
        """All charges together."""
        return len(self.times_ns) if self.counts is None else int(self.counts.sum())

    @property
    def _before(self) -> FloatArray:
        """What is charged before each charge; for one each it is made again each time, to hold less."""
        return np.arange(len(self.times_ns), dtype=np.float64) if self.counts is None else self._sum_before

    @cached_property
    def _sum_before(self) -> FloatArray:
        assert self.counts is not None
        before = np.cumsum(self.counts, dtype=np.int64)
        before -= self.counts
        return before.astype(np.float64)

    def windows(self, window_ns: int) -> Int64Array:
        """Return what the window that ends with each request counts, itself included; closed at both ends."""
        held = self._windows.sums(self.counts, window_ns)[self._requests]
        return held if isinstance(self._held, int) else held + self._held

    def levels(self, rate: float) -> FloatArray:
        """Return the level of a bucket that drains at `rate` per second right after each request."""
        levels: FloatArray = self._windows.seconds * -rate  # in place from here on: new memory costs more than the sums
        levels += self._before
        levels -= np.minimum.accumulate(levels)
        levels += 1 if self.counts is None else self.counts
        if not isinstance(self._requests, slice):
            levels = levels[self._requests]
        if not isinstance(self._held, int):
            levels += self._held
        return levels

    def highest_level(self, rate: float) -> Fraction:
        """Return the highest of these levels: found in floating point, and then computed exactly."""
        request = int(self.levels(rate).argmax())
        last = request if isinstance(self._requests, slice) else int(self._requests[request])
        before = self._before
        first = int((before[: last + 1] - rate * self._windows.seconds[: last + 1]).argmin())
        own = 1 if self.counts is None else int(self.counts[last])
        arrived = int(before[last]) - int(before[first]) + own
        held = self._held if isinstance(self._held, int) else int(self._held[request])
        return arrived + held - Fraction(rate) * int(self.times_ns[last] - self.times_ns[first]) / NS_PER_SECOND


def reserved_at_once(trace: Trace) -> Int64Array:
    """Return what each request is charged at most at one time: what it reserves, or uses."""
    if trace.durations_ns is None or trace.estimated_tokens is None:
        return trace.tokens
    return np.maximum(trace.tokens, trace.estimated_tokens)


def charges_of(trace: Trace) -> dict[str, Charges]:
    """Return the charges of requests and of tokens, as a replay makes them, by unit.

    What is reserved counts if the trace has durations too.
    """
    windows = Windows(trace.times_ns)
    return {"requests": Charges(trace.times_ns, None, windows=windows), "tokens": _token_charges(trace, windows)}


def _token_charges(trace: Trace, windows: Windows) -> Charges:
    if trace.durations_ns is None or trace.estimated_tokens is None:
        return Charges(trace.times_ns, trace.tokens, windows=windows)
    used = trace.tokens
    reserved = np.where(trace.estimated_tokens < 0, used, trace.estimated_tokens)
    ends_ns = trace.times_ns + np.maximum(trace.durations_ns, 0)
    order = np.argsort(ends_ns, kind="stable")
    unused = np.maximum(reserved - used, 0)
    given_back = np.concatenate((np.zeros(1, np.int64), np.cumsum(unused[order])))
    # What ends at the moment of an arrival may come after it.
    ended = np.searchsorted(ends_ns[order], trace.times_ns, side="left")
    held = np.cumsum(unused) - given_back[ended]
    late = order[used[order] > reserved[order]]
    if not len(late):
        return Charges(trace.times_ns, np.minimum(used, reserved), None, held, windows)
    # Likewise, what ends at the moment of an arrival may come before it.
    times_ns = np.concatenate((ends_ns[late], trace.times_ns))
    counts = np.concatenate(((used - reserved)[late], np.minimum(used, reserved)))
    merged = np.argsort(times_ns, kind="stable")
    requests = np.flatnonzero(merged >= len(late))
    return Charges(times_ns[merged], counts[merged], requests, held)
