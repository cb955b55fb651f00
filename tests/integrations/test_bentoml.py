"""BentoML's service, the real one, with our middleware."""

import asyncio

import pytest
from asgi_client import Call, chat, used
from fastapi import FastAPI

from modelquota.asgi import Quota
from modelquota.asgi.quota import _guards

bentoml = pytest.importorskip("bentoml", reason="bentoml is not installed: pip install '.[real]'")


@pytest.mark.filterwarnings("ignore")  # it has many of its own
def test_a_service_is_protected(configure, monkeypatch):
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "True")
    configure("[models.m]\nmax_requests_per_hour = 2\non_violation = 'reject'\n")
    inner = FastAPI()
    inner.post("/v1/chat/completions")(lambda: {"usage": {"prompt_tokens": 3, "completion_tokens": 4}})

    @bentoml.service
    @bentoml.asgi_app(inner, path="/")
    class Service:
        @bentoml.api
        def ping(self) -> str:
            return "pong"

    Service.add_asgi_middleware(Quota)
    app = Service.to_asgi()
    answers = [asyncio.run(Call(app, body=chat(), state={}).run()).status for _ in range(3)]
    assert answers == [200, 200, 429]
    (guard,) = _guards.values()
    assert used(guard.manager) == (14, 0, 0)
