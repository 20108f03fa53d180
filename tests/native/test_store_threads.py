"""Many native threads and one store, cleaner at work: no torn, foreign, stale or vanished page, and stored = live."""

from __future__ import annotations

import contextlib
import itertools
import select
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.native.conftest import SEGMENT, Factory, noise, text

from ramster.engine.store import Store
from ramster.errors import PoolGone, StoreFull, UsageError
from ramster.testing import _stress

WRONG = ("corrupt", "garbage", "foreign", "stale", "vanished", "failed")


def wrong(totals: _stress.Totals) -> dict[str, int]:
    return {name: count for name, count in totals.items() if name in WRONG and count}  # type: ignore[misc]


@pytest.mark.parametrize("segments", [40, 12], ids=["roomy", "full"])
@pytest.mark.parametrize("shared", [False, True], ids=["one-writer", "all-write"])
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("ephemeral", [False, True], ids=["persistent", "ephemeral"])
def test_hammer(make_store: Factory, segments: int, shared: bool, sparse: bool, ephemeral: bool) -> None:
    store = make_store(segments, cleaner=True)
    pool = store.create_pool(pages=None if sparse else 700, persistent=not ephemeral)
    totals = _stress.hammer(
        store,
        pool,
        threads=8,
        keys=700,
        operations=6000 if segments == 40 or ephemeral else 1500,
        seed=segments + shared + 2 * sparse,
        shared=shared,
        sparse=sparse,
        ephemeral=ephemeral,
        wait_ms=5,
    )
    assert not wrong(totals)
    assert totals["hits"] > 500
    statistics = store.statistics()
    assert statistics.cleaned_segments + statistics.puts_plugged > 0
    assert statistics.puts == totals["puts"]
    assert statistics.flushes_found == totals["flushed"]
    if segments == 12:
        assert totals["refused"] > 0 or statistics.ephemeral_dropped > 0
        assert statistics.puts_plugged > 0
    store.destroy_pool(pool)
    store.seal_open()
    assert store.statistics().segments_local == 0


def test_two_cleaners_and_a_sealer_beside_the_writers(make_store: Factory) -> None:
    store = make_store(24, cleaner=True)
    pool = store.create_pool(pages=500)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            store.seal_open()
            store.clean(4)
            store.statistics()

    with ThreadPoolExecutor(2) as executor:
        tasks = [executor.submit(disturb) for _ in range(2)]
        try:
            totals = _stress.hammer(store, pool, threads=6, keys=500, operations=20000, wait_ms=20, mix=(45, 30, 15))
        finally:
            stop.set()
        for task in tasks:
            task.result()
    assert not wrong(totals)


def test_everything_at_once_in_a_full_arena(make_store: Factory) -> None:
    """Puts into the room of dead entries beside gets, flushes, cleaner, sealer, shipper, drops and dying pools."""
    store = make_store(40, cleaner=True)
    kinds = [(400, True, False), (400, False, False), (None, True, True), (None, False, True)]
    pools = [store.create_pool(pages=pages, persistent=persistent) for pages, persistent, _ in kinds]
    stop = threading.Event()

    def clean_and_ship() -> None:
        for n in itertools.count():
            if stop.is_set():
                return
            store.seal_open()
            store.clean(2)
            for segment, generation, *_ in store.coldest(1):
                _stress.ship(store, segment, generation, peer=1, commit=n % 4 == 0)

    def pools_come_and_go() -> None:
        while not stop.is_set():
            pool = store.create_pool(pages=200)
            for index in range(100):
                with contextlib.suppress(StoreFull):
                    store.put(pool, index, text(index, index % 10 / 10))
            for index in range(100):
                assert store.get(pool, index) in (None, text(index, index % 10 / 10))
            store.destroy_pool(pool)

    with ThreadPoolExecutor(6) as executor:
        disturbers = [executor.submit(clean_and_ship), executor.submit(pools_come_and_go)]
        hammers = [
            executor.submit(
                _stress.hammer,
                store,
                pool,
                threads=2,
                keys=400,
                operations=8000,
                seed=n,
                mix=(55, 30, 0),  # an exclusive get leaves a page that is away where it is
                sparse=sparse,
                ephemeral=not persistent,
                wait_ms=5,
            )
            for n, (pool, (_, persistent, sparse)) in enumerate(zip(pools, kinds, strict=True))
        ]
        try:
            totals = [hammer.result() for hammer in hammers]
        finally:
            stop.set()
        for task in disturbers:
            with contextlib.suppress(UsageError):  # its page was shipped
                task.result()
    assert [wrong(total) for total in totals] == [{}] * 4
    statistics = store.statistics()
    assert statistics.puts_plugged > 0
    assert statistics.cleaned_segments > 0
    assert statistics.shipped_segments > 0
    for pool in pools:
        store.destroy_pool(pool)


