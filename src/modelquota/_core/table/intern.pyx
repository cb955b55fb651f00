"""The state: owns the memory, knows which model lives in which row, writes limits and reads use. The cold half of the core.

Nothing here decides. Critical sections are ``noexcept nogil`` from lock to unlock; whatever may raise comes before or after.
"""
cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from modelquota._core.row.decision cimport pass_time
from modelquota._core.layout cimport CHANGES, Header, Ledger, Limits, Row, Shared, VIOLATION_TYPES
from modelquota._core.row.level cimport empty_burst
from modelquota._core.state.lock cimport SLICE_NS, unlock
from modelquota._core.table.packing cimport pack, unpack
from modelquota._core.row.queue cimport count_counted, drop_expired
from modelquota._core.table.records cimport Records
from modelquota._core.state.registry cimport (
    ANY_ROW, DONE, NAME_UNIT, REGISTRY_BUSY, TABLE_FULL, enter, leave, lock_registry, replace_limits,
    unlock_registry
)
from modelquota._core.state.repair cimport lock_row, put_right, try_row
from modelquota._core.state.shared cimport SharedState
from modelquota._core.row.usage cimport Usage, read_limits, read_usage
from modelquota._core.row.window cimport requests_charged, tokens_charged

from modelquota.errors import CapacityError, UnknownModelError

cdef extern from *:
    uint64_t read_version "__atomic_load_n"(const uint64_t* word, int order) noexcept nogil
    uint32_t read_generation "__atomic_load_n"(const uint32_t* word, int order) noexcept nogil
    const int ACQUIRE "__ATOMIC_ACQUIRE"

cdef enum:
    READ_PATIENCE_NS = 20_000_000   # how long a reader waits for a row before it reads without its lock
    TOTALS_TRIES = 4


cdef struct Totals:
    uint64_t allowed
    uint64_t rejected
    uint64_t throttled
    uint64_t queued
    uint64_t waited
    uint64_t waiting
    uint64_t tokens
    uint64_t refunded
    uint64_t violations[5]


@cython.final
@cython.no_gc
cdef class RowRef:
    """A row and the generation in which it was found."""


