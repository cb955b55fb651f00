"""Durations in words, for messages."""


def duration(ms: float) -> str:
    """Format a duration in its two largest units: `120 ms`, `1.2 s`, `59 min 48 s`, `23 h 10 min`.

    Examples
    --------
    >>> duration(758), duration(1_200), duration(3_658_000)
    ('758 ms', '1.2 s', '60 min 58 s')
    """
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
