"""`snapshot`: every counter of every model, a copy, and whole models only while others come and go."""

import copy
import pickle
import sys
import threading

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager

QUOTAS = [ResourceQuotaConfig("m", max_requests_per_hour=3, on_violation="reject")]


def test_snapshot_has_all_models_at_once(manager):
    manager.set_quota("w", on_violation="warn", max_requests_per_hour=1)
    for _ in range(4):
        manager.check_quota("m", 10)
        manager.check_quota("w", 20)
    array = manager.snapshot()
    assert array["model_id"].tolist() == ["m", "w"]
    assert array["requests_this_hour"].tolist() == [3, 4]
    assert array["tokens_total"].tolist() == [30, 80]
    assert manager.get_usage("w").tokens_total == manager.get_model_report("w").tokens_charged == 80
    assert array["allowed_total"].tolist() == [3, 4]
    assert array["rejected_total"].tolist() == [1, 0]
    assert array["warned_total"].tolist() == [0, 3]
    usage = manager.get_usage("w")
    for name in set(usage.__dataclass_fields__) - {"left", "percent"}:
        value = getattr(usage, name)
        assert array[1][name] == (-1 if value is None else value)
    array["requests_this_hour"] = 0
    assert manager.get_usage("m").requests_this_hour == 3


def test_ids_in_a_snapshot_are_references_like_any_others(manager):
    """Numpy does not own the memory, so nothing but these counts says that it may hold objects."""
    name = "".join(["an id", " of its own"])
    value = object()
    manager.set_quota(name)
    before, before_value = sys.getrefcount(name), sys.getrefcount(value)
    array = manager.snapshot()
    kept = array[array["model_id"] == name]
    assert kept["model_id"][0] == name
    part, copied = array[1:], copy.deepcopy(array)
    array["model_id"][0] = value
    assert sys.getrefcount(value) == before_value + 1
    del array
    assert part["model_id"].tolist() == [name]
    assert pickle.loads(pickle.dumps(part)).tolist() == part.tolist() == copied[1:].tolist()
    del part, kept, copied
    assert (sys.getrefcount(name), sys.getrefcount(value)) == (before, before_value)


def test_a_snapshot_without_models_is_empty():
    assert ResourceQuotaManager().snapshot().shape == (0,)


def test_snapshot_while_models_come_and_go_holds_whole_models_only():
    """An element is a model that was there, with its own figures; the array keeps its ids alive."""
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("stays", max_requests_per_hour=None)
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            for i in range(20):
                manager.set_quota(f"guest-{i}")
                manager.check_quota(f"guest-{i}", 7)
            for i in range(20):
                manager.remove_quota(f"guest-{i}")

    threads = [threading.Thread(target=come_and_go) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        arrays = [manager.snapshot() for _ in range(500)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for array in arrays:
        assert array["model_id"][0] == "stays"
        assert len(set(array["model_id"])) == len(array)
        for model_id, allowed, tokens in array[["model_id", "allowed_total", "tokens_total"]][1:]:
            assert model_id.startswith("guest-")
            assert tokens == 7 * allowed
