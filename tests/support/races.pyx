"""The C-level core on plain memory, from threads that never have the GIL: for ThreadSanitizer, see test_races.py.

One process, so all threads have one seat; a lock is taken by compare-and-swap all the same, and whoever finds it taken
waits. Every thread has a joint decision, grants, queue entries and handles of its own, and what threads share is what
processes share: rows, cold rows, entries, records and the header.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from modelquota._core.atomics cimport load_u32, load_u64, store_i64_relaxed
from modelquota._core.table.batch cimport Batch, charge_batch, check_batch, first_bad_code
from modelquota._core.row.advance cimport advance
from modelquota._core.row.decision cimport (
    LAST_TICKET, LOWEST_PRIORITY, NEVER, Request, Verdict, charge_tokens, is_trial
)
from modelquota._core.row.grant cimport refund, release_holding, settle_tokens
from modelquota._core.state.joint cimport (
    DECIDED, JointRequest, decide_rows, first_gone, lock_rows, put_in_order, unlock_rows
)
from modelquota._core.layout cimport (
    CHANGES, CHUNK, Charge, ColdRow, GrantRecord, Header, Limits, QueueEntry, Row, Seat, Shared, UNLIMITED, WINDOWS
)
from modelquota._core.row.level cimport NO_RATE
from modelquota._core.state.lock cimport SLICE_NS, unlock, wait_clock_ns
from modelquota._core.row.queue cimport drop_expired, link_entry, unlink_entry
from modelquota._core.state.registry cimport NAME_SHARE, add_model, remove_model, replace_limits, ring_size
from modelquota._core.state.repair cimport lock_row
from modelquota._core.row.limits cimport read_limits
from modelquota._core.row.usage cimport Usage, read_usage

cdef extern from "<pthread.h>" nogil:
    ctypedef unsigned long pthread_t
    int pthread_create(pthread_t* thread, void* attributes, void* (*start)(void*) noexcept nogil, void* argument)
    int pthread_join(pthread_t thread, void** result)

cdef enum:
    ROWS = 6
    THREADS = 6
    MEMBERS = 3
    ELEMENTS = 64
    TOKENS = 10
    WAIT_NS = 2_000_000     # how long an entry blocks others at most


cdef struct World:
    Shared shared
    int64_t end_ns
    Limits limits[2]


cdef struct Actor:
    World* world
    int number
    uint64_t random
    QueueEntry* entries     # MEMBERS of its own
    GrantRecord* records
    int64_t done[8]         # how often each of the deeds came to its end


cdef uint32_t draw(Actor* actor, uint32_t below) noexcept nogil:
    """A pseudo-random number (xorshift64, Marsaglia)."""
    actor.random ^= actor.random << 13
    actor.random ^= actor.random >> 7
    actor.random ^= actor.random << 17
    return <uint32_t> (actor.random >> 33) % below


cdef int64_t code_of(const Shared* shared, int64_t row) noexcept nogil:
    return <int64_t> (<uint64_t> load_u32(&shared.rows[row].generation) << 32 | <uint64_t> row)


cdef int work_off(Actor* actor, bint charging) noexcept nogil:
    """A batch over all rows."""
    cdef Shared* shared = &actor.world.shared
    cdef int64_t codes[ELEMENTS]
    cdef int64_t tokens[ELEMENTS]
    cdef uint8_t limits[ELEMENTS]
    cdef Batch batch
    cdef Verdict verdict
    cdef Py_ssize_t i
    for i in range(ELEMENTS):
        codes[i] = code_of(shared, i % ROWS)
        tokens[i] = 1
    memset(&batch, 0, sizeof(batch))
    batch.count = ELEMENTS
    batch.width = 1
    batch.codes = codes
    batch.tokens = tokens
    batch.limits = limits
    batch.now_ns = wait_clock_ns()
    if first_bad_code(codes, ELEMENTS, False, shared.rows, shared.header) < ELEMENTS:
        return False
    i = 0
    while i < ELEMENTS:
        i = charge_batch(&batch, shared, i) if charging else check_batch(&batch, shared, i, &verdict)
    return True


cdef void choose(Actor* actor, JointRequest* joint) noexcept nogil:
    """Some rows that differ, in any order."""
    cdef Shared* shared = &actor.world.shared
    cdef uint32_t first = draw(actor, ROWS)
    cdef uint32_t step = 1 if draw(actor, 2) else ROWS - 1
    cdef int i
    memset(joint, 0, sizeof(JointRequest))
    joint.count = MEMBERS
    for i in range(MEMBERS):
        joint.members[i].index = (first + <uint32_t> i * step) % ROWS
        joint.members[i].row = &shared.rows[joint.members[i].index]
        joint.members[i].cold = &shared.cold_rows[joint.members[i].index]
        joint.members[i].generation = load_u32(&joint.members[i].row.generation)
    put_in_order(joint)


cdef void parse_request(Request* request, int64_t tokens) noexcept nogil:
    memset(request, 0, sizeof(Request))
    request.tokens = request.kinds.count = tokens
    request.ram_mb = request.ssd_mb = 1
    request.ticket = LAST_TICKET
    request.priority = LOWEST_PRIORITY


cdef void finish(Actor* actor, JointRequest* joint, bint undo) noexcept nogil:
    """The end of a grant, as in grant.pyx: less was used than was estimated, or nothing at all, or more."""
    cdef Shared* shared = &actor.world.shared
    cdef int64_t now_ns = wait_clock_ns()
    cdef Row* row
    cdef ColdRow* cold
    cdef Charge more
    cdef int i
    for i in range(joint.count):
        row = joint.members[i].row
        cold = joint.members[i].cold
        while not lock_row(row, shared, SLICE_NS):
            pass
        if row.generation != joint.members[i].generation:
            joint.members[i].record.seat = 0
        else:
            advance(row, cold, now_ns)
            refund(row, cold, undo, joint.charges[i].tokens if undo else joint.charges[i].tokens // 2,
                   &joint.charges[i])
            if not undo:
                charge_tokens(row, cold, 1, is_trial(row, cold, shared.header.enforcing), &more)
            settle_tokens(cold, joint.members[i].record)
            release_holding(row, cold, joint.members[i].record)
        unlock(&row.lock)


cdef int decide_some(Actor* actor, bint holding) noexcept nogil:
    """A joint decision; what it holds is given back."""
    cdef Shared* shared = &actor.world.shared
    cdef JointRequest joint
    cdef Request request
    cdef Verdict verdict
    cdef int i
    choose(actor, &joint)
    parse_request(&request, TOKENS)
    for i in range(MEMBERS):
        joint.members[i].record = &actor.records[i] if holding else NULL
    if decide_rows(&joint, wait_clock_ns(), &request, holding, shared, SLICE_NS, &verdict) != DECIDED \
            or not verdict.allowed:
        return False
    if holding:
        finish(actor, &joint, draw(actor, 2))
    return True


cdef int stand_in_line(Actor* actor) noexcept nogil:
    """Places in the queues of some rows; a try as the one who waits there; and away, admitted or not."""
    cdef Shared* shared = &actor.world.shared
    cdef JointRequest joint
    cdef Request request
    cdef Verdict verdict
    cdef QueueEntry* entry
    cdef Row* row
    cdef bint admitted
    cdef int64_t now_ns
    cdef int i
    choose(actor, &joint)
    parse_request(&request, TOKENS)
    request.priority = <int> draw(actor, 3)
    request.ticket = wait_clock_ns()
    now_ns = wait_clock_ns()
    if not lock_rows(&joint, shared, SLICE_NS):
        return False
    if first_gone(&joint) >= 0:
        unlock_rows(&joint, joint.count)
        return False
    for i in range(MEMBERS):
        drop_expired(joint.members[i].row, joint.members[i].cold, shared.entries, now_ns, draw(actor, 2))
        entry = joint.members[i].entry = &actor.entries[i]
        entry.row = joint.members[i].index
        entry.generation = joint.members[i].generation
        entry.priority = request.priority
        entry.ticket = request.ticket
        store_i64_relaxed(&entry.deadline_ns, now_ns + WAIT_NS)
        entry.ready_ns = NEVER
        entry.limit = entry.aside = entry.counted = 0
        entry.seat = shared.me
        link_entry(joint.members[i].row, joint.members[i].cold, shared.entries, entry)
    unlock_rows(&joint, joint.count)
    for i in range(MEMBERS):
        joint.members[i].record = &actor.records[i]
    admitted = decide_rows(&joint, wait_clock_ns(), &request, True, shared, SLICE_NS, &verdict) == DECIDED \
        and verdict.allowed
    if admitted:
        finish(actor, &joint, False)
    for i in range(MEMBERS):
        entry = &actor.entries[i]
        store_i64_relaxed(&entry.deadline_ns, 0)
        row = &shared.rows[entry.row]
        while not lock_row(row, shared, SLICE_NS):
            pass
        if entry.linked and row.generation == entry.generation:
            unlink_entry(row, &shared.cold_rows[entry.row], shared.entries, entry)
        entry.linked = 0
        unlock(&row.lock)
        entry.seat = 0
    return admitted


cdef int change(Actor* actor) noexcept nogil:
    """Other limits, or a model that goes, and one that comes."""
    cdef Shared* shared = &actor.world.shared
    cdef Row* row = &shared.rows[draw(actor, ROWS)]
    cdef uint32_t generation = load_u32(&row.generation)
    cdef Limits* limits = &actor.world.limits[draw(actor, 2)]
    cdef char name[20]
    cdef uint64_t version
    if draw(actor, 8):
        return replace_limits(row, generation, limits, NULL, draw(actor, 2), wait_clock_ns(), shared, SLICE_NS) == 1
    if generation & 1:
        remove_model(row, generation, NULL, shared, SLICE_NS)
    memset(name, c"a" + actor.number, sizeof(name))
    version = load_u64(&shared.header.registry_version)
    return add_model(name, 1 + draw(actor, sizeof(name)), limits, draw(actor, 2), NULL, wait_clock_ns(), version,
                     &generation, shared, SLICE_NS) >= 0


cdef int look(Actor* actor) noexcept nogil:
    """What is read of a row."""
    cdef Shared* shared = &actor.world.shared
    cdef uint32_t index = draw(actor, ROWS)
    cdef Row* row = &shared.rows[index]
    cdef ColdRow* cold = &shared.cold_rows[index]
    cdef Usage usage
    cdef Limits limits
    cdef bint alive
    if not lock_row(row, shared, SLICE_NS):
        return False
    alive = row.generation & 1
    if alive:
        read_usage(row, cold, wait_clock_ns(), &usage)
        read_limits(row, cold, &limits)
    unlock(&row.lock)
    return alive


cdef void* act(void* argument) noexcept nogil:
    cdef Actor* actor = <Actor*> argument
    cdef uint32_t deed
    cdef int done
    while wait_clock_ns() < actor.world.end_ns:
        deed = draw(actor, 7)
        if deed <= 1:
            done = work_off(actor, deed == 1)
        elif deed <= 3:
            done = decide_some(actor, deed == 3)
        elif deed == 4:
            done = stand_in_line(actor)
        elif deed == 5:
            done = change(actor)
        else:
            done = look(actor)
        actor.done[deed] += done
    return NULL


cdef void put_fair_limits(Limits* limits, int64_t scale) noexcept:
    """Some that are reached and some that are not."""
    cdef int i
    memset(limits, 0, sizeof(Limits))
    limits.max_ram_mb = limits.max_ssd_mb = 4
    limits.max_concurrent = 3
    limits.max_queued = 4
    limits.requests_per_second = limits.tokens_per_second = 1e300
    limits.grace_period_sec = 1.0
    limits.request_shift = limits.token_shift = NO_RATE
    limits.action = 3
    for i in range(WINDOWS):
        limits.request_limits[i] = 2000 * scale
        limits.token_limits[i] = UNLIMITED if scale > 1 else 50_000


def race(double seconds):
    """Have all threads at it for so long. How often each deed was done, and what is left held or waiting (nothing)."""
    cdef World world
    cdef Actor actors[THREADS]
    cdef pthread_t threads[THREADS]
    cdef Shared* shared = &world.shared
    cdef uint32_t generation = 0
    cdef int64_t left = 0
    cdef int i, k
    cdef char name
    memset(&world, 0, sizeof(world))
    memset(actors, 0, sizeof(actors))
    shared.header = <Header*> calloc(1, sizeof(Header))
    shared.seats = <Seat*> calloc(1024, sizeof(Seat))
    shared.changes = <uint32_t*> calloc(CHANGES, sizeof(uint32_t))
    shared.entries = <QueueEntry*> calloc(THREADS * CHUNK, sizeof(QueueEntry))
    shared.grants = <GrantRecord*> calloc(THREADS * CHUNK, sizeof(GrantRecord))
    shared.rows = <Row*> calloc(ROWS, sizeof(Row))
    shared.cold_rows = <ColdRow*> calloc(ROWS, sizeof(ColdRow))
    for i in range(WINDOWS):
        shared.rings[i] = <char*> calloc(ROWS, ring_size(i))
    shared.names = <char*> calloc(ROWS, NAME_SHARE)
    shared.names_size = ROWS * NAME_SHARE
    shared.header.max_models = ROWS
    shared.header.enforcing = 1
    shared.header.staged_row = shared.header.leaving_row = -1
    shared.header.entry_chunks_used = shared.header.grant_chunks_used = THREADS
    shared.me = 1 << 10 | 1
    put_fair_limits(&world.limits[0], 1)
    put_fair_limits(&world.limits[1], 100)
    for i in range(ROWS):
        name = <char> (c"A" + i)
        if add_model(&name, 1, &world.limits[i % 2], i % 2, NULL, wait_clock_ns(), shared.header.registry_version,
                     &generation, shared, SLICE_NS) != i:
            raise AssertionError("a row was not free")
    world.end_ns = wait_clock_ns() + <int64_t> (seconds * 1e9)
    for i in range(THREADS):
        actors[i].world = &world
        actors[i].number = i
        actors[i].random = 88172645463325252 + 7919 * <uint64_t> i
        actors[i].entries = &shared.entries[i * CHUNK]
        actors[i].records = &shared.grants[i * CHUNK]
    with nogil:
        for i in range(THREADS):
            pthread_create(&threads[i], NULL, act, &actors[i])
        for i in range(THREADS):
            pthread_join(threads[i], NULL)
    for i in range(ROWS):
        left += shared.cold_rows[i].waiting + shared.cold_rows[i].concurrent + shared.cold_rows[i].reserved_ram_mb
        left += shared.cold_rows[i].reserved_tokens
    done = [sum([actors[i].done[k] for i in range(THREADS)]) for k in range(7)]
    for pointer in (<size_t> shared.header, <size_t> shared.seats, <size_t> shared.changes, <size_t> shared.entries,
                    <size_t> shared.grants, <size_t> shared.rows, <size_t> shared.cold_rows, <size_t> shared.names):
        free(<void*> <size_t> pointer)
    for i in range(WINDOWS):
        free(shared.rings[i])
    return done, left
