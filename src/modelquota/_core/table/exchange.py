"""What the functions of ``shares`` return."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

OnLeaseEnd = Literal["deny", "share", "allow"]


class OvertakenError(Exception):
    """Another process exchanges the host's shares by now: nothing was changed."""


class Lease(NamedTuple):
    """The lease of a state: when it ends, in the state's time, and what holds afterwards."""

    end_ns: int
    on_lease_end: OnLeaseEnd | None
    nodes: int
    retry_ns: int
    urgent: int


class Exchanged(NamedTuple):
    """What models hold and use, see `exchange_shares`: one row for each code, zeros if its model has been removed."""

    alive: NDArray[np.bool_]
    held: NDArray[np.int64]
    used: NDArray[np.int64]
    limits: NDArray[np.int64]
    charged: NDArray[np.uint64]
    peak: NDArray[np.int64]
    needed: NDArray[np.int64]
    starved: NDArray[np.uint64]
    waiting: NDArray[np.int64]
