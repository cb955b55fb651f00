"""Recommended quotas keep their promise; peaks, frontiers and estimates are those that a plain count finds."""

import json
import math
import xml.etree.ElementTree as ElementTree
from collections import deque
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from traces import AZURE_TRACE, needs_azure_trace, write_small_trace

from modelquota import Limit, ManualClock, ResourceQuotaConfig, ResourceQuotaManager, load_quotas
from modelquota.quota.file import Quotas
from modelquota.tuning.advice import concurrency, estimates, round_up
from modelquota.tuning.charges import Charges
from modelquota.tuning.conditions import parse_condition
from modelquota.tuning.frontier import frontier
from modelquota.tuning.plot import svg
from modelquota.tuning.replay import replay
from modelquota.tuning.trace import Trace, read_trace
from modelquota.tuning.tune import Scenario, tune
from modelquota.tuning.windows import KINDS, LENGTHS, window_uses
from modelquota.tuning.write import diff, quotas_file

SECOND = 10**9
MOONCAKE_TRACE = AZURE_TRACE.with_name("mooncake_conversation.jsonl.gz")


def make_trace(times_ns, tokens=1, outputs=0, **columns):
    times = np.array(times_ns, np.int64)
    return Trace(
        path="made",
        times_ns=times,
        input_tokens=np.broadcast_to(np.array(tokens, np.int64), times.shape).copy(),
        cached_tokens=np.zeros(len(times), np.int64),
        output_tokens=np.broadcast_to(np.array(outputs, np.int64), times.shape).copy(),
        format="made",
        **columns,
    )


def bursts_of_traffic(seed, hours=3.0):
    """Requests in bursts of a minute, of three models and five users."""
    rng = np.random.default_rng(seed)
    starts = np.sort(rng.uniform(0, hours * 3600, 60))
    times = np.sort(np.concatenate([start + rng.exponential(3, rng.integers(1, 120)).cumsum() for start in starts]))
    count = len(times)
    return make_trace(
        ((times - times[0]) * SECOND).astype(np.int64),
        rng.lognormal(6, 1, count).astype(np.int64),
        rng.lognormal(4, 1, count).astype(np.int64),
        model_index=rng.integers(0, 3, count).astype(np.int32),
        models=("a", "b", "c"),
        user_index=rng.integers(0, 5, count).astype(np.int32),
        users=tuple(f"org{i % 2}/user{i}" for i in range(5)),
    )


@pytest.fixture(params=["small", "bursts", pytest.param("azure", marks=needs_azure_trace),
                        pytest.param("mooncake", marks=needs_azure_trace)])  # fmt: skip
def traffic(request, tmp_path):
    if request.param == "bursts":
        return bursts_of_traffic(5)
    if request.param == "small":
        write_small_trace(tmp_path / "small.csv")
        return read_trace(tmp_path / "small.csv")
    return read_trace(AZURE_TRACE if request.param == "azure" else MOONCAKE_TRACE)


# -- the promise


@pytest.mark.parametrize(("target_denied", "headroom"), [(0.001, 0.15), (0.0, 0.0), (0.01, 0.0), (0.05, 0.0)])
def test_recommended_limits_deny_no_more_than_promised(traffic, target_denied, headroom):
    report = tune(traffic, headroom=headroom, target_denied=target_denied)
    only = None if traffic.models else report.models[0].model_id
    # At any alignment of the windows: the clock of a replay starts at a multiple of a slot.
    for shift_ns in (0, 1, 7 * 10**9 + 123_456_789):
        shifted = Trace(
            **{name: getattr(traffic, name) for name in Trace.__slots__} | {"times_ns": traffic.times_ns + shift_ns}
        )
        for model in replay(shifted, report.quotas, model=only).models:
            assert model.requests - model.admitted <= target_denied * model.requests
    for model in report.models:
        once = model.scenario("recommended, tried once")
        assert once.denied_share <= target_denied
        assert model.scenario("recommended").denied_share <= target_denied


