"""What the oracle answers: plain values with the fields of the real ones, to be compared with them by name."""

from __future__ import annotations

from dataclasses import dataclass

from modelquota import Limit, ViolationAction, ViolationType


@dataclass(frozen=True)
class Decision:
    """The answer to one check, to be compared with a `QuotaCheckResult`."""

    allowed: bool
    violation_type: ViolationType | None = None
    limit: Limit | None = None
    action: ViolationAction | None = None
    retry_after_ms: int | None = None
    current_usage: float = 0.0

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True)
class Usage:
    """What one model uses, to be compared with a `ResourceUsage`."""

    current_ram_mb: int
    peak_ram_mb: int
    current_ssd_mb: int
    peak_ssd_mb: int
    requests_this_second: int
    tokens_this_second: int
    tokens_this_hour: int
    tokens_this_day: int
    requests_this_hour: int
    requests_this_day: int
    requests_this_minute: int | None
    tokens_this_minute: int | None
    requests_this_month: int | None
    tokens_this_month: int | None
    burst_requests_used: int
    burst_tokens_used: int
    total_violations: int
    ram_violations: int
    ssd_violations: int
    rate_violations: int
    quota_violations: int
    concurrency_violations: int
    reserved_ram_mb: int = 0
    reserved_ssd_mb: int = 0
    concurrent_requests: int = 0
    queued_requests: int = 0


@dataclass
class Stats:
    """Totals over all models, removed and unknown ones too, to be compared with a `QuotaStats`."""

    total_checks: int = 0
    allowed_requests: int = 0
    total_violations: int = 0
    rejected_requests: int = 0
    throttled_requests: int = 0
    queued_requests: int = 0
    warned_requests: int = 0
    ram_violations: int = 0
    ssd_violations: int = 0
    rate_violations: int = 0
    quota_violations: int = 0
    concurrency_violations: int = 0

    def add(self, **amounts: int) -> None:
        """Add to the counters named."""
        for name, amount in amounts.items():
            setattr(self, name, getattr(self, name) + amount)


TYPES = {
    Limit.RAM: ViolationType.RAM_LIMIT,
    Limit.SSD: ViolationType.SSD_LIMIT,
    Limit.CONCURRENCY: ViolationType.CONCURRENCY_LIMIT,
    Limit.REQUESTS_PER_SECOND: ViolationType.RATE_LIMIT,
    Limit.TOKENS_PER_SECOND: ViolationType.RATE_LIMIT,
    Limit.TOKENS_PER_MINUTE: ViolationType.RATE_LIMIT,
    Limit.REQUESTS_PER_MINUTE: ViolationType.RATE_LIMIT,
    Limit.TOKENS_PER_HOUR: ViolationType.QUOTA_LIMIT,
    Limit.REQUESTS_PER_HOUR: ViolationType.QUOTA_LIMIT,
    Limit.TOKENS_PER_DAY: ViolationType.QUOTA_LIMIT,
    Limit.REQUESTS_PER_DAY: ViolationType.QUOTA_LIMIT,
    Limit.TOKENS_PER_MONTH: ViolationType.QUOTA_LIMIT,
    Limit.REQUESTS_PER_MONTH: ViolationType.QUOTA_LIMIT,
}
COUNTERS = {
    ViolationType.RAM_LIMIT: "ram_violations",
    ViolationType.SSD_LIMIT: "ssd_violations",
    ViolationType.RATE_LIMIT: "rate_violations",
    ViolationType.QUOTA_LIMIT: "quota_violations",
    ViolationType.CONCURRENCY_LIMIT: "concurrency_violations",
}
OUTCOMES = {
    ViolationAction.REJECT: "rejected_requests",
    ViolationAction.THROTTLE: "throttled_requests",
    ViolationAction.WARN: "warned_requests",
    ViolationAction.QUEUE: "queued_requests",
}
