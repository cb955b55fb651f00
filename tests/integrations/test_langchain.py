"""LangChain's chat models with our rate limiter: settled to the token, by callbacks of the real package."""

import asyncio
import threading
import uuid

import pytest
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, Provider

from modelquota import QuotaExceededError, ResourceQuotaManager

pytest.importorskip("langchain_core", reason="langchain-core is not installed: pip install '.[real]'")
from langchain_core.language_models.fake_chat_models import FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage

from modelquota.integrations.langchain import RateLimiter

USED = PROMPT + OUTPUT
UNLIMITED = dict.fromkeys(("max_requests_per_second", "max_tokens_per_second"))


@pytest.fixture
def manager():
    with ResourceQuotaManager() as manager:
        manager.set_quota("m", **UNLIMITED)
        yield manager


def used(manager):
    usage = manager.get_usage("m")
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # langchain keeps its clients open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestWithOpenAI:
    """`ChatOpenAI`, over HTTP."""

    @pytest.fixture
    def provider(self):
        return Provider()

    @pytest.fixture
    def make(self, manager, provider):
        openai = pytest.importorskip("langchain_openai", reason="langchain-openai is not installed")
        limiter = RateLimiter(manager, "m")
        with serving(provider) as address:
            yield lambda **options: openai.ChatOpenAI(
                model="m", base_url=f"{address}/v1", api_key="none", max_retries=0, rate_limiter=limiter,
                callbacks=[limiter], **options,
            )  # fmt: skip

    def test_plain(self, make, manager):
        assert make().invoke("hello").content == "One two three four five"
        assert used(manager) == (USED, 1, 0)

    def test_streamed(self, make, manager):
        model = make(stream_usage=True)
        assert "".join(chunk.content for chunk in model.stream("hello")) == "One two three four five"
        assert used(manager) == (USED, 1, 0)

    def test_a_stream_that_is_left_costs_what_passed(self, make, manager, provider):
        provider.pace = 0.05
        stream = make().stream("x" * 40)
        next(stream)
        assert used(manager)[2] == 1
        stream.close()
        tokens, requests, open_ones = used(manager)
        assert (requests, open_ones) == (1, 0)
        assert 10 < tokens <= 12  # the prompt, and a word or two

    def test_async(self, make, manager):
        async def main():
            model = make(stream_usage=True)
            await asyncio.gather(*[model.ainvoke("hello") for _ in range(5)])
            async for _ in model.astream("hello"):
                pass
            await model.abatch(["one", "two"])

        asyncio.run(main())
        assert used(manager) == (8 * USED, 8, 0)

    def test_several_conversations_at_once(self, make, manager):
        make().generate([[HumanMessage("one")], [HumanMessage("two")], [HumanMessage("three")]])
        make().batch(["four", "five"])
        assert used(manager) == (5 * USED, 5, 0)

    def test_an_error_costs_no_tokens(self, make, manager, provider):
        provider.script = [(500, {}, {"error": {"message": "no"}})]
        with pytest.raises(Exception, match="no"):
            make().invoke("hello")
        assert used(manager) == (0, 1, 0)

    def test_it_waits_for_its_turn(self, make, manager, provider):
        provider.pace = 0.02
        manager.set_quota("m", **UNLIMITED, max_concurrent_requests=1, on_violation="queue")
        most = []
        model = make(streaming=True)
        threads = [threading.Thread(target=lambda: (model.invoke("hello"), most.append(1))) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(most) < 3:
            assert provider.running <= 1
        for thread in threads:
            thread.join()
        assert used(manager)[1:] == (3, 0)


def test_a_denial_is_an_exception_that_says_when(manager):
    manager.set_quota("m", **UNLIMITED, max_tokens_per_day=None, max_requests_per_hour=0, on_violation="reject")
    limiter = RateLimiter(manager, "m")
    model = FakeListChatModel(responses=["yes"], rate_limiter=limiter, callbacks=[limiter])
    with pytest.raises(QuotaExceededError):
        model.invoke("hello")
    assert limiter.acquire(blocking=False) is False
    assert used(manager) == (0, 0, 0)


def test_the_estimate_is_the_prompt_and_the_bound_of_the_call(manager):
    limiter = RateLimiter(manager, "m", default_output_tokens=100)
    run = uuid.uuid4()
    limiter.on_chat_model_start({}, [[AIMessage("x" * 40)]], run_id=run, invocation_params={"max_tokens": 7})
    assert limiter.acquire(blocking=False)
    assert used(manager) == (17, 1, 1)
    limiter.on_llm_error(KeyError(), run_id=run)
    assert used(manager) == (0, 1, 0)
    limiter.on_llm_error(KeyError(), run_id=run)  # told twice


def test_without_a_report_the_estimate_stands(manager):
    limiter = RateLimiter(manager, "m", default_output_tokens=100)
    model = GenericFakeChatModel(messages=iter([AIMessage("yes")]), rate_limiter=limiter, callbacks=[limiter])
    model.invoke("x" * 40)
    assert used(manager) == (110, 1, 0)


def test_without_the_callback_each_call_is_charged_its_estimate(manager):
    limiter = RateLimiter(manager, "m", default_output_tokens=100)
    model = FakeListChatModel(responses=["yes"], rate_limiter=limiter)
    model.invoke("hello")
    assert asyncio.run(limiter.aacquire()) is True
    assert asyncio.run(limiter.aacquire(blocking=False)) is True
    assert used(manager) == (300, 3, 0)


def test_a_run_whose_end_is_never_told_is_released_with_its_thread(manager):
    limiter = RateLimiter(manager, "m")

    def begin():
        limiter.on_chat_model_start({}, [[AIMessage("x")]], run_id=uuid.uuid4())
        limiter.acquire()

    def in_a_thread():
        thread = threading.Thread(target=begin)
        thread.start()
        thread.join()
        until(lambda: used(manager)[2] == 0)

    with pytest.warns(ResourceWarning):
        in_a_thread()
