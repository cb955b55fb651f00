"""What the page shows, as plain values: quotas once for each kind, and use by model with its meters below it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from modelquota.quota.limits import DENYING, LimitRecord, ViolationAction, ViolationType
from modelquota.reading.counting import denied
from modelquota.reading.unmetered import unmetered_of
from modelquota.reading.utilization import LIMITS, Utilization, denying, read_utilization

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from modelquota.cluster.member import Member
    from modelquota.manager import ResourceQuotaManager
    from modelquota.quota.config import ResourceQuotaConfig

MOST_SHOWN: Final = 2_000
"""Most ids in one answer: those with the most waiting requests, denials and use, whole models with their meters."""

_ORDER: Final = sorted(DENYING, key=lambda record: record.unit == "MB")
"""The order in which limits are shown: memory last."""

_COUNTS: Final = {
    "serving": "concurrent_requests",
    "waiting": "queued_requests",
    "admitted": "allowed_total",
    "waited": "waited_total",
    "warned": "warned_total",
    "tokens_charged": "tokens_total",
    "tokens_refunded": "tokens_refunded_total",
}

_LIMITS_OF_SHARES: Final = {record.quota_field.removeprefix("max_"): record.limit.name.lower() for record in DENYING}
"""The names of limits on the page, by those in shares."""

_VIOLATIONS: Final = {kind.value: kind.value.replace("_limit", "_violations") for kind in ViolationType}


def page_state(manager: ResourceQuotaManager, admin: str | None = None, *, find: str = "") -> dict[str, Any]:
    """Return what the page shows, as plain values for JSON.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager to read.
    admin : str, optional
        Where the admin API is, as `QuotaPage` takes it.
    find : str
        Only models are returned that have this text in their id or in that of one of their meters; case does not
        matter. Totals are of all models.

    Returns
    -------
    dict
        ``kinds`` has each distinct quota of these models once. ``models`` is in the order of the manager; ``kind`` is
        an index into ``kinds``, and ``limits`` has ``[used, left, percent]`` for each limit of that kind, and for a
        rate with a burst also how much of the burst is used. ``cluster`` is None without one; in it, ``shares`` of a
        model has for limits that hosts share ``[share, free, ghosts]``, see `modelquota.cluster`. What a model is asked
        for, its meters are asked for too: they are in ``meters`` of their model, and do not count again in the totals.
    """
    found, stats = read_utilization(manager), manager.get_stats()
    refused = np.maximum(denied(found.counters), 0)
    families = _families(found.model_ids, find.strip().lower())
    order = _by_attention(found, refused)
    shown = _most_urgent(families, order)
    indices = [index for family in shown for index in family]
    kinds, kind_of = np.unique(found.quotas.kind_of[indices], return_inverse=True)
    rows = _rows(found, refused, indices, kind_of.tolist())
    member = manager.cluster
    shares = {} if member is None else _shares(member)
    for row in rows.values():
        if row["id"] in shares:
            row["shares"] = shares[row["id"]]
    models = []
    for family in shown:
        head, *meters = [rows[index] for index in family]
        if "#" in head["id"]:  # the model of these meters has no quota
            head, meters = {"id": head["id"].partition("#")[0], "kind": None}, [head, *meters]
        models.append({**head, "meters": meters})
    counters = found.counters
    is_meter = np.array(["#" in model_id for model_id in found.model_ids], bool)
    of_meters = {name: int(counters[field][is_meter].sum()) for name, field in _COUNTS.items()}
    return {
        "models": models,
        "kinds": [_kind_state(found.quotas.kinds[kind], manager.enforcement_enabled) for kind in kinds.tolist()],
        "models_found": len(families),
        "models_total": len(found) - int(is_meter.sum()),
        "enforcing": manager.enforcement_enabled,
        "pressure": round(found.highest, 3),
        "checks": stats.total_checks - of_meters["admitted"],
        "admitted": stats.allowed_requests - of_meters["admitted"],
        "waited": stats.waited_requests,
        "warned": stats.warned_requests,
        "waiting": int(counters["queued_requests"].sum()) - of_meters["waiting"],
        "serving": int(counters["concurrent_requests"].sum()) - of_meters["serving"],
        "refused": stats.denied_requests,
        "tokens_charged": stats.tokens_charged - of_meters["tokens_charged"],
        "tokens_refunded": stats.tokens_refunded - of_meters["tokens_refunded"],
        "unmetered": unmetered_of(manager).counts(),
        "cluster": None if member is None else _cluster_state(member),
        "admin": admin,
    }


def _cluster_state(member: Member) -> dict[str, Any]:
    status = member.status()
    return {
        "state": status.state,
        "leads": status.leads,
        "lease_seconds": round(status.lease_seconds, 1),
        "learning_seconds": round(status.learning_seconds, 1),
        "nodes": status.nodes,
        "starved": status.starved,
        "error": None if status.error is None else status.error.kind,
    }


def _shares(member: Member) -> dict[str, dict[str, list[float]]]:
    """Return what this host holds, what nobody does, and what hosts that are gone do, by model and limit."""
    found: dict[str, dict[str, list[float]]] = {}
    for share in member.shares():
        name = _LIMITS_OF_SHARES.get(share.limit)
        if name is not None:  # how far a model may be ahead of its rate is shown with the rate
            found.setdefault(share.model_id, {})[name] = [share.share, share.free, share.ghosts]
    return found


def _families(model_ids: Sequence[str], wanted: str) -> list[list[int]]:
    """Return the indices of each model and its meters, the model first, for the families with `wanted` in an id."""
    families: dict[str, list[int]] = {}
    found = set()
    for index, model_id in enumerate(model_ids):
        model = model_id.partition("#")[0]
        families.setdefault(model, []).append(index)
        if wanted in model_id.lower():
            found.add(model)
    return [
        sorted(family, key=lambda index: "#" in model_ids[index]) if len(family) > 1 else family
        for model, family in families.items()
        if model in found
    ]


def _by_attention(found: Utilization, refused: NDArray[np.int64]) -> list[int]:
    """Return the place of each id in the order of need: waiting, refused, use; ids that deny nothing come last."""
    order = np.lexsort((found.pressure, refused, found.counters["queued_requests"], found.denies))[::-1]
    places = np.empty(len(found), np.int64)
    places[order] = np.arange(len(found))
    return list(places.tolist())


def _most_urgent(families: list[list[int]], places: list[int]) -> list[list[int]]:
    """Return the families that need attention most, in their own order, with at most `MOST_SHOWN` ids together."""
    if sum(map(len, families)) <= MOST_SHOWN:
        return families
    kept, room = set(), MOST_SHOWN
    for family in sorted(families, key=lambda family: min(places[index] for index in family)):
        room -= len(family)
        if room < 0:
            break
        kept.add(family[0])
    return [family for family in families if family[0] in kept]


def _shown(quota: ResourceQuotaConfig) -> list[LimitRecord]:
    return [record for record in _ORDER if getattr(quota, record.quota_field) is not None]


def _kind_state(quota: ResourceQuotaConfig, enforcing: bool) -> dict[str, Any]:
    denies = dict(zip(LIMITS, denying(quota), strict=True))
    return {
        "action": quota.on_violation.value,
        "denies": any(denies.values()),
        "unit": quota.unit,
        "queue": quota.max_queued_requests,
        "limits": [_limit_state(record, quota, enforcing and denies[record.limit]) for record in _shown(quota)],
    }


def _limit_state(record: LimitRecord, quota: ResourceQuotaConfig, denies: bool) -> dict[str, Any]:
    money = quota.unit == "usd" and record.unit == "tokens"
    label = record.label.replace("tokens", "dollars") if money else record.label
    # What is full refuses a request that does not wait, or not long enough. Memory refuses only requests that ask for
    # some, so it is told by what it has refused.
    waits = quota.on_violation is not ViolationAction.REJECT and (
        record.window is None or record.window.seconds <= quota.grace_period_sec
    )
    return {
        "name": record.limit.name.lower(),
        "label": label[0].upper() + label[1:],
        "unit": "usd" if money else record.unit,
        "max": getattr(quota, record.quota_field),
        "burst": getattr(quota, record.burst_field) if record.is_rate else 0,
        "violation": record.violation_type,
        "denies": denies,
        "refuses_when_full": denies and not waits and record.unit != "MB",
    }


def _rows(
    found: Utilization, refused: NDArray[np.int64], indices: list[int], kind_of: list[int]
) -> dict[int, dict[str, Any]]:
    """Return what is shown of each of these ids, by its index; `kind_of` has the number of its kind."""
    counters = found.counters
    columns: dict[str, list[Any]] = {name: counters[field][indices].tolist() for name, field in _COUNTS.items()}
    columns["refused"] = refused[indices].tolist()
    columns["pressure"] = found.pressure[indices].round(2).tolist()
    violations = {kind: counters[field][indices].tolist() for kind, field in _VIOLATIONS.items()}
    violated = counters["total_violations"][indices].tolist()
    ahead = {record.limit: counters[record.ahead_field][indices].tolist() for record in _ORDER if record.is_rate}
    uses, left = found.uses[indices].tolist(), found.left[indices].tolist()
    percent = found.percent[indices].round(2).tolist()
    shown = [[(LIMITS.index(record.limit), record) for record in _shown(kind)] for kind in found.quotas.kinds]
    names, rows = tuple(columns), {}
    for place, (index, counts) in enumerate(zip(indices, zip(*columns.values(), strict=True), strict=True)):
        quota = found.quotas.kinds[kind := found.quotas.kind_of[index]]
        limits = []
        for column, record in shown[kind]:
            most = getattr(quota, record.quota_field)
            full = percent[place][column] if most else 100.0
            limits.append([uses[place][column], left[place][column], full])
            if record.is_rate and getattr(quota, record.burst_field):
                limits[-1].append(ahead[record.limit][place])
        rows[index] = {
            "id": found.model_ids[index],
            "kind": kind_of[place],
            **dict(zip(names, counts, strict=True)),
            "violations": {},
            "limits": limits,
        }
        if violated[place]:
            rows[index]["violations"] = {name: column[place] for name, column in violations.items() if column[place]}
    return rows
