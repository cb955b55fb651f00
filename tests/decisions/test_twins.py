"""Every way to ask decides alike: two managers with the same limits hear the same requests in different ways."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import Arrival, Step, at_one_scale, configs, crowd, starts_ns, steps, tokens

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager


def twins(quotas: Sequence[ResourceQuotaConfig], start_ns: int) -> tuple[ResourceQuotaManager, ResourceQuotaManager]:
    """Two managers with the same limits, each with a clock of its own."""
    first, second = (ResourceQuotaManager(clock=ManualClock(start_ns)) for _ in range(2))
    for quota in quotas:
        first.set_quota(quota)
        second.set_quota(quota)
    return first, second


def now_ns(manager: ResourceQuotaManager) -> int:
    """What a manager's own ManualClock shows."""
    assert isinstance(manager.clock, ManualClock)
    return manager.clock.now_ns


def check_at(manager: ResourceQuotaManager, at_ns: int, model_id: str, cost: int) -> tuple[int, int]:
    """One check at a given time, in the codes of a batch."""
    assert isinstance(manager.clock, ManualClock)
    manager.clock.advance_ns(at_ns - manager.clock.now_ns)
    result = manager.check_quota(model_id, cost)
    if result.allowed:
        return 0, 0
    assert result.limit is not None
    return int(result.limit), -1 if result.retry_after_ms is None else result.retry_after_ms


@given(
    quotas=st.tuples(configs("a"), configs("b"), configs("c")),
    start_ns=starts_ns(),
    traffic=at_one_scale(60, tokens()),
    turns=st.lists(st.sampled_from("abc"), min_size=5, max_size=5),
    cut=st.integers(0, 60),
    data=st.data(),
)
def test_batch_in_time_decides_as_single_checks(
    quotas: tuple[ResourceQuotaConfig, ...],
    start_ns: int,
    traffic: list[Arrival],
    turns: list[str],
    cut: int,
    data: st.DataObject,
) -> None:
    batched, single = twins(quotas, start_ns)
    times = np.empty(len(traffic), dtype=np.int64)
    at_ns = start_ns
    for i, arrival in enumerate(traffic):
        times[i] = at_ns = arrival.step.end_ns(at_ns)
    ids = [turns[i % len(turns)] for i in range(len(traffic))]
    costs = np.array([arrival.tokens for arrival in traffic], dtype=np.int64)
    rows = batched.codes(ids)
    given_out = data.draw(st.booleans(), label="out given")
    for part in (slice(0, cut), slice(cut, None)):
        out = np.full(len(times[part]), 99, dtype=np.uint8) if given_out else None
        waits = np.full(len(times[part]), -99, dtype=np.int64)
        codes = batched.check_many(rows[part], costs[part], out, times_ns=times[part], retry_after_ms=waits)
        assert out is None or codes is out
        assert codes.dtype == np.uint8
        expected = [
            check_at(single, int(at), model_id, int(cost))
            for at, model_id, cost in zip(times[part], ids[part], costs[part], strict=True)
        ]
        assert list(zip(codes.tolist(), waits.tolist(), strict=True)) == expected
        assert now_ns(batched) == now_ns(single)
        for model_id in "abc":
            assert batched.get_usage(model_id) == single.get_usage(model_id)
    assert batched.get_stats() == single.get_stats()


@given(
    quotas=st.tuples(configs("a"), configs("b")),
    start_ns=starts_ns(),
    batches=crowd(st.tuples(steps(), st.lists(st.sampled_from("ab"), max_size=20), tokens()), 15),
)
def test_batch_now_decides_as_single_checks(
    quotas: tuple[ResourceQuotaConfig, ...], start_ns: int, batches: list[tuple[Step, list[str], int]]
) -> None:
    batched, single = twins(quotas, start_ns)
    assert isinstance(batched.clock, ManualClock)
    for step, ids, cost in batches:
        at_ns = step.end_ns(now_ns(batched))
        batched.clock.advance_ns(at_ns - now_ns(batched))
        codes = batched.check_many(batched.codes(ids), cost)
        assert codes.tolist() == [check_at(single, at_ns, model_id, cost)[0] for model_id in ids]
        for model_id in "ab":
            # The twin may not have been asked anything at this moment.
            check_at(single, at_ns, "nobody", 0)
            assert batched.get_usage(model_id) == single.get_usage(model_id)


@given(quota=configs("m"), start_ns=starts_ns(), traffic=at_one_scale(30, tokens()))
def test_handle_is_the_same_model(quota: ResourceQuotaConfig, start_ns: int, traffic: list[Arrival]) -> None:
    by_handle, by_name = twins([quota], start_ns)
    assert isinstance(by_handle.clock, ManualClock)
    assert isinstance(by_name.clock, ManualClock)
    handle = by_handle.model("m")
    for arrival in traffic:
        for clock in (by_handle.clock, by_name.clock):
            clock.advance_ns(arrival.step.end_ns(clock.now_ns) - clock.now_ns)
        assert handle.check(arrival.tokens) == by_name.check_quota("m", arrival.tokens)
        assert handle.get_usage() == by_name.get_usage("m")
