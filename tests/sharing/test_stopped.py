"""A process that is stopped inside a row's lock (SIGSTOP, a debugger, a paused container): others can still give up.

It is alive, so nobody may take its lock over; those that want that row wait for as long as they said, and no longer.
"""

import asyncio
import contextlib
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from factories import one_at_a_time, open_quota, queue_quota
from neighbors import forked, row_of, seat_words, stopped_inside
from patience import PATIENCE, until

from modelquota import (
    GrantClosedError,
    ModelLockedError,
    QuotaExceededError,
    ResourceQuotaConfig,
    ResourceQuotaManager,
)
from modelquota.waiting.thread import ThreadWaiter

SUPPORT = Path(__file__).parents[1] / "support"

SOON = 5.0
"""Seconds in which nothing may hang that is to give up at once; generous, as the machine is busy."""


@pytest.fixture(params=["memory", "file"])
def manager(request, tmp_path):
    place = {} if request.param == "memory" else {"path": tmp_path / "quota.state"}
    manager = ResourceQuotaManager(max_models=64, **place)
    manager.set_quota(open_quota("free"))  # its row comes before that of "m": in joint requests it is locked first
    manager.set_quota(queue_quota("m", max_ram_mb=1000))
    manager.set_quota(one_at_a_time("line"))
    return manager


@pytest.fixture
def stopped(manager):
    """For as long as the test lasts, unless it is let go before."""
    with stopped_inside(manager, "m") as pid:
        yield pid


@contextlib.contextmanager
def takes(least, most=SOON):
    """So many seconds: at least as long as was asked for, and not for ever."""
    start = time.monotonic()
    yield
    elapsed = time.monotonic() - start
    assert least - 0.001 <= elapsed < least + most


# -- a time that is over


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("seconds", [0, 0.05, 0.3])
@pytest.mark.parametrize("ids", ["m", ("m",), ("free", "m"), ("m", "line", "free")], ids=str)
def test_acquire_gives_up_after_its_timeout(manager, ids, seconds):
    with takes(seconds), pytest.raises(ModelLockedError) as raised:
        manager.acquire(ids, 1, timeout=seconds)
    assert not raised.value.result
    assert "stopped" in str(raised.value)
    assert isinstance(raised.value, QuotaExceededError)
    assert manager.get_usage("free").concurrent_requests == 0
    assert not manager._arrays()[1]["lock"][row_of(manager, "free")]


@pytest.mark.usefixtures("stopped")
@pytest.mark.parametrize("seconds", [0, 0.05, 0.3])
def test_acquire_async_gives_up_after_its_timeout(manager, seconds):
    async def main():
        with takes(seconds), pytest.raises(ModelLockedError):
            await manager.acquire_async(("free", "m"), 1, timeout=seconds)

    asyncio.run(main())


def test_the_grace_period_ends_a_wait_without_a_timeout(manager):
    manager.update_quota("m", grace_period_sec=0.2)
    with stopped_inside(manager, "m"), takes(0.2), pytest.raises(ModelLockedError):
        manager.acquire("m", 1)


@pytest.mark.parametrize("in_task", [False, True])
def test_who_was_denied_before_and_then_locked_out_is_told_the_denial(manager, in_task):
    """It waits in line when the process is stopped: it can leave the line by itself, with the answer that it had."""
    held = manager.reserve("line", 1)
    ended = []

    async def acquire():
        await manager.acquire_async("line", 1, timeout=0.5)

    def wait():
        try:
            asyncio.run(acquire()) if in_task else manager.acquire("line", 1, timeout=0.5)
        except QuotaExceededError as error:
            ended.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    until(lambda: manager.get_usage("line").queued_requests == 1)
    with stopped_inside(manager, "line"):
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert type(ended[0]) is QuotaExceededError
        assert ended[0].result.limit.name == "CONCURRENCY"
    held.release()
    assert manager.get_usage("line").queued_requests == 0
    manager.reserve("line", 1).release()


