"""A request whose time is over blocks nobody, whatever has become of its loop or process; live changes of that time."""

import asyncio
import contextlib
import os
import signal
import threading
import time

import pytest
from factories import make_manager, one_at_a_time, waiting
from neighbors import child_of, forked
from patience import PATIENCE, until

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaManager

TIME = 0.4  # seconds that a wait lasts here
SLACK = 10.0  # and in which what is due has happened, on a busy machine


@pytest.fixture
def manager(path):
    quotas = [one_at_a_time(model_id) for model_id in ("line", "other")]
    return make_manager(*quotas, path=path, max_models=64)


def spin_until(loop, condition):
    """Run a loop by hand until something holds."""
    until(lambda: loop.run_until_complete(asyncio.sleep(0)) or condition())


@contextlib.contextmanager
def parked_loop(manager, ids="line", timeout=TIME):
    """A loop with a task that waits in line, and that nobody runs any more."""
    loop = asyncio.new_event_loop()

    async def acquire():
        return await manager.acquire_async(ids, 1, timeout=timeout)

    before = waiting(manager, "line")
    task = loop.create_task(acquire())
    spin_until(loop, lambda: waiting(manager, "line") == before + 1)
    yield loop, task
    if not loop.is_closed():
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
        loop.close()


def seconds_until_served(manager, **how):
    start = time.monotonic()
    manager.acquire("line", 1, timeout=30, **how).release()
    return time.monotonic() - start


@pytest.mark.parametrize("home", ["same process", "other process"])
@pytest.mark.parametrize("ids", ["line", ("other", "line")], ids=str)
@pytest.mark.parametrize("decider", ["acquire", "check_quota", "reserve"])
def test_a_loop_that_is_parked_blocks_nobody_beyond_its_time(manager, home, ids, decider):
    """It is first in line, there is room, and nobody runs the loop in which it would be told so."""
    with contextlib.ExitStack() as stack:
        started = []

        def park():
            held = manager.reserve("line", 1)
            loops = [stack.enter_context(parked_loop(manager, ids)) for _ in range(2)]
            started.append(time.monotonic())
            held.release()  # the first is admitted, and cannot come for it; behind it the second waits
            return loops

        if home == "same process":
            loops = park()
        else:
            began = time.monotonic()
            stack.enter_context(forked(park))
        start = started[0] if started else began
        if decider == "acquire":
            manager.acquire("line", 1, timeout=30).release()
        elif decider == "check_quota":
            until(lambda: manager.check_quota("line", 1))
        else:
            until(lambda: _tried(lambda: manager.reserve("line", 1).release()))
        assert TIME - 0.2 < time.monotonic() - start < TIME + SLACK
        if home == "same process":
            assert not any(task.done() for _, task in loops)
        assert manager.get_usage("line").concurrent_requests == 0


def _tried(work):
    try:
        work()
    except QuotaExceededError:
        return False
    return True


def test_a_grant_for_a_parked_loop_is_taken_back_after_its_time_and_not_before(manager):
    held = manager.reserve("line", 7)
    with parked_loop(manager) as (loop, task):
        held.release()
        assert manager.get_usage("line").concurrent_requests == 1
        until(lambda: manager.get_usage("line").concurrent_requests == 0)
        assert manager.get_usage("line").tokens_this_hour == 7  # nothing is charged for it
        with pytest.raises(QuotaExceededError):  # the loop runs again, too late
            loop.run_until_complete(task)
    assert (waiting(manager, "line"), manager.get_usage("line").concurrent_requests) == (0, 0)


def test_a_loop_that_runs_again_in_time_gets_its_grant(manager):
    held = manager.reserve("line", 1)
    with parked_loop(manager, timeout=30) as (loop, task):
        held.release()
        time.sleep(0.05)
        loop.run_until_complete(task).release()
    assert manager.get_usage("line").concurrent_requests == 0


