# The layout of the shared state: structs only, nothing that computes.
#
# One mapping holds, in this order: Header, epochs of the seats, Place[PLACES], owners of the chunks, Held[HELDS],
# Row[max_models], Ledger[max_models], names. Rows never move. Every field names its unit.
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
    LAYOUT_VERSION = 3
    SLOTS = 60              # closed slots that a window counts beside the current one
    WINDOWS = 3             # SECOND, HOUR, DAY
    SECOND = 0
    HOUR = 1
    DAY = 2
    VIOLATION_TYPES = 5     # in the order of violations[] below
    SEAT_BITS = 10
    SEATS = 1024            # processes that share a state at once; seat 0 is nobody's
    PLACES = 1024           # lines, one a model and process
    CHUNK = 64              # grant records that one process owns together
    CHUNKS = 4096
    HELDS = 262_144         # CHUNK * CHUNKS: grants open at once, over all processes


cdef struct Wide:
    # A non-negative 128-bit integer, low word first.
    uint64_t low
    uint64_t high


cdef struct Row:
    # What every decision about one model reads and writes: two cache lines, apart from everything colder, so that the
    # rows of many models stay in the cache. Guarded by `lock`.
    uint32_t lock            # 0 = free, otherwise the seat word of its owner
    uint32_t generation      # odd while a model lives here; grows when one enters or leaves, under the registry lock too
    int64_t slot_end_ns      # first ns after the current 1/60 s slot; until then no window moves
    int64_t level_ns         # the model's time: when the levels were drained last
    int64_t request_room     # requests that all windows and the concurrency still admit
    int64_t token_room       # tokens that all windows still admit; negative where more was charged than the limit is
    int64_t request_drain    # units per ns
    int64_t token_drain
    uint8_t request_shift    # a level's unit is 1 / (10**9 * 2**shift) of a request or token; NO_RATE = no level
    uint8_t token_shift
    uint16_t reserved[3]
    Wide request_level
    Wide request_cap         # max(rate, 1) + burst
    Wide token_level
    Wide token_cap


cdef struct Ledger:
    # The rest of a model: written when a slot ends, a limit changes or a request is denied. Guarded by Row.lock.
    # -- rolling windows SECOND, HOUR, DAY. Charged ever = mark - Row's room; used = charged - base. All modulo 2**64.
    uint64_t requests_mark
    uint64_t tokens_mark
    uint64_t requests_base[3]   # charged when the oldest counted slot began
    uint64_t tokens_base[3]
    double request_percent[3]   # of a window's limit, that one request or token is; 0 = no limit
    double token_percent[3]
    double request_level_percent    # of the level's cap, that one of its units is; 0 = no level
    double token_level_percent
    uint64_t requests_start[3]  # charged when the current slot began
    uint64_t tokens_start[3]
    int64_t request_limit[3]    # per window, or UNLIMITED; for SECOND ceil(rate) + burst
    int64_t token_limit[3]
    uint8_t filled[3]           # closed slots of each ring that hold a count, 0..SLOTS
    uint8_t action              # ViolationAction code, 0..3
    # -- name record: NAME_UNIT bytes * offset into the names; the record stays with the row and only grows
    uint32_t name_offset
    uint32_t name_capacity      # bytes
    uint32_t name_size          # bytes in use
    # -- memory, MB, and concurrency; first what only a request for memory asks for, then a line that every check reads
    int64_t max_ram_mb          # or UNLIMITED
    int64_t max_ssd_mb
    int64_t ram_mb              # reported use
    int64_t ssd_mb
    int64_t reserved_ram_mb     # held by open grants
    int64_t reserved_ssd_mb
    int64_t concurrent          # open grants
    double ram_percent          # of a cap, that 1 MB or one grant is; 0 = no cap
    double ssd_percent
    double concurrent_percent
    int64_t max_concurrent      # or UNLIMITED
    int64_t peak_ram_mb
    int64_t peak_ssd_mb
    # -- the line of requests that wait
    int64_t waiting             # how many
    int64_t max_queued
    int64_t head_ready_ns       # when the first of them may pass; NEVER where that depends on others
    int64_t head_ticket         # its place: higher priority first, then the lower ticket
    int32_t head_priority
    uint8_t head_limit          # Limit code of what it waits for; 0 where that is not known yet
    # -- the journal of a change in several steps, for whoever takes the lock over from a dead owner, see repair.pxd
    uint8_t stage               # 0 = no change under way
    uint8_t journal_filled      # of the window that is being rolled
    uint64_t journal_requests   # charged ever
    uint64_t journal_tokens
    uint64_t journal_requests_start     # of the window that is being rolled
    uint64_t journal_tokens_start
    int64_t journal_slot        # the 1/60 s slot to which all windows are being rolled
    # -- what levels may take back, see level.pxd: the lowest level of the current 60 s slot and of the one before
    int64_t request_low[2]
    int64_t token_low[2]
    int64_t level_epoch         # how often a rate changed or a burst was forgiven; what was charged before, no level takes back
    # -- counters since the model was registered
    uint64_t rejected           # denied checks, by the action applied
    uint64_t throttled
    uint64_t queued
    uint64_t waited             # requests that were counted as denied and then admitted after a wait
    uint64_t tokens_refunded
    uint64_t violations[5]      # violated checks by first limit: RAM, SSD, rate, quota, concurrency
    uint32_t log_second         # 1 + the second of the model's time in which a violation was logged last
    uint32_t log_held           # violations since then that were not logged
    # -- the configuration that the fields above do not hold
    int64_t burst_requests
    int64_t burst_tokens
    double requests_per_second  # infinity = no limit
    double tokens_per_second
    double grace_period_sec
    # -- the closed slots of each window; slot s stands at s % SLOTS. A slot's requests beyond 2**32 - 1 are carried into
    # the next one.
    int64_t tokens[3][60]
    uint32_t requests[3][60]


