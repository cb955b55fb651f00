"""What a benchmark found out: one row of the table, and the targets that stand against it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

FLOOR = "floor"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on a row's figure, or on its ratio to what stands beside it.

    Attributes
    ----------
    bound : float
        In the unit of the row; a plain number for a ratio.
    of : str
        ``"figure"`` or ``"ratio"``.
    sense : str
        ``"at most"`` or ``"at least"``.
    """

    bound: float
    of: Literal["figure", "ratio"] = "figure"
    sense: Literal["at most", "at least"] = "at most"


def at_most(bound: float) -> Target:
    return Target(bound)


def at_least(bound: float) -> Target:
    return Target(bound, sense="at least")


def ratio_at_most(bound: float) -> Target:
    return Target(bound, of="ratio")


def ratio_at_least(bound: float) -> Target:
    return Target(bound, of="ratio", sense="at least")


@dataclass(frozen=True, slots=True)
class Row:
    """One figure and what it is measured against.

    Attributes
    ----------
    question, case : str
        Together they name the row.
    figure : float
        What was measured, in `unit`.
    unit : str
        ``"ns"`` (per operation), ``"B"``, ``"MB"``, ``"ms"`` or ``"×"``.
    beside : str
        What `beside_figure`, of the same unit and the same run, is the figure of; empty where there is none.
    targets : tuple of Target
    judged : bool
        Whether a later run is judged by this row's ratio: it is steady, and a fall of it means that the package has
        become slower.
    """

    question: str
    case: str
    figure: float
    unit: str = "ns"
    beside: str = ""
    beside_figure: float | None = None
    targets: tuple[Target, ...] = ()
    judged: bool = False

    @property
    def key(self) -> tuple[str, str]:
        return self.question, self.case

    @property
    def ratio(self) -> float | None:
        """The figure in multiples of what stands beside it."""
        return self.figure / self.beside_figure if self.beside_figure else None

    def meets(self, target: Target) -> bool:
        value = self.ratio if target.of == "ratio" else self.figure
        if value is None:
            raise ValueError(f"{self.question}, {self.case}: a target for a ratio, and nothing to take it from")
        return value >= target.bound if target.sense == "at least" else value <= target.bound

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the ratio and whether each target is met are spelled out for readers of it."""
        targets = [{**asdict(target), "met": self.meets(target)} for target in self.targets]
        return {**asdict(self), "targets": targets, "ratio": self.ratio}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Row":
        """Read what `to_dict` wrote; KeyError or TypeError for anything else."""
        targets = tuple(Target(each["bound"], each["of"], each["sense"]) for each in values["targets"])
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**{**fields, "targets": targets})


def rows_of(results: Mapping[str, Any]) -> list[Row]:
    """Return the rows in a file that ``pytest benchmarks --benchmark-json`` wrote.

    Raises
    ------
    ValueError
        Where it is no such file.
    """
    try:
        rows = [
            Row.from_dict(values)
            for benchmark in results["benchmarks"]
            for values in benchmark["extra_info"].get("rows", ())
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the results of these benchmarks ({type(error).__name__}: {error})") from None
    return rows


def render(rows: Iterable[Row]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and cells of the table of `rows`."""
    headings = ("question", "case", "figure", "beside it", "ratio", "target", "met")
    return headings, [_cells(row) for row in rows]


def amount(value: float, unit: str) -> str:
    """Return a figure with its unit, in three digits."""
    if unit == "×":
        return f"{value:.2f} ×"
    digits = 0 if value >= 100 or value == int(value) else 1 if value >= 10 else 2
    return f"{value:,.{digits}f} {unit}"


def _cells(row: Row) -> tuple[str, ...]:
    beside = "" if row.beside_figure is None else f"{amount(row.beside_figure, row.unit)} {row.beside}"
    ratio = "" if row.ratio is None else _multiple(row.ratio)
    targets = "; ".join(_bound(row, target) for target in row.targets)
    met = "; ".join(_verdict(row, target) for target in row.targets)
    return (row.question, row.case, amount(row.figure, row.unit), beside, ratio, targets, met)


def _multiple(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio > 0.2 else f"1/{1 / ratio:.0f}"


def _verdict(row: Row, target: Target) -> str:
    if row.meets(target):
        return "yes"
    # What not even the floor reaches was out of reach in this run, such as two processors where another job has one.
    of_floor = replace(row, figure=row.beside_figure) if row.beside == FLOOR and target.of == "figure" else None
    return "NO (nor the floor)" if of_floor and not of_floor.meets(target) else "NO"


def _bound(row: Row, target: Target) -> str:
    sign = "≥" if target.sense == "at least" else "≤"
    if target.of == "ratio":
        return f"{sign} {_multiple(target.bound)} × {row.beside}"
    return f"{sign} {amount(target.bound, row.unit)}"
