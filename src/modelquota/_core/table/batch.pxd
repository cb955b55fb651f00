# Batches: the loops around one decision, entirely without the GIL. Codes are generation << 32 | row number.
from libc.stdint cimport int64_t, uint8_t, uint32_t
from modelquota._core.atomics cimport load_char_relaxed, load_i64, load_u32, load_u32_relaxed
from modelquota._core.layout cimport (
    Charge, ColdRow, Header, KINDS, MAX_COUNT, Row, SECOND, SLOTS, Shared, TRAIL
)
from modelquota._core.row.advance cimport advance, unlikely
from modelquota._core.row.decision cimport (
    LAST_TICKET, LOWEST_PRIORITY, Request, Verdict, admit_in_batch, charge_in_batch, charge_tokens, decide, first_over,
    is_trial
)
from modelquota._core.row.grant cimport Holding
from modelquota._core.row.share cimport share_of
from modelquota._core.row.tokens cimport count_at, weigh, with_output
from modelquota._core.row.window cimport current_slot
from modelquota._core.state.joint cimport (
    BUSY_ROW, DECIDED, GONE, JointRequest, MOST_MODELS, NO_MEMBER, add_meters, decide_rows, first_gone, lock_rows,
    put_in_order, unlock_rows
)
from modelquota._core.state.lock cimport SLICE_NS, try_lock, unlock
from modelquota._core.state.repair cimport lock_row
from modelquota._core.state.state cimport rows_now_ns

cdef enum:
    BLOCK = 16              # elements whose memory is fetched together
    NO_CODE = 0             # of an element that has fewer models than others
    LINE = 64
    SHARE_LINES = 5

cdef enum:  # of an element, in addition to the outcomes of a joint decision
    TOO_MANY_MODELS = 4
    ADMITTED = 5            # at once: its verdict is not written
    SEVERAL = 6             # it has several models or meters, or none


cdef struct Batch:
    Py_ssize_t count
    int width                   # codes of one element
    const int64_t* codes
    const int64_t* tokens       # one of each element; or, if `split`, KINDS
    bint split
    const int64_t* times_ns     # or NULL: all at now_ns
    int64_t now_ns
    uint8_t* limits             # out
    int64_t* waits_ms           # out, or NULL
    int64_t violating           # out: the row that the last violation is about
    bint until_denied           # stop after the first element that is denied
    bint others_may_free                # out: a request was denied because of what others hold
    bint waits                  # out: the next element's row stayed locked; its owner is probably not running
    bint too_many               # out: the next element has more models and meters than one decision may have


cdef inline uint32_t index_of(int64_t code) noexcept nogil:
    return <uint32_t> code


cdef inline uint32_t generation_of(int64_t code) noexcept nogil:
    return <uint32_t> (code >> 32)


cdef inline void fetch(const void* address) noexcept nogil:
    """Touch a byte to load its cache line."""
    load_char_relaxed(<const char*> address)


cdef inline void fetch_block(
    const Batch* batch, Row* rows, ColdRow* cold_rows, Py_ssize_t first, int64_t now_ns
) noexcept nogil:
    """Load what BLOCK elements from `first` on will touch; with many models memory, not arithmetic, takes the time.

    The loops are tight enough for the processor to have all these reads in flight at once. They are reads because a
    prefetch is dropped if its page is not in the TLB. Needs no lock.
    """
    cdef Py_ssize_t last = min(first + BLOCK, batch.count)
    cdef Py_ssize_t i
    cdef int line
    cdef Row* row
    cdef ColdRow* cold
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        fetch(row)
        fetch(<char*> row + LINE)
        fetch(&row.trail_end_ns)
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        if now_ns >= row.trail_end_ns and row.trail == TRAIL:   # without the lock: a wrong guess costs some lines
            cold = &cold_rows[index_of(batch.codes[i])]
            fetch(&cold.request_floor)
            fetch(&cold.requests_mark)
            fetch(&cold.request_minimum)
            fetch(&cold.requests_base)
            fetch(&cold.requests_start)
            fetch(&cold.request_limit)
            fetch(&cold.ring_offset)
            if row.has_share:
                for line in range(SHARE_LINES):
                    fetch(<char*> share_of(cold) + line * LINE)
    for i in range(first, last):
        row = &rows[index_of(batch.codes[i])]
        if now_ns >= row.trail_end_ns and row.trail == TRAIL:
            cold = &cold_rows[index_of(batch.codes[i])]
            fetch(<char*> cold + cold.ring_offset[SECOND] + current_slot(row) % SLOTS * 2 * <int> sizeof(uint32_t))


cdef inline Py_ssize_t first_out_of_range(const int64_t* counts, Py_ssize_t n) noexcept nogil:
    """Index of the first count below 0 or above MAX_COUNT; n if there is none."""
    cdef Py_ssize_t i
    for i in range(n):
        if counts[i] < 0 or counts[i] > MAX_COUNT:
            return i
    return n


