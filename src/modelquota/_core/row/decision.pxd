# The decision: may this request pass now? Compute, decide, commit, on one row whose lock is held. Time is an argument.
#
# assess() is the only place where anything is admitted or denied: a single check, each model of a joint request, each
# element of a batch, a look without a charge, and tokens beyond an open grant's estimate. charge_admitted() is the only
# place where what was admitted is charged. What admits is short: a window's room and a level say "fits" with one comparison
# each. Only if something does not fit, judge() goes through the limits in their order and finds the first that is violated
# and the longest wait. A denial changes no window and no level.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from modelquota._core.layout cimport (
    Charge, ColdRow, LIMITS, LIMIT_CODES, MAX_COUNT, QueueEntry, Row, SECOND, UNLIMITED, WINDOWS, Wide
)
from modelquota._core.row.advance cimport advance, advance_levels, unlikely
from modelquota._core.row.fullest cimport in_use, percent, rate_in_use
from modelquota._core.row.level cimport (
    NO_RATE, NS_PER_SECOND, level_cost, level_wait_ns, load, raise_level, store, wide
)
from modelquota._core.row.queue cimport drop_expired, first_in_turn
from modelquota._core.row.window cimport NEVER, most_tokens_used, requests_used, tokens_used, window_wait_ns

cdef enum:  # Limit codes, in the order in which limits are judged; 0 = admitted. Those of windows: LIMIT_CODES
    RAM_MB = 1
    SSD_MB = 2
    CONCURRENCY = 3
    REQUESTS_PER_SECOND = 4
    TOKENS_PER_SECOND = 5
    REQUESTS_PER_MINUTE = 7
    QUEUE_PLACE = LIMITS - 1

cdef enum:  # indices of ColdRow.violations
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

cdef enum:
    ALL_LIMITS = 0xFFFF     # a bit for each Limit code


cdef struct Request:
    int64_t tokens      # 0 .. MAX_COUNT, as are the others
    int64_t ram_mb
    int64_t ssd_mb
    int64_t ticket      # its place in a line, or LAST_TICKET
    int32_t priority
    const ColdRow* counted   # of the model where its violation has been counted, or NULL
    uint32_t counted_generation


cdef struct Fit:
    # Whether a request plainly fits, and where its admission takes the two levels then.
    bint fits
    wide request_level
    wide token_level


cdef struct Verdict:
    bint allowed
    uint32_t log_held        # violations that a log record is to be written for now, 0 = none
    uint8_t limit            # the first violated limit, 0 = none
    uint8_t cause            # for QUEUE_PLACE: the limit that the head of the line waits for
    int action               # the one that was applied, or NO_ACTION
    int64_t wait_ns          # the longest wait of all violated limits, or NEVER; meaningful where limit is set
    int64_t retry_after_ms   # the same, rounded up
    int64_t soonest_ns       # the shortest wait that may do, since others may give back what they hold any moment
    bint others_may_free             # whether what others hold is in the way
    bint worth_a_look        # whether to see if others are dead, or do not come for their grants, may help
    bint aside               # whether a model that does not queue is in the way
    uint32_t judged          # bits of the limits that are being judged
    double usage             # percent of the violated limit without the request
    double used              # of the violated limit
    double bound
    int64_t asked


cdef inline bint exceeds(int64_t asked, uint64_t used, int64_t cap) noexcept nogil:
    """Whether memory asked for does not fit under a cap; asking for nothing always fits."""
    return asked != 0 and cap != UNLIMITED and <uint64_t> asked + used > <uint64_t> cap


cdef inline bint is_shadow(const Row* row, uint8_t limit) noexcept nogil:
    """Whether a limit is judged and never denies."""
    return row.shadow >> limit & 1


cdef inline bint is_trial(const Row* row, const ColdRow* cold, bint enforcing) noexcept nogil:
    """Whether the rate of tokens denies nothing at the moment: then its level never rises above its cap."""
    return not enforcing or cold.action == WARN or is_shadow(row, TOKENS_PER_SECOND)


