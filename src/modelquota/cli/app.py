"""The typer application: arguments, help and exit codes of the commands of `modelquota`."""

import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelquota import ResourceQuotaManager, __version__
from modelquota.cli import cluster, docs, manage, statefile, tune, tuning, usage
from modelquota.cli.demo import run_demo
from modelquota.cli.errors import answering, quiet_log, unusable
from modelquota.quota.file import load_quotas
from modelquota.reading.view import QuotaView

__all__ = ["app", "run"]

app = typer.Typer(
    name="modelquota",
    help="Per-model resource quotas for inference: try limits on recorded traffic, live, or over HTTP.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on `arguments` (those of the process by default) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        # A model id that the terminal's encoding cannot show is not a reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        app(args=None if arguments is None else list(arguments), prog_name="modelquota")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modelquota {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command("demo")
def _demo(
    seconds: Annotated[float, typer.Option(min=0.1, max=86_400, help="How long to run.")] = 10.0,
    threads: Annotated[int, typer.Option(min=1, max=64, help="Threads that send requests.")] = 4,
    seed: Annotated[
        int | None, typer.Option(help="Generate the same request sizes and arrival times in every run with this seed.")
    ] = None,
) -> None:
    """Watch quotas at work: a live inference loop with generated traffic, nothing to configure.

    Threads send requests for four models, one for each action on a violation, on the real clock;
    sizes and mix follow production traces. Ctrl-C ends it early, with the closing report.
    """
    with quiet_log():
        run_demo(Console(), seconds=seconds, threads=threads, seed=seed)


@app.command("serve-demo")
def _serve_demo(
    host: Annotated[str, typer.Option(help="Address to listen on. Anyone who can connect can use it.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 chooses a free one.")] = 8000,
    quotas: Annotated[
        Path | None,
        typer.Option("--quotas", "-q", metavar="QUOTAS.toml", help="Models to serve, instead of the example's."),
    ] = None,
    speed: Annotated[
        float, typer.Option("--speed", "-s", min=0.1, max=100_000, help="Tokens per second of the mock model.")
    ] = 20.0,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that serve, sharing one set of limits.")] = 1,
    path: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="State file, created if missing; usage survives restarts."),
    ] = None,
    trust_file: manage.TrustFile = False,
    redis: cluster.Redis = None,
    namespace: cluster.Namespace = None,
) -> None:
    """Try quotas over HTTP: a mock OpenAI-compatible server, with waiting, 429s, headers and a live page.

    Prints commands to try with curl; the openai package works as well. The page is at /quota. Needs the
    extra **asgi**. With **--redis**, or a table [cluster] in the file, it shares its limits with all others that use
    the same store and namespace (extra **redis**).

    **Exit code**: 0 when it was stopped; 2 when an argument or a file cannot be used, or the address is taken.
    """
    errors = Console(stderr=True)
    try:
        from modelquota.cli.serve import serve_demo
        from modelquota.demo.quotas import QUOTAS, demo_manager
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("starlette", "uvicorn", "anyio"):
            raise
        raise unusable(errors, "serve-demo needs the extra 'asgi': pip install 'modelquota[asgi]'") from None
    with quiet_log():
        with answering(errors, quotas):
            loaded = None if quotas is None else load_quotas(quotas)
            chosen = None if loaded is None else list(loaded.values())
        with answering(errors, path):
            table = None if loaded is None else loaded.cluster
            shares = redis is not None or table is not None
            store = cluster.make_store(errors, redis, namespace, table) if shares else None
            manager = demo_manager(
                QUOTAS if chosen is None else chosen, path=path, trust_file=trust_file, cluster=store
            )
            manager.default_quota = loaded.patterns if loaded else None
        try:
            serve_demo(
                Console(), manager, host=host, port=port, quotas=chosen, tokens_per_second=speed, workers=workers
            )
        except OSError as error:
            raise unusable(errors, f"cannot listen at {host}, port {port}: {error.strerror or error}") from None


