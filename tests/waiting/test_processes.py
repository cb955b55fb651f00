"""One queue for all processes: by priority, then by arrival; nobody barges, and the dead give up their place."""

import asyncio
import contextlib
import multiprocessing
import os
import resource
import signal
import threading
import time

import pytest
from factories import make_manager, one_at_a_time
from neighbors import stopped_inside
from patience import PATIENCE, until

from modelquota import QuotaExceededError, ResourceQuotaManager
from modelquota.waiting.task import TaskWaiter

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def manager(path):
    return make_manager(one_at_a_time("m"), path=path, max_models=2048)


def wait_in_line(path, number, priority, served, hold_seconds):
    manager = ResourceQuotaManager(path=path)
    with manager.acquire("m", 1, priority=priority):
        served.put((number, time.monotonic()))
        time.sleep(hold_seconds)


@pytest.fixture
def crew():
    started = []
    yield started
    for process in started:
        process.kill()
        process.join()


def start_waiting(manager, crew, priorities, hold_seconds=0.0):
    """One process for each, in this order; what they say when they are served."""
    served = FORK.SimpleQueue()
    for number, priority in enumerate(priorities):
        waiting = manager.get_usage("m").queued_requests
        args = (manager.path, number, priority, served, hold_seconds)
        process = FORK.Process(target=wait_in_line, args=args)
        process.start()
        crew.append(process)
        until(lambda waiting=waiting: manager.get_usage("m").queued_requests == waiting + 1)
    return served


def test_by_priority_then_by_arrival(manager, crew):
    grant = manager.reserve("m", 1)
    served = start_waiting(manager, crew, [0, 5, 0, 5, -3], hold_seconds=0.002)
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 1)
    grant.release()
    assert [served.get()[0] for _ in range(5)] == [1, 3, 0, 2, 4]


def test_who_was_kept_out_of_the_queue_by_a_lock_comes_before_those_who_came_later(manager, monkeypatch):
    """Its turn is that of its arrival: the row is locked from its denial on, and others come before it gets a place."""
    other = ResourceQuotaManager(path=manager.path)
    held = other.reserve("m", 1)
    prepare = TaskWaiter.prepare
    served = []

    def wait():
        with other.acquire("m", 1):
            served.append("later")

    async def main():
        with contextlib.ExitStack() as stack:

            def prepare_and_stop(waiter):
                prepare(waiter)
                stack.enter_context(stopped_inside(other, "m"))

            monkeypatch.setattr(TaskWaiter, "prepare", prepare_and_stop)
            first = asyncio.ensure_future(manager.acquire_async("m", 1))
            await asyncio.sleep(0)
        assert other.get_usage("m").queued_requests == 0
        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        until(lambda: other.get_usage("m").queued_requests == 1)  # the loop stands still
        while other.get_usage("m").queued_requests < 2:
            await asyncio.sleep(0.001)
        held.release()
        grant = await asyncio.wait_for(first, PATIENCE)
        assert served == []
        grant.release()
        thread.join(PATIENCE)
        assert served == ["later"]

    asyncio.run(main())


def test_nobody_barges(manager, crew):
    """From the release on the place is free, and yet nobody of another process is served before who waits."""
    grant = manager.reserve("m", 1)
    served = start_waiting(manager, crew, [0])
    grant.release()
    barged = 0
    while served.empty():
        barged += bool(manager.check_quota("m", 1))
        if not served.empty():
            break
    assert served.get()[0] == 0
    # A check that came after the other one was served, and before this process heard of it, is none.
    assert barged <= 1


def test_woken_soon_after_a_release_in_another_process(manager, crew):
    delays = []
    for _ in range(8):
        grant = manager.reserve("m", 1)
        served = start_waiting(manager, crew, [0])
        time.sleep(0.015)
        released = time.monotonic()
        grant.release()
        delays.append(served.get()[1] - released)
        until(lambda: manager.get_usage("m").concurrent_requests == 0)
    print("woken after", sorted(delays))
    assert sorted(delays)[len(delays) // 2] < 0.1


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_dead_waiter_gives_up_its_place(manager, crew, place):
    grant = manager.reserve("m", 1)
    served = start_waiting(manager, crew, [0, 0, 0])
    crew[place].kill()
    crew[place].join()
    started = time.monotonic()
    grant.release()
    assert [served.get()[0] for _ in range(2)] == [i for i in range(3) if i != place]
    assert time.monotonic() - started < 2
    until(lambda: manager.get_usage("m").concurrent_requests == 0)
    manager.reserve("m", 1).release()


def test_a_stopped_waiter_keeps_its_place(manager, crew):
    grant = manager.reserve("m", 1)
    served = start_waiting(manager, crew, [0, 0])
    os.kill(crew[0].pid, signal.SIGSTOP)
    grant.release()
    time.sleep(0.1)
    assert served.empty()
    os.kill(crew[0].pid, signal.SIGCONT)
    assert [served.get()[0] for _ in range(2)] == [0, 1]


@pytest.mark.parametrize("anonymous", [False, True])
def test_a_change_by_a_process_that_came_later_is_noticed(tmp_path, anonymous):
    manager = ResourceQuotaManager(path=None if anonymous else tmp_path / "quota.state")
    manager.set_quota(one_at_a_time("m"))
    grant = manager.reserve("m", 1)
    served = []
    thread = threading.Thread(target=lambda: served.append(manager.acquire("m", 1)))
    thread.start()
    until(lambda: manager.get_usage("m").queued_requests == 1)
    time.sleep(0.05)

    def raise_limit():
        other = manager if anonymous else ResourceQuotaManager(path=manager.path)
        other.update_quota("m", max_concurrent_requests=2)

    child = FORK.Process(target=raise_limit)
    child.start()
    child.join()
    thread.join(5)
    assert not thread.is_alive()
    assert child.exitcode == 0
    served[0].release()
    grant.release()


@pytest.mark.parametrize("models", [1, 200])
def test_a_thousand_waiters_take_next_to_no_processor(manager, models):
    """Also where they wait for many models."""

    def wait():
        mine = ResourceQuotaManager(path=manager.path)
        per_model = 1000 // models
        for model in range(models):
            for _ in range(per_model):
                thread = threading.Thread(target=mine.acquire, args=(f"m{model}", 1), daemon=True)
                thread.start()
        until(lambda: sum(mine.get_usage(f"m{model}").queued_requests for model in range(models)) == 1000)
        time.sleep(0.1)
        before = resource.getrusage(resource.RUSAGE_SELF)
        time.sleep(1.0)
        after = resource.getrusage(resource.RUSAGE_SELF)
        used.put(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        os._exit(0)

    for model in range(models):
        manager.set_quota(one_at_a_time(f"m{model}"))
    grants = [manager.reserve(f"m{model}", 1) for model in range(models)]
    used = FORK.SimpleQueue()
    child = FORK.Process(target=wait)
    child.start()
    seconds = used.get()
    child.join()
    print(models, "models:", seconds, "s of processor time in a second")
    for grant in grants:
        grant.release()
    assert seconds < 0.3
