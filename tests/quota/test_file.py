"""`load_quotas`: what a quota file may say, and file, table and field in the text of every refusal."""

import copy
import pathlib
import pickle
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modelquota import ResourceQuotaManager
from modelquota.errors import QuotaFileError
from modelquota.quota.cluster import CLUSTER_FIELDS
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.file import Quotas, load_quotas
from modelquota.quota.http import HTTP_FIELDS, key_digits
from modelquota.quota.limits import SHADOW_NAMES, ViolationAction

Write = Callable[[str], pathlib.Path]
RAM = 'an integer from 0 to 2**62 MB, or no limit (None; "unlimited" in a quota file)'
TOP = 'the tables [defaults], [models."<id>"], [http], [keys] and [cluster] and nothing else'
QUOTE = 'no table here; quote an id that has a dot: [models."llama-3.2-1b"]'
PATTERN = (
    'a pattern with * at its end, or before the # of a meter, and nowhere else, such as [defaults."user:*"], of 1 to '
    "255 bytes; a model has a table "
    '[models."<id>"]'
)
IS_ID = "no model_id: the name of a table under [models] is the id"


@pytest.fixture
def write(tmp_path: pathlib.Path) -> Write:
    def write(text: str) -> pathlib.Path:
        path = tmp_path / "quotas.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_a_model_takes_its_own_fields_then_the_defaults_then_those_of_the_config(write: Write) -> None:
    quotas = load_quotas(
        write("""
        [models."llama-3.2-1b"]
        max_ram_mb = 1024
        on_violation = "reject"
        [models.qwen]
        [defaults]
        max_ram_mb = 512
        max_tokens_per_second = 2.5
        """)
    )
    assert list(quotas.values()) == [
        ResourceQuotaConfig("llama-3.2-1b", max_ram_mb=1024, max_tokens_per_second=2.5, on_violation="reject"),
        ResourceQuotaConfig("qwen", max_ram_mb=512, max_tokens_per_second=2.5),
    ]
    assert list(quotas) == ["llama-3.2-1b", "qwen"]


def test_unlimited_is_none_and_may_be_taken_back(write: Write) -> None:
    quotas = load_quotas(
        write("""
        defaults.max_ram_mb = "unlimited"
        models.a.max_requests_per_second = "unlimited"
        models.b.max_requests_per_second = inf
        models.c.max_ram_mb = 7
        """)
    )
    assert (quotas["a"].max_ram_mb, quotas["a"].max_requests_per_second) == (None, None)
    assert quotas["b"].max_requests_per_second is None
    assert quotas["c"].max_ram_mb == 7


def test_patterns_take_their_own_fields_then_the_defaults(write: Write) -> None:
    quotas = load_quotas(
        write("""
        [defaults."user:*"]
        max_ram_mb = 7
        [models.a]
        [defaults]
        max_ram_mb = 512
        max_ssd_mb = "unlimited"
        [defaults."user:free.*"]
        """)
    )
    assert quotas == {"a": ResourceQuotaConfig("a", max_ram_mb=512, max_ssd_mb=None)}
    assert list(quotas.patterns.items()) == [
        ("user:*", ResourceQuotaConfig("user:*", max_ram_mb=7, max_ssd_mb=None)),
        ("user:free.*", ResourceQuotaConfig("user:free.*", max_ram_mb=512, max_ssd_mb=None)),
    ]
    manager = ResourceQuotaManager(default_quota=quotas.patterns, max_models=4)
    assert not manager.check_quota("user:bob", 1, ram_needed_mb=8)
    assert manager.check_quota("user:free.bob", 1, ram_needed_mb=8)


