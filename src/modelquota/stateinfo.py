"""What a state file is, and whether all of it agrees: for `modelquota inspect` and `modelquota verify`."""

from __future__ import annotations

import datetime
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from modelquota._core.inspection import Part, Reader, part_faults
from modelquota.errors import StateFileError

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFileInfo:
    """Facts about a state file at one moment.

    Attributes
    ----------
    path : str
    version : int
        Of the layout.
    size_bytes, disk_bytes : int
        Length, and what it takes of the disk: the file is sparse.
    max_models, models : int
        Places in the table, and models that have a quota.
    processes : int
        Alive, and sharing the state now.
    open_grants : int
        One a grant and model.
    waiting_lines : int
        One a process and model that somebody waits for.
    recoveries : int
        How often something was put right after a death.
    anchored_at : datetime.datetime
        When a process last tied the state's time to the wall clock.
    """

    path: str
    version: int
    size_bytes: int
    disk_bytes: int
    max_models: int
    models: int
    processes: int
    open_grants: int
    waiting_lines: int
    recoveries: int
    anchored_at: datetime.datetime


def inspect_file(path: str | os.PathLike[str]) -> StateFileInfo:
    """Return the facts about a state file, without changing a byte.

    Raises OSError where it cannot be opened, StateFileError where its header is not that of a state file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        reader = Reader(descriptor, os.fspath(path))
        reader.check_header()
        header = reader.header
        return StateFileInfo(
            path=os.fspath(path),
            version=int(header["version"]),
            size_bytes=reader.size,
            disk_bytes=os.fstat(descriptor).st_blocks * 512,
            max_models=int(header["max_models"]),
            models=sum(int((part.rows["generation"] % 2).sum()) for part in reader.parts()),
            processes=sum(_is_taken(descriptor, seat) for seat in range(1, int(header["seats_used"]) + 1)),
            open_grants=int((reader.held()["seat"] != 0).sum()),
            waiting_lines=int((reader.places()["count"] > 0).sum()),
            recoveries=int(header["recoveries"]),
            anchored_at=datetime.datetime.fromtimestamp(int(header["anchor_wall_ns"]) / 1e9, datetime.UTC),
        )
    finally:
        os.close(descriptor)


def verify_file(path: str | os.PathLike[str]) -> list[str]:
    """Return everything in a state file that does not agree, in words; empty where all does. Changes nothing.

    Sums are compared with the slots of the windows, what is held with the records of open grants, the lines with
    those of the waiting. What is being changed at the moment is left out.

    Raises OSError where it cannot be opened, StateFileError where its header is not that of a state file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        reader = Reader(descriptor, os.fspath(path))
        reader.check_header()
        found: list[str] = []
        for part in reader.parts():
            found += part_faults(part, int(reader.header["names_used"]))
            found += record_faults(reader, part)
        return found
    except StateFileError as error:
        if error.path != os.fspath(path):
            raise
        return [error.message]
    finally:
        os.close(descriptor)


def record_faults(reader: Reader, part: Part) -> Iterator[str]:
    """Compare what rows say is held and waits with the records of it."""
    count = len(part.rows)
    held, places = reader.held(), reader.places()
    sums = {name: np.zeros(count, np.int64) for name in ("concurrent", "reserved_ram_mb", "reserved_ssd_mb", "waiting")}
    for records, fields in ((held, {"ram_mb": "reserved_ram_mb", "ssd_mb": "reserved_ssd_mb"}), (places, {})):
        index = records["row"].astype(np.int64) - part.first
        of_part = (records["seat"] != 0) & (index >= 0) & (index < count)
        index, records = index[of_part], records[of_part]
        same = records["generation"] == part.rows["generation"][index]
        index, records = index[same], records[same]
        for field, name in fields.items():
            np.add.at(sums[name], index, records[field])
        if fields:
            np.add.at(sums["concurrent"], index, 1)
        else:
            np.add.at(sums["waiting"], index, records["count"])
    again = reader.part(part.first, count)  # a row that has changed since cannot be compared with later records
    steady = part.steady & again.steady & (part.rows["generation"] % 2 == 1)
    for name, total in sums.items():
        steady &= part.ledgers[name] == again.ledgers[name]
        for row in np.flatnonzero(steady & (part.ledgers[name] != total)):
            yield (
                f"row {part.first + int(row)}: {name} is {part.ledgers[name][row]}, and the records say {total[row]}"
            )


def _is_taken(descriptor: int, seat: int) -> bool:
    """Whether a living process holds the byte of a seat."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, seat, 1, 0)
    answer = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, asked))
    return bool(answer[0] != fcntl.F_UNLCK)
