"""Alerts: rules over what a manager's models use, evaluated once by `check_alerts`, or watched by `AlertMonitor`."""

import enum
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from modelquota._periodic import Periodic
from modelquota.quota.limits import CATALOGUE, Limit
from modelquota.reading.utilization import LIMITS, read_utilization

if TYPE_CHECKING:
    from modelquota.reading.reader import QuotaReader

__all__ = ["DEFAULT_RULES", "Alert", "AlertMonitor", "AlertRule", "ClusterMeasure", "Severity", "check_alerts"]

logger = logging.getLogger("modelquota")
_Key = tuple[str, str | None]


class Severity(enum.StrEnum):
    """How urgent an alert is."""

    WARNING = "warning"
    """Needs attention, but not at once."""
    CRITICAL = "critical"
    """Requests are being denied, or soon will be."""


class ClusterMeasure(enum.Enum):
    """What a rule can evaluate of a host's part in a cluster."""

    DEGRADED = "1 while the store is not reached, or the lease has ended; otherwise 0"
    STARVED = "requests denied for lack of share; of the process that exchanges the host's shares"
    GHOSTS = "what hosts that are gone still hold unused, in percent of a limit; the highest of each model"


@dataclass(frozen=True, slots=True)
class AlertRule:
    """When to raise an alert.

    Parameters
    ----------
    name : str
        Name of the rule in its alerts.
    severity : Severity
        Severity of its alerts; at most a warning for a limit that denies nothing, as under the action ``warn``.
    threshold : float
        An alert is raised above it: percent of `limit`, a number of violations, or as `cluster` says.
    limit : Limit, optional
        The limit whose use is evaluated, model by model. None evaluates the violations of all models together, of
        which only denials count: no warnings, and no requests that wait or were served after a wait.
    cluster : ClusterMeasure, optional
        What to evaluate of the cluster instead. There is no such value without a cluster.
    clear_at : float, optional
        `AlertMonitor` clears at or below it; by default at 95 % of the threshold, so that a value that
        oscillates around the threshold raises one alert and not many.

    Raises
    ------
    ValueError
        `threshold` is negative or NaN, `clear_at` is not in 0 .. threshold, or both `limit` and `cluster` are given.
    """

    name: str
    severity: Severity
    threshold: float
    limit: Limit | None = None
    clear_at: float | None = None
    cluster: ClusterMeasure | None = None

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold is {self.threshold}; give a number, 0 or more")
        if self.clear_at is not None and not 0 <= self.clear_at <= self.threshold:
            raise ValueError(f"clear_at is {self.clear_at}; give a number, 0 .. threshold ({self.threshold:g})")
        if self.limit is not None and self.cluster is not None:
            raise ValueError(f"limit is {self.limit!r} and cluster is {self.cluster!r}; give one of them")

    @property
    def clears_at(self) -> float:
        """`clear_at`, or its default."""
        return 0.95 * self.threshold if self.clear_at is None else self.clear_at


_MESSAGES: Final = {
    None: "{value:,.0f} quota violations",
    ClusterMeasure.DEGRADED: "this host does not reach the store that hosts share their limits in",
    ClusterMeasure.STARVED: "{value:,.0f} requests denied for lack of share",
    ClusterMeasure.GHOSTS: "model {model}: hosts that are gone hold {value:.1f} % of a limit unused",
}

DEFAULT_RULES: Final = (
    AlertRule("violations", Severity.WARNING, 1000),
    AlertRule("ram", Severity.CRITICAL, 90, Limit.RAM),
    AlertRule("ssd", Severity.CRITICAL, 90, Limit.SSD),
    *(
        AlertRule(f"{limit.window.adjective}_{limit.unit}", Severity.WARNING, 80, limit.limit)
        for limit in CATALOGUE.values()
        if limit.window is not None and not limit.is_rate
    ),
    AlertRule("queue", Severity.WARNING, 80, Limit.QUEUE),
    AlertRule("cluster_degraded", Severity.CRITICAL, 0, cluster=ClusterMeasure.DEGRADED),
    AlertRule("cluster_starved", Severity.WARNING, 100, cluster=ClusterMeasure.STARVED),
    AlertRule("cluster_ghosts", Severity.WARNING, 20, cluster=ClusterMeasure.GHOSTS),
)
"""More than 1,000 violations; memory above 90 %; a window longer than a second, or the queue, above 80 %.

In a cluster also: a store that is not reached; more than 100 requests denied for lack of share; and hosts that are gone
and hold more than 20 % of a limit unused.
"""


