"""The state: the memory that processes share, this process's seat in it, and the clock of its rows.

After a fork the child takes a seat of its own; what the parent holds stays the parent's. A child that cannot have one
refuses every verb: it never uses its parent's seat.
"""
cimport cython
import functools
import os
import time

from cpython.buffer cimport PyBuffer_FillInfo
from cpython.exc cimport PyErr_CheckSignals
from cpython.object cimport PyObject
from libc.errno cimport errno
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_FIXED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MS_SYNC, PROT_READ, PROT_WRITE, mmap,
    msync, munmap
)
from posix.time cimport CLOCK_MONOTONIC
from posix.unistd cimport close

from modelquota._core.atomics cimport compiler_barrier, load_u32, load_u64, store_i64, store_u64, swap_u32
from modelquota._core.layout cimport (
    ALWAYS_COUNTED, CHANGES, CHUNK, CHUNKS, CLUSTER_CONCURRENCY, COMPONENTS, ColdRow, GrantRecord, Header, IN_DOLLARS,
    LAYOUT_VERSION, MAX_COUNT, MAX_TIME_NS, NODE_BYTES, OPEN_GRANTS, Pool, QueueEntry, RECORDS, Row, SEATS, SLOTS, Seat,
    Share, Shared, TRAIL, UNLIMITED, WINDOWS
)
from modelquota._core.row.decision cimport QUEUE
from modelquota._core.row.level cimport COARSE_BITS, LEVEL_BITS, NO_RATE, WIDEST_SHIFT
from modelquota._core.row.share cimport ALLOW, DENY, EQUAL_PARTS, FINE_BITS, KEEP, LIVE, NO_SHARES, RULE_BITS
from modelquota._core.row.window cimport COUNT_BITS, IDLE, NEVER, ROLLED, ROLLING, THREE_SLOTS_NS
from modelquota._core.state.clock cimport CLOCK_BOOTTIME, ManualClock, Watcher, monotonic_ns, read_clock
from modelquota._core.state.lease cimport file_of_lease, follow_lease_now, has_other_lease
from modelquota._core.state.lock cimport (
    NO_LOCK, READ_LOCK, SLICE_NS, WRITE_LOCK, claim_seat, clear_seat, has_seat, hold_by_lock, holds_seat, is_file,
    has_other_process, is_left, lock_seat, own_bits
)
from modelquota._core.state.pool cimport end_pool, record_at, start_pool
from modelquota._core.state.registry cimport (
    BOOTTIME, MANUAL, MONOTONIC, NAME_SHARE, NAME_UNIT, lock_registry, next_free_row, ring_size, unlock_registry
)
from modelquota._core.state.sweep cimport release_grants
from modelquota._core.state.unclaimed cimport LAPSED

