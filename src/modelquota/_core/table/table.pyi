import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, SupportsIndex, TypeVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import disjoint_base

from modelquota._core.state.clock import ManualClock
from modelquota._core.table.grant import Grant
from modelquota._core.table.queue import Waiter
from modelquota._core.table.result import QuotaCheckResult
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.tokens import TokenCount

_W = TypeVar("_W", bound=Waiter)

@disjoint_base
class QuotaTable:
    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None,
        max_models: int | None,
        clock: ManualClock | None,
        events: object,
        trust_file: bool = False,
    ) -> None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def max_models(self) -> int: ...
    @property
    def clock(self) -> ManualClock | None: ...
    @property
    def closed(self) -> bool: ...
    @property
    def enforcement_enabled(self) -> bool: ...
    @enforcement_enabled.setter
    def enforcement_enabled(self, value: bool) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...
    def list_models(self) -> list[str]: ...
    def check_quota(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: TokenCount,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> QuotaCheckResult: ...
    def peek_quota(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: TokenCount,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> QuotaCheckResult: ...
    def codes(self, model_ids: Iterable[str]) -> NDArray[np.int64]: ...
    def check_many(
        self,
        codes: NDArray[np.int64],
        estimated_tokens: NDArray[np.int64] | Sequence[int] | TokenCount,
        out: NDArray[np.uint8] | None = None,
        *,
        times_ns: NDArray[np.int64] | Sequence[int] | None = None,
        retry_after_ms: NDArray[np.int64] | None = None,
    ) -> NDArray[np.uint8]: ...
    def _check_until_denied(
        self,
        codes: NDArray[np.int64],
        estimated_tokens: NDArray[np.int64],
        out: NDArray[np.uint8],
        times_ns: NDArray[np.int64],
    ) -> int: ...
    def charge_many(
        self,
        codes: NDArray[np.int64],
        tokens: NDArray[np.int64] | Sequence[int] | TokenCount,
        *,
        over: NDArray[np.uint8] | None = None,
    ) -> None: ...
    def reserve_many(
        self,
        codes: NDArray[np.int64],
        estimated_tokens: NDArray[np.int64] | Sequence[int] | TokenCount,
        *,
        out: NDArray[np.uint8] | None = None,
    ) -> list[Grant | None]: ...
    def reserve(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: TokenCount,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> Grant: ...
    def settle_many(self, grants: Sequence[Grant], actual_tokens: Sequence[TokenCount] | NDArray[np.int64]) -> None: ...
    def _admit_or_queue(
        self,
        waiter: Waiter,
        model_id: str | Sequence[str],
        estimated_tokens: TokenCount,
        ram_needed_mb: SupportsIndex,
        ssd_needed_mb: SupportsIndex,
        timeout: float | None,
        priority: SupportsIndex,
        *,
        nowait: bool,
    ) -> Grant | Waiter | None: ...
    def _admit(
        self,
        make_waiter: Callable[[], _W],
        model_id: str | Sequence[str],
        tokens: TokenCount | tuple[int, int, int],
        ram_needed_mb: SupportsIndex,
        ssd_needed_mb: SupportsIndex,
        timeout: float | None,
        priority: SupportsIndex,
    ) -> Grant | tuple[_W, bool]: ...
    def _retry(self, waiter: Waiter) -> Grant | Waiter | None: ...
    def _arrays(self) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.void]]: ...
    def _rings(self) -> tuple[NDArray[np.void], ...]: ...
    def _shares(self) -> NDArray[np.void]: ...
    def _set_quota(self, model_id: str, config: ResourceQuotaConfig) -> None: ...
    def _replace_quota(
        self, old: ResourceQuotaConfig | None, new: ResourceQuotaConfig | None, named: bool = False
    ) -> bool: ...
    def _meters_of(self, model_id: str) -> list[str]: ...
    def _remove(self, model_id: str) -> bool: ...
    def _read(self, model_id: str) -> tuple[dict[str, Any], dict[str, int]] | None: ...
    def _read_all(self) -> NDArray[np.void]: ...
    def _totals(self) -> dict[str, Any]: ...
    def _record_memory(self, model_id: str, ram_mb: int, ssd_mb: int) -> None: ...
    def _reset_burst(self, model_id: str) -> None: ...
