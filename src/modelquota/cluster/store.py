"""What a node and the store tell each other: one request, one reply, and the `Store` that exchanges them.

A limit that many hosts share is a *quantity*: requests or tokens in one of the windows, or the level of a rate. The
store knows no more of it than its limit, its hold, and the sum of all shares; see ``exchange.lua``.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from modelquota.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT: Final = "1"
"""The version of the ledger's keys and of what is sent."""

MAX_LIMIT: Final = 2**53
"""The highest limit that can be shared: the store's numbers are doubles."""


class Quantity(NamedTuple):
    """What the store knows of one quantity of a model: its limit, and how long a dead node's share is taken."""

    limit: int | None
    hold_ms: int


class Ghost(NamedTuple):
    """What a share that is given up has been used for, and when it is free: `hold_ms` after the exchange."""

    quantity: int
    amount: int
    hold_ms: int


GIVEN_UP: Final = -1
"""As the version that is replaced: the node gives up its share, if the ledger has one of this code."""

_MAX_USED: Final = 2**48


class ModelRequest(NamedTuple):
    """What a node says of one model; the sequences have one element for each quantity.

    `code` names the registration of the model on its host: a share of another code was that of a model that has been
    removed since, and what it took is handed over.
    `replaces` is the ledger's version of the limits that are to be replaced by these: if it has others by now, they
    stay, so that a request that comes late changes none. 0 changes none, but those of a model that the ledger does not
    know; `GIVEN_UP` gives the share up. `need` is the smallest share that would admit a request that was denied, or 0.
    Of a quantity that is not limited only what is used counts.
    """

    model_id: str
    code: int
    replaces: int
    quantities: Sequence[Quantity]
    held: Sequence[int]
    used: Sequence[int]
    want: Sequence[int]
    need: Sequence[int]
    ghosts: Sequence[Ghost] = ()

    def arguments(self) -> tuple[str, str, str]:
        """Return the model's three arguments of the script."""
        limits = ",".join(f"{-1 if q.limit is None else q.limit},{q.hold_ms}" for q in self.quantities)
        holdings = ",".join(
            f"0,{_bounded(used, 0)},0,0" if limit is None else f"{held},{_bounded(used, limit)},{want},{need}"
            for (limit, _), held, used, want, need in zip(
                self.quantities, self.held, self.used, self.want, self.need, strict=True
            )
        )
        ghosts = ",".join(
            f"{ghost.quantity + 1}:{_bounded(ghost.amount, self.quantities[ghost.quantity].limit or 0)}:{ghost.hold_ms}"
            for ghost in self.ghosts
        )
        return f"{self.code};{self.replaces};[{limits}]", f"[{holdings}]", ghosts


def _bounded(used: int, limit: int) -> int:
    """Return what is used, or as much as any limit forbids: the sums of the ledger are exact up to 2**53."""
    return min(used, max(limit, _MAX_USED))


class Request(NamedTuple):
    """One request of a node. A repeated one has the same number, token and models, and its own `boot_ms`.

    `boot` names the clock that `boot_ms` is read from: another one after a restart of the machine. With `since` the
    node has no other models than those that it named in the requests from that number on.
    """

    verb: str
    node_id: str
    number: int
    token: str
    nonce: str
    boot: str
    boot_ms: int
    lease_ms: int
    models: Sequence[ModelRequest]
    since: int = 0

    def keys(self, base: str) -> list[str]:
        """Return the keys of the script, those of the ledger whose keys begin with `base`."""
        names = ["meta", "nodes", "ghosts", f"node:{self.node_id}", *(f"m:{model.model_id}" for model in self.models)]
        return [base + name for name in names]

    def arguments(self) -> list[str]:
        """Return the arguments of the script."""
        head = [FORMAT, self.verb, self.node_id, self.number, self.token, self.nonce, self.boot, self.boot_ms]
        head += [self.lease_ms, self.since]
        return [*map(str, head), *(text for model in self.models for text in model.arguments())]


class ModelReply(NamedTuple):
    """What the store says of one model, by quantity; None for one that the ledger does not limit.

    `target` is what the node should return to: less than its share if others want more than is free. `free` is in
    nobody's share, and `idle` in those of dead nodes, beyond what they had used. `quantities` are the ledger's, if they
    are not those of the request; `version` is theirs.
    """

    version: int
    share: tuple[int | None, ...]
    target: tuple[int | None, ...]
    free: tuple[int | None, ...]
    idle: tuple[int | None, ...]
    quantities: tuple[Quantity, ...] | None


class Reply(NamedTuple):
    """The store's answer.

    `status` is ``ok``, or ``learning`` (nothing is granted, for `learning_ms` more), or the request was not executed:
    ``stale`` (the store has seen a later one of this node) or ``fenced`` (another one uses this node's id). `quotas` is
    the version of the published quotas, 0 if there are none, `boot_ms` that of the copy of the request that was
    executed, and `unended` whether models that the node does not have any more are left to be ended.
    """

    status: str
    nonce: str = ""
    generation: int = 0
    learning_ms: int = 0
    nodes: int = 0
    quotas: int = 0
    boot_ms: int = 0
    unended: bool = False
    models: tuple[ModelReply, ...] = ()


class Store(Protocol):
    """Where nodes keep the sum of their shares: anything with one atomic `exchange`."""

    def exchange(self, request: Request) -> Reply:
        """Execute a request, or return the reply that it had; raises StoreError if that is not known."""


def require_format(answer: str) -> None:
    """Raise StoreError if the script's answer is that the ledger is another version's."""
    if answer == "format":
        raise StoreError("format", f"its ledger is not of format {FORMAT}; use another namespace for this version")


def parse_reply(text: str) -> Reply:
    """Parse what the script returned; raises StoreError for another version's ledger."""
    if text in ("stale", "fenced"):
        return Reply(text)
    require_format(text)
    status, nonce, *numbers = text.split("\n", 8)
    generation, learning_ms, nodes, quotas, boot_ms, unended = map(int, numbers[:6])
    models = tuple(_model(line) for line in numbers[6].split("\n") if line)
    return Reply(status, nonce, generation, learning_ms, nodes, quotas, boot_ms, bool(unended), models)


def _model(line: str) -> ModelReply:
    numbers, _, limits = line.partition(";")
    version, *parts = json.loads(numbers)
    rows = [
        (None,) * 4 if share < 0 else (share, target, free, idle)
        for share, target, free, idle in zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=True)
    ]
    share, target, free, idle = zip(*rows, strict=True)
    return ModelReply(version, share, target, free, idle, quantities_in(limits) if limits else None)


def quantities_in(limits: str) -> tuple[Quantity, ...]:
    """Return the quantities of a model's limits, as the ledger has them."""
    numbers = json.loads(limits)
    return tuple(
        Quantity(None if limit < 0 else limit, hold_ms)
        for limit, hold_ms in zip(numbers[::2], numbers[1::2], strict=True)
    )
