# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
"""Native threads that hammer a store without the GIL, and windows on its native structures for tests.

Covers: put, get and flush from many threads on disjoint or shared keys with every page checked; struct offsets; the
shipping steps one by one. Does not cover: links, regions.

Each page is a function of (key, version), so a torn page, another key's page or an older version is recognised from the
bytes alone. For a single writer per key the check is that of a linearisable register: `done` is the last operation that
returned before the get began, `begun` the last one that had begun when it ended.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from ramster.engine._c.atomic cimport ACQUIRE, ACQ_REL, RELEASE, RELAXED, add64, load32, load64, sched_yield, store32, store64, sub64
from ramster.engine._c.crypto cimport EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CIPHER_CTX
from ramster.engine._c.pthread cimport now_ns, pthread_join, pthread_t, start_thread
from ramster.engine._link cimport Links, Links_t, get_page
from ramster.engine._store cimport (
    CORRUPT, FULL, LOST, MISS, OK, PAGE, POOLS_MAX, REMOTE, EntryHeader, ImageHeader, Pool, RemoteMeta, RemoteRef, Store, Store_t,
    store_flush, store_get, store_pool_pages, store_put, store_seal_image, store_ship_abort, store_ship_begin, store_ship_commit,
    store_unseal, store_unseal_begin, store_unseal_context)

from ramster import errors

cdef enum:
    PAGE_WORDS = 512
    KEYS_MAX = 1 << 14
    MARK = 0xa5000000           # top of the first word of a page that is not same-filled
    FILL = 0x50000000

cdef struct Shared:
    Store_t *store
    Links_t *links              # or NULL: what is on a lender is not fetched
    uint64_t pool
    uint32_t threads
    uint32_t keys
    uint32_t put_share          # of 100
    uint32_t get_share
    uint32_t remove_share       # exclusive gets; the rest are flushes
    uint32_t go
    bint shared_keys
    bint sparse
    bint lossy                  # ephemeral: any page may be missing
    uint64_t operations
    uint64_t deadline_ns
    uint64_t wait_ns
    uint64_t *done              # per key: operation number * 2 + (1 when it stored a page)
    uint64_t *begun             # per key, or per thread when keys are shared

cdef struct Worker:
    Shared *shared
    pthread_t thread
    uint32_t number
    uint64_t random
    uint64_t puts, gets, hits, misses, flushes, flushed, removes, refused, remote
    uint64_t corrupt, garbage, foreign, stale, vanished, failed


cdef inline uint64_t mix(uint64_t x) noexcept nogil:
    x ^= x >> 30
    x *= 0xbf58476d1ce4e5b9ull
    x ^= x >> 27
    x *= 0x94d049bb133111ebull
    return x ^ (x >> 31)


cdef inline uint64_t draw(Worker *w) noexcept nogil:
    w.random += 0x9e3779b97f4a7c15ull
    return mix(w.random)


cdef void make_page(uint64_t *words, uint32_t key, uint64_t version) noexcept nogil:
    """A third same-filled, a third that compresses to 128 to 2048 bytes, a third that does not at all; by key and version
    alone."""
    cdef uint64_t seed = mix((<uint64_t> key << 44) ^ version)
    cdef uint32_t kind = <uint32_t> (seed % 3), i, period
    cdef uint64_t pattern
    if kind == 0:
        pattern = FILL | (<uint64_t> key << 14) | (version & 0x3fff)
        pattern |= pattern << 32
        for i in range(PAGE_WORDS):
            words[i] = pattern
        return
    period = PAGE_WORDS if kind == 1 else 16 << (seed >> 32) % 5
    for i in range(PAGE_WORDS):
        words[i] = mix(seed + i) if i < period else words[i - period]
    words[0] = (<uint64_t> MARK << 32) | key
    words[1] = version
    words[PAGE_WORDS - 1] = version ^ key


cdef int read_page(const uint64_t *words, uint32_t *key, uint64_t *version, uint64_t near) noexcept nogil:
    """What a page says it is; -1 when it is no page of ours. A same-filled one holds 14 bits of its version: the rest
    comes from the largest number not above `near` that fits."""
    cdef uint64_t expected[PAGE_WORDS]
    if words[0] >> 32 == MARK:
        key[0] = <uint32_t> words[0]
        version[0] = words[1]
    elif <uint32_t> words[0] >> 28 == FILL >> 28:
        key[0] = <uint32_t> (words[0] >> 14) & (KEYS_MAX - 1)
        version[0] = (near & ~<uint64_t> 0x3fff) | (words[0] & 0x3fff)
        if version[0] > near and version[0] >= 0x4000:
            version[0] -= 0x4000
        for i in range(PAGE_WORDS):
            if words[i] != words[0]:
                return -1
        return 0 if words[0] == ((words[0] & 0xffffffffu) | (words[0] << 32)) else -1
    else:
        return -1
    make_page(expected, key[0], version[0])
    return 0 if memcmp(expected, words, PAGE) == 0 else -1


cdef inline void key_oid(Shared *s, uint32_t key, uint64_t *oid) noexcept nogil:
    """Seven objects in a sparse pool, so that leaves and objects come and go."""
    memset(oid, 0, 24)
    if s.sparse:
        oid[0] = key % 7
        oid[1] = mix(key % 7)
        oid[2] = <uint64_t> -1 - key % 7


cdef void judge(Worker *w, uint32_t key, int result, const uint64_t *words, uint64_t before, uint64_t after) noexcept nogil:
    cdef uint32_t found = 0
    cdef uint64_t version = 0
    if result == REMOTE:
        w.remote += 1
        return
    if result == MISS:
        w.misses += 1
        if not w.shared.shared_keys and not w.shared.lossy and before & 1 and before >> 1 == after:
            w.vanished += 1
        return
    if result == CORRUPT or result == LOST:
        w.corrupt += 1
        return
    if result != OK:
        w.failed += 1
        return
    w.hits += 1
    if read_page(words, &found, &version, after) != 0:
        w.garbage += 1
    elif found != key:
        w.foreign += 1
    elif w.shared.shared_keys:
        if version >> 40 >= w.shared.threads:
            if words[0] >> 32 == MARK:      # a same-filled page does not hold the thread's number
                w.garbage += 1
        elif words[0] >> 32 == MARK and \
                (version & 0xffffffffffull) > load64(&w.shared.begun[version >> 40], ACQUIRE):
            w.garbage += 1
    elif version < before >> 1 or version > after or (not before & 1 and version == before >> 1 and before):
        w.stale += 1


cdef inline int look_up(Shared *s, const uint64_t *oid, uint32_t index, uint64_t *words, int mode) noexcept nogil:
    cdef RemoteRef ref
    if s.links != NULL:
        return get_page(s.links, s.pool, oid, index, <uint8_t *> words, mode)
    return store_get(s.store, s.pool, oid, index, <uint8_t *> words, mode, &ref)


cdef void step(Worker *w, uint64_t *words) noexcept nogil:
    cdef Shared *s = w.shared
    cdef uint64_t oid[3]
    cdef uint64_t r = draw(w), before, version
    cdef uint32_t dice = <uint32_t> (r % 100), key = <uint32_t> ((r >> 32) % s.keys), index
    cdef bint reads = s.put_share <= dice < s.put_share + s.get_share
    cdef bint removes = not reads and dice >= s.put_share and dice < s.put_share + s.get_share + s.remove_share
    cdef int result
    if not s.shared_keys and not reads:
        key = key - key % s.threads + w.number
        if key >= s.keys:
            return
    index = key // 7 if s.sparse else key
    key_oid(s, key, oid)
    if reads:
        before = 0 if s.shared_keys else load64(&s.done[key], ACQUIRE)
        result = look_up(s, oid, index, words, -1)
        w.gets += 1
        judge(w, key, result, words, before, 0 if s.shared_keys else load64(&s.begun[key], ACQUIRE))
        return
    if s.shared_keys:
        before = 0
        version = (<uint64_t> w.number << 40) | add64(&s.begun[w.number], 1, ACQ_REL)
    else:
        before = s.done[key]
        version = add64(&s.begun[key], 1, ACQ_REL)
    if dice < s.put_share:
        make_page(words, key, version)
        result = store_put(s.store, s.pool, oid, index, <uint8_t *> words, s.wait_ns)
        if result == OK:
            w.puts += 1
            if not s.shared_keys:
                store64(&s.done[key], version * 2 + 1, RELEASE)
            return
        if result == FULL:
            w.refused += 1
            if not s.shared_keys and not s.lossy:
                sub64(&s.begun[key], 1, ACQ_REL)        # nothing has changed
                return
        else:
            w.failed += 1
    elif removes:
        result = look_up(s, oid, index, words, 1)
        w.removes += 1
        judge(w, key, result, words, before, version if s.shared_keys else version - 1)
    else:
        result = store_flush(s.store, s.pool, oid, index)
        w.flushes += 1
        w.flushed += result == OK
        if result != OK and result != MISS:
            w.failed += 1
        if not s.shared_keys and not s.lossy and (result == OK) != (before & 1):
            w.vanished += 1
    if not s.shared_keys:
        store64(&s.done[key], version * 2, RELEASE)


cdef void *work(void *argument) noexcept nogil:
    cdef Worker *w = <Worker *> argument
    cdef uint64_t words[PAGE_WORDS]
    cdef uint64_t i = 0
    while not load32(&w.shared.go, ACQUIRE):
        sched_yield()
    while i < w.shared.operations and not (i % 64 == 0 and now_ns() >= w.shared.deadline_ns):
        step(w, words)
        i += 1
    return NULL


def hammer(Store store, uint64_t pool, *, uint32_t threads, uint32_t keys, uint64_t operations, double seconds=60.0,
           uint64_t seed=1, mix=(50, 35, 5), bint shared=False, bint sparse=False, bint ephemeral=False, int wait_ms=50,
           Links links=None):
    """Run `operations` per thread, or until `seconds` have passed, on an empty pool; native threads, no GIL.

    mix: per cent of puts, gets and exclusive gets; the rest flushes. shared=False: each key has one writer (everybody
    reads), and a get must return what a linearisable register would. shared=True: everybody does everything to every key, and
    a get must return a whole page that somebody put under that key. wait_ms: how long a put waits for room. links: of this
    store; gets fetch what is on a lender.
    UsageError for counts that make no sense.
    """
    cdef Store_t *s = store.live()
    cdef Shared common
    cdef Worker *workers
    cdef uint32_t i, started = 0
    if not 0 < threads <= 64 or not threads <= keys <= KEYS_MAX:
        raise errors.UsageError(f"{threads} threads on {keys} keys: 1 to 64 threads, at least as many keys, at most {KEYS_MAX}")
    memset(&common, 0, sizeof(common))
    common.store = s
    common.links = links.live() if links is not None else NULL
    common.pool = pool
    common.threads = threads
    common.keys = keys
    common.put_share, common.get_share, common.remove_share = mix
    common.shared_keys = shared
    common.sparse = sparse
    common.lossy = ephemeral
    common.operations = operations
    common.deadline_ns = now_ns() + <uint64_t> (seconds * 1e9)
    common.wait_ns = <uint64_t> wait_ms * 1000000
    workers = <Worker *> calloc(threads, sizeof(Worker))
    common.done = <uint64_t *> calloc(keys, 8)
    common.begun = <uint64_t *> calloc(keys, 8)
    try:
        if workers == NULL or common.done == NULL or common.begun == NULL:
            raise MemoryError
        with nogil:
            for i in range(threads):
                workers[i].shared = &common
                workers[i].number = i
                workers[i].random = seed * 1000003 + i
                if start_thread(&workers[i].thread, work, &workers[i], "stress") != 0:
                    common.operations = 0
                    break
                started += 1
            store32(&common.go, 1, RELEASE)
            for i in range(started):
                pthread_join(workers[i].thread, NULL)
        if started != threads:
            raise MemoryError("cannot start the threads")
        totals = dict.fromkeys(
            ("puts", "gets", "hits", "misses", "flushes", "flushed", "removes", "refused", "remote", "corrupt", "garbage",
             "foreign", "stale", "vanished", "failed"), 0)
        for i in range(threads):
            for name, value in (
                    ("puts", workers[i].puts), ("gets", workers[i].gets), ("hits", workers[i].hits),
                    ("misses", workers[i].misses), ("flushes", workers[i].flushes), ("flushed", workers[i].flushed),
                    ("removes", workers[i].removes), ("refused", workers[i].refused), ("remote", workers[i].remote),
                    ("corrupt", workers[i].corrupt), ("garbage", workers[i].garbage), ("foreign", workers[i].foreign),
                    ("stale", workers[i].stale), ("vanished", workers[i].vanished), ("failed", workers[i].failed)):
                totals[name] += value
        return totals
    finally:
        free(workers)
        free(common.done)
        free(common.begun)


# --- windows on native structures ----------------------------------------------------------------------------------

def native_layout():
    """Of each native struct its size, and offset and size of each field: what docs/store-format.md must say."""
    cdef EntryHeader e
    cdef ImageHeader i
    cdef char *a = <char *> &e
    cdef char *b = <char *> &i
    return {
        "EntryHeader": (sizeof(EntryHeader), {
            "length": (<char *> &e.length - a, sizeof(e.length)), "codec": (<char *> &e.codec - a, sizeof(e.codec)),
            "flags": (<char *> &e.flags - a, sizeof(e.flags)), "index": (<char *> &e.index - a, sizeof(e.index)),
            "version": (<char *> &e.version - a, sizeof(e.version)), "pool": (<char *> &e.pool - a, sizeof(e.pool)),
            "check": (<char *> &e.check - a, sizeof(e.check))}),
        "ImageHeader": (sizeof(ImageHeader), {
            "magic": (<char *> &i.magic - b, sizeof(i.magic)), "segment": (<char *> &i.segment - b, sizeof(i.segment)),
            "generation": (<char *> &i.generation - b, sizeof(i.generation)),
            "entries": (<char *> &i.entries - b, sizeof(i.entries)),
            "data_bytes": (<char *> &i.data_bytes - b, sizeof(i.data_bytes)),
            "flags": (<char *> &i.flags - b, sizeof(i.flags)), "seal_id": (<char *> &i.seal_id - b, sizeof(i.seal_id)),
            "reserved": (<char *> &i.reserved - b, sizeof(i.reserved))}),
    }


cdef int look(Store store, uint64_t pool, uint32_t index, oid, RemoteRef *ref) except -1:
    cdef uint8_t page[PAGE]
    cdef uint64_t key[3]
    key[0], key[1], key[2] = oid
    memset(ref, 0, sizeof(RemoteRef))
    return store_get(store.live(), pool, key, index, page, -1, ref)


def reference(Store store, uint64_t pool, uint32_t index, oid=(0, 0, 0)):
    """The slot of a key and, when its page is on a lender, everything that a request for it would use."""
    cdef RemoteRef ref
    cdef int result = look(store, pool, index, oid, &ref)
    if result != REMOTE:
        return {"slot": ref.slot, "remote": False}
    return {"slot": ref.slot, "remote": True, "segment": ref.segment, "generation": ref.generation, "ordinal": ref.ordinal,
            "peer": ref.peer, "handle": ref.handle, "seal_id": ref.seal_id[:24], "key": ref.key[:32]}


def ship(Store store, uint32_t segment, uint32_t generation, uint32_t peer, uint32_t handle=0, bint commit=True):
    """Seal a segment as for a lender and return the image; commit=False takes it back. None: not sealed, or gone."""
    cdef Store_t *s = store.live()
    cdef RemoteMeta *meta = NULL
    cdef EVP_CIPHER_CTX *ctx = NULL
    cdef uint8_t *out
    cdef uint32_t size = 0
    if store_ship_begin(s, segment, generation) != OK:
        return None
    out = <uint8_t *> malloc(s.segment_bytes)
    ctx = EVP_CIPHER_CTX_new()
    try:
        if out != NULL and ctx != NULL:
            with nogil:
                size = store_seal_image(s, segment, out, &meta, ctx, NULL)
        if size == 0:
            store_ship_abort(s, segment)
            raise MemoryError("cannot seal")
        image = out[:size]
        if commit:
            store_ship_commit(s, segment, peer, handle, 0, meta)
        else:
            store_ship_abort(s, segment)
            free(meta)
        return image
    finally:
        free(out)
        EVP_CIPHER_CTX_free(ctx)


def unseal(Store store, uint64_t pool, uint32_t index, bytes entry, oid=(0, 0, 0)):
    """Check and uncompress an entry of an image as if a lender had sent it for this key; PageLost when it is not right."""
    cdef RemoteRef ref
    cdef uint8_t page[PAGE]
    cdef const uint8_t *place = entry
    cdef uint32_t size = len(entry)
    cdef EVP_CIPHER_CTX *ctx
    cdef int result
    if look(store, pool, index, oid, &ref) != REMOTE:
        raise errors.UsageError(f"page {index} of pool {pool} is not on a lender")
    ctx = store_unseal_context()
    if ctx == NULL:
        raise MemoryError
    with nogil:
        result = store_unseal_begin(&ref, ctx)
        if result == OK:
            result = store_unseal(&ref, place, size, page, ctx)
    EVP_CIPHER_CTX_free(ctx)
    if result != OK:
        raise errors.PageLost(f"page {index} of pool {pool}: what came back is not what was sent")
    return page[:PAGE]


def overwrite_slot(Store store, uint64_t pool, uint64_t index, uint64_t value):
    """Write a slot of a dense pool behind the store's back; afterwards the store is good for verify() and get alone."""
    cdef Store_t *s = store.live()
    cdef Pool *p = s.pools[pool & (POOLS_MAX - 1)]
    if index >= store_pool_pages(s, pool) or not p.populated[index >> 18]:
        raise errors.UsageError(f"pool {pool} has no such slot")
    store64(&p.slots[index], value, RELEASE)
