"""Death at any instruction: each verb is ended after its first, second, third … one, and the state is put right.

A process runs one verb with the processor's trap flag set and is killed at a chosen instruction. Whoever asks next must
find every counter as it was before the verb, or as it is after it, and sums that agree. ``MODELQUOTA_EVERY=1 pytest
tests/sharing/test_every_instruction.py`` goes through all instructions; by default through a random one in so many.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import platform
import random
import shutil
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crew import shared_array
from patience import until

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager, Tokens
from modelquota._core.state.state import CONSTANTS
from modelquota._core.state.validate import validate
from modelquota._core.table import shares
from modelquota.waiting.thread import ThreadWaiter

IN_CI = os.environ.get("CI", "").lower() in ("1", "true")  # what lands is not left to chance
MOST = (int(os.environ.get("MODELQUOTA_EVERY", "0")) and 10**9) or 4  # deaths per verb
METERS = ("m#a", "m#b", "m#c", "s1", "s1#1", "s1#2")
HELD = {"concurrent_requests", "reserved_ram_mb", "reserved_ssd_mb", "queued_requests"}
START_NS = 10**15 + 12_345
SLOT_NS = 16_666_667

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("gcc") is None, reason="needs x86-64 and gcc"
)


@pytest.fixture(scope="module")
def stepper(tmp_path_factory: pytest.TempPathFactory) -> Any:
    library = tmp_path_factory.mktemp("steps") / "single_step.so"
    source = Path(__file__).parents[1] / "support" / "single_step.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-mno-red-zone", "-o", library, source], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.add_range.argtypes = [ctypes.c_size_t] * 2
    loaded.add_word.argtypes = [ctypes.c_size_t]
    loaded.begin_steps.argtypes = [ctypes.c_long]
    loaded.end_steps.restype = ctypes.c_long
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, *_, path = line.split(maxsplit=5)
        if "x" in rights and "/modelquota/_core/" in path:
            loaded.add_range(*(int(address, 16) for address in addresses.split("-")))
    return loaded


class Case:
    """One state with some history, and what is done to it."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        path.unlink(missing_ok=True)
        self.clock = ManualClock(START_NS)
        self.manager = ResourceQuotaManager(path=path, clock=self.clock, max_models=8)
        for model_id in ("x", "m", "y"):
            self.manager.set_quota(model_id, **LIMITS | config)
        self.manager.remove_quota("x")  # leaves the first row free, with a name record
        for _ in range(7):
            self.manager.check_quota("m", 11)
            self.clock.advance(0.3)
            self.manager.check_quota("m", 5)
            self.clock.advance(70.0)
        self.manager.charge_many(self.manager.codes(["m"]), [3])
        self.clock.advance(1800.0)
        self.manager.check_quota("m", 40)
        self.manager.check_quota("y", 1)

    def seen(self, model_id: str) -> dict[str, Any] | None:
        """All that can be read of a model but for what open grants hold."""
        usage = self.manager.get_usage(model_id)
        quota = self.manager.get_quota(model_id)
        if usage is None or quota is None:
            return None
        fields = dataclasses.asdict(usage) | {"quota": quota.to_dict()}
        del fields["left"], fields["percent"]  # they follow from the others, and from what is held
        fields |= self.shared(model_id)
        return {name: value for name, value in fields.items() if name not in HELD}

    def shared(self, model_id: str) -> dict[str, int]:
        """What a model's share is, and what it leaves of the limits."""
        index = int(self.manager.codes([model_id])[0]) & 0xFFFF_FFFF
        _, rows, cold_rows = self.manager._arrays()
        row, cold, share = rows[index], cold_rows[index], self.manager._shares()[index]
        if not row["has_share"]:
            return {f"share {place}": 2**63 for place in range(shares.COMPONENTS)}
        for what in ("request", "token"):
            for window, limit in enumerate(cold[f"{what}_limit"].tolist()):
                whole = int(share[f"{what}_limit"][window])
                held = int(share["held"][window + (5 if what == "token" else 0)])
                left = {CONSTANTS["live"]: min(whole, held), CONSTANTS["allow"]: whole}.get(int(share["phase"]), 0)
                assert limit == (whole if shares.UNLIMITED in (whole, held) else left)
        return {f"share {place}": held for place, held in enumerate(share["held"].tolist())}


