"""Why a request is not served, from what the quotas say; the protocol puts it into its own shape."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from modelquota._core.table.result import QuotaCheckResult
from modelquota.asgi.ratelimit import exceeded_by
from modelquota.asgi.types import Header, Send
from modelquota.errors import CapacityError, QuotaExceededError
from modelquota.protocols.body import accepted_encodings
from modelquota.protocols.durations import duration
from modelquota.protocols.protocol import Protocol
from modelquota.protocols.refusal import Answer, Refusal, RefusalKind
from modelquota.protocols.request import RequestRefusedError
from modelquota.quota.limits import CATALOGUE, Limit, ViolationType
from modelquota.quota.tokens import TokenCount

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

MOST_PATIENCE_MS: Final = 60_000
"""The longest wait that older clients respect too; for a longer one, clients are asked not to retry by themselves."""

_SHORTEST_QUOTA_S: Final = 3600  # a minute that is used up is a rate


class Refuser:
    """Makes the answers to requests that are not served.

    Parameters
    ----------
    manager : ResourceQuotaManager
    busy_retry_seconds : int
        The time to retry if memory or concurrency is the obstacle, so that none is known.
    retry_spread : float
        The largest part of a wait that is added to it at random, so that clients that were denied together do not
        come back together.
    namespace : str
        What the ids of tenants begin with.
    spread : callable
        Returns a random number, 0.0 to 1.0.
    """

    __slots__ = ("_busy_ms", "_manager", "_namespace", "_random", "_spread")

    def __init__(
        self,
        manager: ResourceQuotaManager,
        busy_retry_seconds: int,
        retry_spread: float,
        namespace: str,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._manager = manager
        self._busy_ms = busy_retry_seconds * 1000
        self._spread = retry_spread
        self._namespace = namespace
        self._random = spread

    def denial(
        self,
        error: QuotaExceededError,
        protocol: Protocol,
        headers: list[Header],
        *,
        ids: Sequence[str] = (),
        tenants: Sequence[str] = (),
        sizes: tuple[TokenCount, int, int] = (0, 0, 0),
    ) -> Answer:
        """Return the answer to a request that the quotas do not admit.

        429 if a wait helps, or if a tenant has as many requests open as it may; 400 if the request exceeds a limit by
        itself; 503 if memory or concurrency of the model is the obstacle. `sizes` are tokens, MB of RAM and of SSD.
        """
        result = error.result
        who = self._who(result.model_id, tenants)
        what = f"{who}: {result.reason.partition('; ')[0]}" if result.reason else str(error)
        if result.never_fits:
            message = self._exceeded(ids, tenants, sizes, result) or f"{what}; never fits: more than the limit itself."
            refusal = Refusal(RefusalKind.NEVER_FITS, 400, message, "request_exceeds_limit")
            return protocol.refuse(refusal, [*headers, (b"x-should-retry", b"false")])
        wait_ms = result.retry_after_ms
        unit = "requests" if result.limit is None else result.limit.unit
        if wait_ms is None:
            if result.limit is Limit.CONCURRENCY and _is_of(result.model_id, tenants):
                message = f"{what}; wait for one of them to end."
                refusal = Refusal(RefusalKind.RATE_LIMIT, 429, message, "rate_limit_exceeded", None, unit)
            else:
                message = f"{what}; no wait is known to help."
                refusal = Refusal(RefusalKind.OVERLOADED, 503, message, "overloaded")
            return self._answer(protocol, refusal, headers, self._busy_ms)
        spent = _is_spent(result)
        if result.violation_type is ViolationType.QUOTA_LIMIT and result.others_hold:  # it may come back any moment
            wait_ms = min(wait_ms, self._busy_ms)
        message = f"{what}; retry in {_rounded_up(wait_ms)}."
        if spent:
            refusal = Refusal(RefusalKind.QUOTA_SPENT, 429, message, "insufficient_quota", None, unit)
        else:
            refusal = Refusal(RefusalKind.RATE_LIMIT, 429, message, "rate_limit_exceeded", None, unit)
        return self._answer(protocol, refusal, headers, wait_ms)

    def full_table(self, error: CapacityError, protocol: Protocol) -> Answer:
        """Return the answer if the table has no room for an id that has not been seen before."""
        refusal = Refusal(RefusalKind.OVERLOADED, 503, "no further model can be accounted for", "too_many_models")
        return self._answer(protocol, refusal, [], self._busy_ms)

    def not_accepted(self, error: RequestRefusedError, protocol: Protocol, *, close: bool = False) -> Answer:
        """Return the answer to a request that the quotas are not asked about."""
        headers: list[Header] = [(b"connection", b"close")] if close else []
        if error.status == 415:
            headers.append((b"accept-encoding", accepted_encodings().encode()))
        if error.status == 503:
            refusal = Refusal(RefusalKind.OVERLOADED, 503, error.message, error.code, error.param)
            return self._answer(protocol, refusal, headers, self._busy_ms)
        refusal = Refusal(RefusalKind.INVALID, error.status, error.message, error.code, error.param)
        return protocol.refuse(refusal, headers)

    def _answer(self, protocol: Protocol, refusal: Refusal, headers: list[Header], wait_ms: int) -> Answer:
        soon = wait_ms <= MOST_PATIENCE_MS
        wait_ms += int(wait_ms * self._spread * self._random())
        headers = [
            *headers,
            (b"retry-after", b"%d" % max(-(-wait_ms // 1000), 1)),
            (b"retry-after-ms", b"%d" % wait_ms),
            (b"x-should-retry", b"true" if soon else b"false"),
        ]
        return protocol.refuse(refusal._replace(retry_ms=wait_ms), headers)

    def _who(self, model_id: str | None, tenants: Sequence[str]) -> str:
        if model_id is not None and _is_of(model_id, tenants):
            return f"Tenant {model_id.removeprefix(self._namespace)}"
        return f"Model {model_id}"

    def _exceeded(
        self, ids: Sequence[str], tenants: Sequence[str], sizes: tuple[TokenCount, int, int], result: QuotaCheckResult
    ) -> str | None:
        """Name the limit that a request exceeds by itself, if it is not the one that the result names."""
        meters = [meter for model_id in ids for meter in self._manager._meters_of(model_id)]
        for model_id in (*ids, *meters):
            quota = self._manager.get_quota(model_id)
            limit = None if quota is None else exceeded_by(quota, *sizes)
            if quota is not None and limit is not None:
                if limit is result.limit and model_id == result.model_id:
                    return None
                label = limit.label.replace("tokens", "dollars") if quota.unit == "usd" else limit.label
                return f"{self._who(model_id, tenants)}: more than its limit of {label} ever admits at once."
        return None


def _is_of(model_id: str | None, tenants: Sequence[str]) -> bool:
    """Whether an id is a tenant's, or that of a meter of one."""
    return model_id is not None and (model_id in tenants or model_id.partition("#")[0] in tenants)


def _is_spent(result: QuotaCheckResult) -> bool:
    """Whether an hour or more is used up: not just reserved by requests that may give it back at any moment.

    Nor if only this host's share of it is used up, which may grow at any moment.
    """
    if result.violation_type is not ViolationType.QUOTA_LIMIT or result.others_hold or result.starved:
        return False
    window = None if result.limit is None else CATALOGUE[result.limit].window
    return window is None or window.seconds >= _SHORTEST_QUOTA_S


def _rounded_up(ms: int) -> str:
    return duration(ms if ms < 1000 else -(-ms // 100) * 100)


async def send_answer(answer: Answer, send: Send) -> None:
    """Send a complete response; a disconnected client is not an error."""
    with contextlib.suppress(OSError):
        await send({"type": "http.response.start", "status": answer.status, "headers": answer.headers})
        await send({"type": "http.response.body", "body": answer.body})
