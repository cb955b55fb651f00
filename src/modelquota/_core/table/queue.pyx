"""Wait queues: requests that wait for models, one queue per model and process, for threads and asyncio tasks alike.

A request that waits for several models is in the queue of each of them, and has an entry in the queue of each of them
in the shared state, from the start: no later request overtakes it at any of them. Of all waiting requests, the one that
is first by priority and ticket is first in all of its queues, so no two requests wait for each other.

Nothing here sleeps or starts a thread. Every event of this process that may make room calls `WaitQueue.serve`, which
admits from the front what fits, wakes the waiters that are done, and sets `next_ns`, the time of the next try. One
waiter per context watches the clock: one thread for all if a thread waits, otherwise one task per event loop, because
any loop may be busy or stopped. `serve` never waits for a lock: a locked row is tried again later. Only
`admit_or_queue` waits for one, unless `nowait`.

event                                 what the queues do                                 whom they wake or arm
------------------------------------  -------------------------------------------------  -------------------------------
a request has to wait                 enter the queue of each model, serve them          waiters that are done, watchers
release, refund, new limits, memory   wake(ref): serve the model's queue                 waiters that are done, watchers
clock, enforcement, fork, sweep       wake(None): serve all queues                       waiters that are done, watchers
the clock reaches next_ns             its watchers call Waiter.serve()                   waiters that are done, watchers
another process releases              no call: next_ns is at most LOOK_NS ahead,         waiters that are done, watchers
                                      or longer if there are many queues
a row is locked                       try again after busy_ns                            all watchers, to sleep less
a deadline has passed                 deny the request; serve its other queues           the request
the grace period has changed          recompute the deadlines that depend on it          waiters with an earlier one
a request is admitted                 leave all its queues, serve the others             the request
a waiter leaves (cancel, interrupt)   unlink it, or put that off; serve its queues       waiters that are done, watchers
an admitted waiter does not take()    cancel its grant after the deadline                the queue of each freed model
close()                               end all waits with ManagerClosedError              all waiters

Invariants of a WaitQueue, whenever no line of this file is running:

ref       `by_ref[ref]` is this queue as long as `order` is not empty, unless the process was forked.
order     Sorted by `precedes`. A waiter in it is not done, and has this queue in its `waits_in`.
next_ns   The earliest time at which a try may change anything without an event; FAR if there is none. Deadlines are not
          in it: each waiter watches its own.
armed_ns  The `next_ns` that the watchers were armed with. An earlier `next_ns` means that they are armed again.
busy_ns   0 if the last pass met no locked row; otherwise BUSY_NS .. LONGEST_BUSY_NS, doubled at each pass that met one.
grace_sec The grace period in the deadlines of the waiters that are held up by `ref`, as of the last pass.
watchers  The waiters that the last serve() chose: one thread, or one waiter per context. Empty if none waited.
forks     `fork_count()` of the process that made it. In another process the queue is dropped, not served.
serving   True while serve() makes its passes; a serve() in the meantime only sets `again`.
again     Meaningful while `serving`: one more pass is needed.

The queues of a process are guarded by the GIL: between two lines of this file no other thread runs, and no signal
handler. The exceptions are finalizers, which may run when an object is made, and the calls that wake a waiter; the
queues are consistent at both.
"""
cimport cython
from cpython.object cimport PyObject
from libc.stdint cimport int32_t, int64_t

from modelquota._core.atomics cimport add_i64_relaxed, store_i64_relaxed
from modelquota._core.layout cimport KINDS, MAX_TIME_NS
from modelquota._core.row.decision cimport NEVER, NOT_STARVED, NO_ACTION, QUEUE, QUEUE_PLACE, REJECT, Request, Verdict
from modelquota._core.state.clock cimport Watcher
from modelquota._core.state.joint cimport BUSY_ROW, DECIDED, GONE, JointRequest, NO_MEMBER, Places
from modelquota._core.state.lock cimport SLICE_NS
from modelquota._core.state.pool cimport give_record
from modelquota._core.state.queueing cimport QUEUE_FULL, enter_queues, leave_queue
from modelquota._core.state.state cimport REFUSES, fork_count
from modelquota._core.table.admission cimport Admission, BUSY, MOST_ROUNDS, ids_of
from modelquota._core.table.arguments cimport FAR, as_count, as_priority, as_wait_ns, parse_request
from modelquota._core.table.grant cimport Grant, finish_deferred, make_grant
from modelquota._core.table.intern cimport RowRef
from modelquota._core.table.result cimport QuotaCheckResult, result_of

