"""The state: owns the memory, knows which model lives in which row, writes limits and reads use. The cold half of the core.

Nothing here decides. Critical sections are ``noexcept nogil`` from lock to unlock; whatever may raise comes before or after.
"""
cimport cython
import os

import numpy as np
from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.math cimport INFINITY
from libc.stdint cimport int64_t, uint64_t

from modelquota._core.layout cimport (
    DAY, HOUR, LAYOUT_VERSION, MAX_COUNT, SECOND, UNLIMITED, VIOLATION_TYPES, Header, Ledger, Row
)
from modelquota._core.level cimport NO_RATE, empty_burst
from modelquota._core.lock cimport lock, unlock
from modelquota._core.decision cimport pass_time
from modelquota._core.registry cimport NAME_SHARE, NAME_UNIT, enter, leave, replace_limits
from modelquota._core.usage cimport read_limits, read_usage
from modelquota._core.window cimport requests_charged

from modelquota._core.mapping import create_mapping, fingerprint, plan
from modelquota.errors import CapacityError, UnknownModelError
from modelquota.limits import ViolationAction

cdef int forks = 0      # between the first process and this one


def _count_fork():
    global forks
    forks += 1


os.register_at_fork(after_in_child=_count_fork)


cdef int fork_count() noexcept:
    """Which process this is among those forked from one another: what belongs to another one is left alone."""
    return forks


cdef uint64_t MAGIC = 0x31_61_74_6F_75_71_64_6D     # "mdquota1", as it stands in memory
cdef tuple ACTIONS = tuple(ViolationAction)


def dtypes():
    """The numpy dtypes of the layout's parts, derived from the C structs: ``{"header", "row", "ledger", "usage"}``."""
    cdef Header header
    cdef Row row
    cdef Ledger ledger
    cdef Usage usage
    return {
        "header": np.asarray(<Header[:1]> &header).dtype,
        "row": np.asarray(<Row[:1]> &row).dtype,
        "ledger": np.asarray(<Ledger[:1]> &ledger).dtype,
        "usage": np.asarray(<Usage[:1]> &usage).dtype,
    }


def struct_sizes():
    """``sizeof`` of each struct of the layout, to compare the dtypes with."""
    return {"header": sizeof(Header), "row": sizeof(Row), "ledger": sizeof(Ledger), "usage": sizeof(Usage)}


