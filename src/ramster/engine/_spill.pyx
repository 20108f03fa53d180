"""The spill file: the last tier. Sealed images of segments in one file, read back page by page.

Covers: rooms for images, writing and reading them, the threads that wait for the disk. Does not cover: which segments go
there (remotify), making and naming the file (engine.spill), what a segment or a get is (_store, _link).

Rules:

* Only threads of this module wait for the disk, and the shipper where images are mirrored. They read into memory of their own
  and ask again whether anybody still waits before they touch the request: a disk that hangs makes gets fail at their
  deadline like a lender that hangs, only that a disk is given longer.
* One thread at most writes; the others are for those who wait for a page.
* An image lies in as many rooms as it needs, a sixteenth of a segment each. They are free again when nothing in it lives. When
  rooms run short, an image whose dead entries fill whole rooms is written anew without them, and what lives in several sparse
  images that lie here alone is made one image (_store has the rules). Rooms for one image are kept for that.
* An image that a lender has too is a second copy. It may be given up: that costs no page. One that found no room is written
  later, from what the lender sends back, by a thread of its own, which waits for nothing but lenders.
* Nothing in the file is believed. Where an entry lies comes from the store's own table, and what is read is checked by its
  tag, whose key never leaves RAM, against seal id, ordinal and key of the page. So a room may be given to another image
  while it is still being read: what comes is no entry of that page, or the page's slot has changed before. Only an image
  that moves within the file has readers whose slots stay: 'moves' tells them to look again.
* Somebody else may cut the file short. What was there is lost, and said so at once and for good: the entries are marked in the
  store's table, and the file is made as long as it was, so that the next cut is seen too. Looked for whenever a read ends
  early, around each write, by `look` and by whoever checks pages. A file that is unlinked, moved or replaced goes on to be
  this one: it is its descriptor that counts.
* O_DIRECT where the file system has it: a tier that serves memory pressure must neither fill the page cache nor wait for it.

Lock order: pending_lock or ship_lock (of _link), then 'lock'.
"""
from libc.errno cimport EINTR, EIO, ENOSPC, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset

from ramster.engine._c.atomic cimport *
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new
from ramster.engine._c.linux cimport (
    MAP_ANONYMOUS, MAP_FAILED, MAP_POPULATE, MAP_PRIVATE, POSIX_FADV_DONTNEED, PROT_READ, PROT_WRITE, SEEK_END, SYNC_FILE_RANGE_WRITE,
    fallocate, ftruncate, lseek, mlock, mmap, munmap, posix_fadvise, pread, pwrite, sync_file_range)
from ramster.engine._c.pthread cimport (
    coarse_ms, cond_init_monotonic, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
    pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, need_thread)
from ramster.engine._histogram cimport quantile, record
from ramster.engine._link cimport (
    GET_PAGES_MAX, Links, Links_t, Pending, Reply, Wanted, links_get, links_peer_reachable, links_unspill, pending_arrived, pending_asked, pending_claim, reply_bytes)
from ramster.engine._store cimport (
    BUSY, CORRUPT, ENTRY_BYTES_MAX, FRAME_HEADER_BYTES, FULL, LOST, OK, SPILL_PEER, Candidate, Gather, Gathered, Layout, RemoteMeta, RemoteRef,
    store_cut, store_entry_right, store_gather_abort, store_gather_add, store_gather_begin, store_gather_commit, store_gather_end, store_seal_image, store_ship_abort, store_ship_begin, store_ship_commit,
    store_least_mirrored, store_next_unmirrored, store_placed, store_slot_named, store_spare, store_sparsest, store_spilled, store_spilled_live, store_spilled_now, store_touch,
    store_unseal_begin, store_unseal_context, store_unspill, store_wasteful)

import os

from ramster import errors

cdef uint32_t NONE = 0xffffffffu
cdef enum:                              # in Layout.sizes
    DEAD = 0x8000
    GONE = 0x4000
    CUT = 0x2000
    SIZE_UNITS = 0x1fff


cdef inline void say(uint64_t *counter, uint64_t amount) noexcept nogil:
    add64(counter, amount, RELAXED)


# --- rooms ---------------------------------------------------------------------------------------------------------

