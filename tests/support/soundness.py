"""What must hold between the fields of a model's row and cold row after every step, whatever the events were."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from oracle import COUNT_MAX, LENGTHS_NS, SECOND_NS, SLOTS, slot_of, slot_start_ns

from modelquota import ResourceQuotaManager
from modelquota._core.state.state import CONSTANTS

WORD = 2**64
UNLIMITED = 2**63 - 1
NO_RATE = CONSTANTS["no_rate"]
COARSE_BITS = CONSTANTS["coarse_bits"]
"""A low is kept in units of so many bits more than its level."""
COUNT_BITS = 27
"""A closed slot holds a count that is not below two to this power only in part, and a refund to it is rounded."""
LOW_SLACK_NS = 16_666_667
"""A low is noted when a slot of the second begins; what drains until the slot ends comes on top."""


def record_of(manager: ResourceQuotaManager, model_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Row and cold row of a model as plain values; the cold row with the closed slots of its windows."""
    index = int(manager.codes([model_id])[0]) & 0xFFFF_FFFF
    _, rows, cold_rows = manager._arrays()
    rings = [plain(ring[index]) for ring in manager._rings()]
    closed = {
        what: [[count_of(pair[place]) for pair in ring["slots"]] for ring in rings if "slots" in ring]
        for place, what in enumerate(("requests", "tokens"))
    }
    closed["requests"] += [[count_of(code) for code in ring["requests"]] for ring in rings if "slots" not in ring]
    closed["tokens"] += [ring["tokens"] for ring in rings if "slots" not in ring]
    return plain(rows[index]), {**plain(cold_rows[index]), **closed}


def count_of(code: int) -> int:
    """The count that a closed slot holds in 32 bits."""
    return code % 2**COUNT_BITS << 2 * (code >> COUNT_BITS)


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


def assert_sound(
    manager: ResourceQuotaManager, model_id: str, holds: Iterable[tuple[int, int]], *, rounded: bool = False
) -> None:
    """Check one model, whose open grants hold so much RAM and SSD.

    `rounded`: that a closed slot had 2**27 or more, and that some of it was refunded.
    """
    row, cold = record_of(manager, model_id)
    held = list(holds)
    assert cold["concurrent"] == len(held)
    assert cold["reserved_ram_mb"] == sum(ram_mb for ram_mb, _ in held)
    assert cold["reserved_ssd_mb"] == sum(ssd_mb for _, ssd_mb in held)
    current = slot_of(row["level_ns"], SECOND_NS)
    assert row["trail_end_ns"] == slot_start_ns(current + 1, SECOND_NS)
    turned = current - (row["trail_slots"][row["trail"] - 1] if row["trail"] else 0)
    assert row["slot_end_ns"] == slot_start_ns(turned + 1, SECOND_NS)
    assert_trail(row, cold)
    for what in ("request", "token"):
        used = used_in_windows(row, cold, what)
        always = [count for window, count in enumerate(used) if window in (0, 2, 3)]
        assert rounded or always == sorted(always)
        limits = cold[f"{what}_limit"]
        left = min(COUNT_MAX, *(min(limit, COUNT_MAX) - count for limit, count in zip(limits, used, strict=True)))
        room = row[f"{what}_room"]
        if what == "request" and (cold["concurrent"] >= cold["max_concurrent"] or cold["waiting"]):
            assert room <= min(0, left)
        else:
            assert room == left
        assert_lows_are_low(row, cold, what)
    assert_not_negative(cold)


def assert_trail(row: dict[str, Any], cold: dict[str, Any]) -> None:
    """The trail says in which slots everything was charged since the windows were turned."""
    assert row["trail_slots"][: row["trail"]] == sorted(set(row["trail_slots"][: row["trail"]]) - {0})
    for what in ("request", "token"):
        charged = (cold[f"{what}s_mark"] - row[f"{what}_room"] - cold[f"{what}s_start"][0]) % WORD
        ended = sum(row[f"trail_{what}s"][: row["trail"]])
        assert ended + row[f"trail_{what}_room"] - row[f"{what}_room"] == charged


def used_in_windows(row: dict[str, Any], cold: dict[str, Any], what: str) -> list[int]:
    """What each window counts: the sum of its closed slots and the current one."""
    charged = (cold[f"{what}s_mark"] - row[f"{what}_room"]) % WORD
    counts = []
    turned_ns = row["slot_end_ns"] - 1
    for window, length_ns in enumerate(LENGTHS_NS.values()):
        if not cold["counted"] >> window & 1:
            assert (cold[f"{what}_limit"][window], cold["filled"][window]) == (UNLIMITED, 0)
            counts.append(0)
            continue
        used = (charged - cold[f"{what}s_base"][window]) % WORD
        in_current = (charged - cold[f"{what}s_start"][window]) % WORD
        current = slot_of(turned_ns, length_ns)
        filled = cold["filled"][window]
        ring = [cold[f"{what}s"][window][slot % SLOTS] for slot in range(current - filled, current)]
        assert 0 <= filled <= SLOTS
        assert min(ring, default=0) >= 0
        assert used == sum(ring) + in_current
        assert used <= COUNT_MAX
        counts.append(used)
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
        if name.endswith(("_mark", "_base", "_start", "_span", "_floor", "ring_offset", "held_percent")):
            continue  # modulo 2**64, or not a count
        for figure in flat(value):
            assert 0 <= figure < 2**63 or figure == math.inf, name


def flat(value: Any) -> Iterable[Any]:
    """Every figure of a nested list or tuple."""
    if not isinstance(value, (list, tuple)):
        return (value,)
    return (figure for part in value for figure in flat(part))
