"""`ResourceQuotaConfig`: defaults, what each field accepts and keeps, the text of every refusal, round trips."""

import copy
import dataclasses
import enum
import json
import math
import pickle
import typing
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelquota.errors import QuotaConfigError
from modelquota.quota.config import MAX_COUNT, QuotaChanges, QuotaFields, ResourceQuotaConfig
from modelquota.quota.limits import SHADOW_NAMES, Limit, ViolationAction, shadow_mask, shadow_names

NO_LIMIT = ', or no limit (None; "unlimited" in a quota file)'
NO_RATE_LIMIT = ', or no limit (None or inf; "unlimited" in a quota file)'
ACCEPTED_COUNTS = {
    "max_ram_mb": "an integer from 0 to 2**62 MB" + NO_LIMIT,
    "max_ssd_mb": "an integer from 0 to 2**62 MB" + NO_LIMIT,
    "max_tokens_per_hour": "an integer from 0 to 2**62 tokens" + NO_LIMIT,
    "max_tokens_per_day": "an integer from 0 to 2**62 tokens" + NO_LIMIT,
    "max_requests_per_hour": "an integer from 0 to 2**62 requests" + NO_LIMIT,
    "max_requests_per_day": "an integer from 0 to 2**62 requests" + NO_LIMIT,
    "max_concurrent_requests": "an integer from 0 to 2**62 requests" + NO_LIMIT,
    "burst_requests": "an integer from 0 to 2**62 requests",
    "burst_tokens": "an integer from 0 to 2**62 tokens",
    "max_queued_requests": "an integer from 0 to 2**62 requests",
}
ACCEPTED_NUMBERS = {
    "max_requests_per_second": "a finite number of requests per second, 0 or more" + NO_RATE_LIMIT,
    "max_tokens_per_second": "a finite number of tokens per second, 0 or more" + NO_RATE_LIMIT,
    "grace_period_sec": "a finite number of seconds, 0 or more",
}
COUNTS = list(ACCEPTED_COUNTS)
NUMBERS = list(ACCEPTED_NUMBERS)
NEVER_NONE = ["burst_requests", "burst_tokens", "max_queued_requests", "grace_period_sec"]
FLAGS = ["cluster_concurrency"]
ACCEPTED_NAMES = f"names of limits, each one of {str(SHADOW_NAMES)[1:-1]}"
FIELDS = [field.name for field in dataclasses.fields(ResourceQuotaConfig)]


def kept(field: str, value: typing.Any) -> typing.Any:
    """What a config keeps of a value given for a field."""
    changes: dict[str, typing.Any] = {field: value}
    return getattr(ResourceQuotaConfig("llama").replace(**changes), field)


def refusal(**fields: typing.Any) -> str:
    """Make a config that must be refused; return the text of the refusal."""
    with pytest.raises(QuotaConfigError) as caught:
        ResourceQuotaConfig(**({"model_id": "llama"} | fields))
    assert {caught.value.field: caught.value.value} == fields
    return str(caught.value)


def test_defaults() -> None:
    assert ResourceQuotaConfig("llama").to_dict() == {
        "model_id": "llama",
        "max_ram_mb": 2048,
        "max_ssd_mb": 16384,
        "max_requests_per_second": 100.0,
        "max_tokens_per_second": 1000.0,
        "max_tokens_per_hour": 1_000_000,
        "max_tokens_per_day": 10_000_000,
        "max_requests_per_hour": 10_000,
        "max_requests_per_day": 100_000,
        "max_tokens_per_minute": None,
        "max_requests_per_minute": None,
        "max_tokens_per_month": None,
        "max_requests_per_month": None,
        "token_weights": [1, 1, 1],
        "unit": "tokens",
        "burst_requests": 200,
        "burst_tokens": 10_000,
        "on_violation": "throttle",
        "grace_period_sec": 60.0,
        "max_concurrent_requests": None,
        "cluster_concurrency": False,
        "max_queued_requests": 1000,
        "shadow_limits": [],
    }


@pytest.mark.parametrize("named", [{}, {"max_tokens_per_day": 5}, {"max_ram_mb": 0, "max_requests_per_second": 0.5}])
def test_unlimited_has_no_limit_but_those_named(named: typing.Any) -> None:
    config = ResourceQuotaConfig.unlimited("llama", **named, on_violation="warn", burst_tokens=7)
    others = {field: value for field, value in ResourceQuotaConfig("llama").to_dict().items() if field in NEVER_NONE}
    assert config.to_dict() == {
        **dict.fromkeys(FIELDS, None),
        **others,
        **dict.fromkeys(FLAGS, False),
        "model_id": "llama",
        "shadow_limits": [],
        "token_weights": [1, 1, 1],
        "unit": "tokens",
        **named,
        "on_violation": "warn",
        "burst_tokens": 7,
    }