cdef uint32_t take_rooms(Spill_t *sp, uint32_t bytes, uint32_t reserve) noexcept nogil:
    """Rooms for an image: the number of the first, which names the image; 'next' links the others. The next free ones after
    the last taken, so that what is written together lies together. NONE when fewer than 'reserve' would be left."""
    cdef uint32_t i, word, room, first = NONE, last = NONE, words = (sp.rooms + 63) // 64, count = (bytes + sp.room_bytes - 1) // sp.room_bytes
    cdef uint64_t bits
    ASSERT(0 < count <= ROOMS_MAX, b"an image fits into its rooms")
    pthread_mutex_lock(&sp.lock)
    if sp.free >= reserve + count:
        for i in range(count):
            word = sp.cursor // 64
            bits = ~sp.used[word] & (~<uint64_t> 0 << (sp.cursor & 63))
            while bits == 0:            # some are free, or they would not be counted
                word = (word + 1) % words
                bits = ~sp.used[word]
            room = word * 64 + <uint32_t> ctz64(bits)
            sp.used[word] |= <uint64_t> 1 << (room & 63)
            sp.cursor = (room + 1) % sp.rooms
            if last == NONE:
                first = room
            else:
                sp.next[last] = room
            sp.next[room] = NONE
            last = room
        sp.free -= count
    pthread_mutex_unlock(&sp.lock)
    return first


