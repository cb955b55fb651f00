"""Ids that nobody configured are forgotten when the table is full, and nobody is forgiven by it.

``MODELQUOTA_IDS=10000000 pytest tests/decisions/test_forgetting.py`` sends so many ids through a table of a thousandth
of that.
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import os
import random
import signal
import statistics
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from crew import shared_array
from oracle import HOUR_NS, SECOND_NS, SLOTS, slot_of
from patience import until

from modelquota import CapacityError, ManualClock, ResourceQuotaConfig, ResourceQuotaManager, UnknownModelError
from modelquota._core.state.validate import validate
from modelquota.control.load import LoadAdjuster

IDS = int(os.environ.get("MODELQUOTA_IDS", "200000"))
TABLE = max(IDS // 1000, 2000)  # 10,000 rows for 10,000,000 ids
START_NS = 10**15
AGED_SECONDS = 3700  # after so long nothing is left in a window of an hour

RATE, BURST, PER_HOUR, TOKENS_PER_HOUR = 2, 3, 12, 500
LIMITS = ResourceQuotaConfig.unlimited(
    "any",
    max_requests_per_second=RATE,
    burst_requests=BURST,
    max_requests_per_hour=PER_HOUR,
    max_tokens_per_hour=TOKENS_PER_HOUR,
    on_violation="reject",
)
NOTHING = ResourceQuotaConfig.unlimited("any", max_requests_per_hour=0, on_violation="reject")
"""An id with this quota is as good as new however often it asks."""


class Log:
    """All that was ever admitted of one id, and what that means for the next request."""

    def __init__(self) -> None:
        self.admitted: list[tuple[int, int]] = []

    def used(self, now_ns: int, length_ns: int) -> tuple[int, int]:
        """Requests and tokens in a rolling window."""
        oldest = slot_of(now_ns, length_ns) - SLOTS
        found = [tokens for at_ns, tokens in self.admitted if slot_of(at_ns, length_ns) >= oldest]
        return len(found), sum(found)

    def level(self, now_ns: int) -> int:
        """Requests that have not drained yet, in units of 1 / 10**9."""
        level, last_ns = 0, 0
        for at_ns, _ in self.admitted:
            level = max(0, level - RATE * (at_ns - last_ns)) + SECOND_NS
            last_ns = at_ns
        return max(0, level - RATE * (now_ns - last_ns))

    def admits(self, now_ns: int, tokens: int) -> bool:
        """Decide one request and note it."""
        requests, used = self.used(now_ns, HOUR_NS)
        fits = (
            self.used(now_ns, SECOND_NS)[0] < RATE + BURST
            and self.level(now_ns) + SECOND_NS <= (RATE + BURST) * SECOND_NS
            and requests < PER_HOUR
            and used + tokens <= TOKENS_PER_HOUR
        )
        if fits:
            self.admitted.append((now_ns, tokens))
        return fits


def visits(rng: random.Random, born_ns: int) -> list[int]:
    """When an id asks: some times within a minute, and perhaps again later, hours or days after."""
    starts_ns = [born_ns]
    while rng.random() < 0.1:
        starts_ns.append(
            starts_ns[-1] + int(rng.choice((200, 3000, AGED_SECONDS, 20_000, 100_000)) * rng.random() * 1e9)
        )
    return [
        start_ns + int(rng.choice((0, 0.1, 1, 60)) * rng.random() * 1e9)
        for start_ns in starts_ns
        for _ in range(rng.choice((1, 2, 2, 9)))
    ]


def test_every_decision_is_that_of_one_who_forgets_nothing(caplog):
    caplog.set_level(logging.CRITICAL, "modelquota")  # each denial is logged, and pytest would keep 10 GB of records
    rng = random.Random(IDS)
    clock = ManualClock(START_NS)
    manager = ResourceQuotaManager(clock=clock, max_models=TABLE, default_quota=LIMITS)
    every_ns = 2 * (AGED_SECONDS + 60) * 13 // 10 * SECOND_NS // TABLE  # about 0.4 of the table are in use then
    logs: dict[int, Log] = {}
    asks: list[tuple[int, int]] = []  # (when, who), the next first
    left: dict[int, int] = {}  # how often an id is still going to ask
    in_use: list[tuple[int, int]] = []  # (until when, who)
    until_ns: dict[int, int] = {}
    born = denied = most_in_use = 0
    while born < IDS or asks:
        if born < IDS and (not asks or START_NS + born * every_ns <= asks[0][0]):
            times_ns = visits(rng, START_NS + born * every_ns)
            left[born] = len(times_ns)
            logs[born] = Log()
            for at_ns in times_ns:
                heapq.heappush(asks, (at_ns, born))
            born += 1
            continue
        at_ns, who = heapq.heappop(asks)
        clock.advance_ns(at_ns - clock.now_ns)
        tokens = rng.choice((0, 1, 40, 130, TOKENS_PER_HOUR + 1))
        expected = logs[who].admits(at_ns, tokens)
        assert manager.check_quota(f"user:{who}", tokens).allowed == expected, (who, at_ns)
        denied += not expected
        left[who] -= 1
        if left[who] == 0:  # it never asks again
            del left[who], logs[who]
        if who not in until_ns:
            heapq.heappush(in_use, (at_ns + AGED_SECONDS * SECOND_NS, who))
        until_ns[who] = at_ns + AGED_SECONDS * SECOND_NS
        while in_use and in_use[0][0] <= at_ns:
            _, old = heapq.heappop(in_use)
            if until_ns[old] <= at_ns:
                del until_ns[old]
            else:
                heapq.heappush(in_use, (until_ns[old], old))
        most_in_use = max(most_in_use, len(until_ns))
    assert most_in_use <= TABLE // 2
    assert denied > IDS // 10
    assert len(manager.list_models()) == TABLE
    assert manager.get_stats().rejected_requests == denied


def seconds_per_new_id(size: int) -> float:
    """What a new id costs, on average, if a table is full and half of it is in use."""
    clock = ManualClock(START_NS)
    manager = ResourceQuotaManager(clock=clock, max_models=size, default_quota=LIMITS)
    for number in range(size):
        manager.check_quota(f"old:{number}", 1)
    clock.advance(AGED_SECONDS)
    for number in range(0, size, 2):
        manager.check_quota(f"old:{number}", 1)
    rounds = []
    for round_ in range(3):
        ids = [f"new:{round_}:{number}" for number in range(size // 2)]
        start = time.perf_counter()
        for model_id in ids:
            manager.check_quota(model_id, TOKENS_PER_HOUR + 1)  # denied: as good as new for the next round
        rounds.append((time.perf_counter() - start) / len(ids))
    return statistics.median(rounds)


def test_a_new_id_costs_the_same_however_large_the_table():
    ratios = []
    while len(ratios) < 3 and not any(ratio < 3 for ratio in ratios):  # a busy machine may spoil one
        small = statistics.median(seconds_per_new_id(1_000) for _ in range(9))
        ratios.append(seconds_per_new_id(64_000) / small)
    assert min(ratios) < 3, ratios


ROWS = 16


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(START_NS)


@pytest.fixture
def small(clock: ManualClock) -> ResourceQuotaManager:
    """A table of a few rows, for ids that nobody configured."""
    return ResourceQuotaManager(clock=clock, max_models=ROWS, default_quota=LIMITS)


def crowd(manager: ResourceQuotaManager, name: str, count: int = 4 * ROWS) -> None:
    """So many ids come once and are as good as new at once."""
    for number in range(count):
        assert not manager.check_quota(f"{name}:{number}", TOKENS_PER_HOUR + 1)


def named(manager: ResourceQuotaManager) -> Any:
    manager.set_quota(LIMITS.replace(model_id="kept"))


def named_after_it_came(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    manager.set_quota(LIMITS.replace(model_id="kept"))


def updated(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    manager.update_quota("kept", max_requests_per_hour=7)


def updated_and_back(manager: ResourceQuotaManager) -> Any:
    updated(manager)
    manager.update_quota("kept", max_requests_per_hour=PER_HOUR)


def replaced(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    old = manager.get_quota("kept")
    assert old is not None
    assert manager.replace_quota(old, old.replace(max_requests_per_hour=7))


def replaced_by_name(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", 0)
    old = manager.get_quota("kept")
    assert manager.replace_quota(old, old, named=True)


def registered(manager: ResourceQuotaManager) -> Any:
    assert manager.replace_quota(None, LIMITS.replace(model_id="kept"))


def granted(manager: ResourceQuotaManager) -> Any:
    return manager.reserve("kept", 5)


def granted_jointly(manager: ResourceQuotaManager) -> Any:
    return manager.reserve(("kept", "another"), 5)


def bound(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    return manager.model("kept")


def with_ram(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    manager.update_memory_usage("kept", 1, 0)


def with_ssd(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    manager.update_memory_usage("kept", 0, 1)


def adjusted(manager: ResourceQuotaManager) -> Any:
    manager.check_quota("kept", TOKENS_PER_HOUR + 1)
    adjuster = LoadAdjuster(manager, lambda: 0.95, models=["kept"])
    adjuster.poll()
    assert manager.get_quota("kept").max_requests_per_second < RATE
    return adjuster


@pytest.mark.parametrize(
    "how",
    [
        named, named_after_it_came, updated, updated_and_back, replaced, replaced_by_name, registered, granted,
        granted_jointly, bound, with_ram, with_ssd, adjusted,
    ],
)  # fmt: skip
def test_never_forgotten(small, clock, how):
    kept = how(small)
    quota = small.get_quota("kept")
    code = small.codes(["kept"])[0]
    for round_ in range(3):
        clock.advance(AGED_SECONDS)
        crowd(small, f"new:{round_}")
    assert small.codes(["kept"])[0] == code
    assert small.get_quota("kept") == quota
    if how is adjusted:
        kept.stop()
        assert small.get_quota("kept").max_requests_per_second == RATE
        clock.advance(AGED_SECONDS)
        crowd(small, "newest")
        assert "kept" not in small.list_models()  # its limits are those with which it came


def test_a_waiter_is_never_forgotten(clock):
    line = NOTHING.replace(
        max_requests_per_hour=None, max_concurrent_requests=1, on_violation="queue", grace_period_sec=1e9
    )
    manager = ResourceQuotaManager(clock=clock, max_models=ROWS, default_quota={"kept": line, "*": LIMITS})
    grant = manager.reserve("kept", 0)
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(manager.acquire("kept", 0)))
    thread.start()
    until(lambda: manager.get_usage("kept").queued_requests)
    code = manager.codes(["kept"])[0]
    clock.advance(AGED_SECONDS)
    crowd(manager, "new")
    assert manager.get_usage("kept").queued_requests == 1
    grant.release()
    thread.join()
    crowd(manager, "newer")
    assert manager.codes(["kept"])[0] == code
    got.pop().release()
    clock.advance(100)
    crowd(manager, "newest")
    assert "kept" not in manager.list_models()


def test_what_was_kept_is_forgotten_once_nothing_holds_it(small, clock):
    handle, grant, again = bound(small), small.reserve("held", 5), small.model("kept")
    small.check_quota("used", 1)
    with_ram(small)
    for name in ("first", "second"):
        clock.advance(AGED_SECONDS)
        crowd(small, name)
        assert {"kept", "held"} <= set(small.list_models())
    assert "used" not in small.list_models()
    grant.release()
    small.update_memory_usage("kept", 0, 0)
    del handle
    clock.advance(AGED_SECONDS)
    crowd(small, "third")
    assert "held" not in small.list_models()
    assert "kept" in small.list_models()
    del again
    crowd(small, "fourth")
    assert "kept" not in small.list_models()


def test_a_handle_goes_on_while_others_come_and_go(small, clock):
    small.check_quota("kept", 0)
    handle = small.model("kept")
    for _ in range(PER_HOUR - 1):
        clock.advance(1)
        assert handle.check(0)
        crowd(small, f"at {clock.now_ns}")
    clock.advance(1)
    assert not handle.check(0)
    assert not small.check_quota("kept", 0)


def test_codes_of_a_forgotten_id_are_refused(small, clock):
    small.check_quota("gone", 1)
    codes = small.codes(["gone"])
    clock.advance(AGED_SECONDS)
    crowd(small, "new")
    with pytest.raises(ValueError, match="codes"):
        small.check_many(codes, 1)
    with pytest.raises(ValueError, match="codes"):
        small.charge_many(codes, 1)
    assert small.get_usage("gone") is None
    with pytest.raises(UnknownModelError):
        small.update_memory_usage("gone", 1, 1)


@pytest.mark.parametrize("what", ["request", "tokens of a batch", "level"])
def test_the_last_moment_in_use_and_the_first_after_it(clock, what):
    """Whatever was used last: until it has aged out the table is full, and then it has a place."""
    quota = {
        "request": LIMITS,
        "tokens of a batch": LIMITS.replace(max_requests_per_second=None, max_requests_per_hour=None),
        "level": ResourceQuotaConfig.unlimited("any", max_tokens_per_second=1, burst_tokens=10_000),
    }[what]
    manager = ResourceQuotaManager(clock=clock, max_models=1, default_quota=quota)
    if what == "level":
        manager.check_quota("old", 10_000)
        aged_ns = START_NS + 10_000 * SECOND_NS
    else:
        if what == "request":
            manager.check_quota("old", 0)
        else:
            manager.charge_many(manager.codes(["old"]), 3)
        aged_ns = (slot_of(START_NS, HOUR_NS) + SLOTS + 1) * HOUR_NS // SLOTS
    clock.advance_ns(aged_ns - 1 - START_NS)
    with pytest.raises(CapacityError, match="1"):
        manager.check_quota("new", 0)
    assert manager.list_models() == ["old"]
    clock.advance(1)
    assert manager.check_quota("new", 0)
    assert manager.list_models() == ["new"]


def test_full_exactly_while_none_is_as_good_as_new(clock):
    """A walk: ids come into use and age out; a new one is refused if and only if every row is in use."""
    rng = random.Random(3)
    manager = ResourceQuotaManager(clock=clock, max_models=ROWS, default_quota=LIMITS)
    used_until: dict[str, int] = {}
    outcomes = [0, 0]
    for number in range(3000):
        clock.advance(rng.choice((1, 30, 60, 200, 500)))
        minute = slot_of(clock.now_ns, HOUR_NS)
        used_until = {name: last for name, last in used_until.items() if last >= minute}
        known = f"id:{rng.randrange(number + 1)}"
        name = known if known in used_until else f"id:{number}"
        full = len(used_until) == ROWS and name not in used_until
        if full:
            with pytest.raises(CapacityError, match=str(ROWS)):
                manager.check_quota(name, 1)
        elif manager.check_quota(name, 1):
            used_until[name] = minute + SLOTS
        outcomes[full] += 1
    assert min(outcomes) > 100


def test_a_full_table_has_room_on_a_manual_clock_whenever_one_has_aged(clock):
    """How long the search took does not matter to a clock that nobody but the program moves."""
    size = 40_000
    manager = ResourceQuotaManager(clock=clock, max_models=size, default_quota=LIMITS)
    for number in range(size):
        manager.check_quota(f"old:{number}", 1)
    aged_ns = (slot_of(START_NS, HOUR_NS) + SLOTS + 1) * HOUR_NS // SLOTS
    clock.advance_ns(aged_ns - START_NS - SECOND_NS // 50)
    with pytest.raises(CapacityError):
        manager.check_quota("new", 1)
    clock.advance(0.02)
    assert manager.check_quota("new", 1)


def test_a_table_that_was_searched_in_vain_is_not_searched_again_at_once():
    """Under a real clock: ids that find no place cost no search each. Whatever makes room ends that."""
    limits = ResourceQuotaConfig.unlimited("any", max_requests_per_day=1)
    manager = ResourceQuotaManager(max_models=ROWS, default_quota=limits)
    for number in range(ROWS):
        assert manager.check_quota(f"old:{number}", 1)
    header, _, _ = manager._arrays()
    with pytest.raises(CapacityError):
        manager.check_quota("new", 1)
    assert header["full_until_ns"] > 0
    header["full_until_ns"] = 2**61  # that time is not over before the next one comes
    hand = int(header["forget_hand"][0])
    with pytest.raises(CapacityError):
        manager.check_quota("new", 1)
    assert header["forget_hand"] == hand
    assert manager.remove_quota("old:3")
    assert header["full_until_ns"] == 0
    assert manager.check_quota("new", 1)


def test_totals_keep_what_forgotten_ids_counted(small, clock):
    for round_ in range(5):
        for number in range(ROWS):
            assert small.check_quota(f"{round_}:{number}", 7)
            assert not small.check_quota(f"{round_}:{number}", TOKENS_PER_HOUR + 1)
        clock.advance(AGED_SECONDS)
    stats = small.get_stats()
    assert (stats.allowed_requests, stats.rejected_requests) == (5 * ROWS, 5 * ROWS)
    assert stats.total_checks == 10 * ROWS


def test_names_of_every_length_find_room(clock):
    """A row keeps a name record that grows: rows that see many ids never run out of room for names."""
    manager = ResourceQuotaManager(clock=clock, max_models=4, default_quota=NOTHING)
    rng = random.Random(1)
    for number in range(3000):
        name = f"{number}:".ljust(rng.randrange(8, 256), "x")
        assert not manager.check_quota(name, 1)
        assert name in manager.list_models()


# -- several processes

SHARED = 40  # ids that all of them use
CHURN = 3000  # ids that each of them makes up: more changes than the log holds
PROCESSES = 4


def work(path: str, number: int, clock_ns: int, admitted: Any, gate: Any) -> None:
    manager = ResourceQuotaManager(
        path=path,
        clock=ManualClock(clock_ns),
        default_quota={"shared:*": LIMITS.replace(max_requests_per_second=None), "*": NOTHING},
    )
    rng = random.Random(number)
    gate[number] = 1
    while gate[:PROCESSES].sum() < PROCESSES:
        time.sleep(0.001)
    for i in range(CHURN):
        assert not manager.check_quota(f"{number}:{i}", 1)
        who = rng.randrange(SHARED)
        if manager.check_quota(f"shared:{who}", 1):
            admitted[number][who] += 1
        if i % 500 == 0:
            time.sleep(0.02)  # the others get ahead
    for who in range(SHARED):
        for _ in range(PER_HOUR):
            if manager.check_quota(f"shared:{who}", 1):
                admitted[number][who] += 1
    seen = set(manager.list_models())
    assert {f"shared:{who}" for who in range(SHARED)} <= seen
    gate[PROCESSES + number] = 1


def test_processes_that_register_at_once(tmp_path):
    path = str(tmp_path / "quota.state")
    first = ResourceQuotaManager(path=path, max_models=64, clock=ManualClock(START_NS), default_quota=NOTHING)
    first.set_quota("named")
    assert first.list_models() == ["named"]
    admitted = shared_array(np.int64, PROCESSES * SHARED).reshape(PROCESSES, SHARED)
    gate = shared_array(np.int64, 2 * PROCESSES)
    pids = []
    for number in range(PROCESSES):
        pid = os.fork()
        if pid == 0:
            try:
                work(path, number, START_NS, admitted, gate)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
    assert statuses == [0] * PROCESSES
    assert gate.sum() == 2 * PROCESSES
    assert (admitted.sum(axis=0) == PER_HOUR).all()  # exactly, over all processes
    # this one has not looked all the while: PROCESSES * CHURN models came, and it learns who is there
    models = first.list_models()
    assert len(models) == 64
    assert len(set(models)) == 64
    assert {f"shared:{who}" for who in range(SHARED)} <= set(models)
    other = ResourceQuotaManager(path=path, clock=ManualClock(START_NS))
    assert sorted(other.list_models()) == sorted(models)
    for name in models:
        assert first.get_quota(name) == other.get_quota(name)
    assert first.get_stats().rejected_requests >= PROCESSES * CHURN
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert validate(descriptor, path) == 64
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("changes", [1, 2000, 2049, 4096, 4097, 9000])
def test_another_process_learns_of_so_many_changes(tmp_path, changes):
    path = tmp_path / "quota.state"
    clock = ManualClock(START_NS)
    one = ResourceQuotaManager(path=path, max_models=32, clock=clock, default_quota=NOTHING)
    other = ResourceQuotaManager(path=path, clock=clock)
    for number in range(32):
        one.check_quota(f"old:{number}", 1)
    assert sorted(other.list_models()) == sorted(one.list_models())
    for number in range(changes):
        one.check_quota(f"new:{number}", 1)
    newest = f"new:{changes - 1}"
    assert other.get_quota(newest) == NOTHING.replace(model_id=newest)
    assert sorted(other.list_models()) == sorted(one.list_models())
    assert other.get_quota("old:0") is None


@contextlib.contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise where it lasts longer."""

    def too_long(*_: Any) -> None:
        raise TimeoutError(f"it goes on for {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("verb", ["check_quota", "reserve", "rows", "peek_quota"])
def test_several_ids_that_do_not_fit_into_the_table_together(clock, verb):
    """One makes room for the next: an answer or CapacityError, and never an endless search."""
    manager = ResourceQuotaManager(clock=clock, max_models=2, default_quota=LIMITS)
    manager.set_quota("named")
    ids = ("a", "b", "c")
    if verb == "peek_quota":
        assert manager.peek_quota(ids, 1)
        assert manager.list_models() == ["named"]
    elif verb == "rows":
        assert len(manager.codes(ids)) == len(ids)
    else:
        with at_most(10), pytest.raises(CapacityError):
            getattr(manager, verb)(ids, 1)


def test_handles_of_a_closed_manager_keep_nothing(tmp_path):
    path = tmp_path / "quota.state"
    manager = ResourceQuotaManager(path=path, max_models=1, default_quota=NOTHING)
    with ResourceQuotaManager(path=path, default_quota=NOTHING) as other:
        other.check_quota("old", 1)
        handle = other.model("old")
    del handle
    until(lambda: gets_in(manager))


def gets_in(manager: ResourceQuotaManager) -> bool:
    """Whether a new id finds a place, once the dead have been looked for."""
    try:
        return not manager.check_quota("new", 1)
    except CapacityError:
        manager.get_stats()
        manager.snapshot()
        time.sleep(0.02)
        return False


def test_a_killed_process_gives_its_handles_back(tmp_path):
    path = tmp_path / "quota.state"
    manager = ResourceQuotaManager(path=path, max_models=4, default_quota=NOTHING)
    pid = os.fork()
    if pid == 0:
        other = ResourceQuotaManager(path=path, default_quota=NOTHING)
        for number in range(4):
            other.check_quota(f"old:{number}", 1)
        kept = [other.model(f"old:{number}") for number in range(4)]
        os.kill(os.getpid(), 9)
        del kept
    os.waitpid(pid, 0)
    until(lambda: gets_in(manager))
