"""Reports: the percentages by their rule, the fields of every snapshot, and the text of a status report."""

import dataclasses
import pickle

import pytest
from factories import open_quota
from hypothesis import given
from hypothesis import strategies as st

from modelquota import Limit, ManualClock, ResourceQuotaManager
from modelquota.quota.config import MAX_COUNT, ResourceQuotaConfig
from modelquota.quota.limits import DENYING
from modelquota.reading.report import ModelReport, QuotaStats, ResourceUsage, model_report, status_lines

UNLIMITED = open_quota("free")
PERCENT = {
    Limit.RAM: 75.0,
    Limit.SSD: 75.0,
    Limit.TOKENS_PER_HOUR: 25.0,
    Limit.REQUESTS_PER_HOUR: 75.0,
    Limit.TOKENS_PER_DAY: 10.0,
    Limit.REQUESTS_PER_DAY: 150.0,
}
ALWAYS_COUNTED = [record for record in DENYING if record.window is None or not record.window.optional]
USAGE = ResourceUsage(
    current_ram_mb=512,
    peak_ram_mb=600,
    current_ssd_mb=8192,
    peak_ssd_mb=8192,
    requests_this_second=7,
    tokens_this_second=900,
    tokens_this_hour=250_000,
    tokens_this_day=1_000_000,
    requests_this_hour=7_500,
    requests_this_day=150_000,
    reserved_ram_mb=1024,
    reserved_ssd_mb=4096,
    percent=tuple(PERCENT.get(limit, 0.0) for limit in range(max(Limit) + 1)),
)


def percent(used: int, limit: int | None) -> float:
    """How full a model's RAM is that uses so much of so much."""
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota("m", max_ram_mb=limit)
    manager.update_memory_usage("m", used, 0)
    usage = manager.get_usage("m")
    assert usage is not None
    return usage.percent[Limit.RAM]


@pytest.mark.parametrize(
    ("used", "limit", "expected"),
    [
        (0, 10, 0.0),
        (5, 10, 50.0),
        (10, 10, 100.0),
        (15, 10, 150.0),
        (0, 0, 0.0),
        (3, 0, 300.0),
        (3, None, 0.0),
        (MAX_COUNT, MAX_COUNT, 100.0),
        (MAX_COUNT, 1, 100.0 * MAX_COUNT),
    ],
)
def test_percent(used: int, limit: int | None, expected: float) -> None:
    result = percent(used, limit)
    assert type(result) is float
    assert result == expected


@given(st.integers(0, MAX_COUNT), st.integers(0, MAX_COUNT))
def test_percent_is_at_most_100_exactly_when_the_limit_is_kept(used: int, limit: int) -> None:
    # An excess too small for a float to hold is 100.0.
    assert percent(used, limit) <= 100 or used > max(limit, 1)
    assert percent(used, limit) >= 100 or used < max(limit, 1)


def test_model_report() -> None:
    quota = ResourceQuotaConfig("llama")
    assert model_report("llama", quota, USAGE) == ModelReport(
        model_id="llama",
        quota=quota,
        usage=USAGE,
        ram_utilization=75.0,
        ssd_utilization=75.0,
        requests_per_second=7.0,
        tokens_per_second=900.0,
        hourly_quota_used=25.0,
        daily_quota_used=10.0,
        hourly_requests_used=75.0,
        daily_requests_used=150.0,
    )


def test_a_model_without_limits_uses_nothing_of_them() -> None:
    manager = ResourceQuotaManager(clock=ManualClock())
    manager.set_quota(UNLIMITED)
    manager.update_memory_usage("free", 512, 8192)
    for tokens in (800, 100, *[0] * 5):
        manager.check_quota("free", tokens)
    report = manager.get_model_report("free")
    assert report is not None
    percents = [value for name, value in dataclasses.asdict(report).items() if name.endswith(("_used", "_utilization"))]
    assert percents == [0.0] * 6
    assert (report.requests_per_second, report.tokens_per_second) == (7.0, 900.0)


@pytest.mark.parametrize(
    ("snapshot", "fields"),
    [
        (
            ResourceUsage,
            "current_ram_mb peak_ram_mb current_ssd_mb peak_ssd_mb requests_this_second tokens_this_second"
            " tokens_this_hour tokens_this_day requests_this_hour requests_this_day requests_this_minute"
            " tokens_this_minute requests_this_month tokens_this_month burst_requests_used burst_tokens_used"
            " total_violations ram_violations ssd_violations rate_violations quota_violations"
            " concurrency_violations reserved_ram_mb reserved_ssd_mb concurrent_requests queued_requests"
            " tokens_total tokens_refunded_total left percent",
        ),
        (
            QuotaStats,
            "total_checks total_violations rejected_requests throttled_requests queued_requests ram_violations"
            " ssd_violations rate_violations quota_violations allowed_requests warned_requests concurrency_violations"
            " recoveries denied_requests waited_requests tokens_charged tokens_refunded",
        ),
    ],
)
def test_snapshots_are_frozen_values_of_integers(snapshot: type[ResourceUsage | QuotaStats], fields: str) -> None:
    names = fields.split()
    value = snapshot(**{name: number for number, name in enumerate(names)})
    assert dataclasses.asdict(value) == {name: number for number, name in enumerate(names)}
    assert list(dataclasses.asdict(value)) == names
    assert pickle.loads(pickle.dumps(value)) == value
    fresh = dataclasses.asdict(snapshot())
    unlike = ("left", "percent", *(name for name in names if name.endswith(("_minute", "_month"))))
    assert {value for name, value in fresh.items() if name not in unlike} == {0}
    assert {fresh[name] for name in names if name.endswith(("_minute", "_month"))} <= {None}
    assert not hasattr(value, "__dict__")
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.total_violations = 0  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional argument"):
        snapshot(1)  # type: ignore[call-arg]
    for name in names:
        assert snapshot.__doc__ is not None
        assert name in snapshot.__doc__


