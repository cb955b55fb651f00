"""The transports for httpx and httpx2: what they wait for, what they send, and what they settle, to the token."""

import asyncio
import contextlib
import gzip
import importlib
import json
import threading
import time

import pytest
from http_server import serving
from patience import until
from provider import OUTPUT, PROMPT, Provider

from modelquota import ResourceQuotaManager
from modelquota.client import AsyncQuotaTransport, QuotaTransport

USED = PROMPT + OUTPUT
CHAT = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "x" * 36}]}
ESTIMATE = 10 + 100
NO_LIMITS = dict.fromkeys(
    (
        "max_requests_per_second", "max_tokens_per_second", "max_tokens_per_day", "max_requests_per_hour",
        "max_requests_per_day", "max_tokens_per_hour",
    )
)  # fmt: skip


@pytest.fixture(params=["httpx", "httpx2"], scope="module")
def library(request):
    return pytest.importorskip(request.param)


@pytest.fixture
def manager():
    with ResourceQuotaManager() as manager:
        manager.set_quota("m", **NO_LIMITS)
        yield manager


@pytest.fixture
def provider():
    return Provider()


@pytest.fixture
def address(provider):
    with serving(provider) as address:
        yield address


@contextlib.contextmanager
def client_of(library, manager, address, **options):
    with library.Client(transport=QuotaTransport(manager, **options), base_url=address, timeout=20) as client:
        yield client


def used(manager, model_id="m"):
    usage = manager.get_usage(model_id)
    return usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests


def test_a_request_is_settled_by_what_the_answer_reports(library, manager, provider, address):
    with client_of(library, manager, address) as client:
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert answer.json()["usage"]["total_tokens"] == USED
        assert used(manager) == (USED, 1, 0)
        assert client.get("/v1/models").status_code == 200  # no model runs
        assert client.post("/v1/files", json={}).status_code == 200
        assert used(manager) == (USED, 1, 0)
    assert provider.requests[0][2] == CHAT


@pytest.mark.parametrize("report", [True, False])
def test_a_stream_is_settled_by_its_usage_or_else_by_what_passed(library, manager, provider, address, report):
    provider.report = report
    with (
        client_of(library, manager, address) as client,
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer,
    ):
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert used(manager) == ((USED if report else 10 + 5), 1, 0)


def test_closing_an_answer_early_settles_what_passed_and_ends_it_at_the_server(library, manager, provider, address):
    provider.pace = 0.1
    with client_of(library, manager, address) as client:
        with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            lines = answer.iter_lines()
            assert "One" in next(lines)
            assert used(manager)[2] == 1
        assert used(manager) == (10 + 1, 1, 0)
        until(lambda: provider.left == 1)


@pytest.mark.parametrize("path", ["/openai/v1/chat/completions", "/api/v1/chat/completions", "/chat/completions"])
def test_an_api_may_be_below_any_path(library, manager, address, path):
    with client_of(library, manager, address) as client:
        client.post(path, json=CHAT)
    assert used(manager) == (USED, 1, 0)


def test_compressed_answers_are_read_and_arrive_as_they_were_sent(library, manager, provider, address):
    body = gzip.compress(json.dumps(provider.openai_whole(CHAT)).encode())
    provider.script = [(200, {"content-encoding": "gzip"}, body)]
    with client_of(library, manager, address) as client:
        assert client.post("/v1/chat/completions", json=CHAT).json()["usage"]["total_tokens"] == USED
        assert used(manager) == (USED, 1, 0)
        encodings = {"accept-encoding": "br, zstd, gzip;q=0.5"}
        client.post("/v1/chat/completions", json=CHAT, headers=encodings)
        client.get("/v1/models", headers=encodings)
    assert [headers["accept-encoding"] for _, headers, _ in provider.requests[1:]] == [
        "gzip;q=0.5",
        "br, zstd, gzip;q=0.5",
    ]


@pytest.mark.parametrize(
    ("status", "left"),
    [(401, (0, 0)), (403, (0, 0)), (404, (0, 0)), (400, (0, 1)), (429, (0, 1)), (500, (0, 1)), (503, (0, 1))],
)
def test_an_error_costs_no_tokens(library, manager, provider, address, status, left):
    provider.script = [(status, {}, {"error": {"message": "no"}})]
    with client_of(library, manager, address) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == status
    assert used(manager) == (*left, 0)


