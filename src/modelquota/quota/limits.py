"""The vocabulary of quotas: the limits, the classes of violations, and the actions taken on a violation."""

import enum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from modelquota.quota.config import ResourceQuotaConfig


class ViolationAction(enum.StrEnum):
    """What is done with a request that violates a limit.

    Every member equals its name in lower case, which can be given instead of the member.

    Examples
    --------
    >>> ViolationAction("warn") is ViolationAction.WARN
    True
    """

    REJECT = "reject"
    """Denied."""
    THROTTLE = "throttle"
    """Denied, with the time after which a retry succeeds; `acquire` waits that long and tries again. The default."""
    WARN = "warn"
    """Allowed and charged; the violation is in the result, the counters and the log."""
    QUEUE = "queue"
    """Denied, with the time after which a retry succeeds; `acquire` waits in the model's queue."""


class ViolationType(enum.StrEnum):
    """The class of a violated limit; `Limit` is the exact limit."""

    RAM_LIMIT = "ram_limit"
    """More RAM requested than is free under ``max_ram_mb``."""
    SSD_LIMIT = "ssd_limit"
    """More SSD space requested than is free under ``max_ssd_mb``."""
    RATE_LIMIT = "rate_limit"
    """Requests or tokens per second, burst included, or per minute."""
    QUOTA_LIMIT = "quota_limit"
    """Requests or tokens in a longer window."""
    CONCURRENCY_LIMIT = "concurrency_limit"
    """Grants open at the same time."""


class Limit(enum.IntEnum):
    """One limit of a model, in the order in which a check judges them.

    The values are the codes in the array that ``check_many`` returns, in which 0, not a member, means "admitted".

    Examples
    --------
    >>> limit = Limit.TOKENS_PER_HOUR
    >>> limit.name, limit.label, limit.unit, limit.violation_type.name
    ('TOKENS_PER_HOUR', 'tokens per hour', 'tokens', 'QUOTA_LIMIT')
    """

    RAM = 1
    SSD = 2
    CONCURRENCY = 3
    REQUESTS_PER_SECOND = 4
    TOKENS_PER_SECOND = 5
    TOKENS_PER_MINUTE = 6
    REQUESTS_PER_MINUTE = 7
    TOKENS_PER_HOUR = 8
    REQUESTS_PER_HOUR = 9
    TOKENS_PER_DAY = 10
    REQUESTS_PER_DAY = 11
    TOKENS_PER_MONTH = 12
    REQUESTS_PER_MONTH = 13
    QUEUE = 14

    @property
    def violation_type(self) -> ViolationType | None:
        """The class of this limit; None for `QUEUE`, which takes the class of the violation at the queue's head."""
        return CATALOGUE[self].violation_type

    @property
    def label(self) -> str:
        """The display name, such as ``"tokens per hour"``."""
        return CATALOGUE[self].label

    @property
    def unit(self) -> str:
        """What is counted: ``"MB"`` (2**20 bytes), ``"requests"`` or ``"tokens"``."""
        return CATALOGUE[self].unit


# Plain classes: each dataclass or NamedTuple would add a hundredth to the time of `import modelquota`.


class Window:
    """A rolling window over which requests and tokens are counted.

    Attributes
    ----------
    name : str
    seconds : int
        Its length.
    symbol : str
        Its abbreviation in headings, as in ``tokens/h``.
    adjective : str
        Its name in the names of alerts, as in ``hourly_tokens``; empty for the second.
    optional : bool
        Whether a model counts it only from the moment it first has a limit there.
    """

    __slots__ = ("adjective", "name", "optional", "seconds", "symbol")

    def __init__(self, name: str, seconds: int, symbol: str, adjective: str, *, optional: bool = False) -> None:
        self.name: Final = name
        self.seconds: Final = seconds
        self.symbol: Final = symbol
        self.adjective: Final = adjective
        self.optional: Final = optional


WINDOWS: Final = (
    Window("second", 1, "s", ""),
    Window("minute", 60, "min", "minutely", optional=True),
    Window("hour", 3_600, "h", "hourly"),
    Window("day", 86_400, "day", "daily"),
    Window("month", 2_592_000, "month", "monthly", optional=True),
)
"""All windows, shortest first, in the same order as in the core."""


