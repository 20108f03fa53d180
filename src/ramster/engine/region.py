"""A region's documented face: a far array of one or several processes, served by native threads of the node.

Covers the contract; the mechanism and its rules are in `_region.pyx`. How an application gets there is
`ramster.frontswap`.
"""

from __future__ import annotations

from ramster.engine import _region

__all__ = ["Region"]


class Region(_region.Region):
    """One region, served from the first `attach` until `close`.

    Region(links, pages, resident_pages, *, name, fault_threads=1, evictor_threads=1, full_wait_ms=2000,
    busy_poll_us=0, poison="auto")

    Ranges are in pages; UsageError when one is not inside the region. Methods that wait do so without the GIL, within
    [links] give_up + [region] full_wait + 1 s for each window of 32 pages.

    Args:
        pages: size. resident_pages: how many may be in RAM at once, at least 16.
        fault_threads, evictor_threads: 1 to 16 of each; fault threads for each process. full_wait_ms: how long a fault
            waits for room before SIGBUS. busy_poll_us: how long a fault thread asks for the next fault before it
            sleeps, while they come that fast.
        poison: "auto" uses UFFDIO_POISON where the applications' kernel has it, "guard" always their guardians.

    join: room for one more process: (its number, the far end of its guard channel, which the caller owns). Refused when
        32 processes are attached.
    attach: that process's userfaultfd (owned from here on, also when this raises) and where it mapped the memfd.
    detach: its threads end, its pins go, its descriptors are closed; the other processes do not notice. Waits for calls
        of `pin` and `prefetch` for it that are under way, which end early.
    pin: brings a run in, makes it writable and keeps it; nests, and belongs to that process. RegionFull when more would
        be pinned than the budget allows, RegionLost when a page is lost; then nothing is pinned.
    unpin: ValueError for a run that this process has not pinned.
    prefetch: brings in as much of a run as the budget allows, maps it in that process and says how many pages.
        RegionLost before anything moves.
    evict: writes a run out, for all processes; pages that are pinned stay. RegionFull when there is no room for all;
        the rest stays.
    discard: a run reads as zeros from then on, for all processes, and nothing is kept of it here or away. Fetches and
        stores nothing; a page that is pinned stays in place. What was lost is not lost any more, but RegionLost with
        poison="guard". Refused when a page stays in other hands for too long.
    advise: how a run will be used, "normal", "sequential", "random" or "cyclic" (docs/regions.md); replaces what was
        said of it before. UsageError for another word and for more than 64 ranges with an advice of their own.
    troubles: (pages lost now that somebody touched, faults refused for want of room so far, pages that the application
        removed by itself, whether nothing takes a further page now); cheap, for every second.
    check: runs of pages that a touch would not get; where a lender is out of reach it waits until that is decided.
    wait_when_full: a fault waits so long for room before SIGBUS, and not full_wait_ms; when that is over the processes
        are told so. Before the first attach.
    close: detaches every process, ends the threads, forgets every page here and away. Neither poisons nor unregisters.
    """
