"""The ledger: every request is in the file or counted as lost, whatever writes, rotates, forks, fills or kills."""

import asyncio
import contextlib
import gzip
import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import modelquota.monitoring.ledger
from modelquota import ManualClock, QuotaExceededError, ResourceQuotaManager, TraceError
from modelquota.cli.app import app
from modelquota.monitoring.ledger import Ledger
from modelquota.monitoring.ledger.file import LedgerFile
from modelquota.monitoring.ledger.line import request_line
from modelquota.tuning.trace import read_trace
from modelquota.tuning.usage import KEYS, read_usage

NOON_US = 1_700_049_600_000_000  # 2023-11-15T12:00:00Z


@pytest.fixture
def path(tmp_path):
    return tmp_path / "usage.jsonl"


def lines_of(folder: Path):
    """All lines of a ledger and of the files that it has put away, in the order of their files."""
    return [json.loads(line) for file in sorted(folder.glob("usage*.jsonl")) for line in file.read_bytes().splitlines()]


def requests_of(folder: Path):
    return [line for line in lines_of(folder) if "ids" in line]


def test_what_a_line_says(path):
    with Ledger(path) as ledger:
        assert ledger.record(["acme", "llama"], (100, 20, 50), SimpleNamespace(input=90, cached=30, output=7),
                             time_us=NOON_US, waited_us=5, duration_us=900, priority=-3, request_id="r-1")  # fmt: skip
        assert ledger.record("llama", 70, verdict="denied", limit="tokens_per_hour", time_us=NOON_US + 1)
        ledger.record(("qwen",), 5, 6)
    started, first, second, third, ended = lines_of(path.parent)
    assert (started["ledger"], started["pid"]) == (1, os.getpid())
    assert first == {
        "time_us": NOON_US, "ids": ["acme", "llama"], "estimated": [100, 20, 50], "settled": [90, 30, 7],
        "verdict": "admitted", "limit": None, "waited_us": 5, "duration_us": 900, "priority": -3, "request_id": "r-1",
    }  # fmt: skip
    assert second == {
        "time_us": NOON_US + 1, "ids": ["llama"], "estimated": 70, "settled": None, "verdict": "denied",
        "limit": "tokens_per_hour", "waited_us": 0, "duration_us": None,
    }  # fmt: skip
    assert abs(third["time_us"] - time.time_ns() // 1_000) < 60_000_000
    assert (ended["written"], ended["lost"], ended["pid"]) == (3, 0, os.getpid())
    assert path.stat().st_mode & 0o777 == 0o600


@given(
    ids=st.lists(st.text(max_size=8), min_size=1, max_size=4),
    tokens=st.integers(0, 10**9) | st.tuples(*[st.integers(0, 10**9)] * 3),
    priority=st.integers(-5, 5),
    request_id=st.none() | st.text(max_size=5),
)
def test_every_line_is_json_of_what_was_given(ids, tokens, priority, request_id):
    line = request_line((5, tuple(ids), tokens, tokens, "warned", None, 6, 7, priority, request_id))
    assert line.endswith("}\n")
    assert line.count("\n") == 1
    read = json.loads(line.encode("utf-8", "backslashreplace"))
    assert read["ids"] == ids
    assert read["estimated"] == read["settled"] == (list(tokens) if isinstance(tokens, tuple) else tokens)
    assert read.get("priority", 0) == priority
    assert read.get("request_id") == request_id


def test_what_does_not_fit_is_lost_and_counted(path, monkeypatch):
    monkeypatch.setattr(modelquota.monitoring.ledger.writer, "FLUSH_SECONDS", 3600)
    ledger = Ledger(path, buffer_size=5)
    ledger._wake_at = 100  # or the writer would make room
    results = [ledger.record("llama", n) for n in range(8)]
    assert results == [True] * 5 + [False] * 3
    assert ledger.lost == 3
    ledger.close()
    assert ledger.record("llama", 9) is False
    assert [line["estimated"] for line in requests_of(path.parent)] == [0, 1, 2, 3, 4]
    (lost,) = (line for line in lines_of(path.parent) if "lost" in line and "written" not in line)
    assert lost["lost"] == 3
    assert read_usage([path]).lost == 3


def test_threads_lose_nothing(path):
    with Ledger(path, buffer_size=1 << 20) as ledger:
        threads = [
            threading.Thread(target=lambda name=name: [ledger.record(name, n) for n in range(2_000)])
            for name in "abcdef"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (ledger.written, ledger.lost) == (12_000, 0)
    for name in "abcdef":
        own = [line["estimated"] for line in requests_of(path.parent) if line["ids"] == [name]]
        assert own == list(range(2_000))


def test_a_slow_disk_loses_what_it_counts(path, monkeypatch):
    append = LedgerFile.append
    monkeypatch.setattr(LedgerFile, "append", lambda self, data: (time.sleep(0.02), append(self, data))[1])
    with Ledger(path, buffer_size=50) as ledger:
        admitted = sum(ledger.record("m", n) for n in range(20_000))
    assert ledger.lost > 0
    assert (ledger.written, ledger.lost) == (admitted, 20_000 - admitted)
    assert len(requests_of(path.parent)) == admitted
    assert (
        sum(line["lost"] for line in lines_of(path.parent) if "lost" in line and "written" not in line) == ledger.lost
    )


def test_what_the_disk_refuses_is_lost_and_counted(path):
    """A file size limit, as a full disk, lets a part of a write through: no line is written and counted as lost."""
    code = f"""
import resource, signal
from modelquota.monitoring.ledger import Ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger({str(path)!r}, max_bytes=None)
for n in range(500):
    ledger.record("m", n)
ledger.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 100_000))
for n in range(2000):
    ledger.record("m", n)
    if n % 100 == 0:
        ledger.flush()
ledger.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
ledger.record("last", 5)
ledger.close()
print(ledger.written, ledger.lost)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    written, lost = map(int, done.stdout.split())
    assert lost > 0
    assert written + lost == 2501
    found = requests_of(path.parent)
    assert len(found) == written
    assert found[-1]["ids"] == ["last"]
    assert "has lost" in done.stderr
    assert read_usage([path]).lost == lost


def test_rotation_by_size_and_day(path, monkeypatch):
    now = [NOON_US]
    monkeypatch.setattr(modelquota.monitoring.ledger.file, "now_us", lambda: now[0])
    with Ledger(path, max_bytes=2_000) as ledger:
        ledger._file._day = NOON_US // 86_400_000_000
        for n in range(60):
            ledger.record("m", n)
            ledger.flush()
            now[0] += 1
        by_size = list(path.parent.glob("usage-20231115T120000.*.jsonl"))
        assert len(by_size) > 3
        assert all(file.stat().st_size < 2_300 for file in by_size)
        ledger._file._day = NOON_US // 86_400_000_000
        now[0] += 86_400_000_000
        ledger.record("m", 60)
        ledger.flush()
        assert list(path.parent.glob("usage-20231116T120000.*.jsonl"))
    assert [line["estimated"] for line in requests_of(path.parent)] != []
    assert Counter(line["estimated"] for line in requests_of(path.parent)) == Counter(range(61))
    report = read_usage(sorted(path.parent.glob("usage*.jsonl")))
    assert (report.total.requests, report.killed, report.lost) == (61, 0, 0)
    for file in path.parent.glob("usage*.jsonl"):
        with contextlib.suppress(TraceError):  # a file without requests is not a trace
            assert read_trace(file).format.startswith("a modelquota ledger")


def test_a_file_that_was_taken_away_is_begun_again(path):
    with Ledger(path) as ledger:
        ledger.record("m", 1)
        ledger.flush()
        os.rename(path, path.parent / "usage-by-hand.jsonl")
        ledger.record("m", 2)
        ledger.flush()
        path.unlink()
        ledger.record("m", 3)
    assert [line["estimated"] for line in requests_of(path.parent)] == [1, 3]
    assert json.loads(path.read_bytes().splitlines()[0])["continued_us"] > 0
    assert read_trace(path).tokens.tolist() == [3]


def test_many_processes_write_one_file_while_it_is_rotated(path):
    code = f"""
import os, sys
from modelquota.monitoring.ledger import Ledger
with Ledger({str(path)!r}, max_bytes=20_000) as ledger:
    for n in range(3_000):
        ledger.record(sys.argv[1], n)
        if n % 50 == 0:
            ledger.flush()
assert (ledger.written, ledger.lost) == (3_000, 0)
"""
    running = [subprocess.Popen([sys.executable, "-c", code, name]) for name in "abc"]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    found = requests_of(path.parent)
    for name in "abc":
        assert Counter(line["estimated"] for line in found if line["ids"] == [name]) == Counter(range(3_000))
    files = list(path.parent.glob("usage*.jsonl"))
    assert len(files) > 5
    assert read_usage(files).killed == 0


def test_a_forked_child_writes_its_own_requests(path):
    ledger = Ledger(path)
    ledger.record("parent", 1)
    child = os.fork()
    if not child:
        code = 1
        try:
            ledger.record("child", 2)
            ledger.close()
            code = 0 if (ledger.written, ledger.lost) == (1, 0) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    ledger.record("parent", 3)
    ledger.close()
    assert sorted((line["ids"][0], line["estimated"]) for line in requests_of(path.parent)) == [
        ("child", 2), ("parent", 1), ("parent", 3),
    ]  # fmt: skip


def test_a_program_that_does_not_close_loses_nothing(path):
    code = f"""
from modelquota.monitoring.ledger import Ledger
ledger = Ledger({str(path)!r})
for n in range(5_000):
    ledger.record("m", n)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
    assert [line["estimated"] for line in requests_of(path.parent)] == list(range(5_000))
    assert lines_of(path.parent)[-1]["written"] == 5_000
    assert read_usage([path]).killed == 0


def test_requests_that_come_while_it_closes_are_written_or_lost(path):
    for _ in range(2):
        ledger = Ledger(path, buffer_size=2_000)
        counts = []

        def run(ledger=ledger, counts=counts):
            done = 0
            while not ledger._closing or done % 100:  # and some more after it has begun to close
                ledger.record("m", done)
                done += 1
            counts.append(done)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(0.01)
        ledger.close()
        for thread in threads:
            thread.join()
        assert ledger.written + ledger.lost == sum(counts)
    assert read_usage([path]).killed == 0


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_after_a_kill_the_file_is_valid_and_what_is_missing_is_said(path, cut):
    """Killed while it writes: all flushed requests are there; a line that is cut off is skipped, and said."""
    code = f"""
import itertools
from modelquota.monitoring.ledger import Ledger
ledger = Ledger({str(path)!r})
for n in itertools.count():
    if ledger.record("m", n, n) and n % 1000 == 0:
        ledger.flush()
        print(n, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    flushed = [int(process.stdout.readline()) for _ in range(5)][-1]
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    process.stdout.close()
    found = requests_of(path.parent)
    assert [line["estimated"] for line in found] == list(range(len(found)))
    assert len(found) > flushed
    report = read_usage([path])
    assert (report.total.requests, report.torn, report.killed) == (len(found), 0, 1)
    with open(path, "r+b") as file:  # a write that the machine did not finish
        file.truncate(path.stat().st_size - cut)
    torn = read_usage([path])
    assert (torn.total.requests, torn.torn) == ((len(found), 0) if cut == 1 else (len(found) - 1, 1))
    with Ledger(path) as ledger:
        ledger.record("next", 5)
    after = read_usage([path])
    assert (after.total.requests, after.torn, after.killed) == (torn.total.requests + 1, torn.torn, 1)
    trace = read_trace(path)
    assert len(trace) == after.total.requests
    assert bool(trace.notes) is (cut > 1)
    outcome = CliRunner().invoke(app, ["usage", str(path)])
    assert ("1 lines were cut off" in outcome.stderr) is (cut > 1)
    assert "1 processes have not ended in order" in outcome.stderr


def test_a_damaged_line_is_an_error(path):
    path.write_text('{"ledger": 1, "started_us": 5, "pid": 1}\n{"time_us": 5, ids}\n')
    with pytest.raises(TraceError, match="line 2: not a JSON object"):
        read_usage([path])
    path.write_text('{"some": "thing"}\n')
    with pytest.raises(TraceError, match="line 1: not a line of a ledger"):
        read_usage([path])
    path.write_text('{"time_us": 5, "ids": ["m"], "estimated": "x"}\n')
    with pytest.raises(TraceError, match="line 1: not a request of a ledger"):
        read_usage([path])


def test_grants_are_recorded_when_they_end(path):
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota("llama", max_tokens_per_hour=500, on_violation="reject")
    manager.set_quota("acme")
    with manager.ledger(path) as ledger:
        with ledger.acquire(["acme", "llama"], 300, priority=2) as grant:
            grant.settle(120)
        with pytest.raises(QuotaExceededError), ledger.acquire("llama", 400):
            pass
        with contextlib.suppress(ZeroDivisionError), ledger.acquire("llama", 50):
            raise ZeroDivisionError

        async def main():
            async with ledger.acquire_async("llama", 60) as grant:
                grant.add(7)
            with pytest.raises(QuotaExceededError):
                async with ledger.acquire_async("llama", 450):
                    pass

        asyncio.run(main())
        ledger.flush()
        assert (ledger.written, ledger.lost) == (5, 0)
    found = requests_of(path.parent)
    assert [(line["ids"], line["estimated"], line["settled"], line["verdict"], line["limit"]) for line in found] == [
        (["acme", "llama"], 300, 120, "admitted", None),
        (["llama"], 400, None, "denied", "tokens_per_hour"),
        (["llama"], 50, 0, "admitted", None),
        (["llama"], 60, 7, "admitted", None),
        (["llama"], 450, None, "denied", "tokens_per_hour"),
    ]
    assert found[0]["priority"] == 2
    assert found[0]["duration_us"] >= 0
    assert all(abs(line["time_us"] - time.time_ns() // 1_000) < 60_000_000 for line in found)
    with manager.reserve("llama", 1):  # the ledger is closed, and the manager is not
        pass


def test_the_line_of_a_grant_has_its_times(path):
    manager = ResourceQuotaManager()
    manager.set_quota("m", max_concurrent_requests=1, on_violation="queue")
    with manager.ledger(path) as ledger:
        held = manager.reserve("m", 1)
        threading.Timer(0.05, held.release).start()
        before_us = time.time_ns() // 1_000
        with ledger.acquire("m", 5):
            admitted_us = time.time_ns() // 1_000
            time.sleep(0.02)
        ended_us = time.time_ns() // 1_000
    (line,) = requests_of(path.parent)
    assert before_us - 1_000 <= line["time_us"] <= ended_us - 70_000
    assert 45_000 <= line["waited_us"] <= admitted_us - before_us + 1_000
    assert 20_000 <= line["duration_us"] <= ended_us - admitted_us + 1_000


@pytest.mark.parametrize(
    "how", [{"on_violation": "warn"}, {"on_violation": "reject", "shadow_limits": ["tokens_per_hour"]}]
)
def test_what_was_admitted_over_a_limit_is_warned(path, how):
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota("llama", max_tokens_per_hour=500, **how)
    with manager.ledger(path) as ledger:
        for tokens in (400, 200):
            with ledger.acquire("llama", tokens):
                pass
        with ledger.acquire("unknown", 5) as grant:
            assert grant.over_limit is None
    assert [(line["verdict"], line["limit"]) for line in requests_of(path.parent)] == [
        ("admitted", None), ("warned", "tokens_per_hour"), ("admitted", None),
    ]  # fmt: skip
    assert read_usage([path], ["verdict"]).groups[("warned",)].tokens == 200


def test_the_ledger_of_a_manager_takes_what_a_ledger_takes():
    ours, theirs = (inspect.signature(of).parameters for of in (ResourceQuotaManager.ledger, Ledger))
    assert {name: (p.kind, p.default) for name, p in ours.items() if name != "self"} == {
        name: (p.kind, p.default) for name, p in theirs.items()
    }


def test_what_cannot_be_written_is_lost_and_said(path, caplog):
    with Ledger(path) as ledger:
        ledger.record("m", "many")
        ledger.record(5, 5)
        ledger.record("m", 7)
        ledger.flush()
    assert (ledger.written, ledger.lost) == (1, 2)
    assert "cannot write a request" in caplog.text


@pytest.mark.parametrize(
    ("how", "says"), [({"buffer_size": 0}, "buffer_size is 0"), ({"max_bytes": 0}, "max_bytes is 0")]
)
def test_parameters_out_of_range(path, how, says):
    with pytest.raises(ValueError, match=says):
        Ledger(path, **how)
    with pytest.raises(FileNotFoundError):
        Ledger(path / "no" / "where.jsonl")


def test_the_ledger_of_the_environment(path, monkeypatch):
    monkeypatch.delenv("MODELQUOTA_LEDGER", raising=False)
    assert Ledger.from_environment() is None
    monkeypatch.setenv("MODELQUOTA_LEDGER", str(path))
    with Ledger.from_environment() as ledger:
        assert ledger.path == str(path)


# -- usage


@pytest.fixture
def ledger(path):
    with Ledger(path) as ledger:
        for n in range(10):
            tenant = "acme" if n % 2 else "zeta"
            day_us = 86_400_000_000 * (n // 5)
            ledger.record((tenant, f"{tenant}/bob", "llama"), (100, 0, 50), (60, 40, n), time_us=NOON_US + day_us,
                          duration_us=1_000, waited_us=500)  # fmt: skip
        ledger.record("qwen", 70, 30, time_us=NOON_US)
        ledger.record("qwen", 70, verdict="denied", limit="requests_per_hour", time_us=NOON_US)
    return path


def test_usage_by_tenant_and_day(ledger):
    report = read_usage([ledger], ["tenant", "day"])
    assert list(report.groups) == [
        ("", "2023-11-15"), ("acme", "2023-11-15"), ("acme", "2023-11-16"), ("zeta", "2023-11-15"),
        ("zeta", "2023-11-16"),
    ]  # fmt: skip
    acme = report.groups["acme", "2023-11-16"]
    assert (acme.requests, acme.input, acme.cached, acme.output) == (3, 180, 120, 5 + 7 + 9)
    assert (acme.tokens, acme.waited_us, acme.duration_us) == (321, 1_500, 3_000)
    untold = report.groups["", "2023-11-15"]
    assert (untold.requests, untold.admitted, untold.denied, untold.tokens, untold.input) == (2, 1, 1, 30, 0)
    assert report.total.requests == 12
    assert sum(usage.tokens for usage in report.groups.values()) == report.total.tokens
    for key in KEYS:
        assert sum(usage.requests for usage in read_usage([ledger], [key]).groups.values()) == 12
    with pytest.raises(ValueError, match="usage is summed by 'week'; expected one of model, user"):
        read_usage([ledger], ["week"])


def test_the_command_usage(ledger, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "100")
    outcome = CliRunner().invoke(app, ["usage", str(ledger), "--by", "tenant", "--by", "limit"])
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    rows = [line.split() for line in outcome.stdout.splitlines()]
    assert rows[0] == ["tenant", "limit", "requests", "denied", "input", "cached", "output", "tokens", "waited"]
    assert ["-", "requests_per_hour", "1", "1", "0", "0", "0", "0", "-"] in rows
    assert any(row[:2] == ["total", "12"] for row in rows)
    report = json.loads(CliRunner().invoke(app, ["usage", str(ledger), "--json"]).stdout)
    assert [group["model"] for group in report["groups"]] == ["llama", "qwen"]
    text = CliRunner().invoke(app, ["usage", "--help"]).stdout
    for key in [*report, *report["groups"][0]]:
        assert key in text
    packed = tmp_path / "old.jsonl.gz"
    packed.write_bytes(gzip.compress(ledger.read_bytes()))
    table = CliRunner().invoke(app, ["usage", str(ledger), str(packed), "--csv"]).stdout.splitlines()
    assert table[0] == "model,requests,admitted,denied,input,cached,output,tokens,waited_us,duration_us"
    assert table[1].startswith("llama,20,20,0,1200,800,90,")
    assert CliRunner().invoke(app, ["usage", "none.jsonl"]).exit_code == 2
    assert "summed by 'week'" in CliRunner().invoke(app, ["usage", str(ledger), "--by", "week"]).stderr


def test_a_ledger_is_a_trace(ledger):
    trace = read_trace(ledger)
    assert len(trace) == 12
    assert trace.ignored == ()
    assert set(trace.models) == {"llama", "qwen"}
    assert set(trace.users) == {"acme/bob", "zeta/bob"}
    assert int(trace.tokens.sum()) == read_usage([ledger]).total.tokens + 70  # what was denied was asked for
    assert trace.start_unix_ns == NOON_US * 1_000
