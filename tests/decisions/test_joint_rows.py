"""Joint decisions while models move from row to row: nobody ever waits for a lock of its own."""

import asyncio
import collections
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from factories import make_manager, open_quota
from neighbors import forked
from patience import PATIENCE

from modelquota import QuotaError, ResourceQuotaManager

SUPPORT = Path(__file__).parents[1] / "support"

ON_SIGHT = open_quota("any")
VERBS = ("check_quota", "peek_quota", "reserve", "acquire", "acquire_async", "limit")


def ask(manager, verb, ids, tokens=1):
    """Ask by this verb, and give back what is held."""
    if verb == "acquire_async":

        async def acquire():
            async with manager.acquire_async(ids, tokens):
                pass

        asyncio.run(acquire())
    elif verb == "limit":
        manager.limit(ids, tokens)(lambda: None)()
    elif verb in ("reserve", "acquire"):
        getattr(manager, verb)(ids, tokens).release()
    else:
        assert getattr(manager, verb)(ids, tokens)


def all_end(threads):
    """Whether none of the threads is stuck."""
    for thread in threads:
        thread.join(PATIENCE)
    return not any(thread.is_alive() for thread in threads)


@pytest.fixture
def manager():
    return make_manager(*map(open_quota, "abc"), real_time=True, max_models=64)


@pytest.fixture(params=["memory", "file"])
def place(request, tmp_path):
    return {} if request.param == "memory" else {"path": tmp_path / "quota.state"}


# -- models that move


def move_about(manager, steps):
    """Remove two models and register them in each other's rows, again and again."""
    for _ in range(steps):
        for order in (("b", "a"), ("a", "b")):
            manager.remove_quota("a")
            manager.remove_quota("b")
            for name in order:
                manager.set_quota(open_quota(name))


def ask_often(manager, verb, counts, own):
    """Ask for models that move, in both orders, and for one that comes on sight and goes again."""
    for step in range(counts):
        for ids in (("a", "b"), ("b", "a"), ("a", f"{own}{step}"), (f"{own}{step}", "b", "a")):
            ask(manager, verb, ids, 0)
        manager.remove_quota(f"{own}{step}")


@pytest.mark.usefixtures("switch_threads_often")
@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "acquire_async"])
def test_threads_ask_for_models_that_threads_move(place, verb):
    manager = ResourceQuotaManager(max_models=64, default_quota=ON_SIGHT, **place)
    failed = []

    def body(work, *args):
        try:
            work(*args)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=body, args=(ask_often, manager, verb, 150, own), daemon=True) for own in "xy"]
    threads.append(threading.Thread(target=body, args=(move_about, manager, 400), daemon=True))
    for thread in threads:
        thread.start()
    assert all_end(threads)
    assert failed == []
    held = {name: manager.get_usage(name) for name in manager.list_models()}
    assert all(usage is None or usage.concurrent_requests == 0 for usage in held.values())
    assert not manager._arrays()[1]["lock"].any()


@pytest.mark.parametrize("verb", VERBS)
def test_a_process_asks_for_models_that_another_one_moves(tmp_path, verb):
    manager = ResourceQuotaManager(path=tmp_path / "quota.state", max_models=64, default_quota=ON_SIGHT)

    def move():
        mover = threading.Thread(target=move_about, args=(manager, 10**9), daemon=True)
        mover.start()
        return mover

    with forked(move):
        thread = threading.Thread(target=ask_often, args=(manager, verb, 100, "z"), daemon=True)
        thread.start()
        assert all_end([thread])
    for name in "ab":
        usage = manager.get_usage(name)
        assert usage is None or usage.concurrent_requests == 0


def test_a_model_that_takes_the_row_of_another_one_in_the_same_request(manager):
    """The step by itself: one id leaves while the ids are looked up, and the other is registered in its row."""

    def remove_and_register(model_id):
        manager.remove_quota("a")
        return ON_SIGHT

    manager = ResourceQuotaManager(max_models=4, default_quota=remove_and_register)
    for verb in VERBS:
        manager.set_quota(open_quota("a"))
        thread = threading.Thread(target=ask, args=(manager, verb, ("a", f"new/{verb}"), 7), daemon=True)
        thread.start()
        assert all_end([thread]), verb
        usage = manager.get_usage(f"new/{verb}")
        if verb != "peek_quota":
            assert (usage.requests_this_hour, usage.tokens_this_hour, usage.concurrent_requests) == (1, 7, 0)
        manager.remove_quota(f"new/{verb}")


