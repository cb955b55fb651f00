"""The layouts of state files that earlier versions of modelquota have written, frozen, for `migrate_file`.

They are copies of what ``layout.pxd`` was, with the names of that time, and do not change. Their fingerprints are
computed from the names, types and offsets below, so a mistake here would not go unnoticed: no file would have them.
When the layout changes, the previous one is added here.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from modelquota._core.state.mapping import PAGE, fingerprint

NAME_UNIT: Final = 16
"""Bytes by which the offsets of names count."""
WINDOWS: Final = ("second", "hour", "day")
"""The windows of layouts 3 and 4."""
PER_SLOT: Final = (1, 3_600, 86_400)
"""How many slots of the second make a slot of each."""
_NAME_SHARE = 496
_CHUNKS, _RECORDS, _SEATS = 4096, 262_144, 1024
_MEMORY_AND_RATES = (None, "ram", "ssd", "concurrency", "requests_per_second", "tokens_per_second")


@dataclass(frozen=True, slots=True, kw_only=True)
class OldLayout:
    """One layout: its structs, and the sizes of what is between the header and the rows."""

    version: int
    header: np.dtype[Any]
    records: tuple[np.dtype[Any], ...]
    row: np.dtype[Any]
    ledger: np.dtype[Any]
    fixed: tuple[int, ...]
    shadow_names: tuple[str | None, ...]
    """By Limit code, as in ``shadow_limits``."""
    minimum: str
    """The field of the lowest levels, after ``request_`` or ``token_``."""
    rings: tuple[np.dtype[Any], ...] = ()
    """Of each window, if the slots of windows are not in the ledgers."""

    @property
    def fingerprint(self) -> int:
        """What the header of such a file has as its fingerprint."""
        return fingerprint(self.header, *self.records, self.row, self.ledger, *dict.fromkeys(self.rings))

    def regions(self, max_models: int) -> tuple[int, ...]:
        """Return the offsets of the parts behind the header, and the size of the file.

        The last parts are the rows, the ledgers, the rings if there are any, and the names.
        """
        each = (self.row.itemsize, self.ledger.itemsize, *(ring.itemsize for ring in self.rings), _NAME_SHARE)
        sizes = (self.header.itemsize, *self.fixed, *(size * max_models for size in each))
        return tuple(itertools.accumulate(-(-size // PAGE) * PAGE for size in sizes))

    def places(self, max_models: int) -> tuple[int, int, int, int]:
        """Return the offsets of the rows, the ledgers and the names, and the size of the file."""
        regions = self.regions(max_models)
        rows = len(self.fixed) + 1
        return regions[rows - 1], regions[rows], regions[-2], regions[-1]


def _struct(*lines: str, **structs: np.dtype[Any]) -> np.dtype[Any]:
    """Make the dtype of a C struct; each line is a type and the names of the fields that have it."""
    fields: list[tuple[Any, ...]] = []
    for line in lines:
        kind, *names = line.split()
        base, _, shape = re.fullmatch(r"(\w+)(\[([\d,]+)\])?", kind).groups()  # type: ignore[union-attr]
        size = () if shape is None else (tuple(map(int, shape.split(","))),)
        fields += [(name, structs.get(base, f"<{base}"), *size) for name in names]
    return np.dtype(fields, align=True)


_WIDE = _struct("u8 low high")
_LIMITS = (
    "i8 max_ram_mb max_ssd_mb max_concurrent max_queued burst_requests burst_tokens",
    "f8 requests_per_second tokens_per_second grace_period_sec",
    "i8[3] request_limits token_limits",
    "wide request_cap token_cap",
    "i8 request_drain token_drain",
    "u1 request_shift token_shift action",
)
_WINDOW_FIELDS = (
    "u8 requests_mark tokens_mark",
    "u8[3] requests_base tokens_base",
    "f8[3] request_percent token_percent",
    "f8 request_level_percent token_level_percent",
    "u8[3] requests_start tokens_start",
    "i8[3] request_limit token_limit",
    "u1[3] filled",
    "u1 action",
    "u4 name_offset",
)
_MEMORY_FIELDS = (
    "i8 max_ram_mb max_ssd_mb ram_mb ssd_mb reserved_ram_mb reserved_ssd_mb concurrent",
    "f8 ram_percent ssd_percent concurrent_percent",
    "i8 max_concurrent peak_ram_mb peak_ssd_mb",
)
_JOURNAL_FIELDS = (
    "u8 journal_requests journal_tokens journal_requests_start journal_tokens_start",
    "i8 journal_slot",
)
_COUNTERS = ("u8 rejected throttled queued waited tokens_refunded", "u8[5] violations")
_RINGS = (
    "i8 burst_requests burst_tokens",
    "f8 requests_per_second tokens_per_second grace_period_sec",
    "i8[3,60] tokens",
    "u4[3,60] requests",
)
_FIRST_OF_HEADER = (
    "u8 magic",
    "u4 version registry_lock",
    "u8 fingerprint",
    "i8 max_models row_count lowest_free names_used",
    "u8 registry_version",
    "u1[16] boot_id",
    "i8 clock_offset_ns anchor_ns anchor_wall_ns",
)
PREAMBLE: Final = _struct(*_FIRST_OF_HEADER)
"""How the header of every layout begins."""


def _layout_3() -> OldLayout:
    limits = _struct(*_LIMITS, wide=_WIDE)
    place = _struct("u4 seat row generation", "i4 priority", "i8 ticket ready_ns count", "u1 limit")
    held = _struct("u4 seat row generation spare", "i8 ram_mb ssd_mb")
    return OldLayout(
        version=3,
        header=_struct(
            *_FIRST_OF_HEADER,
            "u4 enforcing seats_used places_used chunks_used",
            "i8 next_ticket",
            "u8 unknown_checks recoveries",
            "u8 retired_allowed retired_rejected retired_throttled retired_queued retired_waited",
            "u8[5] retired_violations",
            "i8 leaving_row",
            "u4 leaving_generation",
            "u8[10] staged_retired",
            "i8 staged_row",
            "u4 staged_generation",
            "u1 staged_request_shift staged_token_shift",
            "wide staged_request_level staged_token_level",
            "limits staged",
            wide=_WIDE,
            limits=limits,
        ),
        records=(place, held),
        row=_struct(
            "u4 lock generation",
            "i8 slot_end_ns level_ns request_room token_room request_drain token_drain",
            "u1 request_shift token_shift",
            "u2[3] reserved",
            "wide request_level request_cap token_level token_cap",
            wide=_WIDE,
        ),
        ledger=_struct(
            *_WINDOW_FIELDS,
            "u4 name_capacity name_size",
            *_MEMORY_FIELDS,
            "i8 waiting max_queued head_ready_ns head_ticket",
            "i4 head_priority",
            "u1 head_limit stage journal_filled",
            *_JOURNAL_FIELDS,
            "i8[2] request_low token_low",
            "i8 level_epoch",
            *_COUNTERS,
            "u4 log_second log_held",
            *_RINGS,
        ),
        fixed=(_SEATS * 4, 1024 * place.itemsize, _CHUNKS * 4, _RECORDS * held.itemsize),
        shadow_names=(),
        minimum="low",
    )


_HEADER_SINCE_4 = (
    "u4 clock_kind enforcing seats_used entry_chunks_used grant_chunks_used registry_broken",
    "i8 forget_hand full_until_ns next_ticket",
    "u8 unknown_checks recoveries unclaimed_made",
    "u8 retired_allowed retired_rejected retired_throttled retired_queued retired_waited",
    "u8 retired_tokens retired_refunded",
    "u8[5] retired_violations",
)
_STAGED_SINCE_4 = (
    "i8 leaving_row",
    "u4 leaving_generation",
    "u8[12] staged_retired",
    "i8 staged_row",
    "u4 staged_generation",
    "row staged_row_before",
    "limits staged",
)
_ROW_SINCE_4 = (
    "u4 lock generation",
    "i8 slot_end_ns level_ns request_room token_room request_drain token_drain",
    "u1 request_shift token_shift dormant_request_shift dormant_token_shift",
)


def _records_since_4() -> tuple[np.dtype[Any], np.dtype[Any], np.dtype[Any]]:
    """The structs of a seat, a queue entry and a grant's record, in layouts 4 and 5."""
    seat = _struct("u8 holder space")
    entry = _struct(
        "u4 seat row generation",
        "i4 priority",
        "i8 ticket deadline_ns ready_ns",
        "u4 next previous",
        "u1 linked limit counted aside",
    )
    charge = _struct("i8 tokens at_ns", "u4 epoch", "i8 raised", "u1 raised_request")
    grant = _struct(
        "u4 seat row generation is_handle",
        "i8 ram_mb ssd_mb tokens",
        "u4 decider",
        "i8 unclaimed_until_ns",
        "charge charge",
        charge=charge,
    )
    return seat, entry, grant


