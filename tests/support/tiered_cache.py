"""A cache with two real tiers, as people build them from parts: an LRU in RAM above a store on disk.

It asks the quotas before it grows and evicts when they say so; `test_memory.py` drives it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cachetools import LRUCache
from diskcache import Cache

from modelquota import QuotaCheckResult, ResourceQuotaConfig, ResourceQuotaManager, ViolationType
from modelquota.control.caches import MemoryProbe, register_models

MB = 2**20


class TieredCache:
    """The cache of one model: values are bytes; what is evicted from RAM goes to disk."""

    def __init__(self, folder: Path) -> None:
        # both bounded by the quotas, not by themselves
        self.ram: LRUCache[str, bytes] = LRUCache(maxsize=1 << 40, getsizeof=len)
        self.disk = Cache(str(folder), size_limit=1 << 40, eviction_policy="none")
        self.on_disk: dict[str, int] = {}

    @property
    def ram_used_mb(self) -> float:
        return self.ram.currsize / MB

    @property
    def ssd_used_mb(self) -> float:
        return sum(self.on_disk.values()) / MB

    def get(self, key: str) -> bytes | None:
        value = self.ram.get(key)
        return value if value is not None else self.disk.get(key)

    def put(self, key: str, value: bytes) -> None:
        self.ram[key] = value

    def take_coldest(self) -> tuple[str, bytes] | None:
        """Take the value that was used longest ago out of RAM; None where RAM is empty."""
        return self.ram.popitem() if self.ram else None

    def put_on_disk(self, key: str, value: bytes) -> None:
        self.disk.set(key, value)
        self.on_disk[key] = len(value)

    def drop_oldest(self) -> bool:
        """Forget the value that has been on disk longest; False where there is none."""
        if not self.on_disk:
            return False
        key = next(iter(self.on_disk))
        del self.on_disk[key]
        self.disk.delete(key)
        return True

    def close(self) -> None:
        self.disk.close()


class Service:
    """Several models, each with a cache of its own, behind one manager of quotas."""

    def __init__(self, folder: Path, quotas: list[ResourceQuotaConfig]) -> None:
        self._quotas = quotas
        self.manager = ResourceQuotaManager()
        register_models(self.manager, self)
        self.caches = {quota.model_id: TieredCache(folder / quota.model_id) for quota in quotas}
        self.probe = MemoryProbe(self.manager, self.caches)
        self.demoted = self.dropped = 0

    def list_quotas(self) -> list[ResourceQuotaConfig]:
        return self._quotas

    def infer(self, model_id: str, key: str, tokens: int, size_mb: int) -> QuotaCheckResult:
        """Serve one request and keep its state of `size_mb`; make room where a memory quota stands in the way."""
        cache = self.caches[model_id]
        result = self.manager.check_quota(model_id, tokens, ram_needed_mb=size_mb)
        while result.violation_type is ViolationType.RAM_LIMIT and self.make_room(model_id, cache):
            result = self.manager.check_quota(model_id, tokens, ram_needed_mb=size_mb)
        if result:
            cache.put(key, key.encode()[:1] * (size_mb * MB))
            self.probe.update(model_id)
        return result

    def ssd_left_mb(self, model_id: str) -> float:
        """What the quota leaves; a check would charge a request."""
        report = self.manager.get_model_report(model_id)
        assert report is not None
        limit = report.quota.max_ssd_mb
        return math.inf if limit is None else limit - report.usage.current_ssd_mb

    def make_room(self, model_id: str, cache: TieredCache) -> bool:
        """Move the coldest value to disk, where the quota leaves room for it, or else forget the oldest there."""
        coldest = cache.take_coldest()
        if coldest is None:
            return False
        self.probe.update(model_id)
        size_mb = len(coldest[1]) // MB
        while size_mb > self.ssd_left_mb(model_id):
            if not cache.drop_oldest():
                return True  # larger than the disk's share: it is forgotten, and RAM has room all the same
            self.dropped += 1
            self.probe.update(model_id)
        cache.put_on_disk(*coldest)
        self.demoted += 1
        self.probe.update(model_id)
        return True


@contextmanager
def running(folder: Path, quotas: list[ResourceQuotaConfig]) -> Iterator[Any]:
    """Run a service, and close its stores."""
    service = Service(folder, quotas)
    try:
        yield service
    finally:
        for cache in service.caches.values():
            cache.close()
