"""A view in bulk: the same as the manager's, whole rows only, the right id for each, and quick."""

import os
import threading
import time

import numpy as np
import pytest

from modelquota import ManualClock, ResourceQuotaManager, StateFileError
from modelquota._core.table.view import read_copies, read_rows, records_of, unpack_limits
from modelquota.reading.utilization import read_utilization


def fill(manager, count):
    rng = np.random.default_rng(3)
    for i in range(count):
        manager.set_quota(
            f"model-{i}", max_ram_mb=None if i % 5 == 0 else int(rng.integers(1, 9)), max_tokens_per_hour=int(i % 7),
            max_requests_per_second=None if i % 3 == 0 else 2.5, on_violation=("reject", "warn")[i % 2],
        )  # fmt: skip
        manager.update_memory_usage(f"model-{i}", int(rng.integers(0, 9)), 0)
        for _ in range(int(rng.integers(0, 4))):
            manager.check_quota(f"model-{i}", 3)


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1500])
def test_it_tells_what_the_manager_tells(path, count):
    clock = ManualClock(10**12)
    manager = ResourceQuotaManager(path=path, clock=clock)
    fill(manager, count)
    for i in range(0, count, 11):
        manager.remove_quota(f"model-{i}")
    with ResourceQuotaManager.open_readonly(path) as view:
        view._now_ns = lambda header: clock.now_ns
        for seconds in (0, 0.5, 100, 4000):
            clock.advance(seconds)
            ours, theirs = read_utilization(view), read_utilization(manager)
            order = np.argsort(theirs.counters["model_id"].astype(str))
            found = np.argsort(ours.counters["model_id"].astype(str))
            assert ours.counters[found].tolist() == theirs.counters[order].tolist()
            assert ours.percent[found].tolist() == theirs.percent[order].tolist()
            assert ours.left[found].tolist() == theirs.left[order].tolist()
            assert ours.lives[found].tolist() == theirs.lives[order].tolist()
            assert view.snapshot()[found].tolist() == theirs.counters[order].tolist()
            for index, other in zip(found.tolist(), order.tolist(), strict=True):
                quota = ours.quotas[index]
                assert quota == theirs.quotas[other] == manager.get_quota(quota.model_id)
                assert hash(quota) == hash(manager.get_quota(quota.model_id))
            assert ours.quotas[:3] == list(ours.quotas)[:3]
            assert view.get_stats() == manager.get_stats()


def test_ids_are_right_while_others_take_their_rows(path):
    """Each model has a limit that its name tells; rows and the room of names are used again and again."""
    manager = ResourceQuotaManager(path=path, max_models=40)
    stop = threading.Event()

    def come_and_go():
        number = 0
        while not stop.is_set():
            for _ in range(20):
                number += 1
                manager.set_quota(f"guest-{number}", max_tokens_per_day=number)
            time.sleep(0)  # the reader may come in: otherwise none of them would live as long as one look at the table
            for gone in range(number - 19, number + 1):
                manager.remove_quota(f"guest-{gone}")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    seen = 0
    try:
        with ResourceQuotaManager.open_readonly(path) as view:
            deadline = time.monotonic() + 60
            while seen < 2000:
                assert time.monotonic() < deadline
                found = read_utilization(view)
                assert len(set(found.model_ids)) == len(found)
                for quota in found.quotas:
                    assert quota.model_id == f"guest-{quota.max_tokens_per_day}"
                    seen += 1
    finally:
        stop.set()
        thread.join()


def test_each_row_is_of_one_moment(path):
    manager = ResourceQuotaManager(path=path)
    for i in range(100):
        manager.set_quota(f"m{i}", max_ram_mb=None, max_tokens_per_second=None, max_requests_per_second=None)
    rows = manager.codes([f"m{i}" for i in range(100)] * 50)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            manager.check_many(rows, 7)  # without the GIL

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with ResourceQuotaManager.open_readonly(path) as view:
            for _ in range(50):
                found = view.snapshot()
                assert len(found) == 100
                assert (found["tokens_total"] == 7 * found["allowed_total"].astype(np.uint64)).all()
                assert (found["tokens_this_day"] == 7 * found["requests_this_day"]).all()
    finally:
        stop.set()
        thread.join()


def test_a_file_that_is_cut_off_is_told(path):
    fill(ResourceQuotaManager(path=path), 300)
    descriptor = os.open(path, os.O_RDONLY)
    with ResourceQuotaManager.open_readonly(path) as view:
        regions = view._reader().regions
        with pytest.raises(EOFError, match="the file ends before row 300"):
            read_rows(descriptor, regions._replace(cold_rows=regions.size), 300, 0)
        os.truncate(path, regions.cold_rows + 1000)
        with pytest.raises(StateFileError, match="cut off"):
            view.snapshot()
    os.close(descriptor)
    with pytest.raises(OSError, match="reading the rows has failed"):
        read_rows(-1, regions, 1, 0)


def test_quotas_are_told_apart_if_their_mixtures_are_alike(path, monkeypatch):
    manager = ResourceQuotaManager(path=path)
    fill(manager, 50)
    monkeypatch.setattr("modelquota.reading.reader._MIX", 0)
    found = read_utilization(manager)
    assert list(found.quotas) == [manager.get_quota(model_id) for model_id in found.model_ids]


