"""Two connections of one export with requests under way on both, pages that come and go, links that break, a size that
grows: every answer is one that some order of the requests explains.

Covers what single requests against a byte array (test_nbd) do not: overtaking. A page has one value when no write to it
is under way; while one is, a read may see the old or the new. Links that break for a moment make nothing wrong or lost.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.links.conftest import Pair

from ramster.constants import PAGE_BYTES
from ramster.testing.nbd import Answer, ServedExport
from ramster.testing.proxy import wait_until
from ramster.wire.nbd import Command

PAGES, MOST = 24, 32
LANES = st.integers(0, 1)
_ZEROS = bytes(PAGE_BYTES)


def content(seed: int) -> bytes:
    return bytes([seed % 255 + 1]) * PAGE_BYTES if seed % 5 == 0 else (seed.to_bytes(8) * 64)[:511] * 8 + bytes(8)


@dataclass
class Flying:
    """A request without an answer so far. may: of each page of a read, what has been in it since it was sent."""

    lane: int
    cookie: int
    command: int
    first: int
    pages: int
    value: bytes = b""
    may: list[set[bytes]] = field(default_factory=list)


class Connections(RuleBasedStateMachine):
    pair: Pair

    def __init__(self) -> None:
        super().__init__()
        self.export = ServedExport(self.pair.a.links, PAGES, max_pages=MOST)
        self.clients = [self.export.connect(structured=lane == 0) for lane in range(2)]
        self.size = PAGES
        self.told = [PAGES] * 2  # what each client knows of it
        self.flying: list[Flying] = []
        # What each page may hold: several while changes of it are under way.
        self.held: list[set[bytes]] = [{_ZEROS} for _ in range(MOST)]
        self.seed = 0

    def teardown(self) -> None:
        self.answered()
        for client in self.clients:
            client.close()
        self.export.close()
        self.pair.a.store.destroy_pool(self.export.pool)

    # --- requests ---

    def span(self, lane: int, first: int, pages: int) -> tuple[int, int]:
        first %= self.told[lane]
        return first, min(pages, self.told[lane] - first)

    def changing(self, first: int, pages: int) -> bool:
        """Whether a change of one of these pages is under way: two of them at once end in either order."""
        return any(
            f.command != Command.READ and f.first < first + pages and first < f.first + f.pages for f in self.flying
        )

    def send(self, lane: int, command: int, first: int, pages: int, value: bytes = b"") -> None:
        cookie = self.clients[lane].send(command, first * PAGE_BYTES, pages * PAGE_BYTES, payload=value * pages)
        self.flying.append(Flying(lane, cookie, command, first, pages, value))

    @rule(lane=LANES, first=st.integers(0, MOST), pages=st.integers(1, 20))
    def read(self, lane: int, first: int, pages: int) -> None:
        first, pages = self.span(lane, first, pages)
        self.send(lane, Command.READ, first, pages)
        self.flying[-1].may = [set(self.held[page]) for page in range(first, first + pages)]

    def change(self, lane: int, command: int, first: int, pages: int, value: bytes) -> None:
        first, pages = self.span(lane, first, pages)
        if self.changing(first, pages):
            return
        self.send(lane, command, first, pages, value if command == Command.WRITE else b"")
        self.flying[-1].value = value
        for page in range(first, first + pages):
            self.held[page].add(value)
            for f in self.flying:
                if f.command == Command.READ and f.first <= page < f.first + f.pages:
                    f.may[page - f.first].add(value)

    @rule(lane=LANES, first=st.integers(0, MOST), pages=st.integers(1, 6))
    def write(self, lane: int, first: int, pages: int) -> None:
        self.seed += 1
        self.change(lane, Command.WRITE, first, pages, content(self.seed))

    @rule(lane=LANES, first=st.integers(0, MOST), pages=st.integers(1, 12))
    def trim(self, lane: int, first: int, pages: int) -> None:
        self.change(lane, Command.TRIM, first, pages, _ZEROS)

    @rule(lane=LANES, first=st.integers(0, MOST), pages=st.integers(1, 12))
    def cache(self, lane: int, first: int, pages: int) -> None:
        first, pages = self.span(lane, first, pages)
        self.send(lane, Command.CACHE, first, pages)
        self.flying[-1].command = Command.CACHE
        self.flying[-1].pages = 0  # changes nothing

    @rule(lane=LANES, page=st.integers(0, MOST), low=st.integers(1, 4000), size=st.integers(1, 90))
    def write_part(self, lane: int, page: int, low: int, size: int) -> None:
        page, _ = self.span(lane, page, 1)
        if self.changing(page, 1) or len(self.held[page]) != 1:
            return
        (old,) = self.held[page]
        self.seed += 1
        part = bytes([self.seed % 255 + 1]) * size
        new = old[:low] + part + old[low + size :]
        cookie = self.clients[lane].send(Command.WRITE, page * PAGE_BYTES + low, size, payload=part)
        self.flying.append(Flying(lane, cookie, Command.WRITE, page, 1, new))
        self.held[page].add(new)
        for f in self.flying:
            if f.command == Command.READ and f.first <= page < f.first + f.pages:
                f.may[page - f.first].add(new)

    # --- what happens meanwhile ---

    @rule()
    def ship(self) -> None:
        self.pair.order()

    @precondition(lambda self: self.size < MOST)
    @rule(more=st.integers(1, 4))
    def grow(self, more: int) -> None:
        self.size = min(self.size + more, MOST)
        self.export.grow(self.size * PAGE_BYTES)

    @rule()
    def cut(self) -> None:
        """And mend at once: what was asked for is asked for again, and what is shipped goes again or stays here."""
        self.pair.cut()
        self.pair.connect()

    @rule(lane=LANES)
    def reconnect(self, lane: int) -> None:
        """A client takes its answers and goes without a word; what the other has under way goes on."""
        for f in [f for f in self.flying if f.lane == lane]:
            self.take(f)
        self.clients[lane].close()
        wait_until(lambda: self.export.statistics()["connections"] == 1, "it has gone")
        self.clients[lane] = self.export.connect(structured=lane == 0)
        self.told[lane] = self.size

    # --- answers ---

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 100))
    def answer(self, which: int) -> None:
        self.take(self.flying[which % len(self.flying)])

    def take(self, f: Flying) -> None:
        found: Answer = self.clients[f.lane].wait(f.cookie)
        self.flying.remove(f)
        assert found.error == 0, (f, found)
        if f.command == Command.READ:
            assert len(found.data) == f.pages * PAGE_BYTES
            for n, may in enumerate(f.may):
                assert bytes(found.data[n * PAGE_BYTES : (n + 1) * PAGE_BYTES]) in may, f"page {f.first + n}"
            return
        for page in range(f.first, f.first + f.pages):
            self.held[page] = {f.value}

    @precondition(lambda self: len(self.flying) > 12)
    @rule()
    def answered(self) -> None:
        for f in list(self.flying):
            self.take(f)

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.export.statistics()["pages_lost"] == 0


def test_every_answer_is_explained_by_some_order(pair: Pair) -> None:
    machine = type("Machine", (Connections,), {"pair": pair})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=20, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
