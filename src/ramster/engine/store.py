"""The store's documented face: put, get and flush of pages, and everything that can be asked of it.

Covers the contract. The mechanism, and the rules that keep it right under threads, are in `_store.pyx`; bytes and
offsets are in docs/store-format.md; the readable reference with the same contract is `ramster.tmem.model`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from ramster.constants import SEGMENT_BYTES_DEFAULT
from ramster.engine import _store


@dataclass(frozen=True, slots=True)
class StoreStatistics:
    """One look at a store. Counts are pages unless the name says otherwise; `bytes` are bytes.

    Always: pages_stored = pages_local + pages_remote + pages_filled (lost pages are counted apart), and bytes held by
    local segments = live_bytes + dead_bytes. Remote is what is not in the arena: on lenders, or in the spill file alone
    (spilled, a part of remote); mirrored segments are on a lender and in the spill file.

    metadata_bytes: everything that is kept beside the entries: page tables, rows and directories of segments, hints,
    free lists, what is known of segments away, all fixed tables. Headers of entries are part of the entries, in
    live_bytes. puts_incompressible: stored as they are; puts_untried: of these, without a try; puts_plugged: into the
    room of dead entries.
    """

    arena_bytes: int
    segment_bytes: int
    frames_total: int
    frames_free: int
    segments_local: int
    segments_remote: int
    segments_spilled: int
    segments_mirrored: int
    segments_unmirrored: int
    pages_unmirrored: int
    segments_lost: int
    pages_stored: int
    pages_local: int
    pages_remote: int
    pages_spilled: int
    pages_filled: int
    pages_lost: int
    live_bytes: int
    dead_bytes: int
    live_bytes_remote: int
    dead_bytes_remote: int
    table_bytes: int
    puts: int
    gets: int
    local_gets: int
    gets_missed: int
    flushes: int
    flushes_found: int
    puts_refused: int
    cleaned_segments: int
    cleaned_bytes: int
    puts_plugged: int
    shipped_segments: int
    bytes_in: int
    bytes_compressed: int
    puts_incompressible: int
    puts_untried: int
    ephemeral_dropped: int
    recompressed_pages: int
    recompressed_saved_bytes: int
    corrupt_pages: int
    locked: bool
    metadata_bytes: int


class Store(_store.Store):
    """A fixed arena of compressed pages in a log of segments, safe from many threads at once.

    Every method releases the GIL while it works. Pages are 4096 bytes; a key is (pool, object id, index), the object
    id three unsigned 64-bit integers (0, 0, 0 in a dense pool), the index 32 bits.

    Args:
        arena_bytes: RAM for compressed pages, taken, touched and (where allowed) locked at once. StoreFull where
            the system cannot give it.
        segment_bytes: 64 KiB to 256 KiB in whole pages; the unit of cleaning and of shipping.
        path: a file on tmpfs that backs the arena; None: an anonymous memfd.
        lock: try mlock, of the tables as they grow too; `statistics().locked` says whether it always worked.
        full_wait_ms: how long a put waits for room before StoreFull.
        node_key: 32 secret bytes that segment keys are derived from; never leaves this process. None: random.
        clean_low: share of free segments below which the cleaner works.
        pressure: share of free segments below which `pressure_fd` (an eventfd) is raised.
        cleaner: run the cleaner thread. False leaves cleaning to `clean()` (tests).
        arena_fd: a descriptor of a file in memory of arena_bytes, to be the arena as it is: what of it has memory keeps
            it and is not zeroed. Duplicated; goes instead of path.

    put: compresses a page under its key. An older page under that key is replaced. StoreFull, once full_wait_ms have
        passed without room, which a page of one 32-bit pattern never needs: then nothing was stored, and in a
        persistent pool the older page still is what a get returns (in an ephemeral one it is gone). UsageError for an
        unknown pool or an index out of range.
    get: the page's bytes, or None. mode 1 removes it, 0 removes it if the pool is ephemeral, -1 keeps it. PageLost
        when its bytes fail their checksum or its only copy is gone: it stays lost until it is put or flushed.
        A page on a lender is read through `Links.get`.
    flush_page, flush_object: forget, here and away. True, or how many pages, when there was something.
    create_pool: pages=N makes a dense pool (8 bytes a page, populated 2 MiB of slots at a time), pages=None a sparse
        one. Pages of a pool that is not persistent may be dropped at any time. Returns its id, 64 bits that no other
        pool of this store ever gets: of one that was destroyed every call raises PoolGone, and stored bytes of it are
        never taken for a page of another.
    populate: has the slots of the first so many pages of a dense pool in memory, and locked where that is allowed, so
        that no put to them asks the kernel for memory. StoreFull where there is no room for them.
    census: pages of a dense pool by where they are, {"here", "away", "lost"}; a look at every slot that was ever used.
    destroy_pool: drops every page.
    """

    def __new__(
        cls,
        arena_bytes: int,
        *,
        segment_bytes: int = SEGMENT_BYTES_DEFAULT,
        path: str | None = None,
        lock: bool = True,
        full_wait_ms: int = 1000,
        node_key: bytes | None = None,
        segments_max: int = 1 << 20,
        clean_low: float = 0.08,
        pressure: float = 0.25,
        cleaner: bool = True,
        arena_fd: int | None = None,
    ) -> Self:
        return super().__new__(
            cls,
            arena_bytes,
            segment_bytes,
            path,
            lock,
            full_wait_ms * 1_000_000,
            segments_max,
            os.urandom(32) if node_key is None else node_key,
            clean_low,
            pressure,
            cleaner,
            arena_fd,
        )

    def statistics(self) -> StoreStatistics:
        """Counters of this moment; never blocks the page path for more than a segment row at a time."""
        return StoreStatistics(**self.counters())
