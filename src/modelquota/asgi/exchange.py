"""One request and its response: waits for a grant, serves under it, and settles it by what was done."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from modelquota._core.table.grant import Grant
from modelquota.asgi.charge import Charge
from modelquota.asgi.ratelimit import OURS
from modelquota.asgi.refusal import send_answer
from modelquota.asgi.steps import first_step
from modelquota.asgi.types import Message, Receive, Scope, Send
from modelquota.errors import CapacityError, GrantClosedError, ManagerClosedError, QuotaExceededError
from modelquota.protocols.answer import AnswerReader
from modelquota.protocols.protocol import Protocol
from modelquota.protocols.refusal import Answer
from modelquota.protocols.request import RequestRefusedError
from modelquota.quota.tokens import TokenCount, Tokens
from modelquota.waiting.task import admit

if TYPE_CHECKING:
    from modelquota.asgi.middleware import QuotaMiddleware

_CLIENT_CLOSED_REQUEST: Final = 499  # not in the standard, but usual in access logs
_JSON: Final = b"application/json"
_MOST_STRAY_MESSAGES: Final = 8
_SENT_BY_THE_SERVER: Final = ("http.response.pathsend", "http.response.zerocopysend")
_RAISES_AFTER_DISCONNECT: Final = (2, 4)  # from this version of ASGI on, applications expect OSError from send()


class Exchange:
    """One request and its response.

    No task and no timer is made unless the request has to wait. While it waits, a task reads from the client, so that
    one that disconnects gives up its place. While it is served, the application reads: it receives the disconnect, as
    from every server, and decides itself what to do about it.

    Parameters
    ----------
    middleware : QuotaMiddleware
    scope, receive, send
        Of the server.
    body : bytes
        The body, which has been read.
    protocol : Protocol
        The client's.
    path : str
        For the count of requests that no quota decided on.
    """

    __slots__ = (
        "_body",
        "_charge",
        "_cut",
        "_done",
        "_gone",
        "_grant",
        "_ids",
        "_middleware",
        "_outputs",
        "_path",
        "_prompt_tokens",
        "_protocol",
        "_reader",
        "_receive",
        "_receiving",
        "_scope",
        "_send",
        "_status",
        "_stopping",
    )  # fmt: skip

    _charge: Charge
    _grant: Grant
    _ids: str | tuple[str, ...]
    _prompt_tokens: int
    _outputs: int

    def __init__(
        self,
        middleware: QuotaMiddleware,
        scope: Scope,
        receive: Receive,
        send: Send,
        body: bytes,
        protocol: Protocol,
        path: str,
    ) -> None:
        self._middleware = middleware
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body: bytes | None = body
        self._protocol = protocol
        self._path = path
        self._reader: AnswerReader | None = None
        self._receiving: asyncio.Task[Message] | None = None
        self._status = 0  # of the response, once it has begun
        self._done = False  # the response is complete, and the grant settled
        self._gone = False  # the client has disconnected
        self._stopping = False  # the stream is at a limit, and ends with the event that is passing
        self._cut = False  # it has been ended, though the application may go on

    async def run(
        self,
        ids: str | tuple[str, ...],
        tenants: tuple[str, ...],
        tokens: int,
        prompt_tokens: int,
        outputs: int,
        ram_mb: int,
        ssd_mb: int,
        timeout: float | None,
        priority: int,
    ) -> None:
        """Wait for a grant, and serve the request under it."""
        self._ids = ids
        self._prompt_tokens, self._outputs = prompt_tokens, outputs
        middleware = self._middleware
        ledger = middleware.ledger
        arrived_ns = 0 if ledger is None else time.monotonic_ns()
        prompt = prompt_tokens if prompt_tokens < tokens else tokens
        estimate = (prompt, 0, tokens - prompt)
        try:
            admitted = admit(middleware.manager, ids, estimate, ram_mb, ssd_mb, timeout, priority)
            grant = admitted if type(admitted) is Grant else await self._wait(admitted)
        except (QuotaExceededError, CapacityError, ValueError) as error:
            if ledger is not None and isinstance(error, QuotaExceededError):
                ledger.record_denial(ids, estimate, error, arrived_ns, priority)
            await send_answer(self._refusal(error, tenants, (Tokens(*estimate), ram_mb, ssd_mb)), self._send)
            return
        if grant is None:
            await close_unanswered(self._send)
            return
        if not grant.model_ids:
            middleware.count_unmetered(self._path, "none of its ids has a quota")
        self._grant = grant
        admitted_ns = 0 if ledger is None else time.monotonic_ns()
        try:
            with grant:  # whatever happens, settle by what was done and release
                try:
                    if middleware.cancel_on_disconnect:
                        await self._serve_cancelably()
                    else:
                        await middleware.app(self._scope, self.receive, self.send)
                except Exception:
                    if not self._cut:  # it was told that the client has left, and may say that this is an error
                        raise
                finally:
                    if not self._done:
                        self._settle(complete=False)
        finally:
            if self._receiving is not None:
                self._receiving.cancel()
            if ledger is not None:
                ledger.record_grant(ids, estimate, grant, arrived_ns, admitted_ns, priority)

    def _refusal(
        self,
        error: QuotaExceededError | CapacityError | ValueError,
        tenants: tuple[str, ...],
        sizes: tuple[TokenCount, int, int],
    ) -> Answer:
        middleware, protocol, ids = self._middleware, self._protocol, self._ids
        if isinstance(error, QuotaExceededError):
            headers = middleware.limit_headers.of(ids, protocol.header_style, error.result)
            every = (ids,) if isinstance(ids, str) else ids
            return middleware.refuser.denial(error, protocol, headers, ids=every, tenants=tenants, sizes=sizes)
        if isinstance(error, CapacityError):
            return middleware.refuser.full_table(error, protocol)
        # the ids have more meters than can decide together
        refused = RequestRefusedError(400, f"the request cannot be decided: {error}", "invalid_identity")
        return middleware.refuser.not_accepted(refused, protocol)

    async def _wait(self, acquisition: Awaitable[Grant]) -> Grant | None:
        """Wait until the request is admitted; None if the client disconnects before."""
        admitted, rest = first_step(acquisition)
        if rest is None:
            return admitted
        loop = asyncio.get_running_loop()
        waiting = loop.create_task(_awaited(rest))
        watching = loop.create_task(self._watch())
        grant: Grant | None = None
        try:
            await asyncio.wait((waiting, watching), return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                grant = waiting.result()
            else:
                await _given_up(waiting)
        except asyncio.CancelledError:  # the server shuts down
            await _given_up(waiting)
            raise
        finally:
            watching.cancel()
            if grant is None and self._receiving is not None:
                self._receiving.cancel()
        return grant

    async def _watch(self) -> None:
        """Return once the client has disconnected."""
        for _ in range(_MOST_STRAY_MESSAGES):  # some servers send empty bodies forever
            if (await self._next_message())["type"] == "http.disconnect":
                return
        await asyncio.get_running_loop().create_future()  # until this is canceled

    async def _next_message(self) -> Message:
        """Receive a message; if this is canceled, the next call waits for the same one."""
        receiving = self._receiving
        if receiving is None:
            receiving = self._receiving = asyncio.ensure_future(_awaited(self._receive()))
        try:
            message = await asyncio.shield(receiving)
        except OSError:
            message = {"type": "http.disconnect"}
        self._receiving = None
        return message

    async def _serve_cancelably(self) -> None:
        """Run the application in a task of its own, which is canceled if the client disconnects before the end."""
        left = asyncio.Event()

        async def receive() -> Message:
            if self._body is None:
                await left.wait()
                return {"type": "http.disconnect"}
            return self._take_body()

        loop = asyncio.get_running_loop()
        app = loop.create_task(_awaited(self._middleware.app(self._scope, receive, self.send)))
        watching = loop.create_task(self._watch())
        try:
            await asyncio.wait((app, watching), return_when=asyncio.FIRST_COMPLETED)
            if not app.done():
                self._gone = True
                left.set()
                if not self._done:
                    app.cancel("the client has left")
                await asyncio.wait((app,))
        except asyncio.CancelledError:  # the server shuts down
            app.cancel()
            await asyncio.wait((app,))
            raise
        finally:
            watching.cancel()
        if not app.cancelled():
            app.result()
        elif not self._status:
            await close_unanswered(self._send)

    def _take_body(self) -> Message:
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}

    async def receive(self) -> Message:
        """The application's `receive`: the body, in one piece, and then what the client sends: its disconnect."""
        body = self._body
        if body is not None:
            self._body = None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._cut:
            return {"type": "http.disconnect"}
        message = await (self._receive() if self._receiving is None else self._next_message())
        if message["type"] == "http.disconnect":
            self._gone = True
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """The application's `send`: count tokens, add headers, and release the grant with the last piece.

        It returns what the server's `send` does: one coroutine less for each piece.
        """
        kind = message["type"]
        if kind == "http.response.body":
            if self._cut:
                return self._after_the_end()
            if not self._done and self._status:
                body = message.get("body", b"")
                if type(body) is not bytes:
                    body = bytes(body)  # Starlette also passes on a memoryview
                more = message.get("more_body", False)
                reader = self._reader
                if reader is None and self._charge == "usage" and (more or not self._finish_by_usage(body)):
                    self._reader = reader = self._new_reader(_JSON)
                if reader is not None:
                    tokens = reader.feed(body)
                    if tokens and not self._add(tokens) and self._middleware.stops_at_limit:
                        self._stopping = True
                    if self._stopping and more:
                        end = reader.last_boundary(body)
                        if end:
                            return self._end_stream({**message, "body": body[:end]})
                if not more and not self._done:
                    self._finish()
        elif kind == "http.response.start":
            if not self._status:
                message = self._begin(message)
        elif kind in _SENT_BY_THE_SERVER and not message.get("more_body", False) and not self._done:
            self._finish()
        return self._send(message)

    def _begin(self, message: Message) -> Message:
        """Read the head of the response; return it with our headers."""
        middleware = self._middleware
        headers = [*message.get("headers", ())]
        kind = b""
        readable = True
        replaces = False  # the application may report limits of its own
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-type":
                kind = value
            elif lower == b"content-encoding":
                readable = value.strip().lower() in (b"", b"identity")
            elif lower in OURS:
                replaces = True
        self._status = status = message["status"]
        self._charge = charge = middleware.charges.of(status)
        if charge == "usage" and not (kind == _JSON and readable):  # what is JSON may need no reader
            self._reader = reader = self._new_reader(kind, readable=readable)
            if reader.is_stream:
                self._add(0)  # from here on only what passes counts, with the prompt
        try:
            ours = middleware.limit_headers.of(self._ids, self._protocol.header_style)
        except ManagerClosedError:
            ours = []
        if replaces and ours:
            headers = [header for header in headers if header[0].lower() not in OURS]
        return {**message, "headers": [*headers, *ours]}

    def _new_reader(self, kind: bytes, *, readable: bool = True) -> AnswerReader:
        middleware = self._middleware
        return AnswerReader(
            self._protocol,
            kind,
            self._prompt_tokens,
            outputs=self._outputs,
            readable=readable,
            count_event=middleware.chunk_tokens,
            read_usage=middleware.usage,
            track=middleware.stops_at_limit,
        )

    def _finish_by_usage(self, body: bytes) -> bool:
        """Settle and release by the usage at the end of an answer that came whole; False if it has none there."""
        if self._middleware.usage is not None:
            return False
        tokens = self._protocol.usage_at_end(body)
        if tokens is None:
            return False
        self._done = True
        if not self._grant.released:  # the manager's side may have closed it in the meantime
            self._grant._end(*tokens)
        return True

    def _add(self, tokens: int) -> bool:
        """Count tokens that passed; False if a limit is reached. A manager that was closed counts no more."""
        try:
            return self._grant.add(tokens)
        except (GrantClosedError, ManagerClosedError):
            return True

    async def _end_stream(self, message: Message) -> None:
        """End a stream that has reached a limit, with the protocol's own last events."""
        assert self._reader is not None
        ending = self._reader.ending()
        self._cut = True
        self._finish()
        await self._send(message)
        await self._send({"type": "http.response.body", "body": ending, "more_body": False})

    def _after_the_end(self) -> Awaitable[None]:
        version = str(self._scope.get("asgi", {}).get("spec_version", "2.0")).split(".")
        if tuple(map(int, version[:2])) >= _RAISES_AFTER_DISCONNECT:
            raise OSError("the stream has been ended at a limit")
        return _nothing()

    def _finish(self) -> None:
        """Settle and release before the last piece is sent: a client that has it finds the quotas settled."""
        self._done = True
        self._settle(complete=True)
        self._grant.release()

    def _settle(self, *, complete: bool) -> None:
        """Settle by what was done, as far as it is known; otherwise what the grant does by itself is right."""
        grant = self._grant
        if grant.released:
            return
        try:
            if not self._status:
                if self._gone:  # at least the prompt was read; what the model wrote was never seen
                    grant.settle(Tokens(self._prompt_tokens))
            elif self._charge == "nothing":
                grant.cancel()
            elif self._charge == "request":
                grant.settle(Tokens())
            elif self._reader is not None:
                tokens = self._reader.tokens(complete=complete)
                if tokens is not None:
                    grant.settle(tokens)
        except GrantClosedError:  # the manager's side has closed it in the meantime
            pass


async def _nothing() -> None:
    pass


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable


async def _given_up(waiting: asyncio.Task[Grant]) -> None:
    """Cancel a wait; if it was admitted all the same, undo that."""
    waiting.cancel()
    await asyncio.wait((waiting,))
    if not waiting.cancelled() and waiting.exception() is None:
        waiting.result().cancel()


async def close_unanswered(send: Send) -> None:
    """Send status 499 for access logs; the client has disconnected."""
    with contextlib.suppress(OSError):
        await send({"type": "http.response.start", "status": _CLIENT_CLOSED_REQUEST, "headers": []})
        await send({"type": "http.response.body", "body": b""})
