"""Waiting for admission in an asyncio task: only how a task sleeps; the queue itself is in `_core.table.queue`.

Imported at the first `acquire_async`, since asyncio takes longer to import than all of modelquota.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsIndex

from modelquota._core.table.grant import Grant
from modelquota._core.table.queue import Waiter
from modelquota._core.table.table import QuotaTable
from modelquota.quota.tokens import TokenCount

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop, Future, TimerHandle

_SHORTEST_NAP, _LONGEST_NAP = 5e-5, 1e-2  # seconds between two tries while a row is locked


class TaskWaiter(Waiter):
    """Sleeps on a future of the running event loop, and watches the clock with a timer of that loop."""

    _loop: AbstractEventLoop
    _future: Future[None]
    _timer: TimerHandle | None = None

    def prepare(self) -> None:
        """Create the future that it sleeps on."""
        self._loop = self.context = _running_loop()
        self._future = self._loop.create_future()

    def wake(self) -> None:
        """Finish the future; may be called from any thread."""
        self._in_loop(self._finish)

    def arm(self) -> None:
        """Set the timer again; may be called from any thread."""
        self._in_loop(self.set_timer)

    def _in_loop(self, call: Callable[[], None]) -> None:
        if asyncio._get_running_loop() is self._loop:
            self._loop.call_soon(call)
            return
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:  # the loop was closed while the task was waiting
            self.abandon()

    def _finish(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    def set_timer(self) -> None:
        """Set a timer for the next time to check."""
        if self._timer is not None:
            self._timer.cancel()
        seconds = None if self.done else self.sleep_seconds()
        self._timer = None if seconds is None else self._loop.call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self.serve()
        self.set_timer()

    async def sleep(self) -> None:
        """Sleep until admitted or denied."""
        self.set_timer()
        await self._future

    def retire(self) -> None:
        """Leave the queue without waiting for a lock."""
        if self._timer is not None:
            self._timer.cancel()
        self.leave()


def _running_loop() -> AbstractEventLoop:
    """Return the running event loop; raises before anything is decided or counted."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        raise RuntimeError(
            "acquire_async needs a running asyncio event loop; under trio, or without a loop, call acquire in a thread"
        ) from None


def admit(
    manager: QuotaTable,
    model_id: str | Sequence[str],
    tokens: TokenCount | tuple[int, int, int],
    ram_needed_mb: SupportsIndex,
    ssd_needed_mb: SupportsIndex,
    timeout: float | None,
    priority: SupportsIndex,
) -> Grant | Coroutine[Any, Any, Grant]:
    """Return the grant if the request is admitted at once, otherwise the coroutine that waits for it.

    That has to begin before anything else runs in the thread: the request is in the queue already. `tokens` may also be
    a tuple of input, cached and output tokens.
    """
    if asyncio._get_running_loop() is None:
        _running_loop()  # which raises
    admitted = manager._admit(TaskWaiter, model_id, tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)
    return admitted if type(admitted) is Grant else _wait(manager, *admitted)


async def _wait(manager: QuotaTable, waiter: TaskWaiter, queued: bool) -> Grant:
    try:
        nap = 0.0
        while not queued:
            await asyncio.sleep(nap)  # a row is locked: yield to the loop instead of spinning
            nap = min(max(2 * nap, _SHORTEST_NAP), _LONGEST_NAP)
            outcome = manager._retry(waiter)
            if isinstance(outcome, Grant):
                return outcome
            queued = outcome is not None
        await waiter.sleep()
        return waiter.take()
    finally:
        waiter.retire()


async def _acquire_in_task(manager: QuotaTable, *request: Any) -> Grant:
    admitted = admit(manager, *request)
    return admitted if isinstance(admitted, Grant) else await admitted


class Acquisition(Coroutine[Any, Any, Grant]):
    """What `acquire_async` returns: ``await`` it for the grant, or use ``async with``, which releases it at the end."""

    def __init__(self, *args: Any) -> None:
        self._coroutine = _acquire_in_task(*args)
        self._grant: Grant | None = None

    def send(self, value: Any) -> Any:
        """See `collections.abc.Coroutine`."""
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """See `collections.abc.Coroutine`."""
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """See `collections.abc.Coroutine`."""
        self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, Grant]:
        return self._coroutine.__await__()

    async def __aenter__(self) -> Grant:
        self._grant = await self._coroutine
        return self._grant

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._grant is not None
        self._grant.__exit__(kind, error, traceback)