@dataclass(frozen=True, slots=True)
class Alert:
    """A rule that holds for a model, or for all of them together.

    Attributes
    ----------
    rule : str
        Name of the rule.
    severity : Severity
    model_id : str or None
        None if the rule is about all models together, or about the host.
    message : str
        One sentence for a human reader.
    value, threshold : float
        The current value, and the threshold that it exceeds; see `AlertRule`.
    """

    rule: str
    severity: Severity
    model_id: str | None
    message: str
    value: float
    threshold: float


def check_alerts(manager: "QuotaReader", rules: Sequence[AlertRule] = DEFAULT_RULES) -> list[Alert]:
    """Evaluate all rules now; violations count from the manager's creation.

    Returns
    -------
    list of Alert
        By rule; for each, the models whose limit denies before the others, in order of registration. Empty if no rule
        holds.

    Examples
    --------
    >>> manager = ResourceQuotaManager()
    >>> manager.set_quota("llama", max_ram_mb=1000)
    >>> manager.update_memory_usage("llama", ram_mb=950, ssd_mb=0)
    >>> [(alert.severity.value, alert.message) for alert in check_alerts(manager)]
    [('critical', "model 'llama': RAM at 95.0 % of the limit")]
    """
    state = _State(manager)
    return [
        _alert(rule, model_id, value, denies=denies)
        for rule in rules
        for model_id, value, denies in state.values(rule)
        if value > rule.threshold
    ]


