"""Validation of a state file: whether its contents make sense. It only reads, while other processes may write.

A row is judged by a copy that was the same twice with the lock free. One that stays locked is being changed, or its
owner has died, in which case it will be repaired: of such a row only what could lead outside the mapping is judged.

Models are added and removed in the meantime. Values that are judged together were present together: a name belongs to a
row if the row's generation was the same before and after the name was read, and what bounds a row is read after it. A
fault is reported if it is found again in each of several reads of the same place; the rest of the file is not read
again.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelquota._core.state.mapping import MAX_MODELS_LIMIT
from modelquota._core.state.packing import core_limits, dtypes, encode_rate, ring_dtypes
from modelquota._core.state.state import CONSTANTS, count_processes, layout_fingerprint, regions_for
from modelquota.errors import StateFileError
from modelquota.quota.config import MAX_WEIGHT
from modelquota.quota.limits import DENYING, WINDOWS

MAGIC = CONSTANTS["magic"]
LAYOUT_VERSION = CONSTANTS["version"]
OLDEST_MIGRATED = 3
"""The oldest layout that ``modelquota migrate`` takes over."""
NAME_UNIT = CONSTANTS["name_unit"]
_MAX_COUNT = CONSTANTS["max_count"]
_UNLIMITED = CONSTANTS["unlimited"]
_NEVER = CONSTANTS["never"]
_ENCODED = np.dtype(
    [(name, np.float64 if name == "rate" else np.int64) for name in ("rate", "burst", "limit", "drain")]
    + [(name, np.uint64) for name in ("shift", "low", "high", "finer")]
)
_MAX_TIME_NS = CONSTANTS["max_time_ns"]
_COUNTS = (
    "ram_mb",
    "ssd_mb",
    "peak_ram_mb",
    "peak_ssd_mb",
    "reserved_ram_mb",
    "reserved_ssd_mb",
    "reserved_tokens",
    "concurrent",
    "waiting",
)
_TALLIES = ("rejected", "throttled", "queued", "waited", "violations")
_MAX_TALLY = 2**59  # 10**9 a second for 18 years; the sum of several is still a count
_SLOTS = CONSTANTS["slots"]
_THREE_SLOTS_NS = CONSTANTS["three_slots_ns"]
_FIRST_END_NS = (_THREE_SLOTS_NS + 2) // 3
_CODES, _WINDOWS = core_limits()
_PER_SLOT = tuple(per_slot for per_slot, *_ in _WINDOWS)
_AT_A_TIME = 1024
_LONGEST_NAME = CONSTANTS["longest_name"]  # bytes
_TRIES = 20
_FEW = 32
_LOOKS = 5
_SEATS = CONSTANTS["seats"]
_CHUNKS = CONSTANTS["chunks"]
_CHUNK = CONSTANTS["chunk"]
_RECORDS = CONSTANTS["records"]
_NO_RATE = CONSTANTS["no_rate"]
_WIDEST_SHIFT = CONSTANTS["widest_shift"]
_HIGH_BITS = CONSTANTS["level_bits"] + 1 - 64  # of the high word of a level or cap
_LOWEST_BITS = CONSTANTS["level_bits"] - CONSTANTS["coarse_bits"]  # of a lowest level, with a shift of 0
_LAST_ACTION = CONSTANTS["last_action"]
_LAST_CLOCK_KIND = CONSTANTS["last_clock_kind"]
_TRAIL = CONSTANTS["trail"]
_RULE_BITS = CONSTANTS["rule_bits"]
_MAX_WEIGHT = MAX_WEIGHT * 1_000_000
_ALWAYS_COUNTED = sum(1 << place for place, window in enumerate(WINDOWS) if not window.optional)
_SHADOWS = sum(1 << record.limit for record in DENYING)


@dataclass
class RowBlock:
    """Copies of some rows and their cold rows; `steady` is True for each that was copied at one moment.

    The header was read after them: nothing in them is newer than it.
    """

    first: int
    rows: NDArray[Any]
    cold_rows: NDArray[Any]
    rings: tuple[NDArray[Any], ...]
    shares: NDArray[Any]
    steady: NDArray[np.bool_] = field(repr=False)
    header: Any = field(repr=False)

    @property
    def max_models(self) -> int:
        """How many rows the state has."""
        return int(self.header["max_models"])

    def closed(self, what: str, window: int) -> NDArray[Any]:
        """The counts in the closed slots of a window, shape (rows, slots)."""
        ring = self.rings[window]
        counts = ring["slots"][:, :, int(what == "tokens")] if "slots" in (ring.dtype.names or ()) else ring[what]
        if counts.dtype != np.uint32:
            return np.asarray(counts)
        bits, mantissa = CONSTANTS["count_bits"], (1 << CONSTANTS["count_bits"]) - 1
        return np.asarray((counts & mantissa).astype(np.int64) << 2 * (counts >> bits).astype(np.int64))

    def ring_offsets(self) -> NDArray[np.int64]:
        """Where the rings of each row are, in bytes from its cold row, shape (rows, windows)."""
        regions = regions_for(self.max_models)
        index = self.first + np.arange(len(self.rows))
        cold_rows = regions.cold_rows + index * self.cold_rows.dtype.itemsize
        return np.stack(
            [
                offset + index * ring.dtype.itemsize - cold_rows
                for offset, ring in zip(regions.rings, self.rings, strict=True)
            ],
            axis=1,
        )

    def share_offsets(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the share of each row is, in bytes from its cold row; and the header's lease, from the share."""
        regions = regions_for(self.max_models)
        index = self.first + np.arange(len(self.rows))
        shares = regions.shares + index * self.shares.dtype.itemsize
        lease = offset_of("header", "lease")
        return shares - (regions.cold_rows + index * self.cold_rows.dtype.itemsize), lease - shares

    def configured(self, what: str) -> NDArray[Any]:
        """The configured limits of a row or cold row that has a share, otherwise those that it has; by field."""
        own = self.rows if what in (self.rows.dtype.names or ()) else self.cold_rows
        return _of_share(self.rows, own[what], self.shares[what])

    def is_like(self, other: RowBlock) -> NDArray[np.bool_]:
        """Which rows are the same, byte for byte, in a copy that was made at another time."""
        return _alike(
            (self.rows, self.cold_rows, *self.rings, self.shares),
            (other.rows, other.cold_rows, *other.rings, other.shares),
        )