def test_who_was_denied_and_then_cannot_get_into_the_line_is_told_the_denial(manager, monkeypatch):
    """The row is locked from the moment between the denial and the place in the queue on."""
    held = manager.reserve("line", 1)
    prepare = ThreadWaiter.prepare
    with contextlib.ExitStack() as stack:

        def prepare_and_stop(waiter):
            prepare(waiter)
            stack.enter_context(stopped_inside(manager, "line"))

        monkeypatch.setattr(ThreadWaiter, "prepare", prepare_and_stop)
        with takes(0.3), pytest.raises(QuotaExceededError) as raised:
            manager.acquire("line", 1, timeout=0.3)
    assert type(raised.value) is QuotaExceededError
    assert raised.value.result.limit.name == "CONCURRENCY"
    assert manager.get_usage("line").queued_requests == 0
    held.release()


# -- Ctrl-C

WAITING = {
    "check_quota": lambda m: m.check_quota("m", 1),
    "check_quota of several": lambda m: m.check_quota(("free", "m"), 1),
    "check of a handle": lambda m: m.handle.check(1),
    "peek_quota": lambda m: m.peek_quota("m", 1),
    "reserve": lambda m: m.reserve("m", 1),
    "reserve of several": lambda m: m.reserve(("m", "free"), 1),
    "acquire": lambda m: m.acquire("m", 1),
    "check_many": lambda m: m.check_many(m.many, 1),
    "charge_many": lambda m: m.charge_many(m.many, 1),
    "set_quota": lambda m: m.set_quota("m", max_ram_mb=5),
    "update_quota": lambda m: m.update_quota("m", max_ram_mb=5),
    "remove_quota": lambda m: m.remove_quota("m"),
    "update_memory_usage": lambda m: m.update_memory_usage("m", 1, 1),
    "reset_burst": lambda m: m.reset_burst("m"),
    "model": lambda m: m.model("m"),
}


