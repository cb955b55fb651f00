"""Waiting for admission: in order, each exactly once, and without a trace of those who gave up."""

import asyncio
import random
import threading
import time

import pytest
from factories import one_at_a_time, queue_quota, waiting
from patience import PATIENCE, until

from modelquota import Limit, QuotaExceededError, ResourceQuotaManager, ViolationType

QUOTAS = [one_at_a_time("m")]


class Line:
    """Threads that wait, started one after the other so that their order is known."""

    def __init__(self, manager):
        self.manager = manager
        self.served = []
        self.refused = []
        self.threads = []

    def join(self, name, *args, **kwargs):
        before = waiting(self.manager)

        def body():
            try:
                with self.manager.acquire(*args or ("m", 1), **kwargs):
                    self.served.append(name)
            except QuotaExceededError as error:
                self.refused.append((name, error))

        self.threads.append(threading.Thread(target=body, daemon=True))
        self.threads[-1].start()
        until(lambda: waiting(self.manager) == before + 1)

    def wait(self):
        for thread in self.threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def test_what_fits_does_not_wait(manager):
    with manager.acquire("m", 5) as grant:
        assert grant.tokens == 5
    assert waiting(manager) == 0


def test_first_come_first_served(manager):
    held = manager.reserve("m", 1)
    line = Line(manager)
    for name in range(20):
        line.join(name)
    held.release()
    line.wait()
    assert line.served == list(range(20))
    assert waiting(manager) == 0
    stats = manager.get_stats()
    assert (stats.total_checks, stats.allowed_requests, stats.queued_requests) == (21, 21, 20)
    assert stats.total_violations == stats.concurrency_violations == 20


def test_higher_priority_first(manager):
    held = manager.reserve("m", 1)
    line = Line(manager)
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5), ("e", -1)):
        line.join(name, "m", 1, priority=priority)
    held.release()
    line.wait()
    assert line.served == ["b", "d", "a", "c", "e"]


def test_nobody_overtakes_those_who_wait(manager, clock):
    manager.set_quota(queue_quota("m", max_tokens_per_second=10, burst_tokens=40))
    assert manager.check_quota("m", 50)
    line = Line(manager)
    line.join("large", "m", 50)
    clock.advance(3)  # 30 tokens would fit by now
    result = manager.check_quota("m", 1)
    assert (result.limit, result.violation_type) == (Limit.QUEUE, ViolationType.RATE_LIMIT)
    assert result.retry_after_ms == 2000
    assert "queued requests: 1 of 1,000 used, 1 asked; retry in 2,000 ms" in result.reason
    with pytest.raises(QuotaExceededError, match="queued requests"):
        manager.reserve("m", 1)
    line.join("small", "m", 1)
    clock.advance(1.999)
    assert not line.served
    clock.advance(0.001)
    until(lambda: line.served == ["large"])
    clock.advance(1.1)
    line.wait()
    assert line.served == ["large", "small"]


def test_throttled_requests_wait_each_for_itself(clock):
    manager = ResourceQuotaManager(clock=clock)
    limits = {"max_tokens_per_second": 10, "burst_tokens": 40, "on_violation": "throttle"}
    manager.set_quota(queue_quota("m", **limits))
    assert manager.check_quota("m", 50)
    line = Line(manager)
    line.join("large", "m", 50)
    line.join("small", "m", 5)
    clock.advance(1.1)
    until(lambda: line.served == ["small"])
    assert manager.check_quota("m", 5)
    clock.advance(5)
    line.wait()
    assert line.served == ["small", "large"]


