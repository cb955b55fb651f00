"""The state: owns the memory, knows which model lives in which row, writes limits and reads use. The cold half of the core.

Nothing here decides. Critical sections are ``noexcept nogil`` from lock to unlock; whatever may raise comes before or after.
"""
cimport cython
import numpy as np
from libc.stdint cimport int64_t, uint32_t, uint64_t

from modelquota._core.decision cimport pass_time
from modelquota._core.layout cimport Header, Ledger, Limits, Row, VIOLATION_TYPES
from modelquota._core.level cimport empty_burst
from modelquota._core.lock cimport unlock
from modelquota._core.packing cimport pack, unpack
from modelquota._core.records cimport Records
from modelquota._core.registry cimport (
    NAME_UNIT, TABLE_FULL, enter, enter_registry, leave, leave_registry, replace_limits
)
from modelquota._core.repair cimport enter_row, try_row
from modelquota._core.shared cimport SharedState
from modelquota._core.usage cimport Usage, read_limits, read_usage
from modelquota._core.window cimport requests_charged

from modelquota.errors import CapacityError, UnknownModelError

cdef extern from *:
    uint64_t read_version "__atomic_load_n"(const uint64_t* word, int order) noexcept nogil
    uint32_t read_generation "__atomic_load_n"(const uint32_t* word, int order) noexcept nogil
    const int ACQUIRE "__ATOMIC_ACQUIRE"


@cython.final
@cython.no_gc
cdef class RowRef:
    """A row and the generation in which it was found."""


