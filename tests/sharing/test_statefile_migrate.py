"""State files of earlier layouts are taken over with everything that was used.

The samples in ``tests/sharing/data`` were made by ``tests/support/old_state.py`` with the sources of the version that
had the layout: 3 by commit b35c9a7, 4 by commit 883012b, 5 by commit 4b4cce3. Each is a file as a killed process has
left it, and what that version itself then read in it and decided, at 13 times from the same moment to 28 hours later.
All windows are in use, and in that of layout 5 meters and weights of tokens; there are refunds, rates that were set to
None and set since, levels above their rate, memory and its peaks, limits of 0, shadow limits, a model that was removed,
two that were registered on sight, an open grant and a request that waits. In those named ``-killed`` four models were
in the middle of a change, under the lock of the dead process.

When the layout changes, the old one is added to ``statefile/layouts.py`` and a sample of it here.
"""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import old_state
import pytest
from factories import open_quota
from old_state import BEGIN_NS, DEAD, LONGEST_ID, MAX_MODELS, ask, live, on_sight
from samples import SAMPLES, answers_of, multiplied, parts_of, unpack_sample
from soundness import assert_sound, record_of

from modelquota import CapacityError, ManualClock, ResourceQuotaManager
from modelquota._core.state.state import CONSTANTS
from modelquota._core.state.validate import OLDEST_MIGRATED
from modelquota.statefile.inspect import inspect_file, verify_file
from modelquota.statefile.layouts import OLD_LAYOUTS
from modelquota.statefile.migrate import migrate_file

# What some models had used when the sample was taken, as the version that wrote it said:
# requests and tokens of the second, the hour and the day; requests and tokens ahead of the rate.
USED = {
    "everything": (9, 126, 525, 854, 27_323, 121_412, 2, 287),
    "overdrawn": (0, 117, 516, 0, 27_123, 121_830, 0, 0),
    "queue": (1, 1, 1, 17, 17, 17, 0, 0),
    "refunds": (1, 119, 518, 300, 28_590, 122_955, 0, 673),
    "rate since": (3, 120, 519, 111, 29_022, 124_005, 0, 7),
    "no rate now": (40, 157, 556, 9_460, 37_324, 133_438, 0, 0),
    "sight/one": (3, 35, 330, 156, 2_974, 61_599, 1, 0),
    "idle": (0, 0, 0, 0, 0, 0, 0, 0),
    LONGEST_ID: (0, 77, 476, 0, 19_011, 114_270, 0, 0),
}
ALLOWED = {"layout3": 4_972, "layout4": 4_972, "layout5": 6_532}  # requests, those of meters included
USED_FIELDS = [
    *(f"{what}_this_{window}" for what in ("requests", "tokens") for window in ("second", "hour", "day")),
    "burst_requests_used",
    "burst_tokens_used",
]


def opened(path, clock, **options):
    return ResourceQuotaManager(path=path, clock=clock, default_quota=on_sight, **options)


def test_every_layout_before_this_one_has_a_description_and_samples():
    assert list(OLD_LAYOUTS) == list(range(OLDEST_MIGRATED, CONSTANTS["version"]))
    assert {int(name[6]) for name in SAMPLES} == set(OLD_LAYOUTS)
    for name in SAMPLES:
        header = parts_of(name).header[0]
        layout = OLD_LAYOUTS[int(name[6])]
        assert (header["version"], header["fingerprint"]) == (layout.version, layout.fingerprint)


@pytest.mark.parametrize("name", SAMPLES)
def test_what_is_read_and_decided_is_what_the_old_version_read_and_decided(name, path):
    done = migrate_file(unpack_sample(name, path))
    assert (done.models, done.released, done.old_version) == (17 if name[6] == "5" else 14, 2, int(name[6]))
    assert verify_file(path) == []
    # the grant, the request that waited, and the models that were being changed
    assert inspect_file(path).recoveries == (6 if name.endswith("killed") else 2)
    expected = answers_of(name)
    clock = ManualClock(expected["end_ns"])
    manager = opened(path, clock)
    answers = ask(manager, clock)
    assert len(answers) == len(expected["answers"]) == 13
    for at, (answer, old_answer) in enumerate(zip(answers, expected["answers"], strict=True)):
        assert answer == old_answer, f"at time {at}"
    for model_id in manager.list_models():
        assert_sound(manager, model_id, [])


