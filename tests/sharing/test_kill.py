"""A process killed at any instant leaves the others running, and the counters right to within its own last request.

``MODELQUOTA_KILL_ROUNDS=1000 pytest tests/sharing/test_kill.py`` kills more of them.
"""

import contextlib
import os
import random
import time

import numpy as np
from crew import COUNTED, HELD, TASKS, Crew

from modelquota import QuotaExceededError
from modelquota._core.state.validate import validate

ROUNDS = int(os.environ.get("MODELQUOTA_KILL_ROUNDS", "100"))
SEED = os.environ.get("MODELQUOTA_KILL_SEED", "")
SECONDS = 5.0  # within which everything has to go on; a machine may be busy


def ask_until_given_back(manager):
    """Ask for what the dead held, until it has been given back; how long that took."""
    start = time.monotonic()
    while True:
        usages = [manager.get_usage(model_id) for model_id in HELD]
        if all(
            (u.concurrent_requests, u.reserved_ram_mb, u.reserved_ssd_mb, u.queued_requests) == (0, 0, 0, 0)
            for u in usages
        ):
            return time.monotonic() - start
        assert time.monotonic() - start < SECONDS, usages
        for model_id in HELD:
            manager.update_quota(model_id, max_concurrent_requests=1)
            with contextlib.suppress(QuotaExceededError):
                manager.reserve(model_id, 1, 3).release()


def test_processes_killed_at_random_instants(tmp_path):
    seed = SEED or str(random.randrange(2**32))
    print("seed", seed)
    crew = Crew(str(tmp_path / "quota.state"), 4, seed)
    descriptor = os.open(crew.path, os.O_RDONLY)
    given_back = []
    try:
        for number in range(4):
            crew.hire(number, TASKS[(number + 3) % len(TASKS)])
        for round_ in range(ROUNDS):
            capped = crew.manager.get_usage("capped").requests_this_day
            crew.manager.update_quota("capped", max_requests_per_day=capped + 300)
            time.sleep(crew.rng.random() * 0.03)
            victim = crew.rng.randrange(4)
            crew.kill(victim)
            crew.see_progress(SECONDS)
            with crew.paused(SECONDS):
                given_back.append(ask_until_given_back(crew.manager))
                crew.manager.snapshot()
                crew.manager.get_stats()
                header, rows, _ = crew.manager._arrays()
                assert header["registry_lock"] == 0
                assert not rows["lock"].any()
                assert header["staged_row"] == -1
                assert validate(descriptor, crew.path) == 4096
                usages = [crew.manager.get_usage(model_id) for model_id in COUNTED]
                for what in ("requests", "tokens"):
                    least, most = crew.bounds(what)
                    for window in ("hour", "day", "month"):
                        used = np.array([getattr(usage, f"{what}_this_{window}") for usage in usages])
                        assert (least <= used).all(), (round_, what, window, least, used, most)
                        assert (used <= most).all(), (round_, what, window, least, used, most)
                assert usages[2].requests_this_day <= crew.manager.get_quota("capped").max_requests_per_day
            crew.hire(victim, TASKS[round_ % len(TASKS)])
        header, _, _ = crew.manager._arrays()
        print("rounds", ROUNDS, "recoveries", header["recoveries"], "given back within", max(given_back))
        assert header["recoveries"][0] > 0
    finally:
        crew.end()
        os.close(descriptor)
