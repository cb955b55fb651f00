"""`QuotaPage`: use against limits, queue and refusals of every model, on one page that refreshes itself."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelquota.asgi.request import Receive, Scope, Send
from modelquota.reading.counting import denied
from modelquota.reading.utilization import Utilization, read_utilization

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

MOST_SHOWN: Final = 100
"""Models on the page: those with most refusals, waiting requests and use."""

_COMMON: Final = [
    (b"cache-control", b"no-store"),
    (b"vary", b"accept"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class QuotaPage:
    """ASGI application: a page that shows the state of all quotas. Read-only.

    ``GET`` with ``Accept: application/json`` returns what the page shows, which is how it refreshes itself.

    Parameters
    ----------
    manager : ResourceQuotaManager
        Whose quotas to show.
    allow : callable, optional
        Given the ASGI scope, says whether the request may see the page; may be a coroutine function. Where it says no,
        the answer is 401 and asks for a name and password (HTTP basic authentication).

    Examples
    --------
    With Starlette or FastAPI: ``app.mount("/quota", QuotaPage(manager))``.
    """

    def __init__(
        self, manager: ResourceQuotaManager, *, allow: Callable[[Scope], bool | Awaitable[bool]] | None = None
    ) -> None:
        self.manager = manager
        self.allow = allow

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
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
        if _wants_json(scope):
            body = json.dumps(page_state(self.manager), separators=(",", ":")).encode()
            await _answer(send, 200, b"application/json", body, [], head=head)
        else:
            body, policy = _page()
            await _answer(
                send, 200, b"text/html; charset=utf-8", body, [(b"content-security-policy", policy)], head=head
            )


def page_state(manager: ResourceQuotaManager) -> dict[str, Any]:
    """Return what the page shows, as plain values for JSON."""
    found, stats = read_utilization(manager), manager.get_stats()
    counters, refused = found.counters, np.maximum(denied(found.counters), 0)
    # What needs attention comes into a selection first; what is shown stays in the order of the manager. Models that
    # deny nothing come after all that do.
    order = np.lexsort((found.pressure, refused, counters["queued_requests"], found.denies))[::-1][:MOST_SHOWN]
    return {
        "models": [_model_state(found, index, int(refused[index])) for index in sorted(order.tolist())],
        "models_total": len(found),
        "enforcing": manager.enforcement_enabled,
        "pressure": round(found.highest, 3),
        "checks": stats.total_checks,
        "admitted": stats.allowed_requests,
        "waited": stats.waited_requests,
        "warned": stats.warned_requests,
        "waiting": int(counters["queued_requests"].sum()),
        "serving": int(counters["concurrent_requests"].sum()),
        "refused": stats.denied_requests,
        "tokens_charged": stats.tokens_charged,
        "tokens_refunded": stats.tokens_refunded,
    }


def _model_state(found: Utilization, index: int, refused: int) -> dict[str, Any]:
    quota = found.quotas[index]
    usage = dict(zip(found.counters.dtype.names or (), found.counters[index].tolist(), strict=True))
    meters = (
        ("Concurrent requests", usage["concurrent_requests"], quota.max_concurrent_requests, ""),
        ("Requests per second", usage["requests_this_second"], quota.max_requests_per_second, ""),
        (
            "Request burst",
            usage["burst_requests_used"],
            _burst(quota.max_requests_per_second, quota.burst_requests),
            "",
        ),
        ("Tokens per second", usage["tokens_this_second"], quota.max_tokens_per_second, ""),
        ("Token burst", usage["burst_tokens_used"], _burst(quota.max_tokens_per_second, quota.burst_tokens), ""),
        ("Tokens per hour", usage["tokens_this_hour"], quota.max_tokens_per_hour, ""),
        ("Requests per hour", usage["requests_this_hour"], quota.max_requests_per_hour, ""),
        ("Tokens per day", usage["tokens_this_day"], quota.max_tokens_per_day, ""),
        ("Requests per day", usage["requests_this_day"], quota.max_requests_per_day, ""),
        ("RAM", usage["current_ram_mb"] + usage["reserved_ram_mb"], quota.max_ram_mb, "MB"),
        ("SSD", usage["current_ssd_mb"] + usage["reserved_ssd_mb"], quota.max_ssd_mb, "MB"),
    )
    return {
        "id": quota.model_id,
        "action": quota.on_violation.value,
        "denies": bool(found.denies[index]),
        "pressure": round(float(found.pressure[index]), 3),
        "serving": usage["concurrent_requests"],
        "waiting": usage["queued_requests"],
        "queue": quota.max_queued_requests,
        "admitted": usage["allowed_total"],
        "waited": usage["waited_total"],
        "warned": usage["warned_total"],
        "refused": refused,
        "tokens_charged": usage["tokens_total"],
        "tokens_refunded": usage["tokens_refunded_total"],
        "meters": [
            {"label": label, "used": used, "limit": limit, "unit": unit}
            for label, used, limit, unit in meters
            if limit is not None
        ],
    }


def _burst(rate: float | None, burst: int) -> int | None:
    """A burst is a limit only where there are a rate and a burst."""
    return None if rate is None else burst or None


def _wants_json(scope: Scope) -> bool:
    for name, value in scope.get("headers", ()):
        if name.lower() == b"accept":
            return b"application/json" in value.lower()
    return False


@functools.lru_cache(maxsize=1)
def _page() -> tuple[bytes, bytes]:
    """The page, and a policy under which a browser runs this script and no other, and loads nothing from elsewhere."""
    html = resources.files("modelquota.asgi").joinpath("page.html").read_bytes()
    sources = []
    for tag in (b"style", b"script"):
        inline = re.findall(b"<%b>(.*?)</%b>" % (tag, tag), html, re.DOTALL)
        hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in inline)
        sources.append(f"{tag.decode()}-src {hashes}")
    policy = f"default-src 'none'; {'; '.join(sources)}; connect-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    return html, policy.encode()


async def _answer(
    send: Send, status: int, kind: bytes, body: bytes, headers: list[tuple[bytes, bytes]], *, head: bool = False
) -> None:
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body)), *_COMMON, *headers]
    with contextlib.suppress(OSError):  # as a server may raise, by the protocol, once the client has left
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else body})
