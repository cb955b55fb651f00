"""Batches: the same decisions as single checks, and everything validated before anything is charged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelquota import Limit, ManualClock, ResourceQuotaConfig, ResourceQuotaManager, UnknownModelError

QUOTAS = [
    ResourceQuotaConfig("a", max_requests_per_second=3, burst_requests=0, on_violation="reject"),
    ResourceQuotaConfig("b", max_tokens_per_hour=100, burst_tokens=2000, on_violation="throttle"),
]


def state_of(manager):
    _, rows, cold_rows = manager._arrays()
    return rows.tobytes() + cold_rows[:8].tobytes(), manager.get_stats(), manager.clock and manager.clock.now_ns


def test_codes_and_outputs(manager):
    codes = manager.codes(["a", "b", "a", "a", "b", "a"])
    assert codes.dtype == np.int64
    retry = np.full(6, 77)
    out = manager.check_many(codes, [1, 60, 1, 1, 60, 1], retry_after_ms=retry)
    assert out.dtype == np.uint8
    assert out.tolist() == [0, 0, 0, 0, Limit.TOKENS_PER_HOUR, Limit.REQUESTS_PER_SECOND]
    assert retry[:4].tolist() == [0, 0, 0, 0]
    assert retry[4] == manager.check_quota("b", 60).retry_after_ms
    assert retry[5] == manager.check_quota("a", 1).retry_after_ms
    assert manager.check_many(codes[1:2], [101], retry_after_ms=retry[:1]).tolist() == [Limit.TOKENS_PER_HOUR]
    assert retry[0] == -1


def test_fills_and_returns_the_array_it_is_given(manager):
    out = np.full(2, 9, np.uint8)
    assert manager.check_many(manager.codes(["a", "b"]), 1, out) is out
    assert out.tolist() == [0, 0]


@pytest.mark.parametrize(
    "tokens", [5, np.int32(5), [5, 5], (5, 5), np.array([5, 5], np.uint8), np.array([5, 0, 5])[::2]]
)
def test_tokens_in_many_forms(manager, tokens):
    codes = manager.codes(iter(("a", "b")))
    assert manager.check_many(codes, tokens).tolist() == [0, 0]
    manager.charge_many(codes, tokens)
    assert manager.get_usage("a").tokens_this_day == 10
    assert manager.get_usage("a").requests_this_day == 1


def test_a_batch_up_to_the_first_that_is_denied(manager, clock):
    codes = manager.codes(["a", "b", "a", "a", "a", "b"])
    times_ns = clock.now_ns + np.array([0, 1, 2, 3, 4, 5])
    out = np.full(6, 9, np.uint8)
    decided = manager._check_until_denied(codes, np.ones(6, np.int64), out, times_ns)
    assert decided == 5
    assert out.tolist() == [0, 0, 0, 0, Limit.REQUESTS_PER_SECOND, 9]
    assert clock.now_ns == times_ns[4]
    assert manager.get_usage("b").requests_this_day == 1
    assert manager._check_until_denied(codes[5:], np.ones(1, np.int64), out[5:], times_ns[5:]) == 1
    assert (out[5], clock.now_ns) == (0, times_ns[5])
    assert manager._check_until_denied(codes[:0], np.ones(0, np.int64), out[:0], times_ns[:0]) == 0


def test_empty_batches(manager):
    before = state_of(manager)
    assert manager.codes([]).tolist() == []
    assert manager.check_many(manager.codes([]), []).tolist() == []
    assert manager.check_many([], [], times_ns=[]).tolist() == []
    manager.charge_many([], 5)
    assert state_of(manager) == before


def test_warn_admits_all(manager):
    manager.update_quota("a", on_violation="warn")
    assert manager.check_many(manager.codes(["a"] * 9), 1).tolist() == [0] * 9
    assert manager.get_usage("a").requests_this_second == 9
    assert manager.get_stats().warned_requests == 6


BAD_BATCHES = {
    "rows of float": (lambda m, r: m.check_many(r.astype(float), 1), TypeError, "codes has dtype float64; give int64"),
    "rows of text": (lambda m, r: m.check_many(["a", "b"], 1), TypeError, "codes has dtype <U1"),
    "rows in three dimensions": (
        lambda m, r: m.check_many(r.reshape(1, 1, -1), 1),
        ValueError,
        r"codes has shape \(1, 1, 2\); give one dimension, or two",
    ),
    "rows in two dimensions": (
        lambda m, r: m.charge_many(r.reshape(1, -1), 1),
        ValueError,
        r"codes has shape \(1, 2\); give one dimension",
    ),
    "one model twice in a request": (lambda m, r: m.check_many([[r[0], r[0]]], 1), ValueError, "one model twice"),
    "row out of the table": (
        lambda m, r: m.check_many([r[0], r[1] + 7], 1),
        ValueError,
        r"codes\[1\] is \d+, which is no",
    ),
    "negative row": (
        lambda m, r: m.check_many([r[0], -1], 1),
        ValueError,
        r"codes\[1\] is -1, which is no model's code",
    ),
    "row without generation": (
        lambda m, r: m.check_many([0], 1),
        ValueError,
        r"codes\[0\] is 0, which is no model's code",
    ),
    "too few tokens": (
        lambda m, r: m.check_many(r, [1]),
        ValueError,
        "estimated_tokens has 1 elements and codes has 2",
    ),
    "negative tokens": (
        lambda m, r: m.check_many(r, [1, -1]),
        ValueError,
        r"estimated_tokens\[1\] is -1; give an integer",
    ),
    "too many tokens": (lambda m, r: m.check_many(r, [1, 2**62 + 1]), ValueError, r"estimated_tokens\[1\] is 4611686"),
    "negative scalar": (lambda m, r: m.check_many(r, -1), ValueError, "estimated_tokens is -1; give an integer"),
    "tokens of float": (lambda m, r: m.check_many(r, [1.0, 2.0]), TypeError, "estimated_tokens has dtype float64"),
    "a float": (lambda m, r: m.check_many(r, 2.5), TypeError, "estimated_tokens has dtype float64; give int64"),
    "masked rows": (lambda m, r: m.check_many(np.ma.array(r, mask=[1, 0]), 1), ValueError, "codes has masked elements"),
    "masked tokens": (
        lambda m, r: m.charge_many(r, np.ma.array([1, 2], mask=[0, 1])),
        ValueError,
        "tokens has masked elements",
    ),
    "masked out": (
        lambda m, r: m.check_many(r, 1, np.ma.zeros(2, np.uint8)),
        TypeError,
        "out is MaskedArray; give a uint8 array",
    ),
    "huge unsigned": (lambda m, r: m.check_many(r, np.array([1, 2**63], np.uint64)), ValueError, "estimated_tokens"),
    "out of another dtype": (
        lambda m, r: m.check_many(r, 1, np.zeros(2)),
        TypeError,
        "out is float64; give a uint8 array",
    ),
    "out is a list": (lambda m, r: m.check_many(r, 1, [0, 0]), TypeError, "out is list; give a uint8 array"),
    "out too short": (
        lambda m, r: m.check_many(r, 1, np.zeros(1, np.uint8)),
        ValueError,
        r"out has shape \(1,\); give \(2,\)",
    ),
    "out with gaps": (lambda m, r: m.check_many(r, 1, np.zeros(4, np.uint8)[::2]), ValueError, "out cannot be filled"),
    "retry of another dtype": (
        lambda m, r: m.check_many(r, 1, retry_after_ms=np.zeros(2)),
        TypeError,
        "retry_after_ms is",
    ),
    "retry too long": (
        lambda m, r: m.check_many(r, 1, retry_after_ms=np.zeros(3, int)),
        ValueError,
        "retry_after_ms has",
    ),
    "times fall": (
        lambda m, r: m.check_many(r, 1, times_ns=[10**13, 10**12]),
        ValueError,
        r"times_ns\[1\] = 1\d+ is before",
    ),
    "times before the clock": (
        lambda m, r: m.check_many(r, 1, times_ns=[1, 2]),
        ValueError,
        "times_ns runs from 1 to 2",
    ),
    "times too late": (lambda m, r: m.check_many(r, 1, times_ns=[10**13, 2**62]), ValueError, "between the clock"),
    "times of another length": (
        lambda m, r: m.check_many(r, 1, times_ns=[10**13]),
        ValueError,
        "times_ns has 1 elements",
    ),
    "times of float": (lambda m, r: m.check_many(r, 1, times_ns=[1e13, 1e13]), TypeError, "times_ns has dtype float64"),
    "charge negative": (lambda m, r: m.charge_many(r, [5, -5]), ValueError, r"tokens\[1\] is -5"),
    "charge a bad row": (lambda m, r: m.charge_many([r[0], 3], 5), ValueError, r"codes\[1\] is 3"),
    "charge float": (lambda m, r: m.charge_many(r, 5.0), TypeError, "tokens has dtype float64"),
    "charge too few": (lambda m, r: m.charge_many(r, [5]), ValueError, "tokens has 1 elements"),
    "rows of an unknown id": (lambda m, r: m.codes(["a", "nobody"]), UnknownModelError, "nobody"),
    "rows of no str": (lambda m, r: m.codes(["a", 5]), TypeError, "model_id is 5; give a str"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_input_changes_nothing(manager, case):
    call, error, message = BAD_BATCHES[case]
    codes = manager.codes(["a", "b"])
    before = state_of(manager)
    with pytest.raises(error, match=message):
        call(manager, codes)
    assert state_of(manager) == before


def test_foreign_byte_order_is_converted(manager):
    codes = manager.codes(["b"] * 3)
    assert manager.check_many(codes.astype(">i8"), np.array([1, 2, 3], ">i8")).tolist() == [0, 0, 0]
    assert manager.get_usage("b").tokens_this_day == 6


def test_times_that_fall_by_more_than_an_int64_are_refused(manager):
    before = state_of(manager)
    with pytest.raises(ValueError, match="times_ns"):
        manager.check_many(manager.codes(["a"] * 5), 1, times_ns=[10**12, 2**62, 2**63 - 1, -(2**63), 10**13])
    assert state_of(manager) == before


def test_a_read_only_output_is_refused(manager):
    out = np.zeros(1, np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out cannot be filled in place"):
        manager.check_many(manager.codes(["a"]), 1, out)


def test_times_need_a_manual_clock():
    manager = ResourceQuotaManager()
    manager.set_quota("a")
    with pytest.raises(ValueError, match="times_ns needs a manager with a clock of its own"):
        manager.check_many(manager.codes(["a"]), 1, times_ns=[10**18])
    assert manager.get_stats().total_checks == 0


def test_the_clock_stands_at_the_last_time_afterwards(manager):
    manager.check_many(manager.codes(["a", "a"]), 1, times_ns=[2 * 10**12, 3 * 10**12])
    assert manager.clock.now_ns == 3 * 10**12


def test_a_removed_models_code_is_refused_even_when_its_row_is_reused(manager):
    codes = manager.codes(["a", "b"])
    manager.remove_quota("b")
    manager.set_quota("c")
    before = state_of(manager)
    with pytest.raises(ValueError, match=r"codes\[1\] is \d+, which is no model's code"):
        manager.check_many(codes, 1)
    with pytest.raises(ValueError, match=r"codes\[1\] is \d+"):
        manager.charge_many(codes, 1)
    assert state_of(manager) == before
    assert (manager.codes(["c"])[0] & 0xFFFFFFFF) == (codes[1] & 0xFFFFFFFF)


def test_codes_registers_from_the_template():
    manager = ResourceQuotaManager(default_quota=ResourceQuotaConfig("template", max_requests_per_day=1))
    out = manager.check_many(manager.codes(["x", "y", "x"]), 1)
    assert out.tolist() == [0, 0, Limit.REQUESTS_PER_DAY]
    assert manager.list_models() == ["x", "y"]


def test_charges_count_against_every_token_limit_but_no_request(manager):
    manager.charge_many(manager.codes(["b", "b"]), [70, 50])
    usage = manager.get_usage("b")
    assert (usage.tokens_this_second, usage.tokens_this_hour, usage.tokens_this_day) == (120, 120, 120)
    assert usage.requests_this_day == 0
    assert manager.check_quota("b", 1).limit is Limit.TOKENS_PER_HOUR
    assert manager.check_quota("b", 0)
    assert manager.get_stats().total_checks == 2


def test_a_counter_stays_at_its_largest():
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota("u", max_tokens_per_second=None, max_tokens_per_hour=None, max_tokens_per_day=None)
    codes = manager.codes(["u"] * 5)
    manager.charge_many(codes, 2**62)
    assert manager.get_usage("u").tokens_this_day == 2**62
    assert manager.check_quota("u", 2**62)
    assert manager.get_usage("u").tokens_this_day == 2**62
    manager.set_quota("r", max_tokens_per_second=0.1, max_tokens_per_hour=None, max_tokens_per_day=None)
    manager.charge_many(manager.codes(["r"] * 5), 2**62)
    assert manager.get_usage("r").tokens_this_second == 2**62
    assert not manager.check_quota("r", 1)


@given(
    requests=st.lists(
        st.tuples(
            st.sampled_from("ab"), st.integers(0, 400), st.sampled_from([0, 1, 10**6, 17 * 10**6, 10**9, 61 * 10**9])
        ),
        max_size=60,
    )
)
def test_a_batch_decides_as_single_checks_do(requests):
    def fresh():
        manager = ResourceQuotaManager(clock=ManualClock(10**12))
        manager.set_quota("a", max_requests_per_second=2.5, burst_requests=1, max_tokens_per_second=300,
                          burst_tokens=100, max_requests_per_hour=20, on_violation="reject")  # fmt: skip
        manager.set_quota("b", max_tokens_per_hour=1000, max_requests_per_second=None, on_violation="queue")
        return manager

    single, batch = fresh(), fresh()
    limits, waits, times = [], [], []
    for model, tokens, step in requests:
        single.clock.advance_ns(step)
        times.append(single.clock.now_ns)
        result = single.check_quota(model, tokens)
        limits.append(result.limit or 0)
        waits.append(0 if result else -1 if result.retry_after_ms is None else result.retry_after_ms)
    retry = np.zeros(len(requests), np.int64)
    codes = batch.codes([model for model, _, _ in requests])
    out = batch.check_many(codes, [tokens for _, tokens, _ in requests], times_ns=times, retry_after_ms=retry)
    assert out.tolist() == limits
    assert retry.tolist() == waits
    for model in "ab":
        assert single.get_usage(model) == batch.get_usage(model)
    assert single.get_stats() == batch.get_stats()