@pytest.mark.parametrize("estimates", ["too high", "too low", "both"])
@pytest.mark.parametrize(("target_denied", "headroom"), [(0.0, 0.0), (0.01, 0.0), (0.001, 0.15)])
def test_the_promise_holds_for_what_is_reserved(estimates, target_denied, headroom):
    """Requests that reserve what they do not use, or use more: both count until, or from, their end."""
    trace = bursts_of_traffic(8)
    rng = np.random.default_rng(9)
    factors = {"too high": rng.uniform(1, 5, len(trace)), "too low": rng.uniform(0.2, 1, len(trace)),
               "both": rng.uniform(0.2, 5, len(trace))}[estimates]  # fmt: skip
    estimated = (trace.tokens * factors).astype(np.int64)
    estimated[::50] = -1  # some do not say
    trace = replace(trace, estimated_tokens=estimated).with_durations(ttft_ms=500, tpot_ms=50)
    report = tune(trace, headroom=headroom, target_denied=target_denied)
    for model in report.models:
        assert model.scenario("recommended, tried once").denied_share <= target_denied
    if not target_denied:
        users = tune(trace, headroom=0, target_denied=0, per="user").users.recommended
        quotas = Quotas({name: ResourceQuotaConfig.unlimited(name) for name in trace.models}, {"user:*": users})
        assert replay(trace, quotas, per_user=True).admitted == len(trace)
        assert tune(trace, report.quotas).models[0].scenario("current").denied_share == 0


def test_what_is_promised_is_used(traffic):
    """Limits are not simply large: without headroom, a twentieth of the requests may be denied, and some are."""
    report = tune(traffic, headroom=0, target_denied=0.05)
    assert sum(model.scenario("recommended, tried once").denied_share > 0 for model in report.models) > 0
    strict = tune(traffic, headroom=0, target_denied=0)
    for model, tight in zip(report.models, strict.models, strict=True):
        for item, other in zip(model.limits, tight.limits, strict=True):
            assert item.target is None or item.target <= other.target
            assert item.lower is None or item.lower <= item.target <= item.upper


