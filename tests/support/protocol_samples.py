"""For each protocol: a request, an answer and a stream as its real server sends them, and what they use."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

TEXT = "x" * 40  # ten tokens
WORD = "word "
JSON_TYPE = b"application/json"
EVENTS = b"text/event-stream; charset=utf-8"
LINES = b"application/x-ndjson"


def sse(*events):
    out = []
    for event in events:
        name = f"event: {event['type']}\n" if isinstance(event, dict) and isinstance(event.get("type"), str) else ""
        data = event if isinstance(event, str) else json.dumps(event)
        out.append(f"{name}data: {data}\n\n".encode())
    return out


def lines(*events):
    return [json.dumps(event).encode() + b"\n" for event in events]


@dataclass
class Sample:
    """A kind of request: `body` has no bound; `bound` sets one of 50; `tokens` is what answer and stream use.

    `protocol` is the table that has the path, and `words` the protocol in whose shape it is refused, if that is another
    one. A `body` with bytes in it is sent as a form, with the bytes as a file. `prompt` is its estimate.
    """

    protocol: str
    path: str
    body: dict[str, Any]
    answer: Any
    tokens: tuple[int, int, int] = (10, 0, 5)
    bound: dict[str, Any] = field(default_factory=dict)
    stream: list[bytes] = field(default_factory=list)
    stream_type: bytes = EVENTS
    in_path: bool = False
    outputs: int = 1
    words: str = ""
    prompt: int = 10

    @property
    def id(self):
        return f"{self.protocol}{self.path}"

    def sent(self, **changes):
        """The content type and the body of a request."""
        body = {**self.body, **changes}
        if not any(isinstance(value, bytes) for value in body.values()):
            return JSON_TYPE, json.dumps(body).encode()
        parts = b""
        for name, value in body.items():
            head = f'Content-Disposition: form-data; name="{name}"' + '; filename="f"' * isinstance(value, bytes)
            text = value if isinstance(value, str | bytes) else json.dumps(value)
            data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            parts += b"--b\r\n" + head.encode() + b"\r\n\r\n" + data + b"\r\n"
        return b"multipart/form-data; boundary=b", parts + b"--b--\r\n"


CHAT = {"messages": [{"role": "", "content": TEXT}]}
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
CACHED = {**USAGE, "prompt_tokens_details": {"cached_tokens": 4}}
RESPONSES_USAGE = {"input_tokens": 10, "input_tokens_details": {"cached_tokens": 4}, "output_tokens": 5,
                   "output_tokens_details": {"reasoning_tokens": 2}, "total_tokens": 15}  # fmt: skip
ANTHROPIC_USAGE = {
    "input_tokens": 4,
    "cache_creation_input_tokens": 2,
    "cache_read_input_tokens": 4,
    "output_tokens": 5,
}
GEMINI_USAGE = {"promptTokenCount": 10, "cachedContentTokenCount": 4, "candidatesTokenCount": 3,
                "thoughtsTokenCount": 2, "totalTokenCount": 15}  # fmt: skip
META = {"id": "x", "prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 5, "finish_reason": {"type": "stop"}}


def chat_answer(usage=CACHED):
    return {"id": "c", "choices": [{"index": 0, "message": {"role": "assistant", "content": WORD * 5}}], "usage": usage}


def chat_chunk(text, reason=None, **more):
    return {"id": "c", "object": "chat.completion.chunk", "model": "m",
            "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}], **more}  # fmt: skip


CHAT_STREAM = sse(*[chat_chunk(WORD)] * 5, {"id": "c", "choices": [], "usage": CACHED}, "[DONE]")
COMPLETION_STREAM = sse(*[{"id": "c", "choices": [{"index": 0, "text": WORD}]}] * 5, {"choices": [], "usage": USAGE})
RESPONSES_STREAM = sse(
    {"type": "response.created", "sequence_number": 0, "response": {"id": "r", "status": "in_progress", "usage": None}},
    *[{"type": "response.output_text.delta", "sequence_number": 1 + n, "delta": WORD} for n in range(5)],
    {"type": "response.output_text.done", "text": WORD * 5},
    {"type": "response.completed", "response": {"id": "r", "status": "completed", "usage": RESPONSES_USAGE}},
)
ANTHROPIC_STREAM = sse(
    {"type": "message_start", "message": {"id": "a", "content": [],
     "usage": {"input_tokens": 4, "cache_creation_input_tokens": 2, "cache_read_input_tokens": 4, "output_tokens": 1}}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    *[{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": WORD}}] * 5,
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 5}},
    {"type": "message_stop"},
)  # fmt: skip
GEMINI_EVENTS = [
    *[{"candidates": [{"content": {"parts": [{"text": WORD}], "role": "model"}, "index": 0}]}] * 5,
    {"candidates": [{"finishReason": "STOP", "index": 0}], "usageMetadata": GEMINI_USAGE},
]
OLLAMA_END = {"done": True, "done_reason": "stop", "prompt_eval_count": 10, "eval_count": 5}
SGLANG_STREAM = sse(
    *[{"text": WORD * n, "meta_info": {**META, "completion_tokens": n, "finish_reason": None}} for n in range(1, 5)],
    {"text": WORD * 5, "meta_info": META},
    "[DONE]",
)
EMBEDDED = {"data": [{"embedding": [0.1, 0.2]}], "usage": {"prompt_tokens": 10, "total_tokens": 10}}
ONLY_INPUT = {"tokens": (10, 0, 0), "outputs": 0}
MODEL = {"model": "m"}
BOUND = {"max_tokens": 50}


def openai_samples(protocol="openai", root="/v1", in_path=False):
    model = {} if in_path else MODEL
    common = {"in_path": in_path}
    return [
        Sample(protocol, f"{root}/chat/completions", model | CHAT, chat_answer(), (6, 4, 5),
               {"max_completion_tokens": 50}, CHAT_STREAM, **common),
        Sample(protocol, f"{root}/completions", model | {"prompt": TEXT},
               {"choices": [{"text": WORD * 5}], "usage": USAGE}, (10, 0, 5), BOUND, COMPLETION_STREAM, **common),
        Sample(protocol, f"{root}/responses", model | {"input": TEXT},
               {"output": [{"type": "message", "content": [{"type": "output_text", "text": WORD * 5}]}],
                "usage": RESPONSES_USAGE}, (6, 4, 5), {"max_output_tokens": 50}, RESPONSES_STREAM, **common),
        Sample(protocol, f"{root}/embeddings", model | {"input": TEXT}, EMBEDDED, **common, **ONLY_INPUT),
        Sample(protocol, f"{root}/images/generations", model | {"prompt": TEXT}, {"data": [], "usage": RESPONSES_USAGE},
               (6, 4, 5), **common),
        Sample(protocol, f"{root}/audio/speech", model | {"input": TEXT, "voice": "v"}, EMBEDDED, **common,
               **ONLY_INPUT),
    ]  # fmt: skip


GEMINI_BODY = {"contents": [{"parts": [{"text": TEXT}]}]}
GEMINI_BOUND = {"generationConfig": {"maxOutputTokens": 50}}
GEMINI_ANSWER = {"candidates": [{"content": {"parts": [{"text": WORD * 5}]}}], "usageMetadata": GEMINI_USAGE}
OLLAMA_CHAT = {"model": "m", "message": {"role": "assistant", "content": WORD}, "done": False}
OLLAMA_WORD = {"model": "m", "response": WORD, "done": False}
SCORES = {"data": [{"index": 0, "score": 0.5}], "usage": {"prompt_tokens": 10, "total_tokens": 10}}

SAMPLES = [
    *openai_samples(),
    *openai_samples(root=""),
    Sample("anthropic", "/v1/messages", MODEL | CHAT,
           {"type": "message", "content": [{"type": "text", "text": WORD * 5}], "usage": ANTHROPIC_USAGE},
           (6, 4, 5), BOUND, ANTHROPIC_STREAM),
    *openai_samples("azure", "/openai/deployments/m", in_path=True),
    *openai_samples("azure", "/openai/v1"),
    Sample("gemini", "/v1beta/models/m:generateContent", GEMINI_BODY, GEMINI_ANSWER, (6, 4, 5), GEMINI_BOUND,
           in_path=True),
    Sample("gemini", "/v1beta/models/m:streamGenerateContent", GEMINI_BODY, GEMINI_EVENTS, (6, 4, 5), GEMINI_BOUND,
           sse(*GEMINI_EVENTS), in_path=True),
    Sample("gemini", "/v1beta/models/m:embedContent", {"content": {"parts": [{"text": TEXT}]}},
           {"embedding": {}, "usageMetadata": {"promptTokenCount": 10}}, in_path=True, **ONLY_INPUT),
    *[Sample("vllm", path, MODEL | {"input": TEXT}, SCORES, **ONLY_INPUT)
      for path in ("/pooling", "/classify", "/v2/embed", "/invocations")],
    *[Sample("vllm", path, MODEL | {"query": TEXT[:20], "documents": [TEXT[20:]]}, SCORES, **ONLY_INPUT)
      for path in ("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank", "/generative_scoring")],
    Sample("vllm", "/inference/v1/generate", MODEL | {"token_ids": [7] * 10}, {"choices": [], "usage": USAGE},
           (10, 0, 5), {"sampling_params": {"max_tokens": 50}}),
    Sample("vllm", "/v1/chat/completions/batch", MODEL | {"messages": [CHAT["messages"]]}, chat_answer(), (6, 4, 5),
           BOUND),
    Sample("sglang", "/generate", MODEL | {"text": TEXT}, {"text": WORD * 5, "meta_info": META}, (6, 4, 5),
           {"sampling_params": {"max_new_tokens": 50}}, SGLANG_STREAM),
    Sample("sglang", "/encode", MODEL | {"text": TEXT}, {"embedding": [0.5], "meta_info": {"prompt_tokens": 10}},
           **ONLY_INPUT),
    Sample("ollama", "/api/chat", MODEL | CHAT,
           {"message": {"role": "assistant", "content": WORD * 5}, **OLLAMA_END}, (10, 0, 5),
           {"options": {"num_predict": 50}}, lines(*[OLLAMA_CHAT] * 5, {**OLLAMA_CHAT, **OLLAMA_END}), LINES),
    Sample("ollama", "/api/generate", MODEL | {"prompt": TEXT}, {"response": WORD * 5, **OLLAMA_END}, (10, 0, 5),
           {"options": {"num_predict": 50}}, lines(*[OLLAMA_WORD] * 5, {**OLLAMA_WORD, **OLLAMA_END}), LINES),
    Sample("ollama", "/api/embed", MODEL | {"input": TEXT}, {"embeddings": [[0.5]], "prompt_eval_count": 10},
           **ONLY_INPUT),
]  # fmt: skip
"""The paths that one table has first."""

FREE = ["/v1/messages/count_tokens", "/v1beta/models/m:countTokens", "/tokenize", "/detokenize", "/v1/tokenize",
        "/v1/detokenize", "/v1/chat/completions/render", "/v1/completions/render", "/v1/messages/render",
        "/v1/responses/render", "/v1/chat/completions/derender", "/v1/completions/derender"]  # fmt: skip

FILE = b"\x00\xff not text"
TRANSCRIPT_STREAM = sse(
    *[{"type": "transcript.text.delta", "delta": WORD}] * 5,
    {"type": "transcript.text.done", "text": WORD * 5, "usage": {"type": "tokens", **RESPONSES_USAGE}},
)
IMAGE_STREAM = sse(
    {"type": "image_edit.partial_image", "b64_json": "AAAA", "partial_image_index": 0},
    {"type": "image_edit.completed", "b64_json": "AAAA", "usage": RESPONSES_USAGE},
)


def file_samples(protocol="openai", root="/v1", in_path=False):
    """Those that are forms with a file; it and the images that come out count as media do."""
    model = {} if in_path else MODEL
    spoken, drawn = {"text": WORD * 5, "usage": RESPONSES_USAGE}, {"data": [], "usage": RESPONSES_USAGE}
    common: dict[str, Any] = {"tokens": (6, 4, 5), "in_path": in_path}
    return [
        *[Sample(protocol, f"{root}/audio/{verb}", model | {"file": FILE, "prompt": TEXT}, spoken, prompt=1010,
                 stream=TRANSCRIPT_STREAM, **common) for verb in ("transcriptions", "translations")],
        *[Sample(protocol, f"{root}/images/{verb}", model | {"image": FILE, "prompt": TEXT}, drawn, prompt=1010,
                 stream=IMAGE_STREAM, **common) for verb in ("edits", "variations")],
    ]  # fmt: skip


def of_table(protocol, samples, old="", new="", **changes):
    """The same requests where another table has them, with one part of the path replaced."""
    return [replace(one, protocol=protocol, path=one.path.replace(old, new, 1), **changes) for one in samples]


def below(root):
    return [one for one in SAMPLES if one.path.startswith(root)]


VERTEX = "projects/p/locations/l/publishers/google/models/m"
BATCH = Sample("gemini", "/v1beta/models/m:batchEmbedContents",
               {"requests": [{"content": {"parts": [{"text": TEXT}]}}]},
               {"embeddings": [], "usageMetadata": {"promptTokenCount": 10}}, in_path=True, **ONLY_INPUT)  # fmt: skip
TOKENS_STREAM = sse(*[{"choices": [{"index": 0, "token_ids": [7]}]}] * 5, {"choices": [], "usage": USAGE}, "[DONE]")
EVERY_PATH = [
    *SAMPLES,
    *file_samples(),
    *file_samples(root=""),
    *file_samples("azure", "/openai/deployments/m", in_path=True),
    *file_samples("azure", "/openai/v1"),
    *openai_samples("azure", "/openai"),
    *file_samples("azure", "/openai"),
    BATCH,
    *of_table("gemini", [*below("/v1beta/models/m"), BATCH], "v1beta", "v1alpha"),
    *of_table("gemini", [*below("/v1beta/models/m"), BATCH], "v1beta", "v1"),
    *of_table("gemini", [*below("/v1beta/models/m"), BATCH], "v1beta/models/m", f"v1/{VERTEX}"),
    *of_table("gemini", [*below("/v1beta/models/m"), BATCH], "v1beta/models/m", f"v1beta1/{VERTEX}"),
    *of_table("gemini", openai_samples(root="/v1beta/openai") + file_samples(root="/v1beta/openai"), words="openai"),
    *openai_samples("vllm"),
    *openai_samples("vllm", ""),
    *file_samples("vllm"),
    *file_samples("vllm", ""),
    *of_table("vllm", below("/v1/messages"), words="anthropic"),
    *of_table("vllm", below("/v1/chat/completions")[:1], "/v1/chat/completions", "/invocations"),
    Sample("vllm", "/inference/v1/generate", MODEL | {"token_ids": [7] * 10}, {"choices": [], "usage": USAGE},
           (10, 0, 5), {"sampling_params": {"max_tokens": 50}}, TOKENS_STREAM),
    *of_table("sglang", [*below("/classify"), *below("/v1/score"), *below("/v1/rerank")]),
    *of_table("sglang", below("/v1/embeddings"), "/v1", "/api/v1"),
    *of_table("sglang", below("/classify"), "/classify", "/v1/classify"),
    *of_table("sglang", below("/v1/chat/completions")[:1], "/v1/chat/completions", "/invocations"),
    *of_table("sglang", below("/invocations")),
    Sample("sglang", "/vertex_generate", MODEL | {"instances": [{"text": TEXT}]},
           {"predictions": [{"text": WORD * 5, "meta_info": META}]}, (6, 4, 5),
           {"parameters": {"sampling_params": {"max_new_tokens": 50}}}, SGLANG_STREAM),
    *of_table("ollama", below("/api/embed"), "embed", "embeddings"),
]  # fmt: skip
"""A sample of every path of every table, also where another table has the same path."""
