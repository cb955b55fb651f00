"""Hot reload: a good file is applied, a bad one is refused whole, and no check ever notices."""

import logging
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from modelquota import CapacityError, QuotaFileError, ResourceQuotaConfig, ResourceQuotaManager
from modelquota.control.reload import QuotaReloader, Reloaded

GOOD = '[models.a]\nmax_ram_mb = 10\n[models."b.c"]\nmax_tokens_per_hour = 500\n'


@pytest.fixture
def manager():
    return ResourceQuotaManager(max_models=4)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "quotas.toml"
    path.write_text(GOOD)
    return path


def limits(manager):
    return {model_id: manager.get_quota(model_id) for model_id in manager.list_models()}


def eventually(holds):
    until = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_only_what_has_changed_is_set(manager, path):
    reloader = QuotaReloader(manager, str(path))
    assert reloader.reload() == Reloaded(("a", "b.c"))
    manager.check_quota("a", 5)
    manager.update_quota("a", burst_tokens=1)  # somebody else's change, until the file's own changes
    path.write_text(GOOD.replace("500", "600"))
    assert reloader.reload() == Reloaded(("b.c",))
    assert manager.get_quota("b.c").max_tokens_per_hour == 600
    assert manager.get_quota("a").burst_tokens == 1
    path.write_text(GOOD.replace("10", "11"))
    assert reloader.reload() == Reloaded(("a", "b.c"))
    assert (manager.get_quota("a").max_ram_mb, manager.get_quota("a").burst_tokens) == (11, 10_000)
    assert manager.get_usage("a").tokens_this_hour == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "burst_tokens = -1\n", 'line 5: [models."b.c"]: burst_tokens=-1 is not accepted'),
        ("[models.new]\n[models.a]\nmax_ram = 5\n", 'line 3: [models."a"]: max_ram=5 is not accepted'),
        (GOOD + "max_ram_mb\n", "(at line 5, column 11)"),
        ("", 'expected at least one table [models."<id>"]'),
    ],
)
def test_a_bad_file_is_refused_whole_and_logged_with_line_and_field(manager, path, caplog, text, message):
    reloader = QuotaReloader(manager, path)
    reloader.reload()
    before = limits(manager)
    path.write_text(text)
    done = reloader.reload()
    assert isinstance(done.error, QuotaFileError)
    assert (done.changed, done.missing) == ((), ())
    assert limits(manager) == before
    assert caplog.records[-1].levelno == logging.ERROR
    assert message in caplog.text
    path.write_text(GOOD)
    assert reloader.reload() == Reloaded()


PATTERNS = '[defaults]\nmax_ram_mb = 5\n[defaults."user:*"]\nmax_tokens_per_day = 10\n[defaults."org:*"]\n'
USER = ResourceQuotaConfig("user:*", max_ram_mb=5, max_tokens_per_day=10)
ORG = ResourceQuotaConfig("org:*", max_ram_mb=5)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_patterns_are_the_managers_default_quota(manager, path, mark):
    path.write_text(mark + PATTERNS, encoding="utf-8")
    reloader = QuotaReloader(manager, path)
    assert reloader.reload() == Reloaded(changed_patterns=("user:*", "org:*"))
    assert manager.default_quota == {"user:*": USER, "org:*": ORG}
    assert manager.check_quota("user:a", 10)
    assert not manager.check_quota("user:b", 11)
    assert reloader.reload() == Reloaded()
    path.write_text(PATTERNS.replace("10", "20") + GOOD, encoding="utf-8")
    assert reloader.reload() == Reloaded(("a", "b.c"), changed_patterns=("user:*",))
    assert manager.default_quota == {"user:*": USER.replace(max_tokens_per_day=20), "org:*": ORG}
    assert manager.get_quota("user:a").max_tokens_per_day == 10, "an id keeps what it was given"


