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
from modelquota.errors import CapacityError, UnknownModelError
from modelquota.manager import ResourceQuotaManager
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.file import Quotas
from modelquota.quota.limits import ViolationAction
from modelquota.quota.patterns import QuotaTemplates
from modelquota.tuning.cells import MAX_SPAN_NS, Int64Array
from modelquota.tuning.report import ModelReplay, ReplayReport
from modelquota.tuning.simulate import Outcome, Simulation
from modelquota.tuning.tally import Requests, Tally, joined
from modelquota.tuning.trace import StreamError, Trace

__all__ = ["ModelReplay", "Replay", "ReplayReport", "replay", "selections", "with_patterns"]

REQUESTS_PER_CALL = 65_536
MAX_SPEED = 1e18
USER_PREFIX = "user:"
# Of a trace that is read while it is replayed it is not known which ids it will name. What is not used takes no memory.
ROOM_FOR_PATTERNS = 1 << 16
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
    return Replay(quotas, model=model, speed=speed, wait=wait, per_user=per_user).whole(trace, progress)


class Replay:
    """A replay of a trace that comes in parts, for example from `TraceStream`: the report is that of the whole.

    Parameters
    ----------
    quotas : mapping of str to ResourceQuotaConfig
    model, speed, wait, per_user
        As for `replay`.

    Raises
    ------
    ValueError
        `speed` is out of range.
    """

    def __init__(
        self,
        quotas: Mapping[str, ResourceQuotaConfig],
        *,
        model: str | None = None,
        speed: float | Fraction = 1,
        wait: bool = False,
        per_user: bool = False,
    ) -> None:
        self._ratio = _ratio(speed)
        self._speed = speed
        self._quotas = quotas
        self._templates = _templates(quotas)
        self._model = model
        self._wait = wait
        self._per_user = per_user
        self._names: tuple[str, ...] = ()
        self._users: dict[int, str] = {}
        self._users_seen: tuple[str, ...] = ()
        self._by_kind = False
        self._waits = False
        self._manager: ResourceQuotaManager | None = None
        self._rows_of_models: Int64Array = np.zeros(0, np.int64)
        self._simulation: Simulation | None = None
        self._groups: dict[int, int] = {}
        self._held: bool | None = None
        self._models = Tally()
        self._user_tally = Tally()
        # Of the requests that are not decided: their numbers, as models' and as users'.
        self._open: tuple[Int64Array, Requests, Requests | None] | None = None
        self._requests = 0
        self._last_ns = 0
        self._core_time_ns = 0
        self._path, self._out_of_order = "", 0

    def whole(self, trace: Trace, progress: Callable[[int, int], None] | None = None) -> ReplayReport:
        """Replay a whole trace, as `replay` does, and report."""
        _require_span(trace.duration_ns, self._speed, self._ratio)
        self._meet(trace)
        self._require_users()
        requests = len(trace)
        self._held = trace.durations_ns is not None
        for start in range(0, requests, REQUESTS_PER_CALL):
            part = slice(start, min(start + REQUESTS_PER_CALL, requests))
            self.feed(trace.select(part))
            if progress is not None:
                progress(part.stop, requests)
        return self.report()

    def feed(self, trace: Trace) -> None:
        """Replay the next requests, which are no earlier than those before.

        Parameters
        ----------
        trace : Trace
            Its times count from the first request of all; its models and users begin with those of the part before.

        Raises
        ------
        UnknownModelError, ValueError
            As `replay`.
        StreamError
            It has what only a replay of the whole trace can do: durations, though no part before had any; the first
            model or user whose quota tells kinds of tokens apart, while requests wait or are open; or more ids that
            match patterns of the quotas than the 65,536 that there is room for.
        """
        _require_span(trace.duration_ns, self._speed, self._ratio)
        self._meet(trace)
        if self._held is None:
            self._held = trace.durations_ns is not None
        elif not self._held and trace.durations_ns is not None:
            raise StreamError("the first requests have no durations, and later ones have", trace.path)
        times_ns = _divided(trace.times_ns, self._ratio)
        if len(trace):
            self._last_ns = int(times_ns[-1])
        tokens = trace.kinds if self._by_kind else trace.tokens
        if self._simulation is None and (self._held or self._per_user):
            self._simulate()
        done = 0
        if self._simulation is None:
            done = self._decide(trace, times_ns, tokens)
        if self._simulation is not None and done < len(trace):
            rest = slice(done, None)
            self._run(trace.select(rest), times_ns[rest], tokens[rest])

    def report(self) -> ReplayReport:
        """Let what still waits be decided, and report; nothing can be fed after this.

        Raises
        ------
        ValueError
            The replay is per user, and the trace names no user, or none of its users has a quota.
        """
        self._require_users()
        if self._simulation is None:
            self._count_warned()
        else:
            before_ns = perf_counter_ns()
            outcome = self._simulation.finish()
            self._core_time_ns += perf_counter_ns() - before_ns
            self._add(None, None, outcome)
        simulation = self._simulation
        return ReplayReport(
            trace=self._path,
            requests=self._requests,
            duration_ns=self._last_ns,
            speed=float(self._ratio),
            wait=self._wait,
            out_of_order=self._out_of_order,
            core_time_ns=self._core_time_ns,
            most_waiting=0 if simulation is None else simulation.most_waiting,
            most_open=None if not self._held else 0 if simulation is None else simulation.most_open,
            models=self._models.reports(dict(enumerate(self._names))),
            users=self._user_tally.reports(self._users),
        )

    def close(self) -> None:
        """Let requests that wait or are open go if there will be no report. To be called if anything was raised."""
        if self._simulation is not None:
            self._simulation.abandon()

    # -- ids

    def _meet(self, trace: Trace) -> None:
        """Set the quotas of the models and users that are new."""
        self._path, self._out_of_order = trace.path, trace.out_of_order
        users = trace.users if self._per_user else ()
        models = self._names if trace.model_index is None else trace.models
        if self._manager is not None and len(models) == len(self._names) and len(users) == len(self._users_seen):
            return
        quotas = _add_patterns(self._quotas, self._templates, trace.models if self._model is None else (self._model,))
        names = _models(trace, quotas, self._model)
        quotas = _add_patterns(quotas, self._templates, names)
        new_users = _user_ids(users, len(self._users_seen), quotas, self._templates)
        quotas = _add_patterns(quotas, self._templates, tuple(new_users.values()))
        known = {*self._names, *self._users.values()}
        new = [name for name in dict.fromkeys((*names, *new_users.values())) if name not in known]
        deciding = set(new)
        limits = [quotas[name].replace(model_id=name) for name in new]
        meters = [
            quota.replace(model_id=name)
            for name, quota in quotas.items()
            if name not in deciding and name not in known and name.partition("#")[0] in deciding
        ]
        if not self._by_kind and (meters or any(quota.token_weights != (1, 1, 1) for quota in limits)):
            if self._simulation is not None:
                raise StreamError(f"no quota tells kinds of tokens apart before that of {new[0]!r}", trace.path)
            self._by_kind = True
        limits += meters
        self._names = names
        self._users |= new_users
        self._users_seen = users
        self._models.grow(len(names))
        self._user_tally.grow(len(users))
        self._waits = self._waits or (
            self._wait and any(quota.on_violation in ("throttle", "queue") for quota in limits)
        )
        if self._manager is None:
            room = 0 if self._templates is None else ROOM_FOR_PATTERNS
            self._manager = _manager(len(limits) + len(self._quotas) + room)
        try:
            for quota in limits:
                self._manager.set_quota(quota)
        except CapacityError:
            raise StreamError(f"more than {ROOM_FOR_PATTERNS:,} ids match patterns of the quotas", trace.path) from None
        self._rows_of_models = self._manager.codes(names)

    def _require_users(self) -> None:
        if not self._per_user or self._users:
            return
        if not self._users_seen:
            raise ValueError(
                "the trace names no users: a replay per user needs a column that says who made each request"
            )
        raise ValueError(
            f"none of the trace's {len(self._users_seen)} users has a quota, such as {self._users_seen[0]!r}; "
            f'add a table [defaults."{USER_PREFIX}*"] to the quotas'
        )

    # -- decisions

    def _decide(self, trace: Trace, times_ns: Int64Array, tokens: Int64Array) -> int:
        """Try requests once, at their times, as a batch. If requests can wait: up to the first that is denied.

        Before it none waits, and a batch decides the same. From it on, all are simulated. Return how many are decided.
        """
        assert self._manager is not None
        requests = len(trace)
        index = 0 if trace.model_index is None else trace.model_index
        rows = np.ascontiguousarray(np.broadcast_to(self._rows_of_models[index], (requests,)))
        codes = np.empty(requests, np.uint8)
        before_ns = perf_counter_ns()
        if self._waits:
            retry_after_ms = np.zeros(requests, np.int64)
            done = self._manager._check_until_denied(rows, tokens, codes, times_ns)
            if done and codes[done - 1]:
                done -= 1
                tried = 0 if trace.model_index is None else int(trace.model_index[done])
        else:
            retry_after_ms = np.empty(requests, np.int64)
            self._manager.check_many(rows, tokens, codes, times_ns=times_ns, retry_after_ms=retry_after_ms)
            done = requests
        self._core_time_ns += perf_counter_ns() - before_ns
        head = trace if done == requests else trace.select(slice(done))
        part = slice(done)
        outcome = Outcome(
            rows=np.arange(self._requests, self._requests + done),
            codes=codes[part],
            waited_ns=np.zeros(done, np.int64),
            # A batch does not say which requests violated a limit of `warn`: they are counted by the manager's use.
            over=np.zeros(done, np.bool_),
            retry_after_ms=retry_after_ms[part],
        )
        self._add(head, times_ns[part], outcome)
        if done < requests:
            self._count_warned(tried)
            self._simulate()
        return done

    def _count_warned(self, tried: int = -1) -> None:
        """Count what batches have admitted over a limit; one that the model `tried` was denied is tried again."""
        assert self._manager is not None
        for number, name in enumerate(self._names):
            report = self._manager.get_model_report(name)
            assert report is not None
            deciding = (report, *report.meters)
            if any(each.quota.on_violation is ViolationAction.WARN for each in deciding):
                # a check counts at one of them
                violations = sum(each.usage.total_violations for each in deciding) - (number == tried)
                self._models.warned(number, violations - self._models.denied(number))

    def _simulate(self) -> None:
        """From here on, let requests wait, hold concurrency, and be charged to several ids."""
        assert self._manager is not None
        self._simulation = Simulation(self._manager, (), wait=self._wait, held=bool(self._held), first=self._requests)

    def _run(self, trace: Trace, times_ns: Int64Array, tokens: Int64Array) -> None:
        """Feed the simulation."""
        assert self._simulation is not None
        reserved = None
        if trace.durations_ns is not None and trace.estimated_tokens is not None:
            reserved = self._reserved(trace, trace.estimated_tokens, tokens)
        groups = self._groups_of(trace)
        before_ns = perf_counter_ns()
        outcome = self._simulation.feed(
            times_ns,
            groups,
            tokens,
            reserved=reserved,
            durations_ns=trace.durations_ns,
            priorities=trace.priorities,
        )
        self._core_time_ns += perf_counter_ns() - before_ns
        self._add(trace, times_ns, outcome)

    def _reserved(self, trace: Trace, estimated: Int64Array, tokens: Int64Array) -> Int64Array:
        if not self._by_kind:
            return np.where(estimated < 0, tokens, estimated)
        # What is cached is not known before.
        prompt = np.minimum(trace.input_tokens + trace.cached_tokens, estimated)
        guessed = np.stack((prompt, np.zeros_like(prompt), estimated - prompt), axis=1)
        return np.where(estimated[:, np.newaxis] < 0, tokens, guessed)

    def _groups_of(self, trace: Trace) -> npt.NDArray[np.integer]:
        """Return the simulation's group of each request: those for the same model and user."""
        assert self._simulation is not None
        models = np.zeros(len(trace), np.int64) if trace.model_index is None else trace.model_index.astype(np.int64)
        pairs = models << 32
        if self._per_user and trace.user_index is not None:
            pairs += trace.user_index.astype(np.int64) + 1
        numbers, places = np.unique(pairs, return_inverse=True)
        for number in numbers.tolist():
            if number not in self._groups:
                name = self._names[number >> 32]
                user = self._users.get((number & 0xFFFFFFFF) - 1)
                self._groups[number] = len(self._groups)
                self._simulation.add_group((name,) if user is None else (user, name))
        found: npt.NDArray[np.integer] = np.array([self._groups[number] for number in numbers.tolist()])[places]
        return found

    # -- sums

    def _add(self, trace: Trace | None, times_ns: Int64Array | None, outcome: Outcome) -> None:
        """Add requests, and what has become of them or of earlier ones, to the sums."""
        numbers = np.arange(0)
        asked = NOTHING
        of_users = NOTHING if self._per_user else None
        if trace is not None and times_ns is not None:
            numbers = np.arange(self._requests, self._requests + len(trace))
            asked = _of_models(trace, times_ns)
            if self._per_user:
                of_users = _of_users(trace, times_ns)
            self._requests += len(trace)
        decided, decided_users = asked, of_users
        if self._open is not None or len(outcome.rows) < len(numbers):
            if self._open is not None:
                numbers = np.concatenate((self._open[0], numbers))
                decided = joined((self._open[1], asked))
                if of_users is not None and self._open[2] is not None:
                    decided_users = joined((self._open[2], of_users))
            places = np.searchsorted(numbers, outcome.rows)
            left = np.ones(len(numbers), np.bool_)
            left[places] = False
            self._open = None
            if left.any():
                self._open = numbers[left], decided[left], None if decided_users is None else decided_users[left]
            decided = decided[places]
            decided_users = None if decided_users is None else decided_users[places]
        self._models.add(asked, decided, outcome)
        if of_users is not None and decided_users is not None:
            self._user_tally.add(of_users, decided_users, outcome)


