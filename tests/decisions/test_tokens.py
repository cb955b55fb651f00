"""Kinds of tokens: what a request counts where tokens are weighted, to the last decimal."""

import pickle

import numpy as np
import pytest
from factories import make_manager, open_quota, used

from modelquota import ManualClock, QuotaConfigError, ResourceQuotaConfig, Tokens, load_quotas

MANY = 2**62


def test_a_value():
    tokens = Tokens(input=1200, cached=800, output=256)
    assert tokens.total == 2256
    assert tokens == Tokens(1200, 800, 256) != Tokens(1200, 800)
    assert hash(tokens) == hash(Tokens(1200, 800, 256))
    assert pickle.loads(pickle.dumps(tokens)) == tokens
    assert repr(tokens) == "Tokens(input=1200, cached=800, output=256)"
    assert tokens.replace(output=0) == Tokens(1200, 800)
    assert Tokens(np.int64(3)) == Tokens(3)
    with pytest.raises(AttributeError):
        tokens.output = 1


@pytest.mark.parametrize("count", [True, 1.0, "1", None])
def test_a_count_is_an_integer(count):
    with pytest.raises(TypeError, match=r"output=.* is not accepted; expected an integer from 0 to 2\*\*62"):
        Tokens(output=count)


@pytest.mark.parametrize("counts", [(-1, 0, 0), (0, MANY + 1, 0), (MANY, 1, 0)])
def test_a_count_has_bounds(counts):
    with pytest.raises(ValueError, match=r"is not accepted; expected an integer from 0 to 2\*\*62"):
        Tokens(*counts)


@pytest.mark.parametrize(
    ("weights", "tokens", "count"),
    [
        ((1, 1, 1), Tokens(1200, 800, 256), 2256),
        ((0, 0, 1), Tokens(1200, 800, 256), 256),
        ((3, 0.3, 15), Tokens(1200, 800, 256), 7680),
        ((0.333333, 0, 0), Tokens(3), 1),
        ((0.333334, 0, 0), Tokens(3), 2),  # 1.000002
        ((0.000001, 0.000001, 0.000001), Tokens(333_333, 333_333, 333_334), 1),  # rounded once, not three times
        ((0.000001, 0, 0), Tokens(1_000_001), 2),
        ((0.1, 0.2, 0), Tokens(1, 1), 1),  # 0.30000000000000004 in floats
        ((0.1, 0.2, 0.7), Tokens(1, 1, 1), 1),
        ((999_999.999999, 0, 0), Tokens(1_000_000), 999_999_999_999),
        ((1_000_000, 0, 0), Tokens(MANY), MANY),
        ((0.000001, 0, 0), Tokens(MANY), -(-MANY // 10**6)),
        ((0, 0, 0), Tokens(5, 5, 5), 0),
    ],
)
def test_weights_are_exact_and_rounded_up_once(weights, tokens, count):
    manager = make_manager(open_quota(token_weights=weights))
    assert manager.get_quota("m").token_weights == weights
    assert manager.check_quota("m", tokens)
    assert used(manager) == count
    other = make_manager(open_quota(token_weights=weights))
    assert other.check_many(other.codes(["m"]), np.array([[tokens.input, tokens.cached, tokens.output]])).tolist() == [
        0
    ]
    assert used(other) == count


def test_a_plain_count_is_not_weighted_in_a_check_and_is_output_where_it_was_generated():
    manager = make_manager(open_quota(token_weights=(3, 0.3, 15)))
    codes = manager.codes(["m", "m"])
    assert manager.check_quota("m", 7)
    assert manager.check_many(codes, [1, 2]).tolist() == [0, 0]
    assert used(manager) == 10
    manager.charge_many(codes, [1, 2])
    assert used(manager) == 10 + 3 * 15
    manager.charge_many(codes[:1], Tokens(cached=1, output=1))
    assert used(manager) == 55 + 16


def test_batches_take_tokens_in_three_shapes():
    manager = make_manager(open_quota(token_weights=(1, 0, 10)))
    codes = manager.codes(["m", "m"])
    manager.check_many(codes, Tokens(2, 5, 1))
    assert used(manager) == 24
    manager.check_many(codes, np.array([[1, 9, 0], [0, 9, 1]]))
    assert used(manager) == 35
    with pytest.raises(ValueError, match=r"estimated_tokens has shape \(2, 2\); give \(2,\), or \(2, 3\)"):
        manager.check_many(codes, np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"estimated_tokens\[1, 2\] is -1; give an integer, 0 .. 2\*\*62"):
        manager.check_many(codes, np.array([[1, 1, 1], [1, 1, -1]]))
    assert used(manager) == 35


@pytest.mark.parametrize(
    "weights",
    [(1, 1), (1, 1, -1), (1, 1, 0.0000001), (1, 1, 1_000_001), "111", (1, 1, True), (1, 1, float("nan")), None],
)
def test_weights_that_are_not_accepted(weights):
    with pytest.raises(
        QuotaConfigError, match=r"token_weights=.*three numbers from 0 to 1,000,000 with up to 6 decimals"
    ):
        ResourceQuotaConfig("m", token_weights=weights)


def test_a_unit_that_is_not_accepted():
    with pytest.raises(QuotaConfigError, match=r"unit='eur' is not accepted; expected one of 'tokens', 'usd'"):
        ResourceQuotaConfig("m", unit="eur")


def test_configs_keep_weights_and_unit(path):
    quota = open_quota("acme#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=500_000_000)
    assert pickle.loads(pickle.dumps(quota)) == quota
    assert ResourceQuotaConfig.from_dict(quota.to_dict()) == quota
    make_manager(quota, path=path).close()
    assert make_manager(path=path).get_quota("acme#usd") == quota


def test_a_quota_file_has_meters(tmp_path):
    file = tmp_path / "quotas.toml"
    file.write_text("""
[defaults]
max_ram_mb = "unlimited"
[defaults."user:*"]
max_tokens_per_hour = 1000
[defaults."user:*#usd"]
unit = "usd"
token_weights = [3, 0.3, 15]
max_tokens_per_month = 500_000
[models."llama#output"]
token_weights = [0, 0, 1]
max_tokens_per_minute = 20_000
""")
    quotas = load_quotas(file)
    assert quotas["llama#output"].token_weights == (0, 0, 1)
    assert quotas.patterns["user:*#usd"].token_weights == (3, 0.3, 15)
    assert quotas.patterns["user:*#usd"].unit == "usd"
    assert quotas.patterns["user:*#usd"].max_ram_mb is None


def test_time_moves_under_other_weights():
    """What was charged stays as it was counted; from then on the new weights count."""
    clock = ManualClock()
    manager = make_manager(open_quota(max_tokens_per_hour=100), clock=clock)
    assert manager.check_quota("m", Tokens(output=10))
    manager.update_quota("m", token_weights=(1, 1, 9))
    assert used(manager) == 10
    assert manager.check_quota("m", Tokens(output=10))
    assert not manager.check_quota("m", Tokens(output=1))
    assert used(manager) == 100