@cython.no_gc_clear     # the mapping stays until the last grant has been released, whatever the order of collection
cdef class QuotaState(SharedState):
    """The models of a state, and the dict that interns a model id to its row."""

    def __cinit__(self, *args, **kwargs):
        self.interned = {}

    def __init__(self, *, path, max_models, clock):
        super().__init__(path=path, max_models=max_models, clock=clock)
        self.seen = np.zeros(self.shared.header.max_models, np.uint32)
        self.look_around()

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

    cdef RowRef find(self, object model_id):
        """The row of a model, or None. TypeError where the id is no str."""
        cdef RowRef ref
        self.require_open()
        if not isinstance(model_id, str):
            raise TypeError(f"model_id is {model_id!r}; give a str")
        ref = self.interned.get(model_id)
        if ref is None or ref.row.generation != ref.generation:
            self.look_around()
            ref = self.interned.get(model_id)
        return ref

    cdef RowRef known(self, object model_id):
        cdef RowRef ref = self.find(model_id)
        if ref is None:
            raise UnknownModelError(model_id)
        return ref

    cdef str name_of(self, int64_t index):
        """The name in a row; of one that is just being replaced perhaps a mixture, so for words only."""
        cdef Ledger* ledger = &self.shared.ledgers[index]
        cdef char* name = self.shared.names + <int64_t> ledger.name_offset * NAME_UNIT
        return name[:ledger.name_size].decode("utf-8", "replace")

    cdef int freed(self, RowRef ref) except -1:
        """Something has become free: let those who wait in this process try again."""
        if ref.line is not None:
            ref.line.pump()
        return 0

    cdef int look_for_dead(self) except -1:
        """Somebody is held up by what others hold, or wants to know: see whether those are still alive."""
        if self.sweep_if_due():
            self._pump_all()
        return 0

    # -- rows come and go

    cdef int look_around(self) except -1:
        """Learn which models have entered and left since the last look, whichever process they came by."""
        cdef uint64_t version = read_version(&self.shared.header.registry_version, ACQUIRE)
        cdef int64_t index
        cdef uint32_t generation
        cdef RowRef ref
        cdef bint stale = False
        if version == self.seen_version:
            return 0
        for index in range(self.shared.header.row_count):
            generation = read_generation(&self.shared.rows[index].generation, ACQUIRE)
            if generation == self.seen[index]:
                continue
            stale = stale or self.seen[index] % 2 == 1
            self.seen[index] = 0
            if generation % 2 == 0:
                continue
            name = self.name_of(index)
            if read_generation(&self.shared.rows[index].generation, ACQUIRE) != generation:
                return 0        # it is changing just now; the next look sees it
            ref = self.interned.get(name)
            if ref is not None and ref.row.generation != ref.generation:
                self.drop(name, ref)
            self.learn(name, index, generation)
        if stale:
            for name, ref in list(self.interned.items()):
                if ref.row.generation != ref.generation:
                    self.drop(name, ref)
        self.seen_version = version
        return 0

    cdef int learn(self, object model_id, int64_t index, uint32_t generation) except -1:
        """Intern a model."""
        cdef RowRef ref
        if self.seen[index] == generation:
            return 0
        ref = RowRef.__new__(RowRef)
        ref.model_id = model_id
        ref.row = &self.shared.rows[index]
        ref.ledger = &self.shared.ledgers[index]
        ref.generation = generation
        self.seen[index] = generation
        self.interned.setdefault(model_id, ref)
        return 0

    cdef int drop(self, object model_id, RowRef ref) except -1:
        """Forget a row that another process has taken from the model."""
        if self.interned.get(model_id) is ref:
            del self.interned[model_id]
        return 0

    def _put(self, config, only_new=False):
        """Register the model, or replace the limits of a known one and keep its use."""
        cdef Limits limits
        cdef RowRef ref
        cdef int64_t index, now_ns = self.now_ns()
        cdef uint64_t version
        cdef uint32_t generation = 0
        cdef bytes name = config.model_id.encode()
        self.require_open()
        pack(config, &limits)
        while True:
            version = read_version(&self.shared.header.registry_version, ACQUIRE)
            ref = self.find(config.model_id)
            if ref is not None and ref.row.generation != ref.generation:
                self.drop(config.model_id, ref)
                continue
            if ref is not None:
                if only_new:
                    return
                if replace_limits(ref.row, ref.generation, &limits, NULL, now_ns, &self.shared):
                    self.freed(ref)
                    return
                continue
            if version != self.seen_version:
                self.look_around()
                continue
            self.reserve_next_model()       # before another model comes, `version` is another one
            index = enter(name, len(name), &limits, now_ns, version, &generation, &self.shared)
            if index == TABLE_FULL:
                raise CapacityError(self.shared.header.max_models)
            if index >= 0:
                self.learn(str.__str__(config.model_id), index, generation)
                if self.seen_version == version:
                    self.seen_version = version + 1     # nobody else came or went meanwhile
                return

    def _swap(self, old, new):
        """Put `new` in the place of `old`, a model's limits until now; False where it has others, or is gone."""
        cdef Limits expected, limits
        cdef RowRef ref = self.find(old.model_id)
        cdef int64_t now_ns = self.now_ns()
        pack(old, &expected)
        pack(new, &limits)
        if ref is None or not replace_limits(ref.row, ref.generation, &limits, &expected, now_ns, &self.shared):
            return False
        self.freed(ref)
        return True

    def _forget(self, model_id):
        """Remove a model; True if it was known."""
        cdef RowRef ref = self.find(model_id)
        cdef bint known
        if ref is None:
            return False
        known = leave(ref.row, ref.generation, &self.shared)
        self.drop(model_id, ref)
        self.freed(ref)
        return known

    # -- reading and stating

    cdef bint read(self, RowRef ref, int64_t now_ns, Usage* usage, Limits* limits) noexcept:
        """Use, and limits unless they are NULL, under one lock; False where the model has been removed.

        Keeps the GIL unless the lock is held for long: who gives the GIL away for each of a thousand rows waits a
        thousand times for busy threads to give it back.
        """
        cdef bint alive
        if not try_row(ref.row, &self.shared):
            with nogil:
                enter_row(ref.row, &self.shared)
        alive = ref.row.generation == ref.generation
        if alive:
            read_usage(ref.row, ref.ledger, now_ns, usage)
            if limits != NULL:
                read_limits(ref.ledger, limits)
        unlock(&ref.row.lock)
        return alive

    def _read(self, model_id):
        """``(limits, usage)`` as keyword dicts, one consistent view; None for an unknown model."""
        cdef Usage usage
        cdef Limits limits
        cdef RowRef ref = self.find(model_id)
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
        cdef Header* header = self.shared.header
        cdef Row* row
        cdef Ledger* ledger
        cdef int64_t i
        cdef int kind
        cdef uint64_t allowed, rejected, throttled, queued, waited
        cdef uint64_t violations[VIOLATION_TYPES]
        self.require_open()
        with nogil:
            enter_registry(&self.shared)
            allowed = header.retired_allowed + header.unknown_checks
            rejected = header.retired_rejected
            throttled = header.retired_throttled
            queued = header.retired_queued
            waited = header.retired_waited
            for kind in range(VIOLATION_TYPES):
                violations[kind] = header.retired_violations[kind]
            for i in range(header.row_count):
                row = &self.shared.rows[i]
                ledger = &self.shared.ledgers[i]
                enter_row(row, &self.shared)
                allowed += requests_charged(row, ledger)
                rejected += ledger.rejected
                throttled += ledger.throttled
                queued += ledger.queued
                waited += ledger.waited
                for kind in range(VIOLATION_TYPES):
                    violations[kind] += ledger.violations[kind]
                unlock(&row.lock)
            leave_registry(&self.shared)
        return {"allowed": allowed, "rejected": rejected, "throttled": throttled, "queued": queued, "waited": waited,
                "recoveries": header.recoveries, "violations": [violations[kind] for kind in range(VIOLATION_TYPES)]}

    def _state_memory(self, model_id, int64_t ram_mb, int64_t ssd_mb):
        """Record what the model uses now, in MB, and its peaks."""
        cdef RowRef ref = self.known(model_id)
        cdef Row* row = ref.row
        cdef Ledger* ledger = ref.ledger
        cdef bint alive
        with nogil:
            enter_row(row, &self.shared)
            alive = row.generation == ref.generation
            if alive:
                ledger.ram_mb = ram_mb
                ledger.ssd_mb = ssd_mb
                ledger.peak_ram_mb = max(ledger.peak_ram_mb, ram_mb)
                ledger.peak_ssd_mb = max(ledger.peak_ssd_mb, ssd_mb)
            unlock(&row.lock)
        if not alive:
            raise UnknownModelError(model_id)
        self.freed(ref)

    def _empty_burst(self, model_id):
        """Set both levels to at most max(rate, 1)."""
        cdef RowRef ref = self.known(model_id)
        cdef Row* row = ref.row
        cdef int64_t now_ns = self.now_ns()
        cdef bint alive, forgiven
        with nogil:
            enter_row(row, &self.shared)
            alive = row.generation == ref.generation
            if alive:
                pass_time(row, ref.ledger, now_ns)
                forgiven = empty_burst(&row.request_level, ref.ledger.request_low, row.request_drain, row.request_shift)
                forgiven |= empty_burst(&row.token_level, ref.ledger.token_low, row.token_drain, row.token_shift)
                if forgiven:
                    ref.ledger.level_epoch += 1
            unlock(&row.lock)
        if not alive:
            raise UnknownModelError(model_id)
        self.freed(ref)
