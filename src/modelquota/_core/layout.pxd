# The layout of the shared state: the structs of which the mapping is made, and the limits of their values.
#
# One mapping holds, in this order: Header, Seat[SEATS], the change log, owners of the chunks of queue entries,
# QueueEntry[ENTRIES], owners of the chunks of grant records, GrantRecord[GRANTS], Row[max_models], ColdRow[max_models],
# the rings of each window, Ring[max_models] or LongRing[max_models], Share[max_models], names. Rows never move. Every
# field names its unit.
#
# How a row counts. A check has to know one number: how many requests (or tokens) all windows still admit. So a row
# stores that as its room, and one subtraction charges all windows. What was charged so far follows from the room and a
# mark, which changes only when the room is computed again; a window's use follows from that and the window's base:
#
#     charged = mark - room        used = charged - base        all modulo 2**64: only differences count
#
# Three requests, with a limit of 2 per window:
#
#     event                         room   mark   charged   base   used
#     -------------------------   ------   ----   -------   ----   ----
#     a new model                      2      2         0      0      0
#     request 1 is admitted            1      2         1      0      1
#     request 2 is admitted            0      2         2      0      2
#     request 3 finds no room          0      2         2      0      2    denied: nothing has been written
#     request 1 leaves the window      1      3         2      1      1    base grows; room is computed again, and mark
#                                                                          with it, so that charged stays as it was
#     request 3 comes again            0      3         3      1      2    admitted
#
# If no limit binds, room starts at MAX_COUNT. A model that has charged 2**64 and more since it was registered has a
# mark that wrapped, and the differences are still exact, since none of them exceeds MAX_COUNT.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from *:
    """
    #if !defined(__linux__) || !defined(__SIZEOF_INT128__) || !defined(__GNUC__)
    #error "modelquota needs 64-bit Linux and GCC or Clang (memfd, 128-bit integers, __atomic builtins)"
    #endif
    #define MQ_UNLIMITED INT64_MAX
    #define MQ_MAX_COUNT ((int64_t)1 << 62)
    #define MQ_MAX_TIME_NS ((int64_t)1 << 61)
    """
    const int64_t UNLIMITED "MQ_UNLIMITED"      # a limit that is not set
    const int64_t MAX_COUNT "MQ_MAX_COUNT"      # the largest count, limit or cost; a window's counter stays there
    const int64_t MAX_TIME_NS "MQ_MAX_TIME_NS"  # the latest time that slot arithmetic holds (73 years)

cdef enum:
    LAYOUT_VERSION = 6
    SLOTS = 60              # closed slots that a window counts beside the current one
    WINDOWS = 5             # the shortest first
    SECOND = 0
    MINUTE = 1
    HOUR = 2
    DAY = 3
    MONTH = 4
    ALWAYS_COUNTED = 1 << SECOND | 1 << HOUR | 1 << DAY     # the others from the moment they first have a limit
    KINDS = 3               # of tokens: input, cached, output
    TRAIL = 4               # slots that may end before the windows are turned
    LIMITS = 5 + 2 * WINDOWS    # Limit codes, from 0, which is none: memory, concurrency, two a window, the queue
    VIOLATION_TYPES = 5     # in the order of violations[] below
    SEAT_BITS = 10
    SEATS = 1024            # processes that share a state at once; seat 0 is never taken
    CHUNK = 64              # records of one kind that one process owns together
    CHUNKS = 4096           # of each kind
    RECORDS = 262_144       # CHUNK * CHUNKS: grants open at once, and requests that wait at once, over all processes
    CHANGES = 4096          # the latest additions and removals of models, which the change log holds
    # what a share consists of: a ceiling of requests in each window, then one of tokens in each, then
    REQUEST_DRAIN = 2 * WINDOWS     # the rate of requests, and how far its level may rise, both in millionths
    REQUEST_CAP = 2 * WINDOWS + 1
    TOKEN_DRAIN = 2 * WINDOWS + 2   # those of tokens
    TOKEN_CAP = 2 * WINDOWS + 3
    OPEN_GRANTS = 2 * WINDOWS + 4   # concurrency
    COMPONENTS = 2 * WINDOWS + 5
    NODE_BYTES = 256        # of each of the two copies of what a node of a cluster remembers
    # bits of `unit`, which has the flags of a configuration
    IN_DOLLARS = 1              # tokens are shown as millionths of a dollar
    CLUSTER_CONCURRENCY = 2     # hosts that share limits share that of concurrency, too


