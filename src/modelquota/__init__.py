"""Resource quotas for multi-model inference: may this model take this request now?"""

import importlib
from typing import TYPE_CHECKING, Any

from modelquota._core.state.clock import ManualClock
from modelquota._core.table.grant import Grant
from modelquota._core.table.result import QuotaCheckResult
from modelquota.errors import (
    CapacityError,
    GrantClosedError,
    ManagerClosedError,
    ModelLockedError,
    QuotaConfigError,
    QuotaError,
    QuotaExceededError,
    QuotaFileError,
    StateFileError,
    TraceError,
    UnknownModelError,
)
from modelquota.manager import ModelQuota, ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import Limit, ViolationAction, ViolationType
from modelquota.quota.tokens import Tokens
from modelquota.waiting.stream import count_stream

if TYPE_CHECKING:
    from modelquota.quota.file import load_quotas
    from modelquota.reading.report import ModelReport, QuotaStats, ResourceUsage

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Grant",
    "GrantClosedError",
    "Limit",
    "ManagerClosedError",
    "ManualClock",
    "ModelLockedError",
    "ModelQuota",
    "ModelReport",
    "QuotaCheckResult",
    "QuotaConfigError",
    "QuotaError",
    "QuotaExceededError",
    "QuotaFileError",
    "QuotaStats",
    "ResourceQuotaConfig",
    "ResourceQuotaManager",
    "ResourceUsage",
    "StateFileError",
    "Tokens",
    "TraceError",
    "UnknownModelError",
    "ViolationAction",
    "ViolationType",
    "count_stream",
    "load_quotas",
]

# Imported at their first use: their dataclasses and regular expressions take a quarter of the whole import.
_LATER = {
    "ModelReport": "modelquota.reading.report",
    "QuotaStats": "modelquota.reading.report",
    "ResourceUsage": "modelquota.reading.report",
    "load_quotas": "modelquota.quota.file",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(_LATER[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
