"""What happens on the port before anybody is greeted: no thread is used for who has not begun to speak TLS.

A caller's first record is looked at where it lies, in the kernel: it stays there for whoever does the handshake. Then
the caller waits for one of a bounded number of turns. Who is in the way goes, as `ramster.admission` decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ramster.admission import Limits, Table, source_of
from ramster.errors import ProtocolError, Refused

# Who has not said anything costs a descriptor.
SILENT: Final = Limits(total=256, per_source=64, reserved=64)
# Who has spoken and waits for a turn makes room for nobody who has not.
SPOKEN: Final = Limits(total=128, per_source=64, reserved=64)
# Who has a turn is worth a thread. An honest one is through in a few round trips, and is given time for that on a
# machine that is busy. A peer needs two, and one more each for those that it has given up.
GREETED: Final = Limits(total=64, per_source=32, reserved=32, per_name=8, patience_s=0.5)

# RFC 8446: a record's header has five bytes, its first byte says that a handshake follows, whose first byte is 1 of a
# ClientHello. A record has at most 2^14 bytes.
_HEADER: Final = 5
_HANDSHAKE: Final = 22
_CLIENT_HELLO: Final = 1
_RECORD_MAX: Final = 1 << 14
_RETRY_S: Final = 0.05
_ESTABLISHED: Final = 1


def record_bytes(head: bytes) -> int:
    """Length of the ClientHello record that begins with these six bytes; 0 where it is none."""
    length = int.from_bytes(head[3:5], "big")
    begins = len(head) > _HEADER and head[0] == _HANDSHAKE and head[1] == 3 and head[_HEADER] == _CLIENT_HELLO
    return _HEADER + length if begins and length <= _RECORD_MAX else 0


def has_spoken(sock: socket.socket) -> bool:
    """Whether a whole ClientHello lies there already. Does not wait."""
    try:
        record = record_bytes(sock.recv(_HEADER + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        return 0 < record == len(sock.recv(record, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False  # nothing has come yet, or the caller is gone


async def client_hello(sock: socket.socket) -> None:
    """Return once a whole ClientHello can be read from the socket, which is not read from. ProtocolError where anything
    else came, OSError where the caller is gone. The time is the caller's of this function to bound.
    """
    wanted = _HEADER + 1
    seen = await _peek(sock, wanted)
    record = record_bytes(seen)
    if not record:
        raise ProtocolError(f"it does not speak TLS: the first bytes are {seen!r}")
    await _peek(sock, record)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


async def _peek(sock: socket.socket, wanted: int) -> bytes:
    """So many bytes, which stay where they are. The kernel wakes us for them all, not for each that drips in."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
    while True:
        await readable(sock)
        with contextlib.suppress(BlockingIOError, InterruptedError):
            seen = sock.recv(wanted, socket.MSG_PEEK)
            if len(seen) == wanted:
                return seen
            if not seen:
                raise ConnectionResetError("it left without a word")
            if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED:
                raise ProtocolError(f"it does not speak TLS: all that it sent is {seen[:6]!r}")
        # The kernel is short of memory and wants to be rid of what came.
        await asyncio.sleep(_RETRY_S)


async def readable(sock: socket.socket) -> None:
    """Return once it has something, which stays there. Where the task is cancelled, nothing of it is lost."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()

    def wake() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock, wake)
    try:
        await ready
    finally:
        loop.remove_reader(sock)


@dataclass(slots=True, eq=False)
class Caller:
    """A connection that was accepted, until it is decided. `drop` ends it from any thread."""

    sock: socket.socket
    host: str
    source: str
    expected: bool
    silent: int = 0
    spoken: int = 0
    greeted: int = 0
    dropped: bool = False

    def drop(self) -> None:
        self.dropped = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)


class Door:
    """Everybody who has come and is not decided. expected: addresses of the configured peers, for whom room is kept."""

    def __init__(
        self, expected: Iterable[str], silent: Limits = SILENT, greeted: Limits = GREETED, spoken: Limits = SPOKEN
    ) -> None:
        self.silent = Table(silent)
        self.spoken = Table(spoken)
        self.greeted = Table(greeted)
        self._expected = frozenset(map(source_of, expected))
        # First come, first served; strangers never stand before those who are expected.
        self._queues = {True: asyncio.Lock(), False: asyncio.Lock()}

    def knock(self, sock: socket.socket, host: str) -> Caller:
        """For a connection that was just accepted. Refused where there is no room; the socket stays whose it was.

        A ClientHello that came while the caller stood in the kernel's queue is seen here: in a flood of those who say
        nothing, its caller might be displaced before its task had a turn.
        """
        source = source_of(host)
        caller = Caller(sock, host, source, source in self._expected)
        if has_spoken(sock):
            caller.spoken = _entered(self.spoken, caller)
        else:
            caller.silent = _entered(self.silent, caller)
        return caller

    async def turn(self, caller: Caller) -> None:
        """Return when the caller has spoken and may be greeted. ProtocolError, Refused, OSError; bound the time."""
        if not caller.spoken:
            await client_hello(caller.sock)
            caller.spoken = _entered(self.spoken, caller)
            self.silent.leave(caller.silent)
        async with self._queues[caller.expected]:
            while True:
                if caller.dropped:
                    raise ConnectionResetError("it had to make room for others")
                entered = self.greeted.enter(caller.source, caller.expected, caller.drop)
                if not isinstance(entered, str):
                    caller.greeted = entered
                    break
                await asyncio.sleep(_RETRY_S)
        self.spoken.leave(caller.spoken)

    def leave(self, caller: Caller) -> bool:
        """Decided or gone: `drop` is not called any more. False where it was told to go before. From any thread."""
        self.silent.leave(caller.silent)
        self.spoken.leave(caller.spoken)
        self.greeted.leave(caller.greeted)
        return not caller.dropped


def _entered(table: Table, caller: Caller) -> int:
    """The key under which the caller waits there."""
    entered = table.enter(caller.source, caller.expected, caller.drop)
    if isinstance(entered, str):
        raise Refused(entered)
    return entered
