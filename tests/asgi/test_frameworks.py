"""The one line that users write, in Starlette and FastAPI, served by uvicorn over HTTP."""

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse as FastStream
from http_server import serving
from patience import until
from pydantic import BaseModel
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Mount, Route

from modelquota import ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware, QuotaPage

BODY = {"model": "m", "max_tokens": 50, "messages": []}
USAGE = {"usage": {"prompt_tokens": 1, "completion_tokens": 4, "total_tokens": 5}}
TOKEN = b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n'


async def tokens():
    for _ in range(500):
        yield TOKEN
        await asyncio.sleep(0.01)


def with_starlette(manager):
    async def chat(request):
        body = await request.json()
        if body.get("stream"):
            return StreamingResponse(tokens(), media_type="text/event-stream")
        if body.get("slow"):
            await asyncio.sleep(1)
        return JSONResponse(USAGE)

    routes = [Route("/v1/chat/completions", chat, methods=["POST"]), Mount("/quota", QuotaPage(manager))]
    app = Starlette(routes=routes)
    app.add_middleware(QuotaMiddleware, manager=manager)
    return app


def with_fastapi(manager):
    class Chat(BaseModel):
        model: str
        max_tokens: int
        stream: bool = False
        slow: bool = False

    app = FastAPI()
    app.add_middleware(QuotaMiddleware, manager=manager)

    async def chat(body: Chat):
        if body.stream:
            return FastStream(tokens(), media_type="text/event-stream")
        if body.slow:
            await asyncio.sleep(1)
        return USAGE

    app.post("/v1/chat/completions")(chat)
    app.mount("/quota", QuotaPage(manager))
    return app


def with_others_around(manager):
    """Under a middleware that runs what is behind it in a task of its own, and one that compresses."""

    async def pass_on(request, call_next):
        return await call_next(request)

    app = with_starlette(manager)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.add_middleware(GZipMiddleware, minimum_size=1)
    return app


def with_others_behind(manager):
    """The same, but nearer to the application than the quotas."""

    async def pass_on(request, call_next):
        return await call_next(request)

    app = with_starlette(manager)
    app.user_middleware.append(app.user_middleware[0].__class__(BaseHTTPMiddleware, dispatch=pass_on))
    return app


@pytest.fixture(params=[with_starlette, with_fastapi, with_others_around, with_others_behind])
def manager_and_client(request):
    manager = ResourceQuotaManager()
    manager.set_quota("m", max_concurrent_requests=1, max_tokens_per_hour=10_000, on_violation="reject")
    with serving(request.param(manager)) as address, httpx.Client(base_url=address, timeout=20) as client:
        yield manager, client
    usage = manager.get_usage("m")
    assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)


def until_free(manager):
    until(lambda: manager.get_usage("m").concurrent_requests == 0)


def test_a_request_a_refusal_and_the_page(manager_and_client):
    manager, client = manager_and_client
    answer = client.post("/v1/chat/completions", json=BODY)
    assert (answer.status_code, answer.json()) == (200, USAGE)
    assert answer.headers["x-ratelimit-remaining-tokens"] == "9950"
    until_free(manager)  # a middleware behind may end the response a moment after its last byte
    assert manager.get_usage("m").tokens_this_hour == 5
    with manager.reserve("m", 1):
        assert client.post("/v1/chat/completions", json=BODY).status_code == 503
    assert client.post("/v1/chat/completions", content=b"{").json()["error"]["code"] == "invalid_json"
    page = client.get("/quota/", headers={"accept": "application/json"})
    assert page.json()["models"][0]["id"] == "m"


def test_a_client_that_leaves_a_stream(manager_and_client):
    manager, client = manager_and_client
    with client.stream("POST", "/v1/chat/completions", json=BODY | {"stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        seen = b""
        for part in answer.iter_bytes():
            seen += part
            if seen.count(TOKEN) >= 3:
                break
    until_free(manager)
    assert 3 <= manager.get_usage("m").tokens_this_hour < 100


def test_a_client_that_leaves_before_the_first_byte(manager_and_client):
    manager, client = manager_and_client
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=BODY | {"slow": True}, timeout=0.3)
    assert manager.get_usage("m").concurrent_requests == 1, "the handler is still at work"
    until_free(manager)
    assert manager.get_usage("m").tokens_this_hour == 5, "its answer is settled, though no client reads it"
    assert client.post("/v1/chat/completions", json=BODY).status_code == 200
