"""One traffic, told by every surface: each request once, waited is not denied, charged and refunded apart."""

import asyncio
import contextlib
import io
import json
from types import SimpleNamespace

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry
from rich.console import Console

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaManager
from modelquota.asgi.page import MOST_SHOWN, page_state
from modelquota.cli.status import print_status, print_status_json
from modelquota.cli.top import Top
from modelquota.monitoring.alerts import AlertMonitor, AlertRule, Severity, check_alerts
from modelquota.monitoring.otel import instrument
from modelquota.monitoring.prometheus import QuotaCollector
from modelquota.quota.limits import Limit, ViolationAction
from modelquota.reading.counting import denied_by_action
from modelquota.reading.utilization import LIMITS, Utilization, denying, read_utilization


async def settle_down():
    for _ in range(20):
        await asyncio.sleep(0)


async def traffic(manager, clock):
    """All actions, every outcome. Returns what is to be told: by model, and in all."""
    manager.set_quota("reject", max_requests_per_hour=2, on_violation="reject")
    manager.set_quota("warn", max_requests_per_hour=1, on_violation="warn")
    manager.set_quota("queue", max_concurrent_requests=1, on_violation="queue", grace_period_sec=10)
    manager.set_quota("throttle", max_requests_per_second=1, burst_requests=0, grace_period_sec=10)
    manager.set_quota("tenant", max_ram_mb=10)
    for _ in range(3):
        manager.check_quota("reject", 10)  # 2 admitted, 1 denied
        manager.check_quota("warn", 20)  # 1 + 2 warned
    manager.check_quota("nobody", 1)
    held = manager.reserve("queue", 100)
    waits = [asyncio.create_task(manager.acquire_async("queue", 50)) for _ in range(2)]
    await settle_down()
    with pytest.raises(QuotaExceededError):
        await manager.acquire_async("queue", 50, timeout=0)  # denied
    given_up = asyncio.create_task(manager.acquire_async("queue", 50, timeout=2))
    await settle_down()
    clock.advance(3)
    await settle_down()
    with pytest.raises(QuotaExceededError):
        await given_up  # denied, after a wait
    held.settle(30)  # 70 given back
    held.release()
    await settle_down()
    (await waits[0]).release()
    await settle_down()
    (await waits[1]).cancel()  # 50 given back
    assert manager.check_quota("throttle", 5)
    assert not manager.check_quota("throttle", 5)  # denied
    later = asyncio.create_task(manager.acquire_async("throttle", 5))
    await settle_down()
    for _ in range(30):  # it is tried again and again
        clock.advance(0.05)
        await settle_down()
    with await later:
        pass
    with manager.reserve(("tenant", "queue", "nobody"), 7) as joint:
        joint.settle(7)
    with pytest.raises(QuotaExceededError):
        manager.reserve(("tenant", "reject"), 7, ram_needed_mb=1)  # denied by "reject", counted there
    manager.enforcement_enabled = False
    assert manager.check_quota("reject", 1)
    manager.enforcement_enabled = True
    models = {  # checks, admitted, waited, denied by action, warned, charged, refunded
        "reject": (5, 3, 0, (2, 0, 0), 0, 21, 0),
        "warn": (3, 3, 0, (0, 0, 0), 2, 60, 0),
        "queue": (6, 4, 2, (0, 0, 2), 0, 207, 120),
        "throttle": (3, 2, 1, (0, 1, 0), 0, 10, 0),
        "tenant": (1, 1, 0, (0, 0, 0), 0, 7, 0),
    }
    unknown = 2
    whole = [sum(figures[i] for figures in models.values()) for i in (0, 1, 2, 4, 5, 6)]
    denied = tuple(sum(figures[3][i] for figures in models.values()) for i in range(3))
    return models, (whole[0] + unknown, whole[1] + unknown, whole[2], denied, *whole[3:])


def of_stats(stats):
    return (
        stats.total_checks, stats.allowed_requests, stats.waited_requests, stats.denied_requests, stats.warned_requests,
        stats.tokens_charged, stats.tokens_refunded,
    )  # fmt: skip


def of_reports(manager):
    found = {}
    for model_id in manager.list_models():
        report = manager.get_model_report(model_id)
        found[model_id] = (
            report.allowed_requests, report.waited_requests, report.denied_requests, report.warned_requests,
            report.tokens_charged, report.tokens_refunded,
        )  # fmt: skip
        assert (report.usage.tokens_total, report.usage.tokens_refunded_total) == found[model_id][-2:]
    return found


