"""Quotas of many models from one TOML file.

    [defaults]
    on_violation = "reject"
    max_tokens_per_day = "unlimited"

    [defaults."user:*"]
    max_tokens_per_hour = 5_000

    [models."llama-3.2-1b"]
    max_ram_mb = 1024

Fields and units are those of `ResourceQuotaConfig`. The tables ``[http]`` and ``[keys]``, for servers, are described in
`modelquota.quota.http`, and ``[cluster]``, for many hosts, in `modelquota.quota.cluster`.
"""

import os
from collections.abc import Mapping
from typing import Any

from modelquota.errors import QuotaConfigError, QuotaFileError
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.patterns import pattern_of

_UNLIMITED = "unlimited"
_TABLES = 'the tables [defaults], [models."<id>"], [http], [keys] and [cluster] and nothing else'
_PATTERN = """a pattern with * at its end, or before the # of a meter, and nowhere else, such as [defaults."user:*"], \
of 1 to 255 bytes; a model has a table [models."<id>"]"""


class Quotas(dict[str, ResourceQuotaConfig]):
    """What `load_quotas` returns: a dict of the quotas of a file's models by id, and those of its patterns.

    Attributes
    ----------
    patterns : dict of str to ResourceQuotaConfig
        By pattern, in the order of the file, for a manager's `default_quota`; empty if the file has no patterns.
    http : dict
        The fields of ``[http]``, for `modelquota.asgi.Quota`.
    key_names : dict of str to str
        The names in ``[keys]``, by what `modelquota.quota.http.key_digits` returns for the key.
    cluster : dict or None
        The fields of ``[cluster]``, for `modelquota.cluster.RedisStore`; None if the file has no such table.
    """

    def __init__(
        self,
        models: Mapping[str, ResourceQuotaConfig],
        patterns: Mapping[str, ResourceQuotaConfig],
        http: Mapping[str, Any] | None = None,
        key_names: Mapping[str, str] | None = None,
        cluster: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(models)
        self.patterns = dict(patterns)
        self.http = dict(http or {})
        self.key_names = dict(key_names or {})
        self.cluster = None if cluster is None else dict(cluster)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self.patterns, self.http, self.key_names, self.cluster)


def load_quotas(path: str | os.PathLike[str]) -> Quotas:
    """Read the quotas of many models from a TOML file.

    The file has a table ``[models."<id>"]`` for each model, with the fields of `ResourceQuotaConfig` in its units, and
    a table ``[defaults."<pattern>"]``, such as ``[defaults."user:*"]``, for all ids that begin with it and have
    no table of their own. A field that is missing from such a table is taken from ``[defaults]``, or else from
    `ResourceQuotaConfig`. The string ``"unlimited"`` means None. An id that contains a dot must be quoted. The tables
    ``[http]`` and ``[keys]`` are for servers, ``[cluster]`` for those that share limits with other hosts.

    Parameters
    ----------
    path : str or os.PathLike
        The file, in UTF-8, with or without a byte order mark.

    Returns
    -------
    Quotas
        A dict by model id, in the order of the file, empty if the file names no model. Its `patterns` is a dict of the
        file's patterns, for a manager's `default_quota`; `http`, `key_names` and `cluster` are for servers.

    Raises
    ------
    QuotaFileError
        The file is not TOML, or something in it is not accepted; the error names file, line, table, field and value.
    OSError
        The file cannot be opened or read.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = pathlib.Path(folder, "quotas.toml")
    ...     _ = file.write_text('''
    ... [defaults]
    ... max_ram_mb = 512
    ... [models."llama-3.2-1b"]
    ... max_tokens_per_hour = "unlimited"
    ... [defaults."user:*"]
    ... ''')
    ...     quotas = load_quotas(file)
    >>> quotas["llama-3.2-1b"] == ResourceQuotaConfig("llama-3.2-1b", max_ram_mb=512, max_tokens_per_hour=None)
    True
    >>> quotas.patterns["user:*"].max_ram_mb
    512
    """
    name = os.fspath(path)
    text = _read(name)
    try:
        return _quotas(name, _parse(name, text))
    except QuotaFileError as error:
        raise _with_line(error, text) from None


