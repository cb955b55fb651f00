"""The reverse proxy over HTTP/1.1: what it passes on and what not, pressure back to the server, and who left whom."""

import asyncio
import contextlib
import gzip
import json
import socket
import threading
import time

import httpx
import pytest
from asgi_client import Call, chat
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, Provider

from modelquota import ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware
from modelquota.asgi.proxy import UPSTREAM_CHARGES, Dated, ReverseProxy

USED = PROMPT + OUTPUT
UNLIMITED = dict.fromkeys(("max_requests_per_second", "max_tokens_per_second"))


@pytest.fixture
def manager():
    with ResourceQuotaManager() as manager:
        manager.set_quota("m", **UNLIMITED, on_violation="reject")
        yield manager


def used(manager):
    usage = manager.get_usage("m")
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


@contextlib.contextmanager
def proxied(upstream, manager, **options):
    """An HTTP client of the proxy, with quotas, in front of an address."""
    app = Dated(QuotaMiddleware(ReverseProxy(upstream, **options), manager, charge=UPSTREAM_CHARGES))
    with (
        serving(app, lifespan="on", server_header=False, date_header=False) as address,
        httpx.Client(base_url=address, timeout=20) as client,
    ):
        yield client


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
def client(provider, manager):
    with serving(provider, server_header=False, date_header=False) as upstream, proxied(upstream, manager) as client:
        client.upstream = upstream
        yield client


def test_requests_and_answers_pass_and_are_settled(client, provider, manager):
    answer = client.post("/v1/chat/completions?a=%2F&b", json=chat())
    assert answer.json() == provider.openai_whole(chat())
    assert answer.headers["x-ratelimit-limit-tokens"]
    assert used(manager) == (USED, 1, 0)
    path, headers, body = provider.requests[0]
    assert (path, body) == ("/v1/chat/completions", chat())
    assert headers["host"] == client.upstream.removeprefix("http://")
    assert headers["x-forwarded-host"] == str(client.base_url.netloc.decode())
    assert (headers["x-forwarded-for"], headers["x-forwarded-proto"], headers["via"]) == (
        "127.0.0.1",
        "http",
        "1.1 modelquota",
    )


def test_streams_pass_event_by_event_as_they_come(client, provider, manager):
    provider.pace = 0.3
    direct = b"".join(provider.openai_events(chat()))
    start = time.monotonic()
    came = []
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        pieces = []
        for piece in answer.iter_raw():
            pieces.append(piece)
            came.append(time.monotonic() - start)
    assert b"".join(pieces) == direct
    assert len(pieces) == 8
    assert came[0] < 0.5 * came[-1]
    assert answer.headers["transfer-encoding"] == "chunked"
    assert used(manager) == (USED, 1, 0)


def test_headers_for_one_connection_stay_on_it(client, provider):
    provider.script = [
        (200, {"connection": "close, x-mine", "x-mine": "1", "keep-alive": "5", "x-kept": "2", "server": "theirs"}, {})
    ]
    sent = {
        "connection": "x-hop, keep-alive", "x-hop": "1", "x-kept": "2", "te": "trailers", "upgrade": "h2c",
        "proxy-authorization": "secret", "proxy-connection": "keep-alive", "authorization": "Bearer theirs",
        "x-forwarded-for": "10.0.0.1", "via": "1.0 before",
    }  # fmt: skip
    answer = client.get("/v1/models", headers=sent)
    assert not {"x-mine", "keep-alive"} & set(answer.headers)
    assert (answer.headers["x-kept"], answer.headers["server"]) == ("2", "theirs")
    assert "date" in answer.headers
    _, headers, _ = provider.requests[0]
    gone = {"x-hop", "te", "proxy-authorization", "upgrade", "proxy-connection", "transfer-encoding", "content-length"}
    assert not gone & set(headers)
    assert (headers["x-kept"], headers["authorization"]) == ("2", "Bearer theirs")
    assert "x-mine" not in headers.get("connection", "")


