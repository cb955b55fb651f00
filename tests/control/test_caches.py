"""Memory that is reported by real caches, and a service that evicts when a quota says so."""

import threading
from types import SimpleNamespace

import pytest
from tiered_cache import MB, running

from modelquota import Limit, ResourceQuotaConfig
from modelquota.control.caches import MemoryProbe, register_models

QUOTAS = [ResourceQuotaConfig("a", max_ram_mb=10), ResourceQuotaConfig("b")]


def occupied(manager, model_id):
    usage = manager.get_usage(model_id)
    return usage.current_ram_mb, usage.current_ssd_mb


# -- real tiers


def test_models_over_an_lru_in_ram_above_a_store_on_disk(tmp_path):
    """Two models fill their caches: RAM stays within its cap by moving to disk, the disk by forgetting the oldest."""
    quotas = [
        ResourceQuotaConfig("small", max_ram_mb=4, max_ssd_mb=3, max_requests_per_second=None),
        ResourceQuotaConfig("large", max_ram_mb=10, max_ssd_mb=100, max_requests_per_second=None),
    ]
    with running(tmp_path, quotas) as service:
        for i in range(12):
            assert service.infer("small", f"{i}", 10, size_mb=1)
            assert service.infer("large", f"{i}", 10, size_mb=2)
            for quota in quotas:
                cache, usage = service.caches[quota.model_id], service.manager.get_usage(quota.model_id)
                assert cache.ram_used_mb == usage.current_ram_mb <= quota.max_ram_mb
                assert cache.ssd_used_mb == usage.current_ssd_mb <= quota.max_ssd_mb
        small, large = service.caches["small"], service.caches["large"]
        assert occupied(service.manager, "small") == (4, 3)
        assert occupied(service.manager, "large") == (10, 14)
        assert [small.get(str(i)) is not None for i in range(12)] == [False] * 5 + [True] * 7
        assert all(large.get(str(i)) == str(i).encode()[:1] * (2 * MB) for i in range(12))
        assert len(large.disk) == 7
        assert (service.demoted, service.dropped) == (8 + 7, 5)

        result = service.infer("small", "huge", 10, size_mb=5)
        assert result.limit is Limit.RAM
        assert result.retry_after_ms is None, "no eviction makes room for what is larger than the cap"
        assert service.manager.get_usage("small").requests_this_hour == 12, "what was refused cost nothing"


# -- the probe


def test_the_probe_follows_caches_that_come_and_go(manager):
    caches = {
        "a": SimpleNamespace(ram_used_mb=1.01, ssd_used_mb=5),
        "nobody": SimpleNamespace(ram_used_mb=1, ssd_used_mb=1),
    }
    probe = MemoryProbe(manager, caches)
    assert probe.poll() == ["a"]
    assert occupied(manager, "a") == (2, 5)
    caches["b"] = lambda: SimpleNamespace(ram_used_mb=7, ssd_used_mb=0.5)
    del caches["a"]
    assert probe.poll() == ["b"]
    assert occupied(manager, "a") == (0, 0)
    assert occupied(manager, "b") == (7, 1)
    assert probe.update("a") is probe.update("nobody") is False


def test_a_report_above_the_cap_stops_what_needs_memory(manager):
    MemoryProbe(manager, {"a": SimpleNamespace(ram_used_mb=12, ssd_used_mb=0)}).poll()
    assert manager.check_quota("a", 1, ram_needed_mb=1).limit is Limit.RAM
    assert manager.check_quota("a", 1)


@pytest.mark.parametrize("figure", [-1, float("nan"), float("inf")])
def test_what_is_no_size_is_not_recorded(manager, figure, caplog):
    probe = MemoryProbe(
        manager,
        {"a": SimpleNamespace(ram_used_mb=figure, ssd_used_mb=0), "b": SimpleNamespace(ram_used_mb=3, ssd_used_mb=0)},
    )
    with pytest.raises(ValueError, match="the cache of model 'a' reports .* MB; expected a finite number, 0 or more"):
        probe.update("a")
    assert probe.poll() == ["b"]
    assert occupied(manager, "a") == (0, 0)
    assert "the size of the cache of model 'a' could not be read" in caplog.text


def test_in_the_background(manager):
    polled = threading.Event()

    def report():
        polled.set()
        return SimpleNamespace(ram_used_mb=9, ssd_used_mb=9)

    with MemoryProbe(manager, {"b": report}).start(0.001):
        assert polled.wait(60)
    assert occupied(manager, "b") == (9, 9)


# -- the registry


def test_a_registry_registers_what_is_new_or_has_changed(manager):
    manager.check_quota("a", 5)
    listed = [ResourceQuotaConfig("a", max_ram_mb=10), ResourceQuotaConfig("b", max_ram_mb=7), ResourceQuotaConfig("c")]
    registry = SimpleNamespace(list_quotas=lambda: listed)
    assert register_models(manager, registry) == ["b", "c"]
    assert [manager.get_quota(quota.model_id) for quota in listed] == listed
    assert register_models(manager, registry) == []
    assert manager.get_usage("a").tokens_this_hour == 5
    listed.clear()
    assert register_models(manager, registry) == []
    assert manager.list_models() == ["a", "b", "c"]
