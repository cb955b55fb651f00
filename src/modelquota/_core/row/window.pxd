# Rolling windows: how many requests and tokens were charged in the last second, minute, hour, day and month. Pure
# arithmetic on one row; time is an argument. Every function here requires the row's lock.
#
# A window of length T counts 60 closed slots of T/60 and the current one, so any interval of length T lies within what
# it counts. Slot s begins at s * T / 60 exactly, counted from time 0: a slot of the second is not a whole number of
# nanoseconds long, hence the fractions below. SLOTS_PER_SLOT is how many slots of the second make one slot of each
# window.
#
# A window that is not counted (see ColdRow.counted) has no limit, and its ring is not touched.
from libc.stdint cimport INT32_MAX, INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from modelquota._core.atomics cimport compiler_barrier
from modelquota._core.layout cimport (
    ColdRow, DAY, LongRing, MAX_COUNT, MAX_TIME_NS, MONTH, Ring, Row, SECOND, SLOTS, SLOTS_PER_SLOT, TRAIL,
    UNLIMITED, WINDOWS
)

cdef enum:
    SLOTS_PER_SPAN = 3_600          # slots of 1/60 s in the 60 s for which lowest levels are kept, see level.pxd
    THREE_SLOTS_NS = 50_000_000     # three slots of the second: the fewest that are a whole number of ns
    COUNT_BITS = 27                 # of the two parts of a closed slot's code: below 2**27 it is the count itself
    MOST_CARRIES = 4                # slots after which of any count nothing is carried on
    NEVER = -1                      # the wait for what no passing of time admits
    NOT_KNOWN = -1                  # ColdRow.held_percent after a change of what is held

cdef enum:  # ColdRow.stage
    IDLE = 0
    CHANGING = 1        # what was charged is in the journal; bases and room follow from it and the rings
    ROLLING = 2         # + 2 * (step * WINDOWS + window): that window's start and filled are in the journal too
    ROLLED = 3          # + the same: that window is done, and so are those before it. A step closes a slot of the trail


cdef inline int64_t slot_at(int64_t now_ns) noexcept nogil:
    """Number of the 1/60 s slot that `now_ns` lies in."""
    return now_ns * 3 // THREE_SLOTS_NS


cdef inline int64_t slot_start_ns(int64_t slot) noexcept nogil:
    """First nanosecond of a 1/60 s slot."""
    return (slot * THREE_SLOTS_NS + 2) // 3


cdef inline int64_t current_slot(const Row* row) noexcept nogil:
    """Number of the 1/60 s slot that the windows are in."""
    return slot_at(row.slot_end_ns) - 1


cdef inline int64_t slots_per_slot(int window) noexcept nogil:
    """How many 1/60 s slots make one slot of the window."""
    return SLOTS_PER_SLOT[window]


cdef inline bint is_counted(const ColdRow* cold, int window) noexcept nogil:
    return cold.counted >> window & 1


cdef inline uint64_t requests_charged(const Row* row, const ColdRow* cold) noexcept nogil:
    """Requests charged since the model was registered, modulo 2**64; only differences count."""
    return cold.requests_mark - <uint64_t> row.request_room


cdef inline uint64_t tokens_charged(const Row* row, const ColdRow* cold) noexcept nogil:
    """Tokens charged since the model was registered, modulo 2**64."""
    return cold.tokens_mark - <uint64_t> row.token_room


cdef inline int64_t requests_used(const Row* row, const ColdRow* cold, int window) noexcept nogil:
    """Requests in the window, which is counted."""
    return <int64_t> (requests_charged(row, cold) - cold.requests_base[window])


cdef inline int64_t tokens_used(const Row* row, const ColdRow* cold, int window) noexcept nogil:
    """Tokens in the window, which is counted."""
    return <int64_t> (tokens_charged(row, cold) - cold.tokens_base[window])


cdef inline int64_t most_tokens_used(const Row* row, const ColdRow* cold) noexcept nogil:
    """The most tokens that any window has.

    It may be any of them: a month is counted from later on, and a day that was at MAX_COUNT has missed what the hour
    has.
    """
    cdef int64_t used = 0
    cdef int window
    for window in range(WINDOWS):
        if is_counted(cold, window):
            used = max(used, tokens_used(row, cold, window))
    return used


