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
        The file is not TOML, or something in it is not accepted: the error has file, table, field and value.
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
    document = _parse(name)
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


def _parse(name: str) -> dict[str, Any]:
    import tomllib  # only where a file is read

    with open(name, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise QuotaFileError(name, "", "", str(error), "TOML in UTF-8") from None


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
