"""Other processes of a state, as tests need them: alive and holding something, stopped inside a lock, or killed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelquota import ResourceQuotaManager
from modelquota._core.state.packing import dtypes
from modelquota._core.state.state import regions_for

SEATS = 1024
EPOCHS = np.uint64(2**22 - 1)
"""Bits of a seat's `holder` that say how often it was taken."""


def epochs_of(manager: ResourceQuotaManager) -> NDArray[np.uint64]:
    """How often each seat has been taken."""
    header, _, _ = manager._arrays()
    seats = np.frombuffer(header.base, dtypes()["seat"], SEATS, regions_for(int(header["max_models"][0])).seats)
    epochs: NDArray[np.uint64] = seats["holder"] & EPOCHS
    return epochs


def seat_words(manager: ResourceQuotaManager) -> set[int]:
    """The words of all seats that were ever taken: of the latest owner of each."""
    epochs = epochs_of(manager)
    return {int(epochs[seat]) << 10 | int(seat) for seat in np.flatnonzero(epochs)}


def row_of(manager: ResourceQuotaManager, model_id: str) -> int:
    """The number of the row in which a model is."""
    return int(manager.codes([model_id])[0]) & 0xFFFF_FFFF


@contextlib.contextmanager
def forked(work: Callable[[], object]) -> Iterator[int]:
    """A child that does `work`, keeps what that returns and waits to be killed; entered once the work is done."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no test that crashes leaves it behind
            _kept = work()
            os.write(done, b"1")
            while True:
                signal.pause()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(done)
    try:
        assert os.read(ready, 1) == b"1", "the child failed"
        yield pid
    finally:
        os.close(ready)
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def child_of(work: Callable[[], object]) -> int:
    """Fork a child that does `work` and ends; its process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def outcome_in_child(work: Callable[[], object], seconds: int = 60) -> Any:
    """What `work` returns in a forked child, as its repr; the name of what it raised, after an exclamation mark."""
    ready, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(seconds)
            try:
                said = repr(work())
            except BaseException as error:
                traceback.print_exc()
                said = "!" + type(error).__name__
            os.write(done, said.encode())
        finally:
            os._exit(0)
    os.close(done)
    with open(ready) as file:
        said = file.read()
    os.waitpid(pid, 0)
    return said


@contextlib.contextmanager
def stopped_inside(manager: ResourceQuotaManager, *model_ids: str) -> Iterator[int]:
    """A process that stands still (SIGSTOP) while it has the locks of these models' rows; at the end it goes on.

    It is a forked child, with a seat of its own; the lock words are written for it.
    """
    before = seat_words(manager)
    _, rows, _ = manager._arrays()
    numbers = [row_of(manager, model_id) for model_id in model_ids]
    with forked(lambda: None) as pid:
        word = max(seat_words(manager) - before)
        os.kill(pid, signal.SIGSTOP)
        for number in numbers:
            rows["lock"][number] = word
        try:
            yield pid
        finally:
            for number in numbers:
                if rows["lock"][number] == word:
                    rows["lock"][number] = 0
            del rows
