# The lock in a row: one word in shared memory, 0 when free, otherwise the seat word of its owner.
#
# It guards one row for some tens of nanoseconds and works across processes, because it lives in the mapping. From lock to
# unlock nothing takes the GIL, allocates, raises, or touches a Python object: a thread that waits for the GIL with a row
# locked would stop that model in every other process. Who holds the GIL tries spin_lock() first and releases the GIL before
# it waits.
#
# Each process has a seat, and holds the byte of the file with that number by an open-file-description lock, which the
# kernel drops at its death, in whatever PID namespace. Who has waited too long asks the kernel, and takes the lock over
# from a dead owner. A seat word also has the number of times that the seat was taken, so that the next one who sits there
# is never mistaken for the dead. An owner that is stopped (SIGSTOP, a debugger, a paused container) is alive and cannot be
# taken over: every wait has an end, and callers return to Python in between, for signals and timeouts.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.layout cimport SEAT_BITS, SEATS, Shared

cdef extern from *:
    """
    #include <fcntl.h>
    #include <sched.h>
    #include <stdint.h>
    #include <sys/stat.h>
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
    static inline int64_t mq_monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
    }
    static inline int mq_is_file(int fd, uint64_t device, uint64_t inode) {
        struct stat found;
        return fstat(fd, &found) == 0 && (uint64_t)found.st_dev == device && (uint64_t)found.st_ino == inode;
    }
    static inline int mq_seat_byte(int fd, int command, unsigned seat, int *type) {
        struct flock byte = {.l_type = *type, .l_whence = SEEK_SET, .l_start = seat, .l_len = 1, .l_pid = 0};
        int failed = fcntl(fd, command, &byte);
        *type = byte.l_type;
        return failed;
    }
    static inline int mq_take_seat(int fd, unsigned seat) {
        int type = F_WRLCK;
        return mq_seat_byte(fd, F_OFD_SETLK, seat, &type) == 0;
    }
    /* If the kernel does not answer, it is. Asked so that locks of those who may only read the file do not count. */
    static inline int mq_is_taken(int fd, unsigned seat) {
        int type = F_RDLCK;
        return mq_seat_byte(fd, F_OFD_GETLK, seat, &type) != 0 || type != F_UNLCK;
    }
    static inline uint32_t mq_load(const uint32_t *word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }
    static inline int mq_swap(uint32_t *word, uint32_t from, uint32_t to) {
        return __atomic_compare_exchange_n(word, &from, to, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
    }
    """
    bint take_seat "mq_take_seat"(int fd, uint32_t seat) noexcept nogil
    bint is_taken "mq_is_taken"(int fd, uint32_t seat) noexcept nogil
    bint is_file "mq_is_file"(int fd, uint64_t device, uint64_t inode) noexcept nogil
    uint32_t load_word "mq_load"(const uint32_t* word) noexcept nogil
    bint swap_word "mq_swap"(uint32_t* word, uint32_t before, uint32_t after) noexcept nogil
    bint try_lock "mq_try_lock"(uint32_t* word, uint32_t seat) noexcept nogil
    bint is_free "mq_is_free"(const uint32_t* word) noexcept nogil
    void unlock "mq_unlock"(uint32_t* word) noexcept nogil
    void relax "mq_relax"() noexcept nogil
    void nap "mq_nap"(long ns) noexcept nogil
    void yield_processor "sched_yield"() noexcept nogil
    int64_t wait_clock_ns "mq_monotonic_ns"() noexcept nogil

cdef enum:
    SPINS = 200                 # longer than a critical section, shorter than a time slice
    YIELDS = 50
    NAP_NS = 50_000             # an owner that was preempted is away for milliseconds
    LONGEST_NAP_NS = 1_000_000
    SLICE_NS = 20_000_000       # the longest wait for a lock without a look at signals

cdef enum:  # what comes of a wait for a lock
    LOCKED = 0
    TAKEN_OVER = 1              # from a dead owner: what it was doing is to be repaired
    NOT_LOCKED = 2


cdef inline bint spin_lock(uint32_t* word, uint32_t seat) noexcept nogil:
    """Take the lock if its owner lets go within about a microsecond."""
    cdef int i
    for i in range(SPINS):
        if is_free(word) and try_lock(word, seat):
            return True
        relax()
    return False


cdef inline bint has_seat(const Shared* shared) noexcept nogil:
    """Whether nobody else has taken this process's seat since."""
    return load_word(&shared.epochs[shared.me & (SEATS - 1)]) == shared.me >> SEAT_BITS


cdef inline bint is_gone(uint32_t owner, const Shared* shared) noexcept nogil:
    """Whether the process that an owner's word names has died. Asks the kernel: some 1.2 us."""
    cdef uint32_t seat = owner & (SEATS - 1)
    if owner == shared.me:
        return False
    if seat == 0 or load_word(&shared.epochs[seat]) != owner >> SEAT_BITS:
        return True
    # by a descriptor that was closed underneath and opened again for something else, everybody would be dead
    return is_file(shared.fd, shared.device, shared.inode) and not is_taken(shared.fd, seat)


cdef inline bint take_over(uint32_t* word, const Shared* shared) noexcept nogil:
    """Take a lock from an owner that has died; what it was doing is to be repaired."""
    cdef uint32_t owner = load_word(word)
    return owner != 0 and is_gone(owner, shared) and swap_word(word, owner, shared.me)


cdef inline int lock_within(uint32_t* word, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Take the lock: spin, then give the processor away between tries, so that a preempted owner gets on.

    NOT_LOCKED if that was in vain for `patience_ns`, or the state is being closed. With 0 it only spins, and asks once
    whether the owner is dead.
    """
    cdef int round
    cdef int64_t give_up_ns
    cdef long nap_ns = NAP_NS
    if try_lock(word, shared.me) or spin_lock(word, shared.me):
        return LOCKED
    if patience_ns <= 0:
        return TAKEN_OVER if take_over(word, shared) else NOT_LOCKED
    for round in range(YIELDS):
        yield_processor()
        if spin_lock(word, shared.me):
            return LOCKED
    give_up_ns = wait_clock_ns() + patience_ns
    while True:
        if take_over(word, shared):
            return TAKEN_OVER
        if load_word(&shared.closing) or wait_clock_ns() >= give_up_ns:
            return NOT_LOCKED
        nap(nap_ns)
        nap_ns = min(2 * nap_ns, <long> LONGEST_NAP_NS)
        if spin_lock(word, shared.me):
            return LOCKED