def _fixed_since_4(seat: np.dtype[Any], entry: np.dtype[Any], grant: np.dtype[Any]) -> tuple[int, ...]:
    return (
        _SEATS * seat.itemsize,
        4096 * 4,
        _CHUNKS * 4,
        _RECORDS * entry.itemsize,
        _CHUNKS * 4,
        _RECORDS * grant.itemsize,
    )


def _layout_4() -> OldLayout:
    limits = _struct(*_LIMITS, "u2 shadow", wide=_WIDE)
    records = _records_since_4()
    row = _struct(
        *_ROW_SINCE_4,
        "u2 shadow reserved",
        "wide request_level request_cap token_level token_cap",
        wide=_WIDE,
    )
    return OldLayout(
        version=4,
        header=_struct(
            *_FIRST_OF_HEADER,
            *_HEADER_SINCE_4,
            *_STAGED_SINCE_4,
            row=row,
            limits=limits,
        ),
        records=records,
        row=row,
        ledger=_struct(
            *_WINDOW_FIELDS,
            "u2 name_capacity name_size",
            "u4 log_second",
            *_MEMORY_FIELDS,
            "i8 reserved_tokens waiting max_queued",
            "u4 first_entry last_entry",
            "u1 stage journal_filled on_sight",
            "u4 sight_digest",
            "i4 handles",
            "u4 level_epoch log_held",
            *_JOURNAL_FIELDS,
            "i8[2] request_minimum token_minimum",
            *_COUNTERS,
            *_RINGS,
        ),
        fixed=_fixed_since_4(*records),
        shadow_names=(
            *_MEMORY_AND_RATES,
            "tokens_per_hour",
            "requests_per_hour",
            "tokens_per_day",
            "requests_per_day",
        ),
        minimum="minimum",
    )