cdef struct Place:
    # The line of one process for one model. Guarded by the row's lock; `seat` is claimed with a compare-and-swap.
    uint32_t seat            # seat word of the process; 0 = free
    uint32_t row
    uint32_t generation
    int32_t priority         # of the first in line
    int64_t ticket
    int64_t ready_ns
    int64_t count            # how many wait
    uint8_t limit


cdef struct Held:
    # What one open grant holds of one row. Guarded by the row's lock.
    uint32_t seat            # seat word of the process; 0 = free
    uint32_t row
    uint32_t generation
    uint32_t spare
    int64_t ram_mb
    int64_t ssd_mb


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
    int64_t request_limits[3]
    int64_t token_limits[3]
    Wide request_cap
    Wide token_cap
    int64_t request_drain
    int64_t token_drain
    uint8_t request_shift
    uint8_t token_shift
    uint8_t action


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
    uint32_t enforcing        # 0 = admit everything and count
    uint32_t seats_used       # no seat above it was ever taken
    uint32_t places_used      # no place at or above it was ever taken
    uint32_t chunks_used      # likewise
    int64_t next_ticket       # for requests that wait; atomic
    uint64_t unknown_checks   # checks of ids that have no quota; atomic
    uint64_t recoveries       # rows, lines and grants put right after a process had died; atomic
    # counts of removed models, so that totals never fall
    uint64_t retired_allowed
    uint64_t retired_rejected
    uint64_t retired_throttled
    uint64_t retired_queued
    uint64_t retired_waited
    uint64_t retired_violations[5]
    int64_t leaving_row       # a model that is being removed, -1 = none: for whoever takes the registry lock over
    uint32_t leaving_generation
    uint64_t staged_retired[10]     # retired_allowed and what follows it, as they stood before
    # -- the change of limits that is under way, for whoever takes the locks over from a dead owner
    int64_t staged_row        # -1 = none
    uint32_t staged_generation
    uint8_t staged_request_shift
    uint8_t staged_token_shift
    Wide staged_request_level # as they stood before
    Wide staged_token_level
    Limits staged


cdef struct Shared:
    # Where the parts of the mapping are in this process, and who it is there.
    Header* header
    uint32_t* epochs          # how often each seat has been taken
    Place* places
    uint32_t* owners          # seat word of each chunk's owner; 0 = free
    Held* held
    Row* rows
    Ledger* ledgers
    char* names
    int64_t names_size        # bytes
    uint32_t me               # this process's seat word: epoch << SEAT_BITS | seat
    int fd                    # the open file description that holds the seat's byte
