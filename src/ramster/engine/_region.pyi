from typing import Self

from ramster.engine._link import Links

class Region:
    """One region of one application, served by native threads of the node from `attach` to `close`.

    Ranges are in pages; UsageError when one is not inside the region. Methods that wait do so without the GIL and within
    [links] give_up + [region] full_wait + 1 s a window of 32 pages.

    Args:
        pages: size; resident_pages: how many may be in the application's RAM at once, at least 128.
        fault_threads, evictor_threads: 1 to 16 of each. full_wait_ms: how long a fault waits for room before SIGBUS.
        poison: "auto" uses UFFDIO_POISON where the application's kernel has it, "guard" always the application's guardian.

    attach: the application's userfaultfd (owned from here on, also when this raises) and where it mapped the memfd.
    pin: brings a run in, makes it writable and keeps it; nests. RegionFull when more would be pinned than the budget allows,
        RegionLost when a page is lost; then nothing is pinned. unpin: ValueError for a run that is not pinned.
    prefetch: brings in as much of a run as the budget allows and says how many pages. RegionLost before anything is moved.
    evict: writes a run out; pages that are pinned stay. RegionFull when there is no room for all; the rest stays resident.
    check: runs of pages whose only copy is gone or out of reach; moves nothing.
    close: ends the threads, forgets every page here and away. Neither poisons nor unregisters.
    """

    def __new__(
        cls,
        links: Links,
        pages: int,
        resident_pages: int,
        *,
        name: str,
        fault_threads: int = 1,
        evictor_threads: int = 1,
        full_wait_ms: int = 2000,
        poison: str = "auto",
    ) -> Self: ...
    @property
    def name(self) -> str: ...
    @property
    def memfd(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def resident_pages(self) -> int: ...
    @property
    def dead(self) -> bool: ...
    def guard_fd(self) -> int: ...
    def attach(self, uffd: int, base: int, features: int) -> None: ...
    def pin(self, first: int, count: int) -> None: ...
    def unpin(self, first: int, count: int) -> None: ...
    def prefetch(self, first: int, count: int) -> int: ...
    def evict(self, first: int, count: int) -> int: ...
    def check(self, first: int, count: int) -> list[tuple[int, int]]: ...
    def statistics(self) -> dict[str, int]: ...
    def close(self) -> None: ...
