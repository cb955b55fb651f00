"""Admission: one decision over one or several models, and the records of what it holds."""
cimport cython
from itertools import islice

from libc.stdint cimport INT64_MAX, int64_t, uint32_t
from libc.stdlib cimport free, malloc

from modelquota._core.atomics cimport add_u64_relaxed
from modelquota._core.layout cimport Charge, Limits, QueueEntry, Shared
from modelquota._core.row.decision cimport Fit, Request, Verdict, charge_admitted
from modelquota._core.row.fullest cimport highest_usage
from modelquota._core.row.grant cimport Holding
from modelquota._core.row.queue cimport drop_expired, first_in_turn
from modelquota._core.row.tokens cimport count_at
from modelquota._core.state.copy cimport ModelCopy, copy_model, start_copy
from modelquota._core.state.joint cimport (
    BUSY_ROW, DECIDED, GONE, JointRequest, MOST_MODELS, NO_MEMBER, Places, add_meters, assess_all, decide_rows,
    first_gone, lock_rows, put_in_order, same_row, unlock_rows
)
from modelquota._core.state.lock cimport SLICE_NS
from modelquota._core.state.pool cimport give_record
from modelquota._core.state.pools cimport Pools
from modelquota._core.table.grant cimport Grant, make_grant
from modelquota._core.table.intern cimport Interned, RowRef, plain_id
from modelquota._core.table.result cimport result_of

from modelquota.errors import CapacityError, QuotaExceededError


cdef inline bint is_counted_here(const JointRequest* joint, const Request* request) noexcept:
    """Whether the model that counted the violation is a member; it may have been removed during the wait."""
    cdef int i
    for i in range(joint.count):
        if joint.members[i].cold == request.counted and joint.members[i].generation == request.counted_generation:
            return True
    return False


