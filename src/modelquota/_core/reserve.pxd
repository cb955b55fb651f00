from modelquota._core.decision cimport Ask, Verdict
from modelquota._core.joint cimport Joint
from modelquota._core.table cimport QuotaTable

cdef enum:
    BUSY = -2           # decide_all: a row is locked, and the caller does not wait


cdef class GrantTable(QuotaTable):
    cdef int parties_of(self, object model_ids, Joint* joint, list refs) except -1
    cdef int take_records(self, Joint* joint) except -1
    cdef int give_records(self, Joint* joint) except -1
    cdef int decide_all(self, object model_ids, const Ask* ask, bint holding, bint nowait, list refs, Joint* joint,
                        Verdict* verdict) except -3
