"""Meters: limits that are decided together with their model, and that nobody has to name."""

import asyncio
import threading

import numpy as np
import pytest
from factories import make_manager, open_quota, queue_quota, used, waiting
from patience import PATIENCE, until

from modelquota import (
    CapacityError,
    Limit,
    ManualClock,
    QuotaConfigError,
    QuotaExceededError,
    ResourceQuotaManager,
    Tokens,
)

MOST = 14


def metered(*meters, **limits):
    """A manager with the model "m" and these meters of it."""
    return make_manager(open_quota("m"), *(open_quota(f"m#{name}", **limits) for name in meters))


def requests(manager, model_id):
    return manager.get_usage(model_id).requests_this_hour


def test_a_request_of_two_ids_with_a_meter_each():
    """The example of the documentation: one decision, one settlement, exact everywhere."""
    manager = make_manager(
        open_quota("llama", max_tokens_per_hour=10_000),
        open_quota("llama#output", token_weights=(0, 0, 1), max_tokens_per_minute=20_000),
        open_quota("acme"),
        open_quota("acme#usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=500_000_000),
    )
    grant = manager.reserve(("acme", "llama"), Tokens(input=1_200, cached=800, output=256))
    assert grant.model_ids == ("acme", "llama", "acme#usd", "llama#output")
    figures = {"llama": 2_256, "acme": 2_256, "llama#output": 256, "acme#usd": 7_680}
    assert {model_id: used(manager, model_id) for model_id in figures} == figures
    grant.settle(Tokens(input=1_200, cached=800, output=100))
    figures = {"llama": 2_100, "acme": 2_100, "llama#output": 100, "acme#usd": 5_340}
    assert {model_id: used(manager, model_id) for model_id in figures} == figures
    grant.release()
    assert [manager.get_usage(model_id).concurrent_requests for model_id in figures] == [0] * 4
    assert {requests(manager, model_id) for model_id in figures} == {1}


def test_all_or_nothing():
    manager = metered("x", "y", max_requests_per_hour=2)
    manager.set_quota(open_quota("m#y", max_requests_per_hour=1))
    assert manager.check_quota("m", 1)
    denied = manager.check_quota("m", 1)
    assert (denied.allowed, denied.model_id, denied.limit) == (False, "m#y", Limit.REQUESTS_PER_HOUR)
    assert [requests(manager, model_id) for model_id in ("m", "m#x", "m#y")] == [1, 1, 1]


def test_the_wait_is_the_longest_of_all_and_exact():
    clock = ManualClock()
    manager = make_manager(
        open_quota("m", max_requests_per_minute=1), open_quota("m#x", max_requests_per_hour=1), clock=clock
    )
    assert manager.check_quota("m", 1)
    denied = manager.check_quota("m", 1)
    assert (denied.model_id, denied.retry_after_ms) == ("m", 3_660_000)
    clock.advance_ns((denied.retry_after_ms - 1) * 10**6)
    assert not manager.check_quota("m", 1)
    clock.advance_ns(10**6)
    assert manager.check_quota("m", 1)


def test_a_meter_by_itself_is_one_id():
    manager = metered("x")
    assert manager.check_quota("m#x", 5)
    assert (used(manager, "m"), used(manager, "m#x")) == (0, 5)
    assert manager.check_quota(("m", "m#x"), 5)
    assert (used(manager, "m"), used(manager, "m#x")) == (5, 10)


@pytest.mark.parametrize("model_first", [True, False])
def test_model_and_meter_in_either_order(model_first):
    manager = make_manager()
    for model_id in ("m", "m#x") if model_first else ("m#x", "m"):
        manager.set_quota(open_quota(model_id))
    manager.check_quota("m", 3)
    manager.check_many(manager.codes(["m"]), 4)
    assert (used(manager, "m"), used(manager, "m#x")) == (7, 7)
    manager.remove_quota("m")
    assert manager.check_quota("m", 1)
    manager.set_quota(open_quota("m"))
    manager.check_many(manager.codes(["m"]), 2)
    assert (used(manager, "m"), used(manager, "m#x")) == (2, 10)
    manager.remove_quota("m#x")
    manager.check_many(manager.codes(["m"]), 2)
    manager.set_quota(open_quota("m#x"))
    manager.charge_many(manager.codes(["m"]), 2)
    assert (used(manager, "m"), used(manager, "m#x")) == (6, 2)


def test_the_meter_of_a_model_without_a_quota():
    manager = make_manager(open_quota("m#x", max_tokens_per_hour=10))
    assert manager.check_quota("m", 6)
    denied = manager.check_quota("m", 6)
    assert (denied.model_id, denied.limit) == ("m#x", Limit.TOKENS_PER_HOUR)
    with pytest.raises(QuotaExceededError):
        manager.reserve("m", 6)
    with manager.reserve("m", 4) as grant:
        assert grant.model_ids == ("m#x",)
    assert not manager.check_quota(("other", "m"), 1)
    assert not manager.peek_quota("m", 1)


def test_prefixes_are_not_models():
    """Only what is before the first # is the model."""
    manager = make_manager(
        open_quota("m"), open_quota("m2"), open_quota("m#x"), open_quota("m#x#y"), open_quota("m2#x")
    )
    manager.check_quota("m", 1)
    assert [used(manager, one) for one in ("m", "m2", "m#x", "m#x#y", "m2#x")] == [1, 0, 1, 1, 0]


def test_fourteen_meters_and_no_more():
    manager = metered(*range(MOST))
    with pytest.raises(
        QuotaConfigError, match=r"model_id='m#14' is not accepted; expected at most 14 meters of one model"
    ):
        manager.set_quota(open_quota("m#14"))
    assert manager.check_quota("m", 1)
    assert manager.check_many(manager.codes(["m"]), 1).tolist() == [0]
    with manager.reserve("m", 1) as grant:
        assert len(grant.model_ids) == 15
    assert {used(manager, model_id) for model_id in manager.list_models()} == {3}
    manager.set_quota(open_quota("m#0", max_tokens_per_hour=4))  # replaced, not added
    manager.remove_quota("m#3")
    manager.set_quota(open_quota("m#14"))
    assert manager.check_quota("m", 1)
    assert used(manager, "m#14") == 1


def test_sixteen_ids_and_meters_are_too_many():
    manager = metered(*range(MOST))
    manager.set_quota(open_quota("other"))
    with pytest.raises(ValueError, match="model_id names 2 ids, and with their meters more than 15 decide; give fewer"):
        manager.check_quota(("m", "other"), 1)
    with pytest.raises(ValueError, match="more than 15 decide"):
        manager.peek_quota(("m", "other"), 1)
    with pytest.raises(ValueError, match="more than 15 decide"):
        manager.reserve(("m", "other"), 1)
    codes = manager.codes(["m", "other"])
    with pytest.raises(ValueError, match=r"codes\[0\] has too many ids: with their meters more than 15 decide"):
        manager.check_many(codes.reshape(1, 2), 1)
    assert {used(manager, model_id) for model_id in manager.list_models()} == {0}


def test_peek_of_more_ids_than_one_decision_may_have():
    """None of them is registered yet."""
    patterns = {"u*": open_quota("u"), "u*#x": open_quota("x"), "u*#y": open_quota("y")}
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota=patterns)
    ids = [f"u{number}" for number in range(15)]
    for verb in (manager.peek_quota, manager.check_quota):
        with pytest.raises(ValueError, match="model_id names 15 ids, and with their meters more than 15 decide"):
            verb(ids, 1)
    assert manager.peek_quota(ids[:5], 1)