def test_a_server_that_cannot_be_reached_costs_nothing(library, manager):
    with client_of(library, manager, "http://127.0.0.1:9") as client, pytest.raises(library.ConnectError):
        client.post("/v1/chat/completions", json=CHAT)
    assert used(manager) == (0, 0, 0)


def test_a_server_that_does_not_answer_in_time_may_have_worked(library, manager, provider, address):
    provider.pace = 5.0
    with (
        client_of(library, manager, address) as client,
        pytest.raises(library.ReadTimeout),
        client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}, timeout=0.2) as answer,
    ):
        answer.read()
    assert used(manager) == (10, 1, 0)  # the prompt, since the stream had begun


def test_a_denial_is_answered_as_the_api_would(library, manager, provider, address):
    manager.set_quota("m", **{**NO_LIMITS, "max_requests_per_hour": 1}, on_violation="reject")
    with client_of(library, manager, address) as client:
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 200
        answer = client.post("/v1/chat/completions", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "insufficient_quota")
        assert 3500 < int(answer.headers["retry-after"]) <= 3661
        manager.set_quota("m", **{**NO_LIMITS, "max_tokens_per_hour": ESTIMATE - 1}, on_violation="reject")
        answer = client.post("/v1/messages", json=CHAT)
        assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert len(provider.requests) == 1


def test_requests_wait_for_their_turn(library, manager, provider, address):
    provider.pace = 0.05
    manager.set_quota("m", **NO_LIMITS, max_concurrent_requests=1, on_violation="queue")
    most = 0
    with client_of(library, manager, address) as client:

        def ask():
            client.post("/v1/chat/completions", json={**CHAT, "stream": True}).raise_for_status()

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            most = max(most, provider.running)
            time.sleep(0.005)
    assert most == 1
    assert used(manager) == (4 * USED, 4, 0)


def test_a_guess_does_not_make_a_request_impossible(library, manager, address):
    manager.set_quota("m", **{**NO_LIMITS, "max_tokens_per_hour": 50}, on_violation="reject")
    body = {name: value for name, value in CHAT.items() if name != "max_tokens"}
    with client_of(library, manager, address) as client:
        assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert used(manager) == (USED, 1, 0)


def test_ids_of_your_own(library, manager, address, caplog):
    manager.set_quota("account", **NO_LIMITS)
    ids = lambda model: {"m": ("account", "m"), "alias": "m"}.get(model)  # noqa: E731
    with client_of(library, manager, address, ids=ids, default_model="alias") as client:
        for model in ("m", "alias", "other"):
            assert client.post("/v1/chat/completions", json={**CHAT, "model": model}).status_code == 200
        client.post("/v1/completions", json={"prompt": "x", "model": None})
    assert used(manager) == (3 * USED, 3, 0)
    assert used(manager, "account") == (USED, 1, 0)


def test_what_cannot_be_counted_is_sent_and_told_once(library, manager, provider, address, caplog):
    with client_of(library, manager, address) as client:
        for _ in range(2):
            client.post("/v1/chat/completions", json={"messages": []}, headers={"x": "y"})
    assert len(provider.requests) == 2
    assert [record.getMessage() for record in caplog.records if record.name == "modelquota"] == [
        "POST /v1/chat/completions is passed on without being counted: it names no model, and there is no default_model"
    ]
    assert used(manager) == (0, 0, 0)


def test_a_pause_without_a_quota_has_an_end_too(library, provider, address):
    provider.script = [(429, {"retry-after": "61"}, {})]
    with ResourceQuotaManager() as manager, client_of(library, manager, address) as client:
        assert [client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(2)] == [429, 429]
    assert len(provider.requests) == 1


def test_a_body_that_is_made_while_it_is_sent(library, manager, provider, address):
    pieces = [json.dumps(CHAT).encode()[:20], json.dumps(CHAT).encode()[20:]]
    with client_of(library, manager, address) as client:
        headers = {"content-type": "application/json"}
        assert client.post("/v1/chat/completions", content=iter(pieces), headers=headers).status_code == 200
    assert provider.requests[0][2] == CHAT
    assert used(manager) == (USED, 1, 0)


