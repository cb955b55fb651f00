# The registry: models are added to rows and removed, and their limits are changed. Lock order: the registry's lock,
# then a row's. If the row stays locked the registry's lock is released too, so a process that is stopped with one row
# locked blocks only that model.
from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy
from modelquota._core.atomics cimport (
    add_u64_relaxed, compiler_barrier, load_u32, store_i64, store_u32, store_u64, swap_i64
)
from modelquota._core.layout cimport (
    CHANGES, ColdRow, DAY, Header, Limits, LongRing, Ring, Row, Shared, UNLIMITED, VIOLATION_TYPES, WINDOWS
)
from modelquota._core.row.advance cimport advance
from modelquota._core.row.level cimport NO_RATE, load
from modelquota._core.row.limits cimport (
    limits_digest, put_limits, read_all_limits, read_limits, same_limits, start_row
)
from modelquota._core.row.share cimport begin_share
from modelquota._core.row.window cimport requests_charged, requests_used, tokens_charged, tokens_used
from modelquota._core.state.lock cimport NOT_LOCKED, TAKEN_OVER, lock_within, unlock, wait_clock_ns
from modelquota._core.state.meters cimport MOST_METERS, assign_meter, has_meter, sync_meter
from modelquota._core.state.repair cimport clear, lock_row

cdef enum:
    NAME_UNIT = 16          # a name record has 16, 32, 64, 128 or 256 bytes
    MAX_NAME_BYTES = 255    # a row stores the size in two bytes, and the largest record has one byte more
    NAME_SHARE = 496        # bytes of names that one row needs at most over its life: 16 + 32 + 64 + 128 + 256
    ROW_PATIENCE_NS = 1_000_000     # the longest wait for a row's lock with the registry locked
    LOOK_AGAIN_NS = 16_666_667      # the pause before a full table is searched again; the end of a slot may make room
    SEARCHING = -1
    SEARCH_SHARE = 20               # searching takes at most 1 / SEARCH_SHARE of the time

cdef enum:  # the outcome of a change
    DONE = 1
    NOT_DONE = 0
    REGISTRY_BUSY = -1      # a lock could not be taken; nothing was done
    TABLE_FULL = -2
    OTHER_VERSION = -3
    TOO_MANY_METERS = -4

cdef enum:  # Header.clock_kind
    MONOTONIC = 1
    MANUAL = 2
    BOOTTIME = 3

cdef enum:  # what becomes of a row's share
    SAME_SHARE = -1
    LOSES_SHARE = 0
    GETS_SHARE = 1

cdef enum:
    ANY_ROW = 0xFFFF_FFFF   # in the change log: all rows have to be read again


cdef struct MeterRows:
    # Meters that were registered before their model, or have outlived it.
    int count
    uint32_t rows[MOST_METERS]
    uint32_t generations[MOST_METERS]


cdef inline void log_change(const Shared* shared, uint32_t row) noexcept nogil:
    """Log that a model was added or removed. Requires the registry's lock."""
    cdef Header* header = shared.header
    shared.changes[header.registry_version % CHANGES] = row
    store_u64(&header.registry_version, header.registry_version + 1)


cdef inline bint finish_meters(const Shared* shared) noexcept nogil:
    """The part of finish_changes() about lists of meters. Requires the registry's lock; takes a row's."""
    cdef Header* header = shared.header
    cdef uint32_t meter = header.linking_meter
    cdef uint32_t model = header.linking_model
    cdef uint32_t parent
    cdef Row* row
    if 0 < meter <= header.max_models and 0 < model <= header.max_models:
        row = &shared.rows[model - 1]
        if not lock_row(row, shared, ROW_PATIENCE_NS):
            return False
        sync_meter(model - 1, meter - 1, shared)
        unlock(&row.lock)
    header.linking_meter = 0
    model = header.removing
    if 0 < model <= header.max_models:
        row = &shared.rows[model - 1]
        parent = shared.cold_rows[model - 1].meter_of if row.generation == header.removing_generation else 0
        if 0 < parent <= header.max_models and parent != model:    # itself: only in a damaged file; likewise below
            if not lock_row(&shared.rows[parent - 1], shared, ROW_PATIENCE_NS):
                return False
            assign_meter(parent - 1, model - 1, False, shared)
            unlock(&shared.rows[parent - 1].lock)
        if not lock_row(row, shared, ROW_PATIENCE_NS):
            return False
        if row.generation == header.removing_generation:
            free_meters(model - 1, shared)
            vacate_row(row, &shared.cold_rows[model - 1], shared)
        unlock(&row.lock)
    header.removing = 0
    return True


