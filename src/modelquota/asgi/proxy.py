"""`ReverseProxy`: passes requests on to a model server that takes no Python, and its answers back, byte for byte.

Needs the extra ``modelquota[proxy]``. ``modelquota proxy`` runs it behind `Quota`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable
from email.utils import formatdate
from typing import Any, Final

from modelquota._extras import extra
from modelquota.asgi.charge import Charge
from modelquota.asgi.refusal import send_answer
from modelquota.asgi.types import ASGIApp, Header, Message, Receive, Scope, Send
from modelquota.protocols.paths import PathTable
from modelquota.protocols.refusal import Refusal, RefusalKind
from modelquota.protocols.tables import TABLES, operations

with extra("proxy", "httpx"):
    import httpx

logger = logging.getLogger("modelquota")

UPSTREAM_CHARGES: Final[dict[int | str, Charge]] = {502: "nothing"}
"""What the middleware in front of it should charge: a server that cannot be reached has done nothing."""

# RFC 9110, section 7.6.1, with the two of proxies' own authentication.
_HOP_BY_HOP: Final = frozenset((
    b"connection", b"proxy-connection", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade",
    b"proxy-authenticate", b"proxy-authorization",
))  # fmt: skip
_VIA: Final = b"1.1 modelquota"
_KEEPALIVE_SECONDS: Final = 4.0  # below the 5 s after which most Python servers close a connection
_MISREAD: Final = re.compile(rb"[#\\\x00-\x20\x7f]")  # what servers take for the end of a path, or for a slash
_OPERATIONS: Final = operations()


class ReverseProxy:
    """ASGI application that passes HTTP requests on to another server.

    Nothing is changed but the headers that are for one connection only; ``Via`` and ``X-Forwarded-*`` are added. Bodies
    pass in both directions as they come, compressed or not, no faster than the receiver takes them. If the client
    disconnects, so does the proxy from the server. A server that cannot be reached is a 502, one that is too slow a
    504, in the shape of the request's protocol. An answer that breaks off is broken off for the client as well.

    Parameters
    ----------
    upstream : str
        Address of the server: ``http://host:port``, or https; a path is put in front of the requests' paths.
    connect_timeout : float
        Seconds to establish a connection.
    read_timeout : float
        Seconds until the answer begins, and between two pieces of it.
    max_connections : int
        Connections to the server at once; further requests wait for one, as long as `connect_timeout`, and then get a
        503.
    transport : httpx transport, optional
        Sends the requests, instead of a new one.

    Raises
    ------
    ValueError
        `upstream` is not such an address, or a number is not above 0.
    """

    def __init__(
        self,
        upstream: str,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        max_connections: int = 1000,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        try:
            url = httpx.URL(upstream)
        except httpx.InvalidURL as error:
            raise ValueError(f"upstream={upstream!r} is not accepted: {error}") from None
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment or url.userinfo:
            raise ValueError(f"upstream={upstream!r} is not accepted; expected an address as http://127.0.0.1:8000")
        for name, value in (("connect_timeout", connect_timeout), ("read_timeout", read_timeout)):
            if not value > 0:
                raise ValueError(f"{name}={value!r} is not accepted; expected a number of seconds above 0")
        if max_connections < 1:
            raise ValueError(f"max_connections={max_connections!r} is not accepted; expected an integer from 1")
        self.upstream = url
        self._base = url.raw_path.rstrip(b"/")
        self._authority = url.netloc
        self._timeout = {
            "connect": connect_timeout, "pool": connect_timeout, "read": read_timeout, "write": read_timeout,
        }  # fmt: skip
        self._limits = httpx.Limits(
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=_KEEPALIVE_SECONDS,
        )
        self._transport = transport
        self._paths = PathTable(_OPERATIONS, anywhere=_OPERATIONS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})
        elif scope["type"] == "http":
            await _Forwarding(self, scope, receive, send).run()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._transport is not None:
            await self._transport.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    @property
    def transport(self) -> httpx.AsyncBaseTransport:
        """What sends the requests; made at the first one, in the process that serves."""
        if self._transport is None:
            self._transport = httpx.AsyncHTTPTransport(limits=self._limits)
        return self._transport

    @staticmethod
    def target(scope: Scope) -> bytes:
        """Return the path of a request as it was sent, without the query."""
        target: bytes = scope.get("raw_path") or scope["path"].encode()
        return target

    def request(self, scope: Scope, body: _Body) -> httpx.Request:
        """Return the request to send for one that was received."""
        target = self._base + self.target(scope)
        if scope.get("query_string"):
            target += b"?" + scope["query_string"]
        headers = list(passed_on(scope["headers"]))
        names = {name for name, _ in headers}
        if any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"]):
            headers = [header for header in headers if header[0] != b"content-length"]
            headers.append((b"transfer-encoding", b"chunked"))
        elif b"content-length" not in names and not body.is_empty:  # over HTTP/2 a length is optional
            headers.append((b"transfer-encoding", b"chunked"))
        return httpx.Request(
            scope["method"],
            self.upstream.copy_with(raw_path=b"/"),
            headers=[(b"host", self._authority), *headers, *_forwarded(scope)],
            stream=body,
            extensions={"timeout": self._timeout, "target": target},  # the target as it is, not normalized
        )

    def refusal(self, status: int, message: str, code: str, path: str) -> Any:
        """Return an error in the shape of the protocol that a path is of."""
        found = self._paths.find(path)
        protocol = TABLES["openai"] if found is None else found[0].protocol
        return protocol.refuse(Refusal(RefusalKind.INVALID, status, message, code), [])


class _Body(httpx.AsyncByteStream):
    """The body of a request, read from the client as the server takes it."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._first: Message | None = None
        self.is_empty = False
        self.passed = asyncio.Event()
        self.broken = False

    async def begin(self) -> bool:
        """Receive the first piece; False if the client has disconnected."""
        self._first = await self._receive()
        if self._first["type"] != "http.request":
            return False
        if not self._first.get("more_body", False):
            self.is_empty = not self._first.get("body")
            self.passed.set()
        return True

    async def __aiter__(self) -> AsyncIterator[bytes]:
        message = self._first
        assert message is not None
        while True:
            if message.get("body"):
                yield message["body"]
            if not message.get("more_body", False):
                self.passed.set()
                return
            message = await self._receive()
            if message["type"] != "http.request":
                self.broken = True
                raise httpx.ReadError("the client disconnected before the end of its body")


