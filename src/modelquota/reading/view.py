"""`QuotaView`: reads a state file without changing it, and without waiting for writers or delaying them."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np

from modelquota._core.state.file import open_existing
from modelquota._core.state.mapping import boot_id
from modelquota._core.state.state import CONSTANTS
from modelquota._core.state.validate import NAME_UNIT, Reader
from modelquota._core.table.view import read_copies, read_rows, records_of
from modelquota.errors import ManagerClosedError, StateFileError
from modelquota.reading.reader import QuotaReader

if TYPE_CHECKING:
    from numpy.typing import NDArray

_P = ParamSpec("_P")
_T = TypeVar("_T")
_TRIES = 8
_COUNTERS = ("rejected", "throttled", "queued", "waited")
_KINDS = ("ram", "ssd", "rate", "quota", "concurrency")  # in the order of the layout's violations
_NAMES_AT_A_TIME = 1024


def _reads(method: Callable[Concatenate[QuotaView, _P], _T]) -> Callable[Concatenate[QuotaView, _P], _T]:
    """Wrap a method that uses the descriptor: raise if the view is closed, and hold the file open while it runs."""

    @functools.wraps(method)
    def reading(self: QuotaView, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        with self._guard:
            if self._closed:
                raise ManagerClosedError("view")
            self._readers += 1
        try:
            return method(self, *args, **kwargs)
        finally:
            with self._guard:
                self._readers -= 1
                self._let_go()

    return cast("Callable[Concatenate[QuotaView, _P], _T]", reading)


class QuotaView(QuotaReader):
    """The reading methods of a `ResourceQuotaManager`, for a state file that others write; see ``open_readonly``.

    Each model is read as of one moment. The view keeps the file open: `close` it, or use it in a ``with``.

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
        The file is not a state file this version can read, or another user can change it.
    """

    def __init__(self, path: str | bytes | os.PathLike[str] | os.PathLike[bytes], *, trust_file: bool = False) -> None:
        # guards the three below; reentrant, since garbage collection may close a view at any point
        self._guard = threading.RLock()
        self._descriptor = -1
        self._readers = 0
        self._closed = False
        self.path = os.path.abspath(os.fsdecode(path))
        self._descriptor, self._max_models = open_existing(self.path, None, os.O_RDONLY, trust_file=trust_file)
        self._lock = threading.Lock()  # guards the cached names
        self._generations = np.zeros(0, np.uint32)  # of each row when its id was read
        self._ids = np.zeros(0, object)
        self._rows: dict[str, int] = {}
        self._version = -1

    def close(self) -> None:
        """Close the file, once the threads that are reading it have finished; a second call does nothing."""
        with self._guard:
            self._closed = True
            self._let_go()

    def _let_go(self) -> None:
        if self._closed and self._readers == 0 and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)  # a descriptor's number is valid in this process and for this object only

    @property
    @_reads
    def max_models(self) -> int:
        """The largest number of models that the table can hold."""
        self._reader()
        return self._max_models

    @property
    @_reads
    def enforcement_enabled(self) -> bool:
        """Whether limits are enforced, or only counted."""
        return bool(self._reader().header["enforcing"])

    @_reads
    def list_models(self) -> list[str]:
        """Return the ids of all models that have a quota."""
        return list(self._index(self._reader()))

    def _meters_of(self, model_id: str) -> list[str]:
        """Return the ids of a model's meters."""
        return [one for one in self.list_models() if "#" in one and one.partition("#")[0] == model_id]

    def _reader(self) -> Reader:
        reader = Reader(self._descriptor, self.path)
        reader.check_header()
        return reader

    def _index(self, reader: Reader) -> dict[str, int]:
        """Row of each model, read again after models were added or removed."""
        version = int(reader.header["registry_version"])
        if version != self._version:
            *_, places = self._rows_of(reader)
            alive, model_ids = self._name_rows(reader, places)
            self._rows = dict(zip(model_ids, alive.tolist(), strict=True))
            self._version = version
        return self._rows

    def _rows_of(self, reader: Reader) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint32]]:
        """Usage, limits and places of all rows that were ever used, as `read_rows` returns them."""
        count = int(reader.header["row_count"])
        regions, now_ns = reader.regions, self._now_ns(reader.header)
        try:
            usage, limits, places = read_rows(self._descriptor, regions, count, now_ns)
        except EOFError as error:
            raise StateFileError(self.path, f"{error}: it was cut off while it was read") from None
        entries = reader.entries()
        entries = entries[(entries["seat"] != 0) & (entries["linked"] != 0) & (entries["counted"] != 0)]
        entries = entries[entries["row"] < count]
        entries = entries[entries["generation"] == places[entries["row"], 0]]
        np.add.at(usage["waiting_requests"], entries["row"], 1)
        return usage, limits, places

    def _name_rows(self, reader: Reader, places: NDArray[np.uint32]) -> tuple[NDArray[np.intp], list[str]]:
        """Bring `_ids` up to date; return the rows in which the models of `places` live, in their order, and their ids.

        The id of a model is read once: it cannot change as long as the row's generation is the same.
        """
        with self._lock:
            known = len(self._generations)
            if len(places) > known:
                more = len(places) - known
                self._generations = np.concatenate([self._generations, np.zeros(more, np.uint32)])
                self._ids = np.concatenate([self._ids, np.full(more, None, object)])
            generations = places[:, 0]
            alive = generations % 2 == 1
            new = np.flatnonzero(alive & (generations != self._generations[: len(places)]))
            top = int(reader.read_header()["names_used"])
            for first in range(0, len(new), _NAMES_AT_A_TIME):
                rows = new[first : first + _NAMES_AT_A_TIME]
                offsets, sizes = places[rows, 1].astype(np.int64) * NAME_UNIT, places[rows, 2].astype(np.int64)
                raw = reader.names_at(offsets, sizes, top)
                names = np.array([name.decode("utf-8", "replace") for name in raw], object)
                # a row that was given to another model in the meantime may have been read with the other model's name
                same = self._generations_now(reader, rows) == generations[rows]
                self._ids[rows[same]] = names[same]
                self._generations[rows[same]] = generations[rows[same]]
                alive[rows[~same]] = False
            found = np.flatnonzero(alive)
            return found, self._ids[found].tolist()

    def _generations_now(self, reader: Reader, rows: NDArray[np.intp]) -> NDArray[np.uint32]:
        dtype = reader.layout["row"]
        first = int(rows[0])
        data = os.pread(
            self._descriptor, (int(rows[-1]) - first + 1) * dtype.itemsize, reader.regions.rows + first * dtype.itemsize
        )
        found: NDArray[np.uint32] = np.frombuffer(data, dtype)["generation"][rows - first]
        return found

    def _now_ns(self, header: Any) -> int:
        """The rows' time; if no process has opened the file since a reboot, as `State` will compute it."""
        if header["boot_id"].tobytes() == boot_id():
            if int(header["clock_kind"]) == CONSTANTS["boottime"]:
                return time.clock_gettime_ns(time.CLOCK_BOOTTIME) + int(header["lease"]["clock_offset_ns"])
            return time.monotonic_ns() + int(header["clock_offset_ns"])
        return int(header["anchor_ns"]) + max(time.time_ns() - int(header["anchor_wall_ns"]), 0)

    @_reads
    def _read(self, model_id: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
        for _ in range(_TRIES):
            reader = self._reader()
            row = self._index(reader).get(model_id)
            if row is None:
                return None
            part = reader.part(row, 1)
            if reader.names(part) == [model_id.encode()]:
                break
            self._version = -1  # the row belongs to another model now
        else:
            return None  # it was removed during every attempt
        usage, limits = read_copies(
            part.rows, part.cold_rows, part.rings, part.shares, part.header, self._now_ns(reader.header)
        )
        return limits[0], {name: usage[name][0].tolist() for name in usage.dtype.names or ()}

    @_reads
    def _read_all(self) -> NDArray[np.void]:
        return self._read_table()[0]

    @_reads
    def _read_table(self) -> tuple[NDArray[np.void], NDArray[np.void], NDArray[np.uint64]]:
        reader = self._reader()
        usage, limits, places = self._rows_of(reader)
        alive, model_ids = self._name_rows(reader, places)
        records = records_of(usage, model_ids, alive)
        lives = places[alive, 0].astype(np.uint64) << np.uint64(32) | alive.astype(np.uint64)
        return records, limits if len(alive) == len(limits) else limits[alive], lives

    @_reads
    def _read_retired(self) -> dict[str, int]:
        header = self._reader().header
        return {f"{name}_total": int(header[f"retired_{name}"]) for name in _COUNTERS}

    @_reads
    def _totals(self) -> dict[str, Any]:
        reader = self._reader()
        header = reader.header
        usage, _, places = self._rows_of(reader)
        living = usage[places[:, 0] % 2 == 1]
        totals = {
            name: int(header[f"retired_{name}"]) + int(living[f"{name}_total"].sum())
            for name in ("allowed", *_COUNTERS)
        }
        totals["allowed"] += int(header["unknown_checks"])
        violations = [
            int(retired) + int(living[f"{kind}_violations"].sum())
            for kind, retired in zip(_KINDS, header["retired_violations"], strict=True)
        ]
        totals["tokens"] = (int(header["retired_tokens"]) + int(living["tokens_total"].sum())) % 2**64
        totals["tokens_refunded"] = int(header["retired_refunded"]) + int(living["tokens_refunded_total"].sum())
        totals["waiting"] = int(living["waiting_requests"].sum())
        return {**totals, "recoveries": int(header["recoveries"]), "violations": violations}
