"""Links: two TLS 1.3 connections per pair of nodes, remote gets, shipping of segments, and the lender.

Covers: connections from the TLS handshake on, frames, pending gets with deadlines, the shipper thread, the frames lent
to others. Does not cover: who connects to whom and who may (node.peering), what is shipped where (remotify).

Threads: a reactor for each kind of connection (get, bulk) reads, answers and watches deadlines; the shipper seals
segments and tells lenders what to forget; the sender encrypts and sends what the shipper has sealed, so that the next
segment is sealed meanwhile; any thread may send a get on its own. A reply of one page is opened where it arrives, since
somebody waits for it and a hand-over costs more than it does; workers open those of several pages, while the reactor
receives the next.

Rules of TLS under threads, each learned from somebody's failure (DESIGN.md section 6):

* Sockets do not block. One lock per connection is held for one record or one send at a time, and never while waiting.
* OpenSSL writes into memory, 'wire', and is asked only while a record fits: no write of its ever has to be repeated.
  Several records go to the socket in one send, which costs half of what a send for each record does.
* Plain bytes come from a ring of small frames or straight from a sealed image. Between two images small frames go first.
* Writers go first: the reader looks whether somebody wants the lock before it takes it again.
* No session tickets; keys are updated long before 2^24 records.

The spill file (_spill) is one more place that a segment goes to and that pages are got from: peer SPILL_PEER. It has threads
of its own; no thread here waits for a disk, but for the shipper where images are mirrored.

Whatever counts another's silence does so in ran_ns(), time in which this node ran (_running): stamps and deadlines of gets, of
connections, of orders. Only what bounds a wait in a system call is in now_ns().

Lock order: lender_lock or pending_lock or ship_lock, then a connection's lock or the spill file's. None of them is held
while sleeping.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset, strerror

from ramster.engine._c.atomic cimport *
from ramster.engine._c.codec cimport crc32_iscsi
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new
from ramster.engine._c.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, EPOLL_CLOEXEC, EPOLL_CTL_ADD, EPOLL_CTL_DEL, EPOLL_CTL_MOD, EPOLLIN,
    EPOLLOUT, MADV_DONTDUMP, MAP_FAILED, MAP_SHARED, MFD_CLOEXEC, MSG_NOSIGNAL, POLLIN, POLLOUT, PROT_READ, PROT_WRITE, SHUT_RDWR, close, epoll_create1, epoll_ctl,
    epoll_event, epoll_wait, eventfd, eventfd_read, eventfd_write, fallocate, madvise, memfd_create, mlock, mmap, munmap, poll, pollfd,
    send, shutdown)
from ramster.engine._c.openssl cimport *
from ramster.engine._c.pthread cimport (
    cond_init_monotonic, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init,
    pthread_cond_signal, pthread_cond_t, pthread_cond_wait, pthread_join, pthread_mutex_destroy, pthread_mutex_init,
    pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock, need_thread)
from ramster.engine._c.zstd cimport ZSTD_CCtx, ZSTD_createCCtx, ZSTD_freeCCtx
from ramster.engine._conduct cimport BUCKET, COSTLY, IDLE, NONSENSE, USEFUL, conduct_charge
from ramster.engine._histogram cimport quantile, record
from ramster.engine._pending cimport (
    P_COMPLETING, P_FREE, P_SENT, P_SPILL, P_WAITS, V_ASK, V_GIVE_UP, V_REDIRECT, V_SETTLE, Asking, Patience, PendingState, Verdict,
    pending_verdict)
from ramster.engine._running cimport GAP_NS, ran_ns
from ramster.engine._turns cimport Turns, turn_next, turn_of, turn_over
from ramster.engine._store cimport (
    BUSY, CORRUPT, ENTRY_BYTES_MAX, FRAME_HEADER_BYTES, HEADER_BYTES, LIVE_BYTES_MAX, LOST, MISS, NO_POOL, OK, ORDINALS_MAX, PAGE,
    REMOTE, SPILL_PEER, UNREACHABLE, ImageHeader, RemoteMeta, RemoteRef, Store, no_pool, store_alone, store_fall_back, store_flush_if, store_freed_told, store_is_spilled,
    store_short_of_frames, store_unspill,
    store_get, store_next_freed, store_peer_lost, store_retell, store_seal_image, store_segment_lost, store_ship_abort, store_ship_begin,
    store_ship_commit, store_slot, store_touch, store_compacted, store_next_compact, store_slot_state, store_unseal,
    store_unseal_begin, store_unseal_context, memory_available)

import os

from ramster import errors

cdef enum:
    FRAME_MAGIC = 0x54534d52        # "RMST"
    WIRE_VERSION = 2
    IMAGE_MAGIC = 0x4c455352
    RECORD_BYTES = 16384
    SEND_BYTES = 65536              # encrypted bytes worth a system call
    WIRE_BYTES = 65536 + 20480 + 4096   # one record more, and what a key update or an alert takes
    RECORDS_PER_SEND_TURN = 4
    EARLY_MESSAGES_MAX = 4          # of TLS, between its handshake and the first frames; an honest peer sends none
    # One turn of a connection, then another of this reactor has its own: see _turns.pxd. Work is counted and not measured,
    # about a unit for each ns. A turn ends with the frame that brings it over what it may have.
    WORK_READ = 2000                # a record; what it brings is a unit a byte, and so is what is sent for it
    WORK_FRAME = 1000
    WORK_ENTRY = 50                 # looked up in an image
    WORK_ROW = 200                  # of the lender's, freed
    LENT_BATCH = 64                 # rows freed before somebody else may have the lender's lock
    FORGIVE_S = 600                 # a peer that was cut off counts as new after so long
    KEY_UPDATE_RECORDS = 8388608    # 2^23, half of what AES-GCM allows one key (RFC 8446, 5.5)
    HEDGE_MS = 100                  # a lender that has not answered by then stands still; a disk takes a tenth of it
    SILENT_SHARE = 4                # of give_up: a connection that owes an answer for so long is dialled anew beside the old one
    SPILL_S = 30                    # what kernels give a disk for a command; many may wait for it
    ORDER_S = 2                     # an order waits so long without progress of its lender
    RECOMPRESS_NS_PER_BYTE = 10     # a link below 100 MB/s: a core recompresses 115 MB/s of sealed bytes, by 22 %
    SHIP_ANSWER_S = 30              # eight segments at 1 Mbit/s take half of it
    GET_RING_BYTES = 1048576
    BULK_RING_BYTES = 262144
    NO_FRAME = 0xffffffff
    TICK_MS = 25
    SMALL_BODY_MAX = 16384
    BUFFERED_BODY_MAX = 8192        # what is larger is received straight to where it belongs

cdef enum Recompress:
    RECOMPRESS_AUTO = 0
    RECOMPRESS_OFF = 1
    RECOMPRESS_ALWAYS = 2

cdef enum FrameType:
    T_HELLO = 1
    T_REFUSE = 2
    T_PING = 3
    T_PONG = 4
    T_GET = 5
    T_PAGE = 6
    T_SHIP = 7
    T_SHIPPED = 8
    T_FREE = 9
    T_FREED = 10
    T_GOODBYE = 11
    T_COMPACT = 12
    T_COMPACTED = 13

cdef enum Status:
    S_OK = 0
    S_ABSENT = 1
    S_FULL = 2
    S_BAD = 3
    S_SHARE = 4                     # there is room, but this owner has its share

cdef enum Sent:
    SENT = 0
    DOWN = 1
    AGAIN = 2

cdef enum LentState:
    LENT_FREE = 0
    LENT_RECEIVING = 1
    LENT_HELD = 2

OPENSSL_init_ssl(OPENSSL_INIT_NO_ATEXIT, NULL)


cdef void say(uint64_t *counter, uint64_t amount) noexcept nogil:
    add64(counter, amount, RELAXED)


cdef inline Peer *peer_at(Links_t *l, uint32_t number) noexcept nogil:
    """A peer is made once and stays until the links are freed; NULL before, and for numbers beyond the table."""
    return <Peer *> <size_t> load64(<uint64_t *> &l.peers[number & 255], ACQUIRE)


cdef inline uint64_t ran(Links_t *l) noexcept nogil:
    return ran_ns(&l.store.running)


cdef inline bint is_up(Channel *ch) noexcept nogil:
    return load32(&ch.up, ACQUIRE) != 0


# --- sending -------------------------------------------------------------------------------------------------------

cdef void frame_init(Links_t *l, Frame *frame, uint8_t type, uint64_t request) noexcept nogil:
    memset(frame, 0, FRAME_BYTES)
    frame.magic = FRAME_MAGIC
    frame.version = WIRE_VERSION
    frame.type = type
    frame.request = request


cdef inline void lock_to_write(Channel *ch) noexcept nogil:
    add32(&ch.waiting, 1, ACQ_REL)
    pthread_mutex_lock(&ch.lock)
    sub32(&ch.waiting, 1, ACQ_REL)


cdef inline void lock_to_read(Channel *ch) noexcept nogil:
    cdef int turns = 0
    while load32(&ch.waiting, ACQUIRE) != 0 and turns < 100:
        sched_yield()
        turns += 1
    pthread_mutex_lock(&ch.lock)


cdef void ring_append(Channel *ch, const void *bytes, uint32_t n) noexcept nogil:
    cdef uint32_t tail = (ch.out_head + ch.out_used) % ch.out_bytes
    cdef uint32_t first = min(n, ch.out_bytes - tail)
    memcpy(ch.out + tail, bytes, first)
    memcpy(ch.out, <const uint8_t *> bytes + first, n - first)
    ch.out_used += n


cdef void arm(Links_t *l, Channel *ch, bint writing) noexcept nogil:
    cdef epoll_event event
    if ch.armed == writing:
        return
    ch.armed = writing
    event.events = EPOLLIN | (EPOLLOUT if writing else 0)
    event.data.u32 = ch.peer
    epoll_ctl(l.epolls[ch.kind], EPOLL_CTL_MOD, ch.fd, &event)


cdef int wire_write(BIO *bio, const char *data, int n) noexcept nogil:
    cdef Channel *ch = <Channel *> BIO_get_data(bio)
    BIO_clear_retry_flags(bio)
    if n <= 0 or ch.wire_end + <uint32_t> n > WIRE_BYTES:
        BIO_set_retry_write(bio)
        return -1
    memcpy(ch.wire + ch.wire_end, data, n)
    ch.wire_end += <uint32_t> n
    return n


cdef long wire_control(BIO *bio, int command, long number, void *pointer) noexcept nogil:
    return command == BIO_CTRL_FLUSH


cdef BIO_METHOD *wire_method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, b"ramster wire")
BIO_meth_set_write(wire_method, wire_write)
BIO_meth_set_ctrl(wire_method, wire_control)


cdef inline bint plain_waits(Channel *ch) noexcept nogil:
    return ch.out_used != 0 or ch.image_count != 0


cdef bint encrypt_record(Links_t *l, Channel *ch) noexcept nogil:
    """Under the connection's lock: one record from an image that has begun, else from the ring, else from the next image."""
    cdef const uint8_t *plain
    cdef uint32_t n, left = 0
    if ch.records >= KEY_UPDATE_RECORDS:
        SSL_key_update(ch.ssl, SSL_KEY_UPDATE_NOT_REQUESTED)
        ch.records = 0
    if ch.image_count and (ch.image_done or ch.out_used == 0):
        left = ch.image_bytes[ch.image_first] - ch.image_done
        plain = ch.images[ch.image_first] + ch.image_done
        n = min(<uint32_t> RECORD_BYTES, left)
    else:
        plain = ch.out + ch.out_head
        n = min(min(<uint32_t> RECORD_BYTES, ch.out_used), ch.out_bytes - ch.out_head)
    ERR_clear_error()
    if SSL_write(ch.ssl, plain, <int> n) != <int> n:
        return False
    ch.records += 1
    say(&ch.bytes_sent, n)
    if left == 0:
        ch.out_head = (ch.out_head + n) % ch.out_bytes
        ch.out_used -= n
        pthread_cond_broadcast(&ch.drained)
    elif n < left:
        ch.image_done += n
    else:
        ch.image_done = 0
        ch.image_first ^= 1
        sub32(&ch.image_count, 1, RELEASE)
        if load32(&l.orders_count, RELAXED):
            eventfd_write(l.order_fd, 1)
    return True


cdef bint flush_record(Links_t *l, Channel *ch) noexcept nogil:
    """Under the connection's lock: encrypt one record; send once that is worth a system call, or nothing is left to encrypt.
    True when there is more to do now."""
    cdef ssize_t sent
    if ch.ssl == NULL:
        return False
    if ch.wire_end < SEND_BYTES and plain_waits(ch):
        if not encrypt_record(l, ch):
            shutdown(ch.fd, SHUT_RDWR)      # the reactor sees it and takes the connection down
            return False
        if ch.wire_end < SEND_BYTES and plain_waits(ch):
            return True
    if ch.wire_start == ch.wire_end:
        return False
    sent = send(ch.fd, ch.wire + ch.wire_start, ch.wire_end - ch.wire_start, MSG_NOSIGNAL)
    if sent > 0:
        ch.wire_start += <uint32_t> sent
    elif errno != EAGAIN and errno != EINTR:
        shutdown(ch.fd, SHUT_RDWR)
        return False
    if ch.wire_start != ch.wire_end:
        arm(l, ch, True)
        return False
    ch.wire_start = ch.wire_end = 0
    arm(l, ch, False)
    return plain_waits(ch)


cdef void wake_sender(Links_t *l) noexcept nogil:
    pthread_mutex_lock(&l.send_lock)
    l.sending = True
    pthread_cond_signal(&l.send_wanted)
    pthread_mutex_unlock(&l.send_lock)


cdef void flush(Links_t *l, Channel *ch) noexcept nogil:
    """Send what waits, or have the sender do it where segments wait."""
    cdef bint more = True
    if load32(&ch.image_count, ACQUIRE):
        wake_sender(l)
        return
    while more:
        lock_to_write(ch)
        more = flush_record(l, ch)
        pthread_mutex_unlock(&ch.lock)


cdef bint flush_left(Links_t *l, Channel *ch) noexcept nogil:
    """By the reactor, as a turn begins: what found the socket full before. It costs as much as what is new. True: the turn is over,
    and more could be sent now."""
    cdef bint more = load32(&ch.out_used, RELAXED) != 0 and load32(&ch.image_count, ACQUIRE) == 0
    cdef uint32_t before
    while more:
        if ch.work >= ch.turn:
            return True
        lock_to_write(ch)
        before = ch.out_used
        more = flush_record(l, ch)
        ch.work += before - ch.out_used
        pthread_mutex_unlock(&ch.lock)
    return False


cdef void *sender_main(void *argument) noexcept nogil:
    """Sends images, a few records for each lender in turn: one whose socket takes nothing holds up nobody."""
    cdef Links_t *l = <Links_t *> argument
    cdef Channel *ch
    cdef Peer *peer
    cdef uint32_t p, turns
    cdef bint more, again
    while not load32(&l.stopping, ACQUIRE):
        pthread_mutex_lock(&l.send_lock)
        if not l.sending:
            cond_wait_until(&l.send_wanted, &l.send_lock, now_ns() + 500000000ull)
        l.sending = False
        pthread_mutex_unlock(&l.send_lock)
        again = True
        while again and not load32(&l.stopping, ACQUIRE):
            again = False
            for p in range(PEERS_MAX):
                peer = peer_at(l, p)
                if peer == NULL or load32(&peer.channels[BULK].image_count, ACQUIRE) == 0:
                    continue
                ch = &peer.channels[BULK]
                more = True
                turns = 0
                while more and turns < RECORDS_PER_SEND_TURN:
                    lock_to_write(ch)
                    more = not ch.armed and flush_record(l, ch)
                    pthread_mutex_unlock(&ch.lock)
                    turns += 1
                again |= more
    return NULL


cdef int queue_frame(Links_t *l, Channel *ch, Frame *frame, const void *body) noexcept nogil:
    """Put a whole frame into the ring, to be flushed later; AGAIN when it does not fit."""
    cdef int result = SENT
    frame.credit = lent_credit(l, ch.peer)
    frame.crc = crc32_iscsi(<unsigned char *> frame, FRAME_BYTES - 4, 0xffffffffu)
    lock_to_write(ch)
    if ch.ssl == NULL:
        result = DOWN
    elif ch.out_bytes - ch.out_used < FRAME_BYTES + frame.length:
        result = AGAIN
    else:
        ring_append(ch, frame, FRAME_BYTES)
        if frame.length:
            ring_append(ch, body, frame.length)
    pthread_mutex_unlock(&ch.lock)
    return result


cdef int send_frame(Links_t *l, Channel *ch, Frame *frame, const void *body) noexcept nogil:
    cdef int result = queue_frame(l, ch, frame, body)
    if result == SENT:
        flush(l, ch)
    return result


