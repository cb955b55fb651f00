"""A coroutine's first step without a task: most of them have nothing to wait for."""

from __future__ import annotations

import types
from collections.abc import Awaitable, Generator, Iterator
from typing import Any, TypeVar

_T = TypeVar("_T")


def first_step(awaitable: Awaitable[_T]) -> tuple[_T, None] | tuple[None, Awaitable[_T]]:
    """Run it to where it waits: ``(result, None)`` if it does not, otherwise ``(None, rest)``, to be awaited.

    The rest may be awaited in another task, unless the coroutine looks at the task that runs it.
    """
    steps: Any = awaitable if hasattr(awaitable, "send") else awaitable.__await__()
    if not hasattr(steps, "send"):  # a plain iterator, as granian's
        steps = _generator(steps)
    try:
        pending = steps.send(None)
    except StopIteration as stop:
        return stop.value, None
    return None, _rest(steps, pending)


def _generator(steps: Iterator[Any]) -> Generator[Any, Any, Any]:
    return (yield from steps)


@types.coroutine
def _rest(steps: Any, pending: Any) -> Generator[Any, Any, Any]:
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
