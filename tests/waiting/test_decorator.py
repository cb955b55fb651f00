"""`manager.limit`: a call of any kind of callable holds its grant until its work is done, or is refused."""

import asyncio
import concurrent.futures
import functools
import inspect
import io
import types
from unittest.mock import AsyncMock, Mock

import pytest
from factories import open_quota

QUOTAS = [open_quota("m", max_concurrent_requests=1, max_tokens_per_day=1000, on_violation="throttle")]


def used(manager):
    usage = manager.get_usage("m")
    return usage.concurrent_requests, usage.tokens_this_day


def traced(function):
    """As decorators for tracing and logging are often written."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Model:
    def __init__(self, work):
        self.work = work

    async def __call__(self, *args):
        return await self.work(*args)

    async def method(self, *args):
        return await self.work(*args)

    def stream(self):
        yield 1


class Slotted:
    __slots__ = ("work",)

    def __init__(self, work):
        self.work = work

    async def __call__(self, *args):
        return await self.work(*args)


ASYNC = {
    "async def": lambda work: work,
    "partial": functools.partial,
    "partial of partial": lambda work: functools.partial(functools.partial(work)),
    "object": Model,
    "object with slots": Slotted,
    "partial of object": lambda work: functools.partial(Model(work)),
    "bound method": lambda work: Model(work).method,
    "partial of bound method": lambda work: functools.partial(Model(work).method),
    "mock": lambda work: AsyncMock(side_effect=work),
}


@pytest.mark.parametrize("make", ASYNC.values(), ids=ASYNC)
def test_what_is_async_holds_its_grant_until_it_is_done(manager, make):
    async def work(prompt):
        await asyncio.sleep(0)
        seen = used(manager)
        await asyncio.sleep(0)
        return [prompt, seen, used(manager)]

    limited = manager.limit("m", estimated_tokens=len, actual_tokens=len)(make(work))
    assert inspect.iscoroutinefunction(limited)

    async def main():
        first = asyncio.ensure_future(limited("prompt"))
        await asyncio.sleep(0)
        second = asyncio.ensure_future(limited("hello"))
        return await first, await second

    first, second = asyncio.run(main())
    assert first == ["prompt", (1, 6), (1, 6)]
    assert second == ["hello", (1, 3 + 5), (1, 3 + 5)], "the first was settled by its result, three items"
    assert used(manager) == (0, 6)


@pytest.mark.parametrize("make", ASYNC.values(), ids=ASYNC)
def test_what_is_async_and_fails_gives_its_grant_back(manager, make):
    async def work():
        await asyncio.sleep(0)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        asyncio.run(manager.limit("m", estimated_tokens=5)(make(work))())
    assert used(manager) == (0, 0)


SYNC = {
    "def": lambda work: work,
    "partial": functools.partial,
    "traced": traced,
    "lambda": lambda work: lambda *args: work(*args),
    "mock": lambda work: Mock(side_effect=work),
    "runs a loop": lambda work: lambda *args: asyncio.run(asyncio.wait_for(asyncio.to_thread(work, *args), 30)),
}


@pytest.mark.parametrize("make", SYNC.values(), ids=SYNC)
def test_what_is_not_async_stays_so(manager, make):
    def work(prompt):
        return [prompt, used(manager)]

    limited = manager.limit("m", estimated_tokens=len, actual_tokens=len)(make(work))
    assert not inspect.iscoroutinefunction(limited)
    assert limited("hello") == ["hello", (1, 5)]
    assert used(manager) == (0, 2)


@pytest.mark.parametrize(
    "result", [None, 5, "words", [1], {"a": 1}, range(3), {1}, b"x", (x for x in "").gi_code], ids=repr
)
def test_what_is_done_is_returned(manager, result):
    assert manager.limit("m", estimated_tokens=5)(lambda: result)() is result

    async def work():
        return result

    assert asyncio.run(manager.limit("m", estimated_tokens=5)(work)()) is result
    assert used(manager) == (0, 10)


# -- refused when it decorates


def generate():
    yield 1


async def generate_async():
    yield 1


class Generates:
    def __call__(self):
        yield 1


class GeneratesAsync:
    async def __call__(self):
        yield 1


@pytest.mark.parametrize(
    "function",
    [
        generate,
        generate_async,
        functools.partial(generate),
        functools.partial(functools.partial(generate_async)),
        Generates(),
        GeneratesAsync(),
        functools.partial(GeneratesAsync()),
        Model(None).stream,
    ],
)
def test_a_generator_function_is_refused_before_any_call(manager, function):
    with pytest.raises(TypeError, match=r" is a generator function; acquire a grant and count_stream\(\) its stream$"):
        manager.limit("m")(function)


def test_what_is_not_callable_is_refused(manager):
    with pytest.raises(TypeError, match=r"^limit decorates a function or another callable, got 5$"):
        manager.limit("m")(5)


# -- refused when it returns what is not done

AWAIT = "decorate a function that is declared with async def, and await it there"
METER = "acquire a grant and count_stream() its stream"


@pytest.mark.parametrize("make", [traced, lambda work: lambda: work()], ids=["traced", "lambda"])
def test_a_coroutine_that_is_returned_is_closed_before_it_ran(manager, make):
    async def work():
        raise AssertionError("it ran")

    with pytest.raises(TypeError) as caught:
        manager.limit("m", estimated_tokens=5, actual_tokens=len)(make(work))()
    assert str(caught.value).endswith(f" returned a coroutine, whose work would outlast the grant; {AWAIT}")
    assert used(manager) == (0, 0)


class Awaited:
    closed = False

    def __await__(self):
        raise AssertionError("it ran")
        yield


class Lines(io.StringIO):
    """A file, which is an iterator: for example of a response that is still being received."""


class Stream:
    """As the streams of the `openai` package are: an iterator whose ``__iter__`` is a generator."""

    closed = False

    def __iter__(self):
        yield from self

    def __next__(self):
        raise AssertionError("it ran")

    def close(self):
        self.closed = True


class AsyncStream:
    closed = False

    async def __aiter__(self):
        raise AssertionError("it ran")
        yield

    async def __anext__(self):
        raise AssertionError("it ran")

    async def close(self):
        self.closed = True


class OnlyIterable:
    async def __aiter__(self):
        raise AssertionError("it ran")
        yield


@types.coroutine
def of_old():
    yield


@pytest.mark.parametrize(
    ("make", "instead"),
    [
        (Awaited, AWAIT),
        (generate, METER),
        (lambda: (x for x in "ab"), METER),
        (lambda: map(len, "ab"), METER),
        (lambda: iter([1]), METER),
        (of_old, METER),
        (Lines, METER),
        (Stream, METER),
        (generate_async, METER),
        (AsyncStream, METER),
        (OnlyIterable, METER),
    ],
)
def test_a_stream_that_is_returned_is_closed(manager, make, instead):
    result = make()
    with pytest.raises(TypeError) as caught:
        manager.limit("m", estimated_tokens=5, actual_tokens=len)(lambda: result)()
    assert str(caught.value).endswith(
        f"<lambda> returned a {type(result).__name__}, whose work would outlast the grant; {instead}"
    )
    assert used(manager) == (0, 0)
    if isinstance(result, (Stream, Lines)):
        assert result.closed
    if inspect.isgenerator(result):
        assert inspect.getgeneratorstate(result) == inspect.GEN_CLOSED


@pytest.mark.parametrize(
    "make", [generate, generate_async, Stream, AsyncStream, OnlyIterable, Lines, Awaited, lambda: map(len, "ab")]
)
def test_a_stream_that_a_coroutine_returns_is_closed(manager, make):
    result = make()

    async def work():
        return result

    with pytest.raises(TypeError, match="work returned a .*, whose work would outlast the grant; "):
        asyncio.run(manager.limit("m", estimated_tokens=5, actual_tokens=len)(work)())
    assert used(manager) == (0, 0)
    assert getattr(result, "closed", True) or isinstance(result, Awaited)
    if inspect.isasyncgen(result):
        with pytest.raises(StopAsyncIteration):
            asyncio.run(anext_of(result))


async def anext_of(stream):
    return await anext(stream)


def test_a_task_that_is_returned_is_cancelled(manager):
    ran = []

    async def work():
        ran.append(True)

    @manager.limit("m", estimated_tokens=5)
    def begins():
        return asyncio.get_running_loop().create_task(work(), name="begun")

    @manager.limit("m", estimated_tokens=5)
    async def begins_and_returns():
        return asyncio.get_running_loop().create_task(work(), name="begun")

    async def main():
        with pytest.raises(TypeError, match="begins returned a Task, whose work would outlast the grant; decorate a"):
            begins()
        with pytest.raises(TypeError, match="begins_and_returns returned a Task, whose work would outlast the grant"):
            await begins_and_returns()
        await asyncio.sleep(0)
        assert [task.get_name() for task in asyncio.all_tasks()] != ["begun"]

    asyncio.run(main())
    assert ran == []
    assert used(manager) == (0, 0)


def test_a_future_of_an_executor_that_is_returned_is_cancelled(manager):
    future = concurrent.futures.Future()
    with pytest.raises(TypeError, match="returned a Future, whose work would outlast the grant; wait for it in the"):
        manager.limit("m", estimated_tokens=5)(lambda: future)()
    assert future.cancelled()
    assert used(manager) == (0, 0)


def test_what_closing_raises_is_not_lost_and_the_grant_comes_back(manager):
    class Stuck(Stream):
        def close(self):
            raise OSError("connection reset")

    with pytest.raises(OSError, match="connection reset"):
        manager.limit("m", estimated_tokens=5)(Stuck)()
    assert used(manager) == (0, 0)


def test_names_and_signature_of_a_function_are_kept(manager):
    @manager.limit("m")
    async def complete(prompt: str) -> str:
        """Complete a prompt."""
        return prompt

    assert (complete.__name__, complete.__doc__) == ("complete", "Complete a prompt.")
    assert str(inspect.signature(complete)) == "(prompt: str) -> str"
