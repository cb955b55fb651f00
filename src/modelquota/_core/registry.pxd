# The registry: models enter and leave rows. Lock order: the registry's, then a row's.
from libc.stdint cimport int64_t, uint32_t
from libc.string cimport memcpy, memset
from modelquota._core.decision cimport pass_time
from modelquota._core.layout cimport Header, Ledger, Row, VIOLATION_TYPES
from modelquota._core.lock cimport lock, unlock
from modelquota._core.usage cimport Limits, put_limits, start_row
from modelquota._core.window cimport requests_charged

cdef enum:
    NAME_UNIT = 16          # a name record has 16, 32, 64, 128 or 256 bytes
    NAME_SHARE = 496        # what one row takes at most over its life: 16 + 32 + 64 + 128 + 256


cdef inline bint replace_limits(
    Row* row, Ledger* ledger, uint32_t generation, const Limits* limits, int64_t now_ns, uint32_t seat
) noexcept:
    """Change limits: the time until now passes under the old ones. False where the model has left the row."""
    cdef bint alive
    with nogil:
        lock(&row.lock, seat)
        alive = row.generation == generation
        if alive:
            pass_time(row, ledger, now_ns)
            put_limits(row, ledger, limits)
        unlock(&row.lock)
    return alive


cdef inline void write_name(Header* header, Ledger* ledger, char* names, const char* name, int64_t size) noexcept nogil:
    """Put a name into the row's record, or into a larger one; requires the registry lock."""
    cdef int64_t capacity = NAME_UNIT
    if ledger.name_capacity < size:
        while capacity < size:
            capacity *= 2
        ledger.name_offset = <uint32_t> (header.names_used // NAME_UNIT)
        ledger.name_capacity = <uint32_t> capacity
        header.names_used += capacity
    memcpy(names + <int64_t> ledger.name_offset * NAME_UNIT, name, size)
    ledger.name_size = <uint32_t> size


cdef inline int64_t enter(
    Header* header, Row* rows, Ledger* ledgers, char* names, const char* name, int64_t size, const Limits* limits,
    int64_t now_ns, uint32_t seat
) noexcept:
    """Put a model into the lowest free row and return its number; -1 where the table is full."""
    cdef int64_t index
    cdef Row* row
    with nogil:
        lock(&header.registry_lock, seat)
        index = header.lowest_free
        while index < header.row_count and rows[index].generation & 1:
            index += 1
        if index < header.max_models:
            row = &rows[index]
            lock(&row.lock, seat)
            write_name(header, &ledgers[index], names, name, size)
            start_row(row, &ledgers[index], now_ns)
            put_limits(row, &ledgers[index], limits)
            row.generation += 1
            unlock(&row.lock)
            header.lowest_free = index + 1
            if index == header.row_count:
                header.row_count = index + 1
        else:
            index = -1
        unlock(&header.registry_lock)
    return index


cdef inline void clear(Row* row, Ledger* ledger) noexcept nogil:
    """Zero a model but for its row's lock and generation and its name record."""
    cdef uint32_t name_offset = ledger.name_offset
    cdef uint32_t name_capacity = ledger.name_capacity
    cdef Py_ssize_t kept = <char*> &row.slot_end_ns - <char*> row
    memset(&row.slot_end_ns, 0, sizeof(Row) - kept)
    memset(ledger, 0, sizeof(Ledger))
    ledger.name_offset = name_offset
    ledger.name_capacity = name_capacity


cdef inline void leave(
    Header* header, Row* rows, Row* row, Ledger* ledger, uint32_t generation, uint32_t seat
) noexcept:
    """Take a model out of its row; what it counted goes into the header's totals."""
    cdef int64_t index = row - rows
    cdef int kind
    with nogil:
        lock(&header.registry_lock, seat)
        lock(&row.lock, seat)
        if row.generation == generation:
            header.retired_allowed += requests_charged(row, ledger)
            header.retired_rejected += ledger.rejected
            header.retired_throttled += ledger.throttled
            header.retired_queued += ledger.queued
            header.retired_waited += ledger.waited
            for kind in range(VIOLATION_TYPES):
                header.retired_violations[kind] += ledger.violations[kind]
            clear(row, ledger)
            row.generation += 1
            if index < header.lowest_free:
                header.lowest_free = index
        unlock(&row.lock)
        unlock(&header.registry_lock)
