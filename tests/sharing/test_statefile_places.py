"""Where a state file may be: long names, names in bytes, no /proc; and what becomes of it while it is open."""

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from modelquota import ResourceQuotaConfig, ResourceQuotaManager, StateFileError
from modelquota._core.state import mapping
from modelquota._core.state.beside import beside, journal_of
from modelquota._core.state.file import loss_of
from modelquota.control.load import LoadAdjuster
from modelquota.statefile.inspect import inspect_file, verify_file

CONFIGURED = ResourceQuotaConfig("m", max_ram_mb=1000, on_violation="reject")

# -- names


@pytest.mark.parametrize(
    "name",
    ["n" * 230, "n" * 240, "n" * 245, "n" * 246, "n" * 255, "\N{SNOWMAN}" * 80, "\N{SNOWMAN}" * 85, b"\xff" * 240],
    ids=["230", "240", "245", "246", "255", "240 in 80 characters", "255 in 85 characters", "no UTF-8"],
)
def test_a_name_as_long_as_the_file_system_takes(tmp_path, name):
    path = os.path.join(os.fsencode(tmp_path), os.fsencode(name))
    manager = ResourceQuotaManager(path=path, max_models=8)
    manager.set_quota(CONFIGURED)
    adjuster = LoadAdjuster(manager, lambda: 0.9, min_interval_sec=0)
    adjuster.poll()
    assert len(os.listdir(tmp_path)) == 2
    journal = journal_of(os.fsdecode(path))
    with open(journal, "rb") as file:
        content = file.read()
    adjuster.undo()
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]
    # as an adjuster leaves it that was killed, with a draft beside it
    manager.update_quota("m", max_ram_mb=800)
    with open(journal, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    for kind in (os.fsdecode(path), journal):
        with open(beside(kind, ".0123456789abcdef.new"), "x"):
            pass
    assert ResourceQuotaManager(path=path).get_quota("m").max_ram_mb == 1000
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(name)]


def test_names_that_are_cut_off_at_the_same_place_are_told_apart(tmp_path):
    paths = [str(tmp_path / ("n" * 254 + end)) for end in "ab"]
    assert len({journal_of(path) for path in paths}) == 2
    assert len({beside(path, ".0123456789abcdef.new") for path in paths}) == 2
    assert journal_of(str(tmp_path / "short")) == str(tmp_path / "short.adjusting")


@pytest.mark.parametrize("longest", [-1, 5])
def test_a_file_system_of_another_mind_about_names_is_no_loop(tmp_path, monkeypatch, longest):
    monkeypatch.setattr(os, "pathconf", lambda path, name: longest)
    path = str(tmp_path / "quota.state")
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    assert ResourceQuotaManager(path=path).get_quota("m") == CONFIGURED
    assert os.listdir(tmp_path) == ["quota.state"]


def test_a_name_that_is_too_long_is_named_in_the_error(tmp_path):
    with pytest.raises(OSError, match="File name too long") as error:
        ResourceQuotaManager(path=tmp_path / ("n" * 256))
    assert error.value.filename == str(tmp_path / ("n" * 256))


def test_a_path_in_bytes_is_a_path(tmp_path):
    path = os.fsencode(tmp_path / "quota.state")
    manager = ResourceQuotaManager(path=path, max_models=8)
    manager.set_quota(CONFIGURED)
    assert manager.path == os.fsdecode(path)
    with ResourceQuotaManager.open_readonly(path) as view:
        assert view.get_quota("m") == CONFIGURED
    assert inspect_file(path).path == os.fsdecode(path)
    assert verify_file(path) == []
    with pytest.raises(StateFileError, match="quota.state cannot be used"):
        ResourceQuotaManager(path=path, max_models=9)
    assert str(StateFileError(b"quota.state", "no")) == "quota.state cannot be used: no"
    with pytest.raises(TypeError):
        ResourceQuotaManager(path=5)


# -- no /proc

WITHOUT_PROC = [
    "unshare",
    "--user",
    "--map-root-user",
    "--mount",
    "sh",
    "-c",
    'mount -t tmpfs none /proc && exec "$@"',
    "sh",
]
OPEN = """
    import os, sys
    from modelquota import ResourceQuotaManager, StateFileError
    for how in ({"path": sys.argv[1]}, {}):
        try:
            ResourceQuotaManager(max_models=8, **how)
        except StateFileError as error:
            print(error)
    print(os.listdir(os.path.dirname(sys.argv[1])))
"""


