"""Managers that share limits through real servers: in processes that are killed and stopped, and across forks."""

import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("redis")

from real_servers import WHEELS, Server, binary_of

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.cluster import RedisStore

WORKER = Path(__file__).parents[1] / "support" / "cluster_worker.py"
NS = 10**9
PATIENCE_SEC = 60


@pytest.fixture(params=WHEELS)
def server(request, tmp_path):
    if binary_of(request.param) is None:
        pytest.skip(f"the wheel {WHEELS[request.param][0]} is not installed")
    with Server(request.param, tmp_path) as server:
        yield server


def store_of(server, **fields):
    return RedisStore(server.url, **{"lease_sec": 2, "renew_sec": 0.2} | fields)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_SEC
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def admit(manager, count, model_id="m"):
    """Ask until `count` requests were admitted."""
    admitted = [0]

    def ask():
        admitted[0] += manager.check_quota(model_id, 1).allowed
        return admitted[0] >= count

    wait_for(ask)


def unlimited(**limits):
    return ResourceQuotaConfig.unlimited("m", on_violation="reject", **limits)


class Crew:
    """Processes, each a host."""

    def __init__(self, stack, server, folder, *limits):
        self.stack = stack
        self.folder = folder
        self.limits = limits
        self.environment = {**os.environ, "MODELQUOTA_REDIS_URL": server.url}
        self.outputs = []

    def start(self, pause_ms=2):
        self.outputs.append(self.folder / f"admitted-{len(self.outputs)}")
        command = [sys.executable, WORKER, "crew", self.outputs[-1], str(pause_ms), *self.limits]
        process = subprocess.Popen(command, env=self.environment)
        self.stack.callback(process.wait, 60)
        self.stack.callback(process.kill)
        return process

    def admitted(self):
        """(not earlier than, not later than) of each admission, in order."""
        lines = (line for output in self.outputs if output.exists() for line in output.read_text().splitlines())
        return sorted(tuple(map(int, line.split())) for line in lines if line.count(" ") == 1)


def most_in(admitted, window_ns):
    """The most admissions that were certainly within one window."""
    most = first = 0
    ended = sorted(admitted, key=lambda pair: pair[1])
    for at, (_, end_ns) in enumerate(ended):
        while ended[first][0] <= end_ns - window_ns:
            first += 1
        most = max(most, at + 1 - first)
    return most


def test_processes_use_nearly_all_of_a_limit_and_never_more(server, tmp_path):
    limit = 600
    with ExitStack() as stack:
        crew = Crew(stack, server, tmp_path, f"max_requests_per_minute={limit}")
        processes = [crew.start() for _ in range(4)]
        wait_for(lambda: len(crew.admitted()) >= limit * 0.95)
        processes[0].kill()
        processes[1].send_signal(signal.SIGSTOP)
        newcomer = crew.start()
        time.sleep(6)  # the leases of both end; what they have used stays counted
        processes[1].send_signal(signal.SIGCONT)
        time.sleep(1)
        for process in (processes[1], processes[2], processes[3], newcomer):
            process.terminate()
            assert process.wait(30) == 0
        admitted = crew.admitted()
        assert limit * 0.95 <= len(admitted) <= limit
        assert most_in(admitted, 60 * NS) <= limit


def test_a_rate_holds_over_all_processes(server, tmp_path):
    rate, burst = 200, 100
    with ExitStack() as stack:
        crew = Crew(stack, server, tmp_path, f"max_requests_per_second={rate}", f"burst_requests={burst}")
        processes = [crew.start() for _ in range(3)]
        wait_for(lambda: len(crew.admitted()) >= 2 * rate)
        time.sleep(3)
        processes[0].kill()
        time.sleep(3)
        for process in processes[1:]:
            process.terminate()
            assert process.wait(30) == 0
        admitted = crew.admitted()
        for seconds in (1, 2, 5):
            assert most_in(admitted, seconds * NS) <= rate * seconds + rate + burst
        assert most_in(admitted, NS) <= rate + burst


def test_a_host_that_leaves_hands_over_and_one_that_joins_waits_for_what_was_used(server):
    with ResourceQuotaManager(cluster=store_of(server)) as first:
        first.set_quota(unlimited(max_requests_per_minute=100))
        admit(first, 80)
    with ResourceQuotaManager(cluster=store_of(server)) as second:
        second.set_quota(unlimited(max_requests_per_minute=100))
        admit(second, 20)
        assert second.cluster.status().state == "ok"
        assert not second.check_quota("m", 1)


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
