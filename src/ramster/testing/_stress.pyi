from typing import TypedDict

from ramster.engine.links import Links
from ramster.engine.store import Store

class Totals(TypedDict):
    # Done, and how it went.
    puts: int
    gets: int
    hits: int
    misses: int
    flushes: int
    flushed: int
    removes: int
    refused: int
    remote: int  # on a lender, not judged
    # From here on everything must be zero.
    corrupt: int  # a checksum failed
    garbage: int  # bytes that nobody put
    foreign: int  # another key's page
    stale: int  # older than a page that was stored before the get began
    vanished: int  # a miss where a page had to be
    failed: int  # an outcome that cannot be

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
    links: Links | None = None,
) -> Totals: ...
def native_layout() -> dict[str, tuple[int, dict[str, tuple[int, int]]]]: ...
def reference(
    store: Store, pool: int, index: int, oid: tuple[int, int, int] = (0, 0, 0)
) -> dict[str, int | bool | bytes]: ...
def ship(
    store: Store, segment: int, generation: int, peer: int, handle: int = 0, commit: bool = True
) -> bytes | None: ...
def unseal(store: Store, pool: int, index: int, entry: bytes, oid: tuple[int, int, int] = (0, 0, 0)) -> bytes: ...
def overwrite_slot(store: Store, pool: int, index: int, value: int) -> None: ...
