"""The store's contract, one promise per test. See ramster/tmem/contract.py and ramster/engine/store.py."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.native.conftest import SEGMENT, Factory, fill, noise, text

from ramster.engine.layout import decode_slot
from ramster.engine.store import Store
from ramster.errors import PageLost, PoolGone, RamsterError, StoreFull, UsageError
from ramster.testing import _stress

RAW_ENTRIES_PER_SEGMENT = 15
words = st.integers(0, 2**64 - 1)
pages = st.one_of(
    st.builds(noise, st.integers(0, 99)),
    st.builds(text, st.integers(0, 99), st.sampled_from([0.01, 0.3, 0.86, 0.9])),
    st.builds(fill, st.integers(0, 2**32 - 1)),
    st.builds(lambda head, tail: head + bytes(4096 - len(head) - len(tail)) + tail, *[st.binary(max_size=64)] * 2),
)


def segment_of(store: Store, pool: int, index: int) -> int:
    return decode_slot(_slot(store, pool, index)).segment


# --- keys and pages ---


@given(oid=st.tuples(words, words, words), index=st.integers(0, 2**32 - 1), page=pages)
@settings(max_examples=80, deadline=None)
def test_any_key_and_any_page_come_back(oid: tuple[int, int, int], index: int, page: bytes) -> None:
    store = _shared_store()
    pool = store.create_pool()
    try:
        store.put(pool, index, page, oid)
        assert store.get(pool, index, oid) == page
        assert store.get(pool, index ^ 1, oid) is None
        assert store.get(pool, index, (oid[0] ^ 1, oid[1], oid[2])) is None
        assert store.get(pool, index, (oid[1] ^ 1, oid[0], oid[2])) is None
        assert store.flush_page(pool, index, oid)
        assert store.statistics().table_bytes == 0
    finally:
        store.destroy_pool(pool)
    store.verify()


_cache: list[Store] = []


def _shared_store() -> Store:
    if not _cache:
        _cache.append(Store(16 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=True))
    return _cache[0]


@pytest.mark.parametrize("index", [0, 7, 8, 2**31, 2**32 - 1])
def test_a_dense_pool_reaches_its_last_page(store: Store, index: int) -> None:
    pool = store.create_pool(pages=2**32)
    store.put(pool, index, noise(1))
    assert store.get(pool, index) == noise(1)
    assert store.statistics().table_bytes == 2 << 20
    store.destroy_pool(pool)
    assert store.statistics().table_bytes == 0


def test_a_census_counts_the_pages_of_one_dense_pool(store: Store) -> None:
    pages = 3 << 18  # several 2 MiB of slots, most of them never used
    pool, other = store.create_pool(pages=pages), store.create_pool(pages=100)
    for index in (0, 1, 4095, 4096, (1 << 18) - 1, pages - 1):
        store.put(pool, index, noise(index))
    store.put(pool, 7, bytes(4096))
    store.put(other, 0, noise(1))
    store.flush_page(pool, 1)
    assert store.census(pool) == {"here": 6, "away": 0, "lost": 0}
    assert store.census(other) == {"here": 1, "away": 0, "lost": 0}
    for wrong in (store.create_pool(), 77):
        with pytest.raises(UsageError, match=r"not a dense pool|no pool"):
            store.census(wrong)


def test_objects_and_pools_do_not_mix(store: Store) -> None:
    a, b = store.create_pool(), store.create_pool()
    for n, (pool, oid) in enumerate([(a, (1, 2, 3)), (a, (3, 2, 1)), (a, (1, 2, 4)), (b, (1, 2, 3))]):
        store.put(pool, 5, text(n), oid)
    assert [store.get(p, 5, o) for p, o in [(a, (1, 2, 3)), (a, (3, 2, 1)), (a, (1, 2, 4)), (b, (1, 2, 3))]] == [
        text(n) for n in range(4)
    ]


def test_a_put_copies_the_page(store: Store) -> None:
    pool = store.create_pool(pages=3)
    for index, page in enumerate([noise(1), text(2), fill(3)]):
        buffer = bytearray(page)
        store.put(pool, index, buffer)
        buffer[:] = b"\xff" * 4096
        assert store.get(pool, index) == page


def test_a_page_that_does_not_compress_is_stored_raw(store: Store) -> None:
    pool = store.create_pool(pages=1)
    store.put(pool, 0, noise(1))
    statistics = store.statistics()
    assert statistics.bytes_compressed == 4096
    assert statistics.live_bytes == 4096 + 40
    assert store.get(pool, 0) == noise(1)


def test_pages_that_do_not_compress_are_soon_not_tried(make_store: Factory) -> None:
    store = make_store(64)
    pool = store.create_pool(pages=1000)
    for index in range(200):
        store.put(pool, index, noise(index))
    statistics = store.statistics()
    assert statistics.puts_incompressible == 200
    assert 150 < statistics.puts_untried < 200, "all but the first eight and one of eight"
    assert all(store.get(pool, index) == noise(index) for index in range(200))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.7])
def test_a_run_of_noise_costs_text_nothing(make_store: Factory, share: float) -> None:
    store, fresh = make_store(64), make_store(64)
    pool, other = store.create_pool(pages=1000), fresh.create_pool(pages=1000)
    for index in range(100):
        store.put(pool, index, noise(index))
    for index in range(100, 200):
        store.put(pool, index, text(index, share))
        fresh.put(other, index, text(index, share))
    compressed = store.statistics().bytes_compressed - 100 * 4096
    assert compressed == fresh.statistics().bytes_compressed < 100 * 3584


def test_pages_that_look_random_and_repeat_are_found_out(make_store: Factory) -> None:
    """Every byte value is as frequent as in noise, but the second half is the first once more."""
    store = make_store(64)
    pool = store.create_pool(pages=1000)
    for index in range(100):
        store.put(pool, index, noise(index))
    for index in range(100, 200):
        store.put(pool, index, noise(index)[:2048] * 2)
    assert store.statistics().puts_incompressible <= 100 + 7
    for index in range(0, 100, 2):
        store.put(pool, index, noise(index))
        store.put(pool, index + 1, noise(index)[:2048] * 2)
    statistics = store.statistics()
    assert statistics.puts_incompressible <= 100 + 7 + 50, "half and half: every page is tried"
    assert all(store.get(pool, index) == noise(index)[:2048] * 2 for index in range(100, 200))


def test_same_filled_pages_do_not_count_as_tried(make_store: Factory) -> None:
    store = make_store(64)
    pool = store.create_pool(pages=100)
    for index in range(50):
        store.put(pool, index, noise(index))
        store.put(pool, index + 50, fill(index))
    assert store.statistics().puts_untried > 30
    assert store.statistics().puts_incompressible == 50


@pytest.mark.parametrize("pattern", [0, 1, 0xDEADBEEF, 2**32 - 1])
def test_a_same_filled_page_takes_no_segment(store: Store, pattern: int) -> None:
    pool = store.create_pool(pages=10)
    for index in range(10):
        store.put(pool, index, fill(pattern))
    statistics = store.statistics()
    assert (statistics.pages_filled, statistics.pages_stored, statistics.segments_local) == (10, 10, 0)
    assert all(store.get(pool, index) == fill(pattern) for index in range(10))
    store.destroy_pool(pool)
    assert store.statistics().pages_filled == 0


def test_almost_same_filled_is_not(store: Store) -> None:
    pool = store.create_pool(pages=3)
    for index, odd in enumerate([0, 2048, 4095]):
        page = bytearray(4096)
        page[odd] = 1
        store.put(pool, index, page)
        assert store.get(pool, index) == bytes(page)
    assert store.statistics().pages_filled == 0


# --- coherency ---


@pytest.mark.parametrize("pages_", [8, None])
@pytest.mark.parametrize("first", [noise(1), text(1), fill(1)])
@pytest.mark.parametrize("second", [noise(2), text(2), fill(2)])
def test_put_put_get_returns_the_second(store: Store, pages_: int | None, first: bytes, second: bytes) -> None:
    pool = store.create_pool(pages=pages_)
    store.put(pool, 3, first)
    store.put(pool, 3, second)
    assert store.get(pool, 3) == second
    assert store.statistics().pages_stored == 1


def test_a_miss_stays_a_miss(store: Store) -> None:
    pool = store.create_pool(pages=8)
    assert [store.get(pool, 3) for _ in range(3)] == [None] * 3
    store.put(pool, 3, text(1))
    assert store.flush_page(pool, 3)
    assert [store.get(pool, 3) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize(
    ("persistent", "mode", "stays"),
    [(True, -1, True), (True, 0, True), (True, 1, False), (False, -1, True), (False, 0, False), (False, 1, False)],
)
@pytest.mark.parametrize("page", [text(1), fill(1)])
def test_get_modes(store: Store, persistent: bool, mode: int, stays: bool, page: bytes) -> None:
    pool = store.create_pool(pages=8, persistent=persistent)
    store.put(pool, 0, page)
    assert store.get(pool, 0, mode=mode) == page
    assert store.get(pool, 0) == (page if stays else None)


def test_a_refused_put_changes_nothing(make_store: Factory) -> None:
    store = make_store(8)
    pool = store.create_pool(pages=1000)
    stored = _fill_up(store, pool)
    with pytest.raises(StoreFull, match="it was not stored"):
        store.put(pool, 0, noise(9999))
    assert all(store.get(pool, index) == noise(index) for index in range(stored))
    assert store.get(pool, stored) is None
    assert store.statistics().puts_refused == 2


def test_a_refused_put_to_an_ephemeral_pool_leaves_no_older_page(make_store: Factory) -> None:
    """Its user has moved on: a cache must not give out what was before.

    A page in a segment of that kind would have gone already, for room.
    """
    store = make_store(8)
    cache = store.create_pool(pages=8, persistent=False)
    store.put(cache, 0, fill(1))
    _fill_up(store, store.create_pool(pages=1000))
    with pytest.raises(StoreFull):
        store.put(cache, 0, noise(2))
    assert store.get(cache, 0) is None


def test_a_full_store_still_takes_same_filled_pages(make_store: Factory) -> None:
    store = make_store(8)
    pool = store.create_pool(pages=1000)
    _fill_up(store, pool)
    store.put(pool, 0, fill(7))
    assert store.get(pool, 0) == fill(7)


def _fill_up(store: Store, pool: int) -> int:
    for index in range(1000):
        try:
            store.put(pool, index, noise(index))
        except StoreFull:
            return index
    raise AssertionError("never full")


# --- refusal ---


def test_a_full_store_refuses_within_the_bounded_wait(make_store: Factory) -> None:
    store = make_store(8, cleaner=True, full_wait_ms=150)
    pool = store.create_pool(pages=1000)
    begin = time.monotonic()
    stored = _fill_up(store, pool)
    assert 0.1 < time.monotonic() - begin < 5
    assert stored == 6 * RAW_ENTRIES_PER_SEGMENT, "two segments are the cleaner's"


def test_room_comes_back(make_store: Factory) -> None:
    store = make_store(8, cleaner=True, full_wait_ms=2000)
    pool = store.create_pool(pages=1000)
    for index in range(80):
        store.put(pool, index, noise(index))
    for index in range(0, 80, 2):
        assert store.flush_page(pool, index)
    for index in range(80, 115):
        store.put(pool, index, noise(index))
    assert all(store.get(pool, index) == noise(index) for index in range(1, 80, 2))
    assert all(store.get(pool, index) == noise(index) for index in range(80, 115))
    statistics = store.statistics()
    assert statistics.puts_plugged > 0, "into the room of the flushed pages, without copying a byte"


def test_room_that_fits_no_page_comes_back_by_cleaning(make_store: Factory) -> None:
    store = make_store(8, cleaner=True, full_wait_ms=5000)
    pool = store.create_pool(pages=1000)
    small = 6 * (SEGMENT // 1304)  # two segments are the cleaner's
    for index in range(small):
        store.put(pool, index, text(index, 0.3))
    for index in range(0, small, 2):
        assert store.flush_page(pool, index)
    for index in range(small, small + 35):
        store.put(pool, index, noise(index))
    assert all(store.get(pool, index) == text(index, 0.3) for index in range(1, small, 2))
    assert all(store.get(pool, index) == noise(index) for index in range(small, small + 35))
    statistics = store.statistics()
    assert statistics.cleaned_segments > 0
    assert statistics.puts_refused == 0


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 8192])
def test_a_page_of_another_size_is_refused(store: Store, size: int) -> None:
    pool = store.create_pool(pages=1)
    store.put(pool, 0, text(1))
    with pytest.raises(UsageError, match="4096"):
        store.put(pool, 0, bytes(size))
    assert store.get(pool, 0) == text(1)


@pytest.mark.parametrize("pool", [0, 1, 4095, 2 * 4096, 2**32 - 1, 2**32 + 4096, 2**64 - 4096, 2**64 - 1])
def test_an_unknown_pool_is_refused(store: Store, pool: int) -> None:
    """Ids must not wrap round to somebody else's pool, which lies in place 0 here."""
    assert store.create_pool(pages=4) == 4096
    for call in (
        lambda: store.put(pool, 0, text(1)),
        lambda: store.put(pool, 0, fill(1)),
        lambda: store.get(pool, 0),
        lambda: store.flush_page(pool, 0),
        lambda: store.flush_object(pool, (0, 0, 0)),
        lambda: store.destroy_pool(pool),
    ):
        with pytest.raises(UsageError, match="no pool"):
            call()


