from typing import Self, TypedDict

from typing_extensions import Buffer

class Totals(TypedDict):
    visits: int
    writes: int
    skipped: int  # written by another thread meanwhile: not judged
    ns: int  # wall time, from the first thread's start to the last one's end
    # From here on everything must be zero.
    empty: int  # zeros where something was written
    stale: int  # an older version of the page
    foreign: int  # another page
    altered: int  # anything else
    first: tuple[int, int, int, int] | None
    """Of one wrong page its number, the version that it has to hold, and the two first words that it holds."""

class Walk:
    def __new__(cls, memory: Buffer, salt: int) -> Self: ...
    @property
    def pages(self) -> int: ...
    @property
    def written(self) -> int: ...
    def run(
        self,
        *,
        visits: int,
        threads: int = 1,
        seconds: float = 3600.0,
        order: str = "random",
        dirty: int = 0,
        seed: int = 1,
        shared: bool = False,
    ) -> Totals: ...