cdef extern from *:
    """
    /* of each window: how many 1/60 s slots make one of its slots, and the Limit codes of its requests and tokens */
    static const int64_t mq_slots_per_slot[] __attribute__((unused)) = {1, 60, 3600, 86400, 2592000};
    static const uint8_t mq_limit_codes[][2] __attribute__((unused)) = {{4, 5}, {7, 6}, {9, 8}, {11, 10}, {13, 12}};
    """
    const int64_t SLOTS_PER_SLOT "mq_slots_per_slot"[WINDOWS]     # each a multiple of the one before
    const uint8_t LIMIT_CODES "mq_limit_codes"[WINDOWS][2]        # [window][of_tokens]


cdef struct Wide:
    # A non-negative 128-bit integer, low word first.
    uint64_t low
    uint64_t high


cdef struct Row:
    # What every decision about one model reads and writes: two cache lines, and a third one for batches, apart from
    # everything that is used less often, so that the rows of many models stay in the cache. Guarded by `lock`.
    uint32_t lock            # 0 = free, otherwise the seat word of its owner
    uint32_t generation      # odd while the row has a model; grows with each change, under the registry's lock too
    int64_t slot_end_ns      # first ns after the 1/60 s slot that the windows are in
    int64_t level_ns         # the model's time: the time at which the levels were last drained
    int64_t request_room     # requests that all windows and the concurrency still admit
    int64_t token_room       # tokens that all windows still admit; negative if more was charged than the limit is
    int64_t request_drain    # units per ns
    int64_t token_drain
    uint8_t request_shift    # a level's unit is 1 / (10**9 * 2**shift) of a request or token; NO_RATE = no level
    uint8_t token_shift
    uint8_t dormant_request_shift    # of a level whose rate is no longer set, see level.pxd; NO_RATE = none
    uint8_t dormant_token_shift
    uint16_t shadow          # 1 << Limit code: that limit is evaluated and never denies
    uint8_t meters           # how many rows are linked from ColdRow.first_meter
    uint8_t weighted         # not every token counts 1 here, see ColdRow.weights
    Wide request_level
    Wide request_cap         # max(rate, 1) + burst
    Wide token_level
    Wide token_cap
    # -- the trail, see trail.pxd: slots that have ended since the windows were turned
    int64_t trail_end_ns     # first ns after the slot that the trail has reached; slot_end_ns if there is no trail
    int64_t trail_request_room      # the rooms when that slot began
    int64_t trail_token_room
    int32_t trail_request_minimum   # the lowest coarse level at the beginning of a slot of the trail
    int32_t trail_token_minimum
    uint32_t trail_tokens[TRAIL]    # charged in each slot that has ended
    uint16_t trail_requests[TRAIL]
    uint8_t trail_slots[TRAIL]      # the slot that followed it, counted from the one that the windows are in
    uint8_t trail            # slots that have ended, 0..TRAIL
    uint8_t has_share        # the limits above are what its share leaves of them, see share.pxd


