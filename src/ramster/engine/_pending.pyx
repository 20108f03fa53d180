"""The decision about gets under way, and the clock that it reads, by themselves: for tests."""
from libc.stdint cimport uint64_t

from ramster.engine._running cimport BEAT_NS, GAP_NS, Running, not_counted, ran_ns

GAP_MS = GAP_NS // 1000000
BEAT_MS = BEAT_NS // 1000000

_STATES = {"free": P_FREE, "waits": P_WAITS, "sent": P_SENT, "completing": P_COMPLETING, "spill": P_SPILL}
_WORDS = {V_WAIT: "wait", V_GIVE_UP: "give up", V_SETTLE: "settle", V_REDIRECT: "redirect", V_ASK: "ask"}


def verdict(str state, *, uint64_t started_ms=0, uint64_t sent_ms=0, uint64_t now_ms=0, bint stopping=False, bint spilled=False,
            bint mirrored=False, bint remote=True, uint64_t give_up_ms=5000, uint64_t spill_ms=30_000, uint64_t hedge_ms=100,
            uint64_t ask_again_ms=2000):
    cdef Asking a
    cdef Patience p
    a.state = _STATES[state]
    a.started_ns = started_ms * 1000000
    a.sent_ns = sent_ms * 1000000
    a.stopping = stopping
    a.spilled = spilled
    a.mirrored = mirrored
    a.remote = remote
    p.give_up_ns = give_up_ms * 1000000
    p.spill_ns = spill_ms * 1000000
    p.hedge_ns = hedge_ms * 1000000
    p.ask_again_ns = ask_again_ms * 1000000
    return _WORDS[pending_verdict(&a, &p, now_ms * 1000000)]


def skipped_ms(uint64_t beat_ms, uint64_t now_ms):
    return not_counted(beat_ms * 1000000, now_ms * 1000000) // 1000000


cdef class RanClock:
    """See the stub."""
    cdef Running running

    def ms(self):
        return ran_ns(&self.running) // 1000000

    @property
    def gaps(self):
        return self.running.gaps