def _layout_5() -> OldLayout:
    limits = _struct(
        "i8 max_ram_mb max_ssd_mb max_concurrent max_queued burst_requests burst_tokens",
        "f8 requests_per_second tokens_per_second grace_period_sec",
        "i8[5] request_limits token_limits",
        "wide request_cap token_cap",
        "i8 request_drain token_drain",
        "i8[3] weights",
        "u1 request_shift token_shift action unit",
        "u2 shadow",
        wide=_WIDE,
    )
    records = _records_since_4()
    row = _struct(
        *_ROW_SINCE_4,
        "u2 shadow",
        "u1 meters weighted",
        "wide request_level request_cap token_level token_cap",
        "i8 trail_end_ns trail_request_room trail_token_room",
        "i4 trail_request_minimum trail_token_minimum",
        "u4[4] trail_tokens",
        "u2[4] trail_requests",
        "u1[4] trail_slots",
        "u1 trail",
        wide=_WIDE,
    )
    ring, long_ring = _struct("u4[60,2] slots"), _struct("i8[60] tokens", "u4[60] requests")
    return OldLayout(
        version=5,
        header=_struct(
            *_FIRST_OF_HEADER,
            *_HEADER_SINCE_4,
            "u4 linking_meter linking_model removing removing_generation",
            *_STAGED_SINCE_4,
            row=row,
            limits=limits,
        ),
        records=records,
        row=row,
        ledger=_struct(
            "i8 request_span",
            "f8 request_percent",
            "i8 request_floor token_span",
            "f8 token_percent",
            "i8 token_floor",
            "f8 request_level_percent token_level_percent held_percent",
            "u8 requests_mark tokens_mark",
            *_JOURNAL_FIELDS,
            "u1 stage journal_filled counted",
            "u1[5] filled",
            "u1 on_sight action unit",
            "i8[2] request_minimum token_minimum",
            "u8[5] requests_base tokens_base requests_start tokens_start",
            "i8[5] request_limit token_limit ring_offset since_ns",
            "u4 name_offset",
            "u2 name_capacity name_size",
            "u4 log_second log_held",
            "i8 max_ram_mb max_ssd_mb ram_mb ssd_mb reserved_ram_mb reserved_ssd_mb concurrent max_concurrent",
            "i8 peak_ram_mb peak_ssd_mb reserved_tokens waiting max_queued",
            "u4 first_entry last_entry sight_digest",
            "i4 handles",
            "u4 level_epoch meter_of first_meter next_meter meters_epoch",
            "i8[3] weights",
            *_COUNTERS,
            "i8 burst_requests burst_tokens",
            "f8 requests_per_second tokens_per_second grace_period_sec",
            "i8[4] padding",
        ),
        fixed=_fixed_since_4(*records),
        shadow_names=(),
        minimum="minimum",
        rings=(ring, ring, ring, long_ring, long_ring),
    )


OLD_LAYOUTS: Final = {layout.version: layout for layout in (_layout_3(), _layout_4(), _layout_5())}
"""By version, every layout that `migrate_file` takes over."""
