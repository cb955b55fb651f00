"""The admin API: what it does with the token, that nothing is done without it, and what is thrown at it."""

import asyncio
import contextlib
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import chromium
import httpx
import pytest
from asgi_client import Call, Model, chat
from factories import make_manager
from http_server import serving
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.routing import Mount
from strategies import configs

import modelquota.asgi.admin as admin_module
import modelquota.asgi.body as body_module
from modelquota import QuotaConfigError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.asgi import QuotaAdmin, QuotaMiddleware
from modelquota.asgi.admin import MAX_BODY_BYTES, MOST_LISTED, etag_of

TOKEN = "a-token-of-the-operator"
BEARER = (b"authorization", b"Bearer " + TOKEN.encode())
JSON = (b"content-type", b"application/json")
IDS = ["llama", "org/model", "a//b", "/lead", "trail/", "llama#usd", "gpt-4:free", "modèle-ü", "模型", "a b", "100%",
       "%23", "..", "a/../b", "?q", "m;v=1", "x" * 255, "it's \"quoted\"", "new\nline", "+"]  # fmt: skip


@pytest.fixture
def manager():
    return make_manager(ResourceQuotaConfig("m", max_ram_mb=1000), ResourceQuotaConfig("other"))


@pytest.fixture
def app(manager):
    return QuotaMiddleware(Model(tokens=5), manager, admin="/quotas", admin_token=TOKEN, page="/quota")


def send(app, method="GET", path="", body=b"", headers=(BEARER, JSON), **scope):
    """The response to one request; the path is decoded, as servers do it."""
    raw = quote(f"/quotas{path}", errors="replace").encode()
    call = Call(app, f"/quotas{path}", body, method=method, **{"raw_path": raw, **scope})
    call.scope["headers"] = list(headers)
    return asyncio.run(asyncio.wait_for(call.run(), 20))


def match(quota, name=b"if-match"):
    return [BEARER, JSON, (name, etag_of(quota).encode())]


def error(response, status, code):
    assert (response.status, response.error["code"]) == (status, code)
    return response.error


def state_of(manager):
    return {model_id: manager.get_quota(model_id) for model_id in manager.list_models()}


# -- what it does


def test_quotas_are_listed(app, manager):
    manager.default_quota = {"user:*": ResourceQuotaConfig("user", max_requests_per_day=5)}
    response = send(app)
    assert response.status == 200
    assert response.headers["cache-control"] == "no-store"
    listed = response.json
    assert [one["id"] for one in listed["quotas"]] == ["m", "other"]
    assert listed["quotas"][0]["quota"]["max_ram_mb"] == 1000
    assert "model_id" not in listed["quotas"][0]["quota"]
    assert listed["quotas"][0]["etag"] == etag_of(manager.get_quota("m"))
    assert (listed["total"], listed["next"]) == (2, None)
    assert listed["default_quota"]["user:*"]["max_requests_per_day"] == 5
    assert send(app, path="/").json == listed


@pytest.mark.parametrize(
    ("default", "shown"),
    [(None, {}), (ResourceQuotaConfig("any", max_ram_mb=7), {"*": 7}), (lambda model_id: None, None)],
)
def test_the_default_is_shown_as_far_as_it_can_be(app, manager, default, shown):
    manager.default_quota = default
    found = send(app).json["default_quota"]
    assert (found and {pattern: fields["max_ram_mb"] for pattern, fields in found.items()}) == shown


def test_long_lists_come_in_parts(app, manager):
    for number in range(30):
        manager.set_quota(f"user:{number:02}")
    found, after, parts = [], "", 0
    while after is not None:
        part = send(app, query_string=f"prefix=user:&limit=7&after={after}".encode()).json
        assert part["total"] == 30
        found += [one["id"] for one in part["quotas"]]
        after, parts = part["next"], parts + 1
    assert (found, parts) == ([f"user:{number:02}" for number in range(30)], 5)
    assert send(app, query_string=b"prefix=%6D").json["total"] == 1
    assert send(app, query_string=b"prefix=none").json["quotas"] == []


@pytest.mark.parametrize(
    "query",
    [b"limit=0", b"limit=1001", b"limit=-1", b"limit=1e3", b"limit=", b"limit=%D9%A3", b"limit=9999999", b"prefx=a",
     b"token=x", b"prefix=%FF", b"prefix=\xff", b"a=1&b=2&c=3&d=4"],
)  # fmt: skip
def test_a_query_that_is_not_known_is_refused(app, query):
    error(send(app, query_string=query), 400, "invalid_value")


