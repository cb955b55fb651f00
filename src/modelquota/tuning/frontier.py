"""The rate-burst frontier: for each rate the smallest burst with which no request is refused.

A rate with a burst is a leaky bucket. The smallest burst for a rate is the largest excess of arrivals over what the
rate drains, the arrival curve of network calculus (R. Cruz, "A calculus for network delay", IEEE Transactions on
Information Theory 37, 1991); one pass over the requests computes it for one rate, by Lindley's recursion.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from modelquota.tuning.cells import NS_PER_SECOND
from modelquota.tuning.charges import Charges, FloatArray
from modelquota.tuning.windows import counted_ns

__all__ = ["Frontier", "frontier"]

POINTS = 24


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
        For each rate the smallest burst that refuses no request, at any alignment of the windows to the clock.
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


def frontier(charges: Charges, unit: str, points: int = POINTS) -> Frontier:
    """Return the frontier of some charges.

    Parameters
    ----------
    charges : Charges
        At least one.
    unit : str
        What is charged: ``"requests"`` or ``"tokens"``.
    points : int
        How many rates are looked at.
    """
    second = int(charges.windows(counted_ns(1)).max())
    span = float(charges.times_ns[-1] - charges.times_ns[0]) / NS_PER_SECOND
    average = charges.total / max(span, 1.0)
    spaced = np.geomspace(max(average, 1e-3), max(float(second), average, 1e-3), points)
    rates = np.unique([float(f"{rate:.6g}") for rate in spaced.tolist()])
    bursts = [
        max(0, math.ceil(charges.highest_level(rate) - Fraction(max(rate, 1.0))), second - math.ceil(rate))
        for rate in rates.tolist()
    ]
    return Frontier(unit, tuple(rates.tolist()), tuple(bursts), _knee(rates, np.array(bursts, np.float64)))


def _knee(rates: FloatArray, bursts: FloatArray) -> int:
    width, height = rates[-1] - rates[0], bursts.max() - bursts.min()
    if not width or not height:
        return 0
    return int(np.argmin((rates - rates[0]) / width + (bursts - bursts.min()) / height))
