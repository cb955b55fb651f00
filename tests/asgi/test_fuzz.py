"""Any input over HTTP: never an error of ours, never more held than allowed, nothing left over."""

import asyncio
import json
import socket

import pytest
from asgi_client import Call
from http_server import serving
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware, openai_routes
from modelquota.demo.server import count_words

MOST_BODY = 2000
PATHS = sorted(openai_routes())

WORDS = st.text(max_size=6) | st.sampled_from(["m", "org:a", "\ud800", "\0", "x" * 300, ""])
NUMBERS = (
    st.integers(-5, 300)
    | st.integers()
    | st.floats()
    | st.sampled_from([2**62, 2**63, -1, 10**400])
    | st.booleans()
    | st.none()
)
VALUES = st.recursive(
    WORDS | NUMBERS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=8,
)
FIELDS = {
    "model": st.sampled_from(["m", "m", "m", "new", "org:a"]) | VALUES,
    "max_tokens": NUMBERS | VALUES,
    "max_completion_tokens": NUMBERS | VALUES,
    "max_output_tokens": NUMBERS,
    "n": st.integers(1, 3) | VALUES,
    "best_of": VALUES,
    "stream": VALUES,
    "messages": VALUES,
    "prompt": VALUES,
    "input": VALUES,
    "tools": VALUES,
}


def as_bytes(value):
    return json.dumps(value).encode()


OBJECTS = st.fixed_dictionaries({}, optional=FIELDS)
LIKELY = st.fixed_dictionaries({"model": st.sampled_from(["m", "new"])}, optional={"max_tokens": st.integers(0, 90)})
BODIES = (
    LIKELY.map(as_bytes)
    | OBJECTS.map(as_bytes)
    | VALUES.map(as_bytes)
    | st.binary(max_size=60)
    | st.tuples(OBJECTS.map(as_bytes), st.integers(0, 80), st.binary(max_size=3)).map(
        lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]
    )
    | st.sampled_from(
        [b"[" * 1500, b'{"a":' * 300, b"1" * 1900, b'"' + b"\\u0000" * 300 + b'"', b" " * (MOST_BODY + 1)]
    )
)
NAMES = st.sampled_from(
    [b"content-length", b"Content-Length", b"content-type", b"authorization", b"accept", b"expect", b"x"]
) | st.binary(min_size=1, max_size=8)
HEADERS = st.lists(
    st.tuples(NAMES, st.binary(max_size=20) | st.integers(-10, 10**30).map(lambda number: str(number).encode())),
    max_size=4,
)
PIECES = st.lists(
    st.binary(max_size=30)
    | st.sampled_from(
        [b"data: ", b"\n\n", b"\r", b'{"usage": {"total_tokens": ', b"5}}", b"data: [DONE]\n\n", b"x" * 70_000]
    )
    | OBJECTS.map(lambda value: b"data: " + as_bytes({"choices": [{"delta": value}], "usage": value}) + b"\n\n"),
    max_size=6,
)
KINDS = st.sampled_from([b"text/event-stream", b"application/json", b"text/plain", b"", b"\xff"])


class Fuzzed:
    """A model server that answers with what it is given."""

    def __init__(self, status, kind, pieces):
        self.status = status
        self.kind = kind
        self.pieces = pieces
        self.called = False

    async def __call__(self, scope, receive, send):
        self.called = True
        message = await receive()
        if message["type"] != "http.request":  # the client has disconnected; this request needs no quota
            return
        self.body = message["body"]
        await send({"type": "http.response.start", "status": self.status, "headers": [(b"content-type", self.kind)]})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body"})


def new_manager():
    manager = ResourceQuotaManager(
        clock=ManualClock(10**12),
        default_quota=ResourceQuotaConfig("any", max_concurrent_requests=1, on_violation="reject"),
        max_models=6,
    )
    manager.set_quota("m", max_tokens_per_hour=400, on_violation="reject")
    manager.set_quota("tenant/org:a", max_requests_per_hour=30, on_violation="reject")
    return manager