def test_the_longest_answer_has_a_bound(app, manager):
    for number in range(MOST_LISTED):
        manager.set_quota(f"user:{number}")
    listed = send(app).json
    assert (len(listed["quotas"]), listed["total"]) == (MOST_LISTED, MOST_LISTED + 2)
    assert listed["next"] == listed["quotas"][-1]["id"]


def test_one_is_read_with_its_use(app, manager):
    manager.set_quota("m#usd", unit="usd")
    manager.update_quota("m", max_tokens_per_hour=400)
    assert manager.check_quota("m", 100)
    response = send(app, path="/m")
    assert (response.status, response.headers["etag"]) == (200, etag_of(manager.get_quota("m")))
    one = response.json
    assert (one["id"], one["etag"], one["meters"]) == ("m", response.headers["etag"], ["m#usd"])
    assert ResourceQuotaConfig.from_dict({"model_id": "m", **one["quota"]}) == manager.get_quota("m")
    assert one["usage"]["tokens_this_hour"] == 100
    assert one["usage"]["left"]["tokens_per_hour"] == 300
    assert one["usage"]["left"]["tokens_per_month"] is None
    assert one["usage"]["percent"]["tokens_per_hour"] == 25.0
    assert (one["usage"]["allowed_requests"], one["usage"]["denied_requests"]) == (1, 0)
    error(send(app, path="/none"), 404, "not_found")


def test_one_is_set_changed_and_removed(app, manager):
    response = send(app, "PUT", "/new", b'{"max_tokens_per_hour": null, "on_violation": "reject"}')
    assert response.status == 201
    expected = ResourceQuotaConfig("new", max_tokens_per_hour=None, on_violation="reject")
    assert manager.get_quota("new") == expected
    assert response.headers["etag"] == response.json["etag"] == etag_of(expected)
    assert manager.check_quota("new", 10)
    assert send(app, "PUT", "/new", b"{}").status == 200
    assert manager.get_quota("new") == ResourceQuotaConfig("new"), "what is not named has its default"
    response = send(app, "PATCH", "/new", b'{"max_ram_mb": 5}')
    assert (response.status, response.json["quota"]["max_ram_mb"]) == (200, 5)
    assert manager.get_quota("new") == ResourceQuotaConfig("new", max_ram_mb=5)
    assert manager.get_usage("new").tokens_this_hour == 10, "a change of limits refills nothing"
    response = send(app, "DELETE", "/new")
    assert (response.status, response.body) == (204, b"")
    assert manager.get_quota("new") is None
    error(send(app, "DELETE", "/new"), 404, "not_found")
    error(send(app, "PATCH", "/new", b"{}"), 404, "not_found")
    assert app._admin._bodies.inflight_bytes == 0


def test_what_was_read_can_be_put_back(app, manager):
    one = send(app, path="/m").json
    response = send(app, "PUT", "/m", json.dumps(one["quota"]).encode(), match(manager.get_quota("m")))
    assert (response.status, response.json["etag"]) == (200, one["etag"])


@given(configs())
def test_an_etag_says_what_is_in_the_row(config):
    manager = make_manager(config)
    assert etag_of(manager.get_quota(config.model_id)) == etag_of(config)
    manager.close()


def test_an_id_that_is_changed_is_configured_by_name():
    """An id that came by itself is forgotten when the table is full; what an operator has set must not be."""
    manager = ResourceQuotaManager(max_models=20, default_quota=ResourceQuotaConfig("any", max_ram_mb=5))
    app = QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=TOKEN)
    manager.codes(["kept"])
    manager.codes(["forgotten"])
    assert send(app, "PATCH", "/kept", b'{"max_ram_mb": 5}').status == 200, "also to what it is already"
    for number in range(100):
        manager.codes([f"user:{number}"])
    assert "kept" in manager.list_models()
    assert "forgotten" not in manager.list_models()


@pytest.mark.parametrize("model_id", IDS)
def test_every_id_works_in_a_path(app, manager, model_id):
    path = f"/{model_id}"
    assert send(app, "PUT", path, b'{"max_ram_mb": 7}').status == 201
    assert manager.get_quota(model_id).max_ram_mb == 7
    assert send(app, path=path).json["id"] == model_id
    assert send(app, "DELETE", path).status == 204
    assert state_of(manager).keys() == {"m", "other"}


