"""The most that a rate admits, as the semantics say it."""

import math
from fractions import Fraction


def ceiling(rate: float, burst: int) -> int:
    """Most in a second."""
    return math.ceil(rate) + burst


def cap(rate: float, burst: int) -> Fraction:
    """Most ahead of the rate."""
    return max(Fraction(rate), Fraction(1)) + burst
