"""The trace reader: exact times, and for everything that is no trace an error that says where and what to do."""

import csv
import gzip
import io
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from traces import AZURE_REQUESTS, AZURE_TRACE, SMALL_REQUESTS, needs_azure_trace, write_small_trace

import modelquota.tuning.cells as cells
import modelquota.tuning.source
from modelquota import TraceError
from modelquota.tuning.source import BLOCK_BYTES
from modelquota.tuning.trace import read_trace

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes) -> Path:
        path = tmp_path / "trace.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_times_keep_their_100_ns(write):
    trace = read_trace(write(HEADER + "2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.0319607,3180,8"))
    assert trace.times_ns.tolist() == [0, 52_000_700]
    assert trace.input_tokens.tolist() == [4808, 3180]
    assert trace.output_tokens.tolist() == [10, 8]
    assert trace.start_unix_ns == 1_700_158_623_979_960_000
    assert (trace.models, trace.model_index, trace.out_of_order, len(trace)) == ((), None, 0, 2)
    assert trace.duration_ns == 52_000_700


@pytest.mark.parametrize(
    ("timestamp", "fraction_ns"),
    [
        ("2023-11-16 18:17:03", 0),
        ("2023-11-16T18:17:03", 0),
        ("2023-11-16T18:17:03.5Z", 500_000_000),
        ("2023-11-16 18:17:03.123456789", 123_456_789),
        ("2023-11-16 18:17:03.009930+00:00", 9_930_000),
        ("2023-11-16 20:17:03+02", 0),
        ("2023-11-16 12:47:03-0530", 0),
        (" 2023-11-16 18:17:03 ", 0),
        ('"2023-11-16 18:17:03"', 0),
    ],
)
def test_forms_of_a_timestamp(write, timestamp, fraction_ns):
    trace = read_trace(write(f"{HEADER}{timestamp},1,2\n"))
    assert trace.start_unix_ns == 1_700_158_623_000_000_000 + fraction_ns


@pytest.mark.parametrize(
    "header",
    ["Model,TIMESTAMP,ContextTokens,GeneratedTokens", "TIMESTAMP, contexttokens ,MODEL,GeneratedTokens"],
)
def test_model_column_stands_anywhere(write, header):
    order = [name.strip().lower() for name in header.split(",")]
    rows = [("2023-11-16 18:17:03", 1, 2, "llama"), ("2023-11-16 18:17:04", 3, 4, "qwen, big"), ("", 5, 6, " llama ")]
    file = io.StringIO()
    writer = csv.writer(file)
    for time, context, generated, model in rows:
        row = {"timestamp": time or rows[1][0], "contexttokens": context, "generatedtokens": generated, "model": model}
        writer.writerow([row[name] for name in order])
    trace = read_trace(write(header + "\r\n" + file.getvalue()))
    assert trace.models == ("llama", "qwen, big")
    assert trace.model_index is not None
    assert trace.model_index.tolist() == [0, 1, 0]
    assert trace.output_tokens.tolist() == [2, 4, 6]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_line_ends_blank_lines_and_byte_order_mark(write, end, bom):
    text = end.join(["", HEADER.strip(), "", "2023-11-16 18:17:03,1,2", "", "2023-11-16 18:17:05,3,4", "", ""])
    assert read_trace(write(bom + text.encode())).times_ns.tolist() == [0, 2_000_000_000]


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_blocks_may_end_anywhere(write, monkeypatch, end):
    good = b"\xef\xbb\xbfModel,TIMESTAMP,ContextTokens,GeneratedTokens" + end
    good += "".join(f"é{i},2023-11-16 18:17:0{i},{i},{i}\n" for i in range(5)).encode().replace(b"\n", end) + end
    for size in range(3, len(good)):
        monkeypatch.setattr(modelquota.tuning.source, "BLOCK_BYTES", size)
        trace = read_trace(write(good))
        assert trace.models == ("é0", "é1", "é2", "é3", "é4")
        assert trace.input_tokens.tolist() == [0, 1, 2, 3, 4]
        for bad in (b"x", b"\xff", b"\0"):
            with pytest.raises(TraceError) as caught:
                read_trace(write(good + bad))
            assert caught.value.line == 8


