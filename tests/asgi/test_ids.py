"""Who a request is made for: a namespace of its own, that no name of a model reaches."""

import asyncio
import gc

import pytest
from asgi_client import OPEN, Call, Model, chat, used

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import Demand, QuotaMiddleware

REJECT = OPEN | {"on_violation": "reject"}


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    for model_id in ("m", "tenant/acme", "tenant/eve", "m#usd"):
        manager.set_quota(model_id, **REJECT)
    return manager


def call(app, body=None, **options):
    response = asyncio.run(Call(app, body=chat() if body is None else body, **options).run())
    gc.collect(1)  # a grant that was left over warns, and a warning is an error
    return response


def eve(request):
    return "eve"


@pytest.mark.parametrize("answer", [None, (), []])
def test_no_identity_is_no_id(manager, answer):
    app = QuotaMiddleware(Model(tokens=5), manager, identity=lambda request: answer)
    assert call(app).status == 200
    assert used(manager)[0] == 5


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize("answer", ["eve", ["eve"], ("eve", "eve"), ("eve", "acme")])
def test_ids_get_the_namespace(manager, answer, awaited):
    async def later(request):
        return answer

    app = QuotaMiddleware(Model(tokens=5), manager, identity=later if awaited else lambda request: answer)
    assert call(app).status == 200
    assert used(manager, "tenant/eve")[0] == 5
    assert used(manager)[0] == 5
    assert used(manager, "tenant/acme")[0] == (5 if "acme" in answer else 0)


@pytest.mark.parametrize(
    ("answer", "status"),
    [("", 401), ([""], 401), ("a\0b", 400), ("x" * 300, 400), ("x" * 250, 400), ("\ud800", 400), ("acme#usd", 400),
     (5, 400), ([5], 400), (b"acme", 400), (["a"] * 15, 400), ([f"group:{n}" for n in range(20)], 400)],
)  # fmt: skip
def test_what_is_no_id_is_refused_and_touches_nothing(manager, answer, status):
    app = QuotaMiddleware(Model(tokens=5), manager, identity=lambda request: [answer] if answer == 5 else answer)
    response = call(app)
    assert (response.status, response.error["code"]) == (status, "invalid_identity")
    assert manager.get_stats().total_checks == 0


def test_fourteen_ids_and_a_model_decide_together(manager):
    manager.remove_quota("m#usd")
    manager.default_quota = ResourceQuotaConfig("any", **REJECT)
    app = QuotaMiddleware(Model(tokens=5), manager, identity=lambda request: [f"group:{n}" for n in range(14)])
    assert call(app).status == 200
    assert used(manager, "tenant/group:13")[0] == 5


@pytest.mark.parametrize("name", ["tenant/acme", "tenant/", "tenant/new", "m#usd", "#", "m#", "tenant/acme#usd"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/own"])
@pytest.mark.parametrize(("policy", "status"), [("pass", 200), ("refuse", 404), ("m", 200)])
def test_a_client_never_reaches_another_tenant_or_a_meter_by_a_name(manager, name, path, policy, status):
    manager.default_quota = ResourceQuotaConfig("any", **REJECT)
    routes = ["openai", {"/own": lambda request: Demand(request.json()["model"], 50)}]
    app = QuotaMiddleware(Model(tokens=5), manager, routes=routes, identity=eve, unknown_model=policy)
    before = sorted(manager.list_models())
    assert call(app, chat(name), path=path).status == status
    assert sorted(manager.list_models()) == before, "and makes none"
    assert used(manager, "tenant/acme") == (0, 0, 0)
    assert manager.get_usage("tenant/acme").requests_this_hour == 0
    assert manager.get_usage("m#usd").requests_this_hour == (policy == "m"), "only as a meter of its model"
    assert used(manager, "tenant/eve")[0] == (5 if status == 200 else 0), "its own tenant pays"
    assert used(manager)[0] == (5 if policy == "m" else 0)


def test_without_tenants_the_namespace_means_nothing(manager):
    assert call(QuotaMiddleware(Model(tokens=5), manager), chat("tenant/acme")).status == 200
    assert used(manager, "tenant/acme")[0] == 5
    app = QuotaMiddleware(Model(tokens=5), manager)
    assert call(app, chat("m#usd")).status == 200
    assert used(manager, "m#usd")[0] == 0, "a meter is never a model"
    assert app.unmetered == {"/v1/chat/completions": 1}


def test_another_namespace(manager):
    manager.set_quota("org:acme", **REJECT)
    app = QuotaMiddleware(Model(tokens=5), manager, identity=lambda request: "acme", identity_namespace="org:")
    call(app)
    call(app, chat("org:acme"))
    assert used(manager, "org:acme")[0] == 10
    assert manager.get_usage("org:acme").requests_this_hour == 2, "each once, for the tenant"


def test_a_tenant_with_too_many_requests_open_is_told_so_and_not_that_the_model_is_busy(manager):
    manager.update_quota("tenant/eve", max_concurrent_requests=1)
    app = QuotaMiddleware(Model(tokens=5), manager, identity=eve, busy_retry_seconds=3, retry_spread=0)
    with manager.reserve("tenant/eve", 0):
        response = call(app)
    assert (response.status, response.error["code"]) == (429, "rate_limit_exceeded")
    assert response.error["message"].startswith("Tenant eve: concurrent requests: 1 of 1 used")
    assert response.headers["retry-after"] == "3"
    manager.update_quota("m", max_concurrent_requests=1)
    with manager.reserve("m", 0):
        response = call(app)
    assert (response.status, response.error["code"]) == (503, "overloaded")


def test_more_ids_and_meters_than_can_decide_are_refused(manager):
    manager.default_quota = ResourceQuotaConfig("any", **REJECT)
    app = QuotaMiddleware(Model(tokens=5), manager, identity=lambda request: [f"group:{n}" for n in range(14)])
    response = call(app)  # the model has a meter
    assert (response.status, response.error["code"]) == (400, "invalid_identity")
    assert "more than 15 decide" in response.error["message"]