cdef inline int64_t requests_in_slot(const Row* row, const ColdRow* cold) noexcept nogil:
    """Requests charged in the current 1/60 s slot."""
    return <int64_t> (requests_charged(row, cold) - cold.requests_start[SECOND])


cdef inline int64_t tokens_in_slot(const Row* row, const ColdRow* cold) noexcept nogil:
    """Tokens charged in the current 1/60 s slot."""
    return <int64_t> (tokens_charged(row, cold) - cold.tokens_start[SECOND])


# -- closed slots

cdef inline char* ring_of(const ColdRow* cold, int window) noexcept nogil:
    """The window's ring: a Ring, or from DAY on a LongRing."""
    return <char*> cold + cold.ring_offset[window]


cdef inline int64_t kept(int64_t count) noexcept nogil:
    """What of a count a closed slot holds: all of one that is below 2**27, or else its highest 26 or 27 bits."""
    cdef int shift = 0
    while <uint64_t> count >> shift >> COUNT_BITS:      # unsigned: of a damaged row it may be negative
        shift += 2
    return count >> shift << shift


cdef inline uint32_t encoded(int64_t count) noexcept nogil:
    """A count that kept() returned, as a closed slot holds it."""
    cdef uint64_t mantissa = <uint64_t> count
    cdef uint32_t exponent = 0
    while mantissa >> COUNT_BITS:
        mantissa >>= 2
        exponent += 1
    return <uint32_t> mantissa | exponent << COUNT_BITS


cdef inline int64_t decoded(uint32_t code) noexcept nogil:
    """The count that a closed slot holds."""
    return <int64_t> (<uint64_t> (code & ((<uint32_t> 1 << COUNT_BITS) - 1)) << 2 * (code >> COUNT_BITS))


cdef inline int64_t closed_requests(const ColdRow* cold, int window, int64_t position) noexcept nogil:
    """Requests in the closed slot at this position of the ring."""
    if window < DAY:
        return decoded((<Ring*> ring_of(cold, window)).slots[position][False])
    return decoded((<LongRing*> ring_of(cold, window)).requests[position])


cdef inline int64_t closed_tokens(const ColdRow* cold, int window, int64_t position) noexcept nogil:
    """Tokens in the closed slot at this position of the ring."""
    if window < DAY:
        return decoded((<Ring*> ring_of(cold, window)).slots[position][True])
    return (<LongRing*> ring_of(cold, window)).tokens[position]


cdef inline void put_slot(ColdRow* cold, int window, int64_t position, int64_t requests, int64_t tokens) noexcept nogil:
    """Write a closed slot; the counts are such as kept_in() returns."""
    if window < DAY:
        (<Ring*> ring_of(cold, window)).slots[position][False] = encoded(requests)
        (<Ring*> ring_of(cold, window)).slots[position][True] = encoded(tokens)
    else:
        (<LongRing*> ring_of(cold, window)).requests[position] = encoded(requests)
        (<LongRing*> ring_of(cold, window)).tokens[position] = tokens


cdef inline int64_t kept_in(int window, bint of_tokens, int64_t count) noexcept nogil:
    """What of a count a closed slot of the window holds; the rest is carried into the slot that follows."""
    return count if of_tokens and window >= DAY else kept(count)


# -- changes in several steps

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
    ColdRow* cold, int window, int step, uint64_t requests, uint64_t tokens, int64_t slot, int64_t steps
) noexcept nogil:
    """Close the window's slot `slot` and open slot `slot + steps`; what leaves the window no longer counts.

    `requests` and `tokens` are those charged ever when the slot ended.
    """
    cdef uint8_t place = <uint8_t> (2 * (step * WINDOWS + window))
    cold.journal_requests_start = cold.requests_start[window]
    cold.journal_tokens_start = cold.tokens_start[window]
    cold.journal_filled = cold.filled[window]
    compiler_barrier()
    cold.stage = ROLLING + place
    compiler_barrier()
    turn_ring(cold, window, requests, tokens, slot, steps)
    compiler_barrier()
    cold.stage = ROLLED + place
    compiler_barrier()


cdef inline uint64_t closed_by(
    int window, bint of_tokens, uint64_t start, uint64_t charged, int64_t steps
) noexcept nogil:
    """What is in closed slots, `steps` slots after `start` had been charged; all of it after MOST_CARRIES."""
    cdef int64_t count
    for _ in range(min(steps, <int64_t> MOST_CARRIES)):
        count = <int64_t> (charged - start)
        start += <uint64_t> kept_in(window, of_tokens, count)
    return start


