"""Permission to read a state file, and so to place read locks on it, keeps nobody from taking or leaving a seat."""

import contextlib
import ctypes
import fcntl
import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time
import traceback

import numpy as np
import pytest
from factories import make_manager, open_quota
from neighbors import EPOCHS, SEATS, forked, outcome_in_child, row_of
from patience import until

from modelquota import CapacityError, QuotaExceededError, ResourceQuotaManager
from modelquota._core.state.mapping import process_space
from modelquota._core.state.packing import dtypes
from modelquota._core.state.state import regions_for
from modelquota.statefile.inspect import inspect_file, verify_file

FLOCK = struct.Struct("hhqqi4x")
CLONE_NEWPID = 0x2000_0000
EPOCH_BITS, PID_BITS = 22, 22
PIDS = np.uint64((1 << PID_BITS) - 1 << EPOCH_BITS)
MARK = np.uint64(1 << EPOCH_BITS + PID_BITS)  # the lowest bit of what tells processes with the same id apart
SURE = np.uint64(1 << 63)

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def lock(descriptor, kind, start=0, size=0):
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, size, 0))


def lock_all(descriptor, kind, start=0, size=SEATS):
    """Lock all that nobody else has locked."""
    try:
        lock(descriptor, kind, start, size)
    except BlockingIOError:
        if size > 1:
            half = size // 2
            lock_all(descriptor, kind, start, half)
            lock_all(descriptor, kind, start + half, size - half)


