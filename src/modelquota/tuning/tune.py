"""From traffic to quotas: what a trace needs, what its quotas should be, and what either would have done with it."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit
from modelquota.tuning.advice import (
    advise,
    concurrency,
    estimates,
    fields_of,
    round_count,
)
from modelquota.tuning.capacity import Capacity
from modelquota.tuning.cells import NS_PER_SECOND
from modelquota.tuning.charges import charges_of
from modelquota.tuning.frontier import frontier
from modelquota.tuning.replay import replay, selections, with_patterns
from modelquota.tuning.report import ModelReplay
from modelquota.tuning.trace import Trace
from modelquota.tuning.tuned import ModelTuning, Scenario, TuneReport
from modelquota.tuning.users import tune_users
from modelquota.tuning.windows import window_uses

__all__ = ["ModelTuning", "Scenario", "TuneReport", "tune"]

DEFAULT_MODEL = "default"
SENSITIVITY = 0.1
# Each raise makes a limit a quarter larger, so that all of them make it up to thirty times as large.
RAISE, MOST_RAISES = 1.25, 15


def tune(
    trace: Trace,
    current: Mapping[str, ResourceQuotaConfig] | None = None,
    *,
    model: str | None = None,
    headroom: float = 0.15,
    target_denied: float = 0.001,
    scale: float = 1.5,
    per: str | None = None,
    capacity: Capacity | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TuneReport:
    """Recommend quotas for the traffic of a trace.

    The recommended limits, replayed over the trace with every request tried once, deny at most `target_denied` of each
    model's requests, however the windows lie; with `throttle` and `queue`, most of those wait instead.

    Parameters
    ----------
    trace : Trace
        From `read_trace`; at least one request.
    current : mapping of str to ResourceQuotaConfig, optional
        The quotas to compare with, e.g. from `load_quotas`. What the recommendation says nothing about, such as memory
        and the action, is taken from there.
    model : str, optional
        The model's id, for a trace that names none; by default the only one in `current`, or ``"default"``.
    headroom : float
        How far above what was needed, 0 .. 10: 0.15 is 15 %.
    target_denied : float
        The share of requests that may be denied, 0 .. 0.5.
    scale : float
        How many times the traffic the scenario of growth has, above 0 and up to 1,000.
    per : str, optional
        ``"user"``, or ``"prefix"``: users grouped by what their name has before the first ``/`` or ``:``.
    capacity : Capacity, optional
        From `modelquota.tuning.capacity.read_capacity`.
    progress : callable, optional
        Called as `progress(steps_done, total_steps)`.

    Raises
    ------
    ValueError
        A parameter is out of range, a model is given for a trace that names its own, or the trace names no users though
        it is to be tuned per user.
    """
    for name, value, most in (("headroom", headroom, 10), ("target_denied", target_denied, 0.5)):
        if not 0 <= value <= most:
            raise ValueError(f"{name} is {value}; expected a share from 0 to {most:g}, such as 0.15 or 15%")
    if not 0 < scale <= 1_000:
        raise ValueError(f"scale is {scale}; expected above 0 and up to 1000, e.g. 1.5 for half as much again")
    if not len(trace):
        raise ValueError("the trace has no requests")
    if model is not None and trace.models:
        raise ValueError(f"the trace names its models; leave out model={model!r}")
    quotas = None if current is None else with_patterns(current, trace.models if model is None else (model,))
    names = trace.models or (_only(model, quotas),)
    steps = _Steps(len(names) + 6, progress)
    analyses = []
    for name, rows in zip(names, selections(trace.model_index, len(names)), strict=True):
        analyses.append(_analyze(name, trace.select(rows), quotas, headroom, target_denied))
        steps.done()
    if trace.durations_ns is not None and trace.estimated_tokens is not None:
        analyses = _keep_promise(trace, analyses, target_denied)
    recommended = {analysis.model_id: analysis.recommended for analysis in analyses}
    replays = _replays(trace, quotas, recommended, names, scale, steps)
    users = tune_users(trace, per, headroom=headroom, target_denied=target_denied) if per is not None else None
    models = tuple(
        replace(analysis, scenarios=tuple(Scenario(name, found[place]) for name, found in replays.items()))
        for place, analysis in enumerate(analyses)
    )
    return TuneReport(
        trace=trace.path,
        format=trace.format,
        requests=len(trace),
        duration_ns=trace.duration_ns,
        headroom=headroom,
        target_denied=target_denied,
        scale=scale,
        models=models,
        users=users,
        capacity=capacity,
        warnings=_warnings(trace, models, capacity, target_denied),
    )


def _keep_promise(trace: Trace, analyses: list[ModelTuning], target_denied: float) -> list[ModelTuning]:
    """Raise limits until a replay denies no more than promised.

    How much of a reserve a rate takes back when it is settled depends on how far the rate was used since. Between all
    of it, as assumed so far, and nothing lies what the quota does, and a replay tells.
    """
    only = analyses[0].model_id if trace.model_index is None else None
    for _ in range(MOST_RAISES):
        quotas = {analysis.model_id: analysis.recommended for analysis in analyses}
        found = replay(trace, quotas, model=only).models
        denied = [Scenario("", model) for model in found]
        if all(scenario.denied_share <= target_denied for scenario in denied):
            break
        analyses = [
            analysis if scenario.denied_share <= target_denied else _raised(analysis, scenario.binding)
            for analysis, scenario in zip(analyses, denied, strict=True)
        ]
    return analyses


def _raised(analysis: ModelTuning, limit: Limit | None) -> ModelTuning:
    """Return the analysis with one limit raised: the burst, if it is a rate."""
    limits = []
    for item in analysis.limits:
        target, burst = item.target, item.target_burst
        if item.limit is limit and target is not None:
            if burst is not None:
                burst = round_count(max(burst, target) * RAISE)
                item = replace(item, target_burst=burst, upper_burst=max(burst, item.upper_burst or 0))
            else:
                target = round_count(target * RAISE)
                item = replace(item, target=target, upper=max(target, item.upper or 0))
        limits.append(item)
    return replace(
        analysis,
        limits=tuple(limits),
        recommended=fields_of(tuple(limits), analysis.current, analysis.model_id),
    )


class _Steps:
    """Counts the steps that are done."""

    def __init__(self, total: int, progress: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._done = 0
        self._progress = progress

    def done(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(min(self._done, self._total), self._total)


def _only(model: str | None, quotas: Mapping[str, ResourceQuotaConfig] | None) -> str:
    if model is not None:
        return model
    return next(iter(quotas)) if quotas is not None and len(quotas) == 1 else DEFAULT_MODEL


def _analyze(
    name: str,
    trace: Trace,
    quotas: Mapping[str, ResourceQuotaConfig] | None,
    headroom: float,
    target_denied: float,
) -> ModelTuning:
    uses = tuple(window_uses(trace))  # before the charges are there: both would take the most memory of all
    charges = charges_of(trace)
    points = {unit: frontier(charged, unit) for unit, charged in charges.items()}
    limits = advise(trace, charges, points, headroom=headroom, target_denied=target_denied)
    current = None if quotas is None else quotas.get(name)
    found = concurrency(trace)
    return ModelTuning(
        model_id=name,
        requests=len(trace),
        uses=uses,
        frontiers=tuple(points.values()),
        limits=limits,
        concurrency=None if found is None else found[0],
        estimates=estimates(trace),
        current=current,
        recommended=fields_of(limits, current, name),
        scenarios=(),
    )


def _replays(
    trace: Trace,
    quotas: Mapping[str, ResourceQuotaConfig] | None,
    recommended: dict[str, ResourceQuotaConfig],
    names: tuple[str, ...],
    scale: float,
    steps: _Steps,
) -> dict[str, tuple[ModelReplay, ...]]:
    """Replay the trace under each set of quotas; return what became of each model."""
    only = names[0] if trace.model_index is None else None
    found: dict[str, tuple[ModelReplay, ...]] = {}

    def run(name: str, limits: Mapping[str, ResourceQuotaConfig], *, wait: bool, speed: Fraction | int = 1) -> None:
        found[name] = replay(trace, limits, model=only, wait=wait, speed=speed).models
        steps.done()

    if quotas is not None and all(name in quotas for name in names):
        run("current", quotas, wait=True)
    run("recommended", recommended, wait=True)
    run("recommended, tried once", recommended, wait=False)
    for sign in (-1, 1):
        factor = 1 + sign * SENSITIVITY
        scaled = {name: _scaled(quota, factor) for name, quota in recommended.items()}
        run(f"limits {100 * sign * SENSITIVITY:+.0f} %", scaled, wait=False)
    run(f"traffic x{scale:g}", recommended, wait=False, speed=Fraction(str(scale)))
    return found


def _scaled(quota: ResourceQuotaConfig, factor: float) -> ResourceQuotaConfig:
    """Return the quota with every limit on rates, windows and concurrency scaled."""
    changes: dict[str, Any] = {}
    for record in CATALOGUE.values():
        if record.window is None and record.limit is not Limit.CONCURRENCY:
            continue
        value = getattr(quota, record.quota_field)
        if value is not None:
            changes[record.quota_field] = value * factor if record.is_rate else round(value * factor)
        if record.burst_field:
            changes[record.burst_field] = round(getattr(quota, record.burst_field) * factor)
    return quota.replace(**changes)


def _warnings(
    trace: Trace, models: tuple[ModelTuning, ...], capacity: Capacity | None, target_denied: float
) -> tuple[str, ...]:
    warnings = []
    if trace.model_index is None and models[0].model_id == DEFAULT_MODEL:
        warnings.append(f"the trace names no model: the limits are for one called {DEFAULT_MODEL!r}; say which it is")
    unseen = {CATALOGUE[item.limit].window for model in models for item in model.limits if item.extrapolated}
    for window in sorted((window for window in unseen if window is not None), key=lambda window: window.seconds):
        warnings.append(
            f"less than one {window.name} was seen ({trace.duration_ns / NS_PER_SECOND / 3_600:.2g} h): its limits are "
            "extrapolated"
        )
    for model in models:
        once = model.scenario("recommended, tried once")
        if once is not None and once.denied_share > target_denied:
            warnings.append(
                f"{model.model_id}: the recommended limits deny {once.denied_share:.2%}, more than promised"
            )
        if model.requests < 1_000:
            warnings.append(f"{model.model_id}: only {model.requests:,} requests; peaks of so few say little")
        if capacity is not None:
            warnings.extend(_beyond(model, capacity))
    return (*warnings, *trace.notes)


def _beyond(model: ModelTuning, capacity: Capacity) -> list[str]:
    """Say which recommended limits are above what the benchmark held."""
    held = {
        Limit.REQUESTS_PER_SECOND: capacity.requests_per_second,
        Limit.TOKENS_PER_SECOND: capacity.tokens_per_second,
        Limit.CONCURRENCY: capacity.concurrency,
    }
    return [
        f"{model.model_id}: the recommended {item.limit.label}, {item.target:,g}, are more than the {most:,.4g} that "
        "the benchmark held"
        for item in model.limits
        if (most := held.get(item.limit)) is not None and item.target is not None and item.target > most
    ]
