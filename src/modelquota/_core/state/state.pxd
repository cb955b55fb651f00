# The state: one process's view of the shared memory.
from cpython.object cimport PyObject
from libc.stdint cimport INT64_MIN, int64_t, uint32_t
from modelquota._core.layout cimport Shared
from modelquota._core.state.clock cimport ManualClock, read_clock

cdef extern from *:
    """
    #define MQ_REFUSES INT64_MIN
    """
    const int64_t REFUSES "MQ_REFUSES"      # as fine_until_ns: this process must not use the state, or no longer


cdef int fork_count() noexcept


cdef class Mapping:
    cdef char* memory
    cdef Py_ssize_t size

    cdef int forget(self) except -1


cdef inline int64_t rows_now_ns(const Shared* shared) noexcept nogil:
    """The rows' time now."""
    return read_clock(shared.clock) + shared.offset_ns if shared.manual_ns == NULL else shared.manual_ns[0]


cdef class State:
    cdef Shared shared
    cdef Mapping mapping
    cdef readonly object path       # of the state file, or None
    cdef ManualClock manual         # None: the monotonic clock
    cdef bint forked                # whether this process has forked since it opened the state
    cdef int inside                 # threads that use the state without the GIL
    cdef readonly bint closed       # whether `close` was called
    cdef object refusal             # why this process must not use the state; None while it may
    cdef object file_fault          # the last reported fault of the file, or None
    cdef int64_t verified_ns        # when it was last verified that the seat is still this process's
    cdef PyObject* watcher          # a Watcher, which refers to this and clears it when it is deallocated; or NULL
    cdef PyObject* older            # states of this process, see after_fork()
    cdef PyObject* newer

    cdef int open(self, object path, object max_models, object clock, object trust_file) except -1
    cdef int require_open(self) except -1
    cdef int look(self, int64_t now_ns) except -1
    cdef int pause(self) except -1
    cdef int exit(self) except -1
    cdef int tear_down(self) except -1
    cdef int end(self) except -1
    cdef int flush(self) except -1
    cdef int wake(self, object ref) except -1
    cdef int verify_seat(self) except -1
    cdef int verify_seat_if_due(self) except -1
    cdef int refuse(self, object refusal) except -1
    cdef int reserve_space(self, const void* start, Py_ssize_t size) except -1
    cdef int reserve_used(self) except -1
    cdef int reserve_optional_rings(self) except -1
    cdef int reserve_rings(self, int64_t first, int64_t count, uint32_t windows) except -1
    cdef int reserve_shares(self) except -1
    cdef int reserve_next_model(self, uint32_t windows) except -1
    cdef int take_seat(self) except -1
    cdef bint begin(self, uint32_t me) noexcept
    cdef void leave_parent(self) noexcept
    cdef int retake_seat(self) except -1
    cdef int anchor(self) except -1
    cdef int adopt_clock(self) except -1
    cdef int own_lease(self) except -1

    cdef inline bint usable(self) noexcept:
        """Whether this process may use the state."""
        return self.shared.fine_until_ns != REFUSES

    cdef inline bint alone(self) noexcept:
        """Whether no other process can change anything while this one does nothing."""
        return self.path is None and not self.forked and self.shared.header.seats_used <= 1

    cdef inline int64_t now_ns(self) noexcept:
        return rows_now_ns(&self.shared)
