"""Writes the models of a file with an earlier layout into a new one.

The core registers the models, so that whatever follows from their limits is its own. Then what they have used is put
in, slot by slot.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from modelquota._core.state.clock import ManualClock
from modelquota._core.state.state import CONSTANTS
from modelquota._core.table.table import QuotaTable
from modelquota.errors import StateFileError
from modelquota.quota import limits
from modelquota.quota.config import ResourceQuotaConfig
from modelquota.statefile.layouts import PER_SLOT, WINDOWS, OldLayout
from modelquota.statefile.oldfile import OldModels, field_of, in_order, level_of, put_level, rescaled

_UNLIMITED, _MAX_COUNT, _NO_RATE = CONSTANTS["unlimited"], CONSTANTS["max_count"], CONSTANTS["no_rate"]
_THREE_SLOTS_NS, _SLOTS, _BITS = CONSTANTS["three_slots_ns"], CONSTANTS["slots"], CONSTANTS["count_bits"]
_ACTIONS: Final = tuple(limits.ViolationAction)
_KEPT: Final = (
    "log_second", "log_held", "ram_mb", "ssd_mb", "peak_ram_mb", "peak_ssd_mb", "rejected", "throttled", "queued",
    "waited", "tokens_refunded", "violations",
)  # fmt: skip
_KEPT_IN_HEADER: Final = (
    "boot_id", "clock_offset_ns", "anchor_ns", "anchor_wall_ns", "clock_kind", "next_ticket", "unknown_checks",
    "recoveries", "retired_allowed", "retired_rejected", "retired_throttled", "retired_queued", "retired_waited",
    "retired_tokens", "retired_refunded", "retired_violations",
)  # fmt: skip
_PLACES: Final = [[window.name for window in limits.WINDOWS].index(name) for name in WINDOWS]
"""Which window of the core each window of the old layouts is."""


class Taker:
    """The new file, open for writing, and what has been taken over so far.

    Attributes
    ----------
    models : int
    requests, tokens : int
        What their windows of a day count.
    released : int
        Grants and waiting requests of dead processes.
    """

    def __init__(self, draft: str, path: str, layout: OldLayout) -> None:
        self._path, self._layout = path, layout
        self._events = _Templates()
        self._table = QuotaTable(
            path=draft, max_models=None, clock=ManualClock(0), events=self._events, trust_file=True
        )
        self.models = self.requests = self.tokens = self.released = 0

    def close(self) -> None:
        """Give up the file."""
        self._table.close()

    def take(self, old: OldModels) -> None:
        """Take some models over. Raises StateFileError if their limits are not accepted."""
        for name, row, ledger in zip(old.names, old.rows, old.ledgers, strict=True):
            self._register(name, row, ledger)
        part = slice(self.models, self.models + len(old.names))
        self.models = part.stop
        header, rows, cold_rows = self._table._arrays()
        if header["row_count"][0] != self.models:
            raise StateFileError(self._path, f"its {self.models} models became {header['row_count'][0]} rows")
        rows, cold_rows, rings = rows[part], cold_rows[part], [ring[part] for ring in self._table._rings()]
        rows["level_ns"] = old.rows["level_ns"]
        rows["slot_end_ns"] = rows["trail_end_ns"] = old.rows["slot_end_ns"]
        for name in _KEPT:
            cold_rows[name] = old.ledgers[name]
        for what in ("request", "token"):
            _put_levels(what, old, self._layout.minimum, rows, cold_rows)
            _put_windows(what, old, rows, cold_rows, rings)
        day, ledgers = WINDOWS.index("day"), old.ledgers
        for what in ("request", "token"):
            used = (
                ledgers[f"{what}s_mark"] - old.rows[f"{what}_room"].view(np.uint64) - ledgers[f"{what}s_base"][:, day]
            )
            setattr(self, f"{what}s", getattr(self, f"{what}s") + sum(used.tolist()))
        self.released += sum(ledgers["concurrent"].tolist()) + sum(ledgers["waiting"].tolist())

    def _register(self, name: str, row: Any, ledger: Any) -> None:
        on_sight = bool(field_of(ledger, "on_sight"))
        try:
            self._events.config = config = _config(name, row, ledger, self._layout)
            if on_sight:
                self._table.codes([name])
            else:
                self._table._set_quota(name, config)
        except (ValueError, OverflowError) as error:
            raise StateFileError(self._path, f"the limits of {name!r} are not accepted: {error}") from None
        if on_sight and _digest(row, ledger) != int(
            ledger["sight_digest"]
        ):  # its limits were changed later: it is not removed
            header, _, cold_rows = self._table._arrays()
            cold_rows["sight_digest"][int(header["row_count"][0]) - 1] ^= 1

    def put_header(self, old: Any, recovered: int) -> None:
        """Take over what the header of the old file has: the time, and the counts that belong to no model."""
        header = self._table._arrays()[0][0]
        for name in _KEPT_IN_HEADER:
            header[name] = field_of(old, name)
        header["enforcing"] = old["enforcing"] != 0
        header["recoveries"] = (int(old["recoveries"]) + self.released + recovered) % 2**64


class _Templates:
    """What the core asks about ids. A model that was registered on sight is registered on sight again."""

    config: ResourceQuotaConfig | None = None

    def template_of(self, model_id: str) -> ResourceQuotaConfig | None:
        return self.config

    def meters_of(self, model_id: str) -> tuple[()]:
        """What else is registered with it: nothing, since every id of the old file is registered by itself."""
        return ()


def _config(name: str, row: Any, ledger: Any, layout: OldLayout) -> ResourceQuotaConfig:
    """Make the quota of a model from its row and ledger; ValueError if there can be none like it."""

    def limit(value: Any) -> int | None:
        return None if value == _UNLIMITED else int(value)

    def rate(value: Any) -> float | None:
        return None if value == np.inf else float(value)

    shadow = []
    for code in range(16):
        if int(field_of(row, "shadow")) >> code & 1:
            shadowed = layout.shadow_names[code] if code < len(layout.shadow_names) else None
            if shadowed is None:
                raise ValueError(f"limit {code} in its shadow limits is unknown")
            shadow.append(shadowed)
    fields: dict[str, Any] = {
        f"max_{what}s_per_{window}": limit(ledger[f"{what}_limit"][place])
        for what in ("request", "token")
        for place, window in enumerate(WINDOWS)
        if window != "second"
    }
    return ResourceQuotaConfig.unlimited(
        name,
        **fields,
        max_ram_mb=limit(ledger["max_ram_mb"]),
        max_ssd_mb=limit(ledger["max_ssd_mb"]),
        max_requests_per_second=rate(ledger["requests_per_second"]),
        max_tokens_per_second=rate(ledger["tokens_per_second"]),
        burst_requests=int(ledger["burst_requests"]),
        burst_tokens=int(ledger["burst_tokens"]),
        on_violation=_ACTIONS[int(ledger["action"])],
        grace_period_sec=float(ledger["grace_period_sec"]),
        max_concurrent_requests=limit(ledger["max_concurrent"]),
        max_queued_requests=int(ledger["max_queued"]),
        shadow_limits=shadow,
    )


def _digest(row: Any, ledger: Any) -> int:
    """The digest of a model's limits as layout 4 had it, to see whether they have changed since it was registered."""

    def bits(value: Any) -> int:
        return int.from_bytes(struct.pack("<d", value), "little")

    word = 2**64 - 1
    values = [int(ledger[f"{what}_limit"][i]) for i in range(len(WINDOWS)) for what in ("request", "token")]
    names = ("max_ram_mb", "max_ssd_mb", "max_concurrent", "max_queued", "burst_requests", "burst_tokens")
    values += [int(ledger[name]) for name in names]
    values += [bits(ledger[f"{name}_per_second"]) for name in ("requests", "tokens")]
    values += [bits(ledger["grace_period_sec"]), int(ledger["action"]) << 16 | int(row["shadow"])]
    digest = 0
    for value in values:
        digest ^= value
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            digest = (digest ^ digest >> 33) * factor & word
        digest ^= digest >> 33
    return digest & 0xFFFF_FFFF


