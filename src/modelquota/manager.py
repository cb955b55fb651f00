"""The facade: words, units, validation, exceptions. The hot verbs are inherited from the core as they are."""

from __future__ import annotations

import functools
import operator
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import numpy as np

from modelquota._core.clock import ManualClock
from modelquota._core.mapping import MAX_MODELS_LIMIT
from modelquota._core.result import QuotaCheckResult
from modelquota._core.table import QuotaTable, RowHandle
from modelquota.config import MAX_COUNT, ResourceQuotaConfig
from modelquota.errors import UnknownModelError
from modelquota.limits import ViolationAction
from modelquota.report import ModelReport, QuotaStats, ResourceUsage, model_report, status_lines

if TYPE_CHECKING:
    import logging

    from numpy.typing import NDArray

_USAGE_FIELDS = tuple(ResourceUsage.__dataclass_fields__)
_SECOND_NS = 1_000_000_000
_INFO, _WARNING = 20, 30  # the levels' numbers, as the logging documentation gives them
_T = TypeVar("_T")


class ResourceQuotaManager(QuotaTable):
    """Quotas of many models, and the one question of an inference service: may this model take this request now?

    Every verb may be called from any thread. Processes forked after its creation share the state.

    Parameters
    ----------
    clock : ManualClock, optional
        Time as a parameter, for tests and replays. By default the time is that of ``CLOCK_MONOTONIC``.
    default_quota : ResourceQuotaConfig, optional
        A model that is checked and has no quota is registered with these limits. By default it is allowed and counted.
    max_models : int
        Size of the table, 1 .. 2**24. Memory is taken only for models in use, some 2.7 KB each.

    Raises
    ------
    TypeError, ValueError
        A parameter of another kind or out of range.

    Examples
    --------
    >>> manager = ResourceQuotaManager(clock=ManualClock())
    >>> manager.set_quota("llama", max_requests_per_second=2, burst_requests=0, on_violation="reject")
    >>> [bool(manager.check_quota("llama", estimated_tokens=100)) for _ in range(3)]
    [True, True, False]
    >>> result = manager.check_quota("llama", estimated_tokens=100)
    >>> result.limit.name, result.retry_after_ms
    ('REQUESTS_PER_SECOND', 1017)
    """

    def __init__(
        self,
        *,
        clock: ManualClock | None = None,
        default_quota: ResourceQuotaConfig | None = None,
        max_models: int = 65_536,
    ) -> None:
        max_models = operator.index(max_models)
        if not 1 <= max_models <= MAX_MODELS_LIMIT:
            raise ValueError(f"max_models is {max_models}; give an integer, 1 .. 2**24")
        if default_quota is not None and not isinstance(default_quota, ResourceQuotaConfig):
            raise TypeError(f"default_quota is {default_quota!r}; give a ResourceQuotaConfig, or None")
        super().__init__(max_models=max_models, clock=clock)
        self.default_quota = default_quota
        self._unknown_logged_second = -1
        self._unknown_held = 0

    # -- quotas

    def set_quota(self, config: ResourceQuotaConfig | str, /, **fields: Any) -> None:
        """Give a model its limits: ``set_quota(config)``, or ``set_quota("llama", max_ram_mb=1024)``.

        A known model has its limits replaced at the next check and keeps what it has used: never a refill, never an
        eviction.

        Raises
        ------
        QuotaConfigError
            A field that is not accepted; nothing is changed.
        CapacityError
            The table is full.
        """
        if isinstance(config, str):
            config = ResourceQuotaConfig(config, **fields)
        elif not isinstance(config, ResourceQuotaConfig):
            raise TypeError(f"config is {config!r}; give a ResourceQuotaConfig, or a model id and keywords")
        elif fields:
            raise TypeError("give a ResourceQuotaConfig or keywords, not both; config.replace(...) changes fields")
        self._put(config)

    def update_quota(self, model_id: str, /, **changes: Any) -> ResourceQuotaConfig:
        """Change the named fields of a model's quota and return the new one.

        Raises UnknownModelError where the model has no quota, QuotaConfigError where a field is not accepted.
        """
        while True:  # until nobody has changed it between the reading and the writing
            old = self.get_quota(model_id)
            if old is None:
                raise UnknownModelError(model_id)
            new = old.replace(**changes)
            if new.model_id != model_id:
                raise TypeError("model_id cannot be changed; set_quota for the new id and remove_quota for the old one")
            if self._swap(old, new):
                return new

    def remove_quota(self, model_id: str) -> bool:
        """Forget a model and what it has used; True if it was known. What it counted stays in `get_stats`."""
        return self._forget(model_id)

    def get_quota(self, model_id: str) -> ResourceQuotaConfig | None:
        """Return the model's quota, or None where it has none."""
        read = self._read(model_id)
        return None if read is None else ResourceQuotaConfig(model_id, **read[0])

    def model(self, model_id: str) -> ModelQuota:
        """Bind a model: its verbs without the look-up. Raises UnknownModelError where it has no quota."""
        return ModelQuota(self, model_id)

    # -- what the model uses

    def update_memory_usage(self, model_id: str, ram_mb: int, ssd_mb: int) -> None:
        """State what the model uses now, in MB (2**20 bytes), outside grants. Peaks are kept.

        A figure above the cap is recorded as it is; then nothing that needs memory is admitted until it falls.

        Raises
        ------
        UnknownModelError
            The model has no quota.
        TypeError, ValueError
            A figure that is no integer, or not in 0 .. 2**62; nothing is recorded.
        """
        self._state_memory(model_id, _megabytes("ram_mb", ram_mb), _megabytes("ssd_mb", ssd_mb))

    def reset_burst(self, model_id: str) -> None:
        """Forgive the burst in use: both long-run levels fall to at most max(rate, 1). Windows are not touched.

        Raises UnknownModelError where the model has no quota.
        """
        self._empty_burst(model_id)

    # -- reading

    def get_usage(self, model_id: str) -> ResourceUsage | None:
        """Return what the model uses now, under its lock; None where it has no quota."""
        read = self._read(model_id)
        return None if read is None else _usage_of(read[1])

    def get_model_report(self, model_id: str) -> ModelReport | None:
        """Return quota, use and utilisation of a model, one consistent view; None where it has no quota."""
        read = self._read(model_id)
        if read is None:
            return None
        return model_report(model_id, ResourceQuotaConfig(model_id, **read[0]), _usage_of(read[1]))

    def get_stats(self) -> QuotaStats:
        """Return the totals over all models, those that have been removed too."""
        totals = self._totals()
        violations = totals["violations"]
        denied = totals["rejected"] + totals["throttled"] + totals["queued"]
        return QuotaStats(
            total_checks=totals["allowed"] + denied,
            allowed_requests=totals["allowed"],
            total_violations=sum(violations),
            rejected_requests=totals["rejected"],
            throttled_requests=totals["throttled"],
            queued_requests=totals["queued"],
            warned_requests=sum(violations) - denied,
            ram_violations=violations[0],
            ssd_violations=violations[1],
            rate_violations=violations[2],
            quota_violations=violations[3],
            concurrency_violations=violations[4],
        )

    def snapshot(self) -> NDArray[np.void]:
        """Return the counters of all models at once: a structured array, a copy, one element a model.

        Fields: ``model_id`` (object, a str), the fields of `ResourceUsage` (int64: MB, requests, tokens), and the
        model's totals since it was registered: ``allowed_total``, ``rejected_total``, ``throttled_total``,
        ``queued_total``, ``warned_total`` (int64) and ``tokens_total`` (uint64, tokens charged). Each element is read
        under its model's lock.
        """
        ids, usage = self._read_all()
        fields = usage.dtype.descr
        array = np.empty(len(ids), dtype=[("model_id", object), *fields])
        array["model_id"] = ids
        for name, *_ in fields:
            array[name] = usage[name]
        return array

    def print_status(self, file: TextIO | None = None) -> None:
        """Write use against limits of all models, and the totals, to `file` (standard output by default)."""
        reports = [report for model_id in self.list_models() if (report := self.get_model_report(model_id)) is not None]
        print(status_lines(reports, self.get_stats()), file=sys.stdout if file is None else file)

    # -- called by the core

    def _adopt(self, model_id: str) -> bool:
        if self.default_quota is not None:
            self._put(self.default_quota.replace(model_id=model_id), only_new=True)
            return True
        self._unknown_held += 1
        clock = self.clock
        second = (time.monotonic_ns() if clock is None else clock.now_ns) // _SECOND_NS
        if second != self._unknown_logged_second:
            self._unknown_logged_second = second
            held, self._unknown_held = self._unknown_held, 0
            _log(
                _WARNING,
                "model %r has no quota: allowed (%d checks of unknown models since the last record)",
                model_id,
                held,
            )
        return False

    def _log_violation(self, model_id: str, result: QuotaCheckResult, stands_for: int) -> None:
        level = _INFO if result.action is ViolationAction.QUEUE else _WARNING
        if _logger().isEnabledFor(level):
            _log(
                level, "model %r: %s (%s; %d since the last record)", model_id, result.reason, result.action, stands_for
            )


