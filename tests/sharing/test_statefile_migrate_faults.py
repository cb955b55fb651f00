"""A migration that cannot be done, or is interrupted, leaves the old file: never two states, and never none."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import struct
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from samples import SAMPLES, OldParts, answers_of, content_of, parts_of, unpack_sample

from modelquota import ManualClock, ResourceQuotaManager, StateFileError
from modelquota.cli import main
from modelquota.statefile import migrate
from modelquota.statefile.inspect import inspect_file, verify_file
from modelquota.statefile.migrate import migrate_file

CONTENT = content_of("layout4")


@pytest.fixture
def old(path):
    return unpack_sample("layout4", path)


def assert_refused(path, message, **options):
    """Nothing has changed, and nothing was left beside it."""
    before, beside = path.read_bytes(), sorted(path.parent.iterdir())
    with pytest.raises(StateFileError, match=message):
        migrate_file(path, **options)
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == beside


def assert_taken_over(path):
    assert verify_file(path) == []
    manager = ResourceQuotaManager(path=path, clock=ManualClock(answers_of("layout4")["end_ns"]))
    assert manager.get_usage("everything").tokens_this_day == 121_412
    manager.close()


# -- what it does, and what it says


@pytest.mark.parametrize("version", [3, 4, 5])
def test_opening_an_old_file_names_the_command(path, version, capsys):
    old = unpack_sample(f"layout{version}", path)
    before = old.read_bytes()
    message = rf"it has layout {version}, and this modelquota uses 6: .* by: modelquota migrate {path}"
    for use in (
        lambda: ResourceQuotaManager(path=path),
        lambda: ResourceQuotaManager.open_readonly(path),
        lambda: inspect_file(path),
    ):
        with pytest.raises(StateFileError, match=message):
            use()
    assert main(["status", "--path", str(path)]) == 2
    assert f"modelquota migrate {path}" in capsys.readouterr().err
    assert old.read_bytes() == before


def test_the_command(old, path, capsys):
    assert main(["migrate", str(path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"{path}: layout 4 is now layout 6",
        "14 models with limits; the windows of a day have 4,848 requests and 1,112,840 tokens",
        "2 grants and waiting requests of dead processes were given back",
        f"old file: {path}.layout4",
    ]
    kept = path.with_name(f"{path.name}.layout4")
    assert kept.read_bytes() == CONTENT
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, kept.name}
    assert_taken_over(path)
    assert main(["migrate", str(path)]) == 2
    assert "it already has layout 6, that of this modelquota" in capsys.readouterr().err


def test_the_command_without_keeping_the_old_file(old, path, capsys):
    assert main(["migrate", str(path), "--discard", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {
        "path": str(path), "old_version": 4, "version": 6, "models": 14, "requests": 4_848, "tokens": 1_112_840,
        "released": 2, "old_file": None,
    }  # fmt: skip
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert_taken_over(path)


def test_a_link_stays_a_link(old, path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    assert migrate_file(link).old_file == f"{path}.layout4"
    assert link.is_symlink()
    assert_taken_over(link)


# -- what is refused


def hold(path, seat, kind):
    """Lock a seat's byte, as a process of the old version does."""
    descriptor = os.open(path, os.O_RDWR)
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack("@hhqqi4x", kind, os.SEEK_SET, seat, 1, 0))
    return descriptor


