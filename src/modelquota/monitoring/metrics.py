"""The metrics of a manager, in one table for all metric systems, and a bound on how many models have a label.

People want a label for each model, but a metric store keeps every series that it was ever given, so it cannot take any
number of models. The labels are therefore bounded over the life of a source, not only at each reading: at most
`max_models` models ever get one, those nearest to a limit while labels are left. A label stays with its id, even if
the model is removed and comes back. All other models are summed under one label.

A model's counters then move at most once, from the common label to its own. A plain sum over the others would fall when
that happens, as it would when a model is removed. So each reading adds what every model has counted *since the previous
reading* to the label that the model has now: no counter ever falls, and nothing is lost or counted twice.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelquota.cluster.status import STATES
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit, LimitRecord, ViolationAction, ViolationType
from modelquota.reading.counting import DENIED, denied_by_action
from modelquota.reading.unmetered import unmetered_of
from modelquota.reading.utilization import LIMITS, Utilization, denying, limits_of, read_utilization

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelquota.cluster.status import Share
    from modelquota.reading.reader import QuotaReader

__all__ = ["DEFAULT_MAX_MODELS", "METRICS", "MODEL", "OTHERS", "Kind", "Metric", "MetricSource", "Reading"]

DEFAULT_MAX_MODELS: Final = 100
"""How many models have a label of their own by default."""

OTHERS: Final = "(others)"
"""The label of all models without a label of their own; a model with this exact name is always among them."""

MODEL: Final = "model"
"""Name of the label that holds the model's id."""

_MB = 2**20


