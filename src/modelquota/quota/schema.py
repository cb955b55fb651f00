"""The JSON Schema of quota files, for editors that complete and check TOML as it is typed.

The file ``quotas.schema.json`` ships inside the package, and is what `quota_file_schema` returns. It is written for
draft 4, which the editors' TOML servers follow. `load_quotas` is stricter in four points: it counts a model
id in bytes, the schema in characters; it does not accept NaN; a weight has at most 6 decimals; and ``renew_sec`` is at
most half of ``lease_sec``.
"""

import json
from importlib.resources import files
from typing import Any

__all__ = ["quota_file_schema"]


def quota_file_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 4) of the files that `load_quotas` reads.

    Examples
    --------
    >>> sorted(quota_file_schema()["properties"])
    ['cluster', 'defaults', 'http', 'keys', 'models']
    """
    text = files("modelquota.quota").joinpath("quotas.schema.json").read_text(encoding="utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema
