from cpython.buffer cimport Py_buffer
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.clock cimport ManualClock, monotonic_ns
from modelquota._core.layout cimport Header, Ledger, Row
from modelquota._core.usage cimport Limits, Usage


cdef class RowRef:
    # Where a model lives. It is good as long as the row's generation is this one.
    cdef Row* row
    cdef Ledger* ledger
    cdef uint32_t generation
    cdef object model_id
    cdef object line                # the Line of this process's requests that wait for the model, or None


cdef int fork_count() noexcept


cdef class QuotaState:
    cdef Py_buffer buffer           # keeps the mapping alive
    cdef Header* header
    cdef Row* row_array
    cdef Ledger* ledger_array
    cdef char* name_bytes
    cdef dict interned              # model id -> RowRef
    cdef ManualClock manual         # None: the monotonic clock
    cdef uint32_t seat              # names this process in locks

    cdef int require_open(self) except -1
    cdef int drop(self, object model_id, RowRef ref) except -1
    cdef RowRef find(self, object model_id)
    cdef RowRef known(self, object model_id)
    cdef bint read(self, RowRef ref, Usage* usage, Limits* limits) noexcept
    cdef int freed(self, RowRef ref) except -1
    cdef str name_of(self, int64_t index)

    cdef inline int64_t now_ns(self) noexcept:
        return monotonic_ns() if self.manual is None else self.manual.time_ns
