from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from ramster.engine.store import Store
from ramster.tmem.contract import ObjectId

SEGMENT = 65536
Factory = Callable[..., Store]


@pytest.fixture
def make_store() -> Iterator[Factory]:
    """Makes small stores without a cleaner thread and without waiting; verifies and closes them afterwards."""
    made: list[Store] = []

    def make(
        segments: int = 16,
        *,
        cleaner: bool = False,
        full_wait_ms: int = 0,
        path: str | None = None,
        node_key: bytes | None = None,
        verify: bool = True,
    ) -> Store:
        store = Store(
            segments * SEGMENT,
            segment_bytes=SEGMENT,
            lock=False,
            cleaner=cleaner,
            full_wait_ms=full_wait_ms,
            path=path,
            node_key=node_key,
        )
        if verify:
            made.append(store)
        return store

    yield make
    for store in made:
        store.verify()
        store.close()


@pytest.fixture
def store(make_store: Factory) -> Store:
    return make_store()


def noise(seed: int) -> bytes:
    """A page that does not compress."""
    return random.Random(seed).randbytes(4096)


def text(seed: int, share: float = 0.5) -> bytes:
    """A page of which about `share` is left after compression."""
    fresh = int(4096 * share)
    return random.Random(seed).randbytes(fresh) + b"\x5a" * (4096 - fresh)


def fill(pattern: int) -> bytes:
    return pattern.to_bytes(4, "little") * 1024


def uses(store: Store, pool: int, index: int, page: bytes, oid: ObjectId = (0, 0, 0)) -> list[Callable[[], object]]:
    """Every way in which a pool's id reaches a store."""
    return [
        lambda: store.put(pool, index, page, oid),
        lambda: store.put(pool, index, fill(index), oid),
        lambda: store.get(pool, index, oid, 1),
        lambda: store.flush_page(pool, index, oid),
        lambda: store.flush_object(pool, oid),
        lambda: store.populate(pool, 1),
        lambda: store.census(pool),
        lambda: store.where(pool, index),
        lambda: store.corrupt(pool, index, 7),
        lambda: store.destroy_pool(pool),
    ]
