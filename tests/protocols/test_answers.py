"""What an answer or a stream used: by its report, merged field by field, or else by what passed."""

import itertools
import json
import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from protocol_samples import (
    ANTHROPIC_STREAM,
    CACHED,
    EVENTS,
    JSON_TYPE,
    LINES,
    META,
    RESPONSES_USAGE,
    SAMPLES,
    USAGE,
    WORD,
    chat_answer,
    chat_chunk,
    sse,
)  # fmt: skip

from modelquota.protocols import TABLES, AnswerReader, PathTable, operations, protocol
from modelquota.protocols.answer import MOST_HELD
from modelquota.protocols.content import tokens_of_event
from modelquota.quota.tokens import Tokens

TABLE = PathTable(operations(), anywhere=operations())
streams = [sample for sample in SAMPLES if sample.stream]
OPENAI = protocol("openai")


def used(protocol, kind, *pieces, prompt=10, complete=True, **options):
    reader = AnswerReader(protocol, kind, prompt, **options)
    for piece in pieces:
        reader.feed(piece if isinstance(piece, bytes) else json.dumps(piece).encode())
    return reader.tokens(complete=complete)


def reader_of(sample):
    return TABLE.find(sample.path)[0].protocol


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.id)
def test_the_usage_of_an_answer(sample):
    assert used(reader_of(sample), JSON_TYPE, sample.answer, outputs=sample.outputs) == Tokens(*sample.tokens)


@pytest.mark.parametrize("sample", streams, ids=lambda sample: sample.id)
def test_the_usage_of_a_stream(sample):
    assert used(reader_of(sample), sample.stream_type, *sample.stream) == Tokens(*sample.tokens)


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("sample", streams, ids=lambda sample: sample.id)
def test_the_usage_of_a_stream_however_it_is_cut(sample, size):
    whole = b"".join(sample.stream)
    pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
    assert used(reader_of(sample), sample.stream_type, *pieces) == Tokens(*sample.tokens)


@pytest.mark.parametrize("sample", streams, ids=lambda sample: sample.id)
def test_a_stream_that_breaks_costs_what_passed(sample):
    """Five words: whatever the report says in the end, four of them have passed once the last event is missing."""
    found = used(reader_of(sample), sample.stream_type, *sample.stream[:-4], complete=False)
    assert found.output >= 2
    assert found.total >= 12


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.outputs and s.bound], ids=lambda sample: sample.id)
def test_an_answer_without_usage_costs_what_passed(sample):
    answer = without_usage(sample.answer)
    found = used(reader_of(sample), JSON_TYPE, answer)
    if "choices" in answer and not answer["choices"]:
        assert found is None, "nothing to count: the estimate stays"
    else:
        assert found == Tokens(10, 0, 7)


def without_usage(value):
    if isinstance(value, list):
        return [without_usage(item) for item in value]
    reports = ("usage", "usageMetadata", "meta_info", "prompt_eval_count", "eval_count")
    return {key: part for key, part in value.items() if key not in reports}


