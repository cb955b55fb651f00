"""Shares of limits that many hosts have in common, for the node that exchanges them with a store.

What a share is, and why it is safe, is at the top of ``row/share.pxd``. A share is a row of `COMPONENTS` int64:
ceilings of requests in a second, minute, hour, day and month, the same of tokens, drain and cap of the rate of requests
and of that of tokens in millionths, and concurrency. `UNLIMITED` as a limit is one that is not set, and as a share one
that leaves the whole limit; `KEEP` asks for no change.
"""
import numpy as np
cimport numpy as cnp
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from modelquota._core.atomics cimport load_i64, load_u32, load_u64, store_i64, store_u32, swap_u32
from modelquota._core.layout cimport (
    COMPONENTS as SIZE, Lease as LeaseFields, MAX_COUNT, MAX_TIME_NS, NODE_BYTES as MOST_BYTES, UNLIMITED as WHOLE
)
from modelquota._core.row.share cimport ALLOW, DENY, EQUAL_PARTS, KEEP as AS_IT_IS, RULE_BITS
from modelquota._core.state.clock cimport CLOCK_BOOTTIME, monotonic_ns, read_clock
from modelquota._core.state.lease cimport (
    ANY_TERM, Exchange, begin_lease, end_all_shares, exchange_row, lead_host, set_lease_end, sleep_while,
    write_node_copy
)
from modelquota._core.state.lock cimport SLICE_NS, has_other_process
from modelquota._core.state.registry cimport DONE, NOT_DONE, REGISTRY_BUSY, give_or_take_share
from modelquota._core.state.state cimport State
from modelquota._core.table.arrays cimport int64_copy
from modelquota._core.table.batch cimport generation_of, index_of
from modelquota._core.table.intern cimport RowRef
from modelquota._core.table.table cimport QuotaTable

from modelquota._core.state.mapping import clock_shift_ns
from modelquota._core.table.exchange import Exchanged, Lease, OvertakenError

cnp.import_array()

COMPONENTS = SIZE
UNLIMITED = WHOLE
KEEP = AS_IT_IS
NODE_BYTES = MOST_BYTES

cdef dict RULES = {"deny": DENY, "share": EQUAL_PARTS, "allow": ALLOW}
cdef dict RULE_NAMES = {rule: name for name, rule in RULES.items()}
cdef int64_t NAP_NS = 100_000_000       # the longest sleep without checking for signals
MOST_NODES = 2**30 - 1


def now_ns(QuotaTable table not None):
    """The state's time. With shares it goes on while the machine is suspended."""
    table.state.require_open()
    return table.state.now_ns()


cdef uint32_t rule_of(object on_lease_end, object nodes) except 0:
    if on_lease_end not in RULES:
        raise ValueError(f"on_lease_end is {on_lease_end!r}; give one of {', '.join(map(repr, RULES))}")
    return <uint32_t> RULES[on_lease_end] | <uint32_t> _integer("nodes", nodes, 1, MOST_NODES) << RULE_BITS


cdef object _integer(str name, object value, object least, object most):
    if not isinstance(value, int) and not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}; give an integer, {least} .. {most}")
    number = value.__index__()
    if not least <= number <= most:
        raise ValueError(f"{name} is {number}; give an integer, {least} .. {most}")
    return number


cdef int over_rows(State state, bint giving) except -1:
    """give_or_take_share() for all rows. Takes the registry's lock and the rows', one at a time."""
    cdef int64_t index
    cdef bint done
    for index in range(state.shared.header.row_count):
        done = False
        while not done:
            state.inside += 1
            with nogil:
                done = give_or_take_share(&state.shared, index, giving, SLICE_NS)
            state.exit()
            if not done:
                state.pause()
    return 0


def begin_sharing(QuotaTable table not None, *, on_lease_end="deny", nodes=1, retry_ns=10_000_000):
    """Have every model have a share from now on: those that have none get one of nothing.

    That lasts, in all processes of the state, until `end_sharing`. No lease is begun. The state goes by CLOCK_BOOTTIME
    from now on; a process that already uses the state follows within a second.

    Parameters
    ----------
    on_lease_end : str
        What holds when the lease has ended: ``"deny"`` admits nothing, ``"share"`` the configured limits divided by
        `nodes`, ``"allow"`` the configured limits.
    nodes : int
        1 .. 2**30 - 1.
    retry_ns : int
        The wait that a request is told that is denied for lack of share, in ns, 1 .. 2**61.
    """
    cdef State state = table.state
    cdef uint32_t rule = rule_of(on_lease_end, nodes)
    cdef int64_t retry = _integer("retry_ns", retry_ns, 1, MAX_TIME_NS)
    cdef uint64_t version
    cdef int64_t boot_offset_ns
    cdef int outcome = REGISTRY_BUSY
    state.require_open()
    while outcome != DONE:
        version = load_u64(&state.shared.header.registry_version)
        state.reserve_shares()
        boot_offset_ns = state.now_ns() - read_clock(CLOCK_BOOTTIME) + <int64_t> clock_shift_ns("boottime")
        state.inside += 1
        with nogil:
            outcome = begin_lease(&state.shared, rule, retry, boot_offset_ns, version, SLICE_NS)
        state.exit()
        if outcome == REGISTRY_BUSY:
            state.pause()
    state.adopt_clock()
    over_rows(state, True)
    state.wake(None)


