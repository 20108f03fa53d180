"""A region of two processes whose pages are at a lender: one process ends, or loses pages, and the other goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from tests.frontswap.conftest import Agent
from tests.links.conftest import MakePair
from tests.links.test_regions import PAGES, Service, numbers

from ramster.testing.application import content
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


def attach(service: Service) -> Agent:
    agent = Agent(service.directory / "run" / "region.sock")
    agent.attach("program")
    return agent


def test_the_process_that_asked_dies_before_the_answer(serve: Callable[..., Service]) -> None:
    """What the lender sends for a dead process serves the one that waits for the same page."""
    service = serve()
    with service.filled() as application:
        other = attach(service)
        with service.pair.get.down.held():
            other.send("a[500, 0].item()")
            wait_until(lambda: service.pair.pending() > 0, "the lender is asked")
            asked = application.ask("statistics")["faults"]
            application.send("wrong", 500, 1)
            other.kill()
            other.process.communicate()
            with pytest.raises(AssertionError, match="no answer"):
                application.answer(0.2)
        assert application.answer() == []
        statistics = application.ask("statistics")
        assert statistics["attached_processes"] == 1 and statistics["faults"] > asked
        assert application.ask("wrong", 0, PAGES) == []


def test_pages_that_come_back_come_back_in_every_process(serve: Callable[..., Service]) -> None:
    service = serve(give_up_ms=500, request_deadline_ms=100)
    with service.filled() as application:
        other = attach(service)
        service.pair.cut()
        wait_until(lambda: 5 in numbers(application.ask("check", 0, PAGES)), "out of reach")
        assert other.ask("[errno_of(page) != 0 for page in (5, 6)]") == [True, True]
        service.pair.connect()
        assert application.ask("check", 0, PAGES) == []
        # What check() does not name a touch gets, also where it was SIGBUS before.
        assert other.ask("a[5].tobytes().hex()") == content(5, 0).hex(), "poison is what the other sees still"
        assert other.ask("[errno_of(page) for page in (5, 6)]") == [0, 0]
        assert other.ask("a[6].tobytes().hex()") == content(6, 0).hex()
        assert application.ask("wrong", 0, PAGES) == []
        other.end()
