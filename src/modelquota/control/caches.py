"""Reports cache sizes to a manager and registers models with it: two protocols and their readers."""

import logging
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Protocol

from modelquota._periodic import Periodic
from modelquota.errors import UnknownModelError
from modelquota.quota.config import ResourceQuotaConfig

if TYPE_CHECKING:
    from modelquota.manager import ResourceQuotaManager

__all__ = ["MemoryProbe", "ModelRegistry", "ReportsMemory", "register_models"]

logger = logging.getLogger("modelquota")


class ReportsMemory(Protocol):
    """A cache of one model, or its statistics, with the size of the cache in MB (2**20 bytes), 0 or more."""

    @property
    def ram_used_mb(self) -> float:
        """RAM occupied now."""
        ...

    @property
    def ssd_used_mb(self) -> float:
        """SSD space occupied now."""
        ...


class ModelRegistry(Protocol):
    """A registry of models that lists their limits."""

    def list_quotas(self) -> Iterable[ResourceQuotaConfig]:
        """Return the limits of every model that is registered."""
        ...


def register_models(manager: "ResourceQuotaManager", registry: ModelRegistry) -> list[str]:
    """Set the limits of every model of a registry; models that the registry does not list are not changed.

    Returns
    -------
    list of str
        The ids that are new or whose limits have changed, in the registry's order.

    Raises
    ------
    CapacityError
        The table is full; the limits of the models listed before are set.
    """
    changed = []
    for quota in registry.list_quotas():
        if manager.get_quota(quota.model_id) != quota:
            manager.set_quota(quota)
            changed.append(quota.model_id)
    return changed


class MemoryProbe(Periodic):
    """Keeps models' memory use up to date: reads the sizes of their caches, and calls ``update_memory_usage``.

    Call `poll` from your own loop, call `update` after each request, or `start` a thread that polls.

    Parameters
    ----------
    manager : ResourceQuotaManager
        The manager to which memory use is reported.
    caches : mapping of str to ReportsMemory, or to a callable that returns one
        By model id. Read again at each poll, so caches may come and go; if a model's cache is gone, its memory use is
        reported as 0. Fractions of a MB are rounded up.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> manager = ResourceQuotaManager()
    >>> manager.set_quota("llama")
    >>> probe = MemoryProbe(manager, {"llama": SimpleNamespace(ram_used_mb=10.2, ssd_used_mb=0)})
    >>> probe.poll(), manager.get_usage("llama").current_ram_mb
    (['llama'], 11)
    """

    def __init__(
        self,
        manager: "ResourceQuotaManager",
        caches: Mapping[str, ReportsMemory | Callable[[], ReportsMemory]],
    ) -> None:
        self._manager = manager
        self._caches = caches
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def poll(self) -> list[str]:
        """Read all caches, and return the models that were updated.

        A model without a quota is skipped. A cache that fails is logged, and the others are still read.
        """
        updated = []
        for model_id in list(self._caches):
            try:
                if self.update(model_id):
                    updated.append(model_id)
            except Exception:
                logger.exception("the size of the cache of model %r could not be read", model_id)
        with self._lock:
            gone = self._told - set(self._caches)
            self._told -= gone
        for model_id in gone:
            self._tell(model_id, 0, 0)
        return updated

    def update(self, model_id: str) -> bool:
        """Read the cache of one model; returns False if it has no cache or no quota.

        Raises
        ------
        ValueError
            The cache reports a negative or non-finite size; nothing is recorded. What the cache raises is passed on.
        """
        cache = self._caches.get(model_id)
        if cache is None:
            return False
        report = cache() if callable(cache) else cache
        if not self._tell(model_id, _whole(model_id, report.ram_used_mb), _whole(model_id, report.ssd_used_mb)):
            return False
        with self._lock:
            self._told.add(model_id)
        return True

    def _tell(self, model_id: str, ram_mb: int, ssd_mb: int) -> bool:
        try:
            self._manager.update_memory_usage(model_id, ram_mb, ssd_mb)
        except UnknownModelError:
            return False
        return True


def _whole(model_id: str, mb: float) -> int:
    if not 0 <= mb < math.inf:
        raise ValueError(f"the cache of model {model_id!r} reports {mb} MB; expected a finite number, 0 or more")
    return math.ceil(mb)
