"""Parsing of a request trace's cells into numbers: one at a time, or many at once if they have the same form."""

import datetime
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]

NS_PER_SECOND = 1_000_000_000
# The end of the core's manual clock: a replay starts at 0 and cannot go beyond.
MAX_SPAN_NS = 2**61
# No request has a billion tokens; with this bound, no sum over a trace that fits in memory overflows int64.
MAX_TOKENS = 1_000_000_000
MAX_MODEL_ID_BYTES = 255

EXPECTED_TIMESTAMP = "a time like 2023-11-16 18:17:03.9799600"
EXPECTED_TOKENS = f"a whole number of tokens from 0 to {MAX_TOKENS:,}"
EXPECTED_MODEL = f"a model id of 1 to {MAX_MODEL_ID_BYTES} bytes"

_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)
_TOKENS = re.compile(r"\d{1,10}", re.ASCII)


class BadRow(Exception):
    """The row at `index` of a chunk is malformed, in the named column or as a whole."""

    def __init__(self, index: int, column: str | None, message: str) -> None:
        super().__init__(message)
        self.index = index
        self.column = column
        self.message = message


def parse_timestamp(index: int, cell: str) -> tuple[int, bool]:
    """Return ns since 1970-01-01 UTC, and whether the timestamp has an offset."""
    match = _TIMESTAMP.fullmatch(cell.strip())
    if match is None:
        raise BadRow(index, "TIMESTAMP", f"expected {EXPECTED_TIMESTAMP}, found {shown(cell)}")
    year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
    fraction, offset = match.group(7, 8)
    try:
        days = datetime.date(year, month, day).toordinal() - datetime.date(1970, 1, 1).toordinal()
        datetime.time(hour, minute, second)
    except ValueError as error:
        raise BadRow(index, "TIMESTAMP", f"{shown(cell)} is not a time: {error}") from None
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second - _offset_seconds(offset)
    return seconds * NS_PER_SECOND + int((fraction or "0").ljust(9, "0")), offset is not None


def _offset_seconds(offset: str | None) -> int:
    if offset is None or offset == "Z":
        return 0
    digits = offset[1:].replace(":", "").ljust(4, "0")
    seconds = (int(digits[:2]) * 60 + int(digits[2:])) * 60
    return -seconds if offset[0] == "-" else seconds


def times_of_one_day(cells: Sequence[str], origin_ns: int, has_offset: bool) -> Int64Array | None:
    """Return what `parse_timestamp` returns for every cell, minus `origin_ns`, for many cells at once.

    Returns None if the cells differ in form or day, or if one is malformed.
    """
    text = "".join(cells)
    if not text.isascii() or len(text) != len(cells) * len(cells[0]):
        return None
    match = _TIMESTAMP.fullmatch(cells[0])
    if match is None or (match[8] is not None) != has_offset:
        return None
    try:
        first_ns, _ = parse_timestamp(0, cells[0])
    except BadRow:
        return None
    if abs(first_ns - origin_ns) > MAX_SPAN_NS:
        return None
    grid = np.frombuffer(text.encode("ascii"), np.uint8).reshape(len(cells), -1)
    # Positions of hour, minute and second are fixed by the pattern; the fraction is the rest after the dot.
    moving = [11, 12, 14, 15, 17, 18, *range(*match.span(7))]
    fixed = [position for position in range(grid.shape[1]) if position not in moving]
    digits = grid[:, moving] - np.uint8(ord("0"))
    if (grid[:, fixed] != grid[0, fixed]).any() or (digits > 9).any():
        return None
    hours, minutes, seconds = (digits[:, i].astype(np.int64) * 10 + digits[:, i + 1] for i in (0, 2, 4))
    if hours.max() > 23 or minutes.max() > 59 or seconds.max() > 59:
        return None
    times_ns = ((hours * 60 + minutes) * 60 + seconds) * NS_PER_SECOND
    for position in range(6, len(moving)):
        times_ns += digits[:, position].astype(np.int64) * 10 ** (14 - position)
    return np.asarray(times_ns + (first_ns - origin_ns - int(times_ns[0])), np.int64)


def token_counts(column: str, cells: Sequence[str]) -> Int64Array:
    text = "".join(cells)
    # The usual case, converted at once: all are digits, none is empty or too long for int64.
    if text.isascii() and text.isdigit() and "" not in cells and max(map(len, cells)) <= 10:
        counts = np.fromiter(map(int, cells), np.int64, len(cells))
        if counts.max() <= MAX_TOKENS:
            return counts
    return np.fromiter((_parse_tokens(column, i, cell) for i, cell in enumerate(cells)), np.int64, len(cells))


def _parse_tokens(column: str, index: int, cell: str) -> int:
    digits = cell.strip()
    if _TOKENS.fullmatch(digits) is None or int(digits) > MAX_TOKENS:
        raise BadRow(index, column, f"expected {EXPECTED_TOKENS}, found {shown(cell)}")
    return int(digits)


def too_far(cell: str) -> str:
    return f"{shown(cell)} is more than {MAX_SPAN_NS // NS_PER_SECOND // 86_400 // 365} years from another request"


def shown(cell: str) -> str:
    return repr(cell if len(cell) <= 40 else cell[:37] + "...")