def test_what_is_loaded_is_a_dict_and_pickles_with_its_patterns(write: Write) -> None:
    quotas = load_quotas(write("[models.a]\n[defaults.'*']\nmax_ram_mb = 3"))
    assert isinstance(quotas, dict)
    for again in (pickle.loads(pickle.dumps(quotas)), copy.copy(quotas), copy.deepcopy(quotas)):
        assert type(again) is Quotas
        assert (again, again.patterns) == (quotas, {"*": ResourceQuotaConfig("*", max_ram_mb=3)})
    assert load_quotas(write("[models.a]")).patterns == {}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_accepted(tmp_path: pathlib.Path, end: str) -> None:
    path = tmp_path / "quotas.toml"
    path.write_bytes(f"\ufeff# é{end}[models.a]{end}max_ram_mb = 5{end}".encode())
    assert load_quotas(path) == {"a": ResourceQuotaConfig("a", max_ram_mb=5)}
    path.write_bytes(f"\ufeff[models.a]{end}max_ram_mb = -5{end}".encode())
    with pytest.raises(QuotaFileError, match=r"quotas.toml: line 2: \[models"):
        load_quotas(path)
    path.write_bytes(f"\ufeff[models.a]{end}max_ram_mb 5{end}".encode())
    with pytest.raises(QuotaFileError, match=r"\(at line 2, column 12\); expected TOML in UTF-8"):
        load_quotas(path)
    path.write_bytes(f"[models.a]{end}\ufeffmax_ram_mb = 5".encode())
    with pytest.raises(QuotaFileError, match="at line 2, column 1"):
        load_quotas(path)
    for encoding in ("utf-16", "utf-32"):
        path.write_bytes("[models.a]".encode(encoding))
        with pytest.raises(QuotaFileError, match="expected TOML in UTF-8"):
            load_quotas(path)


def test_what_is_for_servers_is_no_model(write: Write) -> None:
    digits = key_digits("secret")
    text = f"[http]\nidentity = 'bearer'\npage = '/quota'\n[models.a]\n[keys]\n{digits.upper()}{'0' * 32} = 'acme'"
    quotas = load_quotas(write(text))
    assert list(quotas) == ["a"]
    assert quotas.http == {"identity": "bearer", "page": "/quota"}
    assert quotas.key_names == {digits: "acme"}
    again = pickle.loads(pickle.dumps(quotas))
    assert (again, again.http, again.key_names) == (quotas, quotas.http, quotas.key_names)
    assert load_quotas(write("[models.a]")).http == load_quotas(write("[models.a]")).key_names == {}


def test_what_hosts_share_by_is_no_model(write: Write) -> None:
    fields = {"url": "rediss://host:6379/0", "namespace": "prod", "lease_sec": 30, "renew_sec": 0.5}
    fields |= {"on_store_down": "deny", "wait_replicas": 1}
    lines = [f"{name} = {value!r}" for name, value in fields.items()]
    quotas = load_quotas(write("\n".join(["[models.a]", "[cluster]", *lines])))
    assert (list(quotas), quotas.cluster) == (["a"], fields)
    assert fields.keys() == CLUSTER_FIELDS.keys()
    assert pickle.loads(pickle.dumps(quotas)).cluster == fields
    assert load_quotas(write("[models.a]")).cluster is None
    assert load_quotas(write("[cluster]")).cluster == {}


