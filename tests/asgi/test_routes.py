"""Which requests are counted, and what happens to the others: nothing that uses a model passes unnoticed."""

import asyncio
import dataclasses
import gc
import logging

import pytest
from asgi_client import OPEN, Call, Model, chat, used
from hypothesis import example, given
from hypothesis import strategies as st

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import Demand, QuotaMiddleware, RequestRefusedError, openai_routes, route_for
from modelquota.protocols import TABLES, PathTable, operations
from modelquota.reading.unmetered import MOST_PATHS, OTHER_PATHS

REJECT = OPEN | {"on_violation": "reject"}


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **REJECT)
    return manager


def call(app, path="/v1/chat/completions", body=None, **options):
    response = asyncio.run(Call(app, path, chat() if body is None else body, **options).run())
    gc.collect(1)  # a grant that was left over warns, and a warning is an error
    return response


@pytest.mark.parametrize("root", ["", "/v1", "/api", "/api/v1"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions"])
def test_mounted_anywhere_it_is_counted(manager, path, root):
    """With the path below the mount point, as older servers have it, and with all of it, as ASGI now says."""
    for whole in (path, root + path):
        call(QuotaMiddleware(Model(tokens=5), manager), whole, root_path=root)
    assert used(manager)[0] == 10


def test_only_the_tables_that_are_named_are_active(manager):
    app = QuotaMiddleware(Model(tokens=5), manager, routes=["ollama", "anthropic"])
    call(app, "/v1/chat/completions")
    assert manager.get_stats().total_checks == 0
    call(app, "/v1/messages")
    call(app, "/api/chat")
    assert manager.get_stats().total_checks == 2


def test_routes_of_ones_own_stand_beside_the_tables_and_replace_theirs(manager):
    own = {
        "/v1/messages": lambda request: Demand("m", 7),
        "/models/{model}/run": lambda r: Demand(r.params["model"], 3),
    }
    app = QuotaMiddleware(Model(), manager, routes=["openai", "anthropic", own])
    call(app, "/v1/messages")
    assert used(manager)[0] == 7
    call(app, "/models/m/run/", b"x")
    assert used(manager)[0] == 10
    call(app, "/v1/completions", {"model": "m", "prompt": "x" * 8, "max_tokens": 1})
    assert used(manager)[0] == 13
    manager.update_quota("m", max_requests_per_hour=0)
    assert call(app, "/v1/messages").json["type"] == "error", "the path says which protocol its clients speak"


def test_a_route_in_the_words_of_another_protocol(manager):
    manager.update_quota("m", max_requests_per_hour=0)
    app = QuotaMiddleware(
        Model(), manager, routes={"/claude": route_for("anthropic"), "/free": route_for("openai", free=True)}
    )
    assert call(app, "/claude").json["error"]["type"] == "invalid_request_error"
    assert call(app, "/free", b"x").status == 200
    assert app.unmetered == {}


@pytest.mark.parametrize("key", ["generate", "/a//b", "/a?b=1", "/{", ""])
def test_a_key_that_can_never_match_is_refused_when_the_middleware_is_made(manager, key):
    with pytest.raises(ValueError, match="can never match"):
        QuotaMiddleware(Model(), manager, routes={key: lambda request: None})
    with pytest.raises(ValueError, match="there is no protocol 'grpc'"):
        QuotaMiddleware(Model(), manager, routes=["openai", "grpc"])
    with pytest.raises(TypeError, match="a route is 5"):
        QuotaMiddleware(Model(), manager, routes={"/x": 5})


def test_what_no_route_covers_is_counted_and_logged_once_a_path(manager, caplog):
    app = QuotaMiddleware(Model(), manager)
    with caplog.at_level(logging.WARNING, "modelquota"):
        for _ in range(3):
            assert call(app, "/v2/generate", b"x").status == 200
        call(app, "/v2/generate", method="GET")
    assert app.unmetered == {"/v2/generate": 3}
    (record,) = caplog.records
    assert record.getMessage() == (
        "POST /v2/generate is passed on without being counted: no route covers it (routes=, unrouted=)"
    )


def connect(app, path="/v1/realtime", **scope):
    """What is said to a client that opens a WebSocket."""
    said = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        said.append(message["type"])

    asyncio.run(app({"type": "websocket", "path": path, "headers": [], **scope}, receive, send))
    return said


async def accepts(scope, receive, send):
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})


def test_a_websocket_is_counted_and_logged_once_a_path(manager, caplog):
    """It may use a model, as the realtime APIs do, and nothing in it is counted."""
    app = QuotaMiddleware(accepts, manager, page="/quota")
    assert connect(app) == connect(app) == ["websocket.accept"]
    assert connect(app, "/api/v1/realtime", root_path="/api") == ["websocket.accept"]
    assert connect(app, "/v1/chat/completions") == ["websocket.accept"], "a route counts a POST"
    assert app.unmetered == {"/v1/realtime": 3, "/v1/chat/completions": 1}
    page = call(app, "/quota", b"", method="GET", headers=[(b"accept", b"application/json")])
    assert page.json["unmetered"] == app.unmetered
    assert [record.getMessage() for record in caplog.records] == [
        f"WebSocket {path} is passed on without being counted: WebSockets are not counted (unrouted=)"
        for path in app.unmetered
    ]


