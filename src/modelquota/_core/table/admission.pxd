from libc.stdint cimport int64_t
from modelquota._core.row.decision cimport Ask, Verdict
from modelquota._core.state.joint cimport Joint, Places
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.grant cimport Grant
from modelquota._core.table.intern cimport Interned, RowRef

cdef enum:
    MAY_WAIT = -1       # decide_all: for a lock, as long as it takes
    BUSY = -2           # decide_all: a row stays locked
    MOST_ROUNDS = 64    # of a decision for which ids are registered on sight and forgotten again at once


cdef tuple ids_of(object model_id)


cdef class Admission:
    cdef State state
    cdef Pools pools
    cdef Interned interned
    cdef object events              # what the facade wants to know: template_of, on_unknown_model, on_violation

    cdef object check_several(self, object model_ids, const Ask* ask, bint peek)
    cdef Grant reserve(self, tuple ids, const Ask* ask)
    cdef int count_unknown(self, int ids) except -1
    cdef bint adopt(self, str model_id) except -1
    cdef RowRef find_or_adopt(self, str model_id)
    cdef int parties_of(self, tuple ids, Joint* joint, list refs, list templates) except -1
    cdef int take_records(self, Joint* joint) except -1
    cdef int give_records(self, Joint* joint) except -1
    cdef int decide_all(self, tuple ids, const Ask* ask, bint holding, int64_t patience_ns, list refs, Joint* joint,
                        Verdict* verdict, const Places* places) except -3
    cdef object peek_all(self, tuple ids, const Ask* ask)
