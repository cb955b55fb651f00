"""Lines: requests that wait for a model, one line a model and process, for threads and asyncio tasks alike.

Nothing here sleeps, and no thread is started. Whatever may have made room (a release, a refund, a live change, a timer)
calls `Line.pump`, which admits from the front what fits, tells those it concerns, and leaves word when to try again. One
of the waiting, the driver, watches the clock for all; when it leaves, another one does.

The lines of a process are guarded by the GIL: between two lines of this file no other thread runs, and no signal handler.
Only finalizers may, wherever an object is made, and what wakes a waiter; both find the line in order.
"""
from libc.math cimport INFINITY
from libc.stdint cimport INT64_MAX, int32_t, int64_t, uint64_t

from modelquota._core.count cimport as_count
from modelquota._core.decision cimport Ask, NEVER, QUEUE, QUEUE_PLACE, REJECT, Verdict
from modelquota._core.grant cimport Grant, make_grant
from modelquota._core.joint cimport Joint, NOBODY
from modelquota._core.layout cimport Ledger, MAX_COUNT, MAX_TIME_NS, Row, Shared
from modelquota._core.lock cimport take_over, unlock
from modelquota._core.repair cimport enter_row, fold_places, repair_row, try_row
from modelquota._core.reserve cimport BUSY, GrantTable
from modelquota._core.result cimport result_of
from modelquota._core.shared cimport fork_count
from modelquota._core.state cimport RowRef
from modelquota._core.table cimport start_ask

from modelquota.errors import QuotaExceededError

cdef int64_t FAR = INT64_MAX
cdef list abandoned = []            # Waiters whose owners are gone
cdef bint burying = False           # somebody sees to them
cdef int64_t LOOK_NS = 10_000_000   # how often a line looks what other processes have given back,
cdef int64_t LINES_AT_ONCE = 16     # while the process has no more lines than these; more take turns
cdef int64_t BUSY_NS = 50_000       # a row was locked longer than a look: its owner was preempted

cdef extern from *:
    int64_t take_ticket "__atomic_fetch_add"(int64_t* word, int64_t more, int order) noexcept nogil
    const int RELAXED "__ATOMIC_RELAXED"


cdef inline bint precedes(const Ask* ask, const Ask* other) noexcept:
    """Higher priority first, first come first served within one."""
    return ask.priority > other.priority or (ask.priority == other.priority and ask.ticket < other.ticket)


cdef inline bint asks_as_much(const Ask* ask, const Ask* other) noexcept:
    """Whether a request cannot fit where the other one did not."""
    return ask.tokens >= other.tokens and ask.ram_mb >= other.ram_mb and ask.ssd_mb >= other.ssd_mb


cdef int64_t as_priority(object priority) except? -1:
    cdef object number = priority.__index__() if hasattr(priority, "__index__") else None
    if number is None:
        raise TypeError(f"priority is {priority!r}; give an integer")
    if not -(2**31) < number < 2**31:
        raise ValueError(f"priority is {number}; give an integer, -(2**31) < priority < 2**31, the higher the sooner")
    return number


cdef int64_t as_wait_ns(object timeout) except -1:
    """Nanoseconds of a timeout in seconds; FAR without one."""
    cdef double seconds
    if timeout is None:
        return FAR
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout is {timeout!r}; give seconds, 0 or more, or None")
    return <int64_t> (seconds * 1e9) if seconds < 2e9 else FAR