from modelquota._core.state.mapping import (
    boot_id, clock_shift_ns, create_anonymous, digest, fingerprint, open_again, plan, process_space
)
from modelquota._core.state.packing import PARTS, dtypes, ring_dtypes
from modelquota.errors import CapacityError, ManagerClosedError, StateFileError

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>

    static int mq_set_space_aside(int fd, long start, long size) {      /* an errno, or 0; 0 if this is not supported */
        while (size > 0 && fallocate(fd, 0, start, size) != 0)
            if (errno != EINTR)
                return errno == EOPNOTSUPP || errno == ENOSYS ? 0 : errno;
        return 0;
    }
    """
    int set_space_aside "mq_set_space_aside"(int fd, Py_ssize_t start, Py_ssize_t size)

cdef uint64_t MAGIC = 0x31_61_74_6F_75_71_64_6D     # the bytes "mdquota1"
cdef int64_t LONGEST_NAME = 256                     # bytes of the largest name record
cdef int64_t LOOK_NS = 1_000_000_000                # the interval between two checks of the file
# the shortest interval between two checks of the seat before a grant
cdef int64_t VERIFY_NS = 1_000_000
cdef int forks = 0                                  # the number of forks between the first process and this one
cdef PyObject* newest = NULL                        # the states of this process, linked by `older`; guarded by the GIL
CONSTANTS = {       # of the layout, for Python code that reads the bytes of a state
    "magic": MAGIC,
    "version": LAYOUT_VERSION,
    "name_unit": NAME_UNIT,
    "longest_name": LONGEST_NAME,
    "max_count": MAX_COUNT,
    "max_time_ns": MAX_TIME_NS,
    "unlimited": UNLIMITED,
    "never": NEVER,
    "seats": SEATS,
    "chunk": CHUNK,
    "chunks": CHUNKS,
    "records": RECORDS,
    "slots": SLOTS,
    "three_slots_ns": THREE_SLOTS_NS,
    "no_rate": NO_RATE,
    "widest_shift": WIDEST_SHIFT,
    "level_bits": LEVEL_BITS,
    "coarse_bits": COARSE_BITS,
    "idle": IDLE,
    "rolling": ROLLING,
    "last_stage": ROLLED + 2 * ((TRAIL + 1) * WINDOWS - 1),
    "trail": TRAIL,
    "count_bits": COUNT_BITS,
    "last_action": QUEUE,
    "last_clock_kind": BOOTTIME,
    "boottime": BOOTTIME,
    "components": COMPONENTS,
    "open_grants": OPEN_GRANTS,
    "cluster_concurrency": CLUSTER_CONCURRENCY,
    "flags": IN_DOLLARS | CLUSTER_CONCURRENCY,
    "node_bytes": NODE_BYTES,
    "rule_bits": RULE_BITS,
    "fine_bits": FINE_BITS,
    "no_shares": NO_SHARES,
    "deny": DENY,
    "equal_parts": EQUAL_PARTS,
    "allow": ALLOW,
    "live": LIVE,
    "keep": KEEP,
    "lapsed": LAPSED,
}

cdef enum:  # the outcome of anchor_time()
    ANCHORED = 0
    BUSY = 1
    OTHER_CLOCK = 2


cdef int fork_count() noexcept:
    """Identifies this process among those forked from one another; objects of another one are not used."""
    return forks


cdef list all_states():
    """The states of this process."""
    cdef list states = []
    cdef PyObject* state = newest
    while state != NULL:
        states.append(<State> state)
        state = (<State> state).older
    return states


def _after_fork_in_parent():
    for state in all_states():
        state._has_forked()


def _after_fork():
    """In a forked child: give up the parent's seat, then take one.

    The first part runs no Python code, which a signal could interrupt.
    """
    global forks
    cdef PyObject* state = newest
    cdef State one
    forks += 1
    while state != NULL:
        (<State> state).leave_parent()
        state = (<State> state).older
    interrupt = None
    for one in all_states():
        try:
            one.retake_seat()
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


os.register_at_fork(after_in_parent=_after_fork_in_parent, after_in_child=_after_fork)


def regions_for(max_models):
    """The offsets of the parts of a mapping for this number of models."""
    fixed = (SEATS * sizeof(Seat), CHANGES * sizeof(uint32_t), CHUNKS * sizeof(uint32_t), RECORDS * sizeof(QueueEntry),
             CHUNKS * sizeof(uint32_t), RECORDS * sizeof(GrantRecord))
    each = (sizeof(Row), sizeof(ColdRow), *(ring_size(window) for window in range(WINDOWS)), sizeof(Share))
    return plan(sizeof(Header) + sizeof(uint64_t), fixed, each, NAME_SHARE, max_models)


@functools.cache
def layout_fingerprint():
    """The fingerprint of this version's layout."""
    layout = dtypes()
    return fingerprint(*[layout[part] for part in PARTS])


def new_header(max_models):
    """The header of a new state, as bytes."""
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
    header.anchor_ns = monotonic_ns() - <int64_t> clock_shift_ns()
    header.anchor_wall_ns = time.time_ns()
    return (<char*> &header)[:sizeof(Header)]


cdef class Mapping:
    """Memory that is mapped from a file. It stays at its address as long as this object exists."""

    def __cinit__(self, int descriptor, Py_ssize_t size):
        cdef void* memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, descriptor, 0)
        if memory == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        self.memory = <char*> memory
        self.size = size

    def __getbuffer__(self, Py_buffer* view, int flags):
        PyBuffer_FillInfo(view, self, self.memory, self.size, 0, flags)

    cdef int forget(self) except -1:
        """Replace the file by zeros. A row of zeros has no model, so old references are harmless."""
        if mmap(self.memory, self.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE,
                -1, 0) == MAP_FAILED:
            raise OSError(errno, os.strerror(errno))
        return 0

    def __dealloc__(self):
        if self.memory != NULL:
            munmap(self.memory, self.size)


