"""Reading the body of a request: within a size, a time, and a size of all bodies together; and draining one."""

from __future__ import annotations

import asyncio
from typing import Final

from modelquota.asgi.steps import first_step
from modelquota.asgi.types import Receive, Scope
from modelquota.protocols.body import too_large
from modelquota.protocols.request import RequestRefusedError

DRAIN_SECONDS: Final = 10.0
"""How long the rest of a body that is too large is read, so that the client gets to read the answer."""

DRAIN_FACTOR: Final = 4
"""How many times `max_body_bytes` are read in that time, at most."""


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

        `length` is the header ``content-length``.

        Raises RequestRefusedError: 413 as soon as it is known to be too long, by its header or by what has come; 408
        if it takes too long; 503 if too much is held already.
        """
        most = self.max_body_bytes
        if length is not None and length.isdigit() and (len(length) > 19 or int(length) > most):
            raise too_large(most)
        message, rest = first_step(receive())
        if rest is None and message is not None:
            if message["type"] != "http.request":
                return None
            body: bytes = message.get("body", b"")
            if len(body) > most:
                raise too_large(most)
            if not message.get("more_body", False):
                self._take(len(body))
                return bytes(body)
            return await self._read_rest(receive, bytearray(body))
        try:
            async with asyncio.timeout(self.seconds):
                assert rest is not None
                message = await rest
                if message["type"] != "http.request":
                    return None
                parts = bytearray(message.get("body", b""))
                if len(parts) > most:
                    raise too_large(most)
                if message.get("more_body", False):
                    return await self._gather(receive, parts)
                self._take(len(parts))
                return bytes(parts)
        except TimeoutError:
            raise _too_slow(self.seconds) from None

    async def _read_rest(self, receive: Receive, parts: bytearray) -> bytes | None:
        try:
            async with asyncio.timeout(self.seconds):
                return await self._gather(receive, parts)
        except TimeoutError:
            raise _too_slow(self.seconds) from None

    async def _gather(self, receive: Receive, parts: bytearray) -> bytes | None:
        taken = 0
        try:
            more = True
            while more:
                self._take(len(parts) - taken)
                taken = len(parts)
                message = await receive()
                if message["type"] != "http.request":
                    return None
                more = message.get("more_body", False)
                parts += message.get("body", b"")
                if len(parts) > self.max_body_bytes:
                    raise too_large(self.max_body_bytes)
            self._take(len(parts) - taken)
            taken = 0
            return bytes(parts)
        finally:
            self.inflight_bytes -= taken

    def _take(self, count: int) -> None:
        if self.inflight_bytes + count > self.max_inflight_bytes:
            raise RequestRefusedError(503, "too many requests are being received; retry soon", "overloaded")
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


def _too_slow(seconds: float) -> RequestRefusedError:
    return RequestRefusedError(408, f"the body did not arrive within {seconds:g} s", "body_timeout")
