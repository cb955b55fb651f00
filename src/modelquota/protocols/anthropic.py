"""Anthropic's API: messages, and counting the tokens of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelquota.protocols.openai import generation, sse
from modelquota.protocols.protocol import Operation, Protocol, nothing
from modelquota.protocols.refusal import Answer, Header, Refusal, RefusalKind, json_answer
from modelquota.protocols.usage import ANTHROPIC_FIELDS, under

_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
}
_OVERLOADED: Final = 529


class Anthropic(Protocol):
    """Anthropic's Messages API."""

    name = "anthropic"
    usage = under(("usage",), ANTHROPIC_FIELDS) | under(("message", "usage"), ANTHROPIC_FIELDS)
    header_style = "anthropic"

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        return {
            "/v1/messages": generation(self),
            "/v1/messages/count_tokens": Operation(self, nothing, free=True),
        }

    def refuse(self, refusal: Refusal, headers: list[Header]) -> Answer:
        """See `Protocol`."""
        status = refusal.status
        if refusal.kind is RefusalKind.OVERLOADED:
            status, kind = _OVERLOADED, "overloaded_error"
        else:
            kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
        error = {"type": kind, "message": refusal.message}
        return json_answer(status, {"type": "error", "error": error}, headers)

    def ending(self, last: Mapping[str, dict[str, Any]], output_tokens: int) -> bytes:
        """See `Protocol`."""
        events = []
        started, stopped = last.get("content_block_start"), last.get("content_block_stop")
        index = -1 if started is None else started.get("index", 0)
        if started is not None and (stopped is None or stopped.get("index", 0) != index):
            events.append({"type": "content_block_stop", "index": index})
        end = {"stop_reason": "max_tokens", "stop_sequence": None}
        events.append({"type": "message_delta", "delta": end, "usage": {"output_tokens": output_tokens}})
        events.append({"type": "message_stop"})
        return b"".join(sse(event, str(event["type"])) for event in events)
