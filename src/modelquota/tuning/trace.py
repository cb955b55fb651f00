"""Request traces: a CSV file of past requests, read into arrays that `replay` checks against quotas.

The format is that of the public Azure LLM inference traces, one request per row:

    TIMESTAMP,ContextTokens,GeneratedTokens
    2023-11-16 18:17:03.9799600,4808,10

There may be two more columns, in any position: `Model`, and `CachedTokens`, the part of the context that was served
from a cache. Columns are converted a chunk at a time; any error in a file
raises a `TraceError` that names file, line and column.
"""

import csv
import io
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from modelquota.errors import TraceError
from modelquota.tuning.cells import (
    EXPECTED_MODEL,
    MAX_MODEL_ID_BYTES,
    MAX_SPAN_NS,
    BadRow,
    Int64Array,
    parse_timestamp,
    shown,
    times_of_one_day,
    token_counts,
    too_far,
)

__all__ = ["Trace", "read_trace"]

MAX_LINE_BYTES = 65_536
BLOCK_BYTES = 1 << 20
ROWS_PER_CHUNK = 16_384

REQUIRED_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
MODEL_COLUMN = "Model"
CACHED_COLUMN = "CachedTokens"
EXPECTED_HEADER = (
    "TIMESTAMP,ContextTokens,GeneratedTokens and, in any place, Model and CachedTokens, separated by commas"
)

_LINE_END = re.compile(r"\r\n|\r|\n")
_NOT_CSV = {
    b"\xff\xfe": "the file is UTF-16; save it as UTF-8",
    b"\xfe\xff": "the file is UTF-16; save it as UTF-8",
    b"\x1f\x8b": "the file is compressed with gzip; unpack it first",
    b"PK": "the file is a ZIP archive or a spreadsheet; unpack it, or save it as CSV",
}


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The requests of a trace in order of time, as columns; every array has one element per request.

    Attributes
    ----------
    path : str
        Path of the trace's file.
    start_unix_ns : int
        Time of the first request, ns since 1970-01-01 UTC. A timestamp without an offset counts as UTC.
    times_ns : int64 array
        ns since the first request, never decreasing, at most 2**61.
    context_tokens, generated_tokens : int64 array
        Tokens of the prompt and of the response, each 0 to 1,000,000,000.
    cached_tokens : int64 array or None
        Tokens of the prompt that were served from a cache; None if the trace has no CachedTokens column.
    model_index : int32 array or None
        Index in `models` of the requested model; None if the trace has no Model column.
    models : tuple of str
        The models in order of first appearance in the file; empty if the trace has no Model column.
    out_of_order : int
        How many rows of the file have an earlier time than some row above them; see `read_trace`.
    """

    path: str
    start_unix_ns: int
    times_ns: Int64Array
    context_tokens: Int64Array
    generated_tokens: Int64Array
    model_index: npt.NDArray[np.int32] | None
    models: tuple[str, ...]
    out_of_order: int = 0
    cached_tokens: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def duration_ns(self) -> int:
        """Ns from the first request to the last; 0 for a single request."""
        return int(self.times_ns[-1]) if len(self.times_ns) else 0


def read_trace(path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> Trace:
    """Read a request trace from a CSV file.

    Parameters
    ----------
    path : str or path-like
        A UTF-8 CSV file with a header: TIMESTAMP, ContextTokens, GeneratedTokens and optionally Model and
        CachedTokens, in any order and case. Timestamps are `2023-11-16 18:17:03` with up to nine fractional digits,
        with a space or a T in the middle, and either all or none with `Z` or an offset from UTC. Blank lines are
        skipped.
    progress : callable, optional
        Called as `progress(bytes_read, total_bytes)` after every megabyte and at the end; `total_bytes` is 0 if it is
        not known (a pipe).

    Returns
    -------
    Trace
        Rows in order of time. Production logs are often written a little out of order, so rows that go back in time
        are not an error: they are sorted, rows of the same time stay in file order, and `Trace.out_of_order` is their
        number.

    Raises
    ------
    TraceError
        The file is not such a trace. The error has `path`, `line` (from 1) and `column` (its name, None if the whole
        line is meant). Correct that line and read again.
    OSError
        The file cannot be opened or read.
    """
    name = os.fspath(path)
    with open(name, "rb") as file:
        rows = csv.reader(_lines(file, progress), strict=True)
        line = 1
        builder: _TraceBuilder | None = None
        ended = False
        while not ended:
            chunk: list[list[str]] = []
            problem: _BadLine | None = None
            try:
                # extend, unlike list(), keeps what came before an exception: an earlier bad row is reported first.
                chunk.extend(islice(rows, ROWS_PER_CHUNK if builder else 1))
                ended = not chunk
            except csv.Error as error:
                problem = _BadLine(f"not a row of CSV ({error}); is a quotation mark left open?")
            except _BadLine as error:
                problem = error
            try:
                if builder is not None:
                    builder.add(chunk)
                elif chunk and chunk[0]:
                    builder = _TraceBuilder(chunk[0])
            except BadRow as bad:
                raise TraceError(
                    bad.message, path=name, line=_line_of(chunk, line, bad.index), column=bad.column
                ) from None
            line = _line_of(chunk, line, len(chunk)) if problem else rows.line_num + 1
            if problem:
                raise TraceError(problem.message, path=name, line=line, column=None) from None
    if builder is None:
        raise TraceError(f"the file is empty; expected the header {EXPECTED_HEADER}", path=name, line=1, column=None)
    if not builder.times_ns:
        raise TraceError("the file has no requests below its header", path=name, line=line, column=None)
    return builder.finish(name)


class _BadLine(Exception):
    """The line after those already yielded cannot be text of a CSV file."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