@pytest.mark.parametrize("safe", ["", "/"])
def test_every_id_works_over_a_real_server(manager, safe):
    """Percent-encoded once, as JavaScript's encodeURIComponent does it, or with the slashes as they are."""
    app = QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=TOKEN)
    with (
        serving(app) as address,
        httpx.Client(headers={"authorization": f"Bearer {TOKEN}"}, timeout=20, trust_env=False) as client,
    ):
        for model_id in IDS:
            if safe and ".." in model_id.split("/"):
                continue  # clients resolve these segments, unless their slashes are encoded
            if model_id == "..":
                continue
            url = f"{address}/quotas/{quote(model_id, safe=safe)}"
            assert client.put(url, json={"max_ram_mb": 7}).status_code == 201, model_id
            assert manager.get_quota(model_id).max_ram_mb == 7
            assert client.get(url).json()["id"] == model_id
            assert client.delete(url).status_code == 204
        assert client.get(f"{address}/quotas/%2523").status_code == 404
        manager.set_quota("%23")
        assert client.get(f"{address}/quotas/%2523").json()["id"] == "%23", "decoded once, not twice"
        assert client.put(f"{address}/quotas/%FF", json={}).status_code == 400
    assert state_of(manager).keys() == {"m", "other", "%23"}


@pytest.mark.parametrize("root", ["", "/api"])
@pytest.mark.parametrize("whole", [False, True])
def test_mounted_anywhere(manager, root, whole):
    app = QuotaMiddleware(Model(), manager, admin="/quotas/", admin_token=TOKEN)
    call = Call(app, (root if whole else "") + "/quotas/m", method="GET", headers=[BEARER], root_path=root)
    assert asyncio.run(call.run()).json["id"] == "m"


def test_by_itself_and_mounted_in_an_application(manager):
    admin = QuotaAdmin(manager, token=TOKEN)
    assert asyncio.run(Call(admin, "/m", method="GET", headers=[BEARER]).run()).json["id"] == "m"
    mounted = Starlette(routes=[Mount("/x/quotas", app=admin)])
    for path, found in (("/x/quotas/m", "m"), ("/x/quotas/", None)):
        response = asyncio.run(Call(mounted, path, method="GET", headers=[BEARER]).run())
        assert (response.status, response.json.get("id")) == (200, found)
    assert asyncio.run(Call(mounted, "/x/quotas/m", method="GET").run()).status == 401
    asyncio.run(admin({"type": "websocket", "path": "/m"}, None, None))


def test_changes_are_logged_without_the_token(app, caplog):
    with caplog.at_level(logging.INFO, "modelquota"):
        send(app, "PATCH", "/m", b'{"max_ram_mb": 5}')
        send(app, "DELETE", "/m")
        send(app, "PUT", "/a\nFAKE RECORD", b"{}")
    said = [record.getMessage() for record in caplog.records]
    assert said[:2] == [
        "the admin API has set the quota of 'm' for 127.0.0.1: {'max_ram_mb': 5}",
        "the admin API has removed the quota of 'm' for 127.0.0.1",
    ]
    assert all("\n" not in line and TOKEN not in line for line in said)


FETCH = """(async () => {
    const json = (await (await fetch(location.pathname, {headers: {Accept: "application/json"}})).json());
    const base = new URL(json.admin, location.origin + location.pathname.replace(/\\/+$/, "")) + "";
    const ask = (method, id, body, more) => fetch(id === null ? base : base + "/" + encodeURIComponent(id), {
        method, headers: {Authorization: "Bearer %s", "Content-Type": "application/json", ...more},
        body: body && JSON.stringify(body)});
    const stranger = await fetch(base);
    const [found] = (await (await ask("GET", null)).json()).quotas;
    const set = await ask("PUT", "org/模型#usd", {...found.quota, max_ram_mb: 7}, {"If-None-Match": "*"});
    const changed = await ask("PATCH", "m", {max_ram_mb: 8}, {"If-Match": found.etag});
    const late = await ask("PATCH", "m", {max_ram_mb: 9}, {"If-Match": found.etag});
    const wrong = await (await ask("PATCH", "m", {max_ram_mb: -1})).json();
    const removed = await ask("DELETE", "other");
    return JSON.stringify([base, stranger.status, set.status, changed.status, late.status, wrong.error.field,
                           removed.status]);
})()"""


@pytest.mark.skipif(chromium.PATH is None, reason="no chromium is installed; apt-get install chromium")
@pytest.mark.parametrize("page", ["/quota", "/quota/", "/a/quota"])
def test_the_page_can_call_it_from_a_real_browser(manager, page):
    """Under the page's own content security policy; a wrong token opens no dialog, which would wait for ever."""
    app = QuotaMiddleware(Model(), manager, page=page, admin="/x/quotas", admin_token=TOKEN)
    with serving(app) as address, chromium.browser() as browser:
        browser.show(address + page, width=800, height=600, theme="light")
        browser.until("document.readyState === 'complete' && location.pathname !== 'blank'")
        said = json.loads(browser.evaluate(FETCH % TOKEN))
    assert said == [f"{address}/x/quotas", 401, 201, 200, 412, "max_ram_mb", 204]
    assert manager.get_quota("org/模型#usd").max_ram_mb == 7
    assert manager.get_quota("m").max_ram_mb == 8
    assert manager.get_quota("other") is None


