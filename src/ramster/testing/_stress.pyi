from typing import TypedDict

from ramster.engine.store import Store

class Totals(TypedDict):
    """Operations done, and below them everything that must be zero.

    corrupt: a checksum failed. garbage: bytes that nobody put. foreign: another key's page. stale: an older page than one
    that was stored before the get began. vanished: a miss, or a flush that found nothing, where a page had to be. failed:
    an outcome that cannot be. `remote` counts pages that were on a lender, and are not judged.
    """

    puts: int
    gets: int
    hits: int
    misses: int
    flushes: int
    flushed: int
    removes: int
    refused: int
    remote: int
    corrupt: int
    garbage: int
    foreign: int
    stale: int
    vanished: int
    failed: int

def hammer(
    store: Store,
    pool: int,
    *,
    threads: int,
    keys: int,
    operations: int,
    seconds: float = 60.0,
    seed: int = 1,
    mix: tuple[int, int, int] = (50, 35, 5),
    shared: bool = False,
    sparse: bool = False,
    ephemeral: bool = False,
    wait_ms: int = 50,
) -> Totals:
    """Run `operations` per thread, or until `seconds` have passed, on an empty pool; native threads, no GIL.

    mix: per cent of puts, gets and exclusive gets; the rest flushes. shared=False: each key has one writer (everybody
    reads), and a get must return what a linearisable register would. shared=True: everybody does everything to every key, and
    a get must return a whole page that somebody put under that key. wait_ms: how long a put waits for room.
    UsageError for counts that make no sense.
    """

def native_layout() -> dict[str, tuple[int, dict[str, tuple[int, int]]]]:
    """Of each native struct its size, and offset and size of each field: what docs/store-format.md must say."""

def reference(
    store: Store, pool: int, index: int, oid: tuple[int, int, int] = (0, 0, 0)
) -> dict[str, int | bool | bytes]:
    """The slot of a key and, when its page is on a lender, everything that a request for it would use."""

def ship(store: Store, segment: int, generation: int, peer: int, handle: int = 0, commit: bool = True) -> bytes | None:
    """Seal a segment as for a lender and return the image; commit=False takes it back. None: not sealed, or gone."""

def unseal(store: Store, pool: int, index: int, entry: bytes, oid: tuple[int, int, int] = (0, 0, 0)) -> bytes:
    """Check and uncompress an entry of an image as if a lender had sent it for this key; PageLost when it is not right."""

def overwrite_slot(store: Store, pool: int, index: int, value: int) -> None:
    """Write a slot of a dense pool behind the store's back; afterwards the store is good for verify() and get alone."""