@cython.no_gc_clear     # the mapping stays until the last grant has been released, whatever the order of collection
cdef class State:
    """One mapping, and this process's seat in it."""

    def __cinit__(self):
        self.shared.fd = self.shared.spare_fd = -1
        self.shared.fine_until_ns = REFUSES
        self.shared.clock = CLOCK_MONOTONIC

    cdef int open(self, object path, object max_models, object clock, object trust_file) except -1:
        """Open the state at a path, or a new one in memory, and take a seat. May be called once."""
        if self.shared.header != NULL:
            raise RuntimeError("a manager is initialized once")
        if clock is not None and not isinstance(clock, ManualClock):
            raise TypeError(f"clock is {clock!r}; give a ManualClock, or None for the monotonic clock")
        self.manual = clock
        if clock is not None:
            self.shared.manual_ns = &self.manual.time_ns
        if path is None:
            max_models = 65_536 if max_models is None else max_models
            self.shared.spare_fd = create_anonymous(regions_for(max_models).size)
            os.pwrite(self.shared.spare_fd, new_header(max_models), 0)
        else:
            from modelquota._core.state.file import open_state

            self.path = os.path.abspath(os.fspath(path))
            self.shared.spare_fd, max_models = open_state(self.path, max_models, trust_file)
        self.shared.fd = open_again(self.shared.spare_fd, self.path)
        found = os.fstat(self.shared.spare_fd)
        self.shared.device = found.st_dev
        self.shared.inode = found.st_ino
        self.shared.file = digest(f"{found.st_dev} {found.st_ino}".encode())
        self._map(max_models)
        self._require_clock()
        self.reserve_used()
        self.take_seat()
        self._register()
        self.anchor()
        return 0

    def _map(self, max_models):
        """Map the file, and set the addresses of its parts."""
        cdef Shared* shared = &self.shared
        regions = regions_for(max_models)
        self.mapping = Mapping(shared.spare_fd, regions.size)
        cdef char* memory = self.mapping.memory
        shared.seats = <Seat*> (memory + <Py_ssize_t> regions.seats)
        shared.changes = <uint32_t*> (memory + <Py_ssize_t> regions.changes)
        shared.entries = <QueueEntry*> (memory + <Py_ssize_t> regions.entries)
        shared.grants = <GrantRecord*> (memory + <Py_ssize_t> regions.grants)
        shared.rows = <Row*> (memory + <Py_ssize_t> regions.rows)
        shared.cold_rows = <ColdRow*> (memory + <Py_ssize_t> regions.cold_rows)
        for window, offset in enumerate(regions.rings):
            shared.rings[<int> window] = memory + <Py_ssize_t> offset
        shared.shares = <Share*> (memory + <Py_ssize_t> regions.shares)
        shared.names = memory + <Py_ssize_t> regions.names
        shared.names_size = regions.size - regions.names
        shared.header = <Header*> memory
        shared.entry_pool.owners = <uint32_t*> (memory + <Py_ssize_t> regions.entry_owners)
        shared.entry_pool.chunks_used = &shared.header.entry_chunks_used
        shared.entry_pool.records = <char*> shared.entries
        shared.entry_pool.record_size = sizeof(QueueEntry)
        shared.grant_pool.owners = <uint32_t*> (memory + <Py_ssize_t> regions.grant_owners)
        shared.grant_pool.chunks_used = &shared.header.grant_chunks_used
        shared.grant_pool.records = <char*> shared.grants
        shared.grant_pool.record_size = sizeof(GrantRecord)
        if not start_pool(&shared.entry_pool) or not start_pool(&shared.grant_pool):
            raise MemoryError()

    def _require_clock(self):
        """Raise StateFileError unless the times of the state are those of this manager's kind of clock."""
        cdef uint32_t kind = self.shared.header.clock_kind
        if kind == 0 or self.shared.header.row_count == 0:
            return
        if kind == MANUAL and self.manual is None:
            raise StateFileError(self.path, "its times are those of a ManualClock; open it with clock=ManualClock(...)")
        if kind != MANUAL and self.manual is not None:
            raise StateFileError(self.path, "its times are those of the monotonic clock; leave clock out")

    def _register(self):
        """Add this state to those that the fork handlers go through."""
        global newest
        self.older = newest
        if newest != NULL:
            (<State> newest).newer = <PyObject*> self
        newest = <PyObject*> self

    def __dealloc__(self):
        global newest
        cdef uint32_t chunk
        if newest == <PyObject*> self:
            newest = self.older
        elif self.newer != NULL:
            (<State> self.newer).older = self.older
        if self.older != NULL:
            (<State> self.older).newer = self.newer
        if self.usable():
            for chunk in range(CHUNKS):
                give_chunk_back(&self.shared.grant_pool, chunk, self.shared.me)
                give_chunk_back(&self.shared.entry_pool, chunk, self.shared.me)
        end_pool(&self.shared.grant_pool)
        end_pool(&self.shared.entry_pool)
        close_descriptors(&self.shared)

    # -- open, closed, refused

    cdef int require_open(self) except -1:
        if self.usable():
            return 0
        if self.closed:
            raise ManagerClosedError()
        if self.shared.header == NULL:
            raise RuntimeError("the manager is not initialized: a subclass must call super().__init__()")
        raise StateFileError(self.path or "the state in memory", self.refusal or "this process has no seat")

    cdef int refuse(self, object refusal) except -1:
        """Make every verb raise from now on."""
        self.refusal = refusal
        self.shared.fine_until_ns = REFUSES
        return 0

    cdef int look(self, int64_t now_ns) except -1:
        """Check the seat and the file before a decision, once a second; raises if this process must not decide."""
        self.require_open()
        if self.manual is not None or self.alone():
            self.shared.fine_until_ns = INT64_MAX
            return 0
        self.verify_seat()
        self._check_file()
        if self.shared.clock != CLOCK_BOOTTIME and load_u32(&self.shared.header.clock_kind) == BOOTTIME:
            self.adopt_clock()
        self.require_open()     # another thread may have closed it in the meantime
        self.shared.fine_until_ns = now_ns + LOOK_NS
        return 0

    def _check_file(self):
        """Check the file, and log a fault of it once; returns the fault or None. A truncated file is no longer used."""
        if self.path is None:
            return None
        from modelquota._core.state.file import loss_of

        fault = loss_of(self.shared.spare_fd, self.path, self.mapping.size)
        self.require_open()     # another thread may have closed the descriptors in the meantime
        if fault is not None and fault != self.file_fault:
            from modelquota._log import log

            log(40, "%s: %s", self.path, fault)
        self.file_fault = fault
        self.require_open()
        if fault is not None and os.fstat(self.shared.spare_fd).st_size < self.mapping.size:
            self.refuse(fault)
            self.require_open()
        return fault

    cdef int pause(self) except -1:
        """Handle signals between two attempts to take a lock; raises if the manager was closed in the meantime."""
        PyErr_CheckSignals()
        self.require_open()
        return 0

    cdef int exit(self) except -1:
        """End a thread's use of the state without the GIL."""
        self.inside -= 1
        if self.closed and self.inside == 0:
            self.tear_down()
        return 0

    cdef int end(self) except -1:
        """Release what this process holds, and the state. Requires that the verbs already refuse. Takes rows' locks.

        Threads that wait for a lock give up, and the last of them releases the mapping.
        """
        self.shared.closing = 1
        self.inside += 1
        if self.shared.me:
            with nogil:
                # a row that stays locked is left to the process that finds the seat free
                release_grants(&self.shared)
        self.exit()
        return 0

    cdef int tear_down(self) except -1:
        close_descriptors(&self.shared)
        self.mapping.forget()
        return 0

    cdef int verify_seat(self) except -1:
        """Raise if the seat is no longer this process's: its descriptors may have been closed, and with them its lock.

        The lock is checked through the other descriptor, which does not hold it.
        """
        self.verified_ns = monotonic_ns()
        if is_file(self.shared.spare_fd, self.shared.device, self.shared.inode) and \
                is_file(self.shared.fd, self.shared.device, self.shared.inode) and \
                holds_seat(&self.shared):
            hold_by_lock(&self.shared)
            return 0
        self.refuse("its descriptors were closed underneath (os.closerange, or a daemon that closes all files?), and "
                    "the seat of this process with them; make the manager after that")
        self.require_open()
        return 0

    cdef int verify_seat_if_due(self) except -1:
        if not self.alone() and monotonic_ns() - self.verified_ns >= VERIFY_NS:
            self.verify_seat()
        return 0

    def arrays(self):
        """The parts of the state as numpy structured arrays over the same memory: header, rows, cold rows.

        For inspection and tests: a row that is read without its lock may be in the middle of a change.
        """
        import numpy as np

        self.require_open()
        layout = dtypes()
        n = self.shared.header.max_models
        regions = regions_for(n)
        return (np.frombuffer(self.mapping, layout["header"], 1, 0),
                np.frombuffer(self.mapping, layout["row"], n, regions.rows),
                np.frombuffer(self.mapping, layout["cold"], n, regions.cold_rows))

    def rings(self):
        """The rings of each window, as numpy structured arrays over the same memory, see arrays()."""
        import numpy as np

        self.require_open()
        n = self.shared.header.max_models
        return tuple(np.frombuffer(self.mapping, dtype, n, offset)
                     for dtype, offset in zip(ring_dtypes(), regions_for(n).rings))

    def shares(self):
        """The shares of all rows, as a numpy structured array over the same memory, see arrays()."""
        import numpy as np

        self.require_open()
        n = self.shared.header.max_models
        return np.frombuffer(self.mapping, dtypes()["share"], n, regions_for(n).shares)

    # -- space

    cdef int reserve_space(self, const void* start, Py_ssize_t size) except -1:
        """Reserve disk space for a part of the file: a write to a page without it kills the process (SIGBUS)."""
        cdef int error
        if self.path is None:
            return 0
        error = set_space_aside(self.shared.spare_fd, <const char*> start - self.mapping.memory, size)
        if error:
            self.require_open()     # another thread may have closed it, and with it the descriptor
            raise StateFileError(self.path, f"no space could be set aside for it: {os.strerror(error)}; what is in it "
                                 "stays in use")
        return 0

    cdef int reserve_used(self) except -1:
        """Reserve space for the parts of fixed size and for all models so far. A new file is sparse."""
        cdef const Shared* shared = &self.shared
        cdef Header* header = shared.header
        self.reserve_space(header, <char*> shared.entries - self.mapping.memory)
        self.reserve_space(shared.entries, <Py_ssize_t> header.entry_chunks_used * CHUNK * sizeof(QueueEntry))
        self.reserve_space(shared.grant_pool.owners, CHUNKS * sizeof(uint32_t))
        self.reserve_space(shared.grants, <Py_ssize_t> header.grant_chunks_used * CHUNK * sizeof(GrantRecord))
        self.reserve_space(shared.rows, header.row_count * sizeof(Row))
        self.reserve_space(shared.cold_rows, header.row_count * sizeof(ColdRow))
        self.reserve_rings(0, header.row_count, ALWAYS_COUNTED)
        self.reserve_optional_rings()
        if load_u32(&header.lease.rule):
            self.reserve_shares()
        self.reserve_space(shared.names, header.names_used)
        return 0

    cdef int reserve_shares(self) except -1:
        """Reserve space for the shares of all models so far."""
        return self.reserve_space(self.shared.shares, self.shared.header.row_count * sizeof(Share))

    cdef int reserve_optional_rings(self) except -1:
        """Reserve space for the rings of the windows that only some models count, by runs of rows that do."""
        cdef const Shared* shared = &self.shared
        cdef int64_t row_count = shared.header.row_count
        cdef int64_t first, row
        cdef int window
        for window in range(WINDOWS):
            first = row = 0
            while row < row_count and not ALWAYS_COUNTED >> window & 1:
                if shared.cold_rows[row].counted >> window & 1:
                    row += 1
                    continue
                if row > first:
                    self.reserve_rings(first, row - first, 1 << window)
                row += 1
                first = row
            if row > first:
                self.reserve_rings(first, row - first, 1 << window)
        return 0

    cdef int reserve_rings(self, int64_t first, int64_t count, uint32_t windows) except -1:
        """Set aside what the rings of some rows take, in windows given as bits."""
        cdef int window
        for window in range(WINDOWS):
            if windows >> window & 1:
                self.reserve_space(self.shared.rings[window] + first * ring_size(window), count * ring_size(window))
        return 0

    cdef int reserve_next_model(self, uint32_t windows) except -1:
        """Set aside what one more model takes, as the registry is now: a row, rings in these windows, and a name."""
        cdef const Shared* shared = &self.shared
        cdef int64_t index
        cdef int64_t name = shared.header.names_used
        if self.path is None:
            return 0
        index = next_free_row(shared)
        if index < shared.header.max_models:
            self.reserve_space(&shared.rows[index], sizeof(Row))
            self.reserve_space(&shared.cold_rows[index], sizeof(ColdRow))
            self.reserve_rings(index, 1, windows | ALWAYS_COUNTED)
            if load_u32(&shared.header.lease.rule):
                self.reserve_space(&shared.shares[index], sizeof(Share))
        else:       # any row may be made free
            self.reserve_rings(0, index, windows)
        self.reserve_space(shared.names + name, min(LONGEST_NAME, shared.names_size - name))
        return 0

    # -- the seat

    cdef int take_seat(self) except -1:
        """Take a free seat: by a write lock on its byte or, if readers have locked every byte, by a read lock."""
        cdef uint32_t seat
        cdef int read_locked = 0
        # A loss of power may leave a lock in the file without the epoch of its owner: do not repeat that seat word
        # soon.
        cdef uint32_t epochs = 1 if self.path is None else 1 + int.from_bytes(os.urandom(2), "little")
        cdef uint64_t process
        identify_processes(&self.shared)
        for seat in range(1, SEATS):
            if lock_seat(self.shared.fd, seat, WRITE_LOCK):
                if self.begin(claim_seat(seat, epochs, 0, &self.shared)):
                    return 0
                lock_seat(self.shared.fd, seat, NO_LOCK)
        process = own_bits(self.shared.boot) if self.shared.space else 0
        for seat in range(1, SEATS):
            if lock_seat(self.shared.fd, seat, READ_LOCK):
                if process and self.begin(claim_seat(seat, epochs, process, &self.shared)):
                    return 0
                lock_seat(self.shared.fd, seat, NO_LOCK)
                read_locked += 1
        remedy = "end some that share this state"
        if read_locked:
            remedy += f", or that only read it: on {read_locked} of the places another process has a read lock"
            if not process:
                remedy += ", beside which they can only be taken with /proc of this PID namespace mounted at /proc"
        raise CapacityError(SEATS - 1, "processes", remedy)

    cdef bint begin(self, uint32_t me) noexcept:
        """Set this process's seat word; returns False if it is 0."""
        cdef uint32_t used
        if me == 0:
            return False
        self.shared.me = me
        while True:
            used = load_u32(&self.shared.header.seats_used)
            if used >= me & (SEATS - 1) or swap_u32(&self.shared.header.seats_used, used, me & (SEATS - 1)):
                break
        self.verified_ns = monotonic_ns()
        self.shared.fine_until_ns = 0
        return True

    cdef void leave_parent(self) noexcept:
        """In a forked child: give up everything of the parent's, and have no seat.

        The parent's descriptor is closed at once: while a child has it, the parent counts as alive.
        """
        cdef bint was_usable = self.usable()
        self.shared.fine_until_ns = REFUSES
        self.shared.me = 0
        self.inside = 0
        if self.shared.fd >= 0:
            close(self.shared.fd)
            self.shared.fd = -1
        if self.shared.grant_pool.free != NULL:
            memset(self.shared.grant_pool.free, 0, CHUNKS * sizeof(uint64_t))
        if self.shared.entry_pool.free != NULL:
            memset(self.shared.entry_pool.free, 0, CHUNKS * sizeof(uint64_t))
        self.shared.grant_pool.open_count = self.shared.entry_pool.open_count = 0
        self.forked = was_usable        # for retake_seat()

    cdef int retake_seat(self) except -1:
        """In a forked child: take a seat of its own, or refuse every verb from now on."""
        cdef Watcher watcher
        if not self.forked:
            return 0                    # the parent had none either, or had closed
        self.forked = False
        try:
            if self.watcher != NULL:
                watcher = <Watcher> self.watcher    # a reference, as in wake()
                watcher.forget_parent()
            self.shared.fd = open_again(self.shared.spare_fd, self.path)
            if not is_file(self.shared.fd, self.shared.device, self.shared.inode):
                raise OSError(0, "its descriptors were closed underneath")
            self.take_seat()
            self.adopt_clock()
        except BaseException as error:
            self.refuse(f"this process was forked and could not take a seat of its own ({error}); it has what its "
                        "parent had, and must not use it. Make room before the fork, or make a manager in the child")
            if not isinstance(error, Exception):
                raise
        return 0

    def _has_forked(self):
        """In the parent of a new process: it is no longer alone, though the child may not have taken its seat yet."""
        self.forked = True
        if self.usable():
            self.shared.fine_until_ns = 0
            self.wake(None)

    cdef int wake(self, object ref) except -1:
        """Notify this process's waiting requests of a change: of the model of a RowRef or, if None, of any model."""
        cdef Watcher watcher
        if self.watcher != NULL:
            watcher = <Watcher> self.watcher    # a counted reference: the call may release the last other one
            watcher.wake(ref)
        return 0

    # -- time

    cdef int anchor(self) except -1:
        """Anchor the rows' time to this boot's clock, and record both. Takes the registry's lock.

        After a reboot the rows' time continues by what has passed on the wall clock; if that has moved back, it does
        not move, and nothing is refilled. In a time namespace the clock is shifted, and the shift is subtracted.
        """
        cdef bytes boot = boot_id()
        cdef const char* boot_bytes = boot
        cdef int64_t wall_ns, mono_ns, boot_ns
        cdef uint32_t kind = MONOTONIC if self.manual is None else MANUAL
        cdef int outcome = BUSY
        while outcome == BUSY:
            wall_ns = time.time_ns()
            mono_ns = monotonic_ns() - <int64_t> clock_shift_ns()
            boot_ns = read_clock(CLOCK_BOOTTIME) - <int64_t> clock_shift_ns("boottime")
            self.inside += 1
            with nogil:
                outcome = anchor_time(&self.shared, boot_bytes, wall_ns, mono_ns, boot_ns, kind)
            self.exit()
            if outcome == BUSY:
                self.pause()
        if outcome == OTHER_CLOCK:
            self._require_clock()
            self.refuse("it is open with another kind of clock: a ManualClock, or the monotonic one")
            self.require_open()
        self.adopt_clock()
        return self.own_lease()

    cdef int own_lease(self) except -1:
        """Make the lease that of this file; anchor() has ended that of another one. Takes rows' locks.

        The rows come first: a process that opens the file in the meantime does the same, and decides nothing before.
        """
        cdef int64_t now_ns = self.now_ns()
        cdef int64_t index
        if load_u64(file_of_lease(self.shared.header)) == self.shared.file:
            return 0
        if has_other_lease(&self.shared):
            self.inside += 1
            with nogil:
                for index in range(self.shared.header.row_count):
                    # one that stays locked for so long, which is more than a slot, sees it at its next request
                    follow_lease_now(&self.shared, index, now_ns, SLICE_NS)
            self.exit()
            self.pause()
        store_u64(file_of_lease(self.shared.header), self.shared.file)
        return 0

    cdef int adopt_clock(self) except -1:
        """Go by the state's clock. It may have changed from CLOCK_MONOTONIC to CLOCK_BOOTTIME, and never back."""
        cdef Header* header = self.shared.header
        if self.manual is not None:
            return 0
        if load_u32(&header.clock_kind) == BOOTTIME:
            self.shared.offset_ns = header.lease.clock_offset_ns - <int64_t> clock_shift_ns("boottime")
            self.shared.clock = CLOCK_BOOTTIME
        else:
            self.shared.offset_ns = header.clock_offset_ns - <int64_t> clock_shift_ns()
            self.shared.clock = CLOCK_MONOTONIC
        return 0

    cdef int flush(self) except -1:
        """Write the state file to disk."""
        self.require_open()
        if self.path is None:
            return 0
        fault = self._check_file()
        if fault is not None:
            raise StateFileError(self.path, fault)
        self.anchor()
        if msync(self.mapping.memory, self.mapping.size, MS_SYNC) != 0:
            raise OSError(errno, os.strerror(errno), self.path)
        return 0


