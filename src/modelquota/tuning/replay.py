"""Replays: what a set of quotas would have done with a trace of past requests.

A replay runs on a `ManualClock`, so an hour of traffic is decided in milliseconds and every run gives the same
report: change a limit, replay, compare.
"""

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from time import perf_counter_ns

import numpy as np
import numpy.typing as npt

from modelquota._core.state.clock import ManualClock
from modelquota.errors import UnknownModelError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.file import Quotas
from modelquota.quota.limits import ViolationAction
from modelquota.quota.patterns import QuotaTemplates
from modelquota.tuning.cells import MAX_SPAN_NS, Int64Array
from modelquota.tuning.report import ModelReplay, ReplayReport, part_of
from modelquota.tuning.simulate import Outcome, Simulation
from modelquota.tuning.trace import Trace

__all__ = ["ModelReplay", "ReplayReport", "replay", "selections", "with_patterns"]

REQUESTS_PER_CALL = 65_536
MAX_SPEED = 1e18
USER_PREFIX = "user:"
MODELS_NAMED_IN_ERROR = 5


def replay(
    trace: Trace,
    quotas: Mapping[str, ResourceQuotaConfig],
    *,
    model: str | None = None,
    speed: float | Fraction = 1,
    wait: bool = False,
    per_user: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> ReplayReport:
    """Check each request of a trace against quotas, at its own time, and report the outcome.

    A request costs its tokens, by kind if the quotas tell kinds apart, and no RAM or SSD. If the trace has durations,
    requests hold concurrency for that long; if it also has estimates, they are reserved, the prompt as input and the
    rest as output, and settled by the true tokens at the end.

    Parameters
    ----------
    trace : Trace
        From `read_trace`.
    quotas : mapping of str to ResourceQuotaConfig
        The quota of every model in the trace, e.g. from `load_quotas`, whose patterns apply too. Models that the trace
        does not name are left out of the report.
    model : str, optional
        The model to charge if the trace does not name models; by default the only model in `quotas`.
    speed : float or Fraction
        Above 0 and up to 1e18: 24 replays a day of traffic in an hour, 0.5 makes it last twice as long. Times are
        divided exactly and rounded down to ns; a float is taken as the decimal number it is written as. Durations stay.
    wait : bool
        Whether a request that throttles or queues waits as in `acquire`: in the queue, by priority, until it is
        admitted or its grace period has passed. Otherwise denied requests are not tried again. Waits are exact to 1 ms.
    per_user : bool
        Whether a request is also charged to its user, if that has a quota: that of the user's name as an id, or of
        that name after ``user:``.
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
        `speed` is out of range, or so small that the trace would last beyond 2**61 ns (73 years); `per_user`, and the
        trace names no user, or none of its users has a quota.
    """
    ratio = _ratio(speed, trace)
    templates = _templates(quotas)
    names = _models(trace, _add_patterns(quotas, templates, trace.models if model is None else (model,)), model)
    quotas = _add_patterns(quotas, templates, names)
    users = _user_ids(trace, quotas, templates) if per_user else {}
    quotas = _add_patterns(quotas, templates, tuple(users.values()))
    deciding = {*names, *users.values()}
    limits = [quotas[name].replace(model_id=name) for name in (*names, *users.values())]
    meters = [
        quota.replace(model_id=name)
        for name, quota in quotas.items()
        if name not in deciding and name.partition("#")[0] in deciding
    ]
    by_kind = bool(meters) or any(quota.token_weights != (1, 1, 1) for quota in limits)
    limits += meters
    times_ns = _divided(trace.times_ns, ratio)
    before_ns = perf_counter_ns()
    waits = wait and any(quota.on_violation in ("throttle", "queue") for quota in limits)
    if users or trace.durations_ns is not None:
        outcome = _simulated(_manager(limits), trace, times_ns, names, users, waits, by_kind, progress)
    elif waits:
        outcome = _waited(limits, trace, times_ns, names, by_kind, progress)
    else:
        outcome = _decided(_manager(limits), trace, times_ns, names, by_kind, progress)
    core_time_ns = perf_counter_ns() - before_ns
    tokens = trace.tokens
    return ReplayReport(
        trace=trace.path,
        requests=len(trace),
        duration_ns=int(times_ns[-1]) if len(trace) else 0,
        speed=float(ratio),
        wait=wait,
        out_of_order=trace.out_of_order,
        core_time_ns=core_time_ns,
        most_waiting=outcome.most_waiting,
        most_open=None if trace.durations_ns is None else outcome.most_open,
        models=tuple(
            part_of(name, times_ns, tokens, outcome, own)
            for name, own in zip(names, selections(trace.model_index, len(names)), strict=True)
        ),
        users=tuple(
            part_of(users[index], times_ns, tokens, outcome, own)
            for index, own in enumerate(selections(trace.user_index, len(trace.users)))
            if index in users
        )
        if users
        else (),
    )


def _manager(limits: Sequence[ResourceQuotaConfig]) -> ResourceQuotaManager:
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=len(limits))
    # What is denied is in the report; in the log of the program it would look as if it had happened.
    manager._events.on_violation = _ignore  # type: ignore[method-assign]
    for quota in limits:
        manager.set_quota(quota)
    return manager