def test_a_place_whose_time_is_over_is_free_again_behind_one_that_waits_on(manager):
    manager.update_quota("line", max_queued_requests=2)
    held = manager.reserve("line", 1)
    with parked_loop(manager, timeout=60), parked_loop(manager):
        until(lambda: waiting(manager, "line") == 1)
        with parked_loop(manager, timeout=60):  # it finds room
            assert waiting(manager, "line") == 2
    held.release()


@pytest.mark.parametrize("when", ["before there is room", "after"])
@pytest.mark.filterwarnings("ignore")
def test_a_loop_that_is_closed_blocks_nobody(manager, when):
    held = manager.reserve("line", 1)
    with parked_loop(manager) as (loop, _), parked_loop(manager) as (other, _):
        if when == "after":
            held.release()
        loop.close()
        other.close()
        held.release()
        assert seconds_until_served(manager) < TIME + SLACK
    assert (waiting(manager, "line"), manager.get_usage("line").concurrent_requests) == (0, 0)


def test_a_busy_loop_does_not_delay_those_of_other_loops_and_threads(manager):
    """Each loop looks at the clock for itself: a denial is on time though another loop, first in line, stands still."""
    held = manager.reserve("line", 1)
    with parked_loop(manager, timeout=30):
        ended = {}

        async def acquire(name):
            start = time.monotonic()
            with pytest.raises(QuotaExceededError):
                await manager.acquire_async("line", 1, timeout=TIME)
            ended[name] = time.monotonic() - start

        threads = [threading.Thread(target=lambda n=n: asyncio.run(acquire(n)), daemon=True) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert all(TIME - 0.01 < seconds < TIME + SLACK for seconds in ended.values())
        assert len(ended) == 2
    held.release()


@pytest.mark.parametrize("ids", ["line", ("line", "other")], ids=str)
@pytest.mark.parametrize("number", [1, 3])
def test_a_stopped_process_blocks_nobody_beyond_its_time(manager, ids, number):
    held = manager.reserve("line", 1)

    def wait():
        threads = [
            threading.Thread(target=lambda: _tried(lambda: manager.acquire(ids, 1, timeout=TIME)), daemon=True)
            for _ in range(number)
        ]
        for thread in threads:
            thread.start()
        until(lambda: waiting(manager, "line") == number)
        return threads

    with forked(wait) as pid:
        os.kill(pid, signal.SIGSTOP)
        held.release()
        assert seconds_until_served(manager) < TIME + SLACK
        assert manager.check_quota("line", 1)
        assert waiting(manager, "line") == 0
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)  # it finds that it is too late
        assert manager.get_usage("line").concurrent_requests == 0


# -- live changes of grace_period_sec


@pytest.fixture(params=["thread", "task", "process"])
def wait_in_line(request, manager):
    """Begin to wait, in one of three ways; what comes of it is how long it was, or "admitted"."""
    found = []
    with contextlib.ExitStack() as stack:

        def wait():
            start = time.monotonic()
            try:
                if request.param == "task":
                    asyncio.run(_acquire_and_release(manager))
                else:
                    manager.acquire("line", 1).release()
                return "admitted"
            except QuotaExceededError:
                return time.monotonic() - start

        def begin():
            if request.param == "process":
                ready, done = os.pipe()
                stack.enter_context(_started(lambda: os.write(done, repr(wait()).encode())))
                stack.callback(os.close, ready)
                stack.callback(os.close, done)
                body = lambda: found.append(eval(os.read(ready, 100)))  # noqa: E731
            else:
                body = lambda: found.append(wait())  # noqa: E731
            thread = threading.Thread(target=body, daemon=True)
            thread.start()
            until(lambda: waiting(manager, "line") == 1)

            def outcome():
                thread.join(PATIENCE)
                assert found, "it waits on"
                return found[0]

            return outcome

        yield begin


@contextlib.contextmanager
def _started(work):
    pid = child_of(work)
    yield
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


