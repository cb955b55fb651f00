# Locking a row, and repairing it. A lock that is taken over from a dead owner counts as taken only once the row has
# been repaired.
#
# The requests and tokens that were charged, the rings, and the records of grants and queues are the truth; all else is
# recomputed from them. A change in several steps is recorded in the cold row's journal. A change that is a single store
# needs no journal: if a process dies before it, only that part of its own request is lost.
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memset
from modelquota._core.atomics cimport add_u64_relaxed, compiler_barrier
from modelquota._core.layout cimport CHUNK, ColdRow, GrantRecord, Header, MAX_COUNT, Row, SLOTS, Shared, WINDOWS
from modelquota._core.row.level cimport LEVEL_MAX, load, store
from modelquota._core.row.limits cimport put_limits
from modelquota._core.row.queue cimport rebuild_queue
from modelquota._core.row.share cimport apply_share, lease_phase
from modelquota._core.row.window cimport (
    IDLE, NOT_KNOWN, ROLLED, ROLLING, charged_before, closed_requests, closed_tokens, current_slot, cut_windows,
    drop_trail, is_counted, measure_room, requests_in_slot, roll, slot_of_step, slot_start_ns, slots_per_slot,
    tokens_in_slot, trail_slot, turn_ring
)
from modelquota._core.state.lock cimport NOT_LOCKED, TAKEN_OVER, lock_within, spin_lock, try_lock


