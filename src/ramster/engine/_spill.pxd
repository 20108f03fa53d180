"""The spill file's native state. See _spill.pyx for the rules."""
from libc.stdint cimport uint8_t, uint32_t, uint64_t

from ramster.engine._c.crypto cimport EVP_CIPHER_CTX
from ramster.engine._c.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from ramster.engine._histogram cimport Histogram
from ramster.engine._link cimport Links_t
from ramster.engine._store cimport Gathered, Layout, Store_t

cdef enum:
    BLOCK = 4096                    # what O_DIRECT asks for on every disk; the file's header takes one
    THREADS_MAX = 8
    READS_MAX = 8192                # twice the gets that may be under way: those given up leave their place only when looked at
    ORDERS_MAX = 64                 # segments that wait to be written: 16 MiB, a tenth of a second of a disk
    MERGE_MAX = 16                  # images that one is made of, at most
    MERGE_PAGES_MAX = 2048
    MERGE_PAUSE_MS = 200            # after a look that found nothing worth it
    RESERVE_FROM = 8                # a file for so many images keeps the rooms of one to merge into
    ROOMS_MAX = 16                  # of one image: half of one is lost for each image, the list of an image stays short
    COPY_PAGES = 16                 # asked of a lender at once for a copy: gets of others must not wait behind much of it
    RETRY_MS = 1000                 # after a write that failed, until the next is tried

cdef struct Read:
    uint32_t pending
    uint64_t id
    uint64_t asked_ns

cdef struct Write:
    uint32_t segment
    uint32_t generation

cdef struct Thread:
    Spill_t *spill
    pthread_t thread
    uint8_t *buffer                 # an image, aligned to BLOCK
    uint8_t *body                   # the entries of one request
    EVP_CIPHER_CTX *open_ctx
    EVP_CIPHER_CTX *seal_ctx

cdef struct Copy:                   # a segment that is mirrored later; the copying thread's, 'lock' while an answer is awaited
    uint8_t *image
    uint8_t *staging
    EVP_CIPHER_CTX *open_ctx
    uint32_t cursor
    Layout layout
    pthread_mutex_t lock
    pthread_cond_t done
    uint32_t sizes[16]              # of what is asked for
    uint32_t bytes                  # of the image so far
    bint right
    bint answered

cdef struct Spill_t:
    Links_t *links
    Store_t *store
    int fd
    bint direct
    uint32_t image_bytes            # of a whole segment, a multiple of BLOCK
    uint32_t room_bytes             # a multiple of BLOCK
    uint32_t rooms_each             # for a whole image
    uint32_t rooms
    pthread_mutex_t lock            # of everything down to 'cursor'
    pthread_cond_t wanted
    Read reads[8192]
    uint32_t reads_head
    uint32_t reads_count
    Write orders[64]
    uint32_t orders_head
    uint32_t orders_count
    uint32_t writing                # threads that write or merge: one at most, the others are for those who wait for a page
    bint read_last                  # so that neither reads nor writes keep the other out
    bint stopping
    uint32_t copies                 # to be made now
    uint32_t images_wanted          # so many are to fit
    pthread_cond_t tended
    uint64_t *used                  # a bit per room
    uint32_t *next                  # the room of the same image that follows
    uint32_t free
    uint32_t cursor
    uint32_t reserve
    Thread threads[8]
    uint32_t started
    pthread_mutex_t look_lock       # of what follows, down to 'look_image': whoever sees that the file is too short
    bint over
    uint64_t file_bytes             # how long it has to be
    uint8_t *header                 # one block
    uint64_t cuts                   # atomic: how often somebody had cut it short
    uint64_t cut_pages              # atomic: pages lost by that
    Layout look_image
    uint8_t *keep_buffer            # the shipper's
    uint8_t *merge_buffer           # of the thread that writes, like what follows
    Gathered *merge_pages
    Layout layout
    uint32_t merge_cursor
    uint32_t compact_cursor
    pthread_t copier
    bint copying
    uint32_t give_cursor
    Copy copy
    uint64_t moves                  # atomic: images that have changed their rooms
    uint64_t merge_after_ns
    uint64_t failed_ms              # atomic: when a write failed last; 0: none has
    uint32_t last_errno             # atomic
    uint64_t read_count
    uint64_t pages_read
    uint64_t write_count
    uint64_t bytes_written
    uint64_t read_errors
    uint64_t write_errors
    uint64_t refused                # orders that found no room
    uint64_t merged                 # images that went into others
    uint64_t compacted              # images written anew without what was dead
    uint64_t given_up               # copies, for want of room
    uint64_t copied                 # made after their lender had it
    Histogram read_ns


cdef inline bint worth_compacting(uint32_t win, uint32_t held, uint32_t free_rooms, uint32_t rooms) noexcept nogil:
    """Whether an image of 'held' rooms is written anew to win some of them. The fewer are free, the less is enough: each
    compaction writes what lives, so a small gain is dear."""
    if win == 0 or 4 * <uint64_t> free_rooms >= rooms:
        return False
    return 5 * <uint64_t> free_rooms < rooms or 4 * win >= held


cdef class Spill:
    cdef Spill_t *sp
