"""SGLang's server: its own paths; it speaks OpenAI's API too, which has a table of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from modelquota.protocols.estimate import BYTES_PER_TOKEN, estimate_values
from modelquota.protocols.openai import OpenAI, model_of, sse
from modelquota.protocols.protocol import Operation, Params, nothing
from modelquota.protocols.request import Reading, output_bound, whole_number
from modelquota.protocols.usage import ANY, CACHED, OUTPUT, PROMPT, Places, under
from modelquota.protocols.vllm import read_input, read_invocation
from modelquota.quota.config import MAX_COUNT

_FIELDS: Final[Places] = {
    ("prompt_tokens",): PROMPT,
    ("cached_tokens",): CACHED,
    ("completion_tokens",): OUTPUT,
}
_INPUT: Final = ("text", "input_ids", "prompt", "image_data", "audio_data", "video_data", "input_embeds")
_INPUT_PATHS: Final = ("/encode", "/classify", "/v1/classify", "/v1/score", "/v1/rerank", "/api/v1/embeddings")
_FREE_PATHS: Final = ("/tokenize", "/detokenize", "/v1/tokenize", "/v1/detokenize")


def _read_generation(body: Mapping[str, Any], params: Params) -> Reading:
    """Read a request to ``/generate``, of SGLang or of vLLM's older server."""
    sampling = body.get("sampling_params")
    sampling = sampling if isinstance(sampling, dict) else {}
    outputs = whole_number(sampling, "n", least=1) or whole_number(body, "n", least=1) or 1
    for field in ("text", "input_ids"):
        batch = body.get(field)
        if isinstance(batch, list) and batch and isinstance(batch[0], str | list):
            outputs *= len(batch)
            break
    bounds = [output_bound(part, "max_new_tokens", "max_tokens") for part in (sampling, body)]
    known = [bound for bound in bounds if bound is not None]
    return Reading(
        model_of(body, params),
        min(estimate_values([body[field] for field in _INPUT if field in body]), MAX_COUNT),
        outputs,
        max(known) if known else None,
        body.get("stream") is True,
    )


def _read_instances(body: Mapping[str, Any], params: Params) -> Reading:
    """Read Vertex AI's form of the same: a list of instances, and the parameters of all of them."""
    given = body.get("instances")
    instances = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    parameters = body.get("parameters")
    inputs = {field: [one[field] for one in instances if field in one] for field in _INPUT}
    asked = {**parameters} if isinstance(parameters, dict) else {}
    asked |= {field: values for field, values in inputs.items() if values} | {"model": body.get("model")}
    return _read_generation(asked, params)


class SGLang(OpenAI):
    """SGLang's own API. The text in each event of a stream is all text so far; of a batch, each item has a report."""

    name = "sglang"
    usage = (
        OpenAI.usage
        | under(("meta_info",), _FIELDS)
        | under((ANY, "meta_info"), _FIELDS)
        | under(("predictions", ANY, "meta_info"), _FIELDS)
    )
    adds_lists = True

    def operations(self) -> dict[str, Operation]:
        """See `Protocol`."""
        own = dict.fromkeys(_INPUT_PATHS, read_input) | {
            "/generate": _read_generation,
            "/vertex_generate": _read_instances,
            "/invocations": read_invocation,
        }
        found = {path: Operation(self, read) for path, read in own.items()}
        return found | {path: Operation(self, nothing, free=True) for path in _FREE_PATHS}

    def event_tokens(self, event: Any, seen: int) -> int:
        """See `Protocol`."""
        text = event.get("text") if isinstance(event, dict) else None
        return max(_tokens(text) - seen, 0) if isinstance(text, str) else super().event_tokens(event, seen)

    def answers_of(self, answer: Any) -> list[Any] | None:
        """See `Protocol`."""
        found = answer.get("predictions") if isinstance(answer, dict) else answer
        return found if isinstance(found, list) else None

    def answer_tokens(self, answer: Any) -> int:
        """See `Protocol`."""
        answers = self.answers_of(answer)
        items = [answer] if answers is None else answers
        texts = [item["text"] for item in items if isinstance(item, dict) and isinstance(item.get("text"), str)]
        return sum(map(_tokens, texts)) if texts else super().answer_tokens(answer)

    def ending(self, last: Mapping[str, dict[str, Any]], output_tokens: int) -> bytes:
        """See `Protocol`."""
        event = last.get("", {})
        if "text" not in event:
            return super().ending(last, output_tokens)
        meta = event.get("meta_info")
        reason = {"finish_reason": {"type": "length", "length": output_tokens}}
        meta = meta | reason if isinstance(meta, dict) else reason
        return sse({**event, "meta_info": meta}) + b"data: [DONE]\n\n"


def _tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)
