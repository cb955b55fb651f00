"""The commands on a manager that others share: `status`, `top`, `set`, `remove`, `reset-burst` and `exporter`."""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modelquota.cli.cluster import Namespace, Redis, open_store, print_cluster
from modelquota.cli.errors import EXIT_NO, answering, say, unusable
from modelquota.cli.format import escaped
from modelquota.cli.status import print_status, print_status_json
from modelquota.cli.top import run_top
from modelquota.cluster.redis import URL_VARIABLE
from modelquota.errors import QuotaConfigError, UnknownModelError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.reading.reader import QuotaReader

__all__ = ["OpenManager", "OpenView", "TrustFile", "add_commands", "parse_fields", "set_model"]

OpenManager = Callable[[Path, bool], AbstractContextManager[ResourceQuotaManager]]
"""Opens the manager whose state is in a file; with True, even a file that other users can change.

An OSError, QuotaError or ValueError from it is printed in one line.
"""

OpenView = Callable[[Path, bool], AbstractContextManager[QuotaReader]]
"""The same for reading only."""

TrustFile = Annotated[
    bool, typer.Option("--trust-file", help="Use the file even if it is another user's, or others may write to it.")
]

_PATH = typer.Option("--path", "-p", metavar="FILE", help="The state file of ResourceQuotaManager(path=...).")
_Path = Annotated[Path, _PATH]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_Models = Annotated[list[str], typer.Argument(metavar="MODEL...", help="Their ids.")]


