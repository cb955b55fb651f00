"""The map from model ids to rows in this process, and how models are registered, changed and removed.

Critical sections are ``noexcept nogil`` from lock to unlock; code that may raise comes before or after.
"""
cimport cython
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF, Py_XDECREF
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from modelquota._core.atomics cimport load_u32, load_u64
from modelquota._core.layout cimport CHANGES, ColdRow, Limits
from modelquota._core.row.limits cimport limited_windows
from modelquota._core.row.usage cimport Usage
from modelquota._core.state.lock cimport SLICE_NS
from modelquota._core.state.meters cimport MOST_METERS
from modelquota._core.state.packing cimport pack, unpack
from modelquota._core.state.read cimport READ_PATIENCE_NS, read_and_unlock, read_locked
from modelquota._core.state.registry cimport (
    ANY_ROW, DONE, MAX_NAME_BYTES, MeterRows, NAME_UNIT, REGISTRY_BUSY, TABLE_FULL, add_model, link_meter, remove_model,
    replace_limits
)
from modelquota._core.state.repair cimport lock_row, try_row
from modelquota._core.state.state cimport State

from modelquota.errors import CapacityError, QuotaConfigError, UnknownModelError


@cython.final
@cython.no_gc           # nothing that it refers to refers to it
cdef class RowRef:
    """A row, and its generation when it was found."""


