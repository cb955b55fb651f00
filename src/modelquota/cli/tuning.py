"""The command `modelquota replay`: reads and replays a trace, and prints the report."""

import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from modelquota.cli.errors import answering, quiet_log, say, unusable
from modelquota.cli.format import duration, printable, short
from modelquota.cli.traces import Map, Reading, TimeUnit, Tpot, TraceFile, TraceFormat, Ttft, shown_progress
from modelquota.quota.file import load_quotas
from modelquota.tuning.replay import ModelReplay, Replay, ReplayReport
from modelquota.tuning.trace import StreamError

__all__ = ["add_commands", "print_comparison", "print_json", "print_report"]

# With fewer, the time for each request is mostly startup.
TIMED_FROM_REQUESTS = 1_000
NS_PER_MS = 1_000_000
USERS_SHOWN = 10


def add_commands(app: typer.Typer) -> None:
    """Add the command to an application."""

    @app.command("replay")
    def _replay(
        trace: TraceFile,
        quotas: Annotated[
            list[Path],
            typer.Option(
                "--quotas", "-q", metavar="QUOTAS.toml", help="A table [models.NAME] for each model; several: compared."
            ),
        ],
        model: Annotated[
            str | None,
            typer.Option(
                "--model",
                "-m",
                metavar="NAME",
                help="The model to charge if the trace names none; by default the only one with a quota.",
            ),
        ] = None,
        speed: Annotated[
            float, typer.Option("--speed", "-s", metavar="FACTOR", help="Replay faster: 24 turns a day into an hour.")
        ] = 1.0,
        wait: Annotated[
            bool, typer.Option("--wait/--no-wait", help="Whether requests that throttle or queue wait, as in acquire.")
        ] = True,
        per: Annotated[
            str | None, typer.Option(metavar="user", help="Charge each request to its user too, and report by user.")
        ] = None,
        format: TraceFormat = None,
        time_unit: TimeUnit = None,
        map: Map = None,
        ttft: Ttft = None,
        tpot: Tpot = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    ) -> None:
        """Replay a request trace through quotas, and report what they admit, delay and deny.

        Every request comes at its own time, on a simulated clock: an hour of traffic takes milliseconds, and the same
        input gives the same report. With **throttle** and **queue**, requests wait in the same queue as in production,
        for at most the grace period. The trace is Azure, BurstGPT, Mooncake, Bailian, AIPerf, or a ledger; what it was
        read as is said on stderr. If it has durations, or with --ttft and --tpot, requests hold concurrency.

        **--json** prints one object: trace, requests, duration_ns, speed, wait, out_of_order, core_time_ns,
        most_waiting, most_open (at one time; null without durations), models, and users, two lists of objects with
        model_id, requests, admitted, warned, denied (a count for each limit), never (denied whatever the wait), waited,
        timed_out, median_wait_ms, p99_wait_ms and longest_wait_ms (of those that waited and were admitted), tokens,
        tokens_admitted, longest_retry_after_ms and median_retry_after_ms (null if there was nothing to wait for),
        peak_requests and peak_tokens (admitted in any second), peak_requests_asked and peak_tokens_asked. With several
        quota files: an object with replays, a list of such objects, each with quotas, its file.

        **Exit code**: 0 when the trace was replayed, whatever was denied; 2 when an argument or a file
        cannot be used.
        """
        errors = Console(stderr=True)
        if per not in (None, "user"):
            raise unusable(errors, f"--per is {per!r}; expected user")
        with quiet_log(), answering(errors, trace):
            files = [(str(path), load_quotas(path)) for path in quotas]
            with shown_progress(trace, errors) as progress:
                options: dict[str, Any] = {"model": model, "speed": speed, "wait": wait, "per_user": per == "user"}
                begin = [partial(Replay, file, **options) for _, file in files]
                found = _replayed(trace, Reading(format, time_unit, map, ttft, tpot), begin, errors, progress)
            reports = [(name, report) for (name, _), report in zip(files, found, strict=True)]
        if as_json:
            print_json(reports)
        elif len(reports) == 1:
            print_report(reports[0][1], Console())
        else:
            print_comparison(reports, Console())


def _replayed(
    path: str,
    reading: Reading,
    begin: Sequence[Callable[[], Replay]],
    errors: Console,
    progress: Callable[[str], Callable[[int, int], None]],
) -> list[ReplayReport]:
    """Replay a trace while it is read, through several quotas; or, if that cannot be done, after it has been read."""
    runs = [each() for each in begin]
    try:
        for part in reading.parts(path, errors, progress("replaying the trace")):
            for run in runs:
                run.feed(part)
        return [run.report() for run in runs]
    except StreamError as problem:
        if not os.path.isfile(path):  # what was read from a pipe is gone
            raise unusable(errors, f"{problem}; save the trace as a file, which can be read as a whole") from None
        say(errors, f"note: {problem}; the trace is read again, as a whole")
    finally:
        for run in runs:
            run.close()
    trace = reading.read(path, errors, progress("reading the trace"), again=True)
    return [each().whole(trace, progress("replaying it")) for each in begin]


