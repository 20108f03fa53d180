"""The store's native interface: what links and regions may call. See _store.pyx for the rules."""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from ramster.engine._c.atomic cimport ACQUIRE, RELAXED, RELEASE, load64, store64
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX
from ramster.engine._c.zstd cimport ZSTD_CCtx
from ramster.engine._c.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t
from ramster.engine._running cimport Running

cdef enum:
    PAGE = 4096
    HEADER_BYTES = 40           # EntryHeader
    OID_BYTES = 24              # three u64, in front of the payload of a sparse pool's entry
    FRAME_HEADER_BYTES = 64     # at the start of each segment, here and away
    SEAL_ID_BYTES = 24
    TAG_BYTES = 16
    ENTRY_BYTES_MAX = 40 + 24 + 4096
    ORDINALS_MAX = 4096         # entries of one segment; keeps a directory below 8 KiB
    LIVE_BYTES_MAX = 512        # bitmap of a segment's ordinals
    POOLS_MAX = 4096            # a power of two: see Pool.id
    READERS_MAX = 256           # threads inside the store at one moment
    COUNTER_STRIPES = 8
    HEAD_STRIPES_MAX = 4
    DIRECTORY_HINTED = 0x80000000
    SPILL_PEER = 255            # Segment.peer of what lies in this node's spill file alone
    ROOM_CLASSES = 521          # sizes in units of 8 bytes; the last class is for everything that fits any entry

# Results of page operations. Negative would read as errno; these are outcomes.
cdef enum Result:
    OK = 0
    MISS = 1
    REMOTE = 2                  # the page is on a lender: the reference says where
    LOST = 3                    # its only copy is gone
    CORRUPT = 4                 # the stored bytes fail their checksum: the copy is lost, and said so
    FULL = 5                    # no room within the bounded wait
    NO_POOL = 6
    OUT_OF_RANGE = 7
    NO_MEMORY = 8
    UNREACHABLE = 9             # the lender did not answer within its deadline
    BUSY = 10

cdef enum Codec:
    CODEC_LZ4 = 1
    CODEC_RAW = 2
    CODEC_ZSTD = 3              # in sealed segments alone

cdef enum SegmentState:
    SEG_FREE = 0
    SEG_OPEN = 1
    SEG_SEALED = 2
    SEG_CLEANING = 3
    SEG_SHIPPING = 4
    SEG_REMOTE = 5
    SEG_LOST = 6
    SEG_FREEING = 7             # nothing live; waits in the queue for the lender to be told
    SEG_FREE_SENT = 8           # the lender was told, or is to be told again once it is back

cdef enum:                          # Segment.compacting
    COMPACT_QUEUED = 1
    COMPACT_SENT = 2

cdef enum Counter:
    C_PUTS_REFUSED = 0
    C_CLEANED_SEGMENTS
    C_CLEANED_BYTES
    C_EPHEMERAL_DROPPED
    C_CORRUPT
    C_FILLED                    # live same-filled pages (goes up and down)
    C_SHIPPED_SEGMENTS
    C_PLUGGED                   # puts into room that dead entries had left in a sealed segment
    C_RECOMPRESSED              # pages that left as zstd
    C_RECOMPRESSED_SAVED        # bytes
    C_POOL_BYTES                # pools and their bucket arrays (goes up and down)
    C_TABLE_BYTES               # page-table memory populated (goes up and down)
    C_RAW                       # puts of pages that do not compress
    C_UNTRIED                   # of these, without a try
    COUNTERS

cdef enum Tally:                # counted in the record of the reader, which is one thread's at a time
    T_PUTS = 0
    T_BYTES_COMPRESSED
    T_GETS
    T_GETS_MISSED
    T_LOCAL_GETS
    T_FLUSHES
    T_FLUSHES_FOUND
    TALLIES

cdef packed struct EntryHeader:     # little-endian, docs/store-format.md
    uint16_t length                 # bytes after the header, object id included
    uint8_t codec
    uint8_t flags                   # bit 0: an object id of 24 bytes comes first
    uint32_t index
    uint64_t version
    uint64_t pool
    uint8_t check[16]               # CRC32C over the first 24 bytes and what follows the header, then zeros; the AES-GCM tag once sealed

