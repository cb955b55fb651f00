"""The hot half of the core: single checks, bound handles and batches. Everything here ends in `decide`.

One check keeps the GIL: its critical section is a few tens of nanoseconds and touches no Python object, so it takes the
row's lock with one compare-and-swap. Only where the lock is held does it spin, and then release the GIL to wait. A batch
runs wholly without the GIL.
"""
cimport cython
import numpy as np
cimport numpy as cnp
from cpython.exc cimport PyErr_Clear, PyErr_ExceptionMatches, PyErr_Occurred
from cpython.object cimport PyObject
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from modelquota._core.table.batch cimport Batch, charge_batch, check_batch, first_bad_code, first_out_of_range, index_of
from modelquota._core.table.arguments cimport as_count
from modelquota._core.row.decision cimport Ask, NEVER, Verdict, decide, highest_usage
from modelquota._core.row.grant cimport bind_handle, free_handle
from modelquota._core.layout cimport GrantRecord, Ledger, MAX_TIME_NS, Row, Shared
from modelquota._core.state.lock cimport SLICE_NS, try_lock, unlock
from modelquota._core.state.pool cimport give_record
from modelquota._core.state.repair cimport lock_row
from modelquota._core.table.result cimport result_of
from modelquota._core.state.shared cimport fork_count
from modelquota._core.table.intern cimport QuotaState, RowRef, plain_id

from modelquota.errors import UnknownModelError

cnp.import_array()

cdef enum:
    LOCKED_OUT = -1     # a row stays locked: its owner does not run

cdef extern from "Python.h":
    PyObject* look_up "PyDict_GetItemWithError"(object mapping, object key)    # the caller sees to the error

cdef extern from *:
    uint64_t count_atomically "__atomic_fetch_add"(uint64_t* word, uint64_t more, int order) noexcept nogil
    const int RELAXED "__ATOMIC_RELAXED"


cdef inline bint decide_and_unlock(
    Row* row, Ledger* ledger, uint32_t generation, const Shared* shared, int64_t now_ns, const Ask* ask, Verdict* verdict
) noexcept nogil:
    """Requires the row's lock, and gives it back; False, and nothing is decided, if the model has left the row."""
    cdef bint alive = row.generation == generation
    if alive:
        decide(row, ledger, shared.entries, now_ns, ask, shared.header.enforcing, verdict)
        if verdict.allowed:
            verdict.usage = highest_usage(row, ledger, ask)
    unlock(&row.lock)
    return alive


cdef inline int wait_and_decide(
    Row* row, Ledger* ledger, uint32_t generation, const Shared* shared, int64_t now_ns, const Ask* ask, Verdict* verdict,
    int64_t patience_ns
) noexcept nogil:
    """decide_and_unlock() for a lock that somebody else may hold; LOCKED_OUT if it stays so. Takes the row's lock."""
    if not lock_row(row, shared, patience_ns):
        return LOCKED_OUT
    return decide_and_unlock(row, ledger, generation, shared, now_ns, ask, verdict)