@pytest.mark.parametrize("free", ["release", "settle", "cancel", "limits", "remove", "enforcement", "memory", "burst"])
def test_whatever_makes_room_lets_the_next_in(clock, free):
    manager = ResourceQuotaManager(clock=clock)
    limits = {"max_concurrent_requests": 1}
    if free in ("settle", "cancel"):
        limits = {"max_tokens_per_hour": 10}
    elif free == "memory":
        limits = {"max_ram_mb": 10}
    elif free == "burst":
        limits = {"max_requests_per_second": 1e-3, "burst_requests": 1}
    manager.set_quota(queue_quota("m", **{"grace_period_sec": 10_000} | limits))
    manager.update_memory_usage("m", 5, 0)
    held = manager.reserve("m", 10)
    if free == "burst":
        held = manager.reserve("m", 10)
    line = Line(manager)
    line.join("next", "m", 5, 6, timeout=1e6)
    {
        "release": held.release,
        "settle": lambda: held.settle(5),
        "cancel": held.cancel,
        "limits": lambda: manager.update_quota("m", max_concurrent_requests=2),
        "remove": lambda: manager.remove_quota("m"),
        "enforcement": lambda: setattr(manager, "enforcement_enabled", False),
        "memory": lambda: manager.update_memory_usage("m", 4, 0),
        "burst": lambda: (manager.reset_burst("m"), manager.update_quota("m", burst_requests=2)),
    }[free]()
    line.wait()
    assert line.served == ["next"]
    held.release()


def test_a_wait_that_cannot_end_in_time_is_refused_at_once(manager, clock):
    limits = {"max_tokens_per_second": 10, "burst_tokens": 90, "grace_period_sec": 5, "max_ram_mb": 10}
    manager.set_quota(queue_quota("m", **limits))
    with pytest.raises(QuotaExceededError, match="never fits"):
        manager.acquire("m", 101)
    with pytest.raises(QuotaExceededError, match="RAM: 0 of 10 used, 11 asked; never fits"):
        manager.acquire("m", 1, 11)
    assert manager.check_quota("m", 100)
    with pytest.raises(QuotaExceededError, match="retry in 5,100 ms"):
        manager.acquire("m", 51)
    with pytest.raises(QuotaExceededError, match="retry in 1,017 ms"):
        manager.acquire("m", 10, timeout=0.9)
    with pytest.raises(QuotaExceededError):
        manager.acquire("m", 1, timeout=0)
    manager.update_quota("m", on_violation="reject")
    with pytest.raises(QuotaExceededError):
        manager.acquire("m", 1)
    assert waiting(manager) == 0


def test_whose_time_is_over_is_refused_and_delays_nobody(manager, clock):
    held = manager.reserve("m", 1)
    line = Line(manager)
    line.join("impatient", "m", 1, timeout=5)
    line.join("patient", "m", 1, timeout=50)
    clock.advance(5)
    until(lambda: line.refused)
    assert line.refused[0][0] == "impatient"
    assert line.refused[0][1].result.limit is Limit.CONCURRENCY
    assert waiting(manager) == 1
    held.release()
    line.wait()
    assert line.served == ["patient"]
    stats = manager.get_stats()
    assert (stats.total_checks, stats.allowed_requests, stats.queued_requests) == (3, 2, 2)


def test_a_queue_whose_last_one_has_left_goes_on_with_those_who_come(manager, clock):
    """So does one that was empty in between; a check sees at once that others wait."""
    for _ in range(3):
        held = manager.reserve("m", 1)
        line = Line(manager)
        line.join("a")
        line.join("impatient", "m", 1, timeout=5)
        clock.advance(5)
        until(lambda line=line: line.refused)
        line.join("b")
        line.join("c")
        assert waiting(manager) == 3
        assert manager.check_quota("m", 1).limit is Limit.QUEUE
        with pytest.raises(QuotaExceededError, match="queued requests: 3 of"):
            manager.reserve("m", 1)
        held.release()
        line.wait()
        assert line.served == ["a", "b", "c"]
        assert waiting(manager) == 0


def test_the_line_is_bounded(manager):
    manager.update_quota("m", max_queued_requests=2)
    held = manager.reserve("m", 1)
    line = Line(manager)
    line.join("a")
    line.join("b")
    with pytest.raises(QuotaExceededError, match="queued requests: 2 of 2 used") as error:
        manager.acquire("m", 1)
    assert error.value.result.limit is Limit.QUEUE
    held.release()
    line.wait()
    manager.update_quota("m", max_queued_requests=0)
    with manager.reserve("m", 1), pytest.raises(QuotaExceededError, match="queued requests: 0 of 0"):
        manager.acquire("m", 1)