def _lines(file: BinaryIO, progress: Callable[[int, int], None] | None) -> Iterator[str]:
    """Yield the lines of a UTF-8 file with their ends, one block in memory; raise `_BadLine` at the first fault."""
    size = os.fstat(file.fileno()).st_size
    rest = b""
    bytes_read = 0
    while True:
        block = file.read(BLOCK_BYTES)
        data = rest + block
        if not bytes_read:
            for magic, advice in _NOT_CSV.items():
                if data.startswith(magic):
                    raise _BadLine(advice)
            data = data.removeprefix(b"\xef\xbb\xbf")
        bytes_read += len(block)
        # Cut after a \r only if there is no \n, and never after one at the very end, which may be half of \r\n.
        cut = (data.rfind(b"\n") + 1 or data.rfind(b"\r", 0, -1) + 1) if block else len(data)
        data, rest = data[:cut], data[cut:]
        text, problem = _decode(data)
        yield from io.StringIO(text, newline="")
        if problem:
            raise _BadLine(problem)
        if len(rest) > MAX_LINE_BYTES:
            raise _BadLine(f"a line of more than {MAX_LINE_BYTES:,} bytes; expected {EXPECTED_HEADER}")
        if progress is not None:
            progress(bytes_read, size)
        if not block:
            return


def _decode(data: bytes) -> tuple[str, str | None]:
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


def _line_of(rows: Sequence[Sequence[str]], first_line: int, index: int) -> int:
    """Return the line on which `rows[index]` starts, given that of `rows[0]`; a quoted cell may span lines."""
    return first_line + sum(1 + sum(len(_LINE_END.findall(cell)) for cell in row) for row in rows[:index])


