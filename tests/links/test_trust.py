"""A borrower with a good lender, and others that claim much room and refuse, or take segments and never answer."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from tests.links.conftest import BORROWER, HANDSHAKE_S, LENDER, page
from tests.links.test_liar import HEADER, frame

from ramster.engine.links import BULK, GET, Connection, TlsContext
from ramster.errors import RamsterError, StoreFull
from ramster.remotify.policy import Lender, Policy, Settings
from ramster.remotify.worker import Worker
from ramster.testing.engines import Side, Wire
from ramster.testing.proxy import wait_until
from ramster.wire.frames import HEADER_BYTES, FrameType

CLAIMED = 1_000_000
PAGES = 4000
FULL = 2


class Refuser:
    """Reads what it is sent, and answers each SHIP with a refusal, or not at all."""

    def __init__(self, borrower: Side, number: int, context: TlsContext, answers: bool) -> None:
        self._answers = answers
        self._ends: list[Connection] = []
        self.asked = 0
        self.accepts = False
        for kind in (GET, BULK):
            near, far = socket.socketpair()
            ours = Connection(borrower.context, near.detach(), False)
            theirs = Connection(context, far.detach(), True)
            greeting = threading.Thread(target=theirs.handshake, args=(HANDSHAKE_S,))
            greeting.start()
            ours.handshake(HANDSHAKE_S)
            greeting.join()
            borrower.links.attach(ours, number, kind, 7, CLAIMED)
            self._ends.append(theirs)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self._ends[BULK].receive(min(size - len(data), 16384), 60)
        return data

    def _serve(self) -> None:
        with contextlib.suppress(RamsterError):
            while True:
                head = HEADER.unpack(self._exactly(HEADER_BYTES))
                if head[5]:
                    self._exactly(head[5])
                if head[2] == FrameType.SHIP:
                    self.asked += 1
                    if self._answers:
                        status = 0 if self.accepts else FULL
                        answer = frame(FrameType.SHIPPED, status, head[4], b"", head[7], head[8], CLAIMED)
                        self._ends[BULK].send(answer, 5)

    def close(self) -> None:
        self._thread.join()
        for each in self._ends:
            each.close()


class Borrower:
    def __init__(self, contexts: dict[int, TlsContext]) -> None:
        self.contexts = contexts
        self.side = Side(BORROWER, contexts[BORROWER], 32, 0, full_wait_ms=10_000)
        self.pool = self.side.store.create_pool(pages=4096)
        self.policy = Policy(Settings(cold_after_ms=0))
        self.worker = Worker(self.side.store, self.side.links, self.policy, 10)
        self.good: tuple[Side, Wire] | None = None
        self.refusers: list[Refuser] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def lend(self) -> None:
        side = Side(LENDER, self.contexts[LENDER], 8, 200)
        wire = Wire(self.side, side)
        wire.connect()
        self.good = side, wire

    def add(self, number: int, answers: bool) -> Refuser:
        # The engine has no opinion of certificates: the shell has looked at them.
        self.refusers.append(Refuser(self.side, number, self.contexts[LENDER], answers))
        return self.refusers[-1]

    def start(self) -> None:
        self._thread.start()

    def _work(self) -> None:
        while not self._stopping.is_set():
            self.worker.step()
            time.sleep(0.002)

    def row(self, number: int) -> Lender:
        return next(each for each in (Lender(*row) for row in self.side.links.lenders()) if each.number == number)

    def close(self) -> None:
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.side.links.stop()
        for each in self.refusers:
            each.close()
        if self.good is not None:
            side, wire = self.good
            wire.close()
            side.stop()
        self.side.store.verify()
        self.side.store.close()


@pytest.fixture
def borrower(contexts: dict[int, TlsContext]) -> Iterator[Borrower]:
    made = Borrower(contexts)
    yield made
    made.close()


@pytest.mark.parametrize("answers", [True, False], ids=["refuse", "silent"])
@pytest.mark.parametrize("count", [1, 4])
def test_liars_do_not_starve_a_borrower_that_has_a_good_lender(borrower: Borrower, answers: bool, count: int) -> None:
    borrower.lend()
    liars = [borrower.add(10 + n, answers) for n in range(count)]
    borrower.start()
    for index in range(PAGES):
        borrower.side.store.put(borrower.pool, index, page(index))
    words = "it refused" if answers else "it does not answer"
    for number in range(10, 10 + count):
        wait_until(lambda number=number: words in borrower.policy.trust.word(number), "it is not believed")  # type: ignore[misc]
    assert borrower.policy.trust.word(LENDER) == "trusted"
    assert sum(each.asked for each in liars) < 40 * count, "a handful, and then one at a time"
    assert borrower.side.store.statistics().segments_remote > 20
    for index in range(0, PAGES, 37):
        assert borrower.side.links.get(borrower.pool, index) == page(index)


def test_one_that_changes_its_mind_is_believed_again(borrower: Borrower) -> None:
    liar = borrower.add(10, answers=True)
    borrower.start()
    index = 0
    with contextlib.suppress(StoreFull):
        while borrower.policy.trust.level(10) < 2:
            borrower.side.store.put(borrower.pool, index, page(index))
            index += 1
    wait_until(lambda: borrower.policy.trust.level(10) >= 2, "it is not believed")
    assert borrower.side.store.statistics().segments_remote == 0
    liar.accepts = True
    wait_until(lambda: borrower.policy.trust.word(10) == "trusted", "it is believed again", 60)
    assert borrower.side.store.statistics().segments_remote > 0


def test_however_many_stand_still_others_find_room_for_orders(borrower: Borrower) -> None:
    borrower.side.links.stop()
    borrower.side.store.close()
    borrower.side = Side(BORROWER, borrower.contexts[BORROWER], 720, 0)
    borrower.pool = borrower.side.store.create_pool(pages=20_000)
    silent = [borrower.add(10 + n, answers=False) for n in range(12)]
    borrower.lend()
    for index in range(19_000):
        borrower.side.store.put(borrower.pool, index, page(index))
    borrower.side.store.seal_open()
    segments = [(number, generation) for number, generation, *_ in borrower.side.store.coldest(720)]
    taken = iter(segments[:-1])
    ordered = [0] * len(silent)
    for n in range(len(silent)):
        for _ in range(200):
            segment, generation = next(taken)
            if not borrower.side.links.ship(segment, generation, 10 + n):
                break
            ordered[n] += 1
    assert ordered[0] >= 64
    segment, generation = segments[-1]
    assert borrower.side.links.ship(segment, generation, LENDER)
    wait_until(lambda: borrower.row(LENDER).accepted == 1, "it passed all of them")
