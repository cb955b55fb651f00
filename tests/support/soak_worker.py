"""The processes of `test_soak`: everything at once over one state file. ``python soak_worker.py path pads number``."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from modelquota import (
    CapacityError,
    ManagerClosedError,
    ModelLockedError,
    QuotaExceededError,
    ResourceQuotaConfig,
    ResourceQuotaManager,
    UnknownModelError,
)

ROWS = 64
LANES = 8
"""Threads or tasks of one process that note what they do."""
KINDS = ("threads", "loops", "forks", "closes")
LANE = np.dtype(
    [
        ("steps", np.int64),
        ("busy", np.int64),  # whether somebody works here
        ("requests", np.int64),  # charged to "counted" for certain
        ("asked_requests", np.int64),  # at most
        ("tokens", np.int64),
        ("asked_tokens", np.int64),
        ("doubtful_requests", np.int64),  # of those that were killed, or closed, on the way
        ("doubtful_tokens", np.int64),
    ]
)
ORDERS = np.dtype([("end", np.int64), ("lanes", LANE, (len(KINDS), LANES))])

open_quota = ResourceQuotaConfig.unlimited
BRIEF = open_quota("any", max_requests_per_second=2, burst_requests=1, max_tokens_per_second=100, on_violation="reject")
"""For ids that come on sight: as good as new again after a second or two."""
DEFAULTS = {"new:*": BRIEF, "none:*": open_quota("any", max_requests_per_hour=0, on_violation="reject")}
QUOTAS = (
    open_quota("counted"),
    open_quota("capped", max_requests_per_day=2000, max_tokens_per_hour=10_000, on_violation="reject"),
    open_quota("slots", max_concurrent_requests=2, on_violation="queue", grace_period_sec=0.5),
    open_quota("memory", max_ram_mb=10, max_ssd_mb=10, on_violation="queue", grace_period_sec=0.3),
    open_quota("rated", max_requests_per_second=200, burst_requests=5, on_violation="throttle", grace_period_sec=0.3),
    open_quota("reserved", max_tokens_per_second=500, burst_tokens=500, on_violation="queue", grace_period_sec=0.4),
    open_quota("warned", max_requests_per_second=1, burst_requests=0, max_tokens_per_second=10, on_violation="warn"),
)
NAMED = tuple(quota.model_id for quota in QUOTAS)
WAITED = ("slots", "memory", "rated", "reserved")
EXPECTED = (QuotaExceededError, CapacityError, UnknownModelError, ModelLockedError)
"""What a verb may raise here; anything else is a fault."""


def set_up(path: str) -> ResourceQuotaManager:
    manager = ResourceQuotaManager(path=path, max_models=ROWS, default_quota=DEFAULTS)
    for quota in QUOTAS:
        manager.set_quota(quota)
    return manager


class Lane:
    """One thread, task or forked child at work; what it was granted of "counted" is written down before and after."""

    def __init__(self, manager: ResourceQuotaManager, lane: Any, seed: object) -> None:
        self.manager = manager
        self.lane = lane
        self.rng = random.Random(str(seed))
        self.verbs: list[Callable[[], None]] = [
            self.check, self.check, self.batch, self.grant, self.grant, self.cancel, self.charge, self.on_sight,
            self.on_sight, self.many_on_sight, self.change, self.come_and_go, self.report, self.read, self.peek,
            self.joint, self.forget_to_release, self.handle, self.cap,
        ]  # fmt: skip

    def ask(self, requests: int, tokens: int) -> None:
        """So much may be charged from now on; of what has not been answered nobody will ever know."""
        for what in ("requests", "tokens"):
            doubtful = self.lane[f"asked_{what}"] - self.lane[what]
            if doubtful:
                self.lane[f"doubtful_{what}"] += doubtful
                self.lane[f"asked_{what}"] -= doubtful
        self.lane["asked_requests"] += requests
        self.lane["asked_tokens"] += tokens

    def answer(self, requests: int, tokens: int) -> None:
        """So much has been; nothing is under way."""
        self.lane["requests"] += requests
        self.lane["tokens"] += tokens
        self.lane["asked_requests"] = self.lane["requests"]
        self.lane["asked_tokens"] = self.lane["tokens"]

    def step(self) -> None:
        with contextlib.suppress(*EXPECTED):
            self.rng.choice(self.verbs)()
        self.lane["steps"] += 1

    def check(self) -> None:
        self.ask(1, 7)
        assert self.manager.check_quota("counted", 7)
        self.answer(1, 7)

    def batch(self) -> None:
        count = self.rng.randrange(1, 200)
        rows = self.manager.codes(["counted"] * count)
        self.ask(count, 3 * count)
        assert not self.manager.check_many(rows, 3).any()
        self.answer(count, 3 * count)

    def charge(self) -> None:
        rows = self.manager.codes(["counted"])
        self.ask(0, 11)
        self.manager.charge_many(rows, 11)
        self.answer(0, 11)

    def grant(self) -> None:
        ids = ("counted", *self.rng.sample(("memory", "warned"), self.rng.randrange(3)))
        self.ask(1, 1000)
        try:
            grant = self.manager.reserve(ids, 50, self.rng.randrange(4), 1)
        except QuotaExceededError:
            self.answer(0, 0)
            raise
        for _ in range(self.rng.randrange(4)):
            grant.add(self.rng.randrange(100))
        if self.rng.random() < 0.5:
            grant.settle(self.rng.randrange(300))
        grant.release()
        self.answer(1, grant.tokens)

    def cancel(self) -> None:
        self.ask(1, 50)
        grant = self.manager.reserve("counted", 50)
        time.sleep(self.rng.random() * 1e-3)
        grant.cancel()
        self.answer(0, 0)

    def on_sight(self) -> None:
        self.manager.check_quota(f"new:{self.rng.randrange(100_000)}", self.rng.choice((1, 1000)))
        for _ in range(5):
            assert not self.manager.check_quota(f"none:{self.rng.randrange(100_000)}", 1)

    def many_on_sight(self) -> None:
        ids = [f"none:{number}" for number in self.rng.sample(range(100_000), self.rng.randrange(1, 5))]
        with contextlib.suppress(ValueError):  # a code of an id that made room for somebody
            self.manager.check_many(self.manager.codes(ids), 1)
        self.manager.check_quota(tuple(ids), 1)

    def change(self) -> None:
        manager, rng = self.manager, self.rng
        kind = rng.randrange(5)
        if kind == 0:
            manager.update_quota("counted", max_requests_per_second=rng.choice((None, 1e9, 1e9 + 0.5)))
        elif kind == 1:
            manager.update_quota("slots", max_concurrent_requests=rng.randrange(1, 4))
        elif kind == 2:
            manager.update_quota("reserved", max_tokens_per_second=rng.choice((None, 400, 900)))
        elif kind == 3:
            manager.update_quota("warned", shadow_limits=rng.choice(((), ("tokens_per_second",))))
            manager.reset_burst("warned")
        else:
            manager.set_quota(QUOTAS[NAMED.index("memory")].replace(grace_period_sec=rng.choice((0.1, 0.3))))

    def come_and_go(self) -> None:
        name = f"coming:{self.rng.randrange(3)}"
        self.manager.set_quota(open_quota(name, max_requests_per_hour=3, on_violation="reject"))
        with self.manager.reserve((name, "memory"), 1, 1):
            if self.rng.random() < 0.5:
                self.manager.remove_quota(name)
        self.manager.remove_quota(name)

    def report(self) -> None:
        self.manager.update_memory_usage("memory", self.rng.randrange(5), self.rng.randrange(5))

    def read(self) -> None:
        manager = self.manager
        self.rng.choice((
            manager.snapshot, manager.get_stats, manager.list_models, manager.flush, lambda: manager.get_usage("slots"),
            lambda: manager.get_model_report("rated"),
        ))()  # fmt: skip

    def peek(self) -> None:
        self.manager.peek_quota(
            self.rng.choice((*NAMED, "new:peeked", ("slots", "memory"), ("new:x", "counted"))), 5, 1
        )

    def joint(self) -> None:
        ids = self.rng.sample(NAMED[1:], self.rng.randrange(2, 4))
        with self.manager.reserve([*ids, f"new:{self.rng.randrange(1000)}"], 2, 1, 1) as grant:
            grant.add(3)

    def forget_to_release(self) -> None:
        self.manager.reserve("memory", 1, 1)

    def handle(self) -> None:
        seen = f"new:{self.rng.randrange(1000)}"
        self.manager.check_quota(seen, 1)
        handle = self.manager.model(self.rng.choice((*NAMED[1:], seen)))
        handle.check(1)
        with handle.reserve(2, 1):
            pass

    def cap(self) -> None:
        self.manager.check_quota("capped", self.rng.randrange(20))

    def waits(self) -> tuple[list[str], dict[str, Any]]:
        """Arguments of an acquire: one of the models that wait, or some of them in any order."""
        ids = self.rng.sample(WAITED, self.rng.choice((1, 1, 1, 2, 3)))
        tokens, ram_mb = self.rng.randrange(200), self.rng.randrange(5)
        how = {"estimated_tokens": tokens, "ram_needed_mb": ram_mb, "ssd_needed_mb": 1}
        return ids, how | {"timeout": self.rng.choice((None, 0.05, 0.5)), "priority": self.rng.randrange(2)}

    def use(self, grant: Any) -> None:
        if self.rng.random() < 0.3:
            grant.cancel()
        elif self.rng.random() < 0.7:
            grant.settle(self.rng.randrange(10))
        grant.release()

    def wait(self) -> None:
        ids, how = self.waits()
        grant = self.manager.acquire(ids if len(ids) > 1 else ids[0], **how)
        time.sleep(self.rng.random() * 2e-3)
        self.use(grant)

    async def wait_async(self) -> None:
        ids, how = self.waits()
        patience = self.rng.choice((0.001, 0.05, 5))
        try:
            async with asyncio.timeout(patience):
                grant = await self.manager.acquire_async(ids if len(ids) > 1 else ids[0], **how)
        except TimeoutError:
            return
        await asyncio.sleep(self.rng.random() * 2e-3)
        self.use(grant)

    def pause(self) -> float:
        return self.rng.choice((0, 0.001, 0.004)) * self.rng.random()

    def work(self, done: Callable[[], bool]) -> None:
        """A thread."""
        self.lane["busy"] = 1
        while not done():
            self.step()
            if self.rng.random() < 0.2:
                with contextlib.suppress(*EXPECTED):
                    self.wait()
            time.sleep(self.pause())
        self.lane["busy"] = 0

    async def work_async(self, done: Callable[[], bool]) -> None:
        """A task."""
        self.lane["busy"] = 1
        while not done():
            with contextlib.suppress(*EXPECTED):
                await self.wait_async()
            if self.rng.random() < 0.5:
                self.step()
            else:
                self.lane["steps"] += 1
            await asyncio.sleep(self.pause())
        self.lane["busy"] = 0


class Worker:
    """One process."""

    def __init__(self, path: str, orders: NDArray[Any], number: int) -> None:
        self.path = path
        self.orders = orders
        self.lanes = orders["lanes"][0][number]
        self.seed = f"{os.getpid()}-{time.monotonic_ns()}"
        self.rng = random.Random(self.seed)

    def ended(self) -> bool:
        return bool(self.orders["end"][0])

    def open(self) -> ResourceQuotaManager:
        return ResourceQuotaManager(path=self.path, default_quota=DEFAULTS)

    def lane(self, manager: ResourceQuotaManager, number: int) -> Lane:
        return Lane(manager, self.lanes[number : number + 1][0], f"{self.seed}-{number}")

    def guarded(self, body: Callable[[], None]) -> Callable[[], None]:
        """A fault in one thread ends the process, at once and loudly."""

        def run() -> None:
            try:
                body()
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(3)

        return run

    def run_threads(self, bodies: list[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=self.guarded(body), daemon=True) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def threads(self) -> None:
        """Threads that share one manager."""
        with self.open() as manager:
            self.run_threads([lambda i=i: self.lane(manager, i).work(self.ended) for i in range(4)])

    def loops(self) -> None:
        """Tasks on two event loops in two threads, and a thread, that share one manager."""
        with self.open() as manager:

            async def tasks(first: int) -> None:
                async with asyncio.TaskGroup() as group:
                    for i in range(first, first + 3):
                        group.create_task(self.lane(manager, i).work_async(self.ended))

            self.run_threads([
                lambda: asyncio.run(tasks(0)), lambda: asyncio.run(tasks(3)),
                lambda: self.lane(manager, 6).work(self.ended),
            ])  # fmt: skip

    def forks(self) -> None:
        """Children that inherit the manager, some of which are killed."""
        manager = self.open()
        own = self.lane(manager, 0)
        own.lane["busy"] = 1
        children: dict[int, int] = {}
        while not self.ended():
            free = [i for i in range(1, LANES) if i not in children.values()]
            if len(children) < 3:
                children[self.fork(manager, free[0])] = free[0]
            for _ in range(5):
                own.step()
                time.sleep(own.pause())
            if self.rng.random() < 0.1:
                os.kill(self.rng.choice(list(children)), signal.SIGKILL)
            self.reap(children, os.WNOHANG)
        while children:
            self.reap(children, 0)
        own.lane["busy"] = 0
        manager.close()

    def reap(self, children: dict[int, int], how: int) -> None:
        for pid in list(children):
            found, status = os.waitpid(pid, how)
            if found:
                number = children.pop(pid)
                if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
                    os._exit(3)
                self.lanes["busy"][number] = 0

    def fork(self, manager: ResourceQuotaManager, number: int) -> int:
        pid = os.fork()
        if pid == 0:
            give_up = time.monotonic() + self.rng.random()
            self.seed += f"-{os.getpid()}"
            self.guarded(lambda: self.lane(manager, number).work(lambda: time.monotonic() > give_up))()
            os._exit(0)
        return pid

    def closes(self) -> None:
        """Managers that are closed while threads are inside their verbs."""
        while not self.ended():
            manager = self.open()
            give_up = time.monotonic() + self.rng.random()

            def work(number: int, manager: ResourceQuotaManager = manager) -> None:
                lane = self.lane(manager, number)
                with contextlib.suppress(ManagerClosedError):
                    lane.work(self.ended)
                lane.lane["busy"] = 0

            def close(manager: ResourceQuotaManager = manager, give_up: float = give_up) -> None:
                while time.monotonic() < give_up and not self.ended():
                    time.sleep(0.01)
                manager.close()

            self.run_threads([lambda: work(0), lambda: work(1), lambda: work(2), close])


def main(path: str, pads: str, number: int) -> None:
    faulthandler.enable()  # SIGABRT says where everybody is
    warnings.simplefilter("ignore", ResourceWarning)
    sys.setswitchinterval(1e-4)
    orders = np.memmap(pads, ORDERS, "r+", shape=(1,))
    worker = Worker(path, orders, number)
    worker.guarded(getattr(worker, KINDS[number % len(KINDS)]))()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
