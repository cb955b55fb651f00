"""One home for each limit: the core agrees with the catalogue, and every list of limits is made from it."""

import contextlib
import dataclasses
import itertools
import re
from pathlib import Path

import pytest
from factories import make_manager, open_quota

import modelquota
from modelquota import Limit, ResourceQuotaConfig, ResourceQuotaManager
from modelquota._core.state import validate
from modelquota._core.state.packing import bounds_of, core_limits
from modelquota.asgi.page import page_state
from modelquota.asgi.ratelimit import LimitHeaders
from modelquota.asgi.ratelimit import bounds_of as told_bounds
from modelquota.cli.status import WIDE
from modelquota.control import load
from modelquota.monitoring.alerts import DEFAULT_RULES
from modelquota.monitoring.metrics import METRICS
from modelquota.quota.config import QuotaFields
from modelquota.quota.limits import CATALOGUE, DENYING, SHADOW_NAMES, WINDOWS, shadow_mask
from modelquota.quota.schema import quota_file_schema
from modelquota.reading.report import QuotaStats, ResourceUsage, status_lines
from modelquota.reading.utilization import LIMITS, read_utilization

SOURCES = Path(modelquota.__file__).parent
RECORDS = pytest.mark.parametrize("record", CATALOGUE.values(), ids=lambda record: record.limit.name)
EACH = {Limit.RAM: 7, Limit.SSD: 11, Limit.CONCURRENCY: 5, Limit.QUEUE: 9} | {
    record.limit: (400 if record.unit == "tokens" else 40) * 10 ** WINDOWS.index(record.window) + record.limit
    for record in CATALOGUE.values()
    if record.window is not None
}
# One model, all of whose limits are set, each to another value.
QUOTAS = [
    ResourceQuotaConfig(
        "m",
        **{record.quota_field: EACH[limit] for limit, record in CATALOGUE.items()},
        burst_requests=3,
        burst_tokens=30,
    )
]


@contextlib.contextmanager
def held(manager):
    """One grant of 50 tokens, whatever the limits."""
    manager.enforcement_enabled = False
    grant = manager.reserve("m", 50)
    manager.enforcement_enabled = True
    yield
    grant.release()


def test_the_codes_of_the_core_are_those_of_the_catalogue():
    codes, windows = core_limits()
    assert codes == {
        "RAM": Limit.RAM,
        "SSD": Limit.SSD,
        "CONCURRENCY": Limit.CONCURRENCY,
        "QUEUE": Limit.QUEUE,
        "LIMITS": max(Limit) + 1,
    }
    assert len(windows) == len(WINDOWS)
    for window, (slots_per_slot, of_requests, of_tokens) in zip(WINDOWS, windows, strict=True):
        assert slots_per_slot == window.seconds
        for code, unit in ((of_requests, "requests"), (of_tokens, "tokens")):
            record = CATALOGUE[Limit(code)]
            assert (record.window, record.unit) == (window, unit)


def test_a_slot_of_a_window_is_made_of_whole_slots_of_the_one_before():
    _, windows = core_limits()
    sizes = [slots for slots, _, _ in windows]
    assert all(longer % shorter == 0 for shorter, longer in itertools.pairwise(sizes))


def test_limits_are_in_the_order_in_which_they_are_judged(manager):
    assert list(CATALOGUE) == list(Limit) == list(LIMITS)
    assert [int(limit) for limit in Limit] == list(range(1, len(Limit) + 1))
    for judged in DENYING:  # with each limit at 0 in turn, and all those after it
        later = {record.quota_field: 0 for record in DENYING if record.limit >= judged.limit}
        manager.update_quota("m", **{record.quota_field: None for record in DENYING} | later)
        assert manager.check_quota("m", 1, 1, 1).limit is judged.limit


@RECORDS
def test_a_limit_has_its_fields(record):
    config = {field.name for field in dataclasses.fields(ResourceQuotaConfig)}
    usage = {field.name for field in dataclasses.fields(ResourceUsage)}
    counters = set(ResourceQuotaManager().snapshot().dtype.names)
    assert record.quota_field in config & QuotaFields.__optional_keys__
    assert set(record.usage_fields) <= usage & counters
    if record.is_rate:
        assert record.burst_field in config & QuotaFields.__optional_keys__
        assert record.ahead_field in usage & counters


