"""Header fields that report how much of each limit is left: OpenAI's, Anthropic's, and IETF's ``RateLimit``.

The last follow draft-ietf-httpapi-ratelimit-headers: structured fields, lists of strings with parameters. Every
response has them, so what depends on a quota only is made once for each quota.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from modelquota._core.state.packing import bounds_of as core_bounds
from modelquota._core.table.left import read_left
from modelquota._core.table.result import QuotaCheckResult
from modelquota.asgi.types import Header
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import DENYING, Limit, LimitRecord

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

HeaderStyle: TypeAlias = Literal["all", "openai", "none"]

MOST: Final = 10**15 - 1
"""The largest integer of a structured field."""

_SLOTS: Final = 60  # the capacity of a window returns late by at most this part of it
_MOST_PLANS: Final = 4096
_NAMES: Final = {limit: limit.label.replace(" ", "-").lower() for limit in Limit}
# Reported to clients: RAM and SSD space are the server's.
_TOLD: Final = tuple(record for record in DENYING if record.unit != "MB")
_QUOTA_UNITS: Final = {Limit.CONCURRENCY: ';qu="concurrent-requests"'} | {
    record.limit: ';qu="tokens"' for record in _TOLD if record.unit == "tokens"
}
_UNITS: Final = ("requests", "tokens")


class Bound:
    """What one limit of a model contributes to the headers, as far as it is the same for every request.

    Attributes
    ----------
    limit : Limit
    most : int
        The amount that can be used at once if nothing has been used.
    window_s : int
        The number of seconds in which `most` comes back; 0 if it comes back when requests end.
    unit : int
        0 if it counts requests in time, 1 if tokens, -1 otherwise.
    rate : float
        Per second; 0.0 for limits that are not rates.
    """

    __slots__ = ("is_rate", "limit", "most", "rate", "shown_most", "unit", "used_reset_ms", "window_s")

    def __init__(self, record: LimitRecord, most: int, quota: ResourceQuotaConfig) -> None:
        self.limit = record.limit
        self.most = most
        self.shown_most = b"%d" % min(most, MOST)
        self.unit = -1 if record.window is None else _UNITS.index(record.unit)
        self.window_s = 0 if record.window is None else record.window.seconds
        self.is_rate = record.is_rate
        self.rate = getattr(quota, record.quota_field) if record.is_rate else 0.0
        self.used_reset_ms = (self.window_s + self.window_s // _SLOTS) * 1000
        if record.is_rate:
            self.window_s = max(_whole(most / self.rate), 1) if self.rate else 1

    def reset_ms(self, left: int, ahead: tuple[int, int]) -> int:
        """Return the milliseconds until none of it is in use, at the latest, if nothing else is admitted."""
        if not self.is_rate:
            return self.used_reset_ms if left < self.most else 0
        if left >= self.most and not ahead[self.unit]:
            return 0
        return _whole(1000 * (ahead[self.unit] + max(self.rate, 1.0)) / self.rate) if self.rate else 0


class Plan:
    """The part of a model's headers that depends on its quota only.

    Attributes
    ----------
    bounds : tuple of Bound
        In the order in which the limits are checked.
    policy : bytes
        The value of ``RateLimit-Policy``.
    state : bytes
        The value of ``RateLimit``, with a %d for each limit.
    """

    __slots__ = ("bounds", "codes", "policy", "state", "units")

    def __init__(self, bounds: Sequence[Bound]) -> None:
        self.bounds = tuple(bounds)
        self.codes = tuple([int(bound.limit) for bound in bounds])
        self.units = [tuple([bound for bound in bounds if bound.unit == unit]) for unit in range(len(_UNITS))]
        self.policy = ", ".join(map(_policy, bounds)).encode()
        self.state = ", ".join(f'"{_NAMES[bound.limit]}";r=%d' for bound in bounds).encode()


def bounds_of(quota: ResourceQuotaConfig) -> list[Bound]:
    """Return the limits of a model on requests and tokens, in the order in which they are checked."""
    _, at_once = core_bounds(quota)
    return [Bound(record, most, quota) for record in _TOLD if (most := at_once[record.limit]) is not None]


def _policy(bound: Bound) -> str:
    window = f";w={min(bound.window_s, MOST)}" if bound.window_s else ""
    return f'"{_NAMES[bound.limit]}";q={min(bound.most, MOST)}{_QUOTA_UNITS.get(bound.limit, "")}{window}'


_EMPTY: Final = Plan(())


def _whole(value: float) -> int:
    """Round up, and limit to the largest integer that a field can hold."""
    return math.ceil(min(value, MOST))


class LimitHeaders:
    """Makes the headers of responses.

    Parameters
    ----------
    manager : ResourceQuotaManager
    mode : str
        ``"all"``: those of the client's protocol, and the IETF's; ``"openai"``: only ``x-ratelimit-*``; ``"none"``.
    """

    def __init__(self, manager: ResourceQuotaManager, mode: HeaderStyle = "all") -> None:
        if mode not in ("all", "openai", "none"):
            raise ValueError(f"headers is {mode!r}; accepted are 'all', 'openai' and 'none'")
        self._manager = manager
        self._mode = mode
        self._plans: dict[bytes, Plan] = {}

    def of(self, ids: str | tuple[str, ...], style: str, denial: QuotaCheckResult | None = None) -> list[Header]:
        """Return the header fields that report what is left, for one id or several that decide together.

        For each kind of limit, the one with the least left is reported. ``x-ratelimit-*`` and
        ``anthropic-ratelimit-*`` have room for one limit on requests and one on tokens: the one that denied, or the one
        with the least left. ``RateLimit-Policy`` and ``RateLimit`` list all. After a denial both report the time until
        the request would be admitted; otherwise the reset is the time until nothing is in use, at the latest.
        """
        if self._mode == "none":
            return []
        if isinstance(ids, str):
            read = read_left(self._manager, ids)
            if read is None:
                return []
            plan = self._plans.get(read[0]) or self._new_plan(ids, read[0])
            left: tuple[int, ...] | dict[int, int] = read[1]
            ahead = read[2]
            aheads = None
        else:
            plan, left, aheads = self._tightest(ids)
            ahead = (0, 0)
        if not plan.bounds:
            return []
        headers: list[Header] = []
        for unit, bounds in enumerate(plan.units):
            if bounds:
                self._add(headers, unit, bounds, left, ahead, aheads, style, denial)
        if self._mode == "all":
            shown = tuple([left[code] if left[code] < MOST else MOST for code in plan.codes])
            headers.append((b"ratelimit-policy", plan.policy))
            headers.append((b"ratelimit", _state(plan, denial) % shown))
        return headers

    def _new_plan(self, model_id: str, limits: bytes) -> Plan:
        quota = self._manager.get_quota(model_id)
        plan = _EMPTY if quota is None else Plan(bounds_of(quota))
        again = read_left(self._manager, model_id)
        if again is not None and again[0] == limits:  # unless the quota has changed in between
            if len(self._plans) >= _MOST_PLANS:
                self._plans.clear()
            self._plans[limits] = plan
        return plan

    def _tightest(self, ids: tuple[str, ...]) -> tuple[Plan, dict[int, int], dict[int, tuple[int, int]]]:
        found: dict[Limit, Bound] = {}
        left: dict[int, int] = {}
        aheads: dict[int, tuple[int, int]] = {}
        for model_id in ids:
            read = read_left(self._manager, model_id)
            if read is None:
                continue
            limits, of_model, ahead = read
            for bound in (self._plans.get(limits) or self._new_plan(model_id, limits)).bounds:
                code = int(bound.limit)
                if code not in left or of_model[code] < left[code]:
                    found[bound.limit], left[code], aheads[code] = bound, of_model[code], ahead
        return Plan([found[limit] for limit in sorted(found)]), left, aheads

    def _add(
        self,
        headers: list[Header],
        unit: int,
        bounds: tuple[Bound, ...],
        left: tuple[int, ...] | dict[int, int],
        ahead: tuple[int, int],
        aheads: dict[int, tuple[int, int]] | None,
        style: str,
        denial: QuotaCheckResult | None,
    ) -> None:
        """Add the three headers on requests, or on tokens."""
        shown = bounds[0]
        least = left[shown.limit]
        for bound in bounds:
            if left[bound.limit] < least:
                shown, least = bound, left[bound.limit]
        reset_ms = None
        if denial is not None and denial.retry_after_ms is not None:
            for bound in bounds:
                if bound.limit is denial.limit:
                    shown, least, reset_ms = bound, left[bound.limit], denial.retry_after_ms
        if reset_ms is None:
            reset_ms = shown.reset_ms(least, ahead if aheads is None else aheads[shown.limit])
        names = _ANTHROPIC[unit] if style == "anthropic" and self._mode == "all" else _OPENAI[unit]
        reset = timestamp(reset_ms) if names is _ANTHROPIC[unit] else go_duration(reset_ms).encode()
        headers.append((names[0], shown.shown_most))
        headers.append((names[1], b"%d" % (least if 0 <= least < MOST else min(max(least, 0), MOST))))
        headers.append((names[2], reset))


_PARTS: Final = ("limit", "remaining", "reset")
_OPENAI: Final = [tuple([f"x-ratelimit-{part}-{unit}".encode() for part in _PARTS]) for unit in _UNITS]
_ANTHROPIC: Final = [tuple([f"anthropic-ratelimit-{unit}-{part}".encode() for part in _PARTS]) for unit in _UNITS]
OURS: Final = frozenset(
    [name for names in (*_OPENAI, *_ANTHROPIC) for name in names] + [b"ratelimit", b"ratelimit-policy"]
)
"""Names of all these headers."""


def _state(plan: Plan, denial: QuotaCheckResult | None) -> bytes:
    if denial is None or denial.limit is None or denial.retry_after_ms is None:
        return plan.state
    item = f'"{_NAMES[denial.limit]}";r=%d'.encode()
    return plan.state.replace(item, b"%b;t=%d" % (item, min(-(-denial.retry_after_ms // 1000), MOST)))


def replaced(headers: Sequence[Header], ours: list[Header]) -> list[Header]:
    """The headers, with ours in place of any of the same name: the application may have limits of its own."""
    if not ours:
        return list(headers)
    kept = [header for header in headers if header[0].lower() not in OURS]
    kept += ours
    return kept


def timestamp(ms: int) -> bytes:
    """Return the time that many milliseconds from now, as Anthropic's headers do: RFC 3339, in seconds, rounded up."""
    at = min(math.ceil(time.time() + ms / 1000), 253_402_300_799)  # the last second of the year 9999
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)).encode()


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


def most_tokens_at_once(quota: ResourceQuotaConfig) -> int | None:
    """Return the most tokens that one request may have under any limit that denies; None if there is no such limit."""
    _, at_once = core_bounds(quota)
    shadows = set(quota.shadow_limits)
    most: int | None = None
    for record in DENYING:
        bound = at_once[record.limit]
        if record.unit == "tokens" and bound is not None and record.limit.name.lower() not in shadows:
            most = bound if most is None else min(most, bound)
    return most
