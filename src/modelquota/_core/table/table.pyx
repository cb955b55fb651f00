"""The public methods of the core: models, reads, single checks, reservations and batches.

One check keeps the GIL: its critical section takes a few tens of nanoseconds and does not touch Python objects, so it
takes the row's lock with one compare-and-swap. Only if the lock is held does it spin, and then release the GIL to wait.
A batch runs entirely without the GIL.
"""
cimport cython
import numpy as np
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear, PyErr_ExceptionMatches, PyErr_Occurred
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from modelquota._core.layout cimport ColdRow, MAX_TIME_NS, Row, Shared
from modelquota._core.row.decision cimport NEVER, Request, Verdict, decide
from modelquota._core.row.advance cimport unlikely
from modelquota._core.row.fullest cimport highest_usage
from modelquota._core.row.tokens cimport Kinds, count_at
from modelquota._core.state.joint cimport DECIDED, JointRequest, MOST_MODELS, add_meters, decide_rows, put_in_order
from modelquota._core.state.lock cimport SLICE_NS, try_lock, unlock
from modelquota._core.state.pools cimport Pools
from modelquota._core.state.repair cimport lock_row
from modelquota._core.state.state cimport State, rows_now_ns
from modelquota._core.state.write cimport LEFT, ROW_BUSY, forgive_burst, record_memory
from modelquota._core.table.admission cimport Admission, MAY_WAIT, ids_of, put_member
from modelquota._core.table.arguments cimport as_kinds, parse_request
from modelquota._core.table.arrays cimport int64_copy, require_length, require_target, token_counts
from modelquota._core.table.batch cimport (
    Batch, NO_CODE, charge_batch, check_batch, first_bad_code, first_too_many, index_of
)
from modelquota._core.table.grant cimport Grant, SETTLED, make_grant, same_kinds
from modelquota._core.table.intern cimport Interned, RowRef, plain_id
from modelquota._core.table.queue cimport Queues, Waiter
from modelquota._core.table.result cimport result_of
from modelquota._core.table.snapshot cimport read_model, read_models, totals_of

from modelquota.errors import UnknownModelError
from modelquota.quota.tokens import Tokens

cnp.import_array()

cdef enum:
    LOCKED_OUT = -1     # a row stays locked: its owner is not running

cdef extern from "Python.h":
    PyObject* look_up "PyDict_GetItemWithError"(object mapping, object key)    # the caller handles the error


cdef inline bint decide_and_unlock(
    Row* row, ColdRow* cold, uint32_t generation, const Shared* shared, int64_t now_ns, const Request* request,
    Verdict* verdict
) noexcept nogil:
    """Decide, and release the row's lock; False, undecided, if the model has left the row or has meters.

    Requires the row's lock.
    """
    cdef bint alive = row.generation == generation and row.meters == 0
    cdef Request weighed
    if alive:
        if unlikely(request.kinds.split):
            weighed = request[0]
            weighed.tokens = count_at(cold, &request.kinds)
            decide(row, cold, shared.entries, now_ns, &weighed, shared.header.enforcing, verdict)
        else:
            decide(row, cold, shared.entries, now_ns, request, shared.header.enforcing, verdict)
        if verdict.allowed:
            verdict.usage = highest_usage(row, cold, request.ram_mb, request.ssd_mb)
    unlock(&row.lock)
    return alive


cdef inline int wait_and_decide(
    Row* row, ColdRow* cold, uint32_t generation, const Shared* shared, int64_t now_ns, const Request* request,
    Verdict* verdict, int64_t patience_ns
) noexcept nogil:
    """Lock the row, then decide_and_unlock(); LOCKED_OUT if the row stays locked. Takes the row's lock."""
    if not lock_row(row, shared, patience_ns):
        return LOCKED_OUT
    return decide_and_unlock(row, cold, generation, shared, now_ns, request, verdict)


cdef int propagate() except -1:
    """Make the caller raise the exception that is set."""
    return -1


