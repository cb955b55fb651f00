from cpython.object cimport PyObject
from libc.stdint cimport INT64_MIN, int64_t, uint32_t, uint64_t
from modelquota._core.state.clock cimport ManualClock, monotonic_ns
from modelquota._core.layout cimport GrantRecord, Pool, QueueEntry, Shared

cdef extern from *:
    """
    #define MQ_REFUSES INT64_MIN
    """
    const int64_t REFUSES "MQ_REFUSES"      # of fine_until_ns: this process must not use the state, or not any more


cdef int fork_count() noexcept


cdef class Mapping:
    cdef char* memory
    cdef Py_ssize_t size

    cdef int forget(self) except -1


cdef class SharedState:
    cdef int64_t fine_until_ns      # until this time of the rows nothing has to be looked at before a decision
    cdef Shared shared
    cdef Mapping mapping
    cdef readonly object path       # of the state file, or None
    cdef ManualClock manual         # None: the monotonic clock
    cdef int64_t offset_ns          # from the monotonic clock to the rows' time
    cdef bint forked                # this process has, since it opened the state
    cdef int inside                 # threads that use the state without the GIL
    cdef readonly bint closed       # whether `close` was called
    cdef object refusal             # why this process must not use the state, in words; None while it may
    cdef object file_fault          # what has happened to the file underneath, as far as it was reported
    cdef int64_t swept_ns           # when this process last looked for dead ones
    cdef uint64_t seen_unclaimed    # Header.unclaimed_made, as far as `overdue_ns` goes
    cdef int64_t overdue_ns         # the earliest time of the rows from which a grant of others may be let go
    cdef int64_t verified_ns        # when it last saw that its seat is still its own
    cdef PyObject* older            # states of this process, see after_fork()
    cdef PyObject* newer

    cdef int require_open(self) except -1
    cdef int look(self, int64_t now_ns) except -1
    cdef int pause(self) except -1
    cdef int exit(self) except -1
    cdef int tear_down(self) except -1
    cdef int end(self) except -1
    cdef int verify_seat(self) except -1
    cdef int verify_seat_if_due(self) except -1
    cdef int refuse(self, object refusal) except -1
    cdef int reserve_space(self, const void* start, Py_ssize_t size) except -1
    cdef int reserve_used(self) except -1
    cdef int reserve_next_model(self) except -1
    cdef int take_seat(self) except -1
    cdef bint begin(self, uint32_t me) noexcept
    cdef void leave_parent(self) noexcept
    cdef int retake_seat(self) except -1
    cdef int anchor(self) except -1
    cdef int claim(self, Pool* pool, str what, str remedy) except -1
    cdef GrantRecord* take_grant_record(self) except NULL
    cdef QueueEntry* take_entry(self) except NULL
    cdef int sweep(self) except -1
    cdef int let_overdue_go(self) except -1
    cdef int sweep_if_due(self) except -1

    cdef inline bint usable(self) noexcept:
        """Whether this process may use the state."""
        return self.fine_until_ns != REFUSES

    cdef inline bint alone(self) noexcept:
        """Whether no other process can change anything while this one does nothing."""
        return self.path is None and not self.forked and self.shared.header.seats_used <= 1

    cdef inline int64_t now_ns(self) noexcept:
        return monotonic_ns() + self.offset_ns if self.manual is None else self.manual.time_ns
