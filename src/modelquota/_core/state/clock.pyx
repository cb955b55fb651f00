"""The clock that a test or a replay moves by hand, and the interface that a change of time or of the state wakes."""
cimport cython
import operator

from modelquota._core.layout cimport MAX_TIME_NS


cdef class Watcher:
    """What the layers below notify of changes: the one call that goes up. The queues of a process implement it."""

    cdef int wake(self, object ref) except -1:
        """Something may be admitted now, by the model of a RowRef or, if None, by any model.

        Something was released, time has passed, or limits have changed.
        """
        return 0

    cdef int look(self) except -1:
        """A request is denied because of what others hold: do what was put off."""
        return 0

    cdef int forget_parent(self) except -1:
        """In a forked child: drop what the parent has begun, since the parent finishes it."""
        return 0


@cython.final
cdef class ManualClock:
    """ManualClock(now_ns=0)\n--\n
    A clock that moves only when it is told to, and only forward.

    Parameters
    ----------
    now_ns : int
        Where the clock starts, in nanoseconds, 0 .. 2**61.

    Examples
    --------
    >>> clock = ManualClock()
    >>> clock.advance(1.5)
    >>> clock.now_ns
    1500000000
    """

    def __cinit__(self, now_ns=0):
        self.watchers = set()

    def __init__(self, now_ns=0):
        self.move_to(_nanoseconds("now_ns", now_ns))

    @property
    def now_ns(self):
        """The time in nanoseconds."""
        return self.time_ns

    def advance(self, seconds):
        """Move forward by `seconds` (a real number >= 0, rounded to the nearest nanosecond).

        Raises ValueError, and does not move, if that is negative, not finite, or past 2**61 ns.
        """
        if hasattr(seconds, "item"):    # a numpy scalar, which would overflow in its own width
            seconds = seconds.item()
        if not 0 <= seconds <= MAX_TIME_NS:     # false for a NaN too
            raise ValueError(f"seconds is {seconds!r}; a clock moves forward only: give a finite number >= 0")
        self.advance_ns(round(seconds * 1_000_000_000))

    def advance_ns(self, ns):
        """Move forward by `ns` nanoseconds (an integer >= 0); errors as for `advance`."""
        self.move_to(self.time_ns + _nanoseconds("ns", ns))

    cdef int move_to(self, int64_t time_ns) except -1:
        if time_ns < self.time_ns or time_ns > MAX_TIME_NS:
            raise ValueError(f"the clock is at {self.time_ns} ns and moves forward only, up to 2**61 ns; "
                             f"{time_ns} ns is out of range")
        self.time_ns = time_ns
        if self.watchers:
            for watcher in list(self.watchers):
                (<Watcher> watcher).wake(None)
        return 0

    def __repr__(self):
        return f"ManualClock(now_ns={self.time_ns})"

    def __reduce__(self):
        return ManualClock, (self.time_ns,)


cdef int64_t _nanoseconds(str name, object value) except -1:
    cdef object ns = operator.index(value)
    if not 0 <= ns <= MAX_TIME_NS:
        raise ValueError(f"{name} is {ns}; give a whole number of nanoseconds, 0 .. 2**61")
    return ns