def test_rows_out_of_order_are_sorted_and_counted(write):
    seconds = [3, 1, 3, 2, 9, 0]
    lines = [f"2023-11-16 18:17:0{second},{place},0,m{place}\n" for place, second in enumerate(seconds)]
    trace = read_trace(write("TIMESTAMP,ContextTokens,GeneratedTokens,Model\n" + "".join(lines)))
    assert (trace.times_ns // 10**9).tolist() == [0, 1, 2, 3, 3, 9]
    assert trace.input_tokens.tolist() == [5, 1, 3, 0, 2, 4]
    assert trace.model_index is not None
    assert trace.model_index.tolist() == [5, 1, 3, 0, 2, 4]
    assert trace.out_of_order == 3
    assert trace.start_unix_ns == 1_700_158_620_000_000_000


def test_tokens_up_to_the_bound(write):
    trace = read_trace(write(HEADER + "2023-11-16 18:17:03,0,1000000000\n2023-11-16 18:17:03, 0007 ,0"))
    assert trace.output_tokens.tolist() == [1_000_000_000, 0]
    assert trace.input_tokens.tolist() == [0, 7]


ROW = "2023-11-16 18:17:03,1,2\n"


@pytest.mark.parametrize(
    ("content", "line", "column", "says"),
    [
        ("", 1, None, "the file is empty; expected TIMESTAMP,ContextTokens,GeneratedTokens (azure) or Timestamp,"),
        ("\n\n", 1, None, "the file is empty"),
        (HEADER, 2, None, "no requests below its header"),
        (ROW, 1, None, "columns '2023-11-16 18:17:03', '1', '2' are of no known format; expected TIMESTAMP"),
        ("TIMESTAMP,ContextTokens\n", 1, "GeneratedTokens", "missing from the header"),
        (HEADER.replace(",", ";"), 1, None, "separated by commas"),
        ("TIMESTAMP,Model,ContextTokens,GeneratedTokens,model\n", 1, "Model", "twice"),
        (HEADER + ROW + "2023-11-16 18:17:03,1\n", 3, None, "expected 3 columns as in the header, found 2"),
        (HEADER + "\n" + ROW + "2023-11-16 18:17:03,1,2,3\n", 4, None, "expected 3 columns as in the header, found 4"),
        (HEADER + ROW + "2023-11-16 18:17:03,-5,2\n", 3, "ContextTokens", "from 0 to 1,000,000,000, found '-5'"),
        (HEADER + ROW + "2023-11-16 18:17:03,1,\n", 3, "GeneratedTokens", "found ''"),
        (HEADER + ROW + "2023-11-16 18:17:03,1,2.5\n", 3, "GeneratedTokens", "a whole number of tokens"),
        (HEADER + ROW + "2023-11-16 18:17:03,1_0,2\n", 3, "ContextTokens", "found '1_0'"),
        (HEADER + ROW + "2023-11-16 18:17:03,١,2\n", 3, "ContextTokens", "found '١'"),
        (HEADER + ROW + "2023-11-16 18:17:03,1000000001,2\n", 3, "ContextTokens", "found '1000000001'"),
        (HEADER + ROW + f"2023-11-16 18:17:03,{'9' * 5000},2\n", 3, "ContextTokens", "9..."),
        (HEADER + ROW + "2023-11-16,1,2\n", 3, "TIMESTAMP", "expected a time like 2023-11-16 18:17:03.9799600"),
        (HEADER + ROW + "yesterday,1,2\n", 3, "TIMESTAMP", "found 'yesterday'"),
        (HEADER + ROW + "2023-02-29 18:17:03,1,2\n", 3, "TIMESTAMP", "is not a time: day"),
        (HEADER + ROW + "2023-11-16 24:00:00,1,2\n", 3, "TIMESTAMP", "is not a time: hour"),
        (HEADER + ROW + "2023-11-16 18:17:60,1,2\n", 3, "TIMESTAMP", "is not a time: second"),
        (HEADER + ROW + "2023-11-16 18:17:03.0123456789,1,2\n", 3, "TIMESTAMP", "found '2023"),
        (HEADER + ROW + "2023-11-16 18:17:03Z,1,2\n", 3, "TIMESTAMP", "has an offset from UTC, the first request has"),
        (HEADER + "2023-11-16 18:17:03Z,1,2\n" + ROW, 3, "TIMESTAMP", "has no offset from UTC, the first request has"),
        (HEADER + ROW + "2123-11-16 18:17:03,1,2\n", 3, "TIMESTAMP", "more than 73 years"),
        (HEADER + ROW + "9999-11-16 18:17:03,1,2\n", 3, "TIMESTAMP", "more than 73 years"),
        ("Model," + HEADER + "," + ROW, 2, "Model", "a name of 1 to 255 bytes, found ''"),
        ("Model," + HEADER + "ä" * 128 + "," + ROW, 2, "Model", "a name of 1 to 255 bytes"),
        (HEADER + ROW + "2023-11-16 18:17:03,1,\0\n", 3, None, "a NUL byte"),
        (HEADER.encode() + ROW.encode() + b"2023-11-16 18:17:03,1,\xe4\n", 3, None, "0xe4 is not UTF-8"),
        (HEADER.encode("utf-16"), 1, None, "UTF-16; save it as UTF-8"),
        (b"\x1f\x8b\x08\x00", 1, None, "the gzip data ends early"),
        (gzip.compress(HEADER.encode())[:-4] + b"beef", 1, None, "the gzip data is damaged"),
        (b"PAR1", 1, None, "convert it to CSV or JSONL"),
        ('[{"timestamp": 5}]', 1, None, "a JSON array; expected one JSON object a line"),
        (b"PK\x03\x04", 1, None, "save it as CSV"),
        (HEADER + ROW + '2023-11-16 18:17:03,"1,2\n' + ROW, 3, None, "a quotation mark left open"),
        (HEADER + ROW + '2023-11-16 18:17:03,"1"2,2\n' + ROW, 3, None, "not a row of CSV"),
        (HEADER + ROW + "7" * 2_500_000, 3, None, "a line of more than 1,048,576 bytes"),
        # Several faults: the first one is named, whatever its column and kind.
        (HEADER + ROW + "2023-11-16 18:17:03,1,x\nwhen,1,2\n1,2\n", 3, "GeneratedTokens", "found 'x'"),
        (HEADER + ROW + "when,1,2\n" + ROW + "\0", 3, "TIMESTAMP", "found 'when'"),
        (HEADER + ROW + "when,1,2\n" + ROW + '"', 3, "TIMESTAMP", "found 'when'"),
    ],
)
def test_error_names_line_and_column(write, content, line, column, says):
    path = write(content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    error = caught.value
    assert (error.path, error.line, error.column) == (str(path), line, column)
    assert says in str(error)
    assert str(error).startswith(f"{path}: line {line}: " + (f"column {column}: " if column else ""))
    assert len(str(error)) < 400 + len(str(path))


def test_error_beyond_the_first_block(write):
    rows = (BLOCK_BYTES // len(ROW)) * 2
    path = write("Model," + HEADER + '"two\nlines",' + ROW + ("m," + ROW) * rows + "m,2023-11-16 18:17:03,?,2\n")
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert (caught.value.line, caught.value.column) == (rows + 4, "ContextTokens")


def test_undecodable_byte_beyond_the_first_block(write):
    rows = (BLOCK_BYTES // len(ROW)) * 2
    with pytest.raises(TraceError) as caught:
        read_trace(write((HEADER + ROW * rows).encode() + b"\xff"))
    assert caught.value.line == rows + 2


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path / "none.csv")


def test_progress_ends_at_the_size_of_the_file(write):
    path = write(HEADER + ROW * 100_000)
    calls: list[tuple[int, int]] = []
    trace = read_trace(path, progress=lambda done, whole: calls.append((done, whole)))
    assert len(trace) == 100_000
    assert calls[-1] == (path.stat().st_size,) * 2
    assert len(calls) >= 3
    assert all(before[0] <= after[0] for before, after in pairwise(calls))


def test_trace_is_frozen(write):
    trace = read_trace(write(HEADER + ROW))
    with pytest.raises(AttributeError):
        trace.path = "other"  # type: ignore[misc]


@st.composite
def traces(draw):
    """Times, token counts and models, and the text of a file that holds them."""
    offset = draw(st.sampled_from(["", "Z", "+01:00", "-0330"]))
    separator = draw(st.sampled_from(" T"))
    fraction_digits = draw(st.sampled_from([0, 3, 6, 7, 9]))
    start = draw(st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1))).replace(microsecond=0)
    with_models = draw(st.booleans())
    gaps = draw(st.lists(st.integers(-(10**10), 10**13), min_size=1, max_size=30))
    # The csv module of Python before 3.13 writes a bare \r without the quotes that it needs to be read again.
    model_ids = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=8)
    ids = draw(st.lists(model_ids.filter(lambda name: name == name.strip()), min_size=1, max_size=3))
    time_ns, rows, file = 0, [], io.StringIO()
    writer = csv.writer(file, lineterminator=draw(st.sampled_from(["\n", "\r\n"])))
    writer.writerow(["TIMESTAMP", "ContextTokens", "GeneratedTokens", "Model"][: 3 + with_models])
    for gap in gaps:
        time_ns = max(time_ns + gap, 0) // 10 ** (9 - fraction_digits) * 10 ** (9 - fraction_digits)
        second, fraction = divmod(time_ns, 10**9)
        stamp = (start + timedelta(seconds=second)).strftime(f"%Y-%m-%d{separator}%H:%M:%S")
        if fraction_digits:
            stamp += f".{fraction // 10 ** (9 - fraction_digits):0{fraction_digits}}"
        tokens = draw(st.tuples(st.integers(0, 10**9), st.integers(0, 3000)))
        model = draw(st.sampled_from(ids))
        rows.append((time_ns, *tokens, model))
        writer.writerow([stamp + offset, *tokens, model][: 3 + with_models])
    start_ns = int(start.replace(tzinfo=UTC).timestamp()) * 10**9
    shift_ns = {"": 0, "Z": 0, "+01:00": -3600, "-0330": 12_600}[offset] * 10**9
    return rows, start_ns + shift_ns, with_models, file.getvalue()


