# The decision: is this request admitted now? Compute, decide, commit, on one row; time is an argument. Every function
# here that takes a row or a cold row requires the row's lock.
#
# assess() is the only place where anything is admitted or denied: a single check, each model of a joint request, each
# element of a batch, a check that charges nothing, and tokens beyond an open grant's estimate. charge_admitted() is the
# only place where what was admitted is charged. Admission is short: one comparison with the room of the windows and one
# with each level. Only if something does not fit, judge() evaluates all limits in order and finds the first violated
# one and the longest wait. A denial changes no window and no level.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from modelquota._core.layout cimport (
    Charge, ColdRow, IN_DOLLARS, LIMITS, LIMIT_CODES, MAX_COUNT, MINUTE, QueueEntry, Row, SECOND, Share, UNLIMITED,
    WINDOWS, Wide
)
from modelquota._core.row.advance cimport advance, advance_levels, unlikely
from modelquota._core.row.fullest cimport in_use, percent, rate_in_use
from modelquota._core.row.level cimport (
    NO_RATE, NS_PER_SECOND, level_cost, level_wait_ns, load, raise_level, store, wide
)
from modelquota._core.row.tokens cimport Kinds
from modelquota._core.row.queue cimport drop_expired, first_in_turn
from modelquota._core.row.share cimport LIVE, is_lacking, lease_of, note_need, share_of
from modelquota._core.row.window cimport (
    NEVER, is_counted, most_tokens_used, requests_used, stop_windows, tokens_used, window_wait_ns
)

cdef enum:  # Limit codes, in the order in which limits are judged; 0 = none. Those of the windows are in LIMIT_CODES
    RAM_MB = 1
    SSD_MB = 2
    CONCURRENCY = 3
    REQUESTS_PER_SECOND = 4
    TOKENS_PER_SECOND = 5
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

cdef enum:  # Verdict.starved: why a share denies what the whole limit does not
    NOT_STARVED = 0
    HAS_ROOM = 1        # the limit has room, and the share does not
    LEASE_ENDED = 2

cdef enum:
    NS_PER_MS = 1_000_000

cdef extern from *:
    """
    #define MQ_LAST_TICKET INT64_MAX
    #define MQ_LOWEST_PRIORITY INT32_MIN
    """
    const int64_t LAST_TICKET "MQ_LAST_TICKET"          # the ticket of a request that is not in a queue
    const int32_t LOWEST_PRIORITY "MQ_LOWEST_PRIORITY"  # of a request that does not wait: it overtakes no other request

cdef enum:
    ALL_LIMITS = 0xFFFF     # a bit for each Limit code


cdef struct Request:
    int64_t tokens      # what it counts at the model that is decided; 0 .. MAX_COUNT, as are the others
    Kinds kinds         # from which that follows at each model
    int64_t ram_mb
    int64_t ssd_mb
    int64_t ticket      # its order in a queue, or LAST_TICKET
    int32_t priority
    const ColdRow* counted   # of the model at which its violation has been counted, or NULL
    uint32_t counted_generation


cdef struct Fit:
    # Whether a request fits without a look at each limit, and if so the levels after its admission.
    bint fits
    wide request_level
    wide token_level


cdef struct Verdict:
    bint allowed
    uint32_t to_log          # violations that a log record is to be written for now, 0 = none
    uint8_t limit            # the first violated limit, 0 = none
    uint8_t cause            # for QUEUE_PLACE: the limit that the head of the queue waits for
    int action               # the action that was applied, or NO_ACTION
    int64_t wait_ns          # the longest wait of all violated limits, or NEVER; only meaningful if `limit` is not 0
    int64_t retry_after_ms   # the same, rounded up
    int64_t soonest_ns       # the shortest wait that may be enough, since others may release what they hold at any time
    bint others_may_free     # whether the request is denied because of what others hold
    bint worth_a_look        # whether it may help to reclaim what dead processes hold, and grants that were not taken
    bint aside               # whether a model that does not queue denies the request
    uint32_t judged          # bits of the limits that are being judged
    double usage             # percent of the violated limit without the request
    double used              # of the violated limit
    double bound
    int64_t asked
    bint in_dollars          # whether counts of tokens are millionths of a dollar
    uint8_t starved          # of the violated limit: HAS_ROOM or LEASE_ENDED; only meaningful if `limit` is not 0
    double whole             # the limit of which `bound` is a share, if it is starved


