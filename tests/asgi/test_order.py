"""What belongs outside and inside of the middleware, and what happens otherwise: each row of README's table."""

import asyncio
import gzip
import json

import pytest
from asgi_client import OPEN, Call, chat, used
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware

CORS = Middleware(CORSMiddleware, allow_origins=["*"])
GZIP = Middleware(GZipMiddleware, minimum_size=1)
ORIGIN = [(b"origin", b"https://example.org"), (b"accept-encoding", b"gzip")]


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **OPEN | {"max_requests_per_hour": 1, "on_violation": "reject"})
    return manager


def call(manager, *middleware, status=200):
    async def answer(request):
        return JSONResponse({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 4}}, status)

    quotas = Middleware(QuotaMiddleware, manager=manager)
    order = [quotas if one is QuotaMiddleware else one for one in middleware]
    app = Starlette(routes=[Route("/v1/chat/completions", answer, methods=["POST"])], middleware=order)
    return asyncio.run(Call(app, body=chat(), headers=ORIGIN).run())


def test_with_cors_outside_browsers_can_read_a_429(manager):
    assert call(manager, CORS, QuotaMiddleware).headers["access-control-allow-origin"] == "*"
    refused = call(manager, CORS, QuotaMiddleware)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (429, "*")
    assert "access-control-allow-origin" not in call(manager, QuotaMiddleware, CORS).headers


def test_with_compression_outside_the_usage_is_read(manager):
    response = call(manager, GZIP, QuotaMiddleware)
    assert json.loads(gzip.decompress(response.body))["usage"]["completion_tokens"] == 4
    assert used(manager)[0] == 5


def test_with_compression_inside_the_estimate_is_charged(manager):
    assert call(manager, QuotaMiddleware, GZIP).headers["content-encoding"] == "gzip"
    assert used(manager)[0] == 110


@pytest.mark.parametrize("status", [401, 403])
def test_with_authentication_inside_what_it_refuses_is_charged_nothing(manager, status):
    for _ in range(3):
        assert call(manager, QuotaMiddleware, status=status).status == status
    assert used(manager) == (0, 0, 0)
    assert manager.get_usage("m").requests_this_hour == 0