cdef class Waiter:
    """A request that may have to wait. A subclass says how its owner sleeps.

    ``prepare()`` is called once, before it stands in a line; ``wake()``, from any thread, once it is done; ``arm()``, from
    any thread, when it became the one to watch the clock, or has to look earlier.
    """

    @property
    def wake_at_ns(self):
        """When its owner should call `pump`, in ns of the manager's clock; None while only others can change anything."""
        cdef int64_t at_ns = self.deadline_ns
        if self.line is None or self.line.manager.manual is not None:
            return None
        if self.line.driver is self and self.line.next_ns < at_ns:
            at_ns = self.line.next_ns
        return None if at_ns == FAR else at_ns

    def sleep_seconds(self):
        """How long its owner should sleep unless woken: 0.0 = not at all; None while only others can change anything."""
        if self.line is not None and self.line.busy and self.line.driver is self:
            return BUSY_NS * 1e-9       # on a manual clock too
        at_ns = self.wake_at_ns
        if at_ns is None:
            return None
        return max(0, at_ns - self.line.manager.now_ns()) * 1e-9

    def pump(self, nowait=False):
        """Let the line that it stands in try again."""
        if self.line is not None:
            self.line.pump(nowait)

    def take(self):
        """The grant; QuotaExceededError where it was refused, and what else kept it from being decided."""
        cdef Grant grant = self.grant
        self.grant = None
        if self.error is not None:
            raise self.error
        if grant is None:
            raise QuotaExceededError(self.result)
        return grant

    def leave(self, nowait=False):
        """Leave no trace, however far it has come. With `nowait` it may return a line that is still to be pumped."""
        cdef Line line = self.line
        cdef Grant grant = self.grant
        if line is not None and line.forks == fork_count():
            line.remove(self)
            line.pump(nowait)
            return line if line.orphaned else None
        if grant is not None:
            self.grant = None
            grant.cancel()
        return None

    def abandon(self):
        """Leave, for whoever finds that its owner is gone; one after the other, where that wakes more of the kind."""
        global burying
        abandoned.append(self)
        if burying:
            return
        burying = True
        try:
            while abandoned:
                abandoned.pop().leave()
        finally:
            burying = False

    cdef int finish(self, Grant grant, object result) except -1:
        self.grant = grant
        if result is not None:
            self.result = result
        self.line = None
        self.done = True
        return 0


