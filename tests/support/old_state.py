"""A history that uses every feature of a state file, what is asked of it afterwards, and how the samples were made.

The samples under ``tests/sharing/data`` are state files that earlier versions wrote. Each was made by running this file
with the sources of that version, the last one with its layout, built in place in a checkout of their own::

    PYTHONPATH=CHECKOUT/src python tests/support/old_state.py tests/sharing/data/layout4

It writes ``layout4.state.gz``, the file as a process that was killed has left it, and ``layout4.json``: what that
version itself, having opened the file again, reads in it and decides, at once and later. With a name that ends in
``-killed``, the process was killed in the middle of changes, see `interrupt`. When the layout changes, run it with the
last commit before the change, and add the names to ``SAMPLES`` in ``test_statefile_migrate.py``.
"""

from __future__ import annotations

import gzip
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from modelquota import ManualClock, QuotaExceededError, ResourceQuotaConfig, ResourceQuotaManager

BEGIN_NS = 3_000_000 * 10**9 + 123_456_789
MAX_MODELS = 24
LONGEST_ID = "é" * 127 + "x"  # 255 bytes
SHADOWS = "shadow_limits" in inspect.signature(ResourceQuotaConfig).parameters
"""Whether this version has shadow limits."""
METERS = "token_weights" in inspect.signature(ResourceQuotaConfig).parameters
"""Whether this version has meters, and limits per minute and month."""
NONE: dict[str, Any] = {
    "max_ram_mb": None,
    "max_ssd_mb": None,
    "max_requests_per_second": None,
    "max_tokens_per_second": None,
    "max_requests_per_hour": None,
    "max_tokens_per_hour": None,
    "max_requests_per_day": None,
    "max_tokens_per_day": None,
    "max_concurrent_requests": None,
    "burst_requests": 0,
    "burst_tokens": 0,
    "on_violation": "reject",
}
QUOTAS: dict[str, dict[str, Any]] = {
    "everything": {
        "max_ram_mb": 1000,
        "max_ssd_mb": 500,
        "max_requests_per_second": 5,
        "max_tokens_per_second": 400,
        "max_requests_per_hour": 900,
        "max_tokens_per_hour": 60_000,
        "max_requests_per_day": 7_000,
        "max_tokens_per_day": 700_000,
        "max_concurrent_requests": 8,
        "max_queued_requests": 50,
        "burst_requests": 4,
        "burst_tokens": 700,
        "on_violation": "throttle",
        "grace_period_sec": 1.5,
    },
    "fraction": {
        "max_requests_per_second": 0.1,
        "max_tokens_per_second": 1 / 3,
        "burst_requests": 20,
        "burst_tokens": 999,
    },
    "overdrawn": {"max_tokens_per_hour": 500, "max_requests_per_day": 20, "on_violation": "warn"},
    "queue": {"max_concurrent_requests": 1, "max_tokens_per_hour": 10**9, "on_violation": "queue"},
    "memory": {"max_ram_mb": 64, "max_ssd_mb": 10**6},
    "refunds": {"max_tokens_per_second": 50, "burst_tokens": 3_000, "max_tokens_per_hour": 40_000},
    "no rate now": {"max_tokens_per_second": 30, "burst_tokens": 2_000, "max_requests_per_second": 2},
    "rate since": {"max_tokens_per_day": 400_000},
    "closed": {"max_requests_per_second": 0},
    "no limit": {},
    "idle": {"max_tokens_per_hour": 10},
    "removed": {"max_tokens_per_hour": 800},
    LONGEST_ID: {"max_tokens_per_day": 900_000, "max_requests_per_hour": 77},
}
METERED: dict[str, dict[str, Any]] = {
    "metered": {"max_tokens_per_minute": 900, "max_requests_per_month": 5_000, "unit": "usd"},
    "metered#output": {"max_tokens_per_month": 300_000, "token_weights": (0, 0.5, 2), "max_requests_per_minute": 3},
    "metered#all": {"max_tokens_per_day": 10**6},
}
SIGHT = {"max_tokens_per_hour": 3_000, "max_requests_per_second": 1.5, "burst_requests": 2, "on_violation": "reject"}
USED = [name for name in QUOTAS if name not in ("idle", "queue")]


def on_sight(model_id: str) -> ResourceQuotaConfig | None:
    """The template of the history's managers."""
    return ResourceQuotaConfig(model_id, **{**NONE, **SIGHT}) if model_id.startswith("sight/") else None


