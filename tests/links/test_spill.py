"""The spill file under the engine: what goes there comes back equal or is said to be lost, never wrong, never zero."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.links.conftest import LENDER, SEGMENT, MakeMirrored, page, size, stepping

from ramster.constants import PAGE_BYTES, SPILL_PEER
from ramster.engine.layout import SPILL_FIRST_IMAGE, SPILL_HEADER, SPILL_MAGIC
from ramster.engine.links import GET, Links, TlsContext
from ramster.engine.region import Region
from ramster.engine.spill import Spill
from ramster.engine.store import Store
from ramster.errors import KernelUnsupported, PageLost, PermissionMissing, StoreFull, UsageError
from ramster.remotify.policy import Policy, Settings
from ramster.remotify.worker import Worker
from ramster.testing import _stress
from ramster.testing.engines import MappedRegion, Side
from ramster.testing.nbd import ServedExport
from ramster.testing.proxy import wait_until
from ramster.wire.nbd import Command

IMAGES = 64
PAGES = range(120)


class Alone:
    """A node's engine without any lender, and its spill file."""

    def __init__(self, path: Path, *, segments: int = 24, images: int = IMAGES, **options: Any) -> None:
        self.path = path
        self.store = Store(
            segments * SEGMENT,
            segment_bytes=SEGMENT,
            lock=False,
            cleaner=bool(options.pop("cleaner", 0)),
            full_wait_ms=options.pop("full_wait_ms", 0),
        )
        spill = {key: options.pop(key) for key in ("threads", "mirror") if key in options}
        self.links = Links(self.store, 1, lock=False, **options)
        self.spill = Spill(self.links, path, size(images), **spill)
        self.pool = self.store.create_pool(pages=8192)

    def put(self, *indices: int, version: int = 0) -> None:
        for index in indices:
            self.store.put(self.pool, index, page(index + 100_000 * version))

    def order(self) -> int:
        self.store.seal_open()
        return sum(self.links.ship(s, generation, SPILL_PEER) for s, generation, *_ in self.store.coldest(64))

    def write(self) -> int:
        """Everything sealed goes to the file; how many segments were ordered."""
        ordered = self.order()
        self.settle()
        return ordered

    def settle(self) -> None:
        wait_until(lambda: self.links.shipping() == 0, "nothing on its way")

    def get(self, index: int, mode: int = -1) -> bytes | None:
        return self.links.get(self.pool, index, mode=mode)

    def expect(self, indices: range, version: int = 0) -> None:
        for index in indices:
            assert self.get(index) == page(index + 100_000 * version), f"page {index}"

    def where(self, index: int) -> object:
        return self.store.where(self.pool, index)

    def rooms(self) -> int:
        return self.spill.statistics().bytes_used // SEGMENT

    def close(self, verify: bool = True) -> None:
        self.links.stop()
        if verify:
            self.store.verify()
        self.spill.close()
        self.store.close()


MakeAlone = Callable[..., Alone]


