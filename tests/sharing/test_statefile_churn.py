"""A healthy file opens while models come and go as fast as they can, and a damaged one does not."""

import fcntl
import os
import struct
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from modelquota import ResourceQuotaManager, StateFileError
from modelquota._core.state import validate
from modelquota._core.state.packing import dtypes
from modelquota._core.state.state import regions_for
from modelquota._core.state.validate import Reader
from modelquota.statefile.inspect import inspect_file, verify_file

MODELS = 64
MANY = 1500
OPENS = 30
# What a look at a file of so few models may take, by far, on a machine whose processors have more to do than they can.
MOST_SECONDS = 10

CHURN = """
    import random, sys
    from modelquota import QuotaExceededError, ResourceQuotaManager

    manager = ResourceQuotaManager(path=sys.argv[1])
    rng, own, spread = random.Random(sys.argv[2]), int(sys.argv[2]), int(sys.argv[3])
    removed = []
    print("up", flush=True)
    count = 0
    while True:
        count += 1
        # names of all lengths, some of them everybody's: they move between rows, and rows between names
        shared = "x" * rng.choice((1, 20, 40, 100, 200)) + str(rng.randrange(4))
        for name in (shared, f"own-{own}-{count % 9}"):
            manager.set_quota(name, max_requests_per_second=rng.choice((None, 0.1, 7.3, 1e6)), max_ram_mb=100)
            manager.check_quota(name, rng.randrange(3))
            manager.set_quota(name, max_requests_per_second=3.3, max_tokens_per_second=None, burst_requests=count % 50)
            try:
                with manager.reserve(name, 5, 3):
                    manager.check_quota(name, 10**9)
            except QuotaExceededError:
                pass
        manager.remove_quota(f"own-{own}-{rng.randrange(9)}")
        manager.remove_quota(shared)
        if spread:
            # those of many models that have been away for longest return, into the rows of others
            removed.append(f"m{rng.randrange(spread)}")
            manager.remove_quota(removed[-1])
            if len(removed) > 20:
                manager.set_quota(removed.pop(0))
"""


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "quota.state")
    make(path)
    return path


def make(path, max_models=MODELS):
    manager = ResourceQuotaManager(path=path, max_models=max_models)
    for name in ("first", "second"):
        manager.set_quota(name, max_requests_per_hour=100)
    for name in ("first", "second"):
        assert manager.check_quota(name, 10)
    return manager