class Reader:
    """A reader of the parts of an open state file, through its descriptor."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor = descriptor
        self.path = path
        self.layout = dtypes()
        self.size = os.fstat(descriptor).st_size
        self.header: Any = self.read_header() if self.size >= self.layout["header"].itemsize else None

    def read_header(self) -> Any:
        """Return the header as it is now; the attribute `header` is as it was when the reader was created."""
        return self._read(self.layout["header"], 1, 0)[0]

    def _read(self, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        data = bytearray(dtype.itemsize * count)  # writable: copies are advanced in time
        size = os.preadv(self.descriptor, [data], offset)
        if size != len(data):
            raise StateFileError(self.path, f"it ends after {offset + size} bytes, in the middle of its contents")
        return np.frombuffer(data, dtype)

    def check_header(self) -> None:
        """Raise StateFileError if the file is not a state file, or of another version or length."""
        header = self.header
        if header is None or int(header["magic"]) != MAGIC:
            raise StateFileError(self.path, "it is not a state file of modelquota")
        if int(header["version"]) > LAYOUT_VERSION:
            raise StateFileError(
                self.path,
                f"it has version {header['version']}, and this modelquota knows {LAYOUT_VERSION}: "
                "use the newer modelquota that wrote it",
            )
        if OLDEST_MIGRATED <= int(header["version"]) < LAYOUT_VERSION:
            raise StateFileError(
                self.path,
                f"it has layout {header['version']}, and this modelquota uses {LAYOUT_VERSION}: end every process that "
                f"has it open, then take it over, with its usage, by: modelquota migrate {shlex.quote(self.path)}",
            )
        if int(header["version"]) < LAYOUT_VERSION or int(header["fingerprint"]) != layout_fingerprint():
            raise StateFileError(
                self.path, "another version of modelquota, or one built for another machine, wrote it; start a new file"
            )
        most = int(header["max_models"])
        if not 1 <= most <= MAX_MODELS_LIMIT:
            raise StateFileError(self.path, f"max_models is {most}; 1 .. 2**24 is possible")
        self.regions = regions_for(most)
        if self.size != self.regions.size:
            raise StateFileError(
                self.path, f"it is {self.size} bytes long and should be {self.regions.size}: it was cut off or added to"
            )
        names = self.regions.size - self.regions.names
        for name, top in (("row_count", most), ("lowest_free", most), ("names_used", names)):
            if not 0 <= int(header[name]) <= top:
                raise StateFileError(self.path, f"{name} is {header[name]}; it may be {top} at most")
        for name, top in (("staged_row", most - 1), ("leaving_row", most - 1)):
            if not -1 <= int(header[name]) <= top:
                raise StateFileError(self.path, f"{name} is {header[name]}; it may be {top} at most")
        for name, top in (("seats_used", _SEATS - 1), ("entry_chunks_used", _CHUNKS), ("grant_chunks_used", _CHUNKS)):
            if int(header[name]) > top:
                raise StateFileError(self.path, f"{name} is {header[name]}; it may be {top} at most")
        if int(header["clock_kind"]) > _LAST_CLOCK_KIND:
            raise StateFileError(
                self.path, f"clock_kind is {header['clock_kind']}; it may be {_LAST_CLOCK_KIND} at most"
            )
        for name in ("anchor_ns", "clock_offset_ns", "anchor_wall_ns"):
            if abs(int(header[name])) > _MAX_TIME_NS and name != "anchor_wall_ns":
                raise StateFileError(self.path, f"{name} is {header[name]}; 2**61 ns is the most")
        for fault in lease_faults(header["lease"]):
            raise StateFileError(self.path, fault)

    def processes(self) -> int:
        """Return how many living processes have a seat."""
        used = min(int(self.read_header()["seats_used"]), _SEATS - 1)
        seats = self._read(self.layout["seat"], _SEATS, self.regions.seats)
        return count_processes(self.descriptor, seats.tobytes(), used)

    def held(self) -> NDArray[Any]:
        """Return the grant records; those with seat 0 are free."""
        used = min(int(self.read_header()["grant_chunks_used"]), _CHUNKS)
        return self._read(self.layout["grant"], used * _CHUNK, self.regions.grants)

    def entries(self) -> NDArray[Any]:
        """Return the queue entries; those with seat 0 are free."""
        used = min(int(self.read_header()["entry_chunks_used"]), _CHUNKS)
        return self._read(self.layout["entry"], used * _CHUNK, self.regions.entries)

    def parts(self) -> Iterator[RowBlock]:
        """Yield all rows that have ever been used, some at a time, including those added during the iteration."""
        most = int(self.header["max_models"])
        first, header = 0, self.read_header()
        while first < (count := min(int(header["row_count"]), most)):
            part = self.part(first, min(_AT_A_TIME, count - first))
            yield part
            first, header = first + len(part.rows), part.header

    def part(self, first: int, count: int) -> RowBlock:
        """Return copies of some rows, each of one moment if possible."""
        copies, again = self._copy(first, count), self._copy(first, count)
        steady = _same(copies, again)
        for _ in range(_TRIES - 1):
            if steady.all():
                break
            time.sleep(0.0002)  # a preempted owner holds its lock for longer than a copy takes
            left = np.flatnonzero(~steady).tolist()
            # One by one: the less time there is between two copies of a row, the less likely is a change between them.
            for at, size in [(0, count)] if len(left) > _FEW else [(index, 1) for index in left]:
                span = slice(at, at + size)
                one, same_one = self._copy(first + at, size), self._copy(first + at, size)
                unsteady = ~steady[span]
                for copy, fresh in zip(again, same_one, strict=True):
                    _bytes(copy)[span][unsteady] = _bytes(fresh)[unsteady]  # numpy would not copy the padding
                steady[span] |= _same(one, same_one)
        rows, cold_rows, *rings, shares = again
        return RowBlock(first, rows, cold_rows, tuple(rings), shares, steady, self.read_header())

    def _copy(self, first: int, count: int) -> tuple[NDArray[Any], ...]:
        row_type, cold_type, share_type = self.layout["row"], self.layout["cold"], self.layout["share"]
        return (
            self._read(row_type, count, self.regions.rows + first * row_type.itemsize),
            self._read(cold_type, count, self.regions.cold_rows + first * cold_type.itemsize),
            *(
                self._read(dtype, count, offset + first * dtype.itemsize)
                for dtype, offset in zip(ring_dtypes(), self.regions.rings, strict=True)
            ),
            self._read(share_type, count, self.regions.shares + first * share_type.itemsize),
        )

    def names(self, part: RowBlock) -> list[bytes | None]:
        """Return the names of a part's models; a name outside the region of names is empty.

        None for a row that is free, or whose model is no longer the one that was copied. A model's name does not
        change.
        """
        offsets = part.cold_rows["name_offset"].astype(np.int64) * NAME_UNIT
        sizes = part.cold_rows["name_size"].astype(np.int64)
        alive = part.rows["generation"] % 2 == 1
        found = self.names_at(offsets, np.where(alive, sizes, 0), int(part.header["names_used"]))
        alive &= self.generations(part.first, len(part.rows)) == part.rows["generation"]
        return [name if there else None for name, there in zip(found, alive.tolist(), strict=True)]

    def names_at(self, offsets: NDArray[np.int64], sizes: NDArray[np.int64], top: int) -> list[bytes]:
        """Return the names at these offsets below `top`, with a single read if they are close together."""
        inside = (sizes <= _LONGEST_NAME) & (offsets + sizes <= top)
        offsets, sizes = np.where(inside, offsets, 0), np.where(inside, sizes, 0)
        start, end = int(offsets[inside].min(initial=top)), int((offsets + sizes).max(initial=0))
        if end - start > _AT_A_TIME * _LONGEST_NAME:
            places = zip(offsets.tolist(), sizes.tolist(), strict=True)
            return [os.pread(self.descriptor, size, self.regions.names + offset) for offset, size in places]
        block = os.pread(self.descriptor, max(end - start, 0), self.regions.names + start)
        starts = (offsets - start).tolist()
        return [block[at : at + size] if size else b"" for at, size in zip(starts, sizes.tolist(), strict=True)]

    def generations(self, first: int, count: int) -> NDArray[np.uint32]:
        """Return the generations of some rows as they are now."""
        dtype = self.layout["row"]
        rows = self._read(dtype, count, self.regions.rows + first * dtype.itemsize)
        return np.asarray(rows["generation"], np.uint32)

    def name_of(self, row: int) -> bytes | None:
        """Return the name of the model that is in a row now."""
        return self.names(self.part(row, 1))[0]

    def share_a_name(self, row: int, other: int) -> bool:
        """Return whether the models in two rows have the same name at one moment."""
        part = self.part(row, 1)
        (name,), other_name = self.names(part), self.name_of(other)
        # The first row's model, and so its name, was there before and after the other name was read.
        there = self.generations(row, 1)[0] == part.rows["generation"][0]
        return name is not None and name == other_name and bool(there)


def offset_of(part: str, field: str) -> int:
    """Where a field of a part of the layout is, in bytes."""
    offset: int = dict(dtypes()[part].fields or {})[field][1]
    return offset


def _of_share(rows: NDArray[Any], own: NDArray[Any], of_share: NDArray[Any]) -> NDArray[Any]:
    """`of_share` of the rows that have a share, otherwise `own`."""
    found = own.copy()
    shared = rows["has_share"] != 0
    found[shared] = of_share[shared]
    return found


def _same(copies: tuple[NDArray[Any], ...], again: tuple[NDArray[Any], ...]) -> NDArray[np.bool_]:
    """Return which rows are the same in both copies, with the lock free: those are of one moment."""
    return np.asarray(_alike(copies, again) & (again[0]["lock"] == 0), np.bool_)


def _alike(copies: tuple[NDArray[Any], ...], others: tuple[NDArray[Any], ...]) -> NDArray[np.bool_]:
    same = np.ones(len(copies[0]), np.bool_)
    for copy, other in zip(copies, others, strict=True):
        same &= (_bytes(copy) == _bytes(other)).all(1)
    return same


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    return array.view(np.uint8).reshape(len(array), array.dtype.itemsize)


def validate(descriptor: int, path: str) -> int:
    """Return ``max_models`` of a valid file; raises StateFileError for the first fault."""
    reader = Reader(descriptor, path)
    reader.check_header()
    for fault in content_faults(reader):
        raise StateFileError(path, f"it is damaged: {fault}")
    return int(reader.header["max_models"])


def lasting(found: Iterable[str], look: Callable[[], Iterable[str]]) -> list[str]:
    """Return the faults that each further look finds too; the others were changes in progress."""
    faults = list(found)
    for pause in range(1, _LOOKS):
        if not faults:
            break
        time.sleep(0.0005 * pause)
        still = set(look())
        faults = [fault for fault in faults if fault in still]
    return faults


def content_faults(reader: Reader) -> Iterator[str]:
    """Yield the faults of a file whose header has been checked."""
    for judge in (_judge_staged, _judge_next_row, _judge_held, _judge_entries):
        yield from lasting(judge(reader), functools.partial(judge, reader))
    holders: dict[bytes, int] = {}
    for part in reader.parts():
        yield from lasting(_judge_part(part), functools.partial(_judge_again, reader, part))
        yield from _judge_names(reader, part, holders)


def _judge_staged(reader: Reader) -> Iterator[str]:
    header = reader.read_header()
    if int(header["staged_row"]) >= 0:
        yield from staged_faults(header)


def _judge_next_row(reader: Reader) -> Iterator[str]:
    """Yield a fault if the next row has been used already, so that row_count is too low."""
    header = reader.read_header()
    count = int(header["row_count"])
    if count == int(header["max_models"]) or header["registry_lock"] or header["registry_broken"]:
        return  # in the last two cases a model may be being added
    if reader.generations(count, 1)[0] != 0 and int(reader.read_header()["row_count"]) == count:
        yield f"row {count} was used, but row_count is {count}"


def _judge_held(reader: Reader) -> Iterator[str]:
    held = reader.held()
    for what in ("ram_mb", "ssd_mb", "tokens"):
        for record in np.flatnonzero((held[what] < 0) | (held[what] > _MAX_COUNT)):
            yield f"grant record {record}: {what} is not a count"
    until_ns, charge = held["unclaimed_until_ns"], held["charge"]
    for record in np.flatnonzero(
        (held["decider"] > _RECORDS) | (until_ns < CONSTANTS["lapsed"]) | (until_ns > _MAX_COUNT)
    ):
        yield f"grant record {record}: its deadline or its deciding record is invalid"
    for record in np.flatnonzero(
        (charge["tokens"] < 0)
        | (charge["tokens"] > _MAX_COUNT)
        | (charge["raised"] < 0)
        | (charge["raised"] > _MAX_COUNT)
        | (charge["raised_request"] > 1)
        | (charge["at_ns"] < 0)
        | (charge["at_ns"] > _MAX_TIME_NS)
    ):
        yield f"grant record {record}: its charge is invalid"


def _judge_entries(reader: Reader) -> Iterator[str]:
    entries = reader.entries()
    for what in ("next", "previous"):
        for record in np.flatnonzero(entries[what] > _RECORDS):
            yield f"queue entry {record}: {what} is not the number of an entry"
    for record in np.flatnonzero((entries["limit"] >= _CODES["LIMITS"]) | (entries["ready_ns"] < _NEVER)):
        yield f"queue entry {record}: its limit or its ready_ns is invalid"


def _judge_part(part: RowBlock) -> Iterator[str]:
    return part_faults(part, int(part.header["names_used"]), int(part.header["staged_row"]))


def _judge_again(reader: Reader, part: RowBlock) -> Iterator[str]:
    return _judge_part(reader.part(part.first, len(part.rows)))


def _judge_names(reader: Reader, part: RowBlock, holders: dict[bytes, int]) -> Iterator[str]:
    """Yield the models with no name or that of another model; `holders` has the row of each name seen so far."""
    for row, name in enumerate(reader.names(part), part.first):
        if name is None:
            continue
        other = holders.setdefault(name, row)
        if not _is_name(name) or (other != row and reader.share_a_name(other, row)):
            yield f"row {row} has no name, or one used before"
        elif other != row and reader.name_of(other) != name:
            holders[name] = row  # the model has been removed there and added here since


def _is_name(name: bytes) -> bool:
    try:
        return bool(name.decode()) and b"\0" not in name
    except UnicodeDecodeError:
        return False


def part_faults(part: RowBlock, names_used: int, staged_row: int = -1) -> Iterator[str]:
    """Yield the faults of some rows."""
    rows, cold_rows = part.rows, part.cold_rows
    outside = cold_rows["name_offset"].astype(np.int64) * NAME_UNIT + cold_rows["name_capacity"] > names_used
    outside |= (cold_rows["name_size"] > cold_rows["name_capacity"]) | (cold_rows["name_capacity"] > _LONGEST_NAME)
    yield from _each(part, outside, "its name is outside the region of names")
    yield from _each(part, np.asarray((cold_rows["filled"] > _SLOTS).any(1), np.bool_), "a window has too many slots")
    yield from _each(part, cold_rows["journal_filled"] > _SLOTS, "its journal has too many slots")
    yield from _each(part, cold_rows["action"] > _LAST_ACTION, "its action is unknown")
    yield from _each(part, cold_rows["stage"] > CONSTANTS["last_stage"], "its stage is unknown")
    yield from _each(part, rows["trail"] > _TRAIL, "its trail has too many slots")
    for link in ("meter_of", "first_meter", "next_meter"):
        itself = cold_rows[link] == part.first + np.arange(len(rows)) + 1
        yield from _each(part, (cold_rows[link] > part.max_models) | itself, f"its {link} is not another row")
    for what in ("request", "token"):
        dormant = rows[f"dormant_{what}_shift"]
        wrong = (dormant > _WIDEST_SHIFT) & (dormant != _NO_RATE)
        yield from _each(part, wrong, f"its dormant {what} rate has an unknown unit")
        shift = rows[f"{what}_shift"]
        yield from _each(part, (shift > _WIDEST_SHIFT) & (shift != _NO_RATE), f"its {what} rate has an unknown unit")
        wide = (rows[f"{what}_level"]["high"] | rows[f"{what}_cap"]["high"]) >> _HIGH_BITS
        yield from _each(part, wide != 0, f"its {what} level or its cap is too high")
        yield from _each(part, rows[f"{what}_drain"] < 0, f"its {what} rate is negative")
    for times in (rows["slot_end_ns"], rows["level_ns"], rows["trail_end_ns"]):
        yield from _each(part, (times < 0) | (times > _MAX_TIME_NS), "its time is beyond 2**61 ns")
    for name in ("first_entry", "last_entry"):
        yield from _each(part, cold_rows[name] > _RECORDS, f"its {name} is not the number of an entry")
    yield from _each(part, cold_rows["handles"] < 0, "its number of handles is negative")
    for name in _COUNTS:
        yield from _each(part, (cold_rows[name] < 0) | (cold_rows[name] > _MAX_COUNT), f"{name} is not a count")
    for name in _TALLIES:
        beyond = np.asarray(cold_rows[name] > _MAX_TALLY).reshape(len(rows), -1).any(1)
        yield from _each(part, beyond, f"{name} is too large")
    rolling = cold_rows["stage"] >= CONSTANTS["rolling"]
    slot = cold_rows["journal_slot"]
    yield from _each(
        part, rolling & ((slot < 0) | (slot > _MAX_TIME_NS // 10_000_000)), "its journal is beyond 2**61 ns"
    )
    alive = rows["generation"] % 2 == 1
    yield from _each(
        part, alive & (rows["slot_end_ns"] < _FIRST_END_NS), "its slot_end_ns is before the first slot ends"
    )
    offsets = cold_rows["ring_offset"] != part.ring_offsets()
    yield from _each(part, alive & offsets.any(1), "its ring_offset is not where its rings are")
    places, _ = part.share_offsets()
    yield from _each(part, alive & (cold_rows["share_offset"] != places), "its share_offset is not where its share is")
    counted = cold_rows["counted"].astype(np.int64)
    wrong = (counted & _ALWAYS_COUNTED != _ALWAYS_COUNTED) | (counted >> len(_PER_SLOT) != 0)
    yield from _each(part, alive & wrong, "the windows that it counts are unknown")
    # Including locked rows: limits change only while the header has the row as staged_row.
    settled = alive & (part.first + np.arange(len(rows)) != staged_row)
    yield from share_faults(part, alive, settled)
    yield from limit_faults(part, settled)
    yield from sum_faults(part, part.steady & alive)


def lease_faults(lease: Any) -> Iterator[str]:
    """Yield the faults of the lease of a state's shares."""
    rule, nodes = int(lease["rule"]) & ((1 << _RULE_BITS) - 1), int(lease["rule"]) >> _RULE_BITS
    if (rule == CONSTANTS["no_shares"]) != (nodes == 0):
        yield f"its lease has the rule {lease['rule']}, which is unknown"
    if not 0 <= int(lease["end_ns"]) <= _MAX_TIME_NS or abs(int(lease["clock_offset_ns"])) > _MAX_TIME_NS:
        yield "its lease ends beyond 2**61 ns, or its clock is beyond that"
    if not 0 <= int(lease["retry_ns"]) <= _MAX_TIME_NS:
        yield f"the retry_ns of its lease is {lease['retry_ns']}; 2**61 ns is the most"
    if (lease["node_size"] > CONSTANTS["node_bytes"]).any():
        yield "what its node remembers is longer than it can be"