@pytest.mark.parametrize("index", [-1, 4, 262144, 2**32 - 1, 2**32, 2**64])
def test_an_index_out_of_range_is_refused(store: Store, index: int) -> None:
    pool = store.create_pool(pages=4)
    for call in (
        lambda: store.put(pool, index, text(1)),
        lambda: store.get(pool, index),
        lambda: store.flush_page(pool, index),
    ):
        with pytest.raises(UsageError):
            call()


@pytest.mark.parametrize("oid", [(1, 2), (1, 2, 3, 4), (-1, 0, 0), (0, 0, 2**64), "abc", None, 7])
def test_a_malformed_object_id_is_refused(store: Store, oid: object) -> None:
    pool = store.create_pool()
    with pytest.raises(UsageError, match="object id"):
        store.put(pool, 0, text(1), oid)  # type: ignore[arg-type]


def test_a_dense_pool_is_one_object(store: Store) -> None:
    pool = store.create_pool(pages=4)
    store.put(pool, 0, text(1))
    for call in (
        lambda: store.put(pool, 0, text(2), (1, 0, 0)),
        lambda: store.get(pool, 0, (0, 1, 0)),
        lambda: store.flush_page(pool, 0, (0, 0, 1)),
        lambda: store.flush_object(pool, (0, 0, 0)),
    ):
        with pytest.raises(UsageError, match="dense"):
            call()
    assert store.get(pool, 0) == text(1)


