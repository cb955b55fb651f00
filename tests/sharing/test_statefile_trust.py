"""Whose files are believed: the state file, and what is beside it. With users of this machine, so it needs root."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import textwrap

import pytest

from modelquota import ResourceQuotaConfig, ResourceQuotaManager, StateFileError
from modelquota.cli import main
from modelquota.control.load import LoadAdjuster
from modelquota.statefile.inspect import inspect_file, verify_file

OWNER, OTHER = 65_534, 65_533
CONFIGURED = ResourceQuotaConfig("m", max_ram_mb=1000, on_violation="reject")
TIGHT = {"version": 1, "models": {"m": {"max_ram_mb": {"configured": 10**6, "set": [1000]}}}}

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as several users")


@pytest.fixture
def folder():
    """One that everybody may write to, as /tmp is."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o1777)
        yield folder


@pytest.fixture
def path(folder):
    return os.path.join(folder, "quota.state")


# Python itself may lie where only root can read: everything is imported before root's rights are given up.
AS_USER = """
    import contextlib, importlib, json, logging, os, sys, tempfile, traceback
    from modelquota import ResourceQuotaManager
    with tempfile.TemporaryDirectory() as folder:
        warm = ResourceQuotaManager(path=folder + "/warm", max_models=8)
        warm.set_quota("warm")
        with open(folder + "/warm.adjusting", "w") as file:
            file.write('{"version": 1, "models": {"warm": {"max_ram_mb": {"configured": 5, "set": [2048]}}}}')
        os.chmod(file.name, 0o600)
        assert ResourceQuotaManager(path=folder + "/warm").get_quota("warm").max_ram_mb == 5
        ResourceQuotaManager.open_readonly(folder + "/warm").get_quota("warm")
        del warm
    os.setgroups([])
    os.setgid(int(sys.argv[-1]))
    os.setuid(int(sys.argv[-1]))
"""


