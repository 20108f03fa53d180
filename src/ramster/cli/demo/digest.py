"""Page digests: how the demo knows that a page is right. 8-byte BLAKE2b of each page, so any wrong byte shows."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ramster.constants import PAGE_BYTES

Digests = npt.NDArray[np.uint64]


def page_digests(data: memoryview, pages: Iterable[int]) -> Digests:
    """Digests of the given pages of `data` (bytes, page 0 at offset 0), in the order given: uint64, one per page.

    Reads the pages where they lie, without a copy: on a region this is the touch that faults.
    """
    make = blake2b
    digests = b"".join(
        [make(data[page * PAGE_BYTES : (page + 1) * PAGE_BYTES], digest_size=8).digest() for page in pages]
    )
    return np.frombuffer(digests, dtype="<u8")


def all_digests(data: memoryview) -> Digests:
    """Digests of every page of `data`, whose length must be a multiple of the page size."""
    if len(data) % PAGE_BYTES:
        raise ValueError(f"{len(data)} bytes are not whole pages")
    return page_digests(data, range(len(data) // PAGE_BYTES))


def save(digests: Digests, path: Path) -> None:
    """Writes one little-endian u64 per page."""
    digests.astype("<u8", copy=False).tofile(path)


def load(path: Path, pages: int) -> Digests:
    """Reads what `save` wrote. ValueError unless it is exactly `pages` digests: a short table would check nothing."""
    digests = np.fromfile(path, dtype="<u8")
    if len(digests) != pages:
        raise ValueError(f"{path} holds {len(digests)} digests, expected {pages}")
    return digests


def checker_works(data: memoryview) -> bool:
    """True if the comparison notices one flipped bit in a copy of the first page of `data`."""
    page = bytearray(data[:PAGE_BYTES])
    before = all_digests(memoryview(page))
    page[PAGE_BYTES // 2] ^= 1
    return bool(all_digests(memoryview(page))[0] != before[0])
