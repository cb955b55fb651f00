"""The commands over a manager: what they print and change, their exit codes, and the live screen on a real terminal."""

import ast
import contextlib
import fcntl
import io
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import textwrap
import threading
import time
import urllib.request

import pyte
import pytest
import typer
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text
from typer.testing import CliRunner

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cli.manage import add_commands
from modelquota.cli.status import WIDE_COLUMNS, print_status, print_status_json
from modelquota.cli.top import Top, run_top


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12), max_models=4)
    manager.set_quota("idle")
    manager.set_quota("full", max_ram_mb=1000, max_ssd_mb=None, on_violation="reject")
    manager.set_quota(
        "busy", max_requests_per_second=10, burst_requests=10, max_requests_per_hour=15, on_violation="warn"
    )
    manager.update_memory_usage("full", 900, 5)
    for _ in range(16):
        manager.check_quota("busy", 10)
    manager.check_quota("full", 10, ram_needed_mb=200)
    return manager


@pytest.fixture
def run(manager, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    app = typer.Typer()

    @contextlib.contextmanager
    def open_manager(path, trust_file):
        if path.name == "none":
            raise FileNotFoundError(2, "No such file or directory", "none")
        yield manager

    add_commands(app, open_manager, open_manager)
    return lambda *arguments: CliRunner().invoke(app, [*arguments, "--path", "state"])


# -- status


def test_status_has_the_model_nearest_to_a_limit_first(run):
    outcome = run("status")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.stdout.splitlines()]
    assert lines[0] == "model pressure % nearest limit allowed denied"
    assert [line.split()[0] for line in lines[1:4]] == ["full", "idle", "busy"], "busy only warns"
    assert lines[1].endswith("90 900 of 1k MB RAM 0 1")
    assert lines[2].endswith("0 idle 0 0")
    assert lines[3].endswith("107 16 of 15 requests/hour 16 1 warned")
    assert lines[4] == "17 checks, 16 allowed, 1 denied, 1 warned"
    assert max(map(len, outcome.stdout.splitlines())) <= 80


def test_status_has_more_room_on_a_wide_screen(manager):
    console = Console(file=io.StringIO(), width=WIDE_COLUMNS)
    assert print_status(manager, console) == pytest.approx(90)
    heading, full, *_ = console.file.getvalue().splitlines()
    assert all(f"{name} %" in heading for name in ("RAM", "SSD", "tok/h", "req/h", "tok/day", "req/day"))
    assert "-" in full.split()


@pytest.mark.parametrize("width", [60, 79, 80, WIDE_COLUMNS - 1, WIDE_COLUMNS, 200])
def test_no_width_cuts_a_figure(manager, width):
    manager.set_quota("a-name-that-is-much-longer-than-any-column-may-be")
    manager.update_quota("full", on_violation="warn")
    for _ in range(112):
        manager.check_quota("full", 10**6)
    console = Console(file=io.StringIO(), width=width)
    print_status(manager, console)
    heading, *lines = console.file.getvalue().splitlines()
    assert [line[: heading.index("%") + 1].split()[-1] for line in lines[:4]] == ["0", "0", "1018182", "107"]
    assert [line.split()[-2:] for line in lines[:4]] == [["0", "0"], ["0", "0"], ["112", "1"], ["1", "warned"]]
    assert max(map(len, lines)) <= width


def test_who_was_admitted_after_a_wait_is_told_apart_from_who_was_sent_away(manager):
    manager.set_quota("line", max_concurrent_requests=1, on_violation="queue")
    held = manager.reserve("line", 1)
    threading.Timer(0.05, held.release).start()
    manager.acquire("line", 1).release()
    console = Console(file=io.StringIO(), width=80)
    print_status(manager, console)
    assert console.file.getvalue().splitlines()[-1] == ("19 checks, 18 allowed (1 after a wait), 1 denied, 1 warned")


def test_a_rate_is_shown_with_its_burst(manager):
    manager.set_quota("half", max_requests_per_second=0.5, burst_requests=4)
    manager.check_quota("half", 0)
    console = Console(file=io.StringIO(), width=80)
    print_status(manager, console)
    assert "1 of 0.5+4 requests/second" in console.file.getvalue()


