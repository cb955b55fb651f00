"""The state file through the public verbs: shared, lasting, looked at without a trace."""

import json
import os
import stat

import pytest

from modelquota import ManagerClosedError, ManualClock, QuotaExceededError, ResourceQuotaManager, StateFileError
from modelquota.cli import main
from modelquota.statefile.inspect import inspect_file, verify_file

LIMITS = {"max_tokens_per_hour": 1000, "max_tokens_per_second": None, "on_violation": "reject"}


@pytest.fixture
def manager(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", **LIMITS)
    return manager


def test_two_managers_of_one_file_share_one_truth(manager, path):
    other = ResourceQuotaManager(path=path)
    assert other.list_models() == ["m"]
    assert other.get_quota("m") == manager.get_quota("m")
    assert manager.check_quota("m", 600)
    assert not other.check_quota("m", 600)
    other.set_quota("new", max_ram_mb=5)
    assert manager.get_quota("new").max_ram_mb == 5
    manager.update_quota("new", max_ram_mb=6)
    assert other.get_quota("new").max_ram_mb == 6
    assert other.remove_quota("new")
    assert manager.get_quota("new") is None
    assert manager.check_quota("new", 10**9)
    with other.reserve("m", 100, ram_needed_mb=50):
        assert manager.get_usage("m").reserved_ram_mb == 50
    assert manager.get_usage("m").concurrent_requests == 0


def test_a_restart_refills_nothing(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", **LIMITS)
    assert manager.check_quota("m", 900)
    manager.flush()
    del manager
    again = ResourceQuotaManager(path=path)
    assert again.get_usage("m").tokens_this_hour == 900
    with pytest.raises(QuotaExceededError, match="tokens per hour: 900 of 1,000 used, 101 asked"):
        again.reserve("m", 101)


def test_the_file_is_private_and_sparse(manager, path):
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert os.stat(path).st_size > 100e6
    assert os.stat(path).st_blocks * 512 < 200e3
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("contents", [b"", b"hello", b"\0" * 8192, b"mdquota1" + b"\xff" * 8192])
def test_what_is_no_state_file_is_refused_and_left_as_it_was(path, contents):
    path.write_bytes(contents)
    for open_it in (lambda: ResourceQuotaManager(path=path), lambda: ResourceQuotaManager.open_readonly(path)):
        with pytest.raises(StateFileError, match="cannot be used"):
            open_it()
    assert path.read_bytes() == contents


def test_a_file_cut_off_is_refused(manager, path):
    os.truncate(path, os.stat(path).st_size - 4096)
    with pytest.raises(StateFileError, match="it was cut off or added to"):
        ResourceQuotaManager(path=path)


def test_a_sum_that_is_wrong_is_found_and_refused(manager, path):
    assert manager.check_quota("m", 5)
    assert verify_file(path) == []
    _, _, cold_rows = manager._arrays()
    cold_rows["tokens_base"][0, 2] += 1
    assert any("the tokens of window 2 are not the sum of its slots" in fault for fault in verify_file(path))
    with pytest.raises(StateFileError, match="damaged: row 0: the tokens of window 2"):
        ResourceQuotaManager(path=path)
    cold_rows["tokens_base"][0, 2] -= 1
    cold_rows["concurrent"][0] += 1
    assert verify_file(path) == ["row 0: concurrent is 1, but its records add up to 0"]


def test_a_folder_that_is_not_there_is_named_as_it_was_given(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        ResourceQuotaManager(path=tmp_path / "none" / "quota.state")
    assert error.value.filename == str(tmp_path / "none" / "quota.state")


def test_max_models_is_the_file_s(path):
    ResourceQuotaManager(path=path, max_models=10)
    assert ResourceQuotaManager(path=path).max_models == 10
    assert ResourceQuotaManager(path=path, max_models=10).max_models == 10
    with pytest.raises(StateFileError, match="it was made for max_models=10, not 11"):
        ResourceQuotaManager(path=path, max_models=11)


def test_a_view_reads_the_same_and_changes_nothing(path):
    manager = ResourceQuotaManager(path=path, max_models=100)
    manager.set_quota("m", **LIMITS)
    manager.set_quota("other", **LIMITS)
    manager.remove_quota("other")
    manager.check_quota("m", 300)
    manager.check_quota("m", 3000)
    manager.check_quota("nobody", 1)
    manager.update_memory_usage("m", 7, 8)
    os.chmod(path, 0o400)
    with ResourceQuotaManager.open_readonly(path) as view:
        assert view.list_models() == ["m"]
        assert view.get_quota("m") == manager.get_quota("m")
        assert view.get_usage("m") == manager.get_usage("m")
        assert view.get_model_report("m") == manager.get_model_report("m")
        assert view.get_stats() == manager.get_stats()
        assert view.snapshot().tolist() == manager.snapshot().tolist()
        assert (view.enforcement_enabled, view.max_models) == (True, manager.max_models)
        assert view.get_usage("nobody") is view.get_quota("nobody") is None
        assert not hasattr(view, "check_quota")
        before = path.read_bytes()
        view.get_stats()
        view.snapshot()
        assert path.read_bytes() == before
        manager.set_quota("late", **LIMITS)
        assert view.list_models() == ["m", "late"]
        manager.remove_quota("late")
    with pytest.raises(ManagerClosedError, match="the view is closed"):
        view.list_models()
    with pytest.raises(FileNotFoundError):
        ResourceQuotaManager.open_readonly(path.with_name("none"))


def test_time_goes_on_over_a_reboot_but_never_back(path, monkeypatch):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota("m", **LIMITS)
    assert manager.check_quota("m", 900)
    manager.flush()
    header = manager._arrays()[0]

    def reboot(wall_seconds_ago):
        header["boot_id"] = 7
        header["anchor_wall_ns"] -= int(wall_seconds_ago * 1e9)
        return ResourceQuotaManager(path=path)

    assert reboot(-3600).get_usage("m").tokens_this_hour == 900  # the wall clock has gone back an hour
    assert reboot(1800).get_usage("m").tokens_this_hour == 900
    again = reboot(1900)
    assert again.get_usage("m").tokens_this_hour == 0
    assert again.get_usage("m").tokens_this_day == 900
    with ResourceQuotaManager.open_readonly(path) as view:
        assert view.get_usage("m").tokens_this_day == 900


def test_the_terminal_shows_and_steers_a_file(manager, path, capsys):
    manager.check_quota("m", 950)
    assert main(["status", "--path", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["usage"]["tokens_this_hour"] == 950
    assert main(["status", "--path", str(path), "--above", "90"]) == 1
    assert main(["set", "m", "max_tokens_per_hour=2000", "--path", str(path)]) == 0
    assert manager.get_quota("m").max_tokens_per_hour == 2000
    assert main(["reset-burst", "m", "--path", str(path)]) == 0
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert "1 of 65,536" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["processes"] == 1
    assert main(["verify", str(path)]) == 0
    assert capsys.readouterr().out == "ok: 1 model, all sums agree\n"
    manager._arrays()[2]["waiting"][0] = 3
    assert main(["verify", str(path), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["faults"]) == 2
    manager._arrays()[2]["waiting"][0] = 0
    assert main(["remove", "m", "--path", str(path)]) == 0
    assert manager.list_models() == []
    assert main(["remove", "m", "--path", str(path)]) == 1
    assert main(["verify", str(path.with_name("none"))]) == 2
    assert "No such file" in capsys.readouterr().err
    assert main(["set", "m", "--path", str(path.with_name("none"))]) == 2
    assert not path.with_name("none").exists()


def test_facts_about_a_file(manager, path):
    with manager.reserve("m", 1):
        info = inspect_file(path)
        assert (info.models, info.max_models, info.open_grants, info.waiting_requests) == (1, 65_536, 1, 0)
        assert info.processes == 1
    assert inspect_file(path).open_grants == 0


def test_a_clock_of_one_s_own_goes_with_a_file(path):
    clock = ManualClock(5)
    manager = ResourceQuotaManager(path=path, clock=clock)
    manager.set_quota("m", **LIMITS)
    assert manager.check_quota("m", 1000)
    clock.advance(3700)
    assert manager.check_quota("m", 1000)
