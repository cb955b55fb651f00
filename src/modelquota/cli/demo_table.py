"""The table of `modelquota demo`: usage against limits, and what became of the requests."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from modelquota.cli.text import duration, short
from modelquota.cli.traffic import Tally, Traffic
from modelquota.config import ResourceQuotaConfig
from modelquota.limits import ViolationAction
from modelquota.manager import ResourceQuotaManager
from modelquota.report import ResourceUsage

__all__ = ["UsageBar", "demo_table"]

# From this width on there is room for a column of its own for the waits.
WIDE_COLUMNS = 100
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
        width = options.max_width
        colour = "green" if self._fraction < 0.75 else "yellow" if self._fraction < 0.95 else "red"
        if options.ascii_only:
            text = ("#" * round(self._fraction * width)).ljust(width, ".")
            yield Segment(text, Style(color=colour))
        else:
            full, eighths = divmod(round(self._fraction * width * 8), 8)
            text = ("█" * full + (EIGHTHS[eighths] if eighths else "")).ljust(width)
            yield Segment(text, Style(color=colour, bgcolor="bright_black" if console.color_system else None))
        yield Segment.line()


def demo_table(
    manager: ResourceQuotaManager, models: Sequence[Traffic], tallies: Mapping[str, Tally], *, width: int
) -> Table:
    """Three lines for each model; from 100 columns on, with its waits beside its requests."""
    wide = width >= WIDE_COLUMNS
    table = Table(box=None, expand=True, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("model", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    table.add_column("used", ratio=1)
    table.add_column("of rate + burst", no_wrap=True, min_width=15)
    table.add_column("requests", no_wrap=True, min_width=24)
    if wide:
        table.add_column("waits", no_wrap=True, min_width=24)
    for traffic in models:
        quota = traffic.quota
        usage = manager.get_usage(quota.model_id)
        if usage is None:
            continue
        tally = tallies[quota.model_id]
        names = [Text(quota.model_id, "bold"), Text(quota.on_violation, ACTION_STYLES[quota.on_violation]), Text()]
        requests, waits = _requests(quota, tally), _waits(quota, tally)
        if not wide and waits[0]:
            requests[2] = waits[0]
        if table.row_count:
            table.add_row()
        for name, limit, request, waited in zip(names, _limits(quota, usage), requests, waits, strict=True):
            table.add_row(name, *limit, request, *([waited] if wide else []))
    return table


def _limits(quota: ResourceQuotaConfig, usage: ResourceUsage) -> list[tuple[Text, UsageBar, Text]]:
    """Name, bar and numbers of the three limits that the demo's quotas set."""
    return [
        _rate(
            "requests/s",
            usage.requests_this_second,
            quota.max_requests_per_second,
            quota.burst_requests,
            usage.burst_requests_used,
        ),
        _rate(
            "tokens/s",
            usage.tokens_this_second,
            quota.max_tokens_per_second,
            quota.burst_tokens,
            usage.burst_tokens_used,
        ),
        _line(
            "tokens/hour",
            usage.tokens_this_hour / max(quota.max_tokens_per_hour or 0, 1),
            f"{short(usage.tokens_this_hour)} of {short(quota.max_tokens_per_hour or 0)}",
        ),
    ]


def _rate(name: str, used: int, rate: float | None, burst: int, burst_used: int) -> tuple[Text, UsageBar, Text]:
    """A rate is exhausted by what the last second admitted, or by a burst not yet repaid, whichever is nearer."""
    base = max(rate or 0.0, 1.0)
    second = used / max(math.ceil(rate or 0.0) + burst, 1)
    level = (base + burst_used) / (base + burst) if burst_used else 0.0
    return _line(name, max(second, level), f"{short(used)} of {short(rate or 0.0)}+{short(burst)}")


def _line(name: str, fraction: float, numbers: str) -> tuple[Text, UsageBar, Text]:
    return Text(name, "dim"), UsageBar(fraction), Text(numbers)


def _requests(quota: ResourceQuotaConfig, tally: Tally) -> list[Text]:
    if quota.on_violation is ViolationAction.WARN:
        refused = Text(f"{tally.warned:,} of them over a limit", "magenta" if tally.warned else "dim")
    else:
        refused = Text(f"{tally.denied:,} denied", "red" if tally.denied else "dim")
        if quota.on_violation is not ViolationAction.REJECT:
            refused.append(f", {tally.waiting:,} waiting", "yellow" if tally.waiting else "dim")
    return [Text(f"{tally.admitted:,} admitted", "green"), refused, Text(f"{tally.sent:,} sent", "dim")]


def _waits(quota: ResourceQuotaConfig, tally: Tally) -> list[Text]:
    """What the last denial said, and how long those waited that came through."""
    told, waited, longest = Text(), Text(style="dim"), Text(style="dim")
    if tally.retry_after_ms is not None and quota.on_violation is not ViolationAction.WARN:
        told.append(f"retry in {duration(tally.retry_after_ms)}")
    if tally.waits_ms:
        waited.append(f"{len(tally.waits_ms):,} waited {duration(median(tally.waits_ms))}")
        longest.append(f"and up to {duration(max(tally.waits_ms))}")
    return [told, waited, longest]