class _Forwarding:
    """One request and its answer."""

    def __init__(self, proxy: ReverseProxy, scope: Scope, receive: Receive, send: Send) -> None:
        self._proxy = proxy
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body = _Body(receive)

    async def run(self) -> None:
        # The server might read the target in another way, and run a model at a path that was not seen to be one.
        target = self._proxy.target(self._scope)
        if target[:1] != b"/" or target[:2] == b"//" or _MISREAD.search(target):
            await self._refuse(
                400, "the target is not a path, or has a fragment, a backslash or a space", "invalid_path"
            )
            return
        if any(part in (".", "..") for part in self._scope["path"].split("/")):
            await self._refuse(400, "the path has the segment . or ..", "invalid_path")
            return
        if not await self._body.begin():
            return
        loop = asyncio.get_running_loop()
        forwarding = loop.create_task(self._forward())
        watching = loop.create_task(self._watch())
        try:
            await asyncio.wait((forwarding, watching), return_when=asyncio.FIRST_COMPLETED)
        finally:
            watching.cancel()
            if not forwarding.done():
                forwarding.cancel()
                await asyncio.wait((forwarding,))
        if not forwarding.cancelled():
            forwarding.result()

    async def _watch(self) -> None:
        """Return once the client has disconnected."""
        await self._body.passed.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _forward(self) -> None:
        try:
            response = await self._proxy.transport.handle_async_request(self._proxy.request(self._scope, self._body))
        except httpx.PoolTimeout:
            await self._refuse(503, "all connections to the server are in use", "upstream_busy")
            return
        except httpx.ConnectTimeout:
            await self._refuse(502, "the server cannot be reached in time", "upstream_unreachable")
            return
        except httpx.TimeoutException:
            await self._refuse(504, "the server does not answer in time", "upstream_timeout")
            return
        except httpx.HTTPError as error:
            if not self._body.broken:
                logger.warning("the server at %s cannot be used: %r", self._proxy.upstream, error)
                await self._refuse(502, "the server cannot be reached", "upstream_unreachable")
            return
        try:
            await self._pass_back(response)
        finally:
            await response.aclose()

    async def _pass_back(self, response: httpx.Response) -> None:
        headers = list(passed_on(response.headers.raw))
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        left = _length(headers)
        try:
            async for piece in response.stream:  # type: ignore[union-attr]
                left -= len(piece)
                # The last piece is known by the length: a client that has it finds the quotas settled.
                await self._send({"type": "http.response.body", "body": piece, "more_body": left != 0})
                if not left:
                    return
        except httpx.HTTPError as error:
            # Without the end of the response, the client's server closes the connection: it can see that it is cut.
            logger.warning("the server at %s broke off an answer: %r", self._proxy.upstream, error)
            return
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _refuse(self, status: int, message: str, code: str) -> None:
        await send_answer(self._proxy.refusal(status, message, code, self._scope["path"]), self._send)


def _length(headers: Iterable[Header]) -> int:
    """Return the length that the headers say; -1 if they say none."""
    for name, value in headers:
        if name == b"content-length" and value.isdigit():
            return int(value) or -1
    return -1


def passed_on(headers: Iterable[Header]) -> list[Header]:
    """Return the headers that are passed on: all but those for one connection, which ``Connection`` may name too.

    Examples
    --------
    >>> passed_on([(b"Accept", b"*/*"), (b"connection", b"close, x-hop"), (b"X-Hop", b"1"), (b"te", b"trailers")])
    [(b'accept', b'*/*')]
    """
    lower = [(name.lower(), value) for name, value in headers]
    named = {part.strip().lower() for name, value in lower if name == b"connection" for part in value.split(b",")}
    return [
        header for header in lower if header[0] not in _HOP_BY_HOP and header[0] not in named and header[0] != b"host"
    ]


def _forwarded(scope: Scope) -> list[Header]:
    """Return what tells the server who asked whom; fields that are lists go after those that are there."""
    given: dict[bytes, bytes] = {}
    for name, value in scope["headers"]:
        given.setdefault(name.lower(), value)
    headers = [(b"via", _VIA)]
    if scope.get("client"):
        headers.append((b"x-forwarded-for", str(scope["client"][0]).encode("latin-1", "replace")))
    if b"x-forwarded-proto" not in given:
        headers.append((b"x-forwarded-proto", str(scope.get("scheme", "http")).encode()))
    if b"x-forwarded-host" not in given and b"host" in given:
        headers.append((b"x-forwarded-host", given[b"host"]))
    return headers


class Dated:
    """ASGI middleware that adds ``Date`` to responses without one; a server that adds its own would double it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""

        async def dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                if not any(name.lower() == b"date" for name, _ in headers):
                    headers.append((b"date", formatdate(usegmt=True).encode()))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, dated if scope["type"] == "http" else send)
