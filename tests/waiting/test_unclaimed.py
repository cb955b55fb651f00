"""A request that waited was admitted and does not come for its grant: from its deadline on it blocks nobody.

Its event loop is parked, or its process is stopped. Others that are held up let the grant go, as if it had been
cancelled; a request that comes for it afterwards is denied.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import threading
import time

import pytest
from crew import shared_array
from factories import make_manager, one_at_a_time, queue_quota
from neighbors import forked, row_of, seat_words
from patience import PATIENCE, until

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaManager
from modelquota._core.table.queue import Waiter
from modelquota.statefile.inspect import verify_file
from modelquota.waiting.thread import ThreadWaiter

TOKENS, RAM_MB = 7, 60
TIME = 10.0  # seconds of a manual clock that a wait lasts here,
TIME_LEFT = 0.4  # and of the real one
KINDS = {
    "concurrency": one_at_a_time("line"),
    "memory": queue_quota("line", max_ram_mb=100),
    "tokens": queue_quota("line", max_tokens_per_day=10),
    "rate": queue_quota("line", max_tokens_per_second=0.001, burst_tokens=9),
}
IDS = ["line", ("line", "other"), ("other", "line")]


@pytest.fixture
def clock():
    return ManualClock(10**15)


@pytest.fixture
def owner(path, clock):
    """The manager of those that wait; as long as nothing is called, its process is as good as stopped."""
    return make_manager(one_at_a_time("line"), queue_quota("other"), path=path, clock=clock, max_models=64)


@pytest.fixture
def neighbor(owner, path, clock):
    """As another process: it has a seat of its own."""
    return ResourceQuotaManager(path=path, clock=clock)


def begin_to_wait(manager, ids="line", timeout=TIME, tokens=TOKENS, ram_mb=RAM_MB):
    """A request in line whose owner does nothing."""
    waiter = ThreadWaiter()
    assert manager._admit_or_queue(waiter, ids, tokens, ram_mb, 0, timeout, 0, nowait=False) is waiter
    assert not waiter.done
    return waiter


def unclaimed(manager, ids="line", **how):
    """A request that waited and was admitted, and that does not come for its grant."""
    held = manager.reserve("line", TOKENS, RAM_MB)
    waiter = begin_to_wait(manager, ids, **how)
    held.cancel()
    assert waiter.done
    return waiter


def held(manager, *model_ids):
    """What open grants hold, and what they have charged."""
    usages = [manager.get_usage(model_id) for model_id in model_ids or ("line", "other")]
    return tuple(
        (usage.concurrent_requests, usage.reserved_ram_mb, usage.tokens_this_day, usage.requests_this_day)
        for usage in usages
    )


NOTHING = ((0, 0, 0, 0),) * 2
ONE = (1, RAM_MB, TOKENS, 1)


def ends(ids):
    """What `held` says while the grant for these ids is open."""
    return (ONE, ONE if isinstance(ids, tuple) else NOTHING[1])


def gets_in(manager):
    with contextlib.suppress(QuotaExceededError):
        manager.reserve("line", TOKENS, RAM_MB).cancel()
        return True


@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_from_its_deadline_on_others_let_it_go(owner, neighbor, clock, kind, ids):
    owner.set_quota(KINDS[kind])
    waiter = unclaimed(owner, ids)
    assert held(neighbor) == ends(ids)
    clock.advance_ns(int(TIME * 1e9) - 1)
    for _ in range(5):
        assert not gets_in(neighbor)
        time.sleep(0.01)  # others look at most so often
    assert held(neighbor) == ends(ids)
    clock.advance_ns(1)
    until(lambda: gets_in(neighbor))
    assert held(neighbor) == NOTHING
    with pytest.raises(QuotaExceededError) as caught:
        waiter.take()
    assert not caught.value.result
    assert held(neighbor) == NOTHING
    assert verify_file(owner.path) == []


def test_its_request_is_refunded_where_only_requests_are_short(owner, neighbor, clock):
    owner.set_quota(one_at_a_time("line", max_concurrent_requests=2, max_requests_per_day=3))
    mine = [owner.reserve("line", 1) for _ in range(2)]
    waiter = begin_to_wait(owner)
    for grant in mine:
        grant.release()
    assert waiter.done
    assert held(neighbor, "line") == ((1, RAM_MB, TOKENS + 2, 3),)
    assert not neighbor.check_quota("line", 1)
    clock.advance(TIME)
    until(lambda: neighbor.check_quota("line", 1))
    assert held(neighbor, "line") == ((0, 0, 3, 3),)


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_who_has_taken_it_keeps_it(owner, neighbor, clock, ids):
    grant = unclaimed(owner, ids).take()
    clock.advance(TIME)
    for _ in range(5):
        assert not gets_in(neighbor)
        time.sleep(0.01)
    assert held(neighbor) == ends(ids)
    grant.settle(3)
    grant.release()
    assert held(neighbor)[0] == (0, 0, 3, 1)
    until(lambda: gets_in(neighbor))


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_who_comes_after_its_deadline_gets_it_if_nobody_has_let_it_go(owner, neighbor, clock, ids):
    waiter = unclaimed(owner, ids)
    clock.advance(TIME + 1)
    grant = waiter.take()
    for _ in range(5):
        assert not gets_in(neighbor)
        time.sleep(0.01)
    grant.release()
    assert held(neighbor)[0] == (0, 0, TOKENS, 1)


def test_a_request_without_a_deadline_keeps_its_grant(owner, neighbor, clock):
    owner.update_quota("line", grace_period_sec=float(2**60))
    waiter = unclaimed(owner, timeout=None)
    clock.advance(10**6)
    for _ in range(5):
        assert not gets_in(neighbor)
        time.sleep(0.01)
    waiter.take().release()


@pytest.mark.parametrize("how", ["take", "leave", "reclaim", "close", "forget"])
@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_nothing_is_given_back_twice(owner, neighbor, path, clock, how, ids):
    """Whatever its own process does about it in the end."""
    other = neighbor.reserve("other", 1, 1)
    manager = ResourceQuotaManager(path=path, clock=clock)
    waiter = unclaimed(manager, ids)
    clock.advance(TIME)
    until(lambda: gets_in(neighbor))
    mine = neighbor.reserve("line", TOKENS, RAM_MB)
    expected = (ONE, (1, 1, 1, 1))
    assert held(neighbor) == expected
    if how == "take":
        with pytest.raises(QuotaExceededError):
            waiter.take()
    elif how == "leave":
        waiter.leave()
    elif how == "reclaim":
        manager.get_usage("line")
    elif how == "close":
        manager.close()
    else:
        del waiter, manager
        gc.collect()
    assert held(neighbor) == expected
    if how in ("take", "leave", "reclaim"):  # its records are used again
        again = [manager.reserve("other", 2, 3) for _ in range(100)]
        assert held(neighbor, "other") == ((101, 301, 201, 101),)
        for grant in again:
            grant.cancel()
    assert held(neighbor) == expected
    mine.cancel()
    other.cancel()
    assert held(neighbor) == NOTHING
    assert verify_file(owner.path) == []


@pytest.mark.parametrize("gone", ["line", "other"])
def test_a_model_that_was_removed_in_the_meantime(owner, neighbor, clock, gone):
    waiter = unclaimed(owner, ("line", "other"))
    owner.remove_quota(gone)
    owner.set_quota(one_at_a_time(gone))
    clock.advance(TIME)
    until(lambda: neighbor.snapshot() is not None and held(neighbor) == NOTHING)
    with pytest.raises(QuotaExceededError):
        waiter.take()
    assert held(neighbor) == NOTHING
    assert verify_file(owner.path) == []


@pytest.mark.parametrize("ids", IDS[1:], ids=str)
@pytest.mark.parametrize("locked", ["line", "other"])
def test_a_row_that_stays_locked_is_seen_to_later(owner, neighbor, clock, ids, locked):
    """What has lapsed at one model has lapsed at all; who looks again finishes it, and so does its own process."""
    waiter = unclaimed(owner, ids)
    free = "other" if locked == "line" else "line"
    clock.advance(TIME)
    _, rows, _ = owner._arrays()
    rows["lock"][row_of(owner, locked)] = owner_word(owner)  # as of a process that was stopped there
    until(lambda: held(neighbor, free) == (NOTHING[0],))
    with pytest.raises(QuotaExceededError):
        waiter.take()
    rows["lock"][row_of(owner, locked)] = 0
    until(lambda: held(neighbor) == NOTHING)
    del rows
    assert verify_file(owner.path) == []


def owner_word(manager):
    """The seat word of a process that lives."""
    return min(seat_words(manager))


# -- processes


@pytest.fixture
def manager(path):
    """On the real clock."""
    return make_manager(one_at_a_time("line"), queue_quota("other"), path=path, max_models=64)


@contextlib.contextmanager
def stopped_before_it_takes(manager, ids, timeout, said):
    """A process that is stopped when its thread has been admitted and has not come for the grant.

    Afterwards said[0] is 1 if the thread got it, 2 if it was denied; said[1] is 1 once that is known.
    """

    def wait():
        def stop_and_take(waiter):
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            return Waiter.take(waiter)

        def acquire():
            try:
                grant = manager.acquire(ids, TOKENS, RAM_MB, timeout=timeout)
                said[0] = 1
                grant.cancel()
            except QuotaExceededError:
                said[0] = 2
            said[1] = 1

        mine = manager.reserve("line", TOKENS, RAM_MB)
        thread = threading.Thread(target=acquire, daemon=True)
        thread.start()
        until(lambda: manager.get_usage("line").queued_requests == 1)
        ThreadWaiter.take = stop_and_take

        def release():
            until(lambda: said[2])
            mine.cancel()

        threading.Thread(target=release, daemon=True).start()
        return thread

    with forked(wait) as pid:
        said[2] = 1
        _, status = os.waitpid(pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        yield pid


@pytest.mark.parametrize("ids", IDS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_process_that_is_stopped_before_its_thread_takes_it(manager, kind, ids, comes_back):
    manager.set_quota(KINDS[kind])
    said = shared_array("i8", 3)
    start = time.monotonic()
    with stopped_before_it_takes(manager, ids, TIME_LEFT, said) as pid:
        assert held(manager) == ends(ids) or time.monotonic() - start >= TIME_LEFT
        manager.acquire("line", TOKENS, RAM_MB, timeout=PATIENCE).cancel()
        assert held(manager) == NOTHING
        mine = manager.reserve("line", TOKENS, RAM_MB)
        if comes_back:
            os.kill(pid, signal.SIGCONT)
            until(lambda: said[1])
            assert said[0] == 2
        else:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert held(manager) == (ONE, NOTHING[1])
        mine.cancel()
    until(lambda: held(manager) == NOTHING)
    assert verify_file(manager.path) == []


def test_a_process_that_goes_on_in_time_gets_its_grant(manager):
    said = shared_array("i8", 3)
    with stopped_before_it_takes(manager, "line", PATIENCE, said) as pid:
        assert held(manager)[0] == ONE
        os.kill(pid, signal.SIGCONT)
        until(lambda: said[1])
        assert said[0] == 1
    assert held(manager) == NOTHING


@pytest.mark.parametrize("joint", [False, True])
def test_either_it_is_taken_or_let_go(manager, joint):
    """Many come for their grants just when others let them go: each is admitted and held, or denied and refunded."""
    lines = [f"line {i}" for i in range(8)]
    for line in lines:
        manager.set_quota(one_at_a_time(line))
    rounds = 12
    taken, denied, failed = (shared_array("i8", len(lines)) for _ in range(3))
    done = shared_array("i8", 1)

    def come(number):
        rng = random.Random(number)
        line = lines[number]
        for _ in range(rounds):
            mine = manager.reserve(line, TOKENS, RAM_MB)
            waiter = begin_to_wait(manager, (line, "other") if joint else line, timeout=0.03)
            mine.cancel()
            time.sleep(0.03 + rng.uniform(0.0, 0.015))
            try:
                grant = waiter.take()
            except QuotaExceededError:
                denied[number] += 1
                continue
            finally:
                waiter.leave()
            taken[number] += 1
            time.sleep(rng.choice([0, 0.02]))
            failed[number] += manager.get_usage(line).concurrent_requests != 1
            grant.release()

    def work():
        threads = [threading.Thread(target=come, args=(number,), daemon=True) for number in range(len(lines))]
        for thread in threads:
            thread.start()

        def finish():
            for thread in threads:
                thread.join()
            done[0] = 1

        threading.Thread(target=finish, daemon=True).start()
        return threads

    with forked(work):
        until(lambda: manager.get_stats() is not None and manager.snapshot() is not None and done[0])
        assert (taken + denied).tolist() == [rounds] * len(lines)
        assert not failed.any()
        assert taken.sum() > 0
        for number, line in enumerate(lines):
            assert held(manager, line) == ((0, 0, int(taken[number]) * TOKENS, int(taken[number])),)
        if joint:
            assert held(manager, "other") == ((0, 0, int(taken.sum()) * TOKENS, int(taken.sum())),)
    assert verify_file(manager.path) == []
