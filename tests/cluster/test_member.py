"""Managers that share limits through a real server, in one process and across forks; `test_faults` has many hosts."""

import contextlib
import gc
import logging
import subprocess
import sys
import time
import weakref

import pytest

pytest.importorskip("redis")

import redis
from cluster_crew import PATIENCE_SEC, wait_for
from faulty_proxy import Proxy
from real_servers import Server, answering, installed

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore
from modelquota.cluster.operating import read_cluster
from modelquota.errors import StoreError


@pytest.fixture
def server(tmp_path):
    with Server(installed("redis"), tmp_path) as server:
        yield server


def store_of(server, **fields):
    return RedisStore(server.url, **{"lease_sec": 2, "renew_sec": 0.2} | fields)


def admit(manager, count, model_id="m"):
    """Ask until `count` requests were admitted."""
    admitted = [0]

    def ask():
        admitted[0] += manager.check_quota(model_id, 1).allowed
        return admitted[0] >= count

    wait_for(ask)


def open_grants(manager, count, model_id="m"):
    """Ask until `count` requests are open; their grants."""
    grants = []

    def ask():
        with contextlib.suppress(QuotaExceededError):
            grants.append(manager.reserve(model_id, 1))
        return len(grants) == count

    wait_for(ask)
    return grants


def opens_no_more(manager):
    """Whether a host is refused, also by what the store has said after that."""
    before = manager.cluster.status().renewals.get("ok", 0)
    refused = []

    def ask():
        try:
            manager.reserve("m", 1).release()
            refused.append(False)
        except QuotaExceededError:
            refused.append(True)
        return manager.cluster.status().renewals.get("ok", 0) >= before + 3

    wait_for(ask)
    return all(refused)


def unlimited(**limits):
    return ResourceQuotaConfig.unlimited("m", on_violation="reject", **limits)


def test_a_host_that_leaves_hands_over_and_one_that_joins_waits_for_what_was_used(server):
    with ResourceQuotaManager(cluster=store_of(server)) as first:
        first.set_quota(unlimited(max_requests_per_minute=100))
        admit(first, 80)
    with ResourceQuotaManager(cluster=store_of(server)) as second:
        second.set_quota(unlimited(max_requests_per_minute=100))
        admit(second, 20)
        assert second.cluster.status().state == "ok"
        assert not second.check_quota("m", 1)


def test_a_model_that_nobody_has_asked_for_admits_the_first_request_of_each_host(server):
    quota = ResourceQuotaConfig("m", on_violation="reject", max_requests_per_minute=60, max_tokens_per_minute=100_000)
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(ResourceQuotaManager(cluster=store_of(server))) for _ in range(3)]
        for host in hosts:
            host.set_quota(quota)
        wait_for(lambda: all({share.share > 0 for share in host.cluster.shares()} == {True} for host in hosts))
        for host in hosts:
            assert host.check_quota("m", 100)
            assert host.cluster.status().starved == 0


def test_open_requests_are_shared_where_asked_for_and_free_when_their_host_is_gone(server):
    quota = unlimited(max_concurrent_requests=10, cluster_concurrency=True)
    with ResourceQuotaManager(cluster=store_of(server)) as first:
        first.set_quota(quota)
        held = open_grants(first, 7)
        with ResourceQuotaManager(cluster=store_of(server)) as second:
            second.set_quota(quota)
            others = open_grants(second, 3)
            assert opens_no_more(second)
            assert opens_no_more(first)
            shares = {share.limit: share for share in first.cluster.shares()}
            assert shares["concurrent_requests"].whole == 10
            held.pop().release()
            others += open_grants(second, 1)
            assert opens_no_more(second)
            assert opens_no_more(first)
            for grant in held:
                grant.release()
            others += open_grants(second, 6)
            for grant in others[:5]:
                grant.release()
            kept = others[5:]  # the host leaves with them
        held = open_grants(first, 10)
        assert opens_no_more(first)
        for grant in held:
            grant.release()
        del kept


