"""`ManagerHost`: the state of a manager as a node sees it."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING

import numpy as np

from modelquota._core.table import shares
from modelquota.cluster.book import Rows
from modelquota.errors import ManagerClosedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from modelquota._core.table.table import QuotaTable


def boot_id() -> str:
    """Return the random id that the kernel has had since the machine was started; empty if it cannot be read."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
    return ""


class ManagerHost:
    """A `Host` over the shares of a manager's models, for the `term` in which this process leads.

    It does not keep the manager alive. What changes shares raises `OvertakenError` when another process has begun to
    lead; without a term it is not asked.
    """

    def __init__(self, table: QuotaTable, boot: str, term: int | None = None) -> None:
        self._table = weakref.ref(table)
        self.boot = boot
        self.term = term

    @property
    def table(self) -> QuotaTable:
        """The manager. Raises ManagerClosedError once it is gone."""
        table = self._table()
        if table is None:
            raise ManagerClosedError
        return table

    def now_ns(self) -> int:
        """Return the state's time."""
        return shares.now_ns(self.table)

    def codes(self, changed: bool) -> list[int]:
        """Return the codes of all models, or of those that have changed, the urgent ones first."""
        codes: list[int] = shares.sharing_codes(self.table, changed).tolist()
        return codes

    def names(self, codes: Sequence[int]) -> list[str | None]:
        """Return their ids; None for one that has been removed."""
        return shares.names_of(self.table, np.array(codes, np.int64)) if codes else []

    def exchange(self, codes: Sequence[int], asked: Sequence[Sequence[int]], below_used: bool = False) -> Rows:
        """Set shares, below what is used only if that is said, and read what there is."""
        found = shares.exchange_shares(
            self.table, np.array(codes, np.int64), np.array(asked, np.int64), below_used, term=self.term
        )
        return Rows(*(column.tolist() for column in found))

    def lease_end_ns(self) -> int:
        """Return the end of the lease; 0 if there is none."""
        return shares.read_lease(self.table).end_ns

    def renew_lease(self, end_ns: int) -> None:
        """Set the end of the lease."""
        shares.renew_lease(self.table, end_ns, term=self.term)

    def load(self) -> bytes:
        """Return what was saved."""
        return shares.read_node(self.table)

    def save(self, data: bytes) -> None:
        """Keep up to 240 bytes."""
        shares.write_node(self.table, data, term=self.term)
