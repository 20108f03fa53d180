"""The Python face of _turns.pxd, for tables."""
from libc.stdint cimport int64_t, uint32_t, uint64_t

WORK = QUANTUM


cdef class Schedule:
    """See the stub."""
    cdef Turns turns

    def came(self, uint32_t peer):
        return turn_of(&self.turns, peer & 255)

    def next(self):
        cdef uint32_t peer = 0
        cdef int64_t work = turn_next(&self.turns, &peer)
        return (peer, work) if work else None

    def over(self, uint32_t peer, uint64_t work, bint more):
        turn_over(&self.turns, peer & 255, work, more)

    @property
    def waiting(self):
        return self.turns.count