def _quotas(name: str, document: dict[str, Any]) -> Quotas:
    for key, value in document.items():
        if key not in ("defaults", "models", "http", "keys", "cluster"):
            where = (key, "") if isinstance(value, dict) else ("", key)
            raise QuotaFileError(name, *where, value, _TABLES)
    everything = _table(name, "", "defaults", document.get("defaults", {}))
    patterns = {
        key: _pattern(name, key, value)
        for key, value in everything.items()
        if "*" in key or (isinstance(value, dict) and key not in ResourceQuotaConfig.__dataclass_fields__)
    }
    defaults = {field: value for field, value in everything.items() if field not in patterns}
    # Validated separately, so that an error in it is not reported against the first model that inherits it.
    _config(name, "defaults", "defaults", defaults)
    return Quotas(
        {
            model_id: _config(
                name, f'models."{model_id}"', model_id, _table(name, "models", model_id, fields), defaults
            )
            for model_id, fields in _table(name, "", "models", document.get("models", {})).items()
        },
        {
            pattern: _config(name, f'defaults."{pattern}"', pattern, fields, defaults)
            for pattern, fields in patterns.items()
        },
        *_for_servers(name, document),
    )


def _for_servers(name: str, document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str], dict[str, Any] | None]:
    """Return what the tables ``[http]``, ``[keys]`` and ``[cluster]`` say; empty, and None, if the file has none."""
    tables = {}
    for key in ("http", "keys", "cluster"):
        tables[key] = document.get(key, {})
        if not isinstance(tables[key], dict):
            raise QuotaFileError(name, "", key, tables[key], f"a table [{key}]")
    if not any(tables.values()):
        return {}, {}, document.get("cluster")
    from modelquota.quota.cluster import check_cluster
    from modelquota.quota.http import check_http, check_keys  # most files are about limits only

    table = "http"
    try:
        check_http(tables[table])
        table = "keys"
        key_names = check_keys(tables[table])
        table = "cluster"
        check_cluster(tables[table])
        return tables["http"], key_names, document.get("cluster")
    except QuotaConfigError as error:
        raise QuotaFileError(name, table, error.field, error.value, error.accepted) from None


def _pattern(name: str, pattern: str, value: Any) -> dict[str, Any]:
    """Return the table of a pattern; raises if its name is a plain id, which belongs under [models]."""
    fields = _table(name, "defaults", pattern, value)
    try:
        fits = pattern_of(pattern).partition("#")[0].endswith("*")
    except QuotaConfigError:
        fits = False
    if not fits:
        raise QuotaFileError(name, f'defaults."{pattern}"', "", fields, _PATTERN)
    return fields


def _read(name: str) -> str:
    with open(name, "rb") as file:
        try:
            # Some editors put a byte order mark at the beginning of a file.
            return file.read().decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise QuotaFileError(name, "", "", str(error), "TOML in UTF-8") from None


def _parse(name: str, text: str) -> dict[str, Any]:
    import tomllib  # only when a file is read

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuotaFileError(name, "", "", str(error), "TOML in UTF-8") from None


def _with_line(error: QuotaFileError, text: str) -> QuotaFileError:
    """Return the error with the line that it is about; if the key is missing, the line of its table."""
    from modelquota.quota.cluster import shown
    from modelquota.quota.tomlline import find_line

    parent, dot, model = error.table.partition(".")
    keys = [parent, model[1:-1], error.field] if dot else [key for key in (error.table, error.field) if key]
    line = find_line(text, keys) or find_line(text, keys[:-1]) if keys else None
    # What is there instead of a hash may be the API key itself, which belongs in no log.
    field = "..." if error.table == "keys" else shown(error.field)
    return QuotaFileError(error.path, error.table, field, shown(error.value), error.accepted, line)


def _table(name: str, parent: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise QuotaFileError(name, parent, key, value, "a table of quota fields")
    return value


def _config(
    name: str, table: str, model_id: str, fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> ResourceQuotaConfig:
    """Make the config of one table; `defaults` were validated before, so an error is in `fields`."""
    for field, value in fields.items():
        if field == "model_id":
            raise QuotaFileError(name, table, field, value, "no model_id: the name of a table under [models] is the id")
        if isinstance(value, dict):
            raise QuotaFileError(
                name, table, field, value, 'no table here; quote an id that has a dot: [models."llama-3.2-1b"]'
            )
    merged = {**(defaults or {}), **fields}
    try:
        return ResourceQuotaConfig.from_dict(
            {"model_id": model_id} | {field: None if value == _UNLIMITED else value for field, value in merged.items()}
        )
    except QuotaConfigError as error:
        given = model_id if error.field == "model_id" else merged[error.field]
        raise QuotaFileError(name, table, error.field, given, error.accepted) from None
