from modelquota._core.layout cimport Limits


cdef int pack(object config, Limits* limits) except -1
cdef dict unpack(const Limits* limits)
