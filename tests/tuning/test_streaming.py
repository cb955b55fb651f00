"""A trace that is replayed while it is read: the same report as that of the whole, in memory that does not grow."""

import gc
import gzip
import json
import tracemalloc
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import modelquota.tuning.replay
import modelquota.tuning.simulate
import modelquota.tuning.source
import modelquota.tuning.tally
from modelquota import ResourceQuotaConfig, TraceError, UnknownModelError
from modelquota.quota.file import Quotas
from modelquota.tuning.replay import Replay
from modelquota.tuning.replay import replay as replay_whole
from modelquota.tuning.tally import Requests, _Samples
from modelquota.tuning.trace import StreamError, Trace, TraceStream, read_trace

MS, SECOND = 10**6, 10**9
PART_SIZES = (1, 2, 7, 1000)


def unlimited(model_id: str, **limits) -> ResourceQuotaConfig:
    return ResourceQuotaConfig.unlimited(model_id, **limits)


def made(times_ns, tokens, **columns) -> Trace:
    return Trace(
        path="made", times_ns=times_ns, input_tokens=tokens, cached_tokens=tokens, output_tokens=tokens, **columns
    )


def parts_of(trace: Trace, size: int) -> Iterator[Trace]:
    """The trace in parts that name, as a reader's do, only what was named so far, in order of first appearance."""
    for start in range(0, len(trace), size):
        part = trace.select(slice(start, start + size))
        models = users = 0
        if trace.model_index is not None:
            models = int(trace.model_index[: start + size].max()) + 1
        if trace.user_index is not None:
            users = int(trace.user_index[: start + size].max()) + 1
        yield replace(part, models=trace.models[:models], users=trace.users[:users])


def report_of(trace: Trace, size: int, quotas, **how) -> dict:
    run = Replay(quotas, **how)
    try:
        for part in parts_of(trace, size):
            run.feed(part)
        return without_time(run.report())
    finally:
        run.close()


@pytest.mark.parametrize("closed", [True, False])
def test_a_replay_that_is_given_up_releases_what_is_held(closed):
    """Otherwise each grant that is open warns that it was forgotten, and waiters are in queues that are gone."""
    run = Replay({"m": unlimited("m", max_concurrent_requests=2, on_violation="queue")}, wait=True)
    run.feed(made(np.arange(5), np.ones(5, np.int64), durations_ns=np.full(5, SECOND)))
    assert run._manager.get_usage("m").concurrent_requests == 2
    manager = run._manager
    if closed:
        run.close()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not closed:
            del run
            gc.collect()
        usage = manager.get_usage("m")
    assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)
    assert not caught


def without_time(report) -> dict:
    values = report.to_dict()
    del values["core_time_ns"]
    return values


def in_order(numbers: list[int]) -> list[int]:
    """Names numbered anew, in order of first appearance; -1 stays."""
    known: dict[int, int] = {}
    return [number if number < 0 else known.setdefault(number, len(known)) for number in numbers]


@st.composite
def traces(draw) -> Trace:
    count = draw(st.integers(1, 40))

    def column(elements):
        return draw(st.lists(elements, min_size=count, max_size=count))

    times_ns = np.cumsum(column(st.sampled_from([0, 1, 7 * MS, 400 * MS, 3 * SECOND]) | st.integers(0, SECOND)))
    optional = {}
    if draw(st.booleans()):
        index = in_order(column(st.integers(0, 2)))
        optional |= {"model_index": np.array(index, np.int32), "models": ("m", "n", "o")[: max(index) + 1]}
    if draw(st.booleans()):
        index = in_order(column(st.integers(-1, 3)))
        optional |= {"user_index": np.array(index, np.int32), "users": ("a", "b", "c", "d")[: max(index) + 1]}
    if draw(st.booleans()):
        optional["durations_ns"] = np.array(column(st.sampled_from([-1, 0, MS, 700 * MS, 5 * SECOND])))
    if draw(st.booleans()):
        optional["estimated_tokens"] = np.array(column(st.integers(-1, 40)))
    if draw(st.booleans()):
        optional["priorities"] = np.array(column(st.integers(-1, 2)))
    return Trace(
        path="made",
        times_ns=times_ns - times_ns[0],
        input_tokens=np.array(column(st.integers(0, 12))),
        cached_tokens=np.array(column(st.integers(0, 5))),
        output_tokens=np.array(column(st.integers(0, 12))),
        **optional,
    )


