"""Who is alive: every process and every manager has a seat, which the kernel gives up at its death."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
from factories import make_manager, open_quota
from neighbors import epochs_of, forked

from modelquota import QuotaExceededError, ResourceQuotaManager

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def manager(path):
    return make_manager(open_quota("m", max_concurrent_requests=1), path=path, max_models=64)


def seconds_until_admitted(manager, most=5.0):
    start = time.monotonic()
    while time.monotonic() - start < most:
        with contextlib.suppress(QuotaExceededError):
            manager.reserve("m", 1).release()
            return time.monotonic() - start
    raise AssertionError("what the dead one held is never given back")


def test_what_a_killed_child_held_is_given_back(manager):
    with forked(lambda: manager.reserve("m", 1, 5)) as pid:
        with pytest.raises(QuotaExceededError):
            manager.reserve("m", 1)
        time.sleep(0.02)
        with pytest.raises(QuotaExceededError):
            manager.reserve("m", 1)
        os.kill(pid, signal.SIGKILL)
        assert seconds_until_admitted(manager) < 1
    assert manager.get_usage("m").reserved_ram_mb == 0


def test_reading_looks_for_the_dead(manager):
    with forked(lambda: manager.reserve("m", 1, 5)) as pid:
        assert manager.get_usage("m").concurrent_requests == 1
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.011)
        assert manager.get_usage("m").concurrent_requests == 0


def test_batches_look_for_the_dead(manager):
    codes = manager.codes(["m"])
    with forked(lambda: manager.reserve("m", 1)) as pid:
        assert manager.check_many(codes, 1).tolist() == [3]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        time.sleep(0.011)
        manager.check_many(codes, 1)
        assert manager.check_many(codes, 1).tolist() == [0]


def test_a_dead_parent_is_noticed_though_its_child_lives(path, manager):
    """The child inherits the parent's descriptors, those of mmap too; none may keep the parent's seat taken."""
    read, write = os.pipe()

    def become_a_parent():
        mine = ResourceQuotaManager(path=path)
        grant = mine.reserve("m", 1)
        child = os.fork()
        if child == 0:
            os.write(write, b"%d\n" % os.getpid())
            while True:
                time.sleep(10)
        return mine, grant

    with forked(become_a_parent) as parent:
        child = int(os.read(read, 20))
        try:
            with pytest.raises(QuotaExceededError):
                manager.reserve("m", 1)
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            os.kill(child, 0)  # is still there
            assert seconds_until_admitted(manager) < 1
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(read)
            os.close(write)


def test_a_dead_child_is_noticed_though_its_parent_lives(manager):
    grant = manager.reserve("m", 1)
    with forked(lambda: None):
        pass
    time.sleep(0.02)
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 1)  # what the parent holds is held
    grant.release()
    manager.reserve("m", 1).release()


def test_seats_are_used_again(path, manager):
    before = epochs_of(manager).copy()
    for _ in range(20):
        ResourceQuotaManager(path=path)
    gc.collect()
    taken = np.flatnonzero(epochs_of(manager) != before)
    assert taken.tolist() == [2]


def test_whoever_sits_down_on_a_dead_ones_seat_is_not_taken_for_it(path, manager):
    """Its process id plays no part: the epoch of the seat is another one."""
    with forked(lambda: manager.reserve("m", 1)) as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with forked(lambda: manager.check_quota("m", 1)):
            taken = np.flatnonzero(epochs_of(manager))
            assert taken.tolist() == [1, 2]  # the seat is taken again
            time.sleep(0.011)
            assert seconds_until_admitted(manager) < 1


def test_two_managers_of_one_process_on_one_file(path, manager):
    other = ResourceQuotaManager(path=path)
    held = other.reserve("m", 1)
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 1)
    other.update_quota("m", max_concurrent_requests=2)
    second = manager.reserve("m", 1)
    del other, held
    gc.collect()
    assert manager.get_usage("m").concurrent_requests == 1
    second.release()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_lock_of_a_dead_seat_is_taken_over_in_threads(path, manager):
    _, rows, _ = manager._arrays()
    with forked(lambda: None):
        pass
    dead = (int(epochs_of(manager)[2]) << 10) | 2
    for _ in range(20):
        rows["lock"][0] = dead
        threads = [threading.Thread(target=manager.check_quota, args=("m", 1)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        assert rows["lock"][0] == 0
    assert manager.get_usage("m").requests_this_day == 80


def test_a_lock_of_the_living_is_waited_for(manager):
    _, rows, _ = manager._arrays()
    with forked(lambda: None) as pid:
        rows["lock"][0] = (int(epochs_of(manager)[2]) << 10) | 2
        thread = threading.Thread(target=manager.check_quota, args=("m", 1))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        os.kill(pid, signal.SIGKILL)
        thread.join(5)
        assert not thread.is_alive()


def test_many_processes_take_seats_at_once(path, manager):
    def work(found):
        mine = ResourceQuotaManager(path=path)
        found.put(sum(bool(mine.check_quota("n", 1)) for _ in range(100)))

    manager.set_quota("n", max_requests_per_day=1_000, max_requests_per_second=None)
    found = FORK.Queue()
    processes = [FORK.Process(target=work, args=(found,)) for _ in range(20)]
    for process in processes:
        process.start()
    admitted = [found.get() for _ in processes]
    for process in processes:
        process.join()
    assert sum(admitted) == 1_000
    assert manager.get_usage("n").requests_this_day == 1_000