@pytest.mark.parametrize("usage", [
    {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, {"total_tokens": 0}, {"prompt_tokens": 10}, {},
    None, [], 5, {"prompt_tokens": "10"}, {"prompt_tokens": -1, "completion_tokens": -1}, {"total_tokens": True},
    {"prompt_tokens": 2**62 + 1},
])  # fmt: skip
def test_a_report_of_nothing_does_not_make_an_answer_free(usage):
    assert used(OPENAI, JSON_TYPE, chat_answer(usage)) == Tokens(10, 0, 7)


@pytest.mark.parametrize("where", ["first", "last", "everywhere"])
def test_zeros_do_not_make_a_stream_free(where):
    zero = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
    words = [chat_chunk(WORD, usage=zero) if where == "everywhere" else chat_chunk(WORD)] * 50
    ends = [{"choices": [], "usage": zero}]
    events = ends + words if where == "first" else words + ends
    assert used(OPENAI, EVENTS, *sse(*events)) == Tokens(10, 0, 50)


def test_only_a_total_is_shared_out():
    assert used(OPENAI, JSON_TYPE, chat_answer({"total_tokens": 30})) == Tokens(10, 0, 20)
    assert used(OPENAI, JSON_TYPE, chat_answer({"total_tokens": 4})).total >= 4
    assert used(OPENAI, JSON_TYPE, chat_answer({"total_tokens": 30, "prompt_tokens": 22})) == Tokens(22, 0, 8)
    assert used(OPENAI, JSON_TYPE, chat_answer({"total_tokens": 30, "completion_tokens": 22})) == Tokens(8, 0, 22)


def test_more_cached_tokens_than_the_prompt_has_are_no_credit():
    usage = {**USAGE, "prompt_tokens_details": {"cached_tokens": 99}}
    assert used(OPENAI, JSON_TYPE, chat_answer(usage)) == Tokens(0, 10, 5)


def test_the_cache_of_deepseek_is_read():
    assert used(OPENAI, JSON_TYPE, chat_answer({**USAGE, "prompt_cache_hit_tokens": 4})) == Tokens(6, 4, 5)


def test_an_answer_of_anthropic_on_a_path_of_openai_is_read():
    assert used(OPENAI, EVENTS, *ANTHROPIC_STREAM) == Tokens(6, 4, 5)


@pytest.mark.parametrize("length", [0, MOST_HELD + 1])
@pytest.mark.parametrize("kind", ["a batch", "instances"])
def test_the_reports_of_a_batch_add_up(kind, length):
    answers = [{"padding": "x" * length, "text": WORD, "meta_info": META}] * 2
    answer = {"predictions": answers} if kind == "instances" else answers
    assert used(protocol("sglang"), JSON_TYPE, answer) == Tokens(12, 8, 10)


def test_the_texts_of_a_batch_without_reports_add_up():
    answers = [{"text": WORD * 4}, {"text": WORD * 4}]  # five tokens each
    for answer in (answers, {"predictions": answers}):
        assert used(protocol("sglang"), JSON_TYPE, answer) == Tokens(10, 0, 10)


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [{"message": {"content": "", "tool_calls": [{"function": {"arguments": {"usage": USAGE}}}]}}]},
        {"choices": [{"message": {"content": ""}, "usage": USAGE}]},
        {"tools": [{"usage": USAGE}], "choices": []},
        {"metadata": {"usage": USAGE}, "choices": []},
        {"response": {"output": [{"usage": RESPONSES_USAGE}]}},
        {"a": {"response": {"usage": USAGE}}},
        {"text": json.dumps({"usage": USAGE})},
    ],
)
def test_usage_elsewhere_is_content(answer):
    """In a tool's schema, a message, or text: it must not replace the real one, nor make one up."""
    for length in (0, MOST_HELD + 1):
        long = {**answer, "padding": "x" * length}
        reader = AnswerReader(OPENAI, JSON_TYPE, 10, outputs=0)
        reader.feed(json.dumps(long).encode())
        assert reader.tokens() is None
        assert used(OPENAI, JSON_TYPE, {**long, "usage": CACHED}) == Tokens(6, 4, 5)
        assert used(OPENAI, JSON_TYPE, {"usage": CACHED, **long}) == Tokens(6, 4, 5)


@pytest.mark.parametrize("name", list(TABLES))
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("size", [997, 65_536, 10**7])
def test_usage_is_found_anywhere_in_a_long_answer(name, where, size):
    sample = next(sample for sample in SAMPLES if sample.protocol == name and sample.outputs and sample.bound)
    if not isinstance(sample.answer, dict):
        return
    long = {
        "text\\": ['"usage": {', "\\" * 999, WORD * 90_000],
        "vectors": [[0.5, -1e-3]] * 3000,
        "deep": [[{"a": {}}]] * 99,
    }
    members = list(sample.answer.items())
    fill = list(long.items())
    order = {"first": members + fill, "middle": fill[:1] + members + fill[1:], "last": fill + members}[where]
    body = json.dumps(dict(order)).encode()
    assert len(body) > MOST_HELD
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    assert used(reader_of(sample), JSON_TYPE, *pieces) == Tokens(*sample.tokens)


def test_a_long_answer_without_output_in_its_usage_is_not_free():
    body = {
        "choices": [{"message": {"content": "x" * MOST_HELD}}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 0},
    }
    assert used(OPENAI, JSON_TYPE, body) is None, "the estimate stays"
    assert used(OPENAI, JSON_TYPE, body, outputs=0) == Tokens(5)


def test_a_long_answer_is_not_held():
    reader = AnswerReader(OPENAI, JSON_TYPE, 10)
    for _ in range(200):
        reader.feed(b'["' + b"x" * 10_000 + b'\\"')
        assert len(reader._buffer) <= MOST_HELD
    assert reader._scanner is None or len(reader._scanner._rest) < 1000


VALUES = st.recursive(
    st.text(max_size=8) | st.integers(-5, 2**40) | st.floats(allow_nan=False) | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)
PLACED = st.sampled_from(
    ["usage", "response", "message", "prompt_tokens", "completion_tokens", "input_tokens", "x", '"', "\\"]
)
TREES = st.recursive(
    VALUES, lambda inner: st.dictionaries(PLACED, inner, max_size=4) | st.lists(inner, max_size=3), max_leaves=15
)


