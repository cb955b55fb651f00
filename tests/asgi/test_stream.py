"""Streams of server-sent events: passed on untouched at once, settled by their usage or by what passed."""

import asyncio
import gc
import json
import random

import pytest
from asgi_client import CHAT_PROMPT, OPEN, Call, body_of, chat, used
from hypothesis import given
from hypothesis import strategies as st

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware, event_tokens
from modelquota.protocols import AnswerReader, protocol
from modelquota.protocols.answer import MOST_HELD

EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **OPEN)
    return manager


def run(coroutine):
    result = asyncio.run(coroutine)
    gc.collect()
    return result


def data(event):
    return b"data: " + (event if isinstance(event, bytes) else json.dumps(event).encode()) + b"\n\n"


def token(text="word", **fields):
    return data({"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {"content": text}}], **fields})


ROLE = data({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
STOP = data({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
DONE = data(b"[DONE]")


def final(total):
    return data({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": total - 1, "total_tokens": total}})


class Stream:
    """Streams what it is given, one chunk at a time, each when it is asked to; ends when the client disconnects."""

    def __init__(self, *chunks, headers=EVENT_STREAM, breaks=False, status=200):
        self.chunks = chunks
        self.headers = headers
        self.breaks = breaks
        self.status = status
        self.steps = asyncio.Semaphore(0)

    def at_once(self):
        self.steps = asyncio.Semaphore(len(self.chunks))
        return self

    async def __call__(self, scope, receive, send):
        await body_of(receive)
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        gone = asyncio.create_task(receive())
        for chunk in self.chunks:
            step = asyncio.create_task(self.steps.acquire())
            await asyncio.wait((step, gone), return_when=asyncio.FIRST_COMPLETED)
            if not step.done():
                step.cancel()
                return
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        gone.cancel()
        if self.breaks:
            raise ZeroDivisionError
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def stands_after(manager, *chunks, **options):
    """What is charged after a stream of these."""

    async def main():
        response = await Call(QuotaMiddleware(Stream(*chunks, **options).at_once(), manager), body=chat(stream=True))
        assert response.chunks == [*chunks, b""]

    run(main())
    tokens, *held = used(manager)
    assert held == [0, 0]
    return tokens


def test_every_chunk_passes_untouched_before_the_next_is_made(manager):
    chunks = [ROLE, token("a"), b": a comment\n\n", token("b")[:20], token("b")[20:], b"\xff\xfe", STOP, final(9), DONE]

    async def main():
        model = Stream(*chunks)
        call = Call(QuotaMiddleware(model, manager), body=chat(stream=True)).start()
        for number in range(len(chunks)):
            model.steps.release()
            await call.until(lambda response, passed=number + 1: len(response.chunks) >= passed)
            assert call.response.chunks[number] is chunks[number]
            assert len(call.response.chunks) == number + 1 or number + 1 == len(chunks)
        await call.task

    run(main())


def test_the_final_usage_is_settled(manager):
    assert stands_after(manager, ROLE, token(), token(), STOP, final(77), DONE) == 77


def test_usage_of_null_on_the_way_is_none(manager):
    assert stands_after(manager, token(usage=None), token(usage=None), final(4), DONE) == 4


def test_without_usage_the_prompt_and_what_passed_stand(manager):
    assert stands_after(manager, ROLE, token(), token(), token(), STOP, DONE) == CHAT_PROMPT + 3


def test_the_usage_of_the_responses_api_is_settled(manager):
    events = [
        b"event: response.created\n" + data({"type": "response.created", "response": {"usage": None}}),
        b"event: x\n" + data({"type": "response.output_text.delta", "delta": "word"}),
        b"event: response.completed\n"
        + data({"type": "response.completed", "response": {"usage": {"input_tokens": 5, "output_tokens": 6}}}),
    ]
    assert stands_after(manager, *events) == 11


def test_a_usage_in_every_chunk_counts_as_it_was_last(manager):
    chunks = [token(usage={"prompt_tokens": 10, "completion_tokens": number}) for number in range(1, 6)]
    assert stands_after(manager, *chunks) == 15
    manager.set_quota("m2", **OPEN)

    async def main():
        model = Stream(*chunks, token())
        call = Call(QuotaMiddleware(model, manager), body=chat("m2", stream=True)).start()
        for _ in range(3):
            model.steps.release()
        await call.until(lambda response: len(response.chunks) == 3)
        await call.leave()

    run(main())
    assert used(manager, "m2") == (13, 0, 0)


def test_tokens_beyond_the_estimate_are_charged_while_they_pass(manager):
    async def main():
        model = Stream(*[token()] * 50)
        call = Call(QuotaMiddleware(model, manager), body=chat(max_tokens=10, stream=True)).start()
        for _ in range(30):
            model.steps.release()
        await call.until(lambda response: len(response.chunks) == 30)
        assert used(manager)[0] >= CHAT_PROMPT + 30
        for _ in range(20):
            model.steps.release()
        await call.task

    run(main())
    assert used(manager) == (CHAT_PROMPT + 50, 0, 0)


@pytest.mark.parametrize("passed", [0, 1, 7])
def test_a_client_that_leaves_in_the_middle_is_charged_what_passed(manager, passed):
    async def main():
        model = Stream(*[token()] * 10)
        call = Call(QuotaMiddleware(model, manager), body=chat(stream=True)).start()
        for _ in range(passed):
            model.steps.release()
        await call.until(lambda response: response.status and len(response.chunks) == passed)
        await call.leave()

    run(main())
    assert used(manager) == (CHAT_PROMPT + passed, 0, 0)


def test_a_stream_that_breaks_is_charged_what_passed(manager):
    async def main():
        with pytest.raises(ZeroDivisionError):
            await Call(QuotaMiddleware(Stream(token(), token(), breaks=True).at_once(), manager), body=chat())

    run(main())
    assert used(manager) == (CHAT_PROMPT + 2, 0, 0)


def test_a_stream_that_nobody_can_read_leaves_the_estimate(manager):
    encoded = [*EVENT_STREAM, (b"content-encoding", b"gzip")]
    assert stands_after(manager, b"\x1f\x8b\x08", headers=encoded) == CHAT_PROMPT + 100


def test_a_stream_that_reports_an_error_costs_no_tokens(manager):
    assert stands_after(manager, data({"error": {"message": "no"}}), status=503) == 0


def test_a_counter_of_ones_own(manager):
    async def main():
        app = QuotaMiddleware(Stream(data(b"3"), data(b"4")).at_once(), manager, chunk_tokens=int)
        await Call(app, body=chat(stream=True))

    run(main())
    assert used(manager)[0] == CHAT_PROMPT + 7


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        ({"choices": [{"delta": {"content": "word"}}]}, 1),
        ({"choices": [{"delta": {"content": "0123456789abcdef"}}]}, 1),
        ({"choices": [{"delta": {"content": "0123456789abcdef0"}}]}, 5),
        ({"choices": [{"delta": {"content": "ü" * 10}}]}, 5),
        ({"choices": [{"delta": {"content": "\ud800"}}]}, 1),
        ({"choices": [{"text": "word"}, {"text": "word"}, {"text": ""}]}, 2),
        ({"choices": [{"delta": {"reasoning_content": "hm"}}]}, 1),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": '{"a"'}}, {"function": 3}, 4]}}]}, 1),
        ({"choices": [{"delta": {"role": "assistant"}}]}, 0),
        ({"choices": [{"delta": None}, 5]}, 0),
        ({"choices": []}, 0),
        ({"choices": 3}, 0),
        ({"type": "response.output_text.delta", "delta": "word"}, 1),
        ({"type": "response.output_text.done", "text": "word"}, 0),
        ([], 0),
    ],
)
def test_tokens_of_an_event(event, tokens):
    assert event_tokens(json.dumps(event).encode()) == tokens


def test_tokens_of_what_is_no_event():
    assert event_tokens(b"{") == event_tokens(b"\xff") == event_tokens(b"[" * 100_000) == 0


LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])


@given(
    texts=st.lists(st.text(max_size=8), max_size=12),
    total=st.none() | st.integers(0, 2**40),
    end=LINE_ENDS,
    seed=st.integers(0, 2**32),
    closed=st.booleans(),
)
def test_however_a_stream_is_cut_the_same_is_counted(texts, total, end, seed, closed):
    events = [token(text) for text in texts] + ([] if total is None else [final(total + 1)])
    stream = b"".join(events)
    if not closed:
        stream = stream.rstrip(b"\n")
    stream = stream.replace(b"\n", end)
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **OPEN | {"max_tokens_per_hour": None})
    rng = random.Random(seed)
    with manager.reserve("m", 5) as grant:
        reader = AnswerReader(protocol("openai"), b"text/event-stream", 2)
        grant.add(2)
        while stream:
            at = rng.randrange(1, 40)
            grant.add(reader.feed(stream[:at]))
            stream = stream[at:]
        grant.settle(reader.tokens())
    passed = sum(event_tokens(event[6:]) for event in events)
    expected = 2 + passed if total is None else 1 + (total or passed)  # a report of no output is not believed
    assert used(manager)[0] == expected


@given(kind=st.sampled_from([b"text/event-stream", b"application/json"]), seed=st.integers(0, 2**32))
def test_whatever_a_response_says_little_of_it_is_held(kind, seed):
    rng = random.Random(seed)
    reader = AnswerReader(protocol("openai"), kind, 2)
    for _ in range(30):
        part = rng.choice([b"data:", b"\n", b'"usage":{', b"x" * 50_000, b"data: 1\n", b"[", b'{"choices":[]}'])
        reader.feed(part * rng.randrange(1, 30))
        assert len(reader._buffer) <= MOST_HELD
        assert sum(map(len, reader._data)) <= 2 * MOST_HELD
    if kind == b"text/event-stream":
        reader.feed(b'\n\ndata: {"usage": {"total_tokens": 3}}')
        assert reader.tokens().total == 3


def test_a_last_event_of_any_length_is_settled(manager):
    event = {"type": "response.completed", "response": {"output": "x" * 1_000_000, "usage": {"total_tokens": 12}}}
    line = data(event)
    pieces = [line[at : at + 9_999] for at in range(0, len(line), 9_999)]
    assert stands_after(manager, *pieces) == 12
    manager.remove_quota("m")
    manager.set_quota("m", **OPEN)
    assert stands_after(manager, line) == 12