def share_faults(part: RowBlock, alive: NDArray[np.bool_], settled: NDArray[np.bool_]) -> Iterator[str]:
    """Yield the faults of the shares of rows that have a model; `settled`, of those that are not given other limits."""
    rows, cold_rows, shares = part.rows, part.cold_rows, part.shares
    yield from _each(part, alive & (rows["has_share"] > 1), "whether it has a share is unknown")
    shared = alive & (rows["has_share"] == 1)
    if not shared.any():
        return
    _, leases = part.share_offsets()
    yield from _each(part, shared & (shares["lease_offset"] != leases), "its lease_offset is not where the lease is")
    held = shares["held"]
    yield from _each(part, shared & ~_is_limit(held).all(1), "its share is not a share")
    for name in ("peak_requests", "peak_tokens"):
        beyond = (shares[name] < 0) | (shares[name] > _MAX_COUNT)
        yield from _each(part, shared & beyond, f"its {name} is not a count")
    needed = shares["needed_tokens"]
    yield from _each(part, shared & ((needed < -1) | (needed > _MAX_COUNT)), "its needed_tokens is not a count")
    yield from _each(part, shared & (shares["starved"] > _MAX_TALLY), "starved is too large")
    for what in ("request", "token"):
        wrong = (shares[f"{what}_cap"]["high"] >> _HIGH_BITS != 0) | (shares[f"{what}_drain"] < 0)
        yield from _each(part, shared & wrong, f"the {what} rate of its share is none")
    for name in ("request_finer", "token_finer"):
        yield from _each(part, shared & (shares[name] >= CONSTANTS["fine_bits"]), f"its {name} is too large")
    shared = shared & settled & part.steady  # a repair computes the rest again
    phase = shares["phase"][:, None]
    of_grants = np.where(cold_rows["unit"] & CONSTANTS["cluster_concurrency"] != 0, held[:, -1], _UNLIMITED)
    pairs = [
        (cold_rows["request_limit"], shares["request_limit"], held[:, : len(_PER_SLOT)]),
        (cold_rows["token_limit"], shares["token_limit"], held[:, len(_PER_SLOT) : 2 * len(_PER_SLOT)]),
        (cold_rows["max_concurrent"][:, None], shares["max_concurrent"][:, None], of_grants[:, None]),
    ]
    for own, whole, part_held in pairs:
        wrong = (own != _left_of(whole, part_held, phase)).any(1)
        yield from _each(part, shared & wrong, "its limits are not what its share leaves of them")
    for what in ("request", "token"):
        more = rows[f"{what}_drain"] > shares[f"{what}_drain"]
        cap, whole_cap = rows[f"{what}_cap"], shares[f"{what}_cap"]
        more |= (cap["high"] > whole_cap["high"]) | (
            (cap["high"] == whole_cap["high"]) & (cap["low"] > whole_cap["low"])
        )
        more &= rows[f"{what}_shift"] != _NO_RATE
        yield from _each(part, shared & more, f"its {what} rate is more than its share is one of")


