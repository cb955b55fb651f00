# The lease of a state's shares: beginning and ending it, which process leads, and a wait for a call for an exchange.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset
from modelquota._core.atomics cimport (
    compiler_barrier, load_i64, load_u32, load_u64, store_i64, store_u32, swap_i64, swap_u32
)
from modelquota._core.layout cimport COMPONENTS, ColdRow, Header, Lease, NODE_BYTES, Row, Share, Shared
from modelquota._core.row.advance cimport advance
from modelquota._core.row.share cimport (
    NONE_NEEDED, adjust_share, apply_share, lease_phase, put_totals, put_used
)
from modelquota._core.row.window cimport requests_charged, tokens_charged
from modelquota._core.state.lock cimport has_other_process, is_gone, unlock
from modelquota._core.state.registry cimport (
    ANY_ROW, BOOTTIME, DONE, MONOTONIC, NOT_DONE, OTHER_VERSION, REGISTRY_BUSY, lock_registry, log_change,
    unlock_registry
)
from modelquota._core.state.repair cimport lock_row

cdef extern from *:
    """
    #include <linux/futex.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    /* Sleep until the word differs from `seen`, a wake-up or a signal arrives, or the time has passed. */
    static inline void mq_sleep_while(uint32_t *word, uint32_t seen, int64_t ns) {
        struct timespec rest = {ns / 1000000000, ns % 1000000000};
        syscall(SYS_futex, word, FUTEX_WAIT, seen, &rest, NULL, 0);
    }
    """
    void sleep_while "mq_sleep_while"(uint32_t* word, uint32_t seen, int64_t ns) noexcept nogil


cdef enum:
    ANY_TERM = 0


cdef struct Exchange:
    # What one row answers to an exchange. `asked` may be NULL: then nothing is changed.
    const int64_t* asked    # COMPONENTS of them, as are the next three
    int64_t* held
    int64_t* used
    int64_t* totals
    uint64_t* charged       # requests, tokens
    int64_t* peak
    int64_t* needed
    uint64_t* starved
    int64_t* waiting
    bint below_used         # whether a share may shrink below what is used
    uint32_t term           # in which `asked` holds; ANY_TERM = always
    bint overtaken          # this process does not lead in that term, and nothing was changed
    bint alive
    bint grown


cdef inline int begin_lease(
    const Shared* shared, uint32_t rule, int64_t retry_ns, int64_t boot_offset_ns, uint64_t version,
    int64_t patience_ns
) noexcept nogil:
    """Have every model that is registered from now on have a share, and go by CLOCK_BOOTTIME.

    Takes the registry's lock.
    OTHER_VERSION if the registry's version is not `version`. `boot_offset_ns` is what makes CLOCK_BOOTTIME the rows'
    time.
    """
    cdef Header* header = shared.header
    if not lock_registry(shared, patience_ns):
        return REGISTRY_BUSY
    if header.registry_version != version:
        unlock_registry(shared)
        return OTHER_VERSION
    if header.clock_kind == MONOTONIC:
        header.lease.clock_offset_ns = boot_offset_ns
        store_u32(&header.clock_kind, BOOTTIME)
    store_i64(&header.lease.retry_ns, retry_ns)
    store_u32(&header.lease.rule, rule)
    # who has reserved space for a row, but not for its share, does it again
    log_change(shared, ANY_ROW)
    unlock_registry(shared)
    return DONE


cdef inline int end_all_shares(const Shared* shared, bint if_alone, int64_t patience_ns) noexcept nogil:
    """Have no model have a share from now on; those that have one decide by the configured limits.

    NOT_DONE, and nothing is changed, if `if_alone` and another process or manager has a seat: one that begins to share
    at the same time has one already. Takes the registry's lock.
    """
    if not lock_registry(shared, patience_ns):
        return REGISTRY_BUSY
    if if_alone and has_other_process(shared):
        unlock_registry(shared)
        return NOT_DONE
    store_u32(&shared.header.lease.rule, 0)
    store_i64(&shared.header.lease.end_ns, 0)       # sharing that begins again has no lease at first
    log_change(shared, ANY_ROW)
    unlock_registry(shared)
    return DONE


# A copy of a state file has the lease of the original, and both would spend its shares. So beside the lease is the file
# for which it holds: who opens another one ends the lease. Of a file that is renamed it stays the same.

cdef inline uint64_t* file_of_lease(Header* header) noexcept nogil:
    """Shared.file of the file for which the lease holds; 0 = not yet known. It is only compared: any value is safe."""
    return <uint64_t*> (header + 1)


cdef inline bint has_other_lease(const Shared* shared) noexcept nogil:
    """Whether the lease is that of another file, of which this one is a copy."""
    cdef uint64_t file = load_u64(file_of_lease(shared.header))
    return file != 0 and file != shared.file


cdef inline void follow_lease_now(
    const Shared* shared, int64_t index, int64_t now_ns, int64_t patience_ns
) noexcept nogil:
    """Have a row see now that the lease has ended, and not at the end of a slot. Takes the row's lock.

    A row that stays locked is left out.
    """
    cdef Row* row = &shared.rows[index]
    cdef ColdRow* cold = &shared.cold_rows[index]
    if not lock_row(row, shared, patience_ns):
        return
    if row.generation % 2 == 1 and row.has_share:
        advance(row, cold, now_ns)
        apply_share(row, cold, lease_phase(&shared.header.lease, row.level_ns))
    unlock(&row.lock)


