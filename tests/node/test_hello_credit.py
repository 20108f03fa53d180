"""What a node says in its HELLO that it has room for: the borrower's share, and what is left of it."""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Iterator

import pytest

from ramster.engine.links import Connection, TlsContext
from ramster.testing.cluster import Cluster, Node
from ramster.wire import frames, hello
from ramster.wire.frames import HEADER, FrameType

SEGMENT = 65536
SEGMENTS = 64
TIMEOUT_S = 20.0


@pytest.fixture(scope="module")
def lender() -> Iterator[Node]:
    """Lends to `beta` and `gamma`, which do not run."""
    lend = {"lend": {"size": f"{SEGMENTS * SEGMENT >> 20}MiB", "borrower_share": 0.25}}
    with Cluster({"alpha": lend, "beta": {}, "gamma": {}}) as cluster:
        node = cluster["alpha"]
        node.start()
        node.wait(lambda status: status["state"] == "running", "running")
        yield node


def greeted(lender: Node, name: str, number: int, kind: str) -> tuple[Connection, hello.Hello]:
    """A connection of a peer's, and the lender's HELLO."""
    files = lender.config.parent
    context = TlsContext(*(str(files / file) for file in ("ca.crt", f"{name}.crt", f"{name}.key")))
    place = (lender.place.host, lender.place.port)
    connection = Connection(context, socket.create_connection(place, TIMEOUT_S).detach(), False)
    connection.handshake(TIMEOUT_S)
    own = hello.Hello(
        cluster="test",
        name=name,
        number=number,
        generation=number,
        kind="get" if kind == "get" else "bulk",
        segment_bytes=SEGMENT,
    )
    connection.send(frames.pack(FrameType.HELLO, hello.encode(own)), TIMEOUT_S)
    answer, length = frames.unpack(connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
    assert answer == FrameType.HELLO
    return connection, hello.decode_hello(connection.receive(length, TIMEOUT_S))


def ship(connection: Connection, segment: int) -> dict[str, int]:
    """A whole segment with one entry; the answer."""
    data = SEGMENT - 72
    body = struct.pack("<IIIII", 0x4C455352, segment, 1, 1, data) + bytes(44) + struct.pack("<H", 0) + bytes(6)
    body += struct.pack("<H", 900) + random.randbytes(data - 2)
    values = dict.fromkeys((field.name for field in HEADER), 0)
    values |= {"magic": frames.MAGIC, "version": frames.VERSION, "type": FrameType.SHIP, "length": len(body)}
    values |= {"request": 1, "segment": segment, "generation": 1}
    head = struct.pack("<IBBHQIIIIIII", *[values[field.name] for field in HEADER[:-1]])
    connection.send(head + struct.pack("<I", frames.crc32c(head)) + body, TIMEOUT_S)
    answer = struct.unpack("<IBBHQIIIIIIII", connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
    return dict(zip((field.name for field in HEADER), answer, strict=True))


def test_it_is_the_borrowers_share_and_what_is_left_of_it(lender: Node) -> None:
    share = SEGMENTS // 4
    bulk, said = greeted(lender, "beta", 2, "bulk")
    assert said.lend_segments == share, "of what is lent"
    said_so = []
    for segment in range(5):
        answer = ship(bulk, segment)
        assert answer["type"] == FrameType.SHIPPED and answer["status"] == 0
        said_so.append(answer["credit"])
    assert said_so == [share - n for n in range(1, 6)]
    get, said = greeted(lender, "beta", 2, "get")
    assert said.lend_segments == share - 5
    other, said = greeted(lender, "gamma", 3, "bulk")
    assert said.lend_segments == share, "another's share is its own"
    for connection in (bulk, get, other):
        connection.close()
