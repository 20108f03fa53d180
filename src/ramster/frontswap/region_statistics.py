"""What a node counts about one region, as its users see it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class RegionStatistics:
    """A region's counters at one moment; pages of 4096 bytes, times in microseconds."""

    pages: int = 0
    """Pages of the region: the sum of resident, local, remote, lost and never touched ones, up to pages on their
    way.
    """
    resident_pages: int = 0
    """Pages in RAM now."""
    budget_pages: int = 0
    """Pages that may be in RAM."""
    pinned_pages: int = 0
    attached_processes: int = 0
    """Processes that have the region mapped, this one included."""
    local_pages: int = 0
    """Pages kept compressed by the node of this machine."""
    remote_pages: int = 0
    """Pages kept by other nodes."""
    lost_pages: int = 0
    never_touched_pages: int = 0
    faults: int = 0
    faults_local: int = 0
    faults_remote: int = 0
    faults_zero: int = 0
    """First touches."""
    faults_wp: int = 0
    """First writes to a page that was mapped clean."""
    faults_minor: int = 0
    """Touches of a page that was in RAM but not mapped: as a rule brought in by another process."""
    faults_parked: int = 0
    """Faults that had to wait for an eviction."""
    prefetched: int = 0
    """Pages brought in without a fault of their own."""
    prefetch_hits: int = 0
    """Of them, pages whose stream went on behind them."""
    prefetch_wasted: int = 0
    """Of them, pages whose stream ended, or that were evicted and then asked for. Pages that are used within their
    window and never again leave no trace, so a part of these were of use.
    """
    evictions: int = 0
    evictions_clean: int = 0
    """Evictions that stored nothing, because the stored copy was still right; the others are puts."""
    refused: int = 0
    """Faults that waited for room in vain and ended by SIGBUS."""
    thrashing: bool = False
    """Threads spend their time waiting for pages that left not long before, as it was in the last two seconds."""
    enough_pages: int = 0
    """Where it is thrashing: a budget with which that would end, estimated from how soon pages come back."""
    polled_us: int = 0
    """CPU time that fault threads spent asking for faults instead of sleeping (`busy_poll_us`)."""
    full: bool = False
    """The node has no room for a further page now."""
    fault_local_p50_us: int = 0
    fault_local_p99_us: int = 0
    fault_remote_p50_us: int = 0
    fault_remote_p99_us: int = 0
