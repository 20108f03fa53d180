"""The spill file: the last tier. Sealed images of segments in one file, read back page by page.

Covers: rooms for images, writing and reading them, the threads that wait for the disk. Does not cover: which segments go
there (remotify), making and naming the file (engine.spill), what a segment or a get is (_store, _link).

Rules:

* Only threads of this module wait for the disk, and the shipper where images are mirrored. They read into memory of their own
  and ask again whether anybody still waits before they touch the request: a disk that hangs makes gets fail at their
  deadline like a lender that hangs, only that a disk is given longer.
* One thread at most writes; the others are for those who wait for a page.
* A room is free again when nothing in its image lives. When rooms run short, what lives in several sparse images is made
  one image (_store has the rules); one room is kept for that. Images that a lender has too are left as they are.
* Nothing in the file is believed. Where an entry lies comes from the store's own table, and what is read is checked by its
  tag, whose key never leaves RAM, against seal id, ordinal and key of the page. So a room may be given to another image
  while it is still being read: what comes is no entry of that page, or the page's slot has changed before.
* O_DIRECT where the file system has it: a tier that serves memory pressure must neither fill the page cache nor wait for it.

Lock order: pending_lock or ship_lock (of _link), then 'lock'.
"""
from libc.errno cimport EINTR, EIO, ENOSPC, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset

from ramster.engine._c.atomic cimport *
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new
from ramster.engine._c.linux cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, POSIX_FADV_DONTNEED, PROT_READ, PROT_WRITE, SYNC_FILE_RANGE_WRITE, fallocate,
    mlock, mmap, munmap, posix_fadvise, pread, pwrite, sync_file_range)
from ramster.engine._c.pthread cimport (
    coarse_ms, cond_init_monotonic, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
    pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, start_thread)
from ramster.engine._histogram cimport quantile, record
from ramster.engine._link cimport (
    GET_PAGES_MAX, Links, Links_t, Pending, links_unspill, pending_arrived, pending_asked, pending_claim, reply_bytes)
from ramster.engine._store cimport (
    BUSY, ENTRY_BYTES_MAX, FRAME_HEADER_BYTES, FULL, LOST, OK, ORDINALS_MAX, SPILL_PEER, Candidate, Gather, Gathered, RemoteMeta, RemoteRef,
    store_gather_abort, store_gather_add, store_gather_begin, store_gather_commit, store_gather_end, store_seal_image, store_ship_abort, store_ship_begin, store_ship_commit,
    store_spare, store_sparsest, store_spilled, store_spilled_live, store_touch, store_unseal_begin, store_unseal_context)

import os

from ramster import errors

cdef uint32_t NONE = 0xffffffffu


cdef inline void say(uint64_t *counter, uint64_t amount) noexcept nogil:
    add64(counter, amount, RELAXED)


cdef inline uint64_t place(const Spill_t *sp, uint32_t room) noexcept nogil:
    return BLOCK + <uint64_t> room * sp.image_bytes


# --- rooms ---------------------------------------------------------------------------------------------------------

cdef uint32_t take_room(Spill_t *sp, uint32_t reserve) noexcept nogil:
    """The next free one after the last taken, so that images written together lie together; NONE when all but 'reserve' are
    in use."""
    cdef uint32_t i = 0, room = NONE, words = (sp.images + 63) // 64, word
    cdef uint64_t bits
    pthread_mutex_lock(&sp.lock)
    if sp.free > reserve:
        word = sp.cursor // 64
        bits = ~sp.used[word] & (~<uint64_t> 0 << (sp.cursor & 63))
        while bits == 0 and i <= words:
            word = (word + 1) % words
            bits = ~sp.used[word]
            i += 1
        ASSERT(bits != 0, b"what is counted as free is found")
        room = word * 64 + <uint32_t> ctz64(bits)
        sp.used[word] |= <uint64_t> 1 << (room & 63)
        sp.free -= 1
        sp.cursor = (room + 1) % sp.images
    pthread_mutex_unlock(&sp.lock)
    return room


