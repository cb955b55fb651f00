from collections.abc import Sequence
from typing import final

from modelquota._core.table.table import QuotaTable

@final
class LimitPlan:
    def __init__(
        self,
        codes: Sequence[int],
        most: Sequence[int],
        units: Sequence[int],
        reset_ms: Sequence[float],
        per_ahead_ms: Sequence[float],
        names: Sequence[bytes],
        policy: bytes,
    ) -> None: ...
    @property
    def empty(self) -> bool: ...
    @property
    def policy(self) -> bytes: ...
    @property
    def names(self) -> tuple[bytes, ...]: ...

def read_left(table: QuotaTable, model_id: str) -> tuple[bytes, tuple[int, ...], tuple[int, int]] | None: ...
def limit_fields(
    table: QuotaTable,
    ids: str | tuple[str, ...],
    plans: dict[bytes, LimitPlan],
    names: tuple[tuple[bytes, ...], ...],
    ietf: bool,
    stamped: bool,
) -> list[tuple[bytes, bytes]] | None: ...