cdef inline bint finish_changes(const Shared* shared) noexcept nogil:
    """Finish the change that a dead owner of the registry's lock had begun; False if a row stays locked.

    Requires the registry's lock; takes a row's.
    """
    cdef Header* header = shared.header
    cdef int64_t row = header.staged_row
    if 0 <= row < header.max_models:
        # if its owner is dead too, this finishes the change
        if not lock_row(&shared.rows[row], shared, ROW_PATIENCE_NS):
            return False
        unlock(&shared.rows[row].lock)
    header.staged_row = -1
    row = header.leaving_row
    if 0 <= row < header.max_models and shared.rows[row].generation == header.leaving_generation:
        memcpy(&header.retired_allowed, header.staged_retired, sizeof(header.staged_retired))   # not removed
    compiler_barrier()
    header.leaving_row = -1
    if not finish_meters(shared):       # after that: it may remove the model again
        return False
    while header.row_count < header.max_models and shared.rows[header.row_count].generation != 0:
        header.row_count += 1
    header.lowest_free = 0
    log_change(shared, ANY_ROW)
    compiler_barrier()
    header.registry_broken = 0
    return True


cdef inline bint lock_registry(const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Lock the registry, and finish what a dead process had begun there; False if it stays locked for `patience_ns`."""
    cdef Header* header = shared.header
    cdef int outcome = lock_within(&header.registry_lock, shared, patience_ns)
    if outcome == NOT_LOCKED:
        return False
    if outcome == TAKEN_OVER:
        header.registry_broken = 1
    if header.registry_broken and not finish_changes(shared):
        unlock(&header.registry_lock)
        return False
    return True


cdef inline void unlock_registry(const Shared* shared) noexcept nogil:
    unlock(&shared.header.registry_lock)


cdef inline void put_limits_safely(
    Row* row, ColdRow* cold, const Limits* limits, int share, const Shared* shared
) noexcept nogil:
    """put_limits(); if this process dies in between, the one that takes over the row's lock does it again.

    `share`: whether the row gets a share or loses it, or SAME_SHARE. Requires the registry's lock and the row's.
    """
    cdef Header* header = shared.header
    header.staged = limits[0]
    # except the lock, which other processes are trying to take
    memcpy(&header.staged_row_before.slot_end_ns, &row.slot_end_ns,
           sizeof(Row) - (<char*> &row.slot_end_ns - <char*> row))
    header.staged_generation = row.generation
    compiler_barrier()
    header.staged_row = row - shared.rows
    compiler_barrier()
    if share == GETS_SHARE:
        begin_share(row, cold, &header.lease)
    elif share == LOSES_SHARE:
        row.has_share = 0
        compiler_barrier()
    put_limits(row, cold, limits)
    compiler_barrier()
    header.staged_row = -1


cdef inline bint give_or_take_share(
    const Shared* shared, int64_t index, bint giving, int64_t patience_ns
) noexcept nogil:
    """Give a row a share if it has a model and none, or take it away; False if a lock is busy.

    Nothing is done if another process has begun, or ended, to share in the meantime.
    Takes the registry's lock and the row's.
    """
    cdef Row* row = &shared.rows[index]
    cdef ColdRow* cold = &shared.cold_rows[index]
    cdef Limits limits
    if not lock_registry(shared, patience_ns):
        return False
    if not lock_row(row, shared, ROW_PATIENCE_NS):
        unlock_registry(shared)
        return False
    if row.generation & 1 and row.has_share != giving and (load_u32(&shared.header.lease.rule) != 0) == giving:
        read_all_limits(row, cold, &limits)
        put_limits_safely(row, cold, &limits, GETS_SHARE if giving else LOSES_SHARE, shared)
    unlock(&row.lock)
    unlock_registry(shared)
    return True


cdef inline int replace_limits(
    Row* row, uint32_t generation, const Limits* limits, const Limits* expected, bint named, int64_t now_ns,
    const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Change limits; the time until `now_ns` passes under the old ones. Takes the registry's lock and the row's.

    NOT_DONE, and nothing is changed, if the model has been removed, or its limits are no longer `expected` (NULL: any).
    `named`: this id was configured explicitly, so it is no longer removed to make room.
    """
    cdef ColdRow* cold = &shared.cold_rows[row - shared.rows]
    cdef Limits current
    cdef bint fits
    if not lock_registry(shared, patience_ns):
        return REGISTRY_BUSY
    if not lock_row(row, shared, ROW_PATIENCE_NS):
        unlock_registry(shared)
        return REGISTRY_BUSY
    fits = row.generation == generation
    if fits and expected != NULL:
        read_limits(row, cold, &current)
        fits = same_limits(&current, expected)
    if fits:
        advance(row, cold, now_ns)
        put_limits_safely(row, cold, limits, SAME_SHARE, shared)
        if named:
            cold.on_sight = 0
    unlock(&row.lock)
    unlock_registry(shared)
    return DONE if fits else NOT_DONE


cdef inline bint write_name(const Shared* shared, ColdRow* cold, const char* name, int64_t size) noexcept nogil:
    """Write a name to the row's name record, or to a larger one; False if there is no space. Requires both locks."""
    cdef Header* header = shared.header
    cdef int64_t capacity = NAME_UNIT
    cdef int64_t offset
    if cold.name_capacity < size:
        while capacity < size:
            capacity *= 2
        offset = header.names_used
        if offset + capacity > shared.names_size:
            return False
        header.names_used = offset + capacity       # first: a process that dies here leaves a gap, not a shared record
        compiler_barrier()
        cold.name_offset = <uint32_t> (offset // NAME_UNIT)
        compiler_barrier()
        cold.name_capacity = <uint16_t> capacity
    memcpy(shared.names + <int64_t> cold.name_offset * NAME_UNIT, name, size)
    cold.name_size = <uint16_t> size
    return True


cdef inline int64_t ring_size(int window) noexcept nogil:
    """Bytes of one ring of the window."""
    return sizeof(Ring) if window < DAY else sizeof(LongRing)


cdef inline int64_t next_free_row(const Shared* shared) noexcept nogil:
    """The row that the next model gets, as the registry is now; max_models if there is none."""
    cdef int64_t index = shared.header.lowest_free
    while index < shared.header.row_count and shared.rows[index].generation & 1:
        index += 1
    return index


cdef inline void place_rings(const Shared* shared, ColdRow* cold, int64_t index) noexcept nogil:
    """Store the offsets of a row's rings and share. Requires the row's lock."""
    cdef int window
    for window in range(WINDOWS):
        cold.ring_offset[window] = shared.rings[window] + index * ring_size(window) - <char*> cold
    cold.share_offset = <char*> &shared.shares[index] - <char*> cold


cdef inline void vacate_row(Row* row, ColdRow* cold, const Shared* shared) noexcept nogil:
    """Remove a model from its row, and add its counts to the header's totals. Requires both locks."""
    cdef Header* header = shared.header
    cdef int kind
    memcpy(header.staged_retired, &header.retired_allowed, sizeof(header.staged_retired))
    header.leaving_generation = row.generation
    compiler_barrier()
    header.leaving_row = row - shared.rows
    compiler_barrier()
    header.retired_allowed += requests_charged(row, cold)
    header.retired_rejected += cold.rejected
    header.retired_throttled += cold.throttled
    header.retired_queued += cold.queued
    add_u64_relaxed(&header.retired_waited, cold.waited)    # others add to it without the lock
    header.retired_tokens += tokens_charged(row, cold)
    header.retired_refunded += cold.tokens_refunded
    for kind in range(VIOLATION_TYPES):
        header.retired_violations[kind] += cold.violations[kind]
    compiler_barrier()
    store_u32(&row.generation, row.generation + 1)
    compiler_barrier()
    header.leaving_row = -1
    compiler_barrier()
    clear(row, cold)


cdef inline bint is_unused(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Whether a model from default_quota is unused: every decision would be the same if it had just been registered.

    Every window with a limit is empty, its levels have drained, no grant holds anything of it, no request waits for it,
    no handle is bound to it, and its limits are those with which it was registered. Requires the row's lock.
    """
    cdef Limits limits
    cdef int i
    if not cold.on_sight or cold.handles or cold.concurrent or cold.waiting or cold.ram_mb or cold.ssd_mb:
        return False
    advance(row, cold, now_ns)
    for i in range(WINDOWS):
        if cold.request_limit[i] != UNLIMITED and requests_used(row, cold, i) != 0:
            return False
        if cold.token_limit[i] != UNLIMITED and tokens_used(row, cold, i) != 0:
            return False
    if row.request_shift != NO_RATE and load(&row.request_level) != 0:
        return False
    if row.token_shift != NO_RATE and load(&row.token_level) != 0:
        return False
    read_limits(row, cold, &limits)
    return <uint32_t> limits_digest(&limits) == cold.sight_digest


cdef inline void free_meters(uint32_t model, const Shared* shared) noexcept nogil:
    """Take all meters out of a model's list. Requires the registry's lock and the model's."""
    cdef uint32_t link
    for _ in range(MOST_METERS):
        link = shared.cold_rows[model].first_meter
        if link == 0 or link > shared.header.max_models:
            break
        assign_meter(model, link - 1, False, shared)


cdef inline bint lock_unused_meters(const ColdRow* cold, int64_t now_ns, const Shared* shared) noexcept nogil:
    """Lock all meters of a model if all of them are unused, or none. Requires the registry's lock and the model's."""
    cdef uint32_t locked[MOST_METERS]
    cdef int count = 0
    cdef uint32_t link = cold.first_meter
    cdef ColdRow* one
    for _ in range(MOST_METERS):
        if link == 0 or link > shared.header.max_models:
            return True
        one = &shared.cold_rows[link - 1]
        if not one.on_sight or not lock_row(&shared.rows[link - 1], shared, 0):
            break
        locked[count] = link - 1
        count += 1
        if not is_unused(&shared.rows[link - 1], one, now_ns):
            break
        link = one.next_meter
    else:
        if link == 0:
            return True
    while count:
        count -= 1
        unlock(&shared.rows[locked[count]].lock)
    return False


cdef inline void forget_meters(uint32_t model, const Shared* shared) noexcept nogil:
    """Remove a model's meters, which lock_unused_meters() has locked. Requires the registry's lock and the model's."""
    cdef Header* header = shared.header
    cdef uint32_t link, index
    cdef Row* row
    for _ in range(MOST_METERS):
        link = shared.cold_rows[model].first_meter
        if link == 0 or link > header.max_models:
            break
        index = link - 1
        row = &shared.rows[index]
        assign_meter(model, index, False, shared)
        vacate_row(row, &shared.cold_rows[index], shared)
        unlock(&row.lock)
        header.lowest_free = min(header.lowest_free, <int64_t> index)
        log_change(shared, index)


cdef inline int link_meter(
    Row* model, uint32_t model_generation, Row* meter, uint32_t meter_generation, const Shared* shared,
    int64_t patience_ns
) noexcept nogil:
    """Put a meter into its model's list, if both are still there. Takes the registry's lock and the model's."""
    cdef uint32_t index = <uint32_t> (model - shared.rows)
    cdef uint32_t place = <uint32_t> (meter - shared.rows)
    cdef int outcome = DONE
    if not lock_registry(shared, patience_ns):
        return REGISTRY_BUSY
    if model.generation != model_generation or meter.generation != meter_generation:
        outcome = NOT_DONE
    elif not has_meter(index, place, shared):
        if not lock_row(model, shared, ROW_PATIENCE_NS):
            outcome = REGISTRY_BUSY
        else:
            if model.meters >= MOST_METERS:
                outcome = TOO_MANY_METERS
            else:
                assign_meter(index, place, True, shared)
            unlock(&model.lock)
    unlock_registry(shared)
    return outcome


cdef inline int64_t forget_one(const Shared* shared, int64_t now_ns) noexcept nogil:
    """Remove an unused model, and return its row, locked; TABLE_FULL if there is none.

    The search continues where the last one ended. If a whole round finds none, the next search is after a while.
    Requires the registry's lock; takes rows' locks, one at a time, and leaves the last one to the caller.
    """
    cdef Header* header = shared.header
    cdef int64_t index, i, began_ns
    cdef Row* row
    cdef ColdRow* cold
    cdef int64_t searching = SEARCHING
    if now_ns < header.full_until_ns:
        return TABLE_FULL
    began_ns = wait_clock_ns()
    header.full_until_ns = SEARCHING        # anything that makes room from now on sets it to 0
    for i in range(header.row_count):
        index = header.forget_hand if header.forget_hand < header.row_count else 0
        header.forget_hand = index + 1
        row = &shared.rows[index]
        cold = &shared.cold_rows[index]
        if not cold.on_sight or cold.meter_of or not lock_row(row, shared, 0):     # a meter goes with its model
            continue
        if row.generation & 1 and is_unused(row, cold, now_ns) and lock_unused_meters(cold, now_ns, shared):
            forget_meters(<uint32_t> index, shared)
            vacate_row(row, cold, shared)
            return index
        unlock(&row.lock)
    if header.clock_kind != MANUAL:     # a manual clock does not move by itself: the same time gives the same answer
        swap_i64(&header.full_until_ns, searching,
                  now_ns + max(SEARCH_SHARE * (wait_clock_ns() - began_ns), <int64_t> LOOK_AGAIN_NS))
    return TABLE_FULL


cdef inline int64_t add_model(
    const char* name, int64_t size, const Limits* limits, bint on_sight, const MeterRows* meters, int64_t now_ns,
    uint64_t version, uint32_t* generation, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Add a model to the lowest free row and return its number. Takes the registry's lock and the row's.

    If no row is free, an unused model is removed. TABLE_FULL if there is none; OTHER_VERSION if the registry's version
    is not `version`; or REGISTRY_BUSY. Sets `generation`, since the row's may already be another one after the return.

    `meters` that are still registered are in the model's list before anyone can find it; NULL: none.
    """
    cdef Header* header = shared.header
    cdef Row* rows = shared.rows
    cdef ColdRow* cold
    cdef int64_t index
    cdef Row* row
    cdef int i
    if not lock_registry(shared, patience_ns):
        return REGISTRY_BUSY
    if header.registry_version != version:
        unlock_registry(shared)
        return OTHER_VERSION
    index = next_free_row(shared)
    if index < header.max_models:
        if not lock_row(&rows[index], shared, ROW_PATIENCE_NS):
            unlock_registry(shared)
            return REGISTRY_BUSY
        if index == header.row_count:       # never used: what a file may have there is meaningless
            rows[index].generation = 0
            shared.cold_rows[index].name_offset = shared.cold_rows[index].name_capacity = 0
        header.lowest_free = index + 1
    else:
        header.lowest_free = index
        index = forget_one(shared, now_ns)
        if index == TABLE_FULL:
            unlock_registry(shared)
            return TABLE_FULL
    row = &rows[index]
    cold = &shared.cold_rows[index]
    clear(row, cold)
    place_rings(shared, cold, index)
    if write_name(shared, cold, name, size):
        start_row(row, cold, now_ns)
        if load_u32(&header.lease.rule):
            begin_share(row, cold, &header.lease)
        put_limits(row, cold, limits)
        if on_sight:
            cold.sight_digest = <uint32_t> limits_digest(limits)
            cold.on_sight = 1
        for i in range(meters.count if meters != NULL else 0):
            if rows[meters.rows[i]].generation == meters.generations[i]:
                assign_meter(<uint32_t> index, meters.rows[i], True, shared)
        compiler_barrier()
        generation[0] = row.generation + 1
        store_u32(&row.generation, generation[0])
        if index == header.row_count:
            store_i64(&header.row_count, index + 1)
        log_change(shared, <uint32_t> index)
    else:
        header.lowest_free = min(header.lowest_free, index)
        index = TABLE_FULL
        log_change(shared, ANY_ROW)         # forget_one() may have removed a model
    unlock(&row.lock)
    unlock_registry(shared)
    return index


cdef inline int remove_model(
    Row* row, uint32_t generation, const Limits* expected, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Remove a model. Takes the registry's lock and the row's.

    NOT_DONE if it had been removed before, or its limits are no longer `expected` (NULL: any).
    """
    cdef Header* header = shared.header
    cdef int64_t index = row - shared.rows
    cdef Limits current
    cdef uint32_t model
    cdef bint fits
    if not lock_registry(shared, patience_ns):
        return REGISTRY_BUSY
    model = shared.cold_rows[index].meter_of
    if row.generation != generation or model > header.max_models or model == index + 1:
        model = 0
    if model and not lock_row(&shared.rows[model - 1], shared, ROW_PATIENCE_NS):
        unlock_registry(shared)
        return REGISTRY_BUSY
    if not lock_row(row, shared, 0 if model else ROW_PATIENCE_NS):      # only one row's lock is waited for at a time
        if model:
            unlock(&shared.rows[model - 1].lock)
        unlock_registry(shared)
        return REGISTRY_BUSY
    fits = row.generation == generation
    if fits and expected != NULL:
        read_limits(row, &shared.cold_rows[index], &current)
        fits = same_limits(&current, expected)
    if fits:
        if model or row.meters:     # if its owner dies in between, the removal is finished
            header.removing_generation = generation
            compiler_barrier()
            header.removing = <uint32_t> index + 1
            compiler_barrier()
        if model:
            assign_meter(model - 1, <uint32_t> index, False, shared)
        free_meters(<uint32_t> index, shared)
        vacate_row(row, &shared.cold_rows[index], shared)
        header.removing = 0
        if index < header.lowest_free:
            header.lowest_free = index
        header.full_until_ns = 0
        log_change(shared, <uint32_t> index)
    unlock(&row.lock)
    if model:
        unlock(&shared.rows[model - 1].lock)
    unlock_registry(shared)
    return DONE if fits else NOT_DONE