def add_commands(app: typer.Typer, open_manager: OpenManager, open_view: OpenView) -> None:
    """Add the commands to an application. All of them exit with 0 when done, 1 for "no", 2 for unusable input."""

    @app.command("status")
    def status(
        path: Annotated[Path | None, _PATH] = None,
        as_json: _Json = False,
        trust_file: TrustFile = False,
        redis: Redis = None,
        namespace: Namespace = None,
        above: Annotated[
            float | None,
            typer.Option(min=0, metavar="PERCENT", help="Exit with 1 if a limit that denies is used more than this."),
        ] = None,
    ) -> None:
        """Print use against limits, the model nearest to a limit first.

        **--json** prints one object: enforcing, pressure (the highest of a model that denies), stats (the totals), and
        models, a list of objects with model_id, pressure, denies (whether any of its limits does), nearest_limit,
        percent (of each limit), denied (for good), usage and quota. Models that deny nothing come last.

        With **--redis**, or $MODELQUOTA_REDIS_URL and no file, it is the use of all hosts of a cluster against the
        limits that they share, and the hosts. Needs the extra **redis**.

        **Exit code**: 0; 1 when a model that denies is above PERCENT; 2 when the file or the store cannot be used.
        """
        errors = Console(stderr=True)
        if path is None:
            if redis is None and not os.environ.get(URL_VARIABLE):
                raise unusable(errors, f"give --path FILE or --redis URL, or set {URL_VARIABLE}")
            with open_store(errors, redis, namespace) as store:
                highest = print_cluster(store, as_json)
        elif redis is not None:
            raise unusable(errors, "give --path FILE or --redis URL, not both")
        else:
            highest = _status_of(path, trust_file, as_json)
        if above is not None and highest > above:
            raise typer.Exit(EXIT_NO)

    def _status_of(path: Path, trust_file: bool, as_json: bool) -> float:
        with answering(Console(stderr=True), path), open_view(path, trust_file) as manager:
            return print_status_json(manager) if as_json else print_status(manager, Console())

    @app.command("top")
    def top(
        path: _Path,
        interval: Annotated[float, typer.Option(min=0.1, max=3600, metavar="SECONDS", help="Refresh interval.")] = 1.0,
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
        """Change limits of a model, from its next check on; other fields keep their values. Prints all limits.

        **Exit code**: 0; 2 when a field, its value or the file cannot be used; then nothing is changed.
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

        **Exit code**: 0; 1 when a model is not known, and then none is removed; 2 when the file cannot be used.
        """
        with answering(Console(stderr=True), path, unknown_model=EXIT_NO), open_manager(path, trust_file) as manager:
            remove_models(manager, models)

    @app.command("reset-burst")
    def reset_burst(models: _Models, path: _Path, trust_file: TrustFile = False) -> None:
        """Clear the bursts that models have in use; windows are not touched.

        **Exit code**: 0; 1 when a model is not known, and then none is changed; 2 when the file cannot be used.
        """
        with answering(Console(stderr=True), path, unknown_model=EXIT_NO), open_manager(path, trust_file) as manager:
            reset_bursts(manager, models)

    @app.command("exporter")
    def exporter(
        path: _Path,
        port: Annotated[int, typer.Option(min=0, max=65_535, help="TCP port; 0 chooses a free one.")] = 9185,
        addr: Annotated[str, typer.Option(help="Address to listen on; by default only this machine.")] = "127.0.0.1",
        max_models: Annotated[int, typer.Option(min=0, help="Models with a label of their own.")] = 100,
        trust_file: TrustFile = False,
    ) -> None:
        """Serve metrics for Prometheus over HTTP until Ctrl-C. Needs the extra `prometheus`.

        **Exit code**: 0 when it was stopped; 2 when the file cannot be used, or the address is taken.
        """
        errors = Console(stderr=True)
        with answering(errors, path), open_view(path, trust_file) as manager:
            from modelquota.monitoring.prometheus import start_exporter  # needs an extra

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
    """Format a value for a terminal: an id may contain any character."""
    if isinstance(value, bool):
        return str(value).lower()
    return "unlimited" if value is None else escaped(str(value))


def parse_fields(assignments: Sequence[str]) -> dict[str, Any]:
    """Read ``field=value`` words: whole numbers, numbers, ``unlimited``, true and false, names, lists with commas.

    Raises
    ------
    QuotaConfigError
        A word without ``=``; `ResourceQuotaConfig` checks whether a field accepts its value.

    Examples
    --------
    >>> parse_fields(["max_ram_mb=1_024", "max_tokens_per_second=0.5", "max_ssd_mb=unlimited", "on_violation=reject"])
    {'max_ram_mb': 1024, 'max_tokens_per_second': 0.5, 'max_ssd_mb': None, 'on_violation': 'reject'}
    >>> parse_fields(["shadow_limits=ram,tokens_per_hour"]), parse_fields(["shadow_limits="])
    ({'shadow_limits': ['ram', 'tokens_per_hour']}, {'shadow_limits': []})
    >>> parse_fields(["token_weights=1,0.25,4"])
    {'token_weights': [1, 0.25, 4]}
    """
    fields: dict[str, Any] = {}
    for assignment in assignments:
        field, equals, word = assignment.partition("=")
        if not equals:
            raise QuotaConfigError(assignment, "", "field=value, such as max_ram_mb=1024 or max_ssd_mb=unlimited")
        field = field.strip()
        if field == "shadow_limits":
            fields[field] = _names(word)
        elif field == "cluster_concurrency":
            fields[field] = {"true": True, "false": False}.get(word.strip().lower(), word)
        elif field == "token_weights":
            fields[field] = [_value(number) for number in _names(word)]
        else:
            fields[field] = _value(word.strip())
    return fields


def _names(word: str) -> list[str]:
    return [name.strip() for name in word.split(",") if name.strip()]


def _value(word: str) -> Any:
    if word in ("unlimited", "None"):
        return None
    for number in (int, float):
        try:
            return number(word)
        except ValueError:
            pass
    return word


def set_model(manager: ResourceQuotaManager, model_id: str, fields: dict[str, Any]) -> ResourceQuotaConfig:
    """Change the named limits of a known model, or register a new one with them and the defaults; return its quota.

    Raises
    ------
    QuotaConfigError
        A field is not known, or its value is not accepted; nothing is changed.
    CapacityError
        The table is full.
    """
    if "model_id" in fields:
        raise QuotaConfigError("model_id", fields["model_id"], "any other field: a model's id cannot be changed")
    known = manager.get_quota(model_id)
    base = {"model_id": model_id} if known is None else known.to_dict()
    quota = ResourceQuotaConfig.from_dict({**base, **fields})
    manager.set_quota(quota)
    return quota


def remove_models(manager: ResourceQuotaManager, model_ids: Sequence[str]) -> None:
    """Forget models, and what they have used; if one is not known, raise UnknownModelError and remove none."""
    _require_known(manager, model_ids)
    for model_id in model_ids:
        manager.remove_quota(model_id)


def reset_bursts(manager: ResourceQuotaManager, model_ids: Sequence[str]) -> None:
    """Clear the bursts of models; if one is not known, raise UnknownModelError and change none."""
    _require_known(manager, model_ids)
    for model_id in model_ids:
        manager.reset_burst(model_id)


def _require_known(manager: ResourceQuotaManager, model_ids: Sequence[str]) -> None:
    known = set(manager.list_models())
    for model_id in model_ids:
        if model_id not in known:
            raise UnknownModelError(model_id)
