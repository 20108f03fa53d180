"""Puts, gets, flushes, pushes, cleaning and cut links at once: the latest put wins, stored = live on both sides."""

from __future__ import annotations

import contextlib
import random
import threading
import time

import pytest
from tests.links.conftest import LENDER, MakePair, Pair, page

from ramster.engine.links import BULK, GET
from ramster.errors import StoreFull
from ramster.testing.proxy import wait_until

KEYS = 150
WRITERS = 4
SECONDS = 2.0


class Writer(threading.Thread):
    """The only one who changes its keys: what it reads must be what it wrote last."""

    def __init__(self, pair: Pair, number: int, until: float) -> None:
        super().__init__()
        self.pair = pair
        self.number = number
        self.until = until
        self.dice = random.Random(number)
        self.held: dict[int, int] = {}
        self.operations = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while time.monotonic() < self.until:
                self.step()
                self.operations += 1
        except BaseException as error:
            self.failure = error

    def step(self) -> None:
        index = self.number * KEYS + self.dice.randrange(KEYS)
        action = self.dice.random()
        if action < 0.45:
            version = self.dice.randrange(1, 10**9)
            with contextlib.suppress(StoreFull):  # what was there before stays
                self.pair.a.store.put(self.pair.pool, index, page(version))
                self.held[index] = version
        elif action < 0.55:
            assert self.pair.a.store.flush_page(self.pair.pool, index) == (index in self.held)
            self.held.pop(index, None)
        elif action < 0.65:
            self.expect(index, self.pair.fetch(index, mode=1))
            self.held.pop(index, None)
        else:
            self.expect(index, self.pair.fetch(index))

    def expect(self, index: int, found: bytes | None) -> None:
        wanted = self.held.get(index)
        assert found == (None if wanted is None else page(wanted)), f"page {index}"


@pytest.mark.parametrize("cuts", [False, True], ids=["steady", "cut"])
def test_everything_at_once(make_pair: MakePair, cuts: bool) -> None:
    pair = make_pair(segments=32, lend=24, cleaner=1, request_deadline_ms=200, give_up_ms=60_000)
    until = time.monotonic() + SECONDS
    writers = [Writer(pair, number, until) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    dice = random.Random(7)
    cut = 0
    while time.monotonic() < until:
        if dice.random() < 0.5:
            pair.a.store.seal_open()
        for segment, generation, *_ in pair.a.store.coldest(dice.randrange(1, 12)):
            pair.a.links.ship(segment, generation, LENDER)
        if dice.random() < 0.3:
            pair.a.store.clean(2)
        if cuts and dice.random() < 0.3:
            kind = dice.choice([GET, BULK])
            (pair.get, pair.bulk)[kind].cut()
            wait_until(lambda kind=kind: not pair.a.links.up(LENDER, kind) and not pair.b.links.up(1, kind), "down")  # type: ignore[misc]
            pair.connect(kind)
            cut += 1
        time.sleep(dice.random() * 0.01)  # paces the chaos; nothing waits for it
    for writer in writers:
        writer.join()
        if writer.failure is not None:
            raise writer.failure
    assert all(writer.operations > 100 for writer in writers)
    pair.settle()
    wait_until(
        lambda: pair.b.lent_used() == pair.a.store.statistics().segments_remote,
        f"one frame for each remote segment, not {pair.b.lent_used()} for {pair.a.store.statistics().segments_remote}",
    )
    pair.a.store.verify()
    statistics = pair.a.store.statistics()
    assert statistics.pages_stored == sum(len(writer.held) for writer in writers)
    assert statistics.shipped_segments > 10 and statistics.pages_lost == 0
    for writer in writers:
        for index in range(writer.number * KEYS, (writer.number + 1) * KEYS):
            writer.expect(index, pair.fetch(index))
            pair.a.store.flush_page(pair.pool, index)
    pair.wait_for_frees(0)
    pair.a.store.verify()
    assert not cuts or cut > 3
