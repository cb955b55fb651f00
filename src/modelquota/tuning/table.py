"""The columns of a trace while it is read: collected block by block, in the order of the file."""

from collections.abc import Mapping, Sequence

import numpy as np

from modelquota.tuning.cells import (
    MAX_SPAN_NS,
    MISSING,
    UNITS_NS,
    BadCell,
    BadRow,
    Int64Array,
    parse_name,
    parse_number,
    parse_timestamp,
    parse_tokens,
    too_far,
)
from modelquota.tuning.formats.base import ROLES, Format, Kind
from modelquota.tuning.formats.prefix import PrefixBlocks

Parsed = dict[str, Int64Array]


class Table:
    """What is known of a trace after some blocks. A block with a bad row adds nothing.

    Parameters
    ----------
    format : Format
    columns : mapping of str to str
        The column of each role that this trace has.
    time_unit : str
        As in `Format`.
    """

    def __init__(self, format: Format, columns: Mapping[str, str], time_unit: str) -> None:
        self.format = format
        self.columns = dict(columns)
        self.time_unit = time_unit
        self.unit_ns = UNITS_NS.get(time_unit, 0)
        self.names: dict[str, dict[str, int]] = {role: {} for role in columns if ROLES[role] is Kind.NAME}
        self.origin_ns: int | None = 0 if self.unit_ns else None
        self.has_offset = False
        self.rows = 0
        self.taken = 0  # rows before these
        self.torn = 0
        blocks = columns.get("blocks")
        self.prefix = PrefixBlocks(format.block_tokens, blocks) if blocks is not None else None
        self._parts: dict[str, list[Int64Array]] = {role: [] for role in columns if role != "blocks"}
        if self.prefix is not None and "cached" not in columns:
            self._parts["cached"] = []
        self._earliest_ns: int | None = None
        self._latest_ns = 0
        # Of each block: its first row, and the lines of its rows, or of the first one if no line is skipped.
        self._lines: list[tuple[int, int | list[int]]] = []

    def required(self, role: str) -> bool:
        """Whether each row has to have a value; a model that is named in some rows is to be named in all."""
        return role == "model" or role in self.format.required

    # -- one cell

    def value(self, role: str, cell: object) -> int:
        """Return a cell as its column has it: ns since the origin, ns, a count, or the number of a name."""
        kind = ROLES[role]
        if (cell is None or cell == "") and not self.required(role):
            return -1 if kind is Kind.NAME else MISSING
        if kind is Kind.TIME:
            return self._time(cell)
        if kind is Kind.TOKENS:
            return parse_tokens(cell)
        if kind is Kind.NAME:
            return self.name(role, parse_name(cell))
        if kind is Kind.DURATION:
            unit = self.time_unit if self.unit_ns else "s"
            return parse_number(cell, UNITS_NS[unit], f"a duration of 0 or more, in {unit}")
        return _integer(cell)

    def name(self, role: str, name: str) -> int:
        names = self.names[role]
        return names.setdefault(name, len(names))

    def _time(self, cell: object) -> int:
        if self.unit_ns:
            return parse_number(cell, self.unit_ns, f"a time as a number of {self.time_unit}, 0 or more")
        if not isinstance(cell, str):
            raise BadCell(f"expected a time as text; say --time-unit if {cell!r} is a number of s, ms, us or ns")
        try:
            time_ns, has_offset = parse_timestamp(cell)
        except BadCell as bad:
            if cell.strip().replace(".", "", 1).isdigit():
                raise BadCell(f"{bad}; say --time-unit if this is a number of s, ms, us or ns") from None
            raise
        if self.origin_ns is None:
            self.origin_ns, self.has_offset = time_ns, has_offset
        if has_offset != self.has_offset:
            here, there = ("an", "none") if has_offset else ("no", "one")
            raise BadCell(f"{cell!r} has {here} offset from UTC, the first request has {there}")
        return time_ns - self.origin_ns

    # -- a block

    def add_rows(self, rows: Sequence[Mapping[str, object]], line_numbers: int | list[int]) -> None:
        """Add rows, each a mapping of roles to cells, parsed one at a time; raise BadRow for the first that is bad."""
        parsed: dict[str, list[int]] = {role: [] for role in self._parts}
        lists: list[Sequence[int | str] | None] = []
        earliest_ns, latest_ns = self._earliest_ns, self._latest_ns
        for index, row in enumerate(rows):
            for role, column in self.columns.items():
                if role == "blocks":
                    continue
                try:
                    value = self.value(role, row[role])
                    if role == "time" and value != MISSING:
                        earliest_ns = value if earliest_ns is None else min(earliest_ns, value)
                        latest_ns = max(latest_ns, value)
                        if latest_ns - earliest_ns > MAX_SPAN_NS:
                            raise BadCell(too_far(row[role]))
                except BadCell as bad:
                    raise BadRow(index, column, str(bad)) from None
                parsed[role].append(value)
            if self.prefix is not None:
                blocks = row["blocks"]
                if blocks is not None and not isinstance(blocks, list):
                    raise BadRow(index, self.columns["blocks"], f"expected a list of block ids, found {blocks!r:.40}")
                lists.append(blocks)
        if not rows:
            return
        arrays = {role: np.array(values, np.int64) for role, values in parsed.items() if role in self.columns}
        self.add(arrays, lists if self.prefix is not None else None, line_numbers)

    def fits_span(self, times_ns: Int64Array) -> bool:
        """Whether a block's times, of which none is missing, are near enough to those before."""
        earliest_ns, latest_ns = int(times_ns.min()), int(times_ns.max())
        if self._earliest_ns is not None:
            earliest_ns, latest_ns = min(earliest_ns, self._earliest_ns), max(latest_ns, self._latest_ns)
        return latest_ns - earliest_ns <= MAX_SPAN_NS

    def add(
        self,
        block: Parsed,
        lists: Sequence[Sequence[int | str] | None] | None,
        line_numbers: int | list[int],
    ) -> None:
        """Add a block of at least one row; `fits_span` has been asked."""
        if self.prefix is not None and lists is not None and "cached" not in self.columns:
            block["cached"] = self.prefix.cached(lists, block["prompt"])
        if "time" in block:
            times_ns = block["time"][block["time"] != MISSING]
            if len(times_ns):
                first, last = int(times_ns.min()), int(times_ns.max())
                self._earliest_ns = first if self._earliest_ns is None else min(self._earliest_ns, first)
                self._latest_ns = max(self._latest_ns, last)
        self._lines.append((self.rows, line_numbers))
        for role, values in block.items():
            self._parts[role].append(values)
        self.rows += len(next(iter(block.values())))

    def line_of(self, row: int) -> int:
        """Return the line of a row that was not taken, both in the order of the file."""
        at = max(i for i, (first, _) in enumerate(self._lines) if first <= row)
        first, lines = self._lines[at]
        return lines + row - first if isinstance(lines, int) else lines[row - first]

    def column(self, role: str) -> Int64Array | None:
        """Return a whole column; None if the trace does not have it."""
        parts = self._parts.get(role)
        if parts is None:
            return None
        if len(parts) != 1:
            parts[:] = [np.concatenate(parts) if parts else np.zeros(0, np.int64)]
        return parts[0]

    def whole(self) -> Parsed:
        """Return all columns."""
        return {role: column for role in self._parts if (column := self.column(role)) is not None}

    def take(self) -> Parsed:
        """Return all columns, and keep no rows of them."""
        columns = self.whole()
        for parts in self._parts.values():
            parts.clear()
        self._lines.clear()
        self.taken += self.rows
        self.rows = 0
        return columns


def _integer(cell: object) -> int:
    try:
        number = int(cell) if isinstance(cell, str) else cell
    except ValueError:
        number = None
    if type(number) is not int or not -(2**31) < number < 2**31:
        raise BadCell(f"expected an integer, -(2**31) < n < 2**31, found {cell!r:.40}")
    return number