# -- two operators


def test_a_change_is_made_only_if_no_one_else_has_made_one(app, manager):
    before = manager.get_quota("m")
    assert send(app, "PATCH", "/m", b'{"max_ram_mb": 1}', match(before)).status == 200
    for method, body in (("PUT", b"{}"), ("PATCH", b'{"max_ssd_mb": 2}'), ("DELETE", b"")):
        response = send(app, method, "/m", body, match(before))
        error(response, 412, "precondition_failed")
        assert response.headers["etag"] == etag_of(manager.get_quota("m"))
    now = before.replace(max_ram_mb=1)
    assert manager.get_quota("m") == now
    weak = [BEARER, JSON, (b"if-match", b'"x", W/' + etag_of(now).encode())]
    assert send(app, "PATCH", "/m", b"{}", weak).status == 200
    assert send(app, "DELETE", "/m", headers=match(now)).status == 204


@pytest.mark.parametrize(
    ("path", "name", "value", "status"),
    [
        ("/m", b"if-none-match", b"*", 412),
        ("/new", b"if-none-match", b"*", 201),
        ("/m", b"if-match", b"*", 200),
        ("/new", b"if-match", b"*", 412),
        ("/new", b"if-match", b'"0123"', 412),
        ("/m", b"if-match", b"0123", 412),
        ("/m", b"if-match", b"", 412),
        ("/m", b"IF-MATCH", b'"0123"', 412),
        ("/m", b"if-none-match", b'"0123"', 200),
    ],
)
def test_preconditions(app, manager, path, name, value, status):
    before = state_of(manager)
    response = send(app, "PUT", path, b'{"max_ram_mb": 7}', [BEARER, JSON, (name, value)])
    assert response.status == status
    assert (state_of(manager) == before) is (status == 412)


def test_of_many_that_change_at_once_one_wins(tmp_path):
    """Through two managers, as of two processes of a server; each in a loop of its own."""
    managers = [ResourceQuotaManager(path=tmp_path / "quota.state") for _ in range(2)]
    apps = [QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=TOKEN) for manager in managers]
    barrier = threading.Barrier(6)

    def won(method, condition, success):
        def run(number):
            barrier.wait()
            body = b'{"max_ram_mb": %d}' % (1 + number)
            return send(apps[number % 2], method, "/m", body, [BEARER, JSON, condition])

        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(run, range(6)))
        (winner,) = [answer for answer in answers if answer.status == success]
        assert {answer.status for answer in answers} <= {success, 412, 404}
        return winner

    for _ in range(10):
        tag = won("PUT", (b"if-none-match", b"*"), 201).headers["etag"]
        assert tag == etag_of(managers[0].get_quota("m"))
        managers[0].update_quota("m", max_ram_mb=50)
        tag = etag_of(managers[1].get_quota("m"))
        response = won("PATCH", (b"if-match", tag.encode()), 200)
        assert response.headers["etag"] == etag_of(managers[1].get_quota("m"))
        won("DELETE", (b"if-match", response.headers["etag"].encode()), 204)
        assert managers[0].list_models() == []
    for manager in managers:
        manager.close()


def test_changes_of_different_fields_at_once_are_all_made(app, manager):
    fields = [name for name in ResourceQuotaConfig("m").to_dict() if name.startswith("max_")]
    with ThreadPoolExecutor(len(fields)) as pool:
        answers = pool.map(lambda name: send(app, "PATCH", "/m", json.dumps({name: 77}).encode()).status, fields)
    assert set(answers) == {200}
    assert all(getattr(manager.get_quota("m"), name) == 77 for name in fields)


# -- without the token