def test_unlimited_judges_values_and_names() -> None:
    with pytest.raises(QuotaConfigError, match=r"^max_ram_mb=-1 is not accepted; expected an integer from 0"):
        ResourceQuotaConfig.unlimited("llama", max_ram_mb=-1)
    with pytest.raises(QuotaConfigError, match="^model_id='' is not accepted"):
        ResourceQuotaConfig.unlimited("")
    with pytest.raises(TypeError, match=r"^unexpected keyword argument 'max_ram'; expected .* perhaps max_ram_mb$"):
        ResourceQuotaConfig.unlimited("llama", max_ram=1)  # type: ignore[call-arg]


def test_only_the_model_id_may_be_positional() -> None:
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        ResourceQuotaConfig("llama", 1024)  # type: ignore[call-arg]
    assert ResourceQuotaConfig(model_id="llama") == ResourceQuotaConfig("llama")


def test_the_types_offered_to_callers_name_every_field() -> None:
    assert list(typing.get_type_hints(QuotaFields)) == FIELDS[1:]
    assert set(typing.get_type_hints(QuotaChanges)) == set(FIELDS)


@pytest.mark.parametrize(
    "model_id", ["a", "llama-3.2-1b", "acme/bob", " ", "a\nb", "x" * 255, "é" * 127, "通义千问", "a#b", "a##"]
)
def test_model_ids(model_id: str) -> None:
    assert ResourceQuotaConfig(model_id).model_id == model_id


@pytest.mark.parametrize(
    "model_id", ["", "a\0b", "\ud800", "x" * 256, "é" * 128, b"llama", None, 7, "#", "a#", "#a", "##"]
)
def test_refused_model_ids(model_id: object) -> None:
    text = refusal(model_id=model_id)
    assert text.startswith("model_id=")
    assert text.endswith(
        " is not accepted; expected a str of 1 to 255 bytes of UTF-8 without NUL; "
        "a meter has text before and after its '#'"
    )


@pytest.mark.parametrize("given_id", [np.str_("llama"), enum.StrEnum("Model", {"LLAMA": "llama"}).LLAMA])  # type: ignore[attr-defined]
def test_a_subclass_of_str_is_kept_as_str(given_id: str) -> None:
    model_id = ResourceQuotaConfig(given_id).model_id
    assert type(model_id) is str
    assert model_id == "llama"


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [0, 1, MAX_COUNT, np.int64(7), np.uint8(7), enum.IntEnum("Seven", {"A": 7}).A])  # type: ignore[attr-defined]
def test_counts_are_kept_as_int(field: str, value: typing.SupportsIndex) -> None:
    count = kept(field, value)
    assert type(count) is int
    assert count == value


@pytest.mark.parametrize("field", COUNTS)
@pytest.mark.parametrize("value", [-1, MAX_COUNT + 1, 1.0, math.inf, math.nan, True, False, np.True_, "1", "unlimited"])
def test_refused_counts(field: str, value: object) -> None:
    assert refusal(**{field: value}) == f"{field}={value!r} is not accepted; expected {ACCEPTED_COUNTS[field]}"


def test_a_count_of_more_digits_than_python_prints_is_refused_as_any_other() -> None:
    accepted = ACCEPTED_COUNTS["max_ram_mb"]
    assert refusal(max_ram_mb=10**5000) == f"max_ram_mb=<int> is not accepted; expected {accepted}"


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value", [0, 0.5, 3, 5e-324, 1.7e308, np.float32(0.5), np.int64(3), Fraction(1, 4), Decimal("0.25")]
)
def test_numbers_are_kept_as_float(field: str, value: typing.SupportsFloat) -> None:
    number = kept(field, value)
    assert type(number) is float
    assert number == value


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [-1, -5e-324, -math.inf, math.nan, 10**400, Decimal("sNaN"), True, np.True_, 1j, np.complex128(1), "1", [1.0]],
)
def test_refused_numbers(field: str, value: object) -> None:
    text = refusal(**{field: value})
    assert text.startswith(f"{field}=")
    assert text.endswith(f" is not accepted; expected {ACCEPTED_NUMBERS[field]}")


