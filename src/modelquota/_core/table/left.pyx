"""What the limits of models still admit, as header fields of a response: as little as possible is made of it.

Every response over HTTP has them, so all that depends on a quota only is in its plan, made once for each quota.
"""
cimport cython
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.math cimport ceil
from libc.stdint cimport int64_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from libc.time cimport strftime, time_t, tm
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from modelquota._core.layout cimport LIMITS, Limits
from modelquota._core.row.usage cimport Usage
from modelquota._core.table.intern cimport RowRef, plain_id
from modelquota._core.table.table cimport QuotaTable

cdef enum:
    UNITS = 2               # requests and tokens
    TOKENS = 1
    NUMBER_BYTES = 24       # of a number, in decimal, with room to spare
    DURATION_BYTES = 48
    TIME_BYTES = 32

cdef bytes pairs = b"".join([b"%02d" % number for number in range(100)])
cdef const char* PAIRS = pairs          # the numbers 00 to 99
cdef int64_t MOST = 10**15 - 1      # the largest integer of a structured field
cdef int64_t LATEST = 253_402_300_799   # the last second of the year 9999

cdef extern from "<time.h>" nogil:
    tm* gmtime_r(const time_t* at, tm* parts)


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
    cdef tuple bare_names, policies     # of each limit, without separators
    cdef int count
    cdef int codes[LIMITS]
    cdef int units[LIMITS]
    cdef int64_t most[LIMITS]
    cdef double reset_ms[LIMITS]
    cdef double per_ahead_ms[LIMITS]
    cdef Limits limits          # the model's, to which it belongs; set when it is first used
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
        self.bare_names = tuple([name.removeprefix(b", ") for name in self.names])
        self.policies = tuple(policy.split(b", "))
        self.shown_most = tuple([b"%d" % min(count, MOST) for count in most])
        self.state_bytes = sum(map(len, self.names)) + self.count * NUMBER_BYTES

    @property
    def empty(self):
        """Whether no limit is reported."""
        return self.count == 0


cdef struct Left:
    Usage usage
    Limits limits


cdef RowRef read_row(QuotaTable table, object model_id, Left* left):
    """Read use and limits of a model at one moment; None if it is unknown. Takes the row's lock."""
    cdef RowRef ref = table.interned.find(plain_id(model_id))
    if ref is None:
        return None
    memset(&left.limits, 0, sizeof(Limits))
    return ref if table.interned.read(ref, table.state.now_ns(), &left.usage, &left.limits) else None


def read_left(QuotaTable table not None, model_id):
    """What the limits of a model still admit, read at one moment; None for an unknown model. Takes the row's lock.

    Returns ``(limits, left, ahead)``: the limits, as bytes that are equal as long as the limits are; what is left by
    `Limit`, -1 if it is not set; and how far the model has run ahead of its rate of requests and of that of tokens.
    """
    cdef Left left
    cdef int i
    if read_row(table, model_id, &left) is None:
        return None
    return (
        PyBytes_FromStringAndSize(<char*> &left.limits, sizeof(Limits)),
        tuple([left.usage.left[i] for i in range(LIMITS)]),
        (left.usage.burst_requests_used, left.usage.burst_tokens_used),
    )


def limit_fields(QuotaTable table not None, ids, dict plans not None, tuple names not None, bint ietf, bint stamped):
    """The header fields of one model, or of several ids that decide together, as a list of pairs of bytes.

    Of several ids the one with the least left of each limit counts, and ids that are unknown do not. None if the plan
    of a model is not in `plans`. Takes the rows' locks.

    Parameters
    ----------
    ids : str or tuple of str
    plans : dict of bytes to LimitPlan
        By the limits, as `read_left` returns them.
    names : tuple of tuple of bytes
        For requests and for tokens, the names of the fields for limit, remaining and reset.
    ietf : bool
        Whether ``RateLimit-Policy`` and ``RateLimit`` are among them.
    stamped : bool
        Whether the reset is told as a time of day, and not as a duration.
    """
    cdef Left left
    cdef LimitPlan plan
    cdef int unit, i, chosen
    cdef int64_t rest, least
    cdef list fields = []
    cdef RowRef ref
    if type(ids) is tuple:
        return fields_of_several(table, <tuple> ids, plans, names, ietf, stamped)
    ref = read_row(table, ids, &left)
    if ref is None:
        return fields
    plan = plan_of(ref, &left.limits, plans)
    if plan is None:
        return None
    for unit in range(UNITS):
        chosen = -1
        least = 0
        for i in range(plan.count):
            rest = left.usage.left[plan.codes[i]]
            if plan.units[i] == unit and (chosen < 0 or rest < least):
                chosen, least = i, rest
        if chosen >= 0:
            add_fields(fields, <tuple> names[unit], plan, chosen, least, ahead_of(&left.usage, unit), stamped)
    if ietf and plan.count:
        fields.append((b"ratelimit-policy", plan.policy))
        fields.append((b"ratelimit", state_of(plan, &left.usage)))
    return fields


cdef struct Standing:
    # How much of a limit is left at the model that has the least of it.
    int model           # its index among the models; -1 if none has the limit
    int place           # of the limit in its plan
    int64_t left
    int64_t ahead       # of its rate


