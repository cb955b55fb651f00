"""The commands over a manager that others use too: `status`, `top`, `set`, `remove`, `reset-burst` and `exporter`."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelquota.cli.answers import EXIT_NO, answering, say, unusable
from modelquota.cli.change import parse_fields, remove_models, reset_bursts, set_model
from modelquota.cli.status import print_status, print_status_json
from modelquota.cli.text import escaped
from modelquota.cli.top import run_top
from modelquota.manager import ResourceQuotaManager
from modelquota.reading.reader import QuotaReader

__all__ = ["OpenManager", "OpenView", "TrustFile", "add_commands"]

OpenManager = Callable[[Path, bool], AbstractContextManager[ResourceQuotaManager]]
"""Opens the manager whose state is in a file, even one that others can change if so told.

An OSError, QuotaError or ValueError is told in one line.
"""

OpenView = Callable[[Path, bool], AbstractContextManager[QuotaReader]]
"""The same for reading only."""

TrustFile = Annotated[
    bool, typer.Option("--trust-file", help="Use the file even if it is another user's, or others may write to it.")
]

_Path = Annotated[
    Path, typer.Option("--path", "-p", metavar="FILE", help="The state file of ResourceQuotaManager(path=...).")
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Their ids.")]


def add_commands(app: typer.Typer, open_manager: OpenManager, open_view: OpenView) -> None:
    """Add the commands to an application. All of them end with 0 when done, 1 for "no", 2 for unusable input."""

    @app.command("status")
    def status(
        path: _Path,
        as_json: _Json = False,
        trust_file: TrustFile = False,
        above: Annotated[
            float | None,
            typer.Option(min=0, metavar="PERCENT", help="End with 1 if a limit that denies is used more than this."),
        ] = None,
    ) -> None:
        """Print use against limits, the model nearest to a limit first.

        **--json** prints one object: enforcing, pressure (the highest of a model that denies), stats (the totals), and
        models, a list of objects with model_id, pressure, denies (whether any of its limits does), nearest_limit,
        percent (of each limit), denied (for good), usage and quota. Models that deny nothing come last.

        **Exit code**: 0; 1 when a model that denies is above PERCENT; 2 when the file cannot be used.
        """
        with answering(Console(stderr=True), path), open_view(path, trust_file) as manager:
            highest = print_status_json(manager) if as_json else print_status(manager, Console())
        if above is not None and highest > above:
            raise typer.Exit(EXIT_NO)

    @app.command("top")
    def top(
        path: _Path,
        interval: Annotated[float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="Between two looks.")] = 1.0,
        trust_file: TrustFile = False,
    ) -> None:
        """Watch use against limits, the model nearest to a limit first, until q or Ctrl-C."""
        with answering(Console(stderr=True), path), open_view(path, trust_file) as manager:
            run_top(manager, Console(), interval_sec=interval)

    @app.command("set")
    def set_(
        model: Annotated[str, typer.Argument(metavar="MODEL", help="Its id; a new one is registered.")],
        fields: Annotated[
            list[str] | None,
            typer.Argument(metavar="[FIELD=VALUE]...", help="Such as max_ram_mb=1024 or max_ssd_mb=unlimited."),
        ] = None,
        *,
        path: _Path,
        as_json: _Json = False,
        trust_file: TrustFile = False,
    ) -> None:
        """Change limits of a model, at its next check; what is not named stays. It prints all limits.

        **Exit code**: 0; 2 when a field, its value or the file cannot be used: then nothing is changed.
        """
        errors = Console(stderr=True)
        with answering(errors, path), open_manager(path, trust_file) as manager:
            is_new = manager.get_quota(model) is None
            quota = set_model(manager, model, parse_fields(fields or [])).to_dict()
        if is_new:
            say(errors, f"{model} is new; what was not named has its default")
        if as_json:
            print(json.dumps(quota, indent=2, allow_nan=False))
        else:
            lines = (f"{field} = {_word(value)}" for field, value in quota.items())
            Console().print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

    @app.command("remove")
    def remove(models: _Models, path: _Path, trust_file: TrustFile = False) -> None:
        """Forget models and what they have used. Later requests for them are admitted without limits.

        **Exit code**: 0; 1 when one is not known, then none is removed; 2 when the file cannot be used.
        """
        with answering(Console(stderr=True), path, unknown_model=EXIT_NO), open_manager(path, trust_file) as manager:
            remove_models(manager, models)

    @app.command("reset-burst")
    def reset_burst(models: _Models, path: _Path, trust_file: TrustFile = False) -> None:
        """Forgive the bursts that models have in use; windows are not touched.

        **Exit code**: 0; 1 when one is not known, then none is changed; 2 when the file cannot be used.
        """
        with answering(Console(stderr=True), path, unknown_model=EXIT_NO), open_manager(path, trust_file) as manager:
            reset_bursts(manager, models)

    @app.command("exporter")
    def exporter(
        path: _Path,
        port: Annotated[int, typer.Option(min=0, max=65_535, help="TCP port; 0 takes a free one.")] = 9185,
        addr: Annotated[str, typer.Option(help="Address to listen on; by default only this machine.")] = "127.0.0.1",
        max_models: Annotated[int, typer.Option(min=0, help="Models with a label of their own.")] = 100,
        trust_file: TrustFile = False,
    ) -> None:
        """Serve metrics for Prometheus over HTTP until Ctrl-C. It needs the extra `prometheus`.

        **Exit code**: 0 when it was ended; 2 when the file cannot be used, or the address is taken.
        """
        errors = Console(stderr=True)
        with answering(errors, path), open_view(path, trust_file) as manager:
            from modelquota.monitoring.prometheus import start_exporter  # an extra of its own

            try:
                server, thread = start_exporter(manager, port, addr=addr, max_models=max_models)
            except OSError as error:  # it is about the address, not the file
                raise unusable(errors, error.strerror or str(error)) from None
            say(errors, f"serving http://{addr}:{server.server_port}/metrics")
            with suppress(KeyboardInterrupt):
                thread.join()
            server.shutdown()
            server.server_close()


def _word(value: object) -> str:
    """A value as one word for a terminal: an id may hold anything."""
    return "unlimited" if value is None else escaped(str(value))
