"""A pre-forking server: several workers, one limit, over real HTTP on loopback."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

LIMIT = 120
WSGI = """
    import os
    from modelquota import ResourceQuotaManager

    manager = ResourceQuotaManager(path=os.environ.get("STATE"))
    manager.set_quota("m", max_requests_per_hour={limit}, max_requests_per_second=None, on_violation="reject")


    def app(environ, start_response):
        allowed = environ["PATH_INFO"] == "/worker" or manager.check_quota("m", 1).allowed
        start_response("200 OK" if allowed else "429 Too Many Requests", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]


    async def asgi(scope, receive, send):
        assert scope["type"] == "http"
        status = 200 if scope["path"] == "/worker" or manager.check_quota("m", 1) else 429
        await send({{"type": "http.response.start", "status": status, "headers": []}})
        await send({{"type": "http.response.body", "body": str(os.getpid()).encode()}})
"""
SERVERS = {
    "gunicorn --preload": ["-m", "gunicorn", "--preload", "--workers=2", "served:app"],
    "gunicorn": ["-m", "gunicorn", "--workers=2", "served:app"],
    "uvicorn": ["-m", "uvicorn", "--workers=2", "--lifespan=off", "--log-level=warning", "served:asgi"],
}


def ask(port: int, times: int, path: str, found: list[tuple[int, str]]) -> None:
    for _ in range(times):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
            connection.request("GET", path)
            answer = connection.getresponse()
            found.append((answer.status, answer.read().decode()))


def load(port: int, clients: int = 6, times: int = 50, path: str = "/") -> list[tuple[int, str]]:
    """Answers to `clients` threads that ask `times` times each."""
    found: list[tuple[int, str]] = []
    threads = [threading.Thread(target=ask, args=(port, times, path, found)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == clients * times
    return found


@contextlib.contextmanager
def serving(kind: str, directory: Any, state: str | None) -> Iterator[int]:
    """Start a server with two workers on a free port, and end it."""
    (directory / "served.py").write_text(textwrap.dedent(WSGI.format(limit=LIMIT)))
    # read by gunicorn, whose versions before 25.1 have no such socket and pass over the name
    (directory / "gunicorn.conf.py").write_text("control_socket_disable = True\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = [f"--bind=127.0.0.1:{port}"] if "gunicorn" in kind else ["--host=127.0.0.1", f"--port={port}"]
    environment = {name: value for name, value in os.environ.items() if name != "STATE"}
    if state is not None:
        environment["STATE"] = state
    with open(directory / "log", "a") as log:
        server = subprocess.Popen(
            [sys.executable, *SERVERS[kind], *place], cwd=directory, env=environment, stdout=log, stderr=log
        )
        try:
            deadline = time.monotonic() + 30
            while True:
                assert server.poll() is None, (directory / "log").read_text()
                assert time.monotonic() < deadline, "the server does not answer"
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            workers: set[str] = set()  # the first may have answered all before the second has started
            while len(workers) < 2:
                assert time.monotonic() < deadline, "only one worker answers"
                workers |= {worker for _, worker in load(port, times=5, path="/worker")}
            yield port
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(15)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def admitted(answers: list[tuple[int, str]]) -> int:
    counts = Counter(status for status, _ in answers)
    assert set(counts) <= {200, 429}
    return counts[200]


def skip_without(kind: str) -> None:
    pytest.importorskip(kind.split()[0])


@pytest.mark.parametrize("kind", ["gunicorn --preload"])
def test_forked_workers_share_the_limit_without_a_file(kind, tmp_path):
    skip_without(kind)
    with serving(kind, tmp_path, None) as port:
        answers = load(port)
    assert admitted(answers) == LIMIT
    assert len({worker for _, worker in answers}) == 2


@pytest.mark.parametrize("kind", SERVERS)
def test_workers_share_the_limit_and_a_restart_refills_nothing(kind, tmp_path):
    skip_without(kind)
    state = str(tmp_path / "quota.state")
    with serving(kind, tmp_path, state) as port:
        first = load(port, 4, 20)
    assert admitted(first) == 80
    with serving(kind, tmp_path, state) as port:
        second = load(port)
        assert len({worker for _, worker in second}) == 2
    assert admitted(second) == LIMIT - 80