cdef inline bint exceeds(int64_t asked, uint64_t used, int64_t cap) noexcept nogil:
    """Whether the requested memory does not fit under a limit; a request for none always fits."""
    return asked != 0 and cap != UNLIMITED and <uint64_t> asked + used > <uint64_t> cap


cdef inline bint is_shadow(const Row* row, uint8_t limit) noexcept nogil:
    """Whether a limit is evaluated and never denies."""
    return row.shadow >> limit & 1


cdef inline bint is_trial(const Row* row, const ColdRow* cold, bint enforcing) noexcept nogil:
    """Whether the rate of tokens denies nothing at present; if so, its level never rises above its cap."""
    return not enforcing or cold.action == WARN or is_shadow(row, TOKENS_PER_SECOND)


cdef inline int64_t raise_noted(
    Wide* level, int64_t count, uint8_t shift, const Wide* cap, bint capped, ColdRow* cold
) noexcept nogil:
    """raise_level(), and count an epoch if the level was stopped by its cap.

    Such a level refunds no earlier charge: without that one, this charge would have raised it as far.
    """
    cdef int64_t raised = raise_level(level, count, shift, cap, capped)
    if capped and raised != count:      # a level that was stopped by LEVEL_MAX, not by a cap, still refunds
        cold.level_epoch += 1
    return raised


cdef inline void charge_tokens(Row* row, ColdRow* cold, int64_t tokens, bint trial, Charge* charged) noexcept nogil:
    """Charge tokens whether they fit or not, and set `charged`.

    A window that has reached MAX_COUNT stays there, and the others go on counting. What it cannot count any more is not
    in `charged`, so that it is refunded to none.
    """
    cdef int64_t beyond = max(tokens - (MAX_COUNT - most_tokens_used(row, cold)), <int64_t> 0)
    cdef int64_t raised
    row.token_room -= tokens
    if unlikely(beyond != 0):
        stop_windows(row, cold)
    raised = raise_noted(&row.token_level, tokens, row.token_shift, &row.token_cap, trial, cold)
    charged.at_ns = row.level_ns
    charged.tokens = tokens - beyond
    charged.raised = max(raised - beyond, <int64_t> 0)      # it is what is not refunded that raised the level first
    charged.raised_request = 0
    charged.epoch = cold.level_epoch


