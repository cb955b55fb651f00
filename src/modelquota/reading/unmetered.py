"""Requests over HTTP that passed without being counted, by path: shared by the middleware and the metrics."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Final

from modelquota._log import log

if TYPE_CHECKING:
    from modelquota.reading.reader import QuotaReader

MOST_PATHS: Final = 20
"""Paths with a count of their own; all others share one."""

OTHER_PATHS: Final = "(others)"
"""The path of all others."""

_LONGEST_PATH: Final = 100
_WARNING: Final = 30


class UnmeteredRequests:
    """Counts requests that used a server without any quota being asked, by path; safe to use from several threads."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def count(self, path: str, why: str, kind: str = "POST") -> None:
        """Count a request, and log the first one of each path."""
        path = path if len(path) <= _LONGEST_PATH else f"{path[: _LONGEST_PATH - 3]}..."
        if not path.isprintable():
            path = path.encode("unicode_escape").decode()
        with self._lock:
            if path not in self._counts and len(self._counts) >= MOST_PATHS:
                path = OTHER_PATHS
            before = self._counts.get(path, 0)
            self._counts[path] = before + 1
        if not before:
            log(_WARNING, "%s %s is passed on without being counted: %s", kind, path, why)

    def counts(self) -> dict[str, int]:
        """Return how many requests were counted, by path."""
        with self._lock:
            return dict(self._counts)


_OF_MANAGER: weakref.WeakKeyDictionary[object, UnmeteredRequests] = weakref.WeakKeyDictionary()


def unmetered_of(manager: QuotaReader) -> UnmeteredRequests:
    """Return the counts of all middlewares that this process has in front of this manager."""
    return _OF_MANAGER.setdefault(manager, UnmeteredRequests())
