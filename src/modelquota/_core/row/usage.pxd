# Usage: what can be read of a row. Every function here that takes a row or a cold row requires the row's lock.
from libc.stdint cimport int64_t, uint8_t, uint64_t
from modelquota._core.layout cimport ColdRow, LIMITS, LIMIT_CODES, Row, SECOND, UNLIMITED, WINDOWS, Wide
from modelquota._core.row.advance cimport advance
from modelquota._core.row.decision cimport CONCURRENCY, QUEUE_PLACE, RAM_MB, SSD_MB
from modelquota._core.row.fullest cimport in_use, percent, rate_in_use, round_to_50_bits
from modelquota._core.row.level cimport NO_RATE, NS_PER_SECOND, burst_used, load, wide
from modelquota._core.row.window cimport (
    is_counted, requests_charged, requests_used, tokens_charged, tokens_used
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
    NOT_COUNTED = -1        # of a window


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
        if not is_counted(cold, i):
            usage.requests_this[i] = usage.tokens_this[i] = NOT_COUNTED
            continue
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
