"""Ids that nobody configured: which template each is given, and what a source of templates may be."""

import asyncio
import math
import pickle
import threading
import time

import pytest
from factories import open_quota as quota
from hypothesis import given
from hypothesis import strategies as st

from modelquota import ManualClock, QuotaConfigError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.quota.patterns import QuotaTemplates, overlaid

ACCEPTED = "an id, or a pattern with * at its end or before the # of a meter, and nowhere else, 1 to 255 bytes of UTF-8"


def expected(patterns, model_id):
    """The same by trying every pattern."""
    if model_id in patterns:
        return patterns[model_id]
    fitting = [key for key in patterns if key.endswith("*") and model_id.startswith(key[:-1])]
    return patterns[max(fitting, key=len)] if fitting else None


def test_an_exact_id_wins_then_the_longest_pattern():
    patterns = {
        "*": quota("any"),
        "user:*": quota("user"),
        "user:free:*": quota("free"),
        "user:root": quota("root"),
        "gpt-4*": quota("gpt"),
    }
    templates = QuotaTemplates(patterns)
    for model_id, name in {
        "user:bob": "user",
        "user:": "user",
        "user": "any",
        "user:free:eve": "free",
        "user:free": "user",
        "user:root": "root",
        "user:root:": "user",
        "gpt-4": "gpt",
        "gpt-4o": "gpt",
        "gpt-3": "any",
    }.items():
        assert templates.template_of(model_id) is patterns[next(k for k, v in patterns.items() if v.model_id == name)]
        assert templates.resolve(model_id) == quota(model_id)


SHORT = st.text("ab:é", min_size=1, max_size=5)


@given(st.lists(SHORT | st.text("ab:é", max_size=4).map(lambda text: text + "*"), max_size=12), st.lists(SHORT))
def test_it_is_what_trying_every_pattern_gives(keys, model_ids):
    patterns = {key: quota(max_tokens_per_hour=place) for place, key in enumerate(keys)}
    templates = QuotaTemplates(patterns)
    for model_id in [*model_ids, *(key for key in keys if not key.endswith("*"))]:
        assert templates.template_of(model_id) is expected(patterns, model_id)


def test_a_look_up_does_not_grow_with_the_number_of_patterns():
    def seconds(count):
        templates = QuotaTemplates({f"{i:06}:*": quota() for i in range(count)})

        def once():
            begin = time.perf_counter()
            for _ in range(2_000):
                templates.template_of("000007:bob")
            return time.perf_counter() - begin

        return min(once() for _ in range(5))

    assert seconds(100_000) < 20 * seconds(10)  # ten thousand times the patterns


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a*b",
        "*a",
        "**",
        "user:**",
        "*:*",
        "a\0*",
        "\0",
        "x" * 255 + "*",
        "é" * 128,
        "\ud800*",
        "a*#",
        "a#b*",
        "a#",
        "#b",
    ],
)
def test_a_pattern_that_is_not_one_is_named(pattern):
    for make in (
        QuotaTemplates,
        lambda given: ResourceQuotaManager(default_quota=given),
        lambda given: setattr(ResourceQuotaManager(max_models=1), "default_quota", given),
    ):
        with pytest.raises(QuotaConfigError) as caught:
            make({"ok:*": quota(), pattern: quota()})
        assert (caught.value.field, caught.value.value, caught.value.accepted) == ("default_quota", pattern, ACCEPTED)


@pytest.mark.parametrize("pattern", ["*", "a", "a*", "x" * 254 + "*", "x" * 255, "é" * 127 + "*", "a b/:*"])
def test_a_pattern_that_is_one(pattern):
    assert QuotaTemplates({pattern: quota()}).resolve(pattern.rstrip("*") or "z") is not None


@pytest.mark.parametrize("value", [None, 5, "llama", {"max_ram_mb": 5}, ResourceQuotaConfig])
def test_a_value_that_is_not_a_config_is_named(value):
    with pytest.raises(TypeError) as caught:
        QuotaTemplates({"ok:*": quota(), "user:*": value})
    assert str(caught.value) == f"default_quota['user:*'] is {value!r}; give a ResourceQuotaConfig"


@pytest.mark.parametrize("key", [None, 5, b"user:*", ("user:*",)])
def test_a_key_that_is_not_a_str_is_named(key):
    with pytest.raises(TypeError, match="^default_quota has the key .*; give a str, such as 'user:"):
        QuotaTemplates({key: quota()})