def _ignore(model_id: str, result: object, since_last: int) -> None:
    pass


def _decided(
    manager: ResourceQuotaManager,
    trace: Trace,
    times_ns: Int64Array,
    names: Sequence[str],
    by_kind: bool,
    progress: Callable[[int, int], None] | None,
) -> Outcome:
    """Try every request once, at its time, as a batch; with its tokens by kind if the quotas tell them apart."""
    requests = len(trace)
    tokens = trace.kinds if by_kind else trace.tokens
    rows_of_models = manager.codes(names)
    codes = np.empty(requests, np.uint8)
    retry_after_ms = np.empty(requests, np.int64)
    for start in range(0, requests, REQUESTS_PER_CALL):
        part = slice(start, min(start + REQUESTS_PER_CALL, requests))
        index = 0 if trace.model_index is None else trace.model_index[part]
        rows = np.ascontiguousarray(np.broadcast_to(rows_of_models[index], (part.stop - start,)))
        manager.check_many(
            rows, tokens[part], codes[part], times_ns=times_ns[part], retry_after_ms=retry_after_ms[part]
        )
        if progress is not None:
            progress(part.stop, requests)
    return Outcome(
        codes=codes,
        waited_ns=np.zeros(requests, np.int64),
        # A batch does not say which requests violated a limit of `warn`: _warned counts them by the manager's use.
        over=_warned(manager, trace, names, codes),
        retry_after_ms=retry_after_ms,
        most_waiting=0,
        most_open=0,
    )


def _warned(
    manager: ResourceQuotaManager, trace: Trace, names: Sequence[str], codes: npt.NDArray[np.uint8]
) -> npt.NDArray[np.bool_]:
    """Mark as many admitted requests of each model as were admitted over a limit."""
    over = np.zeros(len(codes), np.bool_)
    for name, own in zip(names, selections(trace.model_index, len(names)), strict=True):
        report = manager.get_model_report(name)
        assert report is not None
        deciding = (report, *report.meters)
        if any(each.quota.on_violation is ViolationAction.WARN for each in deciding):
            rows = np.arange(len(codes))[own]
            admitted = rows[codes[rows] == 0]
            violations = sum(each.usage.total_violations for each in deciding)  # a check counts at one of them
            over[admitted[: violations - (len(rows) - len(admitted))]] = True
    return over


def _waited(
    limits: Sequence[ResourceQuotaConfig],
    trace: Trace,
    times_ns: Int64Array,
    names: Sequence[str],
    by_kind: bool,
    progress: Callable[[int, int], None] | None,
) -> Outcome:
    """Let requests wait. Before the first one that would be denied none waits, and a batch decides the same."""
    requests = len(trace)
    once = _decided(_manager(limits), trace, times_ns, names, by_kind, None)
    denied = np.flatnonzero(once.codes)
    if not len(denied):
        if progress is not None:
            progress(requests, requests)
        return once
    first = int(denied[0])
    manager = _manager(limits)
    head = _decided(manager, trace.select(slice(first)), times_ns[:first], names, by_kind, None)

    def step(done: int, _: int) -> None:
        if progress is not None:
            progress(first + done, requests)

    rest = _simulated(manager, trace.select(slice(first, None)), times_ns[first:], names, {}, True, by_kind, step)
    return Outcome(
        codes=np.concatenate((head.codes, rest.codes)),
        waited_ns=np.concatenate((head.waited_ns, rest.waited_ns)),
        over=np.concatenate((head.over, rest.over)),
        retry_after_ms=np.concatenate((head.retry_after_ms, rest.retry_after_ms)),
        most_waiting=rest.most_waiting,
        most_open=0,
    )