def test_every_field_of_a_quota_that_limits_is_a_limit():
    fields = {name for name in QuotaFields.__optional_keys__ if name.startswith(("max_", "burst_"))}
    records = CATALOGUE.values()
    assert {record.quota_field for record in records} | {r.burst_field for r in records if r.is_rate} == fields


@RECORDS
def test_the_schema_of_quota_files_has_the_type_of_each_limit(record):
    properties = quota_file_schema()["definitions"]["quota"]["properties"]
    accepts = properties[record.quota_field]
    number = accepts["anyOf"][0] if "anyOf" in accepts else accepts
    assert number["type"] == ("number" if record.is_rate else "integer")
    assert ("anyOf" in accepts) is (record.limit is not Limit.QUEUE)


def test_every_list_has_every_limit(manager):
    denying = [record.limit for record in DENYING]
    windows = [record for record in DENYING if record.window is not None]
    longer = [record.limit for record in windows if not record.is_rate]
    (report,) = [manager.get_model_report("m")]
    assert [name.upper() for name in SHADOW_NAMES] == [limit.name for limit in denying]
    assert shadow_mask(ResourceQuotaConfig("m", shadow_limits=SHADOW_NAMES)) == validate._SHADOWS
    heading = status_lines([report], QuotaStats()).splitlines()[0]
    assert " ".join(heading.split()) == " ".join(["model", *(record.heading for record in DENYING), "violations"])
    assert [rule.limit for rule in DEFAULT_RULES if rule.cluster is None] == [
        None,
        Limit.RAM,
        Limit.SSD,
        *longer,
        Limit.QUEUE,
    ]
    assert list(WIDE.values()) == [Limit.RAM, Limit.SSD, *longer]
    assert {bound.limit for bound in told_bounds(report.quota)} == set(denying) - {Limit.RAM, Limit.SSD}
    fields = {record.quota_field for record in CATALOGUE.values()} | {r.burst_field for r in windows if r.is_rate}
    assert set(load._ADJUSTABLE) == fields
    (kind,) = page_state(manager)["kinds"]
    assert {limit["label"].lower() for limit in kind["limits"]} == {record.label.lower() for record in DENYING}
    assert {limit["name"] for limit in kind["limits"] if limit["burst"]} == {
        r.limit.name.lower() for r in windows if r.is_rate
    }
    for unit in ("requests", "tokens"):
        for metric in METRICS:
            if metric.name in (f"modelquota.model.window.{unit}", f"modelquota.model.window.{unit}.limit"):
                assert [window for (window,) in metric.series] == [window.name for window in WINDOWS]


@RECORDS
def test_what_is_left_of_a_limit_and_how_full_it_is(manager, record):
    limit = record.limit
    cap = EACH[limit] + {"burst_requests": 3, "burst_tokens": 30}.get(record.burst_field, 0)
    before = manager.get_usage("m")
    assert (before.left[limit], before.percent[limit]) == (cap, 0.0)
    manager.update_memory_usage("m", 2, 2)
    grant = manager.reserve("m", 20, 1, 1)
    used = {"MB": 3, "tokens": 20, "requests": 1}[record.unit] if limit is not Limit.QUEUE else 0
    usage = manager.get_usage("m")
    assert (usage.left[limit], usage.percent[limit]) == (cap - used, pytest.approx(100 * used / cap))
    most, at_once = bounds_of(manager.get_quota("m"))
    assert (most[limit], at_once[limit]) == (cap, cap)
    if limit is not Limit.QUEUE:
        manager.update_quota("m", **{record.quota_field: None})
        usage = manager.get_usage("m")
        assert (usage.left[limit], usage.percent[limit]) == (None, 0.0)
    grant.release()


