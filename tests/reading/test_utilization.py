"""Utilisation: every limit compared with its use, a rate with second and burst, and the order by pressure."""

import numpy as np
import pytest

from modelquota import Limit, ResourceQuotaConfig
from modelquota.quota.limits import CATALOGUE
from modelquota.reading.utilization import LIMITS, limits_of, read_utilization


def test_it_agrees_with_the_reports(manager):
    rng = np.random.default_rng(5)
    for i in range(50):
        quota = ResourceQuotaConfig(
            f"m{i}", max_ram_mb=int(rng.integers(0, 100)), max_ssd_mb=None if i % 3 else 70,
            max_tokens_per_hour=int(rng.integers(1, 5_000)), max_requests_per_day=None if i % 2 else 40,
        )  # fmt: skip
        manager.set_quota(quota)
        manager.update_memory_usage(f"m{i}", int(rng.integers(0, 90)), 35)
        for _ in range(int(rng.integers(0, 20))):
            manager.check_quota(f"m{i}", int(rng.integers(0, 200)))
    found = read_utilization(manager)
    assert found.model_ids == manager.list_models()
    assert len(found) == 50
    for index, model_id in enumerate(found.model_ids):
        report = manager.get_model_report(model_id)
        assert found.quotas[index] == report.quota
        for limit, percent in (
            (Limit.RAM, report.ram_utilization),
            (Limit.SSD, report.ssd_utilization),
            (Limit.TOKENS_PER_HOUR, report.hourly_quota_used),
            (Limit.TOKENS_PER_DAY, report.daily_quota_used),
            (Limit.REQUESTS_PER_HOUR, report.hourly_requests_used),
            (Limit.REQUESTS_PER_DAY, report.daily_requests_used),
        ):
            assert found.of(limit)[index] == pytest.approx(percent)
        assert found.used(Limit.TOKENS_PER_DAY)[index] == report.usage.tokens_this_day
        assert found.used(Limit.RAM)[index] == report.usage.current_ram_mb
        assert found.left[index].tolist() == [-1 if left is None else left for left in report.usage.left[1:]]


def test_a_rate_is_as_full_as_its_second_or_its_burst(manager):
    manager.set_quota("m", max_requests_per_second=10, burst_requests=30, max_requests_per_hour=None)
    for _ in range(40):
        assert manager.check_quota("m", 0)
    assert read_utilization(manager).of(Limit.REQUESTS_PER_SECOND).tolist() == [100.0]
    manager.clock.advance(1.1)  # 11 of the 40 are repaid, and the second is empty
    (usage,) = manager.snapshot()
    assert (usage["requests_this_second"], usage["burst_requests_used"]) == (0, 19)
    assert read_utilization(manager).of(Limit.REQUESTS_PER_SECOND).tolist() == [100 * (10 + 19) / 40]


def test_order_and_nearest_limit(manager):
    manager.set_quota("a")
    manager.set_quota("b", max_ram_mb=10)
    manager.set_quota("c", max_ssd_mb=10)
    manager.set_quota("d")
    manager.update_memory_usage("b", 5, 0)
    manager.update_memory_usage("c", 0, 9)
    found = read_utilization(manager)
    assert [found.model_ids[i] for i in found.by_pressure()] == ["c", "b", "a", "d"]
    assert found.pressure.tolist() == [0.0, 50.0, 90.0, 0.0]
    assert [found.nearest[i] for i in (1, 2)] == [Limit.RAM, Limit.SSD]


def test_no_model(manager):
    found = read_utilization(manager)
    assert len(found) == 0
    assert found.pressure.tolist() == found.by_pressure().tolist() == found.nearest == []


def test_every_limit_has_its_column():
    assert tuple(CATALOGUE) == LIMITS == tuple(Limit)
    assert len(limits_of(ResourceQuotaConfig("m"))) == len(LIMITS)
    quota = ResourceQuotaConfig("m", max_requests_per_second=99.5, burst_requests=0)
    assert limits_of(quota)[LIMITS.index(Limit.REQUESTS_PER_SECOND)] == 100
