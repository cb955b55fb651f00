"""A bound model: checks without the look-up of its id."""
cimport cython
from libc.stdint cimport int64_t, uint32_t

from modelquota._core.layout cimport ColdRow, GrantRecord, Row, Shared
from modelquota._core.row.decision cimport Request
from modelquota._core.row.grant cimport bind_handle, free_handle
from modelquota._core.state.lock cimport SLICE_NS, unlock
from modelquota._core.state.pool cimport give_record
from modelquota._core.state.repair cimport lock_row
from modelquota._core.state.state cimport fork_count
from modelquota._core.table.arguments cimport parse_request
from modelquota._core.table.intern cimport RowRef, plain_id
from modelquota._core.table.table cimport QuotaTable

from modelquota.errors import UnknownModelError

cdef enum:
    LOCKED_OUT = -1     # the row stays locked: its owner is not running


cdef inline int change_handle(
    Row* row, ColdRow* cold, uint32_t generation, GrantRecord* record, bint bind, const Shared* shared,
    int64_t patience_ns
) noexcept nogil:
    """Bind a handle, or release it. False if the model has been removed, LOCKED_OUT if the row stays locked.

    A model that has a handle is not removed to make room. Takes the row's lock.
    """
    cdef bint alive
    if not lock_row(row, shared, patience_ns):
        return LOCKED_OUT
    alive = row.generation == generation
    if alive and bind:
        bind_handle(cold, record, <uint32_t> (row - shared.rows), generation, shared.me)
    elif alive:
        free_handle(cold, record)
    else:
        record.seat = 0
    unlock(&row.lock)
    return alive


@cython.no_gc_clear     # it needs its references to release its record
cdef class RowHandle:
    """One bound model: the checks of `QuotaTable` without the look-up. `ModelQuota` adds the less frequent methods."""

    def __cinit__(self, QuotaTable manager not None, model_id):
        self.model_id = plain_id(model_id)
        self.manager = manager
        self.forks = fork_count()
        self.record = manager.pools.take_grant_record()
        while self.ref is None:
            ref = manager.interned.require(self.model_id)
            if self.change(ref, True):      # otherwise it has just been removed
                self.ref = ref

    def __dealloc__(self):
        cdef QuotaTable manager = self.manager
        cdef RowRef ref = self.ref
        cdef int outcome = 0
        if self.record == NULL or self.forks != fork_count() or not manager.state.usable():
            return
        if ref is not None:
            outcome = change_handle(ref.row, ref.cold, ref.generation, self.record, False, manager.shared, 0)
        if outcome != LOCKED_OUT:       # otherwise the record stays, which only keeps the model's row
            give_record(&manager.shared.grant_pool, self.record - manager.shared.grants, manager.shared.me)

    cdef int change(self, RowRef ref, bint bind) except -1:
        """Bind this handle, or release it; False if its model has been removed. Takes the row's lock."""
        cdef QuotaTable manager = self.manager
        cdef int outcome = change_handle(ref.row, ref.cold, ref.generation, self.record, bind, manager.shared, 0)
        while outcome == LOCKED_OUT:
            manager.state.inside += 1
            with nogil:
                outcome = change_handle(ref.row, ref.cold, ref.generation, self.record, bind, manager.shared, SLICE_NS)
            manager.state.exit()
            if outcome == LOCKED_OUT:
                manager.state.pause()
        return outcome

    def __init__(self, manager, model_id):
        pass

    def __reduce__(self):
        raise TypeError("a bound model cannot be pickled or copied; call manager.model(model_id)")

    def check(self, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """As `QuotaTable.check_quota`, for this model; raises UnknownModelError if it has been removed."""
        cdef Request request
        parse_request(&request, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        return self.manager.answer(self.ref, self.model_id, &request, self)

    def _require_alive(self):
        self.manager.state.require_open()
        if self.ref.row.generation != self.ref.generation:
            raise UnknownModelError(self.model_id)
