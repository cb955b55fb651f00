"""Reading of CSV into a `Table`, block by block: at once if a block is plain, row by row if it is not."""

import csv
import io
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from modelquota.tuning.cells import (
    MAX_TOKENS,
    UNITS_NS,
    BadCell,
    BadRow,
    Bytes,
    Int64Array,
    decimals,
    integers,
    parse_name,
    parse_timestamp,
    timestamps,
)
from modelquota.tuning.formats.base import ROLES, Kind
from modelquota.tuning.source import NEWLINE
from modelquota.tuning.table import Table

COMMA = ord(",")


class OpenQuote(Exception):
    """A quoted cell goes on in the next block."""


def header_cells(line: str) -> list[str]:
    """Return the cells of a header."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], strict=True), [])]
    except csv.Error as error:
        raise BadRow(0, None, f"not a row of CSV ({error}); is a quotation mark left open?") from None


class CsvReader:
    """Adds the rows below a header to a table.

    Parameters
    ----------
    table : Table
    header : sequence of str
        The cells of the header.
    """

    def __init__(self, table: Table, header: Sequence[str]) -> None:
        self._table = table
        self._width = len(header)
        places = {name.lower(): place for place, name in enumerate(header)}
        self._places = {role: places[column.lower()] for role, column in table.columns.items()}
        # Of each column of names: the number of each spelling.
        self._spellings: dict[str, dict[bytes, int]] = {role: {} for role in table.names}

    def add(self, data: bytes, first_line: int, last: bool) -> None:
        """Add the rows of a block.

        Raises
        ------
        BadRow
            For the first row that is malformed; its index is that of its line in the block.
        OpenQuote
            The block ends within a cell, and is not the last.
        """
        if not self._add_plain(data, first_line):
            self._add_any(data, first_line, last)

    # -- at once

    def _add_plain(self, data: bytes, first_line: int) -> bool:
        if b'"' in data or not data.isascii() or b"\0" in data:
            return False
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
            if b"\r" in data:
                return False
        if not data.endswith(b"\n"):
            data += b"\n"
        letters: Bytes = np.frombuffer(data, np.uint8)
        places = np.flatnonzero((letters == COMMA) | (letters == NEWLINE))
        rows, more = divmod(len(places), self._width)
        if more or not rows:
            return False
        ends: npt.NDArray[np.intp] = places.reshape(rows, self._width)
        found = letters[ends]
        if (found[:, -1] != NEWLINE).any() or (found[:, :-1] != COMMA).any():
            return False
        starts = np.empty_like(ends)
        starts[:, 1:] = ends[:, :-1] + 1
        starts[0, 0] = 0
        starts[1:, 0] = ends[:-1, -1] + 1
        block: dict[str, Int64Array] = {}
        for role, place in self._places.items():
            column = self._column(role, data, letters, starts[:, place].copy(), ends[:, place].copy())
            if column is None:
                return False
            block[role] = column
        if not self._table.fits_span(block["time"]):
            return False
        self._table.add(block, None, first_line)
        return True

    def _column(
        self, role: str, data: bytes, letters: Bytes, starts: Int64Array, ends: Int64Array
    ) -> Int64Array | None:
        kind = ROLES[role]
        table = self._table
        if kind is Kind.NAME:
            return self._names(role, data, starts, ends)
        if kind is Kind.TOKENS:
            counts = integers(letters, starts, ends)
            return counts if counts is not None and int(counts.max()) <= MAX_TOKENS else None
        if kind is Kind.TIME and not table.unit_ns:
            if table.origin_ns is None:
                try:
                    table.origin_ns, table.has_offset = parse_timestamp(data[starts[0] : ends[0]].decode("ascii"))
                except BadCell:
                    return None
            return timestamps(letters, starts, ends, table.origin_ns, table.has_offset)
        if kind in (Kind.TIME, Kind.DURATION):
            return decimals(letters, starts, ends, table.unit_ns or UNITS_NS["s"])
        return None

    def _names(self, role: str, data: bytes, starts: Int64Array, ends: Int64Array) -> Int64Array | None:
        cells = [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        known = self._spellings[role]
        for cell in dict.fromkeys(cells):
            if cell not in known:
                if not cell and not self._table.required(role):
                    return None
                try:
                    known[cell] = self._table.name(role, parse_name(cell.decode("ascii")))
                except BadCell:
                    return None
        return np.fromiter(map(known.__getitem__, cells), np.int64, len(cells))

    # -- row by row

    def _add_any(self, data: bytes, first_line: int, last: bool) -> None:
        text, fault = decoded(data)
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows: list[Mapping[str, object]] = []
        lines: list[int] = []
        problem: BadRow | None = None
        end = 0
        while problem is None:
            try:
                row = next(reader, None)
            except csv.Error as error:
                if not last and fault is None and "unexpected end of data" in str(error):
                    raise OpenQuote from None
                problem = BadRow(end, None, f"not a row of CSV ({error}); is a quotation mark left open?")
                break
            if row is None:
                break
            start, end = end, reader.line_num
            if not row:
                continue
            if len(row) != self._width:
                problem = BadRow(start, None, f"expected {self._width} columns as in the header, found {len(row)}")
                break
            lines.append(first_line + start)
            rows.append({role: row[place] for role, place in self._places.items()})
        if problem is None and fault is not None:
            problem = BadRow(end, None, fault)
        try:
            self._table.add_rows(rows, lines)
        except BadRow as bad:
            raise BadRow(lines[bad.index] - first_line, bad.column, bad.message) from None
        if problem is not None:
            raise problem


def decoded(data: bytes) -> tuple[str, str | None]:
    """Return the text of the whole lines before the first fault in `data`, and a description of that fault."""
    problem = None
    end = data.find(b"\0")
    if end >= 0:
        problem = "a NUL byte; is this a text file?"
        data = _whole_lines(data, end)
    try:
        return data.decode("utf-8"), problem
    except UnicodeDecodeError as error:
        problem = f"the byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        return _whole_lines(data, error.start).decode("utf-8"), problem


def _whole_lines(data: bytes, end: int) -> bytes:
    return data[: max(data.rfind(b"\n", 0, end), data.rfind(b"\r", 0, end)) + 1]