@pytest.mark.parametrize("source", [5, "user:*", [("user:*", quota())], math.nan, b""])
def test_another_source_is_refused(source):
    with pytest.raises(TypeError, match="^default_quota is .*; give a ResourceQuotaConfig, a mapping of ids and"):
        ResourceQuotaManager(default_quota=source)
    manager = ResourceQuotaManager(default_quota=quota(max_requests_per_day=1), max_models=4)
    with pytest.raises(TypeError, match="^default_quota is "):
        manager.default_quota = source
    assert manager.default_quota == quota(max_requests_per_day=1), "a refused one leaves what was there"


def test_a_mapping_is_copied():
    patterns = {"user:*": quota(max_requests_per_day=0)}
    manager = ResourceQuotaManager(default_quota=patterns, max_models=4)
    patterns["org:*"] = patterns.pop("user:*")
    assert manager.default_quota == {"user:*": quota(max_requests_per_day=0)}
    assert not manager.check_quota("user:bob", 1)
    assert manager.check_quota("org:acme", 1)
    with pytest.raises(TypeError):
        manager.default_quota["org:*"] = quota()


def test_a_mapping_that_changes_while_it_is_read_is_used_as_it_was_judged():
    class Shifting(dict):
        def __getitem__(self, key):
            return 5

        def items(self):
            return [("*", 5)]

    manager = ResourceQuotaManager(default_quota=Shifting({"*": quota(max_requests_per_day=0)}), max_models=4)
    assert not manager.check_quota("m", 1)


# -- through a manager


def test_patterns_register_on_first_sight_and_others_are_unknown():
    manager = ResourceQuotaManager(
        clock=ManualClock(10**12),
        default_quota={"user:*": quota(max_requests_per_day=1), "user:root": quota(max_requests_per_day=3)},
    )
    for model_id, admitted in {"user:bob": 1, "user:root": 3, "org:acme": 4}.items():
        assert sum(bool(manager.check_quota(model_id, 1)) for _ in range(4)) == admitted
    assert manager.list_models() == ["user:bob", "user:root"]
    assert manager.get_quota("user:bob") == quota("user:bob", max_requests_per_day=1)
    with manager.reserve("user:eve", 1):
        assert manager.get_usage("user:eve").concurrent_requests == 1
    assert manager.codes(["user:max"]).shape == (1,)


def test_a_new_default_is_for_new_ids_only():
    manager = ResourceQuotaManager(max_models=8)
    assert manager.default_quota is None
    assert manager.check_quota("user:before", 1)
    manager.default_quota = {"user:*": quota(max_requests_per_day=1)}
    assert manager.check_quota("user:a", 1)
    manager.default_quota = lambda model_id: quota(model_id, max_requests_per_day=2)
    assert not manager.check_quota("user:a", 1)
    assert [bool(manager.check_quota("user:b", 1)) for _ in range(3)] == [True, True, False]
    manager.default_quota = None
    assert manager.check_quota("user:c", 1)
    assert manager.list_models() == ["user:a", "user:b"]


def test_a_callable_is_asked_once_for_each_id():
    asked = []

    def plan(model_id):
        asked.append(model_id)
        return quota("whatever", max_tokens_per_day=10) if model_id.startswith("paid:") else None

    manager = ResourceQuotaManager(default_quota=plan, max_models=8)
    for _ in range(3):
        manager.check_quota("paid:bob", 1)
    assert asked == ["paid:bob"]
    assert manager.get_quota("paid:bob") == quota("paid:bob", max_tokens_per_day=10)
    assert manager.check_quota("free:eve", 100)
    assert manager.list_models() == ["paid:bob"]
    manager.default_quota = ResourceQuotaConfig  # a class is a callable from id to config too
    manager.check_quota("m", 1)
    assert manager.get_quota("m") == ResourceQuotaConfig("m")


VERBS = {
    "check": lambda manager: manager.check_quota("m", 1),
    "reserve": lambda manager: manager.reserve("m", 1),
    "joint": lambda manager: manager.reserve(["known", "m"], 1),
    "acquire": lambda manager: manager.acquire("m", 1),
    "rows": lambda manager: manager.codes(["m"]),
    "async": lambda manager: asyncio.run(waited(manager)),
}


async def waited(manager):
    return await manager.acquire_async("m", 1)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("result", [5, "m", {}, (), False, ResourceQuotaConfig], ids=repr)
