"""What the limits of one model still admit, as header fields of a response: as little as possible is made of it.

Every response over HTTP has them, so all that depends on a quota only is in its plan, made once for each quota.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.math cimport ceil
from libc.stdint cimport int64_t
from libc.stdio cimport snprintf
from libc.string cimport memcpy, memset

from modelquota._core.layout cimport LIMITS, Limits
from modelquota._core.row.usage cimport Usage
from modelquota._core.table.intern cimport RowRef, plain_id
from modelquota._core.table.table cimport QuotaTable

cdef enum:
    UNITS = 2               # requests and tokens
    NUMBER_BYTES = 24       # of a number, in decimal, with room to spare
    DURATION_BYTES = 48

cdef int64_t MOST = 10**15 - 1      # the largest integer of a structured field


@cython.final
cdef class LimitPlan:
    """The part of a model's header fields that depends on its quota only.

    Parameters
    ----------
    codes : sequence of int
        The limits that are reported, by `Limit`, in the order in which they are checked.
    most : sequence of int
        What each admits at once if nothing has been used.
    units : sequence of int
        0 if it counts requests in time, 1 if tokens, -1 otherwise.
    reset_ms : sequence of float
        Milliseconds until a limit that is in use is not in use any more, if its model is not ahead of a rate.
    per_ahead_ms : sequence of float
        How much longer for each request or token that it is ahead; 0 if the limit is not a rate.
    names : sequence of bytes
        Of each limit in the field ``RateLimit``, with its separators: ``", \\"tokens-per-hour\\";r="``.
    policy : bytes
        The field ``RateLimit-Policy``.
    """
    cdef readonly bytes policy
    cdef readonly tuple names
    cdef int count
    cdef int codes[LIMITS]
    cdef int units[LIMITS]
    cdef int64_t most[LIMITS]
    cdef double reset_ms[LIMITS]
    cdef double per_ahead_ms[LIMITS]
    cdef tuple shown_most
    cdef Py_ssize_t state_bytes

    def __init__(self, codes, most, units, reset_ms, per_ahead_ms, names, bytes policy not None):
        cdef int i
        self.count = len(codes)
        for i in range(self.count):
            self.codes[i] = codes[i]
            self.most[i] = most[i]
            self.units[i] = units[i]
            self.reset_ms[i] = reset_ms[i]
            self.per_ahead_ms[i] = per_ahead_ms[i]
        self.names = tuple(names)
        self.policy = policy
        self.shown_most = tuple([b"%d" % min(count, MOST) for count in most])
        self.state_bytes = sum(map(len, self.names)) + self.count * NUMBER_BYTES

    @property
    def empty(self):
        """Whether no limit is reported."""
        return self.count == 0


cdef struct Left:
    Usage usage
    Limits limits


cdef bint read_row(QuotaTable table, object model_id, Left* left) except -1:
    """Read use and limits of a model at one moment; False if it is unknown. Takes the row's lock."""
    cdef RowRef ref = table.interned.find(plain_id(model_id))
    if ref is None:
        return False
    memset(&left.limits, 0, sizeof(Limits))
    return table.interned.read(ref, table.state.now_ns(), &left.usage, &left.limits)


def read_left(QuotaTable table not None, model_id):
    """What the limits of a model still admit, read at one moment; None for an unknown model. Takes the row's lock.

    Returns ``(limits, left, ahead)``: the limits, as bytes that are equal as long as the limits are; what is left by
    `Limit`, -1 if it is not set; and how far the model has run ahead of its rate of requests and of that of tokens.
    """
    cdef Left left
    cdef int i
    if not read_row(table, model_id, &left):
        return None
    return (
        PyBytes_FromStringAndSize(<char*> &left.limits, sizeof(Limits)),
        tuple([left.usage.left[i] for i in range(LIMITS)]),
        (left.usage.burst_requests_used, left.usage.burst_tokens_used),
    )


