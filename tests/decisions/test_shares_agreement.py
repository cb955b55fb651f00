"""A host with shares of its limits and the plain model of one, side by side; and many hosts together."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from agreement import assert_same_decision
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from oracle import DAY_NS, LENGTHS_NS, MS_NS, SECOND_NS
from oracle_shares import COMPONENTS, KEEP, WHOLE, SharingOracle
from strategies import Step, bursts, counts, starts_ns, steps, tokens

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager, ViolationAction
from modelquota._core.table import shares

WINDOWS = len(LENGTHS_NS)
LIMITS: dict[str, Any] = {
    "max_tokens_per_hour": counts(60),
    "max_tokens_per_day": counts(90),
    "max_requests_per_hour": counts(12),
    "max_requests_per_day": counts(20),
    "max_tokens_per_minute": counts(40),
    "max_requests_per_minute": counts(10),
    "max_tokens_per_month": counts(120),
    "max_requests_per_month": counts(30),
}
RATES: dict[str, Any] = {
    "max_requests_per_second": st.sampled_from([0.0, 0.1, 1 / 3, 0.5, 1.0, 2.5, 3.0, 7.7, 60.0]),
    "max_tokens_per_second": st.sampled_from([0.0, 8.0, 12.5, 33.3, 1e6 + 0.1]),
}


def configs() -> st.SearchStrategy[ResourceQuotaConfig]:
    """Limits that bite, of any kind but memory."""
    fields = {name: st.none() | values for name, values in (LIMITS | RATES).items()}
    actions = st.sampled_from([*ViolationAction])
    return st.builds(
        ResourceQuotaConfig.unlimited,
        st.just("m"),
        **fields,
        burst_requests=bursts(6),
        burst_tokens=bursts(30),
        on_violation=actions,
    )


def shares_of(total: int) -> st.SearchStrategy[int]:
    """Shares of a total: none, all, more, a part, or what there is already."""
    if total == WHOLE:
        return st.sampled_from([KEEP, 0, 5, WHOLE])
    return st.one_of(st.sampled_from([KEEP, 0, total, min(2 * total, 2**62)]), st.integers(0, total))


class HostAgreement(RuleBasedStateMachine):
    """Requests, exchanges, leases, other limits and time, in any order."""

    @initialize(start_ns=starts_ns(), config=configs())
    def begin(self, start_ns: int, config: ResourceQuotaConfig) -> None:
        self.clock = ManualClock(start_ns)
        self.manager = ResourceQuotaManager(clock=self.clock, max_models=10)
        self.manager.set_quota(config)
        shares.begin_sharing(self.manager)
        self.oracle = SharingOracle(config, self.clock)
        self.codes = shares.sharing_codes(self.manager)
        self.overdrawn = config.on_violation is ViolationAction.WARN  # whether more may be used than is held
        self.take_all(3600)

    @rule(data=st.data(), places=st.sets(st.integers(0, COMPONENTS - 1), max_size=3))
    def exchange_some(self, data: st.DataObject, places: set[int]) -> None:
        totals = self.oracle.model.totals()
        self.exchange([data.draw(shares_of(totals[place])) if place in places else KEEP for place in range(COMPONENTS)])

    @rule(lease_s=st.sampled_from([1, 60, 3600, 86_400]))
    def take_all(self, lease_s: int) -> None:
        self.renew(lease_s)
        self.exchange(self.oracle.model.totals())

    @rule(divisor=st.integers(2, 5))
    def keep_a_part(self, divisor: int) -> None:
        self.exchange([total if total == WHOLE else total // divisor for total in self.oracle.model.totals()])

    @rule()
    def give_up_what_is_not_used(self) -> None:
        self.exchange([0] * (COMPONENTS - 1) + [KEEP])

    def exchange(self, asked: list[int]) -> None:
        totals = self.oracle.model.totals()
        found = shares.exchange_shares(self.manager, self.codes, np.array([asked]))
        self.oracle.model.pass_time(self.clock.now_ns)
        before, needed = self.oracle.model.used(self.clock.now_ns), self.oracle.model.needed
        self.oracle.model.exchange(self.clock.now_ns, asked)
        assert found.alive.tolist() == [True]
        assert found.limits[0].tolist() == totals
        assert found.used[0].tolist() == before
        assert found.held[0].tolist() == self.oracle.model.held
        assert found.starved[0] == self.oracle.model.starved
        assert found.needed[0].tolist() == [int(needed is not None), needed or 0]

    @rule(lease_s=st.sampled_from([0, 1, 5, 60, 3600]))
    def renew(self, lease_s: int) -> None:
        end_ns = self.clock.now_ns + lease_s * SECOND_NS
        shares.renew_lease(self.manager, end_ns)
        self.oracle.lease.end_ns = end_ns

    @rule(on_lease_end=st.sampled_from(["deny", "share", "allow"]), nodes=st.integers(1, 5))
    def change_rule(self, on_lease_end: Any, nodes: int) -> None:
        """While the lease runs: afterwards it is seen at the end of a slot."""
        if self.oracle.model.live and self.clock.now_ns < self.oracle.lease.end_ns:
            shares.set_lease_rule(self.manager, on_lease_end=on_lease_end, nodes=nodes, retry_ns=3 * MS_NS)
            lease = self.oracle.lease
            lease.on_lease_end, lease.nodes, lease.retry_ns = on_lease_end, nodes, 3 * MS_NS

    @rule(cost=tokens(), count=st.integers(1, 8), step=steps(DAY_NS))
    def requests(self, cost: int, count: int, step: Step) -> None:
        self.wait(step)
        for _ in range(count):
            expected = self.oracle.check(cost)
            found = self.manager.check_quota("m", cost)
            assert_same_decision(found, expected)
            assert found.starved is self.oracle.model.last_starved
            if expected.allowed and expected.limit is None:
                self.assert_within_the_share()

    def assert_within_the_share(self) -> None:
        """What was admitted without a violation is within what is held: the invariant from which all else follows."""
        model = self.oracle.model
        if not model.live:
            return
        found = shares.exchange_shares(self.manager, self.codes)
        for place, (used, held, limit) in enumerate(
            zip(found.used[0].tolist(), found.held[0].tolist(), found.limits[0].tolist(), strict=True)
        ):
            if limit != WHOLE and not self.overdrawn and place < 2 * WINDOWS:
                assert used <= min(held, limit), place

    @rule(step=steps(DAY_NS))
    def wait(self, step: Step) -> None:
        self.clock.advance_ns(step.end_ns(self.clock.now_ns) - self.clock.now_ns)

    @rule(fields=st.fixed_dictionaries({}, optional=LIMITS | {"burst_requests": bursts(6), "burst_tokens": bursts(30)}))
    def change_limits(self, fields: dict[str, Any]) -> None:
        """To a limit of which less than is used may be held, too: of one that is new, nothing is."""
        self.overdrawn = self.overdrawn or bool(fields)
        self.manager.update_quota("m", **fields)
        config = self.oracle.model.config.replace(**fields)
        self.oracle.model.change(config, self.clock.now_ns)
        assert self.manager.get_quota("m") == config


TestHostAgreement = HostAgreement.TestCase
TestHostAgreement.settings = settings(stateful_step_count=25, report_multiple_bugs=False)


@given(
    rate=st.sampled_from([0.1, 1 / 3, 1.0, 2.0, 2.5, 7.7, 1000.0, 1e6 + 0.1, 1e-7]) | st.floats(1e-3, 1e4),
    burst=st.integers(0, 10**4),
    cuts=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=9),
)
def test_parts_of_a_rate_are_never_more_than_the_rate(rate: float, burst: int, cuts: list[tuple[float, float]]) -> None:
    """Shares that add up to the totals are worth at most the rate and its cap, and a whole one exactly them."""
    quota = ResourceQuotaConfig.unlimited("m", max_requests_per_second=rate, burst_requests=burst)
    sums = [Fraction(0), Fraction(0)]
    places = [2 * WINDOWS, 2 * WINDOWS + 1]
    hosts = [ResourceQuotaManager(clock=ManualClock(10**12), max_models=2) for _ in range(len(cuts) + 1)]
    unit = 0
    left = None
    for host, cut in zip(hosts, [*cuts, (1.0, 1.0)], strict=True):
        host.set_quota(quota)
        shares.begin_sharing(host)
        shares.renew_lease(host, 2 * 10**12)
        codes = shares.sharing_codes(host)
        totals = shares.exchange_shares(host, codes).limits[0]
        left = [int(totals[place]) for place in places] if left is None else left
        asked = np.full((1, COMPONENTS), KEEP)
        for one, place in enumerate(places):
            asked[0, place] = int(left[one] * cut[one])
            left[one] -= int(asked[0, place])
        shares.exchange_shares(host, codes, asked)
        row = host._arrays()[1][0]
        unit = 1 << int(row["request_shift"])
        sums[0] += Fraction(int(row["request_drain"]), unit)
        sums[1] += Fraction(int(row["request_cap"]["high"]) << 64 | int(row["request_cap"]["low"]), SECOND_NS * unit)
    assert left == [0, 0]
    assert Fraction(rate) - Fraction(len(hosts), unit) <= sums[0] <= Fraction(rate)
    assert max(Fraction(rate), Fraction(1)) + burst - Fraction(len(hosts), SECOND_NS * unit) <= sums[1]
    assert sums[1] <= max(Fraction(rate), Fraction(1)) + burst


@given(rate=st.sampled_from([2.0, 2.5, 0.5]), seed=st.integers(0, 2**32))
@settings(max_examples=max(5, settings().max_examples // 5))
def test_many_hosts_together_admit_no_more_than_the_limits(rate: float, seed: int) -> None:
    """Shares move from host to host, each given up before another one takes it; the log is of all hosts together."""
    clock = ManualClock(10**15 + seed)
    quota = ResourceQuotaConfig.unlimited(
        "m", max_requests_per_second=rate, burst_requests=3, max_requests_per_minute=30, max_tokens_per_hour=500
    )
    hosts = [ResourceQuotaManager(clock=clock, max_models=2) for _ in range(3)]
    for host in hosts:
        host.set_quota(quota)
        shares.begin_sharing(host)
        shares.renew_lease(host, 2**61)
    codes = [shares.sharing_codes(host) for host in hosts]
    totals = shares.exchange_shares(hosts[0], codes[0]).limits[0].tolist()
    free = [0 if total == WHOLE else total for total in totals]
    log: list[tuple[int, int]] = []
    rng = np.random.default_rng(seed)
    for _ in range(40):
        clock.advance_ns(int(rng.integers(0, 10 ** rng.choice([6, 8, 9, 10]))))
        one = int(rng.integers(len(hosts)))
        wanted = (rng.random(COMPONENTS) * np.array([min(total, 10**9) for total in totals])).astype(np.int64)
        before = shares.exchange_shares(hosts[one], codes[one]).held[0].tolist()
        asked = [
            KEEP if total == WHOLE else min(int(want), held + spare)
            for want, held, spare, total in zip(wanted, before, free, totals, strict=True)
        ]
        after = shares.exchange_shares(hosts[one], codes[one], np.array([asked])).held[0].tolist()
        free = [
            spare + was - now if total != WHOLE else 0
            for spare, was, now, total in zip(free, before, after, totals, strict=True)
        ]
        assert min(free) >= 0
        for _ in range(int(rng.integers(1, 12))):
            cost = int(rng.integers(1, 40))
            if hosts[int(rng.integers(len(hosts)))].check_quota("m", cost):
                log.append((clock.now_ns, cost))
    for first in range(len(log)):
        for last in range(first, len(log)):
            span_ns = log[last][0] - log[first][0]
            count, cost = last - first + 1, sum(one for _, one in log[first : last + 1])
            assert count <= Fraction(rate) * span_ns / SECOND_NS + max(Fraction(rate), Fraction(1)) + 3
            if span_ns < 60 * SECOND_NS:
                assert count <= 30
            if span_ns < 3600 * SECOND_NS:
                assert cost <= 500
    assert log


@given(
    steps=st.lists(
        st.tuples(st.integers(1, 90), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.001, 0.02, 0.4, 3.0, 50.0])),
        min_size=3,
        max_size=25,
    )
)
def test_refunds_are_never_more_than_what_was_charged_too_much(steps: list[tuple[int, float, float, float]]) -> None:
    """A host that estimates and settles, and one that knew from the start, while their shares of a rate change."""
    clock = ManualClock(10**15)
    quota = ResourceQuotaConfig.unlimited("m", max_tokens_per_second=10, burst_tokens=190, max_tokens_per_hour=10**6)
    hosts = [ResourceQuotaManager(clock=clock, max_models=2) for _ in range(2)]
    for host in hosts:
        host.set_quota(quota)
        shares.begin_sharing(host)
        shares.renew_lease(host, 2**61)
    guessing, knowing = hosts
    codes = shares.sharing_codes(knowing)
    totals = shares.exchange_shares(knowing, codes).limits
    grants = []
    for estimate, truth, part, pause in steps:
        asked = np.where(totals == WHOLE, KEEP, totals)
        asked[0, 2 * WINDOWS + 2] = int(asked[0, 2 * WINDOWS + 2] * part)  # of the drain; of the rest all
        for host in hosts:
            shares.exchange_shares(host, codes, asked)
        actual = int(estimate * truth)
        if guessing.peek_quota("m", estimate):
            grants.append((guessing.reserve("m", estimate), actual))
            assert knowing.check_quota("m", actual)
        clock.advance(pause)
        if len(grants) > 2:
            grant, actual = grants.pop(0)
            grant.settle(actual)
            grant.release()
    for grant, actual in grants:
        grant.settle(actual)
        grant.release()
    guessed, known = (shares.exchange_shares(host, codes).used[0].tolist() for host in hosts)
    assert guessed[2 * WINDOWS + 3] >= known[2 * WINDOWS + 3]
    assert guessed[WINDOWS : 2 * WINDOWS] == known[WINDOWS : 2 * WINDOWS]
