"""Bars and colors that several commands draw."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style

from modelquota.quota.limits import ViolationAction

__all__ = ["ACTION_STYLES", "UsageBar", "bar_text"]

ACTION_STYLES = {
    ViolationAction.REJECT: "red",
    ViolationAction.THROTTLE: "yellow",
    ViolationAction.QUEUE: "cyan",
    ViolationAction.WARN: "magenta",
}
EIGHTHS = " ▏▎▍▌▋▊▉█"


class UsageBar:
    """A bar as wide as its cell, filled to `fraction` (from 1 on: full) in eighths of a character.

    Green up to three quarters, yellow up to 95 percent, then red.
    """

    def __init__(self, fraction: float) -> None:
        self._fraction = min(max(fraction, 0.0), 1.0)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(6, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        text = bar_text(self._fraction, options.max_width, ascii_only=options.ascii_only)
        color = "green" if self._fraction < 0.75 else "yellow" if self._fraction < 0.95 else "red"
        ground = "bright_black" if console.color_system and not options.ascii_only else None
        yield Segment(text, Style(color=color, bgcolor=ground))
        yield Segment.line()


def bar_text(fraction: float, width: int, *, ascii_only: bool) -> str:
    """A bar `width` columns wide, without colors, filled to `fraction` (0 or more; from 1 on: full)."""
    fraction = min(fraction, 1.0)
    if ascii_only:
        return ("#" * round(fraction * width)).ljust(width, ".")
    full, eighths = divmod(round(fraction * width * 8), 8)
    return ("█" * full + (EIGHTHS[eighths] if eighths else "")).ljust(width)
