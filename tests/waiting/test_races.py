"""What strikes in the middle of a wait: nobody sleeps who could be admitted, and nothing is left over."""

import asyncio
import os
import threading
import time

import pytest
from factories import make_manager, one_at_a_time, queue_quota, waiting
from patience import PATIENCE, until

from modelquota import CapacityError, Limit, ManualClock, QuotaExceededError, ResourceQuotaManager
from modelquota.waiting.task import TaskWaiter
from modelquota.waiting.thread import ThreadWaiter

LOCKED = 1 << 10 | 1  # the word of the first process that opens a state: a row of its that another thread has locked


@pytest.fixture
def manager():
    """One request at a time."""
    return make_manager(one_at_a_time("m"), real_time=True)


def start(target, *args, **kwargs):
    thread = threading.Thread(target=target, args=args, kwargs=kwargs, daemon=True)
    thread.start()
    return thread


def acquire_all(manager, count, *args, **kwargs):
    """Threads that acquire and release, after all have come to wait."""
    before = waiting(manager)
    threads = [start(lambda: manager.acquire(*args or ("m", 1), **kwargs).release()) for _ in range(count)]
    until(lambda: waiting(manager) == before + count)
    return threads


def all_end(threads):
    for thread in threads:
        thread.join(PATIENCE)
    return not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("freed", ["before", "after"])
def test_each_of_several_models_is_waited_for_as_long_as_itself_takes(manager, freed):
    """Whoever waits for a rate and for a grant is looked at when the rate allows, whatever becomes of the grant."""
    manager.set_quota(queue_quota("rate", max_requests_per_second=1, burst_requests=0, grace_period_sec=3600))
    manager.reserve("rate", 1).release()
    held = manager.reserve("m", 1)
    both = start(lambda: manager.acquire(("rate", "m"), 1).release())
    until(lambda: waiting(manager, "rate") == 1)
    if freed == "before":
        held.release()
    else:
        until(lambda: manager.get_usage("rate").requests_this_second == 0)
        assert manager.check_quota("rate", 1).limit is Limit.QUEUE  # nobody overtakes the request here either
        held.release()
    assert all_end([both])


def test_a_line_whose_last_one_leaves_while_another_one_comes(manager):
    """The row is locked meanwhile, so the one who leaves waits for it, and the other one comes in between."""
    _, rows, _ = manager._arrays()
    held = manager.reserve("m", 1)
    prepared, go_on = threading.Event(), threading.Event()

    class SlowWaiter(ThreadWaiter):
        def prepare(self):
            super().prepare()
            prepared.set()
            go_on.wait(PATIENCE)

    first, second = ThreadWaiter(), SlowWaiter()
    manager._admit_or_queue(first, "m", 1, 0, 0, None, 0, nowait=False)

    def come():
        while manager._admit_or_queue(second, "m", 1, 0, 0, None, 0, nowait=False) is None:
            pass  # the row is locked: as `acquire` does, it tries again

    comes = start(come)
    prepared.wait(PATIENCE)
    rows["lock"][0] = LOCKED
    leaves = start(first.leave)
    time.sleep(0.05)
    go_on.set()
    comes.join(0.2)
    rows["lock"][0] = 0
    assert all_end([leaves, comes])
    assert waiting(manager) == 1
    held.release()
    assert second.done
    second.take().release()
    assert (waiting(manager), manager.get_usage("m").concurrent_requests) == (0, 0)


def test_who_cannot_be_served_is_told_so_and_nobody_else(tmp_path):
    """The model is gone, and the table has no room for it any more: each who waited is told, not who releases."""
    mine, other = (
        ResourceQuotaManager(path=tmp_path / "state", max_models=1, default_quota=one_at_a_time("any"))
        for _ in range(2)
    )
    mine.set_quota(one_at_a_time("m"))
    held = mine.reserve("m", 1)
    errors = []

    def body():
        try:
            mine.acquire("m", 1)
        except CapacityError as error:
            errors.append(error)

    threads = [start(body) for _ in range(4)]
    until(lambda: waiting(mine) == 4)
    other.remove_quota("m")
    other.set_quota("x")
    assert all_end(threads)
    assert len(errors) == 4
    held.release()


