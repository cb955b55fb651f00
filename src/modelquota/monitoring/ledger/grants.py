"""`GrantLedger`: a ledger that acquires grants of a manager, and has a line of each when it ends."""

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, SupportsIndex

from modelquota.errors import QuotaExceededError
from modelquota.monitoring.ledger.writer import Ledger

if TYPE_CHECKING:
    from modelquota._core.table.grant import Grant
    from modelquota.manager import ResourceQuotaManager
    from modelquota.quota.tokens import TokenCount

__all__ = ["GrantLedger"]


class GrantLedger(Ledger):
    """The ledger of a manager's grants. Made by `ResourceQuotaManager.ledger`, which says what the parameters are.

    Closing it leaves the manager open.

    Examples
    --------
    >>> import tempfile, os
    >>> from modelquota import ManualClock, ResourceQuotaManager
    >>> manager = ResourceQuotaManager(clock=ManualClock())
    >>> manager.set_quota("llama")
    >>> with tempfile.TemporaryDirectory() as folder, manager.ledger(os.path.join(folder, "usage.jsonl")) as ledger:
    ...     with ledger.acquire("llama", 300) as grant:
    ...         grant.settle(120)
    ...     ledger.flush()
    ...     ledger.written, ledger.lost
    (1, 0)
    """

    def __init__(
        self,
        manager: "ResourceQuotaManager",
        path: str | os.PathLike[str],
        *,
        buffer_size: int,
        max_bytes: int | None,
        by_day: bool,
    ) -> None:
        super().__init__(path, buffer_size=buffer_size, max_bytes=max_bytes, by_day=by_day)
        self._manager = manager

    def acquire(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: "TokenCount",
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
        *,
        timeout: float | None = None,
        priority: SupportsIndex = 0,
    ) -> "Acquired":
        """Acquire a grant as `ResourceQuotaManager.acquire` does, in a ``with`` block, and record it when that ends.

        A request that is denied is recorded too. With ``timeout=0`` it never waits, as in `reserve`.
        """
        return Acquired(self, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)

    def acquire_async(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: "TokenCount",
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
        *,
        timeout: float | None = None,
        priority: SupportsIndex = 0,
    ) -> "AcquiredAsync":
        """`acquire` for asyncio, in an ``async with`` block."""
        return AcquiredAsync(self, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)


class _Recorded:
    """One request of a ledger. A class, since a context manager made of a generator takes a microsecond longer."""

    __slots__ = ("_admitted_ns", "_arrived_ns", "_grant", "_ledger", "_request")

    _grant: "Grant"
    _arrived_ns: int
    _admitted_ns: int

    def __init__(
        self,
        ledger: GrantLedger,
        model_id: str | Sequence[str],
        estimated_tokens: "TokenCount",
        ram_needed_mb: SupportsIndex,
        ssd_needed_mb: SupportsIndex,
        timeout: float | None,
        priority: SupportsIndex,
    ) -> None:
        self._ledger = ledger
        self._request = (model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)

    def _denied(self, error: QuotaExceededError) -> None:
        model_id, estimated_tokens, _, _, _, priority = self._request
        self._ledger.record_denial(model_id, estimated_tokens, error, self._arrived_ns, priority)

    def _ended(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._grant.__exit__(kind, error, trace)
        finally:
            model_id, estimated_tokens, _, _, _, priority = self._request
            self._ledger.record_grant(
                model_id, estimated_tokens, self._grant, self._arrived_ns, self._admitted_ns, priority
            )


class Acquired(_Recorded):
    """A grant for the length of a ``with`` block."""

    __slots__ = ()

    def __enter__(self) -> "Grant":
        model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority = self._request
        self._arrived_ns = time.monotonic_ns()
        try:
            self._grant = self._ledger._manager.acquire(
                model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout=timeout, priority=priority
            )
        except QuotaExceededError as error:
            self._denied(error)
            raise
        self._admitted_ns = time.monotonic_ns()
        return self._grant

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended(kind, error, trace)


class AcquiredAsync(_Recorded):
    """A grant for the length of an ``async with`` block."""

    __slots__ = ()

    async def __aenter__(self) -> "Grant":
        model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority = self._request
        self._arrived_ns = time.monotonic_ns()
        try:
            self._grant = await self._ledger._manager.acquire_async(
                model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout=timeout, priority=priority
            )
        except QuotaExceededError as error:
            self._denied(error)
            raise
        self._admitted_ns = time.monotonic_ns()
        return self._grant

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended(kind, error, trace)