cdef inline void record_violation(
    Verdict* verdict, uint8_t limit, int64_t wait_ns, int64_t soonest_ns, double used, double bound, int64_t asked,
    uint8_t starved=NOT_STARVED, double whole=0.0
) noexcept nogil:
    """Record one limit's result: the first violated limit is described, the longest waits are kept.

    A wait of 0 means that the request fits. `soonest_ns` is the wait if others release what they hold.
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
        verdict.starved = starved
        verdict.whole = whole


cdef inline void hope_for_share(const Share* share, int64_t* wait_ns) noexcept nogil:
    """Shorten a wait, or a wait without end: the share may grow at any time."""
    cdef int64_t retry_ns = max(lease_of(share).retry_ns, <int64_t> 1)
    wait_ns[0] = retry_ns if wait_ns[0] == NEVER else min(wait_ns[0], retry_ns)


cdef inline uint8_t find_starved(
    const Row* row, const ColdRow* cold, int window, bint of_tokens, int64_t cost, int64_t* wait_ns,
    int64_t* soonest_ns, double* whole
) noexcept nogil:
    """Whether a limit is violated only because the row has a share of it; if so, shortens the waits, and sets `whole`.

    A request that fits into the whole limit alone does not wait without end either.
    """
    cdef const Share* share = share_of(cold)
    cdef bint possible
    if is_lacking(row, cold, window, of_tokens, cost, &possible):
        hope_for_share(share, wait_ns)
        hope_for_share(share, soonest_ns)
        whole[0] = <double> (share.token_limit[window] if of_tokens else share.request_limit[window])
        return HAS_ROOM if share.phase == LIVE else LEASE_ENDED
    if possible and wait_ns[0] == NEVER:
        hope_for_share(share, wait_ns)
        hope_for_share(share, soonest_ns)
    return NOT_STARVED


cdef inline void record_rate(
    const Row* row, const ColdRow* cold, bint of_tokens, int64_t cost, Verdict* verdict
) noexcept nogil:
    """record_violation() of a rate. It is two limits, window of a second and level; describes the fuller one."""
    cdef int64_t credit = cold.reserved_tokens if of_tokens else 0
    cdef int64_t ceiling_ns = window_wait_ns(row, cold, SECOND, of_tokens, cost, 0, row.level_ns)
    cdef const Wide* level = &row.token_level if of_tokens else &row.request_level
    cdef const Wide* cap = &row.token_cap if of_tokens else &row.request_cap
    cdef int64_t drain = row.token_drain if of_tokens else row.request_drain
    cdef uint8_t shift = row.token_shift if of_tokens else row.request_shift
    cdef int64_t level_ns = level_wait_ns(level, cap, drain, shift, cost, 0)
    cdef int64_t wait_ns, soonest_ns
    cdef uint8_t starved = NOT_STARVED
    cdef double used, bound, whole = 0.0
    if ceiling_ns == 0 and level_ns == 0:
        return
    wait_ns = soonest_ns = NEVER if ceiling_ns == NEVER or level_ns == NEVER else max(ceiling_ns, level_ns)
    if credit and wait_ns != NEVER:
        soonest_ns = max(window_wait_ns(row, cold, SECOND, of_tokens, cost, credit, row.level_ns),
                         level_wait_ns(level, cap, drain, shift, cost, credit))
    if row.has_share:
        starved = find_starved(row, cold, SECOND, of_tokens, cost, &wait_ns, &soonest_ns, &whole)
    rate_in_use(row, cold, of_tokens, &used, &bound)
    record_violation(verdict, LIMIT_CODES[SECOND][of_tokens], wait_ns, soonest_ns, used, bound, cost, starved, whole)


cdef inline void record_window(
    const Row* row, const ColdRow* cold, int window, bint of_tokens, int64_t cost, Verdict* verdict
) noexcept nogil:
    cdef int64_t wait_ns = window_wait_ns(row, cold, window, of_tokens, cost, 0, row.level_ns)
    cdef int64_t soonest_ns = wait_ns
    cdef uint8_t code = LIMIT_CODES[window][of_tokens]
    cdef uint8_t starved = NOT_STARVED
    cdef double whole = 0.0
    if wait_ns == 0:
        return
    if of_tokens and cold.reserved_tokens and wait_ns != NEVER:
        soonest_ns = window_wait_ns(row, cold, window, True, cost, cold.reserved_tokens, row.level_ns)
    if row.has_share:
        starved = find_starved(row, cold, window, of_tokens, cost, &wait_ns, &soonest_ns, &whole)
    if of_tokens:
        record_violation(verdict, code, wait_ns, soonest_ns, <double> tokens_used(row, cold, window),
                         <double> cold.token_limit[window], cost, starved, whole)
    else:
        record_violation(verdict, code, wait_ns, soonest_ns, <double> requests_used(row, cold, window),
                         <double> cold.request_limit[window], cost, starved, whole)


cdef inline void record_concurrency(const Row* row, const ColdRow* cold, Verdict* verdict) noexcept nogil:
    cdef int64_t wait_ns = NEVER
    cdef int64_t soonest_ns = 0 if cold.max_concurrent else NEVER
    cdef uint8_t starved = NOT_STARVED
    cdef const Share* share = share_of(cold)
    if cold.concurrent < cold.max_concurrent:
        return
    if row.has_share and cold.concurrent < share.max_concurrent:
        hope_for_share(share, &wait_ns)
        soonest_ns = min(wait_ns, soonest_ns) if soonest_ns != NEVER else wait_ns
        starved = HAS_ROOM if share.phase == LIVE else LEASE_ENDED
    record_violation(verdict, CONCURRENCY, wait_ns, soonest_ns, <double> cold.concurrent, <double> cold.max_concurrent,
                     1, starved, <double> share.max_concurrent if starved else 0.0)


cdef inline uint8_t violation_of(uint8_t limit) noexcept nogil:
    """The index into ColdRow.violations for a Limit code."""
    if limit == RAM_MB:
        return RAM_VIOLATION
    if limit == SSD_MB:
        return SSD_VIOLATION
    if limit == CONCURRENCY:
        return CONCURRENCY_VIOLATION
    return RATE_VIOLATION if limit <= LIMIT_CODES[MINUTE][False] else QUOTA_VIOLATION


cdef inline bint is_behind(const QueueEntry* head, const Request* request) noexcept nogil:
    """Whether the first request in the queue, `head`, comes before this one."""
    return (
        head != NULL
        and (head.priority > request.priority or (head.priority == request.priority and head.ticket < request.ticket))
    )


cdef inline void find_violations(
    const Row* row, const ColdRow* cold, const QueueEntry* head, const Request* request, uint32_t limits,
    Verdict* verdict
) noexcept nogil:
    """Judge `limits` in their order; set the first violated one and the longest wait of all violated ones.

    A request behind others in the queue reports the queue as its violation, even if it violates other limits too.
    """
    cdef uint64_t used_ram_mb = in_use(cold.ram_mb, cold.reserved_ram_mb)
    cdef uint64_t used_ssd_mb = in_use(cold.ssd_mb, cold.reserved_ssd_mb)
    cdef int window
    verdict.wait_ns = verdict.soonest_ns = 0
    verdict.judged = limits
    verdict.in_dollars = cold.unit & IN_DOLLARS != 0
    if exceeds(request.ram_mb, used_ram_mb, cold.max_ram_mb):
        record_violation(verdict, RAM_MB, NEVER, 0 if request.ram_mb <= cold.max_ram_mb else NEVER,
                         <double> used_ram_mb, <double> cold.max_ram_mb, request.ram_mb)
    if exceeds(request.ssd_mb, used_ssd_mb, cold.max_ssd_mb):
        record_violation(verdict, SSD_MB, NEVER, 0 if request.ssd_mb <= cold.max_ssd_mb else NEVER,
                         <double> used_ssd_mb, <double> cold.max_ssd_mb, request.ssd_mb)
    record_concurrency(row, cold, verdict)
    record_rate(row, cold, False, 1, verdict)
    record_rate(row, cold, True, request.tokens, verdict)
    for window in range(SECOND + 1, WINDOWS):
        record_window(row, cold, window, True, request.tokens, verdict)
        record_window(row, cold, window, False, 1, verdict)
    if is_behind(head, request):
        verdict.others_may_free = True
        verdict.limit = QUEUE_PLACE
        verdict.starved = NOT_STARVED
        verdict.cause = head.limit
        verdict.used = <double> cold.waiting
        verdict.bound = <double> cold.max_queued
        verdict.asked = 1
        verdict.usage = percent(verdict.used, verdict.bound)
        verdict.wait_ns = NEVER if head.ready_ns == NEVER else max(head.ready_ns - row.level_ns, 1)
    verdict.retry_after_ms = NEVER if verdict.wait_ns == NEVER else (verdict.wait_ns + NS_PER_MS - 1) // NS_PER_MS


cdef inline void start_verdict(Verdict* verdict) noexcept nogil:
    """Initialize to "admitted"."""
    verdict.allowed = True
    verdict.to_log = 0
    verdict.limit = 0
    verdict.action = NO_ACTION
    verdict.retry_after_ms = NEVER
    verdict.others_may_free = verdict.aside = verdict.worth_a_look = False


cdef inline bint tokens_fit(const Row* row, int64_t tokens, Fit* fit) noexcept nogil:
    """Whether these tokens fit without a look at each limit; sets `fit`. Requires advance() and the row's lock."""
    if tokens > row.token_room and tokens != 0:     # first: the cost of what is within the room can be represented
        return False
    fit.token_level = load(&row.token_level) + level_cost(tokens, row.token_shift)
    return tokens == 0 or fit.token_level <= load(&row.token_cap)


