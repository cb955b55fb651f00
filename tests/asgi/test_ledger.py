"""The ledger of a server: a line for each request that the quotas decide on, and nothing without one."""

import asyncio
import json

import pytest
from asgi_client import OPEN, Call, Model, chat

import modelquota.asgi.quota as quota_module
from modelquota import ManualClock, ResourceQuotaManager
from modelquota.asgi import Quota, QuotaMiddleware
from modelquota.asgi.settings import Settings
from modelquota.monitoring.ledger import Ledger


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("m", **OPEN | {"on_violation": "reject"})
    manager.set_quota("tenant/acme", **OPEN)
    return manager


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "usage.jsonl") as ledger:
        yield ledger


def requests_of(ledger):
    ledger.flush()
    with open(ledger.path) as file:
        lines = [json.loads(line) for line in file]
    return [line for line in lines if "ids" in line]


def told(line):
    return line["ids"], line["estimated"], line["settled"], line["verdict"], line["limit"]


def test_what_was_admitted_and_what_was_denied(manager, ledger):
    app = QuotaMiddleware(Model(7), manager, ledger=ledger, identity=lambda request: request.header("x-tenant"))

    async def main():
        assert (await Call(app, body=chat(max_tokens=5))).status == 200
        assert (await Call(app, body=chat(max_tokens=5), headers=[(b"x-tenant", b"acme")])).status == 200
        assert (await Call(app, body=chat(max_tokens=2_000_000))).status == 400
        manager.update_quota("m", max_requests_per_hour=2)
        assert (await Call(app, body=chat(max_tokens=5))).status == 429
        assert (await Call(app, body=b"{")).status == 400  # nothing was decided

    asyncio.run(main())
    found = requests_of(ledger)
    prompt = found[0]["estimated"][0]
    assert prompt > 0
    admitted = [prompt, 0, 5]
    used = found[0]["settled"]
    assert sum(used) == 7
    assert [told(line) for line in found] == [
        (["m"], admitted, used, "admitted", None),
        (["tenant/acme", "m"], admitted, used, "admitted", None),
        (["m"], [prompt, 0, 2_000_000], None, "denied", "tokens_per_hour"),
        (["m"], admitted, None, "denied", "requests_per_hour"),
    ]
    assert all(line["waited_us"] >= 0 for line in found)
    assert [line["duration_us"] is None for line in found] == [False, False, True, True]


def test_an_answer_that_costs_nothing(manager, ledger):
    async def not_found(scope, receive, send):
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    asyncio.run(Call(QuotaMiddleware(not_found, manager, ledger=ledger), body=chat()).run())
    assert [(line["settled"], line["verdict"]) for line in requests_of(ledger)] == [(0, "admitted")]


def test_an_application_that_raises(manager, ledger):
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(Call(QuotaMiddleware(broken, manager, ledger=ledger), body=chat()).run())
    assert [line["settled"] for line in requests_of(ledger)] == [0]


def test_a_wait_is_told_and_a_client_that_leaves_it_is_not(ledger):
    manager = ResourceQuotaManager()
    manager.set_quota("m", **OPEN | {"max_concurrent_requests": 1, "on_violation": "queue"})
    app = QuotaMiddleware(Model(7), manager, ledger=ledger)

    async def queued(count):
        while manager.get_usage("m").queued_requests != count:
            await asyncio.sleep(0.001)

    async def main():
        held = manager.reserve("m", 1)
        leaving, waiting = Call(app, body=chat()).start(), Call(app, body=chat()).start()
        await asyncio.wait_for(queued(2), 20)
        await leaving.leave()
        await asyncio.wait_for(queued(1), 20)
        held.release()
        await asyncio.wait_for(waiting.task, 20)

    asyncio.run(main())
    (line,) = requests_of(ledger)
    assert line["verdict"] == "admitted"
    assert line["waited_us"] > 0


MODEL = "[models.m]\nmax_requests_per_hour = 1\non_violation = 'reject'\n"


@pytest.mark.parametrize("variable", [None, "elsewhere.jsonl"])
def test_the_quota_file_and_the_environment_name_it(variable, tmp_path, monkeypatch):
    (tmp_path / "quotas.toml").write_text(MODEL + "[http]\nledger = 'logs/usage.jsonl'\nstate = 'quota.state'\n")
    (tmp_path / "logs").mkdir()
    monkeypatch.chdir(tmp_path / "logs")
    environment = {"MODELQUOTA_QUOTAS": str(tmp_path / "quotas.toml")}
    if variable is not None:
        environment["MODELQUOTA_LEDGER"] = variable
    settings = Settings.read(environment)
    try:
        apps = [Quota(Model(7), settings), Quota(Model(7), settings)]
        for app in apps:
            asyncio.run(Call(app, body=chat()).run())
        (guard,) = quota_module._guards.values()
        with guard.ledger as ledger:
            assert ledger.path == str(tmp_path / "logs" / (variable or "usage.jsonl"))
            assert [line["verdict"] for line in requests_of(ledger)] == ["admitted", "denied"]
    finally:
        for guard in quota_module._guards.values():
            guard.manager.close()
        quota_module._guards.clear()


def test_there_is_none_unless_it_is_asked_for(tmp_path):
    (tmp_path / "quotas.toml").write_text(MODEL + "[http]\nstate = 'quota.state'\n")
    try:
        app = Quota(Model(7), Settings.read({"MODELQUOTA_QUOTAS": str(tmp_path / "quotas.toml")}))
        asyncio.run(Call(app, body=chat()).run())
        (guard,) = quota_module._guards.values()
        assert guard.ledger is None
        assert sorted(path.name for path in tmp_path.iterdir()) == ["quota.state", "quotas.toml"]
    finally:
        for guard in quota_module._guards.values():
            guard.manager.close()
        quota_module._guards.clear()
