"""`count_stream`: passes a stream on and counts its tokens in a grant."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from modelquota._core.table.grant import Grant

T = TypeVar("T")


async def count_stream(
    grant: Grant, stream: AsyncIterable[T], tokens: Callable[[T], int] | None = None
) -> AsyncIterator[T]:
    """Pass a stream on, accounting its tokens in a grant, and stop at the limit.

    The item that reaches a limit is still passed on, since it has been generated; then the stream is closed and
    ``grant.limit_reached`` is True. The grant is not released: use this inside the grant's ``async with``.

    Parameters
    ----------
    grant : Grant
        An open grant.
    stream : async iterable
        What the model generates; always closed: on success, error or cancellation.
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
    ...         return [word async for word in count_stream(grant, generate())], grant.limit_reached
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
