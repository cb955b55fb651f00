"""A replay that waits does what clients of the same manager would have seen, whatever the simulation skips."""

from dataclasses import astuple, fields

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import modelquota.tuning.simulate
from modelquota import Limit, ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager, Tokens
from modelquota._core.table.grant import Grant
from modelquota._core.table.queue import Waiter
from modelquota.quota.file import Quotas
from modelquota.tuning.replay import replay
from modelquota.tuning.simulate import Outcome, Simulation
from modelquota.tuning.trace import Trace

MS, SECOND = 10**6, 10**9


def make_trace(times_ms, tokens=1, **columns):
    count = len(times_ms)
    return Trace(
        path="made",
        times_ns=np.array(times_ms, np.int64) * MS,
        input_tokens=np.broadcast_to(np.array(tokens, np.int64), count).copy(),
        cached_tokens=np.zeros(count, np.int64),
        output_tokens=np.zeros(count, np.int64),
        **columns,
    )


def simulated(simulation, *columns, **more):
    """What becomes of all requests, in order."""
    parts = simulation.feed(*columns, **more), simulation.finish()
    names = [field.name for field in fields(Outcome)]
    whole = Outcome(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    assert sorted(whole.rows.tolist()) == list(range(len(columns[0]))), "each is decided once"
    order = np.argsort(whole.rows)
    return Outcome(*(getattr(whole, name)[order] for name in names))


def unlimited(model_id="m", **limits):
    return ResourceQuotaConfig.unlimited(model_id, **limits)


def waits_ms(trace, *quotas, **how):
    return replay(trace, {quota.model_id: quota for quota in quotas}, wait=True, **how)


@pytest.mark.parametrize("action", ["queue", "throttle"])
def test_known_waits_of_a_rate(action):
    """Two a second and no burst: of six at once two pass at once, and two after each window of 61 / 60 s."""
    quota = unlimited(max_requests_per_second=2, burst_requests=0, on_violation=action, grace_period_sec=2.5)
    report = waits_ms(make_trace([0] * 6), quota)
    (model,) = report.models
    assert (model.admitted, model.waited, model.timed_out) == (6, 4, 0)
    assert (model.median_wait_ms, model.longest_wait_ms) == (1525.5, 2034.0)
    assert report.most_waiting == 4
    shorter = waits_ms(make_trace([0] * 6), quota.replace(grace_period_sec=1.5)).models[0]
    # The last two cannot be admitted within the grace period. A queue knows only what its first needs.
    assert (shorter.admitted, shorter.denied[Limit.REQUESTS_PER_SECOND]) == (4, 2)
    assert shorter.waited == 2


def test_known_waits_of_concurrency():
    """Two at a time, each of 3 s: the third waits for the first to end, the fifth for the third."""
    trace = make_trace([0, 1000, 1000, 1000, 1000], durations_ns=np.full(5, 3 * SECOND))
    quota = unlimited(max_concurrent_requests=2, on_violation="queue", grace_period_sec=60)
    report = waits_ms(trace, quota)
    (model,) = report.models
    assert (model.admitted, model.waited, report.most_open) == (5, 3, 2)
    # Admitted at 3 s and 4 s, and at 6 s: they came at 1 s.
    assert (model.median_wait_ms, model.longest_wait_ms) == (3000.0, 5000.0)
    assert waits_ms(trace, quota.replace(on_violation="reject")).models[0].denied[Limit.CONCURRENCY] == 3
    assert replay(trace, {"m": quota}).models[0].denied[Limit.CONCURRENCY] == 3, "without wait they are not tried again"


def test_priorities_go_first():
    trace = make_trace([0, 1, 2, 3], durations_ns=np.full(4, SECOND), priorities=np.array([0, 0, 0, 5]))
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=1)
    manager.set_quota(unlimited(max_concurrent_requests=1, on_violation="queue"))
    outcome = simulated(
        Simulation(manager, [("m",)], wait=True, held=True),
        trace.times_ns,
        None,
        trace.tokens,
        durations_ns=trace.durations_ns,
        priorities=trace.priorities,
    )
    assert (outcome.waited_ns // MS).tolist() == [0, 1999, 2998, 997]
    assert outcome.codes.tolist() == [0, 0, 0, 0]


def test_what_was_reserved_too_much_comes_back():
    """Reserved 60 of 100 tokens an hour and used 10: the third request waits until the first has been settled."""
    trace = make_trace([0, 0, 0], 10, durations_ns=np.full(3, SECOND), estimated_tokens=np.array([60, 40, 60]))
    quota = unlimited(max_tokens_per_hour=100, on_violation="queue")
    (model,) = waits_ms(trace, quota).models
    assert (model.admitted, model.waited, model.longest_wait_ms) == (3, 1, 1000.0)
    without = make_trace([0, 0, 0], 10, durations_ns=np.full(3, SECOND))
    assert waits_ms(without, quota).models[0].waited == 0


@pytest.mark.parametrize("action", ["queue", "throttle", "reject"])
@pytest.mark.parametrize("at_once", [1, 3])
@given(
    gaps_ms=st.lists(st.sampled_from([0, 1, 7, 400, 3_000]), min_size=1, max_size=60),
    costs=st.lists(st.integers(0, 50), min_size=1, max_size=7),
    users=st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=5),
)
def test_requests_that_are_admitted_at_once_are_those_that_are_one_by_one(action, at_once, gaps_ms, costs, users):
    times_ms = np.cumsum(gaps_ms)
    tokens = np.resize(costs, len(times_ms))
    trace = make_trace(times_ms, tokens, user_index=np.resize(users, len(times_ms)).astype(np.int32), users=("a", "b"))
    quotas = {
        "m": unlimited("m", max_requests_per_second=3, burst_requests=2, grace_period_sec=2, on_violation=action),
        "user:a": unlimited("user:a", max_tokens_per_minute=60, on_violation=action),
    }
    found = []
    with pytest.MonkeyPatch.context() as patch:
        for least in (at_once, 10**9):
            patch.setattr(modelquota.tuning.simulate, "LEAST_AT_ONCE", least)
            for per_user in (False, 0 in trace.user_index):
                report = replay(trace, quotas, model="m", wait=True, per_user=per_user).to_dict()
                del report["core_time_ns"]
                found.append(report)
    assert found[0] == found[2]
    assert found[1] == found[3]


