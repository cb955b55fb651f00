"""Replays with kinds of tokens and meters."""

from dataclasses import replace

import numpy as np
import pytest
from factories import open_quota

from modelquota import Limit, load_quotas
from modelquota.quota.file import Quotas
from modelquota.tuning.replay import replay
from modelquota.tuning.trace import Trace


@pytest.fixture
def trace():
    """1,200 input, 800 cached and 256 output tokens cost 7,680 at the meter; 100 cached and 10 output tokens 180."""
    counts = ([10, 1200, 0], [0, 800, 100], [5, 256, 10])
    inputs, cached, outputs = (np.array(column, np.int64) for column in counts)
    return Trace(
        path="made here",
        times_ns=np.array([0, 10**9, 2 * 10**9], np.int64),
        input_tokens=inputs,
        cached_tokens=cached,
        output_tokens=outputs,
        model_index=np.array([0, 1, 1], np.int32),
        models=("other", "llama"),
    )


@pytest.mark.parametrize(("budget", "admitted"), [(7_680, 1), (7_859, 1), (7_860, 2)])
def test_meters_decide(trace, budget, admitted):
    meter = open_quota("llama#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=budget)
    quotas = {quota.model_id: quota for quota in (open_quota("llama"), open_quota("other"), meter)}
    models = {model.model_id: model for model in replay(trace, quotas, wait=False).models}
    assert (models["llama"].admitted, models["other"].admitted) == (admitted, 1)
    assert models["llama"].denied[Limit.TOKENS_PER_MONTH] == 2 - admitted
    assert models["llama"].warned == 0
    assert models["llama"].tokens == 2_366


def test_meters_of_a_pattern_decide(trace, tmp_path):
    file = tmp_path / "quotas.toml"
    file.write_text("""
[defaults]
max_tokens_per_second = "unlimited"
on_violation = "reject"
[defaults."l*"]
[defaults."l*#out"]
token_weights = [0, 0, 1]
max_tokens_per_hour = 260
[models.other]
""")
    models = {model.model_id: model for model in replay(trace, load_quotas(file)).models}
    assert models["llama"].denied[Limit.TOKENS_PER_HOUR] == 1


def test_requests_wait_for_a_meter(trace):
    """Both fit a minute of the meter only apart: 7,680 and then 180, in the next window of 61 slots of a second."""
    meter = open_quota(
        "llama#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_minute=7_680, on_violation="queue"
    )
    quotas = {quota.model_id: quota for quota in (open_quota("llama", grace_period_sec=90), open_quota("other"), meter)}
    report = replay(trace, {**quotas, "llama#usd": meter.replace(grace_period_sec=90)}, wait=True)
    models = {model.model_id: model for model in report.models}
    assert (models["llama"].admitted, models["llama"].waited, models["other"].waited) == (2, 1, 0)
    assert models["llama"].longest_wait_ms == 60_000  # it came a second after the first, and waits until second 62
    late = replay(trace, {**quotas, "llama#usd": meter.replace(grace_period_sec=59)}, wait=True)
    assert {model.model_id: model.admitted for model in late.models} == {"llama": 1, "other": 1}


def test_what_is_reserved_by_kind_is_settled_by_kind(trace):
    """Reserved 2,000 input and 256 output tokens, at 9,840 together; settled at 7,680."""
    meter = open_quota("llama#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_hour=9_840)
    quotas = {quota.model_id: quota for quota in (open_quota("llama"), open_quota("other"), meter)}
    ends = replace(
        trace, durations_ns=np.full(3, 10**9, np.int64), estimated_tokens=np.array([-1, 2_256, 500], np.int64)
    )
    models = {model.model_id: model for model in replay(ends, quotas).models}
    assert (models["llama"].admitted, models["other"].admitted) == (1, 1)  # 300 and 6,000 more are too much
    less = replace(ends, estimated_tokens=np.array([-1, 2_256, 110], np.int64))
    models = {model.model_id: model for model in replay(less, quotas).models}
    assert models["llama"].admitted == 2  # 300 + 150 fit what was given back
    quotas["llama#usd"] = meter.replace(max_tokens_per_hour=9_839)
    assert {model.model_id: model.admitted for model in replay(less, quotas).models} == {"llama": 1, "other": 1}


def test_a_user_has_meters_too(trace):
    output = open_quota("user:*", token_weights=(0, 0, 1), max_tokens_per_day=9)
    quotas = Quotas(
        {"llama": open_quota("llama"), "other": open_quota("other")},
        {
            "user:*": open_quota("user:*"),
            "user:*#out": output,
        },
    )
    by_user = replace(trace, user_index=np.array([0, 1, 0], np.int32), users=("ann", "bob"))
    report = replay(by_user, quotas, per_user=True)
    assert {user.model_id: (user.admitted, user.requests) for user in report.users} == {
        "user:ann": (1, 2),
        "user:bob": (0, 1),
    }


def test_a_meter_that_warns_is_counted(trace):
    meter = open_quota("llama#out", token_weights=(0, 0, 1), max_tokens_per_day=9, on_violation="warn")
    quotas = {quota.model_id: quota for quota in (open_quota("llama"), open_quota("other"), meter)}
    for wait in (False, True):
        models = {model.model_id: model for model in replay(trace, quotas, wait=wait).models}
        assert (models["llama"].admitted, models["llama"].warned, models["other"].warned) == (2, 2, 0)
