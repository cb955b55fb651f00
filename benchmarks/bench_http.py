"""What does the HTTP middleware add to a request, and to each chunk of a stream?

Starlette with and without it, spoken to in the same event loop: no socket, so that the difference is the middleware's.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from statistics import median
from time import perf_counter_ns
from typing import Any

import pytest

from benchmarks.harness.results import Row, ratio_at_most
from modelquota import ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware
from modelquota.asgi.ratelimit import LimitHeaders

pytest.importorskip("starlette", reason="needs the extra asgi")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

QUESTION = "http"
ROUNDS = 30
REQUESTS = 100
CHUNKS = 2_000
MESSAGES = [{"role": "user", "content": "What is the tallest mountain on this planet, and who was there first?"}]
ANSWER = {
    "choices": [{"message": {"content": "word " * 100}}],
    "usage": {"prompt_tokens": 20, "completion_tokens": 100},
}
CHUNK = b'data: {"id":"x","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"content":" word"}}]}\n\n'


async def chat(request: Request) -> Response:
    """A model that takes no time, but lets the loop go round, as a real one would."""
    body = await request.json()
    await asyncio.sleep(0)
    if not body.get("stream"):
        return JSONResponse(ANSWER)

    async def events() -> AsyncIterator[bytes]:
        for _ in range(CHUNKS):
            yield CHUNK
            await asyncio.sleep(0)

    return StreamingResponse(events(), media_type="text/event-stream")


def application(manager: ResourceQuotaManager | None) -> Starlette:
    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])])
    if manager is not None:
        app.add_middleware(QuotaMiddleware, manager=manager)
    return app


async def request_ns(app: Any, body: bytes) -> int:
    """How long one request takes, until the loop has nothing more to do for it."""
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            gone.set()

    start_ns = perf_counter_ns()
    await app(scope, receive, send)
    await asyncio.sleep(0)
    return perf_counter_ns() - start_ns


def rounds_of(manager, requests: int, **fields: Any):
    """A round for the application with the middleware, and one for that without."""
    body = json.dumps({"model": "llama", "messages": MESSAGES, "max_tokens": 10, **fields}).encode()

    def round_of(app):
        async def many() -> float:
            return median([await request_ns(app, body) for _ in range(requests)])

        return lambda: asyncio.run(many())

    return round_of(application(manager)), round_of(application(None))


def added(bench, case, ours, bare, per, most):
    """`most` is of what Starlette itself takes: machines differ, and drift while one measures."""
    series = bench.interleave(ROUNDS, ours, without=bare)
    ours_ns, bare_ns = median(series["ours"]) / per, median(series["without"]) / per
    bench.add(Row(QUESTION, f"{case}, with", ours_ns, "ns", "without", bare_ns))
    more_ns = ours_ns - bare_ns
    bench.add(Row(QUESTION, f"{case}, added", more_ns, "ns", "without", bare_ns, targets=(ratio_at_most(most),)))


def test_a_request(bench, manager):
    ours, bare = rounds_of(manager, REQUESTS)
    added(bench, "a request", ours, bare, 1, 0.5)


def test_a_chunk_of_a_stream(bench, manager):
    ours, bare = rounds_of(manager, 1, stream=True)
    added(bench, "a chunk of a stream", ours, bare, CHUNKS, 0.6)


def test_the_headers_of_a_response(bench, manager):
    """Less than a tenth of what Starlette takes for the request."""
    headers = LimitHeaders(manager)
    _, bare = rounds_of(manager, REQUESTS)

    def many() -> float:
        start_ns = perf_counter_ns()
        for _ in range(REQUESTS):
            headers.of("llama", "openai")
        return (perf_counter_ns() - start_ns) / REQUESTS

    series = bench.interleave(ROUNDS, many, without=bare)
    ours_ns, bare_ns = median(series["ours"]), median(series["without"])
    bench.add(Row(QUESTION, "the headers", ours_ns, "ns", "a request without", bare_ns, targets=(ratio_at_most(0.1),)))
