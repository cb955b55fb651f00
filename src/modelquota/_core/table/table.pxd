from modelquota._core.table.arguments cimport as_count
from modelquota._core.row.decision cimport Ask, LAST_TICKET, LOWEST_PRIORITY
from modelquota._core.layout cimport GrantRecord
from modelquota._core.table.intern cimport QuotaState, RowRef


cdef inline int start_ask(Ask* ask, object tokens, object ram_mb, object ssd_mb) except -1:
    """What a request that does not wait asks."""
    ask.tokens = as_count(tokens, "estimated_tokens")
    ask.ram_mb = as_count(ram_mb, "ram_needed_mb")
    ask.ssd_mb = as_count(ssd_mb, "ssd_needed_mb")
    ask.ticket = LAST_TICKET
    ask.priority = LOWEST_PRIORITY
    ask.counted = NULL
    return 0


cdef class QuotaTable(QuotaState):
    cdef list deferred              # ends of grants whose rows were locked by processes that do not run
    cdef object answer(self, RowRef ref, object model_id, const Ask* ask, object handle)
    cdef object answer_unknown(self, object model_id, const Ask* ask)
    cdef object answer_late(self, RowRef ref, object model_id, const Ask* ask, object handle)
    cdef object check_several(self, object model_ids, const Ask* ask, bint peek)
    cdef int count_unknown(self, int ids) except -1
    cdef bint adopt(self, str model_id) except -1


cdef class RowHandle:
    cdef readonly QuotaTable manager
    cdef readonly str model_id
    cdef RowRef ref
    cdef int forks                  # in which process it was bound
    cdef GrantRecord* record        # keeps the model from being forgotten

    cdef int change(self, RowRef ref, bint bind) except -1
