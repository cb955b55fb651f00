"""The arrays of a batch: validated, and copied so that the caller cannot change them while they are used."""
import numpy as np
cimport numpy as cnp
from libc.stdint cimport int64_t

from modelquota._core.layout cimport KINDS
from modelquota._core.row.tokens cimport Kinds
from modelquota._core.table.arguments cimport as_kinds
from modelquota._core.table.batch cimport first_out_of_range

cnp.import_array()


cdef cnp.ndarray int64_copy(object values, str name, int most_dimensions=1):
    """A private, contiguous copy: what was validated is what is charged, even if the original has changed."""
    cdef cnp.ndarray array
    if cnp.PyArray_CheckExact(values) and cnp.PyArray_TYPE(values) == cnp.NPY_INT64 \
            and cnp.PyArray_ISNOTSWAPPED(values) and cnp.PyArray_NDIM(values) == 1:
        return cnp.PyArray_NewCopy(values, cnp.NPY_CORDER)
    array = np.asarray(values)
    if (<object> array).size and (<object> array).dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {(<object> array).dtype}; give int64")
    if not 1 <= array.ndim <= most_dimensions:
        raise ValueError(f"{name} has shape {(<object> array).shape}; give one dimension"
                         + (", or two" if most_dimensions == 2 else ""))
    if isinstance(values, np.ndarray) and np.ma.is_masked(values):
        raise ValueError(f"{name} has masked elements; give only those that are to be decided")
    return np.array(array, np.int64, order="C", copy=True)


cdef cnp.ndarray token_counts(object values, str name, Py_ssize_t count):
    """Tokens of each element: shape (count,), or (count, KINDS) for input, cached and output tokens."""
    cdef cnp.ndarray array
    cdef const int64_t* first
    cdef Py_ssize_t bad, size
    cdef Kinds kinds
    if not isinstance(values, np.ndarray) and (hasattr(values, "__index__") or hasattr(values, "cached")):
        as_kinds(values, name, &kinds)
        if not kinds.split:
            return np.full(count, kinds.count, np.int64)
        return np.tile(np.array([kinds.counts[0], kinds.counts[1], kinds.counts[2]], np.int64), (count, 1))
    array = int64_copy(values, name, 2)
    require_length(array, name, count)
    if array.ndim == 2 and array.shape[1] != KINDS:
        raise ValueError(f"{name} has shape {(<object> array).shape}; give ({count},), or ({count}, 3) for input, "
                         "cached and output tokens")
    first = <const int64_t*> cnp.PyArray_DATA(array)
    size = cnp.PyArray_SIZE(array)
    with nogil:
        bad = first_out_of_range(first, size)
    if bad < size:
        place = f"{bad // KINDS}, {bad % KINDS}" if array.ndim == 2 else str(bad)
        raise ValueError(f"{name}[{place}] is {first[bad]}; give an integer, 0 .. 2**62")
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
