"""A forked child that cannot take a seat of its own: it refuses every verb, and its end and its life harm nobody."""

import asyncio
import contextlib
import fcntl
import functools
import gc
import os
import resource
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time

import every_verb
import pytest
from factories import one_at_a_time, open_quota
from neighbors import SEATS, child_of, forked, outcome_in_child, stopped_inside
from patience import PATIENCE, until

from modelquota import ManagerClosedError, QuotaError, QuotaExceededError, ResourceQuotaManager, StateFileError
from modelquota.waiting.task import Acquisition  # noqa: F401  a child may have no descriptors to import it with
from modelquota.waiting.thread import ThreadWaiter

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
def manager(tmp_path):
    """A state in which the process that calls has a grant."""
    tmp_path.chmod(0o777)
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64)
    manager.set_quota(open_quota("m", max_ram_mb=1000))
    manager.set_quota(open_quota("n"))
    manager.check_quota("m", 0)
    manager.get_usage("m")
    return manager


# -- ways to keep a child from taking a seat; each is done in a process of its own, just before that forks


def leave_no_descriptor(manager):
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def take_all_seats(manager):
    """As many processes do, or one that opens the file that often: by the locks of all bytes that are free."""
    holder = os.open(manager.path, os.O_RDWR)
    for seat in range(1, SEATS):
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, seat, 1, 0)
        with contextlib.suppress(BlockingIOError):
            fcntl.fcntl(holder, fcntl.F_OFD_SETLK, lock)


def drop_privileges(manager):
    os.setgid(65534)
    os.setuid(65534)


def lose_proc_and_path(manager):
    """As after a chroot: what is open works, and nothing can be opened again."""
    empty = os.path.dirname(manager.path) + "/empty"
    os.mkdir(empty)
    os.chroot(empty)
    os.chdir("/")


HOW = [
    leave_no_descriptor,
    take_all_seats,
    pytest.param(drop_privileges, marks=ROOT),
    pytest.param(lose_proc_and_path, marks=ROOT),
]
every_way = pytest.mark.parametrize("prevent", HOW, ids=lambda how: how.__name__)


def told_by_child(work):
    """What `work` returns in a child, as text; it needs no descriptor that is not there already."""
    ready, done = told_by_child.pipe
    pid = child_of(lambda: os.write(done, repr(work()).encode().ljust(8192)))
    assert os.waitpid(pid, 0)[1] == 0
    return os.read(ready, 8192).decode().strip()


@pytest.fixture(autouse=True)
def pipe():
    """Made before descriptors run out."""
    told_by_child.pipe = os.pipe()
    asyncio.AbstractEventLoop()
    with contextlib.suppress(RuntimeError):
        ResourceQuotaManager().acquire_async("m", 1).send(None)  # imports what it needs
    yield
    for end in told_by_child.pipe:
        os.close(end)


def test_the_table_of_verbs_is_complete(manager):
    assert every_verb.missing(manager, every_verb.MANAGER, every_verb.NO_VERBS_OF_A_MANAGER) == set()
    assert every_verb.missing(manager.model("m"), every_verb.HANDLE, every_verb.NO_VERBS_OF_A_HANDLE) == set()
    answers = every_verb.outcomes(every_verb.MANAGER, manager)
    assert not any(answer.endswith("Error") for answer in answers.values()), answers


@every_way
def test_it_refuses_every_verb(manager, prevent):
    def scene():
        handle = manager.model("m")
        prevent(manager)
        of_manager = told_by_child(lambda: set(every_verb.outcomes(every_verb.MANAGER, manager).values()))
        of_handle = told_by_child(lambda: set(every_verb.outcomes(every_verb.HANDLE, handle).values()))
        return of_manager, of_handle, manager.check_quota("m", 1).allowed

    refused = "{'StateFileError'}"
    assert outcome_in_child(scene) == repr((refused, refused, True))
    assert manager.get_usage("m").requests_this_hour == 2


@every_way
def test_what_it_inherited_it_can_neither_use_nor_give_back(manager, prevent):
    """A grant's copy does nothing in any child; garbage collection, closing and the end of the child included."""

    def scene():
        grant = manager.reserve("m", 10, 100)
        kept = [grant, manager.model("m")]

        def use():
            with contextlib.suppress(QuotaError):
                grant.add(1000)
            grant.settle(5)
            grant.release()
            kept.clear()
            manager.close()
            manager.close()

        prevent(manager)
        told_by_child(use)
        usage = manager.get_usage("m")
        grant.settle(3)
        return usage.reserved_ram_mb, usage.concurrent_requests, usage.tokens_this_hour

    assert outcome_in_child(scene) == "(100, 1, 10)"
    usage = manager.get_usage("m")
    assert (usage.reserved_ram_mb, usage.concurrent_requests, usage.tokens_this_hour) == (0, 0, 3)


