from libc.stdint cimport int64_t, uint64_t
from modelquota._core.layout cimport GrantRecord, Pool, QueueEntry
from modelquota._core.state.state cimport State


cdef class Pools:
    cdef State state
    cdef list deferred              # ends of grants that were put off because a row stayed locked
    cdef int64_t swept_ns           # when this process last looked for dead ones
    cdef uint64_t seen_unclaimed    # Header.unclaimed_made when `overdue_ns` was computed
    cdef int64_t overdue_ns         # the earliest time of the rows at which another process's grant may be released

    cdef int claim(self, Pool* pool, str what, str remedy) except -1
    cdef GrantRecord* take_grant_record(self) except NULL
    cdef QueueEntry* take_entry(self) except NULL
    cdef int sweep(self) except -1
    cdef int release_overdue(self) except -1
    cdef int sweep_if_due(self) except -1
    cdef int reclaim_if_due(self) except -1
