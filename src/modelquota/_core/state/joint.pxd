# Joint requests: one decision over several rows, all or nothing. Each row is decided as if alone, and only then
# anything is charged.
#
# Locks are taken in the order of the rows, whatever the order of the ids, so there is no deadlock. None is kept during
# the wait for another one, so a process that is stopped with one row locked does not block the others.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.atomics cimport add_u64, load_i64, load_u32
from modelquota._core.layout cimport Charge, MAX_COUNT, QueueEntry, Row, Shared
from modelquota._core.row.decision cimport (
    Fit, NEVER, QUEUE_PLACE, Request, Verdict, assess, charge_admitted, count_violation, start_verdict
)
from modelquota._core.row.fullest cimport highest_usage
from modelquota._core.row.grant cimport Holding, take_holding
from modelquota._core.row.queue cimport unlink_entry
from modelquota._core.row.share cimport lacks_share, note_need
from modelquota._core.row.tokens cimport count_at, most_output
from modelquota._core.state.lock cimport unlock, wait_clock_ns
from modelquota._core.state.repair cimport lock_row, try_row
from modelquota._core.state.unclaimed cimport set_unclaimed

cdef enum:
    MOST_MODELS = 15        # ids and meters of one decision
    NO_MEMBER = -1

cdef enum:  # the outcome of a joint decision
    DECIDED = 0
    BUSY_ROW = 1    # a row stayed locked
    GONE = 2        # a model has been removed: it has to be looked up again


cdef struct Places:
    # The queue entries of one waiting request, one per model.
    int count
    QueueEntry* entries[MOST_MODELS]


cdef struct JointRequest:
    # A request for several models.
    int count
    Holding members[MOST_MODELS]    # in the order of the caller's ids, then their meters; no two have the same row
    int by_row[MOST_MODELS]         # indices of members, in the order of their rows
    Charge charges[MOST_MODELS]     # out: what was charged to each
    int64_t unclaimed_until_ns      # in, if it holds: when others may release what is admitted now; 0 = never
    int violating           # out: index of the member that the verdict is about, or NO_MEMBER
    bint adopted            # whether a member was registered from default_quota for this decision
    int gone                # out: index of a member whose model has been removed or has other meters, or NO_MEMBER
    int64_t free_output     # out, if it holds: the most output tokens that are within what was charged to each


cdef inline void put_in_order(JointRequest* joint) noexcept nogil:
    """Sort `by_row`, by insertion: there are few."""
    cdef int i, at
    for i in range(joint.count):
        at = i
        while at > 0 and joint.members[joint.by_row[at - 1]].row > joint.members[i].row:
            joint.by_row[at] = joint.by_row[at - 1]
            at -= 1
        joint.by_row[at] = i


cdef inline int same_row(const JointRequest* joint) noexcept nogil:
    """Index of a member that has the same row as another one, or NO_MEMBER. One of the two models has been removed."""
    cdef int i
    for i in range(1, joint.count):
        if joint.members[joint.by_row[i]].row == joint.members[joint.by_row[i - 1]].row:
            return joint.by_row[i]
    return NO_MEMBER


cdef inline void unlock_rows(JointRequest* joint, int count) noexcept nogil:
    cdef int i
    for i in range(count):
        unlock(&joint.members[joint.by_row[i]].row.lock)


cdef inline Row* try_lock_rows(JointRequest* joint, const Shared* shared) noexcept nogil:
    """Take all locks and return NULL; or take none, and return the row that is locked."""
    cdef int i
    cdef Row* row
    for i in range(joint.count):
        row = joint.members[joint.by_row[i]].row
        if not try_row(row, shared):
            unlock_rows(joint, i)
            return row
    return NULL