cdef packed struct ImageHeader:     # of a sealed segment on the wire and on the lender
    uint32_t magic
    uint32_t segment
    uint32_t generation
    uint32_t entries                # ordinals in the directory
    uint32_t data_bytes             # bytes after the directory
    uint32_t flags
    uint8_t seal_id[24]
    uint8_t reserved[16]            # zero

cdef struct RemoteMeta:
    uint8_t seal_id[24]
    uint8_t key[32]
    uint16_t bare                   # its image in the spill file is entries alone, without header and directory
    uint16_t cut                    # live entries that were cut off the spill file: lost
    uint16_t sizes[1]               # per ordinal: size in 8-byte units, DEAD, GONE and CUT bits; 'entries' of them

cdef struct Segment:
    uint32_t lock
    uint32_t state
    uint32_t generation
    uint32_t frame
    uint32_t ephemeral
    uint32_t ordered                # waits in the queue of the shipper: not to be chosen again
    uint32_t entries
    uint32_t live_entries
    uint32_t used_bytes             # of entries, headers and padding included
    uint32_t live_bytes
    uint32_t peer
    uint32_t handle                 # the lender's hint where it lies
    uint32_t next                   # link in the queue of remote segments to free
    uint32_t held_bytes             # of entries, dead ones included, that the lender still has
    uint32_t compacting             # COMPACT_QUEUED, COMPACT_SENT
    uint32_t compact_next           # link in the queue of remote segments to compact
    uint32_t damaged                # entries in it have lost their key or their bytes: cleaning leaves it alone
    uint32_t writers                # puts that have taken room in it, sealed as it is, and have not published yet
    uint32_t spill                  # of a remote one: number of its image in the spill file, and 1; 0: it has none there
    uint32_t spill_bytes            # of that image
    uint64_t touched_ms
    uint64_t opened                 # epoch in which it was opened: a hint that is older is of an earlier use of the id
    RemoteMeta *meta

cdef struct RemoteRef:              # everything that a request for a remote page needs, copied out of the tables
    uint64_t slot
    uint32_t segment
    uint32_t generation
    uint32_t ordinal
    uint32_t peer
    uint32_t handle
    uint32_t spill                  # as in the row
    uint64_t pool
    uint32_t index
    uint32_t sparse
    uint32_t ephemeral
    uint64_t oid[3]
    uint8_t seal_id[24]
    uint8_t key[32]

cdef struct Leaf
cdef struct Object:
    uint64_t oid[3]
    Object *next
    Leaf *leaves

cdef struct Leaf:                   # eight consecutive indices of one object
    Object *object
    Leaf *next                      # in the bucket
    Leaf *after                     # in the object
    Leaf *before
    uint32_t number
    uint32_t used
    uint64_t slots[8]

cdef struct Nodes:                  # leaves and objects of all sparse pools, carved from chunks that stay until the store goes
    uint32_t lock
    uint64_t spare_leaves           # Leaf.next links them
    uint64_t spare_objects
    uint64_t used_leaves
    uint64_t used_objects
    Leaf *leaves
    Object *objects
    void *chunks                    # the first word of each links them
    uint64_t bytes

cdef struct Pool:
    uint64_t id                     # place in Store_t.pools and POOLS_MAX times a number that no pool had before: never used again
    bint ephemeral
    bint dense
    Nodes *nodes
    uint32_t raw_streak             # pages in a row that did not compress
    int fd
    uint64_t pages
    uint64_t *slots
    uint8_t *populated              # per 2 MiB of slots
    pthread_mutex_t lock
    Leaf **leaf_buckets
    Object **object_buckets
    uint64_t buckets                # of each kind, a power of two
    uint64_t leaves

cdef struct Head:
    pthread_mutex_t lock
    uint32_t segment
    uint32_t ephemeral
    uint32_t cleaner                # may use the reserve
    uint8_t *tail                   # where the next entry will go, as a hint
    uint32_t seen_segment           # what store_seal_cold saw last, and since when
    uint32_t seen_bytes
    uint64_t seen_ms
    uint8_t pad[64]

