"""Regions over links that are held, spoilt and slow: the application is a process, both engines are in this one."""

from __future__ import annotations

import asyncio
import random
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from tests.links.conftest import MakePair, Pair

from ramster.config.knobs import Region as RegionSettings
from ramster.engine.links import BULK, GET
from ramster.engine.region import Region
from ramster.errors import StoreFull
from ramster.frontswap.region_service import RegionService
from ramster.testing.cluster import Application
from ramster.testing.proxy import wait_until

PAGES = 1000
RESIDENT = 128
FULL_WAIT_MS = 200
SECONDS = 2.0


class Service:
    """The region socket of a pair's borrower, on a loop of its own."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.directory = Path(tempfile.mkdtemp(prefix="ramster-"))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._service = RegionService(self.directory / "run", self._make, RegionSettings(full_wait_ms=FULL_WAIT_MS))
        self._run(self._service.start())

    def _make(self, pages: int, resident_pages: int, name: str) -> Region:
        return Region(self.pair.a.links, pages, resident_pages, name=name, full_wait_ms=FULL_WAIT_MS)

    def _run(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)  # type: ignore[arg-type]

    def filled(self) -> Application:
        """Every page written and out, and everything that is stored at the lender."""
        application = Application(self.directory / "run" / "region.sock", PAGES, RESIDENT)
        for first in range(0, PAGES, 100):
            application.ask("write", first, 100)
            application.ask("evict", first, 100)
            self.pair.ship()
        assert self.pair.a.store.statistics().pages_remote == PAGES
        return application

    def close(self) -> None:
        self._run(self._service.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self.directory)


@pytest.fixture
def serve(make_pair: MakePair) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def make(**options: int) -> Service:
        services.append(Service(make_pair(segments=64, lend=64, **options)))
        return services[-1]

    yield make
    for service in services:
        service.close()


def numbers(runs: list[list[int]]) -> set[int]:
    return {page for first, count in runs for page in range(first, first + count)}


def test_remote_pages_are_right(serve: Callable[..., Service]) -> None:
    service = serve()
    with service.filled() as application:
        assert application.ask("wrong", 0, PAGES) == []
        assert application.ask("wrong_in_threads", 0, PAGES, 8) == []
        assert application.ask("statistics")["faults_remote"] > 0
        assert application.ask("write", 0, PAGES, 1) == PAGES
        assert application.ask("wrong_in_threads", 0, PAGES, 8) == []
    wait_until(lambda: service.pair.b.lent_used() == 0, "the lender's frames are free again")


def test_a_hostile_lender_loses_pages_and_never_changes_them(serve: Callable[..., Service]) -> None:
    """Bytes of one segment are flipped: its pages are lost, said so by every call, and SIGBUS when touched."""
    service = serve()
    with service.filled() as application:
        for offset in range(2000, 20000, 97):
            service.pair.b.links.tamper(0, offset)  # the frame that was filled first
        assert application.ask("check", 0, PAGES) == [], "nobody has looked yet"
        lost: set[int] = set()
        right = 0
        for page in range(PAGES):
            answer = application.ask("prefetch", page, 1)
            if answer == 1:
                assert application.ask("wrong", page, 1) == []
                right += 1
            else:
                assert answer["error"] == "region-lost" and answer["runs"] == [[page, 1]], answer
                lost.add(page)
        assert lost and right > PAGES // 2
        assert numbers(application.ask("check", 0, PAGES)) == lost
        assert application.ask("statistics")["lost_pages"] == len(lost)
        assert application.ask("wrong_of", sorted(set(range(PAGES)) - lost)) == []
        # A page that is lost stays lost, at once, however often it is asked for.
        assert application.ask("prefetch", min(lost), 1)["error"] == "region-lost"
        application.send("wrong_of", [max(lost)])
        assert application.died_of() == signal.SIGBUS


def test_a_bit_that_flips_in_the_arena_loses_one_page(serve: Callable[..., Service]) -> None:
    service = serve()
    with Application(service.directory / "run" / "region.sock", PAGES, RESIDENT) as application:
        application.ask("write", 0, 300)
        application.ask("evict", 0, 300)
        region_pool = service.pair.pool + 4096 + 1  # the next number, in the next place
        service.pair.a.store.corrupt(region_pool, 7, 500)
        answer = application.ask("prefetch", 7, 1)
        assert answer["error"] == "region-lost" and answer["runs"] == [[7, 1]]
        assert application.ask("check", 0, 300) == [[7, 1]]
        assert application.ask("wrong_of", [page for page in range(300) if page != 7]) == []
        application.send("wrong", 7, 1)
        assert application.died_of() == signal.SIGBUS


def test_a_slow_lender_is_not_a_full_node(serve: Callable[..., Service]) -> None:
    """More faults than the budget has room for, all waiting for one lender for longer than full_wait."""
    service = serve()
    with service.filled() as application:
        with service.pair.get.down.held():
            application.send("wrong_in_threads", 0, PAGES, 64)
            with pytest.raises(AssertionError, match="no answer"):
                application.answer(6 * FULL_WAIT_MS / 1000)
        assert application.answer() == []
        assert application.ask("statistics")["refused"] == 0


def test_a_page_that_is_here_does_not_wait_for_neighbours_that_are_away(serve: Callable[..., Service]) -> None:
    service = serve()
    with service.filled() as application:
        for page in range(4):
            application.ask("write", page, 1, 1)
            for at in range(20):  # so that nothing looks like a walk, and no neighbour comes along
                application.ask("write", 200 + 2 * at * at, 1, 1)
        application.ask("evict", 0, PAGES)
        with service.pair.get.down.held():
            # This is a walk: its last fault asks for the pages after it, too, for which nobody answers.
            assert application.ask("wrong", 0, 4) == []
            wait_until(lambda: service.pair.pending() > 0, "the neighbours are asked for")
        assert application.ask("wrong", 0, 100) == []


def test_a_lender_that_does_not_come_back_ends_every_wait(serve: Callable[..., Service]) -> None:
    service = serve(give_up_ms=500, request_deadline_ms=100)
    with service.filled() as application:
        service.pair.cut()
        wait_until(lambda: len(numbers(application.ask("check", 0, PAGES))) > PAGES // 2, "out of reach")
        assert application.ask("prefetch", 0, 10)["error"] == "region-lost"
        # And when it does: everything is there.
        service.pair.connect()
        assert application.ask("check", 0, PAGES) == []
        assert application.ask("prefetch", 0, 10) == 10
        assert application.ask("wrong_in_threads", 0, PAGES, 8) == []
        service.pair.cut()
        application.send("wrong", 500, 500)
        assert application.died_of() == signal.SIGBUS


def test_a_region_closes_while_its_lender_is_silent(serve: Callable[..., Service]) -> None:
    service = serve(give_up_ms=1000)
    with service.filled() as application, service.pair.get.down.held():
        application.send("wrong_in_threads", 0, PAGES, 16)
        wait_until(lambda: service.pair.pending() > 0, "gets are under way")
        application.process.kill()
        wait_until(lambda: service.pair.a.store.statistics().pages_stored == 0, "closed within give_up")
    wait_until(lambda: service.pair.b.lent_used() == 0, "and the lender's frames are free")


def test_everything_at_once(serve: Callable[..., Service]) -> None:
    """Writes, reads by many threads, evictions and prefetches while segments leave, are cleaned and the link is cut."""
    service = serve(request_deadline_ms=200, give_up_ms=60_000)
    pair = service.pair
    stop = threading.Event()
    dice = random.Random(3)
    failures: list[BaseException] = []

    def disturb() -> None:
        try:
            while not stop.wait(0.002):
                pair.order()
                pair.a.store.clean(2)
                if dice.random() < 0.1:
                    kind = dice.choice([GET, BULK])
                    (pair.get, pair.bulk)[kind].cut()
                    wait_until(partial(_down, pair, kind), "down")
                    pair.connect(kind)
        except BaseException as error:
            failures.append(error)

    disturber = threading.Thread(target=disturb)
    with service.filled() as application:
        disturber.start()
        try:
            until = time.monotonic() + SECONDS
            version = 1
            while time.monotonic() < until:
                first = dice.randrange(PAGES)
                count = dice.randrange(1, min(300, PAGES - first) + 1)
                what = dice.choice(["write", "wrong", "wrong_in_threads", "evict", "prefetch"])
                version += 1
                extra = {"write": [version], "wrong_in_threads": [8]}.get(what, [])
                answer = application.ask(what, first, count, *extra)
                if what.startswith("wrong"):
                    assert answer == []
                else:
                    assert isinstance(answer, int), answer
            assert application.ask("wrong", 0, PAGES) == []
        finally:
            stop.set()
            disturber.join()
        assert not failures
        assert application.ask("check", 0, PAGES) == []
        statistics = application.ask("statistics")
        assert (statistics["lost_pages"], statistics["refused"]) == (0, 0)
    pair.settle()
    wait_until(lambda: pair.a.store.statistics().pages_stored == 0, "the application is gone")
    pair.wait_for_frees(0)


def _down(pair: Pair, kind: int) -> bool:
    return not pair.a.links.up(pair.b.number, kind) and not pair.b.links.up(pair.a.number, kind)


def test_a_region_that_cannot_be_made_takes_no_other_pool_along(make_pair: MakePair) -> None:
    """What is not there yet has no pool: it must not have one by being zero."""
    pair = make_pair()
    pool = pair.pool
    pair.a.store.put(pool, 7, b"x" * 4096)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises((OSError, StoreFull)):
            Region(pair.a.links, 64, 32, name="nobody's")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert pair.a.store.get(pool, 7) == b"x" * 4096
    assert pair.a.store.create_pool(pages=64) != pool
