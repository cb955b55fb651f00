"""`snapshot`: every counter of every model, a copy, and whole models only while others come and go."""

import copy
import pickle
import sys
import threading

from factories import make_manager, open_quota

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager, Tokens

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


def test_a_meter_is_an_element_of_its_own(path):
    quotas = [
        open_quota("llama#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=10**6),
        open_quota("llama", max_requests_per_minute=3),
        open_quota("llama#output", token_weights=(0, 0, 1)),
    ]
    manager = make_manager(*quotas, path=path)
    manager.check_many(manager.codes(["llama"]), Tokens(1_200, 800, 256))
    with manager.reserve("llama", Tokens(1, 0, 1)) as grant:
        array = manager.snapshot()
        assert dict(zip(array["model_id"], array["concurrent_requests"].tolist(), strict=True)) == dict.fromkeys(
            ("llama#usd", "llama", "llama#output"), 1
        )
        grant.cancel()
    array = manager.snapshot()
    found = {each["model_id"]: each for each in array}
    names = ("tokens_total", "tokens_refunded_total", "allowed_total", "requests_this_minute", "tokens_this_month")
    assert {model_id: tuple(int(each[name]) for name in names) for model_id, each in found.items()} == {
        "llama#usd": (7_698, 18, 2, -1, 7_680),
        "llama": (2_258, 2, 2, 1, -1),
        "llama#output": (257, 1, 2, -1, -1),
    }
    with ResourceQuotaManager.open_readonly(path) as view:
        read = view.snapshot()
    assert read["model_id"].tolist() == array["model_id"].tolist()
    assert read["tokens_this_hour"].tolist() == array["tokens_this_hour"].tolist()


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
