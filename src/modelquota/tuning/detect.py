"""Which format a trace has: found by the names of its columns, or said by the caller, and never guessed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from modelquota.tuning.formats import FORMATS, Format
from modelquota.tuning.table import Table

__all__ = ["BadLine", "Choice", "expected_columns", "table_for"]

NAMED_IN_ERROR = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """What the caller has said about the file."""

    format: Format | None
    time_unit: str | None
    columns: dict[str, str]


class BadLine(Exception):
    """A line of the file is not as expected."""

    def __init__(self, line: int, column: str | None, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.column = column
        self.message = message


def table_for(container: str, names: list[str], line: int, choice: Choice) -> tuple[Table, tuple[str, ...]]:
    """Choose the format and the columns of a file that has columns of these names."""
    lower = [name.lower() for name in names]
    format = choice.format
    if format is not None and format.container != container:
        raise BadLine(line, None, f"the file is {container}, and {format.title} is not")
    if format is None:
        format = _recognized(container, lower, choice)
    if format is None:
        if {"time"} < choice.columns.keys() & {"time", "prompt", "output"}:
            format = Format("custom", container, container, {}, ("time",))
        else:
            raise _unknown(container, names, line, choice)
    chosen = {**format.columns, **choice.columns}
    found = {}
    for role, column in chosen.items():
        if column.lower() in lower:
            if container == "CSV" and lower.count(column.lower()) > 1:
                raise BadLine(line, column, "this column is in the header twice")
            found[role] = names[lower.index(column.lower())] if container == "CSV" else column
        elif role in choice.columns or (container == "CSV" and role in format.required):
            where = "the header" if container == "CSV" else "the first record"
            raise BadLine(line, column, f"this column is missing from {where}; it has {_listed(names)}")
        elif container == "JSONL":
            found[role] = column  # later records may have it
    unit = choice.time_unit or ("timestamp" if "time" in choice.columns else format.time_unit)
    used = {column.lower() for column in (*found.values(), *format.unused)}
    return Table(format, found, unit), tuple(name for name in names if name.lower() not in used)


def _recognized(container: str, lower: list[str], choice: Choice) -> Format | None:
    """Return the only format that fits, the one with a mark if others have none; None if none fits."""
    known = [format for format in FORMATS.values() if format.container == container]
    fitting = [format for format in known if format.fits(lower)]
    if not fitting:  # unless every column is said, and none is left to recognize it by
        fitting = [
            format
            for format in known
            if set(format.required) - choice.columns.keys()
            and replace(format, columns={**format.columns, **choice.columns}).fits(lower)
        ]
    fitting = [format for format in fitting if format.marks] or fitting
    return fitting[0] if len(fitting) == 1 else None


def _unknown(container: str, names: list[str], line: int, choice: Choice) -> BadLine:
    """Say what is missing for the format that is nearest, or what could be read at all."""
    lower = [name.lower() for name in names]
    known = [format for format in FORMATS.values() if format.container == container]
    fitting = [format.name for format in known if format.fits(lower)]
    if len(fitting) > 1:
        return BadLine(line, None, f"the columns fit {' and '.join(fitting)}; say which with --format")
    nearest = max(known, key=lambda format: sum(c.lower() in lower for c in format.required_columns()))
    missing = [column for column in nearest.required_columns() if column.lower() not in lower]
    if len(missing) < len(nearest.required_columns()) and len(missing) == 1:
        what = "the header" if container == "CSV" else "the first record"
        return BadLine(line, missing[0], f"this column is missing from {what}; expected {expected_columns(container)}")
    return BadLine(
        line,
        None,
        f"columns {_listed(names)} are of no known format; expected {expected_columns(container)}, "
        "or say with --map which columns are time, prompt and output",
    )


def expected_columns(container: str) -> str:
    """Return the columns that the formats of a container need, for an error."""
    formats = [format for format in FORMATS.values() if format.container == container]
    separated = ", separated by commas" if container == "CSV" else ""
    return " or ".join(f"{','.join(f.required_columns())} ({f.name})" for f in formats) + separated


def _listed(names: Sequence[str]) -> str:
    listed = ", ".join(repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:NAMED_IN_ERROR])
    return listed + (f" and {len(names) - NAMED_IN_ERROR} more" if len(names) > NAMED_IN_ERROR else "")
