# A request takes and leaves its places in the queues of its models, from lock to unlock.
from libc.stdint cimport int64_t, uint8_t
from modelquota._core.layout cimport QueueEntry, Row, Shared
from modelquota._core.row.decision cimport Ask, NEVER, QUEUE, THROTTLE
from modelquota._core.row.grant cimport Hold
from modelquota._core.row.queue cimport drop_expired, link_entry, unlink_entry
from modelquota._core.state.joint cimport BUSY_ROW, DECIDED, GONE, Joint, NOBODY, first_gone, lock_rows, unlock_rows
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:
    QUEUE_FULL = 3                  # beside what comes of a joint decision

cdef extern from *:
    void write_deadline "__atomic_store_n"(int64_t* word, int64_t value, int order) noexcept nogil
    uint8_t read_flag "__atomic_load_n"(const uint8_t* word, int order) noexcept nogil
    const int RELAXED "__ATOMIC_RELAXED"
    const int ACQUIRE "__ATOMIC_ACQUIRE"


cdef inline int stand_in_queues(
    Joint* joint, const Ask* ask, int64_t deadline_ns, int64_t now_ns, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Give a request its places in the queues of all parties, at once. Takes the rows' locks.

    QUEUE_FULL, and nothing is done, if one of them has no room; `joint.named` is that one.
    """
    cdef Hold* party
    cdef QueueEntry* entry
    cdef int i
    if not lock_rows(joint, shared, patience_ns):
        return BUSY_ROW
    joint.gone = first_gone(joint)
    joint.named = NOBODY
    for i in range(joint.count):
        party = &joint.parties[i]
        if party.entry == NULL or joint.gone != NOBODY or joint.named != NOBODY:
            continue
        if party.ledger.action != QUEUE and party.ledger.action != THROTTLE:
            continue                    # nobody waits for this one; it is only kept from being overtaken
        if party.ledger.waiting >= party.ledger.max_queued and not (
                drop_expired(party.row, party.ledger, shared.entries, now_ns, True)
                and party.ledger.waiting < party.ledger.max_queued):
            joint.named = i
    if joint.gone == NOBODY and joint.named == NOBODY:
        for i in range(joint.count):
            party = &joint.parties[i]
            entry = party.entry
            if entry == NULL:
                continue
            entry.row = party.index
            entry.generation = party.generation
            entry.priority = ask.priority
            entry.ticket = ask.ticket
            write_deadline(&entry.deadline_ns, deadline_ns, RELAXED)
            entry.ready_ns = NEVER
            entry.limit = entry.aside = 0
            entry.counted = party.ledger == ask.counted and party.generation == ask.counted_generation
            entry.seat = shared.me
            link_entry(party.row, party.ledger, shared.entries, entry)
    unlock_rows(joint, joint.count)
    if joint.gone != NOBODY:
        return GONE
    return DECIDED if joint.named == NOBODY else QUEUE_FULL


cdef inline bint leave_queue(QueueEntry* entry, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Take an entry out of its queue; False if the row stays locked. Takes the row's lock."""
    cdef Row* row = &shared.rows[entry.row]
    if not read_flag(&entry.linked, ACQUIRE):
        return True
    if not lock_row(row, shared, patience_ns):
        return False
    if entry.linked and row.generation == entry.generation:
        unlink_entry(row, &shared.ledgers[entry.row], shared.entries, entry)
    entry.linked = 0
    unlock(&row.lock)
    return True
