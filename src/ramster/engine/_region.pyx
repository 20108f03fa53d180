"""Regions: faults of an application served by native threads of the node, through userfaultfd on a shared memfd.

Covers: fault threads, evictors, pin, prefetch, evict, check, several processes attached to one region. Does not cover: how
an application gets its memfd and hands over its userfaultfd (frontswap.region_service), where pages go (_store, _link).

Facts that shape it (DESIGN.md section 5), each measured on real kernels:

* The node never maps the memfd: a touch through another mapping would fill a hole with zeros and raise no event. It
  reads with pread and gives pages back by punching holes.
* Faulting threads never evict. Eviction: state 'evicting'; write-protect; read; store; punch; wake whoever waits. While a
  page is in that state no handler maps or unprotects it, so a write can never fall between the read and the punch.
* A page that a read fault brought in is mapped write-protected. As long as it is 'clean', the store has the same bytes and
  eviction only punches. If the store's copy was lost meanwhile, the resident page is what saves it: it is stored again.
* A stored copy is forgotten as soon as its page may be written, before the page can be evicted again.
* UFFDIO_COPY may do part of its work (EAGAIN); a dead application gives ESRCH. EEXIST says that the memfd has a page where this
  node put none: a page is brought in by whoever took it from 'away' to 'fetching', alone, and a page that is away has been
  punched. So it is the application's doing (fallocate, write() to the file), never a newer version, and is punched in turn.
* UFFDIO_COPY and UFFDIO_CONTINUE do nothing (ENOENT) where a run does not lie in one mapping of the process, and mlock, mprotect or
  madvise of a part of a region cut its mapping there. Such a run goes in in pieces: else whoever waits for it would fault, be woken
  and fault again for ever.

Several processes (docs/adr/0007): the state of a page is the region's, what a mapping does with it is each process's own.

* 'clean' means: write-protected or not mapped, in every process. A page that is resident because of another process is a minor
  fault; while it is clean it is mapped write-protected. 'dirty' promises nothing: a process in which it is still protected
  takes a fault on its first write, and only there the protection goes.
* An evictor protects in every process before it reads. A process that attaches meanwhile has nothing mapped, and its faults
  meet 'evicting'.
* Waking, protecting and poisoning act on one process's mapping each; a punched hole is a hole in all. A page that is lost is
  poisoned where it is touched, by that process's own fault thread; 'condemned' remembers where, since poison stays when the
  page comes back through another process.
* A process's requests (ioctls) fail with ESRCH once it is dead, which counts as done: nobody is left to write there.

Every event that finds its page in other hands (fetching, evicting) leaves FLAG_WAITERS there, and whoever holds the page
wakes it in every process when done: the thread faults again and meets the new state. No event is ever just dropped.

Locks: Region_t.lock, then Region_t.mapped (for reading, never twice). A process's own fault threads need not hold 'mapped':
they are joined before its descriptors are closed.

What reads or changes the memfd (lseek, pread, pwrite, fallocate) waits for its inode lock, which the application can hold for
as long as it likes. So nothing of that happens under either lock, with the page in hand instead; and nobody waits for a
lock of a region with the GIL held.
"""
from libc.errno cimport EAGAIN, EEXIST, EINVAL, EMFILE, ENFILE, ENOENT, ESRCH, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, memset, strerror
from posix.unistd cimport usleep

from ramster.engine._c.atomic cimport ACQ_REL, ACQUIRE, RELAXED, RELEASE, add32, add64, load32, load64, sched_yield, store32, sub32
from ramster.engine._c.check cimport ASSERT
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX
from ramster.engine._c.linux cimport (
    AF_UNIX, EFD_CLOEXEC, EFD_NONBLOCK, F_ADD_SEALS, F_GETFL, F_SEAL_GROW, F_SEAL_SHRINK, F_SETFL, FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE, MFD_ALLOW_SEALING, MFD_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, O_NONBLOCK, CPU_AND, CPU_COUNT, CPU_EQUAL, cpu_set_t, sched_getaffinity, sched_setaffinity, F_SEAL_SEAL, POLLIN, POLLOUT, SEEK_DATA, SOCK_CLOEXEC, SOCK_SEQPACKET,
    UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_POISON, UFFD_FEATURE_WP_UNPOPULATED, UFFD_PAGEFAULT_FLAG_MINOR, UFFD_PAGEFAULT_FLAG_WP,
    UFFD_PAGEFAULT_FLAG_WRITE, UFFDIO_CONTINUE, UFFDIO_CONTINUE_MODE_WP, UFFDIO_COPY, UFFDIO_COPY_MODE_WP, UFFDIO_POISON, UFFDIO_WAKE,
    UFFDIO_WRITEPROTECT, UFFDIO_WRITEPROTECT_MODE_DONTWAKE, UFFDIO_WRITEPROTECT_MODE_WP, close, eventfd, eventfd_write, fallocate, fcntl, ftruncate, ioctl, lseek,
    memfd_create, poll, pollfd, pread, pwrite, read, recv, send, socketpair, uffd_msg_t, uffdio_continue_t, uffdio_copy_t,
    uffdio_poison_t, uffdio_range_t, uffdio_writeprotect_t)
from ramster.engine._c.pthread cimport (
    cond_init_monotonic, cond_wait_until, need_thread, now_ns, nudge, pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_signal,
    pthread_join, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_trylock, pthread_mutex_unlock,
    pthread_rwlock_destroy, pthread_rwlock_rdlock, pthread_rwlock_unlock, pthread_rwlock_wrlock, rwlock_init_fair, take_nudges)
from ramster.engine._histogram cimport quantile, record
from ramster.engine._running cimport ran_ns
from ramster.engine._link cimport (
    Links, Reply, links_flush, links_get, links_later, links_look_at_spill, links_slot_lost, links_slot_reachable, reply_bytes,
    reply_next)
from ramster.engine._prefetch cimport (
    ADVICE_CYCLIC, ADVICE_SEQUENTIAL, RANGES_MAX, SKIP_MAX, Plan, Range, pattern_advise, pattern_fault, pattern_init, pattern_missed, pattern_next,
    pattern_runs, pattern_skip, pattern_took, range_of)
from ramster.engine._prefetch import ADVICE
from ramster.engine._resident cimport (
    HINT_AHEAD, HINT_BEHIND, HINT_FAULT, HINT_KEEP, MISSED, NEW, NOBODY, Q_GHOST, enough_pages, resident_add, resident_free, resident_gone, resident_init,
    resident_leave_free, resident_pin, resident_unpin, resident_victim, steady_pages)
from ramster.engine._store cimport (
    AGAIN_MS, BUSY, CORRUPT, LOST, MISS, NO_MEMORY, OK, PAGE, REMOTE, RemoteRef, store_census, store_create_pool,
    same_filled, store_destroy_pool, store_flush, store_get, store_in_vain, store_patience, store_put, store_short_of_frames, store_slot, store_where)

from ramster import errors

cdef enum:
    PARKED_MAX = 1024
    RESIDENT_PAGES_MIN = 16         # one instruction may touch several pages; fewer, and threads only chase each other
    RESIDENT_PAGES_MAX = 1 << 30
    RESERVE_GROWS_NS = 1000000      # at most once in so long, while faults have to wait for room ...
    RESERVE_SHRINKS_NS = 500000000  # ... and by an eighth after so long without one
    REVIVE_NS = 200000000           # between two looks for pages that can be had again
    REVIVE_AGAIN_NS = 10000000      # ... while there are more than can come in at once
    REVIVE_PAGES = 262144           # looked at each time
    CHECK_NS = 50000000             # between two looks of check() at a lender that is out of reach ...
    CHECK_MAX_NS = 20000000000      # ... which ends well before the application's patience does
    FOLLOW_READS = 64               # between two looks where the application runs; one costs half a microsecond
    AHEAD_WINDOWS = 8               # that pin and prefetch have under way while they wait for the first of them
    OVERDRAFT = 64                  # pages whose poison is lifted, by several threads, that may be resident beyond the budget
    FOREIGN_MAX = 64                # pages that the application puts in place of those that come in, beyond one for each
    SPARE_WINDOW = 8                # pages at once of these: no more than that is dropped for them
    FULL_PAUSE_NS = 50000000        # between two looks at whether the store has room again
    NOTE_NS = 100000000             # that a guardian has to write a note before its process dies
    FULL_BATCH = 8                  # pages that an evictor tries while the store is full
    THRASH_NS = 2000000000          # a look at whether a region thrashes
    CENSUS = 4096                   # pages looked at together for statistics; divides what the store populates at once
    NUDGE_NS = 5000000              # between two signals to a thread that is to end ...
    END_NS = 10000000000            # ... for so long; what it waits for by itself, a guardian, takes a second
    TROUBLES_TURNS = 64             # of other threads, before a look that may not wait does without the lock
    GUARD_LOST = 1
    GUARD_NOTE = 2
    GUARD_TEXT = 128
    LOSS_NOTE_NS = 10000000000      # a process that lives on after a lost page is told of the next one this much later

STUCK = "a thread that served its faults does not end; what the region holds stays until the node ends"

cdef packed struct GuardMessage:    # docs/regions.md
    uint32_t op
    uint32_t flags
    uint64_t first
    uint64_t pages
    char text[GUARD_TEXT]


# --- the kernel's side ---------------------------------------------------------------------------------------------

cdef inline bint lives(Attachment *a) noexcept nogil:
    """By its own fault threads, or with 'mapped' held."""
    return a.uffd >= 0 and not load32(&a.dead, RELAXED)


cdef inline int failed(Attachment *a) noexcept nogil:
    """The errno of a request that failed; notes that the process is gone."""
    if errno == ESRCH:
        store32(&a.dead, 1, RELAXED)
    return errno


cdef inline void let_it_run(uint32_t *turns) noexcept nogil:
    """Its mapping is changing (EAGAIN), and it has to run for that to end. sched_yield alone passes over a process of a
    lower priority, such as any is to a node that a kernel swaps on (node.privileges.take_reserve)."""
    turns[0] += 1
    if turns[0] % 16:
        sched_yield()
    else:
        usleep(50)


cdef void wake_in(Attachment *a, uint64_t page, uint64_t pages) noexcept nogil:
    cdef uffdio_range_t where
    where.start = a.base + page * PAGE
    where.len = pages * PAGE
    ioctl(a.uffd, UFFDIO_WAKE, &where)


cdef void wake(Region_t *r, uint64_t page, uint64_t pages, uint32_t who=0xffffffffu) noexcept nogil:
    """Whoever waits for these pages faults again, in every process or in those of a mask."""
    cdef uint32_t i
    pthread_rwlock_rdlock(&r.mapped)
    for i in range(r.attachments_used):
        if who >> i & 1 and lives(&r.attachments[i]):
            wake_in(&r.attachments[i], page, pages)
    pthread_rwlock_unlock(&r.mapped)


cdef int protect_in(Attachment *a, uint64_t page, uint64_t pages, bint on) noexcept nogil:
    """Write-protect a run in one process, or lift that (which also wakes there). 0, also where the process is gone or has
    unmapped the run: nobody is left there to write. Else the errno."""
    cdef uffdio_writeprotect_t wp
    cdef uint32_t turns = 0
    cdef uint64_t i
    cdef int failure
    wp.range.start = a.base + page * PAGE
    wp.range.len = pages * PAGE
    wp.mode = UFFDIO_WRITEPROTECT_MODE_WP if on else 0
    while ioctl(a.uffd, UFFDIO_WRITEPROTECT, &wp) != 0:
        if errno == EAGAIN:
            let_it_run(&turns)
            continue
        failure = failed(a)
        if failure == ENOENT and pages > 1:     # a part of the run, perhaps, and the kernel stopped there
            for i in range(pages):
                failure = protect_in(a, page + i, 1, on)
                if failure:
                    return failure
        return 0 if failure == ESRCH or failure == ENOENT else failure
    return 0


cdef int protect(Region_t *r, uint64_t page, uint64_t pages, bint on) noexcept nogil:
    """The same in every process. 0, or the errno of the first that refused."""
    cdef uint32_t i
    cdef int failure = 0
    pthread_rwlock_rdlock(&r.mapped)
    for i in range(r.attachments_used):
        if failure == 0 and lives(&r.attachments[i]):
            failure = protect_in(&r.attachments[i], page, pages, on)
    pthread_rwlock_unlock(&r.mapped)
    return failure


cdef void map_in(Attachment *a, uint64_t page, uint64_t pages, bint protected) noexcept nogil:
    """Map what the memfd holds, and wake there. Pages that are mapped already stay as they are."""
    cdef uffdio_continue_t more
    cdef uint32_t turns = 0
    cdef uint64_t done = 0, most = pages
    while done < pages:
        more.range.start = a.base + (page + done) * PAGE
        more.range.len = min(pages - done, most) * PAGE
        more.mode = UFFDIO_CONTINUE_MODE_WP if protected else 0
        more.mapped = 0
        if ioctl(a.uffd, UFFDIO_CONTINUE, &more) == 0:
            done += more.range.len // PAGE
        elif more.mapped > 0:
            done += <uint64_t> more.mapped // PAGE
        elif errno == EAGAIN:
            let_it_run(&turns)
        elif errno == ENOENT and more.range.len > PAGE:
            most = more.range.len // PAGE // 2
        else:
            if failed(a) == ESRCH:
                return
            wake_in(a, page + done, 1)
            done += 1


