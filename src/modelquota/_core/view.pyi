from typing import Any

import numpy as np
from numpy.typing import NDArray

def read_copies(
    rows: NDArray[np.void], ledgers: NDArray[np.void], now_ns: int
) -> tuple[NDArray[np.void], list[dict[str, Any]]]: ...
