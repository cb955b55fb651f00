"""What does a grant cost, and a request that waits?"""

import asyncio
import threading
import time

from benchmarks.harness.loops import Loop
from benchmarks.harness.models import GENEROUS
from benchmarks.harness.results import Row, at_most
from modelquota import ResourceQuotaManager

QUESTION = "grants"
WAITERS = 1_000


def test_reserve_settle_release(bench, manager, floor):
    bench.against_floor(
        QUESTION,
        "reserve + settle + release",
        Loop(
            'grant = manager.reserve("llama", 100); grant.settle(70); grant.release()',
            manager=manager,
            operations=2_000,
        ),
        floor and Loop('floor.check("llama", 100)', floor=floor, operations=2_000),
        at_most(400),
    )


def test_add(bench, manager, floor):
    with manager.reserve("llama", 10**9) as grant:
        bench.against_floor(
            QUESTION,
            "grant.add(1) within the estimate",
            Loop("grant.add(1)", grant=grant, operations=2_000),
            floor and Loop('floor.check("llama", 100)', floor=floor, operations=2_000),
        )


def test_waiting(bench):
    """The processor time of 1,000 tasks in line for a second, and how long it takes to wake the next."""
    waiting_ms, wake_us = bench.once(lambda: asyncio.run(_wait()))
    thread_us = _wake_a_thread()
    bench.add(Row("waiting", "processor time of 1,000 tasks in line, a second", waiting_ms, "ms"))
    bench.add(Row("waiting", "from a release to the next task", wake_us * 1e3, "ns"))
    bench.add(Row("waiting", "from a release to the next thread", thread_us * 1e3, "ns"))


def _busy_manager():
    manager = ResourceQuotaManager()
    manager.set_quota("llama", **GENEROUS | {"max_concurrent_requests": 1, "on_violation": "queue"})
    return manager


async def _wait():
    manager = _busy_manager()
    held = manager.reserve("llama", 1)
    latencies = []
    released = 0

    async def body():
        nonlocal released
        async with manager.acquire_async("llama", 1):
            latencies.append(time.perf_counter_ns() - released)
            released = time.perf_counter_ns()

    tasks = [asyncio.create_task(body()) for _ in range(WAITERS)]
    while manager.get_usage("llama").queued_requests < WAITERS:
        await asyncio.sleep(0.01)
    before = time.process_time()
    await asyncio.sleep(1)
    waiting_ms = (time.process_time() - before) * 1e3
    released = time.perf_counter_ns()
    held.release()
    await asyncio.gather(*tasks)
    latencies.sort()
    return waiting_ms, latencies[len(latencies) // 2] / 1e3


def _wake_a_thread():
    manager = _busy_manager()
    latencies = []
    for _ in range(100):
        held = manager.reserve("llama", 1)
        woken = []

        def body(woken=woken):
            with manager.acquire("llama", 1):
                woken.append(time.perf_counter_ns())

        thread = threading.Thread(target=body)
        thread.start()
        while manager.get_usage("llama").queued_requests < 1:
            time.sleep(0.0002)
        released = time.perf_counter_ns()
        held.release()
        thread.join()
        latencies.append(woken[0] - released)
    return sorted(latencies)[50] / 1e3
