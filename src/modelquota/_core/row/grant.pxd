# Holdings: what a grant holds of a row and what it charged there, and how both are given back. Pure arithmetic on one
# row. Every function here requires the row's lock.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.atomics cimport compiler_barrier
from modelquota._core.layout cimport Charge, ColdRow, GrantRecord, MAX_COUNT, QueueEntry, Row
from modelquota._core.row.decision cimport Request
from modelquota._core.row.level cimport lower_level
from modelquota._core.row.share cimport share_of
from modelquota._core.row.window cimport (
    NOT_KNOWN, SLOTS_PER_SPAN, current_slot, measure_room, refund_window, slot_at
)


cdef struct Holding:
    # One model of a request or of a grant. Process-local.
    Row* row
    ColdRow* cold
    uint32_t generation     # the row's, when the model was looked up; with another one the model has been removed
    GrantRecord* record     # what is held, in shared memory; NULL if nothing is
    QueueEntry* entry       # the request's entry in the model's queue, or NULL
    uint32_t index          # the number of the row
    bint decides_meters     # whether the meters of the model are members too,
    uint32_t meters_epoch   # and which ones those were


cdef inline void reserve_tokens(ColdRow* cold, GrantRecord* record, int64_t tokens) noexcept nogil:
    """Record tokens that have been charged and may be refunded. Requires the row's lock."""
    cdef int64_t more = min(tokens, MAX_COUNT - max(cold.reserved_tokens, record.tokens))
    record.tokens += more
    cold.reserved_tokens += more


cdef inline int64_t without(int64_t reserved, int64_t held) noexcept nogil:
    """What stays reserved; a record in a damaged file may hold more than its row knows of."""
    return max(reserved - held, <int64_t> 0)


cdef inline void settle_tokens(ColdRow* cold, GrantRecord* record) noexcept nogil:
    """Make what was charged final. Requires the row's lock."""
    cold.reserved_tokens = without(cold.reserved_tokens, record.tokens)
    record.tokens = 0


cdef inline void take_holding(Holding* hold, const Request* request, int64_t charged, uint32_t me) noexcept nogil:
    """Hold memory, one unit of concurrency and the charged tokens, in a free record. Requires the row's lock.

    What a counter cannot take, because it has reached MAX_COUNT, is not held.
    """
    cdef ColdRow* cold = hold.cold
    cdef GrantRecord* record = hold.record
    record.row = hold.index
    record.generation = hold.generation
    record.ram_mb = min(request.ram_mb, MAX_COUNT - cold.reserved_ram_mb)
    record.ssd_mb = min(request.ssd_mb, MAX_COUNT - cold.reserved_ssd_mb)
    record.tokens = 0
    record.is_handle = 0
    record.decider = 0
    compiler_barrier()
    record.seat = me
    compiler_barrier()
    reserve_tokens(cold, record, charged)
    cold.reserved_ram_mb += record.ram_mb
    cold.reserved_ssd_mb += record.ssd_mb
    cold.concurrent += 1
    cold.held_percent = NOT_KNOWN
    if cold.concurrent >= cold.max_concurrent:
        measure_room(hold.row, cold)


cdef inline void release_holding(Row* row, ColdRow* cold, GrantRecord* record) noexcept nogil:
    """Give back what take_holding() took, and free the record. Requires the row's lock."""
    record.seat = 0
    compiler_barrier()
    cold.reserved_ram_mb = without(cold.reserved_ram_mb, record.ram_mb)
    cold.reserved_ssd_mb = without(cold.reserved_ssd_mb, record.ssd_mb)
    settle_tokens(cold, record)
    cold.concurrent -= 1
    cold.held_percent = NOT_KNOWN
    if cold.concurrent + 1 >= cold.max_concurrent:
        measure_room(row, cold)


cdef inline void bind_handle(
    ColdRow* cold, GrantRecord* record, uint32_t index, uint32_t generation, uint32_t me
) noexcept nogil:
    """Record that a handle is bound to the model, which is not removed to make room while one is.

    Requires the row's lock.
    """
    record.row = index
    record.generation = generation
    record.ram_mb = record.ssd_mb = record.tokens = 0
    record.is_handle = 1
    record.decider = 0
    compiler_barrier()
    record.seat = me
    compiler_barrier()
    cold.handles += 1


cdef inline void free_handle(ColdRow* cold, GrantRecord* record) noexcept nogil:
    """Undo bind_handle(), and free the record. Requires the row's lock."""
    record.seat = 0
    compiler_barrier()
    cold.handles -= 1


cdef inline void refund(Row* row, ColdRow* cold, int64_t requests, int64_t tokens, const Charge* charge) noexcept nogil:
    """Refund part of a charge, in the windows and levels in which it still counts.

    Requires advance() and the row's lock.
    """
    cdef int64_t elapsed_ns = row.level_ns - charge.at_ns
    cdef int64_t steps = current_slot(row) // SLOTS_PER_SPAN - slot_at(charge.at_ns) // SLOTS_PER_SPAN
    refund_window(row, cold, requests, tokens, charge.at_ns)
    cold.tokens_refunded += tokens
    if charge.epoch != cold.level_epoch:
        return
    requests = min(requests, <int64_t> charge.raised_request)
    # a share of the drain has changed in the meantime, and was never more than the configured one
    lower_level(&row.request_level, cold.request_minimum,
                share_of(cold).request_drain if row.has_share else row.request_drain, row.request_shift, requests,
                requests, elapsed_ns, steps)
    # what is not refunded would have raised the level as far as the cap let it
    tokens = max(charge.raised - (charge.tokens - tokens), <int64_t> 0)
    lower_level(&row.token_level, cold.token_minimum,
                share_of(cold).token_drain if row.has_share else row.token_drain, row.token_shift, tokens,
                charge.raised, elapsed_ns, steps)