cdef inline int64_t raise_noted(
    Wide* level, int64_t count, uint8_t shift, const Wide* cap, bint capped, ColdRow* cold
) noexcept nogil:
    """raise_level(). A level that met its cap forgets what was charged before: without that, this charge had raised it."""
    cdef int64_t raised = raise_level(level, count, shift, cap, capped)
    if capped and raised != count:      # at LEVEL_MAX, not at a cap, what came before can still be told apart
        cold.level_epoch += 1
    return raised


cdef inline void charge_tokens(Row* row, ColdRow* cold, int64_t tokens, bint trial, Charge* charged) noexcept nogil:
    """Charge without asking, and note what was: a counter that has reached MAX_COUNT stays there."""
    cdef int64_t left = MAX_COUNT - most_tokens_used(row, cold)
    charged.at_ns = row.level_ns
    charged.tokens = tokens if tokens < left else left
    row.token_room -= charged.tokens
    charged.raised = raise_noted(&row.token_level, charged.tokens, row.token_shift, &row.token_cap, trial, cold)
    charged.raised_request = 0
    charged.epoch = cold.level_epoch


cdef inline void record_violation(
    Verdict* verdict, uint8_t limit, int64_t wait_ns, int64_t soonest_ns, double used, double bound, int64_t asked
) noexcept nogil:
    """Take down one limit's answer: the first violated limit is described, the longest waits are kept.

    `soonest_ns` is the wait if others give back what they hold.
    """
    if wait_ns == 0 or not verdict.judged >> limit & 1:
        return
    if wait_ns == NEVER or verdict.wait_ns == NEVER:
        verdict.wait_ns = NEVER
    elif wait_ns > verdict.wait_ns:
        verdict.wait_ns = wait_ns
    if soonest_ns != wait_ns:
        verdict.others_may_free = True
    if soonest_ns == NEVER or verdict.soonest_ns == NEVER:
        verdict.soonest_ns = NEVER
    elif soonest_ns > verdict.soonest_ns:
        verdict.soonest_ns = soonest_ns
    if verdict.limit == 0:
        verdict.limit = limit
        verdict.used = used
        verdict.bound = bound
        verdict.asked = asked
        verdict.usage = percent(used, bound)


cdef inline void record_rate(
    const Row* row, const ColdRow* cold, bint of_tokens, int64_t cost, Verdict* verdict
) noexcept nogil:
    """A rate is two limits in one: the ceiling of the rolling second and the long-run level. The fuller is described."""
    cdef int64_t credit = cold.reserved_tokens if of_tokens else 0
    cdef int64_t ceiling_ns = window_wait_ns(row, cold, SECOND, of_tokens, cost, 0, row.level_ns)
    cdef const Wide* level = &row.token_level if of_tokens else &row.request_level
    cdef const Wide* cap = &row.token_cap if of_tokens else &row.request_cap
    cdef int64_t drain = row.token_drain if of_tokens else row.request_drain
    cdef uint8_t shift = row.token_shift if of_tokens else row.request_shift
    cdef int64_t level_ns = level_wait_ns(level, cap, drain, shift, cost, 0)
    cdef int64_t wait_ns, soonest_ns
    cdef double used, bound
    if ceiling_ns == 0 and level_ns == 0:
        return
    wait_ns = soonest_ns = NEVER if ceiling_ns == NEVER or level_ns == NEVER else max(ceiling_ns, level_ns)
    if credit and wait_ns != NEVER:
        soonest_ns = max(window_wait_ns(row, cold, SECOND, of_tokens, cost, credit, row.level_ns),
                         level_wait_ns(level, cap, drain, shift, cost, credit))
    rate_in_use(row, cold, of_tokens, &used, &bound)
    record_violation(verdict, LIMIT_CODES[SECOND][of_tokens], wait_ns, soonest_ns, used, bound, cost)


cdef inline void record_window(
    const Row* row, const ColdRow* cold, int window, bint of_tokens, int64_t cost, Verdict* verdict
) noexcept nogil:
    cdef int64_t wait_ns = window_wait_ns(row, cold, window, of_tokens, cost, 0, row.level_ns)
    cdef int64_t soonest_ns = wait_ns
    cdef uint8_t code = LIMIT_CODES[window][of_tokens]
    if wait_ns == 0:
        return
    if of_tokens:
        if cold.reserved_tokens and wait_ns != NEVER:
            soonest_ns = window_wait_ns(row, cold, window, True, cost, cold.reserved_tokens, row.level_ns)
        record_violation(verdict, code, wait_ns, soonest_ns, <double> tokens_used(row, cold, window),
             <double> cold.token_limit[window], cost)
    else:
        record_violation(verdict, code, wait_ns, soonest_ns, <double> requests_used(row, cold, window),
             <double> cold.request_limit[window], cost)