def test_a_burst_that_is_not_repaid_is_named(manager):
    manager.set_quota("busy", max_requests_per_second=1, burst_requests=19)
    manager.clock.advance(1.1)
    console = Console(file=io.StringIO(), width=80)
    print_status(manager, console)
    assert "burst: 14 of 19 requests/second" in console.file.getvalue()


def test_status_of_nothing_and_without_enforcement():
    manager = ResourceQuotaManager()
    manager.enforcement_enabled = False
    console = Console(file=io.StringIO(), width=80)
    assert print_status(manager, console) == 0
    assert console.file.getvalue().startswith("no models\n")
    assert "enforcement is off: everything is admitted" in " ".join(console.file.getvalue().split())


def test_status_as_json(run, manager):
    outcome = run("status", "--json")
    document = json.loads(outcome.stdout)
    assert [model["model_id"] for model in document["models"]] == ["full", "idle", "busy"]
    assert [model["denies"] for model in document["models"]] == [True, True, False]
    assert (document["pressure"], document["models"][2]["pressure"]) == (90.0, 106.667)
    full = document["models"][0]
    assert (full["pressure"], full["nearest_limit"], full["percent"]["ram"]) == (90.0, "ram", 90.0)
    assert full["usage"]["rejected_total"] == full["usage"]["ram_violations"] == 1
    assert ResourceQuotaConfig.from_dict(full["quota"]) == manager.get_quota("full")
    assert document["stats"]["total_checks"] == 17
    assert document["enforcing"] is True
    help_text = " ".join(run("status", "--help").stdout.split())
    assert all(key in help_text for key in [*document, *full])


def test_status_answers_a_script_by_its_exit_code(run):
    assert [run("status", "--above", percent).exit_code for percent in ("89", "90", "200")] == [1, 0, 0]
    assert run("status", "--json", "--above", "50").exit_code == 1


# -- changes


def test_set_changes_what_is_named_and_keeps_what_was_used(run, manager):
    outcome = run(
        "set", "busy", "max_ram_mb=5", "max_ssd_mb=unlimited", "max_tokens_per_second=0.5", "on_violation=queue"
    )
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    quota = manager.get_quota("busy")
    assert (quota.max_ram_mb, quota.max_ssd_mb, quota.max_tokens_per_second) == (5, None, 0.5)
    assert (quota.on_violation, quota.max_requests_per_hour) == ("queue", 15)
    assert manager.get_usage("busy").requests_this_hour == 16
    assert "max_ssd_mb = unlimited\n" in outcome.stdout
    assert "on_violation = queue\n" in outcome.stdout
    outcome = run("set", "new", "max_ram_mb=None", "--json")
    assert json.loads(outcome.stdout) == ResourceQuotaConfig("new", max_ram_mb=None).to_dict()
    assert outcome.stderr == "modelquota: new is new; what was not named has its default\n"
    assert manager.list_models()[-1] == "new"


def test_limits_per_minute_and_month_are_set_and_shown(run, manager):
    outcome = run("set", "busy", "max_requests_per_minute=60", "max_tokens_per_month=500", "token_weights=1,0.25,4")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert {"max_requests_per_minute = 60", "max_tokens_per_month = 500", "max_tokens_per_minute = unlimited"} <= {
        *outcome.stdout.splitlines()
    }
    assert manager.get_quota("busy").token_weights == (1, 0.25, 4)
    outcome = run("set", "busy", "cluster_concurrency=True")
    assert "cluster_concurrency = true\n" in outcome.stdout
    assert manager.get_quota("busy").cluster_concurrency is True
    assert run("set", "busy", "cluster_concurrency=yes").exit_code == 2
    manager.update_quota("busy", max_requests_per_second=None, max_requests_per_hour=None)
    for _ in range(57):
        manager.check_quota("busy", 1)
    assert "57 of 60 requests/minute" in run("status").stdout
    models = {model["model_id"]: model for model in json.loads(run("status", "--json").stdout)["models"]}
    assert models["busy"]["usage"]["requests_this_minute"] == 57
    assert models["busy"]["percent"]["requests_per_minute"] == 95.0
    assert models["idle"]["usage"]["requests_this_minute"] is None
    assert "57 / 60 " in manager_status(manager)
    assert "requests/min " in manager_status(manager)


