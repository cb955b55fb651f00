"""The BurstGPT trace: seconds since the first day, and failures among the requests."""

import numpy as np

from modelquota.tuning.cells import Int64Array
from modelquota.tuning.formats.base import Format


class BurstGPT(Format):
    """Its failed requests have no response; they arrived all the same, and stay in the trace."""

    __slots__ = ()

    def finish(self, columns: dict[str, Int64Array], users: Int64Array | None) -> int:
        """Count the requests that failed."""
        return int(np.count_nonzero(columns["output"] == 0))

    def note(self, rows: int) -> str:
        """Say what was done with requests that failed."""
        return f"{rows:,} requests have no response tokens (they failed); they are kept"


BURSTGPT = BurstGPT(
    name="burstgpt",
    title="BurstGPT CSV",
    container="CSV",
    columns={
        "time": "Timestamp",
        "prompt": "Request tokens",
        "output": "Response tokens",
        "model": "Model",
        "user": "Session ID",
        "duration": "Elapsed time",
    },
    required=("time", "prompt", "output", "model"),
    time_unit="s",
)
