"""`ResourceQuotaConfig`: the limits of one model, validated when they are created."""

import contextlib
import dataclasses
import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Final, SupportsFloat, SupportsIndex, TypedDict, Unpack, get_args

from modelquota.errors import QuotaConfigError
from modelquota.quota.limits import CATALOGUE, SHADOW_NAMES, Limit, LimitRecord, ViolationAction

MAX_COUNT: Final = 2**62
"""The largest count, in any unit, that a limit or a request may have."""

MAX_MODEL_ID_BYTES: Final = 255
"""The longest model id, in bytes of UTF-8."""


MAX_WEIGHT: Final = 1_000_000
"""The largest weight of a kind of tokens."""

UNITS: Final = ("tokens", "usd")
"""How counts of tokens may be shown, in the order of their codes in the core."""


class QuotaFields(TypedDict, total=False):
    """The fields of a quota except its model id, with the types that each accepts."""

    max_ram_mb: SupportsIndex | None
    max_ssd_mb: SupportsIndex | None
    max_requests_per_second: SupportsFloat | None
    max_tokens_per_second: SupportsFloat | None
    max_tokens_per_hour: SupportsIndex | None
    max_tokens_per_day: SupportsIndex | None
    max_requests_per_hour: SupportsIndex | None
    max_requests_per_day: SupportsIndex | None
    max_tokens_per_minute: SupportsIndex | None
    max_requests_per_minute: SupportsIndex | None
    max_tokens_per_month: SupportsIndex | None
    max_requests_per_month: SupportsIndex | None
    token_weights: Sequence[SupportsFloat]
    unit: str
    burst_requests: SupportsIndex
    burst_tokens: SupportsIndex
    on_violation: ViolationAction | str
    grace_period_sec: SupportsFloat
    max_concurrent_requests: SupportsIndex | None
    cluster_concurrency: bool
    max_queued_requests: SupportsIndex
    shadow_limits: Sequence[Limit | str] | Set[Limit | str] | Limit | str


class QuotaChanges(QuotaFields, total=False):
    """The keyword arguments of `ResourceQuotaConfig.replace`: any field."""

    model_id: str


