"""Header fields that report how much of each limit is left: OpenAI's, Anthropic's, and IETF's ``RateLimit``.

The last follow draft-ietf-httpapi-ratelimit-headers: structured fields, lists of strings with parameters. Every
response has them, so what depends on a quota only is made once for each quota.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from modelquota._core.state.packing import bounds_of as core_bounds
from modelquota._core.table.left import LimitPlan, limit_fields, read_left
from modelquota._core.table.result import QuotaCheckResult
from modelquota.asgi.types import Header
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import DENYING, Limit, LimitRecord
from modelquota.quota.tokens import TokenCount, counted

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
    reset_ms : float
        Milliseconds until none of it is in use, at the latest, if some is.
    per_ahead_ms : float
        For a rate, how much longer for each request or token that the model is ahead of it; 0.0 for other limits.
    """

    __slots__ = ("limit", "most", "per_ahead_ms", "reset_ms", "unit", "window_s")

    def __init__(self, record: LimitRecord, most: int, quota: ResourceQuotaConfig) -> None:
        self.limit = record.limit
        self.most = most
        self.unit = -1 if record.window is None else _UNITS.index(record.unit)
        self.window_s = 0 if record.window is None else record.window.seconds
        self.reset_ms = float((self.window_s + self.window_s // _SLOTS) * 1000)
        self.per_ahead_ms = 0.0
        if record.is_rate:
            rate: float = getattr(quota, record.quota_field)
            self.window_s = max(_whole(most / rate), 1) if rate else 1
            self.per_ahead_ms = min(1000 / rate, float(MOST)) if rate else 0.0
            self.reset_ms = 1000 * max(rate, 1.0) / rate if rate else 0.0


def bounds_of(quota: ResourceQuotaConfig) -> list[Bound]:
    """Return the limits of a model on requests and tokens, in the order in which they are checked."""
    _, at_once = core_bounds(quota)
    return [Bound(record, most, quota) for record in _TOLD if (most := at_once[record.limit]) is not None]


def plan_of(bounds: Sequence[Bound]) -> LimitPlan:
    """Return what the headers of these limits have in common for every request."""
    names = [f'{", " if index else ""}"{_NAMES[bound.limit]}";r='.encode() for index, bound in enumerate(bounds)]
    return LimitPlan(
        [int(bound.limit) for bound in bounds],
        [bound.most for bound in bounds],
        [bound.unit for bound in bounds],
        [bound.reset_ms for bound in bounds],
        [bound.per_ahead_ms for bound in bounds],
        names,
        ", ".join(map(_policy, bounds)).encode(),
    )


def _policy(bound: Bound) -> str:
    window = f";w={min(bound.window_s, MOST)}" if bound.window_s else ""
    return f'"{_NAMES[bound.limit]}";q={min(bound.most, MOST)}{_QUOTA_UNITS.get(bound.limit, "")}{window}'


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
        self._plans: dict[bytes, LimitPlan] = {}

    def of(self, ids: str | tuple[str, ...], style: str, denial: QuotaCheckResult | None = None) -> list[Header]:
        """Return the header fields that report what is left, for one id or several that decide together.

        For each kind of limit, the one with the least left is reported. ``x-ratelimit-*`` and
        ``anthropic-ratelimit-*`` have room for one limit on requests and one on tokens: the one that denied, or the one
        with the least left. ``RateLimit-Policy`` and ``RateLimit`` list all. After a denial both report the time until
        the request would be admitted; otherwise the reset is the time until nothing is in use, at the latest.
        """
        mode = self._mode
        if mode == "none":
            return []
        every = mode == "all"
        stamped = every and style == "anthropic"
        names = _ANTHROPIC if stamped else _OPENAI
        if denial is not None:
            return self._of_denial((ids,) if isinstance(ids, str) else ids, names, denial)
        found = limit_fields(self._manager, ids, self._plans, names, every, stamped)
        if found is None:
            for model_id in (ids,) if isinstance(ids, str) else ids:
                self._make_plan(model_id)
            found = limit_fields(self._manager, ids, self._plans, names, every, stamped)
        return found or []  # nothing, if the quota has changed in the meantime

    def _make_plan(self, model_id: str) -> None:
        before = read_left(self._manager, model_id)
        quota = self._manager.get_quota(model_id)
        after = read_left(self._manager, model_id)
        if quota is None or before is None or after is None or before[0] != after[0]:
            return  # it has changed in the meantime
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        self._plans[before[0]] = plan_of(bounds_of(quota))

    def _of_denial(
        self, ids: tuple[str, ...], names: tuple[tuple[bytes, ...], ...], denial: QuotaCheckResult | None
    ) -> list[Header]:
        """The same in Python, which knows what denied: not as fast, and not as frequent."""
        tightest: dict[Limit, _Standing] = {}
        for model_id in ids:
            read = read_left(self._manager, model_id)
            quota = None if read is None else self._manager.get_quota(model_id)
            if read is None or quota is None:
                continue
            for bound in _bounds_cached(quota):
                left = max(read[1][bound.limit], 0)
                known = tightest.get(bound.limit)
                if known is None or left < known[1]:
                    tightest[bound.limit] = bound, left, read[2][max(bound.unit, 0)]
        standings = [tightest[limit] for limit in sorted(tightest)]
        headers: list[Header] = []
        for unit in range(len(_UNITS)):
            shown = [standing for standing in standings if standing[0].unit == unit]
            if shown:
                headers += _of_unit(names[unit], shown, denial, stamped=names is _ANTHROPIC)
        if self._mode == "all" and standings:
            headers.append((b"ratelimit-policy", ", ".join([_policy(bound) for bound, _, _ in standings]).encode()))
            headers.append(
                (b"ratelimit", ", ".join([_state(bound, left, denial) for bound, left, _ in standings]).encode())
            )
        return headers


_Standing: TypeAlias = tuple[Bound, int, int]  # a limit, what is left of it, and how far the model is ahead of it


def _of_unit(
    names: tuple[bytes, ...], shown: list[_Standing], denial: QuotaCheckResult | None, *, stamped: bool
) -> list[Header]:
    """The three headers on requests, or on tokens."""
    bound, left, ahead = min(shown, key=lambda standing: standing[1])
    reset_ms = None
    if denial is not None and denial.retry_after_ms is not None:
        for standing in shown:
            if standing[0].limit is denial.limit:
                bound, left, ahead = standing
                reset_ms = denial.retry_after_ms
    if reset_ms is None:
        used = left < bound.most or (bound.per_ahead_ms and ahead)
        reset_ms = _whole(bound.reset_ms + ahead * bound.per_ahead_ms) if used else 0
    reset = timestamp(reset_ms) if stamped else go_duration(reset_ms).encode()
    values = (b"%d" % min(bound.most, MOST), b"%d" % min(left, MOST), reset)
    return list(zip(names, values, strict=True))


def _state(bound: Bound, left: int, denial: QuotaCheckResult | None) -> str:
    state = f'"{_NAMES[bound.limit]}";r={min(left, MOST)}'
    if denial is not None and denial.limit is bound.limit and denial.retry_after_ms is not None:
        state += f";t={min(-(-denial.retry_after_ms // 1000), MOST)}"
    return state


@functools.lru_cache(maxsize=_MOST_PLANS)
def _bounds_cached(quota: ResourceQuotaConfig) -> list[Bound]:
    return bounds_of(quota)


_PARTS: Final = ("limit", "remaining", "reset")
_OPENAI: Final = tuple([tuple([f"x-ratelimit-{part}-{unit}".encode() for part in _PARTS]) for unit in _UNITS])
_ANTHROPIC: Final = tuple(
    [tuple([f"anthropic-ratelimit-{unit}-{part}".encode() for part in _PARTS]) for unit in _UNITS]
)
OURS: Final = frozenset(
    [name for names in (*_OPENAI, *_ANTHROPIC) for name in names] + [b"ratelimit", b"ratelimit-policy"]
)
"""Names of all these headers."""


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


def exceeded_by(quota: ResourceQuotaConfig, estimate: TokenCount, ram_mb: int, ssd_mb: int) -> Limit | None:
    """Return the first limit that a request exceeds by itself; None if it exceeds none."""
    asked = {Limit.RAM: ram_mb, Limit.SSD: ssd_mb}
    tokens = counted(estimate, quota.token_weights)
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
