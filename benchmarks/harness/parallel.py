"""Rounds that several threads or processes run at once.

A worker is a function that does a fixed number of operations. What a round takes is from the moment at which the first
worker begins until the last is done. Where each worker has a processor to itself, it is bound to it: left to the
scheduler, two short-lived workers often share one. Rounds of a millisecond or two, and many of them, let some pass
undisturbed on a machine that does other things too; the least of them is then what the package can do.
"""

import multiprocessing
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from time import perf_counter_ns
from typing import Any

Worker = Callable[[], Any]
# Time for every process to have read when to begin.
HEAD_START_NS = 500_000


def processors() -> list[int]:
    """Return the processors that this process may use."""
    return sorted(os.sched_getaffinity(0))


def thread_round_ns(workers: Sequence[Worker], *, bound: bool) -> int:
    """Run each worker in a thread of its own, `bound` to a processor each or not, and return nanoseconds."""
    gate = threading.Event()
    spans: list[tuple[int, int]] = []

    def run(worker: Worker, processor: int | None) -> None:
        _bind(processor)
        gate.wait()
        spans.append(_span(worker))

    places = processors() if bound else repeat(None, len(workers))
    threads = [threading.Thread(target=run, args=each) for each in zip(workers, places, strict=False)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join()
    return _whole(spans)


def _bind(processor: int | None) -> None:
    """Let the calling thread run there only."""
    if processor is not None:
        os.sched_setaffinity(0, {processor})


def _span(worker: Worker) -> tuple[int, int]:
    start_ns = perf_counter_ns()
    worker()
    return start_ns, perf_counter_ns()


def _whole(spans: Sequence[tuple[int, int]]) -> int:
    return max(end_ns for _, end_ns in spans) - min(start_ns for start_ns, _ in spans)


@contextmanager
def forked(workers: Sequence[Worker]) -> Iterator[Callable[[int], int]]:
    """Fork a process for each worker, bound to a processor, and give a function that runs a round of the first so many.

    That function returns nanoseconds. What a worker refers to is inherited through the fork, shared memory is shared.
    """
    context = multiprocessing.get_context("fork")
    pipes = []
    processes = []
    for worker, processor in zip(workers, processors(), strict=False):
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, worker, processor), daemon=True)
        with warnings.catch_warnings():
            # Of numpy's idle helper threads; the children use none of them.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        pipes.append(here)
        processes.append(process)

    def round_ns(count: int) -> int:
        start_ns = perf_counter_ns() + HEAD_START_NS
        for pipe in pipes[:count]:
            pipe.send(start_ns)
        return _whole([pipe.recv() for pipe in pipes[:count]])

    try:
        yield round_ns
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join()


def _serve(pipe: Any, worker: Worker, processor: int) -> None:
    _bind(processor)
    while (start_ns := pipe.recv()) is not None:
        while perf_counter_ns() < start_ns:
            pass
        pipe.send(_span(worker))