cdef void close_descriptors(Shared* shared) noexcept:
    """Close the descriptors, by which the kernel drops the seat's lock.

    In C, since `os` may already be gone at exit; and only those that still are of the state's file, since others may
    have closed them and opened something else by the same number.
    """
    if shared.me and not has_seat(shared):
        shared.fd = shared.spare_fd = -1
        return
    if shared.me:
        clear_seat(shared)
    if shared.fd >= 0 and is_file(shared.fd, shared.device, shared.inode):
        close(shared.fd)
    if shared.spare_fd >= 0 and (shared.inode == 0 or is_file(shared.spare_fd, shared.device, shared.inode)):
        close(shared.spare_fd)
    shared.fd = shared.spare_fd = -1


cdef void give_chunk_back(Pool* pool, uint32_t chunk, uint32_t me) noexcept:
    """Return a chunk of this process's if none of its records is in use."""
    cdef int64_t i
    if pool.owners == NULL or load_u32(&pool.owners[chunk]) != me:
        return
    for i in range(<int64_t> chunk * CHUNK, <int64_t> chunk * CHUNK + CHUNK):
        if (<uint32_t*> record_at(pool, i))[0] != 0:     # `seat` comes first in every record
            return
    swap_u32(&pool.owners[chunk], me, 0)


