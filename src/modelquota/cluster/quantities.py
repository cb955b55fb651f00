"""The quantities that hosts share, and how much of each a node asks for: pure arithmetic on the core's components.

The core has fifteen components of a share (requests and tokens in five windows; drain and cap of two levels;
concurrency). The store has thirteen quantities: the windows, one for each level, and concurrency, of models that share
it. A level is shared by its cap, and its drain follows in proportion, so that a dead node's level has drained after the
same time for every share. What a dead node had open ends with its lease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from modelquota.cluster.store import MAX_LIMIT, Quantity
from modelquota.quota.limits import WINDOWS

if TYPE_CHECKING:
    from collections.abc import Sequence

COMPONENTS: Final = 15
QUANTITIES: Final = 13
UNLIMITED: Final = 2**63 - 1
KEEP: Final = -1
CONCURRENCY: Final = 12
"""The quantity that is concurrency."""
MILLION: Final = 10**6

WINDOW_SECONDS: Final = (1, 60, 3600, 86_400, 2_592_000)
LEVELS: Final = {10: (10, 11), 11: (12, 13)}
"""Of each quantity that is a level, the components of its drain and its cap, in millionths."""

NAMES: Final = (
    *(f"{unit}_per_{window.name}" for unit in ("requests", "tokens") for window in WINDOWS),
    "burst_requests",
    "burst_tokens",
    "concurrent_requests",
)
"""What each quantity is called: as its limit, and of a level, what is ahead of the rate."""

_OPEN_GRANTS: Final = 14
_UNKNOWN: Final = 32  # a node keeps a part of its part, for a request whose size is not known
_NEVER_MS: Final = 10**13  # three centuries: a level that does not drain
_NO_SPARE: Final = (0,) * QUANTITIES


def component_of(quantity: int) -> int:
    """Return the component that a quantity is counted in: of a level, its cap."""
    if quantity == CONCURRENCY:
        return _OPEN_GRANTS
    return LEVELS[quantity][1] if quantity in LEVELS else quantity


def quantities_of(limits: Sequence[int]) -> tuple[Quantity, ...]:
    """Return the quantities of a row's configured limits. A limit above 2**53 is shared as 2**53."""
    found = []
    for quantity in range(QUANTITIES):
        limit = limits[component_of(quantity)]
        hold_ms = 0
        if quantity < min(LEVELS):  # a window, which is counted for so long even if it is not limited
            hold_ms = WINDOW_SECONDS[quantity % 5] * 1000
        elif quantity in LEVELS and limit != UNLIMITED:
            drain = limits[LEVELS[quantity][0]]
            hold_ms = min(_rounded_up(-(-limit * 1000 // drain)), _NEVER_MS) if drain else _NEVER_MS
        found.append(Quantity(None if limit == UNLIMITED else min(limit, MAX_LIMIT), hold_ms))
    return tuple(found)


def _rounded_up(number: int) -> int:
    """Round up to two digits, so that the store has few different holds to schedule."""
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return -(-number // unit) * unit


def _kind_of(quantity: int) -> int:
    """Return what a quantity counts: 0 requests, 1 tokens."""
    if quantity == CONCURRENCY:
        return 0
    return quantity - 10 if quantity in LEVELS else quantity // 5


def in_units(quantity: int, amount: int) -> float:
    """Return an amount of a quantity in requests or tokens: that of a level is counted in millionths."""
    return amount / MILLION if quantity in LEVELS else amount


def drain_for(limits: Sequence[int], quantity: int, cap: int) -> int:
    """Return the drain that goes with a share of a level's cap: in proportion, rounded down."""
    drain, whole = LEVELS[quantity]
    return limits[drain] * cap // limits[whole] if limits[whole] else 0


def asked_row(limits: Sequence[int], shares: Sequence[int], used: Sequence[int]) -> list[int]:
    """Return shares of all quantities, KEEP for one that stays, as a row of components.

    The drain goes with what the store counts: the share, or what is used, whichever is more.
    """
    row = [KEEP] * COMPONENTS
    for quantity, share in enumerate(shares):
        if share != KEEP:
            row[component_of(quantity)] = share
            if quantity in LEVELS:
                drain = UNLIMITED if share == UNLIMITED else drain_for(limits, quantity, max(share, used[quantity]))
                row[LEVELS[quantity][0]] = drain
    return row


def wanted(
    limits: Sequence[int],
    used: Sequence[int],
    demand: Sequence[int],
    largest: Sequence[int],
    busiest: Sequence[int] = (0, 0),
    lease_sec: float = 0.0,
    spare: Sequence[int] = _NO_SPARE,
) -> tuple[int, ...]:
    """Return the share of each quantity that a node wants; 0 for one that is not limited.

    Parameters
    ----------
    limits
        The row's configured components.
    used
        What it uses of each quantity.
    demand
        Requests and tokens asked for in the last two seconds.
    largest
        The largest recent request: 1, and its tokens.
    busiest
        Requests and tokens of the two busiest seconds of late.
    lease_sec
        How long the store may grant nothing. In a window that is longer than a second, a node wants enough for that
        time, if there is so much to `spare`.
    spare
        How much of each quantity it may want beyond what it needs soon.
    """
    wants = []
    for quantity in range(QUANTITIES):
        limit = limits[component_of(quantity)]
        if limit == UNLIMITED:
            wants.append(0)
            continue
        kind = _kind_of(quantity)
        if quantity in LEVELS:
            ahead = demand[kind] + largest[kind]
            drain = limits[LEVELS[quantity][0]]
            # enough for what comes, and for a drain of twice the demand in a second
            want = max(used[quantity] + ahead * MILLION, -(-demand[kind] * MILLION * limit // drain) if drain else 0)
        elif quantity == CONCURRENCY:
            # requests end, so that not all that came in two seconds are open at once: twice as many as are
            want = used[quantity] + min(demand[kind], used[quantity] + largest[kind])
        else:
            # a window of a second has seen half of these two: as much again is enough until they have aged out
            window_sec = WINDOW_SECONDS[quantity % 5]
            coming = -(-demand[kind] // 2) if window_sec == 1 else demand[kind]
            if window_sec > 1:
                # what comes later than a window from now finds that what was used has aged out
                coming += min(int(busiest[kind] * min(lease_sec, window_sec) / 2), spare[quantity])
            want = used[quantity] + coming + largest[kind]
        wants.append(min(want, limit, MAX_LIMIT))
    return tuple(wants)


def kept_for_one(limits: Sequence[int], used: Sequence[int], tokens: int | None, nodes: int) -> tuple[int, ...]:
    """Return the share of each quantity that admits one more request; what is used, if limits are too small for that.

    Parameters
    ----------
    limits
        The row's configured components.
    used
        What the node uses of each quantity.
    tokens
        Of the request; None if that is not known, which keeps a small part of each limit.
    nodes
        How many nodes keep as much. All of them together keep at most half of a limit.
    """
    kept = list(used)
    for quantity in range(QUANTITIES):
        limit = limits[component_of(quantity)]
        if limit == UNLIMITED:
            continue
        limit = min(limit, MAX_LIMIT)
        unit = MILLION if quantity in LEVELS else 1
        part = limit // (2 * nodes)
        if _kind_of(quantity) == 0:
            if part < unit:
                return tuple(used)
            kept[quantity] += unit
        else:
            kept[quantity] += limit // (_UNKNOWN * nodes) if tokens is None else min(tokens * unit, part)
    return tuple(kept)


def needed_shares(limits: Sequence[int], held: Sequence[int], needed: Sequence[int]) -> tuple[int, ...]:
    """Return the share of each quantity without which a denied request is larger than the whole share, or 0."""
    needs = []
    for quantity in range(QUANTITIES):
        limit = limits[component_of(quantity)]
        kind = _kind_of(quantity)
        need = needed[kind] * (MILLION if quantity in LEVELS else 1)
        needs.append(need if held[quantity] < need <= limit and limit != UNLIMITED else 0)
    return tuple(needs)
