"""Replays: what a set of quotas would have done with a trace of past requests.

A replay runs on a `ManualClock`, so an hour of traffic is decided in milliseconds and every run gives the same
report: change a limit, replay, compare.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from modelquota._core.state.clock import ManualClock
from modelquota.errors import UnknownModelError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.file import Quotas
from modelquota.quota.limits import DENYING, Limit
from modelquota.quota.patterns import QuotaTemplates
from modelquota.tuning.cells import MAX_SPAN_NS, NS_PER_SECOND, Int64Array
from modelquota.tuning.trace import Trace

__all__ = ["ModelReplay", "ReplayReport", "replay"]

REQUESTS_PER_CALL = 65_536
MAX_SPEED = 1e18
# The limits that `check_many` can return here: nothing queues in a replay.
DENYING_LIMITS = tuple(record.limit for record in DENYING)
MODELS_NAMED_IN_ERROR = 5


@dataclass(frozen=True, slots=True)
class ModelReplay:
    """What one model's quota did with its part of a trace.

    Attributes
    ----------
    model_id : str
    requests, admitted : int
        Requests in the trace, and how many of them were admitted. Each is tried once, at its own time.
    warned : int
        Admitted over a limit, because the model's action is `warn`.
    denied : dict of Limit to int
        Denied requests by the first limit each one violated, be it one of the model or of a meter of it, in the order
        in which limits are judged; every limit is a key, with 0 if it denied nothing.
    never : int
        Denied requests that would not fit after any wait: they cost more than the limit itself.
    tokens, tokens_admitted : int
        Context and generated tokens, of all requests and of those admitted.
    longest_retry_after_ms : int or None
        Longest retry time that was reported to a denied request; None if none was reported.
    median_retry_after_ms : float or None
        The median of the same times.
    peak_requests, peak_tokens : int
        The most that was admitted in any second, not just in seconds aligned to the clock.
    peak_requests_asked, peak_tokens_asked : int
        The most that was requested in any second, admitted or not.
    """

    model_id: str
    requests: int
    admitted: int
    warned: int
    denied: dict[Limit, int]
    never: int
    tokens: int
    tokens_admitted: int
    longest_retry_after_ms: int | None
    median_retry_after_ms: float | None
    peak_requests: int
    peak_tokens: int
    peak_requests_asked: int
    peak_tokens_asked: int

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values; `denied` by the limits' names in lower case."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"denied": {limit.name.lower(): count for limit, count in self.denied.items()}}


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """Outcome of a replay.

    Attributes
    ----------
    trace : str
        Path of the trace's file.
    requests : int
        Total number of requests.
    duration_ns : int
        From the first request to the last, after `speed` was applied.
    speed : float
        How many times faster than in reality the trace was replayed.
    out_of_order : int
        Rows that the trace's file had out of order; see `modelquota.tuning.trace.read_trace`.
    core_time_ns : int
        Wall time spent deciding, without reading the trace or making this report.
    models : tuple of ModelReplay
        The models that the requests are for, in order of first appearance in the trace's file.
    """

    trace: str
    requests: int
    duration_ns: int
    speed: float
    out_of_order: int
    core_time_ns: int
    models: tuple[ModelReplay, ...]

    @property
    def admitted(self) -> int:
        """Requests admitted, of all models."""
        return sum(model.admitted for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return values | {"models": [model.to_dict() for model in self.models]}


def replay(
    trace: Trace,
    quotas: Mapping[str, ResourceQuotaConfig],
    *,
    model: str | None = None,
    speed: float | Fraction = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayReport:
    """Check each request of a trace against quotas, at its own time, and report the outcome.

    A request costs its context and generated tokens, and no RAM or SSD. Denied requests are not tried again.

    Parameters
    ----------
    trace : Trace
        From `read_trace`.
    quotas : mapping of str to ResourceQuotaConfig
        The quota of every model in the trace, e.g. from `load_quotas`, whose patterns apply too. Models that the trace
        does not name are left out of the report.
    model : str, optional
        The model to charge if the trace has no Model column; by default the only model in `quotas`.
    speed : float or Fraction
        Above 0 and up to 1e18: 24 replays a day of traffic in an hour, 0.5 makes it last twice as long. Times are
        divided exactly and rounded down to ns; a float is taken as the decimal number it is written as.
    progress : callable, optional
        Called as `progress(requests_done, total_requests)` from time to time and at the end.

    Returns
    -------
    ReplayReport

    Raises
    ------
    UnknownModelError
        The trace, or `model`, names a model without a quota. A manager admits such requests; a replay is for
        tuning, and there an omitted model is a mistake, so nothing is replayed.
    ValueError
        `model` is missing although `quotas` does not have exactly one, or given although the trace names its models;
        `speed` is out of range, or so small that the trace would last beyond 2**61 ns (73 years).
    """
    ratio = _ratio(speed, trace)
    quotas = _with_patterns(quotas, trace.models if model is None else (model,))
    names = _models(trace, quotas, model)
    meters = {name: _meters_of(name, quotas) for name in names}
    registered = dict.fromkeys([*names, *(meter for some in meters.values() for meter in some)])
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=len(registered))
    for name in registered:
        manager.set_quota(quotas[name])
    rows_of_models = manager.codes(names)
    requests = len(trace)
    times_ns = np.empty(requests, np.int64)
    tokens = np.empty((requests, 3), np.int64)
    codes = np.empty(requests, np.uint8)
    retry_after_ms = np.empty(requests, np.int64)
    core_time_ns = 0
    for start in range(0, requests, REQUESTS_PER_CALL):
        part = slice(start, min(start + REQUESTS_PER_CALL, requests))
        times_ns[part] = _divided(trace.times_ns[part], ratio)
        cached = 0 if trace.cached_tokens is None else trace.cached_tokens[part]
        np.subtract(trace.context_tokens[part], cached, out=tokens[part, 0])
        tokens[part, 1] = cached
        tokens[part, 2] = trace.generated_tokens[part]
        index = 0 if trace.model_index is None else trace.model_index[part]
        rows = np.ascontiguousarray(np.broadcast_to(rows_of_models[index], (part.stop - start,)))
        before_ns = perf_counter_ns()
        manager.check_many(
            rows, tokens[part], codes[part], times_ns=times_ns[part], retry_after_ms=retry_after_ms[part]
        )
        core_time_ns += perf_counter_ns() - before_ns
        if progress is not None:
            progress(part.stop, requests)
    totals = tokens.sum(axis=1)
    return ReplayReport(
        trace=trace.path,
        requests=requests,
        duration_ns=int(times_ns[-1]) if requests else 0,
        speed=float(ratio),
        out_of_order=trace.out_of_order,
        core_time_ns=core_time_ns,
        models=tuple(
            _model_replay(manager, [name, *meters[name]], times_ns[own], totals[own], codes[own], retry_after_ms[own])
            for name, own in zip(names, _selections(trace), strict=True)
        ),
    )


def _ratio(speed: float | Fraction, trace: Trace) -> Fraction:
    if not 0 < speed <= MAX_SPEED:
        raise ValueError(f"speed is {speed}; expected above 0 and up to {MAX_SPEED:.0e}, e.g. 24: a day in an hour")
    ratio = Fraction(str(speed) if isinstance(speed, float) else speed)
    if trace.duration_ns / ratio > MAX_SPAN_NS:
        raise ValueError(
            f"speed is {speed}, so small that this trace would last more than 73 years; "
            f"expected at least {float(Fraction(trace.duration_ns, MAX_SPAN_NS)):.3g}"
        )
    return ratio


def _divided(times_ns: Int64Array, ratio: Fraction) -> Int64Array:
    """Times divided by an exact ratio, rounded down."""
    numerator, denominator = ratio.as_integer_ratio()
    if numerator * denominator < 2**62:
        # times * denominator could overflow int64. The quotient is known to fit; rest * denominator fits by this test.
        whole, rest = np.divmod(times_ns, numerator)
        quotients: Int64Array = whole * denominator + rest * denominator // numerator
        return quotients
    return np.array([time_ns * denominator // numerator for time_ns in times_ns.tolist()], np.int64)


def _with_patterns(
    quotas: Mapping[str, ResourceQuotaConfig], names: Sequence[str]
) -> Mapping[str, ResourceQuotaConfig]:
    """Add quotas from the patterns of a quota file for the models that have none of their own."""
    if not isinstance(quotas, Quotas) or not quotas.patterns:
        return quotas
    templates = QuotaTemplates(quotas.patterns)
    found = {name: templates.resolve(name) for name in names if name not in quotas}
    for name in list(found):
        for meter, quota in templates.meters_of(name):
            found.setdefault(f"{name}#{meter}", quota.replace(model_id=f"{name}#{meter}"))
    return {**quotas, **{name: quota for name, quota in found.items() if quota is not None}}


def _meters_of(model_id: str, quotas: Mapping[str, ResourceQuotaConfig]) -> list[str]:
    """Return the ids of a model's meters."""
    return [name for name in quotas if "#" in name and name.partition("#")[0] == model_id]


