"""Metrics for Prometheus, over `ResourceQuotaManager.snapshot`: a collector, an HTTP exporter, a Grafana dashboard.

Needs the extra ``modelquota[prometheus]``. Names follow Prometheus' conventions: counters end in ``_total``, sizes
are in bytes, and actions and classes are labels.

==========================  ==============================================================================
of `QuotaStats`             metric, over all models, removed and unknown ones too
==========================  ==============================================================================
total_checks                ``modelquota_checks_total``
allowed_requests            ``modelquota_admitted_total``
waited_requests             ``modelquota_waited_total``
warned_requests             ``modelquota_warned_total``
denied_requests             ``sum(modelquota_denied_total)``
rejected_requests           ``modelquota_denied_total{action="reject"}``
throttled_requests          ``modelquota_denied_total{action="throttle"}``, without those that wait or have waited
queued_requests             ``modelquota_denied_total{action="queue"}``, likewise
total_violations            ``sum(modelquota_violations_total)``
ram_violations              ``modelquota_violations_total{type="ram_limit"}``
ssd_violations              ``modelquota_violations_total{type="ssd_limit"}``
rate_violations             ``modelquota_violations_total{type="rate_limit"}``
quota_violations            ``modelquota_violations_total{type="quota_limit"}``
concurrency_violations      ``modelquota_violations_total{type="concurrency_limit"}``
tokens_charged              ``sum(modelquota_model_tokens_total)``
tokens_refunded             ``sum(modelquota_model_tokens_refunded_total)``
==========================  ==============================================================================

Requests over HTTP that no quota counted are ``modelquota_http_unmetered_total{path="..."}``, of the middlewares in this
process. The same counters of each model are ``modelquota_model_checks_total{model="..."}`` and so on. Tokens charged
and tokens refunded are two counters: the tokens really used per second are ``rate(modelquota_model_tokens_total[5m]) -
rate(modelquota_model_tokens_refunded_total[5m])``. Gauges of each model; a limit that is not set
has no series:

==========================  ==============================================================================
of `ResourceUsage`          metric
==========================  ==============================================================================
requests_this_second ...    ``modelquota_model_window_requests{window="second"}``, and so on
tokens_this_second ...      ``modelquota_model_window_tokens{window="second"}``, and so on
their limits                ``..._limit`` of the same labels; that of the second includes the burst
burst_requests_used ...     ``modelquota_model_burst_requests``, ``modelquota_model_burst_tokens``
current_ram_mb + reserved   ``modelquota_model_ram_bytes``, ``..._ram_limit_bytes``
peak_ram_mb                 ``modelquota_model_ram_peak_bytes``
the same of SSD             ``modelquota_model_ssd_bytes``, ``..._ssd_limit_bytes``, ``..._ssd_peak_bytes``
concurrent_requests         ``modelquota_model_concurrent_requests``, ``..._limit``
queued_requests             ``modelquota_model_queue_requests``, ``..._limit``
the highest percentage      ``modelquota_model_pressure_ratio``, 1 is full
whether any limit denies    ``modelquota_model_enforcing``, 0 for a model that only warns
==========================  ==============================================================================

If hosts share their limits (``cluster=``), the part of this host in it; a limit is ``tokens_per_hour`` and so on, and
``burst_tokens`` is what is ahead of the rate. Of the processes of a host one has the metrics after the first two:

=========================================  ===============================================================
of `ClusterStatus` and `Share`             metric
=========================================  ===============================================================
state                                      ``modelquota_cluster_state{state="ok"}`` and so on, 1 for one of them
lease_seconds                              ``modelquota_cluster_lease_seconds``
nodes                                      ``modelquota_cluster_nodes``
renewals                                   ``modelquota_cluster_renewals_total{outcome="ok"}``, and so on
renewal_seconds                            ``modelquota_cluster_renewal_seconds``
starved                                    ``modelquota_cluster_starved_total``
share, free, ghosts                        ``modelquota_cluster_share{model="...", limit="..."}``,
                                           ``modelquota_cluster_free``, ``modelquota_cluster_ghosts``
=========================================  ===============================================================

``modelquota_models`` and ``modelquota_enforcing`` describe the manager. ``modelquota_pressure_ratio`` is the highest
pressure of any model that denies: a model under the action ``warn`` has its own pressure but does not count here.

At most `max_models` models have a label of their own over the life of a collector: with ``"(others)"``, the label
``model`` never takes more than ``max_models + 1`` values, however many ids come and go. While labels are left, each
scrape assigns them to the models nearest to a limit: first to models that deny, then to the others; a label stays with
its id. All other models are summed under ``model="(others)"``, whose pressure is the highest of those that deny, and
which has no limits. No counter ever falls: a model counts under its own label from the scrape that assigned it, and
what it counted before stays with the others. A model's series end when the model is removed; if its id comes back, its
counters continue from their last values. The ``modelquota_*_total`` counters without a model never end.
"""

