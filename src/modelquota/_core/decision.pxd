# The decision: may this request pass now? Compute, decide, commit, on one row whose lock is held. Time is an argument.
#
# decide() is the only place where a request is admitted or denied. What admits is short: a window's room and a level say
# "fits" with one comparison each. Only where something does not fit, judge() goes through the limits in their order and
# finds the first that is violated and the longest wait. A denial changes no window and no level.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from modelquota._core.layout cimport DAY, HOUR, Ledger, MAX_COUNT, Row, SECOND, UNLIMITED, Wide, WINDOWS
from modelquota._core.level cimport (
    NO_RATE, NS_PER_SECOND, as_double, coarse, drain_levels, level_cost, level_wait_ns, load, note_low, raise_level, store,
    wide
)
from modelquota._core.window cimport NEVER, requests_used, tokens_used, turn_slots, window_wait_ns

cdef enum:  # Limit codes, in the order in which limits are judged; 0 = admitted
    RAM_MB = 1
    SSD_MB = 2
    CONCURRENCY = 3
    REQUESTS_PER_SECOND = 4
    TOKENS_PER_SECOND = 5
    TOKENS_PER_HOUR = 6
    REQUESTS_PER_HOUR = 7
    TOKENS_PER_DAY = 8
    REQUESTS_PER_DAY = 9
    QUEUE_PLACE = 10

cdef enum:  # indices of Row.violations
    RAM_VIOLATION = 0
    SSD_VIOLATION = 1
    RATE_VIOLATION = 2
    QUOTA_VIOLATION = 3
    CONCURRENCY_VIOLATION = 4

cdef enum:  # ViolationAction codes
    REJECT = 0
    THROTTLE = 1
    WARN = 2
    QUEUE = 3
    NO_ACTION = -1

cdef enum:
    NS_PER_MS = 1_000_000

cdef extern from *:
    """
    #define MQ_LAST_TICKET INT64_MAX
    #define MQ_LOWEST_PRIORITY INT32_MIN
    """
    const int64_t LAST_TICKET "MQ_LAST_TICKET"          # of a request that does not stand in line
    const int32_t LOWEST_PRIORITY "MQ_LOWEST_PRIORITY"  # of a request that does not wait: it overtakes nobody


cdef struct Ask:
    int64_t tokens      # 0 .. MAX_COUNT, as are the others
    int64_t ram_mb
    int64_t ssd_mb
    int64_t ticket      # its place in a line, or LAST_TICKET
    int32_t priority
    const Ledger* counted   # of the model where its violation has been counted, or NULL
    uint32_t counted_generation


cdef struct Levels:
    # Where admission takes the two levels.
    wide request
    wide token


cdef struct Verdict:
    bint allowed
    uint32_t log_held        # violations that a log record is to be written for now, 0 = none
    uint8_t limit            # the first violated limit, 0 = none
    uint8_t cause            # for QUEUE_PLACE: the limit that the head of the line waits for
    int action               # the one that was applied, or NO_ACTION
    int64_t wait_ns          # the longest wait of all violated limits, or NEVER; meaningful where limit is set
    int64_t retry_after_ms   # the same, rounded up
    int64_t own_wait_ns      # the same, of the named model alone; set by decide_jointly
    int64_t patience_ns      # the same without memory, concurrency and the line, which others may free any moment
    bint held_up             # one of those is in the way
    double usage             # percent of the violated limit without the request
    double used              # of the violated limit
    double bound
    int64_t asked


cdef inline double percent(double used, double limit) noexcept nogil:
    """Share of a limit in use. A limit of 0 is reckoned as 1, so that the figure stays finite."""
    return 100.0 * used / (limit if limit > 1.0 else 1.0)


cdef inline uint64_t in_use(int64_t reported, int64_t reserved) noexcept nogil:
    """Memory that counts against a cap: twice MAX_COUNT is one more than an int64 holds."""
    return <uint64_t> reported + <uint64_t> reserved


cdef inline double neat(double value) noexcept nogil:
    """Round to 50 bits (Veltkamp): the last bits of a product with a stored quotient go, so that 7 of 7 reads 100.0."""
    cdef double scaled = 9.0 * value
    return scaled - (scaled - value)


cdef inline bint exceeds(int64_t asked, uint64_t used, int64_t cap) noexcept nogil:
    """Whether memory asked for does not fit under a cap; asking for nothing always fits."""
    return asked != 0 and cap != UNLIMITED and <uint64_t> asked + used > <uint64_t> cap