def limit_fields(QuotaTable table not None, model_id, dict plans not None, tuple names not None, bint ietf):
    """The header fields of a model, as a list of pairs of bytes; None for an unknown model. Takes the row's lock.

    Returns the limits as bytes instead, as `read_left` does, if they are not in `plans`.

    Parameters
    ----------
    plans : dict of bytes to LimitPlan
    names : tuple of tuple of bytes
        For requests and for tokens, the names of the fields for limit, remaining and reset.
    ietf : bool
        Whether ``RateLimit-Policy`` and ``RateLimit`` are among them.
    """
    cdef Left left
    cdef LimitPlan plan
    cdef int unit, i, chosen
    cdef int64_t rest, least, ahead
    cdef list fields = []
    if not read_row(table, model_id, &left):
        return None
    key = PyBytes_FromStringAndSize(<char*> &left.limits, sizeof(Limits))
    plan = plans.get(key)
    if plan is None:
        return key
    for unit in range(UNITS):
        chosen = -1
        least = 0
        for i in range(plan.count):
            rest = left.usage.left[plan.codes[i]]
            if plan.units[i] == unit and (chosen < 0 or rest < least):
                chosen, least = i, rest
        if chosen >= 0:
            ahead = left.usage.burst_tokens_used if unit else left.usage.burst_requests_used
            limit_name, remaining_name, reset_name = <tuple> names[unit]
            fields.append((limit_name, plan.shown_most[chosen]))
            fields.append((remaining_name, decimal(min(max(least, 0), MOST))))
            fields.append((reset_name, go_duration(reset_of(plan, chosen, least, ahead))))
    if ietf and plan.count:
        fields.append((b"ratelimit-policy", plan.policy))
        fields.append((b"ratelimit", state_of(plan, &left.usage)))
    return fields


cdef int64_t reset_of(LimitPlan plan, int i, int64_t left, int64_t ahead) noexcept:
    """Milliseconds until none of the limit is in use, at the latest, if nothing else is admitted."""
    cdef double ms
    if plan.per_ahead_ms[i] == 0:
        ahead = 0
    if left >= plan.most[i] and ahead == 0:
        return 0
    ms = ceil(plan.reset_ms[i] + <double> ahead * plan.per_ahead_ms[i])
    return <int64_t> ms if ms < <double> MOST else MOST


cdef bytes state_of(LimitPlan plan, const Usage* usage):
    """The field ``RateLimit``."""
    cdef bytes state = PyBytes_FromStringAndSize(NULL, plan.state_bytes)
    cdef char* start = state
    cdef char* end = start
    cdef bytes name
    cdef int i
    for i in range(plan.count):
        name = <bytes> plan.names[i]
        memcpy(end, <const char*> name, len(name))
        end += len(name)
        end += snprintf(end, NUMBER_BYTES, b"%lld", <long long> min(max(usage.left[plan.codes[i]], 0), MOST))
    return PyBytes_FromStringAndSize(start, end - start)


cdef bytes decimal(int64_t number):
    cdef char text[NUMBER_BYTES]
    return PyBytes_FromStringAndSize(text, snprintf(text, NUMBER_BYTES, b"%lld", <long long> number))


cdef bytes go_duration(int64_t ms):
    """A time as Go writes durations: 0s, 12ms, 8.64s, 6m0s, 24h0m0.001s."""
    cdef char text[DURATION_BYTES]
    cdef long long seconds = ms // 1000, rest = ms % 1000, hours, minutes
    cdef int size
    if 0 < ms < 1000:
        return PyBytes_FromStringAndSize(text, snprintf(text, DURATION_BYTES, b"%lldms", rest))
    minutes, seconds = seconds // 60, seconds % 60
    hours, minutes = minutes // 60, minutes % 60
    if hours:
        size = snprintf(text, DURATION_BYTES, b"%lldh%lldm%lld", hours, minutes, seconds)
    elif minutes:
        size = snprintf(text, DURATION_BYTES, b"%lldm%lld", minutes, seconds)
    else:
        size = snprintf(text, DURATION_BYTES, b"%lld", seconds)
    if rest:
        size += snprintf(text + size, DURATION_BYTES - size, b".%03lld", rest)
        while text[size - 1] == c"0":
            size -= 1
    text[size] = c"s"
    return PyBytes_FromStringAndSize(text, size + 1)