@pytest.mark.parametrize("mode", [-2, 2, 100])
def test_an_unknown_get_mode_is_refused(store: Store, mode: int) -> None:
    pool = store.create_pool(pages=4)
    with pytest.raises(UsageError, match="mode"):
        store.get(pool, 0, mode=mode)


@pytest.mark.parametrize("size", [0, -1, 2**32 + 1])
def test_a_pool_of_an_impossible_size_is_refused(store: Store, size: int) -> None:
    with pytest.raises(UsageError):
        store.create_pool(pages=size)


def test_there_are_at_most_4096_pools(store: Store) -> None:
    pools = [store.create_pool() for _ in range(4096)]
    assert [pool % 4096 for pool in pools] == list(range(4096))
    with pytest.raises(StoreFull, match="4096"):
        store.create_pool()
    store.destroy_pool(pools[77])
    again = store.create_pool()
    assert (again % 4096, again in pools) == (77, False)


@pytest.mark.parametrize(
    ("arena", "segment"), [(16 * 65536, 4096), (16 * 65536, 65537), (16 * 2**20, 2**20), (4 * 65536, 65536)]
)
def test_an_impossible_shape_is_refused(arena: int, segment: int) -> None:
    with pytest.raises(UsageError, match="segment"):
        Store(arena, segment_bytes=segment)


