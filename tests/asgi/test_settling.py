"""What is charged: by status, at most what a guess may cost, and what the client is told about it."""

import asyncio
import gc
import json

import pytest
from asgi_client import CHAT_PROMPT, OPEN, Call, Model, chat, used

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager, Tokens
from modelquota.asgi import Demand, QuotaMiddleware, RequestRefusedError, denial_answer, read_demand
from modelquota.protocols.durations import duration

REJECT = OPEN | {"on_violation": "reject"}


@pytest.fixture
def clock():
    return ManualClock(10**12)


@pytest.fixture
def manager(clock):
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("m", **REJECT)
    return manager


def call(app, body=None, path="/v1/chat/completions", **options):
    response = asyncio.run(Call(app, path, chat() if body is None else body, **options).run())
    gc.collect(1)  # a grant that was left over warns, and a warning is an error
    return response


@pytest.mark.parametrize("status", [301, 302, 304, 307, 401, 403, 404, 405])
def test_requests_that_never_reached_a_model_cost_nothing(manager, status):
    manager.update_quota("m", max_requests_per_hour=3)
    for _ in range(9):
        assert call(QuotaMiddleware(Model(tokens=50, status=status), manager)).status == status
    assert used(manager) == (0, 0, 0)
    assert manager.get_usage("m").requests_this_hour == 0


@pytest.mark.parametrize("status", [400, 402, 409, 422, 429, 500, 502, 503, 529])
def test_other_errors_cost_the_request(manager, status):
    call(QuotaMiddleware(Model(tokens=50, status=status), manager))
    assert used(manager) == (0, 0, 0)
    assert manager.get_usage("m").requests_this_hour == 1


@pytest.mark.parametrize(
    ("status", "requests", "tokens"), [(404, 1, 0), (418, 0, 0), (500, 1, 50), (502, 0, 0), (200, 1, 50), (201, 1, 0)]
)
def test_what_a_status_costs_can_be_changed(manager, status, requests, tokens):
    charge = {404: "request", 418: "nothing", "5xx": "usage", 502: "nothing", 201: "request"}
    call(QuotaMiddleware(Model(tokens=50, status=status), manager, charge=charge))
    assert used(manager)[0] == tokens
    assert manager.get_usage("m").requests_this_hour == requests


@pytest.mark.parametrize(
    "limits",
    [{"max_tokens_per_hour": 200}, {"max_tokens_per_day": 200}, {"max_tokens_per_second": 100, "burst_tokens": 100},
     {"max_tokens_per_hour": CHAT_PROMPT}],
)  # fmt: skip
@pytest.mark.parametrize("fields", [{}, {"n": 40}, {"max_tokens": -1}])
def test_a_guess_is_cut_to_what_the_smallest_limit_leaves(manager, limits, fields):
    manager.update_quota("m", **limits)
    seen = []

    async def model(scope, receive, send):
        seen.append(manager.get_usage("m").tokens_this_day)
        await Model(tokens=5)(scope, receive, send)

    body = {"model": "m", "messages": chat()["messages"], **fields}
    assert call(QuotaMiddleware(model, manager), body).status == 200
    assert seen == [200 if 200 in limits.values() or 100 in limits.values() else CHAT_PROMPT]
    manager.remove_quota("m")
    manager.set_quota("m", **REJECT | limits)
    assert call(QuotaMiddleware(model, manager), chat(max_tokens=250)).status == 400, "what is demanded is not cut"


def test_a_guess_is_cut_to_the_limits_of_the_tenant_too(manager):
    manager.set_quota("tenant/eve", **REJECT | {"max_tokens_per_hour": 100})
    app = QuotaMiddleware(Model(tokens=5), manager, identity=lambda request: "eve")
    assert call(app, {"model": "m", "messages": chat()["messages"]}).status == 200


def test_a_guess_is_cut_to_limits_that_an_id_is_about_to_get(manager):
    manager.default_quota = {"new*": ResourceQuotaConfig("any", **REJECT | {"max_tokens_per_hour": 100})}
    app = QuotaMiddleware(Model(tokens=5), manager)
    assert call(app, {"model": "new-1", "messages": []}).status == 200