cdef struct Reader:
    uint64_t epoch
    uint64_t tallies[7]

cdef struct Retired:
    uint32_t frame
    uint64_t epoch

cdef struct Room:                   # a hint: where a dead entry left room
    uint64_t epoch                  # readers that entered later cannot have seen it alive
    uint32_t segment
    uint32_t ordinal
    uint32_t next

cdef struct Rooms:                  # by kind (persistent, ephemeral) and size, oldest first
    uint32_t lock
    uint32_t unused
    uint32_t spare                  # unused hints
    uint32_t cursor                 # frame to look at next
    uint64_t safe                   # hints with an older epoch may be used
    uint64_t filled[2][9]           # bit per class that has a hint
    uint32_t first[2][521]
    uint32_t last[2][521]
    Room *hints

cdef struct Gathered:               # one page of an image that is made of others
    uint64_t slot                   # what names it until then
    uint64_t oid[3]
    uint64_t pool
    uint32_t index

cdef struct Gather:
    uint32_t segment                # taken for it
    uint32_t capacity               # ordinals
    uint32_t entries
    uint32_t bytes                  # of them
    RemoteMeta *meta
    Gathered *pages                 # room for 'capacity' of them

cdef struct Layout:                 # where things lie in an image in the spill file
    uint32_t entries
    uint32_t first                  # byte of the first one
    uint32_t bytes                  # of the image
    uint16_t sizes[4096]            # as RemoteMeta.sizes

cdef struct Candidate:
    uint32_t segment
    uint32_t generation
    uint32_t live_bytes
    uint32_t live_entries
    uint64_t age_ms
    uint32_t ephemeral

cdef struct Store_t:
    uint8_t *arena
    uint64_t arena_bytes
    uint32_t segment_bytes
    uint32_t frames
    int arena_fd
    uint32_t locked                 # arena and tables: what is taken later counts too
    Segment *segments
    uint32_t segments_max
    uint32_t segments_used          # ids ever handed out
    uint32_t rows_ready             # rows that are in memory, touched and locked; under frame_lock
    uint32_t *free_ids              # a queue, so that an id rests before it comes back
    uint32_t free_ids_head
    uint32_t free_ids_count
    uint32_t *frame_segment
    pthread_mutex_t clean_lock
    pthread_mutex_t frame_lock
    pthread_cond_t room
    pthread_cond_t clean_wanted
    uint32_t *free_frames
    uint32_t free_count
    Retired *retired                # ring
    uint32_t retired_head
    uint32_t retired_count
    uint32_t reserve_frames
    uint32_t clean_low_frames
    uint32_t pressure_frames        # free frames below which 'pressure_fd' is raised
    int pressure_fd
    uint32_t pressure_raised
    uint32_t plugging               # frames are short: puts go into the room of dead entries
    uint32_t waiting                # puts that wait for a frame
    uint64_t frames_taken           # atomic: by puts, ever
    Rooms rooms
    uint32_t hints
    Nodes nodes
    uint64_t full_wait_ns
    uint64_t epoch
    Reader readers[256]
    Head heads[12]                  # persistent stripes, ephemeral stripes, then the cleaner's two
    uint32_t head_stripes
    Pool *pools[4096]
    uint64_t pools_made             # ever; under pools_lock
    pthread_mutex_t pools_lock
    uint64_t version
    pthread_mutex_t freed_lock
    uint32_t freed_first            # queue of SEG_FREEING segments
    uint32_t freed_last
    uint32_t freed_count
    uint32_t compact_below          # live share of a remote segment, in 1024ths, below which it is compacted; 0: never
    uint32_t compact_first          # queue, under freed_lock too; a segment is in it at most once
    uint32_t compact_last
    uint32_t compact_count
    int freed_fd                    # eventfd: something is in one of the two queues
    uint8_t node_key[32]
    pthread_t cleaner
    bint cleaner_running
    uint32_t stopping
    Running running                 # the node's; deadlines for others are in its time
    uint64_t cut                    # atomic: live entries of all segments that were cut off the spill file
    uint64_t counters[8][32]


