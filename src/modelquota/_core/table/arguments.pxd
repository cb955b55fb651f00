# Conversion of arguments: counts (anything with __index__, 0 .. MAX_COUNT), priorities and timeouts.
from cpython.long cimport PyLong_AsLongLongAndOverflow
from cpython.number cimport PyIndex_Check, PyNumber_Index
from libc.stdint cimport int64_t
from modelquota._core.layout cimport MAX_COUNT
from modelquota._core.row.decision cimport LAST_TICKET, LOWEST_PRIORITY, Request
from modelquota._core.row.tokens cimport Kinds

cdef extern from *:
    """
    /* The value of a non-negative int of one digit, that is below 2**30, as most counts are; -1 for anything else. */
    static inline int64_t mq_small_count(PyObject *value) {
        if (!PyLong_CheckExact(value)) return -1;
    #if PY_VERSION_HEX >= 0x030C0000
        return PyUnstable_Long_IsCompact((PyLongObject *)value)
            ? PyUnstable_Long_CompactValue((PyLongObject *)value) : -1;
    #else
        return Py_SIZE(value) == 1 ? (int64_t)((PyLongObject *)value)->ob_digit[0] : Py_SIZE(value) == 0 ? 0 : -1;
    #endif
    }
    #define MQ_FAR INT64_MAX
    """
    int64_t small_count "mq_small_count"(object value) noexcept
    const int64_t FAR "MQ_FAR"          # a time that is never reached


cdef inline int64_t any_count(object value, str name) except -1:
    cdef int overflow = 0
    if not PyIndex_Check(value):        # such as a float
        raise TypeError(f"{name} is {value!r}; give an integer, 0 .. 2**62")
    number = PyNumber_Index(value)
    cdef int64_t count = PyLong_AsLongLongAndOverflow(number, &overflow)
    if overflow or count < 0 or count > MAX_COUNT:
        raise ValueError(f"{name} is {number}; give an integer, 0 .. 2**62")
    return count


cdef inline int64_t as_count(object value, str name) except -1:
    """A count from anything with __index__, 0 .. MAX_COUNT. A small int is converted without a call."""
    cdef int64_t count = small_count(value)
    return count if count >= 0 else any_count(value, name)


cdef inline int as_kinds(object tokens, str name, Kinds* kinds) except -1:
    """Tokens by kind, or a count that is the same at each model."""
    kinds.count = small_count(tokens)
    kinds.split = False
    return 0 if kinds.count >= 0 else any_kinds(tokens, name, kinds)


cdef inline int any_kinds(object tokens, str name, Kinds* kinds) except -1:
    """The rest of as_kinds(). Whatever has the counts of a `Tokens` is one: here no Python class is known."""
    if PyIndex_Check(tokens) or not hasattr(tokens, "cached"):
        kinds.count = any_count(tokens, name)
        return 0
    kinds.split = True
    kinds.counts[0] = as_count(tokens.input, name)
    kinds.counts[1] = as_count(tokens.cached, name)
    kinds.counts[2] = as_count(tokens.output, name)
    kinds.count = 0
    return 0


cdef inline int parse_request(Request* request, object tokens, object ram_mb, object ssd_mb) except -1:
    """Fill in a request that does not wait."""
    as_kinds(tokens, "estimated_tokens", &request.kinds)
    request.tokens = request.kinds.count
    request.ram_mb = as_count(ram_mb, "ram_needed_mb")
    request.ssd_mb = as_count(ssd_mb, "ssd_needed_mb")
    request.ticket = LAST_TICKET
    request.priority = LOWEST_PRIORITY
    request.counted = NULL
    return 0


cdef inline int64_t as_priority(object priority) except? -1:
    cdef int64_t small = small_count(priority)
    if small >= 0:
        return small
    cdef object number = priority.__index__() if hasattr(priority, "__index__") else None
    if number is None:
        raise TypeError(f"priority is {priority!r}; give an integer")
    if not -(2**31) < number < 2**31:
        raise ValueError(f"priority is {number}; give an integer, -(2**31) < priority < 2**31, the higher the sooner")
    return number


cdef inline int64_t as_wait_ns(object timeout) except -1:
    """A timeout in seconds as nanoseconds; FAR for None."""
    cdef double seconds
    if timeout is None:
        return FAR
    seconds = timeout
    if not seconds >= 0:
        raise ValueError(f"timeout is {timeout!r}; give seconds, 0 or more, or None")
    return <int64_t> (seconds * 1e9) if seconds < 2e9 else FAR