@given(answer=TREES, size=st.integers(1, 60), indent=st.sampled_from([None, 1]), ascii_only=st.booleans())
@example(answer={"usage": {"prompt_tokens": 3, "completion_tokens": 4}}, size=1, indent=None, ascii_only=True)
@example(
    answer={'"': {"usage": {"prompt_tokens": 3}}, "usage\\": {"prompt_tokens": 9}}, size=3, indent=1, ascii_only=True
)
def test_the_scanner_finds_what_the_parser_finds(answer, size, indent, ascii_only):
    """The one that reads long answers piece by piece, and the one that reads short ones whole."""
    from modelquota.protocols.usage import Report, UsageScanner

    body = json.dumps(answer, indent=indent, ensure_ascii=ascii_only).encode()
    scanner = UsageScanner(OPENAI.usage)
    for at in range(0, len(body), size):
        scanner.feed(body[at : at + size])
    scanner.finish()
    scanned, parsed = Report(), Report()
    scanner.report(scanned, add=False)
    parsed.read(OPENAI.usage_tree, json.loads(body))
    assert scanned._numbers == parsed._numbers


@given(answer=st.dictionaries(PLACED, VALUES, max_size=3), prompt=st.integers(0, 2**62), output=st.integers(0, 2**62),
       after=st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers() | st.none(), max_size=3),
       cached=st.none() | st.integers(0, 2**62), total=st.booleans(), indent=st.sampled_from([None, 2]))  # fmt: skip
def test_the_short_way_reads_what_the_long_way_reads(answer, prompt, output, after, cached, total, indent):
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        **({"total_tokens": prompt + output} if total else {}),
        **({} if cached is None else {"prompt_tokens_details": {"cached_tokens": cached}}),
    }
    body = json.dumps({**answer, "usage": usage, **after}, indent=indent).encode()
    short = OPENAI.usage_at_end(body)
    if short is None:
        return
    reader = AnswerReader(OPENAI, JSON_TYPE, 10, read_usage=lambda value: None)  # which takes the long way
    reader.feed(body)
    within = min(cached or 0, prompt)
    assert reader.tokens() == Tokens(*short) == Tokens(prompt - within, within, output)


@pytest.mark.parametrize("body", [
    b'{"x": {"usage": {"prompt_tokens": 1, "completion_tokens": 2}}}',
    b'{"x": "\\"usage": {"prompt_tokens": 1, "completion_tokens": 2}}',
    b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2}',
    b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens": 3}}',
    b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2, "input_tokens": 3}}',
    b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": "1"}}}',
    b'{"usage": {"prompt_tokens": 1, "completion_tokens": 2}, "x": []}',
    b'{"usage": {"prompt_tokens": 1, "completion_tokens": 0}}',
    b"",
])  # fmt: skip
def test_the_short_way_is_not_taken(body):
    assert OPENAI.usage_at_end(body) is None


