"""Adjustment of a state file: a killed adjuster leaves no model tightened for good, nobody's change is lost."""

import itertools
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading

import pytest

from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota.control.load import LoadAdjuster
from modelquota.statefile import journal as adjusting

CONFIGURED = ResourceQuotaConfig("m", max_ram_mb=1000, max_requests_per_second=33.3, on_violation="reject")


@pytest.fixture
def path(tmp_path):
    path = str(tmp_path / "quota.state")
    manager = ResourceQuotaManager(path=path, max_models=8)
    manager.set_quota(CONFIGURED)
    manager.set_quota("other", max_ram_mb=50)
    return path


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(adjusting, "_PATIENCE_SEC", 0.02)


def adjuster_of(manager, **settings):
    return LoadAdjuster(manager, lambda: 0.9, **{"min_interval_sec": 0, **settings})


PROGRAM = """
import os, sys, time
from modelquota import ResourceQuotaManager
from modelquota.control.load import LoadAdjuster
manager = ResourceQuotaManager(path=sys.argv[1])
adjuster = LoadAdjuster(manager, lambda: 0.9, floor=0.4, min_interval_sec=0, tightened_action="throttle")
def ready():
    print("ready", flush=True)
    time.sleep(600)
"""


def run_and_kill(path, code="adjuster.poll()", while_alive=lambda: None):
    """Adjust in a process, and kill it in the middle of it; what it printed before it was ready."""
    program = PROGRAM + textwrap.dedent(code) + "\nready()"
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", program, path], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            printed = list(iter(process.stdout.readline, "ready\n"))
            while_alive()
        finally:
            process.kill()
    return printed


def journal_of(path):
    with open(path + ".adjusting", encoding="utf-8") as file:
        return json.load(file)


def test_what_a_killed_adjuster_has_tightened_is_as_configured_when_the_file_is_opened(path, caplog):
    caplog.set_level(logging.INFO)
    with_it_open = ResourceQuotaManager(path=path)

    def look():
        assert stat.S_IMODE(os.stat(path + ".adjusting").st_mode) == 0o600
        quota = ResourceQuotaManager(path=path).get_quota("m")  # who opens it beside a living adjuster restores nothing
        assert (quota.max_ram_mb, quota.on_violation) == (600, "throttle")

    run_and_kill(path, "adjuster.poll(); adjuster.poll()", look)
    assert with_it_open.get_quota("m").max_ram_mb == 600
    manager = ResourceQuotaManager(path=path)
    assert manager.get_quota("m") == with_it_open.get_quota("m") == CONFIGURED
    assert manager.get_quota("other") == ResourceQuotaConfig("other", max_ram_mb=50)
    assert os.listdir(os.path.dirname(path)) == ["quota.state"]
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    assert "2 models have their configured limits again" in caplog.text


def test_or_when_another_adjuster_begins(path):
    manager = ResourceQuotaManager(path=path)
    run_and_kill(path)
    with adjuster_of(manager, floor=0.5) as adjuster:
        adjuster.poll()
        assert manager.get_quota("m").max_ram_mb == 800, "of what was configured, not of what was left"
    assert manager.get_quota("m") == CONFIGURED
    assert not os.path.exists(path + ".adjusting")


@pytest.mark.parametrize("ram_mb", [700, 800])  # 800 is what the adjuster itself had set, one step before
def test_what_an_operator_has_set_meanwhile_stays(path, ram_mb):
    def operate():
        manager = ResourceQuotaManager(path=path)
        manager.update_quota("m", max_ram_mb=ram_mb)
        manager.remove_quota("other")

    run_and_kill(path, "adjuster.poll(); adjuster.poll()", operate)
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED.replace(max_ram_mb=ram_mb)


def test_what_an_operator_has_set_becomes_the_configured_value(path):
    run_and_kill(path, "adjuster.poll(); manager.update_quota('m', max_ram_mb=500); adjuster.poll()")
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED.replace(max_ram_mb=500)