cdef Attachment *somebody(Region_t *r, Attachment *via) noexcept nogil:
    """With 'mapped' held: this process, or another one where it is gone; NULL when none is left."""
    cdef uint32_t i
    if lives(via):
        return via
    for i in range(r.attachments_used):
        if lives(&r.attachments[i]):
            return &r.attachments[i]
    return NULL


cdef inline bint store_holds(Region_t *r, uint64_t page) noexcept nogil:
    """Anything of this page, good or not."""
    cdef uint64_t zero[3]
    memset(zero, 0, sizeof(zero))
    return store_slot(r.store, r.pool, zero, <uint32_t> page) != 0


cdef inline bint all_zeros(const uint8_t *page) noexcept nogil:
    return (<const uint64_t *> page)[0] == 0 and memcmp(page, page + 8, PAGE - 8) == 0


cdef bint clear_foreign(Region_t *r, uint64_t page) noexcept nogil:
    """With this page in hand, which is away: the memfd has something there, which the application alone can have made. Zeros are what
    fallocate leaves, or a look at the file: they go. False for other bytes: those were written past the mapping, in part perhaps,
    and neither they nor what is stored is the page."""
    cdef uint64_t found[512]
    cdef ssize_t got = pread(r.memfd, found, PAGE, <long> (page * PAGE))
    if got != PAGE or not all_zeros(<const uint8_t *> found):
        return False
    return fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> (page * PAGE), PAGE) == 0


cdef uint64_t copy_in(Region_t *r, Attachment *via, uint64_t page, uint64_t pages, const uint8_t *bytes, bint protected,
                      bint *spoiled) noexcept nogil:
    """Put a run with these bytes into the memfd, map it in one process and wake there. Returns how many pages are there now,
    from the first on; 'spoiled' is set when the application wrote to the place of the next one."""
    cdef uffdio_copy_t copy
    cdef uint32_t turns = 0, cleared = 0
    cdef uint64_t done = 0, most = pages
    cdef bint good
    cdef Attachment *a
    pthread_rwlock_rdlock(&r.mapped)
    a = somebody(r, via)
    while done < pages and a != NULL:
        copy.dst = a.base + (page + done) * PAGE
        copy.src = <uint64_t> (bytes + done * PAGE)
        copy.len = min(pages - done, most) * PAGE
        copy.mode = UFFDIO_COPY_MODE_WP if protected else 0
        copy.copy = 0
        if ioctl(a.uffd, UFFDIO_COPY, &copy) == 0:
            done += copy.len // PAGE
            continue
        if copy.copy > 0:
            done += <uint64_t> copy.copy // PAGE
        if errno == EEXIST:
            pthread_rwlock_unlock(&r.mapped)
            good = clear_foreign(r, page + done)
            pthread_rwlock_rdlock(&r.mapped)
            a = somebody(r, via)
            if not good:
                spoiled[0] = True
                break
            cleared += 1
            if cleared > pages + FOREIGN_MAX:
                break               # filled as fast as it is punched: whoever waits faults again
        elif errno == EAGAIN:
            let_it_run(&turns)
        elif errno == ENOENT and copy.len > PAGE:
            most = copy.len // PAGE // 2
        elif failed(a) == ESRCH:
            a = somebody(r, via)
        else:
            break
    pthread_rwlock_unlock(&r.mapped)
    return done


cdef void tell_guard(Attachment *a, uint32_t op, uint64_t first, uint64_t pages, const char *text, int patience_ms) noexcept nogil:
    """A bounded wait: a process that does not listen holds up its own faults alone."""
    cdef GuardMessage message
    cdef GuardMessage acknowledged
    cdef pollfd where
    cdef int i = 0
    while recv(a.guard, &message, sizeof(message), MSG_DONTWAIT) > 0:
        pass                        # acknowledgements
    memset(&message, 0, sizeof(message))
    message.op = op
    message.first = first
    message.pages = pages
    while text != NULL and i < GUARD_TEXT - 1 and text[i] != 0:
        message.text[i] = text[i]
        i += 1
    where.fd = a.guard
    where.events = POLLOUT
    while send(a.guard, &message, sizeof(message), MSG_DONTWAIT | MSG_NOSIGNAL) < 0 and errno == EAGAIN and patience_ms > 0:
        poll(&where, 1, 100)
        patience_ms -= 100
        while recv(a.guard, &acknowledged, sizeof(acknowledged), MSG_DONTWAIT) > 0:
            pass


cdef void await_note(Attachment *a, uint64_t deadline) noexcept nogil:
    """Until the guardian has written the note: a thread that is woken to die takes the guardian with it."""
    cdef GuardMessage acknowledged
    cdef pollfd where
    cdef ssize_t got
    where.fd = a.guard
    where.events = POLLIN
    while now_ns() < deadline and not load32(&a.region.stopping, ACQUIRE) and not load32(&a.leaving, ACQUIRE):
        poll(&where, 1, 10)
        while True:
            got = recv(a.guard, &acknowledged, sizeof(acknowledged), MSG_DONTWAIT)
            if got == 0 or (got > 0 and acknowledged.op == GUARD_NOTE):
                return
            if got < 0:
                break


# --- states --------------------------------------------------------------------------------------------------------

cdef inline int state_of(Region_t *r, uint64_t page) noexcept nogil:
    return r.states[page] & STATE_MASK


cdef inline bint set_state(Region_t *r, uint64_t page, int state) noexcept nogil:
    """Under the lock: the new state; True when somebody waits for the page and must be woken."""
    cdef bint waiters = r.states[page] & FLAG_WAITERS
    r.states[page] = <uint8_t> ((r.states[page] & FLAG_PINNED) | state)
    return waiters


cdef inline bint is_condemned(Attachment *a, uint64_t page) noexcept nogil:
    """Under the lock."""
    return a.condemned != NULL and a.condemned[page >> 3] >> (page & 7) & 1


cdef void condemn(Attachment *a, uint64_t page) noexcept nogil:
    """Under the lock: a touch of this page in this process is to be SIGBUS."""
    if a.condemned == NULL:
        a.condemned = <uint8_t *> calloc((a.region.pages + 7) // 8, 1)
        if a.condemned == NULL:
            return                  # then the poison stays there although the page may come back: SIGBUS, never wrong bytes
    if not is_condemned(a, page):
        a.condemned[page >> 3] |= <uint8_t> (1 << (page & 7))
        a.condemned_count += 1
        a.region.condemned += 1


cdef void reprieve(Region_t *r, uint64_t first, uint64_t count, bint clean) noexcept nogil:
    """Under the lock, with these pages in hand and in the memfd: a mapping takes the place of the poison, in every process."""
    cdef uint32_t i
    cdef uint64_t page
    cdef Attachment *a
    pthread_rwlock_rdlock(&r.mapped)
    for i in range(r.attachments_used):
        a = &r.attachments[i]
        for page in range(first, first + count if a.condemned_count else first):
            if is_condemned(a, page):
                if lives(a):
                    map_in(a, page, 1, clean)       # a kernel with POISON has protected CONTINUE, too
                a.condemned[page >> 3] &= <uint8_t> ~(1 << (page & 7))
                a.condemned_count -= 1
                r.condemned -= 1
    pthread_rwlock_unlock(&r.mapped)


cdef void poison(Attachment *a, uint64_t page) noexcept nogil:
    """By a fault thread of this process: from now on a touch of this page is SIGBUS, whatever the kernel: zeros are never an
    answer."""
    cdef uffdio_poison_t p
    cdef uffdio_writeprotect_t wp
    cdef Region_t *r = a.region
    cdef int state
    cdef bint by_guard
    cdef uint32_t turns = 0
    pthread_mutex_lock(&r.lock)     # so that it does not come back meanwhile
    state = state_of(r, page)
    by_guard = (state == PAGE_LOST or state == PAGE_DAMAGED) and not r.can_poison
    if (state == PAGE_LOST or state == PAGE_DAMAGED) and r.can_poison:
        # Punching a write-protected page leaves a marker in its page-table entry (unmap_mapping_range keeps it), and POISON
        # takes only an entry that is empty: lift the protection of what is not even there.
        wp.range.start = a.base + page * PAGE
        wp.range.len = PAGE
        wp.mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        while ioctl(a.uffd, UFFDIO_WRITEPROTECT, &wp) != 0 and errno == EAGAIN:
            let_it_run(&turns)
        p.range.start = a.base + page * PAGE
        p.range.len = PAGE
        p.mode = 0
        p.updated = 0
        while ioctl(a.uffd, UFFDIO_POISON, &p) != 0 and errno == EAGAIN:
            let_it_run(&turns)
        condemn(a, page)
    pthread_mutex_unlock(&r.lock)
    if by_guard:
        tell_guard(a, GUARD_LOST, page, 1, NULL, 1000)
    else:
        wake_in(a, page, 1)


cdef void note_loss(Attachment *a, uint64_t page, uint8_t state) noexcept nogil:
    """By a fault thread, before it poisons: a process that is about to die of SIGBUS has said why on its stderr."""
    cdef char text[GUARD_TEXT]
    cdef uint64_t now = now_ns()
    if a.noted_ns != 0 and now < a.noted_ns + LOSS_NOTE_NS:
        return
    a.noted_ns = now
    if state & STATE_MASK == PAGE_DAMAGED and state & FLAG_REMOVED:
        snprintf(text, sizeof(text), b"region %s: the process removed or wrote over page %llu of its file: lost; SIGBUS",
                 a.region.label, <unsigned long long> page)
    elif state & STATE_MASK == PAGE_DAMAGED:
        snprintf(text, sizeof(text), b"region %s: page %llu is damaged (its bytes fail their check); SIGBUS",
                 a.region.label, <unsigned long long> page)
    else:
        snprintf(text, sizeof(text), b"region %s: page %llu is lost (the node that kept it is gone or out of reach); SIGBUS",
                 a.region.label, <unsigned long long> page)
    tell_guard(a, GUARD_NOTE, page, 1, text, 0)
    await_note(a, now + NOTE_NS)


cdef inline bint has_room(Region_t *r) noexcept nogil:
    return r.resident < r.budget


cdef inline bint is_short(Region_t *r) noexcept nogil:
    return r.resident + r.reserve // 2 > r.budget


cdef inline bint may_overdraw(Region_t *r) noexcept nogil:
    """Nothing can be written out now, or only after a wait: what reads bring in may lie beyond the budget meanwhile. It is
    clean, so whoever needs its place drops it without the store."""
    return r.full or store_short_of_frames(r.store)


cdef void want_room(Region_t *r) noexcept nogil:
    """Under the lock: evictors sleep until half of the reserve is used, then work in whole batches until it is full again.
    Woken for each page they would write out pages one by one, five times as dear."""
    if is_short(r):
        pthread_cond_signal(&r.work)


cdef inline int hints_of(Region_t *r, uint64_t page) noexcept nogil:
    cdef int hints = HINT_AHEAD if r.states[page] & FLAG_AHEAD else HINT_FAULT
    cdef Range *advised = range_of(&r.reads, page) if r.reads.ranges_count else NULL
    if advised != NULL and advised.kind == ADVICE_SEQUENTIAL:
        hints |= HINT_BEHIND
    elif advised != NULL and advised.kind == ADVICE_CYCLIC:
        hints |= HINT_KEEP
    return hints


cdef void arrived(Region_t *r, uint64_t first, uint64_t count, int state) noexcept nogil:
    """Pages that were being fetched are resident now."""
    cdef uint64_t page
    cdef int met
    cdef bint waiters = False
    pthread_mutex_lock(&r.lock)
    for page in range(first, first + count):
        met = resident_add(&r.set, <uint32_t> page, hints_of(r, page))
        r.returned += met != NEW
        if met == MISSED:
            pattern_missed(&r.reads)
        waiters |= set_state(r, page, state)
    if r.condemned:
        reprieve(r, first, count, state == PAGE_CLEAN)
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


cdef inline void mark_removed(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock: a page that was just lost by what the application itself did."""
    r.states[page] |= FLAG_REMOVED
    r.removed += 1
    r.lost_removed += 1


cdef void page_lost(Region_t *r, uint64_t page, int state, bint removed=False) noexcept nogil:
    """The state is lost, which may end (a lender comes back), or damaged, which does not; removed: by the application. Whoever
    waits for it faults again and is told by its own fault thread."""
    pthread_mutex_lock(&r.lock)
    set_state(r, page, state)
    r.resident -= 1
    r.lost += 1
    if removed:
        mark_removed(r, page)
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    wake(r, page, 1)


cdef inline void no_longer_lost(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock: a page that is lost, refused or damaged will be something else."""
    if not r.states[page] & FLAG_REFUSED:
        r.lost -= 1
    if r.states[page] & FLAG_REMOVED and state_of(r, page) == PAGE_DAMAGED:
        r.lost_removed -= 1


cdef inline uint32_t bit_of(Attachment *a) noexcept nogil:
    return <uint32_t> 1 << <uint32_t> (a - &a.region.attachments[0])


cdef void park(Attachment *a, uint64_t page, bint write) noexcept nogil:
    """Under the lock: a fault waits until an evictor has made room; the evictor wakes it."""
    cdef Region_t *r = a.region
    cdef uint64_t i, now = now_ns()
    r.faults_parked += 1
    # Evictors were too late. More is kept free until they have been in time for a while.
    if now > r.reserve_changed_ns + RESERVE_GROWS_NS:
        r.reserve = min(2 * r.reserve, r.budget // 4)
        resident_leave_free(&r.set, r.reserve - r.reserve_least)
        r.reserve_changed_ns = now
    if r.parked_count == 0:
        r.parked_since_ns = ran_ns(&r.store.running)
        r.parked_taken = load64(&r.store.frames_taken, ACQUIRE)
    for i in range(r.parked_count):
        if r.parked[i].page == page:
            r.parked[i].who |= bit_of(a)
            r.parked[i].write = r.parked[i].write and write
            break
    else:
        if r.parked_count < PARKED_MAX:
            r.parked[r.parked_count].page = <uint32_t> page
            r.parked[r.parked_count].who = bit_of(a)
            r.parked[r.parked_count].write = write
            r.parked_count += 1
        else:
            r.parked_overflow = True
    pthread_cond_signal(&r.work)


cdef void unpark(Region_t *r) noexcept nogil:
    """Wake as many parked faults as there is room for."""
    cdef Parked woken[PARKED_MAX]
    cdef uint64_t n = 0, i
    cdef bint everybody = False
    pthread_mutex_lock(&r.lock)
    while r.parked_count and r.resident + n < r.budget:
        r.parked_count -= 1
        woken[n] = r.parked[r.parked_count]
        n += 1
    if r.parked_count == 0:
        everybody = r.parked_overflow       # those for whom there was no entry: costs what waits, not what there is
        r.parked_overflow = False
    r.parked_since_ns = ran_ns(&r.store.running)
    r.parked_taken = load64(&r.store.frames_taken, ACQUIRE)
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        wake(r, woken[i].page, 1, woken[i].who)
    if everybody:
        wake(r, 0, r.pages)


cdef void unpark_reads(Region_t *r) noexcept nogil:
    """They need not wait for a put: they ask again, and may go beyond the budget now."""
    cdef Parked woken[PARKED_MAX]
    cdef uint64_t n = 0, kept = 0, i
    pthread_mutex_lock(&r.lock)
    for i in range(r.parked_count):
        if r.parked[i].write:
            r.parked[kept] = r.parked[i]
            kept += 1
        else:
            woken[n] = r.parked[i]
            n += 1
    r.parked_count = kept
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        wake(r, woken[i].page, 1, woken[i].who)


cdef void drop(Region_t *r, uint32_t *pages, uint32_t n) noexcept nogil:
    """Clean pages that this thread has put into state evicting leave: only the memory is given back. Any thread may do that, since
    it waits for nothing."""
    cdef uint32_t i
    cdef bint waiters[SPARE_MAX]
    cdef bint gone[SPARE_MAX]
    for i in range(n):
        gone[i] = fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> pages[i] * PAGE, PAGE) == 0
    pthread_mutex_lock(&r.lock)
    for i in range(n):
        waiters[i] = set_state(r, pages[i], PAGE_AWAY if gone[i] else PAGE_CLEAN)
        if gone[i]:
            resident_gone(&r.set, pages[i])
            r.resident -= 1
            r.evictions += 1
            r.evictions_clean += 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        if waiters[i]:
            wake(r, pages[i], 1)


cdef uint32_t pick_spare(Region_t *r, uint64_t but, uint32_t most, uint32_t *pages) noexcept nogil:
    """Under the lock: put up to so many of the pages that came in beyond the budget, the oldest first, into state evicting. What
    has been written since, is pinned, or cannot be had again at once stays and counts as any other. 'but': not this page."""
    cdef uint32_t n = 0, page, left = r.spare_count
    while left > 0 and n < most:
        left -= 1
        page = r.spare[r.spare_first % SPARE_MAX]
        r.spare_first += 1
        r.spare_count -= 1
        if page == but:
            r.spare[(r.spare_first + r.spare_count) % SPARE_MAX] = page
            r.spare_count += 1
        elif state_of(r, page) == PAGE_CLEAN and not r.states[page] & FLAG_PINNED and stored_copy_at_hand(r, page):
            r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_EVICTING)
            pages[n] = page
            n += 1
    return n


cdef bint make_spare(Region_t *r, uint64_t but, uint64_t most) noexcept nogil:
    """Under the lock, which it lets go meanwhile: at most so many pages are resident then, if dropping pages that came in beyond
    the budget is enough. 'but': not this one. True: the lock was let go."""
    cdef uint32_t pages[SPARE_MAX]
    cdef uint32_t n
    if r.resident <= most:
        return False
    n = pick_spare(r, but, <uint32_t> min(r.resident - most, <uint64_t> SPARE_MAX), pages)
    if n == 0:
        return False
    pthread_mutex_unlock(&r.lock)
    drop(r, pages, n)
    pthread_mutex_lock(&r.lock)
    return True


cdef bint yields(Attachment *a, uint64_t page) noexcept nogil:
    """Under the lock: a clean page is to become dirty. While nothing can be written out, what lies beyond the budget must stay
    clean, or reads would stand still: then others of these leave, else this page does, whose writer faults again and waits with
    those who need a page of the budget. True: it left, or is in other hands now, and the lock is released."""
    cdef Region_t *r = a.region
    cdef uint32_t self_page = <uint32_t> page
    if r.resident <= r.budget or not may_overdraw(r):
        return False
    if make_spare(r, page, r.budget):
        pthread_mutex_unlock(&r.lock)
        wake_in(a, page, 1)             # looked at anew
        return True
    if r.states[page] & FLAG_PINNED or not stored_copy_at_hand(r, page):
        return False
    r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_EVICTING | FLAG_WAITERS)
    pthread_mutex_unlock(&r.lock)
    drop(r, &self_page, 1)
    return True