METHODS = ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "POST", "TRACE", "CONNECT", "get", "FOO", ""]
WRONG = [
    [], [(b"authorization", b"")], [(b"authorization", b"Bearer")], [(b"authorization", b"Bearer ")],
    [(b"authorization", TOKEN.encode())], [(b"authorization", b"Basic " + TOKEN.encode())],
    [(b"authorization", b"Bearer " + TOKEN.encode()[:-1])], [(b"authorization", b"Bearer " + TOKEN.encode() + b"x")],
    [(b"authorization", b"Bearer " + TOKEN.upper().encode())], [(b"authorization", b"Bearer \xff\x00")],
    [(b"authorization", b"Bearer x" * 9000)], [BEARER, BEARER], [BEARER, (b"Authorization", b"Bearer x")],
    [(b"authorization", b"Bearer x"), BEARER], [(b"x-api-key", TOKEN.encode())],
    [(b"cookie", b"token=" + TOKEN.encode())], [(b"proxy-authorization", BEARER[1])],
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("path", ["", "/", "/m", "/none", "/../quota", "/m/../../v1/chat/completions"])
def test_nothing_is_done_without_the_token(app, manager, method, path):
    before = state_of(manager)
    for wrong in WRONG:
        response = send(
            app, method, path, b'{"max_ram_mb": 1}', [JSON, *wrong], query_string=b"token=" + TOKEN.encode()
        )
        assert response.status == 401
        assert response.headers["www-authenticate"].startswith('Bearer realm="modelquota"')
        assert b"1000" not in response.body
        assert "etag" not in response.headers
        assert "allow" not in response.headers
    assert state_of(manager) == before
    assert app.app.calls == []


def test_a_wrong_token_spends_nobodys_quota_and_is_not_logged(manager, caplog):
    manager.set_quota("tenant/acme")
    app = QuotaMiddleware(Model(tokens=5), manager, admin="/quotas", admin_token=TOKEN, identity=lambda request: "acme")
    with caplog.at_level(logging.DEBUG):
        for method in ("GET", "PUT", "POST"):
            send(
                app, method, "/m", json.dumps(chat()).encode(), [JSON, (b"authorization", b"Bearer wrong-wrong-wrong")]
            )
    assert manager.get_stats().total_checks == 0
    assert app.unmetered == {}
    assert "wrong" not in caplog.text
    assert TOKEN not in caplog.text


def test_the_token_is_compared_in_constant_time(app, monkeypatch):
    seen = []

    def compare(one, other):
        seen.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr(admin_module.hmac, "compare_digest", compare)
    for token in (TOKEN, "", "x", "x" * 5000):
        send(app, headers=[(b"authorization", b"Bearer " + token.encode())])
    assert seen == [(32, 32)] * 4, "also if the lengths differ"


def test_the_scheme_has_any_case(app):
    for value in (b"bearer ", b"BEARER  "):
        assert send(app, headers=[(b"Authorization", value + TOKEN.encode() + b" ")]).status == 200


def test_it_is_off_by_default_and_passes_nothing_on(manager):
    model = Model(answer={"from": "the application"})
    assert send(QuotaMiddleware(model, manager)).json == {"from": "the application"}
    app = QuotaMiddleware(model, manager, admin="/quotas", admin_token=TOKEN)
    model.calls.clear()
    for path in ("", "/", "/m"):
        for method in METHODS:
            send(app, method, path)
    assert model.calls == []
    for path in ("/quota", "/quotasx", "/x/quotas", "//quotas", "/Quotas"):
        assert asyncio.run(Call(app, path, method="GET").run()).json == {"from": "the application"}


@pytest.mark.parametrize("token", [None, "", "short", "x" * 15, "x" * 513, "with a space in it", "ünicode-" * 3,
                                   "line\n" * 5, b"bytes" * 5, 5])  # fmt: skip
def test_a_token_that_keeps_nobody_out_is_refused_and_not_shown(manager, token):
    with pytest.raises(
        QuotaConfigError, match=r"^admin_token=.* is not accepted; expected the token of the admin"
    ) as e:
        QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=token)
    assert not token or f"{token}" not in str(e.value).replace("512", "")
    with pytest.raises(QuotaConfigError, match="^token="):
        QuotaAdmin(manager, token=token)


@pytest.mark.parametrize("path", [None, "", "/", "quotas", "//quotas", "/a//b", "/a b", "/a?b", "/a#b", "/a%2Fb", "/..",
                                  "/a/../b", "/ü", 5])  # fmt: skip
def test_a_path_that_is_none_is_refused(manager, path):
    with pytest.raises(QuotaConfigError, match=r"^admin=.* is not accepted; expected a path"):
        QuotaMiddleware(Model(), manager, admin=path, admin_token=TOKEN)


@pytest.mark.parametrize(("page", "admin", "relative"), [
    ("/quota", "/quotas", "quotas"), ("/quota/", "/quota/admin", "quota/admin"), ("/", "/quotas", "quotas"),
    ("/a/b/quota", "/quotas", "../../quotas"), ("/quota", None, None),
])  # fmt: skip
def test_the_page_knows_where_it_is(manager, page, admin, relative):
    app = QuotaMiddleware(Model(), manager, page=page, admin=admin, admin_token=admin and TOKEN)
    accept = [(b"accept", b"application/json")]
    assert asyncio.run(Call(app, page, method="GET", headers=accept).run()).json["admin"] == relative


@pytest.mark.parametrize("page", ["/quotas", "/quotas/", "/quotas/page"])
def test_the_page_is_not_in_it(manager, page):
    with pytest.raises(QuotaConfigError, match="^page=.* is not in that of the admin API, /quotas$"):
        QuotaMiddleware(Model(), manager, page=page, admin="/quotas", admin_token=TOKEN)


