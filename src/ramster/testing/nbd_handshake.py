"""The client's side of the NBD handshake for tests: says what it is told to, right or wrong, step by step.

Covers dialling, options and TLS; `go` hands over to ramster.testing.nbd, which covers the transmission phase.
"""

from __future__ import annotations

import socket
import ssl
import struct
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from ramster.testing.nbd import NbdClient, receive_exactly
from ramster.wire import nbd
from ramster.wire.nbd import Info, Option, OptionReply

TIMEOUT_S: Final = 30.0
_REPLY: Final = struct.Struct(">QIII")
_MORE: Final = (OptionReply.SERVER, OptionReply.INFO, OptionReply.META_CONTEXT)


class Dialled:
    """A connection that has read the greeting and answered with `flags`; a context manager. where: a socket's path, or
    (host, port). ConnectionError once the server has closed it.
    """

    def __init__(self, where: Path | tuple[str, int], flags: int = 3) -> None:
        if isinstance(where, Path):
            self.socket: socket.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.socket.settimeout(TIMEOUT_S)
            self.socket.connect(str(where))
        else:
            self.socket = socket.create_connection(where, TIMEOUT_S)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.size = 0
        self.flags = nbd.TransmissionFlag(0)
        try:
            self.greeting = self.receive(18)
            self.socket.sendall(struct.pack(">I", flags))
        except BaseException:
            self.socket.close()
            raise

    def receive(self, size: int) -> bytes:
        return receive_exactly(self.socket, size)

    def closed(self) -> bytes:
        """Waits until the server has closed the connection; what it said before."""
        said = b""
        try:
            while part := self.socket.recv(1 << 16):
                said += part
        except ConnectionError:
            pass
        return said

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """(type, data) of each reply, the last one final."""
        self.socket.sendall(nbd.pack_option(option, data))
        replies: list[tuple[int, bytes]] = []
        while not replies or replies[-1][0] in _MORE:
            magic, answered, kind, length = _REPLY.unpack(self.receive(_REPLY.size))
            assert (magic, answered) == (nbd.OPTION_REPLY_MAGIC, option)
            replies.append((kind, self.receive(length)))
        return replies

    def start_tls(self, context: ssl.SSLContext, name: str) -> None:
        """STARTTLS; the server's certificate must be for `name`. ssl.SSLError."""
        assert self.option(Option.STARTTLS) == [(OptionReply.ACK, b"")]
        self.socket = context.wrap_socket(self.socket, server_hostname=name)

    def go(self, name: str, *, structured: bool = True) -> NbdClient:
        """On to the transmission phase. AssertionError shows what the server said instead."""
        if structured:
            assert self.option(Option.STRUCTURED_REPLY) == [(OptionReply.ACK, b"")]
        replies = self.option(Option.GO, nbd.pack_info(name, Info.BLOCK_SIZE))
        assert replies[-1] == (OptionReply.ACK, b""), replies
        told = {int.from_bytes(body[:2], "big"): body[2:] for _, body in replies[:-1]}
        self.size, flags = struct.unpack(">QH", told[Info.EXPORT])
        self.flags = nbd.TransmissionFlag(flags)
        return NbdClient(self.socket)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
