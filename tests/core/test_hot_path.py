"""What a check does not do: it allocates nothing but its result, and takes no lock but its row's."""

import threading
import tracemalloc
from itertools import repeat

import pytest

from modelquota import ResourceQuotaConfig

QUOTAS = [
    ResourceQuotaConfig(name, max_tokens_per_second=1e6, max_requests_per_second=1e6, on_violation="reject")
    for name in "abc"
]


def most_allocated(ask):
    """Bytes that many calls of `ask` have at most at a time, its results thrown away as they come."""
    for _ in repeat(None, 100):  # fills the results' freelist
        ask()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        for _ in repeat(None, 1_000):
            ask()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def test_a_check_allocates_nothing_but_its_result(manager):
    nothing = most_allocated(object().__hash__)  # what the measuring itself takes
    check, handle = manager.check_quota, manager.model("a")
    assert most_allocated(lambda: check("a", 1)) <= nothing
    assert most_allocated(lambda: check("a", estimated_tokens=1, ram_needed_mb=1, ssd_needed_mb=1)) <= nothing
    assert most_allocated(lambda: handle.check(1)) <= nothing
    denied = manager.check_quota("a", 10**7)
    assert not denied
    assert most_allocated(lambda: check("a", 10**7)) <= nothing
    # and that it would be seen: an int, the smallest thing
    assert most_allocated(lambda: denied.retry_after_ms or 10**7 + len(manager.list_models())) > nothing


def test_a_kept_result_is_one_block_of_80_bytes(manager):
    check = manager.check_quota
    kept = [check("a", 1) for _ in range(200)]  # the freelist is empty now, and the list has room
    kept.extend(repeat(None, 1_000))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for i in range(200, 1_200):
            kept[i] = check("a", 1)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert taken <= 80 * 1_000 + 200


MINE = 1 << 10 | 1  # the first seat, taken once: this process, which lives; a lock of the dead would be taken over


@pytest.fixture
def locks(manager):
    """The words of the locks: the registry's, and each row's; all free again in the end, whoever waits."""
    header, rows, _ = manager._arrays()
    words = [header["registry_lock"], *(rows["lock"][i : i + 1] for i in range(3))]
    yield words
    for word in words:
        word[0] = 0


def begin(verbs):
    """Run each in a thread, for a time far beyond what it needs."""
    threads = [threading.Thread(target=verb, daemon=True) for verb in verbs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(0.5)
    return threads


def test_a_check_takes_no_lock_but_its_rows(manager, locks):
    handle, rows = manager.model("b"), manager.codes(["b"] * 3)
    verbs = [
        lambda: manager.check_quota("b", 1),
        lambda: handle.check(1),
        lambda: manager.check_many(rows, 1),
        lambda: manager.charge_many(rows, 1),
    ]
    registry, a, b, c = locks
    registry[0] = a[0] = c[0] = MINE
    assert not any(thread.is_alive() for thread in begin(verbs))
    b[0] = MINE
    waiting = begin(verbs)
    assert all(thread.is_alive() for thread in waiting)
    registry[0] = a[0] = b[0] = c[0] = 0
    for thread in waiting:
        thread.join(60)
    assert manager.get_usage("b").tokens_this_day == 2 * 8
