"""Bodies: what is accepted, how long it may take, how much is held, and that a client can read why it was refused."""

import asyncio
import gc
import gzip
import json
import time

import httpx
import pytest
from asgi_client import OPEN, Call, Model, chat, used
from http_server import serving

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware
from modelquota.asgi import body as body_module
from modelquota.protocols.body import LARGE

REJECT = OPEN | {"on_violation": "reject"}


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **REJECT)
    return manager


def call(app, body, **options):
    response = asyncio.run(Call(app, body=body, **options).run())
    gc.collect(1)  # a grant that was left over warns, and a warning is an error
    return response


TEXT = json.dumps(chat())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_the_application_gets_the_bytes_that_were_sent(manager, encoding):
    model = Model(tokens=5)
    assert call(QuotaMiddleware(model, manager), TEXT.encode(encoding)).status == 200
    assert model.calls == [TEXT.encode(encoding)]
    body = gzip.compress(TEXT.encode())
    assert call(QuotaMiddleware(model, manager), body, headers=[(b"content-encoding", b"gzip")]).status == 200
    assert model.calls[1] == body
    assert used(manager)[0] == 10


def test_an_encoding_that_is_not_known_is_named(manager):
    response = call(QuotaMiddleware(Model(), manager), b"x", headers=[(b"content-encoding", b"br")])
    assert (response.status, response.error["code"]) == (415, "unsupported_encoding")
    assert response.headers["accept-encoding"].startswith("gzip, deflate")


def test_a_form_is_counted(manager):
    body = (b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--b\r\nContent-Disposition: form-data; '
            b'name="file"; filename="a.wav"\r\n\r\n\x00\xff\r\n--b--\r\n')  # fmt: skip
    seen = []

    async def model(scope, receive, send):
        seen.append(used(manager)[0])
        await Model(answer={"text": "hi", "usage": {"type": "tokens", "input_tokens": 9, "output_tokens": 2}})(
            scope, receive, send
        )

    call_ = Call(QuotaMiddleware(model, manager, default_output_tokens=50), "/v1/audio/transcriptions", body)
    call_.scope["headers"] = [(b"content-type", b"multipart/form-data; boundary=b")]
    assert asyncio.run(call_.run()).status == 200
    assert seen == [1050]
    assert used(manager)[0] == 11


@pytest.mark.alone
def test_a_large_body_is_parsed_beside_the_loop(manager):
    """Much smaller pieces of work go on in the meantime, and it counts as any other."""
    body = json.dumps({"model": "m", "max_tokens": 1, "prompt": [1] * 2_000_000}).encode()
    assert len(body) > LARGE
    gaps = []

    async def main():
        call = Call(QuotaMiddleware(Model(tokens=5), manager), "/v1/completions", body).start()
        while not call.task.done():
            before = time.perf_counter()
            await asyncio.sleep(0)
            gaps.append(time.perf_counter() - before)
        return call.task.result()

    manager.update_quota("m", max_tokens_per_hour=None)
    assert asyncio.run(main()).status == 200
    assert sorted(gaps)[-3] < 0.05
    assert len(gaps) > 10


@pytest.mark.parametrize(
    "kind", [b"multipart/form-data; boundary=zz", b"application/x-www-form-urlencoded", b"text/plain"]
)
@pytest.mark.parametrize("twice", [False, True])
def test_no_content_type_hides_the_model(manager, kind, twice):
    """Servers that do not look at the type, or at the first of two, serve the model that the JSON names."""
    manager.set_quota("big", max_tokens_per_hour=0, on_violation="reject")
    call_ = Call(QuotaMiddleware(Model(), manager, default_model="m"), body=chat("big"))
    call_.scope["headers"] = [(b"content-type", b"application/json")] * twice + [(b"content-type", kind)]
    assert asyncio.run(call_.run()).status == 400


def test_a_form_without_its_boundary_is_refused(manager):
    call_ = Call(QuotaMiddleware(Model(), manager, default_model="m"), "/v1/audio/transcriptions", b"no form")
    call_.scope["headers"] = [(b"content-type", b"multipart/form-data; boundary=zz")]
    assert asyncio.run(call_.run()).status == 400
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("kind", [memoryview, bytearray])
@pytest.mark.parametrize("pieces", [1, 2])
def test_an_answer_may_be_any_kind_of_bytes(manager, kind, pieces):
    """Starlette passes on what the application gave it."""
    answer = json.dumps({"usage": {"prompt_tokens": 3, "completion_tokens": 4}}).encode()
    cut = len(answer) // pieces

    async def model(scope, receive, send):
        head = iter([(b"content-type", b"application/json"), (b"x-model", b"m")])  # ASGI asks for an iterable
        await send({"type": "http.response.start", "status": 200, "headers": head})
        for at in range(0, len(answer), cut):
            more = at + cut < len(answer)
            await send({"type": "http.response.body", "body": kind(answer[at : at + cut]), "more_body": more})

    response = asyncio.run(Call(QuotaMiddleware(model, manager), body=chat()).run())
    assert (response.status, response.headers["x-model"], response.body) == (200, "m", answer)
    assert used(manager)[0] == 7


