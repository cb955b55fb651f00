"""Header fields that report how much of each limit is left: OpenAI's ``x-ratelimit-*``, and IETF's ``RateLimit``.

The latter follow draft-ietf-httpapi-ratelimit-headers: structured fields, lists of strings with parameters.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from modelquota._core.state.packing import bounds_of as core_bounds
from modelquota._core.table.result import QuotaCheckResult
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import DENYING, Limit, LimitRecord
from modelquota.reading.report import ModelReport, ResourceUsage

Header = tuple[bytes, bytes]

MOST: Final = 10**15 - 1
"""The largest integer of a structured field."""

_SLOTS = 60  # the capacity of a window returns late by at most this part of it
_NAMES = {limit: limit.label.replace(" ", "-").lower() for limit in Limit}
_LEFT = operator.itemgetter(1)
_TOLD = tuple(record for record in DENYING if record.unit != "MB")  # reported to clients: RAM and SSD are the server's
_UNITS = tuple(
    (unit.encode(), tuple(record.limit for record in _TOLD if record.window is not None and record.unit == unit))
    for unit in ("requests", "tokens")
)
_QUOTA_UNITS = {Limit.CONCURRENCY: ';qu="concurrent-requests"'} | {
    record.limit: ';qu="tokens"' for record in _TOLD if record.unit == "tokens"
}


class Bound(NamedTuple):
    """What one limit of a model contributes to the headers, as far as it is the same for every request.

    Attributes
    ----------
    limit : Limit
        The limit.
    most : int
        The amount that can be used at once if nothing has been used.
    window_s : int
        The number of seconds in which `most` comes back; 0 if it comes back when requests end.
    used : str
        The field of `ResourceUsage` that counts against it.
    ahead : str
        For a rate, the field for how far the model has run ahead of it; empty otherwise.
    rate : float
        Per second; 0.0 for other limits.
    """

    limit: Limit
    most: int
    window_s: int
    used: str
    ahead: str = ""
    rate: float = 0.0

    def reset_ms(self, usage: ResourceUsage) -> int:
        """Return the milliseconds until none of it is in use, at the latest, if nothing else is admitted."""
        used: int = getattr(usage, self.used)
        ahead: int = getattr(usage, self.ahead) if self.ahead else 0
        if not used and not ahead:
            return 0
        if not self.ahead:
            return (self.window_s + self.window_s // _SLOTS) * 1000
        return _whole(1000 * (ahead + max(self.rate, 1.0)) / self.rate) if self.rate else 0


class Plan(NamedTuple):
    """The part of a model's headers that depends on its quota only; made once for each quota."""

    bounds: tuple[Bound, ...]
    policy: bytes
    """The value of ``RateLimit-Policy``."""
    state: str
    """The value of ``RateLimit``, with a %d for each limit."""


Standing = tuple[Bound, int, ResourceUsage]
"""A limit, what is left of it, and the usage from which that was read."""


def bounds_of(quota: ResourceQuotaConfig) -> list[Bound]:
    """Return the limits of a model on requests and tokens, in the order in which they are checked."""
    _, at_once = core_bounds(quota)
    return [_bound(record, most, quota) for record in _TOLD if (most := at_once[record.limit]) is not None]


def _bound(record: LimitRecord, most: int, quota: ResourceQuotaConfig) -> Bound:
    window_s = 0 if record.window is None else record.window.seconds
    (used,) = record.usage_fields
    if not record.is_rate:
        return Bound(record.limit, most, window_s, used)
    rate: float = getattr(quota, record.quota_field)
    window_s = max(_whole(most / rate), 1) if rate else 1
    return Bound(record.limit, most, window_s, used, record.ahead_field, rate)


@functools.lru_cache(maxsize=4096)
def plan_of(quota: ResourceQuotaConfig) -> Plan:
    """Return the plan for a single model."""
    return _plan(tuple(bounds_of(quota)))


def _plan(bounds: tuple[Bound, ...]) -> Plan:
    policies = []
    for bound in bounds:
        window = f";w={min(bound.window_s, MOST)}" if bound.window_s else ""
        policies.append(f'"{_NAMES[bound.limit]}";q={min(bound.most, MOST)}{_QUOTA_UNITS.get(bound.limit, "")}{window}')
    state = ", ".join(f'"{_NAMES[bound.limit]}";r=%d' for bound in bounds)
    return Plan(bounds, ", ".join(policies).encode(), state)