cdef object fields_of_several(QuotaTable table, tuple ids, dict plans, tuple names, bint ietf, bint stamped):
    cdef Standing standings[LIMITS]
    cdef Standing* standing
    cdef Left left
    cdef LimitPlan plan
    cdef RowRef ref
    cdef int unit, i, code, chosen
    cdef int64_t rest
    cdef list models = [], fields = [], policies = [], states = []
    for code in range(LIMITS):
        standings[code].model = -1
    for model_id in ids:
        ref = read_row(table, model_id, &left)
        if ref is None:
            continue
        plan = plan_of(ref, &left.limits, plans)
        if plan is None:
            return None
        for i in range(plan.count):
            standing = &standings[plan.codes[i]]
            rest = max(left.usage.left[plan.codes[i]], 0)
            if standing.model < 0 or rest < standing.left:
                standing.model = <int> len(models)
                standing.place = i
                standing.left = rest
                standing.ahead = ahead_of(&left.usage, plan.units[i])
        models.append(plan)
    for unit in range(UNITS):
        chosen = -1
        for code in range(LIMITS):
            standing = &standings[code]
            if standing.model >= 0 and (<LimitPlan> models[standing.model]).units[standing.place] == unit and (
                    chosen < 0 or standing.left < standings[chosen].left):
                chosen = code
        if chosen >= 0:
            standing = &standings[chosen]
            add_fields(fields, <tuple> names[unit], <LimitPlan> models[standing.model], standing.place, standing.left,
                       standing.ahead, stamped)
    if ietf:
        for code in range(LIMITS):
            standing = &standings[code]
            if standing.model >= 0:
                plan = models[standing.model]
                policies.append(plan.policies[standing.place])
                states.append(plan.bare_names[standing.place] + decimal(min(standing.left, MOST)))
        if policies:
            fields.append((b"ratelimit-policy", b", ".join(policies)))
            fields.append((b"ratelimit", b", ".join(states)))
    return fields


cdef LimitPlan plan_of(RowRef ref, const Limits* limits, dict plans):
    """The plan of a model; None if it is not in `plans`."""
    cdef LimitPlan plan = ref.plan
    if plan is None or memcmp(&plan.limits, limits, sizeof(Limits)) != 0:
        plan = plans.get(PyBytes_FromStringAndSize(<const char*> limits, sizeof(Limits)))
        if plan is not None:
            plan.limits = limits[0]
            ref.plan = plan
    return plan


cdef inline int64_t ahead_of(const Usage* usage, int unit) noexcept nogil:
    return usage.burst_tokens_used if unit == TOKENS else usage.burst_requests_used


cdef int add_fields(
    list fields, tuple names, LimitPlan plan, int place, int64_t left, int64_t ahead, bint stamped
) except -1:
    """Add the three fields about one limit."""
    cdef int64_t reset_ms = reset_of(plan, place, left, ahead)
    fields.append((names[0], plan.shown_most[place]))
    fields.append((names[1], decimal(min(max(left, 0), MOST))))
    fields.append((names[2], time_of_day(reset_ms) if stamped else go_duration(reset_ms)))
    return 0


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
        end = put_decimal(end + len(name), min(max(usage.left[plan.codes[i]], 0), MOST))
    return PyBytes_FromStringAndSize(start, end - start)


cdef bytes decimal(int64_t number):
    cdef char text[NUMBER_BYTES]
    return PyBytes_FromStringAndSize(text, put_decimal(text, number) - text)


cdef char* put_decimal(char* end, uint64_t number) noexcept nogil:
    """Write a number, and return the end of it: several times faster than printf()."""
    cdef char digits[NUMBER_BYTES]
    cdef int first = NUMBER_BYTES
    while number >= 10:
        first -= 2
        memcpy(&digits[first], &PAIRS[2 * (number % 100)], 2)
        number //= 100
    if number or first == NUMBER_BYTES:
        first -= 1
        digits[first] = <char> (c"0" + number)
    memcpy(end, &digits[first], NUMBER_BYTES - first)
    return end + (NUMBER_BYTES - first)


cdef bytes time_of_day(int64_t ms):
    """The time in so many milliseconds, as Anthropic's headers have it: RFC 3339, in seconds, rounded up."""
    cdef timespec now
    cdef tm parts
    cdef time_t at
    cdef char text[TIME_BYTES]
    clock_gettime(CLOCK_REALTIME, &now)
    at = min(now.tv_sec + ms // 1000 + (now.tv_nsec + ms % 1000 * 1_000_000 + 999_999_999) // 1_000_000_000,
             LATEST)
    gmtime_r(&at, &parts)
    return PyBytes_FromStringAndSize(text, strftime(text, TIME_BYTES, b"%Y-%m-%dT%H:%M:%SZ", &parts))


cdef bytes go_duration(int64_t ms):
    """A time as Go writes durations: 0s, 12ms, 8.64s, 6m0s, 24h0m0.001s."""
    cdef char text[DURATION_BYTES]
    cdef char* end = text
    cdef int64_t seconds = ms // 1000, rest = ms % 1000, minutes
    cdef int64_t part = 100
    if 0 < ms < 1000:
        end = put_decimal(end, ms)
        end[0] = c"m"
        end += 1
    else:
        minutes, seconds = seconds // 60, seconds % 60
        if minutes >= 60:
            end = put_decimal(end, minutes // 60)
            end[0] = c"h"
            end += 1
        if minutes:
            end = put_decimal(end, minutes % 60)
            end[0] = c"m"
            end += 1
        end = put_decimal(end, seconds)
        if rest:
            end[0] = c"."
            end += 1
        while rest:         # without zeros at the end
            end = put_decimal(end, rest // part)
            rest %= part
            part //= 10
    end[0] = c"s"
    return PyBytes_FromStringAndSize(text, end + 1 - text)
