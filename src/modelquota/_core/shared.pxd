from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.clock cimport ManualClock, monotonic_ns
from modelquota._core.layout cimport Held, Place, Shared


cdef int fork_count() noexcept


cdef class SharedState:
    cdef Py_buffer buffer           # keeps the mapping alive
    cdef char* memory               # where it begins
    cdef bint forked                # this process has, since it opened the state
    cdef Shared shared
    cdef readonly object path       # of the state file, or None
    cdef ManualClock manual         # None: the monotonic clock
    cdef int64_t offset_ns          # from the monotonic clock to the rows' time
    cdef int64_t swept_ns           # when this process last looked for dead ones
    cdef list chunks                # of grant records, owned by this process
    cdef Held** free_records
    cdef Py_ssize_t free_count

    cdef int require_open(self) except -1
    cdef int reserve_space(self, const void* start, Py_ssize_t size) except -1
    cdef int reserve_used(self) except -1
    cdef int reserve_next_model(self) except -1
    cdef int sit_down(self) except -1
    cdef int anchor(self) except -1
    cdef Held* take_record(self) except NULL
    cdef int give_record(self, Held* record) except -1
    cdef Place* take_place(self) except NULL
    cdef int sweep(self) except -1
    cdef int sweep_if_due(self) except -1

    cdef inline bint alone(self) noexcept:
        """Whether no other process can change anything while this one does nothing."""
        return self.path is None and not self.forked and self.shared.header.seats_used <= 1

    cdef inline int64_t now_ns(self) noexcept:
        return monotonic_ns() + self.offset_ns if self.manual is None else self.manual.time_ns
