"""`close`: what the process held is given back, those who wait are told, every verb refuses, and others go on."""

import asyncio
import contextlib
import gc
import os
import threading
import time

import every_verb
import pytest
from every_verb import GRANT, HANDLE, MANAGER, VIEW
from factories import make_manager, one_at_a_time, open_quota
from neighbors import forked, outcome_in_child, stopped_inside
from patience import PATIENCE, until

from modelquota import ManagerClosedError, ManualClock, QuotaExceededError, ResourceQuotaManager

CLOSED = {"ManagerClosedError"}


@pytest.fixture
def manager(path):
    quotas = open_quota("m", max_ram_mb=1000), open_quota("n"), one_at_a_time("line")
    return make_manager(*quotas, path=path, max_models=64)


@pytest.fixture
def other(manager, path):
    """Somebody else who has the same state open."""
    with ResourceQuotaManager(path=path) as other:
        yield other


class Waiting(threading.Thread):
    """A thread, or a loop with a task, that waits for a model; what that came to."""

    def __init__(self, manager, ids="line", in_task=False):
        super().__init__(daemon=True)
        self.manager, self.ids, self.in_task = manager, ids, in_task
        self.outcome = None
        before = manager.get_usage("line").queued_requests
        self.start()
        until(lambda: manager.get_usage("line").queued_requests == before + 1)

    def run(self):
        try:
            self.outcome = asyncio.run(self.acquire()) if self.in_task else self.manager.acquire(self.ids, 1)
        except BaseException as error:
            self.outcome = error

    async def acquire(self):
        return await self.manager.acquire_async(self.ids, 1)

    def end(self):
        self.join(PATIENCE)
        assert not self.is_alive()
        return type(self.outcome)


# -- every verb


def test_the_tables_of_verbs_are_complete(manager):
    assert every_verb.missing(manager, MANAGER, every_verb.NO_VERBS_OF_A_MANAGER) == set()
    assert every_verb.missing(manager.model("m"), HANDLE, every_verb.NO_VERBS_OF_A_HANDLE) == set()
    with manager.reserve("m", 1) as grant:
        assert every_verb.missing(grant, GRANT, every_verb.NO_VERBS_OF_A_GRANT) == set()
    with manager.open_readonly(manager.path) as view:
        assert every_verb.missing(view, VIEW, every_verb.NO_VERBS_OF_A_VIEW) == set()


def test_every_verb_of_a_closed_manager(manager):
    grant = manager.reserve("m", 1)
    manager.close()
    answers = every_verb.outcomes(MANAGER, manager)
    assert {name: answer for name, answer in answers.items() if answer != "ManagerClosedError"} == {}
    with pytest.raises(ManagerClosedError):
        manager.settle_many([grant], [1])
    assert manager.closed


@pytest.mark.parametrize("clock", [None, ManualClock(5)], ids=["real", "manual"])
def test_every_verb_of_a_closed_manager_in_memory(clock):
    manager = ResourceQuotaManager(max_models=8, clock=clock)
    manager.set_quota(open_quota("m"))
    for verb in MANAGER.values():  # what it has learned does not answer for it
        verb(manager)
    manager.close()
    assert set(every_verb.outcomes(MANAGER, manager).values()) == CLOSED
    if clock is not None:
        clock.advance(10)  # nobody who has gone is told


def test_every_verb_of_a_closed_managers_handle(manager):
    handle = manager.model("m")
    manager.close()
    answers = every_verb.outcomes(HANDLE, handle)
    assert {name: answer for name, answer in answers.items() if answer != "ManagerClosedError"} == {}
    assert handle.model_id == "m"
    repr(handle)
    del handle
    gc.collect()


def test_every_verb_of_a_closed_managers_grants(manager):
    fresh, counted, settled, released = (manager.reserve("m", 10) for _ in range(4))
    counted.add(3)
    settled.settle(4)
    released.release()
    manager.close()
    for grant in (fresh, counted):
        assert set(every_verb.outcomes(GRANT, grant).values()) == CLOSED
    assert [grant.tokens for grant in (fresh, counted, settled, released)] == [10, 3, 4, 10]
    for grant in (fresh, counted, settled, released):
        assert grant.released
        grant.release()
        with contextlib.suppress(ManagerClosedError), grant:
            pass
        repr(grant)


