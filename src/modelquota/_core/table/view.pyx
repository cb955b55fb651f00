"""Reading in bulk: use and limits of all models, from a manager's own rows or from copies of a file's rows.

A manager's rows are read under their locks. A file is copied without a lock and without writing to it: a row is
accepted when two consecutive copies are equal and its lock is free.
"""
import numpy as np
cimport numpy as cnp
from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.types cimport off_t
from posix.unistd cimport usleep

from modelquota._core.atomics cimport load_u32
from modelquota._core.layout cimport ColdRow, Header, Lease, Limits, MAX_TIME_NS, Row, SLOTS, Share, TRAIL, WINDOWS
from modelquota._core.row.limits cimport read_limits
from modelquota._core.row.usage cimport Usage, read_usage
from modelquota._core.row.window cimport drop_trail, slot_start_ns
from modelquota._core.state.packing cimport unpack
from modelquota._core.state.registry cimport ring_size
from modelquota._core.state.state cimport State
from modelquota._core.table.intern cimport Interned, RowRef
from modelquota._core.table.records cimport Records
from modelquota._core.table.table cimport QuotaTable

from modelquota._core.state.packing import dtypes

cnp.import_array()

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void* buffer, size_t size, off_t offset)

cdef enum:
    AT_A_TIME = 64          # this many rows and cold rows stay in the processor's cache between two copies
    TRIES = 20
    PAUSE_US = 200          # a preempted owner holds its lock for longer than one copy takes


def limits_dtype():
    """The dtype of `Limits`; fields that the core derives from a configuration are zero in what is read."""
    return dtypes()["header"]["staged"]


def read_table(QuotaTable table not None):
    """Use and limits of all models of a manager, each read under its row's lock, all at one clock reading.

    Returns
    -------
    records : structured array of the dtype ``record_dtype()``
    limits : structured array of the dtype ``limits_dtype()``, of the same length
        Equal limits are equal bytes.
    lives : uint64 array, of the same length
        Identifies one registration of an id: changes when the model is removed and registered again.
    """
    cdef State state = table.state
    cdef Interned interned = table.interned
    cdef int64_t now_ns = state.now_ns()
    cdef Py_ssize_t known = 0
    cdef RowRef ref
    cdef Limits* bounds
    state.require_open()
    interned.refresh()
    table.pools.reclaim_if_due()
    cdef dict found = interned.ids.copy()     # another thread may add to it while read() waits
    cdef Records records = Records(len(found))
    cdef cnp.ndarray limits = _zeros(limits_dtype(), len(found), sizeof(Limits))
    cdef cnp.ndarray lives = np.zeros(len(found), np.uint64)
    cdef uint64_t* life = <uint64_t*> cnp.PyArray_DATA(lives)
    bounds = <Limits*> cnp.PyArray_DATA(limits)
    for model_id, ref in found.items():
        if interned.read(ref, now_ns, &records.first[known].usage, &bounds[known]):
            records.put_id(known, model_id)
            life[known] = <uint64_t> ref.generation << 32 | <uint64_t> (ref.row - state.shared.rows)
            known += 1
    return records.array(known), limits[:known], lives[:known]


def read_retired(QuotaTable table not None):
    """The counts of removed models, by the names of a snapshot's fields."""
    cdef State state = table.state
    state.require_open()
    return {
        "rejected_total": state.shared.header.retired_rejected,
        "throttled_total": state.shared.header.retired_throttled,
        "queued_total": state.shared.header.retired_queued,
        "waited_total": state.shared.header.retired_waited,
    }


