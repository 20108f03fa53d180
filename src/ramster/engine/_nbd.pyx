"""The NBD server's transmission phase: requests of a kernel, or of any NBD client, served from the store and the links.

Covers: requests and replies from the end of the handshake on, pages that are away, partial pages, errors. Does not cover: the
handshake (wire.nbd), who may connect and what exports there are (frontswap.nbd). The protocol is the NBD project's
doc/proto.md; docs/nbd.md says what of it is served.

Threads: each connection has one, which receives, works and sends, all without the GIL. What is here is answered where it is
received, many replies per system call. A read that needs a page from elsewhere is parked: its connection goes on, a thread of
the links fills it, and whoever finishes it sends the answer, so that replies leave in any order. Slow threads do what waits: a
part of a page that is away is changed, a page moved while it was asked for, ranges too long for a connection to wait for.

Rules:

* Nothing is allocated between receiving a write and acknowledging it. Payload is put page by page as it arrives.
* A request is checked in one place, valid(), before anything is done; what follows trusts it.
* Whoever changes a page holds its page lock, so that a write of a part of a page loses nothing of another write. Nobody holds
  one while a page travels: what came counts if the page's slot, looked at under the lock, still is what was asked for. Reads
  take no lock: the store answers with the page as it is at that moment.
* A put that is refused leaves the page as it was. tmem's rule, that the older page must not stay readable, is for caches, whose
  client has the page elsewhere; a client of a disk knows from the error that it has the old page or the new one, and the old
  one was acknowledged.
* `send_lock` is held by whoever sends. A thread that finds it taken leaves its answer in the queue: the holder looks again after
  it has let go. Only the connection's own thread waits for a slow client; TLS is spoken by that thread alone.
* A parked request holds the connection (`users`) until its last thread has let go of it.
* A client that has gone gets nothing more done that only it would see: its reads and CACHE are dropped wherever they wait. What
  changes pages is carried out. See look() for how it shows that a client has gone, and not merely sends no more.
* Connections take turns in what they share: one job of each at a time with slow threads, and each has a bounded part of rows, of
  memory and of the pages that are asked for elsewhere.
"""
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stddef cimport size_t
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memmove, memset

from ramster.engine._c.atomic cimport *
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.linux cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, MAP_ANONYMOUS, MAP_FAILED, MAP_NORESERVE, MAP_PRIVATE, MSG_DONTWAIT, MSG_NOSIGNAL, POLLIN, POLLOUT, PROT_READ,
    PROT_WRITE, SHUT_RDWR, SO_RCVBUF, SO_SNDBUF, SOL_SOCKET, close, eventfd, eventfd_read, eventfd_write, iovec, mmap, msghdr, munmap, poll, pollfd,
    POLLERR, POLLHUP, POLLRDHUP, recv, sendmsg, setsockopt, shutdown)
from ramster.engine._c.nbd cimport *
from ramster.engine._c.openssl cimport (
    ERR_clear_error, ERR_get_error, ERR_reason_error_string, SSL_ERROR_WANT_READ, SSL_ERROR_WANT_WRITE, SSL_ERROR_ZERO_RETURN, SSL_OP_NO_RENEGOTIATION,
    SSL_OP_NO_TICKET, SSL_do_handshake, SSL_free, SSL_get_error, SSL_new, SSL_read, SSL_set_accept_state, SSL_set_cipher_list, SSL_set_fd,
    SSL_set_min_proto_version, SSL_set_options, SSL_write, TLS1_2_VERSION)
from ramster.engine._c.pthread cimport (
    cond_init_monotonic, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_signal, pthread_join, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock, need_thread)
from ramster.engine._running cimport ran_ns
from ramster.engine._link cimport Fetch, Links, Reply, TlsContext, get_page, get_pages, links_get, peer_certificate, reply_bytes, reply_next
from ramster.engine._store cimport (
    BUSY, CORRUPT, FULL, LOST, MISS, NO_MEMORY, OK, PAGE, REMOTE, UNREACHABLE, RemoteRef, store_flush, store_get, store_in_vain, store_patience, store_put,
    store_pool_pages, store_short_of_frames, store_slot, store_where)

import os

from ramster import errors

cdef enum:
    SEND_S = 120                    # a client that takes nothing for so long is gone; a paused virtual machine comes back sooner
    LEAVE_MS = 50
    PATCH_LOOKS = 100               # at a page that goes away with another content each time that it is fetched
    PATIENCE_S = 60                 # for a page, at least: a disk is given 30 s
    SOCKET_BYTES = 4194304          # asked for; the system gives what it allows
    RECEIVE_MAX = 65536             # of one item of the handshake

    ENDED = -1                      # of receive_some()
    BROKEN = -2

COUNTERS = (
    "reads", "writes", "bytes_read", "bytes_written", "flushes", "trims", "zeroes", "caches", "statuses", "refused", "errors",
    "pages_freed", "pages_remote", "pages_lost", "unaligned", "abandoned")

cdef uint64_t[3] NO_OBJECT = [0, 0, 0]


cdef inline void tally(Export *e, int counter, uint64_t amount) noexcept nogil:
    add64(&e.counters[counter], amount, RELAXED)


# --- pages ---------------------------------------------------------------------------------------------------------

cdef inline pthread_mutex_t *lock_of(Export *e, uint64_t page) noexcept nogil:
    return &e.locks[page % PAGE_LOCKS]


cdef int load_page(Server_t *s, Export *e, uint64_t page, uint8_t *bytes, RemoteRef *ref) noexcept nogil:
    """OK, MISS (the bytes are zeros), REMOTE, or what is wrong with it."""
    cdef int result = store_get(s.store, e.pool, NO_OBJECT, <uint32_t> page, bytes, -1, ref)
    if result == MISS:
        memset(bytes, 0, PAGE)
    return result


cdef int put_locked(Server_t *s, Export *e, uint64_t page, const uint8_t *bytes) noexcept nogil:
    """A put that waits in vain for room makes the next ones wait shortly."""
    cdef uint64_t taken = load64(&s.store.frames_taken, ACQUIRE)
    cdef int result = store_put(s.store, e.pool, NO_OBJECT, <uint32_t> page, bytes,
                                store_patience(s.store, &s.in_vain, s.store.full_wait_ns))
    if result == FULL:
        store_in_vain(s.store, &s.in_vain, taken)
    return result


cdef int save_page(Server_t *s, Export *e, uint64_t page, const uint8_t *bytes) noexcept nogil:
    cdef int result
    pthread_mutex_lock(lock_of(e, page))
    result = put_locked(s, e, page, bytes)
    pthread_mutex_unlock(lock_of(e, page))
    return result


cdef int patch_page(Server_t *s, Export *e, uint64_t page, uint32_t low, uint32_t high, const uint8_t *bytes, bint may_wait) noexcept nogil:
    """Write a part of a page, zeros where 'bytes' is NULL. REMOTE: it is away, and waiting was not allowed."""
    cdef uint64_t scratch[512]
    cdef uint8_t *whole = <uint8_t *> scratch
    cdef RemoteRef ref
    cdef uint64_t asked = 0
    cdef int result, came = MISS, looks
    for looks in range(PATCH_LOOKS):
        pthread_mutex_lock(lock_of(e, page))
        result = load_page(s, e, page, whole, &ref)
        if result == REMOTE and ref.slot == asked and came != MISS:
            result = came               # nobody changed it meanwhile: 'whole' is the page
        if result == OK or result == MISS:
            if bytes == NULL:
                memset(whole + low, 0, high - low)
            else:
                memcpy(whole + low, bytes, high - low)
            result = put_locked(s, e, page, whole)
            tally(e, E_UNALIGNED, 1)
        pthread_mutex_unlock(lock_of(e, page))
        if result != REMOTE or not may_wait:
            return result
        asked = ref.slot                # segment, generation, ordinal: nothing is added to a segment that is away, so an equal one is the same page
        came = get_page(s.links, e.pool, NO_OBJECT, <uint32_t> page, whole, -1)
    return UNREACHABLE


cdef void drop_pages(Server_t *s, Export *e, uint64_t page, uint64_t pages) noexcept nogil:
    """Forget pages, here and away. A page that is stored meanwhile may stay: nothing orders the two requests."""
    cdef uint64_t freed = 0
    while pages:
        if store_slot(s.store, e.pool, NO_OBJECT, <uint32_t> page) != 0:
            pthread_mutex_lock(lock_of(e, page))
            freed += store_flush(s.store, e.pool, NO_OBJECT, <uint32_t> page) == OK
            pthread_mutex_unlock(lock_of(e, page))
        page += 1
        pages -= 1
    tally(e, E_PAGES_FREED, freed)


