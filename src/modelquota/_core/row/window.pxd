# Rolling windows: how many requests and tokens were charged in the last second, hour and day. Pure arithmetic on one
# row; time is an argument. Every function here requires the row's lock.
#
# A window of length T counts 60 closed slots of T/60 and the current one, so any interval of length T lies within what
# it counts. Slot s begins at s * T / 60 exactly, counted from time 0: a slot of the second is not a whole number of
# nanoseconds long, hence the fractions below. SLOTS_PER_SLOT is how many slots of the second make one slot of each
# window.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from modelquota._core.atomics cimport compiler_barrier
from modelquota._core.layout cimport ColdRow, MAX_COUNT, Row, SECOND, SLOTS, SLOTS_PER_SLOT, UNLIMITED, WINDOWS

cdef enum:
    SLOTS_PER_SPAN = 3_600          # slots of 1/60 s in the 60 s for which lowest levels are kept, see level.pxd
    THREE_SLOTS_NS = 50_000_000     # three slots of the second: the fewest that are a whole number of ns
    NEVER = -1                      # the wait for what no passing of time admits

cdef extern from *:
    const uint32_t UINT32_MAX

cdef enum:  # ColdRow.stage
    IDLE = 0
    CHANGING = 1        # what was charged is in the journal; bases and room follow from it and the rings
    ROLLING = 2         # + 2 * window: that window's start and filled are in the journal too
    ROLLED = 3          # + 2 * window: that window is done, and so are those before it


cdef inline int64_t slot_at(int64_t now_ns) noexcept nogil:
    """Number of the 1/60 s slot that `now_ns` lies in."""
    return now_ns * 3 // THREE_SLOTS_NS


cdef inline int64_t slot_start_ns(int64_t slot) noexcept nogil:
    """First nanosecond of a 1/60 s slot."""
    return (slot * THREE_SLOTS_NS + 2) // 3


cdef inline int64_t current_slot(const Row* row) noexcept nogil:
    """Number of the 1/60 s slot that the row is in."""
    return slot_at(row.slot_end_ns) - 1


cdef inline int64_t slots_per_slot(int window) noexcept nogil:
    """How many 1/60 s slots make one slot of the window."""
    return SLOTS_PER_SLOT[window]


cdef inline uint64_t requests_charged(const Row* row, const ColdRow* cold) noexcept nogil:
    """Requests charged since the model was registered, modulo 2**64; only differences count."""
    return cold.requests_mark - <uint64_t> row.request_room


cdef inline uint64_t tokens_charged(const Row* row, const ColdRow* cold) noexcept nogil:
    """Tokens charged since the model was registered, modulo 2**64."""
    return cold.tokens_mark - <uint64_t> row.token_room


cdef inline int64_t requests_used(const Row* row, const ColdRow* cold, int window) noexcept nogil:
    return <int64_t> (requests_charged(row, cold) - cold.requests_base[window])


cdef inline int64_t tokens_used(const Row* row, const ColdRow* cold, int window) noexcept nogil:
    return <int64_t> (tokens_charged(row, cold) - cold.tokens_base[window])


cdef inline int64_t requests_in_slot(const Row* row, const ColdRow* cold) noexcept nogil:
    """Requests charged in the current 1/60 s slot."""
    return <int64_t> (requests_charged(row, cold) - cold.requests_start[SECOND])


cdef inline int64_t tokens_in_slot(const Row* row, const ColdRow* cold) noexcept nogil:
    return <int64_t> (tokens_charged(row, cold) - cold.tokens_start[SECOND])


cdef inline void begin_change(const Row* row, ColdRow* cold) noexcept nogil:
    """Begin a change of more than one instruction: save what is charged, from which all else can be recomputed."""
    cold.journal_requests = requests_charged(row, cold)
    cold.journal_tokens = tokens_charged(row, cold)
    compiler_barrier()
    cold.stage = CHANGING
    compiler_barrier()


cdef inline void end_change(ColdRow* cold) noexcept nogil:
    compiler_barrier()
    cold.stage = IDLE


cdef inline void roll(
    ColdRow* cold, int window, uint64_t requests, uint64_t tokens, int64_t slot, int64_t steps
) noexcept nogil:
    """Close the window's slot `slot` and open slot `slot + steps`; what leaves the window no longer counts.

    `requests` and `tokens` are requests_charged() and tokens_charged().
    """
    cold.journal_requests_start = cold.requests_start[window]
    cold.journal_tokens_start = cold.tokens_start[window]
    cold.journal_filled = cold.filled[window]
    compiler_barrier()
    cold.stage = <uint8_t> (ROLLING + 2 * window)
    compiler_barrier()
    turn_ring(cold, window, requests, tokens, slot, steps)
    compiler_barrier()
    cold.stage = <uint8_t> (ROLLED + 2 * window)
    compiler_barrier()


cdef inline void turn_ring(
    ColdRow* cold, int window, uint64_t requests, uint64_t tokens, int64_t slot, int64_t steps
) noexcept nogil:
    """The work of roll(). Repeated from the same `start` and `filled` it has the same result, except for the bases."""
    cdef int64_t position, closed
    if steps > SLOTS:
        cold.requests_base[window] = cold.requests_start[window] = requests
        cold.tokens_base[window] = cold.tokens_start[window] = tokens
        cold.filled[window] = 0
        return
    position = slot % SLOTS
    while steps > 0:
        if cold.filled[window] == SLOTS:
            cold.requests_base[window] += cold.requests[window][position]
            cold.tokens_base[window] += <uint64_t> cold.tokens[window][position]
        else:
            cold.filled[window] += 1
        closed = <int64_t> (requests - cold.requests_start[window])
        if closed > UINT32_MAX:
            closed = UINT32_MAX
        cold.requests[window][position] = <uint32_t> closed
        cold.requests_start[window] += <uint64_t> closed
        cold.tokens[window][position] = <int64_t> (tokens - cold.tokens_start[window])
        cold.tokens_start[window] = tokens
        position = 0 if position == SLOTS - 1 else position + 1
        steps -= 1