class LimitRecord:
    """The description of one limit, from which every list of limits in the package is made.

    Attributes
    ----------
    limit : Limit
    label : str
        The display name.
    unit : str
        ``"MB"``, ``"requests"`` or ``"tokens"``.
    violation_type : ViolationType or None
    quota_field : str
        The field of `ResourceQuotaConfig` that sets it; None there means unlimited.
    usage_fields : tuple of str
        The fields of `ResourceUsage` whose sum counts against it.
    heading : str
        A short label, for table columns.
    window : Window or None
        None for a limit on what is held at one time, such as memory, rather than counted over a window.
    burst_field : str
        The field of `ResourceQuotaConfig` that sets how far the model may run ahead of a rate; empty for other limits.
    ahead_field : str
        The field of `ResourceUsage` that reports how far it has run ahead; empty for other limits.
    """

    __slots__ = (
        "ahead_field", "burst_field", "heading", "label", "limit", "quota_field", "unit", "usage_fields",
        "violation_type", "window",
    )  # fmt: skip

    def __init__(
        self,
        limit: Limit,
        label: str,
        unit: str,
        violation_type: ViolationType | None,
        quota_field: str,
        usage_fields: tuple[str, ...],
        heading: str,
        window: Window | None = None,
    ) -> None:
        is_rate = window is not None and window.seconds == 1
        self.limit: Final = limit
        self.label: Final = label
        self.unit: Final = unit
        self.violation_type: Final = violation_type
        self.quota_field: Final = quota_field
        self.usage_fields: Final = usage_fields
        self.heading: Final = heading
        self.window: Final = window
        self.burst_field: Final = f"burst_{unit}" if is_rate else ""
        self.ahead_field: Final = f"burst_{unit}_used" if is_rate else ""

    @property
    def is_rate(self) -> bool:
        """Whether it is a limit per second, which may be fractional and has a burst."""
        return bool(self.burst_field)


def _counted(unit: str, window: Window) -> LimitRecord:
    """Make the record of a limit on requests or tokens in a window."""
    return LimitRecord(
        Limit[f"{unit}_per_{window.name}".upper()],
        f"{unit} per {window.name}",
        unit,
        ViolationType.RATE_LIMIT if window.seconds <= 60 else ViolationType.QUOTA_LIMIT,
        f"max_{unit}_per_{window.name}",
        (f"{unit}_this_{window.name}",),
        f"{unit}/{window.symbol}",
        window,
    )


def _memory(limit: Limit, violation_type: ViolationType) -> LimitRecord:
    name = limit.name
    used = (f"current_{name.lower()}_mb", f"reserved_{name.lower()}_mb")
    return LimitRecord(limit, name, "MB", violation_type, f"max_{name.lower()}_mb", used, f"{name} MB")


CATALOGUE: Final[dict[Limit, LimitRecord]] = {
    record.limit: record
    for record in (
        _memory(Limit.RAM, ViolationType.RAM_LIMIT),
        _memory(Limit.SSD, ViolationType.SSD_LIMIT),
        LimitRecord(
            Limit.CONCURRENCY,
            "concurrent requests",
            "requests",
            ViolationType.CONCURRENCY_LIMIT,
            "max_concurrent_requests",
            ("concurrent_requests",),
            "open",
        ),
        _counted("requests", WINDOWS[0]),
        _counted("tokens", WINDOWS[0]),
        *(_counted(unit, window) for window in WINDOWS[1:] for unit in ("tokens", "requests")),
        LimitRecord(
            Limit.QUEUE,
            "queued requests",
            "requests",
            None,
            "max_queued_requests",
            ("queued_requests",),
            "waiting",
        ),
    )
}
"""The record of each limit, in the order in which a check judges them.

Adding a window takes its line in `WINDOWS`, two members of `Limit`, the fields of `ResourceQuotaConfig` and
`ResourceUsage`, and its constants in ``_core/layout.pxd``.
"""

DENYING: Final = tuple(record for record in CATALOGUE.values() if record.limit is not Limit.QUEUE)
"""The limits that a request can violate by itself: all but `QUEUE`, which depends on the requests ahead of it."""

SHADOW_NAMES: Final = tuple(record.limit.name.lower() for record in DENYING)
"""The names that `shadow_limits` accepts, in the order of `Limit`."""


def shadow_mask(config: "ResourceQuotaConfig") -> int:
    """Return the ``shadow_limits`` of a config as the core keeps them: bit ``1 << limit`` for each `Limit`.

    Examples
    --------
    >>> from modelquota import ResourceQuotaConfig
    >>> mask = shadow_mask(ResourceQuotaConfig("llama", shadow_limits=["ram", "tokens_per_hour"]))
    >>> mask == 1 << Limit.RAM | 1 << Limit.TOKENS_PER_HOUR
    True
    """
    mask = 0
    for name in config.shadow_limits:
        mask |= 1 << Limit[name.upper()]
    return mask


def shadow_names(mask: int) -> tuple[str, ...]:
    """Return the ``shadow_limits`` of a mask, the inverse of `shadow_mask`; bits of unknown limits are ignored.

    Examples
    --------
    >>> shadow_names(1 << Limit.RAM | 1 << Limit.TOKENS_PER_HOUR)
    ('ram', 'tokens_per_hour')
    """
    return tuple(name for name in SHADOW_NAMES if mask >> Limit[name.upper()] & 1)


def dollars(millionths: float) -> str:
    """Return an amount in millionths of a dollar as text: two decimals, or as many as it has.

    Examples
    --------
    >>> dollars(500_000_000), dollars(7_680), dollars(1)
    ('$500.00', '$0.00768', '$0.000001')
    """
    whole, rest = divmod(int(millionths), 1_000_000)
    return f"${whole:,}.{f'{rest:06}'.rstrip('0'):0<2}"
