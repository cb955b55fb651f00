# The registry: models enter and leave rows, and limits are changed. Lock order: the registry's, then a row's.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy
from modelquota._core.decision cimport pass_time
from modelquota._core.layout cimport Header, Ledger, Limits, Row, Shared, VIOLATION_TYPES
from modelquota._core.lock cimport lock, unlock
from modelquota._core.repair cimport clear, count_atomically, enter_row
from modelquota._core.usage cimport put_limits, read_limits, same_limits, start_row
from modelquota._core.window cimport in_order, requests_charged

cdef extern from *:
    int64_t read_number "__atomic_load_n"(const int64_t* word, int order) noexcept nogil
    const int RELAXED "__ATOMIC_RELAXED"

cdef enum:
    NAME_UNIT = 16          # a name record has 16, 32, 64, 128 or 256 bytes
    NAME_SHARE = 496        # what one row takes at most over its life: 16 + 32 + 64 + 128 + 256
    TABLE_FULL = -1


cdef inline void enter_registry(const Shared* shared) noexcept nogil:
    """Lock the registry; what a dead owner left half done is finished."""
    cdef Header* header = shared.header
    cdef int64_t row
    if not lock(&header.registry_lock, shared):
        return
    row = read_number(&header.staged_row, RELAXED)      # once: who repairs that row meanwhile sets it to -1
    if row >= 0 and row < header.max_models:
        enter_row(&shared.rows[row], shared)    # where its owner died with it, this finishes the change
        unlock(&shared.rows[row].lock)
    header.staged_row = -1
    row = header.leaving_row
    if row >= 0 and row < header.max_models and shared.rows[row].generation == header.leaving_generation:
        memcpy(&header.retired_allowed, header.staged_retired, sizeof(header.staged_retired))   # it has stayed
    in_order()
    header.leaving_row = -1
    while header.row_count < header.max_models and shared.rows[header.row_count].generation != 0:
        header.row_count += 1
    header.lowest_free = 0
    header.registry_version += 1


cdef inline void leave_registry(const Shared* shared) noexcept nogil:
    unlock(&shared.header.registry_lock)


cdef inline bint replace_limits(
    Row* row, uint32_t generation, const Limits* limits, const Limits* expected, int64_t now_ns, const Shared* shared
) noexcept:
    """Change limits: the time until now passes under the old ones.

    False, and nothing is changed, where the model has left the row, or its limits are no longer those that were
    `expected` (NULL: any).
    """
    cdef Header* header = shared.header
    cdef Ledger* ledger = &shared.ledgers[row - shared.rows]
    cdef Limits current
    cdef bint fits
    with nogil:
        enter_registry(shared)
        enter_row(row, shared)
        fits = row.generation == generation
        if fits and expected != NULL:
            read_limits(ledger, &current)
            fits = same_limits(&current, expected)
        if fits:
            pass_time(row, ledger, now_ns)
            header.staged = limits[0]
            header.staged_request_level = row.request_level
            header.staged_token_level = row.token_level
            header.staged_request_shift = row.request_shift
            header.staged_token_shift = row.token_shift
            header.staged_generation = generation
            in_order()
            header.staged_row = row - shared.rows
            in_order()
            put_limits(row, ledger, limits)
            in_order()
            header.staged_row = -1
        unlock(&row.lock)
        leave_registry(shared)
    return fits


cdef inline bint write_name(const Shared* shared, Ledger* ledger, const char* name, int64_t size) noexcept nogil:
    """Put a name into the row's record, or into a larger one; requires the registry lock. False where none is left."""
    cdef Header* header = shared.header
    cdef int64_t capacity = NAME_UNIT
    cdef int64_t offset
    if ledger.name_capacity < size:
        while capacity < size:
            capacity *= 2
        offset = header.names_used
        if offset + capacity > shared.names_size:
            return False
        header.names_used = offset + capacity       # first: who dies here leaves a gap, not two owners
        in_order()
        ledger.name_offset = <uint32_t> (offset // NAME_UNIT)
        in_order()
        ledger.name_capacity = <uint32_t> capacity
    memcpy(shared.names + <int64_t> ledger.name_offset * NAME_UNIT, name, size)
    ledger.name_size = <uint32_t> size
    return True


cdef inline int64_t enter(
    const char* name, int64_t size, const Limits* limits, int64_t now_ns, uint64_t version, uint32_t* generation,
    const Shared* shared
) noexcept:
    """Put a model into the lowest free row and return its number; TABLE_FULL, or -2 where the registry is not `version`.

    `generation` is the model's: the row's may be another one by the time that the caller looks.
    """
    cdef Header* header = shared.header
    cdef Row* rows = shared.rows
    cdef Ledger* ledger
    cdef int64_t index
    cdef Row* row
    with nogil:
        enter_registry(shared)
        index = header.lowest_free
        while index < header.row_count and rows[index].generation & 1:
            index += 1
        if header.registry_version != version:
            index = -2
        elif index >= header.max_models:
            index = TABLE_FULL
        else:
            row = &rows[index]
            ledger = &shared.ledgers[index]
            enter_row(row, shared)
            if index == header.row_count:       # never used; whatever a file may have there says nothing
                row.generation = 0
                ledger.name_offset = ledger.name_capacity = 0
            clear(row, ledger)
            if write_name(shared, ledger, name, size):
                start_row(row, ledger, now_ns)
                put_limits(row, ledger, limits)
                in_order()
                row.generation += 1
                generation[0] = row.generation
                header.lowest_free = index + 1
                if index == header.row_count:
                    header.row_count = index + 1
                header.registry_version += 1
            else:
                index = TABLE_FULL
            unlock(&row.lock)
        leave_registry(shared)
    return index


cdef inline bint leave(Row* row, uint32_t generation, const Shared* shared) noexcept:
    """Take a model out of its row; what it counted goes into the header's totals. False where it was not there."""
    cdef Header* header = shared.header
    cdef int64_t index = row - shared.rows
    cdef Ledger* ledger = &shared.ledgers[index]
    cdef bint alive
    cdef int kind
    with nogil:
        enter_registry(shared)
        enter_row(row, shared)
        alive = row.generation == generation
        if alive:
            memcpy(header.staged_retired, &header.retired_allowed, sizeof(header.staged_retired))
            header.leaving_generation = generation
            in_order()
            header.leaving_row = index
            in_order()
            header.retired_allowed += requests_charged(row, ledger)
            header.retired_rejected += ledger.rejected
            header.retired_throttled += ledger.throttled
            header.retired_queued += ledger.queued
            count_atomically(&header.retired_waited, ledger.waited, RELAXED)    # others add to it without the lock
            for kind in range(VIOLATION_TYPES):
                header.retired_violations[kind] += ledger.violations[kind]
            in_order()
            row.generation += 1
            in_order()
            header.leaving_row = -1
            in_order()
            clear(row, ledger)
            if index < header.lowest_free:
                header.lowest_free = index
            header.registry_version += 1
        unlock(&row.lock)
        leave_registry(shared)
    return alive
