"""The state file: created completely or not at all, and validated from end to end before it is used."""

from __future__ import annotations

import contextlib
import os
import stat

from modelquota._core.state.beside import (
    create_draft,
    distrust_of_state,
    journal_of,
    remove_dead_drafts,
    remove_draft,
)
from modelquota._core.state.mapping import MAX_MODELS_LIMIT
from modelquota._core.state.state import new_header, regions_for
from modelquota._core.state.validate import validate
from modelquota.errors import StateFileError

DEFAULT_MAX_MODELS = 65_536
_ROUNDS = 20  # attempts, each of which fails if another process removes the file after it was found or created


def open_state(path: str, max_models: int | None, trust_file: bool) -> tuple[int, int]:
    """Open the state file, or create it if there is none.

    Returns
    -------
    descriptor, max_models : int
        The descriptor is open for reading and writing; max_models is that of the file.
    """
    for _ in range(_ROUNDS):
        try:
            opened = open_existing(path, max_models, os.O_RDWR, trust_file=trust_file)
        except FileNotFoundError:
            if os.path.islink(path):
                raise StateFileError(
                    path,
                    f"it is a symbolic link to {os.readlink(path)}, which does not exist; remove the link, or give the "
                    "path of the file itself",
                ) from None
            _create(path, DEFAULT_MAX_MODELS if max_models is None else max_models)
        else:
            remove_dead_drafts(path, os.path.realpath(path), journal_of(path))
            return opened
    raise StateFileError(path, f"it was made and removed again {_ROUNDS} times while it was being opened")


def open_existing(path: str, max_models: int | None, mode: int, *, trust_file: bool = False) -> tuple[int, int]:
    """Open an existing file, and validate it without modifying it.

    Raises StateFileError if it is not a complete state file of this version, was made for another ``max_models``, or,
    unless `trust_file`, if another user can write to it.
    """
    # O_NONBLOCK: a pipe or a device by that name is refused, not waited for.
    descriptor = os.open(path, mode | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StateFileError(path, "it is not a regular file")
        distrust = None if trust_file else distrust_of_state(found)
        if distrust is not None:
            raise StateFileError(path, distrust)
        actual = validate(descriptor, path)
        if max_models is not None and actual != max_models:
            raise StateFileError(path, f"it was made for max_models={actual}, not {max_models}; leave max_models out")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, actual


def loss_of(descriptor: int, path: str, size_bytes: int) -> str | None:
    """Return what has happened to an open state file; None if it is still the file at `path`.

    Parameters
    ----------
    descriptor : int
        The open file.
    path : str
        The path by which it was opened.
    size_bytes : int
        Its length at that time.
    """
    try:
        found = os.fstat(descriptor)
    except OSError as error:
        return f"its descriptor was closed underneath ({os.strerror(error.errno or 0)})"
    try:
        there = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return "it was deleted or moved away: processes that open it from now on do not share its limits"
    except OSError:
        there = found  # this process has given up rights since: not a loss
    if not os.path.samestat(found, there):
        return "it was replaced by another file: processes that open it from now on do not share its limits"
    if found.st_size != size_bytes:
        what = "cut off to" if found.st_size < size_bytes else "lengthened to"
        return f"it was {what} {found.st_size} bytes, and should have {size_bytes}"
    return None


def _create(path: str, max_models: int) -> None:
    """Create the file under another name and link it to `path`, unless another process was first."""
    if not 1 <= max_models <= MAX_MODELS_LIMIT:
        raise ValueError(f"max_models is {max_models}; give an integer, 1 .. 2**24")
    header = new_header(max_models)
    try:
        draft, descriptor = create_draft(path)
    except OSError as error:  # in terms of the path that was given
        raise OSError(error.errno, os.strerror(error.errno or 0), path) from None
    try:
        os.ftruncate(descriptor, regions_for(max_models).size)
        os.pwrite(descriptor, header, 0)
        os.fsync(descriptor)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        remove_draft(draft, descriptor)
