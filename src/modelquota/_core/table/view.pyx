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

from modelquota._core.layout cimport ColdRow, Limits, Row
from modelquota._core.row.usage cimport Usage, read_limits, read_usage
from modelquota._core.state.packing cimport unpack
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


def read_rows(int descriptor, int64_t rows_at, int64_t cold_rows_at, Py_ssize_t count, int64_t now_ns):
    """Use and limits of the first `count` rows of a file at `now_ns`; only copies are advanced to that time.

    Parameters
    ----------
    rows_at, cold_rows_at : int
        Their offsets in the file, in bytes.

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
    cdef Copies copies
    copies.rows = <Row*> malloc(2 * AT_A_TIME * sizeof(Row))
    copies.cold_rows = <ColdRow*> malloc(2 * AT_A_TIME * sizeof(ColdRow))
    try:
        if copies.rows == NULL or copies.cold_rows == NULL:
            raise MemoryError(f"no memory for copies of {AT_A_TIME} rows")
        with nogil:
            while first < count:
                size = min(<Py_ssize_t> AT_A_TIME, count - first)
                failed = copy_steadily(descriptor, rows_at + first * <int64_t> sizeof(Row),
                                       cold_rows_at + first * <int64_t> sizeof(ColdRow), size, &copies)
                if failed:
                    break
                read_copied(&copies, size, now_ns, &used[first], &bounds[first], &place[3 * first])
                first += size
    finally:
        free(copies.rows)
        free(copies.cold_rows)
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


def read_copies(cnp.ndarray rows, cnp.ndarray cold_rows, int64_t now_ns):
    """Use and limits of copies of rows and their cold rows at `now_ns`; the copies are advanced to that time.

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
    cdef list found = []
    _require(rows, sizeof(Row))
    _require(cold_rows, sizeof(ColdRow))
    if cold_rows.shape[0] != count:
        raise ValueError(f"there are {cold_rows.shape[0]} cold rows for {count} rows; give one each")
    usage = np.zeros(count, dtypes()["usage"])
    row = <Row*> cnp.PyArray_DATA(rows)
    cold = <ColdRow*> cnp.PyArray_DATA(cold_rows)
    records = <Usage*> cnp.PyArray_DATA(usage)
    for i in range(count):
        read_usage(&row[i], &cold[i], now_ns, &records[i])
        read_limits(&row[i], &cold[i], &limits)
        found.append(unpack(&limits))
    return usage, found


cdef struct Copies:
    # Each 2 * AT_A_TIME long: the copy that is read, and a second one to compare it with.
    Row* rows
    ColdRow* cold_rows


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


cdef int copy_steadily(
    int descriptor, int64_t rows_at, int64_t cold_rows_at, Py_ssize_t count, const Copies* copies
) noexcept nogil:
    """Copy `count` rows, each as it was at one moment if TRIES copies suffice, otherwise as last copied."""
    cdef Row* again_rows = copies.rows + AT_A_TIME
    cdef ColdRow* again_cold_rows = copies.cold_rows + AT_A_TIME
    cdef size_t before_rings = <char*> &copies.cold_rows.tokens - <char*> copies.cold_rows
    cdef uint8_t steady[AT_A_TIME]
    cdef Py_ssize_t i, left
    cdef int attempt
    cdef int failed = copy_bytes(descriptor, copies.rows, count * sizeof(Row), rows_at)
    failed = failed or copy_bytes(descriptor, copies.cold_rows, count * sizeof(ColdRow), cold_rows_at)
    memset(steady, 0, sizeof(steady))
    for attempt in range(TRIES):
        if attempt:
            usleep(PAUSE_US)
        failed = failed or copy_bytes(descriptor, again_rows, count * sizeof(Row), rows_at)
        failed = failed or copy_bytes(descriptor, again_cold_rows, count * sizeof(ColdRow), cold_rows_at)
        if failed:
            return failed
        left = 0
        for i in range(count):
            if steady[i]:
                continue
            # a slot never changes without the sums, which precede it and were copied first
            if (copies.rows[i].lock == 0 and memcmp(&copies.rows[i], &again_rows[i], sizeof(Row)) == 0
                    and memcmp(&copies.cold_rows[i], &again_cold_rows[i], before_rings) == 0):
                steady[i] = 1
            else:
                memcpy(&copies.rows[i], &again_rows[i], sizeof(Row))
                memcpy(&copies.cold_rows[i], &again_cold_rows[i], sizeof(ColdRow))
                left += 1
        if left == 0:
            break
    return 0


cdef void read_copied(
    const Copies* copies, Py_ssize_t count, int64_t now_ns, Usage* usage, Limits* limits, uint32_t* places
) noexcept nogil:
    cdef ColdRow* cold
    cdef Py_ssize_t i
    for i in range(count):
        cold = &copies.cold_rows[i]
        places[3 * i] = copies.rows[i].generation
        places[3 * i + 1] = cold.name_offset
        places[3 * i + 2] = cold.name_size
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
