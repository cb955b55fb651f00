"""The rate-burst frontier: for each rate the smallest burst with which nobody is refused.

A rate with a burst is a leaky bucket. The smallest burst for a rate is the largest excess of arrivals over what the
rate drains, the arrival curve of network calculus (R. Cruz, "A calculus for network delay", IEEE Transactions on
Information Theory 37, 1991); one pass over the requests computes it for one rate, by Lindley's recursion.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from modelquota.tuning.cells import NS_PER_SECOND, Int64Array
from modelquota.tuning.windows import counted_ns, rolling_sums

__all__ = ["Frontier", "frontier", "offered_levels"]

POINTS = 24

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Frontier:
    """The smallest burst for each of some rates.

    Attributes
    ----------
    unit : str
        ``"requests"`` or ``"tokens"``.
    rates : tuple of float
        Per second, from the average of the trace up to its busiest second.
    bursts : tuple of int
        For each rate the smallest burst that refuses nobody, at any alignment of the windows to the clock.
    knee : int
        Index of the recommended point: the one furthest below the line from the first to the last, both axes scaled to
        the unit square (Satopää et al., "Finding a kneedle in a haystack", ICDCS workshops 2011).
    """

    unit: str
    rates: tuple[float, ...]
    bursts: tuple[int, ...]
    knee: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {"unit": self.unit, "rates": list(self.rates), "bursts": list(self.bursts), "knee": self.knee}


def offered_levels(seconds: FloatArray, before: FloatArray, costs: FloatArray, rate: float) -> FloatArray:
    """Return the level of a bucket that drains at `rate` right after each request, if none is refused.

    Parameters
    ----------
    seconds : float64 array
        When each request came, in order.
    before : float64 array
        What all requests before it cost.
    costs : float64 array
        What each costs.
    rate : float
        Per second.
    """
    excess = before - rate * seconds
    levels: FloatArray = excess - np.minimum.accumulate(excess) + costs
    return levels


def _highest_level(
    times_ns: Int64Array, seconds: FloatArray, before: FloatArray, costs: FloatArray, rate: float
) -> Fraction:
    """Return the highest of the offered levels: found in floating point, and then computed exactly."""
    excess = before - rate * seconds
    last = int((excess - np.minimum.accumulate(excess) + costs).argmax())
    first = int(excess[: last + 1].argmin())
    arrived = int(before[last]) - int(before[first]) + int(costs[last])
    return arrived - Fraction(rate) * int(times_ns[last] - times_ns[first]) / NS_PER_SECOND


def frontier(times_ns: Int64Array, counts: Int64Array | None, unit: str, points: int = POINTS) -> Frontier:
    """Return the frontier of a trace; `counts` is what each request costs, None for one each."""
    seconds = times_ns / NS_PER_SECOND
    costs = np.ones(len(times_ns)) if counts is None else counts.astype(np.float64)
    before = np.cumsum(costs) - costs
    second = int(rolling_sums(times_ns, counts, counted_ns(1)).max())
    span = float(seconds[-1] - seconds[0])
    average = float(costs.sum()) / max(span, 1.0)
    spaced = np.geomspace(max(average, 1e-3), max(float(second), average, 1e-3), points)
    rates = np.unique([float(f"{rate:.6g}") for rate in spaced.tolist()])
    bursts = [
        max(
            0,
            math.ceil(_highest_level(times_ns, seconds, before, costs, rate) - Fraction(max(rate, 1.0))),
            second - math.ceil(rate),
        )
        for rate in rates.tolist()
    ]
    return Frontier(unit, tuple(rates.tolist()), tuple(bursts), _knee(rates, np.array(bursts, np.float64)))


def _knee(rates: FloatArray, bursts: FloatArray) -> int:
    width, height = rates[-1] - rates[0], bursts.max() - bursts.min()
    if not width or not height:
        return 0
    return int(np.argmin((rates - rates[0]) / width + (bursts - bursts.min()) / height))