LIMITS: dict[str, Any] = {
    "max_requests_per_second": 5.3,
    "max_tokens_per_second": 90.1,
    "burst_requests": 20,
    "burst_tokens": 700,
    "max_concurrent_requests": 2,
    "max_ram_mb": 100,
    "max_ssd_mb": 100,
    "max_tokens_per_minute": 10_000,
    "on_violation": "reject",
}

Begin = Callable[[Case], Any]


def nothing(case: Case) -> Any:
    return None


def later(seconds: float, then: Begin = nothing) -> Begin:
    def begin(case: Case) -> Any:
        found = then(case)
        case.clock.advance(seconds)
        return found

    return begin


def granted(case: Case) -> Any:
    return case.manager.reserve("m", 30, 7, 9)


def granted_jointly(case: Case) -> Any:
    return case.manager.reserve(("y", "m"), 30, 7, 9)


def twice_granted(case: Case) -> Any:
    return case.manager.reserve("m", 30, 7, 9), case.manager.reserve("m", 1, 2, 3)


def check(case: Case, _: Any) -> None:
    case.manager.check_quota("m", 17)


def refused(case: Case, _: Any) -> None:
    case.manager.check_quota("m", 17, 200)


def reserve(case: Case, _: Any) -> None:
    case.kept = case.manager.reserve("m", 17, 5, 6)  # type: ignore[attr-defined]


def reserve_jointly(case: Case, _: Any) -> None:
    case.kept = case.manager.reserve(("y", "m"), 17, 5, 6)  # type: ignore[attr-defined]


def waiting(case: Case) -> Any:
    """A request in line, and the two grants for which it waits."""
    case.manager.update_quota("m", on_violation="queue")
    grants = twice_granted(case)
    waiter = ThreadWaiter()
    assert case.manager._admit_or_queue(waiter, ("y", "m"), 17, 5, 6, 30.0, 0, nowait=False) is waiter
    return waiter, grants


def unclaimed(case: Case) -> Any:
    """A request that waited and was admitted, and has not come for its grant."""
    waiter, grants = waiting(case)
    grants[0].release()
    assert waiter.done
    return waiter, grants


def replace(case, quotas):
    case.manager.replace_quota(*quotas)


def take(case: Case, waiting: Any) -> None:
    case.kept = waiting[0].take()  # type: ignore[attr-defined]


def batch(case: Case, codes: Any) -> None:
    case.manager.check_many(codes, 17)


def charge(case: Case, codes: Any) -> None:
    case.manager.charge_many(codes, 17)


def trail(slots: int, *more: float, then: Begin = nothing) -> Begin:
    """Batches in this many slots that have ended, and in the one that is now; the windows have not been turned."""

    def begin(case: Case) -> Any:
        case.manager.get_usage("m")
        codes = case.manager.codes(["m"])
        found = then(case)
        for _ in range(slots):
            case.manager.check_many(codes, 3)
            case.clock.advance_ns(SLOT_NS)
        case.manager.check_many(codes, 2)
        index = int(codes[0]) & 0xFFFF_FFFF
        assert case.manager._arrays()[1]["trail"][index] == slots
        case.clock.advance(sum(more))
        return codes if found is None else found

    return begin


LONG = ResourceQuotaConfig("a longer name than any before", max_ram_mb=3)


def full_on_sight(case: Case) -> Any:
    """Fill the table with ids that nobody configured and that are as good as new; one of them has counted a lot."""
    case.manager.default_quota = LONG
    for number in range(6):
        for _ in range(1 + 5 * number):
            assert not case.manager.check_quota(f"on sight {number}", 1, 2**40)
    return LONG.model_id


def changes(**fields: Any) -> Begin:
    def begin(case: Case) -> Any:
        quota = case.manager.get_quota("m")
        assert quota is not None
        return quota, quota.replace(**fields)

    return begin


def metered(case: Case) -> Any:
    """The model "m" with two meters, one of which has been removed before and has counted something."""
    for name in ("gone", "a", "b"):
        case.manager.set_quota(f"m#{name}", **LIMITS | {"token_weights": (1, 0.5, 3)})
    case.manager.remove_quota("m#gone")
    case.manager.check_quota("m", Tokens(1, 2, 3))
    return case.manager.codes(["m"])


