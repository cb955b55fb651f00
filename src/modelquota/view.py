"""`QuotaView`: a state file, read only. Whoever writes to it is neither waited for nor held up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from modelquota._core.inspection import Part, Reader
from modelquota._core.mapping import boot_id
from modelquota._core.records import record_dtype
from modelquota._core.statefile import open_existing
from modelquota._core.view import read_copies
from modelquota.reading import QuotaReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TRIES = 8
_COUNTERS = ("rejected", "throttled", "queued", "waited")


class QuotaView(QuotaReader):
    """The reading verbs of a `ResourceQuotaManager` over a state file that others write; see ``open_readonly``.

    Each model is read as it was at one moment. The view keeps the file open: `close` it, or use it in ``with``.

    Parameters
    ----------
    path : str, bytes or os.PathLike
        The state file.
    trust_file : bool
        Read it even if another user can change it.

    Raises
    ------
    OSError
        The file cannot be opened.
    StateFileError
        It is no state file that this version can use, or another user can change it.
    """

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, trust_file: bool = False) -> None:
        self._descriptor = -1
        self.path = os.path.abspath(os.fsdecode(path))
        self._descriptor, self._max_models = open_existing(self.path, None, os.O_RDONLY, trust_file=trust_file)
        self._rows: dict[str, int] = {}
        self._version = -1

    def close(self) -> None:
        """Close the file; again it does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # the number of a descriptor is good in this process and for this object only

    @property
    def max_models(self) -> int:
        """How many models the table holds at most."""
        return self._max_models

    @property
    def enforcement_enabled(self) -> bool:
        """Whether limits are enforced, or only counted."""
        return bool(self._reader().header["enforcing"])

    def list_models(self) -> list[str]:
        """Return the ids of all models that have a quota."""
        return list(self._index(self._reader()))

    def _reader(self) -> Reader:
        if self._descriptor < 0:
            raise ValueError("the view is closed; open another one")
        reader = Reader(self._descriptor, self.path)
        reader.check_header()
        return reader

    def _index(self, reader: Reader) -> dict[str, int]:
        """Row of each model, looked up anew when any has come or gone."""
        version = int(reader.header["registry_version"])
        if version != self._version:
            rows = {}
            for part in reader.parts():
                for row, name in enumerate(reader.names(part), part.first):
                    if name is not None:
                        rows[name.decode("utf-8", "replace")] = row
            self._rows, self._version = rows, version
        return self._rows

    def _now_ns(self, header: Any) -> int:
        """The rows' time: after a reboot that nobody has opened the file since, as `SharedState` will reckon it."""
        if header["boot_id"].tobytes() == boot_id():
            return time.monotonic_ns() + int(header["clock_offset_ns"])
        return int(header["anchor_ns"]) + max(time.time_ns() - int(header["anchor_wall_ns"]), 0)

    def _read(self, model_id: str) -> tuple[dict[str, Any], dict[str, int]] | None:
        for _ in range(_TRIES):
            reader = self._reader()
            row = self._index(reader).get(model_id)
            if row is None:
                return None
            part = reader.part(row, 1)
            if reader.names(part) == [model_id.encode()]:
                break
            self._version = -1  # another model lives there since
        else:
            return None  # it was removed at each look
        usage, limits = read_copies(part.rows, part.ledgers, self._now_ns(reader.header))
        return limits[0], dict(zip(usage.dtype.names or (), usage[0].tolist(), strict=True))

    def _living(self, reader: Reader) -> Iterator[tuple[Part, list[bytes], NDArray[np.bool_]]]:
        for part in reader.parts():
            names = reader.names(part)
            alive = np.array([name is not None for name in names], np.bool_)
            yield part, [name or b"" for name in names], alive

    def _read_all(self) -> NDArray[np.void]:
        reader = self._reader()
        now_ns = self._now_ns(reader.header)
        found = [np.zeros(0, record_dtype())]
        for part, names, alive in self._living(reader):
            usage, _ = read_copies(part.rows, part.ledgers, now_ns)
            records = np.zeros(len(names), record_dtype())
            records["model_id"] = [name.decode("utf-8", "replace") for name in names]
            for field in usage.dtype.names or ():
                records[field] = usage[field]
            found.append(records[alive])
        return np.concatenate(found)

    def _totals(self) -> dict[str, Any]:
        reader = self._reader()
        header = reader.header
        totals = {name: int(header[f"retired_{name}"]) for name in _COUNTERS}
        totals["allowed"] = int(header["retired_allowed"]) + int(header["unknown_checks"])
        violations = header["retired_violations"].astype(np.uint64)
        for part, _, alive in self._living(reader):
            charged = part.ledgers["requests_mark"] - part.rows["request_room"].view(np.uint64)
            totals["allowed"] += int(charged[alive].sum())
            for name in _COUNTERS:
                totals[name] += int(part.ledgers[name][alive].sum())
            violations = violations + part.ledgers["violations"][alive].sum(0, dtype=np.uint64)
        return {**totals, "recoveries": int(header["recoveries"]), "violations": violations.tolist()}
