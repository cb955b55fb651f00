"""The files beside a state file: drafts, and the journal of an adjuster. Their owner and mode are checked before use.

Other users may be able to write to the folder. A draft is locked while its writer lives, so an unlocked one is a
leftover.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from modelquota._core.state.mapping import digest

JOURNAL_SUFFIX = ".adjusting"
_RANDOM_BYTES = 8
_DRAFT_SUFFIX = ".new"
_DRAFT_TAIL = 1 + 2 * _RANDOM_BYTES + len(_DRAFT_SUFFIX)  # characters of a draft's name after that of its file
_TRIES = 10
_NAME_MAX = 255
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OF_OTHERS = stat.S_IRWXG | stat.S_IRWXO

locks: set[int] = set()
"""Descriptors with a lock on their file, which a forked child closes."""


def _after_fork() -> None:
    """Close the locks in a forked child, which is not the writer and must not keep the lock of a dead parent."""
    for descriptor in locks:
        os.close(descriptor)
    locks.clear()


os.register_at_fork(after_in_child=_after_fork)


def release(descriptor: int) -> None:
    """Close a descriptor of `locks`, which ends its lock."""
    locks.discard(descriptor)
    os.close(descriptor)


def beside(path: str, suffix: str) -> str:
    """Return `path` with a suffix. If the name is too long for the folder, a digest replaces what does not fit."""
    folder, name = os.path.split(path)
    longest = os.pathconf(folder or ".", "PC_NAME_MAX")
    room = (longest if longest > 0 else _NAME_MAX) - len(suffix)  # -1 is "no limit", but the kernel has one
    if len(os.fsencode(name)) <= room:
        return path + suffix
    mark = f"~{digest(os.fsencode(name)):016x}"
    while name and len(os.fsencode(name)) > room - len(mark):
        name = name[:-1]  # by characters: some file systems accept only whole ones
    return os.path.join(folder, name + mark + suffix)


def journal_of(state_path: str) -> str:
    """Return the path of the journal of a state file's adjuster: beside the file itself, not beside a link to it."""
    return beside(os.path.realpath(state_path), JOURNAL_SUFFIX)


def create_draft(path: str) -> tuple[str, int]:
    """Create an empty file that will become the one at `path`, with mode 0600 regardless of the umask.

    Returns
    -------
    draft : str
    descriptor : int
        Open for reading and writing, locked, and in `locks`: `release` it after the draft has been linked to `path`.
    """
    for _ in range(_TRIES):
        draft = beside(path, f".{os.urandom(_RANDOM_BYTES).hex()}{_DRAFT_SUFFIX}")
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        locks.add(descriptor)
        try:
            if stat.S_IMODE(os.fstat(descriptor).st_mode) != 0o600:
                os.fchmod(descriptor, 0o600)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_nlink:
                    return draft, descriptor
        except BaseException:
            remove_draft(draft, descriptor)
            raise
        remove_draft(draft, descriptor)  # another process took it for a leftover before it was locked
    raise BlockingIOError(errno.EAGAIN, "each draft of it was removed at once", path)


def remove_draft(draft: str, descriptor: int) -> None:
    """Remove a draft, if it still exists, and release its descriptor."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(draft)
    release(descriptor)


def remove_dead_drafts(*paths: str) -> None:
    """Remove the drafts of these files whose writers have died. A draft that cannot be examined is kept."""
    for path in dict.fromkeys(paths):
        with contextlib.suppress(OSError):
            folder, stem = os.path.split(beside(path, "0" * _DRAFT_TAIL))
            stem = stem[:-_DRAFT_TAIL]
            for name in os.listdir(folder or "."):
                if name.startswith(stem) and _is_draft_tail(name[len(stem) :]):
                    with contextlib.suppress(OSError):
                        _remove_if_dead(os.path.join(folder, name))


def _is_draft_tail(tail: str) -> bool:
    return (
        len(tail) == _DRAFT_TAIL
        and tail[0] == "."
        and tail.endswith(_DRAFT_SUFFIX)
        and not tail[1 : -len(_DRAFT_SUFFIX)].strip("0123456789abcdef")
    )


def _remove_if_dead(draft: str) -> None:
    """Remove a draft of this user if it is not locked; raises BlockingIOError if its writer is alive."""
    descriptor = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    locks.add(descriptor)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(found, os.lstat(draft)):
                os.unlink(draft)
    finally:
        release(descriptor)


def distrust_of_state(found: os.stat_result) -> str | None:
    """Return why this process should not trust a state file, and what to do; None if it may.

    Root's files are trusted: root can change every file and every process anyway.
    """
    remedy = "or pass trust_file=True (--trust-file on the command line)"
    if found.st_uid not in (os.geteuid(), 0):
        return (
            f"it belongs to user {found.st_uid}, who can change it at any time, and this process runs as user "
            f"{os.geteuid()}: run as its owner, chown the file, {remedy}"
        )
    if found.st_mode & _OTHERS_MAY_WRITE:
        return f"its mode is {stat.S_IMODE(found.st_mode):#o}, so others may write to it: chmod it to 0600, {remedy}"
    return None


def distrust_of_journal(found: os.stat_result, state: os.stat_result) -> str | None:
    """Return why a journal should not be trusted although its state file is; None if it may."""
    if found.st_uid not in (state.st_uid, os.geteuid(), 0):
        return f"it belongs to user {found.st_uid}, and the state file to user {state.st_uid}"
    mode, laxer = stat.S_IMODE(found.st_mode), found.st_mode & ~state.st_mode & _OF_OTHERS
    if found.st_mode & _OTHERS_MAY_WRITE:
        return f"its mode is {mode:#o}, so others may write to it"
    if laxer:
        return f"its mode is {mode:#o}, laxer than the {stat.S_IMODE(state.st_mode):#o} of the state file"
    return None