def _models(trace: Trace, quotas: Mapping[str, ResourceQuotaConfig], model: str | None) -> tuple[str, ...]:
    """Return the models that the trace's requests are charged to."""
    if trace.model_index is None:
        alone = [name for name in quotas if "#" not in name or name.partition("#")[0] not in quotas]
        if model is None and len(alone) == 1:
            return tuple(alone)
        if model is None:
            raise ValueError(
                f"the trace has no Model column and there is not one quota but {len(quotas)}: "
                f"say which model to charge ({_named(quotas)})"
            )
        models: tuple[str, ...] = (model,)
    elif model is not None:
        raise ValueError(f"the trace has a Model column, which names the models to charge; leave out model={model!r}")
    else:
        models = trace.models
    unknown = [name for name in models if name not in quotas]
    if unknown:
        raise UnknownModelError(
            unknown[0], f"no quota for {_named(unknown)}; add it to the quotas, which have {_named(quotas)}"
        )
    return models


def _named(models: Mapping[str, object] | list[str]) -> str:
    names = [repr(name) for name in list(models)[:MODELS_NAMED_IN_ERROR]]
    more = len(models) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "") if names else "no model at all"


def _selections(trace: Trace) -> list[npt.NDArray[np.intp] | slice]:
    """Return, for each model, the indices of its requests, in order."""
    if trace.model_index is None:
        return [slice(None)]
    order = np.argsort(trace.model_index, kind="stable")
    ends = np.cumsum(np.bincount(trace.model_index, minlength=len(trace.models)))
    return list(np.split(order, ends[:-1]))


