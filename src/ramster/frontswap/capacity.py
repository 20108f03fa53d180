"""What a node's tiers can still take, and whether a region that is being made may outgrow them. No I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from ramster.config.units import counted, format_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capacity:
    """Room at one node at one moment, in bytes of compressed pages; everything that the node serves shares it."""

    arena_bytes: int = 0
    """RAM of this machine for compressed pages."""
    arena_free_bytes: int = 0
    lenders: int = 0
    """Nodes that lend to this one and are up."""
    lenders_free_bytes: int = 0
    """What they have granted and nothing fills yet."""
    spill_bytes: int = 0
    """The file on a disk; 0 where there is none."""
    spill_free_bytes: int = 0
    spill_mirror: bool = False
    """The file takes a copy of what lenders take: then there is room away only where the file has room too."""
    regions_bytes: int = 0
    """What all regions together may put beyond their RAM budgets, uncompressed."""
    resident_max_bytes: int = 0
    """RAM budget of all regions together; 0: no limit."""
    resident_reserved_bytes: int = 0
    """Of it, the budgets of the regions that there are."""

    @property
    def free_bytes(self) -> int:
        """What can still be put: in the arena, at lenders, in the file, which gives up copies for pages."""
        return self.arena_free_bytes + self.lenders_free_bytes + self.spill_free_bytes


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
    """The warning for a region that may put `beyond_bytes` (uncompressed) beyond its RAM; None where all of it fits
    as it is. `room` was looked at with the region made and empty.
    """
    free = room.free_bytes
    if beyond_bytes <= free:
        return None
    ratio = f"{beyond_bytes / free:.1f}:1" if free else "however well they compress, nothing"
    tiers = [f"arena {_short(room.arena_free_bytes)}"]
    tiers.append(
        f"{counted(room.lenders, 'lender')} {_short(room.lenders_free_bytes)}" if room.lenders else "no lender is up"
    )
    if room.spill_bytes:
        tiers.append(f"spill file {_short(room.spill_free_bytes)}" + (" (mirrors the lenders)" * room.spill_mirror))
    end = "waits, and is SIGBUS after [region] full_hold" if full == "wait" else "is SIGBUS"
    return (
        f"this region may put {_short(beyond_bytes)} beyond its RAM, and there is room for {_short(free)} compressed "
        f"({', '.join(tiers)}): unless its pages stay untouched or compress {ratio}, a write to it {end}. See "
        "Client.capacity()" + ("" if full == "wait" else '; full="wait" makes such a write wait for room')
    )


def _short(amount: int) -> str:
    """To three digits: an exact number of bytes would hide how much it is."""
    for name, size in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20)):
        if amount >= size * 1000 // 1024:
            return f"{amount / size:.3g} {name}" if amount < 999 * size else f"{amount / size:.0f} {name}"
    return format_bytes(amount)