def test_a_full_queue_denies():
    quota = unlimited(max_requests_per_second=1, burst_requests=0, max_queued_requests=2, on_violation="queue")
    (model,) = waits_ms(make_trace([0] * 5), quota).models
    assert (model.admitted, model.waited, model.denied[Limit.QUEUE]) == (3, 2, 2)


def test_users_are_charged_beside_the_model():
    trace = make_trace([0] * 6, user_index=np.array([0, 0, 0, 1, 1, -1], np.int32), users=("bob", "ann"))
    pattern = unlimited("user:*", max_requests_per_hour=2, on_violation="reject")
    quotas = Quotas({"m": unlimited(max_requests_per_hour=4, on_violation="reject")}, {"user:*": pattern})
    report = replay(trace, quotas, per_user=True)
    assert [(user.model_id, user.requests, user.admitted) for user in report.users] == [
        ("user:bob", 3, 2),
        ("user:ann", 2, 2),
    ]
    assert [user.denied[Limit.REQUESTS_PER_HOUR] for user in report.users] == [1, 0]
    assert (report.models[0].admitted, report.models[0].requests) == (4, 6)
    named = Quotas({"m": unlimited(), "ann": unlimited("ann", max_requests_per_hour=1, on_violation="reject")}, {})
    assert [user.model_id for user in replay(trace, named, model="m", per_user=True).users] == ["ann"]
    with pytest.raises(
        ValueError, match=r"none of the trace's 2 users has a quota, such as 'bob'; add a table \[defaults"
    ):
        replay(trace, {"m": unlimited()}, per_user=True)
    with pytest.raises(ValueError, match="the trace names no users"):
        replay(make_trace([0]), quotas, per_user=True)


class _TickWaiter(Waiter):
    """A waiter whose owner looks at every millisecond."""

    def __init__(self):
        self.context = None

    def prepare(self):
        pass

    def wake(self):
        pass

    arm = wake


