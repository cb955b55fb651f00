# Shares: one host's part of the limits of a model that many hosts share. Pure arithmetic on one row; time is an
# argument. Every function here that takes a row or a cold row requires the row's lock.
#
# Let U be what this host counts in a window, and S its share. As long as U <= S on every host, and all S together are
# at most the limit, all U together are too, in any interval. So a share is nothing but the limit by which this host
# decides: the row and the cold row have what the share leaves of the configured limits, and these are in the Share. A
# decision reads what it always has.
#
# - A share grows to exactly what was asked for, which others have given up before. It shrinks to what is used at least,
#   but for a host whose use may be more than is left for it: that one's shrinks below.
# - The level of a rate is shared likewise: each host has a part of the drain and a part of the cap, in millionths of a
#   request or token (per second). Of a total of K millionths, k are worth cap * k // K: rounded down, so that parts
#   that add up to K at most are never worth more than the cap. The level counts in a finer unit, to lose little by
#   that.
# - Shares hold until the lease ends. That is found when the windows are turned, at most 1/60 s later, or 1/4 s in a
#   batch: nothing else asks for it. What holds then is up to the lease's rule.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from modelquota._core.atomics cimport add_u32, compiler_barrier, load_i64, load_u32, store_u32
from modelquota._core.layout cimport (
    CLUSTER_CONCURRENCY, COMPONENTS, ColdRow, Lease, Limits, MAX_COUNT, OPEN_GRANTS, REQUEST_CAP, REQUEST_DRAIN, Row,
    SECOND, Share, TOKEN_CAP, TOKEN_DRAIN, UNLIMITED, WINDOWS, Wide
)
from modelquota._core.row.level cimport (
    LEVEL_BITS, NO_RATE, WIDEST_SHIFT, any_cost, as_double, level_cost, load, store, wide
)
from modelquota._core.row.window cimport (
    NOT_KNOWN, is_counted, measure_room, requests_in_slot, requests_used, tokens_in_slot, tokens_used
)

cdef extern from *:
    """
    #include <limits.h>
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <unistd.h>

    static inline void mq_wake_all(uint32_t *word) {
        syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
    """
    void wake_all "mq_wake_all"(uint32_t* word) noexcept nogil

cdef enum:  # Lease.rule, the lowest bits: what holds after the lease's end
    RULE_BITS = 2
    NO_SHARES = 0       # the state's rows have none
    DENY = 1            # nothing is admitted
    EQUAL_PARTS = 2     # the configured limits, divided by the number of hosts
    ALLOW = 3           # the configured limits

cdef enum:
    LIVE = 0            # Share.phase while the lease runs; afterwards it is the lease's rule
    KEEP = -1           # of a share that is asked for: as it is
    NONE_NEEDED = -1    # Share.needed_tokens
    MILLION = 1_000_000
    FINE_BITS = 20      # of a drain: then a part of it that is rounded down loses a millionth of the drain at most


cdef inline Share* share_of(const ColdRow* cold) noexcept nogil:
    """The row's share, which is touched only if the row has one."""
    return <Share*> (<char*> cold + cold.share_offset)


cdef inline Lease* lease_of(const Share* share) noexcept nogil:
    return <Lease*> (<char*> share + share.lease_offset)


cdef inline uint32_t lease_phase(const Lease* lease, int64_t now_ns) noexcept nogil:
    """What holds at `now_ns`: LIVE or, from the lease's end on, its rule."""
    cdef uint32_t rule = load_u32(&lease.rule)
    if rule & ((1 << RULE_BITS) - 1) == NO_SHARES:
        return ALLOW
    return LIVE if now_ns < load_i64(&lease.end_ns) else rule


# -- rates

cdef inline uint8_t refine_rate(int64_t* drain, Wide* cap, uint8_t* shift) noexcept nogil:
    """Have a level count in a finer unit, if its drain has few bits; by how many bits, which may be undone."""
    cdef wide one = 1
    cdef int finer = 0
    if shift[0] == NO_RATE or drain[0] == 0:
        return 0
    while drain[0] << finer < 1 << (FINE_BITS - 1) and shift[0] + finer < WIDEST_SHIFT and (
            load(cap) < one << (LEVEL_BITS - 2 - finer)):
        finer += 1
    drain[0] <<= finer
    store(cap, load(cap) << finer)
    shift[0] += <uint8_t> finer
    return <uint8_t> finer


