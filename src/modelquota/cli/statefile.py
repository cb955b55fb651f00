"""`modelquota inspect`, `verify` and `migrate`: what a state file contains, whether it is right, taking it over."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelquota.cli.errors import EXIT_NO, answering
from modelquota.cli.format import counted, printable
from modelquota.cli.manage import TrustFile
from modelquota.statefile.inspect import StateFileInfo, inspect_file, verify_file

__all__ = ["add_commands"]

_File = Annotated[Path, typer.Argument(metavar="FILE", help="The state file of ResourceQuotaManager(path=...).")]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to an application."""

    @app.command("inspect")
    def inspect(file: _File, as_json: _Json = False) -> None:
        """Print what a state file contains: models, the processes that share it now, grants, recoveries.

        **Exit code**: 0; 2 when the file cannot be used. The file is only read.
        """
        with answering(Console(stderr=True), file):
            info = inspect_file(file)
        if as_json:
            print(json.dumps(dataclasses.asdict(info), default=str, indent=2))
        else:
            Console().print(_table(info))

    @app.command("verify")
    def verify(file: _File, as_json: _Json = False) -> None:
        """Check every sum in a state file against its parts. The file is only read, even while others use it.

        **Exit code**: 0 when all sums agree; 1 when not; 2 when the file cannot be used.
        """
        with answering(Console(stderr=True), file):
            info, faults = inspect_file(file), verify_file(file)
        if as_json:
            print(json.dumps({"models": info.models, "faults": faults}, indent=2))
        else:
            for fault in faults:
                print(printable(fault))
            print(counted(len(faults), "fault") if faults else f"ok: {counted(info.models, 'model')}, all sums agree")
        if faults:
            raise typer.Exit(EXIT_NO)

    @app.command("migrate")
    def migrate(
        file: _File,
        keep: Annotated[
            bool, typer.Option("--keep/--discard", help="Keep the old file as FILE.layout4 (its layout's number).")
        ] = True,
        as_json: _Json = False,
        trust_file: TrustFile = False,
    ) -> None:
        """Take over a state file that an earlier version wrote, with its limits and all that was used.

        End every process that has the file open before. The new file is written beside the old one, checked, and
        put in its place in one step, so after a crash there is either of them, complete.

        **Exit code**: 0; 2 when a process uses the file, it is damaged, or it has no layout that can be taken over:
        then it is left as it is.
        """
        from modelquota.statefile.migrate import migrate_file

        with answering(Console(stderr=True), file):
            done = migrate_file(file, keep=keep, trust_file=trust_file)
        if as_json:
            print(json.dumps(dataclasses.asdict(done), indent=2))
            return
        print(printable(f"{done.path}: layout {done.old_version} is now layout {done.version}"))
        print(
            f"{counted(done.models, 'model')} with limits; the windows of a day have "
            f"{counted(done.requests, 'request')} and {counted(done.tokens, 'token')}"
        )
        if done.released:
            print(f"{done.released:,} grants and waiting requests of dead processes were given back")
        print("the old file was not kept" if done.old_file is None else printable(f"old file: {done.old_file}"))


def _table(info: StateFileInfo) -> Table:
    table = Table(box=None, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (
        ("file", printable(info.path)),
        ("layout version", str(info.version)),
        ("size", f"{info.size_bytes:,} bytes, of which {info.disk_bytes:,} are on disk"),
        ("models", f"{info.models:,} of {info.max_models:,}"),
        ("processes", f"{info.processes:,} share it now"),
        ("open grants", f"{info.open_grants:,}"),
        ("waiting requests", f"{info.waiting_requests:,}"),
        ("recoveries", f"{info.recoveries:,} after the death of a process"),
        ("last anchored", f"{info.anchored_at:%Y-%m-%d %H:%M:%S} UTC"),
    ):
        table.add_row(name, Text(value))  # a path may hold what rich takes for markup
    return table
