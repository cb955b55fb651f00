"""Each format of traces: read right, said what it was, refused at a line and column; nothing is guessed silently."""

import gzip
import io
import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import AZURE_TRACE, needs_azure_trace

from modelquota import TraceError
from modelquota.tuning import jsonlines
from modelquota.tuning.formats import FORMATS
from modelquota.tuning.formats.prefix import PrefixBlocks
from modelquota.tuning.trace import read_trace

SECOND_NS = 10**9
MOONCAKE_TRACE = AZURE_TRACE.with_name("mooncake_conversation.jsonl.gz")


class Raw(str):
    """JSON as it is written in the file."""


def as_json(value):
    return value if isinstance(value, Raw) else json.dumps(value)


def jsonl(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def mooncake(timestamp, prompt=600, output=5, blocks=(), **more):
    return {"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": list(blocks), **more}


# Of each format: a file, its name, what was recognized, and (time in ms, input, cached, output) of each row.
SMALL = {
    "azure": (
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,4808,10\n"
        "2024-05-10 00:00:01+00:00,3180,8\n2024-05-11 00:00:00.009930+00:00,110,27\n",
        "Azure CSV, timestamps",
        [(0, 4808, 0, 10), (990.07, 3180, 0, 8), (86_400_000, 110, 0, 27)],
    ),
    "azure with images": (
        "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.5,1,4808,10\n",
        "Azure CSV, timestamps",
        [(0, 4808, 0, 10)],
    ),
    "burstgpt": (
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,0,1087,API log\n",
        "BurstGPT CSV, times in s",
        [(0, 472, 0, 18), (40_500, 1087, 0, 0)],
    ),
    "burstgpt with sessions": (
        "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
        "5.25,a1,2.5,ChatGPT,472,18,490,Conversation log\n6.0,b2,0.125,ChatGPT,1,2,3,Conversation log\n",
        "BurstGPT CSV, times in s",
        [(0, 472, 0, 18), (750, 1, 0, 2)],
    ),
    "mooncake": (
        jsonl(
            mooncake(27_000, 1200, 5, [0, 1, 2]),
            mooncake(27_500, 1300, 6, [0, 1, 3]),
            mooncake(27_501, 1024, 7, [0, 1]),
        ),
        "Mooncake JSONL, times in ms",
        [(0, 1200, 0, 5), (500, 1300 - 1024, 1024, 6), (501, 0, 1024, 7)],
    ),
    "bailian": (
        jsonl(
            mooncake(61.114, 40, 5, [7, 8, 9], chat_id=159, parent_chat_id=-1, type="text", turn=1),
            mooncake(61.5, 50, 6, [7, 8, 10, 9], chat_id=160, parent_chat_id=159, type="text", turn=2),
        ),
        "Bailian JSONL, times in s",
        [(0, 40, 0, 5), (386, 18, 32, 6)],
    ),
    "aiperf": (
        jsonl(
            mooncake(1000, 10, 5, session_id="s1"),
            mooncake(1200, 20, 5, session_id="s2"),
            {"session_id": "s1", "delay": 2000.5, "input_length": 30, "output_length": 6},
        ),
        "AIPerf JSONL, times in ms",
        [(0, 10, 0, 5), (200, 20, 0, 5), (2000.5, 30, 0, 6)],
    ),
    "ledger": (
        jsonl(
            {"ledger": 1, "started_us": 1, "pid": 7},
            {"time_us": 1_700_000_000_000_000, "ids": ["acme", "llama"], "estimated": [100, 0, 50],
             "settled": [60, 40, 5], "verdict": "admitted", "limit": None, "waited_us": 5, "duration_us": 9_000},
            {"time_us": 1_700_000_000_250_000, "ids": ["llama"], "estimated": 70, "settled": None,
             "verdict": "denied", "limit": "tokens_per_hour", "waited_us": 0, "duration_us": None},
        ),
        "a modelquota ledger, times in us",
        [(0, 60, 40, 5), (250, 70, 0, 0)],
    ),
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(content, name="trace"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def rows_of(trace):
    columns = (trace.times_ns / 1e6, trace.input_tokens, trace.cached_tokens, trace.output_tokens)
    return list(zip(*(column.tolist() for column in columns), strict=True))


@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("how", ["plain", "gzip", "gzip in two members", "standard input"])
def test_a_trace_of_each_format_is_read_right(write, monkeypatch, case, how):
    text, title, rows = SMALL[case]
    data = text.encode()
    path = write(data)
    if how == "gzip":
        path = write(gzip.compress(data))
    elif how == "gzip in two members":
        path = write(gzip.compress(data[:50]) + gzip.compress(data[50:]))
    elif how == "standard input":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        path = "-"
    trace = read_trace(path)
    assert trace.format == title
    assert rows_of(trace) == rows
    assert trace.path == ("standard input" if path == "-" else str(path))


def test_every_format_has_a_trace_here():
    assert {case.split()[0] for case in SMALL} == set(FORMATS)


def test_what_a_format_has_beyond_times_and_tokens(write):
    burst = read_trace(write(SMALL["burstgpt with sessions"][0]))
    assert burst.users == ("a1", "b2")
    assert burst.durations_ns.tolist() == [2_500_000_000, 125_000_000]
    assert burst.ignored == ("Total tokens", "Log Type")
    assert burst.start_unix_ns is None
    failed = read_trace(write(SMALL["burstgpt"][0]))
    assert failed.models == ("ChatGPT", "GPT-4")
    assert failed.notes == ("1 requests have no response tokens (they failed); they are kept",)
    images = read_trace(write(SMALL["azure with images"][0]))
    assert images.ignored == ("NumImages",)
    assert images.start_unix_ns == 1_728_950_400_500_000_000
    sessions = read_trace(write(SMALL["aiperf"][0]))
    assert sessions.users == ("s1", "s2")
    assert sessions.notes == ("1 turns have a delay; it is counted from the arrival of the turn before",)
    ledger = read_trace(write(SMALL["ledger"][0]))
    assert (ledger.models, ledger.users) == (("llama",), ("acme",))
    assert ledger.user_index.tolist() == [0, -1]
    assert ledger.estimated_tokens.tolist() == [150, 70]
    assert ledger.durations_ns.tolist() == [9_000_000, -1]
    assert ledger.start_unix_ns == 1_700_000_000 * SECOND_NS


REFUSED = [
    (jsonl(mooncake(0), mooncake(-1)), 2, "timestamp", "a time as a number of ms, 0 or more, found -1"),
    (jsonl(mooncake(0), mooncake(True)), 2, "timestamp", "found True"),
    (jsonl(mooncake(0), mooncake(5, output=1.5)), 2, "output_length", "a whole number of tokens"),
    (jsonl(mooncake(0), mooncake(5, prompt=10**10)), 2, "input_length", "found 10000000000"),
    (jsonl(mooncake(0)) + '{"timestamp": 5, "input_length": 5}\n', 2, "output_length", "this key is missing"),
    (jsonl(mooncake(0)) + "\n\nnull\n", 4, None, "expected a JSON object, found None"),
    (jsonl(mooncake(0)) + '{"timestamp": 5, "inp', 2, None, "not a JSON object"),
    (jsonl(mooncake(0)) + '{"timestamp": NaN, "input_length": 5, "output_length": 5}', 2, "timestamp", "found nan"),
    (jsonl(mooncake(0)) + jsonl(mooncake(1)).strip() + "," + jsonl(mooncake(2)), 2, None, "not a JSON object"),
    (jsonl(mooncake(0, blocks=[1]), mooncake(1, blocks=[[2]])), 2, "hash_ids", "integers or text"),
    (jsonl(mooncake(0), {**mooncake(1), "hash_ids": 5}), 2, "hash_ids", "a list of block ids"),
    (jsonl(mooncake(0), mooncake(2**62)), 2, "timestamp", "4611686018427387904"),
    (jsonl(mooncake(0, session_id="a"), mooncake(None, session_id="b", delay=5)), 2, "timestamp", "no delay after"),
    (jsonl(mooncake(0, session_id="a"), mooncake(None, session_id="a")), 2, "timestamp", "no delay after"),
    (jsonl({"time": 5, "tokens": 6}), 1, None, "columns 'time', 'tokens' are of no known format"),
    (jsonl({"timestamp": 5, "output_length": 6}), 1, "input_length", "missing from the first record"),
    ("Timestamp,Model,Request tokens,Response tokens\n5,m,1,2\nx,m,1,2\n", 3, "Timestamp", "a number of s"),
    ("Timestamp,Model,Request tokens,Response tokens\n5,m,1,2\n5,,1,2\n", 3, "Model", "a name of 1 to 255 bytes"),
    ("a,b\n1,2\n", 1, None, "say with --map which columns are time, prompt and output"),
    ('{"timestamp"\n', 1, None, "not a JSON object"),
    (jsonl({"time_us": 5, "ids": ["m"], "estimated": "7"}), 1, "estimated", "found '7'"),
    (jsonl({"time_us": 5, "ids": [], "estimated": 7}), 1, "ids", "found []"),
    (jsonl({"time_us": 5, "ids": "llama", "estimated": 7}), 1, "ids", "found 'llama'"),
    (jsonl(mooncake(0), mooncake(10**30)), 2, "timestamp", "found 1000000000000000000000000000000"),
    (
        jsonl(mooncake(0, blocks=[10**30]), mooncake(0, blocks=[10**30], output=10**30)),
        2,
        "output_length",
        "found 1000",
    ),
]


@pytest.fixture(params=["with the extra", "without"])
def parser(request, monkeypatch):
    """The parser of plain blocks: that of the extra, and that of the standard library."""
    if request.param == "without":
        monkeypatch.setattr(jsonlines, "parse_block", json.loads)
    else:
        orjson = pytest.importorskip("orjson", reason="orjson is not installed: pip install 'modelquota[traces]'")
        assert jsonlines.parse_block is orjson.loads


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(("text", "line", "column", "says"), REFUSED)
def test_a_malformed_trace_is_refused_at_its_line(write, text, line, column, says):
    path = write(text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(path))
    assert str(caught.value).isprintable()


VALUES = st.one_of(
    st.integers(0, 10**4), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=3),
    st.sampled_from(["1e999", "-0", "0.5", "1E2", "01", "+1", "Infinity", "[]", r'"\ud800"']).map(Raw),
)  # fmt: skip


@pytest.mark.skipif(jsonlines.parse_block is json.loads, reason="orjson is not installed: 'modelquota[traces]'")
@given(st.lists(st.tuples(st.integers(0, 9), VALUES, VALUES | st.just(5)), min_size=1, max_size=4))
def test_both_parsers_read_the_same(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "both.jsonl"
    lines = (
        f'{{"timestamp": {number if position else plain}, "input_length": {prompt}, "output_length": 1}}'
        for position, (plain, number, prompt) in enumerate(
            (plain, as_json(number), as_json(prompt)) for plain, number, prompt in rows
        )
    )
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))

    def read():
        try:
            return rows_of(read_trace(path, format="mooncake"))
        except TraceError as error:
            return str(error)

    found = read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonlines, "parse_block", json.loads)
        assert read() == found


