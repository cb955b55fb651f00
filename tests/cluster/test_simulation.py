"""Histories of faults in virtual time: no window and no level ever holds more than its limit, over all hosts together.

``MODELQUOTA_HISTORIES=10000`` runs that many; ``MODELQUOTA_HISTORY=131`` runs one again, whose seed was printed.
"""

import os

import pytest

pytest.importorskip("lupa", reason="the simulated store needs lupa")

from cluster_mutants import MUTANTS
from cluster_simulation import NS, Simulation

from modelquota._core.table import shares

HISTORIES = int(os.environ.get("MODELQUOTA_HISTORIES", "200"))
ONLY = os.environ.get("MODELQUOTA_HISTORY")
SEEDS = [int(ONLY)] if ONLY else range(HISTORIES)
MUTANT_HISTORIES = 400
REAL_PART = 15  # a fifteenth of the histories, since managers take longer


def test_no_history_exceeds_a_limit():
    admitted = 0
    for seed in SEEDS:
        history = Simulation(seed)
        excess = history.run()
        assert excess is None, f"MODELQUOTA_HISTORY={seed}: {excess}"
        admitted += len(history.log)
    assert admitted > 50 * len(SEEDS)


def test_a_limit_that_is_lowered_holds_after_one_lease_in_every_history():
    admitted = 0
    for seed in SEEDS[: max(1, len(SEEDS) // 3)]:
        history = Simulation(seed, lowers=True)
        excess = history.run()
        assert excess is None, f"MODELQUOTA_HISTORY={seed}: {excess}"
        admitted += sum(history.holds_ns is not None and entry[0] > history.holds_ns for entry in history.log)
    assert admitted > 50 * len(SEEDS) // 3


@pytest.mark.parametrize("seed", range(12))
def test_a_limit_that_is_lowered_holds_without_faults(seed):
    history = Simulation(seed, lowers=True, faults=False)
    assert history.run() is None
    assert history.holds_ns is not None


def test_no_history_of_real_managers_exceeds_a_limit():
    for seed in SEEDS[: max(1, len(SEEDS) // REAL_PART)]:
        excess = Simulation(seed, real=True).run()
        assert excess is None, f"MODELQUOTA_HISTORY={seed}: {excess}"


def test_a_seed_is_one_history():
    first, second = Simulation(7), Simulation(7)
    assert first.run() == second.run()
    assert [entry[:3] for entry in first.log] == [entry[:3] for entry in second.log]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_is_found(mutant):
    assert any(Simulation(seed, **MUTANTS[mutant]).run() is not None for seed in range(MUTANT_HISTORIES))


@pytest.mark.parametrize("mutant", ["no learning", "shrinking below use", "adopting a stale reply"])
def test_open_requests_alone_show_a_mutant(mutant):
    limits = {"concurrent_requests": 8}
    assert any(Simulation(seed, limits=limits, **MUTANTS[mutant]).run() for seed in range(MUTANT_HISTORIES))
    assert not any(Simulation(seed, limits=limits).run() for seed in SEEDS[:30])


def test_two_real_managers_never_have_more_requests_open_than_the_limit():
    admitted = 0
    for seed in SEEDS[:10]:
        history = Simulation(seed, real=True, nodes=2, limits={"concurrent_requests": 8})
        excess = history.run()
        assert excess is None, f"MODELQUOTA_HISTORY={seed}: {excess}"
        admitted += len(history.log)
    assert admitted > 20 * len(SEEDS[:10])


@pytest.mark.parametrize("nodes", [1, 4])
def test_without_faults_nearly_all_of_the_concurrency_is_used(nodes):
    history = Simulation(1, faults=False, nodes=nodes, limits={"concurrent_requests": 80}, load=200)
    open_at = []
    for second in range(15, 40):
        history.at(second * NS, lambda: open_at.append(history.open_requests()))
    assert history.run() is None
    assert max(open_at) <= 80
    assert sum(open_at) >= 0.95 * 80 * len(open_at)


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize(
    ("limits", "limit", "window_sec"),
    [
        ({"requests_per_minute": 1200}, 1200, 60),
        ({"requests_per_second": (100, 0)}, 100, 1),
        ({"requests_per_second": (50, 50)}, 50, 1),
    ],
)
def test_without_faults_nearly_all_of_a_limit_is_used(nodes, limits, limit, window_sec):
    history = Simulation(1, faults=False, nodes=nodes, limits=limits, load=2 * limit / window_sec)
    counted_sec = window_sec * 61 / 60  # a slot that has begun to age out counts in full
    begin_sec = 15 + 2 * counted_sec
    windows = 2 if window_sec == 60 else 20
    history.duration_ns = int((begin_sec + windows * counted_sec) * NS)
    assert history.run() is None
    counts = history.admitted_by_window(int(counted_sec * NS), int(begin_sec * NS))
    assert sum(counts[at] for at in range(windows)) >= 0.95 * limit * windows


def test_far_below_a_limit_a_host_makes_one_exchange_a_second():
    history = Simulation(1, faults=False, real=True, nodes=2, limits={"requests_per_day": 10**6}, load=50)
    urgent = dict.fromkeys(history.machines, 0)

    def follow_calls():
        for machine, seen in urgent.items():
            urgent[machine] = shares.read_lease(machine.host.table).urgent
            if urgent[machine] != seen:
                machine.pace.urge()
                machine.wake_if_idle()
        history.at(history.now_ns + NS // 20, follow_calls)

    numbers = []
    follow_calls()
    for second in (20, 40):
        history.at(second * NS, lambda: numbers.append(sum(machine.node.number for machine in history.machines)))
    history.duration_ns = 40 * NS
    assert history.run() is None
    assert len(history.log) > 40 * 50
    assert numbers[1] - numbers[0] <= 2 * 20 * 1.3  # the jitter is a fifth


@pytest.mark.parametrize("limits", [{"requests_per_day": 10**6}, {"requests_per_minute": 3000}])
def test_a_store_that_restarts_denies_nobody_where_much_is_free(limits):
    history = Simulation(1, faults=False, nodes=2, limits=limits, load=10)
    history.duration_ns = 40 * NS

    def restart():
        history.restart(away_sec=0.5)

    starved = []
    for second in (12, 40):
        history.at(second * NS, lambda: starved.append([machine.host.row("m").starved for machine in history.machines]))
    generations = []
    for second in (14, 36):
        history.at(second * NS, lambda: generations.append({machine.node.generation for machine in history.machines}))
    history.at(15 * NS, restart)
    assert history.run() is None
    assert len(history.log) > 25 * 20
    assert generations[0].isdisjoint(generations[1])  # it has learned
    assert starved[0] == starved[1]


def test_what_hosts_keep_for_a_restart_is_given_to_the_one_that_needs_it():
    limits = {"requests_per_minute": 1200}
    history = Simulation(1, faults=False, nodes=4, limits=limits, load=2, lease_sec=60)
    history.duration_ns = 280 * NS
    hot = history.machines[0]

    def ask():
        if hot.host.begin("m", 1):
            history.began(hot, 1, 1.0)
        else:
            hot.pace.urge()
            hot.wake_if_idle()
        history.at(history.now_ns + NS // 100, ask)

    history.at(135 * NS, ask)
    assert history.run() is None
    counts = history.admitted_by_window(61 * NS, 150 * NS)
    assert min(counts[0], counts[1]) >= 0.95 * 1200