def test_status() -> None:
    llama = ResourceQuotaConfig("llama-3.2-1b", max_concurrent_requests=8, burst_requests=0, max_tokens_per_second=0.5)
    reports = [
        model_report("llama-3.2-1b", llama, dataclasses.replace(USAGE, total_violations=12_345, concurrent_requests=3)),
        model_report("free", UNLIMITED, ResourceUsage()),
    ]
    stats = QuotaStats(
        total_checks=1_234_567,
        allowed_requests=1_222_222,
        rejected_requests=12_000,
        throttled_requests=300,
        queued_requests=45,
        warned_requests=6,
        total_violations=12_351,
        ram_violations=1,
        ssd_violations=2,
        rate_violations=12_340,
        quota_violations=3,
        concurrency_violations=5,
        denied_requests=12_310,
        waited_requests=35,
        tokens_charged=9_000,
        tokens_refunded=4_000,
    )
    assert [" ".join(line.split()) for line in status_lines(reports, stats).splitlines()[:3]] == [
        "model RAM MB SSD MB open requests/s tokens/s tokens/h requests/h tokens/day requests/day violations",
        "llama-3.2-1b 1536 / 2048 12.2k / 16.3k 3 / 8 7 / 100 900 / 0.5+10k 250k / 1M 7500 / 10k"
        " 1M / 10M 150k / 100k 12.3k",
        "free" + " 0 / -" * len(ALWAYS_COUNTED) + " 0",
    ]
    assert status_lines(reports, stats).splitlines()[3:] == [
        "total: 1,234,567 checks, 1,222,222 allowed (6 with a warning, 35 after a wait), 12,310 denied",
        "actions: 12,000 rejected, 300 throttled, 45 queued; tokens: 9,000 charged, 4,000 refunded",
        "violations: 12,351 (1 RAM, 2 SSD, 12,340 rate, 3 quota, 5 concurrency)",
    ]


def test_status_without_models() -> None:
    assert status_lines([], QuotaStats()) == (
        "no models\n"
        "total: 0 checks, 0 allowed (0 with a warning, 0 after a wait), 0 denied\n"
        "actions: 0 rejected, 0 throttled, 0 queued; tokens: 0 charged, 0 refunded\n"
        "violations: 0 (0 RAM, 0 SSD, 0 rate, 0 quota, 0 concurrency)"
    )


IDS = st.text(st.characters(exclude_characters="/"), min_size=1)
AMOUNTS = st.integers(0, MAX_COUNT)


@given(st.lists(st.tuples(IDS, AMOUNTS, AMOUNTS), min_size=1))
def test_the_table_is_aligned_whatever_stands_in_it(rows: list[tuple[str, int, int]]) -> None:
    quota = ResourceQuotaConfig("a", max_requests_per_second=1.7e308)
    reports = [
        model_report(
            model_id,
            quota.replace(max_ram_mb=limit, max_tokens_per_second=limit / 7),
            ResourceUsage(current_ram_mb=used, tokens_this_day=used, total_violations=used),
        )
        for model_id, used, limit in rows
    ]
    heading, *table = status_lines(reports, QuotaStats()).split("\n")[:-3]
    assert len(table) == len(rows)
    assert {len(line) for line in table} == {len(heading)}
    assert all(line.isprintable() for line in table)
    strokes = {tuple(place for place, letter in enumerate(line) if letter == "/") for line in table}
    assert [len(places) for places in strokes] == [len(ALWAYS_COUNTED)]


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (9_999, "9999"),
        (10_000, "10k"),
        (12_399, "12.3k"),
        (99_999, "99.9k"),
        (999_999, "999k"),
        (1_000_000, "1M"),
        (1_049_999, "1.04M"),
        (100_000_000, "100M"),
        (MAX_COUNT, "4.61E"),
    ],
)
def test_a_figure_is_cut_and_never_rounded_up(count: int, shown: str) -> None:
    usage = ResourceUsage(total_violations=count)
    row = status_lines([model_report("a", UNLIMITED, usage)], QuotaStats()).splitlines()[1]
    assert row.split()[-1] == shown


@pytest.mark.parametrize(
    ("rate", "burst", "shown"),
    [
        (100.0, 200, "100+200"),
        (100.0, 0, "100"),
        (0.0, 200, "0"),
        (0.25, 1, "0.25+1"),
        (9_999.5, 0, "9999.5"),
        (2.5e6, 0, "2.5M"),
        (1.7e308, 0, "1.7e+308"),
        (None, 200, "-"),
    ],
)
def test_a_limit_per_second_is_shown_with_its_burst(rate: float | None, burst: int, shown: str) -> None:
    quota = UNLIMITED.replace(max_requests_per_second=rate, burst_requests=burst)
    row = status_lines([model_report("a", quota, ResourceUsage())], QuotaStats()).splitlines()[1]
    assert row.split(" / ")[4].split()[0] == shown


def test_a_model_id_cannot_break_the_table() -> None:
    row = status_lines([model_report("a\n\x1b[2Jb", UNLIMITED, ResourceUsage())], QuotaStats()).splitlines()[1]
    assert row.startswith(r"a\n\x1b[2Jb  ")
