"""The memory that processes share: mapped, with a seat taken, its time anchored, and rid of what the dead left behind.

After a fork the child takes a seat of its own; what the parent holds stays the parent's.
"""
cimport cython
import functools
import mmap
import os
import time
import weakref

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.unistd cimport close

from modelquota._core.clock cimport ManualClock, monotonic_ns
from modelquota._core.hold cimport let_go
from modelquota._core.layout cimport (
    CHUNK, CHUNKS, HELDS, Header, Held, LAYOUT_VERSION, Ledger, MAX_TIME_NS, PLACES, Place, Row, SEAT_BITS, SEATS, Shared
)
from modelquota._core.lock cimport is_gone, load_word, swap_word, take_seat, unlock
from modelquota._core.registry cimport NAME_SHARE, NAME_UNIT, enter_registry, leave_registry
from modelquota._core.repair cimport RELAXED, count_atomically, enter_row, fold_places
from modelquota._core.window cimport in_order

from modelquota._core.mapping import boot_id, create_anonymous, fingerprint, open_again, plan
from modelquota._core.packing import dtypes
from modelquota.errors import CapacityError, StateFileError

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>

    static int mq_set_space_aside(int fd, long start, long size) {      /* an errno; 0 also where this is not supported */
        while (size > 0 && fallocate(fd, 0, start, size) != 0)
            if (errno != EINTR)
                return errno == EOPNOTSUPP || errno == ENOSYS ? 0 : errno;
        return 0;
    }
    """
    int set_space_aside "mq_set_space_aside"(int fd, Py_ssize_t start, Py_ssize_t size)

cdef uint64_t MAGIC = 0x31_61_74_6F_75_71_64_6D     # "mdquota1", as it stands in memory
cdef int64_t LONGEST_NAME = 256                     # bytes of the largest name record
cdef int64_t SWEEP_NS = 10_000_000                  # how often a process looks for dead ones while something is held up
cdef int forks = 0                                  # between the first process and this one
FACTS = {"magic": MAGIC, "version": LAYOUT_VERSION, "name_unit": NAME_UNIT}
states = weakref.WeakSet()                          # all of this process


cdef int fork_count() noexcept:
    """Which process this is among those forked from one another: what belongs to another one is left alone."""
    return forks


def _after_fork_in_parent():
    for state in list(states):
        state._has_forked()


def _after_fork():
    global forks
    forks += 1
    for state in list(states):
        state._sit_down_anew()


os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)


def regions_for(max_models):
    """Where the parts of a mapping for so many models are."""
    fixed = (SEATS * sizeof(uint32_t), PLACES * sizeof(Place), CHUNKS * sizeof(uint32_t), HELDS * sizeof(Held))
    return plan(sizeof(Header), fixed, sizeof(Row), sizeof(Ledger), NAME_SHARE, max_models)


@functools.cache
def layout_fingerprint():
    """The fingerprint of this version's layout."""
    layout = dtypes()
    return fingerprint(*(layout[part] for part in ("header", "place", "held", "row", "ledger")))


def new_header(max_models):
    """The first bytes of a new state."""
    cdef Header header
    cdef bytes boot = boot_id()
    memset(&header, 0, sizeof(Header))
    header.magic = MAGIC
    header.version = LAYOUT_VERSION
    header.fingerprint = layout_fingerprint()
    header.max_models = max_models
    header.enforcing = 1
    header.staged_row = header.leaving_row = -1
    memcpy(header.boot_id, <const char*> boot, 16)
    header.anchor_ns = monotonic_ns()
    header.anchor_wall_ns = time.time_ns()
    return (<char*> &header)[:sizeof(Header)]