@dataclass(frozen=True, slots=True)
class ResourceQuotaConfig:
    """The limits of one model: a frozen value, which compares, hashes and pickles by its fields.

    A limit of None means unlimited; a limit of 0 admits nothing. Counts are integers from 0 to 2**62, given as anything
    with ``__index__``; rates and times are given as any real number; a bool is neither.

    Parameters
    ----------
    model_id : str
        1 to 255 bytes of UTF-8 without NUL.
    max_ram_mb, max_ssd_mb : int or None
        Most RAM and SSD space, in MB (2**20 bytes).
    max_requests_per_second, max_tokens_per_second : float or None
        Long-run rate, per second; 0.5 is one every two seconds, `math.inf` becomes None.
    max_tokens_per_hour, max_tokens_per_day : int or None
        Most tokens in any 3,600 s and in any 86,400 s, not just in windows aligned to the clock.
    max_requests_per_hour, max_requests_per_day : int or None
        Most requests in any 3,600 s and in any 86,400 s, not just in windows aligned to the clock.
    max_tokens_per_minute, max_requests_per_minute : int or None
        Most tokens and most requests in any 60 s: TPM and RPM.
    max_tokens_per_month, max_requests_per_month : int or None
        Most tokens and most requests in any 30 days.
    token_weights : sequence of three numbers
        What one input, one cached and one output token of a `Tokens` counts here; 0 or more, up to 6 decimals. A
        request counts the weighted sum, rounded up.
    unit : str
        How counts of tokens are shown: ``"tokens"``, or ``"usd"`` if they are millionths of a dollar.
    burst_requests, burst_tokens : int
        How far the model may run ahead of its rate, in requests and tokens; repaid from unused rate.
        0 makes the rate a strict limit on any single second.
    on_violation : ViolationAction or str
        What is done with a request that violates a limit; a name is converted to its member.
    grace_period_sec : float
        The longest that `acquire` delays or queues a request, in seconds; 0 or more, finite.
    max_concurrent_requests : int or None
        Most grants open at the same time.
    cluster_concurrency : bool
        Whether hosts that share limits share `max_concurrent_requests`, too; otherwise it is each host's.
    max_queued_requests : int
        Most requests that wait at the same time.
    shadow_limits : sequence of Limit or str
        Limits that are checked, counted and reported but never deny: for introducing a limit in production. `Limit`
        members or their names in any case, or a single one; kept as names in lower case, in the order of `Limit`.
        `Limit.QUEUE` is not one of them.

    Raises
    ------
    QuotaConfigError
        A value is not accepted. The error has the field, the value and the accepted range.

    Examples
    --------
    >>> quota = ResourceQuotaConfig("llama", max_requests_per_second=50, on_violation="reject")
    >>> quota.max_requests_per_second, quota.on_violation, quota.max_tokens_per_hour
    (50.0, <ViolationAction.REJECT: 'reject'>, 1000000)
    >>> quota.replace(max_tokens_per_hour=None).max_tokens_per_hour is None
    True
    >>> ResourceQuotaConfig("llama", max_ram_mb=-1)
    Traceback (most recent call last):
        ...
    modelquota.errors.QuotaConfigError: max_ram_mb=-1 is not accepted; expected an integer from 0 to 2**62 MB, \
or no limit (None; "unlimited" in a quota file)
    """

    model_id: str
    _: KW_ONLY
    max_ram_mb: int | None = 2048
    max_ssd_mb: int | None = 16384
    max_requests_per_second: float | None = 100.0
    max_tokens_per_second: float | None = 1000.0
    max_tokens_per_hour: int | None = 1_000_000
    max_tokens_per_day: int | None = 10_000_000
    max_requests_per_hour: int | None = 10_000
    max_requests_per_day: int | None = 100_000
    max_tokens_per_minute: int | None = None
    max_requests_per_minute: int | None = None
    max_tokens_per_month: int | None = None
    max_requests_per_month: int | None = None
    token_weights: tuple[float, float, float] = (1, 1, 1)
    unit: str = "tokens"
    burst_requests: int = 200
    burst_tokens: int = 10_000
    on_violation: ViolationAction = ViolationAction.THROTTLE
    grace_period_sec: float = 60.0
    max_concurrent_requests: int | None = None
    cluster_concurrency: bool = False
    max_queued_requests: int = 1000
    shadow_limits: tuple[str, ...] = ()

    if TYPE_CHECKING:  # a field accepts more types than the one it is stored in

        def __init__(self, model_id: str, **fields: Unpack[QuotaFields]) -> None: ...

    def __post_init__(self) -> None:
        for field, convert in _CONVERT.items():
            # Bypasses `frozen`, which protects the finished value, not its construction.
            object.__setattr__(self, field, convert(field, getattr(self, field)))

    @classmethod
    def unlimited(cls, model_id: str, **limits: Unpack[QuotaFields]) -> "ResourceQuotaConfig":
        """Make a config that sets only the limits that are given: every other limit that may be None is None.

        Fields that are not limits, such as ``burst_tokens`` and ``on_violation``, have their usual defaults.

        Raises
        ------
        QuotaConfigError
            A value is not accepted.
        TypeError
            Unknown field.

        Examples
        --------
        >>> quota = ResourceQuotaConfig.unlimited("llama", max_tokens_per_day=5_000)
        >>> quota.max_tokens_per_day, quota.max_ram_mb, quota.max_requests_per_second
        (5000, None, None)
        """
        require_fields(limits)
        fields: dict[str, Any] = {**dict.fromkeys(_OPTIONAL_LIMITS), **limits}
        return cls(model_id, **fields)

    def replace(self, **changes: Unpack[QuotaChanges]) -> "ResourceQuotaConfig":
        """Return a config with some fields changed; the others, and this config, stay as they are.

        Raises
        ------
        QuotaConfigError
            A value is not accepted.
        TypeError
            Unknown field.
        """
        require_fields(changes)
        fields: dict[str, Any] = {**dataclasses.asdict(self), **changes}
        return ResourceQuotaConfig(**fields)

    def to_dict(self) -> dict[str, str | int | float | list[str] | None]:
        """Return all fields as JSON values: the action as its name, no limit as None, limit names as a list.

        Examples
        --------
        >>> ResourceQuotaConfig("llama", max_ram_mb=None).to_dict()["max_ram_mb"] is None
        True
        """
        plain = {
            "on_violation": self.on_violation.value,
            "shadow_limits": list(self.shadow_limits),
            "token_weights": list(self.token_weights),
        }
        return {**dataclasses.asdict(self), **plain}

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "ResourceQuotaConfig":
        """Make a config from a mapping as `to_dict` returns it; all keys except ``model_id`` may be missing.

        Raises
        ------
        QuotaConfigError
            A value is not accepted, ``model_id`` is missing, or a key is not a field; the closest field is suggested.
        TypeError
            The argument is not a mapping.

        Examples
        --------
        >>> ResourceQuotaConfig.from_dict({"model_id": "llama", "max_ram": 1024})
        Traceback (most recent call last):
            ...
        modelquota.errors.QuotaConfigError: max_ram=1024 is not accepted; expected a field of a quota, \
perhaps max_ram_mb
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(f"from_dict takes a mapping of fields to values, got {type(mapping).__name__}")
        for key, value in mapping.items():
            if key not in _CONVERT:
                raise QuotaConfigError(str(key), value, _nearest_field(str(key)))
        return cls(**{"model_id": None, **mapping})


MODEL_ID_ACCEPTED: Final = (
    f"a str of 1 to {MAX_MODEL_ID_BYTES} bytes of UTF-8 without NUL; a meter has text before and after its '#'"
)
_NO_LIMIT = '"unlimited" in a quota file'

_Convert = Callable[[str, Any], object]


def plain_model_id(field: str, value: Any) -> str:
    """Return the id as a plain str."""
    try:
        # a plain str, since a subclass could override the methods that are called below
        plain = str.__str__(value) if isinstance(value, str) else ""
        of, mark, meter = plain.partition("#")
        if 0 < len(plain.encode()) <= MAX_MODEL_ID_BYTES and "\0" not in plain and (not mark or (of and meter)):
            return plain
    except UnicodeEncodeError:  # half of a surrogate pair
        pass
    raise QuotaConfigError(field, value, MODEL_ID_ACCEPTED)


def _action(field: str, value: Any) -> ViolationAction:
    try:
        return ViolationAction(value)
    except ValueError:
        names = ", ".join(repr(action.value) for action in ViolationAction)
        raise QuotaConfigError(field, value, f"one of {names}") from None


def _count(unit: str, *, may_be_none: bool = True) -> _Convert:
    """Make the converter of a field that counts something."""
    accepted = f"an integer from 0 to 2**62 {unit}" + (f", or no limit (None; {_NO_LIMIT})" if may_be_none else "")

    def convert(field: str, value: Any) -> int | None:
        if value is None and may_be_none:
            return None
        try:
            count = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            count = -1
        if 0 <= count <= MAX_COUNT:
            return count
        raise QuotaConfigError(field, value, accepted)

    return convert


def _is_real(value: object) -> bool:
    """True for real numbers, and for a Decimal, which is registered only as a Number; does not import `decimal`."""
    return isinstance(value, numbers.Real) or (
        isinstance(value, numbers.Number) and not isinstance(value, numbers.Complex)
    )


def _number(unit: str, *, may_be_none: bool = True) -> _Convert:
    """Make the converter of a field that may have a fractional part."""
    accepted = f"a finite number of {unit}, 0 or more" + (
        f", or no limit (None or inf; {_NO_LIMIT})" if may_be_none else ""
    )

    def convert(field: str, value: Any) -> float | None:
        if value is None and may_be_none:
            return None
        number = math.nan
        if type(value) is float:  # the core's own values, read a thousand times per scrape: skip the slow ABC checks
            number = value
        elif _is_real(value) and not isinstance(value, bool):
            # Not convertible, or beyond the range of a float.
            with contextlib.suppress(OverflowError, ValueError):
                number = float(value)
        if number == math.inf and may_be_none:
            return None
        if 0 <= number < math.inf:
            return number + 0.0  # turns -0.0 into 0.0
        raise QuotaConfigError(field, value, accepted)

    return convert


def _limit_names(field: str, value: Any) -> tuple[str, ...]:
    """Return the names of limits in lower case, each once, in the order of `Limit`."""
    if isinstance(value, str):  # a `Limit` is not a str
        given: Iterable[Any] = (value,)
    elif isinstance(value, Limit):
        given = (value,)
    elif isinstance(value, (Sequence, Set)) and not isinstance(value, (bytes, bytearray, memoryview)):
        given = tuple(value)
    else:
        given = (None,)
    names = {limit.name.lower() if isinstance(limit, Limit) else _lower(limit) for limit in given}
    if names.issubset(SHADOW_NAMES):
        return tuple(name for name in SHADOW_NAMES if name in names)
    raise QuotaConfigError(field, value, f"names of limits, each one of {', '.join(map(repr, SHADOW_NAMES))}")


def _lower(name: Any) -> str | None:
    """Return the name in lower case; None if it is not an ASCII str (lower() turns the Kelvin sign into a plain k)."""
    return str.lower(name) if isinstance(name, str) and name.isascii() else None


def _weights(field: str, value: Any) -> tuple[float, ...]:
    """Return three weights, each an int if it is whole, else a float."""
    accepted = "three numbers from 0 to 1,000,000 with up to 6 decimals, for input, cached and output tokens"
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes, bytearray)) or len(value) != 3:
        raise QuotaConfigError(field, value, accepted)
    weights = []
    for weight in value:
        number = math.nan
        if _is_real(weight) and not isinstance(weight, bool):
            with contextlib.suppress(OverflowError, ValueError):
                number = float(weight)
        if not 0 <= number <= MAX_WEIGHT or round(number, 6) != number:
            raise QuotaConfigError(field, value, accepted)
        weights.append(int(number) if number.is_integer() else number)
    return tuple(weights)


def _flag(field: str, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    raise QuotaConfigError(field, value, "True or False")


def _unit(field: str, value: Any) -> str:
    if isinstance(value, str) and value in UNITS:
        return UNITS[UNITS.index(value)]
    raise QuotaConfigError(field, value, f"one of {', '.join(map(repr, UNITS))}")


def _limit(record: LimitRecord) -> _Convert:
    """Make the converter of the field that sets a limit."""
    if record.is_rate:
        return _number(record.label)
    return _count(record.unit, may_be_none=record.limit is not Limit.QUEUE)


_CONVERTERS: Final[dict[str, _Convert]] = {
    "model_id": plain_model_id,
    **{record.quota_field: _limit(record) for record in CATALOGUE.values()},
    **{record.burst_field: _count(record.unit, may_be_none=False) for record in CATALOGUE.values() if record.is_rate},
    "token_weights": _weights,
    "unit": _unit,
    "cluster_concurrency": _flag,
    "on_violation": _action,
    "grace_period_sec": _number("seconds", may_be_none=False),
    "shadow_limits": _limit_names,
}
_FIELDS: Final = ResourceQuotaConfig.__dataclass_fields__
if not _CONVERTERS.keys() == _FIELDS.keys() == QuotaFields.__optional_keys__ | {"model_id"}:
    raise AssertionError("the fields of a quota are not those of the catalogue of limits")
_CONVERT: Final = {name: _CONVERTERS[name] for name in _FIELDS}

_OPTIONAL_LIMITS: Final = tuple(
    field.name for field in dataclasses.fields(ResourceQuotaConfig) if type(None) in get_args(field.type)
)


def require_fields(keywords: Iterable[str]) -> None:
    """Raise TypeError for a keyword that is not a field, as Python does, but suggest the closest field."""
    for keyword in keywords:
        if keyword not in _CONVERT:
            raise TypeError(f"unexpected keyword argument {keyword!r}; expected {_nearest_field(keyword)}")


def _nearest_field(name: str) -> str:
    """Return the part of an error message that suggests the closest field."""
    import difflib  # only for this error

    near = difflib.get_close_matches(name, _CONVERT, n=1)
    return f"a field of a quota, perhaps {near[0]}" if near else f"one of the fields {', '.join(_CONVERT)}"