@pytest.fixture
def make_alone(tmp_path: Path) -> Iterator[MakeAlone]:
    made: list[Alone] = []

    def make(**options: Any) -> Alone:
        made.append(Alone(tmp_path / f"spill{len(made)}", **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def alone(make_alone: MakeAlone) -> Alone:
    return make_alone()


def flip(path: Path, at: int, count: int = 1) -> None:
    """Damage bytes of a file as a bad disk would."""
    with path.open("r+b") as file:
        file.seek(at)
        before = file.read(count)
        file.seek(at)
        file.write(bytes(byte ^ 0x40 for byte in before))


# --- what is written comes back ---------------------------------------------------------------------------------------


def test_pages_come_back_from_the_file(alone: Alone) -> None:
    alone.put(*PAGES)
    written = alone.write()
    assert {alone.where(index) for index in PAGES} == {"spill"}
    statistics = alone.store.statistics()
    assert (statistics.segments_spilled, statistics.segments_local) == (written, 0)
    assert statistics.pages_spilled == statistics.pages_remote == len(PAGES)
    alone.expect(PAGES)
    seen = alone.spill.statistics()
    assert (seen.reads, seen.writes, seen.bytes_used) == (len(PAGES), written, written * SEGMENT)
    assert (seen.read_errors, seen.write_errors) == (0, 0) and seen.read_p50_us > 0


def test_pages_of_sparse_pools_and_what_does_not_compress(alone: Alone) -> None:
    pool = alone.store.create_pool()
    pages = {
        (index, oid): random.Random(index * 7 + oid).randbytes(PAGE_BYTES) for index in range(20) for oid in range(3)
    }
    for (index, oid), content in pages.items():
        alone.store.put(pool, index, content, (oid, oid, 1))
    alone.write()
    for (index, oid), content in pages.items():
        assert alone.links.get(pool, index, (oid, oid, 1)) == content
    assert alone.links.get(pool, 3, (0, 0, 1), mode=1) == pages[3, 0]
    assert alone.links.get(pool, 3, (0, 0, 1)) is None


def test_the_latest_put_wins_over_what_is_in_the_file(alone: Alone) -> None:
    alone.put(*PAGES)
    alone.write()
    alone.put(*PAGES[::2], version=1)
    alone.expect(PAGES[1::2])
    alone.expect(PAGES[::2], version=1)
    for index in PAGES[1::2]:
        assert alone.store.flush_page(alone.pool, index)
        assert alone.get(index) is None


def test_rooms_are_free_again_once_nothing_in_them_lives(alone: Alone) -> None:
    for version in range(3):
        alone.put(*PAGES, version=version)
        assert alone.write() <= IMAGES
        wait_until(lambda: alone.rooms() == alone.store.statistics().segments_spilled, "dead images are gone")
        alone.expect(PAGES, version=version)
    alone.store.destroy_pool(alone.pool)
    wait_until(lambda: alone.rooms() == 0, "all rooms are free")
    assert alone.store.statistics().segments_spilled == 0


def test_a_full_file_leaves_segments_where_they_are(make_alone: MakeAlone) -> None:
    alone = make_alone(images=2)
    alone.put(*PAGES)
    assert alone.write() > 2
    statistics = alone.store.statistics()
    assert statistics.segments_spilled == 2 and statistics.segments_local > 0
    assert alone.spill.statistics().refused > 0 and alone.spill.room()[0] == 0
    alone.expect(PAGES)


def test_only_ciphertext_is_on_the_disk(alone: Alone) -> None:
    for index in PAGES:
        alone.store.put(alone.pool, index, b"a secret that must not be found" + random.Random(index).randbytes(4065))
    alone.write()
    content = alone.path.read_bytes()
    assert content.startswith(SPILL_MAGIC)
    assert b"a secret" not in content and content.count(b"RSEL") == alone.store.statistics().segments_spilled


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_that_matters_is_found(alone: Alone) -> None:
    alone.put(0)
    alone.write()
    content = alone.path.read_bytes()
    start = content.index(b"RSEL")
    entry = start + 72  # header, a directory of one padded to 8
    length = int.from_bytes(content[entry : entry + 2], "little")
    for at in [*range(20), *range(24, 40), 40, 41, 39 + length // 2, 39 + length]:
        flip(alone.path, entry + at)
        with pytest.raises(PageLost):
            alone.get(0)
        flip(alone.path, entry + at)
        assert alone.get(0) == page(0)
    flip(alone.path, start, 72)  # neither header nor directory of an image is believed
    assert alone.get(0) == page(0)


def test_an_older_image_in_place_of_the_newer_is_found(alone: Alone) -> None:
    alone.put(0)
    alone.write()
    old = alone.path.read_bytes()
    alone.store.flush_page(alone.pool, 0)
    wait_until(lambda: alone.rooms() == 0, "free")
    # The next room is another one: fill all but the first, so that the first is used again.
    alone.put(0, version=1)
    alone.write()
    new = alone.path.read_bytes()
    where, was = new.rindex(b"RSEL"), old.index(b"RSEL")
    with alone.path.open("r+b") as file:
        file.seek(where)
        file.write(old[was : was + SEGMENT])
    with pytest.raises(PageLost):
        alone.get(0)
    alone.put(0, version=2)
    assert alone.get(0) == page(200_000)


def lost_of(alone: Alone, indices: range) -> set[int]:
    """Pages that a get does not get; all others must be right."""
    lost = set()
    for index in indices:
        try:
            assert alone.get(index) == page(index), f"page {index}"
        except PageLost:
            lost.add(index)
    return lost


def test_a_file_cut_short_is_a_loss_that_is_said(alone: Alone) -> None:
    """By a read that meets its end; everybody says the same of it, and what was written before the cut is there."""
    alone.put(*PAGES)
    alone.write()
    alone.put(200)
    os.truncate(alone.path, SPILL_FIRST_IMAGE + SEGMENT)
    lost = lost_of(alone, PAGES)
    assert 0 < len(lost) < len(PAGES)
    assert {index for index in PAGES if alone.where(index) == "lost"} == lost
    found, seen = alone.store.statistics(), alone.spill.statistics()
    assert (found.pages_lost, found.pages_spilled, found.pages_remote) == (
        len(lost),
        len(PAGES) - len(lost),
        len(PAGES) - len(lost),
    )
    assert (seen.cuts, seen.pages_cut, seen.read_errors) == (1, len(lost), 0)
    assert alone.store.census(alone.pool) == {"here": 1, "away": len(PAGES) - len(lost), "lost": len(lost)}
    assert alone.get(200) == page(200)
    assert lost_of(alone, PAGES) == lost, "for good, though the file is as long as it was"
    alone.put(*lost)
    assert alone.store.statistics().pages_lost == 0
    assert lost_of(alone, PAGES) == set()
    assert alone.spill.statistics().pages_cut == len(lost), "counted when it was found"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, SPILL_FIRST_IMAGE + 4 * SEGMENT), min_size=1, max_size=3))
