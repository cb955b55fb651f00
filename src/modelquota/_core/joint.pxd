# One decision over several rows, all or nothing: each is decided as if alone, and only then anything is charged.
#
# Locks are taken in the order of the rows, whatever the order of the ids, so nobody waits in a circle.
from libc.stdint cimport int64_t
from modelquota._core.decision cimport (
    Ask, Levels, NEVER, Verdict, charge, commit, count_violation, fits, judge, pass_time, start_verdict
)
from modelquota._core.hold cimport Charge, Hold
from modelquota._core.layout cimport Row, Shared
from modelquota._core.lock cimport take_over, unlock
from modelquota._core.repair cimport enter_row, repair_row, try_row

cdef enum:
    MOST_MODELS = 16
    NOBODY = -1


cdef struct Joint:
    int count
    Hold parties[16]        # in the order in which the caller names them
    int by_row[16]          # indices of parties, in the order of their rows
    Charge charges[16]      # out: what was charged to each


cdef inline void put_in_order(Joint* joint) noexcept nogil:
    """Sort by_row; there are few."""
    cdef int i, at
    for i in range(joint.count):
        at = i
        while at > 0 and joint.parties[joint.by_row[at - 1]].row > joint.parties[i].row:
            joint.by_row[at] = joint.by_row[at - 1]
            at -= 1
        joint.by_row[at] = i


cdef inline void unlock_rows(Joint* joint, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        unlock(&joint.parties[joint.by_row[i]].row.lock)


cdef inline bint try_lock_rows(Joint* joint, const Shared* shared) noexcept nogil:
    """Take all locks, or none where one is held."""
    cdef int i
    for i in range(joint.count):
        if not try_row(joint.parties[joint.by_row[i]].row, shared):
            unlock_rows(joint, i)
            return False
    return True


cdef inline void lock_rows(Joint* joint, const Shared* shared) noexcept nogil:
    cdef int i
    for i in range(joint.count):
        enter_row(joint.parties[joint.by_row[i]].row, shared)


cdef inline void free_dead_rows(Joint* joint, const Shared* shared) noexcept nogil:
    """For who does not wait for locks: put those rows right whose lock a dead process holds."""
    cdef int i
    cdef Row* row
    for i in range(joint.count):
        row = joint.parties[i].row
        if take_over(&row.lock, shared):
            repair_row(row, shared)
            unlock(&row.lock)


cdef inline int first_gone(const Joint* joint) noexcept nogil:
    """Index of the first whose model has left its row, or NOBODY."""
    cdef int i
    for i in range(joint.count):
        if joint.parties[i].row.generation != joint.parties[i].generation:
            return i
    return NOBODY


cdef inline void add_wait(Verdict* verdict, const Verdict* other) noexcept nogil:
    """The longer of two waits, each way of reckoning."""
    verdict.held_up = verdict.held_up or other.held_up
    if verdict.wait_ns != NEVER and (other.wait_ns == NEVER or other.wait_ns > verdict.wait_ns):
        verdict.wait_ns = other.wait_ns
        verdict.retry_after_ms = other.retry_after_ms
    if verdict.patience_ns != NEVER and (other.patience_ns == NEVER or other.patience_ns > verdict.patience_ns):
        verdict.patience_ns = other.patience_ns


cdef inline int decide_jointly(Joint* joint, int64_t now_ns, const Ask* ask, bint enforcing, Verdict* verdict) noexcept nogil:
    """As decide(), over all parties, whose locks are held. Returns the index of the one that is named, or NOBODY.

    Named is the first that denies, or else the first whose violation is only warned of. The violation counts there,
    once; the wait is the longest of those that deny.
    """
    cdef Levels levels[MOST_MODELS]
    cdef Verdict one
    cdef int named = NOBODY
    cdef bint fitting = True
    cdef Hold* party
    cdef int i
    start_verdict(verdict)
    for i in range(joint.count):
        party = &joint.parties[i]
        pass_time(party.row, party.ledger, now_ns)
        fitting = fits(party.row, party.ledger, ask, &levels[i]) and fitting
    if not fitting:
        for i in range(joint.count):
            start_verdict(&one)
            judge(joint.parties[i].row, joint.parties[i].ledger, ask, enforcing, &one)
            if one.limit == 0:
                continue
            if named == NOBODY or (verdict.allowed and not one.allowed):
                verdict[0] = one
                verdict.own_wait_ns = one.wait_ns
                named = i
            elif not one.allowed:
                add_wait(verdict, &one)
        if named != NOBODY and ask.counted == NULL:
            count_violation(joint.parties[named].row, joint.parties[named].ledger, verdict)
    if verdict.allowed:
        for i in range(joint.count):
            party = &joint.parties[i]
            joint.charges[i].at_ns = party.row.level_ns
            joint.charges[i].epoch = party.ledger.level_epoch
            joint.charges[i].tokens = ask.tokens
            if party.ledger == ask.counted and party.generation == ask.counted_generation:
                party.ledger.waited += 1
            if fitting:
                commit(party.row, ask, &levels[i])
            else:
                joint.charges[i].tokens = charge(party.row, party.ledger, ask)
    return named