cdef inline Py_ssize_t first_bad_code(
    const int64_t* codes, Py_ssize_t n, bint several, Row* rows, const Header* header
) noexcept nogil:
    """Index of the first code that does not belong to a living model; n if there is none. Needs no lock."""
    cdef int64_t row_count = load_i64(&header.row_count)
    cdef Py_ssize_t i
    for i in range(n):
        if several and codes[i] == NO_CODE:
            continue
        if <int64_t> index_of(codes[i]) >= row_count or not generation_of(codes[i]) & 1:
            return i
        if load_u32_relaxed(&rows[index_of(codes[i])].generation) != generation_of(codes[i]):
            return i
    return n


cdef inline void read_kinds(const Batch* batch, Py_ssize_t i, Request* request) noexcept nogil:
    """The tokens of an element, from which follows what they count at each of its models."""
    cdef int kind
    request.kinds.split = batch.split
    if not batch.split:
        request.tokens = request.kinds.count = batch.tokens[i]
        return
    for kind in range(KINDS):
        request.kinds.counts[kind] = batch.tokens[i * KINDS + kind]


cdef inline bint gather(const Batch* batch, Py_ssize_t i, JointRequest* joint, const Shared* shared) noexcept nogil:
    """The models of an element and their meters, without those that have been removed; False if they are too many."""
    cdef int k
    cdef int64_t code
    cdef Holding* member
    joint.count = 0
    joint.unclaimed_until_ns = 0
    for k in range(batch.width):
        code = batch.codes[i * batch.width + k]
        if code == NO_CODE or load_u32(&shared.rows[index_of(code)].generation) != generation_of(code):
            continue
        member = &joint.members[joint.count]
        member.index = index_of(code)
        member.row = &shared.rows[member.index]
        member.cold = &shared.cold_rows[member.index]
        member.generation = generation_of(code)
        member.record = NULL
        member.entry = NULL
        joint.count += 1
    if not add_meters(joint, joint.count, shared):
        return False
    put_in_order(joint)
    return True


cdef inline Py_ssize_t first_too_many(Batch* batch, const Shared* shared) noexcept nogil:
    """Index of the first element with more models and meters than one decision may have; `count` if there is none.

    Needs no lock.
    """
    cdef JointRequest joint
    cdef Py_ssize_t i
    cdef int64_t code
    cdef int k, most
    for i in range(batch.count if batch.width > 1 else 0):      # the meters of one model always fit
        most = 0
        for k in range(batch.width):
            code = batch.codes[i * batch.width + k]
            if code != NO_CODE:
                most += 1 + shared.rows[index_of(code)].meters
        if most > MOST_MODELS and not gather(batch, i, &joint, shared):     # one may be the meter of another
            return i
    return batch.count


cdef inline int decide_several(
    Batch* batch, Py_ssize_t i, int64_t now_ns, const Request* request, const Shared* shared, Verdict* verdict
) noexcept nogil:
    """Decide an element that has several models or meters; an outcome of a joint decision, or TOO_MANY_MODELS.

    Takes the rows' locks.
    """
    cdef JointRequest joint
    cdef int outcome = GONE
    while outcome == GONE:
        if not gather(batch, i, &joint, shared):
            return TOO_MANY_MODELS
        outcome = decide_rows(&joint, now_ns, request, False, shared, SLICE_NS, verdict)
    if outcome == DECIDED and joint.violating != NO_MEMBER:
        batch.violating = joint.members[joint.violating].index
    return outcome


cdef inline void end_with_lease(Batch* batch, const Shared* shared) noexcept nogil:
    """Have the rest of a batch be decided at the time that it is now, if the lease has ended since the batch began.

    A process may be stopped in the middle of a batch, and go on much later.
    """
    cdef int64_t end_ns = load_i64(&shared.header.lease.end_ns)
    cdef int64_t now_ns
    if batch.times_ns == NULL and batch.now_ns < end_ns:
        now_ns = rows_now_ns(shared)
        if now_ns >= end_ns:
            batch.now_ns = now_ns


