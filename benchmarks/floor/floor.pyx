"""Floors: the least that each way of asking costs, were there nothing to decide.

The methods have the signatures of `QuotaTable` and `RowHandle`, and the compiler directives of the package. What they
share with the package is its clock and its lock; rows and results are their own, so that a floor stays where it is
while the package changes.
"""
import mmap

cimport cython
from cpython.buffer cimport PyBUF_FORMAT, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.dict cimport PyDict_GetItemWithError
from libc.stdint cimport int64_t, uint8_t, uint32_t

from modelquota._core.state.clock cimport monotonic_ns
from modelquota._core.layout cimport Shared
from modelquota._core.state.lock cimport SLICE_NS, lock_within, try_lock, unlock

cdef extern from *:
    void prefetch "__builtin_prefetch"(const void* address, int to_write, int locality) noexcept nogil

cdef enum:
    ROWS_AHEAD = 16

cdef Shared ALONE       # who locks here: one process, which lives
ALONE.me = 1


cdef struct Line:
    uint32_t lock
    int64_t time_ns
    int64_t requests
    int64_t tokens
    int64_t padding[4]

cdef struct TwoLines:   # as much as a decision about one model has to touch
    Line first
    Line second


@cython.final
@cython.freelist(64)
cdef class FloorResult:
    cdef readonly bint allowed
    cdef readonly int64_t retry_after_ms


cdef inline FloorResult result_of(bint allowed, int64_t retry_after_ms):
    cdef FloorResult result = FloorResult.__new__(FloorResult)
    result.allowed = allowed
    result.retry_after_ms = retry_after_ms
    return result


cdef inline void touch(TwoLines* row, int64_t now_ns, int64_t tokens) noexcept nogil:
    """With the lock held."""
    row.first.time_ns = now_ns
    row.first.requests += 1
    row.second.tokens += tokens


@cython.final
@cython.no_gc
cdef class RowRef:
    cdef TwoLines* row


cdef class FloorTable:
    """A row of two cache lines for each id, in memory of the kind that the package has: shared, in pages of 4 KiB."""

    cdef Py_buffer memory
    cdef TwoLines* rows
    cdef dict interned

    def __cinit__(self, ids):
        cdef RowRef ref
        cdef Py_ssize_t i = 0
        PyObject_GetBuffer(mmap.mmap(-1, len(ids) * sizeof(TwoLines)), &self.memory, PyBUF_WRITABLE)
        self.rows = <TwoLines*> self.memory.buf
        self.interned = {}
        for model_id in ids:
            ref = RowRef.__new__(RowRef)
            ref.row = &self.rows[i]
            self.interned[model_id] = ref
            i += 1

    def __dealloc__(self):
        if self.memory.buf != NULL:
            PyBuffer_Release(&self.memory)

    def call(self, model_id, int64_t estimated_tokens, int64_t ram_needed_mb=0, int64_t ssd_needed_mb=0):
        """The call and its result."""
        return result_of(True, estimated_tokens)

    def look_up(self, model_id, int64_t estimated_tokens, int64_t ram_needed_mb=0, int64_t ssd_needed_mb=0):
        """... and the look-up of the id; False for one that is not there."""
        return result_of(PyDict_GetItemWithError(self.interned, model_id) != NULL, estimated_tokens)

    def check(self, model_id, int64_t estimated_tokens, int64_t ram_needed_mb=0, int64_t ssd_needed_mb=0):
        """... and the clock and the lock: everything but the decision."""
        cdef void* found = PyDict_GetItemWithError(self.interned, model_id)
        if found == NULL:
            return result_of(False, -1)
        return self.answer(<RowRef> found, estimated_tokens)

    cdef inline object answer(self, RowRef ref, int64_t estimated_tokens):
        cdef TwoLines* row = ref.row
        cdef int64_t now_ns = monotonic_ns()
        if not try_lock(&row.first.lock, 1):
            with nogil:
                lock_within(&row.first.lock, &ALONE, SLICE_NS)
        touch(row, now_ns, estimated_tokens)
        unlock(&row.first.lock)
        return result_of(True, estimated_tokens)

    def check_many(self, codes, tokens, limits):
        """Touch the row of each code (int64) under its lock, with the GIL released; answer 0 into `limits` (uint8)."""
        cdef Py_buffer views[3]
        cdef Py_ssize_t count
        PyObject_GetBuffer(codes, &views[0], PyBUF_FORMAT)
        PyObject_GetBuffer(tokens, &views[1], PyBUF_FORMAT)
        PyObject_GetBuffer(limits, &views[2], PyBUF_FORMAT | PyBUF_WRITABLE)
        count = views[2].len
        with nogil:
            touch_many(<const int64_t*> views[0].buf, <const int64_t*> views[1].buf, <uint8_t*> views[2].buf, count,
                       self.rows, monotonic_ns())
        for i in range(3):
            PyBuffer_Release(&views[i])


cdef void touch_many(
    const int64_t* codes, const int64_t* tokens, uint8_t* limits, Py_ssize_t count, TwoLines* rows, int64_t now_ns
) noexcept nogil:
    cdef TwoLines* row
    cdef Py_ssize_t i
    for i in range(count):
        if i + ROWS_AHEAD < count:
            row = &rows[codes[i + ROWS_AHEAD]]
            prefetch(&row.first, 1, 3)
            prefetch(&row.second, 1, 3)
        row = &rows[codes[i]]
        lock_within(&row.first.lock, &ALONE, SLICE_NS)
        touch(row, now_ns, tokens[i])
        unlock(&row.first.lock)
        limits[i] = 0


cdef class FloorHandle:
    """One row, bound."""

    cdef FloorTable table
    cdef RowRef ref

    def __init__(self, FloorTable table not None, model_id):
        self.table = table
        self.ref = table.interned[model_id]

    def call(self, int64_t estimated_tokens, int64_t ram_needed_mb=0, int64_t ssd_needed_mb=0):
        """The call and its result."""
        return result_of(True, estimated_tokens)

    def check(self, int64_t estimated_tokens, int64_t ram_needed_mb=0, int64_t ssd_needed_mb=0):
        """... and the clock and the lock."""
        return self.table.answer(self.ref, estimated_tokens)


def clock_ns(int64_t readings):
    """Nanoseconds per reading of the clock."""
    cdef int64_t i, start_ns = monotonic_ns(), end_ns = start_ns
    for i in range(readings):
        end_ns = monotonic_ns()
    return (end_ns - start_ns) / <double> readings


def lock_ns(int64_t turns):
    """Nanoseconds per locking and unlocking of a free lock."""
    cdef uint32_t word = 0
    cdef int64_t i, start_ns = monotonic_ns()
    for i in range(turns):
        lock_within(&word, &ALONE, SLICE_NS)
        unlock(&word)
    return (monotonic_ns() - start_ns) / <double> turns
