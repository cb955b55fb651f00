"""Limits that follow the load: tighter while the machine is busy, looser while it is idle, and back again."""

import atexit
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modelquota._extras import extra
from modelquota._periodic import Periodic
from modelquota.quota.config import MAX_COUNT, ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE, Limit, ViolationAction
from modelquota.statefile.journal import Entries, Journal

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

__all__ = ["DEFAULT_FIELDS", "Adjustment", "LoadAdjuster", "cpu_load"]

logger = logging.getLogger("modelquota")

DEFAULT_FIELDS: Final = (CATALOGUE[Limit.RAM].quota_field, CATALOGUE[Limit.REQUESTS_PER_SECOND].quota_field)
"""The limits that are adjusted by default."""

_LIMIT_FIELDS = {field for record in CATALOGUE.values() for field in (record.quota_field, record.burst_field)}
_ADJUSTABLE = tuple(field for field in ResourceQuotaConfig.__dataclass_fields__ if field in _LIMIT_FIELDS)


def cpu_load() -> Callable[[], float]:
    """Return a function that returns the load of all processors together, 0.0 .. 1.0, since it was last called.

    Needs the extra ``modelquota[adjust]``. Let at least a tenth of a second pass between two calls.

    Raises
    ------
    ImportError
        `psutil` is not installed.
    """
    with extra("adjust", "psutil"):
        import psutil
    psutil.cpu_percent()  # the first call has nothing to compare with and returns 0
    return lambda: psutil.cpu_percent() / 100


@dataclass(frozen=True, slots=True)
class Adjustment:
    """A change of all limits.

    Attributes
    ----------
    load : float or None
        The load that caused it; None if it undoes an adjustment.
    before, factor : float
        What the limits were multiplied by before, and what they are multiplied by now; 1.0 is as configured.
    """

    load: float | None
    before: float
    factor: float


