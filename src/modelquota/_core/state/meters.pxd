# Meters: rows that are decided together with the row of their model. A model's row has a list of them, so that a batch
# finds them without the GIL. Lists change under the registry's lock and the model's. A reader needs neither: under the
# model's lock, ColdRow.meters_epoch tells it whether it has read the list as it is.
#
# A change of a list is journaled in the header: a meter is in the list of the model that its `meter_of` names, and the
# process that takes over the registry's lock after a death makes that true again.
from libc.stdint cimport uint32_t
from modelquota._core.atomics cimport compiler_barrier, store_u32
from modelquota._core.layout cimport ColdRow, Row, Shared

cdef enum:
    MOST_METERS = 14        # of one model: with it they are as many as one decision has


cdef inline bint has_meter(uint32_t model, uint32_t meter, const Shared* shared) noexcept nogil:
    """Whether a model's list contains a meter, and the meter says so. Requires the registry's lock.

    After the death of a process that was registering the model, the meter may name a row that has no list yet.
    """
    cdef uint32_t link = shared.cold_rows[model].first_meter
    if shared.cold_rows[meter].meter_of != model + 1:
        return False
    for _ in range(MOST_METERS):
        if link == 0 or link > shared.header.max_models or link == meter + 1:
            break
        link = shared.cold_rows[link - 1].next_meter
    return link == meter + 1


cdef inline void sync_meter(uint32_t model, uint32_t meter, const Shared* shared) noexcept nogil:
    """Have a model's list contain a meter if and only if the meter is its.

    Requires the registry's lock and the model's.
    """
    cdef Row* row = &shared.rows[model]
    cdef ColdRow* cold = &shared.cold_rows[model]
    cdef ColdRow* one = &shared.cold_rows[meter]
    cdef bint wanted = one.meter_of == model + 1
    cdef bint found = False
    cdef uint32_t* place = &cold.first_meter
    cdef int count = 0
    for _ in range(MOST_METERS + 1):
        if place[0] == 0 or place[0] > shared.header.max_models:
            break
        if place[0] == meter + 1:
            found = True
            if not wanted:
                store_u32(place, one.next_meter)
                continue
        count += 1
        place = &shared.cold_rows[place[0] - 1].next_meter
    if wanted and not found:
        one.next_meter = 0
        compiler_barrier()
        store_u32(place, meter + 1)
        count += 1
    row.meters = <unsigned char> count
    compiler_barrier()
    store_u32(&cold.meters_epoch, cold.meters_epoch + 1)


cdef inline void assign_meter(uint32_t model, uint32_t meter, bint member, const Shared* shared) noexcept nogil:
    """Put a meter into its model's list, or take it out. Requires the registry's lock and the model's."""
    shared.header.linking_model = model + 1
    compiler_barrier()
    shared.header.linking_meter = meter + 1
    compiler_barrier()
    shared.cold_rows[meter].meter_of = model + 1 if member else 0
    compiler_barrier()
    sync_meter(model, meter, shared)
    compiler_barrier()
    shared.header.linking_meter = 0