def read_rows(int descriptor, regions, Py_ssize_t count, int64_t now_ns):
    """Use and limits of the first `count` rows of a file at `now_ns`; only copies are advanced to that time.

    Parameters
    ----------
    regions : Regions
        Where the parts of the file are.

    Returns
    -------
    usage : structured array of the dtype ``dtypes()["usage"]``
    limits : structured array of the dtype ``limits_dtype()``
    places : uint32 array, shape (count, 3)
        Generation of each row, offset of its name in units, and size of its name in bytes.

    Raises
    ------
    EOFError
        The file ends before the last row.
    OSError
        The file cannot be read.
    """
    cdef cnp.ndarray usage = _zeros(dtypes()["usage"], count, sizeof(Usage))
    cdef cnp.ndarray limits = _zeros(limits_dtype(), count, sizeof(Limits))
    cdef cnp.ndarray places = np.zeros((count, 3), np.uint32)
    cdef Usage* used = <Usage*> cnp.PyArray_DATA(usage)
    cdef Limits* bounds = <Limits*> cnp.PyArray_DATA(limits)
    cdef uint32_t* place = <uint32_t*> cnp.PyArray_DATA(places)
    cdef Py_ssize_t first = 0, size
    cdef int failed = 0
    cdef int window
    cdef bint complete
    cdef Copies copies
    cdef Header header
    copies.descriptor = descriptor
    copies.rows_at = regions.rows
    copies.cold_rows_at = regions.cold_rows
    copies.shares_at = regions.shares
    copies.rows = <Row*> malloc(2 * AT_A_TIME * sizeof(Row))
    copies.cold_rows = <ColdRow*> malloc(2 * AT_A_TIME * sizeof(ColdRow))
    copies.shares = <Share*> malloc(2 * AT_A_TIME * sizeof(Share))
    complete = copies.rows != NULL and copies.cold_rows != NULL and copies.shares != NULL
    for window, offset in enumerate(regions.rings):
        copies.rings_at[window] = offset
        copies.rings[window] = <char*> malloc(2 * AT_A_TIME * ring_size(window))
        complete = complete and copies.rings[window] != NULL
    try:
        if not complete:
            raise MemoryError(f"no memory for copies of {AT_A_TIME} rows")
        with nogil:
            failed = copy_bytes(descriptor, &copies.lease, sizeof(Lease), <char*> &header.lease - <char*> &header)
            while first < count and not failed:
                size = min(<Py_ssize_t> AT_A_TIME, count - first)
                failed = copy_steadily(&copies, first, size)
                if failed:
                    break
                read_copied(&copies, size, now_ns, &used[first], &bounds[first], &place[3 * first])
                first += size
    finally:
        free(copies.rows)
        free(copies.cold_rows)
        free(copies.shares)
        for window in range(WINDOWS):
            free(copies.rings[window])
    if failed == SHORT:
        raise EOFError(f"the file ends before row {count}")
    if failed:
        raise OSError(failed, "reading the rows has failed")
    return usage, limits, places


def records_of(cnp.ndarray usage, list model_ids, cnp.ndarray places):
    """The records of a snapshot: use of the rows `places` (int64), whose models are `model_ids`, in this order."""
    cdef Py_ssize_t i, row, count = len(model_ids)
    cdef Records records = Records(count)
    cdef const Usage* used
    cdef const int64_t* place
    _require(usage, sizeof(Usage))
    _require(places, sizeof(int64_t))
    if places.shape[0] != count:
        raise ValueError(f"there are {places.shape[0]} places for {count} ids; give one each")
    used = <const Usage*> cnp.PyArray_DATA(usage)
    place = <const int64_t*> cnp.PyArray_DATA(places)
    for i in range(count):
        row = place[i]
        if not 0 <= row < usage.shape[0]:
            raise ValueError(f"places[{i}] is {row}; there are {usage.shape[0]} rows")
        records.first[i].usage = used[row]
        records.put_id(i, model_ids[i])
    return records.array(count)


def unpack_limits(cnp.ndarray limits):
    """Limits as a list of the keywords of `ResourceQuotaConfig`."""
    cdef Py_ssize_t i
    cdef Limits* bounds
    _require(limits, sizeof(Limits))
    bounds = <Limits*> cnp.PyArray_DATA(limits)
    return [unpack(&bounds[i]) for i in range(limits.shape[0])]


