"""Dynamic adjustment: relative to what was configured, within bounds, and undone in every way out."""

import subprocess
import sys
import textwrap
import threading

import pytest

from modelquota import ResourceQuotaConfig, ViolationAction
from modelquota.control.load import Adjustment, LoadAdjuster, cpu_load

QUOTAS = [ResourceQuotaConfig("m", max_ram_mb=1000, max_requests_per_second=50.0, on_violation="reject")]


class Rig:
    """An adjuster with a load and a clock to set."""

    def __init__(self, manager, **settings):
        self.manager, self.load, self.now, self.changes = manager, 0.5, 0.0, []
        self.adjuster = LoadAdjuster(
            manager,
            lambda: self.load,
            **{"min_interval_sec": 0, "on_change": self.changes.append, "monotonic": lambda: self.now, **settings},
        )

    def at(self, load):
        """Poll once at a load; RAM and requests/s of the model."""
        self.load = load
        self.adjuster.poll()
        quota = self.manager.get_quota("m")
        return quota.max_ram_mb, quota.max_requests_per_second


def test_a_busy_machine_tightens_by_a_fifth_and_no_more(manager):
    rig = Rig(manager)
    assert rig.at(0.8) == (1000, 50)
    for _ in range(5):
        assert rig.at(0.81) == (800, 40)
    assert rig.changes == [Adjustment(0.81, 1.0, 0.8)]


def test_an_idle_machine_relaxes_by_a_fifth_and_no_more(manager):
    rig = Rig(manager)
    assert rig.at(0.3) == (1000, 50)
    for _ in range(5):
        assert rig.at(0.29) == (1200, 60)


def test_the_way_back_needs_the_load_to_come_back(manager):
    rig = Rig(manager)
    assert [rig.at(load)[0] for load in (0.9, 0.75, 0.7, 0.69, 0.79)] == [800, 800, 800, 1000, 1000]
    assert [rig.at(load)[0] for load in (0.1, 0.35, 0.4, 0.41, 0.31)] == [1200, 1200, 1200, 1000, 1000]
    assert [rig.at(load)[0] for load in (0.1, 0.9, 0.1)] == [1200, 800, 1200]


def test_several_steps_are_steps_of_the_configured_value(manager):
    rig = Rig(manager, floor=0.3, ceiling=1.5)
    assert [rig.at(0.9)[0] for _ in range(5)] == [800, 600, 400, 300, 300]
    assert [rig.at(0.1)[0] for _ in range(4)] == [1200, 1400, 1500, 1500]
    assert rig.at(0.5) == (1000, 50)


def test_the_least_interval(manager):
    rig = Rig(manager, min_interval_sec=30, floor=0.2)
    found = []
    for rig.now in (0, 29, 30, 59, 61):
        found.append(rig.at(0.9)[0])
    assert found == [800, 800, 600, 600, 400]


def test_twenty_thousand_turns_leave_no_trace(manager):
    rig = Rig(manager)
    before = manager.get_quota("m")
    for i in range(20_000):
        rig.at((0.9, 0.5, 0.1, 0.5, 0.9)[i % 5])
    rig.adjuster.undo()
    assert manager.get_quota("m") == before


def test_who_changes_a_limit_meanwhile_changes_the_configured_value(manager):
    rig = Rig(manager)
    rig.at(0.9)
    manager.update_quota("m", max_ram_mb=500)
    assert rig.at(0.9) == (400, 40), "the other field is still the configured one, not tightened twice"
    rig.adjuster.undo()
    assert manager.get_quota("m") == ResourceQuotaConfig(
        "m", max_ram_mb=500, max_requests_per_second=50.0, on_violation="reject"
    )
    rig.at(0.9)
    manager.update_quota("m", max_ram_mb=300, max_tokens_per_day=7)
    rig.adjuster.undo()
    quota = manager.get_quota("m")
    assert (quota.max_ram_mb, quota.max_requests_per_second, quota.max_tokens_per_day) == (300, 50, 7)


def meanwhile(manager, change):
    """Have a change made just before the manager puts a model's new limits in place of the old."""
    swap = manager.replace_quota

    def change_and_swap(old, new):
        change()
        return swap(old, new)

    manager.replace_quota = change_and_swap


def test_a_quota_that_is_set_while_it_is_being_adjusted_is_not_lost(manager):
    sets = [500, 300]

    def set_other_limits():
        if sets:
            manager.set_quota("m", max_ram_mb=sets.pop(0), max_tokens_per_day=7, on_violation="queue")

    meanwhile(manager, set_other_limits)
    rig = Rig(manager)
    assert rig.at(0.9) == (240, 80)
    rig.adjuster.undo()
    assert manager.get_quota("m") == ResourceQuotaConfig(
        "m", max_ram_mb=300, max_tokens_per_day=7, on_violation="queue"
    )


def test_nor_one_that_is_what_the_adjuster_had_set(manager):
    rig = Rig(manager)
    rig.at(0.9)
    manager.update_quota("m", max_ram_mb=500)
    sets = [800]
    meanwhile(manager, lambda: sets and manager.update_quota("m", max_ram_mb=sets.pop()))
    assert rig.at(0.9) == (640, 40)
    rig.adjuster.undo()
    assert manager.get_quota("m").max_ram_mb == 800


