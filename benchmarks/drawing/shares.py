"""Shares of four hosts over time, simulated: ``python -m benchmarks.drawing.shares OUT.svg``.

The hosts and the script are those of the package, in virtual time over a simulated store; needs the extras ``test`` and
``bench``. Four hosts share a limit per second. At first they want less than it; then one wants far more; then one dies,
whose share stays taken until its lease and its window have ended.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.drawing.plot import TEXT
from benchmarks.harness.hosts import BASE, Hosts, script_in_virtual_time
from benchmarks.harness.subprocesses import ROOT

LIMIT = 400
CALM, HOT = 20.0, 1_000.0  # requests a second of a host
LEASE_SEC = 10
HOT_SEC, DEATH_SEC, END_SEC = 5, 15, 40
STEP_SEC = 0.25
DYING = 3
COLOURS = ("#2f81f7", "#5a9df8", "#86b8fa", "#b2d3fc")
GHOST = "#d1702b"


def measure() -> list[dict[str, Any]]:
    """Return points: `sec`, the `shares` of the live hosts, and what the `ghost` of the dead one holds."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from lua_store import LuaServer

    server = LuaServer(script_in_virtual_time())
    quotas = {"llama": {"max_requests_per_second": LIMIT, "burst_requests": 0}}
    hosts = Hosts([CALM] * 4, quotas, server.evaluate, lease_sec=LEASE_SEC, tokens=1)
    hosts.advance(LEASE_SEC + 5)  # it has learned
    points = []
    sec = 0.0
    while sec < END_SEC:
        if sec >= HOT_SEC:
            hosts.demand[0] = HOT
        if sec >= DEATH_SEC:
            hosts.demand[DYING] = 0
        hosts.advance(STEP_SEC)
        sec = round(sec + STEP_SEC, 3)
        fields = server.data[f"{BASE}m:llama"]
        held = [json.loads(fields.get(f"n:{node.node_id}", "[0,0,0]"))[1:3] for node in hosts.nodes]
        taken = [max(pair) for pair in held]
        dead = sec > DEATH_SEC
        points.append(
            {
                "sec": sec,
                "shares": [0 if dead and place == DYING else share for place, share in enumerate(taken)],
                "ghost": taken[DYING] if dead else 0,
            }
        )
    return points


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Draw the points into the file `path`, whose suffix chooses the format (.svg, .png, .pdf)."""
    import matplotlib
    from matplotlib.figure import Figure

    seconds = [point["sec"] for point in points]
    stacks = [[point["shares"][place] for point in points] for place in (0, 1, 2, DYING)]
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "modelquota", "font.size": 10}):
        figure = Figure(figsize=(9.0, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.stackplot(
            seconds, *stacks, [point["ghost"] for point in points],
            labels=["share of the hot host", "of host 2", "of host 3", "of the host that dies", "its ghost"],
            colors=[*COLOURS, GHOST], step="post",
        )  # fmt: skip
        axes.axhline(LIMIT, color=TEXT, linewidth=1.5, label="the limit of all")
        for sec, label in ((HOT_SEC, "one host gets hot"), (DEATH_SEC, "one dies")):
            axes.axvline(sec, color=TEXT, linewidth=0.8, linestyle=":")
            axes.annotate(label, (sec, LIMIT), (4, 6), textcoords="offset points", color=TEXT)
        axes.set_xlim(seconds[0], seconds[-1])
        axes.set_ylim(0, LIMIT * 1.15)
        axes.set_xlabel("seconds", color=TEXT)
        axes.set_ylabel("requests per second", color=TEXT)
        axes.tick_params(which="both", length=0, colors=TEXT)
        axes.spines[:].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, labelcolor=TEXT)
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, dpi=160, metadata=metadata)


if __name__ == "__main__":
    draw(measure(), Path(sys.argv[1]))
