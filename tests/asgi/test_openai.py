"""The official `openai` client against the example server, over HTTP."""

import threading
import time

import openai
import pytest
from http_server import serving
from patience import until
from strategies import OPEN

from modelquota import ResourceQuotaManager
from modelquota.demo.quotas import QUOTAS, demo_manager
from modelquota.demo.server import create_app

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is the tallest mountain?"}]
PROMPT = 7


@pytest.fixture(scope="module")
def server():
    manager = ResourceQuotaManager()
    manager.set_quota("m", **OPEN)
    with serving(create_app(manager, tokens_per_second=2000)) as address:
        yield manager, address


@pytest.fixture
def manager(server):
    """The manager of the server, with a model that nothing has used."""
    manager = server[0]
    manager.remove_quota("m")
    manager.set_quota("m", **OPEN)
    return manager


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def used(manager):
    """Tokens of the hour, once all is settled: a client has its answer a moment before the server is done with it."""
    until(lambda: manager.get_usage("m").concurrent_requests == 0)
    usage = manager.get_usage("m")
    assert usage.queued_requests == 0
    return usage.tokens_this_hour


def chat(client, **fields):
    return client.chat.completions.create(model="m", messages=MESSAGES, **{"max_tokens": 5, **fields})


def test_chat_is_settled_to_the_token(manager, client):
    answer = chat(client, max_tokens=5, n=2)
    assert answer.choices[0].message.content == answer.choices[1].message.content == "limits that hold in every"
    assert answer.usage.total_tokens == PROMPT + 10
    assert used(manager) == PROMPT + 10


def test_a_chat_stream_with_usage_is_settled_to_the_token(manager, client):
    chunks = list(chat(client, max_tokens=9, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]).count(" ") == 8
    assert chunks[-1].usage.total_tokens == PROMPT + 9
    assert used(manager) == PROMPT + 9


def test_a_chat_stream_without_usage_counts_what_passed(manager, client):
    chunks = list(chat(client, max_tokens=11, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    assert used(manager) == PROMPT + 11


def test_completions_are_settled_to_the_token(manager, client):
    answer = client.completions.create(model="m", prompt=["one two", "three"], max_tokens=4)
    assert answer.usage.total_tokens == 3 + 8
    assert used(manager) == 11
    stream = client.completions.create(
        model="m", prompt="one two", max_tokens=6, stream=True, stream_options={"include_usage": True}
    )
    assert list(stream)[-1].usage.total_tokens == 8
    assert used(manager) == 11 + 8


def test_responses_are_settled_to_the_token(manager, client):
    answer = client.responses.create(model="m", input="one two three", max_output_tokens=4)
    assert answer.output_text == "limits that hold in"
    assert answer.usage.total_tokens == used(manager) == 7
    events = list(client.responses.create(model="m", input="one two three", max_output_tokens=6, stream=True))
    assert events[-1].response.usage.total_tokens == 9
    assert used(manager) == 7 + 9


def test_embeddings_are_settled_to_the_token(manager, client):
    answer = client.embeddings.create(model="m", input=["one two", "three"], encoding_format="float")
    assert len(answer.data) == 2
    assert answer.usage.total_tokens == used(manager) == 3


def test_a_stream_that_the_client_closes_is_charged_what_passed(manager, client):
    with chat(client, max_tokens=1000, stream=True) as stream:
        seen = [next(stream) for _ in range(6)]
    assert PROMPT + len(seen) - 1 <= used(manager) < PROMPT + 990


def test_its_own_retry_obeys_the_time_and_succeeds_at_once(manager, client):
    manager.update_quota("m", max_requests_per_second=4, burst_requests=0, on_violation="reject")
    taken = []
    for _ in range(8):
        raw = chat(client.with_options(max_retries=4).with_raw_response)
        assert raw.parse().usage.total_tokens == PROMPT + 5
        taken.append(raw.retries_taken)
    assert set(taken) <= {0, 1}, "a retry after the time that was given is admitted"
    assert 1 in taken
    assert manager.get_usage("m").total_violations == sum(taken)
    assert used(manager) == 8 * (PROMPT + 5)


def test_an_async_client_streams_and_retries_too(manager, server):
    import asyncio

    manager.update_quota("m", max_tokens_per_second=30, burst_tokens=0, on_violation="reject")

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server[1]}/v1", api_key="none", max_retries=9) as client:

            async def one():
                stream = await client.chat.completions.create(
                    model="m", messages=MESSAGES, max_tokens=5, stream=True, stream_options={"include_usage": True}
                )
                return [chunk async for chunk in stream][-1].usage.total_tokens

            return await asyncio.gather(*(one() for _ in range(5)))

    assert asyncio.run(main()) == [PROMPT + 5] * 5
    assert used(manager) == 5 * (PROMPT + 5)


def test_a_used_up_hour_is_not_retried(manager, client):
    manager.update_quota("m", max_tokens_per_hour=20, on_violation="reject")
    chat(client, max_tokens=10)
    with pytest.raises(openai.RateLimitError) as error:
        chat(client.with_options(max_retries=5), max_tokens=10)
    assert (error.value.code, error.value.type) == ("insufficient_quota", "insufficient_quota")
    assert manager.get_usage("m").total_violations == 1, "it was tried once"
    assert "tokens per hour: 17 of 20 used, 17 asked" in error.value.message


def test_what_never_fits_is_a_bad_request(manager, client):
    manager.update_quota("m", max_tokens_per_hour=20)
    with pytest.raises(openai.BadRequestError, match="never fits") as error:
        chat(client.with_options(max_retries=5), max_tokens=100)
    assert error.value.code == "request_exceeds_limit"
    with pytest.raises(openai.BadRequestError, match="max_tokens is not an integer"):
        chat(client, max_tokens="many")
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.embeddings.create(model="key:free", input="x")


def test_a_busy_model_is_retried_until_it_is_free(manager, client):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="reject")
    with manager.reserve("m", 0) as held:
        with pytest.raises(openai.InternalServerError) as error:
            chat(client)
        assert error.value.status_code == 503
        threading.Timer(0.5, held.release).start()
        raw = chat(client.with_options(max_retries=3).with_raw_response)
        assert raw.retries_taken == 1


def test_queued_requests_are_served_one_after_the_other(manager, client):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(chat(client, max_tokens=40))) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(answers) == 5
    assert used(manager) == 5 * (PROMPT + 40)


def test_the_example_as_it_is_started():
    manager = demo_manager()
    with (
        serving(create_app(manager, tokens_per_second=5000)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="free", max_retries=0) as client,
    ):
        names = [model.id for model in client.models.list()]
        assert names == [quota.model_id for quota in QUOTAS if not quota.model_id.startswith("key:")]

        def ask(model, words=10, times=1):
            for _ in range(times):
                client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=words)

        for model in names:
            ask(model)
        with pytest.raises(openai.RateLimitError, match="requests per second") as error:
            ask("batch-13b", times=4)
        assert 0 < int(error.value.response.headers["retry-after-ms"]) < 1100
        ask("chat-70b", 100)
        start = time.monotonic()
        ask("chat-70b", 130)  # waits
        assert time.monotonic() - start > 0.3
        assert manager.get_usage("chat-70b").total_violations == 1
        with pytest.raises(openai.RateLimitError, match="Tenant free: requests per hour: 10 of 10 used"):
            ask("dev-7b", times=3)
    assert manager.snapshot()["concurrent_requests"].sum() == 0
