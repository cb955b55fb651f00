"""Grants end exactly once, wherever that happens: in a cycle, in a forked process, in several threads at a time."""

import gc
import multiprocessing
import sys
import warnings

import pytest
from factories import open_quota

from modelquota import ManualClock, ResourceQuotaManager

QUOTAS = [open_quota("a"), open_quota("b")]


class Node:
    """Something that garbage collection finds in a cycle with itself."""

    def __init__(self):
        self.itself = self


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


def test_a_warning_that_is_an_error_is_reported(manager, monkeypatch):
    """As every error in a deallocation; and the grant is released in any case."""
    reported = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: reported.append(unraisable.exc_value))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        grant = manager.reserve("a", 1, ram_needed_mb=5)
        del grant
    (error,) = reported
    assert isinstance(error, ResourceWarning)
    assert "garbage-collected unreleased" in str(error)
    assert held(manager) == (0, 0)


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_manager_outlives_its_grants(cyclic):
    """A manager that holds its own grants is a cycle, too; the last grant is released before the memory goes."""
    for _ in range(3):
        manager = ResourceQuotaManager(clock=ManualClock(10**12))
        manager.set_quota(open_quota("a"))
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


def in_a_fork(work):
    """Run it in a forked child, where warnings are errors and it may fail."""

    def body():
        warnings.simplefilter("error")
        work()
        gc.collect()

    child = multiprocessing.get_context("fork").Process(target=body)
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_the_copy_of_a_grant_in_a_forked_process_does_nothing(manager, capfd):
    grants = {
        verb: manager.reserve(ids, 100, ram_needed_mb=1)
        for verb, ids in {"settle": "a", "add": ("b", "a"), "cancel": ("a", "b"), "leave": "a", "drop": "a"}.items()
    }
    before = manager.get_usage("a"), manager.get_usage("b")

    def end_all():
        assert grants["add"].add(1000)
        manager.settle_many([grants["settle"]], [7])
        grants["cancel"].cancel()
        with pytest.raises(ZeroDivisionError), grants["leave"]:
            raise ZeroDivisionError
        grants.clear()
        gc.collect()
        assert (manager.get_usage("a"), manager.get_usage("b")) == before

    in_a_fork(end_all)
    assert capfd.readouterr().err == ""
    assert (manager.get_usage("a"), manager.get_usage("b")) == before
    grants["settle"].settle(30)
    assert grants["add"].add(150)
    grants["cancel"].cancel()
    for grant in grants.values():
        grant.release()
    usage = manager.get_usage("a")
    assert usage.tokens_this_day == 30 + 150 + 0 + 100 + 100
    assert usage.requests_this_day == 4
    assert manager.get_usage("b").tokens_this_day == 150
    assert held(manager, "a") == held(manager, "b") == (0, 0)


def test_a_forked_process_has_grants_of_its_own(manager):
    """What it reserves counts for all, it releases itself, and its own child leaves that alone."""

    def reserve():
        grant = manager.reserve(("a", "b"), 50, ram_needed_mb=2)
        in_a_fork(grant.cancel)
        assert held(manager) == (2, 3)
        grant.settle(20)
        grant.release()

    with manager.reserve("a", 100, ram_needed_mb=1):
        in_a_fork(reserve)
        assert held(manager) == (1, 1)
    assert manager.get_usage("a").tokens_this_day == 120
    assert manager.get_usage("b").tokens_this_day == 20
