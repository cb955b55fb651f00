# Reading a row, and sums over all rows, from lock to unlock. Nothing here touches a Python object.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.layout cimport ColdRow, Header, Limits, Row, Shared, VIOLATION_TYPES
from modelquota._core.row.limits cimport read_limits
from modelquota._core.row.queue cimport count_counted, drop_expired
from modelquota._core.row.usage cimport Usage, read_usage
from modelquota._core.row.window cimport requests_charged, tokens_charged
from modelquota._core.state.copy cimport ModelCopy, copy_model
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row, recompute_row

cdef enum:
    READ_PATIENCE_NS = 20_000_000   # how long a reader waits for a row before it reads without its lock


cdef struct Totals:
    uint64_t allowed
    uint64_t rejected
    uint64_t throttled
    uint64_t queued
    uint64_t waited
    uint64_t waiting
    uint64_t tokens
    uint64_t refunded
    uint64_t violations[5]


cdef inline bint read_and_unlock(
    Row* row, ColdRow* cold, uint32_t generation, int64_t now_ns, const Shared* shared, Usage* usage, Limits* limits
) noexcept nogil:
    """Read a row and release its lock; False if the model has been removed. Requires the row's lock."""
    cdef bint alive = row.generation == generation
    if alive:
        if cold.waiting != 0:
            drop_expired(row, cold, shared.entries, now_ns, True)
        read_usage(row, cold, now_ns, usage)
        if cold.waiting != 0:
            usage.waiting_requests = count_counted(cold, shared.entries)
        if limits != NULL:
            read_limits(row, cold, limits)
    unlock(&row.lock)
    return alive


cdef inline bint read_locked(
    Row* row, uint32_t generation, int64_t now_ns, const Shared* shared, Usage* usage, Limits* limits
) noexcept nogil:
    """Read a row that stays locked, from a copy that is repaired; False if the model has been removed.

    Does not take the row's lock.
    """
    cdef int64_t index = row - shared.rows
    cdef ModelCopy copy
    copy_model(&copy, index, shared)
    if copy.row.generation != generation:
        return False
    recompute_row(&copy.row, &copy.cold, <uint32_t> index, shared)
    read_usage(&copy.row, &copy.cold, now_ns, usage)
    if limits != NULL:
        read_limits(&copy.row, &copy.cold, limits)
    return True


cdef inline void sum_totals(const Shared* shared, Totals* totals) noexcept nogil:
    """Sum over all models, including removed ones. Takes the rows' locks, one at a time; one that stays locked is read
    without it."""
    cdef Header* header = shared.header
    cdef Row* row
    cdef ColdRow* cold
    cdef int64_t i
    cdef int kind
    cdef bint locked
    totals.allowed = header.retired_allowed + header.unknown_checks
    totals.rejected = header.retired_rejected
    totals.throttled = header.retired_throttled
    totals.queued = header.retired_queued
    totals.waited = header.retired_waited
    totals.tokens = header.retired_tokens
    totals.refunded = header.retired_refunded
    totals.waiting = 0
    for kind in range(VIOLATION_TYPES):
        totals.violations[kind] = header.retired_violations[kind]
    for i in range(header.row_count):
        row = &shared.rows[i]
        cold = &shared.cold_rows[i]
        locked = lock_row(row, shared, READ_PATIENCE_NS)
        totals.allowed += requests_charged(row, cold)
        totals.rejected += cold.rejected
        totals.throttled += cold.throttled
        totals.queued += cold.queued
        totals.waited += cold.waited
        totals.tokens += tokens_charged(row, cold)
        totals.refunded += cold.tokens_refunded
        if locked and cold.waiting != 0:
            totals.waiting += count_counted(cold, shared.entries)
        for kind in range(VIOLATION_TYPES):
            totals.violations[kind] += cold.violations[kind]
        if locked:
            unlock(&row.lock)