cdef inline bint memory_fits(const ColdRow* cold, const Request* request) noexcept nogil:
    """Whether the limits of memory admit what the request asks for. Requires the row's lock."""
    return not (
        exceeds(request.ram_mb, in_use(cold.ram_mb, cold.reserved_ram_mb), cold.max_ram_mb)
        or exceeds(request.ssd_mb, in_use(cold.ssd_mb, cold.reserved_ssd_mb), cold.max_ssd_mb)
    )


cdef inline bint fits(const Row* row, const ColdRow* cold, const Request* request, Fit* fit) noexcept nogil:
    """The fast path: True if the request fits without a look at each limit, and sets `fit`; False leaves it to judge().

    Requires advance() and the row's lock.
    """
    if row.request_room < 1 or (request.ram_mb | request.ssd_mb and not memory_fits(cold, request)):
        return False
    fit.request_level = load(&row.request_level) + level_cost(1, row.request_shift)
    return fit.request_level <= load(&row.request_cap) and tokens_fit(row, request.tokens, fit)


cdef inline void judge(
    const Row* row, const ColdRow* cold, QueueEntry* entries, const Request* request, uint32_t limits, bint enforcing,
    Verdict* verdict
) noexcept nogil:
    """Decide a request that does not fit at once, by those of `limits` that deny and then by the shadow limits.

    Counts nothing.

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
        # what open grants have charged may be refunded too
        verdict.worth_a_look = verdict.others_may_free or cold.concurrent != 0
        return
    if row.shadow & limits:
        find_violations(row, cold, NULL, request, row.shadow & limits, verdict)
        if verdict.limit != 0:
            verdict.action = WARN
            return
    # admitted: a counter is at MAX_COUNT, or others are in a queue that does not bind this one
    verdict.retry_after_ms = NEVER


cdef inline void assess_closely(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Fit* fit,
    Verdict* verdict
) noexcept nogil:
    """The rest of assess(), for a request that does not fit at once. Separate, so that the common case is inlined."""
    # waiting requests whose deadline has passed may be all that leaves no room
    fit.fits = cold.waiting != 0 and drop_expired(row, cold, entries, now_ns, False) and fits(row, cold, request, fit)
    if not fit.fits:
        judge(row, cold, entries, request, ALL_LIMITS, enforcing, verdict)


cdef inline bint fits_at_once(
    Row* row, ColdRow* cold, int64_t now_ns, const Request* request, Fit* fit, Verdict* verdict
) noexcept nogil:
    """The first half of assess(), which is enough for most requests."""
    advance(row, cold, now_ns)
    start_verdict(verdict)
    return fits(row, cold, request, fit)


cdef inline void assess(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing, Fit* fit,
    Verdict* verdict
) noexcept nogil:
    """Admit or deny a request at one row: sets `fit`, and all of `verdict` except its usage and to_log.

    Charges and counts nothing; only the passing of time changes the row. Requires the row's lock.
    """
    fit.fits = fits_at_once(row, cold, now_ns, request, fit, verdict)
    if not fit.fits:
        assess_closely(row, cold, entries, now_ns, request, enforcing, fit, verdict)


cdef inline void count_violation(Row* row, ColdRow* cold, Verdict* verdict) noexcept nogil:
    """Count a violation and the action that was applied, and set whether it is to be logged.

    Requires the row's lock.
    """
    cdef uint32_t second = <uint32_t> (row.level_ns // NS_PER_SECOND) + 1     # 0 is "never"
    cold.violations[violation_of(verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit)] += 1
    if verdict.action == REJECT:
        cold.rejected += 1
    elif verdict.action == THROTTLE:
        cold.throttled += 1
    elif verdict.action == QUEUE:
        cold.queued += 1
    if row.has_share and verdict.starved and not verdict.allowed:
        share_of(cold).starved += 1
    cold.log_held += 1
    # the first in this second of the row's time: one log record, for all before it too
    if cold.log_second != second:
        cold.log_second = second
        verdict.to_log = cold.log_held
        cold.log_held = 0


cdef inline void charge_beyond(Row* row, ColdRow* cold, const Request* request, Charge* charged) noexcept nogil:
    """charge_admitted() for a request that does not fit and is still admitted: it raises no level above its cap."""
    row.request_room -= 1
    charge_tokens(row, cold, request.tokens, True, charged)
    charged.raised_request = <uint8_t> raise_noted(
        &row.request_level, 1, row.request_shift, &row.request_cap, True, cold
    )
    charged.epoch = cold.level_epoch


cdef inline void charge_fitting(Row* row, const Request* request, const Fit* fit) noexcept nogil:
    """charge_admitted() for a request that fits at once."""
    row.request_room -= 1
    row.token_room -= request.tokens
    store(&row.request_level, fit.request_level)
    store(&row.token_level, fit.token_level)


cdef inline void charge_admitted(
    Row* row, ColdRow* cold, const Request* request, const Fit* fit, Charge* charged
) noexcept nogil:
    """Charge a request that assess() has admitted, and set `charged`. Requires the row's lock, held since assess()."""
    if not fit.fits:
        charge_beyond(row, cold, request, charged)
        return
    charged.at_ns = row.level_ns
    charged.epoch = cold.level_epoch
    charged.tokens = charged.raised = request.tokens
    charged.raised_request = 1
    charge_fitting(row, request, fit)


