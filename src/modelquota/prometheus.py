"""Metrics for Prometheus, over `ResourceQuotaManager.snapshot`: a collector, an HTTP exporter, a Grafana dashboard.

Needs the extra ``modelquota[prometheus]``. Names follow Prometheus' conventions: counters end in ``_total``, sizes
are in bytes, and actions and classes are labels.

==========================  ==============================================================================
of `QuotaStats`             metric, over all models, removed and unknown ones too
==========================  ==============================================================================
total_checks                ``modelquota_checks_total``
allowed_requests            ``modelquota_admitted_total``
warned_requests             ``modelquota_warned_total``
rejected_requests           ``modelquota_denied_total{action="reject"}``
throttled_requests          ``modelquota_denied_total{action="throttle"}``
queued_requests             ``modelquota_denied_total{action="queue"}``
total_violations            ``sum(modelquota_violations_total)``
ram_violations              ``modelquota_violations_total{type="ram_limit"}``
ssd_violations              ``modelquota_violations_total{type="ssd_limit"}``
rate_violations             ``modelquota_violations_total{type="rate_limit"}``
quota_violations            ``modelquota_violations_total{type="quota_limit"}``
concurrency_violations      ``modelquota_violations_total{type="concurrency_limit"}``
==========================  ==============================================================================

The same counters of each model are ``modelquota_model_checks_total{model="..."}`` and so on, with
``modelquota_model_tokens_total`` beside them. Gauges of each model, where a limit that is not set has no series:

==========================  ==============================================================================
of `ResourceUsage`          metric
==========================  ==============================================================================
requests_this_hour ...      ``modelquota_model_window_requests{window="second|hour|day"}``
tokens_this_hour ...        ``modelquota_model_window_tokens{window="second|hour|day"}``
their limits                ``..._limit`` of the same labels; that of the second includes the burst
burst_requests_used ...     ``modelquota_model_burst_requests``, ``modelquota_model_burst_tokens``
current_ram_mb + reserved   ``modelquota_model_ram_bytes``, ``..._ram_limit_bytes``
peak_ram_mb                 ``modelquota_model_ram_peak_bytes``
the same of SSD             ``modelquota_model_ssd_bytes``, ``..._ssd_limit_bytes``, ``..._ssd_peak_bytes``
concurrent_requests         ``modelquota_model_concurrent_requests``, ``..._limit``
queued_requests             ``modelquota_model_queue_requests``, ``..._limit``
the highest percentage      ``modelquota_model_pressure_ratio``, 1 is full
==========================  ==============================================================================

``modelquota_models`` and ``modelquota_enforcing`` tell of the manager. At most `max_models` models have a label of
their own, those nearest to a limit; the others are summed under ``model="(others)"``, where pressure is the highest
and limits are left out. A model's series end with the model; where its id comes back, its counters begin at 0, which
``rate`` and ``increase`` know as a restart. ``modelquota_*_total`` without a model go on.
"""

from collections.abc import Iterator
from importlib.resources import files
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

from modelquota._extras import extra
from modelquota._metrics import DEFAULT_MAX_MODELS, METRICS, MODEL, Metric, MetricSource

with extra("prometheus", "prometheus_client"):
    from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from modelquota.reading import QuotaReader

__all__ = ["QuotaCollector", "grafana_dashboard", "make_exporter_app", "start_exporter"]

_SUFFIXES = {"By": "bytes", "1": "ratio"}
_Family = CounterMetricFamily | GaugeMetricFamily


class QuotaCollector(Collector):
    """A collector over one manager, for ``REGISTRY.register(QuotaCollector(manager))`` of ``prometheus_client``.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        What is measured, at each scrape.
    max_models : int
        How many models have a label of their own, 0 or more: those nearest to a limit.

    Raises
    ------
    ValueError
        `max_models` is negative.

    Examples
    --------
    >>> from prometheus_client import CollectorRegistry
    >>> manager = ResourceQuotaManager()
    >>> manager.set_quota("llama")
    >>> bool(manager.check_quota("llama", 100))
    True
    >>> registry = CollectorRegistry()
    >>> registry.register(QuotaCollector(manager))
    >>> registry.get_sample_value("modelquota_model_tokens_total", {"model": "llama"})
    100
    """

    def __init__(self, manager: "QuotaReader", *, max_models: int = DEFAULT_MAX_MODELS) -> None:
        self._source = MetricSource(manager, max_models=max_models)

    def describe(self) -> Iterator[_Family]:
        """Yield all metrics without a figure; called at registration."""
        for metric in METRICS:
            yield _family(metric)

    def collect(self) -> Iterator[_Family]:
        """Read the manager and yield all metrics; called at each scrape, by several threads at once if need be."""
        reading = self._source.read()
        for metric in METRICS:
            family = _family(metric)
            for labels, value in reading.samples(metric):
                family.add_metric(labels, value)
            yield family


def start_exporter(
    manager: "QuotaReader", port: int, *, addr: str = "127.0.0.1", max_models: int = DEFAULT_MAX_MODELS
) -> tuple[WSGIServer, Thread]:
    """Serve a manager's metrics over HTTP from a daemon thread, and nothing else.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        What is measured.
    port : int
        TCP port; 0 takes a free one, which is then ``server.server_port``.
    addr : str
        Address to listen on. By default only this machine is answered: there is no authentication.
    max_models : int
        As for `QuotaCollector`.

    Returns
    -------
    (server, thread)
        ``server.shutdown()`` and then ``server.server_close()`` ends it.

    Raises
    ------
    OSError
        The port is taken, or the address is none of this machine; both are named.
    """
    registry = _registry(manager, max_models)
    try:
        return start_http_server(port, addr=addr, registry=registry)
    except OSError as error:
        message = f"cannot listen at {addr}, port {port}: {error.strerror or error}"
        raise type(error)(error.errno, message) from error


def make_exporter_app(manager: "QuotaReader", *, max_models: int = DEFAULT_MAX_MODELS) -> Any:
    """Return a WSGI application that serves a manager's metrics, to mount in a server of one's own."""
    return make_wsgi_app(_registry(manager, max_models))


def grafana_dashboard() -> str:
    """Return a Grafana dashboard over these metrics, as the JSON that Grafana imports."""
    return files("modelquota").joinpath("data", "grafana-dashboard.json").read_text(encoding="utf-8")


def _registry(manager: "QuotaReader", max_models: int) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager, max_models=max_models))
    return registry


def _family(metric: Metric) -> _Family:
    name, suffix = metric.name.replace(".", "_"), _SUFFIXES.get(metric.unit)
    if suffix:
        name = f"{name}_{suffix}"
    labels = (MODEL, *metric.labels) if metric.of_model else metric.labels
    # the class adds _total to the name of a counter
    return (CounterMetricFamily if metric.is_counter else GaugeMetricFamily)(name, metric.help, labels=labels)
