"""How close every model is to each of its limits: one reading for metrics, alerts and the terminal."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, overload

import numpy as np

from modelquota._core.state.packing import bounds_of
from modelquota._core.table.records import left_of, percents_of
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit, ViolationAction
from modelquota.reading.reader import quotas_of
from modelquota.reading.report import under_models

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelquota.reading.reader import QuotaReader

__all__ = ["LIMITS", "Utilization", "denying", "limits_of", "read_utilization"]

LIMITS: Final = tuple(CATALOGUE)
"""The columns of `Utilization.percent`, in order."""


@dataclass(frozen=True, eq=False)
class Utilization:
    """Usage and limits of all models of a manager at one moment, in the order of their registration.

    Attributes
    ----------
    counters : numpy structured array
        As `ResourceQuotaManager.snapshot` returns it.
    quotas : Quotas
        The limits as a sequence of ResourceQuotaConfig, one for each element of `counters`, read together with it.
    percent : numpy float64 array
        A row for each model, a column for each of `LIMITS`: percentage of the limit, as ``ResourceUsage.percent``.
    denying : numpy bool array
        Of the same shape: whether a request that violates the limit is denied. It is not denied under the action
        ``warn``, nor by a limit that the quota names in its ``shadow_limits``.
    lives : numpy uint64 array
        A number for each model, which changes if its id is removed and registered again.
    """

    counters: "NDArray[np.void]"
    quotas: "Quotas"
    percent: "NDArray[np.float64]"
    denying: "NDArray[np.bool_]"
    lives: "NDArray[np.uint64]"

    def __len__(self) -> int:
        return len(self.quotas)

    @functools.cached_property
    def model_ids(self) -> list[str]:
        """The ids, in order."""
        ids: list[str] = self.counters["model_id"].tolist()
        return ids

    @functools.cached_property
    def left(self) -> "NDArray[np.int64]":
        """What each of `LIMITS` still admits, a row for each model, as ``ResourceUsage.left``; -1 if it is not set."""
        return left_of(self.counters)

    @functools.cached_property
    def denies(self) -> "NDArray[np.bool_]":
        """Whether any limit of the model denies; the others are only counted."""
        return np.asarray(self.denying.any(axis=1), np.bool_)

    @functools.cached_property
    def pressure(self) -> "NDArray[np.float64]":
        """Highest percentage of each model, over the limits that deny; if none of them denies, over all its limits."""
        highest: NDArray[np.float64] = self._pressing.max(axis=1, initial=0.0)
        return highest

    @functools.cached_property
    def nearest(self) -> list[Limit]:
        """The limit of each model with the highest percentage, among those of `pressure`; the first of several."""
        return [LIMITS[column] for column in self.nearest_column.tolist()]

    @functools.cached_property
    def nearest_column(self) -> "NDArray[np.intp]":
        """The columns of `nearest`."""
        columns: NDArray[np.intp] = self._pressing.argmax(axis=1)
        return columns

    @property
    def highest(self) -> float:
        """The highest pressure of any model that denies, in percent; 0 if no model denies."""
        return float(self.pressure[self.denies].max(initial=0.0))

    @functools.cached_property
    def _pressing(self) -> "NDArray[np.float64]":
        return np.where(self.denying | ~self.denies[:, None], self.percent, 0.0)

    def by_pressure(self) -> "NDArray[np.intp]":
        """Indices of the models, the one closest to a limit first; equal ones stay in order.

        Models that deny nothing come last, so that a limit that is only being tried out does not hide a real one.
        """
        return np.lexsort((-self.pressure, ~self.denies))

    def by_family(self) -> list[int]:
        """Indices as `by_pressure`, but a model and its meters are together, the model first."""
        order: list[int] = self.by_pressure().tolist()
        ids = self.model_ids
        if not any("#" in model_id for model_id in ids):
            return order
        return [order[place] for place in under_models([ids[index] for index in order])]

    def used(self, limit: Limit) -> "NDArray[np.int64]":
        """Usage of one limit in its own unit, one number for each model; for a rate, that of the rolling second."""
        return self.uses[:, LIMITS.index(limit)]

    @functools.cached_property
    def uses(self) -> "NDArray[np.int64]":
        """Usage of each of `LIMITS` in its own unit, a row for each model."""
        uses = np.zeros((len(self), len(LIMITS)), np.int64)
        for column, record in enumerate(CATALOGUE.values()):
            for field in record.usage_fields:
                uses[:, column] += self.counters[field]
        return uses

    def of(self, limit: Limit) -> "NDArray[np.float64]":
        """Percentages of one limit, one for each model."""
        return self.percent[:, LIMITS.index(limit)]


def read_utilization(manager: "QuotaReader") -> Utilization:
    """Read all models of a manager, and compare their usage with their limits.

    Returns
    -------
    Utilization
        Empty if no model has a quota.

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
    counters, limits, lives = manager._read_table()
    quotas = Quotas(counters["model_id"].tolist(), *quotas_of(limits))
    denies = quotas.spread(denying, len(LIMITS)).astype(bool)
    return Utilization(counters, quotas, percents_of(counters), denies, lives)


class Quotas(Sequence[ResourceQuotaConfig]):
    """The quotas of many models, made on access: most differ only in the id, so each distinct kind is stored once."""

    def __init__(self, model_ids: list[str], kinds: list[ResourceQuotaConfig], kind_of: "NDArray[np.intp]") -> None:
        self._model_ids = model_ids
        self.kinds = kinds
        self.kind_of = kind_of
        self._fields = [kind.__getstate__()[1:] for kind in kinds]  # type: ignore[index]

    def __len__(self) -> int:
        return len(self._model_ids)

    @overload
    def __getitem__(self, index: int) -> ResourceQuotaConfig: ...
    @overload
    def __getitem__(self, index: slice) -> list[ResourceQuotaConfig]: ...
    def __getitem__(self, index: int | slice) -> ResourceQuotaConfig | list[ResourceQuotaConfig]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        quota = object.__new__(ResourceQuotaConfig)  # the values in the table were validated before
        quota.__setstate__([self._model_ids[index], *self._fields[self.kind_of[index]]])  # type: ignore[attr-defined]
        return quota

    def spread(self, of: Callable[[ResourceQuotaConfig], Sequence[float | bool]], width: int) -> "NDArray[Any]":
        """Return an array with a row for each model: the `width` numbers that `of` returns for its kind of quota."""
        return np.array([of(kind) for kind in self.kinds]).reshape(len(self.kinds), width)[self.kind_of]


def limits_of(quota: ResourceQuotaConfig) -> tuple[int | None, ...]:
    """Return a model's limits in the order of `LIMITS`, those per second with the burst added; None for no limit."""
    most, _ = bounds_of(quota)
    return most[1:]


def denying(quota: ResourceQuotaConfig) -> list[bool]:
    """Return whether each of `LIMITS` denies under a quota."""
    shadows = [name.lower() for name in getattr(quota, "shadow_limits", ())]
    return [quota.on_violation is not ViolationAction.WARN and limit.name.lower() not in shadows for limit in LIMITS]
