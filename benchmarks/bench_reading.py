"""What does looking on cost: all counters at once, and a scrape by Prometheus?"""

import threading
from statistics import median
from time import perf_counter_ns, sleep

from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.figures import Row, at_most
from modelquota import ResourceQuotaManager
from modelquota.prometheus import QuotaCollector

QUESTION = "reading"
MODELS = 1_000
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