cdef class Line:
    """Those of this process who wait for one model."""

    cdef int insert(self, Waiter waiter) except -1:
        cdef Py_ssize_t at = len(self.order)
        while at > 0 and precedes(&waiter.ask, &(<Waiter> self.order[at - 1]).ask):
            at -= 1
        waiter.line = self
        self.order.insert(at, waiter)
        return 0

    cdef int remove(self, Waiter waiter) except -1:
        cdef Py_ssize_t i
        waiter.line = None
        for i in range(len(self.order)):
            if self.order[i] is waiter:
                del self.order[i]
                break
        return 0

    @property
    def orphaned(self):
        """Whether the row still has to be told that nobody stands here any more, and nobody is left to do so."""
        return self.published != 0 and not self.order

    def pump(self, nowait=False):
        """Admit from the front what fits now. With `nowait` a locked row is tried again later, not waited for."""
        cdef list told = []
        cdef list moved = []
        if self.forks != fork_count():
            if self.ref.line is self:
                self.ref.line = None
            self.manager.lines.discard(self)
            if self.manager.manual is not None:
                self.manager.manual.watchers.discard(self)
            return                      # those who stood here are threads and tasks of the parent process
        if self.pumping:
            self.again = True
            return
        self.pumping = True
        try:
            self.again = True
            while self.again:
                self.again = False
                self.serve(told, moved, nowait)
        except BaseException:
            self.next_ns = self.manager.now_ns() + LOOK_NS
            raise
        finally:
            self.pumping = False
            call_all(told, moved, self.drive(), nowait)

    cdef int serve(self, list told, list moved, bint nowait) except -1:
        """One pass over the line: who is admitted, who is refused, who moves to another line."""
        cdef Joint joint
        cdef Verdict verdict
        cdef list refs = []
        cdef Waiter waiter
        cdef RowRef ref
        cdef Waiter blocked = None
        cdef Py_ssize_t i = 0
        cdef int named
        cdef int64_t now_ns = self.manager.now_ns()
        self.next_ns = FAR
        self.busy = False
        while i < len(self.order):
            waiter = self.order[i]
            if i == 0 and waiter is not self.head and not self.publish(nowait):
                self.busy = True
                break
            if blocked is not None and asks_as_much(&waiter.ask, &blocked.ask):
                i += 1
                continue
            try:
                named = self.manager.decide_all(waiter.model_ids, &waiter.ask, True, nowait, refs, &joint, &verdict)
            except Exception as error:      # no room for a record, or for a model that is registered on sight
                self.fail(waiter, error, told)
                continue
            if named == BUSY:
                self.busy = True
                break
            grant = make_grant(self.manager, &joint, refs, &waiter.ask) if verdict.allowed else None
            if waiter.line is not self:     # a finalizer ran, and took it out of the line
                if grant is not None:
                    (<Grant> grant).cancel()
                self.again = True
                break
            if grant is not None:
                self.remove(waiter)
                waiter.finish(grant, None)
                told.append(waiter)
                continue
            ref = refs[named]
            waiter.result = result_of(&verdict, (<RowRef> refs[named]).model_id)
            if verdict.action == REJECT or not can_wait(&verdict, now_ns, waiter.deadline_ns):
                self.remove(waiter)
                waiter.finish(None, None)
                told.append(waiter)
                continue
            if ref is not self.ref:
                try:
                    other = self.manager.line_of(ref)
                except Exception as error:
                    self.fail(waiter, error, told)
                    continue
                self.remove(waiter)
                (<Line> other).insert(waiter)
                moved.append(other)
                continue
            if i == 0:
                self.head_limit = verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit
                self.head_ready_ns = NEVER if verdict.wait_ns == NEVER else now_ns + verdict.wait_ns
            if verdict.own_wait_ns != NEVER:    # once this model has room, the request goes on to the line of another one
                self.next_ns = min(self.next_ns, now_ns + verdict.own_wait_ns)
            if verdict.action == QUEUE:
                break
            blocked = waiter
            i += 1
        self.expire(told, now_ns)
        if not self.publish(nowait):
            self.busy = True
        if self.busy:
            self.next_ns = min(self.next_ns, now_ns + BUSY_NS)
        elif not self.manager.alone():
            self.next_ns = min(self.next_ns, now_ns + LOOK_NS * (1 + len(self.manager.lines) // LINES_AT_ONCE))
        return 0

    cdef int fail(self, Waiter waiter, object error, list told) except -1:
        """Let the one who waits have the error: whoever happens to pump has nothing to do with it."""
        if waiter.line is self:
            self.remove(waiter)
            waiter.error = error
            waiter.finish(None, None)
            told.append(waiter)
        return 0

    cdef int expire(self, list told, int64_t now_ns) except -1:
        """Refuse whose time is over."""
        cdef Waiter waiter
        cdef Py_ssize_t i = 0
        while i < len(self.order):
            waiter = self.order[i]
            if waiter.deadline_ns <= now_ns:
                del self.order[i]
                waiter.finish(None, None)
                told.append(waiter)
            else:
                i += 1
        return 0

    cdef bint publish(self, bint nowait) except -1:
        """State for all processes how many wait here and who is first; False where the row was locked."""
        cdef Row* row = self.ref.row
        cdef const Shared* shared = &self.manager.shared
        cdef Waiter head, former = self.head     # kept until the row is unlocked: with it anything may go
        if not try_row(row, shared):
            if nowait:
                if take_over(&row.lock, shared):
                    repair_row(row, shared)
                    unlock(&row.lock)
                return False
            with nogil:
                enter_row(row, shared)
        head = self.order[0] if self.order else None    # others may have come or left while the row was waited for
        self.place.row = <uint32_t> (row - shared.rows)
        self.place.generation = self.ref.generation
        if head is not None:
            self.place.priority = head.ask.priority
            self.place.ticket = head.ask.ticket
            self.place.limit = self.head_limit
            self.place.ready_ns = self.head_ready_ns
        self.place.count = len(self.order)
        if row.generation == self.ref.generation:
            fold_places(row, self.ref.ledger, shared)
        self.published = self.place.count
        self.head = head
        if head is None:
            self.place.seat = 0
        unlock(&row.lock)
        if head is None:
            self.ref.line = None
            self.manager.lines.discard(self)
            if self.manager.manual is not None:
                self.manager.manual.watchers.discard(self)
        return True

    cdef Waiter drive(self):
        """Choose who watches the clock: a thread, if one waits, since an event loop may be busy.

        Returns the chosen one where it has to be told, or None.
        """
        cdef Waiter told = None
        cdef Waiter waiter
        cdef Waiter driver = None
        for waiter in self.order:
            if driver is None or waiter.in_thread:
                driver = waiter
            if driver.in_thread:
                break
        if driver is not None and (driver is not self.driver or self.next_ns < self.armed_ns or self.busy):
            told = driver
        self.driver = driver
        self.armed_ns = self.next_ns
        return told


cdef object tell(Waiter waiter, bint done):
    """Wake it or have it watch the clock; what that raised. A KeyboardInterrupt may strike first: then once more."""
    cdef int i
    error = None
    for i in range(2):
        try:
            if done:
                waiter.wake()
            else:
                waiter.arm()
            break
        except BaseException as raised:
            error = raised
    return error


cdef int call_all(list done, list moved, Waiter driver, bint nowait) except -1:
    """Tell everybody concerned. Whatever one of them raises, the others are told, and then it is raised."""
    cdef Waiter waiter
    cdef Line line
    error = None
    for waiter in done:
        error = tell(waiter, True) or error
    for line in moved:
        try:
            line.pump(nowait)
        except BaseException as raised:
            error = raised
    if driver is not None:
        error = tell(driver, False) or error
    if error is not None:
        raise error
    return 0


cdef inline bint can_wait(const Verdict* verdict, int64_t now_ns, int64_t deadline_ns) noexcept:
    """Whether a wait until the deadline may help."""
    return verdict.patience_ns != NEVER and (
        verdict.patience_ns <= deadline_ns - now_ns if deadline_ns != FAR else True)


cdef class WaitTable(GrantTable):
    """The core of `acquire` and `acquire_async`."""

    def __cinit__(self, *args, **kwargs):
        self.lines = set()

    cdef Line line_of(self, RowRef ref):
        """The line for a row, made where there is none."""
        cdef Line line = ref.line
        if line is not None and line.forks == fork_count():
            return line
        line = Line.__new__(Line)
        line.manager = self
        line.ref = ref
        line.order = []
        line.next_ns = line.armed_ns = FAR
        line.head_ready_ns = NEVER
        line.forks = fork_count()
        line.place = self.take_place()
        ref.line = line
        self.lines.add(line)
        if self.manual is not None:
            self.manual.watchers.add(line)
        return line

    def _begin(self, Waiter waiter not None, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout, priority,
               nowait):
        """A Grant where the request is admitted at once, the waiter where it waits, None where a row is locked.

        Raises QuotaExceededError where it is denied for good.
        """
        cdef Joint joint
        cdef Verdict verdict
        cdef list refs = []
        cdef RowRef ref
        cdef Line line
        cdef Grant grant
        cdef int64_t wait_ns, now_ns, waiting
        cdef double grace_ns
        start_ask(&waiter.ask, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        waiter.ask.priority = <int32_t> as_priority(priority)
        wait_ns = as_wait_ns(timeout)
        named = self.decide_all(model_id, &waiter.ask, True, nowait, refs, &joint, &verdict)
        if named == BUSY:
            return None
        grant = make_grant(self, &joint, refs, &waiter.ask) if verdict.allowed else None
        if named == NOBODY:
            return grant
        result = result_of(&verdict, (<RowRef> refs[named]).model_id)
        if verdict.log_held:
            self._log_violation(result.model_id, result, verdict.log_held)
        if grant is not None:
            return grant
        ref = refs[named]
        now_ns = self.now_ns()
        grace_ns = ref.ledger.grace_period_sec * 1e9
        wait_ns = min(wait_ns, <int64_t> grace_ns if grace_ns < 2e18 else FAR)
        waiter.deadline_ns = now_ns + wait_ns if wait_ns < MAX_TIME_NS else FAR
        if verdict.action == REJECT or not can_wait(&verdict, now_ns, waiter.deadline_ns) or wait_ns == 0:
            raise QuotaExceededError(result)
        waiter.prepare()        # other threads may come in between
        line = ref.line
        waiting = ref.ledger.waiting
        if line is not None and line.forks == fork_count():
            waiting += len(line.order) - line.published     # who has come and is not stated yet
        if waiting >= ref.ledger.max_queued:
            verdict.limit = QUEUE_PLACE
            verdict.used = <double> waiting
            verdict.bound = <double> ref.ledger.max_queued
            verdict.asked = 1
            verdict.usage = 100.0 * verdict.used / max(verdict.bound, 1.0)
            raise QuotaExceededError(result_of(&verdict, result.model_id))
        waiter.model_ids = model_id if isinstance(model_id, str) else tuple(model_id)
        waiter.result = result
        waiter.ask.counted = ref.ledger
        waiter.ask.counted_generation = ref.generation
        waiter.ask.ticket = take_ticket(&self.shared.header.next_ticket, 1, RELAXED)
        line = self.line_of(ref)
        if not line.order:
            line.head_limit = verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit
        line.insert(waiter)
        line.pump(nowait)
        return waiter

    def _pump_all(self):
        """Something has changed for all models."""
        for line in list(self.lines):
            line.pump()