cdef inline Py_ssize_t check_batch(
    Batch* batch, const Shared* shared, Py_ssize_t i, Verdict* verdict
) noexcept nogil:
    """Decide from element `i` on; stop after one whose violation is to be logged, or, with `until_denied`, one that is
    denied, or at one whose row stays locked. Returns the index to continue from. Takes the rows' locks.

    A model that was removed after the codes were validated no longer has limits: its requests are admitted.
    """
    cdef Row* rows = shared.rows
    cdef ColdRow* cold_rows = shared.cold_rows
    cdef Request request
    cdef Row* row
    cdef ColdRow* cold
    cdef int64_t now_ns
    cdef uint32_t index
    cdef bint sharing = load_u32(&shared.header.lease.rule) != 0
    cdef int outcome
    request.ram_mb = request.ssd_mb = 0
    request.ticket = LAST_TICKET
    request.priority = LOWEST_PRIORITY
    request.counted = NULL
    verdict.to_log = 0
    batch.waits = batch.too_many = False
    while i < batch.count:
        if unlikely(sharing) and i % BLOCK == 0:
            end_with_lease(batch, shared)
        now_ns = batch.times_ns[i] if batch.times_ns else batch.now_ns
        outcome = SEVERAL
        if batch.width == 1:
            if i % BLOCK == 0:
                fetch_block(batch, rows, cold_rows, i, now_ns)
            index = index_of(batch.codes[i])
            row = &rows[index]
            if unlikely(not try_lock(&row.lock, shared.me)) and not lock_row(row, shared, SLICE_NS):
                batch.waits = True
                break
            if row.generation == generation_of(batch.codes[i]) and row.meters == 0:
                cold = &cold_rows[index]
                if unlikely(batch.split):
                    read_kinds(batch, i, &request)
                    request.tokens = count_at(cold, &request.kinds)
                else:
                    request.tokens = batch.tokens[i]
                outcome = ADMITTED
                if unlikely(not admit_in_batch(row, cold, now_ns, &request)):
                    outcome = DECIDED
                    decide(row, cold, shared.entries, now_ns, &request, shared.header.enforcing, verdict)
                    batch.violating = index
            unlock(&row.lock)
        if unlikely(outcome == SEVERAL):
            read_kinds(batch, i, &request)
            outcome = decide_several(batch, i, now_ns, &request, shared, verdict)
            if outcome != DECIDED:
                batch.waits = outcome == BUSY_ROW
                batch.too_many = outcome == TOO_MANY_MODELS
                break
        if outcome == ADMITTED or verdict.allowed:
            batch.limits[i] = 0
            if batch.waits_ms:
                batch.waits_ms[i] = 0
        else:
            batch.limits[i] = verdict.limit
            batch.others_may_free = batch.others_may_free or verdict.worth_a_look
            if batch.waits_ms:
                batch.waits_ms[i] = verdict.retry_after_ms
            if batch.until_denied:
                i += 1
                break
        i += 1
        if verdict.to_log:
            break
    return i


cdef inline int64_t added_at(const ColdRow* cold, const Request* request) noexcept nogil:
    """What tokens that are charged without a decision count at a model: plain ones are output tokens."""
    return weigh(cold, request.kinds.counts) if request.kinds.split else with_output(
        cold, &request.kinds, request.kinds.count)


cdef inline int charge_several(
    Batch* batch, Py_ssize_t i, const Request* request, uint8_t* over, const Shared* shared
) noexcept nogil:
    """Charge an element whose model has meters or weights, or of which it is asked what is over; an outcome of a joint
    decision. Takes the rows' locks."""
    cdef JointRequest joint
    cdef Holding* member
    cdef Charge charged
    cdef bint enforcing = shared.header.enforcing
    cdef int k
    joint.gone = 0
    while joint.gone != NO_MEMBER:
        if not gather(batch, i, &joint, shared):
            return TOO_MANY_MODELS
        if not lock_rows(&joint, shared, SLICE_NS):
            return BUSY_ROW
        joint.gone = first_gone(&joint)
        for k in range(joint.count if joint.gone == NO_MEMBER else 0):
            member = &joint.members[k]
            advance(member.row, member.cold, batch.now_ns)
            charge_tokens(member.row, member.cold, added_at(member.cold, request),
                          is_trial(member.row, member.cold, enforcing), &charged)
            if over != NULL and over[0] == 0:
                over[0] = first_over(member.row, member.cold)
        unlock_rows(&joint, joint.count)
    return DECIDED


cdef inline Py_ssize_t charge_batch(Batch* batch, const Shared* shared, Py_ssize_t i) noexcept nogil:
    """Charge from element `i` on; stop at one whose row stays locked. Returns the index to continue from.

    `batch.limits`, if it is not NULL, is set to the first limit that each element's models are over then, or 0.
    Takes the rows' locks.
    """
    cdef Row* rows = shared.rows
    cdef Request request
    cdef Row* row
    cdef uint8_t* over
    cdef uint32_t index
    cdef bint alone
    batch.waits = False
    while i < batch.count:
        if i % BLOCK == 0:
            fetch_block(batch, rows, shared.cold_rows, i, batch.now_ns)
        alone = batch.limits == NULL and not batch.split
        if alone:
            index = index_of(batch.codes[i])
            row = &rows[index]
            if unlikely(not try_lock(&row.lock, shared.me)) and not lock_row(row, shared, SLICE_NS):
                batch.waits = True
                break
            if row.generation == generation_of(batch.codes[i]):
                alone = not row.meters | row.weighted
                if alone:
                    charge_in_batch(row, &shared.cold_rows[index], batch.now_ns, batch.tokens[i],
                                    shared.header.enforcing)
            unlock(&row.lock)
        if not alone:
            read_kinds(batch, i, &request)
            over = NULL
            if batch.limits != NULL:
                over = &batch.limits[i]
                over[0] = 0
            if charge_several(batch, i, &request, over, shared) == BUSY_ROW:
                batch.waits = True
                break
        i += 1
    return i
