"""The commands on what hosts share, against real servers: what they print and change, and what they never show."""

import inspect
import json
import subprocess
import sys
import time

import pytest

pytest.importorskip("redis")

from real_servers import WHEELS, Server, binary_of, free_port
from typer.testing import CliRunner

import modelquota.demo.quotas
from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cli.app import app
from modelquota.cluster import RedisStore
from modelquota.cluster.operating import published

PATIENCE_SEC = 60
SECRET = "s3cret-pass"
QUOTAS = """
[defaults]
on_violation = "reject"
[models.m]
max_requests_per_hour = 100
[models."odd[bold]"]
[defaults."user:*"]
max_requests_per_hour = 7
[http]
metrics = "/metrics"
"""


@pytest.fixture(scope="module", params=WHEELS)
def server(request, tmp_path_factory):
    if binary_of(request.param) is None:
        pytest.skip(f"the wheel {WHEELS[request.param][0]} is not installed")
    with Server(request.param, tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def namespace(request):
    return f"n{abs(hash(request.node.name))}"


@pytest.fixture
def run(server, namespace, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", server.url)

    def run(*arguments, code=0, given=None, url=None):
        if arguments[0] != "--help" and "--namespace" not in arguments:
            arguments = (*arguments, "--namespace", namespace)
        done = CliRunner().invoke(app, [*arguments, *(["--redis", url] if url else [])], input=given)
        assert done.exit_code == code, done.output
        return done.stdout if code == 0 else done.stderr

    return run


@pytest.fixture
def quotas(tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text(QUOTAS)
    return path


@pytest.fixture
def join(server, namespace):
    """Starts hosts; each is left to itself if the test does not close it."""
    hosts = []

    def join(**fields):
        store = RedisStore(server.url, namespace=namespace, lease_sec=2, renew_sec=0.1)
        hosts.append(ResourceQuotaManager(cluster=store, **fields))
        return hosts[-1]

    yield join
    for host in hosts:
        host.close()


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_SEC
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def crash(server, namespace):
    """A host that dies after one request was admitted."""
    code = f"""
import os, time
from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore
manager = ResourceQuotaManager(cluster=RedisStore({server.url!r}, namespace={namespace!r}, lease_sec=2, renew_sec=0.1))
manager.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_hour=100, on_violation="reject"))
while not manager.check_quota("m", 1) or not any(share.used for share in manager.cluster.shares()):
    time.sleep(0.02)
time.sleep(0.5)
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE_SEC)


def test_published_quotas_reach_hosts_and_keep_what_was_used(run, join, quotas):
    host = join()
    host.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_hour=50, on_violation="reject"))
    wait_for(lambda: host.check_quota("m", 1).allowed)
    used = host.get_usage("m").requests_this_hour
    assert "published 2 models and 1 pattern as version" in run("publish", str(quotas))
    wait_for(lambda: host.get_quota("m").max_requests_per_hour == 100)
    assert host.get_usage("m").requests_this_hour == used
    wait_for(lambda: host.default_quota is not None)
    assert host.default_quota["user:*"].max_requests_per_hour == 7
    late = join()
    wait_for(lambda: late.get_quota("odd[bold]") is not None)
    quotas.write_text(QUOTAS.replace("100", "200").replace("= 7", "= 8"))
    run("publish", str(quotas))
    for each in (host, late):
        wait_for(lambda each=each: each.get_quota("m").max_requests_per_hour == 200)
        wait_for(lambda each=each: each.default_quota["user:*"].max_requests_per_hour == 8)


def test_a_model_that_is_not_published_any_more_keeps_its_limits(run, join, quotas, caplog):
    host = join()
    run("publish", str(quotas))
    wait_for(lambda: host.get_quota("m") is not None)
    quotas.write_text("[models.other]\nmax_requests_per_hour = 1\n")
    run("publish", str(quotas))
    wait_for(lambda: host.get_quota("other") is not None and "keeps its limits" in caplog.text)
    assert host.get_quota("m").max_requests_per_hour == 100
    wait_for(lambda: host.default_quota is None)


def test_the_other_processes_of_a_host_adopt_them_too(run, join, quotas, tmp_path):
    first = join(path=tmp_path / "state")
    wait_for(lambda: first.cluster.status().leads)
    second = join(path=tmp_path / "state")
    run("publish", str(quotas))
    wait_for(lambda: second.default_quota is not None)
    assert not second.cluster.status().leads
    assert second.get_quota("m").max_requests_per_hour == 100


def test_a_file_that_names_nothing_is_not_published(run, tmp_path):
    empty = tmp_path / "empty.toml"
    empty.write_text("")
    assert "names no model and no pattern" in run("publish", str(empty), code=2)
    assert "No such file" in run("publish", str(tmp_path / "none"), code=2)
    empty.write_text("[models.m]\nmax_ram_mb = -1\n")
    assert "max_ram_mb" in run("publish", str(empty), code=2)
    assert json.loads(run("status", "--json"))["quotas_version"] == 0


def test_status_adds_up_all_hosts(run, join):
    hosts = [join(), join()]
    for host in hosts:
        host.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_hour=100, on_violation="reject"))
    for host in hosts:
        wait_for(lambda host=host: host.check_quota("m", 1).allowed)

    def state():
        return json.loads(run("status", "--json"))

    wait_for(lambda: state()["limits"][0]["used"] == sum(h.get_usage("m").requests_this_hour for h in hosts))
    found = state()
    (limit,) = found["limits"]
    assert (limit["model_id"], limit["limit"], limit["whole"], limit["ghosts"]) == ("m", "requests_per_hour", 100, 0)
    assert limit["shares"] + limit["free"] == 100
    assert [node["live"] for node in found["nodes"]] == [True, True]
    text = run("status")
    assert "requests per hour" in text
    assert "2 live, 0 ghosts" in text
    run("status", "--above", "1", code=1)
    run("status", "--above", "100")
    for host in hosts:
        host.close()
    (limit,) = state()["limits"]
    assert limit["used"] == limit["ghosts"] == 2, "what hosts that left had used is counted"
    assert limit["free"] == 98


def test_a_ghost_is_forgotten_after_a_question(run, server, namespace, join):
    crash(server, namespace)
    (node,) = json.loads(run("nodes", "--json"))
    assert "is live: stop it" in run("forget", node["node_id"], "--yes", code=2)
    wait_for(lambda: not json.loads(run("nodes", "--json"))[0]["live"])
    assert "0 live, 1 ghosts" in run("nodes")
    message = run("forget", node["node_id"][:6], given="n\n", code=1)
    assert "more than a limit may be admitted" in message
    assert json.loads(run("status", "--json"))["limits"][0]["ghosts"] >= 1
    assert f"forgotten: {node['node_id']}" in run("forget", node["node_id"], given="y\n")
    assert json.loads(run("status", "--json")) == {
        "nodes": [], "limits": [], "learning_seconds": 0, "quotas_version": 0
    }  # fmt: skip
    assert "there is no such host" in run("forget", node["node_id"], "--yes", code=1)
    host = join()
    host.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_hour=100, on_violation="reject"))
    admitted = [0]

    def ask():
        admitted[0] += host.check_quota("m", 1).allowed
        return admitted[0] == 100

    wait_for(ask)


def test_what_was_handed_over_is_forgotten_too_and_that_of_others_stays(run, join):
    for _ in range(2):
        with join() as host:
            host.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_hour=100, on_violation="reject"))
            wait_for(lambda host=host: host.check_quota("m", 1).allowed)
    first, second = json.loads(run("nodes", "--json"))
    assert "2 hosts begin with it" in run("forget", "", "--yes", code=1)
    run("forget", first["node_id"], "--yes")
    assert [node["node_id"] for node in json.loads(run("nodes", "--json"))] == [second["node_id"]]
    (limit,) = json.loads(run("status", "--json"))["limits"]
    assert (limit["ghosts"], limit["free"]) == (1, 99)


@pytest.mark.parametrize(
    "command", [("publish", "QUOTAS"), ("nodes",), ("status",), ("forget", "a", "--yes")], ids=lambda words: words[0]
)
@pytest.mark.parametrize("url", ["redis://u:{}@127.0.0.1:{}", "redis://:{}@[::1", "redis://127.0.0.1/?password={}"])
def test_a_password_is_refused_in_arguments_and_never_shown(run, quotas, monkeypatch, command, url):
    words = [str(quotas) if word == "QUOTAS" else word for word in command]
    url = url.format(SECRET, free_port())
    said = run(*words, url=url, code=2)
    assert "MODELQUOTA_REDIS_URL" in said
    assert SECRET not in said
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", url)
    said = run(*words, code=2)
    assert said.startswith("modelquota: error: ")
    assert SECRET not in said


def test_a_file_says_where_it_is_published(server, namespace, tmp_path, monkeypatch):
    monkeypatch.delenv("MODELQUOTA_REDIS_URL", raising=False)
    path = tmp_path / "quotas.toml"
    path.write_text(f"{QUOTAS}\n[cluster]\nurl = '{server.url}'\nnamespace = '{namespace}'")
    done = CliRunner().invoke(app, ["publish", str(path)])
    assert (done.exit_code, done.stderr) == (0, "")
    assert published(RedisStore(server.url, namespace=namespace))[1].cluster is None
    assert published(RedisStore(server.url)) is None
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    assert CliRunner().invoke(app, ["publish", str(path)]).exit_code == 2, "the variable goes before the file"
    done = CliRunner().invoke(app, ["publish", str(path), "--redis", server.url, "--namespace", f"{namespace}b"])
    assert (done.exit_code, done.stderr) == (0, "")
    assert published(RedisStore(server.url, namespace=f"{namespace}b")) is not None


@pytest.mark.parametrize(
    ("options", "url", "namespace"),
    [
        ([], "redis://127.0.0.1:1", "prod"),
        (["--namespace", "mine"], "redis://127.0.0.1:1", "mine"),
        (["--redis", "redis://127.0.0.1:2"], "redis://127.0.0.1:2", "prod"),
    ],
)
def test_the_demo_shares_as_its_file_says(options, url, namespace, tmp_path, monkeypatch):
    pytest.importorskip("uvicorn")
    monkeypatch.delenv("MODELQUOTA_REDIS_URL", raising=False)
    given = []

    def stop(quotas, **fields):
        given.append(fields["cluster"])
        raise ValueError("far enough")

    monkeypatch.setattr(modelquota.demo.quotas, "demo_manager", stop)
    path = tmp_path / "quotas.toml"
    path.write_text(QUOTAS)
    assert "far enough" in CliRunner().invoke(app, ["serve-demo", "--quotas", str(path)]).stderr
    path.write_text(f"{QUOTAS}\n[cluster]\nurl = 'redis://127.0.0.1:1'\nnamespace = 'prod'\nlease_sec = 9")
    assert "far enough" in CliRunner().invoke(app, ["serve-demo", "--quotas", str(path), *options]).stderr
    alone, store = given
    assert alone is None
    assert (store.__reduce__()[0].args, store.namespace, store.lease_sec) == ((url,), namespace, 9.0)


@pytest.mark.parametrize("command", ["publish", "serve-demo", "proxy"])
def test_a_password_in_a_file_is_not_shown_by_a_command(tmp_path, command):
    pytest.importorskip("uvicorn")
    path = tmp_path / "quotas.toml"
    path.write_text(f"{QUOTAS}\n[cluster]\nurl = 'redis://:{SECRET}@127.0.0.1:1'")
    options = {"publish": [str(path)], "serve-demo": ["--quotas", str(path)]}
    more = options.get(command, ["--quotas", str(path), "--upstream", "http://127.0.0.1:1"])
    done = CliRunner().invoke(app, [command, *more])
    assert done.exit_code == 2
    assert "MODELQUOTA_REDIS_URL" in done.stderr.replace("\n", "")
    assert SECRET not in done.output


def test_every_command_that_takes_a_url_refuses_a_password_in_it(tmp_path):
    words = {"publish": ["FILE"], "forget": ["a"]}
    taking = [
        command.name for command in app.registered_commands if "redis" in inspect.signature(command.callback).parameters
    ]
    assert {"publish", "nodes", "forget", "status", "serve-demo"} <= {*taking}
    path = tmp_path / "quotas.toml"
    path.write_text(QUOTAS)
    for name in taking:
        more = [str(path) if word == "FILE" else word for word in words.get(name, [])]
        done = CliRunner().invoke(app, [name, *more, "--redis", f"redis://:{SECRET}@127.0.0.1:1"])
        assert done.exit_code == 2, name
        assert "set it as MODELQUOTA_REDIS_URL" in " ".join(done.stderr.split())
        assert SECRET not in done.output


def test_without_a_url_or_the_extra_it_says_what_to_do(run, monkeypatch):
    monkeypatch.delenv("MODELQUOTA_REDIS_URL")
    assert "MODELQUOTA_REDIS_URL" in run("nodes", code=2)
    assert "--path FILE or --redis URL" in run("status", code=2)
    assert "not both" in run("status", "--path", "x", url="redis://127.0.0.1:1", code=2)
    monkeypatch.setitem(sys.modules, "redis", None)
    said = run("nodes", url="redis://127.0.0.1:1", code=2)
    assert said == "modelquota: error: this needs the extra 'redis': pip install 'modelquota[redis]'\n"


def test_a_ledger_of_another_version_is_refused(run, server, namespace, quotas):
    import redis

    with redis.Redis(port=server.port) as client:
        client.hset(f"mq:{{{namespace}:0}}:meta", "format", "9")
        for words in (("publish", str(quotas)), ("nodes",), ("status",), ("forget", "a")):
            assert "(format)" in run(*words, code=2)


def test_the_demo_refuses_a_password_and_a_port_that_is_taken(server):
    pytest.importorskip("uvicorn")
    options = ["serve-demo", "--namespace", "demo", "--port"]
    done = CliRunner().invoke(app, [*options, "0", "--redis", f"redis://:{SECRET}@127.0.0.1:1"])
    assert done.exit_code == 2
    assert "MODELQUOTA_REDIS_URL" in done.stderr
    assert SECRET not in done.stderr
    done = CliRunner().invoke(app, [*options, str(server.port), "--redis", server.url])
    assert done.exit_code == 2, "the port is the store's"
    assert "cannot listen" in done.stderr
