"""`Quota` under uvicorn, hypercorn and granian, asked by the clients that people use; settled to the token."""

import asyncio
import sys
from pathlib import Path

import httpx
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
[models.busy]
max_concurrent_requests = 1
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
        until(lambda: manager.get_quota("busy") is not None)
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
    client = genai.Client(api_key="none", http_options={"base_url": address})
    assert client.models.generate_content(model="m", contents="hello").text == TEXT
    parts = [part.text for part in client.models.generate_content_stream(model="m", contents="hello")]
    assert "".join(parts) == TEXT
    settled(2 * USED, 2)
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


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_langchain(address, settled):
    langchain = pytest.importorskip("langchain_openai", reason="it is not installed: pip install '.[real]'")
    model = langchain.ChatOpenAI(model="m", base_url=f"{address}/v1", api_key="none")
    assert model.invoke("hello").content == TEXT
    assert "".join([chunk.content for chunk in model.stream("hello")]) == TEXT
    settled(2 * USED, 2)


STATUSES = {"once": 429, "tight": 400, "m": 413, "busy": 503}  # "m" is sent more than the server takes
OPENAI_ERRORS = {
    "once": ("RateLimitError", "insufficient_quota"),
    "tight": ("BadRequestError", "request_exceeds_limit"),
    "m": ("APIStatusError", "body_too_large"),
    "busy": ("InternalServerError", "overloaded"),
}
ANTHROPIC_ERRORS = {
    "once": ("RateLimitError", "rate_limit_error"),
    "tight": ("BadRequestError", "invalid_request_error"),
    "m": ("APIStatusError", "request_too_large"),
    "busy": ("APIStatusError", "overloaded_error"),
}
GEMINI_ERRORS = {
    "once": ("ClientError", "RESOURCE_EXHAUSTED"),
    "tight": ("ClientError", "INVALID_ARGUMENT"),
    "m": ("ClientError", "INVALID_ARGUMENT"),
    "busy": ("ServerError", "UNAVAILABLE"),
}
LITELLM_ERRORS = {
    "once": "RateLimitError",
    "tight": "BadRequestError",
    "m": "APIError",
    "busy": "ServiceUnavailableError",
}


class TestRefusals:
    """What each client makes of 429, 400, 413 and 503: its own error, with the status and the code of the answer."""

    @pytest.fixture(params=STATUSES)
    def model(self, request, server):
        manager = server[1]
        manager.check_quota("once", 1)
        with manager.reserve("busy", 0):
            yield request.param

    @staticmethod
    def messages(model):
        return [{"role": "user", "content": "x" * 20_000}] if model == "m" else ASK

    @staticmethod
    def caught(call):
        with pytest.raises(Exception) as caught:  # noqa: PT011 - its type is what is compared
            call()
        return caught.value

    @staticmethod
    def check(error, code, expected):
        kinds = [kind.__name__ for kind in type(error).__mro__]  # of openai's errors, LangChain has kinds of its own
        assert (expected[0] in kinds, code) == (True, expected[1]), (kinds, code)

    def test_openai(self, address, model):
        options = {"model": model, "messages": self.messages(model), "max_tokens": 100}
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            error = self.caught(lambda: client.chat.completions.create(**options))

        async def main():
            async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                await client.chat.completions.create(**options)

        for one in (error, self.caught(lambda: asyncio.run(main()))):
            self.check(one, one.code, OPENAI_ERRORS[model])
            assert one.status_code == STATUSES[model]
            if model == "once":
                assert int(one.response.headers["retry-after"]) > 3000

    def test_anthropic(self, address, model):
        anthropic = pytest.importorskip("anthropic", reason="anthropic is not installed: pip install '.[real]'")
        options = {"model": model, "messages": self.messages(model), "max_tokens": 100}
        with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
            error = self.caught(lambda: client.messages.create(**options))

        async def main():
            async with anthropic.AsyncAnthropic(base_url=address, api_key="none", max_retries=0) as client:
                await client.messages.create(**options)

        for one in (error, self.caught(lambda: asyncio.run(main()))):
            self.check(one, one.body["error"]["type"], ANTHROPIC_ERRORS[model])
            assert one.status_code == {**STATUSES, "busy": 529}[model]

    def test_gemini(self, address, model):
        genai = pytest.importorskip("google.genai", reason="google-genai is not installed: pip install '.[real]'")
        client = genai.Client(api_key="none", http_options={"base_url": address})
        content = self.messages(model)[0]["content"]
        error = self.caught(
            lambda: client.models.generate_content(model=model, contents=content, config={"max_output_tokens": 100})
        )
        client.close()
        self.check(error, error.status, GEMINI_ERRORS[model])
        assert error.code == STATUSES[model]

    @pytest.mark.filterwarnings("ignore::ResourceWarning")
    def test_langchain(self, address, model):
        langchain = pytest.importorskip("langchain_openai", reason="it is not installed: pip install '.[real]'")
        options = {"base_url": f"{address}/v1", "api_key": "none", "max_retries": 0, "max_tokens": 100}
        chat = langchain.ChatOpenAI(model=model, **options)
        error = self.caught(lambda: chat.invoke(self.messages(model)))
        self.check(error, error.code, OPENAI_ERRORS[model])
        assert error.status_code == STATUSES[model]

    @pytest.mark.filterwarnings("ignore")  # it has many of its own
    def test_litellm(self, address, model, monkeypatch):
        monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        litellm = pytest.importorskip("litellm", reason="litellm is not installed: pip install '.[real]'")
        options = {"api_base": f"{address}/v1", "api_key": "none", "num_retries": 0, "max_retries": 0}
        error = self.caught(
            lambda: litellm.completion(f"openai/{model}", messages=self.messages(model), max_tokens=100, **options)
        )
        self.check(error, None, (LITELLM_ERRORS[model], None))
        assert error.status_code == STATUSES[model]


def test_http_2(request, server, settled):
    """Streams of one connection, of which one is left in the middle."""
    address, manager = server
    if "uvicorn" in request.node.name:
        pytest.skip("uvicorn speaks HTTP/1.1 only")
    pytest.importorskip("h2", reason="h2 is not installed: pip install '.[real]'")
    body = {"model": "m", "messages": ASK, "max_tokens": 50}

    async def main():
        async with httpx.AsyncClient(base_url=address, http1=False, http2=True) as client:
            answers = await asyncio.gather(
                *[client.post("/v1/chat/completions", json={**body, "stream": n % 2 == 1}) for n in range(6)]
            )
            async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as left:
                await anext(left.aiter_lines())
            return [*answers, await client.post("/v1/chat/completions", json={**body, "model": "tight"})]

    *answers, refused = asyncio.run(main())
    assert {answer.http_version for answer in answers} == {"HTTP/2"}
    assert [answer.status_code for answer in answers] == [200] * 6
    assert all(word in answer.text for answer in answers[1::2] for word in WORDS)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request_exceeds_limit")
    until(lambda: manager.get_usage("m").concurrent_requests == 0)
    usage = manager.get_usage("m")
    assert usage.tokens_this_hour > 6 * USED
