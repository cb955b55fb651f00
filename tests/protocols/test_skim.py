"""What is read of a short body without parsing it is what the parser's way reads, or nothing."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelquota.protocols.body import parse_body
from modelquota.protocols.estimate import MEDIA_FIELDS
from modelquota.protocols.openai import reads_generation
from modelquota.protocols.protocol import Operation
from modelquota.protocols.request import Reading, RequestRefusedError
from modelquota.protocols.skim import skim_generation
from modelquota.protocols.tables import operations

READ = reads_generation()
CHAT = {"model": "m", "messages": [{"role": "user", "content": "What is the tallest mountain?"}], "max_tokens": 10}

TEXTS = st.sampled_from([
    "", "x", "Hi there", "data:image/png;base64,AAAA", "data", '"', "\\", "\n\t", "é", "日本", "😀", "\x7f", "\ud800",
    "iVBORw0KGgoAAAANSUhEUgAA" * 50, "Words, 2 of them. " * 100, "x" * 2000,
]) | st.text(max_size=20)  # fmt: skip
SCALARS = TEXTS | st.integers(-3, 300) | st.floats(allow_nan=False) | st.booleans() | st.none()
PARTS = st.sampled_from(["role", "content", "name", "type", "text", "url", "tool_calls", "é", *sorted(MEDIA_FIELDS)])
CONTENTS = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PARTS, inner, max_size=3), max_leaves=6
)
MESSAGES = st.lists(st.fixed_dictionaries({"role": TEXTS, "content": TEXTS | CONTENTS}), max_size=3)
FIELDS = st.sampled_from([
    "model", "stream", "max_tokens", "max_completion_tokens", "max_output_tokens", "messages", "prompt", "input",
    "system", "text", "tools", "n", "best_of", "priority", "temperature", "metadata", "stream_options", "mödel", "",
])  # fmt: skip
BODIES = st.dictionaries(FIELDS, SCALARS | MESSAGES | CONTENTS, max_size=6).map(lambda extra: {**CHAT, **extra})
WRITTEN = st.fixed_dictionaries({"indent": st.sampled_from([None, 1]), "ensure_ascii": st.booleans()})


def parsed(body, params):
    try:
        return READ(parse_body(body), params)
    except RequestRefusedError:
        return "refused"


@given(body=BODIES, how=WRITTEN, path=st.sampled_from([None, "of-path"]))
def test_a_request_is_read_as_the_parser_reads_it(body, how, path):
    written = json.dumps(body, **how).encode("utf-8", "surrogatepass")
    params = {} if path is None else {"model": path}
    skimmed = skim_generation(written, params)
    assert skimmed is None or skimmed == parsed(written, params)


@given(data=st.data(), body=BODIES, how=WRITTEN)
def test_a_request_that_is_damaged_is_read_as_the_parser_reads_it(data, body, how):
    written = bytearray(json.dumps(body, **how).encode("utf-8", "surrogatepass"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(written) - 1))
        written[at : at + data.draw(st.integers(0, 2))] = data.draw(
            st.sampled_from([b"", b" ", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"\x00", b"\xff", b"e"])
        )
        if not written:
            return
    skimmed = skim_generation(bytes(written), {})
    assert skimmed is None or skimmed == parsed(bytes(written), {})


@given(text=TEXTS, how=WRITTEN)
@example(text="\U0010ffff\uffff\u07ff\u0080", how={"indent": None, "ensure_ascii": True})
def test_text_that_is_plain_is_skimmed(text, how):
    body = json.dumps({**CHAT, "system": text}, **how).encode("utf-8", "surrogatepass")
    skimmed = skim_generation(body, {})
    plain = text[:5] != "data:" and (len(text) < 1000 or " " in text) and "\ud800" not in text
    if plain and not any("\x20" <= letter < "\x80" and json.dumps(letter)[1:3] == "\\u" for letter in text):
        assert skimmed is not None
    assert skimmed is None or skimmed == parsed(body, {})


@pytest.mark.parametrize(
    ("body", "reading"),
    [
        (b'{"model": "m"}', Reading("m", 0)),
        (b' {"model": "m"}', None),
        (b'{"model": "m"} ', Reading("m", 0)),
        (b'{"model": "m"}\x00', None),
        (b'{"model": "m", "model": "n"}', None),
        (b'{"model": "m", "max_tokens": 5, "max_completion_tokens": 7}', Reading("m", 0, 1, 7)),
        (b'{"model": "m", "max_tokens": null}', Reading("m", 0)),
        (b'{"model": "m", "max_tokens": -1}', None),
        (b'{"model": "m", "max_tokens": 5.0}', None),
        (b'{"model": "m", "max_tokens": 05}', None),
        (b'{"model": "m", "max_tokens": 5000000000000000000}', None),
        (b'{"model": "m", "stream": true}', Reading("m", 0, 1, None, True)),
        (b'{"model": "m", "n": 1, "best_of": 1}', Reading("m", 0)),
        (b'{"model": "m", "n": 2}', None),
        (b'{"model": "m", "priority": 0}', None),
        (b'{"model": "m", "temperature": NaN}', None),
        (b'{"model": "m", "temperature": -0.7e+1, "x": {"y": [1, true, false, null, {}, []]}}', Reading("m", 0)),
        (b'{"model": "m", "temperature": 1.}', None),
        (b'{"model": "m", "prompt": "four"}', Reading("m", 1)),
        (b'{"model": "m", "prompt": ["four"]}', None),
        (b'{"model": "m", "prompt": [1, 2, 3]}', None),
        (b'{"model": "m", "messages": [{"content": [{"type": "text", "text": "four"}]}]}', Reading("m", 2)),
        (b'{"model": "m", "messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}', None),
        (b'{"model": "m", "messages": [{"role": "a", "role": "b"}]}', None),
        (
            b'{"tools": [{"function": {"parameters": {"x": 1, "y": [true, 2.5, null, "four", ["four"]]}}}]}',
            Reading(None, 5),
        ),
        (b'{"tools": [{"x": [1, "four"]}]}', None),
        (b'{"tools": {' + b", ".join(b'"%d": 1' % number for number in range(17)) + b"}}", None),
        (b'{"input": ["four", "four"]}', Reading(None, 2)),
        (b'{"messages": [{"content": "\xc3\xa9\xc3\xa9"}], "model": "m"}', Reading("m", 1)),
        (b'{"model": "", "prompt": "x"}', None),
        (b'{"m\\u006fdel": "m"}', None),
        (b'{"prompt": "\\u0064ata:;base64,"}', None),
        (b'{"prompt": "\\u00e9\\ud83d\\ude00"}', Reading(None, 2)),
        (b'{"prompt": "\\ud83d"}', None),
        (b'{"prompt": "\xff"}', None),
        (b"[]", None),
        (b"{}", None),
        (b"", None),
        (b"{" * 100, None),
        (b'{"x": ' + b"[" * 50 + b"]" * 50 + b"}", None),
    ],
)
def test_what_is_skimmed(body, reading):
    assert skim_generation(body, {}) == reading
    if reading is not None:
        assert parsed(body, {}) == reading


@pytest.mark.parametrize("size", range(90))
def test_a_body_that_is_cut_short_is_left_to_the_parser(size):
    whole = json.dumps(CHAT).encode()
    assert len(whole) > 90
    assert skim_generation(whole[:size], {}) is None


def test_every_path_that_generates_in_these_formats_is_skimmed():
    skimmed = {path for path, operation in operations().items() if operation.skim is not None}
    assert {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"} <= skimmed
    assert not any("embed" in path or "audio" in path or "images" in path for path in skimmed)


def test_a_counter_of_ones_own_is_asked():
    from modelquota.asgi import openai_routes

    route = openai_routes(prompt_tokens=lambda body: 7)["/v1/chat/completions"]
    assert isinstance(route, Operation)
    assert route.skim is None