def test_wherever_a_file_is_cut_only_what_was_there_is_lost(make_alone: MakeAlone, cuts: list[int]) -> None:
    """A look finds it before anybody reads; more is written between the cuts, where the old was and behind."""
    alone = make_alone()
    written, lost = range(0), set[int]()
    for n, length in enumerate(cuts):
        alone.put(*range(40 * n, 40 * n + 40))
        alone.write()
        written = range(40 * n + 40)
        os.truncate(alone.path, length)
        alone.spill.look()
        assert alone.spill.statistics().cuts == n + 1
        now = {index for index in written if alone.where(index) == "lost"}
        assert now >= lost
        lost = now
        assert alone.path.stat().st_size == size(IMAGES)
        assert alone.path.read_bytes()[: len(SPILL_MAGIC)] == SPILL_MAGIC, "the next node knows it again"
    assert lost_of(alone, written) == lost
    assert alone.store.statistics().pages_lost == alone.spill.statistics().pages_cut == len(lost)
    for index in written:
        alone.store.flush_page(alone.pool, index)
    wait_until(lambda: alone.rooms() == 0, "all rooms are free again")
    assert alone.store.statistics().pages_lost == 0


def test_a_cut_behind_everything_that_is_stored_costs_nothing(alone: Alone) -> None:
    alone.put(*PAGES)
    alone.write()
    os.truncate(alone.path, size(IMAGES) - 1)
    alone.spill.look()
    assert (alone.spill.statistics().cuts, alone.spill.statistics().pages_cut) == (1, 0)
    alone.expect(PAGES)
    os.truncate(alone.path, 5000)
    alone.put(*PAGES, version=1)
    alone.write()
    assert alone.spill.statistics().cuts == 2, "a write finds it, too"
    alone.expect(PAGES, version=1)


def test_a_check_of_a_region_names_what_was_cut_off(alone: Alone) -> None:
    region = Region(alone.links, len(PAGES), 64, name="cut", full_wait_ms=100)
    for index in PAGES:
        alone.store.put(region.pool, index, page(index))
    alone.write()
    assert region.check(0, len(PAGES)) == []
    os.truncate(alone.path, SPILL_FIRST_IMAGE + SEGMENT)
    runs = region.check(0, len(PAGES))
    named = {index for first, count in runs for index in range(first, first + count)}
    assert named == {index for index in PAGES if alone.store.where(region.pool, index) == "lost"}
    assert 0 < len(named) == region.statistics()["lost_pages"] < len(PAGES)
    region.close()
    wait_until(lambda: alone.rooms() == 0, "all rooms are free again")


def test_a_removed_file_goes_on_to_be_used_and_is_said(alone: Alone, caplog: pytest.LogCaptureFixture) -> None:
    worker = Worker(alone.store, alone.links, Policy(Settings()), 5, alone.spill)
    alone.put(*PAGES)
    alone.write()
    alone.path.unlink()
    alone.path.write_text("somebody else's")
    worker.step()
    worker.step()
    assert alone.spill.linked is False
    assert [record.message.count("was removed, or another file put") for record in caplog.records] == [1]
    alone.expect(PAGES)
    alone.put(*PAGES, version=1)
    alone.write()
    alone.expect(PAGES, version=1)
    assert alone.path.read_text() == "somebody else's"