@pytest.mark.parametrize(
    ("seats", "kind", "message"),
    [
        ([1], fcntl.F_WRLCK, "1 process uses it now: end every process that has it open"),
        ([1, 900], fcntl.F_WRLCK, "2 processes use it now"),
        ([1023], fcntl.F_RDLCK, "a process has it locked now"),
    ],
)
@pytest.mark.parametrize("version", [3, 4, 5])
def test_a_file_in_use(path, seats, kind, message, version):
    parts = parts_of(f"layout{version}")
    parts.header["seats_used"] = 950
    parts.write(path)
    held = [hold(path, seat, kind) for seat in seats]
    assert_refused(path, message)
    for descriptor in held:
        os.close(descriptor)
    assert migrate_file(path).models == (17 if version == 5 else 14)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("version", 2, "it has layout 2, and layouts 3, 4 and 5 can be taken over: start a new file"),
        ("version", 3, "its layout is not the released layout 3"),
        ("version", 7, "it has layout 7, and this modelquota knows 6: use the newer modelquota that wrote it"),
        ("fingerprint", 1, "its layout is not the released layout 4: a modelquota built for another machine"),
        ("magic", 1, "it is not a state file of modelquota"),
        ("max_models", 25, "bytes long and should be"),
        ("max_models", 0, "max_models is 0"),
        ("row_count", 25, "row_count is 25; it may be 24 at most"),
        ("row_count", 3, "damaged: row 3: it was used, but row_count is 3"),
        ("names_used", 20, "damaged: row 1: its name is outside the region of names"),
        ("clock_kind", 3, "clock_kind is 3, which is unknown"),
        ("staged_row", 24, "staged_row is 24; it may be 23 at most"),
        ("anchor_ns", 2**62, r"anchor_ns is 4611686018427387904; 2\*\*61 ns is the most"),
    ],
)
def test_a_header_that_is_wrong(path, field, value, message):
    parts = OldParts(4, CONTENT)
    parts.header[field] = value
    assert_refused(parts.write(path), message)


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("ledgers", "filled", 61, "row 0: a window has too many slots"),
        ("ledgers", "action", 4, "row 0: its action is unknown"),
        ("ledgers", "stage", 1, "row 0: a change is unfinished"),
        ("ledgers", "name_size", 0, "row 0: its name is outside the region of names"),
        ("ledgers", "tokens", 1, "row 0: the tokens of window 0 are not the sum of its slots"),
        ("ledgers", "max_ram_mb", -1, "the limits of 'everything' are not accepted: max_ram_mb=-1"),
        ("ledgers", "requests_per_second", float("nan"), "the limits of 'everything' are not accepted"),
        ("ledgers", "peak_ram_mb", -1, "row 0: peak_ram_mb is not a count"),
        ("ledgers", "tokens_mark", 5, "row 0: the tokens of window 0 are not a count"),
        ("ledgers", "token_limit", 7, "row 0: its token_room disagrees with its limits"),
        ("rows", "slot_end_ns", 7, "row 0: its slot_end_ns is not the end of a slot"),
        ("rows", "shadow", 1 << 10, "the limits of 'everything' are not accepted: limit 10 in its shadow limits"),
        ("rows", "request_shift", 96, "row 0: its request_shift is unknown"),
    ],
)
def test_a_model_that_is_damaged(path, part, field, value, message):
    parts = OldParts(4, CONTENT)
    getattr(parts, part)[field][0] = value
    assert_refused(parts.write(path), message)


def test_a_name_used_twice(path):
    parts = OldParts(4, CONTENT)
    for field in ("name_offset", "name_size"):
        parts.ledgers[field][1] = parts.ledgers[field][0]
    assert_refused(parts.write(path), "row 1: it has no name, or one used before")


def test_what_is_no_state_file(path, tmp_path):
    path.touch(0o600)
    for content in (b"", b"hello", CONTENT[:100_000], CONTENT[:-4096], bytes(8192)):
        path.write_bytes(content)
        assert_refused(path, "cannot be used")
    with pytest.raises(IsADirectoryError):
        migrate_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        migrate_file(tmp_path / "none")


def test_a_file_that_others_may_write_to(old, path):
    path.chmod(0o666)
    assert_refused(path, "its mode is 0o666, so others may write to it")
    assert migrate_file(path, trust_file=True).models == 14
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_file_where_the_old_one_would_be_kept(old, path):
    kept = path.with_name(f"{path.name}.layout4")
    kept.write_text("mine")
    assert_refused(path, "which would keep the old file, exists: move it away, or do not keep the old file")
    assert migrate_file(path, keep=False).models == 14
    assert kept.read_text() == "mine"


def leaves(dtype, offset=0):
    """Offset and size of every number in a struct, a few of each array."""
    if dtype.subdtype is not None:
        base, _ = dtype.subdtype
        count = dtype.itemsize // base.itemsize
        return [leaf for at in sorted({0, 1, count - 1}) for leaf in leaves(base, offset + at * base.itemsize)]
    if dtype.fields is None:
        return [(offset, dtype.itemsize)]
    return [leaf for name in dtype.names for leaf in leaves(dtype.fields[name][0], offset + dtype.fields[name][1])]


def places(name):
    """Every field of the header and of some models of a sample: its offset and size."""
    parts = parts_of(name)
    layout = parts.layout
    rows, ledgers, *_ = layout.places(parts.models)
    return [
        *leaves(layout.header),
        *(leaf for row in (0, 1, 7) for leaf in leaves(layout.row, rows + row * layout.row.itemsize)),
        *(leaf for row in (0, 1, 7) for leaf in leaves(layout.ledger, ledgers + row * layout.ledger.itemsize)),
    ]


VALUES = st.sampled_from([0, 1, 7, 60, 61, 255, 2**31, 2**32 - 1, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1])


CHANGED = st.sampled_from(SAMPLES).flatmap(
    lambda name: st.tuples(
        st.just(name),
        st.lists(st.tuples(st.sampled_from(places(name)), VALUES | st.integers(0, 2**64 - 1)), min_size=1, max_size=3),
    )
)


@given(changed=CHANGED)
def test_whatever_is_in_the_file_it_is_refused_or_taken_over(changed, tmp_path_factory):
    name, changes = changed
    path = unpack_sample(name, tmp_path_factory.mktemp("fuzz") / "quota.state")
    with open(path, "r+b") as file:
        for (offset, size), value in changes:
            file.seek(offset)
            file.write((value % 2 ** (8 * size)).to_bytes(size, "little"))
    before = path.stat()
    try:
        migrate_file(path, keep=False)
    except StateFileError:
        assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    else:
        assert verify_file(path) == []
        inspect_file(path)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    path.unlink()


