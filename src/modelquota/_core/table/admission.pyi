from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from numpy.typing import NDArray

from modelquota._core.table.grant import Grant
from modelquota._core.table.table import QuotaTable

class GrantTable(QuotaTable):
    def reserve(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: SupportsIndex,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
    ) -> Grant: ...
    def settle_many(
        self, grants: Sequence[Grant], actual_tokens: Sequence[SupportsIndex] | NDArray[np.int64]
    ) -> None: ...