def of_status(reader):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_status_json(reader)
    document = json.loads(out.getvalue())
    models = {
        model["model_id"]: (
            model["usage"]["allowed_total"], model["usage"]["waited_total"], model["denied"],
            model["usage"]["warned_total"], model["usage"]["tokens_total"], model["usage"]["tokens_refunded_total"],
        )
        for model in document["models"]
    }  # fmt: skip
    stats = document["stats"]
    names = ("total_checks", "allowed_requests", "waited_requests", "denied_requests", "warned_requests",
             "tokens_charged", "tokens_refunded")  # fmt: skip
    return models, tuple(stats[name] for name in names)


def of_page(manager):
    state = page_state(manager)
    models = {
        model["id"]: tuple(
            model[key] for key in ("admitted", "waited", "refused", "warned", "tokens_charged", "tokens_refunded")
        )
        for model in state["models"]
    }
    keys = ("checks", "admitted", "waited", "refused", "warned", "tokens_charged", "tokens_refunded")
    return models, tuple(state[key] for key in keys)


def of_metrics(series):
    """Figures by model, and of all: `series` gives those of a metric by their labels."""

    def by_model(name):
        return {dict(labels)["model"]: value for labels, value in series(name).items()}

    def by_action(name, **labels):
        return tuple(
            next(v for k, v in series(name).items() if dict(k) == {"action": action, **labels})
            for action in ("reject", "throttle", "queue")
        )

    names = ("checks", "admitted", "waited", "warned", "tokens", "tokens.refunded")
    columns = [by_model(f"modelquota.model.{name}") for name in names]
    models = {
        model_id: (
            *(column[model_id] for column in columns[:3]),
            by_action("modelquota.model.denied", model=model_id),
            *(column[model_id] for column in columns[3:]),
        )
        for model_id in columns[0]
    }
    checks, admitted, waited, warned = (
        series(f"modelquota.{name}")[()] for name in ("checks", "admitted", "waited", "warned")
    )
    return models, (checks, admitted, waited, by_action("modelquota.denied"), warned)


def prometheus(manager):
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))
    families = {family.name: family for family in registry.collect()}

    def series(name):
        family = families[name.replace(".", "_")]
        return {tuple(sorted(sample.labels.items())): sample.value for sample in family.samples}

    return of_metrics(series)


def opentelemetry(manager):
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    instrument(manager, provider.get_meter("modelquota"))
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    found = {metric.name: metric for metric in scope.metrics}
    provider.shutdown()

    def series(name):
        return {tuple(sorted(point.attributes.items())): point.value for point in found[name].data.data_points}

    return of_metrics(series)


def test_every_surface_tells_the_same_of_one_traffic(tmp_path):
    clock = ManualClock(10**12)
    manager = ResourceQuotaManager(path=tmp_path / "state", clock=clock)
    models, whole = asyncio.run(traffic(manager, clock))
    checks, admitted, waited, denied, *rest = whole
    expected = checks, admitted, waited, sum(denied), *rest
    expected_models = {name: (f[1], f[2], sum(f[3]), *f[4:]) for name, f in models.items()}
    assert of_stats(manager.get_stats()) == expected
    assert of_reports(manager) == expected_models
    assert of_page(manager) == of_status(manager) == (expected_models, expected)
    assert prometheus(manager) == opentelemetry(manager) == (models, whole[:5])
    (total, actions, _) = manager_status(manager)
    words = (
        f"{checks} checks, {admitted} allowed ({whole[4]} with a warning, {waited} after a wait), {sum(denied)} denied"
    )
    assert total == f"total: {words}"
    assert actions.endswith(f"tokens: {whole[5]} charged, {whole[6]} refunded")
    console = Console(file=io.StringIO(), width=100)
    print_status(manager, console)
    *lines, last = console.file.getvalue().splitlines()
    assert (
        last == f"{checks} checks, {admitted} allowed ({waited} after a wait), {sum(denied)} denied, {whole[4]} warned"
    )
    for name, (allowed, _, refused, warned, *_) in expected_models.items():
        (line,) = (line for line in lines if line.startswith(name))
        assert line.split()[-2:] == ([str(warned), "warned"] if warned else [str(allowed), str(refused)])
    (alert,) = check_alerts(manager, [AlertRule("v", Severity.WARNING, 0)])
    assert alert.value == sum(denied), "neither warnings nor waits"
    with ResourceQuotaManager.open_readonly(tmp_path / "state") as view:
        assert of_stats(view.get_stats()) == expected
        assert of_reports(view) == expected_models
        assert of_status(view) == (expected_models, expected)
        assert prometheus(view) == (models, whole[:5])