cdef inline void coarsen_rate(int64_t* drain, Wide* cap, uint8_t* shift, uint8_t finer) noexcept nogil:
    """Undo refine_rate()."""
    drain[0] >>= finer
    store(cap, load(cap) >> finer)
    shift[0] -= finer


# -- rates in millionths

cdef inline int64_t drain_total(int64_t drain, uint8_t shift) noexcept nogil:
    """A drain in millionths per second, rounded up; UNLIMITED without a rate."""
    cdef wide one = 1
    cdef wide total
    if shift == NO_RATE:
        return UNLIMITED
    total = (<wide> drain * MILLION + (one << shift) - 1) >> shift
    return <int64_t> total if total < MAX_COUNT else MAX_COUNT


cdef inline int64_t in_millionths(wide level, uint8_t shift) noexcept nogil:
    """A level or cap in millionths, rounded up."""
    cdef wide one = 1
    level = (level + (one << shift) - 1) >> shift
    level = (level + 999) // 1000       # it is in 10**-9
    return <int64_t> level if level < MAX_COUNT else MAX_COUNT


cdef inline int64_t cap_total(const Wide* cap, uint8_t shift) noexcept nogil:
    """A cap in millionths, rounded up; UNLIMITED without a rate."""
    return UNLIMITED if shift == NO_RATE else in_millionths(load(cap), shift)