def _whole(value: float) -> int:
    """Round up, and limit to the largest integer that a field can hold."""
    return math.ceil(min(value, MOST))


def limit_headers(reports: Sequence[ModelReport], denial: QuotaCheckResult | None = None) -> list[Header]:
    """Return the header fields that report how much is left, for one model or several that decide together.

    For each kind of limit, the one with the least left is reported. ``x-ratelimit-*`` have room for one limit on
    requests and one on tokens: the one that denied, or the one with the least left. ``RateLimit-Policy`` and
    ``RateLimit`` list all. After a denial both report the time until the request would be admitted; otherwise
    ``x-ratelimit-reset-*`` is the time until nothing is in use, at the latest.
    """
    if not reports:
        return []
    if len(reports) == 1:
        usage = reports[0].usage
        plan = plan_of(reports[0].quota)
        standings = [(bound, usage.left[bound.limit] or 0, usage) for bound in plan.bounds]
    else:
        standings = _tightest(reports)
        plan = _plan(tuple(bound for bound, _, _ in standings))
    if not standings:
        return []
    headers: list[Header] = []
    for unit, kinds in _UNITS:
        shown = [standing for standing in standings if standing[0].limit in kinds]
        if shown:
            headers += _of_unit(unit, shown, denial)
    headers.append((b"ratelimit-policy", plan.policy))
    headers.append((b"ratelimit", _state(plan, standings, denial)))
    return headers


def _tightest(reports: Iterable[ModelReport]) -> list[Standing]:
    found: dict[Limit, Standing] = {}
    for report in reports:
        for bound in plan_of(report.quota).bounds:
            left = report.usage.left[bound.limit] or 0
            known = found.get(bound.limit)
            if known is None or left < known[1]:
                found[bound.limit] = bound, left, report.usage
    return [found[limit] for limit in sorted(found)]


def _of_unit(unit: bytes, shown: list[Standing], denial: QuotaCheckResult | None) -> tuple[Header, Header, Header]:
    """The three headers of OpenAI's API on requests, or on tokens."""
    bound, left, usage = min(shown, key=_LEFT)
    reset_ms = None
    if denial is not None and denial.retry_after_ms is not None:
        for standing in shown:
            if standing[0].limit is denial.limit:
                bound, left, usage = standing
                reset_ms = denial.retry_after_ms
    if reset_ms is None:
        reset_ms = bound.reset_ms(usage)
    return (
        (b"x-ratelimit-limit-" + unit, b"%d" % min(bound.most, MOST)),
        (b"x-ratelimit-remaining-" + unit, b"%d" % min(left, MOST)),
        (b"x-ratelimit-reset-" + unit, go_duration(reset_ms).encode()),
    )


def _state(plan: Plan, standings: Sequence[Standing], denial: QuotaCheckResult | None) -> bytes:
    state = plan.state
    if denial is not None and denial.limit is not None and denial.retry_after_ms is not None:
        item = f'"{_NAMES[denial.limit]}";r=%d'
        state = state.replace(item, f"{item};t={min(-(-denial.retry_after_ms // 1000), MOST)}")
    return (state % tuple([left if left < MOST else MOST for _, left, _ in standings])).encode()


def go_duration(ms: int) -> str:
    """Format a time as in OpenAI's headers, which is how Go writes durations.

    Examples
    --------
    >>> go_duration(0), go_duration(12), go_duration(8640), go_duration(360_000)
    ('0s', '12ms', '8.64s', '6m0s')
    """
    if 0 < ms < 1000:
        return f"{ms}ms"
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{ms:03}".rstrip("0") if ms else ""
    prefix = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
    return f"{prefix}{seconds}{fraction}s"


def exceeded_by(quota: ResourceQuotaConfig, tokens: int, ram_mb: int, ssd_mb: int) -> Limit | None:
    """Return the first limit that a request exceeds by itself; None if it exceeds none."""
    asked = {Limit.RAM: ram_mb, Limit.SSD: ssd_mb}
    _, at_once = core_bounds(quota)
    for record in DENYING:
        most = at_once[record.limit]
        if most is not None and asked.get(record.limit, tokens if record.unit == "tokens" else 1) > most:
            return record.limit
    return None