@pytest.mark.parametrize(
    "text",
    [
        PATTERNS + "max_ram_mb = -1\n",
        PATTERNS.replace("10", "11") + '[defaults."*:*"]\n',
        PATTERNS.replace("10", "11") + "[defaults.vip]\n",
        PATTERNS.replace("10", "11") + "".join(f"[models.m{i}]\n" for i in range(5)),
        PATTERNS.replace("10", "11") + "[models.a]\nmax_ram = 5\n",
    ],
)
def test_a_bad_file_changes_no_pattern(manager, path, text):
    path.write_text(PATTERNS)
    reloader = QuotaReloader(manager, path)
    reloader.reload()
    path.write_text(text)
    assert reloader.reload().error is not None
    assert manager.default_quota == {"user:*": USER, "org:*": ORG}


def test_a_missing_pattern_keeps_its_limits_unless_it_is_to_be_removed(path, caplog):
    base = ResourceQuotaConfig("base", max_ram_mb=1)
    keeps, removes = (ResourceQuotaManager(max_models=4, default_quota={"user:*": base}) for _ in range(2))
    keeping, removing = QuotaReloader(keeps, path), QuotaReloader(removes, path, remove_missing=True)
    path.write_text(PATTERNS)
    for reloader in (keeping, removing):
        reloader.reload()
    path.write_text('[defaults."org:*"]\nmax_ram_mb = 5\n')
    assert keeping.reload() == removing.reload() == Reloaded(missing_patterns=("user:*",))
    assert "pattern 'user:*' is no longer in" in caplog.text
    assert keeps.default_quota == {"user:*": USER, "org:*": ORG}
    assert removes.default_quota == {"user:*": base, "org:*": ORG}
    path.write_text(GOOD)
    assert keeping.reload() == removing.reload() == Reloaded(("a", "b.c"), missing_patterns=("org:*",))
    assert keeps.default_quota == {"user:*": USER, "org:*": ORG}
    assert removes.default_quota == {"user:*": base}
    assert keeping.reload() == removing.reload() == Reloaded()


def test_a_file_without_patterns_leaves_the_default_quota_alone(manager, path):
    manager.default_quota = plan = lambda model_id: None
    reloader = QuotaReloader(manager, path)
    reloader.reload()
    assert manager.default_quota is plan


def test_what_others_set_as_default_stays_until_the_patterns_of_the_file_change(manager, path):
    path.write_text(PATTERNS)
    reloader = QuotaReloader(manager, path)
    reloader.reload()
    asked = []
    manager.default_quota = plan = asked.append
    path.write_text(PATTERNS + GOOD)
    reloader.reload()
    assert manager.default_quota is plan
    path.write_text(PATTERNS.replace("10", "20") + GOOD)
    assert reloader.reload().changed_patterns == ("user:*",)
    manager.check_quota("user:a", 1)
    assert manager.get_quota("user:a").max_tokens_per_day == 20
    manager.check_quota("else", 1)
    assert asked == ["else"]


def test_a_file_that_is_gone_changes_nothing(manager, path):
    reloader = QuotaReloader(manager, path)
    reloader.reload()
    path.unlink()
    assert isinstance(reloader.reload().error, FileNotFoundError)
    assert manager.list_models() == ["a", "b.c"]


def test_a_file_that_cannot_be_used_at_the_start_is_an_error(manager, path):
    """Later the old limits stay; at first there are none."""
    path.write_text("[models.llama]\nmax_ram_mb = -1")
    with pytest.raises(QuotaFileError, match="max_ram_mb"):
        QuotaReloader(manager, path).start()
    path.unlink()
    reloader = QuotaReloader(manager, path)
    with pytest.raises(FileNotFoundError):
        reloader.start()
    path.write_text("[models.llama]\nmax_ram_mb = 7")
    with reloader.start():
        assert manager.get_quota("llama").max_ram_mb == 7


def test_too_many_models_are_refused_before_the_first_is_set(manager, path):
    manager.set_quota("x")
    path.write_text("".join(f"[models.m{i}]\n" for i in range(4)))
    assert isinstance(QuotaReloader(manager, path).reload().error, CapacityError)
    assert manager.list_models() == ["x"]