def test_reads_that_fail_are_said_once_and_the_pages_are_there_when_they_work_again(
    alone: Alone, caplog: pytest.LogCaptureFixture
) -> None:
    """The kernel refuses reads of a descriptor that was opened for writing alone, as a disk would with EIO."""
    worker = Worker(alone.store, alone.links, Policy(Settings()), 5, alone.spill)
    alone.put(*PAGES)
    alone.write()
    worker.step()
    assert caplog.records == []
    good, bad = os.dup(alone.spill._fd), os.open(alone.path, os.O_WRONLY)
    try:
        os.dup2(bad, alone.spill._fd)
        for index in (3, 50):
            with pytest.raises(PageLost):
                alone.get(index)
            worker.step()
        assert alone.spill.statistics().read_errors == 2
        (record,) = caplog.records
        why = "reading failed (Bad file descriptor); pages that lie there cannot be had while that lasts"
        assert (record.levelname, record.message) == ("WARNING", f"spill file {alone.path}: {why}")
        os.dup2(good, alone.spill._fd)
    finally:
        os.close(good)
        os.close(bad)
    worker.step()
    alone.expect(PAGES)
    assert len(caplog.records) == 1 and alone.store.statistics().pages_lost == 0


def test_a_cut_mirror_costs_copies_and_no_page(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored()
    pair.put(*PAGES)
    pair.ship()
    before = pair.a.store.copies()
    os.truncate(spill.path, SPILL_FIRST_IMAGE)
    spill.look()
    assert (before[1], pair.a.store.copies()) == (0, (0, before[0]))
    assert (spill.statistics().pages_cut, spill.statistics().bytes_used) == (0, 0)
    pair.expect(PAGES)
    spill.tend(0, 64)
    wait_until(lambda: pair.a.store.copies() == before, "mirrored again")
    pair.cut()
    pair.expect(PAGES)


def test_a_disk_that_is_full_in_the_middle_leaves_pages_in_the_arena(alone: Alone) -> None:
    """A limit on file size fails a write like a full disk; afterwards it works again."""
    alone.put(*PAGES)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SPILL_FIRST_IMAGE + SEGMENT + 4096, hard))
    try:
        ordered = alone.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    seen = alone.spill.statistics()
    assert ordered > 2 and seen.writes == 1 and "large" in seen.last_error
    assert seen.write_errors == 1, "what was ordered with it is not tried as well"
    assert not alone.spill.room()[2], "no more tries for a while"
    assert alone.store.statistics().segments_spilled == 1 and alone.rooms() == 1
    alone.expect(PAGES)
    wait_until(lambda: alone.spill.room()[2], "and then again")
    alone.write()
    assert alone.store.statistics().segments_local == 0
    alone.expect(PAGES)


# --- races ------------------------------------------------------------------------------------------------------------


def test_pages_are_right_while_they_are_put_flushed_written_and_read(make_alone: MakeAlone) -> None:
    """Four threads on pages of their own, one that has all of it written again and again, rooms that are used anew."""
    alone = make_alone(segments=32, images=40, cleaner=1, full_wait_ms=10_000)
    stop = threading.Event()
    wrong: list[str] = []

    def work(number: int) -> None:
        dice = random.Random(number)
        mine = range(number * 1000, number * 1000 + 150)
        now: dict[int, int] = {}
        for version in range(1, 12):
            for index in mine:
                action = dice.random()
                if action < 0.45:
                    alone.put(index, version=version)
                    now[index] = version
                elif action < 0.55 and index in now:
                    alone.store.flush_page(alone.pool, index)
                    del now[index]
                else:
                    got = alone.get(index, mode=1 if action > 0.97 else -1)
                    expected = page(index + 100_000 * now[index]) if index in now else None
                    if got != expected:
                        wrong.append(f"page {index}")
                    if action > 0.97:
                        now.pop(index, None)
        for index in mine:
            expected = page(index + 100_000 * now[index]) if index in now else None
            if alone.get(index) != expected:
                wrong.append(f"page {index} at the end")

    def write() -> None:
        while not stop.is_set():
            alone.order()
            stop.wait(0.001)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    writer = threading.Thread(target=write)
    for thread in [*threads, writer]:
        thread.start()
    for thread in threads:
        thread.join()
    stop.set()
    writer.join()
    alone.settle()
    assert not wrong
    assert alone.spill.statistics().reads > 0
    alone.store.destroy_pool(alone.pool)
    wait_until(lambda: alone.rooms() == 0, "all rooms are free")


