"""The spill file's native state. See _spill.pyx for the rules."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ramster.engine._c.crypto cimport EVP_CIPHER_CTX
from ramster.engine._c.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from ramster.engine._histogram cimport Histogram
from ramster.engine._link cimport Links_t
from ramster.engine._store cimport Gathered, Store_t

cdef enum:
    BLOCK = 4096                    # what O_DIRECT asks for on every disk; the file's header takes one
    THREADS_MAX = 8
    READS_MAX = 8192                # twice the gets that may be under way: those given up leave their place only when looked at
    ORDERS_MAX = 64                 # segments that wait to be written: 16 MiB, a tenth of a second of a disk
    MERGE_MAX = 16                  # images that one is made of, at most
    MERGE_PAGES_MAX = 2048
    MERGE_PAUSE_MS = 200            # after a look that found nothing worth it
    RESERVE_FROM = 8                # a file with so many rooms keeps one to merge into
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

cdef struct Spill_t:
    Links_t *links
    Store_t *store
    int fd
    bint direct
    uint32_t image_bytes            # room for one image, a multiple of BLOCK
    uint32_t images                 # rooms
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
    uint64_t *used                  # a bit per room
    uint32_t free
    uint32_t cursor
    uint32_t reserve
    Thread threads[8]
    uint32_t started
    uint8_t *keep_buffer            # the shipper's
    uint8_t *merge_buffer           # of the thread that writes, like what follows
    Gathered *merge_pages
    uint32_t merge_cursor
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
    Histogram read_ns

cdef class Spill:
    cdef Spill_t *sp
