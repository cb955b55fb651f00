"""`RedisStore` against real servers, and against what servers answer when something is wrong."""

import pickle
import signal
import socket

import pytest

from modelquota.cluster.quantities import QUANTITIES
from modelquota.cluster.store import ModelRequest, Quantity, Request
from modelquota.errors import QuotaConfigError, StoreError

redis = pytest.importorskip("redis")

from real_servers import WHEELS, Server, answering, binary_of, free_port  # noqa: E402

from modelquota.cluster import RedisStore  # noqa: E402

SECRET = "s3cret-pass"


def make_request(number=1, nonce="", node_id="a", model_id="m"):
    quantities = (Quantity(100, 60_000),) + (Quantity(None, 0),) * (QUANTITIES - 1)
    zeros = (0,) * QUANTITIES
    models = [ModelRequest(model_id, 7, 0, quantities, zeros, zeros, (50, *zeros[1:]), zeros)]
    return Request("exchange", node_id, number, f"t{number}", nonce, "b", 1000 * number, 2000, models)


@pytest.fixture(params=WHEELS)
def start(request, tmp_path):
    """Starts servers of one kind, which end with the test."""
    if binary_of(request.param) is None:
        pytest.skip(f"the wheel {WHEELS[request.param][0]} is not installed")
    servers = []

    def start(*options, **fields):
        servers.append(Server(request.param, tmp_path, *options, **fields).start())
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def refused(store):
    with pytest.raises(StoreError) as caught:
        store.exchange(make_request())
    store.close()
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    return caught.value.kind


def test_a_request_is_executed_and_all_keys_are_in_the_namespace(start):
    server = start()
    store = RedisStore(server.url, namespace="prod")
    reply = store.exchange(make_request())
    assert (reply.status, reply.nodes) == ("learning", 0)
    assert store.exchange(make_request()) == reply
    store.exchange(make_request(2, reply.nonce, model_id="}{other:0}:m\n"))
    with redis.Redis(port=server.port) as client:
        keys = client.keys()
        assert all(key.startswith(b"mq:{prod:0}:") for key in keys)
        assert all(client.ttl(key) == -1 for key in keys)


def test_a_server_that_has_lost_the_script_is_given_it_again(start):
    server = start()
    store = RedisStore(server.url)
    reply = store.exchange(make_request())
    with redis.Redis(port=server.port) as client:
        client.script_flush()
    assert store.exchange(make_request(2, reply.nonce)).generation == reply.generation


def test_a_server_that_was_restarted_relearns(start):
    server = start()
    store = RedisStore(server.url)
    reply = store.exchange(make_request())
    server.stop()
    assert refused(store) in ("unreachable", "timeout")
    server.start()
    after = store.exchange(make_request(2, reply.nonce))
    assert after.status == "learning"
    assert after.generation > reply.generation


def test_a_wrong_password_is_said_and_not_shown(start):
    server = start("--requirepass", "right")
    assert refused(RedisStore(server.url)) == "credentials"
    assert refused(RedisStore(f"redis://:{SECRET}@127.0.0.1:{server.port}")) == "credentials"
    RedisStore(f"redis://:right@127.0.0.1:{server.port}").exchange(make_request())


def test_a_replica_is_refused(start):
    primary = start()
    replica = start("--replicaof", "127.0.0.1", str(primary.port))
    assert refused(RedisStore(replica.url)) == "read_only"


def test_full_memory_is_said_and_nothing_is_written(start):
    server = start("--maxmemory", "1")
    store = RedisStore(server.url)
    assert refused(store) == "out_of_memory"
    with redis.Redis(port=server.port) as client:
        assert client.dbsize() == 0
        client.config_set("maxmemory", 0)
    assert store.exchange(make_request()).status == "learning"


def test_a_server_that_evicts_keys_is_refused(start):
    server = start("--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru")
    assert refused(RedisStore(server.url)) == "eviction"


def test_a_reply_counts_only_if_the_replicas_have_it(start):
    primary = start()
    store = RedisStore(primary.url, wait_replicas=1)
    assert refused(store) == "replicas"
    start("--replicaof", "127.0.0.1", str(primary.port))
    with redis.Redis(port=primary.port) as client:
        assert client.execute_command("WAIT", 1, 20_000) == 1
    assert store.exchange(make_request()).status == "learning"


