"""Cost per check and memory per model as models grow in number, from one to a million.

``python -m benchmarks.drawing.growth MOST`` prints JSON: a list of points, see `measure`.
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks.drawing.plot import COLOURS, TEXT
from benchmarks.floor.build import FloorUnavailableError, load_floor
from benchmarks.harness.loops import OPERATIONS, Loop, batch_round, least_of_rounds
from benchmarks.harness.models import BATCH, GENEROUS, TOKENS, require_no_violation
from benchmarks.harness.subprocesses import resident_bytes
from modelquota import ResourceQuotaConfig, ResourceQuotaManager

COUNTS = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
ROUNDS = 40
SLICES = 20  # each with an order of its own: together more models than any cache holds
#: From here on a model's share of the memory is not lost among the pages of the process.
LEAST_WEIGHED = 1_000


def measure(most: int) -> list[dict[str, Any]]:
    """Measure one manager that grows to `most` models, in random order and while time runs.

    Returns
    -------
    list of dict
        ``models``; ``check_ns`` and ``batch_ns``, nanoseconds per request by `check_quota` and by `check_many` with
        10,000 at once; ``check_floor_ns`` and ``batch_floor_ns``, None where floors cannot be compiled;
        ``bytes_per_model``, resident, None below LEAST_WEIGHED models.
    """
    try:
        floors = load_floor()
    except FloorUnavailableError:
        floors = None
    counts = [count for count in COUNTS if count <= most]
    ids = [f"model-{i}" for i in range(counts[-1])]
    manager = ResourceQuotaManager(max_models=counts[-1])
    added, added_bytes = 0, 0
    points = []
    gc.disable()  # a million ids to go through, and nothing here has cycles
    for count in counts:
        before = resident_bytes()
        for model_id in ids[added:count]:
            manager.set_quota(ResourceQuotaConfig(model_id, **GENEROUS))
        added_bytes += resident_bytes() - before
        added = count
        points.append(
            {
                "models": count,
                **_time(manager, ids[:count], floors),
                "bytes_per_model": added_bytes / count if count >= LEAST_WEIGHED else None,
            }
        )
    return points


def _time(manager: ResourceQuotaManager, ids: Sequence[str], floors: ModuleType | None) -> dict[str, float | None]:
    order = np.random.default_rng(len(ids)).integers(len(ids), size=SLICES * OPERATIONS)
    random_ids = [ids[i] for i in order]
    codes, tokens = manager.codes(ids)[order], np.full(BATCH, TOKENS)
    check = Loop("manager.check_quota(each, estimated_tokens=100)", random_ids, manager=manager)
    rounds = {
        "empty": check.empty_round_ns,
        "check": check.round_ns,
        "batch": batch_round([(each, tokens) for each in np.split(codes, len(codes) // BATCH)], manager.check_many),
    }
    if floors:
        floor = floors.FloorTable(ids)
        limits = np.empty(BATCH, np.uint8)
        batches = [(each, tokens, limits) for each in np.split(order, len(order) // BATCH)]
        rounds["check_floor"] = Loop("floor.check(each, estimated_tokens=100)", random_ids, floor=floor).round_ns
        rounds["batch_floor"] = batch_round(batches, floor.check_many)
    least = least_of_rounds(ROUNDS, **rounds)
    require_no_violation(manager)
    return {
        "check_ns": least["check"] - least["empty"],
        "check_floor_ns": least["check_floor"] - least["empty"] if floors else None,
        "batch_ns": least["batch"],
        "batch_floor_ns": least.get("batch_floor"),
    }


def draw(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the points into the file `path`, whose suffix chooses the format (.svg, .png, .pdf)."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    curves = (
        ("check_ns", "check_quota", COLOURS["ours"], "-"),
        ("check_floor_ns", "its floor: call, look-up, clock, lock", COLOURS["ours"], ":"),
        ("batch_ns", "check_many, 10,000 at once", COLOURS["native"], "-"),
        ("batch_floor_ns", "its floor: a row touched under its lock", COLOURS["native"], ":"),
    )
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "modelquota", "font.size": 10}):
        figure = Figure(figsize=(9.0, 4.0), layout="constrained")
        axes = figure.subplots()
        for name, label, colour, style in curves:
            known = [(point["models"], point[name]) for point in points if point[name] is not None]
            if known:
                axes.plot(*zip(*known, strict=True), style, color=colour, label=label, marker="o", markersize=3.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda models, _: f"{models:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ns, _: f"{ns:,.0f} ns"))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(_weight(points), color=TEXT)
        axes.set_ylabel("time per request", color=TEXT)
        axes.grid(color=TEXT, alpha=0.2, linewidth=0.6)
        axes.tick_params(which="both", length=0, colors=TEXT)
        axes.spines[:].set_visible(False)
        axes.legend(frameon=False, labelcolor=TEXT, loc="upper left")
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, transparent=True, dpi=160, metadata=metadata)


def _weight(points: Sequence[dict[str, Any]]) -> str:
    weighed = [point["bytes_per_model"] for point in points if point["bytes_per_model"] is not None]
    memory = f"; resident memory {min(weighed):,.0f} to {max(weighed):,.0f} bytes a model" if weighed else ""
    return f"models, asked for in random order{memory}"


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
