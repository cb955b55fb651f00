"""What clients get: errors in OpenAI's format, the time to retry, and how much is left."""

import asyncio
import calendar
import gc
import math
import re
import time

import pytest
from asgi_client import OPEN, Call, Model, chat
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import configs, extreme_configs, tokens
from structured_fields import parse_list

from modelquota import Limit, ManualClock, ModelLockedError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import Demand, QuotaMiddleware, denial_answer
from modelquota.asgi.ratelimit import _ANTHROPIC, _OPENAI, MOST, LimitHeaders, bounds_of, go_duration

REJECT = OPEN | {"on_violation": "reject"}


@pytest.fixture
def clock():
    return ManualClock(10**12)


@pytest.fixture
def manager(clock):
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("m", **REJECT)
    return manager


def ask(manager, body=None, *, model=None, **options):
    app = QuotaMiddleware(model or Model(tokens=10), manager, **{"retry_spread": 0, **options})
    response = asyncio.run(Call(app, body=chat() if body is None else body).run())
    gc.collect()
    return response


def test_too_many_requests_per_second_are_a_rate_limit(manager, clock):
    manager.update_quota("m", max_requests_per_second=2, burst_requests=0)
    assert ask(manager).status == ask(manager).status == 200
    response = ask(manager)
    assert response.status == 429
    assert response.error == {
        "message": "Model m: requests per second: 2 of 2 used, 1 asked; retry in 1.1 s.",
        "type": "requests",
        "param": None,
        "code": "rate_limit_exceeded",
    }
    assert response.headers["content-type"] == "application/json"
    assert response.headers["content-length"] == str(len(response.body))
    assert response.headers["retry-after"] == "2"
    assert response.headers["retry-after-ms"] == "1017"
    assert response.headers["x-should-retry"] == "true"
    assert response.headers["x-ratelimit-limit-requests"] == "2"
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert response.headers["x-ratelimit-reset-requests"] == "1.017s"
    assert parse_list(response.headers["ratelimit"])["requests-per-second"] == {"r": 0, "t": 2}
    clock.advance_ns(1_016_000_000)
    assert ask(manager).status == 429
    clock.advance_ns(1_000_000)
    assert ask(manager).status == 200


def test_tokens_have_a_type_of_their_own(manager):
    manager.update_quota("m", max_tokens_per_second=100, burst_tokens=20)
    assert ask(manager, model=Model(tokens=110)).status == 200
    response = ask(manager)
    assert (response.status, response.error["type"], response.error["code"]) == (429, "tokens", "rate_limit_exceeded")
    assert response.headers["x-ratelimit-limit-tokens"] == "120"
    assert response.headers["x-ratelimit-remaining-tokens"] == "10"