cdef object too_many_codes(Py_ssize_t i):
    return ValueError(f"codes[{i}] has too many ids: with their meters more than {MOST_MODELS} decide; give fewer")


@cython.no_gc_clear     # objects finalized in the same cycle may still use it
cdef class QuotaTable:
    """The core's methods of `ResourceQuotaManager`, which inherits them directly, without a wrapper.

    It is composed of a state, the pools of this process's records in it, the models that it has interned, admission
    over them, and the queues of waiting requests.
    """

    def __cinit__(self, *args, **kwargs):
        self.state = State()
        self.shared = &self.state.shared
        self.pools = Pools(self.state)
        self.interned = Interned(self.state)
        self.ids = self.interned.ids
        self.admission = Admission(self.pools, self.interned)
        self.queues = Queues(self.admission)

    def __init__(self, *, path, max_models, clock, events, trust_file=False):
        self.admission.events = events
        self.state.open(path, max_models, clock, trust_file)
        self.pools.sweep()
        self.interned.open()

    # -- the state

    @property
    def path(self):
        """The path of the state file, or None."""
        return self.state.path

    @property
    def max_models(self):
        """The maximum number of models in the table."""
        self.state.require_open()
        return self.shared.header.max_models

    @property
    def clock(self):
        """The `ManualClock` that was given, or None for the monotonic clock."""
        return self.state.manual

    @property
    def closed(self):
        """Whether `close` was called."""
        return self.state.closed

    @property
    def enforcement_enabled(self):
        """If False, every request is admitted, and still counted. Applies to all processes that share the state."""
        self.state.require_open()
        return self.shared.header.enforcing != 0

    @enforcement_enabled.setter
    def enforcement_enabled(self, value):
        self.state.require_open()
        self.shared.header.enforcing = 1 if value else 0
        self.queues.wake(None)

    def flush(self):
        """Write the state file to disk, to survive a loss of power; without a file, do nothing.

        The state survives the death of processes without it. Without `flush` the kernel writes changes to disk within
        about 30 s (``vm.dirty_expire_centisecs``).

        Raises StateFileError if the file has been deleted, replaced or truncated.
        """
        self.state.flush()

    def close(self):
        """Release what this process holds in the state, and the state itself; other processes are not affected.

        Open grants are released (their tokens stay charged), waits end with `ManagerClosedError`, and the seat, the
        mapping and the descriptors are freed. Afterwards every method raises `ManagerClosedError`; closing again does
        nothing.
        """
        self.queues.close()

    def _arrays(self):
        """See `State.arrays`."""
        return self.state.arrays()

    def _rings(self):
        """See `State.rings`."""
        return self.state.rings()

    def _shares(self):
        """See `State.shares`."""
        return self.state.shares()

    # -- models

    def list_models(self):
        """The ids of all models that have a quota."""
        self.state.require_open()
        self.interned.refresh()
        return list(self.ids)

    def _meters_of(self, model_id):
        """The ids of a model's meters."""
        self.state.require_open()
        self.interned.refresh()
        return [(<RowRef> ref).model_id for ref in self.interned.meters.get(model_id, ())]

    def _set_quota(self, str model_id not None, config):
        """Register a model, or replace the limits of a known one and keep its use."""
        self.interned.put(model_id, config, False, False)

    def _replace_quota(self, old, new, named=False):
        """Replace a model's limits with `new` if they are `old`; False if they are not. None: it has no quota.

        `named`: this id was configured explicitly, so it is not removed to make room.
        """
        if old is None:
            return self.interned.put(new.model_id, new, False, True)
        if new is None:
            return self.interned.remove(old.model_id, old)
        return self.interned.swap(old, new, named)

    def _remove(self, model_id):
        """Remove a model; True if it was known."""
        return self.interned.remove(model_id, None)

    def _record_memory(self, model_id, int64_t ram_mb, int64_t ssd_mb):
        """Record the model's current memory use, in MB, and its peaks. Takes the row's lock."""
        cdef RowRef ref = self.interned.require(model_id)
        cdef int outcome = ROW_BUSY
        while outcome == ROW_BUSY:
            outcome = record_memory(ref.row, ref.cold, ref.generation, ram_mb, ssd_mb, self.shared, 0)
            if outcome == ROW_BUSY:
                self.state.inside += 1
                with nogil:
                    outcome = record_memory(ref.row, ref.cold, ref.generation, ram_mb, ssd_mb, self.shared, SLICE_NS)
                self.state.exit()
            if outcome == ROW_BUSY:
                self.state.pause()
        if outcome == LEFT:
            raise UnknownModelError(model_id)
        self.state.wake(ref)

    def _reset_burst(self, model_id):
        """Lower both levels to at most max(rate, 1). Takes the row's lock."""
        cdef RowRef ref = self.interned.require(model_id)
        cdef int64_t now_ns
        cdef int outcome = ROW_BUSY
        while outcome == ROW_BUSY:
            now_ns = self.state.now_ns()
            outcome = forgive_burst(ref.row, ref.cold, ref.generation, now_ns, self.shared, 0)
            if outcome == ROW_BUSY:
                self.state.inside += 1
                with nogil:
                    outcome = forgive_burst(ref.row, ref.cold, ref.generation, now_ns, self.shared, SLICE_NS)
                self.state.exit()
            if outcome == ROW_BUSY:
                self.state.pause()
        if outcome == LEFT:
            raise UnknownModelError(model_id)
        self.state.wake(ref)

    # -- reading

    def _read(self, model_id):
        """``(limits, usage)`` as keyword dicts, one consistent view; None for an unknown model."""
        return read_model(self.interned, self.pools, model_id)

    def _read_all(self):
        """A snapshot of all models, each read under its row's lock, all at one clock reading."""
        return read_models(self.interned, self.pools)

    def _totals(self):
        """Sums over all models, living and removed, and over checks of unknown ones."""
        return totals_of(self.state)

    # -- requests

    def check_quota(self, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """Decide whether a model admits a request now. Charges one request and its tokens, or nothing; never waits.

        Parameters
        ----------
        model_id : str or sequence of str
            An id without a quota is allowed and counted; with `default_quota` it is registered from that template.
            Several ids, such as ``("acme", "acme/bob", "llama-70b")``, are one decision: all are charged, or none. Each
            counts a check; only the model that the result names counts a violation.
        estimated_tokens : int
            Tokens, 0 .. 2**62. 0 passes every token limit.
        ram_needed_mb, ssd_needed_mb : int
            MB (2**20 bytes), 0 .. 2**62, compared with what the limits leave; not held. 0 always passes.

        Returns
        -------
        QuotaCheckResult
            True if admitted.

        Raises
        ------
        TypeError, ValueError
            A count is not an integer or is out of range; nothing is charged.
        """
        cdef Request request
        cdef PyObject* found
        parse_request(&request, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        found = look_up(self.ids, model_id)
        if found == NULL:
            return self.answer_unknown(model_id, &request)
        return self.answer(<RowRef> found, model_id, &request, None)

    def peek_quota(self, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """What `check_quota` would return now; charges, counts and logs nothing.

        Parameters, result and errors are those of `check_quota`. An id that `default_quota` would register is judged by
        that config, and is not registered.
        """
        cdef Request request
        parse_request(&request, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        return self.admission.check_several(model_id, &request, True)

    cdef inline object answer(self, RowRef ref, object model_id, const Request* request, object handle):
        cdef Verdict verdict
        cdef Row* row = ref.row
        cdef int64_t now_ns = rows_now_ns(self.shared)
        if unlikely(row.meters):
            return self.answer_metered(ref, model_id, request, handle, now_ns)
        if now_ns >= self.shared.fine_until_ns or not try_lock(&row.lock, self.shared.me):
            return self.answer_late(ref, model_id, request, handle)
        if not decide_and_unlock(row, ref.cold, ref.generation, self.shared, now_ns, request, &verdict):
            return self.answer_late(ref, model_id, request, handle)
        if verdict.limit and verdict.worth_a_look:
            self.pools.reclaim_if_due()
        if verdict.to_log == 0:
            return result_of(&verdict, <str> model_id)
        result = result_of(&verdict, <str> model_id)
        self.admission.events.on_violation(model_id, result, verdict.to_log)
        return result

    cdef object answer_metered(self, RowRef ref, object model_id, const Request* request, object handle,
                               int64_t now_ns):
        """answer() for a model that has meters: one decision over all of them. Takes the rows' locks."""
        cdef JointRequest joint
        cdef Verdict verdict
        cdef RowRef named = ref
        joint.count = 0
        put_member(&joint, ref, self.shared.rows)
        joint.unclaimed_until_ns = 0
        if now_ns >= self.shared.fine_until_ns or not add_meters(&joint, 1, self.shared):
            return self.answer_late(ref, model_id, request, handle)
        put_in_order(&joint)
        if decide_rows(&joint, now_ns, request, False, self.shared, 0, &verdict) != DECIDED:
            return self.answer_late(ref, model_id, request, handle)
        if verdict.limit and verdict.worth_a_look:
            self.pools.reclaim_if_due()
        if joint.violating > 0:
            named = self.interned.ref_at(joint.members[joint.violating].index,
                                         joint.members[joint.violating].generation)
        result = result_of(&verdict, None if named is None else named.model_id)
        if verdict.to_log:
            self.admission.events.on_violation(result.model_id, result, verdict.to_log)
        return result

    cdef object answer_late(self, RowRef ref, object model_id, const Request* request, object handle):
        """answer() for rare cases: a locked row, a model that has left its row, a check of the file, a closed manager.

        Takes the row's lock.
        """
        cdef Verdict verdict
        cdef Row* row = ref.row
        cdef int64_t now_ns
        cdef int outcome = LOCKED_OUT
        while outcome == LOCKED_OUT:
            now_ns = rows_now_ns(self.shared)
            if now_ns >= self.shared.fine_until_ns:
                self.state.look(now_ns)
            outcome = wait_and_decide(row, ref.cold, ref.generation, self.shared, now_ns, request, &verdict, 0)
            if outcome == LOCKED_OUT:
                self.state.inside += 1
                with nogil:
                    outcome = wait_and_decide(row, ref.cold, ref.generation, self.shared, now_ns, request, &verdict,
                                              SLICE_NS)
                self.state.exit()
            if outcome == LOCKED_OUT:
                self.state.pause()
        if outcome == 0 and row.generation == ref.generation:      # it has meters
            return self.admission.check_several(ref.model_id, request, False)
        if outcome == 0:
            if handle is not None:
                raise UnknownModelError(model_id)
            self.interned.unintern(ref)
            return self.answer_unknown(model_id, request)
        if verdict.limit and verdict.worth_a_look:
            self.pools.reclaim_if_due()
        result = result_of(&verdict, ref.model_id)
        if verdict.to_log:
            self.admission.events.on_violation(ref.model_id, result, verdict.to_log)
        return result

    cdef object answer_unknown(self, object model_id, const Request* request):
        cdef Verdict verdict
        cdef RowRef ref
        if PyErr_Occurred():
            if not PyErr_ExceptionMatches(TypeError):
                propagate()
            PyErr_Clear()       # raised for a list, which is not a key
        self.state.require_open()
        if not isinstance(model_id, str):
            return self.admission.check_several(model_id, request, False)
        model_id = plain_id(model_id)
        ref = self.admission.find_or_adopt(<str> model_id)
        if ref is not None:
            return self.answer(ref, model_id, request, None)
        if model_id in self.interned.meters:
            return self.admission.check_several(model_id, request, False)
        self.admission.count_unknown(1)
        verdict.allowed = True
        verdict.limit = 0
        verdict.action = -1
        verdict.retry_after_ms = NEVER
        verdict.usage = 0.0
        return result_of(&verdict, None)

    def reserve(self, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """Check, and if admitted hold memory, one unit of concurrency, and tokens that can be settled later.

        Parameters
        ----------
        model_id : str or sequence of str
            One model, or up to 15 that must all admit, such as ``("acme", "acme/bob", "llama-70b")``: one decision,
            all or nothing, meters included. An id without a quota admits, and holds nothing.
        estimated_tokens : int
            Tokens, 0 .. 2**62.
        ram_needed_mb, ssd_needed_mb : int
            MB (2**20 bytes), 0 .. 2**62, held in addition to the reported use until the grant is released.

        Returns
        -------
        Grant

        Raises
        ------
        QuotaExceededError
            Denied; ``.result`` is the `QuotaCheckResult`. Nothing has been charged.
        TypeError, ValueError
            A count is not an integer or is out of range, or an id is not valid; nothing has been charged.

        Examples
        --------
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama", max_concurrent_requests=8, max_tokens_per_hour=100_000)
        >>> with manager.reserve("llama", estimated_tokens=500) as grant:
        ...     grant.settle(320)
        >>> manager.get_usage("llama").tokens_this_hour
        320
        """
        cdef Request request
        parse_request(&request, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        return self.admission.reserve(ids_of(model_id), &request)

    def settle_many(self, grants, actual_tokens):
        """Settle many grants at once, such as those that one step of continuous batching completed.

        Parameters
        ----------
        grants : sequence of Grant
            Open grants, each once.
        actual_tokens : sequence of int or int64 array, of the same length
            Tokens of each, 0 .. 2**62.

        Raises
        ------
        TypeError, ValueError, GrantClosedError
            As for `Grant.settle`; everything is validated before anything is settled.
        """
        cdef Grant grant
        cdef Kinds actual
        cdef list open_grants = list(grants)
        cdef list counts = actual_tokens.tolist() if hasattr(actual_tokens, "tolist") else list(actual_tokens)
        cdef Py_ssize_t i
        if len(open_grants) != len(counts):
            raise ValueError(f"actual_tokens has {len(counts)} elements and grants has {len(open_grants)}; "
                             "give one each")
        for i in range(len(counts)):
            if type(open_grants[i]) is not Grant:
                raise TypeError(f"grants[{i}] is {open_grants[i]!r}; give a Grant")
            as_kinds(counts[i], f"actual_tokens[{i}]", &actual)
            grant = open_grants[i]
            if not (grant.stage == SETTLED and same_kinds(&grant.kinds, &actual)):
                grant.require_open("settle")
        if len(set(map(id, open_grants))) != len(open_grants):
            raise ValueError("grants has one grant twice; give each once")
        for i in range(len(counts)):
            (<Grant> open_grants[i]).settle(counts[i])

    def reserve_many(self, codes, estimated_tokens, *, out=None):
        """Reserve for many requests in order, such as those that a scheduler may start in its next step.

        Parameters
        ----------
        codes : int64 array, shape (n,) or (n, k)
            From `codes`, as for `check_many`.
        estimated_tokens : int64 array, shape (n,) or (n, 3), int or Tokens
            Tokens of each request, 0 .. 2**62; or its input, cached and output tokens.
        out : uint8 array, shape (n,), optional
            Filled: 0 if admitted, otherwise the code of the violated `Limit`.

        Returns
        -------
        list of Grant or None
            A grant for each request that was admitted, None for each that was denied.

        Raises
        ------
        TypeError, ValueError
            As for `check_many`; nothing has been charged.
        """
        cdef Request request
        cdef Verdict verdict
        cdef JointRequest joint
        cdef Py_ssize_t i, width
        cdef list grants = []
        cdef list refs
        self.state.require_open()
        rows = int64_copy(codes, "codes", 2)
        width = self._width(rows)
        tokens = token_counts(estimated_tokens, "estimated_tokens", rows.shape[0])
        if out is not None:
            require_target(out, "out", np.uint8, rows.shape[0])
        self._require_codes(rows)
        estimates = tokens.tolist()
        names = [self.interned.name_of(index_of(code)) if code != NO_CODE else None for code in rows.ravel().tolist()]
        for i in range(len(estimates)):
            parse_request(&request, Tokens(*estimates[i]) if tokens.ndim == 2 else estimates[i], 0, 0)
            ids = tuple([name for name in names[i * width:(i + 1) * width] if name is not None])
            refs = []
            joint.unclaimed_until_ns = 0
            self.admission.decide_all(ids, &request, True, MAY_WAIT, refs, &joint, &verdict, NULL)
            grants.append(make_grant(self.pools, &joint, refs, &request, &verdict) if verdict.allowed else None)
            if out is not None:
                out[i] = 0 if verdict.allowed else verdict.limit
            if verdict.to_log:
                name = (<RowRef> refs[joint.violating]).model_id
                self.admission.events.on_violation(name, result_of(&verdict, name), verdict.to_log)
        return grants

    def _admit_or_queue(self, Waiter waiter not None, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout,
                        priority, *, nowait):
        """A Grant if the request is admitted at once, the waiter if it waits, None if a row is locked: try again.

        Raises QuotaExceededError if it is denied for good, ModelLockedError if nothing could be decided in time.
        """
        return self.queues.admit_or_queue(waiter, model_id, estimated_tokens, ram_needed_mb, ssd_needed_mb, timeout,
                                          priority, nowait)

    def _admit(self, make_waiter, model_id, tokens, ram_needed_mb, ssd_needed_mb, timeout, priority):
        """The same at the first try, without waiting for a lock: a Grant, or a waiter and whether it waits.

        `make_waiter` returns a `Waiter`, which only a request that is not admitted at once needs. `tokens` may also be
        a tuple of input, cached and output tokens.
        """
        return self.queues.admit(make_waiter, model_id, tokens, ram_needed_mb, ssd_needed_mb, timeout, priority)

    def _retry(self, Waiter waiter not None):
        """The same again, while a row is locked: a Grant, the waiter if it waits, None to try again."""
        return self.queues.admit_or_queue(waiter, None, None, None, None, None, None, True)

    # -- batches

    def codes(self, model_ids):
        """Codes of models for `check_many` and `charge_many`, as an int64 array.

        A code is valid until its model is removed, by `remove_quota` or, if `default_quota` registered it, to make
        room. With `default_quota` an unknown id is registered. Raises UnknownModelError for an id without a quota.
        """
        cdef RowRef ref
        cdef list refs = []
        if isinstance(model_ids, str):
            raise TypeError(f"model_ids is {model_ids!r}; give a sequence of them")
        for model_id in model_ids:
            model_id = plain_id(model_id)
            ref = self.admission.find_or_adopt(model_id)
            if ref is None:
                raise UnknownModelError(model_id)
            refs.append(ref)
        cdef cnp.ndarray codes = np.empty(len(refs), np.int64)
        cdef int64_t* code = <int64_t*> cnp.PyArray_DATA(codes)
        cdef Py_ssize_t i = 0
        for ref in refs:
            code[i] = <int64_t> (<uint64_t> ref.generation << 32 | <uint64_t> (ref.row - self.shared.rows))
            i += 1
        return codes

    def check_many(self, codes, estimated_tokens, out=None, *, times_ns=None, retry_after_ms=None):
        """Decide many requests in order, with the GIL released; each as `check_quota` would.

        Everything is validated before anything is charged. The whole batch uses one clock reading.

        Parameters
        ----------
        codes : int64 array, shape (n,) or (n, k)
            From `codes`. With k codes a request, up to 15, these admit all or none; 0 stands for no model.
        estimated_tokens : int64 array, shape (n,) or (n, 3), int or Tokens
            Tokens of each request, 0 .. 2**62; or its input, cached and output tokens.
        out : uint8 array, shape (n,), optional
            Filled and returned instead of a new array.
        times_ns : int64 array, shape (n,), optional
            The time of each request, only with a `ManualClock`: not decreasing, and not before the clock's time. The
            clock is moved to the last one.
        retry_after_ms : int64 array, shape (n,), optional
            Filled: 0 if admitted, -1 if no wait is known to help, otherwise milliseconds.

        Returns
        -------
        uint8 array, shape (n,)
            0 if admitted, otherwise the code of the violated `Limit`. Under the action ``warn`` all are admitted.

        Raises
        ------
        TypeError, ValueError
            A wrong dtype, shape or value, or a code that does not belong to a living model; the message names the
            argument and the first bad element.

        Examples
        --------
        >>> manager = ResourceQuotaManager(clock=ManualClock())
        >>> manager.set_quota("llama", max_requests_per_second=2, burst_requests=0, on_violation="reject")
        >>> codes = manager.codes(["llama", "llama", "llama"])
        >>> [int(code) for code in manager.check_many(codes, estimated_tokens=100)]
        [0, 0, 4]
        """
        return self._check_many(codes, estimated_tokens, out, times_ns, retry_after_ms, NULL)

    def _check_until_denied(self, codes, estimated_tokens, out, times_ns):
        """As `check_many`, up to the first request that is denied, to whose time the clock is moved.

        Returns how many were decided, the denied one included.
        """
        cdef Py_ssize_t decided = 0
        self._check_many(codes, estimated_tokens, out, times_ns, None, &decided)
        return decided

    cdef object _check_many(
        self, object codes, object estimated_tokens, object out, object times_ns, object retry_after_ms,
        Py_ssize_t* decided
    ):
        """`check_many`; with `decided`, which is filled with how many were decided, up to the first that is denied."""
        cdef Batch batch
        cdef Verdict verdict
        cdef Py_ssize_t i = 0
        cdef list due = []
        self.state.require_open()
        rows = int64_copy(codes, "codes", 2)
        batch.count = rows.shape[0]
        batch.width = self._width(rows)
        tokens = token_counts(estimated_tokens, "estimated_tokens", batch.count)
        batch.split = tokens.ndim == 2
        if times_ns is not None:    # before the targets: a conversion may run foreign code, which may resize them
            times_ns = self._times(times_ns, batch.count)
        if out is None:
            out = np.empty(batch.count, np.uint8)
        else:
            require_target(out, "out", np.uint8, batch.count)
        batch.until_denied = decided != NULL
        batch.codes = <const int64_t*> cnp.PyArray_DATA(rows)
        batch.tokens = <const int64_t*> cnp.PyArray_DATA(tokens)
        batch.limits = <uint8_t*> cnp.PyArray_DATA(out)
        batch.waits_ms = NULL
        batch.times_ns = NULL
        batch.others_may_free = False
        if retry_after_ms is not None:
            require_target(retry_after_ms, "retry_after_ms", np.int64, batch.count)
            batch.waits_ms = <int64_t*> cnp.PyArray_DATA(retry_after_ms)
        if times_ns is not None:
            batch.times_ns = <const int64_t*> cnp.PyArray_DATA(times_ns)
        self._require_codes(rows)
        batch.now_ns = rows_now_ns(self.shared)
        if batch.now_ns >= self.shared.fine_until_ns:
            self.state.look(batch.now_ns)
        while i < batch.count and not (batch.until_denied and i and batch.limits[i - 1]):
            self.state.inside += 1
            with nogil:
                i = check_batch(&batch, self.shared, i, &verdict)
            self.state.exit()
            if batch.waits:
                self.state.pause()
            if batch.too_many:
                raise too_many_codes(i)
            if verdict.to_log:
                name = self.interned.name_of(batch.violating)
                due.append((name, result_of(&verdict, name), verdict.to_log))
        if times_ns is not None and i and batch.times_ns[i - 1] > self.state.manual.time_ns:
            self.state.manual.move_to(batch.times_ns[i - 1])
        if batch.others_may_free:
            self.pools.reclaim_if_due()
        for model_id, result, held in due:
            self.admission.events.on_violation(model_id, result, held)
        if decided != NULL:
            decided[0] = i
        return out

    def charge_many(self, codes, tokens, *, over=None):
        """Charge tokens unconditionally, such as those that one decode step produced; no request is counted.

        If a limit is exceeded, nothing is admitted until the excess has aged out. Meters are charged with their model.

        Parameters
        ----------
        codes : int64 array, shape (n,)
            From `codes`.
        tokens : int64 array, shape (n,) or (n, 3), or int
            Output tokens of each; or its input, cached and output tokens.
        over : uint8 array, shape (n,), optional
            Filled: the code of the first `Limit` that the model, or one of its meters, is over now, otherwise 0.

        Raises
        ------
        TypeError, ValueError
            As for `check_many`; nothing has been charged.
        """
        cdef Batch batch
        cdef Py_ssize_t i = 0
        self.state.require_open()
        rows = int64_copy(codes, "codes")
        batch.count = rows.shape[0]
        batch.width = 1
        counts = token_counts(tokens, "tokens", batch.count)
        batch.split = counts.ndim == 2
        batch.limits = NULL
        if over is not None:
            require_target(over, "over", np.uint8, batch.count)
            batch.limits = <uint8_t*> cnp.PyArray_DATA(over)
        self._require_codes(rows)
        batch.codes = <const int64_t*> cnp.PyArray_DATA(rows)
        batch.tokens = <const int64_t*> cnp.PyArray_DATA(counts)
        batch.now_ns = rows_now_ns(self.shared)
        if batch.now_ns >= self.shared.fine_until_ns:
            self.state.look(batch.now_ns)
        while i < batch.count:
            self.state.inside += 1
            with nogil:
                i = charge_batch(&batch, self.shared, i)
            self.state.exit()
            if batch.waits:
                self.state.pause()

    def _width(self, cnp.ndarray rows):
        """How many codes an element has; raises ValueError for two of the same model in one."""
        if rows.ndim == 1:
            return 1
        if not 1 <= rows.shape[1] <= MOST_MODELS:
            raise ValueError(f"codes has shape {(<object> rows).shape}; give 1 to {MOST_MODELS} for each request")
        ordered = np.sort(rows, axis=1)
        twice = np.argwhere((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_CODE))
        if twice.size:
            raise ValueError(f"codes[{twice[0][0]}] has one model twice; give each once, and 0 for none")
        return rows.shape[1]

    def _require_codes(self, cnp.ndarray rows):
        cdef const int64_t* first = <const int64_t*> cnp.PyArray_DATA(rows)
        cdef Py_ssize_t count = cnp.PyArray_SIZE(rows)
        cdef bint several = rows.ndim == 2
        cdef Batch batch
        cdef Py_ssize_t bad, full
        batch.codes = first
        batch.count = full = rows.shape[0]
        batch.width = rows.shape[1] if several else 1
        self.state.inside += 1
        with nogil:
            bad = first_bad_code(first, count, several, self.shared.rows, self.shared.header)
            if bad == count:
                full = first_too_many(&batch, self.shared)
        self.state.exit()
        self.state.require_open()
        if bad < count:
            raise ValueError(f"codes[{bad}] is {first[bad]}, which is no model's code; codes come from codes(), and a "
                             "code ends when its model is removed")
        if full < batch.count:
            raise too_many_codes(full)

    def _times(self, times_ns, Py_ssize_t count):
        cdef object times
        if self.state.manual is None:
            raise ValueError("times_ns needs a manager with a clock of its own: "
                             "ResourceQuotaManager(clock=ManualClock())")
        times = int64_copy(times_ns, "times_ns")
        require_length(times, "times_ns", count)
        if count:
            if times[0] < self.state.manual.time_ns or times[count - 1] > MAX_TIME_NS:
                raise ValueError(f"times_ns runs from {times[0]} to {times[count - 1]}; it must lie between the clock, "
                                 f"{self.state.manual.time_ns}, and 2**61")
            falls = np.flatnonzero(times[1:] < times[:count - 1])
            if falls.size:
                at = falls[0] + 1
                raise ValueError(f"times_ns[{at}] = {times[at]} is before times_ns[{at - 1}] = {times[at - 1]}; "
                                 "times must not fall: sort the requests by time")
        return times
