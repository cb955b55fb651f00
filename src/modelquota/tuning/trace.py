"""Request traces: past requests, read from any of the formats in `formats` into arrays that `replay` and `tune` take.

A file is CSV or JSONL, maybe compressed with gzip. Its format is recognized by its columns, and `Trace.format` says
which it is. What fits no format, or two, is refused, and so is every row that is malformed: a `TraceError` names file,
line and column.
"""

import difflib
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from modelquota.errors import TraceError
from modelquota.tuning.cells import MAX_SPAN_NS, MISSING, NS_PER_SECOND, UNITS_NS, BadRow, Int64Array
from modelquota.tuning.csvtable import CsvReader, OpenQuote, decoded, header_cells
from modelquota.tuning.detect import BadLine, Choice, expected_columns, table_for
from modelquota.tuning.formats import FORMATS, ROLES
from modelquota.tuning.jsonlines import JsonReader, parse_record
from modelquota.tuning.source import NEWLINE, Progress, blocks, count_of, name_of
from modelquota.tuning.table import Parsed, Table

__all__ = ["StreamError", "Trace", "TraceStream", "read_trace"]

Index32Array = npt.NDArray[np.int32]

# What is made of a part fits in a processor's cache; what is held back takes some 15 MB.
PART_ROWS = 1 << 14
HELD_ROWS = 1 << 18
NOT_SORTED = "the trace is not sorted by time: this row is earlier than rows far above it"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trace:
    """The requests of a trace in order of time, as columns; every array has one element per request.

    Attributes
    ----------
    path : str
        Path of the trace's file.
    times_ns : int64 array
        ns since the first request, never decreasing, at most 2**61.
    input_tokens, cached_tokens, output_tokens : int64 array
        Tokens of the prompt that were not cached, of the prompt that were, and of the response.
    model_index : int32 array or None
        Index in `models` of the requested model; None if the trace does not name models.
    models : tuple of str
        The models in order of first appearance in the file.
    user_index : int32 array or None
        Index in `users` of who made the request, -1 if the row does not say; None if the trace does not name users.
    users : tuple of str
    estimated_tokens : int64 array or None
        Tokens that the request reserved; -1 if the row does not say.
    durations_ns : int64 array or None
        From admission to the end of the response; -1 if the row does not say.
    priorities : int64 array or None
    start_unix_ns : int or None
        Time of the first request, ns since 1970-01-01 UTC; None if the trace has no dates. A timestamp without an
        offset counts as UTC.
    format : str
        What the file was read as, such as ``"Mooncake JSONL, times in ms"``.
    ignored : tuple of str
        Columns of the file that were not used.
    notes : tuple of str
        What a reader of results should know about how the file was read.
    out_of_order : int
        How many rows of the file have an earlier time than some row above them; see `read_trace`.
    """

    path: str
    times_ns: Int64Array
    input_tokens: Int64Array
    cached_tokens: Int64Array
    output_tokens: Int64Array
    model_index: Index32Array | None = None
    models: tuple[str, ...] = ()
    user_index: Index32Array | None = None
    users: tuple[str, ...] = ()
    estimated_tokens: Int64Array | None = None
    durations_ns: Int64Array | None = None
    priorities: Int64Array | None = None
    start_unix_ns: int | None = None
    format: str = ""
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    out_of_order: int = 0

    def __len__(self) -> int:
        return len(self.times_ns)

    @property
    def duration_ns(self) -> int:
        """Ns from the first request to the last; 0 for a single request."""
        return int(self.times_ns[-1]) if len(self.times_ns) else 0

    @property
    def prompt_tokens(self) -> Int64Array:
        """Tokens of the prompt, cached or not."""
        return self.input_tokens + self.cached_tokens

    @property
    def tokens(self) -> Int64Array:
        """What a request costs at a quota whose tokens all count alike: the only place where kinds are added up."""
        return self.input_tokens + self.cached_tokens + self.output_tokens

    @property
    def kinds(self) -> Int64Array:
        """Input, cached and output tokens of each request: shape (n, 3)."""
        return np.stack((self.input_tokens, self.cached_tokens, self.output_tokens), axis=1)

    def select(self, rows: npt.NDArray[np.intp] | slice) -> "Trace":
        """Return the trace of some of its rows, given in order; times still count from the first row of this trace."""

        def some(column: Any) -> Any:
            return None if column is None else column[rows]

        return replace(
            self,
            times_ns=self.times_ns[rows],
            input_tokens=self.input_tokens[rows],
            cached_tokens=self.cached_tokens[rows],
            output_tokens=self.output_tokens[rows],
            model_index=some(self.model_index),
            user_index=some(self.user_index),
            estimated_tokens=some(self.estimated_tokens),
            durations_ns=some(self.durations_ns),
            priorities=some(self.priorities),
        )

    def with_durations(self, *, ttft_ms: float, tpot_ms: float) -> "Trace":
        """Return the trace with the duration of each request computed from its output tokens.

        Parameters
        ----------
        ttft_ms : float
            Time to the first token.
        tpot_ms : float
            Time per output token after the first.
        """
        for name, value in (("ttft", ttft_ms), ("tpot", tpot_ms)):
            if not 0 <= value <= 1e9:
                raise ValueError(f"{name} is {value}; give milliseconds from 0 to 1e9")
        later = np.maximum(self.output_tokens - 1, 0)
        durations_ns = np.rint((ttft_ms + later * tpot_ms) * UNITS_NS["ms"]).astype(np.int64)
        return replace(self, durations_ns=durations_ns)