def test_a_websocket_is_refused_where_what_no_route_covers_is(manager):
    app = QuotaMiddleware(accepts, manager, unrouted="refuse")
    assert connect(app) == ["websocket.close"]
    assert app.unmetered == {}
    assert connect(QuotaMiddleware(accepts, manager, unrouted=lambda request: None)) == ["websocket.accept"]


SEGMENTS = sorted({part for path in operations() for part in path.split("/")} | {"m", "x", "v1", "%2F", "é", ""})
KNOWN = PathTable(operations(), anywhere=operations())


@given(st.lists(st.sampled_from(SEGMENTS), max_size=5).map(lambda parts: "/" + "/".join(parts)))
@example("/v1/rerank2")
@example("/v1/chat/completions2")
@example("/V1/chat/completions")
@example("//v1//chat//completions")
@example("/v1/models/m:generateContent/x")
def test_a_post_to_any_other_path_is_counted_as_unmetered(path):
    """Whatever the path: a POST is decided, or it is one that is free, or it is among the unmetered."""
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **REJECT)
    app = QuotaMiddleware(Model(tokens=5), manager, default_model="m", unknown_model="m")
    response = call(app, path, {"messages": []})
    found = KNOWN.find(path)
    decided = manager.get_stats().total_checks
    assert response.status == 200
    assert decided == (found is not None and not found[0].free)
    assert app.unmetered == ({path: 1} if found is None else {})
    manager.close()


@pytest.mark.parametrize("name", list(TABLES))
def test_the_paths_of_a_table_that_is_not_active_are_unmetered(manager, name):
    others = [other for other in TABLES if other != name]
    paths = {path.replace("{", "").replace("}", "") for path in operations([name]).keys() - operations(others).keys()}
    app = QuotaMiddleware(Model(tokens=5), manager, routes=[*others, {"/never": lambda request: None}])
    seen = 0
    for path in sorted(paths):
        if PathTable(operations(others), anywhere=operations(others)).find(path) is None:
            call(app, path)
            seen += 1
    assert manager.get_stats().total_checks == 0
    assert sum(app.unmetered.values()) == seen


def test_at_most_twenty_paths_are_told_apart(manager, caplog):
    app = QuotaMiddleware(Model(), manager)
    for number in range(MOST_PATHS + 5):
        call(app, f"/x/{number}\n", b"x")
    call(app, "/" + "y" * 9000, b"x")
    counts = app.unmetered
    assert MOST_PATHS == 20
    assert len(counts) == MOST_PATHS + 1
    assert counts[OTHER_PATHS] == 6
    assert sum(counts.values()) == MOST_PATHS + 6
    assert all(path.isprintable() and len(path) <= 103 for path in counts)
    assert len(caplog.records) == MOST_PATHS + 1


def test_prometheus_shows_what_passed(manager):
    pytest.importorskip("prometheus_client")
    from prometheus_client import CollectorRegistry

    from modelquota.monitoring.prometheus import QuotaCollector

    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    assert registry.get_sample_value("modelquota_http_unmetered_total", {"path": "/x"}) is None
    for app in (QuotaMiddleware(Model(), manager), QuotaMiddleware(Model(), manager)):
        call(app, "/x", b"x")
    assert registry.get_sample_value("modelquota_http_unmetered_total", {"path": "/x"}) == 2


def test_the_page_shows_what_passed(manager):
    app = QuotaMiddleware(Model(), manager, page="/quota/")
    call(app, "/x", b"x")
    for path in ("/quota", "/quota/"):
        page = call(app, path, b"", method="GET", headers=[(b"accept", b"application/json")])
        assert page.json["unmetered"] == {"/x": 1}


def test_what_no_route_covers_can_be_refused(manager):
    app = QuotaMiddleware(Model(), manager, unrouted="refuse")
    response = call(app, "/x", b"x")
    assert (response.status, response.error["code"]) == (404, "unknown_path")
    assert call(app, "/x", b"x", method="GET").status == 200
    assert call(app, "/v1/messages/count_tokens", b"x").status == 200
    assert app.unmetered == {}


def test_what_no_route_covers_can_be_read_by_a_function(manager):
    async def read(request):
        if request.scope["path"] == "/other":
            return None
        if request.header("x-key") is None:
            raise RequestRefusedError(401, "no key")
        return Demand("m", len(request.body))

    app = QuotaMiddleware(Model(), manager, unrouted=read)
    assert call(app, "/x", b"12345").status == 401
    assert call(app, "/x", b"12345", headers=[(b"x-key", b"k")]).status == 200
    assert used(manager)[0] == 5
    assert call(app, "/other", b"x").status == 200
    assert app.unmetered == {"/other": 1}