cdef inline int change_handle(
    Row* row, Ledger* ledger, uint32_t generation, GrantRecord* record, bint bind, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Bind a handle, or give it up: a model that has one is not forgotten. False if the model has gone, LOCKED_OUT if the
    row stays locked. Takes the row's lock."""
    cdef bint alive
    if not lock_row(row, shared, patience_ns):
        return LOCKED_OUT
    alive = row.generation == generation
    if alive and bind:
        bind_handle(ledger, record, <uint32_t> (row - shared.rows), generation, shared.me)
    elif alive:
        free_handle(ledger, record)
    else:
        record.seat = 0
    unlock(&row.lock)
    return alive


cdef int propagate() except -1:
    """Have the caller raise the error that is set."""
    return -1


cdef class QuotaTable(QuotaState):
    """The verbs that stand in front of every request. `ResourceQuotaManager` inherits them as they are."""

    def __cinit__(self, *args, **kwargs):
        self.deferred = []

    def check_quota(self, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """May this model take this request now? Charges one request and its tokens, or nothing at all; never waits.

        Parameters
        ----------
        model_id : str or sequence of str
            An id without a quota is allowed and counted; with `default_quota` it is registered from that template.
            Several, such as ``("acme", "acme/bob", "llama-70b")``, are one decision: all are charged, or none. Each
            counts as a check of its own, a violation only for the model that the result names.
        estimated_tokens : int
            Tokens, 0 .. 2**62. 0 passes every token limit.
        ram_needed_mb, ssd_needed_mb : int
            MB (2**20 bytes), 0 .. 2**62, compared with what the caps leave; not held. 0 passes, however full.

        Returns
        -------
        QuotaCheckResult
            True when admitted.

        Raises
        ------
        TypeError, ValueError
            A count that is no integer, or out of range; nothing is charged.
        """
        cdef Ask ask
        cdef PyObject* found
        start_ask(&ask, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        found = look_up(self.interned, model_id)
        if found == NULL:
            return self.answer_unknown(model_id, &ask)
        return self.answer(<RowRef> found, model_id, &ask, None)

    def peek_quota(self, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """What `check_quota` would answer now; charges, counts and logs nothing.

        Parameters, result and errors are those of `check_quota`. An id that `default_quota` would register is answered as
        it would be then, and is not registered.
        """
        cdef Ask ask
        start_ask(&ask, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        return self.check_several(model_id, &ask, True)

    cdef inline object answer(self, RowRef ref, object model_id, const Ask* ask, object handle):
        cdef Verdict verdict
        cdef Row* row = ref.row
        cdef int64_t now_ns = self.now_ns()
        if now_ns >= self.fine_until_ns or not try_lock(&row.lock, self.shared.me):
            return self.answer_late(ref, model_id, ask, handle)
        if not decide_and_unlock(row, ref.ledger, ref.generation, &self.shared, now_ns, ask, &verdict):
            return self.answer_late(ref, model_id, ask, handle)
        if verdict.limit and verdict.worth_a_look:
            self.look_for_dead()
        if verdict.log_held == 0:
            return result_of(&verdict, <str> model_id)
        result = result_of(&verdict, <str> model_id)
        self._log_violation(model_id, result, verdict.log_held)
        return result

    cdef object answer_late(self, RowRef ref, object model_id, const Ask* ask, object handle):
        """answer() with all that rarely comes in between: a locked row, a model that has left its row, a look at the
        file, a manager that is closed."""
        cdef Verdict verdict
        cdef Row* row = ref.row
        cdef int64_t now_ns
        cdef int outcome = LOCKED_OUT
        while outcome == LOCKED_OUT:
            now_ns = self.now_ns()
            if now_ns >= self.fine_until_ns:
                self.look(now_ns)
            outcome = wait_and_decide(row, ref.ledger, ref.generation, &self.shared, now_ns, ask, &verdict, 0)
            if outcome == LOCKED_OUT:
                self.inside += 1
                with nogil:
                    outcome = wait_and_decide(row, ref.ledger, ref.generation, &self.shared, now_ns, ask, &verdict, SLICE_NS)
                self.exit()
            if outcome == LOCKED_OUT:
                self.pause()
        if outcome == 0:
            if handle is not None:
                raise UnknownModelError(model_id)
            self.drop(ref)
            return self.answer_unknown(model_id, ask)
        if verdict.limit and verdict.worth_a_look:
            self.look_for_dead()
        result = result_of(&verdict, ref.model_id)
        if verdict.log_held:
            self._log_violation(ref.model_id, result, verdict.log_held)
        return result

    cdef object answer_unknown(self, object model_id, const Ask* ask):
        cdef Verdict verdict
        if PyErr_Occurred():
            if not PyErr_ExceptionMatches(TypeError):
                propagate()
            PyErr_Clear()       # of a list, which is no key
        self.require_open()
        if not isinstance(model_id, str):
            return self.check_several(model_id, ask, False)
        model_id = plain_id(model_id)
        ref = self.find(<str> model_id)
        while ref is None and self.adopt(model_id):     # again, if it is forgotten in between: it is as good as new
            ref = self.find(<str> model_id)
        if ref is not None:
            return self.answer(<RowRef> ref, model_id, ask, None)
        self.count_unknown(1)
        verdict.allowed = True
        verdict.limit = 0
        verdict.action = -1
        verdict.retry_after_ms = NEVER
        verdict.usage = 0.0
        return result_of(&verdict, None)

    cdef object check_several(self, object model_ids, const Ask* ask, bint peek):
        """check_quota for a sequence of ids, or peek_quota."""
        raise TypeError(f"model_id is {model_ids!r}; give a str")

    cdef int count_unknown(self, int ids) except -1:
        count_atomically(&self.shared.header.unknown_checks, ids, RELAXED)
        return 0

    cdef bint adopt(self, str model_id) except -1:
        """Register an id that has no quota, as `default_quota` says; False if that says nothing of it."""
        template = self._template(model_id)
        if template is None:
            self._log_unknown(model_id)
            return False
        self._put(model_id, template, on_sight=True)
        return True

    def _template(self, model_id):
        """Called for an id without a quota: the config that stands in for its own, whatever id that names, or None."""
        return None

    def _log_unknown(self, model_id):
        """Called for each check of an id without a quota."""

    def _log_violation(self, model_id, result, stands_for):
        """Called at most once per model and second of its time, for the violation in `result` and those held back."""

    # -- batches

    def rows(self, model_ids):
        """Codes of models for `check_many` and `charge_many`, as an int64 array.

        A code stays good until its model is removed, or forgotten if `default_quota` made it; with `default_quota` an
        unknown id is registered. Raises UnknownModelError for an id that has no quota.
        """
        cdef RowRef ref
        cdef list refs = []
        if isinstance(model_ids, str):
            raise TypeError(f"model_ids is {model_ids!r}; give a sequence of them")
        for model_id in model_ids:
            model_id = plain_id(model_id)
            ref = self.find(model_id)
            while ref is None and self.adopt(model_id):
                ref = self.find(model_id)
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

    def check_many(self, rows, estimated_tokens, out=None, *, times_ns=None, retry_after_ms=None):
        """Decide many requests in order, with the GIL released; each as `check_quota` would.

        Everything is validated before anything is charged. One reading of the clock serves the whole batch.

        Parameters
        ----------
        rows : int64 array, shape (n,)
            Codes from `rows`.
        estimated_tokens : int64 array, shape (n,), or int
            Tokens of each request, 0 .. 2**62.
        out : uint8 array, shape (n,), optional
            Filled and returned instead of a new array.
        times_ns : int64 array, shape (n,), optional
            The time of each request, on a manager with a `ManualClock` only: never falling, and not before the clock,
            which stands at the last one afterwards.
        retry_after_ms : int64 array, shape (n,), optional
            Filled: 0 where admitted, -1 where no wait helps, otherwise milliseconds.

        Returns
        -------
        uint8 array, shape (n,)
            0 where admitted, otherwise the code of the violated `Limit`. Under the action ``warn`` all are admitted.

        Raises
        ------
        TypeError, ValueError
            A wrong dtype, shape or figure, or a code that is no living model's; the message names the argument and the
            first bad element.
        """
        cdef Batch batch
        cdef Verdict verdict
        cdef Py_ssize_t i = 0
        cdef list due = []
        self.require_open()
        codes = _int64_copy(rows, "rows")
        batch.count = codes.shape[0]
        tokens = _tokens(estimated_tokens, "estimated_tokens", batch.count)
        if times_ns is not None:    # before the targets: a conversion may run foreign code, which may resize them
            times_ns = self._times(times_ns, batch.count)
        if out is None:
            out = np.empty(batch.count, np.uint8)
        else:
            _require_target(out, "out", np.uint8, batch.count)
        batch.codes = <const int64_t*> cnp.PyArray_DATA(codes)
        batch.tokens = <const int64_t*> cnp.PyArray_DATA(tokens)
        batch.limits = <uint8_t*> cnp.PyArray_DATA(out)
        batch.waits_ms = NULL
        batch.times_ns = NULL
        batch.held_up = False
        if retry_after_ms is not None:
            _require_target(retry_after_ms, "retry_after_ms", np.int64, batch.count)
            batch.waits_ms = <int64_t*> cnp.PyArray_DATA(retry_after_ms)
        if times_ns is not None:
            batch.times_ns = <const int64_t*> cnp.PyArray_DATA(times_ns)
        self._require_codes(codes)
        batch.now_ns = self.now_ns()
        if batch.now_ns >= self.fine_until_ns:
            self.look(batch.now_ns)
        while i < batch.count:
            self.inside += 1
            with nogil:
                i = check_batch(&batch, &self.shared, i, &verdict)
            self.exit()
            if batch.waits:
                self.pause()
            if verdict.log_held:
                name = self.name_of(index_of(batch.codes[i - 1]))
                due.append((name, result_of(&verdict, name), verdict.log_held))
        if times_ns is not None and batch.count:
            if batch.times_ns[batch.count - 1] > self.manual.time_ns:
                self.manual.move_to(batch.times_ns[batch.count - 1])
        if batch.held_up:
            self.look_for_dead()
        for model_id, result, held in due:
            self._log_violation(model_id, result, held)
        return out

    def charge_many(self, rows, tokens):
        """Charge tokens unconditionally, such as those that one decode step produced; no request is counted.

        Parameters are as for `check_many`; so are the errors, and nothing is charged where one is raised. Afterwards
        nothing is admitted until what exceeds a limit has aged out.
        """
        cdef Batch batch
        cdef Py_ssize_t i = 0
        self.require_open()
        codes = _int64_copy(rows, "rows")
        batch.count = codes.shape[0]
        counts = _tokens(tokens, "tokens", batch.count)
        self._require_codes(codes)
        batch.codes = <const int64_t*> cnp.PyArray_DATA(codes)
        batch.tokens = <const int64_t*> cnp.PyArray_DATA(counts)
        batch.now_ns = self.now_ns()
        if batch.now_ns >= self.fine_until_ns:
            self.look(batch.now_ns)
        while i < batch.count:
            self.inside += 1
            with nogil:
                i = charge_batch(&batch, &self.shared, i)
            self.exit()
            if batch.waits:
                self.pause()

    def _require_codes(self, cnp.ndarray codes):
        cdef const int64_t* first = <const int64_t*> cnp.PyArray_DATA(codes)
        cdef Py_ssize_t count = codes.shape[0]
        cdef Py_ssize_t bad
        self.inside += 1
        with nogil:
            bad = first_bad_code(first, count, self.shared.rows, self.shared.header)
        self.exit()
        self.require_open()
        if bad < count:
            raise ValueError(f"rows[{bad}] is {first[bad]}, which is no model's code; codes come from rows(), and a code "
                             "ends when its model is removed")

    def _times(self, times_ns, Py_ssize_t count):
        cdef object times
        if self.manual is None:
            raise ValueError("times_ns needs a manager with a clock of its own: ResourceQuotaManager(clock=ManualClock())")
        times = _int64_copy(times_ns, "times_ns")
        _require_length(times, "times_ns", count)
        if count:
            if times[0] < self.manual.time_ns or times[count - 1] > MAX_TIME_NS:
                raise ValueError(f"times_ns runs from {times[0]} to {times[count - 1]}; it must lie between the clock, "
                                 f"{self.manual.time_ns}, and 2**61")
            falls = np.flatnonzero(times[1:] < times[:count - 1])
            if falls.size:
                at = falls[0] + 1
                raise ValueError(f"times_ns[{at}] = {times[at]} is before times_ns[{at - 1}] = {times[at - 1]}; "
                                 "times must not fall: sort the requests by time")
        return times


@cython.no_gc_clear     # to count itself no more, it needs what it refers to
cdef class RowHandle:
    """One model, bound: the checks of `QuotaTable` without the look-up. `ModelQuota` adds the cold verbs."""

    def __cinit__(self, QuotaTable manager not None, model_id):
        self.model_id = plain_id(model_id)
        self.manager = manager
        self.forks = fork_count()
        self.record = manager.take_grant_record()
        while self.ref is None:
            ref = manager.known(self.model_id)
            if self.change(ref, True):      # otherwise it has just gone
                self.ref = ref

    def __dealloc__(self):
        cdef QuotaTable manager = self.manager
        cdef RowRef ref = self.ref
        cdef int outcome = 0
        if self.record == NULL or self.forks != fork_count() or not manager.usable():
            return
        if ref is not None:
            outcome = change_handle(ref.row, ref.ledger, ref.generation, self.record, False, &manager.shared, 0)
        if outcome != LOCKED_OUT:       # otherwise the record stays, and with it the model's place: nobody is held up
            give_record(&manager.shared.grant_pool, self.record - manager.shared.grants, manager.shared.me)

    cdef int change(self, RowRef ref, bint bind) except -1:
        """Count this handle, or count it no more; False if its model has gone."""
        cdef QuotaTable manager = self.manager
        cdef int outcome = change_handle(ref.row, ref.ledger, ref.generation, self.record, bind, &manager.shared, 0)
        while outcome == LOCKED_OUT:
            manager.inside += 1
            with nogil:
                outcome = change_handle(ref.row, ref.ledger, ref.generation, self.record, bind, &manager.shared, SLICE_NS)
            manager.exit()
            if outcome == LOCKED_OUT:
                manager.pause()
        return outcome

    def __init__(self, manager, model_id):
        pass

    def __reduce__(self):
        raise TypeError("a bound model cannot be pickled or copied; call manager.model(model_id)")

    def check(self, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """As `QuotaTable.check_quota`, for this model; UnknownModelError once it has been removed."""
        cdef Ask ask
        start_ask(&ask, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        return self.manager.answer(self.ref, self.model_id, &ask, self)

    def _require_alive(self):
        self.manager.require_open()
        if self.ref.row.generation != self.ref.generation:
            raise UnknownModelError(self.model_id)


cdef cnp.ndarray _int64_copy(object values, str name):
    """A private, contiguous copy: what was validated is what is charged, whoever writes to the original meanwhile."""
    cdef cnp.ndarray array
    if cnp.PyArray_CheckExact(values) and cnp.PyArray_TYPE(values) == cnp.NPY_INT64 \
            and cnp.PyArray_ISNOTSWAPPED(values) and cnp.PyArray_NDIM(values) == 1:
        return cnp.PyArray_NewCopy(values, cnp.NPY_CORDER)
    array = np.asarray(values)
    if (<object> array).size and (<object> array).dtype.kind not in "iu":
        raise TypeError(f"{name} has dtype {(<object> array).dtype}; give int64")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {(<object> array).shape}; give one dimension")
    if isinstance(values, np.ndarray) and np.ma.is_masked(values):
        raise ValueError(f"{name} has masked elements; give only those that are to be decided")
    return np.array(array, np.int64, order="C", copy=True)


cdef cnp.ndarray _tokens(object values, str name, Py_ssize_t count):
    cdef cnp.ndarray array
    cdef const int64_t* first
    cdef Py_ssize_t bad
    if not isinstance(values, np.ndarray) and hasattr(values, "__index__"):
        return np.full(count, as_count(values, name), np.int64)
    array = _int64_copy(values, name)
    _require_length(array, name, count)
    first = <const int64_t*> cnp.PyArray_DATA(array)
    with nogil:
        bad = first_out_of_range(first, count)
    if bad < count:
        raise ValueError(f"{name}[{bad}] is {first[bad]}; give an integer, 0 .. 2**62")
    return array


cdef int _require_length(cnp.ndarray array, str name, Py_ssize_t count) except -1:
    if array.shape[0] != count:
        raise ValueError(f"{name} has {array.shape[0]} elements and rows has {count}; give one each")
    return 0


cdef int _require_target(object array, str name, object dtype, Py_ssize_t count) except -1:
    """That `array` can be filled from C. Asks numpy itself: a subclass may say anything of its dtype, shape and flags."""
    cdef cnp.ndarray target
    if not isinstance(array, np.ndarray) or type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} is {type(array).__name__}; give a {np.dtype(dtype)} array")
    target = array
    actual = np.ndarray.dtype.__get__(target)
    if actual != dtype:
        raise TypeError(f"{name} is {actual}; give a {np.dtype(dtype)} array")
    if cnp.PyArray_NDIM(target) != 1 or cnp.PyArray_DIM(target, 0) != count:
        raise ValueError(f"{name} has shape {array.shape}; give ({count},)")
    if not cnp.PyArray_ISCARRAY(target):
        raise ValueError(f"{name} cannot be filled in place; give a contiguous, writeable array")
    return 0
