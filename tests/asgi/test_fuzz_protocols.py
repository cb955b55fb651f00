"""Random requests to every path of every protocol: never an error of ours, nothing left open, memory flat.

``MODELQUOTA_FUZZ=30000`` runs as many requests; by default a few hundred.
"""

import asyncio
import contextlib
import gc
import gzip
import json
import os
import random
import resource
import zlib

import pytest
from asgi_client import Call
from protocol_samples import EVENTS, EVERY_PATH, FREE, JSON_TYPE, LINES

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager, Tokens
from modelquota.asgi import Demand, QuotaMiddleware, RequestRefusedError

COUNT = int(os.environ.get("MODELQUOTA_FUZZ", "600"))
SEEDS = 4
OURS = (200, 400, 401, 404, 408, 413, 415, 429, 499, 503, 529)
MOST_BODY = 3000

SCALARS = (
    *(
        None,
        True,
        0,
        1,
        -1,
        7,
        2**62,
        2**63,
        10**30,
        1.5,
        100.0,
        1e308,
        "",
        "m",
        "100",
        "-1",
        "x" * 300,
        "\ud800",
        "\0",
    ),
    *("data:image/png;base64,AAAA", "tenant/a", "m#usd", "new", [], {}, [[]], [{}], [1, 2], ["a", "b"]),
)
FIELDS = [
    *("model", "max_tokens", "max_completion_tokens", "n", "best_of", "stream", "messages", "prompt", "input", "tools"),
    *(
        "system",
        "options",
        "generationConfig",
        "contents",
        "sampling_params",
        "text",
        "input_ids",
        "priority",
        "images",
    ),
    *(
        "instances",
        "parameters",
        "file",
        "query",
        "documents",
        "usage",
        "role",
        "content",
        "source",
        "image_url",
        "num_predict",
        "maxOutputTokens",
    ),
]
PACKED = ((b"gzip", gzip.compress), (b"deflate", zlib.compress), (b"br", bytes), (b"gzip", bytes))
JUNK = (b"data: ", b"\n\n", b"\r", b'{"usage":', b"x" * 9999, b'data: {"choices":[{"delta":5}]}\n\n')


class TheirError(Exception):
    """An error of the application."""