def test_what_was_cut_off_in_a_ledger_is_skipped_and_said(write):
    torn = SMALL["ledger"][0][:-30]
    trace = read_trace(write(torn + "\n" + SMALL["ledger"][0]))
    assert len(trace) == 3
    assert trace.notes == ("1 lines were cut off when their writer was killed; they are skipped",)


def test_columns_and_units_can_be_said(write):
    text = "when,Request tokens,made,who\n12.5,100,7,bob\n12.75,200,8,ann\n"
    columns = {"time": "when", "prompt": "Request tokens", "output": "made", "user": "WHO"}
    trace = read_trace(write(text), columns=columns, time_unit="s")
    assert rows_of(trace) == [(0, 100, 0, 7), (250, 200, 0, 8)]
    assert trace.users == ("bob", "ann")
    assert trace.format == "CSV, times in s"
    with pytest.raises(
        TraceError, match="line 2: column when: .*say --time-unit if this is a number of s, ms"
    ) as caught:
        read_trace(write(text), columns=columns)
    assert caught.value.column == "when"
    ms = read_trace(write(SMALL["bailian"][0]), time_unit="ms")
    assert ms.times_ns.tolist() == [0, 386_000]
    assert ms.format == "Bailian JSONL, times in ms"
    plain = read_trace(write(SMALL["bailian"][0]), format="mooncake")
    assert plain.cached_tokens.tolist() == [0, 50]  # two blocks of 512, but no more than the prompt
    other = read_trace(
        write(jsonl({"at": 5, "n": 6}, {"at": 7, "n": 8})), columns={"time": "at", "output": "n"}, time_unit="s"
    )
    assert rows_of(other) == [(0, 0, 0, 6), (2000, 0, 0, 8)]


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ({"format": "mooncak"}, ValueError, "format is 'mooncak'; expected one of .* perhaps mooncake"),
        ({"time_unit": "min"}, ValueError, "time_unit is 'min'; expected one of timestamp, s, ms, us, ns"),
        ({"columns": {"promt": "x"}}, ValueError, "column is 'promt'; expected one of .* perhaps prompt"),
        (
            {"columns": {"user": "x"}},
            TraceError,
            "column x: this column is missing from the header; it has 'TIMESTAMP'",
        ),
        ({"format": "burstgpt"}, TraceError, "column Request tokens: this column is missing from the header"),
        ({"format": "mooncake"}, TraceError, "line 1: the file is CSV, and Mooncake JSONL is not"),
    ],
)
def test_what_is_said_and_does_not_fit_is_an_error(write, how, error, says):
    with pytest.raises(error, match=says):
        read_trace(write(SMALL["azure"][0]), **how)