def test_without_proc_the_error_says_so(tmp_path):
    try:
        possible = subprocess.run([*WITHOUT_PROC, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs unshare and a kernel that lets users mount")
    command = [*WITHOUT_PROC, sys.executable, "-c", textwrap.dedent(OPEN), str(tmp_path / "quota.state")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *errors, left = done.stdout.splitlines()
    message = "modelquota needs the /proc file system, and it is not mounted here; mount it"
    assert errors == [f"/proc/sys/kernel/random/boot_id cannot be used: {message}"] * 2
    assert left == "[]"


@pytest.fixture
def without_proc(monkeypatch):
    real = os.open

    def fail(path, *args, **kwargs):
        if os.fspath(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(mapping.os, "open", fail)


@pytest.fixture
def opened(tmp_path):
    path = str(tmp_path / "quota.state")
    ResourceQuotaManager(path=path, max_models=8).set_quota(CONFIGURED)
    descriptor = os.open(path, os.O_RDWR)
    yield path, descriptor
    os.close(descriptor)


def test_a_file_is_opened_again_by_its_path_if_it_is_still_that_file(opened, without_proc):
    path, descriptor = opened
    again = mapping.open_again(descriptor, path)
    assert os.path.samestat(os.fstat(again), os.fstat(descriptor))
    os.close(again)
    with pytest.raises(StateFileError, match=f"/proc/self/fd/{descriptor} cannot be used: modelquota needs the /proc"):
        mapping.open_again(descriptor)
    os.rename(path, path + ".old")
    shutil.copy(path + ".old", path)
    with pytest.raises(StateFileError, match="modelquota needs the /proc"):
        mapping.open_again(descriptor, path)


# -- what becomes of an open file


def test_an_open_file_that_is_as_it_was(opened, tmp_path):
    path, descriptor = opened
    size = os.stat(path).st_size
    assert loss_of(descriptor, path, size) is None
    (tmp_path / "link").symlink_to("quota.state")
    assert loss_of(descriptor, str(tmp_path / "link"), size) is None
    os.link(path, tmp_path / "other name")
    os.chmod(path, 0o400)
    assert loss_of(descriptor, path, size) is None


def shorten(path):
    os.truncate(path, 4096)


def lengthen(path):
    os.truncate(path, os.stat(path).st_size + 1)


def replace(path):
    shutil.copy(path, path + ".copy")
    os.replace(path + ".copy", path)


def remove_folder(path):
    os.rename(os.path.dirname(path), os.path.dirname(path) + ".old")


def folder_to_file(path):
    remove_folder(path)
    with open(os.path.dirname(path), "x"):
        pass


def link_elsewhere(path):
    shutil.copy(path, path + ".copy")
    os.unlink(path)
    os.symlink(path + ".copy", path)


@pytest.mark.parametrize(
    ("happens", "words"),
    [
        (shorten, "it was cut off to 4096 bytes, and should have "),
        (lengthen, "it was lengthened to "),
        (os.unlink, "it was deleted or moved away: processes that open it from now on do not share its limits"),
        (lambda path: os.rename(path, path + ".old"), "it was deleted or moved away"),
        (remove_folder, "it was deleted or moved away"),
        (folder_to_file, "it was deleted or moved away"),
        (replace, "it was replaced by another file: processes that open it from now on do not share its limits"),
        (link_elsewhere, "it was replaced by another file"),
        (lambda path: os.unlink(path) or os.mkdir(path), "it was replaced by another file"),
    ],
    ids=range(9),
)
def test_what_happened_to_an_open_file_is_said(tmp_path, happens, words):
    (tmp_path / "folder").mkdir()
    path = str(tmp_path / "folder" / "quota.state")
    ResourceQuotaManager(path=path, max_models=8)
    descriptor = os.open(path, os.O_RDWR)
    size = os.fstat(descriptor).st_size
    happens(path)
    try:
        assert loss_of(descriptor, path, size).startswith(words)
    finally:
        os.close(descriptor)


def test_a_descriptor_that_was_closed_underneath(opened):
    path, descriptor = opened
    size, closed = os.stat(path).st_size, os.dup(descriptor)
    os.close(closed)
    assert loss_of(closed, path, size) == "its descriptor was closed underneath (Bad file descriptor)"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give its rights up")
def test_rights_that_were_given_up_are_no_loss(opened, tmp_path):
    path, descriptor = opened
    size = os.stat(path).st_size
    tmp_path.chmod(0o700)
    child = os.fork()
    if child == 0:
        os.setuid(65_534)
        os._exit(0 if loss_of(descriptor, path, size) is None and loss_of(descriptor, path, size + 1) else 1)
    assert os.waitpid(child, 0)[1] == 0
