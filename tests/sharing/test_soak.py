"""Everything at once over one state file, with kills and stops; then nothing is held, nobody is stuck, all sums agree.

``MODELQUOTA_SOAK_SECONDS=600 pytest tests/sharing/test_soak.py`` goes on for longer.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from patience import until
from soak_worker import KINDS, NAMED, ORDERS, ROWS, set_up

from modelquota import CapacityError, ResourceQuotaManager
from modelquota._core.state.validate import Reader
from modelquota.statefile.inspect import verify_file

SECONDS = float(os.environ.get("MODELQUOTA_SOAK_SECONDS", "20"))
SEED = os.environ.get("MODELQUOTA_SOAK_SEED", "")
STUCK = 30
"""Seconds in which every thread, task and child gets on, however busy the machine."""
WORKER = Path(__file__).parents[1] / "support" / "soak_worker.py"


class Soak:
    """The processes at work, and who kills and stops them."""

    def __init__(self, folder: Path, seed: str) -> None:
        self.path = str(folder / "quota.state")
        self.pads = str(folder / "pads")
        self.log = folder / "errors"
        self.rng = random.Random(seed)
        self.manager = set_up(self.path)
        np.zeros(1, ORDERS).tofile(self.pads)
        self.orders = np.memmap(self.pads, ORDERS, "r+", shape=(1,))
        self.lanes = self.orders["lanes"][0]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.seen = self.lanes["steps"].copy()
        self.moved = np.full(self.lanes.shape, time.monotonic())
        self.kills = self.stops = 0

    def start(self, number: int) -> subprocess.Popen[bytes]:
        self.lanes["busy"][number] = 0
        command = [sys.executable, str(WORKER), self.path, self.pads, str(number)]
        with self.log.open("ab") as log:
            # a group of its own, with the children that it forks
            return subprocess.Popen(command, stderr=log, stdout=log, process_group=0)

    def kill(self, number: int) -> None:
        """Kill a process, with its children or without those: they go on as orphans until their time is over."""
        process = self.processes[number]
        with contextlib.suppress(ProcessLookupError):
            if self.rng.random() < 0.3:
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(self.rng.random() * 0.01)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.kills += 1
        self.processes[number] = self.start(number)

    def stop(self, number: int) -> None:
        """Stop a process for a while, wherever it is: with a lock, in a queue, holding what others wait for."""
        pid = self.processes[number].pid
        os.killpg(pid, signal.SIGSTOP)
        time.sleep(self.rng.choice((0.01, 0.1, 0.7)) * self.rng.random())
        os.killpg(pid, signal.SIGCONT)
        self.stops += 1

    def watch(self) -> None:
        """Nobody has failed, and everybody gets on."""
        for number, process in enumerate(self.processes):
            assert process.poll() is None, f"{KINDS[number]} ended with {process.returncode}\n{self.log.read_text()}"
        steps, now = self.lanes["steps"].copy(), time.monotonic()
        self.moved[(steps != self.seen) | (self.lanes["busy"] == 0)] = now
        self.seen = steps
        if (now - self.moved).max() > STUCK:
            self.fail(f"stuck: {np.argwhere(now - self.moved > STUCK).tolist()}")

    def fail(self, what: str) -> None:
        """Have everybody say where it is, and fail."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGABRT)
        time.sleep(1)
        raise AssertionError(f"{what}\n{self.log.read_text()}")

    def run(self, seconds: float) -> None:
        give_up = time.monotonic() + seconds
        self.processes = [self.start(number) for number in range(len(KINDS))]
        while time.monotonic() < give_up:
            time.sleep(self.rng.random() * 0.3)
            if self.rng.random() < 0.4:
                self.stop(self.rng.randrange(len(KINDS)))
            if self.rng.random() < 0.25:
                self.kill(self.rng.randrange(len(KINDS)))
            self.watch()
            usage = self.manager.get_usage("capped")
            assert usage.requests_this_day <= 2000
            # a grant that adds past its estimate counts its last token even past the limit: one in each lane at most
            assert usage.tokens_this_hour <= 10_000 + self.lanes.size
        self.orders["end"] = 1
        for number, process in enumerate(self.processes):
            try:
                code = process.wait(STUCK)
            except subprocess.TimeoutExpired:
                self.fail(f"{KINDS[number]} does not end")
            assert code == 0, f"{KINDS[number]} ended with {code}\n{self.log.read_text()}"

    def end(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def left_over(manager: ResourceQuotaManager) -> list[Any]:
    """What is still held or waited for."""
    manager.get_stats()
    manager.snapshot()
    found: list[Any] = []
    for name in manager.list_models():
        usage = manager.get_usage(name)
        if usage is not None:
            held = (usage.concurrent_requests, usage.reserved_ram_mb, usage.reserved_ssd_mb, usage.queued_requests)
            found += [(name, held)] if any(held) else []
    descriptor = os.open(str(manager.path), os.O_RDONLY)
    try:
        reader = Reader(descriptor, str(manager.path))
        reader.check_header()
        found += [record for record in (*reader.held(), *reader.entries()) if record["seat"]]
    finally:
        os.close(descriptor)
    header, rows, cold_rows = manager._arrays()
    found += ["the registry is locked"] if header["registry_lock"][0] else []
    found += [("locked", int(row)) for row in np.flatnonzero(rows["lock"])]
    found += [("tokens reserved", int(row)) for row in np.flatnonzero(cold_rows["reserved_tokens"])]
    found += [("handles", int(row)) for row in np.flatnonzero(cold_rows["handles"])]
    return found


def test_everything_at_once(tmp_path):
    seed = SEED or str(random.randrange(2**32))
    print("seed", seed)
    soak = Soak(tmp_path, seed)
    try:
        soak.run(SECONDS)
    finally:
        soak.end()
    manager, lanes = soak.manager, soak.lanes
    give_up = time.monotonic() + STUCK
    while found := left_over(manager):
        assert time.monotonic() < give_up, found
        time.sleep(0.05)
    assert verify_file(soak.path) == []
    usage = manager.get_usage("counted")
    for what, used in (("requests", usage.requests_this_day), ("tokens", usage.tokens_this_day)):
        certain = int(lanes[what].sum())
        doubtful = int((lanes[f"doubtful_{what}"] + lanes[f"asked_{what}"] - lanes[what]).sum())
        print(what, certain, "doubtful", doubtful, "used", used)
        assert certain <= used <= certain + doubtful
    stats = manager.get_stats()
    stopped = stats.rejected_requests + stats.throttled_requests + stats.queued_requests
    assert stats.total_checks == stats.allowed_requests + stats.denied_requests
    assert stats.denied_requests == stopped - stats.waited_requests
    assert stats.total_violations == stopped + stats.warned_requests
    print("steps", int(lanes["steps"].sum()), "kills", soak.kills, "stops", soak.stops)
    header, _, _ = manager._arrays()
    print("recoveries", int(header["recoveries"][0]), "changes", int(header["registry_version"][0]), stats)
    assert set(NAMED) <= set(manager.list_models())
    # all that came on sight and is as good as new makes room for others
    until(lambda: all(gets_in(manager, f"none:after {number}") for number in range(ROWS - len(NAMED))))
    other = ResourceQuotaManager(path=soak.path)
    assert sorted(other.list_models()) == sorted(manager.list_models())


def gets_in(manager: ResourceQuotaManager, model_id: str) -> bool:
    try:
        return not manager.check_quota(model_id, 1)
    except CapacityError:
        time.sleep(0.02)
        return False
