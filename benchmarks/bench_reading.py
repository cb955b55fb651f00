"""What does looking on cost: all counters at once, and a scrape by Prometheus?"""

import subprocess
import sys
import threading
from statistics import median
from time import perf_counter_ns, sleep

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.harness.results import Row, at_most, ratio_at_most
from modelquota import ResourceQuotaManager
from modelquota.monitoring.prometheus import QuotaCollector
from modelquota.reading.utilization import read_utilization

QUESTION = "reading"
MODELS = 1_000
FULL = 65_536
READS = 5
STATUSES = 3
ROUNDS = 300
SCRAPES = 15
NS_PER_US = 1e3
NS_PER_MS = 1e6


def ns_of(work):
    start_ns = perf_counter_ns()
    work()
    return perf_counter_ns() - start_ns


def test_snapshot(bench, fleet_of):
    manager = fleet_of(MODELS).manager
    us = min(bench.interleave(ROUNDS, lambda: ns_of(manager.snapshot))["ours"]) / NS_PER_US
    bench.add(Row(QUESTION, f"snapshot() of {MODELS:,} models", us, "µs"))


def test_snapshot_while_two_threads_check(bench, fleet_of):
    manager = fleet_of(MODELS).manager
    ids = manager.list_models()
    stop = threading.Event()

    def check():
        while not stop.is_set():
            for model_id in ids:
                manager.check_quota(model_id, 0)

    def read():
        sleep(0.0005)  # lets the others have their turn, or they would never run
        return ns_of(manager.snapshot)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        # the median: the rarest rounds are those in which the scheduler takes the processor away
        us = median(bench.interleave(ROUNDS, read)["ours"]) / NS_PER_US
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    bench.add(Row(QUESTION, "the same while 2 threads check", us, "µs", targets=(at_most(200),)))


def test_scrape(bench):
    manager = ResourceQuotaManager()
    for i in range(MODELS):
        manager.set_quota(f"model-{i}")
        manager.check_quota(f"model-{i}", 10)
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    ms = min(bench.interleave(SCRAPES, lambda: ns_of(lambda: generate_latest(registry)))["ours"]) / NS_PER_MS
    bench.add(Row(QUESTION, f"a scrape of {MODELS:,} models", ms, "ms", targets=(at_most(50),)))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A state file with a full table, and its manager."""
    path = tmp_path_factory.mktemp("full") / "state"
    manager = ResourceQuotaManager(path=path)
    for i in range(FULL):
        manager.set_quota(f"user-{i}", max_ram_mb=100 + i % 7)
        manager.check_quota(f"user-{i}", 10)
    return path, manager


@pytest.mark.parametrize(
    ("what", "read", "targets"),
    [
        ("counters", ResourceQuotaManager.snapshot, ()),
        ("counters, limits and percentages", read_utilization, (ratio_at_most(3),)),
    ],
)
def test_a_full_table_through_a_view(bench, full, what, read, targets):
    path, manager = full
    with ResourceQuotaManager.open_readonly(path) as view:
        look = type(view).snapshot if read is ResourceQuotaManager.snapshot else read
        series = bench.interleave(
            READS, lambda: ns_of(lambda: look(view)), manager=lambda: ns_of(lambda: read(manager))
        )
    ms, beside = min(series["ours"]) / NS_PER_MS, min(series["manager"]) / NS_PER_MS
    bench.add(Row(QUESTION, f"{what} of {FULL:,} models through a view", ms, "ms", "the manager's", beside, targets))


@pytest.mark.parametrize("option", [(), ("--json",)])
def test_status_of_a_full_table(bench, full, option):
    """The whole command, in a process of its own."""
    command = [sys.executable, "-m", "modelquota", "status", "--path", str(full[0]), *option]
    times = bench.interleave(
        STATUSES, lambda: ns_of(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True))
    )
    case = f"modelquota {' '.join(('status', *option))} of {FULL:,} models"
    bench.add(Row(QUESTION, case, min(times["ours"]) / NS_PER_MS, "ms", targets=(at_most(3000),)))
