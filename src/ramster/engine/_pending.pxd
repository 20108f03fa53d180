"""The decision about a get that is under way: go on waiting, ask again, ask elsewhere, or give up. Pure."""
from libc.stdint cimport uint64_t

cdef enum PendingState:
    P_FREE = 0
    P_WAITS = 1                     # for a connection
    P_SENT = 2
    P_COMPLETING = 3
    P_SPILL = 4                     # in the hands of the spill file's threads

cdef enum Verdict:
    V_WAIT = 0
    V_GIVE_UP = 1                   # tell whoever waits that it cannot be had now
    V_SETTLE = 2                    # the lender has the segment no more: the slot's state is the answer
    V_REDIRECT = 3                  # to the spill file
    V_ASK = 4                       # the lender, (once more) under a new id

cdef struct Patience:               # nanoseconds in which the node ran
    uint64_t give_up_ns
    uint64_t spill_ns               # for a request that the spill file has
    uint64_t hedge_ns
    uint64_t ask_again_ns

cdef struct Asking:                 # what is known of one request
    PendingState state
    uint64_t started_ns
    uint64_t sent_ns
    bint stopping
    bint spilled                    # it was asked of the spill file
    bint mirrored                   # the spill file has what is wanted, too, and could be asked
    bint remote                     # the slot's segment still is where it was


cdef inline Verdict pending_verdict(const Asking *a, const Patience *p, uint64_t now) noexcept nogil:
    cdef uint64_t most = max(p.give_up_ns, p.spill_ns) if a.spilled else p.give_up_ns
    if a.state != P_WAITS and a.state != P_SENT and a.state != P_SPILL:
        return V_WAIT
    if a.stopping or now > a.started_ns + most:
        return V_GIVE_UP
    if a.state == P_SPILL:
        return V_WAIT
    if not a.remote:
        return V_SETTLE
    if a.mirrored and (a.state == P_WAITS or now > a.started_ns + p.hedge_ns):
        return V_REDIRECT
    if a.state == P_WAITS or now > a.sent_ns + p.ask_again_ns:
        return V_ASK
    return V_WAIT