class _TraceBuilder:
    """Collects the columns of a trace chunk by chunk. A chunk with a bad row is discarded as a whole."""

    def __init__(self, header: Sequence[str]) -> None:
        self.times_ns = array("q")
        self._context_tokens = array("q")
        self._generated_tokens = array("q")
        self._cached_tokens = array("q")
        self._model_index = array("i")
        self._width = len(header)
        self._columns = _column_positions(header)
        self._has_models = MODEL_COLUMN in self._columns
        self._has_cached = CACHED_COLUMN in self._columns
        self._models: dict[str, int] = {}
        # Maps a cell as written in the file to its model, so that each spelling is validated only once.
        self._model_cells: dict[str, int] = {}
        self._origin_ns: int | None = None
        self._has_offset = False
        self._earliest_ns = 0
        self._latest_ns = 0

    def add(self, rows: list[list[str]]) -> None:
        """Append rows, skipping empty ones; raise `BadRow` for the first one that is malformed."""
        bad: BadRow | None = None
        good = rows
        while True:
            try:
                columns = self._convert(good)
                break
            except BadRow as error:
                # Columns are converted one after another: look for an earlier row that is bad in a later column.
                bad = error
                good = rows[: error.index]
        if bad is not None:
            raise bad
        times_ns, context_tokens, generated_tokens, cached_tokens, model_index = columns
        self.times_ns.frombytes(times_ns.tobytes())
        self._context_tokens.frombytes(context_tokens.tobytes())
        self._generated_tokens.frombytes(generated_tokens.tobytes())
        self._cached_tokens.frombytes(cached_tokens.tobytes())
        self._model_index.extend(model_index)

    def _convert(self, rows: list[list[str]]) -> tuple[Int64Array, Int64Array, Int64Array, Int64Array, list[int]]:
        places = [index for index, row in enumerate(rows) if row]
        if not places:
            nothing = np.zeros(0, np.int64)
            return nothing, nothing, nothing, nothing, []
        for index in places:
            if len(rows[index]) != self._width:
                found = len(rows[index])
                raise BadRow(index, None, f"expected {self._width} columns as in the header, found {found}")
        cells = list(zip(*(rows[index] for index in places), strict=True))
        try:
            times_ns = self._times(cells[self._columns["TIMESTAMP"]])
            context_tokens, generated_tokens = (
                token_counts(name, cells[self._columns[name]]) for name in REQUIRED_COLUMNS[1:]
            )
            cached_tokens = self._cached(cells, context_tokens)
            model_index = self._model_indices(cells[self._columns[MODEL_COLUMN]]) if self._has_models else []
        except BadRow as bad:
            raise BadRow(places[bad.index], bad.column, bad.message) from None
        return times_ns, context_tokens, generated_tokens, cached_tokens, model_index

    def _cached(self, cells: Sequence[Sequence[str]], context_tokens: Int64Array) -> Int64Array:
        """Return the cached tokens of each row, which are part of its context; none if there is no such column."""
        if not self._has_cached:
            return np.zeros(0, np.int64)
        cached = token_counts(CACHED_COLUMN, cells[self._columns[CACHED_COLUMN]])
        beyond = np.flatnonzero(cached > context_tokens)
        if beyond.size:
            row = int(beyond[0])
            raise BadRow(row, CACHED_COLUMN, f"{cached[row]} is more than the ContextTokens, {context_tokens[row]}")
        return cached

    def _times(self, cells: Sequence[str]) -> Int64Array:
        """Return ns since the trace's first row."""
        if self._origin_ns is None:
            self._origin_ns, self._has_offset = parse_timestamp(0, cells[0])
        times_ns = times_of_one_day(cells, self._origin_ns, self._has_offset)
        if times_ns is None:
            times_ns = np.fromiter(map(self._since_origin, range(len(cells)), cells), np.int64, len(cells))
        earliest_ns = min(self._earliest_ns, int(times_ns.min()))
        latest_ns = max(self._latest_ns, int(times_ns.max()))
        if latest_ns - earliest_ns > MAX_SPAN_NS:
            place = int(times_ns.argmin() if earliest_ns < self._earliest_ns else times_ns.argmax())
            raise BadRow(place, "TIMESTAMP", too_far(cells[place]))
        self._earliest_ns, self._latest_ns = earliest_ns, latest_ns
        return times_ns

    def _since_origin(self, index: int, cell: str) -> int:
        time_ns, has_offset = parse_timestamp(index, cell)
        if has_offset != self._has_offset:
            here, there = ("an", "none") if has_offset else ("no", "one")
            raise BadRow(index, "TIMESTAMP", f"{shown(cell)} has {here} offset from UTC, the first request has {there}")
        assert self._origin_ns is not None
        since_ns = time_ns - self._origin_ns
        if abs(since_ns) > MAX_SPAN_NS:
            raise BadRow(index, "TIMESTAMP", too_far(cell))
        return since_ns

    def _model_indices(self, cells: Sequence[str]) -> list[int]:
        known = self._model_cells
        try:
            return [known[cell] for cell in cells]
        except KeyError:
            return [known[cell] if cell in known else self._new_model(i, cell) for i, cell in enumerate(cells)]

    def _new_model(self, index: int, cell: str) -> int:
        name = cell.strip()
        if not 0 < len(name.encode()) <= MAX_MODEL_ID_BYTES:
            raise BadRow(index, MODEL_COLUMN, f"expected {EXPECTED_MODEL}, found {shown(cell)}")
        return self._model_cells.setdefault(cell, self._models.setdefault(name, len(self._models)))

    def finish(self, path: str) -> Trace:
        """Return the trace of all rows added, at least one, in order of time."""
        times_ns: Int64Array = np.frombuffer(self.times_ns, np.int64)
        columns = [np.frombuffer(self._context_tokens, np.int64), np.frombuffer(self._generated_tokens, np.int64)]
        if self._has_cached:
            columns.append(np.frombuffer(self._cached_tokens, np.int64))
        model_index = np.frombuffer(self._model_index, np.int32) if self._has_models else None
        out_of_order = int(np.count_nonzero(times_ns < np.maximum.accumulate(times_ns)))
        if out_of_order:
            order = np.argsort(times_ns, kind="stable")
            times_ns = times_ns[order]
            columns = [column[order] for column in columns]
            model_index = None if model_index is None else model_index[order]
        times_ns -= times_ns[0]
        assert self._origin_ns is not None
        return Trace(
            path=path,
            start_unix_ns=self._origin_ns + self._earliest_ns,
            times_ns=times_ns,
            context_tokens=columns[0],
            generated_tokens=columns[1],
            model_index=model_index,
            models=tuple(self._models),
            out_of_order=out_of_order,
            cached_tokens=columns[2] if self._has_cached else None,
        )


def _column_positions(header: Sequence[str]) -> dict[str, int]:
    known = {name.lower(): name for name in (*REQUIRED_COLUMNS, MODEL_COLUMN, CACHED_COLUMN)}
    positions: dict[str, int] = {}
    for position, cell in enumerate(header):
        name = known.get(cell.strip().lower())
        if name is None:
            raise BadRow(0, None, f"unknown column {shown(cell)} in the header; expected {EXPECTED_HEADER}")
        if name in positions:
            raise BadRow(0, name, "this column is in the header twice")
        positions[name] = position
    for name in REQUIRED_COLUMNS:
        if name not in positions:
            raise BadRow(0, name, f"this column is missing from the header; expected {EXPECTED_HEADER}")
    return positions
