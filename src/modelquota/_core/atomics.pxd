# Atomic operations on words that several threads or processes use at once, and the compiler barrier.
#
# Loads acquire and stores release, unless the name says otherwise; additions and swaps do both. An addition returns the
# value before it. A swap stores `after` only if the word is still `before`, and returns whether it was.
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef extern from *:
    """
    #define MQ_LOAD(word) __atomic_load_n(word, __ATOMIC_ACQUIRE)
    #define MQ_LOAD_RELAXED(word) __atomic_load_n(word, __ATOMIC_RELAXED)
    #define MQ_STORE(word, value) __atomic_store_n(word, value, __ATOMIC_RELEASE)
    #define MQ_STORE_RELAXED(word, value) __atomic_store_n(word, value, __ATOMIC_RELAXED)
    #define MQ_ADD(word, more) __atomic_fetch_add(word, more, __ATOMIC_ACQ_REL)
    #define MQ_ADD_RELAXED(word, more) __atomic_fetch_add(word, more, __ATOMIC_RELAXED)
    #define MQ_COMPILER_BARRIER() __atomic_signal_fence(__ATOMIC_SEQ_CST)
    static inline int mq_swap_u32(uint32_t *word, uint32_t before, uint32_t after) {
        return __atomic_compare_exchange_n(word, &before, after, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }
    static inline int mq_swap_u64(uint64_t *word, uint64_t before, uint64_t after) {
        return __atomic_compare_exchange_n(word, &before, after, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }
    static inline int mq_swap_i64(int64_t *word, int64_t before, int64_t after) {
        return __atomic_compare_exchange_n(word, &before, after, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    static inline int mq_swap_u32_acquire(uint32_t *word, uint32_t before, uint32_t after) {
        return __atomic_compare_exchange_n(word, &before, after, 0, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED);
    }
    """
    uint8_t load_u8 "MQ_LOAD"(const uint8_t* word) noexcept nogil
    uint32_t load_u32 "MQ_LOAD"(const uint32_t* word) noexcept nogil
    uint64_t load_u64 "MQ_LOAD"(const uint64_t* word) noexcept nogil
    int64_t load_i64 "MQ_LOAD"(const int64_t* word) noexcept nogil
    char load_char_relaxed "MQ_LOAD_RELAXED"(const char* word) noexcept nogil
    uint32_t load_u32_relaxed "MQ_LOAD_RELAXED"(const uint32_t* word) noexcept nogil
    int64_t load_i64_relaxed "MQ_LOAD_RELAXED"(const int64_t* word) noexcept nogil

    void store_u32 "MQ_STORE"(uint32_t* word, uint32_t value) noexcept nogil
    void store_u64 "MQ_STORE"(uint64_t* word, uint64_t value) noexcept nogil
    void store_i64 "MQ_STORE"(int64_t* word, int64_t value) noexcept nogil
    void store_i64_relaxed "MQ_STORE_RELAXED"(int64_t* word, int64_t value) noexcept nogil

    uint32_t add_u32 "MQ_ADD"(uint32_t* word, uint32_t more) noexcept nogil
    uint64_t add_u64 "MQ_ADD"(uint64_t* word, uint64_t more) noexcept nogil
    uint64_t add_u64_relaxed "MQ_ADD_RELAXED"(uint64_t* word, uint64_t more) noexcept nogil
    int64_t add_i64_relaxed "MQ_ADD_RELAXED"(int64_t* word, int64_t more) noexcept nogil

    bint swap_u32 "mq_swap_u32"(uint32_t* word, uint32_t before, uint32_t after) noexcept nogil
    bint swap_u64 "mq_swap_u64"(uint64_t* word, uint64_t before, uint64_t after) noexcept nogil
    bint swap_i64 "mq_swap_i64"(int64_t* word, int64_t before, int64_t after) noexcept nogil
    bint swap_u32_acquire "mq_swap_u32_acquire"(uint32_t* word, uint32_t before, uint32_t after) noexcept nogil

    # No instruction: keeps the compiler from moving loads and stores across it. A process may die between any two
    # instructions, so the order in which it writes matters even under a lock.
    void compiler_barrier "MQ_COMPILER_BARRIER"() noexcept nogil
