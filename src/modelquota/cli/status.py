"""The output of `modelquota status`: a table, with the model nearest to a limit first, or JSON."""

import json
from collections.abc import Iterator, Sequence
from json.encoder import encode_basestring_ascii as encode

import numpy as np
from rich.console import Console
from rich.text import Text

from modelquota.cli.bars import ACTION_STYLES, bar_text
from modelquota.cli.format import narrow_heading, printable, short
from modelquota.cli.lines import Column, Lines
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, DENYING, dollars
from modelquota.reading.counting import denied
from modelquota.reading.reader import QuotaReader
from modelquota.reading.report import QuotaStats, shown_under_models
from modelquota.reading.utilization import LIMITS, Utilization, limits_of, read_utilization

__all__ = ["print_status", "print_status_json", "status_table", "totals_line"]

BAR_COLUMNS = 80
"""The width from which on there is room for bars."""
_BAR_WIDTH = 10
_WRITTEN_AT_ONCE = 256
WIDE = {
    limit.label if limit.window is None else narrow_heading(limit): limit.limit
    for limit in DENYING
    if limit.unit == "MB" or (limit.window is not None and not limit.is_rate)
}
WIDE_COLUMNS = 78 + sum(len(f"  {heading} %") for heading in WIDE)
"""The width from which on there is room for the percentages of memory and of the longer windows, too."""


def print_status(manager: QuotaReader, console: Console) -> float:
    """Print use against limits of all models; return the highest pressure of those that deny, in percent, or 0."""
    found = read_utilization(manager)
    if len(found):
        table = status_table(found, found.by_family(), console=console)
        if console.color_system is None:
            print("\n".join(table.texts(console.width)), file=console.file)
        else:
            console.print(table)
    else:
        console.print("no models")
    console.print(totals_line(manager.get_stats(), manager.enforcement_enabled))
    return found.highest


def print_status_json(manager: QuotaReader) -> float:
    """Print all values as one JSON object; return the same as `print_status`.

    Each model is a line, and lines are written in parts as they are made: a reader may stop when it has what it needs.
    """
    found = read_utilization(manager)
    stats = manager.get_stats()
    document = {
        "enforcing": manager.enforcement_enabled,
        "pressure": round(found.highest, 3),
        "stats": {name: getattr(stats, name) for name in stats.__dataclass_fields__},
    }
    print(json.dumps(document, indent=2, allow_nan=False).removesuffix("\n}"), end=',\n  "models": [')
    separator = "\n    "
    for lines in _models_as_json(found):
        print(separator + ",\n    ".join(lines), end="")
        separator = ",\n    "
    print("\n  ]\n}")
    return found.highest


def _models_as_json(found: Utilization) -> Iterator[list[str]]:
    # Parts that are the same for many models are encoded once; encoding all at once would take longer than the rest.
    order = found.by_pressure()
    names = [name for name in found.counters.dtype.names or () if name != "model_id"]
    limits = [limit.name.lower() for limit in LIMITS]
    usage = "{" + ", ".join(f'"{name}": %s' for name in names) + "}"
    percents = "{" + ", ".join(f'"{name}": %r' for name in limits) + "}"
    quotas = []
    for kind in found.quotas.kinds:
        fields = kind.to_dict()
        del fields["model_id"]
        quotas.append(json.dumps(fields, allow_nan=False).removeprefix("{"))
    refused = np.maximum(denied(found.counters), 0)
    for start in range(0, len(order), _WRITTEN_AT_ONCE):
        part = order[start : start + _WRITTEN_AT_ONCE]
        lines = []
        for (model_id, *counts), percent, pressure, column, denies, denials, kind in zip(
            found.counters[part].tolist(),
            found.percent[part].round(3).tolist(),
            found.pressure[part].round(3).tolist(),
            found.nearest_column[part].tolist(),
            found.denies[part].tolist(),
            refused[part].tolist(),
            found.quotas.kind_of[part].tolist(),
            strict=True,
        ):
            name = encode(model_id)
            lines.append(
                f'{{"model_id": {name}, "pressure": {pressure!r}, "denies": {"true" if denies else "false"}, '
                f'"nearest_limit": "{limits[column]}", "percent": {percents % tuple(percent)}, '
                f'"denied": {denials}, "usage": {usage % tuple(["null" if count < 0 else count for count in counts])}, '
                f'"quota": {{"model_id": {name}, {quotas[kind]}}}'
            )
        yield lines


