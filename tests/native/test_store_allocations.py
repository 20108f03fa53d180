"""A put to a populated pool asks the kernel for no memory: what stands in the way of reclaim must not need it."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Callable

import pytest

from ramster.constants import MIB
from ramster.engine.store import Store
from ramster.errors import StoreFull, UsageError
from ramster.testing.allocations import MemoryCalls

PAGES = 1 << 20  # 8 MiB of slots: four times what is populated at once otherwise
STRIDE = 512  # slots in a page of the table
CONTENTS = [os.urandom(1024) * 2 + os.urandom(1024) + bytes(1024) for _ in range(64)]

pytestmark = pytest.mark.skipif("san" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer allocates by itself")


def in_thread(work: Callable[[], None]) -> int:
    """Page faults of the work, done for the second time by the same thread: the first brings in its stack and code."""
    counted = 0

    def run() -> None:
        nonlocal counted
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
            work()
            counted = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return counted


def always(attempt: Callable[[], int]) -> int:
    """The fewest page faults of some attempts, each with a store of its own.

    The interpreter has some of its own now and then, when much was allocated before; what the store does, it does each
    time.
    """
    return min(attempt() for _ in range(3))


def populated(store: Store, pages: int = PAGES) -> int:
    pool = store.create_pool(pages=pages)
    store.populate(pool, pages)
    return pool


class Strides:
    """Puts, each in a page of the page table where none was before."""

    def __init__(self, store: Store, pool: int) -> None:
        self.store, self.pool, self.first = store, pool, 0

    def __call__(self) -> None:
        for turn in range(1000):
            self.store.put(self.pool, self.first + turn * STRIDE, CONTENTS[turn % 64])
        self.first += 1000 * STRIDE


@pytest.mark.parametrize("lock", [True, False])
def test_a_put_to_a_populated_pool_faults_no_page_in(lock: bool) -> None:
    def attempt() -> int:
        store = Store(32 * MIB, lock=lock)
        faults = in_thread(Strides(store, populated(store)))
        store.close()
        return faults

    assert always(attempt) == 0


def test_a_put_to_another_pool_does() -> None:
    """The same measurement, so that it is known to see what it looks for."""
    store = Store(32 * MIB, lock=False)
    assert in_thread(Strides(store, store.create_pool(pages=PAGES))) > 0
    store.close()


def test_segments_are_opened_without_a_page_fault() -> None:
    """Rows of segments are there before they are needed: here more than twice as many as are had at a time."""
    noise = [os.urandom(4096) for _ in range(16)]

    def attempt() -> int:
        store = Store(64 * MIB, segment_bytes=65536, lock=False)
        pool = populated(store)

        def fill() -> None:
            for index in range(5000):  # 330 segments
                store.put(pool, index, noise[index % 16])

        faults = in_thread(fill)
        store.close()
        return faults

    assert always(attempt) == 0


def test_a_put_to_a_populated_pool_makes_no_memory_call() -> None:
    store = Store(32 * MIB, lock=False)
    puts = Strides(store, populated(store))
    warm, go, done, leave = (threading.Event() for _ in range(4))

    def run() -> None:  # its end gives memory back, and is not looked at
        puts()
        warm.set()
        go.wait()
        puts()
        done.set()
        leave.wait()

    thread = threading.Thread(target=run)
    thread.start()
    calls = MemoryCalls(os.getpid())
    try:
        assert warm.wait(30)
        with calls:
            go.set()
            assert done.wait(30)
    except (FileNotFoundError, PermissionError) as error:
        pytest.skip(str(error))
    finally:
        go.set()
        leave.set()
        thread.join()
    assert calls.of(thread.native_id or 0) == []
    store.close()


def test_what_is_populated_is_counted() -> None:
    store = Store(4 * MIB, segment_bytes=65536, lock=False)
    before = store.statistics()
    pool = populated(store)
    after = store.statistics()
    assert after.table_bytes - before.table_bytes == PAGES * 8
    assert after.metadata_bytes - before.metadata_bytes >= PAGES * 8
    store.destroy_pool(pool)
    assert store.statistics().table_bytes == before.table_bytes
    store.close()


def test_what_grows_is_populated_as_it_grows() -> None:
    store = Store(4 * MIB, segment_bytes=65536, lock=False)
    pool = store.create_pool(pages=PAGES)
    for pages, table in ((1000, 1 << 18), (1 << 18, 1 << 18), ((1 << 18) + 1, 2 << 18), (PAGES, PAGES)):
        store.populate(pool, pages)
        assert store.statistics().table_bytes == table * 8
    store.close()


def test_what_cannot_be_populated() -> None:
    store = Store(4 * MIB, segment_bytes=65536, lock=False)
    with pytest.raises(UsageError, match="no pool 7"):
        store.populate(7, 1)
    with pytest.raises(UsageError, match="beyond the end"):
        store.populate(store.create_pool(), 1)
    pool = store.create_pool(pages=10)
    with pytest.raises(UsageError, match="beyond the end"):
        store.populate(pool, 1 << 19)
    with pytest.raises(StoreFull, match="the page table of"):
        store.populate(pool, 1 << 50)
    store.close()


def test_an_arena_that_is_handed_in_is_neither_cleared_nor_of_another_size() -> None:
    arena = os.memfd_create("test-arena")
    os.posix_fallocate(arena, 0, 4 * MIB)
    os.pwrite(arena, b"left over", 3 * MIB)
    store = Store(4 * MIB, segment_bytes=65536, lock=False, arena_fd=arena)
    assert os.pread(arena, 9, 3 * MIB) == b"left over"
    pool = store.create_pool(pages=2000)
    for index in range(500):
        store.put(pool, index, CONTENTS[index % 64])
    assert all(store.get(pool, index) == CONTENTS[index % 64] for index in range(500))
    assert store.get(pool, 500) is None
    store.verify()
    store.close()
    with pytest.raises(UsageError, match="4194304 bytes, not of 8388608"):
        Store(8 * MIB, segment_bytes=65536, lock=False, arena_fd=arena)
    os.close(arena)
