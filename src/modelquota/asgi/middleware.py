"""`QuotaMiddleware`: holds a grant for the life of each request. Plain ASGI; needs only the standard library."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from modelquota._core.table.grant import Grant
from modelquota.asgi.protocols.openai import openai_routes
from modelquota.asgi.ratelimit import Header, limit_headers
from modelquota.asgi.refusal import denial, full_table, refusal
from modelquota.asgi.request import (
    ASGIApp,
    Demand,
    IncomingRequest,
    Message,
    Receive,
    RequestRefusedError,
    Scope,
    Send,
    joined_ids,
    read_body,
    route_path,
)
from modelquota.asgi.response import ResponseMeter, event_tokens
from modelquota.errors import CapacityError, QuotaExceededError

if TYPE_CHECKING:
    from modelquota.asgi.page import QuotaPage
    from modelquota.manager import ResourceQuotaManager
    from modelquota.reading.report import ModelReport

Route: TypeAlias = Callable[[IncomingRequest], Demand | Awaitable[Demand | None] | None]
Identity: TypeAlias = Callable[[IncomingRequest], str | Sequence[str] | Awaitable[str | Sequence[str]]]

_CLIENT_CLOSED_REQUEST = 499  # not in the standard, but usual in access logs
_MOST_STRAY_MESSAGES = 8
_WATCH_AFTER_SECONDS = 0.005
_SENT_BY_THE_SERVER = ("http.response.pathsend", "http.response.zerocopysend")


class QuotaMiddleware:
    """ASGI middleware that acquires a grant for each request to a model, and settles it by the tokens really used.

    A request waits as the action of its model says (`ResourceQuotaManager.acquire_async`) without blocking the loop. A
    denied request is answered with 429, 503 or 400, in the format of OpenAI's API, with the time after which a retry is
    admitted. The grant is settled by the ``usage`` of the response, also in a stream of server-sent events, and
    released with the last byte, on an error, and when the client disconnects.

    Paths without a route, and methods other than POST, pass through.

    Parameters
    ----------
    app : ASGI application
        The application to protect. Its responses must be uncompressed: add compression outside of this middleware.
    manager : ResourceQuotaManager
        The manager that decides. A model without a quota is served, and counted.
    routes : mapping of str to callable, optional
        By path below the mount point, a callable that returns the `Demand` of an `IncomingRequest`, or None to let it
        pass; it may be a coroutine function, and may raise `RequestRefusedError`. By default `openai_routes()`.
    identity : callable, optional
        Given the `IncomingRequest`, returns one or more ids, such as tenant and user, that must admit together with the
        model. It too may be a coroutine function and may raise `RequestRefusedError`. Clients choose the name of the
        model: give identities a prefix that no model has. Error messages and the page show ids: do not use a secret,
        such as an API key, as one.
    page : str, optional
        A path, such as ``"/quota"``, at which to show `QuotaPage`. By default there is no page.
    allow_page : callable, optional
        Decides which requests may see the page, as for `QuotaPage`. By default anyone who can connect.
    max_body_bytes : int
        A larger body is answered with 413, before any quota is touched, and is never kept in memory.
    chunk_tokens : callable
        Given the data of a server-sent event, returns its tokens: used if a stream has no final ``usage``.
    busy_retry_seconds : int
        ``Retry-After`` if memory or concurrency is the obstacle, so that no time is known.
    cancel_on_disconnect : bool
        Whether the application's task is canceled when the client disconnects; work that it does in a thread goes on.
        If False, the grant stays open until the application ends, whether or not it notices the disconnect.

    Examples
    --------
    With Starlette or FastAPI: ``app.add_middleware(QuotaMiddleware, manager=manager)``.
    """

    def __init__(
        self,
        app: ASGIApp,
        manager: ResourceQuotaManager,
        *,
        routes: Mapping[str, Route] | None = None,
        identity: Identity | None = None,
        page: str | None = None,
        allow_page: Callable[[Scope], bool | Awaitable[bool]] | None = None,
        max_body_bytes: int = 8 << 20,
        chunk_tokens: Callable[[bytes], int] = event_tokens,
        busy_retry_seconds: int = 2,
        cancel_on_disconnect: bool = True,
    ) -> None:
        self.app = app
        self.manager = manager
        self.routes: dict[str, Route] = dict(openai_routes() if routes is None else routes)
        self.identity = identity
        self.page_path = page
        self._page: QuotaPage | None = None
        if page is not None:
            from modelquota.asgi.page import QuotaPage

            self._page = QuotaPage(manager, allow=allow_page)
        self.max_body_bytes = max_body_bytes
        self.chunk_tokens = chunk_tokens
        self.busy_retry_seconds = busy_retry_seconds
        self.cancel_on_disconnect = cancel_on_disconnect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = route_path(scope)
        if self._page is not None and path == self.page_path:
            await self._page(scope, receive, send)
            return
        route = self.routes.get(path) if scope["method"] == "POST" else None
        if route is None:
            await self.app(scope, receive, send)
            return
        try:
            body = await read_body(scope, receive, self.max_body_bytes)
            if body is None:
                await close_unanswered(send, started=False)
                return
            demand = await self._demand(route, IncomingRequest(scope, body))
        except RequestRefusedError as error:
            await refusal(error, scope.get("http_version", "1.1")).send(send)
            return
        exchange = Exchange(self, scope, receive, send, body)
        if demand is None:
            await self.app(scope, exchange.receive_unwatched, send)
        else:
            await exchange.run(demand)

    async def _demand(self, route: Route, request: IncomingRequest) -> Demand | None:
        made = route(request)
        demand = made if made is None or isinstance(made, Demand) else await made
        if demand is None or self.identity is None:
            return demand
        said = self.identity(request)
        ids = await said if isinstance(said, Awaitable) else said
        return Demand(
            joined_ids(ids, demand.model_id),
            demand.estimated_tokens,
            demand.prompt_tokens,
            demand.ram_needed_mb,
            demand.ssd_needed_mb,
            demand.timeout,
            demand.priority,
        )

    def reports(self, demand: Demand) -> list[ModelReport]:
        """Return a report on each model that decides; ids without a quota are left out."""
        found = [self.manager.get_model_report(model_id) for model_id in demand.model_ids]
        return [report for report in found if report is not None]


async def close_unanswered(send: Send, *, started: bool) -> None:
    """Send status 499 for access logs, if no response has started; the client has disconnected."""
    if not started:
        with contextlib.suppress(OSError):
            await send({"type": "http.response.start", "status": _CLIENT_CLOSED_REQUEST, "headers": []})
            await send({"type": "http.response.body", "body": b""})


class Exchange:
    """One request and its response.

    A single task reads from the client while the request waits or is served, so that a disconnect is noticed in every
    phase; it then cancels the task that serves the request. It is started only if the request takes a while, since
    starting and ending a task costs a third of everything else together.
    """

    __slots__ = ("_body", "_complete", "_demand", "_gone", "_grant", "_host", "_left", "_meter", "_middleware",
                 "_receive", "_scope", "_send", "_started", "_watching")  # fmt: skip

    def __init__(self, middleware: QuotaMiddleware, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        self._middleware = middleware
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body: bytes | None = body
        self._demand: Demand
        self._gone = asyncio.Event()
        self._grant: Grant
        self._meter: ResponseMeter | None = None
        self._host: asyncio.Task[None]
        self._watching: asyncio.Task[None] | None = None
        self._started = False
        self._complete = False
        self._left = False

    async def run(self, demand: Demand) -> None:
        """Wait for a grant, and serve the request under it."""
        self._demand = demand
        host = asyncio.current_task()
        assert host is not None
        self._host = host
        cancelling = host.cancelling()
        timer = host.get_loop().call_later(_WATCH_AFTER_SECONDS, self._start_watch)
        try:
            await self._serve()
            if self._left:  # the cancellation may not have been delivered yet, and must not hit later code
                await asyncio.sleep(0)
        except asyncio.CancelledError:
            if not self._left or host.cancelling() > cancelling + 1:
                raise
            await close_unanswered(self._send, started=self._started)
        finally:
            timer.cancel()
            if self._watching is not None:
                self._watching.cancel()
            if self._left:
                host.uncancel()

    async def _serve(self) -> None:
        middleware = self._middleware
        demand = self._demand
        try:
            self._grant = await middleware.manager.acquire_async(
                demand.model_id,
                demand.estimated_tokens,
                demand.ram_needed_mb,
                demand.ssd_needed_mb,
                timeout=demand.timeout,
                priority=demand.priority,
            )
        except QuotaExceededError as error:
            self._complete = True
            await denial(error, demand, middleware.reports(demand), middleware.busy_retry_seconds).send(self._send)
            return
        except CapacityError as error:
            self._complete = True
            await full_table(error, middleware.busy_retry_seconds).send(self._send)
            return
        with self._grant:
            try:
                await middleware.app(self._scope, self.receive, self.send)
            finally:
                self._settle(complete=False)

    def _start_watch(self) -> None:
        if self._watching is None:
            self._watching = self._host.get_loop().create_task(self._watch())

    async def _watch(self) -> None:
        """Wait for the client to disconnect, and cancel the task that serves it."""
        try:
            for _ in range(_MOST_STRAY_MESSAGES):  # some servers send empty bodies forever
                if (await self._receive())["type"] == "http.disconnect":
                    break
            else:
                return
        except OSError:
            pass
        self._gone.set()
        if self._middleware.cancel_on_disconnect and not self._complete:
            self._left = True
            self._host.cancel("the client has left")

    async def receive(self) -> Message:
        """The application's `receive`: the body, in one piece, and then the disconnect."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        self._start_watch()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def receive_unwatched(self) -> Message:
        """The same, for a request that needs no grant."""
        if self._body is not None:
            return await self.receive()
        return await self._receive()

    async def send(self, message: Message) -> None:
        """The application's `send`: count tokens, add headers, and release the grant with the last piece."""
        kind = message["type"]
        if kind == "http.response.start":
            headers = list(message.get("headers", ()))
            demand = self._demand
            self._started = True
            self._meter = ResponseMeter(
                self._grant, message["status"], headers, demand.prompt_tokens, self._middleware.chunk_tokens
            )
            ours = limit_headers(self._middleware.reports(demand))
            message = {**message, "headers": _replaced(headers, ours)}
        elif kind == "http.response.body":
            if self._meter is not None and not self._complete:
                self._meter.feed(message.get("body", b""))
                if not message.get("more_body", False):
                    self._finish()
        elif kind in _SENT_BY_THE_SERVER and not message.get("more_body", False) and not self._complete:
            self._finish()
        await self._send(message)

    def _finish(self) -> None:
        """Settle and release before the last piece is sent: a client that has it finds the quotas settled."""
        self._complete = True
        self._settle(complete=True)
        self._grant.release()

    def _settle(self, *, complete: bool) -> None:
        if self._meter is not None and not self._grant.released:
            self._meter.finish(complete=complete)


def _replaced(headers: list[Header], ours: list[Header]) -> list[Header]:
    """The headers, with ours in place of any of the same name: the application may have limits of its own."""
    names = {name for name, _ in ours}
    return [header for header in headers if header[0].lower() not in names] + ours