cdef struct ColdRow:
    # The rest of a model: written when a slot ends, a limit changes or a request is denied. Guarded by Row.lock.
    # -- how full the fullest limits are, so that a check does not ask each of them, see highest_usage()
    int64_t request_span        # used in the fullest window = span - Row's room
    double request_percent      # of its limit, that one request is; 0 = no window has a limit
    int64_t request_floor       # the room down to which it is the fullest; above every room: that is not known
    int64_t token_span
    double token_percent
    int64_t token_floor
    double request_level_percent    # of the level's cap, that one of its units is; 0 = no level
    double token_level_percent
    double held_percent         # of the fullest of memory and concurrency, with one grant more; negative: not known
    # -- what is charged, and the journal of a change in several steps for the process that takes the lock over from a
    # dead owner, see repair.pxd
    uint64_t requests_mark      # see the top of this file
    uint64_t tokens_mark
    uint64_t journal_requests   # charged ever
    uint64_t journal_tokens
    uint64_t journal_requests_start     # of the window that is being rolled
    uint64_t journal_tokens_start
    int64_t journal_slot        # the 1/60 s slot to which all windows are being turned
    uint8_t stage               # 0 = no change under way
    uint8_t journal_filled      # of the window that is being rolled
    uint8_t counted             # 1 << window: it is counted
    uint8_t filled[WINDOWS]     # closed slots of each ring that hold a count, 0..SLOTS
    uint8_t on_sight            # registered from default_quota: removed to make room once it is unused
    uint8_t action              # ViolationAction code, 0..3
    uint8_t unit                # IN_DOLLARS | CLUSTER_CONCURRENCY
    # -- what levels may refund, see level.pxd: the lowest level of the current 60 s slot and of the one before
    int64_t request_minimum[2]
    int64_t token_minimum[2]
    # -- rolling windows. Used = charged - base. All counts modulo 2**64.
    uint64_t requests_base[WINDOWS]     # charged ever when the oldest counted slot began
    uint64_t tokens_base[WINDOWS]
    uint64_t requests_start[WINDOWS]    # charged ever when the current slot began
    uint64_t tokens_start[WINDOWS]
    int64_t request_limit[WINDOWS]      # or UNLIMITED; for SECOND ceil(rate) + burst
    int64_t token_limit[WINDOWS]
    int64_t ring_offset[WINDOWS]        # bytes from this cold row to the ring
    int64_t since_ns[WINDOWS]           # the model's time from which on a charge is certainly counted in the window
    # -- name record: NAME_UNIT bytes * offset into the names; the record stays with the row and only grows
    uint32_t name_offset
    uint16_t name_capacity      # bytes
    uint16_t name_size          # bytes in use
    uint32_t log_second         # 1 + the second of the model's time in which a violation was logged last
    uint32_t log_held           # violations since log_second that were not logged
    # -- memory, MB, and concurrency
    int64_t max_ram_mb          # or UNLIMITED
    int64_t max_ssd_mb
    int64_t ram_mb              # reported use
    int64_t ssd_mb
    int64_t reserved_ram_mb     # held by open grants
    int64_t reserved_ssd_mb
    int64_t concurrent          # open grants
    int64_t max_concurrent      # or UNLIMITED
    int64_t peak_ram_mb
    int64_t peak_ssd_mb
    int64_t reserved_tokens     # charged for open grants and not settled: they may be refunded
    # -- the queue of waiting requests, in the order in which they are served
    int64_t waiting             # requests in the queue
    int64_t max_queued
    uint32_t first_entry        # 1 + number of a QueueEntry, 0 = none
    uint32_t last_entry
    uint32_t sight_digest       # digest of the limits with which it was registered
    int32_t handles             # bound handles, in all processes
    uint32_t level_epoch        # how often a rate changed or a burst was cleared: levels refund nothing from before
    # -- meters: rows whose limits are decided together with those of a model. Changed under the registry's lock too.
    uint32_t meter_of           # of a meter: 1 + the row of its model, 0 = that has none
    uint32_t first_meter        # of a model: 1 + the row of a meter, 0 = none
    uint32_t next_meter         # of a meter: the next one of the same model
    uint32_t meters_epoch       # of a model: how often its list of meters has changed
    int64_t weights[KINDS]      # what one token of each kind counts here, in millionths
    # -- counters since the model was registered
    uint64_t rejected           # denied checks, by the action applied
    uint64_t throttled
    uint64_t queued
    uint64_t waited             # requests that were counted as denied and then admitted after a wait
    uint64_t tokens_refunded
    uint64_t violations[5]      # violated checks by first limit: RAM, SSD, rate, quota, concurrency
    # -- the part of the configuration that the fields above do not have
    int64_t burst_requests
    int64_t burst_tokens
    double requests_per_second  # infinity = no limit
    double tokens_per_second
    double grace_period_sec
    int64_t share_offset        # bytes from this cold row to its Share
    int64_t padding[3]          # to whole cache lines