def test_an_interrupt_while_others_are_woken_or_several_models_are_released(manager, monkeypatch):
    """As a KeyboardInterrupt that strikes in the very function that wakes."""
    manager.set_quota(one_at_a_time("other"))
    held = manager.reserve(("m", "other"), 1)
    threads = acquire_all(manager, 1)
    wake, struck = ThreadWaiter.wake, []

    def interrupted(waiter):
        if not struck:
            struck.append(waiter)
            raise KeyboardInterrupt
        wake(waiter)

    monkeypatch.setattr(ThreadWaiter, "wake", interrupted)
    with pytest.raises(KeyboardInterrupt):
        held.release()
    assert manager.get_usage("other").concurrent_requests == 0
    assert all_end(threads)


def test_the_bound_of_the_line_holds_for_those_who_come_at_the_same_time(manager, monkeypatch):
    manager.update_quota("m", max_queued_requests=2)
    held = manager.reserve("m", 1)
    barrier = threading.Barrier(6)
    prepare = ThreadWaiter.prepare
    refused = []

    def all_at_once(waiter):
        prepare(waiter)
        barrier.wait(PATIENCE)

    def body():
        try:
            manager.acquire("m", 1).release()
        except QuotaExceededError as error:
            refused.append(error.result.limit)

    monkeypatch.setattr(ThreadWaiter, "prepare", all_at_once)
    threads = [start(body) for _ in range(6)]
    until(lambda: len(refused) == 4)
    assert waiting(manager) == 2
    held.release()
    assert all_end(threads)
    assert refused == [Limit.QUEUE] * 4


@pytest.mark.parametrize("anew", [False, True])
def test_a_request_whose_model_is_removed_meanwhile_counts_once(manager, anew):
    held = manager.reserve("m", 1)
    manager.default_quota = manager.get_quota("m") if anew else None
    threads = acquire_all(manager, 1)
    manager.remove_quota("m")
    assert all_end(threads)
    stats = manager.get_stats()
    assert (stats.total_checks, stats.allowed_requests, stats.queued_requests) == (2, 2, 1)
    held.release()


def test_many_tasks_of_a_closed_loop_hold_nobody_up(manager):
    held = manager.reserve("m", 1)
    loop = asyncio.new_event_loop()
    tasks = [loop.create_task(manager.acquire_async("m", 1)) for _ in range(900)]
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    assert waiting(manager) == 900
    threads = acquire_all(manager, 1)
    held.release()
    assert all_end(threads)
    assert (waiting(manager), manager.get_usage("m").concurrent_requests) == (0, 0)
    for task in tasks:
        task._log_destroy_pending = False


def test_a_task_waits_on_a_manual_clock_while_a_row_is_locked(monkeypatch):
    """The clock stands still, but the row is tried again."""
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota(one_at_a_time("m"))
    _, rows, _ = manager._arrays()
    held = manager.reserve("m", 1)
    prepare = TaskWaiter.prepare

    def lock(waiter):
        prepare(waiter)
        rows["lock"][0] = LOCKED

    def unlock():
        rows["lock"][0] = 0
        held.release()

    async def main():
        asyncio.get_running_loop().call_later(0.02, unlock)
        async with asyncio.timeout(PATIENCE), manager.acquire_async("m", 1):
            pass

    monkeypatch.setattr(TaskWaiter, "prepare", lock)
    asyncio.run(main())
    assert waiting(manager) == 0


@pytest.mark.parametrize("closed", ["before", "after"])
def test_a_task_that_leaves_a_locked_row_behind_and_whose_loop_ends(manager, closed):
    _, rows, _ = manager._arrays()
    held = manager.reserve("m", 1)
    loop = asyncio.new_event_loop()
    task = loop.create_task(manager.acquire_async("m", 1))
    loop.run_until_complete(asyncio.sleep(0.01))
    unlock = threading.Timer(0.05, rows["lock"].__setitem__, (0, 0))
    if closed == "before":
        loop.close()
    rows["lock"][0] = LOCKED
    unlock.start()
    task.get_coro().close()
    loop.close()
    unlock.join()
    task._log_destroy_pending = False
    del task
    assert waiting(manager) == 0
    held.release()
    assert manager.check_quota("m", 1)


def test_the_lines_of_a_parent_are_no_concern_of_a_forked_process():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota(one_at_a_time("m"))
    held = manager.reserve("m", 1)
    threads = acquire_all(manager, 1)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            manager.update_quota("m", max_concurrent_requests=2)
            mine = manager.acquire("m", 1, priority=1)
            waiter = ThreadWaiter()
            manager._admit_or_queue(waiter, "m", 1, 0, 0, None, 1, nowait=False)
            manager.enforcement_enabled = True  # something for all lines
            mine.release()
            code = 0 if waiter.done else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    held.release()
    assert all_end(threads)