from modelquota.errors import CapacityError, ManagerClosedError, ModelLockedError, QuotaExceededError

cdef list abandoned = []            # Waiters whose owners are gone
cdef bint draining = False          # abandon() is on the stack
cdef int64_t LOOK_NS = 10_000_000   # how often a queue checks what other processes have given back,
cdef int64_t QUEUES_AT_ONCE = 16    # while the process has at most this many queues; more take turns
cdef int64_t BUSY_NS = 50_000       # the first pause after a locked row, whose owner was preempted,
cdef int64_t LONGEST_BUSY_NS = 10_000_000   # and the longest: it may not run at all


cdef inline bint precedes(const Request* request, const Request* other) noexcept:
    """Higher priority first, first come first served within one."""
    return request.priority > other.priority or (request.priority == other.priority and request.ticket < other.ticket)


cdef inline bint needs_as_much(const Request* request, const Request* other) noexcept:
    """Whether a request cannot fit if the other one does not."""
    cdef int kind
    if request.kinds.split != other.kinds.split:
        return False        # which of them counts more depends on the weights of each model
    if request.kinds.split:
        for kind in range(KINDS):
            if request.kinds.counts[kind] < other.kinds.counts[kind]:
                return False
    elif request.kinds.count < other.kinds.count:
        return False
    return request.ram_mb >= other.ram_mb and request.ssd_mb >= other.ssd_mb


cdef inline bint can_wait(const Verdict* verdict, int64_t now_ns, int64_t deadline_ns) noexcept:
    """Whether a wait until the deadline may help."""
    return verdict.soonest_ns != NEVER and (
        verdict.soonest_ns <= deadline_ns - now_ns if deadline_ns != FAR else True)


cdef inline bint is_alive(RowRef ref) noexcept:
    return ref.row.generation == ref.generation


cdef inline int64_t grace_ns(RowRef ref) noexcept:
    """The model's grace period; FAR if it is longer than 2e18 ns."""
    cdef double nanoseconds = ref.cold.grace_period_sec * 1e9
    return <int64_t> nanoseconds if nanoseconds < 2e18 else FAR


