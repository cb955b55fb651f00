from modelquota._core.layout cimport GrantRecord
from modelquota._core.table.intern cimport RowRef
from modelquota._core.table.table cimport QuotaTable


cdef class RowHandle:
    cdef readonly QuotaTable manager
    cdef readonly str model_id
    cdef RowRef ref
    cdef int forks                  # in which process it was bound
    cdef GrantRecord* record        # keeps the model from being forgotten

    cdef int change(self, RowRef ref, bint bind) except -1