def manager_status(manager):
    text = io.StringIO()
    manager.print_status(file=text)
    return text.getvalue()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["set", "m", "max_ram_mb=-1"],
            2,
            "error: max_ram_mb=-1 is not accepted; expected an integer from 0 to 2**62 MB",
        ),
        (
            ["set", "m", "max_ram=1"],
            2,
            "error: max_ram=1 is not accepted; expected a field of a quota, perhaps max_ram_mb",
        ),
        (["set", "m", "max_ram_mb=lots"], 2, "max_ram_mb='lots' is not accepted"),
        (["set", "m", "max_ram_mb"], 2, "expected field=value, such as max_ram_mb=1024"),
        (["set", "m", "burst_tokens=1.5"], 2, "burst_tokens=1.5 is not accepted"),
        (["set", "m", "max_tokens_per_minute=0.5"], 2, "max_tokens_per_minute=0.5 is not accepted"),
        (["set", "m", "token_weights=1,2"], 2, "token_weights=[1, 2] is not accepted; expected three numbers from 0"),
        (["set", "m", "unit=euro"], 2, "unit='euro' is not accepted; expected one of 'tokens', 'usd'"),
        (["set", "m", "model_id=x", "burst_tokens=1"], 2, "model_id='x' is not accepted"),
        (["set", ""], 2, "model_id='' is not accepted"),
        (["remove", "idle", "nobody"], 1, "error: no quota is set for model 'nobody'"),
        (["reset-burst", "busy", "nobody"], 1, "error: no quota is set for model 'nobody'"),
        (["top"], 2, "error: top needs a terminal; `modelquota status` prints the same once"),
        (["status", "--path", "none"], 2, "error: none: No such file or directory"),
        (["exporter", "--addr", "256.0.0.1"], 2, "error: cannot listen at 256.0.0.1, port 9185: "),
    ],
)
def test_no_is_one_line_and_an_exit_code_and_changes_nothing(manager, run, arguments, code, says):
    before = manager.print_status(file=io.StringIO()), manager.list_models(), manager.get_usage("busy")
    if "--path" in arguments:
        app = typer.Typer()
        outcome = CliRunner().invoke(_failing(app), arguments)
    else:
        outcome = run(*arguments)
    assert outcome.exit_code == code
    assert outcome.stdout == ""
    assert says in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert (manager.print_status(file=io.StringIO()), manager.list_models(), manager.get_usage("busy")) == before


def _failing(app):
    @contextlib.contextmanager
    def open_manager(path, trust_file):
        open(path).close()
        yield ResourceQuotaManager()

    add_commands(app, open_manager, open_manager)
    return app


def test_remove_and_reset_burst(run, manager):
    assert manager.get_usage("busy").burst_requests_used > 0
    assert run("reset-burst", "busy", "full").exit_code == 0
    assert manager.get_usage("busy").burst_requests_used == 0
    assert run("remove", "busy", "idle").exit_code == 0
    assert manager.list_models() == ["full"]


# -- top, on a pseudo-terminal

WATCH = """
    import sys, threading, time
    from rich.console import Console
    from modelquota import ResourceQuotaManager
    from modelquota.cli.top import run_top
    manager = ResourceQuotaManager()
    for i in range(40):
        manager.set_quota(f"model-{i}", max_ram_mb=100)
        manager.update_memory_usage(f"model-{i}", 2 * i, 0)
    def work():
        while True:
            manager.check_quota("model-0", 1)
            time.sleep(0.001)
    threading.Thread(target=work, daemon=True).start()
    run_top(manager, Console(), interval_sec=0.1)
    print("over")
"""


