from modelquota._core.decision cimport Ask
from modelquota._core.state cimport QuotaState, RowRef


cdef class QuotaTable(QuotaState):
    cdef object answer(self, RowRef ref, object model_id, const Ask* ask, object handle)
    cdef object answer_unknown(self, object model_id, const Ask* ask)


cdef class RowHandle:
    cdef readonly QuotaTable manager
    cdef readonly str model_id
    cdef RowRef ref