@pytest.mark.parametrize("verb", WAITING)
def test_an_interrupt_ends_a_verb_that_waits(manager, verb):
    """By the signal itself, while the thread waits without the GIL; and nothing was done to the model."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    manager.many = np.concatenate([manager.codes(["free", "m"])] * 3)
    manager.handle = manager.model("m")
    before = manager.get_usage("m")
    try:
        with stopped_inside(manager, "m"):
            interrupt = threading.Timer(0.15, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
            interrupt.start()
            with takes(0.1), pytest.raises(KeyboardInterrupt):
                WAITING[verb](manager)
            interrupt.join()
    finally:
        signal.signal(signal.SIGINT, previous)
    assert manager.get_usage("m") == before
    assert manager.get_quota("m").max_ram_mb == 1000
    assert not manager._arrays()[1]["lock"].any()
    WAITING["check_quota"](manager)


@pytest.mark.parametrize("verb", ["check_quota", "reserve of several", "acquire", "check_many", "set_quota"])
def test_a_signal_handler_runs_while_a_verb_waits_and_the_verb_goes_on(manager, verb):
    """The handler itself lets the stopped process go on; nothing else does in time."""
    manager.many = manager.codes(["free", "m"])
    handled = []
    with contextlib.ExitStack() as stack:

        def handle(*_):
            handled.append(True)
            stack.close()

        stack.enter_context(stopped_inside(manager, "m"))
        previous = signal.signal(signal.SIGUSR1, handle)
        timers = [
            threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1)),
            threading.Timer(PATIENCE, stack.close),  # so that a failure is no hang
        ]
        try:
            for timer in timers:
                timer.start()
            outcome = WAITING[verb](manager)
        finally:
            for timer in timers:
                timer.cancel()
                timer.join()
            signal.signal(signal.SIGUSR1, previous)
    assert handled, "it waited on"
    if hasattr(outcome, "release"):
        outcome.release()
    assert not manager._arrays()[1]["lock"].any()


# -- event loops


@pytest.mark.parametrize("ids", ["m", ("m", "free")], ids=str)
@pytest.mark.usefixtures("stopped")
def test_a_cancelled_acquire_async_returns_at_once_and_the_loop_does_not_spin(manager, ids):
    """The loop goes on with other work, at its usual rate, and uses next to no processor."""

    async def main():
        tasks = [asyncio.ensure_future(_acquire(manager, ids)) for _ in range(20)]
        loop = asyncio.get_running_loop()
        turns = _count_turns(loop)
        cpu, start = time.process_time(), time.monotonic()
        lags = []
        while time.monotonic() - start < 1.0:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            lags.append(time.monotonic() - before)
        cpu = time.process_time() - cpu
        assert not any(task.done() for task in tasks)
        with takes(0):
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
        return len(turns), cpu, sorted(lags)[len(lags) // 2]

    turns, cpu, lag = asyncio.run(main())
    assert turns < 20 * 200 + 500, "the loop spins"  # 20 tasks that look at most each 10 ms, and this test's own
    assert cpu < 0.8
    assert lag < 0.1


def test_a_task_in_line_that_is_cancelled_while_its_row_is_locked(manager):
    """It leaves at once, blocks nobody afterwards, and the loop is not kept busy by what it left."""

    async def main():
        held = manager.reserve("line", 1)
        tasks = [asyncio.ensure_future(_acquire(manager, "line")) for _ in range(3)]
        while manager.get_usage("line").queued_requests < 3:
            await asyncio.sleep(0.001)
        with stopped_inside(manager, "line"):
            with takes(0):
                for task in tasks[:2]:
                    task.cancel()
                await asyncio.gather(*tasks[:2], return_exceptions=True)
            turns = _count_turns(asyncio.get_running_loop())
            await asyncio.sleep(0.5)
            assert len(turns) < 300, "the loop spins"
            held.release()  # is put off
        (await tasks[2]).release()
        return manager.get_usage("line")

    usage = asyncio.run(main())
    assert (usage.queued_requests, usage.concurrent_requests) == (0, 0)


async def _acquire(manager, ids):
    return await manager.acquire_async(ids, 1)


def _count_turns(loop):
    """One more element for each turn that the loop takes."""
    turns = []
    run_once = loop._run_once

    def counted():
        turns.append(None)
        run_once()

    loop._run_once = counted
    return turns


# -- what goes on


@pytest.mark.usefixtures("stopped")
def test_other_models_go_on(manager):
    for _ in range(200):
        assert manager.check_quota("free", 1)
        manager.reserve(("line", "free"), 1).release()
        manager.acquire("line", 1).release()
    manager.check_many(manager.codes(["free"]).repeat(1000), 1)
    manager.set_quota(open_quota("another"))
    manager.update_quota("free", max_ram_mb=7)
    assert manager.remove_quota("another")
    assert manager.get_usage("free").requests_this_hour == 1400


def test_other_models_go_on_after_an_end_was_put_off(manager):
    grant = manager.reserve("m", 1)
    with stopped_inside(manager, "m"):
        grant.release()
        for _ in range(3):
            manager.reserve("line", 1).release()
            assert manager.get_usage("line").concurrent_requests == 0


@pytest.mark.parametrize("look", ["check_quota", "reserve", "get_usage"])
def test_an_end_that_was_put_off_is_done_by_a_process_that_releases_nothing_more(manager, look):
    manager.update_quota("m", max_concurrent_requests=1, on_violation="reject")
    grant = manager.reserve("m", 1)
    with stopped_inside(manager, "m"):
        grant.release()

    def looked():
        with contextlib.suppress(QuotaExceededError):
            found = getattr(manager, look)("m", *([] if look == "get_usage" else [1]))
            if look == "reserve":
                found.release()
            return found

    until(lambda: looked() and manager._arrays()[2]["concurrent"][row_of(manager, "m")] == 0)


@pytest.mark.usefixtures("stopped")
def test_a_joint_request_that_waits_for_the_locked_model_stops_no_other(manager):
    """Whether it belongs to this process or another one: no lock is kept while another one is waited for."""

    def ask():
        thread = threading.Thread(target=manager.check_quota, args=(("free", "m", "line"), 1), daemon=True)
        thread.start()
        time.sleep(0.1)  # gone in by then; if not, this shows less and fails never
        return thread

    with forked(ask):
        mine = ask()
        worst = 0.0
        for _ in range(300):
            start = time.perf_counter()
            assert manager.check_quota(("free", "line"), 1)
            worst = max(worst, time.perf_counter() - start)
        assert worst < 1
        assert mine.is_alive()


def test_reads_answer(manager):
    manager.check_quota("m", 5)
    grant = manager.reserve("m", 7, 100)
    quota, report = manager.get_quota("m"), manager.get_model_report("m")
    usage, stats = manager.get_usage("m"), manager.get_stats()
    with stopped_inside(manager, "m", "free"), takes(0, 10):
        assert manager.get_quota("m") == quota
        seen = manager.get_usage("m")
        assert (seen.requests_this_hour, seen.tokens_this_hour) == (2, 12)
        assert (seen.reserved_ram_mb, seen.concurrent_requests) == (100, 1)
        assert manager.get_model_report("m").quota == report.quota
        assert manager.get_stats().total_checks == stats.total_checks
        assert manager.list_models() == ["free", "m", "line"]
        rows = {str(row["model_id"]): row for row in manager.snapshot()}
        assert int(rows["m"]["tokens_this_hour"]) == 12
        text = io.StringIO()
        manager.print_status(text)
        assert all(name in text.getvalue() for name in ("m", "free", "line"))
        if manager.path is not None:
            with manager.open_readonly(manager.path) as view:
                assert view.get_usage("m").tokens_this_hour == 12
    grant.release()
    assert usage == seen


@pytest.mark.parametrize("how", ["release", "cancel", "settle", "with", "forgotten"])
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_end_of_a_grant_is_put_off_and_done_later(manager, how):
    """By whatever this process does next; the grant itself says at once that it is over."""
    one, other = manager.reserve("m", 10, 100), manager.reserve(("free", "m"), 10, 100)
    with stopped_inside(manager, "m"), takes(0):
        for grant in (one, other):
            if how == "settle":
                grant.settle(4)
                grant.settle(4)
                with pytest.raises(GrantClosedError):
                    grant.settle(5)
                grant.release()
            elif how == "with":
                with grant:
                    grant.add(4)
            elif how != "forgotten":
                getattr(grant, how)()
            assert how == "forgotten" or grant.released
        del one, other, grant
        assert manager.get_usage("free").concurrent_requests == 0
        assert manager.get_usage("m").concurrent_requests == 2
    manager.reserve("free", 0).release()
    usage = manager.get_usage("m")
    tokens = {"release": 20, "cancel": 0, "settle": 8, "with": 8, "forgotten": 20}[how]
    assert (usage.concurrent_requests, usage.reserved_ram_mb, usage.tokens_this_hour) == (0, 0, tokens)
    assert usage.requests_this_hour == (0 if how == "cancel" else 2)
    manager.reserve("m", 1, 1000).release()


def test_tokens_that_are_added_are_charged_later(manager):
    with manager.reserve("m", 10) as grant, stopped_inside(manager, "m"), takes(0):
        for _ in range(20):
            assert grant.add(5)
    assert manager.get_usage("m").tokens_this_hour == 100


def test_many_grants_whose_ends_are_put_off_cost_no_time_each(manager):
    """The first has waited for the row: those that follow know."""
    grants = [manager.reserve("m", 1) for _ in range(2000)]
    with stopped_inside(manager, "m"), takes(0, 10):
        for grant in grants:
            grant.release()
    manager.check_quota("free", 0)
    manager.reserve("free", 0).release()
    assert manager.get_usage("m").concurrent_requests == 0


def test_a_handle_that_ends_while_its_row_is_locked(manager):
    """It is counted, so that its model is not forgotten; an event loop must not be held up by its end."""
    handles = [manager.model("m") for _ in range(50)]
    with stopped_inside(manager, "m"):
        ended = threading.Thread(target=handles.clear, daemon=True)
        ended.start()
        ended.join(SOON)
        stuck = ended.is_alive()
    ended.join(PATIENCE)
    assert not stuck


def test_who_waits_is_served_once_it_goes_on(manager):
    """Threads, tasks and checks that came meanwhile."""
    held = manager.reserve("line", 1)
    served = []

    def wait(number):
        with manager.acquire("line", 1):
            served.append(number)

    async def wait_in_task(number):
        async with manager.acquire_async("line", 1):
            served.append(number)

    threads = [threading.Thread(target=wait, args=(0,), daemon=True)]
    threads[0].start()
    until(lambda: manager.get_usage("line").queued_requests == 1)
    with stopped_inside(manager, "line"):
        threads.append(threading.Thread(target=lambda: asyncio.run(wait_in_task(1)), daemon=True))
        threads.append(threading.Thread(target=wait, args=(2,), daemon=True))
        for thread in threads[1:]:
            thread.start()
        held.release()
        time.sleep(0.2)
        assert served == []
    for thread in threads:
        thread.join(PATIENCE)
    assert served[0] == 0
    assert sorted(served) == [0, 1, 2]
    usage = manager.get_usage("line")
    assert (usage.queued_requests, usage.concurrent_requests) == (0, 0)


def test_a_stopped_process_that_is_killed_is_taken_over(manager):
    before = seat_words(manager)
    _, rows, _ = manager._arrays()
    with forked(lambda: None) as pid:
        os.kill(pid, signal.SIGSTOP)
        rows["lock"][row_of(manager, "m")] = max(seat_words(manager) - before)
        with pytest.raises(ModelLockedError):
            manager.acquire("m", 1, timeout=0.05)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        manager.acquire("m", 1).release()


def test_models_that_come_and_go_beside_a_locked_one(manager):
    """The registry's lock is not held while a row is waited for, so a removal that is held up stops nobody else."""
    with stopped_inside(manager, "m"):
        thread = threading.Thread(target=manager.remove_quota, args=("m",), daemon=True)
        other = threading.Thread(target=manager.set_quota, args=(ResourceQuotaConfig("m"),), daemon=True)
        thread.start()
        other.start()
        with takes(0, 20):
            for number in range(20):
                manager.set_quota(open_quota(f"new/{number}"))
                assert manager.check_quota(f"new/{number}", 1)
                assert manager.remove_quota(f"new/{number}")
        assert manager.get_stats().total_checks >= 20
        assert thread.is_alive()
    thread.join(PATIENCE)
    other.join(PATIENCE)
    assert not thread.is_alive()
    assert not other.is_alive()


