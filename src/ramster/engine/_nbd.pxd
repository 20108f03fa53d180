"""The NBD server's native interface. See _nbd.pyx for the rules."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ramster.engine._c.linux cimport iovec
from ramster.engine._c.openssl cimport SSL
from ramster.engine._c.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from ramster.engine._link cimport Links, Links_t, Wanted
from ramster.engine._store cimport Store_t

cdef enum:
    EXPORTS_MAX = 256
    REQUESTS_MAX = 4096
    LENGTH_MAX = 33554432           # of a read or a write, as other servers have it
    SMALL_PAGES = 16                # a parked request of up to so many pages has its memory ready
    LARGE_BYTES_MAX = 134217728     # of larger ones at one moment, all connections together: four of the largest
    LARGE_BYTES_EACH = 33554432     # of them, of one connection: one of the largest
    LARGE_BYTES_HUGE = 100663296    # of them, of requests longer than MEDIUM_BYTES, so that these leave room to others
    MEDIUM_BYTES = 1048576
    ASKED_PAGES_EACH = 512          # under way from elsewhere for one connection, about: so long are others behind it in the queue
    LOOK_PAGES = 64                 # of a long read, between two looks at whether its client is still there
    TURN_PAGES = 1024               # of a long range, before a slow thread turns to another connection
    DIRECT_BYTES = 262144           # a read of up to so much that is all here is answered without parking
    IN_BYTES = 262144
    FLUSH_BYTES = 65536             # of replies worth a system call while further requests are there
    OUT_BYTES = 393216              # FLUSH_BYTES, a direct read, its edges and headers
    PIECE_PAGES = 32                # asked for in one message: a segment holds about 120
    CACHE_PAGES = 64                # that CACHE asks for at a time, as a piece that moved asks for its own
    OPEN_PIECES = 8                 # segments that one read collects pages of at a time
    PAGE_LOCKS = 256                # per export
    EVENTS_MAX = 256
    EXTENTS_MAX = 1024              # of one reply to BLOCK_STATUS
    SLOW_MAX = 16
    SCAN_PAGES = 262144             # that one reply to BLOCK_STATUS looks at: 1 GiB, some milliseconds
    INLINE_PAGES = 4096             # longer TRIM, WRITE_ZEROES and CACHE leave the connection to others meanwhile

cdef enum ExportCounter:
    E_READS = 0
    E_WRITES
    E_BYTES_READ
    E_BYTES_WRITTEN
    E_FLUSHES
    E_TRIMS
    E_ZEROES
    E_CACHES
    E_STATUSES
    E_REFUSED                       # requests that were not valid
    E_ERRORS                        # valid ones that failed
    E_PAGES_FREED                   # by TRIM and WRITE_ZEROES
    E_PAGES_REMOTE                  # read from elsewhere
    E_PAGES_LOST                    # reads that met a page that is gone
    E_UNALIGNED                     # pages that were read, changed and written
    E_ABANDONED                     # reads whose client had gone before they were answered
    E_COUNTERS

cdef enum JobKind:
    JOB_AGAIN = 0                   # pages of a piece that moved while they were asked for
    JOB_PATCH                       # a part of a page that is away is written
    JOB_FREE                        # pages are forgotten
    JOB_CACHE                       # pages come back

cdef struct Server_t
cdef struct Conn
cdef struct Parked
cdef struct Piece

cdef struct Export:
    uint32_t used                   # 0: a free row
    uint64_t pool
    bint read_only
    uint64_t bytes                  # atomic: grows
    uint64_t pages_max
    uint32_t connections            # under the GIL
    pthread_mutex_t locks[256]      # of pages, by their number: whoever writes one holds its lock
    uint64_t counters[16]

cdef struct Job:
    Job *next
    int kind
    Parked *request
    Piece *piece
    uint64_t page
    uint64_t pages
    uint32_t low                    # JOB_PATCH: bytes of the page
    uint32_t high
    const uint8_t *bytes            # NULL: zeros

cdef struct Piece:                  # pages of one segment of one parked read
    Server_t *server
    Parked *request
    void *asked_for                 # atomic: while a lender or the spill file is asked, the connection that waits; NULL then: it has let go
    Piece *next
    uint32_t pages
    uint32_t asked                  # counted in its connection's asked_pages
    uint32_t peer
    uint32_t segment
    uint32_t generation
    uint8_t *staging
    Wanted wanted[32]
    Job job

cdef struct Parked:                 # a request that waits for something; its connection goes on
    Conn *conn
    Parked *next
    uint64_t cookie
    uint64_t offset
    uint32_t length
    uint16_t type
    uint16_t header_bytes
    uint32_t error                  # atomic: the first that it met
    uint64_t error_offset
    bint cut                        # its payload ended before its end: what came is written, and nothing is answered
    uint32_t left                   # atomic: what it waits for; the connection's own part counts as one
    uint8_t *small                  # SMALL_PAGES pages
    uint8_t *data                   # small, or from malloc
    uint64_t large_bytes
    uint8_t header[64]
    Job jobs[3]

cdef struct Conn:
    Server_t *server
    Conn *next_turn
    Job *jobs_first                 # for slow threads, in order, under slow_lock; with any, it stands in the server's row of turns
    Job *jobs_last
    Export *export
    uint32_t number                 # of the export
    uint64_t bytes                  # that the handshake told the client; the export may have grown since
    int fd
    int wake
    SSL *ssl
    bint structured
    bint allocation
    uint32_t allocation_id
    uint8_t *arrived                # IN_BYTES
    uint32_t start
    uint32_t end
    uint8_t *out                    # OUT_BYTES
    uint32_t out_used
    uint8_t *page                   # a page's bytes where they are aligned
    bint writing                    # payload of a WRITE is being received
    uint64_t write_cookie
    uint64_t write_offset
    uint64_t write_left
    uint64_t write_started
    uint32_t write_error
    Parked *write_parked
    pthread_mutex_t send_lock       # who holds it sends; guards 'sending' and 'sent'
    Parked *sending
    uint64_t sent
    uint32_t done_lock              # spin
    Parked *done_first              # answers that wait to be sent
    Parked *done_last
    uint32_t users                  # atomic: parked requests, until whoever finished them has let go of the connection
    uint32_t rows                   # parked requests, under the server's free_lock
    uint32_t changes                # of these, what is no read; under free_lock
    uint64_t large_bytes            # under free_lock
    uint32_t asked_pages            # of pieces that are under way; under free_lock
    uint32_t gone                   # atomic: nobody is there to take an answer
    bint asked                      # whether its client is still there, by ask_for_life()
    bint chunks                     # every answer is a chunk from now on
    uint32_t ahead                  # bytes of the next answer that are sent already; under send_lock
    uint32_t dead                   # atomic
    const char *reason              # atomic

cdef struct Event:
    uint32_t export
    uint32_t kind
    uint64_t page

cdef struct Server_t:
    Links_t *links
    Store_t *store
    Export exports[256]
    uint64_t deadline_ns
    pthread_mutex_t free_lock
    pthread_cond_t freed
    Parked *parked_free
    Parked *parked_rows
    Piece *piece_free
    Piece *piece_rows
    uint32_t pieces                 # rows of them
    uint32_t pieces_left            # asked for, and nobody waits for them any more; under free_lock
    uint64_t large_bytes
    uint32_t rows_each              # that one connection may have: a client that takes no answers leaves some to others
    uint8_t *memory
    uint64_t memory_bytes
    pthread_mutex_t slow_lock
    pthread_cond_t slow_wanted
    Conn *turns_first               # connections that have jobs: each gets one done, then stands at the end
    Conn *turns_last
    uint32_t slow_stopping
    pthread_t slow[16]
    uint32_t slow_started
    uint32_t stopping               # atomic
    uint64_t in_vain                # atomic: the store's frames_taken, and 1, when a put last waited in vain; 0: none has
    uint32_t events_lock            # spin
    Event events[256]
    uint32_t events_count
    int event_fd

cdef class NbdServer:
    cdef Server_t *s
    cdef readonly Links links
    cdef bint stopped
    cdef set connections
    cdef Export *export(self, uint32_t number) except NULL
    cdef uint32_t left(self)
    cdef end(self)

cdef class NbdConnection:
    cdef readonly int fd
    cdef SSL *ssl
    cdef object context
    cdef readonly bint serving
    cpdef close(self)
    cdef int wait(self, short events, uint64_t deadline_ns) except -1
    cdef int wait_tls(self, int result, uint64_t deadline_ns) except -1