async def _acquire_and_release(manager):
    (await manager.acquire_async("line", 1)).release()


def test_a_shorter_grace_period_ends_waits_that_are_under_way(manager, wait_in_line):
    held = manager.reserve("line", 1)
    outcome = wait_in_line()
    manager.update_quota("line", grace_period_sec=0.3)
    assert 0.3 - 0.001 <= outcome() < 0.3 + SLACK
    assert waiting(manager, "line") == 0
    held.release()


@pytest.mark.parametrize("first", ["line", ("other", "line")], ids=str)
def test_a_shorter_grace_period_reaches_those_behind_the_first_as_well(first):
    """Whether the first waits for the same model, or is held up by another one, which keeps its grace period."""
    clock = ManualClock(10**15)
    manager = ResourceQuotaManager(clock=clock, max_models=64)
    held = []
    for model_id in ("line", "other"):
        manager.set_quota(one_at_a_time(model_id))
        held.append(manager.reserve(model_id, 1))
    threads = []
    for ids in (first, "line", "line", "line"):
        acquire = lambda ids=ids: _tried(lambda: manager.acquire(ids, 1))  # noqa: E731
        threads.append(threading.Thread(target=acquire, daemon=True))
        threads[-1].start()
        until(lambda: waiting(manager, "line") == len(threads))
    manager.update_quota("line", grace_period_sec=5)
    clock.advance(4.999)
    assert waiting(manager, "line") == 4
    clock.advance(0.001)
    end = threads if first == "line" else threads[1:]
    for thread in end:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it waits on"
    assert waiting(manager, "line") == len(threads) - len(end)
    clock.advance(55)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "it waits on"
    assert waiting(manager, "line") == 0
    for grant in held:
        grant.release()


def test_a_shorter_grace_period_wakes_all_who_sleep():
    """Threads and the tasks of two loops, of a state that no other process has: nothing else wakes them in between."""
    manager = ResourceQuotaManager(max_models=64)
    manager.set_quota(one_at_a_time("line"))
    held = manager.reserve("line", 1)
    ended = []

    async def tasks():
        await asyncio.gather(*(_acquire_and_release(manager) for _ in range(3)), return_exceptions=True)

    def wait(how):
        how()
        ended.append(time.monotonic())

    hows = [lambda: asyncio.run(tasks())] * 2 + [lambda: _tried(lambda: manager.acquire("line", 1))] * 3
    threads = [threading.Thread(target=wait, args=(how,), daemon=True) for how in hows]
    for thread in threads:
        thread.start()
    until(lambda: waiting(manager, "line") == 9)
    start = time.monotonic()
    manager.update_quota("line", grace_period_sec=0.3)
    until(lambda: len(ended) == len(threads))
    assert max(ended) - start < 0.3 + SLACK
    assert waiting(manager, "line") == 0
    held.release()


def test_a_grace_period_of_nothing_ends_them_at_once(manager, wait_in_line):
    held = manager.reserve("line", 1)
    outcome = wait_in_line()
    manager.update_quota("line", grace_period_sec=0)
    assert outcome() < SLACK
    held.release()


def test_a_longer_grace_period_prolongs_waits_that_are_under_way(manager, wait_in_line):
    manager.update_quota("line", grace_period_sec=1.5)
    held = manager.reserve("line", 1)
    outcome = wait_in_line()
    manager.update_quota("line", grace_period_sec=60)
    time.sleep(2)
    assert waiting(manager, "line") == 1
    held.release()
    assert outcome() == "admitted"


def test_a_change_in_another_process_reaches_them(manager, wait_in_line):
    held = manager.reserve("line", 1)
    outcome = wait_in_line()
    with forked(lambda: manager.update_quota("line", grace_period_sec=0.3)):
        assert 0.3 - 0.001 <= outcome() < 0.3 + SLACK
    held.release()
