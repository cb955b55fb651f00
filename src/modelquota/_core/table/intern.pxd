from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.layout cimport ColdRow, Limits, Row
from modelquota._core.row.usage cimport Usage
from modelquota._core.state.registry cimport MeterRows
from modelquota._core.state.state cimport State


cdef inline str plain_id(object model_id):
    """An id as an exact str, whose hash and comparison do not run foreign code."""
    if type(model_id) is str:
        return <str> model_id
    if not isinstance(model_id, str):
        raise TypeError(f"model_id is {model_id!r}; give a str")
    return str.__str__(model_id)


cdef class RowRef:
    # The row of a model. Valid as long as the row's generation is this one.
    cdef Row* row
    cdef ColdRow* cold
    cdef uint32_t generation
    cdef str model_id
    cdef object plan                # what header fields say of its limits, made when it is first asked for


cdef class Interned:
    cdef State state
    cdef dict ids                   # model id -> RowRef
    cdef dict meters                # model id -> RowRefs of its meters, if it has any
    cdef list unlinked              # pairs of RowRefs, model and meter, that may not be linked yet
    cdef uint64_t seen_version      # the registry version that `ids` reflects
    cdef PyObject** refs            # the RowRef of each row, or NULL
    cdef int64_t refs_used          # no row at or above this index has had one
    cdef object packed_config       # the config that was packed last,
    cdef Limits packed              # and its limits

    cdef int open(self) except -1
    cdef int refresh(self) except -1
    cdef int refresh_row(self, int64_t index) except -1
    cdef int refresh_all(self) except -1
    cdef int intern(self, object model_id, int64_t index, uint32_t generation) except -1
    cdef int unintern(self, RowRef ref) except -1
    cdef int unintern_if_removed(self, RowRef ref) except -1
    cdef RowRef ref_at(self, int64_t index, uint32_t generation)
    cdef int join(self, RowRef ref) except -1
    cdef int link_meters(self, bint wait) except -1
    cdef int meters_of(self, str model_id, MeterRows* meters) except -1
    cdef RowRef find(self, str model_id)
    cdef RowRef require(self, object model_id)
    cdef bint put(self, str model_id, object config, bint on_sight, bint only_new) except -1
    cdef bint swap(self, object old, object new, bint named) except -1
    cdef bint remove(self, object model_id, object expected) except -1
    cdef bint holds(self, RowRef ref, object config, Limits* limits) except -1
    cdef int pack_limits(self, object config, Limits* limits) except -1
    cdef int change_limits(self, RowRef ref, const Limits* limits, const Limits* expected, bint named) except -2
    cdef bint read(self, RowRef ref, int64_t now_ns, Usage* usage, Limits* limits) except -1
    cdef str name_of(self, int64_t index)
