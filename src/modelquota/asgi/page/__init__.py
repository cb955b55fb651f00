"""`QuotaPage`: use against limits, queue and denials of every model, on one page that refreshes itself."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import json
import zlib
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qs

from modelquota.asgi.page.state import MOST_SHOWN, page_state
from modelquota.asgi.types import Receive, Scope, Send

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

__all__ = ["MOST_SHOWN", "QuotaPage", "page_state"]

_SCRIPTS: Final = ("text.js", "watch.js", "draw.js", "page.js", "edit.js")
"""The parts of the page's script, in order; together they are one."""

_COMPRESSED_FROM: Final = 10_000
"""The shortest JSON that is compressed, in bytes."""

_COMMON: Final = [
    (b"cache-control", b"no-store"),
    (b"vary", b"accept, accept-encoding"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class QuotaPage:
    """ASGI application: a page that shows the state of all quotas. Read-only.

    ``GET`` with ``Accept: application/json`` returns what the page shows, which is how it refreshes itself; with
    ``?find=TEXT`` only the models that have this text in an id.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager whose quotas to show.
    allow : callable, optional
        Given the ASGI scope, returns whether the request may see the page; may be a coroutine function. If it returns
        False, the answer is 401 and asks for a name and password (HTTP basic authentication).
    admin : str, optional
        Where `QuotaAdmin` is, relative to the page, such as ``"quotas"``: the page can then edit quotas, once it is
        given the token.

    Examples
    --------
    With Starlette or FastAPI: ``app.mount("/quota", QuotaPage(manager))``.
    """

    def __init__(
        self,
        manager: ResourceQuotaManager,
        *,
        allow: Callable[[Scope], bool | Awaitable[bool]] | None = None,
        admin: str | None = None,
    ) -> None:
        self.manager = manager
        self.allow = allow
        self.admin = admin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI entry point."""
        if scope["type"] != "http":
            return
        if scope["method"] not in ("GET", "HEAD"):
            await _answer(send, 405, b"text/plain", b"read-only", [(b"allow", b"GET, HEAD")])
            return
        if self.allow is not None:
            allowed = self.allow(scope)
            if not (allowed if isinstance(allowed, bool) else await allowed):
                challenge = (b"www-authenticate", b'Basic realm="modelquota", charset="UTF-8"')
                await _answer(send, 401, b"text/plain", b"not allowed", [challenge])
                return
        head = scope["method"] == "HEAD"
        if b"application/json" in _header(scope, b"accept"):
            find = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("find", [""])[0]
            compressed = b"gzip" in _header(scope, b"accept-encoding")
            # In a thread: thousands of models take longer than a request should wait for the loop.
            body, headers = await asyncio.to_thread(_state_body, self, find, compressed)
            await _answer(send, 200, b"application/json", body, headers, head=head)
        else:
            body, policy = _page()
            await _answer(
                send, 200, b"text/html; charset=utf-8", body, [(b"content-security-policy", policy)], head=head
            )


def _state_body(page: QuotaPage, find: str, may_compress: bool) -> tuple[bytes, list[tuple[bytes, bytes]]]:
    body = json.dumps(page_state(page.manager, page.admin, find=find), separators=(",", ":")).encode()
    if not may_compress or len(body) < _COMPRESSED_FROM:
        return body, []
    packer = zlib.compressobj(1, wbits=31)  # the format of gzip
    return packer.compress(body) + packer.flush(), [(b"content-encoding", b"gzip")]


def _header(scope: Scope, wanted: bytes) -> bytes:
    return b",".join(value for name, value in scope.get("headers", ()) if name.lower() == wanted).lower()


@functools.lru_cache(maxsize=1)
def _page() -> tuple[bytes, bytes]:
    """The page as one file, and a policy that lets the browser run only this script and load nothing from elsewhere."""
    folder = resources.files("modelquota.asgi.page")
    html = folder.joinpath("page.html").read_bytes()
    script = b"".join([b'"use strict";\n', *(folder.joinpath(name).read_bytes() for name in _SCRIPTS)])
    sources = []
    for tag, part in ((b"style", folder.joinpath("page.css").read_bytes()), (b"script", script)):
        html = html.replace(b"<%b></%b>" % (tag, tag), b"<%b>%b</%b>" % (tag, part, tag))
        sources.append(f"{tag.decode()}-src 'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'")
    policy = (
        f"default-src 'none'; {'; '.join(sources)}; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'; require-trusted-types-for 'script'"
    )
    return html, policy.encode()


async def _answer(
    send: Send, status: int, kind: bytes, body: bytes, headers: list[tuple[bytes, bytes]], *, head: bool = False
) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *_COMMON, *headers]
    with contextlib.suppress(OSError):  # ASGI lets a server raise it after the client has disconnected
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else body})