def test_an_exclusive_get_removes_what_the_cleaner_moves(make_store: Factory) -> None:
    """The cleaner changes the slot between a get's look and its removal; the page must be gone all the same."""
    store = make_store(24)
    pool = store.create_pool(pages=400)
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            store.seal_open()
            store.clean(8)

    with ThreadPoolExecutor(2) as executor:
        tasks = [executor.submit(disturb) for _ in range(2)]
        try:
            totals = _stress.hammer(store, pool, threads=2, keys=400, operations=40000, mix=(50, 0, 40))
        finally:
            stop.set()
        for task in tasks:
            task.result()
    assert not wrong(totals)
    assert totals["removes"] > 10000


def test_shipping_beside_the_writers(make_store: Factory) -> None:
    """Pages whose segment left are answered as remote, and what is overwritten or flushed there is accounted for."""
    store = make_store(24, cleaner=True)
    pool = store.create_pool(pages=500)
    stop = threading.Event()
    shipped: list[int] = []

    def shipper() -> None:
        while not stop.is_set():
            for segment, generation, *_ in store.coldest(2):
                if _stress.ship(store, segment, generation, peer=1, commit=len(shipped) % 3 != 0) is not None:
                    shipped.append(segment)

    with ThreadPoolExecutor(1) as executor:
        task = executor.submit(shipper)
        try:
            totals = _stress.hammer(store, pool, threads=6, keys=500, operations=10000, wait_ms=20, mix=(50, 35, 0))
        finally:
            stop.set()
        task.result()
    assert not wrong(totals)
    assert shipped
    assert totals["remote"] > 0


@pytest.mark.parametrize("pages", [300, None])
def test_pools_die_under_their_users(make_store: Factory, pages: int | None) -> None:
    """Puts and gets that race a destroy end as done or as 'destroyed', never in the pool that has the place next."""
    store = make_store(24, cleaner=True, full_wait_ms=100)
    quiet = store.create_pool(pages=50)
    for index in range(50):
        store.put(quiet, index, noise(index))
    current = [store.create_pool(pages=pages)]
    stop = threading.Event()

    def use(seed: int) -> None:
        index = seed
        while not stop.is_set():
            index = (index * 5 + 1) % 256
            with contextlib.suppress(PoolGone, StoreFull):
                store.put(current[0], index, text(index, 0.2))
            with contextlib.suppress(PoolGone):
                store.get(current[0], index)
                store.flush_page(current[0], 255 - index)

    with ThreadPoolExecutor(4) as executor:
        tasks = [executor.submit(use, seed) for seed in range(3)]
        try:
            for n in range(150):
                old = current[0]
                current[0] = store.create_pool(pages=[pages, 256, None][n % 3])
                racer = executor.submit(store.destroy_pool, old)
                mine = False
                with contextlib.suppress(PoolGone):
                    store.destroy_pool(old)
                    mine = True
                assert mine != (racer.exception() is None), "exactly one destroy finds the pool"
        finally:
            stop.set()
        for task in tasks:
            task.result()
    assert all(store.get(quiet, index) == noise(index) for index in range(50))


def test_a_put_that_waits_does_not_land_in_the_next_pool_of_that_place(make_store: Factory) -> None:
    store = make_store(8, full_wait_ms=10000)
    filler = store.create_pool(pages=1000)
    for index in range(90):
        store.put(filler, index, noise(index))
    victim = store.create_pool(pages=1000)
    assert not select.select([store.pressure_fd], [], [], 0)[0]
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(store.put, victim, 999, noise(1))
        assert select.select([store.pressure_fd], [], [], 20)[0], "the put found no room and waits"
        store.destroy_pool(victim)
        heir = store.create_pool(pages=4)
        assert heir % 4096 == victim % 4096
        store.destroy_pool(filler)
        store.seal_open()
        assert isinstance(waiting.exception(20), PoolGone)
    assert [store.get(heir, index) for index in range(4)] == [None] * 4


def test_a_full_store_wakes_a_waiting_put(make_store: Factory) -> None:
    store = make_store(8, full_wait_ms=20000)
    pool = store.create_pool(pages=1000)
    for index in range(90):
        store.put(pool, index, noise(index))
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(store.put, pool, 500, noise(500))
        for index in range(90):
            store.flush_page(pool, index)
        waiting.result(20)
    assert store.get(pool, 500) == noise(500)


def test_stores_come_and_go(make_store: Factory) -> None:
    for n in range(20):
        store = Store(8 * SEGMENT, segment_bytes=SEGMENT, lock=False)
        pool = store.create_pool(pages=64)
        assert not wrong(_stress.hammer(store, pool, threads=4, keys=64, operations=200, seed=n))
        store.close()
