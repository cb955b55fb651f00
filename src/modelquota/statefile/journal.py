"""The journal of a load adjuster, a file beside the state file: the configured limits, to be restored after a crash.

A live adjuster holds a lock on its journal, so a journal without a lock belongs to a dead one. Since a journal can lift
limits, it is trusted only if every user who can have written it can also write the state file.
"""

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from modelquota._core.state.beside import (
    create_draft,
    distrust_of_journal,
    journal_of,
    locks,
    release,
    remove_dead_drafts,
    remove_draft,
)
from modelquota.quota.config import ResourceQuotaConfig

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

_VERSION: Final = 1
_BYTES_PER_MODEL: Final = 8192  # an id in JSON takes at most 1,532, and each of some 20 fields 130 with its values
_TRIES: Final = 100
_PATIENCE_SEC = 1.0  # a process that opens the state file locks the journal while it restores: milliseconds

Entries = dict[str, dict[str, dict[str, Any]]]
"""By model and field: the value that was ``"configured"``, and those that the adjuster may have ``"set"`` instead."""


class Journal:
    """The journal of one adjuster. It is never written in place: a crash leaves either the old or the new version."""

    def __init__(self, state_path: str | bytes) -> None:
        self._state_path = os.path.realpath(os.fsdecode(state_path))
        self.path = journal_of(self._state_path)
        self._descriptor = self._pid = -1
        self._written: Entries = {}

    @property
    def held(self) -> bool:
        """Whether this process has claimed it; False in a forked child whose parent has."""
        return self._descriptor >= 0 and self._pid == os.getpid()

    def claim(self, manager: "ResourceQuotaManager") -> None:
        """Create it, after restoring what a dead adjuster left. Raises RuntimeError if another one is alive."""
        remove_dead_drafts(self.path)
        give_up = time.monotonic() + _PATIENCE_SEC
        while True:
            try:
                descriptor = _lock(self.path, self._state_path)
                try:
                    _restore(manager, descriptor)
                    return self._put({}, os.replace)
                finally:
                    release(descriptor)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # another process was first
                    return self._put({}, os.link)
            except BlockingIOError:
                pass
            except ValueError as error:
                raise RuntimeError(
                    f"{self.path} is damaged or not trusted ({error}): check that the limits are correct, then "
                    "remove it"
                ) from error
            if time.monotonic() >= give_up:
                raise RuntimeError(f"another LoadAdjuster adjusts the limits of {self._state_path}; stop it first")
            time.sleep(0.01)

    def write(self, entries: Entries) -> None:
        """Record what is to be restored; it is on the disk when this returns."""
        if entries != self._written:
            self._put(entries, os.replace)

    def remove(self) -> None:
        """Remove the journal: all limits are as configured."""
        if self.held:
            os.unlink(self.path)
            release(self._descriptor)
            self._descriptor = -1

    def _put(self, entries: Entries, place: Callable[[str, str], None]) -> None:
        """Write a draft, lock it, and only then rename it, so that the journal is never without its lock."""
        draft, descriptor = create_draft(self.path)
        try:
            with open(descriptor, "w", encoding="utf-8", closefd=False) as file:
                json.dump({"version": _VERSION, "models": entries}, file)
            os.fsync(descriptor)
            place(draft, self.path)
        except BaseException:
            remove_draft(draft, descriptor)
            raise
        with contextlib.suppress(FileNotFoundError):  # it was renamed
            os.unlink(draft)
        if self.held:
            release(self._descriptor)
        self._descriptor, self._pid, self._written = descriptor, os.getpid(), entries
        folder = os.open(os.path.dirname(self.path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def restore(manager: "ResourceQuotaManager", path: str) -> None:
    """Restore what an adjuster has left, if it is dead, and remove its journal; errors are logged, not raised."""
    from modelquota._log import log as _log

    try:
        descriptor = _lock(path, manager.path or "")
        try:
            count = _restore(manager, descriptor)
            os.unlink(path)
        finally:
            release(descriptor)
        _log(20, "%s: its adjuster has died; %d models have their configured limits again", path, count)
    except (FileNotFoundError, BlockingIOError):
        pass  # another process was first, or the adjuster is alive
    except Exception as error:
        _log(40, "%s is left as it is, and so are the limits that its adjuster may have changed: %s", path, error)


def _restore(manager: "ResourceQuotaManager", descriptor: int) -> int:
    """Restore from a journal, and return how many models were changed; ValueError if it is damaged."""
    count = 0
    rows_used = int(manager._arrays()[0]["row_count"][0])  # at least the largest number of models at any time
    for model_id, fields in _read(descriptor, _BYTES_PER_MODEL * (1 + rows_used)).items():
        while (old := manager.get_quota(model_id)) is not None:
            changes = {
                field: entry["configured"] for field, entry in fields.items() if getattr(old, field) in entry["set"]
            }
            if not changes:
                break
            if manager.replace_quota(old, old.replace(**changes)):
                count += 1
                break
    return count


def _read(descriptor: int, most_bytes: int) -> Entries:
    """Return the entries of a journal, every value validated."""
    size = os.fstat(descriptor).st_size
    if size > most_bytes:
        raise ValueError(f"it has {size} bytes, more than the {most_bytes} that the models of the state file can need")
    try:
        document = json.loads(os.pread(descriptor, size, 0))
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if not isinstance(document, dict) or document.get("version") != _VERSION:
        raise ValueError(f"it is not a journal of version {_VERSION}")
    models = _mapping(document.get("models"))
    for model_id, fields in models.items():
        for field, entry in _mapping(fields).items():
            if _mapping(entry).keys() != {"configured", "set"} or not isinstance(entry["set"], list):
                raise ValueError(f"model {model_id!r}, {field!r}: expected what was configured and what was set")
            if field == "model_id":
                raise ValueError("a model id is not adjusted")
            ResourceQuotaConfig.from_dict({"model_id": model_id, field: entry["configured"]})
    return models


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, not {type(value).__name__}")
    return value


def _lock(path: str, state_path: str) -> int:
    """Open and lock a journal.

    Raises FileNotFoundError if there is none, BlockingIOError if it is locked, ValueError if it is not to be trusted.
    """
    state = os.stat(state_path)
    for _ in range(_TRIES):
        try:
            # O_NONBLOCK: opening a pipe of that name returns immediately, so that it can be refused
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError("it is a symbolic link") from None
            raise
        locks.add(descriptor)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise ValueError("it is not a regular file")
            distrust = distrust_of_journal(found, state)
            if distrust is not None:
                raise ValueError(distrust)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(found, os.lstat(path)):
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            release(descriptor)
            raise
        release(descriptor)  # replaced or removed between opening and locking: open what is there now
    raise ValueError("it keeps being replaced")
