"""The schema for editors accepts and refuses the same files as `load_quotas`."""

import tomllib

import pytest
from jsonschema import Draft4Validator

from modelquota import Limit, QuotaFileError, ResourceQuotaConfig, load_quotas
from modelquota.quota.cluster import CLUSTER_FIELDS
from modelquota.quota.http import HTTP_FIELDS
from modelquota.quota.schema import quota_file_schema

FIELDS = ResourceQuotaConfig("m").to_dict()
del FIELDS["model_id"]
VALUES = [
    "0", "1", "-1", "2.0", "0.5", "-0.5", "4611686018427387904", "4611686018427387905", "true", "inf", "-inf", "1e300",
    "[]", "{}", "1979-05-27", "''", "'unlimited'", "'none'", "'reject'", "'throttle'", "'warn'", "'queue'", "'REJECT'",
    "'ram'", "['Ram', 'tokens_per_DAY']", "['ram', 'ram']", "['queue']", "['ram', 1]", "[['ram']]", "[6]",
    "'tokens'", "'usd'", "'USD'", "[1, 0.25, 4]", "[0, 0, 1000000]", "[1, 1, 1000001]", "[1, 1]", "[1, 1, 1, 1]",
    "[1, -1, 1]", "[1, true, 1]", "[1, 'x', 1]", "[1, inf, 1]",
]  # fmt: skip
FILES = [
    "", "[models]", "[defaults]", "[models.a]\n[defaults]", "[model.a]", "max_ram_mb = 5", "defaults = 5",
    "models = [1]", "[[models]]", "[models]\na = 5", "[models.a.b]", "[models.llama-3.2-1b]\nmax_ram_mb = 5",
    "[models.'']", "[models.'a b.c/ü']", "[models.a]\nmodel_id = 'a'", "[models.a]\nmax_ram = 5",
    "[defaults.'user:*']", "[defaults]\nmax_ram_mb = 5\n[defaults.'*']\nmax_ram_mb = 6", "[defaults.'**']",
    "[defaults.'a*b']", "[defaults.'']", "[defaults.vip]", "[defaults.'user:*']\nmax_ram = 5", "[defaults.'a*'.b]",
    "[defaults]\n'user:*' = 5", "[[defaults.'user:*']]", "[defaults.max_ram_mb]", "[defaults.models.a]",
    f"[defaults.'{'x' * 254}*']", f"[defaults.'{'x' * 255}*']", '[defaults."a\\u0000*"]', "[models.'a*']",
    "[defaults.'user:*']\nmodel_id = 'a'", "[defaults.'a\u00fc b/*']", "defaults.'u*'.burst_tokens = -1",
    '[models."a\\u0000b"]', f"[models.{'x' * 255}]", f"[models.{'x' * 256}]",
    "cluster = 5", "[[cluster]]", "[cluster]", "[cluster]\nhost = 'a'", "[cluster.url]",
    "http = 5", "[[http]]", "[http]", "[http]\nhost = 'a'", "[http.page]", "keys = 5", "[keys]", "[keys.a]",
    f"[keys]\n{'aB' * 16} = 'acme'", f"[keys]\n{'0f' * 32} = 'acme'", f"[keys]\n{'0' * 31} = 'acme'",
    f"[keys]\n{'0' * 65} = 'acme'", f"[keys]\n{'g' * 32} = 'acme'", f"[keys]\n{'0' * 32} = ''",
    f"[keys]\n{'0' * 32} = 7", f"[keys]\n{'0' * 32} = '{'x' * 256}'",
]  # fmt: skip

HTTP_VALUES = [
    *VALUES, "false", "''", "'bearer'", "'openai-user'", "'header:x-tenant'", "'header:'", "'header:a b'", "'basic'",
    "'pass'", "'refuse'", "'stop'", "'finish'", "'all'", "'none'", "'/quota'", "'quota'", "'/a b'", "'tenant/'", "'a*'",
    "30.5", "86401", "'bearer, header:a'", "'vllm'", "['vllm', 'openai']", "['vllm', 'x']", "[['vllm']]", "['vllm', 5]",
]  # fmt: skip

