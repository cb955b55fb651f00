# The lock in a row: one word in shared memory, 0 when free, otherwise the seat of its owner.
#
# It guards one row for some tens of nanoseconds, never touches a Python object while held, and works across processes
# because it lives in the mapping. lock() may be called with or without the GIL; who holds the GIL tries try_lock() first
# and releases the GIL before it waits.
from libc.stdint cimport uint32_t

cdef extern from *:
    """
    #include <sched.h>
    #include <stdint.h>
    #include <time.h>

    static inline int mq_try_lock(uint32_t *word, uint32_t seat) {
        uint32_t expected = 0;
        return __atomic_compare_exchange_n(word, &expected, seat, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    }
    static inline int mq_is_free(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_RELAXED) == 0; }
    static inline void mq_unlock(uint32_t *word) { __atomic_store_n(word, 0, __ATOMIC_RELEASE); }
    static inline void mq_relax(void) {
    #if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
    #elif defined(__aarch64__)
        __asm__ __volatile__("yield");
    #endif
    }
    static inline void mq_nap(long ns) {
        struct timespec nap = {0, ns};
        nanosleep(&nap, NULL);
    }
    """
    bint try_lock "mq_try_lock"(uint32_t* word, uint32_t seat) noexcept nogil
    bint is_free "mq_is_free"(const uint32_t* word) noexcept nogil
    void unlock "mq_unlock"(uint32_t* word) noexcept nogil
    void relax "mq_relax"() noexcept nogil
    void nap "mq_nap"(long ns) noexcept nogil
    void yield_processor "sched_yield"() noexcept nogil

cdef enum:
    SPINS = 200          # longer than a critical section, shorter than a time slice
    YIELDS = 50
    NAP_NS = 50_000      # an owner that was preempted is away for milliseconds


cdef inline bint spin_lock(uint32_t* word, uint32_t seat) noexcept nogil:
    """Take the lock if its owner lets go within about a microsecond."""
    cdef int i
    for i in range(SPINS):
        if is_free(word) and try_lock(word, seat):
            return True
        relax()
    return False


cdef inline void lock(uint32_t* word, uint32_t seat) noexcept nogil:
    """Take the lock: spin, then give the processor away between tries, so that a preempted owner gets on."""
    cdef int round = 0
    if try_lock(word, seat):
        return
    while not spin_lock(word, seat):
        if round < YIELDS:
            yield_processor()
        else:
            nap(NAP_NS)
        round += 1