cdef inline void turn_ring(
    ColdRow* cold, int window, uint64_t requests, uint64_t tokens, int64_t slot, int64_t steps
) noexcept nogil:
    """The work of roll(). Done again from the same start and filled it comes out the same, but for the bases."""
    cdef int64_t position
    cdef uint64_t before_requests, before_tokens
    if steps > SLOTS:       # all closed slots leave, and so does what is closed before the last SLOTS of them
        cold.requests_start[window] = closed_by(window, False, cold.requests_start[window], requests, steps - SLOTS)
        cold.tokens_start[window] = closed_by(window, True, cold.tokens_start[window], tokens, steps - SLOTS)
        cold.requests_base[window] = cold.requests_start[window]
        cold.tokens_base[window] = cold.tokens_start[window]
        cold.filled[window] = 0
        if cold.requests_start[window] == requests and cold.tokens_start[window] == tokens:
            return
        slot += steps - SLOTS
        steps = SLOTS
    position = slot % SLOTS
    while steps > 0:
        if cold.filled[window] == SLOTS:
            cold.requests_base[window] += <uint64_t> closed_requests(cold, window, position)
            cold.tokens_base[window] += <uint64_t> closed_tokens(cold, window, position)
        else:
            cold.filled[window] += 1
        before_requests = cold.requests_start[window]
        before_tokens = cold.tokens_start[window]
        cold.requests_start[window] = closed_by(window, False, before_requests, requests, 1)
        cold.tokens_start[window] = closed_by(window, True, before_tokens, tokens, 1)
        put_slot(cold, window, position, <int64_t> (cold.requests_start[window] - before_requests),
                 <int64_t> (cold.tokens_start[window] - before_tokens))
        position = 0 if position == SLOTS - 1 else position + 1
        steps -= 1


cdef inline void begin_counting(const Row* row, ColdRow* cold, int window) noexcept nogil:
    """Count a window from now on: what was charged before, in this nanosecond too, is not refunded to it."""
    cold.requests_base[window] = cold.requests_start[window] = requests_charged(row, cold)
    cold.tokens_base[window] = cold.tokens_start[window] = tokens_charged(row, cold)
    cold.since_ns[window] = row.level_ns + (cold.requests_base[window] | cold.tokens_base[window] != 0)
    cold.filled[window] = 0
    compiler_barrier()
    cold.counted |= <uint8_t> (1 << window)


cdef inline int64_t refund_slots(
    Row* row, ColdRow* cold, int window, bint of_tokens, int64_t slot, int64_t current, int64_t count
) noexcept nogil:
    """Refund `count` to the window's slot, and what it has carried to those that follow; how much was refunded.

    What a slot rounds up ages out with it. It is not taken from the next slot, whose count is of later charges.
    """
    cdef int64_t left = count
    cdef int64_t refunded = 0
    cdef int64_t held, rest, wanted, position
    for _ in range(MOST_CARRIES):
        if left == 0 or slot >= current:
            break
        position = slot % SLOTS
        held = closed_tokens(cold, window, position) if of_tokens else closed_requests(cold, window, position)
        wanted = min(left, held)
        rest = held - wanted
        if kept_in(window, of_tokens, rest) != rest:
            rest = min(kept(rest + (rest >> COUNT_BITS - 3)), held)
        if of_tokens:
            put_slot(cold, window, position, closed_requests(cold, window, position), rest)
        else:
            put_slot(cold, window, position, rest, closed_tokens(cold, window, position))
        refunded += held - rest
        left -= wanted
        slot += 1
    if slot == current:
        if of_tokens:
            wanted = min(left, <int64_t> (tokens_charged(row, cold) - cold.tokens_start[window]))
            cold.tokens_start[window] += <uint64_t> wanted
        else:
            wanted = min(left, <int64_t> (requests_charged(row, cold) - cold.requests_start[window]))
            cold.requests_start[window] += <uint64_t> wanted
        refunded += wanted
    return refunded


cdef inline void begin_trail(Row* row, const ColdRow* cold) noexcept nogil:
    """Note the rooms when the current slot began, for a trail that is empty."""
    row.trail_request_room = row.request_room + requests_in_slot(row, cold)
    row.trail_token_room = row.token_room + tokens_in_slot(row, cold)