# -- with the token, and everything else wrong


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"max_ram_mb": -1}', "max_ram_mb"), (b'{"max_ram_mb": 1.5}', "max_ram_mb"),
        (b'{"max_ram_mb": true}', "max_ram_mb"), (b'{"max_ram_mb": "7"}', "max_ram_mb"),
        (b'{"max_ram_mb": 9223372036854775808}', "max_ram_mb"), (b'{"max_ram_mb": 4611686018427387905}', "max_ram_mb"),
        (b'{"max_tokens_per_second": -0.5}', "max_tokens_per_second"), (b'{"max_ram": 1}', "max_ram"),
        (b'{"": 1}', ""), (b'{"_": 1}', "_"), (b'{"__class__": 1}', "__class__"), (b'{"model_id": "m"}', "model_id"),
        (b'{"on_violation": "drop"}', "on_violation"), (b'{"on_violation": []}', "on_violation"),
        (b'{"on_violation": null}', "on_violation"), (b'{"grace_period_sec": null}', "grace_period_sec"),
        (b'{"burst_tokens": null}', "burst_tokens"), (b'{"token_weights": [1, 2]}', "token_weights"),
        (b'{"token_weights": [1, 2, [3]]}', "token_weights"), (b'{"unit": {"a": 1}}', "unit"),
        (b'{"shadow_limits": ["queue"]}', "shadow_limits"), (b'{"shadow_limits": {"ram": 1}}', "shadow_limits"),
        (b'{"max_ssd_mb": 5, "max_ram_mb": {}}', "max_ram_mb"), (b'{"max_ram_mb": "\\ud800"}', "max_ram_mb"),
    ],
)  # fmt: skip
def test_a_value_that_is_not_accepted_is_named_and_changes_nothing(app, manager, method, body, field):
    before = state_of(manager)
    found = error(send(app, method, "/m", body), 400, "invalid_value")
    assert found["field"] == field
    value = json.loads(body)[field]
    assert found["value"] == (None if isinstance(value, list | dict) else value)
    assert found["accepted"]
    assert found["message"].startswith(f"{field}=")
    assert found["message"].endswith(found["accepted"])
    assert state_of(manager) == before


