"""Generated inference traffic: clients that send requests, and react to a denial as their model's action says.

The clock is an argument, so the same traffic runs in real time and in simulated time.
"""

import heapq
import math
import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import perf_counter_ns

from modelquota._core.table.result import QuotaCheckResult
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import Limit, ViolationAction

__all__ = ["MODELS", "SHOWN_LIMITS", "Lane", "Lengths", "Tally", "Traffic", "total"]

NS_PER_MS = 1_000_000
NS_PER_SECOND = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of requests: log-normal tokens of prompt and answer, each given by median, spread and maximum."""

    prompt: tuple[int, float, int]
    answer: tuple[int, float, int]

    def draw(self, rng: random.Random) -> int:
        """Tokens of one request, prompt and answer together; at least 2."""
        return sum(
            min(max(1, round(rng.lognormvariate(math.log(median), spread))), longest)
            for median, spread, longest in (self.prompt, self.answer)
        )


# Medians, spreads and maxima of the two public Azure LLM inference traces of November 2023.
CODE = Lengths(prompt=(1_500, 1.0, 7_437), answer=(13, 0.8, 1_899))
CONVERSATION = Lengths(prompt=(1_020, 0.9, 14_050), answer=(129, 0.9, 1_000))


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the clients of one model send: this many requests per second, on average, of these lengths."""

    quota: ResourceQuotaConfig
    requests_per_second: float
    lengths: Lengths


# One model for each action; each gets more traffic than its limits admit, so that they take effect within seconds.
MODELS = (
    Traffic(
        ResourceQuotaConfig(
            "chat-70b",
            max_requests_per_second=30,
            burst_requests=15,
            max_tokens_per_second=20_000,
            burst_tokens=4_000,
            max_tokens_per_hour=1_000_000,
            on_violation=ViolationAction.THROTTLE,
            grace_period_sec=4,
        ),
        requests_per_second=18,
        lengths=CONVERSATION,
    ),
    Traffic(
        ResourceQuotaConfig(
            "code-34b",
            max_requests_per_second=8,
            burst_requests=4,
            max_tokens_per_second=50_000,
            burst_tokens=50_000,
            max_tokens_per_hour=1_000_000,
            on_violation=ViolationAction.QUEUE,
            grace_period_sec=4,
        ),
        requests_per_second=11,
        lengths=CODE,
    ),
    Traffic(
        ResourceQuotaConfig(
            "batch-13b",
            max_requests_per_second=40,
            burst_requests=20,
            max_tokens_per_second=60_000,
            burst_tokens=60_000,
            max_tokens_per_hour=60_000,
            on_violation=ViolationAction.REJECT,
        ),
        requests_per_second=20,
        lengths=CONVERSATION,
    ),
    Traffic(
        ResourceQuotaConfig(
            "dev-7b",
            max_requests_per_second=6,
            burst_requests=6,
            max_tokens_per_second=20_000,
            burst_tokens=20_000,
            max_tokens_per_hour=500_000,
            on_violation=ViolationAction.WARN,
        ),
        requests_per_second=10,
        lengths=CODE,
    ),
)

SHOWN_LIMITS = (Limit.REQUESTS_PER_SECOND, Limit.TOKENS_PER_SECOND, Limit.TOKENS_PER_HOUR)
"""The limits that these quotas set."""


@dataclass(slots=True)
class Tally:
    """Counts of the outcomes of one model's requests; written by one lane, may be read by any thread.

    Attributes
    ----------
    sent, admitted : int
        Requests that arrived, and those admitted, at once or after a wait.
    denied : int
        Requests given up: rejected, or impossible to admit within the grace period.
    warned : int
        Requests admitted over a limit.
    waiting : int
        Requests that wait now.
    denials : Counter of Limit
        Checks with a violation, by the first limit violated.
    first_violation_ns : int or None
        When a limit was violated for the first time.
    last_violation_ns : int
        When a limit was last violated; 0 for never.
    retry_after_ms : int or None
        The `retry_after_ms` of that check.
    waits_ms : list of float
        How long each request that was admitted after a wait had waited.
    """

    sent: int = 0
    admitted: int = 0
    denied: int = 0
    warned: int = 0
    waiting: int = 0
    denials: Counter[Limit] = field(default_factory=Counter)
    first_violation_ns: int | None = None
    last_violation_ns: int = 0
    retry_after_ms: int | None = None
    waits_ms: list[float] = field(default_factory=list)


@dataclass(slots=True)
class _Request:
    traffic: Traffic
    tokens: int
    arrived_ns: int
    waited: bool = False


