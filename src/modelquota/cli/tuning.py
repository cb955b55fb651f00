"""The command `modelquota replay`: reads and replays a trace, and prints the report."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from modelquota.cli.format import duration, printable, short
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.tuning.replay import ModelReplay, ReplayReport, replay
from modelquota.tuning.trace import read_trace

__all__ = ["print_json", "print_report", "replay_file"]

# Reading a megabyte takes some 25 ms: below this size a bar would only flicker.
PROGRESS_FROM_BYTES = 16 << 20
# With fewer, the time for each request is mostly startup.
TIMED_FROM_REQUESTS = 1_000
NS_PER_MS = 1_000_000


def replay_file(
    path: Path, quotas: Mapping[str, ResourceQuotaConfig], *, model: str | None, speed: float, errors: Console
) -> ReplayReport:
    """Read a trace and replay it, with a progress bar on `errors` if it is a terminal and the trace is long."""
    show = errors.is_terminal and os.stat(path).st_size >= PROGRESS_FROM_BYTES
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not show,
    ) as progress:
        with _task(progress, "reading the trace") as advance:
            trace = read_trace(path, progress=advance)
        with _task(progress, "replaying it") as advance:
            return replay(trace, quotas, model=model, speed=speed, progress=advance)


@contextmanager
def _task(progress: Progress, description: str) -> Iterator[Callable[[int, int], None]]:
    task = progress.add_task(description)
    yield lambda done, total: progress.update(task, completed=done, total=total)
    progress.remove_task(task)


def print_json(report: ReplayReport) -> None:
    """Print the report as JSON, on stdout."""
    print(json.dumps(report.to_dict(), indent=2, allow_nan=False))


def print_report(report: ReplayReport, console: Console) -> None:
    """Print the report for people."""
    spoken = f"{report.requests:,} requests in {duration(report.duration_ns / NS_PER_MS)}"
    if report.speed != 1:
        spoken += f", played {report.speed:,g} times as fast as they came"
    console.print(Text(printable(report.trace), "bold"), soft_wrap=True)
    console.print(Text(spoken))
    for model in report.models:
        console.print()
        console.print(Text(printable(model.model_id), "bold cyan"), soft_wrap=True)
        console.print(Padding(_table(model), (0, 0, 0, 2), expand=False))
    took = f"Decided in {report.core_time_ns / NS_PER_MS:,.2f} ms"
    if report.requests >= TIMED_FROM_REQUESTS:
        took += f", {report.core_time_ns / report.requests:,.0f} ns a request"
    console.print(Text(f"\n{took}.", "dim"))


def _table(model: ModelReplay) -> Table:
    """Requests in the first line, tokens in the second; columns are aligned over all models."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("", style="dim", min_width=8)
    for heading, width in (("asked", 9), ("admitted", 14), ("busiest second", 14)):
        table.add_column(heading, justify="right", no_wrap=True, min_width=width)
    table.add_column("denied by")
    denials = _denials(model)
    table.add_row(
        "requests",
        f"{model.requests:,}",
        f"{model.admitted:,} {_share(model.admitted, model.requests)}",
        f"{model.peak_requests:,} of {model.peak_requests_asked:,}",
        denials[0],
    )
    table.add_row(
        "tokens",
        short(model.tokens),
        f"{short(model.tokens_admitted)} {_share(model.tokens_admitted, model.tokens)}",
        f"{short(model.peak_tokens)} of {short(model.peak_tokens_asked)}",
        denials[1] if len(denials) > 1 else "",
    )
    for denial in denials[2:]:
        table.add_row("", "", "", "", denial)
    return table


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:5.1f} %" if whole else "    - %"


def _denials(model: ModelReplay) -> list[Text]:
    """How many requests each limit denied, how many could never fit, and how long the others had to wait."""
    denied = {limit.label.replace(" per ", "/"): count for limit, count in model.denied.items() if count}
    width = max((len(f"{count:,}") for count in denied.values()), default=0)
    lines = [Text(f"{count:{width},} {label}", "red") for label, count in denied.items()] or [Text("none", "green")]
    if model.never:
        lines.append(Text(f"{model.never:{width},} whatever the wait", "red"))
    if model.median_retry_after_ms is not None and model.longest_retry_after_ms is not None:
        lines.append(Text(f"wait {duration(model.median_retry_after_ms)} (median)", "yellow"))
        lines.append(Text(f"up to {duration(model.longest_retry_after_ms)}", "yellow"))
    if model.warned:
        lines.append(Text(f"{model.warned:,} warned, admitted", "magenta"))
    return lines