cdef inline uint8_t violation_of(uint8_t limit) noexcept nogil:
    """Index into ColdRow.violations of a Limit code."""
    if limit == RAM_MB:
        return RAM_VIOLATION
    if limit == SSD_MB:
        return SSD_VIOLATION
    if limit == CONCURRENCY:
        return CONCURRENCY_VIOLATION
    return RATE_VIOLATION if limit <= REQUESTS_PER_MINUTE else QUOTA_VIOLATION


cdef inline bint is_behind(const QueueEntry* head, const Request* request) noexcept nogil:
    """Whether others wait for this model whose turn comes first."""
    return (
        head != NULL
        and (head.priority > request.priority or (head.priority == request.priority and head.ticket < request.ticket))
    )


cdef inline void find_violations(
    const Row* row, const ColdRow* cold, const QueueEntry* head, const Request* request, uint32_t limits, Verdict* verdict
) noexcept nogil:
    """Go through `limits` in their order; note the first that is violated and the longest wait of all that are.

    A request that is behind others in the queue is told to wait for them, whatever else is in the way.
    """
    cdef uint64_t used_ram_mb = in_use(cold.ram_mb, cold.reserved_ram_mb)
    cdef uint64_t used_ssd_mb = in_use(cold.ssd_mb, cold.reserved_ssd_mb)
    cdef int window
    verdict.wait_ns = verdict.soonest_ns = 0
    verdict.judged = limits
    if exceeds(request.ram_mb, used_ram_mb, cold.max_ram_mb):
        record_violation(verdict, RAM_MB, NEVER, 0 if request.ram_mb <= cold.max_ram_mb else NEVER, <double> used_ram_mb,
             <double> cold.max_ram_mb, request.ram_mb)
    if exceeds(request.ssd_mb, used_ssd_mb, cold.max_ssd_mb):
        record_violation(verdict, SSD_MB, NEVER, 0 if request.ssd_mb <= cold.max_ssd_mb else NEVER, <double> used_ssd_mb,
             <double> cold.max_ssd_mb, request.ssd_mb)
    if cold.concurrent >= cold.max_concurrent:
        record_violation(verdict, CONCURRENCY, NEVER, 0 if cold.max_concurrent else NEVER, <double> cold.concurrent,
             <double> cold.max_concurrent, 1)
    record_rate(row, cold, False, 1, verdict)
    record_rate(row, cold, True, request.tokens, verdict)
    for window in range(SECOND + 1, WINDOWS):
        record_window(row, cold, window, True, request.tokens, verdict)
        record_window(row, cold, window, False, 1, verdict)
    if is_behind(head, request):
        verdict.others_may_free = True
        verdict.limit = QUEUE_PLACE
        verdict.cause = head.limit
        verdict.used = <double> cold.waiting
        verdict.bound = <double> cold.max_queued
        verdict.asked = 1
        verdict.usage = percent(verdict.used, verdict.bound)
        verdict.wait_ns = NEVER if head.ready_ns == NEVER else max(head.ready_ns - row.level_ns, 1)
    verdict.retry_after_ms = NEVER if verdict.wait_ns == NEVER else (verdict.wait_ns + NS_PER_MS - 1) // NS_PER_MS


cdef inline void start_verdict(Verdict* verdict) noexcept nogil:
    """Admitted, unless something speaks against it."""
    verdict.allowed = True
    verdict.log_held = 0
    verdict.limit = 0
    verdict.action = NO_ACTION
    verdict.retry_after_ms = NEVER
    verdict.others_may_free = verdict.aside = verdict.worth_a_look = False


cdef inline bint tokens_fit(const Row* row, int64_t tokens, Fit* fit) noexcept nogil:
    """Whether the limits of tokens plainly admit so many. Requires advance() and the row's lock."""
    if tokens > row.token_room and tokens != 0:     # first: what is within it has a cost that can be represented
        return False
    fit.token_level = load(&row.token_level) + level_cost(tokens, row.token_shift)
    return tokens == 0 or fit.token_level <= load(&row.token_cap)


