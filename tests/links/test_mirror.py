"""The spill file as a second copy: dead bytes do not fill it, and full it keeps nothing from a lender."""

from __future__ import annotations

import random
import threading

import pytest
from tests.links.conftest import SEGMENT, MakeMirrored, page, stepping

from ramster.engine import _spill
from ramster.engine.links import BULK
from ramster.remotify.policy import Policy, Settings
from ramster.remotify.worker import Worker
from ramster.testing.proxy import wait_until

PAGES = range(120)
# Of a page as `page` makes it: what is left after compression, and its header.
PAGE_STORED = 2120


def test_the_sizing_rule_holds_under_random_overwrites(make_mirrored: MakeMirrored) -> None:
    """Half as much again as what lives, compressed: no put is refused, and in the end everything is mirrored."""
    count = 1200
    images = 3 * count * PAGE_STORED // 2 // SEGMENT
    pair, spill = make_mirrored(images=images, segments=16, lend=256, cleaner=1, full_wait_ms=10_000)
    worker = Worker(pair.a.store, pair.a.links, Policy(Settings()), 5, spill)
    dice = random.Random(1)
    now: dict[int, int] = {}
    with stepping(worker):
        for version in range(1, 13):
            for _ in range(count):
                index = dice.randrange(count)
                pair.put(index, version=version)
                now[index] = version
        for index, version in now.items():
            assert pair.fetch(index) == page(index + 100_000 * version), f"page {index}"
        wait_until(lambda: pair.a.links.shipping() == 0 and pair.a.store.copies()[1] == 0, "all of it is mirrored")
    statistics = pair.a.store.statistics()
    assert statistics.puts_refused == 0 and statistics.pages_stored == len(now)
    seen = spill.statistics()
    assert seen.bytes_written > 2 * seen.bytes_total, "its room was used again"
    assert seen.compacted > 10 and seen.given_up == 0
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
    for index, version in now.items():
        assert pair.fetch(index) == page(index + 100_000 * version), f"page {index} without the lender"


