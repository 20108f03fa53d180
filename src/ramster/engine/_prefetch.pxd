"""What comes in with a faulting page, and what comes in ahead of the next fault: see _prefetch.pyx.

All of it runs under the lock of whoever owns it, without allocating, and touches no page.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from ramster.engine._c.check cimport ASSERT

cdef enum:
    STREAMS = 16                    # access patterns followed at once
    WINDOW_MAX = 64                 # pages mapped per fault
    STRIDED_MAX = 16                # pages ahead of a strided stream: each costs a copy of its own
    SLACK = 8                       # steps behind the end of a stream at which a fault still belongs to it
    RECENT = 16                     # stray faults in which a stride is looked for
    STRIDE_MAX = 4096               # pages
    ESTABLISHED = 8                 # pages after which a stream is one
    AHEAD_LOCAL = 1                 # windows read ahead of a stream: here the decoder runs beside the reader,
    AHEAD_REMOTE = 3                # there a round trip is hidden too
    SKIP_MAX = 4096                 # resident pages that a stream is taken past at once
    RUNS = 8                        # run lengths 1, 2, 4 ... 256
    RUNS_KNOWN = 16                 # runs measured before their lengths say anything
    RUNS_MAX = 256                  # ... and after which the old count half
    MISS_WEIGHT = 16                # one page evicted before it was used outweighs so many that were used
    CREDIT_MAX = 1024
    SAMPLE = 8                      # one run in so many starts with a single page, to be measured
    RANGES_MAX = 64                 # ranges of a region with an advice of their own

cdef enum:
    ADVICE_NORMAL = 0
    ADVICE_SEQUENTIAL = 1
    ADVICE_RANDOM = 2
    ADVICE_CYCLIC = 3

cdef struct Range:
    uint64_t first
    uint64_t end
    int kind

cdef struct Stream:
    uint64_t id                     # 0: none
    int64_t first                   # where it began
    int64_t next                    # the fault that would continue it: the first page not fetched for it
    int64_t stride                  # 0: it has not gone on yet
    int64_t loop_first              # where it goes on ...
    int64_t loop_end                # ... once it is here; -1: it is no loop
    uint64_t length                 # pages from its beginning to its last fault
    uint64_t unconfirmed            # pages fetched for it since its last fault
    uint64_t used
    uint64_t born
    uint32_t window
    uint32_t reached                # 2^k pages
    bint sampled

cdef struct Pattern:
    uint64_t pages
    uint32_t window_max             # what the budget allows
    uint32_t window_now             # ... and what has not been evicted before it was used
    Stream streams[16]
    uint64_t clock
    uint64_t recent[16]
    uint32_t recent_count
    uint32_t births                 # of streams
    uint32_t reached[9]             # measured runs that got to 2^k pages
    uint32_t ended[9]               # ... and those that got no further
    uint32_t credit                 # confirmed pages that speak for the window
    uint64_t prefetched
    uint64_t hits
    uint64_t wasted
    Range ranges[64]
    uint32_t ranges_count

cdef struct Plan:                   # of one fault
    uint64_t low
    uint64_t high
    uint64_t id                     # of its stream; 0: none
    uint32_t stream
    uint32_t window                 # pages of each further run
    bint sequential                 # it goes on, so a writer will write to the neighbours too
    bint full                       # read ahead
    int advice


cdef void pattern_init(Pattern *p, uint64_t pages, uint32_t window_max) noexcept nogil
cdef bint pattern_advise(Pattern *p, int kind, uint64_t first, uint64_t end) noexcept nogil


cdef inline Range *range_of(Pattern *p, uint64_t page) noexcept nogil:
    """The range with an advice that holds this page, or NULL."""
    cdef uint32_t low = 0, high = p.ranges_count, middle
    while low < high:
        middle = (low + high) // 2
        if p.ranges[middle].end <= page:
            low = middle + 1
        else:
            high = middle
    return &p.ranges[low] if low < p.ranges_count and p.ranges[low].first <= page else NULL


cdef inline uint32_t start_window(Pattern *p) noexcept nogil:
    """As many pages as three runs in four have at least."""
    cdef uint32_t k = 0, shorter = 0
    while k < RUNS and (2u << k) <= p.window_now:
        shorter += p.ended[k]
        if p.reached[k + 1] + shorter < RUNS_KNOWN or p.reached[k + 1] < 3 * shorter:
            break
        k += 1
    return 1u << k


cdef inline bint goes_on(Pattern *p, Stream *s) noexcept nogil:
    """Do two in five runs that got this far get twice as far? A measured one is not asked: it is who tells."""
    cdef uint32_t k = 0
    while k < RUNS and (2ull << k) <= s.length:
        k += 1
    return s.sampled or k == RUNS or p.reached[k + 1] + p.ended[k] < RUNS_KNOWN or 3 * p.reached[k + 1] >= 2 * p.ended[k]


cdef inline void measure(Pattern *p, Stream *s) noexcept nogil:
    """A run that started with one page tells by its faults how long runs are."""
    while s.sampled and s.reached < RUNS and (2ull << s.reached) <= s.length:
        s.reached += 1
        p.reached[s.reached] += 1


cdef inline void end_stream(Pattern *p, Stream *s) noexcept nogil:
    cdef uint32_t k
    p.wasted += s.unconfirmed
    if s.sampled:
        p.ended[s.reached] += 1
        if p.ended[0] + p.reached[1] >= RUNS_MAX:
            for k in range(RUNS + 1):
                p.ended[k] //= 2
                p.reached[k] //= 2
    s.id = 0
    s.used = 0


cdef inline bint continues(Stream *s, int64_t page) noexcept nogil:
    cdef int64_t away = page - s.next, slack
    if s.id == 0:
        return False
    if away == 0:
        return True
    if s.stride == 0:
        return page == s.first - 1
    # Young ones are taken at their word: else random faults of a small region look like streams.
    slack = SLACK * s.stride
    if s.length < ESTABLISHED or not (0 < away < slack if s.stride > 0 else slack < away < 0):
        return False
    return away % s.stride == 0


cdef inline int64_t stride_to(Pattern *p, int64_t page) noexcept nogil:
    """A distance at which the last stray faults were three times apart, this one included; 0: none. The vote is among triples
    and not, as in Leap, among successive faults, so that streams which take turns do not outvote each other."""
    cdef uint32_t i, j, n = min(p.recent_count, <uint32_t> RECENT)
    cdef int64_t stride
    cdef uint32_t found
    for i in range(n):
        stride = page - <int64_t> p.recent[i]
        if not 1 < stride <= STRIDE_MAX and not -STRIDE_MAX <= stride < -1:
            continue
        found = 0
        for j in range(n):
            found += <int64_t> p.recent[j] == page - 2 * stride or <int64_t> p.recent[j] == page - 3 * stride
        if found >= 2:
            return stride
    return 0


cdef inline void find_loop(Pattern *p, Stream *s) noexcept nogil:
    """A stream that goes over what an earlier one has gone over in the same steps is that one's next pass."""
    cdef int i
    cdef Stream *o
    for i in range(STREAMS):
        o = &p.streams[i]
        if o.id == 0 or o == s or o.stride != s.stride or o.used >= s.born or o.length < ESTABLISHED:
            continue
        if (s.first - o.first) % s.stride != 0:
            continue
        if (o.first <= s.first < o.next) if s.stride > 0 else (o.next < s.first <= o.first):
            s.loop_first = o.first
            s.loop_end = o.next
            end_stream(p, o)
            return


