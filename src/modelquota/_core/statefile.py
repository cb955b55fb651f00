"""The state file: created as a whole or not at all, and looked at from end to end before it is used."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat

from modelquota._core.inspection import MAX_MODELS_LIMIT, faults
from modelquota._core.shared import new_header, regions_for
from modelquota.errors import StateFileError

DEFAULT_MAX_MODELS = 65_536


def open_state(path: str, max_models: int | None) -> tuple[int, int]:
    """Open the state file, or create it where there is none.

    Returns
    -------
    descriptor, max_models : int
        Open for reading and writing; how many models the file holds at most.
    """
    while True:
        try:
            return open_existing(path, max_models, os.O_RDWR)
        except FileNotFoundError:
            _create(path, DEFAULT_MAX_MODELS if max_models is None else max_models)


def open_existing(path: str, max_models: int | None, mode: int) -> tuple[int, int]:
    """Open a file that is there, and read it through without changing a byte.

    Raises StateFileError where it is not a whole state file of this version, or was made for another ``max_models``.
    """
    # O_NONBLOCK: a pipe or a device of that name is refused, not waited for.
    descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise StateFileError(path, "it is no regular file")
        actual = faults(descriptor, path)
        if max_models is not None and actual != max_models:
            raise StateFileError(path, f"it was made for max_models={actual}, not {max_models}; leave max_models out")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, actual


def _create(path: str, max_models: int) -> None:
    """Make a new file under another name and link it to its own, unless somebody else was first."""
    if not 1 <= max_models <= MAX_MODELS_LIMIT:
        raise ValueError(f"max_models is {max_models}; give an integer, 1 .. 2**24")
    draft = f"{path}.{secrets.token_hex(8)}.new"
    try:
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:  # in terms of the path that was given
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    try:
        os.ftruncate(descriptor, regions_for(max_models).size)
        os.pwrite(descriptor, new_header(max_models), 0)
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        os.close(descriptor)
        os.unlink(draft)