cdef inline bint fits(const Row* row, const ColdRow* cold, const Request* request, Fit* fit) noexcept nogil:
    """The fast path: True if the request fits without a look at each limit; False leaves that to judge().

    Requires advance() and the row's lock.
    """
    if not (
        row.request_room >= 1
        and not exceeds(request.ram_mb, in_use(cold.ram_mb, cold.reserved_ram_mb), cold.max_ram_mb)
        and not exceeds(request.ssd_mb, in_use(cold.ssd_mb, cold.reserved_ssd_mb), cold.max_ssd_mb)
    ):
        return False
    fit.request_level = load(&row.request_level) + level_cost(1, row.request_shift)
    return fit.request_level <= load(&row.request_cap) and tokens_fit(row, request.tokens, fit)


cdef inline void judge(
    const Row* row, const ColdRow* cold, QueueEntry* entries, const Request* request, uint32_t limits, bint enforcing,
    Verdict* verdict
) noexcept nogil:
    """Decide what does not plainly fit, by those of `limits` that deny and then by those in shadow. Counts nothing.

    Requires start_verdict(), advance() and the row's lock.
    """
    cdef const QueueEntry* head = NULL
    if not enforcing:
        return
    if cold.waiting != 0 and cold.action == QUEUE and limits == ALL_LIMITS:
        head = first_in_turn(cold, entries)
    find_violations(row, cold, head, request, limits & ~<uint32_t> row.shadow, verdict)
    if verdict.limit != 0:
        verdict.action = cold.action
        verdict.allowed = cold.action == WARN
        verdict.aside = cold.action != QUEUE
        # what was charged for open grants may be in the way too
        verdict.worth_a_look = verdict.others_may_free or cold.concurrent != 0
        return
    if row.shadow & limits:
        find_violations(row, cold, NULL, request, row.shadow & limits, verdict)
        if verdict.limit != 0:
            verdict.action = WARN
            return
    verdict.retry_after_ms = NEVER  # a counter at MAX_COUNT, or others in a queue that does not bind this request


cdef inline void assess_closely(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Fit* fit, Verdict* verdict
) noexcept nogil:
    """The rest of assess(), for a request that does not plainly fit. Apart, so that the compiler puts the common case at
    the place of the call."""
    # those in the queue whose time is over may be all that is in the way
    fit.fits = cold.waiting != 0 and drop_expired(row, cold, entries, now_ns, False) and fits(row, cold, request, fit)
    if not fit.fits:
        judge(row, cold, entries, request, ALL_LIMITS, enforcing, verdict)


cdef inline bint fits_at_once(
    Row* row, ColdRow* cold, int64_t now_ns, const Request* request, Fit* fit, Verdict* verdict
) noexcept nogil:
    """The first half of assess(): all that most requests need."""
    advance(row, cold, now_ns)
    start_verdict(verdict)
    return fits(row, cold, request, fit)


cdef inline void assess(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Fit* fit, Verdict* verdict
) noexcept nogil:
    """Admit or deny a request at one row: sets `fit`, and everything of `verdict` but its usage and log_held.

    Charges and counts nothing; what changes is what time changes by itself. Requires the row's lock.
    """
    fit.fits = fits_at_once(row, cold, now_ns, request, fit, verdict)
    if not fit.fits:
        assess_closely(row, cold, entries, now_ns, request, enforcing, fit, verdict)