@given(
    prompts=st.lists(st.lists(st.integers(0, 6), max_size=5), min_size=1, max_size=12),
    names=st.sampled_from([lambda n: n, lambda n: n * 10**17, lambda n: f"{n:x}"]),
    cuts=st.lists(st.integers(1, 4), max_size=6),
)
def test_cached_tokens_are_those_of_the_known_blocks_in_front(prompts, names, cuts):
    lists = [[names(block) for block in blocks] for blocks in prompts]
    lengths = np.array([10 * len(blocks) - (3 if blocks else 0) for blocks in prompts], np.int64)
    seen: set[object] = set()
    expected = []
    for blocks, length in zip(lists, lengths.tolist(), strict=True):
        leading = next((i for i, block in enumerate(blocks) if block not in seen), len(blocks))
        expected.append(min(10 * leading, length))
        seen.update(blocks)
    cache = PrefixBlocks(10, "hash_ids")
    found = []
    while len(found) < len(lists):
        size = cuts.pop() if cuts else len(lists)
        part = slice(len(found), len(found) + size)
        found += cache.cached(lists[part], lengths[part]).tolist()
    assert found == expected


@needs_azure_trace
def test_mooncake_trace():
    trace = read_trace(MOONCAKE_TRACE)
    assert len(trace) == 12_031
    assert trace.format == "Mooncake JSONL, times in ms"
    assert trace.duration_ns == 3_536_999 * 10**6
    with gzip.open(MOONCAKE_TRACE, "rt") as lines:
        records = [json.loads(line) for line in lines]
    assert int(trace.tokens.sum()) == sum(record["input_length"] + record["output_length"] for record in records)
    seen: set[int] = set()
    cached = 0
    for record in records:
        known = next((i for i, block in enumerate(record["hash_ids"]) if block not in seen), len(record["hash_ids"]))
        cached += min(512 * known, record["input_length"])
        seen.update(record["hash_ids"])
    assert int(trace.cached_tokens.sum()) == cached


