"""Clients that leave: the application hears of it, the grant stays until it returns, and what was done is charged."""

import asyncio
import contextlib
import gc
import json
import socket
import threading
import time

import pytest
from asgi_client import CHAT_PROMPT, OPEN, Call, Model, body_of, chat, reply, used
from http_server import serving
from patience import until
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.asgi import QuotaMiddleware

EVENTS = [(b"content-type", b"text/event-stream")]
WORD = b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n'


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **OPEN)
    return manager


def run(coroutine):
    result = asyncio.run(coroutine)
    gc.collect()
    return result


class Listening:
    """Works until it is told that the client has left, and then a little longer."""

    def __init__(self, *pieces, headers=EVENTS, after=0):
        self.pieces, self.headers, self.after = pieces, headers, after
        self.heard = []
        self.cleaned_up = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, scope, receive, send):
        await body_of(receive)
        if self.pieces:
            await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        self.heard.append((await receive())["type"])
        self.heard.append((await receive())["type"])
        self.cleaned_up.set()
        await self.may_end.wait()


@pytest.mark.parametrize(("pieces", "tokens"), [([], CHAT_PROMPT), ([WORD] * 3, CHAT_PROMPT + 3)])
def test_the_grant_stays_until_the_application_returns(manager, pieces, tokens):
    async def main():
        model = Listening(*pieces)
        call = Call(QuotaMiddleware(model, manager), body=chat()).start()
        await asyncio.sleep(0.01)
        call.gone.set()
        await model.cleaned_up.wait()
        assert model.heard == ["http.disconnect"] * 2
        assert used(manager)[1] == 1, "its work is not done"
        assert not call.task.done()
        model.may_end.set()
        await call.task

    run(main())
    assert used(manager) == (tokens, 0, 0), "what was done: the prompt, and what passed"


def test_an_answer_to_a_client_that_left_is_settled_as_any_other(manager):
    async def main():
        model = Model(tokens=33)
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
    assert used(manager) == (33, 0, 0)


def test_an_application_that_fails_because_the_client_left_costs_what_was_done(manager):
    async def model(scope, receive, send):
        await body_of(receive)
        await receive()
        raise OSError("the client has left")

    async def main():
        call = Call(QuotaMiddleware(model, manager), body=chat()).start()
        await asyncio.sleep(0.01)
        with pytest.raises(OSError, match="the client has left"):
            await call.leave()

    run(main())
    assert used(manager) == (CHAT_PROMPT, 0, 0)


@pytest.mark.parametrize("moment", ["waiting", "as it is admitted"])
@pytest.mark.parametrize("stray", [0, 3])
def test_a_waiting_client_that_leaves_leaves_no_trace(manager, moment, stray):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("m", 1)
        model = Model(tokens=5)
        call = Call(QuotaMiddleware(model, manager), body=chat())
        call._messages += [{"type": "http.request", "body": b"", "more_body": False}] * stray
        call.start()
        while manager.get_usage("m").queued_requests < 1:
            await asyncio.sleep(0)
        if moment == "waiting":
            await call.leave()
            assert call.response.status is None
            assert used(manager) == (1, 1, 0)
            held.cancel()
        else:
            held.cancel()
            call.gone.set()
            await call.task
            assert used(manager)[1:] == (0, 0)
        assert model.running == 0
        assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []

    run(main())
    assert used(manager)[1:] == (0, 0)
    if moment == "waiting":
        assert used(manager)[0] == 0
        assert manager.get_usage("m").requests_this_hour == 0


def test_what_the_client_sends_after_a_wait_reaches_the_application(manager):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("m", 1)
        model = Listening()
        model.may_end.set()
        call = Call(QuotaMiddleware(model, manager), body=chat()).start()
        while manager.get_usage("m").queued_requests < 1:
            await asyncio.sleep(0)
        held.release()
        await asyncio.sleep(0.01)
        await call.leave()
        assert model.heard == ["http.disconnect"] * 2

    run(main())


