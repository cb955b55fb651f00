"""vLLM's server: OpenAI's and Anthropic's API, and paths of its own that embed, rank, pool, score and generate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelquota.protocols.anthropic import Anthropic
from modelquota.protocols.estimate import estimate_values
from modelquota.protocols.openai import OpenAI, generation, model_of, reads_generation
from modelquota.protocols.protocol import Operation, Params, nothing
from modelquota.protocols.request import Reading, output_bound, whole_number
from modelquota.quota.config import MAX_COUNT

_INPUT_FIELDS: Final = (
    "input", "inputs", "messages", "prompt", "query", "queries", "document", "documents", "items", "data", "texts",
    "text", "text_1", "text_2", "data_1", "data_2", "images", "image", "label_token_ids", "token_ids", "input_ids",
)  # fmt: skip
_FARTHEST: Final = 2**31 - 1
_INPUT_PATHS: Final = (
    "/pooling", "/classify", "/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/v2/embed",
    "/generative_scoring",
)  # fmt: skip
_FREE_PATHS: Final = (
    "/tokenize", "/detokenize", "/v1/messages/count_tokens",
    "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render", "/v1/responses/render",
    "/v1/chat/completions/derender", "/v1/completions/derender",
)  # fmt: skip


def priority_of(body: Mapping[str, Any]) -> int:
    """Return vLLM's priority as ours: there the lower is the sooner, here the higher."""
    given = body.get("priority")
    return max(-_FARTHEST, min(-given, _FARTHEST)) if type(given) is int else 0


def prioritized(operation: Operation) -> Operation:
    """Return the operation, with the priority of the request. What has one cannot be skimmed."""

    def read(body: Mapping[str, Any], params: Params) -> Reading:
        reading = operation.read(body, params)
        return reading._replace(priority=priority_of(body)) if body.get("priority") else reading

    return Operation(operation.protocol, read, skim=operation.skim)


def read_input(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a request whose input may be in any field, and which generates nothing."""
    parts = [body[field] for field in _INPUT_FIELDS if field in body]
    return Reading(model_of(body, params), min(estimate_values(parts), MAX_COUNT), 0)


def read_tokens(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a request of token ids, with the bound among the sampling parameters."""
    sampling = body.get("sampling_params")
    sampling = sampling if isinstance(sampling, dict) else {}
    return Reading(
        model_of(body, params),
        min(estimate_values([body[field] for field in _INPUT_FIELDS if field in body]), MAX_COUNT),
        whole_number(sampling, "n", least=1) or 1,
        output_bound(sampling, "max_tokens"),
        body.get("stream") is True,
    )


def read_batch(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a chat with several conversations: ``messages`` is a list of lists."""
    reading = reads_generation()(body, params)
    messages = body.get("messages")
    if isinstance(messages, list) and messages and isinstance(messages[0], list):
        return reading._replace(outputs=reading.outputs * len(messages))
    return reading


def read_invocation(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a request to SageMaker's path, by its content: a chat, a completion, or something to embed or rank."""
    if "messages" in body or "prompt" in body:
        return reads_generation()(body, params)
    return read_input(body, params)


class VLLM(OpenAI):
    """vLLM's server. Its priorities are obeyed on the routes of this table."""

    name = "vllm"

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        own = dict.fromkeys(_INPUT_PATHS, read_input) | {
            "/invocations": read_invocation,
            "/inference/v1/generate": read_tokens,
            "/v1/chat/completions/batch": read_batch,
        }
        found = super().operations() | {path: Operation(self, read) for path, read in own.items()}
        found = {path: prioritized(operation) for path, operation in found.items()}
        found |= {path: Operation(self, nothing, free=True) for path in _FREE_PATHS}
        return {**found, "/v1/messages": prioritized(generation(_MESSAGES))}


_MESSAGES: Final = Anthropic()
