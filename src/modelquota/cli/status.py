"""What `modelquota status` prints of a manager: a table, the model nearest to a limit first, or JSON."""

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelquota.cli.demo_table import ACTION_STYLES, UsageBar
from modelquota.cli.text import printable, short
from modelquota.limits import Limit
from modelquota.reading import QuotaReader
from modelquota.report import QuotaStats
from modelquota.utilization import LIMITS, Utilization, limits_of, read_utilization

__all__ = ["print_status", "print_status_json", "status_table", "totals_line"]

# From these widths on there is room for bars, and for the percentages of memory and quotas.
BAR_COLUMNS = 80
WIDE_COLUMNS = 132
WIDE = {
    "RAM": Limit.RAM,
    "SSD": Limit.SSD,
    "tok/h": Limit.TOKENS_PER_HOUR,
    "req/h": Limit.REQUESTS_PER_HOUR,
    "tok/day": Limit.TOKENS_PER_DAY,
    "req/day": Limit.REQUESTS_PER_DAY,
}
_BURST_FIELDS = {Limit.REQUESTS_PER_SECOND: "burst_requests", Limit.TOKENS_PER_SECOND: "burst_tokens"}
_RATE_FIELDS = {
    Limit.REQUESTS_PER_SECOND: "max_requests_per_second",
    Limit.TOKENS_PER_SECOND: "max_tokens_per_second",
}
_DENIED_FIELDS = ("rejected_total", "throttled_total", "queued_total")


def print_status(manager: QuotaReader, console: Console) -> float:
    """Print use against limits of all models; return the highest pressure in percent, 0 where there is no model."""
    found = read_utilization(manager)
    if len(found):
        console.print(status_table(found, found.by_pressure().tolist(), width=console.width))
    else:
        console.print("no models")
    console.print(totals_line(manager.get_stats(), manager.enforcement_enabled))
    return float(found.pressure.max(initial=0.0))


def print_status_json(manager: QuotaReader) -> float:
    """Print the same as one JSON object, everything that can be read in it; return the highest pressure in percent."""
    found = read_utilization(manager)
    stats = manager.get_stats()
    document = {
        "enforcing": manager.enforcement_enabled,
        "stats": {name: getattr(stats, name) for name in stats.__dataclass_fields__},
        "models": [_as_dict(found, index) for index in found.by_pressure().tolist()],
    }
    print(json.dumps(document, indent=2, allow_nan=False))
    return float(found.pressure.max(initial=0.0))


def _as_dict(found: Utilization, index: int) -> dict[str, Any]:
    counters = found.counters[index]
    return {
        "model_id": found.quotas[index].model_id,
        "pressure": round(float(found.pressure[index]), 3),
        "nearest_limit": found.nearest[index].name.lower(),
        "percent": {limit.name.lower(): round(float(found.of(limit)[index]), 3) for limit in LIMITS},
        "usage": {name: int(counters[name]) for name in counters.dtype.names if name != "model_id"},
        "quota": found.quotas[index].to_dict(),
    }


def status_table(found: Utilization, indices: Sequence[int], *, width: int) -> Table:
    """A line for each of the models, in the order given; as wide as there is room for."""
    wide = width >= WIDE_COLUMNS
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    # In a narrow terminal the bars are left out and words are cut, not figures: columns that may wrap are narrowed.
    table.add_column("model", max_width=28)
    if width >= BAR_COLUMNS:
        table.add_column("pressure", no_wrap=True, width=10)
    table.add_column("%", justify="right", no_wrap=True)
    table.add_column("nearest limit")
    for heading in WIDE if wide else ():
        table.add_column(f"{heading} %", justify="right", no_wrap=True)
    table.add_column("allowed", justify="right", no_wrap=True)
    table.add_column("denied", justify="right", no_wrap=True)
    pressure, nearest = found.pressure, found.nearest
    for index in indices:
        quota, counters = found.quotas[index], found.counters[index]
        denied = sum(int(counters[field]) for field in _DENIED_FIELDS)
        warned = int(counters["warned_total"])
        table.add_row(
            Text(printable(quota.model_id), "bold", no_wrap=True, overflow="ellipsis"),
            *([UsageBar(pressure[index] / 100)] if width >= BAR_COLUMNS else []),
            Text(f"{pressure[index]:.0f}", _colour(pressure[index])),
            Text(_nearest(found, index, nearest[index]), no_wrap=True, overflow="ellipsis"),
            *(_share(found, index, limit) for limit in (WIDE.values() if wide else ())),
            Text(short(int(counters["allowed_total"])), "green"),
            Text(short(denied), ACTION_STYLES[quota.on_violation])
            if denied or not warned
            else Text(f"{short(warned)} warned", "magenta"),
        )
    return table


def _nearest(found: Utilization, index: int, limit: Limit) -> str:
    """Use and limit in words: `910 of 1000 MB RAM`, `40 of 50 tokens/hour`, `burst: 9 of 10 tokens/second`."""
    if found.pressure[index] == 0:
        return "idle"
    quota = found.quotas[index]
    used, bound = int(found.used(limit)[index]), limits_of(quota)[LIMITS.index(limit)]
    words = f"{limit.unit} {limit.label}" if limit.unit == "MB" else limit.label.replace(" per ", "/")
    burst = _BURST_FIELDS.get(limit)
    if burst is not None and 100 * used < found.pressure[index] * (bound or 1) - 1e-6:
        return f"burst: {short(int(found.counters[f'{burst}_used'][index]))} of {short(getattr(quota, burst))} {words}"
    if burst is not None:
        rate = getattr(quota, _RATE_FIELDS[limit])
        return f"{short(used)} of {f'{rate:g}' if rate < 100 else short(rate)}+{short(getattr(quota, burst))} {words}"
    return f"{short(used)} of {short(bound or 0)} {words}"


def _share(found: Utilization, index: int, limit: Limit) -> Text:
    if limits_of(found.quotas[index])[LIMITS.index(limit)] is None:
        return Text("-", "dim")
    percent = found.of(limit)[index]
    return Text(f"{percent:.0f}", _colour(percent))


def _colour(percent: float) -> str:
    return "green" if percent < 75 else "yellow" if percent < 95 else "red"


def totals_line(stats: QuotaStats, enforcing: bool) -> Text:
    """The totals over all models."""
    denied = stats.rejected_requests + stats.throttled_requests + stats.queued_requests
    waited = stats.allowed_requests + denied - stats.total_checks  # those count twice
    after = f" ({waited:,} of those admitted after a wait)" if waited else ""
    line = Text(
        f"{stats.total_checks:,} checks, {stats.allowed_requests:,} allowed, {denied:,} denied{after}, "
        f"{stats.warned_requests:,} warned",
        "dim",
    )
    return line if enforcing else line.append("   enforcement is off: everything is admitted", "bold red")