def test_a_request_waits_for_a_share_of_the_concurrency(server):
    quota = unlimited(max_concurrent_requests=1, cluster_concurrency=True).replace(
        on_violation="queue", grace_period_sec=60
    )
    with (
        ResourceQuotaManager(cluster=store_of(server)) as first,
        ResourceQuotaManager(cluster=store_of(server)) as second,
    ):
        for manager in (first, second):
            manager.set_quota(quota)
        for manager in (first, second, first, second):  # the place is free at the store, and goes to who waits
            with manager.acquire("m", 1):
                assert manager.get_usage("m").concurrent_requests == 1


def test_a_restart_with_the_state_file_resumes_the_share(server, tmp_path):
    path = tmp_path / "quota.state"
    admitted = 0
    for _ in range(3):  # the second and third go on at once, without learning and without joining as another node
        with ResourceQuotaManager(path=path, cluster=store_of(server, lease_sec=5)) as manager:
            manager.set_quota(unlimited(max_requests_per_hour=30))
            admit(manager, 10)
            admitted += 10
            assert manager.get_usage("m").requests_this_hour == admitted
            wait_for(lambda: manager.cluster.status().renewals.get("ok"))
            assert manager.cluster.status().nodes == 1
    with ResourceQuotaManager(path=path, cluster=store_of(server, lease_sec=5)) as manager:
        assert not manager.check_quota("m", 1)


def test_the_store_may_be_away_for_a_lease_and_then_nothing_is_admitted(server, caplog):
    caplog.set_level(logging.WARNING, "modelquota")
    with ResourceQuotaManager(cluster=store_of(server)) as manager:
        manager.set_quota(unlimited(max_requests_per_hour=1_000_000))
        admit(manager, 1)
        server.stop()
        wait_for(lambda: manager.cluster.status().state == "expired")
        wait_for(lambda: not manager.check_quota("m", 1))
        result = manager.check_quota("m", 1)
        assert result.retry_after_ms is not None
        assert not result.never_fits
        assert manager.cluster.status().error.kind in ("unreachable", "timeout")
        server.start()
        admit(manager, 1)
        assert manager.cluster.status().state == "ok"
    assert "the store is not usable" in caplog.text
    assert server.url not in caplog.text


@pytest.mark.parametrize(("on_store_down", "admits"), [("deny", False), ("share", True), ("allow", True)])
def test_what_holds_while_the_store_is_away(server, on_store_down, admits):
    with ResourceQuotaManager(cluster=store_of(server, on_store_down=on_store_down)) as manager:
        manager.set_quota(unlimited(max_requests_per_hour=1_000_000))
        admit(manager, 1)
        wait_for(lambda: manager.cluster.status().state == "ok")
        server.stop()
        wait_for(lambda: manager.cluster.status().state == "expired")
        wait_for(lambda: manager.check_quota("m", 1).allowed == admits)


def test_a_forked_child_takes_over_from_a_parent_that_died(server, tmp_path):
    code = f"""
import os, signal, sys, time
from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore
manager = ResourceQuotaManager(cluster=RedisStore({server.url!r}, lease_sec=2, renew_sec=0.2))
manager.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_hour=1000, on_violation="reject"))
while not manager.check_quota("m", 1):
    time.sleep(0.02)
assert manager.cluster.status().leads
if os.fork():
    os._exit(0)
while not manager.cluster.status().leads:
    assert not manager.closed
    time.sleep(0.02)
while not manager.check_quota("m", 1):
    time.sleep(0.02)
print("admitted by the child", flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SEC, check=True
    )
    assert done.stdout == "admitted by the child\n"


@pytest.mark.parametrize("pause_sec", [0, 0.7])
def test_a_parent_that_closes_leaves_the_share_to_its_child(server, pause_sec):
    code = f"""
import os, time
from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore
from modelquota.cluster.operating import read_cluster
store = RedisStore({server.url!r}, lease_sec=2, renew_sec=0.2)
manager = ResourceQuotaManager(cluster=store)
manager.set_quota(ResourceQuotaConfig.unlimited("m", max_requests_per_day=100, on_violation="reject"))
def admit(count):
    while count:
        if manager.check_quota("m", 1):
            count -= 1
        else:
            time.sleep(0.02)
admit(60)
child = os.fork()
if not child:
    while not manager.cluster.status().leads:
        time.sleep(0.02)
    admit(40)
    manager.close()
    os._exit(0)
