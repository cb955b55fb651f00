"""Tuning per user: one quota for all users, by what each of them did in rolling windows."""

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE
from modelquota.tuning.advice import exceeded_by, round_count
from modelquota.tuning.cells import NS_PER_SECOND, Int64Array
from modelquota.tuning.charges import charges_of
from modelquota.tuning.trace import Trace
from modelquota.tuning.windows import Windows, counted_ns

__all__ = ["UserTuning", "UserUse", "tune_users"]

PATTERN = "user:*"
_RPM_WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class UserUse:
    """One user, or group of users: totals, and the busiest minute and hour."""

    name: str
    requests: int
    tokens: int
    peak_requests_minute: int
    peak_tokens_minute: int
    peak_tokens_hour: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class UserTuning:
    """What users need.

    Attributes
    ----------
    per : str
        ``"user"`` or ``"prefix"``.
    uses : tuple of UserUse
        Those with the most tokens first.
    recommended : ResourceQuotaConfig or None
        A quota for the pattern ``user:*`` whose limits deny at most the accepted share of all users' requests; of the
        windows that the trace is long enough for. None if that is none.
    reasons : mapping of str to str
        Of each recommended field.
    """

    per: str
    uses: tuple[UserUse, ...]
    recommended: ResourceQuotaConfig | None
    reasons: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        return {
            "per": self.per,
            "uses": [use.to_dict() for use in self.uses],
            "recommended": None if self.recommended is None else self.recommended.to_dict(),
            "reasons": self.reasons,
        }


def by_prefix(trace: Trace) -> Trace:
    """Return the trace with its users grouped by what their names have before the first ``/`` or ``:``."""
    prefixes = [re.split("[/:]", user, maxsplit=1)[0] or user for user in trace.users]
    names = tuple(dict.fromkeys(prefixes))
    numbers = np.array([names.index(prefix) for prefix in prefixes] + [-1], np.int32)
    assert trace.user_index is not None
    return replace(trace, users=names, user_index=numbers[trace.user_index])


def tune_users(trace: Trace, per: str, *, headroom: float, target_denied: float) -> UserTuning:
    """Return what the users of a trace did, and a quota for each of them."""
    if per not in ("user", "prefix"):
        raise ValueError(f"per is {per!r}; expected user or prefix")
    if trace.user_index is None:
        raise ValueError("the trace names no users: tuning per user needs a column that says who made each request")
    if per == "prefix":
        trace = by_prefix(trace)
    assert trace.user_index is not None
    records = [
        record
        for record in CATALOGUE.values()
        if record.window is not None
        and not record.is_rate
        and trace.duration_ns >= record.window.seconds * NS_PER_SECOND
    ]
    tokens = trace.tokens
    order = np.argsort(trace.user_index, kind="stable")
    order = order[trace.user_index[order] >= 0]
    ends = np.cumsum(np.bincount(trace.user_index[order], minlength=len(trace.users)))
    uses = []
    held: dict[str, list[Int64Array]] = {record.quota_field: [] for record in records}
    for user, rows in zip(trace.users, np.split(order, ends[:-1]), strict=True):
        if not len(rows):
            continue
        times_ns, costs = trace.times_ns[rows], tokens[rows]
        charges = charges_of(trace.select(rows))
        windows = Windows(times_ns)
        minute = _RPM_WINDOW_S * NS_PER_SECOND - 1
        uses.append(
            UserUse(
                name=user,
                requests=len(rows),
                tokens=int(costs.sum()),
                peak_requests_minute=int(windows.sums(None, minute).max()),
                peak_tokens_minute=int(windows.sums(costs, minute).max()),
                peak_tokens_hour=int(windows.sums(costs, 3_600 * NS_PER_SECOND - 1).max()),
            )
        )
        for record in records:
            assert record.window is not None
            held[record.quota_field].append(charges[record.unit].windows(counted_ns(record.window.seconds)))
    fields: dict[str, Any] = {}
    reasons = {}
    for record in records:
        assert record.window is not None
        pooled = np.concatenate(held[record.quota_field])
        needed = exceeded_by(pooled, target_denied / len(records))
        fields[record.quota_field] = round_count(needed * (1 + headroom))
        reasons[record.quota_field] = (
            f"the busiest {record.window.name} of any of {len(uses):,} users held {int(pooled.max()):,} {record.unit}"
        )
    recommended = ResourceQuotaConfig.unlimited(PATTERN, **fields) if fields else None
    return UserTuning(per, tuple(sorted(uses, key=lambda use: -use.tokens)), recommended, reasons)