@pytest.mark.parametrize(("field", "accepted"), [
    ("max_ram_mb", "an integer from 0 to 2**62 MB, or no limit (null)"),
    ("max_tokens_per_second", "a finite number of tokens per second, 0 or more, or no limit (null)"),
])  # fmt: skip
def test_what_is_accepted_is_said_in_the_words_of_json(app, field, accepted):
    assert send(app, "PUT", "/m", b'{"%s": "x"}' % field.encode()).error["accepted"] == accepted


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize(
    "body",
    [
        b"", b" ", b"{", b"[]", b"null", b'"a"', b"5", b'{"max_ram_mb": NaN}', b'{"max_tokens_per_second": NaN}',
        b'{"max_tokens_per_second": Infinity}', b'{"max_tokens_per_second": -Infinity}',
        b'{"max_tokens_per_second": 1e999}', b'{"max_ram_mb": 1, "max_ram_mb": 2}', b'{"a": {"b": 1, "b": 2}}',
        b'{"max_ram_mb": ' + b"9" * 5000 + b"}", b"\xff", b'{"max_ram_mb": 1}}', b"max_ram_mb=1", b'{"a": ' * 500,
        b"[" * 60_000, b'{"max_ram_mb": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        *(b'{"max_ram_mb": ' + b"[" * depth + b"]" * depth + b"}" for depth in range(880, 1000, 10)),
        '{"max_ram_mb": 1}'.encode("utf-16"),
    ],
)  # fmt: skip
def test_a_body_that_is_no_object_of_json_is_refused_and_changes_nothing(app, manager, method, body):
    before = state_of(manager)
    response = send(app, method, "/m", body)
    assert response.status == 400
    assert response.error["code"] in ("invalid_json", "invalid_value")
    assert state_of(manager) == before


def test_a_byte_order_mark_is_no_error(app, manager):
    assert send(app, "PUT", "/m", b"\xef\xbb\xbf{}").status == 200


@pytest.mark.parametrize("model_id", ["a\0b", "x" * 256, "ü" * 128, "m#", "#usd", "\ud800"])
def test_what_can_be_no_id_is_refused(app, manager, model_id):
    before = state_of(manager)
    raw = {"raw_path": b""}
    assert error(send(app, "PUT", f"/{model_id}", b"{}", **raw), 400, "invalid_value")["field"] == "model_id"
    for method in ("GET", "PATCH", "DELETE"):
        error(send(app, method, f"/{model_id}", b"{}", **raw), 404, "not_found")
    assert state_of(manager) == before


def test_a_path_that_is_not_utf_8_is_refused(app, manager):
    """Servers put U+FFFD in place of what they cannot decode: two such paths would be one id."""
    manager.set_quota("\ufffd")
    for method in ("GET", "PUT", "DELETE"):
        error(send(app, method, "/\ufffd", b"{}", raw_path=b"/quotas/%FF"), 400, "invalid_id")
    assert send(app, path="/\ufffd").json["id"] == "\ufffd"


@pytest.mark.parametrize(
    ("path", "method", "allow"),
    [
        *(("", method, "GET, HEAD, OPTIONS") for method in ("PUT", "PATCH", "DELETE", "POST", "TRACE", "get", "FOO")),
        *(("/m", method, "GET, HEAD, PUT, PATCH, DELETE, OPTIONS") for method in ("POST", "TRACE", "put", "FOO", "")),
    ],
)
def test_other_methods_are_refused(app, manager, path, method, allow):
    before = state_of(manager)
    response = send(app, method, path, b"{}")
    error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == allow
    assert state_of(manager) == before


@pytest.mark.parametrize(("path", "allow"), [("", "GET, HEAD, OPTIONS"),
                                             ("/m", "GET, HEAD, PUT, PATCH, DELETE, OPTIONS")])  # fmt: skip
def test_head_and_options(app, path, allow):
    get, head, options = (send(app, method, path) for method in ("GET", "HEAD", "OPTIONS"))
    assert (head.status, head.body, head.headers) == (200, b"", get.headers)
    assert int(head.headers["content-length"]) == len(get.body) > 100
    assert (options.status, options.body, options.headers["allow"]) == (204, b"", allow)
    error_get, error_head = (send(app, method, "/none") for method in ("GET", "HEAD"))
    assert (error_head.status, error_head.body, error_head.headers) == (404, b"", error_get.headers)


@pytest.mark.parametrize(
    "headers",
    [
        [], [(b"content-type", b"")], [(b"content-type", b"text/plain")],
        [(b"content-type", b"application/x-www-form-urlencoded")], [(b"content-type", b"multipart/form-data")],
        [(b"content-type", b"application/merge-patch+json")], [JSON, JSON], [(b"content-type", b"application/jsonx")],
        [JSON, (b"content-encoding", b"gzip")],
    ],
)  # fmt: skip
def test_other_kinds_of_bodies_are_refused(app, manager, headers):
    before = state_of(manager)
    response = send(app, "PUT", "/m", b"{}", [BEARER, *headers])
    error(response, 415, "unsupported_media_type")
    assert state_of(manager) == before
    assert ("accept-encoding" in response.headers) is (len(headers) == 2 and headers[1] != JSON)


def test_the_content_type_may_have_parameters(app):
    for kind in (b"application/json; charset=utf-8", b"Application/JSON;x=y"):
        assert (
            send(app, "PUT", "/m", b"{}", [BEARER, (b"content-type", kind), (b"content-encoding", b"")]).status == 200
        )


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused_and_drained(app, manager, declared):
    before = state_of(manager)
    size = MAX_BODY_BYTES + 1
    headers = [BEARER, JSON, *([(b"content-length", b"%d" % size)] if declared else [])]
    call = Call(app, "/quotas/m", method="PUT", parts=[b" " * 1000] * (size // 1000 + 1))
    call.scope["headers"] = headers
    response = asyncio.run(call.run())
    error(response, 413, "body_too_large")
    assert call.received == size // 1000 + 1
    assert "connection" not in response.headers
    assert state_of(manager) == before
    assert app._admin._bodies.inflight_bytes == 0


@pytest.mark.parametrize("headers", [[], [BEARER]])
def test_an_endless_body_is_not_read_to_its_end(app, headers):
    call = Call(app, "/quotas/m", method="PUT", parts=[b" " * 100_000] * 100)
    call.scope["headers"] = headers
    response = asyncio.run(call.run())
    assert response.status == (415 if headers else 401)
    assert call.received < 10
    assert response.headers["connection"] == "close"


def test_a_slow_body_is_not_waited_for(app, manager, monkeypatch):
    monkeypatch.setattr(body_module, "DRAIN_SECONDS", 0.05)
    app._admin._bodies.seconds = 0.05
    before = state_of(manager)

    async def main():
        call = Call(app, "/quotas/m", method="PUT", headers=[BEARER])
        call._messages = [{"type": "http.request", "body": b'{"max_ram', "more_body": True}]
        response = await asyncio.wait_for(call.run(), 20)
        error(response, 408, "body_timeout")
        assert response.headers["connection"] == "close"
        leaver = Call(app, "/quotas/m", method="PUT", headers=[BEARER])
        leaver._messages = [{"type": "http.request", "body": b'{"max_ram', "more_body": True}]
        leaver.gone.set()
        await asyncio.wait_for(leaver.run(), 20)
        assert leaver.response.status in (None, 499)

    asyncio.run(main())
    assert state_of(manager) == before
    assert app._admin._bodies.inflight_bytes == 0


def test_many_slow_bodies_hold_little_memory(app, monkeypatch):
    """Only those with the token are kept at all, and of these a megabyte."""

    async def main():
        calls = []
        for _ in range(40):
            call = Call(app, "/quotas/m", method="PUT", headers=[BEARER])
            call._messages = [{"type": "http.request", "body": b" " * 60_000, "more_body": True}]
            calls.append(call.start())
        for _ in range(20):
            await asyncio.sleep(0)
        assert app._admin._bodies.inflight_bytes <= 1 << 20
        for call in calls:
            call.gone.set()
        await asyncio.wait_for(asyncio.gather(*[call.task for call in calls]), 20)

    asyncio.run(main())
    assert app._admin._bodies.inflight_bytes == 0


def test_a_full_table_and_a_closed_manager_are_no_500():
    manager = ResourceQuotaManager(max_models=1)
    app = QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=TOKEN)
    assert send(app, "PUT", "/a", b"{}").status == 201
    error(send(app, "PUT", "/b", b"{}"), 503, "too_many_models")
    manager.close()
    for method, path in (("GET", ""), ("GET", "/a"), ("PUT", "/a"), ("PATCH", "/a"), ("DELETE", "/a")):
        error(send(app, method, path, b"{}"), 503, "overloaded")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
)
FIELDS = st.sampled_from(["max_ram_mb", "on_violation", "shadow_limits", "token_weights", "unit", "x"])
NAMES = st.sampled_from(
    [b"if-match", b"if-none-match", b"content-type", b"content-encoding", b"content-length", b"expect", b"x"]
)


@given(
    method=st.sampled_from(METHODS),
    path=st.text(max_size=20).map(lambda text: f"/{text}") | st.sampled_from(["", "/", "/m"]),
    body=st.binary(max_size=50) | st.dictionaries(FIELDS, VALUES).map(lambda value: json.dumps(value).encode()),
    headers=st.lists(st.tuples(NAMES, st.binary(max_size=20)), max_size=3),
    query=st.binary(max_size=20),
)
def test_nothing_is_answered_with_500_and_a_refusal_changes_nothing(method, path, body, headers, query):
    manager = make_manager(ResourceQuotaConfig("m", max_ram_mb=1000))
    app = QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=TOKEN)
    before = state_of(manager)
    raw = {"raw_path": quote(path, errors="surrogatepass").encode(), "query_string": query}
    response = send(app, method, path, body, [BEARER, JSON, *headers], **raw)
    assert response.complete
    assert response.status in (200, 201, 204, 400, 404, 405, 412, 413, 415)
    if response.status >= 400:
        assert state_of(manager) == before
        assert method == "HEAD" or response.error["message"]
    manager.close()


