"""How the commands that serve listen, and serve in several processes."""

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from types import FrameType

__all__ = ["listening", "run_in_processes"]


@contextlib.contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """Yield a socket that is bound to an address; raises OSError if it cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, since asyncio turns Nagle's algorithm off only then: no token may be held back.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        yield listener


def run_in_processes(count: int, run: Callable[[], None]) -> None:
    """Run a function in `count` forked processes, and wait for them; a signal that ends this process ends them.

    The manager must have been created before, so that they share its limits, in a state file or in memory.
    """
    children: list[int] = []

    def end_all(number: int, frame: FrameType | None) -> None:
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGTERM)

    before = {number: signal.signal(number, end_all) for number in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or each process would print what is still in the buffers
    # Signals are blocked while a child is not yet in `children`, or still has this process's handlers.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, before)
    try:
        for _ in range(count):
            child = os.fork()
            if child == 0:
                for number, handler in before.items():
                    signal.signal(number, handler)
                # A terminal sends Ctrl-C to the children too. With this process's signal they would get it twice,
                # and uvicorn would take the second as a forced exit: it would cut off answers, with tracebacks.
                signal.pthread_sigmask(signal.SIG_SETMASK, mask | {signal.SIGINT})
                try:
                    run()
                    sys.stdout.flush()
                finally:
                    os._exit(0)
            children.append(child)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for child in children:
            os.waitpid(child, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