@pytest.mark.parametrize("name", ["layout3", "layout4", "layout5"])
def test_the_samples_have_been_used(name, path):
    migrate_file(unpack_sample(name, path))
    manager = opened(path, ManualClock(answers_of(name)["end_ns"]))
    for model_id, used in USED.items():
        usage = manager.get_usage(model_id)
        assert tuple(getattr(usage, field) for field in USED_FIELDS) == used, model_id
    assert manager.get_usage("memory").peak_ssd_mb == 12_345
    assert manager.get_usage("memory").current_ssd_mb == 345
    assert manager.get_usage("refunds").tokens_refunded_total == 667
    assert "removed" not in manager.list_models()
    stats = manager.get_stats()
    assert (stats.allowed_requests, stats.warned_requests, stats.rate_violations) == (ALLOWED[name], 518, 947)
    assert manager.get_quota("overdrawn").shadow_limits == (
        () if name == "layout3" else ("tokens_per_hour", "requests_per_day")
    )


@pytest.mark.parametrize("name", ["layout3", "layout4", "layout5"])
def test_it_is_as_if_this_version_had_been_there_from_the_beginning(name, path, tmp_path):
    migrate_file(unpack_sample(name, path))
    lived, end = tmp_path / "lived.state", tmp_path / "end"
    kind = {"layout3": "no shadows", "layout4": "old"}.get(name, "")
    subprocess.run([sys.executable, old_state.__file__, end, lived, kind], check=True, timeout=60)
    end_ns = int(end.read_text())
    assert end_ns == answers_of(name)["end_ns"]
    both = []
    for file in (lived, path):
        clock = ManualClock(end_ns)
        both.append(ask(opened(file, clock), clock))
    for at, (as_if, migrated) in enumerate(zip(*both, strict=True)):
        if name == "layout3":  # it kept no level of a rate that was set to None, and no tokens of removed models
            for answer in (as_if, migrated):
                del answer["read"]["models"]["no rate now"], answer["decided"]["no rate now"], answer["read"]["stats"]
        assert migrated == as_if, f"at time {at}"


@pytest.mark.parametrize("name", ["layout3", "layout4", "layout5"])
def test_the_rows_are_those_of_a_file_with_that_history(name, path, tmp_path):
    """Byte for byte in what was used: levels, lowest levels, slots, marks and times."""
    migrate_file(unpack_sample(name, path))
    clock = ManualClock(BEGIN_NS)
    lived = ResourceQuotaManager(clock=clock, max_models=MAX_MODELS, default_quota=on_sight)
    held = live(lived, clock, shadows=name != "layout3", meters=name == "layout5")
    migrated = opened(path, ManualClock(clock.now_ns))
    for model_id in sorted({*migrated.list_models()} - {"queue", *(["no rate now"] if name == "layout3" else [])}):
        (row, cold), (lived_row, lived_cold) = record_of(migrated, model_id), record_of(lived, model_id)
        lived.get_usage(model_id)
        for field in ("level_ns", "slot_end_ns", "request_level", "token_level", "request_room", "token_room"):
            assert row[field] == lived_row[field], (model_id, field)
        for field in (
            "requests_mark", "tokens_mark", "requests_base", "tokens_base", "requests_start", "tokens_start", "filled",
            "request_minimum", "token_minimum", "counted", "violations", "rejected", "log_second", "log_held",
            *(("on_sight", "sight_digest") if name != "layout3" else ()),
        ):  # fmt: skip
            assert cold[field] == lived_cold[field], (model_id, field)
        for what in ("requests", "tokens"):
            for window, slots in enumerate(cold[what]):
                kept = cold["filled"][window]
                assert kept == 0 or slots == lived_cold[what][window], (model_id, what, window)
    held[0].release()