@cython.no_gc_clear     # the mapping stays until the last grant has been released, whatever the order of collection
cdef class QuotaState(SharedState):
    """The models of a state, and the dict that interns a model id to its row."""

    def __cinit__(self, *args, **kwargs):
        self.interned = {}

    def __init__(self, *, path, max_models, clock, trust_file=False):
        super().__init__(path=path, max_models=max_models, clock=clock, trust_file=trust_file)
        self.refs = <PyObject**> calloc(self.shared.header.max_models, sizeof(PyObject*))
        if self.refs == NULL:
            raise MemoryError()
        self.look_around()

    def __dealloc__(self):
        cdef int64_t index
        if self.refs != NULL:
            for index in range(self.refs_used):
                Py_XDECREF(self.refs[index])
        free(self.refs)

    @property
    def enforcement_enabled(self):
        """False: every request is admitted, and counted all the same. Holds for all who share the state."""
        self.require_open()
        return self.shared.header.enforcing != 0

    @enforcement_enabled.setter
    def enforcement_enabled(self, value):
        self.require_open()
        self.shared.header.enforcing = 1 if value else 0
        self._pump_all()

    def list_models(self):
        """The ids of all models that have a quota."""
        self.require_open()
        self.look_around()
        return list(self.interned)

    # -- finding a row

    cdef RowRef find(self, str model_id):
        """The row of a model, or None."""
        cdef RowRef ref
        self.require_open()
        ref = self.interned.get(model_id)
        if ref is None or ref.row.generation != ref.generation:
            self.look_around()
            ref = self.interned.get(model_id)
        return ref

    cdef RowRef known(self, object model_id):
        cdef RowRef ref = self.find(plain_id(model_id))
        if ref is None:
            raise UnknownModelError(model_id)
        return ref

    cdef str name_of(self, int64_t index):
        """The name in a row; of one that is just being replaced perhaps a mixture, so for words only."""
        cdef Ledger* ledger = &self.shared.ledgers[index]
        cdef char* name = self.shared.names + <int64_t> ledger.name_offset * NAME_UNIT
        return name[:ledger.name_size].decode("utf-8", "replace")

    cdef int freed(self, RowRef ref) except -1:
        """Something has become free: those who wait in this process may try again."""
        return 0

    cdef int look_for_dead(self) except -1:
        """Somebody is held up by what others hold, or wants to know: see whether those are still alive."""
        if self.sweep_if_due():
            self._pump_all()
        return 0

    # -- rows come and go

    cdef int look_around(self) except -1:
        """Learn which models have entered and left since the last look, whichever process they came by.

        The change log says which rows to look at; if more has changed than it holds, all are.
        """
        cdef uint64_t version = read_version(&self.shared.header.registry_version, ACQUIRE)
        cdef uint64_t change
        cdef uint32_t index
        if version == self.seen_version:
            return 0
        if version - self.seen_version <= CHANGES // 2:
            for change in range(self.seen_version, version):
                index = self.shared.changes[change % CHANGES]
                if index == ANY_ROW or not self.look_at(index):
                    break
            else:
                # what was read has not been overwritten meanwhile
                if read_version(&self.shared.header.registry_version, ACQUIRE) - self.seen_version <= CHANGES:
                    self.seen_version = version
                    return 0
        if self.look_at_all():
            self.seen_version = version
        return 0

    cdef int look_at_all(self) except -1:
        """look_at() each row."""
        cdef int64_t index
        for index in range(self.shared.header.row_count):
            if not self.look_at(index):
                return False
        return True

    cdef int look_at(self, int64_t index) except -1:
        """See who lives in a row now; False if that is changing just now."""
        cdef uint32_t generation
        cdef RowRef ref = None
        if index >= self.shared.header.max_models:
            return True
        generation = read_generation(&self.shared.rows[index].generation, ACQUIRE)
        if self.refs[index] != NULL:
            ref = <RowRef> self.refs[index]
            if ref.generation == generation:
                return True
            self.drop(ref)
        if generation % 2 == 0:
            return True
        name = self.name_of(index)
        if read_generation(&self.shared.rows[index].generation, ACQUIRE) != generation:
            return False                # the next look sees it
        self.learn(name, index, generation)
        return True

    cdef int learn(self, object model_id, int64_t index, uint32_t generation) except -1:
        """Intern a model."""
        cdef RowRef ref, other
        if self.refs[index] != NULL:
            ref = <RowRef> self.refs[index]
            if ref.generation == generation:
                return 0
            self.drop(ref)
        other = self.interned.get(model_id)
        if other is not None:
            if other.row.generation == other.generation:
                return 0                # a name that was just read is a mixture of two
            self.drop(other)
        ref = RowRef.__new__(RowRef)
        ref.model_id = model_id
        ref.row = &self.shared.rows[index]
        ref.ledger = &self.shared.ledgers[index]
        ref.generation = generation
        self.interned[model_id] = ref
        Py_INCREF(ref)
        self.refs[index] = <PyObject*> ref
        self.refs_used = max(self.refs_used, index + 1)
        return 0

    cdef int drop(self, RowRef ref) except -1:
        """Forget a row that the model has left."""
        cdef int64_t index = ref.row - self.shared.rows
        if self.interned.get(ref.model_id) is ref:
            del self.interned[ref.model_id]
        if self.refs[index] == <PyObject*> ref:
            self.refs[index] = NULL
            Py_XDECREF(<PyObject*> ref)
        return 0

    def _put(self, str model_id not None, config, on_sight=False):
        """Register the model, or replace the limits of a known one and keep its use. `on_sight`: only if it is new."""
        cdef Limits limits
        cdef RowRef ref
        cdef int64_t index = REGISTRY_BUSY
        cdef int64_t now_ns
        cdef uint64_t version
        cdef uint32_t generation = 0
        cdef bytes name = model_id.encode()
        cdef const char* text = name
        cdef int64_t size = len(name)
        cdef bint sight = on_sight
        self.require_open()
        self.pack_limits(config, &limits)
        while True:
            version = read_version(&self.shared.header.registry_version, ACQUIRE)
            ref = self.find(model_id)
            if ref is not None and ref.row.generation != ref.generation:
                self.drop(ref)
                continue
            if ref is not None:
                if on_sight or self.change_limits(ref, &limits, NULL, True) == DONE:
                    return
                continue
            if version != self.seen_version:
                self.look_around()
                continue
            self.reserve_next_model()       # before another model comes, `version` is another one
            now_ns = self.now_ns()
            index = enter(text, size, &limits, sight, now_ns, version, &generation, &self.shared, 0)
            if index == REGISTRY_BUSY:
                self.inside += 1
                with nogil:
                    index = enter(text, size, &limits, sight, now_ns, version, &generation, &self.shared, SLICE_NS)
                self.exit()
            if index == TABLE_FULL:
                raise CapacityError(self.shared.header.max_models)
            if index == REGISTRY_BUSY:
                self.pause()
            if index >= 0:
                self.require_open()
                self.learn(model_id, index, generation)
                if self.seen_version == version:
                    self.seen_version = version + 1     # nobody else came or went
                return

    cdef int pack_limits(self, object config, Limits* limits) except -1:
        """The limits of a config as a row stores them. Of a template that many ids share, they are kept."""
        if config is not self.packed_config:
            pack(config, &self.packed)
            self.packed_config = config
        limits[0] = self.packed
        return 0

    cdef int change_limits(self, RowRef ref, const Limits* limits, const Limits* expected, bint named) except -2:
        """replace_limits(), however long the locks are held."""
        cdef int outcome
        cdef int64_t now_ns
        while True:
            now_ns = self.now_ns()
            outcome = replace_limits(ref.row, ref.generation, limits, expected, named, now_ns, &self.shared, 0)
            if outcome == REGISTRY_BUSY:
                self.inside += 1
                with nogil:
                    outcome = replace_limits(ref.row, ref.generation, limits, expected, named, now_ns, &self.shared,
                                             SLICE_NS)
                self.exit()
            if outcome == DONE:
                self.freed(ref)
            if outcome != REGISTRY_BUSY:
                return outcome
            self.pause()

    def _swap(self, old, new, named=False):
        """Put `new` in the place of `old`, a model's limits until now; False if it has others, or is gone.

        `named`: somebody configured this very id, which keeps it from being forgotten.
        """
        cdef Limits before, expected, limits
        cdef Usage usage
        cdef RowRef ref = self.find(old.model_id)
        pack(old, &before)
        pack(new, &limits)
        # As configs: callers try again with what get_quota() returns, which then cannot differ forever.
        if ref is None or not self.read(ref, self.now_ns(), &usage, &expected) or unpack(&before) != unpack(&expected):
            return False
        return self.change_limits(ref, &limits, &expected, named) == DONE

    def _forget(self, model_id):
        """Remove a model; True if it was known."""
        cdef RowRef ref
        cdef int outcome
        while True:
            ref = self.find(plain_id(model_id))
            if ref is None:
                return False
            outcome = leave(ref.row, ref.generation, &self.shared, 0)
            if outcome == REGISTRY_BUSY:
                self.inside += 1
                with nogil:
                    outcome = leave(ref.row, ref.generation, &self.shared, SLICE_NS)
                self.exit()
            if outcome == REGISTRY_BUSY:
                self.pause()
                continue
            self.drop(ref)
            self.freed(ref)
            return outcome == DONE

    # -- reading and stating

    cdef bint read(self, RowRef ref, int64_t now_ns, Usage* usage, Limits* limits) except -1:
        """Use, and limits unless they are NULL, under one lock; False if the model has been removed.

        Keeps the GIL unless the lock is held for long: a thread that gives the GIL away for each of a thousand rows waits
        a thousand times for busy threads to give it back. A row that stays locked is read as it is.
        """
        cdef bint alive
        if try_row(ref.row, &self.shared):
            return read_and_unlock(ref.row, ref.ledger, ref.generation, now_ns, &self.shared, usage, limits)
        self.inside += 1
        with nogil:
            if lock_row(ref.row, &self.shared, READ_PATIENCE_NS):
                alive = read_and_unlock(ref.row, ref.ledger, ref.generation, now_ns, &self.shared, usage, limits)
            else:
                alive = read_locked(ref.row, ref.generation, now_ns, &self.shared, usage, limits)
        self.exit()
        return alive

    def _read(self, model_id):
        """``(limits, usage)`` as keyword dicts, one consistent view; None for an unknown model."""
        cdef Usage usage
        cdef Limits limits
        cdef RowRef ref = self.find(plain_id(model_id))
        if ref is None:
            return None
        self.look_for_dead()
        return (unpack(&limits), usage) if self.read(ref, self.now_ns(), &usage, &limits) else None

    def _read_all(self):
        """A snapshot of all models, each read under its lock and all at one reading of the clock."""
        cdef int64_t now_ns = self.now_ns()
        cdef Py_ssize_t known = 0
        cdef RowRef ref
        self.require_open()
        self.look_around()
        self.look_for_dead()
        cdef dict found = self.interned.copy()      # another thread may add to it where read() waits
        cdef Records records = Records(len(found))
        for model_id, ref in found.items():
            if self.read(ref, now_ns, &records.first[known].usage, NULL):
                records.put_id(known, model_id)
                known += 1
        return records.array(known)

    def _totals(self):
        """Sums over all models, living and removed, and over checks of unknown ones."""
        cdef Totals totals
        cdef uint64_t version
        cdef int attempt
        cdef bint last
        self.require_open()
        self.inside += 1
        for attempt in range(TOTALS_TRIES):
            last = attempt == TOTALS_TRIES - 1
            version = read_version(&self.shared.header.registry_version, ACQUIRE)
            with nogil:
                if last:        # models come and go all the time: nobody may, while this sums up
                    last = lock_registry(&self.shared, READ_PATIENCE_NS)
                sum_totals(&self.shared, &totals)
                if last:
                    unlock_registry(&self.shared)
            if last or (self.shared.header.leaving_row < 0
                        and read_version(&self.shared.header.registry_version, ACQUIRE) == version):
                break
        self.exit()
        return {"allowed": totals.allowed, "rejected": totals.rejected, "throttled": totals.throttled,
                "queued": totals.queued, "waited": totals.waited, "waiting": totals.waiting, "tokens": totals.tokens,
                "tokens_refunded": totals.refunded, "recoveries": self.shared.header.recoveries,
                "violations": [totals.violations[kind] for kind in range(VIOLATION_TYPES)]}

    def _state_memory(self, model_id, int64_t ram_mb, int64_t ssd_mb):
        """Record what the model uses now, in MB, and its peaks."""
        cdef RowRef ref = self.known(model_id)
        cdef int outcome
        while True:
            outcome = record_memory(ref.row, ref.ledger, ref.generation, ram_mb, ssd_mb, &self.shared, 0)
            if outcome == REGISTRY_BUSY:
                self.inside += 1
                with nogil:
                    outcome = record_memory(ref.row, ref.ledger, ref.generation, ram_mb, ssd_mb, &self.shared, SLICE_NS)
                self.exit()
            if outcome != REGISTRY_BUSY:
                break
            self.pause()
        if outcome != DONE:
            raise UnknownModelError(model_id)
        self.freed(ref)

    def _empty_burst(self, model_id):
        """Set both levels to at most max(rate, 1)."""
        cdef RowRef ref = self.known(model_id)
        cdef int64_t now_ns
        cdef int outcome
        while True:
            now_ns = self.now_ns()
            outcome = forgive_burst(ref.row, ref.ledger, ref.generation, now_ns, &self.shared, 0)
            if outcome == REGISTRY_BUSY:
                self.inside += 1
                with nogil:
                    outcome = forgive_burst(ref.row, ref.ledger, ref.generation, now_ns, &self.shared, SLICE_NS)
                self.exit()
            if outcome != REGISTRY_BUSY:
                break
            self.pause()
        if outcome != DONE:
            raise UnknownModelError(model_id)
        self.freed(ref)


