"""Between Python values and the structs of the layout: configurations, rates, dtypes."""
import functools

import numpy as np
from libc.math cimport INFINITY
from libc.stdint cimport int64_t

from modelquota._core.layout cimport (
    DAY, HOUR, MAX_COUNT, SECOND, UNLIMITED, GrantRecord, Header, Ledger, Limits, QueueEntry, Row, Seat
)
from modelquota._core.row.level cimport NO_RATE
from modelquota._core.row.usage cimport Usage

from modelquota.quota.limits import ViolationAction, shadow_mask, shadow_names

cdef tuple ACTIONS = tuple(ViolationAction)


@functools.cache
def dtypes():
    """The numpy dtypes of the layout's parts, derived from the C structs, by name. Not to be changed: it is made once."""
    cdef Header header
    cdef Seat seat
    cdef QueueEntry entry
    cdef GrantRecord grant
    cdef Row row
    cdef Ledger ledger
    cdef Usage usage
    return {
        "header": np.asarray(<Header[:1]> &header).dtype,
        "seat": np.asarray(<Seat[:1]> &seat).dtype,
        "entry": np.asarray(<QueueEntry[:1]> &entry).dtype,
        "grant": np.asarray(<GrantRecord[:1]> &grant).dtype,
        "row": np.asarray(<Row[:1]> &row).dtype,
        "ledger": np.asarray(<Ledger[:1]> &ledger).dtype,
        "usage": np.asarray(<Usage[:1]> &usage).dtype,
    }


def struct_sizes():
    """``sizeof`` of each struct of the layout, to compare the dtypes with."""
    return {"header": sizeof(Header), "seat": sizeof(Seat), "entry": sizeof(QueueEntry), "grant": sizeof(GrantRecord),
            "row": sizeof(Row), "ledger": sizeof(Ledger), "usage": sizeof(Usage)}


def encode_rate(rate, burst):
    """A rate and its burst as the core counts them: ``(window_limit, drain, shift, cap)``, see ``level.pxd``.

    None, or a rate of the largest count and more, is no limit. A rate of 0 admits nothing, whatever the burst.
    """
    if rate is None or rate >= MAX_COUNT:
        return UNLIMITED, 0, NO_RATE, 0
    if rate == 0:
        return 0, 0, 0, (1 + burst) * 10**9
    numerator, denominator = rate.as_integer_ratio()
    whole = -(-numerator // denominator)
    widest = 125 - 30 - (whole + burst).bit_length()
    shift = min(denominator.bit_length() - 1, widest)
    drain = max(1, (numerator << shift) // denominator)
    cap = ((max(numerator, denominator) + burst * denominator) * 10**9 << shift) // denominator
    return min(whole + burst, MAX_COUNT), drain, shift, cap


cdef inline int64_t _limit(object count) except -1:
    return UNLIMITED if count is None else count


cdef inline object _count(int64_t limit):
    return None if limit == UNLIMITED else limit


cdef int pack(object config, Limits* limits) except -1:
    """A ResourceQuotaConfig, valid by construction, as the row stores it."""
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
    limits.request_limits[HOUR] = _limit(config.max_requests_per_hour)
    limits.request_limits[DAY] = _limit(config.max_requests_per_day)
    limits.token_limits[HOUR] = _limit(config.max_tokens_per_hour)
    limits.token_limits[DAY] = _limit(config.max_tokens_per_day)
    limits.grace_period_sec = config.grace_period_sec
    limits.action = ACTIONS.index(config.on_violation)
    limits.shadow = shadow_mask(config)
    return 0


cdef dict unpack(const Limits* limits):
    """The keywords of the ResourceQuotaConfig that _pack was given."""
    return {
        "max_ram_mb": _count(limits.max_ram_mb),
        "max_ssd_mb": _count(limits.max_ssd_mb),
        "max_requests_per_second": None if limits.requests_per_second == INFINITY else limits.requests_per_second,
        "max_tokens_per_second": None if limits.tokens_per_second == INFINITY else limits.tokens_per_second,
        "max_tokens_per_hour": _count(limits.token_limits[HOUR]),
        "max_tokens_per_day": _count(limits.token_limits[DAY]),
        "max_requests_per_hour": _count(limits.request_limits[HOUR]),
        "max_requests_per_day": _count(limits.request_limits[DAY]),
        "burst_requests": limits.burst_requests,
        "burst_tokens": limits.burst_tokens,
        "on_violation": ACTIONS[limits.action],
        "grace_period_sec": limits.grace_period_sec,
        "max_concurrent_requests": _count(limits.max_concurrent),
        "max_queued_requests": limits.max_queued,
        "shadow_limits": shadow_names(limits.shadow),
    }
