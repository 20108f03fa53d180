"""What a node's tiers can still take, and whether a region that is being made may outgrow them. No I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Final

from ramster.config.units import counted, show_size
from ramster.constants import PAGE_BYTES

# Of fewer bytes a ratio says nothing of what comes next.
MEASURED_MIN_BYTES: Final = 64 << 20
# What of a better one is relied on: memory that was nearly all zeros says nothing of what is written into it later.
COMPRESSION_MAX: Final = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Room at one node at one moment, in bytes of compressed pages where nothing else is said; everything that the node
    serves shares it.
    """

    arena_bytes: int = 0
    """RAM of this machine for compressed pages."""
    arena_free_bytes: int = 0
    lenders: int = 0
    """Nodes that are up and lend to this one what nothing fills yet: one that is full is not counted."""
    lenders_free_bytes: int = 0
    """What they have granted and nothing fills yet."""
    spill_bytes: int = 0
    """The file on a disk; 0 where there is none."""
    spill_free_bytes: int = 0
    spill_mirror: bool = False
    """The file takes a copy of what lenders take: then there is room away only where the file has room too."""
    regions_bytes: int = 0
    """What all regions together may put beyond their RAM budgets, uncompressed. Exports are not in it."""
    stored_bytes: int = 0
    """What the node has stored now, here and away, for regions and exports, uncompressed."""
    put_bytes: int = 0
    """What it has been given to store since it started, uncompressed ..."""
    put_compressed_bytes: int = 0
    """... and what became of that."""
    resident_max_bytes: int = 0
    """RAM budget of all regions together; 0: no limit."""
    resident_reserved_bytes: int = 0
    """Of it, the budgets of the regions that there are."""

    @property
    def free_bytes(self) -> int:
        """What can still be put: in the arena, at lenders, in the file, which gives up copies for pages."""
        return self.arena_free_bytes + self.lenders_free_bytes + self.spill_free_bytes

    @property
    def compression(self) -> float:
        """How many bytes have become one, as measured here so far, 4 at most; 1 before 64 MiB were measured."""
        if self.put_bytes < MEASURED_MIN_BYTES:
            return 1.0
        return min(COMPRESSION_MAX, self.put_bytes / max(1, self.put_compressed_bytes))

    @property
    def expected_bytes(self) -> int:
        """What can still be put, uncompressed, if it compresses as what was put so far."""
        return int(self.free_bytes * self.compression)


class CapacityWarning(UserWarning):
    """A region was made that may outgrow what arena, lenders and spill file can hold."""


def of_tiers(arena: Mapping[str, int], granted: Iterable[int], spill: Mapping[str, int] | None) -> dict[str, int]:
    """A node's part of a Capacity: of its store's counters, the segments that each lender which is up has granted, and
    its spill file's counters with "mirror".
    """
    segment = arena["segment_bytes"]
    size = arena["frames_total"] * segment
    up = [segments for segments in granted if segments]
    found = {
        "arena_bytes": size,
        # What is dead is made free by the cleaner.
        "arena_free_bytes": max(0, size - arena["live_bytes"]),
        "lenders": len(up),
        "lenders_free_bytes": sum(up) * segment,
        "stored_bytes": arena["pages_stored"] * PAGE_BYTES,
        "put_bytes": arena["bytes_in"],
        "put_compressed_bytes": arena["bytes_compressed"],
    }
    if spill is not None:
        found["spill_bytes"] = spill["bytes_total"]
        found["spill_free_bytes"] = max(0, spill["bytes_total"] - spill["bytes_used"])
        found["spill_mirror"] = int(spill["mirror"])
    return found


def decode(numbers: Mapping[str, int]) -> Capacity:
    """What a node said; what it did not say is 0, what we do not know is dropped."""
    known: dict[str, Any] = {
        field.name: numbers[field.name] for field in dataclasses.fields(Capacity) if field.name in numbers
    }
    known["spill_mirror"] = bool(known.get("spill_mirror", 0))
    return Capacity(**known)


def outgrows(beyond_bytes: int, room: Capacity, full: str) -> str | None:
    """The warning for a region that may put `beyond_bytes` (uncompressed) beyond its RAM; None where all of it fits if
    it compresses as pages have so far. `room` was looked at with the region made and empty.

    What other regions may still put counts where this region is the one that makes it too much: whoever comes after one
    that was warned for is not warned for the same.
    """
    free, expected = room.free_bytes, room.expected_bytes
    others = max(0, room.regions_bytes - beyond_bytes - room.stored_bytes)
    if others > expected:
        others = 0
    if beyond_bytes + others <= expected:
        return None
    ratio = f"{(beyond_bytes + others) / free:.1f}:1" if free else "however well they compress, nothing"
    tiers = [f"arena {_short(room.arena_free_bytes)}"]
    tiers.append(
        f"{counted(room.lenders, 'lender')} {_short(room.lenders_free_bytes)}" if room.lenders else "no lender has room"
    )
    if room.spill_bytes:
        tiers.append(f"spill file {_short(room.spill_free_bytes)}" + (" (mirrors the lenders)" * room.spill_mirror))
    end = "waits, and is SIGBUS after [region] full_hold" if full == "wait" else "is SIGBUS"
    return (
        f"this region may put {_short(beyond_bytes)} beyond its RAM{_beside(others)}, and there is room for "
        f"{_short(free)} compressed ({', '.join(tiers)}), {_as_measured(room)}: unless its pages stay untouched or "
        f"compress {ratio}, a write to it {end}. See "
        "Client.capacity()" + ("" if full == "wait" else '; full="wait" makes such a write wait for room')
    )


def _beside(others: int) -> str:
    return f", other regions {_short(others)} more" if others else ""


def _as_measured(room: Capacity) -> str:
    if room.put_bytes < MEASURED_MIN_BYTES:
        return "with too little stored so far to say how well pages compress here"
    return f"which is {_short(room.expected_bytes)} of pages that compress as those so far ({room.compression:.1f}:1)"


def _short(amount: int) -> str:
    """To three digits: an exact number of bytes would hide how much it is."""
    for name, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if amount >= size * 1000 // 1024:
            return f"{amount / size:.3g} {name}" if amount < 999 * size else f"{amount / size:.0f} {name}"
    return show_size(amount)