# From lock to unlock: each of these takes a row's lock, and none of them touches a Python object.

cdef inline bint read_and_unlock(
    Row* row, Ledger* ledger, uint32_t generation, int64_t now_ns, const Shared* shared, Usage* usage, Limits* limits
) noexcept nogil:
    """Read a row that is locked; False if the model has left it."""
    cdef bint alive = row.generation == generation
    if alive:
        if ledger.waiting != 0:
            drop_expired(row, ledger, shared.entries, now_ns, True)
        read_usage(row, ledger, now_ns, usage)
        if ledger.waiting != 0:
            usage.waiting_requests = count_counted(ledger, shared.entries)
        if limits != NULL:
            read_limits(row, ledger, limits)
    unlock(&row.lock)
    return alive


cdef bint read_locked(
    Row* row, uint32_t generation, int64_t now_ns, const Shared* shared, Usage* usage, Limits* limits
) noexcept nogil:
    """Read a row that a process which does not run has locked: a copy of it, put right as after a death."""
    cdef int64_t index = row - shared.rows
    cdef Row row_copy
    cdef Ledger ledger_copy
    row_copy = row[0]
    memcpy(&ledger_copy, &shared.ledgers[index], sizeof(Ledger))
    if row_copy.generation != generation:
        return False
    put_right(&row_copy, &ledger_copy, <uint32_t> index, shared)
    read_usage(&row_copy, &ledger_copy, now_ns, usage)
    if limits != NULL:
        read_limits(&row_copy, &ledger_copy, limits)
    return True


