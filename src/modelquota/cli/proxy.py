"""The command `modelquota proxy`: quotas in front of a server that takes no Python. Needs the extra `proxy`."""

import contextlib
import logging
import signal
import sys

import uvicorn
from rich.console import Console

from modelquota.asgi.proxy import Dated
from modelquota.asgi.quota import Quota
from modelquota.asgi.settings import Settings
from modelquota.cli.format import printable
from modelquota.cli.processes import listening, run_in_processes

__all__ = ["serve_proxy"]

SHUTDOWN_SECONDS = 30
KEEP_ALIVE_SECONDS = 75


def serve_proxy(
    console: Console,
    protected: Quota,
    settings: Settings,
    upstream: str,
    *,
    host: str,
    port: int,
    workers: int,
    access_log: bool,
) -> None:
    """Serve a proxy behind quotas until Ctrl-C or SIGTERM; open requests get a while to end.

    Raises OSError if it cannot listen at the address.
    """
    config = uvicorn.Config(
        Dated(protected),
        log_level="info" if access_log else "warning",
        access_log=access_log,
        ws="none",
        lifespan="on",
        server_header=False,  # those of the server behind are passed on
        date_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    with listening(host, port) as listener:
        _show_log(logging.INFO if access_log else logging.WARNING)
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{listener.getsockname()[1]}"
        page, admin = settings.http.get("page"), settings.http.get("admin")
        lines = [
            f"{address} passes on to {upstream}, with the quotas of {settings.quotas}",
            f"their state is in {settings.state}"
            + (f"; live page: {address}{page}" if page else "")
            + (f"; admin API: {address}{admin}" if admin else ""),
            "Ctrl-C stops it.",
        ]
        for line in lines:
            console.print(printable(line), markup=False, highlight=False, soft_wrap=True)

        def run() -> None:
            with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has shut down
                uvicorn.Server(config).run(sockets=[listener])

        if workers == 1:
            # uvicorn sends itself the signal again once it has shut down
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
            run()
        else:
            run_in_processes(workers, run)


def _show_log(level: int) -> None:
    """Show what passes uncounted, why a file is not loaded, who changes limits: uvicorn shows only its own log."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s:     %(message)s"))
    logger = logging.getLogger("modelquota")
    logger.addHandler(handler)
    logger.setLevel(level)