class Kind(Enum):
    """What a metric measures, which decides how its values are combined over models."""

    TOTAL = "counter over all models, removed and unknown ones too"
    STATE = "gauge of the manager"
    EVENTS = "counter of this process, by a label whose values come up as it runs"
    SHARE = "gauge of a model's limits that hosts share; the others have none, since limits do not add up"
    COUNTER = "counter of a model"
    USE = "gauge of a model; those of the others are summed"
    LIMIT = "gauge of a model; the others have none, since limits of different models do not add up"
    PRESSURE = "gauge of a model; for the others, the highest of the models that deny"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric. Its name has dots, as in OpenTelemetry; Prometheus gets underscores and the unit as a suffix.

    `series` maps the values of `labels` (besides the model) to the fields whose sum is the metric's value; a metric
    whose fields are not known has no value, as those of a cluster without one.
    """

    name: str
    kind: Kind
    unit: str  # in UCUM: "By" for bytes, "1" for a ratio, "{request}" for things counted
    help: str
    series: Mapping[tuple[str, ...], tuple[str, ...]]
    labels: tuple[str, ...] = ()
    scale: float = 1

    @property
    def is_counter(self) -> bool:
        """True if the value never falls."""
        return self.kind in (Kind.TOTAL, Kind.EVENTS, Kind.COUNTER)

    @property
    def of_model(self) -> bool:
        """True if there is a value for each model."""
        return self.kind not in (Kind.TOTAL, Kind.STATE, Kind.EVENTS)

    @property
    def of_cluster(self) -> bool:
        """True if it is exported for a manager in a cluster only."""
        return self.name.startswith("modelquota.cluster.")


def _one(*fields: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {(): fields}


def _windows(unit: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {(window,): limit.usage_fields for window, limit in _of_windows(unit)}


def _window_limits(unit: str) -> dict[tuple[str, ...], tuple[str, ...]]:
    return {(window,): (_name(limit.limit),) for window, limit in _of_windows(unit)}


def _of_windows(unit: str) -> list[tuple[str, LimitRecord]]:
    return [(limit.window.name, limit) for limit in CATALOGUE.values() if limit.window and limit.unit == unit]


def _name(limit: Limit) -> str:
    return limit.name.lower()


_DENIED: dict[tuple[str, ...], str] = {
    (ViolationAction.REJECT.value,): "rejected",
    (ViolationAction.THROTTLE.value,): "throttled",
    (ViolationAction.QUEUE.value,): "queued",
}
_VIOLATED: dict[tuple[str, ...], str] = {
    (kind.value,): f"{kind.value.removesuffix('_limit')}_violations" for kind in ViolationType
}
_DENIALS = {key: (f"{field}_denied",) for key, field in _DENIED.items()}
_VIOLATIONS = {key: (field,) for key, field in _VIOLATED.items()}
_REQUEST, _TOKEN, _BYTE, _MODEL_UNIT = "{request}", "{token}", "By", "{model}"

# fmt: off
METRICS: Final = (
    Metric("modelquota.checks", Kind.TOTAL, _REQUEST, "Requests checked.", _one("total_checks")),
    Metric("modelquota.admitted", Kind.TOTAL, _REQUEST, "Requests admitted.", _one("allowed_requests")),
    Metric("modelquota.warned", Kind.TOTAL, _REQUEST, "Requests admitted in spite of a violation.",
           _one("warned_requests")),
    Metric("modelquota.waited", Kind.TOTAL, _REQUEST, "Requests admitted after a wait.", _one("waited_requests")),
    Metric("modelquota.denied", Kind.TOTAL, _REQUEST, "Requests denied for good, by the action applied.",
           _DENIALS, ("action",)),
    Metric("modelquota.violations", Kind.TOTAL, _REQUEST, "Requests that violated a limit, by its class.",
           _VIOLATIONS, ("type",)),
    Metric("modelquota.http.unmetered", Kind.EVENTS, _REQUEST, "Requests over HTTP that no quota counted, by path.",
           _one("unmetered"), ("path",)),
    Metric("modelquota.models", Kind.STATE, _MODEL_UNIT, "Models that have a quota.", _one("models")),
    Metric("modelquota.enforcing", Kind.STATE, "", "0 while everything is admitted, otherwise 1.", _one("enforcing")),
    Metric("modelquota.pressure", Kind.STATE, "1", "Highest use of a limit that denies, over all models; 1 is full.",
           _one("pressure")),
    Metric("modelquota.cluster.state", Kind.STATE, "", "1 for the state of this host in its cluster, 0 for the others.",
           {(state,): (f"cluster_{state}",) for state in STATES}, ("state",)),
    Metric("modelquota.cluster.lease", Kind.STATE, "s", "What is left of this host's lease.", _one("cluster_lease")),
    Metric("modelquota.cluster.nodes", Kind.STATE, "{node}", "Live hosts of the cluster.", _one("cluster_nodes")),
    Metric("modelquota.cluster.renewal", Kind.STATE, "s", "How long the last exchange with the store took.",
           _one("cluster_renewal")),
    Metric("modelquota.cluster.renewals", Kind.EVENTS, "{request}", "Exchanges with the store, by outcome.",
           _one("cluster_renewals"), ("outcome",)),
    Metric("modelquota.cluster.starved", Kind.TOTAL, _REQUEST,
           "Requests denied for lack of share, while the limit may have had room.", _one("cluster_starved")),
    Metric("modelquota.cluster.share", Kind.SHARE, "", "What this host holds of a limit.", _one("share"), ("limit",)),
    Metric("modelquota.cluster.free", Kind.SHARE, "", "What is in no host's share, by the store's last answer.",
           _one("free"), ("limit",)),
    Metric("modelquota.cluster.ghosts", Kind.SHARE, "",
           "What hosts that are gone still hold, beyond what they had used.", _one("ghosts"), ("limit",)),
    Metric("modelquota.model.checks", Kind.COUNTER, _REQUEST, "Requests of the model checked.", _one("checks")),
    Metric("modelquota.model.admitted", Kind.COUNTER, _REQUEST, "Requests of the model admitted.",
           _one("allowed_total")),
    Metric("modelquota.model.warned", Kind.COUNTER, _REQUEST, "Requests of the model admitted in spite of a violation.",
           _one("warned_total")),
    Metric("modelquota.model.waited", Kind.COUNTER, _REQUEST, "Requests of the model admitted after a wait.",
           _one("waited_total")),
    Metric("modelquota.model.denied", Kind.COUNTER, _REQUEST,
           "Requests of the model denied for good, by the action applied.", _DENIALS, ("action",)),
    Metric("modelquota.model.violations", Kind.COUNTER, _REQUEST,
           "Requests of the model that violated a limit, by its class.", _VIOLATIONS, ("type",)),
    Metric("modelquota.model.tokens", Kind.COUNTER, _TOKEN, "Tokens charged to the model.", _one("tokens_total")),
    Metric("modelquota.model.tokens.refunded", Kind.COUNTER, _TOKEN, "Tokens given back of those charged.",
           _one("tokens_refunded_total")),
    Metric("modelquota.model.window.requests", Kind.USE, _REQUEST, "Requests admitted in the rolling window.",
           _windows("requests"), ("window",)),
    Metric("modelquota.model.window.requests.limit", Kind.LIMIT, _REQUEST,
           "Most requests of the rolling window, burst included.", _window_limits("requests"), ("window",)),
    Metric("modelquota.model.window.tokens", Kind.USE, _TOKEN, "Tokens admitted in the rolling window.",
           _windows("tokens"), ("window",)),
    Metric("modelquota.model.window.tokens.limit", Kind.LIMIT, _TOKEN,
           "Most tokens of the rolling window, burst included.", _window_limits("tokens"), ("window",)),
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
           _one("concurrency")),
    Metric("modelquota.model.queue.requests", Kind.USE, _REQUEST, "Requests that wait.", _one("queued_requests")),
    Metric("modelquota.model.queue.requests.limit", Kind.LIMIT, _REQUEST, "Most requests that may wait.",
           _one("queue")),
    Metric("modelquota.model.pressure", Kind.PRESSURE, "1", "Use of the limit that the model is nearest to; 1 is full.",
           _one("pressure")),
    Metric("modelquota.model.enforcing", Kind.LIMIT, "", "0 if no limit of the model denies, otherwise 1.",
           _one("enforcing")),
)
# fmt: on
"""Every metric, in the order in which they are exported; those of a cluster only if the manager is in one."""

_STEADY: Final = ("allowed_total", "rejected_total", "throttled_total", "queued_total", "waited_total", "warned_total",
                  *_VIOLATED.values(), "tokens_total", "tokens_refunded_total")  # fmt: skip
"""Counters of the core that never fall as long as the model is registered."""

_COUNTED: Final = (*_STEADY, "checks", *(f"{name}_denied" for name in DENIED))


def _limits(quota: ResourceQuotaConfig) -> dict[str, float | None]:
    """Return the value of each series of kind LIMIT; None if the limit is not set."""
    limits: dict[str, float | None] = dict(zip(map(_name, LIMITS), limits_of(quota), strict=True))
    return limits | {"enforcing": int(any(denying(quota)))}


def _cluster(manager: "QuotaReader") -> "tuple[dict[str, float], dict[str, int], list[Share]]":
    """Return what is known of the host's part in a cluster: facts, exchanges by outcome, and shares.

    All empty without a cluster. Of a host's processes one knows more than the state and the lease.
    """
    member = manager.cluster
    if member is None:
        return {}, {}, []
    status = member.status()
    facts = {f"cluster_{state}": float(state == status.state) for state in STATES}
    facts["cluster_lease"] = status.lease_seconds
    if status.leads:
        facts["cluster_nodes"] = status.nodes
        facts["cluster_renewal"] = status.renewal_seconds
        facts["cluster_starved"] = status.starved
    return facts, status.renewals, member.shares()


class Reading:
    """One reading of a manager, from which the values of every metric can be taken in any order."""

    def __init__(
        self,
        found: Utilization,
        facts: dict[str, float],
        events: dict[str, dict[str, int]],
        shares: "Sequence[Share]",
        shown: "NDArray[np.intp]",
        own: dict[str, Any],
        others: bool,
    ) -> None:
        self._facts = facts
        self._events = events
        quotas = [found.quotas[index] for index in shown]
        self._models = [quota.model_id for quota in quotas]
        self._limits = [_limits(quota) for quota in quotas]
        own_models = set(self._models)
        self._shares = [share for share in shares if share.model_id in own_models]
        self._others = others
        rest = np.setdiff1d(np.arange(len(found)), shown)
        self._columns: dict[str, list[float]] = {name: values.tolist() for name, values in own.items()}
        for name in found.counters.dtype.names or ():
            if name not in self._columns and name != "model_id":
                values = found.counters[name]
                self._columns[name] = [*values[shown].tolist(), *([int(values[rest].sum())] if others else [])]
        pressure = found.pressure / 100
        highest = float(pressure[rest][found.denies[rest]].max(initial=0.0))
        self._columns["pressure"] = [*pressure[shown].tolist(), *([highest] if others else [])]

    def samples(self, metric: Metric) -> Iterator[tuple[tuple[str, ...], float]]:
        """Yield the label values (the model's first) and the value of every series."""
        if metric.kind in (Kind.TOTAL, Kind.STATE):
            for labels, fields in metric.series.items():
                if all(field in self._facts for field in fields):
                    yield labels, sum(self._facts[field] for field in fields)
        elif metric.kind is Kind.EVENTS:
            for event, count in self._events[metric.series[()][0]].items():
                yield (event,), count
        elif metric.kind is Kind.SHARE:
            for share in self._shares:
                yield (share.model_id, share.limit), getattr(share, metric.series[()][0])
        elif metric.kind is Kind.LIMIT:
            for labels, (name,) in metric.series.items():
                for model_id, limits in zip(self._models, self._limits, strict=True):
                    limit = limits[name]
                    if limit is not None:
                        yield (model_id, *labels), limit * metric.scale
        else:
            models = [*self._models, OTHERS] if self._others else self._models
            for labels, fields in metric.series.items():
                for model_id, *values in zip(models, *(self._columns[field] for field in fields), strict=True):
                    yield (model_id, *labels), sum(values) * metric.scale


class MetricSource:
    """Reads a manager repeatedly, so that counters only grow; safe to call from several threads.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        The manager to measure.
    max_models : int
        How many models ever have a label of their own, 0 or more: those nearest to a limit while labels are left.

    Attributes
    ----------
    metrics : tuple of Metric
        Those that this manager has.
    """

    def __init__(self, manager: "QuotaReader", *, max_models: int = DEFAULT_MAX_MODELS) -> None:
        if max_models < 0:
            raise ValueError(f"max_models is {max_models}; give an integer, 0 or more")
        self.manager = manager
        self.max_models = max_models
        self.metrics = tuple(metric for metric in METRICS if manager.cluster is not None or not metric.of_cluster)
        self._lock = threading.Lock()
        self._labels: dict[str, int] = {}  # index in `_told` of each id that has ever had a label
        self._told = np.zeros((0, len(_COUNTED)), np.uint64)
        self._told_of_others = np.zeros(len(_COUNTED), np.uint64)
        self._told_denied = dict.fromkeys(DENIED, 0)
        self._places: dict[str, int] = {}  # index in `_seen` of each model of the last reading
        self._seen = np.zeros((0, len(_COUNTED)), np.uint64)
        self._lives = np.zeros(0, np.uint64)
        self._had_others = False

    def read(self) -> Reading:
        """Read all models, and bring the counters up to date."""
        with self._lock:
            retired = self.manager._read_retired()  # first: a model that is removed now is counted at the next reading
            found = read_utilization(self.manager)
            stats = self.manager.get_stats()
            facts: dict[str, float] = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
            facts |= {"models": len(found), "enforcing": int(self.manager.enforcement_enabled)}
            facts["pressure"] = found.highest / 100
            facts |= self._denied(found, retired)
            cluster, renewals, shares = _cluster(self.manager)
            shown = self._choose(found)
            own = self._count(found, shown)
            # once it exists, the common label stays: a metric system forgets a counter that disappears
            self._had_others = self._had_others or len(shown) < len(found)
            if self._had_others:
                own = {name: np.append(values, self._told_of_others[i]) for i, (name, values) in enumerate(own.items())}
            facts |= cluster
            events = {"unmetered": unmetered_of(self.manager).counts(), "cluster_renewals": renewals}
            return Reading(found, facts, events, shares, shown, own, self._had_others)

    def _choose(self, found: Utilization) -> "NDArray[np.intp]":
        """Assign the labels that are left, and return the indices of the models that have one."""
        ids = found.model_ids
        if len(self._labels) < self.max_models:
            for index in found.by_pressure().tolist():
                if ids[index] != OTHERS and len(self._labels) < self.max_models:
                    self._labels.setdefault(ids[index], len(self._labels))
            more = len(self._labels) - len(self._told)
            self._told = np.concatenate([self._told, np.zeros((more, len(_COUNTED)), np.uint64)])
        return np.array([index for index, model_id in enumerate(ids) if model_id in self._labels], np.intp)

    def _denied(self, found: Utilization, retired: dict[str, int]) -> dict[str, float]:
        """Final denials over all models, by action: registered models one by one, removed models as a sum."""
        living, removed = denied_by_action(found.counters), denied_by_action({**retired, "waiting_requests": 0})
        for name in DENIED:
            # it can be lower for a moment, between the start of a wait and its publication
            now = int(living[name].sum()) + int(removed[name])
            self._told_denied[name] = max(self._told_denied[name], now)
        return {f"{name}_denied": count for name, count in self._told_denied.items()}

    def _count(self, found: Utilization, shown: "NDArray[np.intp]") -> dict[str, Any]:
        """Add what was counted since the last reading to each model's label, or to that of the others."""
        ids, counters = found.model_ids, found.counters
        columns = {name: counters[name].astype(np.uint64) for name in _STEADY}
        stopped = columns["rejected_total"] + columns["throttled_total"] + columns["queued_total"]
        columns["checks"] = columns["allowed_total"] + stopped - columns["waited_total"]
        for name, count in denied_by_action(counters).items():
            columns[f"{name}_denied"] = np.maximum(count, 0).astype(np.uint64)
        seen = np.stack([columns[name] for name in _COUNTED], axis=1)
        before = np.zeros_like(seen)
        places = np.array([self._places.get(model_id, -1) for model_id in ids], np.intp)
        known = places >= 0
        before[known] = self._seen[places[known]]
        # a model that was removed and registered again has begun at 0
        before[known] *= (self._lives[places[known]] == found.lives[known])[:, None]
        seen = np.maximum(seen, before)
        more = seen - before
        own = np.array([self._labels[ids[index]] for index in shown], np.intp)
        self._told[own] += more[shown]
        self._told_of_others = self._told_of_others + more.sum(axis=0) - more[shown].sum(axis=0)
        self._places = {model_id: place for place, model_id in enumerate(ids)}
        self._seen, self._lives = seen, found.lives
        return {name: self._told[own, column] for column, name in enumerate(_COUNTED)}
