"""Places in queues: one at each id, from the start; as many queues as there are models; and all of it comes back."""

import multiprocessing
import os
import random
import signal
import threading

import pytest
from factories import make_manager, one_at_a_time, open_quota, waiting
from neighbors import forked, outcome_in_child, row_of, stopped_inside
from patience import PATIENCE, until

from modelquota import CapacityError, Limit, QuotaExceededError, ResourceQuotaManager

IDS = ("w", "x", "y", "z")
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def manager():
    return make_manager(*[one_at_a_time(name) for name in IDS], max_models=64)


def places(manager):
    """How many places there are in all queues together; one request may have several."""
    header, _, cold_rows = manager._arrays()
    return int(cold_rows["waiting"][: int(header["row_count"][0])].sum())


class Queue:
    """Requests in threads, begun one after the other; `served` says in which order they were admitted."""

    def __init__(self, manager, gate=None):
        self.manager, self.gate = manager, gate
        self.served = []
        self.threads = []

    def join(self, name, ids, priority=0):
        before = places(self.manager)

        def body():
            with self.manager.acquire(ids, 1, priority=priority):
                self.served.append(name)
                if self.gate is not None:
                    self.gate.acquire()

        thread = threading.Thread(target=body, daemon=True)
        thread.start()
        self.threads.append(thread)
        count = 1 if isinstance(ids, str) else len(ids)
        until(lambda: places(self.manager) == before + count)

    def wait(self):
        for thread in self.threads:
            thread.join(PATIENCE)
        assert not any(thread.is_alive() for thread in self.threads), "stuck"


# -- joint requests


@pytest.mark.parametrize("busy", ["w", "x", "y"])
@pytest.mark.parametrize("ids", [("w", "x", "y"), ("y", "w", "x")], ids="-".join)
def test_nobody_overtakes_a_joint_request_at_any_of_its_ids(manager, ids, busy):
    """One id is taken and the others are free: whoever comes later for those waits behind it."""
    held = manager.reserve(busy, 1)
    queue = Queue(manager)
    queue.join("joint", ids)
    for name in "wxy":
        result = manager.check_quota(name, 1)
        assert not result
        if name != busy:
            assert result.limit is Limit.QUEUE
        queue.join(name, name)
        with pytest.raises(QuotaExceededError):
            manager.reserve((name, "z"), 1)
    manager.reserve("z", 1).release()
    assert queue.served == []
    held.release()
    queue.wait()
    assert queue.served[0] == "joint"
    assert sorted(queue.served[1:]) == ["w", "x", "y"]
    assert places(manager) == 0


def test_a_joint_request_moves_up_while_single_ones_come_all_the_time(manager):
    """Others have come for each id by the time it is free; the joint one, which needs both, is served in its turn."""
    held = {name: manager.reserve(name, 1) for name in "xy"}
    queue = Queue(manager, threading.Semaphore(1000))
    for name in "xy":
        queue.join(f"{name} before", name)
    queue.join("joint", ("x", "y"))
    for number in range(20):
        queue.join(f"x later {number}", "x")
        queue.join(f"y later {number}", "y")
    held["x"].release()
    until(lambda: queue.served == ["x before"])
    held["y"].release()
    queue.wait()
    assert set(queue.served[:2]) == {"x before", "y before"}
    assert queue.served[2] == "joint"
    for name in "xy":
        later = [one for one in queue.served if one.startswith(f"{name} later")]
        assert later == [f"{name} later {number}" for number in range(20)]


def test_a_higher_priority_goes_first_at_each_of_the_ids(manager):
    held = manager.reserve(IDS, 1)
    queue = Queue(manager)
    queue.join("low", ("w", "x"))
    queue.join("high", ("x", "y"), priority=5)
    queue.join("middle", ("y", "w"), priority=1)
    held.release()
    queue.wait()
    assert queue.served == ["high", "middle", "low"]


@pytest.mark.parametrize("seed", range(12))
def test_requests_in_random_orders_never_block_each_other_and_keep_their_order(manager, seed):
    """The oracle is one line: by priority, then by arrival. Of two that share an id the one before is served before."""
    rng = random.Random(seed)
    held = manager.reserve(IDS, 1)
    queue = Queue(manager)
    requests = []
    for number in range(24):
        ids = tuple(rng.sample(IDS, rng.randrange(1, len(IDS) + 1)))
        requests.append((-rng.randrange(3), number, set(ids)))
        queue.join(number, ids if len(ids) > 1 or rng.random() < 0.5 else ids[0], priority=-requests[-1][0])
    held.release()
    queue.wait()
    ordered = sorted(requests, key=lambda one: one[:2])
    place = {number: at for at, number in enumerate(queue.served)}
    for at, (_, number, ids) in enumerate(ordered):
        for _, later, others in ordered[at + 1 :]:
            if ids & others:
                assert place[number] < place[later]
    assert places(manager) == 0


