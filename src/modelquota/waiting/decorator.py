"""The decorator `ResourceQuotaManager.limit`: functions that run under a quota."""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterable, Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, SupportsIndex, TypeVar, cast

if TYPE_CHECKING:
    from modelquota._core.table.grant import Grant
    from modelquota.manager import ResourceQuotaManager
    from modelquota.quota.tokens import Tokens

P = ParamSpec("P")
R = TypeVar("R")


def limit(
    manager: ResourceQuotaManager,
    model_id: str | Sequence[str] | Callable[..., str | Sequence[str]],
    estimated_tokens: SupportsIndex | Tokens | Callable[..., SupportsIndex | Tokens],
    ram_needed_mb: SupportsIndex,
    ssd_needed_mb: SupportsIndex,
    timeout: float | None,
    priority: SupportsIndex,
    actual_tokens: Callable[[Any], SupportsIndex | Tokens] | None,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """As `ResourceQuotaManager.limit`."""
    import inspect  # takes long to import

    def request(args: Any, kwargs: Any) -> tuple[Any, ...]:
        ids = model_id(*args, **kwargs) if callable(model_id) else model_id
        estimate = estimated_tokens(*args, **kwargs) if callable(estimated_tokens) else estimated_tokens
        return ids, estimate, ram_needed_mb, ssd_needed_mb

    def settled(grant: Grant, result: Any) -> Any:
        if actual_tokens is not None:
            grant.settle(actual_tokens(result))
        return result

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        kinds = _kinds(function)
        if any(inspect.isasyncgenfunction(kind) or inspect.isgeneratorfunction(kind) for kind in kinds):
            raise TypeError(f"{_name(function)} is a generator function; acquire a grant and count_stream() its stream")
        if any(inspect.iscoroutinefunction(kind) or _is_marked(kind) for kind in kinds):

            @functools.wraps(function)
            async def limited_async(*args: P.args, **kwargs: P.kwargs) -> Any:
                async with manager.acquire_async(*request(args, kwargs), timeout=timeout, priority=priority) as grant:
                    result = await cast("Awaitable[Any]", function(*args, **kwargs))
                    instead = _if_unfinished(result)
                    if instead is not None:
                        await _end_async(result)
                        raise _outlasting(function, result, instead)
                    return settled(grant, result)

            return cast("Callable[P, R]", limited_async)

        @functools.wraps(function)
        def limited(*args: P.args, **kwargs: P.kwargs) -> R:
            with manager.acquire(*request(args, kwargs), timeout=timeout, priority=priority) as grant:
                result = function(*args, **kwargs)
                instead = _if_unfinished(result)
                if instead is not None:
                    _end(result)
                    raise _outlasting(function, result, instead)
                return cast("R", settled(grant, result))

        return limited

    return decorate


def _kinds(function: Any) -> tuple[Any, Any]:
    """The callable without any `functools.partial` around it, and its type's ``__call__``: what shows its kind."""
    while isinstance(function, functools.partial):
        function = function.func
    if not callable(function):
        raise TypeError(f"limit decorates a function or another callable, got {function!r}")
    return function, type(function).__call__


def _is_marked(function: Any) -> bool:
    """True if asyncio has marked it as a coroutine function, though its code is not, as for AsyncMock before 3.12."""
    asyncio = sys.modules.get("asyncio.coroutines")  # a marked function implies that this is imported
    mark = getattr(asyncio, "_is_coroutine", None)
    return mark is not None and getattr(function, "_is_coroutine", None) is mark


def _if_unfinished(result: Any) -> str | None:
    """The advice for a result that is unfinished work, which the grant would not cover; None if it is finished."""
    if isinstance(result, Awaitable):
        return "decorate a function that is declared with async def, and await it there"
    if hasattr(type(result), "add_done_callback"):  # as futures of executors have
        return "wait for it in the function"
    if isinstance(result, (Iterator, AsyncIterable)):
        return "acquire a grant and count_stream() its stream"
    return None


def _end(result: Any) -> None:
    """Cancel or close unfinished work, as far as that is possible without waiting."""
    if hasattr(result, "cancel"):
        result.cancel()
    elif not isinstance(result, AsyncIterable) and hasattr(result, "close"):
        result.close()


async def _end_async(result: Any) -> None:
    """Cancel or close unfinished work."""
    if isinstance(result, AsyncIterable):
        close = getattr(result, "aclose", None) or getattr(result, "close", None)
        closing = None if close is None else close()
        if isinstance(closing, Awaitable):
            await closing
    else:
        _end(result)


def _outlasting(function: Any, result: Any, instead: str) -> TypeError:
    kind = type(result).__name__
    return TypeError(f"{_name(function)} returned a {kind}, whose work would outlast the grant; {instead}")


def _name(function: Any) -> str:
    return str(getattr(function, "__qualname__", None) or repr(function))