def test_bad_use(manager):
    for arguments, error in (
        ({"timeout": -1}, ValueError),
        ({"timeout": float("nan")}, ValueError),
        ({"timeout": "soon"}, TypeError),
        ({"priority": 1.5}, TypeError),
        ({"priority": 2**31}, ValueError),
    ):
        with pytest.raises(error):
            manager.acquire("m", 1, **arguments)
    with pytest.raises(ValueError, match="estimated_tokens is -1"):
        manager.acquire("m", -1)
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("first", ["m", "tenant"])
def test_a_request_over_several_models_keeps_its_place_at_each_of_them(manager, clock, first):
    manager.set_quota(one_at_a_time("tenant"))
    manager.update_quota("m", max_concurrent_requests=1)
    held = {model_id: manager.reserve(model_id, 1) for model_id in ("m", "tenant")}
    line = Line(manager)
    line.join("both", ("m", "tenant"), 1)
    assert waiting(manager, "tenant") == 1
    line.join("later", "m", 1)
    held[first].release()
    for model_id in ("m", "tenant"):  # neither to those who wait nor to those who only ask
        assert manager.check_quota(model_id, 1).limit is Limit.QUEUE
    assert line.served == []
    held["tenant" if first == "m" else "m"].release()
    line.wait()
    assert line.served == ["both", "later"]
    for model_id in ("m", "tenant"):
        usage = manager.get_usage(model_id)
        assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)


def test_those_behind_a_request_that_is_behind_another_one_are_told_what_that_waits_for(manager, clock):
    manager.set_quota(queue_quota("tenant", max_tokens_per_second=10, burst_tokens=0))
    manager.update_quota("m", max_concurrent_requests=5)
    assert manager.check_quota("tenant", 10)
    line = Line(manager)
    thread = threading.Thread(target=lambda: manager.acquire("tenant", 1).release(), daemon=True)
    thread.start()
    until(lambda: waiting(manager, "tenant") == 1)
    line.join("both", ("m", "tenant"), 1)
    result = manager.check_quota("m", 1)
    assert (result.limit, result.violation_type) == (Limit.QUEUE, ViolationType.RATE_LIMIT)
    clock.advance(2)
    line.wait()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_request_that_a_tenant_throttles_does_not_hold_up_the_model_for_the_others(manager, clock):
    manager.set_quota(queue_quota("tenant", max_concurrent_requests=1, on_violation="throttle"))
    manager.update_quota("m", max_concurrent_requests=5)
    held = manager.reserve("tenant", 1)
    line = Line(manager)
    line.join("both", ("m", "tenant"), 1)
    assert manager.check_quota("m", 1)
    others = [manager.reserve("m", 1) for _ in range(5)]
    line.join("later", "m", 1)
    held.release()  # the tenant has room, the model has none by now: there the request comes before the later one
    assert line.served == []
    others.pop().release()
    until(lambda: line.served == ["both", "later"])
    for grant in others:
        grant.release()
    line.wait()