@contextlib.contextmanager
def read_locked(path):
    """All of the file that is free is locked for reading, by somebody that cannot write to it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        lock(descriptor, fcntl.F_RDLCK, SEATS)
        lock_all(descriptor, fcntl.F_RDLCK)
        yield descriptor
    finally:
        os.close(descriptor)


def seats_of(manager):
    """The seats, over the same memory."""
    header, _, _ = manager._arrays()
    return np.frombuffer(header.base, dtypes()["seat"], SEATS, regions_for(int(header["max_models"][0])).seats)


def pid_in(holder):
    """The process that has a seat by its id; 0 if a write lock alone holds the seat."""
    return int(holder & PIDS) >> EPOCH_BITS


def is_held(manager):
    """Whether the one request that "m" admits at a time is under way; looks for the dead."""
    time.sleep(0.011)
    try:
        manager.reserve("m", 1).release()
    except QuotaExceededError:
        return True
    return False


@pytest.fixture
def manager(path):
    """One that was there before any reader: it has its seat by a write lock."""
    return make_manager(open_quota("m", max_concurrent_requests=1), open_quota("n"), path=path, max_models=64)


def test_a_manager_opens_and_works_beside_a_reader_that_locks_the_whole_file(path, manager):
    with read_locked(path):
        other = ResourceQuotaManager(path=path)
        assert other.check_quota("n", 5)
        grant = other.reserve("m", 1)
        assert is_held(manager), "who has a seat by process id is alive"
        assert inspect_file(path).processes == 2
        assert verify_file(path) == []
        assert pid_in(seats_of(manager)["holder"][2]) == os.getpid()
        grant.release()
        assert not is_held(manager)
        other.close()
        assert inspect_file(path).processes == 1


def test_the_first_of_all_opens_beside_a_reader_too(path):
    ResourceQuotaManager(path=path, max_models=8).close()
    with read_locked(path):
        manager = ResourceQuotaManager(path=path)
        manager.set_quota(open_quota("n"))
        assert manager.check_quota("n", 1)
        assert inspect_file(path).processes == 1


@pytest.mark.parametrize("reader_stays", [True, False])
def test_what_a_killed_one_held_is_given_back(path, manager, reader_stays):
    with contextlib.ExitStack() as reader:
        reader.enter_context(read_locked(path))

        def hold():
            mine = ResourceQuotaManager(path=path)
            return mine, mine.reserve("m", 1)

        with forked(hold) as pid:
            holders = seats_of(manager)["holder"]
            assert pid in map(pid_in, holders), "it was meant to sit there by its process id"
            assert is_held(manager)
            os.kill(pid, signal.SIGSTOP)
            assert is_held(manager), "a stopped process is alive"
            if not reader_stays:
                reader.close()
                assert is_held(manager)
            os.kill(pid, signal.SIGKILL)
            until(lambda: not is_held(manager))  # it is a zombie: nobody has waited for it
        assert inspect_file(path).processes == 1


def test_a_lock_in_a_row_is_taken_over_from_a_dead_one_and_not_from_a_living_one(path, manager):
    seats = seats_of(manager)
    with read_locked(path), forked(lambda: None) as pid:
        (seat,) = [seat for seat in range(SEATS) if pid_in(seats["holder"][seat]) == pid]
        _, rows, _ = manager._arrays()
        rows["lock"][1] = (int(seats["holder"][seat] & EPOCHS) << 10) | seat
        thread = threading.Thread(target=manager.check_quota, args=("n", 1))
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        os.kill(pid, signal.SIGKILL)
        thread.join(30)
        assert not thread.is_alive()
    assert manager.get_usage("n").requests_this_day == 1


def test_close_gives_the_seat_back(path, manager):
    with read_locked(path):
        for _ in range(1500):
            ResourceQuotaManager(path=path).close()
        holders = seats_of(manager)["holder"]
        assert np.flatnonzero(holders).tolist() == [1, 2], "one seat was taken again and again"
        assert not (holders & PIDS).any()
        kept = ResourceQuotaManager(path=path)
        del kept
        assert not (holders & PIDS).any(), "the collection of one that was not closed does the same"


def test_a_forked_child_has_a_seat_of_its_own(path, manager):
    with read_locked(path):
        other = ResourceQuotaManager(path=path)
        grant = other.reserve("m", 1)
        with forked(lambda: other.check_quota("n", 1)) as pid:
            pids = [pid_in(holder) for holder in seats_of(manager)["holder"]]
            assert pids.count(os.getpid()) == 1
            assert pids.count(pid) == 2, "for both managers that it inherited"
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        assert is_held(manager), "the end of the child is not the parent's"
        grant.release()
        assert not is_held(manager)


def test_a_dead_parent_is_noticed_though_its_child_lives(path, manager):
    read, write = os.pipe()

    def become_a_parent():
        mine = ResourceQuotaManager(path=path)
        grant = mine.reserve("m", 1)
        child = os.fork()
        if child == 0:
            os.write(write, b"%d\n" % os.getpid())
            while True:
                signal.pause()
        return mine, grant

    with read_locked(path), forked(become_a_parent) as parent:
        child = int(os.read(read, 20))
        try:
            assert is_held(manager)
            os.kill(parent, signal.SIGKILL)
            until(lambda: not is_held(manager))
            os.kill(child, 0)  # is still there
        finally:
            os.kill(child, signal.SIGKILL)
            os.close(read)
            os.close(write)


def test_once_the_reader_has_gone_the_lock_alone_holds_the_seat(path, manager):
    with read_locked(path):
        other = ResourceQuotaManager(path=path)
        grant = other.reserve("m", 1)
        assert pid_in(seats_of(manager)["holder"][2]) == os.getpid()
    time.sleep(0.0011)
    other.reserve("n", 1).release()  # looks whether the seat is still its own
    assert pid_in(seats_of(manager)["holder"][2]) == 0
    with read_locked(path) as reader, pytest.raises(BlockingIOError):
        lock(reader, fcntl.F_RDLCK, 2, 1)
    assert is_held(manager)
    grant.release()


@contextlib.contextmanager
def no_place_but(seat, path, reader=None):
    """Everything but one seat, which the reader keeps locked, is locked by processes that may write."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        if reader is not None:
            lock(reader, fcntl.F_UNLCK, 0, seat)
            lock(reader, fcntl.F_UNLCK, seat + 1)
        lock_all(descriptor, fcntl.F_WRLCK)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_by(path, manager, change):
    """A process that is alive and has seat 2 by its process id, and a grant; then `change` was done to its seat."""
    with read_locked(path) as reader, forked(lambda: manager.reserve("m", 1)) as pid:
        seats = seats_of(manager)
        assert pid_in(seats["holder"][2]) == pid
        assert is_held(manager)
        change(seats[2:3])
        yield pid, reader


def test_a_process_with_the_id_of_a_dead_one_is_told_apart(path, manager):
    def change(seat):
        seat["holder"] ^= MARK

    with held_by(path, manager, change):
        until(lambda: not is_held(manager))
        assert inspect_file(path).processes == 1


def test_an_id_of_no_process_is_a_dead_one(path, manager):
    def change(seat):
        seat["holder"] |= PIDS

    with held_by(path, manager, change):
        until(lambda: not is_held(manager))


def test_a_claim_that_was_not_made_sure_counts_for_nobody(path, manager):
    def change(seat):
        seat["holder"] &= ~SURE

    with held_by(path, manager, change) as (_, reader):
        until(lambda: not is_held(manager))
        assert inspect_file(path).processes == 1
        with no_place_but(2, path, reader):
            ResourceQuotaManager(path=path).close()


def test_a_process_of_another_pid_namespace_is_alive_until_nobody_has_its_byte_locked(path, manager):
    """Its id means nothing here. Once no reader is in the way, the kernel knows."""

    def change(seat):
        seat["space"] ^= np.uint64(1 << EPOCH_BITS)
        seat["holder"] |= PIDS

    with held_by(path, manager, change) as (pid, reader):
        assert is_held(manager)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert is_held(manager)
        assert inspect_file(path).processes == 2
        with no_place_but(2, path, reader), pytest.raises(CapacityError, match="on 1 of the places"):
            ResourceQuotaManager(path=path)
        lock(reader, fcntl.F_UNLCK)
        until(lambda: not is_held(manager))
        assert inspect_file(path).processes == 1


