"""What can be read of a state, whoever holds it: a manager, or a view that only reads."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, TextIO

from modelquota.config import ResourceQuotaConfig

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from modelquota.report import ModelReport, QuotaStats, ResourceUsage

# `modelquota.report` is imported where it is used: `import modelquota` would take a fifth longer.


class QuotaReader:
    """The verbs that read. A subclass brings what is read; see `ResourceQuotaManager` and `QuotaView`."""

    if TYPE_CHECKING:

        @property
        def enforcement_enabled(self) -> bool: ...
        @property
        def max_models(self) -> int: ...
        def list_models(self) -> list[str]: ...
        def _read(self, model_id: str) -> tuple[dict[str, Any], dict[str, int]] | None: ...
        def _read_all(self) -> NDArray[np.void]: ...
        def _totals(self) -> dict[str, Any]: ...

    def get_quota(self, model_id: str) -> ResourceQuotaConfig | None:
        """Return the model's quota, or None where it has none."""
        read = self._read(model_id)
        return None if read is None else _quota_of(model_id, tuple(read[0].items()))

    def get_usage(self, model_id: str) -> ResourceUsage | None:
        """Return what the model uses now, under its lock; None where it has no quota."""
        read = self._read(model_id)
        return None if read is None else _usage_of(read[1])

    def get_model_report(self, model_id: str) -> ModelReport | None:
        """Return quota, use and utilisation of a model, one consistent view; None where it has no quota."""
        from modelquota.report import model_report

        read = self._read(model_id)
        if read is None:
            return None
        return model_report(model_id, _quota_of(model_id, tuple(read[0].items())), _usage_of(read[1]))

    def get_stats(self) -> QuotaStats:
        """Return the totals over all models, those that have been removed too."""
        from modelquota.report import QuotaStats

        totals = self._totals()
        violations = totals["violations"]
        denied = totals["rejected"] + totals["throttled"] + totals["queued"]
        return QuotaStats(
            total_checks=totals["allowed"] + denied - totals["waited"],
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
            recoveries=totals["recoveries"],
        )

    def snapshot(self) -> NDArray[np.void]:
        """Return the counters of all models at once: a structured array, a copy, one element a model.

        Fields: ``model_id`` (object, a str), the fields of `ResourceUsage` (int64: MB, requests, tokens), and the
        model's totals since it was registered: ``allowed_total``, ``rejected_total``, ``throttled_total``,
        ``queued_total``, ``warned_total`` (int64) and ``tokens_total`` (uint64, tokens charged). Each element is read
        under its model's lock, all of them at one reading of the clock.
        """
        return self._read_all()

    def print_status(self, file: TextIO | None = None) -> None:
        """Write use against limits of all models, and the totals, to `file` (standard output by default)."""
        from modelquota.report import status_lines

        reports = [report for model_id in self.list_models() if (report := self.get_model_report(model_id)) is not None]
        print(status_lines(reports, self.get_stats()), file=sys.stdout if file is None else file)


@functools.lru_cache(maxsize=4096)
def _quota_of(model_id: str, fields: tuple[tuple[str, Any], ...]) -> ResourceQuotaConfig:
    """The quota that a row states. It is validated when it is made, which takes longer than to look it up."""
    return ResourceQuotaConfig(model_id, **dict(fields))


def _usage_of(record: dict[str, int]) -> ResourceUsage:
    from modelquota.report import ResourceUsage

    return ResourceUsage(**{name: record[name] for name in ResourceUsage.__dataclass_fields__})
