"""The store: a log of segments in a fixed arena, with page tables of 8-byte slots.

Covers: arena, segments, entries, page tables (dense and sparse), put, get, flush, the cleaner, sealing and unsealing.
Does not cover: who gets a segment and when (remotify), how it travels (_link), faults (_region).

Rules that everything here keeps:

* A slot is the only word that says where a page is. Publishing is one swap of it; who swaps a value out owns the entry
  that it named, and frees it exactly once.
* A segment is never cleaned, shipped or freed with an entry in it that is still to be published. An append publishes under
  the lock of its head, whose segment is open meanwhile; a put into the room of dead entries of a sealed segment raises the
  row's `writers` until it has published, and take_local and free_local keep away from a row that has any.
* Lock order: clean_lock (one cleaner at a time), head, then pool, then segment (spin), then frame_lock, freed_lock or
  rooms.lock (spin). Nobody sleeps holding one of them.
* A frame, and the room of a dead entry, is used again only when every reader that could have found it has left its epoch.
* So a slot value names one entry within one epoch, and a compare-and-swap against a value read in the same epoch is
  sound. Across epochs the same value may name a later entry in the same place; only values of remote segments, whose
  ordinals are never used again, may be kept that long (an answer from a lender is compared with the slot it was asked for).
* Log-structured cleaning follows Rumble et al., Log-structured Memory for DRAM-based Storage (FAST'14). Above a live share
  of about a half it costs more than it gives, and puts go into the room that dead entries left: Matthews et al., Improving
  the Performance of Log-Structured File Systems with Adaptive Methods (SOSP'97); F2FS calls it threaded logging (FAST'15).
"""
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_AS_STRING
from libc.errno cimport errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset, strerror

from ramster.engine._c.atomic cimport *
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.codec cimport LZ4_compress_default, LZ4_decompress_safe, crc32_iscsi
from ramster.engine._c.crypto cimport (
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_ctrl, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CTRL_GCM_GET_TAG, EVP_CTRL_GCM_SET_TAG, EVP_DecryptFinal_ex,
    EVP_DecryptInit_ex, EVP_DecryptUpdate, EVP_EncryptFinal_ex, EVP_EncryptInit_ex, EVP_EncryptUpdate,
    EVP_aes_256_gcm, EVP_sha256, HMAC, OPENSSL_cleanse, RAND_bytes)
from ramster.engine._c.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, MADV_DONTDUMP, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MAP_SHARED, MFD_CLOEXEC, PROT_READ,
    PROT_WRITE, close, eventfd, eventfd_write, fallocate, ftruncate, madvise, memfd_create, mlock, mmap, munmap, touch_page)
from ramster.engine._c.pthread cimport (
    cond_init_monotonic, cond_wait_until, coarse_ms, now_ns, pthread_cond_broadcast, pthread_cond_signal, pthread_join,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, need_thread)

from ramster.engine._running cimport ran_ns
from ramster.engine._c.zstd cimport ZSTD_CCtx, ZSTD_compressCCtx, ZSTD_isError, zstd_decompress

import fcntl
import os
from pathlib import Path

from ramster import errors
from ramster.engine import own_file
from ramster.engine.layout import ARENA_MARK

# --- slots ---------------------------------------------------------------------------------------------------------
# 63..62 kind | kind 1, same-filled: 61..32 check, 31..0 pattern | kind 2, stored: 61..48 generation, 47..16 segment,
# 15..0 ordinal. Zero: no page.
cdef enum:
    KIND_SHIFT = 62
    KIND_FILLED = 1
    KIND_STORED = 2
    GENERATION_MASK = 0x3fff
    SPARSE_FLAG = 1
    FRAME_MAGIC = 0x47455352        # "RSEG"
    IMAGE_MAGIC = 0x4c455352        # "RSEL"
    SEGMENT_FRAMES_NONE = 0xffffffff
    DIRECTORY_DEAD = 0x8000
    DIRECTORY_OFFSET = 0x7fff
    DIRECTORY_GONE = 0x4000         # in RemoteMeta.sizes: dead, and not even in the image in the spill file any more
    DIRECTORY_CUT = 0x2000          # in RemoteMeta.sizes: not in the spill file any more, where alone it was
    SIZE_UNITS = 0x1fff             # in RemoteMeta.sizes
    DIRECTORY_SIZE_SHIFT = 16
    DIRECTORY_ABSENT = 0xffff
    SLOTS_PER_CHUNK = 262144        # 2 MiB of slots
    ROWS_PER_STEP = 256             # segment rows that are had and locked at a time, half of them ahead of need
    NODES_CHUNK = 65536             # bytes of leaves or objects taken at once
    NODES_AHEAD = 1024              # leaves, and objects, that the cleaner keeps ready
    STALE_LOOKS_MAX = 100000        # looks at one unchanged slot value before it counts as damaged
    PREFETCH_BYTES = 2304           # of the open segment, before a page is compressed into it
    RAW_STREAK = 8                  # pages in a row that did not compress, before the next are looked at first
    RANDOM_DISTINCT = 90
    ZSTD_LEVEL = 1                  # 24 % less than LZ4 on pages of real files; level 3 takes 30 % longer for 1.5 % more
    RECOMPRESS_MIN = 256            # bytes of payload below which there is nothing to win
    CLEANER_RESERVE = 2             # frames only the cleaner may take, so that it can always make progress
    ROOM_MIN = 8                    # units of 8 bytes: less than any page compresses to, with its header
    ROOM_LOOKS = 16                 # hints, and segments, that one put looks at
    ROOM_ORDINALS_MAX = 1024        # entries of a segment that is searched for room: bounds the time under its lock
    ROOM_ARENA_SHARE = 32768        # one hint for so many bytes of arena
    ROOM_HINTS_MIN = 256
    SPARSE_LOOKS = 16384            # rows that one look for sparse images goes over: a millisecond
    AAD_BYTES = 76
    CHECKED_BYTES = 28              # of an entry's header, while it lies here
    ROOM_HINTS_SPARE = 64           # free hints that a search for room begins with

cdef uint64_t SLOT_OF_NOTHING = 0xffffffffffffffffu      # of a kind that there is not


cdef inline uint64_t slot_stored(uint32_t segment, uint32_t generation, uint32_t ordinal) noexcept nogil:
    return (<uint64_t> KIND_STORED << KIND_SHIFT) | (<uint64_t> (generation & GENERATION_MASK) << 48) | \
        (<uint64_t> segment << 16) | ordinal


cdef inline int slot_kind(uint64_t slot) noexcept nogil:
    return <int> (slot >> KIND_SHIFT)


cdef inline uint32_t slot_segment(uint64_t slot) noexcept nogil:
    return <uint32_t> ((slot >> 16) & 0xffffffffu)


cdef inline uint32_t slot_generation(uint64_t slot) noexcept nogil:
    return <uint32_t> ((slot >> 48) & GENERATION_MASK)


cdef inline uint32_t slot_ordinal(uint64_t slot) noexcept nogil:
    return <uint32_t> (slot & 0xffff)


cdef inline uint64_t slot_filled(uint64_t pool, uint32_t index, uint32_t pattern) noexcept nogil:
    """A same-filled page lives in its slot: 30 bits of CRC over key and pattern guard it."""
    cdef uint64_t key[2]
    key[0] = pool
    key[1] = <uint64_t> pattern << 32 | index
    cdef uint64_t check = crc32_iscsi(<unsigned char *> key, 16, 0xffffffffu) & 0x3fffffff
    return (<uint64_t> KIND_FILLED << KIND_SHIFT) | (check << 32) | pattern


cdef inline uint32_t align8(uint32_t n) noexcept nogil:
    return (n + 7) & ~<uint32_t> 7


cdef inline Pool *pool_at(Store_t *s, uint64_t id) noexcept nogil:
    """The pool of this id, or NULL, within an epoch. Its successor in the same place of the table has another id."""
    cdef Pool *pool = <Pool *> load_pointer(<void **> &s.pools[id & (POOLS_MAX - 1)], SEQ_CST)
    return pool if pool != NULL and pool.id == id else NULL


cdef void count(Store_t *s, int counter, uint64_t amount) noexcept nogil:
    add64(&s.counters[sched_getcpu() & (COUNTER_STRIPES - 1)][counter], amount, RELAXED)


cdef uint64_t total(Store_t *s, int counter) noexcept nogil:
    cdef uint64_t result = 0
    cdef int i
    for i in range(COUNTER_STRIPES):
        result += load64(&s.counters[i][counter], RELAXED)
    return result


# The cleaner's bounds on the live share of a segment (worth_cleaning).
cdef double CLEAN_CHEAP = 0.5
cdef double CLEAN_FULLEST = 0.95


cdef uint64_t tallied(Store_t *s, int which) noexcept nogil:
    cdef uint64_t result = 0
    cdef int i
    for i in range(READERS_MAX):
        result += load64(&s.readers[i].tallies[which], RELAXED)
    return result


# --- epochs --------------------------------------------------------------------------------------------------------
# Everything that decides is SEQ_CST: stamping a record, then reading a slot or a pool; swapping a slot or a pool out, then
# reading the epoch and the records. So whoever still saw an entry or a pool is seen by whoever lets go of it, and whoever
# reads the epoch after an entry died reads none that is older than that of a reader who saw it alive.

cdef inline Reader *enter(Store_t *s) noexcept nogil:
    """Claim a reader record and stamp it with the current epoch: no frame retired from now on is reused until leave()."""
    cdef uint32_t i = <uint32_t> (sched_getcpu() * 8)
    cdef uint64_t idle
    cdef Reader *reader
    while True:
        i = (i + 1) & (READERS_MAX - 1)
        reader = &s.readers[i]
        idle = 0
        if load64(&reader.epoch, RELAXED) == 0 and \
                cas64(&reader.epoch, &idle, load64(&s.epoch, SEQ_CST), False, SEQ_CST, RELAXED):
            return reader


cdef inline void tally(Reader *reader, int which, uint64_t amount) noexcept nogil:
    """Between enter() and leave(): no other thread adds to this record."""
    store64(&reader.tallies[which], load64(&reader.tallies[which], RELAXED) + amount, RELAXED)


cdef inline void leave(Reader *reader) noexcept nogil:
    store64(&reader.epoch, 0, RELEASE)


cdef uint64_t oldest_reader(Store_t *s, const Reader *but) noexcept nogil:
    """The oldest epoch that anybody is in, `but` for one who has seen no slot yet."""
    cdef uint64_t oldest = <uint64_t> -1, epoch
    cdef int i
    for i in range(READERS_MAX):
        epoch = load64(&s.readers[i].epoch, SEQ_CST)
        if epoch != 0 and epoch < oldest and &s.readers[i] != but:
            oldest = epoch
    return oldest


cdef void wait_for_readers(Store_t *s) noexcept nogil:
    """Return once every reader that is inside now has left. Bounded: nobody sleeps inside an epoch."""
    cdef uint64_t epoch = add64(&s.epoch, 1, SEQ_CST)
    while oldest_reader(s, NULL) < epoch:
        sched_yield()


# --- frames and segments -------------------------------------------------------------------------------------------

cdef inline uint8_t *frame_at(Store_t *s, uint32_t frame) noexcept nogil:
    return s.arena + <uint64_t> frame * s.segment_bytes


cdef inline uint32_t *directory(Store_t *s, uint32_t frame) noexcept nogil:
    """The table of entries grows down from the end of the frame; entry i is directory()[-1 - i]. A word: 14..0 offset and
    30..16 size in units of 8 bytes, 15 dead, 31 hinted (the room of a dead entry that a hint names)."""
    return <uint32_t *> (s.arena + <uint64_t> (frame + 1) * s.segment_bytes)


cdef inline uint32_t word_bytes(uint32_t word) noexcept nogil:
    return (word >> DIRECTORY_SIZE_SHIFT & DIRECTORY_OFFSET) * 8


cdef inline uint32_t entry_bytes_at(Store_t *s, Segment *row, uint32_t ordinal) noexcept nogil:
    """Bytes that an entry of a local segment takes, padding included: from the directory, since a flipped bit in the
    entry's own length must not reach accounting or copies. Under the row's lock unless it is being cleaned or shipped."""
    return word_bytes(directory(s, row.frame)[-1 - <int64_t> ordinal])


cdef void reclaim_retired(Store_t *s) noexcept nogil:
    """Under frame_lock: frames whose readers have left become free."""
    cdef uint64_t oldest
    if s.retired_count == 0:
        return
    oldest = oldest_reader(s, NULL)
    while s.retired_count and s.retired[s.retired_head].epoch < oldest:
        s.free_frames[s.free_count] = s.retired[s.retired_head].frame
        s.free_count += 1
        s.retired_head = (s.retired_head + 1) % s.frames
        s.retired_count -= 1
    store32(&s.plugging, s.free_count <= s.clean_low_frames, RELAXED)


cdef void retire_frame(Store_t *s, uint32_t frame) noexcept nogil:
    pthread_mutex_lock(&s.frame_lock)
    cdef uint32_t tail = (s.retired_head + s.retired_count) % s.frames
    ASSERT(s.retired_count < s.frames, b"a frame is retired once")
    store32(&s.frame_segment[frame], SEGMENT_FRAMES_NONE, RELEASE)
    s.retired[tail].frame = frame
    s.retired[tail].epoch = add64(&s.epoch, 1, SEQ_CST) - 1
    s.retired_count += 1
    pthread_cond_broadcast(&s.room)
    pthread_mutex_unlock(&s.frame_lock)


cdef void raise_pressure(Store_t *s) noexcept nogil:
    if s.pressure_fd >= 0 and swap32(&s.pressure_raised, 1, ACQ_REL) == 0:
        eventfd_write(s.pressure_fd, 1)


cdef void keep_in_memory(Store_t *s, const void *address, uint64_t bytes) noexcept nogil:
    """What a write or a fault needs must not itself be on a device that this node serves."""
    if load32(&s.locked, RELAXED) and mlock(address, bytes) != 0:
        store32(&s.locked, 0, RELAXED)


cdef void bring_into_memory(Store_t *s, const void *address, uint64_t bytes) noexcept nogil:
    """So that no put meets a page fault there: every page that begins in the range is had and, where allowed, locked."""
    cdef uint64_t place = (<uint64_t> address + 4095) & ~<uint64_t> 4095, end = <uint64_t> address + bytes
    keep_in_memory(s, address, bytes)
    while place < end:
        touch_page(<void *> place)
        place += 4096


cdef void ready_rows(Store_t *s, uint32_t first) noexcept nogil:
    cdef uint64_t rows = min(<uint32_t> ROWS_PER_STEP, s.segments_max - first)
    bring_into_memory(s, &s.segments[first], rows * sizeof(Segment))
    bring_into_memory(s, &s.free_ids[first], rows * 4)


cdef void rows_ahead(Store_t *s) noexcept nogil:
    """The cleaner's: rows for the next segments, without a put that waits for them to be had."""
    cdef uint32_t first
    cdef bint wanted
    pthread_mutex_lock(&s.frame_lock)
    first = s.rows_ready
    wanted = first - s.segments_used < ROWS_PER_STEP // 2 and first < s.segments_max
    pthread_mutex_unlock(&s.frame_lock)
    if wanted:
        ready_rows(s, first)
        pthread_mutex_lock(&s.frame_lock)
        if s.rows_ready == first:
            s.rows_ready = min(first + <uint32_t> ROWS_PER_STEP, s.segments_max)
        pthread_mutex_unlock(&s.frame_lock)


cdef uint32_t take_id(Store_t *s) noexcept nogil:
    """Under frame_lock, when there is one. Fresh ids first, then the one that has rested longest: a stale slot must not match
    by chance."""
    cdef uint32_t segment
    if s.free_ids_count > s.frames or (s.free_ids_count and s.segments_used == s.segments_max):
        segment = s.free_ids[s.free_ids_head]
        s.free_ids_head = (s.free_ids_head + 1) % s.segments_max
        s.free_ids_count -= 1
    else:
        segment = s.segments_used
        if segment == s.rows_ready:         # used up faster than the cleaner came round
            ready_rows(s, segment)
            s.rows_ready = min(segment + <uint32_t> ROWS_PER_STEP, s.segments_max)
        elif segment + ROWS_PER_STEP // 2 == s.rows_ready:
            pthread_cond_signal(&s.clean_wanted)
        store32(&s.segments_used, s.segments_used + 1, RELEASE)
    return segment


cdef uint32_t open_segment(Store_t *s, bint ephemeral, bint cleaner) noexcept nogil:
    """Take a frame and a segment id and make them an open segment; SEGMENT_FRAMES_NONE when there is no frame."""
    cdef uint32_t frame, segment, available
    cdef Segment *row
    cdef ImageHeader *header
    pthread_mutex_lock(&s.frame_lock)
    if s.free_count <= s.clean_low_frames:
        reclaim_retired(s)
    available = s.free_count
    if available <= s.clean_low_frames:
        pthread_cond_signal(&s.clean_wanted)
    if available == 0 or (not cleaner and available <= s.reserve_frames) or \
            (s.free_ids_count == 0 and s.segments_used == s.segments_max):
        store32(&s.plugging, 1, RELAXED)
        pthread_mutex_unlock(&s.frame_lock)
        raise_pressure(s)
        return SEGMENT_FRAMES_NONE
    s.free_count -= 1
    if not cleaner:
        store64(&s.frames_taken, s.frames_taken + 1, RELAXED)
    store32(&s.plugging, s.free_count <= s.clean_low_frames, RELAXED)
    frame = s.free_frames[s.free_count]
    segment = take_id(s)
    store32(&s.frame_segment[frame], segment, RELEASE)
    pthread_mutex_unlock(&s.frame_lock)
    if available - 1 < s.pressure_frames:
        raise_pressure(s)
    row = &s.segments[segment]
    header = <ImageHeader *> frame_at(s, frame)
    memset(header, 0, FRAME_HEADER_BYTES)
    header.magic = FRAME_MAGIC
    header.segment = segment
    header.generation = row.generation
    directory(s, frame)[-1] = 0
    spin_lock(&row.lock)
    ASSERT(row.state == SEG_FREE and row.live_entries == 0 and row.writers == 0, b"an id that is handed out names nothing")
    row.opened = load64(&s.epoch, SEQ_CST)
    store32(&row.frame, frame, RELAXED)
    row.ephemeral = ephemeral
    row.ordered = 0
    row.entries = 0
    row.used_bytes = 0
    row.live_bytes = 0
    row.meta = NULL
    row.damaged = False
    row.spill = row.spill_bytes = 0
    row.touched_ms = 0 if cleaner else coarse_ms()
    store32(&row.state, SEG_OPEN, RELEASE)
    spin_unlock(&row.lock)
    return segment


cdef void release_id(Store_t *s, uint32_t segment) noexcept nogil:
    pthread_mutex_lock(&s.frame_lock)
    s.free_ids[(s.free_ids_head + s.free_ids_count) % s.segments_max] = segment
    s.free_ids_count += 1
    pthread_mutex_unlock(&s.frame_lock)


cdef void free_local(Store_t *s, uint32_t segment) noexcept nogil:
    """Under the row's lock: a local segment without a live entry gives back its frame and its id."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t frame = row.frame
    ASSERT(row.live_entries == 0 and row.live_bytes == 0 and row.writers == 0, b"only a segment without live entries is freed")
    store32(&row.state, SEG_FREE, RELEASE)
    row.generation = (row.generation + 1) & GENERATION_MASK
    store32(&row.frame, SEGMENT_FRAMES_NONE, RELAXED)
    retire_frame(s, frame)
    release_id(s, segment)


cdef void queue_freed(Store_t *s, uint32_t segment) noexcept nogil:
    """Under the row's lock: nothing in this remote segment is live; the lender must hear of it."""
    cdef Segment *row = &s.segments[segment]
    store32(&row.state, SEG_FREEING, RELEASE)
    pthread_mutex_lock(&s.freed_lock)
    row.next = SEGMENT_FRAMES_NONE
    if s.freed_count == 0:
        s.freed_first = segment
    else:
        s.segments[s.freed_last].next = segment
    s.freed_last = segment
    s.freed_count += 1
    pthread_mutex_unlock(&s.freed_lock)
    eventfd_write(s.freed_fd, 1)