def _put_levels(what: str, old: OldModels, minimum: str, rows: NDArray[Any], cold_rows: NDArray[Any]) -> None:
    """Put in the levels, which count in units that follow from the rate, and what is known of the lowest ones."""
    shift, old_shift = rows[f"{what}_shift"], old.rows[f"{what}_shift"]
    lowest = old.ledgers[f"{what}_{minimum}"]
    for name in ("level", "cap", "drain"):  # without a rate, they are those of the previous one
        same = (shift == old_shift) if name == "level" else (shift == _NO_RATE) & (old_shift == _NO_RATE)
        rows[f"{what}_{name}"][same] = old.rows[f"{what}_{name}"][same]
    dormant = f"dormant_{what}_shift"
    if dormant in (old.rows.dtype.names or ()):
        rows[dormant] = old.rows[dormant]
    cold_rows[f"{what}_minimum"] = np.where((shift == old_shift)[:, None], lowest, 0)  # 0 is a lower bound of any
    for at in np.flatnonzero(shift != old_shift):
        put_level(rows[at], what, rescaled(level_of(old.rows[at], what), int(old_shift[at]), int(shift[at])))


def _put_windows(
    what: str, old: OldModels, rows: NDArray[Any], cold_rows: NDArray[Any], rings: list[NDArray[Any]]
) -> None:
    """Put in what each window counts, and compute the room that it leaves."""
    ledgers = old.ledgers
    charged = ledgers[f"{what}s_mark"] - old.rows[f"{what}_room"].view(np.uint64)
    slot = old.rows["slot_end_ns"] * 3 // _THREE_SLOTS_NS - 1
    room = np.full(len(rows), _MAX_COUNT)
    for place, (window, per_slot) in enumerate(zip(_PLACES, PER_SLOT, strict=True)):
        current = slot // per_slot
        base = ledgers[f"{what}s_base"][:, place]
        counts = _carried(in_order(ledgers, f"{what}s", place, current), rings[window], what)
        _put_ring(rings[window], what, current, counts)
        cold_rows[f"{what}s_base"][:, window] = base
        cold_rows[f"{what}s_start"][:, window] = base + counts.sum(1).astype(np.uint64)
        cold_rows["filled"][:, window] = ledgers["filled"][:, place]
        limit = np.minimum(cold_rows[f"{what}_limit"][:, window], _MAX_COUNT)
        room = np.minimum(room, limit - (charged - base).view(np.int64))
    if what == "request":  # requests are judged by one limit after the other
        room = np.where(cold_rows["max_concurrent"] <= 0, np.minimum(room, 0), room)
    rows[f"{what}_room"] = room
    cold_rows[f"{what}s_mark"] = charged + room.view(np.uint64)
    here = (charged - cold_rows[f"{what}s_start"][:, _PLACES[0]]).view(np.int64)
    rows[f"trail_{what}_room"] = room + here
    cold_rows[f"{what}_floor"] = _UNLIMITED  # above every room: which window is the fullest is not known