class ModelQuota(RowHandle):
    """One model, bound: the manager's verbs without the look-up. Made by `ResourceQuotaManager.model`.

    After ``remove_quota`` every verb raises UnknownModelError, even where the id has been registered anew.

    Attributes
    ----------
    model_id : str
    manager : ResourceQuotaManager
    """

    if TYPE_CHECKING:

        @property
        def manager(self) -> ResourceQuotaManager: ...

    def get_quota(self) -> ResourceQuotaConfig:
        """Return the model's quota."""
        return self._alive(self._manager().get_quota(self.model_id))

    def get_usage(self) -> ResourceUsage:
        """Return what the model uses now."""
        return self._alive(self._manager().get_usage(self.model_id))

    def get_model_report(self) -> ModelReport:
        """Return quota, use and utilisation."""
        return self._alive(self._manager().get_model_report(self.model_id))

    def update_quota(self, **changes: Any) -> ResourceQuotaConfig:
        """Change the named fields and return the new quota."""
        return self._manager().update_quota(self.model_id, **changes)

    def update_memory_usage(self, ram_mb: int, ssd_mb: int) -> None:
        """State what the model uses now, in MB."""
        self._manager().update_memory_usage(self.model_id, ram_mb, ssd_mb)

    def reset_burst(self) -> None:
        """Forgive the burst in use."""
        self._manager().reset_burst(self.model_id)

    def __repr__(self) -> str:
        return f"<ModelQuota {self.model_id!r}>"

    def _manager(self) -> ResourceQuotaManager:
        self._require_alive()
        return self.manager

    def _alive(self, read: _T | None) -> _T:
        if read is None:
            raise UnknownModelError(self.model_id)
        return read


@functools.cache
def _logger() -> logging.Logger:
    import logging  # an eighth of the package's import, and most programs never meet a violation at start

    logger = logging.getLogger("modelquota")
    logger.addHandler(logging.NullHandler())
    return logger


def _log(level: int, message: str, *values: object) -> None:
    """Log, come what may: the decision stands, and a handler that raises must not keep it from its caller."""
    try:
        _logger().log(level, message, *values)
    except Exception:
        import traceback

        traceback.print_exc()  # to sys.stderr, as logging itself does


def _megabytes(name: str, value: int) -> int:
    megabytes = operator.index(value)
    if not 0 <= megabytes <= MAX_COUNT:
        raise ValueError(f"{name} is {megabytes}; give an integer, 0 .. 2**62")
    return megabytes


def _usage_of(record: dict[str, int]) -> ResourceUsage:
    return ResourceUsage(**{name: record[name] for name in _USAGE_FIELDS})