cdef struct Ring:
    # The closed slots of SECOND, MINUTE or HOUR; slot s is at s % SLOTS. Its pages are touched only if the window is
    # counted. A count is in 32 bits, see kept(): of one that is not below 2**27, the lower bits are carried into the
    # slot that follows.
    uint32_t slots[SLOTS][2]    # requests, tokens


cdef struct LongRing:
    # The closed slots of DAY or MONTH. Their slots are long: no token is carried, so that none ages out a slot late.
    int64_t tokens[SLOTS]
    uint32_t requests[SLOTS]


cdef struct Share:
    # What this host may use of one model's limits, if many hosts share them, and the limits themselves: the row and the
    # cold row have what the share leaves of them, see share.pxd. Guarded by Row.lock. Touched only if the row has one.
    int64_t request_limit[WINDOWS]      # as configured, like the fields of these names of the row and the cold row
    int64_t token_limit[WINDOWS]
    Wide request_cap
    Wide token_cap
    int64_t request_drain
    int64_t token_drain
    int64_t max_concurrent
    int64_t held[COMPONENTS]    # the share; UNLIMITED = the configured limit holds; 0 of what is not limited
    int64_t lease_offset        # bytes from this share to the header's lease
    uint64_t starved            # requests that were denied although the configured limits had room for them
    int64_t peak_requests       # most charged between two turns of the windows since the last exchange
    int64_t peak_tokens
    int64_t needed_tokens       # of the largest request that was denied for lack of share since then; -1 = none
    uint32_t phase              # of the lease for which the row's limits were computed, see lease_phase()
    uint8_t request_finer       # by how many bits the level's unit is finer than the rate needs, see refine_rate()
    uint8_t token_finer
    uint8_t changed             # whether anything but time has changed since the last exchange
    uint8_t called              # whether it has called for an exchange since the last one


cdef struct Lease:
    # Until when shares hold, and what holds afterwards: one of the whole state. Words that change are read and written
    # atomically; no lock guards them.
    int64_t end_ns           # the rows' time; 0 = it has ended
    int64_t clock_offset_ns  # the rows' time is CLOCK_BOOTTIME + this, if Header.clock_kind says so
    int64_t retry_ns         # the wait that a request is told that is denied for lack of share
    uint32_t rule            # 0 = no row has a share; otherwise a rule of share.pxd | number of hosts << 2
    uint32_t urgent          # grows when a row calls for an exchange; a futex
    uint32_t sleepers        # whether a thread waits for that
    uint32_t leader          # seat word of the process that exchanges shares for the host; 0 = none
    int64_t leader_ns        # CLOCK_MONOTONIC when it last said so
    uint32_t node_copy       # lowest bit: which of the two copies counts; the others: the term, see lead_host()
    uint32_t node_size[2]    # bytes
    uint8_t node[2][NODE_BYTES]     # what the node remembers