def by_ticks(manager, ids, times_ms, groups, tokens, durations_ms):
    """The codes and waits of requests when the clock goes on by a millisecond at a time: nothing is skipped."""
    clock = manager.clock
    codes, waited = [0] * len(times_ms), [0] * len(times_ms)
    waiting, ends, index = {}, [], 0
    while index < len(times_ms) or waiting:
        for place, waiter in list(waiting.items()):
            if waiter.done:
                del waiting[place]
                waited[place] = clock.now_ns // MS - times_ms[place]
                try:
                    ends.append((clock.now_ns // MS + durations_ms[place], place, waiter.take()))
                except QuotaExceededError as error:
                    codes[place] = int(error.result.limit)
        due = sorted((entry for entry in ends if entry[0] <= clock.now_ns // MS), key=lambda entry: entry[0])
        if due:
            ends.remove(due[0])
            due[0][2].release()
            continue
        if any(waiter.done for waiter in waiting.values()):
            continue
        if index < len(times_ms) and times_ms[index] * MS <= clock.now_ns:
            waiter = _TickWaiter()
            try:
                got = manager._admit_or_queue(waiter, ids[groups[index]], tokens[index], 0, 0, None, 0, nowait=False)
                if isinstance(got, Grant):
                    ends.append((clock.now_ns // MS + durations_ms[index], index, got))
                else:
                    waiting[index] = waiter
            except QuotaExceededError as error:
                codes[index] = int(error.result.limit)
            index += 1
            continue
        clock.advance_ns(MS)
    for _, _, grant in ends:
        grant.release()
    return codes, waited


kinds = st.builds(Tokens, *[st.integers(0, 15)] * 3)
weights = st.sampled_from([(0, 0, 1), (1, 0, 0), (3, 0.3, 15), (0.1, 0, 0.5)])


@given(data=st.data())
def test_nothing_is_missed_between_two_events(data):
    """The simulation jumps from event to event; looking at every millisecond admits the same, at the same time."""
    count = data.draw(st.integers(1, 12))
    times_ms = np.cumsum(data.draw(st.lists(st.integers(0, 900), min_size=count, max_size=count)))
    by_kind = data.draw(st.booleans())
    tokens = data.draw(st.lists(kinds if by_kind else st.integers(0, 30), min_size=count, max_size=count))
    durations = data.draw(st.lists(st.integers(0, 1500), min_size=count, max_size=count))
    held = data.draw(st.booleans())
    ids = data.draw(st.sampled_from([[("m",)], [("m",), ("n",)], [("u", "m"), ("v", "m")]]))
    groups = data.draw(st.lists(st.integers(0, len(ids) - 1), min_size=count, max_size=count))
    some = st.none() | st.sampled_from([1, 3, 10])
    # The same of all: which of them counts depends on which id held a request up when the queue was last looked at.
    grace_sec = data.draw(st.sampled_from([0.0, 0.5, 2.0, 4.0]))
    configs = {
        name: unlimited(
            name,
            max_requests_per_second=data.draw(some),
            burst_requests=data.draw(st.integers(0, 3)),
            max_tokens_per_second=data.draw(st.none() | st.sampled_from([5, 20])),
            burst_tokens=data.draw(st.integers(0, 30)),
            max_concurrent_requests=data.draw(st.none() | st.integers(1, 2)) if held else None,
            on_violation=data.draw(st.sampled_from(["queue", "throttle", "reject", "warn"])),
            grace_period_sec=grace_sec,
            max_queued_requests=data.draw(st.sampled_from([1, 1000])),
        )
        for name in sorted({name for group in ids for name in group})
    }
    actions = {config.on_violation for config in configs.values()}
    # One that waits at an id, and would be rejected at another, is denied if its queue is looked at meanwhile.
    assume(len(ids[0]) == 1 or "reject" not in actions or actions <= {"reject", "warn"})
    for name in sorted(configs) if by_kind else []:
        if data.draw(st.booleans()):
            meter = configs[name].replace(model_id=f"{name}#x", token_weights=data.draw(weights))
            configs[meter.model_id] = meter.replace(max_tokens_per_second=data.draw(some))
    managers = []
    for _ in range(2):
        manager = ResourceQuotaManager(clock=ManualClock(), max_models=8)
        for config in configs.values():
            manager.set_quota(config)
        managers.append(manager)
    outcome = simulated(
        Simulation(managers[0], ids, wait=True, held=held),
        times_ms.astype(np.int64) * MS,
        np.array(groups),
        np.array([astuple(each) for each in tokens] if by_kind else tokens, np.int64),
        durations_ns=np.array(durations, np.int64) * MS if held else None,
    )
    plain = [group[0] if len(group) == 1 else group for group in ids]
    codes, waited = by_ticks(managers[1], plain, times_ms.tolist(), groups, tokens, durations if held else [0] * count)
    several = len(ids[0]) > 1 or any("#" in name for name in configs)

    def named(codes):
        """The codes; of several ids, which one ends a wait depends on when its queue was last looked at."""
        return [-bool(code) if several and wait else code for code, wait in zip(codes, waited, strict=True)]

    assert (outcome.waited_ns // MS).tolist() == waited
    assert named(outcome.codes.tolist()) == named(codes)
    for config in configs.values():
        usage = managers[0].get_usage(config.model_id)
        assert (usage.concurrent_requests, usage.queued_requests) == (0, 0)


@pytest.mark.parametrize("wait", [False, True])
def test_a_replay_leaves_the_log_alone(caplog, wait):
    quota = unlimited(max_requests_per_second=1, burst_requests=0, on_violation="queue", grace_period_sec=1)
    report = replay(make_trace([0] * 9), {"m": quota}, wait=wait)
    assert report.admitted < 9
    assert not caplog.records


@given(data=st.data())
def test_what_is_decided_as_a_batch_before_the_first_wait_is_the_same(data):
    """A replay decides up to the first denial as a batch, and simulates the rest: as if all of it were simulated."""
    count = data.draw(st.integers(1, 30))
    times_ms = np.cumsum(data.draw(st.lists(st.integers(0, 700), min_size=count, max_size=count)))
    index = np.array(data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)), np.int32)
    tokens = data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    trace = make_trace(times_ms - times_ms[0], tokens, model_index=index, models=("m", "n"))
    configs = {
        name: unlimited(
            name,
            max_requests_per_second=data.draw(st.sampled_from([1, 2, 5])),
            burst_requests=data.draw(st.integers(0, 4)),
            on_violation=data.draw(st.sampled_from(["queue", "throttle", "warn"])),
            grace_period_sec=1.5,
        )
        for name in trace.models
    }
    report = replay(trace, configs, wait=True)
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=2)
    for config in configs.values():
        manager.set_quota(config)
    whole = simulated(Simulation(manager, [("m",), ("n",)], wait=True), trace.times_ns, index, trace.tokens)
    for place, model in enumerate(report.models):
        own = index == place
        waited = own & (whole.codes == 0) & (whole.waited_ns > 0)
        assert model.admitted == np.count_nonzero(own & (whole.codes == 0))
        assert model.waited == np.count_nonzero(waited)
        assert model.warned == np.count_nonzero(whole.over[own])
        assert model.longest_wait_ms == (whole.waited_ns[waited].max() / MS if waited.any() else None)


def test_warnings_are_counted_with_durations_too():
    trace = make_trace([0, 0, 0, 5000], durations_ns=np.full(4, SECOND))
    quota = unlimited(max_concurrent_requests=2, on_violation="warn")
    (model,) = waits_ms(trace, quota).models
    assert (model.admitted, model.warned) == (4, 1)


def test_who_is_told_early_is_told_early():
    """A wait that another request has made too long ends at once, not at its deadline."""
    quota = unlimited(max_tokens_per_second=20, burst_tokens=0, on_violation="throttle", grace_period_sec=0.5)
    trace = make_trace([0, 517, 517], [1, 20, 1])
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=1)
    manager.set_quota(quota)
    outcome = simulated(Simulation(manager, [("m",)], wait=True), trace.times_ns, None, trace.tokens)
    assert (outcome.codes > 0).tolist() == [False, True, False]
    assert outcome.waited_ns.tolist() == [0, 0, 0]