@pytest.mark.parametrize(
    ("event", "tokens"),
    [
        ({"choices": [{"delta": {"content": [{"type": "text", "text": "word "}]}}]}, 1),
        ({"choices": [{"delta": {"content": ["a", {"text": {"value": "word"}}, 5, {}]}}]}, 1),
        ({"choices": [{"delta": {"function_call": {"name": "f", "arguments": '{"city": "Oslo"}'}}}]}, 5),
        ({"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "x" * 40}}, {"function": None}, 4]}}]}, 10),
        ({"choices": [{"delta": {"audio": {"transcript": "hello there", "data": "A" * 4000}}}]}, 1),
        ({"choices": [{"delta": {"audio": {"id": "x", "data": "A" * 4000}}}]}, 0),
        ({"choices": [{"delta": {"reasoning": "hm"}}]}, 1),
        ({"choices": [{"delta": {"reasoning_content": "hm", "content": None}}]}, 1),
        ({"choices": [{"delta": {"refusal": "no"}}]}, 1),
        ({"choices": [{"delta": {"content": "a"}}, {"delta": {"content": "b"}}]}, 2),
        ({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "word "}}, 1),
        ({"type": "content_block_delta", "delta": {"type": "thinking_delta", "thinking": "hm, well"}}, 1),
        ({"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": '{"a":'}}, 1),
        ({"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "x" * 400}}, 0),
        ({"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}}, 0),
        ({"type": "message_start", "message": {"id": "x", "role": "assistant", "content": [], "model": "m"}}, 0),
        ({"type": "response.output_text.delta", "delta": "word"}, 1),
        ({"type": "response.function_call_arguments.delta", "delta": '{"a"'}, 1),
        ({"type": "response.audio.delta", "delta": "A" * 4000}, 0),
        ({"type": "response.audio_transcript.delta", "delta": "word"}, 1),
        ({"type": "response.output_text.done", "text": "word " * 50}, 0),
        ({"type": "response.completed", "response": {"output": []}}, 0),
        ({"type": "transcript.text.delta", "delta": "word"}, 1),
        ({"candidates": [{"content": {"parts": [{"text": "word"}, {"functionCall": {"args": {}}}]}}]}, 1),
        ({"candidates": [{"content": None}, 5, {"content": {"parts": 5}}]}, 0),
        ({"message": {"role": "assistant", "content": "word", "thinking": "hm"}}, 1),
        ({"message": {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}}, 1),
        ({"response": "word", "done": False}, 1),
        (5, 0), (None, 0), ("text", 0), ([], 0), ({"delta": 5}, 0), ({"choices": "x", "content": {}}, 0),
    ],
)  # fmt: skip
def test_deltas_of_every_shape_count(event, tokens):
    assert tokens_of_event(event) == tokens


def test_sglang_repeats_its_text_and_is_not_counted_twice():
    events = [{"text": WORD * n} for n in range(1, 101)]
    assert 100 <= used(protocol("sglang"), EVENTS, *sse(*events)).output <= 130


@pytest.mark.parametrize(
    "change", ['"', "\\", "\\n", "\n", "", "a much longer text than sixteen bytes", "ü" * 9, "\\ud800"]
)
def test_the_shape_of_events_is_used_only_if_it_is_the_same(change):
    """After the first events, those that differ in one text only are not parsed; all others are."""
    whole = sse(*[chat_chunk("word")] * 3)
    odd = whole[0].replace(b"word", change.encode())
    slow = AnswerReader(OPENAI, EVENTS, 0)
    fast = AnswerReader(OPENAI, EVENTS, 0)
    for piece in [*whole, odd, *whole]:
        fast.feed(piece)
        for byte in range(len(piece)):  # a shape is only seen in whole events
            slow.feed(piece[byte : byte + 1])
    assert fast._prefix
    assert not slow._prefix
    assert fast.tokens() == slow.tokens()


@given(seed=st.integers(0, 2**32))
def test_with_and_without_the_shape_the_same_is_counted(seed):
    rng = random.Random(seed)
    texts = [rng.choice(["word", "a", "", "long " * 9, 'x"y', "\\", "é", "\u2028"]) for _ in range(20)]
    more = [{"usage": USAGE} if rng.random() < 0.1 else {"n": rng.randrange(2)} for _ in texts]
    events = sse(*[chat_chunk(text, **extra) for text, extra in zip(texts, more, strict=True)])
    if rng.random() < 0.5:
        events = [b"".join(pair) for pair in itertools.batched(events, 2)] if hasattr(itertools, "batched") else events
    slow = used(OPENAI, EVENTS, *[byte.to_bytes() for byte in b"".join(events)])
    assert used(OPENAI, EVENTS, *events) == slow


def test_a_counter_that_raises_is_logged_once_and_the_rest_counted(caplog):
    def broken(data):
        raise ZeroDivisionError

    for _ in range(3):
        assert used(OPENAI, EVENTS, *sse(*[chat_chunk(WORD)] * 5), count_event=broken) == Tokens(10, 0, 5)
    assert [record.getMessage() for record in caplog.records] == [
        "the counter of tokens raised ZeroDivisionError(); such streams are counted without it"
    ]


def test_a_hook_reads_other_shapes(caplog):
    def read(value):
        return Tokens(value["in"], 0, value["out"]) if "out" in value else None

    assert used(OPENAI, JSON_TYPE, {"in": 3, "out": 4}, read_usage=read) == Tokens(3, 0, 4)
    assert used(OPENAI, JSON_TYPE, chat_answer(), read_usage=read) == Tokens(6, 4, 5)
    events = sse(chat_chunk(WORD), {"in": 1, "out": 1}, {"in": 3, "out": 9})
    assert used(OPENAI, EVENTS, *events, read_usage=read) == Tokens(3, 0, 9)
    assert used(OPENAI, JSON_TYPE, 5, read_usage=read) is None
    assert "usage= raised TypeError" in caplog.text


@pytest.mark.parametrize("kind", [b"text/plain", b"audio/mpeg", b"", b"text/html", b"\xff"])
def test_what_is_not_json_is_not_read(kind):
    assert used(OPENAI, kind, chat_answer()) is None


def test_what_is_compressed_is_not_read():
    assert used(OPENAI, JSON_TYPE, chat_answer(), readable=False) is None
    assert used(OPENAI, b"application/problem+json; charset=utf-8", chat_answer()) == Tokens(6, 4, 5)
    assert used(protocol("ollama"), LINES, b'{"response": "word"}') == Tokens(10, 0, 1)
