"""Page contents to measure with: bytes of this system's files, and pages that compress two to one."""

from __future__ import annotations

import random
from pathlib import Path

PAGE = 4096
ROOTS = ("/usr/lib", "/usr/bin", "/usr/share")


def _worth(page: bytes) -> bool:
    """Whole, and not same-filled: those cost next to nothing and would flatter every figure."""
    return len(page) == PAGE and page != page[:4] * (PAGE // 4)


def real_pages(count: int, seed: int = 1) -> bytes:
    """`count` pages at random places of random regular files below ROOTS."""
    chosen = random.Random(seed)
    files = sorted(
        path
        for root in ROOTS
        for path in Path(root).rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_size >= 4 * PAGE
    )
    if not files:
        raise FileNotFoundError(f"no files of at least four pages below {', '.join(ROOTS)}")
    pages: list[bytes] = []
    while len(pages) < count:
        with chosen.choice(files).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(chosen.randrange(size // PAGE) * PAGE)
            run = file.read(16 * PAGE)
        pages += filter(_worth, (run[at : at + PAGE] for at in range(0, len(run), PAGE)))
    return b"".join(pages[:count])


def half_pages(count: int, seed: int = 1) -> bytes:
    """Pages whose first half is noise and whose second half repeats: LZ4 halves them."""
    noise = random.Random(seed)
    return b"".join(noise.randbytes(PAGE // 2) + noise.randbytes(16) * (PAGE // 32) for _ in range(count))
