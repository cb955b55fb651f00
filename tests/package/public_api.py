"""Every public name, used as a typed program would use it; nothing runs it. ``mypy --strict`` checks this file."""

import io
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import modelquota
from modelquota import (
    CapacityError,
    Grant,
    GrantClosedError,
    Limit,
    ManualClock,
    ModelQuota,
    ModelReport,
    QuotaCheckResult,
    QuotaConfigError,
    QuotaError,
    QuotaExceededError,
    QuotaFileError,
    QuotaStats,
    ResourceQuotaConfig,
    ResourceQuotaManager,
    ResourceUsage,
    StateFileError,
    Tokens,
    TraceError,
    UnknownModelError,
    ViolationAction,
    ViolationType,
    count_stream,
    load_quotas,
)
from modelquota.asgi import (
    Demand,
    IncomingRequest,
    QuotaMiddleware,
    QuotaPage,
    RequestRefusedError,
    estimate_prompt,
    event_tokens,
    openai_routes,
)
from modelquota.asgi.request import ASGIApp, Scope
from modelquota.control.caches import MemoryProbe, ModelRegistry, ReportsMemory, register_models
from modelquota.control.load import Adjustment, LoadAdjuster, cpu_load
from modelquota.control.reload import QuotaReloader, Reloaded
from modelquota.monitoring.alerts import DEFAULT_RULES, Alert, AlertMonitor, AlertRule, Severity, check_alerts
from modelquota.monitoring.otel import instrument
from modelquota.monitoring.prometheus import QuotaCollector, grafana_dashboard, make_exporter_app, start_exporter
from modelquota.quota.file import Quotas
from modelquota.quota.schema import quota_file_schema
from modelquota.reading.utilization import Utilization, read_utilization
from modelquota.statefile.inspect import StateFileInfo, inspect_file, verify_file
from modelquota.tuning.replay import ReplayReport, replay
from modelquota.tuning.trace import Trace, read_trace


def configure(path: Path) -> dict[str, ResourceQuotaConfig]:
    config = ResourceQuotaConfig("m", max_ram_mb=None, max_requests_per_second=0.5, on_violation="warn")
    config = config.replace(on_violation=ViolationAction.REJECT, grace_period_sec=1)
    config = config.replace(shadow_limits=[Limit.RAM, "ssd"])
    again: ResourceQuotaConfig = ResourceQuotaConfig.from_dict(config.to_dict())
    shadows: tuple[str, ...] = ResourceQuotaConfig.unlimited("m", max_ram_mb=5, shadow_limits="ram").shadow_limits
    print(shadows)
    quotas: dict[str, ResourceQuotaConfig] = load_quotas(path)
    loaded: Quotas = load_quotas(path)
    manager = ResourceQuotaManager(default_quota=loaded.patterns)
    manager.default_quota = lambda model_id: config if model_id.startswith("user:") else None
    manager.default_quota = {**loaded.patterns, "user:*": config}
    print(manager.default_quota)
    manager.default_quota = None
    return {**quotas, again.model_id: again}


def manage(quotas: dict[str, ResourceQuotaConfig]) -> ResourceQuotaManager:
    clock = ManualClock(now_ns=0)
    manager = ResourceQuotaManager(clock=clock, default_quota=quotas["m"], max_models=100)
    for config in quotas.values():
        manager.set_quota(config)
    manager.set_quota("other", max_tokens_per_hour=5)
    changed: ResourceQuotaConfig = manager.update_quota("other", burst_tokens=5)
    removed: bool = manager.remove_quota(changed.model_id)
    manager.enforcement_enabled = not removed
    clock.advance(1.5)
    clock.advance_ns(5)
    given: ManualClock | None = manager.clock
    assert given is clock
    return manager


def check(manager: ResourceQuotaManager) -> int | None:
    result: QuotaCheckResult = manager.check_quota("m", estimated_tokens=100, ram_needed_mb=1, ssd_needed_mb=1)
    handle: ModelQuota = manager.model("m")
    result = handle.check(np.int64(5))
    limit: Limit | None = result.limit
    kind: ViolationType | None = result.violation_type
    action: ViolationAction | None = result.action
    words: str | None = result.reason
    share: float = result.current_usage
    if result or result.allowed:
        print(limit, kind, action, words, share)
    handle.get_quota().replace(burst_tokens=1)
    handle.update_quota(burst_requests=1)
    handle.update_memory_usage(1, 2)
    handle.reset_burst()
    return result.retry_after_ms


