from libc.stdint cimport int64_t, uint32_t
from modelquota._core.layout cimport Charge
from modelquota._core.row.decision cimport Ask
from modelquota._core.row.grant cimport Hold
from modelquota._core.state.joint cimport Joint
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.intern cimport RowRef


cdef enum Stage:
    CLOSED = 0
    OPEN = 1
    SETTLED = 2         # the truth is known; memory and concurrency are still held


cdef struct Ending:
    # What is to be done to one model at the end of a grant.
    int party
    int64_t surplus         # tokens to refund; negative: to charge
    bint undo               # refund the request too
    bint close              # give back what is held
    bint lapsed             # others may have done all that by now


cdef class Deferred:
    cdef RowRef ref
    cdef Hold party
    cdef Charge* charges
    cdef int times
    cdef Ending ending


cdef class Grant:
    cdef State state
    cdef Pools pools
    cdef RowRef ref             # of the first model
    cdef tuple others           # RowRefs of the rest, or None
    cdef Hold first
    cdef Hold* more             # those of the others
    cdef Charge charge          # of the first model, by the admission
    cdef Charge* charges        # all: `parties` a time, the admission's and then those of add()
    cdef int parties
    cdef int times
    cdef int capacity           # of `charges`, in times; 0 while it is `charge` itself
    cdef int adding             # threads that are just charging more,
    cdef int64_t claimed        # and what they see to
    cdef int forks              # in which process it was made
    cdef Stage stage
    cdef bint cancelled
    cdef bint unclaimed         # the request that waited for it has not taken it yet,
    cdef bint lapsed            # and cannot any more: its time was over
    cdef bint counting          # add() was called
    cdef readonly bint limit_reached
    cdef readonly int64_t estimated_tokens
    cdef int64_t charged        # the estimate and what add() charged beyond it
    cdef int64_t used           # what add() counted, or settle() said

    cdef Hold* hold(self, int party) noexcept nogil
    cdef Charge* charge_of(self, int time, int party) noexcept nogil
    cdef RowRef ref_of(self, int party)
    cdef bint claim(self) noexcept
    cdef int require_open(self, str verb) except -1
    cdef bint ours(self) noexcept
    cdef bint charge_more(self) except -1
    cdef int reserve_charges(self) except -1
    cdef int finish(self, int64_t tokens, bint undo, bint close) except -1
    cdef bint finish_or_defer(self, const Ending* ending) except -1
    cdef int take_back(self, Joint* joint, int64_t now_ns) except -1
    cdef int tell(self, uint32_t parties) except -1
    cdef int release_as(self, bint failed) except -1


cdef int finish_deferred(Pools pools) except -1
cdef Grant make_grant(Pools pools, Joint* joint, list refs, const Ask* ask)
