"""How often a model has denied: one rule, for every place that shows it.

The core counts a request once, under the action that its first violation met. If it waits for its admission, it is
neither denied nor admitted until that is over; if it is served in the end, it is *waited*, not denied.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DENIED", "denied", "denied_by_action"]

DENIED: Final = ("rejected", "throttled", "queued")
"""The counters of requests that met an action which denies."""


def denied_by_action(counters: "Mapping[str, Any] | NDArray[np.void]") -> "dict[str, NDArray[np.int64]]":
    """Return how many requests were denied for good, for each of `DENIED`: of a snapshot, or of one record of it.

    Those that wait or have been served after a wait are left out, of those that were queued first: the core does not
    say under which action each of them began to wait. A model that has had one of the two actions only is told exactly.

    Examples
    --------
    >>> record = dict(rejected_total=1, throttled_total=0, queued_total=9, waited_total=5, waiting_requests=2)
    >>> {name: int(count) for name, count in denied_by_action(record).items()}
    {'rejected': 1, 'throttled': 0, 'queued': 2}
    """
    counts = [np.asarray(counters[f"{name}_total"], np.int64) for name in DENIED]
    left = np.asarray(counters["waited_total"], np.int64) + np.asarray(counters["waiting_requests"], np.int64)
    of_queue = np.minimum(counts[2], left)
    of_throttle = np.minimum(counts[1], left - of_queue)
    return dict(zip(DENIED, (counts[0], counts[1] - of_throttle, counts[2] - of_queue), strict=True))


def denied(counters: "Mapping[str, Any] | NDArray[np.void]") -> "NDArray[np.int64]":
    """Return the sum of `denied_by_action` over the actions."""
    rejected, throttled, queued = denied_by_action(counters).values()
    return rejected + throttled + queued
