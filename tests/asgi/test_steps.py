"""The first step of whatever a server hands out to be awaited."""

import asyncio

import pytest

from modelquota.asgi.steps import first_step


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