def test_a_large_body_that_is_not_valid_is_refused(manager):
    for body in (
        b"[" * LARGE,
        b'{"a": ' + b"1" * LARGE,
        b" " * LARGE + b"x",
        b'{"model": 5, "a": "' + b"x" * LARGE + b'"}',
    ):
        response = call(QuotaMiddleware(Model(), manager), body)
        assert response.status == 400
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("begins", [False, True])
def test_a_body_that_does_not_arrive_is_given_up(manager, begins):
    async def main():
        app = QuotaMiddleware(Model(), manager, body_timeout=0.05)
        call = Call(app, parts=[b"{", b"}"])
        call._messages = call._messages[:1] if begins else []
        receive = call._receive

        async def slowly():
            return await receive()

        call._receive = slowly
        old = body_module.DRAIN_SECONDS
        try:
            body_module.DRAIN_SECONDS = 0.05
            response = await call
        finally:
            body_module.DRAIN_SECONDS = old
        assert (response.status, response.error["code"]) == (408, "body_timeout")
        assert "within 0.05 s" in response.error["message"]
        assert response.headers["connection"] == "close"
        assert app.bodies.inflight_bytes == 0

    asyncio.run(main())
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_drained_and_then_answered(manager, declared):
    async def main():
        headers = [(b"content-length", b"100000")] if declared else []
        app = QuotaMiddleware(Model(), manager, max_body_bytes=50_000)
        call = Call(app, parts=[b" " * 400] * 250, headers=headers)
        response = await call
        assert (response.status, response.error["code"]) == (413, "body_too_large")
        assert call.received == 250
        assert "connection" not in response.headers, "all was read, so that the connection can be used again"
        assert app.bodies.inflight_bytes == 0

    asyncio.run(main())
    assert manager.get_stats().total_checks == 0


def test_a_body_without_end_is_drained_for_a_while_only(manager):
    async def main():
        call = Call(QuotaMiddleware(Model(), manager, max_body_bytes=1000), parts=[b" " * 400] * 250)
        response = await call
        assert response.status == 413
        assert 10 <= call.received <= 20
        assert response.headers["connection"] == "close"
        call = Call(QuotaMiddleware(Model(), manager, max_body_bytes=5), parts=[b" " * 9] * 99, http_version="2")
        assert "connection" not in (await call).headers

    asyncio.run(main())


def test_a_client_that_asks_before_it_sends_is_answered_at_once(manager):
    async def main():
        headers = [(b"content-length", b"100000"), (b"expect", b"100-continue")]
        call = Call(QuotaMiddleware(Model(), manager, max_body_bytes=1000), parts=[b" " * 400] * 250, headers=headers)
        assert (await call).status == 413
        assert call.received == 0

    asyncio.run(main())


def test_a_real_client_reads_its_413(manager):
    app = QuotaMiddleware(Model(), manager, max_body_bytes=1 << 20)
    with serving(app) as address, httpx.Client(base_url=address, timeout=20) as client:
        for content in (b" " * (4 << 20), iter([b" " * 65536] * 60)):
            response = client.post("/v1/chat/completions", content=content)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "body_too_large"


def test_bodies_that_are_decompressed_stay_within_the_bound(manager):
    body = gzip.compress(b'{"model": "m", "a": "' + b"x" * 100_000 + b'"}')
    response = call(
        QuotaMiddleware(Model(), manager, max_body_bytes=50_000), body, headers=[(b"content-encoding", b"gzip")]
    )
    assert response.status == 413


def test_all_bodies_together_stay_within_a_bound(manager):
    async def main():
        model = Model(tokens=5)
        model.go.clear()
        app = QuotaMiddleware(model, manager, max_body_bytes=1000, max_inflight_bytes=2500)
        body = json.dumps(chat(padding="x" * 800)).encode()
        first = [Call(app, body=body).start() for _ in range(2)]
        while model.running < 2:
            await asyncio.sleep(0)
        assert app.bodies.inflight_bytes == 2 * len(body)
        for parts in ([body], [body[:500], body[500:]]):
            response = await Call(app, parts=parts)
            assert (response.status, response.error["code"]) == (503, "overloaded")
            assert int(response.headers["retry-after"]) > 0
        model.go.set()
        await asyncio.gather(*[call.task for call in first])
        assert app.bodies.inflight_bytes == 0
        assert (await Call(app, body=body)).status == 200
        broken = Call(app, parts=[body[:500], body[500:]])
        broken._messages.pop()
        broken.start()
        await asyncio.sleep(0)
        await broken.leave()
        assert app.bodies.inflight_bytes == 0

    asyncio.run(main())


def test_the_bounds_by_default(manager):
    bodies = QuotaMiddleware(Model(), manager).bodies
    assert (bodies.max_body_bytes, bodies.max_inflight_bytes, bodies.seconds) == (32 << 20, 512 << 20, 30)
