"""Every public verb of managers, handles, grants and views, with arguments that are good: what is new is added here."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from typing import Any

import numpy as np

from modelquota import ResourceQuotaConfig

Verb = Callable[[Any], object]

CODES = np.array([1 << 32], np.int64)
"""The code of the first model of a state."""


def in_task(make: Callable[[], Any]) -> object:
    """The first step of a coroutine, in a loop that is made for it; without a descriptor, as a child may have none."""
    coroutine = make()
    asyncio._set_running_loop(asyncio.AbstractEventLoop())
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    finally:
        asyncio._set_running_loop(None)
        coroutine.close()
    raise AssertionError("it waits")


def new_row(manager: Any) -> object:
    """Make the manager look for a model that it has not seen."""
    return manager.set_quota("new to it")


def set_enforcement(manager: Any) -> None:
    """Assign to the property."""
    manager.enforcement_enabled = True


MANAGER: dict[str, Verb] = {
    "check_quota": lambda m: m.check_quota("m", 1),
    "check_quota of several": lambda m: m.check_quota(("m", "n"), 1),
    "check_quota of an unknown id": lambda m: m.check_quota("unheard of", 1),
    "peek_quota": lambda m: m.peek_quota("m", 1),
    "reserve": lambda m: m.reserve("m", 1),
    "reserve of several": lambda m: m.reserve(["m", "n"], 1, 1),
    "acquire": lambda m: m.acquire("m", 1),
    "acquire of several": lambda m: m.acquire(("n", "m"), 1),
    "acquire_async": lambda m: in_task(lambda: m.acquire_async("m", 1)),
    "limit": lambda m: m.limit("m", 1)(lambda: None)(),
    "codes": lambda m: m.codes(["m"]),
    "check_many": lambda m: m.check_many(CODES, 1),
    "charge_many": lambda m: m.charge_many(CODES, 1),
    "reserve_many": lambda m: [grant.release() for grant in m.reserve_many(CODES, 1) if grant is not None],
    "model": lambda m: m.model("m"),
    "set_quota": lambda m: m.set_quota("m", max_ram_mb=77),
    "set_quota of a new model": new_row,
    "update_quota": lambda m: m.update_quota("m", max_ram_mb=77),
    "replace_quota": lambda m: m.replace_quota(ResourceQuotaConfig("m"), ResourceQuotaConfig("m", max_ram_mb=78)),
    "update_memory_usage": lambda m: m.update_memory_usage("m", 1, 1),
    "reset_burst": lambda m: m.reset_burst("m"),
    "get_quota": lambda m: m.get_quota("m"),
    "get_usage": lambda m: m.get_usage("m"),
    "get_model_report": lambda m: m.get_model_report("m"),
    "get_stats": lambda m: m.get_stats(),
    "list_models": lambda m: m.list_models(),
    "print_status": lambda m: m.print_status(io.StringIO()),
    "snapshot": lambda m: m.snapshot(),
    "flush": lambda m: m.flush(),
    "enforcement_enabled": lambda m: m.enforcement_enabled,
    "enforcement_enabled =": set_enforcement,
    "max_models": lambda m: m.max_models,
    "remove_quota": lambda m: m.remove_quota("m"),
}
# close may be called again, settle_many is a verb of grants, rows is the old name of codes, ledger opens a file and
# leaves the manager alone, the rest are values that were given at the start
NO_VERBS_OF_A_MANAGER = {
    "close",
    "closed",
    "clock",
    "cluster",
    "default_quota",
    "ledger",
    "path",
    "open_readonly",
    "settle_many",
    "rows",
}

HANDLE: dict[str, Verb] = {
    "check": lambda h: h.check(1),
    "reserve": lambda h: h.reserve(1),
    "acquire": lambda h: h.acquire(1),
    "acquire_async": lambda h: in_task(lambda: h.acquire_async(1)),
    "get_quota": lambda h: h.get_quota(),
    "get_usage": lambda h: h.get_usage(),
    "get_model_report": lambda h: h.get_model_report(),
    "update_quota": lambda h: h.update_quota(max_ram_mb=78),
    "update_memory_usage": lambda h: h.update_memory_usage(1, 1),
    "reset_burst": lambda h: h.reset_burst(),
}
NO_VERBS_OF_A_HANDLE = {"manager", "model_id"}

GRANT: dict[str, Verb] = {
    "add": lambda g: g.add(1),
    "settle": lambda g: g.settle(3),
    "cancel": lambda g: g.cancel(),
}
# release and leaving `with` are harmless however often; the rest says what was
NO_VERBS_OF_A_GRANT = {"release", "released", "estimated_tokens", "limit_reached", "over_limit", "model_ids", "tokens"}

VIEW: dict[str, Verb] = {
    "get_quota": lambda v: v.get_quota("m"),
    "get_usage": lambda v: v.get_usage("m"),
    "get_model_report": lambda v: v.get_model_report("m"),
    "get_stats": lambda v: v.get_stats(),
    "list_models": lambda v: v.list_models(),
    "print_status": lambda v: v.print_status(io.StringIO()),
    "snapshot": lambda v: v.snapshot(),
    "enforcement_enabled": lambda v: v.enforcement_enabled,
}
NO_VERBS_OF_A_VIEW = {"close", "cluster", "path", "max_models"}


def missing(thing: object, verbs: dict[str, Verb], others: set[str]) -> set[str]:
    """Public names of a thing that are neither in its table nor known to be none."""
    named = {name.split(" ")[0] for name in verbs}
    return {name for name in dir(thing) if not name.startswith("_")} - named - others


def outcomes(verbs: dict[str, Verb], thing: object) -> dict[str, str]:
    """What each verb comes to: the name of the error, or what it returned."""
    found = {}
    for name, verb in verbs.items():
        try:
            found[name] = repr(verb(thing))
        except Exception as error:
            found[name] = type(error).__name__
    return found
