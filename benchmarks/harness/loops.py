"""Statements timed as `timeit` times them, but unrolled: of some 50 ns a statement the loop must not be a part.

A *round* is a function without arguments that does some work and returns nanoseconds per operation.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, repeat
from time import perf_counter_ns
from typing import Any

Round = Callable[[], float]

UNROLLED = 50
OPERATIONS = 10_000
ELEMENT = re.compile(r"\beach\b")


class Loop:
    """A statement, repeated.

    Parameters
    ----------
    statement : str
        What is timed; in it `each` stands for an element of `over`.
    over : sequence, optional
        What the statement goes through, `operations` elements in a round, and from the first again after the last.
        As many as divide by that.
    operations : int
        Statements in a round: a multiple of UNROLLED.
    **names
        What the statement refers to, as local variables.
    """

    def __init__(
        self, statement: str, over: Sequence[Any] | None = None, *, operations: int = OPERATIONS, **names: Any
    ) -> None:
        self.operations = operations
        self._run = _unrolled(statement, names, over is not None)
        self._run_empty = _unrolled("pass", {}, over is not None)
        self._rounds = _rounds(over, operations)

    def round_ns(self) -> float:
        """Run the statement `operations` times."""
        return self._run(next(self._rounds)) / self.operations

    def empty_round_ns(self) -> float:
        """Run the loop alone: to be subtracted."""
        return self._run_empty(next(self._rounds)) / self.operations


def _rounds(over: Sequence[Any] | None, operations: int) -> Iterator[Any]:
    """Yield for each round what its loop goes through: an iterable of turns, each of UNROLLED statements."""
    if over is None:
        while True:
            yield repeat(None, operations // UNROLLED)
    turns = [tuple(over[i : i + UNROLLED]) for i in range(0, len(over), UNROLLED)]
    per_round = operations // UNROLLED
    yield from cycle([turns[i : i + per_round] for i in range(0, len(turns), per_round)])


def _unrolled(statement: str, names: dict[str, Any], goes_through: bool) -> Callable[[Any], int]:
    """Compile a function that runs the statement UNROLLED times a turn and returns nanoseconds."""
    elements = [f"each_{i}" for i in range(UNROLLED)]
    # Parameters with defaults, so that the statement finds what it names as fast as any function finds its locals.
    parameters = "".join(f", {name}={name}" for name in names)
    lines = [
        f"def run(turns, now_ns=now_ns{parameters}):",
        "    start_ns = now_ns()",
        f"    for {', '.join(elements) if goes_through else '_'} in turns:",
        *(f"        {ELEMENT.sub(element, statement)}" for element in elements),
        "    return now_ns() - start_ns",
    ]
    scope = {"now_ns": perf_counter_ns, **names}
    exec(compile("\n".join(lines), f"<{statement}>", "exec"), scope)
    return scope["run"]


def batch_round(batches: Sequence[tuple[Any, ...]], call: Callable[..., Any]) -> Round:
    """Return a round that calls ``call(*batch)`` for all batches; an operation is one element of a batch."""
    elements = sum(len(batch[0]) for batch in batches)

    def round_ns() -> float:
        start_ns = perf_counter_ns()
        for batch in batches:
            call(*batch)
        return (perf_counter_ns() - start_ns) / elements

    return round_ns


def least_of_rounds(count: int, **rounds: Round) -> dict[str, float]:
    """Run rounds in turn, `count` of each, and return the least that each has given."""
    least = dict.fromkeys(rounds, float("inf"))
    for _ in range(count):
        for name, round_ns in rounds.items():
            least[name] = min(least[name], round_ns())
    return least