@pytest.mark.parametrize("arena", [1 << 45, 1 << 62])
def test_an_arena_larger_than_memory_is_refused_before_anything_is_taken(arena: int) -> None:
    with pytest.raises(StoreFull, match="MiB of memory"):
        Store(arena, lock=False)


def test_a_closed_store_says_so(make_store: Factory) -> None:
    store = make_store(verify=False)
    store.close()
    store.close()
    with pytest.raises(UsageError, match="closed"):
        store.create_pool()


# --- flush and destroy ---


@pytest.mark.parametrize("page", [text(1), fill(1)])
@pytest.mark.parametrize("pages_", [8, None])
def test_flush_says_whether_there_was_a_page(store: Store, pages_: int | None, page: bytes) -> None:
    pool = store.create_pool(pages=pages_)
    assert not store.flush_page(pool, 0)
    store.put(pool, 0, page)
    assert store.flush_page(pool, 0)
    assert not store.flush_page(pool, 0)
    assert store.get(pool, 0) is None


def test_flush_object_drops_that_object_alone(store: Store) -> None:
    pool = store.create_pool()
    for index in range(0, 200, 3):
        store.put(pool, index, text(index) if index % 2 else fill(index), (1, 0, 0))
        store.put(pool, index, text(index), (0, 1, 0))
    assert store.flush_object(pool, (1, 0, 0)) == 67
    assert store.flush_object(pool, (1, 0, 0)) == 0
    assert all(store.get(pool, index, (1, 0, 0)) is None for index in range(200))
    assert all(store.get(pool, index, (0, 1, 0)) == text(index) for index in range(0, 200, 3))


