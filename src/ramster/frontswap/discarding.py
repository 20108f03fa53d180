"""Giving up a part of a region: what of it is pages of its own goes at the node, the rest is written as zeros.

Covers: how a range in bytes falls apart, and in which order its parts go. Does not cover: what the node does (engine
Region.discard).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from ramster.constants import PAGE_BYTES
from ramster.frontswap import messages

if TYPE_CHECKING:
    from ramster.frontswap.region import Region


@dataclasses.dataclass(frozen=True)
class Parts:
    """A range in bytes."""

    pages: range
    """Pages that lie in it with all their bytes."""
    edges: tuple[tuple[int, int], ...]
    """(start, stop) of the rest, each within one page."""


def parts_of(start: int, stop: int) -> Parts:
    """How a range of bytes falls apart."""
    first, end = -(-start // PAGE_BYTES), stop // PAGE_BYTES
    edges = ((start, first * PAGE_BYTES), (end * PAGE_BYTES, stop)) if first <= end else ((start, stop),)
    return Parts(range(first, max(first, end)), tuple((low, high) for low, high in edges if low < high))


def discard(region: Region, ask: Callable[[messages.Request], messages.Reply], span: tuple[int, int]) -> int:
    """Make bytes from span[0] to span[1] zeros; bytes of the pages that went. The pages go first: the rest may need the
    room.
    """
    parts = parts_of(*span)
    size = 0
    for at in range(parts.pages.start, parts.pages.stop, messages.SPAN_MAX):
        count = min(messages.SPAN_MAX, parts.pages.stop - at)
        size += ask(messages.Discard(first=at, count=count)).pages * PAGE_BYTES
    for low, high in parts.edges:
        # Pinned: what cannot be had, or has no room, is an exception and not SIGBUS.
        with region.pin((low, high)), memoryview(region)[low:high] as edge:
            edge[:] = bytes(high - low)
    return size
