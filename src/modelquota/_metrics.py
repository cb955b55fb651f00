"""What is measured of a manager, in one table for all metric systems, and how many models are told apart.

A label for each model is what people want to see, and what a metric store cannot bear for any number of models. So at
most `max_models` have one, those nearest to a limit; the others are summed under one label. A model's counters then
move between its own label and the common one, and a plain sum over the others would fall whenever a model left it.
Hence each reading adds what every model has counted *since the reading before* to the label under which the model is
now: no counter ever falls, and nothing that a model counted is lost or told twice.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelquota.config import ResourceQuotaConfig
from modelquota.limits import ViolationAction, ViolationType
from modelquota.utilization import Utilization, read_utilization, window_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelquota.reading import QuotaReader

__all__ = ["DEFAULT_MAX_MODELS", "METRICS", "MODEL", "OTHERS", "Kind", "Metric", "MetricSource", "Reading"]

DEFAULT_MAX_MODELS: Final = 100
"""How many models have a label of their own unless said otherwise."""

OTHERS: Final = "(others)"
"""The label of all models that have none of their own; a model of that very name is always among them."""

MODEL: Final = "model"
"""Name of the label that names the model."""

_MB = 2**20


class Kind(Enum):
    """Where a metric's figures come from, and so what may be done with them."""

    TOTAL = "counter over all models, removed and unknown ones too"
    STATE = "gauge of the manager"
    COUNTER = "counter of a model"
    USE = "gauge of a model; those of the others are summed"
    LIMIT = "gauge of a model; the others have none, since limits of different models do not add up"
    PRESSURE = "gauge of a model; of the others the highest"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric: dots in its name as OpenTelemetry has them, underscores and the unit's suffix for Prometheus.

    `series` maps the values of `labels` (beside the model) to the fields whose sum is the figure.
    """

    name: str
    kind: Kind
    unit: str  # as UCUM has it: "By" for bytes, "1" for a ratio, "{request}" for things counted
    help: str
    series: Mapping[tuple[str, ...], tuple[str, ...]]
    labels: tuple[str, ...] = ()
    scale: float = 1

    @property
    def is_counter(self) -> bool:
        """True where the figure never falls."""
        return self.kind in (Kind.TOTAL, Kind.COUNTER)

    @property
    def of_model(self) -> bool:
        """True where there is a figure for each model."""
        return self.kind not in (Kind.TOTAL, Kind.STATE)


def _one(*fields: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {(): fields}


def _windows(fields: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {(window,): (fields.format(window),) for window in ("second", "hour", "day")}


_DENIED: dict[tuple[str, ...], str] = {
    (ViolationAction.REJECT.value,): "rejected",
    (ViolationAction.THROTTLE.value,): "throttled",
    (ViolationAction.QUEUE.value,): "queued",
}
_VIOLATED: dict[tuple[str, ...], str] = {
    (kind.value,): f"{kind.value.removesuffix('_limit')}_violations" for kind in ViolationType
}
_DENIED_TOTALS = {key: (f"{field}_requests",) for key, field in _DENIED.items()}
_DENIED_OF_MODEL = {key: (f"{field}_total",) for key, field in _DENIED.items()}
_VIOLATIONS = {key: (field,) for key, field in _VIOLATED.items()}
_CHECKS = _one("allowed_total", "rejected_total", "throttled_total", "queued_total")
_REQUEST, _TOKEN, _BYTE, _MODEL_UNIT = "{request}", "{token}", "By", "{model}"

# fmt: off
METRICS: Final = (
    Metric("modelquota.checks", Kind.TOTAL, _REQUEST, "Requests judged.", _one("total_checks")),
    Metric("modelquota.admitted", Kind.TOTAL, _REQUEST, "Requests admitted.", _one("allowed_requests")),
    Metric("modelquota.warned", Kind.TOTAL, _REQUEST, "Requests admitted in spite of a violation.",
           _one("warned_requests")),
    Metric("modelquota.denied", Kind.TOTAL, _REQUEST, "Requests denied, by the action applied.",
           _DENIED_TOTALS, ("action",)),
    Metric("modelquota.violations", Kind.TOTAL, _REQUEST, "Requests that violated a limit, by its class.",
           _VIOLATIONS, ("type",)),
    Metric("modelquota.models", Kind.STATE, _MODEL_UNIT, "Models that have a quota.", _one("models")),
    Metric("modelquota.enforcing", Kind.STATE, "", "0 while everything is admitted, otherwise 1.", _one("enforcing")),
    Metric("modelquota.model.checks", Kind.COUNTER, _REQUEST, "Requests of the model judged.", _CHECKS),
    Metric("modelquota.model.admitted", Kind.COUNTER, _REQUEST, "Requests of the model admitted.",
           _one("allowed_total")),
    Metric("modelquota.model.warned", Kind.COUNTER, _REQUEST, "Requests of the model admitted in spite of a violation.",
           _one("warned_total")),
    Metric("modelquota.model.denied", Kind.COUNTER, _REQUEST, "Requests of the model denied, by the action applied.",
           _DENIED_OF_MODEL, ("action",)),
    Metric("modelquota.model.violations", Kind.COUNTER, _REQUEST,
           "Requests of the model that violated a limit, by its class.", _VIOLATIONS, ("type",)),
    Metric("modelquota.model.tokens", Kind.COUNTER, _TOKEN, "Tokens charged to the model.", _one("tokens_total")),
    Metric("modelquota.model.window.requests", Kind.USE, _REQUEST, "Requests admitted in the rolling window.",
           _windows("requests_this_{}"), ("window",)),
    Metric("modelquota.model.window.requests.limit", Kind.LIMIT, _REQUEST,
           "Most requests of the rolling window, burst included.", _windows("requests_{}"), ("window",)),
    Metric("modelquota.model.window.tokens", Kind.USE, _TOKEN, "Tokens admitted in the rolling window.",
           _windows("tokens_this_{}"), ("window",)),
    Metric("modelquota.model.window.tokens.limit", Kind.LIMIT, _TOKEN,
           "Most tokens of the rolling window, burst included.", _windows("tokens_{}"), ("window",)),
    Metric("modelquota.model.burst.requests", Kind.USE, _REQUEST, "Requests ahead of the rate, not yet repaid.",
           _one("burst_requests_used")),
    Metric("modelquota.model.burst.tokens", Kind.USE, _TOKEN, "Tokens ahead of the rate, not yet repaid.",
           _one("burst_tokens_used")),
    Metric("modelquota.model.ram", Kind.USE, _BYTE, "RAM reported and reserved.",
           _one("current_ram_mb", "reserved_ram_mb"), scale=_MB),
    Metric("modelquota.model.ram.peak", Kind.USE, _BYTE, "Most RAM ever reported.", _one("peak_ram_mb"), scale=_MB),
    Metric("modelquota.model.ram.limit", Kind.LIMIT, _BYTE, "Most RAM.", _one("ram"), scale=_MB),
    Metric("modelquota.model.ssd", Kind.USE, _BYTE, "SSD space reported and reserved.",
           _one("current_ssd_mb", "reserved_ssd_mb"), scale=_MB),
    Metric("modelquota.model.ssd.peak", Kind.USE, _BYTE, "Most SSD space ever reported.", _one("peak_ssd_mb"),
           scale=_MB),
    Metric("modelquota.model.ssd.limit", Kind.LIMIT, _BYTE, "Most SSD space.", _one("ssd"), scale=_MB),
    Metric("modelquota.model.concurrent.requests", Kind.USE, _REQUEST, "Grants open.", _one("concurrent_requests")),
    Metric("modelquota.model.concurrent.requests.limit", Kind.LIMIT, _REQUEST, "Most grants open at once.",
           _one("concurrent")),
    Metric("modelquota.model.queue.requests", Kind.USE, _REQUEST, "Requests that wait.", _one("queued_requests")),
    Metric("modelquota.model.queue.requests.limit", Kind.LIMIT, _REQUEST, "Most requests that may wait.",
           _one("queue")),
    Metric("modelquota.model.pressure", Kind.PRESSURE, "1", "Use of the limit that the model is nearest to; 1 is full.",
           _one("pressure")),
)
# fmt: on
"""Every metric, in the order in which they are exported."""

_COUNTED = tuple(
    dict.fromkeys(
        field
        for metric in METRICS
        if metric.kind is Kind.COUNTER
        for fields in metric.series.values()
        for field in fields
    )
)


def _limit(quota: ResourceQuotaConfig, name: str) -> float | None:
    """Return the limit that a series of kind LIMIT names; None where there is none."""
    match name:
        case "requests_second":
            return window_limit(quota.max_requests_per_second, quota.burst_requests)
        case "tokens_second":
            return window_limit(quota.max_tokens_per_second, quota.burst_tokens)
        case "requests_hour" | "requests_day" | "tokens_hour" | "tokens_day":
            limit: float | None = getattr(quota, "max_{}_per_{}".format(*name.split("_")))
        case "ram" | "ssd":
            limit = getattr(quota, f"max_{name}_mb")
        case "concurrent":
            limit = quota.max_concurrent_requests
        case _:
            limit = quota.max_queued_requests
    return limit


class Reading:
    """One reading of a manager, from which every metric's figures can be taken in any order."""

    def __init__(
        self, found: Utilization, facts: dict[str, float], shown: "NDArray[np.intp]", own: dict[str, Any], others: bool
    ) -> None:
        self._facts = facts
        self._quotas = [found.quotas[index] for index in shown]
        self._models = [quota.model_id for quota in self._quotas]
        self._others = others
        rest = np.setdiff1d(np.arange(len(found)), shown)
        self._columns: dict[str, list[float]] = {name: values.tolist() for name, values in own.items()}
        for name in found.counters.dtype.names or ():
            if name not in self._columns and name != "model_id":
                values = found.counters[name]
                self._columns[name] = [*values[shown].tolist(), *([int(values[rest].sum())] if others else [])]
        pressure = found.pressure / 100
        self._columns["pressure"] = [*pressure[shown].tolist(), *([pressure[rest].max(initial=0.0)] if others else [])]

    def samples(self, metric: Metric) -> Iterator[tuple[tuple[str, ...], float]]:
        """Yield the values of the labels (the model's first) and the figure, of every series that there is."""
        if metric.kind in (Kind.TOTAL, Kind.STATE):
            for labels, fields in metric.series.items():
                yield labels, sum(self._facts[field] for field in fields)
        elif metric.kind is Kind.LIMIT:
            for labels, (name,) in metric.series.items():
                for model_id, quota in zip(self._models, self._quotas, strict=True):
                    limit = _limit(quota, name)
                    if limit is not None:
                        yield (model_id, *labels), limit * metric.scale
        else:
            models = [*self._models, OTHERS] if self._others else self._models
            for labels, fields in metric.series.items():
                for model_id, *values in zip(models, *(self._columns[field] for field in fields), strict=True):
                    yield (model_id, *labels), sum(values) * metric.scale