def status_table(found: Utilization, indices: Sequence[int], *, console: Console) -> Lines:
    """A line for each of the models, in the order given; as wide as the console has room for."""
    width, ascii_only = console.width, console.options.ascii_only  # each asks the terminal
    shown = np.array(indices, np.intp)
    counters = found.counters[shown]
    kinds, kind_of = found.quotas.kinds, found.quotas.kind_of[shown].tolist()
    bounds = [limits_of(kind) for kind in kinds]
    pressure, percents = found.pressure[shown].tolist(), found.percent[shown]
    warned, refused = counters["warned_total"].tolist(), denied(counters).tolist()
    columns = [
        Column(
            "model",
            shown_under_models(list(map(printable, counters["model_id"].tolist()))),
            lambda row: "bold",
            cut=True,
            most=28,
        )
    ]
    if width >= BAR_COLUMNS:
        bars = [bar_text(percent / 100, _BAR_WIDTH, ascii_only=ascii_only) for percent in pressure]
        ground = "" if ascii_only else " on bright_black"
        columns.append(Column("pressure", bars, lambda row: _color(pressure[row]) + ground))
    columns += [
        Column("%", [f"{percent:.0f}" for percent in pressure], lambda row: _color(pressure[row]), right=True),
        Column(
            "nearest limit",
            [
                _nearest(found, index, kinds[kind], bounds[kind]) if percent else "idle"
                for index, percent, kind in zip(indices, pressure, kind_of, strict=True)
            ],
            cut=True,
        ),
    ]
    for heading, limit in WIDE.items() if width >= WIDE_COLUMNS else ():
        column = LIMITS.index(limit)
        has_limit = [bound[column] is not None for bound in bounds]
        columns.append(_share(heading, percents[:, column].tolist(), [has_limit[kind] for kind in kind_of]))
    return Lines(
        [
            *columns,
            Column("allowed", list(map(short, counters["allowed_total"].tolist())), lambda row: "green", right=True),
            Column(
                "denied",
                [
                    f"{short(warnings)} warned" if warnings and count <= 0 else short(max(count, 0))
                    for warnings, count in zip(warned, refused, strict=True)
                ],
                lambda row: "magenta" if warned[row] and refused[row] <= 0 else _action_style(kinds[kind_of[row]]),
                right=True,
            ),
        ]
    )


def _share(heading: str, percents: list[float], limited: list[bool]) -> Column:
    return Column(
        f"{heading} %",
        [f"{percent:.0f}" if has_limit else "-" for percent, has_limit in zip(percents, limited, strict=True)],
        lambda row: _color(percents[row]) if limited[row] else "dim",
        right=True,
    )


def _action_style(quota: ResourceQuotaConfig) -> str:
    return ACTION_STYLES[quota.on_violation]


def _nearest(found: Utilization, index: int, quota: ResourceQuotaConfig, limits: Sequence[int | None]) -> str:
    """Use and limit in words: `910 of 1000 MB RAM`, `40 of 50 tokens/hour`, `burst: 9 of 10 tokens/second`."""
    column = int(found.nearest_column[index])
    limit, used, bound = CATALOGUE[LIMITS[column]], int(found.uses[index, column]), limits[column] or 0
    words = f"{limit.unit} {limit.label}" if limit.unit == "MB" else limit.label.replace(" per ", "/")
    if quota.unit == "usd" and limit.unit == "tokens" and not limit.is_rate:
        return f"{dollars(used)} of {dollars(bound)} / {limit.label.removeprefix('tokens per ')}"
    if not limit.is_rate:
        return f"{short(used)} of {short(bound)} {words}"
    burst, ahead = getattr(quota, limit.burst_field), int(found.counters[limit.ahead_field][index])
    if ahead and 100 * used < found.pressure[index] * (bound or 1) - 1e-6:
        return f"burst: {short(ahead)} of {short(burst)} {words}"
    rate = getattr(quota, limit.quota_field)
    return f"{short(used)} of {f'{rate:g}' if rate < 100 else short(rate)}+{short(burst)} {words}"


def _color(percent: float) -> str:
    return "green" if percent < 75 else "yellow" if percent < 95 else "red"


def totals_line(stats: QuotaStats, enforcing: bool) -> Text:
    """Return the totals over all models as one line."""
    after = f" ({stats.waited_requests:,} after a wait)" if stats.waited_requests else ""
    waiting = stats.total_checks - stats.allowed_requests - stats.denied_requests
    line = Text(
        f"{stats.total_checks:,} checks, {stats.allowed_requests:,} allowed{after}, {stats.denied_requests:,} denied, "
        + (f"{waiting:,} waiting, " if waiting > 0 else "")
        + f"{stats.warned_requests:,} warned",
        "dim",
    )
    return line if enforcing else line.append("   enforcement is off: everything is admitted", "bold red")