def end_sharing(QuotaTable table not None, *, if_alone=False):
    """Have every model decide by its configured limits again, and end the lease; whether that was done.

    With `if_alone` it is not if another process or manager has the state open.
    """
    cdef State state = table.state
    cdef bint unless_others = bool(if_alone)
    cdef int outcome = REGISTRY_BUSY
    state.require_open()
    while outcome == REGISTRY_BUSY:
        state.inside += 1
        with nogil:
            outcome = end_all_shares(&state.shared, unless_others, SLICE_NS)
        state.exit()
        if outcome == REGISTRY_BUSY:
            state.pause()
    if outcome == NOT_DONE:
        return False
    over_rows(state, False)
    state.wake(None)
    return True


def is_sharing(QuotaTable table not None):
    """Whether the state's models have shares."""
    table.state.require_open()
    return load_u32(&table.shared.header.lease.rule) != 0


def set_lease_rule(QuotaTable table not None, *, on_lease_end, nodes, retry_ns):
    """Change what `begin_sharing` was given. Raises ValueError if the models have no shares."""
    cdef uint32_t rule = rule_of(on_lease_end, nodes)
    cdef int64_t retry = _integer("retry_ns", retry_ns, 1, MAX_TIME_NS)
    if not is_sharing(table):
        raise ValueError("the models have no shares: call begin_sharing first")
    store_i64(&table.shared.header.lease.retry_ns, retry)
    store_u32(&table.shared.header.lease.rule, rule)


cdef uint32_t term_from(object term) except? 0:
    return ANY_TERM if term is None else <uint32_t> _integer("term", term, 1, 2**31 - 1)


def renew_lease(QuotaTable table not None, end_ns, *, term=None):
    """Have shares hold until `end_ns` of the state's time, 0 .. 2**61, which may be earlier than before.

    A model sees it at the next exchange, or at a request: at the latest 1/60 s later, or in batches 1/4 s. With a
    `term`, raises `OvertakenError` if this process does not lead in it, see `lead`.
    """
    cdef int64_t end = _integer("end_ns", end_ns, 0, MAX_TIME_NS)
    cdef uint32_t only_in = term_from(term)
    table.state.require_open()
    if not set_lease_end(table.shared, end, only_in):
        raise OvertakenError


def end_lease(QuotaTable table not None):
    """End the lease now."""
    renew_lease(table, 0)


def read_lease(QuotaTable table not None):
    """The lease. `on_lease_end` is None if the models have no shares; `urgent` is for `wait_urgent`."""
    cdef LeaseFields* lease
    cdef uint32_t rule
    table.state.require_open()
    lease = &table.shared.header.lease
    rule = load_u32(&lease.rule)
    return Lease(load_i64(&lease.end_ns), RULE_NAMES.get(rule & ((1 << RULE_BITS) - 1)), rule >> RULE_BITS,
                 load_i64(&lease.retry_ns), load_u32(&lease.urgent))


def sharing_codes(QuotaTable table not None, changed=False):
    """The codes of all models that have a share; with `changed`, of those that are to be exchanged again.

    They are those that since their last exchange were registered, got other limits, were charged in a slot of 1/60 s
    that has ended, or denied a request for lack of share. First are those that call for an exchange: see `wait_urgent`.
    """
    cdef State state = table.state
    cdef bint only_changed = bool(changed)
    cdef int64_t index, count, place, calling = 0, last = 0
    cdef uint32_t generation
    state.require_open()
    count = load_i64(&state.shared.header.row_count)
    cdef cnp.ndarray codes = np.empty(count, np.int64)
    cdef int64_t* code = <int64_t*> cnp.PyArray_DATA(codes)
    state.inside += 1
    with nogil:
        for index in range(count):
            generation = load_u32(&state.shared.rows[index].generation)
            if generation & 1 and state.shared.rows[index].has_share and (
                    not only_changed or state.shared.shares[index].changed):
                place = last
                if only_changed and state.shared.shares[index].called:
                    place = calling     # the first of the others moves to the end
                    code[last] = code[calling]
                    calling += 1
                code[place] = <int64_t> (<uint64_t> generation << 32 | <uint64_t> index)
                last += 1
    state.exit()
    return codes[:last].copy()