PIECES = [
    "0", "5", "-1", "1.5", "1e400", "NaN", "1" * 30, "true", "null", "[]", "[1, 2]", '["a", 3]', "[[1]]", "{}", '"x"',
    '"\\ud800"', '"2023-11-16 18:17:03"', "{", "}", ",", "\n", "\xff", "\0", "", "[" * 3000,
]  # fmt: skip


@given(
    start=st.sampled_from([SMALL[case][0] for case in SMALL]),
    changes=st.lists(st.tuples(st.integers(0, 500), st.integers(0, 12), st.sampled_from(PIECES)), max_size=4),
)
def test_broken_traces_of_every_format_give_a_trace_or_a_trace_error(start, changes, tmp_path_factory):
    text = start
    for place, length, piece in changes:
        text = text[:place] + piece + text[place + length :]
    path = tmp_path_factory.getbasetemp() / "broken"
    path.write_bytes(text.encode("latin-1"))
    error = trace = None
    try:
        trace = read_trace(path)
    except TraceError as caught:
        error = caught
    if error is not None:
        assert error.line >= 1
        assert str(error).isprintable(), "an error is one line"
        return
    assert len(trace) > 0
    assert trace.times_ns[0] == 0
    assert bool((np.diff(trace.times_ns) >= 0).all())
    for column in (trace.input_tokens, trace.cached_tokens, trace.output_tokens):
        assert int(column.min()) >= 0
