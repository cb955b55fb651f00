"""The grant records and queue entries of this process, and what dead processes left in theirs."""
from libc.stdint cimport INT64_MAX, int64_t, uint64_t

from modelquota._core.atomics cimport load_u64, swap_u32
from modelquota._core.layout cimport CHUNK, GrantRecord, Pool, QueueEntry, RECORDS, Shared
from modelquota._core.state.clock cimport Watcher, monotonic_ns
from modelquota._core.state.pool cimport claim_chunk, open_chunk, record_at, take_record
from modelquota._core.state.state cimport State
from modelquota._core.state.sweep cimport is_anybody_gone, sweep_pool
from modelquota._core.state.unclaimed cimport is_anything_overdue, let_overdue_go as let_rows_go

from modelquota.errors import CapacityError, StateFileError

cdef int64_t SWEEP_NS = 10_000_000      # how often a process looks for dead ones while something is held up


cdef class Pools:
    """Gives out the records of one process."""

    def __cinit__(self, State state not None):
        self.state = state
        self.deferred = []

    cdef int claim(self, Pool* pool, str what, str remedy) except -1:
        """Make another chunk of records this process's."""
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
        """A free grant record of this process."""
        cdef int64_t number = take_record(&self.state.shared.grant_pool)
        if number < 0:
            self.claim(&self.state.shared.grant_pool, "open grants", "release some, in whichever process")
            number = take_record(&self.state.shared.grant_pool)
        return &self.state.shared.grants[number]

    cdef QueueEntry* take_entry(self) except NULL:
        """A free queue entry of this process."""
        cdef int64_t number = take_record(&self.state.shared.entry_pool)
        if number < 0:
            self.claim(&self.state.shared.entry_pool, "waiting requests", "let fewer wait at once, over all processes")
            number = take_record(&self.state.shared.entry_pool)
        return &self.state.shared.entries[number]

    # -- the dead

    cdef int sweep(self) except -1:
        """Give back what dead processes held, and take them out of the queues; how much was found."""
        cdef const Shared* shared = &self.state.shared
        cdef int found
        self.swept_ns = monotonic_ns()
        if not is_anybody_gone(shared):     # with the GIL: busy threads may keep it for 5 ms before they give it back
            return 0
        self.state.inside += 1
        with nogil:
            found = sweep_pool(&shared.grant_pool, True, shared) + sweep_pool(&shared.entry_pool, False, shared)
        self.state.exit()
        return found

    cdef int let_overdue_go(self) except -1:
        """Let go of what was admitted for requests of other processes that have not taken it in time; how much it was."""
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
                found = let_rows_go(now_ns, &soonest_ns, shared)
            self.state.exit()
        self.seen_unclaimed = made
        self.overdue_ns = soonest_ns
        return found

    cdef int sweep_if_due(self) except -1:
        """Look for dead processes, and for requests that do not come for their grants, unless this process is alone or
        looked a moment ago; how much was found."""
        if self.state.shared.header.seats_used <= 1 or monotonic_ns() - self.swept_ns < SWEEP_NS:
            return 0
        return self.sweep() + self.let_overdue_go()

    cdef int reclaim_if_due(self) except -1:
        """Somebody is held up by what others hold, or wants to know: see whether those are still alive."""
        cdef State state = self.state
        cdef Watcher watcher
        if state.watcher != NULL:
            watcher = <Watcher> state.watcher   # a reference, as in State.wake()
            watcher.look()
        if self.sweep_if_due():
            state.wake(None)
        return 0