def test_a_grant_over_models_whose_rows_have_been_exchanged(manager):
    grant = manager.reserve(("a", "b"), 10, 3)
    for name in "ab":
        manager.remove_quota(name)
    for name in "ba":
        manager.set_quota(open_quota(name))
    assert grant.add(1000)
    grant.settle(500)
    grant.release()
    for name in "ab":
        usage = manager.get_usage(name)
        assert (usage.tokens_this_hour, usage.reserved_ram_mb, usage.concurrent_requests) == (0, 0, 0)


# -- ids as callers write them


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("ids", [("a", "a"), ("a", "u", "u"), ("u", "v", "u"), ("n", "n")], ids="-".join)
@pytest.mark.parametrize("default", [None, {"n": ON_SIGHT}], ids=["no default", "default"])
def test_an_id_twice_is_refused_whether_known_or_not(verb, ids, default):
    manager = ResourceQuotaManager(max_models=64, default_quota=default)
    manager.set_quota(open_quota("a"))
    with pytest.raises(ValueError, match="twice"):
        ask(manager, verb, ids)
    assert manager.list_models() == ["a"]
    assert manager.get_stats().total_checks == 0


class Names(Sequence):
    """A sequence that says of itself only what it must."""

    def __init__(self, *names):
        self.names = names

    def __getitem__(self, index):
        return self.names[index]

    def __len__(self):
        return len(self.names)


class Row(tuple):
    pass


class Rows(list):
    pass


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "ids",
    [
        ("a", "b"),
        ["a", "b"],
        collections.deque(["a", "b"]),
        collections.namedtuple("Who", "user model")("a", "b"),
        collections.UserList(["a", "b"]),
        Names("a", "b"),
        Row("ab"),
        Rows("ab"),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_every_sequence_of_ids_is_one(manager, verb, ids):
    ask(manager, verb, ids, 5)
    used = 0 if verb == "peek_quota" else 5
    assert [manager.get_usage(name).tokens_this_hour for name in "abc"] == [used, used, 0]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "ids",
    [
        b"ab",
        bytearray(b"ab"),
        {"a", "b"},
        {"a": 1},
        iter("ab"),
        7,
        None,
        1.5,
        ("a", 1),
        ["a", None],
        ("a", b"b"),
        [["a"]],
    ],
    ids=lambda ids: type(ids).__name__ if not isinstance(ids, (list, tuple)) else str(ids),
)
def test_what_is_no_sequence_of_ids_is_refused_before_anything_is_counted(manager, verb, ids):
    with pytest.raises(TypeError):
        ask(manager, verb, ids)
    assert manager.get_stats().total_checks == 0


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("count", [0, 17, 10_000])
def test_too_few_or_too_many_ids_are_refused_before_anything_is_counted(manager, verb, count):
    with pytest.raises(ValueError, match="1 to"):
        ask(manager, verb, [f"x{number}" for number in range(count)])
    assert manager.get_stats().total_checks == 0


class Endless(Sequence):
    """It says that it is short, and never ends."""

    def __getitem__(self, index):
        return f"x{index}"

    def __len__(self):
        return 2


class Shrinking(Sequence):
    """Each look finds less."""

    def __init__(self, names):
        self.names = list(names)

    def __getitem__(self, index):
        found = self.names[index]
        self.names.pop()
        return found

    def __len__(self):
        return 10**9


@pytest.mark.parametrize("verb", VERBS)
def test_a_sequence_that_lies_about_its_length(manager, verb):
    with pytest.raises(ValueError, match="1 to"):
        ask(manager, verb, Endless())
    ask(manager, verb, Shrinking("abc"), 3)
    used = 0 if verb == "peek_quota" else 3
    assert [manager.get_usage(name).tokens_this_hour for name in "abc"] == [used, used, 0]


class Hostile(str):
    """A str that runs code of others wherever it is looked at, and says that it equals everything, or nothing."""

    __slots__ = ("act", "equal")

    def __hash__(self):
        self.act()
        return str.__hash__(self)

    def __eq__(self, other):
        self.act()
        return self.equal if self.equal is not None else str.__eq__(self, other)

    def __len__(self):
        self.act()
        return 1

    def encode(self, *args):
        self.act()
        return b"x" * 100_000

    def __str__(self):
        self.act()
        return "another"