def test_a_guess_follows_a_change_of_limits_at_once(manager):
    app = QuotaMiddleware(Model(tokens=5), manager)
    for limit in (1000, 90, 50, None, 40):
        manager.remove_quota("m")
        manager.set_quota("m", **REJECT | {"max_tokens_per_hour": limit})
        assert call(app, {"model": "m", "messages": []}).status == 200


def test_a_shadow_limit_cuts_no_guess(manager):
    manager.update_quota("m", max_tokens_per_day=20, shadow_limits=["tokens_per_day"])
    seen = []

    async def model(scope, receive, send):
        seen.append(used(manager)[0])
        await Model(tokens=5)(scope, receive, send)

    call(QuotaMiddleware(model, manager), {"model": "m", "messages": []})
    assert seen == [256]


def test_a_hook_reads_other_shapes(manager):
    def usage(answer):
        return Tokens(answer["cost"], 0, 2) if "cost" in answer else None

    call(QuotaMiddleware(Model(answer={"cost": 40}), manager, usage=usage))
    assert used(manager)[0] == 42


def test_retries_are_spread_upwards_only(manager):
    manager.update_quota("m", max_requests_per_second=1, burst_requests=0)
    app = QuotaMiddleware(Model(tokens=1), manager)
    call(app)
    waits = [int(call(app).headers["retry-after-ms"]) for _ in range(60)]
    assert min(waits) >= 1017, "never before the time"
    assert max(waits) <= 1017 * 1.1
    assert len(set(waits)) > 25
    app = QuotaMiddleware(Model(tokens=1), manager, retry_spread=0)
    assert {call(app).headers["retry-after-ms"] for _ in range(9)} == {"1017"}


@pytest.mark.parametrize(
    ("mode", "own", "ietf"), [("all", True, True), ("openai", True, False), ("none", False, False)]
)
def test_which_headers_are_sent(manager, mode, own, ietf):
    manager.update_quota("m", max_requests_per_hour=1)
    app = QuotaMiddleware(Model(tokens=1), manager, headers=mode)
    for _ in range(2):
        response = call(app)
        assert ("x-ratelimit-remaining-tokens" in response.headers) is own
        assert ("ratelimit" in response.headers) is ("ratelimit-policy" in response.headers) is ietf
    assert response.status == 429
    assert "retry-after" in response.headers


def test_anthropic_has_headers_of_its_own(manager):
    manager.update_quota("m", max_requests_per_hour=9, max_tokens_per_hour=1000)
    answer = {"content": [], "usage": {"input_tokens": 3, "output_tokens": 7}}
    response = call(QuotaMiddleware(Model(answer=answer), manager), path="/v1/messages")
    found = {name: value for name, value in response.headers.items() if "anthropic" in name}
    reset = found.pop("anthropic-ratelimit-tokens-reset")
    assert reset == found.pop("anthropic-ratelimit-requests-reset")
    assert reset.endswith("Z")
    assert len(reset) == len("2026-01-01T00:00:00Z")
    assert found == {
        "anthropic-ratelimit-requests-limit": "9", "anthropic-ratelimit-requests-remaining": "8",
        "anthropic-ratelimit-tokens-limit": "1000", "anthropic-ratelimit-tokens-remaining": "890",
    }  # fmt: skip
    app = QuotaMiddleware(Model(answer=answer), manager, headers="openai")
    assert "x-ratelimit-limit-requests" in call(app, path="/v1/messages").headers


def test_tokens_that_are_only_reserved_are_not_spent(manager):
    manager.update_quota("m", max_tokens_per_hour=150)
    app = QuotaMiddleware(Model(tokens=100), manager, busy_retry_seconds=3, retry_spread=0)
    with manager.reserve("m", 100) as grant:
        response = call(app)
        assert (response.error["code"], response.headers["retry-after"]) == ("rate_limit_exceeded", "3")
        assert response.error["message"].endswith("retry in 3.0 s.")
        grant.settle(100)
        response = call(app)
        assert (response.error["code"], response.headers["retry-after"]) == ("insufficient_quota", "3620")
        assert response.error["message"].endswith("retry in 60 min 20 s.")


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0 ms"), (758, "758 ms"), (1200, "1.2 s"), (59_900, "59.9 s"), (3_658_000, "60 min 58 s"),
     (83_400_000, "23 h 10 min"), (86_400_000 * 30, "30 days")],
)  # fmt: skip
def test_durations_in_messages_are_for_people(ms, text):
    assert duration(ms) == text