cdef void queue_compact(Store_t *s, uint32_t segment) noexcept nogil:
    """Under the row's lock: a remote segment that is mostly dead waits for the order to compact it."""
    cdef Segment *row = &s.segments[segment]
    if row.compacting or row.peer == SPILL_PEER or \
            <uint64_t> row.live_bytes * 1024 >= <uint64_t> row.held_bytes * load32(&s.compact_below, RELAXED):
        return
    row.compacting = COMPACT_QUEUED
    row.compact_next = SEGMENT_FRAMES_NONE
    pthread_mutex_lock(&s.freed_lock)
    if s.compact_count == 0:
        s.compact_first = segment
    else:
        s.segments[s.compact_last].compact_next = segment
    s.compact_last = segment
    s.compact_count += 1
    pthread_mutex_unlock(&s.freed_lock)
    eventfd_write(s.freed_fd, 1)


cdef void free_row(Store_t *s, uint32_t segment) noexcept nogil:
    """Under the row's lock: a segment that lies nowhere any more."""
    cdef Segment *row = &s.segments[segment]
    ASSERT(row.spill == 0, b"whoever frees a segment has given back its room in the spill file")
    if row.meta != NULL:
        OPENSSL_cleanse(row.meta.key, 32)
        free(row.meta)
        row.meta = NULL
    store32(&row.state, SEG_FREE, RELEASE)
    row.live_entries = 0
    row.live_bytes = 0
    row.generation = (row.generation + 1) & GENERATION_MASK
    release_id(s, segment)


cdef void free_entry(Store_t *s, uint64_t slot) noexcept nogil:
    """Account for an entry whose slot value was just swapped out. Exactly once per published value. A value that names no
    live entry was damaged in its page table: it is counted, and what it should have named stays as dead weight."""
    cdef Segment *row
    cdef uint32_t *word
    cdef uint16_t *mark
    cdef uint32_t size = 0, segment = slot_segment(slot), ordinal = slot_ordinal(slot)
    cdef bint found = False
    if slot == 0:
        return
    if slot_kind(slot) == KIND_FILLED:
        count(s, C_FILLED, <uint64_t> -1)
        return
    if slot_kind(slot) != KIND_STORED or segment >= load32(&s.segments_used, ACQUIRE):
        count(s, C_CORRUPT, 1)
        return
    row = &s.segments[segment]
    spin_lock(&row.lock)
    if row.generation == slot_generation(slot) and ordinal < row.entries and row.live_entries > 0:
        if row.state == SEG_REMOTE or row.state == SEG_LOST:
            mark = &row.meta.sizes[ordinal]
            found = (mark[0] & DIRECTORY_DEAD) == 0
            size = <uint32_t> (mark[0] & SIZE_UNITS) * 8
            if found and mark[0] & DIRECTORY_CUT:
                row.meta.cut -= 1
                sub64(&s.cut, 1, RELAXED)
            mark[0] |= DIRECTORY_DEAD
        elif row.frame != SEGMENT_FRAMES_NONE:
            word = &directory(s, row.frame)[-1 - <int64_t> ordinal]
            found = (word[0] & DIRECTORY_DEAD) == 0
            size = word_bytes(word[0])
            word[0] |= DIRECTORY_DEAD
    if not found:
        spin_unlock(&row.lock)
        count(s, C_CORRUPT, 1)
        return
    ASSERT(row.live_bytes >= size, b"what dies was counted as live")
    row.live_entries -= 1
    row.live_bytes -= size
    if row.live_entries == 0:
        if row.state == SEG_SEALED and row.writers == 0:
            free_local(s, segment)
        elif row.state == SEG_REMOTE:
            queue_freed(s, segment)
        elif row.state == SEG_LOST:
            free_row(s, segment)
    elif row.state == SEG_REMOTE:
        queue_compact(s, segment)
    spin_unlock(&row.lock)


cdef void seal_head(Store_t *s, Head *head) noexcept nogil:
    """Under the head's lock: the open segment takes no more entries."""
    cdef Segment *row
    if head.segment == SEGMENT_FRAMES_NONE:
        return
    row = &s.segments[head.segment]
    spin_lock(&row.lock)
    store32(&row.state, SEG_SEALED, RELEASE)
    if not head.cleaner:
        row.touched_ms = coarse_ms()    # what the cleaner copied keeps its age: moving a page does not make it hot
    if row.live_entries == 0:
        free_local(s, head.segment)
    spin_unlock(&row.lock)
    head.segment = SEGMENT_FRAMES_NONE


cdef inline void add_word(Store_t *s, Segment *row, uint32_t word) noexcept nogil:
    """Under the row's lock: one more entry in the directory. A zero word ends it."""
    cdef uint32_t *words = directory(s, row.frame)
    words[-1 - <int64_t> row.entries] = word
    row.entries += 1
    words[-1 - <int64_t> row.entries] = 0


cdef uint8_t *append(Store_t *s, Head *head, uint32_t entry_bytes, uint64_t *slot) noexcept nogil:
    """Under the head's lock: room for an entry in the open segment, counted as live; NULL when there is no frame."""
    cdef uint32_t need = align8(entry_bytes), offset
    cdef Segment *row
    if head.segment != SEGMENT_FRAMES_NONE:
        row = &s.segments[head.segment]
        if row.entries == ORDINALS_MAX or FRAME_HEADER_BYTES + row.used_bytes + need + 4 * (row.entries + 2) > s.segment_bytes:
            seal_head(s, head)
    if head.segment == SEGMENT_FRAMES_NONE:
        head.segment = open_segment(s, head.ephemeral, head.cleaner)
        if head.segment == SEGMENT_FRAMES_NONE:
            return NULL
    row = &s.segments[head.segment]
    offset = FRAME_HEADER_BYTES + row.used_bytes
    spin_lock(&row.lock)
    add_word(s, row, offset >> 3 | need >> 3 << DIRECTORY_SIZE_SHIFT)
    slot[0] = slot_stored(head.segment, row.generation, row.entries - 1)
    row.used_bytes += need
    row.live_entries += 1
    row.live_bytes += need
    spin_unlock(&row.lock)
    store_pointer(<void **> &head.tail, frame_at(s, row.frame) + offset + need, RELAXED)
    return frame_at(s, row.frame) + offset


cdef void unappend(Store_t *s, Head *head, uint32_t entry_bytes) noexcept nogil:
    """Under the head's lock: take back the entry appended last; it was never published."""
    cdef Segment *row = &s.segments[head.segment]
    spin_lock(&row.lock)
    row.entries -= 1
    directory(s, row.frame)[-1 - <int64_t> row.entries] = 0
    row.used_bytes -= align8(entry_bytes)
    row.live_entries -= 1
    row.live_bytes -= align8(entry_bytes)
    spin_unlock(&row.lock)


# --- room in sealed segments ----------------------------------------------------------------------------------------
# A hint names a dead entry whose room may be used. Hints are of bounded number and prove nothing: what a hint names is looked
# at again under the row's lock. A word of the directory is named by one hint at most (its hinted bit), so the epoch that
# a hint carries is not older than the death of what lies there.

cdef void add_hint(Store_t *s, uint32_t kind, uint32_t units, uint32_t segment, uint32_t ordinal, uint64_t epoch,
                   uint32_t *word) noexcept nogil:
    """Under the row's lock."""
    cdef Rooms *rooms = &s.rooms
    cdef uint32_t n, c = min(units, <uint32_t> ROOM_CLASSES - 1)
    cdef Room *room
    spin_lock(&rooms.lock)
    n = rooms.unused
    if n != SEGMENT_FRAMES_NONE:
        room = &rooms.hints[n]
        rooms.unused = room.next
        rooms.spare -= 1
        room.segment = segment
        room.ordinal = ordinal
        room.epoch = epoch
        room.next = SEGMENT_FRAMES_NONE
        if rooms.filled[kind][c >> 6] >> (c & 63) & 1:
            rooms.hints[rooms.last[kind][c]].next = n
        else:
            rooms.first[kind][c] = n
            rooms.filled[kind][c >> 6] |= <uint64_t> 1 << (c & 63)
        rooms.last[kind][c] = n
        word[0] |= DIRECTORY_HINTED
    spin_unlock(&rooms.lock)


cdef inline void unlink_hint(Rooms *rooms, uint32_t kind, uint32_t c, Room *out) noexcept nogil:
    """Under rooms.lock: the oldest hint of a class, which has one."""
    cdef uint32_t n = rooms.first[kind][c]
    out[0] = rooms.hints[n]
    if n == rooms.last[kind][c]:
        rooms.filled[kind][c >> 6] &= ~(<uint64_t> 1 << (c & 63))
    else:
        rooms.first[kind][c] = out.next
    rooms.hints[n].next = rooms.unused
    rooms.unused = n
    rooms.spare += 1


cdef inline uint32_t next_class(Rooms *rooms, uint32_t kind, uint32_t c) noexcept nogil:
    """The first class from c on that has a hint; ROOM_CLASSES when none has."""
    cdef uint64_t bits
    while c < ROOM_CLASSES:
        bits = rooms.filled[kind][c >> 6] >> (c & 63)
        if bits:
            return c + <uint32_t> ctz64(bits)
        c = (c | 63) + 1
    return ROOM_CLASSES


cdef bint take_hint(Store_t *s, const Reader *reader, uint32_t kind, uint32_t units, Room *out) noexcept nogil:
    """The smallest room of at least this size that no reader can be in any more."""
    cdef Rooms *rooms = &s.rooms
    cdef uint32_t c
    cdef bint fresh = False
    cdef uint64_t safe = load64(&rooms.safe, ACQUIRE), oldest
    spin_lock(&rooms.lock)
    c = next_class(rooms, kind, units)
    while c < ROOM_CLASSES:
        if rooms.hints[rooms.first[kind][c]].epoch < safe:
            unlink_hint(rooms, kind, c, out)
            spin_unlock(&rooms.lock)
            return True
        if fresh:
            c = next_class(rooms, kind, c + 1)
            continue
        # Looked at only now and then: it walks all reader records, and it moves the epoch on.
        spin_unlock(&rooms.lock)
        oldest = min(add64(&s.epoch, 1, SEQ_CST), oldest_reader(s, reader))
        fresh = True
        spin_lock(&rooms.lock)
        if oldest > rooms.safe:
            store64(&rooms.safe, oldest, RELEASE)
        safe = rooms.safe
        c = next_class(rooms, kind, units)
    spin_unlock(&rooms.lock)
    return False


cdef bint same_life(Segment *row, const Room *room) noexcept nogil:
    """Under the row's lock: the hint was given in this use of the segment id, and the entries still lie here."""
    return row.opened <= room.epoch and SEG_OPEN <= row.state <= SEG_SHIPPING


cdef void drop_hints(Store_t *s, uint32_t kind) noexcept nogil:
    """Forget the smallest rooms until there are hints to give: the cleaner will find their bytes."""
    cdef Rooms *rooms = &s.rooms
    cdef Room room
    cdef Segment *row
    cdef uint32_t c
    while True:
        spin_lock(&rooms.lock)
        if rooms.spare >= ROOM_HINTS_SPARE:
            spin_unlock(&rooms.lock)
            return
        c = next_class(rooms, kind, 0)
        if c == ROOM_CLASSES:
            kind = 1 - kind
            c = next_class(rooms, kind, 0)
        unlink_hint(rooms, kind, c, &room)
        spin_unlock(&rooms.lock)
        row = &s.segments[room.segment]
        spin_lock(&row.lock)
        if same_life(row, &room):
            directory(s, row.frame)[-1 - <int64_t> room.ordinal] &= ~<uint32_t> DIRECTORY_HINTED
        spin_unlock(&row.lock)


cdef uint32_t hint_rooms(Store_t *s, uint32_t segment, uint32_t least) noexcept nogil:
    """Under the row's lock: make one room of each run of dead entries, and hints for those of at least so many units that
    have none. Returns the units of the largest of these."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t *words = directory(s, row.frame)
    cdef uint64_t epoch = load64(&s.epoch, SEQ_CST)
    cdef uint32_t i, k, word, begin, end, low, high, other, largest = 0
    cdef uint32_t bottom = FRAME_HEADER_BYTES // 8, top = (FRAME_HEADER_BYTES + row.used_bytes) // 8
    for i in range(row.entries):
        word = words[-1 - <int64_t> i]
        if (word & DIRECTORY_DEAD) == 0 or word & DIRECTORY_HINTED or word >> DIRECTORY_SIZE_SHIFT == 0:
            continue
        begin = word & DIRECTORY_OFFSET
        end = begin + (word >> DIRECTORY_SIZE_SHIFT)
        low = bottom
        high = top
        for k in range(row.entries):
            word = words[-1 - <int64_t> k]
            if word & DIRECTORY_DEAD:
                continue
            other = word & DIRECTORY_OFFSET
            if other >= end:
                high = min(high, other)
            else:
                low = max(low, other + (word >> DIRECTORY_SIZE_SHIFT))
        if low > begin or high < end:
            continue            # a damaged directory: nothing may be written there
        if high - low < least:
            continue
        for k in range(row.entries):
            word = words[-1 - <int64_t> k]
            if word & DIRECTORY_DEAD and low <= word & DIRECTORY_OFFSET < high:
                words[-1 - <int64_t> k] = word & (DIRECTORY_DEAD | DIRECTORY_HINTED | DIRECTORY_OFFSET)
        words[-1 - <int64_t> i] = low | DIRECTORY_DEAD | (high - low) << DIRECTORY_SIZE_SHIFT
        add_hint(s, row.ephemeral, high - low, segment, i, epoch, &words[-1 - <int64_t> i])
        largest = max(largest, high - low)
    return largest


cdef bint search_rooms(Store_t *s, uint32_t kind, uint32_t units) noexcept nogil:
    """Look for room in the next sealed segments; True when one that is large enough was found."""
    cdef uint32_t looks, frame, segment, largest = 0
    cdef Segment *row
    drop_hints(s, kind)
    for looks in range(ROOM_LOOKS):
        frame = add32(&s.rooms.cursor, 1, RELAXED) % s.frames
        segment = load32(&s.frame_segment[frame], ACQUIRE)
        if segment == SEGMENT_FRAMES_NONE:
            continue
        row = &s.segments[segment]
        spin_lock(&row.lock)
        if row.state == SEG_SEALED and row.frame == frame and row.ephemeral == kind and not row.damaged and \
                row.used_bytes - row.live_bytes >= 8 * units and row.entries <= ROOM_ORDINALS_MAX:
            largest = hint_rooms(s, segment, max(<uint32_t> ROOM_MIN, units // 4))
        spin_unlock(&row.lock)
        if largest >= units:
            return True
    return False


cdef uint8_t *plug(Store_t *s, const Reader *reader, uint32_t kind, uint32_t entry_bytes, uint64_t *slot) noexcept nogil:
    """Room in a sealed segment where entries died, counted as live; NULL when none was found. The caller writes, publishes and
    calls plugged(): until then nobody cleans, ships or frees the segment."""
    cdef uint32_t need = align8(entry_bytes), units = need >> 3, looks, word, rest, spare
    cdef uint32_t *words
    cdef uint8_t *place = NULL
    cdef Segment *row
    cdef Room room
    cdef bint searched = False
    for looks in range(ROOM_LOOKS):
        if not take_hint(s, reader, kind, units, &room):
            if searched or not search_rooms(s, kind, units):
                return NULL
            searched = True
            continue
        row = &s.segments[room.segment]
        spin_lock(&row.lock)
        if not same_life(row, &room):
            spin_unlock(&row.lock)
            continue
        words = directory(s, row.frame)
        words[-1 - <int64_t> room.ordinal] &= ~<uint32_t> DIRECTORY_HINTED
        word = words[-1 - <int64_t> room.ordinal]
        if row.state != SEG_SEALED or row.damaged or load32(&row.ordered, RELAXED) or not word & DIRECTORY_DEAD or \
                word >> DIRECTORY_SIZE_SHIFT < units:
            spin_unlock(&row.lock)
            continue
        rest = (word >> DIRECTORY_SIZE_SHIFT) - units
        if rest >= ROOM_MIN:
            spare = spare_ordinal(s, row)
            if spare != SEGMENT_FRAMES_NONE:
                words[-1 - <int64_t> spare] = ((word & DIRECTORY_OFFSET) + units) | DIRECTORY_DEAD | rest << DIRECTORY_SIZE_SHIFT
                # Of now, not of the room: the word may have named an entry that died later than what lay in the room, and a
                # reader who saw that one alive must not find another under its ordinal.
                add_hint(s, kind, rest, room.segment, spare, load64(&s.epoch, SEQ_CST), &words[-1 - <int64_t> spare])
        # What is left without a word of its own joins the room of a neighbour that dies.
        words[-1 - <int64_t> room.ordinal] = (word & DIRECTORY_OFFSET) | units << DIRECTORY_SIZE_SHIFT
        row.live_entries += 1
        row.live_bytes += need
        row.writers += 1
        row.touched_ms = coarse_ms()
        slot[0] = slot_stored(room.segment, row.generation, room.ordinal)
        place = frame_at(s, row.frame) + (word & DIRECTORY_OFFSET) * 8
        spin_unlock(&row.lock)
        return place
    return NULL


cdef uint32_t spare_ordinal(Store_t *s, Segment *row) noexcept nogil:
    """Under the row's lock: a word of the directory that names nothing, or a new one where the frame has room for it."""
    cdef uint32_t *words = directory(s, row.frame)
    cdef uint32_t i
    for i in range(row.entries):
        if (words[-1 - <int64_t> i] & ~<uint32_t> DIRECTORY_OFFSET) == DIRECTORY_DEAD:
            return i
    if row.entries == ORDINALS_MAX or FRAME_HEADER_BYTES + row.used_bytes + 4 * (row.entries + 2) > s.segment_bytes:
        return SEGMENT_FRAMES_NONE
    add_word(s, row, DIRECTORY_DEAD)
    return row.entries - 1


cdef void plugged(Store_t *s, uint64_t slot, bint published) noexcept nogil:
    """The end of what plug() began."""
    cdef Segment *row = &s.segments[slot_segment(slot)]
    if not published:
        free_entry(s, slot)
    spin_lock(&row.lock)
    row.writers -= 1
    if row.live_entries == 0 and row.writers == 0:
        free_local(s, slot_segment(slot))
    spin_unlock(&row.lock)


# --- page tables ---------------------------------------------------------------------------------------------------

cdef inline uint64_t oid_hash(const uint64_t *oid) noexcept nogil:
    cdef uint64_t h = oid[0] ^ (oid[1] * 0x9e3779b97f4a7c15ull) ^ (oid[2] * 0xc2b2ae3d27d4eb4full)
    h ^= h >> 32
    h *= 0xd6e8feb86659fd93ull
    return h ^ (h >> 29)


cdef inline uint64_t leaf_hash(const Object *thing, uint32_t number) noexcept nogil:
    cdef uint64_t h = (<uint64_t> <size_t> thing >> 4) * 0x9e3779b97f4a7c15ull + number * 0xd6e8feb86659fd93ull
    return h ^ (h >> 31)


cdef Object *find_object(Pool *pool, const uint64_t *oid) noexcept nogil:
    cdef Object *thing = pool.object_buckets[oid_hash(oid) & (pool.buckets - 1)]
    while thing != NULL and memcmp(thing.oid, oid, OID_BYTES) != 0:
        thing = thing.next
    return thing


cdef Leaf *find_leaf(Pool *pool, const Object *thing, uint32_t number) noexcept nogil:
    cdef Leaf *leaf = pool.leaf_buckets[leaf_hash(thing, number) & (pool.buckets - 1)]
    while leaf != NULL and not (leaf.object == thing and leaf.number == number):
        leaf = leaf.next
    return leaf


