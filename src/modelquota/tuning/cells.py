"""Parsing of a trace's cells into numbers: one at a time, with errors, or all of a block at once, which may give up.

A function on a block takes its bytes and the positions at which its cells start and end. It returns None if a cell is
not in the plain form that it knows; the cells are then parsed one at a time, which accepts more and names what is bad.
"""

import datetime
import math
import re
from decimal import Decimal, InvalidOperation

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]

NS_PER_SECOND = 1_000_000_000
NS_OF_A_DAY = 86_400 * NS_PER_SECOND
# The end of the core's manual clock: a replay starts at 0 and cannot go beyond.
MAX_SPAN_NS = 2**61
# No request has a billion tokens; with this bound, no sum over a trace that fits in memory overflows int64.
MAX_TOKENS = 1_000_000_000
MAX_NAME_BYTES = 255
MISSING = int(np.iinfo(np.int64).min)
"""In a column of times, durations or counts: the row has none."""
UNITS_NS = {"s": NS_PER_SECOND, "ms": 1_000_000, "us": 1_000, "ns": 1}

EXPECTED_TIMESTAMP = "a time like 2023-11-16 18:17:03.9799600"
EXPECTED_TOKENS = f"a whole number of tokens from 0 to {MAX_TOKENS:,}"
EXPECTED_NAME = f"a name of 1 to {MAX_NAME_BYTES} bytes"

_TIMESTAMP = re.compile(
    r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))?(Z|[+-]\d\d(?::?\d\d)?)?", re.ASCII
)
_TOKENS = re.compile(r"\d{1,10}", re.ASCII)
_NUMBER = re.compile(r"\d{1,20}(\.\d{0,20})?(e[+-]?\d{1,2})?", re.ASCII | re.IGNORECASE)
# In a timestamp, the positions of the digits of year, month, day, hour, minute and second; the others are fixed.
_DIGITS = (0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18)
_MAX_INTEGER_DIGITS = 18
_MAX_TIMESTAMP_FORMS = 12
_EPOCH_DAY = datetime.date(1970, 1, 1).toordinal()


class BadRow(Exception):
    """The row at `index` of a block is malformed, in the named column or as a whole."""

    def __init__(self, index: int, column: str | None, message: str) -> None:
        super().__init__(message)
        self.index = index
        self.column = column
        self.message = message


class BadCell(Exception):
    """A cell is malformed; the message says what was expected and found."""


# -- one at a time


def parse_timestamp(cell: str) -> tuple[int, bool]:
    """Return ns since 1970-01-01 UTC, and whether the timestamp has an offset."""
    match = _TIMESTAMP.fullmatch(cell.strip())
    if match is None:
        raise BadCell(f"expected {EXPECTED_TIMESTAMP}, found {shown(cell)}")
    year, month, day, hour, minute, second = map(int, match.group(1, 2, 3, 4, 5, 6))
    fraction, offset = match.group(7, 8)
    try:
        days = datetime.date(year, month, day).toordinal() - _EPOCH_DAY
        datetime.time(hour, minute, second)
    except ValueError as error:
        raise BadCell(f"{shown(cell)} is not a time: {error}") from None
    seconds = ((days * 24 + hour) * 60 + minute) * 60 + second - _offset_seconds(offset)
    return seconds * NS_PER_SECOND + int((fraction or "0").ljust(9, "0")), offset is not None


def _offset_seconds(offset: str | None) -> int:
    if offset is None or offset == "Z":
        return 0
    digits = offset[1:].replace(":", "").ljust(4, "0")
    seconds = (int(digits[:2]) * 60 + int(digits[2:])) * 60
    return -seconds if offset[0] == "-" else seconds


def parse_number(cell: object, unit_ns: int, what: str) -> int:
    """Return a time or a duration, as written or as JSON has it, in ns, without a fraction of a nanosecond."""
    found = None
    if type(cell) is int:
        found = cell * unit_ns
    elif type(cell) is float and math.isfinite(cell):
        found = round(cell * unit_ns)
    elif isinstance(cell, str) and _NUMBER.fullmatch(cell.strip()):
        try:
            found = math.floor(Decimal(cell.strip()) * unit_ns)
        except InvalidOperation:
            found = None
    if found is None or not 0 <= found < 2**63:
        raise BadCell(f"expected {what}, found {shown(cell)}")
    return found


def parse_tokens(cell: object) -> int:
    """Return a count of tokens, as written or as JSON has it."""
    if type(cell) is int:
        count = cell
    elif isinstance(cell, str) and _TOKENS.fullmatch(cell.strip()):
        count = int(cell)
    else:
        count = -1
    if not 0 <= count <= MAX_TOKENS:
        raise BadCell(f"expected {EXPECTED_TOKENS}, found {shown(cell)}")
    return count


def parse_name(cell: object) -> str:
    """Return the name of a model or user; integers, as some traces have them, become their digits."""
    name = str(cell) if type(cell) is int else cell.strip() if isinstance(cell, str) else ""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can have
        size = 0
    if not 0 < size <= MAX_NAME_BYTES or "\0" in name:
        raise BadCell(f"expected {EXPECTED_NAME}, found {shown(cell)}")
    return name


def too_far(cell: object) -> str:
    return f"{shown(cell)} is more than {MAX_SPAN_NS // NS_PER_SECOND // 86_400 // 365} years from another request"


def shown(cell: object) -> str:
    text = cell if isinstance(cell, str) else repr(cell)
    cut = text if len(text) <= 40 else text[:37] + "..."
    return repr(cut) if isinstance(cell, str) else cut


