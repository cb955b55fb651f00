from libc.stdint cimport int64_t
from modelquota._core.layout cimport Shared
from modelquota._core.row.decision cimport Request
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.admission cimport Admission
from modelquota._core.table.intern cimport Interned, RowRef
from modelquota._core.table.queue cimport Queues


cdef class QuotaTable:
    cdef Shared* shared             # of `state`, held here because every check reads it
    cdef dict ids                   # of `interned`, for the same reason
    cdef State state
    cdef Pools pools
    cdef Interned interned
    cdef Admission admission
    cdef Queues queues

    cdef object answer(self, RowRef ref, object model_id, const Request* request, object handle)
    cdef object answer_metered(self, RowRef ref, object model_id, const Request* request, object handle, int64_t now_ns)
    cdef object answer_unknown(self, object model_id, const Request* request)
    cdef object answer_late(self, RowRef ref, object model_id, const Request* request, object handle)
    cdef object _check_many(self, object codes, object estimated_tokens, object out, object times_ns,
                            object retry_after_ms, Py_ssize_t* decided)
