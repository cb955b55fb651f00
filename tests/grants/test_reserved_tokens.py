"""Tokens that open grants have reserved may come back: a wait for them is not provably too long. And `peek_quota`."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

import pytest
from factories import open_quota
from neighbors import stopped_inside
from patience import until

from modelquota import Limit, ManualClock, QuotaExceededError, ResourceQuotaManager

WINDOWS = {"max_tokens_per_hour": 100, "max_tokens_per_day": 100}
RATE = {"max_tokens_per_second": 1, "burst_tokens": 99}
LIMITS: list[dict[str, Any]] = [{name: limit} for name, limit in WINDOWS.items()] + [RATE]


def acquire_in_thread(manager: ResourceQuotaManager, tokens: int) -> tuple[threading.Thread, list[Any]]:
    got: list[Any] = []

    def acquire() -> None:
        try:
            got.append(manager.acquire("m", tokens))
        except QuotaExceededError as error:
            got.append(error)

    thread = threading.Thread(target=acquire, daemon=True)
    thread.start()
    return thread, got


@pytest.mark.parametrize("action", ["queue", "throttle"])
@pytest.mark.parametrize("limits", LIMITS)
def test_a_wait_for_reserved_tokens_is_granted_when_they_come_back(limits, action):
    manager = ResourceQuotaManager()
    manager.set_quota(open_quota("m", **limits, on_violation=action, grace_period_sec=25))
    grant = manager.reserve("m", 90)
    thread, got = acquire_in_thread(manager, 60)
    time.sleep(0.05)
    assert not got  # not refused at once
    grant.settle(1)
    grant.release()
    thread.join(30)
    got.pop().release()


@pytest.mark.parametrize("limits", LIMITS)
def test_tokens_that_were_added_beyond_the_estimate_may_come_back_as_well(limits):
    manager = ResourceQuotaManager()
    manager.set_quota(open_quota("m", **limits, on_violation="queue", grace_period_sec=25))
    grant = manager.reserve("m", 10)
    assert grant.add(90)
    thread, got = acquire_in_thread(manager, 60)
    until(lambda: got or manager.get_usage("m").queued_requests)
    assert not got  # not refused at once
    grant.settle(1)
    grant.release()
    thread.join(30)
    got.pop().release()


@pytest.mark.parametrize("limits", LIMITS)
def test_what_is_reserved_is_found_again_after_a_process_has_died_in_the_row(tmp_path, limits):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64)
    manager.set_quota(open_quota("m", **limits, on_violation="queue", grace_period_sec=25))
    grant = manager.reserve("m", 90)
    with stopped_inside(manager, "m") as pid:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert manager.check_quota("m", 1)  # takes the lock over
    assert manager._arrays()[0]["recoveries"] == 1
    thread, got = acquire_in_thread(manager, 60)
    until(lambda: got or manager.get_usage("m").queued_requests)
    assert not got  # not refused at once
    grant.settle(1)
    grant.release()
    thread.join(30)
    got.pop().release()
    assert manager._arrays()[2]["reserved_tokens"].sum() == 0


@pytest.mark.parametrize("action", ["queue", "throttle"])
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("how", ["settled", "too large", "spent besides"])
def test_it_is_refused_at_once_if_all_that_is_reserved_would_not_do(limits, action, how):
    manager = ResourceQuotaManager()
    manager.set_quota(open_quota("m", **limits, on_violation=action, grace_period_sec=25))
    if how == "spent besides":
        manager.charge_many(manager.codes(["m"]), 70)
    grant = manager.reserve("m", 90 if how != "spent besides" else 20)
    if how == "settled":
        grant.settle(90)
    start = time.monotonic()
    with pytest.raises(QuotaExceededError):
        manager.acquire("m", 101 if how == "too large" else 60)
    assert time.monotonic() - start < 10
    grant.release()


@pytest.mark.parametrize("ids", [("m", "spent"), ("spent", "m")], ids="-".join)
def test_a_request_for_several_is_refused_at_once_if_one_of_them_has_nothing_that_may_come_back(ids):
    manager = ResourceQuotaManager()
    for model_id in ids:
        limits = {"max_tokens_per_hour": 100, "on_violation": "queue", "grace_period_sec": 25}
        manager.set_quota(open_quota(model_id, **limits))
    assert manager.check_quota("spent", 90)
    with manager.reserve("m", 90):
        start = time.monotonic()
        with pytest.raises(QuotaExceededError):
            manager.acquire(ids, 60)
        assert time.monotonic() - start < 10


@pytest.mark.parametrize("limits", LIMITS[:2])
def test_what_a_killed_holder_had_reserved_is_spent_and_held_no_more(tmp_path, limits):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state")
    manager.set_quota(open_quota("m", **limits, on_violation="queue", grace_period_sec=25))
    pid = os.fork()
    if pid == 0:
        kept = manager.reserve("m", 90)
        os.kill(os.getpid(), signal.SIGKILL)
        del kept
    os.waitpid(pid, 0)
    until(lambda: manager.get_usage("m").concurrent_requests == 0)
    assert not manager._arrays()[2]["reserved_tokens"].any()
    start = time.monotonic()
    with pytest.raises(QuotaExceededError):
        manager.acquire("m", 60)  # nobody can give them back any more
    assert time.monotonic() - start < 10


# -- peek_quota


@pytest.fixture
def manager() -> ResourceQuotaManager:
    brief = open_quota("any", max_requests_per_hour=2, max_ram_mb=5, on_violation="reject")
    manager = ResourceQuotaManager(clock=ManualClock(10**15), default_quota={"user:*": brief})
    manager.set_quota(open_quota("m", max_tokens_per_hour=10, max_requests_per_second=2, on_violation="reject"))
    manager.set_quota(open_quota("n", max_tokens_per_day=15, on_violation="throttle"))
    manager.set_quota(open_quota("w", max_tokens_per_hour=5, on_violation="warn"))
    return manager


ASKS: list[Any] = ["m", "n", "w", "user:new", "unknown", ("m", "n"), ("n", "m"), ("m", "user:new"), ("unknown", "w")]


@pytest.mark.parametrize("ids", ASKS)
@pytest.mark.parametrize("tokens", [0, 6, 11, 99])
@pytest.mark.parametrize("ram_mb", [0, 9])
def test_a_peek_is_the_answer_of_the_check_that_follows(manager, caplog, ids, tokens, ram_mb):
    for _ in range(4):
        before = (manager.snapshot().tolist(), manager.get_stats(), manager.list_models())
        with caplog.at_level(logging.DEBUG, "modelquota"):
            caplog.clear()
            peeks = [manager.peek_quota(ids, tokens, ram_mb) for _ in range(3)]
            assert not caplog.records
        assert (manager.snapshot().tolist(), manager.get_stats(), manager.list_models()) == before
        assert peeks == [manager.check_quota(ids, tokens, ram_mb)] * 3


def test_a_peek_behind_a_queue_is_told_to_wait():
    manager = ResourceQuotaManager()
    manager.set_quota(open_quota("m", max_concurrent_requests=1, on_violation="queue", grace_period_sec=25))
    grant = manager.reserve("m", 0)
    thread, got = acquire_in_thread(manager, 0)
    until(lambda: manager.get_usage("m").queued_requests == 1)
    peek = manager.peek_quota("m", 0)
    assert (peek.allowed, peek.limit) == (False, Limit.QUEUE)
    assert manager.get_usage("m").queued_requests == 1
    assert peek == manager.check_quota("m", 0)
    grant.release()
    thread.join(30)
    got.pop().release()
    assert manager.peek_quota("m", 0)
