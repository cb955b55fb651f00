"""Grants: admissions whose outcome is held, and settled once the truth is known.

A grant belongs to the process that made it. Its own fields are guarded by the GIL; what it changes of a row, by the
row's lock. Whatever has closed once stays closed: nothing is given back twice.
"""
cimport cython
from cpython.exc cimport PyErr_WarnEx, PyErr_WriteUnraisable
from libc.stdint cimport int64_t, uint32_t
from libc.stdlib cimport free, malloc, realloc

from modelquota._core.count cimport as_count
from modelquota._core.decision cimport Ask, charge_tokens, pass_time
from modelquota._core.hold cimport Charge, Hold, admits_tokens, let_go, refund
from modelquota._core.joint cimport Joint, lock_rows, put_in_order, try_lock_rows, unlock_rows
from modelquota._core.layout cimport MAX_COUNT, Row, Shared
from modelquota._core.lock cimport unlock
from modelquota._core.repair cimport enter_row, try_row
from modelquota._core.shared cimport fork_count
from modelquota._core.state cimport RowRef
from modelquota._core.table cimport QuotaTable

from modelquota.errors import GrantClosedError

cdef enum:
    LEAST_CHUNK = 16        # tokens that add() charges at a time beyond the estimate, at least,
    CHUNK_SHARE = 8         # and one part in so many of what has been charged


cdef inline void take_lock(Row* row, const Shared* shared) noexcept:
    """Lock a row while holding the GIL; where it is locked for long, the GIL is released to wait."""
    if try_row(row, shared):
        return
    with nogil:
        enter_row(row, shared)


