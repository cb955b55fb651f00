"""Hosts in processes that share limits through real servers, while hosts, servers and the network between them fail.

Of each admission the earliest and the latest time is written down, and no window and no rate may have held more than
its limit for certain, over all hosts. Each scenario runs against one of the two kinds of server, the first against
both.
"""

import shutil
import ssl
import time
from contextlib import ExitStack

import pytest

pytest.importorskip("redis")

import redis
from cluster_crew import NS, Crew, most_ahead, most_in, now_ns, wait_for
from faulty_proxy import NONE, ROUGH, Proxy, certificate
from real_servers import WHEELS, Server, binary_of, installed

from modelquota.cluster import RedisStore
from modelquota.cluster.store import Request
from modelquota.errors import StoreError

RATE = 400
LEVEL = 4_000
MINUTE = 1_200
QUOTAS = {
    "second": {"max_requests_per_second": RATE, "burst_requests": 0},
    "level": {"max_tokens_per_second": LEVEL, "burst_tokens": 2 * LEVEL},
    "minute": {"max_requests_per_minute": MINUTE},
    "hour": {"max_tokens_per_hour": 30_000, "max_requests_per_day": 2_000},
}
MONTH = {"month": {"max_requests_per_month": 3_000}, "month#meter": {"max_tokens_per_month": 15_000}}
pytestmark = pytest.mark.alone  # parts of a limit that are used

SLOT = 61 / 60  # what has begun to age out counts in full: a second's limit is that of 61/60 s


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(stack, tmp_path):
    """Starts servers, which end with the test."""

    def serve(kind, *options):
        folder = tmp_path / f"server-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return stack.enter_context(Server(installed(kind), folder, *options))

    return serve


def used(crew, seconds):
    """Let time pass, and return which part of the second's limit and of the level's rate was admitted meanwhile."""
    begin_ns = now_ns()
    time.sleep(seconds)
    end_ns = now_ns()
    lasted = (end_ns - begin_ns) / NS
    return (
        crew.admitted("second", begin_ns, end_ns) * SLOT / (RATE * lasted),
        crew.admitted("level", begin_ns, end_ns, "tokens") / (LEVEL * lasted),
    )


def begun(crew, states=(None,) * 4, **fields):
    """Start workers, and wait until the store has learned and the bursts are over."""
    workers = [crew.start(state=state, **fields) for state in states]
    crew.waits_for("second", 3 * RATE)
    wait_for(lambda: crew.admitted("minute") >= 0.95 * MINUTE)
    return workers


