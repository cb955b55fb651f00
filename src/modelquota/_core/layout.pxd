# The layout of the shared state: structs only, nothing that computes.
#
# One mapping holds, in this order: Header, Seat[SEATS], the change log, owners of the chunks of queue entries,
# QueueEntry[ENTRIES], owners of the chunks of grant records, GrantRecord[GRANTS], Row[max_models], ColdRow[max_models],
# the rings of each window, Ring[max_models] or LongRing[max_models], names. Rows never move. Every field names its unit.
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
    LAYOUT_VERSION = 5
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
    SEATS = 1024            # processes that share a state at once; seat 0 is nobody's
    CHUNK = 64              # records of one kind that one process owns together
    CHUNKS = 4096           # of each kind
    RECORDS = 262_144       # CHUNK * CHUNKS: grants open at once, and requests that wait at once, over all processes
    CHANGES = 4096          # comings and goings of models that the change log holds


cdef extern from *:
    """
    /* of each window: how many 1/60 s slots make one of its slots, and the Limit codes of its requests and its tokens */
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
    # everything colder, so that the rows of many models stay in the cache. Guarded by `lock`.
    uint32_t lock            # 0 = free, otherwise the seat word of its owner
    uint32_t generation      # odd while a model lives here; grows when one enters or leaves, under the registry lock too
    int64_t slot_end_ns      # first ns after the 1/60 s slot that the windows are in
    int64_t level_ns         # the model's time: when the levels were drained last
    int64_t request_room     # requests that all windows and the concurrency still admit
    int64_t token_room       # tokens that all windows still admit; negative if more was charged than the limit is
    int64_t request_drain    # units per ns
    int64_t token_drain
    uint8_t request_shift    # a level's unit is 1 / (10**9 * 2**shift) of a request or token; NO_RATE = no level
    uint8_t token_shift
    uint8_t dormant_request_shift    # of a level whose rate is not set any more, see level.pxd; NO_RATE = there is none
    uint8_t dormant_token_shift
    uint16_t shadow          # 1 << Limit code: that limit is judged and never denies
    uint16_t meters          # how many rows are linked from ColdRow.first_meter
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
    # -- what is charged, and the journal of a change in several steps for the process that takes the lock over from a dead
    # owner, see repair.pxd
    uint64_t requests_mark      # charged ever = mark - Row's room, modulo 2**64: one store charges a request. With limits
    uint64_t tokens_mark        # of 5 and 3 charged, mark 5 and room 2; a slot with 1 of them leaves: mark 6 and room 3
    uint64_t journal_requests   # charged ever
    uint64_t journal_tokens
    uint64_t journal_requests_start     # of the window that is being rolled
    uint64_t journal_tokens_start
    int64_t journal_slot        # the 1/60 s slot to which all windows are being turned
    uint8_t stage               # 0 = no change under way
    uint8_t journal_filled      # of the window that is being rolled
    uint8_t counted             # 1 << window: it is counted
    uint8_t filled[WINDOWS]     # closed slots of each ring that hold a count, 0..SLOTS
    uint8_t on_sight            # registered from default_quota: it makes room once it is as good as new
    uint8_t action              # ViolationAction code, 0..3
    uint8_t unit                # in which tokens are shown: 0 = tokens, 1 = millionths of a dollar
    # -- what levels may take back, see level.pxd: the lowest level of the current 60 s slot and of the one before
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
    int64_t since_ns[WINDOWS]           # the model's time from which the window is counted
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
    int64_t reserved_tokens     # charged for open grants and not settled: they may come back
    # -- the queue of requests that wait, in the order in which they are served
    int64_t waiting             # how many
    int64_t max_queued
    uint32_t first_entry        # 1 + number of a QueueEntry, 0 = none
    uint32_t last_entry
    uint32_t sight_digest       # of the limits with which it came
    int32_t handles             # bound handles, in all processes
    uint32_t level_epoch        # how often a rate changed or a burst was forgiven: no level takes back what was charged before
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
    # -- the configuration that the fields above do not hold
    int64_t burst_requests
    int64_t burst_tokens
    double requests_per_second  # infinity = no limit
    double tokens_per_second
    double grace_period_sec
    int64_t padding[4]          # to whole cache lines


cdef struct Ring:
    # The closed slots of SECOND, MINUTE or HOUR; slot s is at s % SLOTS. What of a slot is beyond 2**32 - 1 is carried into
    # the one that follows. A ring's pages are touched only if its window is counted.
    uint32_t slots[SLOTS][2]    # requests, tokens


cdef struct LongRing:
    # The closed slots of DAY or MONTH. Tokens are not carried: with slots this long, they would not age out for years.
    int64_t tokens[SLOTS]
    uint32_t requests[SLOTS]


cdef struct QueueEntry:
    # The place of one waiting request in the queue of one model. Guarded by the row's lock, but for `deadline_ns`, which
    # its process may lower, and `seat`, which it alone sets and clears.
    uint32_t seat            # seat word of the process; 0 = free
    uint32_t row
    uint32_t generation
    int32_t priority         # higher first, then the lower ticket
    int64_t ticket
    int64_t deadline_ns      # the row's time from which it blocks nobody any more
    int64_t ready_ns         # when it may pass; NEVER where that depends on others
    uint32_t next            # 1 + number of the entry behind it, 0 = none
    uint32_t previous
    uint8_t linked           # whether it is in the queue
    uint8_t limit            # Limit code of what it waits for; 0 while that is not known yet
    uint8_t counted          # its violation was counted at this model
    uint8_t aside            # another model that does not queue is in its way: meanwhile it blocks nobody


cdef struct Charge:
    # What was charged to a row at one time, for a refund of it.
    int64_t tokens
    int64_t at_ns           # the row's time
    uint32_t epoch          # the cold row's level_epoch
    int64_t raised          # tokens by which their level rose; fewer if it may not rise above its cap
    uint8_t raised_request  # whether that of requests rose by one


cdef struct GrantRecord:
    # What one open grant holds of one row, or that a handle is bound to it. Guarded by the row's lock, but for `decider`,
    # which its process alone sets and clears, and `unclaimed_until_ns`, see unclaimed.pxd.
    uint32_t seat            # seat word of the process; 0 = free
    uint32_t row
    uint32_t generation
    uint32_t is_handle       # it holds nothing but the place of its model
    int64_t ram_mb
    int64_t ssd_mb
    int64_t tokens           # charged and not settled
    # -- of a grant for a request that waited, until the request takes it
    uint32_t decider         # 1 + number of the record that decides for all records of the grant; 0 = it is taken
    int64_t unclaimed_until_ns      # in that record: the rows' time from which anybody may let the grant go; CLAIMED; LAPSED
    Charge charge            # for the refund then


cdef struct Limits:
    # One configuration as the row stores it.
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
    # The first page. What every check would share stands in the rows and is summed on reading.
    uint64_t magic
    uint32_t version          # LAYOUT_VERSION
    uint32_t registry_lock    # guards the fields below it, and generations
    uint64_t fingerprint      # of the layout: sizes and offsets of the structs
    int64_t max_models
    int64_t row_count         # rows ever used; rows at and above it are zero
    int64_t lowest_free       # no row below it is free
    int64_t names_used        # bytes of the name region handed out
    uint64_t registry_version # grows whenever a model enters or leaves
    # -- time: the rows' is CLOCK_MONOTONIC + clock_offset_ns
    uint8_t boot_id[16]
    int64_t clock_offset_ns
    int64_t anchor_ns         # the rows' time at anchor_wall_ns of CLOCK_REALTIME
    int64_t anchor_wall_ns
    uint32_t clock_kind       # 0 = not known yet, 1 = CLOCK_MONOTONIC, 2 = a ManualClock
    uint32_t enforcing        # 0 = admit everything and count
    uint32_t seats_used       # no seat above it was ever taken
    uint32_t entry_chunks_used    # no chunk at or above it was ever taken
    uint32_t grant_chunks_used
    uint32_t registry_broken  # its lock was taken over from a dead owner, and what that left half done is not finished yet
    int64_t forget_hand       # row at which the next look for one that is as good as new begins
    int64_t full_until_ns     # until this time of the rows, the last look found none
    int64_t next_ticket       # for requests that wait; atomic
    uint64_t unknown_checks   # checks of ids that have no quota; atomic
    uint64_t recoveries       # rows, lines and grants put right after a process had died; atomic
    uint64_t unclaimed_made   # grants made for requests that waited, each to be taken by its deadline; atomic
    # counts of removed models, so that totals never fall
    uint64_t retired_allowed
    uint64_t retired_rejected
    uint64_t retired_throttled
    uint64_t retired_queued
    uint64_t retired_waited
    uint64_t retired_tokens   # modulo 2**64
    uint64_t retired_refunded
    uint64_t retired_violations[5]
    int64_t leaving_row       # a model that is being removed, -1 = none: for whoever takes the registry lock over
    uint32_t leaving_generation
    uint64_t staged_retired[12]     # retired_allowed and what follows it, as they stood before
    # -- the change of limits that is under way, for whoever takes the locks over from a dead owner
    int64_t staged_row        # -1 = none
    uint32_t staged_generation
    Row staged_row_before     # as it was
    Limits staged


cdef struct Seat:
    # Who has a seat of the state, see lock.pxd.
    uint64_t holder          # how often it was taken, and which process has it, unless a lock alone says so
    uint64_t space           # of which PID namespace that process is, and how often the seat was taken by then


cdef struct Pool:
    # Records of one kind, given out by chunks, see pool.pxd. Where they are, and what of them is this process's.
    uint32_t* owners          # seat word of each chunk's owner; 0 = free
    uint32_t* chunks_used     # in the header
    char* records
    int64_t record_size       # bytes
    uint64_t* free            # of each chunk that is owned, a bit for each free record; process-local
    uint32_t* open            # stack of chunks that may have a free record; process-local
    uint32_t open_count


cdef struct Shared:
    # Where the parts of the mapping are in this process, who it is there, and what time it is.
    int64_t fine_until_ns     # until this time of the rows nothing has to be looked at before a decision; or REFUSES
    int64_t offset_ns         # from the monotonic clock to the rows' time,
    const int64_t* manual_ns  # or the time of a ManualClock; NULL = the monotonic clock
    Header* header
    Seat* seats
    uint32_t* changes         # row of each coming and going of a model, at registry_version % CHANGES; UINT32_MAX = any
    QueueEntry* entries
    GrantRecord* grants
    Row* rows
    ColdRow* cold_rows
    char* rings[WINDOWS]      # a Ring or LongRing of each row
    char* names
    int64_t names_size        # bytes
    uint32_t me               # this process's seat word: epoch << SEAT_BITS | seat
    uint32_t closing          # who waits for a lock gives up
    int fd                    # the open file description that holds the seat's byte
    int spare_fd              # another one of the same file: a forked child opens its own by it
    uint64_t device           # of that file
    uint64_t inode
    uint64_t space            # in which process ids and start times are known by the same numbers, above the epoch; 0 = none
    uint64_t boot             # of this boot of the machine
    Pool entry_pool
    Pool grant_pool