def check_in_batches(manager: ResourceQuotaManager) -> NDArray[np.uint8]:
    rows: NDArray[np.int64] = manager.codes(["m", "m"])
    retry = np.zeros(2, np.int64)
    manager.charge_many(rows, np.array([1, 2]))
    manager.charge_many(rows, 1)
    return manager.check_many(rows, [1, 2], np.zeros(2, np.uint8), times_ns=[5, 6], retry_after_ms=retry)


def grant(manager: ResourceQuotaManager) -> tuple[int | Tokens, bool]:
    with manager.reserve(("tenant", "m"), estimated_tokens=100, ram_needed_mb=1) as held:
        goes_on: bool = held.add(1)
        names: tuple[str, ...] = held.model_ids
        print(names, held.estimated_tokens, held.limit_reached, held.released)
    other: Grant = manager.acquire("m", 5, timeout=1.5, priority=2)
    other.settle(np.int64(3))
    other.release()
    again = manager.reserve("m", 1)
    manager.settle_many([again], np.array([1]))
    manager.reserve("m", 1).cancel()
    manager.model("m").reserve(1).cancel()
    manager.model("m").acquire(1, timeout=1).cancel()
    by_kind = Tokens(input=1_200, cached=800, output=256)
    total: int = by_kind.total + by_kind.replace(output=1).output
    manager.check_quota("m", by_kind)
    with manager.reserve("m", by_kind) as held:
        held.settle(by_kind)
    codes, over = manager.codes(["m"]), np.zeros(1, np.uint8)
    many: list[Grant | None] = manager.reserve_many(codes, by_kind, out=over)
    manager.charge_many(codes, by_kind, over=over)
    print(total, many, manager.check_many(codes.reshape(1, 1), by_kind))
    return other.tokens, goes_on


async def words() -> AsyncIterator[str]:
    yield "one"


async def wait(manager: ResourceQuotaManager) -> list[str]:
    @manager.limit("m", estimated_tokens=lambda prompt: len(prompt), actual_tokens=len, timeout=1.0)
    async def complete(prompt: str) -> str:
        return prompt

    @manager.limit(("tenant", "m"), estimated_tokens=5)
    def twice(number: int) -> int:
        return 2 * number

    four: int = twice(2)
    said: str = await complete("hello")
    first: Grant = await manager.acquire_async("m", 5, ssd_needed_mb=1)
    first.release()
    async with manager.acquire_async(["m"], 5, priority=1, timeout=3) as held:
        return [f"{said}{four}{word}" async for word in count_stream(held, words(), tokens=len)]


def share(path: Path) -> list[str]:
    manager = ResourceQuotaManager(path=path, max_models=100, trust_file=True)
    manager.flush()
    kept: str | None = manager.path
    with ResourceQuotaManager.open_readonly(bytes(path), trust_file=True) as view:
        usage: ResourceUsage | None = view.get_usage("m")
        print(kept, usage, view.get_stats().recoveries, view.snapshot(), view.list_models())
    info: StateFileInfo = inspect_file(path)
    print(info.models, info.processes)
    return verify_file(path)


def read(manager: ResourceQuotaManager) -> NDArray[np.void]:
    usage: ResourceUsage | None = manager.get_usage("m")
    report: ModelReport | None = manager.get_model_report("m")
    stats: QuotaStats = manager.get_stats()
    models: list[str] = manager.list_models()
    manager.update_memory_usage("m", 1, 1)
    manager.reset_burst("m")
    manager.print_status(file=io.StringIO())
    print(usage and usage.tokens_this_hour, report and report.hourly_quota_used, stats.total_checks, models)
    print(manager.get_quota("m"), manager.max_models, modelquota.__version__)
    return manager.snapshot()


def run_trace(path: Path, quotas: dict[str, ResourceQuotaConfig]) -> dict[str, object]:
    trace: Trace = read_trace(path)
    report: ReplayReport = replay(trace, quotas, model="m", speed=24)
    return report.to_dict()