@pytest.fixture
def churn(path):
    """Start so many processes that register, change and remove models of the file until the end of the test."""
    started = []

    def start(count, path=path, spread=0):
        for number in range(count):
            program = [sys.executable, "-c", textwrap.dedent(CHURN), path, str(number), str(spread)]
            started.append(subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        for process in started:
            assert process.stdout.readline() == "up\n", process.stderr.read()

    yield start
    try:
        for process in started:
            assert process.poll() is None, process.stderr.read()
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("spread", [0, MANY])
def test_none_of_many_opens_is_refused_while_three_processes_churn(tmp_path, churn, spread):
    path = str(tmp_path / "churned.state")
    manager = make(path, MODELS + spread)
    for number in range(spread):
        manager.set_quota(f"m{number}")
    del manager
    churn(3, path, spread)
    longest = 0.0
    for _ in range(OPENS):
        start = time.monotonic()
        manager = ResourceQuotaManager(path=path)
        assert {"first", "second"} <= set(manager.list_models())
        if not spread:
            with ResourceQuotaManager.open_readonly(path) as view:
                assert {"first", "second"} <= set(view.list_models())
                assert view.get_usage("first").tokens_this_hour == 10
                assert {"first", "second"} <= set(view.snapshot()["model_id"])
        assert verify_file(path) == []
        longest = max(longest, time.monotonic() - start)
    assert longest < MOST_SECONDS


def overwrite(path, part, row, **fields):
    """Write fields of a row, a cold row or the header as a fault of a disk would, while others go on."""
    dtype, regions = dtypes()[part], regions_for(MODELS)
    start = {"header": 0, "row": regions.rows, "cold": regions.cold_rows}[part] + row * dtype.itemsize
    with open(path, "r+b", buffering=0) as file:
        for name, value in fields.items():
            field, offset = dtype.fields[name][:2]
            file.seek(start + offset)
            file.write(np.asarray(value, field.base).tobytes())


def rename(path, row, name):
    """Give a model another name behind everybody's back; no longer than the one it has."""
    cold_rows = regions_for(MODELS).cold_rows + row * dtypes()["cold"].itemsize
    overwrite(path, "cold", row, name_size=len(name))
    with open(path, "r+b", buffering=0) as file:
        file.seek(cold_rows)
        (cold,) = np.frombuffer(file.read(dtypes()["cold"].itemsize), dtypes()["cold"])
        file.seek(regions_for(MODELS).names + int(cold["name_offset"]) * validate.NAME_UNIT)
        file.write(name)


DAMAGES = {
    "name outside": ("cold", {"name_capacity": 2**15}),
    "unknown action": ("cold", {"action": 9}),
    "negative count": ("cold", {"peak_ram_mb": -5}),
    "too many slots": ("cold", {"filled": [61] * 5}),
    "no limit": ("cold", {"max_ram_mb": -1}),
    "wrong sum": ("cold", {"tokens_base": [0, 0, 999, 0, 0]}),
    "rate of nobody": ("row", {"request_drain": 12345}),
    "time beyond": ("row", {"level_ns": 2**62}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_fault_is_found_at_every_look_while_another_process_churns(path, churn, damage):
    churn(1)
    part, fields = DAMAGES[damage]
    overwrite(path, part, 1, **fields)
    for _ in range(3):
        with pytest.raises(StateFileError, match="damaged: row 1"):
            ResourceQuotaManager(path=path)
        assert any(fault.startswith("row 1: ") for fault in verify_file(path))


def test_what_does_not_agree_with_its_records_is_found_while_another_process_churns(path, churn):
    churn(1)
    overwrite(path, "cold", 1, concurrent=7)
    for _ in range(3):
        assert "row 1: concurrent is 7, but its records add up to 0" in verify_file(path)


@pytest.mark.parametrize("others", [0, 1])
def test_a_name_that_two_models_have_is_found(path, churn, others):
    churn(others)
    rename(path, 1, b"first")
    for _ in range(3):
        with pytest.raises(StateFileError, match="row 1 has no name, or one used before"):
            ResourceQuotaManager(path=path)
        assert verify_file(path) == ["row 1 has no name, or one used before"]


@pytest.mark.parametrize("name", [b"", b"a\0b", b"\xff\xfe"])
def test_what_is_no_name_is_found_in_a_locked_row_too(path, name):
    rename(path, 0, name)
    overwrite(path, "row", 0, lock=(1 << 10) | 1000)  # of somebody who has died
    with pytest.raises(StateFileError, match="row 0 has no name"):
        ResourceQuotaManager(path=path)


class Script(Reader):
    """A reader at whose looks things happen: at each of them the next of the given."""

    def __init__(self, descriptor, path, happenings):
        super().__init__(descriptor, path)
        self.check_header()
        self.happenings = iter(happenings)

    def names(self, part):
        found = super().names(part)
        next(self.happenings, lambda: None)()
        return found


def look(path, *happenings):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return list(validate.content_faults(Script(descriptor, path, happenings)))
    finally:
        os.close(descriptor)


def test_a_name_that_moves_to_a_later_row_between_two_parts_is_not_seen_twice(path, monkeypatch):
    monkeypatch.setattr(validate, "_AT_A_TIME", 1)
    manager = ResourceQuotaManager(path=path)

    def move():
        manager.remove_quota("first")
        manager.set_quota("in its row")
        manager.set_quota("first")  # in row 2

    assert look(path, move) == []
    assert look(path, lambda: manager.remove_quota("first")) == []


def test_a_name_that_has_moved_and_is_used_again_where_it_went_is_found(path, monkeypatch):
    monkeypatch.setattr(validate, "_AT_A_TIME", 1)
    manager = ResourceQuotaManager(path=path)

    def move():
        manager.remove_quota("first")
        manager.set_quota("in its row")
        manager.set_quota("first")
        manager.set_quota("third")
        rename(path, 3, b"first")

    assert look(path, move) == ["row 3 has no name, or one used before"]


def test_rows_that_are_used_first_while_the_file_is_read_are_judged_too(path, monkeypatch):
    monkeypatch.setattr(validate, "_AT_A_TIME", 1)
    manager = ResourceQuotaManager(path=path)

    def register():
        manager.set_quota("late")
        overwrite(path, "cold", 2, action=9)

    assert look(path, register) == ["row 2: its action is unknown"]


def test_records_of_another_moment_are_not_compared(path, monkeypatch):
    manager = ResourceQuotaManager(path=path)
    held = Reader.held

    def while_a_grant_is_open(self):
        with manager.reserve("first", 1):
            return held(self)

    monkeypatch.setattr(Reader, "held", while_a_grant_is_open)
    assert verify_file(path) == []


def test_a_model_that_is_registered_while_the_last_part_is_read_is_judged_by_the_names_of_then(path, monkeypatch):
    monkeypatch.setattr(validate, "_AT_A_TIME", 1)
    manager = ResourceQuotaManager(path=path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        reader = Reader(descriptor, path)
        reader.check_header()
        manager.set_quota("n" * 200)
        manager.remove_quota("second")
        manager.set_quota("m" * 250)  # in the row of before, with a name beyond all that the first header knows
        assert [part.first for part in reader.parts()] == [0, 1, 2]
        assert list(validate.content_faults(reader)) == []
        part = reader.part(1, 1)
        manager.remove_quota("m" * 250)
        manager.set_quota("other")
        assert reader.names(part) == [None]
    finally:
        os.close(descriptor)


def test_the_looks_at_a_fault_are_few(path):
    looks = []

    class Counting(Reader):
        def part(self, first, count):
            looks.append((first, count))
            return super().part(first, count)

    overwrite(path, "cold", 1, action=9)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        reader = Counting(descriptor, path)
        reader.check_header()
        assert list(validate.content_faults(reader)) == ["row 1: its action is unknown"]
    finally:
        os.close(descriptor)
    assert len(looks) == validate._LOOKS


def test_many_rows_that_the_dead_have_locked_are_looked_at_together(tmp_path):
    path = str(tmp_path / "quota.state")
    manager = ResourceQuotaManager(path=path, max_models=2000)
    for number in range(1500):
        manager.set_quota(f"m{number}")
    manager._arrays()[1]["lock"][:1500] = (1 << 10) | 1000
    copies = []

    class Counting(Reader):
        def _copy(self, first, count):
            copies.append(count)
            return super()._copy(first, count)

    descriptor = os.open(path, os.O_RDONLY)
    try:
        reader = Counting(descriptor, path)
        reader.check_header()
        assert list(validate.content_faults(reader)) == []
        assert len(copies) <= 2 * 2 * validate._TRIES
        manager._arrays()[1]["lock"][:1499] = 0
        part = reader.part(1024, 476)
        assert part.steady.tolist() == [True] * 475 + [False]
        assert reader.names(part) == [f"m{number}".encode() for number in range(1024, 1500)]
    finally:
        os.close(descriptor)


def test_a_view_does_not_take_the_model_that_moved_into_a_row_for_the_one_that_left_it(path, monkeypatch):
    manager = ResourceQuotaManager(path=path)
    part = Reader.part
    happenings = [lambda: (manager.remove_quota("first"), manager.set_quota("in its row"))]

    def later(self, first, count):
        if count == 1 and happenings:
            happenings.pop()()
        return part(self, first, count)

    with ResourceQuotaManager.open_readonly(path) as view:
        assert view.get_usage("first").tokens_this_hour == 10
        monkeypatch.setattr(Reader, "part", later)
        assert view.get_usage("first") is None
        assert view.get_usage("in its row").tokens_this_hour == 0
        assert view.list_models() == ["in its row", "second"]


def test_who_only_reads_a_file_is_no_process_that_shares_it(path):
    """Such a process may lock the bytes of the seats for reading."""
    manager = ResourceQuotaManager(path=path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for start, length in ((0, 1), (2, 1021)):
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, start, length, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, lock)
        manager._arrays()[0]["seats_used"] = 9
        assert inspect_file(path).processes == 1
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("limits", [{"on_violation": "warn"}, {"shadow_limits": ["concurrency"]}, {}])
def test_a_file_opens_while_a_model_admits_past_its_concurrency(path, limits):
    """What is admitted while no room is left takes from that, below nothing."""
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("full", max_concurrent_requests=1, **limits)
    manager.enforcement_enabled = bool(limits)
    with manager.reserve("full", 1):
        for _ in range(3):
            assert manager.check_quota("full", 1)
            ResourceQuotaManager(path=path).close()
            assert verify_file(path) == []
