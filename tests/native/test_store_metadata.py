"""What the store keeps beside the entries: how much per page, counted, and when it is taken."""

from __future__ import annotations

import itertools

import pytest
from tests.native.conftest import SEGMENT, Factory, text
from tests.native.test_store_utilisation import mixed

from ramster.engine.store import Store
from ramster.testing import _stress

MIB = 1 << 20
PAGES = 1 << 17
ROW_BYTES_MAX = 128


def test_at_most_sixteen_bytes_per_page_of_a_dense_pool() -> None:
    """512 MiB of pages: an arena of 64 MiB that is nine tenths full, and the rest on a lender."""
    store = Store(64 * MIB, lock=False, full_wait_ms=20000)
    empty = store.statistics().metadata_bytes
    pool = store.create_pool(pages=PAGES)
    pages = itertools.cycle(mixed(9, 1000))
    for index in range(PAGES):
        store.put(pool, index, next(pages))
        if index % 256 == 0 and store.frames()[0] < 32:
            for segment, generation, *_ in store.coldest(16):
                assert _stress.ship(store, segment, generation, peer=1) is not None
    statistics = store.statistics()
    assert statistics.pages_stored == PAGES
    assert statistics.pages_remote > 0.7 * PAGES
    assert statistics.live_bytes > 0.8 * statistics.arena_bytes
    assert statistics.metadata_bytes / PAGES <= 16
    # At the least: slots, directory per page here, sizes per page away, keys and seal ids.
    parts = 8 * PAGES + 4 * statistics.pages_local + 2 * statistics.pages_remote + 56 * statistics.segments_remote
    rows = ROW_BYTES_MAX * (statistics.segments_local + statistics.segments_remote)
    assert parts <= statistics.metadata_bytes <= empty + parts + rows + (64 + 8) * statistics.segments_local + 3 * 4096
    store.destroy_pool(pool)
    store.close()


def test_a_full_arena_by_itself_takes_sixteen_beside_the_fixed_tables() -> None:
    """Nothing away: the fixed tables (150 KiB for this arena, counted too) would be shared by few pages."""
    store = Store(64 * MIB, lock=False, full_wait_ms=20000)
    pages = itertools.cycle(mixed(10, 1000))
    empty = store.statistics().metadata_bytes
    assert empty < 155_000
    pool = store.create_pool(pages=22_000)
    for index in range(22_000):
        store.put(pool, index, next(pages))
    statistics = store.statistics()
    assert statistics.live_bytes > 0.9 * statistics.arena_bytes
    assert (statistics.metadata_bytes - empty) / statistics.pages_stored <= 16
    store.close()


def test_runs_of_a_sparse_pool_take_less_than_thirty(make_store: Factory) -> None:
    store = make_store(512)
    before = store.statistics().metadata_bytes
    pool = store.create_pool()
    for index in range(20_000):
        store.put(pool, index % 500, text(index % 50, 0.2), (index // 500, 0, 0))
    taken = store.statistics().metadata_bytes - before
    assert taken / 20_000 <= 30
    store.destroy_pool(pool)


@pytest.mark.parametrize("objects", [1, 700])
def test_nodes_of_sparse_pools_are_used_again(make_store: Factory, objects: int) -> None:
    store = make_store(64, verify=False)
    taken = []
    for _ in range(4):
        pool = store.create_pool()
        for index in range(700):
            store.put(pool, index * 8, b"\7" * 4096, (index % objects, 0, 0))
        taken.append(store.statistics().metadata_bytes)
        store.destroy_pool(pool)
    assert len(set(taken)) == 1
    store.verify()
    store.close()


def test_nodes_are_there_before_they_are_needed() -> None:
    """The first puts of a sparse pool take no memory: it was taken with the pool."""
    store = Store(16 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=False)
    pool = store.create_pool()
    before = store.statistics().metadata_bytes
    for index in range(200):
        store.put(pool, index * 8, b"\7" * 4096, (index, 0, 0))
    assert store.statistics().metadata_bytes == before
    store.close()