# -- interrupted

STEPS = (
    *("create_draft", "new_header", "Taker", "validate", "verify_file"),
    *("os.ftruncate", "os.fsync", "os.link", "os.replace"),
)


def migrate_on_a_full_disk(path, monkeypatch, step):
    """Migrate while one step finds no space, and see that error come out."""
    where, _, name = step.rpartition(".")

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(getattr(migrate, where) if where else migrate, name, fail)
    with pytest.raises(OSError, match="No space left"):
        migrate_file(path)
    monkeypatch.undo()


@pytest.mark.parametrize("step", ["carry", "create_draft", "validate", "verify_file", "os.fsync", "os.replace"])
def test_an_error_at_any_step_leaves_a_file_that_is_copied(path, monkeypatch, step):
    before = unpack_sample("layout5", path).read_bytes()
    migrate_on_a_full_disk(path, monkeypatch, step)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir() if "layout" not in entry.name] == [path.name]
    assert migrate_file(path).models == 17
    assert verify_file(path) == []


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("ledgers", "filled", 61, "row 0: a window has too many slots"),
        ("ledgers", "tokens_mark", 5, "row 0: the tokens of window 0 are not a count"),
        ("ledgers", "ring_offset", 7, "row 0: its ring_offset is not where its rings are"),
        ("rows", "request_shift", 96, "row 0: its request rate has an unknown unit"),
        ("rows", "trail", 5, "row 0: its trail has too many slots"),
    ],
)
def test_a_model_of_a_file_that_is_copied_is_damaged(path, part, field, value, message):
    parts = parts_of("layout5")
    getattr(parts, part)[field][0] = value
    assert_refused(parts.write(path), message)


@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_step_leaves_the_old_file(old, path, monkeypatch, step):
    migrate_on_a_full_disk(path, monkeypatch, step)
    assert path.read_bytes() == CONTENT
    assert migrate_file(path).models == 14
    assert_taken_over(path)


KILLED = """
import os, signal, sys
from modelquota.statefile import migrate, taker
path, left = sys.argv[1], int(sys.argv[2])

def mortal(function):
    def call(*args, **kwargs):
        global left
        for after in (False, True):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if not after:
                result = function(*args, **kwargs)
        return result
    return call

for name in ("create_draft", "validate", "verify_file", "remove_dead_drafts", "release"):
    setattr(migrate, name, mortal(getattr(migrate, name)))
for name in ("take", "put_header", "close", "_register"):
    setattr(taker.Taker, name, mortal(getattr(taker.Taker, name)))
for name in ("ftruncate", "pwrite", "fsync", "link", "replace"):
    setattr(os, name, mortal(getattr(os, name)))
migrate.migrate_file(path)
"""


def test_killed_between_any_two_steps_there_is_the_old_file_or_the_new_one(path):
    """Before and after each step that touches a file, and of the models, which are many, at some of them."""
    moments = taken = 0
    left = 0
    while True:
        unpack_sample("layout4", path)
        path.with_name(f"{path.name}.layout4").unlink(missing_ok=True)
        killed = subprocess.run([sys.executable, "-c", KILLED, path, str(left)], timeout=60, check=False)
        if killed.returncode == 0:
            break
        assert killed.returncode == -signal.SIGKILL
        moments += 1
        if path.read_bytes() == CONTENT:
            assert not taken
            assert migrate_file(path).models == 14
        else:
            taken += 1
        assert_taken_over(path)
        assert path.with_name(f"{path.name}.layout4").read_bytes() == CONTENT
        # opening it has removed what the dead process had begun
        assert {entry.name for entry in path.parent.iterdir()} == {path.name, f"{path.name}.layout4"}
        left += 9 if 8 < left < 40 else 1
    assert moments > 20
    assert taken >= 2


def test_of_several_at_once_one_does_it(old, path):
    outcomes = []

    def run():
        try:
            outcomes.append(migrate_file(path).models)
        except StateFileError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(14) == 1
    reasons = ("use it now", "uses it now", "has it locked", "was replaced", "already has layout 6")
    assert all(any(reason in outcome for reason in reasons) for outcome in outcomes if outcome != 14)
    assert path.with_name(f"{path.name}.layout4").read_bytes() == CONTENT
    assert_taken_over(path)


def test_a_file_that_was_replaced_in_between_is_not_taken_over(old, path, tmp_path, monkeypatch):
    """Another migration may end after the file was opened and before it was locked."""
    other = unpack_sample("layout4", tmp_path / "other")
    real = migrate.OldFile

    def replaced(*args):
        if other.exists():
            os.replace(other, path)
        return real(*args)

    monkeypatch.setattr(migrate, "OldFile", replaced)
    with pytest.raises(StateFileError, match="it was replaced while it was being opened"):
        migrate_file(path)
    assert path.read_bytes() == CONTENT
