# Time passes for one row: its levels drain, and its windows turn when a slot of a second ends. Everything here requires
# the row's lock.
from libc.stdint cimport UINT32_MAX, int32_t, int64_t, uint8_t, uint16_t, uint32_t
from modelquota._core.atomics cimport compiler_barrier
from modelquota._core.layout cimport ColdRow, Row, TRAIL
from modelquota._core.row.level cimport coarse_level, drain_levels, is_dormant, raise_level, update_minimum
from modelquota._core.row.share cimport follow_lease
from modelquota._core.row.window cimport (
    SLOTS_PER_SPAN, current_slot, requests_in_slot, slot_at, slot_start_ns, tokens_in_slot, turn_slots
)

cdef enum:
    LEASE_SLOTS = 15        # for no longer than this, 1/4 s, the trail of a row with a share does not look at the lease

ctypedef void (*SlotEnd)(Row*, ColdRow*, int64_t) noexcept nogil

cdef extern from *:
    """
    /* the function, in a way that keeps the compiler from knowing which one it is, and so from inlining it */
    #define MQ_OUT_OF_LINE(f) __extension__ ({ __typeof__(&*(f)) mq_f = &*(f); __asm__("" : "+r"(mq_f)); mq_f; })
    """
    bint unlikely(bint condition) noexcept nogil        # Cython's own macro: a hint for the compiler
    SlotEnd out_of_line "MQ_OUT_OF_LINE"(SlotEnd function) noexcept nogil


cdef inline void end_slot(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """The rest of advance(), from the end of the slot on that the windows are in."""
    cdef int64_t steps
    cdef bint begins = now_ns >= row.trail_end_ns       # a slot, in which nothing has been charged yet
    if unlikely(is_dormant(row)):       # what was admitted in this slot drains from the slot's end
        drain_levels(row, row.slot_end_ns)
        raise_level(&row.request_level, requests_in_slot(row, cold), row.dormant_request_shift, &row.request_cap, True)
        raise_level(&row.token_level, tokens_in_slot(row, cold), row.dormant_token_shift, &row.token_cap, True)
    drain_levels(row, now_ns)
    if row.trail:
        update_minimum(cold.request_minimum, row.trail_request_minimum, 0)
        update_minimum(cold.token_minimum, row.trail_token_minimum, 0)
    if unlikely(row.has_share):
        follow_lease(row, cold, now_ns)
    steps = turn_slots(row, cold, now_ns)
    if begins:
        update_minimum(cold.request_minimum, coarse_level(&row.request_level, row.request_shift), steps)
        update_minimum(cold.token_minimum, coarse_level(&row.token_level, row.token_shift), steps)


cdef inline void advance(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Bring the row to `now_ns`, its windows included; a time before the row's own changes nothing."""
    cdef SlotEnd rare
    if unlikely(now_ns >= row.slot_end_ns):
        rare = out_of_line(end_slot)    # keeps the common case short enough to be inlined
        rare(row, cold, now_ns)
    elif now_ns > row.level_ns:
        drain_levels(row, now_ns)
    elif unlikely(row.trail):           # left by another thread, which has read the clock later
        rare = out_of_line(end_slot)
        rare(row, cold, row.level_ns)


cdef inline bint extend_trail(Row* row, int64_t now_ns) noexcept nogil:
    """Go on to the slot of `now_ns` and leave the windows behind; False, and nothing is changed, if they must turn.

    The slot that the trail has reached has ended.
    """
    cdef int64_t turned = current_slot(row)
    cdef int64_t here = slot_at(now_ns)
    cdef int64_t requests = row.trail_request_room - row.request_room
    cdef int64_t tokens = row.trail_token_room - row.token_room
    cdef int step = row.trail
    if (
        step == TRAIL or here - turned > 255 or here // SLOTS_PER_SPAN != turned // SLOTS_PER_SPAN or is_dormant(row)
        or (row.has_share and here - turned > LEASE_SLOTS)
        or requests < 0 or requests > 65_535 or tokens < 0 or tokens > UINT32_MAX
    ):
        return False
    drain_levels(row, now_ns)
    row.trail_requests[step] = <uint16_t> requests
    row.trail_tokens[step] = <uint32_t> tokens
    row.trail_slots[step] = <uint8_t> (here - turned)
    row.trail_request_minimum = <int32_t> min(
        <int64_t> row.trail_request_minimum, coarse_level(&row.request_level, row.request_shift))
    row.trail_token_minimum = <int32_t> min(
        <int64_t> row.trail_token_minimum, coarse_level(&row.token_level, row.token_shift))
    compiler_barrier()
    row.trail = <uint8_t> (step + 1)
    compiler_barrier()
    row.trail_request_room = row.request_room
    row.trail_token_room = row.token_room
    row.trail_end_ns = slot_start_ns(here + 1)
    return True


cdef inline bint advance_levels(Row* row, int64_t now_ns) noexcept nogil:
    """Bring the levels to `now_ns`, and the windows no further than the trail; False if advance() has to do it.

    The room is then at most what it is after advance().
    """
    if now_ns < row.trail_end_ns:
        drain_levels(row, now_ns)
        return True
    return extend_trail(row, now_ns)
