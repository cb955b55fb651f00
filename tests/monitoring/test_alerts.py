"""Alerts: every threshold, one alert for one event, and a callback for each edge."""

import threading

import pytest

from modelquota import Limit, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.monitoring.alerts import DEFAULT_RULES, AlertMonitor, AlertRule, Severity, check_alerts

QUOTAS = [
    ResourceQuotaConfig("m", max_ram_mb=1000, max_ssd_mb=1000, max_tokens_per_hour=1000, max_tokens_per_day=2000),
    ResourceQuotaConfig("idle"),
]


class Watch:
    """A monitor on a clock of its own, with the alerts that it has reported."""

    def __init__(self, manager, *rules, **settings):
        self.said, self.now = [], 0.0
        self.monitor = AlertMonitor(
            manager,
            rules or DEFAULT_RULES,
            on_raise=lambda alert: self.said.append(("raised", alert.rule, alert.model_id, alert.value)),
            on_clear=lambda alert: self.said.append(("cleared", alert.rule, alert.model_id, alert.value)),
            monotonic=lambda: self.now,
            **settings,
        )

    def poll(self):
        self.said.clear()
        self.monitor.poll()
        return list(self.said)


def test_nothing_to_say(manager):
    assert check_alerts(manager) == []
    assert check_alerts(ResourceQuotaManager()) == []


@pytest.mark.parametrize(
    ("ram_mb", "ssd_mb", "expected"),
    [
        (900, 900, []),
        (901, 0, [("ram", Severity.CRITICAL, "model 'm': RAM at 90.1 % of the limit", 90.1, 90)]),
        (0, 905, [("ssd", Severity.CRITICAL, "model 'm': SSD at 90.5 % of the limit", 90.5, 90)]),
    ],
)
def test_memory(manager, ram_mb, ssd_mb, expected):
    manager.update_memory_usage("m", ram_mb, ssd_mb)
    alerts = check_alerts(manager)
    assert [(a.rule, a.severity, a.message, pytest.approx(a.value), a.threshold) for a in alerts] == expected
    assert all(alert.model_id == "m" for alert in alerts)


def test_quota_of_the_hour_and_the_day(manager):
    manager.check_quota("m", 800)
    assert check_alerts(manager) == []
    manager.check_quota("m", 1)
    (alert,) = check_alerts(manager)
    assert (alert.rule, alert.severity, alert.value) == ("hourly_tokens", Severity.WARNING, pytest.approx(80.1))
    manager.clock.advance(2 * 3600)
    manager.check_quota("m", 800)
    (alert,) = check_alerts(manager)
    assert (alert.rule, alert.message) == ("daily_tokens", "model 'm': tokens per day at 80.0 % of the limit")


def test_requests_of_the_hour_and_the_day(manager):
    manager.set_quota("r", max_requests_per_hour=10, max_requests_per_day=10)
    for _ in range(9):
        manager.check_quota("r", 0)
    assert [alert.rule for alert in check_alerts(manager)] == ["hourly_requests", "daily_requests"]


def test_more_than_a_thousand_violations(manager):
    manager.set_quota("none", max_requests_per_hour=0)
    for count, expected in ((1000, []), (1, ["1,001 quota violations"])):
        for _ in range(count):
            manager.check_quota("none", 1)
        alerts = check_alerts(manager)
        assert [alert.message for alert in alerts] == expected
    assert (alerts[0].model_id, alerts[0].severity) == (None, Severity.WARNING)


def test_the_queue_has_a_rule():
    (rule,) = (rule for rule in DEFAULT_RULES if rule.limit is Limit.QUEUE)
    assert (rule.threshold, rule.severity) == (80, Severity.WARNING)


