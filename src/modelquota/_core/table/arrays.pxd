cimport numpy as cnp


cdef cnp.ndarray int64_copy(object values, str name, int most_dimensions=*)
cdef cnp.ndarray token_counts(object values, str name, Py_ssize_t count)
cdef int require_length(cnp.ndarray array, str name, Py_ssize_t count) except -1
cdef int require_target(object array, str name, object dtype, Py_ssize_t count) except -1
