"""Histories of faults in virtual time: no window and no level ever holds more than its limit, over all hosts together.

``MODELQUOTA_HISTORIES=10000`` runs that many; ``MODELQUOTA_HISTORY=131`` runs one again, whose seed was printed.
"""

import os

import pytest

pytest.importorskip("lupa", reason="the simulated store needs lupa")

from cluster_mutants import MUTANTS
from cluster_simulation import NS, Simulation

HISTORIES = int(os.environ.get("MODELQUOTA_HISTORIES", "300"))
ONLY = os.environ.get("MODELQUOTA_HISTORY")
SEEDS = [int(ONLY)] if ONLY else range(HISTORIES)
MUTANT_HISTORIES = 150
REAL_PART = 15  # a fifteenth of the histories, since managers take longer


def test_no_history_exceeds_a_limit():
    admitted = 0
    for seed in SEEDS:
        history = Simulation(seed)
        excess = history.run()
        assert excess is None, f"MODELQUOTA_HISTORY={seed}: {excess}"
        admitted += len(history.log)
    assert admitted > 50 * len(SEEDS)


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
