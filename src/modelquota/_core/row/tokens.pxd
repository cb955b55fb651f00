# Kinds of tokens: what a request counts at each model, by the model's weights. Integers only.
from libc.stdint cimport int64_t
from modelquota._core.layout cimport ColdRow, KINDS, MAX_COUNT

cdef enum:
    MICRO = 1_000_000       # a weight's unit is a millionth of a token
    OUTPUT = 2              # index of output tokens among the kinds: input, cached, output

cdef extern from *:
    """
    typedef __int128 mq_weighed;
    """
    ctypedef long long weighed "mq_weighed"


cdef struct Kinds:
    # How many tokens of each kind, or one count that is the same at each model.
    bint split
    int64_t count           # if not split
    int64_t counts[KINDS]   # if split: input, cached, output


cdef inline int64_t weigh(const ColdRow* cold, const int64_t* counts) noexcept nogil:
    """What tokens of each kind count at a model: the weighted sum, rounded up once, and MAX_COUNT at most.

    Requires the row's lock.
    """
    cdef weighed total = MICRO - 1
    cdef int kind
    for kind in range(KINDS):
        total += <weighed> cold.weights[kind] * <weighed> counts[kind]
    total //= MICRO
    return <int64_t> total if total < MAX_COUNT else MAX_COUNT


cdef inline int64_t count_at(const ColdRow* cold, const Kinds* kinds) noexcept nogil:
    """What tokens count at a model. Requires the row's lock."""
    return weigh(cold, kinds.counts) if kinds.split else kinds.count


cdef inline int64_t with_output(const ColdRow* cold, const Kinds* kinds, int64_t output) noexcept nogil:
    """What so many output tokens count at a model, with the input and cached tokens of `kinds`.

    Requires the row's lock.
    """
    cdef int64_t counts[KINDS]
    counts[0] = kinds.counts[0] if kinds.split else 0
    counts[1] = kinds.counts[1] if kinds.split else 0
    counts[OUTPUT] = output
    return weigh(cold, counts)


cdef inline int64_t most_output(const ColdRow* cold, const Kinds* kinds, int64_t limit) noexcept nogil:
    """The most output tokens with which with_output() is within `limit`. Requires the row's lock."""
    cdef weighed left = <weighed> limit * MICRO
    if kinds.split:
        left -= <weighed> cold.weights[0] * kinds.counts[0] + <weighed> cold.weights[1] * kinds.counts[1]
    if left < 0:
        return 0
    if cold.weights[OUTPUT] == 0:
        return MAX_COUNT
    left //= cold.weights[OUTPUT]
    return <int64_t> left if left < MAX_COUNT else MAX_COUNT