class LoadAdjuster(Periodic):
    """Tightens the limits of models above one load, relaxes them below another, and undoes both.

    A limit is always its *configured* value times a factor, so that adjustments do not compound. Above `high` the
    factor falls by `step`, at most once in `min_interval_sec` and not below `floor`; below `low` it rises by `step`, up
    to `ceiling`. From tightened it returns to 1 below ``high - hysteresis``, from relaxed above ``low + hysteresis``.
    A limit that someone else changes becomes the configured value: the factor is applied to it at the next poll. A
    limit that is not set stays unset, and one above 0 stays above 0. Usage is kept, as with any change of limits.

    Call `poll` from your own loop, or `start` a thread that does. `stop`, the end of a ``with``, and the end of the
    interpreter undo what was adjusted. If the manager has a state file, a journal beside it, ``<path>.adjusting``,
    records the configured limits: if the adjuster is killed, the next process that opens the file as a manager, or
    adjusts it, restores them; until then the other processes continue with the adjusted limits. A state file has one
    adjuster at a time: starting another, with `poll` or `start`, raises RuntimeError. So does a journal that belongs to
    another user or that others may write to; a process that opens such a file logs it and does not change the limits.
    Without a state file, limits end with their processes; but forked processes that outlive a killed adjuster keep its
    limits, so adjust in the process that ends last, or give the manager a path.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager whose limits are adjusted.
    load : callable, optional
        Returns the current load: 0 is idle, 1 is busy. By default `cpu_load`, which needs the extra
        ``modelquota[adjust]``. A non-finite load is ignored.
    models : iterable of str, optional
        The models to adjust; by default all, including those registered later.
    high, low : float
        Tighten above `high`, relax below `low`.
    hysteresis : float
        How far the load must return, below `high` or above `low`, before an adjustment is undone.
    step, floor, ceiling : float
        The factor's step, smallest and largest value: 0 < floor <= 1 <= ceiling. By default one step either way.
    min_interval_sec : float
        The shortest time between two changes of the factor, in seconds.
    fields : sequence of str
        The limits that are adjusted.
    tightened_action, relaxed_action : ViolationAction or str, optional
        Replace ``on_violation`` while limits are tightened or relaxed. By default it stays as it is. Note that
        ``"warn"`` admits everything.
    on_change : callable, optional
        Called with an `Adjustment` after each change, in the thread that polls.
    monotonic : callable, optional
        A clock that returns seconds and never goes back, for tests; `time.monotonic` by default.

    Raises
    ------
    ValueError
        A parameter is out of range, or a field is not a limit.
    ImportError
        No `load` is given and `psutil` is not installed.

    Examples
    --------
    >>> manager = ResourceQuotaManager()
    >>> manager.set_quota("llama", max_ram_mb=1000)
    >>> with LoadAdjuster(manager, load=lambda: 0.95) as adjuster:
    ...     adjuster.poll().factor, manager.get_quota("llama").max_ram_mb
    (0.8, 800)
    >>> manager.get_quota("llama").max_ram_mb
    1000
    """

    def __init__(
        self,
        manager: "ResourceQuotaManager",
        load: Callable[[], float] | None = None,
        *,
        models: Iterable[str] | None = None,
        high: float = 0.8,
        low: float = 0.3,
        hysteresis: float = 0.1,
        step: float = 0.2,
        floor: float = 0.8,
        ceiling: float = 1.2,
        min_interval_sec: float = 30.0,
        fields: Sequence[str] = DEFAULT_FIELDS,
        tightened_action: ViolationAction | str | None = None,
        relaxed_action: ViolationAction | str | None = None,
        on_change: Callable[[Adjustment], object] | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        _require(0 <= low < high, f"low is {low} and high {high}; give 0 <= low < high")
        _require(
            0 <= hysteresis <= high - low,
            f"hysteresis is {hysteresis}; give a number, 0 .. high - low ({high - low:g})",
        )
        _require(0 < step <= 1, f"step is {step}; give a number above 0, up to 1")
        _require(
            0 < floor <= 1 <= ceiling < math.inf,
            f"floor is {floor} and ceiling {ceiling}; give 0 < floor <= 1 <= ceiling",
        )
        _require(
            0 <= min_interval_sec < math.inf, f"min_interval_sec is {min_interval_sec}; give a finite number, 0 or more"
        )
        for field in fields:
            _require(field in _ADJUSTABLE, f"fields has {field!r}; give some of {', '.join(_ADJUSTABLE)}")
        self._manager = manager
        self._load = cpu_load() if load is None else load
        self._models = None if models is None else frozenset(models)
        self._high, self._low = high, low
        # rounded, since 0.8 - 0.1 is slightly above 0.7
        self._high_again, self._low_again = round(high - hysteresis, 9), round(low + hysteresis, 9)
        self._step, self._floor, self._ceiling = step, floor, ceiling
        self._min_interval_sec = min_interval_sec
        self._fields = tuple(fields)
        self._tightened_action = None if tightened_action is None else ViolationAction(tightened_action)
        self._relaxed_action = None if relaxed_action is None else ViolationAction(relaxed_action)
        self._on_change = on_change
        self._monotonic = monotonic
        self._lock = threading.RLock()  # a callback may stop or undo
        self._journal = None if manager.path is None else Journal(manager.path)
        self._undo_at_exit = False
        self._factor = 1.0
        self._changed_at = -math.inf
        self._configured: dict[str, dict[str, Any]] = {}
        self._applied: dict[str, dict[str, Any]] = {}

    @property
    def factor(self) -> float:
        """What the configured limits are multiplied by now."""
        return self._factor

    def poll(self) -> Adjustment | None:
        """Read the load, adjust all models to it, and return the change, or None if the factor does not change."""
        load = float(self._load())
        with self._lock:
            self._begin()
            now = self._monotonic()
            factor = self._wanted(load) if math.isfinite(load) else self._factor
            if now - self._changed_at < self._min_interval_sec:
                factor = self._factor
            change = self._change(load, factor)
            if change is not None:
                self._changed_at = now
            if self._journal is not None:
                self._journal.write(self._entries({}))
        self._tell(change)
        return change

    def undo(self) -> Adjustment | None:
        """Restore the configured limits of all models; a limit that someone else has set in the meantime stays."""
        if self._journal is not None and not self._journal.held:
            return None  # nothing is adjusted, or a parent process is the adjuster
        with self._lock:
            change = self._change(None, 1.0)
            if self._journal is not None:
                self._journal.remove()
            self._configured.clear()
            self._applied.clear()
            atexit.unregister(self.undo)
            self._undo_at_exit = False
        self._tell(change)
        return change

    def stop(self) -> None:
        """End the thread, if one was started, and undo."""
        super().stop()
        self.undo()

    def _wanted(self, load: float) -> float:
        """Return the factor for a load, given the current factor."""
        if load > self._high:
            return max(self._floor, round(min(self._factor, 1.0) - self._step, 9))
        if load < self._low:
            return min(self._ceiling, round(max(self._factor, 1.0) + self._step, 9))
        if (self._factor < 1 and load < self._high_again) or (self._factor > 1 and load > self._low_again):
            return 1.0
        return self._factor

    def _begin(self) -> None:
        with self._lock:
            if self._journal is not None and not self._journal.held:
                self._journal.claim(self._manager)
                self._configured.clear()  # inherited from a parent process
                self._applied.clear()
                self._factor, self._undo_at_exit = 1.0, False
                self._undo_later()

    def _undo_later(self) -> None:
        if not self._undo_at_exit:
            self._undo_at_exit = True
            atexit.register(self.undo)

    def _change(self, load: float | None, factor: float) -> Adjustment | None:
        before, self._factor = self._factor, factor
        if factor != 1:
            self._undo_later()
        try:
            self._adjust()
        except BaseException:
            self._factor = before
            raise
        return None if factor == before else Adjustment(load, before, factor)

    def _adjust(self) -> None:
        """Apply the factor to all models; their configured limits are on the disk before the first model is changed."""
        models = [
            model_id for model_id in self._manager.list_models() if self._models is None or model_id in self._models
        ]
        for model_id in self._configured.keys() - set(models):
            del self._configured[model_id], self._applied[model_id]
        while models:
            plans = {plan[0].model_id: plan for model_id in models if (plan := self._plan(model_id)) is not None}
            changed = {model_id: new for model_id, (old, new) in plans.items() if new is not old}
            if self._journal is not None and changed and self._factor != 1:
                self._journal.write(self._entries(changed))
            models = []
            for model_id, (old, new) in plans.items():
                if new is old or self._manager.replace_quota(old, new):
                    self._applied[model_id] = {field: getattr(new, field) for field in self._configured[model_id]}
                else:  # changed or removed in the meantime: try it again
                    models.append(model_id)

    def _plan(self, model_id: str) -> tuple[ResourceQuotaConfig, ResourceQuotaConfig] | None:
        """Return a model's current quota and the one it should have; None if it has none."""
        quota = self._manager.get_quota(model_id)
        if quota is None:
            self._configured.pop(model_id, None)
            self._applied.pop(model_id, None)
            return None
        # field by field: if someone else has changed one of them, the others are still ours
        applied, configured = self._applied.setdefault(model_id, {}), self._configured.setdefault(model_id, {})
        for field in (*self._fields, "on_violation"):
            value = getattr(quota, field)
            if field not in applied or applied[field] != value:
                configured[field] = value
                applied.pop(field, None)
        wanted: dict[str, Any] = {field: self._scaled(configured[field]) for field in self._fields}
        wanted["on_violation"] = self._action(configured["on_violation"])
        changes = {field: value for field, value in wanted.items() if value != getattr(quota, field)}
        return quota, quota.replace(**changes) if changes else quota

    def _entries(self, planned: dict[str, ResourceQuotaConfig]) -> Entries:
        """Return the journal's entries: what to restore after a crash before, during or after the planned change."""
        entries: Entries = {}
        for model_id, configured in self._configured.items():
            for field, value in configured.items():
                ours = [self._applied[model_id].get(field, value)]
                if model_id in planned:
                    ours.append(getattr(planned[model_id], field))
                ours = [each for each in dict.fromkeys(ours) if each != value]
                if ours:
                    entries.setdefault(model_id, {})[field] = {"configured": value, "set": ours}
        return entries

    def _scaled(self, limit: float | None) -> float | None:
        if limit is None or limit == 0 or self._factor == 1:
            return limit
        if isinstance(limit, int):
            return min(max(int(limit * self._factor), 1), MAX_COUNT)
        return limit * self._factor

    def _action(self, configured: ViolationAction) -> ViolationAction:
        if self._factor == 1:
            return configured
        return (self._tightened_action if self._factor < 1 else self._relaxed_action) or configured

    def _tell(self, change: Adjustment | None) -> None:
        if change is not None:
            logger.info("limits are adjusted from %g to %g times the configured ones", change.before, change.factor)
            if self._on_change is not None:
                self._on_change(change)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
