"""The links' native interface: what regions may call. See _link.pyx for the rules."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ramster.engine._c.crypto cimport EVP_CIPHER_CTX
from ramster.engine._c.openssl cimport SSL, SSL_CTX
from ramster.engine._c.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from ramster.engine._c.zstd cimport ZSTD_CCtx
from ramster.engine._conduct cimport Conduct
from ramster.engine._histogram cimport Histogram
from ramster.engine._turns cimport Turns
from ramster.engine._store cimport ENTRY_BYTES_MAX, RemoteMeta, RemoteRef, Store, Store_t

cdef enum:
    PEERS_MAX = 255
    PENDING_MAX = 4096              # remote gets under way at one moment, all peers together
    SHIPS_MAX = 512                 # segments on their way at one moment, all peers together
    ORDERS_MAX = 512
    ORDERS_PER_PEER = 64
    SHARE = 4                       # a peer may have a quarter of what is free: however many stand still, others find room
    ORPHANS_MAX = 64                # a lender with so many gets nothing more before it has forgotten some
    TOLD_MAX = 1024                 # the same, with so many FREE and COMPACT that it has not answered
    IMAGES = 2                      # sealed segments that wait for one lender's connection: one is sent, one is sealed
    FRAME_BYTES = 48
    RECEIVE_BYTES = 32768
    GET_PAGES_MAX = 64              # pages that one request may ask for
    ASKED_MAX = 256                 # requests of one peer that wait for room in the ring
    JOBS_MAX = 8192
    WORKERS_MAX = 8
    BLOCK_BYTES = 8192              # of what is lent: half of one is lost per image, 2 % of a full segment

cdef enum:                          # kinds of connection
    GET = 0
    BULK = 1

cdef packed struct Frame:           # little-endian, docs/wire-protocol.md
    uint32_t magic
    uint8_t version
    uint8_t type
    uint16_t status
    uint64_t request
    uint32_t length
    uint32_t credit
    uint32_t segment
    uint32_t generation
    uint32_t handle
    uint32_t left
    uint32_t reserved
    uint32_t crc

cdef struct Wanted:                 # one page of a request
    uint64_t slot                   # what named it when it was asked for: a reply is used only while it still does
    uint32_t index
    uint16_t ordinal
    uint16_t place                  # the caller's

cdef struct Asked:                  # a peer's request that waits for room in the ring
    Frame frame
    uint16_t ordinals[64]

cdef struct Channel:                # what 'lock' guards may be read without it only where the code says atomic
    pthread_mutex_t lock
    pthread_cond_t drained
    uint32_t waiting                # writers that want the lock; the reader lets them go first
    SSL *ssl
    uint32_t up                     # atomic: ssl != NULL; set last
    uint32_t life                   # atomic: connections that it has lost
    int fd
    uint32_t kind
    uint32_t peer
    uint32_t kick                   # bytes may wait inside the SSL object, where epoll cannot see them
    bint armed                      # EPOLLOUT asked for
    bint closing                    # down, but what depended on it is still being settled
    uint8_t *out                    # ring of small frames
    uint32_t out_bytes
    uint32_t out_head
    uint32_t out_used
    uint8_t *images[2]              # bulk: a SHIP frame and its body each; the shipper fills, the sender empties
    uint32_t image_bytes[2]
    uint32_t image_first
    uint32_t image_count            # atomic
    uint32_t image_done             # bytes of the first image that are encrypted
    uint8_t *wire                   # records that the socket has not taken yet
    uint32_t wire_start
    uint32_t wire_end
    uint64_t records
    uint8_t *received
    uint32_t start
    uint32_t end
    Frame frame                     # of the body that is being received straight to where it belongs
    uint8_t *body                   # the staging memory of a reply
    uint32_t body_got
    uint32_t body_frame             # the lender's row for a segment. Neither: the body is thrown away
    uint32_t body_refusal           # and why
    bint in_body
    Asked *asked                    # of a get channel: a queue
    uint32_t asked_head
    uint32_t asked_count
    uint64_t work                   # of the present turn
    uint64_t turn                   # how much of it there may be
    uint32_t pings                  # sent and not answered
    Conduct conduct
    Conduct handshakes              # TLS messages after the handshake
    bint rekeyed                    # there were too many
    uint64_t received_ns            # as every stamp here: of ran_ns()
    uint64_t pinged_ns
    uint64_t unanswered_ns          # atomic: since when it has been asked something, and nothing came; 0: it answers
    bint silent                     # that was said
    uint64_t bytes_sent
    uint64_t bytes_received
    const char *reason              # why it went down last

cdef struct Peer:
    uint32_t number
    pthread_mutex_t attach_lock     # one attach at a time
    uint64_t generation             # of the process at the other end
    uint32_t credit                 # segments that it says it has room for
    uint32_t shipping
    uint32_t ordered                # orders for it in the queue
    uint64_t answered_ns            # when it last acknowledged a segment
    uint64_t pace_ns                # time per segment while several are under way, smoothed
    uint64_t progress_ns            # when an order for it last got further, or the first of several came
    uint32_t retell                 # a FREE found no room: all of them again
    uint64_t down_ns                # since when its get channel is down; 0 while up or never seen
    bint seen
    uint32_t gone                   # atomic: it said goodbye
    bint lends                      # it took a segment of ours in this life
    uint32_t told                   # atomic: FREE and COMPACT on this connection, not answered yet
    uint32_t listened               # atomic: somebody waits for a sign of life
    uint32_t faults                 # atomic: how often it was cut off for what it sent
    uint64_t fault_ns               # when last
    Channel channels[2]
    uint64_t gets
    uint64_t segments_sent
    uint64_t refused
    uint32_t refusal                # status of the last refusal
    uint32_t *orphans               # it may have them, and is to forget them: not shipped there again before it says that it did
    uint32_t *orphan_generations
    uint32_t orphan_room            # for ORPHANS_MAX, what was under way then, and every segment that it held
    uint32_t orphan_count
    uint32_t orphans_told           # the first so many, on the present connection
    Histogram round_trip

cdef struct Links_t
cdef struct Pending

cdef struct Reply:                  # what became of a request; its pages are opened one after the other by reply_next()
    Links_t *links
    Pending *pending
    const Wanted *wanted
    uint32_t pages
    int status                      # OK: entries are there to be opened; else what every page met
    const uint16_t *sizes
    const uint8_t *entry            # the next one
    uint32_t opened
    bint spilled                    # read from the spill file
    EVP_CIPHER_CTX *ctx

ctypedef void (*Complete)(void *context, Reply *reply) noexcept nogil
ctypedef void (*Work)(void *context, EVP_CIPHER_CTX *ctx) noexcept nogil

cdef struct Pending:
    Links_t *links
    uint32_t state
    uint64_t id
    RemoteRef ref                   # the segment; of the page when there is one only
    Wanted one
    Wanted *wanted
    uint32_t pages
    uint8_t *staging                # where a reply of several pages is received, reply_bytes() of them
    int status                      # of the reply that waits for a worker
    Complete complete
    void *context
    uint64_t started_ns
    uint64_t sent_ns
    bint spilled                    # asked of the spill file, last

cdef struct Fetch:                  # a page that get_pages() is to get
    uint32_t index
    int status                      # of it: OK, MISS, or what it met
    uint8_t *bytes
    uint64_t slot                   # what named it away from here; 0: it was here

cdef struct Job:
    Work work
    void *context

cdef struct Ship:
    uint64_t id                     # 0: free
    uint32_t segment
    uint32_t generation
    uint32_t peer
    uint32_t spill                  # number of its image in the spill file, and 1, where it is mirrored
    RemoteMeta *meta
    uint64_t sent_ns

cdef struct Order:
    uint32_t segment
    uint32_t generation
    uint32_t peer
    uint64_t ordered_ns

cdef struct Lent:                   # one image that the lender holds or receives; its number is the handle
    uint32_t state
    uint32_t owner
    uint32_t segment
    uint32_t generation
    uint32_t entries
    uint32_t bytes                  # of the image
    uint32_t next                   # in its bucket, or among the free rows
    uint32_t block_count
    uint32_t owner_before           # among the rows of its owner
    uint32_t owner_after
    uint64_t owner_generation
    uint32_t blocks[32]

# What _spill does for the links. None of it waits for the disk, except 'keep' and 'stop'.
ctypedef bint (*SpillGet)(void *spill, uint32_t pending, uint64_t id) noexcept nogil
ctypedef bint (*SpillOrder)(void *spill, uint32_t segment, uint32_t generation) noexcept nogil
ctypedef uint32_t (*SpillKeep)(void *spill, const uint8_t *image, uint32_t bytes) noexcept nogil
ctypedef void (*SpillRelease)(void *spill, uint32_t number) noexcept nogil
ctypedef uint32_t (*SpillUnderWay)(void *spill) noexcept nogil
ctypedef void (*SpillStop)(void *spill) noexcept nogil
ctypedef bint (*SpillLook)(void *spill) noexcept nogil

cdef struct Spilling:
    uint32_t ready                  # atomic: the rest is set; never unset
    void *spill
    bint mirror                     # what goes to a lender is kept in the spill file too
    SpillGet get                    # read the pages of a request; False: too many wait
    SpillOrder order                # write a segment; False: too many wait
    SpillKeep keep                  # write an image: its number and 1, or 0 without room. By the shipper alone
    SpillRelease release
    SpillUnderWay under_way
    SpillStop stop                  # end its threads; what it has not read is completed by nobody
    SpillLook look                  # mark what somebody has cut off the file

cdef struct Links_t:
    Store_t *store
    uint32_t number
    uint32_t segment_bytes
    Peer *peers[256]
    pthread_mutex_t peers_lock
    int epolls[2]
    Turns turns[2]                  # of each reactor alone
    int wakes[2]
    pthread_t reactors[2]
    pthread_t shipper
    pthread_t sender
    pthread_mutex_t send_lock
    pthread_cond_t send_wanted
    bint sending
    int order_fd
    int stop_fd
    int event_fd                    # channels went up or down: for the node's shell
    uint32_t reactors_started
    bint sender_started
    bint shipper_started
    uint32_t stopping
    uint64_t request_deadline_ns
    uint64_t give_up_ns
    uint64_t idle_ns
    uint64_t keepalive_ns
    uint64_t skipped_first_ns       # of the store's clock when the links were made
    uint32_t bulk_in_flight
    Spilling spilling
    # gets under way
    pthread_mutex_t pending_lock
    Pending pending[4096]
    uint32_t pending_free[4096]
    uint32_t pending_free_count
    uint64_t pending_sequence
    EVP_CIPHER_CTX *open_ctx        # of the get reactor alone
    # workers open replies of several pages and read ahead
    pthread_mutex_t jobs_lock
    pthread_cond_t jobs_there
    Job jobs[8192]
    uint32_t jobs_head
    uint32_t jobs_count
    uint32_t workers_idle
    pthread_t workers[8]
    uint32_t workers_started
    bint reactors_done              # nothing will be added to the jobs any more
    # segments under way
    pthread_mutex_t ship_lock
    Ship ships[512]
    uint32_t ships_used
    uint64_t ship_sequence
    Order orders[512]               # oldest first
    uint32_t orders_count
    uint32_t sealing                # orders taken that are not in 'ships' yet
    EVP_CIPHER_CTX *seal_ctx
    ZSTD_CCtx *zstd
    uint32_t recompress             # RECOMPRESS_AUTO ...
    # what is lent
    pthread_mutex_t lender_lock
    uint8_t *lent
    int lent_fd
    uint32_t lent_blocks
    uint32_t *lent_free             # a stack of blocks
    uint32_t lent_free_count        # atomic
    uint32_t lent_rows
    Lent *rows
    uint32_t rows_free
    uint32_t rows_free_count        # atomic
    uint32_t *lent_buckets          # rows by (owner, segment, generation)
    uint32_t lent_mask
    uint64_t lent_secrets[4]
    uint32_t owner_first[256]       # the images of each owner, the last that came first
    uint32_t owner_images[256]      # atomic: how many
    uint32_t lent_images
    uint64_t lent_bytes             # of the images held
    uint32_t owner_blocks[256]      # atomic
    uint32_t owner_blocks_max
    uint32_t owner_rows[256]        # atomic: images held or being received
    uint32_t owner_rows_max
    bint lent_locked
    # counters
    uint64_t remote_gets
    uint64_t late_replies
    uint64_t protocol_errors
    uint64_t frees_sent
    uint64_t ships_refused
    uint64_t ships_failed
    uint64_t segments_received
    uint64_t gets_served
    uint64_t unreachable
    uint64_t corrupt_replies
    uint64_t bytes_shipped
    uint64_t compacts_sent
    uint64_t segments_compacted     # of others, here
    uint64_t orders_withdrawn
    uint64_t floods                 # connections closed for frames that mean nothing
    uint64_t turn_work_max[2]       # the longest turn of a connection, of each kind
    uint64_t gets_redirected        # to the spill file, since a lender is down or does not answer


cdef inline uint32_t reply_bytes(uint32_t pages) noexcept nogil:
    """The most that the body of a reply of so many pages takes: a table of sizes, then the entries."""
    return ((2 * pages + 7) & ~<uint32_t> 7) + pages * ((ENTRY_BYTES_MAX + 7) & ~<uint32_t> 7)


cdef int links_get(Links_t *l, const RemoteRef *ref, Wanted *wanted, uint32_t pages, uint8_t *staging, Complete complete,
                   void *context, bint send_now) noexcept nogil
cdef int links_unspill(Links_t *l, const RemoteRef *ref) noexcept nogil
cdef bint links_slot_lost(Links_t *l, uint32_t peer, uint64_t slot) noexcept nogil
cdef void links_look_at_spill(Links_t *l) noexcept nogil
cdef bint links_slot_reachable(Links_t *l, uint32_t peer, uint64_t slot) noexcept nogil
cdef uint32_t pending_asked(Links_t *l, uint32_t i, uint64_t id, uint32_t *segment, uint32_t *generation,
                            uint16_t *ordinals) noexcept nogil
cdef Pending *pending_claim(Links_t *l, uint32_t i, uint64_t id) noexcept nogil
cdef void pending_arrived(Links_t *l, Pending *p, int status, const uint8_t *body, uint32_t length,
                          EVP_CIPHER_CTX *ctx) noexcept nogil
cdef int reply_next(Reply *reply, uint8_t *page) noexcept nogil
cdef bint links_later(Links_t *l, Work work, void *context) noexcept nogil
cdef void links_flush(Links_t *l, uint32_t peer) noexcept nogil
cdef bint links_peer_lost(Links_t *l, uint32_t peer) noexcept nogil
cdef bint links_peer_reachable(Links_t *l, uint32_t peer) noexcept nogil
cdef int get_page(Links_t *l, uint64_t pool, const uint64_t *oid, uint32_t index, uint8_t *page, int mode) noexcept nogil
cdef void get_pages(Links_t *l, uint64_t pool, Fetch *wanted, uint32_t n, uint8_t *staging) noexcept nogil

cdef bytes peer_certificate(SSL *ssl)


cdef class TlsContext:
    cdef SSL_CTX *context

cdef class Links:
    cdef Links_t *l
    cdef readonly Store store
    cdef object spill               # what 'spilling' points into lives as long as the threads that call it
    cdef bint stopped
    cdef Links_t *live(self) except NULL
    cdef grant(self, uint64_t lend_bytes, bint lock, double borrower_share)
    cdef Peer *peer(self, uint32_t number) except NULL