cdef void bring_pages(Server_t *s, Export *e, uint64_t page, uint64_t pages, uint8_t *buffer) noexcept nogil:
    """Have pages that are away here, as long as there is room for them without pressing others out. 'buffer': a slow thread's."""
    cdef Fetch wanted[CACHE_PAGES]
    cdef uint64_t slot
    cdef uint32_t peer, n, i
    while pages and not store_short_of_frames(s.store) and not load32(&s.stopping, RELAXED):
        n = 0
        while pages and n < CACHE_PAGES:
            if store_where(s.store, e.pool, <uint32_t> page, &peer, &slot) == REMOTE:
                wanted[n].index = <uint32_t> page
                wanted[n].bytes = buffer + n * PAGE
                n += 1
            page += 1
            pages -= 1
        get_pages(s.links, e.pool, wanted, n, buffer + CACHE_PAGES * PAGE)
        for i in range(n):
            if wanted[i].status != OK or wanted[i].slot == 0 or store_short_of_frames(s.store):
                continue
            pthread_mutex_lock(lock_of(e, wanted[i].index))
            # As in patch_page(). A refused put leaves the page where it is: asking for it to be near must not cost it.
            if store_slot(s.store, e.pool, NO_OBJECT, wanted[i].index) == wanted[i].slot and \
                    store_put(s.store, e.pool, NO_OBJECT, wanted[i].index, wanted[i].bytes, 0) == OK:
                tally(e, E_PAGES_REMOTE, 1)
            pthread_mutex_unlock(lock_of(e, wanted[i].index))


cdef uint32_t error_of(int result) noexcept nogil:
    if result == FULL:
        return NBD_ENOSPC
    return NBD_ENOMEM if result == NO_MEMORY else NBD_EIO


cdef void report(Conn *c, uint64_t page, int result) noexcept nogil:
    """A page that cannot be had: counted, and left for the node's log."""
    cdef Server_t *s = c.server
    tally(c.export, E_PAGES_LOST, 1)
    spin_lock(&s.events_lock)
    if s.events_count < EVENTS_MAX:
        s.events[s.events_count].export = c.number
        s.events[s.events_count].page = page
        s.events[s.events_count].kind = <uint32_t> result
        s.events_count += 1
    spin_unlock(&s.events_lock)
    eventfd_write(s.event_fd, 1)


# --- sending -------------------------------------------------------------------------------------------------------

cdef void say_why(Conn *c, const char *reason) noexcept nogil:
    """Why the connection ends; by any thread, and the first reason counts."""
    if load_pointer(<void **> &c.reason, RELAXED) == NULL:
        store_pointer(<void **> &c.reason, <void *> reason, RELAXED)


cdef void stop_connection(Conn *c, const char *reason) noexcept nogil:
    say_why(c, reason)
    store32(&c.dead, 1, RELEASE)


