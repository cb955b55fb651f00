"""A reader of state files with an earlier layout, in use by no process, which checks what it reads.

What a process was changing when it died is finished here, by the rules of that time: see `_finish`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelquota._core.state.mapping import MAX_MODELS_LIMIT
from modelquota._core.state.state import CONSTANTS
from modelquota.errors import StateFileError
from modelquota.statefile.layouts import NAME_UNIT, OLD_LAYOUTS, PER_SLOT, PREAMBLE, OldLayout

_AT_A_TIME = 1024
_SLOTS = 60
_THREE_SLOTS_NS = 50_000_000  # three slots of the second
_MAX_COUNT, _MAX_TIME_NS = 2**62, 2**61
_LONGEST_NAME = 255
_NO_RATE, _WIDEST_SHIFT, _LEVEL_MAX = 255, 95, 2**125
_ROLLING, _LAST_STAGE = 2, 7
_LAST_ACTION = 3
_LAST_CLOCK_KIND = 2
_WORD = 2**64


@dataclass(frozen=True, slots=True)
class OldModels:
    """Some models of an old file: their names, and copies of their rows and ledgers, each complete."""

    names: list[str]
    rows: NDArray[Any]
    ledgers: NDArray[Any]


class OldFile:
    """An open state file with an earlier layout; raises StateFileError if it is not one, or is damaged."""

    def __init__(self, descriptor: int, path: str) -> None:
        self.descriptor, self._path = descriptor, path
        size = os.fstat(descriptor).st_size
        preamble = self._read(PREAMBLE, 1, 0)[0] if size >= PREAMBLE.itemsize else None
        if preamble is None or int(preamble["magic"]) != CONSTANTS["magic"]:
            raise StateFileError(path, "it is not a state file of modelquota")
        self.layout = self._layout_of(preamble)
        most = int(preamble["max_models"])
        if not 1 <= most <= MAX_MODELS_LIMIT:
            raise StateFileError(path, f"max_models is {most}; 1 .. 2**24 is possible")
        self._rows, self._ledgers, self._names, whole = self.layout.places(most)
        if size != whole:
            raise StateFileError(path, f"it is {size} bytes long and should be {whole}: it was cut off or added to")
        self.header = self._read(self.layout.header, 1, 0)[0]
        self._check_header(most, whole - self._names)
        self._undo_removal()
        self.recovered = 0  # rows that a process was changing when it died

    def _layout_of(self, preamble: Any) -> OldLayout:
        version, current = int(preamble["version"]), CONSTANTS["version"]
        if version == current:
            raise StateFileError(self._path, f"it already has layout {current}, that of this modelquota")
        if version > current:
            raise StateFileError(
                self._path,
                f"it has layout {version}, and this modelquota knows {current}: use the newer modelquota that wrote it",
            )
        layout = OLD_LAYOUTS.get(version)
        if layout is None:
            *most, last = map(str, OLD_LAYOUTS)
            known = f"{', '.join(most)} and {last}"
            raise StateFileError(
                self._path, f"it has layout {version}, and layouts {known} can be taken over: start a new file"
            )
        if int(preamble["fingerprint"]) != layout.fingerprint:
            raise StateFileError(
                self._path,
                f"its layout is not the released layout {version}: a modelquota built for another machine, or between "
                "two versions, wrote it; start a new file",
            )
        return layout

    def _check_header(self, most: int, names_size: int) -> None:
        header = self.header
        for name, top in (("row_count", most), ("names_used", names_size)):
            if not 0 <= int(header[name]) <= top:
                raise StateFileError(self._path, f"{name} is {header[name]}; it may be {top} at most")
        for name in ("staged_row", "leaving_row"):
            if not -1 <= int(header[name]) < most:
                raise StateFileError(self._path, f"{name} is {header[name]}; it may be {most - 1} at most")
        if int(field_of(header, "clock_kind")) > _LAST_CLOCK_KIND:
            raise StateFileError(self._path, f"clock_kind is {header['clock_kind']}, which is unknown")
        for name in ("anchor_ns", "clock_offset_ns"):
            if abs(int(header[name])) > _MAX_TIME_NS:
                raise StateFileError(self._path, f"{name} is {header[name]}; 2**61 ns is the most")
        if int(header["staged_row"]) >= 0 and int(header["staged"]["action"]) > _LAST_ACTION:
            raise StateFileError(self._path, "it is damaged: the staged limits are invalid")

    def _undo_removal(self) -> None:
        """Undo the part of a removal that was done when its process died, if the model is still in its row."""
        header = self.header
        row = int(header["leaving_row"])
        there = self._read(self.layout.row, 1, self._rows + max(row, 0) * self.layout.row.itemsize)[0]["generation"]
        if row >= 0 and there == header["leaving_generation"]:
            names = [name for name in header.dtype.names if name.startswith("retired_")]
            values = header["staged_retired"].tolist()
            for name in names[:-1]:
                header[name] = values.pop(0)
            header[names[-1]] = values

    def _read(self, dtype: np.dtype[Any], count: int, offset: int) -> NDArray[Any]:
        data = bytearray(dtype.itemsize * count)  # writable: copies are completed
        size = os.preadv(self.descriptor, [data], offset)
        if size != len(data):
            raise StateFileError(self._path, f"it ends after {offset + size} bytes, in the middle of its contents")
        return np.frombuffer(data, dtype)

    def seats(self) -> bytes:
        """Return the seats of processes. Those of layout 3 had locks and nothing else, so they are zeros."""
        size = 16 * CONSTANTS["seats"]
        start = self.layout.regions(1)[0]
        return os.pread(self.descriptor, size, start) if self.layout.version > 3 else bytes(size)

    def models(self) -> Iterator[OldModels]:
        """Yield all models, some at a time, in the order of their rows."""
        header, layout = self.header, self.layout
        most, count = int(header["max_models"]), int(header["row_count"])
        changing = bool(header["registry_lock"] or field_of(header, "registry_broken"))
        while count < most:  # a model may have been added without being counted
            if self._read(layout.row, 1, self._rows + count * layout.row.itemsize)[0]["generation"] == 0:
                break
            if not changing:
                self._refuse(count, f"it was used, but row_count is {count}")
            count += 1
        seen: set[str] = set()
        for first in range(0, count, _AT_A_TIME):
            size = min(_AT_A_TIME, count - first)
            rows = self._read(layout.row, size, self._rows + first * layout.row.itemsize)
            ledgers = self._read(layout.ledger, size, self._ledgers + first * layout.ledger.itemsize)
            alive = np.flatnonzero(rows["generation"] % 2)
            rows, ledgers = rows[alive], ledgers[alive]  # copies
            self._check_bounds(first + alive, rows, ledgers)
            self._check_sums(first + alive, rows, ledgers, rows["lock"] == 0)
            for at in np.flatnonzero(rows["lock"] != 0):
                self.recovered += 1
                _finish(rows[at], ledgers[at], int(first + alive[at]), header)
            names = [self._name(int(first + row), ledger, seen) for row, ledger in zip(alive, ledgers, strict=True)]
            yield OldModels(names, rows, ledgers)

    def _name(self, row: int, ledger: Any, seen: set[str]) -> str:
        start, size = int(ledger["name_offset"]) * NAME_UNIT, int(ledger["name_size"])
        if not 0 < size <= min(_LONGEST_NAME, int(ledger["name_capacity"])) or start + size > self.header["names_used"]:
            self._refuse(row, "its name is outside the region of names")
        try:
            name = os.pread(self.descriptor, size, self._names + start).decode()
        except UnicodeDecodeError:
            name = ""
        if not name or name in seen:
            self._refuse(row, "it has no name, or one used before")
        seen.add(name)
        return name

    def _refuse(self, row: int, fault: str) -> None:
        raise StateFileError(self._path, f"it is damaged: row {row}: {fault}")

    def _refuse_any(self, numbers: NDArray[np.int64], wrong: Any, fault: str) -> None:
        for at in np.flatnonzero(wrong)[:1]:
            self._refuse(int(numbers[at]), fault)

    def _check_bounds(self, numbers: NDArray[np.int64], rows: NDArray[Any], ledgers: NDArray[Any]) -> None:
        """Refuse what could not be read, locked rows included; what is only copied is validated afterwards."""
        self._refuse_any(numbers, (ledgers["filled"] > _SLOTS).any(1), "a window has too many slots")
        self._refuse_any(numbers, ledgers["journal_filled"] > _SLOTS, "its journal has too many slots")
        self._refuse_any(numbers, ledgers["action"] > _LAST_ACTION, "its action is unknown")
        self._refuse_any(numbers, ledgers["stage"] > _LAST_STAGE, "its stage is unknown")
        rolling, slot = ledgers["stage"] >= _ROLLING, ledgers["journal_slot"]
        late = (slot < 0) | (slot > _MAX_TIME_NS // 20_000_000)
        self._refuse_any(numbers, rolling & late, "its journal is beyond 2**61 ns")
        for name in ("slot_end_ns", "level_ns"):
            late = (rows[name] < 0) | (rows[name] > _MAX_TIME_NS)
            self._refuse_any(numbers, late, "its time is beyond 2**61 ns")
        for name in ("concurrent", "waiting"):
            wrong = (ledgers[name] < 0) | (ledgers[name] > _MAX_COUNT)
            self._refuse_any(numbers, wrong, f"{name} is not a count")
        for name in (name for name in rows.dtype.names or () if name.endswith("_shift")):
            wrong = (rows[name] > _WIDEST_SHIFT) & (rows[name] != _NO_RATE)
            self._refuse_any(numbers, wrong, f"its {name} is unknown")

    def _check_sums(
        self, numbers: NDArray[np.int64], rows: NDArray[Any], ledgers: NDArray[Any], steady: NDArray[np.bool_]
    ) -> None:
        """Refuse rows whose sums disagree with their parts, but for those that were being changed."""
        self._refuse_any(numbers, steady & (ledgers["stage"] != 0), "a change is unfinished")
        slot = rows["slot_end_ns"] * 3 // _THREE_SLOTS_NS
        edge = (slot * _THREE_SLOTS_NS + 2) // 3
        self._refuse_any(numbers, steady & (edge != rows["slot_end_ns"]), "its slot_end_ns is not the end of a slot")
        for what in ("request", "token"):
            room = rows[f"{what}_room"]
            charged = ledgers[f"{what}s_mark"] - room.view(np.uint64)
            least = np.full(len(rows), _MAX_COUNT)
            for window, per_slot in enumerate(PER_SLOT):
                counted = in_order(ledgers, f"{what}s", window, (slot - 1) // per_slot)
                base, start = ledgers[f"{what}s_base"][:, window], ledgers[f"{what}s_start"][:, window]
                wrong = start - base != counted.astype(np.uint64).sum(1)
                self._refuse_any(
                    numbers, steady & wrong, f"the {what}s of window {window} are not the sum of its slots"
                )
                used, here = (charged - base).view(np.int64), (charged - start).view(np.int64)
                wrong = (used < 0) | (used > _MAX_COUNT) | (here < 0)
                self._refuse_any(numbers, steady & wrong, f"the {what}s of window {window} are not a count")
                least = np.minimum(least, np.minimum(ledgers[f"{what}_limit"][:, window], _MAX_COUNT) - used)
            unlike = least != room
            if what == "request":  # there is no room while that holds, and requests that are still admitted take more
                held_up = (ledgers["concurrent"] >= ledgers["max_concurrent"]) | (ledgers["waiting"] != 0)
                unlike = np.where(held_up, room > np.minimum(least, 0), unlike)
            self._refuse_any(numbers, steady & unlike, f"its {what}_room disagrees with its limits")


def field_of(record: Any, name: str) -> Any:
    """Return a field of a record, or 0 if its layout had no such field."""
    return record[name] if name in record.dtype.names else 0


def in_order(ledgers: NDArray[Any], what: str, window: int, current: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the closed slots of a window, the oldest first, shape (rows, 60); those that are not filled are 0.

    `current` is the number of the window's slot that each row is in.
    """
    positions = (current[:, None] - np.arange(_SLOTS, 0, -1)) % _SLOTS
    counts = np.take_along_axis(ledgers[what][:, window], positions, 1).astype(np.int64)
    return np.where(np.arange(_SLOTS, 0, -1) <= ledgers["filled"][:, window][:, None], counts, 0)


