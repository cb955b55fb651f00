"""llama-cpp-python's server with a tiny random model, behind `Quota`: it serves on, whichever clients leave."""

import contextlib
import sys

import httpx
import pytest
from launched import free_port, launched
from patience import until
from tiny_gguf import write_model

from modelquota import ResourceQuotaManager

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install '.[real]'")
pytest.importorskip("starlette_context", reason="its server is not installed: pip install 'llama-cpp-python[server]'")

QUOTAS = """
[http]
default_model = "tiny"
[models.tiny]
max_requests_per_second = "unlimited"
max_tokens_per_second = "unlimited"
max_concurrent_requests = 1
on_violation = "queue"
[models.once]
max_requests_per_hour = 1
on_violation = "reject"
"""
SERVED = """
from llama_cpp.server.app import create_app
from llama_cpp.server.settings import ModelSettings, ServerSettings
from modelquota.asgi import Quota

app = create_app(
    server_settings=ServerSettings(), model_settings=[ModelSettings(model="tiny.gguf", n_ctx=512, verbose=False)]
)
app.add_middleware(Quota)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_model(folder / "tiny.gguf")
    (folder / "quotas.toml").write_text(QUOTAS)
    (folder / "served.py").write_text(SERVED)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "served:app", "--host", "127.0.0.1", "--port", port]
    environment = {"MODELQUOTA_QUOTAS": "quotas.toml", "MODELQUOTA_STATE": "quota.state"}
    with (
        launched(command, port, folder, **environment) as address,
        httpx.Client(base_url=address, timeout=60) as client,
        ResourceQuotaManager(path=folder / "quota.state") as manager,
    ):
        yield client, manager


def used(manager):
    usage = manager.get_usage("tiny")
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


def body(**fields):
    return {"model": "tiny", "prompt": "one two three", "max_tokens": 16, "temperature": 0, **fields}


def test_plain_and_streamed(server):
    client, manager = server
    before = used(manager)
    usage = client.post("/v1/completions", json=body()).json()["usage"]
    until(lambda: used(manager) == (before[0] + usage["total_tokens"], before[1] + 1, 0))
    text = client.post("/v1/completions", json=body(stream=True)).text
    assert text.rstrip().endswith("data: [DONE]")
    until(lambda: used(manager)[1:] == (before[1] + 2, 0))
    assert used(manager)[0] - before[0] > usage["total_tokens"]
    answer = client.post("/v1/chat/completions", json=body(prompt=None, messages=[{"role": "user", "content": "hi"}]))
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert "x-ratelimit-limit-tokens" in answer.headers


def test_a_denial(server):
    client, _ = server
    assert client.post("/v1/completions", json=body(model="once")).status_code == 200
    assert client.post("/v1/completions", json=body(model="once")).status_code == 429


@pytest.mark.parametrize("when", ["before the first byte", "within the stream"])
def test_it_serves_on_when_clients_leave_twenty_times(server, when):
    """A handler that is canceled while its thread goes on brings this server down."""
    client, manager = server
    for _ in range(20):
        if when == "within the stream":
            with client.stream("POST", "/v1/completions", json=body(stream=True, max_tokens=200)) as answer:
                next(answer.iter_lines())
        else:
            timeout = httpx.Timeout(60, read=0.02)
            with contextlib.suppress(httpx.ReadTimeout):
                client.post("/v1/completions", json=body(max_tokens=200), timeout=timeout)
    until(lambda: used(manager)[2] == 0)
    answer = client.post("/v1/completions", json=body())
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"]
    until(lambda: (manager.get_usage("tiny").queued_requests, used(manager)[2]) == (0, 0))