cdef class Waiter:
    """A request that may have to wait. A subclass implements how its owner, a thread or a task, sleeps.

    The queue calls the subclass: ``prepare()`` once, in the owner's thread, before the waiter is in a queue, and only
    if it has to wait, which keeps the path without a wait fast; ``wake()``, from any thread, when it is done;
    ``arm()``, from any thread, when it has to watch the clock, or to check it earlier.

    The owner calls the queue: ``sleep_seconds()`` and ``wake_at_ns`` before it sleeps, ``serve()`` when that time has
    come, ``take()`` when it is done, and ``leave()`` at the end in every case. ``abandon()`` may come from any thread.
    """

    @property
    def wake_at_ns(self):
        """When its owner should call `serve`, in ns of the manager's clock; None if it only waits for an event."""
        cdef int64_t at_ns = self.deadline_ns
        cdef WaitQueue queue
        if not self.waits_in or self.queues.state.manual is not None:
            return None
        for queue in self.waits_in:
            if self in queue.watchers and queue.next_ns < at_ns:
                at_ns = queue.next_ns
        return None if at_ns == FAR else at_ns

    def sleep_seconds(self):
        """How long its owner should sleep unless woken: 0.0 = not at all; None = until woken."""
        cdef WaitQueue queue
        cdef int64_t busy_ns = 0
        for queue in self.waits_in or ():
            if queue.busy_ns and self in queue.watchers:
                busy_ns = queue.busy_ns if busy_ns == 0 else min(busy_ns, queue.busy_ns)
        if busy_ns:
            return busy_ns * 1e-9       # with a manual clock too
        at_ns = self.wake_at_ns
        if at_ns is None:
            return None
        return max(0, at_ns - self.queues.state.now_ns()) * 1e-9

    def serve(self):
        """Serve the queues that it is in."""
        for queue in tuple(self.waits_in or ()):
            queue.serve()

    def take(self):
        """The grant. Raises QuotaExceededError if the request was denied, or the error that ended the wait."""
        cdef Grant grant = self.grant
        self.grant = None
        if self.queues is not None:
            self.queues.unclaimed.discard(self)
        if self.error is not None:
            raise self.error
        if grant is not None and not grant.claim():     # too late
            grant.cancel()
            grant = None
        if grant is None:
            raise QuotaExceededError(self.result)
        return grant

    def leave(self):
        """Leave all queues and give back an untaken grant. Safe at any stage, and more than once."""
        cdef Grant grant = self.grant
        cdef list waits_in = self.waits_in
        cdef WaitQueue queue
        if self.queues is None or not self.queues.state.usable():
            return
        if waits_in and (<WaitQueue> waits_in[0]).forks == fork_count():
            for queue in tuple(waits_in):
                queue.remove(self)
            self.queues.leave_queues(self)
            for queue in waits_in:
                queue.serve()
        elif grant is not None:
            self.grant = None
            self.queues.unclaimed.discard(self)
            grant.cancel()

    def abandon(self):
        """Leave on behalf of an owner that is gone. Iterative: leaving one waiter may abandon others."""
        global draining
        abandoned.append(self)
        if draining:
            return
        draining = True
        try:
            while abandoned:
                abandoned.pop().leave()
        finally:
            draining = False

    cdef int finish(self, Grant grant, object error) except -1:
        self.grant = grant
        self.error = error
        self.waits_in = []
        self.done = True
        return 0

    cdef bint set_deadline(self) noexcept:
        """Recompute the deadline from the timeout and the grace period; whether it is earlier than before."""
        cdef int64_t before = self.deadline_ns
        cdef int64_t wait_ns
        cdef int i
        wait_ns = min(self.timeout_ns, grace_ns(self.held_up_by))
        if not is_alive(self.held_up_by):   # checked after the read
            return False            # the model was removed, and its grace period with it: the last deadline stays
        self.deadline_ns = self.started_ns + wait_ns if wait_ns < MAX_TIME_NS else FAR
        for i in range(self.places.count):
            store_i64_relaxed(&self.places.entries[i].deadline_ns, self.deadline_ns)
        return self.deadline_ns < before

    cdef int give_places(self) except -1:
        """Give back the entries. Requires that none of them is in a queue."""
        cdef int i
        for i in range(self.places.count):
            self.places.entries[i].seat = 0
            give_record(&self.queues.state.shared.entry_pool, self.places.entries[i] - self.queues.state.shared.entries,
                        self.queues.state.shared.me)
        self.places.count = 0
        return 0

    cdef int enter(self, JointRequest* joint, list refs, int64_t patience_ns) except -1:
        """Enter the queue of each model, in the shared state and in this process; the outcome, as of a joint decision.

        Entries that it already has are kept. Takes the rows' locks.
        """
        cdef Queues queues = self.queues
        cdef int i, k, first = self.places.count
        cdef int outcome
        cdef WaitQueue queue
        queues.leave_deferred()
        for i in range(joint.count):
            for k in range(first):
                if joint.members[i].entry == self.places.entries[k]:
                    break
            else:
                joint.members[i].entry = queues.pools.take_entry()
                self.places.entries[self.places.count] = joint.members[i].entry
                self.places.count += 1
                continue
            joint.members[i].entry = NULL       # it is already in that queue
        now_ns = queues.state.now_ns()
        outcome = enter_queues(joint, &self.request, self.deadline_ns, now_ns, &queues.state.shared, 0)
        if outcome == BUSY_ROW and patience_ns:
            queues.state.inside += 1
            with nogil:
                outcome = enter_queues(joint, &self.request, self.deadline_ns, now_ns, &queues.state.shared,
                                       patience_ns)
            queues.state.exit()
        if outcome != DECIDED:
            while self.places.count > first:
                self.places.count -= 1
                give_record(&queues.state.shared.entry_pool,
                            self.places.entries[self.places.count] - queues.state.shared.entries,
                            queues.state.shared.me)
            return outcome
        queues.state.require_open()                  # it may have been closed during the wait for the rows
        for ref in refs:
            queue = queues.queue_of(ref)
            if queue not in self.waits_in:
                queue.insert(self)
                self.waits_in.append(queue)
        return outcome