@cython.no_gc_clear     # the mapping stays until the last grant has been released, whatever the order of collection
cdef class SharedState:
    """One mapping with everything in it, and this process's seat there."""

    def __cinit__(self, *args, **kwargs):
        self.shared.fd = -1
        self.chunks = []

    def __init__(self, *, path, max_models, clock):
        cdef char* memory
        if self.shared.header != NULL:
            raise RuntimeError("a manager is initialised once")
        if clock is not None and not isinstance(clock, ManualClock):
            raise TypeError(f"clock is {clock!r}; give a ManualClock, or None for the monotonic clock")
        self.manual = clock
        if path is None:
            max_models = 65_536 if max_models is None else max_models
            size = regions_for(max_models).size
            descriptor = create_anonymous(size)
            os.pwrite(descriptor, new_header(max_models), 0)
        else:
            from modelquota._core.statefile import open_state

            self.path = os.path.abspath(os.fspath(path))
            descriptor, max_models = open_state(self.path, max_models)
            size = regions_for(max_models).size
        try:
            self.shared.fd = open_again(descriptor)     # mmap keeps the other one open, in forked processes too
            PyObject_GetBuffer(mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED), &self.buffer, PyBUF_WRITABLE)
        finally:
            os.close(descriptor)
        memory = <char*> self.buffer.buf
        self.memory = memory
        regions = regions_for(max_models)
        self.shared.epochs = <uint32_t*> (memory + <Py_ssize_t> regions.epochs)
        self.shared.places = <Place*> (memory + <Py_ssize_t> regions.places)
        self.shared.owners = <uint32_t*> (memory + <Py_ssize_t> regions.owners)
        self.shared.held = <Held*> (memory + <Py_ssize_t> regions.held)
        self.shared.rows = <Row*> (memory + <Py_ssize_t> regions.rows)
        self.shared.ledgers = <Ledger*> (memory + <Py_ssize_t> regions.ledgers)
        self.shared.names = memory + <Py_ssize_t> regions.names
        self.shared.names_size = regions.size - regions.names
        self.shared.header = <Header*> memory
        self.reserve_used()
        self.sit_down()
        states.add(self)
        self.anchor()
        self.sweep()

    def __dealloc__(self):
        cdef int i
        cdef Py_ssize_t chunk
        cdef bint used
        if self.shared.header != NULL:
            for chunk in self.chunks:
                used = False
                for i in range(CHUNK):
                    used |= self.shared.held[chunk * CHUNK + i].seat != 0
                if not used:
                    swap_word(&self.shared.owners[chunk], self.shared.me, 0)
        free(self.free_records)
        if self.shared.fd >= 0:
            close(self.shared.fd)           # the kernel drops the seat's lock; by C, since `os` may have gone before
        if self.buffer.buf != NULL:
            PyBuffer_Release(&self.buffer)

    cdef int require_open(self) except -1:
        if self.shared.header == NULL:
            raise RuntimeError("the manager is not initialised: a subclass must call super().__init__()")
        return 0

    def _arrays(self):
        """The parts of the state as numpy structured arrays over the same memory: header, rows, ledgers.

        For inspection and tests: what is read without a row's lock may be in the middle of a change.
        """
        import numpy as np

        self.require_open()
        layout = dtypes()
        mapping = <object> self.buffer.obj
        n = self.shared.header.max_models
        regions = regions_for(n)
        return (np.frombuffer(mapping, layout["header"], 1, 0), np.frombuffer(mapping, layout["row"], n, regions.rows),
                np.frombuffer(mapping, layout["ledger"], n, regions.ledgers))

    @property
    def max_models(self):
        """How many models the table holds at most."""
        self.require_open()
        return self.shared.header.max_models

    @property
    def clock(self):
        """The `ManualClock` that was given, or None for the monotonic clock."""
        return self.manual

    # -- space

    cdef int reserve_space(self, const void* start, Py_ssize_t size) except -1:
        """Have the file system set space aside for a part of the file: a write to a page for which none is left would
        end the process (SIGBUS)."""
        cdef int error
        if self.path is None:
            return 0
        error = set_space_aside(self.shared.fd, <const char*> start - self.memory, size)
        if error:
            raise StateFileError(self.path, f"no space could be set aside for it: {os.strerror(error)}; what is in it "
                                 "stays in use")
        return 0

    cdef int reserve_used(self) except -1:
        """Set aside what the parts of fixed size and all models so far take. Written as zeros, it may have holes."""
        cdef const Shared* shared = &self.shared
        cdef Header* header = shared.header
        self.reserve_space(header, <char*> shared.held - self.memory)
        self.reserve_space(shared.held, <Py_ssize_t> header.chunks_used * CHUNK * sizeof(Held))
        self.reserve_space(shared.rows, header.row_count * sizeof(Row))
        self.reserve_space(shared.ledgers, header.row_count * sizeof(Ledger))
        self.reserve_space(shared.names, header.names_used)
        return 0

    cdef int reserve_next_model(self) except -1:
        """Set aside what one more model takes, where the registry stands now."""
        cdef const Shared* shared = &self.shared
        cdef int64_t index = shared.header.row_count
        cdef int64_t name = shared.header.names_used
        if self.path is None or index >= shared.header.max_models:
            return 0
        self.reserve_space(&shared.rows[index], sizeof(Row))
        self.reserve_space(&shared.ledgers[index], sizeof(Ledger))
        self.reserve_space(shared.names + name, min(LONGEST_NAME, shared.names_size - name))
        return 0

    # -- the seat

    cdef int sit_down(self) except -1:
        """Take a free seat."""
        cdef uint32_t seat, epoch, used
        # Loss of power may leave a lock in the file and not the epoch of its owner: that word is nobody's again soon.
        cdef uint32_t skipped = 0 if self.path is None else int.from_bytes(os.urandom(2), "little")
        for seat in range(1, SEATS):
            if not take_seat(self.shared.fd, seat):
                continue
            epoch = (self.shared.epochs[seat] + 1 + skipped) & (0xFFFF_FFFF >> SEAT_BITS)
            self.shared.epochs[seat] = epoch
            self.shared.me = epoch << SEAT_BITS | seat
            while True:
                used = load_word(&self.shared.header.seats_used)
                if used >= seat or swap_word(&self.shared.header.seats_used, used, seat):
                    return 0
        raise CapacityError(SEATS - 1, "processes", "end some that share this state")

    def _sit_down_anew(self):
        """In a forked child: let go of the parent's seat and take another."""
        if self.shared.header == NULL:
            return
        inherited = self.shared.fd
        self.shared.fd = open_again(inherited)
        os.close(inherited)
        self.chunks = []
        self.free_count = 0
        self.sit_down()

    def _has_forked(self):
        """In the parent of a new process: it is not alone any more, though the child may not have sat down yet."""
        self.forked = True
        self._pump_all()

    def _pump_all(self):
        """Something has changed for all models."""

    # -- time

    cdef int anchor(self) except -1:
        """Tie the rows' time to this boot's clock, and note where both stand.

        After a reboot the rows' time goes on by what the wall clock says has passed; where that clock has moved back,
        it stands still, and nothing is refilled.
        """
        cdef Header* header = self.shared.header
        cdef const Shared* shared = &self.shared
        cdef bytes boot
        cdef int64_t now_ns, wall_ns, mono_ns, i
        if self.manual is not None:
            return 0
        boot = boot_id()
        wall_ns = time.time_ns()
        mono_ns = monotonic_ns()
        with nogil:
            enter_registry(shared)
        if memcmp(header.boot_id, <const char*> boot, 16) != 0:
            now_ns = header.anchor_ns + max(wall_ns - header.anchor_wall_ns, 0)
            for i in range(header.row_count):
                now_ns = max(now_ns, shared.rows[i].level_ns)
            now_ns = min(now_ns, MAX_TIME_NS)
            header.clock_offset_ns = now_ns - mono_ns
        self.offset_ns = header.clock_offset_ns
        header.anchor_wall_ns = wall_ns
        in_order()
        header.anchor_ns = mono_ns + self.offset_ns
        in_order()
        memcpy(header.boot_id, <const char*> boot, 16)
        leave_registry(shared)
        return 0

    def flush(self):
        """Write the state file to disk, against loss of power; without a file nothing is done.

        Against the death of processes nothing is needed. Without `flush` the kernel writes what has changed within
        some 30 s (``vm.dirty_expire_centisecs``).
        """
        self.require_open()
        if self.path is not None:
            self.anchor()
            (<object> self.buffer.obj).flush()

    # -- records of what is held

    cdef Held* take_record(self) except NULL:
        """A free grant record of this process."""
        cdef uint32_t chunk, used
        cdef int i
        if self.free_count == 0:
            for chunk in range(CHUNKS):
                if load_word(&self.shared.owners[chunk]) == 0 and swap_word(&self.shared.owners[chunk], 0, self.shared.me):
                    break
            else:
                raise CapacityError(HELDS, "open grants", "release some, in whichever process")
            try:
                self.reserve_space(&self.shared.held[<Py_ssize_t> chunk * CHUNK], CHUNK * sizeof(Held))
            except StateFileError:
                swap_word(&self.shared.owners[chunk], self.shared.me, 0)
                raise
            while True:
                used = load_word(&self.shared.header.chunks_used)
                if used > chunk or swap_word(&self.shared.header.chunks_used, used, chunk + 1):
                    break
            grown = <Held**> malloc((len(self.chunks) + 1) * CHUNK * sizeof(void*))
            if grown == NULL:
                raise MemoryError()
            free(self.free_records)
            self.free_records = grown
            self.chunks.append(chunk)
            for i in range(CHUNK):
                self.free_records[i] = &self.shared.held[<Py_ssize_t> chunk * CHUNK + CHUNK - 1 - i]
            self.free_count = CHUNK
        self.free_count -= 1
        return self.free_records[self.free_count]

    cdef int give_record(self, Held* record) except -1:
        self.free_records[self.free_count] = record
        self.free_count += 1
        return 0

    cdef Place* take_place(self) except NULL:
        """A free place for a line of this process."""
        cdef uint32_t i, used
        for i in range(PLACES):
            if load_word(&self.shared.places[i].seat) == 0 and swap_word(&self.shared.places[i].seat, 0, self.shared.me):
                break
        else:
            raise CapacityError(PLACES, "lines of waiting requests", "wait for fewer models in fewer processes")
        while True:
            used = load_word(&self.shared.header.places_used)
            if used > i or swap_word(&self.shared.header.places_used, used, i + 1):
                return &self.shared.places[i]

    # -- the dead

    cdef int sweep(self) except -1:
        """Give back what dead processes held, and take them out of the lines; how much was found."""
        cdef const Shared* shared = &self.shared
        cdef int found
        self.swept_ns = monotonic_ns()
        if not is_anybody_gone(shared):     # with the GIL: busy threads may keep it for 5 ms before they give it back
            return 0
        with nogil:
            found = sweep_chunks(shared) + sweep_places(shared)
        return found

    cdef int sweep_if_due(self) except -1:
        """sweep(), unless this process is alone or looked a moment ago."""
        if self.shared.header.seats_used <= 1 or monotonic_ns() - self.swept_ns < SWEEP_NS:
            return 0
        return self.sweep()


