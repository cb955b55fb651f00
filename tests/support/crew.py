"""Processes that work on one state, write down what they were granted, and may be killed at any instant.

What each was granted stands in memory that outlives it: what is certain, and the bounds of what it is asking just now.
So the use that the state shows is known to within the last request of each that was killed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from factories import OPEN, open_quota, queue_quota
from numpy.typing import NDArray

from modelquota import QuotaExceededError, ResourceQuotaManager, Tokens

COUNTED = ("a", "b", "capped")  # models whose use is compared with what was granted
HELD = ("slots", "memory")
IDLE = "idle"  # one that nobody works with
SUM = "a#sum"  # a meter that is never removed, and counts what its model counts
LINE_METER = "slots#line"  # one that has a queue of its own
COMING_METERS = ("a#comes", "b#comes", "capped#comes", "slots#comes", "coming#comes")
WORK, GIVE_BACK, STAND_STILL, END = range(4)  # orders
BATCH = 4096
BATCH_TOKENS = 3
UNDECIDED = 255
TASKS = ("checks", "batches", "grants", "queue", "registry", "opening", "everything")

BANK = np.dtype(
    [
        ("requests", np.int64, len(COUNTED)),
        ("tokens", np.int64, len(COUNTED)),
        ("asked_requests", np.int64, len(COUNTED)),  # of what is under way: none of it may have been charged, or all
        ("asked_tokens", np.int64, len(COUNTED)),
        ("batch", np.int64),  # 1 + index in COUNTED of the model that the batch is for; 0 = none under way
    ]
)
PAD = np.dtype(
    [
        ("steps", np.int64),
        ("paused", np.int64),
        ("failed", np.int64),
        ("bank", np.int64),  # which of the two holds: one store ends a request, wherever its process is killed
        ("banks", BANK, 2),
        ("out", np.uint8, BATCH),
    ]
)


def shared_array(dtype: Any, count: int) -> NDArray[Any]:
    """Zeros that forked processes share."""
    dtype = np.dtype(dtype)
    return np.frombuffer(mmap.mmap(-1, dtype.itemsize * count), dtype)


class Worker:
    """One process of the crew, as it is in the child."""

    def __init__(self, manager: ResourceQuotaManager, pad: NDArray[Any], number: int, name: str) -> None:
        self.manager = manager
        self.pad = pad
        self.number = number
        self.rng = random.Random(name)
        self.name = name
        self.own = 0

    def run(self, task: str, orders: NDArray[np.int64]) -> None:
        """Work until told to end; pause while told to."""
        steps: dict[str, Callable[[], None]] = {name: getattr(self, name) for name in TASKS[:-1]}
        choice = list(steps) if task == "everything" else [task]
        while (order := int(orders[0])) != END:
            if order != WORK:
                if order == GIVE_BACK:
                    self.manager.reserve(IDLE, 0).release()  # and before it, what a stopped process was in the way of
                self.pad["paused"] = order
                time.sleep(0.0003)
                continue
            self.pad["paused"] = 0
            steps[self.rng.choice(choice)]()
            self.pad["steps"] += 1

    @property
    def bank(self) -> Any:
        return self.pad["banks"][self.pad["bank"]]

    def end_request(self, model: int, requests: int, tokens: int) -> None:
        """Nothing is under way any more, and so much more is certain."""
        number = 1 - int(self.pad["bank"])
        other = self.pad["banks"][number]
        other["requests"] = self.bank["requests"]
        other["tokens"] = self.bank["tokens"]
        other["requests"][model] += requests
        other["tokens"][model] += tokens
        other["asked_requests"] = other["asked_tokens"] = other["batch"] = 0
        self.pad["bank"] = number

    @contextlib.contextmanager
    def asking(self, model: int, tokens: int) -> Any:
        """Note one request and at most so many tokens as asked; what is appended to the list is certain afterwards."""
        certain: list[int] = []
        self.bank["asked_tokens"][model] = tokens
        self.bank["asked_requests"][model] = 1
        yield certain
        self.end_request(model, len(certain), sum(certain))

    def checks(self) -> None:
        for _ in range(self.rng.randrange(1, 200)):
            model = self.rng.randrange(len(COUNTED))
            with self.asking(model, 7) as certain:
                if self.manager.check_quota(COUNTED[model], 7):
                    certain.append(7)

    def batches(self) -> None:
        model = self.rng.randrange(len(COUNTED))
        count = self.rng.randrange(1, BATCH)
        rows = np.full(count, self.manager.codes([COUNTED[model]])[0])
        self.pad["out"][:] = UNDECIDED
        self.bank["batch"] = 1 + model
        self.manager.check_many(rows, BATCH_TOKENS, out=self.pad["out"][:count])
        admitted = int((self.pad["out"] == 0).sum())
        self.end_request(model, admitted, BATCH_TOKENS * admitted)

    def grants(self) -> None:
        model = self.rng.randrange(2)
        ids = (COUNTED[model], *self.rng.sample(HELD, self.rng.randrange(3)))
        with self.asking(model, 1000) as certain:
            try:
                grant = self.manager.reserve(ids, self.rng.choice((50, Tokens(25, 5, 20))), self.rng.randrange(3), 1)
            except QuotaExceededError:
                return
            how = self.rng.randrange(5)
            for _ in range(self.rng.randrange(4)):
                if how != 3:
                    grant.add(self.rng.randrange(100))
            if how == 0:
                time.sleep(self.rng.random() * 1e-3)
            if how == 1:
                grant.settle(self.rng.randrange(300))
            if how == 2:
                grant.cancel()
            else:
                grant.release()
                tokens = grant.tokens
                certain.append(tokens.total if isinstance(tokens, Tokens) else tokens)

    def queue(self) -> None:
        with contextlib.suppress(QuotaExceededError):
            grant = self.manager.acquire("slots", 1, 1, timeout=0.3, priority=self.rng.randrange(2))
            if self.rng.random() < 0.3:
                time.sleep(self.rng.random() * 1e-3)
            grant.release()

    def registry(self) -> None:
        manager, rng = self.manager, self.rng
        kind = rng.randrange(8)
        self.own += 1
        own = f"{self.name}/{self.own}" * rng.randrange(1, 4)
        if kind == 0:
            rate = rng.choice((1e9, None, 1e9 + 0.5))
            manager.update_quota(rng.choice(("a", "b")), max_requests_per_second=rate)
        if kind == 1:
            manager.set_quota("slots", max_concurrent_requests=rng.randrange(2, 4), **LINE)
        if kind == 2:
            manager.set_quota(own, max_tokens_per_hour=5)
            manager.check_quota(own, 5)
            assert not manager.check_quota(own, 5)
            manager.remove_quota(own)
        if kind == 3:
            manager.set_quota("coming", max_requests_per_day=3)
            manager.check_quota("coming", 1)
        if kind == 4:
            manager.remove_quota("coming")
        if kind == 5:
            weights = rng.choice(((1, 1, 1), (0, 0, 1), (3, 0.3, 15)))
            manager.set_quota(open_quota(rng.choice(COMING_METERS), token_weights=weights))
        if kind == 6:
            manager.remove_quota(rng.choice(COMING_METERS))
        if kind == 7:
            own = f"{self.name}/{self.own}"
            manager.set_quota(open_quota(f"{own}#one", max_tokens_per_hour=7, token_weights=(0, 0, 1)))
            manager.set_quota(open_quota(own, max_tokens_per_hour=1_000))
            with manager.reserve(own, Tokens(100, 0, 3)) as grant:
                grant.settle(Tokens(90, 0, 5))
            denied = manager.check_quota(own, Tokens(1, 1, 3))
            assert (denied.allowed, denied.model_id) == (False, f"{own}#one"), denied
            for model_id in rng.sample((own, f"{own}#one"), 2):
                manager.remove_quota(model_id)

    def opening(self) -> None:
        path = str(self.manager.path)
        other = ResourceQuotaManager(path=path if self.rng.random() < 0.7 else path + ".other", max_models=4096)
        other.set_quota("opened", max_concurrent_requests=1)
        with contextlib.suppress(QuotaExceededError):
            other.reserve("opened", 1).release()


LINE: dict[str, Any] = {**OPEN, "on_violation": "queue"}
REJECT = {"on_violation": "reject"}
WIDE = LINE | REJECT | {"max_ram_mb": None, "max_ssd_mb": None, "max_tokens_per_month": 2**60}


def prepare(manager: ResourceQuotaManager) -> None:
    """Register the models of the crew."""
    manager.set_quota("a", **WIDE)
    manager.set_quota("b", **WIDE | {"max_requests_per_second": 1e9})
    manager.set_quota("capped", **WIDE | {"max_requests_per_day": 100})
    manager.set_quota("slots", max_concurrent_requests=2, max_ram_mb=5, **LINE)
    manager.set_quota(open_quota(IDLE))
    manager.set_quota(queue_quota(LINE_METER, max_concurrent_requests=3))
    manager.set_quota(open_quota(SUM, max_tokens_per_month=2**60))
    manager.set_quota("memory", max_ram_mb=4, max_ssd_mb=3, max_concurrent_requests=3, **LINE | REJECT)


class Crew:
    """Several processes at work, as the one sees it that kills them."""

    def __init__(self, path: str, size: int, seed: object) -> None:
        self.manager = ResourceQuotaManager(path=path, max_models=4096)
        prepare(self.manager)
        self.path = path
        self.rng = random.Random(seed)
        self.seed = seed
        self.pads = shared_array(PAD, size)
        self.orders = shared_array(np.int64, 8)
        self.pids = [0] * size
        self.born = 0
        self.certain = {"requests": np.zeros(len(COUNTED), np.int64), "tokens": np.zeros(len(COUNTED), np.int64)}
        self.doubtful = {"requests": np.zeros(len(COUNTED), np.int64), "tokens": np.zeros(len(COUNTED), np.int64)}

    def hire(self, number: int, task: str) -> None:
        """Fork a process that works at `task`: with the manager that it inherits, or one of its own."""
        self.born += 1
        self.pads[number] = np.zeros((), PAD)
        pid = os.fork()
        if pid == 0:
            try:
                manager = self.manager if self.born % 2 else ResourceQuotaManager(path=self.path)
                Worker(manager, self.pads[number], number, f"{self.seed}-{self.born}").run(task, self.orders)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                self.pads[number]["failed"] = 1
            finally:
                os._exit(1)
        self.pids[number] = pid

    def kill(self, number: int) -> None:
        """Kill it, sometimes after it has stood still for a while, and take down what it was granted."""
        pid = self.pids[number]
        if self.rng.random() < 0.3:
            os.kill(pid, signal.SIGSTOP)
            time.sleep(self.rng.random() * 0.004)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        self.pids[number] = 0
        pad = self.pads[number]
        bank = pad["banks"][pad["bank"]]
        for what in ("requests", "tokens"):
            self.certain[what] += bank[what]
            self.doubtful[what] += bank[f"asked_{what}"]
        if bank["batch"]:
            model, admitted = int(bank["batch"]) - 1, int((pad["out"] == 0).sum())
            self.certain["requests"][model] += admitted
            self.certain["tokens"][model] += admitted * BATCH_TOKENS
            self.doubtful["requests"][model] += 1
            self.doubtful["tokens"][model] += BATCH_TOKENS
        self.pads[number] = np.zeros((), PAD)

    def living(self) -> list[int]:
        return [number for number, pid in enumerate(self.pids) if pid]

    def wait_until(self, what: str, seconds: float, done: Callable[[], bool]) -> float:
        """How long it took; an error after `seconds`."""
        start = time.monotonic()
        while not done():
            for number in self.living():
                assert not self.pads[number]["failed"], "a process of the crew failed"
            elapsed = time.monotonic() - start
            assert elapsed < seconds, f"{what}: not within {seconds} s"
            time.sleep(0.0002)
        return time.monotonic() - start

    def see_progress(self, seconds: float) -> None:
        """Everybody who lives gets on."""
        before = self.pads["steps"].copy()
        self.wait_until("progress", seconds, lambda: all(self.pads["steps"][i] > before[i] for i in self.living()))

    @contextlib.contextmanager
    def paused(self, seconds: float) -> Any:
        """While it lasts, nobody asks for anything, and everybody gives back what could not be given back before."""
        self.order(GIVE_BACK, seconds)
        yield
        self.pads["paused"] = 0
        self.orders[0] = WORK

    def order(self, what: int, seconds: float) -> None:
        """Tell everybody what to do in a pause, and wait until they have heard."""
        self.orders[0] = what
        self.wait_until("a pause", seconds, lambda: all(self.pads["paused"][i] == what for i in self.living()))

    def bounds(self, what: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What the state must show of each model in COUNTED, at least and at most, while all are paused."""
        least = self.certain[what] + sum(pad["banks"][pad["bank"]][what] for pad in self.pads)
        return least, least + self.doubtful[what]

    def end(self) -> None:
        """Let them finish, or end them."""
        self.orders[0] = END
        deadline = time.monotonic() + 2
        for number in self.living():
            while time.monotonic() < deadline and os.waitpid(self.pids[number], os.WNOHANG)[0] == 0:
                time.sleep(0.001)
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.kill(self.pids[number], signal.SIGKILL)
                os.waitpid(self.pids[number], 0)
