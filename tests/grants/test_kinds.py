"""Grants over kinds of tokens: what is reserved, counted and settled at a model and at its meters."""

import numpy as np
import pytest
from factories import make_manager, open_quota, used

from modelquota import GrantClosedError, Limit, QuotaExceededError, Tokens

USD = (3, 0.3, 15)


def metered(**limits):
    return make_manager(
        open_quota("m"),
        open_quota("m#output", token_weights=(0, 0, 1)),
        open_quota("m#usd", unit="usd", token_weights=USD, **limits),
    )


def charged(manager):
    return [used(manager, model_id) for model_id in ("m", "m#output", "m#usd")]


def test_settling_by_kind_replaces_an_estimate_of_either_sort():
    manager = metered()
    grant = manager.reserve("m", 500)
    assert charged(manager) == [500, 500, 500]
    grant.settle(Tokens(100, 10, 20))
    assert charged(manager) == [130, 20, 603]
    assert (grant.tokens, grant.estimated_tokens) == (Tokens(100, 10, 20), 500)
    grant.settle(Tokens(100, 10, 20))
    with pytest.raises(GrantClosedError):
        grant.settle(130)
    grant.release()
    grant = manager.reserve("m", Tokens(output=10))
    grant.settle(7)
    assert charged(manager) == [137, 27, 610]
    grant.release()


def test_what_add_counts_replaces_the_output_tokens_only():
    manager = metered()
    with manager.reserve("m", Tokens(100, 50, 40)) as grant:
        for _ in range(25):
            assert grant.add(1)
        assert grant.tokens == Tokens(100, 50, 25)
        assert charged(manager) == [190, 40, 915]
    assert charged(manager) == [175, 25, 690]


def test_add_within_the_estimate_touches_no_shared_state():
    manager = metered()
    grant = manager.reserve("m", Tokens(100, 50, 40))

    def state():
        return b"".join(array.tobytes() for array in manager._arrays()[1:])

    before = state()
    assert all(grant.add(1) for _ in range(40))
    assert state() == before
    assert grant.add(1)
    assert state() != before
    grant.cancel()


def test_a_plain_estimate_covers_as_many_output_tokens_as_the_heaviest_weight_leaves():
    manager = metered()
    grant = manager.reserve("m", 150)
    assert grant.add(10)
    assert charged(manager) == [150, 150, 150]
    assert grant.add(1)
    assert charged(manager) == [150, 150, 26 * 15]  # a chunk of 16 output tokens
    grant.release()
    assert charged(manager) == [11, 11, 165]


@pytest.mark.parametrize("limit", [600, 601, 614, 615])
def test_a_stream_stops_at_the_meter_that_is_spent_first(limit):
    manager = metered(max_tokens_per_month=limit)
    grant = manager.reserve("m", Tokens(output=1))
    count = 0
    while grant.add(1):
        count += 1
    assert count == limit // 15
    assert grant.limit_reached
    grant.release()
    assert charged(manager) == [count + 1, count + 1, 15 * (count + 1)]  # what was generated is charged
    assert manager.check_quota("m", 1).model_id == "m#usd"


@pytest.mark.parametrize(
    ("output", "cents", "first"), [(300, 1, "llama#output"), (600, 0.9, "acme#usd"), (600, 1, "acme#usd")]
)
def test_a_stream_over_two_ids_stops_at_the_meter_that_is_spent_first(output, cents, first):
    """1,200 input and 800 cached tokens cost 3,840 millionths of a dollar, and each output token another 15."""
    budget = int(cents * 10_000)
    manager = make_manager(
        open_quota("llama"),
        open_quota("llama#output", token_weights=(0, 0, 1), max_tokens_per_minute=output),
        open_quota("acme"),
        open_quota("acme#usd", unit="usd", token_weights=USD, max_tokens_per_month=budget),
    )
    grant = manager.reserve(("acme", "llama"), Tokens(input=1_200, cached=800, output=256))
    count = 0
    while grant.add(1):
        count += 1
    assert count == min(output, (budget - 3_840) // 15)
    grant.release()
    ids = ("acme", "llama", "llama#output", "acme#usd")
    count += 1  # the last one was generated too
    assert [used(manager, model_id) for model_id in ids] == [2_000 + count, 2_000 + count, count, 3_840 + 15 * count]
    denied = manager.check_quota(("acme", "llama"), Tokens(output=1))
    assert (denied.allowed, denied.model_id) == (False, first)


def test_a_failure_refunds_and_a_success_keeps_the_estimate_at_every_meter():
    manager = metered()
    with pytest.raises(KeyError), manager.reserve("m", Tokens(1, 2, 3)):
        raise KeyError
    assert charged(manager) == [0, 0, 0]
    with manager.reserve("m", Tokens(1, 2, 3)):
        pass
    assert charged(manager) == [6, 3, 49]  # 3 + 0.6 + 45, rounded up
    manager.reserve("m", Tokens(1, 2, 3)).cancel()
    assert charged(manager) == [6, 3, 49]
    assert [manager.get_usage(model_id).requests_this_hour for model_id in ("m", "m#output", "m#usd")] == [2, 2, 2]


def test_a_meter_that_comes_or_goes_while_a_grant_is_open():
    manager = make_manager(open_quota("m"), open_quota("m#old"))
    grant = manager.reserve("m", 10)
    manager.remove_quota("m#old")
    manager.set_quota(open_quota("m#old"))
    manager.set_quota(open_quota("m#new"))
    grant.settle(25)
    grant.release()
    assert [used(manager, model_id) for model_id in ("m", "m#old", "m#new")] == [25, 0, 0]
    assert manager.get_usage("m#old").concurrent_requests == 0


def test_many_grants_at_once():
    manager = metered(max_tokens_per_hour=1_000)
    codes = manager.codes(["m", "m", "m"])
    out = np.full(3, 9, np.uint8)
    grants = manager.reserve_many(codes, np.array([[10, 0, 10], [0, 0, 70], [10, 10, 1]]), out=out)
    assert out.tolist() == [0, Limit.TOKENS_PER_HOUR, 0]
    assert [grant and grant.model_ids for grant in grants] == [
        ("m", "m#output", "m#usd"),
        None,
        ("m", "m#output", "m#usd"),
    ]
    assert [grant and grant.estimated_tokens for grant in grants] == [Tokens(10, 0, 10), None, Tokens(10, 10, 1)]
    manager.settle_many([grants[0], grants[2]], [Tokens(10, 0, 5), 8])
    assert charged(manager) == [23, 13, 113]
    with pytest.raises(ValueError, match=r"codes\[1\] is 5, which is no model's code"):
        manager.reserve_many(np.array([codes[0], 5]), 1)
    for grant in (grants[0], grants[2]):
        grant.release()


def test_the_error_names_the_meter():
    manager = metered(max_tokens_per_hour=10)
    with pytest.raises(QuotaExceededError) as error:
        manager.reserve("m", Tokens(output=1))
    assert error.value.result.model_id == "m#usd"
    assert error.value.result.never_fits
