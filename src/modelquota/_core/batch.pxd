# Batches: the loops around one decision, wholly without the GIL. Codes are generation << 32 | row number.
from libc.stdint cimport int64_t, uint8_t, uint32_t
from modelquota._core.decision cimport (
    Ask, LAST_TICKET, LOWEST_PRIORITY, Verdict, charge_tokens, decide, pass_time
)
from modelquota._core.layout cimport Header, MAX_COUNT, Ledger, Row, Shared, SECOND, SLOTS
from modelquota._core.lock cimport unlock
from modelquota._core.repair cimport enter_row
from modelquota._core.window cimport slot_at

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void* address, int to_write, int locality) noexcept nogil
    int64_t read_count "__atomic_load_n"(const int64_t* word, int order) noexcept nogil
    const int ACQUIRE "__ATOMIC_ACQUIRE"

cdef enum:
    ROWS_AHEAD = 16         # a row is asked for so many elements early,
    SLOTS_AHEAD = 8         # and once it is there, what the end of its slot will touch
    LINE = 64


cdef struct Batch:
    Py_ssize_t count
    const int64_t* codes
    const int64_t* tokens
    const int64_t* times_ns     # or NULL: all at now_ns
    int64_t now_ns
    uint8_t* limits             # out
    int64_t* waits_ms           # out, or NULL


cdef inline uint32_t index_of(int64_t code) noexcept nogil:
    return <uint32_t> code


cdef inline uint32_t generation_of(int64_t code) noexcept nogil:
    return <uint32_t> (code >> 32)


cdef inline void prefetch_row(
    const Batch* batch, Row* rows, Ledger* ledgers, Py_ssize_t i, int64_t now_ns
) noexcept nogil:
    """Ask for the lines of models ahead; for many models memory, not arithmetic, is what takes the time."""
    cdef char* row
    cdef char* ledger
    cdef Row* near
    cdef int64_t position
    if i + ROWS_AHEAD < batch.count:
        row = <char*> &rows[index_of(batch.codes[i + ROWS_AHEAD])]
        prefetch(row, 1, 3)
        prefetch(row + LINE, 1, 3)
    if i + SLOTS_AHEAD < batch.count:
        near = &rows[index_of(batch.codes[i + SLOTS_AHEAD])]
        if now_ns >= near.slot_end_ns:
            ledger = <char*> &ledgers[index_of(batch.codes[i + SLOTS_AHEAD])]
            prefetch(ledger, 1, 3)
            prefetch(ledger + LINE, 1, 3)
            prefetch(ledger + 2 * LINE, 1, 3)
            position = (slot_at(near.slot_end_ns) + SLOTS - 1) % SLOTS
            prefetch(&(<Ledger*> ledger).tokens[SECOND][position], 1, 3)
            prefetch(&(<Ledger*> ledger).requests[SECOND][position], 1, 3)


cdef inline Py_ssize_t first_out_of_range(const int64_t* counts, Py_ssize_t n) noexcept nogil:
    """Index of the first count below 0 or above MAX_COUNT; n where there is none."""
    cdef Py_ssize_t i
    for i in range(n):
        if counts[i] < 0 or counts[i] > MAX_COUNT:
            return i
    return n


cdef inline Py_ssize_t first_bad_code(
    const int64_t* codes, Py_ssize_t n, Row* rows, const Header* header
) noexcept nogil:
    """Index of the first code that is no living model's; n where there is none."""
    cdef int64_t row_count = read_count(&header.row_count, ACQUIRE)
    cdef Py_ssize_t i
    for i in range(n):
        if i + ROWS_AHEAD < n:
            prefetch(&rows[index_of(codes[i + ROWS_AHEAD])], 1, 3)
        if <int64_t> index_of(codes[i]) >= row_count or not generation_of(codes[i]) & 1:
            return i
        if rows[index_of(codes[i])].generation != generation_of(codes[i]):
            return i
    return n


cdef inline Py_ssize_t check_batch(
    const Batch* batch, const Shared* shared, Py_ssize_t i, Verdict* verdict
) noexcept nogil:
    """Decide from element `i` on; stop behind one whose violation is to be logged. Returns where to go on.

    A model that was removed after the codes were validated has no limits any more: its requests are admitted.
    """
    cdef Row* rows = shared.rows
    cdef Ledger* ledgers = shared.ledgers
    cdef Ask ask
    cdef Row* row
    cdef int64_t now_ns
    ask.ram_mb = ask.ssd_mb = 0
    ask.ticket = LAST_TICKET
    ask.priority = LOWEST_PRIORITY
    ask.counted = NULL
    verdict.log_held = 0
    while i < batch.count:
        now_ns = batch.times_ns[i] if batch.times_ns else batch.now_ns
        prefetch_row(batch, rows, ledgers, i, now_ns)
        row = &rows[index_of(batch.codes[i])]
        ask.tokens = batch.tokens[i]
        verdict.allowed = True
        enter_row(row, shared)
        if row.generation == generation_of(batch.codes[i]):
            decide(row, &ledgers[index_of(batch.codes[i])], now_ns, &ask, shared.header.enforcing, verdict)
        unlock(&row.lock)
        batch.limits[i] = 0 if verdict.allowed else verdict.limit
        if batch.waits_ms:
            batch.waits_ms[i] = 0 if verdict.allowed else verdict.retry_after_ms
        i += 1
        if verdict.log_held:
            break
    return i


cdef inline void charge_batch(const Batch* batch, const Shared* shared) noexcept nogil:
    cdef Row* rows = shared.rows
    cdef Ledger* ledgers = shared.ledgers
    cdef Row* row
    cdef Py_ssize_t i
    for i in range(batch.count):
        prefetch_row(batch, rows, ledgers, i, batch.now_ns)
        row = &rows[index_of(batch.codes[i])]
        enter_row(row, shared)
        if row.generation == generation_of(batch.codes[i]):
            pass_time(row, &ledgers[index_of(batch.codes[i])], batch.now_ns)
            charge_tokens(row, &ledgers[index_of(batch.codes[i])], batch.tokens[i])
        unlock(&row.lock)
