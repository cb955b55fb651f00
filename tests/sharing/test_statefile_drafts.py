"""Drafts of state files and journals: left by the dead, removed by the next one; and the modes of what is made."""

import contextlib
import os
import stat
import subprocess
import sys
import textwrap

import pytest

from modelquota import ResourceQuotaConfig, ResourceQuotaManager
from modelquota._core.state import beside
from modelquota.control.load import LoadAdjuster

OTHER = 65_533
CONFIGURED = ResourceQuotaConfig("m", max_ram_mb=1000, on_violation="reject")


def test_drafts_of_the_dead_are_removed_and_no_others(tmp_path):
    path = tmp_path / "quota.state"
    kept = [
        "quota.state.0123456789abcdef.new.old",
        "quota.state.0123456789ABCDEF.new",
        "quota.state.0123456789abcde.new",
        "quota.state.new",
        "other.state.0123456789abcdef.new",
        "quota.state.adjusting.0123456789abcdeg.new",
    ]
    for name in kept:
        (tmp_path / name).touch()
    (tmp_path / "target").touch()
    (tmp_path / "quota.state.0000000000000001.new").symlink_to("target")
    (tmp_path / "quota.state.0000000000000002.new").mkdir()
    os.mkfifo(tmp_path / "quota.state.0000000000000003.new")
    left = sorted(os.listdir(tmp_path))
    for name in ("quota.state.0123456789abcdef.new", "quota.state.adjusting.fedcba9876543210.new"):
        (tmp_path / name).touch()
    if os.geteuid() == 0:
        (tmp_path / "quota.state.0000000000000004.new").touch()
        os.chown(tmp_path / "quota.state.0000000000000004.new", OTHER, OTHER)
        left = sorted([*left, "quota.state.0000000000000004.new"])
    ResourceQuotaManager(path=path, max_models=8)
    assert sorted(os.listdir(tmp_path)) == sorted([*left, "quota.state"])


STOP = """
    import os, signal, sys, time
    name = sys.argv[2]
    real = getattr(os, name)
    def stop(*args, **kwargs):
        real(*args, **kwargs)
        print("here", flush=True)
        time.sleep(600)
    from modelquota import ResourceQuotaManager
    from modelquota.control.load import LoadAdjuster
    if len(sys.argv) > 3:
        manager = ResourceQuotaManager(path=sys.argv[1])
        setattr(os, name, stop)
        LoadAdjuster(manager, lambda: 0.9).poll()
    else:
        setattr(os, name, stop)
        ResourceQuotaManager(path=sys.argv[1], max_models=8)
"""


@contextlib.contextmanager
def stopped_after(name, path, *more):
    command = [sys.executable, "-c", textwrap.dedent(STOP), path, name, *more]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "here\n"
            yield
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("name", "more"), [("fsync", ()), ("link", ()), ("fsync", ("adjusts",)), ("link", ("adjusts",))]
)
def test_a_draft_stays_while_its_writer_lives_and_goes_when_it_has_died(tmp_path, name, more):
    path = str(tmp_path / "quota.state")
    if more:
        ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    with stopped_after(name, path, *more):
        (draft,) = [entry for entry in os.listdir(tmp_path) if entry.endswith(".new")]
        ResourceQuotaManager(path=path).set_quota(CONFIGURED)
        assert draft in os.listdir(tmp_path)
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED
    assert os.listdir(tmp_path) == ["quota.state"]


def test_a_draft_that_is_taken_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    path = str(tmp_path / "quota.state")
    flock, removed = beside.fcntl.flock, []

    def late(descriptor, operation):
        if len(removed) < 2:
            removed.append(None)
            beside.remove_dead_drafts(path)
        flock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(beside.fcntl, "flock", late)
        ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    assert len(removed) == 2
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED
    assert os.listdir(tmp_path) == ["quota.state"]
    assert not beside.locks


# -- masks


@pytest.mark.parametrize("mask", [0o000, 0o077, 0o277, 0o777])
def test_what_is_made_has_mode_0600_whatever_the_umask(tmp_path, mask):
    path = str(tmp_path / "quota.state")
    before = os.umask(mask)
    try:
        manager = ResourceQuotaManager(path=path, max_models=8)
        manager.set_quota(CONFIGURED)
        with LoadAdjuster(manager, lambda: 0.9) as adjuster:
            adjuster.poll()
            modes = {name: stat.S_IMODE(os.stat(tmp_path / name).st_mode) for name in os.listdir(tmp_path)}
    finally:
        os.umask(before)
    assert modes == {"quota.state": 0o600, "quota.state.adjusting": 0o600}
