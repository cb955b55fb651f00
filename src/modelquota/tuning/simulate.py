"""Simulation of requests that wait: the manager's own queue, on a clock that jumps from one event to the next.

The events are arrivals, releases, deadlines, and the times at which a waiting request may fit. The last come from the
manager too: `peek_quota` says how long the first in line, or the smallest of those that are throttled, has to wait.
"""

import heapq
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelquota._core.table.grant import Grant
from modelquota._core.table.queue import Waiter
from modelquota._core.table.result import QuotaCheckResult
from modelquota.errors import QuotaExceededError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.limits import ViolationAction
from modelquota.quota.tokens import TokenCount, Tokens
from modelquota.tuning.cells import NS_PER_SECOND, Int64Array

REQUESTS_PER_STEP = 16_384
# After so many that were admitted one by one, the next are tried at once: first so many, then twice as many, and so on.
LEAST_AT_ONCE = 64
# So many costs of requests that do not wait any more are left where they are, or as many as do wait.
SPARE_COSTS = 1_024
NS_PER_MS = 1_000_000
NEVER = 2**62
WAITING_ACTIONS = (ViolationAction.THROTTLE, ViolationAction.QUEUE)


class _SimulatedWaiter(Waiter):
    """A request that waits in simulated time: the simulation moves the clock, so it has nothing to watch.

    Of one that is queued, the attributes say what the simulation needs to know when the part it came in is gone.
    """

    def __init__(
        self,
        index: int,
        group: "_Group",
        cost: TokenCount,
        arrived_ns: int,
        over: bool,
        done: list["_SimulatedWaiter"],
    ) -> None:
        self.context = None
        self.index = index
        self.group = group
        self.cost = cost
        self.arrived_ns = arrived_ns
        self.over = over
        self.duration_ns = 0
        self.used: TokenCount | None = None
        self._done = done

    def prepare(self) -> None:
        """Nothing: the simulation does not sleep."""

    def wake(self) -> None:
        """It is admitted or denied."""
        self._done.append(self)

    def arm(self) -> None:
        """Nothing: the next time to check is computed from `peek_quota`."""