def test_a_model_without_a_quota_is_counted_as_unmetered(manager, caplog):
    app = QuotaMiddleware(Model(tokens=5), manager)
    assert call(app, body=chat("other")).status == 200
    assert app.unmetered == {"/v1/chat/completions": 1}
    assert "none of its ids has a quota" in caplog.text
    manager.default_quota = ResourceQuotaConfig("any", **REJECT)
    call(app, body=chat("another"))
    assert app.unmetered == {"/v1/chat/completions": 1}
    assert used(manager, "another")[0] == 5


def test_a_model_without_a_quota_can_be_refused_and_touches_nothing(manager):
    app = QuotaMiddleware(Model(tokens=5), manager, unknown_model="refuse")
    response = call(app, body=chat("other"))
    assert (response.status, response.error["code"], response.error["param"]) == (404, "model_not_found", "model")
    assert manager.get_stats().total_checks == 0
    assert manager.list_models() == ["m"]
    assert call(app).status == 200
    manager.default_quota = {"gpt-*": ResourceQuotaConfig("any", **REJECT)}
    assert call(app, body=chat("gpt-5")).status == 200
    assert call(app, body=chat("other")).status == 404
    manager.default_quota = {"o*": ResourceQuotaConfig("any", **REJECT)}
    assert call(app, body=chat("other")).status == 200
    manager.default_quota = lambda model_id: None
    assert call(app, body=chat("yet another")).status == 404


def test_names_that_clients_invent_share_the_id_that_stands_in(manager):
    manager.set_quota("others", **REJECT | {"max_requests_per_hour": 3})
    app = QuotaMiddleware(Model(tokens=5), manager, unknown_model="others")
    statuses = [call(app, body=chat(f"invented-{number}")).status for number in range(5)]
    assert statuses == [200, 200, 200, 429, 429]
    assert sorted(manager.list_models()) == ["m", "others"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/generate", "/api/chat", "/pooling"])
def test_a_body_without_a_model_uses_the_default_or_is_refused(manager, path):
    body = {"messages": [], "max_tokens": 3}
    response = call(QuotaMiddleware(Model(tokens=5), manager), path, body)
    assert response.status == 400
    assert "model is missing" in response.body.decode()
    assert manager.get_stats().total_checks == 0
    assert call(QuotaMiddleware(Model(tokens=5), manager, default_model="m"), path, body).status == 200
    assert manager.get_usage("m").requests_this_hour == 1


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"unrouted": "drop"}, "unrouted is 'drop'"),
        ({"at_limit": "cut"}, "at_limit is 'cut'"),
        ({"headers": "some"}, "headers is 'some'"),
        ({"retry_spread": 2}, "retry_spread is 2"),
        ({"max_body_bytes": 0}, "max_body_bytes is 0"),
        ({"max_body_bytes": 9, "max_inflight_bytes": 8}, "max_inflight_bytes 8"),
        ({"body_timeout": 0}, "body_timeout is 0"),
        ({"identity_namespace": ""}, "identity_namespace is ''"),
        ({"identity_namespace": "a#"}, "identity_namespace is 'a#'"),
        ({"default_model": ""}, "default_model is ''"),
        ({"unknown_model": "x" * 300}, "unknown_model is"),
        ({"charge": {404: "all"}}, "charge\\[404\\] is 'all'"),
        ({"charge": {"6xx": "nothing"}}, "charge has the key '6xx'"),
    ],
)
def test_a_setting_that_is_not_accepted_is_named(manager, options, says):
    with pytest.raises(ValueError, match=says):
        QuotaMiddleware(Model(), manager, **options)


def test_a_counter_and_a_default_of_ones_own(manager):
    seen = []

    async def model(scope, receive, send):
        seen.append(used(manager)[0])
        await Model(tokens=1)(scope, receive, send)

    routes = openai_routes(prompt_tokens=lambda body: 3, default_output_tokens=4)
    call(QuotaMiddleware(model, manager, routes=routes), body={"model": "m", "messages": []})
    call(QuotaMiddleware(model, manager, default_output_tokens=50), body={"model": "m", "messages": []})
    assert seen == [7, 51]


def test_a_route_of_a_table_can_be_changed_by_one_of_ones_own(manager):
    manager.update_quota("m", max_ram_mb=100)
    read = openai_routes()["/v1/chat/completions"]
    seen = []

    async def model(scope, receive, send):
        seen.append((used(manager)[0], manager.get_usage("m").reserved_ram_mb))
        await Model(tokens=1)(scope, receive, send)

    routes = {"/chat": lambda request: dataclasses.replace(read(request), ram_needed_mb=60)}
    app = QuotaMiddleware(model, manager, routes=routes)
    assert call(app, "/chat").status == 200
    assert call(app, "/chat", {"messages": []}).status == 400
    assert call(app, "/chat", {"model": "m", "messages": []}).status == 200
    assert seen == [(110, 60), (257, 60)]
    manager.remove_quota("m")
    manager.set_quota("m", **REJECT | {"max_tokens_per_hour": 50})
    assert call(app, "/chat", {"model": "m", "messages": []}).status == 200, "its guess is cut too"
    assert call(app, "/chat", chat(max_tokens=60)).status == 400
    assert seen[2] == (50, 60)