@pytest.mark.parametrize("pages_", [300, None])
def test_destroy_pool_frees_everything_and_its_place(store: Store, pages_: int | None) -> None:
    other = store.create_pool(pages=300)
    pool = store.create_pool(pages=pages_)
    for index in range(100):
        store.put(other, index, text(index))
        store.put(pool, index, text(1000 + index))
    store.destroy_pool(pool)
    statistics = store.statistics()
    assert (statistics.pages_stored, statistics.pages_local) == (100, 100)
    with pytest.raises(PoolGone, match=f"pool {pool} was destroyed"):
        store.get(pool, 0)
    again = store.create_pool(pages=300)
    assert (again != pool, again % 4096) == (True, pool % 4096)
    assert all(store.get(again, index) is None for index in range(100))
    store.destroy_pool(again)
    store.destroy_pool(other)
    store.seal_open()
    statistics = store.statistics()
    assert (statistics.pages_stored, statistics.live_bytes, statistics.segments_local) == (0, 0, 0)
    assert statistics.frames_free == statistics.frames_total


def test_a_segment_without_live_pages_is_free_at_once(store: Store) -> None:
    pool = store.create_pool(pages=100)
    for index in range(3 * RAW_ENTRIES_PER_SEGMENT):
        store.put(pool, index, noise(index))
    store.seal_open()
    assert store.statistics().segments_local == 3
    for index in range(RAW_ENTRIES_PER_SEGMENT):
        store.flush_page(pool, index)
    statistics = store.statistics()
    assert (statistics.segments_local, statistics.frames_free) == (2, 14)


def test_stored_is_live_plus_dead(store: Store) -> None:
    pool = store.create_pool(pages=10)
    for index in range(10):
        store.put(pool, index, noise(index))
    for index in range(4):
        store.flush_page(pool, index)
    statistics = store.statistics()
    assert (statistics.live_bytes, statistics.dead_bytes) == (6 * 4136, 4 * 4136)
    assert (statistics.puts, statistics.flushes, statistics.flushes_found) == (10, 4, 4)


# --- ephemeral pages ---


@pytest.mark.parametrize("pages_", [1000, None])
def test_under_pressure_ephemeral_pages_go_and_persistent_ones_stay(make_store: Factory, pages_: int | None) -> None:
    store = make_store(12)
    keep = store.create_pool(pages=pages_)
    drop = store.create_pool(pages=pages_, persistent=False)
    for index in range(60):
        store.put(drop, index, noise(index))
        store.put(keep, index, noise(1000 + index))
    for index in range(60, 120):
        store.put(keep, index, noise(1000 + index))
    assert all(store.get(keep, index) == noise(1000 + index) for index in range(120))
    left = [index for index in range(60) if (got := store.get(drop, index)) is not None and got == noise(index)]
    statistics = store.statistics()
    assert 0 < statistics.ephemeral_dropped == 60 - len(left)
    assert [store.get(drop, index) for index in range(60) if index not in left] == [None] * (60 - len(left))


def test_the_ephemeral_segment_used_least_recently_goes_first(make_store: Factory) -> None:
    store = make_store(12)
    drop = store.create_pool(pages=1000, persistent=False)
    for index in range(3 * RAW_ENTRIES_PER_SEGMENT):
        store.put(drop, index, noise(index))
    store.seal_open()
    # ages are as fine as the timer tick: touch the first segment until it is younger than the others
    deadline = time.monotonic() + 5
    first = segment_of(store, drop, 0)
    while min(c[4] for c in store.coldest(3) if c[0] != first) <= max(c[4] for c in store.coldest(3) if c[0] == first):
        store.get(drop, 0)
        assert time.monotonic() < deadline
    keep = store.create_pool(pages=1000)
    index = 0
    while not store.statistics().ephemeral_dropped:
        store.put(keep, index, noise(index))
        index += 1
    assert store.get(drop, 0) == noise(0)


