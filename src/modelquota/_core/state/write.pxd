# Small changes to one row, from lock to unlock. Nothing here touches a Python object.
from libc.stdint cimport int64_t, uint32_t
from modelquota._core.layout cimport ColdRow, Row, Shared
from modelquota._core.row.advance cimport advance
from modelquota._core.row.level cimport empty_burst
from modelquota._core.row.window cimport NOT_KNOWN
from modelquota._core.state.lock cimport unlock
from modelquota._core.state.repair cimport lock_row

cdef enum:  # the outcome of a change
    LEFT = 0        # the model has been removed
    WRITTEN = 1
    ROW_BUSY = 2    # the row stays locked


cdef inline int record_memory(
    Row* row, ColdRow* cold, uint32_t generation, int64_t ram_mb, int64_t ssd_mb, const Shared* shared,
    int64_t patience_ns
) noexcept nogil:
    """Record the memory that a model uses, and its peaks. Takes the row's lock."""
    cdef bint alive
    if not lock_row(row, shared, patience_ns):
        return ROW_BUSY
    alive = row.generation == generation
    if alive:
        cold.ram_mb = ram_mb
        cold.ssd_mb = ssd_mb
        cold.held_percent = NOT_KNOWN
        cold.peak_ram_mb = max(cold.peak_ram_mb, ram_mb)
        cold.peak_ssd_mb = max(cold.peak_ssd_mb, ssd_mb)
    unlock(&row.lock)
    return WRITTEN if alive else LEFT


cdef inline int forgive_burst(
    Row* row, ColdRow* cold, uint32_t generation, int64_t now_ns, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Lower both levels to at most max(rate, 1). Takes the row's lock."""
    cdef bint alive, forgiven
    if not lock_row(row, shared, patience_ns):
        return ROW_BUSY
    alive = row.generation == generation
    if alive:
        advance(row, cold, now_ns)
        forgiven = empty_burst(&row.request_level, cold.request_minimum, row.request_drain, row.request_shift)
        forgiven |= empty_burst(&row.token_level, cold.token_minimum, row.token_drain, row.token_shift)
        if forgiven:
            cold.level_epoch += 1
    unlock(&row.lock)
    return WRITTEN if alive else LEFT
