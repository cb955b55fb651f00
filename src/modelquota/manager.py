"""`ResourceQuotaManager`, the public class: validates, converts units and raises; the hot verbs are the core's own."""

from __future__ import annotations

import functools
import operator
import os
import time
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from modelquota._core.state.clock import ManualClock
from modelquota._core.state.mapping import MAX_MODELS_LIMIT
from modelquota._core.table.grant import Grant
from modelquota._core.table.handle import RowHandle
from modelquota._core.table.result import QuotaCheckResult
from modelquota._core.table.table import QuotaTable
from modelquota._log import log as _log
from modelquota._log import logger
from modelquota.errors import QuotaConfigError, UnknownModelError
from modelquota.quota.config import MAX_COUNT, ResourceQuotaConfig, plain_model_id, require_fields
from modelquota.quota.limits import ViolationAction
from modelquota.quota.patterns import DefaultQuota, QuotaTemplates
from modelquota.quota.tokens import TokenCount
from modelquota.reading.reader import QuotaReader
from modelquota.waiting.decorator import limit
from modelquota.waiting.thread import acquire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from typing import SupportsIndex

    import numpy as np
    from numpy.typing import NDArray

    from modelquota.cluster.member import Member
    from modelquota.cluster.redis import RedisStore
    from modelquota.monitoring.ledger.grants import GrantLedger
    from modelquota.reading.report import ModelReport, ResourceUsage
    from modelquota.reading.view import QuotaView
    from modelquota.waiting.task import Acquisition

_SECOND_NS = 1_000_000_000
_INFO, _WARNING = 20, 30  # the levels' numbers, as the logging documentation gives them
_ACCEPTED_ON_SIGHT = "an id without '#', since default_quota registers meters with their model only"
_P = ParamSpec("_P")
_T = TypeVar("_T")


