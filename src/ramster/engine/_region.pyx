"""Regions: faults of an application served by native threads of the node, through userfaultfd on a shared memfd.

Covers: fault threads, evictors, pin, prefetch, evict, check. Does not cover: how an application gets its memfd and
hands over its userfaultfd (frontswap.region_service), where pages go (_store, _link).

Facts that shape it (DESIGN.md section 5), each measured on real kernels:

* The node never maps the memfd: a touch through another mapping would fill a hole with zeros and raise no event. It
  reads with pread and gives pages back by punching holes.
* Faulting threads never evict. Eviction: state 'evicting'; write-protect; read; store; punch; wake whoever waits. While a
  page is in that state no handler maps or unprotects it, so a write can never fall between the read and the punch.
* A page that a read fault brought in is mapped write-protected. As long as it is 'clean', the store has the same bytes and
  eviction only punches. If the store's copy was lost meanwhile, the resident page is what saves it: it is stored again.
* A stored copy is forgotten as soon as its page may be written, before the page can be evicted again.
* UFFDIO_COPY may do part of its work (EAGAIN) or find the page there (EEXIST); a dead application gives ESRCH.

Every event that finds its page in other hands (fetching, evicting) leaves FLAG_WAITERS there, and whoever holds the page
wakes it when done: the thread faults again and meets the new state. No event is ever just dropped.
"""
from libc.errno cimport EAGAIN, EEXIST, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset, strerror

from ramster.engine._c.atomic cimport ACQ_REL, ACQUIRE, RELAXED, RELEASE, add32, add64, load32, sched_yield, store32, sub32
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX
from ramster.engine._c.linux cimport (
    AF_UNIX, EFD_CLOEXEC, EFD_NONBLOCK, F_ADD_SEALS, F_DUPFD_CLOEXEC, F_SEAL_GROW, F_SEAL_SHRINK, FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE, MFD_ALLOW_SEALING, MFD_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, POLLIN, POLLOUT, SOCK_CLOEXEC, SOCK_SEQPACKET,
    UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_POISON, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE, UFFDIO_CONTINUE, UFFDIO_COPY, UFFDIO_COPY_MODE_WP, UFFDIO_POISON, UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_MODE_DONTWAKE, UFFDIO_WRITEPROTECT_MODE_WP, close, eventfd, eventfd_write, fallocate, fcntl, ftruncate, ioctl,
    memfd_create, poll, pollfd, pread, read, recv, send, socketpair, uffd_msg_t, uffdio_continue_t, uffdio_copy_t,
    uffdio_poison_t, uffdio_range_t, uffdio_writeprotect_t)
from ramster.engine._c.pthread cimport (
    cond_init_monotonic, cond_wait_until, now_ns, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
    pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock, start_thread)
from ramster.engine._histogram cimport quantile, record
from ramster.engine._link cimport (
    GET_PAGES_MAX, Links, Reply, links_flush, links_get, links_later, links_peer_lost, links_peer_reachable, reply_bytes,
    reply_next)
from ramster.engine._resident cimport (
    HINT_AHEAD, HINT_FAULT, NOBODY, resident_add, resident_free, resident_gone, resident_init, resident_pin, resident_unpin,
    resident_victim)
from ramster.engine._store cimport (
    BUSY, CORRUPT, LOST, MISS, NO_MEMORY, OK, PAGE, REMOTE, RemoteRef, store_census, store_create_pool,
    store_destroy_pool, store_flush, store_get, store_put, store_where)

from ramster import errors

cdef enum:
    PARKED_MAX = 1024
    RESIDENT_PAGES_MIN = 16         # one instruction may touch several pages; fewer, and threads only chase each other
    RESIDENT_PAGES_MAX = 1 << 30
    OVERDRAFT = 64                  # pages found in the memfd that may be resident beyond the budget
    SLACK = 8                       # a fault this close behind the end of a stream still belongs to it
    AHEAD_LOCAL = 1                 # windows read ahead of a sequential stream: here the decoder runs beside the reader,
    AHEAD_REMOTE = 3                # there a round trip is hidden too
    GUARD_LOST = 1
    GUARD_NOTE = 2

cdef packed struct GuardMessage:    # docs/regions.md
    uint32_t op
    uint32_t flags
    uint64_t first
    uint64_t pages
    char text[64]


# --- the kernel's side ---------------------------------------------------------------------------------------------

cdef void died(Region_t *r) noexcept nogil:
    r.dead = True


cdef void wake(Region_t *r, uint64_t page, uint64_t pages) noexcept nogil:
    cdef uffdio_range_t where
    where.start = r.base + page * PAGE
    where.len = pages * PAGE
    ioctl(r.uffd, UFFDIO_WAKE, &where)


cdef int protect(Region_t *r, uint64_t page, uint64_t pages, bint on) noexcept nogil:
    """Write-protect a run, or lift that (which also wakes). 0, or the errno."""
    cdef uffdio_writeprotect_t wp
    wp.range.start = r.base + page * PAGE
    wp.range.len = pages * PAGE
    wp.mode = UFFDIO_WRITEPROTECT_MODE_WP if on else 0
    while ioctl(r.uffd, UFFDIO_WRITEPROTECT, &wp) != 0:
        if errno == EAGAIN:
            sched_yield()           # the application's mapping is changing
            continue
        if errno == ESRCH:
            died(r)
        return errno
    return 0


cdef uint64_t copy_in(Region_t *r, uint64_t page, uint64_t pages, const uint8_t *bytes, bint protected,
                      bint *newer) noexcept nogil:
    """Map a run with these bytes and wake. Returns how many pages are there now, from the first on; 'newer' is set when
    the memfd had one of them already: what is there then is newer than anything stored."""
    cdef uffdio_copy_t copy
    cdef uffdio_continue_t more
    cdef uint64_t done = 0
    while done < pages:
        copy.dst = r.base + (page + done) * PAGE
        copy.src = <uint64_t> (bytes + done * PAGE)
        copy.len = (pages - done) * PAGE
        copy.mode = UFFDIO_COPY_MODE_WP if protected else 0
        copy.copy = 0
        if ioctl(r.uffd, UFFDIO_COPY, &copy) == 0:
            return pages
        if copy.copy > 0:
            done += <uint64_t> copy.copy // PAGE
        if errno == EEXIST:
            newer[0] = True
            more.range.start = r.base + (page + done) * PAGE
            more.range.len = PAGE
            more.mode = 0
            more.mapped = 0
            if ioctl(r.uffd, UFFDIO_CONTINUE, &more) != 0:
                wake(r, page + done, 1)
            done += 1
        elif errno == EAGAIN:
            sched_yield()
        else:
            if errno == ESRCH:
                died(r)
            return done
    return done


