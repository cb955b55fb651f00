"""Metrics for OpenTelemetry: the same values as for Prometheus, as observable instruments.

Needs the extra ``modelquota[otel]``, which installs the API only; the application chooses the SDK and the exporter that
read the instruments. An instrument is named as in `modelquota.monitoring.prometheus`, with dots:
``modelquota.model.tokens`` is ``modelquota_model_tokens_total`` there. The attributes are its labels, and the units are
those of UCUM (``By`` for bytes).
"""

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from modelquota._extras import extra
from modelquota.monitoring.metrics import DEFAULT_MAX_MODELS, MODEL, Kind, Metric, MetricSource, Reading

with extra("otel", "opentelemetry"):
    from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter

if TYPE_CHECKING:
    from modelquota.reading.reader import QuotaReader

__all__ = ["instrument"]


def instrument(manager: "QuotaReader", meter: Meter | None = None, *, max_models: int = DEFAULT_MAX_MODELS) -> None:
    """Register a manager with a meter: one observable counter or gauge for every metric.

    The manager is read once for each collection, and the meter keeps it alive.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        The manager to measure.
    meter : opentelemetry.metrics.Meter, optional
        By default the meter ``modelquota`` of the global meter provider.
    max_models : int
        How many models ever get an attribute value of their own, 0 or more: those nearest to a limit while some are
        left. The others are summed under ``model="(others)"``, so the attribute never takes more than
        ``max_models + 1`` values, however many ids come and go.

    Raises
    ------
    ValueError
        `max_models` is negative.

    Examples
    --------
    >>> from opentelemetry.sdk.metrics import MeterProvider
    >>> from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    >>> manager, reader = ResourceQuotaManager(), InMemoryMetricReader()
    >>> instrument(manager, MeterProvider([reader]).get_meter("modelquota"))
    >>> bool(manager.check_quota("llama", 5))
    True
    >>> found = reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics
    >>> [metric.data.data_points[0].value for metric in found if metric.name == "modelquota.checks"]
    [1]
    """
    meter = get_meter("modelquota") if meter is None else meter
    source = MetricSource(manager, max_models=max_models)
    shared = _SharedReading(source)
    for metric in source.metrics:
        callback = _callback(metric, shared)
        if metric.is_counter:
            meter.create_observable_counter(metric.name, [callback], metric.unit, metric.help)
        elif metric.kind is Kind.USE:
            meter.create_observable_up_down_counter(metric.name, [callback], metric.unit, metric.help)
        else:  # a limit, or another value that does not add up over models
            meter.create_observable_gauge(metric.name, [callback], metric.unit, metric.help)


class _SharedReading:
    """One reading for all instruments of a collection: an instrument that asks again begins the next collection.

    OpenTelemetry calls every instrument separately and does not report when a collection begins.
    """

    def __init__(self, source: MetricSource) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._reading: Reading | None = None
        self._served: set[str] = set()

    def for_(self, metric: Metric) -> Reading:
        with self._lock:
            if self._reading is None or metric.name in self._served:
                self._reading = self._source.read()
                self._served.clear()
            self._served.add(metric.name)
            return self._reading


def _callback(metric: Metric, shared: _SharedReading) -> Callable[[CallbackOptions], Iterable[Observation]]:
    names = (MODEL, *metric.labels) if metric.of_model else metric.labels

    def observe(options: CallbackOptions) -> Iterable[Observation]:
        for values, figure in shared.for_(metric).samples(metric):
            yield Observation(figure, dict(zip(names, values, strict=True)))

    return observe