@app.command("proxy")
def _proxy(
    upstream: Annotated[
        str, typer.Option("--upstream", "-u", metavar="URL", help="The server to pass on to: http://127.0.0.1:8000.")
    ],
    quotas: Annotated[
        Path | None,
        typer.Option(
            "--quotas",
            "-q",
            metavar="QUOTAS.toml",
            help="Limits, and settings. By default $MODELQUOTA_QUOTAS.",
        ),
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="State file, created if missing. By default in the user's run directory."),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port; 0 chooses a free one.")] = 8080,
    page: Annotated[str | None, typer.Option(metavar="PATH", help="Show the live page at this path.")] = None,
    metrics: Annotated[str | None, typer.Option(metavar="PATH", help="Metrics for Prometheus at this path.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A line for each request in this file, for billing and tuning.")
    ] = None,
    admin: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="The admin API at this path; its token is in $MODELQUOTA_ADMIN_TOKEN."),
    ] = None,
    admin_token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The file with that token, instead of the variable.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Processes that serve, sharing one set of limits.")] = 1,
    max_connections: Annotated[
        int, typer.Option(min=1, max=65_535, help="Connections to the server at once, of each process.")
    ] = 1000,
    connect_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="To establish a connection to the server.")
    ] = 5.0,
    read_timeout: Annotated[
        float, typer.Option(min=0.001, metavar="SECONDS", help="Until its answer begins, and between two pieces of it.")
    ] = 600.0,
    access_log: Annotated[bool, typer.Option(help="Log each request.")] = True,
) -> None:
    """Put quotas in front of a model server that takes no Python, such as Ollama or llama.cpp's.

    A reverse proxy with the same middleware: it counts requests, makes them wait or denies them, and settles what
    their answers report. Streams pass as they come. Needs the extra **proxy**.

    **Exit code**: 0 when it was stopped; 2 when an argument or a file cannot be used, or the address is taken.
    """
    errors = Console(stderr=True)
    try:
        from modelquota.asgi.proxy import UPSTREAM_CHARGES, ReverseProxy
        from modelquota.asgi.quota import Quota
        from modelquota.asgi.settings import Settings
        from modelquota.cli.proxy import serve_proxy
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] not in ("httpx", "uvicorn"):
            raise
        raise unusable(errors, "proxy needs the extra 'proxy': pip install 'modelquota[proxy]'") from None
    with answering(errors, quotas):
        proxy = ReverseProxy(
            upstream, connect_timeout=connect_timeout, read_timeout=read_timeout, max_connections=max_connections
        )
        given = {"quotas": quotas, "state": state, "ledger": ledger, "admin_token_file": admin_token_file}
        texts = {name: None if path is None else str(path) for name, path in given.items()}
        settings = Settings.read(os.environ, **texts, page=page, metrics=metrics, admin=admin)
    with answering(errors, settings.state):
        protected = Quota(proxy, settings, {"charge": UPSTREAM_CHARGES})
    try:
        serve_proxy(
            Console(), protected, settings, str(proxy.upstream), host=host, port=port, workers=workers,
            access_log=access_log,
        )  # fmt: skip
    except OSError as error:
        raise unusable(errors, f"cannot listen at {host}, port {port}: {error.strerror or error}") from None


@contextmanager
def _open_manager(path: Path, trust_file: bool) -> Iterator[ResourceQuotaManager]:
    """Open an existing state file: a mistyped path must not create one."""
    os.stat(path)
    with quiet_log():
        yield ResourceQuotaManager(path=path, trust_file=trust_file)


def _open_view(path: Path, trust_file: bool) -> QuotaView:
    return ResourceQuotaManager.open_readonly(path, trust_file=trust_file)


tuning.add_commands(app)
tune.add_commands(app)
usage.add_commands(app)
manage.add_commands(app, _open_manager, _open_view)
statefile.add_commands(app)
cluster.add_commands(app)
docs.add_commands(app)
