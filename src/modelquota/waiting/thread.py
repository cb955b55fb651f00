"""Waiting for admission in a thread: only how a thread sleeps; the queue itself is in `_core.table.queue`."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import SupportsIndex

from modelquota._core.table.grant import Grant
from modelquota._core.table.queue import Waiter
from modelquota._core.table.table import QuotaTable
from modelquota.quota.tokens import Tokens


class ThreadWaiter(Waiter):
    """Sleeps on a lock, which is released to wake it."""

    def prepare(self) -> None:
        """Create the lock that it sleeps on, and take it."""
        self._bell = threading.Lock()
        self._bell.acquire()

    def wake(self) -> None:
        """Release the lock; safe to call more than once."""
        with contextlib.suppress(RuntimeError):  # it has not woken since the last call
            self._bell.release()

    arm = wake

    def sleep(self) -> None:
        """Sleep until woken, or until the next time to check."""
        seconds = self.sleep_seconds()
        if seconds is None:
            self._bell.acquire()
        elif seconds > 0:
            self._bell.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


def acquire(
    manager: QuotaTable,
    model_id: str | Sequence[str],
    estimated_tokens: SupportsIndex | Tokens,
    ram_needed_mb: SupportsIndex,
    ssd_needed_mb: SupportsIndex,
    timeout: float | None,
    priority: SupportsIndex,
) -> Grant:
    """As `ResourceQuotaManager.acquire`."""
    waiter = ThreadWaiter()
    try:
        outcome = None
        while outcome is None:  # a row is locked; each try waits a while in the core
            outcome = manager._admit_or_queue(
                waiter, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority, nowait=False
            )
        if isinstance(outcome, Grant):
            return outcome
        while not waiter.done:
            waiter.sleep()
            waiter.serve()
        return waiter.take()
    finally:
        waiter.leave()  # a KeyboardInterrupt may have come anywhere above
