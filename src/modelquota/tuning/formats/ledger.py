"""Our own ledger, as `modelquota.monitoring.ledger` writes it: see there for what each key means."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any

from modelquota.tuning.formats.base import Format


def tokens_of(value: Any) -> tuple[int, int, int]:
    """Return what the ledger has for tokens as (input, cached, output); a plain count is input."""
    if type(value) is int:
        return value, 0, 0
    if type(value) is list and len(value) == 3:  # without a loop, since most of the time is spent here
        given, cached, output = value
        if type(given) is int and type(cached) is int and type(output) is int:
            return given, cached, output
    raise ValueError(value)


def ids_of(record: Mapping[str, Any]) -> list[str]:
    """Return the ids of a request; raises ValueError if they are not a list of text."""
    ids = record["ids"]
    if type(ids) is not list or set(map(type, ids)) != {str}:
        raise ValueError(ids)
    return ids


class _Requests(list[dict[str, Any]]):
    """The requests of a block; three columns come from their tokens, which are looked at once."""

    @cached_property
    def kinds(self) -> list[tuple[int, int, int]]:
        return [
            tokens_of(record["estimated"] if record.get("settled") is None else record["settled"]) for record in self
        ]


class Ledger(Format):
    """A request is what was asked for: what it used if it was admitted, otherwise what it would have reserved."""

    __slots__ = ()

    def fits(self, names: Collection[str]) -> bool:
        """Whether it begins with the line of a session, or with a request."""
        return "ledger" in names or super().fits(names)

    def requests(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave out the lines that are about the ledger itself."""
        return _Requests(record for record in records if "ids" in record)

    def values(self, role: str, records: Sequence[Any]) -> list[Any]:
        """Return the kinds of tokens apart, the model, which is the last id, and the user, which is the id before."""
        if role in ("prompt", "cached", "output"):
            kinds = (records if isinstance(records, _Requests) else _Requests(records)).kinds
            if role == "prompt":
                return [given + cached for given, cached, _ in kinds]
            return [parts[1 if role == "cached" else 2] for parts in kinds]
        if role == "estimated":
            return [sum(tokens_of(record["estimated"])) for record in records]
        if role == "model":
            return [ids_of(record)[-1] for record in records]
        if role == "user":
            return [ids_of(record)[-2] if len(record["ids"]) > 1 else None for record in records]
        return super().values(role, records)


LEDGER = Ledger(
    name="ledger",
    title="a modelquota ledger",
    container="JSONL",
    columns={
        "time": "time_us",
        "prompt": "estimated",
        "cached": "settled",
        "output": "settled",
        "estimated": "estimated",
        "model": "ids",
        "user": "ids",
        "duration": "duration_us",
        "priority": "priority",
    },
    required=("time", "prompt", "model"),
    time_unit="us",
    absolute=True,
    may_be_torn=True,
    unused=("ledger", "started_us", "pid", "settled", "verdict", "limit", "waited_us", "request_id"),
)