def _left_of(limit: NDArray[np.int64], held: NDArray[np.int64], phase: NDArray[np.uint32]) -> NDArray[np.int64]:
    """What a share leaves of limits, see ``part_of`` in ``share.pxd``."""
    rule, nodes = phase & ((1 << _RULE_BITS) - 1), np.maximum((phase >> _RULE_BITS).astype(np.int64), 1)
    left = np.where(rule == CONSTANTS["equal_parts"], limit // nodes, 0)
    left = np.where(rule == CONSTANTS["allow"], limit, left)
    left = np.where(phase == CONSTANTS["live"], np.minimum(limit, held), left)
    return np.where((limit == _UNLIMITED) | (held == _UNLIMITED), limit, left)


def staged_faults(header: Any) -> Iterator[str]:
    """Yield the faults of a change of limits that is under way, which another process may have to finish."""
    staged = header["staged"]
    for what in ("request", "token"):
        before = header["staged_row_before"]
        shifts = [int(before[f"{what}_shift"]), int(before[f"dormant_{what}_shift"])]
        wide = int(before[f"{what}_level"]["high"]) | int(before[f"{what}_cap"]["high"])
        if any(shift > _WIDEST_SHIFT and shift != _NO_RATE for shift in shifts) or wide >> _HIGH_BITS:
            yield f"the staged {what} level or its cap is too high"
        one = np.zeros((), _ENCODED)
        one["rate"], one["burst"] = staged[f"{what}s_per_second"], staged[f"burst_{what}s"]
        one["limit"], one["drain"] = staged[f"{what}_limits"][0], staged[f"{what}_drain"]
        one["shift"] = staged[f"{what}_shift"]
        one["low"], one["high"] = staged[f"{what}_cap"]["low"], staged[f"{what}_cap"]["high"]
        if not _is_encoded(one) or not _is_limit(staged[f"{what}_limits"]).all():
            yield f"the staged {what} limits are invalid"
    caps = np.array([staged[name] for name in ("max_ram_mb", "max_ssd_mb", "max_concurrent")])
    known = (
        int(staged["action"]) <= _LAST_ACTION
        and not int(staged["shadow"]) & ~_SHADOWS
        and not int(staged["unit"]) & ~CONSTANTS["flags"]
    )
    known &= bool(((staged["weights"] >= 0) & (staged["weights"] <= _MAX_WEIGHT)).all())
    if not _is_limit(caps).all() or not 0 <= int(staged["max_queued"]) <= _MAX_COUNT or not known:
        yield "the staged limits are invalid"
    if not 0 <= float(staged["grace_period_sec"]) < math.inf:
        yield "the staged grace_period_sec is invalid"


def limit_faults(part: RowBlock, alive: NDArray[np.bool_]) -> Iterator[str]:
    """Yield the limits that no configuration has, in rows that have a model and are not being changed."""
    rows, cold_rows = part.rows, part.cold_rows
    for name in ("max_ram_mb", "max_ssd_mb"):
        yield from _each(part, alive & ~_is_limit(cold_rows[name]), f"its {name} is not a limit")
    yield from _each(part, alive & ~_is_limit(part.configured("max_concurrent")), "its max_concurrent is not a limit")
    for name in ("max_queued", "burst_requests", "burst_tokens"):
        count = (cold_rows[name] >= 0) & (cold_rows[name] <= _MAX_COUNT)
        yield from _each(part, alive & ~count, f"its {name} is not a count")
    yield from _each(part, alive & (rows["shadow"] & ~np.uint16(_SHADOWS) != 0), "its shadow limits are unknown")
    with np.errstate(invalid="ignore"):
        grace = cold_rows["grace_period_sec"]
        yield from _each(part, alive & ~((grace >= 0) & np.isfinite(grace)), "its grace_period_sec is invalid")
        for what in ("request", "token"):
            rate = cold_rows[f"{what}s_per_second"]
            yield from _each(part, alive & ~(rate >= 0), f"its {what} rate is invalid")
    weights = cold_rows["weights"]
    wrong = ((weights < 0) | (weights > _MAX_WEIGHT)).any(1) | (cold_rows["unit"] & ~np.uint8(CONSTANTS["flags"]) != 0)
    yield from _each(part, alive & wrong, "its weights of tokens or their unit are unknown")
    for what in ("request", "token"):
        limits, cap = part.configured(f"{what}_limit"), part.configured(f"{what}_cap")
        for window in range(1, len(_PER_SLOT)):
            limit = limits[:, window]
            wrong = ~_is_limit(limit) | ((limit != _UNLIMITED) & ~_is_counted(cold_rows, window))
            yield from _each(part, alive & wrong, f"its limit of {what}s in window {window} is invalid")
        lowest = cold_rows[f"{what}_minimum"]
        shift = np.minimum(rows[f"{what}_shift"].astype(np.int64), _WIDEST_SHIFT)
        widest = np.ldexp(1.0, _LOWEST_BITS - shift)
        wrong = np.asarray(((lowest < 0) | (lowest > widest[:, None])).any(1), np.bool_)
        wrong |= rows[f"trail_{what}_minimum"] < 0
        # Not of a locked row: a repair resets them.
        yield from _each(part, alive & part.steady & wrong, f"its lowest {what} level is invalid")
        encoded = np.empty(len(rows), _ENCODED)
        encoded["rate"], encoded["burst"] = cold_rows[f"{what}s_per_second"], cold_rows[f"burst_{what}s"]
        encoded["limit"], encoded["drain"] = limits[:, 0], part.configured(f"{what}_drain")
        encoded["shift"] = rows[f"{what}_shift"]
        encoded["low"], encoded["high"] = cap["low"], cap["high"]
        encoded["finer"] = rows["has_share"] == 1
        # without a rate, cap and drain are those of the previous rate: any values within their bounds
        unset = encoded["shift"] == _NO_RATE
        for name in ("drain", "low", "high"):
            encoded[name][unset] = 0
        wrong = _each_kind(encoded, lambda one: not _is_encoded(one))
        yield from _each(part, alive & wrong, f"its {what} rate disagrees with how it is encoded")


def _is_limit(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    return np.asarray((values >= 0) & (values <= _MAX_COUNT) | (values == _UNLIMITED), np.bool_)


def _is_counted(cold_rows: NDArray[Any], window: int) -> NDArray[np.bool_]:
    return np.asarray(cold_rows["counted"] >> window & 1 == 1, np.bool_)


def _each_kind(records: NDArray[Any], judge: Callable[[Any], bool]) -> NDArray[np.bool_]:
    """Return the result of `judge` for each record; it is called once for records that are the same."""
    size, data = records.dtype.itemsize, records.tobytes()
    said: dict[bytes, bool] = {}
    found = np.empty(len(records), np.bool_)
    for index in range(len(records)):
        key = data[index * size : (index + 1) * size]
        if key not in said:
            said[key] = judge(records[index])
        found[index] = said[key]
    return found


def _is_encoded(one: Any) -> bool:
    """Return whether a rate's values are those of `encode_rate`."""
    rate, burst, *figures, finer = one.tolist()
    if not rate >= 0 or not 0 <= burst <= _MAX_COUNT:
        return False
    limit, drain, shift, cap = encode_rate(None if rate == math.inf else rate, burst, bool(finer))
    return bool(figures == [limit, drain, shift, cap & (2**64 - 1), cap >> 64])


def sum_faults(part: RowBlock, alive: NDArray[np.bool_]) -> Iterator[str]:
    """Yield the sums that disagree with their parts, in rows that have a model and are not being changed."""
    rows, cold_rows = part.rows, part.cold_rows
    yield from _each(part, alive & (cold_rows["stage"] != CONSTANTS["idle"]), "a change is unfinished")
    slot = rows["slot_end_ns"] * 3 // _THREE_SLOTS_NS
    edge = (slot * _THREE_SLOTS_NS + 2) // 3
    yield from _each(part, alive & (edge != rows["slot_end_ns"]), "its slot_end_ns is not the end of a slot")
    current = slot - 1
    room = {"requests": rows["request_room"], "tokens": rows["token_room"]}
    followed = rows["trail_slots"].astype(np.int64)
    in_trail = np.arange(_TRAIL) < rows["trail"][:, None]
    wrong = (np.diff(followed, axis=1, prepend=0) <= 0) & in_trail
    yield from _each(part, alive & wrong.any(1), "the slots of its trail are not in order")
    end = (current + 1 + np.where(rows["trail"] > 0, _last_of_trail(rows), 0)) * _THREE_SLOTS_NS + 2
    yield from _each(part, alive & (end // 3 != rows["trail_end_ns"]), "its trail_end_ns is not the end of its trail")
    limit = {what: cold_rows[f"{what[:-1]}_limit"] for what in room}
    for what in ("requests", "tokens"):
        charged = cold_rows[f"{what}_mark"] - room[what].view(np.uint64)
        least = np.full(len(rows), _MAX_COUNT)
        for window, per_slot in enumerate(_PER_SLOT):
            age = ((current // per_slot - 1) % _SLOTS).astype(np.int8)[:, None] - np.arange(_SLOTS, dtype=np.int8)
            age[age < 0] += _SLOTS
            counted = alive & _is_counted(cold_rows, window)
            ring = np.where(age < cold_rows["filled"][:, window][:, None], part.closed(what, window), 0)
            base, start = cold_rows[f"{what}_base"][:, window], cold_rows[f"{what}_start"][:, window]
            wrong = start - base != ring.astype(np.uint64).sum(1)
            yield from _each(part, counted & wrong, f"the {what} of window {window} are not the sum of its slots")
            used = (charged - base).view(np.int64)
            here = (charged - start).view(np.int64)
            bad = (used < 0) | (used > _MAX_COUNT) | (here < 0)
            yield from _each(part, counted & bad, f"the {what} of window {window} are not a count")
            left = np.minimum(limit[what][:, window], _MAX_COUNT) - used
            least = np.minimum(least, np.where(counted, left, _MAX_COUNT))
            if window == 0:
                yield from _each(
                    part, alive & (_in_trail(rows, what) != here), f"the {what} of its trail do not add up"
                )
        unlike = np.asarray(least != room[what], np.bool_)
        if what == "requests":  # there is no room while that holds, and requests that are still admitted take more
            held_up = (cold_rows["concurrent"] >= cold_rows["max_concurrent"]) | (cold_rows["waiting"] != 0)
            unlike = np.where(held_up, room[what] > np.minimum(least, 0), unlike)
        yield from _each(part, alive & unlike, f"{what[:-1]}_room disagrees with the limits")


def _last_of_trail(rows: NDArray[Any]) -> NDArray[np.int64]:
    """The slot that each trail has reached, counted from the one that the windows are in."""
    last = np.maximum(np.minimum(rows["trail"], _TRAIL), 1).astype(np.intp) - 1
    return np.asarray(np.take_along_axis(rows["trail_slots"], last[:, None], 1)[:, 0].astype(np.int64), np.int64)


def _in_trail(rows: NDArray[Any], what: str) -> NDArray[np.int64]:
    """What was charged in the slots of each trail, the one that it has reached included."""
    ended = np.where(np.arange(_TRAIL) < rows["trail"][:, None], rows[f"trail_{what}"], 0).astype(np.int64).sum(1)
    with np.errstate(over="ignore"):
        return np.asarray(ended + rows[f"trail_{what[:-1]}_room"] - rows[f"{what[:-1]}_room"], np.int64)


def _each(part: RowBlock, wrong: Any, what: str) -> Iterator[str]:
    for index in np.flatnonzero(wrong):
        yield f"row {part.first + int(index)}: {what}"