def names_of(QuotaTable table not None, codes):
    """The ids of models by their codes; None for a model that has been removed."""
    cdef RowRef ref
    cdef list names = []
    table.state.require_open()
    for code in int64_copy(codes, "codes").tolist():
        ref = None
        if index_of(code) < table.shared.header.row_count:
            ref = table.interned.ref_at(index_of(code), generation_of(code))
        names.append(None if ref is None else ref.model_id)
    return names


def exchange_shares(QuotaTable table not None, codes, asked=None, below_used=False, *, term=None):
    """Change shares, and report what models hold and use, all at one clock reading.

    A component that is asked to grow is what was asked for afterwards; one that is asked to shrink is at least what is
    used, unless `below_used`. Waiting requests are tried again if anything has grown.

    Parameters
    ----------
    codes : int64 array, shape (n,)
        From `sharing_codes` or `QuotaTable.codes`.
    asked : int64 array, shape (n, COMPONENTS), optional
        0 .. 2**62, `UNLIMITED` or `KEEP`. Without it nothing is changed, and no note of what was needed is cleared.
    below_used : bool
        Whether a component that shrinks is what was asked for, even if more is used. Then the model admits nothing
        until enough has aged out.
    term : int, optional
        From `lead`. Raises `OvertakenError`, and changes nothing from then on, if this process does not lead in it.

    Returns
    -------
    Exchanged
        alive : bool, shape (n,)
            Whether the model is still there, and has a share.
        held, used, limits : int64, shape (n, COMPONENTS)
            The share now; what is used, more than the share if tokens were charged past it; and what is configured,
            of concurrency only with `cluster_concurrency`. Of a drain nothing is used; of a cap, the level, rounded up.
        charged : uint64, shape (n, 2)
            Requests and tokens ever, modulo 2**64; what was refunded is not subtracted.
        peak : int64, shape (n, 2)
            Most requests and tokens that were charged within 1/60 s, or in batches 1/4 s, since the last exchange.
        needed : int64, shape (n, 2)
            The largest request that was denied for lack of share since then: 1 and its tokens, otherwise zeros.
        starved : uint64, shape (n,)
            Requests that were denied for lack of share since the model was registered.
        waiting : int64, shape (n,)
            Requests that wait in the model's queue.
    """
    cdef State state = table.state
    cdef Exchange one
    cdef Py_ssize_t i = 0, count
    cdef int64_t row_count
    cdef int64_t at_ns
    cdef bint done = True
    cdef bint grown = False
    one.term = term_from(term)
    one.overtaken = False
    state.require_open()
    cdef cnp.ndarray rows = int64_copy(codes, "codes")
    count = rows.shape[0]
    cdef const int64_t* code = <const int64_t*> cnp.PyArray_DATA(rows)
    cdef cnp.ndarray wanted = None if asked is None else asked_shares(asked, count)
    cdef const int64_t* want = NULL if asked is None else <const int64_t*> cnp.PyArray_DATA(wanted)
    found = Exchanged(
        np.zeros(count, np.bool_), *(np.zeros((count, SIZE), np.int64) for _ in range(3)),
        np.zeros((count, 2), np.uint64), np.zeros((count, 2), np.int64), np.zeros((count, 2), np.int64),
        np.zeros(count, np.uint64), np.zeros(count, np.int64),
    )
    cdef uint8_t* alive = <uint8_t*> cnp.PyArray_DATA(found.alive)
    cdef int64_t* held = <int64_t*> cnp.PyArray_DATA(found.held)
    cdef int64_t* used = <int64_t*> cnp.PyArray_DATA(found.used)
    cdef int64_t* totals = <int64_t*> cnp.PyArray_DATA(found.limits)
    cdef uint64_t* charged = <uint64_t*> cnp.PyArray_DATA(found.charged)
    cdef int64_t* peak = <int64_t*> cnp.PyArray_DATA(found.peak)
    cdef int64_t* needed = <int64_t*> cnp.PyArray_DATA(found.needed)
    cdef uint64_t* starved = <uint64_t*> cnp.PyArray_DATA(found.starved)
    cdef int64_t* waiting = <int64_t*> cnp.PyArray_DATA(found.waiting)
    one.below_used = bool(below_used)
    at_ns = state.now_ns()
    while i < count:
        state.inside += 1
        with nogil:
            row_count = load_i64(&state.shared.header.row_count)
            while i < count:
                one.alive = False
                one.asked = &want[i * SIZE] if want != NULL else NULL
                one.held, one.used, one.totals = &held[i * SIZE], &used[i * SIZE], &totals[i * SIZE]
                one.charged, one.peak, one.needed = &charged[i * 2], &peak[i * 2], &needed[i * 2]
                one.starved, one.waiting = &starved[i], &waiting[i]
                if index_of(code[i]) < row_count and generation_of(code[i]) & 1:
                    done = exchange_row(&state.shared, index_of(code[i]), generation_of(code[i]), at_ns, &one, SLICE_NS)
                    if not done or one.overtaken:
                        break
                    grown = grown or (one.alive and one.grown)
                alive[i] = one.alive
                i += 1
        state.exit()
        if one.overtaken:
            break
        if i < count:
            state.pause()
    if grown:
        state.wake(None)
    if one.overtaken:
        raise OvertakenError
    return found


