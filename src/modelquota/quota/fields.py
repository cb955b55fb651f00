"""How the fields of ``[http]`` and ``[cluster]`` of a quota file are described: name, meaning, values, schema."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from modelquota.errors import QuotaConfigError
from modelquota.quota.config import MAX_COUNT

__all__ = ["FileField", "check_fields", "choice", "count", "flag", "number", "text"]


class FileField(NamedTuple):
    """One field of ``[http]`` or ``[cluster]``.

    Attributes
    ----------
    name : str
        Its name in the file.
    meaning : str
        One sentence, for editors.
    accepted : str
        What is accepted, for error messages.
    accepts : callable
        Whether a value is accepted.
    schema : dict
        The same as JSON Schema.
    """

    name: str
    meaning: str
    accepted: str
    accepts: Callable[[Any], bool]
    schema: dict[str, Any]


def choice(name: str, meaning: str, *choices: str) -> FileField:
    """Make a field that is one of some texts."""
    accepted = " or ".join([", ".join(f'"{choice}"' for choice in choices[:-1]), f'"{choices[-1]}"'])
    return FileField(name, meaning, accepted, lambda value: value in choices, {"enum": list(choices)})


def flag(name: str, meaning: str) -> FileField:
    """Make a field that is true or false."""
    return FileField(name, meaning, "true or false", lambda value: type(value) is bool, {"type": "boolean"})


def count(name: str, meaning: str, unit: str, least: int = 0) -> FileField:
    """Make a field that is an integer, `least` or more."""
    return FileField(
        name,
        meaning,
        f"an integer from {least} to 2**62 {unit}",
        lambda value: type(value) is int and least <= value <= MAX_COUNT,
        {"type": "integer", "minimum": least, "maximum": MAX_COUNT},
    )


def number(name: str, meaning: str, least: float, most: float, unit: str) -> FileField:
    """Make a field that is a number, `least` to `most`."""
    return FileField(
        name,
        meaning,
        f"a number from {least:g} to {most:g}{unit}",
        lambda value: type(value) in (int, float) and least <= value <= most,
        {"type": "number", "minimum": least, "maximum": most},
    )


def text(name: str, meaning: str, accepted: str, pattern: str) -> FileField:
    """Make a field that is a text of a pattern."""
    matches = re.compile(pattern).fullmatch
    return FileField(
        name,
        meaning,
        accepted,
        lambda value: isinstance(value, str) and matches(value) is not None,
        {"type": "string", "pattern": pattern},
    )


def check_fields(table: str, known: Mapping[str, FileField], fields: Mapping[str, Any]) -> None:
    """Raise QuotaConfigError for the first of `fields` that is not one of the table, or whose value is not accepted."""
    for name, value in fields.items():
        field = known.get(name)
        if field is None:
            raise QuotaConfigError(name, value, f"a field of [{table}], one of {', '.join(known)}")
        if not field.accepts(value):
            raise QuotaConfigError(name, value, field.accepted)