def test_an_hour_that_is_used_up_is_an_insufficient_quota(manager):
    manager.update_quota("m", max_tokens_per_hour=150)
    assert ask(manager, model=Model(tokens=100)).status == 200
    response = ask(manager)
    assert response.status == 429
    assert (response.error["type"], response.error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert "tokens per hour: 100 of 150 used, 110 asked; retry in 60 min 20 s" in response.error["message"]
    assert response.headers["retry-after"] == "3620"
    assert response.headers["x-should-retry"] == "false"
    assert response.headers["x-ratelimit-reset-tokens"] == "1h0m20s"


def test_tokens_that_are_only_reserved_are_no_insufficient_quota(manager):
    """They may come back any moment: clients are to try again soon, and do not take it for final."""
    manager.update_quota("m", max_tokens_per_hour=150)
    with manager.reserve("m", 100) as grant:
        response = ask(manager, busy_retry_seconds=3)
        assert response.status == 429
        assert (response.error["type"], response.error["code"]) == ("tokens", "rate_limit_exceeded")
        assert (response.headers["retry-after"], response.headers["x-should-retry"]) == ("3", "true")
        grant.settle(100)
        assert ask(manager).error["code"] == "insufficient_quota"


def test_a_model_that_nobody_can_decide_on_is_service_unavailable(manager):
    error = ModelLockedError(manager.check_quota("m", 1))
    answer = denial_answer(manager, error, demand=Demand("m", 1), busy_retry_seconds=7, retry_spread=0)
    assert (answer.status, dict(answer.headers)[b"retry-after"]) == (503, b"7")
    assert b"its lock is held by a process that does not run" in answer.body


def test_no_known_wait_is_service_unavailable(manager):
    manager.update_quota("m", max_concurrent_requests=1)
    with manager.reserve("m", 1):
        response = ask(manager, busy_retry_seconds=7)
    assert response.status == 503
    assert (response.error["type"], response.error["code"]) == ("server_error", "overloaded")
    assert "concurrent requests: 1 of 1 used" in response.error["message"]
    assert response.headers["retry-after"] == "7"
    assert response.headers["retry-after-ms"] == "7000"
    assert parse_list(response.headers["ratelimit"])["concurrent-requests"] == {"r": 0}
    manager.update_quota("m", max_concurrent_requests=None, max_ram_mb=100)
    manager.update_memory_usage("m", 50, 0)
    routes = {"/v1/chat/completions": lambda request: Demand("m", 1, ram_needed_mb=60)}
    response = ask(manager, routes=routes)
    assert (response.status, response.error["code"]) == (503, "overloaded")


@pytest.mark.parametrize(
    ("limits", "demand", "says"),
    [
        ({"max_tokens_per_hour": 109}, Demand("m", 110), "tokens per hour: 0 of 109 used, 110 asked; never fits"),
        ({"max_tokens_per_second": 100, "burst_tokens": 9}, Demand("m", 110), "tokens per second: 0 of 109 used"),
        ({"max_ram_mb": 10}, Demand("m", 1, ram_needed_mb=11), "RAM: 0 of 10 used, 11 asked; never fits"),
        ({"max_requests_per_day": 0}, Demand("m", 1), "requests per day: 0 of 0 used, 1 asked; never fits"),
    ],
)
def test_what_never_fits_is_a_bad_request(manager, limits, demand, says):
    manager.update_quota("m", **limits)
    response = ask(manager, routes={"/v1/chat/completions": lambda request: demand})
    assert (response.status, response.error["type"]) == (400, "invalid_request_error")
    assert response.error["code"] == "request_exceeds_limit"
    assert says in response.error["message"]
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


def test_what_never_fits_is_told_even_where_another_limit_denies_first(manager):
    manager.set_quota("tenant/acme", **REJECT | {"max_requests_per_second": 1, "burst_requests": 0})
    manager.update_quota("m", max_tokens_per_hour=109)
    manager.check_quota("tenant/acme", 0)
    response = ask(manager, identity=lambda request: "acme")
    assert response.status == 400
    assert response.error["message"] == "Model m: more than its limit of tokens per hour ever admits at once."


@pytest.mark.parametrize(("unit", "word"), [("tokens", "tokens"), ("usd", "dollars")])
def test_what_exceeds_a_meter_by_itself_is_told_as_its_weights_say(manager, unit, word):
    """The request has 10 tokens of input and 100 of output."""
    manager.set_quota("tenant/acme", **REJECT | {"max_requests_per_second": 1, "burst_requests": 0})
    meter = ResourceQuotaConfig("m#x", **REJECT | {"unit": unit, "max_tokens_per_hour": 56})
    manager.set_quota(meter.replace(token_weights=(0.6, 0, 0.5)))
    manager.check_quota("tenant/acme", 0)
    assert ask(manager, identity=lambda request: "acme").status == 429
    manager.set_quota(meter.replace(token_weights=(0.61, 0, 0.51)))
    response = ask(manager, identity=lambda request: "acme")
    assert response.status == 400
    assert response.error["message"] == f"Model m#x: more than its limit of {word} per hour ever admits at once."


def test_the_meter_of_a_tenant_is_the_tenants(manager):
    manager.set_quota("tenant/acme", **REJECT)
    manager.set_quota("tenant/acme#batch", **REJECT | {"max_concurrent_requests": 0})
    response = ask(manager, identity=lambda request: "acme")
    assert response.status == 400
    manager.update_quota("tenant/acme#batch", max_concurrent_requests=1)
    with manager.reserve("tenant/acme", 1):
        response = ask(manager, identity=lambda request: "acme")
    assert (response.status, response.error["code"]) == (429, "rate_limit_exceeded")
    assert response.error["message"].startswith("Tenant acme#batch: concurrent requests: 1 of 1 used, 1 asked;")


def test_a_full_queue_tells_the_wait_of_its_head(manager):
    manager.update_quota("m", max_requests_per_second=1, burst_requests=0, on_violation="queue", max_queued_requests=0)
    assert ask(manager).status == 200
    response = ask(manager)
    assert (response.status, response.error["code"]) == (429, "rate_limit_exceeded")
    assert "queued requests: 0 of 0 used" in response.error["message"]
    assert response.headers["retry-after-ms"] == "1017"


def test_a_warning_is_served(manager):
    manager.update_quota("m", max_tokens_per_hour=1, on_violation="warn")
    response = ask(manager)
    assert response.status == 200
    assert response.headers["x-ratelimit-remaining-tokens"] == "0"


def test_the_same_headers_on_success(manager):
    manager.set_quota(
        "m",
        max_requests_per_second=10,
        burst_requests=5,
        max_tokens_per_second=1000,
        burst_tokens=9000,
        max_tokens_per_hour=20_000,
        max_requests_per_hour=1000,
        max_tokens_per_day=100_000,
        max_requests_per_day=None,
        max_concurrent_requests=4,
    )
    response = ask(manager, chat(max_tokens=90))
    assert response.status == 200
    headers = {name: value for name, value in response.headers.items() if "ratelimit" in name}
    assert headers == {
        "x-ratelimit-limit-requests": "15",
        "x-ratelimit-remaining-requests": "14",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "10000",
        "x-ratelimit-remaining-tokens": "9900",
        "x-ratelimit-reset-tokens": "1s",
        "ratelimit-policy": '"concurrent-requests";q=4;qu="concurrent-requests", "requests-per-second";q=15;w=2, '
        '"tokens-per-second";q=10000;qu="tokens";w=10, "tokens-per-hour";q=20000;qu="tokens";w=3600, '
        '"requests-per-hour";q=1000;w=3600, "tokens-per-day";q=100000;qu="tokens";w=86400',
        "ratelimit": '"concurrent-requests";r=3, "requests-per-second";r=14, "tokens-per-second";r=9900, '
        '"tokens-per-hour";r=19900, "requests-per-hour";r=999, "tokens-per-day";r=99900',
    }


def test_headers_of_a_server_behind_are_replaced(manager):
    headers = [(b"content-type", b"application/json"), (b"X-RateLimit-Limit-Tokens", b"9"), (b"x-request-id", b"r")]
    sent = []

    async def model(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def note(message):
        sent.append(message)

    async def main():
        call = Call(QuotaMiddleware(model, manager), body=chat())
        call._send = note
        await call

    asyncio.run(main())
    names = [name.lower() for name, _ in sent[0]["headers"]]
    assert names.count(b"x-ratelimit-limit-tokens") == 1
    assert (b"x-ratelimit-limit-tokens", b"1000000") in sent[0]["headers"]
    assert (b"x-request-id", b"r") in sent[0]["headers"]


def test_of_several_models_the_tightest_limit_is_told(manager):
    manager.set_quota("tenant/acme", **REJECT | {"max_tokens_per_hour": 500, "max_requests_per_hour": 3})
    response = ask(manager, identity=lambda request: "acme")
    assert response.headers["x-ratelimit-limit-tokens"] == "500"
    assert response.headers["x-ratelimit-remaining-tokens"] == "390"
    assert parse_list(response.headers["ratelimit-policy"]) == {
        "tokens-per-hour": {"q": 500, "qu": "tokens", "w": 3600},
        "requests-per-hour": {"q": 3, "w": 3600},
    }


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"[]", 400, "invalid_json", None),
        (b"\xff", 400, "invalid_json", None),
        (b'{"model": NaN}', 400, "invalid_json", None),
        (b'{"model": ' + b"[" * 100_000, 400, "invalid_json", None),
        (b'{"model": "m", "n": ' + b"1" * 5000 + b"}", 400, "invalid_json", None),
        (b"{}", 400, "invalid_value", "model"),
        (b'{"model": 5}', 400, "invalid_value", "model"),
        (b'{"model": ""}', 400, "invalid_value", "model"),
        (b'{"model": "\\u0000"}', 400, "invalid_value", "model"),
        (b'{"model": "\\ud800"}', 400, "invalid_value", "model"),
        ({"model": "x" * 256}, 400, "invalid_value", "model"),
        ({"model": "ü" * 128}, 400, "invalid_value", "model"),
        (chat(max_tokens=-2), 400, "invalid_value", "max_tokens"),
        (chat(max_tokens="5x"), 400, "invalid_value", "max_tokens"),
        (chat(max_tokens=True), 400, "invalid_value", "max_tokens"),
        (chat(max_completion_tokens=1.5), 400, "invalid_value", "max_completion_tokens"),
        (chat(max_output_tokens=2**62 + 1), 400, "invalid_value", "max_output_tokens"),
        (chat(n=0), 400, "invalid_value", "n"),
        (b" " * 1001, 413, "body_too_large", None),
    ],
)
def test_bodies_that_are_not_accepted(manager, body, status, code, param):
    limit = 1000 if status == 413 else 10**6
    response = ask(manager, body, max_body_bytes=limit)
    assert response.status == status
    assert response.error["type"] == "invalid_request_error"
    assert (response.error["code"], response.error["param"]) == (code, param)
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        (chat(), 110),
        (chat(n=3), 310),
        (chat(max_tokens=None), 266),
        (chat(max_tokens=10, max_completion_tokens=30, max_output_tokens=20), 40),
        ({"model": "m", "prompt": "x" * 8, "max_tokens": 5, "best_of": 4, "n": 2}, 22),
        ({"model": "m", "prompt": ["x" * 8, "y" * 4], "max_tokens": 5}, 13),
        ({"model": "m", "prompt": [1, 2, 3], "max_tokens": 5}, 8),
        ({"model": "m", "prompt": [[1, 2, 3], [4]], "max_tokens": 5}, 14),
        ({"model": "m", "prompt": "üü", "max_tokens": 0}, 1),
        ({"model": "m", "messages": [{"content": [{"image_url": {"url": "data:" + "x" * 9999}}]}], "n": 1}, 1256),
        ({"model": "m", "prompt": "\ud800", "max_tokens": 0}, 1),
    ],
)
def test_the_estimate(manager, body, tokens):
    seen = []

    async def model(scope, receive, send):
        seen.append(manager.get_usage("m").tokens_this_hour)
        await Model()(scope, receive, send)

    ask(manager, body, model=model)
    assert seen == [tokens]


