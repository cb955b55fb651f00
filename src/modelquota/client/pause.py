"""`Pauses`: lines that stand still until a time, since a server said so; shared by all transports of a manager."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterable

from modelquota.manager import ResourceQuotaManager


class Pauses:
    """Until when requests for an id wait. Thread-safe; nothing here waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[str, float] = {}

    def begin(self, model_ids: Iterable[str], seconds: float) -> None:
        """Pause each id for some seconds; a longer pause that has begun stays."""
        until = time.monotonic() + seconds
        with self._lock:
            for model_id in model_ids:
                if until > self._until.get(model_id, 0.0):
                    self._until[model_id] = until

    def left(self, model_ids: Iterable[str]) -> float:
        """Return the seconds until none of the ids is paused; 0.0 if none is."""
        if not self._until:
            return 0.0
        now = time.monotonic()
        longest = 0.0
        with self._lock:
            for model_id in model_ids:
                left = self._until.get(model_id, now) - now
                if left > 0:
                    longest = max(longest, left)
                else:
                    self._until.pop(model_id, None)
        return longest


_of_managers: weakref.WeakKeyDictionary[ResourceQuotaManager, Pauses] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def pauses_of(manager: ResourceQuotaManager) -> Pauses:
    """Return the pauses of a manager, the same for all transports."""
    with _lock:
        found = _of_managers.get(manager)
        if found is None:
            found = _of_managers[manager] = Pauses()
        return found
