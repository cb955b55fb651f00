"""A window that is not counted costs a model neither memory nor disk: the pages of its rings are never touched."""

from __future__ import annotations

import ctypes
import os

import numpy as np
import pytest
from factories import open_quota

from modelquota import ManualClock, ResourceQuotaManager
from modelquota._core.state.state import regions_for
from modelquota.quota.limits import WINDOWS

MODELS = 2_000
PAGE = os.sysconf("SC_PAGE_SIZE")
OPTIONAL = [number for number, window in enumerate(WINDOWS) if window.optional]
ALWAYS = [number for number, window in enumerate(WINDOWS) if not window.optional]


def resident(manager: ResourceQuotaManager, window: int) -> list[int]:
    """The pages of a window's rings that have memory."""
    libc = ctypes.CDLL(None, use_errno=True)
    rings = manager._rings()[window]
    address, size = rings.ctypes.data, rings.nbytes
    assert address % PAGE == 0
    found = (ctypes.c_ubyte * -(-size // PAGE))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), found) == 0, os.strerror(ctypes.get_errno())
    return [page for page, state in enumerate(found) if state & 1]


def busy(manager: ResourceQuotaManager) -> None:
    """Everything that turns windows, reads or refunds, over days."""
    clock = manager.clock
    assert isinstance(clock, ManualClock)
    codes = manager.codes([f"m{i}" for i in range(MODELS)])
    for seconds in (0.0, 0.02, 0.02, 1.0, 61.0, 3_700.0, 90_000.0, 3e6):
        clock.advance(seconds)
        manager.check_many(codes, 2)
        manager.charge_many(codes, 3)
        with manager.reserve(("m1", "m2"), 5) as grant:
            clock.advance(0.05)
            grant.settle(1)
        manager.snapshot()
        manager.get_model_report("m3")


def make(path: os.PathLike[str] | None) -> ResourceQuotaManager:
    manager = ResourceQuotaManager(clock=ManualClock(10**15), path=path, max_models=2 * MODELS)
    for i in range(MODELS):
        manager.set_quota(open_quota(f"m{i}", max_tokens_per_hour=10**9))
    return manager


def test_no_page_of_a_window_that_is_not_counted_is_touched():
    manager = make(None)
    busy(manager)
    assert [resident(manager, window) for window in OPTIONAL] == [[], []]
    assert all(len(resident(manager, window)) >= MODELS * 480 // PAGE for window in ALWAYS)
    manager.update_quota("m700", max_requests_per_minute=10**6, max_tokens_per_month=10**9)
    busy(manager)
    for window in OPTIONAL:
        size = manager._rings()[window].itemsize
        first, last = 700 * size // PAGE, (701 * size - 1) // PAGE
        assert resident(manager, window) == list(range(first, last + 1))


def test_a_file_has_no_blocks_for_them(path):
    manager = make(path)
    busy(manager)
    regions = regions_for(2 * MODELS)
    ends = [*regions.rings[1:], regions.names]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        for window in OPTIONAL:
            start = os.lseek(descriptor, regions.rings[window], os.SEEK_DATA)
            assert start >= ends[window]
        blocks = os.fstat(descriptor).st_blocks
        manager.set_quota("m0", max_requests_per_minute=5)
        manager.check_quota("m0", 1)
        assert 0 < os.fstat(descriptor).st_blocks - blocks <= 2 * PAGE // 512
    finally:
        os.close(descriptor)


def test_what_a_copy_of_a_file_lacks_is_set_aside_when_it_is_opened(path, tmp_path):
    """A copy may leave out pages of zeros: the rings of windows that are counted have space again once it is open."""
    manager = ResourceQuotaManager(path=path, max_models=64)
    for i in range(40):
        manager.set_quota(open_quota(f"m{i}", **{"max_tokens_per_month": 5} if i == 39 else {}))
    manager.close()
    data = path.read_bytes()
    copy = tmp_path / "copy.state"
    with open(copy, "wb") as file:
        for at in range(0, len(data), PAGE):
            if data[at : at + PAGE].strip(b"\0"):
                file.seek(at)
                file.write(data[at : at + PAGE])
        file.truncate(len(data))
    os.chmod(copy, 0o600)
    regions = regions_for(64)
    with ResourceQuotaManager(path=copy) as manager, open(copy, "rb") as file:
        size = manager._rings()[4].itemsize
        for window, row in ((2, 0), (2, 39), (4, 39)):
            at = regions.rings[window] + row * manager._rings()[window].itemsize
            extents = np.array(allocated(file.fileno()))
            assert ((extents[:, 0] <= at) & (at < extents[:, 1])).any(), (window, row)
        at = regions.rings[4] // PAGE * PAGE
        assert size * 39 > PAGE
        assert not ((extents[:, 0] <= at) & (at < extents[:, 1])).any()


def allocated(descriptor: int) -> list[tuple[int, int]]:
    """The ranges of a file that have blocks, those that were set aside included (FIEMAP)."""
    import fcntl
    import struct

    header, extent = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
    request = bytearray(header.pack(0, 2**63, 1, 0, 500, 0) + bytes(500 * extent.size))
    try:
        fcntl.ioctl(descriptor, 0xC020660B, request)
    except OSError as error:
        pytest.skip(f"this file system does not list its extents: {error}")
    count = header.unpack_from(request)[3]
    found = [extent.unpack_from(request, header.size + i * extent.size) for i in range(count)]
    return [(start, start + size) for start, _, size, *_ in found]
