from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from modelquota._core.table.intern import QuotaState
from modelquota._core.table.result import QuotaCheckResult
from modelquota.quota.config import ResourceQuotaConfig

class QuotaTable(QuotaState):
    def check_quota(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: SupportsIndex,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> QuotaCheckResult: ...
    def peek_quota(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: SupportsIndex,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> QuotaCheckResult: ...
    def rows(self, model_ids: Iterable[str]) -> NDArray[np.int64]: ...
    def check_many(
        self,
        rows: NDArray[np.int64],
        estimated_tokens: NDArray[np.int64] | Sequence[int] | SupportsIndex,
        out: NDArray[np.uint8] | None = None,
        *,
        times_ns: NDArray[np.int64] | Sequence[int] | None = None,
        retry_after_ms: NDArray[np.int64] | None = None,
    ) -> NDArray[np.uint8]: ...
    def charge_many(
        self, rows: NDArray[np.int64], tokens: NDArray[np.int64] | Sequence[int] | SupportsIndex
    ) -> None: ...
    def _template(self, model_id: str) -> ResourceQuotaConfig | None: ...
    def _log_unknown(self, model_id: str) -> None: ...
    def _log_violation(self, model_id: str, result: QuotaCheckResult, stands_for: int) -> None: ...

class RowHandle:
    @property
    def manager(self) -> QuotaTable: ...
    @property
    def model_id(self) -> str: ...
    def __init__(self, manager: QuotaTable, model_id: str) -> None: ...
    def check(
        self, estimated_tokens: SupportsIndex, ram_needed_mb: SupportsIndex = 0, ssd_needed_mb: SupportsIndex = 0
    ) -> QuotaCheckResult: ...
    def _require_alive(self) -> None: ...
