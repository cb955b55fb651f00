"""What the limits of one model still admit, for headers of responses: as little as possible is made of it."""
from cpython.bytes cimport PyBytes_FromStringAndSize
from libc.stdint cimport int64_t
from libc.string cimport memset

from modelquota._core.layout cimport LIMITS, Limits
from modelquota._core.row.usage cimport Usage
from modelquota._core.table.intern cimport RowRef, plain_id
from modelquota._core.table.table cimport QuotaTable


def read_left(QuotaTable table not None, model_id):
    """What the limits of a model still admit, read at one moment; None for an unknown model. Takes the row's lock.

    Returns ``(limits, left, ahead)``: the limits, as bytes that are equal as long as the limits are; what is left by
    `Limit`, -1 if it is not set; and how far the model has run ahead of its rate of requests and of that of tokens.
    """
    cdef Usage usage
    cdef Limits limits
    cdef int i
    cdef RowRef ref = table.interned.find(plain_id(model_id))
    if ref is None:
        return None
    memset(&limits, 0, sizeof(limits))
    if not table.interned.read(ref, table.state.now_ns(), &usage, &limits):
        return None
    return (
        PyBytes_FromStringAndSize(<char*> &limits, sizeof(limits)),
        tuple([usage.left[i] for i in range(LIMITS)]),
        (usage.burst_requests_used, usage.burst_tokens_used),
    )
