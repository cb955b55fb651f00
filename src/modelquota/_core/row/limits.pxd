# How limits are written to a row, read and compared. Every function here that takes a row or a cold row requires the
# row's lock.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy
from modelquota._core.layout cimport ALWAYS_COUNTED, ColdRow, KINDS, Limits, Row, Share, UNLIMITED, WINDOWS
from modelquota._core.row.level cimport NO_RATE, change_rate, store
from modelquota._core.row.share cimport (
    coarsen_rate, configure_share, lease_of, lease_phase, leave_limits, level_percent, share_of
)
from modelquota._core.row.tokens cimport MICRO
from modelquota._core.row.window cimport (
    NOT_KNOWN, begin_counting, drop_trail, is_counted, measure_room, requests_in_slot, slot_at, slot_start_ns,
    tokens_in_slot
)


cdef inline bint is_limited(const Limits* limits, int window) noexcept nogil:
    """Whether requests or tokens have a limit in the window."""
    return limits.request_limits[window] != UNLIMITED or limits.token_limits[window] != UNLIMITED


cdef inline bint is_weighted(const Limits* limits) noexcept nogil:
    """Whether a token of some kind does not count 1."""
    return not (limits.weights[0] == MICRO and limits.weights[1] == MICRO and limits.weights[2] == MICRO)


cdef inline uint32_t limited_windows(const Limits* limits) noexcept nogil:
    """A bit for each window in which something is limited."""
    cdef uint32_t windows = 0
    cdef int i
    for i in range(WINDOWS):
        windows |= <uint32_t> is_limited(limits, i) << i
    return windows


cdef inline void put_limits(Row* row, ColdRow* cold, const Limits* limits) noexcept nogil:
    """Replace the row's limits; its use is kept, and its share of them if it has one."""
    cdef Limits left
    cdef Share* share
    cdef int i
    if row.has_share:
        share = share_of(cold)
        left = limits[0]
        configure_share(share, &left)
        share.phase = lease_phase(lease_of(share), row.level_ns)
        leave_limits(share, left.request_shift, left.token_shift, share.phase, &left)
        limits = &left
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
        if not is_counted(cold, i) and is_limited(limits, i):
            begin_counting(row, cold, i)
        cold.request_limit[i] = limits.request_limits[i]
        cold.token_limit[i] = limits.token_limits[i]
    cold.request_level_percent = level_percent(&limits.request_cap, limits.request_shift)
    cold.token_level_percent = level_percent(&limits.token_cap, limits.token_shift)
    cold.max_ram_mb = limits.max_ram_mb
    cold.max_ssd_mb = limits.max_ssd_mb
    cold.max_concurrent = limits.max_concurrent
    cold.held_percent = NOT_KNOWN
    cold.max_queued = limits.max_queued
    cold.burst_requests = limits.burst_requests
    cold.burst_tokens = limits.burst_tokens
    cold.requests_per_second = limits.requests_per_second
    cold.tokens_per_second = limits.tokens_per_second
    cold.grace_period_sec = limits.grace_period_sec
    for i in range(KINDS):
        cold.weights[i] = limits.weights[i]
    row.weighted = is_weighted(limits)
    cold.unit = limits.unit
    cold.action = limits.action
    row.shadow = limits.shadow
    measure_room(row, cold)


cdef inline void read_limits(const Row* row, const ColdRow* cold, Limits* limits) noexcept nogil:
    """Read the configured part of the limits, without what encode_rate() derives and what a share leaves of them."""
    cdef const Share* share = share_of(cold)
    cdef int i
    for i in range(WINDOWS):
        limits.request_limits[i] = share.request_limit[i] if row.has_share else cold.request_limit[i]
        limits.token_limits[i] = share.token_limit[i] if row.has_share else cold.token_limit[i]
    limits.max_ram_mb = cold.max_ram_mb
    limits.max_ssd_mb = cold.max_ssd_mb
    limits.max_concurrent = share.max_concurrent if row.has_share else cold.max_concurrent
    limits.max_queued = cold.max_queued
    limits.burst_requests = cold.burst_requests
    limits.burst_tokens = cold.burst_tokens
    limits.requests_per_second = cold.requests_per_second
    limits.tokens_per_second = cold.tokens_per_second
    limits.grace_period_sec = cold.grace_period_sec
    for i in range(KINDS):
        limits.weights[i] = cold.weights[i]
    limits.unit = cold.unit
    limits.action = cold.action
    limits.shadow = row.shadow


cdef inline void read_all_limits(const Row* row, const ColdRow* cold, Limits* limits) noexcept nogil:
    """Read the limits as put_limits() was given them."""
    cdef const Share* share = share_of(cold)
    read_limits(row, cold, limits)
    limits.request_shift = row.request_shift
    limits.token_shift = row.token_shift
    limits.request_drain = share.request_drain if row.has_share else row.request_drain
    limits.token_drain = share.token_drain if row.has_share else row.token_drain
    limits.request_cap = share.request_cap if row.has_share else row.request_cap
    limits.token_cap = share.token_cap if row.has_share else row.token_cap
    if row.has_share:
        coarsen_rate(&limits.request_drain, &limits.request_cap, &limits.request_shift, share.request_finer)
        coarsen_rate(&limits.token_drain, &limits.token_cap, &limits.token_shift, share.token_finer)
    if row.request_shift == NO_RATE:    # what the row has is the dormant level's
        limits.request_drain = 0
        store(&limits.request_cap, 0)
    if row.token_shift == NO_RATE:
        limits.token_drain = 0
        store(&limits.token_cap, 0)


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
    for i in range(KINDS):
        digest = mixed(digest, <uint64_t> limits.weights[i])
    return mixed(digest, <uint64_t> limits.unit << 24 | <uint64_t> limits.action << 16 | limits.shadow)


cdef inline bint same_limits(const Limits* a, const Limits* b) noexcept nogil:
    """Whether the configured parts are equal."""
    cdef int i
    for i in range(WINDOWS):
        if a.request_limits[i] != b.request_limits[i] or a.token_limits[i] != b.token_limits[i]:
            return False
    for i in range(KINDS):
        if a.weights[i] != b.weights[i]:
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
        and a.unit == b.unit
        and a.action == b.action
        and a.shadow == b.shadow
    )


cdef inline void start_row(Row* row, ColdRow* cold, int64_t now_ns) noexcept nogil:
    """Initialize a model whose row and cold row are zero."""
    row.level_ns = now_ns
    row.slot_end_ns = row.trail_end_ns = slot_start_ns(slot_at(now_ns) + 1)
    drop_trail(row)
    cold.counted = ALWAYS_COUNTED
    row.request_shift = row.token_shift = NO_RATE
    row.dormant_request_shift = row.dormant_token_shift = NO_RATE