def test_compressed_bodies_pass_as_they_are(client, provider, manager):
    body = gzip.compress(json.dumps(provider.openai_whole(chat())).encode())
    provider.script = [(200, {"content-encoding": "gzip", "content-length": str(len(body))}, body)]
    with client.stream("POST", "/v1/chat/completions", json=chat(), headers={"accept-encoding": "br, gzip"}) as answer:
        assert b"".join(answer.iter_raw()) == body
    assert answer.headers["content-length"] == str(len(body))
    assert provider.requests[0][1]["accept-encoding"] == "br, gzip"
    assert used(manager) == (110, 1, 0)  # what cannot be read is charged its estimate


def test_bodies_of_unknown_length_pass_both_ways(client, provider):
    pieces = [b'{"input": "', b"x" * 100_000, b'"}']
    answer = client.post("/v1/files", content=iter(pieces), headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert provider.requests[0][2] == {"input": "x" * 100_000}
    assert client.post("/v1/files").status_code == 200
    assert client.put("/v1/files", content=b"").status_code == 200
    assert "transfer-encoding" not in provider.requests[1][1]


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "DELETE", "PATCH"])
def test_every_method_passes(provider, manager, method):
    async def answer(scope, receive, send):
        length = [(b"content-length", b"5"), (b"x-method", scope["method"].encode())]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else b"12345"})

    with serving(answer) as upstream, proxied(upstream, manager) as client:
        found = client.request(method, "/v1/models")
        assert (found.headers["x-method"], found.headers["content-length"]) == (method, "5")
        assert found.content == (b"" if method == "HEAD" else b"12345")


def test_several_headers_of_one_name_and_statuses_without_a_body(manager):
    async def answer(scope, receive, send):
        status = int(scope["path"].strip("/"))
        headers = [(b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"location", b"/elsewhere")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b""})

    with serving(answer) as upstream, proxied(upstream, manager) as client:
        for status in (204, 304, 302):
            found = client.get(f"/{status}")  # a redirect is the client's to follow
            assert found.status_code == status
            assert found.headers.get_list("set-cookie") == ["a=1", "b=2"]


