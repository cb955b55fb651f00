"""Resident memory of a manager, in a process of its own: ``python -m benchmarks.harness.memory MODELS`` prints JSON."""

import json
import sys

import numpy as np

from benchmarks.harness.models import GENEROUS
from benchmarks.harness.subprocesses import resident_bytes
from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager

SECOND_NS = 1_000_000_000
BATCH = 1_000
#: How long time passes between two requests to each model: slots of the second, the hour and the day end, all of them.
STEPS_NS = [20_000_000] * 65 + [60 * SECOND_NS] * 65 + [1_440 * SECOND_NS] * 65


def measure(models: int) -> dict[str, float]:
    """Return the bytes of an empty manager, of each model in use, and what traffic adds to each.

    Counted is all that the package keeps, in Python objects too, but not the ids, which are the caller's. Pages that
    are not touched cost nothing and are not counted.
    """
    ids = [f"model-{i}" for i in range(models)]
    clock = ManualClock()
    ResourceQuotaConfig("warm-up", **GENEROUS)

    before = resident_bytes()
    manager = ResourceQuotaManager(clock=clock, max_models=max(models, 65_536))
    empty = resident_bytes()
    for model_id in ids:
        manager.set_quota(ResourceQuotaConfig(model_id, **GENEROUS))
        manager.check_quota(model_id, estimated_tokens=100)
    in_use = resident_bytes()
    # In small batches: what they copy for a while is the caller's affair, not the models'.
    batches = np.array_split(manager.codes(ids), max(1, models // BATCH))
    manager.check_many(batches[0], 100)
    before_traffic = resident_bytes()
    for step_ns in STEPS_NS:
        clock.advance_ns(step_ns)
        for rows in batches:
            manager.check_many(rows, 100)
    busy = resident_bytes()
    return {
        "empty_bytes": empty - before,
        "bytes_per_model": (in_use - empty) / models,
        "traffic_bytes_per_model": (busy - before_traffic) / models,
    }


if __name__ == "__main__":
    print(json.dumps(measure(int(sys.argv[1]))))
