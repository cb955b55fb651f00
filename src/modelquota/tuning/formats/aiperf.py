"""AIPerf's traces: Mooncake's form with sessions, whose later turns may have a delay in place of a time."""

import numpy as np

from modelquota.tuning.cells import MISSING, BadRow, Int64Array
from modelquota.tuning.formats.base import Format


class AIPerf(Format):
    """A delay counts from the turn before it. The trace does not have its response, so it counts from its request."""

    __slots__ = ()

    def finish(self, columns: dict[str, Int64Array], users: Int64Array | None) -> int:
        """Turn delays into times."""
        times_ns = columns["time"]
        missing = np.flatnonzero(times_ns == MISSING)
        delays_ns = columns.get("delay")
        if not len(missing):
            return 0
        last: dict[int, int] = {}
        for row in range(len(times_ns)):
            session = -1 if users is None else int(users[row])
            time_ns = int(times_ns[row])
            if time_ns == MISSING:
                delay_ns = MISSING if delays_ns is None else int(delays_ns[row])
                if session not in last or delay_ns == MISSING:
                    raise BadRow(row, "timestamp", "no timestamp, and no delay after an earlier turn of its session")
                times_ns[row] = time_ns = last[session] + delay_ns
            last[session] = time_ns
        return len(missing)

    def note(self, rows: int) -> str:
        """Say how delays are counted."""
        return f"{rows:,} turns have a delay; it is counted from the arrival of the turn before"


AIPERF = AIPerf(
    name="aiperf",
    title="AIPerf JSONL",
    container="JSONL",
    columns={
        "time": "timestamp",
        "prompt": "input_length",
        "output": "output_length",
        "blocks": "hash_ids",
        "user": "session_id",
        "delay": "delay",
    },
    required=("prompt", "output"),
    marks=("session_id", "delay"),
    time_unit="ms",
    block_tokens=512,
)
