"""Header fields that tell a client where it stands: OpenAI's ``x-ratelimit-*``, and ``RateLimit`` of the IETF.

The latter follow draft-ietf-httpapi-ratelimit-headers: structured fields, lists of strings with parameters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from modelquota._core.result import QuotaCheckResult
from modelquota.config import ResourceQuotaConfig
from modelquota.limits import Limit
from modelquota.report import ModelReport, ResourceUsage

Header = tuple[bytes, bytes]

MOST: Final = 10**15 - 1
"""The largest integer of a structured field."""

_HOUR_S = 3_600
_DAY_S = 86_400
_SLOTS = 60  # capacity of a window returns at most this part of it late
_NAMES = {limit: limit.name.lower().replace("_", "-") for limit in Limit}
_UNITS = (
    ("requests", (Limit.REQUESTS_PER_SECOND, Limit.REQUESTS_PER_HOUR, Limit.REQUESTS_PER_DAY)),
    ("tokens", (Limit.TOKENS_PER_SECOND, Limit.TOKENS_PER_HOUR, Limit.TOKENS_PER_DAY)),
)
_QUOTA_UNITS = {
    Limit.CONCURRENCY: ';qu="concurrent-requests"',
    Limit.TOKENS_PER_SECOND: ';qu="tokens"',
    Limit.TOKENS_PER_HOUR: ';qu="tokens"',
    Limit.TOKENS_PER_DAY: ';qu="tokens"',
}


class Allowance(NamedTuple):
    """One limit as a client sees it.

    Attributes
    ----------
    limit : Limit
        Which one.
    most : int
        What may be used at once where nothing has been used.
    left : int
        What may be used now.
    window_s : int
        In how many seconds `most` comes back; 0 where it comes back when requests end.
    reset_ms : int
        After how many milliseconds nothing of it is used any more, at the latest, if nothing else is admitted.
    """

    limit: Limit
    most: int
    left: int
    window_s: int
    reset_ms: int


def largest_burst(rate: float, burst: int) -> int:
    """What a rate admits at once where nothing has been used: ``max(rate, 1) + burst``; nothing where the rate is 0."""
    return math.floor(max(rate, 1.0)) + burst if rate else 0


def allowances(quota: ResourceQuotaConfig, usage: ResourceUsage) -> list[Allowance]:
    """Return the limits of a model on requests and tokens, and how much of each is left."""
    found = []
    if quota.max_concurrent_requests is not None:
        most = quota.max_concurrent_requests
        found.append(Allowance(Limit.CONCURRENCY, most, max(most - usage.concurrent_requests, 0), 0, 0))
    if quota.max_requests_per_second is not None:
        found.append(
            _of_rate(
                Limit.REQUESTS_PER_SECOND,
                quota.max_requests_per_second,
                quota.burst_requests,
                usage.requests_this_second,
                usage.burst_requests_used,
            )
        )
    if quota.max_tokens_per_second is not None:
        found.append(
            _of_rate(
                Limit.TOKENS_PER_SECOND,
                quota.max_tokens_per_second,
                quota.burst_tokens,
                usage.tokens_this_second,
                usage.burst_tokens_used,
            )
        )
    for limit, bound, used, window_s in (
        (Limit.TOKENS_PER_HOUR, quota.max_tokens_per_hour, usage.tokens_this_hour, _HOUR_S),
        (Limit.REQUESTS_PER_HOUR, quota.max_requests_per_hour, usage.requests_this_hour, _HOUR_S),
        (Limit.TOKENS_PER_DAY, quota.max_tokens_per_day, usage.tokens_this_day, _DAY_S),
        (Limit.REQUESTS_PER_DAY, quota.max_requests_per_day, usage.requests_this_day, _DAY_S),
    ):
        if bound is not None:
            reset_ms = (window_s + window_s // _SLOTS) * 1000 if used else 0
            found.append(Allowance(limit, bound, max(bound - used, 0), window_s, reset_ms))
    return found


def _of_rate(limit: Limit, rate: float, burst: int, used: int, ahead: int) -> Allowance:
    most = largest_burst(rate, burst)
    if not rate:
        return Allowance(limit, 0, 0, 1, 0)
    left = min(math.ceil(rate) + burst - used, most)
    if ahead:
        left = min(left, burst - ahead)
    drained = ahead + max(rate, 1.0) if ahead or used else 0
    return Allowance(limit, most, max(left, 0), _whole(most / rate) or 1, _whole(1000 * drained / rate))


def _whole(value: float) -> int:
    """Round up, and keep within what a field can say."""
    return math.ceil(min(value, MOST))


def tightest(reports: Iterable[ModelReport]) -> list[Allowance]:
    """Return the limits of several models that decide together: of each, the one with the least left."""
    found: dict[Limit, Allowance] = {}
    for report in reports:
        for allowance in allowances(report.quota, report.usage):
            known = found.get(allowance.limit)
            if known is None or allowance.left < known.left:
                found[allowance.limit] = allowance
    return [found[limit] for limit in sorted(found)]


def limit_headers(limits: Sequence[Allowance], denial: QuotaCheckResult | None = None) -> list[Header]:
    """Return the header fields that say how much is left.

    ``x-ratelimit-*`` have room for one limit on requests and one on tokens: the one with the least left, or the one
    that denied. ``RateLimit-Policy`` and ``RateLimit`` list all. After a denial the time until it would be admitted
    stands in both; otherwise ``x-ratelimit-reset-*`` is the time until nothing is used any more, at the latest.

    Examples
    --------
    >>> limit_headers([Allowance(Limit.TOKENS_PER_HOUR, 1000, 600, 3600, 3_660_000)])[:3]
    [(b'x-ratelimit-limit-tokens', b'1000'), (b'x-ratelimit-remaining-tokens', b'600'), \
(b'x-ratelimit-reset-tokens', b'1h1m0s')]
    """
    if not limits:
        return []
    denied_by = None if denial is None else denial.limit
    wait_ms = None if denial is None else denial.retry_after_ms
    headers: list[Header] = []
    for unit, kinds in _UNITS:
        shown: Allowance | None = None
        for each in limits:
            if each.limit in kinds and (shown is None or each.limit == denied_by or each.left < shown.left):
                shown = each
                if each.limit == denied_by:
                    break
        if shown is not None:
            reset_ms = shown.reset_ms if wait_ms is None or shown.limit != denied_by else wait_ms
            headers += (
                (b"x-ratelimit-limit-" + unit.encode(), b"%d" % shown.most),
                (b"x-ratelimit-remaining-" + unit.encode(), b"%d" % shown.left),
                (b"x-ratelimit-reset-" + unit.encode(), go_duration(reset_ms).encode()),
            )
    policies = []
    states = []
    for each in limits:
        window = f";w={min(each.window_s, MOST)}" if each.window_s else ""
        policies.append(f'"{_NAMES[each.limit]}";q={min(each.most, MOST)}{_QUOTA_UNITS.get(each.limit, "")}{window}')
        wait = "" if wait_ms is None or each.limit != denied_by else f";t={min(-(-wait_ms // 1000), MOST)}"
        states.append(f'"{_NAMES[each.limit]}";r={min(each.left, MOST)}{wait}')
    headers.append((b"ratelimit-policy", ", ".join(policies).encode()))
    headers.append((b"ratelimit", ", ".join(states).encode()))
    return headers


def go_duration(ms: int) -> str:
    """Return a time as OpenAI's headers have it, which is how Go writes durations.

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


