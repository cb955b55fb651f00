"""What operators do with a ledger, from any machine: publish quotas, read what is used, forget a host that is gone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from modelquota.cluster.quantities import NAMES, in_units
from modelquota.cluster.redis import text_of
from modelquota.cluster.store import FORMAT, quantities_in, require_format
from modelquota.errors import QuotaConfigError
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.quota.file import Quotas

if TYPE_CHECKING:
    from collections.abc import Iterator

    from modelquota.cluster.redis import RedisStore

_KEYS: Final = ("meta", "nodes", "ghosts")


@dataclass(frozen=True, slots=True)
class NodeState:
    """A host that the ledger knows.

    Attributes
    ----------
    node_id : str
    live : bool
        False for a ghost: its lease has ended, and what it held is not free yet, or its record is not dropped yet.
    seconds : float
        What is left of its lease; of a ghost, until the last of it is free.
    models : int
        In how many models it has a share.
    """

    node_id: str
    live: bool
    seconds: float
    models: int


@dataclass(frozen=True, slots=True)
class LimitState:
    """One limit of a model over all hosts, in requests or tokens, by what each host last told.

    Attributes
    ----------
    model_id, limit : str
        The limit's name is as in `Share`.
    whole : float
        The limit.
    used : float
        What hosts use, and what those that left or are gone had used.
    shares : float
        What live hosts hold.
    ghosts : float
        What is taken by hosts that left or are gone.
    free : float
        What is left.
    """

    model_id: str
    limit: str
    whole: float
    used: float
    shares: float
    ghosts: float
    free: float


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What a ledger says: its hosts, the limits that they share, and for how long it grants nothing yet."""

    nodes: tuple[NodeState, ...]
    limits: tuple[LimitState, ...]
    learning_seconds: float
    quotas_version: int


def publish(store: RedisStore, quotas: Quotas) -> int:
    """Publish quotas for all hosts, and return their version. Raises StoreError.

    Hosts adopt them at their next exchange, within `renew_sec` while they are used, and keep what was used. Published
    are models and patterns; ``[http]``, ``[keys]`` and ``[cluster]`` stay in the file.
    """
    keys = [*(store.base + key for key in _KEYS), f"{store.base}quotas"]
    return int(_run(store, keys, [FORMAT, "publish", _as_text(quotas)]))


def published(store: RedisStore) -> tuple[int, Quotas] | None:
    """Return the version of the published quotas, and these; None if there are none.

    Raises StoreError, and QuotaConfigError for quotas that this version does not know.
    """
    fields = dict(_pairs(store.command("HGETALL", f"{store.base}quotas")))
    if not fields:
        return None
    try:
        document = json.loads(fields["text"])
        configs = {name: [ResourceQuotaConfig.from_dict(config) for config in document[name]] for name in document}
        models, patterns = ({config.model_id: config for config in configs[name]} for name in ("models", "patterns"))
        return int(fields["version"]), Quotas(models, patterns)
    except QuotaConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise QuotaConfigError(
            "published quotas",
            fields.get("text"),
            "what `modelquota publish` of this version writes: publish them again",
        ) from error


def forget(store: RedisStore, node_id: str) -> bool:
    """Drop what a host that is gone still holds: it is free at once. False if the ledger does not know the host.

    More than a limit may be admitted, if the host had used what it held, or still runs without reaching the store: its
    use is no longer counted.

    Raises
    ------
    QuotaConfigError
        The host is live.
    StoreError
        The store cannot be used.
    """
    keys = [*(store.base + key for key in _KEYS), f"{store.base}node:{node_id}"]
    answer = _run(store, keys, [FORMAT, "forget", node_id, "0", "", "", "", "0", "0"])
    if answer == "live":
        raise QuotaConfigError("node_id", node_id, "a host whose lease has ended; this one is live")
    return answer == "forgotten"


