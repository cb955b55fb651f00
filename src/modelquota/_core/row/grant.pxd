# What a grant holds of a row, and what it charged there: pure arithmetic on one row, whose lock is held.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.layout cimport Charge, GrantRecord, Ledger, MAX_COUNT, QueueEntry, Row
from modelquota._core.row.decision cimport Ask
from modelquota._core.row.level cimport lower_level
from modelquota._core.row.window cimport SLOTS_PER_SPAN, current_slot, in_order, measure_room, slot_at, take_back


cdef struct Hold:
    Row* row
    Ledger* ledger
    uint32_t generation     # while the row has it, the model is the one that granted
    GrantRecord* record     # what is held, for others to see; NULL while nothing is
    QueueEntry* entry       # its place in the queue, or NULL
    uint32_t index          # of the row


cdef inline void reserve_tokens(Ledger* ledger, GrantRecord* record, int64_t tokens) noexcept nogil:
    """Note tokens that are charged and may come back."""
    cdef int64_t more = min(tokens, MAX_COUNT - ledger.reserved_tokens)
    record.tokens += more
    ledger.reserved_tokens += more


cdef inline void settle_tokens(Ledger* ledger, GrantRecord* record) noexcept nogil:
    """What was charged is now the truth."""
    ledger.reserved_tokens -= record.tokens
    record.tokens = 0


cdef inline void take_hold(Hold* hold, const Ask* ask, int64_t charged, uint32_t me) noexcept nogil:
    """Hold memory, one unit of concurrency and the tokens, in a free record. What would not fit a counter is not held."""
    cdef Ledger* ledger = hold.ledger
    cdef GrantRecord* record = hold.record
    record.row = hold.index
    record.generation = hold.generation
    record.ram_mb = min(ask.ram_mb, MAX_COUNT - ledger.reserved_ram_mb)
    record.ssd_mb = min(ask.ssd_mb, MAX_COUNT - ledger.reserved_ssd_mb)
    record.tokens = 0
    record.is_handle = 0
    record.decider = 0
    in_order()
    record.seat = me
    in_order()
    reserve_tokens(ledger, record, charged)
    ledger.reserved_ram_mb += record.ram_mb
    ledger.reserved_ssd_mb += record.ssd_mb
    ledger.concurrent += 1
    if ledger.concurrent >= ledger.max_concurrent:
        measure_room(hold.row, ledger)


cdef inline void let_go(Row* row, Ledger* ledger, GrantRecord* record) noexcept nogil:
    """Give back what take_hold took, and free the record."""
    record.seat = 0
    in_order()
    ledger.reserved_ram_mb -= record.ram_mb
    ledger.reserved_ssd_mb -= record.ssd_mb
    settle_tokens(ledger, record)
    ledger.concurrent -= 1
    if ledger.concurrent + 1 >= ledger.max_concurrent:
        measure_room(row, ledger)


cdef inline void bind_handle(
    Ledger* ledger, GrantRecord* record, uint32_t index, uint32_t generation, uint32_t me
) noexcept nogil:
    """Note that a handle is bound to the model: it is not forgotten while one is. Requires the row's lock."""
    record.row = index
    record.generation = generation
    record.ram_mb = record.ssd_mb = record.tokens = 0
    record.is_handle = 1
    record.decider = 0
    in_order()
    record.seat = me
    in_order()
    ledger.handles += 1


cdef inline void free_handle(Ledger* ledger, GrantRecord* record) noexcept nogil:
    """Undo bind_handle(), and free the record. Requires the row's lock."""
    record.seat = 0
    in_order()
    ledger.handles -= 1


cdef inline void refund(Row* row, Ledger* ledger, int64_t requests, int64_t tokens, const Charge* charge) noexcept nogil:
    """Take back part of a charge, wherever it still counts. Time has passed for the row."""
    cdef int64_t elapsed_ns = row.level_ns - charge.at_ns
    cdef int64_t steps = current_slot(row) // SLOTS_PER_SPAN - slot_at(charge.at_ns) // SLOTS_PER_SPAN
    take_back(row, ledger, requests, tokens, charge.at_ns)
    ledger.tokens_refunded += tokens
    if charge.epoch != ledger.level_epoch:
        return
    requests = min(requests, <int64_t> charge.raised_request)
    lower_level(&row.request_level, ledger.request_low, row.request_drain, row.request_shift, requests, requests,
                elapsed_ns, steps)
    # what is not taken back would have raised the level as far as it could
    tokens = max(charge.raised - (charge.tokens - tokens), <int64_t> 0)
    lower_level(&row.token_level, ledger.token_low, row.token_drain, row.token_shift, tokens, charge.raised, elapsed_ns,
                steps)
