"""Functions and streams under a quota: a decorator, and an iterator that counts what passes."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsIndex, TypeVar, cast

if TYPE_CHECKING:
    from modelquota._core.grant import Grant
    from modelquota.manager import ResourceQuotaManager

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def limit(
    manager: ResourceQuotaManager,
    model_id: str | Sequence[str] | Callable[..., str | Sequence[str]],
    tokens: SupportsIndex | Callable[..., SupportsIndex],
    ram_mb: SupportsIndex,
    ssd_mb: SupportsIndex,
    timeout: float | None,
    priority: SupportsIndex,
    actual_tokens: Callable[[Any], SupportsIndex] | None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `ResourceQuotaManager.limit`."""
    import inspect  # takes long to import

    def request(args: Any, kwargs: Any) -> tuple[Any, ...]:
        ids = model_id(*args, **kwargs) if callable(model_id) else model_id
        estimate = tokens(*args, **kwargs) if callable(tokens) else tokens
        return ids, estimate, ram_mb, ssd_mb

    def settled(grant: Grant, result: Any) -> Any:
        if actual_tokens is not None:
            grant.settle(actual_tokens(result))
        return result

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
            raise TypeError(f"{function.__qualname__} is a generator function; acquire a grant and meter() its stream")
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def limited_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with manager.acquire_async(*request(args, kwargs), timeout=timeout, priority=priority) as grant:
                    return settled(grant, await function(*args, **kwargs))

            return cast("Callable[P, R]", limited_async)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            with manager.acquire(*request(args, kwargs), timeout=timeout, priority=priority) as grant:
                return cast("R", settled(grant, function(*args, **kwargs)))

        return limited

    return decorate


async def meter(grant: Grant, stream: AsyncIterable[T], tokens: Callable[[T], int] | None = None) -> AsyncIterator[T]:
    """Pass a stream on, accounting its tokens in a grant, and stop at the limit.

    The item with which a limit is reached is still passed on, since it has been generated; then the stream is closed
    and ``grant.limit_reached`` is True. The grant is released by whoever holds it: use both in one ``async with``.

    Parameters
    ----------
    grant : Grant
        An open one.
    stream : async iterable
        What the model generates; closed at the end, however that comes.
    tokens : callable, optional
        How many tokens an item has; by default 1.

    Examples
    --------
    >>> import asyncio
    >>> from modelquota import ManualClock, ResourceQuotaManager
    >>> async def generate():
    ...     for word in "one two three four".split():
    ...         yield word
    >>> async def main():
    ...     manager = ResourceQuotaManager(clock=ManualClock())
    ...     manager.set_quota("m", max_tokens_per_hour=2)
    ...     async with manager.acquire_async("m", estimated_tokens=1) as grant:
    ...         return [word async for word in meter(grant, generate())], grant.limit_reached
    >>> asyncio.run(main())
    (['one', 'two', 'three'], True)
    """
    try:
        async for item in stream:
            goes_on = grant.add(1 if tokens is None else tokens(item))
            yield item
            if not goes_on:
                break
    finally:
        close = getattr(stream, "aclose", None)
        if close is not None:
            await close()