time.sleep({pause_sec})
manager.close()
os.waitpid(child, 0)
print([limit.used for limit in read_cluster(store).limits], flush=True)
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_SEC, check=True
    )
    assert done.stdout == "[100]\n"


@pytest.mark.parametrize("down", [False, True])
def test_a_manager_that_is_dropped_is_collected_and_its_thread_ends(down):
    pytest.importorskip("lupa", reason="the simulated store needs lupa")
    from lua_store import LocalStore

    class DownStore(LocalStore):
        def exchange(self, request):
            raise StoreError("unreachable", "it is away")

    manager = ResourceQuotaManager(cluster=DownStore() if down else LocalStore())
    manager.set_quota(unlimited(max_requests_per_hour=10))
    member, found = manager.cluster, weakref.ref(manager)
    wait_for(lambda: sum(member.status().renewals.values()) >= 2)
    assert member.running
    del manager
    wait_for(lambda: gc.collect() >= 0 and found() is None)
    wait_for(lambda: not member.running)


NOT_WRITTEN = "is not accepted; expected what `modelquota publish` of this version writes: publish them again"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        *((text, f"published quotas={text!r} {NOT_WRITTEN}")
          for text in ("not json", "[]", "{}", '{"models": [3], "patterns": []}', '{"models": {"a": 1}}')),
        ('{"models": [], "patterns": [{"model_id": "a*b"}]}', "default_quota='a*b' is not accepted; expected an id"),
    ],
)  # fmt: skip
def test_published_quotas_that_cannot_be_read_are_said_once_and_the_exchanges_go_on(text, fault, caplog):
    pytest.importorskip("lupa", reason="the simulated store needs lupa")
    from lua_store import LocalStore

    caplog.set_level(logging.WARNING, "modelquota")
    store = LocalStore()
    store.command = lambda *arguments: {"version": "7", "text": text}
    with ResourceQuotaManager(cluster=store) as manager:

        def exchange(times):
            before = sum(manager.cluster.status().renewals.values())
            wait_for(lambda: sum(manager.cluster.status().renewals.values()) >= before + times)

        exchange(1)
        store.server.data[f"{store.base}meta"]["quotas"] = "7"
        exchange(5)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"published quotas are not adopted, or not all of them: {fault}")


def test_a_manual_clock_and_a_cluster_exclude_each_other():
    with pytest.raises(ValueError, match="clock"):
        ResourceQuotaManager(clock=ManualClock(), cluster=RedisStore("redis://127.0.0.1:1"))


def test_a_manager_closes_soon_without_a_store():
    began = time.monotonic()
    with ResourceQuotaManager(cluster=RedisStore("redis://127.0.0.1:1")) as manager:
        assert manager.cluster.status().state == "joining"
        manager.set_quota(unlimited(max_requests_per_hour=10))
        assert not manager.check_quota("m", 1)
    assert time.monotonic() - began < 20
    assert ResourceQuotaManager().cluster is None


