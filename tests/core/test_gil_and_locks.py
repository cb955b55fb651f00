"""No thread waits for the GIL with a row locked: a long C call in one process stops a model in no other.

One process has threads in a verb all the time, while another one makes C calls that keep the GIL for some 0.3 s:
a thread that gave the GIL away between lock and unlock would have the row locked for as long.
"""

import os
import random
import statistics
import threading
import time

import pytest
from factories import open_quota, queue_quota
from neighbors import forked

from modelquota import QuotaExceededError, ResourceQuotaManager

pytestmark = pytest.mark.alone
SECONDS = 4.0
ATTEMPTS = 3


def settle(manager):
    manager.reserve("m", 5).settle(1)


def cancel(manager):
    manager.reserve("m", 5, 1).cancel()


def add(manager):
    with manager.reserve("m", 0) as grant:
        for _ in range(20):
            grant.add(50)


def joint(manager):
    manager.check_quota(("m", "beside"), 1)
    manager.reserve(("beside", "m"), 3).settle(1)


def acquire(manager):
    try:
        with manager.acquire("m", 1, timeout=0.05):
            pass
    except QuotaExceededError:
        pass


def live_changes(manager):
    manager.update_quota("m", max_ram_mb=random.randrange(10**6, 10**7))
    manager.get_usage("m")
    manager.update_memory_usage("m", 1, 1)


def batches(manager):
    manager.charge_many(manager.codes(["m"]).repeat(3), 1)
    manager.check_many(manager.codes(["m"]).repeat(3), 1)


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("work", [settle, cancel, add, joint, acquire, live_changes, batches])
def test_a_long_c_call_of_one_process_stops_a_model_in_no_other(tmp_path, work):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64)
    manager.set_quota(open_quota("m"))
    if work is acquire:
        manager.set_quota(queue_quota("m", max_concurrent_requests=3))
    manager.set_quota(open_quota("beside"))

    def hog():
        def loop():
            while True:
                work(manager)

        def call_for_long():
            numbers = [random.random() for _ in range(500_000)]
            while True:
                sorted(numbers)  # without the GIL given back
                time.sleep(0.005)

        threads = [threading.Thread(target=loop, daemon=True) for _ in range(3)]
        threads.append(threading.Thread(target=call_for_long, daemon=True))
        for thread in threads:
            thread.start()
        return threads

    # batches in a third process make the row busy: who finds it locked is who may give the GIL away
    def keep_busy():
        codes = manager.codes(["m"]).repeat(20_000)

        def loop():
            while True:
                manager.check_many(codes, 1)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        return thread

    with forked(hog), forked(keep_busy):
        os.sched_yield()
        manager.set_quota(open_quota("nobody else's"))
        for _ in range(ATTEMPTS):  # the fault shows in each; a machine that is busy with other things does not
            took = {"m": [], "nobody else's": []}
            end = time.monotonic() + SECONDS
            while time.monotonic() < end:
                for model_id, seconds in took.items():
                    start = time.perf_counter()
                    manager.check_quota(model_id, 1)
                    seconds.append(time.perf_counter() - start)
            worst = {model_id: max(seconds) for model_id, seconds in took.items()}
            stalls = sum(seconds for seconds in took["m"] if seconds > 0.1)
            # what a check of another model suffers, this one may suffer too
            if (
                statistics.median(took["m"]) < 0.01
                and worst["m"] < max(0.15, 3 * worst["nobody else's"])
                and stalls < 0.1 * SECONDS + 3 * worst["nobody else's"]
            ):
                return
    raise AssertionError((worst, stalls))
