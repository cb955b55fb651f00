# Counts that a caller gives: anything with __index__, 0 .. MAX_COUNT.
from cpython.long cimport PyLong_AsLongLongAndOverflow, PyLong_CheckExact
from cpython.number cimport PyNumber_Index
from libc.stdint cimport int64_t
from modelquota._core.layout cimport MAX_COUNT


cdef inline int bad_count(object value, str name) except -1:
    number = PyNumber_Index(value)      # TypeError for a float
    raise ValueError(f"{name} is {number}; give an integer, 0 .. 2**62")


cdef inline int64_t as_count(object value, str name) except -1:
    cdef int overflow = 0
    cdef int64_t count
    if PyLong_CheckExact(value):
        count = PyLong_AsLongLongAndOverflow(value, &overflow)
    else:
        count = PyLong_AsLongLongAndOverflow(PyNumber_Index(value), &overflow)
    if overflow or count < 0 or count > MAX_COUNT:
        bad_count(value, name)
    return count