def test_a_model_that_is_removed_while_it_is_being_adjusted(manager):
    meanwhile(manager, lambda: manager.remove_quota("m"))
    with LoadAdjuster(manager, lambda: 0.9) as adjuster:
        adjuster.poll()
        assert manager.get_quota("m") is None


def test_models_that_come_and_go(manager):
    rig = Rig(manager)
    rig.at(0.9)
    manager.set_quota("new", max_ram_mb=100)
    rig.at(0.9)
    assert manager.get_quota("new").max_ram_mb == 80
    manager.remove_quota("new")
    rig.at(0.9)
    manager.set_quota("new", max_ram_mb=50)
    rig.at(0.9)
    assert manager.get_quota("new").max_ram_mb == 40
    rig.adjuster.stop()
    assert manager.get_quota("new").max_ram_mb == 50


def test_only_some_models(manager):
    manager.set_quota("other", max_ram_mb=1000)
    rig = Rig(manager, models=["m", "absent"])
    assert rig.at(0.9) == (800, 40)
    assert manager.get_quota("other").max_ram_mb == 1000


def test_other_fields_and_limits_that_cannot_be_scaled(manager):
    manager.set_quota(
        "m", max_ram_mb=None, max_ssd_mb=0, max_tokens_per_hour=1, burst_tokens=10, max_tokens_per_day=2**62
    )
    fields = ["max_ram_mb", "max_ssd_mb", "max_tokens_per_hour", "burst_tokens", "max_tokens_per_day"]
    rig = Rig(manager, fields=fields)
    rig.at(0.9)
    quota = manager.get_quota("m")
    assert [getattr(quota, field) for field in fields[:4]] == [None, 0, 1, 8]
    assert quota.max_requests_per_second == 100
    rig.at(0.1)
    assert manager.get_quota("m").max_tokens_per_day == 2**62


def test_actions(manager):
    rig = Rig(manager, tightened_action="throttle", relaxed_action=ViolationAction.WARN)
    found = []
    for load in (0.9, 0.5, 0.1, 0.5):
        rig.at(load)
        found.append(manager.get_quota("m").on_violation.value)
    assert found == ["throttle", "reject", "warn", "reject"]


def test_usage_is_kept(manager):
    rig = Rig(manager)
    manager.check_quota("m", 100)
    rig.at(0.9)
    assert manager.get_usage("m").tokens_this_hour == 100


@pytest.mark.parametrize("load", [float("nan"), float("inf")])
def test_a_load_that_is_no_figure_changes_nothing(manager, load):
    assert Rig(manager).at(load) == (1000, 50)


def test_a_load_that_fails_is_an_error_of_poll_and_changes_nothing(manager):
    def fails():
        raise OSError("no load")

    with pytest.raises(OSError, match="no load"):
        LoadAdjuster(manager, fails).poll()


def test_the_end_of_with_undoes_even_after_an_error(manager):
    def work():
        with LoadAdjuster(manager, lambda: 0.9) as adjuster:
            adjuster.poll()
            assert manager.get_quota("m").max_ram_mb == 800
            assert adjuster.factor == 0.8
            raise OSError("in between")

    with pytest.raises(OSError, match="in between"):
        work()
    assert manager.get_quota("m").max_ram_mb == 1000


def test_in_the_background_and_stopped_from_its_own_callback(manager):
    stopped = threading.Event()

    def stop(change):
        if change.factor < 1:
            adjuster.stop()
            stopped.set()

    adjuster = LoadAdjuster(manager, lambda: 0.9, on_change=stop)
    adjuster.start(0.001)
    assert stopped.wait(60)
    adjuster.stop()
    assert not adjuster.running
    assert manager.get_quota("m").max_ram_mb == 1000


def test_the_end_of_the_interpreter_undoes():
    code = """
        import atexit
        from modelquota import ResourceQuotaManager
        from modelquota.control.load import LoadAdjuster
        manager = ResourceQuotaManager()
        manager.set_quota("m", max_ram_mb=1000)
        atexit.register(lambda: print(manager.get_quota("m").max_ram_mb))  # runs after what was registered later
        LoadAdjuster(manager, lambda: 0.9).poll()
        print(manager.get_quota("m").max_ram_mb)
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("800\n1000\n", "")


def test_the_load_of_the_processors():
    load = cpu_load()
    assert 0 <= load() <= 1


def test_by_default_the_load_is_that_of_the_processors(manager):
    LoadAdjuster(manager).poll()


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['psutil'] = None; from modelquota.control.load import cpu_load; cpu_load()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("ImportError: this needs the extra 'adjust': pip install 'modelquota[adjust]'\n")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"low": 0.8}, "low is 0.8 and high 0.8; give 0 <= low < high"),
        ({"hysteresis": 0.6}, r"hysteresis is 0.6; give a number, 0 \.\. high - low \(0.5\)"),
        ({"step": 0}, "step is 0; give a number above 0, up to 1"),
        ({"floor": 0}, "floor is 0 and ceiling 1.2; give 0 < floor <= 1 <= ceiling"),
        ({"ceiling": 0.9}, "ceiling 0.9"),
        ({"min_interval_sec": -1}, "min_interval_sec is -1"),
        ({"fields": ["max_ram"]}, "fields has 'max_ram'; give some of max_ram_mb, "),
        ({"tightened_action": "wait"}, "'wait' is not a valid ViolationAction"),
    ],
)
def test_bad_settings(manager, settings, message):
    with pytest.raises(ValueError, match=message):
        LoadAdjuster(manager, lambda: 0.5, **settings)