class AlertMonitor(Periodic):
    """Reports once when a rule begins to hold and once when it no longer does.

    A rule begins to hold when its value exceeds the threshold, and ends when it is at or below ``rule.clears_at``. An
    alert for a model that has been removed is cleared. Call `poll` from your own loop, or `start` a thread that does.

    Parameters
    ----------
    manager : ResourceQuotaManager or QuotaView
        The manager to watch.
    rules : sequence of AlertRule
        The rules, each with a different name.
    on_raise, on_clear : callable, optional
        Called with the `Alert`, in the thread that polls; an exception from one is logged and stops nothing.
    violations_window_sec : float
        Violations, and denials for lack of share, count if they were seen within this many seconds before a poll: an
        all-time total would never clear.
    monotonic : callable, optional
        A clock in seconds that never goes back, for tests; `time.monotonic` by default.

    Raises
    ------
    ValueError
        Two rules have the same name, or the window is not above 0.
    """

    def __init__(
        self,
        manager: "QuotaReader",
        rules: Sequence[AlertRule] = DEFAULT_RULES,
        *,
        on_raise: Callable[[Alert], object] | None = None,
        on_clear: Callable[[Alert], object] | None = None,
        violations_window_sec: float = 3600.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        if len({rule.name for rule in rules}) < len(rules):
            raise ValueError(f"rules have the names {[rule.name for rule in rules]}; give each a name of its own")
        if not violations_window_sec > 0:
            raise ValueError(f"violations_window_sec is {violations_window_sec}; give a number of seconds above 0")
        self._manager = manager
        self._rules = tuple(rules)
        self._on_raise = on_raise
        self._on_clear = on_clear
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._active: dict[_Key, Alert] = {}
        state = _State(manager)
        self._violations = _Recent(violations_window_sec, monotonic(), state.violations)
        self._starved = _Recent(violations_window_sec, monotonic(), state.starved)

    @property
    def active(self) -> list[Alert]:
        """The alerts that hold, with the values of the last poll, oldest first."""
        with self._lock:
            return list(self._active.values())

    def poll(self) -> tuple[list[Alert], list[Alert]]:
        """Evaluate all rules, call the callbacks, and return the alerts raised and the alerts cleared."""
        with self._lock:
            raised, cleared = self._judge()
        for alerts, callback in ((raised, self._on_raise), (cleared, self._on_clear)):
            for alert in alerts:
                try:
                    if callback is not None:
                        callback(alert)
                except Exception:
                    logger.exception("the callback for an alert has failed: %s", alert.message)
        return raised, cleared

    def _judge(self) -> tuple[list[Alert], list[Alert]]:
        state, now = _State(self._manager), self._monotonic()
        state.violations = self._violations.of(now, state.violations)
        state.starved = self._starved.of(now, state.starved)
        raised, cleared, gone = [], [], dict(self._active)
        for rule in self._rules:
            for model_id, value, denies in state.values(rule):
                key = rule.name, model_id
                held = gone.pop(key, None)
                if value > (rule.threshold if held is None else rule.clears_at):
                    self._active[key] = _alert(rule, model_id, value, denies=denies)
                    if held is None:
                        raised.append(self._active[key])
                elif held is not None:
                    del self._active[key]
                    cleared.append(_alert(rule, model_id, value, denies=denies))
        for key, alert in gone.items():  # its model has been removed
            del self._active[key]
            cleared.append(alert)
        return raised, cleared


class _Recent:
    """How much a total that only grows has grown within a window of time."""

    def __init__(self, window_sec: float, now: float, total: int) -> None:
        self._window_sec = window_sec
        self._totals = deque([(now, total)])

    def of(self, now: float, total: int) -> int:
        if total < self._totals[-1][1]:  # it is counted from 0 again, by another process
            self._totals = deque([(now, 0)])
        # keep the newest total that is at least as old as the window: it is subtracted
        while len(self._totals) > 1 and self._totals[1][0] <= now - self._window_sec:
            self._totals.popleft()
        recent = total - self._totals[0][1]
        if total != self._totals[-1][1]:
            self._totals.append((now, total))
        return recent


class _State:
    """What rules evaluate, read at one time."""

    def __init__(self, manager: "QuotaReader") -> None:
        self._found = read_utilization(manager)
        self.violations = manager.get_stats().denied_requests
        self.starved = 0
        self._cluster: str | None = None
        self._ghosts: dict[str, float] = {}
        if manager.cluster is not None:
            status = manager.cluster.status()
            self._cluster, self.starved = status.state, status.starved
            for share in manager.cluster.shares():
                percent = 100 * share.ghosts / share.whole if share.whole else 0.0
                self._ghosts[share.model_id] = max(percent, self._ghosts.get(share.model_id, 0.0))

    def values(self, rule: AlertRule) -> Iterator[tuple[str | None, float, bool]]:
        """Yield each value that a rule evaluates, with its model, and whether a violation of it is denied."""
        if rule.cluster is not None:
            yield from self._values_of_cluster(rule.cluster)
            return
        if rule.limit is None:
            yield None, float(self.violations), True
            return
        found = self._found
        values, denying = found.of(rule.limit).tolist(), found.denying[:, LIMITS.index(rule.limit)]
        for index in np.argsort(~denying, kind="stable").tolist():
            yield found.model_ids[index], values[index], bool(denying[index])

    def _values_of_cluster(self, measure: ClusterMeasure) -> Iterator[tuple[str | None, float, bool]]:
        if measure is ClusterMeasure.GHOSTS:
            for model_id, percent in self._ghosts.items():
                yield model_id, percent, True
        elif self._cluster is not None:
            down = self._cluster in ("degraded", "expired")
            yield None, float(down if measure is ClusterMeasure.DEGRADED else self.starved), True


def _alert(rule: AlertRule, model_id: str | None, value: float, *, denies: bool) -> Alert:
    if rule.limit is None:
        message = _MESSAGES[rule.cluster].format(model=repr(model_id), value=value)
        return Alert(rule.name, rule.severity, model_id, message, value, rule.threshold)
    message = f"model {model_id!r}: {rule.limit.label} at {value:.1f} % of the limit"
    if denies:
        return Alert(rule.name, rule.severity, model_id, message, value, rule.threshold)
    return Alert(rule.name, Severity.WARNING, model_id, f"{message}, which denies nothing", value, rule.threshold)