cdef void give_rooms(void *spill, uint32_t room) noexcept nogil:
    """Of the image that begins in this one."""
    cdef Spill_t *sp = <Spill_t *> spill
    cdef uint64_t bit
    pthread_mutex_lock(&sp.lock)
    while room != NONE:
        bit = <uint64_t> 1 << (room & 63)
        ASSERT(room < sp.rooms and sp.used[room // 64] & bit, b"a room is given back once")
        sp.used[room // 64] &= ~bit
        sp.free += 1
        room = sp.next[room]
    pthread_mutex_unlock(&sp.lock)


cdef uint32_t rooms_of(Spill_t *sp, uint32_t room, uint32_t *rooms) noexcept nogil:
    """All of an image, in order. Of one that somebody has just given back they may be others: whoever reads finds out."""
    cdef uint32_t count = 0
    pthread_mutex_lock(&sp.lock)
    while room < sp.rooms and count < ROOMS_MAX:
        rooms[count] = room
        count += 1
        room = sp.next[room]
    pthread_mutex_unlock(&sp.lock)
    return count


cdef uint32_t piece(const Spill_t *sp, const uint32_t *rooms, uint32_t count, uint32_t at, uint32_t end, uint64_t *place) noexcept nogil:
    """How much of an image from byte 'at' to 'end' lies in one piece, and where in the file; 0: not in these rooms."""
    cdef uint32_t i = at // sp.room_bytes, low = at
    if i >= count:
        return 0
    place[0] = BLOCK + <uint64_t> rooms[i] * sp.room_bytes + (at - i * sp.room_bytes)
    at = (i + 1) * sp.room_bytes
    while at < end and i + 1 < count and rooms[i + 1] == rooms[i] + 1:
        i += 1
        at += sp.room_bytes
    return min(at, end) - low


# --- the disk ------------------------------------------------------------------------------------------------------

cdef int read_file(Spill_t *sp, uint8_t *buffer, uint32_t low, uint32_t high, uint32_t image) noexcept nogil:
    """Bytes of the image that begins in room 'image', whole blocks: OK, LOST when the disk does not give them, BUSY when it does
    not lie there (any more)."""
    cdef uint32_t rooms[ROOMS_MAX]
    cdef uint32_t count = rooms_of(sp, image, rooms), at = low, bytes
    cdef uint64_t where = 0
    cdef int64_t n
    while at < high:
        bytes = piece(sp, rooms, count, at, high, &where)
        if bytes == 0:
            return BUSY
        n = pread(sp.fd, buffer + (at - low), bytes, <long> where)
        if n < 0 and errno == EINTR:
            continue
        if n == 0 and spill_look(sp):   # somebody had cut it short: what is lost is marked, the rest is there
            return BUSY
        if n <= 0:
            store32(&sp.last_errno, <uint32_t> errno if n < 0 else EIO, RELAXED)
            say(&sp.read_errors, 1)
            return LOST
        at += <uint32_t> n
        if not sp.direct:
            posix_fadvise(sp.fd, <long> where, n, POSIX_FADV_DONTNEED)
    return OK


cdef bint write_file(Spill_t *sp, uint8_t *image, uint32_t bytes, uint32_t first) noexcept nogil:
    """An image, padded to whole blocks in its buffer, into the rooms that were taken for it."""
    cdef uint32_t rooms[ROOMS_MAX]
    cdef uint32_t count = rooms_of(sp, first, rooms), done = 0, whole = (bytes + BLOCK - 1) & ~<uint32_t> (BLOCK - 1), part
    cdef uint64_t where = 0
    cdef int64_t n
    memset(image + bytes, 0, whole - bytes)
    spill_look(sp)                      # what was cut off is to be found before a write makes the file longer
    while done < whole:
        part = piece(sp, rooms, count, done, whole, &where)
        ASSERT(part != 0, b"an image has rooms for all of it")
        n = pwrite(sp.fd, image + done, part, <long> where)
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
            sync_file_range(sp.fd, <long> where, n, SYNC_FILE_RANGE_WRITE)
            posix_fadvise(sp.fd, BLOCK, <long> (where - BLOCK), POSIX_FADV_DONTNEED)
    if spill_look(sp):                  # cut off while it was written: its pages are still in the arena
        return False
    say(&sp.write_count, 1)
    say(&sp.bytes_written, whole)
    return True


cdef inline bint is_short(const Spill_t *sp) noexcept nogil:
    cdef int64_t bytes = lseek(sp.fd, 0, SEEK_END)      # nobody uses the offset
    return 0 <= bytes < <int64_t> sp.file_bytes


cdef bint spill_look(void *spill) noexcept nogil:
    """Whether somebody had cut the file short: what was there alone is lost, and marked so in the store's table."""
    cdef Spill_t *sp = <Spill_t *> spill
    cdef int64_t bytes
    cdef uint32_t segment
    cdef uint64_t pages = 0
    if not is_short(sp):
        return False
    pthread_mutex_lock(&sp.look_lock)
    bytes = lseek(sp.fd, 0, SEEK_END)
    if not sp.over and 0 <= bytes < <int64_t> sp.file_bytes:
        for segment in range(load32(&sp.store.segments_used, ACQUIRE)):
            cut_segment(sp, segment, <uint64_t> bytes, &pages)
        say(&sp.cuts, 1)
        say(&sp.cut_pages, pages)
        if ftruncate(sp.fd, <long> sp.file_bytes) == 0 and bytes < BLOCK:
            pwrite(sp.fd, sp.header, BLOCK, 0)          # else the next node takes the file for somebody else's
    pthread_mutex_unlock(&sp.look_lock)
    return True


cdef void cut_segment(Spill_t *sp, uint32_t segment, uint64_t file_bytes, uint64_t *pages) noexcept nogil:
    """Under look_lock: the file ends there. Mark what that has cost of this segment, or forget the copy where a lender has it too."""
    cdef RemoteRef ref
    cdef Layout *image = &sp.look_image
    cdef uint32_t rooms[ROOMS_MAX]
    cdef uint32_t count, ordinal, at, size, part
    cdef uint64_t moves, where = 0
    cdef bint cut, done = False
    while not done:
        moves = load64(&sp.moves, ACQUIRE)
        if store_spilled_now(sp.store, segment, &ref, image) == 0:
            return
        count = rooms_of(sp, ref.spill - 1, rooms)
        cut = False
        at = image.first
        for ordinal in range(image.entries):
            size = entry_size(image, ordinal)
            while size:
                part = piece(sp, rooms, count, at, at + size, &where)
                if part == 0 or where + part > file_bytes:
                    image.sizes[ordinal] |= CUT
                    cut = True
                    part = size
                at += part
                size -= part
        if load64(&sp.moves, ACQUIRE) != moves:
            continue                    # these rooms may have been another's
        if not cut:
            return
        if ref.peer != SPILL_PEER:
            done = forget_copy(sp, ref.segment, ref.generation)
        else:
            done = store_cut(sp.store, &ref, image, pages)


cdef bint moved(Spill_t *sp, uint64_t moves, uint32_t segment, uint32_t generation, const uint16_t *ordinals, uint32_t pages,
                uint32_t image, const uint32_t *offsets) noexcept nogil:
    """While entries were read from where they had been, images were moved: whether this one was. After more than one move it may
    have come back."""
    cdef uint32_t now[GET_PAGES_MAX]
    cdef uint16_t sizes[GET_PAGES_MAX]
    return load64(&sp.moves, ACQUIRE) - moves > 1 or \
        store_spilled(sp.store, segment, generation, ordinals, pages, now, sizes) != image or memcmp(now, offsets, 4 * pages) != 0


cdef void read_pages(Thread *t, const Read *read) noexcept nogil:
    """Read what a get asks for, in one piece from its first to its last entry: they lie within one image."""
    cdef Spill_t *sp = t.spill
    cdef uint32_t segment = 0, generation = 0, pages, room, k, low = NONE, high = 0, at
    cdef uint16_t ordinals[GET_PAGES_MAX]
    cdef uint32_t offsets[GET_PAGES_MAX]
    cdef uint16_t sizes[GET_PAGES_MAX]
    cdef uint64_t moves
    cdef int status = BUSY
    cdef Pending *p
    pages = pending_asked(sp.links, read.pending, read.id, &segment, &generation, ordinals)
    if pages == 0:
        return
    moves = load64(&sp.moves, ACQUIRE)
    room = store_spilled(sp.store, segment, generation, ordinals, pages, offsets, sizes)
    if room != 0:
        for k in range(pages):
            ASSERT(sizes[k] <= ENTRY_BYTES_MAX and offsets[k] + sizes[k] <= sp.image_bytes, b"an entry lies in its image")
            low = min(low, offsets[k])
            high = max(high, offsets[k] + sizes[k])
        low &= ~<uint32_t> (BLOCK - 1)
        high = (high + BLOCK - 1) & ~<uint32_t> (BLOCK - 1)
        status = read_file(sp, t.buffer, low, high, room - 1)
        if load64(&sp.moves, ACQUIRE) != moves and moved(sp, moves, segment, generation, ordinals, pages, room, offsets):
            status = BUSY               # whoever asked looks again
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
    cdef uint32_t bytes, image = NONE
    store32(&sp.store.segments[order.segment].ordered, 0, RELAXED)
    if images_left(sp) == 0:
        say(&sp.refused, 1)
        store_touch(sp.store, order.segment, order.generation)
        return
    if store_ship_begin(sp.store, order.segment, order.generation) != OK:
        return
    bytes = store_seal_image(sp.store, order.segment, t.buffer, &meta, t.seal_ctx, NULL)
    if bytes != 0:
        image = take_rooms(sp, bytes, sp.reserve)
        if image == NONE:
            say(&sp.refused, 1)
        elif write_file(sp, t.buffer, bytes, image):
            store_ship_commit(sp.store, order.segment, SPILL_PEER, 0, image + 1, meta)
            return
        else:
            give_rooms(sp, image)
        free(meta)
    store_ship_abort(sp.store, order.segment)


cdef uint32_t images_left(Spill_t *sp) noexcept nogil:
    """Images of a whole segment that still fit."""
    cdef uint32_t left
    pthread_mutex_lock(&sp.lock)
    left = (sp.free - min(sp.free, sp.reserve)) // sp.rooms_each
    pthread_mutex_unlock(&sp.lock)
    return left


# --- merging and compacting ----------------------------------------------------------------------------------------

cdef bint merge_source(Thread *t, Gather *g, const Candidate *source) noexcept nogil:
    """Take over what lives in one image; False once the new one is full."""
    cdef Spill_t *sp = t.spill
    cdef RemoteRef ref
    cdef Layout *image = &sp.layout
    cdef uint32_t ordinal, size, at
    cdef int result
    if store_spilled_live(sp.store, source.segment, source.generation, &ref, image) == 0:
        return True
    if read_image(t, &ref, image) != OK or store_unseal_begin(&ref, t.open_ctx) != OK:
        store_spare(sp.store, source.segment, source.generation)
        return True
    at = image.first
    for ordinal in range(image.entries):
        size = entry_size(image, ordinal)
        if size and not image.sizes[ordinal] & DEAD:
            ref.ordinal = ordinal
            result = store_gather_add(sp.store, g, sp.merge_buffer, &ref, t.buffer + at, size, t.open_ctx, t.seal_ctx)
            if result == FULL:
                return False
            if result != OK:
                store_spare(sp.store, source.segment, source.generation)
        at += size
    say(&sp.merged, 1)
    return True


cdef inline uint32_t entry_size(const Layout *image, uint32_t ordinal) noexcept nogil:
    return 0 if image.sizes[ordinal] & GONE else <uint32_t> (image.sizes[ordinal] & SIZE_UNITS) * 8


cdef int read_image(Thread *t, const RemoteRef *ref, const Layout *image) noexcept nogil:
    cdef uint32_t bytes = (image.bytes + BLOCK - 1) & ~<uint32_t> (BLOCK - 1)
    ASSERT(image.bytes <= t.spill.image_bytes, b"an image fits into its rooms")
    return read_file(t.spill, t.buffer, 0, bytes, ref.spill - 1)


cdef bint merge(Thread *t) noexcept nogil:
    """Make one image of several that lie here alone and are mostly dead. False when there is nothing to be won."""
    cdef Spill_t *sp = t.spill
    cdef Candidate sources[MERGE_MAX]
    cdef Gather g
    cdef uint32_t n, k, image, bytes = FRAME_HEADER_BYTES + 8
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
    if not store_gather_begin(sp.store, &g, t.seal_ctx):
        return False
    k = 0
    while k < n and merge_source(t, &g, &sources[k]):
        k += 1
    if g.entries:
        bytes = store_gather_end(sp.store, &g, sp.merge_buffer)
        image = take_rooms(sp, bytes, 0)
        if image != NONE:
            if write_file(sp, sp.merge_buffer, bytes, image):
                store_gather_commit(sp.store, &g, image + 1)
                return True
            give_rooms(sp, image)
    store_gather_abort(sp.store, &g)
    return False


cdef bint compact(Thread *t) noexcept nogil:
    """Write an image anew without what is dead in it: as it was sealed, so that a lender's copy stays one. False when that is not
    worth it."""
    cdef Spill_t *sp = t.spill
    cdef Candidate best
    cdef RemoteRef ref
    cdef Layout *image = &sp.layout
    cdef uint32_t win = store_wasteful(sp.store, &sp.compact_cursor, sp.room_bytes, &best), ordinal, size, at, bytes = 0, room, left
    cdef int result
    pthread_mutex_lock(&sp.lock)
    left = sp.free
    pthread_mutex_unlock(&sp.lock)
    if win == 0 or not worth_compacting(win, win + best.live_entries, left, sp.rooms):
        return False
    if store_spilled_live(sp.store, best.segment, best.generation, &ref, image) == 0:
        return True
    result = read_image(t, &ref, image)
    if result != OK:
        # A copy that cannot be read is none. What lies here alone stays, for gets to find and report.
        if result == LOST and ref.peer != SPILL_PEER:
            forget_copy(sp, ref.segment, ref.generation)
        elif result == LOST:
            store_spare(sp.store, ref.segment, ref.generation)
        return True
    at = image.first
    for ordinal in range(image.entries):
        size = entry_size(image, ordinal)
        if not image.sizes[ordinal] & DEAD:
            memcpy(sp.merge_buffer + bytes, t.buffer + at, size)
            bytes += size
        at += size
    if bytes == 0:
        return True                     # the last of it has died meanwhile
    room = take_rooms(sp, bytes, 0)
    if room == NONE:
        return False
    if not write_file(sp, sp.merge_buffer, bytes, room):
        give_rooms(sp, room)
        return False
    if store_placed(sp.store, &ref, image, room + 1):
        add64(&sp.moves, 1, ACQ_REL)
        give_rooms(sp, ref.spill - 1)
        say(&sp.compacted, 1)
    else:
        give_rooms(sp, room)
    return True


# --- copies that come later, and go earlier ------------------------------------------------------------------------

cdef bint forget_copy(Spill_t *sp, uint32_t segment, uint32_t generation) noexcept nogil:
    cdef uint32_t image = store_unspill(sp.store, segment, generation)
    if image:
        give_rooms(sp, image - 1)
    return image != 0


cdef void reachable_lenders(Spill_t *sp, uint8_t *reachable) noexcept nogil:
    cdef uint32_t i
    for i in range(SPILL_PEER):
        reachable[i] = links_peer_reachable(sp.links, i)


cdef void copy_answered(void *context, Reply *reply) noexcept nogil:
    """By a thread of the links: sealed entries that a lender has sent, to where they are to lie."""
    cdef Copy *c = <Copy *> context
    cdef const uint8_t *entry = reply.entry
    cdef uint32_t k, size
    cdef bint right = reply.status == OK
    pthread_mutex_lock(&c.lock)
    if right:
        for k in range(reply.pages):
            size = (<uint32_t> reply.sizes[k] + 7) & ~<uint32_t> 7
            if size != c.sizes[k]:
                right = False           # what is dead there by now comes without bytes
                break
            memcpy(c.image + c.bytes, entry, size)
            c.bytes += size
            entry += size
    c.right = right
    c.answered = True
    pthread_cond_signal(&c.done)
    pthread_mutex_unlock(&c.lock)


cdef int fetch_image(Spill_t *sp, RemoteRef *ref, Layout *image) noexcept nogil:
    """What lives of a segment, from its lender, as it was sealed. Marks in 'image' what has died. CORRUPT: something of it is not
    what was sealed."""
    cdef Copy *c = &sp.copy
    cdef Wanted wanted[COPY_PAGES]
    cdef uint32_t ordinal = 0, pages, k, size, from_byte
    cdef int result
    c.bytes = 0
    if store_unseal_begin(ref, c.open_ctx) != OK:
        return BUSY
    while ordinal < image.entries:
        pages = 0
        from_byte = c.bytes
        while ordinal < image.entries and pages < COPY_PAGES:
            size = <uint32_t> (image.sizes[ordinal] & SIZE_UNITS) * 8
            if not image.sizes[ordinal] & DEAD and size:
                wanted[pages].slot = store_slot_named(ref.segment, ref.generation, ordinal)
                wanted[pages].index = 0
                wanted[pages].ordinal = <uint16_t> ordinal
                wanted[pages].place = 0
                c.sizes[pages] = size
                pages += 1
            ordinal += 1
        if pages == 0:
            break
        c.answered = False
        result = links_get(sp.links, ref, wanted, pages, c.staging, copy_answered, c, True)
        if result != OK:
            return BUSY
        pthread_mutex_lock(&c.lock)
        while not c.answered:           # within give_up, or the links stop
            cond_wait_until(&c.done, &c.lock, now_ns() + 1000000000ull)
        pthread_mutex_unlock(&c.lock)
        if not c.right:
            return BUSY
        for k in range(pages):
            ref.ordinal = wanted[k].ordinal
            if not store_entry_right(ref, c.image + from_byte, c.sizes[k], c.open_ctx):
                return CORRUPT
            from_byte += c.sizes[k]
    return OK if c.bytes else BUSY


cdef void copy_one(Spill_t *sp) noexcept nogil:
    """Mirror a segment that a lender alone has."""
    cdef RemoteRef ref
    cdef uint8_t reachable[256]
    cdef uint32_t room
    cdef int result
    reachable_lenders(sp, reachable)
    if not store_next_unmirrored(sp.store, &sp.copy.cursor, reachable, &ref, &sp.copy.layout):
        return
    result = fetch_image(sp, &ref, &sp.copy.layout)
    if result == CORRUPT:
        store_spare(sp.store, ref.segment, ref.generation)
    if result != OK or not begin_writing(sp):
        return
    room = take_rooms(sp, sp.copy.bytes, sp.reserve)
    if room != NONE:
        if write_file(sp, sp.copy.image, sp.copy.bytes, room) and store_placed(sp.store, &ref, &sp.copy.layout, room + 1):
            say(&sp.copied, 1)
        else:
            give_rooms(sp, room)
    end_writing(sp)


cdef bint begin_writing(Spill_t *sp) noexcept nogil:
    """Wait for the turn to write; False when the threads are to end."""
    cdef bint mine
    pthread_mutex_lock(&sp.lock)
    while sp.writing and not sp.stopping:
        cond_wait_until(&sp.tended, &sp.lock, now_ns() + MERGE_PAUSE_MS * 1000000ull)
    mine = not sp.stopping
    if mine:
        sp.writing = 1
    pthread_mutex_unlock(&sp.lock)
    return mine


cdef void end_writing(Spill_t *sp) noexcept nogil:
    pthread_mutex_lock(&sp.lock)
    sp.writing = 0
    pthread_cond_broadcast(&sp.wanted)
    pthread_mutex_unlock(&sp.lock)


cdef void *copy_main(void *argument) noexcept nogil:
    """Carries out 'tend'."""
    cdef Spill_t *sp = <Spill_t *> argument
    cdef uint8_t reachable[256]
    cdef Candidate least
    cdef uint32_t copies, images
    while True:
        pthread_mutex_lock(&sp.lock)
        while not sp.stopping and sp.copies == 0 and sp.images_wanted == 0:
            cond_wait_until(&sp.tended, &sp.lock, now_ns() + 1000000000ull)
        if sp.stopping:
            pthread_mutex_unlock(&sp.lock)
            return NULL
        copies = sp.copies
        images = sp.images_wanted
        sp.copies -= copies != 0
        sp.images_wanted = 0
        pthread_mutex_unlock(&sp.lock)
        if images:
            reachable_lenders(sp, reachable)
        while images_left(sp) < images and store_least_mirrored(sp.store, &sp.give_cursor, reachable, &least):
            if forget_copy(sp, least.segment, least.generation):
                say(&sp.given_up, 1)
        if copies:
            copy_one(sp)


# --- threads -------------------------------------------------------------------------------------------------------

cdef inline bint merge_due(const Spill_t *sp) noexcept nogil:
    """Under the lock: rooms run short, and the last look was not in vain or is a while ago."""
    return sp.free < sp.rooms // 4 and sp.reserve and now_ns() >= sp.merge_after_ns


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
        merges = not sp.writing and merge_due(sp) and (sp.orders_count == 0 or sp.free <= sp.reserve + max(sp.reserve, sp.rooms // 16))
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
            helped = merge(t) or compact(t)
        else:
            write_segment(t, &order)
        pthread_mutex_lock(&sp.lock)
        sp.writing = 0
        if merges and not helped:
            sp.merge_after_ns = now_ns() + MERGE_PAUSE_MS * 1000000ull
        pthread_cond_signal(&sp.tended)
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
    cdef uint64_t failed = load64(&sp.failed_ms, RELAXED)
    cdef uint32_t first
    if failed != 0 and coarse_ms() - failed <= RETRY_MS:
        return 0
    first = take_rooms(sp, bytes, sp.reserve)
    if first == NONE:
        say(&sp.refused, 1)
        return 0
    memcpy(sp.keep_buffer, image, bytes)
    if write_file(sp, sp.keep_buffer, bytes, first):
        return first + 1
    give_rooms(sp, first)
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
    pthread_mutex_lock(&sp.look_lock)
    sp.over = True                      # the descriptor may be another file's soon
    pthread_mutex_unlock(&sp.look_lock)
    pthread_mutex_lock(&sp.lock)
    sp.stopping = True
    pthread_cond_broadcast(&sp.wanted)
    pthread_cond_broadcast(&sp.tended)
    pthread_mutex_unlock(&sp.lock)
    for i in range(sp.started):
        pthread_join(sp.threads[i].thread, NULL)
    sp.started = 0
    if sp.copying:
        pthread_join(sp.copier, NULL)
    pthread_mutex_lock(&sp.lock)
    sp.copying = False
    pthread_mutex_unlock(&sp.lock)


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

    def __cinit__(self, Links links not None, int fd, uint32_t images, bytes header, bint direct, bint mirror, uint32_t threads):
        cdef Spill_t *sp
        cdef Links_t *l = links.live()
        cdef uint32_t i
        cdef Thread *t
        cdef bint lock
        cdef uint32_t rooms
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
        sp.room_bytes = (sp.image_bytes // ROOMS_MAX + BLOCK - 1) & ~<uint32_t> (BLOCK - 1)
        sp.rooms_each = (sp.image_bytes + sp.room_bytes - 1) // sp.room_bytes
        rooms = <uint32_t> min(<uint64_t> images * sp.image_bytes // sp.room_bytes, <uint64_t> NONE - 1)
        sp.rooms = rooms
        sp.free = rooms
        pthread_mutex_init(&sp.lock, NULL)
        cond_init_monotonic(&sp.wanted)
        cond_init_monotonic(&sp.tended)
        pthread_mutex_init(&sp.look_lock, NULL)
        pthread_mutex_init(&sp.copy.lock, NULL)
        cond_init_monotonic(&sp.copy.done)
        sp.used = <uint64_t *> calloc((rooms + 63) // 64, 8)
        sp.next = <uint32_t *> calloc(rooms, 4)
        if sp.used == NULL or sp.next == NULL:
            raise MemoryError
        for i in range(rooms, (rooms + 63) // 64 * 64):
            sp.used[i // 64] |= <uint64_t> 1 << (i & 63)
        sp.reserve = sp.rooms_each if images >= RESERVE_FROM else 0
        lock = load32(&sp.store.locked, RELAXED) != 0
        if lock:
            mlock(sp, sizeof(Spill_t))
        sp.file_bytes = BLOCK + <uint64_t> images * sp.image_bytes
        sp.header = aligned(BLOCK, lock)
        memcpy(sp.header, <const uint8_t *> header, min(<size_t> len(header), <size_t> BLOCK))
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
            need_thread(&sp.threads[i].thread, thread_main, &sp.threads[i], b"ramster-spill")
            sp.started += 1
        if mirror:
            sp.copy.image = aligned(sp.image_bytes, lock)
            sp.copy.staging = aligned(reply_bytes(COPY_PAGES), lock)
            sp.copy.open_ctx = store_unseal_context()
            if sp.copy.open_ctx == NULL:
                raise MemoryError
            need_thread(&sp.copier, copy_main, sp, b"ramster-mirror")
            sp.copying = True
        l.spilling.spill = sp
        l.spilling.mirror = mirror
        l.spilling.get = spill_get
        l.spilling.order = spill_order
        l.spilling.keep = spill_keep
        l.spilling.release = give_rooms
        l.spilling.under_way = spill_under_way
        l.spilling.stop = spill_stop
        l.spilling.look = spill_look
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
        if sp.header != NULL:
            munmap(sp.header, BLOCK)
        if sp.keep_buffer != NULL:
            munmap(sp.keep_buffer, sp.image_bytes)
        if sp.merge_buffer != NULL:
            munmap(sp.merge_buffer, sp.image_bytes)
        if sp.merge_pages != NULL:
            munmap(sp.merge_pages, MERGE_PAGES_MAX * sizeof(Gathered))
        if sp.copy.image != NULL:
            munmap(sp.copy.image, sp.image_bytes)
        if sp.copy.staging != NULL:
            munmap(sp.copy.staging, reply_bytes(COPY_PAGES))
        EVP_CIPHER_CTX_free(sp.copy.open_ctx)
        pthread_mutex_destroy(&sp.look_lock)
        pthread_mutex_destroy(&sp.copy.lock)
        pthread_cond_destroy(&sp.copy.done)
        pthread_mutex_destroy(&sp.lock)
        pthread_cond_destroy(&sp.wanted)
        pthread_cond_destroy(&sp.tended)
        free(sp.used)
        free(sp.next)
        free(sp)
        self.sp = NULL

    def look_at_length(self):
        """Find out whether somebody has cut the file short, and mark what that has cost; True when it was so."""
        cdef Spill_t *sp = self.sp
        cdef bint short
        with nogil:
            short = spill_look(sp)
        return short

    def room(self):
        """(images that still fit, orders waiting to be written, whether writing works, images in all)."""
        cdef Spill_t *sp = self.sp
        cdef uint64_t failed = load64(&sp.failed_ms, RELAXED)
        cdef uint32_t waiting
        pthread_mutex_lock(&sp.lock)
        waiting = sp.orders_count
        pthread_mutex_unlock(&sp.lock)
        return images_left(sp), waiting, failed == 0 or coarse_ms() - failed > RETRY_MS, sp.rooms // sp.rooms_each

    def tend(self, uint32_t images, uint32_t copies):
        """With a mirror: give up copies of what lenders have until so many images fit, and mirror so many segments that lenders
        alone have. Returns at once; replaces what was asked for before and is not done yet."""
        cdef Spill_t *sp = self.sp
        pthread_mutex_lock(&sp.lock)
        if sp.copying:
            sp.images_wanted = images
            sp.copies = copies
            pthread_cond_signal(&sp.tended)
        pthread_mutex_unlock(&sp.lock)

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
            bytes_total=<uint64_t> sp.rooms * sp.room_bytes, bytes_used=<uint64_t> (sp.rooms - left) * sp.room_bytes,
            waiting=waiting, reads=load64(&sp.read_count, RELAXED), pages_read=load64(&sp.pages_read, RELAXED),
            read_p50_us=quantile(&sp.read_ns, 0.5) // 1000, read_p99_us=quantile(&sp.read_ns, 0.99) // 1000,
            writes=load64(&sp.write_count, RELAXED), bytes_written=load64(&sp.bytes_written, RELAXED),
            read_errors=load64(&sp.read_errors, RELAXED), write_errors=load64(&sp.write_errors, RELAXED),
            refused=load64(&sp.refused, RELAXED), merged=load64(&sp.merged, RELAXED), compacted=load64(&sp.compacted, RELAXED),
            cuts=load64(&sp.cuts, RELAXED), pages_cut=load64(&sp.cut_pages, RELAXED),
            given_up=load64(&sp.given_up, RELAXED), copied=load64(&sp.copied, RELAXED), last_error=os.strerror(number) if number else "", direct=bool(sp.direct),
            metadata_bytes=sizeof(Spill_t) + (sp.rooms + 63) // 64 * 8 + <uint64_t> sp.rooms * 4 + MERGE_PAGES_MAX * sizeof(Gathered))


def compacting(uint32_t win, uint32_t held, uint32_t free_rooms, uint32_t rooms):
    """worth_compacting(), for its table."""
    return bool(worth_compacting(win, held, free_rooms, rooms))
