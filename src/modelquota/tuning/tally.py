"""Sums over a replay, taken while it goes on: memory is for groups of requests, and for a second of them, not for all.

A group is one model's requests, or one user's. All groups are summed at once, since there may be many users.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from modelquota.quota.limits import Limit
from modelquota.tuning.cells import NS_PER_SECOND, Int64Array
from modelquota.tuning.report import ModelReplay
from modelquota.tuning.simulate import NS_PER_MS, Outcome

__all__ = ["Requests", "Tally", "joined"]

# So many different values of a sample are kept as they are. Of more, only the first 14 binary digits are. They are
# counted when as many have come again, so that this costs little for each.
MOST_VALUES = 1 << 19
DROPPED_BITS = 52 - 13

# The columns of sums: of requests that were warned, that no wait helps, that waited, that timed out, and of tokens.
WARNED, NEVER, WAITED, TIMED_OUT, TOKENS, TOKENS_ADMITTED = range(6)
SUMS = 6


@dataclass(frozen=True, slots=True)
class Requests:
    """Some requests, in order of time: when each came, its tokens of all kinds, and its group, or -1."""

    times_ns: Int64Array
    tokens: Int64Array
    groups: npt.NDArray[np.integer]

    def __getitem__(self, rows: npt.NDArray[np.intp] | npt.NDArray[np.bool_]) -> "Requests":
        return Requests(self.times_ns[rows], self.tokens[rows], self.groups[rows])

    def __len__(self) -> int:
        return len(self.times_ns)


def joined(parts: Sequence[Requests]) -> Requests:
    """Return the requests of all parts."""
    if len(parts) == 1:
        return parts[0]
    return Requests(
        np.concatenate([part.times_ns for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.groups for part in parts]),
    )


class Tally:
    """What became of the requests of each group."""

    def __init__(self) -> None:
        self._groups = 0
        self._counts = np.zeros((0, max(Limit) + 1), np.int64)
        self._sums = np.zeros((0, SUMS), np.int64)
        self._asked = _Peaks()
        self._admitted: _Peaks | None = None  # the same, as long as all is admitted when it comes
        self._waits = _Samples()
        self._retries = _Samples()

    def grow(self, groups: int) -> None:
        """Have so many groups, if there are not more."""
        if groups > self._groups:
            self._groups = groups
            self._counts, self._sums = _grown(self._counts, groups), _grown(self._sums, groups)

    def add(self, asked: Requests, decided: Requests, outcome: Outcome) -> None:
        """Add requests that came, and what became of requests, which may have come before.

        Both are in order of time, and no earlier than those of the call before; `decided` is `asked` if these are the
        same requests.
        """
        codes, waited_ns = outcome.codes, outcome.waited_ns
        at_once = decided is asked and not codes.any() and not waited_ns.any()
        if self._admitted is None and not at_once:
            self._admitted = copy.deepcopy(self._asked)
        groups, tokens = asked.groups, asked.tokens
        self._asked.add(asked, self._groups)
        self._sum(TOKENS, groups, tokens)
        groups, tokens = decided.groups, decided.tokens
        self._count(groups, codes)
        if outcome.over.any():
            self._sum(WARNED, groups, outcome.over)
        if at_once:
            self._sum(TOKENS_ADMITTED, groups, tokens)
            if self._admitted is not None:
                self._admitted.add(asked, self._groups)
            return
        admitted = codes == 0
        waits = waited_ns > 0
        retry_after_ms = outcome.retry_after_ms
        self._sum(NEVER, groups, retry_after_ms < 0)
        self._sum(WAITED, groups, admitted & waits)
        self._sum(TIMED_OUT, groups, ~admitted & waits)
        self._sum(TOKENS_ADMITTED, groups, np.where(admitted, tokens, 0))
        self._waits.add(waited_ns, groups, admitted & waits)
        self._retries.add(retry_after_ms, groups, retry_after_ms > 0)
        at_ns = decided.times_ns + waited_ns
        rows = np.flatnonzero(admitted)
        if waits.any():
            rows = rows[np.argsort(at_ns[rows], kind="stable")]
        assert self._admitted is not None
        self._admitted.add(Requests(at_ns[rows], tokens[rows], groups[rows]), self._groups)

    def warned(self, group: int, count: int) -> None:
        """Add requests of a group that were admitted over a limit."""
        self._sums[group, WARNED] += count

    def denied(self, group: int) -> int:
        """Return how many requests of a group were denied so far."""
        return int(self._counts[group, 1:].sum())

    def _count(self, groups: npt.NDArray[np.integer], codes: npt.NDArray[np.uint8]) -> None:
        """Count what was decided."""
        named = groups >= 0
        groups, codes = groups[named], codes[named]
        cells = groups.astype(np.int64) * self._counts.shape[1] + codes
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)

    def _sum(self, column: int, groups: npt.NDArray[np.integer], values: npt.NDArray[np.integer | np.bool_]) -> None:
        """Add up values."""
        if self._groups == 1:
            self._sums[0, column] += int(values[groups == 0].sum())
        else:
            named = groups >= 0
            np.add.at(self._sums[:, column], groups[named], values[named].astype(np.int64))

    def reports(self, names: dict[int, str]) -> tuple[ModelReplay, ...]:
        """Return the part of each of some groups, by their numbers."""
        asked = self._asked.peaks(self._groups)
        admitted = asked if self._admitted is None else self._admitted.peaks(self._groups)
        waits, retries = self._waits.sorted(self._groups), self._retries.sorted(self._groups)
        found = []
        for group, name in names.items():
            counts, (warned, never, waited, timed_out, tokens, tokens_admitted) = (
                each[group].tolist() for each in (self._counts, self._sums)
            )
            in_order, retry = waits.of(group), retries.of(group)
            found.append(
                ModelReplay(
                    model_id=name,
                    requests=sum(counts),
                    admitted=counts[0],
                    warned=warned,
                    denied={limit: counts[limit] for limit in Limit},
                    never=never,
                    waited=waited,
                    timed_out=timed_out,
                    median_wait_ms=None if in_order is None else in_order.median(NS_PER_MS),
                    p99_wait_ms=None if in_order is None else in_order.percentile(99, NS_PER_MS),
                    longest_wait_ms=None if in_order is None else in_order.largest / NS_PER_MS,
                    tokens=tokens,
                    tokens_admitted=tokens_admitted,
                    longest_retry_after_ms=None if retry is None else retry.largest,
                    median_retry_after_ms=None if retry is None else retry.median(),
                    peak_requests=int(admitted[0][group]),
                    peak_tokens=int(admitted[1][group]),
                    peak_requests_asked=int(asked[0][group]),
                    peak_tokens_asked=int(asked[1][group]),
                )
            )
        return tuple(found)


def _grown(array: Int64Array, length: int) -> Int64Array:
    grown = np.zeros((length, *array.shape[1:]), np.int64)
    grown[: len(array)] = array
    return grown


class _Peaks:
    """The most requests and the most tokens of each group in any half-open second."""

    def __init__(self) -> None:
        self._requests = np.zeros(0, np.int64)
        self._tokens = np.zeros(0, np.int64)
        # The requests of the last second, and those that came since they were looked at.
        self._last: list[Requests] = []
        self._new: list[Requests] = []

    def add(self, requests: Requests, groups: int) -> None:
        if (requests.groups < 0).any():
            requests = requests[requests.groups >= 0]
        if not len(requests):
            return
        self._new.append(requests)
        # While a second has more requests than a part, it is not looked at again with each part.
        if sum(map(len, self._new)) >= sum(map(len, self._last)):
            self._look(groups)

    def peaks(self, groups: int) -> tuple[Int64Array, Int64Array]:
        self._look(groups)
        return self._requests, self._tokens

    def _look(self, groups: int) -> None:
        if len(self._requests) < groups:
            self._requests, self._tokens = _grown(self._requests, groups), _grown(self._tokens, groups)
        if not self._new:
            return
        requests = joined([*self._last, *self._new])
        self._new.clear()
        self._find(requests)
        self._last = [requests[np.flatnonzero(requests.times_ns > requests.times_ns[-1] - NS_PER_SECOND)]]

    def _find(self, requests: Requests) -> None:
        times_ns, tokens, groups = requests.times_ns, requests.tokens, requests.groups
        # The busiest second can be assumed to start with a request.
        ends = np.searchsorted(times_ns, times_ns + NS_PER_SECOND, side="left")
        if len(self._requests) == 1:
            starts = np.zeros(1, np.intp)
            present: npt.NDArray[np.integer] = starts
        else:
            order = np.argsort(groups, kind="stable")
            groups, tokens = groups[order].astype(np.int64), tokens[order]
            starts = np.flatnonzero(np.concatenate(([True], groups[1:] != groups[:-1])))
            present = groups[starts]
            # Among the requests of its group, in the same order as all requests.
            least = groups * (len(groups) + 1)
            ends = np.searchsorted(least + order, least + ends[order], side="left")
        before = np.concatenate((np.zeros(1, np.int64), np.cumsum(tokens)))
        for most, counts in (
            (self._requests, ends - np.arange(len(ends))),
            (self._tokens, before[ends] - before[:-1]),
        ):
            most[present] = np.maximum(most[present], np.maximum.reduceat(counts, starts))


class _Samples:
    """Values of groups, each with how often it occurs."""

    def __init__(self) -> None:
        self._groups = np.zeros(0, np.int32)
        self._values = np.zeros(0, np.int64)
        self._counts = np.zeros(0, np.int64)
        self._largest: Int64Array = np.zeros(0, np.int64)
        self._rounded = False
        self._new: list[tuple[npt.NDArray[np.int32], Int64Array]] = []
        self._waiting = 0

    def add(self, values: Int64Array, groups: npt.NDArray[np.integer], which: npt.NDArray[np.bool_]) -> None:
        """Add the values of some requests, above 0."""
        rows = np.flatnonzero(which & (groups >= 0))
        if not len(rows):
            return
        self._new.append((groups[rows].astype(np.int32), values[rows]))
        self._waiting += len(rows)
        if self._waiting >= MOST_VALUES:
            self._merge()

    def sorted(self, groups: int) -> "_Sorted":
        """Return the values in order."""
        self._merge()
        return _Sorted(self._groups, self._values, self._counts, _grown(self._largest, groups))

    def _merge(self) -> None:
        if not self._new:
            return
        groups = np.concatenate([self._groups, *(new for new, _ in self._new)])
        new_values = np.concatenate([new for _, new in self._new])
        new_groups = groups[len(self._groups) :]
        if len(self._largest) <= int(new_groups.max()):
            self._largest = _grown(self._largest, int(new_groups.max()) + 1)
        np.maximum.at(self._largest, new_groups, new_values)
        values = np.concatenate((self._values, _rounded(new_values) if self._rounded else new_values))
        counts = np.concatenate((self._counts, np.ones(len(new_values), np.int64)))
        self._new.clear()
        self._waiting = 0
        self._groups, self._values, self._counts = _distinct(groups, values, counts)
        if len(self._values) > MOST_VALUES and not self._rounded:
            self._rounded = True
            self._groups, self._values, self._counts = _distinct(self._groups, _rounded(self._values), self._counts)


def _distinct(
    groups: npt.NDArray[np.int32], values: Int64Array, counts: Int64Array
) -> tuple[npt.NDArray[np.int32], Int64Array, Int64Array]:
    """Return each value of each group once, in order, with its counts added up."""
    order = np.lexsort((values, groups)) if groups.any() else np.argsort(values)
    groups, values, counts = groups[order], values[order], counts[order]
    new = np.flatnonzero(np.concatenate(([True], (groups[1:] != groups[:-1]) | (values[1:] != values[:-1]))))
    return groups[new], values[new], np.add.reduceat(counts, new)


def _rounded(values: Int64Array) -> Int64Array:
    """Return the values with only their first 14 binary digits, and the middle of what the others could be."""
    digits = values.astype(np.float64).view(np.int64) >> DROPPED_BITS
    rounded: Int64Array = ((digits << DROPPED_BITS) | (1 << (DROPPED_BITS - 1))).view(np.float64).astype(np.int64)
    return rounded


class _Sorted:
    """The values of each group, in order."""

    def __init__(
        self, groups: npt.NDArray[np.int32], values: Int64Array, counts: Int64Array, largest: Int64Array
    ) -> None:
        self._values, self._counts, self._largest = values, counts, largest
        self._starts = np.searchsorted(groups, np.arange(len(largest) + 1))

    def of(self, group: int) -> "_Sample | None":
        part = slice(self._starts[group], self._starts[group + 1])
        if part.start == part.stop:
            return None
        return _Sample(self._values[part], np.cumsum(self._counts[part]), int(self._largest[group]))


@dataclass(frozen=True, slots=True)
class _Sample:
    """The values of one group, and of each how many are not larger."""

    values: Int64Array
    up_to: Int64Array
    largest: int

    def percentile(self, percent: int, unit: int = 1) -> float:
        """Return what `numpy.percentile` does, in so many times the unit of the values."""
        place = percent / 100 * (int(self.up_to[-1]) - 1)
        low = int(place)
        part = place - low
        first, second = (self._at(at) / unit for at in (low, min(low + 1, int(self.up_to[-1]) - 1)))
        more = second - first
        return first + more * part if part < 0.5 else second - more * (1 - part)

    def median(self, unit: int = 1) -> float:
        """Return what `numpy.median` does, likewise."""
        count = int(self.up_to[-1])
        return (self._at((count - 1) // 2) / unit + self._at(count // 2) / unit) / 2

    def _at(self, place: int) -> int:
        """Return a value by its place among all, from 0."""
        return int(self.values[np.searchsorted(self.up_to, place, side="right")])