@pytest.mark.parametrize(
    "text",
    [
        "[cluster]\nurl = {!r}", "[cluster]\nnamespace = {!r}", "[cluster]\nredis_url = {!r}", "cluster = {!r}",
        "url = {!r}", "[http]\nstate = 5\nredis = {!r}", "[http]\npage = {!r}", "[models.m]\nurl = {!r}",
        "[cluster.a]\nb = {!r}", "[defaults]\nmax_ram_mb = [{!r}]", "[keys]\nredis = {!r}", "[cluster]\n{!r} = 5",
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "url",
    ["redis://:s3cret@host", "rediss://user:s3cret@h:1/0", "redis://h?password=s3cret", "unix://h?Password=s3cret"],
)
def test_a_password_in_a_file_is_refused_and_not_repeated(write: Write, text: str, url: str) -> None:
    text = text.format(url).replace("state = 5\n", "")
    with pytest.raises(QuotaFileError) as caught:
        load_quotas(write(text))
    said = str(caught.value)
    assert "s3cret" not in said + repr(caught.value) + repr(vars(caught.value))
    if "\nurl" in text and "cluster" in text:
        assert said.endswith(
            "line 2: [cluster]: url='a text that is not shown' is not accepted; expected a URL without a user and a "
            'password, such as "rediss://host:6379/0"; one with a password is not for a file: set it as '
            "MODELQUOTA_REDIS_URL"
        )


def test_a_renewal_is_half_a_lease_at_most(write: Write) -> None:
    assert load_quotas(write("[cluster]\nlease_sec = 2")).cluster == {"lease_sec": 2}
    with pytest.raises(QuotaFileError, match=r"\[cluster\]: renew_sec=31 .* expected at most 30 s, half of lease_sec"):
        load_quotas(write("[cluster]\nrenew_sec = 31"))


def test_a_key_in_the_place_of_its_hash_is_not_repeated(write: Write) -> None:
    with pytest.raises(QuotaFileError) as caught:
        load_quotas(write("[models.a]\n[keys]\n# not a hash\nsk-secret = 'acme'"))
    assert str(caught.value).endswith(
        "quotas.toml: line 4: [keys]: ...='acme' is not accepted; expected the SHA-256 of an API key as its name: 32 "
        "to 64 hexadecimal digits"
    )
    assert "sk-secret" not in repr(caught.value)


@pytest.mark.parametrize("text", ["", "[defaults]\nmax_ram_mb = 5", "[models]"])
def test_a_file_may_name_no_model(write: Write, text: str) -> None:
    assert load_quotas(write(text)) == {}


def test_the_path_may_be_a_str(write: Write) -> None:
    assert load_quotas(str(write("[models.a]"))) == {"a": ResourceQuotaConfig("a")}


@pytest.mark.parametrize(
    ("text", "table", "field", "message"),
    [
        ("max_ram_mb = 5", "", "max_ram_mb", f"max_ram_mb=5 is not accepted; expected {TOP}"),
        ("[model.a]", "model", "", f"[model] is not accepted; expected {TOP}"),
        ("defaults = 5", "", "defaults", "defaults=5 is not accepted; expected a table of quota fields"),
        ("models = [1]", "", "models", "models=[1] is not accepted; expected a table of quota fields"),
        ("[[models]]", "", "models", "models=[{}] is not accepted; expected a table of quota fields"),
        ("[models]\na = 5", "models", "a", "[models]: a=5 is not accepted; expected a table of quota fields"),
        (
            "[models.a]\nmax_ram_mb = -5",
            'models."a"',
            "max_ram_mb",
            f'[models."a"]: max_ram_mb=-5 is not accepted; expected {RAM}',
        ),
        (
            "[defaults]\nmax_ram_mb = 2.0\n[models.a]\nmax_ram_mb = 2",
            "defaults",
            "max_ram_mb",
            f"[defaults]: max_ram_mb=2.0 is not accepted; expected {RAM}",
        ),
        (
            "[models.a]\nburst_tokens = 'unlimited'",
            'models."a"',
            "burst_tokens",
            "[models.\"a\"]: burst_tokens='unlimited' is not accepted; expected an integer from 0 to 2**62 tokens",
        ),
        (
            "[models.a]\nshadow_limits = ['ram', 'tokens']",
            'models."a"',
            "shadow_limits",
            "[models.\"a\"]: shadow_limits=['ram', 'tokens'] is not accepted; expected names of limits, each one of "
            "'ram', 'ssd', 'concurrency', 'requests_per_second', 'tokens_per_second', "
            "'tokens_per_minute', 'requests_per_minute', 'tokens_per_hour', 'requests_per_hour', 'tokens_per_day', "
            "'requests_per_day', 'tokens_per_month', 'requests_per_month'",
        ),
        (
            "[models.a]\nmax_ram_gb = 5",
            'models."a"',
            "max_ram_gb",
            '[models."a"]: max_ram_gb=5 is not accepted; expected a field of a quota, perhaps max_ram_mb',
        ),
        (
            "[models.a]\nmodel_id = 'a'",
            'models."a"',
            "model_id",
            f"[models.\"a\"]: model_id='a' is not accepted; expected {IS_ID}",
        ),
        (
            "[defaults]\nmodel_id = 'a'",
            "defaults",
            "model_id",
            f"[defaults]: model_id='a' is not accepted; expected {IS_ID}",
        ),
        (
            '[models.""]',
            'models.""',
            "model_id",
            "[models.\"\"]: model_id='' is not accepted; expected a str of 1 to 255 bytes of UTF-8 without NUL; "
            "a meter has text before and after its '#'",
        ),
        *(
            (
                f'[models.a]\n[defaults."{key}"]\nmax_ram_mb = 5',
                f'defaults."{key}"',
                "",
                f'[defaults."{key}"] is not accepted; expected {PATTERN}',
            )
            for key in ("vip", "", "a*b", "*a", "user:**", "user:#*", "user:*#", "x" * 255 + "*")
        ),
        (
            "[models.a]\n[defaults.llama-3.2-1b]\nmax_ram_mb = 5",
            'defaults."llama-3"',
            "",
            f'[defaults."llama-3"] is not accepted; expected {PATTERN}',
        ),
        (
            "[models.a]\n[defaults]\n'user:*' = 5",
            "defaults",
            "user:*",
            "[defaults]: user:*=5 is not accepted; expected a table of quota fields",
        ),
        (
            "[[defaults.'user:*']]\nmax_ram_mb = 5",
            "defaults",
            "user:*",
            "[defaults]: user:*=[{'max_ram_mb': 5}] is not accepted; expected a table of quota fields",
        ),
        (
            "[defaults]\nmax_ram_mb = 5\n[defaults.'user:*']\nmax_ssd_mb = 5\nmax_ram_mb = -5",
            'defaults."user:*"',
            "max_ram_mb",
            f'[defaults."user:*"]: max_ram_mb=-5 is not accepted; expected {RAM}',
        ),
        (
            "[models.a]\n[defaults.'user.*']\nmax_ram = 5",
            'defaults."user.*"',
            "max_ram",
            '[defaults."user.*"]: max_ram=5 is not accepted; expected a field of a quota, perhaps max_ram_mb',
        ),
        (
            "[models.a]\n[defaults.max_ram_mb]\nx = 5",
            "defaults",
            "max_ram_mb",
            f"[defaults]: max_ram_mb={{'x': 5}} is not accepted; expected {QUOTE}",
        ),
        (
            "[models.llama-3.2-1b]\nmax_ram_mb = 5",
            'models."llama-3"',
            "2-1b",
            f"[models.\"llama-3\"]: 2-1b={{'max_ram_mb': 5}} is not accepted; expected {QUOTE}",
        ),
        ("http = 5", "", "http", "http=5 is not accepted; expected a table [http]"),
        ("[[keys]]", "", "keys", "keys=[{}] is not accepted; expected a table [keys]"),
        (
            "[models.a]\n[http]\npage = '/quota'\nidentity = 'basic'",
            "http",
            "identity",
            '[http]: identity=\'basic\' is not accepted; expected "bearer", "openai-user" or "header:" and the name of '
            "a header",
        ),
        (
            "[http]\nbody_timeout = 0",
            "http",
            "body_timeout",
            "[http]: body_timeout=0 is not accepted; expected a number from 0.001 to 86400 s",
        ),
        (
            "[http]\nport = 8000",
            "http",
            "port",
            f"[http]: port=8000 is not accepted; expected a field of [http], one of {', '.join(HTTP_FIELDS)}",
        ),
    ],
)
def test_what_is_refused_is_named(write: Write, text: str, table: str, field: str, message: str) -> None:
    path = write(text)
    with pytest.raises(QuotaFileError) as caught:
        load_quotas(path)
    error = caught.value
    assert (error.path, error.table, error.field) == (str(path), table, field)
    assert str(error) == f"{path}: line {error.line}: {message}"
    assert error.line is not None
    named = field if field and field in text else table.partition(".")[2].strip('"') or table or field
    assert named in text.split("\n")[error.line - 1]


ANY_LINE = """# a comment
[defaults]
max_ram_mb = 5

[models."a.b"] # {line 5}
burst_tokens = 3
on_violation = """


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (ANY_LINE + "'wait'", 7),
        (ANY_LINE + "'reject'\nmax_ram_mb = [\n  1,\n  2,\n]\nmax_ssd_mb = 5\n[models.c]\n", 8),
        (ANY_LINE + '"""\nwait\nlong\n"""\nmax_ssd_mb = 5\n', 7),
        (ANY_LINE + "'reject'\r\n\r\n[models.c]\r\nburst_tokens = -1\r\n[models.d]\r\n", 10),
        (ANY_LINE + "'reject'\n[models]\nc.burst_tokens = -1", 9),
        (ANY_LINE + "'reject'\n[models.'']\nburst_tokens = 1", 8),
        ("models = { a = { burst_tokens = -1 } }", 1),
        (ANY_LINE + "'reject'\n[models.c]\nmax_ram_mb = 5\n" * 1 + "".join(f"[models.x{i}]\n" for i in range(500))
         + "[models.y]\nburst_tokens = -1\n" + "".join(f"[models.z{i}]\n" for i in range(500)), 511),
    ],
)  # fmt: skip
def test_the_line_is_named(write: Write, text: str, line: int) -> None:
    with pytest.raises(QuotaFileError, match=f"quotas.toml: line {line}: ") as caught:
        load_quotas(write(text))
    assert caught.value.line == line
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.line) == (str(caught.value), line)