# --- cleaning ---


@pytest.mark.parametrize("pages_", [2000, None])
def test_cleaning_keeps_every_byte_and_frees_segments(store: Store, pages_: int | None) -> None:
    pool = store.create_pool(pages=pages_)
    for index in range(400):
        store.put(pool, index, text(index, 0.4))
    for index in range(400):
        if index % 4:
            store.flush_page(pool, index)
    store.seal_open()
    before = store.statistics()
    assert store.clean(100) > 0
    after = store.statistics()
    assert after.segments_local < before.segments_local
    assert (after.pages_stored, after.live_bytes) == (before.pages_stored, before.live_bytes)
    assert all(store.get(pool, index) == text(index, 0.4) for index in range(0, 400, 4))
    assert all(store.get(pool, index) is None for index in range(400) if index % 4)


def test_full_segments_are_not_cleaned_for_nothing(store: Store) -> None:
    pool = store.create_pool(pages=100)
    for index in range(3 * RAW_ENTRIES_PER_SEGMENT):
        store.put(pool, index, noise(index))
    store.seal_open()
    assert store.clean(10) == 0


# --- damage ---


def _damaged(store: Store, pool: int, index: int, page: bytes) -> bool:
    """True when the get says that the page is lost; equal bytes are as good; anything else is a broken promise."""
    try:
        assert store.get(pool, index) == page
    except PageLost:
        return True
    return False


@given(bit=st.integers(0, 40000), page=st.sampled_from([noise(5), text(5, 0.02), text(5), fill(5)]))
@settings(max_examples=150, deadline=None)
def test_any_flipped_bit_is_a_lost_page_and_never_wrong_bytes(bit: int, page: bytes) -> None:
    store = _shared_store()
    pool = store.create_pool(pages=3)
    try:
        for index in range(3):
            store.put(pool, index, page)
        store.corrupt(pool, 1, bit)
        for _ in range(2):
            with pytest.raises(PageLost):
                store.get(pool, 1)
        assert store.get(pool, 0) == store.get(pool, 2) == page
        store.put(pool, 1, page)
        assert store.get(pool, 1) == page
    finally:
        store.destroy_pool(pool)
    store.verify()


@pytest.mark.parametrize("page", [text(3, 0.01), fill(3)])
def test_every_single_bit_counts(store: Store, page: bytes) -> None:
    pool = store.create_pool(pages=1)
    store.put(pool, 0, page)
    for bit in range(8 * (24 + store.statistics().bytes_compressed) if page != fill(3) else 62):
        store.corrupt(pool, 0, bit)
        assert _damaged(store, pool, 0, page), f"bit {bit}"
        store.corrupt(pool, 0, bit)
    assert store.get(pool, 0) == page


@pytest.mark.parametrize("bit", [0, 3, 12, 15, 16, 24, 32, 50, 63, 64, 130, 159, 160, 191, 192, 1000])
@pytest.mark.parametrize("persistent", [True, False])
def test_a_damaged_entry_harms_nobody_else(make_store: Factory, bit: int, persistent: bool) -> None:
    """Length, codec, flags, index, version, pool, checksum, payload: accounting, cleaner and drop all meet it."""
    store = make_store(8)
    pool = store.create_pool(pages=100, persistent=persistent)
    for index in range(30):
        store.put(pool, index, text(index, 0.3))
    store.corrupt(pool, 7, bit)
    for index in range(0, 30, 2):
        store.flush_page(pool, index)
    store.seal_open()
    store.clean(100)
    store.verify()
    if persistent:
        assert _damaged(store, pool, 7, text(7, 0.3))
    else:
        assert store.get(pool, 7) is None  # an ephemeral page may vanish, and this one did
    assert all(store.get(pool, index) == text(index, 0.3) for index in range(1, 30, 2) if index != 7)
    other = store.create_pool(pages=1000)
    stored = _fill_up(store, other)
    assert all(store.get(other, index) == noise(index) for index in range(stored))
    store.flush_page(pool, 7)
    assert store.get(pool, 7) is None
    store.verify()


