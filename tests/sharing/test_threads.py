"""Threads and forked processes: the number admitted is exact, not about right."""

import contextlib
import multiprocessing
import threading

import numpy as np
import pytest
from factories import make_manager, open_quota
from together import THREADS, run_together

from modelquota import UnknownModelError

pytestmark = pytest.mark.usefixtures("switch_threads_often")

LIMIT = 20_000


@pytest.mark.parametrize(
    ("limits", "tokens", "admitted"),
    [
        ({"max_requests_per_day": LIMIT}, 1, LIMIT),
        ({"max_tokens_per_hour": LIMIT}, 3, LIMIT // 3),
        ({"max_requests_per_second": LIMIT - 500, "burst_requests": 500}, 1, LIMIT),
        ({"max_tokens_per_second": LIMIT - 500, "burst_tokens": 500}, 7, LIMIT // 7),
    ],
)
def test_threads_admit_exactly_the_limit(limits, tokens, admitted):
    manager = make_manager(**limits)
    handle = manager.model("m")

    def single(i):
        check = handle.check if i % 2 else (lambda tokens: manager.check_quota("m", tokens))
        return sum(bool(check(tokens)) for _ in range(LIMIT // 4))

    assert sum(run_together(single)) == admitted
    usage = manager.get_usage("m")
    assert usage.requests_this_day == admitted
    assert usage.tokens_this_day == admitted * tokens
    assert manager.get_stats().total_checks == THREADS * (LIMIT // 4)


def test_batches_and_single_checks_at_once_admit_exactly_the_limit():
    manager = make_manager(max_requests_per_hour=LIMIT)
    rows = np.repeat(manager.codes(["m"]), 500)

    def mixed(i):
        if i % 2:
            return sum(int((manager.check_many(rows, 1) == 0).sum()) for _ in range(20))
        return sum(bool(manager.check_quota("m", 1)) for _ in range(5_000))

    assert sum(run_together(mixed)) == LIMIT
    assert manager.get_usage("m").requests_this_hour == LIMIT


def test_unconditional_charges_are_all_counted():
    manager = make_manager(open_quota("m"))
    rows = np.repeat(manager.codes(["m"]), 1_000)
    run_together(lambda i: [manager.charge_many(rows, 3) for _ in range(25)])
    assert manager.get_usage("m").tokens_this_day == THREADS * 25 * 1_000 * 3


def test_limits_change_while_others_check():
    """A change is seen at the next check, nothing is lost and nothing refilled."""
    manager = make_manager(max_requests_per_day=LIMIT)

    def work(i):
        if i == 0:
            for round_ in range(2_000):
                manager.update_quota("m", max_requests_per_day=LIMIT if round_ % 2 else LIMIT // 2)
            manager.update_quota("m", max_requests_per_day=LIMIT)
            return 0
        return sum(bool(manager.check_quota("m", 1)) for _ in range(LIMIT // 4))

    admitted = sum(run_together(work))
    while manager.check_quota("m", 1):
        admitted += 1
    assert admitted == LIMIT == manager.get_usage("m").requests_this_day


def test_models_come_and_go_while_others_check():
    """A reused row is never mistaken for the old model: what leaks into `stay` would exceed its count."""
    manager = make_manager(open_quota("m"))
    manager.set_quota("stay", max_requests_per_day=None, max_requests_per_second=None, max_tokens_per_second=None,
                      max_tokens_per_hour=None, max_tokens_per_day=None, max_requests_per_hour=None)  # fmt: skip

    def work(i):
        if i < 2:
            for _ in range(2_000):
                manager.set_quota(f"churn{i}", max_requests_per_day=0)
                manager.remove_quota(f"churn{i}")
            return 0
        count = 0
        for _ in range(3_000):
            manager.check_quota(f"churn{i % 2}", 1)
            count += bool(manager.check_quota("stay", 1))
            with contextlib.suppress(UnknownModelError):
                manager.model(f"churn{i % 2}").check(1)
        return count

    admitted = sum(run_together(work))
    assert admitted == 6 * 3_000
    assert manager.get_usage("stay").requests_this_day == admitted
    assert manager.list_models() == ["m", "stay"]


def test_readers_see_a_consistent_model():
    """Tokens are always three times the requests: a snapshot is taken under the model's lock."""
    manager = make_manager(open_quota("m"))
    rows = np.repeat(manager.codes(["m"]), 200)
    stop = threading.Event()

    def work(i):
        if i == 0:
            for _ in range(300):
                usage = manager.get_usage("m")
                assert usage.tokens_this_day == 3 * usage.requests_this_day
                (record,) = manager.snapshot()
                assert record["tokens_this_hour"] == 3 * record["requests_this_hour"]
            stop.set()
        else:
            while not stop.is_set():
                manager.check_many(rows, 3)

    run_together(work, 3)


def _admit(manager, rounds, sender):
    sender.send(sum(bool(manager.check_quota("m", 1)) for _ in range(rounds)))
    sender.close()


def test_forked_processes_share_the_limit():
    manager = make_manager(max_requests_per_day=LIMIT)
    context = multiprocessing.get_context("fork")
    pipes, children = [], []
    for _ in range(3):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_admit, args=(manager, LIMIT // 2, sender))
        child.start()
        sender.close()
        pipes.append(receiver)
        children.append(child)
    admitted = sum(bool(manager.check_quota("m", 1)) for _ in range(LIMIT // 2))
    admitted += sum(pipe.recv() for pipe in pipes)
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert admitted == LIMIT == manager.get_usage("m").requests_this_day
