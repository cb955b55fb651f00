# Batches: the loops around one decision, entirely without the GIL. Codes are generation << 32 | row number.
from libc.stdint cimport int64_t, uint8_t, uint32_t
from modelquota._core.atomics cimport load_char_relaxed, load_i64, load_u32_relaxed
from modelquota._core.layout cimport Charge, ColdRow, Header, MAX_COUNT, Row, SECOND, SLOTS, Shared
from modelquota._core.row.decision cimport (
    LAST_TICKET, LOWEST_PRIORITY, Request, Verdict, advance, charge_tokens, decide, is_trial, unlikely
)
from modelquota._core.row.window cimport slot_at
from modelquota._core.state.lock cimport SLICE_NS, try_lock, unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:
    BLOCK = 16              # elements whose memory is fetched together
    LINE = 64


cdef struct Batch:
    Py_ssize_t count
    const int64_t* codes
    const int64_t* tokens
    const int64_t* times_ns     # or NULL: all at now_ns
    int64_t now_ns
    uint8_t* limits             # out
    int64_t* waits_ms           # out, or NULL
    bint others_may_free                # out: a request was denied because of what others hold
    bint waits                  # out: the next element's row stayed locked; its owner is probably not running


cdef inline uint32_t index_of(int64_t code) noexcept nogil:
    return <uint32_t> code


cdef inline uint32_t generation_of(int64_t code) noexcept nogil:
    return <uint32_t> (code >> 32)


cdef inline void fetch(const void* address) noexcept nogil:
    """Touch a byte to load its cache line."""
    load_char_relaxed(<const char*> address)


cdef inline void fetch_block(
    const Batch* batch, Row* rows, ColdRow* cold_rows, Py_ssize_t first, int64_t now_ns, bint charging
) noexcept nogil:
    """Load what BLOCK elements from `first` on will touch; with many models memory, not arithmetic, takes the time.

    The loops are tight enough for the processor to have all these reads in flight at once. They are reads because a
    prefetch is dropped if its page is not in the TLB. Needs no lock.
    """
    cdef Py_ssize_t last = min(first + BLOCK, batch.count)
    cdef Py_ssize_t i
    cdef Row* row
    cdef ColdRow* cold
    cdef int64_t position
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        fetch(row)
        fetch(<char*> row + LINE)
        if charging:
            fetch(&cold_rows[index_of(batch.codes[i])])
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        if now_ns >= row.slot_end_ns:       # without the lock: a wrong guess costs a line too many or too few
            cold = &cold_rows[index_of(batch.codes[i])]
            position = (slot_at(row.slot_end_ns) + SLOTS - 1) % SLOTS
            fetch(cold)
            fetch(<char*> cold + 2 * LINE)
            fetch(<char*> cold + 3 * LINE)
            fetch(&cold.tokens[SECOND][position])
            fetch(&cold.requests[SECOND][position])


cdef inline Py_ssize_t first_out_of_range(const int64_t* counts, Py_ssize_t n) noexcept nogil:
    """Index of the first count below 0 or above MAX_COUNT; n if there is none."""
    cdef Py_ssize_t i
    for i in range(n):
        if counts[i] < 0 or counts[i] > MAX_COUNT:
            return i
    return n


cdef inline Py_ssize_t first_bad_code(
    const int64_t* codes, Py_ssize_t n, Row* rows, const Header* header
) noexcept nogil:
    """Index of the first code that does not belong to a living model; n if there is none. Needs no lock."""
    cdef int64_t row_count = load_i64(&header.row_count)
    cdef Py_ssize_t i
    for i in range(n):
        if <int64_t> index_of(codes[i]) >= row_count or not generation_of(codes[i]) & 1:
            return i
        if load_u32_relaxed(&rows[index_of(codes[i])].generation) != generation_of(codes[i]):
            return i
    return n


cdef inline Py_ssize_t check_batch(
    Batch* batch, const Shared* shared, Py_ssize_t i, Verdict* verdict
) noexcept nogil:
    """Decide from element `i` on; stop after one whose violation is to be logged, or at one whose row stays locked.
    Returns the index to continue from. Takes the rows' locks, one at a time.

    A model that was removed after the codes were validated no longer has limits: its requests are admitted.
    """
    cdef Row* rows = shared.rows
    cdef ColdRow* cold_rows = shared.cold_rows
    cdef Request request
    cdef Row* row
    cdef int64_t now_ns
    request.ram_mb = request.ssd_mb = 0
    request.ticket = LAST_TICKET
    request.priority = LOWEST_PRIORITY
    request.counted = NULL
    verdict.to_log = 0
    batch.waits = False
    while i < batch.count:
        now_ns = batch.times_ns[i] if batch.times_ns else batch.now_ns
        if i % BLOCK == 0:
            fetch_block(batch, rows, cold_rows, i, now_ns, False)
        row = &rows[index_of(batch.codes[i])]
        request.tokens = batch.tokens[i]
        verdict.allowed = True
        if unlikely(not try_lock(&row.lock, shared.me)) and not lock_row(row, shared, SLICE_NS):
            batch.waits = True
            break
        if row.generation == generation_of(batch.codes[i]):
            decide(row, &cold_rows[index_of(batch.codes[i])], shared.entries, now_ns, &request,
                   shared.header.enforcing, verdict)
        unlock(&row.lock)
        if verdict.allowed:
            batch.limits[i] = 0
        else:
            batch.limits[i] = verdict.limit
            batch.others_may_free = batch.others_may_free or verdict.worth_a_look
        if batch.waits_ms:
            batch.waits_ms[i] = 0 if verdict.allowed else verdict.retry_after_ms
        i += 1
        if verdict.to_log:
            break
    return i


cdef inline Py_ssize_t charge_batch(Batch* batch, const Shared* shared, Py_ssize_t i) noexcept nogil:
    """Charge from element `i` on; stop at one whose row stays locked. Returns the index to continue from.

    Takes the rows' locks, one at a time.
    """
    cdef Row* rows = shared.rows
    cdef ColdRow* cold_rows = shared.cold_rows
    cdef Row* row
    cdef ColdRow* cold
    cdef Charge charged
    batch.waits = False
    while i < batch.count:
        if i % BLOCK == 0:
            fetch_block(batch, rows, cold_rows, i, batch.now_ns, True)
        row = &rows[index_of(batch.codes[i])]
        if unlikely(not try_lock(&row.lock, shared.me)) and not lock_row(row, shared, SLICE_NS):
            batch.waits = True
            break
        if row.generation == generation_of(batch.codes[i]):
            cold = &cold_rows[index_of(batch.codes[i])]
            advance(row, cold, batch.now_ns)
            charge_tokens(row, cold, batch.tokens[i], is_trial(row, cold, shared.header.enforcing), &charged)
        unlock(&row.lock)
        i += 1
    return i