@settings(max_examples=150)
@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from(PATHS), BODIES, HEADERS, st.integers(1, 700), st.sampled_from([200, 200, 201, 404, 500]),
            KINDS, PIECES, st.integers(0, 8),
        ),
        min_size=1,
        max_size=3,
    )
)  # fmt: skip
@example(
    requests=[(PATHS[0], b'{"model": "m", "max_tokens": 9}', [], 4, 200, b"text/event-stream", [b"data: 1"] * 3, 0)]
)
def test_any_request_and_any_response(requests):
    manager = new_manager()

    async def main():
        for path, body, headers, size, status, kind, pieces, leaves_after in requests:
            parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
            model = Fuzzed(status, kind, pieces)
            app = QuotaMiddleware(model, manager, max_body_bytes=MOST_BODY, identity=lambda request: "org:a")
            call = Call(app, path, parts=parts, headers=headers).start()
            if leaves_after == 8:
                await asyncio.sleep(0)
                call.gone.set()
                await call.task
                assert call.response.status in (None, status, 400, 413, 429, 503)
                continue
            response = await call.task
            assert response.complete
            if model.called:
                assert model.body == body
                assert response.status == status
                assert response.chunks == [*pieces, b""]
            else:
                assert response.status in (400, 413, 429, 503)
                assert set(response.error) == {"message", "type", "param", "code"}
                assert response.error["message"]

    asyncio.run(main())
    snapshot = manager.snapshot()
    assert snapshot["concurrent_requests"].sum() == snapshot["queued_requests"].sum() == 0
    assert snapshot["reserved_ram_mb"].sum() == 0


@given(body=OBJECTS)
def test_estimates_of_any_body(body):
    for prompt_tokens in (None, count_words):
        routes = openai_routes() if prompt_tokens is None else openai_routes(prompt_tokens=prompt_tokens)
        manager = new_manager()
        app = QuotaMiddleware(Fuzzed(200, b"", []), manager, routes=routes)
        response = asyncio.run(Call(app, body=as_bytes(body)).run())
        assert response.status in (200, 400, 413, 429, 503)


@pytest.fixture(scope="module")
def server():
    manager = new_manager()
    app = QuotaMiddleware(Fuzzed(200, b"application/json", [b"{}"]), manager, max_body_bytes=MOST_BODY, page="/quota")
    with serving(app) as address:
        yield manager, int(address.rpartition(":")[2])


TOKENS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters=":"), min_size=1, max_size=8)
TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12).map(
    lambda text: text.encode("latin-1")
)
LINES = st.lists(st.tuples(TOKENS.map(str.encode), TEXTS), max_size=5)


@settings(max_examples=100)
@given(
    method=st.sampled_from([b"POST", b"POST", b"POST", b"GET", b"HEAD", b"PUT", b"BREW"]),
    path=st.sampled_from(
        [path.encode() for path in PATHS] + [b"/v1/chat/completions/", b"/quota", b"/quota/", b"/x?y=%ff"]
    ),
    lines=LINES,
    body=BODIES,
    length=st.sampled_from(["right", "right", "chunked", "short", "long", "absurd"]),
)
def test_any_bytes_on_a_real_connection(server, method, path, lines, body, length):
    """The server itself may refuse what is not HTTP (400), never fail."""
    _, port = server
    framed = {
        "right": (b"content-length: %d" % len(body), body),
        "short": (b"content-length: %d" % (len(body) // 2), body),
        "long": (b"content-length: %d" % (len(body) + 5), body),
        "absurd": (b"content-length: %d" % 10**18, body),
        "chunked": (b"transfer-encoding: chunked", b"%x\r\n%b\r\n" % (len(body), body) * bool(body) + b"0\r\n\r\n"),
    }[length]
    head = [b"%b %b HTTP/1.1" % (method, path), b"host: x", b"connection: close", framed[0]]
    head += [b"%b: %b" % line for line in lines]
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(b"\r\n".join(head) + b"\r\n\r\n" + framed[1])
        connection.shutdown(socket.SHUT_WR)
        answer = b""
        try:
            while part := connection.recv(1 << 16):
                answer += part
        except ConnectionResetError:  # what follows a body that was cut short is not a request
            pass
    if answer:
        status = int(answer.split(b" ", 2)[1])
        assert status in (200, 400, 401, 405, 413, 429, 499, 503), answer


def test_nothing_is_left_after_all_that(server):
    manager, _ = server
    for _ in range(200):
        if manager.snapshot()["concurrent_requests"].sum() == 0:
            break
        asyncio.run(asyncio.sleep(0.05))
    snapshot = manager.snapshot()
    assert snapshot["concurrent_requests"].sum() == snapshot["queued_requests"].sum() == 0
