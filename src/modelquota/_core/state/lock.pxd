# Locks and seats. A lock is one word in shared memory: 0 if it is free, otherwise the seat word of its owner.
#
# The lock of a row is held for some tens of nanoseconds, and works across processes because it is in the mapping. From
# lock to unlock nothing takes the GIL, allocates, raises, or touches a Python object: a thread that waited for the GIL
# with a row locked would stop that model in every other process. A thread that has the GIL tries spin_lock() first, and
# releases the GIL before it waits.
#
# Each process has a seat, a number, and holds an open-file-description lock on the byte of the file with that number.
# The kernel drops it when the process dies, in whatever PID namespace. A waiter that has spun too long asks the kernel
# whether the owner is alive, and takes the lock over if not. A seat word also contains the seat's epoch, the number of
# times that the seat has been taken, so the next process with that seat is never mistaken for the dead one. An owner
# that is stopped (SIGSTOP, a debugger, a paused container) is alive, and its locks cannot be taken over: every wait has
# an end, and callers return to Python in between, for signals and timeouts.
#
# A seat is held by a write lock on its byte. A process that may only read the file can place read locks, and so keep
# every other process from a write lock. Then a seat is held by a read lock, together with the process id in the seat's
# `holder`. No two processes have the same seat, because `holder` is only changed by a process that has the byte locked,
# by compare-and-swap:
# - A process with the write lock is alone: no holder by process id is alive, since it would have its read lock.
# - A process with a read lock knows that no holder by write lock is alive. Of several with a read lock, each takes the
#   seat only if `holder` does not name a living process. It claims the seat, writes its `space`, and then makes the
#   claim sure. A claim that is not sure does not count, and another process may claim over it. That changes the epoch,
#   so the next swap of the first one fails: that of the claim; or that of `space`, which contains the epoch too, if the
#   other one has written it. If the first one wrote `space` before, the swap of the other one fails, and both look for
#   another seat. So a sure claim always has the `space` of the process that made it.
# - A holder by process id tries from time to time to turn its read lock into a write lock, which the kernel does at
#   once or not at all, and only then removes its process id. It holds the seat before, during and after that.
# - A reader that comes or goes changes which locks are available, and never `holder`.
#
# A holder by process id is dead if no process at all has its byte locked; otherwise, if that process does not exist or
# is a zombie, or its id now belongs to another process. In another PID namespace that cannot be known: there it counts
# as alive until no reader has the byte locked. So does one that has called exec, which keeps the process id.
from libc.stdint cimport int64_t, uint32_t, uint64_t
from modelquota._core.atomics cimport (
    load_u32, load_u32_relaxed, load_u64, store_u32, swap_u32, swap_u32_acquire, swap_u64
)
from modelquota._core.layout cimport SEATS, SEAT_BITS, Seat, Shared

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <time.h>
    #include <unistd.h>

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
    static inline int mq_lock_seat(int fd, unsigned seat, int type) {
        return mq_seat_byte(fd, F_OFD_SETLK, seat, &type) == 0;
    }
    /* Whether another lock excludes one of this type by `fd`. Yes, if the kernel does not answer. */
    static inline int mq_is_locked(int fd, unsigned seat, int type) {
        return mq_seat_byte(fd, F_OFD_GETLK, seat, &type) != 0 || type != F_UNLCK;
    }

    /* `holder`: from the lowest bit, the epoch, the process id, the process's mark, SURE; id and mark are 0 if the seat
       is held by the write lock alone */
    #define MQ_EPOCHS ((UINT64_C(1) << 22) - 1)
    #define MQ_PID_BITS 22          /* the longest process id of the kernel */
    #define MQ_MARK_BITS 19
    #define MQ_SURE (UINT64_C(1) << 63)
    #define MQ_PID(holder) ((pid_t)((holder) >> 22 & ((1 << MQ_PID_BITS) - 1)))

    /* Reads state, number of threads, and start in ticks from /proc/PID/stat. 0 if it cannot be read. */
    static inline int mq_read_process(pid_t pid, char *state, long *threads, uint64_t *start) {
        char text[1024];
        snprintf(text, sizeof text, "/proc/%ld/stat", (long)pid);
        int fd = open(text, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return 0;
        ssize_t size = read(fd, text, sizeof text - 1);
        close(fd);
        text[size > 0 ? size : 0] = 0;
        const char *at = strrchr(text, ')');    /* the end of field 2, which may contain anything */
        int field = 2;
        while (at != NULL && (at = strchr(at, ' ')) != NULL) {
            at++;
            field++;
            if (field == 3)
                *state = *at;
            else if (field == 20)
                *threads = strtol(at, NULL, 10);
            else if (field == 22) {
                *start = strtoull(at, NULL, 10);
                return 1;
            }
        }
        return 0;
    }
    static inline uint64_t mq_process_bits(pid_t pid, uint64_t start, uint64_t boot) {
        uint64_t mark = (start ^ boot) * UINT64_C(0x9E3779B97F4A7C15) >> (64 - MQ_MARK_BITS);
        return mark << 44 | (uint64_t)pid << 22;
    }
    /* The bits of `holder` in a seat that this process holds by its id; 0 if others could not look the process up. */
    static inline uint64_t mq_own_bits(uint64_t boot) {
        char state;
        long threads;
        uint64_t start;
        pid_t pid = getpid();
        return pid >> MQ_PID_BITS == 0 && mq_read_process(pid, &state, &threads, &start)
            ? mq_process_bits(pid, start, boot) : 0;
    }
    /* A process whose first thread has ended looks like a zombie too, while other threads run. One that /proc hides is
       alive. */
    static inline int mq_is_process_gone(uint64_t holder, uint64_t boot) {
        char state = 0;
        long threads = 0;
        uint64_t start = 0;
        pid_t pid = MQ_PID(holder);
        if (kill(pid, 0) != 0 && errno == ESRCH)
            return 1;
        if (!mq_read_process(pid, &state, &threads, &start))
            return 0;
        return (threads <= 1 && (state == 'Z' || state == 'X')) ||
            mq_process_bits(pid, start, boot) != (holder & ~(MQ_EPOCHS | MQ_SURE));
    }
    """
    const int READ_LOCK "F_RDLCK"
    const int WRITE_LOCK "F_WRLCK"
    const int NO_LOCK "F_UNLCK"
    const uint64_t EPOCHS "MQ_EPOCHS"
    const uint64_t SURE "MQ_SURE"
    bint lock_seat "mq_lock_seat"(int fd, uint32_t seat, int type) noexcept nogil
    bint is_locked "mq_is_locked"(int fd, uint32_t seat, int type) noexcept nogil
    bint names_process "MQ_PID"(uint64_t holder) noexcept nogil
    uint64_t own_bits "mq_own_bits"(uint64_t boot) noexcept nogil
    bint is_process_gone "mq_is_process_gone"(uint64_t holder, uint64_t boot) noexcept nogil
    bint is_file "mq_is_file"(int fd, uint64_t device, uint64_t inode) noexcept nogil
    void relax "mq_relax"() noexcept nogil
    void nap "mq_nap"(long ns) noexcept nogil
    void yield_processor "sched_yield"() noexcept nogil
    int64_t wait_clock_ns "mq_monotonic_ns"() noexcept nogil

cdef enum:
    SPINS = 200                 # longer than a critical section, shorter than a time slice
    YIELDS = 50
    NAP_NS = 50_000             # a preempted owner does not run for milliseconds
    LONGEST_NAP_NS = 1_000_000
    SLICE_NS = 20_000_000       # the longest wait for a lock without checking for signals

cdef enum:  # the outcome of a wait for a lock
    LOCKED = 0
    TAKEN_OVER = 1              # from a dead owner: the caller repairs what it was changing
    NOT_LOCKED = 2


cdef inline bint try_lock(uint32_t* word, uint32_t seat) noexcept nogil:
    """Take the lock if it is free."""
    return swap_u32_acquire(word, 0, seat)


cdef inline bint is_free(const uint32_t* word) noexcept nogil:
    return load_u32_relaxed(word) == 0


cdef inline void unlock(uint32_t* word) noexcept nogil:
    """Release the lock. Requires that this process has it."""
    store_u32(word, 0)


cdef inline bint spin_lock(uint32_t* word, uint32_t seat) noexcept nogil:
    """Take the lock if its owner releases it within about a microsecond."""
    cdef int i
    for i in range(SPINS):
        if is_free(word) and try_lock(word, seat):
            return True
        relax()
    return False


cdef inline uint32_t epoch_of(uint32_t seat, const Shared* shared) noexcept nogil:
    """How often a seat has been taken."""
    return <uint32_t> (load_u64(&shared.seats[seat].holder) & EPOCHS)


cdef inline bint has_seat(const Shared* shared) noexcept nogil:
    """Whether no other process has taken this process's seat in the meantime."""
    return epoch_of(shared.me & (SEATS - 1), shared) == shared.me >> SEAT_BITS


cdef inline bint is_left(uint32_t seat, uint64_t holder, const Shared* shared) noexcept nogil:
    """Whether no living process has a seat, whose `holder` was read. Not for this process's own seat."""
    if not names_process(holder):
        # read locks, which readers of the file may have, do not count
        return not is_locked(shared.fd, seat, READ_LOCK)
    if not holder & SURE or not is_locked(shared.fd, seat, WRITE_LOCK):
        return True
    return shared.space != 0 and load_u64(&shared.seats[seat].space) == (shared.space | holder & EPOCHS) and \
        is_process_gone(holder, shared.boot)


cdef inline bint has_other_process(const Shared* shared) noexcept nogil:
    """Whether another process or manager has a seat."""
    cdef uint32_t seat
    for seat in range(1, shared.header.seats_used + 1):
        if seat != (shared.me & (SEATS - 1)) and not is_left(seat, load_u64(&shared.seats[seat].holder), shared):
            return True
    return False


cdef inline uint32_t claim_seat(uint32_t seat, uint32_t epochs, uint64_t process, Shared* shared) noexcept nogil:
    """Take a seat; returns its seat word, or 0 if another process has it.

    Requires that this process has locked the seat's byte: for writing, with a `process` of 0; otherwise for reading,
    with a `process` of own_bits(). The epoch grows by `epochs`.
    """
    cdef Seat* there = &shared.seats[seat]
    cdef uint64_t space = load_u64(&there.space)
    cdef uint64_t holder = load_u64(&there.holder)
    cdef uint64_t epoch = (holder + epochs) & EPOCHS
    cdef uint64_t claim = process | epoch
    if process != 0 and names_process(holder) and not is_left(seat, holder, shared):
        return 0
    if not swap_u64(&there.holder, holder, claim):
        return 0
    if process != 0 and not (swap_u64(&there.space, space, shared.space | epoch) and
                             swap_u64(&there.holder, claim, claim | SURE)):
        return 0
    return <uint32_t> epoch << SEAT_BITS | seat


cdef inline bint holds_seat(const Shared* shared) noexcept nogil:
    """Whether this process still has its seat, as other processes see it."""
    cdef uint32_t seat = shared.me & (SEATS - 1)
    cdef uint64_t holder = load_u64(&shared.seats[seat].holder)
    return holder & EPOCHS == shared.me >> SEAT_BITS and \
        is_locked(shared.spare_fd, seat, WRITE_LOCK if names_process(holder) else READ_LOCK)


cdef inline void hold_by_lock(const Shared* shared) noexcept nogil:
    """If this process has its seat by its process id, change that to the lock alone, unless readers exclude it."""
    cdef uint32_t seat = shared.me & (SEATS - 1)
    cdef uint64_t holder = load_u64(&shared.seats[seat].holder)
    if names_process(holder) and has_seat(shared) and lock_seat(shared.fd, seat, WRITE_LOCK):
        swap_u64(&shared.seats[seat].holder, holder, holder & EPOCHS)


cdef inline void clear_seat(const Shared* shared) noexcept nogil:
    """Remove this process's id from its seat, before it gives up its lock."""
    cdef Seat* there = &shared.seats[shared.me & (SEATS - 1)]
    cdef uint64_t holder = load_u64(&there.holder)
    if names_process(holder) and holder & EPOCHS == shared.me >> SEAT_BITS:
        swap_u64(&there.holder, holder, holder & EPOCHS)


cdef inline bint is_gone(uint32_t owner, const Shared* shared) noexcept nogil:
    """Whether the process of a seat word has died. Asks the kernel, which takes some 1.2 us."""
    cdef uint32_t seat = owner & (SEATS - 1)
    cdef uint64_t holder
    if owner == shared.me:
        return False
    holder = load_u64(&shared.seats[seat].holder)
    if seat == 0 or holder & EPOCHS != owner >> SEAT_BITS:
        return True
    # a descriptor that was closed underneath and opened again for another file would make every owner look dead
    return is_file(shared.fd, shared.device, shared.inode) and is_left(seat, holder, shared)


cdef inline bint take_over(uint32_t* word, const Shared* shared) noexcept nogil:
    """Take a lock from an owner that has died; the caller repairs what it was changing."""
    cdef uint32_t owner = load_u32(word)
    return owner != 0 and is_gone(owner, shared) and swap_u32(word, owner, shared.me)


cdef inline int lock_within(uint32_t* word, const Shared* shared, int64_t patience_ns) noexcept nogil:
    """Take a lock: spin, then yield the processor between tries, so that a preempted owner can continue.

    NOT_LOCKED if it stays locked for `patience_ns`, or the state is being closed. With a `patience_ns` of 0 it only
    spins, and asks once whether the owner is dead.
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
        if load_u32(&shared.closing) or wait_clock_ns() >= give_up_ns:
            return NOT_LOCKED
        nap(nap_ns)
        nap_ns = min(2 * nap_ns, <long> LONGEST_NAP_NS)
        if spin_lock(word, shared.me):
            return LOCKED