class TestAfter429:
    """The whole line of an id pauses; not each caller by itself."""

    @staticmethod
    def limited(provider, headers, times=1):
        provider.script = [(429, headers, {"error": {"message": "slow down"}})] * times

    def test_the_next_callers_wait_until_the_time_that_was_told(self, library, manager, provider, address):
        self.limited(provider, {"retry-after-ms": "400"})
        with client_of(library, manager, address) as client:
            start = time.monotonic()
            assert client.post("/v1/chat/completions", json=CHAT).status_code == 429
            answers = []
            threads = [
                threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=CHAT)))
                for _ in range(3)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert time.monotonic() - start >= 0.4
        assert [answer.status_code for answer in answers] == [200] * 3
        assert len(provider.requests) == 4

    def test_another_transport_of_the_same_manager_waits_too_and_another_id_does_not(
        self, library, manager, provider, address
    ):
        manager.set_quota("other", **NO_LIMITS)
        self.limited(provider, {"retry-after": "30"})
        with client_of(library, manager, address) as first, client_of(library, manager, address, timeout=0.1) as second:
            first.post("/v1/chat/completions", json=CHAT)
            answer = second.post("/v1/chat/completions", json=CHAT)
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert 28_000 < int(answer.headers["retry-after-ms"]) <= 30_000
            assert second.post("/v1/chat/completions", json={**CHAT, "model": "other"}).status_code == 200
        assert len(provider.requests) == 2
        assert used(manager) == (0, 1, 0)  # the request stays counted at the server, too

    def test_of_several_ids_the_last_one_pauses(self, library, manager, provider, address):
        for model_id in ("account", "other"):
            manager.set_quota(model_id, **NO_LIMITS)
        self.limited(provider, {"retry-after": "30"})
        with client_of(library, manager, address, ids=lambda model: ("account", model), timeout=0.1) as client:
            models = ("m", "m", "other")
            found = [client.post("/v1/chat/completions", json={**CHAT, "model": model}) for model in models]
        assert [answer.status_code for answer in found] == [429, 429, 200]
        assert len(provider.requests) == 2

    def test_a_quota_that_rejects_does_not_wait(self, library, manager, provider, address):
        manager.update_quota("m", on_violation="reject")
        self.limited(provider, {"retry-after": "5"})
        with client_of(library, manager, address) as client:
            start = time.monotonic()
            assert [client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(2)] == [429, 429]
            assert time.monotonic() - start < 4
        assert len(provider.requests) == 1

    @pytest.mark.parametrize("headers", [{}, {"retry-after": "soon"}, {"retry-after": "-5"}, {"retry-after": "nan"}])
    def test_without_a_time_nothing_pauses(self, library, manager, provider, address, headers):
        self.limited(provider, headers)
        with client_of(library, manager, address) as client:
            assert [client.post("/v1/chat/completions", json=CHAT).status_code for _ in range(2)] == [429, 200]

    def test_requests_in_the_queue_when_the_pause_began_wait_too(self, library, manager, provider, address):
        manager.set_quota("m", **NO_LIMITS, max_concurrent_requests=1, on_violation="queue")
        self.limited(provider, {"retry-after-ms": "500"})
        with client_of(library, manager, address) as client:
            with manager.reserve("m", 1) as held:
                answers = []
                threads = [
                    threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=CHAT)))
                    for _ in range(2)
                ]
                for thread in threads:
                    thread.start()
                until(lambda: manager.get_usage("m").queued_requests == 2)
                start = time.monotonic()
                held.cancel()
            for thread in threads:
                thread.join()
            assert time.monotonic() - start >= 0.5
        assert sorted(answer.status_code for answer in answers) == [200, 429]
        assert used(manager) == (USED, 2, 0)