cdef void sum_totals(const Shared* shared, Totals* totals) noexcept nogil:
    """Sums over all models, living and removed. A row that stays locked is read as it is."""
    cdef Header* header = shared.header
    cdef Row* row
    cdef Ledger* ledger
    cdef int64_t i
    cdef int kind
    cdef bint locked
    totals.allowed = header.retired_allowed + header.unknown_checks
    totals.rejected = header.retired_rejected
    totals.throttled = header.retired_throttled
    totals.queued = header.retired_queued
    totals.waited = header.retired_waited
    totals.tokens = header.retired_tokens
    totals.refunded = header.retired_refunded
    totals.waiting = 0
    for kind in range(VIOLATION_TYPES):
        totals.violations[kind] = header.retired_violations[kind]
    for i in range(header.row_count):
        row = &shared.rows[i]
        ledger = &shared.ledgers[i]
        locked = lock_row(row, shared, READ_PATIENCE_NS)
        totals.allowed += requests_charged(row, ledger)
        totals.rejected += ledger.rejected
        totals.throttled += ledger.throttled
        totals.queued += ledger.queued
        totals.waited += ledger.waited
        totals.tokens += tokens_charged(row, ledger)
        totals.refunded += ledger.tokens_refunded
        if locked and ledger.waiting != 0:
            totals.waiting += count_counted(ledger, shared.entries)
        for kind in range(VIOLATION_TYPES):
            totals.violations[kind] += ledger.violations[kind]
        if locked:
            unlock(&row.lock)


cdef int record_memory(
    Row* row, Ledger* ledger, uint32_t generation, int64_t ram_mb, int64_t ssd_mb, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    cdef bint alive
    if not lock_row(row, shared, patience_ns):
        return REGISTRY_BUSY
    alive = row.generation == generation
    if alive:
        ledger.ram_mb = ram_mb
        ledger.ssd_mb = ssd_mb
        ledger.peak_ram_mb = max(ledger.peak_ram_mb, ram_mb)
        ledger.peak_ssd_mb = max(ledger.peak_ssd_mb, ssd_mb)
    unlock(&row.lock)
    return DONE if alive else 0


cdef int forgive_burst(
    Row* row, Ledger* ledger, uint32_t generation, int64_t now_ns, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    cdef bint alive, forgiven
    if not lock_row(row, shared, patience_ns):
        return REGISTRY_BUSY
    alive = row.generation == generation
    if alive:
        pass_time(row, ledger, now_ns)
        forgiven = empty_burst(&row.request_level, ledger.request_low, row.request_drain, row.request_shift)
        forgiven |= empty_burst(&row.token_level, ledger.token_low, row.token_drain, row.token_shift)
        if forgiven:
            ledger.level_epoch += 1
    unlock(&row.lock)
    return DONE if alive else 0
