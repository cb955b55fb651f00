"""Google's Gemini API: generateContent and its stream, embeddings; with the model in the path."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Final

from modelquota.protocols.estimate import estimate_values
from modelquota.protocols.openai import OpenAI, sse
from modelquota.protocols.protocol import Operation, Params, Protocol, nothing
from modelquota.protocols.refusal import Answer, Header, Refusal, RefusalKind, json_answer
from modelquota.protocols.request import Reading, RequestRefusedError, output_bound, whole_number
from modelquota.protocols.usage import ANY, CACHED, MORE_INPUT, MORE_OUTPUT, OUTPUT, PROMPT, TOTAL, Places, under

_FIELDS: Final[Places] = {
    ("promptTokenCount",): PROMPT,
    ("cachedContentTokenCount",): CACHED,
    ("toolUsePromptTokenCount",): MORE_INPUT,
    ("candidatesTokenCount",): OUTPUT,
    ("thoughtsTokenCount",): MORE_OUTPUT,
    ("totalTokenCount",): TOTAL,
}
_TEXT: Final = ("contents", "content", "systemInstruction", "system_instruction", "tools", "requests")
_STATUSES: Final = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    408: "DEADLINE_EXCEEDED",
    413: "INVALID_ARGUMENT",
    415: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
}
_MODELS: Final = (
    "/v1beta/models/{model}",
    "/v1alpha/models/{model}",
    "/v1/models/{model}",
    "/v1/projects/{project}/locations/{location}/publishers/google/models/{model}",
    "/v1beta1/projects/{project}/locations/{location}/publishers/google/models/{model}",
)


def _read_generation(body: Mapping[str, Any], params: Params, *, stream: bool = False) -> Reading:
    config = _object(body, "generationConfig", "generation_config")
    parts = [body[field] for field in _TEXT if field in body]
    parts += [config[field] for field in ("responseSchema", "response_schema", "responseJsonSchema") if field in config]
    return Reading(
        params.get("model"),
        estimate_values(parts),
        whole_number(config, "candidateCount", least=1) or whole_number(config, "candidate_count", least=1) or 1,
        output_bound(config, "maxOutputTokens", "max_output_tokens"),
        stream,
    )


def _read_input(body: Mapping[str, Any], params: Params) -> Reading:
    return Reading(params.get("model"), estimate_values([body[field] for field in _TEXT if field in body]), 0)


def _object(body: Mapping[str, Any], *fields: str) -> Mapping[str, Any]:
    for field in fields:
        value = body.get(field)
        if isinstance(value, dict):
            return value
        if value is not None:
            raise RequestRefusedError(400, f"{field} is not an object", "invalid_value", field)
    return {}


class Gemini(Protocol):
    """Google's Gemini API, of AI Studio and of Vertex AI. A stream is of server-sent events, or one list of JSON."""

    name = "gemini"
    usage = under(("usageMetadata",), _FIELDS) | under((ANY, "usageMetadata"), _FIELDS)

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        generate = Operation(self, _read_generation)
        only_input = Operation(self, _read_input)
        free = Operation(self, nothing, free=True)
        verbs = {
            "generateContent": generate,
            "streamGenerateContent": Operation(self, functools.partial(_read_generation, stream=True)),
            "embedContent": only_input,
            "batchEmbedContents": only_input,
            "countTokens": free,
        }
        found = {f"{model}:{verb}": operation for model in _MODELS for verb, operation in verbs.items()}
        below = OpenAI().below_version()
        return found | {f"/v1beta/openai{path}": operation for path, operation in below.items()}

    def refuse(self, refusal: Refusal, headers: list[Header]) -> Answer:
        """See `Protocol`."""
        status = refusal.status
        word = "UNAVAILABLE" if refusal.kind is RefusalKind.OVERLOADED else _STATUSES.get(status, "INTERNAL")
        error: dict[str, Any] = {"code": status, "message": refusal.message, "status": word}
        if refusal.retry_ms is not None:
            delay = f"{refusal.retry_ms / 1000:g}s"
            error["details"] = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
        return json_answer(status, {"error": error}, headers)

    def ending(self, last: Mapping[str, dict[str, Any]], output_tokens: int) -> bytes:
        """See `Protocol`."""
        event = {key: value for key, value in last.get("", {}).items() if key != "candidates"}
        candidate = {"content": {"parts": [{"text": ""}], "role": "model"}, "finishReason": "MAX_TOKENS", "index": 0}
        return sse({**event, "candidates": [candidate]})