def read_copies(cnp.ndarray rows, cnp.ndarray cold_rows, tuple rings, cnp.ndarray shares, header, int64_t now_ns):
    """Use and limits of copies of rows, their cold rows, rings and shares at `now_ns`, to which they are advanced.

    `header` is a record with the lease of the shares.

    Returns
    -------
    usage : structured array of the dtype ``dtypes()["usage"]``
    limits : list of dict
        Keywords of `ResourceQuotaConfig`.
    """
    cdef Py_ssize_t i, count = rows.shape[0]
    cdef Limits limits
    cdef Row* row
    cdef ColdRow* cold
    cdef Usage* records
    cdef cnp.ndarray ring
    cdef char* first_rings[WINDOWS]
    cdef int window
    cdef Share* share
    cdef Lease held_until
    cdef bytes lease
    cdef list found = []
    _require(rows, sizeof(Row))
    _require(cold_rows, sizeof(ColdRow))
    _require(shares, sizeof(Share))
    if cold_rows.shape[0] != count or shares.shape[0] != count:
        raise ValueError(f"there are {cold_rows.shape[0]} cold rows and {shares.shape[0]} shares for {count} rows; "
                         "give one each")
    lease = header["lease"].tobytes()
    if len(lease) != sizeof(Lease):
        raise ValueError("header has no lease")
    memcpy(&held_until, <const char*> lease, sizeof(Lease))
    for window in range(WINDOWS):
        ring = rings[window]
        _require(ring, ring_size(window))
        if ring.shape[0] != count:
            raise ValueError(f"there are {ring.shape[0]} rings for {count} rows; give one each")
        first_rings[window] = <char*> cnp.PyArray_DATA(ring)
    usage = np.zeros(count, dtypes()["usage"])
    row = <Row*> cnp.PyArray_DATA(rows)
    cold = <ColdRow*> cnp.PyArray_DATA(cold_rows)
    records = <Usage*> cnp.PyArray_DATA(usage)
    share = <Share*> cnp.PyArray_DATA(shares)
    for i in range(count):
        place_copied_rings(&cold[i], first_rings, i)
        place_copied_share(&cold[i], &share[i], &held_until)
        make_readable(&row[i], &cold[i])
        read_usage(&row[i], &cold[i], now_ns, &records[i])
        read_limits(&row[i], &cold[i], &limits)
        found.append(unpack(&limits))
    return usage, found


cdef struct Copies:
    # The parts of a file, and copies of some rows of each, 2 * AT_A_TIME long: what is read, and the next look at it.
    int descriptor
    int64_t rows_at
    int64_t cold_rows_at
    int64_t rings_at[WINDOWS]
    int64_t shares_at
    Row* rows
    ColdRow* cold_rows
    char* rings[WINDOWS]
    Share* shares
    Lease lease


cdef enum:
    SHORT = -1


cdef int copy_bytes(int descriptor, void* target, size_t size, int64_t offset) noexcept nogil:
    """Read `size` bytes; 0, SHORT if the file ends before, otherwise an errno."""
    cdef size_t done = 0
    cdef ssize_t got
    while done < size:
        got = pread(descriptor, <char*> target + done, size - done, offset + <int64_t> done)
        if got > 0:
            done += <size_t> got
        elif got == 0:
            return SHORT
        elif errno != EINTR:
            return errno
    return 0


cdef int copy_rows(const Copies* copies, int64_t first, Py_ssize_t count, Py_ssize_t place) noexcept nogil:
    """Copy `count` rows and cold rows to `place` and after; 0 or as copy_bytes()."""
    cdef int failed = copy_bytes(copies.descriptor, &copies.rows[place], count * sizeof(Row),
                                 copies.rows_at + first * <int64_t> sizeof(Row))
    return failed or copy_bytes(copies.descriptor, &copies.cold_rows[place], count * sizeof(ColdRow),
                                copies.cold_rows_at + first * <int64_t> sizeof(ColdRow))


cdef int copy_rings(const Copies* copies, int64_t first, Py_ssize_t count, Py_ssize_t place) noexcept nogil:
    """Copy the rings of `count` rows likewise, and their shares if they have any."""
    cdef int window
    cdef int failed = 0
    for window in range(WINDOWS):
        failed = failed or copy_bytes(copies.descriptor, copies.rings[window] + place * ring_size(window),
                                      count * ring_size(window), copies.rings_at[window] + first * ring_size(window))
    if load_u32(&copies.lease.rule):
        failed = failed or copy_bytes(copies.descriptor, &copies.shares[place], count * sizeof(Share),
                                      copies.shares_at + first * <int64_t> sizeof(Share))
    return failed