# -- what a process was changing when it died


def _finish(row: Any, ledger: Any, index: int, header: Any) -> None:
    """Finish the change of a row, as the version that began it would have when another process took the lock over.

    What was charged and the slots are the truth; the rest is computed again from them.
    """
    if ledger["stage"]:
        if ledger["stage"] >= _ROLLING:
            _finish_rolling(row, ledger)
        for what in ("request", "token"):
            row[f"{what}_room"] = 0
            ledger[f"{what}s_mark"] = ledger[f"journal_{what}s"]
        ledger["stage"] = 0
    current = int(row["slot_end_ns"]) * 3 // _THREE_SLOTS_NS - 1
    for what in ("request", "token"):
        for window, per_slot in enumerate(PER_SLOT):
            slots = in_order(np.atleast_1d(ledger), f"{what}s", window, np.array([current // per_slot]))
            base = int(ledger[f"{what}s_start"][window]) - sum(slots[0].tolist())
            ledger[f"{what}s_base"][window] = base % _WORD
    if header["staged_row"] == index and header["staged_generation"] == row["generation"]:
        _change_limits(row, ledger, header)
    for what in ("request", "token"):
        for name in (f"{what}_low", f"{what}_minimum"):
            if name in ledger.dtype.names:
                ledger[name] = 0  # they are lower bounds
        put_level(row, what, min(level_of(row, what), _LEVEL_MAX))


def _finish_rolling(row: Any, ledger: Any) -> None:
    """Move the windows that had not been moved to the slot in the journal."""
    broken, is_done = divmod(int(ledger["stage"]) - _ROLLING, 2)
    before, after = int(row["slot_end_ns"]) * 3 // _THREE_SLOTS_NS - 1, int(ledger["journal_slot"])
    for window, per_slot in enumerate(PER_SLOT):
        first = before // per_slot
        steps = after // per_slot - first
        if steps <= 0:
            break
        if window < broken or (window == broken and is_done):
            continue
        if window == broken:
            ledger["filled"][window] = ledger["journal_filled"]
            for what in ("requests", "tokens"):
                ledger[f"{what}_start"][window] = ledger[f"journal_{what}_start"]
        _turn(ledger, window, first, steps)
    if after > before:
        row["slot_end_ns"] = ((after + 1) * _THREE_SLOTS_NS + 2) // 3


def _turn(ledger: Any, window: int, slot: int, steps: int) -> None:
    """Close a window's slot `slot`, and open slot `slot + steps`."""
    most = {"requests": 2**32 - 1, "tokens": _WORD}
    for what in most:
        charged, start = int(ledger[f"journal_{what}"]), int(ledger[f"{what}_start"][window])
        if steps > _SLOTS:
            start = charged
        for step in range(min(steps, _SLOTS) if steps <= _SLOTS else 0):
            closed = min((charged - start) % _WORD, most[what])
            ledger[what][window][(slot + step) % _SLOTS] = closed if what == "requests" else closed % 2**63
            start += closed
        ledger[f"{what}_start"][window] = start % _WORD
    ledger["filled"][window] = 0 if steps > _SLOTS else min(int(ledger["filled"][window]) + steps, _SLOTS)


def level_of(row: Any, what: str) -> int:
    """The level of requests or tokens, in its own unit."""
    level = row[f"{what}_level"]
    return int(level["high"]) << 64 | int(level["low"])


def put_level(row: Any, what: str, level: int) -> None:
    """Write a level."""
    row[f"{what}_level"]["low"], row[f"{what}_level"]["high"] = level % _WORD, level >> 64


def rescaled(level: int, shift: int, new_shift: int) -> int:
    """A level in another rate's unit: the same count, rounded up."""
    if _NO_RATE in (shift, new_shift):
        return 0
    return min(level << new_shift - shift if new_shift >= shift else -(-level >> shift - new_shift), _LEVEL_MAX)


def _change_limits(row: Any, ledger: Any, header: Any) -> None:
    """Repeat a change of limits from its beginning: the levels are as they were before it."""
    staged, names = header["staged"], header.dtype.names
    fields = set(staged.dtype.names) & set(ledger.dtype.names)
    for name in fields:
        ledger[name] = staged[name]
    if "shadow" in row.dtype.names:
        row["shadow"] = staged["shadow"]
    for what in ("request", "token"):
        ledger[f"{what}_limit"] = staged[f"{what}_limits"]
        if "staged_row_before" in names:
            for name in ("level", "cap", "drain", "shift"):
                row[f"{what}_{name}"] = header["staged_row_before"][f"{what}_{name}"]
            dormant = int(header["staged_row_before"][f"dormant_{what}_shift"])
        else:  # layout 3 had no dormant levels
            row[f"{what}_level"], dormant = header[f"staged_{what}_level"], _NO_RATE
            row[f"{what}_shift"] = header[f"staged_{what}_shift"]
        _change_rate(row, ledger, what, dormant, staged)


def _change_rate(row: Any, ledger: Any, what: str, dormant: int, staged: Any) -> None:
    """Replace a rate, and keep the content of its level; without a rate it becomes dormant."""
    level, cap = level_of(row, what), int(row[f"{what}_cap"]["high"]) << 64 | int(row[f"{what}_cap"]["low"])
    shift, new_shift = int(row[f"{what}_shift"]), int(staged[f"{what}_shift"])
    mark, start = int(ledger[f"{what}s_mark"]), int(ledger[f"{what}s_start"][0])
    in_slot = (mark - int(row[f"{what}_room"]) - start) % _WORD
    if new_shift != _NO_RATE:
        if shift == _NO_RATE and dormant != _NO_RATE:
            level = max(level, min(level + (in_slot * 10**9 << dormant), cap))
        level = rescaled(level, shift if shift != _NO_RATE else dormant, new_shift)
        row[f"{what}_drain"], row[f"{what}_cap"] = staged[f"{what}_drain"], staged[f"{what}_cap"]
        dormant = _NO_RATE
    elif f"dormant_{what}_shift" not in row.dtype.names:
        level = 0
    elif shift != _NO_RATE:
        dormant = shift
        if level <= cap:
            level = max(level - (in_slot * 10**9 << shift), 0)
    put_level(row, what, level)
    row[f"{what}_shift"] = new_shift
    if f"dormant_{what}_shift" in row.dtype.names:
        row[f"dormant_{what}_shift"] = dormant
