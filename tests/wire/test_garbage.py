"""Garbage on the port, with and without a certificate: closed, counted, and nothing else happens."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ramster.cluster import identity
from ramster.config.knobs import Address, Peer
from ramster.config.knobs import Links as LinkSettings
from ramster.engine.links import BULK, GET, Connection, Links, TlsContext
from ramster.engine.store import Store
from ramster.errors import RamsterError
from ramster.node.credentials import Credentials
from ramster.node.peering import Peering
from ramster.testing.proxy import wait_until
from ramster.wire import frames, hello
from ramster.wire.frames import HEADER, FrameType

SEGMENT = 65536
REPLY_BYTES_MAX = 128 + 64 * 4160
TIMEOUT_S = 10.0
ASKED_MAX = 3  # pages in one request: more can outgrow what a connection takes during its handshake
FEW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def header(**changed: int) -> bytes:
    """A header with a right checksum, whatever it says."""
    values = dict.fromkeys((field.name for field in HEADER), 0)
    values |= {"magic": frames.MAGIC, "version": frames.VERSION} | changed
    packed = struct.pack("<IBBHQIIIIIII", *[values[field.name] for field in HEADER[:-1]])
    return packed + struct.pack("<I", frames.crc32c(packed))


class Served:
    """A lender (number 1) with its peering on a loop of its own, and the certificates of the peers that may come.

    A peer that is cut off may come back at once, unless `shut_out_ms` says otherwise; other options are those of Links.
    """

    def __init__(
        self,
        directory: Path,
        shut_out_ms: Callable[[int, int], int] = lambda faults, since_ms: 0,
        **options: Any,
    ) -> None:
        lender, *others = identity.create_cluster(directory, "wire", ["lender", "good", "bad"])
        self.contexts = [TlsContext(str(f.ca), str(f.cert), str(f.key)) for f in others]
        self.store = Store(8 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=False)
        self.links = Links(
            self.store, 1, lend_bytes=8 * SEGMENT, lock=False, idle_ms=60_000, keepalive_ms=20_000, **options
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        nowhere = Address("127.0.0.1", 1)
        self.peering = Peering(
            self.links,
            Credentials(lender, "wire", "lender"),
            lambda kind, _peer: self.hello("lender", 1, kind),
            (Peer(name="good", number=2, address=nowhere), Peer(name="bad", number=3, address=nowhere)),
            LinkSettings(listen=Address("127.0.0.1", 0)),
            1,
            60_000,
            shut_out_ms=shut_out_ms,
        )
        asyncio.run_coroutine_threadsafe(self.peering.start(), self._loop).result(TIMEOUT_S)
        assert self.peering.address is not None
        self.address = self.peering.address

    @staticmethod
    def hello(name: str, number: int, kind: str) -> hello.Hello:
        return hello.Hello(
            cluster="wire",
            name=name,
            number=number,
            generation=number,
            kind="get" if kind == "get" else "bulk",
            segment_bytes=SEGMENT,
        )

    def dial(self) -> socket.socket:
        sock = socket.create_connection(self.address, TIMEOUT_S)
        sock.settimeout(TIMEOUT_S)
        return sock

    def tls(self, who: int) -> Connection:
        connection = Connection(self.contexts[who - 2], self.dial().detach(), False)
        connection.handshake(TIMEOUT_S)
        return connection

    def attached(self, who: int, kind: str) -> Connection:
        """A connection that has been through the handshake and belongs to the lender's reactor now."""
        connection = self.tls(who)
        name = ("good", "bad")[who - 2]
        connection.send(frames.pack(FrameType.HELLO, hello.encode(self.hello(name, who, kind))), TIMEOUT_S)
        answer, length = frames.unpack(connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
        assert answer == FrameType.HELLO
        connection.receive(length, TIMEOUT_S)
        wait_until(lambda: self.links.up(who, GET if kind == "get" else BULK), "attached")
        return connection

    def still_serves(self, connection: Connection) -> None:
        """The good peer's connection answers as before."""
        connection.send(header(type=FrameType.PING, request=77), TIMEOUT_S)
        answer = connection.receive(frames.HEADER_BYTES, TIMEOUT_S)
        assert struct.unpack_from("<BBHQ", answer, 4) == (frames.VERSION, FrameType.PONG, 0, 77)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.peering.close(), self._loop).result(TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        assert self.links.counters()["lent_free"] == 8, "every granted frame is back"
        self.links.stop()
        self.store.verify()
        self.store.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    node = Served(tmp_path_factory.mktemp("wire"))
    yield node
    node.close()


@pytest.fixture(scope="module")
def good(served: Served) -> Iterator[Connection]:
    connection = served.attached(2, "bulk")
    yield connection
    connection.close()
    wait_until(lambda: not served.links.up(2, BULK), "gone")


def closed(sock: socket.socket) -> bool:
    """Reads to the end."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    sock.close()
    return True


@FEW
@given(data=st.one_of(st.binary(min_size=1, max_size=2000), st.just(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")))
def test_no_tls_at_all(served: Served, good: Connection, data: bytes) -> None:
    before = served.peering.counters.garbage_connections
    sock = served.dial()
    with contextlib.suppress(OSError):  # it may have been closed before all of that was said
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    assert closed(sock)
    wait_until(lambda: served.peering.counters.garbage_connections == before + 1, "counted")
    served.still_serves(good)


@FEW
@given(data=st.data())
def test_a_certificate_and_a_spoilt_hello(served: Served, good: Connection, data: st.DataObject) -> None:
    frame = bytearray(frames.pack(FrameType.HELLO, hello.encode(served.hello("bad", 3, "get"))))
    kind = data.draw(st.sampled_from(["noise", "header", "body", "type", "name"]))
    if kind == "noise":
        frame = bytearray(data.draw(st.binary(min_size=frames.HEADER_BYTES, max_size=400)))
    elif kind == "header":
        bit = data.draw(st.integers(0, frames.HEADER_BYTES * 8 - 1))
        frame[bit // 8] ^= 1 << bit % 8
    elif kind == "body":
        frame = bytearray(frames.pack(FrameType.HELLO, data.draw(st.binary(max_size=400))))
    elif kind == "type":
        other = data.draw(st.sampled_from([each for each in FrameType if each is not FrameType.HELLO]))
        frame = bytearray(frames.pack(other, bytes(frame[frames.HEADER_BYTES :])))
    else:
        frame = bytearray(frames.pack(FrameType.HELLO, hello.encode(served.hello("good", 2, "get"))))
    before = served.peering.counters.refused_connections
    connection = served.tls(3)
    connection.send(bytes(frame), TIMEOUT_S)
    wait_until(lambda: served.peering.counters.refused_connections == before + 1, f"counted: {kind}")
    connection.close()
    assert not served.links.up(3, GET) and not served.links.up(2, GET)
    served.still_serves(good)


@pytest.mark.parametrize("kind", ["get", "bulk"])
@settings(FEW, max_examples=30)
@given(data=st.data())
def test_a_known_peer_that_breaks_the_protocol(
    served: Served, good: Connection, kind: str, data: st.DataObject
) -> None:
    number = GET if kind == "get" else BULK
    numbers = st.integers(0, 2**32 - 1)
    small = st.one_of(st.integers(0, 20), numbers)
    what = data.draw(st.sampled_from(["noise", "bit", "type", "length"]))
    if what == "noise":
        bad = data.draw(st.binary(min_size=frames.HEADER_BYTES, max_size=500))
    elif what == "bit":
        spoilt = bytearray(header(type=FrameType.PING))
        bit = data.draw(st.integers(0, frames.HEADER_BYTES * 8 - 1))
        spoilt[bit // 8] ^= 1 << bit % 8
        bad = bytes(spoilt)
    elif what == "type":
        allowed = {3, 4, 5, 6} if kind == "get" else {3, 4, 7, 8, 9, 10, 11, 13}
        wrong = data.draw(st.integers(0, 255).filter(lambda n: n not in allowed))
        bad = header(type=wrong, segment=data.draw(small))
    else:
        wrong, length = data.draw(
            st.one_of(
                st.tuples(st.just(3), st.integers(1, 2**32 - 1)),
                st.tuples(st.just(6), st.integers(REPLY_BYTES_MAX + 1, 2**32 - 1))
                if kind == "get"
                else st.tuples(st.just(7), st.integers(SEGMENT + 1, 2**32 - 1)),
                st.tuples(st.just(5), st.integers(0, 2**32 - 1).filter(lambda n: n % 2 or not 0 < n <= 128))
                if kind == "get"
                else st.tuples(st.just(9), st.integers(1, 2**32 - 1)),
            )
        )
        bad = header(type=wrong, length=length)
    # What is allowed and makes no sense comes first: it is answered or ignored.
    sense = []
    for _ in range(data.draw(st.integers(0, 4))):
        request, segment, generation = data.draw(numbers), data.draw(small), data.draw(small)
        allowed_type = data.draw(st.sampled_from([3, 4, 5] if kind == "get" else [3, 4, 8, 9, 10, 13]))
        ordinals = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=64)) if allowed_type == 5 else []
        body = struct.pack(f"<{len(ordinals)}H", *ordinals)
        sense.append(
            header(
                type=allowed_type,
                status=data.draw(st.integers(0, 5)),
                request=request,
                segment=segment,
                generation=generation,
                handle=data.draw(small),
                credit=data.draw(numbers),
                length=len(body),
            )
            + body
        )
    before = served.links.counters()["protocol_errors"]
    connection = served.attached(3, kind)
    connection.send(b"".join(sense) + bad, TIMEOUT_S)
    wait_until(lambda: served.links.counters()["protocol_errors"] == before + 1, "counted")
    wait_until(lambda: not served.links.up(3, number), "closed")
    with pytest.raises(RamsterError):
        while True:
            connection.receive(1, TIMEOUT_S)
    connection.close()
    peer = next(row for row in served.links.peers() if row["number"] == 3)
    assert peer["reason"] == "the peer broke the protocol"
    served.still_serves(good)


@FEW
@given(data=st.data())
def test_a_segment_that_is_none_is_not_kept(served: Served, good: Connection, data: st.DataObject) -> None:
    """SHIP with any body: answered as bad (or kept, if it happens to be well formed), never more than its frame."""
    length = data.draw(st.integers(64, SEGMENT))
    segment, generation = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**14 - 1))
    image = bytearray(random.Random(data.draw(st.integers())).randbytes(length))
    if data.draw(st.booleans()):
        entries, size = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(0, 2**32 - 1))
        struct.pack_into("<IIIII", image, 0, 0x4C455352, segment, generation, entries, size)
    served_before = served.links.counters()["segments_received"]
    good.send(
        header(type=FrameType.SHIP, request=9, length=length, segment=segment, generation=generation) + image, TIMEOUT_S
    )
    answer = good.receive(frames.HEADER_BYTES, TIMEOUT_S)
    assert struct.unpack_from("<BHQ", answer, 5) == (FrameType.SHIPPED, 3, 9)
    assert served.links.counters()["segments_received"] == served_before
    assert served.links.foreign() == {}
    served.still_serves(good)


def test_a_silent_stranger_is_shown_out(served: Served, good: Connection) -> None:
    """Several at once: handshakes are bounded in number and in time, and others are served meanwhile."""
    with ThreadPoolExecutor(4) as pool:
        strangers = [served.dial() for _ in range(4)]
        served.still_serves(good)
        assert all(pool.map(closed, strangers))


# --- what a lender makes of orders to compact -------------------------------------------------------------------------


def image_of(sizes: list[int], generation: int, swap: bool = False) -> tuple[bytes, list[bytes]]:
    """An image with one entry for each size of payload, and the entries."""
    entries = [
        struct.pack("<HBBI", size, 1, 0, n) + random.Random(n).randbytes(32 + size) for n, size in enumerate(sizes)
    ]
    padded = [entry + bytes(-len(entry) % 8) for entry in entries]
    offsets = [sum(map(len, padded[:n])) // 8 for n in range(len(padded))]
    if swap:
        offsets[0], offsets[1] = offsets[1], offsets[0]
    directory = struct.pack(f"<{len(offsets)}H", *offsets)
    body = directory + bytes(-len(directory) % 8) + b"".join(padded)
    size = sum(map(len, padded))
    return struct.pack("<IIIII44x", 0x4C455352, 5, generation, len(sizes), size) + body, entries


def reply_of(entries: list[bytes]) -> bytes:
    """The body of a PAGE with these entries; an empty one cannot be had."""
    table = struct.pack(f"<{len(entries)}H", *(len(entry) for entry in entries))
    return b"".join(piece + bytes(-len(piece) % 8) for piece in (table, *entries))


def ask(connection: Connection, kind: FrameType, body: bytes, **fields: int) -> tuple[int, dict[str, int], bytes]:
    """(type of the answer, its fields, its body)."""
    connection.send(header(type=kind, length=len(body), **fields) + body, TIMEOUT_S)
    answer = struct.unpack("<IBBHQIIIIIIII", connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
    values = dict(zip((field.name for field in HEADER), answer, strict=True))
    return values["type"], values, connection.receive(values["length"], TIMEOUT_S) if values["length"] else b""


def bitmap(live: list[bool]) -> bytes:
    return bytes(sum(1 << i for i in range(8) if n + i < len(live) and live[n + i]) for n in range(0, len(live), 8))


@pytest.fixture(scope="module")
def good_get(served: Served) -> Iterator[Connection]:
    connection = served.attached(2, "get")
    yield connection
    connection.close()
    wait_until(lambda: not served.links.up(2, GET), "gone")


@FEW
@given(
    entries=st.lists(st.tuples(st.integers(0, 4120), st.booleans(), st.booleans()), min_size=1, max_size=14),
    generation=st.integers(1, 2**14 - 1),
)
def test_compacting_keeps_what_is_live_and_nothing_else(
    served: Served, good: Connection, good_get: Connection, entries: list[tuple[int, bool, bool]], generation: int
) -> None:
    """Two orders in a row, the second with fewer live ones, then the second one again."""
    image, wanted = image_of([size for size, _, _ in entries], generation)
    name = {"segment": 5, "generation": generation}
    free = served.links.counters()["lend_bytes"]
    wait_until(lambda: served.links.counters()["lent_bytes_free"] == free, "nothing is held for those before")
    _, answer, _ = ask(good, FrameType.SHIP, image, request=1, **name)
    assert answer["status"] == 0
    first = [live for _, live, _ in entries]
    second = [live and again for _, live, again in entries]
    base = (64 + 2 * len(entries) + 7) // 8 * 8
    for live in (first, second, second):
        kind, compacted, _ = ask(good, FrameType.COMPACT, bitmap(live), request=3, **name)
        left = base + sum((len(entry) + 7) // 8 * 8 for entry, keep in zip(wanted, live, strict=True) if keep)
        assert (kind, compacted["status"], compacted["request"]) == (FrameType.COMPACTED, 0, 3)
        assert compacted["left"] == left == served.links.counters()["lent_bytes"]
        assert free - served.links.counters()["lent_bytes_free"] == (left + 8191) // 8192 * 8192
        for begin in range(0, len(live), ASKED_MAX):
            asked = range(begin, min(begin + ASKED_MAX, len(live)))
            ordinals = struct.pack(f"<{len(asked)}H", *asked)
            _, page, body = ask(good_get, FrameType.GET, ordinals, request=2, handle=answer["handle"], **name)
            assert (page["status"], body) == (0, reply_of([wanted[each] if live[each] else b"" for each in asked]))
    ask(good, FrameType.FREE, b"", request=6, **name)
    assert served.links.counters()["lent_bytes_free"] == free
    assert served.links.foreign() == {}


def test_orders_that_name_nothing_or_are_wrong_change_nothing(
    served: Served, good: Connection, good_get: Connection
) -> None:
    """Another generation, another owner, a bitmap of another length, an image whose entries are out of order."""
    image, wanted = image_of([100, 5000, 4000], 7)
    assert len(wanted[1]) > 4160, "one that cannot be sent, but must not do any harm"
    name = {"segment": 5, "generation": 7}
    _, answer, _ = ask(good, FrameType.SHIP, image, **name)
    bad = served.attached(3, "bulk")
    for connection, generation, body, status in (
        (good, 6, b"\0", 1),
        (good, 8, b"\0", 1),
        (bad, 7, b"\0", 1),
        (good, 7, b"\0\0", 3),
    ):
        _, compacted, _ = ask(connection, FrameType.COMPACT, body, segment=5, generation=generation)
        assert (compacted["type"], compacted["status"], compacted["left"]) == (FrameType.COMPACTED, status, 0)
    bad.close()
    wait_until(lambda: not served.links.up(3, BULK), "gone")
    assert served.links.counters()["lent_bytes"] == len(image)
    for ordinal in (0, 2):
        _, page, body = ask(good_get, FrameType.GET, struct.pack("<H", ordinal), handle=answer["handle"], **name)
        assert (page["status"], body) == (0, reply_of([wanted[ordinal]]))
    swapped, _ = image_of([100, 200], 7, swap=True)
    ask(good, FrameType.SHIP, swapped, **name)
    _, compacted, _ = ask(good, FrameType.COMPACT, b"\1", **name)
    assert compacted["status"] == 3 and served.links.counters()["lent_bytes"] == len(swapped)
    ask(good, FrameType.FREE, b"", **name)
    assert served.links.foreign() == {}


@FEW
@given(data=st.data())
def test_an_image_of_noise_can_be_compacted_without_harm(served: Served, good: Connection, data: st.DataObject) -> None:
    """Lengths and offsets in it are anything: the answer is done or bad, and every block comes back."""
    free = served.links.counters()["lend_bytes"]
    wait_until(lambda: served.links.counters()["lent_bytes_free"] == free, "nothing is held for those before")
    count = data.draw(st.integers(1, 200))
    base = (64 + 2 * count + 7) // 8 * 8
    length = data.draw(st.integers(base, 40_000))
    image = bytearray(random.Random(data.draw(st.integers())).randbytes(length))
    struct.pack_into("<IIIII", image, 0, 0x4C455352, 5, 9, count, length - base)
    if data.draw(st.booleans()):
        offsets = sorted(random.Random(length).sample(range((length - base) // 8 + count), count))
        struct.pack_into(f"<{count}H", image, 64, *offsets)
        for offset in offsets:
            if base + offset * 8 + 2 <= length:
                struct.pack_into("<H", image, base + offset * 8, data.draw(st.integers(0, 30)))
    body = data.draw(st.binary(min_size=(count + 7) // 8, max_size=(count + 7) // 8))
    _, answer, _ = ask(good, FrameType.SHIP, bytes(image), segment=5, generation=9)
    assert answer["status"] == 0
    _, compacted, _ = ask(good, FrameType.COMPACT, body, segment=5, generation=9)
    assert compacted["status"] in (0, 3)
    assert served.links.counters()["lent_bytes"] == (compacted["left"] if compacted["status"] == 0 else length)
    ask(good, FrameType.FREE, b"", segment=5, generation=9)
    assert served.links.counters()["lent_bytes_free"] == free
