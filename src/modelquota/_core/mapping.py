"""Where the state lives: one shared, sparse mapping, and what lies where in it."""

from __future__ import annotations

import mmap
import os
from typing import Any, NamedTuple

import numpy as np

PAGE = 4096
MAX_MODELS_LIMIT = 2**24


class Regions(NamedTuple):
    """Offsets of the parts of the mapping, in bytes; every part begins on a page of its own."""

    rows: int
    ledgers: int
    names: int
    size: int


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def plan(header: int, row: int, ledger: int, name_share: int, max_models: int) -> Regions:
    """Lay out the mapping for `max_models` models from the sizes of its structs, in bytes."""
    rows = _pages(header)
    ledgers = rows + _pages(row * max_models)
    names = ledgers + _pages(ledger * max_models)
    return Regions(rows, ledgers, names, names + _pages(name_share * max_models))


def create_mapping(size: int) -> mmap.mmap:
    """Map `size` bytes of zeros, shared with every process forked from here; pages cost nothing until touched."""
    descriptor = os.memfd_create("modelquota", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED)
    finally:
        os.close(descriptor)


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
    """A 64-bit digest of names, types, offsets and sizes: states of another layout are never taken for one's own.

    FNV-1a, by hand: against accidents it is enough, and hashlib would bring 4 MB of OpenSSL along.
    """
    digest = 0xCBF29CE484222325
    for byte in "|".join(_describe(dtype) for dtype in layout).encode():
        digest = (digest ^ byte) * 0x100000001B3 % 2**64
    return digest
