"""ManualClock: it moves forward only, exactly, and bad input leaves it where it is."""

import copy
import pickle

import numpy as np
import pytest

from modelquota import ManualClock, ResourceQuotaManager


def test_moves_exactly():
    clock = ManualClock()
    clock.advance(0.1)
    assert clock.now_ns == 100_000_000
    clock.advance_ns(1)
    assert clock.now_ns == 100_000_001
    clock.advance(0)
    clock.advance(np.float64(1))
    clock.advance_ns(np.int64(2))
    assert clock.now_ns == 1_100_000_003
    assert ManualClock(2**61).now_ns == 2**61


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.int64, np.uint16, np.float16, np.float32])
def test_advances_by_numpy_numbers_of_any_width(kind):
    clock = ManualClock()
    clock.advance(kind(100))
    assert clock.now_ns == 100 * 10**9


@pytest.mark.parametrize("seconds", [-1, -1e-9, float("nan"), float("inf"), 1e300, 2**61])
def test_advance_refuses(seconds):
    clock = ManualClock(7)
    with pytest.raises(ValueError, match=r"a clock moves forward only|give a whole number|2\*\*61"):
        clock.advance(seconds)
    assert clock.now_ns == 7


@pytest.mark.parametrize(
    ("ns", "error"), [(-1, ValueError), (2**61, ValueError), (2**80, ValueError), (1.0, TypeError)]
)
def test_advance_ns_refuses(ns, error):
    clock = ManualClock(7)
    with pytest.raises(error):
        clock.advance_ns(ns)
    assert clock.now_ns == 7


def test_start_out_of_range():
    with pytest.raises(ValueError, match=r"now_ns is -1; give a whole number of nanoseconds, 0 \.\. 2\*\*61"):
        ManualClock(-1)
    with pytest.raises(ValueError, match="now_ns is 2305843009213693953"):
        ManualClock(2**61 + 1)


def test_message_says_where_the_clock_stands():
    with pytest.raises(ValueError, match="the clock is at 5 ns and moves forward only"):
        ManualClock(5).advance_ns(2**61)


def test_cannot_be_set_back_by_initialising_again():
    clock = ManualClock(5)
    with pytest.raises(ValueError, match="is at 5 ns and moves forward only"):
        clock.__init__(4)
    assert clock.now_ns == 5


def test_copies_and_shows():
    clock = ManualClock(5)
    for twin in (pickle.loads(pickle.dumps(clock)), copy.copy(clock)):
        twin.advance_ns(1)
        assert (clock.now_ns, twin.now_ns) == (5, 6)
    assert repr(clock) == "ManualClock(now_ns=5)"


def test_the_real_clock_is_monotonic():
    manager = ResourceQuotaManager()
    assert manager.clock is None
    manager.set_quota("m", max_requests_per_hour=3, on_violation="reject")
    assert [bool(manager.check_quota("m", 1)) for _ in range(5)] == [True, True, True, False, False]
    assert 0 < manager.check_quota("m", 1).retry_after_ms <= 3_660_000


def test_wall_clock_jumps_change_nothing(monkeypatch):
    import time

    manager = ResourceQuotaManager()
    manager.set_quota("m", max_requests_per_hour=1, on_violation="reject")
    assert manager.check_quota("m", 1)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "time_ns", lambda: 4 * 10**18)
    assert not manager.check_quota("m", 1)