@pytest.mark.parametrize("field", NUMBERS)
def test_minus_zero_becomes_zero(field: str) -> None:
    assert math.copysign(1, kept(field, -0.0)) == 1


@pytest.mark.parametrize("field", [field for field in COUNTS + NUMBERS if field not in NEVER_NONE])
def test_none_is_no_limit(field: str) -> None:
    assert kept(field, None) is None


@pytest.mark.parametrize("field", FLAGS)
@pytest.mark.parametrize("value", [1, 0, None, "true", np.True_])
def test_a_flag_is_a_bool_and_nothing_else(field: str, value: object) -> None:
    assert refusal(**{field: value}) == f"{field}={value!r} is not accepted; expected True or False"
    assert kept(field, True) is True


@pytest.mark.parametrize("field", NEVER_NONE)
def test_none_where_there_must_be_a_value(field: str) -> None:
    accepted = (ACCEPTED_COUNTS | ACCEPTED_NUMBERS)[field]
    assert refusal(**{field: None}) == f"{field}=None is not accepted; expected {accepted}"


@pytest.mark.parametrize("field", ["max_requests_per_second", "max_tokens_per_second"])
def test_an_infinite_rate_is_no_limit(field: str) -> None:
    assert kept(field, math.inf) is None


def test_an_infinite_grace_period_is_refused() -> None:
    accepted = ACCEPTED_NUMBERS["grace_period_sec"]
    assert refusal(grace_period_sec=math.inf) == f"grace_period_sec=inf is not accepted; expected {accepted}"


@pytest.mark.parametrize("action", ViolationAction)
def test_an_action_or_its_name(action: ViolationAction) -> None:
    for value in (action, action.value):
        assert ResourceQuotaConfig("llama", on_violation=value).on_violation is action


@pytest.mark.parametrize("value", ["REJECT", "deny", "", None, 0, ["warn"]])
def test_refused_actions(value: object) -> None:
    expected = "one of 'reject', 'throttle', 'warn', 'queue'"
    assert refusal(on_violation=value) == f"on_violation={value!r} is not accepted; expected {expected}"


@pytest.mark.parametrize(
    ("value", "names"),
    [
        ([], ()),
        ((Limit.RAM,), ("ram",)),
        (Limit.TOKENS_PER_DAY, ("tokens_per_day",)),
        ("Tokens_Per_Hour", ("tokens_per_hour",)),
        (np.str_("ssd"), ("ssd",)),
        (["REQUESTS_PER_DAY", "ram", Limit.RAM, "Ram", Limit.CONCURRENCY], ("ram", "concurrency", "requests_per_day")),
        (frozenset({"ssd", Limit.RAM}), ("ram", "ssd")),
        (dict.fromkeys(SHADOW_NAMES).keys(), SHADOW_NAMES),
    ],
)
def test_names_of_limits_are_kept_in_lower_case_each_once_in_their_order(value: typing.Any, names: object) -> None:
    shadow = kept("shadow_limits", value)
    assert shadow == names
    assert {type(name) for name in shadow} <= {str}
    assert type(shadow) is tuple
    assert hash(ResourceQuotaConfig("m", shadow_limits=value)) == hash(ResourceQuotaConfig("m", shadow_limits=shadow))


@pytest.mark.parametrize(
    "value",
    [
        "queue", Limit.QUEUE, ["ram", "queue"], [Limit.QUEUE], "", "all", [""], ["ram", 1], [6], 6, 0, True, None,
        b"ram", b"", bytearray(), {"ram": 1}, ["ram", None], [["ram"]], ["ſsd"], "ram,ssd", "to\u212aens_per_day",
    ],
)  # fmt: skip
def test_refused_names_of_limits(value: object) -> None:
    assert refusal(shadow_limits=value) == f"shadow_limits={value!r} is not accepted; expected {ACCEPTED_NAMES}"


def test_every_limit_but_the_queue_may_be_a_shadow() -> None:
    assert [Limit[name.upper()] for name in SHADOW_NAMES] == [limit for limit in Limit if limit is not Limit.QUEUE]


@given(st.sets(st.sampled_from(SHADOW_NAMES)))
def test_the_mask_of_shadow_limits_has_a_bit_for_each(names: set[str]) -> None:
    config = ResourceQuotaConfig("llama", shadow_limits=names)
    mask = shadow_mask(config)
    assert mask == sum(1 << Limit[name.upper()] for name in names)
    assert shadow_names(mask) == config.shadow_limits
    assert shadow_names(mask | 1 | 1 << Limit.QUEUE | 1 << 40) == config.shadow_limits


