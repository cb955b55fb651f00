from collections.abc import Sequence
from typing import SupportsIndex

from modelquota._core.grant import Grant
from modelquota._core.reserve import GrantTable

class Waiter:
    in_thread: bool
    @property
    def done(self) -> bool: ...
    @property
    def wake_at_ns(self) -> int | None: ...
    def sleep_seconds(self) -> float | None: ...
    def pump(self, nowait: bool = False) -> None: ...
    def take(self) -> Grant: ...
    def leave(self, nowait: bool = False) -> Line | None: ...

class Line:
    @property
    def orphaned(self) -> bool: ...
    def pump(self, nowait: bool = False) -> None: ...

class WaitTable(GrantTable):
    def _begin(
        self,
        waiter: Waiter,
        model_id: str | Sequence[str],
        estimated_tokens: SupportsIndex,
        ram_needed_mb: SupportsIndex,
        ssd_needed_mb: SupportsIndex,
        timeout: float | None,
        priority: SupportsIndex,
        nowait: bool,
    ) -> Grant | Waiter | None: ...
    def _pump_all(self) -> None: ...
