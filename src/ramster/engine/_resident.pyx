"""Replacement in a resident set that is seen only through faults.

userfaultfd has no access bit: a page that is resident can be used any number of times and nobody is told. What a node learns
is that a page comes in, and that a page comes back soon after it was evicted (its refault distance, as mm/workingset.c of the
kernel measures it). LRU, CLOCK and S3-FIFO as published (Yang et al., SOSP 2023) rank residents by what they do while they are
resident; that information does not exist here. What is left of S3-FIFO is its shape:

* A page comes into *probation*, a FIFO. A page that comes back while its *ghost* is remembered (as many as there are residents)
  goes to *main*, a FIFO too, as long as main has room: all of the capacity but a sixteenth.
* Who leaves: the tail of probation, and at times a burst of pages from the tail of main. How often is decided by duels: each page
  evicted from main is paired with one evicted from probation at the same time, and the one that is asked for first is the one
  that should have stayed (Belady's rule for two pages, found out afterwards; the choice between two policies by sampled duels
  is that of DIP: Qureshi et al., ISCA 2007). Each duel that main wins makes evictions from main 1.25 times rarer, down to 1/64 of
  main's share of the residents; each one it loses makes them 1.4 times more frequent, up to its share.

What follows from it: in a cyclic pass over more than fits, a page of main is always asked for before the page that was just
used, so main stays, and its part of the pass is hits, where LRU and FIFO have none. In a skewed load the pages that come back
soonest fill main. When the working set moves, the pages of main do not come back, main loses its duels and drains as fast as
a FIFO would. A scan that never returns passes through probation and leaves main alone. A load without any pattern is a draw.

Bursts and runs (a 64th of the capacity, at most 64 pages) keep neighbours together, since windows of read-ahead and punched holes
are as long as the runs of pages that are in the same state.

Memory: 24 bytes a node and 4 to 8 a bucket, for capacity + ghosts + spare: 56 to 66 bytes for each page of the capacity, touched
as pages come in. Nothing depends on how many pages there are beside the resident ones.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

from ramster import errors

CAPACITY_MAX = 1 << 30


cdef int resident_init(Resident *set, uint64_t capacity, uint64_t spare) noexcept nogil:
    """A set of 'capacity' pages in which at times 'spare' more are resident. 0, or -1 where there is no memory."""
    cdef uint64_t buckets = 64
    memset(set, 0, sizeof(Resident))
    ASSERT(0 < capacity and 2 * capacity + spare + GHOSTS_MIN < 0xffffffffull, b"a resident set has at least one page and 32 bits for its nodes")
    set.capacity = <uint32_t> capacity
    set.probation_min = max(set.capacity // PROBATION_SHARE, min(set.capacity // 4, <uint32_t> PROBATION_MIN), <uint32_t> 1)
    set.main_max = set.capacity - set.probation_min
    set.behind_max = min(set.capacity // 4, <uint32_t> BEHIND_MAX)
    set.burst = min(max(set.capacity // BURST_SHARE, <uint32_t> 1), <uint32_t> BURST_MAX)
    set.ghosts_max = max(set.capacity, <uint32_t> GHOSTS_MIN)
    set.nodes_max = <uint32_t> (capacity + spare + set.ghosts_max)
    set.main_rate = 0.25
    while buckets < set.nodes_max:
        buckets *= 2
    set.mask = <uint32_t> (buckets - 1)
    set.nodes = <Node *> calloc(<uint64_t> set.nodes_max + 1, sizeof(Node))
    set.buckets = <uint32_t *> calloc(buckets, 4)
    return 0 if set.nodes != NULL and set.buckets != NULL else -1


cdef void resident_free(Resident *set) noexcept nogil:
    free(set.nodes)
    free(set.buckets)
    set.nodes = NULL
    set.buckets = NULL


def enough(uint64_t budget, uint64_t ghosts, uint64_t came, uint64_t returned, uint64_t waited_ns, uint64_t passed_ns):
    return enough_pages(budget, ghosts, came, returned, waited_ns, passed_ns)


def steady(uint64_t before, uint64_t found, bint doubt):
    before = steady_pages(before, found, &doubt)
    return before, doubt


cdef class ResidentSet:
    """See the stub."""

    def __cinit__(self, uint64_t capacity):
        if not 0 < capacity <= CAPACITY_MAX:
            raise errors.UsageError(f"capacity: {capacity}, must be 1 to {CAPACITY_MAX}")
        self.spare = 64
        if resident_init(&self.set, capacity, self.spare) != 0:
            raise MemoryError

    def __dealloc__(self):
        resident_free(&self.set)

    cdef int known(self, object page) except -1:
        """Its queue."""
        cdef uint32_t n
        if not 0 <= page < 1 << 32:
            raise errors.UsageError(f"page: {page}, must be 0 to 2^32 - 1")
        n = find(&self.set, page)
        return self.set.nodes[n].queue if n != NIL else Q_FREE

    def __len__(self):
        return resident_count(&self.set) + self.set.count[Q_PINNED] + self.set.count[Q_LEAVING]

    def add(self, page, *, bint ahead=False, bint behind=False, bint keep=False):
        cdef int queue = self.known(page)
        if queue in (Q_FREE, Q_GHOST) and len(self) >= self.set.capacity + self.spare:
            raise errors.UsageError("the set is full")
        return ("new", "returned", "missed")[resident_add(
            &self.set, page, (HINT_AHEAD if ahead else 0) | (HINT_BEHIND if behind else 0) | (HINT_KEEP if keep else 0))]

    def victim(self):
        cdef int64_t page = resident_victim(&self.set)
        return None if page == NOBODY else page

    def leave_free(self, uint32_t pages):
        resident_leave_free(&self.set, pages)

    def pin(self, page):
        self.known(page)
        resident_pin(&self.set, page)

    def unpin(self, page):
        self.known(page)
        resident_unpin(&self.set, page)

    def gone(self, page):
        if self.known(page) in (Q_FREE, Q_GHOST):
            raise errors.UsageError(f"page {page} is not resident")
        resident_gone(&self.set, page)

    def queues(self):
        """Pages of each queue, the youngest first; walks all of them and checks every link."""
        cdef Resident *set = &self.set
        cdef uint32_t n, before, seen = 0
        cdef int queue
        names = {Q_PROBATION: "probation", Q_MAIN: "main", Q_BEHIND: "behind", Q_PINNED: "pinned", Q_LEAVING: "leaving",
                 Q_GHOST: "ghosts"}
        found = {}
        for queue in range(<int> QUEUES):
            pages = []
            n = set.head[queue]
            before = NIL
            while n != NIL:
                ASSERT(set.nodes[n].queue == queue and set.nodes[n].before == before, b"a node is where its queue says")
                if queue != Q_FREE:
                    ASSERT(find(set, set.nodes[n].page) == n, b"a page has one node")
                    ASSERT(set.nodes[n].opponent == NIL or set.nodes[set.nodes[n].opponent].opponent == n, b"duels are of two")
                pages.append(set.nodes[n].page)
                seen += 1
                before = n
                n = set.nodes[n].after
            ASSERT(set.tail[queue] == before and set.count[queue] == <uint32_t> len(pages), b"a queue is as long as it says")
            if queue in names:
                found[names[queue]] = pages
        ASSERT(seen == set.nodes_used, b"no node is lost")
        return found

    @property
    def main_rate(self):
        return self.set.main_rate

    @property
    def duels(self):
        return self.set.duels_main, self.set.duels_probation

    @property
    def bytes_used(self):
        return sizeof(Resident) + self.set.nodes_used * sizeof(Node) + (self.set.mask + 1) * 4ull

    def replay(self, const int64_t[::1] trace):
        cdef Py_ssize_t i
        cdef uint64_t misses = 0
        cdef uint32_t n
        for i in range(trace.shape[0]):
            if not 0 <= trace[i] < 1 << 32:
                raise errors.UsageError(f"page: {trace[i]}, must be 0 to 2^32 - 1")
        with nogil:
            for i in range(trace.shape[0]):
                n = find(&self.set, <uint32_t> trace[i])
                if n != NIL and self.set.nodes[n].queue != Q_GHOST:
                    continue
                misses += 1
                if resident_count(&self.set) >= self.set.capacity:
                    resident_gone(&self.set, <uint32_t> resident_victim(&self.set))
                resident_add(&self.set, <uint32_t> trace[i], HINT_FAULT)
        return misses