cdef struct QueueEntry:
    # The place of one waiting request in the queue of one model. Guarded by the row's lock, except `deadline_ns`, which
    # its process may lower without it, and `seat`, which only its process sets, and which it clears without it.
    uint32_t seat            # seat word of the process; 0 = free
    uint32_t row
    uint32_t generation
    int32_t priority         # higher first, then the lower ticket
    int64_t ticket
    int64_t deadline_ns      # the row's time from which it no longer blocks other requests
    int64_t ready_ns         # the row's time at which it may be admitted; NEVER if that depends on other requests
    uint32_t next            # 1 + number of the entry behind it, 0 = none
    uint32_t previous
    uint8_t linked           # whether it is in the queue
    uint8_t limit            # Limit code of what it waits for; 0 while that is not yet known
    uint8_t counted          # whether its violation was counted at this model
    uint8_t aside            # it is denied by a model that does not queue: for now it does not block other requests


cdef struct Charge:
    # What was charged to a row at one time, so that it can be refunded.
    int64_t tokens
    int64_t at_ns           # the row's time
    uint32_t epoch          # the cold row's level_epoch
    int64_t raised          # tokens by which their level rose: fewer than `tokens` if its cap stopped it
    uint8_t raised_request  # whether the level of requests rose by one


cdef struct GrantRecord:
    # What one open grant holds of one row, or that a handle is bound to it. Guarded by the row's lock, except
    # `decider`, which only its process sets and clears, and `unclaimed_until_ns`, see unclaimed.pxd.
    uint32_t seat            # seat word of the process; 0 = free
    uint32_t row
    uint32_t generation
    uint32_t is_handle       # whether it is a handle's: it holds nothing, and its model is not removed to make room
    int64_t ram_mb
    int64_t ssd_mb
    int64_t tokens           # charged and not settled
    # -- of a grant for a request that waited, until the request takes it
    uint32_t decider         # 1 + number of the record that decides for all records of the grant; 0 = it has been taken
    # in the deciding record: the rows' time from which any process may release the grant; or CLAIMED, or LAPSED
    int64_t unclaimed_until_ns
    Charge charge            # what is refunded in that case


cdef struct Limits:
    # One configuration as a row and its cold row store it.
    int64_t max_ram_mb
    int64_t max_ssd_mb
    int64_t max_concurrent
    int64_t max_queued
    int64_t burst_requests
    int64_t burst_tokens
    double requests_per_second
    double tokens_per_second
    double grace_period_sec
    int64_t request_limits[WINDOWS]
    int64_t token_limits[WINDOWS]
    Wide request_cap
    Wide token_cap
    int64_t request_drain
    int64_t token_drain
    int64_t weights[KINDS]
    uint8_t request_shift
    uint8_t token_shift
    uint8_t action
    uint8_t unit
    uint16_t shadow


