"""`QuotaMiddleware`: holds a grant for the life of each request. Plain ASGI; needs only the standard library."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal

from modelquota.asgi.body import BodyReader, BodyRefusedError
from modelquota.asgi.charge import Charge, ChargeTable
from modelquota.asgi.exchange import Exchange, close_unanswered
from modelquota.asgi.ids import DecidingIds, Identity
from modelquota.asgi.ratelimit import HeaderStyle, LimitHeaders
from modelquota.asgi.refusal import Refuser, send_answer
from modelquota.asgi.request import Demand, IncomingRequest
from modelquota.asgi.routes import DEFAULT_OUTPUT_TOKENS, ReadDemand, RouteEntry, Routes, route_table
from modelquota.asgi.types import ASGIApp, Receive, Scope, Send
from modelquota.protocols.body import LARGE
from modelquota.protocols.paths import below_root
from modelquota.protocols.request import Reading, RequestRefusedError
from modelquota.protocols.tables import TABLES
from modelquota.quota.config import MAX_COUNT
from modelquota.quota.tokens import Tokens
from modelquota.reading.unmetered import unmetered_of

if TYPE_CHECKING:
    from modelquota.asgi.admin import QuotaAdmin
    from modelquota.asgi.page import QuotaPage
    from modelquota.manager import ResourceQuotaManager
    from modelquota.monitoring.ledger import Ledger

_NOTHING: Final[Mapping[str, str]] = {}


class QuotaMiddleware:
    """ASGI middleware that acquires a grant for each request to a model, and settles it by the tokens really used.

    A request waits as the action of its model says (`ResourceQuotaManager.acquire_async`) without blocking the loop. A
    denied request is answered in the shape of its protocol, with the time after which a retry is admitted. The grant is
    settled by what the response reports, or else by what passed, also in a stream, and released with the last byte, or
    when the application returns. ``modelquota docs http`` has all of it.

    Parameters
    ----------
    app : ASGI application
        The application to protect. Its responses must be uncompressed: add compression outside of this middleware.
    manager : ResourceQuotaManager
        The manager that decides.
    routes : str, mapping, or several of both, optional
        Which requests are counted: names of tables (``"openai"``, ``"anthropic"``, ``"azure"``, ``"gemini"``,
        ``"vllm"``, ``"sglang"``, ``"ollama"``), and mappings from paths below the mount point, in which ``{model}`` can
        represent the model, to a callable that returns the `Demand` of an `IncomingRequest`, or None to let it pass; it
        may be a coroutine function, and may raise `RequestRefusedError`. By default all tables.
    unrouted : "pass", "refuse" or callable
        What to do with a POST that no route covers: pass it on, and count and log that; answer 404; or read it as a
        route would. A WebSocket is passed on, counted and logged, or with ``"refuse"`` closed.
    unknown_model : str
        What to do with a model that has no quota: ``"pass"`` it on, ``"refuse"`` it with 404, or the id that decides
        for all of them. With ``"pass"`` it is still up to the manager's `default_quota`.
    default_model : str, optional
        The model of requests that name none; without it they are answered with 400.
    identity : callable, optional
        Given the `IncomingRequest`, returns None, or one or more ids, such as tenant and user, that must admit together
        with the model. It too may be a coroutine function and may raise `RequestRefusedError`. Error messages and the
        page show ids: do not use a secret, such as an API key, as one.
    identity_namespace : str
        Is put in front of what `identity` returns, so that a client cannot name a tenant as its model.
    page : str, optional
        A path, such as ``"/quota"``, at which to show `QuotaPage`. By default there is no page.
    allow_page : callable, optional
        Decides which requests may see the page, as for `QuotaPage`. By default anyone who can connect.
    admin, admin_token : str, optional
        A path, such as ``"/quotas"``, at which `QuotaAdmin` reads and changes quotas, and the token that it asks for.
        By default there is none.
    default_output_tokens : int
        The guess for an output without a bound. It never makes a request impossible.
    max_body_bytes, max_inflight_bytes : int
        The most bytes of one body (otherwise 413), and of all bodies together (otherwise 503).
    body_timeout : float
        Seconds in which a body has to arrive (otherwise 408).
    usage : callable, optional
        Given a parsed response, or a parsed event of a stream, returns the `Tokens` that it reports, or None: for
        shapes that the protocol does not have.
    chunk_tokens : callable, optional
        Given the data of a server-sent event, returns its tokens, instead of what the protocol counts: used if a stream
        reports no usage.
    charge : mapping, optional
        What responses cost, by status (``404``) or class (``"5xx"``): ``"nothing"``, ``"request"`` or ``"usage"``. By
        default nothing for 3xx, 401, 403, 404 and 405, the request for other errors.
    at_limit : "finish" or "stop"
        Whether a stream that runs past its limits goes on, or ends with the protocol's own last events.
    headers : "all", "openai" or "none"
        Which headers report what is left: those of the protocol and the IETF's, only ``x-ratelimit-*``, or none.
    retry_spread : float
        The largest part of a wait that is added to ``retry-after`` at random, so that clients that were denied together
        do not return together.
    busy_retry_seconds : int
        ``retry-after`` if memory or concurrency is the obstacle, so that no time is known.
    ledger : Ledger, optional
        Gets a line for each request that the quotas admit or deny. By default there is none, which costs nothing.
    cancel_on_disconnect : bool
        Whether the application's task is canceled when the client disconnects. Work that it does in a thread goes on,
        no longer under the grant. By default the application only receives ``http.disconnect``.

    Examples
    --------
    With Starlette or FastAPI: ``app.add_middleware(QuotaMiddleware, manager=manager)``.
    """

    def __init__(
        self,
        app: ASGIApp,
        manager: ResourceQuotaManager,
        *,
        routes: Routes | None = None,
        unrouted: Literal["pass", "refuse"] | ReadDemand = "pass",
        unknown_model: str = "pass",
        default_model: str | None = None,
        identity: Identity | None = None,
        identity_namespace: str = "tenant/",
        page: str | None = None,
        allow_page: Callable[[Scope], bool | Awaitable[bool]] | None = None,
        admin: str | None = None,
        admin_token: str | None = None,
        default_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
        max_body_bytes: int = 32 << 20,
        max_inflight_bytes: int = 512 << 20,
        body_timeout: float = 30.0,
        usage: Callable[[Any], Tokens | None] | None = None,
        chunk_tokens: Callable[[bytes], int] | None = None,
        charge: Mapping[int | str, Charge] | None = None,
        at_limit: Literal["finish", "stop"] = "finish",
        headers: HeaderStyle = "all",
        retry_spread: float = 0.1,
        busy_retry_seconds: int = 2,
        ledger: Ledger | None = None,
        cancel_on_disconnect: bool = False,
    ) -> None:
        if unrouted not in ("pass", "refuse") and not callable(unrouted):
            raise ValueError(f"unrouted is {unrouted!r}; accepted are 'pass', 'refuse' and a callable")
        if at_limit not in ("finish", "stop"):
            raise ValueError(f"at_limit is {at_limit!r}; accepted are 'finish' and 'stop'")
        if not 0 <= retry_spread <= 1:
            raise ValueError(f"retry_spread is {retry_spread!r}; give a number from 0 to 1")
        if not 0 < max_body_bytes <= max_inflight_bytes:
            raise ValueError(
                f"max_body_bytes is {max_body_bytes!r} and max_inflight_bytes {max_inflight_bytes!r}; "
                "give 1 or more, and for all bodies at least as much as for one"
            )
        if not body_timeout > 0:
            raise ValueError(f"body_timeout is {body_timeout!r}; give a number of seconds above 0")
        self.app = app
        self.manager = manager
        self.identity = identity
        self.page_path = None if page is None else page.rstrip("/") or "/"
        self._page: QuotaPage | None = None
        self.admin_path: str | None = None
        self._admin: QuotaAdmin | None = None
        from_page: str | None = None
        if admin is not None or admin_token is not None:
            from modelquota.asgi.admin import QuotaAdmin, admin_path, require_token

            self.admin_path, from_page = admin_path(admin, self.page_path)
            self._admin = QuotaAdmin(manager, token=require_token("admin_token", admin_token))
        if page is not None:
            from modelquota.asgi.page import QuotaPage

            self._page = QuotaPage(manager, allow=allow_page, admin=from_page)
        self.default_output_tokens = default_output_tokens
        self.usage = usage
        self.chunk_tokens = chunk_tokens
        self.charges = ChargeTable(charge)
        self.ledger = ledger
        self.stops_at_limit = at_limit == "stop"
        self.cancel_on_disconnect = cancel_on_disconnect
        self.bodies = BodyReader(max_body_bytes, max_inflight_bytes, body_timeout)
        self.limit_headers = LimitHeaders(manager, headers)
        self.refuser = Refuser(manager, busy_retry_seconds, retry_spread, identity_namespace)
        self.ids = DecidingIds(manager, identity, identity_namespace, unknown_model, default_model)
        self._routes = route_table(routes)
        self._unrouted = (RouteEntry(unrouted, TABLES["openai"]), _NOTHING) if callable(unrouted) else None
        self._refuses_unrouted = unrouted == "refuse"
        self._unmetered = unmetered_of(manager)
        self._parser: tuple[int, ThreadPoolExecutor] | None = None

    @property
    def unmetered(self) -> dict[str, int]:
        """How many POSTs and WebSockets no quota counted, by path; of all middlewares of this manager."""
        return self._unmetered.counts()

    def count_unmetered(self, path: str, why: str, kind: str = "POST") -> None:
        """Count a request that passes without being counted by any quota; the first one of a path is logged."""
        self._unmetered.count(path, why, kind)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            if scope["type"] == "websocket" and not await self._lets_pass(scope, receive, send):
                return
            await self.app(scope, receive, send)
            return
        path: str = scope["path"]
        root: str = scope.get("root_path", "")
        whole = path
        if root:
            path = below_root(path, root)
        if self._page is not None and (path.rstrip("/") or "/") == self.page_path:
            await self._page(scope, receive, send)
            return
        if self._admin is not None and f"{path}/".startswith(f"{self.admin_path}/"):
            await self._admin.serve(path.removeprefix(self.admin_path or ""), scope, receive, send)
            return
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        found = self._routes.find(path) or (self._routes.find(whole) if root else None) or self._unrouted
        if found is None and self._refuses_unrouted:
            error = RequestRefusedError(404, f"there is nothing at POST {path}", "unknown_path")
            await send_answer(self.refuser.not_accepted(error, TABLES["openai"]), send)
            return
        if found is None:
            self.count_unmetered(path, "no route covers it (routes=, unrouted=)")
            await self.app(scope, receive, send)
            return
        entry, params = found
        operation = entry.operation
        if operation is not None and operation.free:
            await self.app(scope, receive, send)
            return
        fields: dict[bytes, bytes] = dict([*scope.get("headers", ())][::-1])  # of several of a name, the first
        bodies = self.bodies
        try:
            coming = bodies.start(fields.get(b"content-length"), receive)
            body = coming if isinstance(coming, bytes) else await coming
        except BodyRefusedError as error:
            close = error.more and not await bodies.drain(scope, receive)
            close = close and scope.get("http_version", "1.1").startswith("1")
            # The unread rest of a body must not be parsed as the next request; HTTP/2 has no such header.
            await send_answer(self.refuser.not_accepted(error, entry.protocol, close=close), send)
            return
        if body is None:
            await close_unanswered(send)
            return
        try:
            exchange = Exchange(self, scope, receive, send, body, entry.protocol, path)
            reading = None
            small = len(body) < LARGE and b"content-encoding" not in fields
            plain = small and fields.get(b"content-type", b"").startswith(b"application/json")
            if plain and operation is not None and operation.skim is not None:
                reading = operation.skim(body, params)
            try:
                if reading is not None and self.identity is None:
                    asked = self._of_reading(entry, reading, ())
                else:
                    request = IncomingRequest(scope, body, params, fields=fields, max_body_bytes=bodies.max_body_bytes)
                    asked = await self._asked(entry, request, reading, small=small)
            except RequestRefusedError as error:
                await send_answer(self.refuser.not_accepted(error, entry.protocol), send)
                return
            if asked is None:
                self.count_unmetered(path, "no quota decides on it")
                await self.app(scope, exchange.receive, send)
            else:
                await exchange.run(*asked)
        finally:
            bodies.release(body)

    async def _lets_pass(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Whether a WebSocket passes, none of whose messages is counted; as a POST that no route covers."""
        path = below_root(scope["path"], scope.get("root_path", ""))
        if self._refuses_unrouted:
            await receive()
            await send({"type": "websocket.close"})
            return False
        self.count_unmetered(path, "WebSockets are not counted (unrouted=)", "WebSocket")
        return True

    async def _asked(
        self, entry: RouteEntry, request: IncomingRequest, reading: Reading | None, *, small: bool
    ) -> _Asked | None:
        """What a request asks for that the straight way does not tell."""
        if entry.operation is None:
            return await self._asked_by_route(entry, request, small)
        if reading is None:
            if small:
                reading = entry.operation.read(request.json(), request.params)
            else:
                reading = await self._in_thread(entry, request)
        tenants = await self.ids.tenants(request) if self.identity is not None else ()
        return self._of_reading(entry, reading, tenants)

    def _of_reading(self, entry: RouteEntry, reading: Reading, tenants: tuple[str, ...]) -> _Asked | None:
        model_id = self.ids.of_model(reading.model)
        ids: str | tuple[str, ...]
        if not tenants:
            if model_id is None:
                return None
            ids = model_id
        else:
            ids = tenants if model_id is None else (*tenants, model_id)
            ids = ids[0] if len(ids) == 1 else ids
        _, prompt_tokens, outputs, bound, _, priority = reading
        if bound is not None or not outputs:
            tokens = min(prompt_tokens + outputs * (bound or 0), MAX_COUNT)
        else:
            default = entry.default_output_tokens
            default = self.default_output_tokens if default is None else default
            tokens = reading.estimate(default, self.ids.most_tokens(ids))
        return ids, tenants, tokens, prompt_tokens, outputs, 0, 0, None, priority

    async def _asked_by_route(self, entry: RouteEntry, request: IncomingRequest, small: bool) -> _Asked | None:
        """What a route of the user's own asks for."""
        assert entry.read is not None
        if not small:
            await self._in_thread(None, request)
        made = entry.read(request)
        demand = made if made is None or isinstance(made, Demand) else await made
        if demand is None:
            return None
        tenants = await self.ids.tenants(request) if self.identity is not None else ()
        models = tuple([found for name in demand.model_ids if (found := self.ids.of_model(name)) is not None])
        ids = tuple(dict.fromkeys(tenants + models))
        if not ids:
            return None
        tokens = demand.estimated_tokens
        if demand.guessed_tokens:
            most = self.ids.most_tokens(ids)
            if most is not None and tokens > most:
                tokens = max(most, tokens - demand.guessed_tokens)
        return (
            ids[0] if len(ids) == 1 else ids,
            tenants,
            min(tokens, MAX_COUNT),
            demand.prompt_tokens,
            1,
            demand.ram_needed_mb,
            demand.ssd_needed_mb,
            demand.timeout,
            demand.priority,
        )

    async def _in_thread(self, entry: RouteEntry | None, request: IncomingRequest) -> Reading:
        """Parse and read a large request while the loop goes on; one at a time, since each takes a processor."""
        parser = self._parser
        if parser is None or parser[0] != os.getpid():  # a forked process has no thread of its parent's
            self._parser = parser = (os.getpid(), ThreadPoolExecutor(1, "modelquota-parser"))

        def read() -> Reading:
            body = request.json()
            if entry is None or entry.operation is None:
                return Reading(None, 0)
            return entry.operation.read(body, request.params)

        try:
            return await asyncio.get_running_loop().run_in_executor(parser[1], read)
        except RequestRefusedError:
            if entry is None:
                return Reading(None, 0)  # the route may not need JSON
            raise


_Asked = tuple[str | tuple[str, ...], tuple[str, ...], int, int, int, int, int, float | None, int]
