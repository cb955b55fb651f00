"""What a node remembers of one model: what it holds and uses, what it wants, and what the store is to be told."""

from __future__ import annotations

import operator
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from modelquota.cluster.quantities import (
    KEEP,
    LEVELS,
    QUANTITIES,
    UNLIMITED,
    component_of,
    drain_for,
    kept_for_one,
    needed_shares,
    quantities_of,
    wanted,
)
from modelquota.cluster.store import GIVEN_UP, Ghost, ModelReply, ModelRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

MARGIN_NS: Final = 1_000_000_000
"""By how much a lease ends earlier on the node than in the store."""

NOTHING: Final = (0,) * QUANTITIES

_DEMAND_NS: Final = 2_000_000_000
_RECENT_NS: Final = 10_000_000_000
_TOLD_NS: Final = 1_000_000_000
_ASKED_AGAIN_NS: Final = 60_000_000_000  # when it asks again for what it keeps for a first request
_STORE_AWAY: Final = 1.5  # leases for which a store may grant nothing: away for a while, it then learns for one lease
_COMPONENTS: Final = tuple(map(component_of, range(QUANTITIES)))


class Rows(NamedTuple):
    """What an exchange of shares with the core returns, one element for each code; see `Host.exchange`."""

    alive: Sequence[bool]
    held: Sequence[Sequence[int]]
    used: Sequence[Sequence[int]]
    limits: Sequence[Sequence[int]]
    charged: Sequence[Sequence[int]]
    peak: Sequence[Sequence[int]]
    needed: Sequence[Sequence[int]]
    starved: Sequence[int]
    waiting: Sequence[int]


