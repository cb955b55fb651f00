"""A provider of models, as an ASGI application: speaks OpenAI's, Anthropic's and Gemini's protocols, and counts."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

PROMPT, OUTPUT = 7, 5
WORDS = ["One", " two", " three", " four", " five"]


@dataclass
class Provider:
    """Answers every request with five words, and reports 7 tokens of the prompt and 5 of the output.

    `script` has what to answer instead, each once: ``(status, headers, body)``. Streams wait for `pace` seconds before
    each event; `left` counts those whose client left.
    """

    script: list[Any] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    pace: float = 0.0
    report: bool = True
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)
    running: int = 0
    left: int = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
        self.requests.append((scope["path"], headers, json.loads(body) if body else None))
        self.running += 1
        gone = asyncio.ensure_future(receive())
        try:
            await self._answer(scope["path"], json.loads(body) if body else {}, send, gone)
        finally:
            self.running -= 1
            gone.cancel()

    async def _answer(self, path, asked, send, gone):
        if self.script:
            status, headers, content = self.script.pop(0)
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            await self._start(send, status, {"content-type": "application/json", **headers})
            await send({"type": "http.response.body", "body": content})
            return
        kind, stream = self._kind(path, asked)
        if not stream:
            await self._start(send, 200, {"content-type": "application/json"})
            whole = json.dumps(getattr(self, f"{kind}_whole")(asked)).encode()
            await send({"type": "http.response.body", "body": whole})
            return
        await self._start(send, 200, {"content-type": "text/event-stream"})
        for event in getattr(self, f"{kind}_events")(asked):
            if self.pace:
                await asyncio.wait([gone], timeout=self.pace)
                if gone.done():
                    self.left += 1
                    return
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _start(self, send, status, headers):
        fields = [(name.encode(), value.encode()) for name, value in {**headers, **self.headers}.items()]
        await send({"type": "http.response.start", "status": status, "headers": fields})

    def _kind(self, path, asked):
        if path.endswith("/messages"):
            return "anthropic", asked.get("stream")
        if ":generateContent" in path or ":streamGenerateContent" in path:
            return "gemini", ":stream" in path
        return "openai", asked.get("stream")

    def openai_whole(self, asked):
        message = {"role": "assistant", "content": "".join(WORDS)}
        return {
            "id": "chat-1", "object": "chat.completion", "created": 1, "model": asked.get("model"),
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **self._openai_usage(),
        }  # fmt: skip

    def _openai_usage(self):
        if not self.report:
            return {}
        usage = {"prompt_tokens": PROMPT, "completion_tokens": OUTPUT, "total_tokens": PROMPT + OUTPUT}
        return {"usage": usage}

    def openai_events(self, asked):
        head = {"id": "chat-1", "object": "chat.completion.chunk", "created": 1, "model": asked.get("model")}
        for word in WORDS:
            delta = {"role": "assistant", "content": word}
            yield _event({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        yield _event({**head, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        if self.report:
            yield _event({**head, "choices": [], **self._openai_usage()})
        yield b"data: [DONE]\n\n"

    def anthropic_whole(self, asked):
        return {
            "id": "msg-1", "type": "message", "role": "assistant", "model": asked.get("model"),
            "stop_reason": "end_turn", "stop_sequence": None, "content": [{"type": "text", "text": "".join(WORDS)}],
            "usage": {"input_tokens": PROMPT, "output_tokens": OUTPUT},
        }  # fmt: skip

    def anthropic_events(self, asked):
        begun = {**self.anthropic_whole(asked), "content": [], "stop_reason": None}
        begun["usage"] = {"input_tokens": PROMPT, "output_tokens": 1}
        yield _named("message_start", message=begun)
        yield _named("content_block_start", index=0, content_block={"type": "text", "text": ""})
        for word in WORDS:
            yield _named("content_block_delta", index=0, delta={"type": "text_delta", "text": word})
        yield _named("content_block_stop", index=0)
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        yield _named("message_delta", delta=delta, usage={"output_tokens": OUTPUT})
        yield _named("message_stop")

    def _gemini(self, text, **more):
        content = {"role": "model", "parts": [{"text": text}]}
        return {"candidates": [{"index": 0, "content": content, **more}], "modelVersion": "m"}

    def gemini_whole(self, asked):
        counts = {"promptTokenCount": PROMPT, "candidatesTokenCount": OUTPUT, "totalTokenCount": PROMPT + OUTPUT}
        return {**self._gemini("".join(WORDS), finishReason="STOP"), "usageMetadata": counts}

    def gemini_events(self, asked):
        for word in WORDS[:-1]:
            yield _event(self._gemini(word))
        yield _event({**self.gemini_whole(asked), **self._gemini(WORDS[-1], finishReason="STOP")})


def _event(value):
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _named(kind, **fields):
    return b"event: " + kind.encode() + b"\n" + _event({"type": kind, **fields})