# --- bringing pages in ---------------------------------------------------------------------------------------------

cdef enum:
    KIND_ABSENT = 0                 # not to be had now: whoever waits faults again
    KIND_READ = 1                   # to be mapped write-protected
    KIND_WRITE = 2                  # to be mapped writable
    KIND_LOST = 3
    KIND_DAMAGED = 4
    KIND_DONE = 5                   # served already


cdef inline int kind_of_loss(int status) noexcept nogil:
    return KIND_DAMAGED if status == CORRUPT else KIND_LOST


cdef Batch *take_batch(Attachment *a) noexcept nogil:
    """Under the lock: a free batch for this process, or NULL."""
    cdef Region_t *r = a.region
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
            b.via = a
            b.remote = b.write_all = b.write_wanted = False
            b.outstanding = 1
            b.started_ns = now_ns()
            r.batches_used += 1
            return b
    return NULL


cdef void forget_stored(Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t page, zero[3]
    for page in range(first, end):
        store_flush(r.store, r.pool, zero, <uint32_t> page)


cdef void serve_run(Batch *b, uint32_t i, uint32_t j, uint8_t kind) noexcept nogil:
    """Pages i to j of a batch have arrived or failed in the same way: map them, forget stored copies of what may be
    written, wake."""
    cdef Region_t *r = b.region
    cdef uint32_t k, done
    cdef bint spoiled
    if kind == KIND_LOST or kind == KIND_DAMAGED:
        for k in range(i, j):
            page_lost(r, b.first + k, PAGE_LOST if kind == KIND_LOST else PAGE_DAMAGED)
        return
    if kind == KIND_DONE:
        return
    while kind != KIND_ABSENT and i < j:
        spoiled = False
        done = <uint32_t> copy_in(r, b.via, b.first + i, j - i, b.bytes + i * PAGE, kind == KIND_READ, &spoiled)
        if kind == KIND_WRITE:
            forget_stored(r, b.first + i, b.first + i + done)
        if done:
            arrived(r, b.first + i, done, PAGE_DIRTY if kind == KIND_WRITE else PAGE_CLEAN)
        i += done
        if not spoiled:
            break
        page_lost(r, b.first + i, PAGE_DAMAGED, True)
        i += 1
    if i < j:
        not_arrived(r, b.first + i, j - i)


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
        add64(&r.waited_ns, now_ns() - b.started_ns, RELAXED)
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
        group[i] = 0
        if not b.ours[i]:
            b.kinds[i] = KIND_DONE
            continue
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
            if group[i] == g + 1:
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


cdef inline bint is_away(Region_t *r, uint64_t page) noexcept nogil:
    return r.states[page] & ~FLAG_PINNED == PAGE_AWAY


cdef void claim(Region_t *r, uint64_t page, uint64_t low, uint64_t high, bint ahead, Batch *b) noexcept nogil:
    """Under the lock, with room for a page: put the wanted page and those of its window that are away too into state
    fetching. What is resident among them stays as it is: pages that are kept for long must not cut windows short."""
    cdef bint spare = r.resident >= r.budget
    cdef uint64_t first = page, end = page + 1, at = page + 1
    cdef uint64_t room = (SPARE_WINDOW if spare else r.budget - r.resident) - 1
    while at < high and room > 0:
        if is_away(r, at):
            end = at + 1
            room -= 1
        at += 1
    at = page
    while at > low and room > 0:
        at -= 1
        if is_away(r, at):
            first = at
            room -= 1
    b.first = first
    b.count = <uint32_t> (end - first)
    b.wanted = <uint32_t> (page - first)
    b.taken = 0
    for at in range(first, end):
        b.ours[at - first] = is_away(r, at)
        if b.ours[at - first]:
            r.states[at] = <uint8_t> (r.states[at] | PAGE_FETCHING | (FLAG_AHEAD if ahead or (b.fault and at != page) else 0))
            b.taken += 1
            if spare:
                if r.spare_count == SPARE_MAX:
                    r.spare_first += 1
                    r.spare_count -= 1
                r.spare[(r.spare_first + r.spare_count) % SPARE_MAX] = <uint32_t> at
                r.spare_count += 1
    r.resident += b.taken
    r.came += b.taken
    want_room(r)


cdef Batch *claim_ahead(Attachment *a, Plan *plan) noexcept nogil:
    """Under the lock: the next run of a stream that is not here yet, or NULL. Takes room only while evictors keep up."""
    cdef Region_t *r = a.region
    cdef Batch *b
    cdef uint64_t page = 0, low = 0, high = 0
    cdef uint32_t skipped = 0
    if r.resident + r.reserve // 4 + plan.window > r.budget or r.batches_used >= BATCHES_MAX // 2:
        return NULL
    while pattern_next(&r.reads, plan, &page, &low, &high):
        if is_away(r, page):
            b = take_batch(a)
            if b != NULL:
                b.fault = False
                claim(r, page, low, high, True, b)
                pattern_took(&r.reads, plan, b.first, b.first + b.count, b.taken)
                b.wanted = WINDOW_MAX   # nobody waits
            return b
        skipped += 1
        if skipped > SKIP_MAX:
            return NULL
        pattern_skip(&r.reads, plan)
    return NULL


cdef void read_ahead(Attachment *a, Plan *plan, bint remote, bint write) noexcept nogil:
    """The thread that faulted runs again; what it will ask for next comes in meanwhile, run by run."""
    cdef Region_t *r = a.region
    cdef Batch *b
    cdef int i, runs
    pthread_mutex_lock(&r.lock)
    runs = pattern_runs(&r.reads, plan, remote)
    pthread_mutex_unlock(&r.lock)
    for i in range(runs):
        pthread_mutex_lock(&r.lock)
        b = claim_ahead(a, plan)
        pthread_mutex_unlock(&r.lock)
        if b == NULL:
            return
        b.write_all = write
        if not links_later(r.links, bring_in_later, b):
            bring_in(r, b)


# --- what the application removed ----------------------------------------------------------------------------------

cdef inline bint is_hole(Region_t *r, uint64_t page) noexcept nogil:
    """The memfd has nothing there."""
    return lseek(r.memfd, <long> (page * PAGE), SEEK_DATA) != <long> (page * PAGE)


cdef bint looked_gone(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock, which it lets go meanwhile: has this resident page vanished from the memfd? It is in hand while that is looked
    at, and then what it was, in every process that met it so."""
    cdef uint8_t before = r.states[page]
    cdef bint gone
    r.states[page] = <uint8_t> ((before & ~STATE_MASK) | PAGE_FETCHING)
    pthread_mutex_unlock(&r.lock)
    gone = is_hole(r, page)
    pthread_mutex_lock(&r.lock)
    if set_state(r, page, before & STATE_MASK):
        wake(r, page, 1)
    pthread_cond_broadcast(&r.changed)
    return gone


cdef int removed(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock: a resident page has vanished from the memfd, which only the application can have done (MADV_REMOVE,
    fallocate). If what is stored equals it, nothing is lost. Else its only copy is gone: zeros, which MADV_REMOVE promises, would
    be the truth here and the old bytes where the page was away, so it is said to be gone. Its new state."""
    cdef int state = PAGE_AWAY if state_of(r, page) == PAGE_CLEAN and stored_copy_good(r, page) else PAGE_DAMAGED
    set_state(r, page, state)
    resident_gone(&r.set, <uint32_t> page)
    r.resident -= 1
    if state == PAGE_DAMAGED:
        r.lost += 1
        mark_removed(r, page)
    pthread_cond_broadcast(&r.changed)
    return state


# --- fault threads -------------------------------------------------------------------------------------------------

cdef void on_missing(Attachment *a, uint64_t page, bint write) noexcept nogil:
    cdef Region_t *r = a.region
    cdef Plan plan
    cdef Batch *b
    cdef int state, met
    cdef uint8_t flags
    cdef bint said = False
    pthread_mutex_lock(&r.lock)
    r.faults += 1
    state = state_of(r, page)
    flags = r.states[page]
    if r.states[page] & FLAG_REFUSED and r.can_poison and not is_condemned(a, page):
        set_state(r, page, PAGE_AWAY)       # there was no room for another process; perhaps there is now
        state = PAGE_AWAY
    if (state == PAGE_CLEAN or state == PAGE_DIRTY) and looked_gone(r, page):
        state = removed(r, page)
        said = state == PAGE_DAMAGED
    if state != PAGE_AWAY:
        if state == PAGE_FETCHING or state == PAGE_EVICTING:
            r.states[page] |= FLAG_WAITERS
            pthread_mutex_unlock(&r.lock)
            return
        pthread_mutex_unlock(&r.lock)
        if said:
            tell_guard(a, GUARD_NOTE, page, 1, b"the process removed a page (MADV_REMOVE): lost; SIGBUS", 0)
            await_note(a, now_ns() + NOTE_NS)
        if state == PAGE_LOST or state == PAGE_DAMAGED:
            if not flags & FLAG_REFUSED and not said:   # that it is full has been said
                note_loss(a, page, flags)
            poison(a, page)
        else:
            wake_in(a, page, 1)     # it came in meanwhile
        return
    if not has_room(r) and not write and may_overdraw(r):
        if make_spare(r, NOBODY, r.budget + SPARE_MAX - SPARE_WINDOW):
            pthread_mutex_unlock(&r.lock)
            wake_in(a, page, 1)     # looked at anew
            return
        b = take_batch(a) if r.resident + SPARE_WINDOW <= r.budget + SPARE_MAX else NULL
    else:
        b = take_batch(a) if has_room(r) else NULL
    if b == NULL:
        park(a, page, write)
        pthread_mutex_unlock(&r.lock)
        return
    b.fault = True
    pattern_fault(&r.reads, page, &plan)
    claim(r, page, plan.low, plan.high, False, b)
    pattern_took(&r.reads, &plan, b.first, b.first + b.count, b.taken - 1)
    pthread_mutex_unlock(&r.lock)
    # A writer that goes through the pages in order gets them writable at once: no second fault on each.
    b.write_all = write and plan.sequential
    b.write_wanted = write
    met = bring_in(r, b)
    if met == REMOTE:
        add64(&r.faults_remote, 1, RELAXED)
    elif met == MISS:
        add64(&r.faults_zero, 1, RELAXED)
    elif met == OK:
        add64(&r.faults_local, 1, RELAXED)
    if plan.full:
        read_ahead(a, &plan, met == REMOTE, write)


cdef void take_alike(Region_t *r, uint64_t page, uint64_t low, uint64_t high, uint64_t *first, uint64_t *end) noexcept nogil:
    """Under the lock: put a resident page and the neighbours that are in the same state into state fetching."""
    cdef int state = state_of(r, page)
    first[0] = page
    end[0] = page + 1
    while end[0] < high and state_of(r, end[0]) == state:
        end[0] += 1
    while first[0] > low and state_of(r, first[0] - 1) == state:
        first[0] -= 1
    for page in range(first[0], end[0]):
        r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_FETCHING)


cdef void on_protected(Attachment *a, uint64_t page) noexcept nogil:
    """A write to a page that is protected, and to those after (or before) it when the writer goes on in order."""
    cdef Region_t *r = a.region
    cdef uint64_t first, end
    cdef Plan plan
    cdef int state
    pthread_mutex_lock(&r.lock)
    r.faults_wp += 1
    state = state_of(r, page)
    if state == PAGE_CLEAN and yields(a, page):
        return
    if state == PAGE_CLEAN or state == PAGE_DIRTY:
        # A dirty page that is still protected was written in another process, or given back by an evictor that found no room.
        # It too is taken in hand while its protection is lifted: an evictor that came in between would lose the write that
        # follows.
        if state == PAGE_CLEAN or r.attached > 1:
            pattern_fault(&r.writes, page, &plan)
            take_alike(r, page, plan.low, plan.high, &first, &end)
            pattern_took(&r.writes, &plan, first, end, <uint32_t> (end - first) - 1)
        else:
            take_alike(r, page, page, page + 1, &first, &end)
        pthread_mutex_unlock(&r.lock)
        if state == PAGE_CLEAN:
            forget_stored(r, first, end)
        protect_in(a, first, end - first, False)
        arrived(r, first, end - first, PAGE_DIRTY)
        return
    if state == PAGE_FETCHING or state == PAGE_EVICTING:
        r.states[page] |= FLAG_WAITERS
    pthread_mutex_unlock(&r.lock)
    if state == PAGE_AWAY or state == PAGE_LOST or state == PAGE_DAMAGED:
        wake_in(a, page, 1)         # evicted meanwhile: the writer takes a missing fault


cdef bint any_holes(Region_t *r, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t page
    for page in range(first, end):
        if is_hole(r, page):
            return True
    return False


cdef void give_back(Region_t *r, uint64_t first, uint64_t end, uint64_t but, int state) noexcept nogil:
    """Pages that were taken in hand stay as they were, all but one."""
    cdef uint64_t page
    cdef bint waiters = False
    pthread_mutex_lock(&r.lock)
    for page in range(first, end):
        if page != but:
            waiters |= set_state(r, page, state)
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    if waiters:
        wake(r, first, end - first)


cdef void on_minor(Attachment *a, uint64_t page, bint write) noexcept nogil:
    """In the memfd but not mapped here: another process brought it in. If it is not resident, the application filled the hole behind
    our back (fallocate), or the event is older than the page's last eviction: the page is what is stored, all the same."""
    cdef Region_t *r = a.region
    cdef uint64_t first, end
    cdef Plan plan
    cdef int state
    cdef bint clean
    pthread_mutex_lock(&r.lock)
    r.faults_minor += 1
    state = state_of(r, page)
    if state == PAGE_FETCHING or state == PAGE_EVICTING:
        r.states[page] |= FLAG_WAITERS
        pthread_mutex_unlock(&r.lock)
        return
    if state != PAGE_CLEAN and state != PAGE_DIRTY:
        pthread_mutex_unlock(&r.lock)
        on_missing(a, page, write)
        return
    clean = state == PAGE_CLEAN
    if clean and write and yields(a, page):
        return
    pattern_fault(&r.maps, page, &plan)
    if clean and (write or not a.can_continue_protected):
        clean = False
        if not write or not plan.sequential:
            plan.low = page             # neighbours lose their stored copies only where a writer goes on in order
            plan.high = page + 1
    take_alike(r, page, plan.low, plan.high, &first, &end)
    pattern_took(&r.maps, &plan, first, end, <uint32_t> (end - first) - 1)
    pthread_mutex_unlock(&r.lock)
    # What fallocate made is a hole still, as far as the file tells: CONTINUE would fill it with zeros.
    if is_hole(r, page):
        give_back(r, first, end, NOBODY, state)
        on_missing(a, page, write)
        return
    if end - first > 1 and any_holes(r, first, end):
        give_back(r, first, end, page, state)
        first = page
        end = page + 1
    if not clean and state != PAGE_DIRTY:
        forget_stored(r, first, end)
    map_in(a, first, end - first, clean)
    arrived(r, first, end - first, PAGE_CLEAN if clean else PAGE_DIRTY)


cdef void await_events(Region_t *r, pollfd *fds, uint64_t *gap) noexcept nogil:
    """Until a fault arrives, for at most 500 ms. Waking up costs more than serving a fault, so a thread for which faults have
    been coming closer together than busy_poll ('gap', smoothed, ns) stays awake for that long."""
    cdef uint64_t begin = now_ns(), now = begin
    cdef int ready = 0
    if r.busy_poll_ns and gap[0] < r.busy_poll_ns:
        while ready == 0 and now - begin < r.busy_poll_ns:
            ready = poll(fds, 2, 0)
            now = now_ns()
        add64(&r.polled_ns, now - begin, RELAXED)
    if ready == 0:
        poll(fds, 2, 500)
        now = now_ns()
    gap[0] = (7 * gap[0] + min(now - begin, 16 * r.busy_poll_ns)) // 8


cdef void follow(int thread, const cpu_set_t *all, cpu_set_t *now) noexcept nogil:
    """Serve faults on the processors that the faulting thread may use: to wake a thread of another processor that sleeps
    costs several times what a fault does. 'all': those of the node. A thread that has ended leaves things as they are."""
    cdef cpu_set_t theirs, both
    if thread == 0 or sched_getaffinity(thread, sizeof(cpu_set_t), &theirs) != 0:
        return
    CPU_AND(&both, &theirs, all)
    if CPU_COUNT(&both) == 0:
        both = all[0]
    if not CPU_EQUAL(&both, now) and sched_setaffinity(0, sizeof(cpu_set_t), &both) == 0:
        now[0] = both


cdef void *fault_main(void *argument) noexcept nogil:
    cdef Attachment *a = <Attachment *> argument
    cdef Region_t *r = a.region
    cdef uffd_msg_t events[16]
    cdef pollfd fds[2]
    cdef cpu_set_t all_cpus, cpus
    cdef uint32_t reads = 0
    cdef int i
    cdef ssize_t got
    cdef uint64_t page, gap = r.busy_poll_ns
    # With several threads each takes one event: what one thread has read no other can serve.
    cdef size_t room = sizeof(events) if r.fault_threads == 1 else sizeof(uffd_msg_t)
    take_nudges()
    sched_getaffinity(0, sizeof(cpu_set_t), &all_cpus)
    cpus = all_cpus
    fds[0].fd = a.uffd
    fds[1].fd = a.stop_fd
    fds[0].events = fds[1].events = POLLIN
    while not load32(&a.leaving, ACQUIRE) and not load32(&a.dead, RELAXED):
        await_events(r, fds, &gap)
        # O_NONBLOCK belongs to the open file, which the application shares: it may have cleared it, and then this waits for
        # its next fault, or for leave() to nudge.
        got = read(a.uffd, events, room)
        if got <= 0:
            if fds[0].revents & ~POLLIN:
                poll(&fds[1], 1, 1)         # nothing to wait for, now: never in a tight circle
            continue
        if reads % FOLLOW_READS == 0:
            follow(<int> events[0].ptid, &all_cpus, &cpus)
        reads += 1
        for i in range(<int> (got // <ssize_t> sizeof(uffd_msg_t))):
            if events[i].event != UFFD_EVENT_PAGEFAULT or events[i].address < a.base:
                continue
            page = (events[i].address - a.base) // PAGE
            if page >= r.pages:
                continue
            if events[i].flags & UFFD_PAGEFAULT_FLAG_WP:
                on_protected(a, page)
            elif events[i].flags & UFFD_PAGEFAULT_FLAG_MINOR:
                on_minor(a, page, (events[i].flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0)
            else:
                on_missing(a, page, (events[i].flags & UFFD_PAGEFAULT_FLAG_WRITE) != 0)
    pthread_mutex_lock(&r.lock)
    a.ended += 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
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
    return where == OK or where == MISS or (where == REMOTE and not links_slot_lost(r.links, peer, slot))


cdef bint stored_copy_at_hand(Region_t *r, uint64_t page) noexcept nogil:
    """Stricter: a lender that does not answer now may be gone for good, and the page that is still here is what is left."""
    cdef uint32_t peer = 0
    cdef uint64_t slot = 0
    cdef int where = store_where(r.store, r.pool, <uint32_t> page, &peer, &slot)
    return where == OK or where == MISS or (where == REMOTE and links_slot_reachable(r.links, peer, slot))


cdef enum:
    VANISHED = 2                    # of 'gone' below


cdef uint32_t evict(Region_t *r, uint32_t *pages, uint32_t n, uint8_t *clean, uint8_t *buffer, uint64_t wait_ns) noexcept nogil:
    """Write out pages that this thread has put into state evicting (sorted; clean[i]: it was clean). Returns how many
    left; those for which there was no room within wait_ns stay resident, dirty and writable."""
    cdef uint32_t i, j, k, evicted = 0
    cdef uint64_t zero[3]
    cdef uint8_t gone[BATCH]
    cdef bint waiters[BATCH]
    cdef ssize_t got
    cdef bint full = False
    cdef uint64_t first
    cdef uint32_t stored = 0, pattern = 0
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
                if got >= <ssize_t> ((k - i + 1) * PAGE) and all_zeros(buffer + (k - i) * PAGE) and is_hole(r, pages[k]):
                    gone[k] = VANISHED
                elif got >= <ssize_t> ((k - i + 1) * PAGE) and (not full or same_filled(buffer + (k - i) * PAGE, &pattern)):
                    # A page of one word takes no room: in a full store it leaves all the same.
                    gone[k] = store_put(r.store, r.pool, zero, pages[k], buffer + (k - i) * PAGE, wait_ns) == OK
                    full = full or not gone[k]
                    stored += gone[k]
        i = j
    # 3. Give the memory back: the next touch is a missing fault.
    i = 0
    while i < n:
        j = i + 1
        while j < n and pages[j] == pages[j - 1] + 1 and gone[j] == gone[i]:
            j += 1
        if gone[i] == 1:
            if fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> pages[i] * PAGE, <long> (j - i) * PAGE) != 0:
                for k in range(i, j):
                    gone[k] = 0
        i = j
    pthread_mutex_lock(&r.lock)
    for i in range(n):
        if gone[i] == VANISHED:
            waiters[i] = r.states[pages[i]] & FLAG_WAITERS
            removed(r, pages[i])
            evicted += 1                # it has left, in its way
            continue
        waiters[i] = set_state(r, pages[i], PAGE_AWAY if gone[i] else PAGE_FETCHING)
        if gone[i]:
            resident_gone(&r.set, pages[i])
            r.resident -= 1
            evicted += 1
            r.evictions += 1
            if clean[i]:
                r.evictions_clean += 1
    if stored:
        r.full = False              # what was clean tells nothing of the store
    if full:
        r.full = True
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        if not gone[i]:
            forget_stored(r, pages[i], pages[i] + 1)
            protect(r, pages[i], 1, False)
            arrived(r, pages[i], 1, PAGE_DIRTY)
        elif waiters[i]:
            wake(r, pages[i], 1)
    return evicted


cdef void refuse(Region_t *r, bint reads) noexcept nogil:
    """Writes, or all faults, have waited for room as long as they may: their processes are told plainly, by SIGBUS and a line on
    stderr."""
    cdef Parked refused[PARKED_MAX]
    cdef uint64_t n = 0, kept = 0, i, deadline
    cdef uint32_t who = 0, k
    cdef bint everybody
    pthread_mutex_lock(&r.lock)
    store_in_vain(r.store, &r.in_vain, r.parked_taken)
    for i in range(r.parked_count):
        if not reads and not r.parked[i].write:
            r.parked[kept] = r.parked[i]
            kept += 1
        elif state_of(r, r.parked[i].page) == PAGE_AWAY:    # what came in meanwhile has been woken
            refused[n] = r.parked[i]
            n += 1
            set_state(r, r.parked[i].page, PAGE_LOST)
            r.states[r.parked[i].page] |= FLAG_REFUSED
            who |= r.parked[i].who
            for k in range(r.attachments_used):
                if r.parked[i].who >> k & 1 and r.can_poison:
                    condemn(&r.attachments[k], r.parked[i].page)
    r.parked_count = kept
    everybody = r.parked_overflow               # asks again, and is refused in its turn
    r.parked_overflow = False
    r.refused += n
    for k in range(r.attachments_used):
        if who >> k & 1:
            r.attachments[k].users += 1
    pthread_mutex_unlock(&r.lock)
    for k in range(r.attachments_used):
        if who >> k & 1:
            tell_guard(&r.attachments[k], GUARD_NOTE, refused[0].page, n,
                       b"region full: no room here and no lender has any; SIGBUS", 0)
    deadline = now_ns() + NOTE_NS
    for k in range(r.attachments_used):
        if who >> k & 1:
            await_note(&r.attachments[k], deadline)
    for i in range(n):
        wake(r, refused[i].page, 1, refused[i].who)         # their own fault threads poison the pages
    if everybody:
        wake(r, 0, r.pages)
    pthread_mutex_lock(&r.lock)
    for k in range(r.attachments_used):
        if who >> k & 1:
            r.attachments[k].users -= 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)


cdef bint is_condemned_anywhere(Region_t *r, uint64_t page, Attachment **where) noexcept nogil:
    """Under the lock: a touch of this page is SIGBUS in one of the processes, whatever its state."""
    cdef uint32_t i
    for i in range(r.attachments_used if r.condemned else 0):
        if is_condemned(&r.attachments[i], page):
            where[0] = &r.attachments[i]
            return True
    return False


cdef bint had_again(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock: a page that is lost, and was only out of reach, is away again once its lender, or room, is there."""
    cdef int state = state_of(r, page)
    if state == PAGE_LOST and r.can_poison and stored_copy_at_hand(r, page):
        no_longer_lost(r, page)
        set_state(r, page, PAGE_AWAY)
        state = PAGE_AWAY
    return state == PAGE_AWAY


cdef Batch *revive_some(Region_t *r, uint64_t *page, uint64_t end, bint *crowded) noexcept nogil:
    """Under the lock: the next run of pages whose poison is to go, claimed; a page that nobody has touched just is away again."""
    cdef Attachment *a = NULL
    cdef Attachment *ignored = NULL
    cdef Batch *b
    cdef uint64_t at, high, room = 0
    while page[0] < end:
        at = page[0]
        page[0] += 1
        if not had_again(r, at) or not is_condemned_anywhere(r, at, &a) or not stored_copy_at_hand(r, at):
            continue
        if r.resident + r.reserve // 4 < r.budget:
            room = r.budget - r.resident - r.reserve // 4
        elif may_overdraw(r) and r.resident + SPARE_WINDOW <= r.budget + SPARE_MAX:
            room = SPARE_WINDOW         # in a full region, too, a page whose write was refused is read again
        b = take_batch(a) if room and r.batches_used < BATCHES_MAX // 2 else NULL
        if b == NULL:
            crowded[0] = True
            page[0] = at
            return NULL
        high = at + 1
        while high < min(end, at + WINDOW_MAX) and had_again(r, high) and is_condemned_anywhere(r, high, &ignored):
            high += 1
        b.fault = False
        claim(r, at, at, high, False, b)
        page[0] = high
        return b
    return NULL


cdef void revive(Region_t *r) noexcept nogil:
    """By an evictor: pages that could not be had and now can, with the same lender's memory or after a refusal, stop being lost by
    themselves. Poison goes only when a page is mapped, so where a touch was SIGBUS it is brought in. A part of the region each
    time, and only while evictors keep up, or beyond the budget as reads do."""
    cdef uint64_t page, end, now = now_ns()
    cdef bint crowded = False, came = False, more
    cdef Batch *b
    pthread_mutex_lock(&r.lock)
    more = now >= r.revive_after_ns and r.lost + r.condemned != 0
    page = r.revive_at
    r.revive_after_ns = now + REVIVE_NS if more else r.revive_after_ns
    pthread_mutex_unlock(&r.lock)
    end = min(r.pages, page + REVIVE_PAGES)
    while more and not crowded and page < end and not load32(&r.stopping, ACQUIRE):
        pthread_mutex_lock(&r.lock)
        b = revive_some(r, &page, min(end, page + CENSUS), &crowded)
        pthread_mutex_unlock(&r.lock)
        came = came or b != NULL
        if b != NULL and not links_later(r.links, bring_in_later, b):
            bring_in(r, b)
    if more:
        pthread_mutex_lock(&r.lock)
        r.revive_at = page if page < r.pages else 0
        r.reviving = came and (crowded or r.revive_at)
        if crowded and may_overdraw(r):
            make_spare(r, NOBODY, r.budget + SPARE_MAX - SPARE_WINDOW)
        if r.reviving:
            r.revive_after_ns = now_ns() + REVIVE_AGAIN_NS
        pthread_mutex_unlock(&r.lock)


cdef void say_that_it_holds(Region_t *r) noexcept nogil:
    """Once for each time that the region is full: a process that stands still is told why."""
    cdef uint32_t who = 0, i, k
    pthread_mutex_lock(&r.lock)
    if not r.hold_told:
        for i in range(r.parked_count):
            who |= r.parked[i].who
        for k in range(r.attachments_used):
            if who >> k & 1:
                r.attachments[k].users += 1
        r.hold_told = who != 0
    pthread_mutex_unlock(&r.lock)
    if who == 0:
        return
    for k in range(r.attachments_used):
        if who >> k & 1:
            tell_guard(&r.attachments[k], GUARD_NOTE, 0, 0, b"region full: a write waits for room, here or at a lender; SIGTERM ends it", 0)
    pthread_mutex_lock(&r.lock)
    for k in range(r.attachments_used):
        if who >> k & 1:
            r.attachments[k].users -= 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)


cdef uint32_t clean_first(uint32_t *pages, uint8_t *clean, uint32_t n) noexcept nogil:
    """Sorted pages: the clean ones before the others, each kind in its order. How many are clean."""
    cdef uint32_t others[BATCH]
    cdef uint32_t i, k = 0, m = 0
    for i in range(n):
        if clean[i]:
            pages[k] = pages[i]
            k += 1
        else:
            others[m] = pages[i]
            m += 1
    for i in range(m):
        pages[k + i] = others[i]
    memset(clean, 1, k)
    memset(clean + k, 0, m)
    return k


cdef void look_for_thrashing(Region_t *r, uint64_t now) noexcept nogil:
    """Under the lock: a few operations on its own counters, every THRASH_NS; 'now' is the caller's."""
    cdef uint64_t waited
    if now < r.looked_ns + THRASH_NS:
        return
    waited = load64(&r.waited_ns, RELAXED)
    if r.looked_ns:
        r.enough = steady_pages(r.enough, min(r.pages, enough_pages(
            r.budget, r.set.count[<int> Q_GHOST], r.came - r.looked_came, r.returned - r.looked_returned, waited - r.looked_waited_ns,
            now - r.looked_ns)), &r.enough_doubt)
    r.looked_ns = now
    r.looked_came = r.came
    r.looked_returned = r.returned
    r.looked_waited_ns = waited


cdef void *evictor_main(void *argument) noexcept nogil:
    cdef Region_t *r = <Region_t *> argument
    cdef uint32_t pages[BATCH]
    cdef uint8_t clean[BATCH]
    cdef uint8_t *buffer = <uint8_t *> malloc(BATCH * PAGE)
    cdef uint32_t n
    cdef uint32_t most, done
    cdef uint64_t looked, waited, wait, now
    cdef int64_t page
    cdef int state
    cdef bint parked, room, short, full
    ASSERT(buffer != NULL, b"no memory for an evictor's buffer")
    memset(buffer, 0, BATCH * PAGE)
    while not load32(&r.stopping, ACQUIRE):
        pthread_mutex_lock(&r.lock)
        if not is_short(r):
            cond_wait_until(&r.work, &r.lock, now_ns() + (REVIVE_AGAIN_NS if r.reviving else 200000000ull))
        now = now_ns()
        if r.reserve > r.reserve_least and now > r.reserve_changed_ns + RESERVE_SHRINKS_NS:
            r.reserve = max(r.reserve_least, r.reserve - r.reserve // 8)
            resident_leave_free(&r.set, r.reserve - r.reserve_least)
            r.reserve_changed_ns = now
        n = 0
        if not is_short(r):
            r.full = False
        short = may_overdraw(r)
        most = FULL_BATCH if r.full else BATCH
        wait = min(r.full_wait_ns, <uint64_t> AGAIN_MS * 1000000) if r.full else store_patience(r.store, &r.in_vain, r.full_wait_ns)
        look_for_thrashing(r, now)
        looked = 2 * BATCH if is_short(r) else 0
        while n < most and looked > 0 and r.resident + r.reserve > r.budget + n:
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
        done = 0
        if short and n:
            # A put may have to wait. What needs none goes first, and nobody who only reads waits for the rest.
            done = clean_first(pages, clean, n)
            evict(r, pages, done, clean, buffer, 0)
            unpark_reads(r)
        if done < n:
            evict(r, pages + done, n - done, clean + done, buffer, wait)
        revive(r)
        pthread_mutex_lock(&r.lock)
        parked = r.parked_count != 0
        room = has_room(r)
        if room:
            r.hold_told = False
        short = is_short(r)
        full = r.full
        waited = ran_ns(&r.store.running) - r.parked_since_ns
        pthread_mutex_unlock(&r.lock)
        if parked and room:
            unpark(r)
        elif parked:
            # What waits for a lender's answer makes room within give_up; only a store that refuses is full before.
            if waited > r.hold_ns + (0 if full else r.links.give_up_ns):
                refuse(r, True)
            elif full and r.hold_ns > r.full_wait_ns:
                if waited > r.full_wait_ns:
                    say_that_it_holds(r)
            elif full and waited > store_patience(r.store, &r.in_vain, r.full_wait_ns):
                refuse(r, False)
            pthread_mutex_lock(&r.lock)
            cond_wait_until(&r.work, &r.lock, now_ns() + 5000000ull)
            pthread_mutex_unlock(&r.lock)
        elif full:
            pthread_mutex_lock(&r.lock)         # looked at again from time to time, or when somebody faults
            cond_wait_until(&r.work, &r.lock, now_ns() + FULL_PAUSE_NS)
            pthread_mutex_unlock(&r.lock)
        elif n == 0 and short:
            pthread_mutex_lock(&r.lock)         # everything is pinned or in other hands
            cond_wait_until(&r.changed, &r.lock, now_ns() + 5000000ull)
            pthread_mutex_unlock(&r.lock)
    free(buffer)
    return NULL


# --- what the application throws away ------------------------------------------------------------------------------

cdef enum Way:
    WAY_FORGET = 0                  # it is away: only what is stored of it goes
    WAY_PUNCH = 1                   # it is resident
    WAY_ZERO = 2                    # it is pinned, and stays where it is
    WAY_REPRIEVE = 3                # a touch of it is SIGBUS somewhere, which only a mapping ends
    WAY_NONE = 4                    # not now: it is in other hands, or there are too many of the last kind
    WAY_KEEP = 5                    # the guardian has mapped over it, perhaps: for good


cdef int way_to_discard(Region_t *r, uint64_t page) noexcept nogil:
    """Under the lock."""
    cdef int state = state_of(r, page)
    cdef Attachment *ignored = NULL
    if state == PAGE_FETCHING or state == PAGE_EVICTING:
        return WAY_NONE
    if state == PAGE_CLEAN or state == PAGE_DIRTY:
        return WAY_ZERO if r.states[page] & FLAG_PINNED else WAY_PUNCH
    if state != PAGE_AWAY and not r.can_poison:
        return WAY_KEEP
    if not is_condemned_anywhere(r, page, &ignored):
        return WAY_FORGET
    return WAY_REPRIEVE if r.resident < r.budget + SPARE_MAX + OVERDRAFT // 2 else WAY_NONE


cdef void zero_pinned(Region_t *r, uint64_t page, const uint8_t *zeros) noexcept nogil:
    """A page in hand that must stay where it is. One that the application removed meanwhile fails when it is touched."""
    forget_stored(r, page, page + 1)
    pwrite(r.memfd, zeros, PAGE, <long> (page * PAGE))
    protect(r, page, 1, False)
    arrived(r, page, 1, PAGE_DIRTY)


cdef void reprieve_zero(Region_t *r, uint64_t page, const uint8_t *zeros) noexcept nogil:
    """A page in hand whose poison is to go: zeros are mapped in its place for a moment."""
    cdef uint32_t self_page = <uint32_t> page
    cdef bint spoiled = False, leaves
    forget_stored(r, page, page + 1)
    if copy_in(r, &r.attachments[0], page, 1, zeros, True, &spoiled) == 0:
        not_arrived(r, page, 1)
        return
    arrived(r, page, 1, PAGE_CLEAN)
    pthread_mutex_lock(&r.lock)
    leaves = state_of(r, page) == PAGE_CLEAN and not r.states[page] & FLAG_PINNED
    if leaves:
        r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_EVICTING)
    pthread_mutex_unlock(&r.lock)
    if leaves:
        drop(r, &self_page, 1)


cdef void punch_all(Region_t *r, uint64_t *pages, uint8_t *ways, uint32_t n) noexcept nogil:
    """Ascending pages in hand: those that are resident leave. Should the kernel ever refuse one, its next fetch finds it spoiled."""
    cdef uint32_t i = 0, j
    while i < n:
        j = i + 1
        while j < n and ways[j] == ways[i] and pages[j] == pages[j - 1] + 1:
            j += 1
        if ways[i] == WAY_PUNCH:
            fallocate(r.memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <long> (pages[i] * PAGE), <long> ((j - i) * PAGE))
        i = j


cdef void discard_batch(Region_t *r, uint64_t *pages, uint8_t *ways, uint32_t n, const uint8_t *zeros) noexcept nogil:
    """Pages in hand read as zeros from now on, and nothing is kept of them, here or away."""
    cdef uint32_t i
    cdef bint waiters[BATCH]
    for i in range(n):
        if ways[i] == WAY_ZERO:
            zero_pinned(r, pages[i], zeros)
        elif ways[i] == WAY_REPRIEVE:
            reprieve_zero(r, pages[i], zeros)
        else:
            forget_stored(r, pages[i], pages[i] + 1)
    punch_all(r, pages, ways, n)
    pthread_mutex_lock(&r.lock)
    for i in range(n):
        waiters[i] = False
        if ways[i] == WAY_FORGET or ways[i] == WAY_PUNCH:
            waiters[i] = set_state(r, pages[i], PAGE_AWAY)
        if ways[i] == WAY_PUNCH:
            resident_gone(&r.set, <uint32_t> pages[i])
            r.resident -= 1
    pthread_cond_broadcast(&r.changed)
    pthread_mutex_unlock(&r.lock)
    for i in range(n):
        if waiters[i]:
            wake(r, pages[i], 1)


cdef uint32_t take_to_discard(Region_t *r, uint64_t *page, uint64_t end, uint64_t *pages, uint8_t *ways, uint64_t *busy_first,
                              uint64_t *busy_end, bint *kept) noexcept nogil:
    """Under the lock: the next pages of a run, in hand. Those that are in other hands lie within 'busy'; 'kept': some stay lost."""
    cdef uint32_t n = 0, looked = 0
    cdef int way
    while page[0] < end and n < BATCH and looked < 8 * BATCH:
        way = way_to_discard(r, page[0])
        looked += 1
        if way == WAY_NONE:
            busy_first[0] = min(busy_first[0], page[0])
            busy_end[0] = page[0] + 1
        elif way == WAY_KEEP:
            kept[0] = True
        elif way != WAY_FORGET or state_of(r, page[0]) != PAGE_AWAY or store_holds(r, page[0]):
            if state_of(r, page[0]) == PAGE_LOST or state_of(r, page[0]) == PAGE_DAMAGED:
                no_longer_lost(r, page[0])
            r.resident += way == WAY_REPRIEVE
            r.states[page[0]] = <uint8_t> ((r.states[page[0]] & FLAG_PINNED) | (PAGE_EVICTING if way == WAY_PUNCH else PAGE_FETCHING))
            pages[n] = page[0]
            ways[n] = <uint8_t> way
            n += 1
        page[0] += 1
    return n


cdef void discard_run(Region_t *r, uint64_t page, uint64_t end, const uint8_t *zeros, uint64_t *busy_first, uint64_t *busy_end,
                      bint *kept) noexcept nogil:
    """Discard a run but for what is in other hands."""
    cdef uint64_t pages[BATCH]
    cdef uint8_t ways[BATCH]
    cdef uint32_t n
    busy_first[0] = end
    busy_end[0] = page
    while page < end and not load32(&r.stopping, ACQUIRE):
        pthread_mutex_lock(&r.lock)
        n = take_to_discard(r, &page, end, pages, ways, busy_first, busy_end, kept)
        pthread_mutex_unlock(&r.lock)
        if n:
            discard_batch(r, pages, ways, n, zeros)


# --- what the application asks for ---------------------------------------------------------------------------------

cdef enum Outcome:
    DONE = 0
    GONE_LOST = 1
    GONE_FULL = 2
    GONE_STOPPED = 3


cdef int make_resident(Attachment *a, uint64_t first, uint64_t end, bint writable, uint64_t deadline) noexcept nogil:
    """Bring a run of at most WINDOW_MAX pages in and wait for it. Writable: dirty when it returns, so that
    the process may make it writable without asking."""
    cdef Region_t *r = a.region
    cdef uint64_t page
    cdef Batch *b
    cdef int state
    cdef bint all_there
    cdef uint64_t began = ran_ns(&r.store.running)
    while True:
        all_there = True
        pthread_mutex_lock(&r.lock)
        for page in range(first, end):
            if load32(&r.stopping, ACQUIRE) or load32(&a.leaving, ACQUIRE) or load32(&a.dead, RELAXED):
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
                no_longer_lost(r, page)
                set_state(r, page, PAGE_AWAY)
                state = PAGE_AWAY
            if state == PAGE_DIRTY or (state == PAGE_CLEAN and not writable):
                continue
            all_there = False
            if state == PAGE_CLEAN:
                r.states[page] = <uint8_t> ((r.states[page] & ~STATE_MASK) | PAGE_FETCHING)
                pthread_mutex_unlock(&r.lock)
                forget_stored(r, page, page + 1)
                protect(r, page, 1, False)
                arrived(r, page, 1, PAGE_DIRTY)
                break
            b = take_batch(a) if state == PAGE_AWAY and has_room(r) else NULL
            if b != NULL:
                b.fault = False
                b.write_all = writable
                claim(r, page, page, end, False, b)
                pthread_mutex_unlock(&r.lock)
                bring_in(r, b)
            else:
                if r.full and state == PAGE_AWAY and not has_room(r) and ran_ns(&r.store.running) > began + store_patience(r.store, &r.in_vain, r.full_wait_ns):
                    pthread_mutex_unlock(&r.lock)
                    return GONE_FULL
                pthread_cond_signal(&r.work)
                cond_wait_until(&r.changed, &r.lock, now_ns() + 50000000ull)
                pthread_mutex_unlock(&r.lock)
            break
        else:
            pthread_mutex_unlock(&r.lock)
        if all_there:
            return DONE
        if ran_ns(&r.store.running) > deadline:
            return GONE_FULL


cdef void ask_ahead(Attachment *a, uint64_t page, uint64_t end, bint writable) noexcept nogil:
    """What somebody will wait for next is under way meanwhile, as far as there is room: a slow lender is waited for once."""
    cdef Region_t *r = a.region
    cdef Batch *b = NULL
    cdef uint64_t room
    while page < end:
        pthread_mutex_lock(&r.lock)
        while page < end and not is_away(r, page):
            page += 1
        room = r.budget - min(r.budget, r.resident + r.reserve // 4)
        b = take_batch(a) if page < end and room and r.batches_used < BATCHES_MAX // 2 else NULL
        if b != NULL:
            b.fault = False
            b.write_all = writable
            claim(r, page, page, min(page + min(room, <uint64_t> WINDOW_MAX), end), False, b)
            page += b.count
            b.wanted = WINDOW_MAX       # nobody waits yet: what cannot be had is asked for again, and its loss is said then
        pthread_mutex_unlock(&r.lock)
        if b == NULL:
            return
        if not links_later(r.links, bring_in_later, b):
            bring_in(r, b)


cdef void await_others(Region_t *r, uint64_t first, uint64_t end, int state, uint64_t wait_ns) noexcept nogil:
    """Until no page of this run is in other hands (fetching, or evicting), at most so long."""
    cdef uint64_t deadline = ran_ns(&r.store.running) + wait_ns
    pthread_mutex_lock(&r.lock)
    while first < end and ran_ns(&r.store.running) < deadline and not load32(&r.stopping, ACQUIRE):
        if state_of(r, first) == state:
            cond_wait_until(&r.changed, &r.lock, now_ns() + min(wait_ns, <uint64_t> 50000000))
        else:
            first += 1
            if first % 65536 == 0:          # nobody who faults waits for a walk through a large region
                pthread_mutex_unlock(&r.lock)
                pthread_mutex_lock(&r.lock)
    pthread_mutex_unlock(&r.lock)


cdef inline void unpin_page(Attachment *a, uint64_t page) noexcept nogil:
    """Under the lock: one pin less; the page may leave when nobody has it pinned."""
    cdef Region_t *r = a.region
    cdef uint32_t i
    cdef bint pinned = False
    a.pins[page] -= 1
    if a.pins[page]:
        return
    a.pinned -= 1
    for i in range(r.attachments_used):
        pinned |= r.attachments[i].pins != NULL and r.attachments[i].pins[page] != 0
    if not pinned:
        r.states[page] &= <uint8_t> ~FLAG_PINNED
        resident_unpin(&r.set, <uint32_t> page)
        r.pinned -= 1


cdef bint end_threads(Attachment *a) noexcept nogil:
    """Its fault threads end, also one that blocks in a call on the application's descriptor. False: one did not, for far
    longer than anything that it may wait for takes; it still uses the region."""
    cdef Region_t *r = a.region
    cdef uint64_t deadline = ran_ns(&r.store.running) + END_NS      # a node that stood still has given nobody time to end
    cdef uint32_t n
    store32(&a.leaving, 1, RELEASE)
    eventfd_write(a.stop_fd, 1)
    pthread_mutex_lock(&r.lock)
    while a.ended < a.started and ran_ns(&r.store.running) < deadline:
        for n in range(a.started):
            nudge(a.threads[n])
        cond_wait_until(&r.changed, &r.lock, now_ns() + NUDGE_NS)
    n = a.ended
    pthread_mutex_unlock(&r.lock)
    if n < a.started:
        return False
    for n in range(a.started):
        pthread_join(a.threads[n], NULL)
    return True


cdef bint leave(Attachment *a) noexcept nogil:
    """Its threads end, its pins go, its descriptors are closed. Whatever is under way for it ends within its own bounds. False:
    a thread did not end, and what it uses stays as it is."""
    cdef Region_t *r = a.region
    cdef uint64_t page = 0, i
    cdef uint16_t *pins
    cdef int uffd = a.uffd
    if not end_threads(a):
        return False
    pthread_mutex_lock(&r.lock)
    pthread_cond_broadcast(&r.changed)
    while a.users:
        cond_wait_until(&r.changed, &r.lock, now_ns() + 100000000ull)
    for i in range(r.parked_count):
        r.parked[i].who &= ~bit_of(a)
    while a.pinned:
        if a.pins[page]:
            a.pins[page] = 1
            unpin_page(a, page)
        page += 1
        if page % 65536 == 0:           # nobody who faults waits for a walk through a large region
            pthread_mutex_unlock(&r.lock)
            sched_yield()
            pthread_mutex_lock(&r.lock)
    pthread_cond_signal(&r.work)
    pins = a.pins
    a.pins = NULL
    r.condemned -= a.condemned_count
    a.condemned_count = 0
    free(a.condemned)
    a.condemned = NULL
    if uffd >= 0:
        r.attached -= 1
    pthread_mutex_unlock(&r.lock)
    pthread_rwlock_wrlock(&r.mapped)        # without the other lock: faults go on while a slow request of another process ends
    a.uffd = -1
    pthread_rwlock_unlock(&r.mapped)
    if uffd >= 0:
        close(uffd)
    close(a.guard)
    close(a.stop_fd)
    free(pins)
    a.guard = a.stop_fd = -1
    a.started = a.ended = 0
    store32(&a.dead, 0, RELAXED)
    store32(&a.leaving, 0, RELAXED)
    return True


cdef int not_registered(int uffd, uint64_t base, uint64_t pages) noexcept nogil:
    """0, or the errno of why the first or the last page of a mapping is not this userfaultfd's. Nothing is mapped there yet, so lifting
    a protection changes nothing."""
    cdef uffdio_writeprotect_t wp
    cdef uint32_t turns = 0
    cdef int end
    for end in range(2):
        wp.range.start = base + (pages - 1) * PAGE * <uint64_t> end
        wp.range.len = PAGE
        wp.mode = UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        while ioctl(uffd, UFFDIO_WRITEPROTECT, &wp) != 0:
            if errno == ENOENT or errno == EINVAL:
                return errno
            if errno != EAGAIN or turns > 1000:
                return 0            # a process that is gone, or whose address space is busy, is not a lie
            let_it_run(&turns)
    return 0


cdef class Region:
    """One region of one or several processes. See engine/region.py for its contract."""

    def __cinit__(self, Links links not None, uint64_t pages, uint64_t resident_pages, *, str name, uint32_t fault_threads=1,
                  uint32_t evictor_threads=1, uint64_t full_wait_ms=2000, uint32_t busy_poll_us=0, str poison="auto"):
        cdef Region_t *r
        cdef int result, i
        if not 0 < pages <= 1 << 32:
            raise errors.UsageError(f"a region of {pages} pages: must be 1 to 2^32")
        if resident_pages < RESIDENT_PAGES_MIN and resident_pages < pages:
            raise errors.UsageError(
                f"resident: {resident_pages * PAGE} bytes, must be at least {RESIDENT_PAGES_MIN * PAGE} ({RESIDENT_PAGES_MIN} pages), or "
                f"as much as the region ({pages * PAGE})")
        if min(resident_pages, pages) > RESIDENT_PAGES_MAX:
            raise errors.UsageError(
                f"resident: {resident_pages * PAGE} bytes, must be at most {<uint64_t> RESIDENT_PAGES_MAX * PAGE}")
        if not 1 <= fault_threads <= THREADS_MAX or not 1 <= evictor_threads <= THREADS_MAX:
            raise errors.UsageError(f"a region has 1 to {THREADS_MAX} threads of each kind")
        r = <Region_t *> calloc(1, sizeof(Region_t))
        if r == NULL:
            raise MemoryError
        self.r = r
        self.links = links
        self.name = name
        r.memfd = -1
        for i in range(ATTACHMENTS_MAX):
            r.attachments[i].region = r
            r.attachments[i].uffd = r.attachments[i].guard = r.attachments[i].stop_fd = -1
        r.links = links.live()
        r.store = r.links.store
        r.pages = pages
        r.budget = resident_pages
        # Where everything fits, nothing ever has to leave.
        if resident_pages < pages:
            r.reserve = r.reserve_least = min(max(resident_pages // 16, <uint64_t> 2 * BATCH), resident_pages // 4)
        pattern_init(&r.reads, pages, <uint32_t> min(r.budget // 8, <uint64_t> WINDOW_MAX))
        pattern_init(&r.writes, pages, <uint32_t> min(r.budget // 8, <uint64_t> WINDOW_MAX))
        pattern_init(&r.maps, pages, <uint32_t> min(r.budget // 8, <uint64_t> WINDOW_MAX))
        r.full_wait_ns = r.hold_ns = full_wait_ms * 1000000
        r.busy_poll_ns = busy_poll_us * 1000ull
        r.fault_threads = fault_threads
        r.evictor_threads = evictor_threads
        r.can_poison = poison == "auto"
        pthread_mutex_init(&r.lock, NULL)
        rwlock_init_fair(&r.mapped)
        cond_init_monotonic(&r.changed)
        cond_init_monotonic(&r.work)
        r.states = <uint8_t *> calloc(pages, 1)
        r.parked = <Parked *> malloc(PARKED_MAX * sizeof(Parked))
        r.memfd = memfd_create(b"ramster-region", MFD_CLOEXEC | MFD_ALLOW_SEALING)
        if r.states == NULL or r.parked == NULL or r.memfd < 0 or \
                resident_init(&r.set, min(r.budget, pages) - r.reserve, r.reserve + SPARE_MAX + OVERDRAFT) != 0 or \
                ftruncate(r.memfd, <long> (pages * PAGE)) != 0 or \
                fcntl(r.memfd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0:
            if errno == EMFILE or errno == ENFILE:
                raise OSError(errno, strerror(errno).decode())
            raise errors.StoreFull(f"cannot make a region of {pages} pages: {strerror(errno).decode()}")
        label = name.encode(errors="replace")[:sizeof(r.label) - 1]
        memcpy(r.label, <const char *> label, len(label))
        result = store_create_pool(r.store, True, pages, False, &r.pool)
        if result != OK:
            if result == NO_MEMORY and (errno == EMFILE or errno == ENFILE):
                raise OSError(errno, strerror(errno).decode())
            raise errors.StoreFull("no memory for the page table of another region" if result == NO_MEMORY else
                                   "all pools of this node are in use")

    def __dealloc__(self):
        cdef Region_t *r = self.r
        cdef int i
        if r == NULL:
            return
        try:
            self.shut()
        except errors.RamsterError:
            pass
        if r.abandoned:
            return                  # a thread still uses all of it
        if r.memfd >= 0:
            close(r.memfd)
        for i in range(BATCHES_MAX):
            free(r.batches[i].bytes)
        free(r.states)
        resident_free(&r.set)
        free(r.parked)
        pthread_cond_destroy(&r.changed)
        pthread_cond_destroy(&r.work)
        pthread_mutex_destroy(&r.lock)
        pthread_rwlock_destroy(&r.mapped)
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
    def attached(self):
        """Processes that have it mapped."""
        return load32(&self.live().attached, RELAXED)

    cdef Attachment *attachment(self, uint32_t number) except NULL:
        cdef Region_t *r = self.live()
        if number >= ATTACHMENTS_MAX or not r.attachments[number].used:
            raise errors.UsageError(f"attachment {number}: the region has none of this number")
        return &r.attachments[number]

    def wait_when_full(self, uint64_t hold_ms):
        cdef Region_t *r = self.live()
        with nogil:
            pthread_mutex_lock(&r.lock)
            r.hold_ns = max(r.full_wait_ns, hold_ms * 1000000)
            pthread_mutex_unlock(&r.lock)

    def join(self):
        cdef Region_t *r = self.live()
        cdef Attachment *a
        cdef int pair[2]
        cdef uint32_t number = 0
        while number < ATTACHMENTS_MAX and r.attachments[number].used:
            number += 1
        if number == ATTACHMENTS_MAX:
            raise errors.Refused(f"{ATTACHMENTS_MAX} processes use this region already, its limit")
        a = &r.attachments[number]
        a.stop_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if a.stop_fd < 0 or socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) != 0:
            failure = errno
            if a.stop_fd >= 0:
                close(a.stop_fd)
                a.stop_fd = -1
            raise OSError(failure, strerror(failure).decode())
        a.guard = pair[0]
        a.used = True
        with nogil:
            pthread_rwlock_wrlock(&r.mapped)
            r.attachments_used = max(r.attachments_used, number + 1)
            pthread_rwlock_unlock(&r.mapped)
        # The other end is the caller's only: it must vanish with the process that gets it.
        return number, pair[1]

    def attach(self, uint32_t number, int uffd, uint64_t base, uint64_t features):
        cdef Attachment *a
        cdef Region_t *r
        cdef uint32_t i
        try:
            a = self.attachment(number)
            if a.uffd >= 0:
                raise errors.UsageError("this process has mapped the region already")
        except BaseException:
            close(uffd)
            raise
        r = a.region
        failure = not_registered(uffd, base, r.pages)
        if failure:
            close(uffd)
            raise errors.UsageError(
                f"base: the memory at {base:#x} is not registered with the userfaultfd ({strerror(failure).decode()})")
        fcntl(uffd, F_SETFL, fcntl(uffd, F_GETFL) | O_NONBLOCK)     # else a fault thread could not be ended
        a.base = base
        a.can_continue_protected = (features & UFFD_FEATURE_WP_UNPOPULATED) != 0
        with nogil:
            pthread_mutex_lock(&r.lock)
            r.can_poison = r.can_poison and (features & UFFD_FEATURE_POISON) != 0
            r.attached += 1
            pthread_mutex_unlock(&r.lock)
            pthread_rwlock_wrlock(&r.mapped)
            a.uffd = uffd           # from here on evictors protect here, too
            pthread_rwlock_unlock(&r.mapped)
        for i in range(r.fault_threads):
            need_thread(&a.threads[i], fault_main, a, b"ramster-fault")
            a.started += 1
        while r.evictors_started < r.evictor_threads:
            need_thread(&r.evictors[r.evictors_started], evictor_main, r, b"ramster-evict")
            r.evictors_started += 1

    def detach(self, uint32_t number):
        cdef Attachment *a = self.attachment(number)
        if load32(&a.leaving, RELAXED):
            raise errors.UsageError("this process is being detached already")
        if not leave(a):
            a.region.abandoned = True
            raise errors.RamsterError(STUCK)
        a.used = False

    cdef Region_t *begin(self, Attachment *a, uint64_t first, uint64_t count) except NULL:
        """Checks a run and counts this call in, so that close() and detach() wait for it."""
        cdef Region_t *r = self.live()
        if a != NULL and a.uffd < 0:
            raise errors.UsageError("this process has not mapped the region yet")
        if count == 0 or first >= r.pages or count > r.pages - first:
            raise errors.UsageError(f"pages {first} to {first + count} are not all in a region of {r.pages} pages")
        with nogil:
            pthread_mutex_lock(&r.lock)
            r.users += 1
            if a != NULL:
                a.users += 1
            pthread_mutex_unlock(&r.lock)
        return r

    cdef int end(self, Region_t *r, Attachment *a) except -1:
        with nogil:
            pthread_mutex_lock(&r.lock)
            r.users -= 1
            if a != NULL:
                a.users -= 1
            pthread_cond_broadcast(&r.changed)
            pthread_mutex_unlock(&r.lock)
        return 0

    cdef int wait_in(self, Attachment *a, uint64_t first, uint64_t count, bint writable, uint64_t *done) except -1:
        """Make a run resident, in windows, each with its own deadline. 'done': pages of the windows that are."""
        cdef Region_t *r = a.region
        cdef uint64_t page = first, end
        cdef int outcome = DONE
        with nogil:
            while page < first + count and outcome == DONE:
                end = min(page + WINDOW_MAX, first + count)
                if end < first + count:
                    ask_ahead(a, page, min(page + AHEAD_WINDOWS * WINDOW_MAX, first + count), writable)
                done[0] = page - first
                outcome = make_resident(a, page, end, writable,
                                        ran_ns(&r.store.running) + r.links.give_up_ns + r.full_wait_ns + 1000000000ull)
                page = end
        return outcome

    def pin(self, uint32_t number, uint64_t first, uint64_t count):
        cdef Attachment *a = self.attachment(number)
        cdef Region_t *r = self.begin(a, first, count)
        cdef uint64_t page
        cdef uint64_t fresh
        cdef int outcome
        cdef bint fits = True
        try:
            with nogil:
                pthread_mutex_lock(&r.lock)
                fresh = 0
                if a.pins == NULL:
                    a.pins = <uint16_t *> calloc(r.pages, 2)    # virtual until it is used
                    fits = a.pins != NULL
                for page in range(first, first + count):
                    fits = fits and a.pins[page] < 0xffff
                    fresh += not r.states[page] & FLAG_PINNED
                fits = fits and r.pinned + fresh + r.reserve_least <= r.budget
                if fits:
                    for page in range(first, first + count):
                        a.pins[page] += 1
                        a.pinned += a.pins[page] == 1
                        r.states[page] |= FLAG_PINNED
                    r.pinned += fresh
                fresh = r.pinned
                pthread_mutex_unlock(&r.lock)
            if not fits:
                raise errors.RegionFull(
                    f"cannot pin {count} pages: {fresh} are pinned, and at most {r.budget - r.reserve_least} of the {r.budget} "
                    "resident pages may be")
            outcome = self.wait_in(a, first, count, True, &fresh)
            if outcome != DONE:
                self.drop_pins(a, first, count)
                self.fail(outcome, first, count)
        finally:
            self.end(r, a)

    cdef int drop_pins(self, Attachment *a, uint64_t first, uint64_t count) except -1:
        cdef Region_t *r = a.region
        cdef uint64_t page
        cdef bint pinned = a.pins != NULL
        with nogil:
            pthread_mutex_lock(&r.lock)
            for page in range(first, first + count):
                pinned = pinned and a.pins[page] > 0
            if pinned:
                for page in range(first, first + count):
                    unpin_page(a, page)
            pthread_cond_signal(&r.work)
            pthread_mutex_unlock(&r.lock)
        if not pinned:
            raise ValueError(f"pages {first} to {first + count} are not all pinned")
        return 0

    cdef object fail(self, int outcome, uint64_t first, uint64_t count):
        if outcome == GONE_LOST:
            runs = self.lost_runs(self.r, first, count, False, False, NULL)
            raise errors.RegionLost(f"{sum(n for _, n in runs)} of {count} pages from page {first} on are lost", runs=runs)
        if outcome == GONE_FULL:
            raise errors.RegionFull(f"no room for pages {first} to {first + count} within the bounded wait")
        raise errors.UsageError("the region was closed meanwhile")

    def unpin(self, uint32_t number, uint64_t first, uint64_t count):
        cdef Attachment *a = self.attachment(number)
        cdef Region_t *r = self.begin(a, first, count)
        try:
            self.drop_pins(a, first, count)
        finally:
            self.end(r, a)

    def prefetch(self, uint32_t number, uint64_t first, uint64_t count):
        cdef Attachment *a = self.attachment(number)
        cdef Region_t *r = self.begin(a, first, count)
        cdef uint64_t pinned, done = 0
        cdef int outcome
        try:
            runs = self.lost_runs(r, first, count, False, False, NULL)
            if runs:
                self.fail(GONE_LOST, first, count)
            pinned = load64(&r.pinned, RELAXED)
            count = min(count, r.budget - r.reserve_least - min(pinned, r.budget - r.reserve_least))
            if count == 0:
                return 0                # all that may be is pinned
            outcome = self.wait_in(a, first, count, False, &done)
            if outcome == GONE_FULL:
                return done             # what the budget allows is no more, now
            if outcome != DONE:
                self.fail(outcome, first, count)
            return count
        finally:
            self.end(r, a)

    def evict(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(NULL, first, count)
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
                # A page that was just touched may still be in the hands of whoever has mapped it. What a lender is asked for
                # is not waited for.
                await_others(r, first, first + count, PAGE_FETCHING, 100000000ull)
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
                        left = evict(r, pages, n, clean, buffer, r.full_wait_ns)
                        evicted += left
                        full = left < n
                        unpark(r)
                await_others(r, first, first + count, PAGE_EVICTING, r.full_wait_ns + 1000000000ull)
            if full:
                raise errors.RegionFull(f"no room for more pages: {evicted} were written out, the rest stays resident")
            return evicted
        finally:
            free(buffer)
            self.end(r, NULL)

    def discard(self, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(NULL, first, count)
        cdef uint8_t *zeros = <uint8_t *> calloc(1, PAGE)
        cdef uint64_t page = first, end = first + count, deadline
        cdef bint kept = False, stopped
        try:
            if zeros == NULL:
                raise MemoryError
            with nogil:
                # Nothing of it needs the store's room or a lender. But what others have in hand ends within their own waits.
                deadline = ran_ns(&r.store.running) + r.links.give_up_ns + r.full_wait_ns + 1000000000ull
                discard_run(r, page, end, zeros, &page, &end, &kept)
                while page < end and not load32(&r.stopping, ACQUIRE) and ran_ns(&r.store.running) < deadline:
                    pthread_mutex_lock(&r.lock)
                    if way_to_discard(r, page) == WAY_NONE:
                        cond_wait_until(&r.changed, &r.lock, now_ns() + 50000000ull)
                    pthread_mutex_unlock(&r.lock)
                    discard_run(r, page, end, zeros, &page, &end, &kept)
                unpark(r)
                stopped = load32(&r.stopping, ACQUIRE)
            if stopped:
                self.fail(GONE_STOPPED, first, count)
            if page < end:
                raise errors.Refused(f"pages {page} to {end} were not discarded: somebody has them in hand for too long")
            if kept:
                runs = self.lost_runs(r, first, count, False, False, NULL)
                raise errors.RegionLost(
                    f"{sum(n for _, n in runs)} of {count} pages from page {first} on stay lost: with poison = \"guard\" that is for good",
                    runs=runs)
            return count
        finally:
            free(zeros)
            self.end(r, NULL)

    def advise(self, str kind, uint64_t first, uint64_t count):
        cdef Region_t *r = self.begin(NULL, first, count)
        cdef int number
        cdef bint kept
        try:
            if kind not in ADVICE:
                raise errors.UsageError(f"advice: {kind!r}, must be one of {', '.join(ADVICE)}")
            number = ADVICE[kind]
            with nogil:
                pthread_mutex_lock(&r.lock)
                kept = pattern_advise(&r.reads, number, first, first + count)
                if kept:
                    pattern_advise(&r.writes, number, first, first + count)
                    pattern_advise(&r.maps, number, first, first + count)
                pthread_mutex_unlock(&r.lock)
            if not kept:
                raise errors.UsageError(f"more than {RANGES_MAX} ranges of the region have an advice of their own")
        finally:
            self.end(r, NULL)

    cdef list lost_runs(self, Region_t *r, uint64_t first, uint64_t count, bint by_touch, bint at_once, uint64_t *undecided):
        """Runs of pages whose only copy is gone or out of reach; by_touch: of pages that a touch would not get; at_once: nor have to
        wait for. 'undecided' counts those whose lender may come back, or that are about to be had again."""
        cdef Attachment *ignored = NULL
        cdef bint condemned, good
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
                    bad[i] = state == PAGE_DAMAGED
                    if state != PAGE_LOST and state != PAGE_AWAY:
                        continue
                    good = stored_copy_good(r, page + i) and (state == PAGE_AWAY or r.can_poison)
                    bad[i] = not good
                    if not by_touch:
                        continue
                    condemned = state == PAGE_LOST or is_condemned_anywhere(r, page + i, &ignored)
                    bad[i] |= condemned
                    if good and not r.states[page + i] & FLAG_REFUSED and (condemned or not stored_copy_at_hand(r, page + i)):
                        undecided[0] += 1
                        bad[i] |= at_once
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
        cdef Region_t *r = self.begin(NULL, first, count)
        cdef uint64_t undecided, until = ran_ns(&r.store.running) + min(r.links.give_up_ns + REVIVE_NS, <uint64_t> CHECK_MAX_NS)
        cdef bint late = False
        try:
            while True:
                # A lender that is out of reach now is back, or counts as lost, within give_up: only then is there an answer.
                undecided = 0
                links_look_at_spill(r.links)
                runs = self.lost_runs(r, first, count, True, late, &undecided)
                if undecided == 0 or late or load32(&r.stopping, ACQUIRE):
                    return runs
                with nogil:
                    pthread_mutex_lock(&r.lock)
                    cond_wait_until(&r.changed, &r.lock, now_ns() + CHECK_NS)
                    pthread_mutex_unlock(&r.lock)
                late = ran_ns(&r.store.running) > until
        finally:
            self.end(r, NULL)

    def statistics(self):
        cdef Region_t *r = self.live()
        cdef uint64_t census[5]
        cdef uint64_t page = 0
        cdef uint32_t n
        cdef uint8_t states[CENSUS]
        cdef uint64_t now[16]
        memset(census, 0, sizeof(census))
        with nogil:
            while page < r.pages:
                n = <uint32_t> min(<uint64_t> CENSUS, r.pages - page)
                pthread_mutex_lock(&r.lock)     # for a copy, no longer: faults need it
                memcpy(states, r.states + page, n)
                pthread_mutex_unlock(&r.lock)
                page = store_census(r.store, r.pool, page, n, states, census)
            pthread_mutex_lock(&r.lock)
            now[:] = [r.resident, r.pinned, r.lost, r.attached, r.full, r.faults, r.faults_wp, r.faults_minor, r.faults_parked,
                      r.evictions, r.evictions_clean, r.refused, r.reads.prefetched, r.reads.hits, r.reads.wasted, r.enough]
            pthread_mutex_unlock(&r.lock)
        values = dict(
            pages=r.pages, resident_pages=now[0], budget_pages=r.budget, pinned_pages=now[1], attached_processes=now[3],
            local_pages=census[1] + census[2], remote_pages=census[3], lost_pages=now[2] + census[4], faults=now[5],
            faults_local=load64(&r.faults_local, RELAXED), faults_remote=load64(&r.faults_remote, RELAXED),
            faults_zero=load64(&r.faults_zero, RELAXED), faults_wp=now[6], faults_minor=now[7], faults_parked=now[8],
            prefetched=now[12], prefetch_hits=now[13], prefetch_wasted=now[14], evictions=now[9], evictions_clean=now[10], refused=now[11], full=now[4],
            thrashing=1 if now[15] else 0, enough_pages=now[15], polled_us=load64(&r.polled_ns, RELAXED) // 1000,
            fault_local_p50_us=quantile(&r.local_ns, 0.5) // 1000, fault_local_p99_us=quantile(&r.local_ns, 0.99) // 1000,
            fault_remote_p50_us=quantile(&r.remote_ns, 0.5) // 1000, fault_remote_p99_us=quantile(&r.remote_ns, 0.99) // 1000)
        # Most of a large region is not looked at, so this is what is left.
        elsewhere = sum(values[f"{name}_pages"] for name in ("resident", "local", "remote", "lost"))
        return values | dict(never_touched_pages=max(0, r.pages - elsewhere))

    def troubles(self):
        cdef Region_t *r = self.live()
        cdef uint64_t lost, refused, removed
        cdef bint full
        cdef uint32_t turns = 0
        with nogil:
            # The event loop asks: it waits for no region. Without the lock, what is being counted just now may be seen in part.
            while pthread_mutex_trylock(&r.lock) != 0 and turns < TROUBLES_TURNS:
                turns += 1
                sched_yield()
            removed = r.lost_removed
            lost = r.lost - min(r.lost, removed)
            refused, removed, full = r.refused, r.removed, r.full
            if turns < TROUBLES_TURNS:
                pthread_mutex_unlock(&r.lock)
        return lost, refused, removed, bool(full)

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
            for i in range(ATTACHMENTS_MAX):
                if r.attachments[i].used:
                    if leave(&r.attachments[i]):
                        r.attachments[i].used = False
                    else:
                        r.abandoned = True
            pthread_mutex_lock(&r.lock)
            pthread_cond_broadcast(&r.work)
            pthread_cond_broadcast(&r.changed)
            pthread_mutex_unlock(&r.lock)
        if r.abandoned:
            raise errors.RamsterError(STUCK)
        with nogil:
            for i in range(r.evictors_started):
                pthread_join(r.evictors[i], NULL)
            # Gets under way end within give_up: their replies must not find this memory gone.
            pthread_mutex_lock(&r.lock)
            while r.batches_used or r.users:
                cond_wait_until(&r.changed, &r.lock, now_ns() + 100000000ull)
            pthread_mutex_unlock(&r.lock)
            if r.pool:
                store_destroy_pool(r.store, r.pool)
        return 0
