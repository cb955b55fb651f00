"""`Ledger`: requests are put into a bounded buffer, and one thread writes it."""

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsIndex

from modelquota.errors import QuotaExceededError
from modelquota.monitoring.ledger.file import LEDGER_VERSION, LedgerFile, line_of, now_us
from modelquota.monitoring.ledger.line import request_line

if TYPE_CHECKING:
    from modelquota._core.table.grant import Grant

__all__ = ["ADMITTED", "DENIED", "WARNED", "Ledger"]

ADMITTED = "admitted"
DENIED = "denied"
WARNED = "warned"

LEDGER_VARIABLE = "MODELQUOTA_LEDGER"
FLUSH_SECONDS = 0.1
LINES_PER_WRITE = 2_000
# Above a tenth of the buffer the writer is woken before its time.
WAKE_SHARE = 10

logger = logging.getLogger("modelquota")


class Ledger:
    """A file of requests, written in the background.

    Several processes may write one file, each with a `Ledger` of its own; a forked child continues with one of its own
    by itself. Every method may be called from any thread.

    Parameters
    ----------
    path : str or path-like
        The file; created with mode 0600, appended to if it exists.
    buffer_size : int
        Requests that may wait to be written, 1 or more; more are lost, and counted.
    max_bytes : int or None
        The size beyond which the file is renamed to ``usage-20261128T212351.123456.jsonl``, with the time in UTC, and a
        new one begun; None: never.
    by_day : bool
        Whether it is also renamed when a day, in UTC, has ended.

    Attributes
    ----------
    path : str
    written, lost : int
        Requests of this process.

    Raises
    ------
    OSError
        The file cannot be opened for writing.
    ValueError
        A parameter is out of range.

    Examples
    --------
    >>> import tempfile, os
    >>> with tempfile.TemporaryDirectory() as folder, Ledger(os.path.join(folder, "usage.jsonl")) as ledger:
    ...     ledger.record(("acme", "llama"), 300, 120, duration_us=900_000)
    ...     ledger.flush()
    ...     ledger.written, ledger.lost
    True
    (1, 0)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        buffer_size: int = 65_536,
        max_bytes: int | None = 256 << 20,
        by_day: bool = True,
    ) -> None:
        if buffer_size < 1:
            raise ValueError(f"buffer_size is {buffer_size}; give the requests that may wait to be written, 1 or more")
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}; give a number of bytes above 0, or None")
        self.path = os.fspath(path)
        self.written = 0
        self.lost = 0
        self._buffer_size = buffer_size
        self._wake_at = max(buffer_size // WAKE_SHARE, 1)
        self._max_bytes = max_bytes
        self._by_day = by_day
        self._buffer: deque[tuple[Any, ...]] = deque()
        self._losing = threading.Lock()
        self._begin()
        _LEDGERS.add(self)

    @staticmethod
    def from_environment() -> "Ledger | None":
        """Return the ledger of the environment variable ``MODELQUOTA_LEDGER``, a path; None if it is not set."""
        path = os.environ.get(LEDGER_VARIABLE)
        return Ledger(path) if path else None

    def _begin(self) -> None:
        """Open the file and start the thread, in this process."""
        self._pid = os.getpid()
        self._lost_reported = self.lost
        self._closing = False
        self._wake = threading.Event()
        self._writing = threading.Lock()
        self._losing = threading.Lock()
        self._file: LedgerFile | None = LedgerFile(self.path, self._max_bytes, self._by_day)
        self._file.append(line_of({"ledger": LEDGER_VERSION, "started_us": now_us(), "pid": self._pid}))
        self._thread = threading.Thread(target=self._run, name="modelquota-ledger", daemon=True)
        self._thread.start()

    # -- what a request calls

    def record(
        self,
        ids: str | Sequence[str],
        estimated: Any,
        settled: Any = None,
        *,
        verdict: str = ADMITTED,
        limit: str | None = None,
        time_us: int | None = None,
        waited_us: int = 0,
        duration_us: int | None = None,
        priority: SupportsIndex = 0,
        request_id: str | None = None,
    ) -> bool:
        """Write a request when it has ended; never blocks, and takes well under two microseconds.

        Parameters
        ----------
        ids : str or sequence of str
            What it was charged to; the last one is the model.
        estimated, settled : int, or (input, cached, output), or an object with these attributes
            The tokens reserved, and those used in the end; None if it was denied.
        verdict : str
            ``"admitted"``, ``"denied"`` or ``"warned"`` (admitted over a limit).
        limit : str, optional
            The name of the limit that was violated, in lower case, such as ``"tokens_per_hour"``.
        time_us : int, optional
            When it arrived, in microseconds since 1970; by default now, less its wait and duration.
        waited_us : int
            From arrival to admission or denial.
        duration_us : int, optional
            From admission to its end.
        priority : int
            As it was given to `acquire`.
        request_id : str, optional
            To find it in other logs.

        Returns
        -------
        bool
            False if it is lost: the buffer is full, or the ledger is closed. It is counted in `lost`.
        """
        if time_us is None:
            time_us = time.time_ns() // 1_000 - waited_us - (duration_us or 0)
        return self._put(
            (time_us, _kept(ids), estimated, settled, verdict, limit, waited_us, duration_us, priority, request_id)
        )

    def _put(self, record: tuple[Any, ...]) -> bool:
        buffer = self._buffer
        if len(buffer) >= self._buffer_size or self._closing:
            self._lose(1)
            return False
        buffer.append(record)
        if len(buffer) >= self._wake_at and not self._wake.is_set():
            self._wake.set()
        if self._closing:  # since the look above: the last drain may have been before
            self._drain()
        return True

    def _lose(self, count: int) -> None:
        with self._losing:
            self.lost += count

    def record_denial(
        self,
        ids: str | Sequence[str],
        estimated: Any,
        error: QuotaExceededError,
        arrived_ns: int,
        priority: SupportsIndex = 0,
    ) -> bool:
        """Write a request that was denied just now; `arrived_ns` is when it arrived, by `time.monotonic_ns`."""
        limit = error.result.limit
        waited_us = (time.monotonic_ns() - arrived_ns) // 1_000
        time_us = time.time_ns() // 1_000 - waited_us
        name = None if limit is None else limit.name.lower()
        return self._put((time_us, _kept(ids), estimated, None, DENIED, name, waited_us, None, priority, None))

    def record_grant(
        self,
        ids: str | Sequence[str],
        estimated: Any,
        grant: "Grant",
        arrived_ns: int,
        admitted_ns: int,
        priority: SupportsIndex = 0,
    ) -> bool:
        """Write a request whose grant has ended just now; the times are by `time.monotonic_ns`."""
        now_ns = time.monotonic_ns()
        time_us = (time.time_ns() - now_ns + arrived_ns) // 1_000
        waited_us, duration_us = (admitted_ns - arrived_ns) // 1_000, (now_ns - admitted_ns) // 1_000
        limit = grant.over_limit
        verdict, name = (ADMITTED, None) if limit is None else (WARNED, limit.name.lower())
        return self._put(
            (time_us, _kept(ids), estimated, grant._counts, verdict, name, waited_us, duration_us, priority, None)
        )

    # -- ending

    def flush(self) -> None:
        """Write what is in the buffer now, in this thread."""
        self._drain()

    def close(self) -> None:
        """Write what is in the buffer, and the line that the process ended in order; closing twice is harmless."""
        if self._closing:
            return
        self._closing = True
        _LEDGERS.discard(self)
        self._wake.set()
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._drain()
        with self._writing:
            file, self._file = self._file, None
            if file is None:
                return
            ended = {"ended_us": now_us(), "written": self.written, "lost": self.lost, "pid": self._pid}
            with contextlib.suppress(OSError):
                file.append(line_of(ended))
            file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the thread

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(FLUSH_SECONDS)
            self._wake.clear()
            try:
                self._drain()
            except Exception:
                logger.exception("the ledger at %s has failed to write; requests may be lost", self.path)

    def _drain(self) -> None:
        buffer = self._buffer
        with self._writing:
            file = self._file
            if file is None:
                self._lose(len(buffer))
                buffer.clear()
                return
            while buffer:
                records = [buffer.popleft() for _ in range(min(len(buffer), LINES_PER_WRITE))]
                lines: list[str] = []
                for record in records:
                    try:
                        lines.append(request_line(record))
                    except Exception as error:  # about one record: the others are written
                        self._lose(1)
                        logger.error("the ledger at %s cannot write a request: %s", self.path, error)
                self._write(file, lines)
            lost = self.lost - self._lost_reported
            if lost:
                with contextlib.suppress(OSError):
                    file.append(line_of({"lost": lost, "time_us": now_us(), "pid": self._pid}))
                    self._lost_reported += lost

    def _write(self, file: LedgerFile, lines: list[str]) -> None:
        """Write the lines of some requests; what the disk refuses is lost, and counted."""
        if not lines:
            return
        try:
            file.append("".join(lines).encode("utf-8", "backslashreplace"))
            self.written += len(lines)
        except Exception as error:
            self._lose(len(lines))
            logger.error("the ledger at %s has lost %d requests: %s", self.path, len(lines), error)


def _kept(ids: str | Sequence[str]) -> str | Sequence[str]:
    """Return ids that nobody changes before they are written, and that can be looked up."""
    return tuple(ids) if type(ids) is list else ids


_LEDGERS: "weakref.WeakSet[Ledger]" = weakref.WeakSet()


def _in_forked_child() -> None:
    """What the parent had not written is the parent's to write; threads do not survive a fork."""
    for ledger in list(_LEDGERS):
        ledger._buffer = deque()
        ledger.written = ledger.lost = 0
        if ledger._file is not None:
            ledger._file.close()
        try:
            ledger._begin()
        except (OSError, RuntimeError) as error:
            ledger._closing = True
            logger.error("the ledger at %s cannot be continued in a forked process: %s", ledger.path, error)


os.register_at_fork(after_in_child=_in_forked_child)


@atexit.register
def _at_exit() -> None:
    """Threads end with the interpreter: write what they have not."""
    for ledger in list(_LEDGERS):
        ledger.close()
