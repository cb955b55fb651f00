"""`Quota`: the middleware that the environment and the quota file configure, and how it refuses to start."""

import asyncio
import hashlib
import inspect
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from asgi_client import Call, Model, chat, used
from patience import until
from starlette.applications import Starlette

import modelquota.asgi.quota as quota_module
import modelquota.asgi.settings as settings_module
from modelquota import QuotaConfigError, QuotaFileError, ResourceQuotaManager
from modelquota.asgi import IncomingRequest, Quota, QuotaMiddleware, RequestRefusedError
from modelquota.asgi.identity import api_keys, identity_of
from modelquota.asgi.settings import Settings, default_state
from modelquota.protocols.tables import TABLES
from modelquota.quota.http import HTTP_FIELDS, ROUTE_TABLES

MODEL = '[models.m]\nmax_requests_per_second = "unlimited"\nmax_tokens_per_second = "unlimited"\n'
SECRET = "2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b"  # printf %s secret | sha256sum


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Write the quota file that the environment names; with a state file in the same folder."""
    path = tmp_path / "quotas.toml"
    monkeypatch.setenv("MODELQUOTA_QUOTAS", str(path))
    monkeypatch.setenv("MODELQUOTA_STATE", str(tmp_path / "quota.state"))
    monkeypatch.setattr(quota_module, "_LOOK_SECONDS", 0.0)

    def write(text=MODEL):
        new = tmp_path / "new"
        new.write_text(text)
        os.replace(new, path)
        return path

    yield write
    for guard in quota_module._guards.values():
        guard.manager.close()
    quota_module._guards.clear()


def ask(app, **headers):
    """The answer to one request."""
    fields = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return asyncio.run(Call(app, body=chat(), headers=fields).run())


def test_servers_take_it_as_a_class_without_arguments(configure):
    configure()
    app = Quota(Model(7))
    answer = ask(app)
    assert (answer.status, used(app.manager)) == (200, (7, 0, 0))
    assert "x-ratelimit-limit-tokens" in answer.headers


def test_all_applications_and_processes_share_the_limits(configure, tmp_path):
    configure()
    first, second = Quota(Model(7)), Quota(Model(5))
    ask(first)
    ask(second)
    assert first.manager is second.manager
    code = (
        "from modelquota.asgi import Quota\nmanager = Quota(None).manager\n"
        "print(manager.get_usage('m').tokens_this_hour, manager.path)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["12", str(tmp_path / "quota.state")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[models.m]\nmax_ram_mb = -1",
            "{}: line 2: [models.\"m\"]: max_ram_mb=-1 is not accepted; expected an integer from 0 to 2**62 MB, or no "
            'limit (None; "unlimited" in a quota file)',
        ),
        ("[models.m]\n[http]\npage = 'quota'", "{}: line 3: [http]: page='quota' is not accepted; expected a path that "
         'begins with "/"'),
        ("[http]\nidentity = 'bearer'", '{}: [models] is not accepted; expected at least one table [models."<id>"]'),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_file_line_and_field(configure, text, message):
    path = configure(text)
    with pytest.raises(QuotaFileError) as caught:
        Quota(Model())
    assert str(caught.value) == message.format(path)


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv("MODELQUOTA_QUOTAS", raising=False)
    with pytest.raises(QuotaConfigError, match=r"^MODELQUOTA_QUOTAS=None is not accepted; expected the path of a"):
        Quota(Model())
    monkeypatch.setenv("MODELQUOTA_QUOTAS", str(tmp_path / "none.toml"))
    with pytest.raises(FileNotFoundError, match="none.toml"):
        Quota(Model())
    (tmp_path / "none.toml").write_text(MODEL)
    monkeypatch.setenv("MODELQUOTA_PAGE", "quota")
    with pytest.raises(QuotaConfigError, match=r"^MODELQUOTA_PAGE='quota' is not accepted; expected a path that"):
        Quota(Model())
    monkeypatch.delenv("MODELQUOTA_PAGE")
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", "http://user:password@host")
    with pytest.raises(QuotaConfigError, match=r"^url='a text that is not shown' is not accepted; expected such as"):
        Quota(Model())


def test_hosts_share_their_limits_where_the_environment_says(configure, monkeypatch):
    configure()
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", "redis://user:password@127.0.0.1:1")
    assert "password" not in repr(Settings.read())
    app = Quota(Model(7))
    assert app.manager.cluster.status().state == "joining"
    assert "password" not in repr(app.manager.cluster.store)
    monkeypatch.delenv("MODELQUOTA_REDIS_URL")
    assert Settings.read().cluster is None


def test_the_quota_file_says_how_hosts_share_and_the_environment_where(configure, monkeypatch):
    monkeypatch.delenv("MODELQUOTA_REDIS_URL", raising=False)
    configure(MODEL + "[cluster]\nurl = 'redis://127.0.0.1:1'\nnamespace = 'prod'\nlease_sec = 30")
    store = Quota(Model(7)).manager.cluster.store
    assert (store.namespace, store.lease_sec) == ("prod", 30.0)
    assert Settings.read().cluster["url"] == "redis://127.0.0.1:1"
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", "redis://user:password@127.0.0.1:1")
    assert Settings.read().cluster == {
        "url": "redis://user:password@127.0.0.1:1", "namespace": "prod", "lease_sec": 30
    }  # fmt: skip
    assert "password" not in repr(Settings.read())
    monkeypatch.delenv("MODELQUOTA_REDIS_URL")
    configure(MODEL + "[cluster]\nnamespace = 'prod'")
    with pytest.raises(
        QuotaConfigError, match=r"^url=None is not accepted; expected a URL, here or in the environment"
    ):
        Quota(Model(7))


def test_a_framework_that_creates_it_late_is_told_at_its_start(configure, caplog):
    """Starlette creates middleware at the first message: an exception then would be an answer of 500 to everyone."""
    path = configure("[models.m]\nmax_ram_mb = -1")
    app = Starlette()
    app.add_middleware(Quota)
    said = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        said.append(message)

    asyncio.run(app({"type": "lifespan", "app": app, "state": {}}, receive, send))
    assert [message["type"] for message in said] == ["lifespan.startup.failed"]
    assert said[0]["message"].startswith(f"{path}: line 2: [models.")
    assert f"{path}: line 2" in caplog.text
    answer = ask(app)  # by a server that does not speak the lifespan protocol
    assert (answer.status, answer.error["code"]) == (503, "quotas_unusable")
    assert str(path) not in answer.body.decode()


def test_uvicorn_ends_if_the_file_is_bad(configure, tmp_path):
    path = configure("[models.m]\nmax_ram_mb = -1")
    (tmp_path / "served.py").write_text(
        "from starlette.applications import Starlette\nfrom modelquota.asgi import Quota\n"
        "app = Starlette()\napp.add_middleware(Quota)\n"
    )
    command = [sys.executable, "-m", "uvicorn", "--port", "0", "served:app"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3
    assert f"{path}: line 2: [models." in done.stderr
    assert "Application startup failed" in done.stderr


def test_limits_follow_the_file_and_use_is_kept(configure):
    configure(MODEL + "max_tokens_per_hour = 1000")
    app = Quota(Model(7))
    assert ask(app).headers["x-ratelimit-remaining-tokens"] == "890"
    configure(MODEL + "max_tokens_per_hour = 500")
    assert ask(app).headers["x-ratelimit-remaining-tokens"] == str(500 - 7 - 110)
    assert used(app.manager)[0] == 14


def test_a_bad_edit_changes_nothing(configure, caplog):
    path = configure(MODEL + "max_tokens_per_hour = 1000")
    app = Quota(Model(7))
    configure(MODEL + "max_tokens_per_hour = -5")
    assert ask(app).status == 200
    assert f"{path}: line 4" in caplog.text
    assert app.manager.get_quota("m").max_tokens_per_hour == 1000
    path.unlink()
    assert ask(app).status == 200


def test_an_edit_of_http_is_reported(configure, caplog):
    path = configure()
    app = Quota(Model(7))
    configure(MODEL + "[http]\npage = '/quota'")
    assert ask(app).status == 200
    assert f"[http] of {path} has changed: it takes effect after a restart" in caplog.text
    assert "[cluster]" not in caplog.text
    configure(MODEL + "[http]\npage = '/quota'\n[cluster]")
    assert ask(app).status == 200
    assert f"[cluster] of {path} has changed: it takes effect after a restart" in caplog.text


def test_the_file_is_looked_at_once_a_second(configure, monkeypatch):
    monkeypatch.setattr(quota_module, "_LOOK_SECONDS", 1.0)
    configure()
    app = Quota(Model(7))
    looks = []
    monkeypatch.setattr(app._guard, "_read_stamp", lambda: looks.append(1) or app._guard._stamp)
    for _ in range(20):
        ask(app)
    assert 1 <= len(looks) < 20


def test_page_and_metrics_are_served_if_they_are_asked_for(configure, monkeypatch):
    pytest.importorskip("prometheus_client")
    configure(MODEL + "[http]\npage = '/quota'\nmetrics = '/quota/metrics'")
    monkeypatch.setenv("MODELQUOTA_PAGE", "/limits")
    app = Quota(Model(7))
    ask(app)
    get = lambda path, method="GET": asyncio.run(Call(app, path, method=method).run())  # noqa: E731
    assert get("/limits").body.startswith(b"<!doctype html>")
    text = get("/quota/metrics").body.decode()
    assert 'modelquota_tokens_total{model="m"} 7.0' in text or "modelquota" in text
    assert get("/quota/metrics", "HEAD").body == b""
    assert get("/quota/metrics", "POST").status == 405


TOKEN = "a-token-of-the-operator"
ADMIN = "[http]\nadmin = '/quotas'\n"


def admin_status(app, token=TOKEN, path="/quotas/m"):
    headers = [(b"authorization", f"Bearer {token}".encode())]
    return asyncio.run(Call(app, path, method="GET", headers=headers).run()).status


def test_the_admin_api_takes_its_token_from_the_environment_or_a_file(configure, monkeypatch, tmp_path):
    configure(MODEL + ADMIN + "admin_token_file = 'secrets/token'\npage = '/quota'")
    with pytest.raises(FileNotFoundError, match="secrets/token"):
        Quota(Model())
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "token").write_text(TOKEN + "\n")
    app = Quota(Model(7))
    assert [admin_status(app), admin_status(app, "x" * 20), admin_status(app, path="/admin")] == [200, 401, 200]
    (tmp_path / "other").write_text("of-another-file-0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN_FILE", "other")
    monkeypatch.setenv("MODELQUOTA_ADMIN", "/limits")
    app = Quota(Model(7))
    assert admin_status(app, "of-another-file-0", "/limits/m") == 200
    assert admin_status(app, TOKEN, "/limits/m") == 401
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN", "of-the-environment")
    assert admin_status(Quota(Model(7)), "of-the-environment", "/limits/m") == 200
    assert Settings.read(admin_token_file="secrets/token").admin_token == TOKEN, "an option goes before variables"
    assert TOKEN not in repr(Settings.read(admin_token_file="secrets/token"))


def test_the_admin_api_by_arguments(configure):
    configure()
    app = Quota(Model(7), parameters={"admin": "/quotas", "admin_token": TOKEN})
    assert admin_status(app) == 200
    configure(MODEL + ADMIN)
    assert admin_status(Quota(Model(7), parameters={"admin_token": TOKEN})) == 200


def test_the_admin_api_without_a_token_is_refused_at_the_start(configure, monkeypatch, tmp_path):
    configure(MODEL + ADMIN)
    expected = (
        r"^MODELQUOTA_ADMIN_TOKEN=None is not accepted; expected the token of the admin API, 16 to 512 visible ASCII "
        r"characters; or name its file in MODELQUOTA_ADMIN_TOKEN_FILE or admin_token_file$"
    )
    with pytest.raises(QuotaConfigError, match=expected):
        Quota(Model())
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN", "")
    with pytest.raises(QuotaConfigError, match=expected):
        Quota(Model())
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN", "too short, p4ss")
    with pytest.raises(QuotaConfigError, match=r"^MODELQUOTA_ADMIN_TOKEN='...' is not accepted; expected the token"):
        Quota(Model())
    monkeypatch.delenv("MODELQUOTA_ADMIN_TOKEN")
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN_FILE", str(tmp_path / "token"))
    for text in ("", "\n", "p4ss", "p4ss " * 9, "p4ss" * 9 + "\n\nmore", "p4ssü" * 9, "p4ss" * 4000):
        (tmp_path / "token").write_text(text)
        with pytest.raises(QuotaConfigError, match=r"^the text of .*/token='...' is not accepted") as caught:
            Quota(Model())
        assert "p4ss" not in str(caught.value)


def test_a_token_without_the_path_of_an_admin_api_opens_nothing(configure, monkeypatch):
    configure()
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN", TOKEN)
    model = Model(answer={"from": "the application"})
    for path in ("/quotas", "/quotas/m", "/"):
        assert asyncio.run(Call(Quota(model), path, method="GET").run()).json == {"from": "the application"}


def test_the_metrics_are_not_in_the_admin_api(configure, monkeypatch):
    pytest.importorskip("prometheus_client")
    configure(MODEL + ADMIN + "metrics = '/quotas/metrics'")
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN", TOKEN)
    with pytest.raises(QuotaConfigError, match=r"^metrics='/quotas/metrics' is not accepted; .* admin API, /quotas$"):
        Quota(Model())


def test_what_the_admin_api_sets_stays_until_the_file_says_otherwise(configure, monkeypatch):
    configure(MODEL + "max_tokens_per_hour = 1000\n" + ADMIN)
    monkeypatch.setenv("MODELQUOTA_ADMIN_TOKEN", TOKEN)
    app = Quota(Model(7))
    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    change = Call(app, "/quotas/m", {"max_tokens_per_hour": 7}, method="PATCH", headers=headers)
    assert asyncio.run(change.run()).status == 200
    configure(MODEL + "max_tokens_per_hour = 1000\n[models.other]\n" + ADMIN)
    ask(app)
    assert app.manager.get_quota("m").max_tokens_per_hour == 7
    configure(MODEL + "max_tokens_per_hour = 900\n" + ADMIN)
    ask(app)
    assert app.manager.get_quota("m").max_tokens_per_hour == 900


def test_metrics_need_their_extra_at_the_start(configure, monkeypatch):
    configure(MODEL + "[http]\nmetrics = '/metrics'")
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=r"this needs the extra 'prometheus': pip install 'modelquota\[prometheus\]'"):
        Quota(Model())


def test_the_state_file_is_in_the_run_directory_and_named_after_the_quota_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    first, second = default_state(Path("/a/quotas.toml")), default_state(Path("/b/quotas.toml"))
    assert first.parent == tmp_path / "modelquota"
    assert first.name == f"quotas-{hashlib.sha256(b'/a/quotas.toml').hexdigest()[:8]}.state"
    assert first != second
    assert stat.S_IMODE(first.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("MODELQUOTA_QUOTAS", str(tmp_path / "q.toml"))
    monkeypatch.delenv("MODELQUOTA_STATE", raising=False)
    (tmp_path / "q.toml").write_text(MODEL)
    assert Settings.read().state.parent == tmp_path / "modelquota"
    (tmp_path / "q.toml").write_text(MODEL + "[http]\nstate = 'q.state'")
    assert Settings.read().state == tmp_path / "q.state"
    assert Settings.read(state=str(tmp_path / "other")).state == tmp_path / "other"


def test_a_folder_that_others_can_change_is_not_used(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(settings_module.os, "geteuid", lambda: 12345)
    monkeypatch.setattr(settings_module.tempfile, "gettempdir", lambda: str(tmp_path))
    with pytest.raises(QuotaConfigError, match=r"modelquota-12345 can be changed by other users$"):
        default_state(Path("/a/quotas.toml"))  # since it belongs to this user
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "modelquota").mkdir(mode=0o700)
    (tmp_path / "modelquota").chmod(0o777)
    with pytest.raises(QuotaConfigError, match=r"modelquota can be changed by other users$"):
        default_state(Path("/a/quotas.toml"))


def request(body=b"{}", **headers):
    fields = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
    return IncomingRequest({"headers": fields}, body)


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ({"authorization": "Bearer secret"}, b"secret"),
        ({"authorization": "bearer   secret "}, b"secret"),
        ({"Authorization": "Bearer secret", "x_api_key": "secret"}, b"secret"),
        ({"authorization": "Basic c2VjcmV0", "x_api_key": "secret"}, b"secret"),
        ({"api_key": "secret"}, b"secret"),
        ({"X_Goog_Api_Key": "secret"}, b"secret"),
        ({"authorization": "Bearer ", "x_api_key": " "}, None),
        ({"authorization": "secret"}, None),
        ({"x_key": "secret"}, None),
        ({}, None),
    ],
)
def test_the_api_key_of_every_protocol(headers, key):
    assert api_keys(request(**headers)) == ([] if key is None else [key])


def test_a_second_key_that_a_client_makes_up_does_not_replace_its_own():
    """The server behind may check any of them."""
    names = {SECRET[:32]: "acme"}
    made_up = f"key:{hashlib.sha256(b'made up').hexdigest()[:32]}"
    who, refuses = identity_of("bearer", lambda: names), identity_of("bearer", lambda: names, refuse_unknown_keys=True)
    for fields in (
        [(b"authorization", b"Bearer made up"), (b"x-api-key", b"secret")],
        [(b"authorization", b"Bearer made up"), (b"authorization", b"Bearer secret")],
        [(b"authorization", b"Bearer secret"), (b"api-key", b"made up")],
    ):
        asked = IncomingRequest({"headers": fields}, b"")
        assert set(who(asked)) == {"acme", made_up}
        assert refuses(asked) == ("acme",)


def test_a_key_is_known_by_its_hash_and_never_shown():
    names = {}
    who = identity_of("bearer", lambda: names)
    asked = request(authorization="Bearer secret")
    assert who(asked) == (f"key:{SECRET[:32]}",)
    names[SECRET[:32]] = "acme"
    assert who(asked) == ("acme",)
    assert who(request()) == ()
    refuses = identity_of("bearer", lambda: names, refuse_unknown_keys=True)
    assert refuses(asked) == ("acme",)
    for stranger in (request(), request(authorization="Bearer other")):
        with pytest.raises(RequestRefusedError) as caught:
            refuses(stranger)
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")


def test_other_identities():
    assert identity_of("header:X-Tenant")(request(x_tenant="acme")) == "acme"
    assert identity_of("header:x-tenant")(request()) is None
    assert identity_of("header:x-tenant")(request(x_tenant="")) is None
    user = identity_of("openai-user")
    assert user(request(b'{"user": "bob"}')) == "bob"
    assert user(request(b'{"safety_identifier": "bob"}')) == "bob"
    assert user(request(b'{"user": 5}')) is user(request(b'{"user": ""}')) is user(request()) is None
    long = user(request(b'{"user": "%s"}' % (b"x" * 1000)))
    assert long == f"user:{hashlib.sha256(b'x' * 1000).hexdigest()[:32]}"
    with pytest.raises(RequestRefusedError):
        user(request(b"{"))
    for wrong in ("basic", "header:", ""):
        with pytest.raises(ValueError, match="is not accepted; expected"):
            identity_of(wrong)


def test_keys_are_hot(configure):
    limits = 'on_violation = "reject"\n[models."tenant/acme"]\nmax_requests_per_hour = 1\non_violation = "reject"\n'
    identity = "[http]\nidentity = 'bearer'\n"
    configure(MODEL + limits + identity)
    app = Quota(Model(7))
    assert [ask(app, authorization="Bearer secret").status for _ in range(2)] == [200, 200]
    configure(MODEL + limits + identity + f"[keys]\n{SECRET} = 'acme'\n")
    assert [ask(app, authorization="Bearer secret").status for _ in range(2)] == [200, 429]


IDENTITIES = """
[http]
identity = "%s"
page = "/quota"
[keys]
2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b = "acme"
[models."tenant/acme"]
max_requests_per_hour = 1
on_violation = "reject"
[defaults."tenant/*"]
max_requests_per_hour = 2
on_violation = "reject"
"""


@pytest.mark.parametrize(
    ("identity", "named", "other"),
    [
        ("bearer", {"authorization": "Bearer secret"}, {"authorization": "Bearer another-secret"}),
        ("bearer", {"x_api_key": "secret"}, {"x_goog_api_key": "another-secret"}),
        ("header:x-tenant", {"x_tenant": "acme"}, {"x_tenant": "eve"}),
        ("openai-user", {"user": "acme"}, {"user": "eve"}),
    ],
)
def test_each_identity_has_its_quota_and_no_key_is_kept(configure, tmp_path, caplog, identity, named, other):
    configure(MODEL + IDENTITIES % identity)
    app = Quota(Model(7))

    def statuses(who, count, model="m"):
        body = {**chat(), "model": model, **(who if "user" in who else {})}
        fields = [] if "user" in who else [(k.replace("_", "-").encode(), v.encode()) for k, v in who.items()]
        return [asyncio.run(Call(app, body=body, headers=fields).run()).status for _ in range(count)]

    with caplog.at_level("DEBUG"):
        assert statuses(named, 2) == [200, 429], "its own quota"
        assert statuses(other, 3) == [200, 200, 429], "that of the pattern"
        assert statuses({}, 3) == [200] * 3, "nobody: only the model decides"
        assert statuses(other, 1, "tenant/acme") == [429]
    assert used(app.manager, "tenant/acme")[0] == 7
    assert used(app.manager)[0] == 6 * 7
    ids = {"bearer": f"tenant/key:{hashlib.sha256(b'another-secret').hexdigest()[:32]}"}
    assert set(app.manager.list_models()) == {"m", "tenant/acme", ids.get(identity, "tenant/eve")}
    page = asyncio.run(Call(app, "/quota", method="GET", headers=[(b"accept", b"application/json")]).run())
    kept = [caplog.text.encode(), page.body, *(file.read_bytes() for file in tmp_path.glob("quota.state*"))]
    assert all(b"another-secret" not in text for text in kept)


def test_a_key_that_is_not_known_can_be_refused_and_spends_nothing(configure):
    configure(MODEL + (IDENTITIES % "bearer").replace("[keys]", 'unknown_key = "refuse"\n[keys]'))
    app = Quota(Model(7))
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"}):
        answer = ask(app, **headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert app.manager.get_stats().total_checks == 0
    assert app.manager.list_models() == ["m", "tenant/acme"]
    assert ask(app, x_api_key="secret").status == 200


def test_every_field_of_http_is_used(configure):
    parameters = set(inspect.signature(QuotaMiddleware).parameters)
    assert set(quota_module._PASSED_ON) <= HTTP_FIELDS.keys() & parameters
    assert tuple(TABLES) == ROUTE_TABLES
    others = {"identity", "unknown_key", "metrics", "ledger", "state", "admin_token_file"}
    assert HTTP_FIELDS.keys() - set(quota_module._PASSED_ON) == others
    configure(
        MODEL
        + """[http]
        routes = ['openai', 'ollama']
        unknown_model = 'refuse'
        unrouted = 'refuse'
        default_model = 'm'
        headers = 'none'
        retry_spread = 0
        max_body_bytes = 1000
        max_inflight_bytes = 1000
    """
    )
    app = Quota(Model(7))
    assert "x-ratelimit-limit-tokens" not in ask(app).headers
    call = lambda body, path="/v1/chat/completions": asyncio.run(Call(app, path, body).run()).status  # noqa: E731
    assert call({**chat(), "model": "other"}) == 404
    assert call(chat(), "/v1/unheard/of") == call(chat(), "/v1/messages") == 404
    assert call({**chat(), "model": None}) == 200
    assert call({**chat(), "messages": [{"role": "user", "content": "x" * 1000}]}) == 413


def test_workers_that_start_at_the_same_time(configure, tmp_path):
    """As the API servers of vLLM, which are spawned."""
    configure(MODEL + "max_requests_per_hour = 5")
    code = (
        "import asyncio, sys\nsys.path.insert(0, sys.argv[1])\nfrom asgi_client import Call, Model, chat\n"
        "from modelquota.asgi import Quota\napp = Quota(Model(1))\n"
        "print(asyncio.run(Call(app, body=chat()).run()).status)"
    )
    support = str(Path(__file__).parents[1] / "support")
    workers = [
        subprocess.Popen([sys.executable, "-c", code, support], stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert [worker.communicate(timeout=60)[0].strip() for worker in workers] == ["200"] * 4
    with ResourceQuotaManager(path=tmp_path / "quota.state") as manager:
        until(lambda: manager.get_usage("m").concurrent_requests == 0)
        assert manager.get_usage("m").requests_this_hour == 4
