"""What a peer may send that helps nobody: a bucket that fills by weight and drains with time. Pure; the clock is an argument.

Some of it happens between honest nodes: after a reconnect orders are said again, a lender that dropped what it held is asked
for it, an answer comes after its question was given up. So there is room for what one loss can cause, and what drains is
many times what a network causes. A peer that overflows it is cut off; how long for is wire/conduct.py.
"""
from libc.stdint cimport uint32_t, uint64_t

cdef enum:
    BUCKET = 8192                   # units that may come at once, on top of what was shared with this peer
    DRAIN_PER_MS = 4

cdef enum Weight:
    USEFUL = 0
    IDLE = 1                        # asks for, or answers, what is not there any more
    COSTLY = 8                      # the same, and made work: a refused segment, an order that changed nothing
    NONSENSE = 64                   # an honest node never sends it: an answer to nothing, a second goodbye

cdef struct Conduct:
    uint64_t filled
    uint64_t seen_ms


cdef inline bint conduct_charge(Conduct *c, uint32_t weight, uint64_t now_ms, uint64_t room) noexcept nogil:
    """False: that was too much."""
    cdef uint64_t drained = (now_ms - c.seen_ms) * DRAIN_PER_MS if now_ms > c.seen_ms else 0
    c.filled -= min(c.filled, drained)
    c.seen_ms = max(c.seen_ms, now_ms)
    c.filled += weight
    return c.filled <= room
