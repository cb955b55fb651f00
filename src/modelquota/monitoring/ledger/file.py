"""The file of a ledger: whole lines appended by several processes, put away by size and by day."""

import fcntl
import json
import os
import time
from typing import Any

__all__ = ["LEDGER_VERSION", "LedgerFile", "line_of", "now_us"]

LEDGER_VERSION = 1
US_OF_A_DAY = 86_400_000_000


def line_of(values: dict[str, Any]) -> bytes:
    """Return a line that is not of a request."""
    return json.dumps(values).encode() + b"\n"


def now_us() -> int:
    """Return microseconds since 1970-01-01 UTC."""
    return time.time_ns() // 1_000


class LedgerFile:
    """An open ledger. Processes exclude one another by a lock on the file; its methods are for one thread at a time.

    Parameters
    ----------
    path : str
    max_bytes : int or None
    by_day : bool
        As for `Ledger`.
    """

    def __init__(self, path: str, max_bytes: int | None, by_day: bool) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._by_day = by_day
        self._file = -1
        self._day = 0
        self._begun = False
        self._open()

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def append(self, data: bytes) -> None:
        """Append whole lines, after a look whether another process has put the file away."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            while not self._is_current():
                self._open()
                fcntl.flock(self._file, fcntl.LOCK_EX)
            if self._is_due():
                self._put_away()
                fcntl.flock(self._file, fcntl.LOCK_EX)
            size = os.fstat(self._file).st_size
            if not size and self._begun:  # every file says in its first line what it is
                data = line_of({"ledger": LEDGER_VERSION, "continued_us": now_us(), "pid": os.getpid()}) + data
            self._begun = True
            done = 0
            try:
                while done < len(data):
                    done += os.write(self._file, data[done:])
            except OSError:
                os.ftruncate(self._file, size)  # half of the lines would be counted as written and as lost
                raise
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _open(self) -> None:
        """Open the file that is at the path now; a line that a killed process has cut off is ended."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        old, self._file = self._file, file
        if old >= 0:
            os.close(old)
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            status = os.fstat(file)
            if status.st_size and os.pread(file, 1, status.st_size - 1) != b"\n":
                os.write(file, b"\n")
            self._day = (status.st_mtime_ns // 1_000 if status.st_size else now_us()) // US_OF_A_DAY
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _is_current(self) -> bool:
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._file)
        return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)

    def _is_due(self) -> bool:
        size = os.fstat(self._file).st_size
        if not size:
            return False
        return (self._max_bytes is not None and size >= self._max_bytes) or (
            self._by_day and now_us() // US_OF_A_DAY != self._day
        )

    def _put_away(self) -> None:
        """Rename the file and begin a new one. Requires the file's lock."""
        stem, ending = os.path.splitext(self._path)
        at_us = now_us()
        stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(at_us // 1_000_000))
        os.rename(self._path, f"{stem}-{stamp}.{at_us % 1_000_000:06}{ending}")
        self._open()