def test_a_request_that_waited_counts_once_and_is_not_denied():
    manager = ResourceQuotaManager()
    manager.set_quota("m", **OPEN | {"max_concurrent_requests": 1, "on_violation": "queue"})

    async def main():
        app = QuotaMiddleware(Model(tokens=5), manager)
        held = manager.reserve("m", 0)
        calls = [Call(app, body=chat()).start() for _ in range(3)]
        while manager.get_usage("m").queued_requests < 3:
            await asyncio.sleep(0)
        held.cancel()
        await asyncio.gather(*[one.task for one in calls])

    asyncio.run(main())
    stats = manager.get_stats()
    assert (stats.total_checks, stats.allowed_requests, stats.waited_requests, stats.denied_requests) == (4, 4, 3, 0)
    assert stats.tokens_charged - stats.tokens_refunded == 15


@pytest.mark.parametrize("closes", ["before the response", "in the stream"])
def test_a_manager_that_is_closed_breaks_no_response(manager, closes):
    """As when a server shuts down: the response goes on, and nothing is counted any more."""
    word = b'data: {"choices": [{"delta": {"content": "word"}}]}\n\n'

    async def model(scope, receive, send):
        await receive()
        if closes == "before the response":
            manager.close()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        for _ in range(3):
            await send({"type": "http.response.body", "body": word, "more_body": True})
            manager.close()
        await send({"type": "http.response.body", "body": b""})

    response = call(QuotaMiddleware(model, manager), chat(max_tokens=1))
    assert response.chunks == [word] * 3 + [b""]


# -- endpoints of one's own


@pytest.mark.parametrize("parsed", [False, True])
def test_a_demand_is_read_without_the_middleware(manager, parsed):
    body = chat(max_tokens=70, n=2)
    demand = read_demand("/v1/chat/completions", body if parsed else json.dumps(body).encode())
    assert demand == Demand("m", CHAT_PROMPT + 140, CHAT_PROMPT)
    assert read_demand("/v1beta/models/gem:generateContent", {}).model_id == "gem"
    assert read_demand("/v1/messages/count_tokens", {}) is read_demand("/x", {}) is None
    assert read_demand("/generate", {"text": "x" * 8}, default_model="m", default_output_tokens=9) == Demand(
        "m", 11, 2, guessed_tokens=9
    )
    manager.update_quota("m", max_tokens_per_hour=50)
    assert read_demand("/v1/chat/completions", {"model": "m"}, manager=manager).estimated_tokens == 50
    with pytest.raises(RequestRefusedError, match="model is missing"):
        read_demand("/v1/chat/completions", {})
    with pytest.raises(RequestRefusedError, match="not valid JSON"):
        read_demand("/v1/chat/completions", b"{")


@pytest.mark.parametrize("protocol", ["openai", "anthropic", "ollama"])
def test_a_denial_is_answered_as_by_the_middleware(manager, protocol):
    path = {"openai": "/v1/chat/completions", "anthropic": "/v1/messages", "ollama": "/api/chat"}[protocol]
    manager.update_quota("m", max_requests_per_second=1, burst_requests=0)
    app = QuotaMiddleware(Model(tokens=1), manager, retry_spread=0)
    call(app, path=path)
    response = call(app, path=path)
    demand = Demand("m", 110)
    with pytest.raises(QuotaExceededError) as error:
        manager.reserve(demand.model_id, demand.estimated_tokens)
    answer = denial_answer(manager, error.value, protocol=protocol, demand=demand, retry_spread=0)
    headers = {name.decode(): value.decode() for name, value in answer.headers}
    assert (answer.status, headers, json.loads(answer.body)) == (response.status, response.headers, response.json)
    assert denial_answer(manager, error.value).status == 429
    with pytest.raises(ValueError, match="there is no protocol"):
        denial_answer(manager, error.value, protocol="x")
