"""Which resident page leaves next: see _resident.pyx for the policy and where it comes from.

All of it runs under the lock of whoever owns the set, in constant time, without allocating.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from ramster.engine._c.check cimport ASSERT

cdef enum:
    NIL = 0                         # of links between nodes; node 0 is never used
    BURST_MAX = 64                  # pages taken from main, or kept for main, one after another: neighbours stay together
    BURST_SHARE = 64                # ... at most this part of the capacity
    PROBATION_SHARE = 16            # of the capacity that main never takes ...
    PROBATION_MIN = 192             # ... and what read-ahead needs at least: three windows
    KEEP_SHARE = 16                 # one page in so many that leave probation unproven goes to main while main has room;
    KEEP_SHARE_WON = 4              # while main wins its duels,
    KEEP_SHARE_LOST = 64            # and while it loses them
    BEHIND_MAX = 256                # pages kept behind streams that were announced as sequential
    PENDING = 64                    # pages evicted from main that wait for an opponent
    GHOSTS_MIN = 64
    NOBODY = -1                     # no page
    RATE_MIN_SHARE = 64             # main is evicted from at least at this part of its share of the residents

cdef enum:
    Q_FREE = 0
    Q_PROBATION = 1
    Q_MAIN = 2
    Q_BEHIND = 3
    Q_PINNED = 4
    Q_LEAVING = 5                   # chosen; its eviction is under way
    Q_GHOST = 6                     # not resident: was evicted not long ago
    QUEUES = 7

cdef enum:
    FROM_MAIN = 1                   # where it was when it was chosen
    UNUSED = 2                      # came by read-ahead, and nothing has shown that it was wanted
    WAITING = 4                     # evicted from main, has no opponent yet

cdef enum:
    HINT_FAULT = 0
    HINT_AHEAD = 1                  # nobody has touched it yet
    HINT_BEHIND = 2                 # of a stream announced as sequential: leaves first
    HINT_KEEP = 4                   # of a range announced as cyclic: goes to main while that has room

cdef enum:
    NEW = 0
    RETURNED = 1                    # it was evicted not long ago
    MISSED = 2                      # and, brought by read-ahead, it had left before it was used

cdef struct Node:
    uint32_t page
    uint32_t before                 # towards the head of its queue: younger
    uint32_t after
    uint32_t chain                  # of its hash bucket
    uint32_t opponent               # ghosts evicted together: whichever is asked for first should have stayed
    uint8_t queue
    uint8_t flags

cdef struct Resident:
    uint32_t capacity
    uint32_t main_max
    uint32_t probation_min
    uint32_t behind_max
    uint32_t burst
    uint32_t nodes_max              # capacity + spare + ghosts
    uint32_t nodes_used             # nodes that have ever been used: the rest is untouched memory
    uint32_t mask                   # of buckets
    Node *nodes
    uint32_t *buckets
    uint32_t head[7]
    uint32_t tail[7]
    uint32_t count[7]
    uint32_t ghosts_max
    uint32_t pending[64]
    uint32_t pending_first
    uint32_t pending_count
    uint32_t left                   # pages of the present burst from main still to take
    uint32_t passed                 # pages that have left probation since a run of them was last kept
    double main_rate                # how much oftener a page of main is evicted than its share of residents
    double credit
    uint64_t duels_main             # won by main: its page was asked for first, so it should have stayed
    uint64_t duels_probation


cdef int resident_init(Resident *set, uint64_t capacity, uint64_t spare) noexcept nogil
cdef void resident_free(Resident *set) noexcept nogil


cdef inline uint32_t *bucket_of(Resident *set, uint32_t page) noexcept nogil:
    return &set.buckets[(page * <uint32_t> 0x9E3779B1u >> 7) & set.mask]


cdef inline uint32_t find(Resident *set, uint32_t page) noexcept nogil:
    cdef uint32_t n = bucket_of(set, page)[0]
    while n != NIL and set.nodes[n].page != page:
        n = set.nodes[n].chain
    return n


cdef inline void push(Resident *set, uint32_t n, int queue) noexcept nogil:
    cdef Node *node = &set.nodes[n]
    node.queue = <uint8_t> queue
    node.before = NIL
    node.after = set.head[queue]
    if node.after != NIL:
        set.nodes[node.after].before = n
    else:
        set.tail[queue] = n
    set.head[queue] = n
    set.count[queue] += 1


cdef inline void unlink(Resident *set, uint32_t n) noexcept nogil:
    cdef Node *node = &set.nodes[n]
    if node.before != NIL:
        set.nodes[node.before].after = node.after
    else:
        set.head[node.queue] = node.after
    if node.after != NIL:
        set.nodes[node.after].before = node.before
    else:
        set.tail[node.queue] = node.before
    ASSERT(set.count[node.queue] > 0, b"a queue of resident pages holds what it counts")
    set.count[node.queue] -= 1


cdef inline void end_duel(Resident *set, uint32_t n) noexcept nogil:
    if set.nodes[n].opponent != NIL:
        set.nodes[set.nodes[n].opponent].opponent = NIL
        set.nodes[n].opponent = NIL


cdef inline void forget(Resident *set, uint32_t n) noexcept nogil:
    """The node is free again."""
    cdef uint32_t *link = bucket_of(set, set.nodes[n].page)
    while link[0] != n:
        ASSERT(link[0] != NIL, b"every known page is in its bucket")
        link = &set.nodes[link[0]].chain
    link[0] = set.nodes[n].chain
    end_duel(set, n)
    unlink(set, n)
    push(set, n, Q_FREE)


cdef inline uint32_t resident_count(Resident *set) noexcept nogil:
    """Pages that may be chosen."""
    return set.count[Q_PROBATION] + set.count[Q_MAIN] + set.count[Q_BEHIND]


cdef inline uint32_t fresh_node(Resident *set, uint32_t page) noexcept nogil:
    cdef uint32_t n = set.tail[Q_FREE]
    cdef uint32_t *bucket
    if n == NIL and set.nodes_used < set.nodes_max:
        set.nodes_used += 1
        n = set.nodes_used
    else:
        if n == NIL:
            ASSERT(set.count[Q_GHOST] > 0, b"no more pages are resident than the budget and its overdraft allow")
            forget(set, set.tail[Q_GHOST])
            n = set.tail[Q_FREE]
        unlink(set, n)
    bucket = bucket_of(set, page)
    set.nodes[n].page = page
    set.nodes[n].chain = bucket[0]
    set.nodes[n].opponent = NIL
    set.nodes[n].flags = 0
    bucket[0] = n
    return n


cdef inline void settle(Resident *set, uint32_t n) noexcept nogil:
    """A ghost is asked for: if it has an opponent, it is the one of the two that should have stayed."""
    if set.nodes[n].opponent == NIL:
        return
    if set.nodes[n].flags & FROM_MAIN:
        set.duels_main += 1
        set.main_rate = max(set.main_rate * 4 / 5, 1.0 / RATE_MIN_SHARE)
    else:
        set.duels_probation += 1
        set.main_rate = min(set.main_rate * 7 / 5, 1.0)
    end_duel(set, n)


cdef inline int resident_add(Resident *set, uint32_t page, int hints) noexcept nogil:
    """A page has come in, or its eviction has failed, or (a page that is resident) it was used. Says what it is: an Arrival."""
    cdef uint32_t n = find(set, page)
    cdef int met = NEW, queue = Q_PROBATION
    if n == NIL:
        n = fresh_node(set, page)
    elif set.nodes[n].queue == Q_LEAVING:
        unlink(set, n)
        push(set, n, Q_MAIN if set.nodes[n].flags & FROM_MAIN else Q_PROBATION)
        return NEW
    elif set.nodes[n].queue != Q_GHOST:
        if not hints & HINT_AHEAD:
            set.nodes[n].flags &= <uint8_t> ~UNUSED
        return NEW
    else:
        met = MISSED if set.nodes[n].flags & UNUSED and not hints & HINT_AHEAD else RETURNED
        settle(set, n)
        unlink(set, n)
    if hints & HINT_BEHIND:
        queue = Q_BEHIND
    elif (met != NEW or hints & HINT_KEEP) and set.count[Q_MAIN] < set.main_max and \
            set.count[Q_PROBATION] >= set.probation_min // 2:
        queue = Q_MAIN
    set.nodes[n].flags = UNUSED if hints & HINT_AHEAD else 0
    push(set, n, queue)
    return met


cdef inline uint32_t keep_share(Resident *set) noexcept nogil:
    return KEEP_SHARE if 0.25 <= set.main_rate <= 0.5 else KEEP_SHARE_WON if set.main_rate < 0.25 else KEEP_SHARE_LOST


cdef inline uint32_t choose(Resident *set) noexcept nogil:
    """The node that leaves, or NIL."""
    cdef uint32_t n
    cdef bint short = set.count[Q_PROBATION] < set.probation_min // 2
    if set.count[Q_BEHIND] > (0 if short else set.behind_max):
        return set.tail[Q_BEHIND]
    if set.left == 0:
        set.credit += set.main_rate * set.count[Q_MAIN] / set.capacity
        if set.credit >= set.burst:
            set.credit -= set.burst
            set.left = set.burst
    if set.count[Q_MAIN] > 0 and (set.left > 0 or set.count[Q_MAIN] > set.main_max or
                                  short):
        if set.left > 0:
            set.left -= 1
        return set.tail[Q_MAIN]
    set.left = 0
    # Where nothing ever returns soon enough to be known, main would stay empty: some go there without having returned. The
    # last room is for those that have.
    while set.count[Q_PROBATION] > 1 and set.count[Q_MAIN] + 2 * set.burst < set.main_max and \
            set.passed % (set.burst * keep_share(set)) < set.burst:
        set.passed += 1
        n = set.tail[Q_PROBATION]
        unlink(set, n)
        push(set, n, Q_MAIN)
    set.passed += 1
    return set.tail[Q_PROBATION] if set.count[Q_PROBATION] > 0 else set.tail[Q_BEHIND]


cdef inline void resident_leave_free(Resident *set, uint64_t pages) noexcept nogil:
    """So many pages of the capacity are kept free for now: main has to do with less. Else it would fill what is left,
    probation would starve, and pages would leave main in the order in which they came: what cycles would never hit."""
    set.main_max = set.capacity - set.probation_min - <uint32_t> min(pages, <uint64_t> (set.capacity - set.probation_min))


cdef inline int64_t resident_victim(Resident *set) noexcept nogil:
    """Choose a page and take it from its queue: it is leaving until resident_keep, resident_pin, resident_add or resident_gone.
    NOBODY when there is none."""
    cdef uint32_t n = choose(set)
    if n == NIL:
        return NOBODY
    set.nodes[n].flags = <uint8_t> ((set.nodes[n].flags & UNUSED) | (FROM_MAIN if set.nodes[n].queue == Q_MAIN else 0))
    unlink(set, n)
    push(set, n, Q_LEAVING)
    return set.nodes[n].page


cdef inline void resident_pin(Resident *set, uint32_t page) noexcept nogil:
    """It must not be chosen until resident_unpin."""
    cdef uint32_t n = find(set, page)
    if n != NIL and set.nodes[n].queue != Q_GHOST:
        unlink(set, n)
        push(set, n, Q_PINNED)


cdef inline void resident_unpin(Resident *set, uint32_t page) noexcept nogil:
    cdef uint32_t n = find(set, page)
    if n != NIL and set.nodes[n].queue == Q_PINNED:
        unlink(set, n)
        push(set, n, Q_PROBATION)


cdef inline void resident_gone(Resident *set, uint32_t page) noexcept nogil:
    """It is no longer resident. Where resident_victim chose it, its return will tell whether that was right."""
    cdef uint32_t n = find(set, page), other
    if n == NIL:
        return
    ASSERT(set.nodes[n].queue != Q_GHOST, b"a page leaves once")
    if set.nodes[n].queue != Q_LEAVING:
        forget(set, n)
        return
    unlink(set, n)
    if set.count[Q_GHOST] >= set.ghosts_max:
        forget(set, set.tail[Q_GHOST])
    push(set, n, Q_GHOST)
    if set.nodes[n].flags & FROM_MAIN:
        set.nodes[n].flags |= WAITING
        if set.pending_count == PENDING:
            set.pending_first += 1
            set.pending_count -= 1
        set.pending[(set.pending_first + set.pending_count) % PENDING] = n
        set.pending_count += 1
        return
    while set.pending_count > 0:
        other = set.pending[set.pending_first % PENDING]
        set.pending_first += 1
        set.pending_count -= 1
        if set.nodes[other].queue == Q_GHOST and set.nodes[other].flags & WAITING:
            set.nodes[other].flags &= <uint8_t> ~WAITING
            set.nodes[other].opponent = n
            set.nodes[n].opponent = other
            return


cdef enum:
    THRASH_WAIT_SHARE = 8           # threads wait for faults for at least this part of the time ...
    THRASH_RETURN_SHARE = 16        # ... and of what comes in at least this part had left not long ago
    THRASH_PAGES_MIN = 64


cdef inline uint64_t enough_pages(uint64_t budget, uint64_t ghosts, uint64_t came, uint64_t returned, uint64_t waited_ns,
                                  uint64_t passed_ns) noexcept nogil:
    """The budget with which a thrashing set would be at rest, estimated; 0: it does not thrash.

    came: pages that came in within passed_ns; returned: those of them that were remembered; ghosts: how many are. If each page
    outside is as likely to be asked for as any other, as many are in use outside as make the share of ghosts among them
    that of returns among arrivals. In a pass over and over again each of them is a ghost, or none returns and nothing is said.
    """
    if came < THRASH_PAGES_MIN or returned * THRASH_RETURN_SHARE < came or waited_ns * THRASH_WAIT_SHARE < passed_ns:
        return 0
    return budget + ghosts * came // returned


cdef inline uint64_t steady_pages(uint64_t before, uint64_t found, bint *doubt) noexcept nogil:
    """What is said after a look that found this, where 'before' was said: a program that pauses for one look has not come to rest, and
    an estimate from a few hundred pages is good for a part of the way. 'doubt': the last look found nothing."""
    cdef bint doubted = doubt[0]
    doubt[0] = found == 0
    if found == 0:
        return 0 if doubted else before
    return (3 * before + found) // 4 if before else found


cdef class ResidentSet:
    cdef Resident set
    cdef readonly int spare
    cdef int known(self, object page) except -1