@given(case=traces())
def test_what_was_written_is_read(case, tmp_path_factory):
    rows, start_ns, with_models, text = case
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(text.encode())
    trace = read_trace(path)
    in_order = sorted(rows, key=lambda row: row[0])
    assert trace.start_unix_ns == start_ns + in_order[0][0]
    assert trace.times_ns.tolist() == [row[0] - in_order[0][0] for row in in_order]
    assert trace.input_tokens.tolist() == [row[1] for row in in_order]
    assert trace.output_tokens.tolist() == [row[2] for row in in_order]
    assert trace.out_of_order == sum(row[0] < max(r[0] for r in rows[: i + 1]) for i, row in enumerate(rows))
    if with_models:
        assert trace.model_index is not None
        assert [trace.models[index] for index in trace.model_index] == [row[3] for row in in_order]
        assert trace.models == tuple(dict.fromkeys(row[3] for row in rows))


def read_or_refuse(path: Path) -> None:
    error: TraceError | None = None
    try:
        trace = read_trace(path)
    except TraceError as caught:
        error = caught
    if error is None:
        assert len(trace) > 0
        assert trace.times_ns[0] == 0
    else:
        assert (error.line or 0) >= 1
        assert str(error).isprintable(), "an error is one line"


@given(start=st.sampled_from([b"", HEADER.encode(), (HEADER + ROW).encode()]), rest=st.binary(max_size=300))
@example(start=b"", rest=b'"')
@example(start=HEADER.encode(), rest=b"\r\r\n\xed\xa0\x80")
def test_any_bytes_give_a_trace_or_a_trace_error(start, rest, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "bytes.csv"
    path.write_bytes(start + rest)
    read_or_refuse(path)


PIECES = [
    "2023-11-16 18:17:03", "2023-11-16T18:17:03.1Z", "0000-00-00 00:00:00", "0001-01-01 00:00:00+23:59",
    "9999-12-31 23:59:59.999999999", "1", "-1", "999999999999999999999", "1e9", "NaN", "", " ", ",", ",", ",", "\n",
    "\n", "\r", '"', '""', "llama", "\ufeff", "\u2028", "\x1c", "\0", "é",
]  # fmt: skip


@settings(max_examples=300)
@given(
    header=st.sampled_from([HEADER, "Model," + HEADER, ""]),
    pieces=st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40),
)
def test_broken_traces_give_a_trace_or_a_trace_error(header, pieces, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "pieces.csv"
    path.write_bytes((header + "".join(pieces)).encode("utf-8", "surrogatepass"))
    read_or_refuse(path)


def at_once(parse, column, *arguments):
    """What a parser of whole blocks makes of some cells."""
    text = ",".join(column).encode()
    data = np.frombuffer(text, np.uint8)
    ends = np.append(np.flatnonzero(data == ord(",")), len(text))
    return parse(data, np.concatenate(([0], ends[:-1] + 1)), ends, *arguments)


def each_alone(parse, column, *arguments):
    try:
        return [parse(cell, *arguments) for cell in column]
    except cells.BadCell:
        return None


def changed(data, choices, letters):
    """A column of cells of a usual form, some with letters that may not fit."""
    column = data.draw(st.lists(st.sampled_from(choices), min_size=1, max_size=5))
    for _ in range(data.draw(st.integers(0, 3))):
        row = data.draw(st.integers(0, len(column) - 1))
        place = data.draw(st.integers(0, len(column[row]) - 1))
        column[row] = column[row][:place] + data.draw(st.sampled_from(letters)) + column[row][place + 1 :]
    return column


STAMPS = ["2023-11-16 18:17:03.9799600", "2024-02-29 00:00:00", "2023-12-31 23:59:59.5"]


@settings(max_examples=300)
@given(data=st.data())
def test_many_timestamps_at_once_are_read_like_each_alone(data):
    column = changed(data, STAMPS, "0123456789-: .TZ/x")
    origin_ns = 1_700_000_000 * 10**9
    together = at_once(cells.timestamps, column, origin_ns, False)
    if together is not None:
        alone = each_alone(cells.parse_timestamp, column)
        assert alone is not None
        assert together.tolist() == [time_ns - origin_ns for time_ns, _ in alone]
        assert not any(has_offset for _, has_offset in alone)


@settings(max_examples=300)
@given(data=st.data())
def test_many_numbers_at_once_are_read_like_each_alone(data):
    column = changed(data, ["0", "5", "45.0", "118.25", "61.114999999", "1234567890.5"], "0123456789.- ex")
    together = at_once(cells.decimals, column, 10**9)
    if together is not None:
        assert together.tolist() == each_alone(cells.parse_number, column, 10**9, "a time")
    counts = at_once(cells.integers, column)
    if counts is not None and max(counts) <= cells.MAX_TOKENS and max(map(len, column)) <= 10:
        assert counts.tolist() == each_alone(cells.parse_tokens, column)


def test_usual_cells_are_read_many_at_once():
    column = [f"2023-11-{day} {day - 10:02}:17:03.9799600" for day in range(10, 31)] + STAMPS
    together = at_once(cells.timestamps, column, 0, False)
    assert together is not None
    assert together.tolist() == [cells.parse_timestamp(stamp)[0] for stamp in column]
    assert at_once(cells.integers, ["1", "1000000000", "007"]).tolist() == [1, 10**9, 7]
    assert at_once(cells.decimals, ["5", "45.0", "61.114"], 10**9).tolist() == [5 * 10**9, 45 * 10**9, 61_114 * 10**6]


@needs_azure_trace
def test_azure_trace():
    trace = read_trace(AZURE_TRACE)
    assert len(trace) == AZURE_REQUESTS
    assert trace.duration_ns == 3_435_948_056_000
    assert trace.out_of_order == 0
    assert int(trace.input_tokens.sum()) == 18_059_974
    assert bool(np.all(np.diff(trace.times_ns) >= 0))


def test_small_trace(tmp_path):
    """The one that takes its place, in the same format, if it is not there: the same on every machine."""
    path = tmp_path / "small.csv"
    write_small_trace(path)
    trace = read_trace(path)
    assert len(trace) == SMALL_REQUESTS
    assert trace.duration_ns == 3_633_612_953_600
    assert trace.out_of_order == 0
    assert int(trace.input_tokens.sum()) == 4_354_566
    assert int(trace.output_tokens.sum()) == 156_226
    assert path.read_text().startswith(HEADER + "2023-11-16 18:17:03.9799600,")
