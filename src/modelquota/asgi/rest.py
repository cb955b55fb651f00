"""What is left of an awaitable after its first step, as something to be awaited."""

from __future__ import annotations

import types
from collections.abc import Awaitable, Generator, Iterator
from typing import Any


def steps_of(awaitable: Awaitable[Any]) -> Any:
    """Return its steps, which have ``send``."""
    steps: Any = awaitable if hasattr(awaitable, "send") else awaitable.__await__()
    return steps if hasattr(steps, "send") else _generator(steps)  # a plain iterator, as granian's


def _generator(steps: Iterator[Any]) -> Generator[Any, Any, Any]:
    return (yield from steps)


@types.coroutine
def rest_of(steps: Any, pending: Any) -> Generator[Any, Any, Any]:
    """Go on after the first step: pass on what it waits for, and what it is sent."""
    while True:
        try:
            sent = yield pending
        except GeneratorExit:
            steps.close()
            raise
        except BaseException as error:
            try:
                pending = steps.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            try:
                pending = steps.send(sent)
            except StopIteration as stop:
                return stop.value
