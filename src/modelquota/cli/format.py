"""Formatting of numbers, durations and names, shared by all commands."""

from modelquota.protocols.durations import duration
from modelquota.quota.limits import LimitRecord

__all__ = ["counted", "duration", "escaped", "narrow_heading", "printable", "short"]


def short(count: float) -> str:
    """Format a count in at most five characters: `950`, `1.2k`, `40k`, `41.5k`, `415k`."""
    value = float(count)
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5:
            digits = f"{value:.1f}".removesuffix(".0") if unit and value < 99.95 else f"{value:.0f}"
            return digits + unit
        value /= 1_000
    return f"{value:.0f}P"


def counted(count: int, noun: str) -> str:
    """Return a count with what is counted: `1 model`, `1,200 models`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def narrow_heading(limit: LimitRecord) -> str:
    """Return the shortest heading of a limit in a window: `tok/h`."""
    unit, _, window = limit.heading.partition("/")
    return f"{unit[:3]}/{window}"


def printable(name: str) -> str:
    """Return a model id or path with control characters replaced, which a terminal would obey."""
    return name if name.isprintable() else "".join(letter if letter.isprintable() else "?" for letter in name)


def escaped(name: str) -> str:
    """The same, but with Python's escapes, so that different names stay different."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
