"""A region's native state: see _region.pyx for the rules."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ramster.engine._c.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_rwlock_t, pthread_t
from ramster.engine._histogram cimport Histogram
from ramster.engine._link cimport Links, Links_t, Wanted
from ramster.engine._prefetch cimport WINDOW_MAX, Pattern
from ramster.engine._resident cimport Resident
from ramster.engine._store cimport Store_t

cdef enum:
    BATCH = 64                      # pages evicted at once
    THREADS_MAX = 16
    ATTACHMENTS_MAX = 32            # processes of one region; the bits of Parked.who
    SPARE_MAX = 64                  # pages that reads may bring in beyond the budget while nothing can be written out
    BATCHES_MAX = 32                # windows on their way in at once; 0.5 MiB each once used

# State of a page of a region. Low nibble; the flags above it.
cdef enum:
    PAGE_AWAY = 0                   # in the store, or never written (no slot): not in the memfd
    PAGE_FETCHING = 1               # in the hands of somebody who brings it in or makes it writable
    PAGE_CLEAN = 2                  # resident, write-protected, equal to what the store has
    PAGE_DIRTY = 3                  # resident, writable
    PAGE_EVICTING = 4
    PAGE_LOST = 5                   # poisoned: its only copy is gone
    PAGE_DAMAGED = 6                # poisoned: its stored bytes fail their check, which nothing mends
    STATE_MASK = 0x0f
    FLAG_PINNED = 0x10
    FLAG_WAITERS = 0x20             # somebody faulted while it was in other hands: wake when it is not
    FLAG_REFUSED = 0x40             # given up for want of room, in the processes that waited; nothing of it is lost
    FLAG_AHEAD = 0x80               # being fetched though nobody has asked for it ...
    FLAG_REMOVED = 0x80             # ... or damaged, by the application itself

cdef struct Region_t

cdef struct Attachment:             # one process that has the region mapped
    Region_t *region
    bint used
    int uffd                        # -1: not mapped yet, or gone; changes only under 'mapped' for writing
    int guard                       # our end of its guard channel
    int stop_fd
    uint32_t leaving
    uint32_t dead                   # the kernel said that the process is gone
    uint64_t base
    bint can_continue_protected
    uint32_t users                  # threads that work for it, besides its fault threads
    uint16_t *pins                  # they nest; NULL until it pins something
    uint64_t pinned
    uint8_t *condemned              # a bit per page: poisoned there, or about to be; NULL until there is one
    uint64_t condemned_count
    uint64_t noted_ns               # when it was last told of a lost page
    pthread_t threads[16]
    uint32_t started
    uint32_t ended                  # of them; changes under the region's lock

cdef struct Parked:                 # faults that wait for room
    uint32_t page
    bint write                      # none of them only reads
    uint32_t who                    # a bit per attachment

cdef struct Batch:                  # the pages of one fault, on their way in together
    Region_t *region
    Attachment *via                 # in whose mapping they are put
    bint used
    uint64_t first
    uint32_t count
    uint32_t wanted                 # which of them a thread waits for
    uint32_t taken                  # how many of them are this batch's to bring in ...
    uint8_t ours[WINDOW_MAX]        # ... and which: the others are resident, or in other hands
    uint32_t outstanding            # replies to come, and one for whoever asks
    bint remote
    bint fault                      # asked for by a fault, not by prefetch or pin
    bint write_all                  # to be mapped writable: all of them ...
    bint write_wanted               # ... or the wanted one
    uint64_t started_ns
    uint8_t kinds[WINDOW_MAX]
    Wanted asked[WINDOW_MAX]        # of lenders, segment by segment
    uint8_t *bytes                  # count pages
    uint8_t *staging                # where replies of several pages arrive, sealed

cdef struct Region_t:
    Links_t *links
    Store_t *store
    uint64_t pool                   # 0: not made yet
    uint64_t pages
    uint64_t budget                 # resident pages allowed
    uint64_t reserve                # evictors work to keep so many pages of it free ...
    uint64_t reserve_least          # ... at least so many, and more after faults had to wait
    uint64_t reserve_changed_ns
    int memfd
    char label[49]                  # its name, for lines that native threads write
    bint can_poison
    Attachment attachments[32]
    uint32_t attachments_used       # slots that ever were in use
    uint32_t attached               # processes that have it mapped
    pthread_rwlock_t mapped         # held for reading by whoever makes requests of a process whose fault thread it is not
    uint8_t *states
    Resident set                    # which of the resident pages leaves next
    Parked *parked                  # faults that wait for room
    uint64_t parked_count
    uint64_t parked_since_ns
    uint64_t parked_taken           # frames that the store's puts had got then
    uint64_t in_vain                # see store_patience
    uint32_t spare[64]              # a ring: pages that came in beyond the budget, the oldest first
    uint32_t spare_first
    uint32_t spare_count
    bint parked_overflow            # more faults wait than 'parked' holds
    uint64_t resident
    uint64_t pinned                 # pages that somebody has pinned
    uint64_t condemned              # of all attachments
    Batch batches[32]
    uint32_t batches_used
    uint64_t lost
    uint64_t removed                # pages that the application itself lost, ever ...
    uint64_t lost_removed           # ... and of 'lost'
    uint64_t revive_at              # where the search for pages that can be had again goes on ...
    uint64_t revive_after_ns        # ... and when
    bint reviving                   # soon: more are waiting
    uint64_t users                  # threads inside prefetch, pin, evict
    bint abandoned                  # a thread of it did not end: its memory stays
    bint full
    uint64_t full_wait_ns
    uint64_t hold_ns                # how long a fault waits for room: full_wait_ns, or longer where its process wants that
    bint hold_told                  # ... and that the processes that wait have been told so
    uint64_t busy_poll_ns           # a fault thread asks again and again for so long before it sleeps; 0: never
    uint64_t polled_ns
    pthread_mutex_t lock
    pthread_cond_t changed          # something arrived, left, or there is room
    pthread_cond_t work             # for the evictors
    uint32_t stopping
    uint32_t fault_threads          # of each attachment
    uint32_t evictor_threads
    pthread_t evictors[16]
    uint32_t evictors_started
    Pattern reads                   # which pages come in together: by missing faults
    Pattern writes                  # which become writable together: by first writes
    Pattern maps                    # which are mapped together where another process brought them in: by minor faults
    uint64_t faults
    uint64_t faults_local
    uint64_t faults_remote
    uint64_t faults_zero
    uint64_t faults_wp
    uint64_t faults_minor
    uint64_t faults_parked
    uint64_t evictions
    uint64_t evictions_clean
    uint64_t refused
    uint64_t came                   # pages that came in, ever
    uint64_t returned               # of them, those that had left not long before
    uint64_t waited_ns              # that faults took, all together
    uint64_t looked_ns              # when the last three were looked at last, and what they were
    uint64_t looked_came
    uint64_t looked_returned
    uint64_t looked_waited_ns
    uint64_t enough                 # the budget that would end its thrashing; 0: it does not thrash
    bint enough_doubt               # see steady_pages
    Histogram local_ns
    Histogram remote_ns

cdef class Region:
    cdef Region_t *r
    cdef readonly Links links
    cdef readonly str name
    cdef bint closed
    cdef Region_t *live(self) except NULL
    cdef Attachment *attachment(self, uint32_t number) except NULL
    cdef int shut(self) except -1
    cdef Region_t *begin(self, Attachment *a, uint64_t first, uint64_t count) except NULL
    cdef int end(self, Region_t *r, Attachment *a) except -1
    cdef int wait_in(self, Attachment *a, uint64_t first, uint64_t count, bint writable, uint64_t *done) except -1
    cdef int drop_pins(self, Attachment *a, uint64_t first, uint64_t count) except -1
    cdef object fail(self, int outcome, uint64_t first, uint64_t count)
    cdef list lost_runs(self, Region_t *r, uint64_t first, uint64_t count, bint by_touch, bint at_once, uint64_t *undecided)