def test_nothing_that_a_client_sends_is_in_a_header(app, manager):
    evil = "a\r\nset-cookie: x=1"
    for response in (
        send(app, "PUT", f"/{evil}", b"{}"),
        send(app, path=f"/{evil}"),
        send(app, "PUT", "/m", json.dumps({evil: evil}).encode()),
        send(app, "PATCH", "/m", b"{}", [BEARER, JSON, (b"if-match", evil.encode())]),
        send(app, query_string=quote(evil).encode() + b"=1"),
        send(app, "DELETE", f"/{evil}"),
    ):
        assert all("\n" not in value and "\r" not in value for value in response.headers.values())
        assert "set-cookie" not in response.headers
        assert "x=1" not in str(response.headers)


def test_requests_in_one_connection_are_not_mixed_up(manager):
    """The unread rest of a refused body is not parsed as the next request."""
    app = QuotaMiddleware(Model(), manager, admin="/quotas", admin_token=TOKEN)
    smuggled = f"DELETE /quotas/m HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode()
    head = b"PUT /quotas/m HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    with serving(app) as address, socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2])), 20) as wire:
        wire.sendall(head % len(smuggled) + smuggled)
        wire.sendall(b"GET /quotas HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        got = b""
        with contextlib.suppress(ConnectionResetError):
            while part := wire.recv(65536):
                got += part
    assert got.count(b"HTTP/1.1 401") == got.count(b"HTTP/1.1 ") == 2
    assert manager.get_quota("m") is not None