def test_a_full_mirror_keeps_nothing_from_a_lender_and_catches_up(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored(images=10, lend=64)
    worker = Worker(pair.a.store, pair.a.links, Policy(Settings(cold_after_ms=0)), 5, spill)
    old, new = range(300), range(300, 600)
    pair.put(*old)
    pair.ship()
    pair.put(*new)
    pair.ship()
    statistics = pair.a.store.statistics()
    assert statistics.segments_local == 0, "nothing stays here for want of a second copy"
    assert statistics.segments_unmirrored > 5 and statistics.pages_unmirrored > 150 and statistics.segments_mirrored > 5
    assert spill.statistics().refused == statistics.segments_unmirrored
    pair.expect(range(600))
    with stepping(worker):
        for index in old:
            pair.a.store.flush_page(pair.pool, index)
        # Two images for merging and for what comes next stay free; the rest catches up.
        wait_until(lambda: spill.statistics().copied >= 4, "copies are made")
        for index in new[150:]:
            pair.a.store.flush_page(pair.pool, index)
        wait_until(lambda: pair.a.store.copies()[1] == 0, "all of it is mirrored")
    pair.expect(new[:150])
    assert pair.a.store.statistics().segments_unmirrored == 0
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
    pair.expect(new[:150])
    assert spill.statistics().reads >= 150


def test_a_thousand_damaged_segments_are_forgotten_by_a_lender_that_comes_back(make_mirrored: MakeMirrored) -> None:
    """What it returned was damaged while it could not be told to forget it: its memory is not lent for good."""
    count = 1000
    pair, _ = make_mirrored(images=count + 24, segments=32, lend=count // 4)
    for first in range(0, count, 8):
        for index in range(first, first + 8):
            pair.put(index)
            pair.a.store.seal_open()
        pair.ship()
    assert pair.b.links.foreign() == {pair.a.number: count}
    for handle in range(count):
        pair.b.links.tamper(handle, 72 + 50)  # in its only entry, behind header and directory
    pair.bulk.cut()
    wait_until(lambda: not pair.a.links.up(pair.b.number, BULK) and not pair.b.links.up(pair.a.number, BULK), "down")
    pair.expect(range(count))
    assert pair.a.links.counters()["corrupt_replies"] == count and pair.b.links.foreign() == {pair.a.number: count}
    pair.connect(BULK)
    wait_until(lambda: not pair.b.links.foreign(), f"all is given back, not {pair.b.links.foreign()}")
    assert pair.b.links.counters()["lent_bytes"] == 0 and pair.b.lent_used() == 0
    pair.put(count)
    pair.ship()
    assert pair.where(count) == pair.b.number, "and it gets segments again"


def test_copies_are_given_up_for_pages_that_find_no_other_room(make_mirrored: MakeMirrored) -> None:
    """The lender is full, the file is full of copies of what it has: what is put next goes to the file."""
    pair, spill = make_mirrored(images=24, segments=16, lend=16, cleaner=1, full_wait_ms=10_000)
    worker = Worker(pair.a.store, pair.a.links, Policy(Settings()), 5, spill)
    count = 38 * SEGMENT // PAGE_STORED
    with stepping(worker):
        pair.put(*range(count))
    pair.settle()
    assert spill.statistics().given_up > 0
    statistics = pair.a.store.statistics()
    assert statistics.puts_refused == 0 and statistics.pages_spilled > 0 and statistics.segments_unmirrored > 0
    pair.expect(range(count))


def test_a_compacted_copy_is_right_and_so_is_the_lenders(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored(images=10, lend=32)
    pair.put(*range(270))
    pair.ship()
    for index in range(270):
        if index % 3:
            pair.a.store.flush_page(pair.pool, index)
    wait_until(lambda: spill.statistics().compacted >= 2, "compacted")
    pair.expect(range(0, 270, 3))
    assert spill.statistics().reads == 0
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
    pair.expect(range(0, 270, 3))
    pair.a.store.destroy_pool(pair.pool)
    wait_until(lambda: spill.statistics().bytes_used == 0, "all rooms are free")
    pair.pool = pair.a.store.create_pool(pages=64)


def test_readers_of_the_file_never_see_an_image_move(make_mirrored: MakeMirrored) -> None:
    """What lies in the file alone is compacted while it is read: no page is wrong, and none is said to be lost."""
    pair, spill = make_mirrored(images=16, segments=32, lend=32)
    pair.put(*range(420))
    pair.ship()
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
    stop = threading.Event()
    failed: list[object] = []
    kept = [index for index in range(420) if index % 5 < 3]

    def read(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            index = dice.choice(kept)
            try:
                if pair.fetch(index) != page(index):
                    failed.append(index)
            except Exception as error:
                failed.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for index in range(420):
        if index % 5 >= 3:
            pair.a.store.flush_page(pair.pool, index)
    wait_until(lambda: spill.statistics().compacted >= 3, "compacted")
    stop.set()
    for reader in readers:
        reader.join()
    assert not failed
    for index in kept:
        assert pair.fetch(index) == page(index)


def test_what_a_lender_altered_is_no_copy(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored(images=2, lend=32)
    pair.put(*PAGES)
    shipped = pair.ship()
    assert pair.a.store.copies() == (2, shipped - 2)
    for handle in range(shipped):
        for at in range(1000, 20_000, 100):
            pair.b.links.tamper(handle, at)
    for index in PAGES[:60]:
        pair.a.store.flush_page(pair.pool, index)
    wait_until(lambda: spill.room()[0] >= 1, "room is back")
    served = pair.b.links.counters()["gets_served"]
    spill.tend(0, 8)
    wait_until(lambda: pair.b.links.counters()["gets_served"] > served, "asked of the lender")
    pair.a.links.stop()
    assert spill.statistics().copied == 0


@pytest.mark.parametrize(
    ("win", "held", "free", "rooms", "expected"),
    [
        (0, 16, 0, 1024, False),  # nothing to be won
        (15, 16, 256, 1024, False),  # a quarter is free
        (15, 16, 255, 1024, True),
        (4, 16, 255, 1024, True),  # a quarter of the image
        (3, 16, 255, 1024, False),
        (1, 2, 255, 1024, True),
        (1, 16, 205, 1024, False),
        (1, 16, 204, 1024, True),  # less than a fifth is free: every room counts
    ],
)
def test_when_an_image_is_compacted(win: int, held: int, free: int, rooms: int, expected: bool) -> None:
    assert _spill.compacting(win, held, free, rooms) is expected
