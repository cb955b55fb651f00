"""A bound model: its checks without the look-up."""
cimport cython
from libc.stdint cimport int64_t, uint32_t

from modelquota._core.layout cimport GrantRecord, Ledger, Row, Shared
from modelquota._core.row.decision cimport Ask
from modelquota._core.row.grant cimport bind_handle, free_handle
from modelquota._core.state.lock cimport SLICE_NS, unlock
from modelquota._core.state.pool cimport give_record
from modelquota._core.state.repair cimport lock_row
from modelquota._core.state.state cimport fork_count
from modelquota._core.table.arguments cimport start_ask
from modelquota._core.table.intern cimport RowRef, plain_id
from modelquota._core.table.table cimport QuotaTable

from modelquota.errors import UnknownModelError

cdef enum:
    LOCKED_OUT = -1     # the row stays locked: its owner does not run


cdef inline int change_handle(
    Row* row, Ledger* ledger, uint32_t generation, GrantRecord* record, bint bind, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Bind a handle, or give it up: a model that has one is not forgotten. False if the model has gone, LOCKED_OUT if the
    row stays locked. Takes the row's lock."""
    cdef bint alive
    if not lock_row(row, shared, patience_ns):
        return LOCKED_OUT
    alive = row.generation == generation
    if alive and bind:
        bind_handle(ledger, record, <uint32_t> (row - shared.rows), generation, shared.me)
    elif alive:
        free_handle(ledger, record)
    else:
        record.seat = 0
    unlock(&row.lock)
    return alive


@cython.no_gc_clear     # to count itself no more, it needs what it refers to
cdef class RowHandle:
    """One model, bound: the checks of `QuotaTable` without the look-up. `ModelQuota` adds the cold verbs."""

    def __cinit__(self, QuotaTable manager not None, model_id):
        self.model_id = plain_id(model_id)
        self.manager = manager
        self.forks = fork_count()
        self.record = manager.pools.take_grant_record()
        while self.ref is None:
            ref = manager.interned.known(self.model_id)
            if self.change(ref, True):      # otherwise it has just gone
                self.ref = ref

    def __dealloc__(self):
        cdef QuotaTable manager = self.manager
        cdef RowRef ref = self.ref
        cdef int outcome = 0
        if self.record == NULL or self.forks != fork_count() or not manager.state.usable():
            return
        if ref is not None:
            outcome = change_handle(ref.row, ref.ledger, ref.generation, self.record, False, manager.shared, 0)
        if outcome != LOCKED_OUT:       # otherwise the record stays, and with it the model's place: nobody is held up
            give_record(&manager.shared.grant_pool, self.record - manager.shared.grants, manager.shared.me)

    cdef int change(self, RowRef ref, bint bind) except -1:
        """Count this handle, or count it no more; False if its model has gone."""
        cdef QuotaTable manager = self.manager
        cdef int outcome = change_handle(ref.row, ref.ledger, ref.generation, self.record, bind, manager.shared, 0)
        while outcome == LOCKED_OUT:
            manager.state.inside += 1
            with nogil:
                outcome = change_handle(ref.row, ref.ledger, ref.generation, self.record, bind, manager.shared, SLICE_NS)
            manager.state.exit()
            if outcome == LOCKED_OUT:
                manager.state.pause()
        return outcome

    def __init__(self, manager, model_id):
        pass

    def __reduce__(self):
        raise TypeError("a bound model cannot be pickled or copied; call manager.model(model_id)")

    def check(self, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """As `QuotaTable.check_quota`, for this model; UnknownModelError once it has been removed."""
        cdef Ask ask
        start_ask(&ask, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        return self.manager.answer(self.ref, self.model_id, &ask, self)

    def _require_alive(self):
        self.manager.state.require_open()
        if self.ref.row.generation != self.ref.generation:
            raise UnknownModelError(self.model_id)
