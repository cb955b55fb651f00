"""Resource quotas for multi-model inference: may this model take this request now?"""

from modelquota._core.clock import ManualClock
from modelquota._core.grant import Grant
from modelquota._core.result import QuotaCheckResult
from modelquota.config import ResourceQuotaConfig
from modelquota.errors import (
    CapacityError,
    GrantClosedError,
    QuotaConfigError,
    QuotaError,
    QuotaExceededError,
    QuotaFileError,
    StateFileError,
    TraceError,
    UnknownModelError,
)
from modelquota.limits import Limit, ViolationAction, ViolationType
from modelquota.manager import ModelQuota, ResourceQuotaManager
from modelquota.metering import meter
from modelquota.quotafile import load_quotas
from modelquota.report import ModelReport, QuotaStats, ResourceUsage

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "Grant",
    "GrantClosedError",
    "Limit",
    "ManualClock",
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
    "TraceError",
    "UnknownModelError",
    "ViolationAction",
    "ViolationType",
    "load_quotas",
    "meter",
]