def _manager(most: int) -> ResourceQuotaManager:
    manager = ResourceQuotaManager(clock=ManualClock(), max_models=most)
    # What is denied is in the report; in the log of the program it would look as if it had happened.
    manager._events.on_violation = _ignore  # type: ignore[method-assign]
    return manager


def _ignore(model_id: str, result: object, since_last: int) -> None:
    pass


NOTHING = Requests(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))


def _of_models(trace: Trace, times_ns: Int64Array) -> Requests:
    index = np.zeros(len(trace), np.int32) if trace.model_index is None else trace.model_index
    return Requests(times_ns, trace.tokens, index)


def _of_users(trace: Trace, times_ns: Int64Array) -> Requests:
    index = np.full(len(trace), -1, np.int32) if trace.user_index is None else trace.user_index
    return Requests(times_ns, trace.tokens, index)


def _ratio(speed: float | Fraction) -> Fraction:
    if not 0 < speed <= MAX_SPEED:
        raise ValueError(f"speed is {speed}; expected above 0 and up to {MAX_SPEED:.0e}, e.g. 24: a day in an hour")
    return Fraction(str(speed) if isinstance(speed, float) else speed)


def _require_span(duration_ns: int, speed: float | Fraction, ratio: Fraction) -> None:
    if duration_ns / ratio > MAX_SPAN_NS:
        raise ValueError(
            f"speed is {speed}, so small that this trace would last more than 73 years; "
            f"expected at least {float(Fraction(duration_ns, MAX_SPAN_NS)):.3g}"
        )


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
    users: Sequence[str], known: int, quotas: Mapping[str, ResourceQuotaConfig], templates: QuotaTemplates | None
) -> dict[int, str]:
    """Return, by index, the ids of the users that have a quota, without those that are known."""
    ids = {}
    for index in range(known, len(users)):
        for model_id in (users[index], USER_PREFIX + users[index]):
            if model_id in quotas or (templates is not None and templates.resolve(model_id) is not None):
                ids[index] = model_id
                break
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
