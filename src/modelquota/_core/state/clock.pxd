# The clock, and the interface of what waits for it.
from libc.stdint cimport int64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

cdef extern from "<time.h>" nogil:
    const int CLOCK_BOOTTIME    # goes on while the machine is suspended


cdef class Watcher:
    cdef int wake(self, object ref) except -1
    cdef int look(self) except -1
    cdef int forget_parent(self) except -1


cdef class ManualClock:
    cdef int64_t time_ns    # guarded by the GIL
    cdef set watchers       # the Watchers to wake when the clock is moved

    cdef int move_to(self, int64_t time_ns) except -1


cdef inline int64_t read_clock(int clock) noexcept nogil:
    cdef timespec now
    clock_gettime(clock, &now)
    return now.tv_sec * 1_000_000_000 + now.tv_nsec


cdef inline int64_t monotonic_ns() noexcept nogil:
    return read_clock(CLOCK_MONOTONIC)
