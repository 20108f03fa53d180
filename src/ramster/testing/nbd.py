"""An NBD client that does exactly what it is told, wrong things too, and exports of an engine in this process.

Covers the transmission phase: single requests and replies as they are on the wire. The handshake and well-behaved
clients are other tests' (libnbd, QEMU, fio).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from ramster.constants import PAGE_BYTES
from ramster.engine.links import Links, TlsContext
from ramster.engine.nbd import NbdConnection, NbdServer
from ramster.testing.proxy import wait_until
from ramster.wire import nbd
from ramster.wire.nbd import Command, CommandFlag, ReplyFlag, ReplyType

DEADLINE_S: Final = 30.0
ALLOCATION_ID: Final = 7
_REQUEST: Final = struct.Struct(">IHHQQI")
_SIMPLE: Final = struct.Struct(">IIQ")
_CHUNK: Final = struct.Struct(">IHHQI")


@dataclass(slots=True)
class Answer:
    """A whole reply. data: of a read; runs: (length, state) of BLOCK_STATUS; kinds: the types of its chunks."""

    cookie: int
    error: int = 0
    error_offset: int | None = None
    data: bytearray = field(default_factory=bytearray)
    runs: list[tuple[int, int]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """ConnectionError once the server has closed it."""
    data = bytearray()
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise ConnectionError("the server has closed the connection")
        data += more
    return bytes(data)


class NbdClient:
    """One connection, past its handshake. `send` puts a request on the wire, `answer` takes the next reply from it."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        sock.settimeout(DEADLINE_S)
        self._cookies = itertools.count(1)
        self._reads: dict[int, tuple[int, int]] = {}
        self._early: dict[int, Answer] = {}

    def send(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
        magic: int = nbd.REQUEST_MAGIC,
    ) -> int:
        """One request; returns its cookie."""
        cookie = next(self._cookies) | 0xAB << 56
        if command == Command.READ:
            self._reads[cookie] = (offset, length)
        self.socket.sendall(_REQUEST.pack(magic, flags, command, cookie, offset, length) + payload)
        return cookie

    def answer(self) -> Answer:
        """The next reply, whichever request it is for. ConnectionError at the end of the connection."""
        found: Answer | None = None
        while True:
            (magic,) = struct.unpack(">I", head := self._take(4))
            if magic == nbd.SIMPLE_REPLY_MAGIC:
                _, error, cookie = _SIMPLE.unpack(head + self._take(_SIMPLE.size - 4))
                found = Answer(cookie, error)
                if cookie in self._reads and not error:
                    found.data += self._take(self._reads[cookie][1])
                return found
            assert magic == nbd.STRUCTURED_REPLY_MAGIC, hex(magic)
            _, flags, kind, cookie, length = _CHUNK.unpack(head + self._take(_CHUNK.size - 4))
            body = self._take(length)
            if found is None:
                found = Answer(cookie)
            assert cookie == found.cookie, "chunks of two replies are mixed"
            self._read_chunk(found, kind, body)
            if flags & ReplyFlag.DONE:
                return found

    def _read_chunk(self, found: Answer, kind: int, body: bytes) -> None:
        found.kinds.append(kind)
        if kind == ReplyType.OFFSET_DATA:
            assert struct.unpack(">Q", body[:8])[0] == self._reads[found.cookie][0]
            assert len(body) - 8 == self._reads[found.cookie][1]
            found.data += body[8:]
        elif kind == ReplyType.OFFSET_HOLE:
            offset, length = struct.unpack(">QI", body)
            assert (offset, length) == self._reads[found.cookie]
            found.data += bytes(length)
        elif kind == ReplyType.BLOCK_STATUS:
            assert struct.unpack(">I", body[:4])[0] == ALLOCATION_ID
            found.runs += list(struct.iter_unpack(">II", body[4:]))
        elif kind == ReplyType.ERROR_OFFSET:
            found.error, text = struct.unpack(">IH", body[:6])
            (found.error_offset,) = struct.unpack(">Q", body[6 + text :])
        elif kind == ReplyType.ERROR:
            found.error, _ = struct.unpack(">IH", body[:6])
        else:
            assert kind == ReplyType.NONE and not body, f"a chunk of type {kind}"

    def _take(self, size: int) -> bytes:
        return receive_exactly(self.socket, size)

    def wait(self, cookie: int) -> Answer:
        """The reply to one request; others that come first are kept."""
        while cookie not in self._early:
            found = self.answer()
            self._early[found.cookie] = found
        return self._early.pop(cookie)

    def ask(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, payload: bytes = b"") -> Answer:
        return self.wait(self.send(command, offset, length, flags=flags, payload=payload))

    def read(self, offset: int, length: int) -> bytes:
        found = self.ask(Command.READ, offset, length)
        assert found.error == 0, found
        return bytes(found.data)

    def write(self, offset: int, payload: bytes, flags: int = 0) -> None:
        assert self.ask(Command.WRITE, offset, len(payload), flags=flags, payload=payload).error == 0

    def trim(self, offset: int, length: int) -> None:
        assert self.ask(Command.TRIM, offset, length).error == 0

    def zero(self, offset: int, length: int, flags: int = CommandFlag.NO_HOLE) -> None:
        assert self.ask(Command.WRITE_ZEROES, offset, length, flags=flags).error == 0

    def end_sending(self) -> None:
        """Tell the server that no more requests come; replies still do."""
        if isinstance(self.socket, ssl.SSLSocket):
            self.socket.settimeout(0)
            with contextlib.suppress(ssl.SSLWantReadError):  # what the server has to say at its end
                self.socket.unwrap()
            self.socket.settimeout(DEADLINE_S)
        else:
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self.socket.close()