async def generate(request: IncomingRequest) -> Demand | None:
    if request.header("x-free") is not None:
        return None
    body = request.json()
    if "text" not in body:
        raise RequestRefusedError(400, "text is missing", code="missing", param="text")
    return Demand(("tenant", "m"), estimated_tokens=estimate_prompt(body), ram_needed_mb=1, timeout=5.0, priority=1)


def tenant(request: IncomingRequest) -> str | list[str]:
    return request.header("x-tenant") or ["a", "b"]


def allow(scope: Scope) -> bool:
    return str(scope["path"]) == "/quota"


def serve(app: ASGIApp, manager: ResourceQuotaManager) -> tuple[ASGIApp, ASGIApp]:
    middleware = QuotaMiddleware(
        app,
        manager,
        routes={**openai_routes(prompt_tokens=estimate_prompt, default_output_tokens=64), "/generate": generate},
        identity=tenant,
        page="/quota",
        allow_page=allow,
        max_body_bytes=1 << 20,
        chunk_tokens=event_tokens,
        busy_retry_seconds=1,
        cancel_on_disconnect=False,
    )
    return middleware, QuotaPage(manager, allow=allow)


def export(manager: ResourceQuotaManager) -> str:
    found: Utilization = read_utilization(manager)
    pressure: NDArray[np.float64] = found.pressure
    print(found.model_ids, pressure, found.by_pressure(), found.of(Limit.RAM), found.nearest, found.quotas, len(found))
    QuotaCollector(manager, max_models=50).collect()
    make_exporter_app(manager)
    instrument(manager, max_models=10)
    server, thread = start_exporter(manager, 0, addr="127.0.0.1")
    server.shutdown()
    thread.join()
    return grafana_dashboard()


def watch(manager: ResourceQuotaManager) -> list[Alert]:
    rules = [*DEFAULT_RULES, AlertRule("burst", Severity.CRITICAL, 95, Limit.TOKENS_PER_SECOND, clear_at=50)]
    with AlertMonitor(manager, rules, on_raise=lambda alert: print(alert.message), on_clear=print) as monitor:
        monitor.start(interval_sec=10.0)
        raised, cleared = monitor.poll()
        for alert in [*raised, *cleared, *monitor.active]:
            print(alert.rule, alert.severity, alert.model_id, alert.value, alert.threshold)
    return check_alerts(manager)


def adjust(manager: ResourceQuotaManager) -> float:
    with LoadAdjuster(manager, cpu_load(), models=["m"], floor=0.4, relaxed_action="warn") as adjuster:
        adjuster.start(1.0)
        change: Adjustment | None = adjuster.poll()
        print(change and (change.load, change.before, change.factor), adjuster.running)
        adjuster.undo()
    return adjuster.factor


def remember(manager: ResourceQuotaManager, registry: ModelRegistry, caches: dict[str, ReportsMemory]) -> bool:
    changed: list[str] = register_models(manager, registry)
    with MemoryProbe(manager, caches).start(interval_sec=1) as probe:
        updated: list[str] = probe.poll()
        print(changed, updated)
        return probe.update("m")


def follow(manager: ResourceQuotaManager, path: Path) -> dict[str, object]:
    with QuotaReloader(manager, path, remove_missing=True).start() as reloader:
        done: Reloaded = reloader.reload()
        print(done.changed, done.missing, done.error, done.changed_patterns, done.missing_patterns)
    return quota_file_schema()


def handle_errors() -> None:
    try:
        manage({})
    except QuotaFileError as error:
        print(error.path, error.table, error.field, error.line)
    except QuotaConfigError as error:
        print(error.field, error.value, error.accepted)
    except UnknownModelError as error:
        print(error.model_id)
    except CapacityError as error:
        print(error.max_models, error.what, error.remedy)
    except QuotaExceededError as error:
        print(error.result.limit, error.result.model_id, error.retry_after_ms)
    except GrantClosedError as error:
        print(error.verb, error.stage)
    except StateFileError as error:
        print(error.path, error.message)
    except TraceError as error:
        print(error.path, error.line, error.column)
    except QuotaError:
        raise
