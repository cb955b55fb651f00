"""The state file: created once, kept over restarts and reboots, and never refilled by either."""

import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from modelquota import ManualClock, ResourceQuotaManager, StateFileError
from modelquota._core.state.packing import dtypes
from modelquota._core.state.validate import validate

HOUR_NS = 3_600_000_000_000
WIDE = {"max_requests_per_second": None, "max_tokens_per_second": None}
SPAWN = multiprocessing.get_context("spawn")


def in_another_process(program, *values):
    """Run it in a process that has nothing to do with this one; what it prints."""
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, values)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()


ASK = """
    import sys
    from modelquota import ResourceQuotaManager

    manager = ResourceQuotaManager(path=sys.argv[1])
    print(sum(bool(manager.check_quota("m", 1)) for _ in range(int(sys.argv[2]))))
"""


def edit_header(path, **fields):
    """Overwrite fields of the header, as another boot or machine would have left them."""
    dtype = dtypes()["header"]
    header = np.fromfile(path, dtype, 1)
    for name, value in fields.items():
        header[name] = value
    with open(path, "r+b") as file:
        file.write(header.tobytes())


def read_header(path):
    return np.fromfile(path, dtypes()["header"], 1)[0]


def test_a_restart_refills_nothing(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", max_requests_per_hour=10, **WIDE)
    del manager
    assert [in_another_process(ASK, path, 4) for _ in range(4)] == ["4", "4", "2", "0"]


def test_mode_and_no_other_file(path):
    before = os.umask(0o002)
    try:
        ResourceQuotaManager(path=path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == [path.name]


CREATE = """
    import os, sys, time
    from modelquota import ResourceQuotaManager

    while time.monotonic() < float(sys.argv[2]):
        pass
    manager = ResourceQuotaManager(path=sys.argv[1], max_models=64)
    manager.set_quota("m", max_requests_per_day=100, max_requests_per_second=None)
    print(os.stat(sys.argv[1]).st_ino, sum(bool(manager.check_quota("m", 1)) for _ in range(80)))
"""


def test_eight_processes_create_one_file(path):
    command = [sys.executable, "-c", textwrap.dedent(CREATE), str(path), str(time.monotonic() + 1.5)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({inode for inode, _ in answers}) == 1
    assert sum(int(admitted) for _, admitted in answers) == 100
    assert os.listdir(path.parent) == [path.name]


def admit_exactly(path, seed, found):
    manager = ResourceQuotaManager(path=path)
    codes = np.repeat(manager.codes(["m"]), 50)
    admitted = 0
    for i in range(200):
        if (i + seed) % 2:
            admitted += int((manager.check_many(codes, 1) == 0).sum())
        else:
            admitted += bool(manager.check_quota("m", 1))
    found.put(admitted)


def test_spawned_processes_admit_exactly_the_limit(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", max_requests_per_day=6_000, max_requests_per_hour=None, **WIDE)
    found = SPAWN.SimpleQueue()
    processes = [SPAWN.Process(target=admit_exactly, args=(str(path), seed, found)) for seed in range(4)]
    for process in processes:
        process.start()
    assert sum(found.get() for _ in processes) == 6_000
    for process in processes:
        process.join()
    assert manager.get_usage("m").requests_this_day == 6_000


@pytest.fixture
def used(path):
    """A file in which 10 of 10 requests an hour have been admitted just now."""
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", max_requests_per_hour=10, max_requests_per_day=None, **WIDE)
    assert sum(bool(manager.check_quota("m", 1)) for _ in range(11)) == 10
    manager.flush()
    return path


@pytest.mark.parametrize(("hours_off", "free"), [(0.0, 0), (0.98, 0), (1.1, 10), (1000.0, 10), (-0.5, 0), (-1e5, 0)])
def test_a_reboot_ages_by_the_time_that_passed(used, hours_off, free):
    header = read_header(used)
    # as if it had been written so long ago, on a boot whose clock had started at another time
    edit_header(
        used,
        boot_id=np.arange(16, dtype=np.uint8),
        anchor_wall_ns=int(header["anchor_wall_ns"]) - int(hours_off * HOUR_NS),
        clock_offset_ns=int(header["clock_offset_ns"]) + 12_345,
    )
    assert in_another_process(ASK, used, 20) == str(free)
    assert in_another_process(ASK, used, 20) == "0"


def test_a_reboot_long_after_the_last_anchor(path):
    """The rows went on after the anchor; a clock that moved back takes nobody to before them."""
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", max_requests_per_hour=10, max_requests_per_day=None, **WIDE)
    _, rows, _ = manager._arrays()
    header = read_header(path)
    time.sleep(0.05)
    assert sum(bool(manager.check_quota("m", 1)) for _ in range(11)) == 10
    level_ns = int(rows["level_ns"][0])
    del manager, rows
    edit_header(path, boot_id=np.zeros(16, np.uint8), anchor_wall_ns=int(header["anchor_wall_ns"]) + 30 * 24 * HOUR_NS)
    assert in_another_process(ASK, path, 20) == "0"
    assert int(read_header(path)["anchor_ns"]) >= level_ns


def test_time_beyond_all_bounds_after_a_reboot(used):
    edit_header(used, boot_id=np.zeros(16, np.uint8), anchor_wall_ns=-(2**61), anchor_ns=2**61)
    assert in_another_process(ASK, used, 20) == "10"


def test_another_max_models_is_refused(path):
    ResourceQuotaManager(path=path, max_models=10)
    assert ResourceQuotaManager(path=path).max_models == 10
    before = path.read_bytes()
    with pytest.raises(StateFileError, match="max_models=10, not 11"):
        ResourceQuotaManager(path=path, max_models=11)
    assert path.read_bytes() == before


def test_a_copy_of_a_file_in_use_is_a_state_of_its_own(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", max_requests_per_day=5, burst_requests=10)
    manager.check_quota("m", 1)
    held = manager.reserve("m", 1)
    copy = path.with_name("copy.state")
    shutil.copy(path, copy)
    other = ResourceQuotaManager(path=copy)
    assert other.get_usage("m").requests_this_day == 2
    assert other.get_usage("m").concurrent_requests in (0, 1)  # of a seat that somebody may sit on there too
    assert sum(bool(other.check_quota("m", 1)) for _ in range(9)) == 3
    assert sum(bool(manager.check_quota("m", 1)) for _ in range(9)) == 3
    held.release()


def test_a_lock_that_loss_of_power_left_behind(path):
    """Its owner's word may be the one that the next process would have had."""
    ResourceQuotaManager(path=path).set_quota("m", max_requests_per_day=5)
    with Bytes(path) as (header, rows):
        for epoch in range(4):
            rows["lock"] = (epoch << 10) | 1
            header["registry_lock"] = (epoch << 10) | 1
            assert in_another_process(ASK, path, 1) == "1"
            assert rows["lock"][0] == 0
    descriptor = os.open(path, os.O_RDONLY)
    assert validate(descriptor, str(path)) > 0
    os.close(descriptor)


class Bytes:
    """The header and the first row of a file, to be written to."""

    def __init__(self, path):
        from modelquota._core.state.state import regions_for

        layout = dtypes()
        most = int(read_header(path)["max_models"])
        self.header = np.memmap(path, layout["header"], "r+", 0, 1)
        self.rows = np.memmap(path, layout["row"], "r+", regions_for(most).rows, 1)

    def __enter__(self):
        return self.header, self.rows

    def __exit__(self, *_):
        del self.header, self.rows


def test_a_clock_of_ones_own_on_a_file(path):
    clock = ManualClock()
    manager = ResourceQuotaManager(path=path, clock=clock)
    manager.set_quota("m", max_requests_per_hour=1, **WIDE)
    assert manager.check_quota("m", 1)
    clock.advance(3_659)
    assert not manager.check_quota("m", 1)
    clock.advance(2)
    assert manager.check_quota("m", 1)
