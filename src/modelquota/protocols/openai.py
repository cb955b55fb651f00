"""OpenAI's API: chat, completions, responses, embeddings, audio and images."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

from modelquota.protocols.estimate import MEDIA_TOKENS, TEXT_FIELDS, estimate_prompt, estimate_values
from modelquota.protocols.protocol import Operation, Params, Protocol, Reader
from modelquota.protocols.request import OUTPUT_FIELDS, Reading, model_name, output_bound, whole_number
from modelquota.protocols.skim import skim_generation, skim_usage
from modelquota.protocols.usage import ANTHROPIC_FIELDS, OPENAI_FIELDS, RESPONSES_FIELDS, under
from modelquota.quota.config import MAX_COUNT

PromptTokens = Callable[[Mapping[str, Any]], int]

_IMAGE_FIELDS: Final = (*TEXT_FIELDS, "image", "image[]", "images", "mask")
_OUTPUTS_FIELDS: Final = frozenset(("n", "best_of", "prompt"))
_USAGE: Final = (OPENAI_FIELDS, RESPONSES_FIELDS, ANTHROPIC_FIELDS)


def model_of(body: Mapping[str, Any], params: Params) -> str | None:
    """Return the model that the path names, or else the body."""
    return params.get("model") or model_name(body)


def outputs_of(body: Mapping[str, Any]) -> int:
    """Return how many outputs a request asks for: ``n``, ``best_of``, and each prompt of a list."""
    outputs = max(whole_number(body, "n", least=1) or 1, whole_number(body, "best_of", least=1) or 1)
    prompts = body.get("prompt")
    if isinstance(prompts, list) and prompts and isinstance(prompts[0], str | list):
        outputs *= len(prompts)
    return outputs


def reads_generation(prompt_tokens: PromptTokens = estimate_prompt) -> Reader:
    """Return the reader of requests that generate text."""

    def read(body: Mapping[str, Any], params: Params) -> Reading:
        prompt = prompt_tokens(body)
        return Reading(
            model_of(body, params),
            prompt if prompt < MAX_COUNT else MAX_COUNT,
            1 if _OUTPUTS_FIELDS.isdisjoint(body) else outputs_of(body),
            output_bound(body, *OUTPUT_FIELDS),
            body.get("stream") is True,
        )

    return read


def generation(protocol: Protocol, prompt_tokens: PromptTokens = estimate_prompt) -> Operation:
    """Return the operation of requests that generate text."""
    skim = skim_generation if prompt_tokens is estimate_prompt else None
    return Operation(protocol, reads_generation(prompt_tokens), skim=skim)


def reads_input(prompt_tokens: PromptTokens = estimate_prompt) -> Reader:
    """Return the reader of requests that only read their input, such as embeddings and speech."""

    def read(body: Mapping[str, Any], params: Params) -> Reading:
        return Reading(model_of(body, params), min(prompt_tokens(body), MAX_COUNT), 0, None, body.get("stream") is True)

    return read


def read_transcription(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a form with a piece of audio; the text that comes out is as long as the audio, not as a bound says."""
    return Reading(model_of(body, params), MEDIA_TOKENS + estimate_prompt(body), 1, None, body.get("stream") == "true")


def read_images(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a request for images, each of which counts as media do, and so do those that are to be changed."""
    count = whole_number(body, "n", least=1) or 1
    prompt = estimate_values([{field: body[field] for field in _IMAGE_FIELDS if field in body}])
    return Reading(model_of(body, params), prompt, count, MEDIA_TOKENS, body.get("stream") in (True, "true"))


class OpenAI(Protocol):
    """OpenAI's API. Answers in Anthropic's shape are read too: many servers speak both, on paths of their own."""

    name = "openai"
    usage_at_end = staticmethod(skim_usage)
    usage = under(("usage",), *_USAGE) | under(("response", "usage"), *_USAGE) | under(("message", "usage"), *_USAGE)

    def __init__(self, prompt_tokens: PromptTokens = estimate_prompt) -> None:
        self._prompt_tokens = prompt_tokens

    def below_version(self) -> dict[str, Operation]:
        """Return the operations by their path below ``/v1``, which other protocols put below a path of their own."""
        generate = generation(self, self._prompt_tokens)
        only_input = Operation(self, reads_input(self._prompt_tokens))
        transcribe = Operation(self, read_transcription)
        draw = Operation(self, read_images)
        return {
            "/chat/completions": generate,
            "/completions": generate,
            "/responses": generate,
            "/embeddings": only_input,
            "/audio/speech": only_input,
            "/audio/transcriptions": transcribe,
            "/audio/translations": transcribe,
            "/images/generations": draw,
            "/images/edits": draw,
            "/images/variations": draw,
        }

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        found = self.below_version()
        return {f"/v1{path}": operation for path, operation in found.items()} | found

    def ending(self, last: Mapping[str, dict[str, Any]], output_tokens: int) -> bytes:
        """See `Protocol`."""
        if any(kind.startswith("response.") for kind in last):
            return _responses_ending(last)
        head = {key: value for key, value in last.get("", {}).items() if key not in ("choices", "usage", "type")}
        choices = [event["choices"][0] for key, event in last.items() if key.startswith("#")]
        ended = []
        for choice in choices:
            if choice.get("finish_reason") is None:
                end: dict[str, Any] = {"index": choice.get("index", 0), "logprobs": None, "finish_reason": "length"}
                end["text" if "text" in choice else "delta"] = "" if "text" in choice else {}
                ended.append(end)
        events = [sse({**head, "choices": [choice]}) for choice in ended]
        return b"".join(events) + b"data: [DONE]\n\n"


def _responses_ending(last: Mapping[str, dict[str, Any]]) -> bytes:
    begun: dict[str, Any] = {}
    number = -1
    for event in last.values():
        if isinstance(event.get("response"), dict):
            begun = {**begun, **event["response"]}
        if type(event.get("sequence_number")) is int:
            number = max(number, event["sequence_number"])
    response = {**begun, "status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return sse(
        {"type": "response.incomplete", "sequence_number": number + 1, "response": response}, "response.incomplete"
    )


def sse(event: Any, name: str = "") -> bytes:
    """Return a server-sent event, with a name if it has one."""
    head = f"event: {name}\n".encode() if name else b""
    return b"%bdata: %b\n\n" % (head, json.dumps(event, separators=(",", ":")).encode())
