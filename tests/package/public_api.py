"""Every public name, used as a typed program would use it; nothing runs it. ``mypy --strict`` checks this file."""

import io
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
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
    Answer,
    Demand,
    IncomingRequest,
    Quota,
    QuotaAdmin,
    QuotaMiddleware,
    QuotaPage,
    Reading,
    RequestRefusedError,
    denial_answer,
    estimate_prompt,
    event_tokens,
    openai_routes,
    operations,
    read_demand,
    route_for,
)
from modelquota.asgi.proxy import ReverseProxy
from modelquota.asgi.request import ASGIApp, Scope
from modelquota.asgi.settings import Settings
from modelquota.client import AsyncQuotaTransport, QuotaTransport
from modelquota.control.caches import MemoryProbe, ModelRegistry, ReportsMemory, register_models
from modelquota.control.load import Adjustment, LoadAdjuster, cpu_load
from modelquota.control.reload import QuotaReloader, Reloaded
from modelquota.integrations.vllm import EndpointPlugin, engine_load
from modelquota.monitoring.alerts import DEFAULT_RULES, Alert, AlertMonitor, AlertRule, Severity, check_alerts
from modelquota.monitoring.ledger import Ledger
from modelquota.monitoring.otel import instrument
from modelquota.monitoring.prometheus import QuotaCollector, grafana_dashboard, make_exporter_app, start_exporter
from modelquota.quota.file import Quotas
from modelquota.quota.schema import quota_file_schema
from modelquota.reading.utilization import Utilization, read_utilization
from modelquota.statefile.inspect import StateFileInfo, inspect_file, verify_file
from modelquota.statefile.migrate import Migration, migrate_file
from modelquota.tuning.capacity import Capacity, read_capacity
from modelquota.tuning.plot import svg
from modelquota.tuning.replay import ReplayReport, replay
from modelquota.tuning.trace import Trace, read_trace
from modelquota.tuning.tune import TuneReport, tune
from modelquota.tuning.usage import UsageReport, read_usage
from modelquota.tuning.write import quotas_file


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
    done: Migration = migrate_file(path, keep=False, trust_file=True)
    print(done.models, done.old_file)
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
    report: ReplayReport = replay(trace, quotas, model="m", speed=24, wait=True)
    return report.to_dict()


def tune_trace(path: Path, quotas: dict[str, ResourceQuotaConfig]) -> str:
    trace: Trace = read_trace(path, format="mooncake", time_unit="ms", columns={"user": "who"})
    held: Capacity = read_capacity(["bench.json"], {"p99_ttft": 2_000})
    report: TuneReport = tune(trace, quotas, headroom=0.2, target_denied=0.01, per="user", capacity=held)
    return quotas_file(report) + svg(report)


def keep_a_ledger(manager: ResourceQuotaManager) -> UsageReport:
    with manager.ledger("usage.jsonl", buffer_size=1_000, max_bytes=None, by_day=False) as ledger:
        with ledger.acquire(("acme", "m"), 5, timeout=1) as grant:
            grant.settle(4)
            over: Limit | None = grant.over_limit
        written: bool = ledger.record("m", (1, 2, 3), 5, verdict="admitted", waited_us=1, duration_us=2)
        print(written, over, ledger.lost)
    every: list[Ledger] = [ledger, Ledger("usage.jsonl")]
    print(every)
    return read_usage(["usage.jsonl"], by=["tenant", "day"])


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


def serve(app: ASGIApp, manager: ResourceQuotaManager) -> tuple[ASGIApp, ...]:
    middleware = QuotaMiddleware(
        app,
        manager,
        routes={**openai_routes(prompt_tokens=estimate_prompt, default_output_tokens=64), "/generate": generate},
        identity=tenant,
        page="/quota",
        allow_page=allow,
        admin="/quotas",
        admin_token="0123456789abcdef",
        max_body_bytes=1 << 20,
        chunk_tokens=event_tokens,
        busy_retry_seconds=1,
        cancel_on_disconnect=False,
    )
    print(middleware.unmetered)
    admin = QuotaAdmin(manager, token="0123456789abcdef")
    manager.replace_quota(None, ResourceQuotaConfig("m"), named=True)
    return serve_all(middleware, manager), QuotaPage(manager, allow=allow), admin


def usage(answer: Any) -> Tokens | None:
    return Tokens(input=1, cached=2, output=3).replace(output=4) if isinstance(answer, dict) else None


def serve_all(app: ASGIApp, manager: ResourceQuotaManager) -> ASGIApp:
    def read(body: Mapping[str, Any], params: Mapping[str, str]) -> Reading:
        return Reading(params["model"], len(body), output_bound=5)

    return QuotaMiddleware(
        app,
        manager,
        routes=["openai", "anthropic", {"/models/{model}": route_for("ollama", read), "/x": generate}, operations()],
        unrouted=generate,
        unknown_model="refuse",
        default_model="m",
        identity=lambda request: None,
        identity_namespace="org:",
        default_output_tokens=5,
        max_inflight_bytes=1 << 30,
        body_timeout=1.5,
        usage=usage,
        charge={404: "request", "5xx": "nothing"},
        at_limit="stop",
        headers="openai",
        retry_spread=0.2,
    )


def own_endpoint(manager: ResourceQuotaManager, path: str, body: bytes) -> Answer | None:
    demand: Demand | None = read_demand(path, body, manager=manager)
    if demand is None:
        return None
    try:
        manager.reserve(demand.model_id, demand.estimated_tokens).release()
    except QuotaExceededError as error:
        return denial_answer(manager, error, demand=demand, protocol="anthropic")
    return Answer(200, [], b"")


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


def plug_in(app: ASGIApp, manager: ResourceQuotaManager) -> list[object]:
    settings = Settings.read({"MODELQUOTA_QUOTAS": "quotas.toml"}, page="/quota", state=None)
    print(settings.quotas, settings.state, settings.http)
    protected = Quota(ReverseProxy("http://127.0.0.1:8000", read_timeout=60), settings, {"at_limit": "stop"})
    print(protected.manager, Quota(app), engine_load("http://127.0.0.1:8000/metrics", most_waiting=8)())
    transport = QuotaTransport(manager, ids=lambda model: ("account", model), timeout=5, tables=["openai"])
    with httpx.Client(transport=transport) as client:
        print(client.get("http://127.0.0.1:8000"))
    return [EndpointPlugin(), httpx.AsyncClient(transport=AsyncQuotaTransport(manager, default_model="m"))]


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
