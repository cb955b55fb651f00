"""Takes over a state file whose parts are those of this version, byte for byte, but for the header and what is new.

They are copied as they are, with whatever dead processes were changing: the core finishes that when it opens the copy,
as it does for a file of its own.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from modelquota._core.state.clock import ManualClock
from modelquota._core.state.packing import dtypes
from modelquota._core.state.state import CONSTANTS, new_header, regions_for
from modelquota._core.state.validate import offset_of, validate
from modelquota._core.table.table import QuotaTable
from modelquota.quota.limits import WINDOWS
from modelquota.statefile.oldfile import OldFile

_AT_A_TIME = 1 << 20
_LONGEST = [window.name for window in WINDOWS if not window.optional][-1]
_OWN = ("version", "fingerprint")


class Carried(NamedTuple):
    """What was taken over: models, what their longest windows count, and grants and requests of dead processes."""

    models: int
    requests: int
    tokens: int
    released: int


def carry(old: OldFile, draft: str, path: str, descriptor: int) -> Carried:
    """Copy an old file to the draft of a new one. Raises StateFileError, for `path`, if it is damaged."""
    most = int(old.header["max_models"])
    new = regions_for(most)
    *_, names, whole = old.layout.regions(most)
    _copy(old.descriptor, descriptor, 0, names, 0)
    _copy(old.descriptor, descriptor, names, whole, new.names - names)
    header = np.frombuffer(
        bytearray(old.header.tobytes().ljust(dtypes()["header"].itemsize, b"\0")), dtypes()["header"]
    )
    own = np.frombuffer(new_header(most), header.dtype)
    for name in _OWN:
        header[name] = own[name]
    os.pwrite(descriptor, header.tobytes(), 0)
    _place_shares(descriptor, most, int(header["row_count"][0]))
    validate(descriptor, path)
    released = _count_held(descriptor, most)
    # with a clock that stands still, whatever its kind is: nothing ages in the meantime
    kind_at = offset_of("header", "clock_kind")
    os.pwrite(descriptor, bytes(4), kind_at)
    table = QuotaTable(path=draft, max_models=None, clock=ManualClock(0), events=None, trust_file=True)
    try:
        records = table._read_all()  # takes each lock, and so finishes what a dead owner was changing
        requests, tokens = (sum(records[f"{what}_this_{_LONGEST}"].tolist()) for what in ("requests", "tokens"))
    finally:
        table.close()
    os.pwrite(descriptor, header["clock_kind"].tobytes(), kind_at)
    return Carried(len(records), requests, tokens, released)


def _place_shares(descriptor: int, most: int, row_count: int) -> None:
    """Write where the share of each row is, which no row of the old file has."""
    regions, cold, share = regions_for(most), dtypes()["cold"], dtypes()["share"]
    field = offset_of("cold", "share_offset")
    for row in range(row_count):
        at = regions.cold_rows + row * cold.itemsize
        offset = regions.shares + row * share.itemsize - at
        os.pwrite(descriptor, offset.to_bytes(8, "little", signed=True), at + field)


def _count_held(descriptor: int, most: int) -> int:
    """How many grants are open and how many requests wait, once for each of their models."""
    regions, layout = regions_for(most), dtypes()
    header = np.frombuffer(os.pread(descriptor, layout["header"].itemsize, 0), layout["header"])[0]
    found = 0
    for part, at, used in (
        ("grant", regions.grants, "grant_chunks_used"),
        ("entry", regions.entries, "entry_chunks_used"),
    ):
        count = int(header[used]) * CONSTANTS["chunk"]
        records = np.frombuffer(os.pread(descriptor, count * layout[part].itemsize, at), layout[part])
        records = records[records["seat"] != 0]
        found += int((records["is_handle"] == 0).sum()) if part == "grant" else int((records["linked"] != 0).sum())
    return found


def _copy(source: int, target: int, start: int, end: int, shift: int) -> None:
    """Copy a part of a file to a place `shift` bytes further on, without its holes."""
    for begin, stop in _extents(source, start, end):
        for at in range(begin, stop, _AT_A_TIME):
            os.pwrite(target, os.pread(source, min(_AT_A_TIME, stop - at), at), at + shift)


def _extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield where a file has data."""
    at = start
    while at < end:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole from here on
                return
            raise
        if at >= end:
            return
        stop = min(os.lseek(descriptor, at, os.SEEK_HOLE), end)
        yield at, stop
        at = stop