def test_a_file_that_is_not_toml(write: Write) -> None:
    path = write("[models.a]\nmax_ram_mb 5")
    with pytest.raises(QuotaFileError) as caught:
        load_quotas(path)
    assert caught.value.value == "Expected '=' after a key in a key/value pair (at line 2, column 12)"
    assert str(caught.value) == f"{path}: {caught.value.value}; expected TOML in UTF-8"


def test_a_file_that_is_not_utf_8(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_bytes(b"[models.\xff]")
    with pytest.raises(QuotaFileError) as caught:
        load_quotas(path)
    assert str(caught.value).startswith(f"{path}: 'utf-8' codec can't decode byte 0xff")
    assert str(caught.value).endswith("; expected TOML in UTF-8")


def test_a_file_that_is_not_there(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"quotas\.toml"):
        load_quotas(tmp_path / "quotas.toml")


LIMITS = st.none() | st.integers(0, 2**62)
RATES = st.none() | st.floats(0, allow_infinity=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # every example writes the file anew
@given(
    st.builds(
        ResourceQuotaConfig,
        st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\#'), min_size=1),
        max_ram_mb=LIMITS,
        max_tokens_per_day=LIMITS,
        max_concurrent_requests=LIMITS,
        cluster_concurrency=st.booleans(),
        max_tokens_per_second=RATES,
        burst_tokens=st.integers(0, 2**62),
        on_violation=st.sampled_from(ViolationAction),
        shadow_limits=st.sets(st.sampled_from(SHADOW_NAMES)),
    )
)
def test_what_to_dict_gives_can_be_written_to_a_file_and_read_back(write: Write, config: ResourceQuotaConfig) -> None:
    fields = {field: "unlimited" if value is None else value for field, value in config.to_dict().items()}
    del fields["model_id"]
    words = {True: "true", False: "false"}
    lines = [f"{field} = {words[value] if isinstance(value, bool) else repr(value)}" for field, value in fields.items()]
    assert load_quotas(write("\n".join([f'[models."{config.model_id}"]', *lines]))) == {config.model_id: config}