def _carried(counts: NDArray[np.int64], ring: NDArray[Any], what: str) -> NDArray[np.int64]:
    """What the slots hold, the oldest first, if what they do not hold of a count is carried into the next one."""
    if what == "token" and "tokens" in (ring.dtype.names or ()):  # long slots hold any count of tokens
        return counts
    held = np.empty_like(counts)
    carry = np.zeros(len(counts), np.int64)
    for at in range(_SLOTS):
        count = counts[:, at] + carry
        held[:, at] = count >> 2 * _exponents(count) << 2 * _exponents(count)
        carry = count - held[:, at]
    return held


def _exponents(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """By how many pairs of bits counts are shortened to fit a closed slot, see ``kept`` in ``window.pxd``."""
    exponents = np.zeros_like(counts)
    while (longer := counts >> 2 * exponents >> _BITS != 0).any():
        exponents += longer
    return exponents


def _put_ring(ring: NDArray[Any], what: str, current: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Write the closed slots of a window, the oldest first, to their places in the rings."""
    exponents = _exponents(counts)
    codes = (counts >> 2 * exponents | exponents << _BITS).astype(np.uint32)
    rows = np.arange(len(counts))[:, None]
    positions = (current[:, None] - np.arange(_SLOTS, 0, -1)) % _SLOTS
    if "slots" in (ring.dtype.names or ()):
        ring["slots"][rows, positions, int(what == "token")] = codes
    else:
        ring[f"{what}s"][rows, positions] = counts if what == "token" else codes
