# A private copy of all that one model has: for a reading or a decision that must not change the model.
from libc.stdint cimport int64_t
from libc.string cimport memcpy, memset
from modelquota._core.atomics cimport load_u32
from modelquota._core.layout cimport ColdRow, DAY, Lease, Limits, LongRing, Ring, Row, Share, Shared, WINDOWS
from modelquota._core.row.limits cimport put_limits, start_row
from modelquota._core.row.share cimport begin_share
from modelquota._core.row.window cimport is_counted
from modelquota._core.state.registry cimport ring_size


cdef struct ModelCopy:
    Row row
    ColdRow cold
    Ring rings[DAY]                     # of the windows up to DAY,
    LongRing long_rings[WINDOWS - DAY]  # and of those from there on
    Share share


cdef inline void place_copied_rings(ModelCopy* copy) noexcept nogil:
    """Have the cold row refer to the rings and the share beside it."""
    cdef int window
    cdef char* ring
    for window in range(WINDOWS):
        ring = <char*> &copy.rings[window] if window < DAY else <char*> &copy.long_rings[window - DAY]
        copy.cold.ring_offset[window] = ring - <char*> &copy.cold
    copy.cold.share_offset = <char*> &copy.share - <char*> &copy.cold


cdef inline void copy_model(ModelCopy* copy, int64_t index, const Shared* shared) noexcept nogil:
    """Copy a row with its rings. Without the row's lock, what is being changed is copied as it is."""
    cdef int window
    copy.row = shared.rows[index]
    memcpy(&copy.cold, &shared.cold_rows[index], sizeof(ColdRow))
    place_copied_rings(copy)
    for window in range(WINDOWS):
        if is_counted(&copy.cold, window):
            memcpy(<char*> &copy.cold + copy.cold.ring_offset[window], shared.rings[window] + index * ring_size(window),
                   ring_size(window))
    if copy.row.has_share:
        memcpy(&copy.share, &shared.shares[index], sizeof(Share))
        copy.share.lease_offset = <char*> &shared.header.lease - <char*> &copy.share


cdef inline void start_copy(ModelCopy* copy, const Limits* limits, int64_t now_ns, Lease* lease) noexcept nogil:
    """A model as it is when it has just been registered; with a share if the lease has a rule. `lease` may be NULL."""
    memset(copy, 0, sizeof(ModelCopy))
    place_copied_rings(copy)
    start_row(&copy.row, &copy.cold, now_ns)
    if lease != NULL and load_u32(&lease.rule):
        begin_share(&copy.row, &copy.cold, lease)
    put_limits(&copy.row, &copy.cold, limits)
