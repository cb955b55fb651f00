"""Shares and their lease belong to the state: all processes go by them, whichever exchanges them, stopped or killed."""

import logging
import os
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from crew import shared_array
from factories import SharingManager, make_manager, open_quota
from patience import until

from modelquota import ManualClock, ResourceQuotaManager
from modelquota._core.state.packing import struct_sizes
from modelquota._core.state.state import CONSTANTS, regions_for
from modelquota._core.state.validate import validate
from modelquota._core.table import shares
from modelquota._core.table.exchange import OvertakenError
from modelquota._core.table.shares import COMPONENTS, KEEP, UNLIMITED
from modelquota.cluster.host import ManagerHost
from modelquota.cluster.node import Node
from modelquota.cluster.quantities import QUANTITIES
from modelquota.cluster.store import ModelReply, Reply

SECOND_NS = 10**9
LIMITS = {"max_requests_per_hour": 10**6, "max_tokens_per_hour": 10**9}


def hold_everything(manager, lease_s=600.0):
    """Have the host hold all of each limit, for so long."""
    shares.renew_lease(manager, shares.now_ns(manager) + round(lease_s * SECOND_NS))
    codes = shares.sharing_codes(manager)
    totals = shares.exchange_shares(manager, codes).limits
    shares.exchange_shares(manager, codes, np.where(totals == UNLIMITED, KEEP, totals))


@pytest.fixture
def words():
    """Words that forked processes share."""
    return shared_array("i8", 8)


def test_processes_use_one_share_together(path, words):
    manager = make_manager(path=path, **LIMITS)
    shares.begin_sharing(manager)
    hold_everything(manager)
    asked = np.full((1, COMPONENTS), KEEP)
    asked[0, 2] = 100
    shares.exchange_shares(manager, shares.sharing_codes(manager), asked)

    def work(place):
        other = ResourceQuotaManager(path=path)
        words[place] = sum(bool(other.check_quota("m", 1)) for _ in range(200))

    children = [forked_process(work, place) for place in (0, 1)]
    here = sum(bool(manager.check_quota("m", 1)) for _ in range(200))
    for pid in children:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert here + words[0] + words[1] == 100


