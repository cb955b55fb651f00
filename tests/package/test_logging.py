"""Every violation is logged: at most one record per model and second, which says how many it stands for."""

import logging
import subprocess
import sys

import pytest

from modelquota import ManualClock, ResourceQuotaConfig

ACTIONS = ("reject", "throttle", "warn", "queue")
QUOTAS = [ResourceQuotaConfig(action, max_requests_per_hour=0, on_violation=action) for action in ACTIONS]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def records():
    """Everything that the logger hands out during the test."""
    kept = []
    handler = logging.Handler()
    handler.emit = kept.append
    logger = logging.getLogger("modelquota")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield kept
    logger.setLevel(level)
    logger.removeHandler(handler)


def test_levels_and_words(manager, records):
    for action in ("reject", "throttle", "warn", "queue"):
        manager.check_quota(action, 1)
    assert [record.levelname for record in records] == ["WARNING", "WARNING", "WARNING", "INFO"]
    assert records[0].getMessage() == (
        "model 'reject': requests per hour: 0 of 0 used, 1 asked; never fits: more than the limit itself "
        "(reject; 1 since the last record)"
    )


def test_one_record_per_model_and_second(manager, records):
    for _ in range(5):
        manager.check_quota("reject", 1)
        manager.check_quota("throttle", 1)
    assert len(records) == 2
    manager.clock.advance(0.999)
    manager.check_quota("reject", 1)
    assert len(records) == 2
    manager.clock.advance(0.001)
    manager.model("reject").check(1)
    assert len(records) == 3
    assert "6 since the last record" in records[2].getMessage()
    manager.clock.advance(100)
    manager.check_quota("reject", 1)
    assert "(reject; 1 since" in records[3].getMessage()


def test_batches_log_alike(manager, records):
    second = 10**9
    rows = manager.codes(["reject", "queue", "reject", "reject", "queue"])
    manager.check_many(rows, 1, times_ns=[0, 0, 1, second, second])
    assert [(record.levelname, record.args[0], record.args[3]) for record in records] == [
        ("WARNING", "reject", 1),
        ("INFO", "queue", 1),
        ("WARNING", "reject", 2),
        ("INFO", "queue", 1),
    ]


def test_unknown_models_are_logged_once_a_second(manager, records):
    for _ in range(3):
        manager.check_quota("nobody", 1)
    assert [record.getMessage() for record in records] == [
        "model 'nobody' has no quota: allowed (1 checks of unknown models since the last record)"
    ]
    manager.clock.advance(1)
    manager.check_quota("somebody", 1)
    assert records[1].getMessage().endswith("(3 checks of unknown models since the last record)")


def test_a_handler_may_use_the_manager(manager):
    """Logging happens after the lock is released."""
    seen = []

    class Curious(logging.Handler):
        def emit(self, record):
            seen.append((manager.get_usage("reject").total_violations, bool(manager.check_quota("reject", 1))))

    handler = Curious()
    logger = logging.getLogger("modelquota")
    logger.addHandler(handler)
    try:
        manager.check_quota("reject", 1)
        manager.check_many(manager.codes(["throttle"]), 1)
    finally:
        logger.removeHandler(handler)
    assert seen == [(1, False), (2, False)]


def test_a_handler_that_raises_loses_no_decision(manager, capsys):
    class Broken(logging.Handler):
        def emit(self, record):
            raise OSError("the disk is full")

    handler = Broken()
    logger = logging.getLogger("modelquota")
    logger.addHandler(handler)
    try:
        assert not manager.check_quota("reject", 1)
        assert manager.check_many(manager.codes(["throttle", "warn", "queue"]), 1).tolist() == [9, 0, 9]
        assert manager.check_quota("nobody", 1)
    finally:
        logger.removeHandler(handler)
    assert capsys.readouterr().err.count("OSError: the disk is full") == 4  # queue is below the level


def test_silent_where_nobody_listens():
    code = """
from modelquota import ResourceQuotaManager
manager = ResourceQuotaManager()
manager.set_quota("m", max_requests_per_day=0)
manager.check_quota("m", 1)
manager.check_quota("nobody", 1)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
