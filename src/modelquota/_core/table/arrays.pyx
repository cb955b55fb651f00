"""The arrays of a batch: validated, and copied so that the caller cannot change them while they are used."""
import numpy as np
cimport numpy as cnp
from libc.stdint cimport int64_t

from modelquota._core.table.arguments cimport as_count
from modelquota._core.table.batch cimport first_out_of_range

cnp.import_array()


cdef cnp.ndarray int64_copy(object values, str name):
    """A private, contiguous copy: what was validated is what is charged, even if the original has changed."""
    cdef cnp.ndarray array
    if cnp.PyArray_CheckExact(values) and cnp.PyArray_TYPE(values) == cnp.NPY_INT64 \
            and cnp.PyArray_ISNOTSWAPPED(values) and cnp.PyArray_NDIM(values) == 1:
        return cnp.PyArray_NewCopy(values, cnp.NPY_CORDER)
    array = np.asarray(values)
    if (<object> array).size and (<object> array).dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {(<object> array).dtype}; give int64")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {(<object> array).shape}; give one dimension")
    if isinstance(values, np.ndarray) and np.ma.is_masked(values):
        raise ValueError(f"{name} has masked elements; give only those that are to be decided")
    return np.array(array, np.int64, order="C", copy=True)


cdef cnp.ndarray token_counts(object values, str name, Py_ssize_t count):
    cdef cnp.ndarray array
    cdef const int64_t* first
    cdef Py_ssize_t bad
    if not isinstance(values, np.ndarray) and hasattr(values, "__index__"):
        return np.full(count, as_count(values, name), np.int64)
    array = int64_copy(values, name)
    require_length(array, name, count)
    first = <const int64_t*> cnp.PyArray_DATA(array)
    with nogil:
        bad = first_out_of_range(first, count)
    if bad < count:
        raise ValueError(f"{name}[{bad}] is {first[bad]}; give an integer, 0 .. 2**62")
    return array


cdef int require_length(cnp.ndarray array, str name, Py_ssize_t count) except -1:
    if array.shape[0] != count:
        raise ValueError(f"{name} has {array.shape[0]} elements and codes has {count}; give one each")
    return 0


cdef int require_target(object array, str name, object dtype, Py_ssize_t count) except -1:
    """Require that C can fill `array`. Uses numpy's own accessors: a subclass may override dtype, shape and flags."""
    cdef cnp.ndarray target
    if not isinstance(array, np.ndarray) or type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is {type(array).__name__}; give a {np.dtype(dtype)} array")
    target = array
    actual = np.ndarray.dtype.__get__(target)
    if actual != dtype:
        raise TypeError(f"{name} is {actual}; give a {np.dtype(dtype)} array")
    if cnp.PyArray_NDIM(target) != 1 or cnp.PyArray_DIM(target, 0) != count:
        raise ValueError(f"{name} has shape {array.shape}; give ({count},)")
    if not cnp.PyArray_ISCARRAY(target):
        raise ValueError(f"{name} cannot be filled in place; give a contiguous, writeable array")
    return 0