def test_peek_names_what_check_names():
    patterns = {"u*": open_quota("u", max_tokens_per_hour=5), "u*#x": open_quota("x", max_tokens_per_day=5)}
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota=patterns)
    manager.set_quota(open_quota("m", max_tokens_per_minute=5))
    peeked = manager.peek_quota(("u1", "m"), 6)
    assert peeked.model_id == "u1"
    assert manager.list_models() == ["m"]
    assert peeked == manager.check_quota(("u1", "m"), 6)


def test_meters_by_pattern():
    patterns = {
        "user:*": open_quota("u", max_requests_per_hour=100),
        "user:*#usd": open_quota("usd", unit="usd", token_weights=(3, 0.3, 15), max_tokens_per_month=1_000),
        "user:vip:*": open_quota("v"),
    }
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota=patterns)
    assert manager.check_quota("user:bob", Tokens(output=60))
    denied = manager.check_quota("user:bob", Tokens(output=7))
    assert (denied.model_id, denied.limit) == ("user:bob#usd", Limit.TOKENS_PER_MONTH)
    assert manager.check_quota("user:vip:eve", Tokens(output=700))
    assert sorted(manager.list_models()) == ["user:bob", "user:bob#usd", "user:vip:eve"]
    assert manager.get_quota("user:bob#usd").unit == "usd"


def test_a_meter_whose_id_would_be_too_long_is_refused_with_its_model(path):
    patterns = {"user:*": open_quota("u"), "user:*#usd": open_quota("usd", max_tokens_per_hour=100)}
    manager = ResourceQuotaManager(path=path, default_quota=patterns)
    for verb in (manager.check_quota, manager.peek_quota, manager.reserve):
        with pytest.raises(QuotaConfigError, match="1 to 255 bytes"):
            verb("user:" + "x" * 247, 90)
    assert manager.list_models() == []
    longest = "user:" + "x" * 246
    assert [bool(manager.check_quota(longest, 90)) for _ in range(2)] == [True, False]
    manager.close()
    with ResourceQuotaManager(path=path) as again:
        assert sorted(map(len, again.list_models())) == [251, 255]