def test_verify_can_fail(store: Store) -> None:
    pool = store.create_pool(pages=4)
    store.put(pool, 0, text(1))
    store.verify()
    slot = _slot(store, pool, 0)
    _stress.overwrite_slot(store, pool, 0, 0)
    with pytest.raises(AssertionError, match="stored != live"):
        store.verify()
    _stress.overwrite_slot(store, pool, 0, slot)
    _stress.overwrite_slot(store, pool, 1, slot)
    with pytest.raises(AssertionError, match="stored != live"):
        store.verify()
    _stress.overwrite_slot(store, pool, 1, 2 << 62 | 99 << 16)
    with pytest.raises(AssertionError, match="names a dead or missing entry"):
        store.verify()
    _stress.overwrite_slot(store, pool, 1, 1 << 62)
    with pytest.raises(AssertionError, match="same-filled"):
        store.verify()
    _stress.overwrite_slot(store, pool, 1, 0)
    store.verify()


def test_a_slot_that_names_nothing_is_a_lost_page(store: Store) -> None:
    pool = store.create_pool(pages=4)
    store.put(pool, 0, text(1))
    slot = _slot(store, pool, 0)
    for wrong in (3 << 62, 2 << 62 | 99 << 16, 2 << 62 | 1 << 48, 2 << 62 | 5, slot):
        _stress.overwrite_slot(store, pool, 1, wrong)
        with pytest.raises(PageLost):
            store.get(pool, 1)
    _stress.overwrite_slot(store, pool, 1, 0)


@pytest.mark.parametrize("bit", [0, 1, 5, 15, 16, 17, 24, 47, 48, 49, 61, 62, 63])
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("act", ["put", "flush", "get", "destroy"])
def test_a_flipped_bit_in_a_page_table_is_a_reported_loss(
    make_store: Factory, bit: int, sealed: bool, act: str
) -> None:
    """Whatever the word names afterwards: nothing, a dead entry or another page's. Nobody reads wrong bytes, and the
    process goes on."""
    store = make_store(16, verify=False)
    pool = store.create_pool(pages=100)
    for index in range(40):
        store.put(pool, index, text(index))
    store.flush_page(pool, 39)
    if sealed:
        store.seal_open()
    _stress.overwrite_slot(store, pool, 7, _slot(store, pool, 7) ^ 1 << bit)
    if act == "get":
        with pytest.raises(PageLost):
            store.get(pool, 7)
        assert store.statistics().corrupt_pages == 1
    elif act == "put":
        store.put(pool, 7, text(99))
        assert store.get(pool, 7) == text(99)
    elif act == "flush":
        assert store.flush_page(pool, 7)
        assert store.get(pool, 7) is None
    others = [_damaged(store, pool, index, text(index)) for index in range(39) if index != 7]
    assert sum(others) <= 1, "a slot that came to name another page may take that one along"
    store.clean(100)
    store.destroy_pool(pool)
    assert store.statistics().corrupt_pages > 0
    again = store.create_pool(pages=100)
    for index in range(40):
        store.put(again, index, noise(index))
    assert all(store.get(again, index) == noise(index) for index in range(40))
    store.close()


def test_a_flipped_bit_in_the_slot_of_a_page_that_is_away(make_store: Factory) -> None:
    for bit in (0, 4, 15, 16, 48, 63):
        store = make_store(16, verify=False)
        pool = store.create_pool(pages=100)
        for index in range(20):
            store.put(pool, index, text(index))
        store.seal_open()
        segment, generation, *_ = store.coldest(1)[0]
        assert _stress.ship(store, segment, generation, peer=1) is not None
        _stress.overwrite_slot(store, pool, 7, _slot(store, pool, 7) ^ 1 << bit)
        store.put(pool, 7, text(99))
        assert store.get(pool, 7) == text(99)
        store.destroy_pool(pool)
        assert store.statistics().corrupt_pages > 0
        store.close()


def _slot(store: Store, pool: int, index: int) -> int:
    return int(_stress.reference(store, pool, index)["slot"])


# --- errors are ours ---


def test_every_refusal_is_a_ramster_error(store: Store) -> None:
    pool = store.create_pool(pages=1)
    with pytest.raises(RamsterError):
        store.get(pool, 9)
    with pytest.raises(RamsterError):
        store.get(9, 0)
    with pytest.raises(RamsterError):
        store.put(pool, 0, b"")
