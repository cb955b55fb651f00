from modelquota._core.row.usage cimport Usage


cdef struct Record:
    # One element of a snapshot; `record_dtype()` is its dtype.
    void* model_id          # a reference, or NULL
    Usage usage


cdef class Records:
    cdef Record* first
    cdef Py_ssize_t count   # how many records there is room for

    cdef int put_id(self, Py_ssize_t index, object model_id) except -1
    cdef object array(self, Py_ssize_t count)