def manager_status(manager):
    out = io.StringIO()
    manager.print_status(file=out)
    return out.getvalue().splitlines()[-3:]


def test_who_waits_for_several_models_waits_once():
    """It is in the queue of each; a denial of somebody else is still one."""
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    for model_id in ("m", "n", "o"):
        manager.set_quota(model_id, max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("m", 1)
        assert not manager.check_quota("m", 1)
        wait = asyncio.create_task(manager.acquire_async(("o", "m", "n"), 1))
        await settle_down()
        assert [manager.get_usage(model_id).queued_requests for model_id in ("m", "n", "o")] == [1, 1, 1]
        stats = manager.get_stats()
        assert (stats.total_checks, stats.allowed_requests, stats.denied_requests) == (3, 1, 1)
        assert of_page(manager)[1] == of_stats(stats)
        held.release()
        (await wait).release()
        stats = manager.get_stats()
        assert (stats.denied_requests, stats.waited_requests) == (1, 1)
        for model_id in ("m", "n", "o"):  # what they counted stays
            manager.remove_quota(model_id)
        assert manager.get_stats() == stats

    asyncio.run(main())


def test_who_waits_is_neither_denied_nor_admitted():
    clock = ManualClock(10**12)
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("m", max_concurrent_requests=1, on_violation="queue")

    async def main():
        held = manager.reserve("m", 1)
        wait = asyncio.create_task(manager.acquire_async("m", 1))
        await settle_down()
        stats = manager.get_stats()
        assert (stats.total_checks, stats.allowed_requests, stats.denied_requests, stats.waited_requests) == (
            2,
            1,
            0,
            0,
        )
        assert of_page(manager)[1] == of_stats(stats)
        assert prometheus(manager) == ({"m": (2, 1, 0, (0, 0, 0), 0, 1, 0)}, (2, 1, 0, (0, 0, 0), 0))
        console = Console(file=io.StringIO(), width=100)
        print_status(manager, console)
        assert console.file.getvalue().endswith("2 checks, 1 allowed, 0 denied, 1 waiting, 0 warned\n")
        top = Top(manager, console)
        held.release()
        (await wait).release()
        console = Console(file=io.StringIO(), width=100)
        console.print(top.screen())
        assert " 0 checks/s  0 denied/s" in console.file.getvalue()

    asyncio.run(main())


def test_a_denial_that_a_wait_ends_in_is_told_once_and_no_counter_falls_meanwhile():
    clock = ManualClock(10**12)
    manager = ResourceQuotaManager(clock=clock)
    manager.set_quota("m", max_concurrent_requests=1, on_violation="queue", grace_period_sec=5)
    registry = CollectorRegistry()
    registry.register(QuotaCollector(manager))

    def told():
        labels = {"action": "queue"}
        return (
            registry.get_sample_value("modelquota_denied_total", labels),
            registry.get_sample_value("modelquota_model_denied_total", {"model": "m", **labels}),
            registry.get_sample_value("modelquota_model_checks_total", {"model": "m"}),
        )

    async def main():
        held = manager.reserve("m", 1)
        waits = [asyncio.create_task(manager.acquire_async("m", 1, timeout=2 + i)) for i in range(2)]
        await settle_down()
        assert told() == (0, 0, 3)
        clock.advance(2.5)
        await settle_down()
        assert told() == (1, 1, 3)
        held.release()
        await settle_down()
        (await waits[1]).release()
        assert told() == (1, 1, 3)
        with pytest.raises(QuotaExceededError):
            await waits[0]
        manager.remove_quota("m")
        assert registry.get_sample_value("modelquota_denied_total", {"action": "queue"}) == 1

    asyncio.run(main())


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((3, 0, 0, 0, 0), (3, 0, 0)),
        ((0, 4, 0, 3, 1), (0, 0, 0)),
        ((0, 0, 9, 3, 1), (0, 0, 5)),
        ((1, 4, 2, 3, 0), (1, 3, 0)),
        ((0, 0, 1, 0, 3), (0, 0, 0)),  # those who wait here were counted at another of their ids
    ],
)
def test_denied_by_action(counts, expected):
    names = ("rejected_total", "throttled_total", "queued_total", "waited_total", "waiting_requests")
    assert tuple(denied_by_action(dict(zip(names, counts, strict=True))).values()) == expected


