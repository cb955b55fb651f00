# How full a model's limits are, in percent. Everything here requires the row's lock.
from libc.stdint cimport int64_t, uint64_t
from modelquota._core.layout cimport ColdRow, Row, SECOND, UNLIMITED, Wide, WINDOWS
from modelquota._core.row.advance cimport unlikely
from modelquota._core.row.level cimport NO_RATE, as_double
from modelquota._core.row.share cimport share_of
from modelquota._core.row.window cimport is_counted, requests_used, tokens_used

ctypedef void (*UsageMeasure)(const Row*, ColdRow*) noexcept nogil

cdef extern from *:
    UsageMeasure out_of_line "MQ_OUT_OF_LINE"(UsageMeasure function) noexcept nogil     # of advance.pxd

cdef inline double percent(double used, double limit) noexcept nogil:
    """Percent of a limit in use. A limit of 0 counts as 1, so that the result is finite."""
    return 100.0 * used / (limit if limit > 1.0 else 1.0)


cdef inline double share_of_one(int64_t limit) noexcept nogil:
    """Percent of a limit that one request, token or MB is; 0 if it is not set."""
    return 0.0 if limit == UNLIMITED else percent(1.0, <double> limit)


cdef inline double round_to_50_bits(double value) noexcept nogil:
    """Round to 50 bits (Veltkamp): drops the error of a product with a quotient, so that 7 of 7 is 100.0 %."""
    cdef double scaled = 9.0 * value
    return scaled - (scaled - value)


cdef inline double larger(double a, double b) noexcept nogil:
    return a if a > b else b


cdef inline uint64_t in_use(int64_t reported, int64_t reserved) noexcept nogil:
    """Memory that counts against a limit. Unsigned: twice MAX_COUNT is one more than an int64 holds."""
    return <uint64_t> reported + <uint64_t> reserved


cdef inline double total(int64_t reported, int64_t reserved, int64_t asked) noexcept nogil:
    return <double> reported + <double> reserved + <double> asked


cdef inline void find_fullest(
    const Row* row, const ColdRow* cold, bint of_tokens, int64_t* span, double* share, int64_t* floor
) noexcept nogil:
    """Find the fullest window, and the room down to which it stays the fullest: the others fill too, and some faster.

    The percent of each window is a line in what is charged, and the fullest window is their upper envelope.
    """
    cdef int64_t room = row.token_room if of_tokens else row.request_room
    cdef int64_t used
    cdef double shares[WINDOWS]
    cdef double percents[WINDOWS]
    cdef double more, least = 1e18
    cdef int fullest = SECOND
    cdef int i
    for i in range(WINDOWS):
        shares[i] = percents[i] = 0.0
        if not is_counted(cold, i):
            continue
        shares[i] = share_of_one(cold.token_limit[i] if of_tokens else cold.request_limit[i])
        used = tokens_used(row, cold, i) if of_tokens else requests_used(row, cold, i)
        percents[i] = <double> used * shares[i]
        more = percents[i] - percents[fullest]
        if i == fullest or more > 0.0 or (more == 0.0 and shares[i] > shares[fullest]):
            fullest = i
            span[0] = <int64_t> (<uint64_t> used + <uint64_t> room)
    share[0] = shares[fullest]
    for i in range(WINDOWS):
        if shares[i] > share[0]:
            more = (percents[fullest] - percents[i]) / (shares[i] - share[0]) - 1.0
            if more < least:
                least = more
    floor[0] = room - <int64_t> (least if least > 0.0 else 0.0)


cdef inline double held_usage(const ColdRow* cold, int64_t ram_mb, int64_t ssd_mb) noexcept nogil:
    """Percent of the fullest of memory, with this much more, and concurrency, with one grant more."""
    cdef double share = (<double> cold.concurrent + 1.0) * share_of_one(cold.max_concurrent)
    share = larger(share, total(cold.ram_mb, cold.reserved_ram_mb, ram_mb) * share_of_one(cold.max_ram_mb))
    return larger(share, total(cold.ssd_mb, cold.reserved_ssd_mb, ssd_mb) * share_of_one(cold.max_ssd_mb))


cdef inline void measure_usage(const Row* row, ColdRow* cold) noexcept nogil:
    """The rare part of highest_usage(): find again what the row's changes have left unknown."""
    if row.request_room < cold.request_floor:
        find_fullest(row, cold, False, &cold.request_span, &cold.request_percent, &cold.request_floor)
    if row.token_room < cold.token_floor:
        find_fullest(row, cold, True, &cold.token_span, &cold.token_percent, &cold.token_floor)
    if cold.held_percent < 0.0:
        cold.held_percent = held_usage(cold, 0, 0)


cdef inline int64_t less(int64_t span, int64_t room) noexcept nogil:
    """What is used of a span, modulo 2**64: a damaged file must not make it undefined."""
    return <int64_t> (<uint64_t> span - <uint64_t> room)


cdef inline double highest_usage(const Row* row, ColdRow* cold, int64_t ram_mb, int64_t ssd_mb) noexcept nogil:
    """Percent of the fullest limit after a request was charged; the memory that it asked for is added.

    Part of every check: only the windows that were found the fullest are asked, until another can be. Requires
    advance().
    """
    cdef UsageMeasure rare
    cdef double share
    if unlikely(row.request_room < cold.request_floor or row.token_room < cold.token_floor or cold.held_percent < 0.0):
        rare = out_of_line(measure_usage)
        rare(row, cold)
    share = as_double(&row.request_level) * cold.request_level_percent
    share = larger(share, as_double(&row.token_level) * cold.token_level_percent)
    share = larger(share, <double> less(cold.request_span, row.request_room) * cold.request_percent)
    share = larger(share, <double> less(cold.token_span, row.token_room) * cold.token_percent)
    share = larger(share, cold.held_percent)
    if unlikely(ram_mb | ssd_mb):
        share = larger(share, held_usage(cold, ram_mb, ssd_mb))
    return round_to_50_bits(share)


cdef inline void rate_in_use(
    const Row* row, const ColdRow* cold, bint of_tokens, double* used, double* bound
) noexcept nogil:
    """Use and bound of a rate: those of its window of a second, or of its level, whichever is fuller."""
    cdef const Wide* level = &row.token_level if of_tokens else &row.request_level
    cdef const Wide* cap = &row.token_cap if of_tokens else &row.request_cap
    cdef double rate = cold.tokens_per_second if of_tokens else cold.requests_per_second
    cdef double unit, level_used, level_bound
    used[0] = <double> (tokens_used(row, cold, SECOND) if of_tokens else requests_used(row, cold, SECOND))
    bound[0] = <double> (cold.token_limit[SECOND] if of_tokens else cold.request_limit[SECOND])
    if (row.token_shift if of_tokens else row.request_shift) == NO_RATE:
        return
    if row.has_share:
        cap = &share_of(cold).token_cap if of_tokens else &share_of(cold).request_cap
    unit = as_double(cap) / (larger(rate, 1.0) + <double> (cold.burst_tokens if of_tokens else cold.burst_requests))
    cap = &row.token_cap if of_tokens else &row.request_cap
    level_used = as_double(level) / unit
    level_bound = as_double(cap) / unit
    if percent(level_used, level_bound) > percent(used[0], bound[0]):
        used[0] = level_used
        bound[0] = level_bound
