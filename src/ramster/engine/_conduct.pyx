"""The Python face of _conduct.pxd, for tables."""
from libc.stdint cimport uint32_t, uint64_t

WEIGHTS = {"useful": USEFUL, "idle": IDLE, "costly": COSTLY, "nonsense": NONSENSE}
ROOM = BUCKET
DRAIN_PER_S = 1000 * DRAIN_PER_MS


cdef class Bucket:
    """One peer's, on one connection."""
    cdef Conduct conduct

    def charge(self, uint32_t weight, uint64_t now_ms, uint64_t room=BUCKET):
        return conduct_charge(&self.conduct, weight, now_ms, room)