cdef struct Header:
    # The first page. Counters that every check would write are kept by row, and summed when they are read.
    uint64_t magic
    uint32_t version          # LAYOUT_VERSION
    uint32_t registry_lock    # guards the fields below it, and generations; a lock word, see lock.pxd
    uint64_t fingerprint      # of the layout: sizes and offsets of the structs
    int64_t max_models
    int64_t row_count         # rows that have ever been used; rows at and above it are zero
    int64_t lowest_free       # no row below it is free
    int64_t names_used        # bytes of the names that are in use
    uint64_t registry_version # grows whenever a model is added or removed
    # -- time: the rows' time is CLOCK_MONOTONIC + clock_offset_ns, or with shares CLOCK_BOOTTIME + that of the lease
    uint8_t boot_id[16]
    int64_t clock_offset_ns
    int64_t anchor_ns         # the rows' time when CLOCK_REALTIME was anchor_wall_ns
    int64_t anchor_wall_ns
    uint32_t clock_kind       # 0 = not yet known, 1 = CLOCK_MONOTONIC, 2 = a ManualClock, 3 = CLOCK_BOOTTIME
    uint32_t enforcing        # 0 = admit everything, and count it
    uint32_t seats_used       # no seat above it has ever been taken
    uint32_t entry_chunks_used    # no chunk at or above it has ever been taken
    uint32_t grant_chunks_used
    uint32_t registry_broken  # the registry's lock was taken over from a dead process, whose change is not yet finished
    int64_t forget_hand       # the row at which the next search for an unused model begins
    int64_t full_until_ns     # a search found none: the next one is not before this time of the rows
    int64_t next_ticket       # for waiting requests; atomic
    uint64_t unknown_checks   # checks of ids that have no quota; atomic
    uint64_t recoveries       # rows, queue entries and grants that were repaired after a process had died; atomic
    uint64_t unclaimed_made   # grants made for requests that waited, see unclaimed.pxd; atomic
    # -- counts of removed models, so that totals never decrease
    uint64_t retired_allowed
    uint64_t retired_rejected
    uint64_t retired_throttled
    uint64_t retired_queued
    uint64_t retired_waited
    uint64_t retired_tokens   # modulo 2**64
    uint64_t retired_refunded
    uint64_t retired_violations[5]
    # -- the removal that is under way, for the process that takes over the registry's lock from a dead one
    uint32_t linking_meter    # 1 + row of a meter that is being linked or unlinked, 0 = none: for the same process
    uint32_t linking_model    # and 1 + row of its model
    uint32_t removing         # 1 + row of a model that is being removed with its list of meters, 0 = none
    uint32_t removing_generation
    int64_t leaving_row       # -1 = none
    uint32_t leaving_generation
    uint64_t staged_retired[12]     # retired_allowed and the fields after it, as they were before
    # -- the change of limits that is under way, for the process that takes over the locks of a dead one
    int64_t staged_row        # -1 = none
    uint32_t staged_generation
    Row staged_row_before     # the row as it was before
    Limits staged
    # -- many hosts
    Lease lease
    # Behind it, in what is left of the page and not described by the fingerprint: the file for which the lease holds,
    # see file_of_lease()


cdef struct Seat:
    # Which process has a seat of the state, see lock.pxd.
    uint64_t holder          # how often the seat has been taken, and the process that has it, if not by a lock alone
    uint64_t space           # the PID namespace of that process, and how often the seat had been taken by then


cdef struct Pool:
    # Records of one kind, which processes own by chunks, see pool.pxd: where they are, and which are this process's.
    uint32_t* owners          # seat word of each chunk's owner; 0 = free
    uint32_t* chunks_used     # in the header
    char* records
    int64_t record_size       # bytes
    uint64_t* free            # of each owned chunk, a bit for each free record; process-local
    uint32_t* open            # a stack of the chunks that have free records; process-local
    uint32_t open_count


cdef struct Shared:
    # What a process knows of the state: where its parts are mapped, the process's seat, and the clock. Process-local.
    int64_t fine_until_ns     # until this time of the rows the seat and the file need no check; or REFUSES
    int64_t offset_ns         # added to the clock it is the rows' time
    const int64_t* manual_ns  # the time of a ManualClock, which is used instead; NULL = the clock
    int clock                 # CLOCK_MONOTONIC or CLOCK_BOOTTIME, see Header.clock_kind
    Header* header
    Seat* seats
    uint32_t* changes         # row of each addition and removal, at registry_version % CHANGES; UINT32_MAX = any
    QueueEntry* entries
    GrantRecord* grants
    Row* rows
    ColdRow* cold_rows
    char* rings[WINDOWS]      # a Ring or LongRing of each row
    Share* shares
    char* names
    int64_t names_size        # bytes
    uint32_t me               # this process's seat word: epoch << SEAT_BITS | seat
    uint32_t closing          # set when the manager is closed: threads that wait for a lock give up
    int fd                    # the open file description that has the lock on the seat's byte
    int spare_fd              # another open file description of the same file, from which a forked child opens its own
    uint64_t device           # of that file
    uint64_t inode
    uint64_t file             # digest of both, which tells a copy of the file apart
    uint64_t space            # digest of the PID and time namespaces, above the bits of an epoch; 0 = not known
    uint64_t boot             # digest of this boot of the machine
    Pool entry_pool
    Pool grant_pool
