"""A manager given to a process that is not forked: by its path, or an error that says what to do."""

import copy
import functools
import multiprocessing
import os
import pickle

import pytest
from factories import open_quota

from modelquota import ManualClock, ResourceQuotaManager
from modelquota.reading.view import QuotaView

DAILY = open_quota("m", max_tokens_per_day=100)


def by_name(model_id):
    return open_quota(model_id, max_tokens_per_day=len(model_id))


def through_pickle(protocol):
    return lambda value: pickle.loads(pickle.dumps(value, protocol))


WAYS = {
    **{f"pickle {protocol}": through_pickle(protocol) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@ways
def test_what_has_a_path_goes_as_that_path(path, way, monkeypatch):
    monkeypatch.chdir(path.parent)
    one = ResourceQuotaManager(path="quota.state", max_models=7)
    one.set_quota(DAILY)
    one.check_quota("m", 60)
    monkeypatch.chdir("/")
    two = way(one)
    assert two is not one
    assert (two.path, two.max_models, two.clock, two.default_quota) == (str(path), 7, None, None)
    assert two.get_usage("m").tokens_this_day == 60
    assert [bool(manager.check_quota("m", 15)) for manager in (two, one, two)] == [True, True, False]
    with two.reserve("m", 5):
        assert one.get_usage("m").concurrent_requests == 1
    del two
    assert one.check_quota("m", 5), "each has a seat of its own"


@ways
@pytest.mark.parametrize("default", [DAILY, {"user:*": DAILY}, by_name])
def test_its_default_quota_goes_with_it(path, way, default):
    again = way(ResourceQuotaManager(path=path, default_quota=default))
    assert again.default_quota == default
    assert [bool(again.check_quota("user:bob", 8)), bool(again.check_quota("user:bob", 93))] == [True, False]


def test_a_file_that_is_made_again_has_the_same_size(path):
    pickled = pickle.dumps(ResourceQuotaManager(path=path, max_models=7))
    path.unlink()
    assert pickle.loads(pickled).max_models == 7


def test_a_subclass_stays_one(path):
    class Mine(ResourceQuotaManager):
        pass

    assert type(copy.copy(Mine(path=path))) is Mine


@ways
def test_of_one_without_a_path_the_error_says_what_to_do(way):
    manager = ResourceQuotaManager(max_models=1)
    for value in (manager, [manager], functools.partial(print, manager)):
        if value is not manager and way is copy.copy:
            continue
        with pytest.raises(TypeError) as caught:
            way(value)
        assert str(caught.value) == (
            "a manager without a path cannot be pickled or copied: only forked processes share its state; "
            "make it with path=, and each process opens that file"
        )


@ways
def test_of_one_with_a_clock_of_its_own_too(path, way):
    with pytest.raises(TypeError, match=r"^a manager with a ManualClock cannot be pickled or copied: nothing else"):
        way(ResourceQuotaManager(path=path, clock=ManualClock()))


def take(manager, tokens, answers):
    answers.put((os.getpid(), bool(manager.check_quota("m", tokens)), bool(manager.check_quota("user:bob", 60))))


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_processes_share_the_limits_however_they_are_started(path, method):
    context = multiprocessing.get_context(method)
    manager = ResourceQuotaManager(path=path, default_quota={"user:*": DAILY})
    manager.set_quota(DAILY)
    answers = context.SimpleQueue()
    processes = [context.Process(target=take, args=(manager, 40, answers)) for _ in range(3)]
    for process in processes:
        process.start()
    got = [answers.get() for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len({pid for pid, _, _ in got} - {os.getpid()}) == 3
    assert sum(admitted for _, admitted, _ in got) == 2
    assert sum(admitted for _, _, admitted in got) == 1
    assert manager.get_usage("m").tokens_this_day == 80


def test_a_bound_verb_goes_to_a_pool(path):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota(DAILY)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(manager.check_quota, [("m", 30)] * 5)
    assert sum(map(bool, results)) == 3
    assert all(result.reason is None or "100" in result.reason for result in results)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_process_that_cannot_share_does_not_start(method):
    process = multiprocessing.get_context(method).Process(target=take, args=(ResourceQuotaManager(), 1, None))
    with pytest.raises(TypeError, match="make it with path="):
        process.start()


@ways
def test_a_view_goes_as_its_path_and_closes_only_its_own_file(path, way):
    manager = ResourceQuotaManager(path=path)
    manager.set_quota(DAILY)
    manager.check_quota("m", 3)
    with QuotaView(path) as one:
        with way(one) as two:
            assert two.get_usage("m").tokens_this_day == 3
        del two
        assert one.get_usage("m").tokens_this_day == 3