def test_stopping_ends_gets_and_threads(tmp_path: Path) -> None:
    before = threads()
    for turn in range(3):
        alone = Alone(tmp_path / f"turn{turn}", threads=1 + turn)
        alone.put(*PAGES)
        alone.order()
        readers = [threading.Thread(target=quiet, args=(alone,)) for _ in range(2)]
        for reader in readers:
            reader.start()
        alone.links.stop()
        for reader in readers:
            reader.join(20)
            assert not reader.is_alive()
        alone.close(verify=False)
        assert alone.path.stat().st_size == 0
    assert threads() == before


def quiet(alone: Alone) -> None:
    for index in PAGES:
        with contextlib.suppress(PageLost, UsageError):
            assert alone.get(index) == page(index)


def threads() -> int:
    return sum(name.read_text() == "ramster-spill\n" for name in Path("/proc/self/task").glob("*/comm"))


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_is_private_reserved_and_says_what_it_is(alone: Alone) -> None:
    status = alone.path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == size(IMAGES)
    if alone.spill.reserved:
        assert status.st_blocks * 512 >= size(IMAGES)
    assert SPILL_HEADER.size <= SPILL_FIRST_IMAGE


def test_two_nodes_cannot_share_a_file(alone: Alone) -> None:
    with pytest.raises(UsageError, match="in use by another node"):
        Alone(alone.path)
    alone.put(*PAGES)
    alone.write()
    alone.expect(PAGES)


def test_what_an_earlier_node_left_is_discarded(tmp_path: Path) -> None:
    path = tmp_path / "spill"
    path.write_bytes(SPILL_MAGIC + b"\xaa" * 100_000)
    path.chmod(0o644)
    alone = Alone(path)
    assert b"\xaa" not in path.read_bytes() and stat.S_IMODE(path.stat().st_mode) == 0o600
    alone.close()
    assert path.stat().st_size == 0


def test_a_file_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "thesis.tex"
    path.write_text("years of work")
    with pytest.raises(UsageError, match="no spill file"):
        Alone(path)
    assert path.read_text() == "years of work"


@pytest.mark.parametrize(
    ("name", "images", "error", "says"),
    [
        ("missing/spill", IMAGES, UsageError, "no such file"),
        (".", IMAGES, UsageError, "directory"),
        ("spill", 1 << 40, StoreFull, "free of the"),
        ("spill", 0, UsageError, "at least"),
    ],
)
def test_what_is_wrong_with_the_file_is_said_and_none_is_left(
    tmp_path: Path, name: str, images: int, error: type[Exception], says: str
) -> None:
    store = Store(16 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=False)
    links = Links(store, 1, lock=False)
    with pytest.raises(error, match=says):
        Spill(links, tmp_path / name, size(images))
    assert list(tmp_path.iterdir()) == []
    links.stop()
    store.close()


# --- policy and worker ------------------------------------------------------------------------------------------------


def test_a_node_without_any_lender_holds_several_times_its_arena(make_alone: MakeAlone) -> None:
    alone = make_alone(segments=24, images=120, cleaner=1, full_wait_ms=5000)
    worker = Worker(alone.store, alone.links, Policy(Settings()), 5, alone.spill)
    count = 4 * 24 * SEGMENT // 2100
    with stepping(worker):
        alone.put(*range(count))
    assert alone.store.statistics().pages_spilled > count // 2
    alone.expect(range(count))


