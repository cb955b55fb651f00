"""Responses that the middleware sends itself: errors in the format of OpenAI's API, with the time to retry."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final, NamedTuple

from modelquota._core.table.result import QuotaCheckResult
from modelquota.asgi.ratelimit import Header, exceeded_by, limit_headers
from modelquota.asgi.request import Demand, RequestRefusedError, Send
from modelquota.errors import CapacityError, QuotaExceededError
from modelquota.quota.limits import ViolationType
from modelquota.reading.report import ModelReport

MOST_PATIENCE_MS: Final = 60_000
"""The longest wait that older clients respect too; for a longer one, clients are asked not to retry by themselves."""

_JSON: Final[Header] = (b"content-type", b"application/json")


class Answer(NamedTuple):
    """A complete response."""

    status: int
    headers: list[Header]
    body: bytes

    async def send(self, send: Send) -> None:
        """Send it; a disconnected client is not an error."""
        headers = [_JSON, (b"content-length", b"%d" % len(self.body)), *self.headers]
        try:
            await send({"type": "http.response.start", "status": self.status, "headers": headers})
            await send({"type": "http.response.body", "body": self.body})
        except OSError:
            pass


def error_answer(
    status: int, message: str, kind: str, code: str | None, param: str | None = None, headers: Sequence[Header] = ()
) -> Answer:
    """Return an error in the format of OpenAI's API."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    # ASCII, since a message may quote half of a surrogate pair
    return Answer(status, list(headers), json.dumps({"error": error}).encode())


def refusal(error: RequestRefusedError, http_version: str) -> Answer:
    """Return the answer to a request that the quotas are not asked about."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    # The unread rest of a body must not be parsed as the next request; HTTP/2 has no such header.
    headers = [(b"connection", b"close")] if error.status == 413 and http_version.startswith("1") else []
    return error_answer(error.status, error.message, kind, error.code, error.param, headers)


def full_table(error: CapacityError, busy_retry_seconds: int) -> Answer:
    """Return the answer if the table has no room for a model that has not been seen before."""
    headers = [(b"retry-after", b"%d" % busy_retry_seconds)]
    return error_answer(503, "no further model can be accounted for", "server_error", "too_many_models", None, headers)


def denial(
    error: QuotaExceededError, demand: Demand, reports: Sequence[ModelReport], busy_retry_seconds: int
) -> Answer:
    """Return the answer to a request that the quotas do not admit.

    429 if a wait helps, with the time; 400 if the request exceeds a limit by itself; 503 if memory or concurrency is
    the obstacle, so that no time is known.
    """
    result = error.result
    message = f"Model {result.model_id}: {result.reason}." if result.reason else f"{error}."
    headers = limit_headers(reports, result)
    wait_ms = result.retry_after_ms
    if wait_ms is not None:
        return _too_many(message, result, wait_ms, headers, busy_retry_seconds)
    if result.never_fits:
        message = _exceeded(demand, reports, result) or message
        headers.append((b"x-should-retry", b"false"))
        return error_answer(400, message, "invalid_request_error", "request_exceeds_limit", None, headers)
    headers.append((b"retry-after", b"%d" % busy_retry_seconds))
    return error_answer(503, message, "server_error", "overloaded", None, headers)


def _exceeded(demand: Demand, reports: Sequence[ModelReport], result: QuotaCheckResult) -> str | None:
    """Name the limit that a request exceeds by itself, if it is not the one that the result names."""
    for report in reports:
        limit = exceeded_by(report.quota, demand.estimated_tokens, demand.ram_needed_mb, demand.ssd_needed_mb)
        if limit is not None:
            if limit is result.limit and report.model_id == result.model_id:
                return None
            return f"Model {report.model_id}: more than its limit of {limit.label} ever admits at once."
    return None


def _too_many(
    message: str, result: QuotaCheckResult, wait_ms: int, headers: list[Header], busy_retry_seconds: int
) -> Answer:
    spent = result.violation_type is ViolationType.QUOTA_LIMIT
    if spent and result.others_hold:  # tokens that are only reserved are not spent: they may come back at any moment
        spent, wait_ms = False, min(wait_ms, busy_retry_seconds * 1000)
    headers += (
        (b"retry-after", b"%d" % max(-(-wait_ms // 1000), 1)),
        (b"retry-after-ms", b"%d" % wait_ms),
        (b"x-should-retry", b"true" if wait_ms <= MOST_PATIENCE_MS else b"false"),
    )
    if spent:
        return error_answer(429, message, "insufficient_quota", "insufficient_quota", None, headers)
    unit = "requests" if result.limit is None else result.limit.unit
    return error_answer(429, message, unit, "rate_limit_exceeded", None, headers)