@cython.no_gc_clear     # objects finalized in the same cycle may still use it
cdef class Admission:
    """Decides requests for one or several models of one process, and takes the grant records for what it admits."""

    def __cinit__(self, Pools pools not None, Interned interned not None):
        self.state = pools.state
        self.pools = pools
        self.interned = interned

    cdef object check_several(self, object model_ids, const Request* request, bint peek):
        """check_quota for a sequence of ids, or peek_quota for one or more. Takes the rows' locks."""
        cdef JointRequest joint
        cdef Verdict verdict
        cdef list refs = []
        cdef tuple ids = ids_of(model_ids)
        if peek:
            return self.peek_all(ids, request)
        self.decide_all(ids, request, False, MAY_WAIT, refs, &joint, &verdict, NULL)
        return self.told(&joint, &verdict, refs)

    cdef object told(self, const JointRequest* joint, const Verdict* verdict, list refs):
        """The result of a decision. A violation that is to be logged is."""
        result = result_of(verdict, None if joint.violating == NO_MEMBER else (<RowRef> refs[joint.violating]).model_id)
        if verdict.to_log:
            self.events.on_violation(result.model_id, result, verdict.to_log)
        return result

    cdef Grant reserve(self, tuple ids, const Request* request):
        """A grant; raises QuotaExceededError if the request is denied. Takes the rows' locks."""
        cdef JointRequest joint
        cdef Verdict verdict
        cdef list refs = []
        cdef Grant grant
        joint.unclaimed_until_ns = 0
        self.decide_all(ids, request, True, MAY_WAIT, refs, &joint, &verdict, NULL)
        grant = make_grant(self.pools, &joint, refs, request, &verdict) if verdict.allowed else None
        if joint.violating != NO_MEMBER:
            result = self.told(&joint, &verdict, refs)
            if grant is None:
                raise QuotaExceededError(result)
        return grant

    # -- ids without a quota

    cdef int count_unknown(self, int ids) except -1:
        add_u64_relaxed(&self.state.shared.header.unknown_checks, ids)
        return 0

    cdef bint adopt(self, str model_id) except -1:
        """Register an id without a quota from `default_quota`; False if that has no config for it."""
        template = self.events.template_of(model_id)
        if template is None:
            self.events.on_unknown_model(model_id)
            return False
        family = [(f"{model_id}#{name}", config) for name, config in self.events.meters_of(model_id)]
        for _ in range(MOST_ROUNDS):
            for one, config in family:      # before the model, which would admit too much without them
                self.interned.put(one, config, True, True)
            self.interned.put(model_id, template, True, True)
            if not family or all([self.interned.find(one) is not None for one, _ in family]):
                return True
        self.interned.remove(model_id, None)      # registering one evicts another: they do not fit together
        raise CapacityError(self.state.shared.header.max_models)

    cdef RowRef find_or_adopt(self, str model_id):
        """The row of a model, registered on sight if need be, or None. Repeated if it is removed in between: a new row
        starts with no use."""
        cdef RowRef ref = self.interned.find(model_id)
        while ref is None and self.adopt(model_id):
            ref = self.interned.find(model_id)
        return ref

    # -- the decision

    cdef int members_of(self, tuple ids, JointRequest* joint, list refs, list templates) except -1:
        """Look up the models of a request, except ids without a quota. Returns the number of those.

        With `templates`, their configs from `default_quota` are put there, and they are not registered.
        """
        cdef RowRef ref
        cdef int known = 0
        cdef int shared_row = 0
        cdef int rounds = 0
        cdef uint32_t index
        while shared_row != NO_MEMBER:
            refs.clear()
            if templates is not None:
                templates.clear()
            joint.count = 0
            joint.adopted = False
            for model_id in ids:
                ref = self.interned.find(<str> model_id)
                if ref is None and templates is not None:
                    template = self.events.template_of(model_id)
                    if template is not None:
                        templates.append((model_id, template))
                        for name, config in self.events.meters_of(model_id):
                            if self.interned.find(f"{model_id}#{name}") is None:
                                templates.append((f"{model_id}#{name}", config))
                else:
                    while ref is None and self.adopt(<str> model_id):
                        ref = self.interned.find(<str> model_id)
                        joint.adopted = True
                if ref is not None:
                    refs.append(ref)
                    put_member(joint, ref, self.state.shared.rows)
            known = joint.count
            if not self.take_meters(ids, joint, refs):
                continue
            put_in_order(joint)
            shared_row = same_row(joint)
            if shared_row != NO_MEMBER:    # one model left the row and another came during the look-up
                index = joint.members[shared_row].index
                for ref in list(refs):
                    if ref.row == &self.state.shared.rows[index]:
                        self.interned.unintern(ref)
                self.interned.refresh_row(index)
                rounds += 1
                if rounds > MOST_ROUNDS:    # registering one evicts another: they do not fit together
                    raise CapacityError(self.state.shared.header.max_models)
        return len(ids) - known

    cdef bint take_meters(self, tuple ids, JointRequest* joint, list refs) except -1:
        """Add the meters of the members, and those of ids that have meters and no quota; False if they are changing."""
        cdef int i, known = joint.count
        cdef Interned interned = self.interned
        cdef RowRef ref
        if not interned.meters:
            interned.refresh()      # another process may have registered the first one
        if not add_meters(joint, known, &self.state.shared):
            raise too_many(ids)
        for i in range(known, joint.count):
            ref = interned.ref_at(joint.members[i].index, joint.members[i].generation)
            if ref is None:
                self.state.pause()
                interned.refresh()
                return False
            refs.append(ref)
        if known < len(ids) and interned.meters:
            members = [(<RowRef> refs[i]).model_id for i in range(known)]
            for model_id in ids:
                if model_id in members:
                    continue
                if model_id in interned.ids:    # registered since it was looked up
                    return False
                for ref in interned.meters.get(model_id, ()):
                    if joint.count == MOST_MODELS:
                        raise too_many(ids)
                    if ref not in refs:
                        refs.append(ref)
                        put_member(joint, ref, self.state.shared.rows)
        return True

    cdef int decide_all(self, tuple ids, const Request* request, bint holding, int64_t patience_ns, list refs,
                        JointRequest* joint, Verdict* verdict, const Places* places) except -3:
        """One decision over all models. The number of ids without a quota, or BUSY if a row stays locked.

        Waits for a lock up to `patience_ns`, or with MAY_WAIT as long as it takes. `places` are the request's queue
        entries, or NULL. Takes the rows' locks.
        """
        cdef int unknown, outcome = BUSY_ROW
        cdef int rounds = 0
        cdef int64_t now_ns
        cdef const Shared* shared = &self.state.shared
        while True:
            now_ns = self.state.now_ns()
            if now_ns >= self.state.shared.fine_until_ns:
                self.state.look(now_ns)
            unknown = self.members_of(ids, joint, refs, None)
            if places != NULL:
                find_places(joint, places)
            if holding:
                self.state.verify_seat_if_due()
                self.take_records(joint)
            outcome = decide_rows(joint, now_ns, request, holding, shared, 0, verdict)
            if outcome == BUSY_ROW and patience_ns != 0:
                self.state.inside += 1
                with nogil:
                    outcome = decide_rows(joint, now_ns, request, holding, shared,
                                          SLICE_NS if patience_ns < 0 else patience_ns, verdict)
                self.state.exit()
            if outcome == DECIDED:
                break
            self.give_records(joint)
            if outcome == GONE:
                self.interned.unintern_if_removed(<RowRef> refs[joint.gone])
                rounds += joint.adopted
                if rounds > MOST_ROUNDS:    # registering one evicts another: they do not fit together
                    raise CapacityError(shared.header.max_models)
            elif patience_ns == MAY_WAIT:
                self.state.pause()
            else:
                return BUSY
        if not verdict.allowed:
            self.give_records(joint)
            if verdict.worth_a_look:
                self.pools.reclaim_if_due()
        elif unknown:
            self.count_unknown(unknown)
        if verdict.allowed and request.counted != NULL and not is_counted_here(joint, request):
            add_u64_relaxed(&self.state.shared.header.retired_waited, 1)
        return unknown

    cdef int take_records(self, JointRequest* joint) except -1:
        """Take a free grant record for each member."""
        cdef int i
        try:
            for i in range(joint.count):
                joint.members[i].record = self.pools.take_grant_record()
        except BaseException:
            self.give_records(joint)
            raise
        return 0

    cdef int give_records(self, JointRequest* joint) except -1:
        cdef int i
        for i in range(joint.count):
            if joint.members[i].record != NULL:
                give_record(&self.state.shared.grant_pool, joint.members[i].record - self.state.shared.grants,
                            self.state.shared.me)
                joint.members[i].record = NULL
        return 0

    cdef object peek_all(self, tuple ids, const Request* request):
        """peek_quota: the decision on private copies of the rows. Takes the rows' locks to copy them."""
        cdef JointRequest joint
        cdef Verdict verdict
        cdef list refs = []
        cdef list templates = []
        cdef int outcome = BUSY_ROW
        cdef int64_t now_ns = 0
        cdef Limits limits
        cdef ModelCopy* copies = <ModelCopy*> malloc(MOST_MODELS * sizeof(ModelCopy))
        cdef QueueEntry heads[MOST_MODELS]
        cdef int i
        cdef list names, places
        if copies == NULL:
            raise MemoryError()
        try:
            while outcome != DECIDED:
                now_ns = self.state.now_ns()
                if now_ns >= self.state.shared.fine_until_ns:
                    self.state.look(now_ns)
                self.members_of(ids, &joint, refs, templates)
                outcome = copy_rows(&joint, now_ns, copies, heads, &self.state.shared, 0)
                if outcome == BUSY_ROW:
                    self.state.inside += 1
                    with nogil:
                        outcome = copy_rows(&joint, now_ns, copies, heads, &self.state.shared, SLICE_NS)
                    self.state.exit()
                if outcome == GONE:
                    self.interned.unintern_if_removed(<RowRef> refs[joint.gone])
                elif outcome == BUSY_ROW:
                    self.state.pause()
            names = [(<RowRef> ref).model_id for ref in refs]
            for model_id, template in templates:        # as if the id were registered now
                if model_id in names:
                    continue
                if len(names) == MOST_MODELS:
                    raise too_many(ids)
                self.interned.pack_limits(template, &limits)
                start_copy(&copies[len(names)], &limits, now_ns, &self.state.shared.header.lease)
                names.append(model_id)
            places = in_order_of_decision(ids, names)
            joint.count = len(places)
            for i in range(joint.count):
                joint.members[i].row = &copies[<int> places[i]].row
                joint.members[i].cold = &copies[<int> places[i]].cold
                joint.members[i].entry = NULL
            peek(&joint, now_ns, request, self.state.shared.header.enforcing, heads, &verdict)
        finally:
            free(copies)
        return result_of(&verdict, None if joint.violating == NO_MEMBER else names[places[joint.violating]])