def test_every_verb_of_a_closed_view(manager):
    view = manager.open_readonly(manager.path)
    assert CLOSED.isdisjoint(every_verb.outcomes(VIEW, view).values())
    view.close()
    view.close()
    assert set(every_verb.outcomes(VIEW, view).values()) == CLOSED
    with pytest.raises(ManagerClosedError, match="view"):
        view.get_stats()
    with manager.open_readonly(manager.path) as view:
        manager.close()
        assert view.list_models() == ["m", "n", "line"]  # it needs no manager
    assert set(every_verb.outcomes(VIEW, view).values()) == CLOSED


@pytest.mark.usefixtures("switch_threads_often")
def test_a_view_that_is_closed_while_threads_read(manager):
    """None of them reads a file that another thread has opened under the same number in the meantime."""
    for _ in range(30):
        view = manager.open_readonly(manager.path)
        found = []

        def read(view=view, found=found):
            outcome = None
            while outcome is None:
                outcome = _error_of(lambda: view.get_stats() and (view.list_models() != ["m", "n", "line"] or None))
            found.append(outcome)

        threads = [threading.Thread(target=read) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.003)
        view.close()
        with open(__file__, "rb"):  # has the number now
            for thread in threads:
                thread.join(PATIENCE)
        assert found == ["ManagerClosedError"] * 2


# -- what was held, and who waits


def test_with_closes_whatever_happens(path):
    with ResourceQuotaManager(path=path, max_models=4) as manager:
        assert not manager.closed
        manager.set_quota(open_quota("m"))
    assert manager.closed
    again = ResourceQuotaManager(path=path)
    with contextlib.suppress(ZeroDivisionError), again:
        assert again.list_models() == ["m"]
        raise ZeroDivisionError
    assert again.closed
    with pytest.raises(ManagerClosedError), again:
        again.list_models()


def test_open_grants_are_released_and_their_tokens_kept(manager, other):
    untouched = manager.reserve(("m", "n"), 10, 100)
    counted = manager.reserve("m", 10, 200)
    counted.add(25)
    settled = manager.reserve("m", 10, 300)
    settled.settle(4)
    line = manager.acquire("line", 7)
    before = other.get_usage("m")
    assert (before.reserved_ram_mb, before.concurrent_requests) == (600, 3)
    manager.close()
    after = other.get_usage("m")
    assert (after.reserved_ram_mb, after.concurrent_requests) == (0, 0)
    assert after.tokens_this_hour == before.tokens_this_hour >= 10 + 25 + 4
    assert other.get_usage("n").tokens_this_hour == 10
    other.reserve("line", 1).release()
    assert other.check_quota("m", 1, 1000)
    del untouched, counted, settled, line
    gc.collect()  # no ResourceWarning: they have been released


def test_who_waits_is_told_in_threads_and_in_tasks_of_two_loops(manager, other):
    held = other.reserve("line", 1)
    waiting = [
        Waiting(manager),
        Waiting(manager, in_task=True),
        Waiting(manager, ids=("m", "line"), in_task=True),
        Waiting(manager, ids=["line", "n"]),
    ]
    manager.close()
    assert [one.end() for one in waiting] == [ManagerClosedError] * 4
    usage = other.get_usage("line")
    assert (usage.queued_requests, usage.concurrent_requests) == (0, 1)
    held.release()
    other.acquire("line", 1, timeout=0).release()  # nobody has a place before it
    assert other.get_usage("m").concurrent_requests == 0


def test_waiters_of_other_processes_are_served_when_it_closes(manager, path):
    held = manager.acquire("line", 1)
    theirs = Waiting(ResourceQuotaManager(path=path))
    manager.close()
    theirs.join(PATIENCE)
    assert theirs.outcome.tokens == 1
    theirs.outcome.release()
    assert held.released


