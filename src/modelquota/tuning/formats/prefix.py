"""The cached part of prompts, from the ids of their blocks: the blocks in front that an earlier prompt had."""

from array import array
from collections.abc import Hashable, Sequence
from itertools import chain
from typing import cast

import numpy as np

from modelquota.tuning.cells import BadRow, Int64Array, shown


class PrefixBlocks:
    """A prefix cache that forgets nothing: what is cached at most.

    Parameters
    ----------
    block_tokens : int
        Tokens of a block.
    column : str
        The column of the ids, for errors.
    """

    def __init__(self, block_tokens: int, column: str) -> None:
        self._block_tokens = block_tokens
        self._column = column
        self._numbers: dict[Hashable, int] = {}
        # Of each id: the row, from 1 and below 2**32, that had it first; 0 = none.
        self._first_row = np.zeros(1024, np.uint32)
        self._ids = 0
        self._rows = 0

    def cached(self, lists: Sequence[Sequence[int | str] | None], prompts: Int64Array) -> Int64Array:
        """Return how many tokens of each prompt, in the order of the trace, are in blocks that are known."""
        given: Sequence[Sequence[int | str]] = lists  # type: ignore[assignment]
        if set(map(type, lists)) != {list}:
            given = [blocks if blocks is not None else () for blocks in lists]
        if set(map(type, given)) - {list, tuple}:
            index = next(i for i, blocks in enumerate(given) if type(blocks) not in (list, tuple))
            raise BadRow(index, self._column, f"expected a list of block ids, found {shown(given[index])}")
        lengths = np.fromiter(map(len, given), np.int64, len(given))
        ids = self._dense(given, int(lengths.sum()))
        rows = np.repeat(np.arange(len(given)), lengths)
        own = rows + (self._rows + 1)
        if len(ids) and int(ids.max()) >= len(self._first_row):
            grown = np.zeros(max(2 * len(self._first_row), int(ids.max()) + 1), np.uint32)
            grown[: len(self._first_row)] = self._first_row
            self._first_row = grown
        new = self._first_row[ids] == 0
        # Of several assignments to one place numpy keeps the last, so in reverse it keeps the first row.
        self._first_row[ids[new][::-1]] = own[new][::-1]
        missed = np.flatnonzero(self._first_row[ids] == own)
        self._rows += len(given)
        leading = lengths.copy()
        if len(missed):
            of_row = rows[missed]
            first = np.concatenate(([True], of_row[1:] != of_row[:-1]))
            offsets = np.cumsum(lengths) - lengths
            leading[of_row[first]] = missed[first] - offsets[of_row[first]]
        cached: Int64Array = np.minimum(leading * self._block_tokens, prompts)
        return cached

    def _dense(self, lists: Sequence[Sequence[int | str]], count: int) -> Int64Array:
        """Return all ids as small integers: as they are if they are small, otherwise numbered."""
        self._ids += count
        if not count:
            return np.zeros(0, np.int64)
        flat = list(chain.from_iterable(lists))
        if not self._numbers:
            try:
                ids = np.frombuffer(array("q", cast("list[int]", flat)), np.int64)  # twice as fast as from a list
            except (OverflowError, TypeError):
                ids = np.full(1, -1)
            if int(ids.min()) >= 0 and int(ids.max()) < 4 * self._ids + 1_000_000:
                return ids
        numbers = self._numbers
        if not numbers:  # until now the ids were their own numbers
            known = np.flatnonzero(self._first_row)
            numbers.update(zip(known.tolist(), known.tolist(), strict=True))
            self._next = int(known[-1]) + 1 if len(known) else 0
        dense = np.empty(count, np.int64)
        at = 0
        for index, blocks in enumerate(lists):
            for block in blocks:
                if type(block) not in (int, str):
                    raise BadRow(index, self._column, f"expected ids that are integers or text, found {shown(block)}")
                number = numbers.get(block)
                if number is None:
                    number = numbers[block] = self._next
                    self._next += 1
                dense[at] = number
                at += 1
        return dense
