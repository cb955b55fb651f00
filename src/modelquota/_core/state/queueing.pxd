# Entering and leaving the queues of a request's models, from lock to unlock.
from libc.stdint cimport int64_t, uint8_t
from modelquota._core.atomics cimport load_u8, store_i64_relaxed
from modelquota._core.layout cimport QueueEntry, Row, Shared
from modelquota._core.row.decision cimport NEVER, QUEUE, Request, THROTTLE
from modelquota._core.row.grant cimport Holding
from modelquota._core.row.queue cimport drop_expired, link_entry, unlink_entry
from modelquota._core.state.joint cimport (
    BUSY_ROW, DECIDED, GONE, JointRequest, NO_MEMBER, first_gone, lock_rows, unlock_rows
)
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:
    QUEUE_FULL = 3                  # in addition to the outcomes of a joint decision


cdef inline int enter_queues(
    JointRequest* joint, const Request* request, int64_t deadline_ns, int64_t now_ns, const Shared* shared,
    int64_t patience_ns
) noexcept nogil:
    """Put a request into the queues of all members at once. Takes the rows' locks.

    QUEUE_FULL, and nothing is done, if one of the queues is full; `joint.violating` is that member.
    """
    cdef Holding* member
    cdef QueueEntry* entry
    cdef int i
    if not lock_rows(joint, shared, patience_ns):
        return BUSY_ROW
    joint.gone = first_gone(joint)
    joint.violating = NO_MEMBER
    for i in range(joint.count):
        member = &joint.members[i]
        if member.entry == NULL or joint.gone != NO_MEMBER or joint.violating != NO_MEMBER:
            continue
        if member.cold.action != QUEUE and member.cold.action != THROTTLE:
            # no request waits for this model: the entry only keeps others from overtaking it
            continue
        if member.cold.waiting >= member.cold.max_queued and not (
                drop_expired(member.row, member.cold, shared.entries, now_ns, True)
                and member.cold.waiting < member.cold.max_queued):
            joint.violating = i
    if joint.gone == NO_MEMBER and joint.violating == NO_MEMBER:
        for i in range(joint.count):
            member = &joint.members[i]
            entry = member.entry
            if entry == NULL:
                continue
            entry.row = member.index
            entry.generation = member.generation
            entry.priority = request.priority
            entry.ticket = request.ticket
            store_i64_relaxed(&entry.deadline_ns, deadline_ns)
            entry.ready_ns = NEVER
            entry.limit = entry.aside = 0
            entry.counted = member.cold == request.counted and member.generation == request.counted_generation
            entry.seat = shared.me
            link_entry(member.row, member.cold, shared.entries, entry)
    unlock_rows(joint, joint.count)
    if joint.gone != NO_MEMBER:
        return GONE
    return DECIDED if joint.violating == NO_MEMBER else QUEUE_FULL


cdef inline bint leave_queue(QueueEntry* entry, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Take an entry out of its queue; False if the row stays locked. Takes the row's lock."""
    cdef Row* row = &shared.rows[entry.row]
    if not load_u8(&entry.linked):
        return True
    if not lock_row(row, shared, patience_ns):
        return False
    if entry.linked and row.generation == entry.generation:
        unlink_entry(row, &shared.cold_rows[entry.row], shared.entries, entry)
    entry.linked = 0
    unlock(&row.lock)
    return True
