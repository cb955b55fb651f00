"""The commands on what hosts share in Redis or Valkey: `publish`, `nodes`, `forget`, and `status --redis`."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from modelquota.cli.errors import EXIT_NO, answering, say, unusable
from modelquota.cli.format import counted, duration, escaped, printable, short
from modelquota.cli.lines import Column, Lines
from modelquota.cluster import RedisStore
from modelquota.cluster.operating import ClusterState, LimitState, forget, publish, read_cluster
from modelquota.cluster.redis import URL_VARIABLE
from modelquota.quota.cluster import has_password
from modelquota.quota.file import load_quotas

__all__ = ["Namespace", "Redis", "add_commands", "make_store", "open_store", "print_cluster"]

Redis = Annotated[
    str | None,
    typer.Option(
        "--redis",
        metavar="URL",
        help="Redis or Valkey, such as rediss://host:6379/0. One with a password belongs in $MODELQUOTA_REDIS_URL.",
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option("--namespace", help="That of RedisStore(namespace=...), or of [cluster] in the quota file."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def open_store(
    errors: Console, url: str | None, namespace: str | None, table: Mapping[str, Any] | None = None
) -> Iterator[RedisStore]:
    """Open a store and turn what is wrong with it into a message, without its URL, and an exit code."""
    with answering(errors, "the store"):
        store = make_store(errors, url, namespace, table)
        try:
            yield store
        finally:
            store.close()


def make_store(
    errors: Console, url: str | None, namespace: str | None, table: Mapping[str, Any] | None = None
) -> RedisStore:
    """Make a store for a command's arguments, which go before the variable, and that before ``[cluster]`` of a file.

    A password in an argument is refused: all users of a machine see the arguments of its processes.
    """
    if has_password(url):
        raise unusable(errors, "--redis has a user or a password, which all users of this machine can see: set it as "
                       "MODELQUOTA_REDIS_URL instead")  # fmt: skip
    given = {"url": url or os.environ.get(URL_VARIABLE), "namespace": namespace}
    return RedisStore(**{**(table or {}), **{name: value for name, value in given.items() if value is not None}})


def add_commands(app: typer.Typer) -> None:
    """Add the commands to an application. All of them exit with 0 when done, 1 for "no", 2 for unusable input."""

    @app.command("publish")
    def publish_(
        quotas: Annotated[Path, typer.Argument(metavar="QUOTAS.toml", help="The models and patterns to publish.")],
        redis: Redis = None,
        namespace: Namespace = None,
    ) -> None:
        """Give all hosts of a cluster the limits of a file, within a second; what was used stays counted.

        A model removed from the file keeps its limits. A host that starts later gets them too. The tables
        [http] and [keys] stay in the file; [cluster] says where to publish. Needs the extra **redis**.

        **Exit code**: 0; 2 when the file or the store cannot be used; then nothing is published.
        """
        errors = Console(stderr=True)
        with answering(errors, quotas):
            loaded = load_quotas(quotas)
            if not loaded and not loaded.patterns:
                raise ValueError(f'{quotas} names no model and no pattern; give it a table [models."<id>"]')
        with open_store(errors, redis, namespace, loaded.cluster) as store:
            version = publish(store, loaded)
        Console().print(
            f"published {counted(len(loaded), 'model')} and {counted(len(loaded.patterns), 'pattern')} "
            f"as version {version}",
            highlight=False,
        )

    @app.command("nodes")
    def nodes(redis: Redis = None, namespace: Namespace = None, as_json: _Json = False) -> None:
        """List the hosts of a cluster, and those that are gone while their shares are not free yet.

        Needs the extra **redis**. **Exit code**: 0; 2 when the store cannot be used.
        """
        with open_store(Console(stderr=True), redis, namespace) as store:
            state = read_cluster(store)
        if as_json:
            print(json.dumps([asdict(node) for node in state.nodes], indent=2))
            return
        _print_nodes(state, Console())

    @app.command("forget")
    def forget_(
        node: Annotated[str, typer.Argument(metavar="NODE", help="Its id, or the beginning of it.")],
        redis: Redis = None,
        namespace: Namespace = None,
        yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    ) -> None:
        """Free at once what a host that is gone still holds, instead of when it has aged out.

        More than a limit may be admitted: what the host had used within the window is no longer counted, nor what it
        still admits if it runs and only does not reach the store. Asks first. Needs the extra **redis**.

        **Exit code**: 0; 1 when there is no such host, or the answer was no; 2 when the host is live, or the store
        cannot be used.
        """
        errors = Console(stderr=True)
        with open_store(errors, redis, namespace) as store:
            found = [each for each in read_cluster(store).nodes if each.node_id.startswith(node)]
            exact = [each for each in found if each.node_id == node]
            if len(exact or found) != 1:
                problem = f"{len(found)} hosts begin with it" if found else "there is no such host"
                raise unusable(errors, f"{escaped(node)}: {problem}; `modelquota nodes` lists them", EXIT_NO)
            (chosen,) = exact or found
            if chosen.live:
                raise unusable(errors, f"{escaped(chosen.node_id)} is live: stop it, and its lease ends")
            if not yes:
                left = duration(1000 * chosen.seconds)
                say(errors, f"what {chosen.node_id} has used is counted for {left} more; without it, more than a limit "
                    "may be admitted")  # fmt: skip
                if not typer.confirm("Forget it?", err=True):
                    raise typer.Exit(EXIT_NO)
            if not forget(store, chosen.node_id):
                raise unusable(errors, f"{escaped(node)}: there is no such host any more", EXIT_NO)
        Console().print(f"forgotten: {escaped(chosen.node_id)}", highlight=False, markup=False)


def print_cluster(store: RedisStore, as_json: bool) -> float:
    """Print what all hosts use against limits; return the highest use of a limit, in percent, or 0."""
    state = read_cluster(store)
    highest = max((_percent(limit) for limit in state.limits), default=0.0)
    if as_json:
        print(json.dumps(asdict(state), indent=2))
        return highest
    console = Console()
    if state.limits:
        console.print(_limits_table(sorted(state.limits, key=_percent, reverse=True)))
    else:
        console.print("no host has a share of a limit")
    _print_nodes(state, console)
    if state.learning_seconds:
        console.print(
            f"the store learns what hosts hold: it grants nothing for {duration(1000 * state.learning_seconds)}"
        )
    return highest


def _limits_table(limits: list[LimitState]) -> Lines:
    def numbers(name: str) -> list[str]:
        return [short(getattr(limit, name)) for limit in limits]

    names = [printable(limit.model_id) for limit in limits]
    return Lines(
        [
            Column("model", names, lambda row: "bold", cut=True, most=28),
            Column("limit", [limit.limit.replace("_", " ") for limit in limits], cut=True),
            Column("%", [f"{_percent(limit):.0f}" for limit in limits], right=True),
            Column("used", numbers("used"), right=True),
            Column("of", numbers("whole"), right=True),
            Column("shares", numbers("shares"), right=True),
            Column("ghosts", numbers("ghosts"), right=True),
            Column("free", numbers("free"), right=True),
        ]
    )


def _print_nodes(state: ClusterState, console: Console) -> None:
    live = sum(node.live for node in state.nodes)
    if state.nodes:
        columns: dict[str, Any] = {
            "node": [printable(node.node_id) for node in state.nodes],
            "state": ["live" if node.live else "ghost" for node in state.nodes],
            "for": [duration(1000 * node.seconds) for node in state.nodes],
            "models": [str(node.models) for node in state.nodes],
        }
        console.print(Lines([Column(heading, texts, right=heading == "models") for heading, texts in columns.items()]))
    console.print(f"{live} live, {len(state.nodes) - live} ghosts", style="dim")


def _percent(limit: LimitState) -> float:
    return 100 * limit.used / limit.whole if limit.whole else 0.0
