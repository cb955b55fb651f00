"""Ollama's API: chat, generate and embed. It streams lines of JSON unless the request says ``"stream": false``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from modelquota.protocols.estimate import estimate_values
from modelquota.protocols.openai import model_of
from modelquota.protocols.protocol import Operation, Params, Protocol
from modelquota.protocols.refusal import Answer, Header, Refusal, json_answer
from modelquota.protocols.request import Reading, RequestRefusedError, output_bound
from modelquota.protocols.usage import OUTPUT, PROMPT
from modelquota.quota.config import MAX_COUNT

_TEXT: Final = ("messages", "prompt", "system", "template", "suffix", "tools", "format", "input")
_UNBOUNDED: Final = (-1, -2)  # -2 fills the context


def _as_go(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the fields as a server in Go reads them: names in any case, and the last one of a name."""
    return {name.casefold(): value for name, value in body.items()}


def _read_generation(body: Mapping[str, Any], params: Params) -> Reading:
    body = _as_go(body)
    options = body.get("options")
    if options is not None and not isinstance(options, dict):
        raise RequestRefusedError(400, "options is not an object", "invalid_value", "options")
    return Reading(
        model_of(body, params),
        _prompt(body),
        1,
        output_bound(_as_go(options or {}), "num_predict", unbounded=_UNBOUNDED),
        body.get("stream") is not False,
    )


def _read_input(body: Mapping[str, Any], params: Params) -> Reading:
    body = _as_go(body)
    return Reading(model_of(body, params), _prompt(body), 0)


def _prompt(body: Mapping[str, Any]) -> int:
    parts = [body[field] for field in _TEXT if field in body]
    if isinstance(body.get("images"), list):
        parts.append({"images": body["images"]})
    return min(estimate_values(parts), MAX_COUNT)


class Ollama(Protocol):
    """Ollama's API."""

    name = "ollama"
    usage = {("prompt_eval_count",): PROMPT, ("eval_count",): OUTPUT}  # noqa: RUF012

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        generate, only_input = Operation(self, _read_generation), Operation(self, _read_input)
        return {
            "/api/chat": generate,
            "/api/generate": generate,
            "/api/embed": only_input,
            "/api/embeddings": only_input,
        }

    def refuse(self, refusal: Refusal, headers: list[Header]) -> Answer:
        """See `Protocol`."""
        return json_answer(refusal.status, {"error": refusal.message}, headers)

    def ending(self, last: Mapping[str, dict[str, Any]], output_tokens: int) -> bytes:
        """See `Protocol`."""
        event = dict(last.get("", {}))
        if "message" in event:
            event["message"] = {"role": "assistant", "content": ""}
        else:
            event["response"] = ""
        event |= {"done": True, "done_reason": "length", "eval_count": output_tokens}
        return json.dumps(event, separators=(",", ":")).encode() + b"\n"
