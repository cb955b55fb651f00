# Usage: what can be read of a row; and how limits are written to a row, read and compared. Every function here that
# takes a row or a cold row requires the row's lock.
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.string cimport memcpy
from modelquota._core.layout cimport ColdRow, LIMITS, LIMIT_CODES, Limits, Row, SECOND, UNLIMITED, WINDOWS, Wide
from modelquota._core.row.decision cimport (
    CONCURRENCY, QUEUE_PLACE, RAM_MB, SSD_MB, advance, in_use, percent, rate_in_use, round_to_50_bits
)
from modelquota._core.row.level cimport NO_RATE, NS_PER_SECOND, as_double, burst_used, change_rate, load, wide
from modelquota._core.row.window cimport (
    measure_room, requests_charged, requests_in_slot, requests_used, slot_at, slot_start_ns, tokens_charged,
    tokens_in_slot, tokens_used
)


cdef struct Usage:
    # The fields of ResourceUsage (MB, requests, tokens), then the row's counters since it was registered.
    int64_t current_ram_mb
    int64_t peak_ram_mb
    int64_t current_ssd_mb
    int64_t peak_ssd_mb
    int64_t requests_this[WINDOWS]
    int64_t tokens_this[WINDOWS]
    int64_t burst_requests_used
    int64_t burst_tokens_used
    int64_t total_violations
    int64_t ram_violations
    int64_t ssd_violations
    int64_t rate_violations
    int64_t quota_violations
    int64_t concurrency_violations
    int64_t reserved_ram_mb
    int64_t reserved_ssd_mb
    int64_t concurrent_requests
    int64_t queued_requests
    int64_t allowed_total
    int64_t rejected_total
    int64_t throttled_total
    int64_t queued_total
    int64_t warned_total
    int64_t waited_total
    uint64_t tokens_total           # modulo 2**64; what was refunded is not subtracted
    uint64_t tokens_refunded_total
    int64_t waiting_requests        # waiting now, with their violation counted here; set by callers that have the queue
    # -- by Limit code; element 0 is as for a limit that is not set
    int64_t left[LIMITS]            # what the limit still admits now; NO_LIMIT if it is not set
    double percent[LIMITS]          # how full it is, 0.0 if it is not set; of a rate the fuller of window and level


cdef enum:
    NO_LIMIT = -1


cdef inline void read_limit(Usage* usage, int code, int64_t limit, uint64_t used) noexcept nogil:
    """Set what is left of one limit, and how full it is."""
    if limit != UNLIMITED:
        usage.left[code] = limit - <int64_t> used if used < <uint64_t> limit else 0
        usage.percent[code] = round_to_50_bits(percent(<double> used, <double> limit))


