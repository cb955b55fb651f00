"""Draw benchmark figures as one picture: ``python -m benchmarks.drawing.plot RESULTS.json OUT.svg``.

RESULTS.json is a list of bars, drawn from top to bottom in the order given::

    [{"group": "modelquota", "label": "check_quota, 1 model", "ns": 61.5, "kind": "ours"}, ...]

``group``
    Heading under which the bar stands; bars of one group need not be adjacent.
``label``
    Name of the bar.
``ns``
    Nanoseconds per check, above 0.
``kind``
    Its colour: one of ``ours``, ``floor``, ``native``, ``peer-one``, ``peer-six``.

`benchmarks.peers.bars` and `native_bars` give the bars of the peers and of the native original. The scale is
logarithmic. The background is transparent, and every colour can be read on white and on near-black. matplotlib comes
with the extra ``bench``; the suffix of OUT chooses the format (.svg, .png, .pdf).
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

# Each has a contrast of at least 3 to white and to GitHub's dark background (#0d1117), the text of at least 4.
COLOURS = {
    "ours": "#2f81f7",
    "floor": "#7d858f",
    "native": "#d1702b",
    "peer-one": "#a66bea",
    "peer-six": "#7f56c9",
}
TEXT = "#747c85"
BAR_INCHES = 0.27
WIDTH_INCHES = 9.0
GAP = 0.5  # between groups, in bars


class BarsError(ValueError):
    """The input is not a list of bars; the message names the bar, the field and what is accepted."""


def read_bars(path: Path) -> list[dict]:
    """Read and validate a list of bars.

    Raises
    ------
    BarsError
        Where it is not JSON, not a list with at least one bar, or a bar lacks a field or has a bad value.
    """
    try:
        bars = json.loads(path.read_text())
    except ValueError as error:
        raise BarsError(f"{path}: not JSON: {error}") from None
    if not isinstance(bars, list) or not bars:
        raise BarsError(f"{path}: a list with at least one bar is expected")
    for i, bar in enumerate(bars):
        if not isinstance(bar, dict):
            raise BarsError(f"{path}: bar {i} is {bar!r}; an object with group, label, ns and kind is expected")
        for field in ("group", "label"):
            if not isinstance(bar.get(field), str):
                raise BarsError(f"{path}: bar {i}: {field} is {bar.get(field)!r}; text is expected")
        if bar.get("kind") not in COLOURS:
            raise BarsError(f"{path}: bar {i}: kind is {bar.get('kind')!r}; one of {', '.join(COLOURS)} is expected")
        ns = bar.get("ns")
        if isinstance(ns, bool) or not isinstance(ns, int | float) or not 0 < ns < math.inf:
            raise BarsError(f"{path}: bar {i}: ns is {ns!r}; a number above 0 is expected")
    return bars


def native_bars(figures: dict) -> list[dict]:
    """Return a bar for each figure of `benchmarks.native.measure`; of two threads, the median."""
    bars = []
    for check in figures["checks"]:
        models, threads = check["models"], check["threads"]
        label = f"{models:,} model{'s' * (models > 1)}, {threads} thread{'s' * (threads > 1)}"
        ns = check["ns"] if threads == 1 else check["median_ns"]
        bars.append({"group": "The original design in Zig, native caller", "label": label, "ns": ns, "kind": "native"})
    return bars


def draw(bars: Sequence[dict], path: Path) -> None:
    """Draw valid bars into the file `path`."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    groups: dict[str, list[dict]] = {}
    for bar in bars:
        groups.setdefault(bar["group"], []).append(bar)
    line_count = len(bars) + len(groups) + GAP * (len(groups) - 1)

    # Text as outlines looks the same everywhere; the salt and the missing date make equal input give an equal file.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "modelquota", "font.size": 10}):
        figure = Figure(figsize=(WIDTH_INCHES, BAR_INCHES * line_count + 0.8), layout="constrained")
        axes = figure.subplots()
        low_ns = 10 ** math.floor(math.log10(min(bar["ns"] for bar in bars) / 1.5))
        high_ns = max(bar["ns"] for bar in bars)
        axes.set_xscale("log")
        axes.set_xlim(low_ns, high_ns * (high_ns / low_ns) ** 0.12)
        axes.set_ylim(line_count - 0.3, -0.7)

        line = 0.0
        labels: dict[float, str] = {}
        for group, members in groups.items():
            heading = {"xy": (0, line), "xycoords": ("axes fraction", "data"), "va": "center"}
            axes.annotate(group, color=TEXT, weight="bold", **heading)
            for bar in members:
                line += 1
                labels[line] = bar["label"]
                axes.barh(line, bar["ns"] - low_ns, left=low_ns, height=0.72, color=COLOURS[bar["kind"]], zorder=2)
                end = {"xy": (bar["ns"], line), "xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                weight = "bold" if bar["kind"] == "ours" else "normal"
                axes.annotate(_duration(bar["ns"]), color=TEXT, weight=weight, **end)
            line += 1 + GAP

        axes.set_yticks(list(labels), labels.values())
        axes.xaxis.set_major_locator(LogLocator(numticks=20))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: _duration(ns)))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("time per check, logarithmic scale", color=TEXT)
        axes.grid(axis="x", color=TEXT, alpha=0.2, linewidth=0.6, zorder=0)
        axes.tick_params(which="both", length=0, colors=TEXT)
        axes.spines[:].set_visible(False)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, dpi=160, metadata=metadata)


def _duration(ns: float) -> str:
    for unit_ns, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
        if ns >= 0.9995 * unit_ns:
            return f"{ns / unit_ns:.3g} {unit}"
    return f"{ns:.3g} ns"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drawing.plot", description="Draw benchmark figures.")
    parser.add_argument("results", type=Path, metavar="RESULTS.json")
    parser.add_argument("out", type=Path, metavar="OUT.svg")
    options = parser.parse_args()
    try:
        draw(read_bars(options.results), options.out)
    except ImportError as error:
        sys.exit(f"{error}; pip install 'modelquota[bench]'")
    except (BarsError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
