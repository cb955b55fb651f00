"""Quotas and managers as tests need them: no limit but those that are named."""

from __future__ import annotations

import os
from typing import Any

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.quota.limits import CATALOGUE, DENYING

NOW_NS = 10**12
"""When a test begins, if that does not matter to it."""
OPEN: dict[str, Any] = {record.quota_field: None for record in DENYING if record.window is not None}
"""No rate and no quota: only memory and concurrency can be in the way."""
UNLIMITED: dict[str, Any] = {
    **{record.quota_field: None for record in DENYING},
    **{record.burst_field: 0 for record in CATALOGUE.values() if record.is_rate},
}
"""No limit and no burst."""


def open_quota(model_id: str = "m", /, **limits: Any) -> ResourceQuotaConfig:
    """A quota with no limit but those that are named; it rejects, unless they say otherwise."""
    return ResourceQuotaConfig.unlimited(model_id, **{"on_violation": "reject"} | limits)


def queue_quota(model_id: str = "m", /, **limits: Any) -> ResourceQuotaConfig:
    """The same, under which requests wait in a queue."""
    return open_quota(model_id, **{"on_violation": "queue"} | limits)


def one_at_a_time(model_id: str = "m", /, **limits: Any) -> ResourceQuotaConfig:
    """The same, with one grant at a time."""
    return queue_quota(model_id, **{"max_concurrent_requests": 1} | limits)


def make_manager(
    *quotas: ResourceQuotaConfig,
    path: str | os.PathLike[str] | None = None,
    clock: ManualClock | None = None,
    real_time: bool = False,
    max_models: int | None = None,
    **limits: Any,
) -> ResourceQuotaManager:
    """A manager with these quotas, and with `open_quota` of the limits for the model "m" if any are named.

    Its clock stands still at `NOW_NS` unless one is given, or `path` or `real_time` asks for that of the machine.
    """
    if clock is None and path is None and not real_time:
        clock = ManualClock(NOW_NS)
    manager = ResourceQuotaManager(path=path, clock=clock, max_models=max_models)
    for quota in [*quotas, open_quota(**limits)] if limits else quotas:
        manager.set_quota(quota)
    return manager


class SharingManager(ResourceQuotaManager):
    """As with `cluster=`, but without its thread: a file whose limits are shared stays so."""

    def _leave_cluster(self) -> None:
        pass


def used(manager: Any, model_id: str = "m") -> int:
    """The tokens of the last hour."""
    tokens: int = manager.get_usage(model_id).tokens_this_hour
    return tokens


def waiting(manager: Any, model_id: str = "m") -> int:
    """How many requests wait."""
    requests: int = manager.get_usage(model_id).queued_requests
    return requests
