"""Several pages of one remote segment by one request, as a region asks for them, without a region.

Covers: what became of each page. Does not cover: pages that lie here, or in different segments.
"""
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from ramster.engine._c.pthread cimport (
    pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_t, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock)
from ramster.engine._link cimport GET_PAGES_MAX, Links, Links_t, Reply, Wanted, links_get, reply_bytes, reply_next
from ramster.engine._store cimport BUSY, CORRUPT, LOST, OK, PAGE, REMOTE, UNREACHABLE, RemoteRef, store_get

from ramster import errors

cdef struct Answer:
    pthread_mutex_t lock
    pthread_cond_t done
    bint finished
    uint8_t *pages
    int status[GET_PAGES_MAX]


cdef void answered(void *context, Reply *reply) noexcept nogil:
    cdef Answer *a = <Answer *> context
    cdef uint32_t k
    for k in range(reply.pages):
        a.status[reply.wanted[k].place] = reply_next(reply, a.pages + reply.wanted[k].place * PAGE)
    pthread_mutex_lock(&a.lock)
    a.finished = True
    pthread_cond_signal(&a.done)
    pthread_mutex_unlock(&a.lock)


def get_together(Links links not None, uint64_t pool, list indices):
    """For each index its page, or 'lost', 'corrupt', 'busy' (changed meanwhile) or 'unreachable'. UsageError unless all of
    them, 1 to 64, are in one remote segment."""
    cdef Links_t *l = links.live()
    cdef RemoteRef ref, first
    cdef Wanted wanted[GET_PAGES_MAX]
    cdef Answer a
    cdef uint64_t zero[3]
    cdef uint32_t n = len(indices), i
    cdef int result
    names = {LOST: "lost", CORRUPT: "corrupt", BUSY: "busy", UNREACHABLE: "unreachable"}
    if not 0 < n <= GET_PAGES_MAX:
        raise errors.UsageError(f"{n} pages: one request asks for 1 to {GET_PAGES_MAX}")
    memset(zero, 0, sizeof(zero))
    a.pages = <uint8_t *> malloc(n * PAGE + reply_bytes(n))
    if a.pages == NULL:
        raise MemoryError
    pthread_mutex_init(&a.lock, NULL)
    pthread_cond_init(&a.done, NULL)
    a.finished = False
    try:
        for i in range(n):
            if store_get(l.store, pool, zero, indices[i], a.pages, -1, &ref) != REMOTE:
                raise errors.UsageError(f"page {indices[i]} of pool {pool} is not on a lender")
            if i == 0:
                first = ref
            if ref.segment != first.segment or ref.generation != first.generation:
                raise errors.UsageError(f"page {indices[i]} of pool {pool} is in another segment than page {indices[0]}")
            wanted[i].slot = ref.slot
            wanted[i].index = ref.index
            wanted[i].ordinal = <uint16_t> ref.ordinal
            wanted[i].place = <uint16_t> i
        with nogil:
            result = links_get(l, &first, wanted, n, a.pages + n * PAGE, answered, &a, True)
            pthread_mutex_lock(&a.lock)
            while result == OK and not a.finished:
                pthread_cond_wait(&a.done, &a.lock)     # bounded: everything is answered within give_up
            pthread_mutex_unlock(&a.lock)
        if result != OK:
            return [names[result]] * n
        return [(a.pages + i * PAGE)[:PAGE] if a.status[i] == OK else names[a.status[i]] for i in range(n)]
    finally:
        pthread_cond_destroy(&a.done)
        pthread_mutex_destroy(&a.lock)
        free(a.pages)
