"""The page of the quotas: what it is given to show, and which requests may see it."""

import asyncio
import base64
import gzip
import json
import re
import threading

import pytest
from asgi_client import Call, Model
from patience import until

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager, Tokens
from modelquota.asgi import QuotaMiddleware, QuotaPage
from modelquota.asgi.page import MOST_SHOWN, page_state
from modelquota.quota.limits import DENYING

unlimited = ResourceQuotaConfig.unlimited

JSON = [(b"accept", b"application/json")]
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def manager():
    manager = ResourceQuotaManager()
    manager.set_quota(
        "chat-70b", max_tokens_per_hour=1000, max_requests_per_hour=None, max_ram_mb=100, on_violation="reject"
    )
    manager.set_quota("code-34b-instruct-with-a-name-that-is-longer-than-a-phone-is-wide-" + "x" * 60)
    manager.set_quota(HOSTILE, on_violation="warn", max_tokens_per_hour=5)
    return manager


def get(app, path="/quota", headers=(), method="GET", **scope):
    return asyncio.run(Call(app, path, method=method, headers=headers, **scope).run())


def limits_of(state, model):
    """Of each limit of a model, what does not change and what was read, by its name."""
    kind = state["kinds"][model["kind"]]
    return {limit["name"]: (limit, row) for limit, row in zip(kind["limits"], model["limits"], strict=True)}


def test_what_the_page_shows(manager):
    held = manager.reserve("chat-70b", 800, 60)
    assert not manager.check_quota("chat-70b", 300)
    assert manager.check_quota(HOSTILE, 300)
    state = page_state(manager)
    assert (state["models_total"], state["models_found"]) == (3, 3)
    assert (state["admitted"], state["serving"], state["waiting"], state["refused"]) == (2, 1, 0, 1)
    chat, _, hostile = state["models"]
    assert (chat["id"], chat["serving"], chat["refused"]) == ("chat-70b", 1, 1)
    assert state["kinds"][chat["kind"]]["action"] == "reject"
    limits = limits_of(state, chat)
    assert limits["tokens_per_hour"][0]["max"] == 1000
    assert limits["tokens_per_hour"][1] == [800, 200, 80]
    assert limits["ram"][1] == [60, 40, 60]
    assert "requests_per_hour" not in limits
    assert list(limits)[-2:] == ["ram", "ssd"]
    assert chat["violations"] == {"quota_limit": 1}
    assert (hostile["refused"], hostile["warned"]) == (0, 1)
    held.release()


def test_the_part_of_a_host_in_a_cluster(manager):
    assert page_state(manager)["cluster"] is None
    lua_store = pytest.importorskip("lua_store", reason="the simulated store needs lupa")
    quota = unlimited("m", max_concurrent_requests=8, cluster_concurrency=True, max_requests_per_second=50)
    with ResourceQuotaManager(cluster=lua_store.LocalStore()) as host:
        host.set_quota(quota)
        host.set_quota(unlimited("other"))
        until(lambda: host.check_quota("m", 1).allowed)
        until(lambda: host.cluster.status().state == "ok" and host.cluster.shares())
        with host.reserve("m", 1):
            until(lambda: any(share.used and share.limit == "concurrent_requests" for share in host.cluster.shares()))
            state = page_state(host)
        cluster = state["cluster"]
        assert (cluster["state"], cluster["leads"], cluster["nodes"], cluster["error"]) == ("ok", True, 1, None)
        assert 0 < cluster["lease_seconds"] <= host.cluster.store.lease_sec
        assert cluster["starved"] == host.cluster.status().starved
        model, other = state["models"]
        assert {*model["shares"]} == {"concurrency", "requests_per_second"} <= {*limits_of(state, model)}
        own, free, ghosts = model["shares"]["concurrency"]
        assert 1 <= own == 8 - free
        assert ghosts == 0
        assert "shares" not in other
        json.dumps(state)


def test_a_rate_and_its_burst_are_one_limit():
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota(unlimited("m", max_requests_per_second=40, burst_requests=80))
    for _ in range(61):
        assert manager.check_quota("m", 0)
    state = page_state(manager)
    ((limit, row),) = limits_of(state, state["models"][0]).values()
    assert (limit["label"], limit["max"], limit["burst"]) == ("Requests per second", 40, 80)
    assert row == [61, 59, pytest.approx(100 * 61 / 120, abs=0.01), 21]


