"""Has it become slower? ``python -m benchmarks.compare BASELINE.json NEW.json [NEW.json ...]`` judges runs by another.

All are what ``pytest benchmarks --benchmark-json=FILE`` wrote. What is judged is the ratio of a figure to its floor,
both measured in the same run in turn: figures of two runs differ by tens of percent on a shared machine, such ratios by
a few. Of several new runs the best ratio of each case counts: what is slower is slower in all of them, and what a
neighbour on the machine has spoilt is not. Figures without a floor are shown and not judged.

Exit status: 0 where no ratio is worse by more than the threshold; 1 where one is; 2 where that cannot be said: a file
that is not readable or holds nothing to judge, or a judged case of the baseline that the new run lacks (unless
``--partial``).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import table
from benchmarks.harness.results import Row, amount, rows_of

THRESHOLD = 0.15
HEADINGS = ("question", "case", "baseline", "new", "ratio before", "ratio now", "change", "verdict")


class UnusableError(ValueError):
    """The input cannot be judged; the message names the file and says why."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A case in both runs; `new` is None where the new run lacks it, `old` where the baseline does."""

    old: Row | None
    new: Row | None

    @property
    def judged(self) -> bool:
        return all(row is not None and row.judged and row.ratio is not None for row in (self.old, self.new))

    @property
    def change(self) -> float | None:
        """By how much the ratio has grown, or the figure where there is none: 0.25 by a quarter; None: not known."""
        if self.old is None or self.new is None:
            return None
        if self.old.ratio is not None and self.new.ratio is not None:
            return self.new.ratio / self.old.ratio - 1
        return self.new.figure / self.old.figure - 1 if self.old.figure else None

    def verdict(self, threshold: float) -> str:
        if self.new is None:
            return "gone"
        if self.old is None:
            return "new"
        if not self.judged:
            return "-"
        return "WORSE" if self.change > threshold else "better" if self.change < -threshold else "as before"


def read_run(path: Path) -> tuple[list[Row], dict[str, str]]:
    """Read the rows of a run, and what it ran on.

    Raises
    ------
    UnusableError
        Where the file cannot be read, is no results file of these benchmarks, or holds no row.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        rows = rows_of(results)
    except (OSError, ValueError) as error:
        raise UnusableError(f"{path}: {error}") from None
    if not rows:
        raise UnusableError(f"{path}: no figures; write it with: pytest benchmarks --benchmark-json={path}")
    return rows, _surroundings(results.get("machine_info") or {})


def _surroundings(machine: dict[str, Any]) -> dict[str, str]:
    known = {name: str(machine.get(name)) for name in ("python_version", "numpy", "cython", "compiler")}
    return {"processor": str(machine.get("cpu", {}).get("brand_raw")), **known}


def best_of(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """Return each case once, from the run in which its ratio, or failing that its figure, is the least."""
    best: dict[tuple[str, str], Row] = {}
    for row in (row for run in runs for row in run):
        known = best.get(row.key)
        if known is None or _weight(row) < _weight(known):
            best[row.key] = row
    return list(best.values())


def _weight(row: Row) -> float:
    return row.figure if row.ratio is None else row.ratio


def compare(baseline: Sequence[Row], new: Sequence[Row]) -> list[Comparison]:
    """Pair the rows of two runs by question and case, in the order of the baseline, new cases last."""
    new_rows = {row.key: row for row in new}
    old_keys = {row.key for row in baseline}
    return [
        *(Comparison(row, new_rows.get(row.key)) for row in baseline),
        *(Comparison(None, row) for row in new if row.key not in old_keys),
    ]


def judge(comparisons: Sequence[Comparison], threshold: float, *, partial: bool = False) -> bool:
    """Return whether no judged ratio is worse by more than `threshold`, 0.15 being 15 %.

    Raises
    ------
    UnusableError
        Where nothing can be judged, or, unless `partial`, a judged case is gone.
    """
    if not any(each.judged for each in comparisons):
        raise UnusableError("no ratio to a floor in both runs; floors need: pip install 'modelquota[bench]'")
    gone = [each.old for each in comparisons if each.old is not None and each.old.judged and not each.judged]
    if gone and not partial:
        names = "; ".join(f"{row.question}, {row.case}" for row in gone)
        raise UnusableError(f"the new run has no ratio of: {names} (--partial judges what it has)")
    return not any(each.judged and each.change > threshold for each in comparisons)


def render(comparisons: Sequence[Comparison], threshold: float, *, colour: bool = False, width: int = 0) -> str:
    """Return the comparison as a table."""
    return table.draw(HEADINGS, [_cells(each, threshold) for each in comparisons], colour=colour, width=width)


def _cells(each: Comparison, threshold: float) -> tuple[str, ...]:
    question, case = (each.old or each.new).key
    figures = ["" if row is None else amount(row.figure, row.unit) for row in (each.old, each.new)]
    ratios = ["" if row is None or row.ratio is None else f"{row.ratio:.3g}" for row in (each.old, each.new)]
    change = "" if each.change is None else f"{each.change:+.1%}"
    return (question, case, *figures, *ratios, change, each.verdict(threshold))


def _threshold(text: str) -> float:
    value = float(text)
    if not 0 < value < 10:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and below 10; 0.15 is 15 %")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare as the command line says, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("baseline", type=Path, metavar="BASELINE.json")
    parser.add_argument("new", type=Path, nargs="+", metavar="NEW.json")
    parser.add_argument(
        "--threshold", type=_threshold, default=THRESHOLD, help="the worst change to let pass (default: %(default)s)"
    )
    parser.add_argument("--partial", action="store_true", help="the new run has only some of the cases")
    options = parser.parse_args(arguments)
    try:
        baseline, before = read_run(options.baseline)
        runs = [read_run(path) for path in options.new]
        comparisons = compare(baseline, best_of([rows for rows, _ in runs]))
        passed = judge(comparisons, options.threshold, partial=options.partial)
    except UnusableError as error:
        print(error, file=sys.stderr)
        return 2
    print(render(comparisons, options.threshold, colour=sys.stdout.isatty()))
    for name, value in before.items():
        for other in {now[name] for _, now in runs} - {value}:
            print(f"Another {name}: {value} before, {other} now. Ratios of such runs are no fair comparison.")
    judged = [each.change for each in comparisons if each.judged]
    print(f"{len(judged)} ratios judged, the worst changed by {max(judged):+.1%}; {options.threshold:.0%} is let pass.")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