import sys
from collections.abc import Iterator
from importlib.resources import files
from threading import Thread
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIServer

from modelquota._extras import extra
from modelquota.monitoring.metrics import DEFAULT_MAX_MODELS, MODEL, Metric, MetricSource

with extra("prometheus", "prometheus_client"):
    from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
    from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from modelquota.reading.reader import QuotaReader

__all__ = ["QuotaCollector", "grafana_dashboard", "make_exporter_app", "start_exporter"]

_SUFFIXES = {"By": "bytes", "1": "ratio", "s": "seconds"}
_Family = CounterMetricFamily | GaugeMetricFamily


class QuotaCollector(Collector):
    """A collector over one manager, for ``REGISTRY.register(QuotaCollector(manager))`` of ``prometheus_client``.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        The manager to read at each scrape.
    max_models : int
        How many models ever get a label of their own, 0 or more: those nearest to a limit while labels are left.

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
        """Yield all metrics without values; called at registration."""
        for metric in self._source.metrics:
            yield _family(metric)

    def collect(self) -> Iterator[_Family]:
        """Read the manager and yield all metrics; called at each scrape, possibly by several threads at once."""
        reading = self._source.read()
        for metric in self._source.metrics:
            family = _family(metric)
            for labels, value in reading.samples(metric):
                family.add_metric(labels, value)
            yield family


def start_exporter(
    manager: "QuotaReader", port: int, *, addr: str = "127.0.0.1", max_models: int = DEFAULT_MAX_MODELS
) -> tuple[WSGIServer, Thread]:
    """Serve only a manager's metrics over HTTP, from a daemon thread.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        The manager to measure.
    port : int
        TCP port; 0 chooses a free one, which is then ``server.server_port``.
    addr : str
        Address to listen on. By default only this machine can connect: there is no authentication.
    max_models : int
        As for `QuotaCollector`.

    Returns
    -------
    (server, thread)
        To stop it, call ``server.shutdown()`` and then ``server.server_close()``.

    Raises
    ------
    OSError
        The port is taken, or the address is not one of this machine; the message names both.
    """
    registry = _registry(manager, max_models)
    try:
        server, thread = start_http_server(port, addr=addr, registry=registry)
    except OSError as error:
        message = f"cannot listen at {addr}, port {port}: {error.strerror or error}"
        raise type(error)(error.errno, message) from error
    report_error = server.handle_error

    def handle_error(request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a disconnected client is not an error of this server
            report_error(request, client_address)

    server.handle_error = handle_error  # type: ignore[method-assign]
    return server, thread


def make_exporter_app(manager: "QuotaReader", *, max_models: int = DEFAULT_MAX_MODELS) -> Any:
    """Return a WSGI application that serves a manager's metrics, to mount in another server."""
    return make_wsgi_app(_registry(manager, max_models))


def grafana_dashboard() -> str:
    """Return a Grafana dashboard for these metrics, as the JSON that Grafana imports."""
    return files("modelquota.monitoring").joinpath("dashboard.json").read_text(encoding="utf-8")


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