cdef inline void decide_closely(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing,
    Verdict* verdict
) noexcept nogil:
    """The rest of decide(), separate like assess_closely().

    It has its own Fit, so that decide() keeps its Fit in registers.
    """
    cdef Fit fit
    cdef Charge charged
    assess_closely(row, cold, entries, now_ns, request, enforcing, &fit, verdict)
    if verdict.limit:
        count_violation(row, cold, verdict)
    if verdict.allowed:
        charge_admitted(row, cold, request, &fit, &charged)
    elif row.has_share and verdict.starved:
        note_need(cold, request.tokens)


cdef inline void decide(
    Row* row, ColdRow* cold, QueueEntry* entries, int64_t now_ns, const Request* request, bint enforcing,
    Verdict* verdict
) noexcept nogil:
    """assess() at one row; charges what it admits and counts what it denies. Requires the row's lock."""
    cdef Fit fit
    if unlikely(not fits_at_once(row, cold, now_ns, request, &fit, verdict)):
        decide_closely(row, cold, entries, now_ns, request, enforcing, verdict)
        return
    charge_fitting(row, request, &fit)


cdef inline bint admit_in_batch(Row* row, ColdRow* cold, int64_t now_ns, const Request* request) noexcept nogil:
    """Admit and charge a request that fits, and leave the windows behind; False, if decide() has to be asked.

    Requires the row's lock.
    """
    cdef Fit fit
    if not advance_levels(row, now_ns) or not fits(row, cold, request, &fit):
        return False
    charge_fitting(row, request, &fit)
    return True


