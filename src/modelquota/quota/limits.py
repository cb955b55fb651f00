"""The words of the domain: what is limited, how a violation is classed, what is done about it."""

import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from modelquota.quota.config import ResourceQuotaConfig


class ViolationAction(enum.StrEnum):
    """What is done with a request that violates a limit.

    Every member equals its name in lower case, which is accepted wherever a member is.

    Examples
    --------
    >>> ViolationAction("warn") is ViolationAction.WARN
    True
    """

    REJECT = "reject"
    """Denied."""
    THROTTLE = "throttle"
    """Denied, with the time after which a retry succeeds. The default."""
    WARN = "warn"
    """Allowed and charged; the violation is in the result, the counters and the log."""
    QUEUE = "queue"
    """Denied, with the time after which a retry succeeds; meant for callers that queue."""


class ViolationType(enum.StrEnum):
    """The class of a violated limit; `Limit` says exactly which limit it was."""

    RAM_LIMIT = "ram_limit"
    """More RAM asked than is free under ``max_ram_mb``."""
    SSD_LIMIT = "ssd_limit"
    """More SSD space asked than is free under ``max_ssd_mb``."""
    RATE_LIMIT = "rate_limit"
    """Requests or tokens per second, burst included."""
    QUOTA_LIMIT = "quota_limit"
    """Requests or tokens per hour or day."""
    CONCURRENCY_LIMIT = "concurrency_limit"
    """Grants open at once."""


class Limit(enum.IntEnum):
    """One limit of a model, in the order in which a check judges them.

    The values are the codes in the array that ``check_many`` returns, where 0, which is no member, says "admitted".

    Examples
    --------
    >>> limit = Limit(6)
    >>> limit.name, limit.label, limit.unit, limit.violation_type.name
    ('TOKENS_PER_HOUR', 'tokens per hour', 'tokens', 'QUOTA_LIMIT')
    """

    RAM = 1
    SSD = 2
    CONCURRENCY = 3
    REQUESTS_PER_SECOND = 4
    TOKENS_PER_SECOND = 5
    TOKENS_PER_HOUR = 6
    REQUESTS_PER_HOUR = 7
    TOKENS_PER_DAY = 8
    REQUESTS_PER_DAY = 9
    QUEUE = 10

    @property
    def violation_type(self) -> ViolationType | None:
        """The class of this limit; None for `QUEUE`, whose violation is that of the request at the queue's head."""
        return _FACTS[self][2]

    @property
    def label(self) -> str:
        """The name for people, such as ``"tokens per hour"``."""
        return _FACTS[self][0]

    @property
    def unit(self) -> str:
        """What is counted: ``"MB"`` (2**20 bytes), ``"requests"`` or ``"tokens"``."""
        return _FACTS[self][1]


_FACTS: dict[Limit, tuple[str, str, ViolationType | None]] = {
    Limit.RAM: ("RAM", "MB", ViolationType.RAM_LIMIT),
    Limit.SSD: ("SSD", "MB", ViolationType.SSD_LIMIT),
    Limit.CONCURRENCY: ("concurrent requests", "requests", ViolationType.CONCURRENCY_LIMIT),
    Limit.REQUESTS_PER_SECOND: ("requests per second", "requests", ViolationType.RATE_LIMIT),
    Limit.TOKENS_PER_SECOND: ("tokens per second", "tokens", ViolationType.RATE_LIMIT),
    Limit.TOKENS_PER_HOUR: ("tokens per hour", "tokens", ViolationType.QUOTA_LIMIT),
    Limit.REQUESTS_PER_HOUR: ("requests per hour", "requests", ViolationType.QUOTA_LIMIT),
    Limit.TOKENS_PER_DAY: ("tokens per day", "tokens", ViolationType.QUOTA_LIMIT),
    Limit.REQUESTS_PER_DAY: ("requests per day", "requests", ViolationType.QUOTA_LIMIT),
    Limit.QUEUE: ("queued requests", "requests", None),
}

SHADOW_NAMES: Final = tuple(limit.name.lower() for limit in Limit if limit is not Limit.QUEUE)
"""What `shadow_limits` may name, in the order of `Limit`, all but `QUEUE`: it is a place in line, not a limit."""


def shadow_mask(config: "ResourceQuotaConfig") -> int:
    """Return the ``shadow_limits`` of a config as the core keeps them: bit ``1 << limit`` for each `Limit`.

    Examples
    --------
    >>> from modelquota import ResourceQuotaConfig
    >>> bin(shadow_mask(ResourceQuotaConfig("llama", shadow_limits=["ram", "tokens_per_hour"])))
    '0b1000010'
    """
    mask = 0
    for name in config.shadow_limits:
        mask |= 1 << Limit[name.upper()]
    return mask


def shadow_names(mask: int) -> tuple[str, ...]:
    """Return the ``shadow_limits`` of which `shadow_mask` made the mask; bits that are not a limit's are ignored.

    Examples
    --------
    >>> shadow_names(0b1000010)
    ('ram', 'tokens_per_hour')
    """
    return tuple(name for name in SHADOW_NAMES if mask >> Limit[name.upper()] & 1)