def test_a_missing_model_keeps_its_limits_unless_it_is_to_be_removed(manager, path, caplog):
    manager.set_quota("other")
    keeping, removing = QuotaReloader(manager, path), QuotaReloader(manager, path, remove_missing=True)
    keeping.reload()
    removing.reload()
    path.write_text("[models.a]\nmax_ram_mb = 10\n")
    assert keeping.reload() == Reloaded((), ("b.c",))
    assert "model 'b.c' is no longer in" in caplog.text
    assert manager.list_models() == ["other", "a", "b.c"]
    assert keeping.reload() == Reloaded()
    assert removing.reload() == Reloaded((), ("b.c",))
    assert manager.list_models() == ["other", "a"]
    manager.remove_quota("a")
    assert keeping.reload() == Reloaded(("a",))


@pytest.mark.parametrize("replace", [False, True], ids=["in place", "by another file"])
def test_a_change_is_noticed(manager, path, replace):
    with QuotaReloader(manager, path).start() as reloader:
        assert manager.get_quota("a").max_ram_mb == 10
        with pytest.raises(RuntimeError, match=r"QuotaReloader is running; stop\(\) it"):
            reloader.start()
        for ram_mb in (20, 30):
            target = path.with_suffix(".new") if replace else path
            target.write_text(GOOD.replace("10", str(ram_mb)))
            if replace:
                os.replace(target, path)
            eventually(lambda ram_mb=ram_mb: manager.get_quota("a").max_ram_mb == ram_mb)
    path.write_text(GOOD)
    assert reloader.start() is reloader, "it may be started again"
    assert manager.get_quota("a").max_ram_mb == 10
    reloader.stop()
    reloader.stop()


def test_200_versions_half_of_them_broken_under_load(path):
    """While the file is rewritten, every check answers, and every limit in force is one that a good version had."""
    manager = ResourceQuotaManager()
    rng = random.Random(1)
    allowed, stop, failures, seen = {10}, threading.Event(), [], set()

    def version(ram_mb):
        return GOOD.replace("10", str(ram_mb)).replace("500", "1_000_000")

    def check():
        try:
            while not stop.is_set():
                for model_id in ("a", "b.c"):
                    manager.check_quota(model_id, 0)
                seen.add(manager.get_quota("a").max_ram_mb)
        except Exception as error:
            failures.append(error)

    path.write_text(version(10))
    with QuotaReloader(manager, path).start():
        threads = [threading.Thread(target=check) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            for i in range(200):
                if i % 2:
                    good = version(1000 + i)
                    broken = rng.choice(
                        [
                            good[: rng.randrange(1, 9)],
                            good + "max_ssd_mb = -1\n",
                            good + "[models.a]\n",
                            good + "= 5",
                            "",
                        ]
                    )
                    path.write_text(broken)
                else:
                    allowed.add(1000 + i)
                    path.write_text(version(1000 + i))
                time.sleep(rng.choice([0, 0.002, 0.01]))
            path.write_text(version(77))
            allowed.add(77)
            eventually(lambda: 77 in seen)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == []
    assert seen <= allowed
    assert manager.list_models() == ["a", "b.c"]


def test_each_of_200_versions_read_under_load(path):
    """The same with every version read, as no debouncing lets any of them pass."""
    manager = ResourceQuotaManager()
    reloader = QuotaReloader(manager, path)
    reloader.reload()
    stop, failures, checks = threading.Event(), [], [0, 0]

    def check(which):
        try:
            while not stop.is_set():
                checks[which] += bool(manager.check_quota("a", 0)) or 1
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=check, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in range(1, 201):
            path.write_text(GOOD.replace("10", str(i) if i % 2 else f"-{i}"))
            assert (reloader.reload().error is None) is bool(i % 2)
            assert manager.get_quota("a").max_ram_mb == (i if i % 2 else i - 1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert min(checks) > 0


def test_without_the_extra_it_says_what_to_install(path):
    code = (
        "import sys; sys.modules['watchfiles'] = None; from modelquota import ResourceQuotaManager; "
        "from modelquota.control.reload import QuotaReloader; QuotaReloader(ResourceQuotaManager(), 'x').start()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr.endswith("ImportError: this needs the extra 'reload': pip install 'modelquota[reload]'\n")