def _model_replay(
    manager: ResourceQuotaManager,
    model_ids: Sequence[str],
    times_ns: Int64Array,
    tokens: Int64Array,
    codes: npt.NDArray[np.uint8],
    retry_after_ms: Int64Array,
) -> ModelReplay:
    admitted = codes == 0
    waits_ms = retry_after_ms[retry_after_ms > 0]
    counts = np.bincount(codes, minlength=max(Limit) + 1)
    denied: dict[Limit, int] = {limit: int(counts[limit]) for limit in DENYING_LIMITS}
    usages = filter(None, map(manager.get_usage, model_ids))
    violations = sum(usage.total_violations for usage in usages)
    peak_requests, peak_tokens = _peaks(times_ns[admitted], tokens[admitted])
    peak_requests_asked, peak_tokens_asked = _peaks(times_ns, tokens)
    return ModelReplay(
        model_id=model_ids[0],
        requests=len(codes),
        admitted=int(counts[0]),
        warned=violations - sum(denied.values()),
        denied=denied,
        never=int(np.count_nonzero(retry_after_ms < 0)),
        tokens=int(tokens.sum()),
        tokens_admitted=int(tokens[admitted].sum()),
        longest_retry_after_ms=int(waits_ms.max()) if len(waits_ms) else None,
        median_retry_after_ms=float(np.median(waits_ms)) if len(waits_ms) else None,
        peak_requests=peak_requests,
        peak_tokens=peak_tokens,
        peak_requests_asked=peak_requests_asked,
        peak_tokens_asked=peak_tokens_asked,
    )


def _peaks(times_ns: Int64Array, tokens: Int64Array) -> tuple[int, int]:
    """Return the most requests and the most tokens in any half-open second. `times_ns` is in order."""
    if not len(times_ns):
        return 0, 0
    # The busiest second can be assumed to start with a request.
    first = np.arange(len(times_ns))
    end = np.searchsorted(times_ns, times_ns + NS_PER_SECOND, side="left")
    tokens_before = np.concatenate(([0], np.cumsum(tokens)))
    return int((end - first).max()), int((tokens_before[end] - tokens_before[first]).max())