cdef inline double larger(double a, double b) noexcept nogil:
    return a if a > b else b


cdef inline double total(int64_t reported, int64_t reserved, int64_t asked) noexcept nogil:
    return <double> reported + <double> reserved + <double> asked


cdef inline double highest_usage(const Row* row, const Ledger* ledger, const Ask* ask) noexcept nogil:
    """Percent of the fullest limit, with the request: windows and levels are charged, memory and concurrency are not.

    Products with stored percents instead of quotients, and nothing to branch on: this stands in every check.
    """
    cdef double share = as_double(&row.request_level) * ledger.request_level_percent
    cdef int i
    share = larger(share, as_double(&row.token_level) * ledger.token_level_percent)
    for i in range(WINDOWS):
        share = larger(share, <double> requests_used(row, ledger, i) * ledger.request_percent[i])
        share = larger(share, <double> tokens_used(row, ledger, i) * ledger.token_percent[i])
    share = larger(share, total(ledger.ram_mb, ledger.reserved_ram_mb, ask.ram_mb) * ledger.ram_percent)
    share = larger(share, total(ledger.ssd_mb, ledger.reserved_ssd_mb, ask.ssd_mb) * ledger.ssd_percent)
    share = larger(share, (<double> ledger.concurrent + 1.0) * ledger.concurrent_percent)
    return neat(share)


cdef inline void pass_time(Row* row, Ledger* ledger, int64_t now_ns) noexcept nogil:
    """Bring the row to `now_ns`; a time before the row's own changes nothing."""
    cdef int64_t steps
    drain_levels(row, now_ns)
    if row.level_ns >= row.slot_end_ns:
        steps = turn_slots(row, ledger, row.level_ns)
        note_low(ledger.request_low, coarse(&row.request_level, row.request_shift), steps)
        note_low(ledger.token_low, coarse(&row.token_level, row.token_shift), steps)


cdef inline int64_t charge_tokens(Row* row, const Ledger* ledger, int64_t tokens) noexcept nogil:
    """Charge without asking, and return what was: a counter that has reached MAX_COUNT stays there."""
    cdef int64_t left = MAX_COUNT - tokens_used(row, ledger, DAY)
    cdef int64_t charged = tokens if tokens < left else left
    row.token_room -= charged
    raise_level(&row.token_level, charged, row.token_shift)
    return charged


cdef inline int64_t charge(Row* row, const Ledger* ledger, const Ask* ask) noexcept nogil:
    """Charge one request without asking; the tokens that were charged."""
    row.request_room -= 1
    raise_level(&row.request_level, 1, row.request_shift)
    return charge_tokens(row, ledger, ask.tokens)


cdef inline bint note(
    Verdict* verdict, uint8_t limit, int64_t wait_ns, double used, double bound, int64_t asked
) noexcept nogil:
    """Take down one limit's answer: the first violated limit is described, the longest wait is kept."""
    cdef bint freed_by_others = limit <= CONCURRENCY and asked <= bound
    if wait_ns == 0:
        return False
    if wait_ns == NEVER or verdict.wait_ns == NEVER:
        verdict.wait_ns = NEVER
    elif wait_ns > verdict.wait_ns:
        verdict.wait_ns = wait_ns
    if freed_by_others:
        verdict.held_up = True
    elif wait_ns == NEVER or verdict.patience_ns == NEVER:
        verdict.patience_ns = NEVER
    elif wait_ns > verdict.patience_ns:
        verdict.patience_ns = wait_ns
    if verdict.limit == 0:
        verdict.limit = limit
        verdict.used = used
        verdict.bound = bound
        verdict.asked = asked
        verdict.usage = percent(used, bound)
    return True