def test_a_grant_that_a_task_has_not_taken_yet_is_released(manager, other):
    """Admitted in the loop's last moments: it held what nobody was to give back."""

    async def main():
        held = manager.reserve("line", 1)
        task = asyncio.ensure_future(_acquire(manager))
        while manager.get_usage("line").queued_requests == 0:
            await asyncio.sleep(0)
        held.release()  # the task is admitted, and runs at the next turn of the loop
        manager.close()
        with contextlib.suppress(ManagerClosedError):
            assert (await task).released
        return other.get_usage("line")

    usage = asyncio.run(main())
    assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)


async def _acquire(manager):
    return await manager.acquire_async("line", 1)


def test_closing_twice_and_from_several_threads(manager, other):
    held = [manager.reserve("m", 1, 1) for _ in range(500)]
    start = threading.Barrier(4)

    def close():
        start.wait()
        manager.close()

    threads = [threading.Thread(target=close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    manager.close()
    assert other.get_usage("m").concurrent_requests == 0
    assert all(grant.released for grant in held)


@pytest.mark.usefixtures("switch_threads_often")
@pytest.mark.parametrize("place", ["memory", "file"])
def test_threads_that_are_in_a_verb(place, tmp_path):
    """In a batch, with the GIL released, over rows that are unmapped a moment later; and in every other verb."""
    for round in range(6):
        manager = ResourceQuotaManager(max_models=64, **({"path": tmp_path / f"q{round}"} if place == "file" else {}))
        manager.set_quota(open_quota("m"))
        manager.set_quota(open_quota("n"))
        manager.set_quota(one_at_a_time("line"))
        many = manager.codes(["m", "n"]).repeat(100_000)
        began = []
        ended = []

        def use(verb, manager=manager, began=began, ended=ended):
            began.append(1)
            outcome = None
            while outcome in (None, "QuotaExceededError"):
                outcome = _error_of(lambda: (verb(manager), None)[1])
            ended.append(outcome)

        verbs = [
            lambda manager, many=many: manager.check_many(many, 1),
            lambda manager, many=many: manager.charge_many(many, 1),
            lambda manager: [
                MANAGER[name](manager) for name in MANAGER if name not in ("remove_quota", "acquire_async")
            ],
            lambda manager: manager.reserve(("m", "n"), 1).cancel(),
            lambda manager: manager.acquire("line", 1).release(),
        ]
        threads = [threading.Thread(target=use, args=(verb,), daemon=True) for verb in verbs]
        for thread in threads:
            thread.start()
        until(lambda began=began, verbs=verbs: len(began) == len(verbs))
        time.sleep(0.02)
        manager.close()
        for thread in threads:
            thread.join(PATIENCE)
        assert ended == ["ManagerClosedError"] * len(verbs)


def test_close_does_not_wait_for_a_process_that_is_stopped(manager, other):
    grant = manager.reserve(("m", "n"), 1, 5)
    with stopped_inside(other, "m"):
        ended = []
        thread = threading.Thread(target=lambda: ended.append(_error_of(lambda: manager.check_quota("m", 1))))
        thread.start()
        time.sleep(0.05)  # it is waiting for the lock by then; if not, it is told so too
        start = time.monotonic()
        manager.close()
        assert time.monotonic() - start < 5
        thread.join(PATIENCE)
        assert ended == ["ManagerClosedError"]
        assert other.get_usage("n").concurrent_requests == 0
    until(lambda: other.get_usage("m").reserved_ram_mb == 0)  # what it could not give back, whoever looks next does
    assert grant.released


@pytest.mark.filterwarnings("ignore:a grant was garbage-collected:ResourceWarning")
def test_close_ends_every_verb_that_waits_for_a_process_that_is_stopped(manager, other):
    """Each in a thread of its own, which waits for the row; those that need no lock are called again until then."""
    handle = manager.model("m")
    verbs = [(verb, manager) for verb in MANAGER.values()] + [(verb, handle) for verb in HANDLE.values()]
    began, ended = [], []

    def use(verb, thing):
        began.append(1)
        outcome = None
        while outcome != "ManagerClosedError":
            outcome = _error_of(lambda: (verb(thing), None)[1])
        ended.append(outcome)

    with stopped_inside(other, "m"):
        threads = [threading.Thread(target=use, args=each, daemon=True) for each in verbs]
        for thread in threads:
            thread.start()
        until(lambda: len(began) == len(verbs))
        time.sleep(0.05)  # they wait by then; if not, they are told so too
        manager.close()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    assert len(ended) == len(verbs)


def _error_of(work):
    try:
        return work()
    except Exception as error:
        return type(error).__name__


# -- processes


def test_closing_in_a_forked_child_does_not_affect_the_parent(manager, other):
    grant = manager.reserve("m", 10, 100)
    held = other.reserve("line", 1)
    waiting = [Waiting(manager), Waiting(manager, in_task=True)]

    def close():
        own = manager.reserve("m", 1, 50)
        manager.close()
        return own.released, set(every_verb.outcomes(MANAGER, manager).values())

    assert outcome_in_child(close) == repr((True, CLOSED))
    usage = manager.get_usage("m")
    assert (usage.reserved_ram_mb, usage.concurrent_requests, usage.tokens_this_hour) == (100, 1, 11)
    assert manager.get_usage("line").queued_requests == 2
    held.release()
    while waiting:  # one after the other, whichever came first
        until(lambda: not all(one.is_alive() for one in waiting))
        for one in [one for one in waiting if not one.is_alive()]:
            one.outcome.release()
            waiting.remove(one)
    grant.release()


def test_closing_in_the_parent_does_not_affect_a_child(manager):
    ready, go = os.pipe()

    def work():
        grant = manager.reserve("m", 1, 500)
        os.read(ready, 1)
        seen = manager.get_usage("m").reserved_ram_mb
        grant.release()
        return seen, bool(manager.check_quota("m", 1))

    said = []
    thread = threading.Thread(target=lambda: said.append(outcome_in_child(work)))
    thread.start()
    until(lambda: manager.get_usage("m").reserved_ram_mb == 500)
    manager.close()
    os.write(go, b"1")
    thread.join(PATIENCE)
    assert said == ["(500, True)"]


def test_the_seat_is_given_back(manager, path):
    """So often that all seats would be taken, were it not."""
    for _ in range(1_500):
        with ResourceQuotaManager(path=path) as one:
            one.reserve("m", 1, 1)
    assert manager.get_usage("m").reserved_ram_mb == 0


def test_a_killed_process_that_had_closed_leaves_nothing(manager, path):
    def work():
        one = ResourceQuotaManager(path=path)
        kept = one.reserve("m", 1, 500)
        one.close()
        return kept

    with forked(work):
        assert manager.get_usage("m").reserved_ram_mb == 0
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 1, 1001)


# -- descriptors and memory


def descriptors(path):
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [name for name in found if str(path) in name]


def mappings(name):
    with open("/proc/self/maps") as maps:
        return [line for line in maps if name in line]


def test_descriptors_and_mapping_are_gone(manager, path):
    gc.collect()
    view = manager.open_readonly(path)
    kept = manager.reserve("m", 1), manager.model("m"), manager.codes(["m"])
    assert len(descriptors(path)) >= 3
    assert mappings(str(path))
    manager.close()
    view.close()
    assert descriptors(path) == []
    assert mappings(str(path)) == []
    del kept


def test_descriptors_and_mapping_of_a_state_in_memory_are_gone():
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    mapped = len(mappings("memfd:modelquota"))
    with ResourceQuotaManager(max_models=64) as manager:
        manager.set_quota(open_quota("m"))
        kept = manager.reserve("m", 1)
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(mappings("memfd:modelquota")) == mapped
    del kept


def test_a_descriptor_that_is_somebody_elses_by_now_stays_open(manager, path):
    """Closed underneath, and its number given to another file: closing the manager must not close that."""
    numbers = [
        int(name)
        for name in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{name}") and os.path.realpath(f"/proc/self/fd/{name}") == str(path)
    ]
    assert len(numbers) == 2
    with open(__file__, "rb") as mine:
        for number in numbers:
            os.dup2(mine.fileno(), number)
        manager.close()
        for number in numbers:
            assert os.fstat(number).st_ino == os.fstat(mine.fileno()).st_ino
            os.close(number)
