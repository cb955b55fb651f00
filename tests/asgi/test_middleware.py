"""The middleware without streams: which requests are admitted, what they hold, what is settled and released."""

import asyncio
import contextlib
import gc
import json
import sys

import pytest
from asgi_client import CHAT_PROMPT, OPEN, Call, Model, body_of, chat, reply, used

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import Demand, QuotaMiddleware, RequestRefusedError, openai_routes


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **OPEN)
    return manager


def run(coroutine):
    result = asyncio.run(coroutine)
    gc.collect()  # a grant that was left over warns, and a warning is an error
    return result


def test_the_usage_of_the_response_is_settled_and_the_grant_released(manager):
    async def main():
        model = Model(tokens=33)
        response = await Call(QuotaMiddleware(model, manager), body=chat())
        assert response.status == 200
        assert response.json["usage"]["completion_tokens"] == 33
        assert json.loads(model.calls[0]) == chat()

    run(main())
    assert used(manager) == (33, 0, 0)
    assert manager.get_usage("m").requests_this_hour == 1


def test_the_estimate_is_held_while_the_request_is_served(manager):
    async def main():
        model = Model(tokens=5)
        model.go.clear()
        call = Call(QuotaMiddleware(model, manager), body=chat(max_tokens=70, n=2)).start()
        while not model.running:
            await asyncio.sleep(0)
        assert used(manager) == (CHAT_PROMPT + 140, 1, 0)
        model.go.set()
        await call.task
        assert used(manager) == (5, 0, 0)

    run(main())


def test_quotas_are_settled_before_the_last_byte_is_sent(manager):
    seen = []

    async def main():
        call = Call(QuotaMiddleware(Model(tokens=7), manager), body=chat())
        send = call._send

        async def watching(message):
            seen.append((message["type"], used(manager)))
            await send(message)

        call._send = watching
        await call

    run(main())
    assert seen == [("http.response.start", (110, 1, 0)), ("http.response.body", (7, 0, 0))]


@pytest.mark.parametrize(
    ("model", "stands"),
    [
        (Model(), 110),
        (Model(answer={"usage": {"total_tokens": 21}}), 21),
        (Model(answer={"usage": {"input_tokens": 4, "output_tokens": 5}}), 9),
        (Model(answer={"usage": {"total_tokens": -1}}), 110),
        (Model(answer={"usage": {"total_tokens": True}}), 110),
        (Model(answer={"usage": [1]}), 110),
        (Model(answer=[1], headers=((b"content-type", b"text/plain"),)), 110),
        (Model(answer=b'{"usage": {"total_tokens": 3}', headers=((b"content-type", b"application/json"),)), 110),
        (Model(answer={"usage": {"total_tokens": 3}}, headers=((b"content-type", b"text/html"),)), 110),
        (Model(answer={"text": "x" * 100_000, "usage": {"total_tokens": 3}, "model": "m"}), 3),
        (Model(answer={"x": 'a "usage": {"total_tokens": 9}', "usage": {"total_tokens": 3}}), 3),
        (Model(status=422, answer={"detail": "no"}), 0),
        (Model(status=500, answer={"usage": {"total_tokens": 8}}), 0),
    ],
)
def test_what_stands_after_a_response(manager, model, stands):
    async def main():
        response = await Call(QuotaMiddleware(model, manager), body=chat())
        assert response.status == model.status

    run(main())
    assert used(manager) == (stands, 0, 0)
    assert manager.get_usage("m").requests_this_hour == 1


def test_an_exception_of_the_application_passes_and_costs_no_tokens(manager):
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    async def main():
        with pytest.raises(ZeroDivisionError):
            await Call(QuotaMiddleware(broken, manager), body=chat())

    run(main())
    assert used(manager) == (0, 0, 0)


def test_what_comes_after_the_response_is_not_under_the_grant(manager):
    async def with_background(scope, receive, send):
        await reply(send, {"usage": {"total_tokens": 4}})
        assert used(manager) == (4, 0, 0)
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await asyncio.sleep(0.01)
        with_background.done = True

    run(Call(QuotaMiddleware(with_background, manager), body=chat()).run())
    assert with_background.done


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v1/chat/completions", {}),
        ("POST", "/v1/models", {}),
        ("PUT", "/v1/chat/completions", {}),
    ],
)
def test_other_requests_pass_through(manager, method, path, scope):
    async def main():
        return await Call(QuotaMiddleware(Model(tokens=5), manager), path, b"{", method=method, **scope)

    assert run(main()).status == 200
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("scope", [{"type": "lifespan"}, {"type": "websocket", "path": "/v1/realtime"}])
def test_other_protocols_pass_through(manager, scope):
    seen = []

    async def app(*arguments):
        seen.append(arguments)

    asyncio.run(QuotaMiddleware(app, manager)(scope, "receive", "send"))
    assert seen == [(scope, "receive", "send")]


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/v1/chat/completions/", ""),
        ("/api/v1/chat/completions", "/api"),
        ("/v1/completions", ""),
        ("/v1/responses", ""),
        ("/v1/embeddings", ""),
    ],
)
def test_the_paths_of_openai_are_decided(manager, path, root):
    run(Call(QuotaMiddleware(Model(tokens=5), manager), path, chat(), root_path=root).run())
    assert used(manager) == (5, 0, 0)