cdef inline void note_rate(
    const Row* row, const Ledger* ledger, bint of_tokens, int64_t cost, Verdict* verdict
) noexcept nogil:
    """A rate is two limits in one: the ceiling of the rolling second and the long-run level. The fuller is described."""
    cdef int64_t ceiling_ns = window_wait_ns(row, ledger, SECOND, of_tokens, cost, row.level_ns)
    cdef const Wide* level = &row.token_level if of_tokens else &row.request_level
    cdef const Wide* cap = &row.token_cap if of_tokens else &row.request_cap
    cdef int64_t drain = row.token_drain if of_tokens else row.request_drain
    cdef uint8_t shift = row.token_shift if of_tokens else row.request_shift
    cdef uint8_t code = TOKENS_PER_SECOND if of_tokens else REQUESTS_PER_SECOND
    cdef int64_t level_ns = level_wait_ns(level, cap, drain, shift, cost)
    cdef int64_t wait_ns
    cdef double used, bound, level_used, level_bound, unit
    if ceiling_ns == 0 and level_ns == 0:
        return
    wait_ns = NEVER if ceiling_ns == NEVER or level_ns == NEVER else max(ceiling_ns, level_ns)
    used = <double> (tokens_used(row, ledger, SECOND) if of_tokens else requests_used(row, ledger, SECOND))
    bound = <double> (ledger.token_limit[SECOND] if of_tokens else ledger.request_limit[SECOND])
    if shift != NO_RATE:
        unit = as_double(cap) / (
            (ledger.tokens_per_second if ledger.tokens_per_second > 1.0 else 1.0) + <double> ledger.burst_tokens if of_tokens else
            (ledger.requests_per_second if ledger.requests_per_second > 1.0 else 1.0) + <double> ledger.burst_requests)
        level_used = as_double(level) / unit
        level_bound = as_double(cap) / unit
        if percent(level_used, level_bound) > percent(used, bound):
            used = level_used
            bound = level_bound
    note(verdict, code, wait_ns, used, bound, cost)


cdef inline void note_window(
    const Row* row, const Ledger* ledger, int window, bint of_tokens, int64_t cost, uint8_t code, Verdict* verdict
) noexcept nogil:
    cdef int64_t wait_ns = window_wait_ns(row, ledger, window, of_tokens, cost, row.level_ns)
    if wait_ns == 0:
        return
    if of_tokens:
        note(verdict, code, wait_ns, <double> tokens_used(row, ledger, window), <double> ledger.token_limit[window], cost)
    else:
        note(verdict, code, wait_ns, <double> requests_used(row, ledger, window), <double> ledger.request_limit[window],
             cost)


cdef inline uint8_t violation_of(uint8_t limit) noexcept nogil:
    """Index into Ledger.violations of a Limit code."""
    if limit == RAM_MB:
        return RAM_VIOLATION
    if limit == SSD_MB:
        return SSD_VIOLATION
    if limit == CONCURRENCY:
        return CONCURRENCY_VIOLATION
    return RATE_VIOLATION if limit <= TOKENS_PER_SECOND else QUOTA_VIOLATION


cdef inline bint stands_behind(const Ledger* ledger, const Ask* ask) noexcept nogil:
    """Whether others wait for this model whose turn comes first."""
    return (
        ledger.waiting != 0 and ledger.action == QUEUE
        and (ledger.head_priority > ask.priority
             or (ledger.head_priority == ask.priority and ledger.head_ticket < ask.ticket))
    )


cdef inline void find_violations(const Row* row, const Ledger* ledger, const Ask* ask, Verdict* verdict) noexcept nogil:
    """Go through all limits in their order; state the first that is violated and the longest wait of all that are.

    Who stands behind others is told to wait for them, whatever else is in the way.
    """
    cdef uint64_t used_ram_mb = in_use(ledger.ram_mb, ledger.reserved_ram_mb)
    cdef uint64_t used_ssd_mb = in_use(ledger.ssd_mb, ledger.reserved_ssd_mb)
    verdict.wait_ns = verdict.patience_ns = 0
    if exceeds(ask.ram_mb, used_ram_mb, ledger.max_ram_mb):
        note(verdict, RAM_MB, NEVER, <double> used_ram_mb, <double> ledger.max_ram_mb, ask.ram_mb)
    if exceeds(ask.ssd_mb, used_ssd_mb, ledger.max_ssd_mb):
        note(verdict, SSD_MB, NEVER, <double> used_ssd_mb, <double> ledger.max_ssd_mb, ask.ssd_mb)
    if ledger.concurrent >= ledger.max_concurrent:
        note(verdict, CONCURRENCY, NEVER, <double> ledger.concurrent, <double> ledger.max_concurrent, 1)
    note_rate(row, ledger, False, 1, verdict)
    note_rate(row, ledger, True, ask.tokens, verdict)
    note_window(row, ledger, HOUR, True, ask.tokens, TOKENS_PER_HOUR, verdict)
    note_window(row, ledger, HOUR, False, 1, REQUESTS_PER_HOUR, verdict)
    note_window(row, ledger, DAY, True, ask.tokens, TOKENS_PER_DAY, verdict)
    note_window(row, ledger, DAY, False, 1, REQUESTS_PER_DAY, verdict)
    if stands_behind(ledger, ask):
        verdict.held_up = True
        verdict.limit = QUEUE_PLACE
        verdict.cause = ledger.head_limit
        verdict.used = <double> ledger.waiting
        verdict.bound = <double> ledger.max_queued
        verdict.asked = 1
        verdict.usage = percent(verdict.used, verdict.bound)
        verdict.wait_ns = NEVER if ledger.head_ready_ns == NEVER else max(ledger.head_ready_ns - row.level_ns, 1)
    verdict.retry_after_ms = NEVER if verdict.wait_ns == NEVER else (verdict.wait_ns + NS_PER_MS - 1) // NS_PER_MS


