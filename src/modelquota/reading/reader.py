"""`QuotaReader`: the reading methods that a manager and a read-only view of a state file share."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.limits import WINDOWS

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from modelquota._core.table.table import QuotaTable
    from modelquota.cluster.member import Member
    from modelquota.reading.report import ModelReport, QuotaStats, ResourceUsage

_NO_ID = "-"
_MIX = 0x9E3779B97F4A7C15  # odd, with well mixed bits

# `modelquota.reading.report` is imported in the functions that use it: `import modelquota` would take a fifth longer.


class QuotaReader:
    """The methods that read; as a context manager it closes on exit.

    A subclass provides the data; see `ResourceQuotaManager` and `QuotaView`.
    """

    if TYPE_CHECKING:

        @property
        def enforcement_enabled(self) -> bool: ...
        @property
        def max_models(self) -> int: ...
        def list_models(self) -> list[str]: ...
        def _meters_of(self, model_id: str) -> list[str]: ...
        def close(self) -> None: ...
        def _read(self, model_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None: ...
        def _read_all(self) -> NDArray[np.void]: ...
        def _totals(self) -> dict[str, Any]: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def cluster(self) -> Member | None:
        """How this process takes part in a cluster; None if it does not, as a reader of a state file."""
        return None

    def get_quota(self, model_id: str) -> ResourceQuotaConfig | None:
        """Return the model's quota, or None if it has none."""
        read = self._read(model_id)
        return None if read is None else _quota_of(model_id, tuple(read[0].items()))

    def get_usage(self, model_id: str) -> ResourceUsage | None:
        """Return what the model uses now, read under its lock; None if it has no quota."""
        read = self._read(model_id)
        return None if read is None else _usage_of(read[1])

    def get_model_report(self, model_id: str) -> ModelReport | None:
        """Return quota, usage and utilization of a model, read at one moment; None if it has no quota.

        The reports of its meters are in ``meters``.
        """
        read = self._read(model_id)
        if read is None:
            return None
        from modelquota.reading.counting import denied
        from modelquota.reading.report import model_report

        fields, record = read
        counts = {f"{name}_requests": record[f"{name}_total"] for name in ("allowed", "waited", "warned")}
        counts["denied_requests"] = int(denied(record))
        meters = tuple(filter(None, map(self.get_model_report, sorted(self._meters_of(model_id)))))
        quota = _quota_of(model_id, tuple(fields.items()))
        return model_report(model_id, quota, _usage_of(record), counts, meters)

    def get_stats(self) -> QuotaStats:
        """Return the totals over all models, including removed ones."""
        totals = self._totals()
        from modelquota.reading.report import QuotaStats

        violations = totals["violations"]
        stopped = totals["rejected"] + totals["throttled"] + totals["queued"]
        return QuotaStats(
            total_checks=totals["allowed"] + stopped - totals["waited"],
            allowed_requests=totals["allowed"],
            denied_requests=max(stopped - totals["waited"] - totals["waiting"], 0),
            waited_requests=totals["waited"],
            total_violations=sum(violations),
            rejected_requests=totals["rejected"],
            throttled_requests=totals["throttled"],
            queued_requests=totals["queued"],
            warned_requests=sum(violations) - stopped,
            ram_violations=violations[0],
            ssd_violations=violations[1],
            rate_violations=violations[2],
            quota_violations=violations[3],
            concurrency_violations=violations[4],
            recoveries=totals["recoveries"],
            tokens_charged=totals["tokens"],
            tokens_refunded=totals["tokens_refunded"],
        )

    def snapshot(self) -> NDArray[np.void]:
        """Return a copy of the counters of all models: a structured array with one element per model.

        Fields: ``model_id`` (object, a str), the counters of `ResourceUsage` (int64: MB, requests, tokens), and the
        model's totals since it was registered: ``allowed_total``, ``rejected_total``, ``throttled_total``,
        ``queued_total``, ``warned_total``, ``waited_total`` (int64), ``tokens_total`` and ``tokens_refunded_total``
        (uint64, tokens charged, and how many of these were given back). Each element is read under its model's lock,
        all of them at one reading of the clock.

        A window that is not counted has -1. A meter is an element of its own, with its full id, such as
        ``"llama#output"``; its tokens are counted by its ``token_weights``, with ``unit="usd"`` in millionths of a
        dollar. A sum over models leaves meters out: their requests are those of their models.

        Examples
        --------
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama")
        >>> manager.set_quota(ResourceQuotaConfig.unlimited("llama#output", token_weights=(0, 0, 1)))
        >>> manager.check_quota("llama", Tokens(input=1_200, cached=800, output=256)).allowed
        True
        >>> array = manager.snapshot()
        >>> dict(zip(array["model_id"], array["tokens_this_hour"].tolist()))
        {'llama': 2256, 'llama#output': 256}
        """
        return self._read_all()

    def _read_table(self) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint64]]:
        """`snapshot`, the limits of the same models in the core's form, and which registration of its id each is."""
        from modelquota._core.table.view import read_table

        return read_table(cast("QuotaTable", self))  # a manager is a QuotaTable; a view overrides this method

    def _read_retired(self) -> dict[str, int]:
        """The counts of requests that violated a limit, over all removed models."""
        from modelquota._core.table.view import read_retired

        return read_retired(cast("QuotaTable", self))

    def print_status(self, file: TextIO | None = None) -> None:
        """Write usage and limits of all models, and the totals, to `file` (standard output by default)."""
        reports = [report for model_id in self.list_models() if (report := self.get_model_report(model_id)) is not None]
        from modelquota.reading.report import status_lines

        print(status_lines(reports, self.get_stats()), file=sys.stdout if file is None else file)