cdef inline int64_t part_of_drain(int64_t drain, int64_t part, int64_t total) noexcept nogil:
    """What `part` of `total` millionths is worth, rounded down."""
    return drain if part >= total or total <= 0 else <int64_t> (<wide> drain * part // total)


cdef inline wide part_of_cap(wide cap, int64_t part, int64_t total) noexcept nogil:
    """What `part` of `total` millionths is worth, rounded down."""
    if part >= total or total <= 0:     # of a copy that nothing has judged it may be negative
        return cap
    return cap // total * part + cap % total * part // total


cdef inline int64_t level_used(const Wide* level, const Wide* cap, uint8_t shift) noexcept nogil:
    """The smallest part of the cap that is worth as much as the level; beyond the cap, in millionths."""
    cdef int64_t total, part
    cdef wide now = load(level)
    if shift == NO_RATE:
        return 0
    total = cap_total(cap, shift)
    if now >= load(cap):
        return min(total + in_millionths(now - load(cap), shift), <int64_t> MAX_COUNT)
    part = in_millionths(now, shift)
    for _ in range(3):      # a millionth of the total is worth a little less than one, since that is rounded up
        if part >= total or part_of_cap(load(cap), part, total) >= now:
            return min(part, total)
        part += 1
    return total


# -- what a share leaves of the limits

cdef inline int64_t part_of(int64_t limit, int64_t held, uint32_t phase) noexcept nogil:
    """What holds of one limit."""
    if limit == UNLIMITED or held == UNLIMITED or phase == ALLOW:
        return limit
    if phase == LIVE:
        return min(limit, held)
    if phase & ((1 << RULE_BITS) - 1) == EQUAL_PARTS:
        return limit // max(<int64_t> (phase >> RULE_BITS), <int64_t> 1)
    return limit if phase & ((1 << RULE_BITS) - 1) == ALLOW else 0


cdef inline void leave_rate(
    int64_t drain, const Wide* cap, uint8_t shift, int64_t held_drain, int64_t held_cap, uint32_t phase,
    int64_t* left_drain, Wide* left_cap
) noexcept nogil:
    """What holds of one rate."""
    cdef int64_t total = drain_total(drain, shift)
    cdef uint32_t rule = phase & ((1 << RULE_BITS) - 1)
    left_drain[0] = drain
    left_cap[0] = cap[0]
    if shift == NO_RATE:
        return
    # with nothing admitted, what was admitted before still drains
    left_drain[0] = part_of_drain(drain, part_of(total, held_drain, LIVE if rule == DENY else phase), total)
    total = cap_total(cap, shift)
    store(left_cap, part_of_cap(load(cap), part_of(total, held_cap, phase), total))


cdef inline void leave_limits(
    const Share* share, uint8_t request_shift, uint8_t token_shift, uint32_t phase, Limits* limits
) noexcept nogil:
    """Set those of `limits` that are shared to what the share leaves of them. Requires their `unit`."""
    cdef int i
    for i in range(WINDOWS):
        limits.request_limits[i] = part_of(share.request_limit[i], share.held[i], phase)
        limits.token_limits[i] = part_of(share.token_limit[i], share.held[WINDOWS + i], phase)
    leave_rate(share.request_drain, &share.request_cap, request_shift, share.held[REQUEST_DRAIN],
               share.held[REQUEST_CAP], phase, &limits.request_drain, &limits.request_cap)
    leave_rate(share.token_drain, &share.token_cap, token_shift, share.held[TOKEN_DRAIN], share.held[TOKEN_CAP],
               phase, &limits.token_drain, &limits.token_cap)
    limits.max_concurrent = share.max_concurrent
    if limits.unit & CLUSTER_CONCURRENCY:
        limits.max_concurrent = part_of(share.max_concurrent, share.held[OPEN_GRANTS], phase)


cdef inline void configure_share(Share* share, Limits* limits) noexcept nogil:
    """Set the limits of which it is a share, and have rates in `limits` count in a finer unit.

    What is not limited has no share: if it is limited later, hosts begin with nothing.
    """
    cdef int i
    share.request_finer = refine_rate(&limits.request_drain, &limits.request_cap, &limits.request_shift)
    share.token_finer = refine_rate(&limits.token_drain, &limits.token_cap, &limits.token_shift)
    for i in range(WINDOWS):
        share.request_limit[i] = limits.request_limits[i]
        share.token_limit[i] = limits.token_limits[i]
        if limits.request_limits[i] == UNLIMITED:
            share.held[i] = 0
        if limits.token_limits[i] == UNLIMITED:
            share.held[WINDOWS + i] = 0
    if limits.request_shift == NO_RATE:
        share.held[REQUEST_DRAIN] = share.held[REQUEST_CAP] = 0
    if limits.token_shift == NO_RATE:
        share.held[TOKEN_DRAIN] = share.held[TOKEN_CAP] = 0
    if limits.max_concurrent == UNLIMITED or not limits.unit & CLUSTER_CONCURRENCY:
        share.held[OPEN_GRANTS] = 0
    share.request_cap = limits.request_cap
    share.token_cap = limits.token_cap
    share.request_drain = limits.request_drain
    share.token_drain = limits.token_drain
    share.max_concurrent = limits.max_concurrent
    share.changed = 1


cdef inline double level_percent(const Wide* cap, uint8_t shift) noexcept nogil:
    """Percent of a level's cap that one of its units is; 0 without a rate.

    The cap counts as 1 request or token at least: only a share of it may be less.
    """
    cdef Wide least
    if shift == NO_RATE:
        return 0.0
    store(&least, level_cost(1, shift))
    return 100.0 / as_double(cap if load(cap) > load(&least) else &least)


cdef inline void apply_share(Row* row, ColdRow* cold, uint32_t phase) noexcept nogil:
    """Have the row decide by its share. Done again, it comes out the same: after a death it is done again."""
    cdef Share* share = share_of(cold)
    cdef Limits limits
    cdef int i
    limits.unit = cold.unit
    leave_limits(share, row.request_shift, row.token_shift, phase, &limits)
    for i in range(WINDOWS):
        cold.request_limit[i] = limits.request_limits[i]
        cold.token_limit[i] = limits.token_limits[i]
    if row.request_shift != NO_RATE:    # otherwise those of a dormant level stay
        row.request_drain = limits.request_drain
        row.request_cap = limits.request_cap
    if row.token_shift != NO_RATE:
        row.token_drain = limits.token_drain
        row.token_cap = limits.token_cap
    cold.request_level_percent = level_percent(&row.request_cap, row.request_shift)
    cold.token_level_percent = level_percent(&row.token_cap, row.token_shift)
    cold.max_concurrent = limits.max_concurrent
    cold.held_percent = NOT_KNOWN
    share.phase = phase
    measure_room(row, cold)


cdef inline void begin_share(Row* row, const ColdRow* cold, Lease* lease) noexcept nogil:
    """Give the row a share: nothing of anything. The caller sets its limits next."""
    cdef Share* share = share_of(cold)
    cdef int i
    for i in range(COMPONENTS):
        share.held[i] = 0
    share.lease_offset = <char*> lease - <char*> share
    share.starved = 0
    share.peak_requests = share.peak_tokens = 0
    share.needed_tokens = NONE_NEEDED
    share.phase = LIVE
    share.changed = 1
    share.called = 0
    compiler_barrier()
    row.has_share = 1
    compiler_barrier()


cdef inline void put_used(const Row* row, const ColdRow* cold, int64_t* used) noexcept nogil:
    """Set what is used of each component. Requires advance()."""
    cdef const Share* share = share_of(cold)
    cdef int i
    for i in range(WINDOWS):
        used[i] = requests_used(row, cold, i) if is_counted(cold, i) else 0
        used[WINDOWS + i] = tokens_used(row, cold, i) if is_counted(cold, i) else 0
    used[REQUEST_DRAIN] = used[TOKEN_DRAIN] = 0
    used[REQUEST_CAP] = level_used(&row.request_level, &share.request_cap, row.request_shift)
    used[TOKEN_CAP] = level_used(&row.token_level, &share.token_cap, row.token_shift)
    used[OPEN_GRANTS] = cold.concurrent


cdef inline void put_totals(const Row* row, const ColdRow* cold, int64_t* totals) noexcept nogil:
    """Set what is configured of each component; UNLIMITED = no limit, or none that is shared."""
    cdef const Share* share = share_of(cold)
    cdef int i
    for i in range(WINDOWS):
        totals[i] = share.request_limit[i]
        totals[WINDOWS + i] = share.token_limit[i]
    totals[REQUEST_DRAIN] = drain_total(share.request_drain, row.request_shift)
    totals[TOKEN_DRAIN] = drain_total(share.token_drain, row.token_shift)
    totals[REQUEST_CAP] = cap_total(&share.request_cap, row.request_shift)
    totals[TOKEN_CAP] = cap_total(&share.token_cap, row.token_shift)
    totals[OPEN_GRANTS] = share.max_concurrent if cold.unit & CLUSTER_CONCURRENCY else UNLIMITED


cdef inline bint adjust_share(
    Row* row, ColdRow* cold, const int64_t* asked, const int64_t* used, bint below_used, uint32_t phase
) noexcept nogil:
    """Change the share to what is asked for; returns whether a component has grown.

    It never becomes less than what is used, unless `below_used` is set. Then the row admits nothing until its use has
    aged out to below its share, and the caller has to count what is used.

    A process that dies in between has changed some components, each of them completely.
    """
    cdef Share* share = share_of(cold)
    cdef int64_t before, wanted
    cdef bint grown = False
    cdef int i
    for i in range(COMPONENTS):
        before = share.held[i]
        wanted = asked[i]
        if wanted == KEEP:
            continue
        if wanted < before and not below_used:  # what is charged past the limits may be more than the share
            wanted = max(wanted, min(used[i], before))
        grown = grown or wanted > before
        share.held[i] = wanted
    apply_share(row, cold, phase)
    return grown


# -- while it is used

cdef inline void call_for_exchange(Share* share) noexcept nogil:
    """Have shares exchanged soon, instead of at the usual time: once until then."""
    cdef Lease* lease = lease_of(share)
    share.changed = 1
    if share.called:
        return
    share.called = 1
    add_u32(&lease.urgent, 1)
    if load_u32(&lease.sleepers):
        store_u32(&lease.sleepers, 0)
        wake_all(&lease.urgent)


cdef inline bint is_low(int64_t left, int64_t recent) noexcept nogil:
    """Whether what is left lasts for less than half a second, at the rate of the last second."""
    return left < (recent + 1) // 2


cdef inline bint is_level_low(
    const Wide* level, const Wide* cap, const Wide* whole, uint8_t shift, int64_t recent
) noexcept nogil:
    """Whether what a share of a rate still admits at once lasts for less than half a second."""
    return shift != NO_RATE and load(cap) < load(whole) and (
        load(cap) - load(level) < any_cost(recent, shift) // 2)


cdef inline bint runs_low(const Row* row, const ColdRow* cold, const Share* share) noexcept nogil:
    """Whether little is left of a share of any component that is not the whole limit."""
    cdef int64_t requests = requests_used(row, cold, SECOND)
    cdef int64_t tokens = tokens_used(row, cold, SECOND)
    cdef int64_t held
    cdef int i
    for i in range(WINDOWS):
        if not is_counted(cold, i):
            continue
        held = share.held[i]
        if held < share.request_limit[i] != UNLIMITED and is_low(held - requests_used(row, cold, i), requests):
            return True
        held = share.held[WINDOWS + i]
        if held < share.token_limit[i] != UNLIMITED and is_low(held - tokens_used(row, cold, i), tokens):
            return True
    held = share.held[OPEN_GRANTS]
    if cold.unit & CLUSTER_CONCURRENCY and held < share.max_concurrent != UNLIMITED and (
            is_low(held - cold.concurrent, requests)):
        return True
    return is_level_low(&row.request_level, &row.request_cap, &share.request_cap, row.request_shift, requests) or (
        is_level_low(&row.token_level, &row.token_cap, &share.token_cap, row.token_shift, tokens))


cdef inline void follow_lease(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Before the windows turn: note what was charged since they last did, and see whether the lease has ended or begun.
    """
    cdef Share* share = share_of(cold)
    cdef int64_t requests = requests_in_slot(row, cold)
    cdef int64_t tokens = tokens_in_slot(row, cold)
    cdef uint32_t phase = lease_phase(lease_of(share), now_ns)
    if requests | tokens:
        share.peak_requests = max(share.peak_requests, requests)
        share.peak_tokens = max(share.peak_tokens, tokens)
        share.changed = 1
        if phase == LIVE and not share.called and runs_low(row, cold, share):
            call_for_exchange(share)
    if phase != share.phase:
        apply_share(row, cold, phase)


cdef inline bint is_lacking(
    const Row* row, const ColdRow* cold, int window, bint of_tokens, int64_t cost, bint* possible
) noexcept nogil:
    """Whether a cost that the share of one limit denies, level included, would fit if the share were the whole limit.

    Sets `possible` to whether it would if nothing were used.
    """
    cdef const Share* share = share_of(cold)
    cdef int64_t limit = share.token_limit[window] if of_tokens else share.request_limit[window]
    cdef const Wide* level = &row.token_level if of_tokens else &row.request_level
    cdef const Wide* cap = &share.token_cap if of_tokens else &share.request_cap
    cdef uint8_t shift = row.token_shift if of_tokens else row.request_shift
    cdef int64_t used = 0
    if is_counted(cold, window):
        used = tokens_used(row, cold, window) if of_tokens else requests_used(row, cold, window)
    possible[0] = cost <= limit
    if window == SECOND and shift != NO_RATE:
        possible[0] = possible[0] and any_cost(cost, shift) <= load(cap)
        if load(level) + any_cost(cost, shift) > load(cap):
            return False
    return cost <= limit - used


cdef inline bint lacks_share(const Row* row, const ColdRow* cold, int64_t tokens) noexcept nogil:
    """Whether the share of some limit has no room for a request, and the whole limit has."""
    cdef bint possible
    cdef int window
    if cold.max_concurrent <= cold.concurrent < share_of(cold).max_concurrent:
        return True
    for window in range(WINDOWS):
        if is_counted(cold, window) and (
                (1 > cold.request_limit[window] - requests_used(row, cold, window)
                 and is_lacking(row, cold, window, False, 1, &possible))
                or (tokens > cold.token_limit[window] - tokens_used(row, cold, window) and tokens
                    and is_lacking(row, cold, window, True, tokens, &possible))):
            return True
    if row.request_shift != NO_RATE and (
            load(&row.request_level) + any_cost(1, row.request_shift) > load(&row.request_cap)
            and is_lacking(row, cold, SECOND, False, 1, &possible)):
        return True
    return row.token_shift != NO_RATE and tokens != 0 and (
        load(&row.token_level) + any_cost(tokens, row.token_shift) > load(&row.token_cap)
        and is_lacking(row, cold, SECOND, True, tokens, &possible))


cdef inline void note_need(const ColdRow* cold, int64_t tokens) noexcept nogil:
    """Note a request that was denied for lack of share, and call for an exchange."""
    cdef Share* share = share_of(cold)
    share.needed_tokens = max(share.needed_tokens, tokens)
    call_for_exchange(share)
