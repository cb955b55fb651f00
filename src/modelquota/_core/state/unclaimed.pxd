# Unclaimed grants: they were made for requests that waited and have not taken them yet, because their event loop or
# process may be stopped. From the request's deadline on, any process with a request that such a grant may block
# releases it.
#
# One word decides for all records of a grant. A compare-and-swap changes it from the deadline either to CLAIMED, by the
# request's own process, or to LAPSED, by any other. A lapsed grant is released and refunded record by record, each
# under its row's lock, by the first process to reach the record, which may be the request's own. A free record is done.
# A process that dies in between leaves the rest to the next one. Only the request's process uses a record again, once
# the grant has ended.
#
# A process that has claimed a grant clears the references to the deciding record before it returns that record. So a
# record's grant has lapsed if, with its row locked, LAPSED is read in the deciding record and then the same reference
# is read again.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.atomics cimport load_i64, load_u32, store_i64, store_u32, swap_i64
from modelquota._core.layout cimport CHUNK, Charge, ColdRow, GrantRecord, RECORDS, Row, Shared
from modelquota._core.row.decision cimport advance
from modelquota._core.row.grant cimport refund, release_holding
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:
    CLAIMED = 0
    LAPSED = -1
    UNCLAIMED_PATIENCE_NS = 1_000_000   # a row that stays locked for longer is left to the next attempt


cdef inline void set_unclaimed(
    GrantRecord* record, uint32_t decider, int64_t until_ns, const Charge* charge
) noexcept nogil:
    """Allow any process to release this record from its deadline on. Requires the row's lock.

    Called for the deciding record first.
    """
    record.charge = charge[0]
    store_i64(&record.unclaimed_until_ns, until_ns)
    store_u32(&record.decider, decider)


cdef inline bint claim_record(GrantRecord* decider) noexcept nogil:
    """Claim a grant, by its deciding record; False if it has lapsed. Needs no lock."""
    cdef int64_t until_ns = load_i64(&decider.unclaimed_until_ns)
    return until_ns != LAPSED and swap_i64(&decider.unclaimed_until_ns, until_ns, CLAIMED)


cdef inline bint lapses(
    const GrantRecord* record, int64_t now_ns, int64_t* soonest_ns, const Shared* shared
) noexcept nogil:
    """Whether a record's grant has lapsed, or lapses now, past its deadline; otherwise updates `soonest_ns`."""
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
    """Whether a record in use belongs to a grant that has lapsed. Requires the row's lock."""
    cdef uint32_t number = load_u32(&record.decider)
    return (
        0 < number <= <uint32_t> RECORDS
        and load_i64(&shared.grants[number - 1].unclaimed_until_ns) == LAPSED
        and load_u32(&record.decider) == number    # again: it still was after the other word was read
    )


cdef inline void undo_holding(Row* row, ColdRow* cold, GrantRecord* record, int64_t now_ns) noexcept nogil:
    """Release what a record holds, and refund the request. Requires the row's lock, and that the model is in the row.

    A process that dies in between has refunded too little, never too much.
    """
    release_holding(row, cold, record)
    advance(row, cold, now_ns)
    refund(row, cold, 1, record.charge.tokens, &record.charge)


cdef inline int release_lapsed(GrantRecord* record, int64_t now_ns, const Shared* shared) noexcept nogil:
    """Release a record that lapses(): returns 1; 0 if others have done it; -1 if the row stays locked.

    Takes the row's lock.
    """
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
            undo_holding(row, &shared.cold_rows[index], record, now_ns)
        else:
            record.seat = 0
        if shared.header.full_until_ns != 0:    # the model may be unused now
            shared.header.full_until_ns = 0
    unlock(&row.lock)
    return found


cdef inline bint is_anything_overdue(int64_t now_ns, int64_t* soonest_ns, const Shared* shared) noexcept nogil:
    """Whether another process has an overdue grant; otherwise sets `soonest_ns` to when the first one will be."""
    cdef int64_t chunk, i
    cdef uint32_t owner
    for chunk in range(shared.grant_pool.chunks_used[0]):
        owner = load_u32(&shared.grant_pool.owners[chunk])
        if owner == 0 or owner == shared.me:    # a process releases its own by other means
            continue
        for i in range(chunk * CHUNK, chunk * CHUNK + CHUNK):
            if lapses(&shared.grants[i], now_ns, soonest_ns, shared):
                return True
    return False


cdef inline int release_overdue(int64_t now_ns, int64_t* soonest_ns, const Shared* shared) noexcept nogil:
    """Release all overdue grants of other processes; returns how many records. Takes rows' locks, one at a time."""
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
                outcome = release_lapsed(&shared.grants[i], now_ns, shared)
                if outcome < 0:
                    soonest_ns[0] = now_ns
                else:
                    found += outcome
    return found