cdef bint is_anybody_gone(const Shared* shared) noexcept nogil:
    """Whether one of those who hold something has died. Asks the kernel once for each who is alive."""
    cdef bint alive[SEATS]
    cdef int64_t i
    memset(alive, 0, sizeof(alive))
    for i in range(shared.header.chunks_used):
        if is_newly_gone(load_word(&shared.owners[i]), alive, shared):
            return True
    for i in range(shared.header.places_used):
        if is_newly_gone(load_word(&shared.places[i].seat), alive, shared):
            return True
    return False


cdef inline bint is_newly_gone(uint32_t owner, bint* alive, const Shared* shared) noexcept nogil:
    """is_gone(), and who is not is remembered by seat. A seat's former owners are told apart without the kernel."""
    cdef uint32_t seat = owner & (SEATS - 1)
    if owner == 0 or (alive[seat] and load_word(&shared.epochs[seat]) == owner >> SEAT_BITS):
        return False
    if is_gone(owner, shared):
        return True
    alive[seat] = True
    return False


cdef int sweep_chunks(const Shared* shared) noexcept nogil:
    cdef uint32_t owner
    cdef int64_t chunk
    cdef uint32_t alive = 0
    cdef int64_t i
    cdef int found = 0
    cdef Held* held
    cdef Row* row
    for chunk in range(shared.header.chunks_used):
        owner = load_word(&shared.owners[chunk])
        if owner == 0 or owner == shared.me or owner == alive:
            continue
        if not is_gone(owner, shared):
            alive = owner
            continue
        for i in range(chunk * CHUNK, chunk * CHUNK + CHUNK):
            held = &shared.held[i]
            if held.seat != owner or held.row >= <uint32_t> shared.header.max_models:
                continue
            row = &shared.rows[held.row]
            enter_row(row, shared)
            if held.seat == owner:
                found += 1
                count_atomically(&shared.header.recoveries, 1, RELAXED)
                if held.generation == row.generation:
                    let_go(row, &shared.ledgers[held.row], held)
                else:
                    held.seat = 0
            unlock(&row.lock)
        swap_word(&shared.owners[chunk], owner, 0)
    return found


cdef int sweep_places(const Shared* shared) noexcept nogil:
    cdef uint32_t i, owner, index
    cdef int found = 0
    cdef Place* place
    cdef Row* row
    for i in range(shared.header.places_used):
        place = &shared.places[i]
        owner = load_word(&place.seat)
        if owner == 0 or owner == shared.me or not is_gone(owner, shared):
            continue
        index = place.row
        if index >= <uint32_t> shared.header.max_models:
            swap_word(&place.seat, owner, 0)
            continue
        row = &shared.rows[index]
        enter_row(row, shared)
        if place.seat == owner:
            place.count = 0
            swap_word(&place.seat, owner, 0)
            found += 1
            count_atomically(&shared.header.recoveries, 1, RELAXED)
            fold_places(row, &shared.ledgers[index], shared)
        unlock(&row.lock)
    return found