@pytest.mark.parametrize(
    ("kind", "breaks", "mends"),
    [
        ("read_only", ("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
        ("out_of_memory", ("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
        ("replicas", ("CONFIG", "SET", "min-replicas-to-write", "1"), ("CONFIG", "SET", "min-replicas-to-write", "0")),
        ("eviction", ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
         ("CONFIG", "SET", "maxmemory-policy", "noeviction")),
        ("refused", ("SET", "mq:{default:0}:ghosts", "not a sorted set"), ("DEL", "mq:{default:0}:ghosts")),
    ],
)  # fmt: skip
def test_a_store_that_takes_no_writes_ends_the_lease_with_a_word_and_comes_back(server, kind, breaks, mends):
    store = store_of(server)
    with ResourceQuotaManager(cluster=store) as manager, redis.Redis(port=server.port) as client:
        manager.set_quota(unlimited(max_requests_per_hour=1_000_000))
        admit(manager, 1)
        client.execute_command(*breaks)
        store._checked_until = 0  # otherwise a minute later
        wait_for(lambda: manager.cluster.status().state == "expired")
        assert manager.cluster.status().error.kind == kind
        assert not manager.check_quota("m", 1)
        client.execute_command(*mends)
        admit(manager, 1)
        wait_for(lambda: manager.cluster.status().state == "ok")


def test_a_node_does_not_notice_that_the_server_has_lost_the_script(server):
    with ResourceQuotaManager(cluster=store_of(server)) as manager, redis.Redis(port=server.port) as client:
        manager.set_quota(unlimited(max_requests_per_hour=1_000_000))
        admit(manager, 1)
        renewals = manager.cluster.status().renewals["ok"]
        client.script_flush()
        wait_for(lambda: manager.cluster.status().renewals["ok"] > renewals + 1)
        assert set(manager.cluster.status().renewals) <= {"ok", "learning"}


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("loading", b"-LOADING Redis is loading the dataset in memory\r\n"),
        ("credentials", b"-NOAUTH Authentication required.\r\n"),
        ("version", b"$22\r\nredis_version:6.0.16\r\n\r\n"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_server_says_that_took_the_place_ends_the_lease_with_a_word(server, kind, line):
    listener, port = answering(line)
    with listener, Proxy(server.port) as proxy, ResourceQuotaManager(cluster=store_of(proxy)) as manager:
        manager.set_quota(unlimited(max_requests_per_hour=1_000_000))
        admit(manager, 1)
        proxy.port = port
        proxy.cut()
        manager.cluster.store._checked_until = 0  # otherwise a minute later
        wait_for(lambda: manager.cluster.status().state == "expired")
        assert manager.cluster.status().error.kind == kind
        assert not manager.check_quota("m", 1)
        proxy.port = server.port
        proxy.cut()
        admit(manager, 1)
        wait_for(lambda: manager.cluster.status().state == "ok")


@pytest.mark.parametrize("wait_replicas", [0, 1])
def test_a_split_store_grants_at_most_what_was_free_once_more(wait_replicas, tmp_path):
    """Both halves go on: the old primary for one host, a promoted replica, which has one of its own, for the other."""
    kind, limit = installed("redis"), 1000
    folders = [tmp_path / name for name in ("primary", "replica", "second")]
    for folder in folders:
        folder.mkdir()
    with (
        Server(kind, folders[0]) as primary,
        Server(kind, folders[1], "--replicaof", "127.0.0.1", str(primary.port)) as replica,
        Server(kind, folders[2], "--replicaof", "127.0.0.1", str(replica.port)),
        Proxy(primary.port) as proxy,
        redis.Redis(port=primary.port) as old,
        redis.Redis(port=replica.port) as new,
    ):
        assert old.execute_command("WAIT", 1, 20_000) == 1
        wait_for(lambda: new.info("replication").get("connected_slaves") == 1)
        fields = {"wait_replicas": wait_replicas, "lease_sec": 2}
        with (
            ResourceQuotaManager(cluster=store_of(primary, **fields)) as stays,
            ResourceQuotaManager(cluster=store_of(proxy, **fields)) as moves,
        ):
            for host in (stays, moves):
                host.set_quota(unlimited(max_requests_per_hour=limit))
            for host in (stays, moves):
                admit(host, 50)
            assert old.execute_command("WAIT", 1, 20_000) == 1
            new.execute_command("REPLICAOF", "NO", "ONE")
            proxy.port = replica.port
            proxy.cut()
            store = RedisStore(replica.url)
            free = read_cluster(store).limits[0].free
            store.close()
            admitted, denied = 100, {stays: 0, moves: 0}

            def is_used_up():  # neither admits anything for longer than the replica learns
                nonlocal admitted
                for host in denied:
                    allowed = sum(host.check_quota("m", 1).allowed for _ in range(10))
                    admitted += allowed
                    denied[host] = 0 if allowed else denied[host] + 1
                # the second replica may take a while to follow the promoted one
                return moves.cluster.status().state == "ok" and min(denied.values()) > 150

            wait_for(is_used_up)
            assert stays.cluster.status().state == ("expired" if wait_replicas else "ok")
            assert 0 < free < limit
            assert admitted <= limit + (0 if wait_replicas else free)
            assert admitted > (0.8 * limit if wait_replicas else limit)