cdef inline uint32_t term_of(const Lease* lease) noexcept nogil:
    return load_u32(&lease.node_copy) >> 1


cdef inline bint leads_in(const Shared* shared, uint32_t term) noexcept nogil:
    """Whether this process still leads as it did when the term was read."""
    cdef const Lease* lease = &shared.header.lease
    return term == ANY_TERM or (load_u32(&lease.leader) == shared.me and term_of(lease) == term)


cdef inline bint exchange_row(
    const Shared* shared, int64_t index, uint32_t generation, int64_t now_ns, Exchange* exchange, int64_t patience_ns
) noexcept nogil:
    """Change a row's share, and report what it holds and uses; False if it stays locked. Takes the row's lock.

    A process may be stopped at any point, and another one leads when it goes on. So it is under the row's lock that it
    makes sure to lead: what it does then, the next leader finds, which needs the lock.
    """
    cdef Row* row = &shared.rows[index]
    cdef ColdRow* cold = &shared.cold_rows[index]
    cdef Share* share = &shared.shares[index]
    if not lock_row(row, shared, patience_ns):
        return False
    exchange.grown = False
    exchange.overtaken = not leads_in(shared, exchange.term)
    exchange.alive = not exchange.overtaken and row.generation == generation and row.has_share
    if exchange.alive:
        advance(row, cold, now_ns)
        put_used(row, cold, exchange.used)
        put_totals(row, cold, exchange.totals)
        if exchange.asked != NULL:
            exchange.grown = adjust_share(row, cold, exchange.asked, exchange.used, exchange.below_used,
                                          lease_phase(&shared.header.lease, row.level_ns))
        memcpy(exchange.held, share.held, sizeof(share.held))
        exchange.charged[0] = requests_charged(row, cold)
        exchange.charged[1] = tokens_charged(row, cold)
        exchange.peak[0] = share.peak_requests
        exchange.peak[1] = share.peak_tokens
        exchange.needed[0] = share.needed_tokens != NONE_NEEDED
        exchange.needed[1] = max(share.needed_tokens, <int64_t> 0)
        exchange.starved[0] = share.starved
        exchange.waiting[0] = cold.waiting
        if exchange.asked != NULL:
            share.peak_requests = share.peak_tokens = 0
            share.needed_tokens = NONE_NEEDED
            share.changed = share.called = 0
    unlock(&row.lock)
    return True


cdef inline uint32_t lead_host(const Shared* shared, int64_t now_ns, int64_t patience_ns) noexcept nogil:
    """The term in which this process leads, 0 if another one does.

    It leads from now on if no living process has said so for `patience_ns`. A term ends when another process begins to
    lead, and does not come again when this one does.
    """
    cdef Lease* lease = &shared.header.lease
    cdef uint32_t leader = load_u32(&lease.leader)
    cdef int64_t silent_ns = now_ns - load_i64(&lease.leader_ns)
    cdef uint32_t copy
    if leader != shared.me:
        if leader and 0 <= silent_ns <= patience_ns and not is_gone(leader, shared):
            return 0
        store_i64(&lease.leader_ns, now_ns)     # first: another process would find it silent
        if not swap_u32(&lease.leader, leader, shared.me):
            return 0
        # one that dies before the next line does not lead, and the one after it begins a term
        copy = load_u32(&lease.node_copy)
        while not swap_u32(&lease.node_copy, copy, (copy + 2) | 2):     # an odd term is not 0
            copy = load_u32(&lease.node_copy)
    store_i64(&lease.leader_ns, now_ns)
    return term_of(lease)


cdef inline bint set_lease_end(const Shared* shared, int64_t end_ns, uint32_t term) noexcept nogil:
    """Set the lease's end; False, and nothing is changed, if this process does not lead in the term."""
    cdef Lease* lease = &shared.header.lease
    cdef int64_t before = load_i64(&lease.end_ns)
    if term == ANY_TERM:
        store_i64(&lease.end_ns, end_ns)
        return True
    # an end that the next leader has set, after this process was stopped between the two, stays
    return leads_in(shared, term) and swap_i64(&lease.end_ns, before, end_ns)


cdef inline bint write_node_copy(
    const Shared* shared, const char* data, uint32_t size, uint32_t term
) noexcept nogil:
    """Replace what the node remembers: in the copy that does not count, and then that one counts.

    False if this process does not lead in the term.
    """
    cdef Lease* lease = &shared.header.lease
    cdef uint32_t copy = load_u32(&lease.node_copy)
    cdef uint32_t spare
    while leads_in(shared, term):
        spare = 1 - (copy & 1)
        memcpy(lease.node[spare], data, size)
        lease.node_size[spare] = size
        compiler_barrier()
        if swap_u32(&lease.node_copy, copy, copy ^ 1):
            return True
        copy = load_u32(&lease.node_copy)
    return False