def test_an_estimate_beyond_all_bounds_never_fits(manager):
    assert ask(manager, chat(max_tokens=2**62, n=2**62)).status == 400


def test_embeddings_have_no_output(manager):
    app = QuotaMiddleware(Model(), manager)
    body = {"model": "m", "input": ["x" * 8, "y" * 8]}
    assert asyncio.run(Call(app, "/v1/embeddings", body).run()).status == 200
    assert manager.get_usage("m").tokens_this_hour == 4


@pytest.mark.parametrize(
    ("ms", "text"),
    [(0, "0s"), (1, "1ms"), (999, "999ms"), (1000, "1s"), (8640, "8.64s"), (60_000, "1m0s"), (90_951, "1m30.951s"),
     (360_000, "6m0s"), (3_600_000, "1h0m0s"), (86_400_001, "24h0m0.001s")],
)  # fmt: skip
def test_durations_are_written_as_go_does(ms, text):
    assert go_duration(ms) == text


HEADER_VALUE = re.compile(rb"[\x21-\x7e]([\x20-\x7e]*[\x21-\x7e])?")


@given(
    quota=configs() | extreme_configs(),
    before=st.lists(tokens() | st.integers(0, 2**62), max_size=4),
    asked=tokens() | st.integers(0, 2**62),
)
@example(quota=ResourceQuotaConfig("m", max_requests_per_second=1e308, burst_requests=2**62), before=[], asked=1)
@example(quota=ResourceQuotaConfig("m", max_requests_per_second=5e-324, burst_requests=2**62), before=[], asked=1)
def test_headers_of_any_quota_keep_the_grammar_and_the_promise(quota, before, asked):
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota(quota.replace(model_id="m", on_violation="reject"))
    for count in before:
        manager.check_quota("m", count)
    manager.set_quota(quota.replace(model_id="n", on_violation="reject"))
    result = manager.check_quota("m", asked)
    for several in ("m", ("m", "n")):
        for denial in (None, None if result else result):
            headers = LimitHeaders(manager).of(several, "openai", denial)
            for name, value in headers:
                assert name == name.lower()
                assert HEADER_VALUE.fullmatch(value)
                if b"-limit-" in name or b"-remaining-" in name:
                    assert 0 <= int(value) <= MOST
            fields = dict(headers)
            if not fields:
                assert not bounds_of(quota)
                continue
            policies = parse_list(fields[b"ratelimit-policy"].decode())
            states = parse_list(fields[b"ratelimit"].decode())
            assert list(policies) == list(states)
            for name, policy in policies.items():
                assert 0 <= states[name]["r"] <= policy["q"] <= MOST
                assert policy.get("w", 1) > 0
                if "t" in states[name]:
                    assert denial is not None
                    assert states[name]["t"] == min(math.ceil(denial.retry_after_ms / 1000), MOST)
    rates = [rate for rate in (quota.max_requests_per_second, quota.max_tokens_per_second) if rate]
    within_reach = min(rates, default=1) > 1e-6  # otherwise a wait may be longer than time is reckoned
    if within_reach and not result and result.retry_after_ms is None and result.limit is not Limit.CONCURRENCY:
        assert result.never_fits
    if result or result.retry_after_ms is not None:
        assert not result.never_fits