class TestWhatOthersUsed:
    """If less is left than there should be, the difference is charged."""

    @pytest.mark.parametrize("style", ["x-ratelimit-{}-{}", "anthropic-ratelimit-{1}-{0}"])
    def test_the_difference_is_charged_to_the_limit_of_the_same_size(self, library, manager, provider, address, style):
        manager.set_quota("m", **{**NO_LIMITS, "max_tokens_per_hour": 1000, "max_requests_per_day": 50})
        provider.headers = {
            style.format("limit", "tokens"): "1000",
            style.format("remaining", "tokens"): "600",
            style.format("limit", "requests"): "50",
            style.format("remaining", "requests"): "47",
        }
        with client_of(library, manager, address) as client:
            client.post("/v1/chat/completions", json=CHAT)
        # by its count 400 tokens were used with this request's estimate of 110, of which 12 are the truth
        assert used(manager) == (400 - ESTIMATE + USED, 3, 0)

    @pytest.mark.parametrize(
        "headers",
        [
            {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "990"},  # more than we think
            {"x-ratelimit-limit-tokens": "2000", "x-ratelimit-remaining-tokens": "5"},  # about another limit
            {"x-ratelimit-remaining-tokens": "5"},
            {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "1001"},
            {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "-1"},
            {"x-ratelimit-limit-tokens": "1000", "x-ratelimit-remaining-tokens": "many"},
        ],
    )
    def test_anything_else_teaches_nothing(self, library, manager, provider, address, headers):
        manager.set_quota("m", **{**NO_LIMITS, "max_tokens_per_hour": 1000})
        provider.headers = headers
        with client_of(library, manager, address) as client:
            client.post("/v1/chat/completions", json=CHAT)
        assert used(manager) == (USED, 1, 0)


class TestAsync:
    """The same in asyncio."""

    @staticmethod
    def run(library, manager, address, body, **options):
        async def main():
            transport = AsyncQuotaTransport(manager, **options)
            async with library.AsyncClient(transport=transport, base_url=address, timeout=20) as client:
                return await body(client)

        return asyncio.run(main())

    def test_plain_and_streamed(self, library, manager, provider, address):
        async def body(client):
            await client.post("/v1/chat/completions", json=CHAT)
            async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
                return [line async for line in answer.aiter_lines() if line]

        assert self.run(library, manager, address, body)[-1] == "data: [DONE]"
        assert used(manager) == (2 * USED, 2, 0)

    def test_closing_early_settles_what_passed(self, library, manager, provider, address):
        provider.pace = 0.1

        async def body(client):
            async with client.stream("POST", "/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
                async for _ in answer.aiter_lines():
                    break

        self.run(library, manager, address, body)
        assert used(manager) == (10 + 1, 1, 0)
        until(lambda: provider.left == 1)

    def test_a_canceled_request_leaves_nothing_open(self, library, manager, provider, address):
        provider.pace = 5.0
        manager.set_quota("m", **NO_LIMITS, max_concurrent_requests=1, on_violation="queue")

        async def body(client):
            tasks = [
                asyncio.create_task(client.post("/v1/chat/completions", json={**CHAT, "stream": True}))
                for _ in range(3)
            ]
            while not provider.requests or manager.get_usage("m").queued_requests < 2:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(library, manager, address, body)
        usage = manager.get_usage("m")
        assert (usage.concurrent_requests, usage.queued_requests, usage.requests_this_hour) == (0, 0, 1)

    def test_the_line_pauses_and_the_loop_does_not(self, library, manager, provider, address):
        provider.script = [(429, {"retry-after-ms": "300"}, {})]

        async def body(client):
            await client.post("/v1/chat/completions", json=CHAT)
            start = time.monotonic()
            waiting = asyncio.create_task(client.post("/v1/chat/completions", json=CHAT))
            ticks = 0
            while not waiting.done():
                await asyncio.sleep(0.01)
                ticks += 1
            return waiting.result().status_code, time.monotonic() - start, ticks

        status, seconds, ticks = self.run(library, manager, address, body)
        assert status == 200
        assert seconds >= 0.25
        assert ticks >= 5

    def test_denials(self, library, manager, provider, address):
        manager.set_quota("m", **{**NO_LIMITS, "max_requests_per_hour": 0}, on_violation="reject")

        async def body(client):
            return await client.post("/v1/chat/completions", json=CHAT)

        answer = self.run(library, manager, address, body)
        assert (answer.status_code, provider.requests) == (400, [])


def test_a_transport_of_your_own_is_used_and_closed(library, manager):
    sent, closed = [], []

    def answer(request):
        sent.append(request)
        return library.Response(200, json={"usage": {"prompt_tokens": 1, "completion_tokens": 2}})

    class Mock(library.MockTransport):
        def close(self):
            closed.append(True)

    with library.Client(transport=QuotaTransport(manager, Mock(answer))) as client:
        client.post("http://api/v1/chat/completions", json=CHAT)
    assert (len(sent), closed) == (1, [True])
    assert used(manager) == (3, 1, 0)


def test_the_room_needs_no_client_library():
    module = importlib.import_module("modelquota.client.transport")
    assert not {"httpx", "httpx2"} & set(vars(module))
