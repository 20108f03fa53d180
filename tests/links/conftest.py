"""Two nodes' engines in one process, linked by real TLS through fault proxies: `a` borrows from `b`."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ramster.cluster import identity
from ramster.engine.layout import SPILL_FIRST_IMAGE
from ramster.engine.links import BULK, GET, Connection, TlsContext
from ramster.engine.spill import Spill
from ramster.remotify.worker import Worker
from ramster.testing.engines import HANDSHAKE_S, SEGMENT, Relay, Side
from ramster.testing.proxy import wait_until

__all__ = ["HANDSHAKE_S", "SEGMENT", "Relay", "Side"]

BORROWER, LENDER, OTHER_LENDER = 1, 2, 3


def page(seed: int) -> bytes:
    """A page of which about half is left after compression; another seed is another page."""
    return random.Random(seed).randbytes(2048) + b"\x5a" * 2048


class Pair:
    """A borrower `a` and a lender `b`. `get` and `bulk` are the proxies between them; up is from a to b."""

    def __init__(self, a: Side, b: Side) -> None:
        self.a = a
        self.b = b
        self._relays = (Relay(), Relay())
        self.get = self._relays[GET].proxy
        self.bulk = self._relays[BULK].proxy
        self.pool = a.store.create_pool(pages=4096)
        self._tasks = ThreadPoolExecutor(8)
        self.under_way: list[Later] = []

    def connect(self, *kinds: int) -> None:
        for kind in kinds or (GET, BULK):
            dialled, accepted = self._relays[kind].sockets()
            client = Connection(self.a.context, dialled.detach(), False)
            server = Connection(self.b.context, accepted.detach(), True)
            greeting = threading.Thread(target=server.handshake, args=(HANDSHAKE_S,))
            greeting.start()
            client.handshake(HANDSHAKE_S)
            greeting.join()
            credit = int(self.b.links.counters()["lent_free"])
            self.a.links.attach(client, self.b.number, kind, self.b.generation, credit)
            self.b.links.attach(server, self.a.number, kind, self.a.generation, 0)

    def cut(self) -> None:
        self.get.cut()
        self.bulk.cut()
        wait_until(
            lambda: not self.a.links.up(self.b.number, GET) and not self.a.links.up(self.b.number, BULK), "a down"
        )
        wait_until(
            lambda: not self.b.links.up(self.a.number, GET) and not self.b.links.up(self.a.number, BULK), "b down"
        )

    def put(self, *indices: int, version: int = 0) -> None:
        for index in indices:
            self.a.store.put(self.pool, index, page(index + 100_000 * version))

    def order(self) -> int:
        """Seal what is open and order everything that is sealed to be shipped; the number of segments."""
        self.a.store.seal_open()
        segments = self.a.store.coldest(256)
        for segment, generation, *_ in segments:
            assert self.a.links.ship(segment, generation, self.b.number)
        return len(segments)

    def ship(self) -> int:
        """`order`, and wait until all of them are there."""
        n = self.order()
        self.settle()
        return n

    def settle(self) -> None:
        wait_until(lambda: self.a.links.shipping() == 0, "nothing on its way")

    def where(self, index: int) -> object:
        return self.a.store.where(self.pool, index)

    def fetch(self, index: int, mode: int = -1) -> bytes | None:
        return self.a.links.get(self.pool, index, mode=mode)

    def later(self, work: Callable[[], bytes | None]) -> Later:
        return Later(self, work)

    def pending(self) -> int:
        return int(self.a.links.counters()["gets_pending"])

    def expect(self, indices: range, version: int = 0) -> None:
        for index in indices:
            assert self.fetch(index) == page(index + 100_000 * version), f"page {index}"

    def wait_for_frees(self, frames: int) -> None:
        wait_until(lambda: self.b.lent_used() == frames, f"{frames} frames at the lender, not {self.b.lent_used()}")

    def close(self, keep: Side | None = None) -> None:
        """`keep`: a side that belongs to another pair, too, which closes it."""
        self.get.release()
        self.bulk.release()
        self._tasks.shutdown()
        for side in (self.a, self.b):
            if side is keep:
                continue
            side.links.stop()
            side.store.verify()
            side.store.close()
        for relay in self._relays:
            relay.close()


class Later:
    """A call in another thread that is known to be under way once `started` is true."""

    def __init__(self, pair: Pair, work: Callable[[], bytes | None]) -> None:
        pair.under_way = [each for each in pair.under_way if not each.done()]
        # A request that has been answered is counted for a moment longer.
        wait_until(lambda: pair.pending() <= len(pair.under_way), "those that are done are counted no more")
        before = pair.pending()
        pair.under_way.append(self)
        self._future = pair._tasks.submit(work)
        wait_until(lambda: pair.pending() > before or self._future.done(), "the get is under way")

    def done(self) -> bool:
        return self._future.done()

    def result(self) -> bytes | None:
        return self._future.result(30)


@pytest.fixture(scope="session")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> dict[int, TlsContext]:
    directory = tmp_path_factory.mktemp("cluster")
    files = identity.create_cluster(directory, "links", ["a", "b", "c"])
    return {n: TlsContext(str(f.ca), str(f.cert), str(f.key)) for n, f in enumerate(files, 1)}


MakePair = Callable[..., Pair]


@pytest.fixture
def make_pair(contexts: dict[int, TlsContext]) -> Iterator[MakePair]:
    pairs: list[Pair] = []

    def make(*, segments: int = 24, lend: int = 16, connected: bool = True, **options: Any) -> Pair:
        cleaner = options.pop("cleaner", 0)
        times = {"request_deadline_ms": 5000, "give_up_ms": 10_000} | options
        pair = Pair(
            Side(BORROWER, contexts[BORROWER], segments, 0, cleaner=cleaner, **times),
            Side(LENDER, contexts[LENDER], 8, lend, **times),
        )
        pairs.append(pair)
        if connected:
            pair.connect()
        return pair

    yield make
    for pair in pairs:
        pair.close()


@pytest.fixture
def pair(make_pair: MakePair) -> Pair:
    return make_pair()


def size(images: int) -> int:
    """Bytes of a spill file for so many whole segments."""
    return SPILL_FIRST_IMAGE + images * SEGMENT


class stepping:  # noqa: N801 - reads like a verb
    """Decisions in a thread of their own, as the node's loop makes them."""

    def __init__(self, worker: Worker) -> None:
        self._stop = threading.Event()
        self._worker = worker
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            self._worker.step()

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def make_mirrored(make_pair: MakePair, tmp_path: Path) -> Iterator[Callable[..., tuple[Pair, Spill]]]:
    made: list[tuple[Pair, Spill]] = []

    def make(*, images: int = 64, mirror: bool = True, **options: Any) -> tuple[Pair, Spill]:
        pair = make_pair(**options)
        made.append((pair, Spill(pair.a.links, tmp_path / f"mirror{len(made)}", size(images), mirror=mirror)))
        return made[-1]

    yield make
    for pair, spill in made:
        pair.a.links.stop()
        spill.close()


MakeMirrored = Callable[..., tuple[Pair, Spill]]
