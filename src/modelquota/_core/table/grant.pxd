from libc.stdint cimport int64_t, uint32_t
from modelquota._core.layout cimport Charge
from modelquota._core.row.decision cimport Request, Verdict
from modelquota._core.row.grant cimport Holding
from modelquota._core.row.tokens cimport Kinds
from modelquota._core.state.joint cimport JointRequest, MOST_MODELS
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.intern cimport RowRef


cdef enum Stage:
    CLOSED = 0
    OPEN = 1
    SETTLED = 2         # the actual tokens are known; memory and concurrency are still held


cdef enum:  # what the end of a grant makes of its charges
    KEEP = 0            # they stay: the estimate is the truth, or they were settled before
    SETTLE = 1          # the actual tokens take their place,
    COUNTED = 2         # or the output tokens that add() counted, with the input and cached tokens of the estimate,
    NOTHING = 3         # or none
    UNDO = 4            # none, and the request is refunded too


cdef struct Addition:
    # Output tokens that add() charges beyond the estimate.
    const Kinds* kinds      # of the estimate
    int64_t estimates[MOST_MODELS]      # what it was charged at each member
    int64_t begin           # output tokens that are covered already
    int64_t over            # those that were generated since,
    int64_t chunk           # and as many as are charged; out: what was
    bint fits               # out: whether that is within all limits


cdef struct Ending:
    # What the end of a grant does to one model.
    int member
    int end
    Kinds kinds             # of the estimate, or the actual tokens
    int64_t output          # what add() counted
    bint close              # release what is held
    bint lapsed             # other processes may already have done all of this


cdef class Deferred:
    cdef RowRef ref
    cdef Holding member
    cdef Charge* charges
    cdef int times
    cdef Ending ending


cdef class Grant:
    cdef State state
    cdef Pools pools
    cdef RowRef ref             # of the first model; None if no model has a quota
    cdef tuple others           # RowRefs of the rest, or None
    cdef Holding first
    cdef Holding* more             # of the others
    cdef Charge charge          # of the first model, at admission
    cdef Charge* charges        # all: `times` groups of `members`, the admission's first, then those of add()
    cdef int members
    cdef int times
    cdef int capacity           # of `charges`, in groups; 0 while `charges` is `&charge`
    cdef int adding             # threads inside charge_more(),
    cdef int64_t claimed        # and the tokens that they are charging
    cdef int forks              # fork_count() of the process that made it
    cdef Stage stage
    cdef bint cancelled
    cdef bint undone            # it counts no tokens: cancelled, or ended by an exception
    cdef bint unclaimed         # the waiting request has not taken it yet,
    cdef bint lapsed            # and no longer can: its deadline has passed
    cdef bint counting          # add() was called
    cdef readonly bint limit_reached
    cdef int over_code          # the code of the limit that it was admitted over, 0 if there is none
    cdef Kinds estimate
    cdef Kinds kinds            # of the estimate, from settle() on the actual tokens
    cdef int64_t free_output    # output tokens up to which add() has nothing to charge
    cdef int64_t used           # those that add() counted

    cdef Holding* hold(self, int member) noexcept nogil
    cdef Charge* charge_of(self, int time, int member) noexcept nogil
    cdef RowRef ref_of(self, int member)
    cdef bint claim(self) noexcept
    cdef void count_kinds(self, Kinds* counted) noexcept
    cdef int require_open(self, str verb) except -1
    cdef bint ours(self) noexcept
    cdef bint charge_more(self) except -1
    cdef int reserve_charges(self) except -1
    cdef int finish(self, int end, bint close) except -1
    cdef bint finish_or_defer(self, const Ending* ending) except -1
    cdef int refund_joint(self, JointRequest* joint, int64_t now_ns) except -1
    cdef int tell(self, uint32_t members) except -1
    cdef int release_as(self, bint failed) except -1


cdef bint same_kinds(const Kinds* kinds, const Kinds* other) noexcept
cdef int finish_deferred(Pools pools) except -1
cdef Grant make_grant(Pools pools, JointRequest* joint, list refs, const Request* request, const Verdict* verdict)