def test_grants_that_are_forgotten_while_their_row_is_locked_are_not_used_after_they_were_freed():
    """Their ends are put off beyond their lives. In a process of its own: a fault ends it."""
    program = """
        import gc, warnings
        from modelquota import ResourceQuotaManager
        from factories import open_quota
        from neighbors import stopped_inside
        warnings.simplefilter("ignore")
        manager = ResourceQuotaManager(max_models=8)
        manager.set_quota(open_quota("m"))
        manager.set_quota(open_quota("free"))
        grants = [manager.reserve(("m", "free"), 5, 1) for _ in range(300)]
        with stopped_inside(manager, "m"):
            grants.clear()
            gc.collect()
            junk = [bytearray(b"\\xff" * size) for size in range(64, 400) for _ in range(40)]
        manager.reserve("free", 1).release()
        print(manager.get_usage("m").concurrent_requests, manager.get_usage("free").concurrent_requests)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=SUPPORT)
    assert ended.stdout == "0 0\n", ended.stderr[-1000:]


def test_a_model_that_leaves_meanwhile_does_not_end_the_wait_for_another_ones_row(tmp_path):
    """Its cold row is cleared; that is not a grace period of 0. It leaves while the core looks at signals."""
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64)
    for name in ("c", "a"):
        manager.set_quota(open_quota(name))
    other = ResourceQuotaManager(path=manager.path)
    previous = signal.signal(signal.SIGUSR1, lambda *_: other.remove_quota("a"))
    manager.acquire(("a", "c"), 1).release()
    try:
        with stopped_inside(manager, "c"):
            timer = threading.Timer(0.1, signal.pthread_kill, (threading.main_thread().ident, signal.SIGUSR1))
            timer.start()
            with takes(0.6), pytest.raises(ModelLockedError):
                manager.acquire(("a", "c"), 1, timeout=0.6)
            timer.join()
    finally:
        signal.signal(signal.SIGUSR1, previous)