class ResourceQuotaManager(QuotaTable, QuotaReader):
    """Quotas of many models, and the one question of an inference service: may this model take this request now?

    Every verb may be called from any thread. Processes forked after its creation share the state. Those that are
    started otherwise (spawn, forkserver) share it if it has a `path`: it is pickled, and copied, as that path, with its
    `default_quota`. Without a path, or with a ManualClock, that is a TypeError.

    Which verb to use:

    - `check_quota` decides at once and charges what it admits: for rate and token limits when nothing is held
      afterwards. It never waits, and the charge cannot be corrected.
    - `reserve` decides at once too, and returns a `Grant` that holds memory and one unit of concurrency until it is
      released, and whose tokens can be settled by what was really used.
    - `acquire`, and `acquire_async` in asyncio, are `reserve` with a wait, as the action of the violated model says.
    - `check_many` is `check_quota` for an array of requests, at a few nanoseconds each.
    - `modelquota.asgi.QuotaMiddleware` acquires, settles and releases a grant for each request that comes over HTTP.

    Parameters
    ----------
    path : str, bytes or os.PathLike, optional
        A state file, created with mode 0600 if it does not exist: all processes that open it share the limits, and it
        outlives them. Keep it on a local file system. Limits that a killed `LoadAdjuster` left lowered are restored
        when the file is opened. By default the state is in memory, shared with forked processes.
    clock : ManualClock, optional
        A clock that the caller moves, for tests and replays. By default ``CLOCK_MONOTONIC``.
    default_quota : ResourceQuotaConfig, mapping of str to ResourceQuotaConfig, or callable, optional
        A model that is checked and has no quota is registered with these limits. The keys of a mapping are ids, and
        patterns that end in ``*``: an exact id wins, then the longest pattern. A callable is given the id and returns a
        config, or None. An id that gets no config is allowed and counted, as every id without a quota is by default.
    max_models : int, optional
        Size of the table, 1 .. 2**24, by default that of the state file, or 65,536. Memory is taken only for models in
        use, some 3 KB each.
    trust_file : bool
        Use the file at `path` even if it belongs to another user, or others may write to it. Anyone who can write to it
        can lift every limit and crash every process that has it open.
    cluster : RedisStore, optional
        Share the limits with all hosts that use the same store and namespace. Requests in a second, minute, hour, day
        and month, tokens likewise, and rates are shared; memory and concurrency are of this host. Nothing is admitted
        before the store has granted a share.

    Raises
    ------
    TypeError, ValueError
        A parameter has the wrong type or is out of range.
    StateFileError
        The file at `path` is not a state file this version can read, or another user can change it. It is not
        modified.

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
        path: str | bytes | os.PathLike[str] | os.PathLike[bytes] | None = None,
        clock: ManualClock | None = None,
        default_quota: DefaultQuota | None = None,
        max_models: int | None = None,
        trust_file: bool = False,
        cluster: RedisStore | None = None,
    ) -> None:
        if cluster is not None and clock is not None:
            raise ValueError("cluster= needs the machine's clock; leave out clock=")
        if max_models is not None:
            max_models = _integer("max_models", max_models, 1, MAX_MODELS_LIMIT, "1 .. 2**24")
        self._events = _Events(clock)
        self.default_quota = default_quota
        super().__init__(
            path=None if path is None else os.fsdecode(path),
            max_models=max_models,
            clock=clock,
            events=self._events,
            trust_file=trust_file,
        )
        self._trust_file = trust_file
        if self.path is not None:  # an adjuster that was killed may have left its journal
            from modelquota._core.state.beside import journal_of

            journal = journal_of(self.path)
            if os.path.lexists(journal):
                from modelquota.statefile.journal import restore

                restore(self, journal)
        self._member: Member | None = None
        if cluster is not None:
            from modelquota.cluster.member import Member

            self._member = Member(self, cluster)
        elif self.path is not None:
            self._leave_cluster()

    def _leave_cluster(self) -> None:
        """End the shares of a file that was used with `cluster`: nobody would exchange them, and nothing be admitted.

        While another process has it open, that one may exchange them.
        """
        from modelquota._core.table import shares

        if shares.is_sharing(self) and shares.end_sharing(self, if_alone=True):
            _log(
                _WARNING,
                "%s was used with cluster= and is opened without it, by the only process: "
                "its limits are no longer shared with other hosts, all of each holds on this host",
                self.path,
            )

    @classmethod
    def open_readonly(
        cls, path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, trust_file: bool = False
    ) -> QuotaView:
        """Open a state file for reading only, such as for monitoring: it needs no write permission and takes no lock.

        Parameters
        ----------
        path : str, bytes or os.PathLike
            The state file.
        trust_file : bool
            Read it even if it belongs to another user, or others may write to it.

        Raises
        ------
        OSError
            The file cannot be opened; it is not created.
        StateFileError
            It is not a state file this version can read, or another user can change it.
        """
        from modelquota.reading.view import QuotaView

        return QuotaView(path, trust_file=trust_file)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle, or copy, a manager as its path: the copy shares the limits, and takes a seat of its own."""
        if self.path is None:
            raise TypeError(
                "a manager without a path cannot be pickled or copied: only forked processes share its state; "
                "make it with path=, and each process opens that file"
            )
        if self.clock is not None:
            raise TypeError(
                "a manager with a ManualClock cannot be pickled or copied: nothing else could move its clock; "
                "make one for the same path with a clock of its own"
            )
        default = self.default_quota
        if isinstance(default, Mapping):
            default = dict(default)
        return functools.partial(
            type(self), path=self.path, default_quota=default, max_models=self.max_models, trust_file=self._trust_file,
            cluster=None if self._member is None else self._member.store,
        ), ()  # fmt: skip

    def close(self) -> None:
        """Release what this process holds in the state, and the state itself; other processes are not affected.

        Open grants are released (their tokens stay charged), waits end with `ManagerClosedError`, and the seat, the
        mapping and the descriptors are freed. Afterwards every method raises `ManagerClosedError`; closing again does
        nothing. With `cluster`, a state without a file is handed over to the store first, which may take some seconds
        if the store does not answer.
        """
        if self._member is not None and not self.closed:
            self._member.close()
        super().close()

    @property
    def cluster(self) -> Member | None:
        """How this process takes part in a cluster: `Member.status` tells; None without `cluster`."""
        return self._member

    # -- quotas

    @property
    def default_quota(self) -> DefaultQuota | None:
        """The quota for ids that have none; assign to it to change it. Ids that were already given one keep it.

        A mapping is returned as a read-only copy.
        """
        templates = self._events.templates  # read once: another thread may set it to None
        return None if templates is None else templates.source

    @default_quota.setter
    def default_quota(self, value: DefaultQuota | None) -> None:
        self._events.templates = None if value is None else QuotaTemplates(value)

    def set_quota(self, config: ResourceQuotaConfig | str, /, **fields: Any) -> None:
        """Give a model its limits: ``set_quota(config)``, or ``set_quota("llama", max_ram_mb=1024)``.

        The limits of a known model are replaced at its next check, and what it has used stays counted: it is never
        refilled and never evicted.

        Raises
        ------
        QuotaConfigError
            A value is not accepted; nothing is changed.
        TypeError
            Unknown field.
        CapacityError
            The table is full.
        """
        if isinstance(config, str):
            require_fields(fields)
            config = ResourceQuotaConfig(config, **fields)
        elif not isinstance(config, ResourceQuotaConfig):
            raise TypeError(f"config is {config!r}; give a ResourceQuotaConfig, or a model id and keywords")
        elif fields:
            raise TypeError("give a ResourceQuotaConfig or keywords, not both; config.replace(...) changes fields")
        self._set_quota(config.model_id, config)

    def update_quota(self, model_id: str, /, **changes: Any) -> ResourceQuotaConfig:
        """Change the named fields of a model's quota and return the new one.

        Raises UnknownModelError if the model has no quota, QuotaConfigError if a field is not accepted.
        """
        while True:  # until no one else has changed it between the read and the write
            old = self.get_quota(model_id)
            if old is None:
                raise UnknownModelError(model_id)
            new = old.replace(**changes)
            if new.model_id != model_id:
                raise TypeError("model_id cannot be changed; set_quota for the new id and remove_quota for the old one")
            if self._replace_quota(old, new, named=True):
                return new

    def replace_quota(
        self, expected: ResourceQuotaConfig | None, new: ResourceQuotaConfig | None, *, named: bool = False
    ) -> bool:
        """Replace a model's quota if it is still `expected`: a compare-and-set, for programs that adjust limits.

        None is that the model has no quota: as `expected` to register it, as `new` to remove it. Returns False, and
        changes nothing, if the model has a different quota by now. An id that was registered from `default_quota` can
        still be forgotten, unless `named` says that it is configured by name from now on, as by `update_quota`.

        Raises TypeError for anything but configs and None, ValueError if they belong to different models, and
        CapacityError if the table is full.

        Examples
        --------
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama", max_ram_mb=1000)
        >>> before = manager.get_quota("llama")
        >>> manager.replace_quota(before, before.replace(max_ram_mb=800))
        True
        >>> manager.replace_quota(before, before.replace(max_ram_mb=600))
        False
        >>> manager.replace_quota(None, before)
        False
        """
        for name, config in (("expected", expected), ("new", new)):
            if config is not None and not isinstance(config, ResourceQuotaConfig):
                raise TypeError(f"{name} is {config!r}; give a ResourceQuotaConfig or None")
        if expected is None and new is None:
            raise TypeError("expected and new are both None; give at least one ResourceQuotaConfig")
        if expected is not None and new is not None and expected.model_id != new.model_id:
            raise ValueError(f"new is of {new.model_id!r} and expected of {expected.model_id!r}; give two of one model")
        return self._replace_quota(expected, new, named)

    def remove_quota(self, model_id: str) -> bool:
        """Forget a model and what it has used; True if it was known. What it counted stays in `get_stats`."""
        return self._remove(model_id)

    def rows(self, model_ids: Iterable[str]) -> NDArray[np.int64]:
        """Deprecated name of `codes`."""
        warnings.warn("rows() is called codes() now", DeprecationWarning, stacklevel=2)
        return self.codes(model_ids)

    def model(self, model_id: str) -> ModelQuota:
        """Bind a model: its verbs without the look-up. Raises UnknownModelError if it has no quota."""
        return ModelQuota(self, model_id)

    # -- waiting

    def acquire(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: TokenCount,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
        *,
        timeout: float | None = None,
        priority: SupportsIndex = 0,
    ) -> Grant:
        """Reserve, and wait for admission as the action of the violated model says.

        Examples
        --------
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama", max_concurrent_requests=1, on_violation="queue", grace_period_sec=30)
        >>> with manager.acquire("llama", estimated_tokens=500) as grant:
        ...     answer = ["Hello", ",", " world"]  # the model runs here; requests that come now wait
        ...     grant.settle(len(answer))
        >>> manager.get_usage("llama").tokens_this_hour
        3

        Parameters
        ----------
        model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb
            As for `reserve`.
        timeout : float, optional
            The longest wait in seconds, 0 or more; never longer than ``grace_period_sec`` of the model.
        priority : int
            Higher is served first; equal ones in order of arrival.

        Returns
        -------
        Grant

        Raises
        ------
        QuotaExceededError
            Denied: at once if no wait can help in time or if ``max_queued_requests`` are waiting already, otherwise at
            the end of the wait. A request counts once, however often it was tried.
        TypeError, ValueError
            As for `reserve`, and for a timeout or priority out of range.

        Notes
        -----
        ``reject`` does not wait. ``throttle`` retries when that may help; requests that arrive in the meantime may be
        admitted first. ``queue`` waits in line: no later request overtakes a waiting one, however large it is.
        """
        return acquire(self, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)

    def acquire_async(
        self,
        model_id: str | Sequence[str],
        estimated_tokens: TokenCount,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
        *,
        timeout: float | None = None,
        priority: SupportsIndex = 0,
    ) -> Acquisition:
        """`acquire` for asyncio: ``await`` it, or ``async with`` it. The event loop is never blocked.

        Threads and tasks wait in one queue. A canceled wait leaves nothing behind.

        Examples
        --------
        >>> import asyncio
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama", max_concurrent_requests=1, on_violation="queue")
        >>> async def generate(prompt):
        ...     async with manager.acquire_async("llama", estimated_tokens=500) as grant:
        ...         grant.settle(len(prompt))
        ...         return prompt.upper()
        >>> asyncio.run(generate("hello"))
        'HELLO'
        """
        from modelquota.waiting.task import Acquisition

        return Acquisition(self, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)

    def limit(
        self,
        model_id: str | Sequence[str] | Callable[..., str | Sequence[str]],
        estimated_tokens: TokenCount | Callable[..., TokenCount] = 0,
        *,
        ram_needed_mb: SupportsIndex = 0,
        ssd_needed_mb: SupportsIndex = 0,
        timeout: float | None = None,
        priority: SupportsIndex = 0,
        actual_tokens: Callable[[Any], TokenCount] | None = None,
    ) -> Callable[[Callable[_P, _T]], Callable[_P, _T]]:
        """Decorate a function or coroutine function: each call acquires first and releases at its end.

        Also decorates objects with a ``__call__`` method and `functools.partial` objects. A call that returns
        unfinished work (a coroutine that the function does not declare with ``async def``, a future, an iterator or
        stream) raises TypeError, and the work is closed: the grant would not cover it. For streams see `count_stream`.

        Parameters
        ----------
        model_id : str, sequence of str, or callable
            A callable is given the arguments of the call.
        estimated_tokens : int or callable
            Tokens, or a callable that computes them from the arguments of the call.
        ram_needed_mb, ssd_needed_mb, timeout, priority
            As for `acquire`.
        actual_tokens : callable, optional
            Computes the tokens really used from what the function or coroutine returned; without it the estimate is
            kept.

        Raises
        ------
        TypeError
            At decoration, of a generator function; at a call, if the result is unfinished work.

        Examples
        --------
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama")
        >>> @manager.limit("llama", estimated_tokens=lambda prompt: len(prompt), actual_tokens=len)
        ... def generate(prompt):
        ...     return prompt[:5]
        >>> generate("Hello, world"), manager.get_usage("llama").tokens_this_hour
        ('Hello', 5)
        """
        return limit(self, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority, actual_tokens)

    def ledger(
        self,
        path: str | os.PathLike[str],
        *,
        buffer_size: int = 65_536,
        max_bytes: int | None = 256 << 20,
        by_day: bool = True,
    ) -> GrantLedger:
        """Open a ledger at `path`: its `acquire` and `acquire_async` write a line for each request.

        They are used as those of the manager, in a ``with`` block, at whose end the line is written: when the request
        came, for whom, the tokens that were estimated and used, how long it waited and took, or which limit denied it.
        The ledger is also what ``QuotaMiddleware(ledger=...)`` takes. Close it, or use it in a ``with`` block.

        Parameters
        ----------
        path, buffer_size, max_bytes, by_day
            As for `modelquota.monitoring.ledger.Ledger`, which says what is promised.

        Raises
        ------
        OSError
            The file cannot be opened for writing.
        ValueError
            A parameter is out of range.

        Examples
        --------
        >>> import os, tempfile
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama")
        >>> with tempfile.TemporaryDirectory() as folder, manager.ledger(os.path.join(folder, "usage.jsonl")) as ledger:
        ...     with ledger.acquire("llama", estimated_tokens=500) as grant:
        ...         grant.settle(320)
        >>> ledger.written, ledger.lost
        (1, 0)
        """
        from modelquota.monitoring.ledger.grants import GrantLedger

        return GrantLedger(self, path, buffer_size=buffer_size, max_bytes=max_bytes, by_day=by_day)

    # -- what the model uses

    def update_memory_usage(self, model_id: str, ram_mb: int, ssd_mb: int) -> None:
        """Report the model's current memory use, outside grants, in MB (2**20 bytes). Peaks are tracked.

        A value above the cap is recorded as it is; no request that needs memory is then admitted until it falls.

        Raises
        ------
        UnknownModelError
            The model has no quota.
        TypeError, ValueError
            A value is not an integer, or not in 0 .. 2**62; nothing is recorded.
        """
        self._record_memory(model_id, _megabytes("ram_mb", ram_mb), _megabytes("ssd_mb", ssd_mb))

    def reset_burst(self, model_id: str) -> None:
        """Clear the burst in use: both long-run levels fall to at most max(rate, 1). Windows are not touched.

        Raises UnknownModelError if the model has no quota.
        """
        self._reset_burst(model_id)