@st.composite
def quota_files(draw) -> Quotas:
    some = st.none() | st.sampled_from([1, 3, 20])

    def quota(name):
        return unlimited(
            name,
            max_requests_per_second=draw(some),
            burst_requests=draw(st.integers(0, 3)),
            max_tokens_per_second=draw(st.none() | st.sampled_from([5, 20, 60])),
            burst_tokens=draw(st.integers(0, 30)),
            max_tokens_per_minute=draw(st.none() | st.integers(10, 400)),
            max_concurrent_requests=draw(st.none() | st.integers(1, 3)),
            on_violation=draw(st.sampled_from(["queue", "throttle", "reject", "warn"])),
            grace_period_sec=draw(st.sampled_from([0.0, 0.5, 2.0])),
            max_queued_requests=draw(st.sampled_from([1, 1000])),
        )

    weights = st.sampled_from([(0, 0, 1), (1, 0, 0), (3, 0.3, 15)])
    models = {name: quota(name) for name in ("m", "n", "o")}
    patterns = {"user:*": quota("user:*")}
    if draw(st.booleans()):
        models["m#x"] = quota("m#x").replace(token_weights=draw(weights))
    if draw(st.booleans()):
        patterns["user:*#x"] = quota("user:*#x").replace(token_weights=draw(weights))
    if draw(st.booleans()):
        models["user:b"] = quota("user:b")
    return Quotas(models, patterns)


@given(data=st.data())
def test_parts_make_no_difference(data):
    """Waits, open requests and seconds go across the borders of parts, and models and users appear later."""
    trace = data.draw(traces())
    quotas = data.draw(quota_files())
    how = {
        "model": "m" if trace.model_index is None else None,
        "wait": data.draw(st.booleans()),
        "per_user": bool(trace.users) and data.draw(st.booleans()),
        "speed": data.draw(st.sampled_from([1, 24, 0.7])),
    }
    whole = without_time(replay_whole(trace, quotas, **how))
    for size in PART_SIZES:
        try:
            found = report_of(trace, size, quotas, **how)
        except StreamError as problem:
            if "tells kinds of tokens apart" not in str(problem):
                raise
            found = None
        kinds_later = size < len(trace) and any("#" in name for name in (*quotas, *quotas.patterns))
        assert found == whole or (found is None and kinds_later)


def test_parts_of_a_longer_trace_make_no_difference():
    """Thousands of requests, of which many wait, across many borders."""
    rng = np.random.default_rng(3)
    count = 2_000
    trace = Trace(
        path="made",
        times_ns=np.cumsum(rng.exponential(SECOND / 20, count)).astype(np.int64),
        input_tokens=rng.integers(0, 80, count),
        cached_tokens=rng.integers(0, 20, count),
        output_tokens=rng.integers(0, 100, count),
        model_index=np.array(in_order(rng.integers(0, 2, count).tolist()), np.int32),
        models=("m", "n"),
        durations_ns=rng.integers(0, SECOND, count),
    )
    trace = replace(trace, times_ns=trace.times_ns - trace.times_ns[0])
    for held in (False, True):
        each = trace if held else replace(trace, durations_ns=None)
        limits = {"max_requests_per_second": 9, "burst_requests": 2, "max_concurrent_requests": 5 if held else None}
        quotas = {
            "m": unlimited("m", on_violation="queue", grace_period_sec=3, **limits),
            "n": unlimited("n", on_violation="throttle", grace_period_sec=1, **limits),
        }
        whole = without_time(replay_whole(each, quotas, wait=True))
        assert min(model["waited"] for model in whole["models"]) > 50
        assert min(model["timed_out"] for model in whole["models"]) > 50
        for size in PART_SIZES:
            assert report_of(each, size, quotas, wait=True) == whole