cdef inline void charge_in_batch(
    Row* row, ColdRow* cold, int64_t now_ns, int64_t tokens, bint enforcing
) noexcept nogil:
    """charge_tokens() at `now_ns` that leaves the windows behind as long as the tokens fit. Requires the row's lock."""
    cdef Fit fit
    cdef Charge charged
    if advance_levels(row, now_ns) and tokens_fit(row, tokens, &fit):
        row.token_room -= tokens
        store(&row.token_level, fit.token_level)
    else:
        advance(row, cold, now_ns)
        charge_tokens(row, cold, tokens, is_trial(row, cold, enforcing), &charged)


cdef inline uint8_t first_over(const Row* row, const ColdRow* cold) noexcept nogil:
    """The first limit of which more is used than it allows, or 0: tokens are charged past limits too.

    Requires advance() and the row's lock.
    """
    cdef int window
    if in_use(cold.ram_mb, cold.reserved_ram_mb) > <uint64_t> cold.max_ram_mb:
        return RAM_MB
    if in_use(cold.ssd_mb, cold.reserved_ssd_mb) > <uint64_t> cold.max_ssd_mb:
        return SSD_MB
    if cold.concurrent > cold.max_concurrent:
        return CONCURRENCY
    if load(&row.request_level) > load(&row.request_cap) and row.request_shift != NO_RATE:
        return LIMIT_CODES[SECOND][False]
    if is_counted(cold, SECOND) and requests_used(row, cold, SECOND) > cold.request_limit[SECOND]:      # its burst
        return LIMIT_CODES[SECOND][False]
    if load(&row.token_level) > load(&row.token_cap) and row.token_shift != NO_RATE:
        return LIMIT_CODES[SECOND][True]
    if is_counted(cold, SECOND) and tokens_used(row, cold, SECOND) > cold.token_limit[SECOND]:
        return LIMIT_CODES[SECOND][True]
    for window in range(SECOND + 1, WINDOWS):
        if not is_counted(cold, window):
            continue
        if tokens_used(row, cold, window) > cold.token_limit[window]:
            return LIMIT_CODES[window][True]
        if requests_used(row, cold, window) > cold.request_limit[window]:
            return LIMIT_CODES[window][False]
    return 0


cdef inline uint32_t token_limits() noexcept nogil:
    """A bit for each Limit code of tokens."""
    cdef uint32_t limits = 0
    cdef int window
    for window in range(WINDOWS):
        limits |= <uint32_t> 1 << LIMIT_CODES[window][True]
    return limits


cdef inline bint admits_tokens(Row* row, ColdRow* cold, int64_t tokens, bint enforcing) noexcept nogil:
    """Whether an open grant may use this many more tokens: assess() by the limits of tokens alone, even if others wait.

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
        if row.has_share and not verdict.allowed and verdict.starved:
            note_need(cold, tokens)
    return verdict.allowed
