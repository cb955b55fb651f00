"""What lies where in the mapping, and how it is opened."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

PAGE = 4096
MAX_MODELS_LIMIT = 2**24


class Regions(NamedTuple):
    """Offsets of the parts of the mapping, in bytes; every part begins on a page of its own."""

    epochs: int
    places: int
    owners: int
    held: int
    rows: int
    ledgers: int
    names: int
    size: int


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def plan(header: int, fixed: Sequence[int], row: int, ledger: int, name_share: int, max_models: int) -> Regions:
    """Lay out the mapping for `max_models` models from the sizes of its parts, in bytes.

    `fixed` has the sizes of the four parts that do not depend on the number of models, whole.
    """
    sizes = (header, *fixed, row * max_models, ledger * max_models, name_share * max_models)
    return Regions(*itertools.accumulate(_pages(size) for size in sizes))


def create_anonymous(size: int) -> int:
    """Return the descriptor of `size` bytes of zeros without a name; pages cost nothing until touched."""
    descriptor = os.memfd_create("modelquota", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size)
    return descriptor


def open_again(descriptor: int) -> int:
    """Open the same file anew: locks belong to what is opened, not to the file or the process."""
    return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


def boot_id() -> bytes:
    """16 bytes that no other boot of this machine has."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


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