def test_arrays_of_other_kinds_are_refused(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m")
    _, limits, _ = manager._read_table()
    with pytest.raises(ValueError, match="contiguous, writeable array of elements of"):
        unpack_limits(np.zeros(1, np.uint8))
    with pytest.raises(ValueError, match="contiguous"):
        unpack_limits(np.repeat(limits, 4)[::2])
    with ResourceQuotaManager.open_readonly(path) as view:
        usage, *_ = view._rows_of(view._reader())
        part = view._reader().part(0, 1)
    with pytest.raises(ValueError, match=r"places\[0\] is 5; there are 1 rows"):
        records_of(usage, ["m"], np.array([5]))
    with pytest.raises(ValueError, match="there are 2 places for 1 ids"):
        records_of(usage, ["m"], np.array([0, 0]))
    shares = part.shares, part.header
    with pytest.raises(ValueError, match="there are 2 cold rows and 1 shares for 1 rows"):
        read_copies(part.rows, np.repeat(part.cold_rows, 2), part.rings, *shares, 0)
    with pytest.raises(ValueError, match="there are 1 cold rows and 2 shares for 1 rows"):
        read_copies(part.rows, part.cold_rows, part.rings, np.repeat(part.shares, 2), part.header, 0)
    with pytest.raises(ValueError, match="there are 2 rings for 1 rows; give one each"):
        read_copies(part.rows, part.cold_rows, (*part.rings[:-1], np.repeat(part.rings[-1], 2)), *shares, 0)
    with pytest.raises(ValueError, match="array of elements of 480 bytes"):
        read_copies(part.rows, part.cold_rows, part.rings[::-1], *shares, 0)


def test_reading_all_through_a_view_is_a_small_multiple_of_the_managers(path):
    """A generous bound, on a smaller table than the benchmark's."""
    manager = ResourceQuotaManager(path=path)
    for i in range(16_384):
        manager.set_quota(f"user-{i}", max_ram_mb=100 + i % 7)
        manager.check_quota(f"user-{i}", 5)
    with ResourceQuotaManager.open_readonly(path) as view:

        def cpu_s(reader):
            start = time.process_time()
            assert len(read_utilization(reader)) == 16_384
            return time.process_time() - start

        pairs = [(cpu_s(manager), cpu_s(view)) for _ in range(5)]
    of_manager, of_view = map(min, zip(*pairs, strict=True))
    assert of_view < 6 * of_manager


def test_what_is_read_of_damaged_rows_writes_nothing_beside_their_copies(path):
    """Whatever is in a file: times before its beginning and beyond its end, and counts of slots that no row has."""
    fill(ResourceQuotaManager(path=path), 1)
    with ResourceQuotaManager.open_readonly(path) as view:
        part = view._reader().part(0, 1)
    rng = np.random.default_rng(7)
    slot_ns = 16_666_667
    parts = [part.rows, part.cold_rows, part.shares, *part.rings]
    header = part.header.copy()
    beside = [np.zeros(257, array.dtype) for array in parts]
    for _ in range(3000):
        for whole, array in zip(beside, parts, strict=True):
            whole[128:129] = array
        row, cold, share, *rings = (whole[128:129] for whole in beside)
        now_ns = int(rng.choice([-(2**61), -(10**9), 0, 10**15, 2**61, 2**62]))
        row["slot_end_ns"] = now_ns - int(rng.integers(-3, 90)) * slot_ns if rng.random() < 0.8 else -(2**63)
        row["level_ns"] = rng.choice([now_ns, now_ns + slot_ns, -(2**63), 2**62])
        row["trail_end_ns"] = row["slot_end_ns"] + int(rng.integers(-3, 5)) * slot_ns
        row["trail"] = rng.choice([0, 1, 4, 5, 255])
        row["trail_slots"] = rng.integers(0, 256, 4)
        row["trail_requests"] = row["trail_tokens"] = rng.integers(0, 60_000, 4)
        cold["filled"] = rng.choice([0, 59, 60, 61, 255], 5)
        cold["counted"] = 31
        row["has_share"] = rng.integers(0, 3)
        share["held"] = rng.choice([-(2**63), -5, 0, 5, 2**62, 2**63 - 1], 15)
        share["request_drain"], share["token_drain"] = rng.choice([-(2**63), -1, 0, 1, 2**63 - 1], 2)
        share["token_cap"]["high"] = rng.choice([0, 1, 2**61, 2**63], 1)
        share["phase"], share["called"] = rng.integers(0, 2**32), rng.integers(0, 2)
        header["lease"]["end_ns"] = rng.choice([-(2**63), 0, now_ns, 2**63 - 1])
        header["lease"]["rule"] = rng.choice([0, 1, 2, 3, 4, 6, 2**32 - 1])
        read_copies(row, cold, tuple(rings), share, header, now_ns)
        for whole in beside:
            assert not np.frombuffer(whole[:128], np.uint8).any()
            assert not np.frombuffer(whole[129:], np.uint8).any()
