"""Hosts of a cluster as processes, what they admitted in true time, and the verdict over it."""

import heapq
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER = Path(__file__).with_name("cluster_worker.py")
NS = 10**9
PATIENCE_SEC = 60
SECONDS = {"minute": 60, "hour": 3600, "day": 86_400, "month": 2_592_000}


def now_ns():
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE_SEC
    while not condition():
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


class Worker:
    """One process, its log and what it said at its end."""

    def __init__(self, process, output, errors):
        self.process = process
        self.output = output
        self.errors = errors

    def kill(self):
        self.process.kill()
        self.process.wait(60)

    def stop(self):
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def end(self):
        self.process.terminate()

    def ended(self):
        """What it said, once it has ended as it was told to."""
        assert self.process.wait(60) == 0, self.errors.read_text()
        return json.loads(Path(f"{self.output}.end").read_text())

    def admissions(self):
        """(model, amounts, not before, not after) of each admission whose line is complete."""
        if not self.output.exists():
            return
        for line in self.output.read_text().split("\n")[:-1]:
            model_id, tokens, not_before_ns, not_after_ns = line.split(" ")
            yield model_id, {"requests": 1, "tokens": int(tokens)}, int(not_before_ns), int(not_after_ns)


class Crew:
    """Processes that share `quotas`, each a host; they end with `stack`."""

    def __init__(self, stack, url, folder, quotas, *, lease_sec=2):
        self.stack = stack
        self.folder = folder
        self.quotas = quotas
        self.lease_sec = lease_sec
        self.environment = {**os.environ, "MODELQUOTA_REDIS_URL": url}
        self.workers = []

    def start(self, pause_ms=2, state=None):
        name = self.folder / f"worker-{len(self.workers)}"
        settings = {
            "namespace": "crew", "output": str(name), "pause_ms": pause_ms, "lease_sec": self.lease_sec,
            "state": state and str(state), "quotas": self.quotas,
        }  # fmt: skip
        errors = name.with_suffix(".errors")
        with errors.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, WORKER, json.dumps(settings)], env=self.environment, stderr=file
            )
        self.stack.callback(process.wait, 60)
        self.stack.callback(process.kill)
        self.workers.append(Worker(process, name, errors))
        return self.workers[-1]

    def admissions(self, model_id, kind="requests", since_ns=0):
        """(amount, not before, not after) of each admission of a model."""
        return [
            (amounts[kind], first, last)
            for worker in self.workers
            for model, amounts, first, last in worker.admissions()
            if model == model_id and first >= since_ns
        ]

    def admitted(self, model_id, since_ns=0, until_ns=math.inf, kind="requests"):
        """The sum that was admitted of a model between two times."""
        return sum(amount for amount, _, last in self.admissions(model_id, kind, since_ns) if last < until_ns)

    def waits_for(self, model_id, count):
        """Wait until that many more requests of a model were admitted."""
        since_ns = now_ns()
        wait_for(lambda: self.admitted(model_id, since_ns) >= count)

    def end(self):
        """End all that run, and return what they said."""
        running = [worker for worker in self.workers if worker.process.poll() is None]
        for worker in running:
            worker.end()
        return [worker.ended() for worker in running]

    def require_limits(self, since_ns=0, beyond=None):
        """Fail if any limit of any model was exceeded for certain, in any window or ahead of any rate.

        `beyond` are requests, by model, that may have been admitted above it.
        """
        for model_id, limits in self.quotas.items():
            above = (beyond or {}).get(model_id, 0)
            for name, limit in limits.items():
                kind, _, unit = name.removeprefix("max_").partition("_per_")
                if not unit:
                    continue  # a burst, which belongs to its rate
                found = self.admissions(model_id, kind, since_ns)
                if unit == "second":
                    burst = limits.get(f"burst_{kind}", 0)
                    most = most_in(found, NS)
                    assert most <= math.ceil(limit) + burst + above, f"{model_id}: {most} {kind} in a second"
                    ahead = most_ahead(found, limit)
                    assert ahead <= max(limit, 1) + burst + above, f"{model_id}: {ahead} {kind} ahead of the rate"
                else:
                    most = most_in(found, SECONDS[unit] * NS)
                    assert most <= limit + above, f"{model_id}: {most} {kind} in a {unit}"


def most_in(admissions, window_ns):
    """The largest sum that was certainly admitted within one window."""
    most = held = 0
    inside = []
    for amount, not_before_ns, not_after_ns in sorted(admissions, key=lambda each: each[2]):
        heapq.heappush(inside, (not_before_ns, amount))
        held += amount
        while inside and inside[0][0] <= not_after_ns - window_ns:
            held -= heapq.heappop(inside)[1]
        most = max(most, held)
    return most


def most_ahead(admissions, rate):
    """The largest sum that was certainly admitted between two times beyond what the rate gives in that time."""
    most = total = 0
    lowest = math.inf
    latest_ns = 0
    # All from one to another, by their earliest times, lie between the first's earliest and the latest of all.
    for amount, not_before_ns, not_after_ns in sorted(admissions, key=lambda each: each[1]):
        lowest = min(lowest, total - rate * not_before_ns / NS)
        total += amount
        latest_ns = max(latest_ns, not_after_ns)
        most = max(most, total - rate * latest_ns / NS - lowest)
    return most
