"""The command line: what it prints and where, its exit codes, a message, not a traceback, for every mistake."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import modelquota
import modelquota.cli.traces
import modelquota.cli.tuning
from modelquota.cli import main
from modelquota.cli.app import app
from modelquota.cli.format import duration, printable, short
from modelquota.tuning.replay import ReplayReport

QUOTAS = """
[models.llama]
max_tokens_per_hour = 100
max_requests_per_second = 2
burst_requests = 0
on_violation = "reject"
"""
TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:00.0000000,30,10
2023-11-16 18:17:00.1000000,30,10
2023-11-16 18:17:00.2000000,3,1
2023-11-16 18:17:05.0000000,200,1
"""
NOTE = "modelquota: note: trace.csv: read as Azure CSV, timestamps\n"


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    Path("quotas.toml").write_text(QUOTAS)
    Path("trace.csv").write_text(TRACE)
    return tmp_path


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_replay_prints_a_report(files):
    outcome = run("replay", "trace.csv", "--quotas", "quotas.toml")
    assert outcome.exit_code == 0
    assert outcome.stderr == NOTE
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert lines[:2] == ["trace.csv", "4 requests in 5.0 s"]
    assert "llama" in lines
    assert "requests 4 2 50.0 % 2 of 3 1 requests/second" in lines
    assert "tokens 285 80 28.1 % 80 of 201 1 tokens/hour" in lines
    assert any(line.startswith("1 whatever the wait") for line in lines)
    assert re.fullmatch(r"Decided in [0-9.,]+ ms\.", lines[-1]), "no time a request, of so few"
    assert max(map(len, outcome.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("requests", "core_time_ns", "says"),
    [
        (999, 18_531_900, "Decided in 18.53 ms."),
        (1_000, 85_400, "Decided in 0.09 ms, 85 ns a request."),
        (1_000_000, 1_234_567_890, "Decided in 1,234.57 ms, 1,235 ns a request."),
    ],
)
def test_replay_says_the_time_of_a_request_where_it_means_something(requests, core_time_ns, says):
    report = ReplayReport("t.csv", requests, 10**9, 1.0, False, 0, core_time_ns, 0, None, (), ())
    console = Console(file=io.StringIO(), width=80)
    modelquota.cli.tuning.print_report(report, console)
    assert console.file.getvalue().splitlines()[-1] == says


def test_replay_at_another_speed(files):
    outcome = run("replay", "trace.csv", "-q", "quotas.toml", "--speed", "2.5")
    assert "4 requests in 2.0 s, played 2.5 times as fast as they came" in outcome.stdout


def test_replay_as_json(files):
    outcome = run("replay", "trace.csv", "--quotas", "quotas.toml", "--json")
    assert outcome.exit_code == 0
    report = json.loads(outcome.stdout)
    assert (report["trace"], report["requests"], report["duration_ns"]) == ("trace.csv", 4, 5_000_000_000)
    (model,) = report["models"]
    assert (model["model_id"], model["admitted"], model["tokens_admitted"]) == ("llama", 2, 80)
    assert {limit: count for limit, count in model["denied"].items() if count} == {
        "requests_per_second": 1,
        "tokens_per_hour": 1,
    }


def test_every_key_of_the_json_is_in_the_help(files):
    report = json.loads(run("replay", "trace.csv", "--quotas", "quotas.toml", "--json").stdout)
    text = run("replay", "--help").stdout
    for key in [*report, *report["models"][0]]:
        assert key in text


def test_replay_charges_the_model_that_is_named(files):
    Path("quotas.toml").write_text(QUOTAS + "[models.qwen]\n")
    outcome = run("replay", "trace.csv", "--quotas", "quotas.toml", "--model", "qwen", "--json")
    assert [model["model_id"] for model in json.loads(outcome.stdout)["models"]] == ["qwen"]


def test_rows_out_of_order_are_mentioned_on_stderr(files):
    first, *rows = TRACE.splitlines(keepends=True)
    Path("trace.csv").write_text(first + "".join(reversed(rows)))
    outcome = run("replay", "trace.csv", "--quotas", "quotas.toml", "--json")
    assert outcome.exit_code == 0
    assert json.loads(outcome.stdout)["out_of_order"] == 3
    assert "3 rows of the trace were out of order and have been sorted by time" in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["replay", "none.csv", "-q", "quotas.toml"], "modelquota: error: none.csv: No such file or directory"),
        (["replay", ".", "-q", "quotas.toml"], "modelquota: error: .: Is a directory"),
        (["replay", "trace.csv", "-q", "none.toml"], "modelquota: error: none.toml: No such file or directory"),
        (
            ["replay", "quotas.toml", "-q", "quotas.toml"],
            "modelquota: error: quotas.toml: line 2: columns '[models.llama]' are of",
        ),
        (
            ["replay", "bad.csv", "-q", "quotas.toml"],
            "error: bad.csv: line 6: column GeneratedTokens: expected",
        ),
        (["replay", "trace.csv", "-q", "trace.csv"], "modelquota: error: trace.csv: "),
        (
            ["replay", "trace.csv", "-q", "bad.toml"],
            'bad.toml: line 7: [models."llama"]: max_ram_mb=-1 is not accepted',
        ),
        (["replay", "trace.csv", "-q", "two.toml"], "say which model to charge ('llama', 'qwen')"),
        (["replay", "trace.csv", "-q", "quotas.toml", "-m", "x"], "no quota for 'x'; add it to the quotas"),
        (["replay", "trace.csv", "-q", "quotas.toml", "-s", "0"], "speed is 0.0; expected above 0"),
        (["replay", "trace.csv", "-q", "quotas.toml", "-s", "fast"], "--speed"),
        (["replay", "trace.csv"], "--quotas"),
        (["replay"], "TRACE"),
        (["reply"], "reply"),
        (["--unknown"], "--unknown"),
        (["demo", "--seconds", "0"], "--seconds"),
        (["demo", "--threads", "0"], "--threads"),
    ],
)
def test_unusable_input_is_one_message_and_exit_code_2(files, capsys, arguments, says):
    Path("bad.csv").write_text(TRACE + "2023-11-16 18:17:06.0000000,1,two\n")
    Path("bad.toml").write_text(QUOTAS + "max_ram_mb = -1\n")
    Path("two.toml").write_text(QUOTAS + "[models.qwen]\n")
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert says in printed.err
    assert "Traceback" not in printed.err