def value(rng, depth=0):
    kind = rng.random()
    if depth > 3 or kind < 0.6:
        return rng.choice(SCALARS)
    if kind < 0.8:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    return {rng.choice(FIELDS): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def body_of(rng, sample):
    changes = {rng.choice(FIELDS): value(rng) for _ in range(rng.choice((0, 0, 0, 1, 2)))}
    changes |= sample.bound if rng.random() < 0.5 else {}
    kind, data = sample.sent(**changes)
    if kind == JSON_TYPE:
        body = value(rng) if rng.random() < 0.05 else {**sample.body, **changes}
        data = json.dumps(body).encode(rng.choice(("utf-8",) * 6 + ("utf-8-sig", "utf-16", "utf-16-be", "utf-32")))
    headers = [] if kind == JSON_TYPE else [(b"content-type", kind)]
    if rng.random() < 0.1:
        name, pack = rng.choice(PACKED)
        data = pack(data)
        headers.append((b"content-encoding", name))
    if rng.random() < 0.1:
        at = rng.randrange(len(data) + 1)
        data = data[:at] + rng.randbytes(rng.randrange(4)) + data[at + rng.randrange(3) :]
    if rng.random() < 0.03:
        data = rng.choice((b"[" * 2500, b'{"a":' * 500, b"1" * 2900, b" " * (MOST_BODY + 500), b""))
    if rng.random() < 0.1:
        headers.append((b"content-length", rng.choice((b"5", b"99999", b"-1", b"x", b"9" * 40, b""))))
    if rng.random() < 0.5:
        headers.append((b"x-user", rng.choice((b"a", b"b", b"", b"\xff", b"u" * 300, b"a\0", b"a,b,c", b"a#usd"))))
    if rng.random() < 0.05:
        headers.insert(0, (b"content-type", rng.choice((b"multipart/form-data; boundary=b", b"text/plain", b"\xff"))))
    if not any(name == b"content-type" for name, _ in headers):
        headers.append((b"content-type", JSON_TYPE))
    return data, headers


class Model:
    """Answers as the sample does, or in any other way; says what it was not to do."""

    def __init__(self, rng, sample):
        self.rng = rng
        kind = rng.choice((sample.stream_type, EVENTS, LINES, JSON_TYPE, JSON_TYPE, b"", b"text/plain"))
        pieces = list(sample.stream) if rng.random() < 0.6 and sample.stream else [json.dumps(sample.answer).encode()]
        if rng.random() < 0.4:
            whole = b"".join(pieces)
            size = rng.randrange(1, 90)
            pieces = [whole[at : at + size] for at in range(0, len(whole), size)]
        for _ in range(rng.choice((0, 0, 1, 3))):
            pieces.insert(rng.randrange(len(pieces) + 1), rng.choice(JUNK))
        self.kind, self.pieces = kind, pieces
        self.status = rng.choice((200,) * 8 + (201, 304, 404, 422, 500))
        self.ending = rng.choice(("ends",) * 8 + ("raises", "returns", "listens", "raises at once", "returns at once"))

    async def __call__(self, scope, receive, send):
        if self.rng.random() < 0.9:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
        if self.ending == "returns at once":
            return
        if self.ending == "raises at once":
            raise TheirError
        start = {"type": "http.response.start", "status": self.status, "headers": [(b"content-type", self.kind)]}
        await send(start)
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if self.rng.random() < 0.2:
                await asyncio.sleep(0)
        if self.ending == "raises":
            raise TheirError
        if self.ending == "listens":
            await receive()
            await receive()
        if self.ending != "returns":
            await send({"type": "http.response.body", "body": b""})


def identity(request):
    user = request.header("x-user")
    if user == "b":
        raise RequestRefusedError(401, "not you")
    return user.split(",") if user and "," in user else user


def own(request):
    return Demand(request.params.get("model", "m"), len(request.body), timeout=0.001) if request.body else None


OPTIONS = (
    {},
    {"identity": identity},
    {"identity": identity, "unknown_model": "refuse", "at_limit": "stop", "headers": "openai"},
    {"unknown_model": "m", "unrouted": own, "default_model": "m", "cancel_on_disconnect": True},
    {"unrouted": "refuse", "charge": {"5xx": "usage", 404: "request"}, "at_limit": "stop", "headers": "none"},
    {"routes": ["vllm", "gemini", {"/own/{model}": own}], "default_model": "m", "usage": lambda value: Tokens(1, 2, 3)},
    {"chunk_tokens": len, "max_inflight_bytes": MOST_BODY, "identity": identity, "identity_namespace": "t:"},
)
PATHS = ["/own/m", "/own/", "/x", "/v1/models", "/v1/chat", *FREE]


def new_manager():
    manager = ResourceQuotaManager(
        clock=ManualClock(10**12),
        default_quota={"new*": ResourceQuotaConfig("any", max_concurrent_requests=1, on_violation="reject")},
        max_models=12,
    )
    manager.set_quota(
        "m", max_tokens_per_hour=4000, max_concurrent_requests=1, on_violation="queue", grace_period_sec=0.002
    )
    manager.set_quota("tenant/a", max_requests_per_hour=300, on_violation="throttle", grace_period_sec=0.001)
    return manager


async def one(rng, manager):
    sample = rng.choice(EVERY_PATH)
    path = rng.choice(PATHS) if rng.random() < 0.05 else sample.path
    root = rng.choice(("", "", "", "/api", "/v1"))
    data, headers = body_of(rng, sample)
    size = rng.choice((1000, 1000, 1000, 1, 7, 100))
    parts = [data[at : at + size] for at in range(0, len(data), size)] or [b""]
    model = Model(rng, sample)
    app = QuotaMiddleware(model, manager, max_body_bytes=MOST_BODY, **rng.choice(OPTIONS))
    asgi = {"version": "3.0", "spec_version": rng.choice(("2.1", "2.3", "2.4", "3.0"))}
    call = Call(app, rng.choice(("", "/app", root)) + path, parts=parts, root_path=root, asgi=asgi)
    call.scope["headers"] = headers
    call.scope["http_version"] = rng.choice(("1.0", "1.1", "2"))
    held = manager.reserve("m", 0) if rng.random() < 0.1 and not manager.get_usage("m").concurrent_requests else None
    call.start()
    leaves_after = rng.choice((None, None, None, 0, 1, 2, 5, 20))
    if leaves_after is not None:
        for _ in range(leaves_after):
            await asyncio.sleep(0)
        call.gone.set()
    if held is not None:
        await asyncio.sleep(0)
        held.cancel()
    if model.ending == "listens" or rng.random() < 0.5:
        for _ in range(50):
            await asyncio.sleep(0)
        call.gone.set()
    with contextlib.suppress(TheirError):
        await asyncio.wait_for(call.task, 20)
    status = call.response.status
    assert status in (None, model.status, *OURS), status
    if status is not None and status != model.status:
        assert call.response.complete
        if status != 499:
            assert json.loads(call.response.body)["error"]
    assert app.bodies.inflight_bytes == 0
    return path


def memory_kib():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize() // 1024


@pytest.mark.parametrize("seed", range(SEEDS))
def test_any_request_in_any_protocol(seed):
    manager = new_manager()
    rng = random.Random(f"{seed} of {COUNT}")
    each = COUNT // SEEDS
    grown = []

    async def main():
        for number in range(each):
            await one(rng, manager)
            if number % 100 == 0:
                manager.clock.advance(3700)
            if number in (each // 2, each - 1):
                grown.append(memory_kib())
        others = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.sleep(0)
        assert not {task for task in others if not task.done()}

    asyncio.run(main())
    gc.collect()  # a grant that was left over warns, and a warning is an error
    snapshot = manager.snapshot()
    assert snapshot["concurrent_requests"].sum() == snapshot["queued_requests"].sum() == 0
    assert snapshot["reserved_ram_mb"].sum() == 0
    assert grown[1] - grown[0] < 4096, "the second half of the requests leaves nothing behind"
