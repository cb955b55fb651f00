"""`QuotaPage`: use against limits, queue and denials of every model, on one page that refreshes itself."""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from importlib import resources
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelquota.asgi.types import Receive, Scope, Send
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import DENYING, LimitRecord
from modelquota.reading.counting import denied
from modelquota.reading.unmetered import unmetered_of
from modelquota.reading.utilization import LIMITS, Utilization, read_utilization

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

MOST_SHOWN: Final = 100
"""Most models on the page: those with the most waiting requests, denials and use."""

_METERS: Final = sorted(DENYING, key=lambda record: record.unit == "MB")
"""The limits that have a meter, memory last."""

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
        The manager whose quotas to show.
    allow : callable, optional
        Given the ASGI scope, returns whether the request may see the page; may be a coroutine function. If it returns
        False, the answer is 401 and asks for a name and password (HTTP basic authentication).

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
    # Models that need attention are selected first, and models that deny nothing last. Those selected are shown in the
    # order of the manager.
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
        "unmetered": unmetered_of(manager).counts(),
    }


def _model_state(found: Utilization, index: int, refused: int) -> dict[str, Any]:
    quota = found.quotas[index]
    usage = dict(zip(found.counters.dtype.names or (), found.counters[index].tolist(), strict=True))
    percent = dict(zip(LIMITS, found.percent[index].tolist(), strict=True))
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
        "meters": [meter for record in _METERS for meter in _meters(record, quota, usage, percent[record.limit])],
    }


def _meters(
    record: LimitRecord, quota: ResourceQuotaConfig, usage: dict[str, Any], percent: float
) -> Iterator[dict[str, Any]]:
    """Yield the meter of a limit, and for a rate also that of its burst; nothing if it is not limited."""
    limit = getattr(quota, record.quota_field)
    if limit is None:
        return
    used = sum(usage[field] for field in record.usage_fields)
    yield _meter(record.label[0].upper() + record.label[1:], used, limit, record, percent)
    burst = getattr(quota, record.burst_field) if record.is_rate else 0
    if burst:
        ahead = usage[record.ahead_field]
        label = f"{record.unit.removesuffix('s').capitalize()} burst"
        yield _meter(label, ahead, burst, record, 100 * ahead / burst)


def _meter(label: str, used: int, limit: float, record: LimitRecord, percent: float) -> dict[str, Any]:
    unit = "MB" if record.unit == "MB" else ""
    return {
        "label": label,
        "used": used,
        "limit": limit,
        "unit": unit,
        "percent": round(percent, 3) if limit else 100.0,
    }


def _wants_json(scope: Scope) -> bool:
    for name, value in scope.get("headers", ()):
        if name.lower() == b"accept":
            return b"application/json" in value.lower()
    return False


@functools.lru_cache(maxsize=1)
def _page() -> tuple[bytes, bytes]:
    """The page, and a policy that lets the browser run only this script and load nothing from elsewhere."""
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
    with contextlib.suppress(OSError):  # ASGI lets a server raise it after the client has disconnected
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if head else body})
