"""`Periodic`: a step that a background thread repeats, once the program has called `start`."""

import logging
import math
import threading
from types import TracebackType
from typing import Self

logger = logging.getLogger("modelquota")


class Periodic:
    """The base class of what watches a manager: `poll` does one step, `start` repeats it in a thread until `stop`.

    As a context manager it stops on exit. A step that fails is logged, and the next one is tried.
    """

    _thread: threading.Thread | None = None
    _stop: threading.Event

    def poll(self) -> object:
        """Do one step."""
        raise NotImplementedError

    def start(self, interval_sec: float) -> Self:
        """Call `poll` in a daemon thread, immediately and then every `interval_sec` seconds (above 0, finite).

        Raises
        ------
        ValueError
            The interval is not accepted.
        RuntimeError
            It is already running.
        """
        if not 0 < interval_sec < math.inf:
            raise ValueError(f"interval_sec is {interval_sec}; give a finite number of seconds above 0")
        if self.running:
            raise RuntimeError(f"{type(self).__name__} is running; stop() it before it is started again")
        self._begin()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._repeat, args=(self._stop, interval_sec), name=f"modelquota-{type(self).__name__}", daemon=True
        )
        self._thread.start()
        return self

    @property
    def running(self) -> bool:
        """True from `start` to `stop`."""
        return self._thread is not None and self._thread.is_alive()

    def stop(self) -> None:
        """End the thread and wait for its last step; does nothing if none is running."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stop.set()
            if thread is not threading.current_thread():  # a callback may stop the thread that called it
                thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _begin(self) -> None:
        """Called by `start` in the caller's thread, so that its errors reach the caller."""

    def _repeat(self, stop: threading.Event, interval_sec: float) -> None:
        while True:
            try:
                self.poll()
            except Exception:
                logger.exception("%s: a step has failed; the next is in %g s", type(self).__name__, interval_sec)
            if stop.wait(interval_sec):
                return