@cython.final
@cython.freelist(64)
@cython.no_gc_clear     # a cycle around a grant is broken elsewhere: to release, it needs what it refers to
cdef class Grant:
    """An admitted request: it holds memory and one unit of concurrency until it is released. Made by `reserve`.

    As a context manager it releases on leaving. Where the tokens were not settled by then, what `add` counted stands;
    where `add` was not called either, the estimate stands after success, and no tokens after an exception.

    Refunds go to the very slots of the windows that were charged, and count nowhere once those have left a window. A
    grant that is garbage-collected unreleased is released, with a ResourceWarning. In a process forked meanwhile the
    copy of a grant does nothing.

    Attributes
    ----------
    estimated_tokens : int
        What was asked.
    limit_reached : bool
        Whether `add` has returned False: tokens beyond the estimate did not fit any more.
    """

    def __init__(self):
        raise TypeError("grants are made by reserve, acquire and acquire_async")

    def __dealloc__(self):
        if self.manager is not None and self.stage != CLOSED and self.ours():
            try:
                self.release_as(False)
                PyErr_WarnEx(ResourceWarning, b"a grant was garbage-collected unreleased; use it in a with statement", 1)
            except BaseException:
                PyErr_WriteUnraisable(None)     # warnings may be errors, and nobody can catch one here
        free(self.more)
        if self.capacity:
            free(self.charges)

    # -- the parts

    cdef inline Hold* hold(self, int party) noexcept:
        return &self.first if party == 0 else &self.more[party - 1]

    cdef inline Charge* charge_of(self, int time, int party) noexcept:
        return &self.charges[time * self.parties + party]

    cdef RowRef ref_of(self, int party):
        return self.ref if party == 0 else <RowRef> self.others[party - 1]

    cdef inline bint ours(self) noexcept:
        return self.forks == fork_count()

    cdef inline int require_open(self, str verb) except -1:
        if self.stage != OPEN:
            raise GrantClosedError(verb, "cancelled" if self.cancelled else
                                   "settled" if self.stage == SETTLED else "released")
        return 0

    @property
    def model_ids(self):
        """The models that granted, in the order in which they were named."""
        return tuple([self.ref_of(i).model_id for i in range(self.parties)])

    @property
    def tokens(self):
        """What stands for the request now: what was settled, or counted by `add`, or else the estimate."""
        return self.used if self.counting or self.stage == SETTLED else self.charged

    @property
    def released(self):
        """Whether memory and concurrency have been given back."""
        return self.stage == CLOSED

    # -- tokens

    def add(self, tokens=1):
        """Account tokens as they are generated; False where a limit has been reached and generation should stop.

        Within the estimate this touches no shared state. Beyond it tokens are charged in chunks, so that the next calls
        are cheap again, and what is left of a chunk is refunded at the end. Tokens that do not fit exist all the same:
        they are charged past the limit, and the answer is False.

        Raises
        ------
        TypeError, ValueError
            Not an integer from 0 to 2**62; nothing is counted.
        GrantClosedError
            The grant has been settled, cancelled or released.
        """
        cdef int64_t more = as_count(tokens, "tokens")
        if self.stage != OPEN:
            self.require_open("add")
        if more > MAX_COUNT - self.used:
            raise ValueError(f"tokens is {more}, and {self.used} were counted before; the sum may be 2**62 at most")
        self.counting = True
        self.used += more
        if self.used <= self.charged:
            return True
        return self.charge_more()

    cdef bint charge_more(self) except -1:
        """Charge what has been used beyond what was charged, and a little ahead where that fits."""
        cdef Joint joint
        cdef int64_t over, chunk, now_ns
        cdef bint fits = True
        cdef int i
        cdef Hold* party
        if not self.ours() or self.parties == 0:
            return True
        now_ns = self.manager.now_ns()
        joint.count = self.parties
        for i in range(self.parties):
            joint.parties[i] = self.hold(i)[0]
        put_in_order(&joint)
        while True:
            self.reserve_charges()
            if not try_lock_rows(&joint, &self.manager.shared):
                with nogil:
                    lock_rows(&joint, &self.manager.shared)
            over = self.used - self.charged     # other threads may have charged or closed the grant during the wait
            if over <= 0:
                unlock_rows(&joint, joint.count)
                return True
            if self.times < self.capacity:
                break
            unlock_rows(&joint, joint.count)
        chunk = min(max(over, max(LEAST_CHUNK, self.charged // CHUNK_SHARE)), MAX_COUNT - self.charged)
        for i in range(self.parties):
            party = &joint.parties[i]
            if party.row.generation == party.generation:
                pass_time(party.row, party.ledger, now_ns)
                if not admits_tokens(party.row, party.ledger, chunk, self.manager.shared.header.enforcing):
                    chunk = over
                    fits = fits and admits_tokens(party.row, party.ledger, over, self.manager.shared.header.enforcing)
        for i in range(self.parties):
            party = &joint.parties[i]
            if party.row.generation == party.generation:
                self.charge_of(self.times, i).at_ns = party.row.level_ns
                self.charge_of(self.times, i).epoch = party.ledger.level_epoch
                self.charge_of(self.times, i).tokens = charge_tokens(party.row, party.ledger, chunk)
        unlock_rows(&joint, joint.count)
        self.times += 1
        self.charged += chunk
        if not fits:
            self.limit_reached = True
        return fits

    cdef int reserve_charges(self) except -1:
        """Make room for one more time of charges."""
        cdef Charge* grown
        cdef int i
        if self.times < self.capacity:
            return 0
        grown = <Charge*> realloc(self.charges if self.capacity else NULL,
                                  (2 * self.times + 2) * self.parties * sizeof(Charge))
        if grown == NULL:
            raise MemoryError()
        if self.capacity == 0:
            grown[0] = self.charge
        self.charges = grown
        self.capacity = 2 * self.times + 2
        return 0

    def settle(self, actual_tokens):
        """Replace the estimate, and what `add` counted, by the truth; memory and concurrency stay held.

        Less is refunded to the slots that were charged, more is charged to now, even past a limit: then nothing is
        admitted until it has aged out. Settling again with the same figure does nothing.

        Raises
        ------
        TypeError, ValueError
            Not an integer from 0 to 2**62; nothing is changed.
        GrantClosedError
            The grant has been settled with another figure, or cancelled, or released.
        """
        cdef int64_t actual = as_count(actual_tokens, "actual_tokens")
        if self.stage == SETTLED and self.used == actual:
            return
        if self.stage != OPEN:
            self.require_open("settle")
        self.used = actual
        self.stage = SETTLED
        self.finish(actual, False, False)

    def cancel(self):
        """Undo the request: its tokens and the request itself are refunded, and all that is held is given back.

        Cancelling again does nothing. Raises GrantClosedError where the grant has been settled or released.
        """
        if self.cancelled:
            return
        self.require_open("cancel")
        self.stage = CLOSED
        self.cancelled = True
        self.used = 0
        self.finish(0, True, True)

    def release(self):
        """Give back memory and concurrency; as on leaving ``with`` without an exception. Again it does nothing."""
        if self.stage != CLOSED:
            self.release_as(False)

    cdef int release_as(self, bint failed) except -1:
        cdef int64_t tokens = self.used
        if self.stage == SETTLED:
            tokens = self.charged       # nothing is left to change
        elif not self.counting:
            tokens = 0 if failed else self.estimated_tokens
            self.used = tokens
        self.stage = CLOSED
        return self.finish(tokens, False, True)

    cdef int finish(self, int64_t tokens, bint undo, bint close) except -1:
        """Bring what is charged to `tokens`; `undo` refunds the request, `close` gives back what is held.

        Other threads run while a row is waited for, so the grant itself says by then that this has been done.
        """
        cdef int64_t surplus = self.charged - tokens
        cdef int64_t now_ns, left, part
        cdef int i, time
        cdef bint changes = surplus != 0 or undo
        cdef bint alive
        cdef uint32_t waited_for = 0    # bits of parties
        cdef Hold* party
        cdef Row* row
        cdef Charge* charge
        self.charged = tokens
        if not self.ours():
            return 0
        now_ns = self.manager.now_ns() if changes else 0
        for i in range(self.parties):
            party = self.hold(i)
            row = party.row
            take_lock(row, &self.manager.shared)
            alive = row.generation == party.generation
            if alive and changes:
                pass_time(row, party.ledger, now_ns)
                left = surplus
                if left < 0:
                    charge_tokens(row, party.ledger, -left)
                for time in range(self.times - 1, -1, -1):
                    if left <= 0 and not (undo and time == 0):
                        continue
                    charge = self.charge_of(time, i)
                    part = min(max(left, 0), charge.tokens)
                    refund(row, party.ledger, 1 if undo and time == 0 else 0, part, charge)
                    left -= part
            if close and alive:
                let_go(row, party.ledger, party.record)
            elif close:
                party.record.seat = 0
            if alive and party.ledger.waiting != 0:
                waited_for |= <uint32_t> 1 << i
            unlock(&row.lock)
            if close:
                self.manager.give_record(party.record)
        if waited_for:
            self.tell(waited_for)
        return 0

    cdef int tell(self, uint32_t parties) except -1:
        """Let those try again who wait for these; whatever that raises, all are told, and then it is raised."""
        cdef int i
        error = None
        for i in range(self.parties):
            if parties >> i & 1:
                try:
                    self.manager.freed(self.ref_of(i))
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


cdef Grant make_grant(QuotaTable manager, Joint* joint, list refs, const Ask* ask):
    """The grant of what decide_all has just taken. Here, where the type's freelist is."""
    cdef Grant grant = Grant.__new__(Grant)
    cdef int i
    grant.manager = manager
    grant.forks = fork_count()
    grant.estimated_tokens = grant.charged = ask.tokens
    grant.parties = joint.count
    grant.times = 1
    grant.charges = &grant.charge
    if joint.count:
        grant.ref = refs[0]
        grant.first = joint.parties[0]
        grant.charge = joint.charges[0]
    if joint.count > 1:
        grant.others = tuple(refs[1:])
        grant.more = <Hold*> malloc((joint.count - 1) * sizeof(Hold))
        grant.charges = <Charge*> malloc(2 * joint.count * sizeof(Charge))
        grant.capacity = 2
        if grant.more == NULL or grant.charges == NULL:
            raise MemoryError()
        for i in range(joint.count):
            grant.charges[i] = joint.charges[i]
            if i:
                grant.more[i - 1] = joint.parties[i]
    grant.stage = OPEN
    return grant