@pytest.mark.parametrize("name", ["layout3", "layout4", "layout5"])
def test_the_time_while_nobody_ran_is_aged_off(name, path, tmp_path):
    parts = parts_of(name)
    end_ns = answers_of(name)["end_ns"]
    migrate_file(unpack_sample(name, tmp_path / "other.state"))
    later = opened(tmp_path / "other.state", ManualClock(end_ns + 7_200 * 10**9)).get_usage("everything")
    parts.header["boot_id"] = 7  # before a reboot, two hours ago
    parts.header["anchor_ns"] = end_ns
    parts.header["anchor_wall_ns"] = time.time_ns() - 7_200 * 10**9
    if name != "layout3":
        parts.header["clock_kind"] = 1
    migrate_file(parts.write(path))
    manager = opened(path, None)
    usage = manager.get_usage("everything")
    assert (usage.tokens_this_hour, usage.burst_tokens_used) == (0, 0)
    assert usage.tokens_this_day == later.tokens_this_day < USED["everything"][5]
    assert manager.check_quota("everything", 1)


def test_a_model_registered_on_sight_makes_room_and_one_whose_limits_changed_does_not(path):
    parts = parts_of("layout4")
    changed = parts.row_of("sight/two")
    parts.ledgers["sight_digest"][changed] ^= 12_345  # it was registered with other limits
    migrate_file(parts.write(path))
    clock = ManualClock(answers_of("layout4")["end_ns"] + 10**9 * 3 * 86_400)
    manager = opened(path, clock)
    for number in range(MAX_MODELS - 14 + 1):
        manager.set_quota(open_quota(f"new {number}"))
    with pytest.raises(CapacityError):
        manager.set_quota(open_quota("one too many"))
    assert "sight/two" in manager.list_models()
    assert "sight/one" not in manager.list_models()
    assert len(manager.list_models()) == MAX_MODELS


@pytest.mark.parametrize("name", ["layout3", "layout4"])
def test_a_thousand_models_with_ids_of_every_length(name, path):
    sample = parts_of(name)
    rows = [sample.row_of(model_id) for model_id in ("everything", "no limit", "sight/one", "rate since")]
    names = [f"{number:04}" + "ü" * (number % 126) for number in range(999)] + [LONGEST_ID]
    done = migrate_file(multiplied(sample, rows, names).write(path), keep=False)
    assert done.models == 1_000
    manager = opened(path, ManualClock(answers_of(name)["end_ns"]))
    assert manager.list_models() == names
    for number, model_id in enumerate(names):
        used = (USED["everything"], None, USED["sight/one"], USED["rate since"])[number % 4]
        usage = manager.get_usage(model_id)
        assert used is None or tuple(getattr(usage, field) for field in USED_FIELDS) == used
    assert done.tokens == sum(manager.get_usage(model_id).tokens_this_day for model_id in names)


LARGE = (2**40 + 12_345, 5, 2**27 - 1, 2**27, 2**27 + 1, 2**33 + 2**20 + 1, 0, 3)