cdef int copy_steadily(const Copies* copies, int64_t first, Py_ssize_t count) noexcept nogil:
    """Copy `count` rows, each as it was at one moment if TRIES copies suffice, otherwise as last copied."""
    cdef Row* row
    cdef ColdRow* cold
    cdef uint8_t steady[AT_A_TIME]
    cdef Py_ssize_t i, left
    cdef int attempt, window
    cdef int64_t size
    cdef int failed = copy_rows(copies, first, count, 0)
    memset(steady, 0, sizeof(steady))
    for attempt in range(TRIES):
        if attempt:
            usleep(PAUSE_US)
        # a ring never changes without the cold row: one that is the same before and after is of the same moment
        failed = failed or copy_rings(copies, first, count, AT_A_TIME)
        failed = failed or copy_rows(copies, first, count, AT_A_TIME)
        if failed:
            return failed
        left = 0
        for i in range(count):
            if steady[i]:
                continue
            row = &copies.rows[i]
            cold = &copies.cold_rows[i]
            for window in range(WINDOWS):
                size = ring_size(window)
                memcpy(copies.rings[window] + i * size, copies.rings[window] + (AT_A_TIME + i) * size, size)
            if load_u32(&copies.lease.rule):
                memcpy(&copies.shares[i], &copies.shares[AT_A_TIME + i], sizeof(Share))
            if (row.lock == 0 and memcmp(row, &copies.rows[AT_A_TIME + i], sizeof(Row)) == 0
                    and memcmp(cold, &copies.cold_rows[AT_A_TIME + i], sizeof(ColdRow)) == 0):
                steady[i] = 1
            else:
                memcpy(row, &copies.rows[AT_A_TIME + i], sizeof(Row))
                memcpy(cold, &copies.cold_rows[AT_A_TIME + i], sizeof(ColdRow))
                left += 1
        if left == 0:
            break
    return 0


cdef void place_copied_rings(ColdRow* cold, char* const* rings, Py_ssize_t place) noexcept nogil:
    """Have a copy of a cold row refer to copies of its rings."""
    cdef int window
    for window in range(WINDOWS):
        cold.ring_offset[window] = rings[window] + place * ring_size(window) - <char*> cold


cdef void place_copied_share(ColdRow* cold, Share* share, const Lease* lease) noexcept nogil:
    """Have a copy of a cold row refer to a copy of its share, and that to one of the lease."""
    cold.share_offset = <char*> share - <char*> cold
    share.lease_offset = <const char*> lease - <const char*> share


cdef void make_readable(Row* row, ColdRow* cold) noexcept nogil:
    """Bring what leads to memory within its bounds: nothing has judged the row of which this is a copy."""
    cdef int window
    if row.trail > TRAIL or not slot_start_ns(1) <= row.slot_end_ns <= MAX_TIME_NS:
        drop_trail(row)
        row.slot_end_ns = row.trail_end_ns = slot_start_ns(1)
    for window in range(WINDOWS):
        cold.filled[window] = min(cold.filled[window], <uint8_t> SLOTS)


cdef void read_copied(
    Copies* copies, Py_ssize_t count, int64_t now_ns, Usage* usage, Limits* limits, uint32_t* places
) noexcept nogil:
    cdef ColdRow* cold
    cdef Py_ssize_t i
    for i in range(count):
        cold = &copies.cold_rows[i]
        places[3 * i] = copies.rows[i].generation
        places[3 * i + 1] = cold.name_offset
        places[3 * i + 2] = cold.name_size
        place_copied_rings(cold, copies.rings, i)
        place_copied_share(cold, &copies.shares[i], &copies.lease)
        if load_u32(&copies.lease.rule) == 0:
            copies.rows[i].has_share = 0        # the last one of all has just ended: what it was has not been read
        make_readable(&copies.rows[i], cold)
        read_usage(&copies.rows[i], cold, now_ns, &usage[i])
        read_limits(&copies.rows[i], cold, &limits[i])


cdef cnp.ndarray _zeros(object dtype, Py_ssize_t count, size_t size):
    if dtype.itemsize != size:
        raise AssertionError(f"{dtype} does not have {size} bytes")
    return np.zeros(count, dtype)


cdef int _require(cnp.ndarray array, size_t size) except -1:
    """Require that C may read and change the elements of `array`."""
    if not (cnp.PyArray_ISCARRAY(array) and cnp.PyArray_NDIM(array) == 1
            and <size_t> cnp.PyArray_ITEMSIZE(array) == size):
        raise ValueError(f"give a contiguous, writeable array of elements of {size} bytes")
    return 0