class Book:
    """What the node remembers of one model."""

    __slots__ = (
        "answer", "busiest", "claim", "code", "drains", "given", "handed", "held", "is_whole", "kept", "kept_ns",
        "largest", "last_tokens", "limits", "model_id", "needed", "points", "rotated_ns", "starved", "target",
        "telling", "told_ns", "told_used", "unmet", "used", "waiting", "want",
    )  # fmt: skip

    def __init__(self, code: int, model_id: str) -> None:
        self.code = code
        self.model_id = model_id
        self.answer: ModelReply | None = None  # the last one
        self.limits: Sequence[int] = ()
        self.handed: list[Ghost] = []  # of levels that are not limited any more: what they held is handed over
        self.given: Sequence[int] = ()  # the limits that the store has, or that it was told before others changed them
        self.telling: Sequence[int] = ()  # those in the request that is under way
        self.held: tuple[int, ...] = NOTHING
        self.drains: dict[int, int] = {}  # of each level
        self.is_whole: tuple[bool, ...] = (False,) * QUANTITIES  # that share leaves the whole limit
        self.claim: tuple[int, ...] | None = None  # the part of it that the ledger knows as this node's share
        self.used: tuple[int, ...] = NOTHING
        self.want: tuple[int, ...] = NOTHING  # as the store has been told
        self.told_used: tuple[int, ...] = NOTHING
        self.target: tuple[int | None, ...] | None = None
        self.largest = [[0, 0], [0, 0]]  # requests and tokens: of the last ten seconds, and of the ten before
        self.busiest = [[0, 0], [0, 0]]  # likewise, of two seconds
        self.last_tokens: int | None = None  # the largest request's, when there were requests last
        self.kept: tuple[int, ...] = NOTHING  # the share that it keeps without requests, for the next one
        self.kept_ns = -_ASKED_AGAIN_NS  # when it asked for that, or gave it back
        self.rotated_ns = 0
        self.told_ns = 0  # when it was told last
        self.needed = [0, 0]
        self.starved = 0
        self.unmet = [0, 0]  # requests and tokens that were denied for lack of share, ever
        self.waiting = 0
        self.points: deque[tuple[int, int, int]] = deque()  # time, requests and tokens asked for until then

    def read(self, rows: Rows, at: int, now_ns: int) -> None:
        """Take over what the core says."""
        before, self.limits = self.limits, rows.limits[at]
        if before and before != self.limits:
            self.hand_over(before)
        self.drains = {quantity: rows.held[at][drain] for quantity, (drain, _) in LEVELS.items()}
        held, used = ([row[component] for component in _COMPONENTS] for row in (rows.held[at], rows.used[at]))
        self.used = tuple(used)
        self.is_whole = tuple(share == UNLIMITED for share in held)
        # a share that does not bind is of a quantity that the ledger does not limit
        self.held = tuple(uses if share == UNLIMITED else share for share, uses in zip(held, used, strict=True))
        self.claim = self.held if self.claim is None else tuple(map(min, self.claim, self.held))
        if now_ns - self.rotated_ns >= _RECENT_NS:
            self.largest = [[0, recent] for recent, _ in self.largest]
            self.busiest = [[0, recent] for recent, _ in self.busiest]
            self.rotated_ns = now_ns
        for kind in range(2):
            needed = rows.needed[at][kind]
            self.needed[kind] = max(self.needed[kind], needed)
            self.largest[kind][0] = max(self.largest[kind][0], rows.peak[at][kind], needed)
        if any(self.largest[0]):
            self.last_tokens = max(self.largest[1])
        starved, self.starved = max(0, rows.starved[at] - self.starved), rows.starved[at]
        self.unmet[0] += starved
        self.unmet[1] += starved * rows.needed[at][1]
        self.waiting = rows.waiting[at]
        requests, tokens = rows.charged[at]
        self.points.append((now_ns, requests + self.unmet[0], tokens + self.unmet[1]))
        while len(self.points) > 2 and self.points[1][0] <= now_ns - _DEMAND_NS:
            self.points.popleft()
        lasted_ns = max(now_ns - self.points[0][0], _DEMAND_NS)
        for kind, asked in enumerate(self.demand()):
            self.busiest[kind][0] = max(self.busiest[kind][0], asked * _DEMAND_NS // lasted_ns)

    def hand_over(self, before: Sequence[int]) -> None:
        """Note what was held of levels that were limited before. What windows count is told, limited or not."""
        for quantity in LEVELS:
            known = quantities_of(before)[quantity]
            amount = max(self.claimed[quantity], self.held[quantity], self.used[quantity])
            if known.limit is not None and not self.is_limited(quantity) and amount:
                self.handed.append(Ghost(quantity, amount, known.hold_ms + MARGIN_NS // 10**6))

    def demand(self) -> list[int]:
        """Return the requests and tokens that were asked for in the last two seconds, or since it was read before."""
        first, last = self.points[0], self.points[-1]
        return [last[kind] - first[kind] for kind in (1, 2)]

    @property
    def claimed(self) -> tuple[int, ...]:
        """What it holds according to the ledger."""
        return NOTHING if self.claim is None else self.claim

    def is_limited(self, quantity: int) -> bool:
        """Whether this host limits the quantity."""
        return self.limits[_COMPONENTS[quantity]] != UNLIMITED

    @property
    def is_covered(self) -> bool:
        """Whether the ledger knows all that it holds, of what it limits. Beyond that it may have used more."""
        shares: Sequence[int | None] = NOTHING if self.answer is None else self.answer.share
        return all(
            has <= claim or share is None or not self.is_limited(quantity)
            for quantity, (has, claim, share) in enumerate(zip(self.held, self.claimed, shares, strict=True))
        )

    def drain(self, quantity: int) -> int:
        """Return the drain that goes with what it has of a level: the share, or what it uses."""
        return drain_for(self.limits, quantity, max(self.held[quantity], self.used[quantity]))

    @property
    def drains_too_fast(self) -> bool:
        """Whether a drain is larger than what goes with the share: the level was above it, and has fallen since."""
        return any(
            self.is_limited(quantity) and not self.is_whole[quantity] and drain > self.drain(quantity)
            for quantity, drain in self.drains.items()
        )

    def wants(self, lease_sec: float, nodes: int, now_ns: int) -> tuple[int, ...]:
        """Return the share of each quantity that it wants.

        Without requests it wants nothing, but asks now and then for the room of a first one, which it keeps until
        others need it.
        """
        largest = [max(sizes) for sizes in self.largest]
        busiest = [max(sizes) for sizes in self.busiest]
        requests, tokens = self.demand()
        demand = [requests + self.waiting, tokens + self.waiting * largest[1]]
        # As much as is still free for each node: so half of what nobody needs soon stays free.
        free = NOTHING if self.answer is None else self.answer.free
        spare = [(amount or 0) // nodes for amount in free]
        want = wanted(self.limits, self.used, demand, largest, busiest, _STORE_AWAY * lease_sec, spare)
        self.kept = kept_for_one(self.limits, self.used, self.last_tokens, nodes)
        if now_ns - self.kept_ns >= _ASKED_AGAIN_NS and any(map(operator.gt, self.kept, self.held)):
            self.kept_ns = now_ns
            want = tuple(map(max, want, self.kept))
        return want

    def has_news(self, wants: tuple[int, ...], now_ns: int, idle_told_ns: int) -> bool:
        """Whether the store is to be told of it now.

        If it keeps what it does not need, it is to be told after `idle_told_ns`.
        """
        if any(needed_shares(self.limits, self.claimed, self.needed)) or self.given != self.limits or self.handed:
            return True
        if now_ns - self.told_ns >= _TOLD_NS and any(map(any, self.busiest)):
            return True  # it wants more than it needs soon, as far as that is free, which the answer says
        if now_ns - self.told_ns >= idle_told_ns and any(map(operator.gt, self.claimed, self.used)):
            return True  # the answer says whether others need it
        for quantity, (held, used, want, told) in enumerate(
            zip(self.claimed, self.used, wants, self.want, strict=True)
        ):
            if not self.is_limited(quantity):
                if used * 4 < self.told_used[quantity] * 3:
                    return True
            elif used > held or want > held or want * 4 < told * 3:
                return True
        return False

    def returned(self, wants: tuple[int, ...], now_ns: int) -> tuple[int, ...] | None:
        """Return the shares to lower: far more than is wanted, or more than is fair while others want it.

        A drain, too, that went with a level above its share, and is too much now that the level has fallen.
        """
        shares = [KEEP] * QUANTITIES
        target, self.target = self.target, None
        for quantity, (held, used, want) in enumerate(zip(self.held, self.used, wants, strict=True)):
            if not self.is_limited(quantity) or self.is_whole[quantity]:
                continue
            if held > max(used + 2 * (want - used), self.kept[quantity]):
                shares[quantity] = max(want, self.kept[quantity])
            most = None if target is None else target[quantity]
            if most is not None and most < held:
                shares[quantity] = min(most, shares[quantity]) if shares[quantity] != KEEP else most
                if most < self.kept[quantity]:
                    self.kept_ns = now_ns
            if self.claimed[quantity] < held:  # what it had used when it joined is not its share
                shares[quantity] = self.claimed[quantity]
        return tuple(shares) if self.drains_too_fast or any(share != KEEP for share in shares) else None

    def tell(self, wants: tuple[int, ...], now_ns: int) -> ModelRequest:
        """Return what the store is told of it."""
        needs = needed_shares(self.limits, self.claimed, self.needed)
        # what replaces them is sent once it is known what the ledger has
        replaces = 0 if self.given == self.limits or self.answer is None else self.answer.version
        self.telling, self.told_used, self.told_ns = self.limits, self.used, now_ns
        self.want, self.needed = wants, [0, 0]
        quantities, ghosts, self.handed = quantities_of(self.limits), self.handed, []
        return ModelRequest(
            self.model_id, self.code, replaces, quantities, self.claimed, self.used, wants, needs, ghosts
        )

    def take(self, answer: ModelReply, now_ns: int, learning_ms: int) -> None:
        """Take over what the store says, which grants nothing for so long."""
        self.answer = answer
        if answer.quantities is None:
            self.given = self.telling
        self.claim = tuple(0 if share is None else share for share in answer.share)
        if learning_ms:
            self.kept_ns = now_ns + learning_ms * 10**6 - _ASKED_AGAIN_NS

    def give_up(self, amounts: Sequence[int]) -> ModelRequest:
        """Return what the store is told when its share is given up, of which so much may have been used."""
        quantities = quantities_of(self.limits)
        ghosts = []
        for quantity, (known, amount) in enumerate(zip(quantities, amounts, strict=True)):
            if amount and (known.limit is not None or known.hold_ms):
                ghosts.append(Ghost(quantity, amount, known.hold_ms + MARGIN_NS // 10**6))
        return ModelRequest(
            self.model_id, self.code, GIVEN_UP, quantities, NOTHING, NOTHING, NOTHING, NOTHING, self.handed + ghosts
        )
