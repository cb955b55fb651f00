"""Conversion between Python values and the structs of the layout: configurations, rates, dtypes."""
import functools

import numpy as np
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint8_t

from modelquota._core.layout cimport (
    CLUSTER_CONCURRENCY, ColdRow, DAY, GrantRecord, Header, IN_DOLLARS, KINDS, LIMITS, LIMIT_CODES, Limits, LongRing,
    MAX_COUNT, QueueEntry, Ring, Row, SECOND, SLOTS_PER_SLOT, Seat, Share, UNLIMITED, WINDOWS, Wide
)
from modelquota._core.row.decision cimport CONCURRENCY, QUEUE_PLACE, RAM_MB, SSD_MB
from modelquota._core.row.level cimport NO_RATE, WIDEST_SHIFT
from modelquota._core.row.share cimport refine_rate
from modelquota._core.row.tokens cimport MICRO
from modelquota._core.row.usage cimport NO_LIMIT, Usage, read_usage
from modelquota._core.state.copy cimport ModelCopy, start_copy

from modelquota.quota.config import UNITS
from modelquota.quota.limits import (
    CATALOGUE, WINDOWS as NAMED_WINDOWS, Limit, ViolationAction, shadow_mask, shadow_names
)

# of the mapping, as in dtypes()
PARTS = ("header", "seat", "entry", "grant", "row", "cold", "ring", "long_ring", "share")

cdef tuple ACTIONS = tuple(ViolationAction)
cdef tuple WINDOW_FIELDS = tuple([      # of a quota: the fields of each window, requests and tokens
    tuple([CATALOGUE[Limit(LIMIT_CODES[window][of_tokens])].quota_field for of_tokens in range(2)])
    for window in range(WINDOWS)
])


@functools.cache
def dtypes():
    """The numpy dtypes of the layout's parts, by name, derived from the C structs.

    The dict is shared: do not modify it.
    """
    # views of constants: of others Cython would compile what writes an element, field by field
    cdef Header header
    cdef Seat seat
    cdef QueueEntry entry
    cdef GrantRecord grant
    cdef Row row
    cdef ColdRow cold
    cdef Ring ring
    cdef LongRing long_ring
    cdef Share share
    cdef Usage usage
    return {
        "header": np.asarray(<const Header[:1]> &header).dtype,
        "seat": np.asarray(<const Seat[:1]> &seat).dtype,
        "entry": np.asarray(<const QueueEntry[:1]> &entry).dtype,
        "grant": np.asarray(<const GrantRecord[:1]> &grant).dtype,
        "row": np.asarray(<const Row[:1]> &row).dtype,
        "cold": np.asarray(<const ColdRow[:1]> &cold).dtype,
        "ring": np.asarray(<const Ring[:1]> &ring).dtype,
        "long_ring": np.asarray(<const LongRing[:1]> &long_ring).dtype,
        "share": np.asarray(<const Share[:1]> &share).dtype,
        "usage": _with_names_of_windows(np.asarray(<const Usage[:1]> &usage).dtype),
    }


def ring_dtypes():
    """The dtype of the rings of each window."""
    layout = dtypes()
    return tuple(layout["ring" if window < DAY else "long_ring"] for window in range(WINDOWS))


def _with_names_of_windows(dtype):
    """The dtype with a field for each element of ``requests_this`` and ``tokens_this``, named as in `ResourceUsage`."""
    fields = {}
    for name, (kind, offset) in dtype.fields.items():
        if name.endswith("_this"):
            for place, window in enumerate(NAMED_WINDOWS):
                fields[f"{name}_{window.name}"] = kind.base, offset + place * kind.base.itemsize
        else:
            fields[name] = kind, offset
    kinds, offsets = zip(*fields.values())
    return np.dtype({"names": list(fields), "formats": kinds, "offsets": offsets, "itemsize": dtype.itemsize})


def core_limits():
    """The core's own list of limits: ``(codes, windows)``.

    `windows` has, for each window, its slots per slot and its codes of requests and tokens.
    """
    windows = [(SLOTS_PER_SLOT[i], LIMIT_CODES[i][False], LIMIT_CODES[i][True]) for i in range(WINDOWS)]
    named = {"RAM": RAM_MB, "SSD": SSD_MB, "CONCURRENCY": CONCURRENCY, "QUEUE": QUEUE_PLACE, "LIMITS": LIMITS}
    return named, windows


def struct_sizes():
    """``sizeof`` of each struct of the layout, for comparison with the dtypes."""
    return {"header": sizeof(Header), "seat": sizeof(Seat), "entry": sizeof(QueueEntry), "grant": sizeof(GrantRecord),
            "row": sizeof(Row), "cold": sizeof(ColdRow), "ring": sizeof(Ring), "long_ring": sizeof(LongRing),
            "share": sizeof(Share), "usage": sizeof(Usage)}