def test_a_callable_that_returns_something_else_counts_nothing(verb, result):
    manager = ResourceQuotaManager(default_quota=lambda model_id: result, max_models=4)
    manager.set_quota("known")
    before = manager.get_stats(), manager.get_usage("known")
    with pytest.raises(TypeError) as caught:
        verb(manager)
    assert str(caught.value) == f"default_quota('m') returned {result!r}; return a ResourceQuotaConfig or None"
    assert (manager.get_stats(), manager.get_usage("known")) == before
    assert manager.list_models() == ["known"]


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("error", [KeyError("plan"), ZeroDivisionError(), QuotaConfigError("f", 1, "2")], ids=repr)
def test_what_a_callable_raises_is_passed_on_and_counts_nothing(verb, error):
    def plan(model_id):
        raise error

    manager = ResourceQuotaManager(default_quota=plan, max_models=4)
    manager.set_quota("known")
    before = manager.get_stats(), manager.get_usage("known")
    error.__notes__ = []
    with pytest.raises(type(error)) as caught:
        verb(manager)
    assert caught.value is error
    assert error.__notes__ == ["raised by default_quota('m'); nothing has been counted"]
    assert (manager.get_stats(), manager.get_usage("known")) == before
    manager.default_quota = None
    assert manager.check_quota("m", 1), "the manager goes on"


def test_a_coroutine_function_is_refused_without_a_warning():
    async def plan(model_id):
        return quota(model_id)

    manager = ResourceQuotaManager(default_quota=plan, max_models=4)
    with pytest.raises(TypeError, match=r"^default_quota\('m'\) returned <coroutine object "):
        manager.check_quota("m", 1)


def test_a_callable_may_use_the_manager():
    def plan(model_id):
        manager.set_quota("other")
        manager.check_quota("other", 1)
        return quota(model_id, max_tokens_per_day=int(manager.get_usage("other").tokens_this_day))

    manager = ResourceQuotaManager(default_quota=plan, max_models=4)
    assert manager.check_quota("m", 1)
    assert manager.get_quota("m").max_tokens_per_day == 1


def test_threads_that_see_an_id_first_share_one_quota(switch_threads_often):
    manager = ResourceQuotaManager(default_quota={"user:*": quota(max_requests_per_day=5)})
    admitted = []

    def check():
        for i in range(200):
            if manager.check_quota(f"user:{i}", 1):
                admitted.append(i)

    threads = [threading.Thread(target=check) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(admitted) == sorted(list(range(200)) * 5)


def test_it_may_be_unset_by_another_thread_at_any_moment():
    """It is unset as soon as it has been read."""
    manager = ResourceQuotaManager(max_models=4)

    class UnsetOnceRead(type(manager._events)):
        @property
        def templates(self):
            found, self.kept = self.kept, None
            return found

        @templates.setter
        def templates(self, value):
            self.kept = value

    manager._events.__class__ = UnsetOnceRead
    manager.default_quota = {"user:*": quota(max_requests_per_day=0)}
    assert not manager.check_quota("user:bob", 1)
    assert manager.default_quota is None
    manager.default_quota = quota("t")
    assert manager.default_quota == quota("t")


# -- one source over another


@pytest.mark.parametrize(
    ("base", "model_id", "name"),
    [
        (None, "org:x", None),
        (quota("base"), "org:x", "base"),
        (quota("base"), "user:x", "user"),
        ({"org:*": quota("base"), "user:*": quota("old"), "user:vip:*": quota("vip")}, "org:x", "base"),
        ({"org:*": quota("base"), "user:*": quota("old"), "user:vip:*": quota("vip")}, "user:x", "user"),
        ({"org:*": quota("base"), "user:*": quota("old"), "user:vip:*": quota("vip")}, "user:vip:x", "vip"),
        (lambda model_id: quota("asked"), "org:x", "asked"),
        (lambda model_id: quota("asked"), "user:x", "user"),
        (lambda model_id: None, "org:x", None),
    ],
)
def test_patterns_over_another_source(base, model_id, name):
    found = QuotaTemplates(overlaid(base, {"user:*": quota("user")})).template_of(model_id)
    assert (found and found.model_id) == name


def test_the_copy_of_a_mapping_can_be_given_to_another_manager():
    patterns = {"user:*": quota()}
    one = ResourceQuotaManager(default_quota=patterns, max_models=4)
    two = ResourceQuotaManager(default_quota=one.default_quota, max_models=4)
    assert pickle.loads(pickle.dumps(dict(two.default_quota))) == patterns
