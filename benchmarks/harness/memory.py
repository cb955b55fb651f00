"""Resident memory of a manager, in a process of its own: ``python -m benchmarks.harness.memory MODELS`` prints JSON."""

import json
import sys

import numpy as np

from benchmarks.harness.models import GENEROUS, PLENTY
from benchmarks.harness.subprocesses import resident_bytes
from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager

SECOND_NS = 1_000_000_000
BATCH = 1_000
#: How long time passes between two requests to each model: slots of all windows end, all of them.
STEPS_NS = [length_ns for length_ns in (20_000_000, SECOND_NS, 60 * SECOND_NS, 1_440 * SECOND_NS) for _ in range(65)]
MONTH_STEPS_NS = [43_200 * SECOND_NS] * 65
MINUTE_AND_MONTH = {
    f"max_{unit}_per_{window}": PLENTY for unit in ("requests", "tokens") for window in ("minute", "month")
}


def measure(models: int, *, all_windows: bool = False) -> dict[str, float]:
    """Return the bytes of an empty manager, and of each model: after its first request, and after all of them.

    Counted is all that the package keeps, in Python objects too, but not the ids, which are the caller's. Pages that
    are not touched cost nothing and are not counted.
    """
    ids = [f"model-{i}" for i in range(models)]
    clock = ManualClock()
    limits = GENEROUS | (MINUTE_AND_MONTH if all_windows else {})
    ResourceQuotaConfig("warm-up", **limits)

    before = resident_bytes()
    manager = ResourceQuotaManager(clock=clock, max_models=max(models, 65_536))
    empty = resident_bytes()
    for model_id in ids:
        manager.set_quota(ResourceQuotaConfig(model_id, **limits))
        manager.check_quota(model_id, estimated_tokens=100)
    new = resident_bytes()
    # In small batches: what they copy for a while is the caller's affair, not the models'.
    batches = np.array_split(manager.codes(ids), max(1, models // BATCH))
    manager.check_many(batches[0], 100)
    before_traffic = resident_bytes()
    for step_ns in STEPS_NS + (MONTH_STEPS_NS if all_windows else []):
        clock.advance_ns(step_ns)
        for rows in batches:
            manager.check_many(rows, 100)
    busy = resident_bytes()
    return {
        "empty_bytes": empty - before,
        "new_bytes_per_model": (new - empty) / models,
        "bytes_per_model": (new - empty + busy - before_traffic) / models,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]), all_windows="--all-windows" in sys.argv)))