def test_counts_that_a_slot_cannot_hold_are_carried_as_they_would_have_been(path):
    """A slot of the second, the minute or the hour now holds 27 bits of a count exactly, and carries the rest on."""
    clock = ManualClock(BEGIN_NS)
    lived = ResourceQuotaManager(clock=clock)
    lived.set_quota(open_quota("no limit"))
    parts = parts_of("layout4")
    row = parts.row_of("no limit")
    for number in set(np.flatnonzero(parts.rows["generation"] % 2)) - {row}:
        parts.rows["generation"][number] = 0
    slots = {}
    for number, tokens in enumerate(LARGE):
        clock.advance(60)
        lived.check_quota("no limit", tokens)
        slots[clock.now_ns // (60 * 10**9)] = tokens
        assert number < 59
    clock.advance(60)
    assert lived.get_usage("no limit").tokens_this_hour == sum(LARGE)
    put_history(parts.rows[row : row + 1], parts.ledgers[row : row + 1], slots, clock.now_ns)
    migrate_file(parts.write(path))
    migrated = opened(path, ManualClock(clock.now_ns))
    for minutes in range(70):
        for step_s in (13, 47):
            old, new = lived.get_usage("no limit"), migrated.get_usage("no limit")
            for field in ("tokens_this_hour", "requests_this_hour", "tokens_this_day", "requests_this_day"):
                assert getattr(old, field) == getattr(new, field), (minutes, field)
            clock.advance(step_s)
            migrated.clock.advance(step_s)
    assert new.tokens_this_hour == 0 < new.tokens_this_day


def put_history(rows, ledgers, slots, now_ns):
    """Let a model, which has no limit, have been used in these minutes, once in each, and not in the last second."""
    rows["level_ns"] = now_ns
    rows["slot_end_ns"] = -(-(now_ns * 3 // 50_000_000 + 1) * 50_000_000 // 3)
    ledgers["filled"] = [0, 60, 0]
    for what, charged in (("token", sum(slots.values())), ("request", len(slots))):
        rows[f"{what}_room"] = 2**62 - charged
        ledgers[f"{what}s_mark"] = 2**62
        ledgers[f"{what}s_base"] = [charged, 0, 0]
        ledgers[f"{what}s_start"] = [charged, charged, 0]
        ledgers[f"{what}s"] = 0
        for minute, tokens in slots.items():
            ledgers[f"{what}s"][:, 1, minute % 60] = tokens if what == "token" else 1


@pytest.mark.parametrize("name", ["layout3", "layout4", "layout5"])
@pytest.mark.parametrize("is_there", [True, False])
def test_a_removal_that_was_under_way_is_undone_if_the_model_is_still_there(name, is_there, path):
    parts = parts_of(name)
    header, row = parts.header, parts.row_of("idle")
    retired = [field for field in header.dtype.names if field.startswith("retired_")]
    before = [header[field][0].tolist() for field in retired]
    header["leaving_row"], header["registry_lock"] = row, DEAD
    header["leaving_generation"] = parts.rows["generation"][row] if is_there else 0
    header["staged_retired"] = [*before[:-1], *before[-1]]
    header["retired_allowed"] += 1_000
    header["retired_violations"] += 7
    migrate_file(parts.write(path))
    stats = opened(path, ManualClock(answers_of(name)["end_ns"])).get_stats()
    assert stats.allowed_requests == ALLOWED[name] + (0 if is_there else 1_000)
    assert stats.rate_violations == 947 + (0 if is_there else 7)


def test_a_model_that_was_added_and_not_yet_counted(path):
    parts = parts_of("layout4")
    parts.header["registry_lock"] = DEAD
    parts.header["row_count"] -= 1
    assert migrate_file(parts.write(path)).models == 14


def test_enforcement_and_the_counts_of_no_model_stay(path):
    parts = parts_of("layout4")
    parts.header["enforcing"], parts.header["unknown_checks"] = 0, 321
    migrate_file(parts.write(path))
    manager = opened(path, ManualClock(answers_of("layout4")["end_ns"]))
    assert not manager.enforcement_enabled
    assert int(manager._arrays()[0]["unknown_checks"][0]) == 321


def test_a_rate_in_another_unit_keeps_what_its_level_holds(path):
    """Of a file whose rates were encoded otherwise, a level is the same count of tokens, rounded up."""
    parts = parts_of("layout4")
    row = parts.row_of("rate since")
    level = parts.rows["token_level"][row]
    whole = int(level["high"]) << 64 | int(level["low"])
    assert parts.rows["token_shift"][row] == 2
    parts.rows["token_shift"][row] = 9
    level["low"], level["high"] = (whole << 7) + 1, 0
    migrate_file(parts.write(path))
    manager = opened(path, ManualClock(answers_of("layout4")["end_ns"]))
    now = record_of(manager, "rate since")[0]
    assert (now["token_shift"], now["token_level"]) == (2, (whole + 1, 0))
