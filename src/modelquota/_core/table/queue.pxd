from libc.stdint cimport int64_t
from modelquota._core.row.decision cimport Ask
from modelquota._core.state.clock cimport Watcher
from modelquota._core.state.joint cimport Joint, Places
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.admission cimport Admission
from modelquota._core.table.grant cimport Grant
from modelquota._core.table.intern cimport RowRef


cdef class Waiter:
    cdef Queues queues              # None before it waits
    cdef Ask ask
    cdef tuple ids
    cdef list lines                 # those in which it is; empty before and after
    cdef Places places              # its entries in the queues of the state
    cdef int64_t started_ns         # in the rows' time, as are the others
    cdef int64_t timeout_ns         # FAR without one
    cdef int64_t deadline_ns
    cdef RowRef held_up_by          # the model whose grace period counts: where it was denied last
    cdef Grant grant                # what was admitted and has not been taken
    cdef object result              # the last denial
    cdef object error               # what kept it from being decided
    cdef readonly bint done         # admitted or refused
    cdef public object context      # who watches the clock: one of each context does; None: a thread, which always can

    cdef int finish(self, Grant grant, object error) except -1
    cdef bint set_deadline(self) noexcept
    cdef int stand(self, Joint* joint, list refs, int64_t patience_ns) except -1
    cdef int give_places(self) except -1


cdef class Line:
    cdef Queues queues
    cdef RowRef ref
    cdef list order                 # Waiters, the first to be served first
    cdef int64_t next_ns            # when to try again unless something becomes free; FAR
    cdef int64_t armed_ns
    cdef int64_t busy_ns            # a row was locked: how long until the next try; 0 = it was not
    cdef double grace_sec           # of the model, as far as the deadlines have it
    cdef list watchers              # who watches the clock, one of each context
    cdef int forks
    cdef bint pumping
    cdef bint again

    cdef int insert(self, Waiter waiter) except -1
    cdef int remove(self, Waiter waiter) except -1
    cdef int end(self) except -1
    cdef int serve(self, list told, list others) except -1
    cdef int see_to_deadlines(self, list told, list others, int64_t now_ns) except -1
    cdef int settle(self, Waiter waiter, Grant grant, object error, list told, list others) except -1
    cdef list watch(self)


cdef class Queues(Watcher):
    cdef State state
    cdef Pools pools
    cdef Admission admission
    cdef dict lines                 # RowRef -> Line in which somebody of this process is
    cdef set unclaimed              # Waiters that were admitted and have not taken their grants
    cdef list buried                # Waiters that have left while a row was locked

    cdef Line line_of(self, RowRef ref)
    cdef object admit_or_queue(self, Waiter waiter, object model_id, object estimated_tokens, object ram_needed_mb,
                               object ssd_needed_mb, object timeout, object priority, bint nowait)
    cdef object try_again(self, Waiter waiter)
    cdef object full(self, RowRef ref, object denial)
    cdef int leave_queues(self, Waiter waiter) except -1
    cdef int bury(self) except -1
    cdef int reclaim(self, int64_t now_ns) except -1
    cdef int close(self) except -1