def test_two_lines_cannot_block_each_other(manager):
    """Requests over both models, named in either order, while both models are contended."""
    manager.set_quota(one_at_a_time("other"))
    done = []

    def body(ids):
        for _ in range(50):
            with manager.acquire(ids, 1):
                pass
        done.append(ids)

    orders = [("m", "other"), ("other", "m"), ("m",), ("other",)] * 2
    threads = [threading.Thread(target=body, args=(ids,), daemon=True) for ids in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(done) == len(orders)
    assert waiting(manager) == waiting(manager, "other") == 0


# -- asyncio


def test_tasks_wait_in_order(manager):
    async def main():
        held = await manager.acquire_async("m", 1)
        served = []

        async def body(name):
            async with manager.acquire_async("m", 1):
                served.append(name)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for name in range(20):
                group.create_task(body(name))
                await asyncio.sleep(0)
            assert waiting(manager) == 20
            held.release()
        return served

    assert asyncio.run(main()) == list(range(20))
    assert waiting(manager) == 0


def test_an_acquisition_is_a_coroutine(manager):
    async def main():
        grant = await asyncio.create_task(manager.acquire_async("m", 1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await manager.acquire_async("m", 1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(manager.acquire_async("m", 1), 0.01)
        assert waiting(manager) == 0
        grant.release()
        with pytest.raises(ZeroDivisionError):
            async with manager.acquire_async("m", 7):
                raise ZeroDivisionError

    asyncio.run(main())
    usage = manager.get_usage("m")
    assert (usage.tokens_this_hour, usage.concurrent_requests) == (1, 0)


def test_a_task_cancelled_at_the_moment_of_admission_gives_its_grant_back(manager):
    async def main():
        held = await manager.acquire_async("m", 5)
        task = asyncio.create_task(manager.acquire_async("m", 7))
        await asyncio.sleep(0)
        held.release()  # admits the task, which has not run yet
        assert manager.get_usage("m").concurrent_requests == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    usage = manager.get_usage("m")
    assert (usage.tokens_this_hour, usage.requests_this_hour, usage.concurrent_requests) == (5, 1, 0)


def test_an_event_loop_that_is_gone_holds_nobody_up(manager):
    held = manager.reserve("m", 1)
    loop = asyncio.new_event_loop()
    task = loop.create_task(manager.acquire_async("m", 1))
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    line = Line(manager)
    line.join("thread")
    held.release()
    line.wait()
    assert line.served == ["thread"]
    usage = manager.get_usage("m")
    assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)
    task._log_destroy_pending = False


def test_real_time_ends_a_wait():
    """Bounds from below only: a machine may be as slow as it likes."""
    manager = ResourceQuotaManager()
    manager.set_quota(queue_quota("m", max_requests_per_second=20, burst_requests=0, grace_period_sec=60))

    async def tasks():
        await asyncio.gather(*(manager.acquire_async("m", 1) for _ in range(15)))

    begin = time.monotonic()
    threads = [threading.Thread(target=lambda: manager.acquire("m", 1).release()) for _ in range(15)]
    for thread in threads:
        thread.start()
    with pytest.warns(ResourceWarning):
        asyncio.run(tasks())
    for thread in threads:
        thread.join(PATIENCE)
    assert time.monotonic() - begin >= 0.5  # 20 in the first second, the rest when its slots have left
    usage = manager.get_usage("m")
    assert (usage.requests_this_hour, usage.queued_requests, usage.concurrent_requests) == (30, 0, 0)
    began = time.monotonic()
    with manager.acquire("m", 1, timeout=30):
        manager.update_quota("m", max_concurrent_requests=1)
        with pytest.raises(QuotaExceededError):
            manager.acquire("m", 1, timeout=0.05)
    assert time.monotonic() - began >= 0.05


def test_a_thousand_wait_and_a_third_of_them_gives_up(manager):
    """Threads and tasks in one line: served in order, each exactly once, and nothing is left over."""
    rng = random.Random(5)
    held = manager.reserve("m", 1)
    order, given_up = [], []

    def thread(name):
        with manager.acquire("m", 1):
            order.append(name)

    async def task(name):
        async with manager.acquire_async("m", 1):
            order.append(name)

    async def give_up(name, task):
        await asyncio.sleep(rng.random() * 0.3)
        if task.cancel():
            try:
                await task
            except asyncio.CancelledError:
                given_up.append(name)

    async def main():
        threads, tasks = [], []
        for name in range(1000):
            if name % 10 == 0:
                threads.append(threading.Thread(target=thread, args=(name,)))
                threads[-1].start()
                while waiting(manager) <= name:
                    await asyncio.sleep(0.0002)
            else:
                tasks.append((name, asyncio.create_task(task(name))))
                await asyncio.sleep(0)
        assert waiting(manager) == 1000
        quitters = [asyncio.create_task(give_up(*each)) for each in tasks if rng.random() < 1 / 3]
        async with asyncio.timeout(PATIENCE):  # however late their timers are: the others give up while it is served
            while len(given_up) <= 100:
                await asyncio.sleep(0.001)
        held.release()
        await asyncio.gather(*(task for _, task in tasks), *quitters, return_exceptions=True)
        while any(thread.is_alive() for thread in threads):
            await asyncio.sleep(0.001)

    manager.update_quota("m", max_queued_requests=1000)
    asyncio.run(main())
    assert sorted(order) == order
    assert len(given_up) > 100
    assert sorted(order + given_up) == list(range(1000))
    usage = manager.get_usage("m")
    assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)
    assert usage.requests_this_hour == 1 + len(order)
