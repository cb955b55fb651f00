"""What the log of admissions says of meters: in no interval of its length does a window hold more than its limit."""

import math
from fractions import Fraction

from factories import make_manager, open_quota
from hypothesis import given
from hypothesis import strategies as st
from oracle import LENGTHS_NS
from oracle_kinds import counted

from modelquota import ManualClock, Tokens

WINDOWS = ("minute", "hour", "day", "month")
weights = st.tuples(*[st.sampled_from([0, 1, 0.3, 2.5, 15, 0.000001])] * 3)
kinds = st.builds(Tokens, *[st.integers(0, 40)] * 3)
meters = st.lists(st.tuples(st.sampled_from(WINDOWS), weights, st.integers(1, 500)), min_size=1, max_size=4)
traffic = st.lists(st.tuples(st.sampled_from([0, 10**9, 59 * 10**9, 60 * 10**9, 3_599 * 10**9, 43_200 * 10**9]), kinds))


@given(meters=meters, traffic=traffic, batched=st.booleans())
def test_no_interval_holds_more_than_the_limit(meters, traffic, batched):
    quotas = [
        open_quota(f"m#{number}", token_weights=some, **{f"max_tokens_per_{window}": limit})
        for number, (window, some, limit) in enumerate(meters)
    ]
    clock = ManualClock()
    manager = make_manager(open_quota("m"), *quotas, clock=clock)
    codes = manager.codes(["m"])
    admitted = []
    for pause_ns, tokens in traffic:
        clock.advance_ns(pause_ns)
        if batched:
            allowed = manager.check_many(codes, tokens).tolist() == [0]
        else:
            allowed = manager.check_quota("m", tokens).allowed
        if allowed:
            admitted.append((clock.now_ns, tokens))
    for quota, (window, some, limit) in zip(quotas, meters, strict=True):
        for start_ns, _ in admitted:
            inside = [tokens for at_ns, tokens in admitted if start_ns <= at_ns < start_ns + LENGTHS_NS[window]]
            assert sum(counted(quota, tokens) for tokens in inside) <= limit
        for _, tokens in admitted:
            amounts = (tokens.input, tokens.cached, tokens.output)
            exact = sum(Fraction(str(weight)) * amount for weight, amount in zip(some, amounts, strict=True))
            assert counted(quota, tokens) == math.ceil(exact)