def test_an_unknown_model_is_served_and_counted(manager):
    response = run(Call(QuotaMiddleware(Model(tokens=5), manager), body=chat("other")).run())
    assert response.status == 200
    assert "ratelimit" not in response.headers
    assert manager.get_stats().total_checks == 1


def test_a_queued_request_waits_without_blocking_and_is_served_in_turn(manager):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        model = Model(tokens=5)
        model.go.clear()
        app = QuotaMiddleware(model, manager)
        calls = [Call(app, body=chat(max_tokens=number)).start() for number in range(1, 6)]
        while manager.get_usage("m").queued_requests < 4:
            await asyncio.sleep(0)
        assert model.running == 1
        model.go.set()
        await asyncio.gather(*(call.task for call in calls))
        assert [json.loads(call)["max_tokens"] for call in model.calls] == [1, 2, 3, 4, 5]

    run(main())
    assert used(manager) == (25, 0, 0)


def test_a_queued_client_that_leaves_gives_up_its_place(manager):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        model = Model(tokens=5)
        held = manager.reserve("m", 1)
        app = QuotaMiddleware(model, manager)
        calls = [Call(app, body=chat(max_tokens=number)).start() for number in range(3)]
        while manager.get_usage("m").queued_requests < 3:
            await asyncio.sleep(0)
        await calls[1].leave()
        assert manager.get_usage("m").queued_requests == 2
        held.cancel()
        await asyncio.gather(calls[0].task, calls[2].task)
        assert [json.loads(call)["max_tokens"] for call in model.calls] == [0, 2]

    run(main())
    assert used(manager) == (10, 0, 0)


@pytest.mark.parametrize("end", ["denied", "canceled"])
def test_a_request_that_waited_in_vain_leaves_no_task(end):
    manager = ResourceQuotaManager()
    manager.set_quota("m", **{**OPEN, "max_concurrent_requests": 1}, on_violation="queue", grace_period_sec=0.05)
    grant = manager.reserve("m", 1)

    async def main():
        middleware = QuotaMiddleware(Model(), manager)
        call = Call(middleware, body=chat())
        bodies = [await call._receive()]

        async def receive():
            """Not every server ends this with the response."""
            return bodies.pop() if bodies else await asyncio.get_running_loop().create_future()

        call.app = lambda scope, _, send: middleware(scope, receive, send)
        call.start()
        while not manager.get_usage("m").queued_requests:
            await asyncio.sleep(0.001)
        if end == "canceled":
            call.task.cancel()
        await asyncio.wait((call.task,))
        await asyncio.sleep(0)
        return asyncio.all_tasks() - {asyncio.current_task()}

    with grant:
        assert not asyncio.run(main())


def test_a_client_that_leaves_before_the_first_byte_ends_the_work_if_that_is_wanted(manager):
    async def main():
        model = Model(tokens=5)
        model.go.clear()
        call = Call(QuotaMiddleware(model, manager, cancel_on_disconnect=True), body=chat()).start()
        while not model.running:
            await asyncio.sleep(0)
        await call.leave()
        assert model.running == 0
        assert asyncio.current_task().cancelling() == call.task.cancelling() == 0

    run(main())
    assert used(manager) == (CHAT_PROMPT, 0, 0)
    assert manager.get_usage("m").requests_this_hour == 1


def test_work_goes_on_after_a_disconnect(manager):
    async def main():
        model = Model(tokens=5)
        model.go.clear()
        call = Call(QuotaMiddleware(model, manager), body=chat()).start()
        while not model.running:
            await asyncio.sleep(0)
        call.gone.set()
        await asyncio.sleep(0.01)
        assert used(manager) == (110, 1, 0)
        model.go.set()
        await call.task

    run(main())
    assert used(manager) == (5, 0, 0)


def test_the_application_hears_of_the_disconnect(manager):
    heard = []

    async def listening(scope, receive, send):
        await body_of(receive)
        heard.append((await receive())["type"])

    async def main():
        call = Call(QuotaMiddleware(listening, manager), body=chat()).start()
        await asyncio.sleep(0.01)
        await call.leave()

    run(main())
    assert heard == ["http.disconnect"]
    assert used(manager)[1:] == (0, 0)


