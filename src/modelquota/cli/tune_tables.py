"""The tables of `modelquota tune`."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modelquota.cli.format import duration, printable, short
from modelquota.quota.limits import CATALOGUE
from modelquota.tuning.capacity import Capacity
from modelquota.tuning.tuned import ModelTuning, Scenario, TuneReport
from modelquota.tuning.users import UserTuning
from modelquota.tuning.windows import KINDS, LENGTHS

__all__ = ["print_tuning"]

NS_PER_MS = 1_000_000
USERS_SHOWN = 10
POINTS_SHOWN = 6


def print_tuning(report: TuneReport, console: Console) -> None:
    """Print the report for people."""
    console.print(Text(printable(report.trace), "bold"), soft_wrap=True)
    console.print(
        Text(
            f"{report.requests:,} requests in {duration(report.duration_ns / NS_PER_MS)}; "
            f"headroom {report.headroom:.0%}, at most {report.target_denied:.2%} denied"
        ),
        soft_wrap=True,
    )
    for warning in report.warnings:
        console.print(Text(f"beware: {printable(warning)}", "yellow"), soft_wrap=True)
    for model in report.models:
        console.print()
        console.print(Text(printable(model.model_id), "bold cyan"), soft_wrap=True)
        for table in (_windows(model), _frontier(model), _limits(model), _scenarios(model)):
            console.print(Padding(table, (0, 0, 1, 2), expand=False))
        for line in _remarks(model):
            console.print(Padding(Text(line), (0, 0, 0, 2)))
    if report.users is not None:
        console.print()
        console.print(_users(report.users))
    if report.capacity is not None:
        console.print()
        _print_capacity(report, report.capacity, console)


def _plain_table(first: str, *headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _windows(model: ModelTuning) -> Table:
    table = _plain_table("busiest", *KINDS, "90 % of the time")
    by_window = {window: [use for use in model.uses if use.window == window] for window in LENGTHS}
    for window, uses in by_window.items():
        if uses:
            last = uses[-1]
            usual = "-" if last.p90 is None else f"{short(last.p90)} tokens"
            table.add_row(window, *(short(use.peak) for use in uses), usual)
    return table


def _frontier(model: ModelTuning) -> Table:
    """A few points of each frontier, with the knee."""
    table = _plain_table("smallest burst")
    rows = []
    for points in model.frontiers:
        step = max(1, len(points.rates) // POINTS_SHOWN)
        places = sorted({*range(0, len(points.rates), step), points.knee, len(points.rates) - 1})
        row = [points.unit]
        for place in places:
            mark = "*" if place == points.knee else ""
            row.append(f"{short(points.bursts[place])} at {_rate(points.rates[place])}/s{mark}")
        rows.append(row)
    for _ in range(max(map(len, rows)) - 1):
        table.add_column("", justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _rate(rate: float) -> str:
    return short(rate) if rate >= 1_000 else f"{rate:.3g}"


def _limits(model: ModelTuning) -> Table:
    table = _plain_table("limit", "current", "lower", "recommended", "upper")
    table.add_column("")
    for item in model.limits:
        record = CATALOGUE[item.limit]
        current = "-" if model.current is None else _limit(getattr(model.current, item.field))
        note = f"{item.windows_seen:.2g} {record.window.name}s seen" if item.extrapolated and record.window else ""
        table.add_row(
            record.label,
            current,
            _limit(item.lower, none="?"),
            Text(_limit(item.target, none="?"), "bold green"),
            _limit(item.upper, none="?"),
            Text(note, "yellow"),
        )
        if item.burst_field:
            table.add_row(
                f"  burst of {record.unit}",
                "-" if model.current is None else _limit(getattr(model.current, item.burst_field)),
                _limit(item.lower_burst),
                Text(_limit(item.target_burst), "bold green"),
                _limit(item.upper_burst),
                "",
            )
    return table


def _limit(value: float | None, none: str = "unlimited") -> str:
    if value is None:
        return none
    return f"{round(value):,}" if value == round(value) else f"{value:,.6g}"


def _scenarios(model: ModelTuning) -> Table:
    table = _plain_table("would have", "admitted", "denied", "waited", "median", "p99")
    table.add_column("by")
    for scenario in model.scenarios:
        table.add_row(*_scenario(scenario))
    return table


def _scenario(scenario: Scenario) -> tuple[str | Text, ...]:
    found = scenario.replay
    binding = scenario.binding
    waits = ["-" if wait_ms is None else duration(wait_ms) for wait_ms in (found.median_wait_ms, found.p99_wait_ms)]
    return (
        scenario.name,
        f"{found.admitted:,}",
        Text(f"{scenario.denied_share:.3%}", "red" if found.admitted < found.requests else "green"),
        f"{found.waited:,}",
        *waits,
        "" if binding is None else binding.label,
    )


def _remarks(model: ModelTuning) -> list[str]:
    found = model.estimates
    lines = [
        f"Output tokens: median {found.output_p50:,.0f}, p95 {found.output_p95:,.0f}, p99 {found.output_p99:,.0f}, at "
        f"most {found.output_max:,}; default_output_tokens = {found.default_output_tokens} covers 95 %."
    ]
    if found.unused_share is not None and found.freed_share is not None:
        lines.append(
            f"Of what was reserved {found.unused_share:.1%} was not used; with that default {found.freed_share:.1%} "
            "of it would be free."
        )
    if model.concurrency is not None:
        open_ = model.concurrency
        lines.append(
            f"Open at one time: {open_.mean:,.3g} on average (Little's law), p99 {open_.p99:,.0f}, "
            f"at most {open_.peak:,}."
        )
    return lines


def _users(users: UserTuning) -> Table:
    more = len(users.uses) - USERS_SHOWN
    first = f"{users.per} ({more:,} more in --json)" if more > 0 else users.per
    table = _plain_table(first, "requests", "tokens", "requests/min", "tokens/min", "tokens/60 min")
    for use in users.uses[:USERS_SHOWN]:
        table.add_row(
            printable(use.name),
            f"{use.requests:,}",
            short(use.tokens),
            f"{use.peak_requests_minute:,}",
            short(use.peak_tokens_minute),
            short(use.peak_tokens_hour),
        )
    if users.recommended is not None:
        table.add_section()
        for field in users.reasons:
            value = getattr(users.recommended, field)
            table.add_row(Text(f"{field} = {value:,}", "bold green"), *[""] * 5)
    return table


def _print_capacity(report: TuneReport, capacity: Capacity, console: Console) -> None:
    """Demand beside what the hardware holds."""
    table = _plain_table("benchmark", "requests/s", "tokens/s", "open", "p99 TTFT")
    table.add_column("objective" if capacity.objective else "")
    for run in capacity.runs:
        ttft = run.latencies_ms.get("p99_ttft")
        table.add_row(
            printable(run.path),
            f"{run.requests_per_second:,.3g}",
            "-" if run.tokens_per_second is None else short(run.tokens_per_second),
            "-" if run.concurrency is None else f"{run.concurrency:,.3g}",
            "-" if ttft is None else duration(ttft),
            "" if not capacity.objective else Text("met", "green") if run.meets else Text("missed", "red"),
        )
    console.print(table)
    if capacity.requests_per_second is None:
        console.print(Text(f"No run met {capacity.objective}.", "red"))
        return
    limit = f" at {capacity.objective}" if capacity.objective else ""
    demand = report.requests / max(report.duration_ns / NS_PER_MS / 1_000, 1e-9)
    held = [f"{capacity.requests_per_second:,.3g} requests/s"]
    if capacity.tokens_per_second is not None:
        held.append(f"{short(capacity.tokens_per_second)} tokens/s")
    if capacity.concurrency is not None:
        held.append(f"{capacity.concurrency:,.3g} open")
    console.print(
        Text(
            f"The hardware holds {', '.join(held)}{limit}; the trace asks for {demand:,.3g} requests/s on average "
            f"({demand / capacity.requests_per_second:.0%})."
        ),
        soft_wrap=True,
    )
