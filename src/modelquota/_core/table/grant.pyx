"""Grants: admitted requests that hold memory and concurrency, and are settled when the actual tokens are known.

A grant belongs to the process that made it. Its own fields are guarded by the GIL, and what it changes in a row by the
row's lock. A closed grant stays closed, so nothing is given back twice.
"""
cimport cython
from cpython.exc cimport PyErr_SetObject, PyErr_WarnEx, PyErr_WriteUnraisable
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc, realloc

from modelquota._core.atomics cimport store_u32
from modelquota._core.layout cimport Charge, ColdRow, KINDS, MAX_COUNT, Row, Shared
from modelquota._core.row.advance cimport advance
from modelquota._core.row.decision cimport Request, Verdict, admits_tokens, charge_tokens, is_trial
from modelquota._core.row.tokens cimport Kinds, OUTPUT, count_at, with_output
from modelquota._core.row.grant cimport Holding, refund, release_holding, reserve_tokens, settle_tokens
from modelquota._core.state.joint cimport JointRequest, lock_rows, put_in_order, unlock_rows
from modelquota._core.state.lock cimport SLICE_NS, unlock
from modelquota._core.state.pool cimport give_record
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.repair cimport lock_row
from modelquota._core.state.state cimport State, fork_count
from modelquota._core.state.unclaimed cimport claim_record
from modelquota._core.table.arguments cimport as_count, as_kinds
from modelquota._core.table.intern cimport RowRef
from modelquota._core.table.result cimport LIMITS

from modelquota.errors import GrantClosedError
from modelquota.quota.tokens import Tokens

cdef enum:
    LEAST_CHUNK = 16        # tokens that add() charges at a time beyond the estimate, at least,
    CHUNK_SHARE = 8         # and at least 1 / CHUNK_SHARE of what has been charged
    END_PATIENCE_NS = 1_000_000     # how long the end of a grant waits for a row before it is put off

cdef enum:  # the outcome of charging more, and of the end of a grant at one model
    LOCKED_OUT = 0          # the row stays locked
    DONE = 1
    WAITED_FOR = 2          # done, and requests wait for the model
    TOO_LATE = 3            # the grant was closed in the meantime