class _Events:
    """Callbacks from the core. They hold no reference to the manager, which would be a cycle that keeps both alive."""

    def __init__(self, clock: ManualClock | None) -> None:
        self.templates: QuotaTemplates | None = None
        self._clock = clock
        self._unknown_logged_second = -1
        self._unknown_held = 0

    def template_of(self, model_id: str) -> ResourceQuotaConfig | None:
        """Return the config to register an id without a quota from, or None; the config may name another id."""
        templates = self.templates
        if templates is None:
            return None
        template = templates.template_of(model_id.partition("#")[0])
        if template is None:
            return None
        if "#" in model_id:  # registered, it would be a meter that all traffic of its model has to pass
            raise QuotaConfigError("model_id", model_id, _ACCEPTED_ON_SIGHT)
        plain_model_id("model_id", model_id)  # raises if no quota can have this id
        return template

    def meters_of(self, model_id: str) -> list[tuple[str, ResourceQuotaConfig]]:
        """Return the meters to register with an id without a quota, as names and configs."""
        meters = [] if self.templates is None else self.templates.meters_of(model_id)
        for name, _ in meters:
            plain_model_id("model_id", f"{model_id}#{name}")
        return meters

    def on_unknown_model(self, model_id: str) -> None:
        """Log, once a second, that an id without a quota was checked."""
        self._unknown_held += 1
        clock = self._clock
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

    def on_violation(self, model_id: str, result: QuotaCheckResult, since_last: int) -> None:
        """Log a violation and how many it includes since the last record; called at most once per model and second."""
        level = _INFO if result.action is ViolationAction.QUEUE else _WARNING
        if logger().isEnabledFor(level):
            _log(
                level, "model %r: %s (%s; %d since the last record)", model_id, result.reason, result.action, since_last
            )


