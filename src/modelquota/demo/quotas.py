"""The quotas of the example server, and a manager with them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final

from modelquota.cluster import RedisStore
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig

KEY_PREFIX: Final = "key:"
"""The prefix of the ids of API keys, which no model has."""

QUOTAS: Final = (
    ResourceQuotaConfig.unlimited(
        "chat-70b",
        max_tokens_per_second=40,
        burst_tokens=160,
        max_tokens_per_hour=100_000,
        on_violation="throttle",
        grace_period_sec=5,
    ),
    ResourceQuotaConfig.unlimited(
        "code-34b",
        max_tokens_per_hour=100_000,
        max_concurrent_requests=1,
        max_queued_requests=8,
        on_violation="queue",
        grace_period_sec=30,
    ),
    ResourceQuotaConfig.unlimited(
        "batch-13b",
        max_requests_per_second=1,
        burst_requests=2,
        max_tokens_per_hour=5_000,
        on_violation="reject",
    ),
    ResourceQuotaConfig.unlimited("dev-7b", max_tokens_per_hour=500, on_violation="warn"),
    ResourceQuotaConfig.unlimited("key:free", max_requests_per_hour=10, on_violation="reject"),
)
"""One model for each action on a violation, with limits low enough to reach by hand, and one key."""


def demo_manager(
    quotas: Iterable[ResourceQuotaConfig] = QUOTAS,
    *,
    path: str | os.PathLike[str] | None = None,
    trust_file: bool = False,
    cluster: RedisStore | None = None,
) -> ResourceQuotaManager:
    """Return a manager with the quotas of the example; with a state file, usage survives restarts."""
    manager = ResourceQuotaManager(path=path, trust_file=trust_file, cluster=cluster)
    for quota in quotas:
        manager.set_quota(quota)
    return manager