@every_way
def test_killed_it_leaves_nothing_locked_or_held(manager, prevent):
    def ask_for_ever():
        while True:
            for verb in every_verb.MANAGER.values():
                with contextlib.suppress(StateFileError):
                    verb(manager)

    def scene():
        grant = manager.reserve("m", 1, 100)
        prevent(manager)
        for _ in range(15):
            pid = child_of(ask_for_ever)
            time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            assert manager.check_quota("m", 1)
            assert manager.get_usage("m").reserved_ram_mb == 100
        grant.release()
        locks = manager._arrays()[1]["lock"].any()
        return bool(locks), manager.get_usage("m").reserved_ram_mb

    assert outcome_in_child(scene) == "(False, 0)"
    assert manager.check_quota("m", 1)


@every_way
def test_its_parent_is_alive_as_long_as_it_lives_itself_and_no_longer(manager, prevent):
    """The child keeps nothing by which the kernel would take the parent for alive, nor does its end take that away."""
    ready, done = os.pipe()

    def become_a_parent():
        kept = manager.reserve("m", 1, 700)
        prevent(manager)
        first = child_of(lambda: None)
        os.waitpid(first, 0)
        child = child_of(lambda: os.write(done, b"%d\n" % os.getpid()) and time.sleep(600))
        return kept, child

    with forked(become_a_parent) as parent:
        child = int(os.read(ready, 20))
        try:
            time.sleep(0.03)  # a look for the dead is due
            assert not manager.check_quota("m", 1, 500)
            assert manager.get_usage("m").reserved_ram_mb == 700
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            os.kill(child, 0)
            until(lambda: manager.check_quota("m", 1, 500))
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(ready)
            os.close(done)


@every_way
def test_its_own_children_refuse_too_even_if_there_is_room_by_then(manager, prevent):
    def refused_below(depth):
        with contextlib.suppress(OSError, ValueError):
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
        refused = set(every_verb.outcomes(every_verb.MANAGER, manager).values()) == {"StateFileError"}
        below = eval(told_by_child(lambda: refused_below(depth - 1))) if depth else []
        return [refused, *below]

    def scene():
        prevent(manager)
        return told_by_child(lambda: refused_below(2))

    assert outcome_in_child(scene) == repr("[True, True, True]")


def test_it_may_make_a_manager_once_there_is_room_again(manager):
    def make():
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
        with ResourceQuotaManager(path=manager.path) as own:
            grant = own.reserve("m", 4, 300)
            seen = own.get_usage("m").reserved_ram_mb
            grant.release()
        return seen, every_verb.outcomes(every_verb.MANAGER, manager)["check_quota"]

    def scene():
        leave_no_descriptor(manager)
        return told_by_child(make)

    assert outcome_in_child(scene) == repr(repr((300, "StateFileError")))


def test_the_error_says_what_happened_and_what_to_do(manager):
    def scene():
        take_all_seats(manager)
        return told_by_child(lambda: _error_of(lambda: manager.check_quota("m", 1)))

    said = outcome_in_child(scene)
    assert "1,023" in said or "1023" in said
    assert "forked" in said
    assert "make a manager in the child" in said


def _error_of(work):
    try:
        work()
    except StateFileError as error:
        return str(error)


def test_in_memory_too():
    """There is no path to open again, and the only way is through /proc."""
    manager = ResourceQuotaManager(max_models=64)
    manager.set_quota(open_quota("m", max_ram_mb=1000))
    manager.set_quota(open_quota("n"))

    def scene():
        grant = manager.reserve("m", 1, 100)
        leave_no_descriptor(manager)
        refused = told_by_child(lambda: set(every_verb.outcomes(every_verb.MANAGER, manager).values()))
        usage = manager.get_usage("m").reserved_ram_mb
        grant.release()
        return refused, usage

    assert outcome_in_child(scene) == repr(("{'StateFileError'}", 100))
    assert manager.get_usage("m").reserved_ram_mb == 0


# -- children that do take a seat


def test_children_of_children_each_have_a_seat(manager):
    def descend(depth):
        grant = manager.reserve("m", 1, 10)
        below = eval(outcome_in_child(lambda: descend(depth - 1))) if depth else []
        held = manager.get_usage("m").reserved_ram_mb
        grant.release()
        return [held, *below]

    assert outcome_in_child(lambda: descend(4)) == "[10, 20, 30, 40, 50]"
    assert manager.get_usage("m").reserved_ram_mb == 0


