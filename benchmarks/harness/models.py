"""Managers with models that are never refused, and the orders in which their models are asked for."""

from functools import cached_property
from types import ModuleType

import numpy as np

from modelquota import ManualClock, ResourceQuotaConfig, ResourceQuotaManager

PLENTY = 2**50
#: Every limit is set, so that every limit is looked at, and none is ever reached.
GENEROUS = {
    "max_ram_mb": PLENTY,
    "max_ssd_mb": PLENTY,
    "max_requests_per_second": 1e9,
    "max_tokens_per_second": 1e12,
    "max_tokens_per_hour": PLENTY,
    "max_tokens_per_day": PLENTY,
    "max_requests_per_hour": PLENTY,
    "max_requests_per_day": PLENTY,
    "max_concurrent_requests": 1_000,
}
TOKENS = 100
BATCH = 10_000


def require_no_violation(manager: ResourceQuotaManager) -> None:
    """Raise AssertionError where a request was refused: what was timed would not be an admission."""
    stats = manager.get_stats()
    assert stats.allowed_requests == stats.total_checks, f"{stats.total_violations} requests met a limit while timed"


class Fleet:
    """A manager with `count` models, and floors with a row for each of them.

    Parameters
    ----------
    count : int
        Models.
    floors : module or None
        `benchmarks.floor.floor`; None where it cannot be compiled.
    time_runs : bool
        True for the monotonic clock, False for a `ManualClock` that nobody moves.
    """

    def __init__(self, count: int, floors: ModuleType | None, *, time_runs: bool = True) -> None:
        self.ids = [f"model-{i}" for i in range(count)]
        self.manager = ResourceQuotaManager(clock=None if time_runs else ManualClock(), max_models=count)
        for model_id in self.ids:
            self.manager.set_quota(ResourceQuotaConfig(model_id, **GENEROUS))
        self.floor = floors.FloorTable(self.ids) if floors else None

    @cached_property
    def codes(self) -> np.ndarray:
        """What `check_many` calls each model."""
        return self.manager.codes(self.ids)

    def random_ids(self, count: int) -> list[str]:
        """Draw ids: the very objects that were registered."""
        return [self.ids[i] for i in _draw(range(len(self.ids)), count)]

    def random_batches(
        self, batches: int, size: int = BATCH, models: range | None = None
    ) -> list[tuple[np.ndarray, ...]]:
        """Draw arguments for `check_many`, from all models or from some."""
        tokens = np.full(size, TOKENS)
        return [(self.codes[order], tokens) for order in self._orders(batches, size, models)]

    def random_floor_batches(
        self, batches: int, size: int = BATCH, models: range | None = None
    ) -> list[tuple[np.ndarray, ...]]:
        """Draw arguments for the floor's `check_many`: the same rows in the same order."""
        tokens = np.full(size, TOKENS)
        return [(order, tokens, np.empty(size, np.uint8)) for order in self._orders(batches, size, models)]

    def _orders(self, batches: int, size: int, models: range | None) -> list[np.ndarray]:
        return np.split(_draw(models or range(len(self.ids)), batches * size), batches)


def _draw(models: range, count: int) -> np.ndarray:
    return np.random.default_rng(len(models)).integers(models.start, models.stop, size=count)
