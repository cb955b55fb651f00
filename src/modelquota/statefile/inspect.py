"""Reports the facts of a state file and checks its consistency, for `modelquota inspect` and `modelquota verify`."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelquota._core.state.validate import Reader, RowBlock, content_faults
from modelquota.errors import StateFileError

_TRIES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class StateFileInfo:
    """Facts about a state file at one moment.

    Attributes
    ----------
    path : str
    version : int
        Version of the layout.
    size_bytes, disk_bytes : int
        Length, and the space it takes on the disk, which is less since the file is sparse.
    max_models, models : int
        Size of the table, and number of models that have a quota.
    processes : int
        Live processes that share the state now.
    open_grants : int
        Counted once for each model that a grant holds.
    waiting_requests : int
        Counted once for each model that a request waits for.
    recoveries : int
        How often something was repaired after a process had died.
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
    waiting_requests: int
    recoveries: int
    anchored_at: datetime.datetime


def inspect_file(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> StateFileInfo:
    """Return the facts about a state file, without changing a byte.

    Raises OSError if it cannot be opened, StateFileError if its header is not that of a state file.
    """
    path = os.fsdecode(path)
    with _opened(path) as reader:
        header, held = reader.header, reader.held()
        return StateFileInfo(
            path=path,
            version=int(header["version"]),
            size_bytes=reader.size,
            disk_bytes=os.fstat(reader.descriptor).st_blocks * 512,
            max_models=int(header["max_models"]),
            models=sum(int((part.rows["generation"] % 2).sum()) for part in reader.parts()),
            processes=reader.processes(),
            open_grants=int(((held["seat"] != 0) & (held["is_handle"] == 0)).sum()),
            waiting_requests=int((reader.entries()["linked"] != 0).sum()),
            recoveries=int(header["recoveries"]),
            anchored_at=datetime.datetime.fromtimestamp(int(header["anchor_wall_ns"]) / 1e9, datetime.UTC),
        )


def verify_file(path: str | bytes | os.PathLike[str] | os.PathLike[bytes]) -> list[str]:
    """Return a sentence for each inconsistency in a state file; an empty list if there are none. Changes nothing.

    Compares sums with the slots of their windows, what rows hold with the records of open grants, and queues with the
    records of waiting requests. Skips what is being changed at the moment.

    Raises OSError if it cannot be opened, StateFileError if its header is not that of a state file.
    """
    path = os.fsdecode(path)
    try:
        with _opened(path) as reader:
            found = list(content_faults(reader))
            for part in reader.parts():
                found += record_faults(reader, part)
            return found
    except StateFileError as error:
        if error.path != path:
            raise
        return [error.message]


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Reader]:
    """Open a state file to read it, and check its header."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        reader = Reader(descriptor, path)
        reader.check_header()
        yield reader
    finally:
        os.close(descriptor)


def record_faults(reader: Reader, part: RowBlock) -> Iterator[str]:
    """Compare what rows count as held and waiting with the records of grants and queue entries."""
    totals = record_sums(reader, part)
    unlike = np.zeros(len(part.rows), np.bool_)
    for name, total in totals.items():
        unlike |= part.cold_rows[name] != total
    for row in np.flatnonzero(unlike & part.steady & (part.rows["generation"] % 2 == 1)):
        yield from _compare_alone(reader, part.first + int(row))


def _compare_alone(reader: Reader, row: int) -> Iterator[str]:
    """Compare one row with records that were read while it did not change; skip a row that keeps changing."""
    for _ in range(_TRIES):
        before = reader.part(row, 1)
        totals = record_sums(reader, before)
        after = reader.part(row, 1)
        if (before.steady & after.steady & before.is_like(after))[0]:
            for name, total in totals.items():
                if before.rows["generation"][0] % 2 and before.cold_rows[name][0] != total[0]:
                    yield f"row {row}: {name} is {before.cold_rows[name][0]}, but its records add up to {total[0]}"
            break


def record_sums(reader: Reader, part: RowBlock) -> dict[str, NDArray[np.int64]]:
    """Sum the records of open grants and of queues for some rows, by the field of the cold row that must agree."""
    count = len(part.rows)
    held, entries = reader.held(), reader.entries()
    entries = entries[entries["linked"] != 0]
    amounts = {"ram_mb": "reserved_ram_mb", "ssd_mb": "reserved_ssd_mb", "tokens": "reserved_tokens"}
    sums = {name: np.zeros(count, np.int64) for name in ("concurrent", "handles", "waiting", *amounts.values())}
    handles = held["is_handle"] != 0
    for records, number, fields in (
        (held[~handles], "concurrent", amounts),
        (held[handles], "handles", {}),
        (entries, "waiting", {}),
    ):
        index = records["row"].astype(np.int64) - part.first
        of_part = (records["seat"] != 0) & (index >= 0) & (index < count)
        index, records = index[of_part], records[of_part]
        same = records["generation"] == part.rows["generation"][index]
        index, records = index[same], records[same]
        for field, name in fields.items():
            np.add.at(sums[name], index, records[field])
        np.add.at(sums[number], index, 1)
    return sums
