"""Background threads: `Background` starts and ends one, and `Periodic` repeats a step in it."""

import logging
import math
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

logger = logging.getLogger("modelquota")


class Background:
    """The base class of what works in a daemon thread until `stop`. As a context manager it stops on exit."""

    _thread: threading.Thread | None = None
    _stop: threading.Event

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

    def _require_stopped(self) -> None:
        if self.running:
            raise RuntimeError(f"{type(self).__name__} is running; stop() it before it is started again")

    def _launch(self, work: Callable[[threading.Event], None]) -> None:
        """Start the thread: it calls `work` with the event that tells it to end."""
        self._stop = threading.Event()
        name = f"modelquota-{type(self).__name__}"
        self._thread = threading.Thread(target=work, args=(self._stop,), name=name, daemon=True)
        self._thread.start()


class Periodic(Background):
    """The base class of what watches a manager: `poll` does one step, `start` repeats it in a thread until `stop`.

    A step that fails is logged, and the next one is tried.
    """

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
        self._require_stopped()
        self._begin()
        self._launch(lambda stop: self._repeat(stop, interval_sec))
        return self

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
