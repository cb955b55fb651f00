"""`Quota` under uvicorn, hypercorn and granian, asked by the clients that people use; settled to the token."""

import asyncio
import sys
from pathlib import Path

import pytest
from launched import free_port, launched
from patience import until
from provider import OUTPUT, PROMPT, WORDS

from modelquota import ResourceQuotaManager

openai = pytest.importorskip("openai")

USED = PROMPT + OUTPUT
TEXT = "".join(WORDS)
ASK = [{"role": "user", "content": "hello"}]
SUPPORT = str(Path(__file__).parents[1] / "support")
OPEN = 'max_requests_per_second = "unlimited"\nmax_tokens_per_second = "unlimited"\non_violation = "reject"\n'
QUOTAS = f"""
[http]
max_body_bytes = 10_000
[models.m]
{OPEN}
[models.once]
max_requests_per_hour = 1
{OPEN}
[models.tight]
max_tokens_per_hour = 50
{OPEN}
[models.full]
max_concurrent_requests = 0
{OPEN}
"""
SERVERS = {
    "uvicorn": "-m uvicorn served:app --host 127.0.0.1 --port {port} --log-level warning",
    "hypercorn": "-m hypercorn served:app --bind 127.0.0.1:{port}",
    "granian": "-m granian --interface asgi --host 127.0.0.1 --port {port} served:app",
}


@pytest.fixture(scope="module", params=SERVERS)
def server(request, tmp_path_factory):
    """The address of a server, and the manager of its state file."""
    pytest.importorskip(request.param, reason=f"{request.param} is not installed: pip install '.[real]'")
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "quotas.toml").write_text(QUOTAS)
    (folder / "served.py").write_text(
        f"import sys\nsys.path.insert(0, {SUPPORT!r})\nfrom provider import Provider\n"
        "from modelquota.asgi import Quota\napp = Quota(Provider(pace=0.01))\n"
    )
    port = free_port()
    command = [sys.executable, *SERVERS[request.param].format(port=port).split()]
    state = folder / "quota.state"
    with (
        launched(
            command, port, folder, MODELQUOTA_QUOTAS=str(folder / "quotas.toml"), MODELQUOTA_STATE=str(state)
        ) as address,
        ResourceQuotaManager(path=state) as manager,
    ):
        until(lambda: manager.get_quota("full") is not None)
        yield address, manager


@pytest.fixture
def address(server):
    return server[0]


@pytest.fixture
def settled(server):
    """Check what a test adds to the use of ``m``."""
    manager = server[1]

    def read():
        usage = manager.get_usage("m")
        return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests

    before = read()

    def check(tokens, requests):
        until(lambda: tuple(now - then for now, then in zip(read(), before, strict=True)) == (tokens, requests, 0))

    return check


@pytest.fixture
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openai(client, settled):
    answer = client.chat.completions.with_raw_response.create(model="m", messages=ASK)
    assert answer.parse().choices[0].message.content == TEXT
    assert "ratelimit" in answer.headers
    settled(USED, 1)
    stream = client.chat.completions.create(model="m", messages=ASK, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == TEXT
    settled(2 * USED, 2)


def test_openai_async(address, settled):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:
            create = client.chat.completions.create
            await asyncio.gather(*[create(model="m", messages=ASK) for _ in range(5)])
            stream = await create(model="m", messages=ASK, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    assert asyncio.run(main()) == TEXT
    settled(6 * USED, 6)


def test_openai_understands_every_refusal(client, address):
    create = client.chat.completions.create
    create(model="once", messages=ASK)
    with pytest.raises(openai.RateLimitError) as caught:
        create(model="once", messages=ASK)
    assert caught.value.code == "insufficient_quota"
    assert int(caught.value.response.headers["retry-after"]) > 3000
    with pytest.raises(openai.BadRequestError) as caught:
        create(model="tight", messages=ASK, max_tokens=100)
    assert caught.value.code == "request_exceeds_limit"
    with pytest.raises(openai.APIStatusError) as caught:
        create(model="m", messages=[{"role": "user", "content": "x" * 20_000}])
    assert (caught.value.status_code, caught.value.code) == (413, "body_too_large")
    with pytest.raises(openai.APIStatusError) as caught:
        create(model="full", messages=ASK)
    assert caught.value.status_code in (400, 503)  # by itself it exceeds a limit of none at a time


def test_a_stream_that_is_left(client, settled, server):
    manager = server[1]
    before = manager.get_usage("m").tokens_this_hour
    with client.chat.completions.create(model="m", messages=ASK, stream=True) as stream:
        next(iter(stream))
    until(lambda: manager.get_usage("m").concurrent_requests == 0)
    assert before < manager.get_usage("m").tokens_this_hour <= before + USED


def test_anthropic(address, settled):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install '.[real]'")
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        answer = client.messages.with_raw_response.create(model="m", max_tokens=50, messages=ASK)
        assert answer.parse().content[0].text == TEXT
        with client.messages.stream(model="m", max_tokens=50, messages=ASK) as stream:
            assert "".join(stream.text_stream) == TEXT
        settled(2 * USED, 2)
        with pytest.raises(anthropic.BadRequestError):
            client.messages.create(model="tight", max_tokens=100, messages=ASK)
        with pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(model="m", max_tokens=50, messages=[{"role": "user", "content": "x" * 20_000}])
        assert (caught.value.status_code, caught.value.body["error"]["type"]) == (413, "request_too_large")


def test_anthropic_async(address, settled):
    anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install '.[real]'")

    async def main():
        async with anthropic.AsyncAnthropic(base_url=address, api_key="none") as client:
            await client.messages.create(model="m", max_tokens=50, messages=ASK)
            async with client.messages.stream(model="m", max_tokens=50, messages=ASK) as stream:
                return "".join([text async for text in stream.text_stream])

    assert asyncio.run(main()) == TEXT
    settled(2 * USED, 2)


def test_gemini(address, settled):
    genai = pytest.importorskip("google.genai", reason="google-genai is not installed: pip install '.[real]'")
    from google.genai import errors

    client = genai.Client(api_key="none", http_options={"base_url": address})
    assert client.models.generate_content(model="m", contents="hello").text == TEXT
    parts = [part.text for part in client.models.generate_content_stream(model="m", contents="hello")]
    assert "".join(parts) == TEXT
    settled(2 * USED, 2)
    with pytest.raises(errors.ClientError) as caught:
        client.models.generate_content(model="tight", contents="hello", config={"max_output_tokens": 100})
    assert (caught.value.code, caught.value.status) == (400, "INVALID_ARGUMENT")
    client.close()


@pytest.mark.filterwarnings("ignore")  # it has many of its own
def test_litellm(address, settled, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    litellm = pytest.importorskip("litellm", reason="litellm is not installed: pip install '.[real]'")
    options = {"messages": ASK, "api_base": f"{address}/v1", "api_key": "none", "num_retries": 0}
    assert litellm.completion("openai/m", **options).choices[0].message.content == TEXT
    stream = litellm.completion("openai/m", stream=True, **options)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
    settled(2 * USED, 2)
    with pytest.raises(litellm.BadRequestError):
        litellm.completion("openai/tight", max_tokens=100, **options)