def print_json(reports: list[tuple[str, ReplayReport]]) -> None:
    """Print one report, or several, as JSON, on stdout."""
    found = [report.to_dict() for _, report in reports]
    if len(found) > 1:
        several = [{"quotas": name} | report for (name, _), report in zip(reports, found, strict=True)]
        print(json.dumps({"replays": several}, indent=2, allow_nan=False))
    else:
        print(json.dumps(found[0], indent=2, allow_nan=False))


def print_report(report: ReplayReport, console: Console) -> None:
    """Print the report for people."""
    _print_heading(report, console)
    for model in report.models:
        console.print()
        console.print(Text(printable(model.model_id), "bold cyan"), soft_wrap=True)
        console.print(Padding(_table(model), (0, 0, 0, 2), expand=False))
    if report.users:
        console.print()
        console.print(_users(report))
    took = f"Decided in {report.core_time_ns / NS_PER_MS:,.2f} ms"
    if report.requests >= TIMED_FROM_REQUESTS:
        took += f", {report.core_time_ns / report.requests:,.0f} ns a request"
    console.print(Text(f"\n{took}.", "dim"))


def _print_heading(report: ReplayReport, console: Console) -> None:
    spoken = f"{report.requests:,} requests in {duration(report.duration_ns / NS_PER_MS)}"
    if report.speed != 1:
        spoken += f", played {report.speed:,g} times as fast as they came"
    if report.most_waiting:
        spoken += f"; at most {report.most_waiting:,} waited at one time"
    if report.most_open is not None:
        spoken += f"; at most {report.most_open:,} open at one time"
    console.print(Text(printable(report.trace), "bold"), soft_wrap=True)
    console.print(Text(spoken))


def print_comparison(reports: list[tuple[str, ReplayReport]], console: Console) -> None:
    """Print what several quota files did with the same trace, side by side."""
    _print_heading(reports[0][1], console)
    for place, first in enumerate(reports[0][1].models):
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
        table.add_column(printable(first.model_id), style="cyan")
        for heading in ("admitted", "waited", "median", "p99", "denied"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("by")
        for name, report in reports:
            model = report.models[place]
            denied = model.requests - model.admitted
            table.add_row(
                printable(name),
                _share(model.admitted, model.requests).strip(),
                f"{model.waited:,}",
                _wait(model.median_wait_ms),
                _wait(model.p99_wait_ms),
                Text(f"{denied:,}", "red" if denied else "green"),
                ", ".join(limit.label.replace(" per ", "/") for limit, count in model.denied.items() if count),
            )
        console.print()
        console.print(table)


def _wait(ms: float | None) -> str:
    return "-" if ms is None else duration(ms)


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
    if model.waited:
        waits = f"median {_wait(model.median_wait_ms)}, p99 {_wait(model.p99_wait_ms)}"
        table.add_row("waited", f"{model.waited:,}", Text(waits, "yellow"), f"up to {_wait(model.longest_wait_ms)}", "")
    if model.timed_out:
        table.add_row("gave up", f"{model.timed_out:,}", Text("after the grace period", "yellow"), "", "")
    return table


def _users(report: ReplayReport) -> Table:
    """The users that were denied or delayed most."""
    users = sorted(report.users, key=lambda user: (user.admitted - user.requests, -user.waited, -user.requests))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    more = len(users) - USERS_SHOWN
    table.add_column(f"user ({more:,} more in --json)" if more > 0 else "user", style="cyan")
    for heading in ("asked", "admitted", "waited", "p99", "denied"):
        table.add_column(heading, justify="right", no_wrap=True)
    for user in users[:USERS_SHOWN]:
        denied = user.requests - user.admitted
        table.add_row(
            printable(user.model_id),
            f"{user.requests:,}",
            _share(user.admitted, user.requests).strip(),
            f"{user.waited:,}",
            _wait(user.p99_wait_ms),
            Text(f"{denied:,}", "red" if denied else "green"),
        )
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
        lines.append(Text(f"retry in {duration(model.median_retry_after_ms)} (median)", "yellow"))
        lines.append(Text(f"up to {duration(model.longest_retry_after_ms)}", "yellow"))
    if model.warned:
        lines.append(Text(f"{model.warned:,} warned, admitted", "magenta"))
    return lines