def encode_rate(rate, burst):
    """A rate and its burst as the core counts them: ``(window_limit, drain, shift, cap)``, see ``level.pxd``.

    None, or a rate of the largest count and more, is no limit. A rate of 0 admits nothing, whatever the burst.
    """
    if rate is None or rate >= MAX_COUNT:
        return UNLIMITED, 0, NO_RATE, 0
    if rate == 0:
        return 0, 0, 0, (1 + burst) * 10**9
    numerator, denominator = rate.as_integer_ratio()
    whole = -(-numerator // denominator)
    widest = 125 - 30 - (whole + burst).bit_length()
    shift = min(denominator.bit_length() - 1, widest)
    drain = max(1, (numerator << shift) // denominator)
    cap = ((max(numerator, denominator) + burst * denominator) * 10**9 << shift) // denominator
    return min(whole + burst, MAX_COUNT), drain, shift, cap


cdef inline int64_t _limit(object count) except -1:
    return UNLIMITED if count is None else count


cdef inline object _count(int64_t limit):
    return None if limit == UNLIMITED else limit


cdef int _pack(object config, Limits* limits) except -1:
    """A ResourceQuotaConfig, valid by construction, as the row stores it."""
    limits.max_ram_mb = _limit(config.max_ram_mb)
    limits.max_ssd_mb = _limit(config.max_ssd_mb)
    limits.max_concurrent = _limit(config.max_concurrent_requests)
    limits.max_queued = config.max_queued_requests
    limits.burst_requests = config.burst_requests
    limits.burst_tokens = config.burst_tokens
    rate = config.max_requests_per_second
    limits.requests_per_second = INFINITY if rate is None else rate
    limits.request_limits[SECOND], limits.request_drain, limits.request_shift, cap = (
        encode_rate(rate, config.burst_requests))
    limits.request_cap.low = cap & 0xFFFF_FFFF_FFFF_FFFF
    limits.request_cap.high = cap >> 64
    rate = config.max_tokens_per_second
    limits.tokens_per_second = INFINITY if rate is None else rate
    limits.token_limits[SECOND], limits.token_drain, limits.token_shift, cap = encode_rate(rate, config.burst_tokens)
    limits.token_cap.low = cap & 0xFFFF_FFFF_FFFF_FFFF
    limits.token_cap.high = cap >> 64
    limits.request_limits[HOUR] = _limit(config.max_requests_per_hour)
    limits.request_limits[DAY] = _limit(config.max_requests_per_day)
    limits.token_limits[HOUR] = _limit(config.max_tokens_per_hour)
    limits.token_limits[DAY] = _limit(config.max_tokens_per_day)
    limits.grace_period_sec = config.grace_period_sec
    limits.action = ACTIONS.index(config.on_violation)
    return 0


cdef dict _unpack(const Limits* limits):
    """The keywords of the ResourceQuotaConfig that _pack was given."""
    return {
        "max_ram_mb": _count(limits.max_ram_mb),
        "max_ssd_mb": _count(limits.max_ssd_mb),
        "max_requests_per_second": None if limits.requests_per_second == INFINITY else limits.requests_per_second,
        "max_tokens_per_second": None if limits.tokens_per_second == INFINITY else limits.tokens_per_second,
        "max_tokens_per_hour": _count(limits.token_limits[HOUR]),
        "max_tokens_per_day": _count(limits.token_limits[DAY]),
        "max_requests_per_hour": _count(limits.request_limits[HOUR]),
        "max_requests_per_day": _count(limits.request_limits[DAY]),
        "burst_requests": limits.burst_requests,
        "burst_tokens": limits.burst_tokens,
        "on_violation": ACTIONS[limits.action],
        "grace_period_sec": limits.grace_period_sec,
        "max_concurrent_requests": _count(limits.max_concurrent),
        "max_queued_requests": limits.max_queued,
    }


@cython.final
@cython.no_gc
cdef class RowRef:
    """A row and the generation in which it was found."""


@cython.no_gc_clear     # the mapping stays until the last grant has been released, whatever the order of collection
cdef class QuotaState:
    """One mapping with everything in it, and the dict that interns a model id to its row."""

    def __cinit__(self, *args, **kwargs):
        self.interned = {}
        self.seat = 1

    def __init__(self, *, int64_t max_models, clock):
        if self.header != NULL:
            raise RuntimeError("a manager is initialised once")
        if clock is not None and not isinstance(clock, ManualClock):
            raise TypeError(f"clock is {clock!r}; give a ManualClock, or None for the monotonic clock")
        self.manual = clock
        layout = dtypes()
        regions = plan(sizeof(Header), sizeof(Row), sizeof(Ledger), NAME_SHARE, max_models)
        PyObject_GetBuffer(create_mapping(regions.size), &self.buffer, PyBUF_WRITABLE)
        cdef char* memory = <char*> self.buffer.buf
        cdef Header* header = <Header*> memory
        self.row_array = <Row*> (memory + <Py_ssize_t> regions.rows)
        self.ledger_array = <Ledger*> (memory + <Py_ssize_t> regions.ledgers)
        self.name_bytes = memory + <Py_ssize_t> regions.names
        header.magic = MAGIC
        header.version = LAYOUT_VERSION
        header.fingerprint = fingerprint(layout["header"], layout["row"], layout["ledger"])
        header.max_models = max_models
        header.enforcing = 1
        self.header = header

    def __dealloc__(self):
        if self.buffer.buf != NULL:
            PyBuffer_Release(&self.buffer)

    cdef int require_open(self) except -1:
        if self.header == NULL:
            raise RuntimeError("the manager is not initialised: a subclass must call super().__init__()")
        return 0

    def _arrays(self):
        """The parts of the state as numpy structured arrays over the same memory: header, rows, ledgers.

        For inspection and tests: what is read without a row's lock may be in the middle of a change.
        """
        self.require_open()
        layout = dtypes()
        mapping = <object> self.buffer.obj
        n = self.header.max_models
        regions = plan(sizeof(Header), sizeof(Row), sizeof(Ledger), NAME_SHARE, n)
        return (np.frombuffer(mapping, layout["header"], 1, 0), np.frombuffer(mapping, layout["row"], n, regions.rows),
                np.frombuffer(mapping, layout["ledger"], n, regions.ledgers))

    @property
    def max_models(self):
        """How many models the table holds at most."""
        self.require_open()
        return self.header.max_models

    @property
    def clock(self):
        """The `ManualClock` that was given, or None for the monotonic clock."""
        return self.manual

    @property
    def enforcement_enabled(self):
        """False: every request is admitted, and counted all the same. Holds for all who share the state."""
        self.require_open()
        return self.header.enforcing != 0

    @enforcement_enabled.setter
    def enforcement_enabled(self, value):
        self.require_open()
        self.header.enforcing = 1 if value else 0

    def list_models(self):
        """The ids of all models that have a quota, oldest first."""
        return list(self.interned)

    # -- finding a row

    cdef RowRef find(self, object model_id):
        """The row of a model, or None. TypeError where the id is no str."""
        self.require_open()
        if not isinstance(model_id, str):
            raise TypeError(f"model_id is {model_id!r}; give a str")
        return self.interned.get(model_id)

    cdef RowRef known(self, object model_id):
        cdef RowRef ref = self.find(model_id)
        if ref is None:
            raise UnknownModelError(model_id)
        return ref

    cdef str name_of(self, int64_t index):
        """The name in a row; of one that is just being replaced perhaps a mixture, so for words only."""
        cdef Ledger* ledger = &self.ledger_array[index]
        cdef char* name = self.name_bytes + <int64_t> ledger.name_offset * NAME_UNIT
        return name[:ledger.name_size].decode("utf-8", "replace")

    cdef int freed(self, RowRef ref) except -1:
        """Something has become free: let those who wait in this process try again."""
        if ref.line is not None:
            ref.line.pump()
        return 0

    # -- rows come and go

    cdef int drop(self, object model_id, RowRef ref) except -1:
        """Forget a row that another process has taken from the model."""
        if self.interned.get(model_id) is ref:
            del self.interned[model_id]
        return 0

    def _put(self, config, only_new=False):
        """Register the model, or replace the limits of a known one and keep its use."""
        cdef Limits limits
        cdef RowRef ref, other
        cdef int64_t index, now_ns = self.now_ns()
        cdef bytes name = config.model_id.encode()
        self.require_open()
        _pack(config, &limits)
        while True:
            ref = self.interned.get(config.model_id)
            if ref is None:
                break
            if only_new and ref.row.generation == ref.generation:
                return
            if not only_new and replace_limits(ref.row, ref.ledger, ref.generation, &limits, now_ns, self.seat):
                return
            self.drop(config.model_id, ref)
        ref = RowRef.__new__(RowRef)
        ref.model_id = config.model_id
        index = enter(self.header, self.row_array, self.ledger_array, self.name_bytes, name, len(name), &limits, now_ns,
                      self.seat)
        other = self.interned.get(config.model_id)
        if index < 0 and other is None:
            raise CapacityError(self.header.max_models)
        if index >= 0:
            ref.row = &self.row_array[index]
            ref.ledger = &self.ledger_array[index]
            ref.generation = ref.row.generation
            if other is None:       # no thread can come between this and the look-up above
                self.interned[config.model_id] = ref
                return
            leave(self.header, self.row_array, ref.row, ref.ledger, ref.generation, self.seat)  # another was first
        if not only_new:
            replace_limits(other.row, other.ledger, other.generation, &limits, now_ns, self.seat)

    def _forget(self, model_id):
        """Remove a model; True if it was known."""
        cdef RowRef ref = self.find(model_id)
        if ref is None:
            return False
        del self.interned[model_id]
        leave(self.header, self.row_array, ref.row, ref.ledger, ref.generation, self.seat)
        return True

    # -- reading and stating

    cdef bint read(self, RowRef ref, Usage* usage, Limits* limits) noexcept:
        """Both under one lock; False where the model has been removed."""
        cdef int64_t now_ns = self.now_ns()
        cdef bint alive
        with nogil:
            lock(&ref.row.lock, self.seat)
            alive = ref.row.generation == ref.generation
            if alive:
                read_usage(ref.row, ref.ledger, now_ns, usage)
                read_limits(ref.ledger, limits)
            unlock(&ref.row.lock)
        return alive

    def _read(self, model_id):
        """``(limits, usage)`` as keyword dicts, one consistent view; None for an unknown model."""
        cdef Usage usage
        cdef Limits limits
        cdef RowRef ref = self.find(model_id)
        if ref is None:
            return None
        return (_unpack(&limits), usage) if self.read(ref, &usage, &limits) else None

    def _read_all(self):
        """``(ids, usage array)`` of all models."""
        cdef Usage usage
        cdef Limits limits
        cdef Usage[::1] records
        cdef RowRef ref
        cdef Py_ssize_t i = 0
        refs = list(self.interned.items())
        array = np.zeros(len(refs), dtype=np.asarray(<Usage[:1]> &usage).dtype)
        if not refs:
            return [], array
        records = array
        ids = []
        for model_id, ref in refs:
            if self.read(ref, &records[i], &limits):
                ids.append(model_id)
                i += 1
        return ids, array[:i]

    def _totals(self):
        """Sums over all models, living and removed, and over checks of unknown ones."""
        cdef Header* header = self.header
        cdef Row* row
        cdef Ledger* ledger
        cdef int64_t i
        cdef int kind
        cdef uint64_t allowed, rejected, throttled, queued, waited
        cdef uint64_t violations[VIOLATION_TYPES]
        self.require_open()
        with nogil:
            lock(&header.registry_lock, self.seat)
            allowed = header.retired_allowed + header.unknown_checks
            rejected = header.retired_rejected
            throttled = header.retired_throttled
            queued = header.retired_queued
            waited = header.retired_waited
            for kind in range(VIOLATION_TYPES):
                violations[kind] = header.retired_violations[kind]
            for i in range(header.row_count):
                row = &self.row_array[i]
                ledger = &self.ledger_array[i]
                lock(&row.lock, self.seat)
                allowed += requests_charged(row, ledger)
                rejected += ledger.rejected
                throttled += ledger.throttled
                queued += ledger.queued
                waited += ledger.waited
                for kind in range(VIOLATION_TYPES):
                    violations[kind] += ledger.violations[kind]
                unlock(&row.lock)
            unlock(&header.registry_lock)
        return {"allowed": allowed, "rejected": rejected, "throttled": throttled, "queued": queued, "waited": waited,
                "violations": [violations[kind] for kind in range(VIOLATION_TYPES)]}

    def _state_memory(self, model_id, int64_t ram_mb, int64_t ssd_mb):
        """Record what the model uses now, in MB, and its peaks."""
        cdef RowRef ref = self.known(model_id)
        cdef Row* row = ref.row
        cdef Ledger* ledger = ref.ledger
        cdef bint alive
        with nogil:
            lock(&row.lock, self.seat)
            alive = row.generation == ref.generation
            if alive:
                ledger.ram_mb = ram_mb
                ledger.ssd_mb = ssd_mb
                ledger.peak_ram_mb = max(ledger.peak_ram_mb, ram_mb)
                ledger.peak_ssd_mb = max(ledger.peak_ssd_mb, ssd_mb)
            unlock(&row.lock)
        if not alive:
            raise UnknownModelError(model_id)

    def _empty_burst(self, model_id):
        """Set both levels to at most max(rate, 1)."""
        cdef RowRef ref = self.known(model_id)
        cdef Row* row = ref.row
        cdef int64_t now_ns = self.now_ns()
        cdef bint alive, forgiven
        with nogil:
            lock(&row.lock, self.seat)
            alive = row.generation == ref.generation
            if alive:
                pass_time(row, ref.ledger, now_ns)
                forgiven = empty_burst(&row.request_level, ref.ledger.request_low, row.request_drain, row.request_shift)
                forgiven |= empty_burst(&row.token_level, ref.ledger.token_low, row.token_drain, row.token_shift)
                if forgiven:
                    ref.ledger.level_epoch += 1
            unlock(&row.lock)
        if not alive:
            raise UnknownModelError(model_id)