cdef class WaitQueue:
    """The waiters of this process for one model. The invariants of its fields are at the top of this file."""

    cdef int insert(self, Waiter waiter) except -1:
        cdef Py_ssize_t at = len(self.order)
        while at > 0 and precedes(&waiter.request, &(<Waiter> self.order[at - 1]).request):
            at -= 1
        self.order.insert(at, waiter)
        return 0

    cdef int remove(self, Waiter waiter) except -1:
        """Remove a waiter; without waiters the queue ends."""
        cdef Py_ssize_t i
        for i in range(len(self.order)):
            if self.order[i] is waiter:
                del self.order[i]
                break
        if not self.order:
            self.end()
        return 0

    cdef int end(self) except -1:
        """Remove this queue from the manager."""
        if self.queues.by_ref.get(self.ref) is self:
            del self.queues.by_ref[self.ref]
        if self.queues.state.manual is not None and not self.queues.by_ref:
            self.queues.state.manual.watchers.discard(self.queues)
        return 0

    def serve(self):
        """Admit from the front what fits now. Tries the rows' locks, and never waits for one."""
        cdef list to_notify = []
        cdef list others = []
        cdef list watchers
        if self.forks != fork_count():
            self.end()
            return                      # its waiters are threads and tasks of the parent process
        if not self.queues.state.usable():
            return
        if self.serving:
            self.again = True
            return
        self.serving = True
        try:
            self.again = True
            while self.again:
                self.again = False
                self.serve_once(to_notify, others)
        except BaseException:
            self.next_ns = self.queues.state.now_ns() + LOOK_NS
            raise
        finally:
            self.serving = False
            watchers = self.watch()
            notify_all(to_notify, others, watchers)

    cdef int serve_once(self, list to_notify, list others) except -1:
        """One pass over the queue: admit and deny what can be decided now. Tries the rows' locks."""
        cdef JointRequest joint
        cdef Verdict verdict
        cdef list refs = []
        cdef Waiter waiter
        cdef Waiter blocked = None
        cdef Queues queues = self.queues
        cdef Py_ssize_t i = 0
        cdef int unknown, k
        cdef bint busy = False
        cdef int64_t next_ns = FAR      # published at the end: until then another thread may read the field
        cdef int64_t now_ns = queues.state.now_ns()
        queues.leave_deferred()
        if queues.pools.deferred:
            finish_deferred(queues.pools)
        queues.reclaim(now_ns)
        self.check_deadlines(to_notify, others, now_ns)
        while i < len(self.order):
            waiter = self.order[i]
            if blocked is not None and needs_as_much(&waiter.request, &blocked.request):
                i += 1
                continue
            joint.unclaimed_until_ns = waiter.deadline_ns if waiter.deadline_ns != FAR else 0
            try:
                unknown = queues.admission.decide_all(waiter.ids, &waiter.request, True, 0, refs, &joint, &verdict,
                                                      &waiter.places)
            except Exception as error:      # no room for a record, or for a model registered on sight
                self.settle(waiter, None, error, to_notify, others)
                continue
            if unknown == BUSY:
                busy = True
                if self.ref.cold.action == QUEUE:
                    break
                i += 1
                continue
            grant = None
            if verdict.allowed:
                grant = make_grant(queues.pools, &joint, refs, &waiter.request, &verdict)
            if waiter.done or self not in waiter.waits_in:     # a finalizer ran, and took it out of the queue
                if grant is not None:
                    (<Grant> grant).cancel()
                self.again = True
                break
            if grant is not None:
                self.settle(waiter, grant, None, to_notify, others)
                continue
            waiter.result = result_of(&verdict, (<RowRef> refs[joint.violating]).model_id)
            waiter.held_up_by = refs[joint.violating]
            waiter.set_deadline()
            if verdict.action == REJECT or not can_wait(&verdict, now_ns, waiter.deadline_ns):
                self.settle(waiter, None, None, to_notify, others)
                continue
            for k in range(joint.count):
                if joint.members[k].entry == NULL:          # a model was registered again: no entry there yet
                    try:
                        if waiter.enter(&joint, refs, 0) != DECIDED:
                            busy = True
                    except Exception as error:
                        self.settle(waiter, None, error, to_notify, others)
                    break
            if waiter.done:
                continue
            if self not in waiter.waits_in or (i < len(self.order) and self.order[i] is not waiter):
                self.again = True
                break
            if verdict.wait_ns != NEVER:
                next_ns = min(next_ns, now_ns + verdict.wait_ns)
            if self.ref.cold.action == QUEUE and not verdict.aside:
                break
            if waiter.held_up_by is self.ref:
                blocked = waiter
            i += 1
        for waiter in queues.unclaimed:
            next_ns = min(next_ns, waiter.deadline_ns)
        if busy:
            self.busy_ns = min(2 * self.busy_ns, LONGEST_BUSY_NS) if self.busy_ns else BUSY_NS
            next_ns = min(next_ns, now_ns + self.busy_ns)
        else:
            self.busy_ns = 0
        if not queues.state.alone():
            next_ns = min(next_ns, now_ns + LOOK_NS * (1 + len(queues.by_ref) // QUEUES_AT_ONCE))
        self.next_ns = next_ns
        return 0

    cdef int check_deadlines(self, list to_notify, list others, int64_t now_ns) except -1:
        """Deny the waiters whose deadline has passed, by the grace period that the model has now."""
        cdef Waiter waiter
        cdef Py_ssize_t i = 0
        cdef bint changed = is_alive(self.ref) and self.grace_sec != self.ref.cold.grace_period_sec
        if changed:
            self.grace_sec = self.ref.cold.grace_period_sec
        while i < len(self.order):
            waiter = self.order[i]
            if changed and waiter.held_up_by is self.ref and waiter.set_deadline():
                to_notify.append(waiter)        # it has to check the clock earlier
            if waiter.deadline_ns <= now_ns:
                self.settle(waiter, None, None, to_notify, others)
            else:
                i += 1
        return 0

    cdef int settle(self, Waiter waiter, Grant grant, object error, list to_notify, list others) except -1:
        """End a waiter's wait: it is admitted or denied. Its other queues go to `others`, to be served."""
        cdef WaitQueue queue
        for queue in tuple(waiter.waits_in):
            queue.remove(waiter)
            if queue is not self and queue not in others:
                others.append(queue)
        waiter.finish(grant, error)
        self.queues.leave_queues(waiter)
        if grant is not None:
            self.queues.unclaimed.add(waiter)
        to_notify.append(waiter)
        return 0

    cdef list watch(self):
        """Choose the waiters that watch the clock: one thread if a thread waits, otherwise one waiter per context.

        Returns those that have to be armed.
        """
        cdef list chosen = []
        cdef list contexts = []
        cdef list to_notify = []
        cdef Waiter waiter
        for waiter in self.order:
            if waiter.context is None:
                chosen = [waiter]
                break
            if waiter.context not in contexts:
                contexts.append(waiter.context)
                chosen.append(waiter)
        for waiter in chosen:
            if waiter not in self.watchers or self.next_ns < self.armed_ns or self.busy_ns:
                to_notify.append(waiter)
        self.watchers = chosen
        self.armed_ns = self.next_ns
        return to_notify


cdef object notify(Waiter waiter):
    """Wake it if it is done, otherwise arm it; what that raised. Tried twice, because of KeyboardInterrupt."""
    cdef int i
    error = None
    for i in range(2):
        try:
            if waiter.done:
                waiter.wake()
            else:
                waiter.arm()
            break
        except BaseException as raised:
            error = raised
    return error


cdef int notify_all(list to_notify, list others, list watchers) except -1:
    """Notify `to_notify` and `watchers`, and serve `others`: all, even if one raises; that is raised at the end."""
    cdef Waiter waiter
    cdef WaitQueue queue
    error = None
    for waiter in to_notify:
        error = notify(waiter) or error
    for queue in others:
        try:
            queue.serve()
        except BaseException as raised:
            error = raised
    for waiter in watchers:
        error = notify(waiter) or error
    if error is not None:
        raise error
    return 0


@cython.no_gc_clear     # objects finalized in the same cycle may still use it
cdef class Queues(Watcher):
    """The queues of one process: the core of `acquire` and `acquire_async`."""

    def __cinit__(self, Admission admission not None):
        self.admission = admission
        self.pools = admission.pools
        self.state = admission.state
        self.state.watcher = <PyObject*> self
        self.by_ref = {}
        self.unclaimed = set()
        self.leaving = []

    def __dealloc__(self):
        if self.state.watcher == <PyObject*> self:
            self.state.watcher = NULL

    cdef WaitQueue queue_of(self, RowRef ref):
        """The queue for a row, created if necessary."""
        cdef WaitQueue queue = self.by_ref.get(ref)
        if queue is not None and queue.forks == fork_count():
            return queue
        queue = WaitQueue.__new__(WaitQueue)
        queue.queues = self
        queue.ref = ref
        queue.order = []
        queue.watchers = []
        queue.next_ns = queue.armed_ns = FAR
        queue.grace_sec = ref.cold.grace_period_sec
        queue.forks = fork_count()
        self.by_ref[ref] = queue
        if self.state.manual is not None:
            self.state.manual.watchers.add(self)
        return queue

    cdef object admit_or_queue(self, Waiter waiter, object model_id, object estimated_tokens, object ram_needed_mb,
                               object ssd_needed_mb, object timeout, object priority, bint nowait):
        """A Grant if the request is admitted at once, the waiter if it waits, None if a row is locked: try again.

        Raises QuotaExceededError if it is denied for good, ModelLockedError if nothing could be decided in time. Takes
        the rows' locks; with `nowait` it only tries them.
        """
        cdef JointRequest joint
        cdef Verdict verdict
        cdef list refs = []
        cdef Request request
        cdef int64_t timeout_ns
        if waiter.queues is None:
            parse_request(&request, estimated_tokens, ram_needed_mb, ssd_needed_mb)
            request.priority = <int32_t> as_priority(priority)
            timeout_ns = as_wait_ns(timeout)
            ids = ids_of(model_id)
            self.state.require_open()
            self.begin(waiter, &request, ids, timeout_ns)
        if waiter.request.counted == NULL:
            joint.unclaimed_until_ns = 0
            if self.admission.decide_all(waiter.ids, &waiter.request, True, 0 if nowait else SLICE_NS, refs, &joint,
                                         &verdict, NULL) == BUSY:
                return self.try_again(waiter)
            if verdict.allowed:
                return self.granted(&waiter.request, &joint, &verdict, refs)
            self.denied(waiter, &joint, &verdict, refs)
        return self.enter(waiter, nowait)

    cdef object admit(self, object make_waiter, object model_id, object tokens, object ram_needed_mb,
                      object ssd_needed_mb, object timeout, object priority):
        """The same at the first try, with `nowait`. A waiter is only made if the request is not admitted at once.

        Returns the Grant, or the waiter and whether it waits; otherwise a row is locked, to be tried again. `tokens`
        may be a tuple of input, cached and output tokens.
        """
        cdef JointRequest joint
        cdef Verdict verdict
        cdef list refs = []
        cdef Request request
        cdef Waiter waiter
        cdef int unknown, kind
        cdef int64_t timeout_ns
        cdef tuple ids
        if type(tokens) is tuple:
            parse_request(&request, 0, ram_needed_mb, ssd_needed_mb)
            request.kinds.split = True
            for kind in range(KINDS):
                request.kinds.counts[kind] = as_count((<tuple> tokens)[kind], "estimated_tokens")
        else:
            parse_request(&request, tokens, ram_needed_mb, ssd_needed_mb)
        request.priority = <int32_t> as_priority(priority)
        timeout_ns = as_wait_ns(timeout)
        ids = ids_of(model_id)
        self.state.require_open()
        joint.unclaimed_until_ns = 0
        unknown = self.admission.decide_all(ids, &request, True, 0, refs, &joint, &verdict, NULL)
        if unknown != BUSY and verdict.allowed:
            return self.granted(&request, &joint, &verdict, refs)
        waiter = make_waiter()
        self.begin(waiter, &request, ids, timeout_ns)
        try:
            if unknown == BUSY:
                return waiter, self.try_again(waiter) is not None
            self.denied(waiter, &joint, &verdict, refs)
            return waiter, self.enter(waiter, True) is not None
        except BaseException:
            waiter.leave()
            raise

    cdef int begin(self, Waiter waiter, const Request* request, tuple ids, int64_t timeout_ns) except -1:
        waiter.request = request[0]
        waiter.ids = ids
        waiter.timeout_ns = timeout_ns
        waiter.started_ns = self.state.now_ns()
        waiter.queues = self
        waiter.waits_in = []
        return 0

    cdef Grant granted(self, const Request* request, JointRequest* joint, const Verdict* verdict, list refs):
        cdef Grant grant = make_grant(self.pools, joint, refs, request, verdict)
        if joint.violating != NO_MEMBER:
            self.admission.told(joint, verdict, refs)
        return grant

    cdef int denied(self, Waiter waiter, const JointRequest* joint, const Verdict* verdict, list refs) except -1:
        """Prepare to wait after the first decision; raises QuotaExceededError if no wait may help."""
        cdef RowRef ref = refs[joint.violating]
        cdef int64_t now_ns
        waiter.result = self.admission.told(joint, verdict, refs)
        now_ns = self.state.now_ns()
        waiter.held_up_by = ref
        waiter.set_deadline()
        if verdict.action == REJECT or not can_wait(verdict, now_ns, waiter.deadline_ns) \
                or waiter.deadline_ns <= waiter.started_ns:
            raise QuotaExceededError(waiter.result)
        waiter.prepare()        # other threads may run during this call
        self.state.require_open()
        waiter.request.counted = ref.cold
        waiter.request.counted_generation = ref.generation
        waiter.request.ticket = add_i64_relaxed(&self.state.shared.header.next_ticket, 1)
        return 0

    cdef object enter(self, Waiter waiter, bint nowait):
        """Put a waiter in its queues and serve them: the waiter, or None if a row is locked. Takes the rows' locks."""
        cdef JointRequest joint
        cdef list refs = []
        cdef RowRef ref
        cdef int outcome = GONE
        for _ in range(MOST_ROUNDS):
            self.admission.members_of(waiter.ids, &joint, refs, None)
            outcome = waiter.enter(&joint, refs, 0 if nowait else SLICE_NS)
            if outcome != GONE:
                break
            self.admission.interned.unintern_if_removed(<RowRef> refs[joint.gone])
        else:
            raise CapacityError(self.state.shared.header.max_models)
        if outcome == BUSY_ROW:
            return self.try_again(waiter)
        if outcome == QUEUE_FULL:
            ref = refs[joint.violating]
            raise QuotaExceededError(self.full(ref, waiter.result))
        for queue in tuple(waiter.waits_in):
            if not waiter.done:
                queue.serve()
        return waiter

    cdef object try_again(self, Waiter waiter):
        """None, for a locked row. Past the timeout or grace period, raises the last denial or ModelLockedError."""
        cdef Verdict verdict
        cdef int64_t now_ns = self.state.now_ns()
        cdef RowRef ref
        cdef int64_t model_ns
        cdef int64_t wait_ns = waiter.timeout_ns
        self.state.pause()
        for model_id in waiter.ids:
            ref = self.admission.interned.ids.get(model_id)
            if ref is None:
                continue
            model_ns = grace_ns(ref)
            if is_alive(ref):       # checked after the read: the cold row of a removed model is cleared
                wait_ns = min(wait_ns, model_ns)
        if wait_ns == FAR or now_ns - waiter.started_ns < wait_ns:
            return None
        if waiter.result is not None:
            raise QuotaExceededError(waiter.result)
        verdict.allowed = False
        verdict.limit = 0
        verdict.action = NO_ACTION
        verdict.retry_after_ms = NEVER
        verdict.usage = 0.0
        raise ModelLockedError(result_of(&verdict, <str> waiter.ids[0]))

    cdef object full(self, RowRef ref, object denial):
        """The denial of a request for which a queue is full."""
        cdef Verdict verdict
        cdef QuotaCheckResult first = denial
        verdict.allowed = False
        verdict.limit = QUEUE_PLACE
        verdict.starved = NOT_STARVED
        verdict.cause = first.cause_code
        verdict.action = first.action_code
        verdict.retry_after_ms = first.wait_ms
        verdict.others_may_free = True
        verdict.soonest_ns = 0
        verdict.used = <double> ref.cold.waiting
        verdict.bound = <double> ref.cold.max_queued
        verdict.asked = 1
        verdict.usage = 100.0 * verdict.used / max(verdict.bound, 1.0)
        return result_of(&verdict, ref.model_id)

    cdef int leave_queues(self, Waiter waiter) except -1:
        """Unlink a waiter's entries from the shared queues. Tries the rows' locks.

        If a row is locked, this is put off; until then the entry does not block anything, because its deadline has
        passed.
        """
        cdef Places places = waiter.places
        cdef int i
        cdef bint left = True
        for i in range(places.count):
            store_i64_relaxed(&places.entries[i].deadline_ns, 0)
            left = leave_queue(places.entries[i], &self.state.shared, 0) and left
        if left:
            waiter.give_places()
        elif waiter not in self.leaving:
            self.leaving.append(waiter)
        return 0

    cdef int leave_deferred(self) except -1:
        """Retry what leave_queues() has put off. Tries the rows' locks."""
        cdef list todo
        if self.leaving:
            todo = self.leaving
            self.leaving = []
            for waiter in todo:
                self.leave_queues(waiter)
        return 0

    cdef int reclaim(self, int64_t now_ns) except -1:
        """Cancel the grants of waiters that have not taken them by their deadline."""
        cdef Waiter waiter
        cdef Grant grant
        if not self.unclaimed:
            return 0
        for waiter in tuple(self.unclaimed):
            if waiter.deadline_ns <= now_ns and waiter.grant is not None:
                self.unclaimed.discard(waiter)
                grant = waiter.grant
                waiter.grant = None
                grant.cancel()
        return 0

    cdef int look(self) except -1:
        """Do what was put off, before a request is denied because of what others hold."""
        self.reclaim(self.state.now_ns())
        self.leave_deferred()
        if self.pools.deferred:
            finish_deferred(self.pools)
        return 0

    cdef int wake(self, object ref) except -1:
        """Serve the queue of a model, or (None) all queues."""
        cdef WaitQueue queue
        if not self.by_ref:
            return 0
        if ref is None:
            for queue in tuple(self.by_ref.values()):
                queue.serve()
            return 0
        queue = self.by_ref.get(ref)
        if queue is not None:
            queue.serve()
        return 0

    cdef int forget_parent(self) except -1:
        self.by_ref = {}
        self.unclaimed = set()
        self.leaving = []
        self.pools.deferred = []
        return 0

    cdef int close(self) except -1:
        """End all waits, and release the state."""
        cdef WaitQueue queue
        cdef Waiter waiter
        cdef list to_notify = []
        cdef bint was_usable = self.state.usable()
        if self.state.closed:
            return 0
        if was_usable:
            for waiter in tuple(self.unclaimed):    # before the verbs refuse: cancel() is one
                waiter.error = ManagerClosedError()
                waiter.leave()
        self.state.closed = True
        self.state.shared.fine_until_ns = REFUSES
        for queue in tuple(self.by_ref.values()):
            if queue.forks == fork_count():
                for waiter in tuple(queue.order):
                    if not waiter.done:
                        for other in tuple(waiter.waits_in):
                            (<WaitQueue> other).remove(waiter)
                        waiter.finish(None, ManagerClosedError())
                        self.leave_queues(waiter)
                        to_notify.append(waiter)
        self.by_ref.clear()
        self.pools.deferred.clear()
        self.leaving.clear()
        if self.state.shared.header != NULL:
            self.state.end()
        notify_all(to_notify, [], [])
        return 0
