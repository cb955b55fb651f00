"""`acquire_async` if no asyncio loop runs, as under trio: a clear error before anything is counted."""

import asyncio
import threading

import anyio
import pytest
import trio
from factories import UNLIMITED, make_manager, open_quota

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager

SITUATIONS = {
    "admitted at once": {},
    "rejected": {"max_tokens_per_day": 0, "on_violation": "reject"},
    "throttled": {"max_requests_per_second": 0.5, "on_violation": "throttle"},
    "queued": {"max_concurrent_requests": 1, "on_violation": "queue"},
    "warned": {"max_tokens_per_day": 0, "on_violation": "warn"},
}


@pytest.fixture(params=SITUATIONS.values(), ids=SITUATIONS)
def manager(request):
    manager = make_manager(ResourceQuotaConfig("m", **UNLIMITED | request.param))
    if "max_concurrent_requests" in request.param:
        manager.held = manager.reserve("m", 1)
    if "max_requests_per_second" in request.param:
        manager.check_quota("m", 1)
    return manager


async def wait(manager):
    await manager.acquire_async("m", 5)


async def wait_for_several(manager):
    await manager.acquire_async(["m", "other"], 5, timeout=1, priority=3)


async def wait_in_with(manager):
    async with manager.acquire_async("m", 5):
        raise AssertionError("it was admitted")


async def wait_by_handle(manager):
    await manager.model("m").acquire_async(5)


async def wait_decorated(manager):
    @manager.limit("m", estimated_tokens=5)
    async def work():
        raise AssertionError("it ran")

    await work()


def by_hand(function, *arguments):
    function(*arguments).send(None)


def in_a_thread_beside_a_loop(function, *arguments):
    async def main():
        await asyncio.to_thread(by_hand, function, *arguments)

    asyncio.run(main())


RUNNERS = {
    "trio": trio.run,
    "anyio on trio": lambda function, *arguments: anyio.run(function, *arguments, backend="trio"),
    "no loop at all": by_hand,
    "a thread beside a loop": in_a_thread_beside_a_loop,
}


def counted(manager):
    return manager.get_stats(), manager.get_usage("m"), manager.list_models()


@pytest.mark.parametrize("run", RUNNERS.values(), ids=RUNNERS)
@pytest.mark.parametrize("wait", [wait, wait_for_several, wait_in_with, wait_by_handle, wait_decorated])
def test_without_an_asyncio_loop_it_is_an_error_and_nothing_is_counted(manager, run, wait):
    before = counted(manager)
    with pytest.raises(RuntimeError, match="acquire_async.*asyncio"):
        run(wait, manager)
    assert counted(manager) == before


def test_an_unknown_model_is_not_counted_and_not_registered():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    for manager.default_quota in (None, {"*": ResourceQuotaConfig("any")}):
        before = manager.get_stats()
        with pytest.raises(RuntimeError, match="acquire_async.*asyncio"):
            trio.run(wait, manager)
        assert (manager.get_stats(), manager.list_models()) == (before, [])


def test_acquire_in_a_thread_of_trio_works():
    manager = make_manager(open_quota("m"))

    async def main():
        grant = await trio.to_thread.run_sync(lambda: manager.acquire("m", 5))
        grant.release()

    trio.run(main)
    assert manager.get_usage("m").tokens_this_day == 5


@pytest.mark.parametrize(
    "run", [asyncio.run, lambda coroutine: anyio.run(lambda: coroutine), lambda coroutine: in_thread(coroutine)]
)
def test_with_an_asyncio_loop_it_may_be_made_before_the_loop(run):
    manager = make_manager(open_quota("m"))
    made = manager.acquire_async("m", 5)

    async def main():
        (await made).release()

    run(main())
    assert manager.get_usage("m").tokens_this_day == 5


def in_thread(coroutine):
    thread = threading.Thread(target=asyncio.run, args=(coroutine,))
    thread.start()
    thread.join(60)
