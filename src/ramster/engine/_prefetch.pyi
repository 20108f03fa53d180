from collections.abc import Callable
from typing import Self

ADVICE: dict[str, int]

class AccessPattern:
    """A region's fault-around and read-ahead by themselves, for tests; not for several threads at once."""

    def __new__(cls, pages: int, window_max: int = ...) -> Self: ...
    def fault(
        self, page: int, *, away: Callable[[int], bool] | None = ..., remote: bool = ...
    ) -> list[tuple[int, int]]:
        """Runs (first, end) of pages that come in for a fault, that with the page itself first; `away` says which
        pages are not resident (None: none is).
        """

    def missed(self) -> None:
        """A page that was brought in ahead has been evicted before it was used."""

    def advise(self, kind: str, first: int, count: int) -> None:
        """Raises UsageError where that makes more than 64 ranges; nothing changes then."""

    def advice(self, page: int) -> str: ...
    @property
    def ranges(self) -> list[tuple[int, int, str]]:
        """(first, end, kind) of what is not "normal", in order."""

    @property
    def counters(self) -> dict[str, int]: ...