@given(
    rate=st.floats(0.01, 50) | st.integers(1, 50),
    burst=st.integers(0, 20),
    steps=st.lists(st.tuples(st.integers(0, 3_000), st.integers(0, 30)), max_size=12),
)
def test_what_is_told_to_be_left_is_admitted(rate, burst, steps):
    """Of the tokens per second, exactly; one more may fit too, if the level is not known to the last token."""
    clock = ManualClock(10**12)
    manager = ResourceQuotaManager(clock=clock)
    limits = OPEN | {"max_tokens_per_hour": None, "max_tokens_per_second": rate, "burst_tokens": burst}
    manager.set_quota("m", **limits | {"on_violation": "reject"})
    for wait_ms, asked in steps:
        clock.advance_ns(wait_ms * 1_000_000)
        manager.check_quota("m", asked)
    told = dict(LimitHeaders(manager).of("m", "openai"))
    left = int(told[b"x-ratelimit-remaining-tokens"])
    assert left <= burst + max(rate, 1)
    if manager.get_usage("m").burst_tokens_used:
        assert manager.check_quota("m", left)


@given(
    quota=configs() | extreme_configs(),
    other=configs() | extreme_configs(),
    before=st.lists(st.tuples(tokens() | st.integers(0, 2**62), st.integers(0, 90_000_000)), max_size=4),
)
@example(
    quota=ResourceQuotaConfig("m", max_requests_per_second=1e308, burst_requests=2**62),
    other=ResourceQuotaConfig("n", max_tokens_per_second=0.3, burst_tokens=7),
    before=[],
)
@example(
    quota=ResourceQuotaConfig("m", max_requests_per_second=5e-324, burst_requests=2**62),
    other=ResourceQuotaConfig("n", max_tokens_per_hour=4),
    before=[(1, 1)] * 3,
)
@example(
    quota=ResourceQuotaConfig("m", max_tokens_per_second=0.3, burst_tokens=7),
    other=ResourceQuotaConfig("n"),
    before=[(5, 1)] * 3,
)
def test_the_headers_that_are_compiled_say_what_the_others_say(quota, other, before):
    """What every response has takes a way of its own; that of denials is plain Python."""
    clock = ManualClock(10**12)
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota(quota.replace(model_id="m", on_violation="reject"))
    manager.set_quota(other.replace(model_id="n", on_violation="reject"))
    for mode in ("all", "openai"):
        headers = LimitHeaders(manager, mode)
        for count, wait_ms in [*before, (0, 0)]:
            for ids in (("m",), ("n", "m"), ("m", "unknown", "n"), ("unknown",)):
                assert headers.of(ids, "openai") == headers._of_denial(ids, _OPENAI, None)
                told, plain = headers.of(ids, "anthropic"), headers._of_denial(ids, _ANTHROPIC, None)
                if mode == "openai":
                    assert told == headers.of(ids, "openai")
                else:  # the time goes on between the two
                    assert [field for field in told if b"reset" not in field[0]] == [
                        field for field in plain if b"reset" not in field[0]
                    ]
                    for (name, first), (same, second) in zip(told, plain, strict=True):
                        assert name == same
                        if b"reset" in name:
                            assert 0 <= seconds_of(second) - seconds_of(first) <= 1
            assert headers.of("m", "openai") == headers.of(("m",), "openai")
            assert [name for name, _ in headers.of("m", "anthropic")] == [
                name for name, _ in headers.of(("m",), "anthropic")
            ]
            manager.check_quota("m", count)
            manager.check_quota("n", count // 2)
            clock.advance_ns(wait_ms * 1_000_000)


def seconds_of(stamp):
    return calendar.timegm(time.strptime(stamp.decode(), "%Y-%m-%dT%H:%M:%SZ"))


def test_headers_follow_a_change_of_limits(manager):
    headers = LimitHeaders(manager)
    for limit in (500, 700, 500, None):
        manager.update_quota("m", max_tokens_per_hour=limit)
        found = dict(headers.of("m", "openai"))
        assert found.get(b"x-ratelimit-limit-tokens") == (None if limit is None else b"%d" % limit)
    manager.remove_quota("m")
    assert headers.of("m", "openai") == headers.of(("m",), "openai") == []
