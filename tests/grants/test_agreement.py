"""Core and oracle side by side through grants: reserved, counted, settled and undone in any order and at any delay."""

from __future__ import annotations

import random
from typing import Any

from agreement import NOW
from factories import UNLIMITED
from grant_agreement import MOST_GRANTS, PARTIES, GrantAgreement
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import HOUR_NS, SECOND_NS
from strategies import Arrival, Pause, starts_ns

from modelquota import ResourceQuotaConfig, ViolationAction

TestGrantAgreement = GrantAgreement.TestCase
TestGrantAgreement.settings = settings(stateful_step_count=40, report_multiple_bugs=False)


def test_a_burst_is_not_forgiven_while_there_is_no_rate() -> None:
    """What one request has left of a rate of one in ten seconds is there when the rate comes back."""
    quota = ResourceQuotaConfig("a", **UNLIMITED | {"max_requests_per_second": 0.1, "on_violation": "reject"})
    twins = GrantAgreement()
    twins.begin(10**15, quota, quota.replace(model_id="b"), None)
    twins.reserve("a", NOW, 0, 0, 0, 1)
    for rate in (None, 0.1):
        twins.change_limits("a", {"max_requests_per_second": rate})
        twins.is_sound()
        twins.wait(Pause(SECOND_NS // 60 + 1))
        twins.forgive_burst("a")
        twins.is_sound()
    twins.check("a", Arrival(NOW, 0))
    assert twins.denied is not None
    twins.teardown()


def busy_quotas(model_id: str) -> st.SearchStrategy[ResourceQuotaConfig]:
    """Limits of models that are used all the time: large bursts, so that levels stand high while grants are open."""
    return st.builds(
        lambda **fields: ResourceQuotaConfig(model_id, **UNLIMITED | fields),
        max_requests_per_second=st.sampled_from([None, 0.1, 0.5, 2.5]),
        max_tokens_per_second=st.sampled_from([0.3, 1.0, 7.7, 10.0, 100.0]),
        burst_requests=st.sampled_from([5, 60]),
        burst_tokens=st.sampled_from([300, 5000, 5000]),
        max_tokens_per_hour=st.sampled_from([None, None, None, 2000]),
        max_requests_per_day=st.sampled_from([None, None, None, 100]),
        max_concurrent_requests=st.sampled_from([None, None, 4]),
        on_violation=st.sampled_from(ViolationAction),
    )


@given(
    quotas=st.tuples(busy_quotas("a"), busy_quotas("b")),
    start_ns=starts_ns(),
    longest_ns=st.sampled_from([2 * SECOND_NS, 20 * SECOND_NS, 90 * SECOND_NS, HOUR_NS]),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=max(5, settings().max_examples // 4))
def test_busy_models(quotas: Any, start_ns: int, longest_ns: int, seed: int) -> None:
    """Hundreds of requests, many open at once, settled for less and for more: levels give back what they can."""
    rng = random.Random(seed)
    twins = GrantAgreement()
    twins.begin(start_ns, *quotas, None)
    for _ in range(150):
        step = Pause(rng.randrange(rng.choice([1, longest_ns // 100, longest_ns]) or 1))
        index, amount = rng.randrange(MOST_GRANTS), rng.randrange(300)
        match rng.randrange(11):
            case 0 | 1 | 2 | 3:
                twins.reserve(PARTIES[index % 5], step, amount, 0, 0, 1)
            case 4:
                twins.check_several([("a", "b"), ("b",)][index % 2], step, amount // 10)
            case 5 | 6 | 7:
                twins.settle(index, step, amount // rng.choice([1, 4, 300]))
            case 8:
                twins.cancel(index, step)
            case 9:
                twins.add(index, step, [amount // 9] * 4)
            case 10 if rng.random() < 0.05:
                twins.forgive_burst("a")
            case 10 if rng.random() < 0.05:
                twins.change_limits("b", {"max_tokens_per_second": float(1 + index), "burst_requests": index})
            case _:
                twins.drop(index, step)
        twins.is_sound()
    twins.teardown()
