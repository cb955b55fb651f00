"""What the commands that read a trace share: their options, a progress bar, and what is said about the file."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from modelquota.cli.errors import say
from modelquota.tuning.cells import UNITS_NS
from modelquota.tuning.formats import FORMATS, ROLES
from modelquota.tuning.source import STDIN
from modelquota.tuning.trace import Trace, TraceStream, read_trace

__all__ = ["Map", "Reading", "TimeUnit", "Tpot", "TraceFile", "TraceFormat", "Ttft", "shown_progress"]

# Reading a megabyte takes some 25 ms: below this size a bar would only flicker.
PROGRESS_FROM_BYTES = 16 << 20

TraceFile = Annotated[
    str, typer.Argument(metavar="TRACE", help="Requests, as CSV or JSONL, maybe with gzip; - is standard input.")
]
TraceFormat = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help=f"One of {', '.join(FORMATS)}, if it is not to be recognized."),
]
TimeUnit = Annotated[
    str | None, typer.Option(metavar="UNIT", help=f"Unit of the times: timestamp, {', '.join(UNITS_NS)}.")
]
Map = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="ROLE=COLUMN",
        help=f'A column by its role, as in --map prompt="Request tokens"; roles are {", ".join(ROLES)}.',
    ),
]
Ttft = Annotated[
    float | None,
    typer.Option(metavar="MS", help="Time to first token, to compute durations from, for a trace without any."),
]
Tpot = Annotated[float | None, typer.Option(metavar="MS", help="Time per output token after the first, likewise.")]


@dataclass(frozen=True, slots=True)
class Reading:
    """How a trace is read, as the options say."""

    format: str | None = None
    time_unit: str | None = None
    map: list[str] | None = None
    ttft: float | None = None
    tpot: float | None = None

    def read(
        self,
        path: str,
        errors: Console,
        progress: Callable[[int, int], None] | None = None,
        *,
        again: bool = False,
    ) -> Trace:
        """Read a trace, and say what was found on `errors`; if it is read `again`, what has not been said.

        Raises ValueError if an option is malformed, TraceError or OSError as `read_trace`.
        """
        trace = read_trace(
            path, format=self.format, time_unit=self.time_unit, columns=self._columns(), progress=progress
        )
        if not again:
            self._say_form(trace, errors)
        _say_notes(trace, errors)
        return self._with_durations(trace)

    def parts(self, path: str, errors: Console, progress: Callable[[int, int], None] | None = None) -> Iterator[Trace]:
        """Read a trace in parts, and say the same on `errors`. Raises StreamError too, as `TraceStream`."""
        part = None
        for found in TraceStream(
            path, format=self.format, time_unit=self.time_unit, columns=self._columns(), progress=progress
        ):
            if part is None:
                self._say_form(found, errors)
            part = found
            yield self._with_durations(part)
        assert part is not None
        _say_notes(part, errors)

    def _columns(self) -> dict[str, str]:
        columns = {}
        for text in self.map or ():
            role, equals, column = text.partition("=")
            if not equals or not column:
                raise ValueError(f"--map is {text!r}; expected ROLE=COLUMN, such as prompt=ContextTokens")
            columns[role] = column
        return columns

    def _say_form(self, trace: Trace, errors: Console) -> None:
        say(errors, f"note: {trace.path}: read as {trace.format}")
        if trace.ignored:
            say(errors, f"note: columns that are not used: {', '.join(trace.ignored)}")
        if trace.durations_ns is not None and (self.ttft is not None or self.tpot is not None):
            say(errors, "note: --ttft and --tpot replace the durations of the trace")

    def _with_durations(self, trace: Trace) -> Trace:
        if self.ttft is None and self.tpot is None:
            return trace
        return trace.with_durations(ttft_ms=self.ttft or 0.0, tpot_ms=self.tpot or 0.0)


def _say_notes(trace: Trace, errors: Console) -> None:
    for note in trace.notes:
        say(errors, f"note: {note}")
    if trace.out_of_order:
        say(errors, f"note: {trace.out_of_order:,} rows of the trace were out of order and have been sorted by time")


@contextmanager
def shown_progress(path: str, errors: Console) -> Iterator[Callable[[str], Callable[[int, int], None]]]:
    """Show progress on `errors` if it is a terminal and the trace is long: call what it gives for each task."""
    show = errors.is_terminal and (path == STDIN or os.stat(path).st_size >= PROGRESS_FROM_BYTES)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=not show,
    ) as progress:

        def begin(description: str) -> Callable[[int, int], None]:
            for task in progress.task_ids:
                progress.remove_task(task)
            task = progress.add_task(description, total=None)
            return lambda done, total: progress.update(task, completed=done, total=total or None)

        yield begin