def hostile(text, act=lambda: None, equal=None):
    made = Hostile(text)
    made.act = act
    made.equal = equal
    return made


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("equal", [None, True, False])
@pytest.mark.parametrize("several", [False, True])
def test_a_str_of_its_own_kind_counts_as_the_text_that_it_is(manager, verb, equal, several):
    """Also in the manager's own books: what was kept by its words would be found by them."""
    one = hostile("a", equal=equal)
    ask(manager, verb, (one, hostile("b", equal=equal)) if several else one, 5)
    used = 0 if verb == "peek_quota" else 5
    assert [manager.get_usage(name).tokens_this_hour for name in "abc"] == [used, used if several else 0, 0]
    ask(manager, verb, (hostile("unheard of", equal=equal), "c") if several else hostile("unheard of", equal=equal), 5)
    assert sorted(map(str, manager.list_models())) == ["a", "b", "c"]
    assert all(type(name) is str for name in manager.list_models())


@pytest.mark.parametrize("verb", VERBS)
def test_models_go_while_the_ids_that_name_them_are_read(manager, verb):
    def leave():
        manager.remove_quota("a")
        manager.set_quota(open_quota("d"))

    ask(manager, verb, (hostile("a", leave), "b", hostile("d", leave)), 5)
    assert not manager._arrays()[1]["lock"].any()
    assert manager.get_usage("b").concurrent_requests == 0


@pytest.mark.parametrize("verb", VERBS)
def test_an_id_that_raises_while_it_is_read_leaves_nothing_behind(manager, verb):
    def fail():
        raise ZeroDivisionError

    for ids in ((hostile("a", fail), "b"), ("a", hostile("b", fail))):
        try:
            ask(manager, verb, ids, 5)
        except ZeroDivisionError:
            assert manager.get_usage("b").tokens_this_hour == 0
            assert manager.get_usage("a").tokens_this_hour == 0
        assert not manager._arrays()[1]["lock"].any()
        assert manager.get_usage("b").concurrent_requests == 0


def test_lists_that_change_while_they_are_read():
    """By the ids themselves, by what `default_quota` runs, and by other threads, through all verbs.

    In a process of its own: an overrun ends it.
    """
    program = """
        import sys, threading, time
        from modelquota import ResourceQuotaManager, ResourceQuotaConfig, QuotaError
        from test_joint_rows import VERBS, Rows, ask, hostile, open_quota
        sys.setswitchinterval(1e-6)
        ids, end = [], time.monotonic() + 4
        def change():
            if len(ids) < 300:
                ids.extend(f"g{k}" for k in range(100))
            else:
                del ids[1:]
        def template(model_id):
            change()
            return open_quota(model_id)
        manager = ResourceQuotaManager(max_models=512, default_quota=template)
        for kind in (list, Rows):
            for verb in VERBS:
                for step in range(40):
                    ids = kind([hostile(f"h{step % 7}", change), f"t{verb}{step}", hostile("u", change)])
                    try: ask(manager, verb, ids)
                    except (ValueError, QuotaError): pass
                    manager.remove_quota(f"t{verb}{step}")
        done = []
        def grow():
            while not done: change()
        threads = [threading.Thread(target=grow, daemon=True) for _ in range(2)]
        [thread.start() for thread in threads]
        while time.monotonic() < end:
            for verb in VERBS:
                ids = ["a", "b"]
                try: ask(manager, verb, ids)
                except (ValueError, QuotaError): pass
        done.append(1)
        held = [manager.get_usage(name).concurrent_requests for name in manager.list_models()]
        print("alive", sum(held), int(manager._arrays()[1]["lock"].sum()))
    """
    command = [sys.executable, "-X", "faulthandler", "-c", textwrap.dedent(program)]
    path = os.pathsep.join([str(SUPPORT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert ended.stdout == "alive 0 0\n", ended.stderr[-2000:]


def test_a_request_over_fifteen_models_and_their_rows_in_any_order(manager):
    names = [f"n{number}" for number in range(15)]
    for name in names:
        manager.set_quota(open_quota(name, max_tokens_per_hour=150))
    for turn in range(15):
        assert manager.check_quota(names[turn:] + names[:turn], 10)
    with pytest.raises(QuotaError):
        manager.reserve(names, 1)
    assert {manager.get_usage(name).tokens_this_hour for name in names} == {150}