cdef inline void read_rate(const Row* row, const ColdRow* cold, bint of_tokens, Usage* usage) noexcept nogil:
    """Update what read_limit() set for the window of a rate by its level, if that has less left or is fuller."""
    cdef const Wide* level = &row.token_level if of_tokens else &row.request_level
    cdef const Wide* cap = &row.token_cap if of_tokens else &row.request_cap
    cdef uint8_t shift = row.token_shift if of_tokens else row.request_shift
    cdef int code = LIMIT_CODES[SECOND][of_tokens]
    cdef wide room
    cdef double used, bound
    if shift == NO_RATE:
        return
    room = load(cap) - load(level)
    room = (room if room > 0 else <wide> 0) >> shift
    if usage.left[code] > room // NS_PER_SECOND:
        usage.left[code] = <int64_t> (room // NS_PER_SECOND)
    rate_in_use(row, cold, of_tokens, &used, &bound)
    usage.percent[code] = round_to_50_bits(percent(used, bound))


cdef inline void read_usage(Row* row, ColdRow* cold, int64_t now_ns, Usage* usage) noexcept nogil:
    """Read the row's use at `now_ns`. Advances the row first, so that an idle model has an empty second.

    Requires the row's lock.
    """
    cdef int i
    advance(row, cold, now_ns)
    for i in range(LIMITS):
        usage.left[i] = NO_LIMIT
        usage.percent[i] = 0.0
    usage.current_ram_mb = cold.ram_mb
    usage.peak_ram_mb = cold.peak_ram_mb
    usage.current_ssd_mb = cold.ssd_mb
    usage.peak_ssd_mb = cold.peak_ssd_mb
    for i in range(WINDOWS):
        usage.requests_this[i] = requests_used(row, cold, i)
        usage.tokens_this[i] = tokens_used(row, cold, i)
        read_limit(usage, LIMIT_CODES[i][False], cold.request_limit[i], <uint64_t> usage.requests_this[i])
        read_limit(usage, LIMIT_CODES[i][True], cold.token_limit[i], <uint64_t> usage.tokens_this[i])
    read_rate(row, cold, False, usage)
    read_rate(row, cold, True, usage)
    read_limit(usage, RAM_MB, cold.max_ram_mb, in_use(cold.ram_mb, cold.reserved_ram_mb))
    read_limit(usage, SSD_MB, cold.max_ssd_mb, in_use(cold.ssd_mb, cold.reserved_ssd_mb))
    read_limit(usage, CONCURRENCY, cold.max_concurrent, <uint64_t> cold.concurrent)
    read_limit(usage, QUEUE_PLACE, cold.max_queued, <uint64_t> cold.waiting)
    usage.burst_requests_used = burst_used(&row.request_level, row.request_drain, row.request_shift)
    usage.burst_tokens_used = burst_used(&row.token_level, row.token_drain, row.token_shift)
    usage.ram_violations = <int64_t> cold.violations[0]
    usage.ssd_violations = <int64_t> cold.violations[1]
    usage.rate_violations = <int64_t> cold.violations[2]
    usage.quota_violations = <int64_t> cold.violations[3]
    usage.concurrency_violations = <int64_t> cold.violations[4]
    usage.total_violations = (usage.ram_violations + usage.ssd_violations + usage.rate_violations
                              + usage.quota_violations + usage.concurrency_violations)
    usage.reserved_ram_mb = cold.reserved_ram_mb
    usage.reserved_ssd_mb = cold.reserved_ssd_mb
    usage.concurrent_requests = cold.concurrent
    usage.queued_requests = cold.waiting
    usage.allowed_total = <int64_t> requests_charged(row, cold)
    usage.rejected_total = <int64_t> cold.rejected
    usage.throttled_total = <int64_t> cold.throttled
    usage.queued_total = <int64_t> cold.queued
    usage.warned_total = (usage.total_violations - usage.rejected_total - usage.throttled_total - usage.queued_total)
    usage.waited_total = <int64_t> cold.waited
    usage.tokens_total = tokens_charged(row, cold)
    usage.tokens_refunded_total = cold.tokens_refunded
    usage.waiting_requests = 0


cdef inline double share_of_one(int64_t limit) noexcept nogil:
    return 0.0 if limit == UNLIMITED else percent(1.0, <double> limit)


cdef inline void put_limits(Row* row, ColdRow* cold, const Limits* limits) noexcept nogil:
    """Replace the row's limits; its use is kept. Requires the row's lock."""
    cdef int i
    if (limits.requests_per_second != cold.requests_per_second or limits.tokens_per_second != cold.tokens_per_second
            or limits.request_shift != row.request_shift or limits.token_shift != row.token_shift):
        cold.level_epoch += 1
        cold.request_minimum[0] = cold.request_minimum[1] = cold.token_minimum[0] = cold.token_minimum[1] = 0
    change_rate(&row.request_level, &row.request_cap, &row.request_drain, &row.request_shift,
                &row.dormant_request_shift,
                &limits.request_cap, limits.request_drain, limits.request_shift,
                requests_in_slot(row, cold))
    change_rate(&row.token_level, &row.token_cap, &row.token_drain, &row.token_shift,
                &row.dormant_token_shift,
                &limits.token_cap, limits.token_drain, limits.token_shift,
                tokens_in_slot(row, cold))
    for i in range(WINDOWS):
        cold.request_limit[i] = limits.request_limits[i]
        cold.token_limit[i] = limits.token_limits[i]
        cold.request_percent[i] = share_of_one(limits.request_limits[i])
        cold.token_percent[i] = share_of_one(limits.token_limits[i])
    cold.request_level_percent = 0.0 if limits.request_shift == NO_RATE else 100.0 / as_double(&limits.request_cap)
    cold.token_level_percent = 0.0 if limits.token_shift == NO_RATE else 100.0 / as_double(&limits.token_cap)
    cold.max_ram_mb = limits.max_ram_mb
    cold.max_ssd_mb = limits.max_ssd_mb
    cold.max_concurrent = limits.max_concurrent
    cold.ram_percent = share_of_one(limits.max_ram_mb)
    cold.ssd_percent = share_of_one(limits.max_ssd_mb)
    cold.concurrent_percent = share_of_one(limits.max_concurrent)
    cold.max_queued = limits.max_queued
    cold.burst_requests = limits.burst_requests
    cold.burst_tokens = limits.burst_tokens
    cold.requests_per_second = limits.requests_per_second
    cold.tokens_per_second = limits.tokens_per_second
    cold.grace_period_sec = limits.grace_period_sec
    cold.action = limits.action
    row.shadow = limits.shadow
    measure_room(row, cold)


cdef inline void read_limits(const Row* row, const ColdRow* cold, Limits* limits) noexcept nogil:
    """Read the configured part of the limits, without what encode_rate() derives. Requires the row's lock."""
    cdef int i
    for i in range(WINDOWS):
        limits.request_limits[i] = cold.request_limit[i]
        limits.token_limits[i] = cold.token_limit[i]
    limits.max_ram_mb = cold.max_ram_mb
    limits.max_ssd_mb = cold.max_ssd_mb
    limits.max_concurrent = cold.max_concurrent
    limits.max_queued = cold.max_queued
    limits.burst_requests = cold.burst_requests
    limits.burst_tokens = cold.burst_tokens
    limits.requests_per_second = cold.requests_per_second
    limits.tokens_per_second = cold.tokens_per_second
    limits.grace_period_sec = cold.grace_period_sec
    limits.action = cold.action
    limits.shadow = row.shadow


cdef inline uint64_t mixed(uint64_t digest, uint64_t value) noexcept nogil:
    """One step of a 64-bit mix (the finalizer of MurmurHash3, Appleby)."""
    digest ^= value
    digest ^= digest >> 33
    digest *= <uint64_t> 0xFF51AFD7ED558CCD
    digest ^= digest >> 33
    digest *= <uint64_t> 0xC4CEB9FE1A85EC53
    return digest ^ digest >> 33


cdef inline uint64_t bits_of(double value) noexcept nogil:
    cdef uint64_t bits
    memcpy(&bits, &value, sizeof(bits))
    return bits


cdef inline uint64_t limits_digest(const Limits* limits) noexcept nogil:
    """A digest of the configured part, to see whether limits have changed."""
    cdef uint64_t digest = 0
    cdef int i
    for i in range(WINDOWS):
        digest = mixed(digest, <uint64_t> limits.request_limits[i])
        digest = mixed(digest, <uint64_t> limits.token_limits[i])
    digest = mixed(digest, <uint64_t> limits.max_ram_mb)
    digest = mixed(digest, <uint64_t> limits.max_ssd_mb)
    digest = mixed(digest, <uint64_t> limits.max_concurrent)
    digest = mixed(digest, <uint64_t> limits.max_queued)
    digest = mixed(digest, <uint64_t> limits.burst_requests)
    digest = mixed(digest, <uint64_t> limits.burst_tokens)
    digest = mixed(digest, bits_of(limits.requests_per_second))
    digest = mixed(digest, bits_of(limits.tokens_per_second))
    digest = mixed(digest, bits_of(limits.grace_period_sec))
    return mixed(digest, <uint64_t> limits.action << 16 | limits.shadow)


cdef inline bint same_limits(const Limits* a, const Limits* b) noexcept nogil:
    """Whether the configured parts are equal."""
    cdef int i
    for i in range(WINDOWS):
        if a.request_limits[i] != b.request_limits[i] or a.token_limits[i] != b.token_limits[i]:
            return False
    return (
        a.max_ram_mb == b.max_ram_mb
        and a.max_ssd_mb == b.max_ssd_mb
        and a.max_concurrent == b.max_concurrent
        and a.max_queued == b.max_queued
        and a.burst_requests == b.burst_requests
        and a.burst_tokens == b.burst_tokens
        and a.requests_per_second == b.requests_per_second
        and a.tokens_per_second == b.tokens_per_second
        and a.grace_period_sec == b.grace_period_sec
        and a.action == b.action
        and a.shadow == b.shadow
    )


cdef inline void start_row(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Initialize a model whose row and cold row are zero. Requires the row's lock."""
    row.level_ns = now_ns
    row.slot_end_ns = slot_start_ns(slot_at(now_ns) + 1)
    row.request_shift = row.token_shift = NO_RATE
    row.dormant_request_shift = row.dormant_token_shift = NO_RATE
