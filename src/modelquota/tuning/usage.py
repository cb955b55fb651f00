"""Sums over ledgers: who used how much of what, by whom or when."""

import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from modelquota.errors import TraceError
from modelquota.tuning.cells import shown
from modelquota.tuning.formats.ledger import ids_of, tokens_of
from modelquota.tuning.jsonlines import parse_block
from modelquota.tuning.source import Progress, blocks, name_of

__all__ = ["KEYS", "Usage", "UsageReport", "read_usage"]


def _moment(form: str) -> Callable[[Mapping[str, Any]], str]:
    @functools.lru_cache(maxsize=64)
    def of_hour(hour: int) -> str:
        return time.strftime(form, time.gmtime(hour * 3_600))

    return lambda record: of_hour(record["time_us"] // 3_600_000_000)


KEYS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "model": lambda record: ids_of(record)[-1],
    "user": lambda record: ids_of(record)[-2] if len(record["ids"]) > 1 else "",
    "tenant": lambda record: ids_of(record)[0] if len(record["ids"]) > 1 else "",
    "verdict": lambda record: str(record.get("verdict") or ""),
    "limit": lambda record: str(record.get("limit") or ""),
    **{unit: _moment(form) for form, unit in map(str.split, ("%Y-%m month", "%Y-%m-%d day", "%Y-%m-%dT%H hour"))},
}
"""What usage can be summed by. The model is the last id, the user the one before it, the tenant the first of several;
hours, days and months are UTC."""


@dataclass(slots=True)
class Usage:
    """What some requests used.

    Attributes
    ----------
    requests, admitted, denied : int
    input, cached, output : int
        Tokens of the requests that were admitted, if the ledger has the kinds apart.
    tokens : int
        Of all kinds, and of requests whose kinds are not apart.
    waited_us, duration_us : int
        In total.
    """

    requests: int = 0
    admitted: int = 0
    denied: int = 0
    input: int = 0
    cached: int = 0
    output: int = 0
    tokens: int = 0
    waited_us: int = 0
    duration_us: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Add a request of a ledger."""
        self.requests += 1
        self.waited_us += record.get("waited_us") or 0
        if record.get("verdict") == "denied":
            self.denied += 1
            return
        self.admitted += 1
        self.duration_us += record.get("duration_us") or 0
        settled = record.get("settled")
        tokens = record["estimated"] if settled is None else settled
        given, cached, output = tokens_of(tokens)
        self.tokens += given + cached + output
        if type(tokens) is not int:
            self.input += given
            self.cached += cached
            self.output += output

    def to_dict(self) -> dict[str, int]:
        """All fields as plain JSON values."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class UsageReport:
    """The sums over one or several ledgers.

    Attributes
    ----------
    by : tuple of str
        The keys, of `KEYS`.
    groups : dict of tuple of str to Usage
        In the order of their keys.
    total : Usage
    lost : int
        Requests that the ledgers report as lost.
    torn : int
        Lines that were cut off when their writer was killed.
    killed : int
        Processes that wrote and did not end in order, as far as their last line tells; a process that still writes is
        one of them.
    """

    by: tuple[str, ...]
    groups: dict[tuple[str, ...], Usage]
    total: Usage = field(default_factory=Usage)
    lost: int = 0
    torn: int = 0
    killed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        groups = [dict(zip(self.by, key, strict=True)) | usage.to_dict() for key, usage in self.groups.items()]
        return {
            "by": list(self.by),
            "groups": groups,
            "total": self.total.to_dict(),
            "lost": self.lost,
            "torn": self.torn,
            "killed": self.killed,
        }


def read_usage(
    paths: Sequence[str | os.PathLike[str]], by: Sequence[str] = ("model",), *, progress: Progress | None = None
) -> UsageReport:
    """Sum ledgers; memory is taken for the groups only.

    Parameters
    ----------
    paths : sequence of str or path-like
        Files, maybe compressed with gzip, or ``-`` for standard input.
    by : sequence of str
        Keys of `KEYS`.
    progress : callable, optional
        As for `read_trace`.

    Raises
    ------
    TraceError
        A file is not a ledger; the error names file and line.
    ValueError
        A key does not exist.
    OSError
        A file cannot be read.
    """
    for key in by:
        if key not in KEYS:
            raise ValueError(f"usage is summed by {key!r}; expected one of {', '.join(KEYS)}")
    keys = [KEYS[key] for key in by]
    groups: dict[tuple[str, ...], Usage] = {}
    lost = torn = 0
    open_sessions: dict[Any, int] = {}
    for path in paths:
        name = name_of(path)
        line = 0
        for block in blocks(path, progress):
            for text in block.splitlines():
                line += 1
                if not text.strip():
                    continue
                record = _record(name, line, text)
                if record is None:
                    torn += 1
                elif "ids" in record:
                    try:
                        found = tuple([key(record) for key in keys])
                        usage = groups.get(found)
                        if usage is None:
                            usage = groups[found] = Usage()
                        usage.add(record)
                    except (KeyError, TypeError, ValueError, IndexError) as error:
                        raise TraceError(f"not a request of a ledger ({error!r})", path=name, line=line) from None
                elif "lost" in record and "time_us" in record:
                    lost += record["lost"]
                elif "ledger" in record:
                    if "started_us" not in record:
                        continue  # the session of another file, which goes on
                    open_sessions[record.get("pid")] = open_sessions.get(record.get("pid"), 0) + 1
                elif "ended_us" in record:
                    open_sessions[record.get("pid")] = open_sessions.get(record.get("pid"), 0) - 1
                else:
                    raise TraceError(
                        f"not a line of a ledger: {shown(text.decode('utf-8', 'replace'))}", path=name, line=line
                    )
    total = Usage()
    for usage in groups.values():
        for name in Usage.__slots__:
            setattr(total, name, getattr(total, name) + getattr(usage, name))
    return UsageReport(
        by=tuple(by),
        groups=dict(sorted(groups.items())),
        total=total,
        lost=lost,
        torn=torn,
        killed=sum(max(count, 0) for count in open_sessions.values()),
    )


def _parsed(text: bytes) -> Any:
    """Parse a line; what orjson refuses and the standard library takes, such as a lone surrogate, is taken."""
    try:
        return parse_block(text)
    except ValueError:
        return json.loads(text)


def _record(name: str, line: int, text: bytes) -> dict[str, Any] | None:
    """Return what a line says; None if it was cut off."""
    try:
        record = _parsed(text)
    except (ValueError, RecursionError) as error:
        if not text.rstrip().endswith(b"}"):
            return None
        raise TraceError(f"not a JSON object ({error})", path=name, line=line) from None
    if not isinstance(record, dict):
        raise TraceError(f"expected a JSON object, found {shown(record)}", path=name, line=line)
    return record
