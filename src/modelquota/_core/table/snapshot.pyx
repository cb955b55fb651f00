"""Reads of a manager's own state: one model, all models, and sums over them."""
from libc.stdint cimport int64_t, uint64_t

from modelquota._core.atomics cimport load_u64
from modelquota._core.layout cimport Limits, VIOLATION_TYPES
from modelquota._core.row.usage cimport Usage
from modelquota._core.state.packing cimport unpack
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.read cimport READ_PATIENCE_NS, Totals, sum_totals
from modelquota._core.state.registry cimport lock_registry, unlock_registry
from modelquota._core.state.state cimport State
from modelquota._core.table.intern cimport Interned, RowRef, plain_id
from modelquota._core.table.records cimport Records

cdef enum:
    TOTALS_TRIES = 4


cdef object read_model(Interned interned, Pools pools, object model_id):
    """``(limits, usage)`` as keyword dicts, one consistent view; None for an unknown model. Takes the row's lock."""
    cdef Usage usage
    cdef Limits limits
    cdef RowRef ref = interned.find(plain_id(model_id))
    if ref is None:
        return None
    pools.reclaim_if_due()
    return (unpack(&limits), usage) if interned.read(ref, interned.state.now_ns(), &usage, &limits) else None


cdef object read_models(Interned interned, Pools pools):
    """A snapshot of all models, each read under its row's lock, all at one clock reading."""
    cdef int64_t now_ns = interned.state.now_ns()
    cdef Py_ssize_t known = 0
    cdef RowRef ref
    interned.state.require_open()
    interned.refresh()
    pools.reclaim_if_due()
    cdef dict found = interned.ids.copy()      # another thread may add to it while read() waits
    cdef Records records = Records(len(found))
    for model_id, ref in found.items():
        if interned.read(ref, now_ns, &records.first[known].usage, NULL):
            records.put_id(known, model_id)
            known += 1
    return records.array(known)


cdef dict totals_of(State state):
    """Sums over all models, living and removed, and over checks of unknown ones. May take the registry's lock."""
    cdef Totals totals
    cdef uint64_t version
    cdef int attempt
    cdef bint last
    state.require_open()
    state.inside += 1
    for attempt in range(TOTALS_TRIES):
        last = attempt == TOTALS_TRIES - 1
        version = load_u64(&state.shared.header.registry_version)
        with nogil:
            if last:        # models are added and removed all the time: block that while summing
                last = lock_registry(&state.shared, READ_PATIENCE_NS)
            sum_totals(&state.shared, &totals)
            if last:
                unlock_registry(&state.shared)
        if last or (state.shared.header.leaving_row < 0
                    and load_u64(&state.shared.header.registry_version) == version):
            break
    state.exit()
    return {"allowed": totals.allowed, "rejected": totals.rejected, "throttled": totals.throttled,
            "queued": totals.queued, "waited": totals.waited, "waiting": totals.waiting, "tokens": totals.tokens,
            "tokens_refunded": totals.refunded, "recoveries": state.shared.header.recoveries,
            "violations": [totals.violations[kind] for kind in range(VIOLATION_TYPES)]}
