"""One request and its response: waits for a grant, serves under it, and settles it by what was done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from modelquota._core.table.grant import Grant
from modelquota.asgi.ratelimit import replaced
from modelquota.asgi.refusal import send_answer
from modelquota.asgi.steps import first_step
from modelquota.asgi.types import Message, Receive, Scope, Send
from modelquota.errors import CapacityError, GrantClosedError, ManagerClosedError, QuotaExceededError
from modelquota.protocols.answer import AnswerReader
from modelquota.protocols.protocol import Protocol
from modelquota.protocols.request import RequestRefusedError, estimate_of
from modelquota.quota.tokens import Tokens

if TYPE_CHECKING:
    from modelquota.asgi.middleware import QuotaMiddleware

_CLIENT_CLOSED_REQUEST: Final = 499  # not in the standard, but usual in access logs
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

    _grant: Grant
    _ids: str | tuple[str, ...]
    _prompt_tokens: int
    _outputs: int
    _reader: AnswerReader | None = None
    _receiving: asyncio.Task[Message] | None = None
    _status = 0  # of the response, once it has begun
    _done = False  # the response is complete, and the grant settled
    _gone = False  # the client has disconnected
    _stopping = False  # the stream is at a limit, and ends with the event that is passing
    _cut = False  # it has been ended, though the application may go on

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
        try:
            grant, rest = first_step(
                middleware.manager.acquire_async(
                    ids, estimate_of(prompt_tokens, tokens), ram_mb, ssd_mb, timeout=timeout, priority=priority
                )
            )
            if rest is not None:
                grant = await self._wait(rest)
        except QuotaExceededError as error:
            style = self._protocol.header_style
            headers = middleware.limit_headers.of(ids, style, error.result)
            every = (ids,) if isinstance(ids, str) else ids
            sizes = (estimate_of(prompt_tokens, tokens), ram_mb, ssd_mb)
            await send_answer(
                middleware.refuser.denial(error, self._protocol, headers, ids=every, tenants=tenants, sizes=sizes),
                self._send,
            )
            return
        except CapacityError as error:
            await send_answer(middleware.refuser.full_table(error, self._protocol), self._send)
            return
        except ValueError as error:  # the ids have more meters than can decide together
            refused = RequestRefusedError(400, f"the request cannot be decided: {error}", "invalid_identity")
            await send_answer(middleware.refuser.not_accepted(refused, self._protocol), self._send)
            return
        if grant is None:
            await close_unanswered(self._send)
            return
        if not grant.model_ids:
            middleware.count_unmetered(self._path, "none of its ids has a quota")
        self._grant = grant
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

    async def _wait(self, acquisition: Awaitable[Grant]) -> Grant | None:
        """Wait until the request is admitted; None if the client disconnects before."""
        loop = asyncio.get_running_loop()
        waiting = loop.create_task(_awaited(acquisition))
        watching = loop.create_task(self._watch())
        try:
            await asyncio.wait((waiting, watching), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:  # the server shuts down
            watching.cancel()
            await _given_up(waiting)
            raise
        if waiting.done():
            watching.cancel()
            grant: Grant = waiting.result()
            return grant
        await _given_up(waiting)
        return None

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
        if self._body is not None:
            return self._take_body()
        if self._cut:
            return {"type": "http.disconnect"}
        message = await (self._receive() if self._receiving is None else self._next_message())
        if message["type"] == "http.disconnect":
            self._gone = True
        return message

    async def send(self, message: Message) -> None:
        """The application's `send`: count tokens, add headers, and release the grant with the last piece."""
        kind = message["type"]
        if kind == "http.response.body":
            if self._cut:
                self._after_the_end()
                return
            if not self._done and self._reader is not None:
                tokens = self._reader.feed(message.get("body", b""))
                if tokens and not self._add(tokens) and self._middleware.stops_at_limit:
                    self._stopping = True
                more = message.get("more_body", False)
                if self._stopping and more:
                    end = self._reader.last_boundary(message.get("body", b""))
                    if end:
                        await self._end_stream({**message, "body": message["body"][:end]})
                        return
                if not more:
                    self._finish()
        elif kind == "http.response.start":
            if not self._status:
                message = self._begin(message)
        elif kind in _SENT_BY_THE_SERVER and not message.get("more_body", False) and not self._done:
            self._finish()
        await self._send(message)

    def _begin(self, message: Message) -> Message:
        """Read the head of the response; return it with our headers."""
        middleware = self._middleware
        headers = message.get("headers", ())
        kind = b""
        readable = True
        for name, value in headers:
            lower = name.lower()
            if lower == b"content-type":
                kind = value
            elif lower == b"content-encoding":
                readable = value.strip().lower() in (b"", b"identity")
        status: int = message["status"]
        self._status = status
        charges_usage = middleware.charges.of(status) == "usage"
        self._reader = reader = AnswerReader(
            self._protocol,
            kind,
            self._prompt_tokens,
            outputs=self._outputs,
            readable=readable and charges_usage,
            count_event=middleware.chunk_tokens,
            read_usage=middleware.usage,
            track=middleware.stops_at_limit,
        )
        if reader.is_stream:
            self._add(0)  # from here on only what passes counts, with the prompt
        try:
            ours = middleware.limit_headers.of(self._ids, self._protocol.header_style)
        except ManagerClosedError:
            ours = []
        return {**message, "headers": replaced(headers, ours)}

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

    def _after_the_end(self) -> None:
        version = str(self._scope.get("asgi", {}).get("spec_version", "2.0")).split(".")
        if tuple(map(int, version[:2])) >= _RAISES_AFTER_DISCONNECT:
            raise OSError("the stream has been ended at a limit")

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
            reader = self._reader
            if reader is None:
                if self._gone:  # at least the prompt was read; what the model wrote was never seen
                    grant.settle(Tokens(self._prompt_tokens))
                return
            charge = self._middleware.charges.of(self._status)
            if charge == "nothing":
                grant.cancel()
            elif charge == "request":
                grant.settle(Tokens())
            else:
                tokens = reader.tokens(complete=complete)
                if tokens is not None:
                    grant.settle(tokens)
        except GrantClosedError:  # the manager's side has closed it in the meantime
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