def granted_by_kind(case: Case) -> Any:
    metered(case)
    return case.manager.reserve("m", Tokens(5, 4, 3), 7, 9)


def check_kinds(case: Case, _: Any) -> None:
    case.manager.check_quota("m", Tokens(5, 4, 3))


def reserve_kinds(case: Case, _: Any) -> None:
    case.kept = case.manager.reserve(("y", "m"), Tokens(5, 4, 3), 5, 6)  # type: ignore[attr-defined]


def charge_meters(case: Case, codes: Any) -> None:
    case.manager.charge_many(codes, Tokens(5, 4, 3))


def meters_by_pattern(case: Case) -> Any:
    case.manager.default_quota = {"s*": LONG, "s*#1": LONG, "s*#2": LONG}


def part_of_all(case: Case, parts: int = 2) -> Any:
    """Shares of everything, half of each limit, and a lease of a minute; what `exchange_shares` is given."""
    shares.begin_sharing(case.manager)
    shares.renew_lease(case.manager, case.clock.now_ns + 60 * 10**9)
    codes = shares.sharing_codes(case.manager)
    totals = shares.exchange_shares(case.manager, codes).limits
    asked = np.where(totals == shares.UNLIMITED, 0, totals // parts)
    shares.exchange_shares(case.manager, codes, asked)
    return codes, asked


def nothing_of_all(case: Case) -> Any:
    return part_of_all(case, 2**62)


def lease_that_has_ended(case: Case) -> Any:
    found = part_of_all(case)
    case.clock.advance(100.0)
    return found


def lease_that_begins_again(case: Case) -> Any:
    found = lease_that_has_ended(case)
    assert not case.manager.check_quota("m", 1)
    shares.renew_lease(case.manager, case.clock.now_ns + 60 * 10**9)
    case.clock.advance(0.1)
    return found


def exchange(factor: int) -> Callable[[Case, Any], None]:
    def end(case: Case, held: Any) -> None:
        codes, asked = held
        shares.exchange_shares(case.manager, codes, asked * factor)

    return end


def granted_with_shares(case: Case) -> Any:
    part_of_all(case)
    return granted(case)


CASES: dict[str, tuple[Begin, Callable[[Case, Any], None]]] = {
    "check in the same slot": (nothing, check),
    "check in the next slot": (later(0.02), check),
    "check a second later": (later(1.5), check),
    "check a minute later": (later(60.0), check),
    "check an hour later": (later(3700.0), check),
    "check half a day later": (later(43_000.0), check),
    "check a week later": (later(700_000.0), check),
    "refuse": (later(61.0), refused),
    "batch": (lambda case: case.manager.codes(["m"]), batch),
    "batch in the next slot": (trail(0, 0.02), batch),
    "batch that extends a trail": (trail(2, 0.02), batch),
    "batch in the slot that the trail has reached": (trail(2), batch),
    "batch that does not fit a trail": (trail(4, 0.02), batch),
    "batch long after a trail": (trail(3, 200.0), batch),
    "charge that extends a trail": (trail(1, 0.04), charge),
    "check at the end of a trail": (trail(3), check),
    "check a second after a trail": (trail(3, 1.0), check),
    "check a minute after a trail": (trail(2, 61.0), check),
    "refuse after a trail": (trail(3, 0.1), refused),
    "read a trail": (trail(4), lambda case, _: case.seen("m")),
    "cancel after a trail": (trail(3, then=granted), lambda case, grant: grant.cancel()),
    "raise limits after a trail": (
        trail(3, then=changes(max_tokens_per_minute=9_000, max_requests_per_second=7.7)),
        lambda case, new: case.manager.replace_quota(*new),
    ),
    "forgive a burst after a trail": (trail(2), lambda case, _: case.manager.reset_burst("m")),
    "first limit of a minute and a month": (
        changes(max_requests_per_minute=90, max_tokens_per_month=9_000),
        lambda case, new: case.manager.replace_quota(*new),
    ),
    "reserve": (later(0.5), reserve),
    "reserve jointly": (later(61.0), reserve_jointly),
    "cancel at once": (granted, lambda case, grant: grant.cancel()),
    "cancel after a second": (later(0.9, granted), lambda case, grant: grant.cancel()),
    "cancel after minutes": (later(200.0, granted), lambda case, grant: grant.cancel()),
    "cancel jointly": (later(61.0, granted_jointly), lambda case, grant: grant.cancel()),
    "settle below": (later(0.1, granted), lambda case, grant: grant.settle(3)),
    "settle above": (later(0.1, granted), lambda case, grant: grant.settle(333)),
    "settle above all counts": (later(0.1, granted), lambda case, grant: grant.settle(2**62)),
    "add beyond": (later(0.1, granted), lambda case, grant: grant.add(31)),
    "release": (granted, lambda case, grant: grant.release()),
    "release at the cap": (twice_granted, lambda case, grants: grants[0].release()),
    "admit one that waits": (waiting, lambda case, waiting: waiting[1][0].release()),
    "take what one waited for": (unclaimed, take),
    "leave what one waited for": (unclaimed, lambda case, waiting: waiting[0].leave()),
    "raise limits": (
        changes(max_requests_per_second=7.7, burst_tokens=9),
        lambda case, new: case.manager.replace_quota(*new),
    ),
    "lift limits": (
        changes(max_tokens_per_second=None, max_ram_mb=5),
        lambda case, new: case.manager.replace_quota(*new),
    ),
    "remove": (nothing, lambda case, _: case.manager.remove_quota("m")),
    "remove if it is still the same": (
        lambda case: case.manager.get_quota("m"),
        lambda case, quota: case.manager.replace_quota(quota, None),
    ),
    "register if it is new": (lambda case: LONG, lambda case, config: case.manager.replace_quota(None, config)),
    "register": (lambda case: LONG, lambda case, config: case.manager._set_quota(config.model_id, config)),
    "register on sight": (full_on_sight, lambda case, model_id: case.manager.codes([model_id])),
    "register by name in a full table": (
        full_on_sight,
        lambda case, model_id: case.manager._set_quota(model_id, LONG),
    ),
    "check with meters": (later(0.1, metered), check_kinds),
    "batch with meters": (metered, batch),
    "charge with meters": (metered, charge_meters),
    "reserve with meters": (metered, reserve_kinds),
    "settle with meters": (granted_by_kind, lambda case, grant: grant.settle(Tokens(9, 9, 1))),
    "cancel with meters": (granted_by_kind, lambda case, grant: grant.cancel()),
    "add a meter": (metered, lambda case, _: case.manager._set_quota("m#c", LONG)),
    "remove a meter": (metered, lambda case, _: case.manager.remove_quota("m#a")),
    "remove a model with meters": (metered, lambda case, _: case.manager.remove_quota("m")),
    "add a model to its meters": (
        lambda case: metered(case) is None or case.manager.remove_quota("m"),
        lambda case, _: case.manager._set_quota("m", LONG),
    ),
    "register a family on sight": (meters_by_pattern, lambda case, _: case.manager.codes(["s1"])),
    "begin to share": (nothing, lambda case, _: shares.begin_sharing(case.manager)),
    "end sharing": (part_of_all, lambda case, _: shares.end_sharing(case.manager)),
    "grow shares": (part_of_all, exchange(2)),
    "shrink shares": (part_of_all, exchange(0)),
    "check with a share": (later(0.02, part_of_all), check),
    "check without a share": (nothing_of_all, check),
    "check at the end of the lease": (lease_that_has_ended, check),
    "check when the lease begins again": (lease_that_begins_again, check),
    "batch with shares": (later(0.02, part_of_all), lambda case, held: batch(case, held[0])),
    "reserve jointly with shares": (part_of_all, reserve_jointly),
    "settle with shares": (later(0.1, granted_with_shares), lambda case, grant: grant.settle(3)),
    "raise limits with shares": (
        lambda case: part_of_all(case) and changes(max_requests_per_second=7.7, burst_tokens=9)(case),
        lambda case, new: case.manager.replace_quota(*new),
    ),
    "lift limits with shares": (
        lambda case: part_of_all(case) and changes(max_tokens_per_second=None, max_ram_mb=5)(case),
        lambda case, new: case.manager.replace_quota(*new),
    ),
    "register with shares": (
        lambda case: part_of_all(case) and LONG,
        lambda case, config: case.manager._set_quota(config.model_id, config),
    ),
    "remove with shares": (part_of_all, lambda case, _: case.manager.remove_quota("m")),
    "remember": (nothing, lambda case, _: shares.write_node(case.manager, b"a node")),
    "report memory": (nothing, lambda case, _: case.manager.update_memory_usage("m", 3, 4)),
    "forgive a burst": (later(0.1, granted), lambda case, _: case.manager.reset_burst("m")),
}


def run_and_die(
    case: Case, begin: Begin, end: Callable[[Case, Any], None], stepper: Any, dies_at: int
) -> tuple[bool, int]:
    """In a forked process: whether it was killed on the way, otherwise how many instructions there were."""
    count = shared_array("i8", 1)
    header, rows, _ = case.manager._arrays()
    words = [header["registry_lock"].ctypes.data, *(rows["lock"][i : i + 1].ctypes.data for i in range(8))]
    pid = os.fork()
    if pid == 0:
        try:
            start = begin(case)
            for word in words:
                stepper.add_word(word)
            stepper.begin_steps(dies_at)
            end(case, start)
            count[0] = stepper.end_steps()
            os._exit(0)
        except BaseException:
            stepper.end_steps()
            traceback.print_exc()
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (0, -signal.SIGKILL)
    return status != 0, int(count[0])


def look(case: Case) -> dict[str, Any]:
    """What everybody finds afterwards, when those who died have been looked for."""
    return {model_id: case.seen(model_id) for model_id in ("m", "y", LONG.model_id, *METERS)}


def assert_linked(manager: ResourceQuotaManager, where: str) -> None:
    """The list of each model has its meters, each once, and nothing else."""
    _, rows, cold_rows = manager._arrays()
    ids = manager.list_models()
    places = {model_id: int(manager.codes([model_id])[0]) & 0xFFFF_FFFF for model_id in ids}
    for model_id, place in places.items():
        found, link = [], int(cold_rows["first_meter"][place])
        while link:
            found.append(link - 1)
            link = int(cold_rows["next_meter"][link - 1])
            assert len(found) <= 14, where
        meters = [places[one] for one in ids if one.partition("#")[0] == model_id and "#" in one]
        assert sorted(found) == sorted(meters), (where, model_id)
        assert rows["meters"][place] == len(meters), (where, model_id)


@pytest.mark.parametrize("name", CASES)
def test_after_any_instruction(name, stepper, tmp_path, monkeypatch):
    begin, end = CASES[name]
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    cases = [Case(tmp_path / f"{i}.state", {}) for i in range(3)]
    started = [begin(case) for case in cases[:2]]
    undrained = {model_id: bursts_without_drain(cases[0], model_id) for model_id in cases[0].manager.list_models()}
    end(cases[1], started[1])
    before, after = (look(case) for case in cases[:2])
    total_before, total_after = (case.manager.get_stats().total_checks for case in cases[:2])
    died, count = run_and_die(cases[2], begin, end, stepper, 0)
    assert not died
    assert count > 50
    stride = max(1, count // MOST)
    rng = random.Random(name if IN_CI else None)
    for dies_at in range(1 + rng.randrange(stride), count - 1, stride):
        where = f"{name}: instruction {dies_at} of {count}"
        case = Case(tmp_path / "state", {})
        died, _ = run_and_die(case, begin, end, stepper, dies_at)
        if not died:
            continue
        at_ns = cases[0].clock.now_ns
        case.clock.advance_ns(at_ns - case.clock.now_ns)
        recover(case)
        descriptor = os.open(str(case.manager.path), os.O_RDONLY)
        try:
            assert validate(descriptor, where) == 8
        finally:
            os.close(descriptor)
        header, rows, _ = case.manager._arrays()
        assert header["registry_lock"] == 0
        assert not rows["lock"][: header["row_count"][0]].any()
        assert_linked(case.manager, where)
        found = look(case)
        for model_id in found:
            assert_either(where, found[model_id], before[model_id], after[model_id], undrained.get(model_id, {}))
        total = case.manager.get_stats().total_checks
        assert min(total_before, total_after) <= total <= max(total_before, total_after), where
        for model_id in ("m", "y", *METERS):
            usage = case.manager.get_usage(model_id)
            assert usage is None or not any(getattr(usage, field) for field in HELD), where
        shares.end_sharing(case.manager)
        case.manager.set_quota("new")
        assert case.manager.check_quota("new", 1)
        for number in range(8 - len(case.manager.list_models())):  # the first to use a row takes over its lock
            case.manager.set_quota(f"new{number}")
        assert not rows["lock"].any()


def test_after_any_instruction_of_one_who_lets_go_what_nobody_has_come_for(stepper, tmp_path):
    """The process of the request that waited is alive. The next one to look does the rest."""

    def begin(where: str) -> tuple[Case, Any, Any]:
        case = Case(tmp_path / where, {})
        waiter, grants = unclaimed(case)
        grants[1].cancel()
        before = {model_id: tokens(case, model_id) - 17 for model_id in ("m", "y")}
        case.clock.advance(31.0)
        return case, waiter, before

    def tokens(case: Case, model_id: str) -> int:
        usage = case.manager.get_usage(model_id)
        assert usage is not None
        return usage.tokens_this_day

    def is_held(manager: ResourceQuotaManager, model_id: str) -> bool:
        return any(getattr(manager.get_usage(model_id), field) for field in HELD)

    def look_is_due(case: Case) -> None:
        time.sleep(0.011)

    def let_go(case: Case, _: Any) -> None:
        case.manager.get_usage("m")

    case, _, _ = begin("first")
    died, count = run_and_die(case, look_is_due, let_go, stepper, 0)
    assert not died
    stride = max(1, count // (8 * MOST))
    rng = random.Random("let go" if IN_CI else None)
    outcomes = set()
    for dies_at in range(1 + rng.randrange(stride), count - 1, stride):
        where = f"instruction {dies_at} of {count}"
        case, waiter, before = begin("state")
        died, _ = run_and_die(case, look_is_due, let_go, stepper, dies_at)
        neighbor = ResourceQuotaManager(path=case.manager.path, clock=case.clock)
        until(lambda look=neighbor: not any(is_held(look, model_id) for model_id in ("m", "y")))
        descriptor = os.open(str(case.manager.path), os.O_RDONLY)
        try:
            assert validate(descriptor, where) == 8
        finally:
            os.close(descriptor)
        with contextlib.suppress(QuotaExceededError):
            waiter.take().cancel()
        for model_id in before:
            assert not is_held(case.manager, model_id), where
            more = tokens(case, model_id) - before[model_id]
            assert 0 <= more <= 17, where
            outcomes.add(more)
        neighbor.close()
    assert 0 in outcomes


def recover(case: Case) -> None:
    """Let somebody come who looks for the dead: a manager that opens the file does."""
    ResourceQuotaManager(path=case.manager.path, clock=case.clock)
    case.manager.snapshot()
    case.manager.get_stats()


def bursts_without_drain(case: Case, model_id: str) -> dict[str, int]:
    """How far the levels are above their rates as they are stored, without what has drained since.

    The time of the levels is set before they are lowered: a death in between leaves them as they were, which admits
    less. In the other order a level would drain twice, which admits more.
    """
    _, rows, _ = case.manager._arrays()
    row = rows[int(case.manager.codes([model_id])[0]) & 0xFFFF_FFFF]
    found = {}
    for what in ("request", "token"):
        low, high = row[f"{what}_level"].tolist()
        drain, shift = int(row[f"{what}_drain"]), int(row[f"{what}_shift"])
        if shift != CONSTANTS["no_rate"]:
            unit = 10**9 << shift
            found[f"burst_{what}s_used"] = max(0, -((max(drain * 10**9, unit) - (low + (high << 64))) // unit))
    return found


def assert_either(where: str, found: Any, before: Any, after: Any, undrained: dict[str, int]) -> None:
    """Every figure is that before, or that after, or lies between the two; a level may also be as it was stored."""
    if found in (before, after):
        return
    assert None not in (found, before, after), (where, found, before, after)
    for field, value in found.items():
        lowest, highest = before[field], after[field]
        if field == "quota" or not isinstance(value, int | float):
            assert value in (lowest, highest), (where, field, value, lowest, highest)
        else:
            most = max(lowest, highest, undrained.get(field, 0))
            assert min(lowest, highest) <= value <= most, (where, field, value, lowest, highest)
