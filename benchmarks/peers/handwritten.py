"""What people write themselves before they look for a library: a dict, a lock, counters that start anew."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from threading import Lock
from types import SimpleNamespace
from unittest import mock

from benchmarks.peers.protocol import DAY, HOUR, SECOND, Check, KeyedCheck, Peer, Rule, VirtualClock


class OneWindow:
    """At most `amount` a key in each window of `seconds`, a window beginning with the first check after the last."""

    def __init__(self, amount: int, seconds: float) -> None:
        self._amount = amount
        self._seconds = seconds
        self._lock = Lock()
        self._windows: dict[str, list] = {}

    def check(self, key: str, cost: int = 1) -> bool:
        now = time.monotonic()
        with self._lock:
            window = self._windows.get(key)
            if window is None or now - window[0] >= self._seconds:
                window = self._windows[key] = [now, 0]
            if window[1] + cost > self._amount:
                return False
            window[1] += cost
            return True


class Usage:
    """Counters of one key."""

    __slots__ = (
        "day_start",
        "hour_start",
        "requests_day",
        "requests_hour",
        "requests_second",
        "second_start",
        "tokens_day",
        "tokens_hour",
        "tokens_second",
    )

    def __init__(self, now: float) -> None:
        self.second_start = self.hour_start = self.day_start = now
        self.requests_second = self.requests_hour = self.requests_day = 0
        self.tokens_second = self.tokens_hour = self.tokens_day = 0


class SixWindows:
    """Requests and tokens per second, hour and day; a check charges all six or none."""

    def __init__(self, requests: tuple[int, int, int], tokens: tuple[int, int, int]) -> None:
        self._max_requests_second, self._max_requests_hour, self._max_requests_day = requests
        self._max_tokens_second, self._max_tokens_hour, self._max_tokens_day = tokens
        self._lock = Lock()
        self._usage: dict[str, Usage] = {}

    def check(self, key: str, tokens: int) -> bool:
        now = time.monotonic()
        with self._lock:
            usage = self._usage.get(key)
            if usage is None:
                usage = self._usage[key] = Usage(now)
            if now - usage.second_start >= SECOND:
                usage.second_start = now
                usage.requests_second = usage.tokens_second = 0
            if now - usage.hour_start >= HOUR:
                usage.hour_start = now
                usage.requests_hour = usage.tokens_hour = 0
            if now - usage.day_start >= DAY:
                usage.day_start = now
                usage.requests_day = usage.tokens_day = 0
            if (
                usage.requests_second >= self._max_requests_second
                or usage.tokens_second + tokens > self._max_tokens_second
                or usage.requests_hour >= self._max_requests_hour
                or usage.tokens_hour + tokens > self._max_tokens_hour
                or usage.requests_day >= self._max_requests_day
                or usage.tokens_day + tokens > self._max_tokens_day
            ):
                return False
            usage.requests_second += 1
            usage.requests_hour += 1
            usage.requests_day += 1
            usage.tokens_second += tokens
            usage.tokens_hour += tokens
            usage.tokens_day += tokens
            return True


class DictAndLock(Peer):
    name = "hand-written (dict and lock)"

    def one(self, rule: Rule) -> Check:
        check, cost = OneWindow(rule.amount, rule.seconds).check, rule.cost
        return lambda: check("model", cost)

    def six(self, rules: Sequence[Rule]) -> Check:
        amounts = [rule.amount for rule in rules]
        check, cost = SixWindows(tuple(amounts[:3]), tuple(amounts[3:])).check, rules[3].cost
        return lambda: check("model", cost)

    def each(self, rule: Rule, keys: Sequence[str]) -> KeyedCheck:
        check, cost = OneWindow(rule.amount, rule.seconds).check, rule.cost
        return lambda i: check(keys[i], cost)

    def at(self, clock: VirtualClock) -> AbstractContextManager:
        return mock.patch(f"{__name__}.time", SimpleNamespace(monotonic=clock.seconds))