cdef inline bint lock_rows(JointRequest* joint, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Take all locks; False, and none is taken, if a row stays locked for `patience_ns`."""
    cdef Row* locked = try_lock_rows(joint, shared)
    cdef int64_t give_up_ns = 0
    while locked != NULL:
        if patience_ns > 0 and give_up_ns == 0:
            give_up_ns = wait_clock_ns() + patience_ns
        if not lock_row(locked, shared, patience_ns):
            return False
        unlock(&locked.lock)
        locked = try_lock_rows(joint, shared)
        if locked != NULL and (patience_ns <= 0 or wait_clock_ns() >= give_up_ns):
            return False
    return True


cdef inline int first_gone(const JointRequest* joint) noexcept nogil:
    """Index of the first member whose model has been removed or has other meters, or NO_MEMBER.

    Requires the rows' locks.
    """
    cdef const Holding* member
    cdef int i
    for i in range(joint.count):
        member = &joint.members[i]
        if member.row.generation != member.generation:
            return i
        if member.decides_meters and member.cold.meters_epoch != member.meters_epoch:
            return i
    return NO_MEMBER


cdef inline bint add_meters(JointRequest* joint, int count, const Shared* shared) noexcept nogil:
    """Add the meters of the first `count` members, unless they are members already; False if there are too many.

    Needs no lock: first_gone() sees whether they are still the same. A row that has no model now is not added, nor one
    that never had any, where a damaged file may lead.
    """
    cdef Holding* model
    cdef Holding* member
    cdef uint32_t link
    cdef int i, k, step
    for i in range(count):
        model = &joint.members[i]
        model.meters_epoch = load_u32(&model.cold.meters_epoch)
        model.decides_meters = True
        link = load_u32(&model.cold.first_meter)
        for step in range(MOST_MODELS):
            if link == 0 or <int64_t> link > load_i64(&shared.header.row_count):
                break
            for k in range(joint.count):
                if joint.members[k].index == link - 1:
                    break
            else:
                if load_u32(&shared.rows[link - 1].generation) & 1 == 0:
                    break
                if joint.count == MOST_MODELS:
                    return False
                member = &joint.members[joint.count]
                member.index = link - 1
                member.row = &shared.rows[link - 1]
                member.cold = &shared.cold_rows[link - 1]
                member.generation = load_u32(&member.row.generation)
                member.decides_meters = False
                member.record = NULL
                member.entry = NULL
                joint.count += 1
            link = load_u32(&shared.cold_rows[link - 1].next_meter)
    return True


cdef inline void add_wait(Verdict* verdict, const Verdict* other) noexcept nogil:
    """Make each of the waits of `verdict` at least that of `other`."""
    verdict.others_may_free = verdict.others_may_free or other.others_may_free
    verdict.worth_a_look = verdict.worth_a_look or other.worth_a_look
    verdict.aside = verdict.aside or other.aside
    if verdict.wait_ns != NEVER and (other.wait_ns == NEVER or other.wait_ns > verdict.wait_ns):
        verdict.wait_ns = other.wait_ns
        verdict.retry_after_ms = other.retry_after_ms
    if verdict.soonest_ns != NEVER and (other.soonest_ns == NEVER or other.soonest_ns > verdict.soonest_ns):
        verdict.soonest_ns = other.soonest_ns


cdef inline bint is_in_queue(const Holding* member) noexcept nogil:
    """Whether the request is in the member's queue. Requires the row's lock."""
    return member.entry != NULL and member.entry.linked and member.entry.generation == member.generation


cdef inline int assess_all(
    JointRequest* joint, int64_t now_ns, const Request* request, bint enforcing, QueueEntry* entries, Fit* fits,
    Verdict* verdict
) noexcept nogil:
    """assess() at each member. Charges and counts nothing. Requires the rows' locks.

    Returns the index of the member that the verdict is about, or NO_MEMBER: the first that denies, otherwise the first
    with a violation that does not deny. The wait is the longest of those that deny.
    """
    cdef Verdict one
    cdef Request there = request[0]
    cdef int named = NO_MEMBER
    cdef Holding* member
    cdef int i
    start_verdict(verdict)
    for i in range(joint.count):
        member = &joint.members[i]
        there.tokens = count_at(member.cold, &request.kinds)
        assess(member.row, member.cold, entries, now_ns, &there, enforcing, &fits[i], &one)
        if one.limit == 0:
            continue
        if named == NO_MEMBER or (verdict.allowed and not one.allowed):
            verdict[0] = one
            named = i
        elif not one.allowed:
            add_wait(verdict, &one)
    return named


cdef inline void update_entries(JointRequest* joint, const Verdict* verdict) noexcept nogil:
    """Write what the request waits for into its queue entries: requests behind it report that.

    Requires the rows' locks.
    """
    cdef Holding* member
    cdef int i
    for i in range(joint.count):
        member = &joint.members[i]
        if is_in_queue(member):
            member.entry.aside = verdict.aside
            member.entry.limit = verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit
            member.entry.ready_ns = NEVER if verdict.wait_ns == NEVER else member.row.level_ns + verdict.wait_ns


cdef inline void decide_jointly(
    JointRequest* joint, int64_t now_ns, const Request* request, bint holding, const Shared* shared, Verdict* verdict
) noexcept nogil:
    """decide() over all members; with `holding`, what is admitted is also held. Requires the rows' locks.

    A violation counts once, for the member that the verdict is about. A request that is admitted leaves its queues.
    """
    cdef Fit fits[MOST_MODELS]
    cdef Request there = request[0]
    cdef Holding* member
    cdef int i
    joint.violating = assess_all(joint, now_ns, request, shared.header.enforcing, shared.entries, fits, verdict)
    if joint.violating != NO_MEMBER and request.counted == NULL:
        count_violation(joint.members[joint.violating].row, joint.members[joint.violating].cold, verdict)
    if not verdict.allowed:
        update_entries(joint, verdict)
        for i in range(joint.count):
            member = &joint.members[i]
            there.tokens = count_at(member.cold, &request.kinds)
            if member.row.has_share and not fits[i].fits and lacks_share(member.row, member.cold, there.tokens):
                note_need(member.cold, there.tokens)
        return
    verdict.usage = 0.0
    joint.free_output = MAX_COUNT
    for i in range(joint.count):
        member = &joint.members[i]
        there.tokens = count_at(member.cold, &request.kinds)
        if member.cold == request.counted and member.generation == request.counted_generation:
            member.cold.waited += 1
        charge_admitted(member.row, member.cold, &there, &fits[i], &joint.charges[i])
        if is_in_queue(member):
            unlink_entry(member.row, member.cold, shared.entries, member.entry)
        if holding:
            take_holding(member, request, joint.charges[i].tokens, shared.me)
            joint.free_output = min(
                joint.free_output, most_output(member.cold, &request.kinds, joint.charges[i].tokens))
            if joint.unclaimed_until_ns:
                set_unclaimed(member.record, <uint32_t> (joint.members[0].record - shared.grants) + 1,
                              joint.unclaimed_until_ns, &joint.charges[i])
        else:
            verdict.usage = max(verdict.usage, highest_usage(member.row, member.cold, request.ram_mb, request.ssd_mb))
    if holding and joint.unclaimed_until_ns:
        add_u64(&shared.header.unclaimed_made, 1)


cdef inline int decide_rows(
    JointRequest* joint, int64_t now_ns, const Request* request, bint holding, const Shared* shared,
    int64_t patience_ns, Verdict* verdict
) noexcept nogil:
    """One joint decision from lock to unlock. Takes the rows' locks."""
    if not lock_rows(joint, shared, patience_ns):
        return BUSY_ROW
    joint.gone = first_gone(joint)
    if joint.gone == NO_MEMBER:
        decide_jointly(joint, now_ns, request, holding, shared, verdict)
    unlock_rows(joint, joint.count)
    return DECIDED if joint.gone == NO_MEMBER else GONE