def _tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    return ours, theirs


class ServedExport:
    """An export of `pages` pages over a pool of its own, served in threads of this process."""

    def __init__(
        self,
        links: Links,
        pages: int,
        *,
        max_pages: int | None = None,
        read_only: bool = False,
        slow_threads: int = 2,
    ) -> None:
        self.links = links
        self.store = links.store
        self.server = NbdServer(links, slow_threads=slow_threads, requests_max=32)
        self.pool = self.store.create_pool(pages=max_pages or pages, persistent=True)
        self.number = self.server.add_export(
            self.pool, pages * PAGE_BYTES, (max_pages or pages) * PAGE_BYTES, read_only=read_only
        )
        self.bytes = pages * PAGE_BYTES  # that clients are told
        self.ended: list[str] = []
        self._threads: list[threading.Thread] = []
        self._clients: list[NbdClient] = []

    def connect(
        self,
        *,
        structured: bool = True,
        tls: tuple[TlsContext, ssl.SSLContext] | None = None,
        tcp: bool = False,
    ) -> NbdClient:
        """A client past its handshake, by a pair of Unix sockets or by TCP. tls: the server's side and the client's."""
        ours, theirs = _tcp_pair() if tcp else socket.socketpair()
        connection = NbdConnection(theirs.detach())
        if tls is not None:
            greeting = threading.Thread(target=connection.start_tls, args=(tls[0], DEADLINE_S))
            greeting.start()
            ours = tls[1].wrap_socket(ours)
            greeting.join(DEADLINE_S)
        client = NbdClient(ours)
        self.serve(connection, structured=structured)
        self._clients.append(client)
        return client

    def serve(self, connection: NbdConnection, *, structured: bool = True) -> None:
        def run() -> None:
            context = ALLOCATION_ID if structured else None
            self.ended.append(connection.serve(self.server, self.number, structured, context, self.bytes))
            connection.close()

        thread = threading.Thread(target=run)
        thread.start()
        self._threads.append(thread)
        wait_until(lambda: connection.serving or not thread.is_alive(), "the connection is served")

    def grow(self, size_bytes: int) -> None:
        """Those who connect from now on are told so."""
        self.server.resize(self.number, size_bytes)
        self.bytes = size_bytes

    def statistics(self) -> dict[str, int]:
        return self.server.statistics(self.number)

    def close(self) -> None:
        """Ends everything; the clients see the end of their connections."""
        self.server.stop()
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for client in self._clients:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