def test_the_target_is_passed_on_as_it_is_below_the_path_of_the_server(provider, manager):
    targets = []

    async def answer(scope, receive, send):
        targets.append(scope["raw_path"] + b"?" + scope["query_string"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    with serving(answer) as upstream, proxied(f"{upstream}/base/", manager) as client:
        for target in (b"/v1//models", b"/v1/mod%2Fels?q=%20a+b", b"/%E2%82%AC"):
            host, port = client.base_url.host, client.base_url.port
            with socket.create_connection((host, port)) as raw:
                raw.sendall(b"GET " + target + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                while raw.recv(65536):
                    pass
    assert targets == [b"/base/v1//models?", b"/base/v1/mod%2Fels?q=%20a+b", b"/base/%E2%82%AC?"]


@pytest.mark.parametrize("path", ["/v1/x/../chat/completions", "/v1/./chat/completions", "/v1/%2e%2e/chat"])
def test_a_path_that_a_server_might_resolve_is_refused(provider, manager, path):
    """It would run a model that no quota has seen."""
    proxy = ReverseProxy("http://127.0.0.1:9")
    answer = asyncio.run(Call(proxy, path.replace("%2e", "."), chat()).run())
    assert (answer.status, answer.error["code"]) == (400, "invalid_path")


@pytest.mark.parametrize(
    "target",
    [b"/v1/chat/completions#x", b"http://x/invocations", b"//x/generate", b"/v1/chat\\completions", b"/v1/a b", b"*"],
)
def test_a_target_that_servers_read_in_different_ways_is_refused(target):
    """Some end a path at a fragment, or take only the path of an address."""
    proxy = ReverseProxy("http://127.0.0.1:9")
    answer = asyncio.run(Call(proxy, target.decode(), chat(), raw_path=target).run())
    assert (answer.status, answer.error["code"]) == (400, "invalid_path")


def test_a_server_that_is_down_is_a_502_and_costs_nothing(manager):
    with proxied("http://127.0.0.1:9", manager) as client:
        answer = client.post("/v1/chat/completions", json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_unreachable")
        assert client.post("/v1/messages", json=chat()).json()["type"] == "error"
        assert client.get("/v1/models").status_code == 502
    assert used(manager) == (0, 0, 0)


def test_a_server_that_is_too_slow_is_a_504(provider, manager):
    async def never(scope, receive, send):
        await asyncio.sleep(5)

    with serving(never) as upstream, proxied(upstream, manager, read_timeout=0.2) as client:
        answer = client.post("/v1/chat/completions", json=chat())
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "upstream_timeout")
        assert used(manager) == (0, 1, 0)


def test_when_all_connections_are_in_use_further_requests_wait_and_then_get_a_503(provider, manager):
    provider.pace = 0.5
    with (
        serving(provider) as upstream,
        proxied(upstream, manager, max_connections=1, connect_timeout=0.2) as client,
        client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as first,
    ):
        lines = first.iter_lines()  # kept: a generator that is collected closes the response
        next(lines)
        answer = client.get("/v1/models")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "upstream_busy")


def test_a_client_that_leaves_closes_the_request_to_the_server(client, provider, manager):
    provider.pace = 1.0  # so that the stream has not ended yet, on a busy machine too
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
        lines = answer.iter_lines()  # one that is not kept closes the answer
        next(lines)
        assert used(manager)[2] == 1
    until(lambda: provider.left == 1)
    until(lambda: used(manager)[2] == 0)
    tokens, requests, _ = used(manager)
    assert requests == 1
    assert 10 < tokens < 10 + 5


def test_a_client_that_leaves_before_the_answer_begins_closes_it_too(manager):
    begun, left = threading.Event(), threading.Event()

    async def slow(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        begun.set()
        await receive()
        left.set()

    with serving(slow) as upstream, proxied(upstream, manager) as client:
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/chat/completions", json=chat(), timeout=httpx.Timeout(20, read=0.3))
        assert begun.is_set()
        assert left.wait(20)
        until(lambda: used(manager)[2] == 0)


def test_a_client_that_leaves_within_its_body_ends_the_request(provider, manager):
    with serving(provider) as upstream, proxied(upstream, manager) as client:
        with socket.create_connection((client.base_url.host, client.base_url.port)) as raw:
            raw.sendall(b"POST /v1/files HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n12345")
            time.sleep(0.1)
        assert client.get("/v1/models").status_code == 200
    assert [path for path, _, _ in provider.requests] == ["/v1/models"]


def test_an_answer_that_breaks_off_is_broken_off(manager):
    async def breaks(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        await send({"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True})
        raise ConnectionResetError("as if it had died")

    with serving(breaks) as upstream, proxied(upstream, manager) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/v1/chat/completions", json=chat(stream=True))
        until(lambda: used(manager)[2] == 0)
    assert used(manager) == (10, 1, 0)


def test_a_slow_client_slows_the_server_down(manager):
    """Nothing is read ahead: what the client does not take stays with the server."""
    sent = []

    async def endless(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(2000):
            await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
            sent.append(1)

    with (
        serving(endless) as upstream,
        proxied(upstream, manager) as client,
        client.stream("GET", "/endless") as answer,
    ):
        pieces = answer.iter_raw(1000)
        next(pieces)
        before = -1
        while len(sent) > before:  # until all buffers on the way are full
            before = len(sent)
            time.sleep(0.3)
        assert len(sent) < 500  # of 2,000: some 20 MB would already be more than all of them


@pytest.mark.parametrize(
    "wrong", ["127.0.0.1:8000", "ftp://host", "http://", "http://host/?q=1", "http://u:p@host", ""]
)
def test_an_address_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="^upstream='.*' is not accepted"):
        ReverseProxy(wrong)


@pytest.mark.parametrize("options", [{"connect_timeout": 0}, {"read_timeout": -1.0}, {"max_connections": 0}])
def test_numbers_that_are_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))}=.* is not accepted; expected"):
        ReverseProxy("http://host", **options)


def test_the_lifespan_closes_the_connections_and_websockets_are_refused():
    closed = []

    class Transport(httpx.AsyncBaseTransport):
        async def aclose(self):
            closed.append(True)

    proxy = ReverseProxy("http://host", transport=Transport())

    async def speak(kind, *messages):
        said, pending = [], list(messages)

        async def receive():
            return pending.pop(0)

        async def send(message):
            said.append(message["type"])

        await proxy({"type": kind}, receive, send)
        return said

    said = asyncio.run(speak("lifespan", {"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}))
    assert (said, closed) == (["lifespan.startup.complete", "lifespan.shutdown.complete"], [True])
    assert asyncio.run(speak("websocket", {"type": "websocket.connect"})) == ["websocket.close"]
