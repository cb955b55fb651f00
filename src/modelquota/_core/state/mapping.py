"""The mapping: offsets of its parts, creating and opening it, and what identifies its layout, boot and namespace."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from modelquota.errors import StateFileError

PAGE = 4096
MAX_MODELS_LIMIT = 2**24


class Regions(NamedTuple):
    """Offsets of the parts of the mapping, in bytes; each part begins at a page boundary."""

    seats: int
    changes: int
    entry_owners: int
    entries: int
    grant_owners: int
    grants: int
    rows: int
    cold_rows: int
    rings: tuple[int, ...]
    shares: int
    names: int
    size: int


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def plan(header: int, fixed: Sequence[int], each: Sequence[int], name_share: int, max_models: int) -> Regions:
    """Lay out the mapping for `max_models` models from the sizes of its parts, in bytes.

    `fixed` has the sizes of the parts that do not depend on the number of models, whole; `each` what one model has in
    the others: its row, its cold row, a ring in each window, and its share.
    """
    sizes = (header, *fixed, *(size * max_models for size in each), name_share * max_models)
    offsets = list(itertools.accumulate(_pages(size) for size in sizes))
    seats, changes, entry_owners, entries, grant_owners, grants, rows, cold_rows, *rings, shares, names, size = offsets
    return Regions(
        seats, changes, entry_owners, entries, grant_owners, grants, rows, cold_rows, tuple(rings), shares, names, size
    )


def create_anonymous(size: int) -> int:
    """Return a descriptor of an anonymous file of `size` zero bytes; pages cost nothing until they are touched."""
    descriptor = os.memfd_create("modelquota", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def open_again(descriptor: int, path: str | None = None) -> int:
    """Open the same file again, since locks belong to an open file description, not to a file or a process.

    Without /proc it is opened by its `path`, if it has one and that is still the same file.
    """
    link = f"/proc/self/fd/{descriptor}"
    try:
        return os.open(link, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        if path is None:
            raise _without_proc(link) from None
    again = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    if os.path.samestat(os.fstat(descriptor), os.fstat(again)):
        return again
    os.close(again)
    raise _without_proc(link)


def clock_shift_ns(clock: str = "monotonic") -> int:
    """Return how far this process's time namespace shifts a clock, in ns; see time_namespaces(7).

    `clock` is "monotonic" or "boottime".
    """
    try:
        with open("/proc/self/timens_offsets") as file:
            for line in file:
                name, seconds, nanoseconds = line.split()
                if name == clock:
                    return int(seconds) * 1_000_000_000 + int(nanoseconds)
    except OSError:
        pass  # a kernel without time namespaces
    return 0


def process_space() -> int:
    """Return a number that is the same for all processes that see the same process ids and start times.

    0 if that cannot be known: /proc is not mounted, or is that of another PID namespace.
    """
    try:  # "thread-self": the first thread may have ended
        with open("/proc/thread-self/status", "rb") as file:
            ids = next((line.split()[1:] for line in file if line.startswith(b"NSpid:")), [])
        if len(ids) != 1:  # the process has an id in each namespace from that of /proc down to its own
            return 0
        found = [os.stat("/proc/thread-self/ns/pid").st_ino]
        if os.path.exists("/proc/thread-self/ns/time"):  # it shifts start times
            found.append(os.stat("/proc/thread-self/ns/time").st_ino)
    except OSError:
        return 0
    return digest(repr(found).encode())


@functools.cache  # a process that has read it continues to work if it is later confined to a place without /proc
def boot_id() -> bytes:
    """Return 16 bytes that no other boot of this machine has."""
    path = "/proc/sys/kernel/random/boot_id"
    try:
        with open(path) as file:
            return bytes.fromhex(file.read().strip().replace("-", ""))
    except FileNotFoundError:
        raise _without_proc(path) from None


def _without_proc(path: str) -> StateFileError:
    return StateFileError(path, "modelquota needs the /proc file system, and it is not mounted here; mount it")


def _describe(dtype: np.dtype[Any]) -> str:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return f"{shape}{_describe(base)}"
    if dtype.fields is None:
        return dtype.str
    fields = ",".join(
        f"{name}@{dtype.fields[name][1]}:{_describe(dtype.fields[name][0])}" for name in dtype.names or ()
    )
    return f"{{{fields};{dtype.itemsize}}}"


def fingerprint(*layout: np.dtype[Any]) -> int:
    """Return a 64-bit digest of names, types, offsets and sizes, which tells states of other layouts apart."""
    return digest("|".join(_describe(dtype) for dtype in layout).encode())


def digest(data: bytes) -> int:
    """Return a 64-bit digest of data, by FNV-1a.

    It is enough against accidents, and hashlib would load 4 MB of OpenSSL.
    """
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 % 2**64
    return found
