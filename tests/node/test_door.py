"""The door of the links port: who has spoken is displaced by nobody who has not, and nobody holds up the loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from ramster.admission import Limits
from ramster.errors import ProtocolError
from ramster.node.door import Caller, Door, has_spoken
from ramster.testing.proxy import wait_until

HELLO = b"\x16\x03\x01\x00\x40\x01" + bytes(63)
ROOM = Limits(total=4, per_source=2)
TURNS = Limits(total=4, per_source=2, patience_s=60.0)


class Pairs:
    """Connections by TCP: (the caller's end, the door's end)."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = [self._listener]

    def __call__(self, says: bytes = b"") -> tuple[socket.socket, socket.socket]:
        near = socket.create_connection(self._listener.getsockname())
        far, _ = self._listener.accept()
        self._ends += [near, far]
        far.setblocking(False)
        if says:
            near.sendall(says)
            wait_until(lambda: peeked(far, len(says)), "it lies there")
        return near, far

    def close(self) -> None:
        for end in self._ends:
            end.close()


def peeked(sock: socket.socket, size: int) -> bool:
    try:
        return len(sock.recv(size, socket.MSG_PEEK)) == size
    except BlockingIOError:
        return False


@pytest.fixture
def pair() -> Iterator[Pairs]:
    pairs = Pairs()
    yield pairs
    pairs.close()


@pytest.mark.parametrize(
    ("says", "spoken"),
    [
        (b"", False),
        (HELLO[:5], False),
        (HELLO[:6], False),
        (HELLO[:-1], False),
        (HELLO, True),
        (HELLO + b"early", True),
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (bytes(100), False),
        (b"\x16\x03\x01\xff\xff\x01" + bytes(100), False),
    ],
)
def test_what_lies_there(pair: Pairs, says: bytes, spoken: bool) -> None:
    near, far = pair(says)
    assert has_spoken(far) is spoken
    assert not says or far.recv(len(says) + 1) == says, "nothing was taken away"
    near.close()


def test_who_has_left_has_not_spoken(pair: Pairs) -> None:
    near, far = pair()
    near.close()
    wait_until(lambda: peeked(far, 0), "gone")
    assert not has_spoken(far)


def test_who_had_spoken_when_it_was_accepted_is_displaced_by_no_arrival(pair: Pairs) -> None:
    async def run() -> None:
        door = Door([], ROOM, TURNS, ROOM)
        honest = door.knock(pair(HELLO)[1], "192.0.2.1")
        crowd = [door.knock(pair()[1], "192.0.2.1") for _ in range(5)]
        assert [caller.dropped for caller in (honest, *crowd)] == [False, True, True, True, False, False]
        await asyncio.wait_for(door.turn(honest), 5)
        assert honest.greeted and not len(door.spoken) and len(door.silent) == 2

    asyncio.run(run())


def test_who_speaks_later_makes_room_for_who_has_not_spoken(pair: Pairs) -> None:
    """And is displaced no more, while it waits for its turn."""

    async def run() -> None:
        door = Door([], ROOM, TURNS, ROOM)
        greeted = [door.knock(pair(HELLO)[1], "192.0.2.1") for _ in range(2)]
        for each in greeted:
            await asyncio.wait_for(door.turn(each), 5)
        near, far = pair()
        late = door.knock(far, "192.0.2.1")
        turn = asyncio.create_task(door.turn(late))
        await asyncio.sleep(0)
        near.sendall(HELLO)
        await asyncio.to_thread(wait_until, lambda: len(door.spoken) == 1, "heard")
        assert not len(door.silent)
        for _ in range(5):
            door.knock(pair()[1], "192.0.2.1")
        assert not late.dropped and not turn.done(), "no turn is free"
        door.leave(greeted[0])
        await asyncio.wait_for(turn, 5)
        assert late.greeted and not len(door.spoken)

    asyncio.run(run())


def test_those_who_have_spoken_are_limited_too(pair: Pairs) -> None:
    async def run() -> None:
        door = Door([], ROOM, TURNS, ROOM)
        callers = [door.knock(pair(HELLO)[1], "192.0.2.1") for _ in range(4)]
        assert [caller.dropped for caller in callers] == [True, True, False, False]
        for caller in callers[:2]:
            with pytest.raises((ConnectionError, ProtocolError)):
                await asyncio.wait_for(door.turn(caller), 5)
        assert left(door, callers) == [False, False, True, True]
        assert not len(door.silent) and not len(door.spoken) and not len(door.greeted)

    asyncio.run(run())


def left(door: Door, callers: list[Caller]) -> list[bool]:
    return [door.leave(caller) for caller in callers]
