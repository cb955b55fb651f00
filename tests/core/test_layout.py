"""The layout of the shared state: numpy's view of it is the C compiler's, and nothing straddles what it should not."""

import numpy as np
import pytest

from modelquota import ManualClock, ResourceQuotaManager
from modelquota._core.state.mapping import PAGE, fingerprint, plan
from modelquota._core.state.packing import dtypes, encode_rate, struct_sizes
from modelquota._core.state.state import CONSTANTS

CACHE_LINE = 64


def alignment(dtype):
    base = dtype.base
    return max(alignment(base.fields[name][0]) for name in base.names) if base.names else base.itemsize


@pytest.mark.parametrize("part", ["header", "seat", "entry", "grant", "row", "cold", "share", "usage"])
def test_dtype_matches_the_struct(part):
    dtype = dtypes()[part]
    assert dtype.itemsize == struct_sizes()[part]
    end = 0
    for name in dtype.names:
        field, offset = dtype.fields[name]
        widest = alignment(field)
        assert offset >= end, f"{name} overlaps the field before it"
        assert offset % widest == 0, f"{name} is not aligned"
        end = offset + field.itemsize
    assert end <= dtype.itemsize


def test_a_row_is_three_cache_lines_and_a_cold_row_whole_ones():
    sizes = struct_sizes()
    assert sizes["row"] == 3 * CACHE_LINE
    assert sizes["cold"] % CACHE_LINE == 0
    always = 2 * sizes["ring"] + sizes["long_ring"]
    assert sizes["row"] + sizes["cold"] + always <= 2_880
    assert sizes["row"] + sizes["cold"] + 3 * sizes["ring"] + 2 * sizes["long_ring"] <= 3_960


def test_no_wide_integer_straddles_a_cache_line():
    dtype = dtypes()["row"]
    for name in ("request_level", "request_cap", "token_level", "token_cap"):
        offset = dtype.fields[name][1]
        assert offset // CACHE_LINE == (offset + 15) // CACHE_LINE


def test_counters_are_64_bits_wide():
    for dtype in (dtypes()["row"], dtypes()["cold"], dtypes()["usage"]):
        for name in dtype.names:
            if any(word in name for word in ("requests", "tokens", "violations", "room", "mark", "base", "start")):
                size = dtype.fields[name][0].base.itemsize
                assert size == 8 or name in ("trail_requests", "trail_tokens"), name  # what is more turns the windows


def test_regions_are_page_aligned_and_do_not_overlap():
    regions = plan(144, (4096, 16_000, 100, 9_000_000, 100, 8_000_000), (128, 2560, 480, 720, 304), 496, 1000)
    each = [size * 1000 for size in (128, 2560, 480, 720, 304, 496)]
    sizes = (144, 4096, 16_000, 100, 9_000_000, 100, 8_000_000, *each)
    *before, rings, shares, names, end = regions
    offsets = (0, *before, *rings, shares, names, end)
    for offset, size, end in zip(offsets[:-1], sizes, offsets[1:], strict=True):
        assert offset + size <= end
    assert all(offset % PAGE == 0 for offset in offsets)


def test_the_arrays_are_views_of_the_live_state():
    manager = ResourceQuotaManager(clock=ManualClock(5_000_000_000), max_models=10)
    header, rows, cold_rows = manager._arrays()
    assert bytes(header["magic"].tobytes()) == b"mdquota1"
    assert header["fingerprint"][0] == fingerprint(
        *(dtypes()[part] for part in ("header", "seat", "entry", "grant", "row", "cold", "ring", "long_ring", "share"))
    )
    assert header["max_models"][0] == 10
    assert header["row_count"][0] == 0
    manager.set_quota("a", max_requests_per_hour=50)
    assert header["row_count"][0] == 1
    before = int(rows["token_room"][0])
    assert manager.check_quota("a", 7)
    assert rows["token_room"][0] == before - 7
    assert cold_rows["request_limit"][0].tolist() == [300, CONSTANTS["unlimited"], 50, 100_000, CONSTANTS["unlimited"]]
    assert rows["lock"][0] == 0
    assert rows["generation"][0] % 2 == 1
    assert len(rows) == len(cold_rows) == 10


def test_the_fingerprint_sees_names_types_offsets_and_sizes():
    base = np.dtype([("a", "<i8"), ("b", "<u4", (3,))])
    others = [
        np.dtype([("a", "<i8"), ("c", "<u4", (3,))]),
        np.dtype([("a", "<u8"), ("b", "<u4", (3,))]),
        np.dtype([("a", "<i8"), ("b", "<u4", (4,))]),
        np.dtype({"names": ["a", "b"], "formats": ["<i8", ("<u4", (3,))], "offsets": [0, 12]}),
        np.dtype({"names": ["a", "b"], "formats": ["<i8", ("<u4", (3,))], "offsets": [0, 8], "itemsize": 32}),
    ]
    assert len({fingerprint(base), *map(fingerprint, others)}) == 6


@pytest.mark.parametrize("rate", [1.0, 0.5, 0.1, 2.5, 100.0, 1e-6, 1 / 3, 12345.678, 2.0**61, 1e18])
@pytest.mark.parametrize("burst", [0, 1, 200, 10_000])
def test_an_encoded_rate_is_exact(rate, burst):
    window_limit, drain, shift, cap = encode_rate(rate, burst)
    numerator, denominator = rate.as_integer_ratio()
    whole = -(-numerator // denominator)
    assert window_limit == min(whole + burst, 2**62)
    assert drain * denominator == numerator << shift
    assert cap * denominator == (max(numerator, denominator) + burst * denominator) * 10**9 << shift
    assert 0 < drain < 2**63
    assert cap < 2**125


def test_a_rate_that_does_not_fit_beside_its_burst_is_rounded_down():
    _, drain, shift, cap = encode_rate(0.1, 2**62)
    numerator, denominator = (0.1).as_integer_ratio()
    assert cap < 2**125
    assert drain * denominator <= numerator << shift
    assert drain / 2**shift == pytest.approx(0.1, rel=1e-8)


def test_rates_that_are_no_limit_or_admit_nothing():
    unlimited = 2**63 - 1
    no_rate = 255
    assert encode_rate(None, 5) == (unlimited, 0, no_rate, 0)
    assert encode_rate(2.0**62, 5) == (unlimited, 0, no_rate, 0)
    assert encode_rate(0.0, 5) == (0, 0, 0, 6 * 10**9)