def test_killed_between_two_models(path):
    code = """
        swap = manager.replace_quota
        def stop(old, new):
            if old.model_id == "other" and adjuster.factor < 0.7:
                ready()
            return swap(old, new)
        manager.replace_quota = stop
        adjuster.poll()
        adjuster.poll()
    """
    run_and_kill(path, code)
    manager = ResourceQuotaManager(path=path)
    assert manager.get_quota("m") == CONFIGURED
    assert manager.get_quota("other").max_ram_mb == 50


def test_a_child_that_outlives_it_does_not_keep_its_journal(path):
    code = """
        adjuster.poll()
        child = os.fork()
        if not child:
            os.close(1)
            adjuster.undo()  # the parent adjusts, not the child
            time.sleep(600)
        print(child)
        time.sleep(0.2)
    """
    tightened = []
    (child,) = run_and_kill(
        path, code, lambda: tightened.append(ResourceQuotaManager(path=path).get_quota("m").max_ram_mb)
    )
    try:
        assert tightened == [800]
        assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED
    finally:
        os.kill(int(child), signal.SIGKILL)


def test_who_opens_the_file_never_takes_a_living_adjuster_for_a_dead_one(path):
    manager, loads = ResourceQuotaManager(path=path), itertools.cycle([0.9, 0.5])
    stop = threading.Event()

    def restore():
        while not stop.is_set():
            adjusting.restore(manager, path + ".adjusting")

    thread = threading.Thread(target=restore)
    thread.start()
    try:
        with LoadAdjuster(manager, lambda: next(loads), min_interval_sec=0) as adjuster:
            for _ in range(200):
                adjuster.poll()
                assert manager.get_quota("m").max_ram_mb == 1000 * adjuster.factor
                assert os.path.exists(path + ".adjusting")
    finally:
        stop.set()
        thread.join()


def test_two_adjusters_of_one_file(path, impatient):
    manager, again = ResourceQuotaManager(path=path), ResourceQuotaManager(path=path)
    with adjuster_of(manager) as adjuster:
        adjuster.poll()
        second = adjuster_of(again)
        message = f"another LoadAdjuster adjusts the limits of {path}; stop it first"
        with pytest.raises(RuntimeError, match=message):
            second.poll()
        with pytest.raises(RuntimeError, match=message):
            second.start(0.01)
        second.stop()
        assert manager.get_quota("m").max_ram_mb == 800
    second.poll()
    assert manager.get_quota("m").max_ram_mb == 800
    second.undo()
    assert manager.get_quota("m") == CONFIGURED


def test_one_that_begins_waits_for_who_is_just_restoring(path):
    journal = adjusting.Journal(path)
    manager = ResourceQuotaManager(path=path)
    journal.claim(manager)
    timer = threading.Timer(0.05, journal.remove)
    timer.start()
    with adjuster_of(manager) as adjuster:
        adjuster.poll()
    timer.join()


def test_the_journal_says_what_is_adjusted_now_and_undo_removes_it(path):
    manager = ResourceQuotaManager(path=path)
    loads = [0.9, 0.9, 0.5]
    adjuster = LoadAdjuster(
        manager, lambda: loads.pop(0), models=["m"], fields=["max_ram_mb"], floor=0.4, min_interval_sec=0
    )
    for expected in (800, 600):
        adjuster.poll()
        assert journal_of(path)["models"] == {"m": {"max_ram_mb": {"configured": 1000, "set": [expected]}}}
    adjuster.poll()
    assert journal_of(path)["models"] == {}
    adjuster.undo()
    assert os.listdir(os.path.dirname(path)) == ["quota.state"]
    adjuster.undo()