def read_trace(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    time_unit: str | None = None,
    columns: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Trace:
    """Read a request trace.

    Parameters
    ----------
    path : str or path-like
        A file in UTF-8, maybe compressed with gzip, or ``-`` for standard input.
    format : str, optional
        One of `modelquota.tuning.formats.FORMATS`; by default it is recognized by the columns.
    time_unit : str, optional
        ``"timestamp"``, ``"s"``, ``"ms"``, ``"us"`` or ``"ns"``, in place of the format's own.
    columns : mapping of str to str, optional
        The column of some roles, such as ``{"prompt": "Request tokens"}``, in place of the format's own. With time and
        prompt or output, the file need not be of a known format. The roles are time, prompt, cached, output, estimated,
        model, user, duration, priority, delay and blocks.
    progress : callable, optional
        Called as `progress(bytes_read, total_bytes)` after every 128 KiB and at the end; `total_bytes` is 0 if it is
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
    ValueError
        The format, unit of time or a role does not exist.
    OSError
        The file cannot be opened or read.
    """
    (trace,) = TraceStream(path, format=format, time_unit=time_unit, columns=columns, progress=progress, part_rows=None)
    return trace


class StreamError(TraceError):
    """A trace cannot be replayed while it is read, only as a whole: read it again, with `read_trace`."""


class TraceStream:
    """A request trace in parts, read while they are asked for: for a replay that does not hold all of it.

    Rows that are out of order are sorted if they are near each other: the last `held_rows` rows are held back. A trace
    with fewer than `held_rows` + `part_rows` rows is yielded whole, as `read_trace` returns it, in any order.

    Parameters
    ----------
    path, format, time_unit, columns, progress
        As for `read_trace`.
    part_rows : int or None
        How many rows a part has, but for the last; blocks of the file are not divided, so it may be some more. None for
        one part that is the whole trace.
    held_rows : int
        How many rows are held back, at least.

    Attributes
    ----------
    name : str
        The path, or ``standard input``.

    Raises
    ------
    ValueError
        As `read_trace`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        format: str | None = None,
        time_unit: str | None = None,
        columns: Mapping[str, str] | None = None,
        progress: Progress | None = None,
        part_rows: int | None = PART_ROWS,
        held_rows: int = HELD_ROWS,
    ) -> None:
        _require("format", format, FORMATS)
        _require("time_unit", time_unit, ("timestamp", *UNITS_NS))
        for role in columns or ():
            _require("column", role, ROLES)
        self.name = name_of(path)
        self._choice = Choice(None if format is None else FORMATS[format], time_unit, dict(columns or {}))
        self._data = blocks(path, progress)
        self._part_rows = part_rows
        self._held_rows = held_rows

    def __iter__(self) -> Iterator[Trace]:
        """Yield the parts, once.

        Times count from the first request of all, models and users begin with those of the parts before, and notes and
        `out_of_order` are about all that was read so far.

        Raises
        ------
        TraceError, OSError
            As `read_trace`.
        StreamError
            The trace is not sorted by time, and a row is earlier than some that were yielded; or times are missing, of
            which the rows before decide.
        """
        try:
            yield from self._parts()
        except BadLine as bad:
            raise TraceError(bad.message, path=self.name, line=bad.line, column=bad.column) from None

    def _parts(self) -> Iterator[Trace]:
        part_rows = self._part_rows
        held: _Held | None = None
        for table, ignored in _read(self._data, self._choice):
            if part_rows is None or table.rows < (part_rows if held is not None else part_rows + self._held_rows):
                continue
            if held is None:
                held = _Held(self.name, table, ignored)
            held.add(whole=False)
            yield from held.parts(part_rows, self._held_rows)
        if part_rows is None or held is None:
            held = _Held(self.name, table, ignored)
            held.add(whole=True)
            yield held.all()
            return
        if table.rows:
            held.add(whole=False)
        yield from held.parts(part_rows, 0)


def _require(what: str, given: str | None, known: Mapping[str, object] | Sequence[str]) -> None:
    if given is not None and given not in known:
        near = difflib.get_close_matches(given, list(known), n=1)
        hint = f", perhaps {near[0]}" if near else ""
        raise ValueError(f"{what} is {given!r}; expected one of {', '.join(known)}{hint}")


def _read(data: Iterator[bytes], choice: Choice) -> Iterator[tuple[Table, tuple[str, ...]]]:
    """Read one block after another; yield the table and the columns that are not in it after each."""
    line = 1
    reader: CsvReader | JsonReader | None = None
    table: Table | None = None
    ignored: tuple[str, ...] = ()
    pending: bytes | None = None
    while True:
        block = next(data, None)
        if pending is None:
            pending = block
            if block is None:
                break
            continue
        whole = pending
        try:
            if reader is None:
                whole, line, reader, table, ignored = _begin(whole, line, choice)
            if whole:
                reader.add(whole, line, block is None)
            line += _line_ends(whole)
            pending = block
        except OpenQuote:
            pending = whole + (block or b"")
            continue
        except BadRow as bad:
            raise BadLine(line + bad.index, bad.column, bad.message) from None
        if block is None:
            break
        if table is not None:
            yield table, ignored
    if table is None:
        raise BadLine(1, None, f"the file is empty; expected {expected_columns('CSV')}")
    if not table.rows and not table.taken:
        raise BadLine(line, None, "no requests" + (" below its header" if isinstance(reader, CsvReader) else ""))
    yield table, ignored


def _line_ends(data: bytes) -> int:
    return count_of(data, NEWLINE) + (data.count(b"\r") - data.count(b"\r\n") if b"\r" in data else 0)


def _begin(data: bytes, line: int, choice: Choice) -> tuple[bytes, int, CsvReader | JsonReader, Table, tuple[str, ...]]:
    """Recognize the format by the first line that is not blank; return what is to be read, from which line."""
    text = data.lstrip(b"\r\n")
    skipped = _line_ends(data[: len(data) - len(text)])
    line += skipped
    if not text.strip():
        raise BadLine(1, None, f"the file is empty; expected {expected_columns('CSV')}")
    if re.match(rb"\s*\[\s*(\{|\]|$)", text):
        raise BadRow(skipped, None, "a JSON array; expected one JSON object a line (JSONL)")
    if text.lstrip().startswith(b"{"):
        first = text.split(b"\n", 1)[0]
        try:
            record = parse_record(0, first)
        except BadRow as bad:
            raise BadLine(line, None, bad.message) from None
        table, ignored = table_for("JSONL", list(record), line, choice)
        return text, line, JsonReader(table), table, ignored
    head, fault = decoded(text[: max(text.find(b"\n"), text.find(b"\r")) + 1] or text)
    if fault is not None:
        raise BadLine(line, None, fault)
    first_line = head.splitlines(keepends=True)[0] if head else ""
    size = len(first_line.encode())
    if first_line.endswith("\r") and text[size : size + 1] == b"\n":
        size += 1
    try:
        header = header_cells(first_line.rstrip("\r\n"))
    except BadRow as bad:
        raise BadLine(line, None, bad.message) from None
    table, ignored = table_for("CSV", header, line, choice)
    return text[size:], line + 1, CsvReader(table, header), table, ignored


class _Held:
    """The rows of a trace that are read and not yielded, in order of time."""

    def __init__(self, name: str, table: Table, ignored: tuple[str, ...]) -> None:
        self._name = name
        self._table = table
        self._ignored = ignored
        self._rows = 0
        self._runs: deque[Parsed] = deque()
        # ns since the table's origin: of the first row, of the latest that was read, of the last that was yielded.
        self._first_ns: int | None = None
        self._latest_ns = self._yielded_ns = -MAX_SPAN_NS
        self._out_of_order = 0
        self._told = 0
        self._names: dict[str, tuple[str, ...]] = {}

    def add(self, *, whole: bool) -> None:
        """Take the rows of the table, which are the whole trace or a part of it."""
        table = self._table
        columns = table.whole()
        if "time" not in columns:
            raise BadLine(1, table.format.columns.get("time"), "this column is missing")
        if not whole:
            self._require(columns["time"] != MISSING, "this row has no time of its own")
        try:
            self._told += table.format.finish(columns, columns.get("user"))
            missing = np.flatnonzero(columns["time"] == MISSING)
            if len(missing):
                raise BadRow(int(missing[0]), table.columns["time"], "no time, and nothing to compute it from")
        except BadRow as bad:
            raise BadLine(table.line_of(bad.index), bad.column, bad.message) from None
        times_ns = columns["time"]
        latest_ns = np.maximum(np.maximum.accumulate(times_ns), self._latest_ns)
        out_of_order = int(np.count_nonzero(times_ns < latest_ns))
        self._latest_ns = int(latest_ns[-1])
        if out_of_order:
            self._require(times_ns >= self._yielded_ns, NOT_SORTED)
        table.take()
        self._rows += len(times_ns)
        if out_of_order:
            self._out_of_order += out_of_order
            first_ns = int(times_ns.min())
            while self._runs and int(self._runs[-1]["time"][-1]) > first_ns:
                earlier = self._runs.pop()
                later = int(np.searchsorted(earlier["time"], first_ns, side="right"))
                if later:
                    self._runs.append({role: column[:later] for role, column in earlier.items()})
                columns = {role: np.concatenate((earlier[role][later:], column)) for role, column in columns.items()}
            order = np.argsort(columns["time"], kind="stable")
            for role in columns:
                columns[role] = columns[role][order]
        self._runs.append(columns)

    def _require(self, fine: npt.NDArray[np.bool_], message: str) -> None:
        """Raise StreamError for the first row that is not fine."""
        if not fine.all():
            raise StreamError(message, self._name, self._table.line_of(int(fine.argmin())))

    def parts(self, part_rows: int, held_rows: int) -> Iterator[Trace]:
        """Yield rows as long as so many are left."""
        while (ready := self._rows - held_rows) > 0:
            run = self._runs.popleft()
            rows = len(run["time"])
            count = min(ready, rows if rows < 2 * part_rows else part_rows)
            if count == rows:
                yield self.trace(run)
                continue
            self._runs.appendleft(run)
            if count < part_rows:
                return
            self._runs[0] = {role: column[count:] for role, column in run.items()}
            yield self.trace({role: column[:count] for role, column in run.items()})

    def all(self) -> Trace:
        """Return the whole trace."""
        return self.trace(self._runs.pop())

    def trace(self, columns: Parsed) -> Trace:
        """Return the next rows as a trace."""
        table = self._table
        times_ns = columns.pop("time")
        self._rows -= len(times_ns)
        self._yielded_ns = int(times_ns[-1])
        if self._first_ns is None:
            self._first_ns = int(times_ns[0])
        first_ns = self._first_ns
        assert table.origin_ns is not None
        dated = not table.unit_ns or table.format.absolute or first_ns > 946_684_800 * NS_PER_SECOND
        nothing = np.zeros(len(times_ns), np.int64)
        prompt = _known(columns.get("prompt"), nothing)
        cached = np.minimum(_known(columns["cached"], nothing), prompt) if "cached" in columns else nothing
        for role, names in table.names.items():
            if len(self._names.get(role, ())) < len(names):
                self._names[role] = tuple(names)
        models, users = (self._names.get(role, ()) for role in ("model", "user"))
        unit = "timestamps" if not table.unit_ns else f"times in {table.time_unit}"
        notes = [table.format.note(self._told)] if self._told else []
        if table.torn:
            notes.append(f"{table.torn:,} lines were cut off when their writer was killed; they are skipped")
        return Trace(
            path=self._name,
            times_ns=times_ns - first_ns,
            input_tokens=prompt - cached if "cached" in columns else prompt,
            cached_tokens=cached,
            output_tokens=_known(columns.get("output"), nothing),
            model_index=columns["model"].astype(np.int32) if models else None,
            models=models,
            user_index=columns["user"].astype(np.int32) if users else None,
            users=users,
            estimated_tokens=_optional(columns.get("estimated")),
            durations_ns=_optional(columns.get("duration")),
            priorities=None if (some := columns.get("priority")) is None else np.where(some == MISSING, 0, some),
            start_unix_ns=table.origin_ns + first_ns if dated else None,
            format=f"{table.format.title}, {unit}",
            ignored=self._ignored,
            notes=tuple(notes),
            out_of_order=self._out_of_order,
        )


def _known(column: Int64Array | None, nothing: Int64Array) -> Int64Array:
    if column is None:
        return nothing
    missing = column == MISSING
    return np.where(missing, 0, column) if missing.any() else column


def _optional(column: Int64Array | None) -> Int64Array | None:
    """Return a column with -1 in the rows that do not say; None if none says."""
    if column is None or not (column != MISSING).any():
        return None
    return np.where(column == MISSING, -1, column)