def test_threads_and_zombies_of_a_process_are_told_apart(path, manager):
    """After the first thread has ended, a process is shown as a zombie though it goes on."""
    program = """
        import ctypes, os, sys, threading, time
        from modelquota import ResourceQuotaManager
        def go_on():
            mine = ResourceQuotaManager(path=sys.argv[1])
            grant = mine.reserve("m", 1)
            while not open("/proc/self/stat").read().rpartition(")")[2].startswith(" Z"):
                time.sleep(0.001)
            print("ready", flush=True)
            sys.stdin.read()
            os._exit(0)
        threading.Thread(target=go_on).start()
        ctypes.CDLL(None).pthread_exit(None)
    """
    with read_locked(path):
        command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout.readline() == b"ready\n"
                assert is_held(manager)
                process.kill()
                until(lambda: not is_held(manager))
            finally:
                process.kill()


def seat_of_grant(manager, model_id):
    """Where the owner of a model's only grant sits."""
    header, _, _ = manager._arrays()
    offset = regions_for(int(header["max_models"][0])).grants
    records = np.frombuffer(header.base, dtypes()["grant"], 64 * int(header["grant_chunks_used"][0]), offset)
    row, found = row_of(manager, model_id), records["seat"]
    while len(found) != 1:  # a record that was one of the model's once may be taken by others between the two looks
        found = records["seat"][(records["row"] == row) & (records["seat"] != 0)]
    return int(found[0]) & (SEATS - 1)


def test_two_processes_that_open_at_once_never_share_a_seat(path, manager):
    """A reader comes and goes. Each holds a lock of its own on the byte of a file that stands for its seat."""
    proof = path.with_suffix(".proof")
    proof.touch()
    for seed in range(3):
        manager.set_quota(open_quota(f"p{seed}"))

    def open_and_close(seed):
        rng = random.Random(seed)
        end = time.monotonic() + 3
        rounds = 0
        while time.monotonic() < end:
            mine = ResourceQuotaManager(path=path)
            grant = mine.reserve(f"p{seed}", 1)
            descriptor = os.open(proof, os.O_RDWR)
            lock(descriptor, fcntl.F_WRLCK, seat_of_grant(mine, f"p{seed}"), 1)  # raises if another one sits there
            if rng.random() < 0.3:
                mine.reserve("n", 1).release()
            os.close(descriptor)
            grant.release()
            mine.close()
            rounds += 1
        return rounds

    pids, pipes = [], []
    for seed in range(3):
        ready, done = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.write(done, b"%d" % open_and_close(seed))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)
        os.close(done)
        pids.append(pid)
        pipes.append(ready)
    rng = random.Random(0)
    end = time.monotonic() + 3
    while time.monotonic() < end:
        with read_locked(path):
            time.sleep(rng.random() * 0.003)
        time.sleep(rng.random() * 0.001)
    rounds = []
    for pid, ready in zip(pids, pipes, strict=True):
        with open(ready, "rb") as file:
            rounds.append(int(file.read() or 0))
        os.waitpid(pid, 0)
    assert min(rounds) > 20, rounds
    assert inspect_file(path).processes == 1
    assert inspect_file(path).open_grants == 0


def test_the_error_of_a_full_table_says_that_readers_are_in_the_way(path, manager, monkeypatch):
    with read_locked(path):
        monkeypatch.setattr("modelquota._core.state.state.process_space", lambda: 0)
        with pytest.raises(CapacityError) as caught:
            ResourceQuotaManager(path=path)
    assert str(caught.value) == (
        "the table is full (1023 processes): end some that share this state, or that only read it: on 1022 of the "
        "places another process has a read lock, beside which they can only be taken with /proc of this PID namespace "
        "mounted at /proc"
    )


def test_the_error_of_a_full_table_without_readers_does_not_name_them(path, manager):
    with no_place_but(0, path), pytest.raises(CapacityError, match="end some that share this state$"):
        ResourceQuotaManager(path=path)


@needs_root
def test_a_proc_of_another_pid_namespace_tells_nothing(path):
    """A child in a new namespace still sees the /proc of its parent, in which its own id is another process's."""

    def space_in_new_namespace():
        assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID) == 0, ctypes.get_errno()
        return outcome_in_child(process_space)

    assert process_space() != 0
    assert outcome_in_child(process_space) == repr(process_space())
    assert outcome_in_child(space_in_new_namespace) == repr("0")