@pytest.mark.parametrize("swallow", [False, True])
def test_a_disconnect_cancels_nothing_that_comes_after_the_request(manager, swallow):
    """The task is the server's: it goes on, uncanceled, even if the application hides the cancellation."""

    async def stubborn(scope, receive, send):
        await body_of(receive)
        with contextlib.suppress(asyncio.CancelledError) if swallow else contextlib.nullcontext():
            await asyncio.sleep(PATIENT)

    async def server(call):
        await call.run()
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(0)
        return "went on"

    async def main():
        call = Call(QuotaMiddleware(stubborn, manager, cancel_on_disconnect=True), body=chat())
        task = asyncio.create_task(server(call))
        await asyncio.sleep(0.01)
        call.gone.set()
        assert await task == "went on"

    run(main())
    assert used(manager)[1:] == (0, 0)


PATIENT = 60


@pytest.mark.parametrize("phase", ["queued", "served"])
def test_a_server_that_shuts_down_cancels_and_everything_is_released(manager, phase):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        model = Model(tokens=5)
        model.go.clear()
        held = manager.reserve("m", 1) if phase == "queued" else None
        call = Call(QuotaMiddleware(model, manager), body=chat()).start()
        await asyncio.sleep(0.01)
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        if held is not None:
            held.cancel()

    run(main())
    assert used(manager) == (0, 0, 0)


def test_a_body_that_breaks_off_touches_no_quota(manager):
    async def main():
        call = Call(QuotaMiddleware(Model(), manager), parts=[b"{", b"}"])
        call._messages.pop()
        call.start()
        await asyncio.sleep(0)
        await call.leave()

    run(main())
    assert manager.get_stats().total_checks == 0


def test_routes_of_ones_own(manager):
    manager.update_quota("m", max_ram_mb=100)

    async def generate(request):
        await asyncio.sleep(0)
        if request.header("X-Skip"):
            return None
        return Demand("m", estimated_tokens=len(request.body), ram_needed_mb=60)

    async def main():
        model = Model()
        app = QuotaMiddleware(model, manager, routes={**openai_routes(), "/generate": generate})
        model.go.clear()
        call = Call(app, "/generate", b"12345").start()
        while not model.running:
            await asyncio.sleep(0)
        assert manager.get_usage("m").reserved_ram_mb == 60
        assert used(manager) == (5, 1, 0)
        model.go.set()
        await call.task
        assert (await Call(app, "/generate", b"12345", headers=[(b"x-skip", b"1")])).status == 200

    run(main())
    assert used(manager) == (5, 0, 0)


def test_tenant_user_and_model_are_decided_at_once(manager):
    for model_id in ("tenant/org:acme", "tenant/user:bob"):
        manager.set_quota(model_id, **OPEN | {"on_violation": "reject"})
    manager.update_quota("tenant/user:bob", max_tokens_per_hour=150)

    def identity(request):
        if request.header("authorization") != "Bearer bob":
            raise RequestRefusedError(401, "this key is not known", "invalid_api_key")
        return "org:acme", "user:bob"

    async def main():
        app = QuotaMiddleware(Model(tokens=100), manager, identity=identity)
        bob = [(b"Authorization", b"Bearer bob")]
        assert (await Call(app, body=chat(), headers=bob)).status == 200
        response = await Call(app, body=chat(), headers=bob)
        assert response.status == 429
        assert response.error["message"].startswith("Tenant user:bob: tokens per hour: 100 of 150 used, 110 asked")
        assert response.headers["x-ratelimit-remaining-tokens"] == "50"
        response = await Call(app, body=chat())
        assert (response.status, response.error["code"]) == (401, "invalid_api_key")
        # a client that calls the model by its own tenant's name does not get to that quota by it
        assert (await Call(app, body=chat("tenant/org:acme", 1), headers=bob)).status == 200

    run(main())
    assert used(manager, "m") == (100, 0, 0)
    assert used(manager, "tenant/org:acme") == (200, 0, 0)


def test_a_full_table_is_no_error_of_the_server():
    manager = ResourceQuotaManager(default_quota=ResourceQuotaConfig("any"), max_models=1)
    app = QuotaMiddleware(Model(tokens=1), manager)
    assert run(Call(app, body=chat("a")).run()).status == 200
    response = run(Call(app, body=chat("b")).run())
    assert (response.status, response.error["code"]) == (503, "too_many_models")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks start eagerly from Python 3.12 on")
def test_a_cancellation_that_comes_late_hits_nothing_after_the_request(manager):
    """With eager tasks the disconnect may be noticed while the application runs, which then ends without waiting."""

    async def listening(scope, receive, send):
        await body_of(receive)
        assert (await receive())["type"] == "http.disconnect"

    async def main():
        asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        call = Call(QuotaMiddleware(listening, manager, cancel_on_disconnect=True), body=chat())
        receive = call._receive

        async def leaving():
            message = await receive()
            call.gone.set()
            return message

        call._receive = leaving
        await call.run()
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(0)

    run(main())
    assert used(manager)[1:] == (0, 0)
