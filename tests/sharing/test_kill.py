"""A process killed at any instant leaves the others running, and the counters right to within its own last request.

``MODELQUOTA_KILL_ROUNDS=1000 pytest tests/sharing/test_kill.py`` kills more of them.
"""

import contextlib
import os
import random
import time

import numpy as np
from crew import COUNTED, HELD, IDLE, LINE_METER, STAND_STILL, SUM, TASKS, Crew

from modelquota import QuotaExceededError
from modelquota._core.state.validate import validate

ROUNDS = int(os.environ.get("MODELQUOTA_KILL_ROUNDS", "100"))
SEED = os.environ.get("MODELQUOTA_KILL_SEED", "")
SECONDS = 5.0  # within which everything has to go on; a machine may be busy


def held_of(usage):
    return usage.concurrent_requests, usage.reserved_ram_mb, usage.reserved_ssd_mb, usage.queued_requests


def ask_until_given_back(manager):
    """Ask for what the dead held, until it has been given back; how long that took."""
    start = time.monotonic()
    while True:
        held = {model_id: held_of(manager.get_usage(model_id)) for model_id in (*HELD, IDLE, LINE_METER, SUM)}
        if not any(map(any, held.values())):
            return time.monotonic() - start
        assert time.monotonic() - start < SECONDS, held
        for model_id in HELD:
            manager.update_quota(model_id, max_concurrent_requests=1)
            with contextlib.suppress(QuotaExceededError):
                manager.reserve(model_id, 1, 3).release()


def meters_of(manager, model_id):
    return [meter.model_id for meter in manager.get_model_report(model_id).meters]


def see_meters_decided(crew):
    """Every meter that is registered is its model's, and is decided with it, singly and in a batch."""
    manager = crew.manager
    known = manager.list_models()
    for number, model_id in enumerate(COUNTED):
        family = [model_id, *meters_of(manager, model_id)]
        assert sorted(family) == sorted(each for each in known if each.partition("#")[0] == model_id)
        before = [manager.get_usage(each).requests_this_hour for each in family]
        admitted = int(manager.check_quota(model_id, 1).allowed)
        admitted += int(manager.check_many(manager.codes([model_id]), 1)[0] == 0)
        assert [manager.get_usage(each).requests_this_hour for each in family] == [each + admitted for each in before]
        crew.certain["requests"][number] += admitted
        crew.certain["tokens"][number] += admitted


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
                crew.order(STAND_STILL, SECONDS)
                crew.manager.update_quota(IDLE, burst_requests=round_)  # takes the registry's lock over if need be
                crew.manager.snapshot()
                crew.manager.get_stats()
                header, rows, _ = crew.manager._arrays()
                assert header["registry_lock"] == 0
                assert not rows["lock"].any()
                assert header["staged_row"] == -1
                assert validate(descriptor, crew.path) == 4096
                see_meters_decided(crew)
                usages = [crew.manager.get_usage(model_id) for model_id in COUNTED]
                summed = crew.manager.get_usage(SUM)
                for what in ("requests", "tokens"):
                    least, most = crew.bounds(what)
                    for window in ("hour", "day", "month"):
                        used = np.array([getattr(usage, f"{what}_this_{window}") for usage in usages])
                        assert (least <= used).all(), (round_, what, window, least, used, most)
                        assert (used <= most).all(), (round_, what, window, least, used, most)
                        metered = getattr(summed, f"{what}_this_{window}")
                        assert least[0] <= metered <= most[0], (round_, what, window, least[0], metered, most[0])
                assert usages[2].requests_this_day <= crew.manager.get_quota("capped").max_requests_per_day
            crew.hire(victim, TASKS[round_ % len(TASKS)])
        header, _, _ = crew.manager._arrays()
        print("rounds", ROUNDS, "recoveries", header["recoveries"], "given back within", max(given_back))
        assert header["recoveries"][0] > 0
    finally:
        crew.end()
        os.close(descriptor)
