# What a grant holds of a row, and what it charged there: pure arithmetic on one row, whose lock is held.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.decision cimport WARN, Ask, charge_tokens, pass_time
from modelquota._core.layout cimport Held, Ledger, MAX_COUNT, Row
from modelquota._core.level cimport any_cost, load, lower_level
from modelquota._core.window cimport SLOTS_PER_HOUR_SLOT, current_slot, in_order, measure_room, slot_at, take_back


cdef struct Hold:
    Row* row
    Ledger* ledger
    uint32_t generation     # while the row has it, the model is the one that granted
    Held* record            # what is held, for others to see; NULL while nothing is
    uint32_t index          # of the row


cdef struct Charge:
    int64_t tokens
    int64_t at_ns           # the row's time
    int64_t epoch           # the ledger's level_epoch


cdef inline void take_hold(Hold* hold, const Ask* ask, uint32_t me) noexcept nogil:
    """Hold memory and one unit of concurrency, in a free record. What would not fit a counter is not held."""
    cdef Ledger* ledger = hold.ledger
    cdef Held* record = hold.record
    record.row = hold.index
    record.generation = hold.generation
    record.ram_mb = min(ask.ram_mb, MAX_COUNT - ledger.reserved_ram_mb)
    record.ssd_mb = min(ask.ssd_mb, MAX_COUNT - ledger.reserved_ssd_mb)
    in_order()
    record.seat = me
    in_order()
    ledger.reserved_ram_mb += record.ram_mb
    ledger.reserved_ssd_mb += record.ssd_mb
    ledger.concurrent += 1
    if ledger.concurrent >= ledger.max_concurrent:
        measure_room(hold.row, ledger)


cdef inline void let_go(Row* row, Ledger* ledger, Held* record) noexcept nogil:
    """Give back what take_hold took, and free the record."""
    record.seat = 0
    in_order()
    ledger.reserved_ram_mb -= record.ram_mb
    ledger.reserved_ssd_mb -= record.ssd_mb
    ledger.concurrent -= 1
    if ledger.concurrent + 1 >= ledger.max_concurrent:
        measure_room(row, ledger)


cdef inline void refund(Row* row, Ledger* ledger, int64_t requests, int64_t tokens, const Charge* charge) noexcept nogil:
    """Take back part of a charge, wherever it still counts. Time has passed for the row."""
    cdef int64_t elapsed_ns = row.level_ns - charge.at_ns
    cdef int64_t steps = current_slot(row) // SLOTS_PER_HOUR_SLOT - slot_at(charge.at_ns) // SLOTS_PER_HOUR_SLOT
    take_back(row, ledger, requests, tokens, charge.at_ns)
    ledger.tokens_refunded += tokens
    if charge.epoch != ledger.level_epoch:
        return
    lower_level(&row.request_level, ledger.request_low, row.request_drain, row.request_shift, requests, requests,
                elapsed_ns, steps)
    lower_level(&row.token_level, ledger.token_low, row.token_drain, row.token_shift, tokens, charge.tokens, elapsed_ns,
                steps)


cdef inline bint admits_tokens(const Row* row, const Ledger* ledger, int64_t tokens, bint enforcing) noexcept nogil:
    """Whether an admitted request may have so many tokens more. Time has passed for the row."""
    return (
        not enforcing or ledger.action == WARN
        or (tokens <= row.token_room
            and load(&row.token_level) + any_cost(tokens, row.token_shift) <= load(&row.token_cap))
    )