def encode_rate(rate, burst, finer=False):
    """A rate and its burst as the core counts them: ``(window_limit, drain, shift, cap)``, see ``level.pxd``.

    `finer`: as a model that has a share counts them, see ``share.pxd``.

    None, or a rate of the largest count or more, means no limit. A rate of 0 admits nothing, whatever the burst.
    """
    if rate is None or rate >= MAX_COUNT:
        return UNLIMITED, 0, NO_RATE, 0
    if rate == 0:
        return 0, 0, 0, (1 + burst) * 10**9
    numerator, denominator = rate.as_integer_ratio()
    whole = -(-numerator // denominator)
    widest = WIDEST_SHIFT - (whole + burst).bit_length()
    shift = min(denominator.bit_length() - 1, widest)
    drain = max(1, (numerator << shift) // denominator)
    cap = ((max(numerator, denominator) + burst * denominator) * 10**9 << shift) // denominator
    if finer:
        drain, shift, cap = _refined(drain, shift, cap)
    return min(whole + burst, MAX_COUNT), drain, shift, cap


cdef tuple _refined(int64_t drain, uint8_t shift, object cap):
    cdef Wide wide_cap
    wide_cap.low = cap & 0xFFFF_FFFF_FFFF_FFFF
    wide_cap.high = cap >> 64
    refine_rate(&drain, &wide_cap, &shift)
    return drain, shift, int(wide_cap.high) << 64 | int(wide_cap.low)


cdef inline int64_t _limit(object count) except -1:
    return UNLIMITED if count is None else count


cdef inline object _count(int64_t limit):
    return None if limit == UNLIMITED else limit


cdef int pack(object config, Limits* limits) except -1:
    """A ResourceQuotaConfig, valid by construction, as the row stores it."""
    cdef int window, kind
    limits.max_ram_mb = _limit(config.max_ram_mb)
    limits.max_ssd_mb = _limit(config.max_ssd_mb)
    limits.max_concurrent = _limit(config.max_concurrent_requests)
    limits.max_queued = config.max_queued_requests
    limits.burst_requests = config.burst_requests
    limits.burst_tokens = config.burst_tokens
    rate = config.max_requests_per_second
    limits.requests_per_second = INFINITY if rate is None else rate
    limits.request_limits[SECOND], limits.request_drain, limits.request_shift, cap = (
        encode_rate(rate, config.burst_requests))
    limits.request_cap.low = cap & 0xFFFF_FFFF_FFFF_FFFF
    limits.request_cap.high = cap >> 64
    rate = config.max_tokens_per_second
    limits.tokens_per_second = INFINITY if rate is None else rate
    limits.token_limits[SECOND], limits.token_drain, limits.token_shift, cap = encode_rate(rate, config.burst_tokens)
    limits.token_cap.low = cap & 0xFFFF_FFFF_FFFF_FFFF
    limits.token_cap.high = cap >> 64
    for window in range(SECOND + 1, WINDOWS):
        of_requests, of_tokens = WINDOW_FIELDS[window]
        limits.request_limits[window] = _limit(getattr(config, of_requests))
        limits.token_limits[window] = _limit(getattr(config, of_tokens))
    for kind in range(KINDS):
        limits.weights[kind] = round(config.token_weights[kind] * MICRO)
    limits.unit = UNITS.index(config.unit) | (CLUSTER_CONCURRENCY if config.cluster_concurrency else 0)
    limits.grace_period_sec = config.grace_period_sec
    limits.action = ACTIONS.index(config.on_violation)
    limits.shadow = shadow_mask(config)
    return 0


cdef inline object _weight(int64_t millionths):
    """A weight as it was given: an int if it is whole.

    Two statements: both branches of one expression would have one C type.
    """
    if millionths % MICRO == 0:
        return millionths // MICRO
    return <double> millionths / <double> MICRO


cdef dict unpack(const Limits* limits):
    """The keywords of the ResourceQuotaConfig that pack() was given."""
    cdef int window, kind
    cdef dict fields = {
        "max_ram_mb": _count(limits.max_ram_mb),
        "max_ssd_mb": _count(limits.max_ssd_mb),
        "max_requests_per_second": None if limits.requests_per_second == INFINITY else limits.requests_per_second,
        "max_tokens_per_second": None if limits.tokens_per_second == INFINITY else limits.tokens_per_second,
        "burst_requests": limits.burst_requests,
        "burst_tokens": limits.burst_tokens,
        "on_violation": ACTIONS[limits.action],
        "grace_period_sec": limits.grace_period_sec,
        "max_concurrent_requests": _count(limits.max_concurrent),
        "cluster_concurrency": limits.unit & CLUSTER_CONCURRENCY != 0,
        "max_queued_requests": limits.max_queued,
        "shadow_limits": shadow_names(limits.shadow),
        "token_weights": tuple([_weight(limits.weights[kind]) for kind in range(KINDS)]),
        "unit": UNITS[limits.unit & IN_DOLLARS],
    }
    for window in range(SECOND + 1, WINDOWS):
        of_requests, of_tokens = WINDOW_FIELDS[window]
        fields[of_requests] = _count(limits.request_limits[window])
        fields[of_tokens] = _count(limits.token_limits[window])
    return fields


def bounds_of(config):
    """What the limits of a ResourceQuotaConfig admit: ``(most, at_once)``, both by `Limit`, None if it is not set.

    `most` is the maximum per window, ``ceil(rate) + burst`` for a rate; `at_once` is the maximum of a single request
    while nothing is used, ``max(rate, 1) + burst`` for a rate.
    """
    cdef ModelCopy model
    cdef Limits limits
    cdef Usage usage
    pack(config, &limits)
    start_copy(&model, &limits, 0, NULL)
    read_usage(&model.row, &model.cold, 0, &usage)
    at_once = [None if usage.left[code] == NO_LIMIT else usage.left[code] for code in range(LIMITS)]
    most = at_once.copy()
    most[LIMIT_CODES[SECOND][False]] = _count(limits.request_limits[SECOND])
    most[LIMIT_CODES[SECOND][True]] = _count(limits.token_limits[SECOND])
    return tuple(most), tuple(at_once)
