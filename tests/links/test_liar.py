"""A lender that holds our segments and answers what it likes: a page comes back right, or not at all."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.links.conftest import BORROWER, HANDSHAKE_S, LENDER, SEGMENT, MakePair, Pair, page

from ramster.engine.links import BULK, GET, Connection, Links, TlsContext
from ramster.engine.store import Store
from ramster.errors import PageLost, RamsterError
from ramster.testing._together import get_together
from ramster.testing.proxy import wait_until
from ramster.wire import frames
from ramster.wire.frames import HEADER_BYTES, FrameType

HEADER = struct.Struct("<IBBHQIIIIIIII")
GIVE_UP_MS = 300
PAGES = 24
Answer = Callable[[int, list[int]], list[bytes]]


def frame(
    kind: int, status: int, request: int, body: bytes = b"", segment: int = 0, generation: int = 0, credit: int = 9
) -> bytes:
    head = HEADER.pack(
        frames.MAGIC, frames.VERSION, kind, status, request, len(body), credit, segment, generation, 0, 0, 0, 0
    )
    return head[:-4] + struct.pack("<I", frames.crc32c(head[:-4])) + body


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


class Liar:
    """Takes segments as a lender does and answers each GET with what `answer(request, ordinals)` returns."""

    def __init__(self, contexts: dict[int, TlsContext]) -> None:
        self.store = Store(24 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=False, full_wait_ms=0)
        self.links = Links(
            self.store,
            BORROWER,
            lock=False,
            give_up_ms=GIVE_UP_MS,
            request_deadline_ms=60,
            idle_ms=60_000,
            keepalive_ms=20_000,
        )
        self.pool = self.store.create_pool(pages=4096)
        self.image = b""
        self.answer: Answer = self.honest
        self._contexts = contexts
        self._ends: list[Connection] = []
        self._threads: list[threading.Thread] = []
        self._stopping = False
        self.connect()

    def connect(self) -> None:
        for kind in (GET, BULK):
            near, far = socket.socketpair()
            ours = Connection(self._contexts[BORROWER], near.detach(), False)
            liars = Connection(self._contexts[LENDER], far.detach(), True)
            greeting = threading.Thread(target=liars.handshake, args=(HANDSHAKE_S,))
            greeting.start()
            ours.handshake(HANDSHAKE_S)
            greeting.join()
            self.links.attach(ours, LENDER, kind, 7, 100)
            self._ends.append(liars)
            self._threads.append(threading.Thread(target=self._serve, args=(liars,)))
            self._threads[-1].start()

    def _exactly(self, end: Connection, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                data += end.receive(min(size - len(data), 16384), 0.2)
            except RamsterError as error:
                if self._stopping or "in time" not in str(error):
                    raise
        return data

    def _serve(self, end: Connection) -> None:
        try:
            while True:
                head = HEADER.unpack(self._exactly(end, HEADER_BYTES))
                kind, request, length, segment, generation = head[2], head[4], head[5], head[7], head[8]
                body = self._exactly(end, length) if length else b""
                if kind == FrameType.SHIP:
                    self.image = body
                    end.send(frame(FrameType.SHIPPED, 0, request, b"", segment, generation), 5)
                elif kind == FrameType.GET:
                    for piece in self.answer(request, list(struct.unpack(f"<{length // 2}H", body))):
                        end.send(piece, 5)
        except RamsterError:
            pass  # the other side has closed it, as it should

    def entry(self, ordinal: int) -> bytes:
        entries, data_bytes = struct.unpack_from("<II", self.image, 12)
        base = 64 + 2 * entries + -(2 * entries) % 8
        offset = 8 * struct.unpack_from("<H", self.image, 64 + 2 * ordinal)[0]
        length = struct.unpack_from("<H", self.image, base + offset)[0]
        assert offset + 40 + length <= data_bytes
        return self.image[base + offset : base + offset + 40 + length]

    def body(self, entries: list[bytes]) -> bytes:
        table = struct.pack(f"<{len(entries)}H", *(len(each) for each in entries))
        return padded(table) + b"".join(padded(each) for each in entries)

    def honest(self, request: int, ordinals: list[int]) -> list[bytes]:
        return [frame(FrameType.PAGE, 0, request, self.body([self.entry(each) for each in ordinals]))]

    def lend(self) -> None:
        for index in range(PAGES):
            self.store.put(self.pool, index, page(index))
        self.store.seal_open()
        ((segment, generation, *_),) = self.store.coldest(8)
        assert self.links.ship(segment, generation, LENDER)
        wait_until(lambda: self.links.shipping() == 0 and self.links.counters()["bytes_shipped"] > 0, "shipped")
        assert self.store.where(self.pool, 0) == LENDER

    def all(self) -> list[bytes | str]:
        return get_together(self.links, self.pool, list(range(PAGES)))

    def close(self) -> None:
        self._stopping = True
        self.links.stop()
        for each in self._threads:
            each.join()
        for end in self._ends:
            end.close()
        self.store.verify()
        self.store.close()


@pytest.fixture
def liar(contexts: dict[int, TlsContext]) -> Iterator[Liar]:
    made = Liar(contexts)
    made.lend()
    yield made
    made.close()


def test_the_pages_of_one_segment_come_in_one_reply(liar: Liar) -> None:
    asked: list[list[int]] = []

    def count(request: int, ordinals: list[int]) -> list[bytes]:
        asked.append(ordinals)
        return liar.honest(request, ordinals)

    liar.answer = count
    assert liar.all() == [page(index) for index in range(PAGES)]
    assert asked == [list(range(PAGES))]
    assert liar.links.counters()["remote_gets"] == PAGES


def test_one_entry_that_is_missing_or_spoilt_costs_that_page_alone(liar: Liar) -> None:
    def some(request: int, ordinals: list[int]) -> list[bytes]:
        entries = [liar.entry(each) for each in ordinals]
        entries[3] = b""
        entries[5] = entries[5][:-1] + bytes([entries[5][-1] ^ 1])
        entries[7], entries[8] = entries[8], entries[7]
        return [frame(FrameType.PAGE, 0, request, liar.body(entries))]

    liar.answer = some
    got = liar.all()
    assert [got[index] for index in (3, 5, 7, 8)] == ["corrupt"] * 4
    assert all(got[index] == page(index) for index in range(PAGES) if index not in (3, 5, 7, 8))
    assert [(each["number"], each["damaged"]) for each in liar.links.peers()] == [(LENDER, 4)], "who it was is known"


def test_a_page_overwritten_meanwhile_is_looked_at_again_and_its_neighbours_are_used(liar: Liar) -> None:
    def overwrite(request: int, ordinals: list[int]) -> list[bytes]:
        liar.store.put(liar.pool, 4, page(4 + 100_000))
        assert liar.store.flush_page(liar.pool, 6)
        return liar.honest(request, ordinals)

    liar.answer = overwrite
    got = liar.all()
    assert got[4] == got[6] == "busy"
    assert all(got[index] == page(index) for index in range(PAGES) if index not in (4, 6))
    assert liar.links.get(liar.pool, 4) == page(4 + 100_000)


def test_a_segment_that_the_lender_denies_is_lost(liar: Liar) -> None:
    liar.answer = lambda request, ordinals: [frame(FrameType.PAGE, 1, request)]
    assert liar.all() == ["lost"] * PAGES
    with pytest.raises(PageLost):
        liar.links.get(liar.pool, 0)


def test_silence_has_a_deadline_and_the_late_answer_finds_nobody(liar: Liar) -> None:
    held: list[tuple[int, list[int]]] = []

    def hold(request: int, ordinals: list[int]) -> list[bytes]:
        held.append((request, ordinals))
        return []

    liar.answer = hold
    assert liar.all() == ["unreachable"] * PAGES
    assert len(held) > 1, "asked again after request_deadline"
    late = [piece for request, ordinals in held for piece in liar.honest(request, ordinals)]

    def at_last(request: int, ordinals: list[int]) -> list[bytes]:
        return [*late, *liar.honest(request, ordinals)]

    liar.answer = at_last
    assert liar.all() == [page(index) for index in range(PAGES)]
    assert liar.links.counters()["late_replies"] == len(held)


def test_a_request_given_up_with_half_of_its_reply_received_leaves_its_memory_alone(liar: Liar) -> None:
    """The rest comes when the staging memory may be somebody else's: it goes nowhere."""
    rest: list[bytes] = []

    def half(request: int, ordinals: list[int]) -> list[bytes]:
        whole = liar.honest(request, ordinals)[0]
        assert len(whole) > 16384, "large enough to be received in place"
        rest.append(whole[len(whole) // 2 :])
        liar.answer = lambda request, ordinals: []
        return [whole[: len(whole) // 2]]

    liar.answer = half
    assert liar.all() == ["unreachable"] * PAGES
    liar.answer = lambda request, ordinals: [rest[0], *liar.honest(request, ordinals)]
    assert liar.all() == [page(index) for index in range(PAGES)]


def test_a_link_cut_in_the_middle_of_a_reply_asks_again_on_the_next(liar: Liar) -> None:
    def half(request: int, ordinals: list[int]) -> list[bytes]:
        whole = liar.honest(request, ordinals)[0]
        liar.answer = liar.honest
        threading.Thread(target=reconnect).start()
        return [whole[: len(whole) // 2]]

    def reconnect() -> None:
        liar.links.detach(LENDER)
        wait_until(lambda: not liar.links.up(LENDER, GET) and not liar.links.up(LENDER, BULK), "down")
        liar.connect()

    liar.answer = half
    assert liar.all() == [page(index) for index in range(PAGES)]
    wait_until(lambda: liar.links.up(LENDER, GET) and liar.links.up(LENDER, BULK), "up again")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_shape_the_reply_has_a_page_is_right_or_reported(liar: Liar, data: st.DataObject) -> None:
    wrong = data.draw(st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(0, 65535)), max_size=3))
    cut = data.draw(st.one_of(st.none(), st.integers(0, 60_000)))
    more = data.draw(st.integers(0, 64))
    flips = data.draw(st.lists(st.integers(0, 60_000), max_size=3))
    status = data.draw(st.sampled_from([0, 0, 0, 2, 3]))

    def lie(request: int, ordinals: list[int]) -> list[bytes]:
        entries = [liar.entry(each) for each in ordinals]
        sizes = [len(each) for each in entries]
        for place, size in wrong:
            sizes[place] = size
        table = padded(struct.pack(f"<{len(sizes)}H", *sizes))
        spoilt = bytearray((table + b"".join(padded(each) for each in entries))[:cut] + bytes(more))
        for place in flips:
            if place < len(spoilt):
                spoilt[place] ^= 0x41
        return [frame(FrameType.PAGE, status, request, bytes(spoilt))]

    liar.answer = lie
    got = liar.all()
    assert all(each == "corrupt" or each == page(index) for index, each in enumerate(got))
    liar.answer = liar.honest
    assert liar.all() == [page(index) for index in range(PAGES)]


def test_a_lender_that_never_says_what_it_has_forgotten_gets_no_more(liar: Liar) -> None:
    """Each number of a segment is kept from being used again until it does: this one has its share of them."""
    told_max, first = 1024, 1000

    def ship(index: int) -> None:
        liar.store.put(liar.pool, index, page(index))
        liar.store.seal_open()
        ((segment, generation, *_),) = liar.store.coldest(8)
        assert liar.links.ship(segment, generation, LENDER)

    for index in range(first, first + told_max):
        ship(index)
        wait_until(lambda index=index: liar.store.where(liar.pool, index) == LENDER, "shipped")  # type: ignore[misc]
        liar.store.flush_page(liar.pool, index)
    wait_until(lambda: liar.links.counters()["frees_sent"] == told_max, "told")
    ship(first)
    wait_until(lambda: liar.links.shipping() == 0, "given up")
    assert liar.store.where(liar.pool, first) != LENDER and liar.links.get(liar.pool, first) == page(first)


def test_requests_that_find_the_lenders_buffer_full_wait_for_room(
    make_pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is asked for at once than the send buffer of the lender holds, while the borrower does not read.
    Nothing would be asked twice in this test: what the lender dropped would be out of reach."""
    pair: Pair = make_pair(segments=64, lend=48, give_up_ms=10_000, request_deadline_ms=60_000)
    per_segment = 24
    everywhere = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(everywhere)})  # each processor has an open segment of its own
    for first in range(0, 40 * per_segment, per_segment):
        pair.put(*range(first, first + per_segment))
        pair.ship()
    os.sched_setaffinity(0, everywhere)
    pair.get.down.hold()
    gets = [
        threading.Thread(target=together, args=(pair, first, per_segment))
        for _ in range(5)
        for first in range(0, 40 * per_segment, per_segment)
    ]
    failures: list[BaseException] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failures.append(args.exc_value))
    for each in gets:
        each.start()
    wait_until(lambda: bool(failures) or pair.pending() == len(gets), "everything is under way")
    assert not failures
    pair.get.down.release()
    for each in gets:
        each.join()
    assert not failures


def together(pair: Pair, first: int, count: int) -> None:
    got = get_together(pair.a.links, pair.pool, list(range(first, first + count)))
    assert got == [page(index) for index in range(first, first + count)]