@functools.lru_cache(maxsize=4096)
def _quota_of(model_id: str, fields: tuple[tuple[str, Any], ...]) -> ResourceQuotaConfig:
    """The quota that a row contains. Cached, since making one validates it, which takes longer than the look-up."""
    return ResourceQuotaConfig(model_id, **dict(fields))


def quotas_of(limits: NDArray[np.void]) -> tuple[list[ResourceQuotaConfig], NDArray[np.intp]]:
    """Return the distinct quotas, without ids, in the limits of `QuotaReader._read_table`, and each model's index."""
    import numpy as np

    from modelquota._core.table.view import unpack_limits

    words = limits.view(np.uint64).reshape(len(limits), limits.dtype.itemsize // 8)
    mixed = (words * (np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(_MIX))).sum(axis=1)
    _, first, kind_of = np.unique(mixed, return_index=True, return_inverse=True)
    if not np.array_equal(words[first][kind_of], words):  # two kinds have the same hash
        _, first, kind_of = np.unique(words, axis=0, return_index=True, return_inverse=True)
    return [_quota_of(_NO_ID, tuple(fields.items())) for fields in unpack_limits(limits[first])], kind_of.reshape(-1)


_COUNTED_WHEN_LIMITED = tuple(
    f"{unit}_this_{window.name}" for window in WINDOWS if window.optional for unit in ("requests", "tokens")
)


def _usage_of(record: dict[str, Any]) -> ResourceUsage:
    from modelquota.reading.report import ResourceUsage

    fields = _with_names_of_windows(record)
    for name in _COUNTED_WHEN_LIMITED:
        fields[name] = None if fields[name] < 0 else fields[name]
    fields["left"] = tuple([None if count < 0 else count for count in fields["left"]])
    fields["percent"] = tuple(fields["percent"])
    return ResourceUsage(**{name: fields[name] for name in ResourceUsage.__dataclass_fields__})


def _with_names_of_windows(record: dict[str, Any]) -> dict[str, Any]:
    """The record with one field per window; a manager's record has one array per unit, with all windows."""
    fields = record.copy()
    for unit in ("requests", "tokens"):
        counts = fields.pop(f"{unit}_this", ())
        fields |= {f"{unit}_this_{window.name}": count for window, count in zip(WINDOWS, counts, strict=False)}
    return fields
