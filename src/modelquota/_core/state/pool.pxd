# Pools of records in shared memory: grant records and queue entries. A process claims and returns them by chunks.
#
# The owner of each chunk is in the mapping, claimed by compare-and-swap; which of its records are free, only the owner
# knows. Functions without `nogil` require the GIL. A chunk is returned when all of its records are free, unless it is
# the only one with free records; otherwise a process that once had many grants would keep their chunks.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from modelquota._core.atomics cimport load_u32, swap_u32
from modelquota._core.layout cimport CHUNK, CHUNKS, Pool

cdef extern from *:
    """
    #define MQ_ALL_FREE UINT64_MAX
    """
    const uint64_t ALL_FREE "MQ_ALL_FREE"
    int lowest_bit "__builtin_ctzll"(uint64_t bits) noexcept nogil


cdef inline bint start_pool(Pool* pool) noexcept:
    """Initialize with no chunk; False if there is no memory."""
    if pool.free == NULL:
        pool.free = <uint64_t*> calloc(CHUNKS, sizeof(uint64_t))
        pool.open = <uint32_t*> calloc(CHUNKS, sizeof(uint32_t))
    return pool.free != NULL and pool.open != NULL


cdef inline void end_pool(Pool* pool) noexcept:
    free(pool.free)
    free(pool.open)
    pool.free = NULL
    pool.open = NULL
    pool.open_count = 0


cdef inline void* record_at(const Pool* pool, int64_t number) noexcept nogil:
    return pool.records + number * pool.record_size


cdef inline int64_t claim_chunk(Pool* pool, uint32_t me) noexcept:
    """Claim a free chunk, and return it, or -1 if there is none. Its records cannot be taken before open_chunk()."""
    cdef uint32_t chunk
    for chunk in range(CHUNKS):
        if load_u32(&pool.owners[chunk]) == 0 and swap_u32(&pool.owners[chunk], 0, me):
            return chunk
    return -1


cdef inline void open_chunk(Pool* pool, int64_t chunk) noexcept:
    """Make the records of a claimed chunk available. Requires that space has been reserved for them."""
    cdef uint32_t used = load_u32(pool.chunks_used)
    while used <= chunk and not swap_u32(pool.chunks_used, used, <uint32_t> chunk + 1):
        used = load_u32(pool.chunks_used)
    pool.free[chunk] = ALL_FREE
    pool.open[pool.open_count] = <uint32_t> chunk
    pool.open_count += 1


cdef inline int64_t take_record(Pool* pool) noexcept:
    """Take a free record and return its number, or -1 if another chunk has to be claimed first."""
    cdef uint32_t chunk
    cdef int bit
    if pool.open_count == 0:
        return -1
    chunk = pool.open[pool.open_count - 1]
    bit = lowest_bit(pool.free[chunk])
    pool.free[chunk] &= pool.free[chunk] - 1
    if pool.free[chunk] == 0:
        pool.open_count -= 1
    return <int64_t> chunk * CHUNK + bit


cdef inline void give_record(Pool* pool, int64_t number, uint32_t me) noexcept:
    """Return a record that is no longer referred to; with the last one of a chunk, return the chunk."""
    cdef uint32_t chunk = <uint32_t> (number // CHUNK)
    cdef uint32_t at
    if pool.free[chunk] == 0:
        pool.open[pool.open_count] = chunk
        pool.open_count += 1
    pool.free[chunk] |= <uint64_t> 1 << (number % CHUNK)
    if pool.free[chunk] == ALL_FREE and pool.open_count > 1:
        at = pool.open_count - 1
        while pool.open[at] != chunk:
            at -= 1
        pool.open_count -= 1
        pool.open[at] = pool.open[pool.open_count]
        pool.free[chunk] = 0
        swap_u32(&pool.owners[chunk], me, 0)