cdef int grow_nodes(Store_t *s, bint leaves) noexcept nogil:
    """One more chunk of leaves or objects, touched and locked; -1 without memory."""
    cdef Nodes *nodes = &s.nodes
    cdef uint8_t *chunk = <uint8_t *> mmap(NULL, NODES_CHUNK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    cdef uint32_t size = sizeof(Leaf) if leaves else sizeof(Object), at = sizeof(void *)
    if <void *> chunk == MAP_FAILED:
        return -1
    keep_in_memory(s, chunk, NODES_CHUNK)
    memset(chunk, 0, NODES_CHUNK)
    spin_lock(&nodes.lock)
    (<void **> chunk)[0] = nodes.chunks
    nodes.chunks = chunk
    nodes.bytes += NODES_CHUNK
    while at + size <= NODES_CHUNK:
        if leaves:
            (<Leaf *> (chunk + at)).next = nodes.leaves
            nodes.leaves = <Leaf *> (chunk + at)
            nodes.spare_leaves += 1
        else:
            (<Object *> (chunk + at)).next = nodes.objects
            nodes.objects = <Object *> (chunk + at)
            nodes.spare_objects += 1
        at += size
    spin_unlock(&nodes.lock)
    return 0


cdef void grow_ahead(Store_t *s) noexcept nogil:
    """So that no put waits for memory: the cleaner keeps nodes ready, the more the more are in use."""
    cdef Nodes *nodes = &s.nodes
    cdef bint leaves, objects
    while True:
        spin_lock(&nodes.lock)
        leaves = nodes.chunks != NULL and nodes.spare_leaves < max(<uint64_t> NODES_AHEAD, nodes.used_leaves // 8)
        objects = nodes.chunks != NULL and nodes.spare_objects < max(<uint64_t> NODES_AHEAD, nodes.used_objects // 8)
        spin_unlock(&nodes.lock)
        if not leaves and not objects or grow_nodes(s, leaves) != 0:
            return


cdef Leaf *take_leaf(Store_t *s) noexcept nogil:
    cdef Nodes *nodes = &s.nodes
    cdef Leaf *leaf
    cdef bint low
    while True:
        spin_lock(&nodes.lock)
        leaf = nodes.leaves
        if leaf != NULL:
            nodes.leaves = leaf.next
            nodes.spare_leaves -= 1
            nodes.used_leaves += 1
        low = nodes.spare_leaves < NODES_AHEAD // 2
        spin_unlock(&nodes.lock)
        if low:
            pthread_cond_signal(&s.clean_wanted)
        if leaf != NULL:
            memset(leaf, 0, sizeof(Leaf))
            return leaf
        if grow_nodes(s, True) != 0:        # used up faster than the cleaner came round
            return NULL


cdef Object *take_object(Store_t *s) noexcept nogil:
    cdef Nodes *nodes = &s.nodes
    cdef Object *thing
    cdef bint low
    while True:
        spin_lock(&nodes.lock)
        thing = nodes.objects
        if thing != NULL:
            nodes.objects = thing.next
            nodes.spare_objects -= 1
            nodes.used_objects += 1
        low = nodes.spare_objects < NODES_AHEAD // 2
        spin_unlock(&nodes.lock)
        if low:
            pthread_cond_signal(&s.clean_wanted)
        if thing != NULL:
            memset(thing, 0, sizeof(Object))
            return thing
        if grow_nodes(s, False) != 0:
            return NULL


cdef inline void give_leaf(Nodes *nodes, Leaf *leaf) noexcept nogil:
    spin_lock(&nodes.lock)
    leaf.next = nodes.leaves
    nodes.leaves = leaf
    nodes.spare_leaves += 1
    nodes.used_leaves -= 1
    spin_unlock(&nodes.lock)


cdef inline void give_object(Nodes *nodes, Object *thing) noexcept nogil:
    spin_lock(&nodes.lock)
    thing.next = nodes.objects
    nodes.objects = thing
    nodes.spare_objects += 1
    nodes.used_objects -= 1
    spin_unlock(&nodes.lock)


cdef int grow_buckets(Store_t *s, Pool *pool) noexcept nogil:
    cdef uint64_t buckets = pool.buckets * 2, i, b
    cdef Leaf **leaves = <Leaf **> calloc(buckets, sizeof(Leaf *))
    cdef Object **objects = <Object **> calloc(buckets, sizeof(Object *))
    cdef Leaf *leaf
    cdef Leaf *next_leaf
    cdef Object *thing
    cdef Object *next_thing
    if leaves == NULL or objects == NULL:
        free(leaves)
        free(objects)
        return -1
    for i in range(pool.buckets):
        leaf = pool.leaf_buckets[i]
        while leaf != NULL:
            next_leaf = leaf.next
            b = leaf_hash(leaf.object, leaf.number) & (buckets - 1)
            leaf.next = leaves[b]
            leaves[b] = leaf
            leaf = next_leaf
        thing = pool.object_buckets[i]
        while thing != NULL:
            next_thing = thing.next
            b = oid_hash(thing.oid) & (buckets - 1)
            thing.next = objects[b]
            objects[b] = thing
            thing = next_thing
    free(pool.leaf_buckets)
    free(pool.object_buckets)
    pool.leaf_buckets = leaves
    pool.object_buckets = objects
    count(s, C_POOL_BYTES, (buckets - pool.buckets) * 2 * sizeof(void *))
    pool.buckets = buckets
    return 0


cdef void grow_tables(Store_t *s) noexcept nogil:
    """The cleaner's share of sparse pools: chains of about one, without a put that waits for it to be allocated."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool
    cdef uint32_t i
    for i in range(POOLS_MAX):
        pool = pool_at(s, i)
        if pool != NULL and not pool.dense:
            pthread_mutex_lock(&pool.lock)
            if pool.leaves >= pool.buckets:
                grow_buckets(s, pool)
            pthread_mutex_unlock(&pool.lock)
    leave(reader)


cdef Leaf *make_leaf(Store_t *s, Pool *pool, const uint64_t *oid, uint32_t number) noexcept nogil:
    """Under the pool's lock: the leaf for these eight indices, made when absent; NULL without memory."""
    cdef Object *thing = find_object(pool, oid)
    cdef Leaf *leaf
    cdef uint64_t b
    if thing != NULL:
        leaf = find_leaf(pool, thing, number)
        if leaf != NULL:
            return leaf
    if pool.leaves >= 4 * pool.buckets:
        grow_buckets(s, pool)   # without memory the chains get longer, nothing else
    leaf = take_leaf(s)
    if leaf == NULL:
        return NULL
    if thing == NULL:
        thing = take_object(s)
        if thing == NULL:
            give_leaf(pool.nodes, leaf)
            return NULL
        memcpy(thing.oid, oid, OID_BYTES)
        b = oid_hash(oid) & (pool.buckets - 1)
        thing.next = pool.object_buckets[b]
        pool.object_buckets[b] = thing
    leaf.object = thing
    leaf.number = number
    b = leaf_hash(thing, number) & (pool.buckets - 1)
    leaf.next = pool.leaf_buckets[b]
    pool.leaf_buckets[b] = leaf
    leaf.after = thing.leaves
    if leaf.after != NULL:
        leaf.after.before = leaf
    thing.leaves = leaf
    pool.leaves += 1
    return leaf


cdef void drop_leaf(Pool *pool, Leaf *leaf) noexcept nogil:
    """Under the pool's lock: unlink and free an empty leaf, and its object when that was the last one."""
    cdef Object *thing = leaf.object
    cdef uint64_t b = leaf_hash(thing, leaf.number) & (pool.buckets - 1)
    cdef Leaf **link = &pool.leaf_buckets[b]
    cdef Object **object_link
    while link[0] != leaf:
        link = &link[0].next
    link[0] = leaf.next
    if leaf.before != NULL:
        leaf.before.after = leaf.after
    else:
        thing.leaves = leaf.after
    if leaf.after != NULL:
        leaf.after.before = leaf.before
    give_leaf(pool.nodes, leaf)
    pool.leaves -= 1
    if thing.leaves == NULL:
        object_link = &pool.object_buckets[oid_hash(thing.oid) & (pool.buckets - 1)]
        while object_link[0] != thing:
            object_link = &object_link[0].next
        object_link[0] = thing.next
        give_object(pool.nodes, thing)


cdef int populate(Store_t *s, Pool *pool, uint64_t index) noexcept nogil:
    """Reserve the 2 MiB of slots around an index: a full tmpfs gives ENOSPC here instead of SIGBUS at the store."""
    cdef uint64_t chunk = index // SLOTS_PER_CHUNK
    cdef uint64_t first = chunk * SLOTS_PER_CHUNK * 8, length = SLOTS_PER_CHUNK * 8
    cdef int result = 0
    if first + length > pool.pages * 8:
        length = pool.pages * 8 - first
    pthread_mutex_lock(&pool.lock)
    if not pool.populated[chunk]:
        result = fallocate(pool.fd, 0, <long> first, <long> length)
        if result == 0:
            bring_into_memory(s, &pool.slots[chunk * SLOTS_PER_CHUNK], length)
            count(s, C_TABLE_BYTES, length)
            store8(&pool.populated[chunk], 1, RELEASE)
    pthread_mutex_unlock(&pool.lock)
    return result


cdef int store_populate(Store_t *s, uint64_t pool_id, uint64_t index) noexcept nogil:
    """Have the 2 MiB of slots around an index now, so that no put to them asks the kernel for memory."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, pool_id)
    cdef int result = NO_POOL
    if pool != NULL:
        if not pool.dense or index >= pool.pages:
            result = OUT_OF_RANGE
        else:
            result = OK if populate(s, pool, index) == 0 else NO_MEMORY
    leave(reader)
    return result


cdef inline uint64_t *dense_slot(Pool *pool, uint64_t index) noexcept nogil:
    """The slot, or NULL beyond the end and where nothing near the index was ever put."""
    if index >= pool.pages or not load8(&pool.populated[index // SLOTS_PER_CHUNK], ACQUIRE):
        return NULL
    return &pool.slots[index]


cdef uint64_t read_slot(Pool *pool, const uint64_t *oid, uint32_t index) noexcept nogil:
    cdef uint64_t *slot
    cdef uint64_t value = 0
    cdef Object *thing
    cdef Leaf *leaf
    if pool.dense:
        slot = dense_slot(pool, index)
        return load64(slot, SEQ_CST) if slot != NULL else 0
    pthread_mutex_lock(&pool.lock)
    thing = find_object(pool, oid)
    if thing != NULL:
        leaf = find_leaf(pool, thing, index >> 3)
        if leaf != NULL:
            value = leaf.slots[index & 7]
    pthread_mutex_unlock(&pool.lock)
    return value


cdef int publish(Store_t *s, Pool *pool, const uint64_t *oid, uint32_t index, uint64_t value, uint64_t *old) noexcept nogil:
    """Swap a new value in; the caller frees the old one. A value of zero is for clear() only."""
    cdef Leaf *leaf
    if pool.dense:
        if not load8(&pool.populated[index // SLOTS_PER_CHUNK], ACQUIRE) and populate(s, pool, index) != 0:
            return NO_MEMORY
        old[0] = swap64(&pool.slots[index], value, SEQ_CST)
        return OK
    pthread_mutex_lock(&pool.lock)
    leaf = make_leaf(s, pool, oid, index >> 3)
    if leaf == NULL:
        pthread_mutex_unlock(&pool.lock)
        return NO_MEMORY
    old[0] = leaf.slots[index & 7]
    leaf.slots[index & 7] = value
    if old[0] == 0:
        leaf.used += 1
    pthread_mutex_unlock(&pool.lock)
    return OK


cdef bint replace(Pool *pool, const uint64_t *oid, uint32_t index, uint64_t expected, uint64_t value) noexcept nogil:
    """Compare and swap: the cleaner, an exclusive get and a drop lose to whoever was here first."""
    cdef uint64_t *slot
    cdef Object *thing
    cdef Leaf *leaf
    cdef bint done = False
    if pool.dense:
        slot = dense_slot(pool, index)
        return slot != NULL and cas64(slot, &expected, value, False, SEQ_CST, ACQUIRE)
    pthread_mutex_lock(&pool.lock)
    thing = find_object(pool, oid)
    if thing != NULL:
        leaf = find_leaf(pool, thing, index >> 3)
        if leaf != NULL and leaf.slots[index & 7] == expected:
            leaf.slots[index & 7] = value
            done = True
            if value == 0:
                leaf.used -= 1
                if leaf.used == 0:
                    drop_leaf(pool, leaf)
    pthread_mutex_unlock(&pool.lock)
    return done


cdef uint64_t clear(Pool *pool, const uint64_t *oid, uint32_t index) noexcept nogil:
    """Swap the slot to empty; returns what it held, which the caller frees."""
    cdef uint64_t value
    cdef uint64_t *slot
    if pool.dense:
        slot = dense_slot(pool, index)
        if slot == NULL or load64(slot, RELAXED) == 0:
            return 0
        return swap64(slot, 0, SEQ_CST)
    while True:
        value = read_slot(pool, oid, index)
        if value == 0 or replace(pool, oid, index, value, 0):
            return value


# --- put -----------------------------------------------------------------------------------------------------------

cdef inline Head *head_of(Store_t *s, const Pool *pool) noexcept nogil:
    return &s.heads[(HEAD_STRIPES_MAX if pool.ephemeral else 0) + <uint32_t> sched_getcpu() % s.head_stripes]


cdef inline uint64_t expect(Store_t *s, Pool *pool, uint32_t index) noexcept nogil:
    """What a put to a dense pool is about to replace, its row on the way into the cache."""
    cdef uint64_t *slot = dense_slot(pool, index)
    cdef uint64_t value = load64(slot, RELAXED) if slot != NULL else 0
    if slot_kind(value) != KIND_STORED or slot_segment(value) >= load32(&s.segments_used, RELAXED):
        return 0
    prefetch(&s.segments[slot_segment(value)], 1)
    return value


cdef inline void expect_more(Store_t *s, uint64_t value) noexcept nogil:
    """Now its word in the directory."""
    cdef uint32_t frame
    if value:
        frame = load32(&s.segments[slot_segment(value)].frame, RELAXED)
        if frame < s.frames:
            prefetch(directory(s, frame) - 1 - slot_ordinal(value), 1)


cdef inline uint32_t entry_crc(EntryHeader *header, const uint8_t *body) noexcept nogil:
    cdef uint32_t crc = crc32_iscsi(<unsigned char *> header, HEADER_BYTES - TAG_BYTES, 0xffffffffu)
    return crc32_iscsi(<unsigned char *> body, header.length, crc)


cdef inline void set_crc(EntryHeader *header, uint32_t crc) noexcept nogil:
    memset(header.check, 0, TAG_BYTES)
    memcpy(header.check, &crc, 4)


cdef bint looks_random(const uint8_t *page) noexcept nogil:
    """Bytes drawn all over the page are nearly all different: of 132 random ones 103 are, give or take four; of text or
    machine code 40 to 75."""
    cdef uint64_t seen[4]
    cdef int i
    seen[0] = seen[1] = seen[2] = seen[3] = 0
    for i in range(0, PAGE, 31):
        seen[page[i] >> 6] |= <uint64_t> 1 << (page[i] & 63)
    return popcount64(seen[0]) + popcount64(seen[1]) + popcount64(seen[2]) + popcount64(seen[3]) >= RANDOM_DISTINCT


cdef int compress(Store_t *s, Pool *pool, const uint8_t *page, uint8_t *target, uint64_t version) noexcept nogil:
    """Bytes of the LZ4 block; PAGE: the page as it is, since less than an eighth would be saved.

    A pool whose last pages did not compress is not tried with pages that look random either, but for one of eight: bytes can
    look random and repeat all the same. The first that compresses ends it. Other pages pay a load for this.
    """
    cdef uint32_t streak = load32(&pool.raw_streak, RELAXED)
    cdef int size
    if streak >= RAW_STREAK and version & 7 and looks_random(page):
        count(s, C_UNTRIED, 1)
    else:
        size = LZ4_compress_default(<const char *> page, <char *> target, PAGE, PAGE * 7 // 8)
        if size > 0:
            if streak:
                store32(&pool.raw_streak, 0, RELAXED)
            return size
        if streak < RAW_STREAK:
            store32(&pool.raw_streak, streak + 1, RELAXED)
    memcpy(target, page, PAGE)
    count(s, C_RAW, 1)
    return PAGE


cdef int drop_ephemeral(Store_t *s) noexcept nogil:
    """Drop the ephemeral segment that was used least recently; 0 when one was dropped."""
    cdef uint32_t f, best = SEGMENT_FRAMES_NONE, segment, ordinal, dropped = 0
    cdef uint64_t oldest = <uint64_t> -1, slot
    cdef Segment *row
    cdef EntryHeader *header
    cdef Reader *reader = enter(s)
    cdef Pool *pool
    cdef uint64_t oid[3]
    for f in range(s.frames):
        segment = load32(&s.frame_segment[f], ACQUIRE)
        if segment == SEGMENT_FRAMES_NONE:
            continue
        row = &s.segments[segment]
        spin_lock(&row.lock)
        if row.ephemeral and not row.damaged and row.state == SEG_SEALED and row.writers == 0 and row.touched_ms < oldest:
            oldest = row.touched_ms
            best = segment
        spin_unlock(&row.lock)
    if best == SEGMENT_FRAMES_NONE or not take_local(s, best, SEG_CLEANING):
        leave(reader)
        return -1
    row = &s.segments[best]
    if not row.ephemeral:       # freed and used again for persistent pages since the look
        give_back(s, best)
        leave(reader)
        return -1
    for ordinal in range(row.entries):
        spin_lock(&row.lock)
        header = entry_at(s, row, ordinal)
        spin_unlock(&row.lock)
        if header == NULL:
            continue
        pool = pool_at(s, header.pool)
        if pool == NULL:
            continue
        entry_oid(header, oid)
        slot = slot_stored(best, row.generation, ordinal)
        if replace(pool, oid, header.index, slot, 0):
            free_entry(s, slot)
            dropped += 1
    spin_lock(&row.lock)
    row.damaged = row.live_entries > 0      # never twice: a put must not loop on a segment that cannot be emptied
    spin_unlock(&row.lock)
    count(s, C_EPHEMERAL_DROPPED, dropped)
    give_back(s, best)
    leave(reader)
    return 0


cdef bint wait_for_room(Store_t *s, uint64_t deadline_ns) noexcept nogil:
    """Sleep until a frame may have become free; False once the deadline, in time of ran_ns(), has passed. Never inside an
    epoch."""
    if ran_ns(&s.running) >= deadline_ns:
        return False
    pthread_mutex_lock(&s.frame_lock)
    reclaim_retired(s)
    if s.free_count <= s.reserve_frames:
        s.waiting += 1
        pthread_cond_signal(&s.clean_wanted)
        # A retired frame becomes free when a reader leaves, which signals nobody: look again soon.
        cond_wait_until(&s.room, &s.frame_lock, now_ns() + 2000000)
        s.waiting -= 1
        reclaim_retired(s)
    pthread_mutex_unlock(&s.frame_lock)
    return True


cdef void refuse(Store_t *s, Pool *pool, const uint64_t *oid, uint32_t index) noexcept nogil:
    """Rule 3 of tmem, see store_put."""
    if pool.ephemeral:
        free_entry(s, clear(pool, oid, index))
    count(s, C_PUTS_REFUSED, 1)


cdef int store_put(Store_t *s, uint64_t pool_id, const uint64_t *oid, uint32_t index, const uint8_t *page,
                   uint64_t wait_ns) noexcept nogil:
    """Compress a page and publish it: OK, and from that moment on it is what the key holds. Any other result: nothing was
    stored. FULL after wait_ns without room in the arena, which a same-filled page never needs; NO_MEMORY for a page table.

    A refused put to a persistent pool leaves the key as it is: an older page stays readable all the time, before, during and
    after the call. Whoever must not have it taken for the newer one flushes the key. In an ephemeral pool the older page goes,
    as it may at any time: a cache whose user has moved on must not give out what was before.
    """
    cdef uint8_t buffer[ENTRY_BYTES_MAX]
    cdef EntryHeader *header = <EntryHeader *> buffer
    cdef uint8_t *body = buffer + HEADER_BYTES
    cdef uint8_t *place
    cdef uint32_t pattern = 0, prefix = 0
    cdef int size, i, result = OK
    cdef uint64_t slot = 0, old = 0, deadline = 0, expected = 0
    cdef Reader *reader
    cdef Pool *pool
    cdef Head *head
    cdef bint filled = same_filled(page, &pattern)
    cdef bint short_of_frames = False

    reader = enter(s)
    pool = pool_at(s, pool_id)
    if pool == NULL or (pool.dense and index >= pool.pages):
        leave(reader)
        return NO_POOL if pool == NULL else OUT_OF_RANGE
    if not pool.dense:
        prefix = OID_BYTES
        memcpy(body, oid, OID_BYTES)
    if filled:
        slot = slot_filled(pool_id, index, pattern)
        count(s, C_FILLED, 1)       # before it shows, so that a racing flush finds it counted
        result = publish(s, pool, oid, index, slot, &old)
        if result == OK:
            free_entry(s, old)
            tally(reader, T_PUTS, 1)
        else:
            count(s, C_FILLED, <uint64_t> -1)
            refuse(s, pool, oid, index)
        leave(reader)
        return result

    header.version = add64(&s.version, 1, RELAXED)
    # Slot, row and directory of the entry that dies here are far apart in memory: each is fetched while something else is done.
    if pool.dense:
        prefetch(&pool.slots[index], 1)
    # So is the place where the entry will go: the next atomic operation would wait for its lines to come.
    place = <uint8_t *> load_pointer(<void **> &head_of(s, pool).tail, RELAXED)
    for i in range(0, PREFETCH_BYTES, 64):
        prefetch(<const void *> (<size_t> place + i), 1)     # a head without a segment has none yet
    size = compress(s, pool, page, body + prefix, header.version)
    if pool.dense:
        expected = expect(s, pool, index)
    header.codec = CODEC_RAW if size == PAGE else CODEC_LZ4
    header.length = <uint16_t> (prefix + size)
    header.flags = SPARSE_FLAG if prefix else 0
    header.index = index
    header.pool = pool_id
    set_crc(header, entry_crc(header, body))
    expect_more(s, expected)

    while True:
        if short_of_frames or load32(&s.plugging, RELAXED):
            place = plug(s, reader, pool.ephemeral, HEADER_BYTES + header.length, &slot)
            if place != NULL:
                memcpy(place, buffer, HEADER_BYTES + header.length)
                result = publish(s, pool, oid, index, slot, &old)
                plugged(s, slot, result == OK)
                count(s, C_PLUGGED, result == OK)
                break
        head = head_of(s, pool)
        pthread_mutex_lock(&head.lock)
        place = append(s, head, HEADER_BYTES + header.length, &slot)
        if place != NULL:
            memcpy(place, buffer, HEADER_BYTES + header.length)
            result = publish(s, pool, oid, index, slot, &old)
            if result != OK:
                unappend(s, head, HEADER_BYTES + header.length)
        pthread_mutex_unlock(&head.lock)
        if place != NULL:
            break
        leave(reader)
        short_of_frames = True
        if deadline == 0:
            deadline = ran_ns(&s.running) + wait_ns
        if drop_ephemeral(s) != 0 and not wait_for_room(s, deadline):
            result = FULL
        reader = enter(s)
        pool = pool_at(s, pool_id)
        if pool == NULL:
            leave(reader)       # destroyed meanwhile
            return NO_POOL
        if result == FULL:
            break
    if result == OK:
        free_entry(s, old)
        tally(reader, T_PUTS, 1)
        tally(reader, T_BYTES_COMPRESSED, <uint64_t> size)
    else:
        refuse(s, pool, oid, index)
    leave(reader)
    return result


# --- get -----------------------------------------------------------------------------------------------------------

cdef inline EntryHeader *entry_at(Store_t *s, Segment *row, uint32_t ordinal) noexcept nogil:
    """An entry of a local segment, or NULL when it is marked dead or its word in the directory is damaged."""
    cdef uint32_t word = directory(s, row.frame)[-1 - <int64_t> ordinal]
    cdef uint32_t offset = (word & DIRECTORY_OFFSET) * 8
    if word & DIRECTORY_DEAD or word_bytes(word) < HEADER_BYTES or offset + word_bytes(word) > s.segment_bytes:
        return NULL
    return <EntryHeader *> (frame_at(s, row.frame) + offset)


cdef inline void entry_oid(EntryHeader *header, uint64_t *oid) noexcept nogil:
    if header.flags & SPARSE_FLAG:
        memcpy(oid, <uint8_t *> header + HEADER_BYTES, OID_BYTES)
    else:
        memset(oid, 0, OID_BYTES)


cdef int decode(EntryHeader *header, const uint8_t *body, const RemoteRef *expected, uint8_t *page) noexcept nogil:
    """Key, length and codec must be what the slot promised; then uncompress."""
    cdef uint32_t prefix = OID_BYTES if header.flags & SPARSE_FLAG else 0
    if header.index != expected.index or header.pool != expected.pool or (prefix != 0) != (expected.sparse != 0) or \
            header.length < prefix or header.length > prefix + PAGE:
        return CORRUPT
    if prefix and memcmp(body, expected.oid, OID_BYTES) != 0:
        return CORRUPT
    if header.codec == CODEC_RAW and header.length == prefix + PAGE:
        memcpy(page, body + prefix, PAGE)
        return OK
    if header.codec == CODEC_LZ4 and LZ4_decompress_safe(
            <const char *> body + prefix, <char *> page, <int> (header.length - prefix), PAGE) == PAGE:
        return OK
    if header.codec == CODEC_ZSTD and zstd_decompress(page, PAGE, body + prefix, header.length - prefix) == PAGE:
        return OK
    return CORRUPT


cdef inline bint entry_intact(EntryHeader *header, uint32_t room) noexcept nogil:
    """The length fits the room that the directory gives the entry, and the checksum is right."""
    return align8(HEADER_BYTES + header.length) == room and \
        entry_crc(header, <const uint8_t *> header + HEADER_BYTES) == (<uint32_t *> header.check)[0]


cdef int decode_local(const uint8_t *place, uint32_t room, const RemoteRef *expected, uint8_t *page) noexcept nogil:
    cdef EntryHeader *header = <EntryHeader *> place
    if not entry_intact(header, room):
        return CORRUPT
    return decode(header, place + HEADER_BYTES, expected, page)


cdef inline bint is_cut(const Segment *row, uint32_t ordinal) noexcept nogil:
    """Under the lock of a remote segment: this entry of it was cut off the spill file, and is nowhere else."""
    return row.meta.cut != 0 and row.meta.sizes[ordinal] & DIRECTORY_CUT != 0


cdef int store_get(Store_t *s, uint64_t pool_id, const uint64_t *oid, uint32_t index, uint8_t *page, int mode,
                   RemoteRef *ref) noexcept nogil:
    """Uncompress a page into 'page'. REMOTE fills 'ref' and touches nothing else. mode: 1 remove, 0 remove if the pool
    is ephemeral, -1 keep."""
    cdef uint64_t slot
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, pool_id)
    cdef Segment *row
    cdef uint8_t *place
    cdef uint32_t pattern, state, room
    cdef uint32_t *words
    cdef uint64_t before = 0
    cdef int i, result, looks = 0
    cdef bint remove
    if pool == NULL or (pool.dense and index >= pool.pages):
        leave(reader)
        return NO_POOL if pool == NULL else OUT_OF_RANGE
    ref.pool = pool_id
    ref.index = index
    ref.sparse = not pool.dense
    ref.ephemeral = pool.ephemeral
    if not pool.dense:
        memcpy(ref.oid, oid, OID_BYTES)
    remove = mode == 1 or (mode == 0 and pool.ephemeral)
    tally(reader, T_GETS, 1)
    while True:
        slot = read_slot(pool, oid, index)
        ref.slot = slot
        if slot == 0:
            tally(reader, T_GETS_MISSED, 1)
            leave(reader)
            return MISS
        if slot_kind(slot) == KIND_FILLED:
            pattern = <uint32_t> slot
            result = OK if slot == slot_filled(pool_id, index, pattern) else CORRUPT
            if result == CORRUPT:
                count(s, C_CORRUPT, 1)
            else:
                words = <uint32_t *> page
                if pattern == 0:
                    memset(page, 0, PAGE)
                else:
                    for i in range(PAGE // 4):
                        words[i] = pattern
            if result != OK or not remove:
                break
            if replace(pool, oid, index, slot, 0):
                free_entry(s, slot)
                break
            continue
        # A value that moved while we looked changes; one that keeps naming nothing was damaged in memory.
        looks = looks + 1 if slot == before else 0
        before = slot
        if slot_kind(slot) != KIND_STORED or slot_segment(slot) >= load32(&s.segments_used, ACQUIRE) or looks > STALE_LOOKS_MAX:
            count(s, C_CORRUPT, 1)
            result = CORRUPT
            break
        row = &s.segments[slot_segment(slot)]
        spin_lock(&row.lock)
        if row.generation != slot_generation(slot) or slot_ordinal(slot) >= row.entries:
            spin_unlock(&row.lock)
            continue
        state = row.state
        row.touched_ms = coarse_ms()
        if state == SEG_REMOTE and not is_cut(row, slot_ordinal(slot)):
            ref.segment = slot_segment(slot)
            ref.generation = row.generation
            ref.ordinal = slot_ordinal(slot)
            ref.peer = row.peer
            ref.handle = row.handle
            ref.spill = row.spill
            memcpy(ref.seal_id, row.meta.seal_id, SEAL_ID_BYTES)
            memcpy(ref.key, row.meta.key, 32)
            spin_unlock(&row.lock)
            leave(reader)
            return REMOTE
        if state == SEG_LOST or state == SEG_REMOTE:
            spin_unlock(&row.lock)
            if forget_ephemeral(s, pool, oid, index, slot):
                continue
            leave(reader)
            return LOST
        if state == SEG_FREE or state >= SEG_FREEING:
            spin_unlock(&row.lock)
            continue
        if directory(s, row.frame)[-1 - <int64_t> slot_ordinal(slot)] & DIRECTORY_DEAD:
            spin_unlock(&row.lock)      # swapped out since the look; its room may be part of a larger one by now
            continue
        place = <uint8_t *> entry_at(s, row, slot_ordinal(slot))
        room = entry_bytes_at(s, row, slot_ordinal(slot))
        spin_unlock(&row.lock)
        result = decode_local(place, room, ref, page) if place != NULL else CORRUPT
        if result == CORRUPT:
            if read_slot(pool, oid, index) != slot:
                continue                # overwritten since the look: what was read is nobody's any more
            count(s, C_CORRUPT, 1)
            if forget_ephemeral(s, pool, oid, index, slot):
                continue
        if result != OK or not remove:
            break
        # The cleaner may have moved the entry, or somebody else was first: look again, so that the page is gone
        # after this get and no two exclusive gets return the same put.
        if replace(pool, oid, index, slot, 0):
            free_entry(s, slot)
            break
    if result == OK:
        tally(reader, T_LOCAL_GETS, 1)
    leave(reader)
    return result


cdef bint forget_ephemeral(Store_t *s, Pool *pool, const uint64_t *oid, uint32_t index, uint64_t slot) noexcept nogil:
    """An ephemeral page that is lost or damaged is simply not there. True: the slot was changed, look again."""
    if not pool.ephemeral:
        return False
    if replace(pool, oid, index, slot, 0):
        free_entry(s, slot)
        count(s, C_EPHEMERAL_DROPPED, 1)
    return True


cdef uint64_t store_slot(Store_t *s, uint64_t pool_id, const uint64_t *oid, uint32_t index) noexcept nogil:
    """The slot of a key. Without such a pool a value that no slot ever has, since zero would say that the page reads as zeros."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, pool_id)
    cdef uint64_t slot = read_slot(pool, oid, index) if pool != NULL and (not pool.dense or index < pool.pages) else SLOT_OF_NOTHING
    leave(reader)
    return slot


cdef int store_where(Store_t *s, uint64_t pool_id, uint32_t index, uint32_t *peer, uint64_t *slot) noexcept nogil:
    """Where a page of a dense pool is, without reading it: OK for here, MISS, REMOTE (with the peer), LOST or NO_POOL."""
    cdef Segment *row
    cdef int result, looks
    cdef uint64_t zero[3]
    memset(zero, 0, OID_BYTES)
    for looks in range(STALE_LOOKS_MAX):
        slot[0] = store_slot(s, pool_id, zero, index)
        if slot[0] == 0:
            return MISS
        if slot[0] == SLOT_OF_NOTHING:
            return NO_POOL
        if slot_kind(slot[0]) == KIND_FILLED:
            return OK
        if slot_kind(slot[0]) != KIND_STORED or slot_segment(slot[0]) >= load32(&s.segments_used, ACQUIRE):
            return CORRUPT
        row = &s.segments[slot_segment(slot[0])]
        spin_lock(&row.lock)
        if row.generation == slot_generation(slot[0]) and row.state != SEG_FREE and row.state < SEG_FREEING:
            result = REMOTE if row.state == SEG_REMOTE else LOST if row.state == SEG_LOST else OK
            if result == REMOTE and is_cut(row, slot_ordinal(slot[0])):
                result = LOST
            peer[0] = row.peer
            spin_unlock(&row.lock)
            return result
        spin_unlock(&row.lock)
    return CORRUPT


# --- flush, pools --------------------------------------------------------------------------------------------------

cdef int store_flush(Store_t *s, uint64_t pool_id, const uint64_t *oid, uint32_t index) noexcept nogil:
    """Forget a page, here and away. OK when there was one, MISS when not."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, pool_id)
    cdef uint64_t old
    if pool == NULL or (pool.dense and index >= pool.pages):
        leave(reader)
        return NO_POOL if pool == NULL else OUT_OF_RANGE
    old = clear(pool, oid, index)
    if old != 0:
        free_entry(s, old)
        tally(reader, T_FLUSHES_FOUND, 1)
    tally(reader, T_FLUSHES, 1)
    leave(reader)
    return OK if old != 0 else MISS


cdef int store_flush_if(Store_t *s, uint64_t pool_id, const uint64_t *oid, uint32_t index, uint64_t slot) noexcept nogil:
    """Forget a page only if its slot still holds this value (an exclusive get that came back from a lender)."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, pool_id)
    cdef int result = MISS
    if pool != NULL and slot != 0 and replace(pool, oid, index, slot, 0):
        free_entry(s, slot)
        result = OK
    leave(reader)
    return result


cdef uint64_t flush_object(Store_t *s, Pool *pool, const uint64_t *oid) noexcept nogil:
    cdef uint64_t dropped = 0, slots[8]
    cdef Object *thing
    cdef Leaf *leaf
    cdef int i
    while True:
        pthread_mutex_lock(&pool.lock)
        thing = find_object(pool, oid)
        if thing == NULL:
            pthread_mutex_unlock(&pool.lock)
            return dropped
        leaf = thing.leaves
        memcpy(slots, leaf.slots, sizeof(slots))
        drop_leaf(pool, leaf)
        pthread_mutex_unlock(&pool.lock)
        for i in range(8):
            if slots[i] != 0:
                free_entry(s, slots[i])
                dropped += 1


ARENA_FILE = own_file.Kind("arena file", "[arena] path", ARENA_MARK, mark_from_end=PAGE, private=True)


cdef void *map_file(const char *name, uint64_t length, int *fd, object_path, given) except? NULL:
    """A mapping on a named file in memory (or an anonymous memfd); sized, not yet populated. Or on the file of a descriptor
    that is given, of which a duplicate is kept."""
    cdef void *base
    if given is not None:
        if os.fstat(given).st_size != length:
            raise errors.UsageError(f"the arena's descriptor is of a file of {os.fstat(given).st_size} bytes, not of {length}")
        fd[0] = fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, 0)
    elif object_path is None:
        fd[0] = os.memfd_create(name.decode(), os.MFD_CLOEXEC)
    else:
        fd[0] = own_file.open_own(Path(object_path), ARENA_FILE)[0]
        # The mark of an arena comes after it: what a file has that is not ours, or was left half made, is never written to.
        try:
            os.ftruncate(fd[0], length + PAGE)
            os.pwrite(fd[0], ARENA_FILE.mark, length)
        except OSError as error:
            raise errors.StoreFull(
                f"cannot make the arena file {object_path} of {length >> 20} MiB ({error.strerror}): "
                "make [arena] size smaller or its file system larger") from error
    if given is None and object_path is None:
        os.ftruncate(fd[0], length)
    base = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd[0], 0)
    if base == MAP_FAILED:
        raise OSError(errno, strerror(errno).decode())
    madvise(base, length, MADV_DONTDUMP)    # pages of others, and several GiB of a core file
    return base


cdef uint64_t pool_bytes(const Pool *pool) noexcept nogil:
    """Without the slots and the nodes, which are counted by themselves."""
    return sizeof(Pool) + (pool.pages // SLOTS_PER_CHUNK + 1 if pool.dense else 2 * sizeof(void *) * pool.buckets)


cdef int store_create_pool(Store_t *s, bint dense, uint64_t pages, bint ephemeral, uint64_t *id) noexcept nogil:
    cdef Pool *pool = <Pool *> calloc(1, sizeof(Pool))
    cdef uint32_t i
    cdef bint placed = False
    if pool == NULL:
        return NO_MEMORY
    pthread_mutex_init(&pool.lock, NULL)
    pool.nodes = &s.nodes
    pool.dense = dense
    pool.ephemeral = ephemeral
    pool.fd = -1
    if dense:
        pool.pages = pages
        count(s, C_POOL_BYTES, pool_bytes(pool))
        pool.populated = <uint8_t *> calloc(pages // SLOTS_PER_CHUNK + 1, 1)
        pool.fd = memfd_create("ramster-slots", MFD_CLOEXEC)
        if pool.populated == NULL or pool.fd < 0 or ftruncate(pool.fd, <long> (pages * 8)) != 0:
            drop_pool_memory(s, pool)
            return NO_MEMORY
        pool.slots = <uint64_t *> mmap(NULL, pages * 8, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, pool.fd, 0)
        if <void *> pool.slots == MAP_FAILED:
            pool.slots = NULL
            drop_pool_memory(s, pool)
            return NO_MEMORY
        madvise(pool.slots, pages * 8, MADV_DONTDUMP)
    else:
        pool.buckets = 256
        pool.leaf_buckets = <Leaf **> calloc(pool.buckets, sizeof(Leaf *))
        pool.object_buckets = <Object **> calloc(pool.buckets, sizeof(Object *))
        count(s, C_POOL_BYTES, pool_bytes(pool))
        if pool.leaf_buckets == NULL or pool.object_buckets == NULL or \
                (s.nodes.chunks == NULL and (grow_nodes(s, True) != 0 or grow_nodes(s, False) != 0)):
            drop_pool_memory(s, pool)
            return NO_MEMORY
    pthread_mutex_lock(&s.pools_lock)
    for i in range(POOLS_MAX):
        if s.pools[i] == NULL:
            s.pools_made += 1
            pool.id = s.pools_made * POOLS_MAX + i
            store_pointer(<void **> &s.pools[i], pool, SEQ_CST)
            placed = True
            break
    pthread_mutex_unlock(&s.pools_lock)
    if not placed:
        drop_pool_memory(s, pool)
        return FULL
    id[0] = pool.id
    return OK


cdef void drop_pool_memory(Store_t *s, Pool *pool) noexcept nogil:
    cdef uint64_t chunk, chunks
    if pool.slots != NULL:
        munmap(pool.slots, pool.pages * 8)
        chunks = (pool.pages + SLOTS_PER_CHUNK - 1) // SLOTS_PER_CHUNK
        for chunk in range(chunks):
            if pool.populated[chunk]:
                count(s, C_TABLE_BYTES, <uint64_t> -(<int64_t> min(
                    <uint64_t> SLOTS_PER_CHUNK * 8, pool.pages * 8 - chunk * SLOTS_PER_CHUNK * 8)))
    count(s, C_POOL_BYTES, -<int64_t> pool_bytes(pool))
    if pool.fd >= 0:
        close(pool.fd)
    free(pool.populated)
    free(pool.leaf_buckets)
    free(pool.object_buckets)
    pthread_mutex_destroy(&pool.lock)
    free(pool)


cdef int store_destroy_pool(Store_t *s, uint64_t id) noexcept nogil:
    """Unpublish the id, wait until nobody uses the pool, then drop every page here and away."""
    cdef Pool *pool
    # Whoever takes the pointer out owns the pool: a second destroy finds nothing, or its successor, which it leaves alone.
    pthread_mutex_lock(&s.pools_lock)
    pool = s.pools[id & (POOLS_MAX - 1)]
    if pool != NULL and pool.id == id:
        store_pointer(<void **> &s.pools[id & (POOLS_MAX - 1)], NULL, SEQ_CST)
    else:
        pool = NULL
    pthread_mutex_unlock(&s.pools_lock)
    if pool == NULL:
        return NO_POOL
    wait_for_readers(s)
    drop_pages(s, pool)
    drop_pool_memory(s, pool)
    return OK


cdef uint64_t store_pool_pages(Store_t *s, uint64_t id) except? 0:
    """Of a dense pool; an exception where there is none."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, id)
    cdef uint64_t pages = pool.pages if pool != NULL else 0     # of a sparse one 0
    leave(reader)
    if pool == NULL:
        raise no_pool(s, id)
    if pages == 0:
        raise errors.UsageError(f"pool {id} is not a dense pool")
    return pages


cdef void drop_pages(Store_t *s, Pool *pool) noexcept nogil:
    """Of a pool that nobody else can reach any more."""
    cdef uint64_t i, b, value
    cdef uint64_t oid[3]
    if pool.dense:
        i = 0
        while i < pool.pages:
            if not load8(&pool.populated[i // SLOTS_PER_CHUNK], ACQUIRE):
                i = (i // SLOTS_PER_CHUNK + 1) * SLOTS_PER_CHUNK
                continue
            if pool.slots[i] != 0:
                value = swap64(&pool.slots[i], 0, ACQ_REL)
                if value != 0:
                    free_entry(s, value)
            i += 1
        return
    for b in range(pool.buckets):
        while pool.object_buckets[b] != NULL:
            memcpy(oid, pool.object_buckets[b].oid, OID_BYTES)
            flush_object(s, pool, oid)


# --- cleaning ------------------------------------------------------------------------------------------------------

cdef bint take_local(Store_t *s, uint32_t segment, uint32_t state) noexcept nogil:
    """Sealed -> cleaning or shipping, for one taker only."""
    cdef Segment *row = &s.segments[segment]
    cdef bint taken
    spin_lock(&row.lock)
    taken = row.state == SEG_SEALED and row.writers == 0
    if taken:
        store32(&row.state, state, RELEASE)
    spin_unlock(&row.lock)
    return taken


cdef void give_back(Store_t *s, uint32_t segment) noexcept nogil:
    """Cleaning or shipping -> sealed, or free when nothing in it is live any more."""
    cdef Segment *row = &s.segments[segment]
    spin_lock(&row.lock)
    store32(&row.state, SEG_SEALED, RELEASE)
    if row.live_entries == 0:
        free_local(s, segment)
    spin_unlock(&row.lock)


cdef uint32_t choose_victim(Store_t *s, double fullest) noexcept nogil:
    """Cost-benefit: (1 - u) * age / (1 + u), u being the live share. Only segments that would give something back, and
    whose live share is not above `fullest`."""
    cdef uint32_t f, segment, best = SEGMENT_FRAMES_NONE
    cdef Segment *row
    cdef double u, score, best_score = -1.0
    cdef uint64_t now = coarse_ms(), touched
    cdef bint eligible
    cdef double capacity = s.segment_bytes - FRAME_HEADER_BYTES
    for f in range(s.frames):
        segment = load32(&s.frame_segment[f], ACQUIRE)
        if segment == SEGMENT_FRAMES_NONE:
            continue
        row = &s.segments[segment]
        spin_lock(&row.lock)
        # Less than the largest entry to win: the copy would end as full as this one, and be copied again.
        eligible = row.state == SEG_SEALED and row.writers == 0 and not row.damaged and \
            row.live_bytes + 4 * row.live_entries + ENTRY_BYTES_MAX + 16 <= s.segment_bytes - FRAME_HEADER_BYTES
        u = row.live_bytes / capacity
        touched = row.touched_ms
        spin_unlock(&row.lock)
        if not eligible or u > fullest:
            continue
        score = (1.0 - u) * <double> (now - min(now, touched) + 1) / (1.0 + u)
        if score > best_score:
            best_score = score
            best = segment
    return best


cdef int clean_segment(Store_t *s, uint32_t segment) noexcept nogil:
    """Copy the live entries of a sealed segment forward and free it; -1 when there was no room to copy to."""
    cdef Segment *row = &s.segments[segment]
    cdef Reader *reader
    cdef Head *head
    cdef EntryHeader *header
    cdef Pool *pool
    cdef uint8_t *place
    cdef uint64_t oid[3]
    cdef uint64_t slot, moved, touched
    cdef uint32_t ordinal, size, before
    cdef Segment *target
    cdef bint won
    cdef int result = 0
    if not take_local(s, segment, SEG_CLEANING):
        return 0
    reader = enter(s)
    head = &s.heads[2 * HEAD_STRIPES_MAX + (1 if row.ephemeral else 0)]
    spin_lock(&row.lock)
    before = row.live_bytes
    touched = row.touched_ms
    spin_unlock(&row.lock)
    for ordinal in range(row.entries):
        spin_lock(&row.lock)
        header = entry_at(s, row, ordinal)
        size = entry_bytes_at(s, row, ordinal)
        spin_unlock(&row.lock)
        if header == NULL:
            continue
        pool = pool_at(s, header.pool)
        if pool == NULL:
            continue
        entry_oid(header, oid)
        slot = slot_stored(segment, row.generation, ordinal)
        pthread_mutex_lock(&head.lock)
        place = append(s, head, size, &moved)
        if place == NULL:
            pthread_mutex_unlock(&head.lock)
            result = -1
            break
        memcpy(place, header, size)
        target = &s.segments[head.segment]
        spin_lock(&target.lock)
        target.touched_ms = max(target.touched_ms, touched)
        spin_unlock(&target.lock)
        won = replace(pool, oid, header.index, slot, moved)
        if not won:
            unappend(s, head, size)
        pthread_mutex_unlock(&head.lock)
        if won:
            free_entry(s, slot)
    if result == 0:
        # What is still live has a key that names something else: damaged. It stays where get finds and reports it;
        # taking this segment again would not change that. (Or its owner is just letting go of it.)
        spin_lock(&row.lock)
        row.damaged = row.live_entries > 0
        spin_unlock(&row.lock)
        count(s, C_CLEANED_SEGMENTS, 1)
        count(s, C_CLEANED_BYTES, before)
    leave(reader)
    give_back(s, segment)
    return result


cdef uint32_t clean(Store_t *s, uint32_t most, double fullest) noexcept nogil:
    cdef uint32_t done = 0, victim
    cdef bint moved = True
    while moved and done < most and not load32(&s.stopping, ACQUIRE):
        pthread_mutex_lock(&s.clean_lock)
        victim = choose_victim(s, fullest)
        moved = victim != SEGMENT_FRAMES_NONE and clean_segment(s, victim) == 0
        pthread_mutex_unlock(&s.clean_lock)
        done += moved
    return done


cdef double worth_cleaning(Store_t *s) noexcept nogil:
    """Under frame_lock: the live share up to which the cleaner copies a segment. A half is cheap: a byte copied for a byte won.
    Above it puts go into the room of dead entries, which copies nothing; only where that fails are frames used up, and
    the shorter they are the more a free one is worth. Any gain counts only while a put waits."""
    cdef double left
    if s.free_count > s.clean_low_frames:
        return 0.0
    if s.waiting:
        return 1.0
    if s.free_count <= s.reserve_frames:
        return CLEAN_FULLEST
    left = <double> (s.free_count - s.reserve_frames) / (s.clean_low_frames - s.reserve_frames)
    return CLEAN_FULLEST + (CLEAN_CHEAP - CLEAN_FULLEST) * left


cdef void *cleaner_main(void *argument) noexcept nogil:
    cdef Store_t *s = <Store_t *> argument
    cdef double fullest
    while not load32(&s.stopping, ACQUIRE):
        pthread_mutex_lock(&s.frame_lock)
        if s.free_count > s.clean_low_frames:
            cond_wait_until(&s.clean_wanted, &s.frame_lock, now_ns() + 200000000ull)
        reclaim_retired(s)
        fullest = worth_cleaning(s)
        pthread_mutex_unlock(&s.frame_lock)
        rows_ahead(s)
        grow_ahead(s)
        grow_tables(s)
        if fullest > 0.0 and clean(s, 1, fullest) == 0:
            # Nothing worth copying: puts find room beside what is live, or room must come from remotify.
            pthread_mutex_lock(&s.frame_lock)
            cond_wait_until(&s.clean_wanted, &s.frame_lock, now_ns() + 20000000ull)
            pthread_mutex_unlock(&s.frame_lock)
    return NULL


# --- sealing and shipping ------------------------------------------------------------------------------------------

cdef uint32_t store_coldest(Store_t *s, Candidate *out, uint32_t most) noexcept nogil:
    """The sealed segments untouched for longest that wait for nobody, oldest first."""
    cdef uint32_t f, segment, found = 0, i
    cdef uint64_t now = coarse_ms(), age, touched
    cdef bint sealed
    cdef Candidate seen
    cdef Segment *row
    for f in range(s.frames):
        segment = load32(&s.frame_segment[f], ACQUIRE)
        if segment == SEGMENT_FRAMES_NONE:
            continue
        row = &s.segments[segment]
        spin_lock(&row.lock)
        seen.generation = row.generation
        seen.live_bytes = row.live_bytes
        seen.live_entries = row.live_entries
        seen.ephemeral = row.ephemeral
        touched = row.touched_ms
        sealed = row.state == SEG_SEALED
        spin_unlock(&row.lock)
        if not sealed or load32(&row.ordered, RELAXED):
            continue
        age = now - min(now, touched)
        if found == most and age <= out[most - 1].age_ms:
            continue
        i = found if found < most else most - 1
        while i > 0 and out[i - 1].age_ms < age:
            out[i] = out[i - 1]
            i -= 1
        out[i] = seen
        out[i].segment = segment
        out[i].age_ms = age
        if found < most:
            found += 1
    return found


cdef int store_ship_begin(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil:
    """Claim a sealed segment for shipping; BUSY when it is gone or in other hands."""
    cdef Segment *row = &s.segments[segment]
    cdef bint taken
    if segment >= load32(&s.segments_used, ACQUIRE):
        return BUSY
    spin_lock(&row.lock)
    taken = row.generation == generation and row.state == SEG_SEALED and row.writers == 0
    if taken:
        store32(&row.state, SEG_SHIPPING, RELEASE)
    spin_unlock(&row.lock)
    return OK if taken else BUSY


cdef int seal_nonce_aad(const uint8_t *seal_id, uint32_t ordinal, const EntryHeader *header, const uint64_t *oid,
                        uint8_t *nonce, uint8_t *aad) noexcept nogil:
    """Nonce: the ordinal (each sealing has a key of its own). Associated data: docs/store-format.md."""
    memset(nonce, 0, 12)
    memcpy(nonce + 8, &ordinal, 4)
    memcpy(aad, seal_id, SEAL_ID_BYTES)
    memcpy(aad + 24, &ordinal, 4)
    memcpy(aad + 28, header, HEADER_BYTES - TAG_BYTES)      # length, codec, flags, index, version, pool
    memcpy(aad + 52, oid, OID_BYTES)
    return AAD_BYTES


cdef const EntryHeader *recompress(const EntryHeader *header, uint8_t *buffer, ZSTD_CCtx *zstd) noexcept nogil:
    """An intact entry with its page as zstd, in 'buffer' (ENTRY_BYTES_MAX bytes); the same entry when that saves less than
    a sixteenth of it."""
    cdef EntryHeader *smaller = <EntryHeader *> buffer
    cdef uint32_t prefix = OID_BYTES if header.flags & SPARSE_FLAG else 0
    cdef const uint8_t *body = <const uint8_t *> header + HEADER_BYTES
    cdef uint8_t page[PAGE]
    cdef const uint8_t *plain = page
    cdef uint32_t room
    cdef size_t size
    if header.length < prefix or header.length - prefix < RECOMPRESS_MIN:
        return header
    room = (header.length - prefix) * 15 // 16
    if header.codec == CODEC_RAW and header.length == prefix + PAGE:
        plain = body + prefix
    elif header.codec != CODEC_LZ4 or LZ4_decompress_safe(
            <const char *> body + prefix, <char *> page, <int> (header.length - prefix), PAGE) != PAGE:
        return header
    size = ZSTD_compressCCtx(zstd, buffer + HEADER_BYTES + prefix, room, plain, PAGE, ZSTD_LEVEL)
    if ZSTD_isError(size):
        return header               # it does not fit
    memcpy(buffer, header, HEADER_BYTES + prefix)
    smaller.codec = CODEC_ZSTD
    smaller.length = <uint16_t> (prefix + size)
    return smaller


cdef bint seal_key(Store_t *s, RemoteMeta *meta, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Draw a seal id, derive its key and set it. HKDF-Expand (RFC 5869) with one block: the node key is uniform, so there is
    nothing to extract."""
    cdef uint8_t info[48]
    cdef unsigned int key_bytes = 32
    memcpy(info, <const uint8_t *> b"ramster seal v2\0", 16)
    if RAND_bytes(meta.seal_id, SEAL_ID_BYTES) != 1:
        return False
    memcpy(info + 16, meta.seal_id, SEAL_ID_BYTES)
    info[40] = 1
    return HMAC(EVP_sha256(), s.node_key, 32, info, 41, meta.key, &key_bytes) != NULL and \
        EVP_EncryptInit_ex(ctx, EVP_aes_256_gcm(), NULL, meta.key, NULL) == 1


cdef void image_header(ImageHeader *image, uint32_t segment, uint32_t generation, uint32_t entries, uint32_t data_bytes,
                       const RemoteMeta *meta) noexcept nogil:
    image.magic = IMAGE_MAGIC
    image.segment = segment
    image.generation = generation
    image.entries = entries
    image.data_bytes = data_bytes
    memcpy(image.seal_id, meta.seal_id, SEAL_ID_BYTES)


cdef bint seal_entry(const RemoteMeta *meta, uint32_t ordinal, const EntryHeader *header, const uint8_t *body, const uint64_t *oid,
                     uint32_t size, EntryHeader *target, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """An entry as it lies in an image, 'size' bytes with its padding. 'body' begins with the object id where there is one."""
    cdef uint8_t nonce[12]
    cdef uint8_t aad[AAD_BYTES]
    cdef int n = 0, aad_bytes
    memcpy(target, header, HEADER_BYTES)
    aad_bytes = seal_nonce_aad(meta.seal_id, ordinal, header, oid, nonce, aad)
    if EVP_EncryptInit_ex(ctx, NULL, NULL, NULL, nonce) != 1 or \
            EVP_EncryptUpdate(ctx, NULL, &n, aad, aad_bytes) != 1 or \
            EVP_EncryptUpdate(ctx, <unsigned char *> target + HEADER_BYTES, &n, body, header.length) != 1 or \
            EVP_EncryptFinal_ex(ctx, <unsigned char *> target + HEADER_BYTES + n, &n) != 1 or \
            EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_GCM_GET_TAG, TAG_BYTES, target.check) != 1:
        return False
    memset(<uint8_t *> target + HEADER_BYTES + header.length, 0, size - HEADER_BYTES - header.length)
    return True


cdef uint32_t store_seal_image(Store_t *s, uint32_t segment, uint8_t *out, RemoteMeta **meta_out,
                               EVP_CIPHER_CTX *ctx, ZSTD_CCtx *zstd) noexcept nogil:
    """Build the sealed image of a segment in state shipping: live entries only, ordinals kept; pages as zstd where a
    context for it is given. Returns its bytes; 0 without memory or when libcrypto fails. The caller frees the meta data
    unless it commits them."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t entries = row.entries, ordinal, position = 0, size, base
    cdef ImageHeader *image = <ImageHeader *> out
    cdef uint16_t *offsets = <uint16_t *> (out + FRAME_HEADER_BYTES)
    cdef RemoteMeta *meta = <RemoteMeta *> calloc(1, sizeof(RemoteMeta) + 2 * <size_t> entries)
    cdef const EntryHeader *header
    cdef EntryHeader *target
    cdef uint8_t buffer[ENTRY_BYTES_MAX]
    cdef uint32_t recompressed = 0, saved = 0
    cdef uint64_t oid[3]
    if meta == NULL:
        return 0
    if not seal_key(s, meta, ctx):
        free(meta)
        return 0
    base = align8(FRAME_HEADER_BYTES + 2 * entries)
    memset(image, 0, base)
    for ordinal in range(entries):
        spin_lock(&row.lock)
        header = entry_at(s, row, ordinal)
        size = entry_bytes_at(s, row, ordinal)
        spin_unlock(&row.lock)
        if header == NULL:
            offsets[ordinal] = DIRECTORY_ABSENT
            continue
        target = <EntryHeader *> (out + base + position)
        offsets[ordinal] = <uint16_t> (position >> 3)
        if not entry_intact(header, size):
            # Sealing would give damaged bytes a valid tag. Zeros have none: the page is lost here and there.
            meta.sizes[ordinal] = <uint16_t> (size >> 3)
            position += size
            memset(target, 0, size)
            continue
        if zstd != NULL:
            header = recompress(header, buffer, zstd)
            if <const uint8_t *> header == buffer:
                recompressed += 1
                saved += size - align8(HEADER_BYTES + header.length)
                size = align8(HEADER_BYTES + header.length)
        meta.sizes[ordinal] = <uint16_t> (size >> 3)
        position += size
        entry_oid(header, oid)
        if not seal_entry(meta, ordinal, header, <const uint8_t *> header + HEADER_BYTES, oid, size, target, ctx):
            free(meta)
            return 0
    image_header(image, segment, row.generation, entries, position, meta)
    ASSERT(base + position <= s.segment_bytes, b"a sealed segment fits into a frame")
    meta_out[0] = meta
    if recompressed:
        count(s, C_RECOMPRESSED, recompressed)
        count(s, C_RECOMPRESSED_SAVED, saved)
    return base + position


cdef void store_ship_commit(Store_t *s, uint32_t segment, uint32_t peer, uint32_t handle, uint32_t spill,
                            RemoteMeta *meta) noexcept nogil:
    """The lender has it, or the spill file (SPILL_PEER), or both: from here on the segment is remote. Entries that died on the
    way are dead there too."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t ordinal, frame, live = 0, live_bytes = 0, held_bytes = 0
    spin_lock(&row.lock)
    ASSERT(row.state == SEG_SHIPPING, b"only what is under way is committed")
    frame = row.frame
    for ordinal in range(row.entries):
        held_bytes += <uint32_t> meta.sizes[ordinal] * 8
        if directory(s, frame)[-1 - <int64_t> ordinal] & DIRECTORY_DEAD:
            meta.sizes[ordinal] |= DIRECTORY_DEAD
        else:
            ASSERT(meta.sizes[ordinal] != 0, b"a live entry was sealed")
            live += 1
            live_bytes += <uint32_t> meta.sizes[ordinal] * 8
    ASSERT(live == row.live_entries and live_bytes <= row.live_bytes, b"stored = live")
    row.live_bytes = live_bytes             # less than here where pages left as zstd
    row.meta = meta
    row.peer = peer
    row.handle = handle
    row.spill = spill
    row.spill_bytes = align8(FRAME_HEADER_BYTES + 2 * row.entries) + held_bytes if spill else 0
    store32(&row.frame, SEGMENT_FRAMES_NONE, RELAXED)
    row.held_bytes = held_bytes
    row.compacting &= COMPACT_QUEUED        # it may still be in the queue from its former life
    store32(&row.state, SEG_REMOTE, RELEASE)
    if live == 0:
        queue_freed(s, segment)
    else:
        queue_compact(s, segment)
    retire_frame(s, frame)
    spin_unlock(&row.lock)
    count(s, C_SHIPPED_SEGMENTS, 1)


cdef void store_ship_abort(Store_t *s, uint32_t segment) noexcept nogil:
    """The lender refused or is gone: the segment stays here, as if nothing had been tried."""
    cdef Segment *row = &s.segments[segment]
    spin_lock(&row.lock)
    row.touched_ms = coarse_ms()        # at the end of the queue, so that one bad segment does not block the rest
    spin_unlock(&row.lock)
    give_back(s, segment)


cdef void store_touch(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil:
    """An order for it was given up before it was sealed: at the end of the queue as well."""
    cdef Segment *row = &s.segments[segment]
    spin_lock(&row.lock)
    if row.generation == generation and row.state == SEG_SEALED:
        row.touched_ms = coarse_ms()
    spin_unlock(&row.lock)


cdef bint store_next_freed(Store_t *s, uint32_t *segment, uint32_t *generation, uint32_t *peer, uint32_t *handle,
                           uint32_t *spill) noexcept nogil:
    """Take the next remote segment that a lender must be told to forget, and the room in the spill file that it gives back
    (its number and 1, or 0): the caller's from here on."""
    cdef Segment *row
    pthread_mutex_lock(&s.freed_lock)
    if s.freed_count == 0:
        pthread_mutex_unlock(&s.freed_lock)
        return False
    segment[0] = s.freed_first
    row = &s.segments[s.freed_first]
    s.freed_first = row.next
    s.freed_count -= 1
    pthread_mutex_unlock(&s.freed_lock)
    spin_lock(&row.lock)
    store32(&row.state, SEG_FREE_SENT, RELEASE)
    generation[0] = row.generation
    peer[0] = row.peer
    handle[0] = row.handle
    spill[0] = row.spill
    row.spill = row.spill_bytes = 0
    spin_unlock(&row.lock)
    return True


cdef uint32_t store_next_compact(Store_t *s, uint32_t *segment, uint32_t *generation, uint32_t *peer, uint8_t *live) noexcept nogil:
    """Take the next remote segment that its lender is to compact, and the bitmap of its live ordinals (LIVE_BYTES_MAX
    bytes at most). Returns the bitmap's bytes; 0 when there is none."""
    cdef Segment *row
    cdef uint32_t ordinal, bytes = 0
    while bytes == 0:
        pthread_mutex_lock(&s.freed_lock)
        if s.compact_count == 0:
            pthread_mutex_unlock(&s.freed_lock)
            return 0
        segment[0] = s.compact_first
        row = &s.segments[s.compact_first]
        s.compact_first = row.compact_next
        s.compact_count -= 1
        pthread_mutex_unlock(&s.freed_lock)
        spin_lock(&row.lock)
        row.compacting = 0
        # It may have been freed meanwhile, and its number even be in use again.
        if row.state == SEG_REMOTE and row.peer != SPILL_PEER and \
                <uint64_t> row.live_bytes * 1024 < <uint64_t> row.held_bytes * load32(&s.compact_below, RELAXED):
            row.compacting = COMPACT_SENT
            generation[0] = row.generation
            peer[0] = row.peer
            bytes = (row.entries + 7) >> 3
            memset(live, 0, bytes)
            for ordinal in range(row.entries):
                if row.meta.sizes[ordinal] & DIRECTORY_DEAD == 0:
                    live[ordinal >> 3] |= 1 << (ordinal & 7)
        spin_unlock(&row.lock)
    return bytes


cdef void store_compacted(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer, uint32_t image_bytes) noexcept nogil:
    """The lender's answer: its image has so many bytes left; 0: it did not do it, and is not asked again before more of the
    segment dies. What it says is believed only between what is live and what it had."""
    cdef Segment *row
    cdef uint32_t base, held
    if segment >= load32(&s.segments_used, ACQUIRE):
        return
    row = &s.segments[segment]
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation and row.peer == peer and row.compacting & COMPACT_SENT:
        row.compacting = 0
        base = align8(FRAME_HEADER_BYTES + 2 * row.entries)
        if image_bytes >= base:
            held = max(image_bytes - base, row.live_bytes)
            if held < row.held_bytes:
                row.held_bytes = held
                queue_compact(s, segment)
    spin_unlock(&row.lock)


cdef uint32_t store_retell(Store_t *s, uint32_t peer) noexcept nogil:
    """After a reconnect: what this lender was told to forget or to compact without an answer is told again. Returns segments."""
    cdef uint32_t segment, queued = 0
    cdef Segment *row
    for segment in range(load32(&s.segments_used, ACQUIRE)):
        row = &s.segments[segment]
        spin_lock(&row.lock)
        if row.state == SEG_FREE_SENT and row.peer == peer:
            queue_freed(s, segment)
            queued += 1
        elif row.state == SEG_REMOTE and row.peer == peer and row.compacting & COMPACT_SENT:
            row.compacting = 0
            queue_compact(s, segment)
            queued += 1
        spin_unlock(&row.lock)
    return queued


cdef int store_slot_state(Store_t *s, uint64_t slot) noexcept nogil:
    """What became of the segment that a slot value named: REMOTE still, LOST, or MISS when it is something else now."""
    cdef Segment *row = &s.segments[slot_segment(slot)]
    cdef int result = MISS
    spin_lock(&row.lock)
    if row.generation == slot_generation(slot):
        result = REMOTE if row.state == SEG_REMOTE else LOST if row.state == SEG_LOST else MISS
        if result == REMOTE and is_cut(row, slot_ordinal(slot)):
            result = LOST
    spin_unlock(&row.lock)
    return result


cdef bint store_short_of_frames(Store_t *s) noexcept nogil:
    """The cleaner is at work, or should be: puts may have to wait."""
    cdef bint few
    pthread_mutex_lock(&s.frame_lock)
    few = s.free_count <= s.clean_low_frames
    pthread_mutex_unlock(&s.frame_lock)
    return few


cdef void store_freed_told(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer) noexcept nogil:
    """The lender has forgotten this segment: its number may be used again."""
    cdef Segment *row = &s.segments[segment]
    spin_lock(&row.lock)
    if row.state == SEG_FREE_SENT and row.generation == generation and row.peer == peer:
        free_row(s, segment)
    spin_unlock(&row.lock)


cdef inline uint32_t first_entry(const Segment *row) noexcept nogil:
    """Under the row's lock: where the entries of its image in the spill file begin. One that was compacted there has nothing
    else."""
    return 0 if row.meta.bare else align8(FRAME_HEADER_BYTES + 2 * row.entries)


cdef void fall_back(Store_t *s, Segment *row) noexcept nogil:
    """Under the row's lock: a remote segment whose lender has it no more is lost, unless the spill file has it too."""
    if row.spill == 0:
        store32(&row.state, SEG_LOST, RELEASE)
        return
    row.peer = SPILL_PEER
    row.compacting &= COMPACT_QUEUED
    row.held_bytes = row.spill_bytes - first_entry(row)


cdef bint store_is_spilled(Store_t *s, uint64_t slot) noexcept nogil:
    """The segment that this slot value names has an image in the spill file, alone or beside a lender's."""
    cdef Segment *row
    cdef bint spilled
    if slot_kind(slot) != KIND_STORED or slot_segment(slot) >= load32(&s.segments_used, ACQUIRE):
        return False
    row = &s.segments[slot_segment(slot)]
    spin_lock(&row.lock)
    spilled = row.generation == slot_generation(slot) and row.state == SEG_REMOTE and row.spill != 0 and \
        not is_cut(row, slot_ordinal(slot))
    spin_unlock(&row.lock)
    return spilled


cdef uint32_t store_spilled(Store_t *s, uint32_t segment, uint32_t generation, const uint16_t *ordinals, uint32_t count,
                            uint32_t *offsets, uint16_t *sizes) noexcept nogil:
    """Where entries of a segment lie in its image in the spill file, from this node's own table: nothing in the file is
    believed. Returns the image's number there, and 1; 0 when it has none (any more)."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t at[ORDINALS_MAX]
    cdef uint32_t ordinal, k, position, last = 0, spill = 0
    for k in range(count):
        last = max(last, ordinals[k])
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation and last < row.entries:
        spill = row.spill
        position = first_entry(row)
        for ordinal in range(last + 1):
            at[ordinal] = position
            if row.meta.sizes[ordinal] & DIRECTORY_GONE == 0:
                position += <uint32_t> (row.meta.sizes[ordinal] & SIZE_UNITS) * 8
        for k in range(count):
            offsets[k] = at[ordinals[k]]
            # What is dead has no reader; the answer to a request that named it is not used.
            sizes[k] = 0 if row.meta.sizes[ordinals[k]] & DIRECTORY_GONE else <uint16_t> ((row.meta.sizes[ordinals[k]] & SIZE_UNITS) * 8)
    spin_unlock(&row.lock)
    return spill


cdef uint32_t store_unspill(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil:
    """The image in the spill file is no good, and a lender has the segment too: forget that image. Returns its number there,
    and 1, for the caller to free; 0 when there is nothing to forget, or nothing else to read."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t spill = 0
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation and row.peer != SPILL_PEER:
        spill = row.spill
        row.spill = row.spill_bytes = 0
    spin_unlock(&row.lock)
    return spill


cdef uint32_t store_spilled_now(Store_t *s, uint32_t segment, RemoteRef *ref, Layout *image) noexcept nogil:
    """As store_spilled_live, whatever is in this row now."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t spill = 0
    if load32(&row.state, RELAXED) != SEG_REMOTE:
        return 0
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.spill != 0:
        spill = row.spill
        lay_out(row, segment, ref, image)
    spin_unlock(&row.lock)
    return spill


cdef bint store_cut(Store_t *s, const RemoteRef *ref, const Layout *image, uint64_t *pages) noexcept nogil:
    """Entries of this segment, which lies in the spill file alone, were cut off it: those that 'image' marks so are lost. Adds to
    'pages' those that live. False: the segment has another image by now, or is elsewhere too."""
    cdef Segment *row = &s.segments[ref.segment]
    cdef uint32_t ordinal
    cdef bint same
    spin_lock(&row.lock)
    same = row.state == SEG_REMOTE and row.generation == ref.generation and row.spill == ref.spill and row.peer == SPILL_PEER
    if same:
        row.damaged = True              # neither merged nor compacted: what is left of it stays where it is
        for ordinal in range(row.entries):
            if image.sizes[ordinal] & DIRECTORY_CUT and row.meta.sizes[ordinal] & (DIRECTORY_CUT | DIRECTORY_DEAD) == 0:
                row.meta.sizes[ordinal] |= DIRECTORY_CUT
                row.meta.cut += 1
                add64(&s.cut, 1, RELAXED)
                pages[0] += 1
    spin_unlock(&row.lock)
    return same


cdef void store_alone(Store_t *s, const uint8_t *peers, uint64_t *pages) noexcept nogil:
    """Adds, for each peer that is marked, the pages that it alone has, of those that may not be dropped."""
    cdef uint32_t segment
    cdef Segment *row
    for segment in range(load32(&s.segments_used, ACQUIRE)):
        row = &s.segments[segment]
        if load32(&row.state, RELAXED) != SEG_REMOTE:
            continue
        spin_lock(&row.lock)
        if row.state == SEG_REMOTE and row.spill == 0 and peers[row.peer] and not row.ephemeral:
            pages[row.peer] += row.live_entries
        spin_unlock(&row.lock)


cdef uint64_t store_peer_lost(Store_t *s, uint32_t peer) noexcept nogil:
    """A lender's memory is gone for good (it restarted or said goodbye): what only it held is lost. Returns pages."""
    cdef uint32_t segment
    cdef uint64_t pages = 0
    cdef Segment *row
    for segment in range(load32(&s.segments_used, ACQUIRE)):
        row = &s.segments[segment]
        spin_lock(&row.lock)
        if row.peer == peer and row.state == SEG_REMOTE:
            fall_back(s, row)
            pages += row.live_entries if row.state == SEG_LOST else 0
        elif row.peer == peer and row.state == SEG_FREE_SENT:
            free_row(s, segment)
        spin_unlock(&row.lock)
    return pages


cdef bint store_segment_lost(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer) noexcept nogil:
    """Its lender says that it has this segment no more. True: the spill file has it, look again."""
    cdef Segment *row = &s.segments[segment]
    cdef bint spilled
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation and row.peer == peer:
        fall_back(s, row)
    spilled = row.state == SEG_REMOTE and row.generation == generation and row.peer == SPILL_PEER
    spin_unlock(&row.lock)
    return spilled


cdef bint store_fall_back(Store_t *s, uint32_t segment, uint32_t generation, uint32_t peer) noexcept nogil:
    """What a lender sent of this segment is damaged. True: the spill file has it too and is asked from now on; False: nothing
    has changed, and other pages of it may be right."""
    cdef Segment *row = &s.segments[segment]
    cdef bint spilled = False
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation and row.spill:
        if row.peer == peer:
            fall_back(s, row)
        spilled = row.peer == SPILL_PEER
    spin_unlock(&row.lock)
    return spilled


cdef EVP_CIPHER_CTX *store_unseal_context() noexcept nogil:
    """A context for one thread that unseals; NULL without memory. The cipher is looked up here, once."""
    cdef EVP_CIPHER_CTX *ctx = EVP_CIPHER_CTX_new()
    if ctx != NULL and EVP_DecryptInit_ex(ctx, EVP_aes_256_gcm(), NULL, NULL, NULL) != 1:
        EVP_CIPHER_CTX_free(ctx)
        return NULL
    return ctx


cdef int store_unseal_begin(const RemoteRef *ref, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Set the key of the segment whose entries store_unseal() will open."""
    return OK if EVP_DecryptInit_ex(ctx, NULL, NULL, ref.key, NULL) == 1 else CORRUPT


cdef int store_unseal(const RemoteRef *ref, const uint8_t *entry, uint32_t entry_bytes, uint8_t *page,
                      EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Check and uncompress a sealed entry that came back, after store_unseal_begin(). CORRUPT unless it is the very entry
    that was asked for."""
    cdef uint8_t plain[OID_BYTES + PAGE]
    cdef uint64_t oid[3]
    memset(oid, 0, OID_BYTES)
    if ref.sparse:
        memcpy(oid, ref.oid, OID_BYTES)
    if not open_entry(ref, oid, entry, entry_bytes, plain, ctx):
        return CORRUPT
    return decode(<EntryHeader *> entry, plain, ref, page)


cdef bint open_entry(const RemoteRef *ref, const uint64_t *oid, const uint8_t *entry, uint32_t entry_bytes, uint8_t *plain,
                     EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Decrypt an entry to OID_BYTES + PAGE bytes, its object id first where it has one; False unless its tag is right."""
    cdef EntryHeader *header = <EntryHeader *> entry
    cdef uint8_t nonce[12]
    cdef uint8_t aad[AAD_BYTES]
    cdef int n = 0, aad_bytes
    if entry_bytes < HEADER_BYTES or header.length > OID_BYTES + PAGE or entry_bytes < HEADER_BYTES + header.length:
        return False
    aad_bytes = seal_nonce_aad(ref.seal_id, ref.ordinal, header, oid, nonce, aad)
    return EVP_DecryptInit_ex(ctx, NULL, NULL, NULL, nonce) == 1 and \
        EVP_DecryptUpdate(ctx, NULL, &n, aad, aad_bytes) == 1 and \
        EVP_DecryptUpdate(ctx, plain, &n, entry + HEADER_BYTES, header.length) == 1 and \
        EVP_CIPHER_CTX_ctrl(ctx, EVP_CTRL_GCM_SET_TAG, TAG_BYTES, header.check) == 1 and \
        EVP_DecryptFinal_ex(ctx, plain + n, &n) == 1


# --- making one image of several -----------------------------------------------------------------------------------
# The spill file holds images as they were sealed. When most of several has died, what lives in them becomes one new image of a
# new segment, under a new key: written first, then its row is filled in, then each page's slot is swapped from the old name to
# the new one, if it still has the old one. The arena has no part in it: it is full when this is needed.

cdef uint32_t store_sparsest(Store_t *s, uint32_t *cursor, Candidate *out, uint32_t most) noexcept nogil:
    """The emptiest of the next so many segments that lie in the spill file alone and are at most half alive, least first."""
    cdef uint32_t i, looks, found = 0, used = load32(&s.segments_used, ACQUIRE)
    cdef Candidate seen
    cdef Segment *row
    cdef bint sparse
    for looks in range(min(used, <uint32_t> SPARSE_LOOKS)):
        cursor[0] = (cursor[0] + 1) % used
        row = &s.segments[cursor[0]]
        if load32(&row.state, RELAXED) != SEG_REMOTE:
            continue
        spin_lock(&row.lock)
        sparse = row.state == SEG_REMOTE and row.peer == SPILL_PEER and not row.damaged and 2 * row.live_bytes <= s.segment_bytes
        seen.segment = cursor[0]
        seen.generation = row.generation
        seen.live_bytes = row.live_bytes
        seen.live_entries = row.live_entries
        spin_unlock(&row.lock)
        if not sparse or (found == most and seen.live_bytes >= out[most - 1].live_bytes):
            continue
        i = found if found < most else most - 1
        while i > 0 and out[i - 1].live_bytes > seen.live_bytes:
            out[i] = out[i - 1]
            i -= 1
        out[i] = seen
        if found < most:
            found += 1
    return found


cdef uint32_t store_spilled_live(Store_t *s, uint32_t segment, uint32_t generation, RemoteRef *ref, Layout *image) noexcept nogil:
    """What is needed to open or to copy the image of a segment in the spill file: seal id and key in 'ref', and where everything
    lies in it. Returns the image's number there, and 1, or 0."""
    cdef Segment *row = &s.segments[segment]
    cdef uint32_t spill = 0
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation:
        spill = row.spill
        lay_out(row, segment, ref, image)
    spin_unlock(&row.lock)
    return spill


cdef void lay_out(const Segment *row, uint32_t segment, RemoteRef *ref, Layout *image) noexcept nogil:
    """Under the row's lock, of a remote segment."""
    image.entries = row.entries
    image.first = first_entry(row)
    image.bytes = row.spill_bytes
    memset(ref, 0, sizeof(RemoteRef))
    ref.segment = segment
    ref.generation = row.generation
    ref.peer = row.peer
    ref.handle = row.handle
    ref.spill = row.spill
    memcpy(ref.seal_id, row.meta.seal_id, SEAL_ID_BYTES)
    memcpy(ref.key, row.meta.key, 32)
    memcpy(image.sizes, row.meta.sizes, 2 * row.entries)


cdef uint32_t store_wasteful(Store_t *s, uint32_t *cursor, uint32_t room_bytes, Candidate *best) noexcept nogil:
    """Of the next so many segments with an image in the spill file the one that would give back most rooms there if only what
    lives in it were kept; how many, 0: none. 'best.live_entries' is what it would need then."""
    cdef uint32_t looks, used = load32(&s.segments_used, ACQUIRE), win, need, most = 0
    cdef Segment *row
    for looks in range(min(used, <uint32_t> SPARSE_LOOKS)):
        cursor[0] = (cursor[0] + 1) % used
        row = &s.segments[cursor[0]]
        if load32(&row.state, RELAXED) != SEG_REMOTE:
            continue
        spin_lock(&row.lock)
        if row.state == SEG_REMOTE and row.spill and not row.damaged:
            need = (row.live_bytes + room_bytes - 1) // room_bytes
            win = (row.spill_bytes + room_bytes - 1) // room_bytes - need
            if win > most:
                most = win
                best.segment = cursor[0]
                best.generation = row.generation
                best.live_bytes = row.live_bytes
                best.live_entries = need
        spin_unlock(&row.lock)
    return most


cdef bint store_least_mirrored(Store_t *s, uint32_t *cursor, const uint8_t *reachable, Candidate *best) noexcept nogil:
    """Of the next so many segments that a lender within reach has and the spill file too, the one of which least lives."""
    cdef uint32_t looks, used = load32(&s.segments_used, ACQUIRE)
    cdef Segment *row
    cdef bint found = False
    for looks in range(min(used, <uint32_t> SPARSE_LOOKS)):
        cursor[0] = (cursor[0] + 1) % used
        row = &s.segments[cursor[0]]
        if load32(&row.state, RELAXED) != SEG_REMOTE:
            continue
        spin_lock(&row.lock)
        if row.state == SEG_REMOTE and row.spill and row.peer != SPILL_PEER and reachable[row.peer] and \
                (not found or row.live_bytes < best.live_bytes):
            found = True
            best.segment = cursor[0]
            best.generation = row.generation
            best.live_bytes = row.live_bytes
        spin_unlock(&row.lock)
    return found


cdef bint store_next_unmirrored(Store_t *s, uint32_t *cursor, const uint8_t *reachable, RemoteRef *ref, Layout *image) noexcept nogil:
    """The next segment that lies on a lender within reach alone, of those that may not be dropped."""
    cdef uint32_t looks, used = load32(&s.segments_used, ACQUIRE)
    cdef Segment *row
    cdef bint found = False
    for looks in range(used):
        cursor[0] = (cursor[0] + 1) % used
        row = &s.segments[cursor[0]]
        if load32(&row.state, RELAXED) != SEG_REMOTE:
            continue
        spin_lock(&row.lock)
        if row.state == SEG_REMOTE and row.spill == 0 and row.peer != SPILL_PEER and reachable[row.peer] and not row.ephemeral and \
                not row.damaged:
            found = True
            lay_out(row, cursor[0], ref, image)
        spin_unlock(&row.lock)
        if found:
            break
    return found


cdef uint64_t store_slot_named(uint32_t segment, uint32_t generation, uint32_t ordinal) noexcept nogil:
    return slot_stored(segment, generation, ordinal)


cdef bint store_placed(Store_t *s, const RemoteRef *ref, const Layout *image, uint32_t spill) noexcept nogil:
    """A new image of this segment is in the spill file: of the entries in 'image' that are not marked dead, and nothing else.
    False: the segment is not what it was, the image of no use."""
    cdef Segment *row = &s.segments[ref.segment]
    cdef uint32_t ordinal
    cdef bint same
    spin_lock(&row.lock)
    same = row.state == SEG_REMOTE and row.generation == ref.generation and row.spill == ref.spill and \
        (row.spill != 0 or row.peer != SPILL_PEER)
    if same:
        row.spill = spill
        row.spill_bytes = 0
        row.meta.bare = 1
        for ordinal in range(row.entries):
            row.meta.sizes[ordinal] &= ~<uint16_t> DIRECTORY_GONE
            if image.sizes[ordinal] & DIRECTORY_DEAD:
                row.meta.sizes[ordinal] |= DIRECTORY_GONE
            else:
                row.spill_bytes += <uint32_t> (row.meta.sizes[ordinal] & SIZE_UNITS) * 8
        if row.peer == SPILL_PEER:
            row.held_bytes = row.spill_bytes
    spin_unlock(&row.lock)
    return same


cdef void store_spare(Store_t *s, uint32_t segment, uint32_t generation) noexcept nogil:
    """Something in this image cannot be read: it stays where gets find and report it, and is not chosen again."""
    cdef Segment *row = &s.segments[segment]
    spin_lock(&row.lock)
    if row.state == SEG_REMOTE and row.generation == generation:
        row.damaged = True
    spin_unlock(&row.lock)


cdef bint store_gather_begin(Store_t *s, Gather *g, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Begin an image for 'capacity' entries; 'ctx' keeps its key until the end. False when there is no segment number left, or
    no memory."""
    cdef bint some
    g.entries = g.bytes = 0
    g.meta = <RemoteMeta *> calloc(1, sizeof(RemoteMeta) + 2 * <size_t> g.capacity)
    if g.meta == NULL:
        return False
    pthread_mutex_lock(&s.frame_lock)
    some = s.free_ids_count != 0 or s.segments_used < s.segments_max
    if some:
        g.segment = take_id(s)
    pthread_mutex_unlock(&s.frame_lock)
    if some and seal_key(s, g.meta, ctx):
        return True
    if some:
        release_id(s, g.segment)
    free(g.meta)
    return False


cdef bint open_whole(const RemoteRef *ref, uint64_t *oid, const uint8_t *entry, uint32_t entry_bytes, uint8_t *plain,
                     EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Open an entry of which only its segment and ordinal are known, to 'plain' and 'oid'. False unless it is what was sealed."""
    cdef const EntryHeader *header = <const EntryHeader *> entry
    cdef uint8_t nonce[12]
    cdef int n = 0
    memset(oid, 0, OID_BYTES)
    if entry_bytes >= HEADER_BYTES + OID_BYTES and header.flags & SPARSE_FLAG:
        # The object id is a part of what the tag is checked against, and stands in the ciphertext: look there first.
        memset(nonce, 0, 12)
        memcpy(nonce + 8, &ref.ordinal, 4)
        if EVP_DecryptInit_ex(ctx, NULL, NULL, NULL, nonce) != 1 or \
                EVP_DecryptUpdate(ctx, <uint8_t *> oid, &n, entry + HEADER_BYTES, OID_BYTES) != 1:
            return False
    return open_entry(ref, oid, entry, entry_bytes, plain, ctx) and align8(HEADER_BYTES + header.length) == entry_bytes


cdef bint store_entry_right(const RemoteRef *ref, const uint8_t *entry, uint32_t entry_bytes, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Whether these are the bytes that were sealed as 'ref.ordinal', after store_unseal_begin()."""
    cdef uint8_t plain[OID_BYTES + PAGE]
    cdef uint64_t oid[3]
    return open_whole(ref, oid, entry, entry_bytes, plain, ctx)


cdef int store_gather_add(Store_t *s, Gather *g, uint8_t *out, const RemoteRef *ref, const uint8_t *entry, uint32_t entry_bytes,
                          EVP_CIPHER_CTX *open_ctx, EVP_CIPHER_CTX *seal_ctx) noexcept nogil:
    """Take over one entry: OK, CORRUPT when it is not what was sealed, FULL."""
    cdef const EntryHeader *header = <const EntryHeader *> entry
    cdef uint32_t base = align8(FRAME_HEADER_BYTES + 2 * g.capacity)
    cdef uint8_t plain[OID_BYTES + PAGE]
    cdef uint64_t oid[3]
    cdef Gathered *page = &g.pages[g.entries]
    if g.entries == g.capacity or base + g.bytes + entry_bytes > s.segment_bytes:
        return FULL
    if not open_whole(ref, oid, entry, entry_bytes, plain, open_ctx) or not seal_entry(g.meta, g.entries, header, plain, oid, entry_bytes, <EntryHeader *> (out + base + g.bytes), seal_ctx):
        return CORRUPT
    (<uint16_t *> (out + FRAME_HEADER_BYTES))[g.entries] = <uint16_t> (g.bytes >> 3)
    g.meta.sizes[g.entries] = <uint16_t> (entry_bytes >> 3)
    page.slot = slot_stored(ref.segment, ref.generation, ref.ordinal)
    memcpy(page.oid, oid, OID_BYTES)
    page.pool = header.pool
    page.index = header.index
    g.entries += 1
    g.bytes += entry_bytes
    return OK


cdef uint32_t store_gather_end(Store_t *s, Gather *g, uint8_t *out) noexcept nogil:
    """Header and directory; returns the bytes of the image."""
    cdef uint32_t ordinal, base = align8(FRAME_HEADER_BYTES + 2 * g.capacity)
    cdef uint16_t *offsets = <uint16_t *> (out + FRAME_HEADER_BYTES)
    memset(out, 0, FRAME_HEADER_BYTES)
    memset(out + FRAME_HEADER_BYTES + 2 * g.capacity, 0, base - FRAME_HEADER_BYTES - 2 * g.capacity)
    for ordinal in range(g.entries, g.capacity):
        offsets[ordinal] = DIRECTORY_ABSENT
        g.meta.sizes[ordinal] = DIRECTORY_DEAD
    image_header(<ImageHeader *> out, g.segment, s.segments[g.segment].generation, g.capacity, g.bytes, g.meta)
    return base + g.bytes


cdef void store_gather_commit(Store_t *s, Gather *g, uint32_t spill) noexcept nogil:
    """The image is written: its pages move over, but for those that somebody has put or flushed meanwhile."""
    cdef Segment *row = &s.segments[g.segment]
    cdef Gathered *page
    cdef Pool *pool
    cdef uint32_t i, generation
    cdef uint64_t moved
    cdef Reader *reader = enter(s)
    spin_lock(&row.lock)
    ASSERT(row.state == SEG_FREE and row.live_entries == 0, b"an id that is handed out names nothing")
    generation = row.generation
    row.opened = load64(&s.epoch, SEQ_CST)
    row.ephemeral = 0
    row.ordered = 0
    row.damaged = False
    row.entries = g.capacity
    row.used_bytes = row.live_bytes = row.held_bytes = g.bytes
    row.live_entries = g.entries
    row.peer = SPILL_PEER
    row.handle = 0
    row.spill = spill
    row.spill_bytes = align8(FRAME_HEADER_BYTES + 2 * g.capacity) + g.bytes
    row.meta = g.meta
    row.compacting &= COMPACT_QUEUED
    row.touched_ms = coarse_ms()
    store32(&row.frame, SEGMENT_FRAMES_NONE, RELAXED)
    store32(&row.state, SEG_REMOTE, RELEASE)
    spin_unlock(&row.lock)
    for i in range(g.entries):
        page = &g.pages[i]
        moved = slot_stored(g.segment, generation, i)
        pool = pool_at(s, page.pool)
        if pool != NULL and replace(pool, page.oid, page.index, page.slot, moved):
            free_entry(s, page.slot)
        else:
            free_entry(s, moved)
    leave(reader)


cdef void store_gather_abort(Store_t *s, Gather *g) noexcept nogil:
    free(g.meta)
    release_id(s, g.segment)


cdef uint64_t store_census(Store_t *s, uint64_t pool_id, uint64_t first, uint32_t count, const uint8_t *resident,
                           uint64_t *census) noexcept nogil:
    """Where 'count' pages of a dense pool are: adds to the numbers of absent, same-filled, local, remote and lost ones, without
    those whose low nibble in 'resident' is set. Returns the page to go on with; what was never populated is skipped, and nothing
    of it counted. A glance, no lock."""
    cdef Reader *reader = enter(s)
    cdef Pool *pool = pool_at(s, pool_id)
    cdef uint64_t slot, next = first + count
    cdef uint32_t i, state
    cdef bint cuts = load64(&s.cut, RELAXED) != 0
    if pool != NULL and not load8(&pool.populated[first // SLOTS_PER_CHUNK], ACQUIRE):
        next = (first // SLOTS_PER_CHUNK + 1) * SLOTS_PER_CHUNK
    elif pool != NULL:
        for i in range(count):
            slot = load64(&pool.slots[first + i], RELAXED)
            if resident[i] & 0x0f:
                continue
            if slot == 0:
                census[0] += 1
            elif slot_kind(slot) == KIND_FILLED:
                census[1] += 1
            elif slot_segment(slot) >= load32(&s.segments_used, ACQUIRE):
                census[4] += 1              # damaged
            else:
                state = load32(&s.segments[slot_segment(slot)].state, RELAXED)
                if cuts and state == SEG_REMOTE and store_slot_state(s, slot) == LOST:
                    state = SEG_LOST
                census[3 if state == SEG_REMOTE else 4 if state == SEG_LOST else 2] += 1
    leave(reader)
    return next


cdef uint32_t store_seal_open(Store_t *s) noexcept nogil:
    cdef uint32_t sealed = 0, i
    for i in range(12):
        pthread_mutex_lock(&s.heads[i].lock)
        if s.heads[i].segment != SEGMENT_FRAMES_NONE:
            seal_head(s, &s.heads[i])
            sealed += 1
        pthread_mutex_unlock(&s.heads[i].lock)
    return sealed


cdef uint32_t store_seal_cold(Store_t *s, uint64_t age_ms) noexcept nogil:
    """Seal the open segments that nobody has appended to or read from for so long, so that they can leave; they keep their
    age. Appending does not write down when: whoever asks sees whether a segment has grown since it asked before."""
    cdef uint32_t sealed = 0, i, segment
    cdef uint64_t now = coarse_ms(), since
    cdef Segment *row
    cdef Head *head
    for i in range(12):
        head = &s.heads[i]
        pthread_mutex_lock(&head.lock)
        segment = head.segment
        if segment != SEGMENT_FRAMES_NONE:
            row = &s.segments[segment]
            if head.seen_segment != segment or head.seen_bytes != row.used_bytes:
                head.seen_segment = segment
                head.seen_bytes = row.used_bytes
                head.seen_ms = now
            spin_lock(&row.lock)
            since = max(head.seen_ms, row.touched_ms)
            spin_unlock(&row.lock)
            if now >= since + age_ms:
                seal_head(s, head)
                spin_lock(&row.lock)
                if row.state == SEG_SEALED:
                    row.touched_ms = since
                spin_unlock(&row.lock)
                sealed += 1
        pthread_mutex_unlock(&head.lock)
    return sealed


# --- the Python face's base ----------------------------------------------------------------------------------------

cdef int recount_slot(Store_t *s, uint64_t slot, uint32_t *entries, uint64_t *size, uint64_t *filled) noexcept nogil:
    """One live slot: it must name a live entry of the generation it says. Adds to the recount."""
    cdef Segment *row
    cdef uint32_t mark
    cdef uint32_t segment = slot_segment(slot)
    if slot_kind(slot) == KIND_FILLED:
        filled[0] += 1
        return 0
    if slot_kind(slot) != KIND_STORED or segment >= s.segments_used:
        return -1
    row = &s.segments[segment]
    if row.generation != slot_generation(slot) or slot_ordinal(slot) >= row.entries:
        return -1
    if row.state == SEG_REMOTE or row.state == SEG_LOST:
        mark = row.meta.sizes[slot_ordinal(slot)]
        size[segment] += <uint64_t> (mark & SIZE_UNITS) * 8
    elif row.frame != SEGMENT_FRAMES_NONE:
        mark = directory(s, row.frame)[-1 - <int64_t> slot_ordinal(slot)]
        size[segment] += entry_bytes_at(s, row, slot_ordinal(slot))
    else:
        return -1
    entries[segment] += 1
    return -1 if mark & DIRECTORY_DEAD else 0


cdef int64_t find_overlap(Store_t *s, Segment *row) except -2:
    """The first live entry of a local segment that shares bytes with an earlier one or does not lie within the used
    bytes; -1 for none."""
    cdef uint32_t *words = directory(s, row.frame)
    cdef uint32_t i, k, word, top = (FRAME_HEADER_BYTES + row.used_bytes) // 8
    taken = bytearray(top)
    cdef uint8_t[:] units = taken
    for i in range(row.entries):
        word = words[-1 - <int64_t> i]
        if word & DIRECTORY_DEAD:
            continue
        if word_bytes(word) < HEADER_BYTES or (word & DIRECTORY_OFFSET) < FRAME_HEADER_BYTES // 8 or \
                (word & DIRECTORY_OFFSET) + (word >> DIRECTORY_SIZE_SHIFT) > top:
            return i
        for k in range(word & DIRECTORY_OFFSET, (word & DIRECTORY_OFFSET) + (word >> DIRECTORY_SIZE_SHIFT)):
            if units[k]:
                return i
            units[k] = 1
    return -1


cdef class Store:
    """Owns the arena and the native state. Use ramster.engine.store.Store, which documents the contract."""

    def __cinit__(self, uint64_t arena_bytes, uint32_t segment_bytes, path, bint lock, uint64_t full_wait_ns,
                  uint32_t segments_max, bytes node_key, double clean_low, double pressure, bint cleaner, arena_fd=None):
        cdef Store_t *s
        cdef uint32_t i
        cdef int result
        cdef bint fresh
        if segment_bytes < 65536 or segment_bytes > 262144 or segment_bytes % 4096:
            raise errors.UsageError(f"segment of {segment_bytes} bytes: must be 64 KiB to 256 KiB in whole pages")
        if arena_bytes < 8 * <uint64_t> segment_bytes:
            raise errors.UsageError(f"arena of {arena_bytes} bytes: must hold at least 8 segments of {segment_bytes} bytes")
        # Asked before anything is taken: an unlimited memfd grows until the kernel kills somebody.
        available = memory_available()
        if arena_bytes > available and arena_fd is None:
            raise errors.StoreFull(
                f"cannot reserve an arena of {arena_bytes >> 20} MiB: {available >> 20} MiB of memory are available")
        if len(node_key) != 32:
            raise errors.UsageError("the node key must be 32 bytes")
        s = <Store_t *> calloc(1, sizeof(Store_t))
        if s == NULL:
            raise MemoryError
        self.s = s
        s.arena_fd = s.freed_fd = s.pressure_fd = -1
        s.segment_bytes = segment_bytes
        s.frames = <uint32_t> (arena_bytes // segment_bytes)
        s.arena_bytes = <uint64_t> s.frames * segment_bytes
        s.segments_max = max(segments_max, 2 * s.frames)
        s.full_wait_ns = full_wait_ns
        s.epoch = 1
        s.reserve_frames = CLEANER_RESERVE
        s.clean_low_frames = max(<uint32_t> (clean_low * s.frames), <uint32_t> (CLEANER_RESERVE + 1))
        s.pressure_frames = <uint32_t> (pressure * s.frames)
        s.head_stripes = max(1, min(<int> HEAD_STRIPES_MAX, min(<int> (s.frames // 32), <int> (os.cpu_count() or 1))))
        memcpy(s.node_key, <const uint8_t *> PyBytes_AS_STRING(node_key), 32)
        pthread_mutex_init(&s.frame_lock, NULL)
        pthread_mutex_init(&s.clean_lock, NULL)
        pthread_mutex_init(&s.pools_lock, NULL)
        pthread_mutex_init(&s.freed_lock, NULL)
        cond_init_monotonic(&s.room)
        cond_init_monotonic(&s.clean_wanted)
        for i in range(12):
            pthread_mutex_init(&s.heads[i].lock, NULL)
            s.heads[i].segment = SEGMENT_FRAMES_NONE
            s.heads[i].ephemeral = 1 if HEAD_STRIPES_MAX <= i < 2 * HEAD_STRIPES_MAX or i == 9 else 0
            s.heads[i].cleaner = i >= 2 * HEAD_STRIPES_MAX
        s.segments = <Segment *> mmap(NULL, <uint64_t> s.segments_max * sizeof(Segment), PROT_READ | PROT_WRITE,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        s.free_ids = <uint32_t *> mmap(NULL, <uint64_t> s.segments_max * 4, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        s.frame_segment = <uint32_t *> malloc(4 * <size_t> s.frames)
        s.free_frames = <uint32_t *> malloc(4 * <size_t> s.frames)
        s.retired = <Retired *> malloc(sizeof(Retired) * s.frames)
        s.hints = max(<uint32_t> ROOM_HINTS_MIN, <uint32_t> (s.arena_bytes // ROOM_ARENA_SHARE))
        s.rooms.hints = <Room *> malloc(sizeof(Room) * s.hints)
        if <void *> s.segments == MAP_FAILED or <void *> s.free_ids == MAP_FAILED or s.frame_segment == NULL or \
                s.free_frames == NULL or s.retired == NULL or s.rooms.hints == NULL:
            raise MemoryError
        s.rooms.spare = s.hints
        for i in range(s.hints):
            s.rooms.hints[i].next = i + 1 if i + 1 < s.hints else SEGMENT_FRAMES_NONE
        s.arena = <uint8_t *> map_file("ramster-arena", s.arena_bytes, &s.arena_fd, path, arena_fd)
        # What is given and has its memory is left as it is: no frame is read before it is written.
        fresh = arena_fd is None or os.fstat(s.arena_fd).st_blocks * 512 < s.arena_bytes
        with nogil:
            result = fallocate(s.arena_fd, 0, 0, <long> s.arena_bytes) if fresh else 0
        if result != 0:
            raise errors.StoreFull(
                f"cannot reserve an arena of {s.arena_bytes >> 20} MiB in memory ({strerror(errno).decode()}): "
                "make it smaller or /dev/shm larger")
        with nogil:
            if fresh:
                memset(s.arena, 0, s.arena_bytes)   # pre-touched: a put never waits for the kernel to find a page
            s.locked = lock
            bring_into_memory(s, s.arena, s.arena_bytes)
            ready_rows(s, 0)
            s.rows_ready = min(<uint32_t> ROWS_PER_STEP, s.segments_max)
            keep_in_memory(s, s, sizeof(Store_t))
            keep_in_memory(s, s.frame_segment, 4 * <uint64_t> s.frames)
            keep_in_memory(s, s.free_frames, 4 * <uint64_t> s.frames)
            keep_in_memory(s, s.retired, sizeof(Retired) * <uint64_t> s.frames)
            keep_in_memory(s, s.rooms.hints, sizeof(Room) * <uint64_t> s.hints)
        for i in range(s.frames):
            s.frame_segment[i] = SEGMENT_FRAMES_NONE
            s.free_frames[i] = s.frames - 1 - i
        s.free_count = s.frames
        s.freed_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        s.pressure_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if s.freed_fd < 0 or s.pressure_fd < 0:
            raise OSError(errno, strerror(errno).decode())
        if cleaner:
            need_thread(&s.cleaner, cleaner_main, s, b"ramster-clean")
            s.cleaner_running = True

    def __dealloc__(self):
        cdef Store_t *s = self.s
        cdef uint32_t i
        cdef void *chunk
        if s == NULL:
            return
        self.stop()
        for i in range(POOLS_MAX):
            if s.pools[i] != NULL:
                drop_pages(s, s.pools[i])
                drop_pool_memory(s, s.pools[i])
        if s.segments != NULL and <void *> s.segments != MAP_FAILED:
            for i in range(s.segments_used):
                if s.segments[i].meta != NULL:
                    free(s.segments[i].meta)
            munmap(s.segments, <uint64_t> s.segments_max * sizeof(Segment))
        if s.free_ids != NULL and <void *> s.free_ids != MAP_FAILED:
            munmap(s.free_ids, <uint64_t> s.segments_max * 4)
        if s.arena != NULL:
            munmap(s.arena, s.arena_bytes)
        for fd in (s.arena_fd, s.freed_fd, s.pressure_fd):
            if fd >= 0:
                close(fd)
        free(s.frame_segment)
        free(s.free_frames)
        free(s.retired)
        free(s.rooms.hints)
        while s.nodes.chunks != NULL:
            chunk = s.nodes.chunks
            s.nodes.chunks = (<void **> chunk)[0]
            munmap(chunk, NODES_CHUNK)
        OPENSSL_cleanse(s.node_key, 32)
        free(s)
        self.s = NULL

    cdef void stop(self):
        cdef Store_t *s = self.s
        store32(&s.stopping, 1, RELEASE)
        if s.cleaner_running:
            s.cleaner_running = False
            with nogil:
                pthread_mutex_lock(&s.frame_lock)
                pthread_cond_broadcast(&s.clean_wanted)
                pthread_mutex_unlock(&s.frame_lock)
                pthread_join(s.cleaner, NULL)

    cdef Store_t *live(self) except NULL:
        if self.closed:
            raise errors.UsageError("the store is closed")
        return self.s

    def close(self):
        """Stop the cleaner. The memory goes with the last reference, since links and regions may still hold it."""
        self.closed = True
        self.stop()

    @property
    def pressure_fd(self):
        return self.live().pressure_fd

    def pressure_handled(self):
        """Let the next shortage raise pressure_fd again."""
        store32(&self.live().pressure_raised, 0, RELEASE)

    def create_pool(self, *, pages=None, bint persistent=True):
        cdef Store_t *s = self.live()
        cdef uint64_t pool = 0
        cdef uint64_t n = 0
        cdef int result
        cdef bint dense = pages is not None
        if dense:
            if not 0 < pages <= 1 << 32:
                raise errors.UsageError(f"a pool of {pages} pages: must be 1 to 2^32")
            n = pages
        with nogil:
            result = store_create_pool(s, dense, n, not persistent, &pool)
        if result == FULL:
            raise errors.StoreFull(f"all {POOLS_MAX} pools are in use")
        if result != OK:
            raise MemoryError("cannot reserve the page table of a new pool")
        return pool

    def populate(self, uint64_t pool, uint64_t pages):
        cdef Store_t *s = self.live()
        cdef uint64_t first = 0
        cdef int result = OK
        if 8 * pages > memory_available():
            raise errors.StoreFull(f"the page table of {pages} pages takes {8 * pages >> 20} MiB, more than is available")
        while first < pages and result == OK:
            with nogil:
                result = store_populate(s, pool, first)
            first += SLOTS_PER_CHUNK
        raise_for(s, result, pool, min(first, pages) - 1)

    def destroy_pool(self, uint64_t pool):
        cdef Store_t *s = self.live()
        cdef int result
        with nogil:
            result = store_destroy_pool(s, pool)
        raise_for(s, result, pool, 0)

    def put(self, uint64_t pool, index, page, oid=(0, 0, 0)):
        cdef Store_t *s = self.live()
        cdef Py_buffer view
        cdef uint64_t key[3]
        cdef int result
        cdef uint32_t small
        split_oid(oid, key)
        check_oid(s, pool, key)
        small = check_index(index)
        PyObject_GetBuffer(page, &view, PyBUF_SIMPLE)
        try:
            if view.len != PAGE:
                raise errors.UsageError(f"a page is {PAGE} bytes, got {view.len}")
            with nogil:
                result = store_put(s, pool, key, small, <const uint8_t *> view.buf, s.full_wait_ns)
        finally:
            PyBuffer_Release(&view)
        raise_for(s, result, pool, index)

    def get(self, uint64_t pool, index, oid=(0, 0, 0), int mode=-1):
        cdef Store_t *s = self.live()
        cdef uint64_t key[3]
        cdef RemoteRef ref
        cdef int result
        cdef uint32_t small
        if not -1 <= mode <= 1:
            raise errors.UsageError(f"get mode {mode}: must be 1 (remove), 0 (remove if ephemeral) or -1 (keep)")
        split_oid(oid, key)
        check_oid(s, pool, key)
        small = check_index(index)
        page = PyBytes_FromStringAndSize(NULL, PAGE)
        cdef uint8_t *out = <uint8_t *> PyBytes_AS_STRING(page)
        with nogil:
            result = store_get(s, pool, key, small, out, mode, &ref)
        if result == MISS:
            return None
        if result == REMOTE:
            raise errors.UsageError(f"page {index} of pool {pool} is on node {ref.peer}: read it through Links.get")
        raise_for(s, result, pool, index)
        return page

    def flush_page(self, uint64_t pool, index, oid=(0, 0, 0)):
        cdef Store_t *s = self.live()
        cdef uint64_t key[3]
        cdef int result
        cdef uint32_t small
        split_oid(oid, key)
        check_oid(s, pool, key)
        small = check_index(index)
        with nogil:
            result = store_flush(s, pool, key, small)
        if result == MISS:
            return False
        raise_for(s, result, pool, index)
        return True

    def flush_object(self, uint64_t pool, oid):
        cdef Store_t *s = self.live()
        cdef uint64_t key[3]
        cdef uint64_t dropped = 0
        cdef Pool *p
        cdef Reader *reader
        cdef bint dense = False
        split_oid(oid, key)
        with nogil:
            reader = enter(s)
            p = pool_at(s, pool)
            if p != NULL:
                dense = p.dense
                if not dense:
                    dropped = flush_object(s, p, key)
            leave(reader)
        if p == NULL:
            raise no_pool(s, pool)
        if dense:
            raise errors.UsageError(f"pool {pool} is dense: flush its pages, or destroy it")
        return dropped

    def where(self, uint64_t pool, uint64_t index):
        """'here', 'spill', 'lost', 'none' or the number of the lender, of a page in a dense pool."""
        cdef uint32_t peer = 0
        cdef uint64_t slot = 0
        cdef int result = store_where(self.live(), pool, check_index(index), &peer, &slot)
        if result == NO_POOL:
            pages = store_pool_pages(self.s, pool)
            raise errors.UsageError(f"index {index} is beyond the end of pool {pool}, which has {pages} pages")
        return {OK: "here", LOST: "lost", CORRUPT: "lost", MISS: "none"}.get(result, "spill" if peer == SPILL_PEER else peer)

    def copies(self):
        """Segments on lenders that may not be dropped: (those that the spill file has too, those that it has not)."""
        cdef Store_t *s = self.live()
        cdef uint32_t i, mirrored = 0, unmirrored = 0
        cdef Segment *row
        with nogil:
            for i in range(load32(&s.segments_used, ACQUIRE)):
                row = &s.segments[i]
                if load32(&row.state, RELAXED) != SEG_REMOTE:
                    continue
                spin_lock(&row.lock)
                if row.state == SEG_REMOTE and row.peer != SPILL_PEER and not row.ephemeral:
                    mirrored += row.spill != 0
                    unmirrored += row.spill == 0
                spin_unlock(&row.lock)
        return mirrored, unmirrored

    def census(self, uint64_t pool):
        """Pages of a dense pool by where they are: here (same-filled ones too), away, lost. A glance, while others go on."""
        cdef Store_t *s = self.live()
        cdef uint64_t found[5]
        cdef uint64_t pages = store_pool_pages(s, pool), first = 0
        cdef uint8_t nobody[4096]       # divides SLOTS_PER_CHUNK
        memset(found, 0, sizeof(found))
        memset(nobody, 0, sizeof(nobody))
        with nogil:
            while first < pages:
                first = store_census(s, pool, first, <uint32_t> min(<uint64_t> sizeof(nobody), pages - first), nobody, found)
        store_pool_pages(s, pool)       # destroyed meanwhile: what was counted is of nobody
        return {"here": found[1] + found[2], "away": found[3], "lost": found[4]}

    def seal_open(self):
        cdef Store_t *s = self.live()
        cdef uint32_t sealed
        with nogil:
            sealed = store_seal_open(s)
        return sealed

    def seal_cold(self, uint64_t age_ms):
        """Seal open segments that were neither written nor read for so long; how many."""
        cdef Store_t *s = self.live()
        cdef uint32_t sealed
        with nogil:
            sealed = store_seal_cold(s, age_ms)
        return sealed

    def clean(self, uint32_t segments=1):
        cdef Store_t *s = self.live()
        cdef uint32_t cleaned
        with nogil:
            cleaned = clean(s, segments, 1.0)
        return cleaned

    def coldest(self, uint32_t most):
        """Sealed local segments, untouched for longest first: (segment, generation, live bytes, live pages, age ms, ephemeral)."""
        cdef Store_t *s = self.live()
        cdef Candidate *found
        cdef uint32_t n, i
        most = min(most, 4096)
        found = <Candidate *> malloc(sizeof(Candidate) * max(most, 1))
        if found == NULL:
            raise MemoryError
        with nogil:
            n = store_coldest(s, found, most) if most else 0
        result = [(found[i].segment, found[i].generation, found[i].live_bytes, found[i].live_entries, found[i].age_ms,
                   bool(found[i].ephemeral)) for i in range(n)]
        free(found)
        return result

    def frames(self):
        """(free, total) frames of the arena, without looking at anything else: cheap enough to ask at each decision."""
        cdef Store_t *s = self.live()
        cdef uint32_t free_count
        pthread_mutex_lock(&s.frame_lock)
        reclaim_retired(s)
        free_count = s.free_count
        pthread_mutex_unlock(&s.frame_lock)
        return free_count, s.frames

    def corrupt(self, uint64_t pool, uint64_t index, uint32_t bit):
        """Flip one bit of a stored page's bytes in the arena: how tests show that a checksum is really looked at."""
        cdef Store_t *s = self.live()
        cdef uint64_t zero[3]
        cdef Segment *row
        cdef uint8_t *place
        cdef uint64_t slot
        memset(zero, 0, OID_BYTES)
        store_pool_pages(s, pool)
        slot = store_slot(s, pool, zero, check_index(index))
        if slot_kind(slot) == KIND_FILLED:
            pool_at(s, pool).slots[index] ^= <uint64_t> 1 << (bit % 62)
            return
        if slot_kind(slot) != KIND_STORED or s.segments[slot_segment(slot)].frame == SEGMENT_FRAMES_NONE:
            raise errors.UsageError(f"page {index} is not stored here")
        row = &s.segments[slot_segment(slot)]
        place = <uint8_t *> entry_at(s, row, slot_ordinal(slot))
        if (<EntryHeader *> place).length <= OID_BYTES + PAGE:      # else flipped before: any bit of the header will do
            bit %= (CHECKED_BYTES + (<EntryHeader *> place).length) * 8
        else:
            bit %= CHECKED_BYTES * 8
        if bit >= CHECKED_BYTES * 8:
            bit += (HEADER_BYTES - CHECKED_BYTES) * 8       # behind its checksum the header of an unsealed entry has room alone
        place[bit // 8] ^= 1 << (bit % 8)

    def verify(self):
        """Recount everything from the page tables; AssertionError where stored != live. For a store that nobody else uses
        just now; its own cleaner is held off meanwhile."""
        cdef Store_t *s = self.live()
        cdef uint32_t *entries = <uint32_t *> calloc(s.segments_used + 1, 4)
        cdef uint64_t *sizes = <uint64_t *> calloc(s.segments_used + 1, 8)
        cdef uint64_t filled = 0, i, b
        cdef uint32_t p, k
        cdef Pool *pool
        cdef Leaf *leaf
        cdef Segment *row
        cdef Segment seen
        cdef uint32_t frames = 0, frames_idle
        cdef int64_t overlap
        wrong = []
        if entries == NULL or sizes == NULL:
            free(entries)
            free(sizes)
            raise MemoryError
        with nogil:
            pthread_mutex_lock(&s.clean_lock)
        for p in range(POOLS_MAX):
            pool = s.pools[p]
            if pool == NULL:
                continue
            if pool.dense:
                for i in range(pool.pages):
                    if pool.populated[i // SLOTS_PER_CHUNK] and pool.slots[i] != 0 and \
                            recount_slot(s, pool.slots[i], entries, sizes, &filled) != 0:
                        wrong.append(f"pool {p} page {i}: its slot names a dead or missing entry")
                continue
            for b in range(pool.buckets):
                leaf = pool.leaf_buckets[b]
                while leaf != NULL:
                    for k in range(8):
                        if leaf.slots[k] != 0 and recount_slot(s, leaf.slots[k], entries, sizes, &filled) != 0:
                            wrong.append(f"pool {p} index {leaf.number * 8 + k}: its slot names a dead or missing entry")
                    leaf = leaf.next
        for k in range(s.segments_used):
            row = &s.segments[k]
            spin_lock(&row.lock)            # answers of lenders may still come in
            seen = row[0]
            spin_unlock(&row.lock)
            if SEG_OPEN <= seen.state <= SEG_SHIPPING:
                frames += 1
                if seen.writers:
                    wrong.append(f"segment {k} has {seen.writers} writers")
                overlap = find_overlap(s, row)
                if overlap >= 0:
                    wrong.append(f"segment {k}: entry {overlap} lies outside, or on another one")
                if s.frame_segment[seen.frame] != k:
                    wrong.append(f"segment {k} lies in frame {seen.frame}, which belongs to segment {s.frame_segment[seen.frame]}")
            if seen.state == SEG_FREE or seen.state >= SEG_FREEING:
                if entries[k]:
                    wrong.append(f"segment {k} is free but {entries[k]} slots name it")
            elif seen.state == SEG_REMOTE and seen.held_bytes < seen.live_bytes:
                wrong.append(f"segment {k}: its lender holds {seen.held_bytes} bytes, of which {seen.live_bytes} are live")
            elif seen.live_entries != entries[k] or seen.live_bytes != sizes[k]:
                wrong.append(f"segment {k} (state {seen.state}) counts {seen.live_entries} live entries of {seen.live_bytes} bytes, "
                             f"the page tables {entries[k]} of {sizes[k]}")
        pthread_mutex_lock(&s.frame_lock)
        frames_idle = s.free_count + s.retired_count
        pthread_mutex_unlock(&s.frame_lock)
        if frames + frames_idle != s.frames:
            wrong.append(f"{frames} frames in use, {frames_idle} free or retired, of {s.frames}")
        if filled != total(s, C_FILLED):
            wrong.append(f"{total(s, C_FILLED)} same-filled pages counted, the page tables hold {filled}")
        pthread_mutex_unlock(&s.clean_lock)
        free(entries)
        free(sizes)
        if wrong:
            raise AssertionError("stored != live: " + "; ".join(wrong[:8]))

    def counters(self):
        """A plain dictionary; the face makes it a dataclass."""
        cdef Store_t *s = self.live()
        cdef uint32_t i
        cdef Segment *row
        cdef uint64_t local = 0, remote = 0, lost = 0, live_l = 0, used_l = 0, live_r = 0, pages_l = 0, pages_r = 0, pages_x = 0
        cdef uint64_t used_r = 0, metadata = 0, rows, spilled = 0, mirrored = 0, pages_s = 0
        cdef uint64_t unmirrored = 0, pages_u = 0
        for i in range(load32(&s.segments_used, ACQUIRE)):
            row = &s.segments[i]
            spin_lock(&row.lock)
            if row.meta != NULL:
                metadata += sizeof(RemoteMeta) + 2 * row.entries
            elif row.frame != SEGMENT_FRAMES_NONE:
                metadata += FRAME_HEADER_BYTES + 4 * (row.entries + 1)
            if row.state == SEG_REMOTE:
                remote += 1
                live_r += row.live_bytes
                pages_r += row.live_entries - row.meta.cut
                pages_x += row.meta.cut
                used_r += row.held_bytes
                if row.peer == SPILL_PEER:
                    spilled += 1
                    pages_s += row.live_entries - row.meta.cut
                elif row.spill:
                    mirrored += 1
                elif not row.ephemeral:
                    unmirrored += 1
                    pages_u += row.live_entries
            elif row.state == SEG_LOST:
                lost += 1
                pages_x += row.live_entries
            elif row.state != SEG_FREE and row.state < SEG_FREEING:
                local += 1
                live_l += row.live_bytes
                used_l += row.used_bytes
                pages_l += row.live_entries
            spin_unlock(&row.lock)
        pthread_mutex_lock(&s.frame_lock)
        reclaim_retired(s)
        i = s.free_count
        rows = s.rows_ready
        pthread_mutex_unlock(&s.frame_lock)
        # Rows and ids are mapped for segments_max, and there for so many.
        metadata += sizeof(Store_t) + s.frames * (8 + sizeof(Retired)) + s.hints * sizeof(Room) + \
            (rows * sizeof(Segment) + 4095 & ~<uint64_t> 4095) + (rows * 4 + 4095 & ~<uint64_t> 4095) + \
            total(s, C_TABLE_BYTES) + total(s, C_POOL_BYTES)
        spin_lock(&s.nodes.lock)
        metadata += s.nodes.bytes
        spin_unlock(&s.nodes.lock)
        filled = total(s, C_FILLED)
        puts = tallied(s, T_PUTS)
        return dict(
            arena_bytes=s.arena_bytes, segment_bytes=s.segment_bytes, frames_total=s.frames, frames_free=i,
            segments_local=local, segments_remote=remote, segments_spilled=spilled, segments_mirrored=mirrored, segments_unmirrored=unmirrored, pages_unmirrored=pages_u, segments_lost=lost, pages_stored=pages_l + pages_r + filled,
            pages_local=pages_l, pages_remote=pages_r, pages_spilled=pages_s, pages_filled=filled, pages_lost=pages_x, live_bytes=live_l,
            dead_bytes=used_l - live_l, live_bytes_remote=live_r, dead_bytes_remote=used_r - live_r,
            table_bytes=total(s, C_TABLE_BYTES), puts=puts, gets=tallied(s, T_GETS),
            local_gets=tallied(s, T_LOCAL_GETS), gets_missed=tallied(s, T_GETS_MISSED), flushes=tallied(s, T_FLUSHES),
            flushes_found=tallied(s, T_FLUSHES_FOUND), puts_refused=total(s, C_PUTS_REFUSED),
            cleaned_segments=total(s, C_CLEANED_SEGMENTS), cleaned_bytes=total(s, C_CLEANED_BYTES),
            puts_plugged=total(s, C_PLUGGED), shipped_segments=total(s, C_SHIPPED_SEGMENTS), bytes_in=puts * PAGE,
            bytes_compressed=tallied(s, T_BYTES_COMPRESSED), puts_incompressible=total(s, C_RAW), puts_untried=total(s, C_UNTRIED), ephemeral_dropped=total(s, C_EPHEMERAL_DROPPED),
            recompressed_pages=total(s, C_RECOMPRESSED), recompressed_saved_bytes=total(s, C_RECOMPRESSED_SAVED),
            corrupt_pages=total(s, C_CORRUPT), locked=bool(load32(&s.locked, RELAXED)), metadata_bytes=metadata)


cdef uint32_t check_index(index) except? 0xffffffffu:
    if not 0 <= index <= 0xffffffffu:
        raise errors.UsageError(f"index {index} is out of range: 0 to 2^32 - 1")
    return <uint32_t> index


cdef int check_oid(Store_t *s, uint64_t pool, const uint64_t *key) except -1:
    """A dense pool is one object, (0, 0, 0): another id there must not reach its pages."""
    cdef Reader *reader
    cdef bint dense
    if key[0] | key[1] | key[2]:
        reader = enter(s)
        dense = pool_at(s, pool) != NULL and pool_at(s, pool).dense
        leave(reader)
        if dense:
            raise errors.UsageError(f"pool {pool} is dense: its only object id is (0, 0, 0)")
    return 0


cpdef uint64_t memory_available() except *:
    """Bytes that can be had without pushing anything out, as the kernel estimates it."""
    with open("/proc/meminfo", "rb") as lines:
        for line in lines:
            if line.startswith(b"MemAvailable:"):
                return <uint64_t> int(line.split()[1]) * 1024
    return <uint64_t> -1


cdef int split_oid(oid, uint64_t *key) except -1:
    try:
        key[0], key[1], key[2] = oid
    except (OverflowError, TypeError, ValueError) as error:
        raise errors.UsageError(f"object id {oid!r}: must be three integers of 64 bits") from error
    return 0


cdef object no_pool(Store_t *s, uint64_t id):
    """Why there is no pool of this id, as an exception."""
    cdef uint64_t made
    pthread_mutex_lock(&s.pools_lock)
    made = s.pools_made
    pthread_mutex_unlock(&s.pools_lock)
    if 0 < id // POOLS_MAX <= made:
        return errors.PoolGone(f"pool {id} was destroyed: nothing is in it, and no other pool gets its id")
    return errors.UsageError(f"there is no pool {id}")


cdef int raise_for(Store_t *s, int result, uint64_t pool, uint64_t index) except -1:
    """Turn an outcome into the exception that names it."""
    if result == OK:
        return 0
    if result == FULL:
        raise errors.StoreFull(f"no room for page {index} of pool {pool} within the bounded wait; it was not stored")
    if result == NO_POOL:
        raise no_pool(s, pool)
    if result == OUT_OF_RANGE:
        raise errors.UsageError(f"index {index} is beyond the end of pool {pool}")
    if result == LOST:
        raise errors.PageLost(f"page {index} of pool {pool} is lost: the only node that held it is gone")
    if result == CORRUPT:
        raise errors.PageLost(f"page {index} of pool {pool} is lost: its stored bytes fail their checksum")
    if result == UNREACHABLE:
        raise errors.PageLost(f"page {index} of pool {pool} cannot be had: its lender does not answer")
    raise MemoryError(f"no memory for the page table of pool {pool}")
