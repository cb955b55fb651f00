"""Reservations: one decision over one or several models, whose outcome is held."""
from libc.stdint cimport int64_t, uint32_t

from modelquota._core.count cimport as_count
from modelquota._core.decision cimport Ask, Verdict, highest_usage
from modelquota._core.grant cimport Grant, SETTLED, make_grant
from modelquota._core.hold cimport Hold, take_hold
from modelquota._core.joint cimport (
    Joint, MOST_MODELS, NOBODY, decide_jointly, first_gone, free_dead_rows, lock_rows, put_in_order, try_lock_rows,
    unlock_rows
)
from modelquota._core.layout cimport Shared
from modelquota._core.repair cimport RELAXED, count_atomically
from modelquota._core.result cimport result_of
from modelquota._core.state cimport RowRef
from modelquota._core.table cimport QuotaTable, start_ask

from modelquota.errors import CapacityError, QuotaExceededError, StateFileError


cdef inline bint is_counted_here(const Joint* joint, const Ask* ask) noexcept:
    """Whether the model where the violation was counted takes part; it may have been removed during the wait."""
    cdef int i
    for i in range(joint.count):
        if joint.parties[i].ledger == ask.counted and joint.parties[i].generation == ask.counted_generation:
            return True
    return False


cdef class GrantTable(QuotaTable):
    """Reservations, and decisions over several models at once."""

    def reserve(self, model_id, estimated_tokens, ram_needed_mb=0, ssd_needed_mb=0):
        """Check, and hold the outcome: memory, one unit of concurrency, and tokens that can be settled later.

        Parameters
        ----------
        model_id : str or sequence of str
            One model, or up to 16 that must all admit, such as ``("acme", "acme/bob", "llama-70b")``: one decision,
            all or nothing. An id without a quota admits and holds nothing.
        estimated_tokens : int
            Tokens, 0 .. 2**62.
        ram_needed_mb, ssd_needed_mb : int
            MB (2**20 bytes), 0 .. 2**62, held beside the reported use until the grant is released.

        Returns
        -------
        Grant

        Raises
        ------
        QuotaExceededError
            Denied; ``.result`` is the `QuotaCheckResult`. Nothing has been charged.
        TypeError, ValueError
            A count that is no integer or out of range, or ids that are none; nothing has been charged.
        """
        cdef Ask ask
        cdef Joint joint
        cdef Verdict verdict
        cdef list refs = []
        cdef int named
        cdef Grant grant
        start_ask(&ask, estimated_tokens, ram_needed_mb, ssd_needed_mb)
        named = self.decide_all(model_id, &ask, True, False, refs, &joint, &verdict)
        grant = make_grant(self, &joint, refs, &ask) if verdict.allowed else None
        if named != NOBODY:
            result = result_of(&verdict, (<RowRef> refs[named]).model_id)
            if verdict.log_held:
                self._log_violation(result.model_id, result, verdict.log_held)
            if grant is None:
                raise QuotaExceededError(result)
        return grant

    def settle_many(self, grants, actual_tokens):
        """Settle many grants at once, such as those that one step of continuous batching completed.

        Parameters
        ----------
        grants : sequence of Grant
            Open ones.
        actual_tokens : sequence of int or int64 array, of the same length
            Tokens of each, 0 .. 2**62.

        Raises
        ------
        TypeError, ValueError, GrantClosedError
            As `Grant.settle`; everything is validated before anything is settled.
        """
        cdef Grant grant
        cdef list open_grants = list(grants)
        cdef list counts = actual_tokens.tolist() if hasattr(actual_tokens, "tolist") else list(actual_tokens)
        cdef Py_ssize_t i
        if len(open_grants) != len(counts):
            raise ValueError(f"actual_tokens has {len(counts)} elements and grants has {len(open_grants)}; give one each")
        for i in range(len(counts)):
            if type(open_grants[i]) is not Grant:
                raise TypeError(f"grants[{i}] is {open_grants[i]!r}; give a Grant")
            counts[i] = as_count(counts[i], f"actual_tokens[{i}]")
            grant = open_grants[i]
            if not (grant.stage == SETTLED and grant.used == counts[i]):
                grant.require_open("settle")
        if len(set(map(id, open_grants))) != len(open_grants):
            raise ValueError("grants has one grant twice; give each once")
        for i in range(len(counts)):
            (<Grant> open_grants[i]).settle(counts[i])

    cdef object check_several(self, object model_ids, const Ask* ask):
        cdef Joint joint
        cdef Verdict verdict
        cdef list refs = []
        cdef int named = self.decide_all(model_ids, ask, False, False, refs, &joint, &verdict)
        result = result_of(&verdict, None if named == NOBODY else (<RowRef> refs[named]).model_id)
        if verdict.log_held:
            self._log_violation(result.model_id, result, verdict.log_held)
        return result

    cdef int parties_of(self, object model_ids, Joint* joint, list refs) except -1:
        """Look up the models of a request; ids without a quota are left out. Returns how many those are."""
        cdef RowRef ref
        cdef Hold* party
        refs.clear()
        joint.count = 0
        if isinstance(model_ids, str):
            model_ids = (model_ids,)
        elif not isinstance(model_ids, (tuple, list)):
            raise TypeError(f"model_id is {model_ids!r}; give a str, or a tuple or list of them")
        elif not 1 <= len(model_ids) <= MOST_MODELS:
            raise ValueError(f"model_id names {len(model_ids)} models; give 1 to {MOST_MODELS}")
        for model_id in model_ids:
            ref = self.find(model_id)
            if ref is None and self._adopt(model_id):
                ref = self.known(model_id)
            if ref is None:
                continue
            for other in refs:
                if other is ref:
                    raise ValueError(f"model_id names {model_id!r} twice; give each model once")
            refs.append(ref)
            party = &joint.parties[joint.count]
            party.row = ref.row
            party.ledger = ref.ledger
            party.generation = ref.generation
            party.index = <uint32_t> (ref.row - self.shared.rows)
            party.record = NULL
            joint.count += 1
        put_in_order(joint)
        return len(model_ids) - joint.count

    cdef int decide_all(self, object model_ids, const Ask* ask, bint holding, bint nowait, list refs, Joint* joint,
                        Verdict* verdict) except -3:
        """One decision over all models. The index of the named one, or NOBODY; BUSY with `nowait` where a row is locked."""
        cdef int named = NOBODY
        cdef int unknown, gone, i
        cdef int64_t now_ns
        cdef const Shared* shared = &self.shared
        verdict.usage = 0.0         # of models of which none has a quota
        while True:
            unknown = self.parties_of(model_ids, joint, refs)
            if holding:
                self.take_records(joint)
            now_ns = self.now_ns()
            if not try_lock_rows(joint, shared):
                if nowait:
                    free_dead_rows(joint, shared)
                    self.give_records(joint)
                    return BUSY
                with nogil:
                    lock_rows(joint, shared)
            gone = first_gone(joint)
            if gone == NOBODY:
                named = decide_jointly(joint, now_ns, ask, self.shared.header.enforcing, verdict)
                if verdict.allowed:
                    for i in range(joint.count):
                        if holding:
                            take_hold(&joint.parties[i], ask, shared.me)
                        else:
                            verdict.usage = max(verdict.usage if i else 0.0,
                                                highest_usage(joint.parties[i].row, joint.parties[i].ledger, ask))
            unlock_rows(joint, joint.count)
            if gone != NOBODY or not verdict.allowed:
                self.give_records(joint)
            if gone == NOBODY:
                if not verdict.allowed and verdict.held_up:
                    self.look_for_dead()
                if unknown and verdict.allowed:
                    self.count_unknown(unknown)
                if verdict.allowed and ask.counted != NULL and not is_counted_here(joint, ask):
                    count_atomically(&self.shared.header.retired_waited, 1, RELAXED)
                return named
            self.drop((<RowRef> refs[gone]).model_id, refs[gone])

    cdef int take_records(self, Joint* joint) except -1:
        """A free record for each party."""
        cdef int i
        try:
            for i in range(joint.count):
                joint.parties[i].record = self.take_record()
        except (CapacityError, StateFileError):
            self.give_records(joint)
            raise
        return 0

    cdef int give_records(self, Joint* joint) except -1:
        cdef int i
        for i in range(joint.count):
            if joint.parties[i].record != NULL:
                self.give_record(joint.parties[i].record)
                joint.parties[i].record = NULL
        return 0