cdef inline void pattern_fault(Pattern *p, uint64_t at, Plan *plan) noexcept nogil:
    """What to bring in for a fault on page 'at'; pattern_took must follow where plan.id is not 0."""
    cdef Stream *s = NULL
    cdef Stream *oldest = &p.streams[0]
    cdef Range *advised = range_of(p, at) if p.ranges_count else NULL
    cdef int64_t page = <int64_t> at, low = page, high = page + 1, stride
    cdef int i
    plan.advice = ADVICE_NORMAL if advised == NULL else advised.kind
    plan.id = 0
    plan.sequential = plan.full = False
    plan.low = at
    plan.high = at + 1
    if plan.advice == ADVICE_RANDOM:
        return
    p.clock += 1
    for i in range(STREAMS):
        if p.streams[i].used < oldest.used:
            oldest = &p.streams[i]
        if continues(&p.streams[i], page):
            s = &p.streams[i]
            break
    if s != NULL:
        if s.stride == 0:
            s.stride = 1 if page >= s.next else -1
        p.hits += s.unconfirmed
        p.credit = <uint32_t> min(p.credit + s.unconfirmed, <uint64_t> CREDIT_MAX)
        s.unconfirmed = 0
        if p.window_now < p.window_max and s.window == p.window_now:
            p.window_now += 1
        if (s.stride > 0) == (page >= s.first):
            s.length = max(s.length, <uint64_t> ((page - s.first) // s.stride) + 1)
        measure(p, s)
        s.window = min(s.window * 2, p.window_now) if goes_on(p, s) else min(start_window(p), p.window_now)
        if s.length >= ESTABLISHED and s.loop_end < 0:
            find_loop(p, s)
    else:
        s = oldest
        if s.id != 0:
            end_stream(p, s)
        stride = stride_to(p, page)
        p.recent[p.recent_count % RECENT] = at
        p.recent_count += 1
        if p.recent_count == 2 * RECENT:
            p.recent_count = RECENT
        memset(s, 0, sizeof(Stream))
        p.births += 1
        s.id = s.born = p.clock
        s.first = page
        s.stride = stride
        s.length = 1
        s.loop_end = -1
        s.sampled = start_window(p) == 1 or p.births % SAMPLE == 0
        s.window = 1 if s.sampled else start_window(p)
        if stride:
            s.first = page - 3 * stride
            s.length = 4
            s.window = 2
            s.sampled = False
    if advised != NULL:
        s.window = p.window_now
        s.sampled = False
        if plan.advice == ADVICE_CYCLIC and s.loop_end < 0:
            s.loop_first = <int64_t> advised.first
            s.loop_end = <int64_t> advised.end
    s.used = p.clock
    if s.stride == 0 or s.stride == 1:
        high = min(page + s.window, <int64_t> (p.pages if advised == NULL else advised.end))
    elif s.stride == -1:
        low = max(page + 1 - <int64_t> s.window, <int64_t> 0 if advised == NULL else <int64_t> advised.first)
    plan.low = <uint64_t> low
    plan.high = <uint64_t> high
    plan.id = s.id
    plan.stream = <uint32_t> (s - p.streams)
    plan.window = s.window
    plan.sequential = s.window > 2
    plan.full = (s.stride != 0 or advised != NULL) and s.window > 1 and \
        (s.window == p.window_now or (s.stride != 1 and s.stride != -1))


cdef inline Stream *stream_of(Pattern *p, Plan *plan) noexcept nogil:
    """NULL where another stream has taken its place."""
    return &p.streams[plan.stream] if plan.id and p.streams[plan.stream].id == plan.id else NULL


cdef inline void pattern_took(Pattern *p, Plan *plan, uint64_t first, uint64_t end, uint32_t extra) noexcept nogil:
    """Pages first to end are there or being fetched for this plan; 'extra': so many that nobody has asked for."""
    cdef Stream *s = stream_of(p, plan)
    p.prefetched += extra
    if s == NULL:
        return
    s.unconfirmed += extra
    s.next = <int64_t> first + s.stride if s.stride < 0 else <int64_t> end - 1 + (s.stride if s.stride > 0 else 1)


cdef inline int pattern_runs(Pattern *p, Plan *plan, bint remote) noexcept nogil:
    """How many further runs to bring in after this plan's window: whole windows, or single pages of a strided stream."""
    cdef Stream *s = stream_of(p, plan)
    if s == NULL or not plan.full:
        return 0
    if -1 <= s.stride <= 1:
        return AHEAD_REMOTE if remote else AHEAD_LOCAL
    return min(<int> s.window, <int> STRIDED_MAX)


cdef inline bint pattern_next(Pattern *p, Plan *plan, uint64_t *page, uint64_t *low, uint64_t *high) noexcept nogil:
    """The next run ahead: 'page' is where its stream reaches it first. False where the stream ends."""
    cdef Stream *s = stream_of(p, plan)
    cdef Range *advised
    cdef int64_t at
    if s == NULL:
        return False
    at = s.next
    if s.loop_end >= 0 and ((at >= s.loop_end) if s.stride >= 0 else (at <= s.loop_end)):
        at = s.loop_first
        s.first = at
    if at < 0 or at >= <int64_t> p.pages:
        return False
    advised = range_of(p, <uint64_t> at) if p.ranges_count else NULL
    if (ADVICE_NORMAL if advised == NULL else advised.kind) != plan.advice:
        return False
    s.next = at
    page[0] = <uint64_t> at
    low[0] = page[0]
    high[0] = page[0] + 1
    if s.stride == 0 or s.stride == 1:
        high[0] = min(page[0] + plan.window, p.pages if advised == NULL else advised.end)
    elif s.stride == -1:
        low[0] = page[0] + 1 - min(page[0] + 1 - (0 if advised == NULL else advised.first), <uint64_t> plan.window)
    return True


cdef inline void pattern_skip(Pattern *p, Plan *plan) noexcept nogil:
    """The page that pattern_next named is there already."""
    cdef Stream *s = stream_of(p, plan)
    if s != NULL:
        s.next += s.stride if s.stride else 1


cdef inline void pattern_missed(Pattern *p) noexcept nogil:
    """A page fetched ahead was evicted before anybody was seen to use it: less at a time, if that happens often. Pages that
    were used without a fault count here, too, on the next pass over them."""
    p.wasted += 1
    if p.credit >= MISS_WEIGHT:
        p.credit -= MISS_WEIGHT
        return
    p.credit = 0
    p.window_now = max(p.window_now // 2, min(p.window_max, <uint32_t> 4))


cdef class AccessPattern:
    cdef Pattern p