@pytest.mark.parametrize("source", ["config", "patterns", "callable"])
def test_no_id_evades_the_default_by_looking_like_a_meter(source):
    quota = open_quota("u", max_requests_per_hour=1)
    given = {"config": quota, "patterns": {"bob*": quota}, "callable": lambda model_id: quota}[source]
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota=given)
    for model_id in ("bob#", "bob#1", "bob##"):
        for verb in (manager.check_quota, manager.peek_quota, manager.reserve):
            with pytest.raises(QuotaConfigError, match="an id without '#'"):
                verb(model_id, 1)
    assert manager.list_models() == []
    manager.set_quota(open_quota("bob#1"))
    assert manager.check_quota("bob#1", 1)  # a meter that was registered is an id like others
    assert manager.check_quota("bob", 1)


def test_an_id_that_no_pattern_matches_is_unknown_with_a_meter_too():
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota={"user:*": open_quota("u")})
    assert manager.check_quota("llama#1", 1)
    assert manager.list_models() == []


def test_peek_reads_a_meter_that_was_registered_before_its_model():
    patterns = {"u*": open_quota("u"), "u*#x": open_quota("x", max_tokens_per_hour=10)}
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota=patterns)
    manager.set_quota(open_quota("u1#x", max_tokens_per_hour=1_000))
    assert manager.peek_quota("u1", 50)
    assert manager.check_quota("u1", 50)
    manager.check_quota("u2", 7)
    manager.remove_quota("u2")
    assert not manager.peek_quota("u2", 7)  # the meter has stayed, with what it counted
    assert not manager.check_quota("u2", 7)


@pytest.mark.parametrize("verb", ["check_many", "reserve_many"])
def test_a_batch_with_too_many_meters_is_refused_as_a_whole(verb):
    manager = make_manager(open_quota("c"), *(open_quota(f"{m}") for m in "ab"))
    for model in "ab":
        for number in range(7):
            manager.set_quota(open_quota(f"{model}#{number}"))
    a, b, c, meter = manager.codes(["a", "b", "c", "a#3"]).tolist()
    decide = getattr(manager, verb)
    with pytest.raises(ValueError, match=r"codes\[1\] has too many ids: with their meters more than 15 decide"):
        decide(np.array([[c, a], [a, b]]), np.array([7, 7]))
    assert [used(manager, model_id) for model_id in ("a", "b", "c")] == [0, 0, 0]
    manager.remove_quota("b#6")
    made = decide(np.array([[c, a, 0], [a, b, meter]]), np.array([7, 7]))  # the meter is counted once
    assert [used(manager, model_id) for model_id in ("a", "b", "c", "a#3", "b#0")] == [14, 7, 7, 14, 7]
    if verb == "reserve_many":
        for grant in made:
            grant.release()


def test_the_output_of_a_grant_stays_within_a_count():
    manager = metered("x", max_tokens_per_hour=10)
    with manager.reserve("m", Tokens(input=1, output=3)) as grant:
        assert not grant.add(2**62)
        assert grant.tokens == Tokens(input=1, output=2**62 - 1)


def test_a_meter_is_forgotten_with_its_model_and_never_before():
    patterns = {"u*": open_quota("u", max_tokens_per_minute=10), "u*#x": open_quota("x", max_tokens_per_hour=10)}
    clock = ManualClock()
    manager = ResourceQuotaManager(clock=clock, default_quota=patterns, max_models=4)
    for model_id in ("u1", "u2"):
        assert manager.check_quota(model_id, 10)
    clock.advance(120)  # the models are as good as new, their meters are not
    with pytest.raises(CapacityError):
        manager.check_quota("u3", 1)
    assert not manager.check_quota("u1", 1)
    clock.advance(3_700)
    assert manager.check_quota("u3", 10)
    assert sorted(manager.list_models())[-2:] == ["u3", "u3#x"]
    assert len(manager.list_models()) == 4
    assert manager.check_quota("u1", 10)
    assert sorted(manager.list_models()) == ["u1", "u1#x", "u3", "u3#x"]
    assert not manager.check_quota("u1", 1)
    assert not manager.check_quota("u3", 1)


def test_a_family_that_does_not_fit_leaves_nothing_behind():
    patterns = {"u*": open_quota("u"), "u*#x": open_quota("x"), "u*#y": open_quota("y")}
    manager = ResourceQuotaManager(clock=ManualClock(), default_quota=patterns, max_models=2)
    with pytest.raises(CapacityError):
        manager.check_quota("u1", 1)
    assert "u1" not in manager.list_models()