cdef void tell_guard(Region_t *r, uint32_t op, uint64_t first, uint64_t pages, const char *text) noexcept nogil:
    """A bounded wait: an application that does not listen is not waited for longer than a second."""
    cdef GuardMessage message
    cdef GuardMessage acknowledged
    cdef pollfd where
    cdef int i = 0
    while recv(r.guard, &message, sizeof(message), MSG_DONTWAIT) > 0:
        pass                        # acknowledgements
    memset(&message, 0, sizeof(message))
    message.op = op
    message.first = first
    message.pages = pages
    while text != NULL and i < 63 and text[i] != 0:
        message.text[i] = text[i]
        i += 1
    where.fd = r.guard
    where.events = POLLOUT
    while send(r.guard, &message, sizeof(message), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 and errno == EAGAIN and i < 10000:
        i += 1000
        poll(&where, 1, 100)
        while recv(r.guard, &acknowledged, sizeof(acknowledged), MSG_DONTWAIT) > 0:
            pass


cdef void await_note(Region_t *r) noexcept nogil:
    """Until the guardian has written the note, at most 100 ms: a thread that is woken to die takes the guardian with it."""
    cdef GuardMessage acknowledged
    cdef pollfd where
    cdef ssize_t got
    cdef uint64_t deadline = now_ns() + 100000000ull
    where.fd = r.guard
    where.events = POLLIN
    while now_ns() < deadline and not load32(&r.stopping, ACQUIRE):
        poll(&where, 1, 10)
        while True:
            got = recv(r.guard, &acknowledged, sizeof(acknowledged), MSG_DONTWAIT)
            if got == 0 or (got > 0 and acknowledged.op == GUARD_NOTE):
                return
            if got < 0:
                break


cdef void poison(Region_t *r, uint64_t page) noexcept nogil:
    """From now on a touch of this page is SIGBUS, whatever the kernel: zeros are never an answer."""
    cdef uffdio_poison_t p
    cdef uffdio_writeprotect_t wp
    if r.can_poison:
        # Punching a write-protected page leaves a marker in its page-table entry (unmap_mapping_range keeps it), and POISON
        # takes only an entry that is empty: lift the protection of what is not even there.
        wp.range.start = r.base + page * PAGE
        wp.range.len = PAGE
        wp.mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        while ioctl(r.uffd, UFFDIO_WRITEPROTECT, &wp) != 0 and errno == EAGAIN:
            sched_yield()
        p.range.start = r.base + page * PAGE
        p.range.len = PAGE
        p.mode = 0
        p.updated = 0
        while ioctl(r.uffd, UFFDIO_POISON, &p) != 0 and errno == EAGAIN:
            sched_yield()
        wake(r, page, 1)
    else:
        tell_guard(r, GUARD_LOST, page, 1, NULL)


# --- states --------------------------------------------------------------------------------------------------------

cdef inline int state_of(Region_t *r, uint64_t page) noexcept nogil:
    return r.states[page] & STATE_MASK


cdef inline bint set_state(Region_t *r, uint64_t page, int state) noexcept nogil:
    """Under the lock: the new state; True when somebody waits for the page and must be woken."""
    cdef bint waiters = r.states[page] & FLAG_WAITERS
    r.states[page] = <uint8_t> ((r.states[page] & FLAG_PINNED) | state)
    return waiters


cdef inline bint has_room(Region_t *r) noexcept nogil:
    return r.resident < r.budget


cdef inline bint is_short(Region_t *r) noexcept nogil:
    return r.resident + r.reserve // 2 > r.budget


cdef void want_room(Region_t *r) noexcept nogil:
    """Under the lock: evictors sleep until half of the reserve is used, then work in whole batches until it is full again.
    Woken for each page they would write out pages one by one, five times as dear."""
    if is_short(r):
        pthread_cond_signal(&r.work)


cdef void arrived(Region_t *r, uint64_t first, uint64_t count, int state) noexcept nogil:
    """Pages that were being fetched are resident now."""
    cdef uint64_t page
    cdef bint waiters = False
    pthread_mutex_lock(&r.lock)
    for page in range(first, first + count):
        resident_add(&r.set, <uint32_t> page, HINT_AHEAD if r.states[page] & FLAG_AHEAD else HINT_FAULT)
        waiters |= set_state(r, page, state)
    want_room(r)
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    if waiters:
        wake(r, first, count)


cdef void not_arrived(Region_t *r, uint64_t first, uint64_t count) noexcept nogil:
    """Pages that were to be fetched stay away; whoever waits faults again and meets the reason itself."""
    cdef uint64_t page
    pthread_mutex_lock(&r.lock)
    for page in range(first, first + count):
        set_state(r, page, PAGE_AWAY)
        r.resident -= 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    wake(r, first, count)


cdef void page_lost(Region_t *r, uint64_t page, int state) noexcept nogil:
    """The state is lost, which may end (a lender comes back), or damaged, which does not."""
    pthread_mutex_lock(&r.lock)
    set_state(r, page, state)
    r.resident -= 1
    r.lost += 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    poison(r, page)


cdef void park(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock: a fault waits until an evictor has made room; the evictor wakes it."""
    cdef uint64_t i
    r.faults_parked += 1
    if r.parked_count == 0:
        r.parked_since_ns = now_ns()
    for i in range(r.parked_count):
        if r.parked[i] == page:
            break
    else:
        if r.parked_count < PARKED_MAX:
            r.parked[r.parked_count] = <uint32_t> page
            r.parked_count += 1
        else:
            r.states[page] |= FLAG_WAITERS
            r.parked_overflow = True        # found by a walk when there is room
    pthread_cond_signal(&r.work)


cdef void unpark(Region_t *r) noexcept nogil:
    """Wake as many parked faults as there is room for."""
    cdef uint32_t pages[PARKED_MAX]
    cdef uint64_t n = 0, i
    pthread_mutex_lock(&r.lock)
    while r.parked_count and r.resident + n < r.budget:
        r.parked_count -= 1
        pages[n] = r.parked[r.parked_count]
        n += 1
    if r.parked_count == 0 and r.parked_overflow:
        r.parked_overflow = False
        for i in range(r.pages):
            if r.states[i] & FLAG_WAITERS and state_of(r, i) == PAGE_AWAY:
                r.states[i] &= ~FLAG_WAITERS
                wake(r, i, 1)
    r.parked_since_ns = now_ns()
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        wake(r, pages[i], 1)


# --- bringing pages in ---------------------------------------------------------------------------------------------

cdef void window(Region_t *r, uint64_t page, uint64_t *low, uint64_t *high, Stream **stream) noexcept nogil:
    """Under the lock: which pages this fault asks for. A stream that goes on doubles its window; a stray fault gets one page."""
    cdef Stream *s
    cdef Stream *oldest = &r.streams[0]
    cdef int i
    r.clock += 1
    for i in range(STREAMS):
        s = &r.streams[i]
        if s.used < oldest.used:
            oldest = s
        if s.used == 0:
            continue
        if s.next_up <= page < <uint64_t> s.next_up + SLACK:
            s.window = min(s.window * 2, <uint32_t> WINDOW_MAX)
            low[0] = page
            high[0] = min(page + s.window, r.pages)
            break
        if page < s.next_down and page + SLACK >= s.next_down:
            s.window = min(s.window * 2, <uint32_t> WINDOW_MAX)
            low[0] = page + 1 - min(page + 1, <uint64_t> s.window)
            high[0] = page + 1
            break
    else:
        s = oldest
        s.window = 1
        low[0] = page
        high[0] = page + 1
    s.used = r.clock
    stream[0] = s


cdef enum:
    KIND_ABSENT = 0                 # not to be had now: whoever waits faults again
    KIND_READ = 1                   # to be mapped write-protected
    KIND_WRITE = 2                  # to be mapped writable
    KIND_LOST = 3
    KIND_DAMAGED = 4
    KIND_DONE = 5                   # served already


cdef inline int kind_of_loss(int status) noexcept nogil:
    return KIND_DAMAGED if status == CORRUPT else KIND_LOST


cdef Batch *take_batch(Region_t *r) noexcept nogil:
    """Under the lock: a free batch, or NULL."""
    cdef int i
    cdef Batch *b
    for i in range(BATCHES_MAX):
        b = &r.batches[i]
        if not b.used:
            if b.bytes == NULL:
                b.bytes = <uint8_t *> malloc(WINDOW_MAX * PAGE + WINDOW_MAX * <size_t> reply_bytes(1))
                if b.bytes == NULL:
                    return NULL
                b.staging = b.bytes + WINDOW_MAX * PAGE
            b.used = True
            b.region = r
            b.remote = b.write_all = b.write_wanted = False
            b.outstanding = 1
            b.started_ns = now_ns()
            r.batches_used += 1
            return b
    return NULL


cdef void serve_run(Batch *b, uint32_t i, uint32_t j, uint8_t kind) noexcept nogil:
    """Pages i to j of a batch have arrived or failed in the same way: map them, forget stored copies of what may be
    written, wake."""
    cdef Region_t *r = b.region
    cdef uint32_t k, done
    cdef uint64_t zero[3]
    cdef bint newer = False, dirty
    if kind == KIND_LOST or kind == KIND_DAMAGED:
        for k in range(i, j):
            page_lost(r, b.first + k, PAGE_LOST if kind == KIND_LOST else PAGE_DAMAGED)
    elif kind == KIND_ABSENT:
        not_arrived(r, b.first + i, j - i)
    elif kind != KIND_DONE:
        done = <uint32_t> copy_in(r, b.first + i, j - i, b.bytes + i * PAGE, kind == KIND_READ, &newer)
        dirty = newer or kind == KIND_WRITE
        if dirty:
            for k in range(i, i + done):
                store_flush(r.store, r.pool, zero, <uint32_t> (b.first + k))
        if newer and done:
            protect(r, b.first + i, done, False)
        if done:
            arrived(r, b.first + i, done, PAGE_DIRTY if dirty else PAGE_CLEAN)
        if done < j - i:
            not_arrived(r, b.first + i + done, j - i - done)


cdef void finish_batch(Batch *b) noexcept nogil:
    """Everything has arrived or failed: serve it run by run."""
    cdef Region_t *r = b.region
    cdef uint32_t i = 0, j
    cdef bint parked
    while i < b.count:
        j = i + 1
        while j < b.count and b.kinds[j] == b.kinds[i]:
            j += 1
        serve_run(b, i, j, b.kinds[i])
        i = j
    if b.fault:
        record(&r.remote_ns if b.remote else &r.local_ns, now_ns() - b.started_ns)
    pthread_mutex_lock(&r.lock)
    b.used = False
    parked = r.parked_count != 0 and has_room(r)
    pthread_mutex_unlock(&r.lock)
    if parked:
        unpark(r)
    pthread_mutex_lock(&r.lock)
    r.batches_used -= 1             # last: from here on the region may go
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)


cdef inline bint to_be_written(Batch *b, uint32_t i) noexcept nogil:
    return b.write_all or (b.write_wanted and i == b.wanted)


cdef inline uint8_t kind_of(Batch *b, uint32_t i, int status) noexcept nogil:
    """A page that nobody waits for and that cannot be had is left for whoever touches it."""
    if status == OK:
        return KIND_WRITE if to_be_written(b, i) else KIND_READ
    return KIND_ABSENT if status == BUSY or i != b.wanted else kind_of_loss(status)


cdef void batch_answered(void *context, Reply *reply) noexcept nogil:
    """A lender answered for the pages of one segment, or will not: from a thread of the links."""
    cdef Batch *b = <Batch *> context
    cdef uint32_t k, i
    for k in range(reply.pages):
        i = reply.wanted[k].place
        b.kinds[i] = kind_of(b, i, reply_next(reply, b.bytes + i * PAGE))
    if sub32(&b.outstanding, 1, ACQ_REL) == 0:
        finish_batch(b)


cdef int bring_in(Region_t *r, Batch *b) noexcept nogil:
    """Serve the pages of a batch, which are in state fetching: local ones before this returns, since a lender may be slow
    or gone, remote ones together when the last lender has answered. Those of one segment are asked for together. Returns
    what the wanted page met: MISS (never written), OK, REMOTE or LOST."""
    cdef uint32_t i, j, k, g, groups = 0, at = 0, peer = 0
    cdef uint64_t zero[3]
    cdef RemoteRef ref
    cdef RemoteRef refs[WINDOW_MAX]     # of the segments that hold what is away
    cdef uint32_t pages[WINDOW_MAX]     # how many of the batch lie in each
    cdef uint8_t group[WINDOW_MAX]
    cdef uint64_t slots[WINDOW_MAX]
    cdef uint16_t ordinals[WINDOW_MAX]
    cdef uint8_t here[WINDOW_MAX]       # kinds of what is in no lender's hands
    cdef uint8_t *staging = b.staging
    cdef int result, wanted_result = OK
    cdef bint sent = False
    for i in range(b.count):
        here[i] = KIND_DONE
        result = store_get(r.store, r.pool, zero, <uint32_t> (b.first + i), b.bytes + i * PAGE, -1, &ref)
        if i == b.wanted:
            wanted_result = result
        if result == REMOTE:
            g = groups
            while g > 0 and (refs[g - 1].segment != ref.segment or refs[g - 1].generation != ref.generation):
                g -= 1
            if g == 0:
                refs[groups] = ref
                pages[groups] = 0
                groups += 1
                g = groups
            group[i] = <uint8_t> g
            pages[g - 1] += 1
            slots[i] = ref.slot
            ordinals[i] = <uint16_t> ref.ordinal
            continue
        if result == MISS:
            memset(b.bytes + i * PAGE, 0, PAGE)
            result = OK
        here[i] = b.kinds[i] = kind_of(b, i, result)
    if groups:
        b.remote = True
        add32(&b.outstanding, groups, ACQ_REL)
    for g in range(groups):
        k = at
        for i in range(b.count):
            if here[i] == KIND_DONE and group[i] == g + 1:
                b.asked[k].slot = slots[i]
                b.asked[k].index = <uint32_t> (b.first + i)
                b.asked[k].ordinal = ordinals[i]
                b.asked[k].place = <uint16_t> i
                k += 1
        if sent and peer != refs[g].peer:
            links_flush(r.links, peer)
        peer = refs[g].peer
        result = links_get(r.links, &refs[g], &b.asked[at], k - at, staging, batch_answered, b, groups == 1)
        sent = sent or result == OK
        if result != OK:
            for k in range(at, at + pages[g]):
                i = b.asked[k].place
                here[i] = b.kinds[i] = kind_of(b, i, result)
            sub32(&b.outstanding, 1, ACQ_REL)
        at += pages[g]
        staging += pages[g] * reply_bytes(1)
    if sent and groups > 1:
        links_flush(r.links, peer)
    if sent:
        i = 0
        while i < b.count:
            j = i + 1
            while j < b.count and here[j] == here[i]:
                j += 1
            if here[i] != KIND_DONE:
                serve_run(b, i, j, here[i])
                memset(b.kinds + i, KIND_DONE, j - i)
            i = j
    if sub32(&b.outstanding, 1, ACQ_REL) == 0:
        finish_batch(b)
    return wanted_result


cdef void bring_in_later(void *context, EVP_CIPHER_CTX *ctx) noexcept nogil:
    """By a worker of the links."""
    cdef Batch *b = <Batch *> context
    bring_in(b.region, b)


cdef void claim(Region_t *r, uint64_t page, uint64_t low, uint64_t high, Batch *b) noexcept nogil:
    """Under the lock, with room for a page: put the wanted page and the neighbours that are away too into state fetching."""
    cdef uint64_t end = page + 1, room = r.budget - r.resident
    cdef uint64_t first = page, at
    while end < high and end - page < room and r.states[end] & ~FLAG_PINNED == PAGE_AWAY:
        end += 1
    while first > low and end - first < room and r.states[first - 1] & ~FLAG_PINNED == PAGE_AWAY:
        first -= 1
    b.first = first
    b.count = <uint32_t> (end - first)
    b.wanted = <uint32_t> (page - first)
    for at in range(first, end):
        r.states[at] = <uint8_t> ((r.states[at] & ~STATE_MASK) | PAGE_FETCHING | (FLAG_AHEAD if at != page and b.fault else 0))
    r.resident += b.count
    want_room(r)


cdef void make_writable(Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    """Clean pages that this thread has put into state fetching become dirty: the stored copy goes before the writer does."""
    cdef uint64_t page, zero[3]
    for page in range(first, end):
        store_flush(r.store, r.pool, zero, <uint32_t> page)
    protect(r, first, end - first, False)
    arrived(r, first, end - first, PAGE_DIRTY)


cdef void read_ahead(Region_t *r, Stream *stream, uint64_t page, bint upwards, int windows, bint write) noexcept nogil:
    """The thread that faulted runs again; what it will ask for next comes in meanwhile, window by window. Takes room only
    while evictors keep up."""
    cdef Batch *b
    cdef uint64_t at
    cdef int i
    for i in range(windows):
        if page >= r.pages:
            return
        pthread_mutex_lock(&r.lock)
        b = NULL
        if r.states[page] & ~FLAG_PINNED == PAGE_AWAY and \
                r.resident + r.reserve // 4 + WINDOW_MAX <= r.budget and r.batches_used < BATCHES_MAX // 2:
            b = take_batch(r)
        if b == NULL:
            pthread_mutex_unlock(&r.lock)
            return
        b.fault = False
        if upwards:
            claim(r, page, page, min(page + WINDOW_MAX, r.pages), b)
            page = b.first + b.count
            stream.next_up = <uint32_t> page
        else:
            claim(r, page, page + 1 - min(page + 1, <uint64_t> WINDOW_MAX), page + 1, b)
            stream.next_down = <uint32_t> b.first
            page = b.first - 1          # below page 0 this is beyond the end
        for at in range(b.first, b.first + b.count):
            r.states[at] |= FLAG_AHEAD
        b.wanted = WINDOW_MAX           # nobody waits
        b.write_all = write
        pthread_mutex_unlock(&r.lock)
        if not links_later(r.links, bring_in_later, b):
            bring_in(r, b)


# --- fault threads -------------------------------------------------------------------------------------------------

cdef void on_missing(Region_t *r, uint64_t page, bint write) noexcept nogil:
    cdef uint64_t low, high
    cdef Stream *stream
    cdef Batch *b
    cdef int state, met
    cdef bint sequential, upwards
    cdef uint64_t next
    pthread_mutex_lock(&r.lock)
    r.faults += 1
    state = state_of(r, page)
    if state != PAGE_AWAY:
        if state == PAGE_FETCHING or state == PAGE_EVICTING:
            r.states[page] |= FLAG_WAITERS
            pthread_mutex_unlock(&r.lock)
            return
        pthread_mutex_unlock(&r.lock)
        if state == PAGE_LOST or state == PAGE_DAMAGED:
            poison(r, page)
        else:
            wake(r, page, 1)        # it came in meanwhile
        return
    b = take_batch(r) if has_room(r) else NULL
    if b == NULL:
        park(r, page)
        pthread_mutex_unlock(&r.lock)
        return
    b.fault = True
    window(r, page, &low, &high, &stream)
    sequential = stream.window > 2
    claim(r, page, low, high, b)
    stream.next_up = <uint32_t> (b.first + b.count)
    stream.next_down = <uint32_t> b.first
    upwards = low == page
    next = b.first + b.count if upwards else b.first - 1
    pthread_mutex_unlock(&r.lock)
    # A writer that goes through the pages in order gets them writable at once: no second fault on each.
    b.write_all = write and sequential
    b.write_wanted = write
    met = bring_in(r, b)
    if met == REMOTE:
        add64(&r.faults_remote, 1, RELAXED)
    elif met == MISS:
        add64(&r.faults_zero, 1, RELAXED)
    elif met == OK:
        add64(&r.faults_local, 1, RELAXED)
    if stream.window == WINDOW_MAX:
        read_ahead(r, stream, next, upwards, AHEAD_REMOTE if met == REMOTE else AHEAD_LOCAL, write)


cdef void on_protected(Region_t *r, uint64_t page) noexcept nogil:
    """A write to a clean page, and to those after (or before) it when the writer goes on in order."""
    cdef uint64_t low, high, first = page, end = page + 1
    cdef Stream *stream
    cdef int state
    pthread_mutex_lock(&r.lock)
    r.faults_wp += 1
    state = state_of(r, page)
    if state == PAGE_CLEAN or state == PAGE_DIRTY:
        # A dirty page that is still protected was given back by an evictor that found no room. It too is taken in hand
        # while its protection is lifted: an evictor that came in between would lose the write that follows.
        if state == PAGE_CLEAN:
            window(r, page, &low, &high, &stream)
            while end < high and state_of(r, end) == PAGE_CLEAN:
                end += 1
            while first > low and state_of(r, first - 1) == PAGE_CLEAN:
                first -= 1
            stream.next_up = <uint32_t> end
            stream.next_down = <uint32_t> first
        for page in range(first, end):
            r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_FETCHING)
        pthread_mutex_unlock(&r.lock)
        make_writable(r, first, end)
        return
    if state == PAGE_FETCHING or state == PAGE_EVICTING:
        r.states[page] |= FLAG_WAITERS
    pthread_mutex_unlock(&r.lock)
    if state == PAGE_AWAY or state == PAGE_LOST or state == PAGE_DAMAGED:
        wake(r, page, 1)            # evicted meanwhile: the writer takes a missing fault


cdef void on_minor(Region_t *r, uint64_t page) noexcept nogil:
    """In the memfd but not mapped. Whatever is there is the page: it counts as dirty."""
    cdef uffdio_continue_t more
    cdef uint64_t zero[3]
    cdef int state
    pthread_mutex_lock(&r.lock)
    r.faults_minor += 1
    state = state_of(r, page)
    if state == PAGE_FETCHING or state == PAGE_EVICTING:
        r.states[page] |= FLAG_WAITERS
        pthread_mutex_unlock(&r.lock)
        return
    if state != PAGE_CLEAN and state != PAGE_DIRTY:
        if r.resident >= r.budget + OVERDRAFT:
            park(r, page)
            pthread_mutex_unlock(&r.lock)
            return
        r.resident += 1             # over the budget by one per faulting thread; evictors see to it
    if (state == PAGE_LOST or state == PAGE_DAMAGED) and not r.states[page] & FLAG_REFUSED:
        r.lost -= 1
    r.states[page] = <uint8_t> ((r.states[page] & ~(STATE_MASK | FLAG_REFUSED)) | PAGE_FETCHING)
    pthread_mutex_unlock(&r.lock)
    store_flush(r.store, r.pool, zero, <uint32_t> page)
    more.range.start = r.base + page * PAGE
    more.range.len = PAGE
    more.mode = 0
    more.mapped = 0
    while ioctl(r.uffd, UFFDIO_CONTINUE, &more) != 0 and errno == EAGAIN:
        sched_yield()
    protect(r, page, 1, False)
    arrived(r, page, 1, PAGE_DIRTY)


cdef void *fault_main(void *argument) noexcept nogil:
    cdef Region_t *r = <Region_t *> argument
    cdef uffd_msg_t events[16]
    cdef pollfd fds[2]
    cdef int i
    cdef ssize_t got
    cdef uint64_t page
    fds[0].fd = r.uffd
    fds[1].fd = r.stop_fd
    fds[0].events = fds[1].events = POLLIN
    while not load32(&r.stopping, ACQUIRE) and not r.dead:
        poll(fds, 2, 500)
        got = read(r.uffd, events, sizeof(events))
        if got <= 0:
            continue
        for i in range(<int> (got // <ssize_t> sizeof(uffd_msg_t))):
            if events[i].event != UFFD_EVENT_PAGEFAULT or events[i].address < r.base:
                continue
            page = (events[i].address - r.base) // PAGE
            if page >= r.pages:
                continue
            if events[i].flags & UFFD_PAGEFAULT_FLAG_WP:
                on_protected(r, page)
            elif events[i].flags & UFFD_PAGEFAULT_FLAG_MINOR:
                on_minor(r, page)
            else:
                on_missing(r, page, (events[i].flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0)
    return NULL


# --- eviction ------------------------------------------------------------------------------------------------------

cdef void sort_pages(uint32_t *pages, uint32_t n) noexcept nogil:
    cdef uint32_t i, j, page
    for i in range(1, n):
        page = pages[i]
        j = i
        while j > 0 and pages[j - 1] > page:
            pages[j] = pages[j - 1]
            j -= 1
        pages[j] = page


cdef bint stored_copy_good(Region_t *r, uint64_t page) noexcept nogil:
    """Can this page be had again? Not if its only copy is lost, or held by a lender that has been away for too long."""
    cdef uint32_t peer = 0
    cdef uint64_t slot = 0
    cdef int where = store_where(r.store, r.pool, <uint32_t> page, &peer, &slot)
    return where == OK or where == MISS or (where == REMOTE and not links_peer_lost(r.links, peer))


cdef bint stored_copy_at_hand(Region_t *r, uint64_t page) noexcept nogil:
    """Stricter: a lender that does not answer now may be gone for good, and the page that is still here is what is left."""
    cdef uint32_t peer = 0
    cdef uint64_t slot = 0
    cdef int where = store_where(r.store, r.pool, <uint32_t> page, &peer, &slot)
    return where == OK or where == MISS or (where == REMOTE and links_peer_reachable(r.links, peer))


cdef uint32_t evict(Region_t *r, uint32_t *pages, uint32_t n, uint8_t *clean, uint8_t *buffer) noexcept nogil:
    """Write out pages that this thread has put into state evicting (sorted; clean[i]: it was clean). Returns how many
    left; those for which there was no room stay resident, dirty and writable."""
    cdef uint32_t i, j, k, evicted = 0
    cdef uint64_t zero[3]
    cdef uint8_t gone[BATCH]
    cdef bint waiters[BATCH]
    cdef ssize_t got
    cdef bint full = False
    cdef uint64_t first
    for i in range(n):
        gone[i] = 0
        if clean[i] and not stored_copy_at_hand(r, pages[i]):
            clean[i] = 0
    # 1. Nobody can write any more to what is going to be read.
    i = 0
    while i < n:
        j = i + 1
        while j < n and pages[j] == pages[j - 1] + 1 and clean[j] == clean[i]:
            j += 1
        if clean[i]:
            for k in range(i, j):
                gone[k] = 1
        elif protect(r, pages[i], j - i, True) == 0:
            # 2. Read the run and store its pages.
            first = <uint64_t> pages[i]
            got = pread(r.memfd, buffer, (j - i) * PAGE, <long> (first * PAGE))
            for k in range(i, j):
                if not full and got >= <ssize_t> ((k - i + 1) * PAGE):
                    full = store_put(r.store, r.pool, zero, pages[k], buffer + (k - i) * PAGE, r.full_wait_ns) != OK
                    gone[k] = not full
        i = j
    # 3. Give the memory back: the next touch is a missing fault.
    i = 0
    while i < n:
        j = i + 1
        while j < n and pages[j] == pages[j - 1] + 1 and gone[j] == gone[i]:
            j += 1
        if gone[i]:
            if fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> pages[i] * PAGE, <long> (j - i) * PAGE) != 0:
                for k in range(i, j):
                    gone[k] = 0
        i = j
    pthread_mutex_lock(&r.lock)
    for i in range(n):
        waiters[i] = set_state(r, pages[i], PAGE_AWAY if gone[i] else PAGE_FETCHING)
        if gone[i]:
            resident_gone(&r.set, pages[i])
            r.resident -= 1
            evicted += 1
            r.evictions += 1
            if clean[i]:
                r.evictions_clean += 1
    if evicted:
        r.full = False
    if full:
        r.full = True
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        if not gone[i]:
            make_writable(r, pages[i], pages[i] + 1)
        elif waiters[i]:
            wake(r, pages[i], 1)
    return evicted


cdef void refuse(Region_t *r) noexcept nogil:
    """Faults have waited for room as long as they may: the application is told plainly, by SIGBUS and a line on stderr."""
    cdef uint32_t pages[PARKED_MAX]
    cdef uint64_t n = 0, i
    pthread_mutex_lock(&r.lock)
    for i in range(r.parked_count):
        if state_of(r, r.parked[i]) == PAGE_AWAY:       # what came in meanwhile has been woken
            pages[n] = r.parked[i]
            n += 1
            set_state(r, r.parked[i], PAGE_LOST)
            r.states[r.parked[i]] |= FLAG_REFUSED
    r.parked_count = 0
    r.refused += n
    pthread_mutex_unlock(&r.lock)
    if n:
        tell_guard(r, GUARD_NOTE, pages[0], n, b"region full: no room here and no lender has any; SIGBUS")
        await_note(r)
    for i in range(n):
        poison(r, pages[i])


cdef void *evictor_main(void *argument) noexcept nogil:
    cdef Region_t *r = <Region_t *> argument
    cdef uint32_t pages[BATCH]
    cdef uint8_t clean[BATCH]
    cdef uint8_t *buffer = <uint8_t *> malloc(BATCH * PAGE)
    cdef uint32_t n, evicted
    cdef uint64_t looked
    cdef int64_t page
    cdef int state
    ASSERT(buffer != NULL, b"no memory for an evictor's buffer")
    memset(buffer, 0, BATCH * PAGE)
    while not load32(&r.stopping, ACQUIRE) and not r.dead:
        pthread_mutex_lock(&r.lock)
        if not is_short(r):
            cond_wait_until(&r.work, &r.lock, now_ns() + 200000000ull)
        n = 0
        looked = 2 * BATCH if is_short(r) else 0
        while n < BATCH and looked > 0 and r.resident + r.reserve > r.budget + n:
            looked -= 1
            page = resident_victim(&r.set)
            if page == NOBODY:
                break
            state = state_of(r, page)
            if r.states[page] & FLAG_PINNED:
                resident_pin(&r.set, <uint32_t> page)
            elif state == PAGE_CLEAN or state == PAGE_DIRTY:
                pages[n] = <uint32_t> page
                n += 1
            else:
                ASSERT(state == PAGE_FETCHING or state == PAGE_EVICTING, b"only what is resident can be chosen to leave")
                resident_add(&r.set, <uint32_t> page, HINT_FAULT)
        sort_pages(pages, n)
        for looked in range(n):
            clean[looked] = state_of(r, pages[looked]) == PAGE_CLEAN
            r.states[pages[looked]] = <uint8_t> ((r.states[pages[looked]] & ~STATE_MASK) | PAGE_EVICTING)
        pthread_mutex_unlock(&r.lock)
        evicted = evict(r, pages, n, clean, buffer) if n else 0
        if r.parked_count and has_room(r):
            unpark(r)
        elif r.parked_count:
            # What waits for a lender's answer makes room within give_up; only a store that refuses is full before.
            if now_ns() - r.parked_since_ns > r.full_wait_ns + (0 if r.full else r.links.give_up_ns):
                refuse(r)
            pthread_mutex_lock(&r.lock)
            cond_wait_until(&r.work, &r.lock, now_ns() + 5000000ull)
            pthread_mutex_unlock(&r.lock)
        elif n == 0 and is_short(r):
            pthread_mutex_lock(&r.lock)         # everything is pinned or in other hands
            cond_wait_until(&r.changed, &r.lock, now_ns() + 5000000ull)
            pthread_mutex_unlock(&r.lock)
    free(buffer)
    return NULL


# --- what the application asks for ---------------------------------------------------------------------------------

cdef enum Outcome:
    DONE = 0
    GONE_LOST = 1
    GONE_FULL = 2
    GONE_STOPPED = 3


cdef int make_resident(Region_t *r, uint64_t first, uint64_t end, bint writable, uint64_t deadline) noexcept nogil:
    """Bring a run of at most WINDOW_MAX pages in and wait for it. Writable: dirty and mapped for writing when it returns."""
    cdef uint64_t page
    cdef Batch *b
    cdef int state
    cdef bint all_there
    while True:
        all_there = True
        pthread_mutex_lock(&r.lock)
        for page in range(first, end):
            if load32(&r.stopping, ACQUIRE) or r.dead:
                pthread_mutex_unlock(&r.lock)
                return GONE_STOPPED
            state = state_of(r, page)
            if state == PAGE_DAMAGED:
                pthread_mutex_unlock(&r.lock)
                return GONE_LOST
            if state == PAGE_LOST:
                # Out of reach a moment ago is not gone for ever; refused for want of room is not lost at all. But what
                # the guardian has mapped over stays so.
                if not stored_copy_good(r, page) or not r.can_poison:
                    state = GONE_FULL if r.states[page] & FLAG_REFUSED else GONE_LOST
                    pthread_mutex_unlock(&r.lock)
                    return state
                if not r.states[page] & FLAG_REFUSED:
                    r.lost -= 1
                set_state(r, page, PAGE_AWAY)
                state = PAGE_AWAY
            if state == PAGE_DIRTY or (state == PAGE_CLEAN and not writable):
                continue
            all_there = False
            if state == PAGE_CLEAN:
                r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_FETCHING)
                pthread_mutex_unlock(&r.lock)
                make_writable(r, page, page + 1)
                break
            b = take_batch(r) if state == PAGE_AWAY and has_room(r) else NULL
            if b != NULL:
                b.fault = False
                b.write_all = writable
                claim(r, page, page, end, b)
                pthread_mutex_unlock(&r.lock)
                bring_in(r, b)
            else:
                pthread_cond_signal(&r.work)
                cond_wait_until(&r.changed, &r.lock, min(deadline, now_ns() + 50000000ull))
                pthread_mutex_unlock(&r.lock)
            break
        else:
            pthread_mutex_unlock(&r.lock)
        if all_there:
            return DONE
        if now_ns() > deadline:
            return GONE_FULL


cdef void await_evictors(Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    """Until nobody else is writing pages of this run out either; bounded as each eviction is."""
    cdef uint64_t deadline = now_ns() + r.full_wait_ns + 1000000000ull
    pthread_mutex_lock(&r.lock)
    while first < end and now_ns() < deadline and not load32(&r.stopping, ACQUIRE):
        if state_of(r, first) == PAGE_EVICTING:
            cond_wait_until(&r.changed, &r.lock, now_ns() + 50000000ull)
        else:
            first += 1
    pthread_mutex_unlock(&r.lock)


cdef class Region:
    """One region of one application. See the stub for its contract."""

    def __cinit__(self, Links links not None, uint64_t pages, uint64_t resident_pages, *, str name, uint32_t fault_threads=1,
                  uint32_t evictor_threads=1, uint64_t full_wait_ms=2000, str poison="auto"):
        cdef Region_t *r
        cdef int pair[2]
        cdef int result
        self.app_guard = -1
        if not 0 < pages <= 1 << 32:
            raise errors.UsageError(f"a region of {pages} pages: must be 1 to 2^32")
        if resident_pages < RESIDENT_PAGES_MIN and resident_pages < pages:
            raise errors.UsageError(f"{resident_pages} resident pages: a region needs at least {RESIDENT_PAGES_MIN}")
        if min(resident_pages, pages) > RESIDENT_PAGES_MAX:
            raise errors.UsageError(f"{resident_pages} resident pages: a region has at most {RESIDENT_PAGES_MAX}")
        if not 1 <= fault_threads <= THREADS_MAX or not 1 <= evictor_threads <= THREADS_MAX:
            raise errors.UsageError(f"a region has 1 to {THREADS_MAX} threads of each kind")
        r = <Region_t *> calloc(1, sizeof(Region_t))
        if r == NULL:
            raise MemoryError
        self.r = r
        self.links = links
        self.name = name
        r.memfd = r.guard = r.uffd = r.stop_fd = -1
        r.links = links.live()
        r.store = r.links.store
        r.pages = pages
        r.budget = resident_pages
        # Where everything fits, nothing ever has to leave.
        if resident_pages < pages:
            r.reserve = min(max(resident_pages // 16, <uint64_t> BATCH), resident_pages // 4)
        r.full_wait_ns = full_wait_ms * 1000000
        r.fault_threads = fault_threads
        r.evictor_threads = evictor_threads
        r.can_poison = poison == "auto"
        pthread_mutex_init(&r.lock, NULL)
        cond_init_monotonic(&r.changed)
        cond_init_monotonic(&r.work)
        r.states = <uint8_t *> calloc(pages, 1)
        r.pins = <uint16_t *> calloc(pages, 2)      # virtual until something is pinned
        r.parked = <uint32_t *> malloc(4 * PARKED_MAX)
        r.stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        r.memfd = memfd_create(b"ramster-region", MFD_CLOEXEC | MFD_ALLOW_SEALING)
        if r.states == NULL or r.pins == NULL or r.parked == NULL or r.stop_fd < 0 or r.memfd < 0 or \
                resident_init(&r.set, min(r.budget, pages) - r.reserve, r.reserve + OVERDRAFT) != 0 or \
                ftruncate(r.memfd, <long> (pages * PAGE)) != 0 or \
                fcntl(r.memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) != 0:
            raise errors.StoreFull(f"cannot make a region of {pages} pages: {strerror(errno).decode()}")
        if socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0:
            raise OSError(errno, strerror(errno).decode())
        r.guard = pair[0]
        self.app_guard = pair[1]
        r.pool = 0xffffffffu
        result = store_create_pool(r.store, True, pages, False, &r.pool)
        if result != OK:
            r.pool = 0xffffffffu
            raise errors.StoreFull("no memory for the page table of another region" if result == NO_MEMORY else
                                   "all pools of this node are in use")

    def __dealloc__(self):
        cdef Region_t *r = self.r
        cdef int i
        if r == NULL:
            return
        self.shut()
        for fd in (r.memfd, r.guard, r.uffd, r.stop_fd, self.app_guard):
            if fd >= 0:
                close(fd)
        for i in range(BATCHES_MAX):
            free(r.batches[i].bytes)
        free(r.states)
        free(r.pins)
        resident_free(&r.set)
        free(r.parked)
        pthread_cond_destroy(&r.changed)
        pthread_cond_destroy(&r.work)
        pthread_mutex_destroy(&r.lock)
        free(r)
        self.r = NULL

    cdef Region_t *live(self) except NULL:
        if self.closed:
            raise errors.UsageError("the region is closed")
        return self.r

    @property
    def pool(self):
        """The number of its pool in the store."""
        return self.live().pool

    @property
    def memfd(self):
        return self.live().memfd

    @property
    def pages(self):
        return self.r.pages

    @property
    def resident_pages(self):
        return self.r.budget

    @property
    def dead(self):
        """The kernel said that the application is gone."""
        return bool(self.r.dead)

    def guard_fd(self):
        fd = fcntl(self.app_guard, F_DUPFD_CLOEXEC, 0)
        if fd < 0:
            raise OSError(errno, strerror(errno).decode())
        # Ours is the only copy left after the caller has sent it: the application's end must vanish with the application.
        close(self.app_guard)
        self.app_guard = -1
        return fd

    def attach(self, int uffd, uint64_t base, uint64_t features):
        cdef Region_t *r = self.live()
        cdef uint32_t i
        if r.attached:
            close(uffd)
            raise errors.UsageError("the region has its application already")
        r.uffd = uffd
        r.base = base
        r.can_poison = r.can_poison and (features & UFFD_FEATURE_POISON) != 0
        r.attached = True
        for i in range(r.fault_threads + r.evictor_threads):
            if start_thread(&r.threads[i], fault_main if i < r.fault_threads else evictor_main, r,
                            b"ramster-fault" if i < r.fault_threads else b"ramster-evict") != 0:
                raise MemoryError("cannot start the threads of a region")
            r.started += 1

    cdef Region_t *begin(self, uint64_t first, uint64_t count) except NULL:
        """Checks a run and counts this call in, so that close() waits for it."""
        cdef Region_t *r = self.live()
        if not r.attached:
            raise errors.UsageError("the region has no application yet")
        if count == 0 or first >= r.pages or count > r.pages - first:
            raise errors.UsageError(f"pages {first} to {first + count} are not all in a region of {r.pages} pages")
        pthread_mutex_lock(&r.lock)
        r.users += 1
        pthread_mutex_unlock(&r.lock)
        return r

    cdef int end(self, Region_t *r) except -1:
        pthread_mutex_lock(&r.lock)
        r.users -= 1
        pthread_cond_broadcast(&r.changed)
        pthread_mutex_unlock(&r.lock)
        return 0

    cdef int wait_in(self, Region_t *r, uint64_t first, uint64_t count, bint writable) except -1:
        """Make a run resident, in windows, each with its own deadline."""
        cdef uint64_t page = first, end
        cdef int outcome = DONE
        with nogil:
            while page < first + count and outcome == DONE:
                end = min(page + WINDOW_MAX, first + count)
                outcome = make_resident(r, page, end, writable,
                                        now_ns() + r.links.give_up_ns + r.full_wait_ns + 1000000000ull)
                page = end
        return outcome

    def pin(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(first, count)
        cdef uint64_t page
        cdef uint64_t fresh
        cdef int outcome
        try:
            pthread_mutex_lock(&r.lock)
            fits = True
            fresh = 0
            for page in range(first, first + count):
                fits = fits and r.pins[page] < 0xffff
                fresh += r.pins[page] == 0
            fits = fits and r.pinned + fresh + r.reserve <= r.budget
            if fits:
                for page in range(first, first + count):
                    r.pins[page] += 1
                    if r.pins[page] == 1:
                        r.states[page] |= FLAG_PINNED
                        r.pinned += 1
            pthread_mutex_unlock(&r.lock)
            if not fits:
                raise errors.RegionFull(
                    f"cannot pin {count} pages: {r.pinned} are pinned, and at most {r.budget - r.reserve} of the {r.budget} "
                    "resident pages may be")
            outcome = self.wait_in(r, first, count, True)
            if outcome != DONE:
                self.drop_pins(r, first, count)
                self.fail(outcome, first, count)
        finally:
            self.end(r)

    cdef int drop_pins(self, Region_t *r, uint64_t first, uint64_t count) except -1:
        cdef uint64_t page
        cdef bint pinned = True
        pthread_mutex_lock(&r.lock)
        for page in range(first, first + count):
            pinned = pinned and r.pins[page] > 0
        if pinned:
            for page in range(first, first + count):
                r.pins[page] -= 1
                if r.pins[page] == 0:
                    r.states[page] &= ~FLAG_PINNED
                    resident_unpin(&r.set, <uint32_t> page)
                    r.pinned -= 1
        pthread_cond_signal(&r.work)
        pthread_mutex_unlock(&r.lock)
        if not pinned:
            raise ValueError(f"pages {first} to {first + count} are not all pinned")
        return 0

    cdef object fail(self, int outcome, uint64_t first, uint64_t count):
        if outcome == GONE_LOST:
            runs = self.lost_runs(self.r, first, count)
            raise errors.RegionLost(f"{sum(n for _, n in runs)} of {count} pages from page {first} on are lost", runs=runs)
        if outcome == GONE_FULL:
            raise errors.RegionFull(f"no room for pages {first} to {first + count} within the bounded wait")
        raise errors.UsageError("the region was closed meanwhile")

    def unpin(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(first, count)
        try:
            self.drop_pins(r, first, count)
        finally:
            self.end(r)

    def prefetch(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(first, count)
        cdef int outcome
        try:
            runs = self.lost_runs(r, first, count)
            if runs:
                self.fail(GONE_LOST, first, count)
            count = min(count, r.budget - r.reserve - min(r.pinned, r.budget - r.reserve))
            outcome = self.wait_in(r, first, count, False) if count else GONE_FULL
            if outcome != DONE:
                self.fail(outcome, first, count)
            return count
        finally:
            self.end(r)

    def evict(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(first, count)
        cdef uint32_t pages[BATCH]
        cdef uint8_t clean[BATCH]
        cdef uint8_t *buffer = <uint8_t *> malloc(BATCH * PAGE)
        cdef uint64_t page = first, evicted = 0
        cdef uint32_t n, left
        cdef int state
        cdef bint full = False
        try:
            if buffer == NULL:
                raise MemoryError
            with nogil:
                while page < first + count and not full and not load32(&r.stopping, ACQUIRE):
                    n = 0
                    pthread_mutex_lock(&r.lock)
                    while page < first + count and n < BATCH:
                        state = state_of(r, page)
                        if (state == PAGE_CLEAN or state == PAGE_DIRTY) and not r.states[page] & FLAG_PINNED:
                            clean[n] = state == PAGE_CLEAN
                            pages[n] = <uint32_t> page
                            r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_EVICTING)
                            n += 1
                        page += 1
                    pthread_mutex_unlock(&r.lock)
                    if n:
                        left = evict(r, pages, n, clean, buffer)
                        evicted += left
                        full = left < n
                        unpark(r)
                await_evictors(r, first, first + count)
            if full and not r.dead:
                raise errors.RegionFull(f"no room for more pages: {evicted} were written out, the rest stays resident")
            return evicted
        finally:
            free(buffer)
            self.end(r)

    cdef list lost_runs(self, Region_t *r, uint64_t first, uint64_t count):
        """Runs of pages whose only copy is gone or out of reach."""
        cdef uint64_t page = first, end = first + count, start = 0, until
        cdef bint open_run = False
        cdef uint8_t bad[256]
        cdef uint32_t i
        cdef int state
        runs = []
        while page < end:
            until = min(end, page + 256)
            with nogil:                 # no Python under the lock that faults need
                pthread_mutex_lock(&r.lock)
                for i in range(<uint32_t> (until - page)):
                    state = state_of(r, page + i)
                    bad[i] = state == PAGE_DAMAGED or \
                        ((state == PAGE_LOST or state == PAGE_AWAY) and not stored_copy_good(r, page + i))
                pthread_mutex_unlock(&r.lock)
            for i in range(<uint32_t> (until - page)):
                if bad[i] and not open_run:
                    start = page + i
                    open_run = True
                elif open_run and not bad[i]:
                    runs.append((start, page + i - start))
                    open_run = False
            page = until
        if open_run:
            runs.append((start, end - start))
        return runs

    def check(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(first, count)
        try:
            return self.lost_runs(r, first, count)
        finally:
            self.end(r)

    def statistics(self):
        cdef Region_t *r = self.live()
        cdef uint64_t census[5]
        with nogil:
            store_census(r.store, r.pool, r.states, census)
        return dict(
            pages=r.pages, resident_pages=r.resident, budget_pages=r.budget, pinned_pages=r.pinned,
            local_pages=census[1] + census[2], remote_pages=census[3], lost_pages=r.lost + census[4],
            never_touched_pages=census[0], faults=r.faults, faults_local=r.faults_local, faults_remote=r.faults_remote,
            faults_zero=r.faults_zero, faults_wp=r.faults_wp, faults_minor=r.faults_minor, faults_parked=r.faults_parked,
            evictions=r.evictions, evictions_clean=r.evictions_clean, refused=r.refused, full=int(r.full),
            fault_local_p50_us=quantile(&r.local_ns, 0.5) // 1000, fault_local_p99_us=quantile(&r.local_ns, 0.99) // 1000,
            fault_remote_p50_us=quantile(&r.remote_ns, 0.5) // 1000, fault_remote_p99_us=quantile(&r.remote_ns, 0.99) // 1000)

    def close(self):
        self.shut()

    cdef int shut(self) except -1:
        cdef Region_t *r = self.r
        cdef uint32_t i
        if self.closed or r == NULL:
            return 0
        self.closed = True
        store32(&r.stopping, 1, RELEASE)
        with nogil:
            pthread_mutex_lock(&r.lock)
            pthread_cond_broadcast(&r.work)
            pthread_cond_broadcast(&r.changed)
            pthread_mutex_unlock(&r.lock)
            if r.stop_fd >= 0:
                eventfd_write(r.stop_fd, 1)
            for i in range(r.started):
                pthread_join(r.threads[i], NULL)
            # Gets under way end within give_up: their replies must not find this memory gone.
            pthread_mutex_lock(&r.lock)
            while r.batches_used or r.users:
                cond_wait_until(&r.changed, &r.lock, now_ns() + 100000000ull)
            pthread_mutex_unlock(&r.lock)
            if r.pool != 0xffffffffu:
                store_destroy_pool(r.store, r.pool)
        if r.uffd >= 0:
            close(r.uffd)
            r.uffd = -1
        return 0