def test_forks_in_a_thread_while_others_are_in_verbs(manager):
    """Whatever they are doing at that moment, the child has nothing of it, and the parent loses nothing."""
    asked = {"checks": 0, "grants": 0, "batches": 0}
    over = threading.Event()
    codes = manager.codes(["m", "n"])
    line = functools.partial(manager.acquire, "one at a time", 1)
    manager.set_quota(one_at_a_time("one at a time"))

    def checks():
        while not over.is_set():
            asked["checks"] += bool(manager.check_quota(("m", "n"), 1))

    def grants():
        while not over.is_set():
            with manager.reserve("m", 1, 1) as grant:
                grant.settle(3)
            line().release()
            asked["grants"] += 1

    def batches():
        many = codes.repeat(2000)
        while not over.is_set():
            asked["batches"] += int((manager.check_many(many, 1) == 0).sum())

    threads = [threading.Thread(target=work, daemon=True) for work in (checks, grants, line_up(line, over), batches)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(25):
            said = outcome_in_child(lambda: [bool(manager.check_quota("m", 1)), line().release(), manager.close()])
            assert said == "[True, None, None]"
    finally:
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    of_m, of_n = manager.get_usage("m"), manager.get_usage("n")
    assert of_m.requests_this_hour == asked["checks"] + asked["grants"] + asked["batches"] // 2 + 25 + 1
    assert of_n.requests_this_hour == asked["checks"] + asked["batches"] // 2
    assert of_m.tokens_this_hour == of_m.requests_this_hour - 1 + 2 * asked["grants"]
    assert (of_m.concurrent_requests, of_m.reserved_ram_mb) == (0, 0)


def line_up(line, over):
    def body():
        while not over.is_set():
            line().release()

    return body


def test_a_manager_closed_before_the_fork_is_closed_in_the_child(manager, capfd):
    manager.close()
    said = outcome_in_child(lambda: set(every_verb.outcomes(every_verb.MANAGER, manager).values()))
    assert said == "{'ManagerClosedError'}"
    with pytest.raises(ManagerClosedError):
        manager.check_quota("m", 1)
    assert capfd.readouterr().err == ""


def test_a_child_leaves_to_its_parent_what_that_has_put_off(manager):
    """Ends of grants and of waits whose rows were locked: both would give them back."""
    manager.set_quota(one_at_a_time("one at a time"))
    held = [manager.reserve(("m", "one at a time"), 10, 5), manager.reserve("m", 10, 5)]

    async def wait_and_give_up():
        task = asyncio.ensure_future(_acquire(manager, "one at a time"))
        while manager.get_usage("one at a time").queued_requests == 0:
            await asyncio.sleep(0.001)
        with stopped_inside(manager, "m", "one at a time"):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            held.pop(0).release()
            return fork_and_work()

    def fork_and_work():
        ready, go = os.pipe()
        return child_of(lambda: os.read(ready, 1) and _work(manager)), go

    pid, go = asyncio.run(wait_and_give_up())
    os.write(go, b"1")
    os.waitpid(pid, 0)
    _work(manager)
    usage, line = manager.get_usage("m"), manager.get_usage("one at a time")
    assert (usage.concurrent_requests, usage.reserved_ram_mb) == (1, 5)
    assert (line.concurrent_requests, line.queued_requests) == (0, 0)
    held.pop().release()
    assert manager.get_usage("m").concurrent_requests == 0


async def _acquire(manager, model_id):
    return await manager.acquire_async(model_id, 1)


def _work(manager):
    for _ in range(3):
        manager.reserve("n", 1).release()
        with contextlib.suppress(QuotaExceededError):  # the child may find that its parent still has the one grant
            manager.acquire("one at a time", 1, timeout=0.05).release()
    manager.get_stats()


def test_a_child_may_run_while_the_modules_of_its_parent_are_gone(tmp_path):
    """At the fork nothing is imported: where no file can be opened, an import would fail."""
    program = """
        import os, resource, sys
        from modelquota import ResourceQuotaManager, StateFileError
        manager = ResourceQuotaManager(path=sys.argv[1], max_models=4)
        manager.set_quota("m")
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
        pid = os.fork()
        try:
            manager.check_quota("m", 1)
        except StateFileError:
            os._exit(7)
        print(os.waitpid(pid, 0)[1] >> 8)
    """
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), str(tmp_path / "q")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr) == ("7\n", "")


def test_a_fork_after_a_manager_has_gone_whose_queue_is_garbage_by_now(tmp_path):
    """The queue is the last one that holds itself: the child forgets it, and with it what it is just using."""
    gc.collect()
    gc.disable()
    try:
        manager = ResourceQuotaManager(path=tmp_path / "one.state", max_models=4)
        manager.set_quota(one_at_a_time("m"))
        grant = manager.reserve("m", 1)
        waiter = ThreadWaiter()
        assert manager._admit_or_queue(waiter, "m", 1, 0, 0, None, 0, nowait=False) is waiter
        del manager, waiter
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        grant.release()
    finally:
        gc.enable()
