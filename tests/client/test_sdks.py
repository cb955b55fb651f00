"""The clients that people use, with our transport: plain and streamed, sync and async, settled to the token."""

import asyncio

import pytest
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, WORDS, Provider

from modelquota import ResourceQuotaManager
from modelquota.client import AsyncQuotaTransport, QuotaTransport

USED = PROMPT + OUTPUT
TEXT = "".join(WORDS)
UNLIMITED = dict.fromkeys(("max_requests_per_second", "max_tokens_per_second"))
ASK = [{"role": "user", "content": "hello"}]


@pytest.fixture
def manager():
    with ResourceQuotaManager() as manager:
        manager.set_quota("m", **UNLIMITED, on_violation="reject")
        yield manager


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
def address(provider):
    with serving(provider) as address:
        yield address


def used(manager):
    usage = manager.get_usage("m")
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


def library_of(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


class TestOpenAI:
    """openai, with a client of either library."""

    @pytest.fixture(params=["httpx", "httpx2"])
    def library(self, request):
        openai = library_of("openai")
        library = library_of(request.param)
        try:
            with library.Client() as client:
                openai.OpenAI(api_key="none", http_client=client)
        except TypeError:
            pytest.skip(f"this version of openai takes no client of {request.param}")
        return library

    @pytest.fixture
    def client(self, library, manager, address):
        openai = library_of("openai")
        with library.Client(transport=QuotaTransport(manager)) as http:
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="none", http_client=http, max_retries=0)

    def test_plain_and_streamed(self, client, manager):
        answer = client.chat.completions.create(model="m", messages=ASK)
        assert answer.choices[0].message.content == TEXT
        assert used(manager) == (USED, 1, 0)
        stream = client.chat.completions.create(
            model="m", messages=ASK, stream=True, stream_options={"include_usage": True}
        )
        words = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(words) == TEXT
        assert used(manager) == (2 * USED, 2, 0)

    def test_a_stream_that_is_left(self, client, manager, provider):
        provider.pace = 0.05
        with client.chat.completions.create(model="m", messages=ASK, stream=True) as stream:
            next(iter(stream))
            assert used(manager)[2] == 1
        tokens, requests, open_ones = used(manager)
        assert (requests, open_ones) == (1, 0)
        assert 2 < tokens < USED
        until(lambda: provider.left == 1)

    def test_denials_are_the_errors_that_it_raises_for_the_api(self, client, manager, provider):
        openai = library_of("openai")
        manager.update_quota("m", max_requests_per_hour=1)
        client.chat.completions.create(model="m", messages=ASK)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="m", messages=ASK)
        assert caught.value.code == "insufficient_quota"
        assert int(caught.value.response.headers["retry-after"]) > 3000
        manager.update_quota("m", max_tokens_per_hour=10)
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="m", messages=ASK, max_tokens=1000)
        assert len(provider.requests) == 1

    def test_it_retries_when_it_is_told(self, client, manager):
        manager.set_quota("m", max_requests_per_second=2, burst_requests=0, on_violation="reject")
        patient = client.with_options(max_retries=3)
        for _ in range(3):
            patient.chat.completions.create(model="m", messages=ASK)
        assert used(manager) == (3 * USED, 3, 0)

    def test_async(self, library, manager, address):
        openai = library_of("openai")

        async def main():
            async with library.AsyncClient(transport=AsyncQuotaTransport(manager)) as http:
                client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", http_client=http)
                create = client.chat.completions.create
                await asyncio.gather(*[create(model="m", messages=ASK) for _ in range(5)])
                stream = await create(model="m", messages=ASK, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        assert asyncio.run(main()) == TEXT
        assert used(manager) == (6 * USED, 6, 0)


class TestAnthropic:
    """anthropic."""

    @pytest.fixture(params=["httpx", "httpx2"])
    def library(self, request):
        anthropic = library_of("anthropic")
        library = library_of(request.param)
        try:
            with library.Client() as client:
                anthropic.Anthropic(api_key="none", http_client=client)
        except TypeError:
            pytest.skip(f"this version of anthropic takes no client of {request.param}")
        return library

    @pytest.fixture
    def client(self, library, manager, address):
        anthropic = library_of("anthropic")
        with library.Client(transport=QuotaTransport(manager)) as http:
            yield anthropic.Anthropic(base_url=address, api_key="none", http_client=http, max_retries=0)

    def test_plain_and_streamed(self, client, manager):
        answer = client.messages.create(model="m", max_tokens=50, messages=ASK)
        assert answer.content[0].text == TEXT
        assert used(manager) == (USED, 1, 0)
        with client.messages.stream(model="m", max_tokens=50, messages=ASK) as stream:
            assert "".join(stream.text_stream) == TEXT
        assert used(manager) == (2 * USED, 2, 0)

    def test_denials_are_the_errors_that_it_raises_for_the_api(self, client, manager, provider):
        anthropic = library_of("anthropic")
        manager.update_quota("m", max_concurrent_requests=1)
        with manager.reserve("m", 1), pytest.raises(anthropic.APIStatusError) as caught:
            client.messages.create(model="m", max_tokens=50, messages=ASK)
        assert (caught.value.status_code, caught.value.body["error"]["type"]) == (529, "overloaded_error")
        manager.update_quota("m", max_requests_per_hour=1)
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(model="m", max_tokens=50, messages=ASK)
        assert provider.requests == []

    def test_async(self, library, manager, address):
        anthropic = library_of("anthropic")

        async def main():
            async with library.AsyncClient(transport=AsyncQuotaTransport(manager)) as http:
                client = anthropic.AsyncAnthropic(base_url=address, api_key="none", http_client=http)
                await client.messages.create(model="m", max_tokens=50, messages=ASK)
                async with client.messages.stream(model="m", max_tokens=50, messages=ASK) as stream:
                    return "".join([text async for text in stream.text_stream])

        assert asyncio.run(main()) == TEXT
        assert used(manager) == (2 * USED, 2, 0)


class TestGemini:
    """google-genai."""

    @pytest.fixture
    def client(self, manager, address):
        genai = library_of("google.genai")
        library = library_of("httpx2")
        options = {"base_url": address, "httpx_client": library.Client(transport=QuotaTransport(manager))}
        try:
            made = genai.Client(api_key="none", http_options=options)
        except Exception:  # an older version is of httpx
            library = library_of("httpx")
            options["httpx_client"] = library.Client(transport=QuotaTransport(manager))
            made = genai.Client(api_key="none", http_options=options)
        yield made
        options["httpx_client"].close()

    def test_plain_and_streamed(self, client, manager):
        assert client.models.generate_content(model="m", contents="hello").text == TEXT
        assert used(manager) == (USED, 1, 0)
        parts = [part.text for part in client.models.generate_content_stream(model="m", contents="hello")]
        assert "".join(parts) == TEXT
        assert used(manager) == (2 * USED, 2, 0)

    def test_a_denial_is_an_error_of_the_api(self, client, manager, provider):
        from google.genai import errors

        manager.update_quota("m", max_requests_per_hour=1)
        manager.check_quota("m", 1)
        with pytest.raises(errors.ClientError) as caught:
            client.models.generate_content(model="m", contents="hello")
        assert (caught.value.code, caught.value.status) == (429, "RESOURCE_EXHAUSTED")
        assert provider.requests == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_pydantic_ai(manager, address):
    library_of("pydantic_ai")
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    openai = library_of("openai")
    library = library_of("httpx2")

    async def main():
        async with library.AsyncClient(transport=AsyncQuotaTransport(manager)) as http:
            client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", http_client=http)
            model = OpenAIChatModel("m", provider=OpenAIProvider(openai_client=client))
            return (await Agent(model).run("hello")).output

    assert asyncio.run(main()) == TEXT
    assert used(manager) == (USED, 1, 0)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_langchain(manager, address):
    langchain = library_of("langchain_openai")
    library = library_of("httpx2")
    with library.Client(transport=QuotaTransport(manager)) as http:
        model = langchain.ChatOpenAI(model="m", base_url=f"{address}/v1", api_key="none", http_client=http)
        assert model.invoke("hello").content == TEXT
        assert "".join([chunk.content for chunk in model.stream("hello")]) == TEXT
    assert used(manager) == (2 * USED, 2, 0)
