"""Pages of a region that could not be had: what check() says of them, and how they become readable again."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.links.conftest import MakePair
from tests.links.test_regions import PAGES, RESIDENT, Service, numbers
from tests.links.test_shared_regions import attach

from ramster.testing.proxy import wait_until


@pytest.fixture
def serve(make_pair: MakePair) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def make(**options: int) -> Service:
        services.append(Service(make_pair(segments=64, lend=64, **options)))
        return services[-1]

    yield make
    for service in services:
        service.close()


def test_check_waits_until_it_is_known_whether_a_lender_is_lost(serve: Callable[..., Service]) -> None:
    """Between the end of a connection and give_up "0 pages are lost" would be a guess."""
    service = serve(give_up_ms=1000, request_deadline_ms=200)
    with service.filled() as application:
        service.pair.cut()
        assert len(numbers(application.ask("check", 0, PAGES))) > PAGES - RESIDENT - 1


def test_check_says_nothing_of_a_lender_that_comes_back_in_time(serve: Callable[..., Service]) -> None:
    service = serve(give_up_ms=20_000)
    with service.filled() as application:
        service.pair.cut()
        application.send("check", 0, PAGES)
        service.pair.connect()
        assert application.answer() == []
        assert application.ask("wrong", 0, PAGES) == []


def test_pages_that_were_sigbus_are_readable_once_the_same_memory_is_back(serve: Callable[..., Service]) -> None:
    """More than may be resident, in both processes; nobody asks for them by prefetch."""
    service = serve(give_up_ms=300, request_deadline_ms=100)
    with service.filled() as application:
        other = attach(service)
        service.pair.cut()
        wait_until(lambda: len(numbers(application.ask("check", 0, PAGES))) == PAGES, "out of reach")
        touched = list(range(0, PAGES, 3))
        other.run(f"for page in {touched}: assert errno_of(page) != 0")
        assert application.ask("statistics")["lost_pages"] >= len(touched)
        assert len(numbers(application.ask("check", 0, PAGES))) == PAGES
        service.pair.connect()
        assert application.ask("check", 0, PAGES) == [], "waits until they are there"
        assert other.ask(f"[page for page in {touched} if errno_of(page)]") == []
        assert application.ask("wrong", 0, PAGES) == []
        statistics = application.ask("statistics")
        assert statistics["lost_pages"] == 0
        assert statistics["resident_pages"] <= RESIDENT
        other.end()


def test_prefetch_asks_for_what_it_will_wait_for(serve: Callable[..., Service]) -> None:
    service = serve()
    with service.filled() as application:
        with service.pair.get.down.held():
            application.send("prefetch", 0, RESIDENT)
            # One window of 64 pages lies in three segments at most, and would be all that is asked for.
            wait_until(lambda: service.pair.pending() > 3, "the next window is under way as well")
        assert application.answer() > 64
        assert application.ask("wrong", 0, PAGES) == []


def test_a_part_of_a_region_is_discarded_while_its_lender_is_gone(serve: Callable[..., Service]) -> None:
    """Nobody waits for the lender, and it gets its memory back once it is there again."""
    service = serve(give_up_ms=20_000)
    with service.filled() as application:
        other = attach(service)
        service.pair.cut()
        before = application.ask("statistics")
        assert other.ask(f"region.discard(a[{PAGES // 2}:])") == PAGES // 2 * 4096
        assert other.ask(f"a[{PAGES // 2}:].any()") == "False"
        after = application.ask("statistics")
        assert after["faults_remote"] == before["faults_remote"]
        assert after["remote_pages"] <= PAGES // 2 < before["remote_pages"]
        service.pair.connect()
        assert application.ask("wrong", 0, PAGES // 2) == []
        other.run("region.discard()")
        wait_until(lambda: service.pair.b.lent_used() == 0, "the lender's frames are free again")
        other.end()