def test_it_is_frozen_and_slotted() -> None:
    config = ResourceQuotaConfig("llama")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'max_ram_mb'"):
        config.max_ram_mb = 1  # type: ignore[misc]
    assert not hasattr(config, "__dict__")


def test_replace_leaves_the_original_alone() -> None:
    config = ResourceQuotaConfig("llama", max_ram_mb=1024)
    other = config.replace(model_id="qwen", burst_tokens=5)
    assert (other.model_id, other.max_ram_mb, other.burst_tokens) == ("qwen", 1024, 5)
    assert config == ResourceQuotaConfig("llama", max_ram_mb=1024)


def test_replace_judges_values_and_names() -> None:
    config = ResourceQuotaConfig("llama")
    with pytest.raises(QuotaConfigError, match=r"^burst_tokens=-1 is not accepted; expected an integer from 0"):
        config.replace(burst_tokens=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_ram'"):
        config.replace(max_ram=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("key", "near"),
    [("max_ram", "max_ram_mb"), ("tokens_per_hour", "max_tokens_per_hour"), ("on_violations", "on_violation")],
)
def test_from_dict_names_the_field_nearest_to_an_unknown_one(key: str, near: str) -> None:
    with pytest.raises(QuotaConfigError) as caught:
        ResourceQuotaConfig.from_dict({"model_id": "llama", key: 5})
    assert str(caught.value) == f"{key}=5 is not accepted; expected a field of a quota, perhaps {near}"


@pytest.mark.parametrize("key", ["zzz", 7, None])
def test_from_dict_names_all_fields_where_none_is_near(key: object) -> None:
    with pytest.raises(QuotaConfigError) as caught:
        ResourceQuotaConfig.from_dict({"model_id": "llama", key: 5})  # type: ignore[dict-item]
    assert str(caught.value) == f"{key}=5 is not accepted; expected one of the fields {', '.join(FIELDS)}"


def test_from_dict_without_a_model_id() -> None:
    with pytest.raises(QuotaConfigError, match=r"^model_id=None is not accepted; expected a str of 1 to 255 bytes"):
        ResourceQuotaConfig.from_dict({"max_ram_mb": 5})


def test_from_dict_of_something_else() -> None:
    with pytest.raises(TypeError, match=r"^from_dict takes a mapping of fields to values, got list$"):
        ResourceQuotaConfig.from_dict(["llama"])  # type: ignore[arg-type]


def _some(values: st.SearchStrategy[typing.Any], field: str) -> st.SearchStrategy[typing.Any]:
    return values if field in NEVER_NONE else st.none() | values


IDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=63).filter(
    lambda name: "#" not in name or all(name.partition("#")[::2])
)
CONFIGS = st.builds(
    ResourceQuotaConfig,
    IDS,
    on_violation=st.sampled_from(ViolationAction),
    shadow_limits=st.lists(st.sampled_from([*SHADOW_NAMES, Limit.SSD])),
    cluster_concurrency=st.booleans(),
    **{field: _some(st.integers(0, MAX_COUNT), field) for field in COUNTS},
    **{field: _some(st.floats(0, allow_infinity=False), field) for field in NUMBERS},
)


@given(CONFIGS)
def test_round_trip_by_dict_and_json(config: ResourceQuotaConfig) -> None:
    as_dict = config.to_dict()
    assert list(as_dict) == FIELDS
    assert {type(value) for value in as_dict.values()} <= {str, int, float, list, bool, type(None)}
    assert ResourceQuotaConfig.from_dict(as_dict) == config
    assert ResourceQuotaConfig.from_dict(json.loads(json.dumps(as_dict))) == config


@given(CONFIGS)
def test_round_trip_by_pickle_copy_and_repr(config: ResourceQuotaConfig) -> None:
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert other == config
        assert hash(other) == hash(config)
    names = {"ResourceQuotaConfig": ResourceQuotaConfig}
    shown = repr(config).replace(repr(config.on_violation), repr(config.on_violation.value))
    assert eval(shown, names) == config


@given(CONFIGS, CONFIGS)
def test_replacing_every_field_makes_the_other_config(one: ResourceQuotaConfig, other: ResourceQuotaConfig) -> None:
    assert one.replace(**other.to_dict()) == other  # type: ignore[arg-type]
    assert (one == other) == (one.to_dict() == other.to_dict())
