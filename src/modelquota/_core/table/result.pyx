"""The result of a check: numbers only; text is built on access."""
cimport cython

from modelquota._core.row.decision cimport LEASE_ENDED, NEVER, NOT_STARVED, QUEUE_PLACE, Verdict

from modelquota.quota.limits import Limit, ViolationAction, dollars

LIMITS = (None, *Limit)
cdef tuple ACTIONS = tuple(ViolationAction)


@cython.final
@cython.freelist(64)
cdef class QuotaCheckResult:
    """The outcome of one check: immutable, and true if the request was admitted. Created by checks only.

    Attributes
    ----------
    allowed : bool
        Whether the request was admitted, and charged.
    others_hold : bool
        Whether it is blocked by what other requests hold and may give back at any moment: memory, concurrency, tokens
        that open grants have reserved and not settled, or an earlier place in the queue.
    never_fits : bool
        Whether it was denied and no wait helps, even if others give back all that they hold: the request by itself
        exceeds a limit of one of its models.
    starved : bool
        Whether it was denied for lack of this host's share of a limit that many hosts have in common, or since the
        lease of the shares has ended: the limit itself had room, by what this host has used. `retry_after_ms` is a hint
        then.
    current_usage : float
        Percent. If denied, the use of the violated limit without this request; if allowed, the highest use of all
        limits with it.
    model_id : str or None
        The model whose limit was violated, one of several if the request names several; None if nothing was violated.
    """

    @property
    def allowed(self):
        """Whether the request was admitted, and charged."""
        return self.was_admitted != 0

    @property
    def others_hold(self):
        """Whether it is blocked by what other requests hold and may give back at any moment."""
        return self.held_up != 0

    @property
    def never_fits(self):
        """Whether it was denied and no wait helps."""
        return self.hopeless != 0

    @property
    def starved(self):
        """Whether it was denied for lack of this host's share of a limit."""
        return self.starved_code != 0

    @property
    def limit(self):
        """The `Limit` that was violated first, or None. Set under the action ``warn`` too."""
        return LIMITS[self.limit_code]

    @property
    def violation_type(self):
        """The `ViolationType` of `limit`, or None. Set under the action ``warn`` too.

        For `Limit.QUEUE` it is that of the request at the front of the queue.
        """
        return LIMITS[self.cause_code].violation_type if self.cause_code else None

    @property
    def action(self):
        """The `ViolationAction` that was applied, or None if nothing was violated."""
        return ACTIONS[self.action_code] if self.action_code >= 0 else None

    @property
    def retry_after_ms(self):
        """Milliseconds until the same request passes if nothing else is admitted in the meantime; exact, rounded up.

        If the request is `starved`, a hint: the share of this host may have grown by then. None if nothing was
        violated, or if no wait is known to help: the request by itself exceeds a limit, or needs memory or concurrency
        that is in use.
        """
        return self.wait_ms if self.wait_ms >= 0 else None

    @property
    def reason(self):
        """The violation in words and numbers, or None. Built on access."""
        if self.limit_code == 0:
            return None
        limit = LIMITS[self.limit_code]
        label, figure, asked = limit.label, _figure, f"{self.asked:,}"
        if self.in_dollars:
            label, figure, asked = label.replace("tokens", "dollars"), dollars, dollars(self.asked)
        if self.starved_code:
            lease = " while its lease has ended" if self.starved_code == LEASE_ENDED else ""
            return (f"{label}: {figure(self.used)} of {figure(self.bound)} used, the share of this host{lease}, of "
                    f"{figure(self.whole)}, {asked} asked; retry in about {self.wait_ms:,} ms")
        wait = (f"retry in {self.wait_ms:,} ms" if self.wait_ms >= 0
                else "never fits: more than the limit itself" if self.asked > self.bound
                else "no wait is known to help")
        return f"{label}: {figure(self.used)} of {figure(self.bound)} used, {asked} asked; {wait}"

    def __bool__(self):
        return self.was_admitted != 0

    def __eq__(self, other):
        if not isinstance(other, QuotaCheckResult):
            return NotImplemented
        return _fields(self) == _fields(other)

    def __hash__(self):
        return hash(_fields(self))

    def __reduce__(self):
        return _restore, _fields(self)

    def __repr__(self):
        if self.limit_code == 0:
            return f"<QuotaCheckResult allowed, current_usage={self.current_usage:.1f}%>"
        return (f"<QuotaCheckResult {'allowed' if self.was_admitted else 'denied'} ({ACTIONS[self.action_code]}), "
                f"{self.reason}>")


cdef QuotaCheckResult result_of(const Verdict* verdict, str model_id):
    """A new result. Without a violated limit its use, bound and model stay zero or None."""
    cdef QuotaCheckResult result = QuotaCheckResult.__new__(QuotaCheckResult)
    result.was_admitted = verdict.allowed
    result.limit_code = verdict.limit
    result.action_code = <signed char> verdict.action
    result.wait_ms = verdict.retry_after_ms
    result.current_usage = verdict.usage
    if verdict.limit:
        result.held_up = verdict.others_may_free
        result.hopeless = not verdict.allowed and verdict.soonest_ns == NEVER
        if verdict.starved and not verdict.allowed:
            result.starved_code = verdict.starved
            result.whole = verdict.whole
        result.cause_code = verdict.cause if verdict.limit == QUEUE_PLACE else verdict.limit
        result.model_id = model_id
        result.used = verdict.used
        result.bound = verdict.bound
        result.asked = verdict.asked
        result.in_dollars = verdict.in_dollars and LIMITS[verdict.limit].unit == "tokens"
    return result


cdef tuple _fields(QuotaCheckResult result):
    return (result.allowed, result.limit_code, result.cause_code, result.action_code, result.wait_ms,
            result.current_usage, result.used, result.bound, result.asked, result.model_id, result.others_hold,
            result.never_fits, result.in_dollars, result.starved_code, result.whole)


def _restore(allowed, limit_code, cause_code, action_code, wait_ms, current_usage, used, bound, asked, model_id,
             others_hold, never_fits=False, in_dollars=False, starved_code=NOT_STARVED, whole=0.0):
    cdef QuotaCheckResult result = QuotaCheckResult.__new__(QuotaCheckResult)
    if not (0 <= limit_code < len(LIMITS) and 0 <= cause_code < len(LIMITS) and -1 <= action_code < len(ACTIONS)
            and NOT_STARVED <= starved_code <= LEASE_ENDED):
        raise ValueError("not the fields of a QuotaCheckResult")
    result.was_admitted = bool(allowed)
    result.held_up = bool(others_hold)
    result.hopeless = bool(never_fits)
    result.starved_code = starved_code
    result.whole = whole
    result.limit_code = limit_code
    result.cause_code = cause_code
    result.action_code = action_code
    result.wait_ms = wait_ms
    result.current_usage = current_usage
    result.used = used
    result.bound = bound
    result.asked = asked
    result.in_dollars = in_dollars
    result.model_id = model_id
    return result


def _figure(double value):
    """A number as text, with two decimals only if it has a fraction."""
    return f"{value:,.0f}" if value >= 1e15 or value == <double> <long long> value else f"{value:,.2f}"
