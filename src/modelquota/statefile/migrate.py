"""Migration: a state file with the layout of an earlier version is taken over, with its limits and its usage.

It happens on request only. If opening did it, processes of both versions could use two files at the same time, each
with the whole limits, while a service is being restarted piece by piece.

The new file is written beside the old one, checked from end to end, and renamed in one step. Until then the old one is
the state; it is locked in the meantime, so that no process can begin to use it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass

from modelquota._core.state.beside import (
    beside,
    create_draft,
    distrust_of_state,
    release,
    remove_dead_drafts,
    remove_draft,
)
from modelquota._core.state.state import CONSTANTS, count_processes, new_header, regions_for
from modelquota._core.state.validate import validate
from modelquota.errors import StateFileError
from modelquota.statefile.carrier import Carried, carry
from modelquota.statefile.inspect import verify_file
from modelquota.statefile.oldfile import OldFile
from modelquota.statefile.taker import Taker

_SEATS = CONSTANTS["seats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """What `migrate_file` has done.

    Attributes
    ----------
    path : str
    old_version, version : int
        Layouts of the old file and of the new one.
    models : int
        Models that were taken over.
    requests, tokens : int
        What their windows of a day count, at the time at which the models were used last.
    released : int
        Grants and waiting requests of dead processes, which were given back.
    old_file : str or None
        Where the old file is now; None if it was not kept.
    """

    path: str
    old_version: int
    version: int
    models: int
    requests: int
    tokens: int
    released: int
    old_file: str | None


def migrate_file(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, keep: bool = True, trust_file: bool = False
) -> Migration:
    """Replace a state file of an earlier layout by one of this version's, with its limits and usage.

    Afterwards every limit admits what it would have admitted, and time goes on as if nothing had happened. Grants and
    waiting requests of dead processes are given back. On any error the old file is left as it is.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The state file; of a link, the file to which it points.
    keep : bool
        Whether to keep the old file, under its name with ``.layout`` and the number of its layout appended.
    trust_file : bool
        As for `ResourceQuotaManager`.

    Raises
    ------
    StateFileError
        A living process uses it, it is damaged, or it has no layout that can be taken over.
    OSError
        It cannot be opened, or the new one not written.
    """
    path = os.path.realpath(os.fsdecode(path))
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise StateFileError(path, "it is not a regular file")
        distrust = None if trust_file else distrust_of_state(found)
        if distrust is not None:
            raise StateFileError(path, distrust)
        old = OldFile(descriptor, path)
        _lock_all_seats(descriptor, path, old)
        old = OldFile(descriptor, path)  # as it is now that no process can change it
        old_path = beside(path, f".layout{old.layout.version}") if keep else None
        _require_free(old_path, path, found)
        remove_dead_drafts(path)
        return _replace(old, path, old_path, found)
    finally:
        os.close(descriptor)


def _lock_all_seats(descriptor: int, path: str, old: OldFile) -> None:
    """Lock the seats of all processes, so that none has one or can take one; they are bytes of the file."""
    whole = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 1, _SEATS - 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        used = min(int(old.header["seats_used"]), _SEATS - 1)
        count = count_processes(descriptor, old.seats(), used)
        users = (
            f"{count} {'process uses' if count == 1 else 'processes use'} it" if count else "a process has it locked"
        )
        raise StateFileError(path, f"{users} now: end every process that has it open, then migrate it") from None
    try:
        same = os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        same = False
    if not same:
        raise StateFileError(path, "it was replaced while it was being opened: look at what is there now")


def _require_free(old_path: str | None, path: str, found: os.stat_result) -> None:
    """Refuse if there is another file where the old one is to be kept."""
    if old_path is None:
        return
    try:
        there = os.lstat(old_path)
    except FileNotFoundError:
        return
    if not os.path.samestat(there, found):  # it is the same one if a migration was interrupted
        raise StateFileError(
            path, f"{old_path}, which would keep the old file, exists: move it away, or do not keep the old file"
        )


def _replace(old: OldFile, path: str, old_path: str | None, found: os.stat_result) -> Migration:
    """Write the new file and put it in the place of the old one."""
    draft, descriptor = create_draft(path)
    try:
        migration = _write(old, path, draft, descriptor, old_path)
        validate(descriptor, path)
        for fault in verify_file(draft):
            raise StateFileError(path, f"it is damaged: {fault}")
        if found.st_uid != os.geteuid():
            os.fchown(descriptor, found.st_uid, found.st_gid)
        os.fsync(descriptor)
        if old_path is not None:
            with contextlib.suppress(FileExistsError):  # by a migration that was interrupted
                os.link(path, old_path)
        os.replace(draft, path)
    except BaseException:
        remove_draft(draft, descriptor)
        raise
    release(descriptor)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return migration


def _write(old: OldFile, path: str, draft: str, descriptor: int, old_path: str | None) -> Migration:
    """Write the new file: the core registers the models, then their usage is put in."""
    most = int(old.header["max_models"])
    os.ftruncate(descriptor, regions_for(most).size)
    taken: Carried | Taker
    if old.layout.rings:
        taken = carry(old, draft, path, descriptor)
    else:
        os.pwrite(descriptor, new_header(most), 0)
        with contextlib.closing(Taker(draft, path, old.layout)) as taken:
            for models in old.models():
                taken.take(models)
            taken.put_header(old.header, old.recovered)
    return Migration(
        path=path,
        old_version=old.layout.version,
        version=CONSTANTS["version"],
        models=taken.models,
        requests=taken.requests,
        tokens=taken.tokens,
        released=taken.released,
        old_file=old_path,
    )
