"""Reading of JSONL into a `Table`, block by block: at once if a block is plain, line by line if it is not.

A plain block is parsed by orjson if that is installed (the extra ``traces``). What it refuses, such as a lone surrogate
or NaN, is left to the standard library, line by line, so that both read the same.
"""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from modelquota.tuning.cells import MAX_TOKENS, MISSING, UNITS_NS, BadCell, BadRow, Int64Array, parse_name, shown
from modelquota.tuning.formats.base import ROLES, Kind
from modelquota.tuning.source import NEWLINE, count_of
from modelquota.tuning.table import Table

parse_block: Callable[[bytes], Any] = json.loads
with contextlib.suppress(ImportError):
    from orjson import loads as parse_block

NEITHER_BOOL_NOR_FLOAT = {int}


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Pause the collector of cycles: parsed records have none, and going through them again and again takes a fifth."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


class JsonReader:
    """Adds records to a table; keys that it does not know are skipped."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._format = table.format

    def add(self, data: bytes, first_line: int, last: bool) -> None:
        """Add the records of a block; raises BadRow for the first that is malformed, with the index of its line."""
        with _without_collection():
            if not self._add_plain(data, first_line):
                lines = data.split(b"\n")
                if not lines[-1]:
                    lines.pop()
                self._add_any(lines, first_line, last)

    # -- at once

    def _add_plain(self, data: bytes, first_line: int) -> bool:
        whole = data.removesuffix(b"\n")
        try:
            records = parse_block(b"[" + whole.replace(b"\n", b",") + b"]")
        except (ValueError, RecursionError):
            return False
        if len(records) != count_of(whole, NEWLINE) + 1 or set(map(type, records)) != {dict}:
            return False
        requests = self._format.requests(records)
        if len(requests) != len(records):
            numbers: int | list[int] = [
                first_line + index for index, record in enumerate(records) if self._format.requests([record])
            ]
        else:
            numbers = first_line
        if not requests:
            return True
        block: dict[str, Int64Array] = {}
        lists: Sequence[Any] | None = None
        try:
            for role in self._table.columns:
                values = self._values(role, requests)
                if ROLES[role] is Kind.BLOCKS:
                    lists = values
                    continue
                column = self._column(role, values)
                if column is None:
                    return False
                block[role] = column
            times_ns = block.get("time")
            if times_ns is not None and (MISSING in times_ns or not self._table.fits_span(times_ns)):
                return False
            self._table.add(block, lists, numbers)
        except (KeyError, ValueError, TypeError, IndexError, OverflowError, BadRow):
            return False
        return True

    def _values(self, role: str, records: Sequence[Mapping[str, Any]]) -> list[Any]:
        column = self._table.columns[role]
        if column == self._format.columns.get(role):
            return self._format.values(role, records)
        return [record[column] for record in records]

    def _column(self, role: str, values: list[Any]) -> Int64Array | None:
        kind = ROLES[role]
        types = set(map(type, values))
        if type(None) in types and not self._table.required(role):
            if types == {type(None)}:
                return np.full(len(values), -1 if kind is Kind.NAME else MISSING, np.int64)
            return None
        if kind is Kind.NAME:
            return self._names(role, values)
        if kind in (Kind.TIME, Kind.DURATION):
            unit_ns = self._table.unit_ns if kind is Kind.TIME else self._table.unit_ns or UNITS_NS["s"]
            if not unit_ns or not types <= {int, float}:
                return None
            numbers = np.array(values)
            if not (numbers >= 0).all() or not (numbers < 2**62 // unit_ns).all():
                return None
            return np.asarray(np.rint(numbers * unit_ns) if float in types else numbers * unit_ns, np.int64)
        if types != NEITHER_BOOL_NOR_FLOAT:
            return None
        counts = np.array(values, np.int64)
        least, most = (0, MAX_TOKENS) if kind is Kind.TOKENS else (-(2**31) + 1, 2**31 - 1)
        return counts if least <= int(counts.min()) and int(counts.max()) <= most else None

    def _names(self, role: str, values: list[Any]) -> Int64Array | None:
        numbers: dict[Any, int] = {}
        for value in dict.fromkeys(values):
            try:
                numbers[value] = self._table.name(role, parse_name(value))
            except BadCell:
                return None
        return np.fromiter(map(numbers.__getitem__, values), np.int64, len(values))

    # -- line by line

    def _add_any(self, lines: list[bytes], first_line: int, last: bool) -> None:
        rows: list[dict[str, object]] = []
        indices: list[int] = []
        problem: BadRow | None = None
        for index, line in enumerate(lines):
            if not line.strip():
                continue
            try:
                record = parse_record(index, line)
            except BadRow as bad:
                if self._format.may_be_torn and not line.rstrip().endswith(b"}"):
                    self._table.torn += 1
                    continue
                problem = bad
                break
            if not self._format.requests([record]):
                continue
            try:
                rows.append({role: self._value(role, record, index) for role in self._table.columns})
            except BadRow as bad:
                problem = bad
                break
            indices.append(index)
        try:
            self._table.add_rows(rows, [first_line + index for index in indices])
        except BadRow as bad:
            raise BadRow(indices[bad.index], bad.column, bad.message) from None
        if problem is not None:
            raise problem

    def _value(self, role: str, record: dict[str, Any], index: int) -> object:
        column = self._table.columns[role]
        try:
            return self._values(role, [record])[0]
        except KeyError:
            if self._table.required(role) or column != self._format.columns.get(role):
                raise BadRow(index, column, "this key is missing") from None
            return None
        except (ValueError, TypeError, IndexError):
            raise BadRow(index, column, f"found {shown(record.get(column))}, which is not accepted here") from None


def parse_record(index: int, line: bytes) -> dict[str, Any]:
    """Return the record of a line; raises BadRow with the index."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise BadRow(index, None, f"the byte 0x{line[error.start]:02x} is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise BadRow(index, None, f"not a JSON object ({error})") from None
    if not isinstance(record, dict):
        raise BadRow(index, None, f"expected a JSON object, found {shown(record)}")
    return record
