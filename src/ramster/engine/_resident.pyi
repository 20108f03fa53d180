from typing import Self

import numpy as np
from numpy.typing import NDArray

CAPACITY_MAX: int

def enough(budget: int, ghosts: int, came: int, returned: int, waited_ns: int, passed_ns: int) -> int:
    """The budget, in pages, that would end thrashing, estimated from what happened within passed_ns; 0: it does not
    thrash.

    ghosts: pages that left not long ago; came, returned: pages that came in, and those of them that were ghosts;
    waited_ns: time that faults took.
    """

def steady(before: int, found: int, doubt: bool) -> tuple[int, bool]:
    """What is said, and whether in doubt, after a look that found `found` where `before` was said.

    0 is said after two looks in a row that found nothing; another estimate is approached by a quarter of the way.
    """

class ResidentSet:
    """A region's replacement policy by itself, for tests and for replaying traces; not for several threads at once.

    Raises UsageError for a capacity that is not 1 to CAPACITY_MAX and pages that are not 0 to 2^32 - 1.
    """

    def __new__(cls, capacity: int) -> Self: ...
    def __len__(self) -> int:
        """Resident pages, also those that are pinned or leaving."""

    def add(self, page: int, *, ahead: bool = ..., behind: bool = ..., keep: bool = ...) -> str:
        """The page has come in: "new", "returned" (its ghost was known) or "missed" (and it had come by read-ahead
        and left before it was used). A page that is leaving stays; one that is resident was used.

        Raises UsageError for a page more than capacity + spare.
        """

    def victim(self) -> int | None:
        """The page that should go; it is leaving until `gone`, `add` or `pin`."""

    def leave_free(self, pages: int) -> None:
        """So many pages of the capacity are kept free from now on, by calling `victim` earlier."""

    def pin(self, page: int) -> None: ...
    def unpin(self, page: int) -> None: ...
    def gone(self, page: int) -> None:
        """It is no longer resident; its ghost is kept where `victim` chose it. Raises UsageError where it was not."""

    def queues(self) -> dict[str, list[int]]:
        """Pages by queue, the youngest first; aborts where a link is wrong."""

    @property
    def spare(self) -> int: ...
    @property
    def main_rate(self) -> float: ...
    @property
    def duels(self) -> tuple[int, int]:
        """Won by main, won by probation."""

    @property
    def bytes_used(self) -> int:
        """Of memory that has been touched."""

    def replay(self, trace: NDArray[np.int64]) -> int:
        """Misses of a trace of page accesses; of a hit the policy learns nothing."""