def live(
    manager: ResourceQuotaManager, clock: ManualClock, *, shadows: bool = SHADOWS, meters: bool = METERS
) -> list[Any]:
    """Live through the history, from `BEGIN_NS` on.

    Returns what must not be collected: an open grant, and a thread whose request waits.
    """
    for name, limits in QUOTAS.items():
        manager.set_quota(ResourceQuotaConfig(name, **{**NONE, **limits}))
    if shadows:
        manager.update_quota("overdrawn", shadow_limits=["tokens_per_hour", "requests_per_day"])
        manager.update_quota("memory", shadow_limits=["ram"])
    names = [*USED, "sight/one", "sight/two"]
    if meters:
        names.append("metered")
        for name, limits in METERED.items():
            manager.set_quota(ResourceQuotaConfig(name, **{**NONE, **limits}))
    use(manager, clock, 400, 211.7, names)  # a day, in steps that meet all slots of the windows at other places
    use(manager, clock, 120, 31.3, names)  # an hour
    manager.update_quota("no rate now", max_tokens_per_second=None, max_requests_per_second=None)
    manager.update_quota("rate since", max_tokens_per_second=100.25, burst_tokens=77)
    manager.update_memory_usage("memory", 60, 12_345)
    manager.update_memory_usage("memory", 20, 345)
    manager.update_memory_usage("everything", 900, 400)
    manager.remove_quota("removed")
    for size in (100, 900):
        with manager.reserve("refunds", size) as grant:
            clock.advance(0.35)
            grant.settle(size // 3)
    manager.check_quota("nobody", 1)
    use(manager, clock, 40, 0.011, ["everything", "no rate now", "rate since", "sight/one", "fraction"])
    grant = manager.reserve("queue", 17, ram_needed_mb=5)
    thread = threading.Thread(target=wait_in_vain, args=(manager,), daemon=True)
    thread.start()
    while manager.get_usage("queue").queued_requests == 0:
        time.sleep(0.001)
    return [grant, thread]


def wait_in_vain(manager: ResourceQuotaManager) -> None:
    """Wait in the queue until the manager is closed, or the process ends."""
    with manager.acquire("queue", 1):
        pass


def use(
    manager: ResourceQuotaManager, clock: ManualClock, rounds: int, step_s: float, names: list[str] | None = None
) -> None:
    """Use the models, each round a step later, in amounts that differ."""
    for number in range(rounds):
        clock.advance(step_s)
        for place, name in enumerate(names or [*USED, "sight/one", "sight/two"]):
            if name in ("sight/two", "removed") and number % 3:
                continue
            manager.check_quota(name, (number * 37 + place * 91) % 480)


# -- what is asked of it

FIELDS = [
    *(f"{what}_{kind}_mb" for what in ("current", "peak", "reserved") for kind in ("ram", "ssd")),
    *(f"{what}_this_{window}" for what in ("requests", "tokens") for window in ("second", "hour", "day")),
    *("burst_requests_used", "burst_tokens_used", "concurrent_requests", "queued_requests"),
    *(f"{kind}_violations" for kind in ("total", "ram", "ssd", "rate", "quota", "concurrency")),
    *("tokens_total", "tokens_refunded_total"),
]
REPORT = [f"{what}_requests" for what in ("allowed", "denied", "waited", "warned")]
STATS = [
    *("rejected_requests", "throttled_requests", "queued_requests", "allowed_requests", "warned_requests"),
    *("waited_requests", "total_violations", "ram_violations", "rate_violations", "quota_violations"),
    *("tokens_charged", "tokens_refunded"),
]
LIMITS = sorted({*NONE, "grace_period_sec", "max_queued_requests"})
LATER_S = (0.0, 0.004, 0.02, 0.3, 0.9, 7.0, 31.0, 240.0, 1_800.0, 2_000.0, 9_000.0, 40_000.0, 50_000.0)


def read(manager: ResourceQuotaManager) -> dict[str, Any]:
    """What each model has used, and what the reports and totals say."""
    models = {}
    for name in manager.list_models():
        usage, report = manager.get_usage(name), manager.get_model_report(name)
        limits = manager.get_quota(name).to_dict()
        models[name] = {
            "limits": [limits[field] for field in LIMITS],
            "shadow_limits": sorted(limits.get("shadow_limits", [])),
            "usage": [getattr(usage, field) for field in FIELDS],
            "report": [getattr(report, field) for field in REPORT],
        }
    stats = manager.get_stats()
    return {"models": models, "stats": [getattr(stats, field) for field in STATS]}


def decide(manager: ResourceQuotaManager, number: int) -> dict[str, Any]:
    """Ask every model for several requests, and settle one of them for less; what the answers were."""
    answers = {}
    for place, name in enumerate(manager.list_models()):
        said: list[Any] = []
        for size in (1, 40 + 13 * place + number, 900):
            result = manager.check_quota(name, size)
            said.append([bool(result), result.limit.name if result.limit else None, result.retry_after_ms])
        try:
            with manager.reserve(name, 60 + number) as grant:
                grant.settle(7)
            said.append("settled")
        except QuotaExceededError as error:
            said.append([error.result.limit.name if error.result.limit else None, error.result.retry_after_ms])
        answers[name] = said
    return answers


def ask(manager: ResourceQuotaManager, clock: ManualClock) -> list[dict[str, Any]]:
    """Read and decide, at once and at later times, as plain JSON values."""
    found = []
    for number, seconds in enumerate(LATER_S):
        clock.advance(seconds)
        if number == 4 and manager.get_quota("no rate now").max_tokens_per_second is None:
            manager.update_quota("no rate now", max_tokens_per_second=20)  # a dormant level wakes
        found.append({"read": read(manager), "decided": decide(manager, number)})
    answers: list[dict[str, Any]] = json.loads(json.dumps(found))
    return answers


# -- making a sample

DEAD = 7 << 10 | 5
"""The seat word of a process that has died."""


def interrupt(manager: Any) -> None:
    """Leave rows as a process does that is killed in the middle of a change, under its lock.

    One is being charged, the windows of one are being turned, and one is given other limits.
    """
    header, rows, ledgers = manager._arrays()
    codes = manager.codes if hasattr(manager, "codes") else manager.rows  # as it was called before
    index = {name: int(codes([name])[0]) & 0xFFFF_FFFF for name in QUOTAS if name != "removed"}
    for name in ("everything", "fraction", "rate since", "no rate now"):
        row, ledger = rows[index[name]], ledgers[index[name]]
        row["lock"] = DEAD
        for what in ("request", "token"):
            ledger[f"journal_{what}s"] = ledger[f"{what}s_mark"] - row[f"{what}_room"].view("u8")
    row, ledger = rows[index["everything"]], ledgers[index["everything"]]
    ledger["stage"], row["request_room"], row["token_room"], ledger["tokens_mark"] = 1, 17, -3, 5
    ledger["requests_base"][-2] += 2
    in_ledger = "tokens" in ledgers.dtype.names
    for name, stage in (("fraction", 4), ("rate since", 5)) if in_ledger else ():
        # the window of an hour is in the middle, or done
        turn(rows[index[name]], ledgers[index[name]], stage)
    row, donor = (
        rows[index["no rate now"]],
        index["everything" if "staged_row_before" in header.dtype.names else "no limit"],
    )
    change_limits(header[0], index["no rate now"], row, rows[donor], ledgers[donor])


def turn(row: Any, ledger: Any, stage: int) -> None:
    """Turn the windows on, as far as a stage: by 20 minutes or, if the window of an hour is done, by 3 hours."""
    now = int(row["slot_end_ns"]) * 3 // 50_000_000 - 1
    ledger["journal_slot"], ledger["stage"] = now + (72_000 if stage == 4 else 648_000) + 5, stage
    for what in ("requests", "tokens"):
        charged = ledger[f"journal_{what}"]
        ledger[f"{what}_base"][0] = ledger[f"{what}_start"][0] = charged
        ledger[f"journal_{what}_start"] = ledger[f"{what}_start"][1]
        ledger[f"{what}_base"][1] = ledger[f"{what}_start"][1] = charged
        if stage == 4:  # some of what the slots have is of the time after it
            ledger[what][1][now // 3600 % 60] = 99
    ledger["journal_filled"] = ledger["filled"][1]
    ledger["filled"][:2] = 0


def change_limits(header: Any, index: int, row: Any, donor: Any, limits: Any) -> None:
    """Begin to give a row the limits of another one."""
    header["staged_generation"] = row["generation"]
    for what in ("request", "token"):
        header["staged"][f"{what}_limits"] = limits[f"{what}_limit"]
        for name in ("cap", "drain", "shift"):
            header["staged"][f"{what}_{name}"] = donor[f"{what}_{name}"]
    for name in set(header["staged"].dtype.names) & set(limits.dtype.names):
        header["staged"][name] = limits[name]
    if "staged_row_before" in header.dtype.names:
        header["staged"]["shadow"] = donor["shadow"]
        header["staged_row_before"] = row
    else:
        for what in ("request", "token"):
            header[f"staged_{what}_level"], header[f"staged_{what}_shift"] = row[f"{what}_level"], row[f"{what}_shift"]
    header["staged_row"] = index
    row["token_level"]["low"] = 12_345
    row["token_shift"] = donor["token_shift"]


def main(name: str, state: str = "", kind: str = "") -> None:
    """Make a sample; with `state`, only live through the history there, and die."""
    clock = ManualClock(BEGIN_NS)
    if state:
        manager = ResourceQuotaManager(path=state, clock=clock, max_models=MAX_MODELS, default_quota=on_sight)
        held = live(
            manager,
            clock,
            shadows=SHADOWS and kind != "no shadows",
            meters=METERS and kind not in ("no shadows", "old"),
        )
        if kind == "killed":
            interrupt(manager)
        Path(name).write_text(str(clock.now_ns))
        os._exit(0 if held else 1)
    with tempfile.TemporaryDirectory() as folder:
        file, end = Path(folder, "sample.state"), Path(folder, "end")
        subprocess.run([sys.executable, __file__, end, file, name.rpartition("-")[2]], check=True)
        with open(file, "rb") as source, gzip.GzipFile(f"{name}.state.gz", "wb", mtime=0) as target:
            shutil.copyfileobj(source, target)
        end_ns = int(end.read_text())
        clock = ManualClock(end_ns)
        manager = ResourceQuotaManager(path=file, clock=clock, default_quota=on_sight)
        document = json.dumps(
            {"end_ns": end_ns, "answers": ask(manager, clock)}, ensure_ascii=False, separators=(",", ":")
        )
        Path(f"{name}.json").write_text(document + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