@pytest.mark.parametrize("mirror", [False, True])
def test_a_put_into_a_full_arena_succeeds_within_full_wait_while_the_lender_stands_still(
    make_mirrored: MakeMirrored, mirror: bool
) -> None:
    """The lender has room, its links are up; it just takes nothing. After a quarter of full_wait it is passed over."""
    full_wait_ms = 2000
    pair, spill = make_mirrored(mirror=mirror, segments=24, lend=64, cleaner=1, full_wait_ms=full_wait_ms)
    settings = Settings(stalled_ms=full_wait_ms // 4)
    worker = Worker(pair.a.store, pair.a.links, Policy(settings), 5, spill)
    count = 3 * 24 * SEGMENT // 2100
    with pair.bulk.up.held():
        with stepping(worker):
            pair.put(*range(count))  # StoreFull, if any put waited longer
        assert pair.a.store.statistics().pages_spilled > count // 3
        assert pair.a.links.up(LENDER, GET)
        pair.expect(range(count))
    pair.settle()
    pair.expect(range(count))


# --- room -------------------------------------------------------------------------------------------------------------


def test_overwriting_without_end_needs_no_more_room_than_what_lives(make_alone: MakeAlone) -> None:
    """Random pages of twice an arena, again and again: images become sparse, and are made into fuller ones."""
    alone = make_alone(segments=16, images=40, cleaner=1, full_wait_ms=10_000)
    worker = Worker(alone.store, alone.links, Policy(Settings()), 5, alone.spill)
    sparse = alone.store.create_pool()
    dice = random.Random(1)
    count = 900
    now: dict[int, int] = {}
    with stepping(worker):
        for version in range(1, 13):
            for _ in range(count):
                index = dice.randrange(count)
                if index % 5 == 0:
                    alone.store.put(sparse, index, page(index + 100_000 * version), (index, 7, 0))
                else:
                    alone.put(index, version=version)
                now[index] = version
                if dice.random() < 0.05:
                    other = dice.randrange(count)
                    if other % 5:
                        alone.store.flush_page(alone.pool, other)
                        now.pop(other, None)
    for index in range(count):
        expected = page(index + 100_000 * now[index]) if index in now else None
        if index % 5 == 0:
            assert alone.links.get(sparse, index, (index, 7, 0)) == expected, f"page {index}"
        else:
            assert alone.get(index) == expected, f"page {index}"
    seen = alone.spill.statistics()
    assert seen.merged > 10 and seen.writes > 2 * 40
    assert alone.store.statistics().puts_refused == 0


def test_readers_and_writers_never_see_a_merge(make_alone: MakeAlone) -> None:
    alone = make_alone(segments=24, images=12, cleaner=1, full_wait_ms=10_000)
    alone.put(*range(280))
    alone.write()
    stop = threading.Event()
    wrong: list[int] = []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        while not stop.is_set():
            index = dice.randrange(0, 280, 4)
            if alone.get(index) != page(index):
                wrong.append(index)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    for index in range(280):
        if index % 4:
            alone.store.flush_page(alone.pool, index)
    wait_until(lambda: alone.spill.statistics().merged >= 4, "merged")
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    alone.expect(range(0, 280, 4))


def test_what_is_damaged_is_not_merged_and_not_hidden(make_alone: MakeAlone) -> None:
    alone = make_alone(images=12)
    alone.put(*range(280))
    alone.write()
    content = bytearray(alone.path.read_bytes())
    for at in range(SPILL_FIRST_IMAGE + 2000, SPILL_FIRST_IMAGE + 3 * SEGMENT, 700):
        content[at] ^= 1
    alone.path.write_bytes(content)
    for index in range(280):
        if index % 4:
            alone.store.flush_page(alone.pool, index)
    wait_until(lambda: alone.spill.statistics().merged >= 4, "merged")
    lost = 0
    for index in range(0, 280, 4):
        try:
            assert alone.get(index) == page(index)
        except PageLost:
            lost += 1
    assert 0 < lost < 40


# --- mirror -----------------------------------------------------------------------------------------------------------


def test_mirrored_segments_are_on_both_and_read_from_the_lender(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored()
    pair.put(*PAGES)
    shipped = pair.ship()
    statistics = pair.a.store.statistics()
    assert (statistics.segments_mirrored, statistics.segments_spilled) == (shipped, 0)
    assert pair.b.lent_used() == shipped == spill.statistics().bytes_used // SEGMENT
    pair.expect(PAGES)
    assert spill.statistics().reads == 0
    pair.a.store.destroy_pool(pair.pool)
    wait_until(lambda: pair.b.lent_used() == 0 and spill.statistics().bytes_used == 0, "both have forgotten")
    pair.pool = pair.a.store.create_pool(pages=64)


def test_what_a_lost_lender_had_is_read_from_the_file(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored()
    pair.put(*PAGES)
    pair.ship()
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
    statistics = pair.a.store.statistics()
    assert statistics.segments_lost == 0 and statistics.pages_spilled == len(PAGES)
    pair.expect(PAGES)
    assert spill.statistics().reads == len(PAGES)


def test_gets_under_way_when_the_lender_goes_are_answered_from_the_file(make_mirrored: MakeMirrored) -> None:
    pair, _ = make_mirrored(give_up_ms=60_000, request_deadline_ms=60_000)
    pair.put(*PAGES)
    pair.ship()
    with pair.get.down.held():
        waiting = [pair.later(lambda index=index: pair.fetch(index)) for index in range(4)]  # type: ignore[misc]
        for index, each in enumerate(waiting):
            assert each.result() == page(index), "a lender that stands still is passed over"
    pair.cut()
    pair.expect(PAGES)
    pair.connect()
    pair.expect(PAGES)
    assert pair.a.links.counters()["gets_redirected"] >= 4 + len(PAGES)


def test_a_mirrored_segment_that_dies_on_the_lender_side_is_compacted_there_and_right_here(
    make_mirrored: MakeMirrored,
) -> None:
    """The lender drops dead entries and moves the rest; the file keeps the image as it was sealed."""
    pair, _ = make_mirrored()
    pair.put(*PAGES)
    pair.ship()
    for index in PAGES:
        if index % 4:
            pair.a.store.flush_page(pair.pool, index)
    wait_until(lambda: pair.b.links.counters()["segments_compacted"] > 0, "compacted")
    pair.expect(PAGES[::4])
    pair.b.links.goodbye()
    wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
    pair.expect(PAGES[::4])


def test_a_lender_that_alters_pages_is_found_out_and_the_file_has_them(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored()
    pair.put(*PAGES)
    shipped = pair.ship()
    for handle in range(shipped):
        for at in range(1000, 20_000, 100):
            pair.b.links.tamper(handle, at)
    pair.expect(PAGES)
    assert spill.statistics().reads > 0 and pair.a.links.counters()["corrupt_replies"] > 0
    # What it spoiled it is told to forget.
    spilled = pair.a.store.statistics().segments_spilled
    assert spilled > 0
    pair.wait_for_frees(shipped - spilled)


def test_a_lender_that_forgot_has_no_part_in_it(make_mirrored: MakeMirrored) -> None:
    pair, _ = make_mirrored()
    pair.put(*PAGES)
    pair.ship()
    pair.b.links.drop_foreign(pair.a.number)
    pair.expect(PAGES)
    assert pair.a.store.statistics().segments_lost == 0


def test_damage_in_the_file_costs_nothing_while_the_lender_is_there(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored(give_up_ms=5000)
    pair.put(*PAGES)
    shipped = pair.ship()
    flip(spill.path, SPILL_FIRST_IMAGE + 300, shipped * SEGMENT - 300)
    with pair.get.down.held():
        # Read from the file since the lender does not answer, found damaged, asked of the lender again.
        waiting = pair.later(lambda: pair.fetch(5))
        wait_until(lambda: pair.a.store.statistics().segments_mirrored == shipped - 1, "no copy any more")
        assert not waiting.done()
    assert waiting.result() == page(5)
    pair.expect(PAGES)
    assert spill.statistics().bytes_used == (shipped - 1) * SEGMENT


def test_damage_in_the_file_while_the_lender_is_away_costs_that_page_for_so_long(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored(give_up_ms=300, request_deadline_ms=200)
    pair.put(*PAGES)
    shipped = pair.ship()
    flip(spill.path, SPILL_FIRST_IMAGE + 5000, 1)
    pair.cut()
    lost = []
    for index in PAGES:
        try:
            assert pair.fetch(index) == page(index)
        except PageLost:
            lost.append(index)
    assert len(lost) == 1 and pair.a.store.statistics().segments_mirrored == shipped
    pair.connect()
    pair.expect(PAGES)


def test_ephemeral_segments_are_not_mirrored(make_mirrored: MakeMirrored) -> None:
    pair, spill = make_mirrored()
    pool = pair.a.store.create_pool(pages=64, persistent=False)
    for index in range(64):
        pair.a.store.put(pool, index, page(index))
    pair.ship()
    assert pair.a.store.statistics().segments_remote > 0 and spill.statistics().writes == 0


def test_what_the_lender_refuses_is_in_the_file_already(make_mirrored: MakeMirrored) -> None:
    pair, _ = make_mirrored(lend=2)
    pair.put(*PAGES)
    shipped = pair.ship()
    statistics = pair.a.store.statistics()
    assert statistics.segments_mirrored >= 2 and statistics.segments_mirrored + statistics.segments_spilled == shipped
    pair.expect(PAGES)


def test_what_was_on_its_way_when_the_link_broke_is_in_the_file(make_mirrored: MakeMirrored) -> None:
    pair, _ = make_mirrored()
    pair.put(*PAGES)
    with pair.bulk.down.held():
        pair.order()
        wait_until(lambda: pair.b.lent_used() > 0, "the lender has some")
        pair.bulk.cut()
        wait_until(lambda: pair.a.store.statistics().segments_spilled > 0, "in the file")
    pair.settle()
    pair.expect(PAGES)
    pair.connect()
    pair.expect(PAGES)
    wait_until(lambda: pair.b.lent_used() == pair.a.store.statistics().segments_mirrored, "orphans are gone")


# --- regions ----------------------------------------------------------------------------------------------------------


def test_a_region_works_from_the_file(contexts: dict[int, TlsContext], tmp_path: Path) -> None:
    side = Side(1, contexts[1], 24, 0, cleaner=1, full_wait_ms=5000)
    spill = Spill(side.links, tmp_path / "spill", size(200))
    worker = Worker(side.store, side.links, Policy(Settings()), 5, spill)
    pages = 1500
    try:
        with MappedRegion(side, pages, 128) as mapped:
            for index in range(pages):
                mapped.page(index)[:] = page(index)
                if index % 50 == 0:  # between touches: those hold the GIL
                    worker.step()
                    side.settle()
            assert side.store.statistics().pages_spilled > 0
            for turn in (range(pages), range(pages - 1, 0, -3), range(0, pages, 7)):
                for index in turn:
                    assert mapped.page(index) == page(index), f"page {index}"
            assert mapped.region.statistics().lost_pages == 0
    except (KernelUnsupported, PermissionMissing) as error:
        pytest.skip(str(error))
    finally:
        side.links.stop()
        spill.close()
        side.store.close()
    assert spill.statistics().pages_read > spill.statistics().reads, "pages of a window are read together"


def test_a_clean_page_whose_lender_is_away_is_not_stored_again_when_it_is_mirrored(
    make_mirrored: MakeMirrored,
) -> None:
    pair, _ = make_mirrored(segments=40)
    try:
        with MappedRegion(pair.a, 64, 64) as mapped:
            for index in range(64):
                mapped.page(index)[:] = page(index)
            mapped.region.evict()
            pair.a.store.seal_open()
            pair.a.order(pair.b)
            pair.settle()
            assert mapped.where(0) == LENDER
            mapped.region.prefetch()
            pair.cut()
            puts = pair.a.store.statistics().puts
            mapped.region.evict()
            assert pair.a.store.statistics().puts == puts
            for index in range(64):
                assert mapped.page(index) == page(index)
    except (KernelUnsupported, PermissionMissing) as error:
        pytest.skip(str(error))


def test_the_store_counts_rooms_that_stress_names_too(alone: Alone) -> None:
    alone.put(*PAGES)
    alone.write()
    seen = _stress.reference(alone.store, alone.pool, 3)
    assert seen["remote"] and seen["peer"] == SPILL_PEER


# --- block devices ----------------------------------------------------------------------------------------------------


def test_a_block_device_of_several_arenas_lies_in_the_file(make_alone: MakeAlone) -> None:
    alone = make_alone(segments=24, images=120, cleaner=1, full_wait_ms=5000)
    worker = Worker(alone.store, alone.links, Policy(Settings()), 5, alone.spill)
    pages = 1600
    with stepping(worker), ServedExport(alone.links, pages) as export:
        client = export.connect()
        for first in range(0, pages, 20):
            client.write(first * PAGE_BYTES, b"".join(page(index) for index in range(first, first + 20)))
        assert alone.store.statistics().pages_spilled > pages // 4
        asked = {client.send(Command.READ, index * PAGE_BYTES, PAGE_BYTES): index for index in range(0, pages, 9)}
        for cookie, index in asked.items():
            answer = client.wait(cookie)
            assert (answer.error, bytes(answer.data)) == (0, page(index)), f"page {index}"
        for first in range(0, pages, 50):
            assert client.read(first * PAGE_BYTES, 50 * PAGE_BYTES) == b"".join(
                page(index) for index in range(first, first + 50)
            )
        client.trim(0, pages * PAGE_BYTES)
        wait_until(lambda: alone.rooms() == 0, "a discard frees the rooms")
        client.close()


def test_a_block_device_outlives_its_lender(make_mirrored: MakeMirrored) -> None:
    pair, _ = make_mirrored(segments=40, lend=64)
    with ServedExport(pair.a.links, 400) as export:
        client = export.connect()
        content = b"".join(page(index) for index in range(400))
        for at in range(0, len(content), 1 << 17):
            client.write(at, content[at : at + (1 << 17)])
        assert pair.ship() > 0
        pair.b.links.goodbye()
        wait_until(lambda: pair.a.store.statistics().segments_mirrored == 0, "goodbye is heard")
        assert client.read(0, len(content)) == content
        assert export.statistics()["pages_lost"] == 0
        client.close()
