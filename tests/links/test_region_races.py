"""Two things at once to one page of a region, each order forced; faults are taken without the GIL.

==============================================  =======================================================================
race                                            forced by
==============================================  =======================================================================
write while the page is being evicted           test_a_write_while_its_page_is_being_evicted
pin while the page is being evicted             test_a_pin_while_its_page_is_being_evicted
put refused while the page is being evicted     test_a_write_while_the_eviction_of_its_page_finds_no_room
evict while the page is being fetched           test_an_eviction_leaves_a_page_alone_that_is_being_fetched
two faults on one page, one of them a write     test_two_faults_on_one_page_are_one_get
fault while the page is being prefetched        test_a_fault_on_a_page_that_is_being_prefetched_is_one_get
put while the former copy is being pushed       test_a_new_put_while_the_former_copy_is_being_pushed
clean eviction while the copy is being pushed   test_a_clean_page_is_dropped_while_its_copy_is_being_pushed
fetch while the link is cut                     test_a_fetch_goes_on_with_the_next_connection
close while the copy is being pushed            test_a_region_ends_while_its_pages_are_being_pushed
==============================================  =======================================================================
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.links.conftest import LENDER, MakePair, Pair

from ramster.errors import KernelUnsupported, PermissionMissing, RegionFull, StoreFull
from ramster.testing._walk import Walk
from ramster.testing.engines import MappedRegion
from ramster.testing.proxy import wait_until

PAGES, RESIDENT = 64, 32
PAGE = 5
FULL_WAIT_MS = 20_000


class Scene:
    """A pair whose borrower has a region, and one page of it that everything happens to."""

    def __init__(self, pair: Pair, full_wait_ms: int) -> None:
        self.pair = pair
        self.store = pair.a.store
        self.mapped = MappedRegion(pair.a, PAGES, RESIDENT, full_wait_ms=full_wait_ms)
        self.walk = Walk(self.mapped.page(PAGE), 1)
        self._tasks = ThreadPoolExecutor(4)

    def touch(self, *, write: bool = False, threads: int = 1) -> None:
        """Compare the page with what was written last, then write its next version; of several threads one writes."""
        totals = self.walk.run(visits=1, threads=threads, dirty=int(write), shared=threads > 1)
        assert not any((totals["empty"], totals["stale"], totals["foreign"], totals["altered"])), totals

    def evict(self) -> int:
        """Pages that went: none while somebody has it in hand."""
        return self.mapped.engine.evict(PAGE, 1)

    def out(self) -> None:
        """Evict it; a fault that has just been answered may still have it in hand."""
        wait_until(lambda: self.evict() == 1, "the page goes")

    def away(self) -> None:
        """Written, evicted, and its segment with the lender."""
        self.touch(write=True)
        self.out()
        self.pair.ship()
        assert self.mapped.where(PAGE) == LENDER

    def later(self, work: Callable[[], object]) -> Future[object]:
        return self._tasks.submit(work)

    def counter(self, name: str) -> int:
        return self.mapped.engine.statistics()[name]

    def remote_gets(self) -> int:
        return int(self.pair.a.links.counters()["remote_gets"])

    def fill(self) -> int:
        """A pool that takes all the room there is."""
        pool = self.store.create_pool(pages=4096)
        with pytest.raises(StoreFull):
            for index in range(4096):
                self.store.put(pool, index, (index + 1).to_bytes(4, "little") + bytes(range(1, 157)) * 26 + bytes(36))
        self.store.pressure_handled()
        os.eventfd_read(self.store.pressure_fd)
        return pool

    def make_room(self, pool: int) -> None:
        self.store.destroy_pool(pool)
        self.store.seal_open()

    def waits_for_room(self) -> None:
        assert select.select([self.store.pressure_fd], [], [], 20)[0], "a put found no room and waits"

    def close(self) -> None:
        self._tasks.shutdown()
        del self.walk
        self.mapped.close()


MakeScene = Callable[..., Scene]


@pytest.fixture
def make_scene(make_pair: MakePair) -> Iterator[MakeScene]:
    scenes: list[Scene] = []

    def make(*, full_wait_ms: int = FULL_WAIT_MS, **options: int) -> Scene:
        try:
            scenes.append(Scene(make_pair(**options), full_wait_ms))
        except (KernelUnsupported, PermissionMissing) as error:
            pytest.skip(str(error))
        return scenes[-1]

    yield make
    for scene in scenes:
        scene.close()


@pytest.fixture
def scene(make_scene: MakeScene) -> Scene:
    return make_scene()


def test_a_write_while_its_page_is_being_evicted(make_scene: MakeScene) -> None:
    """Between the evictor's read and its punch: the writer waits, and its write is in the page that comes back."""
    scene = make_scene(segments=8)
    scene.touch(write=True)
    filler = scene.fill()
    evicted = scene.later(scene.out)
    scene.waits_for_room()
    before = scene.counter("faults_wp")
    written = scene.later(lambda: scene.touch(write=True))
    wait_until(lambda: scene.counter("faults_wp") > before, "the write is a fault")
    assert not evicted.done() and not written.done()
    scene.make_room(filler)
    evicted.result(20)
    written.result(20)
    scene.touch()
    scene.out()
    scene.touch()