def as_user(user, program, *values):
    """Run a program as another user; what it prints."""
    code = textwrap.dedent(AS_USER) + textwrap.dedent(program)
    command = [sys.executable, "-c", code, *values, str(user)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MAKE = """
    from modelquota import ResourceQuotaConfig, ResourceQuotaManager
    manager = ResourceQuotaManager(path=sys.argv[1], max_models=8)
    manager.set_quota(ResourceQuotaConfig("m", max_ram_mb=1000, on_violation="reject"))
"""
TRY = """
    import logging
    from modelquota import ResourceQuotaManager, StateFileError
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    try:
        print(ResourceQuotaManager(path=sys.argv[1]).get_quota("m").max_ram_mb)
    except (StateFileError, PermissionError) as error:
        print(error)
"""


def assert_refused_unless_trusted(path, message):
    for open_it in (
        lambda **how: ResourceQuotaManager(path=path, **how),
        lambda **how: ResourceQuotaManager.open_readonly(path, **how),
    ):
        with pytest.raises(StateFileError, match=message):
            open_it()
        assert open_it(trust_file=True).get_quota("m") == CONFIGURED


@needs_root
def test_a_state_file_of_another_user_is_refused_unless_asked_for(path):
    as_user(OWNER, MAKE, path)
    message = rf"it belongs to user {OWNER}, .* this process runs as user 0: .*chown the file, or pass trust_file=True"
    assert_refused_unless_trusted(path, message)
    assert inspect_file(path).models == 1, "to look at it, without the core, nothing has to be trusted"
    assert verify_file(path) == []
    os.chmod(path, 0o644)
    seen = as_user(OTHER, TRY.replace("ResourceQuotaManager(path=", "ResourceQuotaManager.open_readonly(path="), path)
    assert f"it belongs to user {OWNER}" in seen
    assert as_user(OWNER, TRY, path) == "1000"


@needs_root
def test_root_s_file_is_believed_as_root_is(path):
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    os.chmod(path, 0o644)
    program = TRY.replace("ResourceQuotaManager(path=", "ResourceQuotaManager.open_readonly(path=")
    assert as_user(OWNER, program, path) == "1000"


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_state_file_that_others_may_write_to_is_refused_unless_asked_for(tmp_path, mode):
    path = tmp_path / "quota.state"
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    path.chmod(mode)
    message = rf"its mode is {mode:#o}, so others may write to it: chmod it to 0600, or pass trust_file=True"
    assert_refused_unless_trusted(path, message)
    with pytest.raises(StateFileError, match=message):
        ResourceQuotaManager(path=path)  # what one was told is not for the next one
    path.chmod(0o644)
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED


def test_the_terminal_refuses_it_too_unless_asked_for(tmp_path, capsys):
    path = tmp_path / "quota.state"
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    path.chmod(0o666)
    for command in (["set", "m", "max_ram_mb=5"], ["reset-burst", "m"], ["status"], ["remove", "m"]):
        assert main([*command, "--path", str(path)]) == 2
        assert "--trust-file on the command line" in capsys.readouterr().err
        assert main([*command, "--path", str(path), "--trust-file"]) == 0
    assert main(["verify", str(path)]) == 0


# -- the journal


def put_journal(path, content=TIGHT, mode=0o600, owner=None):
    with open(path + ".adjusting", "w", encoding="utf-8") as file:
        json.dump(content, file)
    os.chmod(path + ".adjusting", mode)
    if owner is not None:
        os.chown(path + ".adjusting", owner, owner)


def is_left(path, caplog, words):
    """Whether a journal is neither applied nor removed when the file is opened and adjusted, and it is said why."""
    caplog.clear()
    manager = ResourceQuotaManager(path=path)
    assert manager.get_quota("m") == CONFIGURED
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert f"{path}.adjusting is left as it is" in caplog.text
    assert words in caplog.text
    with pytest.raises(RuntimeError, match="check that the limits are correct") as error:
        LoadAdjuster(manager, lambda: 0.9).poll()
    assert words in str(error.value)
    return os.path.lexists(path + ".adjusting")


@needs_root
def test_another_user_of_the_folder_lifts_no_limits(path, caplog):
    as_user(OWNER, MAKE, path)
    forge = f"""
        with open(sys.argv[1] + ".adjusting", "w") as file:
            file.write({json.dumps(TIGHT)!r})
        os.chmod(sys.argv[1] + ".adjusting", 0o644)
    """
    as_user(OTHER, forge, path)
    seen = as_user(OWNER, TRY, path).splitlines()
    assert f"it belongs to user {OTHER}, and the state file to user {OWNER}" in seen[0]
    assert seen[1] == "1000"
    os.chown(path + ".adjusting", OWNER, OWNER)
    os.chmod(path + ".adjusting", 0o600)
    assert as_user(OWNER, TRY, path) == "1000000", "its own journal says so"


@needs_root
def test_nor_does_one_of_another_user_lift_those_of_root(path, caplog):
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    put_journal(path, owner=OTHER)
    assert is_left(path, caplog, f"it belongs to user {OTHER}")


@pytest.mark.parametrize(
    ("mode", "state_mode", "words"),
    [
        (0o620, 0o600, "its mode is 0o620, so others may write to it"),
        (0o602, 0o600, "its mode is 0o602, so others may write to it"),
        (0o640, 0o600, "its mode is 0o640, laxer than the 0o600 of the state file"),
        (0o604, 0o640, "its mode is 0o604, laxer than the 0o640 of the state file"),
    ],
)
def test_a_journal_of_laxer_mode_is_left(tmp_path, caplog, mode, state_mode, words):
    path = str(tmp_path / "quota.state")
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    os.chmod(path, state_mode)
    put_journal(path, mode=mode)
    assert is_left(path, caplog, words)


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_not_followed_to_a_journal(tmp_path, caplog, exists):
    path = str(tmp_path / "quota.state")
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    if exists:
        put_journal(str(tmp_path / "elsewhere"))
    os.symlink(tmp_path / "elsewhere.adjusting", path + ".adjusting")
    assert is_left(path, caplog, "it is a symbolic link")
    assert (tmp_path / "elsewhere.adjusting").exists() == exists


def test_a_sparse_journal_of_3_gb_costs_no_memory(tmp_path, caplog):
    path = str(tmp_path / "quota.state")
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    put_journal(path)
    os.truncate(path + ".adjusting", 3 << 30)
    program = """
        import resource, sys
        from modelquota import ResourceQuotaManager
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        ResourceQuotaManager(path=sys.argv[1])
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss has the parent's, too
        print(int(status["VmHWM"].split()[0]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200_000, "KB"
    assert is_left(path, caplog, "it has 3221225472 bytes, more than the 16384")


@pytest.mark.parametrize("opening", ["[", '{"":', '{"version": 1, "models": '])
def test_a_journal_that_is_deep_and_not_long_is_left(tmp_path, caplog, opening):
    path = str(tmp_path / "quota.state")
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    put_journal(path)
    with open(path + ".adjusting", "w", encoding="utf-8") as file:
        file.write((opening * 10_000)[:16_000])
    assert is_left(path, caplog, path)


def test_the_largest_journal_of_many_models_is_not_too_large(tmp_path):
    """Ids that take most room in JSON, and values that do."""
    path = str(tmp_path / "quota.state")
    manager = ResourceQuotaManager(path=path, max_models=8)
    names = ["\x01" * 254 + str(number) for number in range(8)]
    fields = [field for field in ResourceQuotaConfig.__dataclass_fields__ if field.startswith(("max_", "burst_"))]
    rates = {field: 1.2345678901234567e15 + 0.3 for field in fields if field.endswith("_per_second")}
    counts = {field: 2**61 - 1 for field in fields if field not in rates}
    for name in names:
        manager.set_quota(name, **rates, **counts, on_violation="throttle")
    with LoadAdjuster(
        manager, lambda: 0.9, fields=fields, step=0.1234567, floor=0.1, min_interval_sec=0, tightened_action="queue"
    ) as adjuster:
        adjuster.poll()
        entries = adjuster._entries({name: CONFIGURED.replace(model_id=name) for name in names})
        assert len(json.dumps({"version": 1, "models": entries})) / len(names) > 2_000
        again = ResourceQuotaManager(path=path)  # beside a living adjuster
        with open(path + ".adjusting", "rb") as file:
            content = file.read()
    with open(path + ".adjusting", "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    again = ResourceQuotaManager(path=path)
    assert not os.path.exists(path + ".adjusting")
    assert again.list_models() == names


# -- links to a state file


def test_a_dangling_link_is_an_error_and_no_loop(tmp_path):
    path = tmp_path / "quota.state"
    path.symlink_to("nowhere")
    with pytest.raises(StateFileError, match="it is a symbolic link to nowhere, which does not exist; remove the link"):
        ResourceQuotaManager(path=path)
    assert os.listdir(tmp_path) == ["quota.state"]
    path.unlink()
    path.symlink_to("quota.state")
    with pytest.raises(OSError, match="Too many levels"):
        ResourceQuotaManager(path=path)


def test_a_link_to_a_file_and_through_a_folder_is_followed(tmp_path):
    path = tmp_path / "quota.state"
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    (tmp_path / "link").symlink_to("quota.state")
    (tmp_path / "folder").symlink_to(".")
    for name in ("link", "folder/quota.state", "folder/new.state"):
        ResourceQuotaManager(path=tmp_path / name).set_quota(CONFIGURED)
    assert (tmp_path / "new.state").is_file()


@pytest.mark.parametrize("how", ["always there when it is made", "always gone when it is opened"])
def test_a_file_that_comes_and_goes_is_an_error_and_no_loop(tmp_path, monkeypatch, how):
    path = str(tmp_path / "quota.state")
    link = os.link

    def never(source, target):
        raise FileExistsError(17, "File exists", target)

    def at_once(source, target):
        link(source, target)
        os.unlink(target)

    monkeypatch.setattr(os, "link", never if how.endswith("made") else at_once)
    with pytest.raises(StateFileError, match="it was made and removed again 20 times"):
        ResourceQuotaManager(path=path, max_models=8)
    assert os.listdir(tmp_path) == []
