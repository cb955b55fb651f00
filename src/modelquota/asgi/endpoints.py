"""For endpoints of one's own, without the middleware: what a request asks for, and the answer to a denial."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modelquota.asgi.ratelimit import HeaderStyle, LimitHeaders, most_tokens_at_once
from modelquota.asgi.refusal import Refuser
from modelquota.asgi.request import Demand
from modelquota.asgi.routes import DEFAULT_OUTPUT_TOKENS
from modelquota.errors import QuotaExceededError
from modelquota.protocols.body import parse_body
from modelquota.protocols.paths import PathTable
from modelquota.protocols.refusal import Answer
from modelquota.protocols.request import RequestRefusedError, estimate_of
from modelquota.protocols.tables import operations
from modelquota.protocols.tables import protocol as protocol_named
from modelquota.quota.tokens import TokenCount

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

_TABLES = PathTable(operations(), anywhere=operations())


def read_demand(
    path: str,
    body: bytes | Mapping[str, Any],
    *,
    content_type: str = "",
    content_encoding: str = "",
    default_output_tokens: int = DEFAULT_OUTPUT_TOKENS,
    default_model: str | None = None,
    manager: ResourceQuotaManager | None = None,
) -> Demand | None:
    """Return what a request asks for, as the middleware reads it; None if no model runs for it, or the path is unknown.

    Parameters
    ----------
    path : str
        The path of the request, of any protocol.
    body : bytes or mapping
        The body, or its parsed JSON.
    content_type, content_encoding : str
        The headers; of a body in bytes.
    default_output_tokens : int
        The guess for an output without a bound.
    default_model : str, optional
        The model of a request that names none.
    manager : ResourceQuotaManager, optional
        Cuts the guess to what the model ever admits at once.

    Raises
    ------
    RequestRefusedError
        The request is not valid; it should be answered with the status of this error.

    Examples
    --------
    >>> demand = read_demand("/v1/chat/completions", b'{"model": "m", "max_tokens": 50, "messages": []}')
    >>> demand.model_id, demand.estimated_tokens
    ('m', 50)
    """
    found = _TABLES.find(path)
    if found is None or found[0].free:
        return None
    operation, params = found
    parsed = body if isinstance(body, Mapping) else parse_body(body, content_type, content_encoding)
    reading = operation.read(parsed, params)
    model_id = reading.model if reading.model is not None else default_model
    if model_id is None:
        raise RequestRefusedError(400, "model is missing: name the model", "invalid_value", "model")
    quota = None if manager is None else manager.get_quota(model_id)
    most = None if quota is None else most_tokens_at_once(quota)
    tokens = reading.estimate(default_output_tokens, most)
    guess = tokens - reading.prompt_tokens if reading.is_guess else 0
    return Demand(model_id, tokens, reading.prompt_tokens, priority=reading.priority, guessed_tokens=guess)


def denial_answer(
    manager: ResourceQuotaManager,
    error: QuotaExceededError,
    *,
    protocol: str = "openai",
    demand: Demand | None = None,
    headers: HeaderStyle = "all",
    retry_spread: float = 0.1,
    busy_retry_seconds: int = 2,
) -> Answer:
    """Return the response to a request that was denied, as the middleware sends it: status, headers and body.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager that denied.
    error : QuotaExceededError
        What `reserve` or `acquire` raised.
    protocol : str
        In whose shape to answer, such as ``"anthropic"``.
    demand : Demand, optional
        What was asked for: the headers then report all of its ids.
    headers, retry_spread, busy_retry_seconds
        As for `QuotaMiddleware`.

    Examples
    --------
    >>> from modelquota import ManualClock, QuotaExceededError, ResourceQuotaManager
    >>> manager = ResourceQuotaManager(clock=ManualClock())
    >>> manager.set_quota("m", max_requests_per_second=1, burst_requests=0, on_violation="reject")
    >>> manager.reserve("m", 0).release()
    >>> try:
    ...     manager.reserve("m", 0)
    ... except QuotaExceededError as error:
    ...     answer = denial_answer(manager, error)
    >>> answer.status, dict(answer.headers)[b"x-ratelimit-remaining-requests"]
    (429, b'0')
    """
    spoken = protocol_named(protocol)
    ids: tuple[str, ...] = () if error.result.model_id is None else (error.result.model_id,)
    sizes: tuple[TokenCount, int, int] = (0, 0, 0)
    if demand is not None:
        ids = demand.model_ids
        estimate = estimate_of(demand.prompt_tokens, demand.estimated_tokens)
        sizes = (estimate, demand.ram_needed_mb, demand.ssd_needed_mb)
    fields = LimitHeaders(manager, headers).of(ids[0] if len(ids) == 1 else ids, spoken.header_style, error.result)
    return Refuser(manager, busy_retry_seconds, retry_spread, "").denial(error, spoken, fields, ids=ids, sizes=sizes)
