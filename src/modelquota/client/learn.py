"""What the headers of an answer teach, and never more: what others have used, and until when a line must pause."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

from modelquota.errors import QuotaError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.limits import DENYING

LONGEST_PAUSE_SECONDS: Final = 86_400.0
"""The longest pause that an answer can ask for."""

_MOST_REQUESTS: Final = 1 << 16
_SHORTEST_WINDOW_SECONDS: Final = 60

# Header names of what is left and of its limit, by unit.
_HEADERS: Final = (
    ("requests", "x-ratelimit-remaining-requests", "x-ratelimit-limit-requests"),
    ("tokens", "x-ratelimit-remaining-tokens", "x-ratelimit-limit-tokens"),
    ("requests", "anthropic-ratelimit-requests-remaining", "anthropic-ratelimit-requests-limit"),
    ("tokens", "anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-tokens-limit"),
)


class Remaining(NamedTuple):
    """What an answer says is left of one limit.

    Attributes
    ----------
    unit : str
        ``"requests"`` or ``"tokens"``.
    most : int
        The limit.
    left : int
        What is left of it.
    """

    unit: str
    most: int
    left: int


def read_remaining(headers: Mapping[str, str]) -> list[Remaining]:
    """Return what the headers say is left, in the words of OpenAI's and Anthropic's APIs.

    Examples
    --------
    >>> read_remaining({"x-ratelimit-remaining-tokens": "90", "x-ratelimit-limit-tokens": "100"})
    [Remaining(unit='tokens', most=100, left=90)]
    """
    found = []
    for unit, left_name, most_name in _HEADERS:
        left, most = _count(headers.get(left_name)), _count(headers.get(most_name))
        if left is not None and most is not None and left <= most:
            found.append(Remaining(unit, most, left))
    return found


def read_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds after which to come back, from ``retry-after-ms`` or ``retry-after``; None without either.

    Examples
    --------
    >>> read_retry_after({"retry-after": "2"}), read_retry_after({"retry-after-ms": "1500", "retry-after": "2"})
    (2.0, 1.5)
    """
    ms, after = headers.get("retry-after-ms"), headers.get("retry-after")
    seconds = _number(ms)
    if seconds is not None:
        seconds /= 1000
    elif after is not None:
        seconds = _number(after)
        if seconds is None:
            try:
                seconds = parsedate_to_datetime(after).timestamp() - time.time()
            except (ValueError, OverflowError):
                return None
    return None if seconds is None else min(max(seconds, 0.0), LONGEST_PAUSE_SECONDS)


def charge_others(manager: ResourceQuotaManager, model_ids: Sequence[str], headers: Mapping[str, str]) -> None:
    """Charge what others have used of the same limits: the difference between what is left by our count and by theirs.

    A number is compared only with a limit of the same size on a minute or a longer window: whatever else it is about
    cannot be known.
    """
    for remaining in read_remaining(headers):
        for model_id in model_ids:
            report = manager.get_model_report(model_id)
            if report is None:
                continue
            for record in DENYING:
                window = record.window
                if record.is_rate or window is None or window.seconds < _SHORTEST_WINDOW_SECONDS:
                    continue
                if record.unit == remaining.unit and getattr(report.quota, record.quota_field) == remaining.most:
                    excess = (report.usage.left[record.limit] or 0) - remaining.left
                    if excess > 0:
                        _charge(manager, model_id, remaining.unit, excess, report.usage.left)
                    break


def _charge(manager: ResourceQuotaManager, model_id: str, unit: str, count: int, left: Sequence[int | None]) -> None:
    try:
        codes = manager.codes([model_id])
        if unit == "tokens":
            manager.charge_many(codes, count)
            return
        # There is no charge of requests that no limit can deny; what the rate does not admit now is charged later.
        most = min([left[r.limit] or 0 for r in DENYING if r.unit == "requests" and left[r.limit] is not None])
        manager.check_many(codes.repeat(min(count, most, _MOST_REQUESTS)), 0)
    except QuotaError:  # the quota was removed, or the manager closed, in the meantime
        pass


def _count(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) < 19 else None


def _number(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
