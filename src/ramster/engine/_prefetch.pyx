"""Fault-around and read-ahead, from the order of faults alone.

Faults are followed as *streams*: where one goes on (upwards, downwards, or in equal steps of up to 4096 pages), its window doubles
up to 64 pages, and from a full window on the runs after it are brought in while the reader runs. Up to 16 streams take turns, as
the runs of a merge do. A fault that belongs to none starts one.

* *How much comes in with a stray fault* is measured: one stray in eight starts with a single page (all do while a single page is
  right), and how far such runs get says how long runs are here. The first window is what three runs in four reach at least,
  and a window grows only while two in five that came so far go twice as far. Random faults stay at one page.
* *Strides* are found among the last 16 stray faults: four at equal distances, this one included. Leap (Maruf and Chowdhury, USENIX
  ATC 2020) takes the majority of the distances between successive faults, which is lost when streams take turns.
  Of a strided stream the pages come in singly and not what is between them.
* *Cyclic passes*: a stream that goes over what an older one has gone over is its next pass; from then on, where the older one
  ended, it goes on at the beginning.
* *Waste*: pages of a stream that ended, and pages that were evicted before they were touched (their ghosts tell, see
  _resident). The latter halve the windows of the region, which recover by one page for each full window that is used up.

What is 'used' is known by one sign only, that its stream goes on behind it: there is no access bit.
"""
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from ramster import errors

ADVICE = {"normal": ADVICE_NORMAL, "sequential": ADVICE_SEQUENTIAL, "random": ADVICE_RANDOM, "cyclic": ADVICE_CYCLIC}


cdef void pattern_init(Pattern *p, uint64_t pages, uint32_t window_max) noexcept nogil:
    memset(p, 0, sizeof(Pattern))
    p.pages = pages
    p.window_max = p.window_now = min(max(window_max, <uint32_t> 1), <uint32_t> WINDOW_MAX)


cdef bint pattern_advise(Pattern *p, int kind, uint64_t first, uint64_t end) noexcept nogil:
    """False, and nothing changes, when there would be more ranges than are kept."""
    cdef Range made[RANGES_MAX + 3]
    cdef Range r
    cdef uint32_t i, n = 0, kept = 0
    cdef bint placed = kind == ADVICE_NORMAL
    for i in range(p.ranges_count + 1):
        if i < p.ranges_count:
            r = p.ranges[i]
            if r.first < first:
                made[n] = r
                made[n].end = min(r.end, first)
                n += 1
        if not placed and (i == p.ranges_count or r.end > first):
            made[n].first = first
            made[n].end = end
            made[n].kind = kind
            n += 1
            placed = True
        if i < p.ranges_count and r.end > end:
            made[n] = r
            made[n].first = max(r.first, end)
            n += 1
    for i in range(n):
        if kept and made[kept - 1].end == made[i].first and made[kept - 1].kind == made[i].kind:
            made[kept - 1].end = made[i].end
        else:
            made[kept] = made[i]
            kept += 1
    if kept > RANGES_MAX:
        return False
    memcpy(p.ranges, made, kept * sizeof(Range))
    p.ranges_count = kept
    return True


cdef class AccessPattern:
    """See the stub."""

    def __cinit__(self, uint64_t pages, uint32_t window_max=WINDOW_MAX):
        if not 0 < pages <= 1 << 32:
            raise errors.UsageError(f"pages: {pages}, must be 1 to 2^32")
        pattern_init(&self.p, pages, window_max)

    def fault(self, uint64_t page, *, away=None, bint remote=False):
        cdef Plan plan
        cdef uint64_t at, low, high
        cdef int i, skipped = 0
        if page >= self.p.pages:
            raise errors.UsageError(f"page {page} is not one of {self.p.pages}")
        runs = []

        def free(at):
            return (away is None or away(at)) and not any(first <= at < end for first, end in runs)

        def take(at, low, high, wanted):
            taken = [near for near in range(low, high) if near == at or free(near)]
            pattern_took(&self.p, &plan, taken[0], max(taken) + 1, len(taken) - wanted)
            begin = len(runs)
            for near in taken:
                if len(runs) > begin and runs[len(runs) - 1][1] == near:
                    runs[len(runs) - 1] = (runs[len(runs) - 1][0], near + 1)
                else:
                    runs.append((near, near + 1))

        pattern_fault(&self.p, page, &plan)
        take(page, plan.low, plan.high, True)
        for i in range(pattern_runs(&self.p, &plan, remote)):
            while pattern_next(&self.p, &plan, &at, &low, &high):
                skipped += 1
                if skipped > SKIP_MAX:
                    return runs
                if free(at):
                    take(at, low, high, False)
                    break
                pattern_skip(&self.p, &plan)
        return runs

    def missed(self):
        pattern_missed(&self.p)

    def advise(self, str kind, uint64_t first, uint64_t count):
        if not pattern_advise(&self.p, ADVICE[kind], first, first + count):
            raise errors.UsageError(f"more than {RANGES_MAX} ranges with an advice of their own")

    @property
    def ranges(self):
        names = {value: name for name, value in ADVICE.items()}
        return [(self.p.ranges[i].first, self.p.ranges[i].end, names[self.p.ranges[i].kind])
                for i in range(<int> self.p.ranges_count)]

    def advice(self, uint64_t page):
        cdef Range *found = range_of(&self.p, page)
        return {value: name for name, value in ADVICE.items()}[ADVICE_NORMAL if found == NULL else found.kind]

    @property
    def counters(self):
        return {"prefetched": self.p.prefetched, "hits": self.p.hits, "wasted": self.p.wasted,
                "window_now": self.p.window_now, "start_window": start_window(&self.p)}
