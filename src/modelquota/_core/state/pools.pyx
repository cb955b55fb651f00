"""The pools of this process: its grant records and queue entries, and reclaiming what dead processes held."""
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from modelquota._core.atomics cimport load_u64, swap_u32
from modelquota._core.layout cimport CHUNK, GrantRecord, Pool, QueueEntry, RECORDS, Shared
from modelquota._core.state.clock cimport Watcher, monotonic_ns
from modelquota._core.state.pool cimport claim_chunk, open_chunk, record_at, take_record
from modelquota._core.state.state cimport State
from modelquota._core.state.sweep cimport is_any_owner_gone, sweep_pool
from modelquota._core.state.unclaimed cimport is_anything_overdue, release_overdue as release_overdue_rows

from modelquota.errors import CapacityError, StateFileError

cdef int64_t SWEEP_NS = 10_000_000      # the shortest interval between two searches for dead processes


cdef class Pools:
    """Takes records for one process."""

    def __cinit__(self, State state not None):
        self.state = state
        self.deferred = []

    cdef int claim(self, Pool* pool, str what, str remedy) except -1:
        """Claim another chunk of records for this process."""
        cdef int64_t chunk
        self.state.verify_seat()
        chunk = claim_chunk(pool, self.state.shared.me)
        if chunk < 0 and self.sweep():
            chunk = claim_chunk(pool, self.state.shared.me)
        if chunk < 0:
            raise CapacityError(RECORDS, what, remedy)
        try:
            self.state.reserve_space(record_at(pool, chunk * CHUNK), CHUNK * pool.record_size)
        except StateFileError:
            swap_u32(&pool.owners[chunk], self.state.shared.me, 0)
            raise
        open_chunk(pool, chunk)
        return 0

    cdef GrantRecord* take_grant_record(self) except NULL:
        """Take a free grant record."""
        cdef int64_t number = take_record(&self.state.shared.grant_pool)
        if number < 0:
            self.claim(&self.state.shared.grant_pool, "open grants", "release some, in whichever process")
            number = take_record(&self.state.shared.grant_pool)
        return &self.state.shared.grants[number]

    cdef QueueEntry* take_entry(self) except NULL:
        """Take a free queue entry."""
        cdef int64_t number = take_record(&self.state.shared.entry_pool)
        if number < 0:
            self.claim(&self.state.shared.entry_pool, "waiting requests", "let fewer wait at once, over all processes")
            number = take_record(&self.state.shared.entry_pool)
        return &self.state.shared.entries[number]

    # -- the dead

    cdef int sweep(self) except -1:
        """Release what dead processes held, and remove their queue entries; returns how many records were found.

        Takes rows' locks, one at a time.
        """
        cdef const Shared* shared = &self.state.shared
        cdef int found
        self.swept_ns = monotonic_ns()
        if not is_any_owner_gone(shared):   # with the GIL: busy threads may keep it for 5 ms once it is released
            return 0
        self.state.inside += 1
        with nogil:
            found = sweep_pool(&shared.grant_pool, True, shared) + sweep_pool(&shared.entry_pool, False, shared)
        self.state.exit()
        return found

    cdef int release_overdue(self) except -1:
        """Release what was admitted for requests of other processes and not taken in time; returns how many records.

        Takes rows' locks, one at a time.
        """
        cdef const Shared* shared = &self.state.shared
        cdef int64_t now_ns = self.state.now_ns()
        cdef int64_t soonest_ns = INT64_MAX
        cdef uint64_t made = load_u64(&shared.header.unclaimed_made)
        cdef int found = 0
        if made == self.seen_unclaimed and now_ns < self.overdue_ns:
            return 0
        if is_anything_overdue(now_ns, &soonest_ns, shared):    # with the GIL, as above
            soonest_ns = INT64_MAX
            self.state.inside += 1
            with nogil:
                found = release_overdue_rows(now_ns, &soonest_ns, shared)
            self.state.exit()
        self.seen_unclaimed = made
        self.overdue_ns = soonest_ns
        return found

    cdef int sweep_if_due(self) except -1:
        """Reclaim what dead processes hold and grants that were not taken in time; returns how many records were found.

        At most once every SWEEP_NS, and not if this process is alone. Takes rows' locks, one at a time.
        """
        if self.state.shared.header.seats_used <= 1 or monotonic_ns() - self.swept_ns < SWEEP_NS:
            return 0
        return self.sweep() + self.release_overdue()

    cdef int reclaim_if_due(self) except -1:
        """Do what was put off and reclaim what dead processes hold, since a request may need what others hold."""
        cdef State state = self.state
        cdef Watcher watcher
        if state.watcher != NULL:
            watcher = <Watcher> state.watcher   # a counted reference, as in State.wake()
            watcher.look()
        if self.sweep_if_due():
            state.wake(None)
        return 0
