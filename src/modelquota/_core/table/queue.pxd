from libc.stdint cimport int64_t
from modelquota._core.row.decision cimport Request, Verdict
from modelquota._core.state.clock cimport Watcher
from modelquota._core.state.joint cimport JointRequest, Places
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.admission cimport Admission
from modelquota._core.table.grant cimport Grant
from modelquota._core.table.intern cimport RowRef


cdef class Waiter:
    cdef Queues queues              # None before it waits
    cdef Request request
    cdef tuple ids
    cdef list waits_in              # the WaitQueues in which it is; empty before and after
    cdef Places places              # its entries in the queues of the state
    cdef int64_t started_ns         # in the rows' time, as are the others
    cdef int64_t timeout_ns         # FAR if there is none
    cdef int64_t deadline_ns
    cdef RowRef held_up_by          # the model that denied it last: its grace period counts
    cdef Grant grant                # what was admitted and has not been taken
    cdef object result              # the last denial
    cdef object error               # the exception that ended the wait, or None
    cdef readonly bint done         # admitted or refused
    cdef public object context      # its event loop; None for a thread, which can watch the clock for all

    cdef int finish(self, Grant grant, object error) except -1
    cdef bint set_deadline(self) noexcept
    cdef int enter(self, JointRequest* joint, list refs, int64_t patience_ns) except -1
    cdef int give_places(self) except -1


cdef class WaitQueue:
    cdef Queues queues
    cdef RowRef ref
    cdef list order                 # Waiters, in the order in which they are served
    cdef int64_t next_ns            # when to try again unless something becomes free before; FAR: never
    cdef int64_t armed_ns           # next_ns when the watchers were last armed
    cdef int64_t busy_ns            # how long until the next try if a row was locked; 0 if none was
    cdef double grace_sec           # the model's grace period that the deadlines were computed with
    cdef list watchers              # the Waiters that watch the clock, one per context
    cdef int forks                  # fork_count() of the process that made it
    cdef bint serving               # serve() makes its passes
    cdef bint again                 # serve() was called in the meantime

    cdef int insert(self, Waiter waiter) except -1
    cdef int remove(self, Waiter waiter) except -1
    cdef int end(self) except -1
    cdef int serve_once(self, list to_notify, list others) except -1
    cdef int check_deadlines(self, list to_notify, list others, int64_t now_ns) except -1
    cdef int settle(self, Waiter waiter, Grant grant, object error, list to_notify, list others) except -1
    cdef list watch(self)


cdef class Queues(Watcher):
    cdef State state
    cdef Pools pools
    cdef Admission admission
    cdef dict by_ref                # RowRef -> the WaitQueue of this process's waiters for it
    cdef set unclaimed              # Waiters that were admitted and have not taken their grants
    cdef list leaving               # Waiters that left while a row was locked; their entries are still to be unlinked

    cdef WaitQueue queue_of(self, RowRef ref)
    cdef object admit_or_queue(self, Waiter waiter, object model_id, object estimated_tokens, object ram_needed_mb,
                               object ssd_needed_mb, object timeout, object priority, bint nowait)
    cdef object admit(self, object make_waiter, object model_id, object tokens, object ram_needed_mb,
                      object ssd_needed_mb, object timeout, object priority)
    cdef int begin(self, Waiter waiter, const Request* request, tuple ids, int64_t timeout_ns) except -1
    cdef Grant granted(self, const Request* request, JointRequest* joint, const Verdict* verdict, list refs)
    cdef int denied(self, Waiter waiter, const JointRequest* joint, const Verdict* verdict, list refs) except -1
    cdef object enter(self, Waiter waiter, bint nowait)
    cdef object try_again(self, Waiter waiter)
    cdef object full(self, RowRef ref, object denial)
    cdef int leave_queues(self, Waiter waiter) except -1
    cdef int leave_deferred(self) except -1
    cdef int reclaim(self, int64_t now_ns) except -1
    cdef int close(self) except -1