cdef int send_waiting(Links_t *l, Channel *ch, Frame *frame, const void *body, uint64_t deadline_ns) noexcept nogil:
    """Like send_frame, but waits for room in the ring until the deadline."""
    cdef int result
    while True:
        result = send_frame(l, ch, frame, body)
        if result != AGAIN:
            return result
        pthread_mutex_lock(&ch.lock)
        if ch.ssl != NULL and ch.out_bytes - ch.out_used < FRAME_BYTES + frame.length:
            cond_wait_until(&ch.drained, &ch.lock, min(deadline_ns, now_ns() + 100000000ull))
        pthread_mutex_unlock(&ch.lock)
        if now_ns() >= deadline_ns or load32(&l.stopping, ACQUIRE):
            return AGAIN


# --- the lender ----------------------------------------------------------------------------------------------------

cdef inline uint8_t *lent_at(Links_t *l, const Lent *row, uint32_t offset) noexcept nogil:
    return l.lent + <uint64_t> row.blocks[offset // BLOCK_BYTES] * BLOCK_BYTES + offset % BLOCK_BYTES


cdef inline uint16_t *lent_directory(Links_t *l, const Lent *row, uint32_t ordinal) noexcept nogil:
    return <uint16_t *> lent_at(l, row, FRAME_HEADER_BYTES + 2 * ordinal)


cdef inline uint32_t image_base(uint32_t entries) noexcept nogil:
    """Where the entries of an image begin: after its header and its directory."""
    return (FRAME_HEADER_BYTES + 2 * entries + 7) & ~<uint32_t> 7


cdef void lent_move_down(Links_t *l, const Lent *row, uint32_t to, uint32_t offset, uint32_t bytes) noexcept nogil:
    """Move bytes towards the beginning of their image."""
    cdef uint32_t n
    while bytes:
        n = min(bytes, min(BLOCK_BYTES - to % BLOCK_BYTES, BLOCK_BYTES - offset % BLOCK_BYTES))
        memmove(lent_at(l, row, to), lent_at(l, row, offset), n)
        to += n
        offset += n
        bytes -= n


cdef inline uint32_t *lent_bucket(Links_t *l, uint32_t owner, uint32_t segment, uint32_t generation) noexcept nogil:
    # Owners choose the names: without a secret they could choose those that meet in one bucket.
    cdef uint64_t h = ((<uint64_t> owner << 46 ^ <uint64_t> generation << 32 ^ segment) ^ l.lent_secrets[0]) * (l.lent_secrets[1] | 1)
    h = (h ^ h >> 32 ^ l.lent_secrets[2]) * (l.lent_secrets[3] | 1)
    return &l.lent_buckets[(h >> 32) & l.lent_mask]


cdef uint32_t lent_find(Links_t *l, uint32_t owner, uint32_t segment, uint32_t generation) noexcept nogil:
    """Under lender_lock: the row of an image that is held, or NO_FRAME."""
    cdef uint32_t i
    if l.lent_rows == 0:
        return NO_FRAME                 # lends nothing, has no tables: a peer may say FREE all the same
    i = lent_bucket(l, owner, segment, generation)[0]
    while i != NO_FRAME and (l.rows[i].owner != owner or l.rows[i].segment != segment or l.rows[i].generation != generation):
        i = l.rows[i].next
    return i


cdef uint32_t lent_credit(Links_t *l, uint32_t owner) noexcept nogil:
    """Segments that this owner may still bring, one by one."""
    cdef uint32_t held = load32(&l.owner_blocks[owner & 255], RELAXED), images = load32(&l.owner_rows[owner & 255], RELAXED)
    cdef uint32_t blocks = min(load32(&l.lent_free_count, RELAXED), l.owner_blocks_max - min(held, l.owner_blocks_max))
    cdef uint32_t rows = min(load32(&l.rows_free_count, RELAXED), l.owner_rows_max - min(images, l.owner_rows_max))
    return min(blocks // (l.segment_bytes // BLOCK_BYTES), rows)


cdef uint32_t lent_take(Links_t *l, uint32_t owner, uint32_t bytes, uint32_t *refusal) noexcept nogil:
    """A row with granted blocks to receive an image into, or NO_FRAME and why not: receiving never allocates. Images are
    counted beside their bytes: as many small ones as there are rows would leave others no room either."""
    cdef uint32_t i = NO_FRAME, k, need = (bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
    cdef Lent *row
    pthread_mutex_lock(&l.lender_lock)
    if need > l.lent_free_count or l.rows_free_count == 0:
        refusal[0] = S_FULL
    elif l.owner_blocks[owner] + need > l.owner_blocks_max or l.owner_rows[owner] >= l.owner_rows_max:
        refusal[0] = S_SHARE
    else:
        i = l.rows_free
        row = &l.rows[i]
        l.rows_free = row.next
        store32(&l.rows_free_count, l.rows_free_count - 1, RELAXED)
        store32(&l.lent_free_count, l.lent_free_count - need, RELAXED)
        store32(&l.owner_blocks[owner], l.owner_blocks[owner] + need, RELAXED)
        store32(&l.owner_rows[owner], l.owner_rows[owner] + 1, RELAXED)
        for k in range(need):       # from the top: freed in descending order, so that neighbours stay neighbours
            row.blocks[k] = l.lent_free[l.lent_free_count + need - 1 - k]
        row.block_count = need
        row.state = LENT_RECEIVING
        row.owner = owner
        row.bytes = bytes
    pthread_mutex_unlock(&l.lender_lock)
    return i


cdef void lent_give_back(Links_t *l, Lent *row, uint32_t keep) noexcept nogil:
    """Under lender_lock: free the blocks of an image after the first so many."""
    cdef uint32_t freed = row.block_count - keep, free_count = l.lent_free_count
    while row.block_count > keep:
        row.block_count -= 1
        l.lent_free[free_count] = row.blocks[row.block_count]
        free_count += 1
    store32(&l.lent_free_count, free_count, RELAXED)
    store32(&l.owner_blocks[row.owner], l.owner_blocks[row.owner] - freed, RELAXED)


cdef void lent_release(Links_t *l, uint32_t i) noexcept nogil:
    """Under lender_lock."""
    cdef Lent *row = &l.rows[i]
    cdef uint32_t *link
    if row.state == LENT_HELD:
        link = lent_bucket(l, row.owner, row.segment, row.generation)
        while link[0] != i:
            link = &l.rows[link[0]].next
        link[0] = row.next
        if row.owner_before == NO_FRAME:
            l.owner_first[row.owner] = row.owner_after
        else:
            l.rows[row.owner_before].owner_after = row.owner_after
        if row.owner_after != NO_FRAME:
            l.rows[row.owner_after].owner_before = row.owner_before
        store32(&l.owner_images[row.owner], l.owner_images[row.owner] - 1, RELAXED)
        store32(&l.lent_images, l.lent_images - 1, RELAXED)
        store64(&l.lent_bytes, l.lent_bytes - row.bytes, RELAXED)
    lent_give_back(l, row, 0)
    store32(&l.owner_rows[row.owner], l.owner_rows[row.owner] - 1, RELAXED)
    row.state = LENT_FREE
    row.next = l.rows_free
    l.rows_free = i
    store32(&l.rows_free_count, l.rows_free_count + 1, RELAXED)


cdef int lent_commit(Links_t *l, Peer *peer, uint32_t i, const Frame *f) noexcept nogil:
    """A whole image has arrived: check its shape and hold it. An older copy under the same name goes. What is checked here
    is kept in the row: nothing that lies in the blocks is trusted later."""
    cdef Lent *row = &l.rows[i]
    cdef ImageHeader *image = <ImageHeader *> lent_at(l, row, 0)
    cdef uint32_t older
    cdef uint32_t *bucket
    pthread_mutex_lock(&l.lender_lock)
    if image.magic != IMAGE_MAGIC or image.segment != f.segment or image.generation != f.generation or \
            image.entries == 0 or image.entries > ORDINALS_MAX or image.data_bytes > l.segment_bytes or \
            image_base(image.entries) + image.data_bytes != f.length:
        lent_release(l, i)
        pthread_mutex_unlock(&l.lender_lock)
        return S_BAD
    older = lent_find(l, peer.number, f.segment, f.generation)
    if older != NO_FRAME:
        lent_release(l, older)
    row.state = LENT_HELD
    row.owner_generation = peer.generation
    row.segment = f.segment
    row.generation = f.generation
    row.entries = image.entries
    bucket = lent_bucket(l, row.owner, row.segment, row.generation)
    row.next = bucket[0]
    bucket[0] = i
    row.owner_before = NO_FRAME
    row.owner_after = l.owner_first[row.owner]
    if row.owner_after != NO_FRAME:
        l.rows[row.owner_after].owner_before = i
    l.owner_first[row.owner] = i
    store32(&l.owner_images[row.owner], l.owner_images[row.owner] + 1, RELAXED)
    store32(&l.lent_images, l.lent_images + 1, RELAXED)
    store64(&l.lent_bytes, l.lent_bytes + row.bytes, RELAXED)
    pthread_mutex_unlock(&l.lender_lock)
    say(&l.segments_received, 1)
    return S_OK


cdef bint lent_forget(Links_t *l, Peer *peer, const Frame *f) noexcept nogil:
    """Free what the owner no longer needs; freeing what is not there is fine, so an owner may say it twice. True: it was there."""
    cdef uint32_t i
    pthread_mutex_lock(&l.lender_lock)
    i = lent_find(l, peer.number, f.segment, f.generation)
    if i != NO_FRAME:
        lent_release(l, i)
    pthread_mutex_unlock(&l.lender_lock)
    return i != NO_FRAME


cdef uint32_t lent_drop(Links_t *l, uint32_t owner, uint64_t keep_generation) noexcept nogil:
    """Forget everything held for an owner, except what it shipped in its present life: all or nothing, since it ships in no new
    life before this was done. It costs what it frees, and gets of others come in between."""
    cdef uint32_t i, after, batch = LENT_BATCH, dropped = 0
    if l.lent_rows == 0:
        return 0
    while batch == LENT_BATCH:
        batch = 0
        pthread_mutex_lock(&l.lender_lock)
        i = l.owner_first[owner & 255]
        while i != NO_FRAME and batch < LENT_BATCH:
            after = l.rows[i].owner_after
            if l.rows[i].owner_generation != keep_generation:
                lent_release(l, i)
                batch += 1
            i = after
        pthread_mutex_unlock(&l.lender_lock)
        dropped += batch
        sched_yield()
    return dropped


cdef bint lent_pack(Links_t *l, Lent *row, const uint8_t *live, bint moving) noexcept nogil:
    """Under lender_lock: look through an image's entries, which must follow each other in the order of their ordinals; moving:
    drop those that are not live and close the gaps. False when the image is not what it should be."""
    cdef uint32_t base = image_base(row.entries), ordinal, at, end = base, to = base, size
    cdef uint16_t *offset
    for ordinal in range(row.entries):
        offset = lent_directory(l, row, ordinal)
        if offset[0] == 0xffff:
            continue
        at = base + <uint32_t> offset[0] * 8
        if at < end or at + HEADER_BYTES > row.bytes:
            return False
        size = (HEADER_BYTES + (<uint16_t *> lent_at(l, row, at))[0] + 7) & ~<uint32_t> 7     # an entry begins with its length
        if at + size > row.bytes:
            return False
        end = at + size
        if not moving:
            continue
        if live[ordinal >> 3] >> (ordinal & 7) & 1:
            lent_move_down(l, row, to, at, size)
            offset[0] = <uint16_t> ((to - base) >> 3)
            to += size
        else:
            offset[0] = 0xffff
    if moving:
        (<ImageHeader *> lent_at(l, row, 0)).data_bytes = to - base
        store64(&l.lent_bytes, l.lent_bytes - (row.bytes - to), RELAXED)
        row.bytes = to
        lent_give_back(l, row, (to + BLOCK_BYTES - 1) // BLOCK_BYTES)
    return True


cdef int lent_compact(Links_t *l, Peer *peer, const Frame *f, const uint8_t *live, uint32_t *left, uint32_t *dropped) noexcept nogil:
    """Drop what is not live in the owner's bitmap; gets are answered before or after it, never meanwhile. Twice is fine: then
    nothing is 'dropped'."""
    cdef Lent *row
    cdef uint32_t i
    cdef int status = S_ABSENT
    pthread_mutex_lock(&l.lender_lock)
    i = lent_find(l, peer.number, f.segment, f.generation)
    if i != NO_FRAME:
        row = &l.rows[i]
        status = S_BAD
        if f.length == (row.entries + 7) >> 3 and lent_pack(l, row, live, False):
            dropped[0] = row.bytes
            lent_pack(l, row, live, True)
            left[0] = row.bytes
            dropped[0] -= row.bytes
            status = S_OK
    pthread_mutex_unlock(&l.lender_lock)
    if status == S_OK:
        say(&l.segments_compacted, 1)
    return status


cdef uint32_t lent_entry(Links_t *l, const Lent *row, uint32_t ordinal, uint32_t *at) noexcept nogil:
    """Under lender_lock: where a sealed entry lies in its image, and its bytes; 0 when there is none that can be sent."""
    cdef uint32_t length
    if ordinal >= row.entries or lent_directory(l, row, ordinal)[0] == 0xffff:
        return 0
    at[0] = image_base(row.entries) + <uint32_t> lent_directory(l, row, ordinal)[0] * 8
    if at[0] + HEADER_BYTES > row.bytes:
        return 0
    length = HEADER_BYTES + (<uint16_t *> lent_at(l, row, at[0]))[0]
    if at[0] + ((length + 7) & ~<uint32_t> 7) > row.bytes or length > ENTRY_BYTES_MAX:
        return 0
    return length


cdef void ring_append_lent(Links_t *l, Channel *ch, const Lent *row, uint32_t at, uint32_t bytes) noexcept nogil:
    """Under lender_lock and the connection's: what is sent may lie in several blocks."""
    cdef uint32_t n
    while bytes:
        n = min(bytes, BLOCK_BYTES - at % BLOCK_BYTES)
        ring_append(ch, lent_at(l, row, at), n)
        at += n
        bytes -= n


cdef int lent_answer(Links_t *l, Peer *peer, Channel *ch, const Frame *f, const uint16_t *ordinals, bint *found) noexcept nogil:
    """Answer a get with the sealed entries; AGAIN when the ring has no room for them now. Only the owner's own certificate
    gets here with its number."""
    cdef Frame reply
    cdef uint32_t places[GET_PAGES_MAX]
    cdef uint16_t sizes[GET_PAGES_MAX]
    cdef uint32_t pages = f.length // 2, i, table = (2 * pages + 7) & ~<uint32_t> 7
    cdef Lent *row
    cdef int result = SENT
    frame_init(l, &reply, T_PAGE, f.request)
    reply.status = S_ABSENT
    memset(sizes, 0, sizeof(sizes))
    pthread_mutex_lock(&l.lender_lock)
    if f.handle < l.lent_rows:
        row = &l.rows[f.handle]
        if row.state == LENT_HELD and row.owner == peer.number and row.segment == f.segment and row.generation == f.generation:
            reply.status = S_OK
            reply.length = table
            for i in range(pages):
                sizes[i] = <uint16_t> lent_entry(l, row, ordinals[i], &places[i])
                reply.length += (<uint32_t> sizes[i] + 7) & ~<uint32_t> 7
    reply.credit = lent_credit(l, ch.peer)
    reply.crc = crc32_iscsi(<unsigned char *> &reply, FRAME_BYTES - 4, 0xffffffffu)
    lock_to_write(ch)
    if ch.ssl == NULL:
        result = DOWN
    elif ch.out_bytes - ch.out_used < FRAME_BYTES + reply.length:
        result = AGAIN
    else:
        ring_append(ch, &reply, FRAME_BYTES)
        if reply.status == S_OK:
            ring_append(ch, sizes, table)
            for i in range(pages):
                if sizes[i]:
                    ring_append_lent(l, ch, row, places[i], (<uint32_t> sizes[i] + 7) & ~<uint32_t> 7)
        ch.work += reply.length
    pthread_mutex_unlock(&ch.lock)
    pthread_mutex_unlock(&l.lender_lock)
    ch.work += WORK_FRAME + pages * WORK_ENTRY
    found[0] = reply.status == S_OK
    if result == SENT:
        say(&l.gets_served, pages)
    return result


cdef uint32_t asked(Links_t *l, Peer *peer, Channel *ch, const Frame *f, const uint16_t *ordinals) noexcept nogil:
    """Answer a get now, or once the ring has room. One that finds the queue full, too, is asked again after its deadline. Returns
    its weight."""
    cdef Asked *later
    cdef bint found = True
    if ch.asked_count == 0 and lent_answer(l, peer, ch, f, ordinals, &found) != AGAIN:
        return USEFUL if found else IDLE
    if ch.asked_count < ASKED_MAX:
        later = &ch.asked[(ch.asked_head + ch.asked_count) % ASKED_MAX]
        later.frame = f[0]
        memcpy(later.ordinals, ordinals, f.length)
        ch.asked_count += 1
    return USEFUL


cdef bint answer_asked(Links_t *l, Peer *peer, Channel *ch) noexcept nogil:
    """By the reactor, after the ring has been written from: what waited for room in it. True: some is left for another turn."""
    cdef Asked *first
    cdef bint found
    while ch.asked_count:
        if ch.work >= ch.turn:
            return True
        first = &ch.asked[ch.asked_head]
        if lent_answer(l, peer, ch, &first.frame, first.ordinals, &found) == AGAIN:
            return False                # the ring is not empty, so the reactor will be here again
        ch.asked_head = (ch.asked_head + 1) % ASKED_MAX
        ch.asked_count -= 1
        flush(l, ch)
    return False


# --- gets under way ------------------------------------------------------------------------------------------------

cdef void pending_release(Links_t *l, uint32_t i) noexcept nogil:
    pthread_mutex_lock(&l.pending_lock)
    store32(&l.pending[i].state, P_FREE, RELAXED)
    l.pending_free[l.pending_free_count] = i
    store32(&l.pending_free_count, l.pending_free_count + 1, RELAXED)
    pthread_mutex_unlock(&l.pending_lock)


cdef inline void asked_something(Links_t *l, Channel *ch) noexcept nogil:
    """It owes an answer from now on, if it does not already."""
    if load64(&ch.unanswered_ns, RELAXED) == 0:
        store64(&ch.unanswered_ns, ran(l), RELAXED)


cdef inline bint owes_for(Links_t *l, Channel *ch, uint64_t ns) noexcept nogil:
    cdef uint64_t since = load64(&ch.unanswered_ns, RELAXED)
    return since != 0 and ran(l) > since + ns


cdef void pending_send(Links_t *l, uint32_t i, uint64_t id, bint send_now) noexcept nogil:
    """Send the request of an entry that is in state sent under this id; back to waiting when the link would not take it."""
    cdef Pending *p = &l.pending[i]
    cdef Peer *peer = peer_at(l, p.ref.peer)
    cdef Frame frame
    cdef uint16_t ordinals[GET_PAGES_MAX]
    cdef uint32_t k
    frame_init(l, &frame, T_GET, id)
    frame.segment = p.ref.segment
    frame.generation = p.ref.generation
    frame.handle = p.ref.handle
    frame.length = 2 * p.pages
    for k in range(p.pages):
        ordinals[k] = p.wanted[k].ordinal
    if queue_frame(l, &peer.channels[GET], &frame, ordinals) == SENT:
        asked_something(l, &peer.channels[GET])
        if send_now:
            flush(l, &peer.channels[GET])
    else:
        pthread_mutex_lock(&l.pending_lock)
        if p.state == P_SENT and p.id == id:
            store32(&p.state, P_WAITS, RELAXED)
        pthread_mutex_unlock(&l.pending_lock)


cdef uint64_t next_id(Links_t *l, uint32_t i) noexcept nogil:
    """Under pending_lock: a request id that no late reply can match by chance."""
    l.pending_sequence += 1
    return (l.pending_sequence << 12) | i


cdef bint pending_to_spill(Links_t *l, uint32_t i) noexcept nogil:
    """Under pending_lock: have the spill file's threads read what this entry asks for; what a lender may still say is late."""
    cdef Pending *p = &l.pending[i]
    cdef uint64_t id = next_id(l, i)
    if not l.spilling.get(l.spilling.spill, i, id):
        return False
    p.id = id
    p.spilled = True
    store32(&p.state, P_SPILL, RELAXED)
    return True


cdef uint32_t pending_asked(Links_t *l, uint32_t i, uint64_t id, uint32_t *segment, uint32_t *generation,
                            uint16_t *ordinals) noexcept nogil:
    """For the spill file's threads: what a request wants; the number of its pages, 0 when nobody waits any more."""
    cdef Pending *p = &l.pending[i]
    cdef uint32_t k, pages = 0
    pthread_mutex_lock(&l.pending_lock)
    if p.state == P_SPILL and p.id == id:
        segment[0] = p.ref.segment
        generation[0] = p.ref.generation
        pages = p.pages
        for k in range(pages):
            ordinals[k] = p.wanted[k].ordinal
    pthread_mutex_unlock(&l.pending_lock)
    return pages


cdef Pending *pending_claim(Links_t *l, uint32_t i, uint64_t id) noexcept nogil:
    """For the spill file's threads: the right and the duty to complete a request, by pending_arrived(); NULL when its deadline
    has passed meanwhile."""
    cdef Pending *p = &l.pending[i]
    pthread_mutex_lock(&l.pending_lock)
    if p.state != P_SPILL or p.id != id:
        p = NULL
    else:
        store32(&p.state, P_COMPLETING, RELAXED)
    pthread_mutex_unlock(&l.pending_lock)
    return p


cdef void pending_arrived(Links_t *l, Pending *p, int status, const uint8_t *body, uint32_t length,
                          EVP_CIPHER_CTX *ctx) noexcept nogil:
    """Complete a claimed request: one page here and now, several by a worker."""
    if status == OK and p.pages > 1:
        memcpy(p.staging, body, length)
        pthread_mutex_lock(&l.jobs_lock)
        add_job(l, pending_open, p)
        pthread_mutex_unlock(&l.jobs_lock)
    else:
        pending_complete(l, p, status, body, ctx)


cdef bint links_peer_lost(Links_t *l, uint32_t number) noexcept nogil:
    """True once a lender has been out of reach for longer than give_up, or said goodbye."""
    cdef Peer *peer = peer_at(l, number)
    cdef uint64_t down
    if peer == NULL:
        return number != SPILL_PEER or not load32(&l.spilling.ready, ACQUIRE)
    down = load64(&peer.down_ns, ACQUIRE)
    return load32(&peer.gone, ACQUIRE) != 0 or (down != 0 and ran(l) - down > l.give_up_ns)


cdef bint links_peer_reachable(Links_t *l, uint32_t number) noexcept nogil:
    """A lender whose get connection is up now."""
    cdef Peer *peer = peer_at(l, number)
    if peer == NULL:
        return number == SPILL_PEER and load32(&l.spilling.ready, ACQUIRE)
    return not load32(&peer.gone, ACQUIRE) and load64(&peer.down_ns, ACQUIRE) == 0


cdef bint answers(Links_t *l, uint32_t number) noexcept nogil:
    """A lender that is up, and has not been silent for so long that what it was asked for was asked of the spill file."""
    cdef Peer *peer = peer_at(l, number)
    return links_peer_reachable(l, number) and (peer == NULL or not owes_for(l, &peer.channels[GET], HEDGE_MS * 1000000ull))


cdef bint links_slot_lost(Links_t *l, uint32_t peer, uint64_t slot) noexcept nogil:
    """A page that this slot names, on this lender, cannot be had: the lender is lost, and the spill file has it not either."""
    return links_peer_lost(l, peer) and not store_is_spilled(l.store, slot)


cdef bint links_slot_reachable(Links_t *l, uint32_t peer, uint64_t slot) noexcept nogil:
    return links_peer_reachable(l, peer) or store_is_spilled(l.store, slot)


cdef void links_look_at_spill(Links_t *l) noexcept nogil:
    """Before something is said of many pages: what somebody has cut off the spill file counts as lost from here on."""
    if load32(&l.spilling.ready, ACQUIRE):
        l.spilling.look(l.spilling.spill)


cdef void links_flush(Links_t *l, uint32_t number) noexcept nogil:
    """Send what links_get has queued for a lender."""
    cdef Peer *peer = peer_at(l, number)
    if peer != NULL:
        flush(l, &peer.channels[GET])


cdef int links_get(Links_t *l, const RemoteRef *ref, Wanted *wanted, uint32_t pages, uint8_t *staging, Complete complete,
                   void *context, bint send_now) noexcept nogil:
    """Ask a lender for pages of one segment. OK: under way, 'complete' is called once, from a thread of the links, within
    give_up, or SPILL_S where the spill file is read. Anything else: it will not be called (UNREACHABLE, or BUSY when too many gets are under way). 'wanted' and
    'staging' (reply_bytes() of it, for more than one page) belong to the links until then. Several gets in a row cost one
    record and one system call when only links_flush sends them."""
    cdef uint32_t i
    cdef uint64_t id
    cdef Pending *p
    cdef bint spilled = ref.spill != 0 and not answers(l, ref.peer) or ref.peer == SPILL_PEER
    ASSERT(0 < pages <= GET_PAGES_MAX and (pages == 1 or staging != NULL), b"a request asks for 1 to GET_PAGES_MAX pages")
    if links_peer_lost(l, SPILL_PEER if spilled else ref.peer):
        say(&l.unreachable, pages)
        return UNREACHABLE
    pthread_mutex_lock(&l.pending_lock)
    if l.pending_free_count == 0 or load32(&l.stopping, ACQUIRE):
        pthread_mutex_unlock(&l.pending_lock)
        return BUSY
    store32(&l.pending_free_count, l.pending_free_count - 1, RELAXED)
    i = l.pending_free[l.pending_free_count]
    p = &l.pending[i]
    id = next_id(l, i)
    p.links = l
    store32(&p.state, P_SENT, RELAXED)
    p.id = id
    p.ref = ref[0]
    p.one = wanted[0]
    p.wanted = &p.one if pages == 1 else wanted
    p.pages = pages
    p.staging = staging
    p.complete = complete
    p.context = context
    p.started_ns = p.sent_ns = ran(l)
    p.spilled = False
    if spilled and not pending_to_spill(l, i):
        store32(&p.state, P_FREE, RELAXED)
        store32(&l.pending_free_count, l.pending_free_count + 1, RELAXED)
        pthread_mutex_unlock(&l.pending_lock)
        return BUSY
    pthread_mutex_unlock(&l.pending_lock)
    if not spilled:
        pending_send(l, i, id, send_now)
    elif ref.peer != SPILL_PEER:
        say(&l.gets_redirected, pages)
    return OK


cdef int reply_next(Reply *reply, uint8_t *page) noexcept nogil:
    """Open the next page of a reply, in the order of 'wanted': OK and its bytes in 'page', or what it met. BUSY: it was
    overwritten, flushed or moved meanwhile, look again."""
    cdef Links_t *l = reply.links
    cdef RemoteRef *ref = &reply.pending.ref
    cdef const Wanted *wanted = &reply.wanted[reply.opened]
    cdef uint32_t size = 0
    cdef const uint8_t *entry = reply.entry
    cdef int status = reply.status
    if status == OK:
        size = reply.sizes[reply.opened]
        reply.entry += (size + 7) & ~<uint32_t> 7
    reply.opened += 1
    if status == UNREACHABLE or status == BUSY:
        return status
    if store_slot(l.store, ref.pool, ref.oid, wanted.index) != wanted.slot:
        return BUSY
    if status == OK:
        ref.index = wanted.index
        ref.ordinal = wanted.ordinal
        status = store_unseal(ref, entry, size, page, reply.ctx)
    if status == OK:
        say(&l.remote_gets, 1)
    elif status == CORRUPT:
        say(&l.corrupt_replies, 1)
        status = other_copy(reply)
    return status


cdef int other_copy(Reply *reply) noexcept nogil:
    """What a lender or the spill file gave is damaged. BUSY: look again, the segment is read from the other from now on;
    UNREACHABLE: its lender has it, and is away; CORRUPT: there is no other."""
    cdef Links_t *l = reply.links
    cdef RemoteRef *ref = &reply.pending.ref
    if ref.spill == 0 or ref.peer == SPILL_PEER:
        return CORRUPT
    if reply.spilled:
        return links_unspill(l, ref)
    if not store_fall_back(l.store, ref.segment, ref.generation, ref.peer):
        return CORRUPT
    pthread_mutex_lock(&l.ship_lock)
    add_orphan(peer_at(l, ref.peer), ref.segment, ref.generation)
    pthread_mutex_unlock(&l.ship_lock)
    eventfd_write(l.order_fd, 1)
    return BUSY


cdef int links_unspill(Links_t *l, const RemoteRef *ref) noexcept nogil:
    """A page of a mirrored segment cannot be read from the spill file. BUSY: its lender is asked from now on, and the image is
    forgotten; UNREACHABLE: the lender is away, and the image kept for its other pages."""
    cdef uint32_t spill
    if not links_peer_reachable(l, ref.peer):
        return UNREACHABLE
    spill = store_unspill(l.store, ref.segment, ref.generation)
    if spill:
        l.spilling.release(l.spilling.spill, spill - 1)
    return BUSY


cdef void pending_complete(Links_t *l, Pending *p, int status, const uint8_t *body, EVP_CIPHER_CTX *ctx) noexcept nogil:
    cdef Reply reply
    reply.links = l
    reply.pending = p
    reply.wanted = p.wanted
    reply.pages = p.pages
    reply.status = status
    reply.opened = 0
    reply.spilled = p.spilled
    reply.ctx = ctx
    reply.sizes = <const uint16_t *> body
    reply.entry = NULL
    if status == OK:
        reply.entry = body + ((2 * p.pages + 7) & ~<uint32_t> 7)
        reply.status = store_unseal_begin(&p.ref, ctx)
    p.complete(p.context, &reply)
    pending_release(l, <uint32_t> (p - l.pending))


cdef bint reply_shaped(const uint8_t *body, uint32_t length, uint32_t pages) noexcept nogil:
    """The table of sizes fits the body, so that entries can be found without looking at bounds again."""
    cdef uint32_t i, total = (2 * pages + 7) & ~<uint32_t> 7
    if length < total:
        return False
    for i in range(pages):
        if (<const uint16_t *> body)[i] > ENTRY_BYTES_MAX:
            return False
        total += (<uint32_t> (<const uint16_t *> body)[i] + 7) & ~<uint32_t> 7
    return total == length


cdef uint8_t *pending_staging(Links_t *l, Peer *peer, const Frame *f) noexcept nogil:
    """Where the body of a reply of several pages goes; NULL when nobody waits for it (any more)."""
    cdef Pending *p = &l.pending[f.request & (PENDING_MAX - 1)]
    cdef uint8_t *staging = NULL
    pthread_mutex_lock(&l.pending_lock)
    if p.state == P_SENT and p.id == f.request and p.ref.peer == peer.number and p.pages > 1 and \
            f.length <= reply_bytes(p.pages):
        staging = p.staging
    pthread_mutex_unlock(&l.pending_lock)
    return staging


cdef bint pending_answered(Links_t *l, Peer *peer, const Frame *f, const uint8_t *body) noexcept nogil:
    """A reply has arrived whole. 'body' is the receive buffer, or the staging memory of the request. False: nobody waits for it."""
    cdef Pending *p = &l.pending[f.request & (PENDING_MAX - 1)]
    cdef int status = OK
    cdef uint64_t now = ran(l)
    pthread_mutex_lock(&l.pending_lock)
    if p.state != P_SENT or p.id != f.request or p.ref.peer != peer.number:
        pthread_mutex_unlock(&l.pending_lock)
        say(&l.late_replies, 1)
        return False
    store32(&p.state, P_COMPLETING, RELAXED)
    pthread_mutex_unlock(&l.pending_lock)
    record(&peer.round_trip, now - p.sent_ns)
    say(&peer.gets, p.pages)
    if f.status == S_ABSENT:
        status = LOST               # for those whose slot still names it: the lender has it not
        if store_segment_lost(l.store, p.ref.segment, p.ref.generation, peer.number):
            status = BUSY
    elif f.status != S_OK or body == NULL or not reply_shaped(body, f.length, p.pages):
        status = CORRUPT
    if p.pages == 1 or status != OK:
        pending_complete(l, p, status, body, l.open_ctx)
        return True
    if body != p.staging:
        memcpy(p.staging, body, f.length)
    pthread_mutex_lock(&l.jobs_lock)
    add_job(l, pending_open, p)
    pthread_mutex_unlock(&l.jobs_lock)
    return True


cdef void pending_open(void *context, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """By a worker."""
    cdef Pending *p = <Pending *> context
    pending_complete(p.links, p, OK, p.staging, ctx)


cdef void pending_forget_body(Links_t *l, uint32_t i, uint32_t peer) noexcept nogil:
    """By the get reactor: what is just being received for this request has nowhere to go any more."""
    cdef Channel *ch
    if peer == SPILL_PEER:
        return
    ch = &peer_at(l, peer).channels[GET]
    if ch.in_body and (ch.frame.request & (PENDING_MAX - 1)) == i:
        ch.body = NULL


cdef void pending_tick(Links_t *l) noexcept nogil:
    """Deadlines: ask again after request_deadline, or the spill file where it has what is wanted too, give up after give_up, and
    say at once when the lender's memory is gone. pending_verdict() decides."""
    cdef uint32_t i, peer
    cdef uint64_t now = ran(l), id
    cdef Pending *p
    cdef int outcome
    cdef Asking asking
    cdef Patience patience
    cdef Verdict verdict
    if load32(&l.pending_free_count, RELAXED) == PENDING_MAX:
        return
    patience.give_up_ns = l.give_up_ns
    patience.spill_ns = SPILL_S * 1000000000ull
    patience.hedge_ns = HEDGE_MS * 1000000ull
    patience.ask_again_ns = l.request_deadline_ns
    asking.stopping = load32(&l.stopping, ACQUIRE) != 0
    for i in range(PENDING_MAX):
        p = &l.pending[i]
        outcome = <int> load32(&p.state, ACQUIRE)
        if outcome != P_WAITS and outcome != P_SENT and outcome != P_SPILL:
            continue
        pthread_mutex_lock(&l.pending_lock)
        outcome = -1
        id = 0
        peer = p.ref.peer               # once redirected, the request may be over before this turn is
        asking.state = <PendingState> p.state
        if asking.state != P_WAITS and asking.state != P_SENT and asking.state != P_SPILL:
            pthread_mutex_unlock(&l.pending_lock)       # what it wants is its owner's again
            continue
        asking.started_ns = p.started_ns
        asking.sent_ns = p.sent_ns
        asking.spilled = p.spilled
        asking.mirrored = p.ref.spill != 0
        asking.remote = store_slot_state(l.store, p.wanted[0].slot) == REMOTE   # of the segment, whichever page names it
        verdict = pending_verdict(&asking, &patience, now)
        if verdict == V_REDIRECT and not pending_to_spill(l, i):
            asking.mirrored = False     # too many wait for it
            verdict = pending_verdict(&asking, &patience, now)
        if verdict == V_GIVE_UP:
            outcome = UNREACHABLE
        elif verdict == V_SETTLE:
            outcome = store_slot_state(l.store, p.wanted[0].slot)
            outcome = LOST if outcome == LOST else BUSY
        elif verdict == V_REDIRECT:
            say(&l.gets_redirected, p.pages)
        elif verdict == V_ASK:
            id = next_id(l, i)
            p.id = id
            p.sent_ns = now
            store32(&p.state, P_SENT, RELAXED)
        if outcome >= 0:
            store32(&p.state, P_COMPLETING, RELAXED)
        pthread_mutex_unlock(&l.pending_lock)
        if outcome >= 0 or verdict == V_ASK or verdict == V_REDIRECT:
            pending_forget_body(l, i, peer)
        if outcome >= 0:
            if outcome == UNREACHABLE:
                say(&l.unreachable, p.pages)
            pending_complete(l, p, outcome, NULL, l.open_ctx)
        elif verdict == V_ASK:
            pending_send(l, i, id, True)


cdef void pending_unsent(Links_t *l, uint32_t peer) noexcept nogil:
    """The get connection went down: what was sent on it waits for the next one."""
    cdef uint32_t i
    pthread_mutex_lock(&l.pending_lock)
    for i in range(PENDING_MAX):
        if l.pending[i].state == P_SENT and l.pending[i].ref.peer == peer:
            store32(&l.pending[i].state, P_WAITS, RELAXED)
    pthread_mutex_unlock(&l.pending_lock)


cdef struct Waiter:
    pthread_mutex_t lock
    pthread_cond_t done
    int status
    bint finished
    uint8_t *page


cdef void waiter_complete(void *context, Reply *reply) noexcept nogil:
    cdef Waiter *w = <Waiter *> context
    cdef int status = reply_next(reply, w.page)
    pthread_mutex_lock(&w.lock)
    w.status = status
    w.finished = True
    pthread_cond_signal(&w.done)
    pthread_mutex_unlock(&w.lock)


cdef int get_page(Links_t *l, uint64_t pool, const uint64_t *oid, uint32_t index, uint8_t *page, int mode) noexcept nogil:
    """Get a page wherever it is, waiting for a lender at most give_up, for the spill file SPILL_S."""
    cdef RemoteRef ref
    cdef Wanted wanted
    cdef Waiter w
    cdef int result
    cdef uint64_t deadline = ran(l) + 2 * l.give_up_ns
    while True:
        result = store_get(l.store, pool, oid, index, page, mode, &ref)
        if result != REMOTE:
            return result
        pthread_mutex_init(&w.lock, NULL)
        pthread_cond_init(&w.done, NULL)
        w.finished = False
        w.page = page
        wanted.slot = ref.slot
        wanted.index = ref.index
        wanted.ordinal = <uint16_t> ref.ordinal
        result = links_get(l, &ref, &wanted, 1, NULL, waiter_complete, &w, True)
        if result == OK:
            pthread_mutex_lock(&w.lock)
            while not w.finished:
                pthread_cond_wait(&w.done, &w.lock)     # bounded: the tick completes everything in time
            result = w.status
            pthread_mutex_unlock(&w.lock)
        pthread_cond_destroy(&w.done)
        pthread_mutex_destroy(&w.lock)
        if ref.ephemeral and (result == LOST or result == CORRUPT or result == UNREACHABLE):
            store_flush_if(l.store, pool, oid, index, ref.slot)
            result = MISS           # it may vanish at any time, and its lender's end is such a time
        elif result == OK and (mode == 1 or (mode == 0 and ref.ephemeral)) and \
                store_flush_if(l.store, pool, oid, index, ref.slot) != OK:
            result = BUSY           # somebody took or replaced it since the reply: no two exclusive gets return one put
        if result != BUSY:
            return result
        if ran(l) > deadline or load32(&l.stopping, ACQUIRE):
            return UNREACHABLE
        sched_yield()


cdef struct Fetching:
    pthread_mutex_t lock
    pthread_cond_t done
    uint32_t outstanding
    Fetch *wanted


cdef void fetching_less(Fetching *f, uint32_t n) noexcept nogil:
    pthread_mutex_lock(&f.lock)
    f.outstanding -= n
    if f.outstanding == 0:
        pthread_cond_signal(&f.done)
    pthread_mutex_unlock(&f.lock)


cdef void fetching_answered(void *context, Reply *reply) noexcept nogil:
    cdef Fetching *f = <Fetching *> context
    cdef Fetch *page
    cdef uint32_t i
    for i in range(reply.pages):
        page = &f.wanted[reply.wanted[i].place]
        page.status = reply_next(reply, page.bytes)
    fetching_less(f, 1)


cdef void get_pages(Links_t *l, uint64_t pool, Fetch *wanted, uint32_t n, uint8_t *staging) noexcept nogil:
    """Get up to GET_PAGES_MAX pages of a dense pool wherever they are, as get_page does with one, and leave them there. Everything
    that is away is asked for at once, pages of one segment together, so that a slow lender is waited for once. 'staging' has
    room for n replies of one page."""
    cdef Fetching f
    cdef RemoteRef refs[GET_PAGES_MAX]
    cdef uint32_t counts[GET_PAGES_MAX]
    cdef uint8_t group[GET_PAGES_MAX]
    cdef uint16_t ordinals[GET_PAGES_MAX]
    cdef Wanted asked[GET_PAGES_MAX]
    cdef uint64_t none[3]
    cdef uint64_t deadline = ran(l) + 2 * l.give_up_ns
    cdef uint32_t i, g, groups, at, k, busy
    cdef int result
    cdef RemoteRef ref
    cdef uint8_t *place
    ASSERT(n <= GET_PAGES_MAX, b"pages that are got together fit into one request")
    memset(none, 0, sizeof(none))
    f.wanted = wanted
    for i in range(n):
        wanted[i].status = BUSY
    while True:
        groups = 0
        for i in range(n):
            group[i] = 0
            if wanted[i].status != BUSY:
                continue
            wanted[i].slot = 0
            wanted[i].status = store_get(l.store, pool, none, wanted[i].index, wanted[i].bytes, -1, &ref)
            if wanted[i].status != REMOTE:
                continue
            g = groups
            while g > 0 and (refs[g - 1].segment != ref.segment or refs[g - 1].generation != ref.generation or refs[g - 1].peer != ref.peer):
                g -= 1
            if g == 0:
                refs[groups] = ref
                counts[groups] = 0
                groups += 1
                g = groups
            counts[g - 1] += 1
            group[i] = <uint8_t> g
            wanted[i].slot = ref.slot
            ordinals[i] = <uint16_t> ref.ordinal
        if groups == 0:
            return
        pthread_mutex_init(&f.lock, NULL)
        pthread_cond_init(&f.done, NULL)
        f.outstanding = groups
        at = 0
        place = staging
        for g in range(groups):
            k = at
            for i in range(n):
                if group[i] == g + 1:
                    asked[k].slot = wanted[i].slot
                    asked[k].index = wanted[i].index
                    asked[k].ordinal = ordinals[i]
                    asked[k].place = <uint16_t> i
                    k += 1
            result = links_get(l, &refs[g], &asked[at], counts[g], place, fetching_answered, &f, True)
            if result != OK:
                for k in range(at, at + counts[g]):
                    wanted[asked[k].place].status = result
                fetching_less(&f, 1)
            at += counts[g]
            place += counts[g] * reply_bytes(1)
        pthread_mutex_lock(&f.lock)
        while f.outstanding:
            pthread_cond_wait(&f.done, &f.lock)         # bounded: the tick completes everything in time
        pthread_mutex_unlock(&f.lock)
        pthread_cond_destroy(&f.done)
        pthread_mutex_destroy(&f.lock)
        busy = 0
        for i in range(n):
            busy += wanted[i].status == BUSY
        if busy == 0:
            return
        if ran(l) > deadline or load32(&l.stopping, ACQUIRE):
            for i in range(n):
                if wanted[i].status == BUSY:
                    wanted[i].status = UNREACHABLE
            return
        sched_yield()


# --- workers -------------------------------------------------------------------------------------------------------

cdef void add_job(Links_t *l, Work work, void *context) noexcept nogil:
    """Under jobs_lock. There is always room: requests under way and the jobs of links_later() fill half of the queue each."""
    ASSERT(l.jobs_count < JOBS_MAX, b"the queue of jobs holds every request under way")
    l.jobs[(l.jobs_head + l.jobs_count) % JOBS_MAX].work = work
    l.jobs[(l.jobs_head + l.jobs_count) % JOBS_MAX].context = context
    l.jobs_count += 1
    if l.workers_idle:
        pthread_cond_signal(&l.jobs_there)


cdef bint links_later(Links_t *l, Work work, void *context) noexcept nogil:
    """Have a worker do it. False: too much waits already, or the links stop: do it yourself."""
    cdef bint room
    pthread_mutex_lock(&l.jobs_lock)
    room = l.jobs_count < JOBS_MAX - PENDING_MAX and not l.reactors_done
    if room:
        add_job(l, work, context)
    pthread_mutex_unlock(&l.jobs_lock)
    return room


cdef void *worker_main(void *argument) noexcept nogil:
    """Ends when the links stop and nothing is left to do: whoever waits for a job gets its answer."""
    cdef Links_t *l = <Links_t *> argument
    cdef EVP_CIPHER_CTX *ctx = store_unseal_context()
    cdef Job job
    ASSERT(ctx != NULL, b"no memory for a cipher context")
    while True:
        pthread_mutex_lock(&l.jobs_lock)
        while l.jobs_count == 0 and not l.reactors_done:
            l.workers_idle += 1
            cond_wait_until(&l.jobs_there, &l.jobs_lock, now_ns() + 500000000ull)
            l.workers_idle -= 1
        if l.jobs_count == 0:
            pthread_mutex_unlock(&l.jobs_lock)
            break
        job = l.jobs[l.jobs_head]
        l.jobs_head = (l.jobs_head + 1) % JOBS_MAX
        l.jobs_count -= 1
        pthread_mutex_unlock(&l.jobs_lock)
        job.work(job.context, ctx)
    EVP_CIPHER_CTX_free(ctx)
    return NULL


# --- shipping ------------------------------------------------------------------------------------------------------

cdef void ship_done(Links_t *l, Peer *peer, uint32_t i) noexcept nogil:
    """Under ship_lock: this one is under way no more."""
    l.ships[i].id = 0
    l.ships_used -= 1
    sub32(&peer.shipping, 1, RELAXED)
    peer.progress_ns = ran(l)


cdef bint ship_answered(Links_t *l, Peer *peer, const Frame *f) noexcept nogil:
    """False: nothing like that was sent on this connection."""
    cdef uint32_t i = <uint32_t> (f.request & (SHIPS_MAX - 1))
    cdef uint64_t now = ran(l)
    cdef Ship ship
    ship.id = 0
    pthread_mutex_lock(&l.ship_lock)
    if l.ships[i].id == f.request and f.request != 0 and l.ships[i].peer == peer.number:
        ship = l.ships[i]
        if load32(&peer.shipping, RELAXED) > 1:
            peer.pace_ns = (7 * peer.pace_ns + now - max(peer.answered_ns, ship.sent_ns)) // 8
        peer.answered_ns = now
        ship_done(l, peer, i)
    pthread_mutex_unlock(&l.ship_lock)
    if load32(&l.orders_count, RELAXED):
        eventfd_write(l.order_fd, 1)
    if ship.id == 0:
        say(&l.late_replies, 1)
    elif f.status == S_OK and not peer.gone:    # it said goodbye: what it holds goes, so the segment stays here
        peer.lends = True
        store_ship_commit(l.store, ship.segment, peer.number, f.handle, ship.spill, ship.meta)
        say(&peer.segments_sent, 1)
    else:
        say(&l.ships_refused, 1)
        store32(&peer.refusal, f.status, RELAXED)
        say(&peer.refused, 1)
        ship_failed(l, &ship)
    return ship.id != 0


cdef void ship_failed(Links_t *l, const Ship *ship) noexcept nogil:
    """No lender has it. It stays here, whole, unless the spill file has it already."""
    if ship.spill:
        store_ship_commit(l.store, ship.segment, SPILL_PEER, 0, ship.spill, ship.meta)
    else:
        free(ship.meta)
        store_ship_abort(l.store, ship.segment)


cdef void add_orphan(Peer *peer, uint32_t segment, uint32_t generation) noexcept nogil:
    """Under ship_lock: this lender is to forget a segment that has another place, and gets none of this name before it did."""
    ASSERT(peer.orphan_count < peer.orphan_room, b"a lender has no more orphans than it was sent segments")
    if not is_orphan(peer, segment, generation):
        peer.orphans[peer.orphan_count] = segment
        peer.orphan_generations[peer.orphan_count] = generation
        store32(&peer.orphan_count, peer.orphan_count + 1, RELAXED)


cdef bint is_orphan(Peer *peer, uint32_t segment, uint32_t generation) noexcept nogil:
    """Under ship_lock."""
    cdef uint32_t i
    for i in range(peer.orphan_count):
        if peer.orphans[i] == segment and peer.orphan_generations[i] == generation:
            return True
    return False


cdef void orphan_freed(Links_t *l, Peer *peer, const Frame *f) noexcept nogil:
    cdef uint32_t i = 0, after
    cdef bint more
    pthread_mutex_lock(&l.ship_lock)
    while i < peer.orphan_count and (peer.orphans[i] != f.segment or peer.orphan_generations[i] != f.generation):
        i += 1                      # the answers come in the order in which they were told: this ends at once
    if i < peer.orphan_count:
        after = peer.orphan_count - i - 1
        memmove(peer.orphans + i, peer.orphans + i + 1, 4 * <size_t> after)
        memmove(peer.orphan_generations + i, peer.orphan_generations + i + 1, 4 * <size_t> after)
        store32(&peer.orphan_count, peer.orphan_count - 1, RELAXED)
        peer.orphans_told -= i < peer.orphans_told
    more = peer.orphans_told < peer.orphan_count
    pthread_mutex_unlock(&l.ship_lock)
    if more:
        eventfd_write(l.order_fd, 1)


cdef void ships_fail(Links_t *l, Peer *peer) noexcept nogil:
    """The bulk connection went down. Whether the lender has what was under way is unknown: it stays ours, and the
    lender is told to forget it, and gets it again only when it has said that it did."""
    cdef uint32_t i
    cdef Ship ship
    for i in range(SHIPS_MAX):
        ship.id = 0
        pthread_mutex_lock(&l.ship_lock)
        if l.ships[i].id != 0 and l.ships[i].peer == peer.number:
            ship = l.ships[i]
            ship_done(l, peer, i)
            add_orphan(peer, ship.segment, ship.generation)
        pthread_mutex_unlock(&l.ship_lock)
        if ship.id:
            say(&l.ships_failed, 1)
            ship_failed(l, &ship)


cdef bint queue_image(Links_t *l, Channel *ch, uint32_t bytes, uint32_t life) noexcept nogil:
    """Hand the image that the shipper has just filled to the sender, unless that connection is gone."""
    cdef bint queued
    lock_to_write(ch)
    queued = ch.ssl != NULL and ch.life == life
    if queued:
        ch.image_bytes[(ch.image_first + ch.image_count) & 1] = bytes
        add32(&ch.image_count, 1, RELEASE)
    pthread_mutex_unlock(&ch.lock)
    if queued:
        wake_sender(l)
    return queued


cdef void ship(Links_t *l, const Order *order) noexcept nogil:
    """Seal one segment into a free image of its lender's connection. Whatever fails leaves the segment here, whole."""
    cdef Peer *peer = peer_at(l, order.peer)
    cdef Channel *ch = &peer.channels[BULK]
    cdef RemoteMeta *meta = NULL
    cdef uint8_t *image
    cdef Frame *frame
    cdef ZSTD_CCtx *zstd = l.zstd
    cdef uint32_t bytes, life, slot = 0, spill = 0
    cdef uint64_t id
    cdef bint congested
    cdef Ship failed
    if store_ship_begin(l.store, order.segment, order.generation) != OK:
        return
    pthread_mutex_lock(&ch.lock)
    image = ch.images[(ch.image_first + ch.image_count) & 1]
    life = ch.life
    pthread_mutex_unlock(&ch.lock)
    pthread_mutex_lock(&l.ship_lock)
    # Only behind others: where zstd is the slower one nothing is under way, and the pace stays what a slow moment made it.
    congested = peer.ordered != 0 and peer.pace_ns > <uint64_t> RECOMPRESS_NS_PER_BYTE * l.segment_bytes and \
        (2 * peer.shipping >= l.bulk_in_flight or load32(&ch.image_count, ACQUIRE) != 0)
    pthread_mutex_unlock(&l.ship_lock)
    # Not while puts are short of frames: they wait for segments to be gone.
    if l.recompress == RECOMPRESS_OFF or (l.recompress == RECOMPRESS_AUTO and (
            not congested or store_short_of_frames(l.store))):
        zstd = NULL
    bytes = store_seal_image(l.store, order.segment, image + FRAME_BYTES, &meta, l.seal_ctx, zstd)
    if bytes == 0:
        say(&l.ships_failed, 1)
        store_ship_abort(l.store, order.segment)
        return
    if load32(&l.spilling.ready, ACQUIRE) and l.spilling.mirror and not l.store.segments[order.segment].ephemeral:
        # Without room for it there is no second copy for now: a lender with room is better than a put that is refused.
        spill = l.spilling.keep(l.spilling.spill, image + FRAME_BYTES, bytes)
    pthread_mutex_lock(&l.ship_lock)
    while l.ships[slot].id != 0:        # next_order saw a free one, and nobody else takes any
        slot += 1
    l.ship_sequence += 1
    id = l.ship_sequence * SHIPS_MAX + slot
    l.ships[slot].id = id
    l.ships_used += 1
    l.ships[slot].segment = order.segment
    l.ships[slot].generation = order.generation
    l.ships[slot].peer = peer.number
    l.ships[slot].meta = meta
    l.ships[slot].spill = spill
    l.ships[slot].sent_ns = ran(l)
    add32(&peer.shipping, 1, RELAXED)
    pthread_mutex_unlock(&l.ship_lock)
    frame = <Frame *> image
    frame_init(l, frame, T_SHIP, id)
    frame.length = bytes
    frame.segment = order.segment
    frame.generation = order.generation
    frame.crc = crc32_iscsi(image, FRAME_BYTES - 4, 0xffffffffu)
    if queue_image(l, ch, FRAME_BYTES + bytes, life):
        say(&l.bytes_shipped, bytes)
        return
    pthread_mutex_lock(&l.ship_lock)
    if l.ships[slot].id != id:
        slot = SHIPS_MAX                # the reactor took the connection down and has dealt with it
    else:
        failed = l.ships[slot]
        ship_done(l, peer, slot)
    pthread_mutex_unlock(&l.ship_lock)
    if slot < SHIPS_MAX:
        say(&l.ships_failed, 1)
        ship_failed(l, &failed)


cdef uint32_t ring_room(Channel *ch) noexcept nogil:
    cdef uint32_t room
    pthread_mutex_lock(&ch.lock)
    room = ch.out_bytes - ch.out_used
    pthread_mutex_unlock(&ch.lock)
    return room


cdef bint next_order(Links_t *l, Order *order) noexcept nogil:
    """Take the oldest order whose lender can have a segment now. Orders for a lender that does not get any further are
    given up one by one; those for others pass them."""
    cdef uint32_t i, kept = 0
    cdef uint64_t now = ran(l)
    cdef bint found = False, expired
    cdef Peer *peer
    cdef Order *o
    pthread_mutex_lock(&l.ship_lock)
    for i in range(l.orders_count):
        o = &l.orders[i]
        peer = peer_at(l, o.peer)
        expired = load32(&peer.gone, ACQUIRE) or load32(&peer.channels[BULK].up, ACQUIRE) == 0 or \
            (peer.orphan_count < ORPHANS_MAX and is_orphan(peer, o.segment, o.generation)) or \
            now > max(o.ordered_ns, peer.progress_ns) + ORDER_S * 1000000000ull
        # What is on its way may all become orphans.
        if not expired and (found or peer.shipping >= min(l.bulk_in_flight, (SHIPS_MAX - l.ships_used) // SHARE) or
                            peer.shipping + peer.orphan_count >= ORPHANS_MAX or
                            load32(&peer.told, RELAXED) >= TOLD_MAX or     # each keeps the number of a segment from being used
                            load32(&peer.channels[BULK].image_count, ACQUIRE) >= IMAGES):
            l.orders[kept] = o[0]
            kept += 1
            continue
        store32(&l.store.segments[o.segment].ordered, 0, RELAXED)
        peer.ordered -= 1
        if expired:
            say(&l.ships_failed, 1)
            store_touch(l.store, o.segment, o.generation)
        else:
            found = True
            order[0] = o[0]
            peer.progress_ns = now
            l.sealing = 1
    store32(&l.orders_count, kept, RELAXED)
    pthread_mutex_unlock(&l.ship_lock)
    return found


cdef int tell(Links_t *l, Peer *peer, Frame *frame, const void *body) noexcept nogil:
    """Send what is to be answered by FREED or COMPACTED, once."""
    cdef int sent
    add32(&peer.told, 1, RELAXED)
    sent = send_frame(l, &peer.channels[BULK], frame, body)
    if sent != SENT:
        sub32(&peer.told, 1, RELAXED)
    return sent


cdef bint was_told(Peer *peer) noexcept nogil:
    """By the bulk reactor: an answer to something that was said on this connection."""
    if <int> load32(&peer.told, RELAXED) <= 0:
        return False
    sub32(&peer.told, 1, RELAXED)
    return True


cdef void tell_freed(Links_t *l) noexcept nogil:
    """Tell lenders what they may forget. Without a connection, or room in it, it is told later."""
    cdef uint32_t segment = 0, generation = 0, number = 0, handle = 0, spill = 0, i
    cdef Peer *peer
    cdef Frame frame
    cdef bint found
    cdef int sent
    for i in range(PEERS_MAX):
        peer = peer_at(l, i)
        if peer == NULL or load32(&peer.channels[BULK].up, ACQUIRE) == 0:
            continue
        if load32(&peer.retell, RELAXED) and ring_room(&peer.channels[BULK]) >= BULK_RING_BYTES // 2:
            store32(&peer.retell, 0, RELAXED)
            store_retell(l.store, i)
        while load32(&peer.orphan_count, RELAXED):
            pthread_mutex_lock(&l.ship_lock)
            found = peer.orphans_told < peer.orphan_count
            if found:
                segment = peer.orphans[peer.orphans_told]
                generation = peer.orphan_generations[peer.orphans_told]
                peer.orphans_told += 1
            pthread_mutex_unlock(&l.ship_lock)
            if not found:
                break
            frame_init(l, &frame, T_FREE, 0)
            frame.segment = segment
            frame.generation = generation
            frame.handle = NO_FRAME
            if tell(l, peer, &frame, NULL) != SENT:
                pthread_mutex_lock(&l.ship_lock)
                peer.orphans_told -= peer.orphans_told != 0
                pthread_mutex_unlock(&l.ship_lock)
                break
    while store_next_freed(l.store, &segment, &generation, &number, &handle, &spill):
        if spill:
            l.spilling.release(l.spilling.spill, spill - 1)
        if number == SPILL_PEER:
            store_freed_told(l.store, segment, generation, SPILL_PEER)
            continue
        peer = peer_at(l, number)
        if peer == NULL:
            continue
        frame_init(l, &frame, T_FREE, segment + 1)      # 0 is the orphans'
        frame.segment = segment
        frame.generation = generation
        frame.handle = handle
        sent = tell(l, peer, &frame, NULL)
        if sent == SENT:
            say(&l.frees_sent, 1)
        elif sent == AGAIN:
            store32(&peer.retell, 1, RELAXED)


cdef void tell_compact(Links_t *l) noexcept nogil:
    """Order lenders to drop the dead entries of segments that are mostly dead. What finds no room or no answer is ordered
    again like a FREE."""
    cdef uint8_t live[LIVE_BYTES_MAX]
    cdef uint32_t segment = 0, generation = 0, number = 0, bytes = 0
    cdef Peer *peer
    cdef Frame frame
    cdef int sent
    while True:
        bytes = store_next_compact(l.store, &segment, &generation, &number, live)
        if bytes == 0:
            return
        peer = peer_at(l, number)
        if peer == NULL:
            continue
        frame_init(l, &frame, T_COMPACT, segment)
        frame.segment = segment
        frame.generation = generation
        frame.length = bytes
        sent = tell(l, peer, &frame, live)
        if sent == SENT:
            say(&l.compacts_sent, 1)
        elif sent == AGAIN:
            store32(&peer.retell, 1, RELAXED)


cdef void *shipper_main(void *argument) noexcept nogil:
    cdef Links_t *l = <Links_t *> argument
    cdef pollfd fds[2]
    cdef uint64_t value
    cdef Order order
    fds[0].fd = l.order_fd
    fds[1].fd = l.store.freed_fd
    fds[0].events = fds[1].events = POLLIN
    while not load32(&l.stopping, ACQUIRE):
        poll(fds, 2, 500)
        eventfd_read(l.order_fd, &value)
        eventfd_read(l.store.freed_fd, &value)
        tell_freed(l)
        tell_compact(l)
        while not load32(&l.stopping, ACQUIRE) and next_order(l, &order):
            ship(l, &order)
            pthread_mutex_lock(&l.ship_lock)
            l.sealing = 0
            pthread_mutex_unlock(&l.ship_lock)
            tell_freed(l)
            tell_compact(l)
    return NULL


# --- receiving -----------------------------------------------------------------------------------------------------

cdef bint frame_allowed(Links_t *l, const Frame *f, uint32_t kind) noexcept nogil:
    """One place that refuses every bad header; what follows trusts it."""
    if f.magic != FRAME_MAGIC or f.version != WIRE_VERSION or \
            crc32_iscsi(<unsigned char *> f, FRAME_BYTES - 4, 0xffffffffu) != f.crc:
        return False
    if f.type == T_PING or f.type == T_PONG:
        return f.length == 0
    if kind == GET:
        return (f.type == T_GET and 0 < f.length <= 2 * GET_PAGES_MAX and f.length % 2 == 0) or \
            (f.type == T_PAGE and f.length <= reply_bytes(GET_PAGES_MAX))
    if f.type == T_SHIP:
        return FRAME_HEADER_BYTES <= f.length <= l.segment_bytes
    if f.type == T_COMPACT:
        return 1 <= f.length <= LIVE_BYTES_MAX
    return f.length == 0 and (f.type == T_COMPACTED or f.type == T_SHIPPED or f.type == T_FREE or f.type == T_FREED or f.type == T_GOODBYE)


cdef void peer_at_fault(Peer *peer, Channel *ch, const char *reason) noexcept nogil:
    """It is cut off for what it sent, and not let in again at once."""
    cdef uint64_t now = now_ns()
    cdef uint32_t faults = load32(&peer.faults, RELAXED)
    if now - load64(&peer.fault_ns, RELAXED) > FORGIVE_S * 1000000000ull:
        faults = 0
    store64(&peer.fault_ns, now, RELAXED)
    store32(&peer.faults, faults + 1, RELEASE)
    ch.reason = reason


cdef bint tolerated(Links_t *l, Peer *peer, Channel *ch, uint32_t weight) noexcept nogil:
    """What a loss can cause between honest nodes is bounded by what they may share: the rows of the one, the segments of the other."""
    if weight == USEFUL:
        return True
    if conduct_charge(&ch.conduct, weight, ch.received_ns // 1000000,
                      BUCKET + 2 * (<uint64_t> l.lent_rows + load32(&l.store.segments_used, RELAXED))):
        return True
    ch.conduct.filled = 0
    say(&l.floods, 1)
    peer_at_fault(peer, ch, b"the peer sent far more that means nothing than an honest one could")
    return False


cdef void on_message(int sent, int version, int type, const void *bytes, size_t length, SSL *ssl, void *argument) noexcept nogil:
    """By OpenSSL, under the connection's lock. TLS 1.3 has messages after the handshake, which SSL_read swallows as long as there
    are any; each costs a key derivation, and an honest peer sends one in 2^23 records."""
    cdef Channel *ch = <Channel *> argument
    if not sent and type == SSL3_RT_HANDSHAKE and not conduct_charge(&ch.handshakes, NONSENSE, now_ns() // 1000000, BUCKET):
        ch.rekeyed = True
        SSL_set_shutdown(ssl, SSL_RECEIVED_SHUTDOWN)    # SSL_read ends here, and not with the last of what has come
        shutdown(ch.fd, SHUT_RDWR)


cdef void on_early_message(int sent, int version, int type, const void *bytes, size_t length, SSL *ssl, void *argument) noexcept nogil:
    """The same before the connection is attached: SSL_read would not come back as long as they come, nor see its deadline."""
    cdef uint32_t *messages = <uint32_t *> argument
    if not sent and type == SSL3_RT_HANDSHAKE:
        messages[0] += 1
        if messages[0] > EARLY_MESSAGES_MAX:
            SSL_set_shutdown(ssl, SSL_RECEIVED_SHUTDOWN)


cdef uint32_t dispatch(Links_t *l, Peer *peer, Channel *ch, const Frame *f, const uint8_t *body) noexcept nogil:
    """Carry out one small frame. Returns its weight: see _conduct.pxd."""
    cdef Frame reply
    cdef uint32_t left = 0, dropped = 0
    cdef bint expected = True
    if f.type == T_PAGE:
        return USEFUL if pending_answered(l, peer, f, body) else IDLE
    elif f.type == T_GET:
        return asked(l, peer, ch, f, <const uint16_t *> body)
    elif f.type == T_SHIPPED:
        store32(&peer.credit, f.credit, RELAXED)
        expected = ship_answered(l, peer, f)
    elif f.type == T_FREE:
        expected = lent_forget(l, peer, f)
        frame_init(l, &reply, T_FREED, f.request)
        reply.segment = f.segment
        reply.generation = f.generation
        queue_frame(l, ch, &reply, NULL)
        return USEFUL if expected else IDLE
    elif f.type == T_FREED:
        store32(&peer.credit, f.credit, RELAXED)
        expected = was_told(peer)
        if f.request == 0:
            orphan_freed(l, peer, f)
        elif f.request == <uint64_t> f.segment + 1 and f.segment < load32(&l.store.segments_used, ACQUIRE):
            store_freed_told(l.store, f.segment, f.generation, peer.number)
    elif f.type == T_COMPACT:
        frame_init(l, &reply, T_COMPACTED, f.request)
        reply.segment = f.segment
        reply.generation = f.generation
        reply.status = lent_compact(l, peer, f, body, &left, &dropped)
        reply.left = left
        queue_frame(l, ch, &reply, NULL)
        ch.work += left + 2 * 8 * f.length * WORK_ENTRY
        return IDLE if reply.status == S_ABSENT else NONSENSE if reply.status == S_BAD else USEFUL if dropped else COSTLY
    elif f.type == T_COMPACTED:
        store32(&peer.credit, f.credit, RELAXED)
        expected = was_told(peer)
        store_compacted(l.store, f.segment, f.generation, peer.number, f.left if f.status == S_OK else 0)
    elif f.type == T_PING:
        frame_init(l, &reply, T_PONG, f.request)
        queue_frame(l, ch, &reply, NULL)
        return COSTLY
    elif f.type == T_PONG:
        store32(&peer.credit, f.credit, RELAXED)
        expected = ch.pings != 0
        ch.pings -= expected
    elif f.type == T_GOODBYE:
        expected = not load32(&peer.gone, RELAXED)
        if expected:
            store32(&peer.gone, 1, RELEASE)
            peer_lends_no_more(l, peer)
            eventfd_write(l.event_fd, 1)
        ch.work += <uint64_t> lent_drop(l, peer.number, 0) * WORK_ROW
    return USEFUL if expected else NONSENSE


cdef void peer_lends_no_more(Links_t *l, Peer *peer) noexcept nogil:
    """Nothing is under way to it: what it holds of ours is lost. One that never took anything costs no look at the segments."""
    if peer.lends:
        peer.lends = False
        store_peer_lost(l.store, peer.number)


cdef uint8_t *body_place(Links_t *l, Channel *ch, uint32_t *room) noexcept nogil:
    """Where the next bytes of a body go, and how many may go there in one piece; NULL when they are thrown away."""
    cdef Lent *row
    cdef uint32_t i = ch.body_got // BLOCK_BYTES
    if ch.body_frame == NO_FRAME:
        room[0] = ch.frame.length - ch.body_got
        return ch.body + ch.body_got if ch.body != NULL else NULL
    row = &l.rows[ch.body_frame]
    room[0] = BLOCK_BYTES - ch.body_got % BLOCK_BYTES
    while room[0] < RECORD_BYTES and i + 1 < row.block_count and row.blocks[i + 1] == row.blocks[i] + 1:
        room[0] += BLOCK_BYTES
        i += 1
    room[0] = min(room[0], ch.frame.length - ch.body_got)
    return lent_at(l, row, ch.body_got)


cdef uint32_t body_done(Links_t *l, Peer *peer, Channel *ch) noexcept nogil:
    """A reply has arrived whole in its staging memory, or a segment in granted blocks, or either in nothing. Returns its weight."""
    cdef Frame reply
    ch.in_body = False
    if ch.frame.type == T_PAGE:
        return USEFUL if pending_answered(l, peer, &ch.frame, ch.body) else IDLE
    frame_init(l, &reply, T_SHIPPED, ch.frame.request)
    reply.segment = ch.frame.segment
    reply.generation = ch.frame.generation
    reply.handle = ch.body_frame
    if ch.body_frame == NO_FRAME:
        reply.status = <uint16_t> ch.body_refusal
    else:
        reply.status = lent_commit(l, peer, ch.body_frame, &ch.frame)
    queue_frame(l, ch, &reply, NULL)
    return USEFUL if reply.status == S_OK else NONSENSE if reply.status == S_BAD else COSTLY


cdef int parse(Links_t *l, Peer *peer, Channel *ch) noexcept nogil:
    """Handle the whole frames in the receive buffer, until the turn is over; -1 when the peer is to be cut off."""
    cdef Frame *f
    cdef uint8_t *place
    cdef uint32_t n, room = 0
    while ch.work < ch.turn:
        if ch.in_body:
            n = min(ch.end - ch.start, ch.frame.length - ch.body_got)
            place = body_place(l, ch, &room)
            n = min(n, room)
            if place != NULL:
                memcpy(place, ch.received + ch.start, n)
            ch.start += n
            ch.body_got += n
            if ch.body_got == ch.frame.length:
                if not tolerated(l, peer, ch, body_done(l, peer, ch)):
                    return -1
            elif ch.start == ch.end:
                break
            continue
        if ch.end - ch.start < FRAME_BYTES:
            break
        f = <Frame *> (ch.received + ch.start)
        if not frame_allowed(l, f, ch.kind):
            say(&l.protocol_errors, 1)
            peer_at_fault(peer, ch, b"the peer broke the protocol")
            return -1
        ch.work += WORK_FRAME
        if f.type == T_SHIP:
            ch.frame = f[0]
            ch.start += FRAME_BYTES
            ch.body_frame = lent_take(l, peer.number, f.length, &ch.body_refusal)
            ch.body = NULL
            ch.body_got = 0
            ch.in_body = True
            continue
        if f.type == T_PAGE and f.length > BUFFERED_BODY_MAX:
            ch.frame = f[0]
            ch.start += FRAME_BYTES
            ch.body_frame = NO_FRAME
            ch.body = pending_staging(l, peer, f)
            ch.body_got = 0
            ch.in_body = True
            continue
        if ch.end - ch.start < FRAME_BYTES + f.length:
            break
        if not tolerated(l, peer, ch, dispatch(l, peer, ch, f, <uint8_t *> f + FRAME_BYTES)):
            return -1
        ch.start += FRAME_BYTES + f.length
    if ch.start == ch.end:
        ch.start = ch.end = 0
    elif ch.start > RECEIVE_BYTES // 2:
        memmove(ch.received, ch.received + ch.start, ch.end - ch.start)
        ch.end -= ch.start
        ch.start = 0
    return 0


cdef int receive(Links_t *l, Peer *peer, Channel *ch) noexcept nogil:
    """Read and handle what the turn allows. 0: nothing more now, 1: more waits, -1: the connection is done for."""
    cdef int n, error
    cdef uint8_t *target
    cdef uint32_t room = 0
    cdef bint direct
    while True:
        if ch.start != ch.end and parse(l, peer, ch) != 0:
            return -1
        if ch.work >= ch.turn:
            return 1
        target = body_place(l, ch, &room) if ch.in_body and ch.start == ch.end else NULL
        direct = target != NULL
        if not direct:
            target = ch.received + ch.end
            room = RECEIVE_BYTES - ch.end
        lock_to_read(ch)
        if ch.ssl == NULL:
            pthread_mutex_unlock(&ch.lock)
            return 0
        ERR_clear_error()
        n = SSL_read(ch.ssl, target, <int> min(room, <uint32_t> RECORD_BYTES))
        error = SSL_get_error(ch.ssl, n) if n <= 0 else 0
        pthread_mutex_unlock(&ch.lock)
        if n <= 0:
            if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE:
                return 0
            ch.reason = b"the peer closed the connection" if error == SSL_ERROR_ZERO_RETURN else b"the connection broke"
            if ch.rekeyed:
                say(&l.floods, 1)
                peer_at_fault(peer, ch, b"the peer changed its keys again and again")
            return -1
        ch.work += WORK_READ + <uint64_t> n
        store64(&ch.received_ns, ran(l), RELAXED)
        store64(&ch.unanswered_ns, 0, RELAXED)
        ch.silent = False
        if load32(&peer.listened, ACQUIRE):
            store32(&peer.listened, 0, RELAXED)
            eventfd_write(l.event_fd, 1)
        say(&ch.bytes_received, <uint64_t> n)
        if direct:
            ch.body_got += <uint32_t> n
            if ch.body_got == ch.frame.length and not tolerated(l, peer, ch, body_done(l, peer, ch)):
                return -1
        else:
            ch.end += <uint32_t> n


cdef void channel_down(Links_t *l, Peer *peer, Channel *ch) noexcept nogil:
    """By the reactor only: close, and settle everything that depended on this connection."""
    pthread_mutex_lock(&ch.lock)
    if ch.ssl == NULL:
        pthread_mutex_unlock(&ch.lock)
        return
    epoll_ctl(l.epolls[ch.kind], EPOLL_CTL_DEL, ch.fd, NULL)
    SSL_free(ch.ssl)
    close(ch.fd)
    ch.ssl = NULL
    store32(&ch.up, 0, RELEASE)
    add32(&ch.life, 1, RELEASE)
    ch.fd = -1
    ch.closing = True               # attach() waits until everything below is settled
    ch.out_used = ch.out_head = 0
    ch.wire_start = ch.wire_end = 0
    if ch.image_count & 1:
        ch.image_first ^= 1         # the shipper goes on with the image after the last
    store32(&ch.image_count, 0, RELEASE)
    ch.image_done = 0
    ch.armed = False
    ch.start = ch.end = 0
    store64(&ch.unanswered_ns, 0, RELAXED)
    ch.silent = False
    if ch.kind == GET:
        store64(&peer.down_ns, ran(l), RELEASE)
    pthread_mutex_unlock(&ch.lock)
    if ch.in_body and ch.body_frame != NO_FRAME:
        pthread_mutex_lock(&l.lender_lock)
        lent_release(l, ch.body_frame)
        pthread_mutex_unlock(&l.lender_lock)
    ch.in_body = False
    ch.asked_count = 0
    ch.pings = 0
    ch.rekeyed = False
    if ch.kind == BULK:
        store32(&peer.told, 0, RELAXED)
    if ch.kind == GET:
        pending_unsent(l, peer.number)
    else:
        ships_fail(l, peer)
    pthread_mutex_lock(&ch.lock)
    ch.closing = False
    pthread_cond_broadcast(&ch.drained)
    pthread_mutex_unlock(&ch.lock)
    eventfd_write(l.event_fd, 1)


cdef bint channel_close(Channel *ch, uint64_t deadline_ns) noexcept nogil:
    """Break a connection and wait until the reactor has settled everything that depended on it."""
    cdef bint closed
    pthread_mutex_lock(&ch.lock)
    if ch.ssl != NULL and ch.fd >= 0:
        shutdown(ch.fd, SHUT_RDWR)
    while (ch.ssl != NULL or ch.closing) and now_ns() < deadline_ns:
        cond_wait_until(&ch.drained, &ch.lock, deadline_ns)
    closed = ch.ssl == NULL and not ch.closing
    pthread_mutex_unlock(&ch.lock)
    return closed


cdef bint turn(Links_t *l, Peer *peer, Channel *ch) noexcept nogil:
    """True: something is left for another turn. What waits to be sent goes first, then what waits to be answered, so that nothing
    new is read while the connection takes what it asked for. One that takes nothing is read from all the same: two that waited for each other to
    read would wait for ever."""
    cdef int result
    if flush_left(l, ch) or answer_asked(l, peer, ch):
        return True
    result = receive(l, peer, ch)
    if result < 0:
        channel_down(l, peer, ch)
        return False
    flush(l, ch)
    return answer_asked(l, peer, ch) or result > 0


cdef void serve(Links_t *l, Peer *peer, int kind, uint64_t work) noexcept nogil:
    cdef Channel *ch = &peer.channels[kind]
    cdef bint more
    if not is_up(ch):
        return
    ch.work = 0
    ch.turn = work
    more = turn(l, peer, ch)
    store64(&l.turn_work_max[kind], max(l.turn_work_max[kind], ch.work), RELAXED)
    turn_over(&l.turns[kind], peer.number, ch.work, more)


cdef void came(Links_t *l, Peer *peer, int kind) noexcept nogil:
    """Something came on a connection, or it can be written to."""
    cdef int64_t work = turn_of(&l.turns[kind], peer.number)
    if work:
        serve(l, peer, kind, <uint64_t> work)


cdef void channel_tick(Links_t *l, Peer *peer, Channel *ch, uint64_t now) noexcept nogil:
    """Keepalive and idle time-out."""
    cdef Frame frame
    cdef bint overdue = False
    cdef int i
    if not is_up(ch) or now < ch.received_ns:
        return
    if ch.kind == BULK and load32(&peer.shipping, RELAXED):
        pthread_mutex_lock(&l.ship_lock)
        for i in range(SHIPS_MAX):
            if l.ships[i].id != 0 and l.ships[i].peer == peer.number and now > l.ships[i].sent_ns + SHIP_ANSWER_S * 1000000000ull:
                overdue = True
        pthread_mutex_unlock(&l.ship_lock)
    if overdue:
        ch.reason = b"segments were sent and not answered"
        channel_down(l, peer, ch)
        return
    if now - ch.received_ns > l.idle_ns:
        ch.reason = b"no answer within the idle time-out"
        channel_down(l, peer, ch)
    elif now - ch.received_ns > l.keepalive_ns and now - ch.pinged_ns > l.keepalive_ns:
        ch.pinged_ns = now
        frame_init(l, &frame, T_PING, 0)
        if send_frame(l, ch, &frame, NULL) == SENT:
            ch.pings += 1
            asked_something(l, ch)
    if ch.kind == GET and not ch.silent and owes_for(l, ch, l.give_up_ns // SILENT_SHARE):
        ch.silent = True
        eventfd_write(l.event_fd, 1)    # whoever connects may find out that another connection gets through


cdef void react(Links_t *l, int kind) noexcept nogil:
    cdef epoll_event events[256]    # of all peers: who is idle is seen behind however many who wait for their turns
    cdef int n, i
    cdef int64_t work
    cdef uint32_t p = 0
    cdef uint64_t value, now, ticked = 0, looked = now_ns()
    cdef bint late = False
    cdef Peer *peer
    while not load32(&l.stopping, ACQUIRE):
        n = epoll_wait(l.epolls[kind], events, 256, 0 if l.turns[kind].count else TICK_MS)
        for i in range(n):
            if events[i].data.u32 < PEERS_MAX:
                peer = peer_at(l, events[i].data.u32)
                if events[i].events & EPOLLOUT:
                    lock_to_write(&peer.channels[kind])
                    if peer.channels[kind].ssl != NULL:
                        arm(l, &peer.channels[kind], False)
                    pthread_mutex_unlock(&peer.channels[kind].lock)
                came(l, peer, kind)
                continue
            eventfd_read(l.wakes[kind], &value)
            for p in range(PEERS_MAX):
                peer = peer_at(l, p)
                if peer != NULL and swap32(&peer.channels[kind].kick, 0, ACQ_REL):
                    came(l, peer, kind)
        work = turn_next(&l.turns[kind], &p)
        if work:
            serve(l, peer_at(l, p), kind, <uint64_t> work)
        now = ran(l)
        late = now_ns() > looked + GAP_NS and not late
        looked = now_ns()
        if late:
            if kind == GET:
                eventfd_write(l.event_fd, 1)
            continue                    # this thread has not run for a while: what came meanwhile is read before anything is given up
        if now - ticked > TICK_MS * 1000000ull:
            ticked = now
            for p in range(PEERS_MAX):
                peer = peer_at(l, p)
                if peer != NULL:
                    channel_tick(l, peer, &peer.channels[kind], now)
            if kind == GET:
                pending_tick(l)
    for p in range(PEERS_MAX):
        peer = peer_at(l, p)
        if peer != NULL:
            peer.channels[kind].reason = b"this node stops"
            channel_down(l, peer, &peer.channels[kind])
    if kind == GET:
        pending_tick(l)


cdef void *get_reactor(void *argument) noexcept nogil:
    react(<Links_t *> argument, GET)
    return NULL


cdef void *bulk_reactor(void *argument) noexcept nogil:
    react(<Links_t *> argument, BULK)
    return NULL


# --- Python: TLS before a connection is attached -------------------------------------------------------------------

cdef str tls_reason(SSL *ssl):
    """What OpenSSL has to say about the last failure."""
    cdef unsigned long code = ERR_peek_error()
    cdef const char *text
    cdef long verify = SSL_get_verify_result(ssl) if ssl != NULL else X509_V_OK
    if verify != X509_V_OK:
        return f"the other side's certificate is not of this cluster ({X509_verify_cert_error_string(verify).decode()})"
    text = ERR_reason_error_string(code) if code else NULL
    if text == NULL:
        return "the other side closed the connection"
    reason = text.decode()
    if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
        return f"the other side does not accept this node's certificate ({reason})"
    return reason


cdef bytes peer_certificate(SSL *ssl):
    """What the other side has shown in the handshake, as DER."""
    cdef X509 *certificate = SSL_get1_peer_certificate(ssl)
    cdef unsigned char *out
    if certificate == NULL:
        raise errors.CertificateError("the peer showed no certificate")
    der = PyBytes_FromStringAndSize(NULL, i2d_X509(certificate, NULL))
    out = <unsigned char *> PyBytes_AS_STRING(der)
    i2d_X509(certificate, &out)
    X509_free(certificate)
    return der


cdef class TlsContext:
    """The node's certificate, its key and the cluster's CA: TLS 1.3 only, both sides must show a certificate."""

    def __cinit__(self, str ca, str certificate, str key):
        cdef SSL_CTX *c = SSL_CTX_new(TLS_method())
        self.context = c
        if c == NULL:
            raise MemoryError
        SSL_CTX_set_min_proto_version(c, TLS1_3_VERSION)
        SSL_CTX_set_num_tickets(c, 0)
        SSL_CTX_set_session_cache_mode(c, SSL_SESS_CACHE_OFF)
        SSL_CTX_set_ciphersuites(c, b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384:TLS_CHACHA20_POLY1305_SHA256")
        SSL_CTX_set_mode(c, SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER)
        SSL_CTX_set_read_ahead(c, 1)
        SSL_CTX_set_verify(c, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL)
        ERR_clear_error()
        if SSL_CTX_load_verify_locations(c, os.fsencode(ca), NULL) != 1:
            raise errors.CertificateError(f"cannot read the cluster's CA certificate {ca}: {tls_reason(NULL)}")
        if SSL_CTX_use_certificate_chain_file(c, os.fsencode(certificate)) != 1:
            raise errors.CertificateError(f"cannot read the node's certificate {certificate}: {tls_reason(NULL)}")
        if SSL_CTX_use_PrivateKey_file(c, os.fsencode(key), SSL_FILETYPE_PEM) != 1 or SSL_CTX_check_private_key(c) != 1:
            raise errors.CertificateError(f"cannot use the node's private key {key}: {tls_reason(NULL)}")

    def __dealloc__(self):
        if self.context != NULL:
            SSL_CTX_free(self.context)


cdef class Connection:
    """A connected socket on its way to becoming a channel: TLS handshake, then a few frames, all with deadlines.

    Takes ownership of the descriptor. Methods block without the GIL. CertificateError says why a handshake failed;
    ProtocolError that the peer sent what it must not, or nothing in time.
    """
    cdef SSL *ssl
    cdef readonly int fd
    cdef object context
    cdef uint32_t messages

    def __cinit__(self, TlsContext context, int fd, bint server):
        self.fd = fd
        self.context = context
        os.set_blocking(fd, False)
        self.ssl = SSL_new(context.context)
        if self.ssl == NULL or SSL_set_fd(self.ssl, fd) != 1:
            raise MemoryError
        if server:
            SSL_set_accept_state(self.ssl)
        else:
            SSL_set_connect_state(self.ssl)

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        if self.ssl != NULL:
            SSL_free(self.ssl)
            self.ssl = NULL
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    cdef int wait(self, int error, uint64_t deadline_ns) except -1:
        """After WANT_READ or WANT_WRITE: wait for the socket; ProtocolError once the deadline has passed."""
        cdef pollfd p
        cdef int64_t left
        cdef int n
        if self.messages > EARLY_MESSAGES_MAX:
            raise errors.ProtocolError("it changes its keys again and again and says no more")
        if error != SSL_ERROR_WANT_READ and error != SSL_ERROR_WANT_WRITE:
            raise errors.CertificateError(f"TLS failed: {tls_reason(self.ssl)}")
        p.fd = self.fd
        p.events = POLLIN if error == SSL_ERROR_WANT_READ else POLLOUT
        left = <int64_t> deadline_ns - <int64_t> now_ns()
        if left > 0:
            with nogil:
                n = poll(&p, 1, <int> (left // 1000000) + 1)
            if n > 0:
                return 0
        raise errors.ProtocolError("the other side did not answer in time")

    def handshake(self, double timeout_s):
        """TLS 1.3 with certificates checked on both sides; returns the peer's certificate (DER)."""
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef int result
        while True:
            ERR_clear_error()
            with nogil:
                result = SSL_do_handshake(self.ssl)
            if result == 1:
                SSL_set_msg_callback_arg(self.ssl, &self.messages)
                SSL_set_msg_callback(self.ssl, on_early_message)
                return peer_certificate(self.ssl)
            self.wait(SSL_get_error(self.ssl, result), deadline)

    def send(self, bytes data, double timeout_s):
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef const char *p = PyBytes_AS_STRING(data)
        cdef int left = <int> PyBytes_GET_SIZE(data), n
        while left:
            ERR_clear_error()
            with nogil:
                n = SSL_write(self.ssl, p, left)
            if n > 0:
                p += n
                left -= n
            else:
                self.wait(SSL_get_error(self.ssl, n), deadline)

    def update_keys(self, double timeout_s, bint both=False):
        """Say that the next bytes come under another key; both: and that the other side's shall, too. How tests play whoever does
        nothing else."""
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef int result
        SSL_key_update(self.ssl, SSL_KEY_UPDATE_REQUESTED if both else SSL_KEY_UPDATE_NOT_REQUESTED)
        while True:
            ERR_clear_error()
            with nogil:
                result = SSL_do_handshake(self.ssl)
            if result == 1:
                return
            self.wait(SSL_get_error(self.ssl, result), deadline)

    def receive(self, int size, double timeout_s):
        """Exactly 'size' bytes."""
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef int got = 0, n
        if not 0 < size <= SMALL_BODY_MAX:
            raise errors.ProtocolError(f"{size} bytes announced during the handshake: at most {SMALL_BODY_MAX}")
        data = PyBytes_FromStringAndSize(NULL, size)
        cdef char *p = PyBytes_AS_STRING(data)
        while got < size:
            ERR_clear_error()
            with nogil:
                n = SSL_read(self.ssl, p + got, size - got)
            if n > 0:
                got += n
            else:
                self.wait(SSL_get_error(self.ssl, n), deadline)
        return data


REFUSALS = {S_FULL: "it is full", S_SHARE: "this node has its share of it", S_BAD: "it calls them malformed"}


ENDS = (b"", b"the peer closed the connection", b"the connection broke")     # what a goodbye explains


# --- Python: the links of a node -----------------------------------------------------------------------------------

cdef class Links:
    """Every link of a node and the memory that it lends. ramster.engine.links documents it."""

    def __cinit__(self, Store store not None, uint32_t number, uint64_t lend_bytes, bint lock, uint64_t request_deadline_ms,
                  uint64_t give_up_ms, uint64_t idle_ms, uint64_t keepalive_ms, uint32_t bulk_in_flight,
                  double borrower_share, double compact_below, uint32_t recompress):
        cdef Links_t *l = <Links_t *> calloc(1, sizeof(Links_t))
        cdef uint32_t i
        cdef int k
        cdef epoll_event event
        if l == NULL:
            raise MemoryError
        self.l = l
        self.store = store
        l.store = store.live()
        l.number = number
        l.segment_bytes = l.store.segment_bytes
        l.request_deadline_ns = request_deadline_ms * 1000000
        l.give_up_ns = give_up_ms * 1000000
        l.idle_ns = idle_ms * 1000000
        l.keepalive_ns = keepalive_ms * 1000000
        l.bulk_in_flight = min(max(bulk_in_flight, 1), SHIPS_MAX)
        l.lent_fd = -1
        ran(l)
        l.skipped_first_ns = load64(&l.store.running.skipped_ns, RELAXED)
        pthread_mutex_init(&l.peers_lock, NULL)
        pthread_mutex_init(&l.pending_lock, NULL)
        pthread_mutex_init(&l.jobs_lock, NULL)
        cond_init_monotonic(&l.jobs_there)
        pthread_mutex_init(&l.ship_lock, NULL)
        pthread_mutex_init(&l.lender_lock, NULL)
        pthread_mutex_init(&l.send_lock, NULL)
        cond_init_monotonic(&l.send_wanted)
        for i in range(PENDING_MAX):
            l.pending_free[i] = PENDING_MAX - 1 - i
        l.pending_free_count = PENDING_MAX
        l.open_ctx = store_unseal_context()
        l.seal_ctx = EVP_CIPHER_CTX_new()
        l.zstd = ZSTD_createCCtx()
        l.recompress = recompress
        self.grant(lend_bytes, lock, borrower_share)
        store32(&l.store.compact_below, <uint32_t> (compact_below * 1024), RELAXED)
        l.order_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        l.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if l.open_ctx == NULL or l.seal_ctx == NULL or l.zstd == NULL or wire_method == NULL or l.order_fd < 0 or l.event_fd < 0:
            raise MemoryError
        for k in range(2):
            l.epolls[k] = epoll_create1(EPOLL_CLOEXEC)
            l.wakes[k] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
            event.events = EPOLLIN
            event.data.u64 = 0
            event.data.u32 = 0xffffffffu
            if l.epolls[k] < 0 or l.wakes[k] < 0 or epoll_ctl(l.epolls[k], EPOLL_CTL_ADD, l.wakes[k], &event) != 0:
                raise OSError(errno, strerror(errno).decode())
        # Counted one by one: where the next cannot be had, stop() ends those that run before their memory goes.
        need_thread(&l.reactors[GET], get_reactor, l, b"ramster-get")
        l.reactors_started = 1
        need_thread(&l.reactors[BULK], bulk_reactor, l, b"ramster-bulk")
        l.reactors_started = 2
        need_thread(&l.sender, sender_main, l, b"ramster-send")
        l.sender_started = True
        need_thread(&l.shipper, shipper_main, l, b"ramster-ship")
        l.shipper_started = True
        for i in range(min(<uint32_t> WORKERS_MAX, max(1, len(os.sched_getaffinity(0)) // 2))):
            need_thread(&l.workers[i], worker_main, l, b"ramster-work")
            l.workers_started += 1

    cdef grant(self, uint64_t lend_bytes, bint lock, double borrower_share):
        """Reserve and touch what may be lent: a full arena refuses, it never grows."""
        cdef Links_t *l = self.l
        cdef uint32_t i
        cdef void *base
        if lend_bytes > memory_available():
            # A memfd grows until the kernel kills somebody: fallocate alone would not refuse.
            raise errors.StoreFull(
                f"cannot lend {lend_bytes >> 20} MiB: this machine has {memory_available() >> 20} MiB to spare")
        lend_bytes -= lend_bytes % l.segment_bytes
        l.lent_blocks = <uint32_t> (lend_bytes // BLOCK_BYTES)
        if l.lent_blocks == 0:
            return
        # A row for each quarter of a segment: enough until segments are compacted to less than that on average.
        l.lent_rows = <uint32_t> (4 * lend_bytes // l.segment_bytes)
        l.lent_mask = 1
        while l.lent_mask < l.lent_rows:
            l.lent_mask = 2 * l.lent_mask + 1
        l.rows = <Lent *> calloc(l.lent_rows, sizeof(Lent))
        l.lent_free = <uint32_t *> malloc(4 * <size_t> l.lent_blocks)
        l.lent_buckets = <uint32_t *> malloc(4 * (<size_t> l.lent_mask + 1))
        l.lent_fd = memfd_create(b"ramster-lent", MFD_CLOEXEC)
        if l.rows == NULL or l.lent_free == NULL or l.lent_buckets == NULL or l.lent_fd < 0 or fallocate(l.lent_fd, 0, 0, <long> lend_bytes) != 0:
            raise errors.StoreFull(f"cannot reserve {lend_bytes >> 20} MiB to lend ({strerror(errno).decode()}): lend less")
        base = mmap(NULL, lend_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, l.lent_fd, 0)
        if base == MAP_FAILED:
            raise errors.StoreFull(f"cannot map {lend_bytes >> 20} MiB to lend: {strerror(errno).decode()}")
        l.lent = <uint8_t *> base
        madvise(base, lend_bytes, MADV_DONTDUMP)
        with nogil:
            memset(l.lent, 0, lend_bytes)
            l.lent_locked = lock and mlock(l.lent, lend_bytes) == 0
        for i in range(l.lent_blocks):
            l.lent_free[i] = l.lent_blocks - 1 - i
        l.lent_free_count = l.lent_blocks
        memset(l.owner_first, 0xff, sizeof(l.owner_first))
        secrets = os.urandom(sizeof(l.lent_secrets))
        memcpy(l.lent_secrets, PyBytes_AS_STRING(secrets), sizeof(l.lent_secrets))
        l.owner_blocks_max = max(<uint32_t> (borrower_share * l.lent_blocks), l.segment_bytes // BLOCK_BYTES)
        l.owner_rows_max = max(<uint32_t> (borrower_share * l.lent_rows), 1)
        memset(l.lent_buckets, 0xff, 4 * (<size_t> l.lent_mask + 1))
        for i in range(l.lent_rows):
            l.rows[i].next = i + 1
        l.rows_free_count = l.lent_rows

    def __dealloc__(self):
        cdef Links_t *l = self.l
        cdef int k
        cdef uint32_t i
        if l == NULL:
            return
        self.stop()
        for i in range(PEERS_MAX):
            if l.peers[i] != NULL:
                for k in range(2):
                    free(l.peers[i].channels[k].out)
                    free(l.peers[i].channels[k].wire)
                    free(l.peers[i].channels[k].images[0])
                    free(l.peers[i].channels[k].images[1])
                    free(l.peers[i].channels[k].received)
                    free(l.peers[i].channels[k].asked)
                free(l.peers[i].orphans)
                free(l.peers[i].orphan_generations)
                free(l.peers[i])
        for k in range(2):
            for fd in (l.epolls[k], l.wakes[k]):
                if fd > 0:
                    close(fd)
        for fd in (l.order_fd, l.event_fd, l.lent_fd):
            if fd > 0:
                close(fd)
        if l.lent != NULL:
            munmap(l.lent, <uint64_t> l.lent_blocks * BLOCK_BYTES)
        EVP_CIPHER_CTX_free(l.open_ctx)
        EVP_CIPHER_CTX_free(l.seal_ctx)
        ZSTD_freeCCtx(l.zstd)
        free(l.rows)
        free(l.lent_free)
        free(l.lent_buckets)
        free(l)
        self.l = NULL

    cdef Links_t *live(self) except NULL:
        if self.stopped:
            raise errors.UsageError("the links are stopped")
        return self.l

    def stop(self):
        """Close every connection, fail every get under way, join the threads. Twice is fine."""
        cdef Links_t *l = self.l
        cdef uint32_t i
        if self.stopped:
            return
        self.stopped = True
        store32(&l.stopping, 1, RELEASE)
        if l.reactors_started == 0:
            return
        with nogil:
            eventfd_write(l.order_fd, 1)
            eventfd_write(l.wakes[GET], 1)
            eventfd_write(l.wakes[BULK], 1)
            wake_sender(l)
            if l.shipper_started:
                pthread_join(l.shipper, NULL)
            if l.sender_started:
                pthread_join(l.sender, NULL)
            for i in range(l.reactors_started):
                pthread_join(l.reactors[i], NULL)
            if load32(&l.spilling.ready, ACQUIRE):
                l.spilling.stop(l.spilling.spill)
            pthread_mutex_lock(&l.jobs_lock)
            l.reactors_done = True
            pthread_cond_broadcast(&l.jobs_there)
            pthread_mutex_unlock(&l.jobs_lock)
            for i in range(l.workers_started):
                pthread_join(l.workers[i], NULL)

    @property
    def event_fd(self):
        return self.live().event_fd

    @property
    def number(self):
        """This node's."""
        return self.live().number

    def attach(self, Connection connection not None, uint32_t number, uint32_t kind, uint64_t generation, uint32_t credit):
        """Make a connection that has said hello this peer's get or bulk channel. An older one is closed first. A new
        generation means that the peer's process was restarted: what it held is lost, what we hold for it is dropped."""
        cdef Links_t *l = self.live()
        cdef Peer *peer
        cdef Channel *ch
        cdef uint64_t deadline = now_ns() + 2000000000ull
        cdef epoll_event event
        cdef bint old
        cdef BIO *wire
        if number >= PEERS_MAX or kind > BULK or connection.ssl == NULL:
            raise errors.UsageError(f"cannot attach a connection of kind {kind} to node {number}")
        peer = self.peer(number)
        ch = &peer.channels[kind]
        wire = BIO_new(wire_method)
        if wire == NULL:
            raise MemoryError
        BIO_set_data(wire, ch)
        BIO_set_init(wire, 1)
        SSL_set0_wbio(connection.ssl, wire)     # what is not attached in the end is closed by its owner: nothing more is sent
        with nogil:
            pthread_mutex_lock(&peer.attach_lock)
            old = not channel_close(ch, deadline)
            # What the other connection still holds of its former life must not be taken for this one's.
            if not old and peer.seen and peer.generation != generation:
                old = not channel_close(&peer.channels[1 - kind], deadline)
            if old:
                pthread_mutex_unlock(&peer.attach_lock)
        if old:
            raise errors.ProtocolError(f"the older connection to node {number} would not close")
        with nogil:
            pthread_mutex_lock(&l.peers_lock)
            if peer.generation != generation or peer.gone:
                peer_lends_no_more(l, peer)
                lent_drop(l, number, generation)
                pthread_mutex_lock(&l.ship_lock)
                store32(&peer.orphan_count, 0, RELAXED)
                peer.orphans_told = 0
                pthread_mutex_unlock(&l.ship_lock)
                store64(&peer.generation, generation, RELAXED)
                store32(&peer.gone, 0, RELEASE)
            peer.seen = True
            store32(&peer.credit, credit, RELAXED)
            pthread_mutex_unlock(&l.peers_lock)
            pthread_mutex_lock(&ch.lock)
            SSL_set_msg_callback_arg(connection.ssl, ch)
            SSL_set_msg_callback(connection.ssl, on_message)
            ch.ssl = connection.ssl
            ch.fd = connection.fd
            ch.received_ns = ch.pinged_ns = ran(l)
            ch.records = 0
            ch.reason = NULL
            store32(&ch.kick, 1, RELAXED)
            store32(&ch.up, 1, RELEASE)
            event.events = EPOLLIN
            event.data.u64 = 0
            event.data.u32 = number
            epoll_ctl(l.epolls[kind], EPOLL_CTL_ADD, ch.fd, &event)
            if kind == GET:
                store64(&peer.down_ns, 0, RELEASE)
            pthread_mutex_unlock(&ch.lock)
            eventfd_write(l.wakes[kind], 1)
            if kind == BULK:
                pthread_mutex_lock(&l.ship_lock)
                peer.orphans_told = 0
                pthread_mutex_unlock(&l.ship_lock)
                store_retell(l.store, number)
                eventfd_write(l.order_fd, 1)
            pthread_mutex_unlock(&peer.attach_lock)
            eventfd_write(l.event_fd, 1)
        connection.ssl = NULL
        connection.fd = -1

    cdef Peer *peer(self, uint32_t number) except NULL:
        cdef Links_t *l = self.l
        cdef Peer *peer
        cdef int k
        pthread_mutex_lock(&l.peers_lock)
        peer = l.peers[number]
        pthread_mutex_unlock(&l.peers_lock)
        if peer != NULL:
            return peer
        peer = <Peer *> calloc(1, sizeof(Peer))
        if peer == NULL:
            raise MemoryError
        peer.number = number
        peer.orphan_room = l.store.segments_max + 2 * ORPHANS_MAX
        peer.orphans = <uint32_t *> calloc(peer.orphan_room, 4)     # room in the address space: there are few, as a rule none
        peer.orphan_generations = <uint32_t *> calloc(peer.orphan_room, 4)
        if peer.orphans == NULL or peer.orphan_generations == NULL:
            raise MemoryError
        pthread_mutex_init(&peer.attach_lock, NULL)
        for k in range(2):
            pthread_mutex_init(&peer.channels[k].lock, NULL)
            cond_init_monotonic(&peer.channels[k].drained)
            peer.channels[k].fd = -1
            peer.channels[k].kind = k
            peer.channels[k].peer = number
            peer.channels[k].out_bytes = GET_RING_BYTES if k == GET else BULK_RING_BYTES
            peer.channels[k].out = <uint8_t *> malloc(peer.channels[k].out_bytes)
            peer.channels[k].received = <uint8_t *> malloc(RECEIVE_BYTES)
            if k == GET:
                peer.channels[k].asked = <Asked *> malloc(ASKED_MAX * sizeof(Asked))
            peer.channels[k].wire = <uint8_t *> malloc(WIRE_BYTES)
            if peer.channels[k].out == NULL or peer.channels[k].received == NULL or peer.channels[k].wire == NULL or \
                    (k == GET and peer.channels[k].asked == NULL):
                raise MemoryError
        for k in range(IMAGES):
            peer.channels[BULK].images[k] = <uint8_t *> malloc(FRAME_BYTES + l.segment_bytes)
            if peer.channels[BULK].images[k] == NULL:
                raise MemoryError
        store64(<uint64_t *> &l.peers[number], <uint64_t> <size_t> peer, RELEASE)
        return peer

    def detach(self, uint32_t number):
        """Break both connections to a peer, as a cut cable would."""
        cdef Peer *peer = peer_at(self.live(), number)
        cdef int k
        if peer == NULL:
            return
        for k in range(2):
            pthread_mutex_lock(&peer.channels[k].lock)
            if peer.channels[k].ssl != NULL and peer.channels[k].fd >= 0:
                shutdown(peer.channels[k].fd, SHUT_RDWR)
            pthread_mutex_unlock(&peer.channels[k].lock)

    def up(self, uint32_t number, uint32_t kind):
        cdef Peer *peer = peer_at(self.live(), number)
        return peer != NULL and is_up(&peer.channels[kind & 1])

    def silent(self, uint32_t number):
        """Whether the get connection to a peer is up and has owed an answer for a good part of give_up."""
        cdef Links_t *l = self.live()
        cdef Peer *peer = peer_at(l, number)
        return peer != NULL and is_up(&peer.channels[GET]) and owes_for(l, &peer.channels[GET], l.give_up_ns // SILENT_SHARE)

    def waited_for(self, uint32_t number):
        """Whether gets wait for a peer."""
        cdef Links_t *l = self.live()
        cdef uint32_t i
        cdef bint found = False
        if load32(&l.pending_free_count, RELAXED) == PENDING_MAX:
            return False
        pthread_mutex_lock(&l.pending_lock)
        for i in range(PENDING_MAX):
            found |= (l.pending[i].state == P_WAITS or l.pending[i].state == P_SENT) and l.pending[i].ref.peer == number
        pthread_mutex_unlock(&l.pending_lock)
        return found

    def ran_ms(self):
        """Milliseconds in which this node ran, from an arbitrary moment on: what another's silence is measured in."""
        return ran(self.live()) // 1000000

    def stood_still_ms(self):
        """Milliseconds since these links were made in which the node did not run."""
        cdef Links_t *l = self.live()
        return (load64(&l.store.running.skipped_ns, RELAXED) - l.skipped_first_ns) // 1000000

    def probe(self, uint32_t number, bint ask):
        """Of a link that lives: (generation of the peer's process, when something came from it last, in ns in which this node ran).
        None where no connection is up, or the peer said goodbye. ask: send a PING on each connection; event_fd is raised when
        anything comes."""
        cdef Links_t *l = self.live()
        cdef Peer *peer = peer_at(l, number)
        cdef Frame frame
        cdef uint64_t heard_ns = 0
        cdef int k
        if peer == NULL or load32(&peer.gone, ACQUIRE):
            return None
        with nogil:
            if ask:
                store32(&peer.listened, 1, RELEASE)
            for k in range(2):
                if is_up(&peer.channels[k]):
                    heard_ns = max(heard_ns, load64(&peer.channels[k].received_ns, RELAXED))
                    if ask:
                        frame_init(l, &frame, T_PING, 0)
                        send_frame(l, &peer.channels[k], &frame, NULL)
        return (load64(&peer.generation, RELAXED), heard_ns) if heard_ns else None

    def ship(self, uint32_t segment, uint32_t generation, uint32_t number):
        """Queue one sealed segment for a lender, or for the spill file (SPILL_PEER); False when too many wait. What fails stays
        here, whole."""
        cdef Links_t *l = self.live()
        cdef Peer *peer = peer_at(l, number)
        cdef Order *order
        cdef bint queued = False
        pthread_mutex_lock(&l.ship_lock)
        if links_peer_lost(l, number) if peer == NULL else False:
            queued = False
        elif segment >= load32(&l.store.segments_used, ACQUIRE):
            queued = False
        elif load32(&l.store.segments[segment].ordered, RELAXED):
            queued = True               # whoever decides looks again before it has left
        elif number == SPILL_PEER:
            queued = l.spilling.order(l.spilling.spill, segment, generation)
        elif peer.ordered < min(ORDERS_PER_PEER, (ORDERS_MAX - l.orders_count) // SHARE):
            order = &l.orders[l.orders_count]
            order.segment = segment
            order.generation = generation
            order.peer = number
            order.ordered_ns = ran(l)
            if peer.ordered == 0 and peer.shipping == 0:
                peer.progress_ns = order.ordered_ns
            store32(&l.orders_count, l.orders_count + 1, RELAXED)
            peer.ordered += 1
            store32(&l.store.segments[segment].ordered, 1, RELAXED)
            queued = True
        pthread_mutex_unlock(&l.ship_lock)
        eventfd_write(l.order_fd, 1)
        return queued

    def withdraw(self, uint32_t number):
        """Take back the orders for a lender that wait for it, so that the segments can go elsewhere; how many."""
        cdef Links_t *l = self.live()
        cdef uint32_t i, kept = 0, withdrawn
        pthread_mutex_lock(&l.ship_lock)
        for i in range(l.orders_count):
            if l.orders[i].peer == number:
                store32(&l.store.segments[l.orders[i].segment].ordered, 0, RELAXED)
                sub32(&peer_at(l, number).ordered, 1, RELAXED)
            else:
                l.orders[kept] = l.orders[i]
                kept += 1
        withdrawn = l.orders_count - kept
        store32(&l.orders_count, kept, RELAXED)
        pthread_mutex_unlock(&l.ship_lock)
        say(&l.orders_withdrawn, withdrawn)
        return withdrawn

    def shipping(self):
        """Segments ordered, being sealed or written, or under way; zero only when nothing is."""
        cdef Links_t *l = self.live()
        cdef uint32_t n, i
        pthread_mutex_lock(&l.ship_lock)
        n = l.orders_count + l.sealing
        for i in range(SHIPS_MAX):
            n += l.ships[i].id != 0
        if load32(&l.spilling.ready, ACQUIRE):
            n += l.spilling.under_way(l.spilling.spill)
        pthread_mutex_unlock(&l.ship_lock)
        return n

    def goodbye(self):
        """Tell every peer that what this node holds goes away with it."""
        cdef Links_t *l = self.live()
        cdef Frame frame
        cdef uint32_t p
        for p in range(PEERS_MAX):
            if l.peers[p] != NULL:
                frame_init(l, &frame, T_GOODBYE, 0)
                with nogil:
                    send_waiting(l, &l.peers[p].channels[BULK], &frame, NULL, now_ns() + 1000000000ull)

    def get(self, uint64_t pool, uint32_t index, oid=(0, 0, 0), int mode=-1):
        """A page, wherever it is: bytes, or None. PageLost when nobody has it (any more) or its lender does not answer."""
        cdef Links_t *l = self.live()
        cdef uint64_t key[3]
        cdef int result
        key[0], key[1], key[2] = oid
        page = PyBytes_FromStringAndSize(NULL, PAGE)
        cdef uint8_t *out = <uint8_t *> PyBytes_AS_STRING(page)
        with nogil:
            result = get_page(l, pool, key, index, out, mode)
        if result == OK:
            return page
        if result == MISS:
            return None
        if result == LOST:
            raise errors.PageLost(f"page {index} of pool {pool} is lost: the only node that held it is gone")
        if result == CORRUPT:
            raise errors.PageLost(f"page {index} of pool {pool} is lost: what came back fails its check")
        if result == UNREACHABLE or result == BUSY:
            raise errors.PageLost(f"page {index} of pool {pool} cannot be had: its lender does not answer")
        if result == NO_POOL:
            raise no_pool(l.store, pool)
        raise errors.UsageError(f"there is no page {index} in pool {pool}")

    def unreachable(self):
        """Pages whose only copy is on a peer that has been out of reach for too long, by its number: a get of them fails now. As
        soon as it is back they are not counted any more. What is gone for good is the store's to count."""
        cdef Links_t *l = self.live()
        cdef uint8_t away[256]
        cdef uint64_t pages[256]
        cdef uint32_t i, some = 0
        memset(away, 0, sizeof(away))
        memset(pages, 0, sizeof(pages))
        for i in range(PEERS_MAX):
            if peer_at(l, i) != NULL and links_peer_lost(l, i):
                away[i] = 1
                some += 1
        if some:
            with nogil:
                store_alone(l.store, away, pages)
        return {i: pages[i] for i in range(PEERS_MAX) if pages[i]}

    def drop_foreign(self, uint32_t owner):
        """Forget everything held for a node; returns the number of segments."""
        return lent_drop(self.live(), owner, 0)

    def foreign(self):
        """Segments held, by owner's number."""
        cdef Links_t *l = self.live()
        cdef uint32_t i
        held = [load32(&l.owner_images[i], RELAXED) for i in range(256)]
        return {i: n for i, n in enumerate(held) if n}

    def faults(self, uint32_t number):
        """(how often a peer was cut off for what it sent, ms since the last time)."""
        cdef Peer *peer = peer_at(self.live(), number)
        if peer == NULL or load32(&peer.faults, ACQUIRE) == 0:
            return 0, 0
        return load32(&peer.faults, ACQUIRE), (now_ns() - load64(&peer.fault_ns, RELAXED)) // 1000000

    def tamper(self, uint32_t handle, uint32_t offset):
        """Flip a byte of an image that is held: how tests play the hostile lender."""
        cdef Links_t *l = self.live()
        if handle >= l.lent_rows or l.rows[handle].state != LENT_HELD or offset >= l.rows[handle].bytes:
            raise errors.UsageError(f"there is no byte {offset} in image {handle}")
        lent_at(l, &l.rows[handle], offset)[0] ^= 0xff

    def lends(self, uint32_t owner):
        """Segments that this owner may bring now: of what is free, within its share."""
        return lent_credit(self.live(), owner)

    def lenders(self):
        """What a decision needs of each peer: (number, up, credit, segments ordered or on their way to it, for how many ms none
        of them got any further, how many it took, how many it refused, why it refused the last)."""
        cdef Links_t *l = self.live()
        cdef Peer *p
        cdef uint32_t i, waiting
        cdef uint64_t since
        result = []
        for i in range(PEERS_MAX):
            p = peer_at(l, i)
            if p != NULL:
                up = is_up(&p.channels[GET]) and is_up(&p.channels[BULK])
                pthread_mutex_lock(&l.ship_lock)        # no Python under it
                waiting = p.shipping + p.ordered
                since = p.progress_ns
                pthread_mutex_unlock(&l.ship_lock)
                stalled_ms = (ran(l) - since) // 1000000 if waiting else 0
                refusal = load32(&p.refusal, RELAXED)
                result.append((i, up, load32(&p.credit, RELAXED), waiting, stalled_ms, load64(&p.segments_sent, RELAXED),
                               load64(&p.refused, RELAXED), REFUSALS.get(refusal, f"status {refusal}")))
        return result

    def peers(self):
        cdef Links_t *l = self.live()
        cdef Peer *p
        cdef uint32_t i
        cdef uint64_t since
        cdef const char *words
        result = []
        for i in range(PEERS_MAX):
            p = peer_at(l, i)
            if p == NULL:
                continue
            reason = b""
            sent = received = silent = 0
            for k in range(2):
                pthread_mutex_lock(&p.channels[k].lock)
                words = p.channels[k].reason if p.channels[k].ssl == NULL else NULL
                since = p.channels[k].received_ns if p.channels[k].ssl != NULL else 0
                pthread_mutex_unlock(&p.channels[k].lock)
                if since:
                    silent = max(silent, ran(l) - min(since, ran(l)))
                if words != NULL:
                    reason = words
                sent += load64(&p.channels[k].bytes_sent, RELAXED)
                received += load64(&p.channels[k].bytes_received, RELAXED)
            if load32(&p.gone, ACQUIRE) and reason in ENDS:
                reason = b"it has stopped, and said so"
            result.append(dict(
                number=i, silent_ms=silent // 1000000, up=is_up(&p.channels[GET]) and is_up(&p.channels[BULK]), gone=bool(load32(&p.gone, ACQUIRE)),
                generation=load64(&p.generation, RELAXED), credit=load32(&p.credit, RELAXED),
                shipping=load32(&p.shipping, RELAXED), reason=reason.decode(), lost=links_peer_lost(l, i), bytes_sent=sent,
                bytes_received=received, gets=load64(&p.gets, RELAXED), segments_sent=load64(&p.segments_sent, RELAXED),
                refused=load64(&p.refused, RELAXED),
                round_trip_p50_us=quantile(&p.round_trip, 0.5) // 1000,
                round_trip_p99_us=quantile(&p.round_trip, 0.99) // 1000))
        return result

    def counters(self):
        cdef Links_t *l = self.live()
        cdef uint32_t blocks = l.segment_bytes // BLOCK_BYTES
        return dict(
            remote_gets=load64(&l.remote_gets, RELAXED), late_replies=load64(&l.late_replies, RELAXED),
            protocol_errors=load64(&l.protocol_errors, RELAXED), frees_sent=load64(&l.frees_sent, RELAXED),
            ships_refused=load64(&l.ships_refused, RELAXED), ships_failed=load64(&l.ships_failed, RELAXED),
            segments_received=load64(&l.segments_received, RELAXED), gets_served=load64(&l.gets_served, RELAXED),
            unreachable=load64(&l.unreachable, RELAXED), corrupt_replies=load64(&l.corrupt_replies, RELAXED),
            bytes_shipped=load64(&l.bytes_shipped, RELAXED), compacts_sent=load64(&l.compacts_sent, RELAXED),
            segments_compacted=load64(&l.segments_compacted, RELAXED), orders_withdrawn=load64(&l.orders_withdrawn, RELAXED),
            gets_redirected=load64(&l.gets_redirected, RELAXED), lend_bytes=<uint64_t> l.lent_blocks * BLOCK_BYTES,
            lent_frames=l.lent_blocks // blocks, lent_free=load32(&l.lent_free_count, RELAXED) // blocks,
            lent_bytes_free=<uint64_t> load32(&l.lent_free_count, RELAXED) * BLOCK_BYTES,
            lent_bytes=load64(&l.lent_bytes, RELAXED), lent_images=load32(&l.lent_images, RELAXED),
            floods=load64(&l.floods, RELAXED), turn_work_max_get=load64(&l.turn_work_max[GET], RELAXED),
            turn_work_max_bulk=load64(&l.turn_work_max[BULK], RELAXED),
            lent_locked=bool(l.lent_locked), gets_pending=PENDING_MAX - load32(&l.pending_free_count, RELAXED))