class _Group:
    """The requests for the same ids."""

    __slots__ = ("costs", "dirty", "grace_ns", "ids", "next_ns", "waiting", "warns")

    def __init__(self, ids: tuple[str, ...], manager: ResourceQuotaManager) -> None:
        deciding = [each for model_id in ids for each in (model_id, *manager._meters_of(model_id))]
        quotas = [quota for model_id in deciding if (quota := manager.get_quota(model_id)) is not None]
        self.ids: str | tuple[str, ...] = ids if len(ids) > 1 else ids[0]
        self.grace_ns = sorted({round(quota.grace_period_sec * NS_PER_SECOND) for quota in quotas})
        self.warns = any(quota.on_violation is ViolationAction.WARN for quota in quotas)
        self.waiting: dict[int, _SimulatedWaiter] = {}
        self.costs: list[tuple[int, int]] = []  # a heap of (tokens, index) of those that wait, and of some that do not
        self.next_ns = NEVER
        self.dirty = False

    def add(self, waiter: _SimulatedWaiter) -> None:
        self.waiting[waiter.index] = waiter
        if not isinstance(waiter.cost, Tokens):
            heapq.heappush(self.costs, (operator.index(waiter.cost), waiter.index))
            if len(self.costs) > 2 * len(self.waiting) + SPARE_COSTS:
                self.costs = [cost for cost in self.costs if cost[1] in self.waiting]
                heapq.heapify(self.costs)

    def least_costs(self) -> Sequence[TokenCount]:
        """Costs of those that wait, of which one is the first to fit: what has more of no kind never fits later."""
        if not self.costs:
            by_kind = {astuple(waiter.cost) for waiter in self.waiting.values() if isinstance(waiter.cost, Tokens)}
            least: list[tuple[int, ...]] = []
            for counts in sorted(by_kind):
                if not any(all(map(operator.le, other, counts)) for other in least):
                    least.append(counts)
            return [Tokens(*counts) for counts in least]
        while self.costs[0][1] not in self.waiting:
            heapq.heappop(self.costs)
        return (self.costs[0][0],)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of some requests, in the order of the trace.

    Attributes
    ----------
    rows : int64 array
        Their numbers in the trace, from 0.
    codes : uint8 array
        0 if it was admitted, otherwise the `Limit` for which it was denied.
    waited_ns : int64 array
        From its arrival to its admission or denial.
    over : bool array
        Admitted over a limit, because the action is `warn`.
    retry_after_ms : int64 array
        What a denied request was told; 0 if it was admitted, -1 if no wait helps.
    """

    rows: Int64Array
    codes: npt.NDArray[np.uint8]
    waited_ns: Int64Array
    over: npt.NDArray[np.bool_]
    retry_after_ms: Int64Array


class Simulation:
    """One run of requests over a manager with a `ManualClock`, which is at 0 or later.

    The requests are fed in parts, and what is undecided at the end of one part is decided in a later one: the parts
    make no difference.

    Parameters
    ----------
    manager : ResourceQuotaManager
    groups : sequence of tuple of str
        The ids of each group of requests; `add_group` adds more.
    wait : bool
        Whether requests that throttle or queue wait, rather than being denied at once.
    held : bool
        Whether requests have durations, and hold concurrency for that long.
    first : int
        The number of the first request.

    Attributes
    ----------
    most_waiting : int
        The most requests that waited at one time so far.
    most_open : int
        The most requests that were admitted and not finished; 0 if nothing is held.
    """

    def __init__(
        self,
        manager: ResourceQuotaManager,
        groups: Sequence[tuple[str, ...]],
        *,
        wait: bool,
        held: bool = False,
        first: int = 0,
    ) -> None:
        clock = manager.clock
        assert clock is not None
        self._manager = manager
        self._clock = clock
        self._wait = wait
        self._held = held
        self._groups: list[_Group] = []
        self._warns = False
        for ids in groups:
            self.add_group(ids)
        self._busy: set[_Group] = set()
        self._done: list[_SimulatedWaiter] = []
        self._releases: list[tuple[int, int, Grant, TokenCount | None]] = []
        self._deadlines: list[tuple[int, int, _SimulatedWaiter]] = []
        self._next_ns = NEVER  # of all releases, deadlines and groups: the earliest
        self._serial = 0
        self._in_row = 0
        self._waiting = self.most_waiting = 0
        self._open = self.most_open = 0
        # Of this part: the number of its first request, and one more than that of its last.
        self._first = self._end = first
        # What became of requests of earlier parts, each as a row of `Outcome`.
        self._late: list[tuple[int, int, int, bool, int]] = []

    def add_group(self, ids: tuple[str, ...]) -> None:
        """Add a group; its number is one more than that of the last."""
        group = _Group(ids, self._manager)
        self._groups.append(group)
        self._warns = self._warns or group.warns
        self._codes_of_all: Int64Array | None = None

    def feed(
        self,
        times_ns: Int64Array,
        group_index: npt.NDArray[np.integer] | None,
        tokens: Int64Array,
        *,
        reserved: Int64Array | None = None,
        durations_ns: Int64Array | None = None,
        priorities: Int64Array | None = None,
    ) -> Outcome:
        """Run the next requests, given in order of time; return what has been decided by the time of the last.

        Parameters
        ----------
        times_ns : int64 array
            When each request arrives.
        group_index : integer array or None
            The group of each request; None if there is only one.
        tokens : int64 array, shape (n,) or (n, 3)
            What it costs; or its input, cached and output tokens.
        reserved : int64 array, optional
            What is reserved until the request ends and is settled by `tokens`, of the same shape; only if it is held.
        durations_ns : int64 array, optional
            From admission to release, if requests are held; by default 0.
        priorities : int64 array, optional
            As for `acquire`; 0 by default.
        """
        requests = len(times_ns)
        self._begin(requests)
        self._times_ns, self._tokens = times_ns, tokens
        self._durations_ns, self._reserved = durations_ns, reserved
        # A batch does not say which requests were admitted over a limit.
        codes = None if self._warns or self._held else self._codes_of_groups()
        for start in range(0, requests, REQUESTS_PER_STEP):
            part = slice(start, min(start + REQUESTS_PER_STEP, requests))
            times = times_ns[part].tolist()
            costs = token_counts((tokens if reserved is None else reserved)[part])
            groups = [0] * len(times) if group_index is None else group_index[part].tolist()
            ranks = [0] * len(times) if priorities is None else priorities[part].tolist()
            if self._held:
                self._step_held(start, times, groups, costs, ranks)
            else:
                self._step(start, times, groups, costs, ranks, None if codes is None else codes[groups])
        return self._outcome()

    def finish(self) -> Outcome:
        """Let time pass until none waits; return what became of those that did."""
        self._begin(0)
        while self._next_ns < NEVER:
            self._go_to(self._next_ns)
        return self._outcome()

    def abandon(self) -> None:
        """Leave the queues and release what is held; nothing can be fed after this."""
        for group in self._groups:
            while group.waiting:
                group.waiting.popitem()[1].leave()
        self._done.clear()
        for _, _, grant, _ in self._releases:
            grant.release()
        self._releases.clear()

    def __del__(self) -> None:
        self.abandon()  # a waiter has to leave its queues before it goes

    def _begin(self, requests: int) -> None:
        self._first = self._end
        self._end += requests
        self._codes = np.zeros(requests, np.uint8)
        self._waited_ns = np.zeros(requests, np.int64)
        self._over = np.zeros(requests, np.bool_)
        self._retry_after_ms = np.zeros(requests, np.int64)
        self._decided = np.ones(requests, np.bool_)

    def _outcome(self) -> Outcome:
        """Return what became of requests of earlier parts, and then of those of this one."""
        rows = np.arange(self._first, self._end)
        columns: tuple[npt.NDArray[Any], ...]
        columns = rows, self._codes, self._waited_ns, self._over, self._retry_after_ms
        if not self._decided.all():
            columns = tuple(column[self._decided] for column in columns)
        if self._late:
            late = sorted(self._late)
            columns = tuple(
                np.concatenate((np.array([row[place] for row in late], column.dtype), column))
                for place, column in enumerate(columns)
            )
            self._late.clear()
        return Outcome(*columns)

    def _codes_of_groups(self) -> Int64Array:
        """Return a row of codes for each group, with 0 after the last."""
        if self._codes_of_all is not None:
            return self._codes_of_all
        ids = [group.ids if isinstance(group.ids, tuple) else (group.ids,) for group in self._groups]
        codes = np.zeros((len(ids), max(map(len, ids), default=1)), np.int64)
        for row, names in zip(codes, ids, strict=True):
            row[: len(names)] = self._manager.codes(names)
        self._codes_of_all = codes
        return codes

    def _step(
        self,
        start: int,
        times: list[int],
        groups: list[int],
        costs: list[TokenCount],
        ranks: list[int],
        codes: Int64Array | None,
    ) -> None:
        """Requests that hold nothing: a check that admits is all there is to do, and while none waits also at once."""
        now_ns = self._clock.now_ns
        advance_ns, check = self._clock.advance_ns, self._manager.check_quota
        all_groups = self._groups
        in_row, size = self._in_row, LEAST_AT_ONCE
        index = -1
        while (index := index + 1) < len(times):
            if in_row >= LEAST_AT_ONCE and codes is not None and not self._busy and self._next_ns == NEVER:
                tried = codes[index : index + size]
                admitted = self._admit_at_once(start, index, tried)
                now_ns = self._clock.now_ns
                in_row, size = (in_row, 2 * size) if admitted == len(tried) else (0, LEAST_AT_ONCE)
                if admitted:
                    index += admitted - 1
                    continue
            at_ns = times[index]
            if self._next_ns <= at_ns:
                while self._next_ns <= at_ns:
                    self._go_to(self._next_ns)
                now_ns = self._clock.now_ns
            if at_ns != now_ns:
                advance_ns(at_ns - now_ns)
                now_ns = at_ns
                if self._done:
                    self._settle()
            group = all_groups[groups[index]]
            if self._busy:  # as a grant that is released at once, since a release makes the queues look again
                in_row = 0
                self._enter(start + index, group, costs[index], ranks[index])
                continue
            result = check(group.ids, costs[index])
            if result:
                in_row += 1
                if result.limit is not None:
                    self._over[start + index] = True
                continue
            in_row = 0
            if self._wait and result.action in WAITING_ACTIONS:
                self._enter(start + index, group, costs[index], ranks[index])
            else:
                self._deny(self._first + start + index, 0, False, result)
        self._in_row = in_row

    def _admit_at_once(self, start: int, index: int, codes: Int64Array) -> int:
        """Admit requests until one is denied; return how many. The next one is to be tried again by itself."""
        part = slice(start + index, start + index + len(codes))
        decided = self._manager._check_until_denied(codes, self._tokens[part], self._codes[part], self._times_ns[part])
        last = part.start + decided - 1
        if not self._codes[last]:
            return decided
        self._codes[last] = 0
        return decided - 1

    def _step_held(
        self, start: int, times: list[int], groups: list[int], costs: list[TokenCount], ranks: list[int]
    ) -> None:
        """Requests that hold concurrency, and maybe tokens, until they end."""
        for index, at_ns in enumerate(times):
            while self._next_ns <= at_ns:
                self._go_to(self._next_ns)
            if at_ns != self._clock.now_ns:
                self._clock.advance_ns(at_ns - self._clock.now_ns)
                if self._done:
                    self._settle()
            self._enter(start + index, self._groups[groups[index]], costs[index], ranks[index])

    # -- events

    def _enter(self, place: int, group: _Group, cost: TokenCount, priority: int) -> None:
        """Try to admit a request of this part, or let it wait."""
        now_ns = self._clock.now_ns
        over = False
        if self._warns:
            seen = self._manager.peek_quota(group.ids, cost)
            over = self._over[place] = seen.allowed and seen.limit is not None
        index = self._first + place
        waiter = _SimulatedWaiter(index, group, cost, now_ns, over, self._done)
        timeout = None if self._wait else 0
        try:
            outcome = self._manager._admit_or_queue(waiter, group.ids, cost, 0, 0, timeout, priority, nowait=False)
        except QuotaExceededError as error:
            self._deny(index, 0, over, error.result)
            return
        assert outcome is not None  # no other process or thread can hold a lock
        if self._durations_ns is not None:
            waiter.duration_ns = max(int(self._durations_ns[place]), 0)
        if self._reserved is not None:
            waiter.used = token_counts(self._tokens[place : place + 1])[0]
        if isinstance(outcome, Grant):
            self._hold(waiter, outcome)
            if self._done:
                self._settle()
                self._look()
            return
        if waiter.done:  # at the first look of the queue
            self._settle()
            return
        self._decided[place] = False
        group.add(waiter)
        for grace_ns in group.grace_ns:
            self._serial += 1
            heapq.heappush(self._deadlines, (now_ns + grace_ns, self._serial, waiter))
        self._waiting += 1
        self.most_waiting = max(self.most_waiting, self._waiting)
        self._busy.add(group)
        group.dirty = True
        self._look()

    def _hold(self, waiter: _SimulatedWaiter, grant: Grant) -> None:
        """Hold what was granted until the request ends."""
        if not self._held:
            grant.release()
            return
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        self._serial += 1
        ends_ns = self._clock.now_ns + waiter.duration_ns
        heapq.heappush(self._releases, (ends_ns, self._serial, grant, waiter.used))
        self._next_ns = min(self._next_ns, ends_ns)

    def _deny(self, index: int, waited_ns: int, over: bool, result: QuotaCheckResult) -> None:
        assert result.limit is not None
        retry_ms = result.retry_after_ms
        self._put(index, result.limit, waited_ns, over, -1 if retry_ms is None else retry_ms)

    def _put(self, index: int, code: int, waited_ns: int, over: bool, retry_after_ms: int) -> None:
        place = index - self._first
        if place < 0:
            self._late.append((index, code, waited_ns, over, retry_after_ms))
            return
        self._codes[place] = code
        self._waited_ns[place] = waited_ns
        self._retry_after_ms[place] = retry_after_ms
        self._decided[place] = True

    def _go_to(self, at_ns: int) -> None:
        """Move the clock, which serves the queues, and end what ends now."""
        now_ns = self._clock.now_ns
        if at_ns > now_ns:
            self._clock.advance_ns(at_ns - now_ns)
        self._settle()
        released = False
        while self._releases and self._releases[0][0] <= at_ns:
            _, _, grant, used = heapq.heappop(self._releases)
            if used is not None:
                grant.settle(used)
            grant.release()
            self._open -= 1
            released = True
            self._settle()
        for group in self._busy:
            if released or group.next_ns <= at_ns:
                group.dirty = True
        self._look()

    def _settle(self) -> None:
        """Take what the queues have decided."""
        while self._done:
            waiter = self._done.pop(0)
            group, index = waiter.group, waiter.index
            if group.waiting.pop(index, None) is not None:
                self._waiting -= 1
            group.dirty = True
            waited_ns = self._clock.now_ns - waiter.arrived_ns
            try:
                grant = waiter.take()
            except QuotaExceededError as error:
                self._deny(index, waited_ns, waiter.over, error.result)
            else:
                self._put(index, 0, waited_ns, waiter.over, 0)
                self._hold(waiter, grant)
            waiter.leave()

    def _look(self) -> None:
        """Find the next event that is not an arrival."""
        now_ns = self._clock.now_ns
        next_ns = self._releases[0][0] if self._releases else NEVER
        deadlines = self._deadlines
        while deadlines and (deadlines[0][2].done or deadlines[0][0] <= now_ns):
            heapq.heappop(deadlines)
        if deadlines:
            next_ns = min(next_ns, deadlines[0][0])
        for group in list(self._busy):
            if group.dirty:
                group.dirty = False
                if not group.waiting:
                    self._busy.discard(group)
                    group.next_ns = NEVER
                    continue
                group.next_ns = self._ready_ns(group, now_ns)
            next_ns = min(next_ns, group.next_ns)
        self._next_ns = next_ns

    def _ready_ns(self, group: _Group, now_ns: int) -> int:
        """When the first of a group may fit if nothing is released: of equals, the smallest is the first."""
        ready_ns = NEVER
        for cost in group.least_costs():
            result = self._manager.peek_quota(group.ids, cost)
            if result:
                return now_ns + NS_PER_MS
            if result.retry_after_ms is not None:
                ready_ns = min(ready_ns, now_ns + max(result.retry_after_ms, 1) * NS_PER_MS)
        return ready_ns


def token_counts(tokens: Int64Array) -> list[TokenCount]:
    """Return the rows of an array of tokens, with one column or three, as what verbs accept."""
    rows = tokens.tolist()
    return rows if tokens.ndim == 1 else [Tokens(*row) for row in rows]
