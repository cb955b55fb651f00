"""The command `modelquota usage`: sums over ledgers."""

import csv
import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from modelquota.cli.errors import answering, say
from modelquota.cli.format import duration, printable, short
from modelquota.cli.traces import shown_progress
from modelquota.tuning.usage import KEYS, Usage, UsageReport, read_usage

__all__ = ["add_commands"]

US_PER_MS = 1_000


def add_commands(app: typer.Typer) -> None:
    """Add the command to an application."""

    @app.command("usage")
    def _usage(
        ledgers: Annotated[
            list[str], typer.Argument(metavar="LEDGER...", help="Ledgers, maybe with gzip; - is standard input.")
        ],
        by: Annotated[
            list[str] | None,
            typer.Option(metavar="KEY", help=f"Any of {', '.join(KEYS)}; may be given again."),
        ] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Print the sums as JSON.")] = False,
        as_csv: Annotated[bool, typer.Option("--csv", help="Print the sums as CSV.")] = False,
    ) -> None:
        """Sum ledgers: requests and tokens by tenant, user, model, day or month.

        The model is the last id of a request, the user the one before it, and the tenant the first of several. Times
        are UTC. What was lost, cut off, or written by processes that were killed is said on stderr.

        **--json** prints one object: by, groups (a list with the keys, and requests, admitted, denied, input, cached,
        output, tokens, waited_us, duration_us), total, lost, torn, killed.

        **Exit code**: 0; 2 when an argument or a file cannot be used.
        """
        errors = Console(stderr=True)
        with answering(errors, ledgers[0]), shown_progress(ledgers[0], errors) as progress:
            report = read_usage(ledgers, by or ["model"], progress=progress("summing"))
        for count, what in (
            (report.lost, "requests were lost, since the buffer was full or the disk refused them"),
            (report.torn, "lines were cut off when their writer was killed; they are skipped"),
            (
                report.killed,
                "processes have not ended in order (yet): their last tenth of a second may be missing",
            ),
        ):
            if count:
                say(errors, f"note: {count:,} {what}")
        if as_json:
            print(json.dumps(report.to_dict(), indent=2, allow_nan=False))
        elif as_csv:
            _print_csv(report)
        else:
            Console().print(_table(report))


def _print_csv(report: UsageReport) -> None:
    names = list(Usage.__slots__)
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([*report.by, *names])
    for key, usage in report.groups.items():
        writer.writerow([*key, *(getattr(usage, name) for name in names)])


def _table(report: UsageReport) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for key in report.by:
        table.add_column(key, style="cyan")
    for heading in ("requests", "denied", "input", "cached", "output", "tokens", "waited"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found, usage in report.groups.items():
        table.add_row(*(printable(part) or "-" for part in found), *_cells(usage))
    table.add_section()
    table.add_row("total", *[""] * (len(report.by) - 1), *_cells(report.total), style="bold")
    return table


def _cells(usage: Usage) -> list[str]:
    mean_ms = usage.waited_us / usage.requests / US_PER_MS if usage.requests else 0.0
    return [
        f"{usage.requests:,}",
        f"{usage.denied:,}",
        *(short(count) for count in (usage.input, usage.cached, usage.output, usage.tokens)),
        duration(mean_ms) if usage.waited_us else "-",
    ]
