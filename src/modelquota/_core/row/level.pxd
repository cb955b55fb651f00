# The long-run rate: a level that drains at `drain` units per ns and rises by what is admitted (a leaky bucket as a
# meter, ITU-T I.371). Pure arithmetic on one row. Every function here that takes a row, or a level or cap of one,
# requires the row's lock.
#
# It is exact: a rate is a double, that is an integer over 2**shift, so in units of 1 / (10**9 * 2**shift) of a request
# or token the drain per ns is a whole number, and nothing is ever rounded. Every level fits in 128 bits. (If rate and
# burst are so far apart that they would not fit, encode_rate rounds the drain down: never more than the rate is
# admitted.)
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t
from modelquota._core.layout cimport MAX_COUNT, Row, Wide
from modelquota._core.row.window cimport NEVER

cdef extern from *:
    """
    typedef __int128 mq_wide;
    #define MQ_LEVEL_BITS 125
    #define MQ_LEVEL_MAX ((mq_wide)1 << MQ_LEVEL_BITS)
    """
    ctypedef long long wide "mq_wide"
    # the highest level: 100,000 years of draining or more; charges raise it no further
    const wide LEVEL_MAX "MQ_LEVEL_MAX"
    const int LEVEL_BITS "MQ_LEVEL_BITS"

cdef enum:
    NS_PER_SECOND = 1_000_000_000
    SLOT_NS = 16_666_667    # 1/60 s
    COARSE_BITS = 30
    WIDEST_SHIFT = 95       # with it, one request or token still is below LEVEL_MAX: 30 bits are 10**9
    # the shift of a rate that is not set: its level stays 0 (a rate of 0 has a level, which never drains)
    NO_RATE = 255


cdef inline wide load(const Wide* stored) noexcept nogil:
    return (<wide> stored.high << 64) | <wide> stored.low


cdef inline void store(Wide* stored, wide value) noexcept nogil:
    stored.low = <uint64_t> value
    stored.high = <uint64_t> (value >> 64)


cdef inline double as_double(const Wide* stored) noexcept nogil:
    if stored.high | stored.low >> 63 == 0:    # a signed conversion is one instruction, an unsigned one is several
        return <double> <int64_t> stored.low
    return <double> stored.high * 18446744073709551616.0 + <double> stored.low


cdef inline wide level_cost(int64_t count, uint8_t shift) noexcept nogil:
    """`count` requests or tokens in the level's units; 0 if no rate is set.

    Requires a `count` within the window's limit.
    """
    if shift == NO_RATE:
        return 0
    return (<wide> count * <wide> NS_PER_SECOND) << shift


cdef inline void drain_level(Wide* level, int64_t drain, int64_t elapsed_ns) noexcept nogil:
    cdef wide left = load(level) - <wide> drain * <wide> elapsed_ns
    store(level, left if left > 0 else <wide> 0)


cdef inline void drain_levels(Row* row, int64_t now_ns) noexcept nogil:
    """Advance both levels to `now_ns`. An earlier time than the row's own changes nothing."""
    cdef int64_t elapsed_ns = now_ns - row.level_ns
    if elapsed_ns <= 0:
        return
    row.level_ns = now_ns
    drain_level(&row.request_level, row.request_drain, elapsed_ns)
    drain_level(&row.token_level, row.token_drain, elapsed_ns)


cdef inline wide any_cost(int64_t count, uint8_t shift) noexcept nogil:
    """level_cost() of a count of any size, at most LEVEL_MAX."""
    # the first test saves the second one, a division: 30 + 30 + 63 bits are below LEVEL_MAX
    if (count >> 30 or shift > 63) and shift != NO_RATE and <wide> count > (LEVEL_MAX >> shift) // NS_PER_SECOND:
        return LEVEL_MAX
    return level_cost(count, shift)


