"""Grants end exactly once, wherever that happens: in a cycle, in a forked process, in several threads at a time."""

import gc
import warnings

import pytest
from strategies import UNLIMITED

from modelquota import ManualClock, ResourceQuotaManager


class Node:
    """Something that garbage collection finds in a cycle with itself."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def manager():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    for model_id in ("a", "b"):
        manager.set_quota(model_id, **UNLIMITED)
    return manager


def held(manager, model_id="a"):
    usage = manager.get_usage(model_id)
    return usage.concurrent_requests, usage.reserved_ram_mb


@pytest.mark.parametrize("ids", ["a", ("a", "b")])
@pytest.mark.parametrize("first", ["grant", "node"])
def test_a_grant_in_a_cycle_is_released(manager, ids, first):
    """In whichever order the collector finds the two."""
    if first == "grant":
        grant = manager.reserve(ids, 1, ram_needed_mb=5)
        node = Node()
    else:
        node = Node()
        grant = manager.reserve(ids, 1, ram_needed_mb=5)
    node.grant = grant
    del node, grant
    with pytest.warns(ResourceWarning, match="garbage-collected unreleased"):
        gc.collect()
    assert held(manager) == (0, 0)


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_manager_outlives_its_grants(cyclic):
    """A manager that holds its own grants is a cycle, too; the last grant is released before the memory goes."""
    for _ in range(3):
        manager = ResourceQuotaManager(clock=ManualClock(10**12))
        manager.set_quota("a", **UNLIMITED)
        grants = [manager.reserve("a", 1) for _ in range(3)]
        if cyclic:
            manager.node = Node()
            manager.node.grants = grants
            manager.grants = grants
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            del manager
            del grants
            gc.collect()


def test_a_grant_of_nobody_counts_and_holds_nothing(manager):
    grant = manager.reserve("nobody", 1)
    assert all(grant.add() for _ in range(1000))
    assert (grant.tokens, grant.model_ids) == (1000, ())
    grant.settle(7)
    grant.release()
    assert manager.check_quota(("nobody", "neither"), 1).current_usage == 0.0
    assert manager.get_stats().total_checks == 3
