"""The first step of a coroutine without a task, and its rest."""

import asyncio

import pytest

from modelquota.asgi.steps import first_step


def run(main):
    return asyncio.run(main())


def test_what_does_not_wait_is_done_at_once():
    async def quick():
        return 5

    async def failing():
        raise ZeroDivisionError

    async def main():
        assert first_step(quick()) == (5, None)
        done = asyncio.get_running_loop().create_future()
        done.set_result(7)
        assert first_step(done) == (7, None)
        with pytest.raises(ZeroDivisionError):
            first_step(failing())

    run(main)


@pytest.mark.parametrize("in_a_task", [False, True])
def test_the_rest_is_awaited_here_or_in_another_task(in_a_task):
    async def slow(future):
        await asyncio.sleep(0)
        return [await future, await future]

    async def awaited(rest):
        return await rest

    async def main():
        future = asyncio.get_running_loop().create_future()
        result, rest = first_step(slow(future))
        assert result is None
        asyncio.get_running_loop().call_later(0.001, future.set_result, 5)
        assert await (asyncio.create_task(awaited(rest)) if in_a_task else rest) == [5, 5]

    run(main)


def test_a_cancellation_reaches_what_it_waits_for():
    seen = []

    async def stubborn():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            seen.append("canceled")
            raise
        finally:
            await asyncio.sleep(0)
            seen.append("cleaned up")

    async def awaited(rest):
        await rest

    async def main():
        _, rest = first_step(stubborn())
        task = asyncio.create_task(awaited(rest))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main)
    assert seen == ["canceled", "cleaned up"]


def test_a_timeout_around_the_rest_ends_it():
    async def slow():
        await asyncio.sleep(60)

    async def main():
        _, rest = first_step(slow())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await rest

    run(main)


def test_an_error_of_what_it_waits_for_is_seen_where_it_waits():
    async def catching(future):
        try:
            await future
        except ZeroDivisionError:
            return "caught"

    async def main():
        future = asyncio.get_running_loop().create_future()
        _, rest = first_step(catching(future))
        future.set_exception(ZeroDivisionError())
        assert await rest == "caught"

    run(main)


class PlainIterator:
    """An awaitable whose iterator can only be advanced, as some servers write it in another language."""

    def __init__(self, steps):
        self._steps = iter(steps)

    def __await__(self):
        return self

    def __iter__(self):
        return self

    def __next__(self):
        for step in self._steps:
            return step
        raise StopIteration("result")


def test_an_iterator_that_is_no_generator():
    assert first_step(PlainIterator([])) == ("result", None)

    async def main():
        result, rest = first_step(PlainIterator([None, None]))
        assert result is None
        return await rest

    assert asyncio.run(main()) == "result"


def test_an_error_reaches_who_awaits_it():
    async def main():
        _, rest = first_step(PlainIterator([None] * 1000))
        task = asyncio.create_task(asyncio.wait_for(rest, 5))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