def test_a_monitor_speaks_at_the_edges_only(manager):
    watch = Watch(manager)
    steps = [
        (890, []),
        (910, [("raised", "ram", "m", 91.0)]),
        (950, []),
        (890, []),  # below the threshold, and above what clears
        (910, []),
        (855, [("cleared", "ram", "m", 85.5)]),
        (880, []),
        (905, [("raised", "ram", "m", 90.5)]),
    ]
    for ram_mb, expected in steps:
        manager.update_memory_usage("m", ram_mb, 0)
        assert watch.poll() == [(*words, pytest.approx(value)) for *words, value in expected]
    assert [alert.value for alert in watch.monitor.active] == [90.5]


def test_a_removed_model_clears_its_alert(manager):
    watch = Watch(manager)
    manager.update_memory_usage("m", 950, 0)
    assert watch.poll() == [("raised", "ram", "m", 95.0)]
    manager.remove_quota("m")
    assert watch.poll() == [("cleared", "ram", "m", 95.0)]
    assert watch.monitor.active == watch.poll() == []


def test_violations_of_a_window_clear_again(manager):
    manager.set_quota("none", max_requests_per_hour=0)
    for _ in range(50):
        manager.check_quota("none", 1)  # before the monitor was made: none of its business
    watch = Watch(manager, AlertRule("v", Severity.WARNING, 10), violations_window_sec=60)

    def violate(count):
        for _ in range(count):
            manager.check_quota("none", 1)

    violate(10)
    assert watch.poll() == []
    watch.now = 30
    violate(5)
    assert watch.poll() == [("raised", "v", None, 15.0)]
    watch.now = 59
    assert watch.poll() == []
    watch.now = 91
    assert watch.poll() == [("cleared", "v", None, 0.0)]


def test_clear_at_may_be_given(manager):
    watch = Watch(manager, AlertRule("ram", Severity.WARNING, 50, Limit.RAM, clear_at=10))
    for ram_mb, expected in ((510, 1), (110, 0), (100, 1)):
        manager.update_memory_usage("m", ram_mb, 0)
        assert len(watch.poll()) == expected


def test_a_broken_callback_stops_nothing(manager, caplog):
    said = []

    def broken(alert):
        said.append(alert.rule)
        raise OSError("pager")

    monitor = AlertMonitor(manager, on_raise=broken)
    manager.update_memory_usage("m", 950, 950)
    raised, cleared = monitor.poll()
    assert [alert.rule for alert in raised] == said == ["ram", "ssd"]
    assert cleared == []
    assert caplog.text.count("the callback for an alert has failed") == 2


def test_in_the_background(manager):
    raised = threading.Event()
    with AlertMonitor(manager, on_raise=lambda alert: raised.set()) as monitor:
        assert monitor.start(0.001) is monitor
        assert monitor.running
        with pytest.raises(RuntimeError, match=r"AlertMonitor is running; stop\(\) it"):
            monitor.start(1)
        manager.update_memory_usage("m", 950, 0)
        assert raised.wait(60)
    assert not monitor.running
    monitor.stop()


def test_a_step_that_fails_is_logged_and_the_next_is_tried(manager, caplog):
    twice = threading.Event()

    class Failing(AlertMonitor):
        calls = 0

        def poll(self):
            self.calls += 1
            if self.calls > 1:
                twice.set()
            raise OSError("gone")

    with Failing(manager) as monitor:
        monitor.start(0.001)
        assert twice.wait(60)
    assert "Failing: a step has failed" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: AlertRule("x", Severity.WARNING, -1), "threshold is -1; give a number, 0 or more"),
        (lambda m: AlertRule("x", Severity.WARNING, float("nan")), "threshold is nan"),
        (lambda m: AlertRule("x", Severity.WARNING, 5, clear_at=6), r"clear_at is 6; give a number, 0 \.\. threshold"),
        (lambda m: AlertMonitor(m, [DEFAULT_RULES[0]] * 2), "give each a name of its own"),
        (lambda m: AlertMonitor(m, violations_window_sec=0), "violations_window_sec is 0"),
        (lambda m: AlertMonitor(m).start(0), "interval_sec is 0; give a finite number of seconds above 0"),
    ],
)
def test_bad_settings(manager, make, message):
    with pytest.raises(ValueError, match=message):
        make(manager)
