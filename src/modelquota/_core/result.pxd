from libc.stdint cimport int64_t, uint8_t
from modelquota._core.decision cimport QUEUE_PLACE, Verdict


cdef class QuotaCheckResult:
    cdef readonly bint allowed
    cdef uint8_t limit_code         # Limit code, 0 = nothing violated
    cdef uint8_t cause_code         # the limit that gives the violation its type; another one than limit for QUEUE only
    cdef signed char action_code    # ViolationAction code, -1 = none applied
    cdef int64_t wait_ms            # -1 = no wait helps
    cdef readonly double current_usage
    cdef double used                # these three of the violated limit, 0 without one
    cdef double bound
    cdef int64_t asked
    cdef readonly object model_id


cdef inline QuotaCheckResult result_of(const Verdict* verdict, object model_id):
    cdef QuotaCheckResult result = QuotaCheckResult.__new__(QuotaCheckResult)
    result.allowed = verdict.allowed
    result.limit_code = verdict.limit
    result.action_code = <signed char> verdict.action
    result.wait_ms = verdict.retry_after_ms
    result.current_usage = verdict.usage
    if verdict.limit:
        result.cause_code = verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit
        result.model_id = model_id
        result.used = verdict.used
        result.bound = verdict.bound
        result.asked = verdict.asked
    else:
        result.cause_code = 0
        result.used = result.bound = 0.0
        result.asked = 0
    return result
