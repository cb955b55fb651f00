"""The most that a limiter lets into any true window: its promise, put to the test."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from benchmarks.peers.protocol import NS_PER_SECOND, Peer, Rule, VirtualClock

AMOUNT = 100
WINDOW_S = 2
STEP_NS = 1_000_000
MOST_AT_ONCE = 10 * AMOUNT


def most_admitted_by(peer: Peer) -> int:
    """Count the most of 100 per 2 s that `peer` admits in any true 2 s."""

    @contextmanager
    def limiter(clock: VirtualClock) -> Iterator[Callable[[], bool]]:
        with peer.at(clock):
            yield peer.blocking(peer.one(Rule(AMOUNT, WINDOW_S)))

    return most_admitted(limiter, WINDOW_S)


def most_admitted(
    limiter: Callable[[VirtualClock], AbstractContextManager[Callable[[], bool]]], window_s: float
) -> int:
    """Count the most that `limiter` admits in any half-open interval of `window_s` seconds.

    Parameters
    ----------
    limiter
        Given a clock, a context that yields a check on fresh state which reads that clock: True admits.
    window_s
        The true window, in seconds.

    Notes
    -----
    The clock is a virtual one, so this takes no time. A caller that wants as much as it can get is played from
    several moments on, just before a window ends among them, with and without one early request that starts the
    window: it takes all that it gets at once, and asks again each millisecond.
    """
    window_ns = round(window_s * NS_PER_SECOND)
    most = 0
    for start_ns in (0, window_ns // 2, window_ns - 10 * STEP_NS, window_ns - STEP_NS):
        for opens_early in (False, True):
            clock = VirtualClock()
            with limiter(clock) as check:
                admitted_ns = _ask_greedily(check, clock, start_ns, start_ns + 3 * window_ns // 2, opens_early)
            most = max(most, _most_in_any_window(admitted_ns, window_ns))
    return most


def _ask_greedily(
    check: Callable[[], bool], clock: VirtualClock, start_ns: int, end_ns: int, opens_early: bool
) -> list[int]:
    """Return when each admission was given, as nanoseconds of the clock."""
    admitted_ns = []
    if opens_early and check():
        admitted_ns.append(clock.now_ns)
    clock.advance_ns(start_ns)
    for _ in range(start_ns, end_ns, STEP_NS):
        # Bounded, should a limiter not limit.
        for _ in range(MOST_AT_ONCE):
            if not check():
                break
            admitted_ns.append(clock.now_ns)
        clock.advance_ns(STEP_NS)
    return admitted_ns


def _most_in_any_window(moments_ns: Sequence[int], window_ns: int) -> int:
    most = first = 0
    for last, moment_ns in enumerate(moments_ns):
        while moment_ns - moments_ns[first] >= window_ns:
            first += 1
        most = max(most, last - first + 1)
    return most