def test_processes_with_joint_requests_in_random_orders_end(tmp_path):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64)
    for name in IDS:
        manager.set_quota(one_at_a_time(name))

    def work(seed, done):
        rng = random.Random(seed)
        for _ in range(60):
            ids = rng.sample(IDS, rng.randrange(1, len(IDS) + 1))
            manager.acquire(ids, 1, priority=rng.randrange(2)).release()
        done.put(seed)

    done = FORK.SimpleQueue()
    processes = [FORK.Process(target=work, args=(seed, done), daemon=True) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(2 * PATIENCE)
        assert process.exitcode == 0, "stuck, or failed"
    assert places(manager) == 0
    assert all(manager.get_usage(name).requests_this_hour > 0 for name in IDS)
    for name in IDS:
        manager.reserve(name, 1).release()


# -- bounds


def test_more_queues_than_a_thousand_at_once(tmp_path):
    """All models have one: 1,500 of them, over two processes, and 15 by one request."""
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=2048)
    names = [f"m{number}" for number in range(1500)]
    for name in names:
        manager.set_quota(one_at_a_time(name))
    held = [manager.reserve(name, 1) for name in names]
    threading.stack_size(256 * 1024)
    try:

        def wait(part):
            threads = [
                threading.Thread(target=lambda ids=ids: manager.acquire(ids, 1).release(), daemon=True)
                for ids in [names[at : at + 15] for at in range(0, len(names), 15)][part::2]
            ]
            for thread in threads:
                thread.start()
            return threads

        with forked(lambda: wait(0)):
            mine = wait(1)
            until(lambda: places(manager) == 1500)
            for grant in held:
                grant.release()
            for thread in mine:
                thread.join(PATIENCE)
                assert not thread.is_alive()
            until(lambda: places(manager) == 0)
    finally:
        threading.stack_size(0)
    assert manager.get_stats().total_checks >= 1600


def test_all_grant_records_once_and_then_another_process(tmp_path):
    """262,144 grants are open at once, and released: whoever comes then has as many."""
    path = tmp_path / "quota.state"
    manager = ResourceQuotaManager(path=path, max_models=8)
    manager.set_quota(open_quota("m"))

    def open_all():
        grants = []

        def go_on():
            while True:
                grants.append(manager.reserve("m", 0))

        with pytest.raises(CapacityError, match="262,?144"):
            go_on()
        count = len(grants)
        random.Random(1).shuffle(grants)
        for grant in grants:
            grant.release()
        return count

    assert open_all() > 262_144 - 64 * 4
    assert int(outcome_in_child(open_all, seconds=300)) > 262_144 - 64 * 4
    held = manager.reserve("m", 0)
    assert int(outcome_in_child(lambda: bool(manager.reserve("m", 0)) and 7)) == 7
    held.release()
    assert manager.get_usage("m").concurrent_requests == 0


def test_entries_come_back_with_those_who_gave_up(tmp_path):
    """As many waits as there are entries have begun and ended; and no chunk stays with who needs none."""
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=32)
    names = [f"n{number}" for number in range(15)]
    for name in names:
        manager.set_quota(one_at_a_time(name))
    held = manager.reserve(names, 1)
    for _ in range(3000):
        with pytest.raises(QuotaExceededError):
            manager.acquire(names, 1, timeout=1e-6)
    assert places(manager) == 0
    assert int(manager._arrays()[0]["entry_chunks_used"][0]) <= 4
    held.release()


@pytest.mark.parametrize("most", [0, 1, 7])
def test_the_bound_of_a_queue_holds_over_processes(tmp_path, most):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=32)
    manager.set_quota(one_at_a_time("line", max_queued_requests=most))
    held = manager.reserve("line", 1)
    outcomes = FORK.SimpleQueue()
    go = FORK.Event()

    def wait(manager=manager):
        go.wait()
        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def ask():
        try:
            manager.acquire("line", 1).release()
            outcomes.put("admitted")
        except QuotaExceededError as error:
            outcomes.put(error.result.limit.name)

    processes = [FORK.Process(target=wait) for _ in range(4)]
    for process in processes:
        process.start()
    go.set()
    refused = [outcomes.get() for _ in range(20 - most)]
    assert refused == ["QUEUE"] * (20 - most)
    assert waiting(manager, "line") == most
    held.release()
    assert [outcomes.get() for _ in range(most)] == ["admitted"] * most
    for process in processes:
        process.join(PATIENCE)
    assert waiting(manager, "line") == 0


def test_a_killed_process_gives_back_all_its_places(tmp_path):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=32)
    for name in IDS:
        manager.set_quota(one_at_a_time(name))
    held = manager.reserve(IDS, 1)

    def wait():
        queue = Queue(manager)
        for number in range(30):
            queue.join(number, IDS[: number % 4 + 1])
        return queue

    with forked(wait) as pid:
        assert places(manager) == 73
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        until(lambda: manager.get_usage("w") and places(manager) == 0)
    held.release()
    manager.acquire(IDS, 1, timeout=0).release()


def test_a_repaired_queue_has_nobody_who_waits_for_the_model_that_was_in_the_row_before(tmp_path):
    """That one's process is stopped, and has not noticed that the model has gone."""
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64)
    manager.set_quota(one_at_a_time("line"))
    held = manager.reserve("line", 1)
    row = row_of(manager, "line")

    def wait():
        thread = threading.Thread(target=manager.acquire, args=("line", 1), daemon=True)
        thread.start()
        until(lambda: manager.get_usage("line").queued_requests == 1)
        return thread

    with forked(wait) as pid:
        os.kill(pid, signal.SIGSTOP)
        manager.remove_quota("line")
        manager.set_quota(one_at_a_time("line"))
        assert row_of(manager, "line") == row
        with stopped_inside(manager, "line") as dead:
            os.kill(dead, signal.SIGKILL)
            os.waitpid(dead, 0)
            assert manager.check_quota("line", 1)  # takes the lock over, and repairs the row
        assert manager._arrays()[0]["recoveries"] == 1
        assert manager.get_usage("line").queued_requests == 0
        manager.reserve("line", 1).release()
    held.release()