cdef inline void start_verdict(Verdict* verdict) noexcept nogil:
    """Admitted, unless something speaks against it."""
    verdict.allowed = True
    verdict.log_held = 0
    verdict.limit = 0
    verdict.action = NO_ACTION
    verdict.retry_after_ms = NEVER


cdef inline bint fits(const Row* row, const Ledger* ledger, const Ask* ask, Levels* levels) noexcept nogil:
    """Whether the request plainly fits, and to where it takes the levels. Time has passed for the row."""
    if not (
        row.request_room >= 1
        and (ask.tokens <= row.token_room or ask.tokens == 0)
        and not exceeds(ask.ram_mb, in_use(ledger.ram_mb, ledger.reserved_ram_mb), ledger.max_ram_mb)
        and not exceeds(ask.ssd_mb, in_use(ledger.ssd_mb, ledger.reserved_ssd_mb), ledger.max_ssd_mb)
    ):
        return False
    levels.request = load(&row.request_level) + level_cost(1, row.request_shift)
    levels.token = load(&row.token_level) + level_cost(ask.tokens, row.token_shift)
    return levels.request <= load(&row.request_cap) and (ask.tokens == 0 or levels.token <= load(&row.token_cap))


cdef inline void commit(Row* row, const Ask* ask, const Levels* levels) noexcept nogil:
    """Charge what fits."""
    row.request_room -= 1
    row.token_room -= ask.tokens
    store(&row.request_level, levels.request)
    store(&row.token_level, levels.token)


cdef inline void judge(Row* row, Ledger* ledger, const Ask* ask, bint enforcing, Verdict* verdict) noexcept nogil:
    """Decide what does not plainly fit. Nothing is counted."""
    if not enforcing:
        return
    verdict.held_up = False
    find_violations(row, ledger, ask, verdict)
    if verdict.limit == 0:      # no limit: a counter at MAX_COUNT, or others in a line that does not bind this request
        verdict.retry_after_ms = NEVER
        return
    verdict.action = ledger.action
    verdict.allowed = ledger.action == WARN


cdef inline void count_violation(Row* row, Ledger* ledger, Verdict* verdict) noexcept nogil:
    """Count a violation under the action that it met, and say whether it is to be logged."""
    cdef uint32_t second = <uint32_t> (row.level_ns // NS_PER_SECOND) + 1     # 0 is "never"
    ledger.violations[violation_of(verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit)] += 1
    if verdict.action == REJECT:
        ledger.rejected += 1
    elif verdict.action == THROTTLE:
        ledger.throttled += 1
    elif verdict.action == QUEUE:
        ledger.queued += 1
    ledger.log_held += 1
    if ledger.log_second != second:        # the first of this second of the row's time: one record, for all held back
        ledger.log_second = second
        verdict.log_held = ledger.log_held
        ledger.log_held = 0


cdef inline void decide(
    Row* row, Ledger* ledger, int64_t now_ns, const Ask* ask, bint enforcing, Verdict* verdict
) noexcept nogil:
    """Admit and charge, or deny. Everything of `verdict` but the figures of a violation is set."""
    cdef Levels levels
    # compute
    pass_time(row, ledger, now_ns)
    # decide
    start_verdict(verdict)
    if not fits(row, ledger, ask, &levels):
        judge(row, ledger, ask, enforcing, verdict)
        if verdict.limit:
            count_violation(row, ledger, verdict)
        if verdict.allowed:
            charge(row, ledger, ask)
        return
    # commit
    commit(row, ask, &levels)