def test_meters_are_under_their_model_and_do_not_count_again():
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota(unlimited("a#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=500_000_000))
    manager.set_quota(unlimited("b", max_tokens_per_hour=1_000))
    manager.set_quota(unlimited("a", max_tokens_per_hour=1_000))
    manager.set_quota(unlimited("c#output", token_weights=(0, 0, 1), max_tokens_per_day=10, on_violation="reject"))
    with manager.reserve("a", Tokens(input=100, output=20)):
        assert manager.check_quota("c", Tokens(input=5, output=5))
        assert not manager.check_quota("c", Tokens(output=20))
        state = page_state(manager)
    assert [model["id"] for model in state["models"]] == ["a", "b", "c"]
    a, b, c = state["models"]
    (usd,), (output,) = a["meters"], c["meters"]
    assert (usd["id"], output["id"], b["meters"], c["kind"]) == ("a#usd", "c#output", [], None)
    ((limit, (used, *_)),) = limits_of(state, usd).values()
    assert (limit["label"], limit["unit"], limit["max"], used) == ("Dollars per month", "usd", 500_000_000, 600)
    assert (output["refused"], a["admitted"], usd["admitted"]) == (1, 1, 1)
    names = ("models_total", "serving", "admitted", "refused", "checks", "tokens_charged")
    assert [state[name] for name in names] == [2, 1, 2, 1, 3, 120], "tokens of an id without a quota are not counted"


@pytest.mark.parametrize(
    ("quota", "refuses"),
    [
        ({"max_requests_per_hour": 1, "on_violation": "reject"}, True),
        ({"max_requests_per_hour": 1, "on_violation": "throttle"}, True),
        ({"max_requests_per_hour": 1, "on_violation": "queue", "grace_period_sec": 3600}, False),
        ({"max_requests_per_minute": 1, "on_violation": "throttle"}, False),
        ({"max_requests_per_minute": 1, "on_violation": "throttle", "grace_period_sec": 59}, True),
        ({"max_requests_per_minute": 1, "on_violation": "reject"}, True),
        ({"max_requests_per_minute": 1, "on_violation": "warn"}, False),
        ({"max_requests_per_hour": 1, "on_violation": "reject", "shadow_limits": ["requests_per_hour"]}, False),
        ({"max_concurrent_requests": 1, "on_violation": "reject"}, True),
        ({"max_concurrent_requests": 1, "on_violation": "queue"}, False),
        ({"max_ram_mb": 1, "on_violation": "reject"}, False),
    ],
)
def test_a_limit_that_is_full_refuses_if_no_request_waits_long_enough(quota, refuses):
    """A limit on memory refuses only requests that ask for some, so being full does not tell."""
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota(unlimited("m", **quota))
    held = manager.reserve("m", 1, ram_needed_mb=1)
    state = page_state(manager)
    ((limit, (_, left, _)),) = limits_of(state, state["models"][0]).values()
    assert (left, limit["refuses_when_full"]) == (0, refuses)
    manager.enforcement_enabled = False
    ((limit, _),) = limits_of(page_state(manager), state["models"][0]).values()
    assert (limit["denies"], limit["refuses_when_full"]) == (False, False)
    held.release()


def test_every_limit_is_left_what_a_report_says():
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota("m", **{record.quota_field: 100 for record in DENYING})
    held = manager.reserve("m", 7, ram_needed_mb=5, ssd_needed_mb=3)
    usage = manager.get_usage("m")
    limits = limits_of(state := page_state(manager), state["models"][0])
    assert len(limits) == len(DENYING)
    for record in DENYING:
        used, left, percent, *_ = limits[record.limit.name.lower()][1]
        assert (left, percent) == (usage.left[record.limit], round(usage.percent[record.limit], 2))
        assert used == sum(getattr(usage, field) for field in record.usage_fields)
    held.release()


@pytest.mark.parametrize(
    ("find", "ids"),
    [
        ("", ["Tenant/Acme", "llama", "x"]),
        ("tenant/", ["Tenant/Acme"]),
        (" ACME ", ["Tenant/Acme"]),
        ("#usd", ["llama", "x"]),
        ("ma", ["llama"]),
        ("nothing", []),
    ],
)
def test_search(find, ids):
    manager = ResourceQuotaManager(clock=ManualClock())
    for model_id in ("Tenant/Acme", "llama", "llama#usd", "x#usd"):
        manager.set_quota(unlimited(model_id, max_tokens_per_day=5))
    for state in (
        page_state(manager, find=find),
        get(QuotaPage(manager), headers=JSON, query_string=f"find={find.replace('#', '%23')}".encode()).json,
    ):
        assert [model["id"] for model in state["models"]] == ids
        assert (state["models_found"], state["models_total"]) == (len(ids), 2)


def test_without_any_quota():
    assert page_state(ResourceQuotaManager())["models"] == page_state(ResourceQuotaManager())["kinds"] == []


def test_who_waits_and_who_was_admitted_after_a_wait_is_not_refused(manager):
    manager.update_quota("chat-70b", max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("chat-70b", 1)
        waits = [asyncio.create_task(manager.acquire_async("chat-70b", 1)) for _ in range(2)]
        await asyncio.sleep(0.01)
        assert [page_state(manager)["models"][0][key] for key in ("waiting", "refused", "waited")] == [2, 0, 0]
        held.release()
        (await waits[0]).release()
        (await waits[1]).release()

    asyncio.run(main())
    assert [page_state(manager)["models"][0][key] for key in ("waiting", "refused", "waited")] == [0, 0, 2]


def test_of_many_models_those_that_need_attention_are_shown():
    manager = ResourceQuotaManager(clock=ManualClock())
    for number in range(MOST_SHOWN + 50):
        manager.set_quota(f"m{number}", max_requests_per_hour=0 if number == 7 else None, on_violation="reject")
    manager.set_quota(unlimited("m2030#x", max_tokens_per_day=100))
    manager.check_quota("m7", 1)
    manager.check_quota("m9", 1)
    manager.check_quota("m2030", 90)
    state = page_state(manager)
    assert sum(1 + len(model["meters"]) for model in state["models"]) == MOST_SHOWN
    assert (state["models_total"], state["models_found"]) == (MOST_SHOWN + 50, MOST_SHOWN + 50)
    shown = {model["id"]: model for model in state["models"]}
    assert {"m7", "m9", "m2030"} <= set(shown)
    assert [meter["id"] for meter in shown["m2030"]["meters"]] == ["m2030#x"]
    assert list(shown) == sorted(shown, key=lambda model_id: int(model_id[1:])), "they stay in order"
    assert len(state["kinds"]) == 3


def test_the_page_is_opt_in_and_passes_nothing_on(manager):
    response = get(QuotaMiddleware(Model(answer={"from": "the application"}), manager))
    assert response.json == {"from": "the application"}
    model = Model()
    response = get(QuotaMiddleware(model, manager, page="/quota"))
    assert response.status == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert model.calls == []
    assert get(QuotaMiddleware(model, manager, page="/quota"), headers=JSON).json == page_state(manager)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_page_is_read_only(manager, method):
    response = get(QuotaPage(manager), method=method)
    assert (response.status, response.headers["allow"]) == (405, "GET, HEAD")


def test_head_has_the_headers_only(manager):
    response = get(QuotaPage(manager), method="HEAD")
    assert response.body == b""
    assert int(response.headers["content-length"]) > 1000


@pytest.mark.parametrize("later", [False, True])
def test_the_page_can_be_protected(manager, later):
    right = b"Basic " + base64.b64encode(b"me:secret")

    def allow(scope):
        return dict(scope["headers"]).get(b"authorization") == right

    async def allow_later(scope):
        await asyncio.sleep(0)
        return allow(scope)

    app = QuotaMiddleware(Model(), manager, page="/quota", allow_page=allow_later if later else allow)
    for headers in ([], JSON, [(b"authorization", b"Basic xyz")]):
        response = get(app, headers=headers)
        assert response.status == 401
        assert response.headers["www-authenticate"].startswith("Basic realm=")
        assert b"chat-70b" not in response.body
    assert get(app, headers=[(b"authorization", right)]).status == 200


def test_long_json_is_compressed_for_those_who_take_it(manager):
    accepts = [*JSON, (b"accept-encoding", b"br, gzip")]
    short = get(QuotaPage(manager), headers=accepts)
    assert "content-encoding" not in short.headers
    for number in range(200):
        manager.set_quota(f"m{number}")
    plain, packed = get(QuotaPage(manager), headers=JSON), get(QuotaPage(manager), headers=accepts)
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert json.loads(gzip.decompress(packed.body)) == plain.json
    assert len(packed.body) == int(packed.headers["content-length"]) < len(plain.body) / 5


def test_the_loop_goes_on_while_the_state_is_read(manager, monkeypatch):
    going_on = threading.Event()

    def slow(*args, **keywords):
        assert going_on.wait(30), "the loop is held up"
        return {"models": []}

    monkeypatch.setattr("modelquota.asgi.page.page_state", slow)

    async def main():
        call = asyncio.create_task(Call(QuotaPage(manager), "/quota", method="GET", headers=JSON).run())
        await asyncio.sleep(0)
        going_on.set()
        return await call

    assert asyncio.run(main()).json == {"models": []}


def test_the_page_is_one_file_without_outside_assets(manager):
    response = get(QuotaPage(manager))
    html = response.body.decode()
    assert not re.search(r"(src|href)\s*=|url\(|@import|https?://", html)
    assert [html.count(f"<{tag}>") for tag in ("style", "script")] == [1, 1]
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert "require-trusted-types-for 'script'" in policy


def test_no_data_becomes_markup_or_code_and_nothing_is_kept(manager):
    html = get(QuotaPage(manager)).body.decode()
    assert len(html) > 20_000
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser",
                 "localStorage", "sessionStorage", "document.cookie", " on", " style="):  # fmt: skip
        part = html.partition("<template")[2] if sink.startswith(" ") else html
        assert not re.search(re.escape(sink) + (r"\w+=" if sink == " on" else ""), part), sink


@pytest.mark.parametrize("accept", [[], JSON])
@pytest.mark.parametrize("sent", [0, 1])
def test_a_client_that_leaves_is_no_error(manager, accept, sent):
    """A server may report it by an OSError of `send`."""
    left = []

    async def send(message):
        if len(left) == sent:
            raise ConnectionResetError("the client has left")
        left.append(message)

    scope = {"type": "http", "method": "GET", "path": "/quota", "headers": accept}
    asyncio.run(QuotaPage(manager)(scope, None, send))
    assert len(left) == sent
