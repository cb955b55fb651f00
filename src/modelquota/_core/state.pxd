from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.layout cimport Ledger, Limits, Row
from modelquota._core.shared cimport SharedState
from modelquota._core.usage cimport Usage


cdef class RowRef:
    # Where a model lives. It is good as long as the row's generation is this one.
    cdef Row* row
    cdef Ledger* ledger
    cdef uint32_t generation
    cdef str model_id
    cdef object line                # the Line of this process's requests that wait for the model, or None


cdef class QuotaState(SharedState):
    cdef dict interned              # model id -> RowRef
    cdef uint64_t seen_version      # of the registry, as far as `interned` goes
    cdef uint32_t[::1] seen         # generation of each row that is interned

    cdef int look_around(self) except -1
    cdef int learn(self, object model_id, int64_t index, uint32_t generation) except -1
    cdef int drop(self, object model_id, RowRef ref) except -1
    cdef RowRef find(self, object model_id)
    cdef RowRef known(self, object model_id)
    cdef bint read(self, RowRef ref, int64_t now_ns, Usage* usage, Limits* limits) noexcept
    cdef int look_for_dead(self) except -1
    cdef int freed(self, RowRef ref) except -1
    cdef str name_of(self, int64_t index)
