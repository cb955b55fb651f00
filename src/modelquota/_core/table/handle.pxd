from modelquota._core.layout cimport GrantRecord
from modelquota._core.table.intern cimport RowRef
from modelquota._core.table.table cimport QuotaTable


cdef class RowHandle:
    cdef readonly QuotaTable manager
    cdef readonly str model_id
    cdef RowRef ref
    cdef int forks                  # fork_count() of the process that bound it
    cdef GrantRecord* record        # keeps the model from being removed to make room

    cdef int change(self, RowRef ref, bint bind) except -1