class MetricSource:
    """Reads a manager, again and again, so that counters only grow; safe to call from several threads.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        What is measured.
    max_models : int
        How many models have a label of their own, 0 or more: those nearest to a limit, at each reading anew.
    """

    def __init__(self, manager: "QuotaReader", *, max_models: int = DEFAULT_MAX_MODELS) -> None:
        if max_models < 0:
            raise ValueError(f"max_models is {max_models}; give an integer, 0 or more")
        self.manager = manager
        self.max_models = max_models
        self._lock = threading.Lock()
        self._models: dict[str, int] = {}
        self._seen = np.zeros((0, len(_COUNTED)), np.uint64)
        self._told = self._seen
        self._told_of_others = np.zeros(len(_COUNTED), np.uint64)
        self._had_others = False

    def read(self) -> Reading:
        """Read all models, and bring the counters up to date."""
        with self._lock:
            found = read_utilization(self.manager)
            stats = self.manager.get_stats()
            facts: dict[str, float] = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
            facts |= {"models": len(found), "enforcing": int(self.manager.enforcement_enabled)}
            ids = found.model_ids
            order = np.array([index for index in found.by_pressure() if ids[index] != OTHERS], np.intp)
            shown = np.sort(order[: self.max_models])
            own = self._count(found, ids, shown)
            # once there, the common label stays: a counter that disappears is forgotten by whoever reads it
            self._had_others = self._had_others or len(shown) < len(found)
            if self._had_others:
                own = {name: np.append(values, self._told_of_others[i]) for i, (name, values) in enumerate(own.items())}
            return Reading(found, facts, shown, own, self._had_others)

    def _count(self, found: Utilization, ids: list[str], shown: "NDArray[np.intp]") -> dict[str, Any]:
        """Add what was counted since the last reading to each model's label, or to that of the others."""
        seen = np.stack([found.counters[name].astype(np.uint64) for name in _COUNTED], axis=1)
        before, told = np.zeros_like(seen), np.zeros_like(seen)
        places = np.array([self._models.get(model_id, -1) for model_id in ids], np.intp)
        known = places >= 0
        before[known], told[known] = self._seen[places[known]], self._told[places[known]]
        # a model that was removed and set again has begun at 0
        before[(seen < before).any(axis=1)] = 0
        more = seen - before
        told[shown] += more[shown]
        self._told_of_others = self._told_of_others + more.sum(axis=0) - more[shown].sum(axis=0)
        self._models = {model_id: place for place, model_id in enumerate(ids)}
        self._seen, self._told = seen, told
        return {name: told[shown, column] for column, name in enumerate(_COUNTED)}
