"""`modelquota proxy`, as it is started in front of a server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import httpx
import pytest
from asgi_client import chat
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, Provider
from typer.testing import CliRunner

from modelquota import ResourceQuotaManager
from modelquota.asgi.quota import _guards as guards
from modelquota.cli.app import app

USED = PROMPT + OUTPUT
QUOTAS = """
[models.m]
max_requests_per_second = "unlimited"
max_tokens_per_second = "unlimited"
max_requests_per_hour = 6
on_violation = "reject"
"""


@pytest.fixture
def quotas(tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text(QUOTAS)
    return path


class Command:
    """`modelquota proxy` in a process of its own."""

    def __init__(self, *arguments, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "modelquota", "proxy", "--port", "0", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
            self.process.terminate()
        try:
            self.out, self.err = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            raise


@pytest.mark.parametrize("workers", [1, 2])
def test_it_stands_in_front_of_a_server(quotas, tmp_path, workers):
    state = tmp_path / "quota.state"
    options = [
        "-q",
        quotas,
        "--state",
        state,
        "--page",
        "/limits",
        "--metrics",
        "/limits/metrics",
        "--admin",
        "/quotas",
    ]
    token = {"authorization": "Bearer a-token-of-the-operator"}
    with (
        serving(Provider()) as upstream,
        Command(
            "--upstream", upstream, *options, "--workers", workers, MODELQUOTA_ADMIN_TOKEN="a-token-of-the-operator"
        ) as command,
        httpx.Client(base_url=command.address, timeout=20, limits=httpx.Limits(max_keepalive_connections=0)) as client,
    ):
        until(lambda: answers(client))
        assert str(quotas) in command.said
        assert f"{command.address}/limits" in command.said
        assert f"{command.address}/quotas" in command.said
        found = [client.post("/v1/chat/completions", json=chat()) for _ in range(7)]
        assert [answer.status_code for answer in found] == [200] * 6 + [429]
        assert found[0].json()["usage"]["total_tokens"] == USED
        with ResourceQuotaManager(path=state) as manager:
            assert manager.get_usage("m").tokens_this_hour == 6 * USED
        assert client.get("/limits", headers={"accept": "application/json"}).json()["models"][0]["id"] == "m"
        assert "modelquota" in client.get("/limits/metrics").text
        assert client.patch("/quotas/m", json={"max_requests_per_hour": 7}).status_code == 401
        assert client.patch("/quotas/m", json={"max_requests_per_hour": 7}, headers=token).status_code == 200
        again = [client.post("/v1/chat/completions", json=chat()).status_code for _ in range(2)]
        assert again == [200, 429], "all workers share the limits"
    assert "INFO:     the admin API has set the quota of 'm' for 127.0.0.1: {'max_requests_per_hour': 7}" in command.err
    assert "a-token-of-the-operator" not in command.said + command.out + command.err
    assert command.process.returncode == 0
    assert "Traceback" not in command.err


def answers(client):
    try:
        return client.get("/v1/models").status_code
    except httpx.HTTPError:
        return None


def test_the_environment_is_enough_and_the_file_has_the_rest(quotas, tmp_path):
    quotas.write_text(QUOTAS + "[http]\nstate = 'here.state'\npage = '/quota'\n")
    with (
        serving(Provider()) as upstream,
        Command("-u", upstream, "--no-access-log", MODELQUOTA_QUOTAS=str(quotas)) as command,
    ):
        page = urllib.request.Request(f"{command.address}/quota", headers={"accept": "application/json"})
        until(lambda: listens(command.address))
        with urllib.request.urlopen(page, timeout=20) as answer:
            assert json.load(answer)["models_total"] == 1
        httpx.post(f"{command.address}/unheard/of", timeout=20)
    assert (tmp_path / "here.state").exists()
    assert "GET /quota" not in command.err
    assert "WARNING:     POST /unheard/of is passed on without being counted" in command.err


def listens(address):
    try:
        socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 5).close()
    except OSError:
        return False
    return True


def test_ctrl_c_lets_open_requests_end(quotas, tmp_path):
    provider = Provider(pace=0.15)
    with (
        serving(provider) as upstream,
        Command("-u", upstream, "-q", quotas, "--state", tmp_path / "s.state") as command,
        httpx.Client(base_url=command.address, timeout=20) as client,
    ):
        until(lambda: answers(client))
        found = []
        thread = threading.Thread(
            target=lambda: found.append(client.post("/v1/chat/completions", json=chat(stream=True)))
        )
        thread.start()
        until(lambda: provider.running)
        os.killpg(command.process.pid, signal.SIGINT)
        thread.join()
        assert found[0].text.endswith("data: [DONE]\n\n")
        assert command.process.wait(20) == 0


def run(*arguments):
    outcome = CliRunner().invoke(app, ["proxy", *map(str, arguments)])
    return outcome.exit_code, outcome.stderr.strip()


def test_the_first_slips_are_messages(quotas, tmp_path, monkeypatch):
    monkeypatch.delenv("MODELQUOTA_QUOTAS", raising=False)
    upstream = ("--upstream", "http://127.0.0.1:9")
    code, says = run(*upstream)
    assert (code, "MODELQUOTA_QUOTAS=None is not accepted; expected the path of a quota file" in says) == (2, True)
    assert run(*upstream, "-q", "none.toml")[0] == 2
    code, says = run("--upstream", "localhost:8000", "-q", quotas)
    assert (code, "expected an address as http://127.0.0.1:8000" in says) == (2, True)
    code, says = run(*upstream, "-q", quotas, "--page", "limits")
    assert (code, "--page='limits' is not accepted" in says) == (2, True)
    code, says = run(*upstream, "-q", quotas, "--state", tmp_path / "s.state", "--admin", "/quotas")
    assert (code, "MODELQUOTA_ADMIN_TOKEN=None is not accepted" in says) == (2, True)
    code, says = run(*upstream, "-q", quotas, "--admin", "/quotas", "--admin-token-file", tmp_path / "none")
    assert (code, f"{tmp_path / 'none'}: No such file" in says) == (2, True)
    code, says = run(*upstream, "-q", quotas, "--admin", "quotas")
    assert (code, "--admin='quotas' is not accepted; expected a path" in says) == (2, True)
    code, says = run(*upstream, "-q", quotas, "--state", quotas)
    assert (code, f"{quotas}: it is not a state file" in says, quotas.read_text()) == (2, True, QUOTAS)
    quotas.write_text("[models.m]\nmax_ram_mb = -1")
    code, says = run(*upstream, "-q", quotas)
    assert (code, f"{quotas}: line 2" in says) == (2, True)
    quotas.write_text(QUOTAS)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, says = run(*upstream, "-q", quotas, "--state", tmp_path / "s.state", "--port", port)
        assert (code, f"cannot listen at 127.0.0.1, port {port}" in says) == (2, True)
    guards.popitem()[1].manager.close()
    assert guards == {}


@pytest.mark.parametrize("missing", ["httpx", "uvicorn"])
def test_without_the_extra_it_says_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None; from modelquota.cli import main; "
        "sys.exit(main(['proxy', '--upstream', 'http://127.0.0.1:9']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "modelquota: error: proxy needs the extra 'proxy': pip install 'modelquota[proxy]'\n"