def test_known_answer_of_an_even_stream():
    """Ten requests of 100 tokens a second, for two hours."""
    trace = make_trace(np.arange(72_000) * (SECOND // 10), 90, 10)
    report = tune(trace, headroom=0, target_denied=0, model="m")
    (model,) = report.models
    by_field = {item.field: item for item in model.limits}
    assert by_field["max_requests_per_hour"].target == round_up(36_000 * 61 / 60 + 1)
    assert by_field["max_tokens_per_hour"].target == round_up((36_000 * 61 / 60 + 1) * 100)
    assert by_field["max_requests_per_hour"].windows_seen == pytest.approx(2, abs=0.01)
    day = by_field["max_tokens_per_day"]
    assert day.extrapolated
    assert day.target == pytest.approx(86_400_000, rel=0.01)
    assert "less than one day was seen" in day.reason
    rate = by_field["max_requests_per_second"]
    assert 10 <= rate.target <= 12
    assert rate.target_burst <= 12
    uses = {(use.window, use.kind): use for use in model.uses}
    assert uses["second", "requests"].peak == 10
    assert uses["hour", "tokens"].peak == 3_600_000
    assert uses["hour", "tokens"].p50 == 3_600_000
    assert model.scenario("limits -10 %").denied_share > 0.05
    assert model.scenario("limits -10 %").binding in (Limit.REQUESTS_PER_SECOND, Limit.TOKENS_PER_SECOND)
    assert model.scenario("limits +10 %").denied_share == 0
    assert model.scenario("traffic x1.5").denied_share > 0.2
    assert any("less than one day was seen" in warning for warning in report.warnings)


def test_current_quotas_are_compared_and_kept():
    trace = make_trace(np.arange(3_000) * SECOND, 100)
    current = {
        "m": ResourceQuotaConfig("m", max_tokens_per_second=50, burst_tokens=100, max_ram_mb=77, on_violation="reject")
    }
    (model,) = tune(trace, current).models
    assert model.scenario("current").denied_share == pytest.approx(0.5, abs=0.02)
    assert model.scenario("current").binding is Limit.TOKENS_PER_SECOND
    assert (model.recommended.max_ram_mb, model.recommended.on_violation) == (77, "reject")
    assert model.recommended.max_tokens_per_second >= 100
    pattern = Quotas({}, {"*": current["m"]})
    assert tune(trace, pattern, model="gpt").models[0].current.max_ram_mb == 77


# -- peaks


def in_a_log(times_ns, counts, window_ns):
    """The most that a log of all requests ever had in a window, and when."""
    log, held, best, at = deque(), 0, 0, 0
    for time_ns, count in zip(times_ns, counts, strict=True):
        log.append((time_ns, count))
        held += count
        while log[0][0] <= time_ns - window_ns:
            held -= log.popleft()[1]
        if held > best:
            best, at = held, time_ns
    return best, at


@given(data=st.data())
def test_peaks_are_those_of_a_log(data):
    steps = st.sampled_from([0, 1, SECOND - 1, SECOND, SECOND + 1, 60 * SECOND, 3_600 * SECOND, 86_400 * SECOND])
    gaps = data.draw(st.lists(steps | st.integers(0, 5 * SECOND), min_size=1, max_size=40))
    count = len(gaps)
    numbers = st.lists(st.integers(0, 1000), min_size=count, max_size=count)
    trace = make_trace(np.cumsum(gaps) - gaps[0], data.draw(numbers), data.draw(numbers))
    columns = {"requests": np.ones(count, np.int64), "input": trace.input_tokens, "cached": trace.cached_tokens,
               "output": trace.output_tokens, "tokens": trace.tokens}  # fmt: skip
    uses = list(window_uses(trace))
    assert {use.window for use in uses} >= {"second", "10 s", "minute"}
    for use in uses:
        expected = in_a_log(trace.times_ns.tolist(), columns[use.kind].tolist(), LENGTHS[use.window] * SECOND)
        assert use.peak == expected[0]
        if use.peak:
            assert use.peak_at_ns == expected[1]


def test_peaks_of_real_traffic_are_those_of_a_log(traffic):
    for use in window_uses(traffic):
        counts = np.ones(len(traffic), np.int64) if use.kind == "requests" else traffic.tokens
        if use.kind in ("requests", "tokens"):
            expected = in_a_log(traffic.times_ns.tolist(), counts.tolist(), LENGTHS[use.window] * SECOND)
            assert (use.peak, use.peak_at_ns) == expected
    assert {use.kind for use in window_uses(traffic)} == set(KINDS)


def test_percentiles_are_over_time_not_over_requests():
    """A minute with 600 requests in ten: in nine tenths of the time there was nothing."""
    times = [t for t in range(0, 600 * SECOND, SECOND // 10) if t < 60 * SECOND] + [600 * SECOND]
    uses = {(use.window, use.kind): use for use in window_uses(make_trace(times))}
    second = uses["second", "requests"]
    assert (second.peak, second.p50) == (10, 0)
    assert second.p99 == 10


# -- the frontier


def by_definition(times_ns, counts, rate):
    """The smallest burst at which no request is refused: over all pairs of requests, in exact numbers."""
    exact = Fraction(rate)
    level = Fraction(0)
    for first in range(len(times_ns)):
        total = 0
        for last in range(first, len(times_ns)):
            total += counts[last]
            level = max(level, total - exact * (times_ns[last] - times_ns[first]) / SECOND)
    slot_ns = 16_666_667
    second = 0
    for last in range(len(times_ns)):
        start_ns = times_ns[last] - 61 * slot_ns
        second = max(second, sum(n for at, n in zip(times_ns, counts, strict=True) if start_ns <= at <= times_ns[last]))
    return max(0, math.ceil(level - max(exact, 1)), second - math.ceil(exact))


@settings(max_examples=60)
@given(
    gaps=st.lists(st.sampled_from([0, SECOND // 10, SECOND // 3, SECOND, 5 * SECOND]), min_size=1, max_size=25),
    data=st.data(),
)
def test_the_frontier_is_what_the_definition_says(gaps, data):
    times_ns = (np.cumsum(gaps) - gaps[0]).tolist()
    counts = data.draw(st.none() | st.lists(st.integers(0, 50), min_size=len(gaps), max_size=len(gaps)))
    found = frontier(Charges(np.array(times_ns), None if counts is None else np.array(counts)), "tokens", points=5)
    for rate, burst in zip(found.rates, found.bursts, strict=True):
        assert burst == by_definition(times_ns, counts or [1] * len(gaps), rate)
    assert list(found.bursts) == sorted(found.bursts, reverse=True)


def test_the_frontier_is_that_of_the_product(traffic):
    """Each of its points admits everybody, and one less in the burst refuses somebody."""
    if traffic.models:
        traffic = traffic.select(np.flatnonzero(traffic.model_index == 0))
    trace = make_trace(traffic.times_ns, traffic.tokens)
    for unit, counts in (("requests", None), ("tokens", trace.tokens)):
        found = frontier(Charges(trace.times_ns, counts), unit)
        levels_bind = 0
        for rate, burst in list(zip(found.rates, found.bursts, strict=True))[::4]:
            limits = {f"max_{unit}_per_second": rate, "on_violation": "reject"}
            quota = ResourceQuotaConfig.unlimited("m", **limits, **{f"burst_{unit}": burst})
            assert replay(trace, {"m": quota}).admitted == len(trace)
            if burst:
                less = replay(trace, {"m": quota.replace(**{f"burst_{unit}": burst - 1})}).admitted
                levels_bind += less < len(trace)
        assert levels_bind >= 3
        assert 0 <= found.knee < len(found.rates)


# -- concurrency and estimates


def test_concurrency_is_littles_law_and_a_simulation():
    trace = make_trace(np.arange(1_000) * SECOND, durations_ns=np.full(1_000, int(2.5 * SECOND)))
    found, at_arrival = concurrency(trace)
    assert found.mean == pytest.approx(2.5, rel=0.01)
    assert found.peak == 3
    assert at_arrival[:4].tolist() == [1, 2, 3, 3]
    simulated = replay(trace, {"m": ResourceQuotaConfig.unlimited("m")})
    assert simulated.most_open == 3
    (model,) = tune(trace, headroom=0, target_denied=0).models
    assert model.recommended.max_concurrent_requests == 3
    assert concurrency(make_trace([0])) is None
    timed = make_trace([0], outputs=11).with_durations(ttft_ms=200, tpot_ms=10)
    assert timed.durations_ns.tolist() == [300_000_000]
    with pytest.raises(ValueError, match="ttft is -1; give milliseconds from 0 to 1e9"):
        timed.with_durations(ttft_ms=-1, tpot_ms=0)


def test_error_of_the_estimates():
    outputs = np.arange(1, 101)
    found = estimates(make_trace(np.arange(100), 10, outputs, estimated_tokens=np.full(100, 510)))
    assert (found.reserved, found.used) == (51_000, 6_050)
    assert found.unused_share == pytest.approx(1 - 6_050 / 51_000)
    assert found.default_output_tokens == 96  # 95 % of the responses are not longer
    assert found.freed_share == pytest.approx(1 - 100 * 106 / 51_000)
    assert estimates(make_trace([0])).unused_share is None


# -- users


def test_users_and_their_prefixes():
    trace = bursts_of_traffic(6)
    report = tune(trace, per="user", target_denied=0)
    assert {use.name for use in report.users.uses} == set(trace.users)
    assert sum(use.requests for use in report.users.uses) == len(trace)
    recommended = report.users.recommended
    assert recommended.model_id == "user:*"
    quotas = Quotas({name: ResourceQuotaConfig.unlimited(name) for name in trace.models}, {"user:*": recommended})
    assert replay(trace, quotas, per_user=True).admitted == len(trace)
    prefixes = tune(trace, per="prefix").users
    assert {use.name for use in prefixes.uses} == {"org0", "org1"}
    with pytest.raises(ValueError, match="the trace names no users"):
        tune(make_trace([0]), per="user")
    with pytest.raises(ValueError, match="per is 'group'; expected user or prefix"):
        tune(trace, per="group")


# -- what is written and drawn


def test_what_is_written_loads_as_what_was_recommended(traffic, tmp_path):
    report = tune(traffic)
    others = {"zz": ResourceQuotaConfig("zz", max_ram_mb=5)}
    patterns = {'we"ird*': ResourceQuotaConfig('we"ird*', max_tokens_per_day=7, shadow_limits=["ram"])}
    text = quotas_file(report, others, patterns)
    path = tmp_path / "quotas.toml"
    path.write_text(text)
    loaded = load_quotas(path)
    assert dict(loaded) == report.quotas | others
    assert loaded.patterns == patterns
    for model in report.models:
        for item in model.limits:
            if item.target is not None:
                assert item.reason in text
    shown = diff("a\n", text, "before", "after")
    assert shown.startswith("--- before\n+++ after\n")
    assert "-a\n" in shown


def test_a_quota_for_users_is_written_and_keeps_what_the_pattern_had(tmp_path):
    trace = bursts_of_traffic(7)
    report = tune(trace, per="user", headroom=0, target_denied=0)
    before = ResourceQuotaConfig("user:*", max_ram_mb=5, max_requests_per_second=1e6, max_tokens_per_second=1e9,
                                 on_violation="reject", max_tokens_per_day=10**9)  # fmt: skip
    for patterns in ({}, {"user:*": before}):
        path = tmp_path / "quotas.toml"
        path.write_text(quotas_file(report, None, patterns))
        loaded = load_quotas(path)
        found = loaded.patterns["user:*"]
        for field in report.users.reasons:
            assert getattr(found, field) == getattr(report.users.recommended, field)
        assert found.max_ram_mb == (5 if patterns else None)
        assert replay(trace, loaded, per_user=True).admitted == len(trace)


def test_the_picture_is_svg_and_has_every_model(traffic):
    report = tune(traffic)
    root = ElementTree.fromstring(svg(report))
    assert root.tag.endswith("svg")
    words = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for model in report.models:
        assert any(word.startswith(f"{model.model_id}: ") for word in words)
    assert sum("recommended" in word for word in words) == 2 * len(report.models)


def test_the_report_is_json(traffic):
    read = json.loads(json.dumps(tune(traffic, per="user" if traffic.users else None).to_dict(), allow_nan=False))
    assert read["requests"] == len(traffic)
    assert {limit["limit"] for limit in read["models"][0]["limits"]} >= {"requests_per_second", "tokens_per_day"}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"headroom": -0.1}, "headroom is -0.1; expected a share from 0 to 10"),
        ({"target_denied": 0.6}, "target_denied is 0.6; expected a share from 0 to 0.5"),
        ({"scale": 0}, "scale is 0; expected above 0 and up to 1000"),
    ],
)
def test_parameters_out_of_range(how, says):
    with pytest.raises(ValueError, match=says):
        tune(make_trace([0]), **how)


@pytest.mark.parametrize("times", [[0], [0, 0, 0], [0, 5]])
def test_traces_that_say_almost_nothing(times):
    report = tune(make_trace(times))
    (model,) = report.models
    assert any("only" in warning and "say little" in warning for warning in report.warnings)
    assert all(item.target is None or item.target > 0 for item in model.limits)
    assert model.scenario("recommended, tried once").denied_share == 0
    ElementTree.fromstring(svg(report))


def test_conditions():
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=1)
    manager.set_quota("m", max_requests_per_second=1, burst_requests=0, on_violation="queue", grace_period_sec=2)
    trace = make_trace([0, 0, 0, 0])
    scenario = Scenario("current", replay(trace, {"m": manager.get_quota("m")}, wait=True).models[0])
    for text, holds in [
        ("denied > 1%", True), ("denied>=50%", True), ("denied > 50 %", False), ("denied < 0.6", True),
        ("waited > 20%", True), ("p99_wait > 1s", True), ("p99_wait > 1017ms", False), ("longest_wait <= 2s", True),
        ("median_wait > 1 min", False), ("timed_out >= 25%", True), ("timed_out > 50%", False),
    ]:  # fmt: skip
        assert parse_condition(text).holds(scenario) is holds, text
    for bad in ("denied", "denied = 5", "denied > 5s", "p99_wait > 5%", "refused > 1%", "denied > 1.2.3%"):
        with pytest.raises(ValueError, match=r"the condition is .*; expected denied, waited, .* such as 1% or a time"):
            parse_condition(bad)