cdef object too_many(tuple ids):
    return ValueError(f"model_id names {len(ids)} ids, and with their meters more than {MOST_MODELS} decide; "
                      "give fewer")


cdef list in_order_of_decision(tuple ids, list names):
    """Indices of `names`, models and meters, in the order of a decision: the ids, then their meters, those of ids
    without a quota last."""
    known = [model_id for model_id in ids if model_id in names]
    places = [names.index(model_id) for model_id in known]
    for model_id in known + [model_id for model_id in ids if model_id not in names]:
        places += [i for i, name in enumerate(names) if name not in ids and name.partition("#")[0] == model_id]
    return places


cdef tuple ids_of(object model_id):
    """The ids of a request as exact strs, in a private tuple: a caller's list may change while it is read."""
    cdef tuple ids
    cdef Py_ssize_t i, k, count
    cdef str one
    if isinstance(model_id, str):
        return (plain_id(model_id),)
    if type(model_id) is tuple:
        ids = <tuple> model_id
    else:
        if type(model_id) is not list:
            from collections.abc import Sequence

            if not isinstance(model_id, Sequence) or isinstance(model_id, (bytes, bytearray, memoryview)):
                raise TypeError(f"model_id is {model_id!r}; give a str, or a sequence of them")
        ids = tuple(islice(model_id, MOST_MODELS + 1))
    count = len(ids)
    if not 1 <= count <= MOST_MODELS:
        raise ValueError(f"model_id names {len(model_id)} models; give 1 to {MOST_MODELS}")
    for i in range(count):
        if type(ids[i]) is not str:
            ids = tuple([plain_id(each) for each in ids])
            break
    for i in range(1, count):
        one = <str> ids[i]
        for k in range(i):
            if one == <str> ids[k]:
                raise ValueError(f"model_id names {one!r} twice; give each model once")
    return ids


