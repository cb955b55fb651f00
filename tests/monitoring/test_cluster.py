"""What a host in a cluster shows of it: metrics, alerts, and nothing without a cluster."""

import json
import re
import time
from importlib.resources import files

import pytest

pytest.importorskip("lupa", reason="the simulated store needs lupa")

from lua_store import LocalStore
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry

import modelquota.monitoring.prometheus
from modelquota import ManualClock, ResourceQuotaManager
from modelquota.errors import StoreError
from modelquota.monitoring.alerts import (
    AlertMonitor,
    AlertRule,
    ClusterMeasure,
    Severity,
    check_alerts,
)
from modelquota.monitoring.metrics import METRICS
from modelquota.monitoring.otel import instrument
from modelquota.monitoring.prometheus import QuotaCollector, grafana_dashboard
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import Limit

PATIENCE_SEC = 60
QUOTA = ResourceQuotaConfig.unlimited("m", max_requests_per_hour=1000, max_tokens_per_second=50, on_violation="reject")


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_SEC
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.01)


@pytest.fixture
def store():
    return LocalStore()


@pytest.fixture
def host(store):
    """A host that has been given a share."""
    with ResourceQuotaManager(cluster=store) as manager:
        manager.set_quota(QUOTA)
        wait_for(lambda: manager.check_quota("m", 1).allowed)
        wait_for(lambda: manager.cluster.status().state == "ok")
        yield manager


def value_of(manager, name, **labels):
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    return registry.get_sample_value(name, labels)


def cluster_series(manager):
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    samples = [sample for family in registry.collect() for sample in family.samples]
    return {sample.name: sample.value for sample in samples if sample.name.startswith("modelquota_cluster_")}


def test_metrics_of_a_host_that_has_a_share(host):
    states = ("joining", "learning", "ok", "degraded", "expired")
    assert [value_of(host, "modelquota_cluster_state", state=state) for state in states] == [0, 0, 1, 0, 0]
    assert 0 < value_of(host, "modelquota_cluster_lease_seconds") <= 1
    assert value_of(host, "modelquota_cluster_nodes") == 1
    assert value_of(host, "modelquota_cluster_renewals_total", outcome="ok") >= 1
    assert value_of(host, "modelquota_cluster_renewals_total", outcome="learning") >= 1
    assert 0 < value_of(host, "modelquota_cluster_renewal_seconds") < PATIENCE_SEC
    assert value_of(host, "modelquota_cluster_starved_total") >= 1, "the first request found no share"


def test_shares_are_in_the_units_of_the_limit(host):
    wait_for(lambda: any(share.used for share in host.cluster.shares()))  # what was admitted has been read
    shares = {share.limit: share for share in host.cluster.shares()}
    assert set(shares) == {"requests_per_hour", "tokens_per_second", "burst_tokens"}
    hour = shares["requests_per_hour"]
    assert (hour.model_id, hour.whole, hour.ghosts) == ("m", 1000, 0)
    assert 1 <= hour.used <= hour.share
    assert hour.share + hour.free <= 1000
    assert shares["burst_tokens"].whole == 10_050, "not in millionths"
    assert shares["burst_tokens"].share + shares["burst_tokens"].free <= 10_050
    labels = {"model": "m", "limit": "requests_per_hour"}
    assert value_of(host, "modelquota_cluster_share", **labels) >= 1
    assert value_of(host, "modelquota_cluster_free", **labels) > 0
    assert value_of(host, "modelquota_cluster_ghosts", **labels) == 0


def test_a_model_among_the_others_has_no_share(host):
    registry = CollectorRegistry()
    registry.register(QuotaCollector(host, max_models=0))
    assert registry.get_sample_value("modelquota_cluster_share", {"model": "m", "limit": "requests_per_hour"}) is None
    assert registry.get_sample_value("modelquota_cluster_nodes") == 1


def test_opentelemetry_has_the_same(host):
    reader = InMemoryMetricReader()
    instrument(host, MeterProvider([reader]).get_meter("modelquota"))
    (resource,) = reader.get_metrics_data().resource_metrics
    found = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    assert {metric.name for metric in METRICS if metric.of_cluster} <= set(found)
    (nodes,) = found["modelquota.cluster.nodes"].data.data_points
    assert nodes.value == 1
    assert found["modelquota.cluster.lease"].unit == "s"


