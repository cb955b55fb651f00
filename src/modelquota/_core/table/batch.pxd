# Batches: the loops around one decision, wholly without the GIL. Codes are generation << 32 | row number.
from libc.stdint cimport int64_t, uint8_t, uint32_t
from modelquota._core.layout cimport Charge, Header, MAX_COUNT, Ledger, Row, Shared, SECOND, SLOTS
from modelquota._core.row.decision cimport (
    Ask, LAST_TICKET, LOWEST_PRIORITY, Verdict, charge_tokens, decide, is_trial, pass_time, unlikely
)
from modelquota._core.row.window cimport slot_at
from modelquota._core.state.lock cimport SLICE_NS, try_lock, unlock
from modelquota._core.state.repair cimport lock_row

cdef extern from *:
    int64_t read_count "__atomic_load_n"(const int64_t* word, int order) noexcept nogil
    uint32_t read_generation "__atomic_load_n"(const uint32_t* word, int order) noexcept nogil
    char read_byte "__atomic_load_n"(const char* byte, int order) noexcept nogil
    const int ACQUIRE "__ATOMIC_ACQUIRE"
    const int RELAXED "__ATOMIC_RELAXED"

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
    bint held_up                # out: something was denied for what others hold
    bint waits                  # out: the next element's row is locked by a process that does not run


cdef inline uint32_t index_of(int64_t code) noexcept nogil:
    return <uint32_t> code


cdef inline uint32_t generation_of(int64_t code) noexcept nogil:
    return <uint32_t> (code >> 32)


cdef inline void fetch(const void* address) noexcept nogil:
    """Read a byte for nothing but to have its cache line."""
    read_byte(<const char*> address, RELAXED)


cdef inline void fetch_block(
    const Batch* batch, Row* rows, Ledger* ledgers, Py_ssize_t first, int64_t now_ns, bint charging
) noexcept nogil:
    """Fetch what BLOCK elements from `first` on will touch; for many models memory, not arithmetic, takes the time.

    In loops so tight that the processor has all these reads under way at once. They are reads, not prefetches, which
    are dropped where the page is in no TLB.
    """
    cdef Py_ssize_t last = min(first + BLOCK, batch.count)
    cdef Py_ssize_t i
    cdef Row* row
    cdef Ledger* ledger
    cdef int64_t position
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        fetch(row)
        fetch(<char*> row + LINE)
        if charging:
            fetch(&ledgers[index_of(batch.codes[i])])
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        if now_ns >= row.slot_end_ns:       # without the lock: a wrong guess costs a line too many or too few
            ledger = &ledgers[index_of(batch.codes[i])]
            position = (slot_at(row.slot_end_ns) + SLOTS - 1) % SLOTS
            fetch(ledger)
            fetch(<char*> ledger + 2 * LINE)
            fetch(<char*> ledger + 3 * LINE)
            fetch(&ledger.tokens[SECOND][position])
            fetch(&ledger.requests[SECOND][position])


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
        if <int64_t> index_of(codes[i]) >= row_count or not generation_of(codes[i]) & 1:
            return i
        if read_generation(&rows[index_of(codes[i])].generation, RELAXED) != generation_of(codes[i]):
            return i
    return n


cdef inline Py_ssize_t check_batch(
    Batch* batch, const Shared* shared, Py_ssize_t i, Verdict* verdict
) noexcept nogil:
    """Decide from element `i` on; stop behind one whose violation is to be logged, or at one whose row stays locked.
    Returns where to go on.

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
    batch.waits = False
    while i < batch.count:
        now_ns = batch.times_ns[i] if batch.times_ns else batch.now_ns
        if i % BLOCK == 0:
            fetch_block(batch, rows, ledgers, i, now_ns, False)
        row = &rows[index_of(batch.codes[i])]
        ask.tokens = batch.tokens[i]
        verdict.allowed = True
        if unlikely(not try_lock(&row.lock, shared.me)) and not lock_row(row, shared, SLICE_NS):
            batch.waits = True
            break
        if row.generation == generation_of(batch.codes[i]):
            decide(row, &ledgers[index_of(batch.codes[i])], shared.entries, now_ns, &ask, shared.header.enforcing, verdict)
        unlock(&row.lock)
        if verdict.allowed:
            batch.limits[i] = 0
        else:
            batch.limits[i] = verdict.limit
            batch.held_up = batch.held_up or verdict.worth_a_look
        if batch.waits_ms:
            batch.waits_ms[i] = 0 if verdict.allowed else verdict.retry_after_ms
        i += 1
        if verdict.log_held:
            break
    return i


cdef inline Py_ssize_t charge_batch(Batch* batch, const Shared* shared, Py_ssize_t i) noexcept nogil:
    """Charge from element `i` on; stop at one whose row stays locked. Returns where to go on."""
    cdef Row* rows = shared.rows
    cdef Ledger* ledgers = shared.ledgers
    cdef Row* row
    cdef Ledger* ledger
    cdef Charge charged
    batch.waits = False
    while i < batch.count:
        if i % BLOCK == 0:
            fetch_block(batch, rows, ledgers, i, batch.now_ns, True)
        row = &rows[index_of(batch.codes[i])]
        if unlikely(not try_lock(&row.lock, shared.me)) and not lock_row(row, shared, SLICE_NS):
            batch.waits = True
            break
        if row.generation == generation_of(batch.codes[i]):
            ledger = &ledgers[index_of(batch.codes[i])]
            pass_time(row, ledger, batch.now_ns)
            charge_tokens(row, ledger, batch.tokens[i], is_trial(row, ledger, shared.header.enforcing), &charged)
        unlock(&row.lock)
        i += 1
    return i