cdef inline void refund_window(
    Row* row, ColdRow* cold, int64_t requests, int64_t tokens, int64_t charged_ns
) noexcept nogil:
    """Refund what was charged at `charged_ns` to the slots that were charged, as far as the windows still count them.

    Recomputes the room. Requires advance().
    """
    cdef int64_t slot, current
    cdef int i
    begin_change(row, cold)
    for i in range(WINDOWS):
        slot = slot_at(charged_ns) // slots_per_slot(i)
        current = current_slot(row) // slots_per_slot(i)
        if is_counted(cold, i) and slot >= current - cold.filled[i] and charged_ns >= cold.since_ns[i]:
            cold.requests_base[i] += <uint64_t> refund_slots(row, cold, i, False, slot, current, requests)
            cold.tokens_base[i] += <uint64_t> refund_slots(row, cold, i, True, slot, current, tokens)
    measure_room(row, cold)
    begin_trail(row, cold)


cdef inline void measure_room(Row* row, ColdRow* cold) noexcept nogil:
    """Recompute what the windows still admit. Call it after a base, a limit, concurrency or the queue has changed."""
    cdef uint64_t requests = requests_charged(row, cold)
    cdef uint64_t tokens = tokens_charged(row, cold)
    cdef int64_t request_room = MAX_COUNT
    cdef int64_t token_room = MAX_COUNT
    cdef int64_t room
    cdef int i
    begin_change(row, cold)
    for i in range(WINDOWS):
        if not is_counted(cold, i):
            continue
        room = min(cold.request_limit[i], MAX_COUNT) - <int64_t> (requests - cold.requests_base[i])
        if room < request_room:
            request_room = room
        room = min(cold.token_limit[i], MAX_COUNT) - <int64_t> (tokens - cold.tokens_base[i])
        if room < token_room:
            token_room = room
    if request_room > 0 and (cold.concurrent >= cold.max_concurrent or cold.waiting):
        request_room = 0    # each request is judged by one limit after the other
    # unsigned: while slots are closed the trail lies above the room by what has just left the windows
    row.trail_request_room = <int64_t> (
        <uint64_t> row.trail_request_room + <uint64_t> request_room - <uint64_t> row.request_room
    )
    row.trail_token_room = <int64_t> (
        <uint64_t> row.trail_token_room + <uint64_t> token_room - <uint64_t> row.token_room
    )
    row.request_room = request_room
    row.token_room = token_room
    cold.requests_mark = requests + <uint64_t> request_room
    cold.tokens_mark = tokens + <uint64_t> token_room
    cold.request_floor = cold.token_floor = INT64_MAX
    end_change(cold)


cdef inline void cut_windows(const Row* row, ColdRow* cold) noexcept nogil:
    """Take from the current slot of each window the tokens by which the window is beyond MAX_COUNT."""
    cdef uint64_t beyond
    cdef int window
    for window in range(WINDOWS):
        beyond = tokens_charged(row, cold) - cold.tokens_base[window]   # at most twice MAX_COUNT, which is 2**63
        if is_counted(cold, window) and beyond > <uint64_t> MAX_COUNT:
            beyond -= <uint64_t> MAX_COUNT
            cold.tokens_start[window] += beyond
            cold.tokens_base[window] += beyond


cdef inline void stop_windows(Row* row, ColdRow* cold) noexcept nogil:
    """Have the windows that are beyond MAX_COUNT, by what has just been charged, stay there. Requires advance()."""
    begin_change(row, cold)
    cut_windows(row, cold)
    measure_room(row, cold)
    begin_trail(row, cold)


# -- the trail: slots that have ended, and the windows have not been turned
#
# A batch over many models meets a slot's end in nearly every one of them. What was charged in the slot is noted beside
# the levels, and up to TRAIL slots later the windows are turned through all of them at once: what is counted comes out
# the same, and the colder memory is touched a few times less. Meanwhile the room is as it was, less than it could be: a
# request that does not fit turns the windows first.

cdef inline int64_t trail_slot(const Row* row) noexcept nogil:
    """Number of the 1/60 s slot that the trail has reached, or that the windows are in."""
    return current_slot(row) + (row.trail_slots[row.trail - 1] if row.trail else 0)