def test_a_reply_that_is_repeated_on_another_connection_counts_only_if_the_replicas_have_it(start):
    primary = start()
    replica = start("--replicaof", "127.0.0.1", str(primary.port))
    with redis.Redis(port=primary.port) as client:
        client.set("mq:{other:0}:x", "")
        assert client.execute_command("WAIT", 1, 20_000) == 1
    replica.process.send_signal(signal.SIGSTOP)
    for _ in range(2):  # the second store has a connection that has written nothing
        assert refused(RedisStore(primary.url, wait_replicas=1)) == "replicas"
    replica.process.send_signal(signal.SIGCONT)
    with redis.Redis(port=primary.port) as client:
        client.set("mq:{other:0}:x", "")
        assert client.execute_command("WAIT", 1, 20_000) == 1
    assert RedisStore(primary.url, wait_replicas=1).exchange(make_request()).status == "learning"


def test_another_client_may_be_given(start):
    valkey = pytest.importorskip("valkey")
    server = start()
    with valkey.Valkey(port=server.port) as client:
        store = RedisStore(client=client, wait_replicas=0)
        assert store.exchange(make_request()).status == "learning"
    with pytest.raises(TypeError, match="client="):
        pickle.dumps(store)


OLD = b"# Server\r\nredis_version:6.0.16\r\n"


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        (b"-LOADING Redis is loading the dataset in memory\r\n", "loading"),
        (b"-NOAUTH Authentication required.\r\n", "credentials"),
        (b"-NOPERM this user has no permissions to run the 'info' command\r\n", "credentials"),
        (b"-MISCONF Errors writing to the AOF file\r\n", "refused"),
        (b"-NOREPLICAS Not enough good replicas to write.\r\n", "replicas"),
        (b"-CLUSTERDOWN The cluster is down\r\n", "refused"),
        (b"-ERR " + SECRET.encode() + b"\r\n", "refused"),
        (b"$%d\r\n%s\r\n" % (len(OLD), OLD), "version"),
    ],
)
def test_what_a_server_says_becomes_a_word(line, kind):
    listener, port = answering(line)
    with listener:
        assert refused(RedisStore(f"redis://127.0.0.1:{port}")) == kind


def test_a_port_that_nobody_listens_at_is_unreachable():
    assert refused(RedisStore(f"redis://:{SECRET}@127.0.0.1:{free_port()}")) == "unreachable"


def test_a_server_that_does_not_answer_is_given_up_soon():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert refused(RedisStore(f"redis://127.0.0.1:{listener.getsockname()[1]}")) == "timeout"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("namespace", ""), ("namespace", "a}b"), ("namespace", "{x}"), ("namespace", "a b"), ("namespace", "x" * 65),
        ("namespace", "a\n"), ("lease_sec", 1.9), ("lease_sec", 3601), ("lease_sec", "60"), ("lease_sec", float("nan")),
        ("renew_sec", 0.05), ("renew_sec", 31), ("on_store_down", "open"), ("wait_replicas", -1),
        ("wait_replicas", 17), ("wait_replicas", 1.0),
    ],
)  # fmt: skip
def test_a_parameter_that_is_not_accepted_is_named(field, value):
    with pytest.raises(QuotaConfigError) as caught:
        RedisStore("redis://localhost", **{field: value})
    assert caught.value.field == field


@pytest.mark.parametrize(
    "url", [f"http://u:{SECRET}@host", f"redis://u:{SECRET}@host:port", f"redis://:{SECRET}@[::1", f"{SECRET}"]
)
def test_a_url_that_is_not_accepted_is_not_shown(url):
    with pytest.raises(QuotaConfigError) as caught:
        RedisStore(url)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value.__cause__) + repr(caught.value.__context__)


def test_the_url_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("MODELQUOTA_REDIS_URL", raising=False)
    with pytest.raises(QuotaConfigError, match="MODELQUOTA_REDIS_URL"):
        RedisStore()
    monkeypatch.setenv("MODELQUOTA_REDIS_URL", f"redis://:{SECRET}@127.0.0.1:1")
    store = RedisStore(namespace="prod", lease_sec=10)
    assert SECRET not in repr(store) + str(vars(store).values())
    data = pickle.dumps(store)
    assert SECRET.encode() not in data
    assert pickle.loads(data).lease_sec == 10