def test_what_a_part_may_not_bring():
    def part(at_s, **columns):
        return made(np.array([at_s * SECOND]), np.ones(1, np.int64), **columns)

    quotas = Quotas({"m": unlimited("m")}, {"user:*": unlimited("user:*")})
    run = Replay(quotas)
    run.feed(part(0))
    with pytest.raises(StreamError, match="made: the first requests have no durations, and later ones have"):
        run.feed(part(1, durations_ns=np.array([5])))
    run = Replay(quotas)
    run.feed(part(0, model_index=np.array([0], np.int32), models=("m",)))
    with pytest.raises(UnknownModelError, match="no quota for 'x'; add it to the quotas, which have 'm'"):
        run.feed(part(1, model_index=np.array([1], np.int32), models=("m", "x")))
    run = Replay(quotas, speed=1e-9)
    with pytest.raises(ValueError, match="so small that this trace would last more than 73 years"):
        run.feed(part(3))
    run = Replay(quotas, per_user=True)
    run.feed(part(0))
    with pytest.raises(ValueError, match="the trace names no users"):
        run.report()


def test_more_ids_than_there_is_room_for(monkeypatch):
    monkeypatch.setattr(modelquota.tuning.replay, "ROOM_FOR_PATTERNS", 4)
    count = 20
    trace = made(
        np.arange(count) * SECOND,
        np.ones(count, np.int64),
        user_index=np.arange(count, dtype=np.int32),
        users=tuple(f"user:{number}" for number in range(count)),
    )
    quotas = Quotas({"m": unlimited("m")}, {"user:*": unlimited("user:*", max_tokens_per_minute=2)})
    with pytest.raises(StreamError, match="more than 4 ids match patterns of the quotas"):
        report_of(trace, 1, quotas, per_user=True)
    assert len(replay_whole(trace, quotas, per_user=True).users) == count


# -- reading


def as_one(parts: list[Trace]) -> Trace:
    """The parts joined; a column that some of them do not have is -1 there, as in a whole trace."""
    last = parts[-1]

    def column(name):
        found = [getattr(part, name) for part in parts]
        if all(each is None for each in found):
            return None
        return np.concatenate(
            [np.full(len(part), -1) if each is None else each for part, each in zip(parts, found, strict=True)]
        )

    names = [name for name, value in zip(Trace.__slots__, map(last.__getattribute__, Trace.__slots__), strict=True)
             if isinstance(value, np.ndarray) or name.endswith(("_index", "_ns", "_tokens", "priorities"))]  # fmt: skip
    return replace(last, **{name: column(name) for name in names if name != "start_unix_ns"})


def same(one: Trace, other: Trace) -> bool:
    return all(
        np.array_equal(value, getattr(other, name)) if isinstance(value, np.ndarray) else value == getattr(other, name)
        for name in Trace.__slots__
        for value in [getattr(one, name)]
    )


def ledger_line(at_ms: int, row: int) -> str:
    record = {"time_us": at_ms * 1000, "ids": [f"u{row * 7 % 5}", f"m{row % 3}"], "estimated": row % 9 + 3}
    if row % 4:
        record |= {"settled": [row % 5, row % 2, row % 3], "duration_us": row * 100}
    return json.dumps(record) + "\n"


def azure_line(at_ms: int, row: int) -> str:
    return f"2023-11-16 18:17:{at_ms // 1000:02}.{at_ms % 1000:03},{row % 11},{row % 7},m{row % 3},\n"


def mooncake_line(at_ms: int, row: int) -> str:
    record = {"timestamp": at_ms, "input_length": 900, "output_length": row, "hash_ids": [row % 3, row]}
    return json.dumps(record) + "\n"


def burstgpt_line(at_ms: int, row: int) -> str:
    return f"{at_ms / 1000},gpt,{row},{row % 3}\n"


