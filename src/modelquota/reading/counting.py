"""How many requests a model has denied: one rule, for every place that shows the number.

The core counts a request once, under the action applied to its first violation. While a request waits, it is neither
denied nor admitted; if it is admitted in the end, it counts as *waited*, not as denied.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DENIED", "denied", "denied_by_action"]

DENIED: Final = ("rejected", "throttled", "queued")
"""The counters of requests by the denying action that was applied to them."""


def denied_by_action(counters: "Mapping[str, Any] | NDArray[np.void]") -> "dict[str, NDArray[np.int64]]":
    """Return how many requests were denied for good, for each of `DENIED`: from a snapshot, or from one record of it.

    Requests that wait or were served after a wait are subtracted, from the queued ones first, since the core does not
    record under which action each of them began to wait. The numbers are exact for a model that has used only one of
    these two actions.

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
