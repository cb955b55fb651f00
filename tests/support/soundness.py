"""What must hold between the fields of a model's row and cold row after every step, whatever the events were."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from oracle import COUNT_MAX, DAY_NS, HOUR_NS, SECOND_NS, SLOTS, slot_of, slot_start_ns

from modelquota import ResourceQuotaManager
from modelquota._core.state.state import CONSTANTS

LENGTHS_NS = (SECOND_NS, HOUR_NS, DAY_NS)
WORD = 2**64
NO_RATE = CONSTANTS["no_rate"]
COARSE_BITS = CONSTANTS["coarse_bits"]
"""A low is kept in units of so many bits more than its level."""
LOW_SLACK_NS = 16_666_667
"""A low is noted when a slot of the second begins; what drains until the slot ends comes on top."""


def record_of(manager: ResourceQuotaManager, model_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Row and cold row of a model as plain values."""
    index = int(manager.codes([model_id])[0]) & 0xFFFF_FFFF
    _, rows, cold_rows = manager._arrays()
    return plain(rows[index]), plain(cold_rows[index])


def plain(record: Any) -> dict[str, Any]:
    """The fields of a numpy record as Python's own numbers, lists and tuples."""
    return {name: record[name].tolist() for name in record.dtype.names}


def level_of(row: dict[str, Any], what: str) -> Fraction:
    """A level, in requests or tokens, at the row's time."""
    shift = row[f"{what}_shift"]
    if shift == NO_RATE:
        shift = row[f"dormant_{what}_shift"]
    low, high = row[f"{what}_level"]
    return Fraction(0) if shift == NO_RATE else Fraction((high << 64) + low, 10**9 << shift)


def level_now(row: dict[str, Any], what: str, now_ns: int, rate: float | None) -> Fraction:
    """A level after the time since the row's own has passed."""
    assert row["level_ns"] <= now_ns
    if rate is None:
        return level_of(row, what)
    return max(Fraction(0), level_of(row, what) - Fraction(rate) * (now_ns - row["level_ns"]) / SECOND_NS)


def assert_sound(manager: ResourceQuotaManager, model_id: str, holds: Iterable[tuple[int, int]]) -> None:
    """Check one model, whose open grants hold so much RAM and SSD."""
    row, cold = record_of(manager, model_id)
    held = list(holds)
    assert cold["concurrent"] == len(held)
    assert cold["reserved_ram_mb"] == sum(ram_mb for ram_mb, _ in held)
    assert cold["reserved_ssd_mb"] == sum(ssd_mb for _, ssd_mb in held)
    current = slot_of(row["level_ns"], SECOND_NS)
    assert row["slot_end_ns"] == slot_start_ns(current + 1, SECOND_NS)
    for what in ("request", "token"):
        used = used_in_windows(row, cold, what)
        limits = cold[f"{what}_limit"]
        left = min(COUNT_MAX, *(min(limit, COUNT_MAX) - count for limit, count in zip(limits, used, strict=True)))
        room = row[f"{what}_room"]
        if what == "request" and (cold["concurrent"] >= cold["max_concurrent"] or cold["waiting"]):
            assert room <= min(0, left)
        else:
            assert room == left
        assert_lows_are_low(row, cold, what)
    assert_not_negative(cold)


def used_in_windows(row: dict[str, Any], cold: dict[str, Any], what: str) -> list[int]:
    """What each window counts: the sum of its closed slots and the current one."""
    charged = (cold[f"{what}s_mark"] - row[f"{what}_room"]) % WORD
    counts = []
    for window, length_ns in enumerate(LENGTHS_NS):
        used = (charged - cold[f"{what}s_base"][window]) % WORD
        in_current = (charged - cold[f"{what}s_start"][window]) % WORD
        current = slot_of(row["level_ns"], length_ns)
        filled = cold["filled"][window]
        ring = [cold[f"{what}s"][window][slot % SLOTS] for slot in range(current - filled, current)]
        assert 0 <= filled <= SLOTS
        assert min(ring, default=0) >= 0
        assert used == sum(ring) + in_current
        assert used <= COUNT_MAX
        counts.append(used)
    assert counts == sorted(counts)
    return counts


def assert_lows_are_low(row: dict[str, Any], cold: dict[str, Any], what: str) -> None:
    """The lows bound the level from below, after every refund too."""
    shift, (low, _) = row[f"{what}_shift"], cold[f"{what}_minimum"]
    if shift != NO_RATE:
        bound = (low << (COARSE_BITS + shift)) - row[f"{what}_drain"] * LOW_SLACK_NS
        assert bound <= level_of(row, what) * (10**9 << shift)


def assert_not_negative(cold: dict[str, Any]) -> None:
    """No counter, of whatever kind, has gone below zero or wrapped."""
    for name, value in cold.items():
        if name in ("requests_mark", "tokens_mark", "requests_base", "tokens_base", "requests_start", "tokens_start"):
            continue  # modulo 2**64
        for figure in flat(value):
            assert 0 <= figure < 2**63 or figure == math.inf, name


def flat(value: Any) -> Iterable[Any]:
    """Every figure of a nested list or tuple."""
    if not isinstance(value, (list, tuple)):
        return (value,)
    return (figure for part in value for figure in flat(part))
