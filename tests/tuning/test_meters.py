"""Replays with kinds of tokens and meters."""

import pytest
from factories import open_quota

from modelquota import Limit, TraceError, load_quotas
from modelquota.tuning.replay import replay
from modelquota.tuning.trace import read_trace

HEADER = "TIMESTAMP,ContextTokens,CachedTokens,GeneratedTokens,Model\n"
ROWS = (
    "2023-11-16 18:17:01,2000,800,256,llama\n2023-11-16 18:17:00,10,0,5,other\n2023-11-16 18:17:02,100,100,10,llama\n"
)


@pytest.fixture
def trace(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(HEADER + ROWS)
    return read_trace(file)


def test_cached_tokens_are_part_of_the_context(trace):
    assert trace.context_tokens.tolist() == [10, 2000, 100]
    assert trace.cached_tokens.tolist() == [0, 800, 100]


def test_more_cached_tokens_than_context(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text(HEADER + ROWS + "2023-11-16 18:17:02,100,101,10,llama\n")
    with pytest.raises(TraceError, match="CachedTokens.*101 is more than the ContextTokens, 100") as error:
        read_trace(file)
    assert (error.value.line, error.value.column) == (5, "CachedTokens")


def test_a_trace_without_the_column(tmp_path):
    file = tmp_path / "trace.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:01,2000,256\n")
    trace = read_trace(file)
    assert trace.cached_tokens is None
    quotas = {
        "m": open_quota("m"),
        "m#out": open_quota("m#out", token_weights=(0, 0, 1), max_tokens_per_hour=255, on_violation="warn"),
    }
    (model,) = replay(trace, quotas).models
    assert (model.model_id, model.admitted, model.warned, model.tokens) == ("m", 1, 1, 2256)


@pytest.mark.parametrize(("budget", "admitted"), [(7_680, 1), (7_859, 1), (7_860, 2)])
def test_meters_decide(trace, budget, admitted):
    """1,200 input, 800 cached and 256 output tokens cost 7,680; 100 cached and 10 output tokens 180."""
    meter = open_quota("llama#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=budget)
    quotas = {quota.model_id: quota for quota in (open_quota("llama"), open_quota("other"), meter)}
    report = replay(trace, quotas)
    models = {model.model_id: model for model in report.models}
    assert (models["llama"].admitted, models["other"].admitted) == (admitted, 1)
    assert models["llama"].denied[Limit.TOKENS_PER_MONTH] == 2 - admitted
    assert models["llama"].warned == 0
    assert models["llama"].tokens == 2_366


def test_meters_of_a_pattern_decide(trace, tmp_path):
    file = tmp_path / "quotas.toml"
    file.write_text("""
[defaults]
max_tokens_per_second = "unlimited"
[defaults."l*"]
[defaults."l*#out"]
token_weights = [0, 0, 1]
max_tokens_per_hour = 260
[models.other]
""")
    models = {model.model_id: model for model in replay(trace, load_quotas(file)).models}
    assert models["llama"].denied[Limit.TOKENS_PER_HOUR] == 1
