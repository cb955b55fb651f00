"""A complete example: the mock model server behind the middleware that ``modelquota serve-demo`` starts.

Needs the extra ``modelquota[asgi]``.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any, Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from modelquota.asgi.middleware import QuotaMiddleware
from modelquota.asgi.request import IncomingRequest
from modelquota.asgi.routes import openai_routes
from modelquota.demo.quotas import KEY_PREFIX
from modelquota.manager import ResourceQuotaManager

DEFAULT_TOKENS: Final = 24
"""Tokens that the mock model generates if the request sets no bound."""

_TEXT = (
    "limits that hold in every window keep a busy model polite and a patient client served "
    "so count the tokens wait your turn and come back when you are told"
)
_WORDS = tuple(_TEXT.split())


def create_app(manager: ResourceQuotaManager, *, tokens_per_second: float = 20.0) -> Starlette:
    """Return the mock model server, with the middleware in front of it.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The server lists its models.
    tokens_per_second : float
        How fast the mock model generates each output.
    """
    model = MockModel(manager, 1 / tokens_per_second)
    app = Starlette(
        routes=[
            Route("/v1/models", model.list_models, methods=["GET"]),
            Route("/v1/chat/completions", model.chat, methods=["POST"]),
            Route("/v1/completions", model.complete, methods=["POST"]),
            Route("/v1/responses", model.respond, methods=["POST"]),
            Route("/v1/embeddings", model.embed, methods=["POST"]),
        ]
    )

    keys = frozenset(name for name in manager.list_models() if name.startswith(KEY_PREFIX))

    def key(request: IncomingRequest) -> str | None:
        """Return the API key if it has a quota: it then decides together with the model."""
        scheme, _, token = (request.header("authorization") or "").partition(" ")
        return token if scheme.lower() == "bearer" and KEY_PREFIX + token in keys else None

    app.add_middleware(
        QuotaMiddleware,
        manager=manager,
        identity=key,
        identity_namespace=KEY_PREFIX,
        unknown_model="refuse",
        page="/quota",
        routes=openai_routes(prompt_tokens=count_words, default_output_tokens=DEFAULT_TOKENS),
    )
    return app


def count_words(body: Mapping[str, Any]) -> int:
    """Count the tokens of a prompt as the mock model does: one for each word."""
    words = 0
    stack = [body.get("messages"), body.get("prompt"), body.get("input")]
    while stack:
        value = stack.pop()
        if isinstance(value, str):
            words += len(value.split())
        elif isinstance(value, list):
            stack.extend(value)
        elif isinstance(value, dict):
            stack.append(value.get("content", value.get("text")))
    return words


class MockModel:
    """Generates the same words over and over, one token at a time."""

    def __init__(self, manager: ResourceQuotaManager, seconds_per_token: float) -> None:
        self._manager = manager
        self._seconds_per_token = seconds_per_token
        self._numbers = itertools.count(1)

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``"""
        names = [name for name in self._manager.list_models() if not name.startswith(KEY_PREFIX)]
        models = [{"id": name, "object": "model", "created": 0, "owned_by": "modelquota"} for name in names]
        return JSONResponse({"object": "list", "data": models})

    async def chat(self, request: Request) -> Response:
        """``POST /v1/chat/completions``"""
        body = await request.json()
        outputs = body.get("n") or 1

        def chunk(index: int, word: str | None, reason: str | None) -> dict[str, Any]:
            delta = {"content": word} if word is not None else {} if reason else {"role": "assistant", "content": ""}
            return {"index": index, "delta": delta, "finish_reason": reason}

        def whole(index: int, text: str) -> dict[str, Any]:
            return {"index": index, "message": {"role": "assistant", "content": text}, "finish_reason": "length"}

        return await self._generate(body, "chat.completion", outputs, chunk, whole)

    async def complete(self, request: Request) -> Response:
        """``POST /v1/completions``"""
        body = await request.json()
        prompts = body.get("prompt")
        outputs = (body.get("n") or 1) * (len(prompts) if isinstance(prompts, list) else 1)

        def chunk(index: int, word: str | None, reason: str | None) -> dict[str, Any]:
            return {"index": index, "text": word or "", "finish_reason": reason}

        def whole(index: int, text: str) -> dict[str, Any]:
            return {"index": index, "text": text, "finish_reason": "length"}

        return await self._generate(body, "text_completion", outputs, chunk, whole)

    async def _generate(self, body: dict[str, Any], kind: str, outputs: int, chunk: Any, whole: Any) -> Response:
        tokens = _tokens_of(body, "max_completion_tokens", "max_tokens")
        prompt = count_words(body)
        usage = {"prompt_tokens": prompt, "completion_tokens": outputs * tokens}
        usage["total_tokens"] = sum(usage.values())
        head = {"id": self._id(kind), "object": kind, "created": int(time.time()), "model": body["model"]}
        if not body.get("stream"):
            await asyncio.sleep(tokens * self._seconds_per_token)
            text = "".join(_words(tokens))
            return JSONResponse({**head, "choices": [whole(index, text) for index in range(outputs)], "usage": usage})
        options = body.get("stream_options") or {}
        if kind == "chat.completion":
            head["object"] = "chat.completion.chunk"

        async def events() -> AsyncIterator[bytes]:
            for index in range(outputs):
                yield _event({**head, "choices": [chunk(index, None, None)]})
            for word in _words(tokens):
                await asyncio.sleep(self._seconds_per_token)
                for index in range(outputs):
                    yield _event({**head, "choices": [chunk(index, word, None)]})
            for index in range(outputs):
                yield _event({**head, "choices": [chunk(index, None, "length")]})
            if options.get("include_usage"):
                yield _event({**head, "choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def respond(self, request: Request) -> Response:
        """``POST /v1/responses``"""
        body = await request.json()
        tokens = _tokens_of(body, "max_output_tokens")
        prompt = count_words(body)
        answer = {
            "id": self._id("resp"),
            "object": "response",
            "created_at": int(time.time()),
            "model": body["model"],
            "status": "completed",
            "output": [
                {
                    "id": self._id("msg"),
                    "type": "message",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "".join(_words(tokens)), "annotations": []}],
                }
            ],
            "parallel_tool_calls": False,
            "tool_choice": "auto",
            "tools": [],
            "usage": {
                "input_tokens": prompt,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": prompt + tokens,
            },
        }
        if not body.get("stream"):
            await asyncio.sleep(tokens * self._seconds_per_token)
            return JSONResponse(answer)

        async def events() -> AsyncIterator[bytes]:
            begun = {**answer, "status": "in_progress", "output": [], "usage": None}
            numbers = itertools.count()
            yield _named_event("response.created", next(numbers), response=begun)
            for word in _words(tokens):
                await asyncio.sleep(self._seconds_per_token)
                yield _named_event(
                    "response.output_text.delta",
                    next(numbers),
                    item_id=answer["output"][0]["id"],
                    output_index=0,
                    content_index=0,
                    delta=word,
                    logprobs=[],
                )
            yield _named_event("response.completed", next(numbers), response=answer)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def embed(self, request: Request) -> Response:
        """``POST /v1/embeddings``"""
        body = await request.json()
        texts = body.get("input")
        count = len(texts) if isinstance(texts, list) else 1
        prompt = count_words(body)
        vectors = [{"object": "embedding", "index": index, "embedding": [0.0, 1.0]} for index in range(count)]
        usage = {"prompt_tokens": prompt, "total_tokens": prompt}
        return JSONResponse({"object": "list", "data": vectors, "model": body["model"], "usage": usage})

    def _id(self, kind: str) -> str:
        return f"{kind.replace('.', '')}-{next(self._numbers)}"


def _tokens_of(body: Mapping[str, Any], *fields: str) -> int:
    for field in fields:
        if body.get(field) is not None:
            return int(body[field])
    return DEFAULT_TOKENS


def _words(count: int) -> Iterable[str]:
    return (("" if number == 0 else " ") + _WORDS[number % len(_WORDS)] for number in range(count))


def _event(event: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _named_event(kind: str, number: int, **fields: Any) -> bytes:
    event = {"type": kind, "sequence_number": number, **fields}
    return f"event: {kind}\n".encode() + _event(event)
