"""LiteLLM's proxy, the real one, with our callback: settled to the token, over HTTP."""

import contextlib
import copy
import hashlib
import json
import os
import socket
import subprocess
import sys
import time

import httpx
import pytest
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, Provider

from modelquota import ResourceQuotaManager

pytest.importorskip("litellm", reason="litellm is not installed: pip install '.[real]'")
pytest.importorskip("litellm.proxy.proxy_server", reason="litellm's proxy is not installed: pip install '.[real]'")

USED = PROMPT + OUTPUT
OPEN = 'max_requests_per_second = "unlimited"\nmax_tokens_per_second = "unlimited"\non_violation = "reject"\n'
QUOTAS = f"""
[http]
identity = "bearer"
[keys]
{hashlib.sha256(b"sk-acme").hexdigest()} = "acme"
[models.small]
{OPEN}
[models.once]
max_requests_per_hour = 1
{OPEN}
[models.single]
max_concurrent_requests = 1
{OPEN}
[models.tight]
max_tokens_per_hour = 50
{OPEN}
[models."tenant/acme"]
{OPEN}
"""
# Virtual keys need a database; this makes the same of a key.
KEYS = """
from litellm.proxy._types import UserAPIKeyAuth

async def check(request, api_key):
    return UserAPIKeyAuth(api_key=api_key)
"""
MODELS = ("small", "once", "single", "tight", "tenant/acme", "small#output", "retried")


@pytest.fixture(scope="module")
def provider():
    return Provider()