CLUSTER_VALUES = [
    *VALUES, "'redis://host'", "'rediss://host:6379/0'", "'unix:///run/redis.sock'", "'redis://u:p@host'", "'http://host'",
    "'redis://host/?password=p'", "'redis://host/?PassWord=p'", "'redis://a b'", "'prod'", "'a}b'", "'a b'",
    f"'{'x' * 64}'", f"'{'x' * 65}'", "'lease_only'", "'deny'", "'share'", "'allow'", "60", "3600", "3601", "16", "17",
    "0.1", "0.09", "30",
]  # fmt: skip


@pytest.fixture(scope="module")
def validator():
    schema = quota_file_schema()
    Draft4Validator.check_schema(schema)
    return Draft4Validator(schema)


def agree(validator, path, text):
    path.write_text(text, encoding="utf-8")
    try:
        load_quotas(path)
        loads = True
    except QuotaFileError:
        loads = False
    assert validator.is_valid(tomllib.loads(text)) is loads
    return loads


@pytest.mark.parametrize("table", ["defaults", "defaults.'user:*'", "models.a"])
@pytest.mark.parametrize("field", FIELDS)
def test_every_value_of_every_field(validator, tmp_path, table, field):
    loads = [agree(validator, tmp_path / "q.toml", f"[{table}]\n{field} = {value}") for value in VALUES]
    assert any(loads)
    assert not all(loads)


@pytest.mark.parametrize("field", HTTP_FIELDS)
def test_every_value_of_every_field_for_servers(validator, tmp_path, field):
    loads = [agree(validator, tmp_path / "q.toml", f"[http]\n{field} = {value}") for value in HTTP_VALUES]
    assert any(loads)
    assert not all(loads)


@pytest.mark.parametrize("field", CLUSTER_FIELDS)
def test_every_value_of_every_field_for_many_hosts(validator, tmp_path, field):
    lease = "lease_sec = 3600\n" if field == "renew_sec" else ""  # it is also at most half of that
    loads = [agree(validator, tmp_path / "q.toml", f"[cluster]\n{lease}{field} = {value}") for value in CLUSTER_VALUES]
    assert any(loads)
    assert not all(loads)


@pytest.mark.parametrize("spell", [str.lower, str.upper, str.title, str.swapcase])
@pytest.mark.parametrize("limit", Limit)
def test_every_name_of_a_limit_in_any_case(validator, tmp_path, limit, spell):
    name = spell(limit.name)
    agree(validator, tmp_path / "q.toml", f"[models.a]\nshadow_limits = ['{name}x']")
    agree(validator, tmp_path / "q.toml", f"[models.a]\nshadow_limits = ['x{name}']")
    assert agree(validator, tmp_path / "q.toml", f"[models.a]\nshadow_limits = '{name}'") is (limit is not Limit.QUEUE)


@pytest.mark.parametrize("text", FILES)
def test_every_shape_of_file(validator, tmp_path, text):
    agree(validator, tmp_path / "q.toml", text)


def test_it_knows_all_fields_and_their_defaults():
    properties = quota_file_schema()["definitions"]["quota"]["properties"]
    names = quota_file_schema()["definitions"]["limit"]["anyOf"][0]["enum"]
    assert names == [limit.name.lower() for limit in Limit if limit is not Limit.QUEUE]
    defaults = {name: "unlimited" if value is None else value for name, value in FIELDS.items()}
    assert {name: field["default"] for name, field in properties.items()} == defaults
    assert all(field["description"] for field in properties.values())
    assert quota_file_schema()["definitions"]["defaults"]["properties"] == {
        name: {"$ref": f"#/definitions/quota/properties/{name}"} for name in properties
    }
    for name, fields in (("http", HTTP_FIELDS), ("cluster", CLUSTER_FIELDS)):
        described = quota_file_schema()["definitions"][name]["properties"]
        assert described == {field.name: {"description": field.meaning, **field.schema} for field in fields.values()}
