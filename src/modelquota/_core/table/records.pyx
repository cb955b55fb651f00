"""The records of a snapshot, made without releasing the GIL.

numpy releases it while it allocates zeroed memory, which an array with object fields needs, and a thread that releases
the GIL among busy threads gets it back 5 ms later.
"""
import functools

import numpy as np
cimport numpy as cnp
from cpython.object cimport PyTypeObject
from cpython.ref cimport Py_INCREF, Py_XDECREF, PyObject
from libc.stdint cimport int64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from modelquota._core.layout cimport LIMITS

from modelquota._core.state.packing import dtypes

cnp.import_array()

cdef extern from "numpy/arrayobject.h":
    object new_array "PyArray_NewFromDescr"(PyTypeObject* kind, cnp.dtype dtype, int ndim, const cnp.npy_intp* shape,
                                            const cnp.npy_intp* strides, void* data, int flags, PyObject* like)
    PyTypeObject ARRAY "PyArray_Type"


@functools.cache
def record_dtype():
    """The dtype of a snapshot: the model's id, then the counters of `Usage`. Created on first use: it takes 1 ms.

    Array fields of `Usage` are in its bytes, but have no name in it; see `percents_of`.
    """
    usage = dtypes()["usage"]
    fields = {"model_id": (np.dtype(object), 0)}
    fields |= {name: (kind, sizeof(void*) + offset) for name, (kind, offset) in usage.fields.items() if not kind.shape}
    kinds, offsets = zip(*fields.values())
    dtype = np.dtype({"names": list(fields), "formats": kinds, "offsets": offsets,
                      "itemsize": sizeof(void*) + usage.itemsize})
    if dtype.itemsize != sizeof(Record):
        raise AssertionError(f"{dtype} is not laid out as Record")
    return dtype


def percents_of(cnp.ndarray records):
    """How full each limit is, in percent: a float64 array, one row per model, one column per `Limit`."""
    cdef Py_ssize_t i, count = records.shape[0]
    cdef const Record* record = first_of(records)
    cdef cnp.ndarray found = np.empty((count, LIMITS - 1))
    cdef double* percent = <double*> cnp.PyArray_DATA(found)
    for i in range(count):
        memcpy(percent + i * (LIMITS - 1), &record[i].usage.percent[1], (LIMITS - 1) * sizeof(double))
    return found


def left_of(cnp.ndarray records):
    """What each limit still admits, -1 if it is not set: an int64 array, shaped as that of `percents_of`."""
    cdef Py_ssize_t i, count = records.shape[0]
    cdef const Record* record = first_of(records)
    cdef cnp.ndarray found = np.empty((count, LIMITS - 1), np.int64)
    cdef int64_t* left = <int64_t*> cnp.PyArray_DATA(found)
    for i in range(count):
        memcpy(left + i * (LIMITS - 1), &record[i].usage.left[1], (LIMITS - 1) * sizeof(int64_t))
    return found


cdef const Record* first_of(cnp.ndarray records) except NULL:
    """The memory of the records; as they were read, since a copy of a part may leave out what has no name."""
    if records.dtype is not record_dtype() or not cnp.PyArray_ISCARRAY(records):
        raise ValueError("give the records of a snapshot as they were read")
    return <const Record*> cnp.PyArray_DATA(records)


cdef class Records:
    """Memory for records, kept alive by the array over it. It owns the references in the records."""

    def __cinit__(self, Py_ssize_t count):
        self.first = <Record*> calloc(max(count, 1), sizeof(Record))
        if self.first == NULL:
            raise MemoryError(f"no memory for {count} records")
        self.count = count

    def __dealloc__(self):
        cdef Py_ssize_t i
        if self.first != NULL:
            for i in range(self.count):
                Py_XDECREF(<PyObject*> self.first[i].model_id)
            free(self.first)

    cdef int put_id(self, Py_ssize_t index, object model_id) except -1:
        """Set the id of a record that does not have one."""
        Py_INCREF(model_id)
        self.first[index].model_id = <void*> model_id
        return 0

    cdef object array(self, Py_ssize_t count):
        """The first `count` records as a numpy array."""
        cdef cnp.npy_intp shape = count
        cdef cnp.dtype dtype = record_dtype()
        Py_INCREF(dtype)        # numpy takes ownership of this reference
        array = new_array(&ARRAY, dtype, 1, &shape, NULL, self.first, cnp.NPY_ARRAY_CARRAY, NULL)
        cnp.set_array_base(array, self)
        return array
