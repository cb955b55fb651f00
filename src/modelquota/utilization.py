"""How near every model is to each of its limits: one reading for metrics, alerts and the terminal."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from modelquota.config import ResourceQuotaConfig
from modelquota.limits import Limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelquota.reading import QuotaReader

__all__ = ["LIMITS", "Utilization", "limits_of", "read_utilization", "window_limit"]

LIMITS: Final = tuple(Limit)
"""The columns of `Utilization.percent`, in their order."""


@dataclass(frozen=True, slots=True, eq=False)
class Utilization:
    """All models of a manager at one moment, in the order of their registration.

    Attributes
    ----------
    counters : numpy structured array
        What `ResourceQuotaManager.snapshot` returned, without models that were removed while it was read.
    quotas : list of ResourceQuotaConfig
        The limits, one for each element of `counters`; read just after it, so a change between the two shows.
    percent : numpy float64 array
        A row for each model, a column for each of `LIMITS`: use in percent of the limit. 0 where there is no limit, and
        a limit of 0 is taken as 1; may exceed 100. For a rate it is the fuller of the rolling second, of
        ``ceil(rate) + burst``, and of the burst not yet repaid.
    """

    counters: "NDArray[np.void]"
    quotas: list[ResourceQuotaConfig]
    percent: "NDArray[np.float64]"

    def __len__(self) -> int:
        return len(self.quotas)

    @property
    def model_ids(self) -> list[str]:
        """The ids, in order."""
        return [quota.model_id for quota in self.quotas]

    @property
    def pressure(self) -> "NDArray[np.float64]":
        """Highest percentage of each model, over all its limits."""
        highest: NDArray[np.float64] = self.percent.max(axis=1, initial=0.0)
        return highest

    @property
    def nearest(self) -> list[Limit]:
        """The limit of each model with the highest percentage; the first judged of several."""
        return [LIMITS[column] for column in self.percent.argmax(axis=1)]

    def by_pressure(self) -> "NDArray[np.intp]":
        """Indices of the models, the one nearest to a limit first; equals stay in order."""
        return np.argsort(-self.pressure, kind="stable")

    def used(self, limit: Limit) -> "NDArray[np.int64]":
        """Use of one limit in its own unit, one figure for each model; of a rate, that of the rolling second."""
        used: NDArray[np.int64] = np.sum([self.counters[field] for field in _USED[limit]], axis=0)
        return used

    def of(self, limit: Limit) -> "NDArray[np.float64]":
        """Percentages of one limit, one for each model."""
        return self.percent[:, LIMITS.index(limit)]


def read_utilization(manager: "QuotaReader") -> Utilization:
    """Read all models of a manager, and compare their use with their limits.

    Returns
    -------
    Utilization
        Empty where no model has a quota.

    Examples
    --------
    >>> from modelquota import ManualClock, ResourceQuotaManager
    >>> manager = ResourceQuotaManager(clock=ManualClock())
    >>> manager.set_quota("idle")
    >>> manager.set_quota("busy", max_ram_mb=1000)
    >>> manager.update_memory_usage("busy", ram_mb=900, ssd_mb=0)
    >>> found = read_utilization(manager)
    >>> [found.model_ids[index] for index in found.by_pressure()], found.of(Limit.RAM).tolist()
    (['busy', 'idle'], [0.0, 90.0])
    >>> found.nearest[1].label
    'RAM'
    """
    counters = manager.snapshot()
    found = [manager.get_quota(model_id) for model_id in counters["model_id"]]
    quotas = [quota for quota in found if quota is not None]
    if len(quotas) < len(found):
        counters = counters[[quota is not None for quota in found]]
    return Utilization(counters, quotas, _percent(counters, quotas))


def window_limit(rate: float | None, burst: int) -> int | None:
    """Return the most that any rolling second admits at this rate: ``ceil(rate) + burst``; None for no limit.

    Examples
    --------
    >>> window_limit(0.5, 10), window_limit(0, 10), window_limit(None, 10)
    (11, 0, None)
    """
    if rate is None:
        return None
    return math.ceil(rate) + burst if rate else 0


def limits_of(quota: ResourceQuotaConfig) -> tuple[int | None, ...]:
    """Return a model's limits in the order of `LIMITS`, those of a second with the burst; None for no limit."""
    return (
        quota.max_ram_mb,
        quota.max_ssd_mb,
        quota.max_concurrent_requests,
        window_limit(quota.max_requests_per_second, quota.burst_requests),
        window_limit(quota.max_tokens_per_second, quota.burst_tokens),
        quota.max_tokens_per_hour,
        quota.max_requests_per_hour,
        quota.max_tokens_per_day,
        quota.max_requests_per_day,
        quota.max_queued_requests,
    )


def _percent(counters: "NDArray[np.void]", quotas: list[ResourceQuotaConfig]) -> "NDArray[np.float64]":
    # a limit that is not set is infinite here: whatever is used of it is 0 percent
    limits = np.array([[math.inf if limit is None else limit for limit in limits_of(quota)] for quota in quotas], float)
    used = np.zeros((len(quotas), len(LIMITS)))
    for column, fields in enumerate(_USED.values()):
        for field in fields:
            used[:, column] += counters[field]
    percent: NDArray[np.float64] = 100 * used / np.maximum(limits.reshape(used.shape), 1)
    for limit, rate, burst, field in _BURSTS:
        base = np.array([max(getattr(quota, rate) or 0.0, 1.0) for quota in quotas])
        ahead = counters[field].astype(float)
        level = 100 * (base + ahead) / (base + np.array([getattr(quota, burst) for quota in quotas], float))
        column = LIMITS.index(limit)
        percent[:, column] = np.maximum(percent[:, column], np.where(ahead > 0, level, 0.0))
    return percent


_USED: dict[Limit, tuple[str, ...]] = {
    Limit.RAM: ("current_ram_mb", "reserved_ram_mb"),
    Limit.SSD: ("current_ssd_mb", "reserved_ssd_mb"),
    Limit.CONCURRENCY: ("concurrent_requests",),
    Limit.REQUESTS_PER_SECOND: ("requests_this_second",),
    Limit.TOKENS_PER_SECOND: ("tokens_this_second",),
    Limit.TOKENS_PER_HOUR: ("tokens_this_hour",),
    Limit.REQUESTS_PER_HOUR: ("requests_this_hour",),
    Limit.TOKENS_PER_DAY: ("tokens_this_day",),
    Limit.REQUESTS_PER_DAY: ("requests_this_day",),
    Limit.QUEUE: ("queued_requests",),
}
_BURSTS = (
    (Limit.REQUESTS_PER_SECOND, "max_requests_per_second", "burst_requests", "burst_requests_used"),
    (Limit.TOKENS_PER_SECOND, "max_tokens_per_second", "burst_tokens", "burst_tokens_used"),
)