cdef inline void refund_window(
    Row* row, ColdRow* cold, int64_t requests, int64_t tokens, int64_t charged_ns
) noexcept nogil:
    """Refund what was charged at `charged_ns` to the slots that were charged.

    A window that those slots have left is unchanged. Measures the room. What a slot carried into the next one stays
    there until it ages out.
    """
    cdef int64_t charged = slot_at(charged_ns)
    cdef int64_t here = current_slot(row)
    cdef int64_t slot, current, position, fewer_requests, fewer_tokens
    cdef int i
    begin_change(row, cold)
    for i in range(WINDOWS):
        slot = charged // slots_per_slot(i)
        current = here // slots_per_slot(i)
        if slot < current - cold.filled[i]:
            continue
        fewer_requests = requests
        fewer_tokens = tokens
        if slot == current:
            cold.requests_start[i] += <uint64_t> fewer_requests
            cold.tokens_start[i] += <uint64_t> fewer_tokens
        else:
            position = slot % SLOTS
            fewer_requests = min(fewer_requests, <int64_t> cold.requests[i][position])
            fewer_tokens = min(fewer_tokens, cold.tokens[i][position])
            cold.requests[i][position] -= <uint32_t> fewer_requests
            cold.tokens[i][position] -= fewer_tokens
        cold.requests_base[i] += <uint64_t> fewer_requests
        cold.tokens_base[i] += <uint64_t> fewer_tokens
    measure_room(row, cold)


cdef inline void measure_room(Row* row, ColdRow* cold) noexcept nogil:
    """Recompute what the windows still admit. Call after a base, a limit, the concurrency or the queue has changed."""
    cdef uint64_t requests = requests_charged(row, cold)
    cdef uint64_t tokens = tokens_charged(row, cold)
    cdef int64_t request_room = MAX_COUNT
    cdef int64_t token_room = MAX_COUNT
    cdef int64_t room
    cdef int i
    begin_change(row, cold)
    for i in range(WINDOWS):
        room = min(cold.request_limit[i], MAX_COUNT) - <int64_t> (requests - cold.requests_base[i])
        if room < request_room:
            request_room = room
        room = min(cold.token_limit[i], MAX_COUNT) - <int64_t> (tokens - cold.tokens_base[i])
        if room < token_room:
            token_room = room
    if request_room > 0 and (cold.concurrent >= cold.max_concurrent or cold.waiting):
        request_room = 0    # the next request does not take the fast path: it is judged limit by limit
    row.request_room = request_room
    row.token_room = token_room
    cold.requests_mark = requests + <uint64_t> request_room
    cold.tokens_mark = tokens + <uint64_t> token_room
    end_change(cold)


cdef inline int64_t turn_slots(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Move all windows to `now_ns`, which is not before the end of the current slot.

    Returns how many 60 s spans passed.
    """
    cdef uint64_t requests = requests_charged(row, cold)
    cdef uint64_t tokens = tokens_charged(row, cold)
    cdef int64_t before = current_slot(row)
    cdef int64_t after = slot_at(now_ns)
    cdef int64_t first, steps
    cdef int window
    begin_change(row, cold)
    cold.journal_slot = after
    for window in range(WINDOWS):
        first = before // slots_per_slot(window)
        steps = after // slots_per_slot(window) - first
        if steps == 0:      # a slot of a longer window ends with one of the shorter window
            break
        roll(cold, window, requests, tokens, first, steps)
    compiler_barrier()
    row.slot_end_ns = slot_start_ns(after + 1)
    compiler_barrier()
    measure_room(row, cold)
    return after // SLOTS_PER_SPAN - before // SLOTS_PER_SPAN


cdef inline int64_t window_wait_ns(
    const Row* row, const ColdRow* cold, int window, bint of_tokens, int64_t cost, int64_t credit, int64_t now_ns
) noexcept nogil:
    """How long until the window admits `cost`: 0 = now, NEVER = no wait helps. Exact, if nothing else is admitted.

    With `credit` it is the shortest wait if that much of what is used is refunded, in whichever slots it was charged.
    """
    cdef int64_t limit = cold.token_limit[window] if of_tokens else cold.request_limit[window]
    cdef int64_t used = (tokens_used(row, cold, window) if of_tokens else requests_used(row, cold, window)) - credit
    cdef int64_t per_slot, slot, excess, position, i
    if cost == 0 or limit == UNLIMITED or cost <= limit - used:
        return 0
    if cost > limit:
        return NEVER
    excess = used - (limit - cost)
    per_slot = slots_per_slot(window)
    slot = current_slot(row) // per_slot - cold.filled[window]
    position = slot % SLOTS
    for i in range(cold.filled[window]):
        excess -= cold.tokens[window][position] if of_tokens else <int64_t> cold.requests[window][position]
        if excess <= 0:
            break
        slot += 1
        position = 0 if position == SLOTS - 1 else position + 1
    return slot_start_ns((slot + SLOTS + 1) * per_slot) - now_ns
