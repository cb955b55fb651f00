from libc.stdint cimport int64_t, uint32_t
from modelquota._core.layout cimport Row
from modelquota._core.row.decision cimport Request, Verdict
from modelquota._core.row.grant cimport Holding
from modelquota._core.state.joint cimport JointRequest, Places
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.grant cimport Grant
from modelquota._core.table.intern cimport Interned, RowRef

cdef enum:
    MAY_WAIT = -1       # decide_all: wait for a lock as long as it takes
    BUSY = -2           # decide_all: a row stayed locked
    MOST_ROUNDS = 64    # attempts at a decision whose ids are registered on sight and removed again at once


cdef tuple ids_of(object model_id)


cdef inline void put_member(JointRequest* joint, RowRef ref, const Row* rows) noexcept:
    """Make a model the next member."""
    cdef Holding* member = &joint.members[joint.count]
    member.row = ref.row
    member.cold = ref.cold
    member.generation = ref.generation
    member.index = <uint32_t> (ref.row - rows)
    member.decides_meters = False
    member.record = NULL
    member.entry = NULL
    joint.count += 1


cdef class Admission:
    cdef State state
    cdef Pools pools
    cdef Interned interned
    cdef object events              # the callbacks of the facade: template_of, on_unknown_model, on_violation

    cdef object check_several(self, object model_ids, const Request* request, bint peek)
    cdef object told(self, const JointRequest* joint, const Verdict* verdict, list refs)
    cdef Grant reserve(self, tuple ids, const Request* request)
    cdef int count_unknown(self, int ids) except -1
    cdef bint adopt(self, str model_id) except -1
    cdef RowRef find_or_adopt(self, str model_id)
    cdef bint take_meters(self, tuple ids, JointRequest* joint, list refs) except -1
    cdef int members_of(self, tuple ids, JointRequest* joint, list refs, list templates) except -1
    cdef int take_records(self, JointRequest* joint) except -1
    cdef int give_records(self, JointRequest* joint) except -1
    cdef int decide_all(self, tuple ids, const Request* request, bint holding, int64_t patience_ns, list refs,
                        JointRequest* joint, Verdict* verdict, const Places* places) except -3
    cdef object peek_all(self, tuple ids, const Request* request)
