# Grants that were made for requests that waited, and that these have not taken yet: their event loops may be parked, their
# processes stopped. From the deadline of the request on, any process that is held up lets such a grant go.
#
# One word decides for all records of a grant, by compare-and-swap: from the deadline either to CLAIMED, by the request's
# own process, or to LAPSED, by any other. What has lapsed is given back and refunded record by record, each under its
# row's lock, by the first that comes, which may be the request's own process: a record that is free has been seen to. A
# process that dies in between leaves the rest to the next one. Only the request's process uses a record again, once the
# grant has ended.
#
# A process that has claimed a grant clears the references to the deciding record before it gives that one back. So if LAPSED
# was read there, and then the reference to it once more, in a record whose row is locked, that record's grant has lapsed.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.atomics cimport load_i64, load_u32, store_i64, store_u32, swap_i64
from modelquota._core.layout cimport CHUNK, Charge, ColdRow, GrantRecord, RECORDS, Row, Shared
from modelquota._core.row.advance cimport advance
from modelquota._core.row.grant cimport refund, release_holding
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:
    CLAIMED = 0
    LAPSED = -1
    UNCLAIMED_PATIENCE_NS = 1_000_000   # a row that stays locked is left for the next time


cdef inline void set_unclaimed(
    GrantRecord* record, uint32_t decider, int64_t until_ns, const Charge* charge
) noexcept nogil:
    """Let anybody give this record back from its deadline on. The one that decides comes first. Requires the row's lock."""
    record.charge = charge[0]
    store_i64(&record.unclaimed_until_ns, until_ns)
    store_u32(&record.decider, decider)


cdef inline bint claim_record(GrantRecord* decider) noexcept nogil:
    """Take a grant for good, by the record that decides; False if it has lapsed. Without a lock."""
    cdef int64_t until_ns = load_i64(&decider.unclaimed_until_ns)
    return until_ns != LAPSED and swap_i64(&decider.unclaimed_until_ns, until_ns, CLAIMED)


cdef inline bint lapses(
    const GrantRecord* record, int64_t now_ns, int64_t* soonest_ns, const Shared* shared
) noexcept nogil:
    """Whether a record's grant has lapsed, or does now that its time is over; otherwise its time is noted."""
    cdef uint32_t number = load_u32(&record.decider)
    cdef GrantRecord* decider
    cdef int64_t until_ns
    if record.seat == 0 or number == 0 or number > <uint32_t> RECORDS:
        return False
    decider = &shared.grants[number - 1]
    until_ns = load_i64(&decider.unclaimed_until_ns)
    if until_ns > now_ns:
        soonest_ns[0] = min(soonest_ns[0], until_ns)
        return False
    return until_ns == LAPSED or (until_ns != CLAIMED and swap_i64(&decider.unclaimed_until_ns, until_ns, LAPSED))


cdef inline bint is_lapsed(const GrantRecord* record, const Shared* shared) noexcept nogil:
    """Whether a record belongs to a grant that has lapsed. Requires its row's lock, while it is in use."""
    cdef uint32_t number = load_u32(&record.decider)
    return (
        0 < number <= <uint32_t> RECORDS
        and load_i64(&shared.grants[number - 1].unclaimed_until_ns) == LAPSED
        and load_u32(&record.decider) == number    # once more: it was so after that other word
    )


cdef inline void undo_hold(Row* row, ColdRow* cold, GrantRecord* record, int64_t now_ns) noexcept nogil:
    """Give back what a record holds, and refund the request. Requires the row's lock, and that the model is in the row.

    A process that dies in the middle has refunded too little rather than too much.
    """
    release_holding(row, cold, record)
    advance(row, cold, now_ns)
    refund(row, cold, 1, record.charge.tokens, &record.charge)


cdef inline int let_lapsed_go(GrantRecord* record, int64_t now_ns, const Shared* shared) noexcept nogil:
    """Give back a record that lapses(): 1; 0 if others have done so; -1 if its row stays locked. Takes the row's lock."""
    cdef uint32_t index = record.row
    cdef int found = 0
    cdef Row* row
    if index >= <uint32_t> shared.header.max_models:
        return 0
    row = &shared.rows[index]
    if not lock_row(row, shared, UNCLAIMED_PATIENCE_NS):
        return -1
    if record.seat != 0 and record.row == index and is_lapsed(record, shared):
        found = 1
        if record.generation == row.generation:
            undo_hold(row, &shared.cold_rows[index], record, now_ns)
        else:
            record.seat = 0
        if shared.header.full_until_ns != 0:    # the model may be as good as new now
            shared.header.full_until_ns = 0
    unlock(&row.lock)
    return found


cdef inline bint is_anything_overdue(int64_t now_ns, int64_t* soonest_ns, const Shared* shared) noexcept nogil:
    """Whether others have grants that are to be let go; otherwise the earliest time at which one will be is noted."""
    cdef int64_t chunk, i
    cdef uint32_t owner
    for chunk in range(shared.grant_pool.chunks_used[0]):
        owner = load_u32(&shared.grant_pool.owners[chunk])
        if owner == 0 or owner == shared.me:    # a process takes its own back by itself
            continue
        for i in range(chunk * CHUNK, chunk * CHUNK + CHUNK):
            if lapses(&shared.grants[i], now_ns, soonest_ns, shared):
                return True
    return False


cdef inline int let_overdue_go(int64_t now_ns, int64_t* soonest_ns, const Shared* shared) noexcept nogil:
    """Let go of all grants of others that nobody has come for in time; how many records. Takes rows' locks, one at a time."""
    cdef int64_t chunk, i
    cdef uint32_t owner
    cdef int outcome
    cdef int found = 0
    for chunk in range(shared.grant_pool.chunks_used[0]):
        owner = load_u32(&shared.grant_pool.owners[chunk])
        if owner == 0 or owner == shared.me:
            continue
        for i in range(chunk * CHUNK, chunk * CHUNK + CHUNK):
            if lapses(&shared.grants[i], now_ns, soonest_ns, shared):
                outcome = let_lapsed_go(&shared.grants[i], now_ns, shared)
                if outcome < 0:
                    soonest_ns[0] = now_ns
                else:
                    found += outcome
    return found
