"""Meters across processes: registered and removed by one while others decide, and found by those that come later."""

import os
import subprocess
import sys
import time
import traceback

import numpy as np
import pytest
from crew import shared_array
from factories import make_manager, open_quota, used
from patience import PATIENCE

from modelquota import QuotaExceededError, ResourceQuotaManager, Tokens

ROUNDS = 60
DONE, FAILED, ENDED = range(3)


def register_and_remove(manager, counts, model_too):
    """In a child: what was decided from the return of a registration on is counted by the meter."""
    for number in range(ROUNDS):
        manager.set_quota(open_quota("m#x", token_weights=(0, 0, 1 + number % 3)))
        before = int(counts[DONE])
        give_up = time.monotonic() + PATIENCE
        while counts[DONE] < before + 20:
            assert time.monotonic() < give_up
            time.sleep(0.0002)
        after = int(counts[DONE])
        counted = manager.get_usage("m#x").requests_this_hour
        assert counted >= after - before - 1, (number, counted, before, after)  # one may have begun before
        assert manager.remove_quota("m#x")
        if model_too and number % 5 == 0:
            manager.remove_quota("m")
            manager.set_quota(open_quota("m"))


@pytest.mark.parametrize("verb", ["check", "joint", "reserve"])
def test_a_model_that_comes_back_is_never_without_its_meter(path, verb):
    manager = make_manager(open_quota("m"), open_quota("m#x", max_tokens_per_hour=100), path=path)
    ended = shared_array("i8", 1)
    pid = os.fork()
    if pid == 0:
        for _ in range(5_000):
            manager.remove_quota("m")
            manager.set_quota(open_quota("m"))
        ended[0] = 1
        os._exit(0)
    try:
        decided = 0
        while not ended[0]:
            if verb == "reserve":
                with pytest.raises(QuotaExceededError):
                    manager.reserve("m", 101)
            else:
                assert not manager.check_quota("m" if verb == "check" else ("m", "nobody"), 101)
            decided += 1
        assert decided > 100
    finally:
        os.waitpid(pid, 0)


@pytest.mark.parametrize("verb", ["check", "batch", "reserve"])
@pytest.mark.parametrize("model_too", [False, True])
def test_a_meter_comes_and_goes_while_another_process_decides(path, verb, model_too):
    manager = make_manager(open_quota("m"), open_quota("m#stays"), path=path)
    counts = shared_array("i8", 3)
    pid = os.fork()
    if pid == 0:
        try:
            register_and_remove(manager, counts, model_too)
        except BaseException:
            traceback.print_exc()
            counts[FAILED] = 1
        finally:
            counts[ENDED] = 1
            os._exit(0)
    try:
        while not counts[ENDED]:
            if verb == "check":
                assert manager.check_quota("m", Tokens(1, 1, 1))
            elif verb == "batch":
                try:
                    codes = manager.codes(["m"])
                    assert manager.check_many(codes, Tokens(1, 1, 1)).tolist() == [0]
                except (KeyError, ValueError):  # removed since, and nothing is charged
                    assert model_too
                    continue
            else:
                with manager.reserve("m", Tokens(1, 1, 1)) as grant:
                    grant.add(2)
            counts[DONE] += 1
    finally:
        os.waitpid(pid, 0)
    assert not counts[FAILED]
    assert "m#x" not in manager.list_models()
    assert manager.get_usage("m#stays").concurrent_requests == 0
    if not model_too:
        assert manager.get_usage("m#stays").requests_this_day == manager.get_usage("m").requests_this_day


def test_a_meter_that_another_process_has_registered_counts_at_once(path):
    manager = make_manager(open_quota("m"), path=path)
    other = ResourceQuotaManager(path=path)
    codes = manager.codes(["m"])
    handle = manager.model("m")
    other.set_quota(open_quota("m#x", max_requests_per_hour=3))
    assert manager.check_quota("m", 1)
    assert manager.check_many(codes, 1).tolist() == [0]
    handle.reserve(1).cancel()
    assert handle.check(1)
    assert not manager.check_quota("m", 1)
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 1)
    manager.charge_many(codes, np.array([[1, 2, 3]]))
    assert used(other, "m#x") == 3 + 6
    other.remove_quota("m#x")
    assert manager.check_quota("m", 1)


def test_meters_outlive_all_processes(path):
    make_manager(open_quota("m#x", token_weights=(0.5, 0, 0)), open_quota("m"), open_quota("m#y"), path=path).close()
    code = (
        "from modelquota import ResourceQuotaManager, Tokens; import sys;"
        "manager = ResourceQuotaManager(path=sys.argv[1]);"
        "assert manager.reserve('m', Tokens(3, 1, 1)).model_ids == ('m', 'm#x', 'm#y')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], check=True, timeout=PATIENCE)
    manager = make_manager(path=path)
    assert [used(manager, model_id) for model_id in ("m", "m#x", "m#y")] == [5, 2, 5]


def test_a_forked_child_decides_the_meters_of_its_parent():
    manager = make_manager(open_quota("m"), open_quota("m#x"), real_time=True)
    pid = os.fork()
    if pid == 0:
        manager.check_quota("m", 3)
        manager.set_quota(open_quota("m#y"))
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert manager.check_quota("m", 4)
    assert [used(manager, model_id) for model_id in ("m", "m#x", "m#y")] == [7, 7, 4]