cdef inline void count_violation(Row* row, ColdRow* cold, Verdict* verdict) noexcept nogil:
    """Count a violation under the action that it met, and say whether it is to be logged."""
    cdef uint32_t second = <uint32_t> (row.level_ns // NS_PER_SECOND) + 1     # 0 is "never"
    cold.violations[violation_of(verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit)] += 1
    if verdict.action == REJECT:
        cold.rejected += 1
    elif verdict.action == THROTTLE:
        cold.throttled += 1
    elif verdict.action == QUEUE:
        cold.queued += 1
    cold.log_held += 1
    if cold.log_second != second:        # the first of this second of the row's time: one record, for all held back
        cold.log_second = second
        verdict.log_held = cold.log_held
        cold.log_held = 0


cdef inline void charge_beyond(Row* row, ColdRow* cold, const Request* request, Charge* charged) noexcept nogil:
    """charge_admitted() for a request that does not fit and is admitted all the same: it raises no level above its cap."""
    row.request_room -= 1
    charge_tokens(row, cold, request.tokens, True, charged)
    charged.raised_request = <uint8_t> raise_noted(&row.request_level, 1, row.request_shift, &row.request_cap, True, cold)
    charged.epoch = cold.level_epoch


cdef inline void charge_fitting(Row* row, const Request* request, const Fit* fit) noexcept nogil:
    """charge_admitted() for a request that plainly fits."""
    row.request_room -= 1
    row.token_room -= request.tokens
    store(&row.request_level, fit.request_level)
    store(&row.token_level, fit.token_level)


cdef inline void charge_admitted(Row* row, ColdRow* cold, const Request* request, const Fit* fit, Charge* charged) noexcept nogil:
    """Charge a request that assess() admitted, and note what was charged. Requires the row's lock since then."""
    if not fit.fits:
        charge_beyond(row, cold, request, charged)
        return
    charged.at_ns = row.level_ns
    charged.epoch = cold.level_epoch
    charged.tokens = charged.raised = request.tokens
    charged.raised_request = 1
    charge_fitting(row, request, fit)


cdef inline void decide_closely(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Verdict* verdict
) noexcept nogil:
    """The rest of decide(), apart as is assess_closely(), and with a Fit of its own: that of decide() stays in registers."""
    cdef Fit fit
    cdef Charge charged
    assess_closely(row, cold, entries, now_ns, request, enforcing, &fit, verdict)
    if verdict.limit:
        count_violation(row, cold, verdict)
    if verdict.allowed:
        charge_admitted(row, cold, request, &fit, &charged)


cdef inline void decide(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Verdict* verdict
) noexcept nogil:
    """assess() at one row, and charge what it admits, or count what it denies. Requires the row's lock."""
    cdef Fit fit
    if unlikely(not fits_at_once(row, cold, now_ns, request, &fit, verdict)):
        decide_closely(row, cold, entries, now_ns, request, enforcing, verdict)
        return
    charge_fitting(row, request, &fit)


cdef inline void decide_in_batch(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Verdict* verdict
) noexcept nogil:
    """decide() that leaves the windows behind as long as the request fits. Requires the row's lock."""
    cdef Fit fit
    if advance_levels(row, now_ns) and fits(row, cold, request, &fit):
        start_verdict(verdict)
        charge_fitting(row, request, &fit)
    else:
        decide(row, cold, entries, now_ns, request, enforcing, verdict)


cdef inline void charge_in_batch(Row* row, ColdRow* cold, int64_t now_ns, int64_t tokens, bint enforcing) noexcept nogil:
    """charge_tokens() at `now_ns` that leaves the windows behind as long as the tokens fit. Requires the row's lock."""
    cdef Fit fit
    cdef Charge charged
    if advance_levels(row, now_ns) and tokens_fit(row, tokens, &fit):
        row.token_room -= tokens
        store(&row.token_level, fit.token_level)
    else:
        advance(row, cold, now_ns)
        charge_tokens(row, cold, tokens, is_trial(row, cold, enforcing), &charged)


cdef inline uint32_t token_limits() noexcept nogil:
    """A bit for each Limit code of tokens."""
    cdef uint32_t limits = 0
    cdef int window
    for window in range(WINDOWS):
        limits |= <uint32_t> 1 << LIMIT_CODES[window][True]
    return limits


cdef inline bint admits_tokens(Row* row, ColdRow* cold, int64_t tokens, bint enforcing) noexcept nogil:
    """Whether an open grant may have so many tokens more: assess() by the limits of tokens alone, whoever waits.

    Requires advance() and the row's lock.
    """
    cdef Request request
    cdef Fit fit
    cdef Verdict verdict
    start_verdict(&verdict)
    if not tokens_fit(row, tokens, &fit):
        memset(&request, 0, sizeof(request))
        request.tokens = tokens
        judge(row, cold, NULL, &request, token_limits(), enforcing, &verdict)
    return verdict.allowed