cdef inline void find_places(JointRequest* joint, const Places* places) noexcept nogil:
    """Set the queue entry of each member that has one."""
    cdef int i, k
    for i in range(joint.count):
        for k in range(places.count):
            if places.entries[k].row == joint.members[i].index and \
                    places.entries[k].generation == joint.members[i].generation:
                joint.members[i].entry = places.entries[k]


cdef int copy_rows(
    JointRequest* joint, int64_t now_ns, ModelCopy* copies, QueueEntry* heads, const Shared* shared, int64_t patience_ns
) noexcept nogil:
    """Copy the models and the first entry of each queue, all at one moment. Takes the rows' locks."""
    cdef int i
    cdef Holding* member
    cdef const QueueEntry* head
    if not lock_rows(joint, shared, patience_ns):
        return BUSY_ROW
    joint.gone = first_gone(joint)
    for i in range(joint.count if joint.gone == NO_MEMBER else 0):
        member = &joint.members[i]
        drop_expired(member.row, member.cold, shared.entries, now_ns, False)
        copy_model(&copies[i], member.index, shared)
        head = first_in_turn(member.cold, shared.entries)
        copies[i].cold.first_entry = 0
        if head != NULL:
            heads[i] = head[0]
            heads[i].deadline_ns = INT64_MAX
            copies[i].cold.first_entry = i + 1
    unlock_rows(joint, joint.count)
    return DECIDED if joint.gone == NO_MEMBER else GONE


cdef void peek(
    JointRequest* joint, int64_t now_ns, const Request* request, bint enforcing, QueueEntry* heads, Verdict* verdict
) noexcept nogil:
    """decide_jointly() on copies, which need no lock."""
    cdef Fit fits[MOST_MODELS]
    cdef Charge charged
    cdef Request there = request[0]
    cdef int i
    cdef Holding* member
    joint.violating = assess_all(joint, now_ns, request, enforcing, heads, fits, verdict)
    verdict.to_log = 0
    if not verdict.allowed:
        return
    verdict.usage = 0.0
    for i in range(joint.count):
        member = &joint.members[i]
        there.tokens = count_at(member.cold, &request.kinds)
        charge_admitted(member.row, member.cold, &there, &fits[i], &charged)
        verdict.usage = max(verdict.usage, highest_usage(member.row, member.cold, request.ram_mb, request.ssd_mb))