@cython.final
@cython.freelist(64)
@cython.no_gc_clear     # it needs its references to release; a cycle is broken elsewhere
cdef class Grant:
    """An admitted request: it holds memory and one unit of concurrency until it is released. Made by `reserve`.

    As a context manager it is released at the end. If its tokens have not been settled by then, the tokens that `add`
    counted stay charged; if `add` was not called either, the estimate stays charged after success, and no tokens after
    an exception.

    Refunds go to the slots of the windows that were charged, and have no effect on a window that those have left. A
    grant that is garbage-collected before it is released is released then, with a ResourceWarning. In a forked process
    the copy of a grant does nothing.

    Attributes
    ----------
    estimated_tokens : int or Tokens
        The tokens that were requested.
    limit_reached : bool
        Whether `add` has returned False: tokens beyond the estimate no longer fit.
    over_limit : Limit or None
        The limit that it was admitted over, under the action ``warn`` or as a shadow limit; None if within all.
    """

    def __init__(self):
        raise TypeError("grants are made by reserve, acquire and acquire_async")

    def __dealloc__(self):
        if self.state is not None and self.stage != CLOSED and self.ours() and self.state.usable():
            try:
                self.release_as(False)
                PyErr_WarnEx(ResourceWarning,
                             b"a grant was garbage-collected unreleased; use it in a with statement", 1)
            except BaseException as error:      # warnings may be errors, and an error here cannot be caught
                PyErr_SetObject(type(error), error)     # only an error that is set is reported
                PyErr_WriteUnraisable(None)
        free(self.more)
        if self.capacity:
            free(self.charges)

    # -- its members

    cdef inline Holding* hold(self, int member) noexcept nogil:
        return &self.first if member == 0 else &self.more[member - 1]

    cdef inline Charge* charge_of(self, int time, int member) noexcept nogil:
        return &self.charges[time * self.members + member]

    cdef RowRef ref_of(self, int member):
        return self.ref if member == 0 else <RowRef> self.others[member - 1]

    cdef inline bint ours(self) noexcept:
        return self.forks == fork_count()

    cdef bint claim(self) noexcept:
        """Take it for a request that waited; False if its deadline has passed and another process has released it."""
        cdef int i
        if self.unclaimed and self.ours() and self.state.usable():
            self.unclaimed = False
            self.lapsed = not claim_record(self.first.record)
            if not self.lapsed:
                for i in range(self.members):
                    store_u32(&self.hold(i).record.decider, 0)
        return not self.lapsed

    cdef inline int require_open(self, str verb) except -1:
        if self.ours() and not self.state.usable():
            self.state.require_open()
        if self.stage != OPEN:
            raise GrantClosedError(verb, "cancelled" if self.cancelled else
                                   "settled" if self.stage == SETTLED else "released")
        return 0

    @property
    def model_ids(self):
        """The ids of the models that admitted the request, in the order of the request."""
        return tuple([self.ref_of(i).model_id for i in range(self.members)])

    @property
    def estimated_tokens(self):
        """The tokens that were requested."""
        return tokens_of(&self.estimate)

    @property
    def over_limit(self):
        """The `Limit` that it was admitted over, under the action ``warn`` or as a shadow limit; None if within all."""
        return LIMITS[self.over_code]

    @property
    def tokens(self):
        """The tokens of the request so far: those that were settled or counted by `add`, otherwise the estimate.

        Of an estimate in `Tokens`, what `add` counts replaces the output tokens.
        """
        cdef Kinds counted
        if self.undone:
            return 0
        self.count_kinds(&counted)
        return tokens_of(&counted)

    @property
    def _counts(self):
        """The same, but as a tuple of input, cached and output tokens, which is made sooner."""
        cdef Kinds counted
        if self.undone:
            return 0
        self.count_kinds(&counted)
        if counted.split:
            return counted.counts[0], counted.counts[1], counted.counts[OUTPUT]
        return counted.count

    cdef void count_kinds(self, Kinds* counted) noexcept:
        counted[0] = self.kinds
        if self.stage != SETTLED and self.counting and counted.split:   # all three together are 2**62 at most
            counted.counts[OUTPUT] = min(self.used, MAX_COUNT - counted.counts[0] - counted.counts[1])
        elif self.stage != SETTLED and self.counting:
            counted.count = self.used

    @property
    def released(self):
        """Whether memory and concurrency have been given back."""
        return self.stage == CLOSED or (self.state.closed and self.ours())

    # -- tokens

    def add(self, tokens=1):
        """Count tokens as they are generated; False if a limit has been reached and generation should stop.

        Within the estimate this touches no shared state. Beyond it tokens are charged in chunks, which keeps most calls
        cheap, and the rest of a chunk is refunded at the end. Tokens that do not fit have been generated nevertheless:
        they are charged past the limit, and `add` returns False.

        Raises
        ------
        TypeError, ValueError
            Not an integer from 0 to 2**62; nothing is counted.
        GrantClosedError
            The grant has been settled, cancelled or released.
        """
        cdef int64_t more = as_count(tokens, "tokens")
        if self.stage != OPEN or not self.state.usable():
            self.require_open("add")
        if more > MAX_COUNT - self.used:
            raise ValueError(f"tokens is {more}, and {self.used} were counted before; the sum may be 2**62 at most")
        self.counting = True
        self.used += more
        if self.used <= self.free_output:
            return True
        return self.charge_more()

    cdef bint charge_more(self) except -1:
        """Charge what has been used beyond what was charged, and a chunk ahead if that fits. Takes the rows' locks.

        If a row stays locked, the excess is charged at the next call, or at the end.
        """
        cdef JointRequest joint
        cdef Addition addition
        cdef int64_t now_ns
        cdef int i, outcome
        addition.begin = self.free_output + self.claimed        # other threads are charging what is before it
        addition.over = self.used - addition.begin
        if not self.ours() or self.members == 0 or addition.over <= 0:
            return True
        self.reserve_charges()
        joint.count = self.members
        for i in range(self.members):
            joint.members[i] = self.hold(i)[0]
            addition.estimates[i] = self.charge_of(0, i).tokens
        put_in_order(&joint)
        addition.kinds = &self.kinds
        addition.chunk = min(max(addition.over, max(<int64_t> LEAST_CHUNK, self.free_output // CHUNK_SHARE)),
                             MAX_COUNT - addition.begin)
        self.adding += 1
        self.claimed += addition.over
        now_ns = self.state.now_ns()
        outcome = charge_rows(&joint, now_ns, &addition, &self.stage, &self.state.shared, 0)
        if outcome == LOCKED_OUT:
            self.state.inside += 1
            with nogil:
                outcome = charge_rows(&joint, now_ns, &addition, &self.stage, &self.state.shared, END_PATIENCE_NS)
            self.state.exit()
        self.adding -= 1
        self.claimed -= addition.over
        if outcome != DONE:
            return True
        if self.stage != OPEN:      # another thread has closed it, unaware of this charge
            self.refund_joint(&joint, now_ns)
            return addition.fits
        for i in range(self.members):
            self.charge_of(self.times, i)[0] = joint.charges[i]
        self.times += 1
        self.free_output += addition.chunk
        if not addition.fits:
            self.limit_reached = True
        return addition.fits

    cdef int refund_joint(self, JointRequest* joint, int64_t now_ns) except -1:
        """Refund what charge_rows() charged. Takes the rows' locks."""
        cdef bint done = refund_rows(joint, now_ns, &self.state.shared, 0)
        while not done:
            self.state.inside += 1
            with nogil:
                done = refund_rows(joint, now_ns, &self.state.shared, SLICE_NS)
            self.state.exit()
            if not done:
                self.state.pause()
        return 0

    cdef int reserve_charges(self) except -1:
        """Make room for one more group of charges, in addition to those that other threads are about to add."""
        cdef Charge* grown
        cdef int needed = self.times + self.adding + 1
        if needed <= self.capacity:
            return 0
        grown = <Charge*> realloc(self.charges if self.capacity else NULL, 2 * needed * self.members * sizeof(Charge))
        if grown == NULL:
            raise MemoryError()
        if self.capacity == 0:
            grown[0] = self.charge
        self.charges = grown
        self.capacity = 2 * needed
        return 0

    def settle(self, actual_tokens):
        """Replace the estimate, and what `add` counted, with the actual tokens; memory and concurrency stay held.

        A surplus is refunded to the slots that were charged. A deficit is charged at the current time, even past a
        limit: then nothing is admitted until it has aged out. Settling again with the same number does nothing.

        Raises
        ------
        TypeError, ValueError
            Not an integer from 0 to 2**62, or `Tokens`; nothing is changed.
        GrantClosedError
            The grant has been settled with another number, or cancelled, or released.
        """
        cdef Kinds actual
        as_kinds(actual_tokens, "actual_tokens", &actual)
        if self.stage == SETTLED and same_kinds(&self.kinds, &actual):
            return
        if self.stage != OPEN or not self.state.usable():
            self.require_open("settle")
        self.kinds = actual
        self.counting = False
        self.stage = SETTLED
        self.finish(SETTLE, False)

    def _end(self, input_tokens, cached_tokens, output_tokens):
        """Settle with so many tokens of each kind, and release: one lock and no `Tokens` for both.

        Raises GrantClosedError as `settle` does.
        """
        cdef Kinds actual
        actual.split = True
        actual.count = 0
        actual.counts[0] = as_count(input_tokens, "input")
        actual.counts[1] = as_count(cached_tokens, "cached")
        actual.counts[OUTPUT] = as_count(output_tokens, "output")
        if self.stage != OPEN or not self.state.usable():
            self.require_open("settle")
        self.kinds = actual
        self.counting = False
        self.stage = CLOSED
        self.finish(SETTLE, True)

    def cancel(self):
        """Undo the request: refund its tokens and the request itself, and release all that is held.

        Cancelling again does nothing. Raises GrantClosedError if the grant has been settled or released.
        """
        if self.cancelled:
            return
        self.require_open("cancel")
        self.stage = CLOSED
        self.cancelled = True
        self.undone = True
        self.counting = False
        self.finish(UNDO, True)

    def release(self):
        """Release memory and concurrency, as at the end of ``with`` without an exception. Again, it does nothing."""
        if self.stage != CLOSED:
            self.release_as(False)

    cdef int release_as(self, bint failed) except -1:
        cdef int end = KEEP
        if self.stage != SETTLED and self.counting:
            end = COUNTED
        elif self.stage != SETTLED and failed:
            end = NOTHING
            self.undone = True
        self.stage = CLOSED
        return self.finish(end, True)

    cdef int finish(self, int end, bint close) except -1:
        """Change the charges as `end` says; `close` releases holdings. Takes the rows' locks.

        Other threads run during the wait for a row, so the grant's own fields are set before. If a row stays
        locked, the rest is put off: a stopped process must not block an event loop.
        """
        cdef Ending ending
        cdef uint32_t waited_for = 0    # bits of members
        cdef int i
        ending.end = end
        ending.kinds = self.kinds
        ending.output = self.used
        ending.close = close
        if not self.ours() or not self.state.usable():
            return 0
        if self.unclaimed:
            self.claim()
        ending.lapsed = self.lapsed
        if self.pools.deferred:
            finish_deferred(self.pools)
        for i in range(self.members):
            ending.member = i
            if self.finish_or_defer(&ending):
                waited_for |= <uint32_t> 1 << i
        if waited_for:
            self.tell(waited_for)
        return 0

    cdef bint finish_or_defer(self, const Ending* ending) except -1:
        """Finish one model, or put that off; whether requests wait for it. Takes the row's lock."""
        cdef State state = self.state
        cdef Pools pools = self.pools
        cdef const Holding* member = self.hold(ending.member)
        cdef const Charge* charges = self.charge_of(0, ending.member)
        cdef int64_t now_ns = state.now_ns() if ending.end != KEEP else 0
        cdef int outcome = LOCKED_OUT
        if not (pools.deferred and is_deferred(pools, member.row)):      # what was put off earlier comes first
            outcome = finish_member(member, charges, self.members, self.times, ending, now_ns, &state.shared, 0)
            if outcome == LOCKED_OUT:
                state.inside += 1
                with nogil:
                    outcome = finish_member(member, charges, self.members, self.times, ending, now_ns, &state.shared,
                                           END_PATIENCE_NS)
                state.exit()
        if outcome == LOCKED_OUT:
            pools.deferred.append(defer(self, ending))
        elif ending.close:
            give_record(&state.shared.grant_pool, member.record - state.shared.grants, state.shared.me)
        return outcome == WAITED_FOR

    cdef int tell(self, uint32_t members) except -1:
        """Wake the queues of these members. If one raises, the rest are woken first, then it is raised."""
        cdef int i
        error = None
        for i in range(self.members):
            if members >> i & 1:
                try:
                    self.state.wake(self.ref_of(i))
                except BaseException as raised:
                    error = raised
        if error is not None:
            raise error
        return 0

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.stage != CLOSED:
            self.release_as(kind is not None)

    def __reduce__(self):
        raise TypeError("a grant cannot be pickled or copied: it is given back once")

    def __repr__(self):
        stage = "cancelled" if self.cancelled else ("released", "open", "settled")[self.stage]
        ids = ", ".join(map(repr, self.model_ids)) or "of no model with a quota"
        return f"<Grant {ids}, {self.tokens} tokens, {stage}>"


cdef object tokens_of(const Kinds* kinds):
    if kinds.split:
        return Tokens(kinds.counts[0], kinds.counts[1], kinds.counts[2])
    return kinds.count


cdef bint same_kinds(const Kinds* kinds, const Kinds* other) noexcept:
    cdef int kind
    if kinds.split != other.split:
        return False
    if not kinds.split:
        return kinds.count == other.count
    for kind in range(KINDS):
        if kinds.counts[kind] != other.counts[kind]:
            return False
    return True


cdef int64_t more_at(const Holding* member, const Addition* addition, int place, int64_t output) noexcept nogil:
    """What so many output tokens from `begin` on add to a member's charge. Requires the row's lock.

    The estimate covers the first of them: two additions charge together what one does.
    """
    cdef int64_t estimate = addition.estimates[place]
    return (max(with_output(member.cold, addition.kinds, addition.begin + output), estimate)
            - max(with_output(member.cold, addition.kinds, addition.begin), estimate))


cdef int charge_rows(
    JointRequest* joint, int64_t now_ns, Addition* addition, const Stage* stage, const Shared* shared,
    int64_t patience_ns
) noexcept nogil:
    """Charge `chunk` output tokens to all models if that fits, or else `over`. Takes the rows' locks.

    Sets `chunk` to what was charged, `fits` to whether that was within all limits, and the charges of `joint`.
    """
    cdef Holding* member
    cdef bint enforcing = shared.header.enforcing
    cdef int i
    if not lock_rows(joint, shared, patience_ns):
        return LOCKED_OUT
    if stage[0] != OPEN:
        unlock_rows(joint, joint.count)
        return TOO_LATE
    addition.fits = True
    for i in range(joint.count):
        member = &joint.members[i]
        if member.row.generation == member.generation:
            advance(member.row, member.cold, now_ns)
            if not admits_tokens(member.row, member.cold, more_at(member, addition, i, addition.chunk), enforcing):
                addition.chunk = addition.over
                addition.fits = addition.fits and admits_tokens(
                    member.row, member.cold, more_at(member, addition, i, addition.over), enforcing)
    for i in range(joint.count):
        member = &joint.members[i]
        joint.charges[i].tokens = 0
        if member.row.generation == member.generation:
            charge_tokens(member.row, member.cold, more_at(member, addition, i, addition.chunk),
                          is_trial(member.row, member.cold, enforcing), &joint.charges[i])
            reserve_tokens(member.cold, member.record, joint.charges[i].tokens)
    unlock_rows(joint, joint.count)
    return DONE


cdef bint refund_rows(JointRequest* joint, int64_t now_ns, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Refund the charges of `joint`; False if a row stays locked. Takes the rows' locks."""
    cdef Holding* member
    cdef int i
    if not lock_rows(joint, shared, patience_ns):
        return False
    for i in range(joint.count):
        member = &joint.members[i]
        if member.row.generation == member.generation and joint.charges[i].tokens:
            advance(member.row, member.cold, now_ns)
            refund(member.row, member.cold, 0, joint.charges[i].tokens, &joint.charges[i])
    unlock_rows(joint, joint.count)
    return True


cdef int64_t tokens_at_end(const ColdRow* cold, const Ending* ending) noexcept nogil:
    """What the grant counts at a model from its end on, unless its charges are kept. Requires the row's lock."""
    if ending.end == SETTLE:
        return count_at(cold, &ending.kinds)
    return with_output(cold, &ending.kinds, ending.output) if ending.end == COUNTED else 0


cdef int finish_member(
    const Holding* member, const Charge* charges, int stride, int times, const Ending* ending, int64_t now_ns,
    const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """The end of a grant at one model, from lock to unlock. Takes the row's lock.

    `charges` has `times` charges of this model, `stride` apart.
    """
    cdef Row* row = member.row
    cdef ColdRow* cold = member.cold
    cdef int64_t left = 0
    cdef int64_t part
    cdef int time
    cdef bint alive, waiting
    cdef const Charge* charge
    cdef Charge charged
    if not lock_row(row, shared, patience_ns):
        return LOCKED_OUT
    alive = row.generation == member.generation
    if ending.lapsed and member.record.seat != shared.me:    # another process has refunded it too
        alive = False
    if alive and ending.end != KEEP:
        for time in range(times):
            left += charges[time * stride].tokens
        left -= tokens_at_end(cold, ending)
        advance(row, cold, now_ns)
        if left < 0:
            charge_tokens(row, cold, -left, is_trial(row, cold, shared.header.enforcing), &charged)
        for time in range(times - 1, -1, -1):
            if left <= 0 and not (ending.end == UNDO and time == 0):
                continue
            charge = &charges[time * stride]
            part = min(max(left, <int64_t> 0), charge.tokens)
            refund(row, cold, 1 if ending.end == UNDO and time == 0 else 0, part, charge)
            left -= part
    if member.record.seat == shared.me:      # otherwise another process took this one for dead, and released it
        if ending.close and alive:
            release_holding(row, cold, member.record)
        elif ending.close:
            member.record.seat = 0
        elif alive:
            settle_tokens(cold, member.record)
    waiting = alive and cold.waiting != 0
    if shared.header.full_until_ns != 0:    # the model may be unused now, and can make room for another
        shared.header.full_until_ns = 0
    unlock(&row.lock)
    return WAITED_FOR if waiting else DONE


cdef class Deferred:
    """The end of a grant at one model, put off because the row stayed locked. Independent of the grant."""

    def __dealloc__(self):
        free(self.charges)


cdef Deferred defer(Grant grant, const Ending* ending):
    """A record of what to do later, without a reference to the grant, which may be being deallocated."""
    cdef Deferred later = Deferred.__new__(Deferred)
    cdef int time
    later.ref = grant.ref_of(ending.member)
    later.member = grant.hold(ending.member)[0]
    later.ending = ending[0]
    later.charges = <Charge*> malloc(grant.times * sizeof(Charge))
    if later.charges == NULL:
        raise MemoryError()
    for time in range(grant.times):
        later.charges[time] = grant.charge_of(time, ending.member)[0]
    later.times = grant.times
    return later


cdef bint is_deferred(Pools pools, const Row* row) noexcept:
    """Whether the end of a grant was put off for this row."""
    cdef Deferred later
    for later in pools.deferred:
        if later.member.row == row:
            return True
    return False


cdef int finish_deferred(Pools pools) except -1:
    """Retry what was put off; what still cannot be done stays, in order. Tries the rows' locks."""
    cdef State state = pools.state
    cdef list todo = pools.deferred
    cdef list left = []
    cdef Deferred later
    cdef int64_t now_ns = state.now_ns()
    cdef set waited_for = set()
    cdef set locked = set()
    cdef int outcome
    pools.deferred = []
    for later in todo:
        outcome = LOCKED_OUT
        if <size_t> later.member.row not in locked:
            outcome = finish_member(&later.member, later.charges, 1, later.times, &later.ending, now_ns,
                                    &state.shared, 0)
        if outcome == LOCKED_OUT:
            locked.add(<size_t> later.member.row)
            left.append(later)
        elif later.ending.close:
            give_record(&state.shared.grant_pool, later.member.record - state.shared.grants, state.shared.me)
        if outcome == WAITED_FOR:
            waited_for.add(later.ref)
    pools.deferred = left + pools.deferred
    for ref in waited_for:
        state.wake(ref)
    return 0


cdef Grant make_grant(Pools pools, JointRequest* joint, list refs, const Request* request, const Verdict* verdict):
    """The grant of what decide_all() has just taken. Defined in this file because the type's freelist is here."""
    cdef Grant grant = Grant.__new__(Grant)
    cdef int i
    grant.state = pools.state
    grant.pools = pools
    grant.forks = fork_count()
    grant.kinds = grant.estimate = request.kinds
    grant.free_output = joint.free_output if joint.count else MAX_COUNT
    grant.members = joint.count
    grant.over_code = verdict.limit
    grant.unclaimed = joint.unclaimed_until_ns != 0 and joint.count != 0
    for i in range(joint.count):
        joint.members[i].entry = NULL
    grant.times = 1
    grant.charges = &grant.charge
    if joint.count:
        grant.ref = refs[0]
        grant.first = joint.members[0]
        grant.charge = joint.charges[0]
    if joint.count > 1:
        grant.others = tuple(refs[1:])
        grant.more = <Holding*> malloc((joint.count - 1) * sizeof(Holding))
        grant.charges = <Charge*> malloc(2 * joint.count * sizeof(Charge))
        grant.capacity = 2
        if grant.more == NULL or grant.charges == NULL:
            raise MemoryError()
        for i in range(joint.count):
            grant.charges[i] = joint.charges[i]
            if i:
                grant.more[i - 1] = joint.members[i]
    grant.stage = OPEN
    return grant
