"""What the demo does, decided before it starts: sizes, phases, page orders. Pure; worker and parent share it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ramster.config.units import show_size
from ramster.constants import ARENA_BYTES_MIN, MIB, PAGE_BYTES, SEGMENT_BYTES_DEFAULT
from ramster.errors import UsageError

# Pages per step: one `region.check`, one comparison and one progress line. 1 MiB keeps all three far below the walk.
STEP_PAGES = 256
# A random remote fault takes some hundred microseconds; this many keep the phase near 5 s on two cores.
RANDOM_PAGES_MAX = 20480
# Twice the resident set: every pass of a cyclic walk misses on every page, the worst case for LRU.
CYCLIC_RESIDENT_SETS = 2
CYCLIC_PASSES = 3
NODES_MAX = 9
SIZE_MIN = 4 * MIB
LOCAL_MIN = ARENA_BYTES_MIN
RESIDENT_MIN = MIB
LENDER_ARENA_BYTES = 16 * MIB  # a lender's own arena; foreign pages have their granted frames

Kind = Literal["plain", "region", "memmap"]
PHASES = ("fill", "sequential", "random", "cyclic", "sort", "verify-sorted")
CHECKED_PHASES = frozenset({"sequential", "random", "cyclic", "verify-sorted"})


@dataclass(frozen=True, slots=True)
class Options:
    """The command line, checked. All sizes in bytes, multiples of a page."""

    size: int = 512 * MIB
    local: int = 64 * MIB
    resident: int = 64 * MIB
    nodes: int = 2
    seed: int = 1
    keep: bool = False
    file: Path | None = None

    def __post_init__(self) -> None:
        """Raises UsageError naming the option, what was given and what is allowed."""
        for name, value, least in (
            ("--size", self.size, SIZE_MIN),
            ("--local", self.local, LOCAL_MIN),
            ("--resident", self.resident, RESIDENT_MIN),
        ):
            if value < least:
                raise UsageError(f"{name} is {show_size(value)}; it must be at least {show_size(least)}")
            if value % PAGE_BYTES:
                raise UsageError(f"{name} is {value} bytes; it must be a multiple of the page size, {PAGE_BYTES}")
        if self.local % SEGMENT_BYTES_DEFAULT:
            raise UsageError(
                f"--local is {self.local} bytes; it must be a multiple of a segment, {show_size(SEGMENT_BYTES_DEFAULT)}"
            )
        if self.resident >= self.size:
            raise UsageError(
                f"--resident is {show_size(self.resident)} and --size {show_size(self.size)}: "
                "the array would fit in its RAM; make --size larger or --resident smaller"
            )
        if not 2 <= self.nodes <= NODES_MAX:
            raise UsageError(f"--nodes is {self.nodes}; it must be 2 to {NODES_MAX} (node 1 borrows, the others lend)")
        if not 0 <= self.seed < 1 << 63:
            raise UsageError(f"--seed is {self.seed}; it must be 0 to 2**63 - 1")

    @property
    def pages(self) -> int:
        return self.size // PAGE_BYTES

    def lend_bytes(self) -> int:
        """Bytes that each lender grants, so that they together hold the whole array even if nothing compresses.

        A quarter more than the array for entry headers and for segments that hold dead entries until they are compacted
        (the sort writes every page again); 32 MiB each so that small demos have whole segments to move.
        """
        lenders = self.nodes - 1
        each = (self.size + self.size // 4 + lenders - 1) // lenders + 32 * MIB
        return (each + MIB - 1) // MIB * MIB

    def shared_bytes(self) -> int:
        """All arenas, grants and resident pages together, in bytes: what the nodes take from shared memory at most."""
        return self.local + self.resident + (self.nodes - 1) * (self.lend_bytes() + LENDER_ARENA_BYTES)


@dataclass(frozen=True, slots=True)
class Work:
    """One worker's orders. Paths are strings so that the whole is one JSON object."""

    kind: Kind
    pages: int
    seed: int
    random_pages: int
    cyclic_pages: int
    cyclic_passes: int
    resident_bytes: int
    source: str  # the bytes to fill with: `pages` pages
    digests: str  # one little-endian u64 per page of the source
    sorted_digests: str  # the same of the sorted copy; the plain worker makes it
    socket: str = ""  # region kind: the node's region socket
    scratch: str = ""  # memmap kind: the file to map

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def planned(self, phase: str) -> int:
        """Pages that `phase` visits; a page visited in each pass of the cyclic walk counts once per pass."""
        if phase == "random":
            return self.random_pages
        if phase == "cyclic":
            return self.cyclic_pages * self.cyclic_passes
        return self.pages

    def steps(self, phase: str) -> Iterator[npt.NDArray[np.int64]]:
        """Page numbers of a walk in the order of its touches, in steps of at most STEP_PAGES."""
        if phase == "random":
            order = np.random.default_rng(self.seed).permutation(self.pages)[: self.random_pages]
            for first in range(0, len(order), STEP_PAGES):
                yield order[first : first + STEP_PAGES]
            return
        end = self.cyclic_pages if phase == "cyclic" else self.pages
        for _ in range(self.cyclic_passes if phase == "cyclic" else 1):
            for first in range(0, end, STEP_PAGES):
                yield np.arange(first, min(first + STEP_PAGES, end), dtype=np.int64)


def make_work(options: Options, kind: Kind, directory: Path, *, socket: str = "") -> Work:
    """The orders of one worker; every kind gets the same phases and page orders."""
    return Work(
        kind=kind,
        pages=options.pages,
        seed=options.seed,
        random_pages=min(options.pages, RANDOM_PAGES_MAX),
        cyclic_pages=min(options.pages, CYCLIC_RESIDENT_SETS * options.resident // PAGE_BYTES),
        cyclic_passes=CYCLIC_PASSES,
        resident_bytes=options.resident,
        source=str(directory / "source.bin"),
        digests=str(directory / "source.digests"),
        sorted_digests=str(directory / "sorted.digests"),
        socket=socket,
        scratch=str(directory / "memmap.bin") if kind == "memmap" else "",
    )