def forked_process(work, *args):
    """Run a function in a forked process; its id."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(*args)
            status = 0
        finally:
            os._exit(status)
    return pid


@pytest.mark.parametrize("shared_by", ["file", "fork"])
def test_another_process_sees_the_end_of_the_lease(path, words, shared_by):
    """Within a slot of 1/60 s, though it does nothing but check; and that it has begun again."""
    manager = make_manager(path=path if shared_by == "file" else None, real_time=True, **LIMITS)
    shares.begin_sharing(manager)
    hold_everything(manager)

    def work():
        other = ResourceQuotaManager(path=path) if shared_by == "file" else manager
        while words[1] == 0:
            words[0 if other.check_quota("m", 1) else 2] += 1

    pid = forked_process(work)
    try:
        until(lambda: words[0] > 100)
        shares.end_lease(manager)
        until(lambda: words[2] > 100)
        admitted = int(words[0])
        time.sleep(0.05)
        assert words[0] == admitted
        hold_everything(manager)
        until(lambda: words[0] > admitted + 100)
    finally:
        words[1] = 1
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.parametrize("verb", ["check", "batch"])
def test_a_process_that_was_stopped_spends_nothing_after_the_lease(path, words, verb):
    """But for the request that it was deciding, and of a batch for the few that it had begun."""
    manager = make_manager(path=path, **LIMITS)
    shares.begin_sharing(manager)
    hold_everything(manager, lease_s=2.0)

    def work():
        other = ResourceQuotaManager(path=path)
        codes = np.repeat(other.codes(["m"]), 1 if verb == "check" else 200_000)
        while words[1] == 0:
            if verb == "check":
                words[0] += bool(other.check_quota("m", 1))
            else:
                words[0] += int((other.check_many(codes, 1) == 0).sum())

    pid = forked_process(work)
    try:
        until(lambda: words[0] > 0)
        stop_outside_of_a_decision(pid, manager)
        end_ns = shares.read_lease(manager).end_ns
        until(lambda: shares.now_ns(manager) > end_ns + SECOND_NS // 10)
        before = manager.get_usage("m").requests_this_hour
        rejected = manager.get_model_report("m").denied_requests
        os.kill(pid, signal.SIGCONT)
        until(lambda: manager.get_model_report("m").denied_requests > rejected)
    finally:
        words[1] = 1
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert manager.get_usage("m").requests_this_hour <= before + (1 if verb == "check" else 16)


def stop_outside_of_a_decision(pid, manager):
    """Stop a process while it does not have the row locked, which nobody could read then."""
    while True:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.002)
        if not manager._arrays()[1]["lock"][0]:
            return
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.001)


def test_without_shares_no_page_of_them_is_touched(path):
    manager = make_manager(path=path, **LIMITS)
    for _ in range(50):
        assert manager.check_quota("m", 1)
    regions = regions_for(manager.max_models)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert os.lseek(descriptor, regions.shares, os.SEEK_DATA) >= regions.names
        shares.begin_sharing(manager)
        assert os.lseek(descriptor, regions.shares, os.SEEK_DATA) == regions.shares
    finally:
        os.close(descriptor)


def test_the_state_goes_by_the_clock_that_a_suspend_does_not_stop(path):
    manager = make_manager(path=path, **LIMITS)
    neighbor = ResourceQuotaManager(path=path)
    before = shares.now_ns(manager), shares.now_ns(neighbor)
    shares.begin_sharing(manager)
    header = manager._arrays()[0][0]
    assert header["clock_kind"] == CONSTANTS["boottime"]
    assert 0 <= shares.now_ns(manager) - before[0] < 10 * SECOND_NS  # it goes on from where it was
    offset_ns = int(header["lease"]["clock_offset_ns"])
    assert abs(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + offset_ns - shares.now_ns(manager)) < SECOND_NS
    # a suspend, as other processes see it: CLOCK_BOOTTIME is an hour further on, and CLOCK_MONOTONIC is not
    header["lease"]["clock_offset_ns"] += 3600 * SECOND_NS
    late = ResourceQuotaManager(path=path)
    assert shares.now_ns(late) - before[0] > 3600 * SECOND_NS

    def has_followed():
        neighbor.check_quota("m", 1)  # looks at the state once a second
        return shares.now_ns(neighbor) - before[1] > 3600 * SECOND_NS

    until(has_followed)
    with ResourceQuotaManager.open_readonly(path) as view:
        assert abs(view._now_ns(header) - shares.now_ns(late)) < 10 * SECOND_NS


def test_a_reboot_ends_the_lease_and_keeps_the_shares(path):
    manager = make_manager(path=path, **LIMITS)
    shares.begin_sharing(manager)
    hold_everything(manager)
    assert manager.check_quota("m", 1)
    held = shares.exchange_shares(manager, shares.sharing_codes(manager)).held
    shares.write_node(manager, b"who I am")
    manager._arrays()[0]["boot_id"] = 7
    manager.close()
    manager = SharingManager(path=path)
    assert shares.read_lease(manager).end_ns == 0
    until(lambda: manager.check_quota("m", 1).starved)  # at the end of a slot
    assert shares.read_node(manager) == b"who I am"
    found = shares.exchange_shares(manager, shares.sharing_codes(manager))
    assert (found.held == held).all()
    assert found.used[0, 2] >= 1
    shares.renew_lease(manager, shares.now_ns(manager) + SECOND_NS)
    until(lambda: manager.check_quota("m", 1))


def offset_of_file():
    """Where in a state file it says for which file the lease holds."""
    return struct_sizes()["header"]


def told_file(path):
    with open(path, "rb") as file:
        return os.pread(file.fileno(), 8, offset_of_file())


MODELS = 8


def in_use(path, clock=None):
    """A manager whose shares are live and have been used in the current slot."""
    manager = SharingManager(path=path, clock=clock, max_models=MODELS)
    for model_id in ("m", "n"):
        manager.set_quota(open_quota(model_id, max_requests_per_hour=100))
    shares.begin_sharing(manager)
    hold_everything(manager)
    assert all(manager.check_quota(model_id, 1) for model_id in ("m", "n"))
    return manager


def admits(manager):
    """Whether each model admits a request, by a check and by a batch."""
    codes = manager.codes(["m", "n"])
    return [*(bool(manager.check_quota(model_id, 1)) for model_id in ("m", "n")), *(manager.check_many(codes, 1) == 0)]


@pytest.mark.parametrize("original", ["open", "closed", "killed"])
def test_a_copied_file_has_the_shares_and_not_the_lease(path, original):
    clock = ManualClock(10**15)  # stands still: no slot ends in which a row would notice
    if original == "killed":
        pid = forked_process(lambda: in_use(path, clock) and os.kill(os.getpid(), signal.SIGKILL))
        os.waitpid(pid, 0)
    else:
        manager = in_use(path, clock)
    if original == "closed":
        manager.close()
    shutil.copy(path, path.with_suffix(".copy"))
    with SharingManager(path=path.with_suffix(".copy"), clock=clock) as copy:
        assert shares.read_lease(copy).end_ns == 0
        assert admits(copy) == [False] * 4
        assert copy.check_quota("m", 1).starved
        found = shares.exchange_shares(copy, shares.sharing_codes(copy))
        assert found.held[:, 2].tolist() == [100, 100]
        assert found.used[:, 2].tolist() == [1, 1]
    if original != "open":
        manager = SharingManager(path=path, clock=clock)
    assert admits(manager) == [True] * 4
    with SharingManager(path=path.with_suffix(".copy"), clock=clock) as copy:
        assert admits(copy) == [False] * 4
        hold_everything(copy)
        assert admits(copy) == [True] * 4
    with SharingManager(path=path.with_suffix(".copy"), clock=clock) as copy:  # it is a copy no longer
        assert shares.read_lease(copy).end_ns != 0
        assert admits(copy) == [True] * 4
    assert admits(manager) == [True] * 4


def test_processes_that_open_a_copy_at_once_spend_nothing_of_it(path, words):
    manager = in_use(path)

    def work(place):
        until(lambda: words[7])
        other = SharingManager(path=path.with_suffix(".copy"))
        words[place] = sum(bool(other.check_quota("m", 1)) for _ in range(100))

    for _ in range(5):
        words[7] = 0
        children = [forked_process(work, place) for place in range(4)]
        assert manager.check_quota("m", 1)
        shutil.copy(path, path.with_suffix(".copy"))
        words[7] = 1
        for pid in children:
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert words[:4].tolist() == [0] * 4
    assert manager.check_quota("m", 1)


@pytest.mark.parametrize("change", ["nothing", "renamed", "linked", "written by an earlier version"])
def test_a_file_that_is_opened_again_has_its_lease(path, change):
    clock = ManualClock(10**15)
    in_use(path, clock).close()
    again = path
    if change == "renamed":
        again = path.with_suffix(".renamed")
        os.rename(path, again)
    elif change == "linked":
        again = path.with_suffix(".linked")
        os.link(path, again)
    elif change != "nothing":
        with open(path, "r+b") as file:
            os.pwrite(file.fileno(), bytes(8), offset_of_file())
    with SharingManager(path=again, clock=clock) as manager:
        assert shares.read_lease(manager).end_ns != 0
        assert admits(manager) == [True] * 4
    assert told_file(again) != bytes(8)
    shutil.copy(again, path.with_suffix(".copy"))
    with SharingManager(path=path.with_suffix(".copy"), clock=clock) as copy:
        assert admits(copy) == [False] * 4


@pytest.mark.parametrize("told", [b"\xff" * 8, b"\0" * 7 + b"\x80", b"\1" + bytes(7)])
def test_whatever_a_file_says_of_its_lease_it_is_opened(path, told):
    clock = ManualClock(10**15)
    in_use(path, clock).close()
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), told, offset_of_file())
    with open(path, "rb") as file:
        assert validate(file.fileno(), path) == MODELS
    with SharingManager(path=path, clock=clock) as manager:
        assert admits(manager) == [False] * 4
        hold_everything(manager)
        assert admits(manager) == [True] * 4
    assert told_file(path) not in (told, bytes(8))


@pytest.mark.parametrize("locked", [0, 1])
def test_a_copy_of_which_a_dead_process_has_locked_a_row_has_no_lease(path, locked):
    clock = ManualClock(10**15)
    in_use(path, clock).close()
    shutil.copy(path, path.with_suffix(".copy"))
    with open(path.with_suffix(".copy"), "r+b") as file:
        at = regions_for(MODELS).rows + locked * struct_sizes()["row"]
        os.pwrite(file.fileno(), (1 << 10 | 500).to_bytes(4, "little"), at)  # seat 500
    with SharingManager(path=path.with_suffix(".copy"), clock=clock) as copy:
        assert admits(copy) == [False] * 4
        assert copy._arrays()[0]["recoveries"] == 1


def test_a_file_that_is_opened_without_a_cluster_has_no_shares_if_nobody_else_has_it_open(path, caplog):
    caplog.set_level(logging.WARNING, "modelquota")
    with make_manager(path=path, max_requests_per_hour=10) as manager:
        shares.begin_sharing(manager)
        hold_everything(manager)
        assert sum(bool(manager.check_quota("m", 1)) for _ in range(4)) == 4
        shares.end_lease(manager)
        until(lambda: not manager.peek_quota("m", 1))
        with ResourceQuotaManager(path=path) as other:
            assert shares.is_sharing(other)
            assert not other.check_quota("m", 1)
    caplog.clear()
    for _ in range(2):
        with ResourceQuotaManager(path=path) as manager:
            assert not shares.is_sharing(manager)
            assert shares.read_lease(manager).end_ns == 0
            assert manager.check_quota("m", 1)
            manager.set_quota(open_quota("new", max_requests_per_hour=10))
            assert manager.check_quota("new", 1)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} was used with cluster= and is opened without it, by the only process: "
        "its limits are no longer shared with other hosts, all of each holds on this host"
    ]
    with ResourceQuotaManager(path=path) as manager:
        shares.begin_sharing(manager)
        assert not manager.check_quota("m", 1)
        hold_everything(manager)
        used = manager.get_usage("m").requests_this_hour
        assert used >= 6
        assert sum(bool(manager.check_quota("m", 1)) for _ in range(10)) == 10 - used


def test_shares_are_ended_and_begun_at_the_same_time(path):
    """Whichever comes last, all models go by it."""
    manager = make_manager(*(open_quota(f"m{at}", max_requests_per_hour=10) for at in range(100)), path=path)
    other = ResourceQuotaManager(path=path)
    for _ in range(20):
        shares.begin_sharing(manager)
        ends = threading.Thread(target=shares.end_sharing, args=(other,))
        ends.start()
        shares.begin_sharing(manager)
        ends.join()
        assert len(shares.sharing_codes(manager)) == (100 if shares.is_sharing(manager) else 0)
        assert not shares.end_sharing(manager, if_alone=True)


def test_a_view_reads_limits_and_not_what_a_share_leaves_of_them(path):
    manager = make_manager(open_quota("other", max_requests_per_hour=77), path=path, **LIMITS)
    shares.begin_sharing(manager)
    hold_everything(manager)
    asked = np.full((1, COMPONENTS), KEEP)
    asked[0, 2] = 40
    shares.exchange_shares(manager, manager.codes(["m"]), asked)
    assert sum(bool(manager.check_quota("m", 1)) for _ in range(10)) == 10
    with ResourceQuotaManager.open_readonly(path) as view:
        assert view.get_quota("m") == manager.get_quota("m")
        assert view.get_usage("m").left == manager.get_usage("m").left
        assert view.get_usage("m").left[9] == 30
        assert view.get_quota("other").max_requests_per_hour == 77
        shares.end_lease(manager)
        time.sleep(0.02)
        assert view.get_usage("m").left[9] == 0
        assert view.get_quota("m").max_requests_per_hour == 10**6


def test_one_process_leads_and_another_takes_over(path, words):
    manager = make_manager(path=path, **LIMITS)
    assert shares.lead(manager, 60.0)
    assert shares.lead(manager, 60.0)

    def work():
        other = ResourceQuotaManager(path=path)
        words[0] = 1 + shares.lead(other, 60.0)
        until(lambda: shares.lead(other, 60.0))
        words[1] = 1
        while True:
            time.sleep(1.0)

    pid = forked_process(work)
    try:
        until(lambda: words[0])
        assert words[0] == 1  # it did not lead
        shares.resign(manager)
        until(lambda: words[1])
        assert not shares.lead(manager, 60.0)
        time.sleep(0.02)
        os.kill(pid, signal.SIGSTOP)
        until(lambda: shares.lead(manager, 0.01))  # it says nothing any more
        os.kill(pid, signal.SIGCONT)
        until(lambda: shares.lead(manager, 60.0))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    other = ResourceQuotaManager(path=path)
    assert not shares.lead(other, 60.0)
    manager.close()
    assert shares.lead(other, 60.0)  # its process is there, and its seat is not


@pytest.mark.parametrize("leads_again", [False, True])
def test_a_process_that_was_overtaken_changes_nothing_any_more(path, leads_again):
    first = make_manager(path=path, **LIMITS)
    shares.begin_sharing(first)
    second = ResourceQuotaManager(path=path)
    codes = first.codes(["m"])
    asked = np.full((1, COMPONENTS), KEEP)
    asked[0, 2] = 40
    end_ns = shares.now_ns(first) + 600 * SECOND_NS
    term = shares.lead(first, 60.0)
    assert shares.lead(first, 60.0) == term > 0
    shares.exchange_shares(first, codes, asked, term=term)
    shares.renew_lease(first, end_ns, term=term)
    shares.write_node(first, b"the first", term=term)
    until(lambda: shares.lead(second, 0.0))
    shares.exchange_shares(second, codes, asked // 2, term=shares.lead(second, 60.0))
    if leads_again:
        until(lambda: shares.lead(first, 0.0))
        assert shares.lead(first, 60.0) != term
    with pytest.raises(OvertakenError):
        shares.exchange_shares(first, codes, asked, term=term)
    with pytest.raises(OvertakenError):
        shares.renew_lease(first, end_ns + 1, term=term)
    with pytest.raises(OvertakenError):
        shares.write_node(first, b"is back", term=term)
    assert shares.exchange_shares(first, codes).held[0, 2] == 20
    assert shares.read_lease(first).end_ns == end_ns
    assert shares.read_node(first) == b"the first"


def test_a_reply_that_comes_after_another_process_has_taken_over_is_not_adopted(path):
    manager = make_manager(path=path, **LIMITS)
    shares.begin_sharing(manager)
    node = Node(ManagerHost(manager, "boot", shares.lead(manager, 60.0)), 60 * SECOND_NS)
    granted = tuple(100 if limit == 2 else None for limit in range(QUANTITIES))

    def reply(number, request):
        answers = (ModelReply(1, granted, granted, granted, granted, None),) if number == 1 else ()
        return Reply("ok", f"nonce{number}", 1, nodes=1, boot_ms=request.boot_ms, models=answers)

    request = node.prepare()
    other = ResourceQuotaManager(path=path)
    until(lambda: shares.lead(other, 0.0))
    with pytest.raises(OvertakenError):
        node.adopt(request, reply(1, request))
    assert not manager.check_quota("m", 1)
    node = Node(ManagerHost(other, "boot", shares.lead(other, 60.0)), 60 * SECOND_NS)
    request = node.prepare()
    node.adopt(request, reply(0, request))  # to the request that the first one had under way
    request = node.prepare()
    node.adopt(request, reply(1, request))
    until(lambda: manager.check_quota("m", 1))


def test_a_call_for_an_exchange_reaches_another_process(path, words):
    manager = make_manager(path=path, **LIMITS)
    shares.begin_sharing(manager)
    shares.renew_lease(manager, shares.now_ns(manager) + 600 * SECOND_NS)

    def work():
        other = ResourceQuotaManager(path=path)
        words[0] = 1
        words[1] = shares.wait_urgent(other, 0, 60.0)

    pid = forked_process(work)
    until(lambda: manager._arrays()[0]["lease"]["sleepers"][0])
    assert not manager.check_quota("m", 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert words[1] == 1


def test_models_are_registered_while_sharing_begins(path, words):
    """Whichever comes first, each of them has a share."""
    manager = make_manager(path=path, max_models=2000, **LIMITS)

    def work():
        other = ResourceQuotaManager(path=path)
        for number in range(500):
            other.set_quota(open_quota(f"new {number}", max_requests_per_hour=5))
            words[0] = number + 1

    pid = forked_process(work)
    until(lambda: words[0] > 5)
    shares.begin_sharing(manager)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert len(shares.sharing_codes(manager)) == 501
    assert not any(manager.check_quota(model_id, 1) for model_id in manager.list_models())
