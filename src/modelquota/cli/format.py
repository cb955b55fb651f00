"""Formatting of numbers, durations and names, shared by all commands."""

from modelquota.quota.limits import LimitRecord

__all__ = ["duration", "escaped", "narrow_heading", "printable", "short"]


def duration(ms: float) -> str:
    """Format a duration in its two largest units: `120 ms`, `1.2 s`, `59 min 48 s`, `23 h 10 min`."""
    if ms < 1_000:
        return f"{ms:.0f} ms"
    if ms < 59_950:
        return f"{ms / 1_000:.1f} s"
    seconds = round(ms / 1_000)
    if seconds < 7_200:
        return f"{seconds // 60} min {seconds % 60:02} s"
    minutes = round(ms / 60_000)
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes / 1_440:.0f} days"


def short(count: float) -> str:
    """Format a count in at most five characters: `950`, `1.2k`, `40k`, `41.5k`, `415k`."""
    value = float(count)
    for unit in ("", "k", "M", "G", "T"):
        if value < 999.5:
            digits = f"{value:.1f}".removesuffix(".0") if unit and value < 99.95 else f"{value:.0f}"
            return digits + unit
        value /= 1_000
    return f"{value:.0f}P"


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