cdef void give_room(void *spill, uint32_t room) noexcept nogil:
    cdef Spill_t *sp = <Spill_t *> spill
    cdef uint64_t bit = <uint64_t> 1 << (room & 63)
    pthread_mutex_lock(&sp.lock)
    ASSERT(room < sp.images and sp.used[room // 64] & bit, b"a room is given back once")
    sp.used[room // 64] &= ~bit
    sp.free += 1
    pthread_mutex_unlock(&sp.lock)


# --- the disk ------------------------------------------------------------------------------------------------------

cdef bint read_file(Spill_t *sp, uint8_t *buffer, uint32_t bytes, uint64_t at) noexcept nogil:
    cdef uint32_t done = 0
    cdef int64_t n
    while done < bytes:
        n = pread(sp.fd, buffer + done, bytes - done, <long> (at + done))
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:                      # 0: somebody has cut the file short
            store32(&sp.last_errno, <uint32_t> errno if n < 0 else EIO, RELAXED)
            say(&sp.read_errors, 1)
            return False
        done += <uint32_t> n
    if not sp.direct:
        posix_fadvise(sp.fd, <long> at, bytes, POSIX_FADV_DONTNEED)
    return True


cdef bint write_file(Spill_t *sp, uint8_t *image, uint32_t bytes, uint32_t room) noexcept nogil:
    """An image, padded to whole blocks in its buffer."""
    cdef uint32_t done = 0, whole = (bytes + BLOCK - 1) & ~<uint32_t> (BLOCK - 1)
    cdef uint64_t at = place(sp, room)
    cdef int64_t n
    memset(image + bytes, 0, whole - bytes)
    while done < whole:
        n = pwrite(sp.fd, image + done, whole - done, <long> (at + done))
        if n < 0 and errno == EINTR:
            continue
        if n <= 0:
            store32(&sp.last_errno, <uint32_t> errno if n < 0 else ENOSPC, RELAXED)
            store64(&sp.failed_ms, coarse_ms(), RELAXED)
            say(&sp.write_errors, 1)
            return False
        done += <uint32_t> n
    if not sp.direct:
        # What waits in the page cache would be dropped only once it is on the disk: begin now, drop what is there already.
        sync_file_range(sp.fd, <long> at, whole, SYNC_FILE_RANGE_WRITE)
        posix_fadvise(sp.fd, BLOCK, <long> (at - BLOCK), POSIX_FADV_DONTNEED)
    say(&sp.write_count, 1)
    say(&sp.bytes_written, whole)
    return True


cdef void read_pages(Thread *t, const Read *read) noexcept nogil:
    """Read what a get asks for, in one piece from its first to its last entry: they lie within one image."""
    cdef Spill_t *sp = t.spill
    cdef uint32_t segment = 0, generation = 0, pages, room, k, low = NONE, high = 0, at
    cdef uint16_t ordinals[GET_PAGES_MAX]
    cdef uint32_t offsets[GET_PAGES_MAX]
    cdef uint16_t sizes[GET_PAGES_MAX]
    cdef int status = OK
    cdef Pending *p
    pages = pending_asked(sp.links, read.pending, read.id, &segment, &generation, ordinals)
    if pages == 0:
        return
    room = store_spilled(sp.store, segment, generation, ordinals, pages, offsets, sizes)
    if room == 0:
        status = BUSY
    else:
        for k in range(pages):
            ASSERT(sizes[k] <= ENTRY_BYTES_MAX and offsets[k] + sizes[k] <= sp.image_bytes, b"an entry lies in its image")
            low = min(low, offsets[k])
            high = max(high, offsets[k] + sizes[k])
        low &= ~<uint32_t> (BLOCK - 1)
        high = (high + BLOCK - 1) & ~<uint32_t> (BLOCK - 1)
        if not read_file(sp, t.buffer, high - low, place(sp, room - 1) + low):
            status = LOST
    p = pending_claim(sp.links, read.pending, read.id)
    if p == NULL:
        return
    if status == LOST and p.ref.peer != SPILL_PEER:
        status = links_unspill(sp.links, &p.ref)    # a lender has it too
    at = (2 * pages + 7) & ~<uint32_t> 7
    if status == OK:
        memset(t.body, 0, at)
        memcpy(t.body, sizes, 2 * pages)
        for k in range(pages):
            memcpy(t.body + at, t.buffer + (offsets[k] - low), sizes[k])
            at += sizes[k]              # a multiple of 8, as entries in images are
    say(&sp.read_count, 1)
    say(&sp.pages_read, pages)
    record(&sp.read_ns, now_ns() - read.asked_ns)
    pending_arrived(sp.links, p, status, t.body, at, t.open_ctx)


cdef void write_segment(Thread *t, const Write *order) noexcept nogil:
    """Seal a segment and write it. Whatever fails leaves it in the arena, whole."""
    cdef Spill_t *sp = t.spill
    cdef RemoteMeta *meta = NULL
    cdef uint32_t bytes, room
    store32(&sp.store.segments[order.segment].ordered, 0, RELAXED)
    room = take_room(sp, sp.reserve)
    if room == NONE:
        say(&sp.refused, 1)
        store_touch(sp.store, order.segment, order.generation)
        return
    if store_ship_begin(sp.store, order.segment, order.generation) != OK:
        give_room(sp, room)
        return
    bytes = store_seal_image(sp.store, order.segment, t.buffer, &meta, t.seal_ctx, NULL)
    if bytes != 0 and write_file(sp, t.buffer, bytes, room):
        store_ship_commit(sp.store, order.segment, SPILL_PEER, 0, room + 1, meta)
        return
    if bytes != 0:
        free(meta)
    give_room(sp, room)
    store_ship_abort(sp.store, order.segment)


cdef bint merge_source(Thread *t, Gather *g, const Candidate *source) noexcept nogil:
    """Take over what lives in one image; False once the new one is full."""
    cdef Spill_t *sp = t.spill
    cdef RemoteRef ref
    cdef uint16_t sizes[ORDINALS_MAX]
    cdef uint32_t entries = 0, ordinal, size, at, bytes, room
    cdef int result
    room = store_spilled_live(sp.store, source.segment, source.generation, &ref, sizes, &entries)
    if room == 0:
        return True
    at = bytes = (FRAME_HEADER_BYTES + 2 * entries + 7) & ~<uint32_t> 7
    for ordinal in range(entries):
        bytes += <uint32_t> (sizes[ordinal] & 0x7fff) * 8
    ASSERT(bytes <= sp.image_bytes, b"an image fits into its room")
    bytes = (bytes + BLOCK - 1) & ~<uint32_t> (BLOCK - 1)
    if not read_file(sp, t.buffer, bytes, place(sp, room - 1)) or store_unseal_begin(&ref, t.open_ctx) != OK:
        store_spare(sp.store, source.segment, source.generation)
        return True
    for ordinal in range(entries):
        size = <uint32_t> (sizes[ordinal] & 0x7fff) * 8
        if size and not sizes[ordinal] & 0x8000:
            ref.ordinal = ordinal
            result = store_gather_add(sp.store, g, sp.merge_buffer, &ref, t.buffer + at, size, t.open_ctx, t.seal_ctx)
            if result == FULL:
                return False
            if result != OK:
                store_spare(sp.store, source.segment, source.generation)
        at += size
    say(&sp.merged, 1)
    return True


cdef bint merge(Thread *t) noexcept nogil:
    """Make one image of several that are mostly dead. False when there is nothing to be won."""
    cdef Spill_t *sp = t.spill
    cdef Candidate sources[MERGE_MAX]
    cdef Gather g
    cdef uint32_t n, k, room, bytes = FRAME_HEADER_BYTES + 8
    g.capacity = 0
    g.pages = sp.merge_pages
    n = store_sparsest(sp.store, &sp.merge_cursor, sources, MERGE_MAX)
    k = 0
    while k < n and g.capacity + sources[k].live_entries <= MERGE_PAGES_MAX and \
            bytes + sources[k].live_bytes + 2 * sources[k].live_entries <= sp.image_bytes:
        bytes += sources[k].live_bytes + 2 * sources[k].live_entries
        g.capacity += sources[k].live_entries
        k += 1
    if k < 2 or g.capacity == 0:
        return False
    n = k
    room = take_room(sp, 0)
    if room == NONE:
        return False
    if not store_gather_begin(sp.store, &g, t.seal_ctx):
        give_room(sp, room)
        return False
    k = 0
    while k < n and merge_source(t, &g, &sources[k]):
        k += 1
    if g.entries:
        bytes = store_gather_end(sp.store, &g, sp.merge_buffer)
        if write_file(sp, sp.merge_buffer, bytes, room):
            store_gather_commit(sp.store, &g, room + 1)
            return True
    store_gather_abort(sp.store, &g)
    give_room(sp, room)
    return False


cdef inline bint merge_due(const Spill_t *sp) noexcept nogil:
    """Under the lock: rooms run short, and the last look was not in vain or is a while ago."""
    return sp.free < sp.images // 4 and sp.reserve and now_ns() >= sp.merge_after_ns


cdef void *thread_main(void *argument) noexcept nogil:
    cdef Thread *t = <Thread *> argument
    cdef Spill_t *sp = t.spill
    cdef Read read
    cdef Write order
    cdef bint writes, merges, helped = True
    while True:
        pthread_mutex_lock(&sp.lock)
        while not sp.stopping and sp.reads_count == 0 and (sp.writing or (sp.orders_count == 0 and not merge_due(sp))):
            cond_wait_until(&sp.wanted, &sp.lock, now_ns() + MERGE_PAUSE_MS * 1000000ull)
        if sp.stopping:
            pthread_mutex_unlock(&sp.lock)
            return NULL
        merges = not sp.writing and merge_due(sp) and (sp.orders_count == 0 or sp.free <= 2 * sp.reserve)
        writes = (merges or sp.orders_count != 0) and not sp.writing and (sp.reads_count == 0 or sp.read_last)
        merges &= writes
        sp.read_last = not writes
        if writes:
            sp.writing = 1
        if merges:
            pass
        elif writes:
            order = sp.orders[sp.orders_head]
            sp.orders_head = (sp.orders_head + 1) % ORDERS_MAX
            sp.orders_count -= 1
        else:
            read = sp.reads[sp.reads_head]
            sp.reads_head = (sp.reads_head + 1) % READS_MAX
            sp.reads_count -= 1
        pthread_mutex_unlock(&sp.lock)
        if not writes:
            read_pages(t, &read)
            continue
        if merges:
            helped = merge(t)
        else:
            write_segment(t, &order)
        pthread_mutex_lock(&sp.lock)
        sp.writing = 0
        if merges and not helped:
            sp.merge_after_ns = now_ns() + MERGE_PAUSE_MS * 1000000ull
        pthread_mutex_unlock(&sp.lock)


# --- for the links -------------------------------------------------------------------------------------------------

cdef bint spill_get(void *spill, uint32_t pending, uint64_t id) noexcept nogil:
    cdef Spill_t *sp = <Spill_t *> spill
    cdef Read *read
    cdef bint room
    pthread_mutex_lock(&sp.lock)
    room = sp.reads_count < READS_MAX and not sp.stopping
    if room:
        read = &sp.reads[(sp.reads_head + sp.reads_count) % READS_MAX]
        read.pending = pending
        read.id = id
        read.asked_ns = now_ns()
        sp.reads_count += 1
        pthread_cond_signal(&sp.wanted)
    pthread_mutex_unlock(&sp.lock)
    return room


cdef bint spill_order(void *spill, uint32_t segment, uint32_t generation) noexcept nogil:
    cdef Spill_t *sp = <Spill_t *> spill
    cdef bint room
    pthread_mutex_lock(&sp.lock)
    room = sp.orders_count < ORDERS_MAX and not sp.stopping
    if room:
        sp.orders[(sp.orders_head + sp.orders_count) % ORDERS_MAX].segment = segment
        sp.orders[(sp.orders_head + sp.orders_count) % ORDERS_MAX].generation = generation
        sp.orders_count += 1
        store32(&sp.store.segments[segment].ordered, 1, RELAXED)
        pthread_cond_signal(&sp.wanted)
    pthread_mutex_unlock(&sp.lock)
    return room


cdef uint32_t spill_keep(void *spill, const uint8_t *image, uint32_t bytes) noexcept nogil:
    cdef Spill_t *sp = <Spill_t *> spill
    cdef uint32_t room = take_room(sp, sp.reserve)
    if room == NONE:
        say(&sp.refused, 1)
        return 0
    memcpy(sp.keep_buffer, image, bytes)
    if write_file(sp, sp.keep_buffer, bytes, room):
        return room + 1
    give_room(sp, room)
    return 0


cdef uint32_t spill_under_way(void *spill) noexcept nogil:
    cdef Spill_t *sp = <Spill_t *> spill
    cdef uint32_t n
    pthread_mutex_lock(&sp.lock)
    n = sp.orders_count + sp.writing
    pthread_mutex_unlock(&sp.lock)
    return n


cdef void spill_stop(void *spill) noexcept nogil:
    cdef Spill_t *sp = <Spill_t *> spill
    cdef uint32_t i
    pthread_mutex_lock(&sp.lock)
    sp.stopping = True
    pthread_cond_broadcast(&sp.wanted)
    pthread_mutex_unlock(&sp.lock)
    for i in range(sp.started):
        pthread_join(sp.threads[i].thread, NULL)
    sp.started = 0


# --- Python --------------------------------------------------------------------------------------------------------

def reserve(int fd, uint64_t size):
    """Room on the disk for a file of so many bytes, now. OSError: EOPNOTSUPP where the file system cannot."""
    cdef int result
    with nogil:
        result = fallocate(fd, 0, 0, <long> size)
    if result != 0:
        raise OSError(errno, os.strerror(errno))


cdef uint8_t *aligned(uint64_t bytes, bint lock) except NULL:
    """Whole pages, touched, and locked where the arena is: nothing is allocated or swapped in while memory is short."""
    cdef void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0)
    if memory == MAP_FAILED:
        raise MemoryError
    if lock:
        mlock(memory, bytes)
    return <uint8_t *> memory


cdef class Spill:
    """The native part: ramster.engine.spill.Spill documents it, opens the file and owns its descriptor."""

    def __cinit__(self, Links links not None, int fd, uint32_t images, bint direct, bint mirror, uint32_t threads):
        cdef Spill_t *sp
        cdef Links_t *l = links.live()
        cdef uint32_t i
        cdef Thread *t
        cdef bint lock
        if l.spilling.ready:
            raise errors.UsageError("these links have a spill file already")
        if images == 0 or not 1 <= threads <= THREADS_MAX:
            raise errors.UsageError(f"a spill file for {images} images with {threads} threads: at least one image, 1 to {THREADS_MAX} threads")
        sp = <Spill_t *> calloc(1, sizeof(Spill_t))
        if sp == NULL:
            raise MemoryError
        self.sp = sp
        sp.links = l
        sp.store = l.store
        sp.fd = fd
        sp.direct = direct
        sp.image_bytes = l.segment_bytes
        sp.images = images
        sp.free = images
        pthread_mutex_init(&sp.lock, NULL)
        cond_init_monotonic(&sp.wanted)
        sp.used = <uint64_t *> calloc((images + 63) // 64, 8)
        if sp.used == NULL:
            raise MemoryError
        for i in range(images, (images + 63) // 64 * 64):
            sp.used[i // 64] |= <uint64_t> 1 << (i & 63)
        sp.reserve = images >= RESERVE_FROM
        lock = load32(&sp.store.locked, RELAXED) != 0
        if lock:
            mlock(sp, sizeof(Spill_t))
        sp.keep_buffer = aligned(sp.image_bytes, lock)
        sp.merge_buffer = aligned(sp.image_bytes, lock)
        sp.merge_pages = <Gathered *> aligned(MERGE_PAGES_MAX * sizeof(Gathered), lock)
        for i in range(threads):
            t = &sp.threads[i]
            t.spill = sp
            t.buffer = aligned(sp.image_bytes, lock)
            t.body = aligned(reply_bytes(GET_PAGES_MAX), lock)
            t.open_ctx = store_unseal_context()
            t.seal_ctx = EVP_CIPHER_CTX_new()
            if t.open_ctx == NULL or t.seal_ctx == NULL:
                raise MemoryError
        for i in range(threads):
            if start_thread(&sp.threads[i].thread, thread_main, &sp.threads[i], b"ramster-spill") != 0:
                raise MemoryError("cannot start the threads of the spill file")
            sp.started += 1
        l.spilling.spill = sp
        l.spilling.mirror = mirror
        l.spilling.get = spill_get
        l.spilling.order = spill_order
        l.spilling.keep = spill_keep
        l.spilling.release = give_room
        l.spilling.under_way = spill_under_way
        l.spilling.stop = spill_stop
        links.spill = self
        store32(&l.spilling.ready, 1, RELEASE)

    def __dealloc__(self):
        cdef Spill_t *sp = self.sp
        cdef uint32_t i
        if sp == NULL:
            return
        spill_stop(sp)
        for i in range(THREADS_MAX):
            if sp.threads[i].buffer != NULL:
                munmap(sp.threads[i].buffer, sp.image_bytes)
            if sp.threads[i].body != NULL:
                munmap(sp.threads[i].body, reply_bytes(GET_PAGES_MAX))
            EVP_CIPHER_CTX_free(sp.threads[i].open_ctx)
            EVP_CIPHER_CTX_free(sp.threads[i].seal_ctx)
        if sp.keep_buffer != NULL:
            munmap(sp.keep_buffer, sp.image_bytes)
        if sp.merge_buffer != NULL:
            munmap(sp.merge_buffer, sp.image_bytes)
        if sp.merge_pages != NULL:
            munmap(sp.merge_pages, MERGE_PAGES_MAX * sizeof(Gathered))
        pthread_mutex_destroy(&sp.lock)
        pthread_cond_destroy(&sp.wanted)
        free(sp.used)
        free(sp)
        self.sp = NULL

    def room(self):
        """(images that still fit, orders waiting for one of these rooms or being written, whether writing works)."""
        cdef Spill_t *sp = self.sp
        cdef uint64_t failed = load64(&sp.failed_ms, RELAXED)
        cdef uint32_t left, waiting
        pthread_mutex_lock(&sp.lock)
        left = sp.free - min(sp.free, sp.reserve)
        waiting = sp.orders_count
        pthread_mutex_unlock(&sp.lock)
        return left, waiting, failed == 0 or coarse_ms() - failed > RETRY_MS

    def counters(self):
        """A plain dictionary; the face makes it a dataclass."""
        cdef Spill_t *sp = self.sp
        cdef uint32_t number = load32(&sp.last_errno, RELAXED)
        cdef uint32_t left, waiting
        pthread_mutex_lock(&sp.lock)
        left = sp.free
        waiting = sp.orders_count
        pthread_mutex_unlock(&sp.lock)
        return dict(
            bytes_total=<uint64_t> sp.images * sp.image_bytes, bytes_used=<uint64_t> (sp.images - left) * sp.image_bytes,
            waiting=waiting, reads=load64(&sp.read_count, RELAXED), pages_read=load64(&sp.pages_read, RELAXED),
            read_p50_us=quantile(&sp.read_ns, 0.5) // 1000, read_p99_us=quantile(&sp.read_ns, 0.99) // 1000,
            writes=load64(&sp.write_count, RELAXED), bytes_written=load64(&sp.bytes_written, RELAXED),
            read_errors=load64(&sp.read_errors, RELAXED), write_errors=load64(&sp.write_errors, RELAXED),
            refused=load64(&sp.refused, RELAXED), merged=load64(&sp.merged, RELAXED), last_error=os.strerror(number) if number else "", direct=bool(sp.direct),
            metadata_bytes=sizeof(Spill_t) + (sp.images + 63) // 64 * 8 + MERGE_PAGES_MAX * sizeof(Gathered))
