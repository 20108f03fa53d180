"""Whose turn it is on a thread that serves all peers: deficit round robin, and who was idle comes first. Pure.

In each round a peer's credit grows by a quantum of work, up to one quantum, and what its turns cost is taken off; one
frame may cost more than is left, which the next rounds make up for. Who has credit left is served as soon as something
comes from it; who has used it up waits in a queue, and one of the queue has a turn after each look at who has come. So
whoever asks for little waits for one turn of one busy peer, however many there are; busy peers get equal shares; and who
sends just less than a quantum at a time gets no more than that in a round.
"""
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    QUANTUM = 100000                # units of work, about a ns each: what a page that somebody waits for may wait for
    TURNS_MAX = 256

cdef struct Turn:                   # of one peer
    int64_t credit
    uint64_t round                  # up to which its credit has grown
    bint queued

cdef struct Turns:
    uint64_t round
    uint32_t left                   # of the queue, in this round
    uint32_t head
    uint32_t count
    uint8_t queue[256]
    Turn peers[256]


cdef inline void _grow(Turn *t, uint64_t round) noexcept nogil:
    cdef uint64_t rounds = min(round - t.round, <uint64_t> 1 << 30)
    t.credit = min(t.credit + <int64_t> rounds * QUANTUM, <int64_t> QUANTUM)
    t.round = round


cdef inline void _queue(Turns *t, uint32_t peer) noexcept nogil:
    t.peers[peer].queued = True
    t.queue[(t.head + t.count) % TURNS_MAX] = <uint8_t> peer
    t.count += 1


cdef inline int64_t turn_of(Turns *t, uint32_t peer) noexcept nogil:
    """Something has come from a peer: the work that it may have done at once, or 0: it waits until its turn comes."""
    if t.peers[peer].queued:
        return 0
    _grow(&t.peers[peer], t.round)
    if t.peers[peer].credit > 0:
        return t.peers[peer].credit
    _queue(t, peer)
    return 0


cdef inline int64_t turn_next(Turns *t, uint32_t *peer) noexcept nogil:
    """After a look at who has come: the first of the queue and the work that it may have done; 0: nobody has a turn now."""
    if t.left == 0:                 # everybody who waited had a turn
        t.round += 1
        t.left = t.count
    if t.count == 0:
        return 0
    peer[0] = t.queue[t.head]
    t.head = (t.head + 1) % TURNS_MAX
    t.count -= 1
    t.left -= 1
    t.peers[peer[0]].queued = False
    _grow(&t.peers[peer[0]], t.round)
    if t.peers[peer[0]].credit > 0:
        return t.peers[peer[0]].credit
    _queue(t, peer[0])
    return 0


cdef inline void turn_over(Turns *t, uint32_t peer, uint64_t work, bint more) noexcept nogil:
    """What its turn has cost, and whether something is left for another one."""
    t.peers[peer].credit -= <int64_t> work
    if more and not t.peers[peer].queued:
        _queue(t, peer)
