# Small changes to one row, from lock to unlock: nothing here touches a Python object.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.layout cimport Ledger, Row, Shared
from modelquota._core.row.decision cimport pass_time
from modelquota._core.row.level cimport empty_burst
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:  # what comes of a change
    LEFT = 0        # the model has left the row
    WRITTEN = 1
    ROW_BUSY = 2    # the row stays locked


cdef inline int record_memory(
    Row* row, Ledger* ledger, uint32_t generation, int64_t ram_mb, int64_t ssd_mb, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Record what a model uses, and its peaks. Takes the row's lock."""
    cdef bint alive
    if not lock_row(row, shared, patience_ns):
        return ROW_BUSY
    alive = row.generation == generation
    if alive:
        ledger.ram_mb = ram_mb
        ledger.ssd_mb = ssd_mb
        ledger.peak_ram_mb = max(ledger.peak_ram_mb, ram_mb)
        ledger.peak_ssd_mb = max(ledger.peak_ssd_mb, ssd_mb)
    unlock(&row.lock)
    return WRITTEN if alive else LEFT


cdef inline int forgive_burst(
    Row* row, Ledger* ledger, uint32_t generation, int64_t now_ns, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Set both levels to at most max(rate, 1). Takes the row's lock."""
    cdef bint alive, forgiven
    if not lock_row(row, shared, patience_ns):
        return ROW_BUSY
    alive = row.generation == generation
    if alive:
        pass_time(row, ledger, now_ns)
        forgiven = empty_burst(&row.request_level, ledger.request_low, row.request_drain, row.request_shift)
        forgiven |= empty_burst(&row.token_level, ledger.token_low, row.token_drain, row.token_shift)
        if forgiven:
            ledger.level_epoch += 1
    unlock(&row.lock)
    return WRITTEN if alive else LEFT
