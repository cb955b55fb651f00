"""When a node's next request is due, and how well it reaches the store. Pure; times are in nanoseconds."""

from __future__ import annotations

import random
from collections import deque
from typing import Final

URGENT_NS: Final = 10_000_000
"""The least time between two requests."""

_BACKOFF_NS: Final = (100_000_000, 5_000_000_000)
_MISSED: Final = 3
_STEADY: Final = 3
_STEADY_NS: Final = 5_000_000_000


class Pace:
    """The times of a node's requests.

    A renewal is due every `renew_ns`, with jitter; one is due 10 ms after the last if more waits than did fit into it,
    or if it is urgent, and then later if the last ones brought nothing; after a failure, one after 0.1 s and then after
    twice as long each time, up to 5 s.

    Attributes
    ----------
    reached : bool
        False from the third renewal that was missed, until three requests within 5 s have been answered.
    """

    def __init__(self, renew_ns: int, chance: random.Random | None = None) -> None:
        self.renew_ns = renew_ns
        self.reached = True
        self._chance = chance or random.Random()
        self._gap_ns = URGENT_NS
        self._failures = 0
        self._answers: deque[int] = deque(maxlen=_STEADY)
        self._last_ns = -(10**18)
        self._answered_ns: int | None = None
        self._due_ns = 0
        self._urgent = False
        self._grew = False

    def due_ns(self) -> int:
        """Return when the next request is due."""
        if self._urgent and not self._failures:
            return min(self._due_ns, self._last_ns + self._gap_ns)
        return self._due_ns

    def urge(self) -> None:
        """A share is nearly used, or a request was denied for lack of it."""
        self._urgent = True

    def answered(self, now_ns: int, grew: bool, more: bool = False) -> None:
        """A request was answered; `grew` if it brought a larger share, `more` if others wait to be told."""
        self._grew = self._grew or grew
        if not more:
            # What brought nothing is not repeated as often: the limit is used up, everywhere.
            self._gap_ns = URGENT_NS if self._grew or not self._urgent else min(2 * self._gap_ns, self.renew_ns)
            self._urgent = self._grew = False
        self._failures = 0
        self._answers.append(now_ns)
        self._answered_ns = now_ns
        if len(self._answers) == _STEADY and now_ns - self._answers[0] <= max(_STEADY_NS, _STEADY * self.renew_ns):
            self.reached = True
        self._schedule(now_ns, URGENT_NS if more else self._jittered(self.renew_ns))

    def failed(self, now_ns: int) -> None:
        """A request got no answer."""
        self._failures += 1
        if self._answered_ns is None:
            self._answered_ns = now_ns
        if now_ns - self._answered_ns >= _MISSED * self.renew_ns:
            self.reached = False
            self._answers.clear()
        first, most = _BACKOFF_NS
        self._schedule(now_ns, self._jittered(min(first << min(self._failures - 1, 10), most)))

    def _schedule(self, now_ns: int, wait_ns: int) -> None:
        self._last_ns, self._due_ns = now_ns, now_ns + wait_ns

    def _jittered(self, wait_ns: int) -> int:
        return int(wait_ns * self._chance.uniform(0.8, 1.0))
