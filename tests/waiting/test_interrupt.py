"""A KeyboardInterrupt in the middle of a wait leaves no trace, wherever it strikes."""

import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from factories import one_at_a_time

QUOTAS = [one_at_a_time("m")]
MAIN = threading.main_thread()


def interrupt_main():
    signal.pthread_kill(MAIN.ident, signal.SIGINT)


@pytest.fixture(autouse=True)
def heed_interrupts():
    """Undo what a background job of a shell inherits: that SIGINT is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_wait_leaves_no_trace(manager):
    held = manager.reserve("m", 1)
    behind = []

    def wait_behind():
        with manager.acquire("m", 2):
            behind.append(True)

    def strike():
        while manager.get_usage("m").queued_requests < 1:
            time.sleep(0.001)
        thread.start()
        while manager.get_usage("m").queued_requests < 2:
            time.sleep(0.001)
        interrupt_main()

    thread = threading.Thread(target=wait_behind)
    threading.Thread(target=strike).start()
    with pytest.raises(KeyboardInterrupt):
        manager.acquire("m", 7)
    assert manager.get_usage("m").queued_requests == 1
    held.release()
    thread.join(30)
    assert behind == [True]
    usage = manager.get_usage("m")
    assert (usage.queued_requests, usage.concurrent_requests, usage.tokens_this_hour) == (0, 0, 3)


@pytest.mark.filterwarnings("ignore:a grant was garbage-collected:ResourceWarning")  # returned, and then interrupted
def test_an_interrupt_at_any_moment_loses_no_grant(manager):
    """Others take turns meanwhile; whoever is interrupted neither keeps the only grant nor delays them."""
    stop = threading.Event()
    turns = []

    def take_turns():
        while not stop.is_set():
            with manager.acquire("m", 1):
                turns.append(None)

    threads = [threading.Thread(target=take_turns) for _ in range(2)]
    for thread in threads:
        thread.start()
    rng = random.Random(1)
    interrupts = 0
    try:
        for _ in range(150):
            timer = threading.Timer(rng.random() * 0.004, interrupt_main)
            try:
                timer.start()
                for _ in range(10_000):
                    with manager.acquire("m", 1):
                        pass
            except KeyboardInterrupt:
                interrupts += 1
            timer.join()
            before = len(turns)
            give_up = time.monotonic() + 30
            while len(turns) < before + 3:
                assert time.monotonic() < give_up, "the others wait for a grant that is lost"
                time.sleep(0.0002)
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert interrupts > 100
    usage = manager.get_usage("m")
    assert (usage.queued_requests, usage.concurrent_requests) == (0, 0)


def test_these_tests_do_not_hang_if_interrupts_are_ignored_from_the_start():
    """As in `nohup pytest &`: the main thread would wait for ever."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "leaves_no_trace"]
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    done = subprocess.run(command, preexec_fn=ignore, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
