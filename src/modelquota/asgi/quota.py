"""`Quota`: the middleware for servers that take a class and pass no arguments; the environment configures it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from modelquota._extras import extra
from modelquota.asgi.admin import TOKEN_ACCEPTED
from modelquota.asgi.identity import identity_of
from modelquota.asgi.middleware import QuotaMiddleware
from modelquota.asgi.refusal import send_answer
from modelquota.asgi.settings import Settings
from modelquota.asgi.types import ASGIApp, Receive, Scope, Send
from modelquota.cluster import RedisStore
from modelquota.control.reload import QuotaReloader
from modelquota.errors import QuotaConfigError, QuotaError
from modelquota.manager import ResourceQuotaManager
from modelquota.protocols.paths import below_root
from modelquota.protocols.refusal import Refusal, RefusalKind
from modelquota.protocols.tables import TABLES
from modelquota.quota.file import Quotas

if TYPE_CHECKING:
    from modelquota.monitoring.ledger import Ledger

logger = logging.getLogger("modelquota")

_LOOK_SECONDS: Final = 1.0

# Fields of [http] that are parameters of the middleware, with the same names and values.
_PASSED_ON: Final = (
    "routes", "identity_namespace", "default_model", "unknown_model", "unrouted", "default_output_tokens", "at_limit",
    "cancel_on_disconnect", "max_body_bytes", "max_inflight_bytes", "body_timeout", "headers", "retry_spread",
    "busy_retry_seconds", "page", "admin",
)  # fmt: skip


class Guard:
    """The manager of a quota file, and what follows the file: limits and names of keys.

    The file is looked at when a request comes, at most once a second, so that there is no thread and nothing to start
    again after a fork. The request that finds it changed waits until it is loaded, in a thread.

    Raises what `load_quotas` and `ResourceQuotaManager` raise.
    """

    def __init__(self, quotas: Path, state: Path, cluster: Mapping[str, Any] | None = None) -> None:
        self.path = quotas
        store = None if cluster is None else RedisStore(**cluster)
        self.manager = ResourceQuotaManager(path=state, cluster=store)
        self._reloader = QuotaReloader(self.manager, quotas)
        self._loading = threading.Lock()
        self._stamp = self._read_stamp()
        self._next_look = 0.0
        self.ledger: Ledger | None = None
        error = self._reloader.reload().error
        if error is not None:
            self.manager.close()
            raise error

    @property
    def quotas(self) -> Quotas:
        """The quota file as it was last loaded."""
        return self._reloader.quotas

    def due(self) -> bool:
        """Whether the file has changed since it was last loaded; looks at most once a second."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _LOOK_SECONDS
        return self._read_stamp() != self._stamp

    def reload(self) -> None:
        """Load the file again; if it is not accepted, everything stays as it is and the log says why."""
        with self._loading:
            stamp = self._read_stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            before = {"http": self.quotas.http, "cluster": self.quotas.cluster}
            if self._reloader.reload().error is not None:
                return
            for table, fields in before.items():
                if getattr(self.quotas, table) != fields:
                    logger.warning("[%s] of %s has changed: it takes effect after a restart", table, self.path)

    def _read_stamp(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self.path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def middleware(self, app: ASGIApp, http: Mapping[str, Any], parameters: Mapping[str, Any]) -> QuotaMiddleware:
        """Return the middleware for an application, as the fields of ``[http]`` say; `parameters` go before them."""
        chosen = {name: http[name] for name in _PASSED_ON if name in http}
        if "identity" in http:
            refuse = http.get("unknown_key") == "refuse"
            chosen["identity"] = identity_of(
                http["identity"], lambda: self.quotas.key_names, refuse_unknown_keys=refuse
            )
        if "ledger" in http:
            if self.ledger is None:
                from modelquota.monitoring.ledger import Ledger

                self.ledger = Ledger(http["ledger"])
            chosen["ledger"] = self.ledger
        return QuotaMiddleware(app, self.manager, **{**chosen, **parameters})


_guards: dict[tuple[Path, Path, object], Guard] = {}
_guards_lock = threading.Lock()


def guard_of(settings: Settings) -> Guard:
    """Return the guard of a quota file and a state file: the same one for all applications of a process."""
    cluster = settings.cluster
    key = settings.quotas, settings.state, None if cluster is None else frozenset(cluster.items())
    with _guards_lock:
        if key not in _guards:
            _guards[key] = Guard(settings.quotas, settings.state, cluster)
        return _guards[key]


class Quota:
    """ASGI middleware without arguments: `QuotaMiddleware` with what the environment and a quota file say.

    The variable ``MODELQUOTA_QUOTAS`` names the quota file. Its table ``[http]`` has the other settings; the variables
    ``MODELQUOTA_STATE``, ``MODELQUOTA_PAGE``, ``MODELQUOTA_METRICS``, ``MODELQUOTA_LEDGER``, ``MODELQUOTA_ADMIN`` and
    ``MODELQUOTA_ADMIN_TOKEN_FILE`` go before its fields ``state``, ``page``, ``metrics``, ``ledger``, ``admin`` and
    ``admin_token_file``, and ``MODELQUOTA_ADMIN_TOKEN`` before the file with the token. Limits and the names of keys
    follow the file while the server runs.

    All processes of a server share their limits in the state file; with ``MODELQUOTA_REDIS_URL``, or a table
    ``[cluster]`` in the quota file, all hosts share them in that Redis or Valkey, see `modelquota.cluster.RedisStore`.
    By default the state file is in the user's run
    directory, which a reboot empties.

    Parameters
    ----------
    app : ASGI application
        The application to protect.
    settings : Settings, optional
        Instead of what the environment says.
    parameters : mapping, optional
        Parameters of `QuotaMiddleware`, which go before the file.

    Raises
    ------
    QuotaConfigError
        A variable, or something in the quota file, is not accepted; with file, line and field. Servers that create
        their middleware only when they start are told at their start, by the lifespan protocol of ASGI, and end.
    OSError
        The quota file, the state file or the ledger cannot be opened.
    ImportError
        ``metrics`` is set and `prometheus_client` is not installed.

    Examples
    --------
    ``MODELQUOTA_QUOTAS=quotas.toml vllm serve MODEL --middleware modelquota.asgi.Quota``; in an application of your
    own, ``app.add_middleware(Quota)``.
    """

    def __init__(
        self, app: ASGIApp, settings: Settings | None = None, parameters: Mapping[str, Any] | None = None
    ) -> None:
        self.app = app
        self._error: Exception | None = None
        self._metrics: Callable[[], bytes] | None = None
        try:
            chosen = Settings.read() if settings is None else settings
            self._guard = guard_of(chosen)
            self._metrics_path: str | None = chosen.http.get("metrics")
            parameters = _with_token(parameters or {}, chosen)
            self._middleware = self._guard.middleware(app, chosen.http, parameters)
            admin = self._middleware.admin_path
            if admin is not None and f"{self._metrics_path}/".startswith(f"{admin}/"):
                accepted = f"a path that is not in that of the admin API, {admin}"
                raise QuotaConfigError("metrics", self._metrics_path, accepted)
            if self._metrics_path is not None:
                self._metrics = _metrics_of(self._guard.manager)
        except (QuotaError, OSError, ImportError) as error:
            # An application that creates its middleware at its first message would answer every request with 500.
            if not _in_event_loop():
                raise
            logger.critical("the quotas cannot be used, no request is served: %s", error)
            self._error = error

    @property
    def manager(self) -> ResourceQuotaManager:
        """The manager that decides."""
        return self._guard.manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if self._error is not None:
            await _refuse_to_start(self._error, scope, receive, send)
            return
        if scope["type"] == "http":
            if self._guard.due():
                await asyncio.to_thread(self._guard.reload)
            if (
                self._metrics is not None
                and below_root(scope["path"], scope.get("root_path", "")) == self._metrics_path
            ):
                await _send_metrics(self._metrics, scope, send)
                return
        await self._middleware(scope, receive, send)


def _with_token(parameters: Mapping[str, Any], settings: Settings) -> Mapping[str, Any]:
    """Return the parameters with the token of the admin API, if there is one."""
    if "admin_token" in parameters or "admin" not in settings.http.keys() | parameters.keys():
        return parameters
    if settings.admin_token is None:
        accepted = f"{TOKEN_ACCEPTED}; or name its file in MODELQUOTA_ADMIN_TOKEN_FILE or admin_token_file"
        raise QuotaConfigError("MODELQUOTA_ADMIN_TOKEN", None, accepted)
    return {"admin_token": settings.admin_token, **parameters}


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _refuse_to_start(error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.failed", "message": str(error)})
    elif scope["type"] == "http":
        message = "the quotas of this server cannot be used; its log says why"
        await _refuse(Refusal(RefusalKind.OVERLOADED, 503, message, "quotas_unusable"), send)
    else:
        raise error


async def _refuse(refusal: Refusal, send: Send) -> None:
    await send_answer(TABLES["openai"].refuse(refusal, []), send)


def _metrics_of(manager: ResourceQuotaManager) -> Callable[[], bytes]:
    with extra("prometheus", "prometheus_client"):
        from prometheus_client import CollectorRegistry, generate_latest

        from modelquota.monitoring.prometheus import QuotaCollector
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    return lambda: generate_latest(registry)


async def _send_metrics(read: Callable[[], bytes], scope: Scope, send: Send) -> None:
    if scope["method"] not in ("GET", "HEAD"):
        await _refuse(Refusal(RefusalKind.INVALID, 405, "read-only"), send)
        return
    body = await asyncio.to_thread(read)
    headers = [
        (b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),
        (b"content-length", b"%d" % len(body)),
    ]
    with contextlib.suppress(OSError):  # the client has disconnected
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})
