"""A walk over memory that verifies every byte of every page it visits, without the GIL.

Each page holds what follows from its number, its version and the walk's salt: two words that name it, 254 words of noise,
and one word repeated to the end, so that LZ4 halves it. Version 0 was never written and is zeros. The pattern is that of
a verifying swap test: visit, compare, and rewrite every n-th page with its next version.

With several threads each has a slice of its own; with `shared` everybody visits every page, and page p is written by
thread p mod threads alone. A reader looks at the page's count of begun writes after it has looked at the page: if that
has moved, the page is not judged.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ramster.engine._c.atomic cimport ACQUIRE, RELAXED, RELEASE, fence, load32, load64, sched_yield, store32, store64
from ramster.engine._c.pthread cimport now_ns, pthread_join, pthread_t, start_thread

from ramster import errors

cdef enum:
    PAGE_BYTES = 4096
    WORDS = 512
    HALF = 256
    THREADS_MAX = 64

cdef enum:
    RANDOM = 0
    STRIDE = 1
    SEQUENTIAL = 2

cdef enum:
    RIGHT = 0
    EMPTY = 1
    STALE = 2
    FOREIGN = 3
    ALTERED = 4

cdef struct Ground:
    uint64_t *memory
    uint64_t pages
    uint64_t salt
    uint32_t *begun             # versions: of the last write that began, and that was done
    uint32_t *done
    uint32_t threads
    uint32_t order
    uint32_t dirty
    bint shared
    uint64_t visits             # of each thread
    uint64_t deadline_ns
    uint64_t seed
    uint32_t go

cdef struct Walker:
    Ground *ground
    uint32_t number
    pthread_t thread
    uint64_t visits
    uint64_t writes
    uint64_t skipped
    uint64_t verdicts[5]
    uint64_t first[4]


cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    x += 0x9e3779b97f4a7c15ull
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebull
    return x ^ (x >> 31)


cdef void fill(uint64_t *p, uint64_t page, uint32_t version, uint64_t salt) noexcept nogil:
    cdef uint64_t s = mix((page * 0x10001 + version) ^ salt) | 1, k = mix(s)
    cdef int i
    p[0] = (page << 32) | version
    p[1] = salt
    for i in range(2, HALF):
        s ^= s << 13
        s ^= s >> 7
        s ^= s << 17
        p[i] = s
    for i in range(HALF, WORDS):
        p[i] = k


cdef bint equal(const uint64_t *p, uint64_t page, uint32_t version, uint64_t salt) noexcept nogil:
    cdef uint64_t s, k, bad
    cdef int i
    if version == 0:
        bad = 0
        for i in range(WORDS):
            bad |= p[i]
        return bad == 0
    s = mix((page * 0x10001 + version) ^ salt) | 1
    k = mix(s)
    bad = (p[0] ^ ((page << 32) | version)) | (p[1] ^ salt)
    for i in range(2, HALF):
        s ^= s << 13
        s ^= s >> 7
        s ^= s << 17
        bad |= p[i] ^ s
    for i in range(HALF, WORDS):
        bad |= p[i] ^ k
    return bad == 0


cdef int judge(const uint64_t *p, uint64_t page, uint32_t version, uint64_t salt) noexcept nogil:
    cdef uint32_t found = <uint32_t> p[0]
    if equal(p, page, version, salt):
        return RIGHT
    if equal(p, page, 0, salt):
        return EMPTY
    if p[1] == salt and p[0] >> 32 == page and found < version and equal(p, page, found, salt):
        return STALE
    if (p[1] != salt or p[0] >> 32 != page) and equal(p, p[0] >> 32, found, p[1]):
        return FOREIGN
    return ALTERED


cdef void visit(Walker *w, uint64_t page, bint rewrite) noexcept nogil:
    cdef Ground *g = w.ground
    cdef uint64_t *p = g.memory + page * WORDS
    cdef uint32_t version = load32(&g.done[page], ACQUIRE)
    cdef uint64_t copy[WORDS]
    cdef int verdict, i
    if not g.shared:
        verdict = judge(p, page, version, g.salt)
    else:
        for i in range(WORDS):
            copy[i] = load64(&p[i], RELAXED)
        verdict = judge(copy, page, version, g.salt)
        fence(ACQUIRE)
        if load32(&g.begun[page], RELAXED) != version:
            w.skipped += 1
            verdict = RIGHT
        rewrite = rewrite and page % g.threads == w.number
    w.visits += 1
    w.verdicts[verdict] += 1
    if verdict != RIGHT and w.first[1] == 0:
        w.first[0] = page
        w.first[1] = version + 1        # never 0, which stands for 'none'
        w.first[2] = p[0]
        w.first[3] = p[1]
    if rewrite:
        store32(&g.begun[page], version + 1, RELAXED)
        fence(RELEASE)
        if not g.shared:
            fill(p, page, version + 1, g.salt)
        else:
            fill(copy, page, version + 1, g.salt)
            for i in range(WORDS):
                store64(&p[i], copy[i], RELAXED)
        store32(&g.done[page], version + 1, RELEASE)
        w.writes += 1


cdef uint64_t gcd(uint64_t a, uint64_t b) noexcept nogil:
    cdef uint64_t t
    while b:
        t = a % b
        a = b
        b = t
    return a


cdef void *walk(void *argument) noexcept nogil:
    """Passes over its pages until it has made its visits: each pass meets each page once, in an order of its own."""
    cdef Walker *w = <Walker *> argument
    cdef Ground *g = w.ground
    cdef uint64_t first = 0, n = g.pages, turn = 0, step = 0, at = 0, page, key
    cdef uint64_t bits = 1, mask, x
    if not g.shared:
        first = g.pages * w.number // g.threads
        n = g.pages * (w.number + 1) // g.threads - first
    while (<uint64_t> 1 << bits) < n:
        bits += 1
    mask = (<uint64_t> 1 << bits) - 1
    while not load32(&g.go, ACQUIRE):
        sched_yield()
    key = mix(g.seed * 1000003 + w.number)
    while w.visits < g.visits:
        if turn % (mask + 1 if g.order == RANDOM else n) == 0:      # a new pass
            key = mix(key)
            step = (key % n) | 1
            while gcd(step, n) != 1:
                step += 2
            if g.order == STRIDE:
                at = mix(key) % n
        if g.order == SEQUENTIAL:
            page = turn % n
        elif g.order == STRIDE:
            at = (at + step) % n
            page = at
        else:
            # A permutation of 2^bits numbers, of which those below n count.
            x = (turn ^ key) & mask
            x ^= x >> (bits // 2 + 1)
            x = (x * ((mix(key) << 1) | 1)) & mask
            x ^= x >> (bits // 2 + 1)
            page = (x * 0x9e3779b97f4a7c15ull + (key >> 20)) & mask
        turn += 1
        if page >= n:
            continue
        visit(w, first + page, g.dirty and w.visits % g.dirty == 0)
        if w.visits % 64 == 0 and now_ns() > g.deadline_ns:
            break
    return NULL


cdef class Walk:
    """Memory whose pages belong to this walk: zeros now, and written by nobody else.

    memory: writable, whole pages. salt: another walk's pages are foreign here.

    run: so many visits per thread, or until the seconds have passed. order: "random" (each page once per pass), "stride" (the same by
    steps of one large random number), "sequential". dirty: every n-th visited page is rewritten; 0: none. UsageError for what
    makes no sense.
    """
    cdef Ground ground
    cdef uint8_t[::1] view

    def __cinit__(self, uint8_t[::1] memory, uint64_t salt):
        if memory.shape[0] == 0 or memory.shape[0] % PAGE_BYTES:
            raise errors.UsageError(f"{memory.shape[0]} bytes are not whole pages")
        self.view = memory
        self.ground.memory = <uint64_t *> &memory[0]
        self.ground.pages = <uint64_t> memory.shape[0] // PAGE_BYTES
        self.ground.salt = salt
        self.ground.begun = <uint32_t *> calloc(self.ground.pages, 4)
        self.ground.done = <uint32_t *> calloc(self.ground.pages, 4)
        if self.ground.begun == NULL or self.ground.done == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.ground.begun)
        free(self.ground.done)

    @property
    def pages(self):
        return self.ground.pages

    @property
    def written(self):
        """Pages that were written at least once."""
        cdef uint64_t i, n = 0
        for i in range(self.ground.pages):
            n += load32(&self.ground.done[i], RELAXED) != 0
        return n

    def run(self, *, uint64_t visits, uint32_t threads=1, double seconds=3600.0, str order="random", uint32_t dirty=0,
            uint64_t seed=1, bint shared=False):
        cdef Ground *g = &self.ground
        cdef Walker walkers[THREADS_MAX]
        cdef uint64_t begin
        cdef uint32_t i, started = 0
        names = ("random", "stride", "sequential")
        if not 0 < threads <= THREADS_MAX or (threads > g.pages and not shared) or order not in names or visits == 0:
            raise errors.UsageError(f"1 to {THREADS_MAX} threads, an order of {', '.join(names)}, at least one visit")
        g.threads = threads
        g.order = names.index(order)
        g.dirty = dirty
        g.shared = shared
        g.visits = visits
        g.seed = seed
        g.go = 0
        memset(walkers, 0, sizeof(walkers))
        with nogil:
            for i in range(threads):
                walkers[i].ground = g
                walkers[i].number = i
                if start_thread(&walkers[i].thread, walk, &walkers[i], b"walk") != 0:
                    g.visits = 0
                    break
                started += 1
            begin = now_ns()
            g.deadline_ns = begin + <uint64_t> (seconds * 1e9)
            store32(&g.go, 1, RELEASE)
            for i in range(started):
                pthread_join(walkers[i].thread, NULL)
            begin = now_ns() - begin
        if started != threads:
            raise MemoryError("cannot start the threads")
        totals = dict(visits=0, writes=0, skipped=0, ns=begin, empty=0, stale=0, foreign=0, altered=0, first=None)
        for i in range(threads):
            for name, value in (
                    ("visits", walkers[i].visits), ("writes", walkers[i].writes), ("skipped", walkers[i].skipped),
                    ("empty", walkers[i].verdicts[EMPTY]), ("stale", walkers[i].verdicts[STALE]),
                    ("foreign", walkers[i].verdicts[FOREIGN]), ("altered", walkers[i].verdicts[ALTERED])):
                totals[name] += value
            if walkers[i].first[1]:
                totals["first"] = (walkers[i].first[0], walkers[i].first[1] - 1, walkers[i].first[2], walkers[i].first[3])
        return totals
