"""`modelquota replay` of a trace that is longer than what is held of it: the report of the whole, or what to do."""

import contextlib
import functools
import gzip
import json
import os
import threading
from pathlib import Path

import pytest
from typer.testing import CliRunner

import modelquota.cli.traces
import modelquota.tuning.source
from modelquota.cli.app import app
from modelquota.tuning.trace import TraceStream

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens,Model,User\n"
QUOTAS = """
[models.a]
max_tokens_per_second = 40
burst_tokens = 30
on_violation = "queue"
grace_period_sec = 2
[models.b]
max_requests_per_second = 1
on_violation = "reject"
[defaults."user:*"]
max_requests_per_minute = 30
on_violation = "throttle"
"""


NOT_SORTED = "the trace is not sorted by time: this row is earlier than rows far above it"


def rows(seconds) -> str:
    lines = []
    for row, at in enumerate(seconds):
        time = f"2023-11-16 18:{int(at) // 60:02}:{int(at) % 60:02}.{row % 10}"
        lines.append(f"{time},{row % 50},{row % 9},{'ab'[row % 7 == 3]},u{row % 5}\n")
    return HEADER + "".join(lines)


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quotas.toml").write_text(QUOTAS)
    Path("tuned.toml").write_text(QUOTAS.replace("= 40", "= 90"))
    Path("sorted.csv").write_text(rows(row / 2 for row in range(400)))
    Path("sorted.csv.gz").write_bytes(gzip.compress(Path("sorted.csv").read_bytes()))
    Path("near.csv").write_text(rows(row / 2 + 4 * (row % 3) for row in range(400)))
    Path("unsorted.csv").write_text(rows((399 - row) / 2 for row in range(400)))
    return tmp_path


@pytest.fixture
def small(monkeypatch):
    """Parts of some 10 rows, of which some 30 are held back."""

    def cut():
        monkeypatch.setattr(modelquota.tuning.source, "BLOCK_BYTES", 256)
        stream = functools.partial(TraceStream, part_rows=10, held_rows=30)
        monkeypatch.setattr(modelquota.cli.traces, "TraceStream", stream)

    return cut


def run(*arguments: str, input: bytes | None = None):
    return CliRunner().invoke(app, ["replay", *arguments], input=input)


def reports(outcome) -> list[dict]:
    assert outcome.exit_code == 0, outcome.stderr
    found = json.loads(outcome.stdout)
    found = found.get("replays", [found])
    for report in found:
        del report["core_time_ns"], report["trace"]
    return found


@pytest.mark.parametrize("trace", ["sorted.csv", "sorted.csv.gz", "near.csv", "-"])
@pytest.mark.parametrize("options", [[], ["--per", "user"], ["--ttft", "300", "--tpot", "90"], ["-q", "tuned.toml"]])
def test_the_report_of_a_stream_is_that_of_the_whole(files, small, trace, options):
    arguments = [trace, "-q", "quotas.toml", *options, "--json"]
    data = Path("sorted.csv").read_bytes() if trace == "-" else None
    whole = run(*arguments, input=data)
    small()
    parts = run(*arguments, input=data)
    assert reports(parts) == reports(whole)
    assert sorted(parts.stderr.splitlines()) == sorted(whole.stderr.splitlines())
    assert ("out of order" in parts.stderr) == (trace == "near.csv")
    assert reports(parts)[0]["models"][0]["waited"] > 50
    table = run(*arguments[:-1], input=data)
    assert table.exit_code == 0
    assert "400 requests in" in table.stdout


def test_a_file_that_is_not_sorted_is_read_as_a_whole(files, small):
    whole = run("unsorted.csv", "-q", "quotas.toml", "--json")
    small()
    outcome = run("unsorted.csv", "-q", "quotas.toml", "--json")
    assert reports(outcome) == reports(whole)
    notes = outcome.stderr.splitlines()
    (again,) = [note for note in notes if "again" in note]
    assert again.startswith("modelquota: note: unsorted.csv: line 4")
    assert again.endswith(f": {NOT_SORTED}; the trace is read again, as a whole")
    assert [note for note in notes if note != again] == whole.stderr.splitlines()


def test_what_is_not_sorted_and_cannot_be_read_again_is_refused(files, small):
    data = Path("unsorted.csv").read_bytes()
    assert run("-", "-q", "quotas.toml", input=data).exit_code == 0, "it is not longer than what is held back"
    small()
    outcome = run("-", "-q", "quotas.toml", "--json", input=data)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    error = outcome.stderr.splitlines()[-1]
    assert error.startswith("modelquota: error: standard input: line 4")
    assert error.endswith(f": {NOT_SORTED}; save the trace as a file, which can be read as a whole")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_is_not_read_again(files, small):
    small()
    os.mkfifo("pipe")

    def write():
        with contextlib.suppress(BrokenPipeError):
            Path("pipe").write_bytes(Path("unsorted.csv").read_bytes())

    writer = threading.Thread(target=write)
    writer.start()
    outcome = run("pipe", "-q", "quotas.toml", "--json")
    writer.join(timeout=30)
    assert not writer.is_alive()
    assert outcome.exit_code == 2
    assert "pipe: line 4" in outcome.stderr
    assert "save the trace as a file" in outcome.stderr