def test_the_verdict_finds_one_admission_too_many():
    times = [(1, at * NS // 10, at * NS // 10 + 5) for at in range(30)]
    assert most_in(times, NS) == 10
    assert most_in([*times, (2, NS, NS + 1)], NS) == 12
    assert most_in([(1, 0, 3 * NS), *times], NS) == 10  # it was admitted at any time of these
    assert round(most_ahead(times, 10)) == 1
    assert round(most_ahead([*times, (3, NS, NS + 1)], 10)) == 4


@pytest.mark.parametrize("kind", WHEELS)
def test_equal_nodes_use_nearly_all_of_the_limits(kind, stack, serve, tmp_path):
    if binary_of(kind) is None:
        pytest.skip(f"the wheel {WHEELS[kind][0]} is not installed")
    crew = Crew(stack, serve(kind).url, tmp_path, QUOTAS | MONTH)
    begun(crew)
    assert min(used(crew, 4)) >= 0.95
    assert crew.admitted("hour", kind="tokens") >= 0.95 * 30_000 or crew.admitted("hour") >= 0.95 * 2_000
    assert crew.admitted("month#meter", kind="tokens") >= 0.95 * 15_000
    crew.end()
    crew.require_limits()


def test_one_hot_node_uses_nearly_all_that_cold_ones_leave(stack, serve, tmp_path):
    crew = Crew(stack, serve("redis").url, tmp_path, QUOTAS)
    for _ in range(3):
        crew.start(pause_ms=200)
    begun(crew, [None], pause_ms=0.5)
    assert min(used(crew, 4)) >= 0.9
    crew.end()
    crew.require_limits()


def test_nodes_that_are_killed_and_stopped_exceed_nothing(stack, serve, tmp_path):
    crew = Crew(stack, serve("valkey").url, tmp_path, QUOTAS)
    killed, stopped, *_ = begun(crew)
    killed.kill()
    stopped.stop()
    crew.start()
    time.sleep(4)  # the leases of both end, and their shares of the second are given to the others
    assert min(used(crew, 2)) >= 0.9
    stopped.go_on()
    crew.waits_for("second", 2 * RATE)
    assert {end["state"] for end in crew.end()} == {"ok"}
    crew.require_limits()


@pytest.mark.parametrize("keeps", [True, False], ids=["with its data", "empty"])
def test_a_store_that_restarts_relearns_what_the_nodes_have(keeps, stack, serve, tmp_path):
    server = serve("valkey", *(("--appendonly", "yes", "--appendfsync", "always") if keeps else ()))
    crew = Crew(stack, server.url, tmp_path, QUOTAS)
    leaves, *_ = begun(crew)
    server.stop()
    crew.waits_for("second", RATE // 4)  # the leases go on
    server.start()
    crew.waits_for("second", RATE)
    if keeps:  # then it also knows what one that dies in this moment has used
        leaves.kill()
    crew.start()
    time.sleep(6 if keeps else 3)  # the share of one that died is held until its lease has ended, and its level drained
    assert min(used(crew, 2)) >= 0.9
    crew.end()
    crew.require_limits()


@pytest.mark.parametrize(("file", "least"), [(False, 0.5), (True, 0.75)], ids=["without files", "with state files"])
def test_a_rolling_restart_exceeds_nothing(file, least, stack, serve, tmp_path):
    crew = Crew(stack, serve("redis").url, tmp_path, QUOTAS)
    states = [tmp_path / f"state-{number}" if file else None for number in range(4)]
    workers = begun(crew, states=states)
    began_ns = now_ns()
    for worker, state in zip(workers, states, strict=True):
        worker.end()
        worker.ended()
        crew.start(state=state)
        time.sleep(1.5)
    ended_ns = now_ns()
    rolled = crew.admitted("second", began_ns, ended_ns) * SLOT * NS / (RATE * (ended_ns - began_ns))
    assert rolled >= least  # what one that leaves has used stays taken for its window and a second
    time.sleep(2)
    assert min(used(crew, 2)) >= 0.95
    assert [end["state"] for end in crew.end()] == ["ok"] * 4
    crew.require_limits()


def test_of_two_nodes_with_one_state_the_second_is_fenced(stack, serve, tmp_path):
    quotas = {**QUOTAS, "minute": {"max_requests_per_minute": 100 * MINUTE}}
    del quotas["hour"]  # a limit that is used up, of which both have the same use, lets neither be covered for so long
    crew = Crew(stack, serve("valkey").url, tmp_path, quotas)
    state, copied = tmp_path / "state", tmp_path / "copied"
    first = crew.start(state=state)
    crew.start()
    crew.waits_for("second", 4 * RATE)
    first.stop()  # a snapshot of a machine stands still
    shutil.copyfile(state, copied)
    first.go_on()
    crew.start(state=copied)
    time.sleep(4)
    separate_ns = now_ns()
    assert min(used(crew, 3)) >= 0.9
    ends = crew.end()
    assert [end["state"] for end in ends] == ["ok"] * 3
    assert sum(end["renewals"].get("fenced", 0) + end["renewals"].get("stale", 0) for end in ends) == 1
    crew.require_limits(separate_ns)
    # Until one of the two was fenced both were within one share, at most all of the limit.
    crew.require_limits(beyond={"second": RATE, "level": 3 * LEVEL})


def test_messages_that_are_lost_late_and_repeated_exceed_nothing(stack, serve, tmp_path):
    proxy = stack.enter_context(Proxy(serve("redis").port))
    crew = Crew(stack, proxy.url, tmp_path, QUOTAS, lease_sec=4)
    begun(crew)
    proxy.faults = ROUGH
    for _ in range(8):
        time.sleep(1)
        proxy.cut()
    proxy.faults = NONE
    assert all(proxy.seen.values()), proxy.seen
    time.sleep(3)
    assert min(used(crew, 2)) >= 0.95
    assert {end["state"] for end in crew.end()} == {"ok"}
    crew.require_limits()


def test_a_store_that_cannot_be_reached_denies_when_the_leases_end(stack, serve, tmp_path):
    proxy = stack.enter_context(Proxy(serve("valkey").port))
    crew = Crew(stack, proxy.url, tmp_path, QUOTAS)
    begun(crew)
    proxy.listens = False
    proxy.cut()
    cut_ns = now_ns()
    time.sleep(1.5)
    ended_ns = now_ns()
    time.sleep(1)
    assert crew.admitted("second", cut_ns, ended_ns) >= RATE // 2
    assert crew.admitted("second", ended_ns) == 0
    proxy.listens = True
    crew.waits_for("second", RATE)
    crew.end()
    crew.require_limits()


def test_a_replica_that_has_lost_the_last_writes_grants_nothing_that_is_taken(stack, serve, tmp_path):
    primary = serve("redis")
    replica = serve("redis", "--replicaof", "127.0.0.1", str(primary.port))
    proxy = stack.enter_context(Proxy(primary.port))
    crew = Crew(stack, proxy.url, tmp_path, QUOTAS)
    crew.start()
    crew.waits_for("second", RATE)
    with redis.Redis(port=primary.port) as client:
        assert client.execute_command("WAIT", 1, 10_000) == 1
    with redis.Redis(port=replica.port) as client:
        assert client.dbsize() > 0
        client.execute_command("REPLICAOF", "NO", "ONE")  # from here on it has none of the writes
    for _ in range(3):
        crew.start()
    crew.waits_for("second", 2 * RATE)
    primary.stop()
    proxy.port = replica.port
    proxy.cut()
    crew.start()
    time.sleep(4)
    assert min(used(crew, 2)) >= 0.9
    assert {end["state"] for end in crew.end()} == {"ok"}
    crew.require_limits()


def test_a_store_is_reached_by_tls_and_only_if_its_certificate_is_known(stack, serve, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("no program openssl, which makes the certificate")
    own, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own, key)
    proxy = stack.enter_context(Proxy(serve("valkey").port, tls=context))
    with pytest.raises(StoreError) as caught:
        RedisStore(proxy.url).exchange(Request("exchange", "a", 1, "t", "", "b", 1, 2000, []))
    assert caught.value.kind == "unreachable"
    crew = Crew(stack, f"{proxy.url}?ssl_ca_certs={own}", tmp_path, QUOTAS)
    for _ in range(2):
        crew.start()
    crew.waits_for("second", RATE)
    assert {end["state"] for end in crew.end()} == {"ok"}
    crew.require_limits()


def test_no_password_appears_in_logs_and_reprs_of_a_node_that_is_refused(stack, serve, tmp_path):
    server = serve("redis", "--requirepass", "right")
    crew = Crew(stack, f"redis://user:s3cret-pass@127.0.0.1:{server.port}/0", tmp_path, QUOTAS)
    worker = crew.start()
    wait_for(lambda: "does not accept the user" in worker.errors.read_text())
    (end,) = crew.end()
    assert set(end["renewals"]) == {"credentials"}
    assert end["state"] == "joining"
    assert "s3cret-pass" not in worker.errors.read_text() + str(end)
    assert crew.admitted("second") == 0
