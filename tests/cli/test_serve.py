"""`modelquota serve-demo`, as a first-time user starts it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from modelquota.cli.app import app


def heed_interrupts():
    """Undo what a background job of a shell inherits: that SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """`modelquota serve-demo` in a process of its own."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "modelquota", "serve-demo", "--port", "0", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=heed_interrupts,
        )
        self.said = ""

    def __enter__(self):
        while "Ctrl-C" not in self.said:
            line = self.process.stdout.readline()
            assert line, self.process.stderr.read()
            self.said += line
        self.address = re.search(r"http://127\.0\.0\.1:\d+", self.said).group()
        return self

    def __exit__(self, *error):
        if self.process.poll() is None:
            self.process.terminate()  # its workers too
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()

    def press_ctrl_c(self):
        """Do what a terminal does: the signal goes to the workers too."""
        os.killpg(self.process.pid, signal.SIGINT)

    def post(self, body, **headers):
        """Status, headers and body of an answer."""
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions", json.dumps(body).encode(), headers, method="POST"
        )
        give_up = time.monotonic() + 20
        while True:
            try:
                with urllib.request.urlopen(request, timeout=20) as answer:
                    return answer.status, answer.headers, answer.read()
            except urllib.error.HTTPError as answer:
                with answer:
                    return answer.status, answer.headers, answer.read()
            except urllib.error.URLError:
                assert time.monotonic() < give_up, "the server does not answer"
                time.sleep(0.02)


def test_a_newcomer_sees_429_and_headers_and_ends_it():
    with Command("--speed", "1000") as command:
        body = json.loads(re.search(r"-d '(\{.*batch-13b.*?\})'", command.said).group(1))
        answers = [command.post(body) for _ in range(4)]
        assert [status for status, _, _ in answers] == [200, 200, 200, 429]
        _, headers, content = answers[-1]
        assert 0 < int(headers["retry-after-ms"]) < 1100
        assert json.loads(content)["error"]["code"] == "rate_limit_exceeded"
        status, headers, content = command.post({**body, "model": "chat-70b", "stream": True})
        assert status == 200
        assert headers["x-ratelimit-limit-tokens"] == "200"
        assert content.endswith(b"data: [DONE]\n\n")
        with urllib.request.urlopen(f"{command.address}/quota", timeout=20) as answer:
            assert b"<title>modelquota</title>" in answer.read()
        command.process.send_signal(signal.SIGINT)
        log, errors = command.process.communicate(timeout=20)
        assert command.process.returncode == 0
        assert "Traceback" not in errors
        assert '"POST /v1/chat/completions HTTP/1.1" 429' in log


def test_models_of_ones_own(tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text("""[models."it's"]\nmax_tokens_per_hour = 10\non_violation = "reject"\n""")
    with Command("--quotas", str(path), "--speed", "1000") as command:
        assert """'{"model": "it'"'"'s", """ in command.said
        assert command.post({"model": "it's", "max_tokens": 9, "prompt": "x"})[0] == 200
        assert command.post({"model": "it's", "max_tokens": 9, "prompt": "x"})[0] == 429
        assert command.post({"model": "chat-70b"})[0] == 404


def test_workers_share_the_limits_and_a_state_file_outlasts_them(tmp_path):
    options = ("--workers", "2", "--path", str(tmp_path / "quota.state"), "--speed", "1000")
    ask = {"model": "dev-7b", "max_tokens": 1, "messages": []}
    with Command(*options) as command, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: command.post(ask, Authorization="Bearer free")[0], range(24)))
        assert sorted(answers) == [200] * 10 + [429] * 14
        command.process.send_signal(signal.SIGTERM)
        errors = command.process.communicate(timeout=20)[1]
        assert len(set(re.findall(r"Started server process \[(\d+)\]", errors))) == 2
        assert "Traceback" not in errors
    with Command(*options) as command:
        status, _, content = command.post(ask, Authorization="Bearer free")
        assert status == 429
        assert "requests per hour: 10 of 10 used" in json.loads(content)["error"]["message"]


def test_ctrl_c_lets_workers_finish_their_answers():
    with Command("--workers", "2", "--speed", "10") as command, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(command.post, {"model": "chat-70b", "stream": True, "messages": []})
        while '"POST ' not in command.process.stdout.readline():
            pass  # it is logged with the head of the answer, which then takes two seconds and a half
        command.press_ctrl_c()
        errors = ""
        while "Waiting for connections" not in errors:
            line = command.process.stderr.readline()
            assert line, errors
            errors += line
        command.press_ctrl_c()  # once again, since two signals that come together count as one
        assert answer.result()[2].endswith(b"data: [DONE]\n\n")
        errors += command.process.communicate(timeout=20)[1]
        assert (command.process.returncode, "Traceback" in errors) == (0, False), errors


def run(*arguments):
    outcome = CliRunner().invoke(app, ["serve-demo", *arguments])
    return outcome.exit_code, " ".join(outcome.stderr.split())


def test_slips_are_messages(tmp_path):
    assert run("--quotas", "none.toml") == (2, "modelquota: error: none.toml: No such file or directory")
    path = tmp_path / "quotas.toml"
    path.write_text("[models.a]\nmax_ram_mb = -1\n")
    code, says = run("--quotas", str(path))
    assert (code, "max_ram_mb=-1 is not accepted" in says) == (2, True)
    path.write_text("[models.a]\n")
    code, says = run("--path", str(path))
    assert (code, str(path) in says, path.read_text()) == (2, True, "[models.a]\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        code, says = run("--port", port)
        assert (code, f"cannot listen at 127.0.0.1, port {port}" in says) == (2, True)


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from modelquota.cli import main; sys.exit(main(['serve-demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "modelquota: error: serve-demo needs the extra 'asgi': pip install 'modelquota[asgi]'\n"


def test_it_is_in_the_help():
    assert "serve-demo" in CliRunner().invoke(app, ["--help"]).stdout
    text = CliRunner().invoke(app, ["serve-demo", "--help"]).stdout
    assert all(option in text for option in ("--host", "--port", "--quotas", "--speed", "--workers", "--path"))


def test_the_middleware_needs_no_extra():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['starlette', 'uvicorn', 'fastapi', 'typer', 'rich']));"
        "import modelquota; assert 'modelquota.asgi' not in sys.modules and 'asyncio' not in sys.modules;"
        "from modelquota.asgi import QuotaMiddleware, QuotaPage"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], timeout=60).returncode == 0


def test_the_page_is_part_of_the_package():
    import modelquota.asgi.page

    folder = Path(modelquota.asgi.page.__file__).parent
    assert {path.suffix for path in folder.iterdir()} >= {".html", ".css", ".js"}
