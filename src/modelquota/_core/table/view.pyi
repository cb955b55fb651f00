from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelquota._core.state.mapping import Regions
from modelquota._core.table.table import QuotaTable

def limits_dtype() -> np.dtype[np.void]: ...
def read_table(table: QuotaTable) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint64]]: ...
def read_retired(table: QuotaTable) -> dict[str, int]: ...
def read_rows(
    descriptor: int, regions: Regions, count: int, now_ns: int
) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint32]]: ...
def records_of(usage: NDArray[np.void], model_ids: list[str], places: NDArray[np.intp]) -> NDArray[np.void]: ...
def unpack_limits(limits: NDArray[np.void]) -> list[dict[str, Any]]: ...
def read_copies(
    rows: NDArray[np.void],
    cold_rows: NDArray[np.void],
    rings: tuple[NDArray[np.void], ...],
    shares: NDArray[np.void],
    header: np.void,
    now_ns: int,
) -> tuple[NDArray[np.void], list[dict[str, Any]]]: ...