cdef bint wait_for(Conn *c, short events, uint64_t deadline_ns) noexcept nogil:
    cdef pollfd p
    cdef int64_t left
    p.fd = c.fd
    p.events = events
    while True:
        left = <int64_t> deadline_ns - <int64_t> ran_ns(&c.server.store.running)
        if left <= 0 or load32(&c.server.stopping, RELAXED):
            return False
        if poll(&p, 1, <int> min(left // 1000000 + 1, 1000)) > 0:
            return True


cdef int64_t write_some(Conn *c, const iovec *parts, int count, bint may_wait) noexcept nogil:
    """Bytes that the socket took: at least one if it may wait; 0: it takes none now; -1: the connection has ended."""
    cdef msghdr message
    cdef int64_t n
    cdef int error
    cdef uint64_t deadline = 0
    while True:
        if c.ssl != NULL:
            ERR_clear_error()
            n = SSL_write(c.ssl, parts[0].iov_base, <int> parts[0].iov_len)
            if n > 0:
                return n
            error = SSL_get_error(c.ssl, <int> n)
            if error != SSL_ERROR_WANT_READ and error != SSL_ERROR_WANT_WRITE:
                return -1
        else:
            memset(&message, 0, sizeof(message))
            message.msg_iov = <iovec *> parts
            message.msg_iovlen = <size_t> count
            n = sendmsg(c.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
            if n > 0:
                return n
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                return -1
            error = SSL_ERROR_WANT_WRITE
        if not may_wait:
            return 0
        if deadline == 0:
            deadline = ran_ns(&c.server.store.running) + <uint64_t> SEND_S * 1000000000ull
        if not wait_for(c, POLLOUT if error == SSL_ERROR_WANT_WRITE else POLLIN, deadline):
            return -1


cdef void parked_free(Parked *p) noexcept nogil:
    cdef Server_t *s = p.conn.server
    if p.data != p.small:
        free(p.data)
    pthread_mutex_lock(&s.free_lock)
    s.large_bytes -= p.large_bytes
    p.conn.large_bytes -= p.large_bytes
    p.conn.rows -= 1
    p.conn.changes -= p.type != CMD_READ
    p.next = s.parked_free
    s.parked_free = p
    pthread_cond_broadcast(&s.freed)
    pthread_mutex_unlock(&s.free_lock)


cdef inline bint waits_to_be_sent(Conn *c) noexcept nogil:
    return load_pointer(<void **> &c.done_first, ACQUIRE) != NULL or load_pointer(<void **> &c.sending, ACQUIRE) != NULL


cdef bint send_parked(Conn *c, bint may_wait) noexcept nogil:
    """With send_lock held: the answers in the queue. False: some are left, because the socket takes no more or has ended."""
    cdef Parked *p
    cdef iovec parts[2]
    cdef int count
    cdef int64_t n
    cdef uint64_t total, payload
    while True:
        p = c.sending
        if p == NULL:
            spin_lock(&c.done_lock)
            p = c.done_first
            if p != NULL:
                store_pointer(<void **> &c.sending, p, RELAXED)
                store_pointer(<void **> &c.done_first, p.next, RELEASE)
                if p.next == NULL:
                    c.done_last = NULL
            spin_unlock(&c.done_lock)
            if p == NULL:
                return True
            c.sent = 0
            if not p.cut:
                c.sent = c.ahead
                c.ahead = 0
        payload = p.length if p.type == CMD_READ and p.error == 0 and not p.cut else 0
        total = p.header_bytes + payload
        while c.sent < total and not load32(&c.dead, ACQUIRE):
            count = 0
            if c.sent < p.header_bytes:
                parts[0].iov_base = p.header + c.sent
                parts[0].iov_len = p.header_bytes - c.sent
                count = 1
            if payload:
                n = <int64_t> c.sent - p.header_bytes
                if n < 0:
                    n = 0
                parts[count].iov_base = p.data + p.offset % PAGE + n
                parts[count].iov_len = payload - <uint64_t> n
                count += 1
            n = write_some(c, parts, count, may_wait)
            if n == 0:
                return False
            if n < 0:
                stop_connection(c, b"the connection was cut")
                break
            c.sent += <uint64_t> n
        store_pointer(<void **> &c.sending, NULL, RELEASE)
        parked_free(p)


cdef void send_what_can(Conn *c) noexcept nogil:
    """By whoever finished a parked request: never waits."""
    cdef bint all_sent
    if c.ssl == NULL:
        while waits_to_be_sent(c):
            if pthread_mutex_trylock(&c.send_lock) != 0:
                return
            all_sent = send_parked(c, False)
            pthread_mutex_unlock(&c.send_lock)
            if not all_sent:
                break
        else:
            return
    eventfd_write(c.wake, 1)
    pthread_mutex_lock(&c.server.free_lock)         # it may wait for a row
    pthread_cond_broadcast(&c.server.freed)
    pthread_mutex_unlock(&c.server.free_lock)


cdef bint flush_out(Conn *c) noexcept nogil:
    """By the connection's thread: everything that can be sent now is sent. False: the connection has ended."""
    cdef iovec part
    cdef int64_t n
    cdef uint32_t sent
    while c.out_used or waits_to_be_sent(c):
        pthread_mutex_lock(&c.send_lock)
        send_parked(c, True)
        sent = 0
        if c.out_used:
            sent = c.ahead
            c.ahead = 0
        while sent < c.out_used and not load32(&c.dead, ACQUIRE):
            part.iov_base = c.out + sent
            part.iov_len = c.out_used - sent
            n = write_some(c, &part, 1, True)
            if n < 0:
                stop_connection(c, b"the connection was cut")
            else:
                sent += <uint32_t> n
        c.out_used = 0
        pthread_mutex_unlock(&c.send_lock)
    return not load32(&c.dead, ACQUIRE)


# --- clients that have gone ----------------------------------------------------------------------------------------

cdef bint look(Conn *c) noexcept nogil:
    """By the connection's thread: whether nobody is there any more to take answers. A client that sends no more may wait for
    them, or have gone: on a Unix socket and after a reset the system knows, on TCP only what is sent to it tells."""
    cdef pollfd p
    if load32(&c.gone, RELAXED):
        return True
    p.fd = c.fd
    p.events = POLLRDHUP
    if load32(&c.dead, ACQUIRE) or (poll(&p, 1, 0) > 0 and p.revents & (POLLHUP | POLLERR)):
        say_why(c, b"the client went away")
        store32(&c.gone, 1, RELEASE)
        return True
    if p.revents & POLLRDHUP and not c.asked:
        ask_for_life(c)
    return False


cdef void ask_for_life(Conn *c) noexcept nogil:
    """Send the first bytes of the next answer ahead, which are the same for each: whoever has gone resets the connection."""
    cdef pollfd p
    cdef iovec part
    cdef uint32_t magic = swap32_bytes(STRUCTURED_REPLY_MAGIC if c.structured else SIMPLE_REPLY_MAGIC)
    cdef bint same
    cdef int64_t n
    pthread_mutex_lock(&c.server.free_lock)
    same = c.changes == 0 or c.chunks or not c.structured       # else a simple reply may be on its way
    pthread_mutex_unlock(&c.server.free_lock)
    p.fd = c.fd
    p.events = POLLOUT
    if not same or c.out_used or poll(&p, 1, 0) <= 0 or not p.revents & POLLOUT or pthread_mutex_trylock(&c.send_lock) != 0:
        return
    if load_pointer(<void **> &c.sending, ACQUIRE) == NULL:
        c.asked = c.chunks = True
        part.iov_base = &magic
        part.iov_len = sizeof(magic)
        n = write_some(c, &part, 1, c.ssl != NULL)              # the socket has room, so this does not wait
        if n < 0:
            stop_connection(c, b"the connection was cut")
        else:
            c.ahead = <uint32_t> n
    pthread_mutex_unlock(&c.send_lock)
    if waits_to_be_sent(c):
        eventfd_write(c.wake, 1)


# --- answers -------------------------------------------------------------------------------------------------------

cdef uint32_t simple_header(uint8_t *at, uint64_t cookie, uint32_t error) noexcept nogil:
    cdef SimpleReply *reply = <SimpleReply *> at
    reply.magic = swap32_bytes(SIMPLE_REPLY_MAGIC)
    reply.error = swap32_bytes(error)
    reply.cookie = cookie
    return sizeof(SimpleReply)


cdef uint32_t chunk_header(uint8_t *at, uint64_t cookie, uint16_t type, uint32_t length) noexcept nogil:
    """The only chunk of its reply."""
    cdef Chunk *chunk = <Chunk *> at
    chunk.magic = swap32_bytes(STRUCTURED_REPLY_MAGIC)
    chunk.flags = swap16(REPLY_DONE)
    chunk.type = swap16(type)
    chunk.cookie = cookie
    chunk.length = swap32_bytes(length)
    return sizeof(Chunk)


cdef inline void put16(uint8_t *at, uint16_t value) noexcept nogil:
    value = swap16(value)
    memcpy(at, &value, 2)


cdef inline void put32(uint8_t *at, uint32_t value) noexcept nogil:
    value = swap32_bytes(value)
    memcpy(at, &value, 4)


cdef inline void put64(uint8_t *at, uint64_t value) noexcept nogil:
    value = swap64_bytes(value)
    memcpy(at, &value, 8)


cdef uint32_t read_header(bint structured, uint8_t *at, uint64_t cookie, uint64_t offset, uint32_t length) noexcept nogil:
    cdef uint32_t n
    if not structured:
        return simple_header(at, cookie, 0)
    n = chunk_header(at, cookie, REPLY_OFFSET_DATA, length + 8)
    put64(at + n, offset)
    return n + 8


cdef uint32_t end_header(Conn *c, uint8_t *at, uint16_t type, uint64_t cookie, uint32_t error, uint64_t offset) noexcept nogil:
    """Of an answer without payload. Reads and block status answer in chunks once structured replies are agreed on; others may
    go on with simple ones."""
    cdef bint with_offset = type == CMD_READ or type == CMD_BLOCK_STATUS
    cdef uint32_t n
    if not c.structured or not (with_offset or c.chunks):
        return simple_header(at, cookie, error)
    if error == 0:
        return chunk_header(at, cookie, REPLY_NONE, 0)
    n = chunk_header(at, cookie, REPLY_ERROR_OFFSET if with_offset else REPLY_ERROR, 14 if with_offset else 6)
    put32(at + n, error)
    put16(at + n + 4, 0)            # no text
    if with_offset:
        put64(at + n + 6, offset)
        return n + 14
    return n + 6


cdef void answer(Conn *c, uint16_t type, uint64_t cookie, uint32_t error, uint64_t offset) noexcept nogil:
    """Without payload, by the connection's thread."""
    c.out_used += end_header(c, c.out + c.out_used, type, cookie, error, offset)


cdef void parked_fail(Parked *p, uint64_t page, int result) noexcept nogil:
    cdef uint32_t none = 0
    if cas32(&p.error, &none, error_of(result), False, ACQ_REL, RELAXED):
        p.error_offset = max(page * PAGE, p.offset)
    if result != FULL and result != NO_MEMORY:
        report(p.conn, page, result)


cdef void parked_done(Parked *p) noexcept nogil:
    """One thing less that it waits for. The last one answers, and lets go of the connection."""
    cdef Conn *c = p.conn
    cdef Export *e = c.export
    if sub32(&p.left, 1, ACQ_REL) != 0:
        return
    if p.type == CMD_READ and load32(&c.gone, ACQUIRE):
        p.cut = True                # pages of it may be missing
        tally(e, E_ABANDONED, 1)
    if p.cut:
        p.header_bytes = 0
    elif p.type == CMD_READ and p.error == 0:
        tally(e, E_BYTES_READ, p.length)
        p.header_bytes = <uint16_t> read_header(c.structured, p.header, p.cookie, p.offset, p.length)
    else:
        tally(e, E_ERRORS, p.error != 0)
        p.header_bytes = <uint16_t> end_header(c, p.header, p.type, p.cookie, p.error, p.error_offset)
    p.next = NULL
    spin_lock(&c.done_lock)
    if c.done_last == NULL:
        store_pointer(<void **> &c.done_first, p, RELEASE)
    else:
        c.done_last.next = p
    c.done_last = p
    spin_unlock(&c.done_lock)
    send_what_can(c)
    sub32(&c.users, 1, ACQ_REL)     # the last touch


# --- parked requests -----------------------------------------------------------------------------------------------

cdef bint row_is_free(Conn *c, uint64_t large) noexcept nogil:
    """With free_lock held."""
    cdef Server_t *s = c.server
    if s.parked_free == NULL or c.rows >= s.rows_each:
        return False
    return large == 0 or c.large_bytes + large <= LARGE_BYTES_EACH + PAGE and \
        s.large_bytes + large <= (LARGE_BYTES_MAX if large <= MEDIUM_BYTES else LARGE_BYTES_HUGE + PAGE)


cdef Parked *parked_take(Conn *c, const Request *r, uint64_t pages) noexcept nogil:
    """A row and memory for so many pages; waits for others to finish. NULL: they did not, or the system has no memory, or its
    client is gone and nobody wants to know."""
    cdef Server_t *s = c.server
    cdef Parked *p
    cdef uint64_t deadline, large = 0 if pages <= SMALL_PAGES else pages * PAGE
    cdef bint wanted_by_it = r.type == CMD_READ or r.type == CMD_CACHE
    if not flush_out(c):            # nobody waits for an answer because of this wait
        return NULL
    deadline = ran_ns(&s.store.running) + s.deadline_ns
    pthread_mutex_lock(&s.free_lock)
    while not row_is_free(c, large):
        if ran_ns(&s.store.running) > deadline or load32(&s.stopping, RELAXED) or (wanted_by_it and load32(&c.gone, RELAXED)):
            pthread_mutex_unlock(&s.free_lock)
            return NULL
        if waits_to_be_sent(c):     # what is finished holds its row until it is sent, and nobody else may send it
            pthread_mutex_unlock(&s.free_lock)
            if not flush_out(c):
                return NULL
            deadline = ran_ns(&s.store.running) + s.deadline_ns
            pthread_mutex_lock(&s.free_lock)
            continue
        wait_for_others(c)
    p = s.parked_free
    s.parked_free = p.next
    s.large_bytes += large
    c.large_bytes += large
    c.rows += 1
    c.changes += r.type != CMD_READ
    pthread_mutex_unlock(&s.free_lock)
    p.conn = c
    p.cookie = r.cookie
    p.offset = r.offset
    p.length = r.length
    p.type = r.type
    p.error = 0
    p.cut = False
    p.left = 1
    p.large_bytes = large
    p.data = p.small
    if large:
        p.data = <uint8_t *> malloc(large)
        if p.data == NULL:
            p.data = p.small
            parked_free(p)
            return NULL
    add32(&c.users, 1, RELAXED)
    return p


cdef void wait_for_others(Conn *c) noexcept nogil:
    """With free_lock held: until somebody has finished something, or it is time to look at the client again."""
    cdef Server_t *s = c.server
    cond_wait_until(&s.freed, &s.free_lock, now_ns() + <uint64_t> LEAVE_MS * 1000000)
    pthread_mutex_unlock(&s.free_lock)
    look(c)
    pthread_mutex_lock(&s.free_lock)


cdef void piece_free(Server_t *s, Piece *piece) noexcept nogil:
    pthread_mutex_lock(&s.free_lock)
    piece.request.conn.asked_pages -= piece.asked
    piece.next = s.piece_free
    s.piece_free = piece
    pthread_cond_broadcast(&s.freed)
    pthread_mutex_unlock(&s.free_lock)


cdef void piece_dropped(Server_t *s, Piece *piece) noexcept nogil:
    """Nobody is there any more to read it."""
    cdef Parked *p = piece.request
    piece_free(s, piece)
    parked_done(p)


cdef void turn_wanted(Server_t *s, Conn *c) noexcept nogil:
    """With slow_lock held."""
    c.next_turn = NULL
    if s.turns_last == NULL:
        s.turns_first = c
    else:
        s.turns_last.next_turn = c
    s.turns_last = c


cdef void later(Conn *c, Job *job) noexcept nogil:
    """By a slow thread, after what others want as well. There are as many jobs as rows of requests and pieces, at most."""
    cdef Server_t *s = c.server
    job.next = NULL
    pthread_mutex_lock(&s.slow_lock)
    if c.jobs_last == NULL:
        c.jobs_first = job
        turn_wanted(s, c)
    else:
        c.jobs_last.next = job
    c.jobs_last = job
    pthread_cond_signal(&s.slow_wanted)
    pthread_mutex_unlock(&s.slow_lock)


cdef void piece_again(Piece *piece) noexcept nogil:
    piece.job.kind = JOB_AGAIN
    piece.job.piece = piece
    later(piece.request.conn, &piece.job)


cdef void piece_answered(void *context, Reply *reply) noexcept nogil:
    """Called by a thread of the links, once."""
    cdef Piece *piece = <Piece *> context
    cdef Parked *p = piece.request
    cdef Server_t *s = p.conn.server
    cdef uint64_t first = p.offset // PAGE
    cdef uint32_t i, again = 0, came = 0
    cdef int status
    if load32(&p.conn.gone, RELAXED):
        piece_dropped(s, piece)
        return
    for i in range(piece.pages):
        status = reply_next(reply, p.data + <uint64_t> piece.wanted[i].place * PAGE)
        if status == OK:
            came += 1
        elif status == BUSY:
            piece.wanted[again] = piece.wanted[i]
            again += 1
        else:
            parked_fail(p, first + piece.wanted[i].place, status)
    tally(p.conn.export, E_PAGES_REMOTE, came)
    if again:
        piece.pages = again
        piece_again(piece)
    else:
        piece_free(s, piece)
        parked_done(p)


cdef void piece_send(Server_t *s, Piece *piece, RemoteRef *ref) noexcept nogil:
    cdef Parked *p = piece.request
    cdef uint32_t i
    cdef int result
    if load32(&p.conn.gone, RELAXED):
        piece_dropped(s, piece)
        return
    piece.asked = piece.pages
    pthread_mutex_lock(&s.free_lock)
    p.conn.asked_pages += piece.asked
    pthread_mutex_unlock(&s.free_lock)
    result = links_get(s.links, ref, piece.wanted, piece.pages, piece.staging, piece_answered, piece, True)
    if result == OK:
        return
    if result == BUSY:
        piece_again(piece)
        return
    for i in range(piece.pages):
        parked_fail(p, p.offset // PAGE + piece.wanted[i].place, result)
    piece_free(s, piece)
    parked_done(p)


cdef Piece *piece_take(Server_t *s, Parked *p, bint may_wait) noexcept nogil:
    cdef Conn *c = p.conn
    cdef Piece *piece
    cdef uint64_t deadline = ran_ns(&s.store.running) + s.deadline_ns
    pthread_mutex_lock(&s.free_lock)
    while s.piece_free == NULL or c.asked_pages >= ASKED_PAGES_EACH:
        if not may_wait or ran_ns(&s.store.running) > deadline or load32(&s.stopping, RELAXED) or load32(&c.gone, RELAXED):
            pthread_mutex_unlock(&s.free_lock)
            return NULL
        wait_for_others(c)
    piece = s.piece_free
    s.piece_free = piece.next
    pthread_mutex_unlock(&s.free_lock)
    piece.request = p
    piece.pages = piece.asked = 0
    add32(&p.left, 1, RELAXED)
    return piece


cdef void read_parked(Conn *c, const Request *r) noexcept nogil:
    """A read that needs pages from elsewhere, or is large: pages of one segment are asked for together."""
    cdef Server_t *s = c.server
    cdef Export *e = c.export
    cdef uint64_t first = r.offset // PAGE, last = (r.offset + r.length - 1) // PAGE, page
    cdef Parked *p
    cdef Piece *open_pieces[OPEN_PIECES]
    cdef RemoteRef refs[OPEN_PIECES]
    cdef RemoteRef ref
    cdef Piece *piece
    cdef uint32_t i, count = 0
    cdef int result
    if look(c):
        tally(e, E_ABANDONED, 1)
        return
    p = parked_take(c, r, last - first + 1)
    if p == NULL:
        if load32(&c.gone, RELAXED):
            tally(e, E_ABANDONED, 1)
        else:
            tally(e, E_ERRORS, 1)
            answer(c, CMD_READ, r.cookie, NBD_ENOMEM, r.offset)
        return
    for page in range(first, last + 1):
        if (page - first) % LOOK_PAGES == LOOK_PAGES - 1 and look(c):
            break
        result = load_page(s, e, page, p.data + (page - first) * PAGE, &ref)
        if result == OK or result == MISS:
            continue
        if result != REMOTE:
            parked_fail(p, page, result)
            continue
        for i in range(count):
            if refs[i].segment == ref.segment and refs[i].generation == ref.generation and refs[i].peer == ref.peer:
                break
        else:
            i = count
        if i < count and open_pieces[i].pages == PIECE_PAGES:
            piece_send(s, open_pieces[i], &refs[i])
            count -= 1
            open_pieces[i] = open_pieces[count]
            refs[i] = refs[count]
            i = count
        if i == OPEN_PIECES:
            piece_send(s, open_pieces[0], &refs[0])
            count -= 1
            open_pieces[0] = open_pieces[count]
            refs[0] = refs[count]
            i = count
        if i == count:
            piece = piece_take(s, p, False)
            if piece == NULL:       # what is waited for must be under way
                for i in range(count):
                    piece_send(s, open_pieces[i], &refs[i])
                count = i = 0
                piece = piece_take(s, p, True)
            if piece == NULL:
                parked_fail(p, page, NO_MEMORY)
                continue
            open_pieces[i] = piece
            refs[i] = ref
            count += 1
        piece = open_pieces[i]
        piece.wanted[piece.pages].slot = ref.slot
        piece.wanted[piece.pages].index = ref.index
        piece.wanted[piece.pages].ordinal = <uint16_t> ref.ordinal
        piece.wanted[piece.pages].place = <uint16_t> (page - first)
        piece.pages += 1
    for i in range(count):
        piece_send(s, open_pieces[i], &refs[i])
    parked_done(p)


# --- slow threads --------------------------------------------------------------------------------------------------

cdef void again(Server_t *s, Job *job, uint8_t *buffer) noexcept nogil:
    cdef Piece *piece = job.piece
    cdef Parked *p = piece.request
    cdef Export *e = p.conn.export
    cdef Fetch wanted[PIECE_PAGES]
    cdef RemoteRef ref
    cdef uint32_t i, n = piece.pages, left
    cdef int result
    for i in range(n):
        wanted[i].index = piece.wanted[i].index
        wanted[i].bytes = p.data + <uint64_t> piece.wanted[i].place * PAGE
    while n and not load32(&p.conn.gone, RELAXED):
        get_pages(s.links, e.pool, wanted, n, buffer + CACHE_PAGES * PAGE)
        left = 0
        for i in range(n):
            result = wanted[i].status
            if result == MISS:      # it was freed, or is stored and away again by now
                result = load_page(s, e, wanted[i].index, wanted[i].bytes, &ref)
            if result == REMOTE and not load32(&s.stopping, RELAXED):
                wanted[left] = wanted[i]
                left += 1
            elif result != OK and result != MISS:
                parked_fail(p, wanted[i].index, UNREACHABLE if result == REMOTE else result)
        n = left
    piece_free(s, piece)
    parked_done(p)


cdef void work(Server_t *s, Job *job, uint8_t *buffer) noexcept nogil:
    cdef Parked *p = job.request
    cdef Export *e
    cdef uint64_t pages
    cdef int result
    if job.kind == JOB_AGAIN:
        again(s, job, buffer)
        return
    e = p.conn.export
    if job.kind == JOB_PATCH:
        result = patch_page(s, e, job.page, job.low, job.high, job.bytes, not load32(&s.stopping, RELAXED))
        if result != OK:
            parked_fail(p, job.page, result)
    else:
        pages = min(job.pages, <uint64_t> TURN_PAGES)
        if job.kind == JOB_FREE:
            drop_pages(s, e, job.page, pages)
        elif load32(&p.conn.gone, RELAXED) or store_short_of_frames(s.store):
            pages = job.pages
        else:
            bring_pages(s, e, job.page, pages, buffer)
        job.page += pages
        job.pages -= pages
        if job.pages:
            later(p.conn, job)
            return
    parked_done(p)


cdef void *slow_main(void *argument) noexcept nogil:
    """Ends when the server stops and nothing is left to do."""
    cdef Server_t *s = <Server_t *> argument
    cdef Conn *c
    cdef Job *job
    cdef uint8_t *buffer = <uint8_t *> malloc(CACHE_PAGES * (PAGE + <size_t> reply_bytes(1)))     # address space until it is used
    ASSERT(buffer != NULL, b"no memory for a slow thread's buffer")
    while True:
        pthread_mutex_lock(&s.slow_lock)
        while s.turns_first == NULL and not s.slow_stopping:
            cond_wait_until(&s.slow_wanted, &s.slow_lock, now_ns() + 500000000ull)
        c = s.turns_first
        if c == NULL:
            pthread_mutex_unlock(&s.slow_lock)
            free(buffer)
            return NULL
        s.turns_first = c.next_turn
        if c.next_turn == NULL:
            s.turns_last = NULL
        job = c.jobs_first
        c.jobs_first = job.next
        if job.next == NULL:
            c.jobs_last = NULL
        else:
            turn_wanted(s, c)
        pthread_mutex_unlock(&s.slow_lock)
        work(s, job, buffer)


# --- requests ------------------------------------------------------------------------------------------------------

cdef uint32_t valid(Conn *c, const Request *r) noexcept nogil:
    """0, or the errno that the protocol wants for what is wrong with a request."""
    cdef uint64_t size = c.bytes    # what it was told: of growth since then it knows nothing
    cdef uint16_t flags = FLAG_FUA
    if r.type == CMD_READ and c.structured:
        flags |= FLAG_DF
    elif r.type == CMD_WRITE_ZEROES:
        flags |= FLAG_NO_HOLE | FLAG_FAST_ZERO
    elif r.type == CMD_BLOCK_STATUS:
        flags |= FLAG_REQ_ONE
    if r.type > CMD_BLOCK_STATUS or r.flags & ~flags:
        return NBD_EINVAL
    if r.type == CMD_FLUSH:
        return NBD_EINVAL if r.offset or r.length else 0
    if r.type == CMD_BLOCK_STATUS and not c.allocation:
        return NBD_EINVAL
    if c.export.read_only and (r.type == CMD_WRITE or r.type == CMD_TRIM or r.type == CMD_WRITE_ZEROES):
        return NBD_EPERM
    if r.length == 0:
        return NBD_EINVAL
    if r.offset > size or r.length > size - r.offset:
        return NBD_ENOSPC if r.type == CMD_WRITE or r.type == CMD_WRITE_ZEROES else NBD_EINVAL
    if r.length > LENGTH_MAX and (r.type == CMD_READ or r.type == CMD_WRITE):
        return NBD_EINVAL
    return 0


cdef void read_here(Conn *c, const Request *r) noexcept nogil:
    """Answer a read at once where all of it is here; else park it."""
    cdef Server_t *s = c.server
    cdef Export *e = c.export
    cdef uint8_t *start = c.out + c.out_used
    cdef uint8_t *at = start + read_header(c.structured, start, r.cookie, r.offset, r.length)
    cdef uint8_t *bytes
    cdef uint64_t offset = r.offset, end = r.offset + r.length
    cdef uint32_t low, n
    cdef bint present = False
    cdef RemoteRef ref
    cdef int result
    if r.length > DIRECT_BYTES:
        read_parked(c, r)
        return
    while offset < end:
        low = <uint32_t> (offset % PAGE)
        n = <uint32_t> min(PAGE - low, end - offset)
        bytes = at if n == PAGE and <size_t> at % 4 == 0 else c.page
        result = load_page(s, e, offset // PAGE, bytes, &ref)
        if result == REMOTE:
            read_parked(c, r)
            return
        if result != OK and result != MISS:
            report(c, offset // PAGE, result)
            tally(e, E_ERRORS, 1)
            answer(c, CMD_READ, r.cookie, error_of(result), offset)
            return
        present |= result == OK
        if bytes == c.page:
            memcpy(at, c.page + low, n)
        at += n
        offset += n
    if c.structured and not present:
        at = start + chunk_header(start, r.cookie, REPLY_OFFSET_HOLE, 12)
        put64(at, r.offset)
        put32(at + 8, r.length)
        at += 12
    c.out_used += <uint32_t> (at - start)
    tally(e, E_BYTES_READ, r.length)


cdef Parked *patch_later(Conn *c, const Request *r, Parked *p, uint64_t page, uint32_t low, uint32_t high, const uint8_t *bytes) noexcept nogil:
    """The part of a page that is away waits for it in a slow thread. There are two such pages in a request, at most."""
    cdef Job *job
    if p == NULL:
        p = parked_take(c, r, 2)
        if p == NULL:
            return NULL
        p.length = 0                # jobs so far
    job = &p.jobs[p.length]
    job.kind = JOB_PATCH
    job.request = p
    job.page = page
    job.low = low
    job.high = high
    job.bytes = NULL
    if bytes != NULL:
        memcpy(p.small + p.length * PAGE, bytes, high - low)
        job.bytes = p.small + p.length * PAGE
    p.length += 1
    add32(&p.left, 1, RELAXED)
    later(c, job)
    return p


cdef void write_begins(Conn *c, const Request *r, uint32_t error) noexcept nogil:
    c.writing = True
    c.write_cookie = r.cookie
    c.write_offset = c.write_started = r.offset
    c.write_left = r.length
    c.write_error = error
    c.write_parked = NULL


cdef bint write_goes_on(Conn *c) noexcept nogil:
    """Take what has arrived of a payload. False: more has to arrive. True: all of it has, and the answer is on its way."""
    cdef Server_t *s = c.server
    cdef Export *e = c.export
    cdef uint32_t low, n
    cdef uint8_t *bytes
    cdef Parked *p
    cdef Request r
    cdef int result
    while c.write_left:
        if load32(&s.stopping, RELAXED):            # each page may have to wait for room
            return False
        if c.write_error:           # the rest is thrown away
            n = <uint32_t> min(<uint64_t> (c.end - c.start), c.write_left)
            if n == 0:
                return False
        else:
            low = <uint32_t> (c.write_offset % PAGE)
            n = <uint32_t> min(<uint64_t> (PAGE - low), c.write_left)
            if c.end - c.start < n:
                return False
            bytes = c.arrived + c.start
            if n == PAGE:
                if <size_t> bytes % 8:
                    memcpy(c.page, bytes, PAGE)
                    bytes = c.page
                result = save_page(s, e, c.write_offset // PAGE, bytes)
            else:
                result = patch_page(s, e, c.write_offset // PAGE, low, low + n, bytes, False)
                if result == REMOTE:
                    r.cookie = c.write_cookie
                    r.offset = c.write_started
                    r.length = 0
                    r.type = CMD_WRITE
                    p = patch_later(c, &r, c.write_parked, c.write_offset // PAGE, low, low + n, bytes)
                    if p != NULL:
                        c.write_parked = p
                    result = NO_MEMORY if p == NULL else OK
            if result != OK:
                c.write_error = error_of(result)
                tally(e, E_ERRORS, c.write_parked == NULL)      # else it is counted when that ends
                if result == LOST or result == CORRUPT:
                    report(c, c.write_offset // PAGE, result)
        c.start += n
        c.write_offset += n
        c.write_left -= n
    c.writing = False
    if not c.write_error:
        tally(e, E_BYTES_WRITTEN, c.write_offset - c.write_started)
    if c.write_parked != NULL:
        if c.write_error:
            parked_error(c.write_parked, c.write_error)
        parked_done(c.write_parked)
    else:
        answer(c, CMD_WRITE, c.write_cookie, c.write_error, c.write_started)
    return True


cdef void parked_error(Parked *p, uint32_t error) noexcept nogil:
    cdef uint32_t none = 0
    cas32(&p.error, &none, error, False, ACQ_REL, RELAXED)


cdef void range_request(Conn *c, const Request *r) noexcept nogil:
    """TRIM, WRITE_ZEROES and CACHE. TRIM leaves the parts of pages at both ends alone, as it may."""
    cdef Server_t *s = c.server
    cdef Export *e = c.export
    cdef uint64_t end = r.offset + r.length, first = (r.offset + PAGE - 1) // PAGE, last = end // PAGE, page
    cdef uint32_t low, high, error = 0
    cdef Parked *p = NULL
    cdef Parked *longer
    cdef int i, result
    if r.type == CMD_CACHE:
        first = r.offset // PAGE
        last = (end + PAGE - 1) // PAGE
    elif r.type == CMD_WRITE_ZEROES:
        for i in range(2):          # the parts of pages at both ends, which may be one
            if i == 0:
                low = <uint32_t> (r.offset % PAGE)
                page = r.offset // PAGE
                high = PAGE if page != end // PAGE else <uint32_t> (end % PAGE)
                if low == 0:
                    continue
            else:
                low = 0
                page = end // PAGE
                high = <uint32_t> (end % PAGE)
                if high == 0 or (page == r.offset // PAGE and r.offset % PAGE):
                    continue
            result = patch_page(s, e, page, low, high, NULL, False)
            if result == REMOTE:
                longer = patch_later(c, r, p, page, low, high, NULL)
                result = NO_MEMORY if longer == NULL else OK
                p = longer if longer != NULL else p
            if result != OK:
                error = error_of(result)
                if result == LOST or result == CORRUPT:
                    report(c, page, result)
    if error == 0 and first < last:
        if last - first <= INLINE_PAGES and r.type != CMD_CACHE:
            drop_pages(s, e, first, last - first)
        else:
            if p == NULL:
                p = parked_take(c, r, 1)
            if p == NULL:
                error = NBD_ENOMEM
            else:
                p.jobs[2].kind = JOB_CACHE if r.type == CMD_CACHE else JOB_FREE
                p.jobs[2].request = p
                p.jobs[2].page = first
                p.jobs[2].pages = last - first
                add32(&p.left, 1, RELAXED)
                later(c, &p.jobs[2])
    if p != NULL:
        if error:
            parked_error(p, error)
        parked_done(p)
    else:
        tally(e, E_ERRORS, error != 0)
        answer(c, r.type, r.cookie, error, r.offset)


cdef void block_status(Conn *c, const Request *r) noexcept nogil:
    """What is stored and what is not; same-filled pages count as stored. At least the first extent, at most EXTENTS_MAX."""
    cdef Server_t *s = c.server
    cdef Export *e = c.export
    cdef uint8_t *start = c.out + c.out_used
    cdef uint8_t *at = start + sizeof(Chunk) + 4
    cdef uint64_t page = r.offset // PAGE, looked = 0, end = r.offset + r.length, offset = r.offset, until
    cdef uint32_t extents = 0, most = 1 if r.flags & FLAG_REQ_ONE else EXTENTS_MAX, state, before = 0, length = 0
    while offset < end and looked < SCAN_PAGES:
        state = STATE_HOLE | STATE_ZERO
        if store_slot(s.store, e.pool, NO_OBJECT, <uint32_t> page) != 0:
            state = 0
        until = min((page + 1) * PAGE, end)
        if length and state != before:
            put32(at, length)
            put32(at + 4, before)
            at += 8
            extents += 1
            length = 0
            if extents == most:
                break
        before = state
        length += <uint32_t> (until - offset)
        offset = until
        page += 1
        looked += 1
    if length:
        put32(at, length)
        put32(at + 4, before)
        at += 8
    chunk_header(start, r.cookie, REPLY_BLOCK_STATUS, <uint32_t> (at - start) - <uint32_t> sizeof(Chunk))
    put32(start + sizeof(Chunk), c.allocation_id)
    c.out_used += <uint32_t> (at - start)


cdef bint handle(Conn *c, const uint8_t *bytes) noexcept nogil:
    """One request. False: the connection ends."""
    cdef Export *e = c.export
    cdef Request r
    cdef uint32_t error
    memcpy(&r, bytes, sizeof(Request))
    if r.magic != swap32_bytes(REQUEST_MAGIC):
        say_why(c, b"the client sent something that is not a request")
        return False
    r.flags = swap16(r.flags)
    r.type = swap16(r.type)
    r.offset = swap64_bytes(r.offset)
    r.length = swap32_bytes(r.length)
    if r.type == CMD_DISC:
        say_why(c, b"the client said goodbye")
        return False
    error = valid(c, &r)
    if error:
        tally(e, E_REFUSED, 1)
        if r.type != CMD_WRITE:
            answer(c, r.type, r.cookie, error, r.offset)
        elif r.length > 2 * LENGTH_MAX:
            say_why(c, b"the client sent a write of more than 64 MiB")
            return False
        else:
            write_begins(c, &r, error)
        return True
    if r.type == CMD_READ:
        tally(e, E_READS, 1)
        read_here(c, &r)
    elif r.type == CMD_WRITE:
        tally(e, E_WRITES, 1)
        write_begins(c, &r, 0)
    elif r.type == CMD_FLUSH:
        tally(e, E_FLUSHES, 1)
        answer(c, r.type, r.cookie, 0, 0)       # what was acknowledged is where every connection sees it
    elif r.type == CMD_BLOCK_STATUS:
        tally(e, E_STATUSES, 1)
        block_status(c, &r)
    else:
        tally(e, E_TRIMS if r.type == CMD_TRIM else E_CACHES if r.type == CMD_CACHE else E_ZEROES, 1)
        range_request(c, &r)
    return True


# --- a connection's thread -----------------------------------------------------------------------------------------

cdef int receive_some(Conn *c, int flags) noexcept nogil:
    """Bytes that arrived, 0: none are there now, ENDED: the client sends no more, BROKEN: the connection has ended."""
    cdef int64_t n
    cdef int error
    while True:
        if c.ssl != NULL:
            ERR_clear_error()
            n = SSL_read(c.ssl, c.arrived + c.end, <int> (IN_BYTES - c.end))
            if n > 0:
                return <int> n
            error = SSL_get_error(c.ssl, <int> n)
            if error == SSL_ERROR_ZERO_RETURN:
                return ENDED
            return 0 if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE else BROKEN
        n = recv(c.fd, c.arrived + c.end, IN_BYTES - c.end, flags)
        if n > 0:
            return <int> n
        if n < 0 and errno == EINTR:
            continue
        return ENDED if n == 0 else 0 if errno == EAGAIN else BROKEN


cdef bint fill(Conn *c) noexcept nogil:
    """Wait until something arrives, and send what others finish meanwhile. False: the connection has ended."""
    cdef pollfd p[2]
    cdef uint64_t ignored
    cdef int n
    cdef bint alone
    if c.start == c.end:
        c.start = c.end = 0
    elif c.end > IN_BYTES - 2 * PAGE:
        memmove(c.arrived, c.arrived + c.start, c.end - c.start)
        c.end -= c.start
        c.start = 0
    while True:
        # With nobody else about, the socket is all there is to wait for.
        alone = c.ssl == NULL and load32(&c.users, ACQUIRE) == 0 and not waits_to_be_sent(c)
        n = receive_some(c, 0 if alone else MSG_DONTWAIT)
        if n > 0:
            c.end += <uint32_t> n
            return True
        if n == ENDED:
            say_why(c, b"the client went away")    # or takes the answers that are on their way, and then goes
            return False
        if n == BROKEN or load32(&c.server.stopping, RELAXED):
            stop_connection(c, b"the connection broke" if n == BROKEN else b"the node stops")
            return False
        p[0].fd = c.fd
        p[0].events = POLLIN
        p[1].fd = c.wake
        p[1].events = POLLIN
        if poll(p, 2, 1000) > 0 and p[1].revents:
            eventfd_read(c.wake, &ignored)
        if not flush_out(c):
            return False


cdef void serve(Conn *c) noexcept nogil:
    cdef bint more = True
    while more and not load32(&c.server.stopping, RELAXED):
        if c.writing:
            more = write_goes_on(c) or (flush_out(c) and fill(c))
        elif c.end - c.start >= sizeof(Request):
            c.start += sizeof(Request)
            more = handle(c, c.arrived + c.start - sizeof(Request))
        else:
            more = flush_out(c) and fill(c)
        if c.out_used >= FLUSH_BYTES and more:
            more = flush_out(c)
    if load32(&c.server.stopping, RELAXED):
        stop_connection(c, b"the node stops")
    if c.writing and c.write_parked != NULL:
        c.write_parked.cut = True
        parked_done(c.write_parked)
    flush_out(c)
    while load32(&c.users, ACQUIRE) or waits_to_be_sent(c):
        look(c)
        wait_for_users(c)
        flush_out(c)


cdef void wait_for_users(Conn *c) noexcept nogil:
    """Bounded: whatever a parked request waits for has a deadline of its own."""
    cdef pollfd p
    cdef uint64_t ignored
    p.fd = c.wake
    p.events = POLLIN
    if poll(&p, 1, LEAVE_MS) > 0:
        eventfd_read(c.wake, &ignored)


# --- Python: the server and its connections ------------------------------------------------------------------------

cdef class NbdServer:
    """The transmission phase of every export of a node. ramster.engine.nbd documents it."""

    def __cinit__(self, Links links not None, uint32_t slow_threads, uint32_t requests_max):
        cdef Server_t *s = <Server_t *> calloc(1, sizeof(Server_t))
        cdef uint32_t i
        cdef uint64_t staging = (<uint64_t> reply_bytes(PIECE_PAGES) + PAGE - 1) & ~<uint64_t> (PAGE - 1), small = SMALL_PAGES * PAGE
        if s == NULL:
            raise MemoryError
        self.s = s
        self.links = links
        self.connections = set()
        s.event_fd = -1
        if not 1 <= slow_threads <= SLOW_MAX or not 1 <= requests_max <= REQUESTS_MAX:
            raise errors.UsageError(f"slow_threads {slow_threads}, requests_max {requests_max}: allowed are 1 to {SLOW_MAX} and 1 to {REQUESTS_MAX}")
        s.links = links.live()
        s.store = s.links.store
        s.deadline_ns = max(2 * s.links.give_up_ns, <uint64_t> PATIENCE_S * 1000000000ull)
        s.rows_each = max(requests_max // 4, 1)
        pthread_mutex_init(&s.free_lock, NULL)
        cond_init_monotonic(&s.freed)
        pthread_mutex_init(&s.slow_lock, NULL)
        cond_init_monotonic(&s.slow_wanted)
        s.parked_rows = <Parked *> calloc(requests_max, sizeof(Parked))
        s.piece_rows = <Piece *> calloc(requests_max, sizeof(Piece))
        s.memory_bytes = requests_max * (small + staging)
        # Address space; a row's memory becomes RAM when it is used first, and rows are used last in, first out.
        s.memory = <uint8_t *> mmap(NULL, s.memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        s.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if s.parked_rows == NULL or s.piece_rows == NULL or s.memory == <uint8_t *> MAP_FAILED or s.event_fd < 0:
            raise MemoryError
        for i in range(requests_max):
            s.parked_rows[i].small = s.memory + i * small
            s.parked_rows[i].next = &s.parked_rows[i + 1] if i + 1 < requests_max else NULL
            s.piece_rows[i].staging = s.memory + requests_max * small + i * staging
            s.piece_rows[i].next = &s.piece_rows[i + 1] if i + 1 < requests_max else NULL
        s.parked_free = s.parked_rows
        s.piece_free = s.piece_rows
        for i in range(slow_threads):
            need_thread(&s.slow[i], slow_main, s, b"ramster-nbdslow")
            s.slow_started += 1

    cdef Export *export(self, uint32_t number) except NULL:
        if number >= EXPORTS_MAX or not self.s.exports[number].used:
            raise errors.UsageError(f"export {number}: there is none of that number")
        return &self.s.exports[number]

    @property
    def event_fd(self):
        return self.s.event_fd

    def add_export(self, uint64_t pool, uint64_t size_bytes, uint64_t max_bytes, bint read_only=False):
        cdef Export *e = NULL
        cdef uint32_t i, k
        if not 0 < size_bytes <= max_bytes or size_bytes % PAGE or max_bytes % PAGE:
            raise errors.UsageError(f"size {size_bytes}, at most {max_bytes}: whole pages of {PAGE} bytes, and at least one")
        if max_bytes // PAGE > 0xffffffff:
            raise errors.UsageError(f"at most {max_bytes} bytes: page numbers have 32 bits, so {0xffffffff * PAGE} is the most")
        pages = store_pool_pages(self.s.store, pool)
        if max_bytes // PAGE > pages:
            raise errors.UsageError(f"at most {max_bytes} bytes: pool {pool} has {pages} pages of {PAGE} bytes")
        for i in range(EXPORTS_MAX):
            if not self.s.exports[i].used:
                e = &self.s.exports[i]
                break
        else:
            raise errors.Refused(f"{EXPORTS_MAX} exports are the most that a node serves")
        memset(e, 0, sizeof(Export))
        e.pages_max = max_bytes // PAGE
        for k in range(PAGE_LOCKS):
            pthread_mutex_init(&e.locks[k], NULL)
        e.pool = pool
        e.read_only = read_only
        e.bytes = size_bytes
        e.used = 1
        return i

    def resize(self, uint32_t number, uint64_t size_bytes):
        cdef Export *e = self.export(number)
        if size_bytes < e.bytes or size_bytes > e.pages_max * PAGE or size_bytes % PAGE:
            raise errors.UsageError(f"size {size_bytes}: an export of {e.bytes} bytes grows in whole pages up to {e.pages_max * PAGE}")
        store64(&e.bytes, size_bytes, RELEASE)

    def set_read_only(self, uint32_t number, bint read_only):
        cdef Export *e = self.export(number)
        if e.connections:
            raise errors.Refused(f"{e.connections} connections use the export")
        e.read_only = read_only

    def remove_export(self, uint32_t number):
        cdef Export *e = self.export(number)
        cdef uint32_t k
        if e.connections:
            raise errors.Refused(f"{e.connections} connections use the export")
        e.used = 0
        for k in range(PAGE_LOCKS):
            pthread_mutex_destroy(&e.locks[k])

    def statistics(self, uint32_t number):
        cdef Export *e = self.export(number)
        cdef dict found = {name: load64(&e.counters[i], RELAXED) for i, name in enumerate(COUNTERS)}
        found["connections"] = e.connections
        return found

    def events(self):
        """What was found lost since the last call: (export, page, what happened), the first EVENTS_MAX of them."""
        cdef Event found[EVENTS_MAX]
        cdef uint32_t i, count
        cdef uint64_t ignored
        eventfd_read(self.s.event_fd, &ignored)
        spin_lock(&self.s.events_lock)
        count = self.s.events_count
        memcpy(found, self.s.events, count * sizeof(Event))
        self.s.events_count = 0
        spin_unlock(&self.s.events_lock)
        kinds = {LOST: "lost", CORRUPT: "corrupt", UNREACHABLE: "unreachable"}
        return [(found[i].export, found[i].page, kinds.get(found[i].kind, "lost")) for i in range(count)]

    def stop(self):
        """Every connection ends, threads are joined. Again: does nothing."""
        cdef Server_t *s = self.s
        cdef uint32_t i
        cdef uint64_t deadline
        if self.stopped or s == NULL:
            return
        self.stopped = True
        store32(&s.stopping, 1, RELEASE)
        pthread_mutex_lock(&s.free_lock)
        pthread_cond_broadcast(&s.freed)
        pthread_mutex_unlock(&s.free_lock)
        for connection in list(self.connections):
            connection.shutdown()
        deadline = ran_ns(&s.store.running) + 2 * s.deadline_ns
        while self.connections:
            ASSERT(ran_ns(&s.store.running) < deadline, b"whatever a connection waits for has a deadline")
            with nogil:
                poll(NULL, 0, 1)
        pthread_mutex_lock(&s.slow_lock)
        s.slow_stopping = 1
        pthread_cond_broadcast(&s.slow_wanted)
        pthread_mutex_unlock(&s.slow_lock)
        for i in range(s.slow_started):
            with nogil:
                pthread_join(s.slow[i], NULL)
        s.slow_started = 0

    def __dealloc__(self):
        cdef Server_t *s = self.s
        cdef uint32_t i
        if s == NULL:
            return
        if s.slow_started:
            self.stop()
        if s.memory != NULL and s.memory != <uint8_t *> MAP_FAILED:
            munmap(s.memory, s.memory_bytes)
        free(s.parked_rows)
        free(s.piece_rows)
        if s.event_fd >= 0:
            close(s.event_fd)
        free(s)


cdef class NbdConnection:
    """A connected socket of an NBD client. ramster.engine.nbd documents it."""

    def __cinit__(self, int fd):
        cdef int size = SOCKET_BYTES
        self.fd = fd
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(int))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(int))
        os.set_blocking(fd, True)

    def __dealloc__(self):
        self.close()

    cpdef close(self):
        if self.serving:
            raise errors.UsageError("the connection is being served: shut it down first")
        if self.ssl != NULL:
            SSL_free(self.ssl)
            self.ssl = NULL
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1

    def shutdown(self):
        if self.fd >= 0:
            shutdown(self.fd, SHUT_RDWR)

    cdef int wait(self, short events, uint64_t deadline_ns) except -1:
        cdef pollfd p
        cdef int64_t left = <int64_t> deadline_ns - <int64_t> now_ns()
        cdef int n = 0
        p.fd = self.fd
        p.events = events
        if left > 0:
            with nogil:
                n = poll(&p, 1, <int> (left // 1000000) + 1)
        if n <= 0:
            raise TimeoutError("the client did not go on in time")
        return 0

    cdef int wait_tls(self, int result, uint64_t deadline_ns) except -1:
        cdef int error = SSL_get_error(self.ssl, result)
        cdef const char *reason
        if error == SSL_ERROR_WANT_READ or error == SSL_ERROR_WANT_WRITE:
            return self.wait(POLLIN if error == SSL_ERROR_WANT_READ else POLLOUT, deadline_ns)
        reason = ERR_reason_error_string(ERR_get_error())
        raise ConnectionError("the client went away" if reason == NULL else f"TLS: {reason.decode()}")

    def receive(self, uint32_t size, double timeout_s):
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef uint32_t got = 0
        cdef int64_t n
        if size > RECEIVE_MAX:
            raise errors.UsageError(f"{size} bytes at once: at most {RECEIVE_MAX}")
        data = PyBytes_FromStringAndSize(NULL, size)
        cdef char *at = PyBytes_AS_STRING(data)
        while got < size:
            if self.ssl != NULL:
                ERR_clear_error()
                n = SSL_read(self.ssl, at + got, <int> (size - got))
                if n <= 0:
                    self.wait_tls(<int> n, deadline)
                    continue
            else:
                n = recv(self.fd, at + got, size - got, MSG_DONTWAIT)
                if n == 0 or (n < 0 and errno != EAGAIN and errno != EINTR):
                    raise ConnectionError("the client went away")
                if n < 0:
                    self.wait(POLLIN, deadline)
                    continue
            got += <uint32_t> n
        return data

    def send(self, bytes data, double timeout_s):
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef char *at = PyBytes_AS_STRING(data)
        cdef size_t left = <size_t> PyBytes_GET_SIZE(data)
        cdef int64_t n
        cdef iovec part
        cdef msghdr message
        while left:
            if self.ssl != NULL:
                ERR_clear_error()
                n = SSL_write(self.ssl, at, <int> min(left, 16384))
                if n <= 0:
                    self.wait_tls(<int> n, deadline)
                    continue
            else:
                part.iov_base = at
                part.iov_len = left
                memset(&message, 0, sizeof(message))
                message.msg_iov = &part
                message.msg_iovlen = 1
                n = sendmsg(self.fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL)
                if n < 0 and errno != EAGAIN and errno != EINTR:
                    raise ConnectionError("the client went away")
                if n < 0:
                    self.wait(POLLOUT, deadline)
                    continue
            at += n
            left -= <size_t> n

    def start_tls(self, TlsContext context not None, double timeout_s, bint tls_1_2=False):
        cdef uint64_t deadline = now_ns() + <uint64_t> (timeout_s * 1e9)
        cdef int result
        self.context = context
        os.set_blocking(self.fd, False)
        self.ssl = SSL_new(context.context)
        if self.ssl == NULL or SSL_set_fd(self.ssl, self.fd) != 1:
            raise MemoryError
        if tls_1_2:                     # with what of it is as good as 1.3: forward secrecy, encryption that authenticates
            if SSL_set_min_proto_version(self.ssl, TLS1_2_VERSION) != 1 or SSL_set_cipher_list(self.ssl, b"ECDHE+AESGCM:ECDHE+CHACHA20") != 1:
                raise MemoryError
            SSL_set_options(self.ssl, SSL_OP_NO_RENEGOTIATION | SSL_OP_NO_TICKET)
        SSL_set_accept_state(self.ssl)
        while True:
            ERR_clear_error()
            with nogil:
                result = SSL_do_handshake(self.ssl)
            if result == 1:
                return peer_certificate(self.ssl)
            self.wait_tls(result, deadline)

    def serve(self, NbdServer server not None, uint32_t number, bint structured, allocation_context, uint64_t told_bytes):
        cdef Export *e = server.export(number)
        cdef Conn *c
        if told_bytes > load64(&e.bytes, ACQUIRE):
            raise errors.UsageError(f"the client was told {told_bytes} bytes, and the export has {e.bytes}")
        if self.serving or self.fd < 0:
            raise errors.UsageError("the connection is closed or served already")
        if server.stopped:
            return "the node stops"
        c = <Conn *> calloc(1, sizeof(Conn))
        if c == NULL:
            raise MemoryError
        c.server = server.s
        c.export = e
        c.number = number
        c.bytes = told_bytes
        c.fd = self.fd
        c.ssl = self.ssl
        c.structured = structured
        c.allocation = allocation_context is not None
        c.allocation_id = allocation_context or 0
        c.arrived = <uint8_t *> malloc(IN_BYTES)
        c.out = <uint8_t *> malloc(OUT_BYTES)
        c.page = <uint8_t *> malloc(PAGE)
        c.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        try:
            if c.arrived == NULL or c.out == NULL or c.page == NULL or c.wake < 0:
                raise MemoryError
            # Touched before the first request: a write waits for no memory.
            memset(c.arrived, 0, IN_BYTES)
            memset(c.out, 0, OUT_BYTES)
            pthread_mutex_init(&c.send_lock, NULL)
            e.connections += 1
            self.serving = True
            server.connections.add(self)
            try:
                with nogil:
                    serve(c)
            finally:
                server.connections.discard(self)
                self.serving = False
                e.connections -= 1
                pthread_mutex_destroy(&c.send_lock)
            return c.reason.decode() if c.reason != NULL else "the client went away"
        finally:
            if c.wake >= 0:
                close(c.wake)
            free(c.arrived)
            free(c.out)
            free(c.page)
            free(c)
