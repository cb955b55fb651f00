"""The table of `modelquota demo`: usage against limits, and what became of the requests."""

from collections.abc import Mapping, Sequence
from statistics import median

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from modelquota.cli.bars import ACTION_STYLES, UsageBar
from modelquota.cli.format import duration, narrow_heading, short
from modelquota.demo.traffic import SHOWN_LIMITS, Tally, Traffic
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, ViolationAction
from modelquota.reading.report import ResourceUsage

__all__ = ["LINES_OF_A_MODEL", "demo_table"]

# From these widths on there is room for limits beside the requests, for bars, and for a column of the waits.
LIMIT_COLUMNS = 60
BAR_COLUMNS = 80
WIDE_COLUMNS = 100
LINES_OF_A_MODEL = 3


def demo_table(
    manager: ResourceQuotaManager,
    models: Sequence[Traffic],
    tallies: Mapping[str, Tally],
    *,
    width: int,
    spaced: bool = True,
) -> Table:
    """Three lines for each model, with an empty one between them if `spaced`; as wide as there is room for.

    From 100 columns on, waits are beside the requests.
    """
    limits, bars, wide = width >= LIMIT_COLUMNS, width >= BAR_COLUMNS, width >= WIDE_COLUMNS
    table = Table(box=None, expand=bars, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    # If that is not enough, words are cut, not numbers: columns that may wrap are narrowed.
    table.add_column("model")
    if limits:
        table.add_column("limit")
    if bars:
        table.add_column("used", ratio=1)
    if limits:
        table.add_column("of rate + burst", no_wrap=True, min_width=16)
    table.add_column("requests", no_wrap=True, min_width=24)
    if wide:
        table.add_column("waits", no_wrap=True, min_width=24)
    for traffic in models:
        quota = traffic.quota
        usage = manager.get_usage(quota.model_id)
        if usage is None:
            continue
        tally = tallies[quota.model_id]
        names = [_word(quota.model_id, "bold"), _word(quota.on_violation, ACTION_STYLES[quota.on_violation]), Text()]
        requests, waits = _requests(quota, tally), _waits(quota, tally)
        if not wide and waits[0]:
            requests[2] = waits[0]
        if table.row_count and spaced:
            table.add_row()
        for name, limit, request, waited in zip(names, _limits(quota, usage, bars), requests, waits, strict=True):
            table.add_row(name, *(limit if limits else []), request, *([waited] if wide else []))
    return table


def _word(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _limits(quota: ResourceQuotaConfig, usage: ResourceUsage, bars: bool) -> list[list[RenderableType]]:
    """Name, bar and numbers of each limit that the demo's quotas set; without bars the names are short too."""
    lines: list[list[RenderableType]] = []
    for limit in map(CATALOGUE.__getitem__, SHOWN_LIMITS):
        used, most = sum(getattr(usage, field) for field in limit.usage_fields), getattr(quota, limit.quota_field) or 0
        numbers = f"{short(used)} of {short(most)}"
        if limit.is_rate:
            numbers += f"+{short(getattr(quota, limit.burst_field))}"
        name = limit.heading if limit.is_rate else limit.label.replace(" per ", "/")
        bar = [UsageBar(usage.percent[limit.limit] / 100)] if bars else []
        lines.append([_word(name if bars else narrow_heading(limit), "dim"), *bar, Text(numbers)])
    return lines


def _requests(quota: ResourceQuotaConfig, tally: Tally) -> list[Text]:
    if quota.on_violation is ViolationAction.WARN:
        refused = Text(f"{tally.warned:,} with a warning", "magenta" if tally.warned else "dim")
    else:
        refused = Text(f"{tally.denied:,} denied", "red" if tally.denied else "dim")
        if quota.on_violation is not ViolationAction.REJECT:
            refused.append(f", {tally.waiting:,} waiting", "yellow" if tally.waiting else "dim")
    return [Text(f"{tally.admitted:,} admitted", "green"), refused, Text(f"{tally.sent:,} sent", "dim")]


def _waits(quota: ResourceQuotaConfig, tally: Tally) -> list[Text]:
    """The time to retry after the last denial, and how long the admitted requests waited."""
    told, waited, longest = Text(), Text(style="dim"), Text(style="dim")
    if tally.retry_after_ms is not None and quota.on_violation is not ViolationAction.WARN:
        told.append(f"retry in {duration(tally.retry_after_ms)}")
    if tally.waits_ms:
        waited.append(f"{len(tally.waits_ms):,} waited {duration(median(tally.waits_ms))}")
        longest.append(f"and up to {duration(max(tally.waits_ms))}")
    return [told, waited, longest]