def test_names_cannot_command_the_terminal(files, capsys):
    Path("quotas.toml").write_text('[models."\\u001b[2J[red]x"]\n')
    assert main(["replay", "trace.csv", "-q", "quotas.toml"]) == 0
    printed = capsys.readouterr().out
    assert "?[2J[red]x" in printed
    assert "\x1b" not in printed


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"modelquota {modelquota.__version__}\n"
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "replay" in text
    assert "demo" in text


def test_long_traces_show_their_progress_on_a_terminal(files, monkeypatch):
    monkeypatch.setattr(modelquota.cli.traces, "PROGRESS_FROM_BYTES", 0)
    for is_terminal in (True, False):
        errors = Console(file=io.StringIO(), force_terminal=is_terminal, width=80)
        with modelquota.cli.traces.shown_progress("trace.csv", errors) as progress:
            for task in ("reading the trace", "replaying it"):
                progress(task)(5, 10)
        printed = errors.file.getvalue()  # type: ignore[attr-defined]
        assert ("reading the trace" in printed) is is_terminal
        assert ("replaying it" in printed) is is_terminal
        assert bool(printed) is is_terminal


def in_a_process(*arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments], capture_output=True, text=True, timeout=120, **settings
    )


def test_python_m_modelquota(files):
    done = in_a_process("-m", "modelquota", "replay", "trace.csv", "--quotas", "quotas.toml", "--json")
    assert (done.returncode, done.stderr) == (0, NOTE)
    assert json.loads(done.stdout)["requests"] == 4
    done = in_a_process("-m", "modelquota", "replay", "none.csv", "--quotas", "quotas.toml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "modelquota: error: none.csv: No such file or directory\n"


def test_names_beyond_the_encoding_of_stdout(files):
    Path("quotas.toml").write_text('[models."モデル"]\n', encoding="utf-8")
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = in_a_process("-m", "modelquota", "replay", "trace.csv", "--quotas", "quotas.toml", env=env)
    assert (done.returncode, done.stderr) == (0, NOTE)
    assert "4 requests" in done.stdout


def test_violations_are_not_logged_over_the_report(files):
    Path("quotas.toml").write_text(QUOTAS.replace("reject", "warn"))
    code = "import logging; logging.basicConfig(level=0); from modelquota.cli import main; raise SystemExit(main())"
    done = in_a_process("-c", code, "replay", "trace.csv", "--quotas", "quotas.toml")
    assert (done.returncode, done.stderr) == (0, NOTE)
    assert "2 warned" in done.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_the_extra_it_says_what_to_install(missing):
    done = in_a_process("-c", f"import sys; sys.modules[{missing!r}] = None; import modelquota.__main__ as m; m.main()")
    assert done.returncode == 0
    assert done.stderr == "modelquota's command line needs the extra 'cli': pip install 'modelquota[cli]'\n"
    done = in_a_process(
        "-c", f"import sys; sys.modules[{missing!r}] = None; from modelquota.cli import main; sys.exit(main())"
    )
    assert done.returncode == 2


def test_import_brings_along_only_what_it_needs():
    slow = {"asyncio", "decimal", "difflib", "hashlib", "logging", "tomllib"}
    code = (
        f"import sys, numpy; numpys = set(sys.modules); import modelquota; print(*({slow} & set(sys.modules)) - numpys)"
    )
    done = in_a_process("-c", code)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_the_library_does_not_import_the_extra():
    code = "import sys, modelquota, modelquota.tuning.replay; assert not {'rich', 'typer'} & set(sys.modules)"
    assert in_a_process("-c", code).returncode == 0


def test_a_reader_that_goes_away_is_no_traceback(files):
    command = [sys.executable, "-m", "modelquota", "replay", "trace.csv", "--quotas", "quotas.toml", "--json"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as stdout:
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "0 ms"), (999.4, "999 ms"), (1_000, "1.0 s"), (59_949, "59.9 s"), (59_960, "1 min 00 s"),
        (3_588_000, "59 min 48 s"), (3_600_000, "60 min 00 s"), (7_200_000, "2 h 00 min"), (86_400_000, "24 h 00 min"),
        (10 * 86_400_000, "10 days"),
    ],
)  # fmt: skip
def test_durations(ms, text):
    assert duration(ms) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1_000, "1k"), (1_250, "1.2k"), (99_949, "99.9k"), (99_960, "100k"), (999_600, "1M"),
     (18_305_870, "18.3M"), (10**12, "1T"), (10**18, "1000P")],
)  # fmt: skip
def test_short_counts(count, text):
    assert short(count) == text


def test_printable():
    assert printable("a\x1b\n\udc80ä") == "a???ä"
