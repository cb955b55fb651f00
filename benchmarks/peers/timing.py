"""Nanoseconds per check and bytes per key of a peer."""

import asyncio
import gc
import random
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from time import perf_counter_ns

from benchmarks.peers.protocol import Check, KeyedCheck, Peer, VirtualClock

ROUNDS = 5
ROUND_NS = 40_000_000
PROBE_CHECKS = 100


class RefusedError(AssertionError):
    """A check was refused while it was timed: what was measured is not an admission."""


def least_ns(peer: Peer, make: Callable[[], Check], most_checks: int) -> float:
    """Return the least nanoseconds per check over several rounds, each on fresh state made by `make`.

    A round lasts some 40 ms, or `most_checks` where that is sooner.
    """

    def round_ns(checks: int) -> float:
        check = make()
        if peer.asynchronous:
            return asyncio.run(_timed_async(check, checks))
        return _timed(check, checks)

    return _least_of_rounds(round_ns, most_checks)


def least_keyed_ns(peer: Peer, keys: int, most_checks: int) -> float:
    """Return the least nanoseconds per check of `keys` keys in random order, each of which has been seen before."""
    order = random.Random(0)

    def round_ns(checks: int) -> float:
        check = peer.keyed(keys)
        indices = order.choices(range(keys), k=checks)
        if peer.asynchronous:
            return asyncio.run(_timed_keyed_async(check, keys, indices))
        return _timed_keyed(check, keys, indices)

    return _least_of_rounds(round_ns, most_checks)


def _least_of_rounds(round_ns: Callable[[int], float], most_checks: int) -> float:
    probe_ns = round_ns(min(most_checks, PROBE_CHECKS))
    checks = max(1, min(most_checks, int(ROUND_NS / probe_ns)))
    return min(round_ns(checks) for _ in range(ROUNDS))


@contextmanager
def _garbage_collector_resting() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _per_check(start_ns: int, checks: int, admitted: bool) -> float:
    elapsed_ns = perf_counter_ns() - start_ns
    if not admitted:
        raise RefusedError(f"a check was refused within {checks}: the limits are too low to time admissions")
    return elapsed_ns / checks


def _timed(check: Check, checks: int) -> float:
    with _garbage_collector_resting():
        check()
        start_ns = perf_counter_ns()
        for _ in repeat(None, checks):
            admitted = check()
        return _per_check(start_ns, checks, admitted)


async def _timed_async(check: Check, checks: int) -> float:
    with _garbage_collector_resting():
        await check()
        start_ns = perf_counter_ns()
        for _ in repeat(None, checks):
            admitted = await check()
        return _per_check(start_ns, checks, admitted)


def _timed_keyed(check: KeyedCheck, keys: int, indices: Sequence[int]) -> float:
    with _garbage_collector_resting():
        for i in range(keys):
            check(i)
        start_ns = perf_counter_ns()
        for i in indices:
            admitted = check(i)
        return _per_check(start_ns, len(indices), admitted)


async def _timed_keyed_async(check: KeyedCheck, keys: int, indices: Sequence[int]) -> float:
    with _garbage_collector_resting():
        for i in range(keys):
            await check(i)
        start_ns = perf_counter_ns()
        for i in indices:
            admitted = await check(i)
        return _per_check(start_ns, len(indices), admitted)


def bytes_per_key(peer: Peer, keys: int, checks: int) -> int:
    """Return the Python memory in use per key after `checks` requests to each of `keys` keys, under one limit.

    The keys themselves are not counted, and time stands still: nothing ages away meanwhile.
    """
    with peer.at(VirtualClock()):
        # What the first use of a library builds once and for all is no key's.
        peer.blocking(peer.keyed(1))(0)
        gc.collect()
        tracemalloc.start()
        try:
            check = peer.blocking(peer.keyed(keys))
            for _ in range(checks):
                for i in range(keys):
                    check(i)
            gc.collect()
            in_use, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    return in_use // keys