# -- a block at once


def integers(data: Bytes, starts: Int64Array, ends: Int64Array) -> Int64Array | None:
    """Return the numbers in cells of 1 to 18 digits each."""
    lengths = ends - starts
    longest = int(lengths.max())
    if int(lengths.min()) < 1 or longest > _MAX_INTEGER_DIGITS:
        return None
    numbers = np.zeros(len(starts), np.int64)
    scale = 1
    for place in range(longest):
        inside = lengths > place
        # A cell that is too short reads a byte before its start, and multiplies it by 0.
        digits = (data[np.maximum(ends - 1 - place, 0)] - np.uint8(ord("0"))) * inside
        if digits.max() > 9:
            return None
        numbers += digits.astype(np.int64) * scale
        scale *= 10
    return numbers


def decimals(data: Bytes, starts: Int64Array, ends: Int64Array, unit_ns: int) -> Int64Array | None:
    """Return the numbers in cells like ``12`` and ``12.345``, in ns; a fraction of a nanosecond is cut off."""
    dots = np.flatnonzero(data == ord("."))
    rows = np.searchsorted(starts, dots, side="right") - 1
    own = (rows >= 0) & (dots < ends[np.maximum(rows, 0)])
    dots, rows = dots[own], rows[own]
    if len(rows) > 1 and not (np.diff(rows) > 0).all():
        return None
    points = ends.copy()
    points[rows] = dots
    whole = integers(data, starts, points)
    # An int64 holds 2**63 ns; times are compared with one another, which takes one more bit.
    if whole is None or int(whole.max()) >= 2**62 // unit_ns:
        return None
    whole *= unit_ns
    if len(rows):
        digits = ends[rows] - dots - 1
        fractions = integers(data, dots + 1, ends[rows])
        if fractions is None or int(digits.max()) > 9:
            return None
        whole[rows] += fractions * 10 ** (9 - digits) * unit_ns // NS_PER_SECOND
    return whole


def timestamps(
    data: Bytes, starts: Int64Array, ends: Int64Array, origin_ns: int, has_offset: bool
) -> Int64Array | None:
    """Return ns since `origin_ns` of cells that are timestamps, all with or all without an offset from UTC."""
    lengths = ends - starts
    times_ns = np.empty(len(starts), np.int64)
    forms = np.unique(lengths)
    if len(forms) > _MAX_TIMESTAMP_FORMS:
        return None
    for length in forms.tolist():
        rows = np.flatnonzero(lengths == length) if len(forms) > 1 else slice(None)
        own = _timestamps_of_one_length(data, starts[rows], length, origin_ns, has_offset)
        if own is None:
            return None
        times_ns[rows] = own
    return times_ns


def _timestamps_of_one_length(
    data: Bytes, starts: Int64Array, length: int, origin_ns: int, has_offset: bool
) -> Int64Array | None:
    first = data[starts[0] : starts[0] + length].tobytes().decode("ascii", "replace")
    match = _TIMESTAMP.fullmatch(first)
    if match is None or (match[8] is not None) != has_offset:
        return None
    grid = data[starts[:, None] + np.arange(length)]
    fraction = range(*match.span(7)) if match[7] else range(0)
    moving = [*_DIGITS, *fraction]
    fixed = [place for place in range(length) if place not in moving]
    digits = grid[:, moving] - np.uint8(ord("0"))
    if (grid[:, fixed] != grid[0, fixed]).any() or digits.max() > 9:
        return None
    wide = digits.T.astype(np.int64)
    year = ((wide[0] * 10 + wide[1]) * 10 + wide[2]) * 10 + wide[3]
    month, day, hour, minute, second = (wide[i] * 10 + wide[i + 1] for i in range(4, 14, 2))
    if (hour > 23).any() or (minute > 59).any() or (second > 59).any():
        return None
    days = _days(year, month, day)
    origin_day = origin_ns // NS_OF_A_DAY
    if days is None or int(np.abs(days - origin_day).max()) > MAX_SPAN_NS // NS_OF_A_DAY + 2:
        return None
    seconds = (((days - origin_day) * 24 + hour) * 60 + minute) * 60 + second - _offset_seconds(match[8])
    times_ns = seconds * NS_PER_SECOND + (origin_day * NS_OF_A_DAY - origin_ns)
    for place, digit in enumerate(wide[14:]):
        times_ns += digit * 10 ** (8 - place)
    return np.asarray(times_ns, np.int64)


def _days(year: Int64Array, month: Int64Array, day: Int64Array) -> Int64Array | None:
    """Return days since 1970-01-01, or None if a date does not exist."""
    months = (year * 12 + (month - 1)).astype(np.int64)
    days = np.empty(len(months), np.int64)
    for number in np.unique(months).tolist():  # a block rarely has more than two
        own = months == number
        years, months_left = divmod(number, 12)
        try:
            first = datetime.date(years, months_left + 1, 1)
        except ValueError:
            return None
        following = datetime.date(years + months_left // 11, (months_left + 1) % 12 + 1, 1) if years < 9999 else None
        in_month = 31 if following is None else (following - first).days
        if not _within(month[own], 12) or not _within(day[own], in_month):
            return None
        days[own] = first.toordinal() - _EPOCH_DAY + day[own] - 1
    return days


def _within(numbers: Int64Array, most: int) -> bool:
    return int(numbers.min()) >= 1 and int(numbers.max()) <= most
