"""Grants in many threads: totals are exact, nothing stays held, nobody waits in a circle."""

import contextlib
import random
import threading

import numpy as np
import pytest
from factories import open_quota
from together import THREADS, run_together

from modelquota import GrantClosedError, QuotaExceededError

QUOTAS = [open_quota("a"), open_quota("b")]
pytestmark = pytest.mark.usefixtures("switch_threads_often")

PARTIES = ("a", "b", ("a", "b"), ("b", "a"))


@contextlib.contextmanager
def kept_busy(manager, *ids):
    """Batches without the GIL lock the rows all the time, so that grants have to wait for them and let it go."""
    rows = np.tile(manager.codes(ids), 10_000)
    stop = threading.Event()

    def check():
        while not stop.is_set():
            manager.check_many(rows, 0)

    threads = [threading.Thread(target=check) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def assert_all_given_back(manager, tokens):
    for model_id, expected in tokens.items():
        usage = manager.get_usage(model_id)
        assert (usage.concurrent_requests, usage.reserved_ram_mb, usage.reserved_ssd_mb) == (0, 0, 0)
        assert usage.tokens_this_second == usage.tokens_this_hour == usage.tokens_this_day == expected


@pytest.mark.parametrize("limits", [{}, {"max_concurrent_requests": 3, "max_ram_mb": 12}])
def test_threads_reserve_and_settle_over_both_models_in_either_order(manager, limits):
    for model_id in ("a", "b"):
        manager.update_quota(model_id, **limits)

    def work(i):
        rng = random.Random(i)
        spent = {"a": 0, "b": 0}
        for _ in range(3000):
            ids = rng.choice(PARTIES)
            try:
                grant = manager.reserve(ids, rng.randrange(50), rng.randrange(6), rng.randrange(6))
            except QuotaExceededError:
                continue
            added = [rng.randrange(40) for _ in range(rng.randrange(4))]
            for tokens in added:
                grant.add(tokens)
            ending = rng.randrange(4)
            if ending == 0:
                grant.cancel()
                continue
            if ending == 1:
                grant.settle(rng.randrange(100))
            elif ending == 2:
                manager.settle_many([grant], [rng.randrange(100)])
            grant.release()
            assert ending != 3 or grant.tokens == (sum(added) if added else grant.estimated_tokens)
            for model_id in ids:
                spent[model_id] += grant.tokens
        return spent

    with kept_busy(manager, "a", "b"):
        spent = run_together(work)
    assert_all_given_back(manager, {model_id: sum(part[model_id] for part in spent) for model_id in ("a", "b")})


@pytest.mark.parametrize("ids", ["a", ("b", "a")])
def test_threads_share_one_grant(manager, ids):
    """Whoever comes first settles, cancels or releases; the others are told, and what is counted is consistent."""

    def work(i):
        for step in range(60):
            with contextlib.suppress(GrantClosedError):
                if i < 5 or step < 30:
                    grant.add(3)
                elif ending == "settle":
                    grant.settle(100 + i)
                else:
                    getattr(grant, ending)()

    expected = 0
    with kept_busy(manager, "a", "b"):
        for round_number in range(24):
            ending = ("settle", "cancel", "release")[round_number % 3]
            grant = manager.reserve(ids, 10, ram_needed_mb=7)
            run_together(work, THREADS)
            grant.release()
            expected += grant.tokens
    assert_all_given_back(manager, dict.fromkeys(ids, expected))