def _simulated(
    manager: ResourceQuotaManager,
    trace: Trace,
    times_ns: Int64Array,
    names: Sequence[str],
    users: Mapping[int, str],
    wait: bool,
    by_kind: bool,
    progress: Callable[[int, int], None] | None,
) -> Outcome:
    """Let requests wait, hold concurrency, and be charged to several ids."""
    models = np.zeros(len(trace), np.int64) if trace.model_index is None else trace.model_index
    pairs = models if trace.user_index is None or not users else models + len(names) * (trace.user_index + 1)
    numbers, groups = np.unique(pairs, return_inverse=True)
    ids = []
    for number in numbers.tolist():
        user = users.get(number // len(names) - 1) if users else None
        ids.append((names[number % len(names)],) if user is None else (user, names[number % len(names)]))
    tokens = trace.kinds if by_kind else trace.tokens
    durations_ns, estimated = trace.durations_ns, trace.estimated_tokens
    reserved = None
    if durations_ns is not None and estimated is not None:
        if by_kind:  # what is cached is not known before
            prompt = np.minimum(trace.input_tokens + trace.cached_tokens, estimated)
            guessed = np.stack((prompt, np.zeros_like(prompt), estimated - prompt), axis=1)
            reserved = np.where(estimated[:, np.newaxis] < 0, tokens, guessed)
        else:
            reserved = np.where(estimated < 0, tokens, estimated)
    return Simulation(manager, ids, wait=wait).run(
        times_ns,
        groups,
        tokens,
        reserved=reserved,
        durations_ns=durations_ns,
        priorities=trace.priorities,
        progress=progress,
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
    if ratio == 1:
        return times_ns
    numerator, denominator = ratio.as_integer_ratio()
    if numerator * denominator < 2**62:
        # times * denominator could overflow int64. The quotient is known to fit; rest * denominator fits by this test.
        whole, rest = np.divmod(times_ns, numerator)
        quotients: Int64Array = whole * denominator + rest * denominator // numerator
        return quotients
    return np.array([time_ns * denominator // numerator for time_ns in times_ns.tolist()], np.int64)


def with_patterns(quotas: Mapping[str, ResourceQuotaConfig], names: Sequence[str]) -> Mapping[str, ResourceQuotaConfig]:
    """Return quotas, and for the ids that have none those of the patterns of a quota file."""
    return _add_patterns(quotas, _templates(quotas), names)


def _templates(quotas: Mapping[str, ResourceQuotaConfig]) -> QuotaTemplates | None:
    return QuotaTemplates(quotas.patterns) if isinstance(quotas, Quotas) and quotas.patterns else None


def _add_patterns(
    quotas: Mapping[str, ResourceQuotaConfig], templates: QuotaTemplates | None, names: Sequence[str]
) -> Mapping[str, ResourceQuotaConfig]:
    """Add quotas from the patterns of a quota file for the ids that have none of their own."""
    if templates is None:
        return quotas
    found = {name: templates.resolve(name) for name in names if name not in quotas}
    for name in list(found):
        for meter, quota in templates.meters_of(name):
            found.setdefault(f"{name}#{meter}", quota.replace(model_id=f"{name}#{meter}"))
    return {**quotas, **{name: quota for name, quota in found.items() if quota is not None}}


def _user_ids(
    trace: Trace, quotas: Mapping[str, ResourceQuotaConfig], templates: QuotaTemplates | None
) -> dict[int, str]:
    """Return, by index, the ids of the users that have a quota."""
    if trace.user_index is None:
        raise ValueError("the trace names no users: a replay per user needs a column that says who made each request")
    ids = {}
    for index, user in enumerate(trace.users):
        for model_id in (user, USER_PREFIX + user):
            if model_id in quotas or (templates is not None and templates.resolve(model_id) is not None):
                ids[index] = model_id
                break
    if not ids:
        raise ValueError(
            f"none of the trace's {len(trace.users)} users has a quota, such as {trace.users[0]!r}; "
            f'add a table [defaults."{USER_PREFIX}*"] to the quotas'
        )
    return ids


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


def selections(index: npt.NDArray[np.int32] | None, names: int) -> Sequence[npt.NDArray[np.intp] | slice]:
    """Return, for each name, the places of its requests, in order; a request with -1 has no name."""
    if index is None:
        return [slice(None)]
    order = np.argsort(index, kind="stable")
    ends = np.cumsum(np.bincount(index + 1, minlength=names + 1))
    return list(np.split(order, ends[:-1]))[1:]
