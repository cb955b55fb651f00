from typing import SupportsIndex

from typing_extensions import disjoint_base

from modelquota._core.table.result import QuotaCheckResult
from modelquota._core.table.table import QuotaTable
from modelquota.quota.tokens import Tokens

@disjoint_base
class RowHandle:
    @property
    def manager(self) -> QuotaTable: ...
    @property
    def model_id(self) -> str: ...
    def __init__(self, manager: QuotaTable, model_id: str) -> None: ...
    def check(
        self,
        estimated_tokens: SupportsIndex | Tokens,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> QuotaCheckResult: ...
    def _require_alive(self) -> None: ...