def never_fits(quota: ResourceQuotaConfig, tokens: int, ram_mb: int, ssd_mb: int) -> Limit | None:
    """Return the first limit that a request exceeds by itself, so that no wait helps; None where it may fit later."""
    rate = quota.max_requests_per_second
    burst = None if rate is None else largest_burst(rate, quota.burst_requests)
    token_rate = quota.max_tokens_per_second
    token_burst = None if token_rate is None else largest_burst(token_rate, quota.burst_tokens)
    for limit, asked, most in (
        (Limit.RAM, ram_mb, quota.max_ram_mb),
        (Limit.SSD, ssd_mb, quota.max_ssd_mb),
        (Limit.CONCURRENCY, 1, quota.max_concurrent_requests),
        (Limit.REQUESTS_PER_SECOND, 1, burst),
        (Limit.TOKENS_PER_SECOND, tokens, token_burst),
        (Limit.TOKENS_PER_HOUR, tokens, quota.max_tokens_per_hour),
        (Limit.REQUESTS_PER_HOUR, 1, quota.max_requests_per_hour),
        (Limit.TOKENS_PER_DAY, tokens, quota.max_tokens_per_day),
        (Limit.REQUESTS_PER_DAY, 1, quota.max_requests_per_day),
    ):
        if most is not None and asked > most:
            return limit
    return None