class ModelQuota(RowHandle):
    """One model, bound: the manager's verbs without the look-up. Made by `ResourceQuotaManager.model`.

    After ``remove_quota`` every verb raises UnknownModelError, even if the id has been registered again.

    Attributes
    ----------
    model_id : str
    manager : ResourceQuotaManager
    """

    if TYPE_CHECKING:

        @property
        def manager(self) -> ResourceQuotaManager: ...

    def reserve(
        self, estimated_tokens: TokenCount, ram_needed_mb: SupportsIndex = 0, ssd_needed_mb: SupportsIndex = 0
    ) -> Grant:
        """As the manager's `reserve`, for this model."""
        return self._manager().reserve(self.model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb)

    def acquire(self, estimated_tokens: TokenCount, *needs_mb: SupportsIndex, **how: Any) -> Grant:
        """As the manager's `acquire`, for this model."""
        return self._manager().acquire(self.model_id, estimated_tokens, *needs_mb, **how)

    def acquire_async(self, estimated_tokens: TokenCount, *needs_mb: SupportsIndex, **how: Any) -> Acquisition:
        """As the manager's `acquire_async`, for this model."""
        return self._manager().acquire_async(self.model_id, estimated_tokens, *needs_mb, **how)

    def get_quota(self) -> ResourceQuotaConfig:
        """Return the model's quota."""
        return self._alive(self._manager().get_quota(self.model_id))

    def get_usage(self) -> ResourceUsage:
        """Return what the model uses now."""
        return self._alive(self._manager().get_usage(self.model_id))

    def get_model_report(self) -> ModelReport:
        """Return quota, use and utilization."""
        return self._alive(self._manager().get_model_report(self.model_id))

    def update_quota(self, **changes: Any) -> ResourceQuotaConfig:
        """Change the named fields and return the new quota."""
        return self._manager().update_quota(self.model_id, **changes)

    def update_memory_usage(self, ram_mb: int, ssd_mb: int) -> None:
        """Report the model's current memory use, in MB."""
        self._manager().update_memory_usage(self.model_id, ram_mb, ssd_mb)

    def reset_burst(self) -> None:
        """Clear the burst in use."""
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


def _megabytes(name: str, value: SupportsIndex) -> int:
    return _integer(name, value, 0, MAX_COUNT, "0 .. 2**62")


def _integer(name: str, value: SupportsIndex, least: int, most: int, accepted: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give an integer, {accepted}") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}; give an integer, {accepted}")
    return number
