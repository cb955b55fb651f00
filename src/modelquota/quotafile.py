"""Quotas of many models from one TOML file.

    [defaults]
    on_violation = "reject"
    max_tokens_per_day = "unlimited"

    [models."llama-3.2-1b"]
    max_ram_mb = 1024

Fields and units are those of `ResourceQuotaConfig`.
"""

import os
from collections.abc import Mapping
from typing import Any

from .config import ResourceQuotaConfig
from .errors import QuotaConfigError, QuotaFileError

_UNLIMITED = "unlimited"


def load_quotas(path: str | os.PathLike[str]) -> dict[str, ResourceQuotaConfig]:
    """Read the quotas of many models from a TOML file.

    The file has a table ``[models."<id>"]`` for each model, with the fields of `ResourceQuotaConfig` in its units.
    A field that is missing there is taken from the table ``[defaults]``, and failing that from `ResourceQuotaConfig`.
    The string ``"unlimited"`` stands for None. An id that has a dot in it needs its quotation marks.

    Parameters
    ----------
    path : str or os.PathLike
        The file, in UTF-8.

    Returns
    -------
    dict of str to ResourceQuotaConfig
        By model id, in the order of the file; empty where the file names no model.

    Raises
    ------
    QuotaFileError
        The file is not TOML, or something in it is not accepted: the error has file, line, table, field and value.
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
    ... ''')
    ...     quotas = load_quotas(file)
    >>> quotas["llama-3.2-1b"] == ResourceQuotaConfig("llama-3.2-1b", max_ram_mb=512, max_tokens_per_hour=None)
    True
    """
    name = os.fspath(path)
    text = _read(name)
    try:
        return _quotas(name, _parse(name, text))
    except QuotaFileError as error:
        raise _with_line(error, text) from None


def _quotas(name: str, document: dict[str, Any]) -> dict[str, ResourceQuotaConfig]:
    for key, value in document.items():
        if key not in ("defaults", "models"):
            where = (key, "") if isinstance(value, dict) else ("", key)
            raise QuotaFileError(name, *where, value, 'the tables [defaults] and [models."<id>"] and nothing else')
    defaults = _table(name, "", "defaults", document.get("defaults", {}))
    # Judged by itself, so that an error in it is not reported against the first model that inherits it.
    _config(name, "defaults", "defaults", defaults)
    return {
        model_id: _config(name, f'models."{model_id}"', model_id, _table(name, "models", model_id, fields), defaults)
        for model_id, fields in _table(name, "", "models", document.get("models", {})).items()
    }


def _read(name: str) -> str:
    with open(name, "rb") as file:
        try:
            return file.read().decode().replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise QuotaFileError(name, "", "", str(error), "TOML in UTF-8") from None


def _parse(name: str, text: str) -> dict[str, Any]:
    import tomllib  # only where a file is read

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuotaFileError(name, "", "", str(error), "TOML in UTF-8") from None


def _with_line(error: QuotaFileError, text: str) -> QuotaFileError:
    """Say on which line stands what the error is about; of a key that is not there, on which its table."""
    from modelquota._tomlline import find_line

    parent, dot, model = error.table.partition(".")
    keys = [parent, model[1:-1], error.field] if dot else [key for key in (error.table, error.field) if key]
    line = find_line(text, keys) or find_line(text, keys[:-1]) if keys else None
    return QuotaFileError(error.path, error.table, error.field, error.value, error.accepted, line)


def _table(name: str, parent: str, key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise QuotaFileError(name, parent, key, value, "a table of quota fields")
    return value


def _config(
    name: str, table: str, model_id: str, fields: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> ResourceQuotaConfig:
    """Make the config of one table; `defaults` have been judged before, so what is wrong stands in `fields`."""
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