def read_cluster(store: RedisStore) -> ClusterState:
    """Read what all hosts use and hold. Raises StoreError. It changes nothing; with one command for each host."""
    meta = dict(_pairs(store.command("HGETALL", f"{store.base}meta")))
    if meta.get("format", FORMAT) != FORMAT:
        require_format("format")
    seconds, microseconds = (int(text_of(part)) for part in store.command("TIME"))
    raw = seconds * 1000 + microseconds // 1000
    now = int(meta.get("clock", raw)) + max(0, raw - int(meta.get("raw", raw)))
    leases = _scores(store, "nodes")
    ghosts = _scores(store, "ghosts")
    gone: dict[str, float] = {}
    lent: dict[str, dict[int, int]] = {}
    for member, due in ghosts.items():
        kind = member[0]
        if kind == "h":
            _, number, amount, _, _, node_id, name = member.split(":", 6)
            of, quantity = lent.setdefault(name, {}), int(number) - 1
            of[quantity] = of.get(quantity, 0) + int(amount)
        else:
            node_id = member.split(":", 2 if kind == "d" else 1)[-1]
        gone[node_id] = max(due, gone.get(node_id, 0.0))
    for node_id, end in leases.items():
        if end < now:  # no exchange has counted it among the ghosts yet
            holds = json.loads(text_of(store.command("HGET", f"{store.base}node:{node_id}", "holds") or "[]"))
            gone[node_id] = end + max(holds, default=0)
    live = {node_id for node_id, end in leases.items() if end >= now}
    ends = {**gone, **{node_id: leases[node_id] for node_id in live}}
    models = {node_id: _models_of(store, node_id) for node_id in ends}
    nodes = [
        NodeState(node_id, node_id in live, max(0.0, (end - now) / 1000), len(models[node_id]))
        for node_id, end in sorted(ends.items(), key=lambda item: (item[0] not in live, item[0]))
    ]
    names = sorted({name for of in models.values() for name in of} | lent.keys())
    limits = [limit for name in names for limit in _limits_of(store, name, live, lent.get(name, {}))]
    learning = max(0, int(meta.get("learning", 0)) - now) / 1000
    return ClusterState(tuple(nodes), tuple(limits), learning, int(meta.get("quotas", 0)))


def _limits_of(store: RedisStore, name: str, live: set[str], lent: dict[int, int]) -> Iterator[LimitState]:
    fields = dict(_pairs(store.command("HGETALL", f"{store.base}m:{name}")))
    records = [(field[2:] in live, json.loads(text)[1:]) for field, text in fields.items() if field.startswith("n:")]
    for quantity, known in enumerate(quantities_in(fields.get("limits", "[]"))):
        limit = known.limit
        if limit is None:
            continue
        used, shares, ghosts = lent.get(quantity, 0), 0, lent.get(quantity, 0)
        for is_live, record in records:
            held, uses, _ = record[3 * quantity : 3 * quantity + 3]
            used += uses
            shares += max(held, uses) if is_live else 0
            ghosts += 0 if is_live else max(held, uses)
        amounts = (limit, used, shares, ghosts, max(0, limit - shares - ghosts))
        yield LimitState(name, NAMES[quantity], *(in_units(quantity, amount) for amount in amounts))


def _models_of(store: RedisStore, node_id: str) -> list[str]:
    fields = [text_of(field) for field in store.command("HKEYS", f"{store.base}node:{node_id}")]
    return [field[2:] for field in fields if field.startswith("m:")]


def _scores(store: RedisStore, key: str) -> dict[str, float]:
    answer = store.command("ZRANGE", store.base + key, "0", "-1", "WITHSCORES")
    return {member: float(score) for member, score in _pairs(answer)}


def _pairs(answer: Any) -> Iterator[tuple[str, str]]:
    """Yield the pairs of an answer, which clients return as a dict, as pairs, or as a flat list."""
    if isinstance(answer, dict):
        answer = list(answer.items())
    elif answer and not isinstance(answer[0], tuple | list):
        answer = list(zip(answer[::2], answer[1::2], strict=True))
    for name, value in answer:
        yield text_of(name), text_of(value)


def _as_text(quotas: Quotas) -> str:
    patterns = [{**config.to_dict(), "model_id": pattern} for pattern, config in quotas.patterns.items()]
    return json.dumps({"models": [config.to_dict() for config in quotas.values()], "patterns": patterns})


def _run(store: RedisStore, keys: list[str], arguments: list[str]) -> str:
    answer = store.run(keys, arguments)
    require_format(answer)
    return answer