cdef int identify_processes(Shared* shared) except -1:
    """Set `space` and `boot`, which tell processes of other PID namespaces and other boots apart."""
    cdef uint64_t space = process_space()
    shared.space = space << 22
    shared.boot = digest(boot_id()) if space else 0
    return 0


def count_processes(int descriptor, bytes seats, uint32_t used):
    """How many of the seats up to `used` belong to living processes, by a copy of the seats and a descriptor."""
    cdef Shared shared
    cdef uint32_t seat
    cdef int found = 0
    if len(seats) < (used + 1) * sizeof(Seat):
        raise ValueError("not all seats were read")
    memset(&shared, 0, sizeof(shared))
    shared.fd = descriptor
    shared.seats = <Seat*> <char*> seats
    identify_processes(&shared)
    for seat in range(1, used + 1):
        found += not is_left(seat, load_u64(&shared.seats[seat].holder), &shared)
    return found


cdef int anchor_time(
    const Shared* shared, const char* boot, int64_t wall_ns, int64_t mono_ns, int64_t boot_ns, uint32_t kind
) noexcept nogil:
    """State.anchor() from lock to unlock. Takes the registry's lock."""
    cdef Header* header = shared.header
    cdef int64_t now_ns, i
    if not lock_registry(shared, SLICE_NS):
        return BUSY
    if header.clock_kind != kind and not (header.clock_kind == BOOTTIME and kind == MONOTONIC):
        if header.clock_kind != 0 and (header.row_count != 0 or has_other_process(shared)):
            unlock_registry(shared)
            return OTHER_CLOCK
        header.clock_kind = kind
    if has_other_lease(shared):
        store_i64(&header.lease.end_ns, 0)
    if kind == MONOTONIC:
        if memcmp(header.boot_id, boot, 16) != 0:
            now_ns = header.anchor_ns + max(wall_ns - header.anchor_wall_ns, <int64_t> 0)
            for i in range(header.row_count):
                now_ns = max(now_ns, shared.rows[i].level_ns)
            now_ns = min(now_ns, <int64_t> MAX_TIME_NS)
            header.clock_offset_ns = now_ns - mono_ns
            header.lease.clock_offset_ns = now_ns - boot_ns
            store_i64(&header.lease.end_ns, 0)      # it was measured by a clock that begins at 0 with each boot
        header.anchor_wall_ns = wall_ns
        compiler_barrier()
        if header.clock_kind == BOOTTIME:
            header.anchor_ns = boot_ns + header.lease.clock_offset_ns
        else:
            header.anchor_ns = mono_ns + header.clock_offset_ns
        compiler_barrier()
        memcpy(header.boot_id, boot, 16)
    unlock_registry(shared)
    return ANCHORED