@contextlib.contextmanager
def terminal(columns, lines):
    """A child that shows `top`, and its screen as a terminal draws it."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
    env = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    env |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(WATCH)]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, preexec_fn=heed) as process:
        os.close(theirs)
        screen = pyte.Screen(columns, lines)
        yield process, ours, screen, pyte.ByteStream(screen)
        process.kill()
        os.close(ours)


def draw_until(ours, stream, holds):
    until = time.monotonic() + 60
    seen = b""
    while not holds():
        assert time.monotonic() < until
        if not select.select([ours], [], [], 1)[0]:
            continue
        try:
            data = os.read(ours, 65_536)
        except OSError:
            break
        seen += data
        stream.feed(data)
    return seen


@pytest.mark.parametrize("leave", ["q", "Ctrl-C"])
def test_top_fills_the_screen_and_leaves_it_as_it_was(leave):
    with terminal(80, 20) as (process, ours, screen, stream):
        seen = draw_until(
            ours, stream, lambda: "checks, " in screen.display[-1] and " 0 checks/s" not in screen.display[0]
        )
        rows = [line.rstrip() for line in screen.display]
        assert rows[0].startswith("modelquota top  40 models  ")
        assert rows[0].endswith("q to quit")
        assert rows[2].split() == ["model", "pressure", "%", "nearest", "limit", "allowed", "denied"]
        assert [row.split()[0] for row in rows[3:18]] == [f"model-{i}" for i in range(39, 24, -1)]
        assert "78 of 100 MB RAM" in rows[3]
        assert rows[18] == "and 25 models with less pressure"
        colors = {screen.buffer[y][x].fg for y in range(3, 18) for x in range(80)}
        assert {"green", "brown"} <= colors, "pyte calls yellow brown"
        assert b"\x1b[?1049h" in seen, "a screen of its own"
        if leave == "q":
            os.write(ours, b"xq")
        else:
            process.send_signal(signal.SIGINT)
        rest = draw_until(ours, stream, lambda: False)
        assert process.wait(60) == 0
        assert b"\x1b[?1049l" in rest
        assert b"\x1b[?25h" in rest
        assert rest.endswith(b"over\r\n")


def test_top_for_some_time_and_on_a_small_screen(manager):
    console = Console(file=io.StringIO(), width=60, height=7, force_terminal=True)
    run_top(manager, console, interval_sec=0.01, seconds=0.05)
    console = Console(file=io.StringIO(), width=80, height=7)
    console.print(Top(manager, console).screen())
    text = console.file.getvalue()
    assert "and 1 model with less pressure" in text
    assert len(text.splitlines()) == 7


# -- exporter, completion


def test_exporter_serves_until_it_is_interrupted(tmp_path):
    path = tmp_path / "quota.state"
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("llama", max_tokens_per_hour=1000)
    manager.check_quota("llama", 500)
    command = [sys.executable, "-m", "modelquota", "exporter", "--path", str(path), "--port", "0"]
    heed = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        line = process.stderr.readline()
        assert line.startswith("modelquota: serving http://127.0.0.1:")
        with urllib.request.urlopen(line.split()[-1], timeout=30) as answer:
            assert b'modelquota_model_pressure_ratio{model="llama"} 0.5' in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stderr.read() == ""


def test_exporter_names_the_address_that_is_taken(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = run("exporter", "--port", str(port))
    says = f"modelquota: error: cannot listen at 127.0.0.1, port {port}: Address already in use\n"
    assert (outcome.exit_code, outcome.stderr) == (2, says)


def test_shell_completion():
    env = {**os.environ, "_MODELQUOTA_COMPLETE": "complete_bash", "COMP_WORDS": "modelquota re", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "modelquota"], capture_output=True, text=True, timeout=60, env=env, check=True
    )
    assert done.stdout.split() == ["replay", "remove", "reset-burst"]


# -- ids that a terminal would obey, and readers that leave

HOSTILE = ["[red]", "[/]", "a\x1b[2Jb", "a\nb", "a\rb", "\u202eabc", "[link=http://x]y[/link]", "ü" * 40, "日本" * 20]


@pytest.mark.parametrize("model_id", HOSTILE)
def test_an_id_is_text_wherever_it_is_printed(model_id, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    app = typer.Typer()
    add_commands(app, *[lambda path, trust_file: contextlib.nullcontext(manager)] * 2)

    def run(*arguments):
        return CliRunner().invoke(app, [arguments[0], "--path", "state", *arguments[1:]])

    outcome = run("set", "--", model_id)
    first, *rest = outcome.stdout.split("\n")
    assert (outcome.exit_code, first.isprintable(), len(rest)) == (0, True, len(manager.get_quota(model_id).to_dict()))
    if model_id.isprintable():
        assert first == f"model_id = {model_id}"
    else:
        assert ast.literal_eval('"' + first.removeprefix("model_id = ") + '"') == model_id
    assert len(outcome.stderr.splitlines()) == 1
    assert outcome.stderr.rstrip("\n").isprintable()
    assert json.loads(run("set", "--json", "--", model_id).stdout)["model_id"] == model_id
    outcome = run("status")
    assert len(outcome.stdout.splitlines()) == 3
    assert all(line.isprintable() for line in outcome.stdout.splitlines())
    (model,) = json.loads(run("status", "--json").stdout)["models"]
    assert model["model_id"] == model["quota"]["model_id"] == model_id
    for colours in (None, "truecolor"):
        console = Console(
            file=io.StringIO(), width=80, height=9, color_system=colours, force_terminal=colours is not None
        )
        console.print(Top(manager, console).screen())
        text = Text.from_ansi(console.file.getvalue()).plain
        assert len(text.splitlines()) == 5
        assert all(line.isprintable() and cell_len(line) <= 80 for line in text.splitlines())
        if model_id.isascii() and model_id.isprintable():
            assert text.splitlines()[3].startswith(model_id[:27])
    outcome = run("remove", "--", model_id + "?")
    assert (outcome.exit_code, len(outcome.stderr.splitlines())) == (1, 1)
    assert outcome.stderr.rstrip("\n").isprintable()


def test_a_path_is_text_too(tmp_path):
    path = tmp_path / "[red]x[bold].state"
    ResourceQuotaManager(path=path).set_quota("m")
    command = [sys.executable, "-m", "modelquota", "inspect", str(path)]
    env = {**os.environ, "COLUMNS": "300"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=env, check=True)
    assert str(path) in done.stdout


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    path = tmp_path_factory.mktemp("many") / "quota.state"
    manager = ResourceQuotaManager(path=path)
    for i in range(2000):
        manager.set_quota(f"model-{i}")
    return path


@pytest.mark.parametrize(
    "command",
    [
        ["status", "--json"], ["status"], ["set", "model-1"], ["set", "model-1", "--json"], ["inspect"], ["verify"],
        ["inspect", "--json"], ["verify", "--json"],
    ],
)  # fmt: skip
@pytest.mark.parametrize("lines", [0, 1])
def test_a_reader_that_leaves_ends_a_command_without_a_word(state, command, lines):
    where = [str(state)] if command[0] in ("inspect", "verify") else ["--path", str(state)]
    process = subprocess.Popen(
        [sys.executable, "-m", "modelquota", *command, *where],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(lines):
        assert process.stdout.readline()
    process.stdout.close()
    with process:
        assert process.stderr.read() == ""
        short_enough_to_have_been_written = lines == 1 and command != ["status", "--json"] and command != ["status"]
        assert process.wait(60) in ([0, 1] if short_enough_to_have_been_written else [1])


def test_status_of_a_full_table_is_quick(tmp_path, monkeypatch):
    """A generous bound: what took quadratic time needs minutes for these."""
    manager = ResourceQuotaManager(path=tmp_path / "state")
    for i in range(16_384):
        manager.set_quota(f"user-{i}", max_tokens_per_hour=1000 + i % 50)
        manager.check_quota(f"user-{i}", i % 1000)
    console = Console(file=io.StringIO(), width=140)
    out = io.StringIO()
    with ResourceQuotaManager.open_readonly(tmp_path / "state") as view, contextlib.redirect_stdout(out):
        start = time.process_time()
        print_status(view, console)
        print_status_json(view)
        assert time.process_time() - start < 3
    assert len(console.file.getvalue().splitlines()) == 16_384 + 2
    models = json.loads(out.getvalue())["models"]
    assert [model["pressure"] for model in models] == sorted((model["pressure"] for model in models), reverse=True)
