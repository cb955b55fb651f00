# The queue of a model: the requests of all processes that wait for it, in the order in which they are served. A doubly
# linked list in shared memory. Every function here requires the row's lock.
#
# An entry blocks the entries behind it until its deadline and no longer, whatever its process does: the next decision
# removes it then. It blocks no other entry while it is `aside`: a request for several models, one of which throttles
# it, does not queue for the others.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.atomics cimport compiler_barrier, load_i64_relaxed
from modelquota._core.layout cimport CHUNK, ColdRow, QueueEntry, RECORDS, Row, Shared
from modelquota._core.row.window cimport measure_room


cdef inline QueueEntry* entry_at(QueueEntry* entries, uint32_t link) noexcept nogil:
    """The entry that a link names, or NULL."""
    return &entries[link - 1] if link else NULL


cdef inline const QueueEntry* first_in_turn(const ColdRow* cold, QueueEntry* entries) noexcept nogil:
    """The first request that blocks those behind it, or NULL."""
    cdef const QueueEntry* entry = entry_at(entries, cold.first_entry)
    cdef int64_t i
    for i in range(RECORDS):        # a damaged file cannot make this an endless loop; likewise below
        if entry == NULL or not entry.aside:
            return entry
        entry = entry_at(entries, entry.next)
    return NULL


cdef inline void put_entry(ColdRow* cold, QueueEntry* entries, QueueEntry* entry) noexcept nogil:
    """Link an entry in its order, without measuring the row's room. Searches from the end, where most belong."""
    cdef uint32_t link = <uint32_t> (entry - entries) + 1
    cdef uint32_t before = cold.last_entry
    cdef int64_t i
    for i in range(RECORDS):
        if before == 0 or entries[before - 1].priority > entry.priority or (
                entries[before - 1].priority == entry.priority and entries[before - 1].ticket < entry.ticket):
            break
        before = entries[before - 1].previous
    entry.previous = before
    entry.next = entries[before - 1].next if before else cold.first_entry
    if entry.next:
        entries[entry.next - 1].previous = link
    else:
        cold.last_entry = link
    if before:
        entries[before - 1].next = link
    else:
        cold.first_entry = link
    cold.waiting += 1


cdef inline void link_entry(Row* row, ColdRow* cold, QueueEntry* entries, QueueEntry* entry) noexcept nogil:
    """Put an entry into the queue. Requires the row's lock."""
    entry.linked = 1
    compiler_barrier()
    put_entry(cold, entries, entry)
    measure_room(row, cold)


cdef inline void unlink_entry(Row* row, ColdRow* cold, QueueEntry* entries, QueueEntry* entry) noexcept nogil:
    """Take an entry out of the queue. Requires the row's lock."""
    entry.linked = 0
    compiler_barrier()
    if entry.previous:
        entries[entry.previous - 1].next = entry.next
    else:
        cold.first_entry = entry.next
    if entry.next:
        entries[entry.next - 1].previous = entry.previous
    else:
        cold.last_entry = entry.previous
    cold.waiting -= 1
    measure_room(row, cold)


cdef inline bint drop_expired(Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, bint all) noexcept nogil:
    """Take out entries whose deadline has passed, from the front or (`all`) anywhere; returns whether there were any.

    Requires the row's lock.
    """
    cdef QueueEntry* entry = entry_at(entries, cold.first_entry)
    cdef QueueEntry* behind
    cdef bint dropped = False
    cdef int64_t i
    for i in range(RECORDS):
        if entry == NULL:
            break
        behind = entry_at(entries, entry.next)
        if load_i64_relaxed(&entry.deadline_ns) <= now_ns:
            unlink_entry(row, cold, entries, entry)
            dropped = True
        elif not all:
            break
        entry = behind
    return dropped


cdef inline int64_t count_counted(const ColdRow* cold, QueueEntry* entries) noexcept nogil:
    """How many waiting requests had their violation counted at this model.

    A request that waits for several models is counted at one of them. Requires the row's lock.
    """
    cdef const QueueEntry* entry = entry_at(entries, cold.first_entry)
    cdef int64_t i, found = 0
    for i in range(RECORDS):
        if entry == NULL:
            break
        found += entry.counted
        entry = entry_at(entries, entry.next)
    return found


cdef inline void rebuild_queue(Row* row, ColdRow* cold, const Shared* shared) noexcept nogil:
    """Link the row's entries again after a process has died during a change. Requires the row's lock.

    The caller measures the room.
    """
    cdef QueueEntry* entry
    cdef uint32_t index = <uint32_t> (row - shared.rows)
    cdef int64_t i
    cold.waiting = 0
    cold.first_entry = cold.last_entry = 0
    for i in range(<int64_t> shared.header.entry_chunks_used * CHUNK):
        entry = &shared.entries[i]
        if entry.seat != 0 and entry.linked and entry.row == index and entry.generation == row.generation:
            put_entry(cold, shared.entries, entry)