class Lane:
    """One thread's share of the clients of all models. Not thread-safe; lanes share nothing but the manager.

    Parameters
    ----------
    manager : ResourceQuotaManager
        Has a quota for every model of `models`.
    models : sequence of Traffic
        The models whose clients to simulate.
    share : float
        The part of the traffic that this lane sends, above 0 and at most 1.
    rng : random.Random
        Source of request sizes and arrival times.
    now : callable
        The time in ns, on the manager's clock: `time.monotonic_ns`, or a function that reads its `ManualClock`.

    Attributes
    ----------
    tallies : dict of str to Tally
    check_ns : array of int
        The time of each check, call and timer included.
    next_ns : int
        When the next event is due.
    """

    def __init__(
        self,
        manager: ResourceQuotaManager,
        models: Sequence[Traffic],
        *,
        share: float,
        rng: random.Random,
        now: Callable[[], int],
    ) -> None:
        self._manager = manager
        self._share = share
        self._rng = rng
        self._now = now
        self.tallies = {traffic.quota.model_id: Tally() for traffic in models}
        self.check_ns = array("q")
        self._lines: dict[str, deque[_Request]] = {traffic.quota.model_id: deque() for traffic in models}
        # (due, number, traffic of an arrival or request to retry); the number keeps equal times in order.
        self._due: list[tuple[int, int, Traffic | _Request]] = []
        self._numbers = 0
        for traffic in models:
            self._expect_arrival(traffic)

    @property
    def next_ns(self) -> int:
        return self._due[0][0]

    def step(self) -> None:
        """Do all that is due by now: arrivals send their request, those that waited try again."""
        while self._due[0][0] <= self._now():
            _, _, event = heapq.heappop(self._due)
            if isinstance(event, Traffic):
                self._arrive(event)
                self._expect_arrival(event)
            else:
                self._retry(event)

    def _expect_arrival(self, traffic: Traffic) -> None:
        gap_s = self._rng.expovariate(traffic.requests_per_second * self._share)
        self._push(self._now() + round(gap_s * NS_PER_SECOND), traffic)

    def _push(self, due_ns: int, event: Traffic | _Request) -> None:
        self._numbers += 1
        heapq.heappush(self._due, (due_ns, self._numbers, event))

    def _arrive(self, traffic: Traffic) -> None:
        request = _Request(traffic, traffic.lengths.draw(self._rng), self._now())
        tally = self.tallies[traffic.quota.model_id]
        tally.sent += 1
        line = self._lines[traffic.quota.model_id]
        if line:
            # First come, first served: a request behind a waiting one is not tried yet.
            line.append(request)
        elif (retry_ns := self._try(request)) is None:
            return
        else:
            if traffic.quota.on_violation is ViolationAction.QUEUE:
                line.append(request)
            self._push(retry_ns, request)
        request.waited = True
        tally.waiting += 1

    def _retry(self, request: _Request) -> None:
        tally = self.tallies[request.traffic.quota.model_id]
        line = self._lines[request.traffic.quota.model_id]
        while (retry_ns := self._try(request)) is None:
            tally.waiting -= 1
            if line:
                line.popleft()
            if not line:
                return
            request = line[0]
        self._push(retry_ns, request)

    def _try(self, request: _Request) -> int | None:
        """Check a request; return None if it is admitted or finally denied, otherwise when to try it again."""
        quota = request.traffic.quota
        tally = self.tallies[quota.model_id]
        before_ns = perf_counter_ns()
        result: QuotaCheckResult = self._manager.check_quota(quota.model_id, request.tokens)
        self.check_ns.append(perf_counter_ns() - before_ns)
        # Read after the check: a wait counted from before it would end too early.
        now_ns = self._now()
        if result.limit is not None:
            tally.denials[result.limit] += 1
            if tally.first_violation_ns is None:
                tally.first_violation_ns = now_ns
            tally.last_violation_ns = now_ns
            tally.retry_after_ms = result.retry_after_ms
        if result:
            tally.admitted += 1
            tally.warned += result.limit is not None
            if request.waited:
                tally.waits_ms.append((now_ns - request.arrived_ns) / NS_PER_MS)
            return None
        if quota.on_violation is not ViolationAction.REJECT and result.retry_after_ms is not None:
            retry_ns = now_ns + result.retry_after_ms * NS_PER_MS
            if retry_ns - request.arrived_ns <= quota.grace_period_sec * NS_PER_SECOND:
                return retry_ns
        tally.denied += 1
        return None


def total(lanes: Sequence[Lane]) -> dict[str, Tally]:
    """The tallies of all lanes together, by model. The lanes may be running."""
    return {model_id: _sum([lane.tallies[model_id] for lane in lanes]) for model_id in lanes[0].tallies}


def _sum(parts: Sequence[Tally]) -> Tally:
    denials: Counter[Limit] = Counter()
    for part in parts:
        denials.update(part.denials.copy())
    return Tally(
        sent=sum(part.sent for part in parts),
        admitted=sum(part.admitted for part in parts),
        denied=sum(part.denied for part in parts),
        warned=sum(part.warned for part in parts),
        waiting=sum(part.waiting for part in parts),
        denials=denials,
        first_violation_ns=min(
            (part.first_violation_ns for part in parts if part.first_violation_ns is not None), default=None
        ),
        last_violation_ns=max(part.last_violation_ns for part in parts),
        retry_after_ms=max(parts, key=lambda part: part.last_violation_ns).retry_after_ms,
        waits_ms=[wait_ms for part in parts for wait_ms in part.waits_ms],
    )
