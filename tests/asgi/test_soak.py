"""Thousands of requests to a server of its own, three in ten of whose clients leave, at every phase.

``MODELQUOTA_SOAK_REQUESTS=10000 pytest tests/asgi/test_soak.py -s`` runs it in full and prints what was seen.
"""

import asyncio
import contextlib
import json
import os
import random
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

REQUESTS = int(os.environ.get("MODELQUOTA_SOAK_REQUESTS", "800"))
CLIENTS = 60
LEAVE = 0.3
SAMPLES = 10
PHASES = ("in its body", "waiting for admission", "before the first byte", "in the middle of the response")
PATIENCE = 60


class Client:
    """Sends requests one after the other, each on a connection of its own."""

    def __init__(self, port, rng):
        self.port = port
        self.rng = rng
        self.seen = Counter()

    async def request(self):
        leave = self.rng.choice(PHASES) if self.rng.random() < LEAVE else None
        asked = {
            "model": self.rng.choice(["queue", "queue", "throttle", "reject"]),
            "max_tokens": self.rng.randrange(1, 25),
            "stream": self.rng.random() < 0.7,
            "stream_options": {"include_usage": self.rng.random() < 0.5},
            "messages": [{"role": "user", "content": "word " * self.rng.randrange(40)}],
        }
        if leave == "before the first byte":  # a long answer in one piece, so that there is a time before it
            asked |= {"model": "throttle", "max_tokens": 100, "stream": False}
        body = json.dumps(asked).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: %d\r\n\r\n"
            writer.write(head % len(body) + (body[:10] if leave == "in its body" else body))
            await writer.drain()
            self.seen[await self._read(reader, leave)] += 1
        finally:
            if leave is not None and self.rng.random() < 0.5:  # a reset, as from a client that was killed
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _read(self, reader, leave):
        if leave == "in its body":
            await asyncio.sleep(self.rng.random() * 0.002)
            return "left"
        if leave in ("waiting for admission", "before the first byte"):
            await asyncio.sleep(self.rng.random() * (0.05 if leave == "before the first byte" else 0.01))
            return "left"
        status = int((await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1])
        if leave is not None:
            await reader.read(self.rng.randrange(1, 2000))
            return "left"
        answer = await reader.read()
        assert answer
        return status


async def soak(port, count, seed):
    """Send a number of requests, some at a time, and return what the clients have seen."""
    clients = [Client(port, random.Random(seed * 1000 + number)) for number in range(CLIENTS)]
    left = iter(range(count))

    async def run(client):
        for _ in left:
            async with asyncio.timeout(PATIENCE):
                await client.request()

    await asyncio.gather(*map(run, clients))
    return sum((client.seen for client in clients), Counter())


async def status(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])  # it comes in one chunk


async def settled(port, count):
    """The state of the server once every request has ended."""
    give_up = time.monotonic() + PATIENCE
    while True:
        state = await status(port)
        # a client may leave before the server has read anything: such a request never was one
        if not any(state["held"].values()) and sum(state["ended"].values()) >= count * 0.9 and state["tasks"] <= 3:
            return state
        assert time.monotonic() < give_up, state
        await asyncio.sleep(0.05)


@pytest.fixture
def port(tmp_path):
    complaints = tmp_path / "stderr"
    with complaints.open("wb") as stderr:
        command = [sys.executable, "-W", "error", Path(__file__).parents[1] / "support" / "soak_server.py"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
    try:
        yield json.loads(process.stdout.readline())["port"]
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()
    assert complaints.read_text() == ""  # such as of a grant that was garbage-collected unreleased


def test_nothing_is_left_of_clients_that_leave_at_any_phase(port):
    async def main():
        seen = Counter()
        rss_mb = []
        start = time.monotonic()
        for sample in range(SAMPLES):
            seen += await soak(port, REQUESTS // SAMPLES, sample)
            rss_mb.append((await settled(port, (sample + 1) * (REQUESTS // SAMPLES)))["rss_mb"])
        return seen, rss_mb, await settled(port, REQUESTS), time.monotonic() - start

    seen, rss_mb, state, seconds = asyncio.run(main())
    print(f"\n{REQUESTS:,} requests in {seconds:.0f} s: clients saw {dict(seen)}; the server saw {state['ended']}")
    print(f"statuses {state['statuses']}; held {state['held']}; RSS in MB {[round(mb, 1) for mb in rss_mb]}")
    assert sum(seen.values()) == REQUESTS
    assert 0.2 < seen["left"] / REQUESTS < 0.4
    assert set(seen) <= {"left", 200, 429, 503}
    assert not set(state["statuses"]) - {"200", "429", "499", "503"}
    assert state["held"] == dict.fromkeys(state["held"], 0)
    assert state["ended"]["complete"] >= seen[200] > 0
    for phase in PHASES:
        assert state["ended"][phase] > 0, phase
    # The allocator grows to what this many requests at once need, and then no more.
    assert rss_mb[-1] - rss_mb[SAMPLES // 2] < 4
