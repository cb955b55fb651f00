# The lock in a row: one word in shared memory, 0 when free, otherwise the seat word of its owner.
#
# It guards one row for some tens of nanoseconds and works across processes, because it lives in the mapping. From lock to
# unlock nothing takes the GIL, allocates, raises, or touches a Python object: a thread that waits for the GIL with a row
# locked would stop that model in every other process. Who holds the GIL tries spin_lock() first and releases the GIL before
# it waits.
#
# Each process has a seat, and holds the byte of the file with that number by an open-file-description lock, which the
# kernel drops at its death, in whatever PID namespace. Who has waited too long asks the kernel, and takes the lock over
# from a dead owner. A seat word also has the number of times that the seat was taken, its epoch, so that the next one who
# sits there is never mistaken for the dead. An owner that is stopped (SIGSTOP, a debugger, a paused container) is alive and
# cannot be taken over: every wait has an end, and callers return to Python in between, for signals and timeouts.
#
# A seat is held by a write lock on its byte. A process that may only read the file can place read locks, and so keep
# everybody from a write lock; then a seat is held by a read lock, and by the process id in the seat's `holder`. Nobody
# shares a seat, because `holder` is only changed by a process that has its byte locked, by compare-and-swap, and then:
# - Who has the write lock is alone: no holder by process id lives, as it would have its read lock.
# - Who has a read lock knows that no holder by write lock lives. Of several that have one, each takes the seat only if
#   `holder` names no living process. It claims the seat, writes its `space`, and makes the claim sure. A claim that is not
#   sure counts for nobody and may be claimed over. Then the epoch is another one, and its maker's next swap fails: that of
#   the claim; or that of `space`, which has the epoch too, if the other one has written it. If the maker wrote it first,
#   the swap of the other one fails, and both look for another seat. So what is sure has the `space` of its maker.
# - A holder by process id tries now and then to turn its read lock into a write lock, which the kernel does at once or not
#   at all, and only then takes its process id out. It holds the seat either way, before, in between and after.
# - A reader that comes or goes changes what locks can be had, and never `holder`.
# A holder by process id is dead if nobody at all has its byte locked; otherwise, if that process does not exist or is a
# zombie, or its id is another one's by now. Of another PID namespace that cannot be known: it is taken for alive, until no
# reader has the byte locked. So is one that has called exec, which keeps the process id.
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
    /* Whether a lock keeps `fd` from one of this type. If the kernel does not answer, it does. */
    static inline int mq_is_locked(int fd, unsigned seat, int type) {
        return mq_seat_byte(fd, F_OFD_GETLK, seat, &type) != 0 || type != F_UNLCK;
    }

    /* `holder`: epoch, process id and mark of the process, which are 0 if the write lock alone holds the seat, SURE */
    #define MQ_EPOCHS ((UINT64_C(1) << 22) - 1)
    #define MQ_PID_BITS 22          /* the kernel gives out none that is longer */
    #define MQ_MARK_BITS 19
    #define MQ_SURE (UINT64_C(1) << 63)
    #define MQ_PID(holder) ((pid_t)((holder) >> 22 & ((1 << MQ_PID_BITS) - 1)))

    /* Of /proc/PID/stat: state, threads, and start in ticks. 0 if it cannot be read. */
    static inline int mq_read_process(pid_t pid, char *state, long *threads, uint64_t *start) {
        char text[1024];
        snprintf(text, sizeof text, "/proc/%ld/stat", (long)pid);
        int fd = open(text, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return 0;
        ssize_t size = read(fd, text, sizeof text - 1);
        close(fd);
        text[size > 0 ? size : 0] = 0;
        const char *at = strrchr(text, ')');    /* the end of field 2, which may have anything in it */
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
    /* What is in `holder` of a seat that this process holds by its id; 0 if nobody could look it up. */
    static inline uint64_t mq_own_bits(uint64_t boot) {
        char state;
        long threads;
        uint64_t start;
        pid_t pid = getpid();
        return pid >> MQ_PID_BITS == 0 && mq_read_process(pid, &state, &threads, &start)
            ? mq_process_bits(pid, start, boot) : 0;
    }
    /* A first thread that has ended is shown as a zombie too, while others go on. What is hidden in /proc is alive. */
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
    NAP_NS = 50_000             # an owner that was preempted is away for milliseconds
    LONGEST_NAP_NS = 1_000_000
    SLICE_NS = 20_000_000       # the longest wait for a lock without a look at signals

cdef enum:  # what comes of a wait for a lock
    LOCKED = 0
    TAKEN_OVER = 1              # from a dead owner: what it was doing is to be repaired
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
    """Take the lock if its owner lets go within about a microsecond."""
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
    """Whether nobody else has taken this process's seat since."""
    return epoch_of(shared.me & (SEATS - 1), shared) == shared.me >> SEAT_BITS


cdef inline bint is_left(uint32_t seat, uint64_t holder, const Shared* shared) noexcept nogil:
    """Whether nobody alive has a seat, of which `holder` was read. Not to be asked of this process's own."""
    if not names_process(holder):
        return not is_locked(shared.fd, seat, READ_LOCK)    # locks of those that may only read the file do not count
    if not holder & SURE or not is_locked(shared.fd, seat, WRITE_LOCK):
        return True
    return shared.space != 0 and load_u64(&shared.seats[seat].space) == (shared.space | holder & EPOCHS) and \
        is_process_gone(holder, shared.boot)


cdef inline uint32_t sit_down(uint32_t seat, uint32_t epochs, uint64_t process, Shared* shared) noexcept nogil:
    """Take a seat whose byte this process has locked, for writing if `process` is 0; its word, or 0 if it is another's.

    The epoch grows by `epochs`. `process` is own_bits().
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


cdef inline bint is_sitting(const Shared* shared) noexcept nogil:
    """Whether this process still has its seat, as others see it."""
    cdef uint32_t seat = shared.me & (SEATS - 1)
    cdef uint64_t holder = load_u64(&shared.seats[seat].holder)
    return holder & EPOCHS == shared.me >> SEAT_BITS and \
        is_locked(shared.spare_fd, seat, WRITE_LOCK if names_process(holder) else READ_LOCK)


cdef inline void hold_by_lock(const Shared* shared) noexcept nogil:
    """If this process has its seat by its process id, have it by the lock alone, unless readers are still in the way."""
    cdef uint32_t seat = shared.me & (SEATS - 1)
    cdef uint64_t holder = load_u64(&shared.seats[seat].holder)
    if names_process(holder) and has_seat(shared) and lock_seat(shared.fd, seat, WRITE_LOCK):
        swap_u64(&shared.seats[seat].holder, holder, holder & EPOCHS)


cdef inline void stand_up(const Shared* shared) noexcept nogil:
    """Take this process's id out of its seat, before it gives up its lock."""
    cdef Seat* there = &shared.seats[shared.me & (SEATS - 1)]
    cdef uint64_t holder = load_u64(&there.holder)
    if names_process(holder) and holder & EPOCHS == shared.me >> SEAT_BITS:
        swap_u64(&there.holder, holder, holder & EPOCHS)


cdef inline bint is_gone(uint32_t owner, const Shared* shared) noexcept nogil:
    """Whether the process that an owner's word names has died. Asks the kernel: some 1.2 us."""
    cdef uint32_t seat = owner & (SEATS - 1)
    cdef uint64_t holder
    if owner == shared.me:
        return False
    holder = load_u64(&shared.seats[seat].holder)
    if seat == 0 or holder & EPOCHS != owner >> SEAT_BITS:
        return True
    # by a descriptor that was closed underneath and opened again for something else, everybody would be dead
    return is_file(shared.fd, shared.device, shared.inode) and is_left(seat, holder, shared)


cdef inline bint take_over(uint32_t* word, const Shared* shared) noexcept nogil:
    """Take a lock from an owner that has died; what it was doing is to be repaired."""
    cdef uint32_t owner = load_u32(word)
    return owner != 0 and is_gone(owner, shared) and swap_u32(word, owner, shared.me)


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
        if load_u32(&shared.closing) or wait_clock_ns() >= give_up_ns:
            return NOT_LOCKED
        nap(nap_ns)
        nap_ns = min(2 * nap_ns, <long> LONGEST_NAP_NS)
        if spin_lock(word, shared.me):
            return LOCKED