def test_batches_over_several_ids():
    manager = make_manager(
        open_quota("a"),
        open_quota("b"),
        open_quota("a#x", max_tokens_per_hour=10),
        open_quota("b#y", max_requests_per_hour=1),
    )
    a, b = manager.codes(["a", "b"]).tolist()
    out = manager.check_many(np.array([[a, b], [a, 0], [0, b], [0, 0]]), np.array([4, 7, 1, 1]))
    assert out.tolist() == [0, Limit.TOKENS_PER_HOUR, Limit.REQUESTS_PER_HOUR, 0]
    assert [used(manager, model_id) for model_id in ("a", "b", "a#x", "b#y")] == [4, 4, 4, 4]
    over = np.zeros(2, np.uint8)
    manager.charge_many(np.array([b, a]), np.array([[1, 0, 0], [6, 1, 0]]), over=over)
    assert over.tolist() == [0, Limit.TOKENS_PER_HOUR]
    with pytest.raises(ValueError, match=r"codes\[0\] has one model twice"):
        manager.check_many(np.array([[a, a]]), 1)


def test_handles_decide_the_meters_too():
    manager = metered("x", max_tokens_per_hour=10)
    handle = manager.model("m")
    assert handle.check(Tokens(output=6))
    assert handle.check(6).model_id == "m#x"
    with handle.reserve(4) as grant:
        assert grant.model_ids == ("m", "m#x")
    handle_of_meter = manager.model("m#x")
    assert handle_of_meter.get_usage().tokens_this_hour == 10
    manager.remove_quota("m#x")
    assert handle.check(6)


def test_a_request_waits_for_a_meter_and_is_woken_by_its_settlement():
    manager = make_manager(queue_quota("m"), queue_quota("m#x", max_tokens_per_hour=10), real_time=True)
    held = manager.reserve("m", 10)
    served = []
    thread = threading.Thread(target=lambda: served.append(manager.acquire("m", 4)), daemon=True)
    thread.start()
    until(lambda: waiting(manager, "m#x") == 1)
    assert waiting(manager) == 1
    held.settle(6)
    thread.join(PATIENCE)
    assert served[0].model_ids == ("m", "m#x")
    assert used(manager, "m#x") == 10
    for grant in [held, *served]:
        grant.release()
    assert waiting(manager) == waiting(manager, "m#x") == 0


@pytest.mark.parametrize("change", ["limits", "removal"])
def test_a_task_waits_for_a_meter_and_is_woken_by_a_change(change):
    manager = make_manager(queue_quota("m"), queue_quota("m#x", max_tokens_per_hour=10), real_time=True)

    async def main():
        task = asyncio.create_task(manager.acquire_async("m", 11, timeout=20.0))
        held = manager.reserve("m", 9)
        task_of_nine = asyncio.create_task(manager.acquire_async("m", 9))
        while waiting(manager, "m#x") == 0:
            await asyncio.sleep(0)
        if change == "limits":
            manager.update_quota("m#x", max_tokens_per_hour=100)
        else:
            manager.remove_quota("m#x")
        with await asyncio.wait_for(task_of_nine, PATIENCE):
            held.release()
        with pytest.raises(QuotaExceededError) as error:
            await task
        assert error.value.result.never_fits

    asyncio.run(main())
    assert waiting(manager) == 0


def test_a_meter_that_comes_while_a_request_waits():
    """It is asked from the next attempt on, and waited for like the others."""
    manager = make_manager(queue_quota("m", max_concurrent_requests=1), real_time=True)
    held = manager.reserve("m", 1)
    served = []
    thread = threading.Thread(target=lambda: served.append(manager.acquire("m", 4)), daemon=True)
    thread.start()
    until(lambda: waiting(manager) == 1)
    manager.set_quota(queue_quota("m#x", max_tokens_per_hour=4))
    meant_for_the_meter = manager.reserve("m#x", 4)
    held.release()
    until(lambda: waiting(manager, "m#x") == 1)
    assert not served
    meant_for_the_meter.cancel()
    thread.join(PATIENCE)
    served[0].release()
    assert used(manager, "m#x") == 4


def test_an_id_without_meters_pays_nothing():
    """Its row is all that a check touches."""
    manager = make_manager(open_quota("m"), open_quota("n"), open_quota("n#x"))
    index = int(manager.codes(["m"])[0]) & 0xFFFF_FFFF
    rows = manager._arrays()[1]
    others = np.delete(np.arange(3), index)
    untouched = rows[others].tobytes()
    assert manager.check_quota("m", 1)
    assert rows[others].tobytes() == untouched