cdef int store_put(Store_t *s, uint64_t pool, const uint64_t *oid, uint32_t index, const uint8_t *page,
                   uint64_t wait_ns) noexcept nogil

# Whoever has waited for room in vain makes the next waits short, so that one who goes on writing is refused quickly. Each frame
# that puts get doubles the wait, up to all of it again: then room is made at a pace worth waiting for.
cdef enum:
    AGAIN_MS = 10                   # the short wait


cdef inline bint same_filled(const uint8_t *page, uint32_t *pattern) noexcept nogil:
    """A page of one word of 4 bytes, which takes no room."""
    cdef const uint64_t *words = <const uint64_t *> page
    cdef uint64_t first = words[0]
    cdef int i
    if <uint32_t> first != <uint32_t> (first >> 32):
        return False
    for i in range(1, PAGE // 8):
        if words[i] != first:
            return False
    pattern[0] = <uint32_t> first
    return True


cdef inline uint64_t store_patience(Store_t *s, const uint64_t *in_vain, uint64_t wait_ns) noexcept nogil:
    """How long to wait; in_vain: as store_in_vain left it, 0 at first."""
    cdef uint64_t vain = load64(in_vain, ACQUIRE)
    if vain == 0:
        return wait_ns
    return min(wait_ns, <uint64_t> AGAIN_MS * 1000000 << min(load64(&s.frames_taken, ACQUIRE) + 1 - vain, <uint64_t> 20))


cdef inline void store_in_vain(Store_t *s, uint64_t *in_vain, uint64_t taken) noexcept nogil:
    """There was no room within that time; 'taken': the store's frames_taken at its beginning."""
    if load64(&s.frames_taken, RELAXED) == taken:
        store64(in_vain, taken + 1, RELEASE)


cdef int store_get(Store_t *s, uint64_t pool, const uint64_t *oid, uint32_t index, uint8_t *page, int mode,
                   RemoteRef *ref) noexcept nogil
cdef int store_where(Store_t *s, uint64_t pool, uint32_t index, uint32_t *peer, uint64_t *slot) noexcept nogil
cdef int store_flush(Store_t *s, uint64_t pool, const uint64_t *oid, uint32_t index) noexcept nogil
cdef int store_flush_if(Store_t *s, uint64_t pool, const uint64_t *oid, uint32_t index, uint64_t slot) noexcept nogil
cdef uint64_t store_slot(Store_t *s, uint64_t pool, const uint64_t *oid, uint32_t index) noexcept nogil
cdef int store_create_pool(Store_t *s, bint dense, uint64_t pages, bint ephemeral, uint64_t *id) noexcept nogil
cdef object no_pool(Store_t *s, uint64_t id)
cdef uint64_t store_pool_pages(Store_t *s, uint64_t id) except? 0
cdef int store_destroy_pool(Store_t *s, uint64_t id) noexcept nogil
cdef EVP_CIPHER_CTX *store_unseal_context() noexcept nogil
cdef int store_unseal_begin(const RemoteRef *ref, EVP_CIPHER_CTX *ctx) noexcept nogil
cdef int store_unseal(const RemoteRef *ref, const uint8_t *entry, uint32_t entry_bytes, uint8_t *page,
                      EVP_CIPHER_CTX *ctx) noexcept nogil

cdef int store_ship_begin(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil
cdef uint32_t store_seal_image(Store_t *s, uint32_t segment, uint8_t *out, RemoteMeta **meta,
                               EVP_CIPHER_CTX *ctx, ZSTD_CCtx *zstd) noexcept nogil
cdef void store_ship_commit(Store_t *s, uint32_t segment, uint32_t peer, uint32_t handle, uint32_t spill,
                            RemoteMeta *meta) noexcept nogil
cdef void store_ship_abort(Store_t *s, uint32_t segment) noexcept nogil
cdef void store_touch(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil
cdef bint store_next_freed(Store_t *s, uint32_t *segment, uint32_t *generation, uint32_t *peer, uint32_t *handle,
                           uint32_t *spill) noexcept nogil
cdef void store_freed_told(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer) noexcept nogil
cdef bint store_short_of_frames(Store_t *s) noexcept nogil
cdef uint32_t store_retell(Store_t *s, uint32_t peer) noexcept nogil
cdef uint32_t store_next_compact(Store_t *s, uint32_t *segment, uint32_t *generation, uint32_t *peer, uint8_t *live) noexcept nogil
cdef void store_compacted(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer, uint32_t image_bytes) noexcept nogil
cdef int store_slot_state(Store_t *s, uint64_t slot) noexcept nogil
cdef uint32_t store_spilled_now(Store_t *s, uint32_t segment, RemoteRef *ref, Layout *image) noexcept nogil
cdef bint store_cut(Store_t *s, const RemoteRef *ref, const Layout *image, uint64_t *pages) noexcept nogil
cdef void store_alone(Store_t *s, const uint8_t *peers, uint64_t *pages) noexcept nogil
cdef uint64_t store_peer_lost(Store_t *s, uint32_t peer) noexcept nogil
cdef bint store_segment_lost(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer) noexcept nogil
cdef bint store_fall_back(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer) noexcept nogil
cdef bint store_is_spilled(Store_t *s, uint64_t slot) noexcept nogil
cdef uint32_t store_spilled(Store_t *s, uint32_t segment, uint32_t generation, const uint16_t *ordinals, uint32_t count,
                            uint32_t *offsets, uint16_t *sizes) noexcept nogil
cdef uint32_t store_sparsest(Store_t *s, uint32_t *cursor, Candidate *out, uint32_t most) noexcept nogil
cdef uint32_t store_spilled_live(Store_t *s, uint32_t segment, uint32_t generation, RemoteRef *ref, Layout *image) noexcept nogil
cdef uint32_t store_wasteful(Store_t *s, uint32_t *cursor, uint32_t room_bytes, Candidate *best) noexcept nogil
cdef bint store_least_mirrored(Store_t *s, uint32_t *cursor, const uint8_t *reachable, Candidate *best) noexcept nogil
cdef bint store_next_unmirrored(Store_t *s, uint32_t *cursor, const uint8_t *reachable, RemoteRef *ref, Layout *image) noexcept nogil
cdef uint64_t store_slot_named(uint32_t segment, uint32_t generation, uint32_t ordinal) noexcept nogil
cdef bint store_placed(Store_t *s, const RemoteRef *ref, const Layout *image, uint32_t spill) noexcept nogil
cdef bint store_entry_right(const RemoteRef *ref, const uint8_t *entry, uint32_t entry_bytes, EVP_CIPHER_CTX *ctx) noexcept nogil
cdef bint store_gather_begin(Store_t *s, Gather *g, EVP_CIPHER_CTX *ctx) noexcept nogil
cdef int store_gather_add(Store_t *s, Gather *g, uint8_t *out, const RemoteRef *ref, const uint8_t *entry, uint32_t entry_bytes,
                          EVP_CIPHER_CTX *open_ctx, EVP_CIPHER_CTX *seal_ctx) noexcept nogil
cdef uint32_t store_gather_end(Store_t *s, Gather *g, uint8_t *out) noexcept nogil
cdef void store_gather_commit(Store_t *s, Gather *g, uint32_t spill) noexcept nogil
cdef void store_gather_abort(Store_t *s, Gather *g) noexcept nogil
cdef void store_spare(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil
cdef uint32_t store_unspill(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil
cdef uint32_t store_coldest(Store_t *s, Candidate *out, uint32_t most) noexcept nogil
cdef uint64_t store_census(
    Store_t *s, uint64_t pool, uint64_t first, uint32_t count, const uint8_t *resident, uint64_t *census) noexcept nogil
cdef uint32_t store_seal_open(Store_t *s) noexcept nogil
cdef uint32_t store_seal_cold(Store_t *s, uint64_t age_ms) noexcept nogil
cdef void count(Store_t *s, int counter, uint64_t amount) noexcept nogil

cpdef uint64_t memory_available() except *

cdef class Store:
    cdef Store_t *s
    cdef bint closed
    cdef object __weakref__
    cdef void stop(self)
    cdef Store_t *live(self) except NULL