cdef inline bint lock_row(Row* row, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Lock a row, and repair it if its owner had died; False if it stays locked for `patience_ns`.

    Takes the row's lock. Call it without the GIL, unless `patience_ns` is 0; with the GIL, try try_row() first.
    """
    cdef int outcome = lock_within(&row.lock, shared, patience_ns)
    if outcome == TAKEN_OVER:
        repair_row(row, shared)
    return outcome != NOT_LOCKED


cdef inline bint try_row(Row* row, const Shared* shared) noexcept nogil:
    """Take a row's lock if it is free, or becomes free within about a microsecond."""
    return try_lock(&row.lock, shared.me) or spin_lock(&row.lock, shared.me)


cdef inline void clear(Row* row, ColdRow* cold) noexcept nogil:
    """Zero a model, except its row's lock and generation and its name record. Requires the row's lock."""
    cdef uint32_t name_offset = cold.name_offset
    cdef uint16_t name_capacity = cold.name_capacity
    cdef Py_ssize_t kept = <char*> &row.slot_end_ns - <char*> row
    memset(&row.slot_end_ns, 0, sizeof(Row) - kept)
    memset(cold, 0, sizeof(ColdRow))
    cold.name_offset = name_offset
    cold.name_capacity = name_capacity


cdef inline void finish_rolling(Row* row, ColdRow* cold) noexcept nogil:
    """Do what is left of turn_slots(), up to the journal's slot. Requires the row's lock."""
    cdef int64_t before = current_slot(row)
    cdef int64_t after = cold.journal_slot
    cdef int64_t closing, opening, first, steps
    cdef uint64_t requests, tokens
    cdef int step, window, place
    cdef int broken = (cold.stage - ROLLING) // 2
    cdef bint is_done = (cold.stage - ROLLING) % 2
    for step in range(row.trail + 1):
        closing = slot_of_step(row, step)
        opening = after if step == row.trail else slot_of_step(row, step + 1)
        for window in range(WINDOWS):
            first = closing // slots_per_slot(window)
            steps = opening // slots_per_slot(window) - first
            place = step * WINDOWS + window
            if steps <= 0:
                break
            if not is_counted(cold, window) or place < broken or (place == broken and is_done):
                continue
            requests = charged_before(row, step, cold.journal_requests, False)
            tokens = charged_before(row, step, cold.journal_tokens, True)
            if place > broken:
                roll(cold, window, step, requests, tokens, first, steps)
                continue
            cold.requests_start[window] = cold.journal_requests_start
            cold.tokens_start[window] = cold.journal_tokens_start
            cold.filled[window] = cold.journal_filled
            turn_ring(cold, window, requests, tokens, first, steps)
            compiler_barrier()
            cold.stage = <uint8_t> (ROLLED + 2 * place)
            compiler_barrier()
    drop_trail(row)
    if after > before:
        row.slot_end_ns = slot_start_ns(after + 1)


cdef inline void repair_trail(Row* row, const ColdRow* cold) noexcept nogil:
    """Find the end of the trail again, and what of the charges is after it. Requires the row's lock."""
    cdef int64_t requests = requests_in_slot(row, cold)
    cdef int64_t tokens = tokens_in_slot(row, cold)
    cdef int i
    for i in range(row.trail):
        requests -= row.trail_requests[i]
        tokens -= row.trail_tokens[i]
    row.trail_end_ns = slot_start_ns(trail_slot(row) + 1)
    row.trail_request_room = row.request_room + requests
    row.trail_token_room = row.token_room + tokens
    row.trail_request_minimum = row.trail_token_minimum = 0


cdef inline uint64_t in_ring(const Row* row, const ColdRow* cold, int window, bint of_tokens) noexcept nogil:
    """Sum of the closed slots that a window counts. Requires the row's lock, or a copy of the row."""
    cdef int64_t slot = current_slot(row) // slots_per_slot(window) - cold.filled[window]
    cdef int64_t position = slot % SLOTS
    cdef uint64_t total = 0
    cdef int i
    for i in range(cold.filled[window]):
        total += <uint64_t> (closed_tokens(cold, window, position) if of_tokens
                             else closed_requests(cold, window, position))
        position = 0 if position == SLOTS - 1 else position + 1
    return total


cdef inline void count_held(const Row* row, ColdRow* cold, uint32_t index, const Shared* shared) noexcept nogil:
    """Recompute what open grants hold of the row. Requires the row's lock, or a copy of the row."""
    cdef const GrantRecord* held
    cdef int64_t i
    cold.reserved_ram_mb = cold.reserved_ssd_mb = cold.reserved_tokens = cold.concurrent = 0
    cold.handles = 0
    cold.held_percent = NOT_KNOWN
    for i in range(<int64_t> shared.header.grant_chunks_used * CHUNK):
        held = &shared.grants[i]
        if held.seat != 0 and held.row == index and held.generation == row.generation:
            cold.reserved_ram_mb += min(held.ram_mb, MAX_COUNT - cold.reserved_ram_mb)
            cold.reserved_ssd_mb += min(held.ssd_mb, MAX_COUNT - cold.reserved_ssd_mb)
            cold.reserved_tokens += min(held.tokens, MAX_COUNT - cold.reserved_tokens)
            if held.is_handle:
                cold.handles += 1
            else:
                cold.concurrent += 1


cdef inline void repair_limits(Row* row, ColdRow* cold, const Header* header) noexcept nogil:
    """Repeat a change of limits from its beginning. Requires the row's lock, or a copy of the row."""
    row.request_level = header.staged_row_before.request_level
    row.token_level = header.staged_row_before.token_level
    row.request_cap = header.staged_row_before.request_cap
    row.token_cap = header.staged_row_before.token_cap
    row.request_drain = header.staged_row_before.request_drain
    row.token_drain = header.staged_row_before.token_drain
    row.request_shift = header.staged_row_before.request_shift
    row.token_shift = header.staged_row_before.token_shift
    row.dormant_request_shift = header.staged_row_before.dormant_request_shift
    row.dormant_token_shift = header.staged_row_before.dormant_token_shift
    put_limits(row, cold, &header.staged)


cdef inline void recompute_row(Row* row, ColdRow* cold, uint32_t index, const Shared* shared) noexcept nogil:
    """Repair a row, or a private copy of one, except its queue. Requires the row's lock, or a copy of the row."""
    cdef const Header* header = shared.header
    cdef int window
    if cold.stage != IDLE:
        if cold.stage >= ROLLING:
            finish_rolling(row, cold)
        row.request_room = row.token_room = 0
        cold.requests_mark = cold.journal_requests
        cold.tokens_mark = cold.journal_tokens
    for window in range(WINDOWS):
        if is_counted(cold, window):
            cold.requests_base[window] = cold.requests_start[window] - in_ring(row, cold, window, False)
            cold.tokens_base[window] = cold.tokens_start[window] - in_ring(row, cold, window, True)
    cut_windows(row, cold)
    repair_trail(row, cold)
    if header.staged_row == index and header.staged_generation == row.generation:
        repair_limits(row, cold, header)
    # the lowest levels are lower bounds: 0 always is one
    cold.request_minimum[0] = cold.request_minimum[1] = cold.token_minimum[0] = cold.token_minimum[1] = 0
    if load(&row.request_level) > LEVEL_MAX:
        store(&row.request_level, LEVEL_MAX)
    if load(&row.token_level) > LEVEL_MAX:
        store(&row.token_level, LEVEL_MAX)
    count_held(row, cold, index, shared)
    if row.has_share:
        apply_share(row, cold, lease_phase(&header.lease, row.level_ns))
    else:
        measure_room(row, cold)


cdef inline void repair_row(Row* row, const Shared* shared) noexcept nogil:
    """Repair a row whose lock was taken over from a dead owner. Requires the row's lock."""
    cdef int64_t index = row - shared.rows
    cdef ColdRow* cold = &shared.cold_rows[index]
    cdef Header* header = shared.header
    add_u64_relaxed(&header.recoveries, 1)
    if row.generation % 2 == 0:         # the model had not been added yet, or had been removed
        clear(row, cold)
        return
    rebuild_queue(row, cold, shared)
    recompute_row(row, cold, <uint32_t> index, shared)
    if header.staged_row == index and header.staged_generation == row.generation:
        compiler_barrier()
        header.staged_row = -1
