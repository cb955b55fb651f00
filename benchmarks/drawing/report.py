"""Everything in one run, and its pictures: ``python -m benchmarks [--json FILE] [--pictures DIRECTORY]``.

Runs ``pytest benchmarks`` and draws from what it has written: ``comparison.svg``, a check of this package beside its
floor, the original design as native code and the limiters written in Python; and ``growth.svg``, cost as models grow in
number. With ``--from FILE`` draws from a run that was saved.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.drawing import growth, plot
from benchmarks.harness.results import Row, rows_of
from benchmarks.harness.subprocesses import ROOT

RESULTS = ROOT / ".benchmarks" / "latest.json"
PICTURES = ROOT / "benchmarks" / "drawing" / "pictures"
OURS = "modelquota, every limit set, called from Python"
FLOORS = "Floors: the call, the look-up, the clock, the lock; nothing decided"


def bars(results: Mapping[str, Any]) -> list[dict]:
    """Return the bars of the comparison, from a run's results."""
    rows = {row.key: row for row in rows_of(results)}
    ours = [
        (("one check", 'check_quota("llama", estimated_tokens=100)'), "check_quota, 1 model"),
        (("many models", "1,000 models"), "check_quota, 1,000 models, random order"),
        (("one check", "handle: quota.check(100)"), "a bound handle's check"),
        (("batch", "check_many, 1,000 models, 10,000 at once, time runs"), "check_many, 1,000 models, each"),
    ]
    drawn = [_bar(OURS, label, rows[key]) for key, label in ours]
    drawn += [
        {"group": FLOORS, "label": label, "ns": rows[key].beside_figure, "kind": "floor"}
        for key, label in ours
        if rows[key].beside_figure is not None
    ]
    if (figures := _noted(results, "native")) is not None:
        drawn += plot.native_bars(figures)
    return drawn + peers.bars([peers.Row(**row) for row in _noted(results, "peers") or ()])


def _bar(group: str, label: str, row: Row) -> dict:
    return {"group": group, "label": label, "ns": row.figure, "kind": "ours"}


def _noted(results: Mapping[str, Any], name: str) -> Any:
    for benchmark in results["benchmarks"]:
        if name in benchmark["extra_info"]:
            return benchmark["extra_info"][name]
    return None


def draw(results: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draw both pictures into `directory` and return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    comparison, grown = directory / "comparison.svg", directory / "growth.svg"
    plot.draw(bars(results), comparison)
    growth.draw(_noted(results, "growth"), grown)
    return [comparison, grown]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and draw as the command line says; return pytest's exit status, or 2 where nothing can be drawn."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE", help="results go here")
    parser.add_argument("--from", type=Path, dest="saved", metavar="FILE", help="draw from these results, run nothing")
    parser.add_argument("--pictures", type=Path, default=PICTURES, metavar="DIRECTORY")
    options = parser.parse_args(arguments)
    path = options.saved or options.json.absolute()
    if options.saved is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pytest", "benchmarks", "-q", f"--benchmark-json={path}"]
        if status := subprocess.run(command, cwd=ROOT).returncode:
            return status
    try:
        drawn = draw(json.loads(path.read_text(encoding="utf-8")), options.pictures)
    except ImportError as error:
        print(f"{error}; pip install 'modelquota[bench]'", file=sys.stderr)
        return 2
    except (OSError, ValueError, KeyError) as error:
        print(f"{path}: nothing to draw from ({type(error).__name__}: {error})", file=sys.stderr)
        return 2
    for each in drawn:
        print(each)
    return 0
