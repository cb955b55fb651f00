"""The libraries on PyPI, each used as its documentation shows. A library is imported when its peer is made."""

import asyncio
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

from benchmarks.peers.protocol import DAY, HOUR, Check, KeyedCheck, Peer, Rule, VirtualClock

KEY = "model"
REQUESTS, TOKENS = "requests", "tokens"

# The checks of six limits are loops, not `all` of a generator: that would add some 0.1 µs to each.


class _Limits(Peer):
    distribution = "limits"
    strategy: ClassVar[str]

    def __init__(self) -> None:
        import limits
        import limits.storage.memory
        import limits.strategies

        self._items = {DAY: limits.RateLimitItemPerDay, HOUR: limits.RateLimitItemPerHour}
        self._other_item = limits.RateLimitItemPerSecond
        self._memory = limits.storage.memory
        self._strategy = limits.strategies.STRATEGIES[self.strategy]

    def _item(self, rule: Rule, namespace: str) -> Any:
        if rule.seconds in self._items:
            return self._items[rule.seconds](rule.amount, 1, namespace)
        return self._other_item(rule.amount, rule.seconds, namespace)

    def _hit(self) -> Callable[..., bool]:
        return self._strategy(self._memory.MemoryStorage()).hit

    def one(self, rule: Rule) -> Check:
        return partial(self._hit(), self._item(rule, REQUESTS), KEY, cost=rule.cost)

    def six(self, rules: Sequence[Rule]) -> Check:
        hit = self._hit()
        # Without namespaces, equal amounts of requests and of tokens would share one counter.
        namespaces = 3 * (REQUESTS,) + 3 * (TOKENS,)
        hits = [(self._item(rule, namespace), rule.cost) for rule, namespace in zip(rules, namespaces, strict=True)]

        def check() -> bool:
            for item, cost in hits:  # noqa: SIM110
                if not hit(item, KEY, cost=cost):
                    return False
            return True

        return check

    def each(self, rule: Rule, keys: Sequence[str]) -> KeyedCheck:
        hit, item, cost = self._hit(), self._item(rule, REQUESTS), rule.cost
        return lambda i: hit(item, keys[i], cost=cost)

    def at(self, clock: VirtualClock) -> AbstractContextManager:
        return mock.patch.object(self._memory, "time", SimpleNamespace(time=clock.seconds))


class LimitsFixedWindow(_Limits):
    name = "limits (fixed window)"
    strategy = "fixed-window"


class LimitsSlidingCounter(_Limits):
    name = "limits (sliding counter)"
    strategy = "sliding-window-counter"


class LimitsMovingWindow(_Limits):
    name = "limits (moving window)"
    strategy = "moving-window"
    most_checks = 300
    most_large_checks = 3


class _Pyrate(Peer):
    distribution = "pyrate-limiter"

    def __init__(self) -> None:
        import pyrate_limiter
        import pyrate_limiter.clocks

        self._library = pyrate_limiter

    @abstractmethod
    def _bucket(self, rates: list) -> Any:
        """Make a bucket of the peer's kind: it holds the state of one key."""

    def _rates(self, rules: Sequence[Rule]) -> list:
        return [self._library.Rate(rule.amount, rule.seconds * 1_000) for rule in rules]

    def _acquire(self, rules: Sequence[Rule]) -> Callable[..., bool]:
        limiter = self._library.Limiter(self._bucket(self._rates(rules)))
        return partial(limiter.try_acquire, KEY, rules[0].cost, False)

    def one(self, rule: Rule) -> Check:
        return self._acquire([rule])

    def six(self, rules: Sequence[Rule]) -> Check:
        """Use one bucket for requests and one for tokens: all rates of a bucket take the same weight."""
        acquire_request, acquire_tokens = self._acquire(rules[:3]), self._acquire(rules[3:])
        return lambda: acquire_request() and acquire_tokens()

    def each(self, rule: Rule, keys: Sequence[str]) -> KeyedCheck:
        acquire, cost = self._library.Limiter(self._bucket_per_key(rule)).try_acquire, rule.cost
        return lambda i: acquire(keys[i], cost, False)

    def _bucket_per_key(self, rule: Rule) -> Any:
        """Make the factory that the library leaves to its user where there is more than one key."""
        library, make_bucket, rates = self._library, self._bucket, self._rates([rule])

        class BucketPerKey(library.BucketFactory):
            def __init__(self) -> None:
                self.clock = library.MonotonicClock()
                self.buckets: dict[str, Any] = {}

            def wrap_item(self, name: str, weight: int = 1) -> Any:
                return library.RateItem(name, self.clock.now(), weight=weight)

            def get(self, item: Any) -> Any:
                bucket = self.buckets.get(item.name)
                if bucket is None:
                    bucket = self.buckets[item.name] = make_bucket(rates)
                    self.schedule_leak(bucket)
                return bucket

        return BucketPerKey()

    def at(self, clock: VirtualClock) -> AbstractContextManager:
        return mock.patch.object(self._library.clocks, "monotonic_ns", clock.nanoseconds)