@RECORDS
def test_what_is_left_is_admitted_and_not_one_more(manager, record):
    if record.limit is Limit.QUEUE:
        return
    others = {other.quota_field: None for other in DENYING if other is not record}
    manager.update_quota("m", **others)
    manager.update_memory_usage("m", 2, 2)
    manager.clock.advance_ns(1)
    assert manager.check_quota("m", 20, 1, 1)
    left = manager.get_usage("m").left[record.limit]
    if record.limit is Limit.CONCURRENCY:
        grants = [manager.reserve("m", 0) for _ in range(left)]
        assert manager.check_quota("m", 0).limit is record.limit
        for grant in grants:
            grant.release()
        return
    if record.unit == "requests":
        assert all(manager.check_quota("m", 0) for _ in range(left))
        assert manager.check_quota("m", 0).limit is record.limit
        return
    ask = {"MB": {"RAM": (0, left, 0), "SSD": (0, 0, left)}.get(record.limit.name), "tokens": (left, 0, 0)}[record.unit]
    assert manager.check_quota("m", *(count + bool(count) for count in ask)).limit is record.limit
    assert manager.check_quota("m", *ask)


def test_an_allowed_request_is_told_the_fullest_limit(manager):
    for tokens in (20, 100, 300):
        result = manager.check_quota("m", tokens, 1, 1)
        assert result.current_usage >= max(manager.get_usage("m").percent)
    denied = manager.check_quota("m", 100)
    assert denied.limit is Limit.TOKENS_PER_SECOND
    usage = manager.get_usage("m")
    assert denied.current_usage == pytest.approx(usage.percent[denied.limit])
    assert read_utilization(manager).of(denied.limit).tolist() == [usage.percent[denied.limit]]
    remaining = dict(LimitHeaders(manager).of("m", "openai"))[b"x-ratelimit-remaining-tokens"]
    assert int(remaining) == usage.left[denied.limit]


@pytest.mark.parametrize(
    ("limits", "asked", "never"),
    [
        ({"max_tokens_per_hour": 100}, (101,), True),
        ({"max_tokens_per_hour": 100}, (60,), False),
        ({"max_ram_mb": 10}, (1, 11), True),
        ({"max_ram_mb": 10}, (1, 6), False),
        ({"max_concurrent_requests": 0}, (1,), True),
        ({"max_concurrent_requests": 1}, (1,), False),
        ({"max_concurrent_requests": 1, "max_tokens_per_hour": 100}, (101,), True),
        ({"max_requests_per_second": 0}, (1,), True),
        ({"max_tokens_per_second": 0.5, "burst_tokens": 60}, (62,), True),
        ({"max_tokens_per_second": 0.5, "burst_tokens": 60}, (60,), False),
        ({"max_tokens_per_hour": 100, "shadow_limits": ["tokens_per_hour"]}, (101,), False),
    ],
)
def test_a_denial_says_whether_the_request_ever_fits(limits, asked, never):
    other = open_quota("other", max_requests_per_second=1, burst_requests=0)
    manager = make_manager(open_quota("m", **limits), other)
    manager.update_memory_usage("m", 5, 0)
    with held(manager):
        denied = manager.check_quota("m", *asked)
        assert denied.allowed is ("shadow_limits" in limits)
        assert denied.never_fits is never
        manager.check_quota("other", 0)
        assert manager.check_quota(("other", "m"), *asked).never_fits is never
        assert manager.check_quota(("m", "other"), *asked).never_fits is never
        manager.update_quota("m", on_violation="warn")
        assert not manager.check_quota("m", *asked).never_fits


@pytest.mark.parametrize("window", WINDOWS[1:], ids=lambda window: window.name)
def test_few_files_name_a_window(window):
    """Who adds a window has no more files to change. Examples, and the quotas of the demo, name what they like."""
    name = re.compile(
        rf"(per|this)_{window.name}\b|\b{window.name}_|[\"'|]{window.name}\b|{window.adjective}"
        rf"|(tok|tokens|req|requests)/{window.symbol}\b|per {window.name}\b",
        re.IGNORECASE,
    )
    found = []
    for path in sorted(SOURCES.rglob("*")):
        if path.suffix in (".py", ".pyx", ".pxd", ".pyi", ".html", ".json") and "demo" not in path.parts:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".py":
                text = re.sub(r'(?s)("""|\'\'\').*?\1', "", text)
            if name.search(text):
                found.append(str(path.relative_to(SOURCES)))
    assert len(found) <= 6, found
    assert {"quota/config.py", "quota/quotas.schema.json", "reading/report.py"} <= set(found)
