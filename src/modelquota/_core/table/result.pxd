from libc.stdint cimport int64_t, uint8_t
from modelquota._core.row.decision cimport Verdict

cdef tuple LIMITS               # `Limit` by its code; None for 0


cdef class QuotaCheckResult:
    cdef uint8_t was_admitted       # `allowed`; a byte, so that a result has 80
    cdef uint8_t held_up            # `others_hold`
    cdef uint8_t hopeless           # `never_fits`
    cdef uint8_t starved_code       # Verdict.starved
    cdef uint8_t limit_code         # Limit code, 0 = nothing violated
    cdef uint8_t cause_code         # the limit that determines the violation type; another than `limit` for QUEUE only
    cdef signed char action_code    # ViolationAction code, -1 = none applied
    cdef uint8_t in_dollars         # whether `used`, `bound` and `asked` are millionths of a dollar
    cdef int64_t wait_ms            # -1 = no wait helps
    cdef readonly double current_usage
    cdef double used                # these four belong to the violated limit; 0 if there is none
    cdef double bound
    cdef double whole               # the limit of which `bound` is a share, if `starved_code` is set
    cdef int64_t asked
    cdef readonly str model_id


cdef QuotaCheckResult result_of(const Verdict* verdict, str model_id)