def test_a_write_while_the_eviction_of_its_page_finds_no_room(make_scene: MakeScene) -> None:
    """The page stays, and with it the write that waited for the eviction's end."""
    scene = make_scene(segments=8, full_wait_ms=300)
    scene.touch(write=True)
    filler = scene.fill()
    evicted = scene.later(scene.out)
    scene.waits_for_room()
    written = scene.later(lambda: scene.touch(write=True))
    with pytest.raises(RegionFull):
        evicted.result(20)
    written.result(20)
    scene.touch(write=True)
    scene.make_room(filler)
    scene.out()
    scene.touch()


def test_a_pin_while_its_page_is_being_evicted(make_scene: MakeScene) -> None:
    scene = make_scene(segments=8)
    scene.touch(write=True)
    filler = scene.fill()
    evicted = scene.later(scene.out)
    scene.waits_for_room()
    pinned = scene.later(lambda: scene.mapped.engine.pin(0, PAGE, 1))
    wait_until(lambda: scene.counter("pinned_pages") == 1, "the pin waits")
    scene.make_room(filler)
    evicted.result(20)
    pinned.result(20)
    assert scene.evict() == 0, "it is pinned"
    scene.touch(write=True)
    scene.mapped.engine.unpin(0, PAGE, 1)
    scene.out()
    scene.touch()


def test_an_eviction_leaves_a_page_alone_that_is_being_fetched(scene: Scene) -> None:
    scene.away()
    with scene.pair.get.down.held():
        fetched = scene.later(lambda: scene.touch(write=True))
        wait_until(lambda: scene.pair.pending() > 0, "the get is under way")
        assert scene.evict() == 0
        assert not fetched.done()
    fetched.result(20)
    scene.touch()
    scene.out()
    scene.touch()


def test_two_faults_on_one_page_are_one_get(scene: Scene) -> None:
    scene.away()
    gets, faults = scene.remote_gets(), scene.counter("faults")
    with scene.pair.get.down.held():
        touched = scene.later(lambda: scene.touch(write=True, threads=2))
        wait_until(lambda: scene.pair.pending() > 0, "the get is under way")
        wait_until(lambda: scene.counter("faults") == faults + 2, "both have faulted")
    touched.result(20)
    assert scene.remote_gets() == gets + 1
    scene.touch()
    scene.pair.wait_for_frees(0)  # it was written: the copy is of no use