@cython.no_gc_clear     # objects finalized in the same cycle may still use it
cdef class Interned:
    """The models of a state, as this process knows them: a dict from an id to its row, and the rows by number."""

    def __cinit__(self, State state not None):
        self.state = state
        self.ids = {}
        self.meters = {}
        self.unlinked = []

    cdef int open(self) except -1:
        """Intern the models that are in the state."""
        self.refs = <PyObject**> calloc(self.state.shared.header.max_models, sizeof(PyObject*))
        if self.refs == NULL:
            raise MemoryError()
        # nothing has been seen: the first refresh reads all rows, whatever a damaged file says of changes
        self.seen_version = load_u64(&self.state.shared.header.registry_version) - CHANGES
        self.refresh()
        return 0

    def __dealloc__(self):
        cdef int64_t index
        if self.refs != NULL:
            for index in range(self.refs_used):
                Py_XDECREF(self.refs[index])
        free(self.refs)

    # -- finding a row

    cdef RowRef find(self, str model_id):
        """The row of a model, or None."""
        cdef RowRef ref
        self.state.require_open()
        ref = self.ids.get(model_id)
        if ref is None or ref.row.generation != ref.generation:
            self.refresh()
            ref = self.ids.get(model_id)
        return ref

    cdef RowRef require(self, object model_id):
        cdef RowRef ref = self.find(plain_id(model_id))
        if ref is None:
            raise UnknownModelError(model_id)
        return ref

    cdef str name_of(self, int64_t index):
        """The name in a row. A mixture of two while it is being replaced: check the generation, or only display it."""
        cdef ColdRow* cold = &self.state.shared.cold_rows[index]
        cdef char* name = self.state.shared.names + <int64_t> cold.name_offset * NAME_UNIT
        return name[:cold.name_size].decode("utf-8", "replace")

    # -- registering and removing

    cdef int refresh(self) except -1:
        """Update `ids` with the models that any process has added or removed since the last refresh.

        The change log lists the rows that changed; if more have changed than it holds, all rows are read.
        """
        cdef uint64_t version = load_u64(&self.state.shared.header.registry_version)
        cdef uint64_t change
        cdef uint32_t index
        if version == self.seen_version:
            return 0 if not self.unlinked else self.link_meters(False)
        if version - self.seen_version <= CHANGES // 2:
            for change in range(self.seen_version, version):
                index = self.state.shared.changes[change % CHANGES]
                if index == ANY_ROW or not self.refresh_row(index):
                    break
            else:
                # what was read has not been overwritten in the meantime
                if load_u64(&self.state.shared.header.registry_version) - self.seen_version <= CHANGES:
                    self.seen_version = version
                    return self.link_meters(False)
        if self.refresh_all():
            self.seen_version = version
        return self.link_meters(False)

    cdef int refresh_all(self) except -1:
        """Refresh all rows; False if one is changing at this moment."""
        cdef int64_t index
        for index in range(self.state.shared.header.row_count):
            if not self.refresh_row(index):
                return False
        return True

    cdef int refresh_row(self, int64_t index) except -1:
        """Update the model of one row; False if it is changing at this moment."""
        cdef uint32_t generation
        cdef RowRef ref = None
        if index >= self.state.shared.header.max_models:
            return True
        generation = load_u32(&self.state.shared.rows[index].generation)
        if self.refs[index] != NULL:
            ref = <RowRef> self.refs[index]
            if ref.generation == generation:
                return True
            self.unintern(ref)
        if generation % 2 == 0:
            return True
        name = self.name_of(index)
        if load_u32(&self.state.shared.rows[index].generation) != generation:
            return False                # the next refresh sees it
        self.intern(name, index, generation)
        return True

    cdef int intern(self, object model_id, int64_t index, uint32_t generation) except -1:
        """Map an id to a row."""
        cdef RowRef ref, other
        if self.refs[index] != NULL:
            ref = <RowRef> self.refs[index]
            if ref.generation == generation:
                return 0
            self.unintern(ref)
        other = self.ids.get(model_id)
        if other is not None:
            if other.row.generation == other.generation:
                return 0                # the name that was read is a mixture of two
            self.unintern(other)
        ref = RowRef.__new__(RowRef)
        ref.model_id = model_id
        ref.row = &self.state.shared.rows[index]
        ref.cold = &self.state.shared.cold_rows[index]
        ref.generation = generation
        self.ids[model_id] = ref
        Py_INCREF(ref)
        self.refs[index] = <PyObject*> ref
        self.refs_used = max(self.refs_used, index + 1)
        if self.meters or "#" in <str> model_id:
            self.join(ref)
        return 0

    cdef int unintern_if_removed(self, RowRef ref) except -1:
        """unintern() if the model has been removed; after a change of its meters there is nothing to do."""
        if ref.row.generation != ref.generation:
            self.unintern(ref)
        return 0

    cdef RowRef ref_at(self, int64_t index, uint32_t generation):
        """The model in a row, if it is still the one of this generation, or None."""
        if self.refs[index] == NULL or (<RowRef> self.refs[index]).generation != generation:
            self.refresh_row(index)
        if self.refs[index] == NULL or (<RowRef> self.refs[index]).generation != generation:
            return None
        return <RowRef> self.refs[index]

    # -- meters

    cdef int join(self, RowRef ref) except -1:
        """Note that a model and its meters may have to be linked: what has just been interned may be either.

        The process that registered it may have died before it linked them.
        """
        cdef str model_id, mark
        cdef RowRef model, meter
        model_id, mark, _ = (<str> ref.model_id).partition("#")
        if mark:
            self.meters.setdefault(model_id, []).append(ref)
            model = self.ids.get(model_id)
            if model is not None:
                self.unlinked.append((model, ref))
        else:
            for meter in self.meters.get(model_id, ()):
                self.unlinked.append((ref, meter))
        return 0

    cdef int link_meters(self, bint wait) except -1:
        """Link what join() has found. Takes the registry's lock and the model's; without `wait` it only tries them."""
        cdef RowRef model, meter
        cdef int outcome
        while self.unlinked:
            model, meter = self.unlinked[0]
            outcome = link_meter(model.row, model.generation, meter.row, meter.generation, &self.state.shared, 0)
            if outcome == REGISTRY_BUSY and not wait:
                break
            if outcome == REGISTRY_BUSY:
                self.state.inside += 1
                with nogil:
                    outcome = link_meter(model.row, model.generation, meter.row, meter.generation, &self.state.shared,
                                         SLICE_NS)
                self.state.exit()
            if outcome == REGISTRY_BUSY:
                self.state.pause()
                continue
            if (model, meter) in self.unlinked:
                self.unlinked.remove((model, meter))
        return 0

    cdef int meters_of(self, str model_id, MeterRows* meters) except -1:
        """The meters of an id that has no row, as this process knows them."""
        cdef RowRef meter
        meters.count = 0
        for meter in self.meters.get(model_id, ())[:MOST_METERS]:
            meters.rows[meters.count] = <uint32_t> (meter.row - self.state.shared.rows)
            meters.generations[meters.count] = meter.generation
            meters.count += 1
        return 0

    cdef int unintern(self, RowRef ref) except -1:
        """Remove a row that the model has left from the map."""
        cdef int64_t index = ref.row - self.state.shared.rows
        if self.ids.get(ref.model_id) is ref:
            del self.ids[ref.model_id]
        siblings = self.meters.get((<str> ref.model_id).partition("#")[0]) if self.meters else None
        if siblings is not None and ref in siblings:
            siblings.remove(ref)
            if not siblings:
                del self.meters[(<str> ref.model_id).partition("#")[0]]
        if self.refs[index] == <PyObject*> ref:
            self.refs[index] = NULL
            Py_XDECREF(<PyObject*> ref)
        return 0

    cdef bint put(self, str model_id, object config, bint on_sight, bint only_new) except -1:
        """Register a model, or replace the limits of a known one and keep its use; False if `only_new` and it is known.

        `on_sight`: this id was not configured explicitly, so it is removed to make room. Takes the registry's and the
        row's locks.
        """
        cdef Limits limits
        cdef RowRef ref
        cdef int64_t index = REGISTRY_BUSY
        cdef int64_t now_ns
        cdef uint64_t version
        cdef uint32_t generation = 0
        cdef bytes name = model_id.encode()
        cdef const char* text = name
        cdef int64_t size = len(name)
        cdef MeterRows meters
        cdef str parent = model_id.partition("#")[0]
        if size > MAX_NAME_BYTES:       # the facade has validated it; a longer one would be cut off in its record
            raise QuotaConfigError("model_id", model_id, f"at most {MAX_NAME_BYTES} bytes")
        self.state.require_open()
        self.pack_limits(config, &limits)
        while True:
            version = load_u64(&self.state.shared.header.registry_version)
            ref = self.find(model_id)
            if ref is not None and ref.row.generation != ref.generation:
                self.unintern(ref)
                continue
            if ref is not None:
                if only_new:
                    return False
                if self.change_limits(ref, &limits, NULL, True) == DONE:
                    return True
                continue
            if version != self.seen_version:
                self.refresh()
                continue
            if len(self.meters.get(parent, ())) >= MOST_METERS and "#" in model_id:
                raise QuotaConfigError("model_id", model_id, f"at most {MOST_METERS} meters of one model")
            self.meters_of(model_id, &meters)
            # if another model is registered first, `version` differs
            self.state.reserve_next_model(limited_windows(&limits))
            now_ns = self.state.now_ns()
            index = add_model(text, size, &limits, on_sight, &meters, now_ns, version, &generation, &self.state.shared,
                              0)
            if index == REGISTRY_BUSY:
                self.state.inside += 1
                with nogil:
                    index = add_model(text, size, &limits, on_sight, &meters, now_ns, version, &generation,
                                      &self.state.shared, SLICE_NS)
                self.state.exit()
            if index == TABLE_FULL:
                raise CapacityError(self.state.shared.header.max_models)
            if index == REGISTRY_BUSY:
                self.state.pause()
            if index >= 0:
                self.state.require_open()
                self.intern(model_id, index, generation)
                if self.seen_version == version:
                    self.seen_version = version + 1     # no other model was added or removed
                self.link_meters(True)
                return True

    cdef int pack_limits(self, object config, Limits* limits) except -1:
        """The limits of a config as a row stores them. The last result is cached, for a shared template."""
        if config is not self.packed_config:
            pack(config, &self.packed)
            self.packed_config = config
        limits[0] = self.packed
        return 0

    cdef int change_limits(self, RowRef ref, const Limits* limits, const Limits* expected, bint named) except -2:
        """replace_limits(), waiting for the locks as long as it takes."""
        cdef int outcome
        cdef int64_t now_ns
        self.state.reserve_rings(ref.row - self.state.shared.rows, 1, limited_windows(limits))
        while True:
            now_ns = self.state.now_ns()
            outcome = replace_limits(ref.row, ref.generation, limits, expected, named, now_ns, &self.state.shared, 0)
            if outcome == REGISTRY_BUSY:
                self.state.inside += 1
                with nogil:
                    outcome = replace_limits(ref.row, ref.generation, limits, expected, named, now_ns,
                                             &self.state.shared, SLICE_NS)
                self.state.exit()
            if outcome == DONE:
                self.state.wake(ref)
            if outcome != REGISTRY_BUSY:
                return outcome
            self.state.pause()

    cdef bint swap(self, object old, object new, bint named) except -1:
        """Replace a model's limits with `new` if they are `old`; False if they are not, or the model has been removed.

        `named`: this id was configured explicitly, so it is not removed to make room. Takes the registry's and the
        row's locks.
        """
        cdef Limits expected, limits
        cdef RowRef ref = self.find(old.model_id)
        pack(new, &limits)
        if ref is None or not self.holds(ref, old, &expected):
            return False
        return self.change_limits(ref, &limits, &expected, named) == DONE

    cdef bint holds(self, RowRef ref, object config, Limits* limits) except -1:
        """Read a model's limits, and whether they are those of a config. Takes the row's lock.

        Compared as configs: callers retry with what get_quota() returns, and limits that read the same must be equal.
        """
        cdef Limits given
        cdef Usage usage
        pack(config, &given)
        return self.read(ref, self.state.now_ns(), &usage, limits) and unpack(&given) == unpack(limits)

    cdef bint remove(self, object model_id, object expected) except -1:
        """Remove a model, if its limits are `expected` (None: any); True if it was. Takes the registry's and the row's
        locks.
        """
        cdef Limits limits
        cdef const Limits* only = NULL
        cdef RowRef ref
        cdef int outcome
        while True:
            ref = self.find(plain_id(model_id))
            if ref is None:
                return False
            if expected is not None:
                if not self.holds(ref, expected, &limits):
                    return False
                only = &limits
            outcome = remove_model(ref.row, ref.generation, only, &self.state.shared, 0)
            if outcome == REGISTRY_BUSY:
                self.state.inside += 1
                with nogil:
                    outcome = remove_model(ref.row, ref.generation, only, &self.state.shared, SLICE_NS)
                self.state.exit()
            if outcome == REGISTRY_BUSY:
                self.state.pause()
                continue
            self.unintern_if_removed(ref)
            self.state.wake(ref)
            return outcome == DONE

    # -- reading

    cdef bint read(self, RowRef ref, int64_t now_ns, Usage* usage, Limits* limits) except -1:
        """Read use, and limits unless `limits` is NULL, under one lock; False if the model has been removed.

        Takes the row's lock. Keeps the GIL unless the lock is taken: a thread that releases the GIL for each of a
        thousand rows waits a thousand times for busy threads to return it. A row that stays locked is read as it is.
        """
        cdef bint alive
        if try_row(ref.row, &self.state.shared):
            return read_and_unlock(ref.row, ref.cold, ref.generation, now_ns, &self.state.shared, usage, limits)
        self.state.inside += 1
        with nogil:
            if lock_row(ref.row, &self.state.shared, READ_PATIENCE_NS):
                alive = read_and_unlock(ref.row, ref.cold, ref.generation, now_ns, &self.state.shared, usage, limits)
            else:
                alive = read_locked(ref.row, ref.generation, now_ns, &self.state.shared, usage, limits)
        self.state.exit()
        return alive