@pytest.fixture(scope="module")
def proxy(provider, tmp_path_factory):
    """An HTTP client of a running proxy, and the manager of its state file."""
    folder = tmp_path_factory.mktemp("litellm")
    (folder / "quotas.toml").write_text(QUOTAS)
    with serving(provider) as upstream, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        models = [
            {"model_name": name, "litellm_params": {
                "model": "openai/m", "api_base": f"{upstream}/v1", "api_key": "none",
                "num_retries": 2 if name == "retried" else 0,
            }} for name in MODELS
        ]  # fmt: skip
        config = {
            "model_list": models,
            "litellm_settings": {"callbacks": "modelquota.integrations.litellm.handler", "telemetry": False},
            "general_settings": {"master_key": "sk-admin", "custom_auth": "keys.check"},
            "router_settings": {"disable_cooldowns": True},
        }
        (folder / "keys.py").write_text(KEYS)
        (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
        environment = {
            **os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "MODELQUOTA_QUOTAS": str(folder / "quotas.toml"),
            "MODELQUOTA_STATE": str(folder / "quota.state"), "NO_PROXY": "*", "DISABLE_ADMIN_UI": "True",
        }  # fmt: skip
        command = [sys.executable, "-c", "from litellm import run_server; run_server()"]
        with open(folder / "log", "w") as log:
            server = subprocess.Popen(
                [*command, "--config", str(folder / "config.yaml"), "--host", "127.0.0.1", "--port", str(port)],
                env=environment, stdout=log, stderr=log, cwd=folder,
            )  # fmt: skip
            try:
                address = f"http://127.0.0.1:{port}"
                deadline = time.monotonic() + 90
                while True:
                    assert server.poll() is None, (folder / "log").read_text()[-3000:]
                    assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                    with contextlib.suppress(httpx.HTTPError):
                        if httpx.get(f"{address}/health/liveliness", timeout=2).status_code == 200:
                            break
                    time.sleep(0.2)
                headers = {"authorization": "Bearer sk-acme"}
                with (
                    httpx.Client(base_url=address, headers=headers, timeout=30) as client,
                    ResourceQuotaManager(path=folder / "quota.state") as manager,
                ):
                    yield client, manager
            finally:
                server.terminate()
                try:
                    server.wait(15)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()


@pytest.fixture(autouse=True)
def calm(provider):
    yield
    provider.script.clear()
    provider.pace = 0.0


def used(manager, model_id):
    usage = manager.get_usage(model_id)
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


def chat(model, **fields):
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": "x" * 36}], **fields}


class Added:
    """What a block adds to the use of a model, once its grants are settled."""

    def __init__(self, manager, model_id):
        self.manager, self.model_id = manager, model_id

    def __enter__(self):
        self.before = used(self.manager, self.model_id)
        return self

    def __exit__(self, *error):
        pass

    def __call__(self):
        now = used(self.manager, self.model_id)
        return tuple(after - before for after, before in zip(now, self.before, strict=True))

    def comes_to(self, *expected):
        until(lambda: self() == expected)


def test_plain_and_streamed(proxy):
    client, manager = proxy
    with Added(manager, "small") as added, Added(manager, "tenant/acme") as tenant:
        answer = client.post("/v1/chat/completions", json=chat("small"))
        assert answer.json()["usage"]["total_tokens"] == USED
        added.comes_to(USED, 1, 0)
        answer = client.post("/v1/chat/completions", json=chat("small", stream=True))
        assert answer.text.rstrip().endswith("data: [DONE]")
        added.comes_to(2 * USED, 2, 0)
        tenant.comes_to(2 * USED, 2, 0)  # by the hash of its key


def test_a_denial_has_its_status_and_the_time(proxy, provider):
    client, manager = proxy
    assert client.post("/v1/chat/completions", json=chat("once")).status_code == 200
    before = len(provider.requests)
    answer = client.post("/v1/chat/completions", json=chat("once"))
    assert answer.status_code == 429
    assert "requests per hour" in answer.json()["error"]["message"]
    assert 3500 < int(answer.headers["retry-after"]) <= 3661
    assert client.post("/v1/chat/completions", json=chat("tight")).status_code == 400
    with manager.reserve("single", 1):
        assert client.post("/v1/chat/completions", json=chat("single")).status_code == 503
    assert len(provider.requests) == before


def test_an_error_costs_no_tokens(proxy, provider):
    client, manager = proxy
    provider.script = [(400, {}, {"error": {"message": "no", "type": "invalid_request_error"}})]
    with Added(manager, "small") as added:
        assert client.post("/v1/chat/completions", json=chat("small")).status_code == 400
        added.comes_to(0, 1, 0)


def test_a_request_that_was_retried_is_settled_once(proxy, provider):
    client, manager = proxy
    manager.set_quota("retried", max_requests_per_second=None, max_tokens_per_second=None)
    provider.script = [(500, {}, {"error": {"message": "no"}})]
    with Added(manager, "retried") as added:
        before = len(provider.requests)
        answer = client.post("/v1/chat/completions", json=chat("retried"))
        assert (answer.status_code, len(provider.requests) - before) == (200, 2)
        added.comes_to(USED, 1, 0)


def test_a_stream_that_is_left_holds_nothing(proxy, provider):
    client, manager = proxy
    provider.pace = 0.3
    with Added(manager, "single") as added:
        with client.stream("POST", "/v1/chat/completions", json=chat("single", stream=True)) as answer:
            lines = answer.iter_lines()  # one that is not kept closes the answer
            next(lines)
            assert added()[2] == 1
        until(lambda: added()[1:] == (1, 0))


def test_a_client_cannot_name_a_tenant_or_a_meter(proxy, provider):
    client, manager = proxy
    before = len(provider.requests)
    with Added(manager, "tenant/acme") as tenant:
        for model in ("tenant/acme", "small#output"):
            assert client.post("/v1/chat/completions", json=chat(model)).status_code == 404
        tenant.comes_to(0, 0, 0)
    assert len(provider.requests) == before


def test_metadata_of_a_client_is_no_grant(proxy):
    client, manager = proxy
    with Added(manager, "small") as added:
        body = chat("small", metadata={"modelquota_grant": "small"})
        assert client.post("/v1/chat/completions", json=body).status_code == 200
        added.comes_to(USED, 1, 0)


def test_a_bad_file_ends_the_start(configure):
    import modelquota.integrations.litellm as module
    from modelquota import QuotaConfigError, QuotaFileError

    vars(module).pop("handler", None)
    with pytest.raises(QuotaConfigError, match="MODELQUOTA_QUOTAS"):
        _ = module.handler
    configure("[models.m]\nmax_ram_mb = -1")
    with pytest.raises(QuotaFileError, match="line 2"):
        _ = module.handler
    configure()
    assert module.handler is module.handler
    vars(module).pop("handler")


def test_a_ticket_is_one_through_every_copy_and_releases_with_the_last():
    from modelquota.integrations.litellm import _Ticket

    with ResourceQuotaManager() as manager:
        manager.set_quota("m")
        ticket = _Ticket.of(manager.reserve("m", 100))
        assert json.dumps({"grant": ticket}) == '{"grant": "m"}'
        copied = copy.deepcopy({"grant": ticket})
        assert copied["grant"] is ticket
        del ticket
        assert used(manager, "m") == (100, 1, 1)
        copied["grant"].failed()
        del copied
        assert used(manager, "m") == (0, 1, 0)
