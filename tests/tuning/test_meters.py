"""Replays with kinds of tokens and meters."""

import numpy as np
import pytest
from factories import open_quota

from modelquota import Limit, load_quotas
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


def test_kinds_and_waits_do_not_go_together_yet(trace):
    quota = open_quota("llama", token_weights=(1, 0, 1), on_violation="queue")
    with pytest.raises(ValueError, match="wait=False"):
        replay(trace, {"llama": quota, "other": open_quota("other")}, wait=True)
