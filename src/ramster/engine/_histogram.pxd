"""Latency histogram: eight buckets per power of two, so a quantile is right within 9 %. One writer or many, no lock."""
from libc.stdint cimport uint64_t

from ramster.engine._c.atomic cimport RELAXED, add64, load64

cdef enum:
    HISTOGRAM_BUCKETS = 320

cdef struct Histogram:
    uint64_t counts[320]


cdef inline int bucket_of(uint64_t ns) noexcept nogil:
    cdef int power = 0
    cdef uint64_t rest = ns >> 4
    if ns < 16:
        return <int> (ns >> 1)
    while rest:
        rest >>= 1
        power += 1
    # ns lies in [2^(power+3), 2^(power+4)): its next three bits choose the bucket
    cdef int bucket = (power << 3) + <int> ((ns >> power) & 7)
    return bucket if bucket < HISTOGRAM_BUCKETS else HISTOGRAM_BUCKETS - 1


cdef inline void record(Histogram *h, uint64_t ns) noexcept nogil:
    add64(&h.counts[bucket_of(ns)], 1, RELAXED)


cdef inline uint64_t bucket_ns(int bucket) noexcept nogil:
    """The middle of a bucket."""
    cdef int power = bucket >> 3
    if power == 0:
        return <uint64_t> bucket * 2 + 1
    return ((<uint64_t> (8 + (bucket & 7)) << power) + (<uint64_t> 1 << power) // 2)


cdef inline uint64_t quantile(Histogram *h, double share) noexcept nogil:
    """Nanoseconds that 'share' of the recorded values do not exceed; 0 when nothing was recorded."""
    cdef uint64_t total = 0, seen = 0
    cdef int i
    for i in range(HISTOGRAM_BUCKETS):
        total += load64(&h.counts[i], RELAXED)
    if total == 0:
        return 0
    for i in range(HISTOGRAM_BUCKETS):
        seen += load64(&h.counts[i], RELAXED)
        if <double> seen >= share * <double> total:
            return bucket_ns(i)
    return bucket_ns(HISTOGRAM_BUCKETS - 1)