# -- what only warns hides nobody


@pytest.fixture
def mixed():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    manager.set_quota("trial", max_requests_per_hour=1, max_ram_mb=100, on_violation="warn")
    manager.set_quota("idle")
    manager.set_quota("real", max_ram_mb=100)
    manager.update_memory_usage("real", 95, 0)
    manager.update_memory_usage("trial", 300, 0)
    for _ in range(2000):
        manager.check_quota("trial", 1)
    return manager


def test_a_model_that_only_warns_is_shown_and_is_not_the_pressure(mixed):
    found = read_utilization(mixed)
    assert [found.model_ids[i] for i in found.by_pressure()] == ["real", "idle", "trial"]
    assert found.highest == 95
    assert found.pressure.tolist() == [200_000, 0, 95]
    assert found.denies.tolist() == [False, True, True]
    registry = CollectorRegistry()
    registry.register(QuotaCollector(mixed))
    assert registry.get_sample_value("modelquota_pressure_ratio") == 0.95
    assert registry.get_sample_value("modelquota_model_pressure_ratio", {"model": "trial"}) == 2000
    assert registry.get_sample_value("modelquota_model_enforcing", {"model": "trial"}) == 0
    assert registry.get_sample_value("modelquota_model_enforcing", {"model": "real"}) == 1
    registry = CollectorRegistry()
    registry.register(QuotaCollector(mixed, max_models=0))
    assert registry.get_sample_value("modelquota_model_pressure_ratio", {"model": "(others)"}) == 0.95
    state = page_state(mixed)
    denies = [state["kinds"][model["kind"]]["denies"] for model in state["models"]]
    assert (state["pressure"], denies) == (95, [False, True, True])
    screen = Console(file=io.StringIO(), width=100, height=7)
    screen.print(Top(mixed, screen).screen())
    assert [line.split()[0] for line in screen.file.getvalue().splitlines()[3:5]] == ["real", "idle"]


def test_of_many_models_on_the_page_those_that_deny_come_first():
    manager = ResourceQuotaManager(clock=ManualClock(10**12))
    for i in range(MOST_SHOWN + 50):
        manager.set_quota(f"trial-{i}", max_requests_per_hour=1, on_violation="warn")
        manager.check_quota(f"trial-{i}", 1000)
    manager.set_quota("real", max_ram_mb=100)
    assert "real" in [model["id"] for model in page_state(manager)["models"]]


def test_alerts_of_what_only_warns_are_warnings_and_come_last(mixed):
    alerts = check_alerts(mixed)
    assert [(alert.rule, alert.model_id, alert.severity) for alert in alerts] == [
        ("ram", "real", Severity.CRITICAL),
        ("ram", "trial", Severity.WARNING),
        ("hourly_requests", "trial", Severity.WARNING),
    ], "2,000 warnings are no violation that anybody was denied for"
    assert alerts[1].message == "model 'trial': RAM at 300.0 % of the limit, which denies nothing"
    monitor = AlertMonitor(mixed, [AlertRule("v", Severity.WARNING, 10)])
    for _ in range(50):
        mixed.check_quota("trial", 1)
    assert monitor.poll() == ([], [])


def test_a_limit_in_the_shadow_is_shown_and_is_not_the_pressure(mixed):
    quota = SimpleNamespace(on_violation=ViolationAction.REJECT, shadow_limits=("ram", "tokens_per_hour"))
    assert [limit for limit, denies in zip(LIMITS, denying(quota), strict=True) if not denies] == [
        Limit.RAM,
        Limit.TOKENS_PER_HOUR,
    ]
    quota.on_violation = ViolationAction.WARN
    assert not any(denying(quota))
    found = read_utilization(mixed)
    denies = found.denying.copy()
    denies[2, LIMITS.index(Limit.RAM)] = False  # "real"
    found = Utilization(found.counters, found.quotas, found.percent, denies, found.lives)
    assert found.pressure.tolist() == [200_000, 0, 0]
    assert found.highest == 0
    assert found.of(Limit.RAM).tolist() == [300, 0, 95]
