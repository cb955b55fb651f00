from modelquota._core.state.pools cimport Pools
from modelquota._core.state.state cimport State
from modelquota._core.table.intern cimport Interned


cdef object read_model(Interned interned, Pools pools, object model_id)
cdef object read_models(Interned interned, Pools pools)
cdef dict totals_of(State state)