class PyrateLog(_Pyrate):
    name = "pyrate-limiter (log)"
    most_checks = 300
    most_large_checks = 3

    def _bucket(self, rates: list) -> Any:
        return self._library.InMemoryBucket(rates)


class PyrateGcra(_Pyrate):
    name = "pyrate-limiter (GCRA)"

    def _bucket(self, rates: list) -> Any:
        return self._library.StateBucket(rates, self._library.GCRA())


class _Throttled(Peer):
    distribution = "throttled-py"
    using: ClassVar[str]

    def __init__(self) -> None:
        import throttled
        import throttled.utils

        self._library = throttled

    def _limit(self, rule: Rule, keys: int) -> Callable:
        quota = self._library.rate_limiter.per_duration(timedelta(seconds=rule.seconds), rule.amount)
        # The store forgets keys beyond its size, 1,024 of them by default; a window takes up to three at a time.
        store = self._library.MemoryStore(options={"MAX_SIZE": 4 * keys})
        return self._library.Throttled(using=self.using, quota=quota, store=store).limit

    def one(self, rule: Rule) -> Check:
        limit, cost = self._limit(rule, 1), rule.cost
        return lambda: not limit(KEY, cost).limited

    def six(self, rules: Sequence[Rule]) -> Check:
        limits = [(self._limit(rule, 1), rule.cost) for rule in rules]

        def check() -> bool:
            for limit, cost in limits:  # noqa: SIM110
                if limit(KEY, cost).limited:
                    return False
            return True

        return check

    def each(self, rule: Rule, keys: Sequence[str]) -> KeyedCheck:
        limit, cost = self._limit(rule, len(keys)), rule.cost
        return lambda i: not limit(keys[i], cost).limited

    def at(self, clock: VirtualClock) -> AbstractContextManager:
        time = SimpleNamespace(time=clock.seconds, monotonic=clock.seconds)
        return mock.patch.object(self._library.utils, "time", time)


class ThrottledTokenBucket(_Throttled):
    name = "throttled-py (token bucket)"
    using = "token_bucket"


class ThrottledGcra(_Throttled):
    name = "throttled-py (GCRA)"
    using = "gcra"


class ThrottledSlidingWindow(_Throttled):
    name = "throttled-py (sliding window)"
    using = "sliding_window"


class AioLimiter(Peer):
    name = "aiolimiter (leaky bucket)"
    distribution = "aiolimiter"
    asynchronous = True

    def __init__(self) -> None:
        import aiolimiter

        self._limiter = aiolimiter.AsyncLimiter
        self._loop: asyncio.AbstractEventLoop | None = None

    def one(self, rule: Rule) -> Check:
        limiter, cost = self._limiter(rule.amount, rule.seconds), rule.cost

        async def check() -> bool:
            if not limiter.has_capacity(cost):
                return False
            await limiter.acquire(cost)
            return True

        return check

    def six(self, rules: Sequence[Rule]) -> Check:
        limiters = [(self._limiter(rule.amount, rule.seconds), rule.cost) for rule in rules]

        async def check() -> bool:
            for limiter, cost in limiters:
                if not limiter.has_capacity(cost):
                    return False
            for limiter, cost in limiters:
                await limiter.acquire(cost)
            return True

        return check

    def each(self, rule: Rule, keys: Sequence[str]) -> KeyedCheck:
        limiters: dict[str, Any] = {}
        make, cost = self._limiter, rule.cost

        async def check(i: int) -> bool:
            limiter = limiters.get(keys[i])
            if limiter is None:
                limiter = limiters[keys[i]] = make(rule.amount, rule.seconds)
            if not limiter.has_capacity(cost):
                return False
            await limiter.acquire(cost)
            return True

        return check

    @contextmanager
    def at(self, clock: VirtualClock) -> Iterator[None]:
        self._loop = asyncio.new_event_loop()
        self._loop.time = clock.seconds
        try:
            yield
        finally:
            self._loop.close()
            self._loop = None

    def blocking(self, check: Callable) -> Callable[..., bool]:
        run = self._loop.run_until_complete
        return lambda *index: run(check(*index))


LIBRARIES: tuple[type[Peer], ...] = (
    AioLimiter,
    PyrateGcra,
    PyrateLog,
    LimitsFixedWindow,
    LimitsSlidingCounter,
    LimitsMovingWindow,
    ThrottledTokenBucket,
    ThrottledGcra,
    ThrottledSlidingWindow,
)
