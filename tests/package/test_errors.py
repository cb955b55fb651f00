"""The errors: their place in the hierarchy, their attributes, their text, and that all of it survives pickling."""

import copy
import pathlib
import pickle

import pytest

from modelquota import errors
from modelquota.errors import (
    CapacityError,
    QuotaConfigError,
    QuotaError,
    QuotaFileError,
    StoreError,
    TraceError,
    UnknownModelError,
)
from modelquota.quota.limits import Limit, ViolationAction, ViolationType

ACCEPTED = "an integer from 0 to 2**62"
CASES = [
    (
        QuotaConfigError("max_ram_mb", -1, ACCEPTED),
        {"field": "max_ram_mb", "value": -1, "accepted": ACCEPTED},
        f"max_ram_mb=-1 is not accepted; expected {ACCEPTED}",
    ),
    (
        QuotaFileError(pathlib.Path("q.toml"), 'models."llama"', "max_ram_mb", "x", ACCEPTED),
        {"path": "q.toml", "table": 'models."llama"', "field": "max_ram_mb", "value": "x", "accepted": ACCEPTED},
        f"q.toml: [models.\"llama\"]: max_ram_mb='x' is not accepted; expected {ACCEPTED}",
    ),
    (
        QuotaFileError("q.toml", "", "model", 5, "a table"),
        {"path": "q.toml", "table": "", "field": "model", "value": 5},
        "q.toml: model=5 is not accepted; expected a table",
    ),
    (
        QuotaFileError("q.toml", "model", "", {}, "another table"),
        {"path": "q.toml", "table": "model", "field": "", "value": {}},
        "q.toml: [model] is not accepted; expected another table",
    ),
    (
        QuotaFileError("q.toml", "", "", "Invalid value (at line 2, column 7)", "TOML"),
        {"path": "q.toml", "table": "", "field": "", "value": "Invalid value (at line 2, column 7)"},
        "q.toml: Invalid value (at line 2, column 7); expected TOML",
    ),
    (
        UnknownModelError("llama"),
        {"model_id": "llama"},
        "no quota is set for model 'llama'; call set_quota for it first",
    ),
    (
        UnknownModelError("llama", "no quota for 'llama'; there is one for 'qwen'"),
        {"model_id": "llama"},
        "no quota for 'llama'; there is one for 'qwen'",
    ),
    (
        StoreError("read_only", "it is a replica"),
        {"kind": "read_only", "detail": "it is a replica"},
        "the store is not usable (read_only): it is a replica",
    ),
    (
        CapacityError(2),
        {"max_models": 2},
        "the table is full (2 models): call remove_quota(), or create the manager with a larger max_models",
    ),
    (
        TraceError("expected 3 columns, found 2", path=pathlib.Path("t.csv"), line=7, column=None),
        {"message": "expected 3 columns, found 2", "path": "t.csv", "line": 7, "column": None},
        "t.csv: line 7: expected 3 columns, found 2",
    ),
    (
        TraceError("found 'x'", "t.csv", 7, "ContextTokens"),
        {"message": "found 'x'", "path": "t.csv", "line": 7, "column": "ContextTokens"},
        "t.csv: line 7: column ContextTokens: found 'x'",
    ),
    (
        TraceError("the file is empty", "t.csv"),
        {"message": "the file is empty", "path": "t.csv", "line": None, "column": None},
        "t.csv: the file is empty",
    ),
]


@pytest.mark.parametrize(("error", "attributes", "text"), CASES)
def test_attributes_and_text(error: QuotaError, attributes: dict[str, object], text: str) -> None:
    assert {name: getattr(error, name) for name in attributes} == attributes
    assert str(error) == text


@pytest.mark.parametrize("error", [case[0] for case in CASES])
def test_errors_survive_pickling_and_copying(error: QuotaError) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error)
        assert str(other) == str(error)
        assert vars(other) == vars(error)


@pytest.mark.parametrize(
    ("error", "bases"),
    [
        (QuotaError, {Exception}),
        (QuotaConfigError, {QuotaError, ValueError}),
        (QuotaFileError, {QuotaConfigError}),
        (UnknownModelError, {QuotaError, KeyError}),
        (CapacityError, {QuotaError, RuntimeError}),
        (TraceError, {QuotaError, ValueError}),
    ],
)
def test_each_error_may_be_caught_as(error: type[QuotaError], bases: set[type[Exception]]) -> None:
    assert set(error.__bases__) == bases


def test_every_error_derives_from_the_base_and_says_when_it_is_raised() -> None:
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) == 12
    for error in found:
        assert issubclass(error, QuotaError)
        assert error.__doc__


def test_a_long_value_is_shortened_in_the_text_but_not_in_the_attribute() -> None:
    error = QuotaConfigError("model_id", "x" * 5000, "less")
    assert str(error) == f"model_id='{'x' * 79}... (5002 characters) is not accepted; expected less"
    assert error.value == "x" * 5000


def test_a_value_that_cannot_be_printed_is_shown_by_its_type() -> None:
    assert str(QuotaConfigError("max_ram_mb", 10**5000, "less")) == "max_ram_mb=<int> is not accepted; expected less"


@pytest.mark.parametrize(
    ("limit", "code", "violation_type", "label", "unit"),
    [
        (Limit.RAM, 1, ViolationType.RAM_LIMIT, "RAM", "MB"),
        (Limit.SSD, 2, ViolationType.SSD_LIMIT, "SSD", "MB"),
        (Limit.CONCURRENCY, 3, ViolationType.CONCURRENCY_LIMIT, "concurrent requests", "requests"),
        (Limit.REQUESTS_PER_SECOND, 4, ViolationType.RATE_LIMIT, "requests per second", "requests"),
        (Limit.TOKENS_PER_SECOND, 5, ViolationType.RATE_LIMIT, "tokens per second", "tokens"),
        (Limit.TOKENS_PER_MINUTE, 6, ViolationType.RATE_LIMIT, "tokens per minute", "tokens"),
        (Limit.REQUESTS_PER_MINUTE, 7, ViolationType.RATE_LIMIT, "requests per minute", "requests"),
        (Limit.TOKENS_PER_HOUR, 8, ViolationType.QUOTA_LIMIT, "tokens per hour", "tokens"),
        (Limit.REQUESTS_PER_HOUR, 9, ViolationType.QUOTA_LIMIT, "requests per hour", "requests"),
        (Limit.TOKENS_PER_DAY, 10, ViolationType.QUOTA_LIMIT, "tokens per day", "tokens"),
        (Limit.REQUESTS_PER_DAY, 11, ViolationType.QUOTA_LIMIT, "requests per day", "requests"),
        (Limit.TOKENS_PER_MONTH, 12, ViolationType.QUOTA_LIMIT, "tokens per month", "tokens"),
        (Limit.REQUESTS_PER_MONTH, 13, ViolationType.QUOTA_LIMIT, "requests per month", "requests"),
        (Limit.QUEUE, 14, None, "queued requests", "requests"),
    ],
)
def test_limits(limit: Limit, code: int, violation_type: ViolationType | None, label: str, unit: str) -> None:
    assert limit is Limit(code)
    assert (limit.violation_type, limit.label, limit.unit) == (violation_type, label, unit)


def test_the_words_of_actions_and_violation_types_in_the_order_of_their_codes() -> None:
    assert list(ViolationAction) == ["reject", "throttle", "warn", "queue"]
    assert list(ViolationType) == ["ram_limit", "ssd_limit", "rate_limit", "quota_limit", "concurrency_limit"]
    assert list(Limit) == list(range(1, 15))
