"""The time in which this node ran: what another's silence is measured in.

A node that stood still (SIGSTOP, a freezer, a debugger, a suspended virtual machine, no CPU for seconds) has heard nobody and knows
nothing of others: what they sent lies in its sockets. So a deadline of something that waits for somebody else counts only time
in which this process ran. Nobody tells a process that it stood still. It shows by a clock that is read far more often than once
in GAP_NS, as the links' reactors do, and then was not read for longer: such a gap counts as one beat. CLOCK_MONOTONIC stands
still by itself while a machine sleeps (CLOCK_BOOTTIME would not), and jumps over a virtual machine's pause, which is a gap.

Stamps of this clock must not be mixed with those of now_ns(): it falls behind by each gap.
"""
from libc.stdint cimport uint32_t, uint64_t

from ramster.engine._c.atomic cimport ACQUIRE, RELAXED, RELEASE, cas64, load64, spin_lock, spin_unlock, store64
from ramster.engine._c.pthread cimport now_ns

cdef enum:
    BEAT_NS = 25000000              # how often a reactor looks
    GAP_NS = 250000000              # ten times that; a busy machine that lets it run so rarely is as good as stopped

cdef struct Running:                # all zeros to begin with
    uint64_t beat_ns                # atomic: when the clock was read last, of those who say so
    uint64_t skipped_ns             # atomic: time that does not count; changes before 'beat_ns' does, under the lock
    uint64_t gaps                   # atomic
    uint32_t lock                   # spin


cdef inline uint64_t not_counted(uint64_t beat_ns, uint64_t now) noexcept nogil:
    """Of the time between two readings, what this process did not run in."""
    return now - beat_ns - BEAT_NS if now > beat_ns + GAP_NS else 0


cdef inline uint64_t ran_ns(Running *r) noexcept nogil:
    """Nanoseconds in which this process ran; never 0."""
    cdef uint64_t beat, skipped, now, gap
    while True:
        beat = load64(&r.beat_ns, ACQUIRE)
        skipped = load64(&r.skipped_ns, ACQUIRE)
        now = now_ns()              # last: with a newer 'skipped' than 'beat' it shows the gap, too
        gap = not_counted(beat, now)
        if gap == 0:
            if now > beat + BEAT_NS:
                cas64(&r.beat_ns, &beat, now, False, RELEASE, RELAXED)
            return now - skipped
        spin_lock(&r.lock)
        if load64(&r.beat_ns, RELAXED) == beat:
            store64(&r.skipped_ns, skipped + gap, RELEASE)
            store64(&r.gaps, load64(&r.gaps, RELAXED) + (beat != 0), RELAXED)
            store64(&r.beat_ns, now, RELEASE)
        spin_unlock(&r.lock)
