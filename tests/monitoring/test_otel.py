"""Metrics for OpenTelemetry, read by the real SDK: the same figures as for Prometheus."""

import contextlib
import subprocess
import sys

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import Gauge, InMemoryMetricReader, Sum
from prometheus_client import CollectorRegistry

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.monitoring.metrics import METRICS, OTHERS, Kind
from modelquota.monitoring.otel import instrument
from modelquota.monitoring.prometheus import QuotaCollector
from modelquota.reading.unmetered import unmetered_of


class Counting(ResourceQuotaManager):
    """Counts how often it is read as a whole."""

    snapshots = 0

    def _read_table(self):
        self.snapshots += 1
        return super()._read_table()


@pytest.fixture
def manager():
    manager = Counting(clock=ManualClock(10**12))
    manager.set_quota(
        "llama", max_requests_per_hour=3, on_violation="reject", max_ssd_mb=None, max_concurrent_requests=9
    )
    manager.set_quota("qwen", max_tokens_per_hour=100, on_violation="warn")
    for _ in range(5):
        manager.check_quota("llama", 30)
        manager.check_quota("qwen", 30)
    manager.update_memory_usage("llama", 600, 10)
    unmetered_of(manager).count("/generate", "no route covers it")
    return manager


@pytest.fixture
def reader():
    return InMemoryMetricReader()


@pytest.fixture
def watch(manager, reader):
    with contextlib.ExitStack() as stack:

        def watch(**settings):
            provider = MeterProvider([reader])
            stack.callback(provider.shutdown)
            instrument(manager, provider.get_meter("modelquota"), **settings)

        yield watch


def collected(reader):
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    return {metric.name: metric for metric in scope.metrics}


def points(metric):
    return {tuple(sorted(point.attributes.items())): point.value for point in metric.data.data_points}


def test_every_figure_is_that_of_prometheus(manager, reader, watch):
    watch()
    found = collected(reader)
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    families = {family.documentation: family for family in registry.collect()}
    assert set(found) == {metric.name for metric in METRICS if not metric.of_cluster}
    for metric in found.values():
        samples = families[metric.description].samples
        assert points(metric) == {tuple(sorted(sample.labels.items())): sample.value for sample in samples}
    assert points(found["modelquota.model.tokens"]) == {(("model", "llama"),): 90, (("model", "qwen"),): 150}
    assert points(found["modelquota.model.ram"])[(("model", "llama"),)] == 600 * 2**20


def test_kinds_and_units(manager, reader, watch):
    watch()
    found = collected(reader)
    for metric in METRICS:
        if metric.of_cluster:
            assert metric.name not in found
            continue
        data = found[metric.name].data
        assert found[metric.name].unit == metric.unit
        if metric.is_counter:
            assert isinstance(data, Sum)
            assert data.is_monotonic
        elif metric.kind is Kind.USE:
            assert isinstance(data, Sum)
            assert not data.is_monotonic
        else:
            assert isinstance(data, Gauge)
    assert found["modelquota.model.ram"].unit == "By"
    assert found["modelquota.model.pressure"].unit == "1"


def test_one_reading_serves_a_collection_and_the_next_has_its_own(manager, reader, watch):
    watch()
    before = manager.snapshots
    collected(reader)
    assert manager.snapshots == before + 1
    manager.check_quota("llama", 1)
    found = collected(reader)
    assert manager.snapshots == before + 2
    assert points(found["modelquota.checks"]) == {(): 11}


def test_the_others_are_summed(manager, reader, watch):
    watch(max_models=1)
    tokens = points(collected(reader)["modelquota.model.tokens"])
    assert set(tokens) == {(("model", "llama"),), (("model", OTHERS),)}, "qwen only warns, and comes after"
    assert sum(tokens.values()) == 240


def test_the_global_meter_is_taken_where_none_is_given(manager):
    instrument(manager)  # without an SDK this is OpenTelemetry's own no-op


def test_a_negative_bound_is_refused(manager):
    with pytest.raises(ValueError, match="max_models is -1"):
        instrument(manager, max_models=-1)


def test_without_the_extra_it_says_what_to_install():
    code = "import sys; sys.modules['opentelemetry'] = None; import modelquota.monitoring.otel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("ImportError: this needs the extra 'otel': pip install 'modelquota[otel]'\n")