def test_a_fault_on_a_page_that_is_being_prefetched_is_one_get(scene: Scene) -> None:
    scene.away()
    gets, faults = scene.remote_gets(), scene.counter("faults")
    with scene.pair.get.down.held():
        prefetched = scene.later(lambda: scene.mapped.engine.prefetch(0, PAGE, 1))
        wait_until(lambda: scene.pair.pending() > 0, "the get is under way")
        touched = scene.later(lambda: scene.touch(write=True))
        wait_until(lambda: scene.counter("faults") == faults + 1, "the fault waits for it")
        assert not touched.done()
    assert prefetched.result(20) == 1
    touched.result(20)
    assert scene.remote_gets() == gets + 1
    scene.touch()


def test_a_new_put_while_the_former_copy_is_being_pushed(scene: Scene) -> None:
    scene.touch(write=True)
    scene.out()
    with scene.pair.bulk.down.held():
        assert scene.pair.order() == 1
        wait_until(lambda: scene.pair.b.lent_used() == 1, "the lender has it")
        scene.touch(write=True)
        scene.out()
    scene.pair.wait_for_frees(0)
    assert scene.mapped.where(PAGE) == "here"
    scene.touch()


def test_a_clean_page_is_dropped_while_its_copy_is_being_pushed(scene: Scene) -> None:
    scene.touch(write=True)
    scene.out()
    puts, clean = scene.store.statistics().puts, scene.counter("evictions_clean")
    with scene.pair.bulk.down.held():
        assert scene.pair.order() == 1
        wait_until(lambda: scene.pair.b.lent_used() == 1, "the lender has it")
        scene.touch()
        scene.out()
    scene.pair.settle()
    assert (scene.store.statistics().puts, scene.counter("evictions_clean")) == (puts, clean + 1)
    assert scene.mapped.where(PAGE) == LENDER
    scene.touch(write=True)
    scene.touch()


def test_a_fetch_goes_on_with_the_next_connection(scene: Scene) -> None:
    scene.away()
    with scene.pair.get.down.held():
        fetched = scene.later(lambda: scene.touch(write=True))
        wait_until(lambda: scene.pair.pending() > 0, "the get is under way")
        scene.pair.cut()
    assert not fetched.done()
    scene.pair.connect()
    fetched.result(20)
    scene.touch()


def test_a_region_ends_while_its_pages_are_being_pushed(make_pair: MakePair) -> None:
    pair = make_pair()
    try:
        scene = Scene(pair, FULL_WAIT_MS)
    except (KernelUnsupported, PermissionMissing) as error:
        pytest.skip(str(error))
    scene.touch(write=True)
    scene.out()
    with pair.bulk.down.held():
        assert pair.order() == 1
        wait_until(lambda: pair.b.lent_used() == 1, "the lender has it")
        scene.close()
        assert pair.a.store.statistics().pages_stored == 0
    pair.wait_for_frees(0)


def test_faults_are_served_on_the_processors_that_the_application_may_use(pair: Pair) -> None:
    everywhere = os.sched_getaffinity(0)
    if len(everywhere) < 2:
        pytest.skip("one processor: nothing to choose")

    def fault_thread() -> set[int]:
        found = [
            int(task.name)
            for task in Path("/proc/self/task").iterdir()
            if "ramster-fault" in (task / "comm").read_text()
        ]
        assert len(found) == 1
        return os.sched_getaffinity(found[0])

    def touch(first: int, cpus: set[int]) -> None:
        os.sched_setaffinity(0, cpus)  # of this thread alone
        for number in range(first, first + 100):
            mapped.page(number)[0]

    try:
        mapped = MappedRegion(pair.a, 400, 400)
    except (PermissionMissing, KernelUnsupported) as error:
        pytest.skip(str(error))
    with mapped, ThreadPoolExecutor(1) as thread:
        mapped.region.advise("random")
        for turn, cpu in enumerate(sorted(everywhere)[:2]):
            thread.submit(touch, 100 * turn, {cpu}).result()
            assert fault_thread() == {cpu}
        thread.submit(touch, 200, everywhere).result()
        assert fault_thread() == everywhere