cdef inline int64_t raise_level(Wide* level, int64_t count, uint8_t shift, const Wide* cap, bint capped) noexcept nogil:
    """Charge a count of any size, up to the cap if `capped`, otherwise up to LEVEL_MAX.

    Returns how much of it was charged, rounded down.
    """
    cdef wide before = load(level)
    cdef wide after
    cdef wide most = LEVEL_MAX
    if shift == NO_RATE:
        return count
    after = before + any_cost(count, shift)
    if capped:
        most = load(cap) if load(cap) > before else before
    if after <= most:
        store(level, after)
        return count
    store(level, most)
    return <int64_t> (((most - before) >> shift) // NS_PER_SECOND)


cdef inline void rescale(Wide* level, uint8_t old_shift, uint8_t shift) noexcept nogil:
    """Convert a level to another rate's unit: the same count, rounded up."""
    cdef wide now = load(level)
    cdef wide one = 1
    if old_shift == NO_RATE or shift == NO_RATE:
        now = 0
    elif shift >= old_shift:
        now = LEVEL_MAX if now > (LEVEL_MAX >> (shift - old_shift)) else now << (shift - old_shift)
    else:
        now = (now + (one << (old_shift - shift)) - 1) >> (old_shift - shift)
    store(level, now)


# A rate that is set to None leaves a dormant level: it drains as before, rises at the end of each slot by what was
# admitted in the slot, never above its cap, and is the level of the next rate that is set. So a change to None and back
# refills nothing.

cdef inline bint is_dormant(const Row* row) noexcept nogil:
    return row.dormant_request_shift != NO_RATE or row.dormant_token_shift != NO_RATE


cdef inline void change_rate(
    Wide* level, Wide* cap, int64_t* drain, uint8_t* shift, uint8_t* dormant_shift, const Wide* new_cap,
    int64_t new_drain, uint8_t new_shift, int64_t in_slot
) noexcept nogil:
    """Replace a rate, and keep the content of its level, dormant or not.

    `in_slot` is what was admitted in the current slot: a level that becomes dormant is lowered by it, since it is
    charged again when the slot ends.
    """
    cdef wide lower
    if new_shift != NO_RATE:
        if shift[0] == NO_RATE:
            raise_level(level, in_slot, dormant_shift[0], cap, True)
        rescale(level, shift[0] if shift[0] != NO_RATE else dormant_shift[0], new_shift)
        drain[0] = new_drain
        cap[0] = new_cap[0]
        dormant_shift[0] = NO_RATE
    elif shift[0] != NO_RATE:
        dormant_shift[0] = shift[0]
        if load(level) <= load(cap):    # a level above its cap is not raised when the slot ends
            lower = load(level) - any_cost(in_slot, shift[0])
            store(level, lower if lower > 0 else <wide> 0)
    shift[0] = new_shift


# Refunds. If a charge had never been made, the level would now be lower by the part of it that has not drained unused:
# by the charge, or by the lowest level since then, whichever is less (Lindley's recursion for a queue). A lower bound
# of the lowest level is kept for the current 60 s slot and for the one before. Of an older charge only the part that
# cannot have drained yet is refunded. So a level never refunds too much, and refunds all of a charge while the model is
# busy.

cdef inline int64_t coarse_level(const Wide* level, uint8_t shift) noexcept nogil:
    """A level without its lowest COARSE_BITS bits, in 64 bits; rounded down."""
    cdef wide value
    if shift == NO_RATE:
        return 0
    value = load(level) >> (COARSE_BITS + shift)
    return <int64_t> value if value < INT64_MAX else INT64_MAX


cdef inline void update_minimum(int64_t* low, int64_t level, int64_t steps) noexcept nogil:
    """Update the lowest levels with the level at the start of a slot.

    `steps` 60 s slots have ended since the last call.
    """
    if steps == 0:
        low[0] = min(low[0], level)
        return
    low[1] = low[0] if steps == 1 else level
    low[0] = level


cdef inline void lower_level(
    Wide* level, int64_t* low, int64_t drain, uint8_t shift, int64_t count, int64_t charged, int64_t elapsed_ns,
    int64_t steps
) noexcept nogil:
    """Refund `count` of `charged`, charged `elapsed_ns` and `steps` 60 s slots ago, as far as the level allows."""
    cdef wide bound, lowest, taken
    cdef int64_t fewer
    if shift == NO_RATE or count == 0:
        return
    bound = any_cost(charged, shift) - <wide> drain * <wide> elapsed_ns
    if steps <= 1:
        lowest = low[0] if steps == 0 else min(low[0], low[1])
        lowest = (lowest << (COARSE_BITS + shift)) - <wide> drain * SLOT_NS     # the level is noted once a slot
        bound = bound if bound > lowest else lowest
    taken = any_cost(count, shift)
    taken = taken if taken < bound else bound
    taken = taken if taken < load(level) else load(level)
    if taken <= 0:
        return
    store(level, load(level) - taken)
    fewer = <int64_t> min(taken >> (COARSE_BITS + shift), <wide> INT64_MAX - 1) + 1
    low[0] = max(low[0] - fewer, 0)
    low[1] = max(low[1] - fewer, 0)


cdef inline int64_t level_wait_ns(
    const Wide* level, const Wide* cap, int64_t drain, uint8_t shift, int64_t cost, int64_t credit
) noexcept nogil:
    """How long until the level admits `cost`: 0 = now, NEVER = no wait helps. With `credit` as for window_wait_ns()."""
    cdef wide excess, needed, wait
    if cost == 0 or shift == NO_RATE:
        return 0
    if <wide> cost > (load(cap) >> shift) // NS_PER_SECOND:
        return NEVER
    needed = level_cost(cost, shift)
    excess = load(level) + needed - load(cap)
    if credit:
        excess -= any_cost(credit, shift)
    if excess <= 0:
        return 0
    if drain == 0:
        return NEVER
    wait = (excess + drain - 1) // drain
    return <int64_t> wait if wait <= MAX_COUNT else NEVER


cdef inline bint empty_burst(Wide* level, int64_t* low, int64_t drain, uint8_t shift) noexcept nogil:
    """Lower a level to max(rate, 1), at which no burst is in use; returns whether it was higher.

    Without a rate there is no burst: a level that is dormant stays as it is.
    """
    cdef wide base = <wide> drain * <wide> NS_PER_SECOND
    cdef wide one = level_cost(1, shift)
    if shift == NO_RATE:
        return False
    if base < one:
        base = one
    if load(level) <= base:
        return False
    store(level, base)
    update_minimum(low, coarse_level(level, shift), 0)
    return True


cdef inline int64_t burst_used(const Wide* level, int64_t drain, uint8_t shift) noexcept nogil:
    """max(0, ceil(level - max(rate, 1)))."""
    cdef wide unit, above
    if shift == NO_RATE:
        return 0
    unit = <wide> NS_PER_SECOND << shift
    above = <wide> drain * <wide> NS_PER_SECOND
    if above < unit:
        above = unit
    above = load(level) - above
    if above <= 0:
        return 0
    above = (above + unit - 1) // unit
    return <int64_t> above if above <= MAX_COUNT else MAX_COUNT
