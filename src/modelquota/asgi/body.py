"""Reading the body of a request: within a size, a time, and a size of all bodies together; and draining one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Final

from modelquota.asgi.steps import first_step
from modelquota.asgi.types import Message, Receive, Scope
from modelquota.protocols.body import too_large
from modelquota.protocols.request import RequestRefusedError

DRAIN_SECONDS: Final = 10.0
"""How long the rest of a body that is too large is read, so that the client gets to read the answer."""

DRAIN_FACTOR: Final = 4
"""How many times `max_body_bytes` are read in that time, at most."""


class BodyRefusedError(RequestRefusedError):
    """The body of a request is not read to its end.

    Parameters
    ----------
    error : RequestRefusedError
        Why.
    more : bool
        Whether the client has more of it to send.
    """

    def __init__(self, error: RequestRefusedError, *, more: bool) -> None:
        super().__init__(error.status, error.message, error.code, error.param)
        self.more = more


class BodyReader:
    """Reads bodies, and knows how many bytes of them are held at the moment.

    Attributes
    ----------
    max_body_bytes, max_inflight_bytes : int
        The most bytes of one body, and of all that are held.
    seconds : float
        How long a body may take to arrive.
    inflight_bytes : int
        Bytes of all bodies that have not been given back by `release`.
    """

    __slots__ = ("inflight_bytes", "max_body_bytes", "max_inflight_bytes", "seconds")

    def __init__(self, max_body_bytes: int, max_inflight_bytes: int, seconds: float) -> None:
        self.max_body_bytes = max_body_bytes
        self.max_inflight_bytes = max_inflight_bytes
        self.seconds = seconds
        self.inflight_bytes = 0

    async def read(self, length: bytes | None, receive: Receive) -> bytes | None:
        """Read a body, which counts as held from then on; None if the client disconnected before its end.

        `length` is the header ``content-length``. Raises as `start` does.
        """
        coming = self.start(length, receive)
        return coming if isinstance(coming, bytes) else await coming

    def start(self, length: bytes | None, receive: Receive) -> bytes | Awaitable[bytes | None]:
        """The same without a coroutine for a body that has arrived, as most have; otherwise, what is to be awaited.

        Raises BodyRefusedError: 413 as soon as it is known to be too long, by its header or by what has come; 408 if it
        takes too long; 503 if too much is held already.
        """
        if length is not None and length.isdigit() and (len(length) > 19 or int(length) > self.max_body_bytes):
            raise BodyRefusedError(too_large(self.max_body_bytes), more=True)
        message, rest = first_step(receive())
        if message is not None and message["type"] == "http.request" and not message.get("more_body", False):
            body = message.get("body", b"")
            if type(body) is bytes:
                size = len(body)
                if size > self.max_body_bytes or self.inflight_bytes + size > self.max_inflight_bytes:
                    self._take(size, size, more=False)
                self.inflight_bytes += size
                return body
        return self._read_rest(message, rest, receive)

    async def _read_rest(
        self, message: Message | None, rest: Awaitable[Message] | None, receive: Receive
    ) -> bytes | None:
        try:
            async with asyncio.timeout(self.seconds):
                return await self._gather(message if rest is None else await rest, receive)
        except TimeoutError:
            late = RequestRefusedError(408, f"the body did not arrive within {self.seconds:g} s", "body_timeout")
            raise BodyRefusedError(late, more=True) from None

    async def _gather(self, message: Message | None, receive: Receive) -> bytes | None:
        parts = bytearray()
        taken = 0
        try:
            while message is not None and message["type"] == "http.request":
                more = message.get("more_body", False)
                part = message.get("body", b"")
                self._take(len(part), len(parts) + len(part), more=more)
                taken += len(part)
                parts += part
                if not more:
                    taken = 0  # it is given back by release()
                    return bytes(parts)
                message = await receive()
            return None
        finally:
            self.inflight_bytes -= taken

    def _take(self, count: int, size: int, *, more: bool) -> None:
        if size > self.max_body_bytes:
            raise BodyRefusedError(too_large(self.max_body_bytes), more=more)
        if self.inflight_bytes + count > self.max_inflight_bytes:
            full = RequestRefusedError(503, "too many requests are being received; retry soon", "overloaded")
            raise BodyRefusedError(full, more=more)
        self.inflight_bytes += count

    def release(self, body: bytes) -> None:
        """Give back the bytes of a body that was read."""
        self.inflight_bytes -= len(body)

    async def drain(self, scope: Scope, receive: Receive) -> bool:
        """Read the rest of a body that is refused, and keep nothing; whether its end was reached.

        A client that has not finished sending often does not read, and a connection that is closed before all was
        read is reset, with the answer that was under way. Bounded by `DRAIN_SECONDS`, and by `DRAIN_FACTOR` times the
        largest body. A client that waits to be told to go on (``expect: 100-continue``) has not sent anything.
        """
        for name, _ in scope.get("headers", ()):
            if name.lower() == b"expect":
                return False
        left = DRAIN_FACTOR * self.max_body_bytes
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0:
                    message = await receive()
                    if message["type"] != "http.request":
                        return False
                    if not message.get("more_body", False):
                        return True
                    left -= max(len(message.get("body", b"")), 1)
        except (TimeoutError, OSError):
            pass
        return False
