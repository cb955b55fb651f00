from libc.stdint cimport int64_t, uint32_t
from modelquota._core.decision cimport Ask, Verdict
from modelquota._core.grant cimport Grant
from modelquota._core.joint cimport Joint
from modelquota._core.layout cimport Place
from modelquota._core.reserve cimport GrantTable
from modelquota._core.state cimport RowRef


cdef class Waiter:
    cdef Ask ask
    cdef object model_ids
    cdef Line line                  # where it stands; None before and after
    cdef int64_t deadline_ns
    cdef Grant grant                # what was admitted and has not been taken
    cdef object result              # the last denial
    cdef object error               # what kept it from being decided
    cdef readonly bint done         # admitted or refused
    cdef public bint in_thread      # sleeps in a thread of its own, and so can always watch the clock for the others

    cdef int finish(self, Grant grant, object result) except -1


cdef class Line:
    cdef WaitTable manager
    cdef RowRef ref
    cdef list order                 # Waiters, the first to be served first
    cdef Place* place               # where it is stated in the shared state
    cdef int64_t published          # how many it says there
    cdef Waiter head                # whom it says there
    cdef int64_t next_ns            # when to try again unless something becomes free; FAR
    cdef int64_t armed_ns
    cdef Waiter driver              # who watches the clock
    cdef uint32_t head_limit        # what the first waits for
    cdef int64_t head_ready_ns
    cdef int forks
    cdef bint busy                  # a row was locked: to be tried again shortly
    cdef bint pumping
    cdef bint again

    cdef int insert(self, Waiter waiter) except -1
    cdef int remove(self, Waiter waiter) except -1
    cdef int serve(self, list told, list moved, bint nowait) except -1
    cdef int fail(self, Waiter waiter, object error, list told) except -1
    cdef int expire(self, list told, int64_t now_ns) except -1
    cdef bint publish(self, bint nowait) except -1
    cdef Waiter drive(self)


cdef class WaitTable(GrantTable):
    cdef set lines                  # that somebody of this process stands in

    cdef Line line_of(self, RowRef ref)