FORMS = {
    "azure": ("TIMESTAMP,ContextTokens,GeneratedTokens,Model,User\n", azure_line),
    "burstgpt": ("Timestamp,Model,Request tokens,Response tokens\n", burstgpt_line),
    "mooncake": ("", mooncake_line),
    "ledger": ('{"ledger":1,"started_us":5,"pid":7}\n', ledger_line),
}


@pytest.mark.parametrize("form", FORMS)
@given(
    gaps_ms=st.lists(st.integers(0, 400), min_size=1, max_size=60),
    early_ms=st.lists(st.sampled_from([0, 0, 0, 5, 300]), min_size=60, max_size=60),
    part_rows=st.sampled_from(PART_SIZES),
    held_rows=st.sampled_from([0, 1, 7, 30]),
    block=st.integers(40, 400),
    packed=st.booleans(),
)
def test_parts_of_a_file_are_the_whole(form, tmp_path_factory, gaps_ms, early_ms, part_rows, held_rows, block, packed):
    """Rows that are out of order are where they are in the whole trace; what is too far away is refused."""
    header, line = FORMS[form]
    times_ms = [max(int(at) - early, 0) for at, early in zip(np.cumsum(gaps_ms) + 1_000, early_ms, strict=False)]
    data = (header + "".join(map(line, times_ms, range(len(times_ms))))).encode()
    path = tmp_path_factory.mktemp("trace") / "trace"
    path.write_bytes(gzip.compress(data) if packed else data)
    whole = read_trace(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modelquota.tuning.source, "BLOCK_BYTES", block)
        parts = []
        try:
            for part in TraceStream(path, part_rows=part_rows, held_rows=held_rows):
                assert len(part)
                parts.append(part)
        except StreamError as problem:
            assert whole.out_of_order
            row = problem.line - 1 - bool(header)
            first_ms = min(times_ms[:row])
            assert times_ms[row] < first_ms + int(parts[-1].times_ns[-1]) // MS
            assert sum(map(len, parts)) <= row
            return
    assert same(as_one(parts), whole)
    assert len(parts) == 1 or len(parts[0]) >= part_rows


