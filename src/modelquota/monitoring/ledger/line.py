"""The line of a request in a ledger."""

import json
import operator
from collections.abc import Sequence
from typing import Any

__all__ = ["request_line"]

_FORM = (
    '{"time_us": %d, "ids": [%s], "estimated": %s, "settled": %s, "verdict": %s, "limit": %s, "waited_us": %d, '
    '"duration_us": %s}\n'
)


def request_line(record: tuple[Any, ...]) -> str:
    """The line of a request. Formatted by hand, since `json.dumps` of a dict takes three times as long."""
    time_us, ids, estimated, settled, verdict, limit, waited_us, duration_us, priority, request_id = record
    line = _FORM % (
        time_us,
        _KNOWN.get(ids) or _names(ids),
        estimated if type(estimated) is int else _tokens(estimated),
        settled if type(settled) is int else "null" if settled is None else _tokens(settled),
        _KNOWN.get(verdict) or _names(verdict),
        _KNOWN.get(limit) or _names(limit),
        waited_us,
        "null" if duration_us is None else int(duration_us),
    )
    if not priority and request_id is None:
        return line
    more = f', "priority": {int(priority)}' if priority else ""
    if request_id is not None:
        more += f', "request_id": {json.dumps(str(request_id))}'
    return f"{line[:-2]}{more}}}\n"


# Ids and limits come again and again: what they are in JSON.
_KNOWN: dict[Any, str] = {None: "null"}
_MOST_KNOWN = 4_096


def _names(names: str | Sequence[str]) -> str:
    """Return a string, or several with commas, as JSON."""
    several = (names,) if isinstance(names, str) else tuple(names)
    if not several or not all(isinstance(name, str) for name in several):
        raise TypeError(f"expected a str, or several, found {names!r:.100}")
    known = ", ".join(json.dumps(name) for name in several)
    if len(_KNOWN) >= _MOST_KNOWN:
        _KNOWN.clear()
        _KNOWN[None] = "null"
    _KNOWN[names if isinstance(names, str) else several] = known
    return known


def _tokens(tokens: Any) -> str:
    if hasattr(tokens, "output"):
        tokens = (tokens.input, tokens.cached, tokens.output)
    if isinstance(tokens, (tuple, list)):
        return "[%d, %d, %d]" % tuple(tokens)  # noqa: UP031 - an f-string is slower
    return str(operator.index(tokens))
