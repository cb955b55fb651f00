# Sweeping: releasing what dead processes held, and removing their entries from the queues.
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memset
from modelquota._core.atomics cimport add_u64_relaxed, load_u32, swap_u32
from modelquota._core.layout cimport CHUNK, GrantRecord, Pool, QueueEntry, Row, SEATS, SEAT_BITS, Shared
from modelquota._core.row.grant cimport free_handle, release_holding
from modelquota._core.row.queue cimport unlink_entry
from modelquota._core.state.lock cimport epoch_of, is_gone, unlock
from modelquota._core.state.pool cimport record_at
from modelquota._core.state.repair cimport lock_row

cdef enum:
    SWEEP_PATIENCE_NS = 1_000_000   # a row that stays locked for longer is left to the next sweep


cdef inline bint is_newly_gone(uint32_t owner, bint* alive, const Shared* shared) noexcept nogil:
    """is_gone(), with the living owners remembered by seat.

    Former owners of a seat are found without asking the kernel.
    """
    cdef uint32_t seat = owner & (SEATS - 1)
    if owner == 0 or (alive[seat] and epoch_of(seat, shared) == owner >> SEAT_BITS):
        return False
    if is_gone(owner, shared):
        return True
    alive[seat] = True
    return False


cdef inline bint is_any_owner_gone(const Shared* shared) noexcept nogil:
    """Whether a process that owns records has died. Asks the kernel once for each living owner."""
    cdef bint alive[SEATS]
    cdef int64_t i
    memset(alive, 0, sizeof(alive))
    for i in range(shared.grant_pool.chunks_used[0]):
        if is_newly_gone(load_u32(&shared.grant_pool.owners[i]), alive, shared):
            return True
    for i in range(shared.entry_pool.chunks_used[0]):
        if is_newly_gone(load_u32(&shared.entry_pool.owners[i]), alive, shared):
            return True
    return False


cdef inline bint sweep_grant(GrantRecord* record, uint32_t owner, const Shared* shared, int* found) noexcept nogil:
    """Release what a grant of `owner` holds; False if its row stays locked. Takes the row's lock."""
    cdef Row* row
    if record.seat != owner or record.row >= <uint32_t> shared.header.max_models:
        return True
    row = &shared.rows[record.row]
    if not lock_row(row, shared, SWEEP_PATIENCE_NS):
        return False
    if record.seat == owner:
        found[0] += 1
        if record.generation == row.generation and record.is_handle:
            free_handle(&shared.cold_rows[record.row], record)
        elif record.generation == row.generation:
            release_holding(row, &shared.cold_rows[record.row], record)
        else:
            record.seat = 0
    unlock(&row.lock)
    return True


cdef inline bint sweep_entry(QueueEntry* entry, uint32_t owner, const Shared* shared, int* found) noexcept nogil:
    """Take an entry of `owner` out of its queue; False if its row stays locked. Takes the row's lock."""
    cdef Row* row
    if entry.seat != owner or entry.row >= <uint32_t> shared.header.max_models:
        return True
    row = &shared.rows[entry.row]
    if not lock_row(row, shared, SWEEP_PATIENCE_NS):
        return False
    if entry.seat == owner:
        found[0] += 1
        if entry.linked and entry.generation == row.generation:
            unlink_entry(row, &shared.cold_rows[entry.row], shared.entries, entry)
        entry.linked = 0
        entry.seat = 0
    unlock(&row.lock)
    return True


cdef inline int sweep_pool(const Pool* pool, bint of_grants, const Shared* shared) noexcept nogil:
    """Sweep all chunks of dead owners; returns how many records were found. Takes rows' locks, one at a time.

    A chunk is freed once all of its records have been swept.
    """
    cdef uint32_t owner
    cdef int64_t chunk, i
    cdef uint32_t alive = 0
    cdef int found = 0
    cdef bint done
    for chunk in range(pool.chunks_used[0]):
        owner = load_u32(&pool.owners[chunk])
        if owner == 0 or owner == shared.me or owner == alive:
            continue
        if not is_gone(owner, shared):
            alive = owner
            continue
        done = True
        for i in range(chunk * CHUNK, chunk * CHUNK + CHUNK):
            if of_grants:
                done = sweep_grant(<GrantRecord*> record_at(pool, i), owner, shared, &found) and done
            else:
                done = sweep_entry(<QueueEntry*> record_at(pool, i), owner, shared, &found) and done
        if done:
            swap_u32(&pool.owners[chunk], owner, 0)
    add_u64_relaxed(&shared.header.recoveries, found)
    return found


cdef inline bint release_grants(const Shared* shared) noexcept nogil:
    """Release what this process's grants hold; False if a row stays locked. Takes rows' locks, one at a time."""
    cdef int64_t chunk, i
    cdef int found = 0
    cdef bint done = True
    for chunk in range(shared.grant_pool.chunks_used[0]):
        if load_u32(&shared.grant_pool.owners[chunk]) == shared.me:
            for i in range(chunk * CHUNK, chunk * CHUNK + CHUNK):
                done = sweep_grant(<GrantRecord*> record_at(&shared.grant_pool, i), shared.me, shared, &found) and done
    return done