def test_a_server_that_shuts_down_during_a_wait_leaves_no_trace(manager):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        with manager.reserve("m", 0):
            call = Call(QuotaMiddleware(Model(), manager), body=chat()).start()
            while manager.get_usage("m").queued_requests < 1:
                await asyncio.sleep(0)
            call.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call.task
            assert used(manager)[2] == 0

    run(main())
    assert used(manager) == (0, 0, 0)


@pytest.mark.parametrize("rounds", range(30))
def test_a_wait_and_a_disconnect_at_any_distance(manager, rounds):
    """The disconnect comes some steps of the loop before or after the admission: one of the two wins."""
    manager.update_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("m", 0)
        call = Call(QuotaMiddleware(Model(tokens=5), manager), body=chat()).start()
        for step in range(30):
            if step == 15:
                held.release()
            if step == rounds:
                call.gone.set()
            await asyncio.sleep(0)
        call.gone.set()
        await call.task

    run(main())
    assert used(manager)[1:] == (0, 0)
    assert used(manager)[0] in (0, 5, CHAT_PROMPT)


class OneAtATime:
    """A model whose handlers run in threads, as in llama-cpp-python: two at once would crash it."""

    def __init__(self):
        self.lock = threading.Lock()
        self.most = self.running = self.begun = self.served = 0

    def work(self):
        with self.lock:
            self.begun += 1
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(0.08)
        with self.lock:
            self.running -= 1
            self.served += 1
        return JSONResponse({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})


def test_six_clients_that_leave_are_served_one_at_a_time_and_all_are_charged():
    manager = ResourceQuotaManager()
    manager.set_quota("m", **OPEN | {"max_concurrent_requests": 1, "on_violation": "queue"})
    model = OneAtATime()

    def chat_in_a_thread(request):
        return model.work()

    app = Starlette(routes=[Route("/v1/chat/completions", chat_in_a_thread, methods=["POST"])])
    app.add_middleware(QuotaMiddleware, manager=manager)
    body = json.dumps(chat()).encode()
    request = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    with serving(app) as address:
        for number in range(6):
            with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), timeout=20) as connection:
                connection.sendall(request)
                until(lambda number=number: model.begun > number)
        until(lambda: used(manager)[1:] == (0, 0))
    assert model.most == 1
    assert model.served == 6
    assert used(manager)[0] == 60


@pytest.mark.parametrize("version", ["2.3", "2.4"])
def test_a_stream_of_starlette_ends_when_its_client_leaves(manager, version):
    """By the disconnect that it receives, or, from ASGI 2.4 on, by the error of the server's send()."""
    made = []

    async def chat_stream(request):
        async def events():
            while True:
                made.append(1)
                yield WORD
                await asyncio.sleep(0)

        return StreamingResponse(events(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/chat/completions", chat_stream, methods=["POST"])])
    app.add_middleware(QuotaMiddleware, manager=manager)

    async def main():
        call = Call(app, body=chat(stream=True), asgi={"version": "3.0", "spec_version": version})
        send = call._send

        async def failing(message):
            if call.gone.is_set() and version == "2.4":
                raise OSError("gone")
            await send(message)

        call._send = failing
        call.start()
        await call.until(lambda response: len(response.chunks) >= 3)
        with contextlib.suppress(Exception):
            await call.leave()

    run(main())
    assert used(manager)[1:] == (0, 0)
    assert CHAT_PROMPT + 3 <= used(manager)[0] <= CHAT_PROMPT + len(made)


def test_cancelling_is_an_option(manager):
    async def main():
        model = Model(tokens=5)
        model.go.clear()
        call = Call(QuotaMiddleware(model, manager, cancel_on_disconnect=True), body=chat()).start()
        while not model.running:
            await asyncio.sleep(0)
        await call.leave()
        assert model.running == 0

    run(main())
    assert used(manager) == (CHAT_PROMPT, 0, 0)


def test_with_cancelling_what_comes_after_the_response_goes_on(manager):
    ended = []

    async def with_background(scope, receive, send):
        await reply(send, {"usage": {"total_tokens": 4}})
        await asyncio.sleep(0.01)
        ended.append(json.loads((await receive())["body"])["model"])

    run(Call(QuotaMiddleware(with_background, manager, cancel_on_disconnect=True), body=chat()).run())
    assert ended == ["m"]
    assert used(manager) == (4, 0, 0)