def test_the_end_of_the_interpreter_removes_it(path):
    code = """
        import sys
        from modelquota import ResourceQuotaManager
        from modelquota.control.load import LoadAdjuster
        manager = ResourceQuotaManager(path=sys.argv[1])
        LoadAdjuster(manager, lambda: 0.9).poll()
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code), path], check=True, timeout=60)
    assert os.listdir(os.path.dirname(path)) == ["quota.state"]


def test_it_lies_beside_the_file_and_not_beside_a_link_to_it(path, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to(path)
    run_and_kill(str(link))
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED


ENTRY = {"configured": 1000, "set": [800]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b'{"version": 1, "models": {"m": {"max_ram_mb": {"conf',
        b"[" * 100_000,
        b"[]",
        json.dumps({"version": 2, "models": {}}).encode(),
        json.dumps({"version": 1}).encode(),
        *(
            json.dumps({"version": 1, "models": {"m": {"max_ram_mb": ENTRY}, **models}}).encode()
            for models in (
                {"n": []},
                {"n": {"max_ram_mb": 5}},
                {"n": {"max_ram_mb": {"configured": 5}}},
                {"n": {"max_ram_mb": {"configured": 5, "set": 4}}},
                {"n": {"max_ram_mb": {"configured": -5, "set": [4]}}},
                {"n": {"max_ram": ENTRY}},
                {"n": {"model_id": {"configured": "m", "set": ["n"]}}},
                {"": {"max_ram_mb": ENTRY}},
            )
        ),
    ],
    ids=range(15),
)
def test_a_damaged_journal_is_logged_and_left(path, content, caplog):
    with open(path + ".adjusting", "wb") as file:
        file.write(content)
    ResourceQuotaManager(path=path + "2").set_quota("unrelated")
    assert not caplog.records
    manager = ResourceQuotaManager(path=path)
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert f"{path}.adjusting is left as it is" in caplog.text
    manager.update_quota("m", max_ram_mb=800)
    assert ResourceQuotaManager(path=path).get_quota("m").max_ram_mb == 800
    with pytest.raises(RuntimeError, match="is damaged .*: check that the limits are correct, then remove it"):
        adjuster_of(manager).poll()
    with open(path + ".adjusting", "rb") as file:
        assert file.read() == content


def test_what_is_no_file_is_left_too(path, caplog):
    os.mkfifo(path + ".adjusting")
    manager = ResourceQuotaManager(path=path)
    assert "it is not a regular file" in caplog.text
    with pytest.raises(RuntimeError, match="it is not a regular file"):
        adjuster_of(manager).poll()


def test_a_journal_that_cannot_be_written_leaves_the_limits_alone(path, monkeypatch):
    manager = ResourceQuotaManager(path=path)
    with adjuster_of(manager) as adjuster:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            adjuster._begin()
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space left"):
                adjuster.poll()
            assert (manager.get_quota("m"), adjuster.factor) == (CONFIGURED, 1)
        adjuster.poll()
        assert manager.get_quota("m").max_ram_mb == 800
        monkeypatch.setattr(os, "fsync", full)
    assert manager.get_quota("m") == CONFIGURED, "undone without writing"
    assert os.listdir(os.path.dirname(path)) == ["quota.state"]


def test_a_quota_that_is_set_while_the_file_is_being_adjusted_is_journaled_before_it_is_adjusted(path):
    code = """
        swap, sets = manager.replace_quota, [500, 300]
        def set_just_before(old, new):
            if old.model_id == "m":
                if not sets:
                    ready()
                manager.set_quota(old.replace(max_ram_mb=sets.pop(0)))
            return swap(old, new)
        manager.replace_quota = set_just_before
        adjuster.poll()
    """
    journals = []
    run_and_kill(path, code, lambda: journals.append(journal_of(path)["models"]["m"]["max_ram_mb"]))
    assert journals == [{"configured": 300, "set": [240]}]
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED.replace(max_ram_mb=300)


def test_to_open_a_file_without_a_journal_imports_nothing_for_it(path):
    code = """
        import sys
        from modelquota import ResourceQuotaManager
        ResourceQuotaManager(path=sys.argv[1])
        assert not {"modelquota.statefile.journal", "modelquota.control.load"} & sys.modules.keys()
    """
    subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code), path], check=True, timeout=60)