def test_rows_that_are_held_back_are_sorted(tmp_path):
    """A row may be as many rows too late as are held back, and at most some more."""
    path = tmp_path / "trace.csv"
    for late in (0, 20, 100, 101, 1_000):
        seconds = [*range(1, late + 1), 0, *range(late + 1, 2_000)]
        rows = "".join(f"{second},{second},1\n" for second in seconds)
        path.write_text("when,asked,made\n" + rows)
        how = {"columns": {"time": "when", "prompt": "asked", "output": "made"}, "time_unit": "s"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(modelquota.tuning.source, "BLOCK_BYTES", 100)
            stream = TraceStream(path, part_rows=10, held_rows=100, **how)
            if late == 1_000:
                with pytest.raises(StreamError, match=r"line 1002: the trace is not sorted by time: this row"):
                    list(stream)
                continue
            parts = list(stream)
        assert same(as_one(parts), read_trace(path, **how))
        assert parts[-1].out_of_order == bool(late)
        assert max(map(len, parts)) < 40


def test_a_delay_in_place_of_a_time_needs_the_whole_trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    lines = [{"session_id": "a", "input_length": 5, "output_length": 1, "timestamp": 10 * row} for row in range(99)]
    lines[80] = {"session_id": "a", "input_length": 5, "output_length": 1, "delay": 3}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_trace(path).times_ns[80] == 793 * MS
    (only,) = TraceStream(path, part_rows=50, held_rows=50)
    assert same(only, read_trace(path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modelquota.tuning.source, "BLOCK_BYTES", 100)
        with pytest.raises(StreamError, match="line 81: this row has no time of its own"):
            list(TraceStream(path, part_rows=10, held_rows=10))


def test_a_bad_row_is_named_by_its_line_in_a_later_part_too(tmp_path):
    path = tmp_path / "trace.csv"
    header, line = FORMS["azure"]
    path.write_text(header + "".join(line(row, row) for row in range(500)) + "2023-11-16 18:17:03,x,1,m,u\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modelquota.tuning.source, "BLOCK_BYTES", 100)
        stream = iter(TraceStream(path, part_rows=7, held_rows=7))
        assert len(next(stream)) < 20
        with pytest.raises(TraceError, match="line 502: column ContextTokens: expected a whole number"):
            list(stream)


# -- sums


@given(
    values=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9) | st.integers(0, 2**61)), min_size=1, max_size=60),
    size=st.integers(1, 30),
    most=st.sampled_from([1, 5, 100]),
)
@example(values=[(0, value) for value in range(1, 102)], size=7, most=200)
def test_percentiles_are_those_of_numpy(values, size, most):
    """Of few different values exactly, and of more to one part in 16,000; the same however they come."""
    groups, numbers = (np.array(column, np.int64) for column in zip(*values, strict=True))
    distinct = len({pair for pair in values if pair[1]})
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modelquota.tuning.tally, "MOST_VALUES", most)
        for step in (size, len(values)):
            samples = _Samples()
            for start in range(0, len(values), step):
                part = slice(start, start + step)
                samples.add(numbers[part], groups[part], numbers[part] > 0)
            ordered = samples.sorted(3)
            found.append(
                [
                    None if one is None else (one.median(MS), one.percentile(99, MS), one.median(), one.largest)
                    for one in map(ordered.of, range(3))
                ]
            )
    assert found[0] == found[1]
    for group, one in enumerate(found[0]):
        own = numbers[(groups == group) & (numbers > 0)]
        assert (one is None) == (not len(own))
        if one is None:
            continue
        true = np.median(own / MS), np.percentile(own / MS, 99), np.median(own)
        assert one[:3] == (pytest.approx(true, rel=1 / 16_000) if distinct > most else true)
        assert one[3] == own.max()


@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from([0, SECOND - 1, SECOND]) | st.integers(0, 3 * SECOND), st.integers(0, 9), st.integers(-1, 2)
        ),
        max_size=40,
    ),
    size=st.integers(1, 9),
)
def test_peaks_of_groups_are_those_of_each(requests, size):
    requests.sort(key=lambda request: request[0])
    times_ns, tokens, groups = (np.array([each[place] for each in requests], np.int64) for place in range(3))
    peaks = modelquota.tuning.tally._Peaks()
    for start in range(0, len(requests), size):
        part = slice(start, start + size)
        peaks.add(Requests(times_ns[part], tokens[part], groups[part]), 3)
    found = peaks.peaks(3)
    for group in range(3):
        own = [request for request in requests if request[2] == group]
        seconds = [[each for each in own if at <= each[0] < at + SECOND] for at, _, _ in own]
        assert found[0][group] == max(map(len, seconds), default=0)
        assert found[1][group] == max((sum(each[1] for each in second) for second in seconds), default=0)


def test_memory_does_not_grow_with_the_trace(monkeypatch):
    monkeypatch.setattr(modelquota.tuning.tally, "MOST_VALUES", 1_000)
    quotas = {
        "m": unlimited("m", max_requests_per_second=20, burst_requests=9, on_violation="queue", grace_period_sec=5)
    }
    size = 1_000

    def peak(parts):
        rng = np.random.default_rng(5)
        run = Replay(quotas, wait=True)
        at_ns = 0
        tracemalloc.start()
        for _ in range(parts):
            times_ns = at_ns + np.cumsum(rng.integers(1, SECOND // 11, size))
            at_ns = int(times_ns[-1])
            tokens = rng.integers(1, 100, size)
            run.feed(made(times_ns, tokens))
        (model,) = run.report().models
        assert model.waited > size * parts // 20
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(1)
    more_bytes = peak(40) - peak(8)
    # One column of the rows would take 8 bytes a row. Values of waits that are new are rounded, and then rare.
    assert more_bytes / (32 * size) < 4