def test_without_a_cluster_there_is_nothing(tmp_path):
    with ResourceQuotaManager(path=tmp_path / "state") as manager:
        manager.set_quota(QUOTA)
        view = ResourceQuotaManager.open_readonly(tmp_path / "state")
        for reader in (manager, view):
            assert reader.cluster is None
            registry = CollectorRegistry()
            registry.register(QuotaCollector(reader))
            assert not [family for family in registry.collect() if "cluster" in family.name]
        view.close()


def test_the_dashboard_and_the_documentation_name_only_what_there_is(host):
    exported = set(cluster_series(host))
    dashboard = json.loads(grafana_dashboard())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = set(re.findall(r"modelquota_cluster_\w+", " ".join(expressions)))
    assert asked == exported - {"modelquota_cluster_nodes"}
    topics = [
        files("modelquota.docs").joinpath(name).read_text(encoding="utf-8") for name in ("metrics.md", "cluster.md")
    ]
    for text in (*topics, modelquota.monitoring.prometheus.__doc__):
        named = set(re.findall(r"\bmodelquota_cluster_[a-z_]*[a-z]\b", text))
        assert named
        assert named <= exported


def cluster_alerts(manager):
    return [(alert.rule, alert.model_id) for alert in check_alerts(manager) if alert.rule.startswith("cluster_")]


def test_a_store_that_is_away_raises_an_alert_until_it_is_back(host, store):
    assert ("cluster_degraded", None) not in cluster_alerts(host)
    monitor = AlertMonitor(host, [AlertRule("down", Severity.CRITICAL, 0, cluster=ClusterMeasure.DEGRADED)])
    store.error = StoreError("unreachable", "no connection")
    wait_for(lambda: ("cluster_degraded", None) in cluster_alerts(host))
    (alert,), _ = monitor.poll()
    assert alert.message == "this host does not reach the store that hosts share their limits in"
    assert monitor.poll() == ([], [])
    wait_for(lambda: host.cluster.status().state == "expired")
    assert value_of(host, "modelquota_cluster_renewals_total", outcome="unreachable") >= 3
    assert value_of(host, "modelquota_cluster_lease_seconds") == 0
    store.error = None
    wait_for(lambda: monitor.poll()[1])


class Cluster:
    """What a manager's `cluster` says, as the test sets it."""

    def __init__(self, status, shares=()):
        self.now, self.held = status, list(shares)

    def status(self):
        return self.now

    def shares(self):
        return self.held


class Host(ResourceQuotaManager):
    cluster = None


def test_denials_for_lack_of_share_are_counted_within_the_window():
    from modelquota.cluster.status import ClusterStatus

    host, now = Host(clock=ManualClock()), [0.0]
    host.cluster = Cluster(ClusterStatus("ok", starved=50))
    rule = AlertRule("starved", Severity.WARNING, 100, cluster=ClusterMeasure.STARVED)
    monitor = AlertMonitor(host, [rule], violations_window_sec=60, monotonic=lambda: now[0])
    steps = [  # time, the total, raised, cleared
        (1, 150, [], []),
        (2, 151, [101], []),
        (63, 151, [], [0]),
        (64, 7, [], []),  # another process counts now, from 0
        (65, 108, [108], []),
    ]
    for now[0], total, *expected in steps:
        host.cluster.now = ClusterStatus("ok", starved=total)
        assert [[alert.value for alert in alerts] for alerts in monitor.poll()] == expected
    (alert,) = check_alerts(host, [rule])
    assert alert.message == "108 requests denied for lack of share"


def test_hosts_that_are_gone_and_hold_a_fifth_of_a_limit_raise_an_alert():
    from modelquota.cluster.status import ClusterStatus, Share

    host = Host(clock=ManualClock())
    shares = [
        Share("a", "tokens_per_hour", 100, 10, 5, 50, 20),
        Share("b", "tokens_per_hour", 100, 10, 5, 50, 20),
        Share("b", "tokens_per_day", 1000, 10, 5, 50, 201),
        Share("c", "tokens_per_day", 0, 0, 0, 0, 0),
    ]
    host.cluster = Cluster(ClusterStatus("ok"), shares)
    assert cluster_alerts(host) == [("cluster_ghosts", "b")]
    (alert,) = (alert for alert in check_alerts(host) if alert.rule == "cluster_ghosts")
    assert alert.message == "model 'b': hosts that are gone hold 20.1 % of a limit unused"
    assert not [rule for rule in cluster_alerts(Host(clock=ManualClock())) if rule]


def test_a_rule_is_about_a_limit_or_the_cluster():
    with pytest.raises(ValueError, match="give one of them"):
        AlertRule("both", Severity.WARNING, 1, Limit.RAM, cluster=ClusterMeasure.GHOSTS)