cdef cnp.ndarray asked_shares(object asked, Py_ssize_t count):
    cdef cnp.ndarray array = int64_copy(asked, "asked", 2)
    if array.ndim != 2 or array.shape[0] != count or array.shape[1] != SIZE:
        raise ValueError(f"asked has shape {(<object> array).shape}; give ({count}, {SIZE})")
    bad = np.argwhere((array < KEEP) | ((array > MAX_COUNT) & (array != UNLIMITED)))
    if bad.size:
        i, k = bad[0].tolist()
        raise ValueError(f"asked[{i}, {k}] is {array[i, k]}; give an integer, 0 .. 2**62, UNLIMITED or KEEP")
    return array


# -- the process that exchanges for the host

def wait_urgent(QuotaTable table not None, seen, timeout_sec):
    """Sleep until a model calls for an exchange, at most `timeout_sec` seconds; how often one has, modulo 2**32.

    One calls, once until its next exchange, if it denies a request for lack of share, or if what is left of a share
    that is not the whole limit lasts for less than half a second, at the rate of the last second. Returns at once if
    that number differs from `seen`.
    """
    cdef State state = table.state
    cdef uint32_t before = <uint32_t> _integer("seen", seen, 0, 2**32 - 1)
    cdef uint32_t urgent
    cdef int64_t end_ns = monotonic_ns() + <int64_t> round(min(max(float(timeout_sec), 0.0), 1e9) * 1e9)
    cdef int64_t left_ns
    cdef LeaseFields* lease
    state.require_open()
    while True:
        lease = &state.shared.header.lease
        urgent = load_u32(&lease.urgent)
        left_ns = min(end_ns - monotonic_ns(), NAP_NS)
        if urgent != before or left_ns <= 0:
            return urgent
        state.inside += 1
        with nogil:
            store_u32(&lease.sleepers, 1)
            sleep_while(&lease.urgent, before, left_ns)
        state.exit()
        state.pause()


def lead(QuotaTable table not None, patience_sec):
    """Whether this process exchanges shares for the host; says that it is alive. Call it again within `patience_sec`.

    One process at a time does. Another takes over when it has died or has not called this for `patience_sec` seconds.
    Returns the term, 1 .. 2**31 - 1, in which this process leads, the same one until another has led; otherwise 0.
    """
    cdef State state = table.state
    cdef int64_t patience_ns = <int64_t> round(min(max(float(patience_sec), 0.0), 1e9) * 1e9)
    state.require_open()
    return lead_host(&state.shared, monotonic_ns() - <int64_t> clock_shift_ns(), patience_ns)


def resign(QuotaTable table not None):
    """Leave it to another process at once to exchange shares for the host."""
    table.state.require_open()
    swap_u32(&table.shared.header.lease.leader, table.shared.me, 0)


def is_used_by_others(QuotaTable table not None):
    """Whether another living process, or another manager of this one, uses the state."""
    cdef State state = table.state
    cdef bint found
    state.require_open()
    state.inside += 1
    with nogil:
        found = has_other_process(&state.shared)
    state.exit()
    return found


def read_node(QuotaTable table not None):
    """What `write_node` wrote last, by any process of the state; empty at first."""
    cdef LeaseFields* lease
    cdef uint32_t place
    table.state.require_open()
    lease = &table.shared.header.lease
    place = load_u32(&lease.node_copy) & 1
    return (<char*> lease.node[place])[:min(lease.node_size[place], <uint32_t> MOST_BYTES)]


def write_node(QuotaTable table not None, bytes data not None, *, term=None):
    """Have the state remember up to `NODE_BYTES` bytes, as a whole or not at all. For the process that leads.

    With a `term`, raises `OvertakenError` if it does not lead in it, see `lead`.
    """
    cdef uint32_t only_in = term_from(term)
    if len(data) > MOST_BYTES:
        raise ValueError(f"data has {len(data)} bytes; at most {MOST_BYTES} are possible")
    table.state.require_open()
    if not write_node_copy(table.shared, data, <uint32_t> len(data), only_in):
        raise OvertakenError