cdef inline uint64_t charged_before(const Row* row, int step, uint64_t charged, bint of_tokens) noexcept nogil:
    """What was charged ever when the slot of a step ended, from what has been now."""
    cdef int i
    if step == row.trail:
        return charged
    charged -= (<uint64_t> row.trail_token_room - <uint64_t> row.token_room if of_tokens
                else <uint64_t> row.trail_request_room - <uint64_t> row.request_room)
    for i in range(step + 1, row.trail):
        charged -= row.trail_tokens[i] if of_tokens else row.trail_requests[i]
    return charged


cdef inline int64_t slot_of_step(const Row* row, int step) noexcept nogil:
    """Number of the 1/60 s slot that a step closes."""
    return current_slot(row) + (row.trail_slots[step - 1] if step else 0)


cdef inline void drop_trail(Row* row) noexcept nogil:
    row.trail = 0
    row.trail_request_minimum = row.trail_token_minimum = INT32_MAX


cdef inline int64_t turn_slots(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Move all windows to `now_ns`, or to the end of the trail if that is later; by how many spans of 60 s.

    The current slot has ended.
    """
    cdef uint64_t requests = requests_charged(row, cold)
    cdef uint64_t tokens = tokens_charged(row, cold)
    cdef int64_t before = current_slot(row)
    cdef int64_t after = max(slot_at(now_ns), trail_slot(row))
    cdef int64_t closing, opening, first, steps
    cdef int step, window
    begin_change(row, cold)
    cold.journal_slot = after
    for step in range(row.trail + 1):
        closing = slot_of_step(row, step)
        opening = after if step == row.trail else slot_of_step(row, step + 1)
        for window in range(WINDOWS):
            first = closing // slots_per_slot(window)
            steps = opening // slots_per_slot(window) - first
            if steps == 0:      # a slot of a longer window ends with one of the shorter window
                break
            if is_counted(cold, window):
                roll(cold, window, step, charged_before(row, step, requests, False),
                     charged_before(row, step, tokens, True), first, steps)
    compiler_barrier()
    drop_trail(row)
    compiler_barrier()
    row.slot_end_ns = slot_start_ns(after + 1)
    row.trail_end_ns = row.slot_end_ns
    compiler_barrier()
    measure_room(row, cold)
    begin_trail(row, cold)
    return after // SLOTS_PER_SPAN - before // SLOTS_PER_SPAN


cdef inline int64_t window_wait_ns(
    const Row* row, const ColdRow* cold, int window, bint of_tokens, int64_t cost, int64_t credit, int64_t now_ns
) noexcept nogil:
    """How long until the window admits `cost`: 0 = now, NEVER = no wait helps. Exact, if nothing else is admitted.

    With `credit` it is the shortest wait if that much of what is used is refunded, in whichever slots it was charged.
    """
    cdef int64_t limit = cold.token_limit[window] if of_tokens else cold.request_limit[window]
    cdef int64_t used, per_slot, slot, excess, position, left, here, i
    if cost == 0 or limit == UNLIMITED:
        return 0
    used = (tokens_used(row, cold, window) if of_tokens else requests_used(row, cold, window)) - credit
    if cost <= limit - used:
        return 0
    if cost > limit:
        return NEVER
    excess = used - (limit - cost)
    per_slot = slots_per_slot(window)
    slot = current_slot(row) // per_slot - cold.filled[window]
    position = slot % SLOTS
    for i in range(cold.filled[window]):
        excess -= closed_tokens(cold, window, position) if of_tokens else closed_requests(cold, window, position)
        if excess <= 0:
            break
        slot += 1
        position = 0 if position == SLOTS - 1 else position + 1
    if excess > 0:      # of the current slot, which leaves what it cannot hold to those that follow
        left = <int64_t> (tokens_charged(row, cold) - cold.tokens_start[window] if of_tokens else
                          requests_charged(row, cold) - cold.requests_start[window])
        for i in range(MOST_CARRIES):
            here = kept_in(window, of_tokens, left)
            if excess <= here:
                break
            excess -= here
            left -= here
            slot += 1
    if slot >= slot_at(MAX_TIME_NS) // per_slot - SLOTS:
        return NEVER
    return slot_start_ns((slot + SLOTS + 1) * per_slot) - now_ns
