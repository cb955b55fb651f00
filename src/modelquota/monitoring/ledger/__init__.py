"""The ledger: one line of JSON for each request, for billing, audit and tuning.

A request is put into a bounded buffer, and one thread writes what is there every tenth of a second, so that no request
waits for a disk. What does not fit is counted as lost, and the ledger says how many. The lines are:

``{"ledger": 1, "started_us": ..., "pid": ...}``
    A process begins to write. Times are microseconds since 1970-01-01 UTC. With ``continued_us``, it goes on from the
    file before.
``{"time_us": ..., "ids": ["acme", "llama-70b"], "estimated": ..., "settled": ..., "verdict": ..., ...}``
    A request: see `Ledger.record`. The last id is the model; those before it are whom else the request is charged to.
``{"lost": 5, "time_us": ..., "pid": ...}``
    So many requests were lost since the process' line before: the buffer was full, or the disk refused them.
``{"ended_us": ..., "written": ..., "lost": ..., "pid": ...}``
    The process ended in order. If this line is missing, the process was killed, and the last tenth of a second may be
    missing without having been counted. A line that was cut off by that is skipped, and said, by all readers.

`modelquota usage` sums ledgers, and `modelquota replay` and `tune` read them as traces.
"""

from modelquota.monitoring.ledger.grants import GrantLedger
from modelquota.monitoring.ledger.writer import ADMITTED, DENIED, WARNED, Ledger

__all__ = ["ADMITTED", "DENIED", "WARNED", "GrantLedger", "Ledger"]
