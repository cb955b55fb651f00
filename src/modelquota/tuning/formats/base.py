"""What a format of traces says about itself: its columns by role, its unit of time, and what marks it."""

import enum
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from modelquota.tuning.cells import Int64Array


class Kind(enum.Enum):
    """What the cells of a column are, and so how they are parsed."""

    TIME = "time"
    """A timestamp, or a number in the format's unit of time."""
    DURATION = "duration"
    """A number in the format's unit of time."""
    TOKENS = "tokens"
    NAME = "name"
    INTEGER = "integer"
    BLOCKS = "blocks"
    """A list of ids, one for each block of the prompt."""


ROLES: dict[str, Kind] = {
    "time": Kind.TIME,
    "delay": Kind.DURATION,
    "prompt": Kind.TOKENS,
    "cached": Kind.TOKENS,
    "output": Kind.TOKENS,
    "estimated": Kind.TOKENS,
    "model": Kind.NAME,
    "user": Kind.NAME,
    "duration": Kind.DURATION,
    "priority": Kind.INTEGER,
    "blocks": Kind.BLOCKS,
}
"""The roles that a column can have. `prompt` includes the tokens that are `cached`; `estimated` is what a request
reserved, of all kinds; `delay` is the time since the same user's request before, if there is no `time`."""


@dataclass(frozen=True, slots=True)
class Format:
    """One format of traces.

    Attributes
    ----------
    name : str
        What ``--format`` takes.
    title : str
        How messages name it.
    container : str
        ``"CSV"`` or ``"JSONL"``.
    columns : mapping of str to str
        The column, or key, of each role that the format has.
    required : collection of str
        The roles that every row has.
    marks : collection of str
        Columns that other formats do not have; a trace with any of them, and all that are required, is of this format.
        Empty if the required columns tell.
    time_unit : str
        ``"timestamp"``, or one of ``"s"``, ``"ms"``, ``"us"`` and ``"ns"``.
    absolute : bool
        Whether numeric times count from 1970; otherwise they count from some moment that is not known.
    block_tokens : int
        How many tokens of the prompt a block id is for.
    may_be_torn : bool
        Whether a line that was cut off, since its writer was killed, is skipped and counted rather than refused.
    unused : collection of str
        Columns that the format has and that are of no use here: they are not reported as ignored.
    """

    name: str
    title: str
    container: str
    columns: Mapping[str, str]
    required: Collection[str]
    marks: Collection[str] = ()
    time_unit: str = "timestamp"
    absolute: bool = False
    block_tokens: int = 0
    may_be_torn: bool = False
    unused: Collection[str] = ()

    def required_columns(self) -> tuple[str, ...]:
        """The columns that every row has, as written in the file."""
        return tuple(self.columns[role] for role in self.columns if role in self.required)

    def fits(self, names: Collection[str]) -> bool:
        """Whether a trace with these columns, in lower case, is of this format."""
        has = all(column.lower() in names for column in self.required_columns())
        return has and (not self.marks or any(mark.lower() in names for mark in self.marks))

    def requests(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the records of a JSONL block that are requests."""
        return records

    def values(self, role: str, records: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return what each record has for a role; None if it has nothing. A required key that is missing: KeyError."""
        column = self.columns[role]
        try:
            return list(map(itemgetter(column), records))
        except KeyError:
            if role in self.required:
                raise
            return [record.get(column) for record in records]

    def finish(self, columns: dict[str, Int64Array], users: Int64Array | None) -> int:
        """Complete columns, in the order of the file; return for how many rows there is something to tell.

        The columns are those of a whole trace, or if every row of it has a time, of a part.
        """
        return 0

    def note(self, rows: int) -> str:
        """Return what the reader should be told of so many rows."""
        raise NotImplementedError
